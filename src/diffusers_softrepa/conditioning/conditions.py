"""Conditions: encoded captions, as tensors by name with one row per caption."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Conditions = dict[str, Tensor]


def take(conditions: Mapping[str, Tensor], index: Tensor) -> Conditions:
    """Returns selected rows of conditions, on the device of the conditions.

    Args:
        conditions: Tensors by name, with one row per caption.
        index: (n,) int64. Rows to select; a row may be selected more than once.
    """
    return {name: value[index.to(value.device)] for name, value in conditions.items()}


def concatenate(parts: Sequence[Mapping[str, Tensor]]) -> Conditions:
    """Returns the rows of several conditions in one.

    Args:
        parts: Conditions of conditioners of the same class, with the same settings.
    """
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def padded(texts: Sequence[Tensor], length: int) -> Conditions:
    """Returns texts of different lengths, padded with zeros to one length.

    Args:
        texts: Embeddings (S_i, D) of each text. Texts longer than `length` are cut.
        length: Length S of the result.

    Returns:
        `prompt_embeds` (n, S, D), and `prompt_mask` (n, S) bool, True for rows of text and False for padding.
    """
    texts = [text[:length] for text in texts]
    prompt_embeds = texts[0].new_zeros(len(texts), length, texts[0].shape[1])
    prompt_mask = torch.zeros(len(texts), length, dtype=torch.bool, device=prompt_embeds.device)
    for row, text in enumerate(texts):
        prompt_embeds[row, : len(text)] = text
        prompt_mask[row, : len(text)] = True
    return {"prompt_embeds": prompt_embeds, "prompt_mask": prompt_mask}


def unpadded(prompt_embeds: Tensor, prompt_mask: Tensor) -> list[Tensor]:
    """Returns the texts, (S_i, D) each, without their padding; the inverse of `padded`."""
    return [text[mask] for text, mask in zip(prompt_embeds, prompt_mask, strict=True)]
