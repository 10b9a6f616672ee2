"""Qwen-Image: joint attention in dual blocks; text positions begin where those of the image end.

Only the second of the two rotary tables is the text's. Position zero would be the middle of the image, so the rotary
rows of the tokens are copies of the first text row.
"""

from .spec import FamilySpec, Group, Side, Timestep, inner_width, recipe

QWEN_IMAGE = FamilySpec(
    name="qwen-image",
    denoiser="QwenImageTransformer2DModel",
    groups=(
        Group(
            "transformer_blocks",
            text="encoder_hidden_states",
            returns=0,
            sides=(Side("encoder_hidden_states_mask", dim=1, fill=1.0), Side("image_rotary_emb", dim=0, select=1)),
        ),
    ),
    width=inner_width,
    defaults=recipe(inner_width, "num_layers"),
    timestep=Timestep(scale=1000.0),
)
