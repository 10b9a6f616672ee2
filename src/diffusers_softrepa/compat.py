"""Compatibility with older releases of diffusers and transformers, in one place.

The rest of the package is written for the newest releases. Each entry names the release that made it necessary, and
can be removed once the lower bound in pyproject.toml is above that release.
"""

import inspect
import logging
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import HfApi
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, http_backoff
from packaging.version import Version
from torch import Tensor, nn

DIFFUSERS = Version(diffusers.__version__)
TRANSFORMERS = Version(transformers.__version__)

# The answers after which the Hub's client asks again by itself before it gives up: all that may pass since
# huggingface_hub 1, some or one before.
_RETRIED = inspect.signature(http_backoff).parameters["retry_on_status_codes"].default
HUB_RETRIES: tuple[int, ...] = _RETRIED if isinstance(_RETRIED, tuple) else (429,)

# Modular pipelines came with diffusers 0.35; None before.
ModularPipeline: Any = getattr(diffusers, "ModularPipeline", None)


def pil_processor(name: str) -> Any:
    """Returns the image processor class that works on PIL images and does not need torchvision.

    Args:
        name: Name of the class in transformers 4, such as `CLIPImageProcessor`. In transformers 5 `Pil` is appended.
    """
    return getattr(transformers, f"{name}Pil" if TRANSFORMERS.major > 4 else name)


ClipProcessor: Any = pil_processor("CLIPImageProcessor")


def drop_torchvision_hints() -> None:
    """Drops transformers' hints to install torchvision, for programs such as the `softrepa` command.

    Since transformers 5, each diffusers pipeline that names an image processor logs one when it is imported. Other
    messages are not affected. The package itself does not call this function.
    """
    logging.getLogger("transformers.utils.import_utils").addFilter(_is_no_torchvision_hint)


def _is_no_torchvision_hint(record: logging.LogRecord) -> bool:
    return "ImageProcessor` requires torchvision" not in record.getMessage()


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


def check_write_access(api: HfApi, repo_id: str) -> None:
    """Checks that the token of a client may write to a model repository, as huggingface_hub 1 can with `auth_check`.

    Args:
        api: Client of the Hub, with its token.
        repo_id: Id of the model repository.

    Raises:
        HfHubHTTPError: The token may not write to the repository, or the Hub cannot be asked.
    """
    if "write" in inspect.signature(api.auth_check).parameters:
        api.auth_check(repo_id, write=True)
        return
    address = f"{api.endpoint}/api/models/{repo_id}/auth-check/write"
    hf_raise_for_status(get_session().get(address, headers=build_hf_headers(token=api.token)))


def transport_fault(error: BaseException) -> str | None:
    """Returns the kind of a connection error: "proxy", "timeout", "no connection" or "broken off", or None for others.

    huggingface_hub sends requests with httpx, and before release 1 with requests. Their error classes are recognised
    by name, because only one of the two packages may be installed.

    Args:
        error: Error that huggingface_hub raised.
    """
    names = {cls.__name__ for cls in type(error).__mro__}
    if "ProxyError" in names:
        return "proxy"
    if names & {"TimeoutException", "Timeout"}:
        return "timeout"
    if "ConnectionError" in names and "RequestException" in names:  # of requests
        within = type(error.args[0]).__name__ if error.args else ""
        return "broken off" if within in ("ProtocolError", "ReadTimeoutError") else "no connection"
    if "ConnectError" in names:
        return "no connection"
    return "broken off" if names & {"NetworkError", "RemoteProtocolError", "ChunkedEncodingError"} else None


def _execution_device(module: nn.Module) -> torch.device:
    """Returns the device on which a module runs, even if offloading keeps its weights on another device."""
    from diffusers.hooks.group_offloading import _get_group_onload_device

    try:
        return torch.device(_get_group_onload_device(module))
    except ValueError:  # the module is not offloaded in groups
        pass
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    own = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    return torch.device(next((device for device in devices if device is not None), own))


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
    "HUB_RETRIES",
    "TRANSFORMERS",
    "ClipProcessor",
    "ModularPipeline",
    "check_write_access",
    "drop_torchvision_hints",
    "get_module_execution_device",
    "model_precision",
    "pil_processor",
    "pipeline_precision",
    "pooled",
    "transport_fault",
]
