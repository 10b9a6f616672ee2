"""Figures of a run: how well matched captions are told from the others, over steps and noise levels."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from ..objectives import Contrastive
from ..pairs import mean_by_noise_level, pair_diagnostics
from .callbacks import TrainerCallback, TrainerState
from .step.engine import PairBatch

logger = logging.getLogger(__name__)

_SATURATED = 12.0  # exp(-12) is 6e-6
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


@final
class SaturationCallback(TrainerCallback):
    """Says so if the matched errors of the first batch are so large that exponential logits give no gradient."""

    def __init__(self) -> None:
        self._told = False

    def on_substep_end(self, args: Any, state: TrainerState, control: Any, **given: Any) -> None:
        objective = given["trainer"].objective
        first = state.global_step == 0 and isinstance(objective, Contrastive) and objective.logits == "exponential"
        if not first or self._told:
            return
        least = given["outcome"].errors.gather(1, given["pairs"].positive[:, None]).min().item()
        if least > _SATURATED * objective.temperature:
            self._told = True
            logger.warning(
                "matched errors are at least %.2g, %.0f times the temperature %.2g: exponential logits are nearly 0 "
                "there and contrast teaches nothing; set logits='linear', or a temperature of about a fifth of the "
                "errors",
                *(least, least / objective.temperature, objective.temperature),
            )


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
