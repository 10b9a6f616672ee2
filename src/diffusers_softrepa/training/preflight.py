"""Checks of a run that need no model: settings, trackers, optimizer, data, and the repository on the Hub."""

import math
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from torch.optim import Optimizer

from ..card import check_license
from ..checkpoint import CONFIG_NAME, WEIGHTS_NAME
from ..evaluation.prompts import load_prompts
from ..evaluation.scoring import processes
from ..files import check_places
from ..hub import CARD_NAME
from ..quoting import one_line, quoted
from .arguments import ContrastiveFlowMatchingArguments
from .calibration import no_negatives
from .card import CURVES_NAME, SETTINGS_NAME, VALIDATION_NAME, claim_repository
from .checkpoints import BEST_FOLDER, Checkpoints, is_checkpoint_name
from .data.dataset import Examples, open_examples
from .data.image import Framing
from .data.sampler import BrokenCount, PairSampler
from .log import LOG_NAME, PROJECT
from .optimization import check_optimizer
from .validation import IMAGES_FOLDER, VALIDATION_FOLDER


def check_run(
    args: ContrastiveFlowMatchingArguments, train_dataset: Any, eval_dataset: Any = None
) -> tuple[Examples, Examples | None]:
    """Checks the settings of a run and opens its data, before a model is loaded.

    Args:
        args: The settings.
        train_dataset: Training data in any form that `open_examples` takes.
        eval_dataset: Evaluation data in the same forms.

    Returns:
        The opened data sets, which the trainer takes as `train_dataset` and `eval_dataset`.

    Raises:
        ValueError: A setting, a tracker, the optimizer, the schedule or the data are wrong, or there is no checkpoint
            to resume from, or one of other settings.
        TypeError: The data are of a type that cannot be read.
        OSError: The data cannot be read, or the Hub refuses the repository of `push_to_hub`.
    """
    check_settings(args)
    wanted = args.resume_from_checkpoint
    if wanted is not None and (checkpoint := Checkpoints(args.output_dir).read(wanted)) is not None:
        checkpoint.check_settings(args.to_dict())
    train = open_training_data(args, train_dataset)
    evaluation = None if eval_dataset is None else open_data(args, eval_dataset)
    if not args.aspect_buckets:  # what fills a batch of these depends on the model
        size, framing = args.train_batch_size * processes().num_processes, Framing(args.resolution, multiple_of=1)
        for examples in (train, *([] if evaluation is None else [evaluation])):
            PairSampler(examples, framing, size, None, 1, BrokenCount(args.max_broken))  # raises if they fill none
    if args.push_to_hub and not args.dry_run:
        claim_repository(args)
    return train, evaluation


def check_settings(args: ContrastiveFlowMatchingArguments) -> None:
    """Checks what settings name: trackers, optimizer, schedule, compiler, validation prompts and `output_dir`.

    Raises:
        ValueError: One of them does not exist, is not installed or cannot be drawn, or something in `output_dir` is in
            the way.
        TypeError: The settings are of another class.
    """
    if not isinstance(args, ContrastiveFlowMatchingArguments):
        raise TypeError(f"args must be ContrastiveFlowMatchingArguments, but are {quoted(args)}")
    _check_output(args)
    check_license(args.hub_license)
    if args.validation_prompts:
        load_prompts(args.validation_prompts)  # raises for what no pipeline can draw
    if args.torch_compile:
        _check_compilation(args)
    usable = [str(name) for name in get_available_trackers()]
    for name in args.report_to:
        if name not in ("all", *usable):
            known = (
                f"tracker {name!r} is not installed" if name in LoggerType.list() else f"no tracker is called {name!r}"
            )
            raise ValueError(f"{known}, only {', '.join(usable) or 'none'}; install it, or give report_to='none'")
    check_optimizer(args, processes().device)
    BrokenCount(args.max_broken)  # raises for what is no share


def check_parts(callbacks: Any, optimizers: Any) -> None:
    """Checks the objects that a trainer is given besides its settings.

    Raises:
        TypeError: `callbacks` are no list of callbacks, or `optimizers` no pair of an optimizer and a schedule.
    """
    listed = callbacks if isinstance(callbacks, list | tuple) else [callbacks]
    wrong = [entry for entry in listed if not any(name.startswith("on_") for name in dir(entry))]
    if wrong or listed is not callbacks:
        raise TypeError(
            "callbacks must be a list of TrainerCallback objects or classes, but "
            + (f"one is {quoted(wrong[0])}" if wrong else f"got {quoted(callbacks)}")
        )
    pair = optimizers if isinstance(optimizers, list | tuple) and len(optimizers) == 2 else ("", "")
    if not (isinstance(pair[0], Optimizer | None) and (pair[1] is None or hasattr(pair[1], "get_last_lr"))):
        raise TypeError(
            "optimizers must be a pair of a torch optimizer and a schedule, either of them None, but are "
            f"{quoted(optimizers)}"
        )


def _check_compilation(args: ContrastiveFlowMatchingArguments) -> None:
    backend, mode = args.torch_compile_backend or "inductor", args.torch_compile_mode
    try:
        torch.compile(torch.nn.Identity(), backend=backend, mode=mode)
    except Exception as error:  # each backend has its own
        raise ValueError(
            f"torch.compile takes no torch_compile_backend={backend!r} with torch_compile_mode={mode!r}: "
            f"{one_line(error)}; torch.compiler.list_backends() names the backends"
        ) from error


def _check_output(args: ContrastiveFlowMatchingArguments) -> None:
    files = [WEIGHTS_NAME, CONFIG_NAME, CARD_NAME, LOG_NAME, SETTINGS_NAME, CURVES_NAME]
    folders = [BEST_FOLDER, *([PROJECT] if "tensorboard" in args.report_to else [])]
    if args.validation_prompts:
        files, folders = [*files, VALIDATION_NAME], [*folders, VALIDATION_FOLDER, IMAGES_FOLDER]
    output = Path(args.output_dir)
    names = [path.name for path in output.iterdir()] if output.is_dir() else []
    folders += [name for name in names if is_checkpoint_name(name)]
    check_places(output, files, folders, what="output_dir")
    check_places(output / BEST_FOLDER, [WEIGHTS_NAME, CONFIG_NAME, CARD_NAME])
    if args.cache_text or args.cache_latents:
        check_places(args.cache_dir or output / "cache", what="cache_dir")


def open_data(args: ContrastiveFlowMatchingArguments, dataset: Any) -> Examples:
    """Opens a data set with the columns that the settings name; errors as in `open_examples`."""
    columns = {name: getattr(args, name) for name in ("image_column", "caption_column", "negative_caption_column")}
    return open_examples(dataset, **columns, exclude=args.output_dir)


def open_training_data(args: ContrastiveFlowMatchingArguments, dataset: Any) -> Examples:
    """Opens training data, and refuses data without negatives for an objective that needs them.

    Raises:
        ValueError: There are no negatives, or the data are a stream without `max_steps`; also as in `open_examples`.
    """
    examples, objective = open_data(args, dataset), args.make_objective("flow")
    if args.max_steps is None and examples.count is None:
        raise ValueError("a stream does not tell its length; give max_steps instead of num_train_epochs")
    if args.cache_latents and examples.count is None:
        raise ValueError("cache_latents needs data of known length, but they are a stream; leave it out")
    if objective.min_negatives and not examples.has_negatives(objective.min_negatives):
        if not any(examples.captions()):
            raise ValueError(
                "the training data have no caption that can be read: all are absent, empty or hold half of a "
                "character; write one for each image, or name their column with caption_column"
            )
        raise ValueError(no_negatives(objective))
    lacking = examples.without_caption()
    if len(lacking) > math.ceil(args.max_broken * len(examples)):
        raise ValueError(
            f"{len(lacking)} of {len(examples)} images have no caption that can be read, more than the share "
            f"max_broken={args.max_broken}, such as {lacking[0]}; write captions for them, take them away, or raise "
            "max_broken"
        )
    return examples
