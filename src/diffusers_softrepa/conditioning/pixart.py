"""The conditioners of PixArt-alpha (120 T5 tokens with a mask) and PixArt-Sigma (300).

The denoiser predicts noise and a variance, which sampling discards. PixArt-alpha at 1024 px also gets the size of the
image in pixels and its height / width.
"""

from abc import ABC
from typing import Any

import torch
from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import Tensor

from .conditions import Conditions
from .layouts import PatchingConditioner


class _PixArtConditioner(PatchingConditioner, ABC):
    """Base class of the PixArt conditioners.

    Its conditions are `prompt_embeds` (n, tokens, D), `prompt_mask` (n, tokens) of 0 and 1.

    Attributes:
        max_sequence_length: Number of T5 tokens per caption, at most the limit of the tokenizer.
    """

    family = "pixart"
    text_components = ("tokenizer", "text_encoder")

    def __init__(self, pipeline: Any, max_sequence_length: int) -> None:
        super().__init__(pipeline)
        self.max_sequence_length = max_sequence_length

    def sampling(self, guidance_scale: float | None = None) -> dict[str, Any]:
        return super().sampling(guidance_scale) | {"use_resolution_binning": False}

    def _encode(self, captions: list[str], device: torch.device) -> Conditions:
        prompt_embeds, prompt_mask, *_ = self.pipeline.encode_prompt(
            captions,
            do_classifier_free_guidance=False,
            device=device,
            clean_caption=is_bs4_available()
            and is_ftfy_available(),  # sampling sets it, and does without if these are missing
            max_sequence_length=min(self.max_sequence_length, self.pipeline.tokenizer.model_max_length),
        )
        return {"prompt_embeds": prompt_embeds, "prompt_mask": prompt_mask}

    def _denoise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        prediction = self.pipeline.transformer(
            latents,
            encoder_hidden_states=conditions["prompt_embeds"],
            encoder_attention_mask=conditions["prompt_mask"],
            timestep=timestep,
            added_cond_kwargs=self._image_size(latents),
            return_dict=False,
        )[0]
        return prediction[:, : latents.shape[1]]

    def _image_size(self, latents: Tensor) -> dict[str, Tensor | None]:
        denoiser: Any = self.denoiser
        if not denoiser.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = (side * self.pipeline.vae_scale_factor for side in latents.shape[2:])
        return {
            "resolution": latents.new_tensor([[height, width]]).expand(len(latents), 2),
            "aspect_ratio": latents.new_tensor([[height / width]]).expand(len(latents), 1),
        }


class PixArtAlphaConditioner(_PixArtConditioner):
    """Conditioner of `PixArtAlphaPipeline`, with 120 text tokens by default."""

    pipelines = ("PixArtAlphaPipeline",)

    def __init__(self, pipeline: Any, *, max_sequence_length: int = 120) -> None:
        super().__init__(pipeline, max_sequence_length)


class PixArtSigmaConditioner(_PixArtConditioner):
    """Conditioner of `PixArtSigmaPipeline`, with 300 text tokens by default."""

    pipelines = ("PixArtSigmaPipeline",)

    def __init__(self, pipeline: Any, *, max_sequence_length: int = 300) -> None:
        super().__init__(pipeline, max_sequence_length)
