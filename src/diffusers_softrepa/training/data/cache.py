"""Encodings on the disk: latents of images, hidden states of captions. A choice, since encoding costs little.

Every entry is a safetensors file of its own that holds its numbers and a header of some hundred bytes, never the
storage of the batch it was computed in. Files appear under their name when they are whole, so a cache that was being
filled when its process died goes on where it stood. What the entries depend on (model, size, precision, ...) is their
key: another setting is another folder.

    directory/<key>/settings.json
    directory/<key>/<2 digits>/<hash of the entry's name>.safetensors
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ...files import write_whole
from ...quoting import human_bytes

logger = logging.getLogger(__name__)

_HEADER_BYTES = 256  # of a file with a few tensors, generously
_BLOCK_BYTES = 4096  # in which a file system hands out the disk
_STALE_SECONDS = 3600.0

Entry = dict[str, Tensor]


class CacheTooLarge(ValueError):
    """What would be cached is more than allowed, or more than the disk has room for."""


@final
class TensorCache:
    """Named dicts of tensors in a folder.

    Args:
        directory: Of all caches; made if absent.
        settings: All that the entries depend on, as JSON: `model_fingerprint(...)`, size and crop
            (`Framing.settings`), dtype, text length. Its hash is the key.
        max_cache_bytes: The most that the directory may take on the disk, under all keys together; None for as much
            as is free.
    """

    def __init__(
        self, directory: str | os.PathLike[str], settings: Mapping[str, Any], *, max_cache_bytes: int | None = None
    ) -> None:
        text = json.dumps(settings, sort_keys=True, indent=2, default=str)
        self.folder = Path(directory) / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.max_cache_bytes = max_cache_bytes
        self._present: int | None = None  # bytes when last counted, and what this process has written since
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write(self.folder / "settings.json", text.encode())

    def __contains__(self, name: str) -> bool:
        return _is_whole(self._path(name))

    def get(self, name: str) -> Entry | None:
        """Reads an entry; None if there is none, or its file is damaged."""
        path = self._path(name)
        try:
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
        except FileNotFoundError:
            return None
        except SafetensorError as error:
            logger.warning("the cached %s is damaged (%s) and counts as missing", path, error)
            return None

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes an entry, whole or not at all.

        Raises:
            OSError: The disk is full, or cannot be written.
        """
        path = self._path(name)
        path.parent.mkdir(exist_ok=True)
        content = _serialise(tensors)
        self._write(path, content)
        if self._present is not None:
            self._present += _on_disk(len(content))

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of the names, each once, that have no whole entry."""
        return [name for name in dict.fromkeys(names) if name not in self]

    def num_bytes(self) -> int:
        """What the whole directory takes on the disk now, entries under other keys included."""
        return sum(_on_disk(path.stat().st_size) for path in self.folder.parent.glob("*/*/*.safetensors"))

    def announce(self, entry: Mapping[str, Tensor], count: int) -> int:
        """Says how much will be written, before it is.

        Args:
            entry: The tensors of one entry, as for `estimate`.
            count: Entries to write.

        Returns:
            The bytes on the disk that they will take.

        Raises:
            CacheTooLarge: With what is there it would be more than `max_cache_bytes`, or more than the disk has free.
        """
        if self._present is None:
            self._present = self.num_bytes()
        needed, present = estimate(entry, count), self._present
        free = shutil.disk_usage(self.folder).free
        what = f"{count} entries of {human_bytes(estimate(entry, 1))} take {human_bytes(needed)}"
        there = f"{human_bytes(present)} are in {self.folder.parent} and the disk has {human_bytes(free)} free"
        if self.max_cache_bytes is not None and present + needed > self.max_cache_bytes:
            raise CacheTooLarge(
                f"the cache may take {human_bytes(self.max_cache_bytes)}, but {what} where {there}; raise "
                "max_cache_bytes, delete what other settings left there, or encode without a cache"
            )
        if needed > free:
            raise CacheTooLarge(f"{what}, but {there}; choose another disk, or encode without a cache")
        few = needed < present / 100  # when it is filled step by step, not every step is news
        logger.log(logging.DEBUG if few else logging.INFO, "caching %s: %s; %s", self.folder, what, there)
        return needed

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest[:32]}.safetensors"

    def _write(self, path: Path, content: bytes) -> None:
        try:
            write_whole(path, content, durable=False)  # what a power cut damages counts as missing
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OSError(
                errno.ENOSPC,
                f"the disk is full: {human_bytes(len(content))} more of the cache could not be written; what is there "
                "stays and is used when filling goes on",
                str(self.folder),
            ) from error


def fill(
    cache: TensorCache,
    names: Iterable[str],
    compute: Callable[[list[str]], Sequence[Mapping[str, Tensor] | None]],
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Computes and stores what is missing.

    The first batch shows how large an entry is; that is announced, or refused, before anything is written.

    Args:
        cache: Where to.
        names: Of all entries that are wanted: captions, or the names of images.
        compute: For the named entries, in their order; None for one that cannot be computed, and is left out.
        batch_size: Names per call of `compute`.
        rank: Of this process, which computes every `world_size`-th of them.
        world_size: Processes that fill the cache together.
        stop: Asked before each batch whether to leave the rest for another time.

    Returns:
        How many entries this process wrote.

    Raises:
        CacheTooLarge: They would not fit.
        ValueError: `compute` returned another number of entries than it was asked for.
        OSError: The disk is full, or cannot be written.
    """
    names = list(dict.fromkeys(names))
    missing = dict.fromkeys(cache.missing(names))
    if missing:
        _remove_stale(cache.folder)
    written, announced = 0, False
    for batch in _batches([name for name in names[rank::world_size] if name in missing], batch_size):
        if stop():
            break
        entries = compute(batch)
        if len(entries) != len(batch):
            raise ValueError(
                f"compute must return one entry per name but got {len(batch)} names, {len(entries)} entries"
            )
        for name, entry in zip(batch, entries, strict=True):
            if entry is None:
                continue
            if not announced:
                cache.announce(entry, len(missing))
                announced = True
            cache.put(name, entry)
            written += 1
    return written


def estimate(entry: Mapping[str, Tensor], count: int) -> int:
    """Bytes on the disk that a cache takes.

    Args:
        entry: The tensors of one entry; for a plan before there is a model, empty ones on the `meta` device.
        count: Entries: images, or different captions and hard negatives.
    """
    return count * _on_disk(sum(tensor.nbytes for tensor in entry.values()) + _HEADER_BYTES)


def model_fingerprint(model: nn.Module, name: str = "") -> str:
    """A short text that is the same for the same model: its name, class, config and a few of its weights.

    Args:
        model: An encoder; weights that are not in memory (`meta`) are left out.
        name: Path or Hub name, if it should count.
    """
    config = getattr(model, "config", {})
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    config = {key: value for key, value in config.items() if not key.startswith("_") and key != "transformers_version"}
    digest = hashlib.sha256(json.dumps([name, type(model).__name__, config], sort_keys=True, default=str).encode())
    weights = list(model.named_parameters())
    for key, weight in weights[:: max(1, len(weights) // 16)]:
        digest.update(f"{key} {tuple(weight.shape)} {weight.dtype} ".encode())
        values = weight.data
        if type(values) is Tensor and not values.is_meta:  # some quantised weights are tensors of another class
            digest.update(values.flatten()[:16].cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _serialise(tensors: Mapping[str, Tensor]) -> bytes:
    """Copies to the CPU, so that a view brings its own numbers and not the storage that it looks into."""
    return save({key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()})


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):  # reads the header and compares it with the length of the file
            return True
    except (FileNotFoundError, SafetensorError):
        return False


def _remove_stale(folder: Path) -> None:
    """Removes what killed processes left, not what others are writing now."""
    for path in folder.glob("**/*.partial"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()
        except FileNotFoundError:  # renamed by another process meanwhile
            continue


def _batches(names: list[str], size: int) -> Iterator[list[str]]:
    left = iter(names)
    while batch := list(islice(left, size)):
        yield batch


def _on_disk(size: int) -> int:
    return math.ceil(size / _BLOCK_BYTES) * _BLOCK_BYTES
