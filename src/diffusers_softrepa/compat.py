"""Compatibility with older releases of diffusers and transformers, in one place.

The rest of the package is written for the newest releases. Each entry names the release that made it necessary, and
can be removed once the lower bound in pyproject.toml is above that release.
"""

from typing import Any

import diffusers
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

DIFFUSERS = Version(diffusers.__version__)
TRANSFORMERS = Version(transformers.__version__)

# Modular pipelines came with diffusers 0.35; None before.
ModularPipeline: Any = getattr(diffusers, "ModularPipeline", None)


def pil_processor(name: str) -> Any:
    """Returns the image processor class that works on PIL images and does not need torchvision.

    Args:
        name: Name of the class in transformers 4, such as `CLIPImageProcessor`. In transformers 5 `Pil` is appended.
    """
    return getattr(transformers, f"{name}Pil" if TRANSFORMERS.major > 4 else name)


ClipProcessor: Any = pil_processor("CLIPImageProcessor")


def pipeline_precision(dtype: torch.dtype) -> dict[str, Any]:
    """Returns the keyword argument of diffusers' `from_pretrained` that sets the dtype of the weights.

    Args:
        dtype: Dtype to load the weights in.
    """
    return {_DIFFUSERS_DTYPE: dtype}


def model_precision(dtype: torch.dtype) -> dict[str, Any]:
    """Returns the keyword argument of transformers' `from_pretrained` that sets the dtype of the weights.

    Args:
        dtype: Dtype to load the weights in.
    """
    return {"torch_dtype" if Version("4.56") > TRANSFORMERS else "dtype": dtype}


def pooled(output: Any) -> Tensor:
    """Returns the projected features of CLIP's `get_image_features` or `get_text_features`, (n, width).

    Args:
        output: Return value of the method: the features, or since transformers 5 an output object that holds them.
    """
    return output if isinstance(output, Tensor) else output.pooler_output


def _execution_device(module: nn.Module) -> torch.device:
    """Returns the device on which a module runs, even if offloading keeps its weights on another device."""
    from diffusers.hooks.group_offloading import _get_group_onload_device

    try:
        return torch.device(_get_group_onload_device(module))
    except ValueError:  # the module is not offloaded in groups
        pass
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    told = (getattr(hook, "execution_device", None) for hook in hooks)
    own = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    return torch.device(next((device for device in told if device is not None), own))


try:
    from diffusers.utils.torch_utils import get_module_execution_device  # diffusers 0.41
except ImportError:
    get_module_execution_device = _execution_device

try:
    from diffusers.utils.deprecation_utils import _resolve_dtype  # noqa: F401  (came with the name `dtype`)

    _DIFFUSERS_DTYPE = "dtype"
except ImportError:
    _DIFFUSERS_DTYPE = "torch_dtype"

__all__ = [
    "DIFFUSERS",
    "TRANSFORMERS",
    "ClipProcessor",
    "ModularPipeline",
    "get_module_execution_device",
    "model_precision",
    "pil_processor",
    "pipeline_precision",
    "pooled",
]
