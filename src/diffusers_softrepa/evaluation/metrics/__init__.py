"""The metrics, and their classes by name."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .clip import CLIP_L, CLIPScore, HPSv2, PickScore
from .detectors import BoxDetector, Detection, Detector, Mask2FormerDetector
from .distances import CMMD, FDCLIP, FDDINOv2
from .geneval import GenEval
from .metric import FunctionMetric, ImageMetric, Metric, SetMetric
from .vqa import VQAScore

IMAGE_METRICS: Mapping[str, Callable[[], ImageMetric]] = {
    "clip_score": CLIPScore,
    "clip_similarity": lambda: CLIPScore(CLIP_L, weight=1.0, prefix="", name="clip_similarity"),
    "pick_score": PickScore,
    "hps_v2.1": HPSv2,
    "hps_v2.0": lambda: HPSv2("v2.0"),
    "vqa_score": VQAScore,
    "geneval": GenEval,
}
SET_METRICS: Mapping[str, Callable[[Any], SetMetric]] = {"fd_dinov2": FDDINOv2, "fd_clip": FDCLIP, "cmmd": CMMD}

__all__ = [
    "CMMD",
    "FDCLIP",
    "IMAGE_METRICS",
    "SET_METRICS",
    "BoxDetector",
    "CLIPScore",
    "Detection",
    "Detector",
    "FDDINOv2",
    "FunctionMetric",
    "GenEval",
    "HPSv2",
    "ImageMetric",
    "Mask2FormerDetector",
    "Metric",
    "PickScore",
    "SetMetric",
    "VQAScore",
    "as_metrics",
    "make_metric",
]


def make_metric(name: str, references: str | Path | Sequence[Any] | None = None) -> Metric:
    """Returns the metric of a name, with its published model.

    Args:
        name: A key of `IMAGE_METRICS` or `SET_METRICS`.
        references: Reference images for a metric of `SET_METRICS`: a folder, or a sequence of files or images.

    Raises:
        ValueError: There is no such metric, or it needs reference images and none were given.
    """
    if name in IMAGE_METRICS:
        return IMAGE_METRICS[name]()
    if name not in SET_METRICS:
        raise ValueError(f"no metric is named {name!r}; the metrics are {', '.join([*IMAGE_METRICS, *SET_METRICS])}")
    if references is None:
        raise ValueError(f"{name} compares with reference images; pass a folder of them as references")
    return SET_METRICS[name](references)


def as_metrics(given: Sequence[Any], references: str | Path | Sequence[Any] | None = None) -> list[Metric]:
    """Returns metrics that were given as metrics, names, or functions of images and prompts.

    Args:
        given: The metrics.
        references: Reference images for metrics of `SET_METRICS` that are given by name.

    Raises:
        TypeError: One is neither a metric, a name nor a function.
        ValueError: Two metrics have the same name, or there is no metric of a name.
    """
    metrics = [_as_metric(one, references) for one in given]
    names = [metric.name for metric in metrics]
    if len(set(names)) != len(names):
        raise ValueError(f"the names of metrics must differ, but are {names}; pass another name= to one of them")
    return metrics


def _as_metric(given: Any, references: str | Path | Sequence[Any] | None) -> Metric:
    if isinstance(given, Metric):
        return given
    if isinstance(given, str):
        return make_metric(given, references)
    if callable(given):
        return FunctionMetric(given)
    raise TypeError(f"a metric is a Metric, a name or a function of images and prompts, but is {given!r:.60}")
