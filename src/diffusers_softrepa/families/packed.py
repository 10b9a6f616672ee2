"""Denoisers of one packed sequence without a batch dimension; the highest noise level of all rows is used."""

from .spec import BlockGroup, ExtendedArgument, FamilySpec, TimestepArgument, named_width, recipe

_HIDDEN_SIZE = named_width("hidden_size")

# Attention over the text is causal, so tokens go first, where all text rows see them. The rotary embedding is a tuple:
# cos and sin of the text, then of the rest.
COSMOS3 = FamilySpec(
    name="cosmos3",
    denoiser="Cosmos3OmniTransformer",
    groups=(
        BlockGroup(
            "layers",
            text="und_seq",
            returns=0,
            seq_dim=0,
            extended=(
                ExtendedArgument("rotary_emb", dim=0, select=0),
                ExtendedArgument("rotary_emb", dim=0, select=1),
            ),
        ),
    ),
    width=_HIDDEN_SIZE,
    defaults=recipe(_HIDDEN_SIZE, "num_hidden_layers"),
    timestep=TimestepArgument("vision_timesteps", per_sample=False),
)

# Text, sound and video are in one sequence, text first. Each row has an index that selects its modulation.
MINIMAX_H3 = FamilySpec(
    name="minimax-h3",
    denoiser="MiniMaxH3Transformer3DModel",
    groups=(
        BlockGroup(
            "transformer_blocks",
            text="hidden_states",
            returns="self",
            extended=(ExtendedArgument("adaln_indices", dim=0), ExtendedArgument("rotary_emb", dim=0, each=True)),
        ),
    ),
    width=_HIDDEN_SIZE,
    defaults=recipe(_HIDDEN_SIZE, "num_layers"),
    timestep=TimestepArgument(scale=1000.0, reverse=True, per_sample=False),
)
