"""Stable Diffusion 3 and 3.5: dual-stream transformers (MM-DiT) with joint attention over text and image.

Attention has no positions for text. Tokens are inserted before the text, after the context embedder of the denoiser,
so they have the inner width. They are cut off after each block.

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
