"""Metrics by name, one class each."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .clip import CLIP_L, CLIPScore, HPSv2, PickScore
from .detectors import BoxDetector, Detection, Detector, Mask2FormerDetector
from .distances import CMMD, FDCLIP, FDDINOv2
from .geneval import GenEval
from .metric import FunctionMetric, ImageMetric, Metric, SetMetric
from .packages import LPIPS, ImageReward
from .vqa import VQAScore

IMAGE_METRICS: Mapping[str, Callable[[], ImageMetric]] = {
    "clip_score": CLIPScore,
    "clip_similarity": lambda: CLIPScore(CLIP_L, weight=1.0, prefix="", name="clip_similarity"),
    "pick_score": PickScore,
    "hps_v2.1": HPSv2,
    "hps_v2.0": lambda: HPSv2("v2.0"),
    "vqa_score": VQAScore,
    "geneval": GenEval,
    "image_reward": ImageReward,
    "lpips": LPIPS,
}
SET_METRICS: Mapping[str, Callable[[Any], SetMetric]] = {"fd_dinov2": FDDINOv2, "fd_clip": FDCLIP, "cmmd": CMMD}

__all__ = [
    "CMMD",
    "FDCLIP",
    "IMAGE_METRICS",
    "LPIPS",
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
    "ImageReward",
    "Mask2FormerDetector",
    "Metric",
    "PickScore",
    "SetMetric",
    "VQAScore",
    "as_metrics",
    "make_metric",
]


def make_metric(name: str, references: str | Path | Sequence[Any] | None = None) -> Metric:
    """Returns a metric by its name, with its published model.

    Args:
        name: A key of `IMAGE_METRICS` or `SET_METRICS`.
        references: Reference pictures, for `SET_METRICS`: a folder, or a sequence of files or pictures.

    Raises:
        ValueError: There is no such metric, or it needs reference pictures.
    """
    if name in IMAGE_METRICS:
        return IMAGE_METRICS[name]()
    if name not in SET_METRICS:
        raise ValueError(f"no metric is named {name!r}; there are {', '.join([*IMAGE_METRICS, *SET_METRICS])}")
    if references is None:
        raise ValueError(f"{name} compares with reference pictures; give references=, a folder of them")
    return SET_METRICS[name](references)


def as_metrics(given: Sequence[Any], references: str | Path | Sequence[Any] | None = None) -> list[Metric]:
    """Returns metrics: as given, by name, or around functions of pictures and prompts.

    Raises:
        TypeError: One is nothing of these.
        ValueError: Two have one name, or a name is unknown.
    """
    metrics = [_as_metric(one, references) for one in given]
    names = [metric.name for metric in metrics]
    if len(set(names)) != len(names):
        raise ValueError(f"each metric needs a name of its own, but they are {names}; pass name= to one of them")
    return metrics


def _as_metric(given: Any, references: str | Path | Sequence[Any] | None) -> Metric:
    if isinstance(given, Metric):
        return given
    if isinstance(given, str):
        return make_metric(given, references)
    if callable(given):
        return FunctionMetric(given)
    raise TypeError(f"a metric is a Metric, a name or a function of pictures and prompts, but is {given!r:.60}")
