"""Two processes are one process with twice the batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from training_runs import log_of, start, trainer

BATCH = 4
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"data": "plain"},
    "hard negatives and repeated captions": {
        "data": "repeated",
        "negative_caption_column": "not_text",
        "ema_decay": 0.5,
        "max_grad_norm": 0.01,
        "gradient_accumulation_steps": 2,
    },
    "agsm with several captions and shared draws": {
        "data": "captions",
        "objective": "agsm",
        "temperature": 0.07,
        "share_timestep": True,
        "share_noise": True,
    },
    "a stream": {"data": "stream", "lr_scheduler": "cosine"},
}
# Adam divides by the gradient's own size, so that rounding in a nearly vanishing gradient would show.
SETTINGS = {"optim": "SGD", "optim_args": '{"momentum": 0.9}', "learning_rate": 1.0, "num_eval": 4}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs as two processes leave them, by name."""
    folder = tmp_path_factory.mktemp("two")
    runs = [
        {"output_dir": str(folder / name), "train_batch_size": BATCH // 2, **SETTINGS, **settings}
        for name, settings in RUNS.items()
    ]
    # What `accelerate launch` runs for several processes; on processors alone it wants mpirun instead.
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 2"
    process = start(runs, folder / "said.txt", *launcher.split())
    assert process.wait(300) == 0, (folder / "said.txt").read_text()[-4000:]
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_end_as_one_with_twice_the_batch(two_processes: Path, tmp_path: Path, name: str):
    run = trainer(tmp_path, train_batch_size=BATCH, **SETTINGS, **RUNS[name])
    start = run.adapter.tokens.tokens.detach().clone()
    run.train()
    for file in ("adapter_model.safetensors", "checkpoint-6/adapter_model.safetensors"):
        one, two = (load_file(folder / file) for folder in (tmp_path, two_processes / name))
        for key in one:
            assert (one[key] - two[key]).abs().max() < 1e-6
    assert (load_file(tmp_path / "checkpoint-6/adapter_model.safetensors")["tokens"] - start).abs().max() > 1e-3
    logs = log_of(tmp_path), log_of(two_processes / name)
    assert len(logs[0]) == len(logs[1]) > 0
    for one, two in zip(*logs, strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=2e-5)


def test_a_run_of_two_processes_goes_on_in_one(two_processes: Path, tmp_path: Path):
    settings = SETTINGS | {"train_batch_size": BATCH, "max_steps": 6}
    resumed = trainer(
        tmp_path, **settings, resume_from_checkpoint=str(two_processes / "plain" / "checkpoint-4"), save_steps=6
    )
    resumed.train()
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, two_processes / "plain"))
    assert all(torch.allclose(one[key], two[key], atol=1e-6) for key in one)
