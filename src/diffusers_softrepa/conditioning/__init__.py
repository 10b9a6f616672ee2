"""Conditioners: how each trainable pipeline encodes images and captions and calls its denoiser.

To train another pipeline class, write a `Conditioner` for it and add it to `_CONDITIONERS`.
"""

import inspect
from typing import Any

from ..denoisers import denoiser_of
from ..families import family_of
from .base import Conditioner
from .chroma import ChromaConditioner
from .conditions import Conditions, concatenate, take
from .flux import FluxConditioner
from .flux2 import Flux2Conditioner
from .pixart import PixArtAlphaConditioner, PixArtSigmaConditioner
from .qwen import QwenImageConditioner
from .sana import SanaConditioner
from .sd3 import StableDiffusion3Conditioner
from .unet import StableDiffusionConditioner, StableDiffusionXLConditioner
from .zimage import ZImageConditioner

_CONDITIONERS: tuple[type[Conditioner], ...] = (
    StableDiffusionConditioner,
    StableDiffusionXLConditioner,
    StableDiffusion3Conditioner,
    FluxConditioner,
    Flux2Conditioner,
    QwenImageConditioner,
    ZImageConditioner,
    ChromaConditioner,
    SanaConditioner,
    PixArtAlphaConditioner,
    PixArtSigmaConditioner,
)


def conditioner_of(
    pipeline: Any, *, max_sequence_length: int | None = None, guidance_scale: float | None = None
) -> Conditioner:
    """Returns the conditioner of a pipeline.

    Args:
        pipeline: A text-to-image pipeline.
        max_sequence_length: Number of text tokens per caption, for families in which it can be chosen. Defaults to the
            published number.
        guidance_scale: Guidance scale that is passed to a guidance-distilled denoiser. Defaults to the published one.

    Raises:
        ValueError: There is no conditioner for this pipeline, a setting does not apply to it or is not positive, or
            the pipeline cannot be trained: its scheduler is missing or unsuitable, its denoiser reads more than noisy
            latents, or it is distilled.
    """
    conditioner = _conditioner_class(pipeline)
    given = {"max_sequence_length": max_sequence_length, "guidance_scale": guidance_scale}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    foreign = sorted(settings.keys() - inspect.signature(conditioner).parameters.keys())
    if foreign:
        raise ValueError(f"{type(pipeline).__name__} has no setting {', '.join(foreign)}; do not set it")
    numbers = [isinstance(value, int | float) and not isinstance(value, bool) for value in settings.values()]
    if not all(numbers) or not all(value > 0 for value in settings.values()):
        raise ValueError(f"settings must be positive, but are {settings}")
    if max_sequence_length is not None and not isinstance(max_sequence_length, int):
        raise ValueError(f"max_sequence_length must be a whole number, but is {max_sequence_length}")
    return conditioner(pipeline, **settings)


def _conditioner_class(pipeline: Any) -> type[Conditioner]:
    family = family_of(denoiser_of(pipeline)).name
    known = [conditioner for conditioner in _CONDITIONERS if conditioner.family == family]
    bases = {base.__name__ for base in type(pipeline).__mro__}
    for conditioner in known:
        if bases & set(conditioner.pipelines):
            return conditioner
    if not known:
        families = sorted({conditioner.family for conditioner in _CONDITIONERS})
        raise ValueError(
            f"training and editing need a conditioner for family {family!r}, and there is none, only for "
            f"{', '.join(families)}; write a Conditioner for it"
        )
    names = [name for conditioner in known for name in conditioner.pipelines]
    raise ValueError(
        f"family {family!r} needs a {' or '.join(names)}, but got a {type(pipeline).__name__}; "
        f"{' or '.join(f'{name}.from_pipe(pipeline)' for name in names)} makes one of another pipeline of the same "
        "model"
    )


__all__ = ["Conditioner", "Conditions", "concatenate", "conditioner_of", "take"]
