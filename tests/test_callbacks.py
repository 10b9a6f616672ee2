"""Callbacks: the events of a run, in their order, and what a callback may ask of the trainer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import EarlyStoppingCallback

from diffusers_softrepa.training import (
    ContrastiveFlowMatchingArguments,
    ContrastiveFlowMatchingTrainer,
    TrainerCallback,
)
from training_runs import QUICK, At, assert_same_run, pipeline, read_log, rows, trainer


class Diary(TrainerCallback):
    """Writes down every event with its step."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_") or name == "on_exception":
            return super().__getattribute__(name)

        def note(_args: Any, state: Any, _control: Any, **given: Any) -> None:
            assert {"trainer", "model", "optimizer", "lr_scheduler", "train_dataloader"} <= given.keys()
            self.events.append((name.removeprefix("on_"), state.global_step))

        return note


def test_events_come_in_the_order_of_transformers(tmp_path: Path):
    diary = Diary()
    trainer(tmp_path, max_steps=2, save_steps=2, eval_steps=2, callbacks=[diary]).train()
    step = ["step_begin", "substep_end", "pre_optimizer_step", "optimizer_step"]
    expected = [
        *(("train_begin", 0), ("log", 0), ("evaluate", 0), ("epoch_begin", 0)),
        *((name, 0) for name in step),
        *(("step_end", 1), ("log", 1)),
        *((name, 1) for name in step),
        *(("step_end", 2), ("log", 2), ("log", 2), ("evaluate", 2), ("save", 2)),
        ("train_end", 2),
    ]
    assert diary.events == expected


class Asks(TrainerCallback):
    """Sets fields of the control at the end of a step."""

    def __init__(self, step: int, **wishes: bool) -> None:
        self.step, self.wishes = step, wishes

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            for name, value in self.wishes.items():
                setattr(control, name, value)


def test_a_callback_can_ask_for_a_log_an_evaluation_and_a_checkpoint(tmp_path: Path):
    asks = Asks(1, should_log=True, should_evaluate=True, should_save=True)
    trainer(tmp_path, max_steps=2, save_steps=9, eval_steps=9, logging_steps=9, callbacks=[asks]).train()
    log = [entry for entry in read_log(tmp_path / "log.jsonl") if entry["step"] == 1]
    assert any("loss" in entry for entry in log) and any("eval/top1" in entry for entry in log)
    assert (tmp_path / "checkpoint-1").is_dir()


def test_what_callbacks_ask_for_changes_no_token(tmp_path: Path):
    asks = Asks(2, should_log=True, should_evaluate=True)
    trainer(tmp_path / "asked", callbacks=[asks]).train()
    trainer(tmp_path / "plain").train()
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("asked", "plain")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_callback_can_end_the_run_which_is_then_finished(tmp_path: Path):
    result = trainer(tmp_path, callbacks=[Asks(3, should_training_stop=True)]).train()
    assert (result.step, result.finished) == (3, True)
    assert (tmp_path / "adapter_model.safetensors").is_file() and (tmp_path / "checkpoint-3").is_dir()


class Skips(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_skip_step = state.global_step == 1


def test_a_callback_can_skip_a_step(tmp_path: Path):
    run = trainer(tmp_path, max_steps=2, callbacks=[Skips()])
    tokens: list[torch.Tensor] = []
    run.callbacks.callbacks.append(remembers := TrainerCallback())
    remembers.on_step_end = lambda *_, **__: tokens.append(run.parameters[0].detach().clone())  # type: ignore
    run.train()
    assert tokens[0].equal(tokens[1])


def test_early_stopping_of_transformers_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = trainer(tmp_path, eval_steps=1, callbacks=[EarlyStoppingCallback(early_stopping_patience=2)])
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    monkeypatch.setattr(run, "evaluate", lambda: {"top1": next(scores)})
    result = run.train()
    assert result.finished and result.step == 3
    assert run.state.best_global_step == 1


def test_an_error_in_the_loop_saves_the_last_step_and_the_run_goes_on_bit_by_bit(tmp_path: Path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    trainer(whole).train()

    class Fails(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                raise RuntimeError("the disk of the images went away")

    with pytest.raises(RuntimeError, match="went away"):
        trainer(broken, save_steps=2, callbacks=[Fails()]).train()
    assert (broken / "checkpoint-3").is_dir()
    trainer(broken, resume_from_checkpoint="latest").train()
    assert_same_run(whole, broken)


def test_an_error_of_a_callback_after_the_error_of_a_run_masks_it_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    class Fails(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                raise RuntimeError("the first error")

        def on_exception(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            raise KeyError("the tracker")

    run = trainer(tmp_path)
    run.callbacks.callbacks.insert(0, Fails())
    with pytest.raises(RuntimeError, match="the first error"):
        run.train()
    assert "Fails failed after the error that ends the run: 'the tracker'" in caplog.text
    assert (tmp_path / "checkpoint-1").is_dir()


def test_own_optimizers_metrics_and_data_to_evaluate_are_taken(tmp_path: Path):
    run = trainer(tmp_path, max_steps=2)
    sgd = torch.optim.SGD(run.parameters, lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 0.1**step)
    own = type(run)(
        run.pipeline,
        run.args,
        rows(),
        rows(4, seed=1),
        adapter_name=run.adapter_name,
        optimizers=(sgd, schedule),
        compute_metrics=lambda figures: {"worst": figures["margin"].min().item()},
    )
    own.train()
    assert own.optimizer is sgd
    rates = [entry["learning_rate"] for entry in read_log(tmp_path / "log.jsonl") if "learning_rate" in entry]
    assert rates == pytest.approx([0.5, 0.05])
    log = [entry for entry in read_log(tmp_path / "log.jsonl") if "eval/worst" in entry]
    assert [entry["step"] for entry in log] == [0, 2]
    assert own.evaluate(rows(4, seed=2))["margin"] != own.evaluate()["margin"]


@pytest.mark.parametrize("value", [np.float32(0.5), torch.tensor(0.5), np.float64(0.5)], ids=repr)
def test_figures_of_numpy_and_torch_are_logged(tmp_path: Path, value: Any):
    run = trainer(tmp_path, max_steps=1, callbacks=[At("on_step_end", None, lambda run: run.log({"mine": value}))])
    run.compute_metrics = lambda found: {"further": value}
    run.train()
    log = read_log(tmp_path / "log.jsonl")
    assert [entry[name] for name in ("mine", "eval/further") for entry in log if name in entry] == [0.5] * 3


@pytest.mark.parametrize("wrong", [None, [1], {"x": "high"}, {"x": None}, {"x": torch.zeros(2)}], ids=str)
def test_what_is_no_figure_is_named_before_the_first_step(tmp_path: Path, wrong: Any):
    run = trainer(tmp_path)
    run.compute_metrics = lambda found: wrong
    with pytest.raises(TypeError, match="the result of compute_metrics must be a dict of numbers, but is"):
        run.train()
    assert run.state.global_step == 0


def test_a_figure_of_ones_own_chooses_the_best_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = trainer(tmp_path, max_steps=3, eval_steps=1, metric_for_best_model="cost", greater_is_better=False)
    scores = iter([0.0, 3.0, 1.0, 2.0])
    monkeypatch.setattr(run, "evaluate", lambda: {"cost": next(scores)})
    run.train()
    assert (run.state.best_metric, run.state.best_global_step) == (1.0, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"callbacks": 5}, "callbacks must be a list of TrainerCallback objects or classes, but one is 5"),
        ({"callbacks": "log"}, "callbacks must be a list .* but one is 'log'"),
        ({"callbacks": TrainerCallback()}, "callbacks must be a list .* but got <"),
        ({"callbacks": [print]}, "callbacks must be a list .* but one is <built-in function print>"),
        ({"optimizers": ()}, r"optimizers must be a pair of a torch optimizer and a schedule, .* but are \(\)"),
        ({"optimizers": ("AdamW", None)}, "optimizers must be a pair .*'AdamW'"),
        ({"optimizers": (None, 0.1)}, "optimizers must be a pair"),
    ],
)
def test_parts_of_a_wrong_kind_are_named_before_an_adapter_is_added(tmp_path: Path, given: Any, message: str):
    pipe = pipeline()
    args = ContrastiveFlowMatchingArguments(output_dir=str(tmp_path / "run"), **QUICK)
    with pytest.raises(TypeError, match=message):
        ContrastiveFlowMatchingTrainer(pipe, args, rows(), **given)
    assert pipe.get_softrepa_adapters() == {} and not (tmp_path / "run").exists()


def test_a_checkpoint_of_a_wrong_kind_is_named_and_a_path_is_one(tmp_path: Path):
    run = trainer(tmp_path, max_steps=2)
    with pytest.raises(TypeError, match="resume_from_checkpoint must be a folder, 'latest', True or None, but is 5"):
        run.train(5)
    run.train()
    further = trainer(tmp_path, max_steps=3)
    assert further.train(tmp_path / "checkpoint-2").step == 3
