"""UNets whose stages read text by cross-attention: Stable Diffusion 1.x, 2.x and XL, DreamLite, Kandinsky 3.

The blocks do not return the text, so nothing is cut off. One layer of tokens is used for all blocks of the selected
stages; it is inserted after the first (BOS) token. Other stages read the text without tokens.

Source: SoftREPA, arXiv 2503.08250: SD1.5 uses the down stage with timestep bins, SDXL down and mid without.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .spec import BlockGroup, ExtendedArgument, FamilySpec


def _group(path: str, stage: str) -> BlockGroup:
    return BlockGroup(
        path,
        text="encoder_hidden_states",
        at=1,
        # The UNet turns its text mask into an additive bias, (batch, 1, sequence), before any block sees it.
        extended=(ExtendedArgument("encoder_attention_mask", dim=2, fill=0.0),),
        stage=stage,
        needs="has_cross_attention",
    )


def _width(config: Mapping[str, Any]) -> int:
    width = config["cross_attention_dim"]
    widths = {width} if isinstance(width, int) else set(width)
    if len(widths) > 1:
        raise ValueError(
            f"soft tokens need one text width in all stages, but this UNet's cross_attention_dim is {width}; "
            "register a family spec whose stages share a width"
        )
    return widths.pop()


def _defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    if config["addition_embed_type"] == "text_time":  # SDXL
        return {"num_tokens": 4, "stages": ["down", "mid"], "num_timestep_bins": None}
    return {"num_tokens": 4, "stages": ["down"], "num_timestep_bins": 100}


UNET = FamilySpec(
    name="unet",
    denoiser="UNet2DConditionModel",
    groups=(_group("down_blocks", "down"), _group("mid_block", "mid"), _group("up_blocks", "up")),
    width=_width,
    defaults=_defaults,
)

DREAMLITE = replace(UNET, name="dreamlite", denoiser="DreamLiteUNetModel")


def _reads_context(block: Any) -> bool:
    return block.context_dim is not None


def _kandinsky_group(path: str, stage: str) -> BlockGroup:
    return BlockGroup(
        path,
        text="context",
        extended=(ExtendedArgument("context_mask", dim=2, fill=0.0),),
        stage=stage,
        needs=_reads_context,
    )


KANDINSKY3 = FamilySpec(
    name="kandinsky3",
    denoiser="Kandinsky3UNet",
    groups=(_kandinsky_group("down_blocks", "down"), _kandinsky_group("up_blocks", "up")),
    width=_width,
    defaults=lambda config: {"num_tokens": 4, "stages": ["down"], "num_timestep_bins": 100},
)
