"""FLUX.1 and its kin: joint attention with rotary positions over text and image, in dual and then in single blocks.

The rotary rows of the tokens are copies of the first text row, whose position is zero or the same for all text. Dual
blocks take and return the two streams apart; single blocks as well (FLUX.1), or joined with the text first (FLUX.2,
Chroma). There is no published FLUX.1 adapter; the defaults follow SD3's.
"""

from collections.abc import Mapping
from typing import Any

from .spec import FamilySpec, Group, Side, Timestep, inner_width, recipe

_ROTARY = Side("image_rotary_emb", dim=0, each=True)
_DUAL = Group("transformer_blocks", text="encoder_hidden_states", returns=0, sides=(_ROTARY,))
_APART = Group("single_transformer_blocks", text="encoder_hidden_states", returns=0, sides=(_ROTARY,))
_ZERO_TO_ONE = Timestep(scale=1000.0)
_RECIPE = recipe(inner_width, "num_layers", "num_single_layers")

FLUX = FamilySpec(
    name="flux",
    denoiser="FluxTransformer2DModel",
    groups=(_DUAL, _APART),
    width=inner_width,
    defaults=_RECIPE,
    timestep=_ZERO_TO_ONE,
)


def _count_text(arguments: Mapping[str, Any], count: int) -> dict[str, Any]:
    """With its cache of reference images, FLUX.2 tells single blocks where the text ends."""
    settings = arguments.get("joint_attention_kwargs")
    if settings is None or "num_txt_tokens" not in settings:
        return {}
    return {"joint_attention_kwargs": {**settings, "num_txt_tokens": settings["num_txt_tokens"] + count}}


FLUX2 = FamilySpec(
    name="flux2",
    denoiser="Flux2Transformer2DModel",
    groups=(
        _DUAL,
        Group(
            "single_transformer_blocks",
            text="hidden_states",
            returns="self",
            sides=(_ROTARY, Side("temb_mod", dim=1, per_token=True)),
            fix=_count_text,
        ),
    ),
    width=inner_width,
    defaults=_RECIPE,
    timestep=_ZERO_TO_ONE,
)

_JOINT_MASK = Side("attention_mask", dim=1, fill=1.0)
CHROMA = FamilySpec(
    name="chroma",
    denoiser="ChromaTransformer2DModel",
    groups=(
        Group("transformer_blocks", text="encoder_hidden_states", returns=0, sides=(_ROTARY, _JOINT_MASK)),
        Group("single_transformer_blocks", text="hidden_states", returns="self", sides=(_ROTARY, _JOINT_MASK)),
    ),
    width=inner_width,
    defaults=_RECIPE,
    timestep=_ZERO_TO_ONE,
)
