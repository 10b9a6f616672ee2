"""Saves and loads adapters as folders and safetensors files, with strict checks.

An adapter is `adapter_model.safetensors` with its config in the metadata, so that the file alone can be loaded, and
the same config as `adapter_config.json` beside it, for people and for tools that know PEFT's names. If both exist, the
metadata is used. Pickles are refused: see `convert`.
"""

import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from .card import check_license, model_card, refreshed
from .config import MAX_CONFIG_BYTES, SoftREPAConfig
from .files import UnreadableJSON, check_places, parse_json, write_whole
from .hub import CARD_NAME, UNKNOWN_REPO, HubOptions, fetch, files_of, is_missing, located, may_be_fetched_again
from .other_adapters import other_kind
from .quoting import one_line, quoted

logger = logging.getLogger(__name__)

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
METADATA_KEY = "softrepa_config"
LARGEST = torch.finfo(torch.float32).max ** 0.5  # whose square float32 still holds

_OURS = ("tokens", "timestep_tokens")
_PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl")
_PICKLE_HEADS = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)))  # torch's, plain ones


def load_checkpoint(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    config: SoftREPAConfig | None = None,
    options: HubOptions | None = None,
) -> tuple[SoftREPAConfig, dict[str, Tensor]]:
    """Loads an adapter and checks all of it.

    Args:
        source: A folder, a safetensors file, a Hub repository id, or a state dict, which is not changed.
        config: Replaces the stored config; required if the source has none, as a state dict.
        options: Options of the download; None for the defaults.

    Returns:
        The config, and the tensors on the CPU by name, with the shapes of `config.shapes`.

    Raises:
        TypeError: The source has the wrong type.
        ValueError: The source has no config, is corrupt or a pickle, or its tensors do not fit the config.
        OSError: There is no such file, repository or revision, or it cannot be read or reached.
    """
    if isinstance(source, Mapping):
        _refuse_other_kind(source, "the state dict")
        if config is None:
            raise ValueError("a state dict carries no config; pass config=SoftREPAConfig.for_denoiser(...) with it")
        return config, checked_tensors(source, config, "the state dict")
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"an adapter is loaded from a Hub repository id, a path or a state dict, but source is {quoted(source)}"
        )
    source, options = located(os.fsdecode(source), options or HubOptions())
    path = _locate(source, options)
    try:
        return _loaded(path, source, config, options)
    except ValueError as error:
        if not may_be_fetched_again(path, source, options):
            raise
        logger.warning("the cached file is damaged and is fetched again: %s", error)
    path.unlink(missing_ok=True)  # the client leaves a file in its place that is no link of its own
    options = replace(options, force_download=True)
    return _loaded(_locate(source, options), source, config, options)


def _loaded(
    path: Path, source: str, config: SoftREPAConfig | None, options: HubOptions
) -> tuple[SoftREPAConfig, dict[str, Tensor]]:
    tensors, metadata = _read(path)
    config = config or _config_of(path, metadata, source, options)
    return config, checked_tensors(tensors, config, one_line(path))


def save_checkpoint(
    directory: str | os.PathLike[str],
    config: SoftREPAConfig,
    tensors: Mapping[str, Tensor],
    *,
    weight_name: str | None = None,
    license: str | None = None,
) -> list[str]:
    """Writes an adapter folder: weights, config and model card.

    Each file is written atomically. In an existing card only the sections that this package wrote are updated; see
    `card`.

    Returns:
        The names of the adapter's files.

    Raises:
        ValueError: The tensors do not fit the config, `directory` is a file, `weight_name` is not a file name, or
            `license` is not a short text.
    """
    weight_name = weight_name or WEIGHTS_NAME
    is_name = isinstance(weight_name, str) and Path(weight_name).name == weight_name
    if not is_name or Path(weight_name).suffix != ".safetensors":
        raise ValueError(
            f"weight_name must be a plain file name that ends in .safetensors, but is {quoted(weight_name)}"
        )
    check_places(directory, [weight_name, CONFIG_NAME, CARD_NAME], what="the place of an adapter")
    check_license(license)
    directory = Path(directory)
    kept = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    checked_tensors(kept, config, "the adapter to save")
    config = replace(config)  # checked again: fields may have been assigned to since it was made
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True)
    metadata = {"format": "pt", METADATA_KEY: text, "modelspec.architecture": f"{config.family}/softrepa"}
    write_whole(directory / weight_name, _with_sorted_header(save(kept, metadata=metadata)))
    write_whole(directory / CONFIG_NAME, f"{text}\n".encode())
    unusual = None if weight_name == WEIGHTS_NAME else weight_name
    card = model_card(config, UNKNOWN_REPO, weight_name=unusual, license=license)
    write_card(directory, str(card))
    return [weight_name, CONFIG_NAME, CARD_NAME]


def write_card(directory: Path, fresh: str) -> None:
    """Writes a model card into a folder, or updates the existing one."""
    path = directory / CARD_NAME
    existing = path.read_bytes() if path.exists() else None
    text = fresh if existing is None else refreshed(existing.decode(errors="surrogateescape"), fresh)
    content = text.encode(errors="surrogateescape")
    if content != existing:
        write_whole(path, content)


def checked_tensors(tensors: Mapping[str, Tensor], config: SoftREPAConfig, where: str) -> dict[str, Tensor]:
    """Returns `tensors` as a dict after checking that names, shapes, dtypes and values fit the config.

    Raises:
        ValueError: They do not fit; the message begins with `where`.
        TypeError: A value is not a tensor.
    """
    missing, extra = sorted(set(config.shapes) - set(tensors)), sorted(map(str, set(tensors) - set(config.shapes)))
    if missing or extra:
        raise ValueError(
            f"{where} must hold exactly the tensors {sorted(config.shapes)}: missing {missing}, unexpected "
            f"{quoted(extra, 200)}; it belongs to another config or another method"
        )
    for name, shape in config.shapes.items():
        tensor = tensors[name]
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} in {where} must be a tensor, but is a {type(tensor).__name__}")
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise ValueError(
                f"{name} in {where} must be floating point of shape {shape}, but is {tensor.dtype} of shape "
                f"{quoted(tuple(tensor.shape))}; the config and the tensors do not belong together"
            )
        _check_values(name, tensor, where)
    return dict(tensors)


def _check_values(name: str, tensor: Tensor, where: str) -> None:
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        raise ValueError(
            f"{name} in {where} must hold its numbers one by one, but is {tensor.layout} on {tensor.device}"
        )
    try:
        values = tensor.detach().to(torch.float32)  # the dtype in which it is used
    except (RuntimeError, TypeError) as error:  # a dtype that torch cannot convert
        raise ValueError(f"{name} in {where} must be numbers, but {tensor.dtype} cannot be read as such") from error
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise ValueError(f"{name} in {where} must be finite, but holds {bad} NaN or infinite values; train it anew")
    largest = float(values.abs().max())
    if largest > LARGEST:
        raise ValueError(
            f"{name} in {where} holds the value {largest:.3g}, but a denoiser's norms square what they read, so that "
            f"beyond {LARGEST:.3g} the result is infinite; train it anew"
        )


def _locate(source: str, options: HubOptions) -> Path:
    """Returns the safetensors file of a source, downloaded from the Hub if it is a repository id."""
    name = options.weight_name or WEIGHTS_NAME
    _refuse_pickle(Path(name))
    path = Path(source)
    try:
        if path.is_dir():
            path = path / (options.subfolder or "") / name
            if not path.is_file():
                raise OSError(_missing_in(path.parent, name))
            return path
        if path.is_file():
            return path
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(f"{quoted(source)} cannot be read here: {error.strerror}; check the path") from error
    if path.suffix == ".safetensors" or source.startswith((".", "/", "~", "\\")):
        raise OSError(f"there is no file or folder {one_line(source)}; check the path{_split_hint(path)}")
    try:
        return fetch(source, name, options)
    except OSError as error:
        kind = other_kind(files=files_of(source, options)) if is_missing(error) else None
        if kind is None:
            raise
        raise OSError(f"{source} has no file {one_line(name)}; it holds {kind}") from error.__cause__


def _missing_in(folder: Path, name: str) -> str:
    """Returns the message for a folder without the file; it names another kind of adapter that the folder holds."""
    files = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    kind = other_kind(files=files)
    advice = f"the folder holds {kind}" if kind else "give weight_name= if the file has another name"
    return f"there is no {one_line(name)} in {one_line(folder)}; {advice}"


def _split_hint(path: Path) -> str:
    """Returns a hint for a path that does not exist here but may mean a file of a Hub repository."""
    user, name, *folder = path.parts[:-1] if not path.is_absolute() and len(path.parts) > 2 else ("", "")
    if not user or user.startswith((".", "~")):
        return ""
    beside = f", subfolder={'/'.join(folder)!r}" if folder else ""
    return f", or for a file of a Hub repository write {user + '/' + name!r}, weight_name={path.name!r}{beside}"


def _refuse_other_kind(names: Iterable[object], where: str) -> None:
    """Raises for adapters of other methods, such as LoRA, which are recognised by the names of their tensors."""
    names = list(names)
    kind = other_kind(tensors=names) if "tokens" not in names else None
    if kind:
        raise ValueError(f"{where} holds no soft tokens: it is {kind}")


def _refuse_pickle(path: Path, head: bytes = b"") -> None:
    """Raises for a pickle, which is recognised by its name or its first bytes."""
    if path.suffix in _PICKLES or head.startswith(_PICKLE_HEADS):
        raise ValueError(
            f"adapters are safetensors files, but {path} is a pickle, which may run code when read; "
            "convert it with `python -m diffusers_softrepa.convert`"
        )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and the metadata of a safetensors file."""
    _refuse_pickle(path)
    where = one_line(path)
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            # Tensors of other names are refused by name; their values are not read.
            tensors = {name: file.get_tensor(name) if name in _OURS else torch.empty(0) for name in names}
            metadata = file.metadata() or {}
    except OSError:
        raise
    except Exception as error:  # safetensors raises many kinds of errors for a damaged header
        with path.open("rb") as content:
            _refuse_pickle(path, content.read(4))
        raise ValueError(
            f"{where} is no complete safetensors file ({one_line(error, 120)}); download or save it again"
        ) from error
    _refuse_other_kind(names, where)
    return tensors, metadata


def _config_of(path: Path, metadata: Mapping[str, str], source: str, options: HubOptions) -> SoftREPAConfig:
    """Returns the config in the file's metadata or, if there is none, in the JSON file beside it."""
    where, text = one_line(path), metadata.get(METADATA_KEY)
    content: str | bytes = text or b""
    if text is None:
        beside = _config_beside(path, source, options)
        where = one_line(beside)
        with beside.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
    try:
        values = parse_json(content, "it", max_bytes=MAX_CONFIG_BYTES)
    except UnreadableJSON as error:
        raise ValueError(f"the adapter config in {where} is not JSON ({error}); save the adapter again") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"the adapter config in {where} must be a JSON object, but is {quoted(values)}; save it again"
        )
    try:
        return SoftREPAConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} holds no SoftREPA config: {one_line(error, 400)}") from error


def _config_beside(path: Path, source: str, options: HubOptions) -> Path:
    """Returns the path of the JSON config beside the weights, downloaded if these came from the Hub."""
    try:
        if not Path(source).exists():
            weights = PurePosixPath(options.weight_name or WEIGHTS_NAME)
            return fetch(source, str(weights.with_name(CONFIG_NAME)), options)
        if path.with_name(CONFIG_NAME).is_file():
            return path.with_name(CONFIG_NAME)
        raise OSError(f"there is no {path.with_name(CONFIG_NAME)}")
    except OSError as error:
        if not is_missing(error) and error.__cause__ is not None:  # it may exist, but could not be downloaded
            raise
        raise ValueError(
            f"{one_line(path)} carries no SoftREPA config in its metadata and has no {CONFIG_NAME} beside it; if it "
            "is a SoftREPA adapter, pass config=SoftREPAConfig.for_denoiser(...)"
        ) from error


def _with_sorted_header(content: bytes) -> bytes:
    """Returns the bytes of a safetensors file with a sorted header, so that equal adapters give equal files.

    A file holds the header's length in 8 bytes, the header as JSON padded to a multiple of 8, and the values.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]
