"""The dry run: its numbers are those of the run, and it leaves nothing behind."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.autograd.graph import saved_tensors_hooks

import tiny
from diffusers_softrepa.conditioning.conditions import take
from diffusers_softrepa.pairs import pair_errors
from diffusers_softrepa.quoting import human_bytes
from diffusers_softrepa.training import ContrastiveFlowMatchingArguments, ContrastiveFlowMatchingTrainer
from diffusers_softrepa.training.estimate import Estimate, activation_bytes


def photos(count: int = 13) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8))
    return [{"image": image, "text": [f"photo {number}", f"view {number}"]} for number in range(count)]


def trainer_of(family: tiny.Family, folder: Path, data: Any = None, **settings: Any) -> ContrastiveFlowMatchingTrainer:
    given = {"output_dir": str(folder / "out"), "resolution": 16, "dry_run": True} | settings
    args = ContrastiveFlowMatchingArguments(**given)
    return ContrastiveFlowMatchingTrainer(family.pipeline(), args, photos() if data is None else data)


@pytest.mark.parametrize("family", tiny.FAMILIES, ids=lambda family: family.name)
def test_a_dry_run_prints_writes_nothing_and_changes_no_token(
    family: tiny.Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    trainer = trainer_of(family, tmp_path, cache_text=True, cache_latents=True)
    before = [parameter.clone() for parameter in trainer.parameters]
    assert not trainer.train().finished
    printed = capsys.readouterr().out
    for word in ("steps", "6, 2 epochs of 13 images", "activations", "latent cache", "text cache", "an estimate"):
        assert word in printed
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(*pair) for pair in zip(before, trainer.parameters, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES, ids=lambda family: family.name)
def test_a_chunk_keeps_as_much_as_its_pairs_together(family: tiny.Family, tmp_path: Path, checkpointing: bool):
    trainer = trainer_of(family, tmp_path)
    conditioner, denoiser = trainer.conditioner, trainer.conditioner.denoiser
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
    latent = conditioner.latent_shape(16, 16)
    conditions = conditioner.encode_captions(["a cat"])
    one = activation_bytes(conditioner, conditions, latent, torch.device("cpu"))

    resident = {tensor.untyped_storage().data_ptr() for tensor in (*denoiser.parameters(), *denoiser.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    noisy, four = torch.randn(4, *latent), torch.zeros(4, dtype=torch.int64)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        errors = pair_errors(conditioner.predict(noisy, torch.rand(4) * 1000, take(conditions, four)), noisy)
    together = sum(size for address, size in kept.items() if address not in resident)
    errors.sum().backward()
    assert one > 0
    assert 0.9 * 4 * one <= together <= 1.1 * 4 * one


def test_gradient_checkpointing_keeps_less(tmp_path: Path):
    plain = trainer_of(tiny.FAMILIES[2], tmp_path).estimate()
    checkpointed = trainer_of(tiny.FAMILIES[2], tmp_path, gradient_checkpointing=True).estimate()
    assert checkpointed.activation_bytes_per_pair < plain.activation_bytes_per_pair / 2


def test_the_counts_are_those_of_the_trainer(tmp_path: Path):
    trainer = trainer_of(tiny.FAMILIES[2], tmp_path, train_batch_size=6, gradient_accumulation_steps=2, max_steps=9)
    found = trainer.estimate()
    assert (found.steps, found.epochs, found.images) == (9, 9.0, 13)
    assert (found.images_per_step, found.captions_per_image, found.pairs_per_step) == (12, 6, 72)
    assert found.pairs_at_once == 12  # two rows of 6, which a chunk of 16 holds
    assert found.trainable_parameters == trainer.adapter.config.num_parameters
    models = [part for part in trainer.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert found.frozen_parameters == sum(tensor.numel() for model in models for tensor in model.parameters())
    assert found.activation_bytes == 12 * found.activation_bytes_per_pair
    state = 2 * 4 * found.trainable_parameters  # AdamW's two averages, float32, and a step count each
    assert found.optimizer_bytes - 3 * 4 * found.trainable_parameters == state + 2 * 4


@pytest.mark.parametrize(
    ("settings", "pairs", "at_once"),
    [
        ({}, 16, 16),
        ({"pair_chunk_size": 3}, 16, 3),
        ({"pair_chunk_size": 9}, 16, 8),
        ({"num_backward_negatives": 1, "pair_chunk_size": 5}, 16, 4),
        ({"objective": "denoising"}, 4, 4),
    ],
)
def test_pairs_at_once_are_the_engines(tmp_path: Path, settings: dict[str, Any], pairs: int, at_once: int):
    found = trainer_of(tiny.FAMILIES[0], tmp_path, **settings).estimate()
    assert (found.pairs_per_step, found.pairs_at_once) == (pairs, at_once)


def test_agsm_keeps_predictions_and_an_average(tmp_path: Path):
    plain = trainer_of(tiny.FAMILIES[0], tmp_path).estimate()
    agsm = trainer_of(tiny.FAMILIES[0], tmp_path, objective="agsm").estimate()
    assert plain.prediction_bytes == 0
    assert agsm.prediction_bytes == 2 * 16 * 4 * 8 * 8 * 4
    assert agsm.trainable_parameters == 2 * plain.trainable_parameters
    assert agsm.optimizer_bytes > 2 * plain.optimizer_bytes


def test_the_caches_are_as_large_as_they_will_be(tmp_path: Path):
    found = trainer_of(tiny.FAMILIES[2], tmp_path, cache_text=True, cache_latents=True).estimate()
    trainer = trainer_of(
        tiny.FAMILIES[2],
        tmp_path,
        cache_text=True,
        cache_latents=True,
        objective="denoising",
        dry_run=False,
        max_steps=1,
        report_to="none",
    )
    trainer.train()
    text, latents = trainer.encoder.text, trainer.encoder.latents
    assert text is not None and latents is not None
    assert text.num_bytes() == found.text_cache_bytes + found.latent_cache_bytes // 13  # all images are one image
    assert (
        found.text_cache_bytes is not None
        and trainer_of(tiny.FAMILIES[2], tmp_path).estimate().text_cache_bytes is None
    )


def test_a_stream_has_no_length(tmp_path: Path):
    import datasets

    stream = datasets.Dataset.from_list(photos(4)).to_iterable_dataset()
    found = trainer_of(tiny.FAMILIES[0], tmp_path, stream, max_steps=5, cache_text=True).estimate()
    assert (found.images, found.epochs, found.text_cache_bytes) == (None, None, None)
    assert "an open number of epochs of a stream" in str(found)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 KB"), (2e9, "2 GB"), (3e15, "3e+03 TB")]
)
def test_bytes_are_said_in_the_unit_that_keeps_them_short(size: float, text: str):
    assert human_bytes(size) == text


def test_what_is_zero_or_off_is_not_printed(tmp_path: Path):
    found = trainer_of(tiny.FAMILIES[0], tmp_path).estimate()
    assert isinstance(found, Estimate)
    assert "predictions" not in str(found) and "cache" not in str(found)
    assert "predictions" in str(replace(found, prediction_bytes=5))
