"""Calibration before the first step: are there negatives, and does the objective have a gradient?

Exponential logits S exp(-e / T) of matched errors e far above T are all nearly 0: the softmax is uniform whatever the
captions are, and its gradient vanishes. Linear logits -e / T depend on differences of errors only, so they have a
gradient at any size of the errors, with a temperature of the size of those differences. So where half of the matched
errors exceed 12 T (exp(-12) = 6e-6) and no temperature was set, linear logits are trained, and their temperature is
the mean over images of the standard deviation of an image's errors over its captions.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..objectives import Contrastive, Objective
from .metrics import joined
from .step.collate import Draws

logger = logging.getLogger(__name__)

CALIBRATION_BATCHES = 4
_SATURATED = 12.0
_NO_GRADIENT = 1e-8  # of one number: what Adam adds to the size of the gradient that it divides by


def measured(errors: Tensor, positive: Tensor, candidates: Tensor) -> dict[str, Tensor]:
    """Returns statistics of the images of one batch.

    Args:
        errors: Errors (b, c) of the candidates.
        positive: Column of each image's own caption, (b,) int64.
        candidates: The pairs that take part, (b, c) bool.

    Returns:
        Tensors (b,): `negatives`, the wrong captions that each image meets; `matched`, its error under its own
        caption; `spread`, the standard deviation of its errors over its captions, NaN with one caption.
    """
    count = candidates.sum(1)
    known = errors.masked_fill(~candidates, 0)
    centred = (errors - (known.sum(1) / count)[:, None]).masked_fill(~candidates, 0)
    return {
        "negatives": (count - 1).to(errors),
        "matched": errors.gather(1, positive[:, None]).squeeze(1),
        "spread": (centred.square().sum(1) / (count - 1)).sqrt(),
    }


def check_negatives(objective: Objective, negatives: Tensor) -> None:
    """Refuses data in whose first batches no image meets as many wrong captions as the objective needs.

    Args:
        objective: The objective in training.
        negatives: Wrong captions that each image meets, (n,).

    Raises:
        ValueError: The data are such.
    """
    if objective.min_negatives and not (negatives >= objective.min_negatives).any():
        raise ValueError(no_negatives(objective))


def no_negatives(objective: Objective) -> str:
    """Returns the message for data without the negatives that the objective needs."""
    return (
        f"each image must meet {objective.min_negatives} or more captions that are wrong for it, but the captions of "
        "the training data, or the images themselves, are all the same, so there are no negatives to contrast. Write "
        "a caption of its own for each image, name a negative_caption_column, or train with objective='denoising'"
    )


def is_saturated(objective: Objective, matched: Tensor) -> bool:
    """Returns whether exponential logits of matched errors (n,) are nearly 0 for half of the images or more."""
    if not isinstance(objective, Contrastive) or objective.logits != "exponential":
        return False
    return matched.median().item() > _SATURATED * objective.temperature


def unsaturated(objective: Contrastive, images: Mapping[str, Tensor]) -> tuple[Contrastive, str]:
    """Returns an objective that has a gradient at the errors of these images, and a message that says so."""
    error, spread = images["matched"].median().item(), images["spread"].nanmean().item()
    if spread > 0:
        found = replace(objective, logits="linear", temperature=float(f"{spread:.2g}"))
    else:  # the caption makes no difference to the denoiser yet
        found = replace(objective, temperature=float(f"{error:.2g}"))
    return found, (
        f"matched errors are {error:.2g}, {error / objective.temperature:.0f} times the published temperature "
        f"{objective.temperature:g}, where exponential logits have no gradient; so {found.logits} logits with "
        f"temperature {found.temperature:g} were chosen from the errors of the first {len(images['matched'])} images. "
        f"Set temperature={objective.temperature:g} to train with the published constants"
    )


def calibrate(trainer: Any) -> None:
    """Measures the errors of the first batches, and replaces an objective that has no gradient at these.

    Raises:
        ValueError: No image of these batches meets a caption that is wrong for it.
    """
    position, objective, rows = trainer.loader.state_dict(), trainer.objective, []
    trainer.loader.load_state_dict({"epoch": position["epoch"], "batches": 0})  # it may have been iterated already
    batches = iter(trainer.loader)
    for number, batch in zip(range(CALIBRATION_BATCHES), batches, strict=False):
        pairs = trainer.data_collator(batch, Draws(trainer.args.seed, number, trainer.first_row))
        found = measured(trainer.engine.errors(pairs), pairs.positive, pairs.candidates)
        rows.append(trainer.gathered(found))
    batches.close()
    trainer.loader.load_state_dict(position)
    images = joined(rows)
    check_negatives(objective, images["negatives"])
    if not is_saturated(objective, images["matched"]):
        return
    chosen, text = unsaturated(objective, images)
    if trainer.args.temperature is None:
        trainer.choose(chosen)
        trainer.warn(text)
        return
    error = images["matched"].median().item()
    trainer.warn(
        f"matched errors are {error:.2g}, {error / objective.temperature:.0f} times the temperature "
        f"{objective.temperature:g}: exponential logits are nearly 0 there, so the contrast has no gradient; set "
        f"logits='linear' with temperature={images['spread'].nanmean().item():.2g}, or leave out temperature to have "
        "one chosen"
    )


def sum_up(trainer: Any) -> None:
    """Logs the warnings of a run once more at its end, and one if the gradient was never large enough to learn."""
    logged = [entry for entry in trainer.state.log_history if "token_norm" in entry]
    finite = [entry for entry in logged if math.isfinite(entry.get("loss", math.nan))]
    norms = [norm for entry in finite if math.isfinite(norm := entry.get("gradient_norm", math.nan))]
    count = sum(parameter.numel() for parameter in trainer.parameters)
    if logged and not norms:
        trainer.warnings.append(
            "no logged step had a finite loss and gradient: such steps are skipped, nothing is learned"
        )
    elif norms and max(norms) < _NO_GRADIENT * math.sqrt(count):
        trainer.warnings.append(
            f"the gradient's norm was {max(norms):.1g} at most, for {count:,} numbers: the tokens learned nothing; "
            "check the temperature and the captions"
        )
    for text in trainer.warnings:
        logger.warning("%s", text)
