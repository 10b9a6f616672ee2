"""The study of the shapes world in its smallest size: trains, measures, goes on where it stopped, writes the table."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "shapes_world"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("study", FOLDER / "study.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_everything_from_training_to_the_table(study, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "PICTURES", 40)
    folders = ["--adapters", str(tmp_path / "adapters"), "--out", str(tmp_path / "out")]
    names = ["softrepa", "lora"]
    study.main(["train", *names, *folders, "--steps", "2"])
    assert (tmp_path / "adapters" / "softrepa" / "adapter_model.safetensors").exists()
    size = [*folders, "--seeds", "2", "--guidance", "1", "3", "--per-skill", "1"]
    study.main(["measure", "base", *names, *size])
    assert capsys.readouterr().out.count("guidance 3 seed 1:") == 3
    study.main(["measure", "base", *names, *size])
    assert "seed" not in capsys.readouterr().out  # nothing is drawn twice
    study.main(["table", "base", *names, *size])
    printed = capsys.readouterr().out
    assert printed.count("| softrepa |") == 3  # at its best guidance scale, and at each
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results) == {"base", "softrepa", "lora"}
    assert 0 <= results["softrepa"]["3"]["top1"] <= 1
    assert results["base"]["1"]["distance"] > 0
    gain, error = results["softrepa"]["3"]["gain"]
    totals = [results[name]["3"]["accuracy"]["total"][0] for name in ("softrepa", "base")]
    assert gain == pytest.approx(totals[0] - totals[1]) and error >= 0


def test_the_base_is_measured_with_every_prompt_tagged_too(study):
    args = SimpleNamespace(per_skill=2)
    plain, tagged = (study.asked(name, 0, args) for name in study.BASE_ROWS)
    assert all(ask.caption.endswith(" hd") for ask in tagged) and not any(ask.tag for ask in plain)
    assert [(ask.wants, ask.relation) for ask in plain] == [(ask.wants, ask.relation) for ask in tagged]


def test_wrong_captions_of_the_pairs_are_wrong(study):
    rows = study.pairs(30, seed=0, hard=3)
    assert all(len(row["negatives"]) == 3 and row["text"] not in row["negatives"] for row in rows)
    assert study.pairs(3, seed=0)[0]["negatives"] == []


def test_the_frechet_distance_of_independent_normals_has_a_closed_form(study):
    rng = np.random.default_rng(0)
    first, second = rng.normal(0, 1, (200_000, 3)), rng.normal([1, 0, 0], [1, 2, 3], (200_000, 3))
    expected = 1 + sum((a - b) ** 2 for a, b in zip((1, 1, 1), (1, 2, 3), strict=True))
    assert study.frechet(first, second) == pytest.approx(expected, rel=0.02)
    assert study.frechet(first, first) == pytest.approx(0, abs=1e-9)


def test_errors_and_the_tag_say_why(capsys):
    sys.path.insert(0, str(FOLDER))
    import why

    why.main(["errors", "--count", "10"])
    printed = capsys.readouterr().out
    assert printed.count("| hd |") == len(why.TIMESTEPS)
    assert printed.count("| 0.0000 |\n") >= len(why.TIMESTEPS)  # the tagged lies above itself by nothing
    pipe = why.load_base()
    before = repr(pipe.transformer)
    states = why.tag_as_tokens(pipe, 8)
    assert states.shape == (6, 5, pipe.transformer.inner_dim)
    assert all(not block._forward_pre_hooks for block in pipe.transformer.transformer_blocks)
    assert set(why.tag(pipe, 1, 1.0)) == {"base", "tag as tokens", "tagged"}
    assert repr(pipe.transformer) == before


def test_the_tag_stands_where_its_states_are_read():
    sys.path.insert(0, str(FOLDER))
    import models
    import why
    from world import Ask, Want

    ask = Ask("colors", (Want(1, "red", "circle"),)).tagged()
    words = models.clip_tokenizer(), models.t5_tokenizer()
    clip, t5 = (some.convert_ids_to_tokens(some(ask.caption).input_ids) for some in words)
    at = [*clip, *[""] * (models.MAX_WORDS - len(clip)), *t5]
    assert "".join(at[place] for place in why.TAG_PLACES).replace("</w>", "") == "hd\u2581hd"


def test_tokens_learn_some_of_guidance_and_the_pipeline_is_as_it_was():
    sys.path.insert(0, str(FOLDER))
    import why

    pipe = why.load_base()
    before = repr(pipe.transformer)
    shares = why.learned_guidance(pipe, 60, 2.0, batch=4)
    assert len(shares) == 2 and all(share < 1 for share in shares)
    assert shares[1] > shares[0]
    assert repr(pipe.transformer) == before
