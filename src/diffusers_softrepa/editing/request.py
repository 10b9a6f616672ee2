"""Checks of the arguments of the editing functions."""

from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from ..quoting import is_text, quoted

_MOST = 1_000_000

Seed = int | Generator | Sequence[Generator] | None


def texts(name: str, given: Any) -> list[str]:
    """Returns one prompt or several as a list.

    Raises:
        TypeError: It is neither a string nor a list of strings.
        ValueError: The list is empty, or a prompt holds half of a character or a null character.
    """
    listed = [given] if isinstance(given, str) else given
    if not isinstance(listed, list | tuple) or not all(isinstance(text, str) for text in listed):
        raise TypeError(f"{name} must be a string or a list of strings, but is {quoted(given)}")
    if not listed:
        raise ValueError(f"{name} must contain at least one prompt, but the list is empty")
    for text in listed:
        if not is_text(text):
            raise ValueError(f"{name} must be text, but {quoted(text)} has a lone surrogate or a null character")
    return list(listed)


def batch_size(**counts: int) -> int:
    """Returns the number of images to make, given the number of each argument: 1 for all images, or one for each.

    Raises:
        ValueError: The numbers do not match.
    """
    batch = max(counts.values())
    if any(count not in (1, batch) for count in counts.values()):
        given = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"the number of each must be 1 or the number of the others, but there are {given}")
    return batch


def steps_to_run(num_inference_steps: int, strength: float) -> int:
    """Returns how many of the last steps run; `strength` is the share of steps that run, as in diffusers.

    Raises:
        ValueError: No step would run, or strength is not in (0, 1].
    """
    check_count("num_inference_steps", num_inference_steps)
    running = int(num_inference_steps * strength) if is_number(strength) and 0 < strength <= 1 else 0
    if running == 0:
        raise ValueError(
            "strength, the share of the steps that run, must be above 0, at most 1 and leave a step to run, but got "
            f"{quoted(strength)} of {num_inference_steps} steps; 0.66 is usual"
        )
    return running


def check_count(name: str, value: Any) -> None:
    """Raises a ValueError if a setting is not a whole number from 1 to a million."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST:
        raise ValueError(f"{name} must be a positive integer of at most {_MOST:,} but got {quoted(value)}")


def is_number(value: Any) -> bool:
    """Whether a value is a number of Python or numpy; booleans are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def generators(seed: Seed, batch: int) -> Generator | list[Generator] | None:
    """Returns the generator or generators of the noise. A seed makes one for each image.

    Raises:
        ValueError: The number of generators is not the number of images, or a seed has more than 63 bits.
        TypeError: It is none of these.
    """
    if isinstance(seed, int) and not isinstance(seed, bool):
        if abs(seed) >= 2**63:
            raise ValueError(f"a seed must be below 2**63 in size, but got {quoted(seed)}")
        return [Generator().manual_seed(seed) for _ in range(batch)]
    if seed is None or isinstance(seed, Generator):
        return seed
    if not isinstance(seed, list | tuple) or not all(isinstance(one, Generator) for one in seed):
        raise TypeError(f"generator must be a seed, a torch.Generator or a list of them, but is {quoted(seed)}")
    if len(seed) != batch:
        raise ValueError(
            f"generator must be a seed, a generator, or a list of one for each image, but there are {len(seed)} for "
            f"{batch} images"
        )
    return list(seed)


def noise_like(latents: Tensor, generator: Generator | list[Generator] | None) -> Iterator[Tensor]:
    """Yields draws of standard normal noise, (n, C, h, w) float32, without end."""
    while True:
        yield randn_tensor(latents.shape, generator, latents.device, torch.float32)
