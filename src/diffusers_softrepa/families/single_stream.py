"""Single-stream image transformers: text and image are in one sequence in all blocks.

Tokens are inserted at the front of the sequence, wherever its text begins, and cut off there. This is right because
the order of rows matters only through masks, rotary embeddings and modulation, which are extended at the front as
well.
"""

from .spec import BlockGroup, ExtendedArgument, FamilySpec, TimestepArgument, inner_width, named_width, recipe

# The sequence is image, then text, so the first rotary row is not that of text and cannot be copied.
Z_IMAGE = FamilySpec(
    name="z-image",
    denoiser="ZImageTransformer2DModel",
    groups=(
        BlockGroup(
            "layers",
            text="x",
            returns="self",
            extended=(
                ExtendedArgument("attn_mask", dim=1, fill=1.0),
                ExtendedArgument("freqs_cis", dim=1, fill="identity"),
                ExtendedArgument("noise_mask", dim=1),
            ),
        ),
    ),
    width=named_width("dim"),
    defaults=recipe(named_width("dim"), "n_layers"),
    timestep=TimestepArgument("t", scale=1000.0, reverse=True),
)

_ZERO_TO_ONE = TimestepArgument(scale=1000.0)
_IMAGE_AT_ONE = TimestepArgument(scale=1000.0, reverse=True)
_COS_SIN = ExtendedArgument("image_rotary_emb", dim=0, each=True)
_HIDDEN_SIZE = named_width("hidden_size")

KREA2 = FamilySpec(
    name="krea2",
    denoiser="Krea2Transformer2DModel",
    groups=(
        BlockGroup(
            "transformer_blocks",
            text="hidden_states",
            returns="self",
            extended=(
                _COS_SIN,
                ExtendedArgument("attention_mask", dim=3, fill=1.0),
                ExtendedArgument("temb", dim=1, per_token=True),
            ),
        ),
    ),
    width=inner_width,
    defaults=recipe(inner_width, "num_layers"),
    timestep=_ZERO_TO_ONE,
)

# Each sample is packed as text, image, padding.
LUMINA2 = FamilySpec(
    name="lumina2",
    denoiser="Lumina2Transformer2DModel",
    groups=(
        BlockGroup(
            "layers",
            text="hidden_states",
            returns="self",
            extended=(
                ExtendedArgument("attention_mask", dim=1, fill=1.0),
                ExtendedArgument("image_rotary_emb", dim=1),
            ),
        ),
    ),
    width=_HIDDEN_SIZE,
    defaults=recipe(_HIDDEN_SIZE, "num_layers"),
    timestep=_IMAGE_AT_ONE,
)

# The additive mask has a row per query.
OMNIGEN = FamilySpec(
    name="omnigen",
    denoiser="OmniGenTransformer2DModel",
    groups=(
        BlockGroup(
            "layers",
            text="hidden_states",
            returns="self",
            extended=(ExtendedArgument("attention_mask", dim=3, full=True, fill=0.0), _COS_SIN),
        ),
    ),
    width=_HIDDEN_SIZE,
    defaults=recipe(_HIDDEN_SIZE, "num_layers"),
    timestep=_IMAGE_AT_ONE,
)

# Text is padded at the front, and padding attends only to itself, so a copy of the first mask column would hide the
# tokens.
IDEOGRAM4 = FamilySpec(
    name="ideogram4",
    denoiser="Ideogram4Transformer2DModel",
    groups=(
        BlockGroup(
            "layers",
            text="hidden_states",
            returns="self",
            extended=(
                ExtendedArgument("attention_mask", dim=3, full=True, fill=1.0),
                ExtendedArgument("image_rotary_emb", dim=1, each=True),
                ExtendedArgument("adaln_input", dim=1, per_token=True),
            ),
        ),
    ),
    width=inner_width,
    defaults=recipe(inner_width, "num_layers"),
    timestep=_IMAGE_AT_ONE,
)

# The sequence is the first dimension and the batch the second. Rotary rows are angles. The six parts of the modulation
# have a row per token.
ERNIE_IMAGE = FamilySpec(
    name="ernie-image",
    denoiser="ErnieImageTransformer2DModel",
    groups=(
        BlockGroup(
            "layers",
            text="x",
            returns="self",
            seq_dim=0,
            extended=(
                ExtendedArgument("rotary_pos_emb", dim=1, fill=0.0),
                ExtendedArgument("temb", dim=0, each=True, per_token=True),
                ExtendedArgument("attention_mask", dim=3, fill=1.0),
            ),
        ),
    ),
    width=_HIDDEN_SIZE,
    defaults=recipe(_HIDDEN_SIZE, "num_layers"),
)

# Text tokens are modulated as clean ones (noise mask 0) and stand before or after the image.
FIBO2 = FamilySpec(
    name="fibo2",
    denoiser="BriaFibo2Transformer2DModel",
    groups=(
        BlockGroup(
            "layers",
            text="x",
            returns="self",
            extended=(
                ExtendedArgument("attn_mask", dim=1, fill=1.0),
                ExtendedArgument("freqs_cis", dim=1, fill="identity"),
                ExtendedArgument("noise_mask", dim=1, fill=0.0),
            ),
        ),
    ),
    width=named_width("dim"),
    defaults=recipe(named_width("dim"), "n_layers"),
    timestep=_ZERO_TO_ONE,
)
