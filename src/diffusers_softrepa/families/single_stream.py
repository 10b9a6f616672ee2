"""Single-stream transformers: text and image in one sequence from the first block on.

Tokens go to the front of the sequence, wherever its text begins, and are cut off there: order matters only through
masks, rotary rows and modulation, which grow at the front as well.
"""

from .spec import FamilySpec, Group, Side, Timestep, named_width, recipe

# The sequence is image, then text; in the first row there is no text to copy the rotary row of.
Z_IMAGE = FamilySpec(
    name="z-image",
    denoiser="ZImageTransformer2DModel",
    groups=(
        Group(
            "layers",
            text="x",
            returns="self",
            sides=(
                Side("attn_mask", dim=1, fill=1.0),
                Side("freqs_cis", dim=1, fill="identity"),
                Side("noise_mask", dim=1),
            ),
        ),
    ),
    width=named_width("dim"),
    defaults=recipe(named_width("dim"), "n_layers"),
    timestep=Timestep("t", scale=1000.0, reverse=True),
)
