"""Image transformers that read text by cross-attention. All blocks read the same text, and none returns it."""

import math
from collections.abc import Mapping
from typing import Any

from .spec import BlockGroup, ExtendedArgument, FamilySpec, TimestepArgument, named_width, recipe

_WIDTH = named_width("cross_attention_dim")
# The denoiser turns its text mask into an additive bias, (batch, 1, sequence), before any block sees it.
_BIAS = ExtendedArgument("encoder_attention_mask", dim=2, fill=0.0)
_READ = BlockGroup("transformer_blocks", text="encoder_hidden_states", extended=(_BIAS,))

PIXART = FamilySpec(
    name="pixart",
    denoiser="PixArtTransformer2DModel",
    groups=(_READ,),
    width=_WIDTH,
    defaults=recipe(_WIDTH, "num_layers"),
)


def _sana_clock(config: Mapping[str, Any]) -> TimestepArgument:
    """Returns the timestep of Sana-Sprint, which is in 0..1, or of other Sana models, whose config has the scale."""
    return TimestepArgument(scale=1000.0 if config["guidance_embeds"] else 1.0 / config["timestep_scale"])


SANA = FamilySpec(
    name="sana",
    denoiser="SanaTransformer2DModel",
    groups=(_READ,),
    width=_WIDTH,
    defaults=recipe(_WIDTH, "num_layers"),
    clock=_sana_clock,
)

LUMINA_NEXT = FamilySpec(
    name="lumina-next",
    denoiser="LuminaNextDiT2DModel",
    groups=(
        BlockGroup(
            "layers", text="encoder_hidden_states", extended=(ExtendedArgument("encoder_mask", dim=1, fill=1.0),)
        ),
    ),
    width=_WIDTH,
    defaults=recipe(_WIDTH, "num_layers"),
    timestep=TimestepArgument(scale=1000.0, reverse=True),
)

# The denoiser replaces masked text by learned padding before the blocks, so there is no mask to extend.
HUNYUAN_DIT = FamilySpec(
    name="hunyuan-dit",
    denoiser="HunyuanDiT2DModel",
    groups=(BlockGroup("blocks", text="encoder_hidden_states"),),
    width=_WIDTH,
    defaults=recipe(_WIDTH, "num_layers"),
)

PRX = FamilySpec(
    name="prx",
    denoiser="PRXTransformer2DModel",
    groups=(
        BlockGroup(
            "blocks", text="encoder_hidden_states", extended=(ExtendedArgument("attention_mask", dim=1, fill=1.0),)
        ),
    ),
    width=named_width("hidden_size"),
    defaults=recipe(named_width("hidden_size"), "depth"),
    timestep=TimestepArgument(scale=1000.0),
)

KANDINSKY5 = FamilySpec(
    name="kandinsky5",
    denoiser="Kandinsky5Transformer3DModel",
    groups=(BlockGroup("visual_transformer_blocks", text="text_embed"),),
    width=named_width("model_dim"),
    defaults=recipe(named_width("model_dim"), "num_visual_blocks"),
)


def _cosmos_clock(config: Mapping[str, Any]) -> TimestepArgument:
    """Returns the timestep of Cosmos 1, log(sigma) / 4 for sigma in 0.002..80, or of later models, in 0..1.

    Only Cosmos 1 has learned positions.
    """
    if config["extra_pos_embed_type"] is None:
        return TimestepArgument(scale=1000.0)
    low, high = math.log(0.002) / 4, math.log(80.0) / 4
    scale = 1000.0 / (high - low)
    return TimestepArgument(scale=scale, offset=-low * scale)


# The text is a tensor, or the first element of a tuple with image conditions. Anima is also of this class.
COSMOS = FamilySpec(
    name="cosmos",
    denoiser="CosmosTransformer3DModel",
    groups=(
        BlockGroup(
            "transformer_blocks",
            text="encoder_hidden_states",
            extended=(ExtendedArgument("attention_mask", dim=3, fill=1.0),),
        ),
    ),
    width=named_width("text_embed_dim"),
    defaults=recipe(named_width("text_embed_dim"), "num_layers"),
    clock=_cosmos_clock,
)
