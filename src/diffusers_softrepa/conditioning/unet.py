"""The conditioners of Stable Diffusion 1.x, 2.x and XL: 77 CLIP tokens without a mask.

SDXL also reads the pooled text of its second encoder, and six time ids: original size, crop corner and target size in
pixels. Training images count as uncropped, as in sampling: both sizes are (H, W), and the corner is (0, 0).
"""

from abc import ABC
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .base import Conditioner
from .conditions import Conditions


class _UNetConditioner(Conditioner, ABC):
    """Base class of the UNet conditioners."""

    family = "unet"

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        if pipeline.unet.config.time_cond_proj_dim is not None:
            raise ValueError(
                "training needs a UNet that predicts noise, but this one has a time_cond_proj_dim: it is distilled "
                "for few steps (LCM); train on the model it was distilled from and load the adapter into this one"
            )

    @cached_property
    def latent_channels(self) -> int:
        return self.pipeline.unet.config.in_channels

    @cached_property
    def latent_multiple(self) -> int:
        return 1


class StableDiffusionConditioner(_UNetConditioner):
    """Conditioner of `StableDiffusionPipeline`. Its conditions are `prompt_embeds` (n, 77, D)."""

    pipelines = ("StableDiffusionPipeline",)
    text_components = ("tokenizer", "text_encoder")

    def _encode(self, captions: list[str], device: torch.device) -> Conditions:
        prompt_embeds, _ = self.pipeline.encode_prompt(captions, device, 1, do_classifier_free_guidance=False)
        return {"prompt_embeds": prompt_embeds}

    def _denoise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        return self.pipeline.unet(
            latents, timestep, encoder_hidden_states=conditions["prompt_embeds"], return_dict=False
        )[0]


class StableDiffusionXLConditioner(_UNetConditioner):
    """Conditioner of `StableDiffusionXLPipeline`.

    Its conditions are `prompt_embeds` (n, 77, D) and `pooled_prompt_embeds` (n, P).
    """

    pipelines = ("StableDiffusionXLPipeline",)
    text_components = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")

    def _encode(self, captions: list[str], device: torch.device) -> Conditions:
        prompt_embeds, _, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
            captions, device=device, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    def encode_negative_prompts(self, prompts: Sequence[str] | None = None) -> Conditions:
        encoded = super().encode_negative_prompts(prompts)
        if prompts is not None or not self.pipeline.config.force_zeros_for_empty_prompt:
            return encoded
        return {name: torch.zeros_like(value) for name, value in encoded.items()}

    def _denoise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        pooled = conditions["pooled_prompt_embeds"]
        return self.pipeline.unet(
            latents,
            timestep,
            encoder_hidden_states=conditions["prompt_embeds"],
            added_cond_kwargs={"text_embeds": pooled, "time_ids": self._time_ids(latents, pooled.shape[1])},
            return_dict=False,
        )[0]

    def _time_ids(self, latents: Tensor, pooled_width: int) -> Tensor:
        size = tuple(side * self.pipeline.vae_scale_factor for side in latents.shape[2:])
        time_ids = self.pipeline._get_add_time_ids(
            size, (0, 0), size, dtype=latents.dtype, text_encoder_projection_dim=pooled_width
        )
        return time_ids.to(latents.device).repeat(len(latents), 1)  # (n, 6)
