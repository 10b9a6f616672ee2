"""The log of a run: `log.jsonl` and the trackers."""

import json
import logging
import math
from pathlib import Path
from typing import Any, final

import numpy as np
from accelerate import Accelerator
from PIL import Image

from ..files import UnreadableJSON, parse_json, write_whole
from .callbacks import TrainerCallback, TrainerState

logger = logging.getLogger(__name__)

LOG_NAME = "log.jsonl"
PROJECT = "softrepa"  # of the trackers; tensorboard writes into a folder of that name


def read_log(path: Path) -> list[dict[str, float]]:
    """Returns the entries of `log.jsonl`, oldest first; none where the file does not exist.

    A half-written last line, which a killed run leaves, is dropped. Other lines that are no entries are dropped with a
    warning.
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
        logger.warning("lines %s of %s are no log entries and are dropped", damaged, path)
    return entries


def show(accelerator: Accelerator, step: int, name: str, image: Image.Image) -> None:
    """Sends an image to the trackers that accept images."""
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        if hasattr(tracker, "log_images"):
            tracker.log_images({name: np.asarray(image)[None]}, step=step, **layout)


@final
class LogCallback(TrainerCallback):
    """Writes every log entry to `log.jsonl` in the output folder and to the trackers, in the main process.

    Args:
        accelerator: The accelerator with the trackers.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Starts the trackers, and removes the log entries of steps that a resumed run takes again."""
        path, step = Path(args.output_dir) / LOG_NAME, state.global_step
        if state.is_world_process_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            state.log_history = [entry for entry in read_log(path) if step and entry["step"] <= step]
            write_whole(path, "".join(json.dumps(entry) + "\n" for entry in state.log_history))
        if self._accelerator.log_with:
            plain = {k: v if isinstance(v, int | float) else str(v) for k, v in args.to_dict().items()}
            self._accelerator.init_trackers(PROJECT, config=plain)

    def on_log(self, args: Any, state: TrainerState, control: Any, **given: Any) -> None:
        """Writes the values of an entry, without NaN and infinity, which JSON does not have."""
        values = {name: value for name, value in given["logs"].items() if math.isfinite(value)}
        if state.is_world_process_zero:
            with (Path(args.output_dir) / LOG_NAME).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **values}) + "\n")
        self._accelerator.log(values, step=state.global_step)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Ends the trackers, not the process group: `evaluate` may be called after training."""
        if state.is_world_process_zero:
            for tracker in self._accelerator.trackers:
                tracker.finish()

    on_exception = on_train_end
