"""The two ways in which transformers take latents: cut into patches by themselves, or packed by their pipeline."""

from abc import ABC
from functools import cached_property

from .base import Conditioner

PATCH = 2


class PatchingConditioner(Conditioner, ABC):
    """Of a transformer that reads latents (n, C, h, w) and cuts them into patches of its config's size."""

    @cached_property
    def latent_channels(self) -> int:
        return self.pipeline.transformer.config.in_channels

    @cached_property
    def latent_multiple(self) -> int:
        return self.pipeline.transformer.config.patch_size


class PackedConditioner(Conditioner, ABC):
    """Of a transformer that reads rows (n, h w / 4, 4C), which its pipeline packs 2 x 2 from latents."""

    @cached_property
    def latent_channels(self) -> int:
        return self.pipeline.transformer.config.in_channels // PATCH**2

    @cached_property
    def latent_multiple(self) -> int:
        return PATCH
