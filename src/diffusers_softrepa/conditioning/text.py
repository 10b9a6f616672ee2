"""What the blocks of a denoiser read of a text: what tokens with `init="text"` start from."""

import torch
from torch import Tensor

from ..families import family_of, text_blocks
from .base import Conditioner


@torch.no_grad()
def text_stream(conditioner: Conditioner, text: str) -> Tensor:
    """Returns the text stream that the first block that reads text gets for a text.

    It is what `add_softrepa(pipe, config, text_embeddings=...)` takes where the config says `init="text"`:

        text_stream(conditioner_of(pipe), "a photo of exactly what was asked for")

    Args:
        conditioner: Of the pipeline whose denoiser is to read the text, from `conditioner_of`.
        text: The text.

    Returns:
        The rows behind the denoiser's own text projection, (S, D) float32 on the denoiser's device.
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
