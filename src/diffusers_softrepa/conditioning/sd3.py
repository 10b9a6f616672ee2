"""The conditioner of Stable Diffusion 3 and 3.5: 77 tokens of two CLIPs, then up to 512 of T5, without a mask.

If the pipeline has no T5 encoder, the T5 tokens are zeros, as in sampling.

Source: SoftREPA, arXiv 2503.08250, trains with 512 T5 tokens. diffusers samples with 256 by default.
"""

from typing import Any

import torch
from torch import Tensor

from .conditions import Conditions
from .layouts import PatchingConditioner


class StableDiffusion3Conditioner(PatchingConditioner):
    """Conditioner of `StableDiffusion3Pipeline`.

    Its conditions are `prompt_embeds` (n, 77 + T5 tokens, D), `pooled_prompt_embeds` (n, P).

    Attributes:
        max_sequence_length: Number of T5 tokens per caption, at most the limit of the tokenizer.
    """

    family = "sd3"
    pipelines = ("StableDiffusion3Pipeline",)
    text_components = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")

    def __init__(self, pipeline: Any, *, max_sequence_length: int = 512) -> None:
        super().__init__(pipeline)
        self.max_sequence_length = max_sequence_length

    def _encode(self, captions: list[str], device: torch.device) -> Conditions:
        length, tokenizer = self.max_sequence_length, self.pipeline.tokenizer_3
        prompt_embeds, _, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
            captions,
            None,
            None,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=length if tokenizer is None else min(length, tokenizer.model_max_length),
        )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    def _denoise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        return self.pipeline.transformer(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=conditions["prompt_embeds"],
            pooled_projections=conditions["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
