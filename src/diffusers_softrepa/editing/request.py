"""What a caller asked for, checked before anything is touched."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

Seed = int | Generator | Sequence[Generator] | None


def texts(name: str, given: Any) -> list[str]:
    """Returns one prompt or several as a list.

    Raises:
        TypeError: It is neither a string nor a list of strings.
        ValueError: The list is empty.
    """
    listed = [given] if isinstance(given, str) else given
    if not isinstance(listed, list | tuple) or not all(isinstance(text, str) for text in listed):
        raise TypeError(f"{name} must be a string or a list of strings, but is {given!r}")
    if not listed:
        raise ValueError(f"{name} must be at least one, but the list is empty")
    return list(listed)


def batch_size(**counts: int) -> int:
    """Returns how many edits are asked for: everything comes once, for all of them, or once for each.

    Raises:
        ValueError: The numbers do not go together.
    """
    batch = max(counts.values())
    if any(count not in (1, batch) for count in counts.values()):
        given = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"each must be one for all or one for each of the same number, but there are {given}")
    return batch


def steps_to_run(num_inference_steps: int, strength: float) -> int:
    """Returns how many of the steps run, the last ones: diffusers' meaning of `strength`.

    Raises:
        ValueError: None would run, or strength is above 1.
    """
    if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be a positive integer but got {num_inference_steps!r}")
    running = int(num_inference_steps * strength)
    if not 0 < strength <= 1 or running == 0:
        raise ValueError(
            "strength, the share of the steps that run, must be above 0, at most 1 and leave a step to run, but got "
            f"{strength!r} of {num_inference_steps} steps; 0.66 is usual"
        )
    return running


def generators(seed: Seed, batch: int) -> Generator | list[Generator] | None:
    """Returns what draws the noise: of a number, one generator per image, so that images do not depend on the batch.

    Raises:
        ValueError: There are several generators, and not one per image.
    """
    if isinstance(seed, int):
        return [Generator().manual_seed(seed) for _ in range(batch)]
    if seed is None or isinstance(seed, Generator):
        return seed
    if len(seed) != batch:
        raise ValueError(
            f"generator must be a number, one generator, or one per image: {len(seed)} for {batch} images"
        )
    return list(seed)


def noise_like(latents: Tensor, generator: Generator | list[Generator] | None) -> Iterator[Tensor]:
    """Draws standard normal noise, (n, C, h, w) float32, without end."""
    while True:
        yield randn_tensor(latents.shape, generator, latents.device, torch.float32)
