"""The demo runs the main job on the embedded pipeline, in its smallest size."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_loads_measures_draws_and_trains(demo, tmp_path, capsys):
    demo.main(["--per-skill", "2", "--steps", "4", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    for skill in (*demo.SKILLS, "total"):
        assert re.search(rf"{skill} +\d+\.\d % +\d+\.\d %", printed)
    with Image.open(tmp_path / "pictures.png") as pictures:
        assert pictures.height > 14 * 64
    with Image.open(tmp_path / "curves.png") as curves:
        assert curves.width > 900
    log = [json.loads(line) for line in (tmp_path / "trained" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 4
    assert (tmp_path / "trained" / "adapter_model.safetensors").exists()
    demo.main(["--per-skill", "1", "--steps", "2", "--output", str(tmp_path)])  # again, into the same folder
    assert json.loads((tmp_path / "trained" / "log.jsonl").read_text().splitlines()[-1])["step"] == 2


def test_the_base_draws_clean_pictures_of_one_thing(demo):
    """Its weights are in the repository; this is what the training of them is for."""
    pipe = demo.load_base()
    asks = [ask for ask in demo.prompts(24, seed=7) if ask.skill in ("single_object", "colors")]
    found = demo.measure(pipe, demo.draw(pipe, asks, guidance=3.0, seed=7), asks)
    assert found.correct.mean() > 0.6
    assert found.quality.mean() > 0.8
