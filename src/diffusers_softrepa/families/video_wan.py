"""Wan and what was made from it: text is read by cross-attention, after a projection to the width of the model.

Variants that also see a reference image have its rows in front of the text in one sequence, and their attention counts
the last 512 rows as text before it projects the two apart. Soft tokens in that sequence would be counted as text and
push as many rows of it to the image. So in blocks with projections for an image (`attn2.add_k_proj`) the tokens go to
the inputs of the text's own projections, behind the split; in all others to the block's text, which is the same.

Text is padded with zeros to 512 rows and not masked.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .guards import checkpointing_without_keywords
from .spec import BlockGroup, FamilySpec, inner_width, layered_defaults, named_width, recipe


def _counts_rows(block: Any) -> bool:
    return block.attn2.add_k_proj is not None


def _counts_no_rows(block: Any) -> bool:
    return not _counts_rows(block)


def _groups(path: str) -> tuple[BlockGroup, BlockGroup]:
    text = "encoder_hidden_states"
    return BlockGroup(path, text, needs=_counts_no_rows), BlockGroup(path, text, needs=_counts_rows, level="kv")


def _fused_projections(denoiser: Any, arguments: Mapping[str, Any]) -> str | None:
    if not any(block.attn2.fused_projections for block in denoiser.blocks if _counts_rows(block)):
        return None
    return (
        f"soft tokens go into {type(denoiser).__name__} at the inputs of attn2.to_k and attn2.to_v, since it sees an "
        "image, but its projections are fused, and these are not run; call unfuse_qkv_projections() on it"
    )


# Timesteps may differ from token to token (Wan 2.2 TI2V).
WAN = FamilySpec(
    name="wan",
    denoiser="WanTransformer3DModel",
    groups=_groups("blocks"),
    width=inner_width,
    defaults=recipe(inner_width, "num_layers"),
    guards=(_fused_projections,),
)
CHRONO_EDIT = replace(WAN, name="chrono-edit", denoiser="ChronoEditTransformer3DModel")
WAN_ANIMATE = replace(WAN, name="wan-animate", denoiser="WanAnimateTransformer3DModel")
# With diffusion forcing each frame has a timestep of its own.
SKYREELS_V2 = replace(WAN, name="skyreels-v2", denoiser="SkyReelsV2Transformer3DModel")


def _vace_depth(config: Mapping[str, Any]) -> int:
    return len(config["vace_layers"]) + config["num_layers"]


# Blocks that read the control video run first and read the text as well; layers are counted from them on.
WAN_VACE = replace(
    WAN,
    name="wan-vace",
    denoiser="WanVACETransformer3DModel",
    groups=(*_groups("vace_blocks"), *_groups("blocks")),
    defaults=lambda config: layered_defaults(_vace_depth(config), inner_width(config)),
)

_READ = BlockGroup("blocks", text="encoder_hidden_states")

# Text and image share their projections, so nothing counts rows.
ANYFLOW = FamilySpec(
    name="anyflow",
    denoiser="AnyFlowTransformer3DModel",
    groups=(_READ,),
    width=inner_width,
    defaults=recipe(inner_width, "num_layers"),
)
ANYFLOW_FAR = replace(ANYFLOW, name="anyflow-far", denoiser="AnyFlowFARTransformer3DModel")
HELIOS = replace(ANYFLOW, name="helios", denoiser="HeliosTransformer3DModel")

_DIM = named_width("dim")
# Text and image come apart. A first pass over a reference video reads text too and stores what later ones attend to,
# with the tokens of the timestep that it is called with.
WAN_ANIMATE2 = FamilySpec(
    name="wan-animate-2",
    denoiser="WanAnimate2Transformer3DModel",
    groups=(_READ,),
    width=_DIM,
    defaults=recipe(_DIM, "num_layers"),
    guards=(checkpointing_without_keywords,),
)
