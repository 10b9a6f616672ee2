"""Object detectors for `GenEval`: what is in a picture, where, and how sure they are."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import AutoImageProcessor, AutoModelForObjectDetection, Mask2FormerModel, Mask2FormerPreTrainedModel

from .loading import load

MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"
_MAX_DETECTIONS = 100

# How detectors spell COCO's classes -> how GenEval does.
_SPELLINGS = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}


@dataclass(frozen=True, eq=False)
class Detection:
    """One object.

    Attributes:
        label: Its class, in GenEval's spelling.
        score: 0..1.
        box: Left, top, right, bottom in pixels.
        mask: (height, width) bool, None from a detector of boxes.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None


class Detector(ABC):
    """Finds the objects of a picture."""

    @abstractmethod
    def setup(self, device: torch.device) -> None:
        """Loads the model."""

    @property
    @abstractmethod
    def labels(self) -> set[str]:
        """The classes that it knows, once set up."""

    @abstractmethod
    def detect(self, image: Image.Image) -> list[Detection]:
        """Returns what it finds, in no order."""

    def close(self) -> None:  # noqa: B027
        """Lets go of the model."""


class _Mask2Former(Mask2FormerPreTrainedModel):
    """`Mask2FormerForUniversalSegmentation` without its loss, which needs scipy."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = Mask2FormerModel(config)
        self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
        self.post_init()

    _keys_to_ignore_on_load_unexpected = [r"criterion\."]  # noqa: RUF012


class _TransformersDetector(Detector, ABC):
    """A detector of transformers and its image processor, from one Hub id or folder."""

    _model_class: ClassVar[Any]

    def __init__(self, model: str) -> None:
        self.model = model
        self._loaded: tuple[Any, Any] | None = None

    def setup(self, device: torch.device) -> None:
        model = load(self._model_class, self.model, "GenEval").eval().to(device)
        self._loaded = load(AutoImageProcessor, self.model, "GenEval"), model

    def close(self) -> None:
        self._loaded = None

    @property
    def labels(self) -> set[str]:
        return set(_spelled(_ready(self._loaded)[1].config.id2label).values())


@final
class Mask2FormerDetector(_TransformersDetector):
    """The kind of detector that GenEval was published with: instances with masks.

    Args:
        model: Mask2Former for instances, a Hub id or folder.
    """

    _model_class = _Mask2Former

    def __init__(self, model: str = MASK2FORMER) -> None:
        super().__init__(model)

    @torch.no_grad()
    def detect(self, image: Image.Image) -> list[Detection]:
        processor, model = _ready(self._loaded)
        inputs = processor(images=[image], return_tensors="pt")
        inputs = {name: inputs[name].to(model.device) for name in ("pixel_values", "pixel_mask") if name in inputs}
        found = model.model(**inputs, output_hidden_states=True)
        classes = model.class_predictor(found.transformer_decoder_intermediate_states[-1].transpose(0, 1))[0]
        masks = found.masks_queries_logits[-1].float()
        masks = interpolate(masks, size=image.size[::-1], mode="bilinear", align_corners=False)[0]
        return instances(classes.float(), masks, _spelled(model.config.id2label))


@final
class BoxDetector(_TransformersDetector):
    """Any object detector of transformers that knows COCO's classes (YOLOS, DETR, RT-DETR): boxes without masks.

    Args:
        model: A Hub id or folder.
    """

    _model_class = AutoModelForObjectDetection

    @torch.no_grad()
    def detect(self, image: Image.Image) -> list[Detection]:
        processor, model = _ready(self._loaded)
        output = model(**processor(images=[image], return_tensors="pt").to(model.device))
        sizes = torch.tensor([image.size[::-1]])
        (found,) = processor.post_process_object_detection(output, threshold=0.0, target_sizes=sizes)
        labels = _spelled(model.config.id2label)
        rows = zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True)
        return [Detection(labels[label], score, tuple(box)) for label, score, box in rows]


def instances(classes: Tensor, masks: Tensor, labels: dict[int, str]) -> list[Detection]:
    """Returns the best 100 pairs of a query and a class, each with its mask and the box around it.

    The score of a pair is the probability of the class times the mean probability of the mask inside itself.

    Args:
        classes: Logits (queries, classes + 1), the last one for no object.
        masks: Logits (queries, height, width).
        labels: Name of each class.

    Source: Mask2Former, arXiv 2112.01527, as GenEval's detector runs it.
    """
    probabilities = classes.softmax(-1)[:, :-1]  # (queries, classes)
    best = probabilities.flatten().topk(min(_MAX_DETECTIONS, probabilities.numel()))
    found = []
    for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        query, label = divmod(index, probabilities.shape[1])
        inside = masks[query] > 0
        if not inside.any():
            continue
        sure = masks[query].sigmoid()[inside].mean().item()
        rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
        box = (columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1)
        found.append(Detection(labels[label], score * sure, box, inside.cpu().numpy()))
    return found


def _spelled(id2label: dict[Any, str]) -> dict[int, str]:
    return {int(number): _SPELLINGS.get(label, label) for number, label in id2label.items()}


def _ready(loaded: tuple[Any, Any] | None) -> tuple[Any, Any]:
    if loaded is None:
        raise RuntimeError("the detector has no model yet; call setup(device) first")
    return loaded
