"""Checkpoints of a run: written whole or not at all, and read back without running any pickled code.

A checkpoint is a folder `checkpoint-<step>` with the adapter, as `load_softrepa` reads it, and `training_state.pt`:
settings, optimizer, schedule, moving average, position in the data, counters. Noise, timesteps and the order of the
data are drawn from the seed and the step, so a resumed run draws what the interrupted one would have drawn.
"""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import save_checkpoint
from ..config import SoftREPAConfig
from ..files import move_into_place, whole_file

STATE_NAME = "training_state.pt"
_NAME = re.compile(r"checkpoint-(\d+)")
# All others decide how training goes, or where the data stands, which the loader checks.
# fmt: off
_MAY_CHANGE = frozenset((
    "output_dir", "max_steps", "num_train_epochs", "train_batch_size", "pair_chunk_size", "gradient_checkpointing",
    "cache_text", "cache_dir", "max_cache_gigabytes", "dataloader_num_workers", "max_broken", "logging_steps",
    "report_to", "validation_prompts", "eval_steps", "validation_seed", "num_validation_inference_steps",
    "validation_guidance_scale", "num_evaluation_batches", "metric_for_best_model", "greater_is_better",
    "save_steps", "checkpoints_total_limit", "resume_from_checkpoint", "max_nonfinite_steps", "push_to_hub",
    "hub_model_id", "hub_private_repo", "hub_license", "dry_run",
))
# fmt: on


class Checkpoints:
    """The checkpoints in an output folder.

    Args:
        output_dir: The folder.
        limit: How many are kept; None for all.
    """

    def __init__(self, output_dir: str | os.PathLike[str], limit: int | None = None) -> None:
        self._folder = Path(output_dir)
        self._limit = limit

    def save(self, step: int, config: SoftREPAConfig, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Writes the checkpoint of a step and removes the oldest beyond the limit.

        Raises:
            OSError: The disk is full or not to be written; the checkpoints before this one are untouched.
        """
        final = self._folder / f"checkpoint-{step}"
        partial = self._folder / f".checkpoint-{step}.partial"
        for remains in self._folder.glob(".checkpoint-*"):  # of a run that was killed
            shutil.rmtree(remains, ignore_errors=True)
        try:
            save_checkpoint(partial, config, tensors)
            with whole_file(partial / STATE_NAME) as file:
                torch.save(dict(state), file)
            if final.exists():
                self._remove(final)
            move_into_place(partial, final)
        except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
            shutil.rmtree(partial, ignore_errors=True)
            last = self.latest()
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self._folder}: {error}; make room there and "
                f"resume from {last.name if last else 'the start: there is no checkpoint yet'}"
            ) from error
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

    def find(self, wanted: str) -> Path | None:
        """Returns the checkpoint folder that `resume_from_checkpoint` means; None for `latest` before the first one.

        Raises:
            ValueError: There is no such checkpoint.
        """
        if wanted == "latest":
            return self.latest()
        for path in (Path(wanted), self._folder / wanted):
            if (path / STATE_NAME).is_file():
                return path
        raise ValueError(
            f"resume_from_checkpoint={wanted!r} is no checkpoint folder; there are "
            f"{[path.name for path in self.all()] or 'none'} in {self._folder}"
        )

    def check_none_after(self, step: int) -> None:
        """Refuses to train from `step` on where later checkpoints are, which would be mixed with the new ones.

        Raises:
            ValueError: There are some.
        """
        later = [path.name for path in self.all() if _step_of(path) > step]
        if later:
            raise ValueError(
                f"training would start at step {step}, but {self._folder} holds {', '.join(later)} of another run; go "
                "on from there with resume_from_checkpoint='latest', remove them, or choose another output_dir"
            )

    def _remove(self, checkpoint: Path) -> None:
        """Removes a checkpoint so that it is never seen in part."""
        dying = self._folder / f".{checkpoint.name}.old"
        os.replace(checkpoint, dying)
        shutil.rmtree(dying)


def load_state(checkpoint: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `Checkpoints.save` was given as state, if it was saved under the same settings.

    Args:
        checkpoint: The folder.
        settings: Of the run that goes on; compared with `state["settings"]`.

    Raises:
        ValueError: A setting that decides how training goes is another one.
    """
    state = torch.load(checkpoint / STATE_NAME, map_location="cpu", weights_only=True)
    saved = state["settings"]
    names = [name for name in settings if name in saved and name not in _MAY_CHANGE]
    changed = {name: (saved[name], settings[name]) for name in names if saved[name] != settings[name]}
    if changed:
        raise ValueError(
            f"{checkpoint} was saved under other settings (saved, now): {changed}; go on with those, or start afresh "
            "in another output_dir"
        )
    return state


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))
