"""Qwen-Image, Qwen-Image 2.1 and Nucleus-Image.

Qwen-Image has joint attention in dual blocks; the blocks of Nucleus-Image read text without returning it. In both,
text positions begin where image positions end, and the second of the two rotary tables is that of the text. Position
zero is the centre of the image, so the rotary rows of the tokens are copies of the first text row.

Qwen-Image 2.1 has text and image in one sequence with causal attention, so tokens go first, where all rows see them.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .spec import BlockGroup, ExtendedArgument, FamilySpec, TimestepArgument, inner_width, named_width, recipe

QWEN_IMAGE = FamilySpec(
    name="qwen-image",
    denoiser="QwenImageTransformer2DModel",
    groups=(
        BlockGroup(
            "transformer_blocks",
            text="encoder_hidden_states",
            returns=0,
            extended=(
                ExtendedArgument("encoder_hidden_states_mask", dim=1, fill=1.0),
                ExtendedArgument("image_rotary_emb", dim=0, select=1),
            ),
        ),
    ),
    width=inner_width,
    defaults=recipe(inner_width, "num_layers"),
    timestep=TimestepArgument(scale=1000.0),
)


def _text_cache(denoiser: nn.Module, arguments: Mapping[str, Any]) -> str | None:
    registry = vars(denoiser).get("_diffusers_hook")
    if registry is None or registry.get_hook("text_kv_cache_transformer") is None:
        return None
    return (
        "soft tokens need Nucleus-Image to read its text in every call, but its text cache keeps the keys of the "
        "first one, which have no tokens; call disable_cache() on the transformer"
    )


_NUCLEUS_WIDTH = named_width("joint_attention_dim")
NUCLEUS_IMAGE = FamilySpec(
    name="nucleus-image",
    denoiser="NucleusMoEImageTransformer2DModel",
    groups=(
        BlockGroup(
            "transformer_blocks",
            text="encoder_hidden_states",
            extended=(
                ExtendedArgument("image_rotary_emb", dim=0, select=1),
                ExtendedArgument("attention_kwargs", dim=1, select="attention_mask", where="text_last", fill=1.0),
            ),
        ),
    ),
    width=_NUCLEUS_WIDTH,
    defaults=recipe(_NUCLEUS_WIDTH, "num_layers"),
    timestep=TimestepArgument(scale=1000.0),
    guards=(_text_cache,),
)


def _shift_segments(arguments: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Adds the tokens as a segment before all others, because attention runs per segment, and keeps them uncached."""
    changed: dict[str, Any] = {}
    segments, stored = arguments.get("segments"), arguments.get("cache_write_slice")
    if segments is not None:
        moved = [(start + count, end + count, is_text) for start, end, is_text in segments]
        changed["segments"] = [(0, count, True), *moved]
    if stored is not None:
        changed["cache_write_slice"] = slice(stored.start + count, stored.stop + count)
    return changed


def _block_mask(denoiser: Any, arguments: Mapping[str, Any]) -> str | None:
    processors = {type(block.attn.processor).__name__ for block in denoiser.transformer_blocks}
    if "QwenImage21FlexAttnProcessor" not in processors:
        return None
    return (
        "soft tokens need attention masks that can be extended, but QwenImage21FlexAttnProcessor makes a BlockMask, "
        "which cannot; call set_attn_processor(QwenImage21AttnProcessor()) to use the default"
    )


def _timed_cache(denoiser: nn.Module, arguments: Mapping[str, Any]) -> str | None:
    if arguments.get("kv_cache") is None:
        return None
    return (
        "with its cache Qwen-Image 2.1 reads the text of the first step in all steps, but these soft tokens depend on "
        "the timestep; call the pipeline with use_kv_cache=False, or use an adapter with num_timestep_bins=None"
    )


QWEN_IMAGE_21 = FamilySpec(
    name="qwen-image-2.1",
    denoiser="QwenImage21Transformer2DModel",
    groups=(
        BlockGroup(
            "transformer_blocks",
            text="hidden_states",
            returns="self",
            extended=(
                ExtendedArgument("rotary_emb", dim=0, fill="identity"),
                ExtendedArgument("target_token_mask", dim=0, fill=0.0),
                ExtendedArgument("key_valid", dim=1, fill=1.0),
                ExtendedArgument("attention_mask", dim=3, where="text_last", fill=1.0),
            ),
            adjust=_shift_segments,
        ),
    ),
    width=inner_width,
    defaults=recipe(inner_width, "num_layers"),
    timestep=TimestepArgument(scale=1000.0),
    guards=(_block_mask,),
    timed_guards=(_timed_cache,),
)
