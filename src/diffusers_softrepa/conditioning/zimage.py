"""The conditioner of Z-Image: up to 512 language-model tokens; the denoiser reads each caption without padding.

The timestep runs from 0 (noise) to 1 (image), and the denoiser predicts x0 - n. The denoiser takes lists of images and
texts and pads them itself.
"""

from typing import Any

import torch
from torch import Tensor

from .base import Conditioner
from .conditions import Conditions, padded, unpadded

_PATCH = 2


class ZImageConditioner(Conditioner):
    """Conditioner of `ZImagePipeline`.

    Its conditions are `prompt_embeds` (n, tokens, D), `prompt_mask` (n, tokens) bool.

    Attributes:
        max_sequence_length: Largest number of text tokens per caption, including those of the chat template.
    """

    family = "z-image"
    pipelines = ("ZImagePipeline",)
    text_components = ("tokenizer", "text_encoder")
    sigmas_from_one = True

    def __init__(self, pipeline: Any, *, max_sequence_length: int = 512) -> None:
        super().__init__(pipeline)
        self.max_sequence_length = max_sequence_length

    @property
    def latent_channels(self) -> int:
        return self.pipeline.transformer.config.in_channels

    @property
    def latent_multiple(self) -> int:
        return _PATCH

    def _encode(self, captions: list[str], device: torch.device) -> Conditions:
        texts, _ = self.pipeline.encode_prompt(
            captions,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return padded(texts, self.max_sequence_length)

    def _denoise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        images = self.pipeline.transformer(
            list(latents.unsqueeze(2).unbind()),  # n times (C, 1, h, w)
            timestep,
            unpadded(conditions["prompt_embeds"], conditions["prompt_mask"]),
            return_dict=False,
        )[0]
        return -torch.stack(images).squeeze(2)
