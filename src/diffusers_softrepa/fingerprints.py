"""Short texts that change when weights, tensors, images or other content change: the first half of a SHA-256."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLES = 8  # numbers of each parameter


def fingerprint(content: bytes | str) -> str:
    """Returns the fingerprint of bytes or of a text in UTF-8, 16 hexadecimal digits."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def tensor_fingerprint(tensor: Tensor) -> str:
    """Returns the fingerprint of all numbers of a tensor, as float32."""
    return fingerprint(tensor.detach().float().cpu().numpy().tobytes())


def weights_fingerprint(module: nn.Module) -> str:
    """Returns the fingerprint of a module's weights: shape and dtype of each parameter, and a few of its numbers.

    Parameters that are not in memory (the `meta` device, as offloading uses it) and those of another tensor class (as
    quantization uses them) count by shape and dtype alone.

    Args:
        module: The module.
    """
    facts: list[Any] = []
    samples: dict[torch.device, list[Tensor]] = {}  # one transfer for each device
    for parameter in module.parameters():
        values = parameter.data
        facts.append((tuple(values.shape), str(values.dtype)))
        if type(values) is Tensor and not values.is_meta and values.numel():
            flat = values.flatten()
            samples.setdefault(flat.device, []).append(flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].double())
    numbers = [torch.cat(parts).cpu().numpy().tobytes() for parts in samples.values()]
    return fingerprint(repr(facts).encode() + b"".join(numbers))
