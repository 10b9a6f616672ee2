"""Training soft tokens by contrast; it needs the `train` extra."""

from .arguments import ContrastiveFlowMatchingArguments
from .callbacks import TrainerCallback, TrainerControl, TrainerState
from .preflight import check_run
from .trainer import ContrastiveFlowMatchingTrainer, TrainingResult

__all__ = [
    "ContrastiveFlowMatchingArguments",
    "ContrastiveFlowMatchingTrainer",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "TrainingResult",
    "check_run",
]
