"""Metrics of a run: how well matched captions are told from the others, over steps and noise levels."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from ..pairs import mean_by_noise_level, pair_diagnostics
from ..quoting import quoted
from .step.engine import PairBatch

NOISE_LEVEL_EDGES = (250.0, 500.0, 750.0)


def retrieval_metrics(errors: Tensor, pairs: PairBatch) -> dict[str, Tensor]:
    """Returns how well each image of a batch finds its own caption by the denoising errors.

    Args:
        errors: Errors (b, c), NaN for pairs that were not run.
        pairs: The batch.

    Returns:
        `top1`, `margin` and `information` (b,), NaN for images without a negative, and `timestep` (b,).
    """
    ran = pairs.candidates & ~errors.isnan()
    ran |= torch.zeros_like(ran).scatter(1, pairs.positive[:, None], True)
    return vars(pair_diagnostics(errors, pairs.positive, ran)) | {"timestep": pairs.timestep.to(errors)}


def means(rows: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns the means of the metrics of n images, over all and for each quarter of the timestep scale.

    Keys are `top1`, `margin`, `information`, `top1/t0-250` and so on; those without any value are left out.
    """
    bounds = [0, *(int(edge) for edge in NOISE_LEVEL_EDGES), 1000]
    found = {}
    for name, values in rows.items():
        if name == "timestep":
            continue
        found[name] = values.nanmean().item()
        _, levels = mean_by_noise_level(values, rows["timestep"], edges=torch.tensor(NOISE_LEVEL_EDGES))
        for low, high, mean in zip(bounds[:-1], bounds[1:], levels.tolist(), strict=True):
            found[f"{name}/t{low}-{high}"] = mean
    return {name: value for name, value in found.items() if value == value}


def joined(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the metrics of several batches as those of one, float32 on the CPU."""
    return {name: torch.cat([row[name] for row in rows]).float().cpu() for name in rows[0]}


def figures(found: Any, what: str) -> dict[str, float]:
    """Returns figures of the user by name as numbers of Python, where they may be those of numpy or torch.

    Raises:
        TypeError: They are no numbers by name; `what` names them.
    """
    try:
        return {str(name): float(value) for name, value in found.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{what} must be a dict of numbers, but is {quoted(found)}") from error


def standard_errors(rows: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns `top1_stderr` and so on: the standard errors of the means over images."""
    return {f"{name}_stderr": mean_and_error(values)[1] for name, values in rows.items() if name != "timestep"}


def gains(rows: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns `top1_gain`, `top1_gain_stderr` and so on: mean differences of the same images, and their errors.

    Args:
        rows: Metrics (n,) of n images.
        base: Metrics of the same images with the same noise to compare with.
    """
    found = {}
    for name in rows.keys() & base.keys() - {"timestep"}:
        if rows[name].shape == base[name].shape:
            found[f"{name}_gain"], found[f"{name}_gain_stderr"] = mean_and_error(rows[name] - base[name])
    return dict(sorted(found.items()))


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Returns mean and standard error of values (n,) without NaNs; NaN where too few are left."""
    known = values[~values.isnan()].double()
    return known.mean().item(), known.std().item() / math.sqrt(len(known)) if len(known) > 1 else math.nan


@final
class Recent:
    """Losses and metrics since the last log entry; checkpoints hold them, so that a resumed run logs the same."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._rows: list[dict[str, Tensor]] = []
        self._seconds, self._pairs, self._timed = 0.0, 0, 0

    def add(self, loss: float, rows: Sequence[Mapping[str, Tensor]], *, seconds: float, num_pairs: int) -> None:
        """Adds a step: its loss, the metrics of its batches, its duration and its number of pairs."""
        self._losses.append(loss)
        self._rows.append({name: torch.cat([row[name] for row in rows]).cpu() for name in rows[0]})
        self._seconds, self._pairs, self._timed = self._seconds + seconds, self._pairs + num_pairs, self._timed + 1

    def means(self) -> dict[str, float]:
        """Returns the means over the steps, the loss without skipped steps, and their speed."""
        finite = [loss for loss in self._losses if math.isfinite(loss)]
        return {
            "loss": math.fsum(finite) / len(finite) if finite else math.nan,
            "seconds_per_step": self._seconds / max(1, self._timed),
            "pairs_per_second": self._pairs / max(self._seconds, 1e-9),
            **means(joined(self._rows)),
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns everything but the times, which belong to this process."""
        return {"losses": list(self._losses), "rows": list(self._rows)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._losses, self._rows = list(state["losses"]), list(state["rows"])
