"""Calibration before the first step: are there negatives, and does the objective have a gradient?

Exponential logits S exp(-e / T) of matched errors e far above T are all nearly 0: the softmax is uniform whatever the
captions are, and its gradient vanishes. Linear logits -e / T depend on differences of errors only, so they have a
gradient at any size of the errors, with a temperature of the size of those differences. So where half of the matched
errors exceed 12 T (exp(-12) = 6e-6) and no temperature was set, linear logits are trained, and their temperature is
the mean over images of the standard deviation of an image's errors over its captions.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..objectives import Contrastive, Objective
from .step.collate import Draws

logger = logging.getLogger(__name__)

CALIBRATION_BATCHES = 4
_SATURATED = 12.0
_NO_GRADIENT = 1e-8  # of one number: what Adam adds to the size of the gradient that it divides by


@dataclass(frozen=True, eq=False)
class Measured:
    """Statistics of the images of the first batches, of all processes.

    Attributes:
        num_negatives: Wrong captions that each image meets, (n,).
        matched: Error of each image under its own caption, (n,).
        spread: Standard deviation of each image's errors over its captions, (n,); NaN with one caption.
    """

    num_negatives: Tensor
    matched: Tensor
    spread: Tensor

    @classmethod
    def of(cls, errors: Tensor, positive: Tensor, candidates: Tensor) -> "Measured":
        """Returns the statistics of one batch, of the errors (b, c) of its candidates."""
        count = candidates.sum(1)
        known = errors.masked_fill(~candidates, 0)
        centred = (errors - (known.sum(1) / count)[:, None]).masked_fill(~candidates, 0)
        spread = (centred.square().sum(1) / (count - 1)).sqrt()  # NaN for a count of one
        return cls((count - 1).to(errors), errors.gather(1, positive[:, None]).squeeze(1), spread)

    @classmethod
    def joined(cls, parts: Sequence["Measured"]) -> "Measured":
        """Returns the statistics of several batches as one."""
        rows = [(part.num_negatives, part.matched, part.spread) for part in parts]
        return cls(*(torch.cat(values).cpu() for values in zip(*rows, strict=True)))


def check_negatives(objective: Objective, measured: Measured) -> None:
    """Refuses data in whose first batches no image meets as many wrong captions as the objective needs.

    Raises:
        ValueError: The data are such.
    """
    if objective.min_negatives and not (measured.num_negatives >= objective.min_negatives).any():
        raise ValueError(no_negatives(objective))


def no_negatives(objective: Objective) -> str:
    """Returns the message for data without the negatives that the objective needs."""
    return (
        f"each image must meet {objective.min_negatives} or more captions that are wrong for it, but the captions of "
        "the training data, or the images themselves, are all the same, so there are no negatives to contrast. Write "
        "a caption of its own for each image, name a negative_caption_column, or train with objective='denoising'"
    )


def is_saturated(objective: Objective, measured: Measured) -> bool:
    """Returns whether the exponential logits of half of the images or more are nearly 0."""
    if not isinstance(objective, Contrastive) or objective.logits != "exponential":
        return False
    return measured.matched.median().item() > _SATURATED * objective.temperature


def unsaturated(objective: Contrastive, measured: Measured) -> tuple[Contrastive, str]:
    """Returns an objective that has a gradient at these errors, and a message that says so."""
    error, spread = measured.matched.median().item(), measured.spread.nanmean().item()
    if spread > 0:
        found = replace(objective, logits="linear", temperature=float(f"{spread:.2g}"))
    else:  # the caption makes no difference to the denoiser yet
        found = replace(objective, temperature=float(f"{error:.2g}"))
    return found, (
        f"matched errors are {error:.2g}, {error / objective.temperature:.0f} times the published temperature "
        f"{objective.temperature:g}, where exponential logits have no gradient; so {found.logits} logits with "
        f"temperature {found.temperature:g} were chosen from the errors of the first {len(measured.matched)} images. "
        f"Set temperature={objective.temperature:g} to train with the published constants"
    )


def calibrate(trainer: Any) -> None:
    """Measures the errors of the first batches, and replaces an objective that has no gradient at these.

    Raises:
        ValueError: No image of these batches meets a caption that is wrong for it.
    """
    position, objective, measured = trainer.loader.state_dict(), trainer.objective, []
    trainer.loader.load_state_dict({"epoch": position["epoch"], "batches": 0})  # it may have been iterated already
    batches = iter(trainer.loader)
    for number, batch in zip(range(CALIBRATION_BATCHES), batches, strict=False):
        pairs = trainer.data_collator(batch, Draws(trainer.args.seed, number, trainer.first_row))
        rows = Measured.of(trainer.engine.errors(pairs), pairs.positive, pairs.candidates)
        measured.append(Measured(**trainer.gathered(vars(rows))))
    batches.close()
    trainer.loader.load_state_dict(position)
    found = Measured.joined(measured)
    check_negatives(objective, found)
    if not is_saturated(objective, found):
        return
    chosen, text = unsaturated(objective, found)
    if trainer.args.temperature is None:
        trainer.choose(chosen)
        trainer.warn(text)
        return
    error = found.matched.median().item()
    trainer.warn(
        f"matched errors are {error:.2g}, {error / objective.temperature:.0f} times the temperature "
        f"{objective.temperature:g}: exponential logits are nearly 0 there, so the contrast has no gradient; set "
        f"logits='linear' with temperature={found.spread.nanmean().item():.2g}, or leave out temperature to have one "
        "chosen"
    )


def sum_up(trainer: Any) -> None:
    """Logs the warnings of a run once more at its end, and one if the gradient was never large enough to learn."""
    log = trainer.state.log_history
    norms = [entry["gradient_norm"] for entry in log if "gradient_norm" in entry]
    count = sum(parameter.numel() for parameter in trainer.parameters)
    if norms and max(norms) < _NO_GRADIENT * math.sqrt(count):
        trainer.warnings.append(
            f"the gradient's norm was {max(norms):.1g} at most, for {count:,} numbers: the tokens learned nothing; "
            "check the temperature and the captions"
        )
    for text in trainer.warnings:
        logger.warning("%s", text)
