"""A cache of tensors on the disk, for the latents of images and the encoded captions.

Each entry is a safetensors file of its own, which appears under its name when it is complete: a cache whose process
was killed is filled further from there. The folder is a hash of everything that the entries depend on (model, size,
precision, ...), so other settings use another folder.

    directory/<hash of the settings>/settings.json
    directory/<hash of the settings>/<2 digits>/<hash of the entry's name>.safetensors
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
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ...files import write_whole
from ...fingerprints import fingerprint, weights_fingerprint
from ...quoting import human_bytes

logger = logging.getLogger(__name__)

ENCODE_BATCH_SIZE = 16

_HEADER_BYTES = 256  # of a file with a few tensors, generously
_BLOCK_BYTES = 4096  # in which a file system hands out the disk
_STALE_SECONDS = 3600.0

Entry = Mapping[str, Tensor]


class CacheTooLarge(ValueError):
    """The cache would be larger than allowed, or than the disk has room for."""


@final
class TensorCache:
    """Named dicts of tensors in a folder.

    Args:
        directory: Folder of all caches; created if it does not exist.
        settings: Everything that the entries depend on, as JSON, such as `model_fingerprint(...)` and
            `Framing.settings(...)`.
        max_cache_bytes: Most bytes that `directory` may take on the disk; defaults to None, no limit.
    """

    def __init__(
        self, directory: str | os.PathLike[str], settings: Mapping[str, Any], *, max_cache_bytes: int | None = None
    ) -> None:
        text = json.dumps(settings, sort_keys=True, indent=2, default=str)
        self.folder = Path(directory) / fingerprint(text)
        self.max_cache_bytes = max_cache_bytes
        self._present: int | None = None  # bytes when last counted, and what this process has written since
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write(self.folder / "settings.json", text.encode())

    def __contains__(self, name: str) -> bool:
        with suppress(FileNotFoundError, SafetensorError), safe_open(self._path(name), "pt"):
            return True  # opening reads the header and compares it with the length of the file
        return False

    def get(self, name: str) -> dict[str, Tensor] | None:
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

    def put(self, name: str, tensors: Entry) -> None:
        """Writes an entry, completely or not at all.

        Raises:
            OSError: The disk is full or cannot be written.
        """
        path = self._path(name)
        path.parent.mkdir(exist_ok=True)
        # Copies, so that a view is stored without the rest of the tensor that it looks into.
        content = save({key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()})
        self._write(path, content)
        if self._present is not None:
            self._present += _on_disk(len(content))

    def fill(
        self,
        names: Iterable[str],
        encode: Callable[[list[str]], Mapping[str, Entry]],
        *,
        batch_size: int = ENCODE_BATCH_SIZE,
        rank: int = 0,
        world_size: int = 1,
        stop: Callable[[], bool] = lambda: False,
    ) -> int:
        """Computes and stores the missing entries; the size of the first one is announced, or refused, before.

        Args:
            names: Names of all entries: captions, or names of images.
            encode: Function from names to their entries; one that cannot be computed is left out.
            batch_size: Names per call of `encode`; defaults to 16.
            rank: Number of this process, which computes every `world_size`-th entry; defaults to 0.
            world_size: Number of processes that fill the cache together; defaults to 1.
            stop: Function that is called before each batch; filling stops where it returns True.

        Returns:
            How many entries this process wrote.

        Raises:
            CacheTooLarge: The entries would not fit.
            OSError: The disk is full or cannot be written.
        """
        names = list(dict.fromkeys(names))
        missing = dict.fromkeys(self.missing(names))
        if missing:
            self._remove_stale()
        mine = [name for name in names[rank::world_size] if name in missing]
        written = 0
        for start in range(0, len(mine), batch_size):
            if stop():
                break
            for name, entry in encode(mine[start : start + batch_size]).items():
                if not written:
                    self._check_room(entry, len(missing))
                self.put(name, entry)
                written += 1
        return written

    def missing(self, names: Iterable[str]) -> list[str]:
        """Returns the names without a complete entry, each once."""
        return [name for name in dict.fromkeys(names) if name not in self]

    def num_bytes(self) -> int:
        """Returns what all caches in the directory take on the disk."""
        return sum(_on_disk(path.stat().st_size) for path in self.folder.parent.glob("*/*/*.safetensors"))

    def _check_room(self, entry: Entry, count: int) -> None:
        """Logs how much `count` entries like this one will take; errors as in `fill`."""
        if self._present is None:
            self._present = self.num_bytes()
        needed, present = estimate(entry, count), self._present
        free = shutil.disk_usage(self.folder).free
        what = f"{count} entries of {human_bytes(estimate(entry, 1))} take {human_bytes(needed)}"
        there = f"{human_bytes(present)} are in {self.folder.parent} and the disk has {human_bytes(free)} free"
        if self.max_cache_bytes is not None and present + needed > self.max_cache_bytes:
            raise CacheTooLarge(
                f"the cache may take {human_bytes(self.max_cache_bytes)}, but {what} where {there}; raise "
                "max_cache_gigabytes, delete what other settings left there, or encode without a cache"
            )
        if needed > free:
            raise CacheTooLarge(f"{what}, but {there}; choose another disk, or encode without a cache")
        few = needed < present / 100  # a cache that is filled step by step is not announced at every step
        logger.log(logging.DEBUG if few else logging.INFO, "caching %s: %s; %s", self.folder, what, there)

    def _remove_stale(self) -> None:
        """Removes files that killed processes left, but none that another process may be writing."""
        for path in self.folder.glob("**/*.partial"):
            with suppress(FileNotFoundError):  # renamed by another process meanwhile
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest[:32]}.safetensors"

    def _write(self, path: Path, content: bytes) -> None:
        try:
            write_whole(path, content, durable=False)  # a file that a power cut damages counts as missing
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            what = f"the disk is full: {human_bytes(len(content))} more of the cache could not be written; what is"
            raise OSError(error.errno, f"{what} there stays and is used when filling goes on", str(path)) from error


def estimate(entry: Entry, count: int) -> int:
    """Returns the bytes on the disk of `count` entries like this one, whose tensors may be on the `meta` device."""
    return count * _on_disk(sum(tensor.nbytes for tensor in entry.values()) + _HEADER_BYTES)


def model_fingerprint(model: nn.Module) -> str:
    """Returns a short text that is the same for the same model: a hash of its class, config and some of its weights.

    Weights that are not in memory (`meta`) count by shape and dtype.
    """
    config = getattr(model, "config", {})
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    config = {key: value for key, value in config.items() if not key.startswith("_") and key != "transformers_version"}
    return fingerprint(
        json.dumps([type(model).__name__, config, weights_fingerprint(model)], sort_keys=True, default=str)
    )


def _on_disk(size: int) -> int:
    return math.ceil(size / _BLOCK_BYTES) * _BLOCK_BYTES
