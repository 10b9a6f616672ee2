"""The denoiser's prediction under prompts, guided: p = p_u + g (p_c - p_u), and g = 1 is no guidance.

p_c is predicted under the prompt and p_u under the negative one, in one call. A guidance-distilled denoiser (FLUX.1
dev) is told g instead and called under the prompt alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ..conditioning import Conditioner, Conditions, concatenate, conditioner_of, take
from ..pipeline import softrepa_disabled
from .request import texts


@final
@dataclass(frozen=True, eq=False)
class Guided:
    """A denoiser under one prompt per row.

    Attributes:
        conditioner: Calls it.
        conditions: Of the prompts, n rows; with guidance by a second branch 2n, those of the negative prompts first.
        guidance_scale: g of the second branch; None where there is none.
        adapted: Whether the active adapters take part.
    """

    conditioner: Conditioner
    conditions: Conditions
    guidance_scale: float | None = None
    adapted: bool = True

    @property
    def rows(self) -> int:
        """Number of rows n that it predicts."""
        return _num_rows(self.conditions) // self._branches

    @property
    def _branches(self) -> int:
        return 1 if self.guidance_scale is None else 2

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Returns the guided prediction for noisy latents (n, C, h, w) at one timestep: (n, C, h, w) float32."""
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
    """Returns the pipeline's conditioner; a guidance-distilled denoiser will be told the scale.

    Raises:
        ValueError: See `conditioner_of`; or the scale is not positive.
    """
    conditioner = conditioner_of(pipeline, max_sequence_length=max_sequence_length)
    if not 0 < guidance_scale < math.inf:
        raise ValueError(f"guidance scales must be positive, and 1.0 is none, but got {guidance_scale}")
    if not is_distilled(conditioner):
        return conditioner
    return conditioner_of(pipeline, max_sequence_length=max_sequence_length, guidance_scale=guidance_scale)


def is_distilled(conditioner: Conditioner) -> bool:
    """Whether the denoiser is told its guidance scale."""
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
    """Encodes prompts and returns the denoiser under them.

    Args:
        conditioner: Of `conditioner_for`.
        prompts: One for all rows, or one per row.
        negative_prompts: Likewise; None for what the pipeline takes when it is given none.
        guidance_scale: g.
        batch: Number of rows n.
        adapted: Whether the active adapters take part.
    """
    conditions = _rows(conditioner.encode_captions(prompts), batch)
    if guidance_scale == 1 or is_distilled(conditioner):
        return Guided(conditioner, conditions, None, adapted)
    negative = _rows(conditioner.encode_negative_prompts(negative_prompts), batch)
    return Guided(conditioner, concatenate([negative, conditions]), guidance_scale, adapted)


def negative_texts(conditioner: Conditioner, negative_prompt: Any) -> list[str] | None:
    """Returns negative prompts as a list, None for None.

    Raises:
        ValueError: There are some, but the denoiser has no branch for them.
        TypeError: They are no strings.
    """
    if negative_prompt is None:
        return None
    if is_distilled(conditioner):
        raise ValueError(
            f"{type(conditioner.denoiser).__name__} is told its guidance scale and reads no negative prompt; leave "
            "negative_prompt out"
        )
    return texts("negative_prompt", negative_prompt)


def _rows(conditions: Conditions, batch: int) -> Conditions:
    """Repeats conditions of one caption; those of `batch` captions are returned as they are."""
    return conditions if _num_rows(conditions) == batch else take(conditions, torch.zeros(batch, dtype=torch.int64))


def _num_rows(conditions: Conditions) -> int:
    return len(next(iter(conditions.values())))
