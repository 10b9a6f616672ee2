"""Photographs with sentences, through VAE, text encoders and denoiser of every family: train, save, load, draw."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import tiny
from diffusers_softrepa import load_softrepa
from diffusers_softrepa.training.arguments import ContrastiveFlowMatchingArguments
from diffusers_softrepa.training.log import read_log
from diffusers_softrepa.training.step.collate import Draws
from diffusers_softrepa.training.trainer import ContrastiveFlowMatchingTrainer
from training_runs import pipeline

PHOTOS = Path(__file__).parent / "photos"
FAMILY_NAMES = [family.name for family in tiny.FAMILIES]


def photo_trainer(family: str, output_dir: Path, **settings: Any) -> ContrastiveFlowMatchingTrainer:
    """Returns a trainer on the photographs; random denoisers err by 1 to 2, hence the temperature."""
    args = ContrastiveFlowMatchingArguments(
        output_dir=str(output_dir),
        negative_caption_column="not_text",
        resolution=32,
        logits="linear",
        temperature=0.02,
        denoising_weight=0.0,
        logging_steps=1,
        report_to="none",
        **{"max_steps": 4, "learning_rate": 0.05} | settings,
    )
    return ContrastiveFlowMatchingTrainer(pipeline(family), args, PHOTOS)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_photographs_go_from_files_to_pictures(tmp_path: Path, name: str):
    run = photo_trainer(name, tmp_path, cache_latents=True, cache_text=True)
    assert run.train().finished
    fresh = pipeline(name)
    prompt = "A cat with long whiskers lies on a pink blanket."
    plain = tiny.generate(fresh, prompt, output_type="np")
    load_softrepa(fresh, tmp_path)
    drawn = tiny.generate(fresh, prompt, output_type="np")
    assert torch.from_numpy(drawn).isfinite().all()
    assert_close(drawn, tiny.generate(run.pipeline, prompt, output_type="np"), rtol=0, atol=0)
    assert abs(drawn - plain).max() > 0


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_the_loss_of_photographs_at_fixed_noise_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    run = photo_trainer(name, tmp_path, max_steps=20, learning_rate=0.1)
    batch = next(iter(run.get_eval_dataloader(PHOTOS)))
    pairs = run.data_collator(batch, Draws(0, 0), torch.tensor([300.0, 500.0, 700.0, 900.0]))
    assert len({example.caption for example in batch}) == 4 and all(example.negative_captions for example in batch)
    monkeypatch.setattr(run, "data_collator", lambda *_: pairs)
    run.train()
    losses = [entry["loss"] for entry in read_log(tmp_path / "log.jsonl")]
    assert losses[-1] < losses[0] - 0.05
    assert sum(losses[-6:]) < sum(losses[7:13]) < sum(losses[:6])


def test_aspect_buckets_keep_the_shape_of_photographs(tmp_path: Path):
    run = photo_trainer("sd3", tmp_path, aspect_buckets=True, train_batch_size=2)
    sizes = run.loader.order.size_counts
    assert sizes is not None and len(sizes) == 2
    shapes = {example.size for batch in run.loader for example in batch}
    assert shapes == set(sizes)
