"""The conditioner of Sana: 300 Gemma tokens with a mask, and latents of a deep-compression autoencoder.

Captions are encoded after the instruction that the pipeline puts before prompts in sampling. The autoencoder is
deterministic, so it has no posterior to sample from.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..compat import get_module_execution_device
from .conditions import Conditions
from .latents import normalised
from .layouts import PatchingConditioner


class SanaConditioner(PatchingConditioner):
    """Conditioner of `SanaPipeline`.

    Its conditions are `prompt_embeds` (n, tokens, D), `prompt_mask` (n, tokens) of 0 and 1.

    Attributes:
        max_sequence_length: Number of text tokens per caption, without those of the instruction.
    """

    family = "sana"
    pipelines = ("SanaPipeline",)
    text_components = ("tokenizer", "text_encoder")

    def __init__(self, pipeline: Any, *, max_sequence_length: int = 300) -> None:
        super().__init__(pipeline)
        if pipeline.transformer.config.guidance_embeds:
            raise ValueError(
                "training needs a Sana model trained with flow matching, but this one has guidance_embeds: it is "
                "distilled for few steps (Sana-Sprint); train on the model it was distilled from"
            )
        self.max_sequence_length = max_sequence_length

    def sampling(self, guidance_scale: float | None = None) -> dict[str, Any]:
        return super().sampling(guidance_scale) | {"use_resolution_binning": False}

    def encode_negative_prompts(self, prompts: Sequence[str] | None = None) -> Conditions:
        """Encodes negative prompts without the instruction, as sampling does.

        Args:
            prompts: At least one negative prompt. Defaults to the empty prompt.
        """
        prompts = [""] if prompts is None else list(prompts)
        self._check_present(self.text_components, "encoding prompts")
        with torch.no_grad():
            *_, prompt_embeds, prompt_mask = self.pipeline.encode_prompt(
                prompts,
                negative_prompt=prompts,
                device=get_module_execution_device(self.pipeline.text_encoder),
                max_sequence_length=self.max_sequence_length,
            )
        return {"prompt_embeds": prompt_embeds, "prompt_mask": prompt_mask}

    def _encode(self, captions: list[str], device: torch.device) -> Conditions:
        settings = inspect.signature(type(self.pipeline).__call__).parameters
        prompt_embeds, prompt_mask, *_ = self.pipeline.encode_prompt(
            captions,
            do_classifier_free_guidance=False,
            device=device,
            max_sequence_length=self.max_sequence_length,
            complex_human_instruction=settings["complex_human_instruction"].default,
        )
        return {"prompt_embeds": prompt_embeds, "prompt_mask": prompt_mask}

    def _encode_pixels(self, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        vae = self.pipeline.vae
        latents = vae.encode(pixels.to(get_module_execution_device(vae), vae.dtype)).latent
        return normalised(latents.float(), vae.config)

    def _denoise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        prediction = self.pipeline.transformer(
            latents,
            encoder_hidden_states=conditions["prompt_embeds"],
            encoder_attention_mask=conditions["prompt_mask"],
            timestep=timestep,
            return_dict=False,
        )[0]
        return prediction[:, : latents.shape[1]]  # further channels are a learned variance
