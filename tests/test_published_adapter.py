"""The demo of published files does what it says, at SD3's real widths, in its smallest size."""

import importlib.util
import os
import re
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from diffusers_softrepa.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "published_adapter", Path(__file__).parents[1] / "examples" / "published_adapter.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(demo: ModuleType, arguments: list[str], output: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Runs the demo and checks what it left and printed; returns the latter."""
    demo.main([*arguments, "--output", str(output)])
    printed = capsys.readouterr().out
    assert "798,720 numbers" in printed
    assert printed.count("Checked: ") == 5
    distances = [float(number) for number in re.findall(r"weight \d\.\d\d: (\d\.\d+)", printed)]
    assert distances[0] == 0 and distances == sorted(distances)
    converted, saved = load_checkpoint(output / "sd3-adapter"), load_checkpoint(output / "saved-by-the-pipeline")
    assert converted[0] == saved[0]
    assert all(tensor.equal(saved[1][name]) for name, tensor in converted[1].items())
    return printed


def test_the_demo_runs_the_main_job_at_real_widths(demo, tmp_path, capsys, monkeypatch):
    """On the published files where they are, on the stand-in elsewhere."""
    monkeypatch.setattr(demo, "WEIGHTS", (0.0, 0.5, 1.0))
    printed = check(demo, ["--captions", "1", "--steps", "1", "--size", "32", "--blocks", "5"], tmp_path, capsys)
    assert ("NOT the published adapter" in printed) == (not os.environ.get("SOFTREPA_PUBLISHED_SD3"))
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (800, 304)


@pytest.mark.slow
def test_the_demo_says_when_it_shows_a_stand_in(demo, tmp_path, capsys):
    printed = check(demo, ["--published", ""], tmp_path, capsys)
    assert "NOT the published adapter but random numbers in its shapes" in printed
    assert len(re.findall(r"relative change of the latents", printed)) == len(demo.CAPTIONS)
