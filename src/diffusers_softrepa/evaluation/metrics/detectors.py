"""Object detectors for `GenEval`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import AutoImageProcessor, AutoModelForObjectDetection, Mask2FormerModel, Mask2FormerPreTrainedModel

from .loading import HasModel, load

MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"
_MAX_DETECTIONS = 100

# COCO's classes as detectors spell them -> as GenEval spells them.
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
    """An object that a detector found.

    Attributes:
        label: Class of the object, in GenEval's spelling.
        score: Confidence, 0..1.
        box: Left, top, right and bottom edge in pixels.
        mask: Pixels of the object, (height, width) bool; None from a detector that finds boxes only.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None


class Detector(HasModel[tuple[Any, Any]], ABC):
    """A model that finds the objects of an image."""

    @abstractmethod
    def setup(self, device: torch.device) -> None:
        """Loads the model."""

    @property
    @abstractmethod
    def labels(self) -> set[str]:
        """The classes that the detector knows; available after `setup`."""

    @abstractmethod
    def detect(self, image: Image.Image) -> list[Detection]:
        """Returns the objects of an image in any order."""


class _Mask2Former(Mask2FormerPreTrainedModel):
    """`Mask2FormerForUniversalSegmentation` without its loss, which needs scipy."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = Mask2FormerModel(config)
        self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
        self.post_init()

    _keys_to_ignore_on_load_unexpected = [r"criterion\."]  # noqa: RUF012


class _TransformersDetector(Detector, ABC):
    """A detector and its image processor of transformers, loaded from one Hub id or folder."""

    _model_class: ClassVar[Any]

    def __init__(self, model: str) -> None:
        self.model = model

    def setup(self, device: torch.device) -> None:
        model = load(self._model_class, self.model, "GenEval").eval().to(device)
        self.loaded = load(AutoImageProcessor, self.model, "GenEval"), model

    @property
    def labels(self) -> set[str]:
        return set(_spelled(self.loaded[1].config.id2label).values())


@final
class Mask2FormerDetector(_TransformersDetector):
    """The detector that GenEval was published with: objects with masks.

    Args:
        model: Hub id or folder of a Mask2Former for instance segmentation. Defaults to the small one for COCO.
    """

    _model_class = _Mask2Former

    def __init__(self, model: str = MASK2FORMER) -> None:
        super().__init__(model)

    @torch.no_grad()
    def detect(self, image: Image.Image) -> list[Detection]:
        processor, model = self.loaded
        inputs = processor(images=[image], return_tensors="pt")
        inputs = {name: inputs[name].to(model.device) for name in ("pixel_values", "pixel_mask") if name in inputs}
        found = model.model(**inputs, output_hidden_states=True)
        classes = model.class_predictor(found.transformer_decoder_intermediate_states[-1].transpose(0, 1))[0]
        masks = found.masks_queries_logits[-1].float()
        masks = interpolate(masks, size=image.size[::-1], mode="bilinear", align_corners=False)[0]
        return instances(classes.float(), masks, _spelled(model.config.id2label))


@final
class BoxDetector(_TransformersDetector):
    """An object detector of transformers that knows COCO's classes (YOLOS, DETR, RT-DETR): boxes without masks.

    Args:
        model: Hub id or folder of the detector.
    """

    _model_class = AutoModelForObjectDetection

    @torch.no_grad()
    def detect(self, image: Image.Image) -> list[Detection]:
        processor, model = self.loaded
        output = model(**processor(images=[image], return_tensors="pt").to(model.device))
        sizes = torch.tensor([image.size[::-1]])
        (found,) = processor.post_process_object_detection(output, threshold=0.0, target_sizes=sizes)
        labels = _spelled(model.config.id2label)
        rows = zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True)
        return [Detection(labels[label], score, tuple(box)) for label, score, box in rows]


def instances(classes: Tensor, masks: Tensor, labels: dict[int, str]) -> list[Detection]:
    """Returns the 100 pairs of a query and a class with the highest probability, each with its mask and bounding box.

    The score of a pair is the probability of the class times the mean probability of the mask over its pixels.

    Args:
        classes: Logits (queries, classes + 1); the last class is no object.
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
