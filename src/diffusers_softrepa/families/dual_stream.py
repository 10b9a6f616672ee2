"""Dual-stream image transformers (MM-DiT) without rotary positions for text.

A block takes and returns text and image separately. Some classes have further blocks that take both in one sequence.
In masks over image and text, the last columns are those of the text.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .guards import checkpointing_without_keywords
from .spec import BlockGroup, ExtendedArgument, FamilySpec, TimestepArgument, inner_width, named_width, recipe

_MASK_BEHIND_IMAGE = ExtendedArgument("attention_mask", dim=3, where="text_last", fill=1.0)

AURA_FLOW = FamilySpec(
    name="aura-flow",
    denoiser="AuraFlowTransformer2DModel",
    groups=(
        BlockGroup("joint_transformer_blocks", text="encoder_hidden_states", returns=0),
        BlockGroup("single_transformer_blocks", text="hidden_states", returns="self"),
    ),
    width=inner_width,
    defaults=recipe(inner_width, "num_mmdit_layers", "num_single_dit_layers"),
    timestep=TimestepArgument(scale=1000.0),
)

COGVIEW3_PLUS = FamilySpec(
    name="cogview3-plus",
    denoiser="CogView3PlusTransformer2DModel",
    groups=(BlockGroup("transformer_blocks", text="encoder_hidden_states", returns=1),),
    width=inner_width,
    defaults=recipe(inner_width, "num_layers"),
)

# The denoiser adds the 0/1 mask to the attention logits, so valid tokens have 1.
_TEXT_MASK = ExtendedArgument("attention_mask", dim=1, fill=1.0)
COGVIEW4 = FamilySpec(
    name="cogview4",
    denoiser="CogView4Transformer2DModel",
    groups=(BlockGroup("transformer_blocks", text="encoder_hidden_states", returns=1, extended=(_TEXT_MASK,)),),
    width=inner_width,
    defaults=recipe(inner_width, "num_layers"),
)


def _text_in_image_cache(denoiser: nn.Module, arguments: Mapping[str, Any]) -> str | None:
    caches, text = arguments.get("kv_caches"), arguments.get("encoder_hidden_states")
    if caches is None or text is None or text.shape[1] == 0 or caches[0].mode != "write":
        return None
    return (
        f"GLM-Image's cache must be written without text, but it is written with {text.shape[1]} rows of text, and "
        "soft tokens would stay in it; write it with encoder_hidden_states of length 0, as the pipeline does"
    )


GLM_IMAGE = FamilySpec(
    name="glm-image",
    denoiser="GlmImageTransformer2DModel",
    groups=COGVIEW4.groups,
    width=inner_width,
    defaults=recipe(inner_width, "num_layers"),
    timestep=TimestepArgument(offset=1.0),
    guards=(_text_in_image_cache,),
)


HUNYUAN_IMAGE = FamilySpec(
    name="hunyuan-image",
    denoiser="HunyuanImageTransformer2DModel",
    groups=(
        BlockGroup("transformer_blocks", text="encoder_hidden_states", returns=1, extended=(_MASK_BEHIND_IMAGE,)),
        BlockGroup(
            "single_transformer_blocks", text="encoder_hidden_states", returns=1, extended=(_MASK_BEHIND_IMAGE,)
        ),
    ),
    width=inner_width,
    defaults=recipe(inner_width, "num_layers", "num_single_layers"),
    guards=(checkpointing_without_keywords,),
)

# The sequence is image, then text at position zero. The image mask multiplies keys.
HIDREAM = FamilySpec(
    name="hidream",
    denoiser="HiDreamImageTransformer2DModel",
    groups=(
        BlockGroup(
            "double_stream_blocks",
            text="encoder_hidden_states",
            returns=1,
            extended=(ExtendedArgument("image_rotary_emb", dim=1, where="text_last"),),
        ),
        BlockGroup(
            "single_stream_blocks",
            text="hidden_states",
            returns="self",
            extended=(
                ExtendedArgument("image_rotary_emb", dim=1, fill="identity"),
                ExtendedArgument("hidden_states_masks", dim=1, fill=1.0),
            ),
        ),
    ),
    width=inner_width,
    defaults=recipe(inner_width, "num_layers", "num_single_layers"),
    timestep=TimestepArgument("timesteps"),
)

_HIDDEN_SIZE = named_width("hidden_size")
# The rotary embedding is (image, text), each (cos, sin). Some checkpoints have none for the text.
JOY_IMAGE_EDIT = FamilySpec(
    name="joyimage-edit",
    denoiser="JoyImageEditTransformer3DModel",
    groups=(
        BlockGroup(
            "double_blocks",
            text="encoder_hidden_states",
            returns=1,
            extended=(ExtendedArgument("image_rotary_emb", dim=0, select=1, each=True),),
        ),
    ),
    width=_HIDDEN_SIZE,
    defaults=recipe(_HIDDEN_SIZE, "num_layers"),
)
JOY_IMAGE_EDIT_PLUS = FamilySpec(
    name="joyimage-edit-plus",
    denoiser="JoyImageEditPlusTransformer3DModel",
    groups=(BlockGroup("double_blocks", text="encoder_hidden_states", returns=1, extended=(_MASK_BEHIND_IMAGE,)),),
    width=_HIDDEN_SIZE,
    defaults=recipe(_HIDDEN_SIZE, "num_layers"),
)
