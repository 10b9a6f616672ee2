"""Metrics score the validation pictures of a training run, with the tokens and without."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import training_runs
from diffusers_softrepa.evaluation import ImageMetric
from diffusers_softrepa.training import ContrastiveFlowMatchingArguments, ContrastiveFlowMatchingTrainer
from diffusers_softrepa.training.log import read_log
from evaluation_runs import REFERENCES, ColorDistance


class Brightness(ImageMetric):
    """How bright pictures are; counts how often it is loaded and let go of."""

    name, loads, closes = "brightness", 0, 0

    def setup(self, device: torch.device) -> None:
        self.loads += 1

    def close(self) -> None:
        self.closes += 1

    def score(self, images: Any, prompts: Any) -> Any:
        assert [prompt.text for prompt in prompts] == ["a cat", "a dog"]
        return [np.asarray(image).mean() for image in images]


def trainer(folder: Path, **given: Any) -> ContrastiveFlowMatchingTrainer:
    settings = training_runs.QUICK | {
        "max_steps": 2,
        "eval_steps": 1,
        "validation_prompts": ["a cat", "a dog"],
        "num_validation_inference_steps": 1,
    }
    args = ContrastiveFlowMatchingArguments(output_dir=str(folder), **settings)
    return ContrastiveFlowMatchingTrainer(training_runs.pipeline("sd15"), args, training_runs.rows(), **given)


def test_validation_pictures_are_scored_and_logged(tmp_path: Path):
    metric = Brightness()
    trainer(tmp_path, validation_metrics=[metric]).train()
    entries = [entry for entry in read_log(tmp_path / "log.jsonl") if "validation/brightness" in entry]
    assert [entry["step"] for entry in entries] == [0, 1, 2]
    assert metric.loads == metric.closes == 3
    with Image.open(tmp_path / "validation" / "step-000002.png") as grid:
        pixels = np.asarray(grid, dtype=float)  # a caption of 16 rows above each pair of 16 x 16 pictures
    for column, name in ((0, "validation/brightness/base"), (1, "validation/brightness")):
        cells = [pixels[top : top + 16, 16 * column : 16 * column + 16] for top in (16, 48)]
        assert entries[-1][name] == pytest.approx(np.mean(cells))


def test_distances_of_sets_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"scored one by one, but \['colors'\] compare whole sets"):
        trainer(tmp_path, validation_metrics=[ColorDistance(REFERENCES)])
