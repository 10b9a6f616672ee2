"""What can be checked of a run before a model is loaded: settings, trackers, data, and the repository on the Hub."""

from typing import Any

import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from .arguments import ContrastiveFlowMatchingArguments
from .calibration import no_negatives
from .card import claim_repository
from .data.dataset import Examples, open_examples
from .optimization import Schedule, make_optimizer


def check_run(
    args: ContrastiveFlowMatchingArguments, train_dataset: Any, eval_dataset: Any = None
) -> tuple[Examples, Examples | None]:
    """Checks a run and opens its data; the trainer takes what this returns for its data sets.

    Args:
        args: The settings.
        train_dataset: Images with captions, in any form that `open_examples` takes.
        eval_dataset: Held-out ones, likewise.

    Raises:
        ValueError: Settings, trackers, optimizer, schedule or data are not as they should be.
        TypeError: The data are of another type.
        OSError: The data cannot be read, or the Hub refuses the repository that is to be pushed to.
    """
    check_settings(args)
    train = open_checked(args, train_dataset)
    held_out = None if eval_dataset is None else open_data(args, eval_dataset)
    if args.push_to_hub and not args.dry_run:
        claim_repository(args)
    return train, held_out


def check_settings(args: ContrastiveFlowMatchingArguments) -> None:
    """Checks that there are the trackers, the optimizer and the schedule that the settings name.

    Raises:
        ValueError: There are not.
    """
    usable = [str(name) for name in get_available_trackers()]
    for name in args.report_to:
        if name not in ("all", *usable):
            known = (
                f"tracker {name!r} is not installed" if name in LoggerType.list() else f"no tracker is called {name!r}"
            )
            raise ValueError(f"{known}, only {', '.join(usable) or 'none'}; install it, or give report_to='none'")
    optimizer = make_optimizer(args, [torch.nn.Parameter(torch.zeros(1))])
    Schedule(args, optimizer, args.max_steps or 1)


def open_data(args: ContrastiveFlowMatchingArguments, dataset: Any) -> Examples:
    """Opens a data set with the columns of the settings; errors as `open_examples`."""
    return open_examples(
        dataset,
        image_column=args.image_column,
        caption_column=args.caption_column,
        negative_caption_column=args.negative_caption_column,
    )


def open_checked(args: ContrastiveFlowMatchingArguments, dataset: Any) -> Examples:
    """Opens training data, and refuses those of which the objective could learn nothing.

    Raises:
        ValueError: They have no captions that are wrong for an image, or no known length where one is needed; and as
            `open_examples`.
    """
    examples, objective = open_data(args, dataset), args.make_objective("flow")
    if args.max_steps is None and examples.count is None:
        raise ValueError("a stream does not tell its length; give max_steps instead of num_train_epochs")
    if objective.min_negatives and not examples.has_negatives(objective.min_negatives):
        raise ValueError(no_negatives(objective))
    return examples
