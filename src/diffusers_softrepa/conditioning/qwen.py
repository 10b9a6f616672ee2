"""The conditioner of Qwen-Image: up to 512 tokens of a vision language model with a mask, and packed latents.

The VAE encodes videos; an image is a video of one frame. The timestep is in 0..1. Captions are padded to one length,
so that rows of different calls can be concatenated. Each denoiser call cuts them to the longest caption of the call,
as in sampling.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .conditions import Conditions, padded, unpadded
from .latents import denormalised, normalised, vae_latents, vae_pixels
from .layouts import PATCH, PackedConditioner


class QwenImageConditioner(PackedConditioner):
    """Conditioner of `QwenImagePipeline`.

    Its conditions are `prompt_embeds` (n, tokens, D), `prompt_mask` (n, tokens) bool.

    Attributes:
        max_sequence_length: Number of text tokens per caption, at most the limit of the pipeline.
    """

    family = "qwen-image"
    pipelines = ("QwenImagePipeline",)
    text_components = ("tokenizer", "text_encoder")
    sigmas_from_one = True

    def __init__(self, pipeline: Any, *, max_sequence_length: int = 512) -> None:
        super().__init__(pipeline)
        self.max_sequence_length = max_sequence_length

    @property
    def _vae_channels(self) -> int:
        return self.pipeline.vae.config.z_dim

    def sampling(self, guidance_scale: float | None = None) -> dict[str, Any]:
        return {} if guidance_scale is None else {"true_cfg_scale": guidance_scale, "negative_prompt": " "}

    def encode_negative_prompts(self, prompts: Sequence[str] | None = None) -> Conditions:
        return self.encode_captions([" "] if prompts is None else prompts)

    def _encode(self, captions: list[str], device: torch.device) -> Conditions:
        length = min(self.max_sequence_length, self.pipeline.tokenizer_max_length)
        prompt_embeds, mask = self.pipeline.encode_prompt(captions, device=device, max_sequence_length=length)
        if mask is None:
            mask = prompt_embeds.new_ones(prompt_embeds.shape[:2])
        return padded(unpadded(prompt_embeds, mask.bool()), length)

    def _encode_pixels(self, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        vae = self.pipeline.vae
        return normalised(vae_latents(vae, pixels.unsqueeze(2), generator).squeeze(2), vae.config)

    def _decode_latents(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        return vae_pixels(vae, denormalised(latents, vae.config).unsqueeze(2)).squeeze(2)

    def _denoise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        pipe, mask = self.pipeline, conditions["prompt_mask"]
        batch, channels, height, width = latents.shape
        longest = int(mask.sum(1).max())
        packed = pipe.transformer(
            hidden_states=pipe._pack_latents(latents.contiguous(), batch, channels, height, width),  # (n, N, 4C)
            timestep=timestep,
            encoder_hidden_states=conditions["prompt_embeds"][:, :longest],
            encoder_hidden_states_mask=None if mask[:, :longest].all() else mask[:, :longest],
            img_shapes=[[(1, height // PATCH, width // PATCH)]] * batch,
            return_dict=False,
        )[0]
        scale = pipe.vae_scale_factor
        return pipe._unpack_latents(packed, height * scale, width * scale, scale).squeeze(2)
