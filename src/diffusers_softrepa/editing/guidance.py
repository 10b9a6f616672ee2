"""The guided prediction of a denoiser: p = p_u + g (p_c - p_u), where g = 1 is no guidance.

p_c is the prediction under the prompt and p_u the one under the negative prompt; one call computes both. A
guidance-distilled denoiser (FLUX.1 dev) takes g as an input instead and is called with the prompt alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ..adapter import adapters_of
from ..conditioning import Conditioner, Conditions, concatenate, conditioner_of, take
from ..pipeline import softrepa_disabled
from ..quoting import quoted
from .request import is_number, texts

_LARGEST_SCALE = 1e6  # beyond it float32 predictions may overflow


@final
@dataclass(frozen=True, eq=False)
class Guided:
    """A denoiser with one prompt for each row of a batch.

    Attributes:
        conditioner: Conditioner that calls the denoiser.
        conditions: Encoded prompts, n rows; with a second branch for guidance 2n rows, the negative prompts first.
        guidance_scale: Guidance scale g of the second branch; None without a second branch. Defaults to None.
        adapted: Whether the active adapters are used. Defaults to True.
    """

    conditioner: Conditioner
    conditions: Conditions
    guidance_scale: float | None = None
    adapted: bool = True

    @property
    def rows(self) -> int:
        """Number of rows n of a prediction."""
        return _num_rows(self.conditions) // self._branches

    @property
    def _branches(self) -> int:
        return 1 if self.guidance_scale is None else 2

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Returns the guided prediction, (n, C, h, w) float32, for noisy latents (n, C, h, w) at one timestep."""
        branches = self._branches
        with nullcontext() if self.adapted else softrepa_disabled(self.conditioner.denoiser):
            predicted = self.conditioner.predict(
                latents.repeat(branches, 1, 1, 1), timestep.expand(branches * len(latents)), self.conditions
            )
        if self.guidance_scale is None:
            return predicted
        negative, positive = predicted.chunk(2)
        return negative + self.guidance_scale * (positive - negative)


def conditioner_for(pipeline: Any, guidance_scale: float, max_sequence_length: int | None) -> Conditioner:
    """Returns the pipeline's conditioner, which passes the guidance scale to a guidance-distilled denoiser.

    Raises:
        ValueError: The denoiser's family has no conditioner, or the scale is not positive.
    """
    conditioner = conditioner_of(pipeline, max_sequence_length=max_sequence_length)
    if not is_number(guidance_scale) or not 0 < guidance_scale <= _LARGEST_SCALE:
        raise ValueError(
            f"guidance scales must be positive, at most {_LARGEST_SCALE:g}, where 1.0 is no guidance, but one is "
            f"{quoted(guidance_scale)}"
        )
    if not is_distilled(conditioner):
        return conditioner
    return conditioner_of(pipeline, max_sequence_length=max_sequence_length, guidance_scale=guidance_scale)


def is_distilled(conditioner: Conditioner) -> bool:
    """Whether the denoiser takes its guidance scale as an input."""
    denoiser: Any = conditioner.denoiser
    return bool(denoiser.config.get("guidance_embeds"))


def guided(
    conditioner: Conditioner,
    prompts: Sequence[str],
    negative_prompts: Sequence[str] | None,
    guidance_scale: float,
    *,
    batch: int,
    adapted: bool = True,
) -> Guided:
    """Encodes prompts and returns the denoiser with them.

    Args:
        conditioner: Conditioner that `conditioner_for` returned.
        prompts: One prompt for all rows, or one for each row.
        negative_prompts: One negative prompt for all rows, or one for each row; None for the pipeline's default.
        guidance_scale: Guidance scale g.
        batch: Number of rows n.
        adapted: Whether the active adapters are used. Defaults to True.

    Raises:
        ValueError: The active adapters are used, but only in the positive branch of guidance.
    """
    if adapted:
        _check_both_branches(conditioner)
    conditions = _rows(conditioner.encode_captions(prompts), batch)
    if guidance_scale == 1 or is_distilled(conditioner):
        return Guided(conditioner, conditions, None, adapted)
    negative = _rows(conditioner.encode_negative_prompts(negative_prompts), batch)
    return Guided(conditioner, concatenate([negative, conditions]), guidance_scale, adapted)


def negative_texts(conditioner: Conditioner, negative_prompt: Any) -> list[str] | None:
    """Returns negative prompts as a list; None for None.

    Raises:
        ValueError: Negative prompts were given to a guidance-distilled denoiser.
        TypeError: A negative prompt is not a string.
    """
    if negative_prompt is None:
        return None
    if is_distilled(conditioner):
        raise ValueError(
            f"{type(conditioner.denoiser).__name__} is guidance-distilled and takes no negative prompt; leave "
            "negative_prompt out"
        )
    return texts("negative_prompt", negative_prompt)


def _check_both_branches(conditioner: Conditioner) -> None:
    adapters = adapters_of(conditioner.denoiser)
    if adapters is not None and adapters.state.taking_part and adapters.state.guidance_branch != "both":
        raise ValueError(
            f"editing uses the adapters in both branches of guidance, but {list(adapters.state.taking_part)} were set "
            f"with guidance_branch={adapters.state.guidance_branch!r}; call set_softrepa(..., guidance_branch='both') "
            "before"
        )


def _rows(conditions: Conditions, batch: int) -> Conditions:
    """Repeats the conditions of one caption for all rows; those of `batch` captions are returned unchanged."""
    return conditions if _num_rows(conditions) == batch else take(conditions, torch.zeros(batch, dtype=torch.int64))


def _num_rows(conditions: Conditions) -> int:
    return len(next(iter(conditions.values())))
