"""The zoo: Wan and what was made from it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from zoo import LENGTH, Inputs, K, Specimen, add, keywords_too, noise, text

FRAMES, PATCHES = 2, 8  # of a video (batch, channels, 2, 4, 4) in patches of 1 x 2 x 2
_WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 10,
    "freq_dim": 8,
    "ffn_dim": 32,
    "num_layers": 3,
    "rope_max_seq_len": 16,
}
_SEES = {**_WAN, "added_kv_proj_dim": 24, "image_dim": 6}
_COUNTED = "text is padded to 512 rows, which are counted"


def _video(batch: int, length: int) -> Inputs:
    return {
        "hidden_states": noise("video", batch, 4, FRAMES, 4, 4),
        "encoder_hidden_states": text(batch, length, 10),
    }


def _padded(batch: int, length: int) -> Tensor:
    return functional.pad(text(batch, length, 10), (0, 0, 0, 512 - length))


def _video_and_image(batch: int, length: int) -> Inputs:
    """Text as the pipeline pads it, and 5 rows of an image."""
    return {
        **_video(batch, length),
        "encoder_hidden_states": _padded(batch, length),
        "encoder_hidden_states_image": noise("seen", batch, 5, 6),
    }


add(Specimen("wan", "WanTransformer3DModel", _WAN, _video))
add(Specimen("wan-timestep-of-each-token", "WanTransformer3DModel", _WAN, _video, levels=PATCHES))
add(Specimen("wan-image", "WanTransformer3DModel", _SEES, _video_and_image, positioned=_COUNTED))
add(Specimen("chrono-edit", "ChronoEditTransformer3DModel", _SEES, _video_and_image, positioned=_COUNTED))


def _vace(inputs: Any) -> Any:
    return lambda batch, length: {
        **inputs(batch, length),
        "control_hidden_states": noise("control", batch, 6, FRAMES, 4, 4),
        "control_hidden_states_scale": torch.ones(2),
    }


_VACE = {"vace_layers": [0, 2], "vace_in_channels": 6}
add(Specimen("wan-vace", "WanVACETransformer3DModel", {**_WAN, **_VACE}, _vace(_video)))
add(
    Specimen(
        "wan-vace-image",
        "WanVACETransformer3DModel",
        {**_SEES, **_VACE},
        _vace(_video_and_image),
        positioned=_COUNTED,
    )
)
add(
    Specimen(
        "wan-animate",
        "WanAnimateTransformer3DModel",
        {
            **_SEES,
            "in_channels": 8,
            "latent_channels": 2,
            "motion_encoder_channel_sizes": {"4": 6},
            "motion_encoder_size": 4,
            "motion_style_dim": 6,
            "motion_dim": 3,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 8,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 3,
        },
        lambda batch, length: {
            **_video_and_image(batch, length),
            "hidden_states": noise("video", batch, 8, FRAMES, 4, 4),
            "pose_hidden_states": noise("pose", batch, 2, FRAMES - 1, 4, 4),
            "face_pixel_values": noise("face", batch, 3, 4, 4, 4),
        },
        positioned=_COUNTED,
    )
)


def _animate2(batch: int, length: int) -> Inputs:
    """The pass over the reference, which needs no compiler: lists of samples."""
    module = pytest.importorskip("diffusers.models.transformers.transformer_wan_animate_2")

    return {
        "hidden_states": list(noise("video", batch, 2, FRAMES, 4, 4)),
        "condition_latents": list(noise("condition", batch, 2, FRAMES, 4, 4)),
        "encoder_hidden_states": list(text(batch, length, 10)),
        "encoder_hidden_states_image": noise("seen", batch, 5, 1280),
        "kv_cache": module.WanAnimate2KVCache(3),
        "kv_cache_mode": "extract",
        "seq_len": PATCHES,
        "offset_grid_sizes": torch.tensor([[FRAMES, 2, 2]] * batch),
    }


add(
    Specimen(
        "wan-animate-2",
        "WanAnimate2Transformer3DModel",
        {
            "text_len": LENGTH + K,
            "in_dim": 4,
            "dim": 24,
            "ffn_dim": 32,
            "freq_dim": 8,
            "text_dim": 10,
            "out_dim": 4,
            "num_heads": 2,
            "num_layers": 3,
        },
        _animate2,
        positioned="text is padded to a fixed number of rows",
        checkpointing=keywords_too,
        upstream="blocks are checkpointed with keywords, which the default function does not take",
    )
)
add(Specimen("skyreels-v2", "SkyReelsV2Transformer3DModel", _WAN, _video))
add(
    Specimen(
        "skyreels-v2-diffusion-forcing",
        "SkyReelsV2Transformer3DModel",
        {**_WAN, "num_frame_per_block": 2},
        lambda batch, length: {**_video(batch, length), "enable_diffusion_forcing": True},
        levels=FRAMES,
    )
)
add(Specimen("skyreels-v2-image", "SkyReelsV2Transformer3DModel", _SEES, _video_and_image, positioned=_COUNTED))


def _anyflow(batch: int, length: int) -> Inputs:
    """Frames come before channels."""
    return {
        "hidden_states": noise("video", batch, FRAMES, 4, 4, 4),
        "encoder_hidden_states": text(batch, length, 10),
        "r_timestep": torch.full((batch, FRAMES), 100.0),
    }


def _anyflow_with_image(batch: int, length: int) -> Inputs:
    return {**_anyflow(batch, length), "encoder_hidden_states_image": noise("seen", batch, 5, 6)}


add(Specimen("anyflow", "AnyFlowTransformer3DModel", _WAN, _anyflow, levels=FRAMES))
add(
    Specimen(
        "anyflow-image",
        "AnyFlowTransformer3DModel",
        {**_WAN, "image_dim": 6},
        _anyflow_with_image,
        levels=FRAMES,
        front=5,
    )
)


class _DenseAttention:
    """Attention between patches with a mask of numbers: flex attention has no backward pass on a CPU."""

    def __call__(self, attn: Any, hidden_states: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        query, key, value = (
            rows.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for rows in (attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))
        )
        seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        return attn.to_out[0](seen.transpose(1, 2).flatten(2))


def _without_flex(denoiser: Any) -> None:
    for block in denoiser.blocks:
        block.attn1.set_processor(_DenseAttention())


add(
    Specimen(
        "anyflow-far",
        "AnyFlowFARTransformer3DModel",
        {**_WAN, "compressed_patch_size": (1, 4, 4)},
        lambda batch, length: {
            **_anyflow(batch, length),
            "chunk_partition": [1, 1],
            "attention_mask": torch.ones(FRAMES, FRAMES, dtype=torch.bool)
            .tril()
            .repeat_interleave(4, 0)
            .repeat_interleave(4, 1),
        },
        levels=FRAMES,
        prepare=_without_flex,
    )
)
_HELIOS = {**_WAN, "rope_dim": (4, 4, 4)}
del _HELIOS["rope_max_seq_len"]


def _helios(batch: int, length: int) -> Inputs:
    """Three lengths of history."""
    return {
        **_video(batch, length),
        "indices_hidden_states": torch.arange(7, 7 + FRAMES).expand(batch, FRAMES),
        "indices_latents_history_short": torch.arange(6, 7).expand(batch, 1),
        "indices_latents_history_mid": torch.arange(4, 6).expand(batch, 2),
        "indices_latents_history_long": torch.arange(4).expand(batch, 4),
        "latents_history_short": noise("short", batch, 4, 1, 4, 4),
        "latents_history_mid": noise("mid", batch, 4, 2, 4, 4),
        "latents_history_long": noise("long", batch, 4, 4, 4, 4),
    }


add(Specimen("helios", "HeliosTransformer3DModel", _HELIOS, _helios))
add(
    Specimen(
        "helios-amplified",
        "HeliosTransformer3DModel",
        {**_HELIOS, "is_amplify_history": True, "guidance_cross_attn": False, "zero_history_timestep": False},
        _helios,
    )
)
