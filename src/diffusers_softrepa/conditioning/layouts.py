"""Base classes for the two layouts of latents: patches cut by the transformer, or rows packed by the pipeline."""

from abc import ABC
from functools import cached_property

from .base import Conditioner

PATCH = 2


class PatchingConditioner(Conditioner, ABC):
    """Conditioner of a transformer that reads latents (n, C, h, w) and cuts them into patches itself."""

    @cached_property
    def latent_channels(self) -> int:
        return self.pipeline.transformer.config.in_channels

    @cached_property
    def latent_multiple(self) -> int:
        return self.pipeline.transformer.config.patch_size


class PackedConditioner(Conditioner, ABC):
    """Conditioner of a transformer that reads latents as rows (n, h w / 4, 4C), packed from 2 x 2 patches."""

    @cached_property
    def latent_channels(self) -> int:
        return self.pipeline.transformer.config.in_channels // PATCH**2

    @cached_property
    def latent_multiple(self) -> int:
        return PATCH
