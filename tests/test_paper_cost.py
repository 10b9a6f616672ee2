"""What the paper's tables cost: the models are the published ones, and hours follow from their operations."""

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def cost() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "paper_cost.py"
    spec = importlib.util.spec_from_file_location("benchmarks_paper_cost", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_the_table_has_rows_for_images_and_for_what_others_measured(cost, capsys):
    cost.main(["--models", "sd15", "--tflops", "100"])
    printed = capsys.readouterr().out
    (ours,) = re.findall(r"^\| sd15, 512 px, 30 steps \| (.*) \|$", printed, re.MULTILINE)
    numbers = [float(cell.replace(",", "")) for cell in ours.split(" | ")]
    call, texts, decoding, image, images, everything, hours = numbers
    assert image == pytest.approx(60 * call + 2 * texts + decoding, abs=1)
    assert images == 10_000 and everything == pytest.approx(images * image / 1e6, rel=0.02)
    assert hours == pytest.approx(everything * 1e6 / 100 / 3600, abs=0.06)
    assert len(re.findall(r"^\| sd15 \| A100", printed, re.MULTILINE)) == 1
    assert "ESTIMATE" in printed and "sdxl" not in printed


def test_a_denoiser_call_of_sd3_has_the_operations_that_one_counts_by_hand(cost):
    image, text, width, blocks = 64 * 64, 77 + 512, 1536, 24
    projections = 2 * 12 * width**2 * (image * blocks + text * (blocks - 1))  # 4 of attention, 8 of the feed-forward
    projections += 2 * 3 * width**2 * text  # the last block reads the text and leaves it
    attention = 4 * (image + text) ** 2 * width * blocks
    assert cost.MODELS["sd3"](512).denoiser.tflop() == pytest.approx((projections + attention) / 1e12, rel=0.01)


def test_another_model_than_the_published_one_is_refused(cost):
    decoder = replace(cost.MODELS["sd15"](77).decoder, parameters=1)
    with pytest.raises(ValueError, match="AutoencoderKL must have 1 parameters, but has 83,653,863"):
        decoder.tflop()
