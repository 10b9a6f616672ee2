"""The zoo: UNets, whose stages read text."""

from typing import Any

from zoo import Inputs, Specimen, add, noise, ones_then_zeros, text

_UNET: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4),
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
}


def _mask(batch: int, length: int, valid: int) -> Inputs:
    return {"encoder_attention_mask": ones_then_zeros(batch, length, valid)}


def _inputs(**more: Any) -> Any:
    return lambda batch, length: {
        "sample": noise("image", batch, 4, 8, 8),
        "encoder_hidden_states": text(batch, length, 12),
        **{name: value(batch) for name, value in more.items()},
    }


add(Specimen("unet", "UNet2DConditionModel", _UNET, _inputs(), mask=_mask))
add(
    Specimen(
        "unet-xl",
        "UNet2DConditionModel",
        {
            **_UNET,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + 6,
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
        },
        _inputs(
            added_cond_kwargs=lambda batch: {
                "text_embeds": noise("pooled", batch, 6),
                "time_ids": noise("sizes", batch, 6),
            }
        ),
        mask=_mask,
    )
)

add(
    Specimen(
        "dreamlite",
        "DreamLiteUNetModel",
        {
            "sample_size": 8,
            "block_out_channels": (8, 16, 16),
            "layers_per_block": 1,
            "attention_head_dim": 8,
            "norm_num_groups": 4,
            "cross_attention_dim": 12,
            "ff_mult": 2,
        },
        _inputs(),
        mask=_mask,
    )
)
add(
    Specimen(
        "kandinsky3",
        "Kandinsky3UNet",
        {
            "time_embedding_dim": 16,
            "groups": 4,
            "attention_head_dim": 4,
            "layers_per_block": 2,
            "block_out_channels": (8, 16),
            "cross_attention_dim": 12,
            "encoder_hid_dim": 10,
        },
        lambda batch, length: {
            "sample": noise("image", batch, 4, 8, 8),
            "encoder_hidden_states": text(batch, length, 10),
            "encoder_attention_mask": ones_then_zeros(batch, length, length),
        },
        mask=_mask,
        leaky="the time embedding reads the mean of all rows",
        positioned="the time embedding reads the text as well",
        checkpoints=False,
    )
)
