"""The zoo: the other denoisers of videos."""

from typing import Any

import torch
from torch import Tensor

from zoo import Inputs, Specimen, add, noise, ones_then_zeros, text

_HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12}


def _video(channels: int = 4, width: int = 10, **more: Any) -> Any:
    """Returns the inputs of a denoiser of videos (batch, channels, 2, 4, 4) with text of a width."""
    return lambda batch, length: {
        "hidden_states": noise("video", batch, channels, 2, 4, 4),
        "encoder_hidden_states": text(batch, length, width),
        **{name: value(batch) if callable(value) else value for name, value in more.items()},
    }


def _mask(batch: int, length: int, valid: int) -> Inputs:
    return {"encoder_attention_mask": ones_then_zeros(batch, length, valid, torch.float32)}


def _with_mask(inputs: Any) -> Any:
    """Returns inputs with a mask in which everything counts, for classes that must have one."""
    return lambda batch, length: {**inputs(batch, length), **_mask(batch, length, length)}


def _rotary(length: int, dim: int) -> tuple[Tensor, Tensor]:
    """Returns rotary rows of a video."""
    angles = torch.arange(length)[:, None] / 5.0 ** torch.arange(dim // 2)
    return angles.cos().repeat_interleave(2, dim=1), angles.sin().repeat_interleave(2, dim=1)


_LTX: dict[str, Any] = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 24,
    "num_layers": 3,
    "caption_channels": 10,
}


def _packed(batch: int, length: int) -> Inputs:
    """A video of 2 x 2 x 2 rows."""
    return {
        "hidden_states": noise("video", batch, 8, 4),
        "encoder_hidden_states": text(batch, length, 10),
        "num_frames": 2,
        "height": 2,
        "width": 2,
    }


for _name, _levels in (("ltx", None), ("ltx-timestep-of-each-token", 8)):
    add(Specimen(_name, "LTXVideoTransformer3DModel", _LTX, _with_mask(_packed), mask=_mask, levels=_levels))


def _with_sound(width: int, sound_width: int) -> Any:
    return lambda batch, length: {
        **_packed(batch, length),
        "audio_hidden_states": noise("sound", batch, 4, 6),
        "audio_num_frames": 4,
        "encoder_hidden_states": text(batch, length, width),
        "audio_encoder_hidden_states": text(batch, length, sound_width, "text of the sound"),
        "sigma": torch.full((batch,), 500.0),
    }


def _two_masks(batch: int, length: int, valid: int) -> Inputs:
    mask = ones_then_zeros(batch, length, valid, torch.float32)
    return {"encoder_attention_mask": mask, "audio_encoder_attention_mask": mask}


_LTX2: dict[str, Any] = {
    **_LTX,
    "audio_in_channels": 6,
    "audio_out_channels": 6,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 6,
    "audio_cross_attention_dim": 12,
}
_TWO = "a token has a part in each of two text streams"
add(
    Specimen(
        "ltx2",
        "LTX2VideoTransformer3DModel",
        _LTX2,
        _with_sound(10, 10),
        mask=_two_masks,
        positioned=_TWO,
    )
)
add(
    Specimen(
        "ltx2.3",
        "LTX2VideoTransformer3DModel",
        {
            **_LTX2,
            "cross_attn_mod": True,
            "audio_cross_attn_mod": True,
            "gated_attn": True,
            "audio_gated_attn": True,
            "use_prompt_embeddings": False,
            "perturbed_attn": True,
        },
        _with_sound(24, 12),
        mask=_two_masks,
        positioned=_TWO,
    )
)
add(
    Specimen(
        "allegro",
        "AllegroTransformer3DModel",
        {**_LTX, "sample_height": 4, "sample_width": 4, "sample_frames": 2},
        _video(image_rotary_emb=((_rotary(2, 4),) * 3, torch.cartesian_prod(*[torch.arange(2)] * 3).T[:, None])),
        mask=_mask,
    )
)
add(
    Specimen(
        "latte",
        "LatteTransformer3DModel",
        {
            **_LTX,
            "sample_size": 4,
            "patch_size": 2,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "video_length": 2,
        },
        _video(),
    )
)
add(
    Specimen(
        "sana-video",
        "SanaVideoTransformer3DModel",
        {
            **_LTX,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "rope_max_seq_len": 8,
            "sample_size": 4,
        },
        _video(),
        mask=_mask,
    )
)


def _frames(batch: int, length: int) -> Inputs:
    """Two frames of each video, with text for each."""
    return {
        "sample": noise("video", batch, 4, 2, 8, 8),
        "encoder_hidden_states": text(batch, length, 12).repeat_interleave(2, dim=0),
    }


add(
    Specimen(
        "animate-diff",
        "UNetMotionModel",
        {
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
            "norm_num_groups": 4,
            "cross_attention_dim": 12,
            "num_attention_heads": 2,
            "motion_num_attention_heads": 2,
            "motion_max_seq_length": 4,
        },
        _frames,
    )
)
_UNET3D: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}


def _whole(batch: int, length: int) -> Inputs:
    """Two frames of each video, whose text the class repeats itself."""
    return {"sample": noise("video", batch, 4, 2, 8, 8), "encoder_hidden_states": text(batch, length, 12)}


add(Specimen("unet-3d", "UNet3DConditionModel", _UNET3D, _whole, checkpoints=False))
add(
    Specimen(
        "i2vgen-xl",
        "I2VGenXLUNet",
        _UNET3D,
        lambda batch, length: {
            **_whole(batch, length),
            "fps": torch.full((batch,), 8),
            "image_latents": noise("image", batch, 4, 2, 8, 8),
            "image_embeddings": noise("seen", batch, 12),
        },
        checkpoints=False,
    )
)


def _kandinsky6(sound: bool) -> Any:
    def inputs(batch: int, length: int) -> Inputs:
        return {
            "hidden_states": noise("video", batch, 2, 4, 4, 9),
            "encoder_hidden_states": text(batch, length, 10),
            "pooled_projections": noise("pooled", batch, 6),
            **({"audio_hidden_states": noise("sound", batch, 3, 5)} if sound else {}),
        }

    return inputs


_KANDINSKY6 = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 10,
    "in_text_dim2": 6,
    "time_dim": 8,
    "model_dim": 24,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 3,
    "axes_dims": (4, 4, 4),
    "in_audio_dim": 5,
    "out_audio_dim": 5,
    "model_dim_a": 12,
    "text_token_padding": True,
    "ca_rope": True,
    "cross_gates": True,
    "fix_modulation": True,
}
for _name, _sound in (("kandinsky6", True), ("kandinsky6-silent", False)):
    add(
        Specimen(
            _name,
            "Kandinsky6Transformer3DModel",
            _KANDINSKY6,
            _kandinsky6(_sound),
            mask=lambda batch, length, valid: {"encoder_attention_mask": ones_then_zeros(batch, length, valid)},
            positioned=_TWO,
        )
    )
add(
    Specimen(
        "kandinsky5-video",
        "Kandinsky5Transformer3DModel",
        {
            "in_visual_dim": 4,
            "in_text_dim": 10,
            "in_text_dim2": 6,
            "time_dim": 8,
            "out_visual_dim": 4,
            "model_dim": 24,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 3,
            "axes_dims": (4, 4, 4),
            "visual_cond": True,
        },
        lambda batch, length: {
            "hidden_states": noise("video", batch, 2, 4, 4, 9),
            "encoder_hidden_states": text(batch, length, 10),
            "pooled_projections": noise("pooled", batch, 6),
            "visual_rope_pos": [torch.arange(2), torch.arange(2), torch.arange(2)],
            "text_rope_pos": torch.arange(length),
        },
        positioned="blocks of text alone mix its rows first",
    )
)

_HUNYUAN: dict[str, Any] = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 10,
    "pooled_projection_dim": 6,
    "rope_axes_dim": (4, 4, 4),
}
_POSITIONS = "text rows have positions that differ"
_REFINED = "a refiner mixes the rows of text first"
_POOLED: dict[str, Any] = {
    "pooled_projections": lambda batch: noise("pooled", batch, 6),
    "guidance": lambda batch: torch.full((batch,), 6000.0),
}
for _name, _more in (
    ("hunyuan-video", {}),
    ("hunyuan-video-image", {"image_condition_type": "token_replace"}),
):
    add(
        Specimen(
            _name,
            "HunyuanVideoTransformer3DModel",
            {**_HUNYUAN, **_more},
            _with_mask(_video(**_POOLED)),
            mask=_mask,
            positioned=_REFINED,
        )
    )
add(
    Specimen(
        "hunyuan-video-framepack",
        "HunyuanVideoFramepackTransformer3DModel",
        {**_HUNYUAN, "has_image_proj": True, "image_proj_dim": 6, "has_clean_x_embedder": True},
        _with_mask(
            _video(
                **_POOLED,
                image_embeds=lambda batch: noise("seen", batch, 3, 6),
                indices_latents=torch.arange(7, 9),
                latents_clean=lambda batch: noise("clean", batch, 4, 1, 4, 4),
                indices_latents_clean=torch.arange(1),
                latents_history_2x=lambda batch: noise("2x", batch, 4, 2, 4, 4),
                indices_latents_history_2x=torch.arange(1, 3),
                latents_history_4x=lambda batch: noise("4x", batch, 4, 4, 4, 4),
                indices_latents_history_4x=torch.arange(3, 7),
            )
        ),
        mask=_mask,
        positioned=_REFINED,
    )
)
_HUNYUAN_15 = {
    **{key: value for key, value in _HUNYUAN.items() if key not in ("pooled_projection_dim", "num_single_layers")},
    "patch_size": 2,
    "text_embed_2_dim": 6,
    "image_embed_dim": 5,
}
for _name, _image in (("hunyuan-video-1.5", 0.0), ("hunyuan-video-1.5-image", 1.0)):
    add(
        Specimen(
            _name,
            "HunyuanVideo15Transformer3DModel",
            _HUNYUAN_15,
            _with_mask(
                _video(
                    image_embeds=lambda batch, factor=_image: factor * noise("seen", batch, 3, 5),
                    encoder_hidden_states_2=lambda batch: noise("glyphs", batch, 4, 6),
                    encoder_attention_mask_2=lambda batch: ones_then_zeros(batch, 4, 2, torch.float32),
                )
            ),
            mask=_mask,
            positioned=_REFINED,
        )
    )


def _cogvideox(**more: Any) -> Any:
    """Frames come before channels."""
    return lambda batch, length: {
        "hidden_states": noise("video", batch, 2, 4, 4, 4),
        "encoder_hidden_states": text(batch, length, 10),
        **{name: value(batch) if callable(value) else value for name, value in more.items()},
    }


_COGVIDEOX: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 10,
    "num_layers": 3,
    "sample_width": 4,
    "sample_height": 4,
    "sample_frames": 5,
    "max_text_seq_length": 7,
}
_TURNED = {**_COGVIDEOX, "use_rotary_positional_embeddings": True}
add(Specimen("cogvideox", "CogVideoXTransformer3DModel", _TURNED, _cogvideox(image_rotary_emb=_rotary(8, 16))))
add(
    Specimen(
        "cogvideox-2b",
        "CogVideoXTransformer3DModel",
        _COGVIDEOX,
        _cogvideox(),
        positioned="learned positions count on 7 rows of text",
    )
)
add(
    Specimen(
        "cogvideox-1.5-image",
        "CogVideoXTransformer3DModel",
        {**_TURNED, "patch_size_t": 2, "ofs_embed_dim": 8, "patch_bias": False},
        _cogvideox(image_rotary_emb=_rotary(4, 16), ofs=lambda batch: torch.full((1,), 2.0)),
    )
)
add(
    Specimen(
        "consis-id",
        "ConsisIDTransformer3DModel",
        {
            **_TURNED,
            "num_layers": 4,
            "is_train_face": True,
            "cross_attn_dim_head": 4,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 6,
            "LFE_vit_dim": 8,
            "LFE_depth": 2,
            "LFE_dim_head": 4,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 2,
            "LFE_num_querie": 2,
            "LFE_output_dim": 21,
            "LFE_num_scale": 2,
        },
        _cogvideox(
            image_rotary_emb=_rotary(8, 16),
            id_cond=lambda batch: noise("face", batch, 6),
            id_vit_hidden=lambda batch: [noise(f"face {index}", batch, 3, 8) for index in range(2)],
        ),
    )
)
add(
    Specimen(
        "easy-animate",
        "EasyAnimateTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "num_layers": 3,
            "mmdit_layers": 2,
            "time_embed_dim": 8,
            "text_embed_dim": 10,
            "text_embed_dim_t5": 6,
        },
        _video(encoder_hidden_states_t5=lambda batch: noise("t5", batch, 3, 6)),
    )
)
add(
    Specimen(
        "mochi",
        "MochiTransformer3DModel",
        {
            **_HEADS,
            "num_layers": 3,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
        },
        _with_mask(_video(width=8)),
        mask=lambda batch, length, valid: {"encoder_attention_mask": ones_then_zeros(batch, length, valid)},
        positioned="the modulation reads the text as well",
    )
)

_MOTIF: dict[str, Any] = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_single_layers": 3,
    "num_decoder_layers": 1,
    "text_embed_dim": 10,
    "image_embed_dim": 6,
    "rope_axes_dim": (4, 4, 4),
    "enable_text_cross_attention_dual": True,
    "enable_text_cross_attention_single": True,
}
add(Specimen("motif-video", "MotifVideoTransformer3DModel", _MOTIF, _video(), mask=_mask))
add(
    Specimen(
        "motif-video-image",
        "MotifVideoTransformer3DModel",
        _MOTIF,
        _video(image_embeds=lambda batch: noise("seen", batch, 3, 6)),
        mask=_mask,
        front=3,
    )
)


def _cosmos3(batch: int, length: int) -> Inputs:
    """Text and two frames of one patch, each with a timestep; there is no batch."""
    return {
        "input_ids": torch.arange(1, length + 1),
        "text_indexes": torch.arange(length),
        "position_ids": torch.arange(length + 2).expand(3, length + 2),
        "und_len": length,
        "sequence_length": length + 2,
        "vision_tokens": [noise("video", 1, 4, 2, 2, 2)],
        "vision_token_shapes": [(2, 1, 1)],
        "vision_sequence_indexes": torch.arange(length, length + 2),
        "vision_mse_loss_indexes": torch.arange(length, length + 2),
        "vision_noisy_frame_indexes": [torch.arange(2)],
    }


add(
    Specimen(
        "cosmos3",
        "Cosmos3OmniTransformer",
        {
            "head_dim": 12,
            "hidden_size": 24,
            "intermediate_size": 32,
            "latent_channel": 4,
            "patch_latent_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_hidden_layers": 3,
            "rope_axes_dim": (2, 2, 2),
            "vocab_size": 16,
            "timestep_scale": 0.001,
        },
        _cosmos3,
        text="input_ids",
        positioned=_POSITIONS,
    )
)


def _minimax(batch: int, length: int) -> Inputs:
    """Text, two rows of sound and four of video, of two timesteps."""
    rows = length + 6
    tags = torch.tensor([1] * length + [2] * 2 + [0] * 4)
    return {
        "hidden_states": noise("video", batch, 4, 8),
        "audio_hidden_states": noise("sound", batch, 2, 6),
        "encoder_hidden_states": text(batch, length, 10),
        "timestep_indices": (tags == 2).long(),
        "token_tags": tags,
        "position_ids": torch.arange(rows)[:, None].expand(rows, 3),
        "text_indices": torch.arange(length),
        "audio_indices": torch.arange(length, length + 2),
        "video_indices": torch.arange(length + 2, rows),
    }


add(
    Specimen(
        "minimax-h3",
        "MiniMaxH3Transformer3DModel",
        {
            **_HEADS,
            "hidden_size": 16,
            "num_layers": 3,
            "num_refiner_layers": 1,
            "ffn_dim": 24,
            "in_channels": 2,
            "audio_in_channels": 6,
            "text_dim": 10,
            "freq_dim": 8,
            "time_embed_hidden_dim": 8,
            "time_embed_dim": 8,
            "rope_freq_dim": 2,
        },
        _minimax,
        positioned=_REFINED,
    )
)
