"""Wan and related video transformers, which read text by cross-attention.

Variants that read a reference image have the image rows before the text rows in one sequence. Their attention takes
the last 512 rows as text before it projects text and image separately. Soft tokens in that sequence would count as
text and move as many text rows to the image. In blocks with image projections (`attn2.add_k_proj`) the tokens are
therefore inserted into the inputs of the text projections, after the split. In all other blocks they are inserted into
the text argument of the block, which has the same effect.

The text is padded with zeros to 512 rows and is not masked.
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
        f"soft tokens are inserted into the inputs of attn2.to_k and attn2.to_v of this {type(denoiser).__name__}, "
        "which reads an image, but its projections are fused, so these do not run; call unfuse_qkv_projections() on it"
    )


# Timesteps may differ between tokens (Wan 2.2 TI2V).
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
# With diffusion forcing each frame has its own timestep.
SKYREELS_V2 = replace(WAN, name="skyreels-v2", denoiser="SkyReelsV2Transformer3DModel")


def _vace_depth(config: Mapping[str, Any]) -> int:
    return len(config["vace_layers"]) + config["num_layers"]


# Blocks that read the control video also read the text and run first, so layers are counted from them.
WAN_VACE = replace(
    WAN,
    name="wan-vace",
    denoiser="WanVACETransformer3DModel",
    groups=(*_groups("vace_blocks"), *_groups("blocks")),
    defaults=lambda config: layered_defaults(_vace_depth(config), inner_width(config)),
)

_READ = BlockGroup("blocks", text="encoder_hidden_states")

# Text and image share their projections, so attention does not count rows.
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
# Text and image are separate arguments. A first pass over a reference video also reads the text and stores keys for
# later passes; it uses the tokens of its own timestep.
WAN_ANIMATE2 = FamilySpec(
    name="wan-animate-2",
    denoiser="WanAnimate2Transformer3DModel",
    groups=(_READ,),
    width=_DIM,
    defaults=recipe(_DIM, "num_layers"),
    guards=(checkpointing_without_keywords,),
)
