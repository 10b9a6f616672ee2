"""The conditioner of Chroma: up to 512 T5 tokens, and latents packed as rows of 2 x 2 patches.

The timestep is in 0..1. The text mask keeps one padding token. The attention mask covers text and image and holds the
numbers 0 and 1, as in sampling. Under gradient checkpointing the single blocks do not get the mask, so Chroma cannot
be trained with gradient checkpointing.
"""

from typing import Any

import torch
from torch import Tensor

from .conditions import Conditions
from .layouts import PATCH, PackedConditioner


class ChromaConditioner(PackedConditioner):
    """Conditioner of `ChromaPipeline`.

    Its conditions are `prompt_embeds` (n, tokens, D), `prompt_mask` (n, tokens) of 0 and 1, floating.

    Attributes:
        max_sequence_length: Number of T5 tokens per caption, at most the limit of the tokenizer.
    """

    family = "chroma"
    pipelines = ("ChromaPipeline",)
    text_components = ("tokenizer", "text_encoder")
    checkpoints_exactly = False
    sigmas_from_one = True

    def __init__(self, pipeline: Any, *, max_sequence_length: int = 512) -> None:
        super().__init__(pipeline)
        self.max_sequence_length = max_sequence_length

    def _encode(self, captions: list[str], device: torch.device) -> Conditions:
        prompt_embeds, _, prompt_mask, *_ = self.pipeline.encode_prompt(
            captions,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=min(self.max_sequence_length, self.pipeline.tokenizer.model_max_length),
        )
        return {"prompt_embeds": prompt_embeds, "prompt_mask": prompt_mask}

    def _denoise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        pipe, text = self.pipeline, conditions["prompt_embeds"]
        batch, channels, height, width = latents.shape
        rows, columns, scale = height // PATCH, width // PATCH, pipe.vae_scale_factor
        packed = pipe.transformer(
            hidden_states=pipe._pack_latents(latents.contiguous(), batch, channels, height, width),  # (n, N, 4C)
            timestep=timestep,
            encoder_hidden_states=text,
            txt_ids=text.new_zeros(text.shape[1], 3),
            img_ids=pipe._prepare_latent_image_ids(batch, rows, columns, text.device, text.dtype),  # (N, 3)
            attention_mask=pipe._prepare_attention_mask(
                batch, rows * columns, text.dtype, attention_mask=conditions["prompt_mask"]
            ),  # (n, tokens + N)
            return_dict=False,
        )[0]
        return pipe._unpack_latents(packed, height * scale, width * scale, scale)
