"""The zoo: denoisers that read text by cross-attention."""

from typing import Any

import torch

from zoo import Inputs, Specimen, add, noise, ones_then_zeros, text


def _picture(channels: int, width: int, **more: Any) -> Any:
    """Returns the inputs of a denoiser of pictures (batch, channels, 8, 8) with text of a width."""

    def inputs(batch: int, length: int) -> Inputs:
        image = noise("image", batch, channels, 8, 8)
        extra = {name: value(batch) if callable(value) else value for name, value in more.items()}
        return {"hidden_states": image, "encoder_hidden_states": text(batch, length, width), **extra}

    return inputs


def _mask(batch: int, length: int, valid: int) -> Inputs:
    return {"encoder_attention_mask": ones_then_zeros(batch, length, valid, torch.float32)}


add(
    Specimen(
        "pixart",
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 3,
            "cross_attention_dim": 24,
            "sample_size": 8,
            "caption_channels": 12,
            "use_additional_conditions": True,
        },
        _picture(
            4,
            12,
            added_cond_kwargs=lambda batch: {
                "resolution": torch.full((batch, 2), 8.0),
                "aspect_ratio": torch.ones(batch, 1),
            },
        ),
        mask=_mask,
    )
)

_SANA = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 3,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 12,
    "sample_size": 8,
}
add(Specimen("sana", "SanaTransformer2DModel", {**_SANA, "timestep_scale": 0.001}, _picture(4, 12), mask=_mask))
add(
    Specimen(
        "sana-sprint",
        "SanaTransformer2DModel",
        {**_SANA, "guidance_embeds": True, "qk_norm": "rms_norm_across_heads"},
        _picture(4, 12, guidance=lambda batch: torch.full((batch,), 0.45)),
        mask=_mask,
    )
)
