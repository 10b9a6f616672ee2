"""Dual-stream video transformers (MM-DiT): blocks with separate text and video streams.

The text has no rotary positions. In masks over video and text, the last columns are those of the text. Valid text rows
come before padding, and tokens before both.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .spec import (
    BlockGroup,
    ExtendedArgument,
    FamilySpec,
    TimestepArgument,
    inner_width,
    layered_defaults,
    named_width,
    recipe,
)

_TEXT = "encoder_hidden_states"
_MASK_BEHIND_VIDEO = ExtendedArgument("attention_mask", dim=3, where="text_last", fill=1.0)
_DUAL = BlockGroup("transformer_blocks", _TEXT, returns=1, extended=(_MASK_BEHIND_VIDEO,))
_APART = replace(_DUAL, path="single_transformer_blocks")

HUNYUAN_VIDEO = FamilySpec(
    name="hunyuan-video",
    denoiser="HunyuanVideoTransformer3DModel",
    groups=(_DUAL, _APART),
    width=inner_width,
    defaults=recipe(inner_width, "num_layers", "num_single_layers"),
)
HUNYUAN_VIDEO_FRAMEPACK = replace(
    HUNYUAN_VIDEO, name="hunyuan-video-framepack", denoiser="HunyuanVideoFramepackTransformer3DModel"
)
# The mask covers the text stream alone, whose rows (image, glyphs, text) are sorted with valid rows first.
HUNYUAN_VIDEO_15 = FamilySpec(
    name="hunyuan-video-1.5",
    denoiser="HunyuanVideo15Transformer3DModel",
    groups=(replace(_DUAL, extended=(ExtendedArgument("attention_mask", dim=1, fill=1.0),)),),
    width=inner_width,
    defaults=recipe(inner_width, "num_layers"),
)

COGVIDEOX = FamilySpec(
    name="cogvideox",
    denoiser="CogVideoXTransformer3DModel",
    groups=(BlockGroup("transformer_blocks", _TEXT, returns=1),),
    width=inner_width,
    defaults=recipe(inner_width, "num_layers"),
)
CONSIS_ID = replace(COGVIDEOX, name="consis-id", denoiser="ConsisIDTransformer3DModel")
EASY_ANIMATE = replace(COGVIDEOX, name="easy-animate", denoiser="EasyAnimateTransformer3DModel")

# Attention drops masked rows and pads its output at the end, so only valid rows at the front keep their place.
_MOCHI_WIDTH = named_width("pooled_projection_dim")
MOCHI = FamilySpec(
    name="mochi",
    denoiser="MochiTransformer3DModel",
    groups=(replace(_DUAL, extended=(ExtendedArgument("encoder_attention_mask", dim=1, fill=1.0),)),),
    width=_MOCHI_WIDTH,
    defaults=recipe(_MOCHI_WIDTH, "num_layers"),
    timestep=TimestepArgument(reverse=True),
)


def _encoders(denoiser: Any) -> int:
    return len(denoiser.single_transformer_blocks) - denoiser.num_decoder_layers


def _motif_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    depth = config["num_layers"] + config["num_single_layers"] - config["num_decoder_layers"]
    return layered_defaults(depth, inner_width(config))


# The rows of a first frame come before the text, and a second attention of the block reads only the rows after them.
# The last single blocks are decoders, which get video in place of text.
MOTIF_VIDEO = FamilySpec(
    name="motif-video",
    denoiser="MotifVideoTransformer3DModel",
    groups=(
        replace(_DUAL, at="image_embed_seq_len"),
        replace(_APART, at="image_embed_seq_len", limit=_encoders),
    ),
    width=inner_width,
    defaults=_motif_defaults,
)
