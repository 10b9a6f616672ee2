"""The zoo: denoisers with a text stream and an image stream of their own in each block, or in the first of them."""

from collections.abc import Callable
from typing import Any

import torch

from zoo import Inputs, Specimen, add, grid, keywords_too, noise, ones_then_zeros, text

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


_FLUX: dict[str, Any] = {
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
for _name, _kind, _more, _inputs in (
    ("ovis-image", "OvisImageTransformer2DModel", {"out_channels": 8}, {}),
    ("longcat-image", "LongCatImageTransformer2DModel", {"pooled_projection_dim": 10}, {}),
    ("bria", "BriaTransformer2DModel", {"pooled_projection_dim": 6}, {}),
):
    add(Specimen(_name, _kind, {**_FLUX, **_more}, _packed(**_inputs)))

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


def _fibo(batch: int, length: int) -> Inputs:
    layers = [text(batch, length, 6, f"layer {index}") for index in range(4)]
    return {**_packed()(batch, length), "text_encoder_layers": layers}


def _nested_mask(batch: int, length: int, valid: int) -> Inputs:
    return {
        "joint_attention_kwargs": {
            "attention_mask": _joint_mask(batch, length, valid)["attention_mask"][:, None, None]
        }
    }


add(
    Specimen(
        "fibo",
        "BriaFiboTransformer2DModel",
        {**_FLUX, "text_encoder_dim": 6},
        _fibo,
        mask=_nested_mask,
        leaky="text also comes in layers, which are not masked rows of encoder_hidden_states alone",
    )
)


def _flux3(batch: int, length: int) -> Inputs:
    """A picture to draw and one to read."""
    return {
        **_packed(axes=4)(batch, length),
        "image_cond_hidden_states": noise("condition", batch, 4, 8),
        "image_cond_ids": grid(2, 2, 4),
    }


add(
    Specimen(
        "flux3",
        "Flux3Transformer2DModel",
        {
            **_HEADS,
            "in_channels": 8,
            "cond_in_channels": 8,
            "num_layers": 1,
            "num_single_layers": 3,
            "joint_attention_dim": 10,
            "timestep_channels": 16,
            "axes_dims_rope": (4, 4, 2, 2),
        },
        _flux3,
        positioned="blocks of text alone mix its rows first",
    )
)


def _picture(channels: int, width: int, **more: Callable[[int], Any]) -> Any:
    """Returns the inputs of a denoiser of pictures (batch, channels, 8, 8) with text of a width."""
    return lambda batch, length: {
        "hidden_states": noise("image", batch, channels, 8, 8),
        "encoder_hidden_states": text(batch, length, width),
        **{name: value(batch) for name, value in more.items()},
    }


add(
    Specimen(
        "aura-flow",
        "AuraFlowTransformer2DModel",
        {
            **_HEADS,
            "sample_size": 8,
            "in_channels": 4,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "joint_attention_dim": 10,
            "caption_projection_dim": 24,
            "pos_embed_max_size": 64,
        },
        _picture(4, 10),
        front=8,
    )
)


def _sizes(*names: str) -> dict[str, Callable[[int], Any]]:
    return {name: lambda batch: torch.tensor([[64.0, 64.0]] * batch) for name in names}


_COGVIEW: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "text_embed_dim": 10,
    "time_embed_dim": 8,
    "condition_dim": 4,
}
_ADDED = "the class adds its 0 and 1 to the logits and masks nothing"


def _text_only_mask(batch: int, length: int, valid: int) -> Inputs:
    return {"attention_mask": ones_then_zeros(batch, length, valid, torch.float32)}


add(
    Specimen(
        "cogview3-plus",
        "CogView3PlusTransformer2DModel",
        {**_COGVIEW, "pos_embed_max_size": 8, "sample_size": 8},
        _picture(4, 10, **_sizes("original_size", "target_size", "crop_coords")),
    )
)
add(
    Specimen(
        "cogview4",
        "CogView4Transformer2DModel",
        {**_COGVIEW, "pos_embed_max_size": 8, "sample_size": 8, "rope_axes_dim": (8, 8)},
        _picture(4, 10, **_sizes("original_size", "target_size", "crop_coords")),
        mask=_text_only_mask,
        leaky=_ADDED,
    )
)
add(
    Specimen(
        "glm-image",
        "GlmImageTransformer2DModel",
        {**_COGVIEW, "prior_vq_quantizer_codebook_size": 16},
        _picture(
            4,
            10,
            prior_token_id=lambda batch: torch.arange(16).expand(batch, 16),
            prior_token_drop=lambda batch: torch.zeros(batch, 16, dtype=torch.bool),
            **_sizes("target_size", "crop_coords"),
        ),
        mask=_text_only_mask,
        leaky=_ADDED,
    )
)


def _hunyuan_mask(batch: int, length: int, valid: int) -> Inputs:
    return {"encoder_attention_mask": ones_then_zeros(batch, length, valid)}


def _hunyuan(batch: int, length: int) -> Inputs:
    return {**_picture(8, 10)(batch, length), **_hunyuan_mask(batch, length, length)}


_HUNYUAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 10,
    "rope_axes_dim": (4, 4),
}
_REFINED = "a refiner mixes the rows of text first"
_NO_KEYWORDS = "blocks are checkpointed with keywords, which the default function does not take"
add(
    Specimen(
        "hunyuan-image",
        "HunyuanImageTransformer2DModel",
        _HUNYUAN,
        _hunyuan,
        mask=_hunyuan_mask,
        positioned=_REFINED,
        checkpointing=keywords_too,
        upstream=_NO_KEYWORDS,
    )
)
add(
    Specimen(
        "hunyuan-image-glyphs",
        "HunyuanImageTransformer2DModel",
        {**_HUNYUAN, "text_embed_2_dim": 6, "guidance_embeds": True, "use_meanflow": True},
        lambda batch, length: {
            **_hunyuan(batch, length),
            "encoder_hidden_states_2": noise("glyphs", batch, 5, 6),
            "encoder_attention_mask_2": ones_then_zeros(batch, 5, 3),
            "guidance": torch.full((batch,), 3500.0),
            "timestep_r": torch.full((batch,), 250.0),
        },
        mask=_hunyuan_mask,
        positioned=_REFINED,
        checkpointing=keywords_too,
        upstream=_NO_KEYWORDS,
    )
)


def _hidream(batch: int, length: int) -> Inputs:
    return {
        "hidden_states": noise("image", batch, 4, 8, 8),
        "encoder_hidden_states_t5": text(batch, length, 10),
        "encoder_hidden_states_llama3": torch.stack([text(batch, length, 6, f"layer {index}") for index in range(4)]),
        "pooled_embeds": noise("pooled", batch, 6),
    }


def _hidream_masked(batch: int, length: int) -> Inputs:
    """A picture that is not square: patches in a row, padded, with a mask."""
    ids = torch.zeros(batch, 16, 3)
    ids[:, :8] = grid(2, 4)
    return {
        **_hidream(batch, length),
        "hidden_states": noise("patches", batch, 16, 16),
        "img_ids": ids,
        "img_sizes": torch.tensor([[2, 4]] * batch),
        "hidden_states_masks": ones_then_zeros(batch, 16, 8, torch.float32),
    }


_HIDREAM: dict[str, Any] = {
    **_HEADS,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "caption_channels": [10, 6],
    "text_emb_dim": 6,
    "axes_dims_rope": (4, 4, 4),
    "max_resolution": (8, 8),
    "llama_layers": [0, 1, 2, 3],
}
_REBUILT = "text is put together anew for each block"
for _name, _inputs in (("hidream", _hidream), ("hidream-masked", _hidream_masked)):
    add(
        Specimen(
            _name,
            "HiDreamImageTransformer2DModel",
            _HIDREAM,
            _inputs,
            text="encoder_hidden_states_t5",
            positioned=_REBUILT,
        )
    )


_JOY: dict[str, Any] = {
    "in_channels": 4,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "text_dim": 10,
    "num_layers": 3,
    "rope_dim_list": [4, 4, 4],
}


def _joy(batch: int, length: int) -> Inputs:
    return {"hidden_states": noise("image", batch, 4, 1, 8, 8), "encoder_hidden_states": text(batch, length, 10)}


add(Specimen("joyimage-edit", "JoyImageEditTransformer3DModel", _JOY, _joy))
add(
    Specimen(
        "joyimage-edit-text-positions",
        "JoyImageEditTransformer3DModel",
        {**_JOY, "rope_type": "mrope"},
        _joy,
        positioned=_POSITIONS,
    )
)
add(
    Specimen(
        "joyimage-edit-plus",
        "JoyImageEditPlusTransformer3DModel",
        _JOY,
        lambda batch, length: {
            "hidden_states": noise("patches", batch, 20, 4, 1, 2, 2),
            "encoder_hidden_states": text(batch, length, 10),
            "shape_list": [[(1, 4, 4), (1, 2, 2)], *[[(1, 4, 4)]] * (batch - 1)],
        },
        mask=lambda batch, length, valid: {
            "encoder_hidden_states_mask": ones_then_zeros(batch, length, valid, torch.float32)
        },
    )
)
