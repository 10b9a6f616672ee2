"""What the first batches tell before the first step: whether there are negatives, and whether the logits can teach.

Exponential logits S exp(-e / T) of matched errors e far above T are all nearly 0: the softmax is uniform, whatever the
captions, and its gradient vanishes. Linear logits -e / T see differences of errors only, so they teach at any size of
the errors, with a temperature on the scale of those differences. So where half of the matched errors exceed 12 T
(exp(-12) = 6e-6), and no temperature was set, training goes on with linear logits whose temperature is the
mean over images of the standard deviation of their errors over captions.
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
    """Rows of the first batches, of all processes.

    Attributes:
        num_negatives: Captions that each image met and that are wrong for it, (n,).
        matched: Error of each image under its own caption, (n,).
        spread: Standard deviation of each image's errors over the captions that it met, (n,); NaN with one caption.
    """

    num_negatives: Tensor
    matched: Tensor
    spread: Tensor

    @classmethod
    def of(cls, errors: Tensor, positive: Tensor, candidates: Tensor) -> "Measured":
        """Returns the rows of one batch, errors (b, c) of its candidates."""
        count = candidates.sum(1)
        known = errors.masked_fill(~candidates, 0)
        centred = (errors - (known.sum(1) / count)[:, None]).masked_fill(~candidates, 0)
        spread = (centred.square().sum(1) / (count - 1)).sqrt()  # NaN for a count of one
        return cls((count - 1).to(errors), errors.gather(1, positive[:, None]).squeeze(1), spread)

    @classmethod
    def joined(cls, parts: Sequence["Measured"]) -> "Measured":
        """Returns the rows of several batches as one."""
        rows = [(part.num_negatives, part.matched, part.spread) for part in parts]
        return cls(*(torch.cat(values).cpu() for values in zip(*rows, strict=True)))


def check_negatives(objective: Objective, measured: Measured) -> None:
    """Refuses data in whose first batches no image meets the captions that the objective needs.

    Raises:
        ValueError: So it is.
    """
    if objective.min_negatives and not (measured.num_negatives >= objective.min_negatives).any():
        raise ValueError(no_negatives(objective))


def no_negatives(objective: Objective) -> str:
    """Returns what to tell of data without the captions that the objective needs."""
    return (
        f"each image must meet {objective.min_negatives} or more captions that are wrong for it, but the captions of "
        "the training data, or the images themselves, are all the same, so that there is nothing to tell apart. Write "
        "a caption of its own for each image, name a negative_caption_column, or train with objective='denoising'"
    )


def is_saturated(objective: Objective, measured: Measured) -> bool:
    """Whether exponential logits are nearly 0 for half of the images or more."""
    if not isinstance(objective, Contrastive) or objective.logits != "exponential":
        return False
    return measured.matched.median().item() > _SATURATED * objective.temperature


def unsaturated(objective: Contrastive, measured: Measured) -> tuple[Contrastive, str]:
    """Returns an objective that teaches at these errors, and what to tell of it."""
    error, spread = measured.matched.median().item(), measured.spread.nanmean().item()
    if spread > 0:
        found = replace(objective, logits="linear", temperature=float(f"{spread:.2g}"))
    else:  # the denoiser does not heed the captions at all yet
        found = replace(objective, temperature=float(f"{error:.2g}"))
    return found, (
        f"matched errors are {error:.2g}, {error / objective.temperature:.0f} times the published temperature "
        f"{objective.temperature:g}, where exponential logits give no gradient; so {found.logits} logits with "
        f"temperature {found.temperature:g} were chosen, by the errors of the first {len(measured.matched)} images. "
        f"temperature={objective.temperature:g} brings the published constants back"
    )


def saturation_warning(objective: Contrastive, measured: Measured) -> str:
    """Returns what to tell of saturated logits whose temperature was set by hand."""
    error, spread = measured.matched.median().item(), measured.spread.nanmean().item()
    return (
        f"matched errors are {error:.2g}, {error / objective.temperature:.0f} times the temperature "
        f"{objective.temperature:g}: exponential logits are nearly 0 there and contrast teaches nothing; set "
        f"logits='linear' with temperature={spread:.2g}, or leave out temperature to have one chosen"
    )


def calibrate(trainer: Any) -> None:
    """Measures the first batches of a run, and chooses an objective that teaches where the published one does not.

    Raises:
        ValueError: The batches hold no captions that are wrong for an image.
    """
    position, objective, measured = trainer.loader.state_dict(), trainer.objective, []
    trainer.loader.load_state_dict({"epoch": position["epoch"], "batches": 0})  # somebody may have looked into it
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
    if trainer.args.temperature is None:
        objective, text = unsaturated(objective, found)
        trainer.choose(objective)
        trainer.warn(text)
    else:
        trainer.warn(saturation_warning(objective, found))


def sum_up(trainer: Any) -> None:
    """Says at the end of a run what was measured of it, and once more what was warned of."""
    log = trainer.state.log_history
    norms = [entry["gradient_norm"] for entry in log if "gradient_norm" in entry]
    count = sum(parameter.numel() for parameter in trainer.parameters)
    if norms and max(norms) < _NO_GRADIENT * math.sqrt(count):
        trainer.warnings.append(
            f"the gradient's norm was {max(norms):.1g} at most, for {count:,} numbers: the tokens learned nothing; "
            "look at the temperature and at the captions"
        )
    for text in trainer.warnings:
        logger.warning("%s", text)
