"""Conditions: what a denoiser reads of captions, as tensors by name, each with one row per caption."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Conditions = dict[str, Tensor]


def take(conditions: Mapping[str, Tensor], index: Tensor) -> Conditions:
    """Returns the rows `index`, (n,) int64, on the conditions' own device; a row may be taken more than once."""
    return {name: value[index.to(value.device)] for name, value in conditions.items()}


def concatenate(parts: Sequence[Mapping[str, Tensor]]) -> Conditions:
    """Returns the rows of all parts, one after the other; the parts come from one kind of conditioner."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
