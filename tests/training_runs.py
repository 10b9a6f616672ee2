"""Small training runs for the tests, in this process or as a program of their own: `python training_runs.py RUNS`.

RUNS is JSON: a list of {"data": name, "fatal": name or null, **arguments}.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

import tiny
from diffusers_softrepa.training.arguments import ContrastiveFlowMatchingArguments, with_new_names
from diffusers_softrepa.training.callbacks import TrainerCallback
from diffusers_softrepa.training.checkpoints import STATE_NAME
from diffusers_softrepa.training.log import read_log
from diffusers_softrepa.training.trainer import ContrastiveFlowMatchingTrainer

TIMES = ("seconds_per_step", "pairs_per_second")
QUICK: dict[str, Any] = {
    "resolution": 16,
    "train_batch_size": 3,
    "max_steps": 6,
    "save_steps": 2,
    "logging_steps": 1,
    "eval_steps": 3,
    "num_evaluation_batches": 1,
    "logits": "linear",
    "temperature": 1.0,
    "report_to": "none",
    "dataloader_num_workers": 1,
}


class Killed(BaseException):
    """Ends a run in this process as a kill does: nothing is caught, nothing is tidied up."""


def rows(count: int = 8, *, seed: int = 0, captions: int = 1, distinct: int | None = None) -> list[dict[str, Any]]:
    """Returns random images with captions, of which `distinct` are different, and a hard negative each."""
    rng = np.random.default_rng(seed)
    sides = [(20, 24), (18, 40), (40, 18)]
    return [
        {
            "image": Image.fromarray(rng.integers(0, 255, (*sides[number % 3], 3), dtype=np.uint8)),
            "text": [f"picture {number % (distinct or count)}, view {view}" for view in range(captions)],
            "not_text": [f"no picture {number}"],
        }
        for number in range(count)
    ]


def stream(count: int = 8) -> datasets.IterableDataset:
    """Returns the images as a stream."""

    def generate() -> Iterator[dict[str, Any]]:
        yield from ({"image": np.asarray(row["image"]).tolist(), "text": row["text"]} for row in rows(count))

    def decoded(row: dict[str, Any]) -> dict[str, Any]:
        return {"image": np.array(row["image"], dtype=np.uint8), "text": row["text"]}

    return datasets.IterableDataset.from_generator(generate).map(decoded)


DATA = {
    "plain": rows,
    "captions": lambda: rows(captions=3),
    "repeated": lambda: rows(distinct=3),
    "stream": stream,
    "buckets": lambda: rows(18),
}


def pipeline(name: str = "sd3") -> Any:
    """Returns a tiny pipeline, the same at every call."""
    torch.manual_seed(0)
    (family,) = (family for family in tiny.FAMILIES if family.name == name)
    return family.pipeline()


def trainer(
    output_dir: Path | str,
    data: Any = "plain",
    *,
    family: str = "sd3",
    num_eval: int = 4,
    callbacks: Any = (),
    **settings: Any,
) -> Any:
    """Returns a trainer of a tiny pipeline, with a few images to evaluate on."""
    args = ContrastiveFlowMatchingArguments(output_dir=str(output_dir), **QUICK | with_new_names(settings))
    train = DATA[data]() if isinstance(data, str) and data in DATA else data
    eval_rows = rows(num_eval, seed=1)
    return ContrastiveFlowMatchingTrainer(pipeline(family), args, train, eval_rows, callbacks=callbacks)


class At(TrainerCallback):
    """Does something at an event of a step.

    Args:
        event: Its name, such as `on_step_begin`.
        step: The `global_step` at which it is done; None for every one.
        action: Called with the trainer.
    """

    def __init__(self, event: str, step: int | None, action: Callable[[Any], Any]) -> None:
        def act(_args: Any, state: Any, _control: Any, **given: Any) -> None:
            if step is None or state.global_step == step:
                action(given["trainer"])

        setattr(self, event, act)


def train_until_killed(run: Any, fatal: str) -> None:
    """Trains until it is killed: `step-3` as step 3 would begin, `save-4` in the midst of writing checkpoint 4."""
    kind, number = fatal.split("-")
    if kind == "step":
        run.callbacks.callbacks.append(At("on_step_begin", int(number), _raise_killed))
    else:
        kill_in_save(run, int(number), _raise_killed)
    try:
        run.train()
    except Killed:
        return
    raise AssertionError("the run ended before it was to be killed")


def kill_in_save(run: Any, step: int, die: Any) -> None:
    """Lets a run die when the state of the checkpoint of a step is written by half."""

    def spoil(_run: Any) -> None:
        torch_save = torch.save

        def save(_state: Any, file: Any) -> None:
            torch.save = torch_save
            file.write(b"PK half a checkpoint")
            file.flush()
            die(_run)

        torch.save = save

    run.callbacks.callbacks.append(At("on_step_end", step, spoil))


def _raise_killed(_run: Any) -> None:
    raise Killed


def assert_same_run(one: Path, other: Path, *, step: int = QUICK["max_steps"]) -> None:
    """Compares all that two runs left: tokens, averages, optimizer, position, log and best adapter, bit by bit."""
    for name in (
        "adapter_model.safetensors",
        "best/adapter_model.safetensors",
        f"checkpoint-{step}/adapter_model.safetensors",
    ):
        weights = [folder / name for folder in (one, other)]
        assert weights[0].read_bytes() == weights[1].read_bytes(), name
    assert_same(state_of(one, step), state_of(other, step))
    assert log_of(one) == log_of(other)
    assert log_of(one)


def state_of(folder: Path, step: int) -> dict[str, Any]:
    """Returns the state of a checkpoint, without the settings, which name folders."""
    state = torch.load(folder / f"checkpoint-{step}" / STATE_NAME, weights_only=True)
    return {name: value for name, value in state.items() if name != "settings"}


def log_of(folder: Path) -> list[dict[str, float]]:
    """Returns the entries of a log, without times."""
    return [{k: v for k, v in entry.items() if k not in TIMES} for entry in read_log(folder / "log.jsonl")]


def assert_same(one: Any, other: Any, where: str = "state") -> None:
    """Compares nested states, tensors bit by bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{where}[{number}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one.nan_to_num(7e7), other.nan_to_num(7e7)), where
    else:
        assert one == other, where


def start(runs: list[dict[str, Any]], log: Path, *launcher: str) -> subprocess.Popen[bytes]:
    """Starts some runs as a program, under a launcher if one is given; what it says goes to a file."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "1"}
    command = [sys.executable, *launcher, str(Path(__file__)), json.dumps(runs)]
    with log.open("ab") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def main() -> None:
    torch.set_num_threads(1)
    for settings in json.loads(sys.argv[1]):
        fatal = settings.pop("fatal", None)
        run = trainer(**settings)
        if fatal is not None:
            kill_in_save(run, int(fatal), lambda _: os.kill(os.getpid(), signal.SIGKILL))
        print(f"finished: {run.train().finished}", flush=True)


if __name__ == "__main__":
    main()
