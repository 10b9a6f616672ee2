"""Training soft tokens by contrast; it needs the `train` extra."""

from .arguments import ContrastiveFlowMatchingArguments
from .trainer import ContrastiveFlowMatchingTrainer, TrainingResult

__all__ = ["ContrastiveFlowMatchingArguments", "ContrastiveFlowMatchingTrainer", "TrainingResult"]
