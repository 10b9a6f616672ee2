"""The zoo: denoisers whose blocks read text and image in one sequence."""

from typing import Any

import torch

from zoo import Inputs, Specimen, add, grid, noise, ones_then_zeros, text


def _z_image(batch: int, length: int) -> Inputs:
    """Texts of unequal length, so that there is a mask."""
    return {
        "x": list(noise("image", batch, 4, 1, 8, 8).unbind()),
        "cap_feats": [rows[index:] for index, rows in enumerate(text(batch, length, 12).unbind())],
    }


def _z_image_of_unequal_pictures(batch: int, length: int) -> Inputs:
    inputs = _z_image(batch, length)
    wide = [noise("wide image", 4, 1, 8, 16 * (index + 1)) for index in range(batch)]
    return {**inputs, "x": wide}


_Z_IMAGE = {
    "in_channels": 4,
    "dim": 24,
    "n_layers": 3,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 12,
    "axes_dims": [4, 4, 4],
    "axes_lens": [128, 32, 32],
}
_PADDED = "text is padded with tokens of its own to multiples of 32"
add(Specimen("z-image", "ZImageTransformer2DModel", _Z_IMAGE, _z_image, text="cap_feats", positioned=_PADDED))
add(
    Specimen(
        "z-image-masked",
        "ZImageTransformer2DModel",
        _Z_IMAGE,
        _z_image_of_unequal_pictures,
        text="cap_feats",
        positioned=_PADDED,
    )
)


def _z_image_omni(batch: int, length: int) -> Inputs:
    """One picture to read and one to draw, each with text."""
    captions = text(batch, length, 12)
    seen, drawn = noise("image", batch, 4, 1, 8, 8), noise("second image", batch, 4, 1, 8, 8)
    return {
        "x": [[a, b] for a, b in zip(seen, drawn, strict=True)],
        "cap_feats": [[rows[:3], rows[3:], noise("end of text", 1, 12)] for rows in captions],
        "siglip_feats": [[noise("siglip", 2, 2, 10), None] for _ in range(batch)],
        "image_noise_mask": [[0, 1] for _ in range(batch)],
    }


add(
    Specimen(
        "z-image-omni",
        "ZImageTransformer2DModel",
        {**_Z_IMAGE, "siglip_feat_dim": 10},
        _z_image_omni,
        text="cap_feats",
        positioned=_PADDED,
    )
)


def _krea(batch: int, length: int) -> Inputs:
    return {
        "hidden_states": noise("image", batch, 16, 8),
        "encoder_hidden_states": text(batch, length, 2 * 12).unflatten(-1, (2, 12)),
        "position_ids": torch.cat([torch.zeros(length, 3), grid(4, 4)]),
    }


def _text_mask(batch: int, length: int, valid: int) -> Inputs:
    return {"encoder_attention_mask": ones_then_zeros(batch, length, valid)}


add(
    Specimen(
        "krea2",
        "Krea2Transformer2DModel",
        {
            "in_channels": 8,
            "num_layers": 3,
            "attention_head_dim": 12,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 32,
            "timestep_embed_dim": 16,
            "text_hidden_dim": 12,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 4, 4),
        },
        _krea,
        mask=_text_mask,
        positioned="a refiner mixes the rows of text first",
    )
)
add(
    Specimen(
        "lumina2",
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 3,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "axes_dim_rope": (4, 4, 4),
            "axes_lens": (32, 16, 16),
            "cap_feat_dim": 10,
        },
        lambda batch, length: {
            "hidden_states": noise("image", batch, 4, 8, 8),
            "encoder_hidden_states": text(batch, length, 10),
            # Texts of unequal length, so that there is a mask.
            "encoder_attention_mask": torch.arange(length) < length - torch.arange(batch)[:, None],
        },
        mask=_text_mask,
        positioned="text rows have positions that differ",
    )
)


def _omnigen(batch: int, length: int) -> Inputs:
    """Causal text, padded in front in all samples but the first, then the time token and the picture."""
    total = length + 1 + 16
    seen = torch.ones(batch, total, total).tril()
    seen[:, length:] = 1.0
    seen[1:, :, :2] = 0.0
    return {
        "hidden_states": noise("image", batch, 4, 8, 8),
        "input_ids": torch.arange(length).expand(batch, length),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": seen,
        "position_ids": torch.arange(total).expand(batch, total),
    }


add(
    Specimen(
        "omnigen",
        "OmniGenTransformer2DModel",
        {
            "hidden_size": 24,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "num_layers": 3,
            "pad_token_id": 0,
            "vocab_size": 32,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 64,
            "pos_embed_max_size": 8,
            "time_step_dim": 16,
            "rope_scaling": {"long_factor": [1.0] * 6, "short_factor": [1.0] * 6},
        },
        _omnigen,
        positioned="text rows have positions that differ",
    )
)


def _ideogram(batch: int, length: int) -> Inputs:
    """Padding, text, picture; padding of unequal length."""
    total = 3 + length + 16
    pads = 3 * (torch.arange(batch) > 0)
    is_text = (torch.arange(total) >= pads[:, None]) & (torch.arange(total) < 3 + length)
    is_image = torch.arange(total).expand(batch, total) >= 3 + length
    positions = torch.zeros(batch, total, 3, dtype=torch.long)
    positions[:, : 3 + length] = (torch.arange(3 + length) - pads[:, None]).clamp(min=0)[..., None]
    positions[:, 3 + length :] = grid(4, 4).long() + 65536
    return {
        "hidden_states": noise("image", batch, total, 8),
        "encoder_hidden_states": noise("text", batch, total, 10),
        "position_ids": positions,
        "segment_ids": torch.where(is_text | is_image, 1, -1),
        "indicator": 3 * is_text + 2 * is_image,
    }


_IDEOGRAM: dict[str, Any] = {
    "in_channels": 8,
    "num_layers": 3,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "adaln_dim": 8,
    "llm_features_dim": 10,
    "mrope_section": (2, 2, 2),
}
add(
    Specimen(
        "ideogram4",
        "Ideogram4Transformer2DModel",
        _IDEOGRAM,
        _ideogram,
        positioned="text rows have positions that differ",
        drawn=16,
    )
)
add(
    Specimen(
        "ernie-image",
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 24,
            "num_attention_heads": 2,
            "num_layers": 3,
            "ffn_hidden_size": 32,
            "in_channels": 8,
            "out_channels": 8,
            "text_in_dim": 10,
            "rope_axes_dim": (4, 4, 4),
        },
        lambda batch, length: {
            "hidden_states": noise("image", batch, 8, 4, 4),
            "text_bth": text(batch, length, 10),
            "text_lens": length - torch.arange(batch),
        },
        text="text_bth",
        mask=lambda batch, length, valid: {"text_lens": torch.full((batch,), valid)},
        positioned="text rows have positions that differ",
    )
)


def _fibo2(batch: int, length: int) -> Inputs:
    """One text for each bundle of layers, and a picture to read."""
    return {
        "hidden_states": noise("image", batch, 4, 8, 8),
        "encoder_hidden_states": torch.stack([text(batch, length, 10, f"layer {index}") for index in range(3)], dim=1),
        "context_latents": [noise("context", batch, 4, 4, 4)],
    }


_FIBO2: dict[str, Any] = {
    "in_channels": 4,
    "dim": 24,
    "n_layers": 3,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "cap_feat_dim": 10,
    "injection_layer_ids": (1, 2),
    "perceiver_num_layers": 1,
    "min_num_gist_tokens": 4,
    "max_num_gist_tokens": 8,
    "gist_step": 4,
    "gist_min_text_len": 4,
    "gist_max_text_len": 8,
    "axes_dims": (4, 4, 4),
    "axes_lens": (32, 16, 16),
}
_DISTILLED = "text is distilled into learned tokens first"
add(Specimen("fibo2", "BriaFibo2Transformer2DModel", _FIBO2, _fibo2, positioned=_DISTILLED))
add(
    Specimen(
        "fibo2-masked",
        "BriaFibo2Transformer2DModel",
        _FIBO2,
        lambda batch, length: {
            **_fibo2(batch, length),
            "encoder_attention_mask": torch.arange(length) < length - 3 * torch.arange(batch)[:, None],
        },
        positioned=_DISTILLED,
    )
)


def _qwen21(batch: int, length: int) -> Inputs:
    """Text, one slot of a picture to read (4 tokens), text, the picture to draw."""
    slots = torch.zeros(batch, length + 4, dtype=torch.bool)
    slots[:, 3] = True
    slots[:, length:] = True
    return {
        "hidden_states": noise("image", batch, 20, 8),
        "encoder_hidden_states": noise("text", batch, length, 10),
        "img_shapes": [[(1, 2, 2), (1, 4, 4)]] * batch,
        "img_mask": slots,
    }


_QWEN21: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 3,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "context_in_dim": 10,
    "mlp_ratio": 2,
    "axes_dims_rope": (4, 4, 4),
}
for _name, _causal in (("qwen-image-2.1", True), ("qwen-image-2.1-not-causal", False)):
    add(
        Specimen(
            _name,
            "QwenImage21Transformer2DModel",
            {**_QWEN21, "causal_condition": _causal},
            _qwen21,
            mask=lambda batch, length, valid: {"encoder_hidden_states_mask": ones_then_zeros(batch, length, valid)},
            positioned="text is causal, and its rows have positions that differ",
            drawn=16,
        )
    )
