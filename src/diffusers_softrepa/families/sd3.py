"""Stable Diffusion 3 and 3.5: joint attention, text and image in one sequence (MM-DiT).

A block concatenates the two streams for one attention without positions for text, so tokens go in front of the text
(after the denoiser's own context embedder, hence in its inner width) and are cut off behind the block.

Source: SoftREPA, arXiv 2503.08250; shapes of the published SD3 adapter.
"""

from .spec import BlockGroup, FamilySpec, layered_defaults

SD3 = FamilySpec(
    name="sd3",
    denoiser="SD3Transformer2DModel",
    groups=(BlockGroup("transformer_blocks", text="encoder_hidden_states", returns=0),),
    width=lambda config: config["caption_projection_dim"],
    defaults=lambda config: layered_defaults(config["num_layers"], config["caption_projection_dim"]),
)
