"""CLIP scores against the oracle: areas are right, the shipped CLIP is one, and the command compares and writes."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPModel

import agreement
import roc
import train_clip
from diffusers_softrepa.evaluation import FunctionMetric, score
from shapes_world import drawing, edits, models, world
from shapes_world.oracle_metric import OracleMetric, as_prompts

FOLDER = Path(agreement.__file__).parent


def drawn(seed: int, groups: int = 20, each: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores with ties, which of them are right, and groups that are more alike than strangers."""
    rng = np.random.default_rng(seed)
    belongs = np.repeat(np.arange(groups), each)
    ease = rng.normal(size=groups)[belongs]
    right = rng.random(len(belongs)) < 1 / (1 + np.exp(-ease))
    return np.round(right + ease + rng.normal(size=len(belongs)), 1), right, belongs


def counted(scores: np.ndarray, right: np.ndarray, groups: np.ndarray | None = None) -> float:
    """The share of pairs that a right image wins, pair by pair."""
    won, pairs = 0.0, 0
    for i in np.flatnonzero(right):
        for j in np.flatnonzero(~right):
            if groups is None or groups[i] == groups[j]:
                won += 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
                pairs += 1
    return won / pairs


@pytest.mark.parametrize("seed", range(3))
def test_the_area_is_the_share_of_pairs_that_the_right_image_wins(seed: int):
    scores, right, groups = drawn(seed)
    assert roc.auc(scores, right, groups).value == pytest.approx(counted(scores, right))
    assert roc.auc_within(scores, right, groups).value == pytest.approx(counted(scores, right, groups))


def test_the_error_of_single_images_is_delongs():
    scores, right, groups = drawn(3)
    wins = (scores[right][:, None] > scores[~right]) + 0.5 * (scores[right][:, None] == scores[~right])
    variance = wins.mean(1).var(ddof=1) / wins.shape[0] + wins.mean(0).var(ddof=1) / wins.shape[1]
    assert roc.auc(scores, right, np.arange(len(groups))).error == pytest.approx(math.sqrt(variance))


def test_an_image_that_comes_twice_is_no_new_evidence():
    scores, right, groups = drawn(4)
    for area in (roc.auc, roc.auc_within):
        once, twice = area(scores, right, groups), area(*(np.tile(part, 2) for part in (scores, right, groups)))
        assert (once.value, once.error) == pytest.approx((twice.value, twice.error))


def test_the_error_is_the_spread_of_the_area_over_samples():
    for area in (roc.auc, roc.auc_within):
        found = [area(*drawn(seed, groups=40)) for seed in range(100)]
        spread = np.std([mean.value for mean in found], ddof=1)
        assert np.mean([mean.error for mean in found]) == pytest.approx(spread, rel=0.25)


def test_without_right_or_without_wrong_images_there_is_no_area():
    scores, _, groups = drawn(5)
    for right in (np.ones(len(scores), dtype=bool), np.zeros(len(scores), dtype=bool)):
        assert math.isnan(roc.auc(scores, right, groups).value)
        assert math.isnan(roc.auc_within(scores, right, groups).value)


def test_the_oracle_is_a_metric_of_the_package():
    asks, rng = world.prompts(2, seed=0), np.random.default_rng(0)
    true = [world.render(ask.scene(rng)) for ask in asks]
    result = score({"true": true, "none": [world.render([])] * len(asks)}, *judged(asks))
    assert result.row("true", "oracle").mean == 1 and result.row("none", "oracle").mean == 0
    assert result.category_names == list(world.SKILLS)


def judged(asks: list) -> tuple[list, list]:
    return as_prompts(asks), [OracleMetric()]


def test_a_score_that_knows_agrees_and_one_that_is_upside_down_contradicts():
    asks, rng = world.prompts(3, seed=1), np.random.default_rng(0)
    true = [world.render(ask.scene(rng)) for ask in asks]
    empty = [world.render([])] * len(asks)
    half = [image if number % 2 else blank for number, (image, blank) in enumerate(zip(true, empty, strict=True))]
    oracle = OracleMetric()
    for sign, area, verdict in ((1, 1.0, "agree"), (-1, 0.0, "contradict each other")):
        knows = FunctionMetric(lambda *given, sign=sign: [sign * one for one in oracle.score(*given)], "clip_score")
        result = score({"base": half, "better": true}, as_prompts(asks), [knows, oracle])
        found = agreement.compared(result)
        assert found["areas"]["all"]["auc"] == area
        assert [row["verdict"] for row in found["settings"] if row["category"] == "all"] == ["", verdict]
        assert math.isnan(agreement.compared(result, leave_out=["base"])["areas"]["all"]["auc"])


def test_false_captions_are_false_and_put_like_the_true_one():
    rng = np.random.default_rng(2)
    for ask in world.prompts(4, seed=2):
        things = ask.scene(rng)
        found = agreement.false_captions(ask, things, rng)
        assert set(found) == set(agreement.KINDS)
        for kind, asks in found.items():
            assert not any(wrong.true_of(things) for wrong in asks)
            assert kind == "another image" or all(wrong.phrasing // 2 == ask.phrasing // 2 for wrong in asks)


def test_the_shipped_clip_loads_as_any_and_knows_single_things():
    metric, rng = agreement.clip_score(), np.random.default_rng(3)
    metric.setup(torch.device("cpu"))
    assert metric.loaded.model.dtype == torch.float32 and isinstance(metric.loaded.model, CLIPModel)
    assert (FOLDER / "clip" / "model.safetensors").stat().st_size < 1.5e6
    asks = [world.random_ask(rng, "colors") for _ in range(24)]
    images = [world.render(ask.scene(rng)) for ask in asks]
    others = [replace(ask, wants=asks[number - 1].wants) for number, ask in enumerate(asks)]
    true, false = (metric.score(images, as_prompts(some)) for some in (asks, others))
    different = torch.tensor([ask.wants != other.wants for ask, other in zip(asks, others, strict=True)])
    assert (true > false)[different].float().mean() > 0.95
    assert (true - false)[different].mean() > 0.2
    metric.close()


def test_its_processor_makes_the_pixels_that_it_learned_from():
    image = world.render(world.random_ask(np.random.default_rng(4)).scene(np.random.default_rng(4)))
    pixels = train_clip.processor()([image], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, drawing.as_input([image]))


@pytest.mark.slow
def test_from_training_a_clip_to_the_tables(tmp_path: Path, monkeypatch, capsys):
    argv = ["--out", str(tmp_path / "clip"), "--steps", "2", "--scenes", "16", "--batch-size", "8"]
    monkeypatch.setattr(train_clip, "EVALUATED", 16)
    train_clip.main(argv)
    pipe = models.sd3_pipeline(models.vae(), width=64, layers=2)
    pipe.save_pretrained(tmp_path / "base")
    pipe.add_softrepa()
    for parameter in pipe.softrepa_parameters().values():
        torch.nn.init.normal_(parameter)
    pipe.save_softrepa(tmp_path / "tokens")
    monkeypatch.setattr(agreement, "STEPS", 2)
    monkeypatch.setitem(edits.SETTINGS, "num_inference_steps", 2)
    small = ["--clean", "1", "--per-skill", "1", "--seeds", "2", "--edits", "1", "--out", str(tmp_path / "out")]
    folders = ["--clip", str(tmp_path / "clip" / "clip"), "--base", str(tmp_path / "base")]
    capsys.readouterr()
    found = agreement.main([*small, *folders, "--adapter", str(tmp_path / "tokens")])
    assert list(found) == list(agreement.PARTS)
    assert {row["setting"] for row in found["images"]["settings"]} == {"base", "tokens"}
    assert {row["setting"] for row in found["edits"]["settings"]} == {"base", "tokens", "unedited"}
    assert found["images"]["areas"]["all"]["right"] + found["images"]["areas"]["all"]["wrong"] == 7 * 2 * 2
    written = json.loads((tmp_path / "out" / "agreement.json").read_text())
    assert written["clean"]["all"]["number"]["images"] == found["clean"]["all"]["number"]["images"] == 7
    assert (tmp_path / "out" / "agreement.md").read_text(encoding="utf-8") in capsys.readouterr().out
    assert all((tmp_path / "out" / name).stat().st_size for name in ("agreement.png", "edits.png"))


def test_an_unknown_part_is_an_error(tmp_path: Path, capsys):
    with pytest.raises(SystemExit):
        agreement.main(["dirty", "--out", str(tmp_path)])
    assert "a part is one of clean, images, edits, but dirty was given" in capsys.readouterr().err
