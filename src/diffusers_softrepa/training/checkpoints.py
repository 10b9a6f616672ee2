"""Checkpoints of a run, written completely or not at all, and read without running pickled code.

A checkpoint is a folder `checkpoint-<step>` with the adapter, which `load_softrepa` reads, `training_state.pt`
(settings, optimizer, schedule, moving average, position in the data, counters), and `manifest.json` with the SHA-256
of these files. All files are on the disk before the folder gets its name. Noise, timesteps and the order of the data
are drawn from the seed and the step, so a resumed run draws the numbers that the interrupted one would have drawn.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import CONFIG_NAME, WEIGHTS_NAME, load_checkpoint, save_checkpoint
from ..config import SoftREPAConfig
from ..files import move_into_place, read_json, whole_file, write_whole
from ..quoting import one_line
from .arguments import RENAMED

logger = logging.getLogger(__name__)

STATE_NAME = "training_state.pt"
MANIFEST_NAME = "manifest.json"
BEST_FOLDER = "best"
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,14})")
_FILES = (CONFIG_NAME, WEIGHTS_NAME, STATE_NAME)  # those of the manifest
# Settings that a resumed run may change; the loader checks those that the position in the data depends on.
# fmt: off
_MAY_CHANGE = frozenset((
    "output_dir", "max_steps", "num_train_epochs", "train_batch_size", "pair_chunk_size", "gradient_checkpointing",
    "cache_text", "cache_dir", "max_cache_gigabytes", "dataloader_num_workers", "max_broken", "logging_steps",
    "report_to", "validation_prompts", "eval_steps", "validation_seed", "num_validation_inference_steps",
    "validation_guidance_scale", "num_evaluation_batches", "metric_for_best_model", "greater_is_better",
    "save_steps", "checkpoints_total_limit", "resume_from_checkpoint", "max_nonfinite_steps", "push_to_hub",
    "hub_model_id", "hub_private_repo", "hub_license", "dry_run",
    "torch_compile", "torch_compile_backend", "torch_compile_mode",
))
# fmt: on


class DamagedCheckpoint(ValueError):
    """A checkpoint with a file that is missing, cut off or changed."""


class Checkpoints:
    """The checkpoints in an output folder.

    Args:
        output_dir: The output folder.
        limit: Number of checkpoints that are kept; defaults to None, all.
    """

    def __init__(self, output_dir: str | os.PathLike[str], limit: int | None = None) -> None:
        self._folder = Path(output_dir)
        self._limit = limit

    def save(self, step: int, config: SoftREPAConfig, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Writes the checkpoint of a step and removes the oldest beyond the limit.

        Raises:
            OSError: The disk is full or cannot be written; the earlier checkpoints are untouched.
        """
        final = self._folder / f"checkpoint-{step}"
        partial = self._folder / f".checkpoint-{step}.partial"
        try:
            for remains in self._folder.glob(".checkpoint-*"):  # of a run that was killed
                _remove_all(remains)
            save_checkpoint(partial, config, tensors)
            with whole_file(partial / STATE_NAME) as file:
                torch.save(dict(state), file)
            write_whole(partial / MANIFEST_NAME, json.dumps(_digests(partial), indent=2))
            if final.exists():
                self._remove(final)
            move_into_place(partial, final)
        except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
            _remove_all(partial)
            last = self.latest()
            failed = OSError(
                f"the checkpoint of step {step} could not be written to {self._folder}: {error}; make room there and "
                f"resume from {last.name if last else 'the start: there is no checkpoint yet'}"
            )
            failed.errno = getattr(error, "errno", None) or errno.EIO  # it failed, the settings were right
            raise failed from error
        for old in self.all()[: -self._limit] if self._limit else []:
            self._remove(old)
        return final

    def all(self) -> list[Path]:
        """Returns the complete checkpoints, oldest first."""
        if not self._folder.is_dir():
            return []
        found = [path for path in self._folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted((path for path in found if (path / STATE_NAME).is_file()), key=_step_of)

    def latest(self) -> Path | None:
        """Returns the newest complete checkpoint, None when there is none."""
        return next(reversed(self.all()), None)

    def read(self, wanted: str) -> "Checkpoint | None":
        """Returns the checkpoint that `resume_from_checkpoint` names; None for `latest` before the first one.

        `latest` is the newest one that is not damaged; damaged ones are skipped with a warning.

        Raises:
            ValueError: There is no such checkpoint.
            DamagedCheckpoint: It is damaged, or all are; the message names the newest undamaged one before it.
        """
        if wanted != "latest":
            return self._read_one(self._find(wanted))
        damaged: DamagedCheckpoint | None = None
        for path in reversed(self.all()):
            try:
                return read_checkpoint(path)
            except DamagedCheckpoint as error:
                damaged = error
                logger.warning("%s; the one before it is taken", error)
        if damaged is not None:
            raise DamagedCheckpoint(f"{damaged}; none in {self._folder} is whole: remove them to start afresh")
        return None

    def check_none_after(self, step: int) -> None:
        """Checks that the folder has no undamaged checkpoints of later steps, which the run would mix with its own.

        Raises:
            ValueError: It has.
        """
        later = [path.name for path in self.all() if _step_of(path) > step and _is_whole(path)]
        if later:
            raise ValueError(
                f"training would start at step {step}, but {self._folder} holds {', '.join(later)} of another run; go "
                "on from there with resume_from_checkpoint='latest', remove them, or choose another output_dir"
            )

    def check_room(self, num_bytes: int, count: int) -> None:
        """Checks that the disk has room for `count` checkpoints of `num_bytes` each, or for as many as are kept.

        Raises:
            OSError: It has not.
        """
        count = min(count, self._limit + 1) if self._limit else count  # the oldest goes when the newest is there
        there = next(folder for folder in (self._folder, *self._folder.absolute().parents) if folder.exists())
        free = shutil.disk_usage(there).free
        if num_bytes * count > free:
            raise OSError(
                f"{count} checkpoints of about {num_bytes / 1e6:.1f} MB do not fit on the disk of {self._folder}, "
                f"which has {free / 1e6:.1f} MB free; make room, set a smaller checkpoints_total_limit or a larger "
                "save_steps, or choose another output_dir"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the folder against other runs inside the block; the system ends the lock when the process ends.

        There is no lock on Windows, and on disks without locks.

        Raises:
            ValueError: Another run has the lock.
            OSError: The folder cannot be created.
        """
        if self._folder.is_file():
            raise ValueError(f"output_dir must be a folder, but {self._folder} is a file; name a folder")
        self._folder.mkdir(parents=True, exist_ok=True)
        if os.name != "posix":
            yield
            return
        import fcntl

        handle = os.open(self._folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another run is training in {self._folder} now, and two would overwrite each other's files; wait "
                    "until it has ended, or choose another output_dir"
                ) from None
            except OSError as error:
                logger.info("%s cannot be locked (%s): do not start another run in it", self._folder, error)
            yield
        finally:
            os.close(handle)

    def _find(self, wanted: str) -> Path:
        for path in (Path(wanted), self._folder / wanted):
            if wanted and (path / STATE_NAME).is_file():
                return path
        raise ValueError(
            f"resume_from_checkpoint={wanted!r} is no checkpoint folder; there are "
            f"{[path.name for path in self.all()] or 'none'} in {self._folder}"
        )

    def _read_one(self, path: Path) -> "Checkpoint":
        try:
            return read_checkpoint(path)
        except DamagedCheckpoint as error:
            before = [other for other in Checkpoints(path.parent).all() if _step_of(other) < _step_of(path)]
            whole = next((other.name for other in reversed(before) if _is_whole(other)), None)
            advice = f"the newest whole one before it is {whole}" if whole else "there is no whole one before it"
            raise DamagedCheckpoint(f"{error}; {advice}") from error

    def _remove(self, checkpoint: Path) -> None:
        """Removes a checkpoint under another name, so that no incomplete one is ever found."""
        dying = self._folder / f".{checkpoint.name}.old"
        _remove_all(dying)
        os.replace(checkpoint, dying)
        _remove_all(dying)


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint.

    Attributes:
        path: Its folder.
        config: Config of the adapter.
        tensors: Tensors of the adapter.
        state: The state that `Checkpoints.save` was given.
    """

    path: Path
    config: SoftREPAConfig
    tensors: dict[str, Tensor]
    state: dict[str, Any]

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Compares the settings that it was saved under with those of the run that resumes it.

        Raises:
            ValueError: A setting that the result depends on is different.
        """
        saved = {RENAMED.get(name, name): value for name, value in self.state["settings"].items()}
        names = [name for name in settings if name in saved and name not in _MAY_CHANGE]
        changed = {name: (saved[name], settings[name]) for name in names if saved[name] != settings[name]}
        if changed:
            raise ValueError(
                f"{self.path} was saved under other settings (saved, now): {changed}; go on with those, or start "
                "afresh in another output_dir"
            )


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint without running pickled code.

    Raises:
        DamagedCheckpoint: A file is missing, cut off or changed.
    """
    try:
        kept, found = read_json(path / MANIFEST_NAME), _digests(path)
        if kept != found:
            names = [name for name in _FILES if not isinstance(kept, dict) or kept.get(name) != found[name]]
            raise ValueError(f"{' and '.join(names) or MANIFEST_NAME} is not as it was written")
        config, tensors = load_checkpoint(path)
        state = torch.load(path / STATE_NAME, map_location="cpu", weights_only=True)
        if _NAME.fullmatch(path.name) and state["step"] != _step_of(path):
            raise ValueError(f"{STATE_NAME} is of step {state['step']!r}")
    except Exception as error:  # whatever the readers of damaged files raise
        raise DamagedCheckpoint(f"{path} is damaged: {one_line(error, 300) or type(error).__name__}") from error
    return Checkpoint(path, config, tensors, state)


def _is_whole(path: Path) -> bool:
    try:
        read_checkpoint(path)
    except DamagedCheckpoint:
        return False
    return True


def _digests(path: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file of a checkpoint; raises OSError where one is missing."""
    return {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in _FILES}


def is_checkpoint_name(name: str) -> bool:
    """Whether a name is that of a checkpoint, such as `checkpoint-100`."""
    return _NAME.fullmatch(name) is not None


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _remove_all(path: Path) -> None:
    """Removes a folder or a file, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
