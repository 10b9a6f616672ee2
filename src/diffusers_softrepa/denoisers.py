"""Finds the denoisers of a pipeline, and explains why when it has none that takes soft tokens."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .families import is_supported, supported_denoisers
from .quoting import quoted
from .wrapping import uncompiled


def denoisers_of(target: Any) -> dict[str, nn.Module]:
    """Returns the denoisers of a pipeline by component name.

    Args:
        target: A pipeline, or a denoiser, which is returned under the name of its class.

    Returns:
        The denoisers, without the wrapper of `torch.compile`. A module that is two components at once is returned
        under the first name only.

    Raises:
        ValueError: There is no denoiser that takes soft tokens.
        TypeError: The target is neither a pipeline nor a module.
    """
    parts = {type(target).__name__: target} if isinstance(target, nn.Module) else getattr(target, "components", None)
    if not isinstance(parts, Mapping):
        raise TypeError(
            f"soft tokens are for a diffusers pipeline or its denoiser, but the target is {quoted(target)}"
        )
    modules = {name: uncompiled(part) for name, part in parts.items() if isinstance(part, nn.Module)}
    found: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if is_supported(module) and not any(module is other for other in found.values()):
            found[name] = module
    if found:
        return found
    seen = ", ".join(f"{name} ({type(module).__name__})" for name, module in modules.items())
    candidates = "".join(f"; {name} has {blocks}" for name, module in modules.items() if (blocks := _blocks(module)))
    raise ValueError(
        f"no component of {type(target).__name__} takes soft tokens: it has {seen or 'no models'}; supported "
        f"denoisers are {', '.join(supported_denoisers())}; describe another one with register_family, see "
        f"docs/adding_a_family.md{candidates}"
    )


def takes_soft_tokens(target: Any) -> bool:
    """Returns whether a pipeline has a denoiser that takes soft tokens.

    Args:
        target: A pipeline or a module.
    """
    components = [target] if isinstance(target, nn.Module) else target.components.values()
    return any(isinstance(part, nn.Module) and is_supported(uncompiled(part)) for part in components)


def denoiser_of(target: Any) -> nn.Module:
    """Returns the only denoiser of a pipeline, without the wrapper of `torch.compile`.

    Args:
        target: A pipeline, or a denoiser, which is returned itself.

    Raises:
        ValueError: There is no denoiser that takes soft tokens, or more than one.
    """
    found = denoisers_of(target)
    if len(found) > 1:
        raise ValueError(
            f"{type(target).__name__} has several denoisers, {sorted(found)}; give one of them instead of the pipeline"
        )
    return next(iter(found.values()))


def check_passes_gradients(denoiser: nn.Module) -> None:
    """Checks that gradients flow through a denoiser, also through its quantised linear layers, as training requires.

    Args:
        denoiser: The denoiser to train on.

    Raises:
        ValueError: A layer stops gradients, as torchao's dynamic int8 quantisation does, which rounds activations; or
            the denoiser was loaded in inference mode.
    """
    if any(parameter.is_inference() for parameter in denoiser.parameters()):
        raise ValueError(
            f"training needs gradients through the denoiser, but this {type(denoiser).__name__} was loaded inside "
            "torch.inference_mode(), which keeps none; load the pipeline outside of it"
        )
    for name, layer in denoiser.named_modules():
        weight: Any = getattr(layer, "weight", None)
        if not isinstance(layer, nn.Linear) or type(weight) is nn.Parameter or weight is None or weight.is_meta:
            continue
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
        with torch.inference_mode(False), torch.enable_grad():
            given = torch.zeros(1, layer.in_features, device=weight.device, dtype=dtype, requires_grad=True)
            found = layer(given)
            passes = found.requires_grad and torch.autograd.grad(found.sum(), given, allow_unused=True)[0] is not None
        if not passes:
            raise ValueError(
                f"training needs gradients through the whole denoiser, but {name} of {type(denoiser).__name__}, whose "
                f"weight is a {type(weight).__name__}, passes none; quantise the weights alone (torchao's "
                "Int8WeightOnlyConfig, bitsandbytes, GGUF), or train on the model as it is; sampling works on both"
            )


def _blocks(module: nn.Module) -> str:
    """Returns a description of the block lists of a module that may read text, with the arguments of their forward."""
    found = []
    for name, blocks in module.named_children():
        if isinstance(blocks, nn.ModuleList) and len(blocks) > 0:
            parameters = list(inspect.signature(type(blocks[0]).forward).parameters)[1:]
            if len(parameters) > 1:
                found.append(f"{name} of {type(blocks[0]).__name__}({', '.join(parameters)})")
    return " and ".join(found)
