"""The conditioner of FLUX.1: up to 512 T5 tokens without a mask, pooled CLIP text, and packed latents.

The timestep is in 0..1. Guidance-distilled models (dev) get a guidance scale, 3.5 in sampling. Other models (schnell,
which samples with 256 text tokens) get none. Latents are packed as rows of 2 x 2 patches.
"""

from typing import Any

import torch
from torch import Tensor

from .conditions import Conditions
from .layouts import PATCH, PackedConditioner


class FluxConditioner(PackedConditioner):
    """Conditioner of `FluxPipeline`.

    Its conditions are `prompt_embeds` (n, T5 tokens, D), `pooled_prompt_embeds` (n, P).

    Attributes:
        max_sequence_length: Number of T5 tokens per caption, at most the limit of the tokenizer.
        guidance_scale: Guidance scale that is passed to guidance-distilled denoisers. Others ignore it.
    """

    family = "flux"
    pipelines = ("FluxPipeline",)
    text_components = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
    sigmas_from_one = True

    def __init__(self, pipeline: Any, *, max_sequence_length: int = 512, guidance_scale: float = 3.5) -> None:
        super().__init__(pipeline)
        self.max_sequence_length = max_sequence_length
        self.guidance_scale = guidance_scale

    def _encode(self, captions: list[str], device: torch.device) -> Conditions:
        prompt_embeds, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
            captions,
            None,  # prompt_2: the same captions
            device=device,
            max_sequence_length=min(self.max_sequence_length, self.pipeline.tokenizer_2.model_max_length),
        )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    def _denoise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        pipe, text = self.pipeline, conditions["prompt_embeds"]
        batch, channels, height, width = latents.shape
        rows, columns = height // PATCH, width // PATCH
        guided, scale = pipe.transformer.config.guidance_embeds, pipe.vae_scale_factor
        packed = pipe.transformer(
            hidden_states=pipe._pack_latents(latents.contiguous(), batch, channels, height, width),  # (n, N, 4C)
            timestep=timestep,
            guidance=torch.full_like(timestep, self.guidance_scale) if guided else None,
            pooled_projections=conditions["pooled_prompt_embeds"],
            encoder_hidden_states=text,
            txt_ids=text.new_zeros(text.shape[1], 3),
            img_ids=pipe._prepare_latent_image_ids(batch, rows, columns, text.device, text.dtype),  # (N, 3)
            return_dict=False,
        )[0]
        return pipe._unpack_latents(packed, height * scale, width * scale, scale)
