"""Transformers that read text by cross-attention: it is the same for all blocks, and none returns it."""

from collections.abc import Mapping
from typing import Any

from .spec import FamilySpec, Group, Side, Timestep, named_width, recipe

_WIDTH = named_width("cross_attention_dim")
# The denoiser turns its text mask into an additive bias, (batch, 1, sequence), before any block sees it.
_BIAS = Side("encoder_attention_mask", dim=2, fill=0.0)
_READ = Group("transformer_blocks", text="encoder_hidden_states", sides=(_BIAS,))

PIXART = FamilySpec(
    name="pixart",
    denoiser="PixArtTransformer2DModel",
    groups=(_READ,),
    width=_WIDTH,
    defaults=recipe(_WIDTH, "num_layers"),
)


def _sana_clock(config: Mapping[str, Any]) -> Timestep:
    """Sana-Sprint, distilled with its guidance, counts from 0 to 1; others have a factor of their own."""
    return Timestep(scale=1000.0 if config["guidance_embeds"] else 1.0 / config["timestep_scale"])


SANA = FamilySpec(
    name="sana",
    denoiser="SanaTransformer2DModel",
    groups=(_READ,),
    width=_WIDTH,
    defaults=recipe(_WIDTH, "num_layers"),
    clock=_sana_clock,
)
