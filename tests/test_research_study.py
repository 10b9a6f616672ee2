"""The study of the shapes world in its smallest size: trains, measures, goes on where it stopped, writes the table."""

import json

import numpy as np
import pytest

import settings
import study
import why
from shapes_world import train_adapter, world


def test_everything_from_training_to_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "IMAGES", 40)
    folders = ["--adapters", str(tmp_path / "adapters"), "--out", str(tmp_path / "out"), "--training-seeds", "2"]
    names = ["softrepa", "lora"]
    study.main(["train", *names, *folders, "--steps", "2"])
    assert (tmp_path / "adapters" / "softrepa-1" / "adapter_model.safetensors").exists()
    size = [*folders, "--seeds", "2", "--guidance", "1", "3", "--per-skill", "1"]
    study.main(["measure", "base", *names, *size])
    assert capsys.readouterr().out.count("guidance 3 seed 1:") == 5  # of the base, and of two adapters each
    study.main(["measure", "base", *names, *size])
    assert "seed" not in capsys.readouterr().out  # nothing is drawn twice
    study.main(["table", "base", *names, *size])
    printed = capsys.readouterr().out
    assert printed.count("| softrepa |") == 2
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results) == {"base", "softrepa", "lora"}
    assert 0 <= results["softrepa"]["3"]["top1"] <= 1
    assert results["base"]["1"]["distance"] > 0
    totals = [results[name]["3"]["accuracy"]["total"][0] for name in ("softrepa", "base")]
    assert results["softrepa"]["3"]["gain"] == pytest.approx(totals[0] - totals[1])
    assert results["softrepa"]["3"]["error"] >= results["softrepa"]["3"]["training"] >= 0


def test_the_error_of_a_gain_is_the_spread_of_gains_over_prompts_and_trainings():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(2000):
        skill = rng.normal(0.5, 0.1, 3)  # of each training
        ease = rng.uniform(-0.3, 0.3, 200)  # of each prompt
        base = rng.random((1, 200)) < 0.3 + ease
        found.append(study.gain_and_errors(rng.random((3, 200)) < skill[:, None] + ease, base))
    spread = np.std([one["gain"] for one in found])
    assert np.sqrt(np.mean([one["error"] ** 2 for one in found])) == pytest.approx(spread, rel=0.15)


def test_the_base_is_measured_in_the_exact_phrasing_too():
    class Size:
        per_skill = 2

    plain, exact = (study.asked(name, 0, Size) for name in study.BASE_ROWS)
    assert [ask.exactly() for ask in plain] == exact and plain != exact


def test_wrong_captions_of_the_pairs_are_wrong():
    rows = train_adapter.pairs(30, seed=0, hard=3)
    assert all(len(row["negatives"]) == 3 and row["text"] not in row["negatives"] for row in rows)
    assert train_adapter.pairs(3, seed=0)[0]["negatives"] == []
    assert not any(row["text"].startswith("there ") for row in rows)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_captions_are_false_as_often_as_told(share):
    rng = np.random.default_rng(0)
    scenes = [settings.noisy_scene(rng, share) for _ in range(400)]
    assert np.mean([not ask.true_of(things) for ask, things in scenes]) == pytest.approx(share, abs=0.06)


def test_rows_with_false_captions_have_written_negatives(monkeypatch):
    monkeypatch.setattr(settings, "IMAGES", 20)
    rows = settings.noisy(0.4)(0, 2)
    assert len(rows) == 20 and all(len(row["negatives"]) == 2 for row in rows)


def test_another_camera_takes_darker_images_of_a_warm_cast():
    image = world.render([], 0.95)
    red, green, blue = settings.as_another_camera(image).getpixel((0, 0))
    assert 230 > red > green > blue > 100


def test_every_setting_is_trained_by_each_objective():
    names = [name.split(", ")[1] for name in settings.SETTINGS]
    assert all(names.count(name) == 3 for name in set(names) - {"own-times"})
    assert settings.SETTINGS["denoising, few-20"].recipe["train_batch_size"] == 20


def test_the_frechet_distance_of_independent_normals_has_a_closed_form():
    rng = np.random.default_rng(0)
    first, second = rng.normal(0, 1, (200_000, 3)), rng.normal([1, 0, 0], [1, 2, 3], (200_000, 3))
    expected = 1 + sum((a - b) ** 2 for a, b in zip((1, 1, 1), (1, 2, 3), strict=True))
    assert study.frechet(first, second) == pytest.approx(expected, rel=0.02)
    assert study.frechet(first, first) == pytest.approx(0, abs=1e-9)


def test_errors_are_printed_for_both_phrasings(capsys):
    why.main(["--count", "10"])
    printed = capsys.readouterr().out
    assert printed.count("| everyday |") == printed.count("| exact |") == len(why.TIMESTEPS)
