"""Training soft tokens by contrast. Nothing outside this package imports it; it needs the `train` extra."""

from .arguments import ContrastiveFlowMatchingArguments
from .trainer import ContrastiveFlowMatchingTrainer, TrainingResult

__all__ = ["ContrastiveFlowMatchingArguments", "ContrastiveFlowMatchingTrainer", "TrainingResult"]
