"""The demo runs the main job on the embedded pipeline, in its smallest size, and what it ships does what it says."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from shapes_world.drawing import draw, load_base, measure
from shapes_world.world import prompts

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_loads_measures_draws_and_trains(demo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "SEEDS_SHOWN", 1)
    demo.main(["--per-skill", "2", "--steps", "4", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    for skill in (*demo.SKILLS, "total"):
        # In the adapter's table, and in that of the trained one.
        assert len(re.findall(rf"{skill} +\d+\.\d % +\d+\.\d %", printed)) == 2
    assert len(re.findall(r"total .* [+-]\d+\.\d ± \d+\.\d\n", printed)) == 2
    with Image.open(tmp_path / "images.png") as images:
        assert images.height > len(demo.SHOWN) * 96
    with Image.open(tmp_path / "curves.png") as curves:
        assert curves.width > 900
    log = [json.loads(line) for line in (tmp_path / "trained" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 4
    assert (tmp_path / "trained" / "adapter_model.safetensors").exists()
    demo.main(["--per-skill", "1", "--steps", "2", "--output", str(tmp_path)])  # again, into the same folder
    assert json.loads((tmp_path / "trained" / "log.jsonl").read_text().splitlines()[-1])["step"] == 2


def test_no_hint_to_install_torchvision_comes_before_the_demo():
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--help"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "torchvision" not in ran.stderr


def test_the_shipped_adapter_brings_out_what_the_shipped_base_knows(demo):
    """Their weights are in the repository; this is what the training of them is for."""
    pipe, asks = load_base(), prompts(10, seed=7)
    exact = [ask.exactly() for ask in asks]
    right = {
        "everyday": measure(pipe, draw(pipe, asks, guidance=2.0, seed=7), asks).correct,
        "exact": measure(pipe, draw(pipe, exact, guidance=2.0, seed=7), exact).correct,
    }
    pipe.load_softrepa(demo.ADAPTER)
    found = measure(pipe, draw(pipe, asks, guidance=2.0, seed=7), asks)
    gain = found.correct.astype(float) - right["everyday"]
    assert gain.mean() > 0.15 and gain.mean() > 3 * gain.std(ddof=1) / np.sqrt(len(gain))
    assert right["exact"].mean() > 1.5 * right["everyday"].mean()
    assert found.quality.mean() > 0.8
