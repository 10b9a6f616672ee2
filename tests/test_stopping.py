"""Being asked to stop, and two runs in one folder: what was done is kept, and nothing is mixed."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffusers_softrepa.training.checkpoints import Checkpoints
from training_runs import At, assert_same_run, read_log, rows, start, trainer

LONG = {"max_steps": 10_000, "save_steps": 10_000, "eval_steps": 10_000}

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and locks of POSIX")


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    """Gives signals their usual handlers, which a shell in the background or `nohup` takes from its children."""
    usual = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    former = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


def stop_by(number: int, times: int = 1) -> Any:
    def send(_run: Any) -> None:
        for _ in range(times):
            os.kill(os.getpid(), number)

    return send


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_lets_the_step_end_and_saves_it(tmp_path: Path, number: signal.Signals):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    trainer(whole).train()
    former = signal.getsignal(number)
    result = trainer(stopped, callbacks=[At("on_substep_end", 2, stop_by(number))]).train()
    assert (result.step, result.finished) == (3, False)
    assert signal.getsignal(number) is former
    assert trainer(stopped, resume_from_checkpoint="latest").train().finished
    assert_same_run(whole, stopped)


def test_a_second_interrupt_stops_at_once(tmp_path: Path):
    run = trainer(tmp_path, save_steps=2, callbacks=[At("on_substep_end", 3, stop_by(signal.SIGINT, times=2))])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert Checkpoints(tmp_path).latest() == tmp_path / "checkpoint-2"


def test_several_terminations_are_one(tmp_path: Path):
    run = trainer(tmp_path, callbacks=[At("on_substep_end", 2, stop_by(signal.SIGTERM, times=3))])
    assert run.train().step == 3


@pytest.mark.parametrize("event", ["on_train_begin", "on_evaluate", "on_save", "on_train_end"])
def test_a_signal_at_any_moment_leaves_a_run_that_is_whole_or_goes_on(tmp_path: Path, event: str):
    result = trainer(tmp_path, max_steps=2, callbacks=[At(event, None, stop_by(signal.SIGTERM))]).train()
    assert result.finished is (event in ("on_save", "on_train_end"))  # the only checkpoint is that of the last step
    assert (tmp_path / "adapter_model.safetensors").exists() is result.finished
    assert trainer(tmp_path, max_steps=2, resume_from_checkpoint="latest").train().finished
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_hangup_that_the_program_ignores_stays_ignored(tmp_path: Path):
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert trainer(tmp_path, callbacks=[At("on_substep_end", 2, stop_by(signal.SIGHUP))]).train().finished
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


@pytest.mark.parametrize("caches", [{"cache_text": True}, {"cache_latents": True}], ids=str)
def test_a_stop_while_caches_fill_leaves_the_rest_for_another_time(tmp_path: Path, caches: dict[str, Any]):
    data = rows(60)
    whole = trainer(tmp_path / "whole", data, **caches)
    whole.train()
    run = trainer(tmp_path / "stopped", data, **caches)
    encode, name = {"cache_text": ("encode_captions", "text"), "cache_latents": ("encode_images", "latents")}[
        next(iter(caches))
    ]
    original, batches = getattr(run.conditioner, encode), []

    def encode_and_stop(*given: Any) -> Any:
        batches.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*given)

    setattr(run.conditioner, encode, encode_and_stop)
    result = run.train()
    assert (result.step, result.finished, len(batches)) == (0, False, 1)
    assert 0 < len(list(getattr(run.encoder, name).folder.rglob("*.safetensors"))) < 60
    assert not list((tmp_path / "stopped").glob("checkpoint-*"))
    assert trainer(tmp_path / "stopped", data, **caches, resume_from_checkpoint="latest").train().finished
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_the_second_of_two_runs_in_a_folder_is_refused_and_the_first_goes_on(tmp_path: Path):
    folder, refused = tmp_path / "run", []

    def start_another(_run: Any) -> None:
        with pytest.raises(ValueError, match=r"another run is training in .* choose another output_dir") as caught:
            trainer(folder, seed=1, resume_from_checkpoint="latest").train()
        refused.append(caught)

    assert trainer(folder, callbacks=[At("on_step_begin", 3, start_another)]).train().finished
    assert refused
    trainer(tmp_path / "alone").train()
    assert_same_run(tmp_path / "alone", folder)


def test_a_killed_run_leaves_no_lock(tmp_path: Path):
    folder, said = tmp_path / "run", tmp_path / "said.txt"
    process = start([{"output_dir": str(folder), **LONG}], said)
    wait_for_steps(process, folder, said)
    try:
        with pytest.raises(ValueError, match="another run is training in"):
            trainer(folder, **LONG).train()
    finally:
        process.kill()
        process.wait()
    assert trainer(folder, resume_from_checkpoint="latest", max_steps=1).train().finished
    assert not list(folder.glob(".*"))


def wait_for_steps(process: subprocess.Popen[bytes], folder: Path, said: Path) -> None:
    while not read_log(folder / "log.jsonl")[2:]:
        assert process.poll() is None, said.read_text()
        time.sleep(0.01)


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"output_dir must be a folder, but .* is a file"):
        trainer(tmp_path / "file").train()
    assert (tmp_path / "file").read_text() == "mine"
