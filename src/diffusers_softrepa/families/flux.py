"""FLUX and related transformers: dual and single blocks with rotary positions over text and image.

The rotary rows of the tokens are copies of the first text row; its position is zero, or the same for all text rows.
Dual blocks take and return text and image separately. Single blocks do so too (FLUX.1 since diffusers 0.35), or take
one sequence with the text first (FLUX.2, Chroma). There is no published adapter for FLUX.1; the defaults are those of
SD3.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from ..compat import DIFFUSERS
from .spec import BlockGroup, ExtendedArgument, FamilySpec, TimestepArgument, inner_width, recipe

_ROTARY = ExtendedArgument("image_rotary_emb", dim=0, each=True)
_DUAL = BlockGroup("transformer_blocks", text="encoder_hidden_states", returns=0, extended=(_ROTARY,))
_APART = BlockGroup("single_transformer_blocks", text="encoder_hidden_states", returns=0, extended=(_ROTARY,))
_JOINT = BlockGroup("single_transformer_blocks", text="hidden_states", returns="self", extended=(_ROTARY,))
_ZERO_TO_ONE = TimestepArgument(scale=1000.0)
_RECIPE = recipe(inner_width, "num_layers", "num_single_layers")

FLUX = FamilySpec(
    name="flux",
    denoiser="FluxTransformer2DModel",
    groups=(_DUAL, _APART if Version("0.35") <= DIFFUSERS else _JOINT),
    width=inner_width,
    defaults=_RECIPE,
    timestep=_ZERO_TO_ONE,
)


OVIS_IMAGE = replace(FLUX, name="ovis-image", denoiser="OvisImageTransformer2DModel")
LONGCAT_IMAGE = replace(FLUX, name="longcat-image", denoiser="LongCatImageTransformer2DModel")
BRIA = replace(FLUX, name="bria", denoiser="BriaTransformer2DModel", timestep=TimestepArgument())


def _count_text(arguments: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Adds the tokens to the number of text rows, which FLUX.2 passes to single blocks when it caches references."""
    settings = arguments.get("joint_attention_kwargs")
    if settings is None or "num_txt_tokens" not in settings:
        return {}
    return {"joint_attention_kwargs": {**settings, "num_txt_tokens": settings["num_txt_tokens"] + count}}


FLUX2 = replace(
    FLUX,
    name="flux2",
    denoiser="Flux2Transformer2DModel",
    groups=(
        _DUAL,
        replace(_JOINT, extended=(_ROTARY, ExtendedArgument("temb_mod", dim=1, per_token=True)), adjust=_count_text),
    ),
)
# The text has its own modulation, with a row per token.
FLUX3 = replace(
    FLUX,
    name="flux3",
    denoiser="Flux3Transformer2DModel",
    groups=(replace(_APART, extended=(_ROTARY, ExtendedArgument("temb_mod_context", dim=1, per_token=True))),),
    defaults=recipe(inner_width, "num_single_layers"),
)


def _mask_under_checkpointing(denoiser: nn.Module, arguments: Mapping[str, Any]) -> str | None:
    checkpointed = getattr(denoiser, "gradient_checkpointing", False) and torch.is_grad_enabled()
    if not checkpointed or arguments.get("attention_mask") is None:
        return None
    return (
        "Chroma's single blocks must get the attention mask, but under gradient checkpointing diffusers does not pass "
        "it to them; call disable_gradient_checkpointing(), or cut captions to their length and pass no attention_mask"
    )


_MASK = ExtendedArgument("attention_mask", dim=1, fill=1.0)
CHROMA = replace(
    FLUX,
    name="chroma",
    denoiser="ChromaTransformer2DModel",
    groups=(replace(_DUAL, extended=(_ROTARY, _MASK)), replace(_JOINT, extended=(_ROTARY, _MASK))),
    guards=(_mask_under_checkpointing,),
)
_NESTED_MASK = ExtendedArgument("joint_attention_kwargs", dim=3, select="attention_mask", fill=1.0)
FIBO = replace(
    FLUX,
    name="fibo",
    denoiser="BriaFiboTransformer2DModel",
    groups=(replace(_DUAL, extended=(_ROTARY, _NESTED_MASK)), replace(_JOINT, extended=(_ROTARY, _NESTED_MASK))),
    timestep=TimestepArgument(),
)
