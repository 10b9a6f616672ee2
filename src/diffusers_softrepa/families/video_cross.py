"""Video transformers other than Wan that read text by cross-attention, and video UNets."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .spec import BlockGroup, ExtendedArgument, FamilySpec, named_width, recipe
from .unet import UNET

_WIDTH = named_width("cross_attention_dim")
# The denoiser turns its text mask into an additive bias, (batch, 1, sequence), before any block sees it.
_BIAS = ExtendedArgument("encoder_attention_mask", dim=2, fill=0.0)
_READ = BlockGroup("transformer_blocks", text="encoder_hidden_states", extended=(_BIAS,))

# Timesteps may differ between tokens.
LTX = FamilySpec(
    name="ltx",
    denoiser="LTXVideoTransformer3DModel",
    groups=(_READ,),
    width=_WIDTH,
    defaults=recipe(_WIDTH, "num_layers"),
)
ALLEGRO = replace(LTX, name="allegro", denoiser="AllegroTransformer3DModel")
SANA_VIDEO = replace(LTX, name="sana-video", denoiser="SanaVideoTransformer3DModel")

# Temporal blocks are in lists of their own and read no text. Spatial blocks read the text once per frame.
LATTE = replace(LTX, name="latte", denoiser="LatteTransformer3DModel")
ANIMATE_DIFF = replace(UNET, name="animate-diff", denoiser="UNetMotionModel")
UNET3D = replace(
    UNET,
    name="unet-3d",
    denoiser="UNet3DConditionModel",
    defaults=lambda config: {"num_tokens": 4, "stages": ["down"], "num_timestep_bins": 100},
)
I2VGEN_XL = replace(UNET3D, name="i2vgen-xl", denoiser="I2VGenXLUNet")


def _ltx2_width(config: Mapping[str, Any]) -> int:
    return config["cross_attention_dim"] + config["audio_cross_attention_dim"]


# Video and audio have a text stream each, and a token has a part in both.
LTX2 = FamilySpec(
    name="ltx2",
    denoiser="LTX2VideoTransformer3DModel",
    groups=(
        BlockGroup(
            "transformer_blocks",
            text=("encoder_hidden_states", "audio_encoder_hidden_states"),
            extended=(_BIAS, replace(_BIAS, arg="audio_encoder_attention_mask")),
        ),
    ),
    width=_ltx2_width,
    defaults=recipe(_ltx2_width, "num_layers"),
)


def _kandinsky6_width(config: Mapping[str, Any]) -> int:
    return config["model_dim"] + (config["model_dim_a"] or config["model_dim"])


KANDINSKY6 = FamilySpec(
    name="kandinsky6",
    denoiser="Kandinsky6Transformer3DModel",
    groups=(
        BlockGroup(
            "visual_transformer_blocks",
            text=("text_v", "text_a"),
            extended=(ExtendedArgument("attn_mask", dim=1, fill=1.0),),
        ),
    ),
    width=_kandinsky6_width,
    defaults=recipe(_kandinsky6_width, "num_visual_blocks"),
)
