"""FLUX.1: joint attention with rotary positions over text and image, in dual and then in single blocks.

Text rows have position zero, so the rotary rows of the tokens are copies of the first text row. Both kinds of block
take and return the two streams separately. There is no published FLUX.1 adapter; the defaults follow SD3's.
"""

from collections.abc import Mapping
from typing import Any

from .spec import FamilySpec, Group, Side, Timestep, layered_defaults

_ROTARY = Side("image_rotary_emb", dim=0, each=True)


def _width(config: Mapping[str, Any]) -> int:
    return config["num_attention_heads"] * config["attention_head_dim"]


FLUX = FamilySpec(
    name="flux",
    denoiser="FluxTransformer2DModel",
    groups=(
        Group("transformer_blocks", text="encoder_hidden_states", returns=0, sides=(_ROTARY,)),
        Group("single_transformer_blocks", text="encoder_hidden_states", returns=0, sides=(_ROTARY,)),
    ),
    width=_width,
    defaults=lambda config: layered_defaults(config["num_layers"] + config["num_single_layers"], _width(config)),
    timestep=Timestep(scale=1000.0),
)
