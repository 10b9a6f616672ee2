"""`GenEval`: whether an image shows the objects, numbers, colours and positions that its prompt asks for.

A prompt of GenEval's task set lists what must be there (`include`: class, count, perhaps colour and position) and what
must not be there (`exclude`: class, count). A detector finds the objects, which are sorted by confidence:

- an object counts if its confidence is above 0.3 (0.9 for counting); at most 16 of a class count;
- the colour of an object is the one of ten whose text is nearest to the cropped object in CLIP ViT-L/14;
- A is left of, right of, above or below B when the offset of their centres, less 0.1 of their summed sizes along each
  axis, points that way by more than half of the offset's length.

The score is 1 if all of that holds and 0 otherwise. The published total is the mean of the categories' means.

Source: Ghosh et al. 2023, arXiv 2310.11513, and its published evaluation script.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPModel

from ..prompts import Prompt
from .clip import CLIP_L, ClipEncoder
from .detectors import Detection, Detector, Mask2FormerDetector
from .loading import load
from .metric import ImageMetric

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")
THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16
POSITION_MARGIN = 0.1
_BACKGROUND = "#999"

Box = tuple[float, float, float, float]


@final
class GenEval(ImageMetric[ClipEncoder]):
    """The share of images that show what GenEval's prompts ask for.

    Args:
        detector: Detector that finds the objects. Defaults to a `Mask2FormerDetector`.
        color_model: Hub id or folder of the CLIP model that names colours. Defaults to ViT-L/14.
    """

    name = "geneval"
    reference = "Ghosh et al. 2023, arXiv 2310.11513"

    def __init__(self, detector: Detector | None = None, color_model: str = CLIP_L) -> None:
        self.detector = detector or Mask2FormerDetector()
        self.color_model = color_model
        self._colors: dict[str, Tensor] = {}

    def setup(self, device: torch.device) -> None:
        self.detector.setup(device)
        model = load(CLIPModel, self.color_model, "GenEval").eval().to(device)
        self.loaded, self._colors = ClipEncoder(model, self.color_model, "GenEval"), {}

    def close(self) -> None:
        self.detector.close()
        super().close()

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Tensor:
        return torch.tensor([float(self._correct(*pair)) for pair in zip(images, prompts, strict=True)])

    def check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            _task(prompt)

    def _correct(self, image: Image.Image, prompt: Prompt) -> bool:
        task = _task(prompt)
        asked = {need["class"] for need in [*task["include"], *task.get("exclude", [])]}
        unknown = sorted(asked - self.detector.labels)
        if unknown:
            raise ValueError(
                f"the detector does not know {', '.join(unknown)}, which prompt {prompt.id!r} asks for; use a "
                "detector of COCO's classes"
            )
        found = surest(self.detector.detect(image), COUNTING_THRESHOLD if task.get("tag") == "counting" else THRESHOLD)
        return is_correct(task, found, lambda objects, label: self.colors(image, objects, label))

    def colors(self, image: Image.Image, objects: Sequence[Detection], label: str) -> list[str]:
        """Returns the colour of each object."""
        if label not in self._colors:
            self._colors[label] = self._color_texts(self.loaded, label)
        crops = self.loaded.images([cut_out(image, one) for one in objects])
        nearest = (normalize(crops.float(), dim=-1) @ self._colors[label].T).argmax(-1)
        return [COLORS[index] for index in nearest.tolist()]

    def _color_texts(self, encoder: ClipEncoder, label: str) -> Tensor:
        """Returns an embedding for each colour, (colours, width): the mean over the templates."""
        texts = [template.format(color=color, label=label) for color in COLORS for template in TEMPLATES]
        features = normalize(encoder.texts(texts).float(), dim=-1).unflatten(0, (len(COLORS), len(TEMPLATES)))
        return normalize(features.mean(1), dim=-1)


def _task(prompt: Prompt) -> Mapping[str, Any]:
    if "include" not in prompt.metadata:
        raise ValueError(
            f"GenEval scores only its own task set, but prompt {prompt.id!r} has no 'include'; load GenEval's "
            "evaluation_metadata.jsonl with load_prompts"
        )
    return prompt.metadata


def surest(found: Sequence[Detection], threshold: float) -> dict[str, list[Detection]]:
    """Returns the objects above a threshold by class, at most 16 of each, by falling confidence."""
    kept: dict[str, list[Detection]] = {}
    for one in sorted(found, key=lambda one: -one.score):
        if one.score > threshold and len(kept.setdefault(one.label, [])) < MAX_OBJECTS:
            kept[one.label].append(one)
    return kept


def is_correct(
    task: Mapping[str, Any],
    found: Mapping[str, Sequence[Detection]],
    colors_of: Callable[[Sequence[Detection], str], list[str]],
) -> bool:
    """Returns whether the objects of an image are those that a task asks for.

    Args:
        task: `include` and `exclude`, as in GenEval's JSONL.
        found: The objects by class, by falling confidence.
        colors_of: Function from objects and their class to the colour of each.
    """
    groups: list[Sequence[Detection] | None] = []
    for need in task["include"]:
        objects = found.get(need["class"], [])[: need["count"]]
        groups.append(objects if _meets(need, objects, groups, colors_of) else None)
    too_many = any(len(found.get(need["class"], [])) >= need["count"] for need in task.get("exclude", []))
    return None not in groups and not too_many


def _meets(
    need: Mapping[str, Any],
    objects: Sequence[Detection],
    groups: Sequence[Sequence[Detection] | None],
    colors_of: Callable[[Sequence[Detection], str], list[str]],
) -> bool:
    if len(objects) < need["count"]:
        return False
    if "color" in need and colors_of(objects, need["class"]).count(need["color"]) < need["count"]:
        return False
    if "position" not in need:
        return True
    relation, number = need["position"]
    others = groups[number]
    return others is not None and all(relation in relations(one.box, other.box) for one in objects for other in others)


def relations(one: Box, other: Box) -> set[str]:
    """Returns the position of one box relative to another: a subset of `left of`, `right of`, `above`, `below`."""
    offset, beyond = [], []
    for low, high in ((0, 2), (1, 3)):
        apart = (one[low] + one[high] - other[low] - other[high]) / 2
        slack = POSITION_MARGIN * (abs(one[high] - one[low]) + abs(other[high] - other[low]))
        offset.append(apart)
        beyond.append(math.copysign(max(abs(apart) - slack, 0.0), apart))
    if max(map(abs, beyond)) < 1e-3:
        return set()
    x, y = (value / math.hypot(*offset) for value in beyond)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, is_so in holds.items() if is_so}


def cut_out(image: Image.Image, found: Detection) -> Image.Image:
    """Returns the part of an image in an object's box, grey outside the object's mask."""
    whole = image.convert("RGB")
    if found.mask is not None:
        whole = Image.composite(whole, Image.new("RGB", whole.size, _BACKGROUND), Image.fromarray(found.mask))
    return whole.crop(found.box)  # type: ignore[arg-type]  # rounds
