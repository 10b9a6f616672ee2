"""Figures of a run: how well matched captions are told from the others, over steps and noise levels."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from ..pairs import mean_by_noise_level, pair_diagnostics
from .step.engine import PairBatch

NOISE_LEVEL_EDGES = (250.0, 500.0, 750.0)


def tell_apart(errors: Tensor, pairs: PairBatch) -> dict[str, Tensor]:
    """Returns how well the matched captions of a batch are told from the others.

    Args:
        errors: (b, c), NaN for pairs that were not run.
        pairs: The batch.

    Returns:
        `top1`, `margin`, `information`: (b,) each, NaN for rows without a negative; and `timestep` (b,).
    """
    ran = pairs.candidates & ~errors.isnan()
    ran |= torch.zeros_like(ran).scatter(1, pairs.positive[:, None], True)
    found = pair_diagnostics(errors, pairs.positive, ran)
    figures = {"top1": found.top1, "margin": found.margin, "information": found.information}
    return figures | {"timestep": pairs.timestep.to(errors)}


def summary(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Returns the means of `tell_apart` over batches, in all and per quarter of the timestep scale.

    Keys are `top1`, `margin`, `information` and `top1/t0-250` and so on; those without any value are left out.
    """
    joined = joined_rows(rows)
    timestep = joined.pop("timestep")
    bounds = [0, *(int(edge) for edge in NOISE_LEVEL_EDGES), 1000]
    found = {}
    for name, values in joined.items():
        found[name] = values.nanmean().item()
        _, means = mean_by_noise_level(values, timestep, edges=torch.tensor(NOISE_LEVEL_EDGES))
        for low, high, mean in zip(bounds[:-1], bounds[1:], means.tolist(), strict=True):
            found[f"{name}/t{low}-{high}"] = mean
    return {name: value for name, value in found.items() if value == value}


def joined_rows(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the rows of several batches as one, each figure (n,) float32 on the CPU."""
    return {name: torch.cat([row[name] for row in rows]).float().cpu() for name in rows[0]}


def standard_errors(rows: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns `top1_stderr` and so on, the standard errors of means over images, of figures as `joined_rows`."""
    return {f"{name}_stderr": mean_and_error(values)[1] for name, values in rows.items() if name != "timestep"}


def gains(rows: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns `top1_gain`, `top1_gain_stderr` and so on: mean differences of the same images, and their errors.

    Args:
        rows: Figures (n,) as `joined_rows` returns them.
        base: Those to compare with, of the same images with the same noise.
    """
    found = {}
    for name in rows.keys() & base.keys() - {"timestep"}:
        if rows[name].shape == base[name].shape:
            found[f"{name}_gain"], found[f"{name}_gain_stderr"] = mean_and_error(rows[name] - base[name])
    return dict(sorted(found.items()))


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Returns mean and standard error of values (n,), NaNs left out; NaN where too few are left."""
    known = values[~values.isnan()].double()
    return known.mean().item(), known.std().item() / math.sqrt(len(known)) if len(known) > 1 else math.nan


@final
class Recent:
    """What the steps since the last log entry gave; kept in checkpoints, so that a resumed run logs the same means."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._losses: list[float] = []
        self._rows: list[dict[str, Tensor]] = []
        self._seconds, self._pairs = 0.0, 0
        self._timed = 0

    def add(self, loss: float, rows: Sequence[Mapping[str, Tensor]], *, seconds: float, num_pairs: int) -> None:
        """Takes a step in: its loss, its rows' figures from `tell_apart`, and how long it took for how many pairs."""
        self._losses.append(loss)
        self._rows.append({name: torch.cat([row[name] for row in rows]).cpu() for name in rows[0]})
        self._seconds, self._pairs, self._timed = self._seconds + seconds, self._pairs + num_pairs, self._timed + 1

    def take(self) -> dict[str, float]:
        """Returns the means of the steps, the loss without those that were skipped, and their speed; begins anew."""
        finite = [loss for loss in self._losses if math.isfinite(loss)]
        figures = {"loss": math.fsum(finite) / len(finite) if finite else math.nan}
        figures["seconds_per_step"] = self._seconds / max(1, self._timed)
        figures["pairs_per_second"] = self._pairs / max(self._seconds, 1e-9)
        figures |= summary(self._rows)
        self._reset()
        return figures

    def state_dict(self) -> dict[str, Any]:
        """Everything but the times, which are of this run."""
        return {"losses": list(self._losses), "rows": list(self._rows)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._losses, self._rows = list(state["losses"]), list(state["rows"])
