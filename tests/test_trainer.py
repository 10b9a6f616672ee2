"""The trainer: what it changes, what it keeps, what it writes, and what it does when something goes wrong."""

import errno
import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import tiny
from diffusers_softrepa import SoftREPAConfig, add_softrepa, load_softrepa, save_softrepa, softrepa_parameters
from diffusers_softrepa import checkpoint as checkpoint_room
from diffusers_softrepa.commands import FAILURE
from diffusers_softrepa.commands import run as run_command
from diffusers_softrepa.pipeline import denoiser_of, get_softrepa_adapters
from diffusers_softrepa.training import validation
from diffusers_softrepa.training.arguments import ContrastiveFlowMatchingArguments
from diffusers_softrepa.training.checkpoints import Checkpoints
from diffusers_softrepa.training.log import read_log
from diffusers_softrepa.training.optimization import Schedule, make_optimizer
from diffusers_softrepa.training.step.collate import Draws, draw_noise, draw_timesteps
from diffusers_softrepa.training.step.engine import PairStep
from diffusers_softrepa.training.trainer import ContrastiveFlowMatchingTrainer
from training_runs import QUICK, At, pipeline, rows, stream, trainer

FAMILY_NAMES = [family.name for family in tiny.FAMILIES]


def tokens_of(run: Any) -> torch.Tensor:
    return run.adapter.tokens.tokens.detach().clone()


# What changes and what stays.


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_only_the_tokens_change_and_a_fresh_pipeline_draws_the_same(tmp_path: Path, name: str):
    run = trainer(tmp_path, family=name, max_steps=2, gradient_checkpointing=True, objective="agsm", temperature=None)
    before = {
        part: {key: value.clone() for key, value in module.state_dict().items()}
        for part, module in run.pipeline.components.items()
        if isinstance(module, torch.nn.Module)
    }
    scheduler, tokens = dict(run.pipeline.scheduler.config), tokens_of(run)
    run.train()
    for part, values in before.items():
        module = getattr(run.pipeline, part)
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert_close(module.state_dict(), values, rtol=0, atol=0)
    assert dict(run.pipeline.scheduler.config) == scheduler
    assert not denoiser_of(run.pipeline).is_gradient_checkpointing
    assert not tokens_of(run).equal(tokens)
    fresh = pipeline(name)
    plain = tiny.generate(fresh)
    load_softrepa(fresh, tmp_path)
    assert_close(tiny.generate(run.pipeline), tiny.generate(fresh), rtol=0, atol=0)
    assert not tiny.generate(fresh).equal(plain)


def test_gradient_checkpointing_that_was_on_stays_on_and_changes_nothing(tmp_path: Path):
    plain = trainer(tmp_path / "plain", max_steps=2)
    plain.train()
    run = trainer(tmp_path / "checkpointed", max_steps=2, gradient_checkpointing=True)
    denoiser_of(run.pipeline).enable_gradient_checkpointing()
    run.train()
    assert denoiser_of(run.pipeline).is_gradient_checkpointing
    assert_close(tokens_of(run), tokens_of(plain))


def test_the_average_is_what_is_saved_and_what_the_pipeline_ends_with(tmp_path: Path):
    run = trainer(tmp_path, ema_decay=0.5, learning_rate=0.1, max_steps=2, save_steps=1)
    run.train()
    state = torch.load(tmp_path / "checkpoint-2" / "training_state.pt", weights_only=True)
    checkpoint = load_softrepa(pipe := pipeline(), tmp_path / "checkpoint-2")
    live = softrepa_parameters(pipe, checkpoint)["tokens"]
    assert_close(tokens_of(run), state["average"][0], rtol=0, atol=0)
    assert not tokens_of(run).equal(live)
    saved = load_softrepa(pipe, tmp_path, adapter_name="saved")
    assert_close(softrepa_parameters(pipe, saved)["tokens"], state["average"][0], rtol=0, atol=0)


def test_max_grad_norm_clips_the_gradient(tmp_path: Path):
    settings = {"optim": "SGD", "optim_args": "{}", "learning_rate": 1.0, "max_steps": 1, "save_steps": 9}
    moved = []
    for limit in (None, 1e-4):
        run = trainer(tmp_path / str(limit), max_grad_norm=limit, **settings)
        before = [parameter.detach().clone() for parameter in run.parameters]
        run.train()
        moved.append(torch.cat([(p - b).flatten() for p, b in zip(run.parameters, before, strict=True)]).detach())
    assert moved[0].norm() > 2e-4
    assert_close(moved[1].norm().item(), 1e-4, rtol=1e-3, atol=0)
    assert_close(moved[1] / moved[1].norm(), moved[0] / moved[0].norm(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "precision"), [("sd15", "fp16"), ("sdxl", "bf16"), ("sd3", "bf16"), ("flux", "fp16")]
)
def test_half_precision_trains_validates_and_samples(tmp_path: Path, name: str, precision: str):
    drawn = {"validation_prompts": ["a cat"], "num_validation_inference_steps": 1}
    run = trainer(tmp_path, family=name, mixed_precision=precision, max_steps=2, **drawn)
    before = tokens_of(run)
    result = run.train()
    assert math.isfinite(result.metrics["loss"])
    assert tokens_of(run).dtype == torch.float32
    assert not tokens_of(run).equal(before)
    assert denoiser_of(run.pipeline).dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert tiny.generate(run.pipeline, output_type="np").shape == (1, 16, 16, 3)


def test_float16_halves_the_loss_scale_until_gradients_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = trainer(tmp_path, max_steps=4)
    run.engine.loss_scale = 2.0**14
    take_step = run.engine.step

    def step(*args: Any, **settings: Any) -> PairStep:
        done = take_step(*args, **settings)
        if run.engine.loss_scale > 2.0**12:
            done.gradients[0][0] = math.inf
        return done

    monkeypatch.setattr(run.engine, "step", step)
    before, moved = tokens_of(run), []
    run.callbacks.callbacks.append(At("on_step_end", None, lambda run: moved.append(not tokens_of(run).equal(before))))
    run.train()
    assert run.engine.loss_scale == 2.0**12
    assert moved == [False, False, True, True]
    assert not list(tmp_path.glob("nonfinite*"))


def test_the_loss_scale_is_taken_out_of_the_gradients_again(tmp_path: Path):
    ends = []
    for scale in (1.0, 2.0**14):
        run = trainer(tmp_path / str(scale), max_steps=2, optim="SGD", learning_rate=0.1)
        run.engine.loss_scale = scale
        run.train()
        ends.append(tokens_of(run))
    assert_close(*ends)


# Which adapter.


def test_an_adapter_is_trained_on(tmp_path: Path):
    pipe = pipeline()
    name = add_softrepa(pipe, generator=torch.Generator().manual_seed(5))
    save_softrepa(pipe, tmp_path / "given")
    fresh = pipeline()
    load_softrepa(fresh, tmp_path / "given", is_trainable=True)
    args = ContrastiveFlowMatchingArguments(output_dir=str(tmp_path / "out"), **QUICK | {"max_steps": 1})
    run = ContrastiveFlowMatchingTrainer(fresh, args, rows())
    assert run.adapter_name == name
    assert_close(tokens_of(run), softrepa_parameters(pipe)["tokens"].detach(), rtol=0, atol=0)
    run.train()
    assert_close(tokens_of(run), softrepa_parameters(pipe)["tokens"].detach(), rtol=0, atol=0.1)
    assert not tokens_of(run).equal(softrepa_parameters(pipe)["tokens"])


def test_a_loaded_adapter_that_is_not_trainable_is_left_alone(tmp_path: Path):
    pipe = pipeline()
    add_softrepa(pipe, adapter_name="kept")
    softrepa_parameters(pipe)["tokens"].requires_grad_(False)
    kept = softrepa_parameters(pipe)["tokens"].clone()
    args = ContrastiveFlowMatchingArguments(output_dir=str(tmp_path), **QUICK | {"max_steps": 1})
    run = ContrastiveFlowMatchingTrainer(pipe, args, rows())
    run.train()
    assert run.adapter_name != "kept"
    assert softrepa_parameters(pipe, "kept")["tokens"].equal(kept)
    assert get_softrepa_adapters(pipe)["kept"] is None


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path):
    pipe = pipeline()
    name = add_softrepa(pipe)
    args = ContrastiveFlowMatchingArguments(output_dir=str(tmp_path), objective="agsm", **without_logits())
    with pytest.raises(ValueError, match=r"'agsm' trains 2 token bank\(s\), but adapter 'softrepa' has 1"):
        ContrastiveFlowMatchingTrainer(pipe, args, rows())
    config = SoftREPAConfig.for_denoiser(denoiser_of(pipe))
    with pytest.raises(ValueError, match="'softrepa' is there already, with a config of its own"):
        ContrastiveFlowMatchingTrainer(pipe, args, rows(), adapter_config=config, adapter_name=name)


def without_logits() -> dict[str, Any]:
    return {name: value for name, value in QUICK.items() if name not in ("logits", "temperature")}


# Optimizers and schedules.


@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        ("SGD", '{"momentum": 0.9}'),
        ("torch.optim.Adafactor", "{}"),
        ("adamw_torch_fused", "{}"),
        ("torch.optim.adam.Adam", '{"betas": [0.5, 0.9]}'),
    ],
)
def test_any_optimizer_trains(tmp_path: Path, optimizer: str, arguments: str):
    run = trainer(tmp_path, optim=optimizer, optim_args=arguments, max_steps=2)
    before = tokens_of(run)
    run.train()
    assert not tokens_of(run).equal(before)
    assert type(run.optimizer).__name__ == {"adamw_torch_fused": "AdamW"}.get(optimizer, optimizer.rpartition(".")[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "AdamX"}, "optim='AdamX'.*has no attribute 'AdamX'; name a class of torch.optim"),
        ({"optim": "no_such_package.Adam"}, "No module named 'no_such_package'"),
        ({"optim": "lr_scheduler"}, "makes no optimizer"),
        ({"optim": "torch.nn.Linear"}, "Linear is no optimizer class"),
        ({"optim": "LBFGS", "optim_args": "{}"}, "LBFGS computes losses of its own"),
        ({"optim_args": '{"speed": 3}'}, "unexpected keyword argument 'speed'"),
        ({"optim_args": '{"betas": [2, 3]}'}, "Invalid beta"),
        ({"lr_scheduler": "warm"}, "lr_scheduler='warm' makes no schedule"),
        ({"lr_scheduler": "piecewise_constant"}, "lr_scheduler='piecewise_constant' makes no schedule"),
    ],
)
def test_wrong_optimizers_and_schedules_are_named(settings: dict[str, Any], message: str):
    args = ContrastiveFlowMatchingArguments(**settings)
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    with pytest.raises(ValueError, match=message):
        Schedule(args, make_optimizer(args, parameters), 10)


def test_the_published_schedule_restarts_its_cosine():
    args = ContrastiveFlowMatchingArguments(lr_update_steps=2, lr_restart_period=3, lr_floor=1e-4)
    optimizer = make_optimizer(args, [torch.nn.Parameter(torch.zeros(2))])
    schedule, rates = Schedule(args, optimizer, 10), []
    for _ in range(8):
        rates.append(schedule.rate)
        optimizer.step()
        schedule.step()
    cosine = [1e-4 + 9e-4 * (1 + math.cos(math.pi * step / 3)) / 2 for step in range(3)]
    assert rates == pytest.approx([cosine[0]] * 2 + [cosine[1]] * 2 + [cosine[2]] * 2 + [cosine[0]] * 2)


# Draws.


def test_timesteps_and_noise_are_shared_where_asked_and_keep_to_their_range():
    args = ContrastiveFlowMatchingArguments(min_timestep=200, max_timestep=300)
    draws = Draws(0, 3)
    timesteps = torch.cat([draw_timesteps(Draws(0, batch), 8, args) for batch in range(20)])
    assert timesteps.min() >= 200 and timesteps.max() < 300
    assert timesteps.min() < 210 and timesteps.max() > 290
    noise = draw_noise(draws, (4, 2, 3, 3), share=False)
    assert len({tuple(row.flatten().tolist()) for row in noise}) == 4
    assert_close(draw_noise(Draws(0, 3, first_row=2), (2, 2, 3, 3), share=False), noise[2:], rtol=0, atol=0)
    args = ContrastiveFlowMatchingArguments(share_timestep=True)
    assert draw_timesteps(draws, 4, args).unique().numel() == 1
    assert draw_timesteps(Draws(0, 3, first_row=2), 2, args)[0] == draw_timesteps(draws, 4, args)[0]
    shared = draw_noise(draws, (4, 2, 3, 3), share=True)
    assert shared[0].equal(shared[3])
    assert draw_noise(Draws(0, 3, first_row=2), (2, 2, 3, 3), share=True)[0].equal(shared[0])


def test_a_run_shares_timestep_and_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = trainer(tmp_path, max_steps=1, share_timestep=True, share_noise=True, min_timestep=400)
    seen, take_step = [], run.engine.step
    monkeypatch.setattr(run.engine, "step", lambda batch, **rest: (seen.append(batch), take_step(batch, **rest))[1])
    run.train()
    assert seen[0].timestep.unique().numel() == 1
    assert seen[0].timestep.min() >= 400


# What goes wrong.


@pytest.fixture
def poisoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, set[int], list[torch.Tensor]]]:
    """A run, the steps whose loss is NaN, and its tokens after every step."""
    run = trainer(tmp_path, max_steps=6, max_nonfinite_steps=2, save_steps=1, ema_decay=0.5)
    steps: set[int] = set()
    tokens = [tokens_of(run)]
    take_step = run.engine.step

    def step(*args: Any, **settings: Any) -> PairStep:
        done = take_step(*args, **settings)
        return PairStep(done.loss * math.nan, done.errors, done.gradients) if run.state.global_step in steps else done

    def remember(run: Any) -> None:
        tokens.append(tokens_of(run))

    monkeypatch.setattr(run.engine, "step", step)
    run.callbacks.callbacks += [At("on_step_end", None, remember), At("on_exception", None, remember)]
    yield run, steps, tokens


def test_a_nan_loss_skips_the_step_and_reports_the_batch(
    poisoned: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    run, steps, tokens = poisoned
    steps |= {1, 3}  # never two in a row
    result = run.train()
    assert result.finished
    unchanged = [before.equal(after) for before, after in pairwise(tokens)]
    assert unchanged == [False, True, False, True, False, False]
    assert "step 3 is skipped: its loss is nan" in caplog.text
    reports = sorted(path.name for path in tmp_path.glob("nonfinite*"))
    assert reports == ["nonfinite-step-1-rank-0.json", "nonfinite-step-3-rank-0.json"]
    report = json.loads((tmp_path / reports[1]).read_text())
    assert report["loss"] == "nan"
    assert len(report["batch"]) == QUICK["train_batch_size"]
    assert all(entry["caption"].startswith("picture") for entry in report["batch"])
    logged = {entry["step"]: entry for entry in read_log(tmp_path / "log.jsonl") if "top1" in entry}
    assert "loss" not in logged[2] and math.isfinite(logged[3]["loss"])
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()


def test_nan_losses_in_a_row_end_the_run(poisoned: Any, tmp_path: Path):
    run, steps, tokens = poisoned
    steps |= {2, 3, 4}
    with pytest.raises(FloatingPointError, match="not finite for 2 steps in a row, the last one step 3"):
        run.train()
    assert tokens[-1].equal(tokens[2])
    assert Checkpoints(tmp_path).latest() == tmp_path / "checkpoint-3"
    assert all(value.isfinite().all() for value in run.average.values)


def test_a_nan_gradient_is_caught_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = trainer(tmp_path, max_nonfinite_steps=1)
    take_step = run.engine.step

    def step(*args: Any, **settings: Any) -> PairStep:
        done = take_step(*args, **settings)
        done.gradients[0][0] = math.nan
        return done

    monkeypatch.setattr(run.engine, "step", step)
    with pytest.raises(FloatingPointError, match="loss or gradient"):
        run.train()


def exit_status(error: Exception) -> int:
    """Returns the exit status of a command that ends in an error."""
    with patch("diffusers_softrepa.commands.train.main", side_effect=error):
        return run_command("train", [])


@pytest.mark.parametrize("where", ["state", "weights"])
def test_a_full_disk_is_an_error_that_leaves_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    run = trainer(tmp_path, save_steps=2, max_steps=4)
    save = torch.save

    def full(*args: Any, **settings: Any) -> None:
        if run.state.global_step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        if where == "state":
            save(*args, **settings)

    if where == "state":
        monkeypatch.setattr(torch, "save", full)
    else:
        write = checkpoint_room.write_whole
        monkeypatch.setattr(checkpoint_room, "write_whole", lambda *args: (full(), write(*args))[1])
    with pytest.raises(OSError, match=r"step 4 could not be written .* space left .* from checkpoint-2") as raised:
        run.train()
    assert exit_status(raised.value) == FAILURE
    assert [path.name for path in tmp_path.glob("*checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    assert trainer(tmp_path, save_steps=2, max_steps=4, resume_from_checkpoint="latest").train().finished


def test_a_full_disk_as_torch_tells_it_is_an_error_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = trainer(tmp_path, max_steps=1)
    monkeypatch.setattr(run.optimizer, "state_dict", lambda: {"big": FullDisk()})
    with pytest.raises(OSError, match=r"could not be written .* resume from the start: there is no ch") as raised:
        run.train()
    assert exit_status(raised.value) == FAILURE


class FullDisk:
    """Ends saving as `torch.save` does on a full disk."""

    def __reduce__(self) -> Any:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")


def test_a_broken_image_is_skipped_and_too_many_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    data = [dict(row) for row in rows(8)]
    data[2]["image"] = b"not an image"
    assert trainer(tmp_path / "few", data, max_broken=0.2, max_steps=3).train().finished
    assert "example 2 is broken" in caplog.text
    for row in data[3:7]:
        row["image"] = b"neither"
    with pytest.raises(ValueError, match=r"examples are broken, more than the 2 of max_broken=0.2"):
        trainer(tmp_path / "many", data, max_broken=0.2, max_steps=3).train()


def test_a_stream_needs_max_steps_and_must_fill_a_batch(tmp_path: Path):
    with pytest.raises(ValueError, match="a stream does not tell its length; give max_steps"):
        trainer(tmp_path, "stream", max_steps=None)
    with pytest.raises(ValueError, match="before it filled a batch of 3"):
        trainer(tmp_path, stream(2), train_batch_size=3).train()


def test_too_few_images_to_evaluate_on_are_an_error_before_training(tmp_path: Path):
    args = ContrastiveFlowMatchingArguments(output_dir=str(tmp_path), **QUICK)
    with pytest.raises(ValueError, match="batch"):
        ContrastiveFlowMatchingTrainer(pipeline(), args, rows(), rows(2))
    with pytest.raises(ValueError, match="evaluate needs an eval_dataset"):
        ContrastiveFlowMatchingTrainer(pipeline(), args, rows()).evaluate()


def test_saturated_logits_are_told_before_the_first_step_and_again_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    trainer(tmp_path / "saturated", logits="exponential", temperature=0.05, max_steps=3).train()
    told = [record for record in caplog.records if "the contrast has no gradient" in record.getMessage()]
    assert len(told) == 2
    assert "the contrast has no gradient" in (tmp_path / "saturated" / "README.md").read_text()
    caplog.clear()
    trainer(tmp_path / "fine", logits="exponential", temperature=1.0, max_steps=1).train()
    trainer(tmp_path / "linear", temperature=0.05, max_steps=1).train()
    assert "the contrast has no gradient" not in caplog.text


# What it writes.


def test_old_checkpoints_go_first(tmp_path: Path):
    trainer(tmp_path, save_steps=1, checkpoints_total_limit=2, max_steps=4).train()
    assert [path.name for path in Checkpoints(tmp_path).all()] == ["checkpoint-3", "checkpoint-4"]
    assert not list(tmp_path.glob(".*"))


def test_the_best_adapter_by_top1_of_the_evaluation_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = trainer(tmp_path, eval_steps=1, max_steps=4, ema_decay=0.5)
    scores, seen = iter([0.2, 0.5, 0.5, 0.9, 0.4]), []

    def evaluate() -> dict[str, float]:
        seen.append(run.average.values[0].clone())
        return {"top1": next(scores)}

    monkeypatch.setattr(run, "evaluate", evaluate)
    run.train()
    assert run.state.best_metric == 0.9
    fresh = pipeline()
    load_softrepa(fresh, tmp_path / "best")
    assert_close(softrepa_parameters(fresh)["tokens"].detach(), seen[3], rtol=0, atol=0)


def test_evaluation_is_the_same_each_time_and_independent_of_training_draws(tmp_path: Path):
    run = trainer(tmp_path, num_evaluation_batches=2)
    first = run.evaluate()
    assert first == run.evaluate()
    assert set(first) >= {"top1", "margin", "information"}
    run.train()
    assert run.evaluate() != first


def test_validation_images_are_drawn_without_and_with_tokens_from_the_same_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn = {"validation_prompts": ["a cat", "a dog"], "num_validation_inference_steps": 2, "eval_steps": 2}
    run = trainer(tmp_path, max_steps=2, learning_rate=3.0, **drawn)
    seen, lay_out = [], validation.grid
    monkeypatch.setattr(validation, "grid", lambda *args, **given: (seen.append(args[0]), lay_out(*args, **given))[1])
    progress_bar = getattr(run.pipeline, "_progress_bar_config", None)
    run.train()
    (first, _), (last, second) = seen
    assert first[0].tobytes() == last[0].tobytes()
    assert first[1].tobytes() != last[1].tobytes()
    assert all(base.tobytes() != tokens.tobytes() for base, tokens in (last, second))
    assert (tmp_path / "validation" / "step-000002.png").is_file()
    with Image.open(tmp_path / "images" / "01.png") as image:
        assert image.tobytes() == second[1].tobytes()
    assert getattr(run.pipeline, "_progress_bar_config", None) in (progress_bar, {})
    assert get_softrepa_adapters(run.pipeline) == {run.adapter_name: 1.0}


def test_the_log_holds_means_since_the_last_entry(tmp_path: Path):
    for name, every in (("each", 1), ("third", 3)):
        trainer(tmp_path / name, logging_steps=every, max_steps=4, eval_steps=9).train()
    each, third = ([e for e in read_log(tmp_path / name / "log.jsonl") if "loss" in e] for name in ("each", "third"))
    assert [entry["step"] for entry in third] == [3, 4]
    for figure in ("loss", "top1", "margin"):
        assert_close(third[0][figure], sum(entry[figure] for entry in each[:3]) / 3)
        assert_close(third[1][figure], each[3][figure])
    assert third[1]["learning_rate"] == each[3]["learning_rate"]


def test_tensorboard_gets_values_and_images(tmp_path: Path):
    drawn = {"validation_prompts": ["a cat"], "num_validation_inference_steps": 1}
    trainer(tmp_path, max_steps=2, report_to="tensorboard", **drawn).train()
    (events,) = tmp_path.rglob("events.out.tfevents.*.0")
    content = events.read_bytes()
    assert b"eval/top1" in content and b"validation" in content


def test_an_unknown_tracker_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="carrier_pigeon"):
        trainer(tmp_path, report_to="carrier_pigeon")


def test_nothing_is_printed_but_the_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trainer(tmp_path, max_steps=1).train()
    out, err = capsys.readouterr()
    assert out == ""
    assert "soft tokens" in err


def test_cached_captions_train_the_same_tokens_and_a_second_run_encodes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain = trainer(tmp_path / "plain", max_steps=3)
    plain.train()
    caches = {"cache_text": True, "cache_dir": str(tmp_path / "cache")}
    first = trainer(tmp_path / "first", max_steps=3, **caches)
    first.train()
    assert_close(tokens_of(first), tokens_of(plain), rtol=0, atol=1e-5)  # encoded in batches of another size
    again = trainer(tmp_path / "again", max_steps=3, **caches)
    monkeypatch.setattr(again.conditioner, "encode_captions", lambda _: pytest.fail("encoded again"))
    again.train()
    assert_close(tokens_of(again), tokens_of(first), rtol=0, atol=0)


def test_cached_latents_are_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = []
    for name in ("first", "again"):
        run = trainer(tmp_path / name, max_steps=3, cache_latents=True, cache_dir=str(tmp_path / "cache"))
        calls: list[int] = []
        encode = run.conditioner.encode_images

        def counted(pixels: Any, *generator: Any, encode: Any = encode, calls: list[int] = calls) -> Any:
            calls.append(len(pixels))
            return encode(pixels, *generator)

        monkeypatch.setattr(run.conditioner, "encode_images", counted)
        run.train()
        found.append((tokens_of(run), sum(calls)))
    evaluated = 2 * 3  # images of two evaluations, which are not cached
    assert [count for _, count in found] == [8 + evaluated, evaluated]
    assert_close(found[0][0], found[1][0], rtol=0, atol=0)
