"""A run that would learn nothing says so: data without negatives are refused, logits that saturate are replaced."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from diffusers_softrepa.objectives import Contrastive, SoftRank
from diffusers_softrepa.training import (
    ContrastiveFlowMatchingArguments,
    ContrastiveFlowMatchingTrainer,
    check_run,
)
from diffusers_softrepa.training import trainer as trainer_room
from diffusers_softrepa.training.calibration import check_negatives, is_saturated, measured, unsaturated
from diffusers_softrepa.training.metrics import gains, mean_and_error
from diffusers_softrepa.training.step.collate import Draws
from training_runs import QUICK, At, pipeline, read_log, rows, train_until_killed, trainer

EXPONENTIAL: dict[str, Any] = {"logits": "exponential", "temperature": None}
"""As the defaults are; the errors of the tiny pipeline are 1 to 2, far above the published temperature."""


def of_one_caption(count: int = 8, **columns: Any) -> list[dict[str, Any]]:
    return [{**row, "text": "photo of a toy", **columns} for row in rows(count)]


# Data without negatives.


@pytest.mark.parametrize("objective", ["softrepa", "agsm", "soft_rank"])
def test_one_caption_for_all_images_is_refused_before_anything_is_written(tmp_path: Path, objective: str):
    with pytest.raises(ValueError, match=r"captions .* are all the same, so there are no negatives to contrast"):
        trainer(tmp_path / "run", of_one_caption(), objective=objective, temperature=None)
    args = ContrastiveFlowMatchingArguments(output_dir=str(tmp_path / "run"), train_batch_size=3, objective=objective)
    with pytest.raises(ValueError, match="no negatives to contrast"):
        check_run(args, of_one_caption())
    assert not (tmp_path / "run").exists()


def test_data_without_any_caption_say_so(tmp_path: Path):
    with pytest.raises(ValueError, match="have no caption that can be read: all are absent, empty"):
        trainer(tmp_path, [{**row, "text": None if number else ""} for number, row in enumerate(rows())])


def test_one_caption_is_enough_without_contrast_or_with_written_negatives(tmp_path: Path):
    assert trainer(tmp_path / "denoising", of_one_caption(), objective="denoising", max_steps=1).train().finished
    data = [{**row, "not_text": f"not {number}"} for number, row in enumerate(of_one_caption())]
    assert trainer(tmp_path / "written", data, negative_caption_column="not_text", max_steps=1).train().finished


def test_one_image_under_many_captions_is_refused_before_the_first_step(tmp_path: Path):
    image = rows(1)[0]["image"]
    run = trainer(tmp_path, [{"image": image, "text": f"view {number}"} for number in range(8)])
    before = [parameter.clone() for parameter in run.parameters]
    with pytest.raises(ValueError, match="or the images themselves, are all the same"):
        run.train()
    assert all(map(torch.equal, before, run.parameters))
    assert not list(tmp_path.glob("checkpoint-*"))


def test_two_captions_are_too_few_for_a_rank_among_three(tmp_path: Path):
    data = [{**row, "text": f"view {number % 2}"} for number, row in enumerate(rows())]
    with pytest.raises(ValueError, match="must meet 2 or more captions that are wrong for it"):
        trainer(tmp_path, data, objective="soft_rank", temperature=None)


def test_negatives_are_counted_by_the_candidates_of_each_row():
    check_negatives(Contrastive(), torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="no negatives to contrast"):
        check_negatives(Contrastive(), torch.tensor([0, 0, 0]))
    with pytest.raises(ValueError, match="2 or more captions"):
        check_negatives(SoftRank(), torch.tensor([1, 1, 0]))


# Saturated logits.


def test_what_is_measured_is_what_the_errors_say():
    errors = torch.tensor([[1.0, 2.0, torch.nan], [5.0, 3.0, 4.0]])
    found = measured(errors, torch.tensor([0, 1]), ~errors.isnan())
    assert found["negatives"].tolist() == [1, 2] and found["matched"].tolist() == [1.0, 3.0]
    assert_close(found["spread"], torch.stack([errors[0, :2].std(), errors[1].std()]))
    alone = measured(errors[:, :1], torch.tensor([0, 0]), torch.ones(2, 1, dtype=torch.bool))
    assert alone["spread"].isnan().all()


def test_a_chosen_objective_has_a_gradient_where_the_published_one_has_none():
    errors = 1.5 + 0.01 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    positive, candidates = torch.arange(6), torch.ones(6, 6, dtype=torch.bool)
    images = measured(errors, positive, candidates)
    assert is_saturated(Contrastive(), images["matched"])
    chosen, told = unsaturated(Contrastive(denoising_weight=10.0), images)
    assert (chosen.logits, chosen.denoising_weight) == ("linear", 10.0)
    assert 0.005 < chosen.temperature < 0.02 and f"{chosen.temperature:g}" in told

    def slope(objective: Contrastive) -> float:
        leaf = errors.clone().requires_grad_()
        settings = vars(objective) | {"denoising_weight": 0.0}
        Contrastive(**settings).loss(leaf, positive, candidates).backward()
        return leaf.grad.abs().max().item()  # type: ignore[union-attr]

    assert slope(Contrastive()) < 1e-6
    assert slope(chosen) > 1


def test_errors_of_a_trained_model_keep_the_published_constants():
    errors = 0.3 + 0.01 * torch.rand(6, 6)
    assert not is_saturated(Contrastive(), errors.diag())


def test_errors_that_heed_no_caption_get_a_temperature_of_their_size():
    chosen, _ = unsaturated(Contrastive(), {"matched": torch.tensor([2.0, 2.0]), "spread": torch.zeros(2)})
    assert (chosen.logits, chosen.temperature) == ("exponential", 2.0)


def test_saturated_defaults_are_replaced_told_and_stand_in_the_card(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run = trainer(tmp_path, **EXPONENTIAL, max_steps=2)
    run.train()
    assert run.objective.logits == "linear" and 0 < run.objective.temperature < 0.5
    told = [record for record in caplog.records if "were chosen from the errors of the first" in record.getMessage()]
    assert len(told) == 2  # before the first step and after the last
    norms = [entry["gradient_norm"] for entry in read_log(tmp_path / "log.jsonl") if "gradient_norm" in entry]
    assert min(norms) > 1e-4
    card = (tmp_path / "README.md").read_text()
    assert "### Remarks" in card and f"| temperature (chosen) | {run.objective.temperature:g} |" in card


def test_the_published_constants_stay_one_setting_away_and_a_run_that_learns_nothing_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    run = trainer(tmp_path, **EXPONENTIAL | {"temperature": 0.05}, max_steps=2)
    run.train()
    assert run.objective == Contrastive(temperature=0.05)
    assert "the contrast has no gradient" in caplog.text
    assert "the tokens learned nothing" in caplog.text
    card = (tmp_path / "README.md").read_text()
    assert "the contrast has no gradient" in card and "the tokens learned nothing" in card


def test_a_run_whose_steps_were_all_skipped_says_so(tmp_path: Path):
    run = trainer(tmp_path, max_steps=2)
    take_step = run.engine.step
    run.engine.step = lambda *given, **more: replace(take_step(*given, **more), loss=torch.tensor(torch.nan))
    assert run.train().finished
    assert "no logged step had a finite loss and gradient" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("captions", [["a cat", " A  Cat "], ["Straße 1", "STRASSE\t1"]])
def test_captions_that_differ_in_case_and_blanks_are_no_negatives(tmp_path: Path, captions: list[str]):
    alike = [{**row, "text": captions[number % 2]} for number, row in enumerate(rows())]
    with pytest.raises(ValueError, match="so there are no negatives to contrast"):
        trainer(tmp_path, alike)
    others = [{**row, "text": (*captions, "a dog")[number % 3]} for number, row in enumerate(rows())]
    pairs = trainer(tmp_path, others, train_batch_size=8, num_eval=8)
    (batch, *_) = pairs.loader
    dogs = torch.tensor([example.caption == "a dog" for example in batch])
    candidates = pairs.data_collator(batch, Draws(0, 0, 0)).candidates
    assert candidates.equal(dogs[:, None] ^ dogs | torch.eye(8, dtype=torch.bool))


def test_a_metric_that_evaluations_do_not_have_is_refused_before_the_first_step(tmp_path: Path):
    run = trainer(tmp_path, metric_for_best_model="recall")
    with pytest.raises(ValueError, match=r"metric_for_best_model='recall' is no metric .* has .*, top1, .*top1_gain"):
        run.train()
    assert run.state.global_step == 0
    for name in ("top1_gain", "eval_top1", "eval/margin"):  # with the prefixes of `on_evaluate` and of the log
        run = trainer(tmp_path / name.replace("/", "-"), metric_for_best_model=name, max_steps=1)
        assert run.train().finished and run.state.best_metric is not None


def test_an_evaluation_that_can_tell_nothing_says_so(tmp_path: Path):
    args = ContrastiveFlowMatchingArguments(**QUICK | {"max_steps": 1}, output_dir=str(tmp_path))
    alike = [{**row, "text": "a cat"} for row in rows(4)]
    ContrastiveFlowMatchingTrainer(pipeline(), args, rows(), alike).train()
    assert "nothing is measured: give" in (tmp_path / "README.md").read_text()


def test_a_resumed_run_keeps_what_was_chosen(tmp_path: Path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    first = trainer(whole, **EXPONENTIAL)
    first.train()
    train_until_killed(trainer(killed, **EXPONENTIAL), "step-3")
    again = trainer(killed, **EXPONENTIAL, resume_from_checkpoint="latest")
    again.train()
    assert again.objective == first.objective
    assert again.warnings == first.warnings
    files = [folder / "adapter_model.safetensors" for folder in (whole, killed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_measuring_draws_nothing_from_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run that measures its first batches sees the batches of one that does not."""
    seen: list[list[float]] = []
    for name, measures in (("measured", True), ("not", False)):
        run = trainer(tmp_path / name, max_steps=3)
        if not measures:
            monkeypatch.setattr(trainer_room, "calibrate", lambda _: None)
        run.callbacks.callbacks.append(At("on_step_end", None, lambda run: seen.append(run.loader.state_dict())))
        run.train()
    assert seen[:3] == seen[3:]
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("measured", "not")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_loader_that_was_looked_into_is_measured_from_its_first_batch(tmp_path: Path):
    plain, looked_into = (
        trainer(tmp_path / "plain", max_steps=1, **EXPONENTIAL),
        trainer(tmp_path / "looked", max_steps=1, **EXPONENTIAL),
    )
    for _ in range(2):  # all batches of the epoch but none of the next
        next(iter(looked_into.loader))
    position = looked_into.loader.state_dict()
    for run in (plain, looked_into):
        run.train()
    assert plain.objective == looked_into.objective != Contrastive()
    assert position["batches"] == 2


# What is best, and what was gained.


def test_the_best_adapter_is_never_that_of_step_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = trainer(tmp_path, max_steps=2, eval_steps=1)
    scores = iter([0.9, 0.2, 0.1])
    monkeypatch.setattr(run, "evaluate", lambda: {"top1": next(scores)})
    run.train()
    assert (run.state.best_metric, run.state.best_global_step) == (0.2, 1)


def test_gains_are_those_of_the_same_images(tmp_path: Path):
    trainer(tmp_path, eval_steps=3, num_evaluation_batches=2, num_eval=6, learning_rate=0.1).train()
    log = [entry for entry in read_log(tmp_path / "log.jsonl") if "eval/top1" in entry]
    assert "eval/margin_gain" not in log[0]
    for entry in log[1:]:
        change = entry["eval/margin"] - log[0]["eval/margin"]
        assert entry["eval/margin_gain"] == pytest.approx(change, abs=1e-5)
        assert entry["eval/margin_gain_stderr"] > 0 and entry["eval/margin_stderr"] > 0


def test_standard_errors_are_those_of_statistics():
    values = torch.tensor([1.0, 2.0, 4.0, torch.nan])
    assert mean_and_error(values) == pytest.approx((7 / 3, values[:3].std().item() / 3**0.5))
    found = gains({"top1": values, "timestep": values}, {"top1": values - 1, "timestep": values})
    assert found == pytest.approx({"top1_gain": 1.0, "top1_gain_stderr": 0.0})
