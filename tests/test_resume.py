"""A run that was killed and resumed leaves, bit by bit, what one that was not leaves."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from diffusers_softrepa.training.checkpoints import STATE_NAME
from diffusers_softrepa.training.log import read_log
from training_runs import At, assert_same_run, start, train_until_killed, trainer

RUNS: dict[str, dict[str, Any]] = {
    "accumulation, clipping and an average": {
        "gradient_accumulation_steps": 3,
        "max_grad_norm": 1e-3,
        "ema_decay": 0.5,
    },
    "agsm": {"objective": "agsm"},
    "captions and hard negatives": {
        "data": "captions",
        "negative_caption_column": "not_text",
        "num_backward_negatives": 1,
    },
    "buckets": {"data": "buckets", "num_eval": 9, "aspect_buckets": True, "random_crop": True, "random_flip": True},
    "a stream": {"data": "stream"},
    "warm restarts": {"lr_update_steps": 1, "lr_restart_period": 2, "optim": "SGD", "logging_steps": 4},
    "cosine": {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "logging_steps": 4},
    "caches": {"cache_latents": True, "cache_text": True, "objective": "soft_rank", "temperature": 0.5},
}

RUNS_DIE_AT = dict(zip(RUNS, ("save-4", "step-3", "step-5") * len(RUNS), strict=False))


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path: Path, name: str):
    settings = RUNS[name]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert trainer(whole, **settings).train().finished
    train_until_killed(trainer(killed, **settings), RUNS_DIE_AT[name])
    assert trainer(killed, **settings, resume_from_checkpoint="latest").train().finished
    assert_same_run(whole, killed)


def test_a_run_may_be_killed_as_often_as_you_like(tmp_path: Path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    trainer(whole, save_steps=1).train()
    for fatal in ("step-0", "save-1", "step-2", "save-3", "save-4", "step-5"):
        train_until_killed(trainer(killed, save_steps=1, resume_from_checkpoint="latest"), fatal)
    trainer(killed, save_steps=1, resume_from_checkpoint="latest").train()
    assert_same_run(whole, killed)


def test_sigkill_at_any_moment_loses_nothing(tmp_path: Path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = {"objective": "agsm", "max_steps": 12}
    trainer(whole, **settings).train()
    resumed = settings | {"output_dir": str(killed), "resume_from_checkpoint": "latest"}
    midway = start([resumed | {"fatal": "4"}], tmp_path / "said.txt")  # in the midst of writing checkpoint 4
    assert midway.wait(120) == -signal.SIGKILL, (tmp_path / "said.txt").read_text()
    assert [path.name for path in sorted(killed.glob("*checkpoint-*"))] == [".checkpoint-4.partial", "checkpoint-2"]
    kill_at(start([resumed], tmp_path / "said.txt"), killed / "log.jsonl", random.randrange(5, 12))
    trainer(killed, **settings, resume_from_checkpoint="latest").train()
    assert_same_run(whole, killed, step=12)
    assert not list(killed.glob(".*"))


def kill_at(process: subprocess.Popen[bytes], log: Path, step: int) -> None:
    """Kills a run, somewhere in the step after `step`."""
    while process.poll() is None and not any(entry["step"] >= step for entry in read_log(log)):
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.1))
    process.kill()
    process.wait()


def test_sigterm_saves_and_exits_with_0(tmp_path: Path):
    whole, stopped, said = tmp_path / "whole", tmp_path / "stopped", tmp_path / "said.txt"
    process = start([{"output_dir": str(stopped), "max_steps": 10_000, "save_steps": 10_000}], said)
    while not read_log(stopped / "log.jsonl")[2:]:
        assert process.poll() is None, said.read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, said.read_text()
    assert "finished: False" in said.read_text()
    assert not (stopped / "adapter_model.safetensors").exists()
    (checkpoint,) = stopped.glob("checkpoint-*")
    last = int(checkpoint.name.removeprefix("checkpoint-")) + 1
    trainer(stopped, max_steps=last, save_steps=10_000, resume_from_checkpoint="latest").train()
    trainer(whole, max_steps=last, save_steps=10_000).train()
    assert_same_run(whole, stopped, step=last)


def test_a_stopped_run_goes_on_in_the_same_process(tmp_path: Path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    trainer(whole).train()
    run = trainer(stopped, callbacks=[At("on_step_begin", 2, lambda _: os.kill(os.getpid(), signal.SIGTERM))])
    former = signal.getsignal(signal.SIGTERM)
    result = run.train()
    assert (result.step, result.finished) == (3, False)
    assert signal.getsignal(signal.SIGTERM) is former
    assert run.train().finished
    assert_same_run(whole, stopped)


@pytest.mark.parametrize(
    "changed",
    [
        {"learning_rate": 2e-3},
        {"objective": "agsm"},
        {"ema_decay": 0.9},
        {"optim": "SGD"},
        {"gradient_accumulation_steps": 2},
        {"train_batch_size": 2},
        {"seed": 1},
        {"data": "repeated", "negative_caption_column": "not_text"},
        {"data": "buckets"},
    ],
    ids=str,
)
def test_resuming_under_other_settings_is_refused(tmp_path: Path, interrupted: Path, changed: dict[str, Any]):
    run = trainer(interrupted, **changed, resume_from_checkpoint="latest")
    before = run.adapter.tokens.tokens.clone()
    with pytest.raises(ValueError, match=r"saved under other settings \(saved, now\)"):
        run.train()
    assert run.adapter.tokens.tokens.equal(before)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that ended in step 3, with a checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("interrupted")
    train_until_killed(trainer(folder), "step-3")
    return folder


def test_a_run_may_be_made_longer_and_judged_otherwise(tmp_path: Path):
    train_until_killed(trainer(tmp_path), "step-3")
    changed = {"max_steps": 7, "save_steps": 5, "eval_steps": 7, "pair_chunk_size": 2, "logging_steps": 3}
    assert trainer(tmp_path, **changed, resume_from_checkpoint="latest").train().step == 7


def test_training_afresh_over_checkpoints_is_refused(interrupted: Path):
    with pytest.raises(ValueError, match=r"holds checkpoint-2 of another run; go on from there with resume"):
        trainer(interrupted).train()


def test_going_back_to_an_earlier_checkpoint_is_refused_where_later_ones_are(tmp_path: Path):
    trainer(tmp_path / "run", save_steps=2).train()
    again = {"resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-2")}
    with pytest.raises(ValueError, match=r"start at step 2, but .* holds checkpoint-4, checkpoint-6 of another run"):
        trainer(tmp_path / "run", **again).train()
    assert trainer(tmp_path / "branch", **again).train().finished
    states = [
        (tmp_path / name / "checkpoint-6" / "adapter_model.safetensors").read_bytes() for name in ("run", "branch")
    ]
    assert states[0] == states[1]


def test_a_checkpoint_that_is_not_there_is_an_error(interrupted: Path):
    with pytest.raises(ValueError, match=r"'checkpoint-9' is no checkpoint folder; there are \['checkpoint-2'\]"):
        trainer(interrupted, resume_from_checkpoint="checkpoint-9").train()


def test_a_folder_without_a_state_is_no_checkpoint(tmp_path: Path):
    train_until_killed(trainer(tmp_path), "step-5")
    (tmp_path / "checkpoint-4" / STATE_NAME).unlink()
    begun: list[int] = []
    begin = At("on_train_begin", None, lambda run: begun.append(run.state.global_step))
    assert trainer(tmp_path, resume_from_checkpoint="latest", callbacks=[begin]).train().finished
    assert begun == [2]


def test_a_finished_run_resumes_to_its_end(tmp_path: Path):
    trainer(tmp_path).train()
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    result = trainer(tmp_path, resume_from_checkpoint="latest").train()
    assert (result.step, result.finished) == (6, True)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
