"""Guards that several families use."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def checkpointing_without_keywords(denoiser: nn.Module, arguments: Mapping[str, Any]) -> str | None:
    """Guard against gradient checkpointing that fails because diffusers passes keyword arguments to it."""
    checkpoint = getattr(denoiser, "_gradient_checkpointing_func", None)
    if checkpoint is None or not (getattr(denoiser, "gradient_checkpointing", False) and torch.is_grad_enabled()):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(checkpoint).parameters.values()):
        return None
    return (
        f"{type(denoiser).__name__} checkpoints its blocks with keyword arguments, which the checkpointing function "
        "of diffusers does not take; give it one that does: enable_gradient_checkpointing(lambda block, *args, "
        "**kwargs: torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False, **kwargs))"
    )
