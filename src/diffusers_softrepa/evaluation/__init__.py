"""Evaluation of adapters: draw prompts in several settings, score the images, and compare the scores."""

from .metrics import (
    CMMD,
    FDCLIP,
    IMAGE_METRICS,
    SET_METRICS,
    BoxDetector,
    CLIPScore,
    Detection,
    Detector,
    FDDINOv2,
    FunctionMetric,
    GenEval,
    HPSv2,
    ImageMetric,
    Mask2FormerDetector,
    Metric,
    PickScore,
    SetMetric,
    VQAScore,
    make_metric,
)
from .prompts import Prompt, load_prompts
from .result import EvaluationResult
from .runner import evaluate
from .scoring import score
from .writing import add_to_card

__all__ = [
    "CMMD",
    "FDCLIP",
    "IMAGE_METRICS",
    "SET_METRICS",
    "BoxDetector",
    "CLIPScore",
    "Detection",
    "Detector",
    "EvaluationResult",
    "FDDINOv2",
    "FunctionMetric",
    "GenEval",
    "HPSv2",
    "ImageMetric",
    "Mask2FormerDetector",
    "Metric",
    "PickScore",
    "Prompt",
    "SetMetric",
    "VQAScore",
    "add_to_card",
    "evaluate",
    "load_prompts",
    "make_metric",
    "score",
]
