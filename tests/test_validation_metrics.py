"""Metrics score the validation images of a training run, with the tokens and without."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import training_runs
from diffusers_softrepa.evaluation import ImageMetric
from diffusers_softrepa.training import ContrastiveFlowMatchingArguments, ContrastiveFlowMatchingTrainer, validation
from diffusers_softrepa.training.log import read_log
from evaluation_runs import REFERENCES, ColorDistance


class Brightness(ImageMetric):
    """Mean brightness of an image; counts how often it is loaded and closed."""

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


def test_validation_images_are_scored_and_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    metric, seen, lay_out = Brightness(), [], validation.grid
    monkeypatch.setattr(validation, "grid", lambda *args, **given: (seen.append(args[0]), lay_out(*args, **given))[1])
    trainer(tmp_path, validation_metrics=[metric]).train()
    entries = [entry for entry in read_log(tmp_path / "log.jsonl") if "validation/brightness" in entry]
    assert [entry["step"] for entry in entries] == [0, 1, 2]
    assert metric.loads == metric.closes == 3
    for column, name in ((0, "validation/brightness/base"), (1, "validation/brightness")):
        expected = np.mean([np.asarray(pair[column], dtype=float) for pair in seen[-1]])
        assert entries[-1][name] == pytest.approx(expected)


def test_distances_of_sets_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"scored one by one, but \['colors'\] compare whole sets"):
        trainer(tmp_path, validation_metrics=[ColorDistance(REFERENCES)])
