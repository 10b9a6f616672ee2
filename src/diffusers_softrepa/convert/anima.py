"""Reads and writes the soft-token file of ComfyUI's Anima node.

It is a safetensors file. With L layers, K tokens, width D, B bins and N banks it contains:

- `tokens`: `(L, K, D)`, or `(N, L, K, D)` for several banks, of which the node uses bank 0;
- `t_offsets.weight`: `(B, N*L*D)`, ordered by bank and then by layer. An adapter without bins has one row of zeros;
- metadata, all strings: `ss_splice_position` says which rows of the context the tokens replace. Other entries are for
  information.

The layers are the first L blocks of a Cosmos denoiser whose timestep is the noise level sigma in 0..1, and
`t_offsets[floor(sigma * B)]` is added to the tokens. An adapter computes the same, so values are converted unchanged.
There are two differences in use:

- The node overwrites K rows of a context that is padded with zeros to 512 rows, whereas an adapter adds K rows. Rows
  of zeros have no position. The results are equal if the context of the denoiser is K rows shorter and the blocks
  after the first L get K rows of zeros; `num_blocks` of `import_anima` adds these.
- The strength of the node scales the tokens, whereas the weight of an adapter interpolates the outputs of blocks. They
  are equal at 0 and 1.

Source: the file format of anima_lora's `AnimaSoftTokensLoader`, as its node reads it.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from ..checkpoint import checked_tensors
from ..config import SoftREPAConfig
from ..families.cross_attention import COSMOS
from ..files import write_whole
from ..quoting import one_line, quoted

SplicePosition = Literal["end_of_sequence", "front_of_padding"]

_TOKENS, _TABLE = "tokens", "t_offsets.weight"
_SPLICE_KEY = "ss_splice_position"
_METHOD = {"ss_network_module": "networks.methods.soft_tokens", "ss_network_spec": "soft_tokens"}


def read_anima(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors and the metadata of a file of the Anima node.

    Args:
        path: Path of the file.

    Raises:
        ValueError: The file is not a complete safetensors file.
        OSError: There is no such file.
    """
    if not Path(path).is_file():
        raise OSError(f"there is no file {one_line(os.fspath(path))}; give the soft-token file of the Anima node")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:  # a header that lies makes the reader raise almost anything
        raise ValueError(
            f"{one_line(os.fspath(path))} is no complete safetensors file ({one_line(error, 120)}); download it again"
        ) from error


def import_anima(
    tensors: Mapping[str, Tensor], *, num_blocks: int | None = None, base_model: str | None = None
) -> tuple[SoftREPAConfig, dict[str, Tensor]]:
    """Converts the tensors of a file of the Anima node to an adapter.

    Args:
        tensors: `tokens` (L, K, D) or (N, L, K, D), and `t_offsets.weight` (B, N*L*D), floating. Other tensors are
            ignored, as the node ignores them. One row of zeros means no timestep bins.
        num_blocks: Number of blocks of the denoiser. If given, the adapter has tokens of zeros for the blocks that
            have none in the file, which gives exactly the predictions of the node on a context that is K rows shorter.
            Defaults to None: only the layers in the file.
        base_model: Hub id of the pipeline for which the adapter was trained. Defaults to None: unknown.

    Returns:
        The configuration, of family `"cosmos"`, and the tensors, float32.

    Raises:
        ValueError: A tensor is missing, has another shape, or contains NaN or Inf.
    """
    if _TOKENS not in tensors or _TABLE not in tensors:
        raise ValueError(
            f"a soft-token file of the Anima node holds {_TOKENS!r} and {_TABLE!r}, but this one holds "
            f"{quoted(sorted(map(str, tensors)), 200)}; is it a LoRA, or an adapter of this package already?"
        )
    tokens, table = tensors[_TOKENS], tensors[_TABLE]
    if tokens.ndim not in (3, 4) or not tokens.is_floating_point():
        raise ValueError(
            f"{_TOKENS} must be floating point of shape (L, K, D) or (N, L, K, D), but is {tokens.dtype} of shape "
            f"{tuple(tokens.shape)}"
        )
    banks, layers, count, width = tokens.shape if tokens.ndim == 4 else (1, *tokens.shape)
    columns = banks * layers * width
    if table.ndim != 2 or table.shape[1] != columns or not table.is_floating_point():
        raise ValueError(
            f"a row of {_TABLE} holds {banks}*{layers}*{width} = {columns} numbers, but it is {table.dtype} of shape "
            f"{tuple(table.shape)}; do the two tensors belong to one file?"
        )
    further = 0 if num_blocks is None else num_blocks - layers
    if further < 0:
        raise ValueError(
            f"the file has tokens for {layers} blocks, but num_blocks is {num_blocks}; is it another model?"
        )
    binned = table.shape[0] != 1 or bool(table.any())
    config = SoftREPAConfig(
        base_model_name_or_path=base_model,
        family=COSMOS.name,
        token_dim=width,
        num_tokens=count,
        num_layers=layers + further,
        num_timestep_bins=table.shape[0] if binned else None,
        num_banks=banks,
    )
    found = {"tokens": functional.pad(tokens, (0, 0, 0, 0, 0, further))}  # (N, L, K, D)
    if binned:
        rows = table.reshape(-1, banks, layers, width).transpose(0, 1)  # (N, B, L, D)
        found["timestep_tokens"] = functional.pad(rows, (0, 0, 0, further))
    ours = {
        name: found[name].detach().to("cpu", torch.float32).reshape(shape).clone()
        for name, shape in config.shapes.items()
    }
    return config, checked_tensors(ours, config, "the file of the Anima node")


def export_anima(
    config: SoftREPAConfig,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    splice_position: SplicePosition = "end_of_sequence",
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Converts an adapter to the tensors and metadata of a file of the Anima node; the inverse of `import_anima`.

    Layers of zeros at the end are left out, because they equal the padding that the node has anyway.

    Args:
        config: Configuration of an adapter for Anima: of family `"cosmos"`, trained on a denoiser whose timestep is
            sigma in 0..1, as for all Cosmos models except Cosmos 1.
        tensors: `tokens` and, if there are bins, `timestep_tokens`.
        dtype: Dtype of the tensors in the file. Defaults to float32, in which the node computes.
        splice_position: Which rows of the padded context the node overwrites with the tokens: its last rows
            (`"end_of_sequence"`), or the rows right after the text (`"front_of_padding"`). Defaults to the last rows.

    Raises:
        ValueError: The adapter is of another family, or its tensors do not fit its config.
    """
    if config.family != COSMOS.name:
        raise ValueError(
            f"the Anima node reads adapters of family {COSMOS.name!r}, but this one is of family {config.family!r}; "
            "use it with diffusers"
        )
    if splice_position not in get_args(SplicePosition):
        raise ValueError(f"splice_position must be one of {get_args(SplicePosition)}, but is {splice_position!r}")
    tensors = checked_tensors(tensors, config, "the adapter to export")
    banks, width, bins = config.num_banks, config.token_dim, config.num_timestep_bins or 1
    shape = (banks, config.num_layers, config.num_tokens, width)
    tokens = tensors["tokens"].detach().to("cpu", dtype).reshape(shape)
    table = torch.zeros(banks, 1, config.num_layers, width, dtype=dtype)
    if config.num_timestep_bins is not None:
        table = tensors["timestep_tokens"].detach().to("cpu", dtype).reshape(banks, bins, config.num_layers, width)
    used = (tokens != 0).any(dim=(0, 2, 3)) | (table != 0).any(dim=(0, 1, 3))  # (L,)
    layers = max([0, *used.nonzero().flatten().tolist()]) + 1
    tokens, table = tokens[:, :layers], table[:, :, :layers]
    rows = table.transpose(0, 1).flatten(1)  # (B, N*L*D)
    numbers = {_TOKENS: (tokens if banks > 1 else tokens[0]).contiguous(), _TABLE: rows.contiguous()}
    metadata = {
        **_METHOD,
        _SPLICE_KEY: splice_position,
        "ss_num_tokens": str(config.num_tokens),
        "ss_embed_dim": str(width),
        "ss_n_layers": str(layers),
        "ss_n_t_buckets": str(bins),
        "ss_n_banks": str(banks),
    }
    return numbers, metadata


def write_anima(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file of the Anima node, which belongs in ComfyUI's folder `models/loras`.

    Args:
        path: Path of the file, which must end in `.safetensors`.
        tensors: Tensors that `export_anima` returned.
        metadata: Metadata that `export_anima` returned.

    Raises:
        ValueError: The name does not end in `.safetensors`.
        OSError: The file cannot be written.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"the Anima node reads .safetensors files, but the file to write is {os.fspath(path)}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save(dict(tensors), metadata={"format": "pt", **metadata}))
