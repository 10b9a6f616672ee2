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


def padded(texts: Sequence[Tensor], length: int) -> Conditions:
    """Returns texts of different lengths as rows of one.

    Args:
        texts: (S_i, D) each; what is longer than `length` is cut.
        length: S.

    Returns:
        `prompt_embeds` (n, S, D), zero behind each text, and `prompt_mask` (n, S) bool, True where there is text.
    """
    texts = [text[:length] for text in texts]
    prompt_embeds = texts[0].new_zeros(len(texts), length, texts[0].shape[1])
    prompt_mask = torch.zeros(len(texts), length, dtype=torch.bool, device=prompt_embeds.device)
    for row, text in enumerate(texts):
        prompt_embeds[row, : len(text)] = text
        prompt_mask[row, : len(text)] = True
    return {"prompt_embeds": prompt_embeds, "prompt_mask": prompt_mask}


def unpadded(prompt_embeds: Tensor, prompt_mask: Tensor) -> list[Tensor]:
    """Returns the texts (S_i, D) that `padded` made rows of."""
    return [text[mask] for text, mask in zip(prompt_embeds, prompt_mask, strict=True)]
