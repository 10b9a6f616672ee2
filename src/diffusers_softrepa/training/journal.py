"""What a run writes down: a line of JSON for each entry, and the same to the trackers that are on."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import numpy as np
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

LOG_NAME = "log.jsonl"


class Journal:
    """The log of a run, kept by the main process.

    Args:
        accelerator: Knows the processes and the trackers.
        output_dir: Where `log.jsonl` is.
        settings: What the trackers show of the run.
    """

    def __init__(self, accelerator: Accelerator, output_dir: str, settings: dict[str, Any]) -> None:
        self._accelerator = accelerator
        self._path = Path(output_dir) / LOG_NAME
        self._settings = {
            key: value if isinstance(value, int | float) else str(value) for key, value in settings.items()
        }

    def open(self, step: int) -> None:
        """Starts the trackers, and forgets the entries that a run which goes on at `step` will make again."""
        if self._accelerator.is_main_process:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            kept = [entry for entry in read_log(self._path) if step and entry["step"] <= step]
            partial = self._path.with_name(f".{LOG_NAME}.partial")
            partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
            os.replace(partial, self._path)
        if self._accelerator.log_with:
            self._accelerator.init_trackers("softrepa", config=self._settings)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Writes figures down, without those that are not finite, which JSON does not know."""
        figures = {name: value for name, value in figures.items() if math.isfinite(value)}
        if self._accelerator.is_main_process:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")
        self._accelerator.log(figures, step=step)

    def show(self, step: int, name: str, picture: Image.Image) -> None:
        """Hands a picture to the trackers that take pictures."""
        for tracker in self._accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: np.asarray(picture)[None]}, step=step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({name: np.asarray(picture)[None]}, step=step)

    def close(self) -> None:
        """Ends the trackers. The processes stay joined: they may evaluate and push after training."""
        if self._accelerator.is_main_process:
            for tracker in self._accelerator.trackers:
                tracker.finish()


@final
class Recent:
    """What the steps since the last log entry gave; kept in checkpoints, so that a resumed run logs the same means."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._losses: list[float] = []
        self._rows: list[dict[str, Tensor]] = []
        self._seconds, self._pairs, self._timed = 0.0, 0, 0

    def add(self, loss: float, rows: Mapping[str, Tensor], *, seconds: float, num_pairs: int) -> None:
        """Takes a step in: its loss, its rows' figures from `tell_apart`, and how long it took for how many pairs."""
        self._losses.append(loss)
        self._rows.append({name: value.cpu() for name, value in rows.items()})
        self._seconds, self._pairs, self._timed = self._seconds + seconds, self._pairs + num_pairs, self._timed + 1

    def take(self) -> tuple[dict[str, float], list[dict[str, Tensor]]]:
        """Returns the mean loss of the steps that were not skipped and their speed, and all rows; begins anew."""
        finite = [loss for loss in self._losses if math.isfinite(loss)]
        figures = {"loss": math.fsum(finite) / len(finite) if finite else math.nan}
        figures["seconds_per_step"] = self._seconds / max(1, self._timed)
        figures["pairs_per_second"] = self._pairs / max(self._seconds, 1e-9)
        rows = self._rows
        self._reset()
        return figures, rows

    def state_dict(self) -> dict[str, Any]:
        """Everything but the times, which are of this run."""
        return {"losses": list(self._losses), "rows": list(self._rows)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._losses, self._rows = list(state["losses"]), list(state["rows"])


def read_log(path: Path) -> list[dict[str, float]]:
    """Returns the entries of a log, oldest first; none where there is no log."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]  # a killed run may have left half a line
