"""Training soft tokens by contrast. It needs the `train` extra; its conditioners, which editing uses too, do not."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arguments import ContrastiveFlowMatchingArguments
    from .trainer import ContrastiveFlowMatchingTrainer, TrainingResult

__all__ = ["ContrastiveFlowMatchingArguments", "ContrastiveFlowMatchingTrainer", "TrainingResult"]


def __getattr__(name: str) -> Any:
    """The trainer is imported when it is asked for, so that conditioners need nothing that only training needs."""
    if name == "ContrastiveFlowMatchingArguments":
        from . import arguments

        return arguments.ContrastiveFlowMatchingArguments
    if name in __all__:
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
