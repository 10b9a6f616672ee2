"""The zoo: denoisers with a text stream and an image stream of their own in each block, or in the first of them."""

from collections.abc import Callable
from typing import Any

import torch

from zoo import Inputs, Specimen, add, grid, noise, ones_then_zeros, text

_HEADS = {"num_attention_heads": 2, "attention_head_dim": 12}


def _packed(channels: int = 8, width: int = 10, axes: int = 3, **more: Callable[[int], Any]) -> Any:
    """Returns the inputs of a denoiser of packed pictures (batch, 16, channels) with position ids."""

    def inputs(batch: int, length: int) -> Inputs:
        return {
            "hidden_states": noise("image", batch, 16, channels),
            "encoder_hidden_states": text(batch, length, width),
            "img_ids": grid(4, 4, axes),
            "txt_ids": torch.zeros(length, axes),
            **{name: value(batch) for name, value in more.items()},
        }

    return inputs


def _joint_mask(batch: int, length: int, valid: int) -> Inputs:
    mask = torch.cat([ones_then_zeros(batch, length, valid), torch.ones(batch, 16, dtype=torch.bool)], dim=1)
    return {"attention_mask": mask}


_FLUX = {
    **_HEADS,
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 2,
    "joint_attention_dim": 10,
    "axes_dims_rope": (4, 4, 4),
}
add(
    Specimen(
        "flux",
        "FluxTransformer2DModel",
        {**_FLUX, "pooled_projection_dim": 6, "guidance_embeds": True},
        _packed(
            pooled_projections=lambda batch: noise("pooled", batch, 6),
            guidance=lambda batch: torch.full((batch,), 3.5),
        ),
    )
)
add(
    Specimen(
        "flux2",
        "Flux2Transformer2DModel",
        {**_FLUX, "axes_dims_rope": (4, 4, 2, 2), "timestep_guidance_channels": 16},
        _packed(axes=4, guidance=lambda batch: torch.full((batch,), 3.5)),
    )
)
add(
    Specimen(
        "chroma",
        "ChromaTransformer2DModel",
        {**_FLUX, "approximator_num_channels": 16, "approximator_hidden_dim": 16, "approximator_layers": 1},
        _packed(),
        mask=_joint_mask,
        upstream="checkpointed single blocks get no attention mask",
    )
)
add(
    Specimen(
        "sd3",
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_projection_dim": 16,
            "joint_attention_dim": 10,
            "pooled_projection_dim": 6,
            "out_channels": 4,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        lambda batch, length: {
            "hidden_states": noise("image", batch, 4, 8, 8),
            "encoder_hidden_states": text(batch, length, 10),
            "pooled_projections": noise("pooled", batch, 6),
        },
    )
)


def _qwen(batch: int, length: int) -> Inputs:
    return {
        "hidden_states": noise("image", batch, 16, 8),
        "encoder_hidden_states": text(batch, length, 10),
        "img_shapes": [[(1, 4, 4)]] * batch,
    }


_QWEN = {
    **_HEADS,
    "in_channels": 8,
    "out_channels": 2,
    "num_layers": 3,
    "joint_attention_dim": 10,
    "axes_dims_rope": (4, 4, 4),
}
_POSITIONS = "text rows have positions that differ"


def _text_mask(batch: int, length: int, valid: int) -> Inputs:
    return {"encoder_hidden_states_mask": ones_then_zeros(batch, length, valid)}


add(Specimen("qwen-image", "QwenImageTransformer2DModel", _QWEN, _qwen, mask=_text_mask, positioned=_POSITIONS))
add(
    Specimen(
        "qwen-image-edit",
        "QwenImageTransformer2DModel",
        {**_QWEN, "zero_cond_t": True},
        lambda batch, length: {
            **_qwen(batch, length),
            "hidden_states": noise("image", batch, 20, 8),
            "img_shapes": [[(1, 4, 4), (1, 2, 2)]] * batch,
        },
        mask=_text_mask,
        positioned=_POSITIONS,
    )
)
