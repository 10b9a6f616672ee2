"""What a run writes down: a line of JSON for each entry, the same to the trackers that are on, and a progress bar."""

import json
import logging
import math
import sys
from pathlib import Path
from typing import Any, final

import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from ..files import UnreadableJSON, parse_json, write_whole
from .callbacks import TrainerCallback, TrainerState

logger = logging.getLogger(__name__)

LOG_NAME = "log.jsonl"
_SHOWN = ("loss", "top1", "pairs_per_second")


def read_log(path: Path) -> list[dict[str, float]]:
    """Returns the entries of a log, oldest first; none where there is no log.

    A killed run may have left half a line at the end. Other lines that are no entries are left out with a warning.
    """
    entries, damaged = [], []
    *lines, _torn = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(lines, start=1):
        try:
            entry = parse_json(line, f"line {number}")
        except UnreadableJSON:
            entry = None
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
        else:
            damaged.append(number)
    if damaged:
        logger.warning("lines %s of %s are no entries of a log and are left out", damaged, path)
    return entries


def show(accelerator: Accelerator, step: int, name: str, picture: Image.Image) -> None:
    """Hands a picture to the trackers that take pictures."""
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        if hasattr(tracker, "log_images"):
            tracker.log_images({name: np.asarray(picture)[None]}, step=step, **layout)


@final
class LogCallback(TrainerCallback):
    """Keeps `log.jsonl` in the output folder and the trackers; the main process writes.

    Args:
        accelerator: Knows the processes and the trackers.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Starts the trackers, and forgets the entries that a run which goes on will make again."""
        path, step = Path(args.output_dir) / LOG_NAME, state.global_step
        if state.is_world_process_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            state.log_history = [entry for entry in read_log(path) if step and entry["step"] <= step]
            write_whole(path, "".join(json.dumps(entry) + "\n" for entry in state.log_history))
        if self._accelerator.log_with:
            plain = {k: v if isinstance(v, int | float) else str(v) for k, v in args.to_dict().items()}
            self._accelerator.init_trackers("softrepa", config=plain)

    def on_log(self, args: Any, state: TrainerState, control: Any, **given: Any) -> None:
        """Writes figures down, without those that are not finite, which JSON does not know."""
        figures = {name: value for name, value in given["logs"].items() if math.isfinite(value)}
        if state.is_world_process_zero:
            with (Path(args.output_dir) / LOG_NAME).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **figures}) + "\n")
        self._accelerator.log(figures, step=state.global_step)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Ends the trackers. The processes stay joined: they may evaluate and push after training."""
        if state.is_world_process_zero:
            for tracker in self._accelerator.trackers:
                tracker.finish()

    on_exception = on_train_end


@final
class ProgressCallback(TrainerCallback):
    """Shows how far the run is, on the error stream of the main process."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="soft tokens",
            disable=not state.is_world_process_zero,
            file=sys.stderr,
        )

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self._bar.update()

    def on_log(self, args: Any, state: TrainerState, control: Any, **given: Any) -> None:
        shown = {name: f"{given['logs'][name]:.3g}" for name in _SHOWN if name in given["logs"]}
        if shown and self._bar is not None:
            self._bar.set_postfix(shown)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    on_exception = on_train_end
