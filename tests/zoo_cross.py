"""The zoo: denoisers that read text by cross-attention."""

from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_2d_rotary_pos_embed_lumina

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


def _lumina_rotary(head_dim: int) -> torch.Tensor:
    return get_2d_rotary_pos_embed_lumina(head_dim, 16, 16)


def _fill_padding(denoiser: Any) -> None:
    denoiser.pad_token.normal_()  # made uninitialised


add(
    Specimen(
        "lumina-next",
        "LuminaNextDiT2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 16,
            "num_layers": 3,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "cross_attention_dim": 12,
        },
        lambda batch, length: {
            **_picture(4, 12)(batch, length),
            "encoder_mask": ones_then_zeros(batch, length, length),
            "image_rotary_emb": _lumina_rotary(8),
            "cross_attention_kwargs": {},
        },
        mask=lambda batch, length, valid: {"encoder_mask": ones_then_zeros(batch, length, valid)},
        positioned="the modulation reads the text as well",
        checkpoints=False,
        prepare=_fill_padding,
    )
)


def _hunyuan_dit(batch: int, length: int) -> Inputs:
    return {
        **_picture(4, 12)(batch, length),
        "text_embedding_mask": ones_then_zeros(batch, length, length),
        "encoder_hidden_states_t5": noise("t5", batch, 5, 16),
        "text_embedding_mask_t5": ones_then_zeros(batch, 5, 4),
        "image_meta_size": torch.full((batch, 6), 64.0),
        "style": torch.zeros(batch, dtype=torch.long),
        "image_rotary_emb": get_2d_rotary_pos_embed(8, ((0, 0), (4, 4)), (4, 4), output_type="pt"),
    }


add(
    Specimen(
        "hunyuan-dit",
        "HunyuanDiT2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": 16,
            "num_layers": 4,
            "mlp_ratio": 2.0,
            "cross_attention_dim": 12,
            "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 8,
            "text_len": 7,
            "text_len_t5": 5,
        },
        _hunyuan_dit,
        mask=lambda batch, length, valid: {"text_embedding_mask": ones_then_zeros(batch, length, valid)},
        positioned="the learned padding has a fixed number of rows",
        checkpoints=False,
    )
)
add(
    Specimen(
        "prx",
        "PRXTransformer2DModel",
        {
            "in_channels": 4,
            "context_in_dim": 12,
            "hidden_size": 16,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 3,
            "axes_dim": [4, 4],
        },
        _picture(4, 12),
        mask=lambda batch, length, valid: {"attention_mask": ones_then_zeros(batch, length, valid)},
    )
)
add(
    Specimen(
        "kandinsky5",
        "Kandinsky5Transformer3DModel",
        {
            "in_visual_dim": 4,
            "in_text_dim": 12,
            "in_text_dim2": 6,
            "time_dim": 8,
            "out_visual_dim": 4,
            "model_dim": 24,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 3,
            "axes_dims": (4, 4, 4),
        },
        lambda batch, length: {
            "hidden_states": noise("image", batch, 1, 8, 8, 4),
            "encoder_hidden_states": text(batch, length, 12),
            "pooled_projections": noise("pooled", batch, 6),
            "visual_rope_pos": [torch.arange(1), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(length),
        },
        positioned="blocks of text alone mix its rows first",
    )
)


def _cosmos(batch: int, length: int) -> Inputs:
    return {
        "hidden_states": noise("image", batch, 4, 1, 8, 8),
        "encoder_hidden_states": text(batch, length, 12),
    }


_COSMOS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 3,
    "mlp_ratio": 2.0,
    "text_embed_dim": 12,
    "adaln_lora_dim": 4,
    "max_size": (4, 8, 8),
    "concat_padding_mask": False,  # resizing it needs torchvision
}


def _cosmos_mask(batch: int, length: int, valid: int) -> Inputs:
    return {"attention_mask": ones_then_zeros(batch, length, valid)}


add(Specimen("cosmos1", "CosmosTransformer3DModel", _COSMOS, _cosmos, mask=_cosmos_mask))
add(
    Specimen(
        "cosmos2",
        "CosmosTransformer3DModel",
        {
            **_COSMOS,
            "extra_pos_embed_type": None,
            "use_crossattn_projection": True,
            "crossattn_proj_in_channels": 10,
            "encoder_hidden_states_channels": 12,
        },
        lambda batch, length: {**_cosmos(batch, length), "encoder_hidden_states": text(batch, length, 10)},
        mask=_cosmos_mask,
    )
)
add(
    Specimen(
        "cosmos2-with-image",
        "CosmosTransformer3DModel",
        {
            **_COSMOS,
            "extra_pos_embed_type": None,
            "img_context_dim_in": 6,
            "img_context_num_tokens": 3,
            "img_context_dim_out": 24,
        },
        lambda batch, length: {
            **_cosmos(batch, length),
            "encoder_hidden_states": (text(batch, length, 12), noise("seen", batch, 3, 6)),
        },
        positioned="text comes in a tuple",
    )
)


def _fill_experts(denoiser: Any) -> None:
    for name, parameter in denoiser.named_parameters():
        if "experts" in name:
            parameter.normal_(0.0, 0.1)  # made uninitialised


_NUCLEUS: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 2,
    "num_layers": 5,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "joint_attention_dim": 12,
    "axes_dims_rope": (4, 4, 4),
    "num_experts": 4,
    "moe_intermediate_dim": 8,
    "capacity_factors": 2.0,
    "mlp_ratio": 8.0,
}
add(
    Specimen(
        "nucleus-image",
        "NucleusMoEImageTransformer2DModel",
        _NUCLEUS,
        lambda batch, length: {
            "hidden_states": noise("image", batch, 16, 8),
            "encoder_hidden_states": text(batch, length, 12),
            "img_shapes": [(1, 4, 4)] * batch,
        },
        mask=lambda batch, length, valid: {"encoder_hidden_states_mask": ones_then_zeros(batch, length, valid)},
        positioned="text rows have positions that differ",
        prepare=_fill_experts,
    )
)
