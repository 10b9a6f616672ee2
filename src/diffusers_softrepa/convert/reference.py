"""Reads the published files of the SoftREPA authors, without running pickle code, and converts them to adapters.

    softrepa convert FOLDER_OR_HUB_ID OUTPUT_FOLDER --family sd3

The authors publish a folder per model with two pickles, both saved from a GPU:

- `dc_tokens.pth`, a Parameter: `(L, K, D)` for SD3, `(K, D)` for SD1.5 and SDXL, whose stages share one layer;
- `dc_t_tokens.pth`, a torch Embedding module with one row per timestep bin, `(B, L*D)`; missing if there are no bins.

They are converted to `tokens` (L, K, D) and `timestep_tokens` (B, L, D) with unchanged values.

Source: SoftREPA, arXiv 2503.08250, and its published SD3, SD1.5 and SDXL files.
"""

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from ..checkpoint import checked_tensors
from ..config import SoftREPAConfig
from ..families.sd3 import SD3
from ..families.unet import UNET
from ..hub import HubOptions, fetch, is_missing, located
from ..quoting import one_line

TOKENS_FILE = "dc_tokens.pth"
TIMESTEP_TOKENS_FILE = "dc_t_tokens.pth"

# Stages for which the published UNet tokens were trained, by width of the text, which differs between the models.
_PUBLISHED_STAGES = {768: ("down",), 2048: ("down", "mid")}


class _Embedding:
    """Stand-in for torch's Embedding while its pickle is read, so that no code of the real class runs."""


def read_reference(source: str | os.PathLike[str], options: HubOptions | None = None) -> tuple[Tensor, Tensor | None]:
    """Reads the authors' files of one model.

    Args:
        source: A local folder, or a Hub repository id or URL.
        options: Subfolder and, on the Hub, revision, token and cache. Defaults to the root of the main branch.

    Returns:
        The tokens, and the table of timestep tokens or None if there is no such file; as stored, on the CPU.

    Raises:
        ValueError: A file is damaged, or holds anything other than tensors.
        OSError: There is no such folder, repository or file, or the Hub cannot be reached.
    """
    source, options = located(os.fspath(source), options or HubOptions())
    folder = Path(source)
    if not folder.is_dir() and not _may_be_repository(source):
        raise OSError(
            f"there is no folder {one_line(folder)}; give the one that holds {TOKENS_FILE}, or a Hub repository id"
        )
    if not folder.is_dir():
        tokens = _read_tensor(fetch(source, TOKENS_FILE, options))
        table = _fetched_table(source, options)
        return tokens, None if table is None else _read_tensor(table)
    folder = folder / (options.subfolder or "")
    if not (folder / TOKENS_FILE).is_file():
        raise OSError(f"there is no {TOKENS_FILE} in {folder}; give the folder of one published model")
    path = folder / TIMESTEP_TOKENS_FILE
    return _read_tensor(folder / TOKENS_FILE), _read_tensor(path) if path.is_file() else None


def _may_be_repository(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/", "~"))


def _fetched_table(repo_id: str, options: HubOptions) -> Path | None:
    """Returns the file of timestep tokens of a Hub repository, or None if the repository has no such file."""
    try:
        return fetch(repo_id, TIMESTEP_TOKENS_FILE, options)
    except OSError as error:
        if is_missing(error):
            return None
        name = f"{options.subfolder}/{TIMESTEP_TOKENS_FILE}" if options.subfolder else TIMESTEP_TOKENS_FILE
        cache = None if options.cache_dir is None else os.fspath(options.cache_dir)
        cached = try_to_load_from_cache(repo_id, name, cache_dir=cache, revision=options.revision)
        if cached is None or isinstance(cached, str):
            raise
        return None  # offline, and the cache knows that the repository has no such file


def convert_reference(
    tokens: Tensor,
    timestep_tokens: Tensor | None = None,
    *,
    family: str,
    stages: Sequence[str] | None = None,
    base_model: str | None = None,
) -> tuple[SoftREPAConfig, dict[str, Tensor]]:
    """Converts the authors' tensors to an adapter.

    Args:
        tokens: `(L, K, D)` floating for family `"sd3"`, `(K, D)` for family `"unet"`.
        timestep_tokens: `(B, L*D)` floating. Defaults to None: the adapter has no timestep bins.
        family: `"sd3"`, or `"unet"` for SD1.5 and SDXL.
        stages: For UNets, the stages that read the tokens. Defaults to the published ones: down for SD1.5 (width 768),
            down and mid for SDXL (width 2048).
        base_model: Hub id of the pipeline for which the adapter was trained. Defaults to None: unknown.

    Returns:
        The configuration and the tensors, float32: `tokens` (L, K, D) and, if there are bins, `timestep_tokens`
        (B, L, D).

    Raises:
        ValueError: The tensors have other shapes or contain NaN or Inf, or the stages do not fit the family.
    """
    layered = _layered(tokens, family)
    num_layers, num_tokens, width = layered.shape
    tensors = {"tokens": layered}
    if timestep_tokens is not None:
        tensors["timestep_tokens"] = _binned(timestep_tokens, num_layers, width)
    config = SoftREPAConfig(
        base_model_name_or_path=base_model,
        family=family,
        token_dim=width,
        num_tokens=num_tokens,
        num_layers=num_layers,
        stages=_stages(family, width, stages),
        num_timestep_bins=None if timestep_tokens is None else timestep_tokens.shape[0],
    )
    tensors = {name: tensor.detach().to("cpu", torch.float32).clone() for name, tensor in tensors.items()}
    return config, checked_tensors(tensors, config, "the published adapter")


def _layered(tokens: Tensor, family: str) -> Tensor:
    """Returns the tokens with a layer dimension, (L, K, D)."""
    if family not in (SD3.name, UNET.name):
        raise ValueError(f"the authors published adapters of the families 'sd3' and 'unet', but family is {family!r}")
    shape, ndim = ("(L, K, D)", 3) if family == SD3.name else ("(K, D)", 2)
    if tokens.ndim != ndim or not tokens.is_floating_point():
        raise ValueError(
            f"the published tokens of family {family!r} are floating point of shape {shape}, but these are "
            f"{tokens.dtype} of shape {tuple(tokens.shape)}; is it another family?"
        )
    return tokens if ndim == 3 else tokens[None]  # (L, K, D)


def _binned(timestep_tokens: Tensor, num_layers: int, width: int) -> Tensor:
    """Returns the timestep tokens with a layer dimension, (B, L, D)."""
    fits = timestep_tokens.ndim == 2 and timestep_tokens.shape[1] == num_layers * width
    if not fits or not timestep_tokens.is_floating_point():
        raise ValueError(
            f"a row of the timestep tokens holds L*D = {num_layers}*{width} = {num_layers * width} numbers, but the "
            f"table is {timestep_tokens.dtype} of shape {tuple(timestep_tokens.shape)}; do the two files belong to "
            "one model?"
        )
    return timestep_tokens.reshape(-1, num_layers, width)  # (B, L, D)


def _stages(family: str, width: int, stages: Sequence[str] | None) -> list[str] | None:
    """Returns the given stages, or the published ones, or None for families with numbered layers."""
    if family == SD3.name:
        if stages is not None:
            raise ValueError(f"family 'sd3' has numbered layers, not stages; leave out stages {list(stages)}")
        return None
    if stages is None and width not in _PUBLISHED_STAGES:
        raise ValueError(
            f"the stages must be given: the published UNet tokens are {list(_PUBLISHED_STAGES)} wide, these {width}"
        )
    chosen = list(_PUBLISHED_STAGES[width] if stages is None else stages)
    if not chosen or not set(chosen) <= set(UNET.stages):
        raise ValueError(f"stages must name some of {UNET.stages}, but they are {chosen}")
    return chosen


def _read_tensor(path: Path) -> Tensor:
    """Returns the only tensor in a pickle: a Parameter, or the weight of an Embedding."""
    content = io.BytesIO(path.read_bytes())
    allowed: list[Any] = [(_Embedding, "torch.nn.modules.sparse.Embedding")]
    try:
        with torch.serialization.safe_globals(allowed):
            found = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged stream makes the reader raise almost anything
        blocked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if blocked is None:
            raise ValueError(f"{path} is not a complete file as torch.save writes it; download it again") from error
        raise ValueError(
            f"a published file contains only tensors, but {path} refers to {blocked[1]}, which would run code; "
            "nothing was run; do not trust the file"
        ) from error
    tensor = _weight(found) if isinstance(found, _Embedding) else found
    if not isinstance(tensor, Tensor) or not _is_whole(tensor):
        raise ValueError(
            f"{path} must hold one dense Parameter or Embedding, but holds {type(found).__name__}; is it another file?"
        )
    return tensor


def _weight(embedding: _Embedding) -> Any:
    parameters = vars(embedding).get("_parameters")
    return parameters.get("weight") if isinstance(parameters, dict) else None


def _is_whole(tensor: Tensor) -> bool:
    """Returns whether a tensor is stored in full; with strides a small file could claim any amount of memory."""
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return dense and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
