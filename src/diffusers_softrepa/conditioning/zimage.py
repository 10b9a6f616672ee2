"""Z-Image: up to 512 tokens of a language model, each caption at its own length.

Its clock runs backwards, 0 for noise and 1 for the image, and it predicts x0 - n. It takes lists of images and texts
and aligns them itself.
"""

from typing import Any

import torch
from torch import Tensor

from .base import Conditioner
from .conditions import Conditions, padded, unpadded

_PATCH = 2


class ZImageConditioner(Conditioner):
    """Conditions: `prompt_embeds` (n, tokens, D), `prompt_mask` (n, tokens) bool.

    Attributes:
        max_sequence_length: Most text tokens per caption, the chat template's among them.
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
