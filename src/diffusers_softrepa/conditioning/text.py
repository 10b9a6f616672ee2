"""The text stream of a text, from which adapters with `init="text"` start."""

import torch
from torch import Tensor

from ..families import family_of, text_blocks
from .base import Conditioner


@torch.no_grad()
def text_stream(conditioner: Conditioner, text: str) -> Tensor:
    """Returns the text stream that the first text-reading block of a denoiser gets for a text.

    The result is the argument `text_embeddings` of `add_softrepa` for configurations with `init="text"`:

        text_embeddings = text_stream(conditioner_of(pipe), "a photo of exactly what was asked for")

    Args:
        conditioner: Conditioner of the pipeline, from `conditioner_of`.
        text: The text.

    Returns:
        The text rows after the text projection of the denoiser, (S, D) float32 on the device of the denoiser.
    """
    denoiser: torch.nn.Module = conditioner.denoiser
    read: list[Tensor] = []
    block = text_blocks(denoiser, family_of(denoiser))[0]
    hook = block.module.register_forward_pre_hook(
        lambda _module, _args, kwargs: read.append(kwargs[block.group.text]), with_kwargs=True
    )
    try:
        side = conditioner.image_multiple * 4
        device = next(denoiser.parameters()).device
        latents = torch.zeros(1, *conditioner.latent_shape(side, side), device=device)
        conditioner.predict(latents, torch.zeros(1, device=device), conditioner.encode_captions([text]))
    finally:
        hook.remove()
    return read[0][0].float()
