"""The conditioner of FLUX.2 dev and klein: 512 language-model tokens without a mask, and packed latents.

The VAE has no scaling factor. Its latents are arranged as 2 x 2 patches of 4C channels and normalised by the running
statistics of its batch norm. The timestep is in 0..1. Guidance-distilled models (dev) get a guidance scale, 4 in
sampling. Other models (klein) get none.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import batch_norm

from .conditions import Conditions
from .latents import vae_latents, vae_pixels
from .layouts import PackedConditioner


class Flux2Conditioner(PackedConditioner):
    """Conditioner of `Flux2Pipeline` and `Flux2KleinPipeline`.

    Its conditions are `prompt_embeds` (n, tokens, D).

    Attributes:
        max_sequence_length: Number of text tokens per caption, including those of the chat template.
        guidance_scale: Guidance scale that is passed to guidance-distilled denoisers. Others ignore it.
    """

    family = "flux2"
    pipelines = ("Flux2Pipeline", "Flux2KleinPipeline")
    text_components = ("tokenizer", "text_encoder")
    sigmas_from_one = True

    def __init__(self, pipeline: Any, *, max_sequence_length: int = 512, guidance_scale: float = 4.0) -> None:
        super().__init__(pipeline)
        self.max_sequence_length = max_sequence_length
        self.guidance_scale = guidance_scale

    def _encode(self, captions: list[str], device: torch.device) -> Conditions:
        prompt_embeds, _ = self.pipeline.encode_prompt(
            captions, device=device, max_sequence_length=self.max_sequence_length
        )
        return {"prompt_embeds": prompt_embeds}

    def _encode_pixels(self, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        pipe, vae = self.pipeline, self.pipeline.vae
        patches = pipe._patchify_latents(vae_latents(vae, pixels, generator).contiguous())  # (n, 4C, h / 2, w / 2)
        mean, variance = vae.bn.running_mean.to(patches), vae.bn.running_var.to(patches)
        return pipe._unpatchify_latents(batch_norm(patches, mean, variance, eps=vae.config.batch_norm_eps))

    def _decode_latents(self, latents: Tensor) -> Tensor:
        pipe, vae = self.pipeline, self.pipeline.vae
        patches = pipe._patchify_latents(latents.contiguous())  # (n, 4C, h / 2, w / 2)
        mean, variance = vae.bn.running_mean.to(patches), vae.bn.running_var.to(patches)
        spread = (variance + vae.config.batch_norm_eps).sqrt()
        patches = patches * spread.view(-1, 1, 1) + mean.view(-1, 1, 1)
        return vae_pixels(vae, pipe._unpatchify_latents(patches))

    def _shift(self, sequence_length: int, num_inference_steps: int) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu  # since diffusers 0.36

        return compute_empirical_mu(sequence_length, num_inference_steps)

    def _denoise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        pipe, text = self.pipeline, conditions["prompt_embeds"]
        patches = pipe._patchify_latents(latents.contiguous())  # (n, 4C, h / 2, w / 2)
        guided = pipe.transformer.config.guidance_embeds
        packed = pipe.transformer(
            hidden_states=pipe._pack_latents(patches),  # (n, N, 4C)
            timestep=timestep,
            guidance=torch.full_like(timestep, self.guidance_scale) if guided else None,
            encoder_hidden_states=text,
            txt_ids=pipe._prepare_text_ids(text).to(text.device),  # (n, tokens, 4)
            img_ids=pipe._prepare_latent_ids(patches).to(text.device),  # (n, N, 4)
            return_dict=False,
        )[0]
        return pipe._unpatchify_latents(packed.mT.reshape(patches.shape))
