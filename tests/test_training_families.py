"""Families through the trainer and, with what it saved, through their own pipelines."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from diffusers_softrepa import (
    add_softrepa,
    disable_softrepa,
    load_softrepa,
    save_softrepa,
    unload_softrepa,
)
from diffusers_softrepa.pipeline import denoiser_of
from diffusers_softrepa.training import ContrastiveFlowMatchingArguments, ContrastiveFlowMatchingTrainer
from diffusers_softrepa.training.log import read_log
from diffusers_softrepa.training.step.collate import Draws
from diffusers_softrepa.training.step.engine import PairBatch
from training_runs import QUICK, rows
from zoo_pipelines import ELDERS, ZOO, Entry

pytestmark = [
    # Of diffusers' own: Chroma's positions, and DPM-Solver's tables under NumPy 2.
    pytest.mark.filterwarnings("ignore:.*FluxPosEmbed.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

every_entry = pytest.mark.parametrize("entry", ZOO.values(), ids=ZOO)
STEPS = 20


def pipeline(entry: Entry) -> Any:
    """Returns a tiny pipeline, the same at every call."""
    torch.manual_seed(0)
    return entry.make()


def trainer(entry: Entry, output_dir: Path, pipe: Any = None, **settings: Any) -> ContrastiveFlowMatchingTrainer:
    quick = QUICK | {"max_sequence_length": entry.length, "eval_steps": 99, "save_steps": 99} | settings
    args = ContrastiveFlowMatchingArguments(output_dir=str(output_dir), **quick)
    return ContrastiveFlowMatchingTrainer(pipeline(entry) if pipe is None else pipe, args, rows(3))


def batch_of(run: ContrastiveFlowMatchingTrainer) -> PairBatch:
    """Returns the first batch of a run, noised once."""
    return run.data_collator(next(iter(run.loader)), Draws(seed=0, batch=0))


@pytest.mark.parametrize("entry", (ELDERS | ZOO).values(), ids=ELDERS | ZOO)
def test_twenty_steps_lower_the_loss_of_a_batch_and_a_fresh_pipeline_draws_with_the_tokens(
    entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = trainer(entry, tmp_path, max_steps=STEPS, learning_rate=0.04, temperature=0.002)
    batch = batch_of(run)
    monkeypatch.setattr(run, "data_collator", lambda *_: batch)
    assert run.train().finished
    losses = [entry["loss"] for entry in read_log(tmp_path / "log.jsonl") if "loss" in entry]
    assert len(losses) == STEPS
    assert losses[-1] < 0.99 * losses[0]
    fresh = pipeline(entry)
    plain = entry.generate(fresh, "a red cat", **entry.unguided)
    load_softrepa(fresh, tmp_path)
    drawn = entry.generate(fresh, "a red cat", **entry.unguided)
    assert not torch.equal(drawn, plain)
    assert_close(entry.generate(run.pipeline, "a red cat", **entry.unguided), drawn, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["flux2", "qwen", "zimage", "chroma", "sana", "pixart-sigma"])
def test_half_precision_trains_and_validates_with_guidance(name: str, tmp_path: Path):
    drawn = {"validation_prompts": ["a cat"], "num_validation_inference_steps": 2, "validation_guidance_scale": 2.0}
    sizes = {"resolution": 32, "mixed_precision": "bf16", "objective": "agsm", "temperature": None, "logits": "linear"}
    run = trainer(ZOO[name], tmp_path, max_steps=1, eval_steps=1, **drawn, **sizes)
    before = [parameter.detach().clone() for parameter in run.parameters]
    result = run.train()
    assert math.isfinite(result.metrics["loss"])
    assert not any(torch.equal(old, new) for old, new in zip(before, run.parameters, strict=True))
    assert picture_size(tmp_path / "validation" / "step-000001.png") == (64, 32 + 16)
    assert run.conditioner.denoiser.dtype == torch.bfloat16


@every_entry
def test_checkpointing_leaves_the_gradients_as_they_are_or_is_refused(entry: Entry, tmp_path: Path):
    pipe = pipeline(entry)
    plain = trainer(entry, tmp_path, pipe)
    batch = batch_of(plain)
    expected = plain.engine.step(batch).gradients
    plain.conditioner.denoiser.enable_gradient_checkpointing()
    if entry.name == "chroma":
        with pytest.raises(ValueError, match="some blocks of ChromaTransformer2DModel do not get the text mask"):
            plain.engine.step(batch)
        with pytest.raises(ValueError, match="train without gradient_checkpointing"):
            trainer(entry, tmp_path, gradient_checkpointing=True)
    else:
        assert_close(plain.engine.step(batch).gradients, expected, rtol=1e-4, atol=1e-7)


@every_entry
def test_captions_of_a_cache_train_as_fresh_ones_do(entry: Entry, tmp_path: Path):
    runs = [trainer(entry, tmp_path, cache_text=cached, max_steps=1) for cached in (False, True, True)]
    conditions = [run.encoder.encode_captions(["a red cat", "two dogs, a tree"]) for run in runs]
    for cached in conditions[1:]:
        assert_close(cached, conditions[0])


def test_families_of_one_text_encoder_do_not_share_a_cache_of_text(tmp_path: Path):
    settings = {"cache_text": True, "cache_dir": str(tmp_path)}
    runs = [trainer(ZOO[name], tmp_path / name, **settings) for name in ("pixart-alpha", "pixart-sigma")]
    encoders = [run.pipeline.text_encoder.state_dict() for run in runs]
    assert_close(encoders[0], encoders[1], rtol=0, atol=0)
    assert len({run.encoder.text.folder for run in runs}) == 2


def test_a_dry_run_measures_a_family_whose_text_is_ragged(tmp_path: Path):
    found = trainer(ZOO["zimage"], tmp_path, max_steps=1).estimate()
    assert found.steps == 1


# Their own pipelines, from the adapter on.


def picture_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


@contextmanager
def rows_of(denoiser: Any) -> Iterator[list[Tensor]]:
    """Collects what a denoiser predicts, row by row."""
    rows: list[Tensor] = []
    handle = denoiser.register_forward_hook(lambda module, args, output: rows.extend(output[0]))
    try:
        yield rows
    finally:
        handle.remove()


@pytest.mark.parametrize("entry", (ELDERS | ZOO).values(), ids=ELDERS | ZOO)
def test_an_adapter_goes_through_the_real_pipeline_from_loading_to_saving(entry: Entry, tmp_path: Path):
    pipe = pipeline(entry)
    branches = 1 if entry.name == "flux2" else 2
    with rows_of(denoiser_of(pipe)) as plain:
        base = entry.generate(pipe, "a red cat", **entry.guided)
    add_softrepa(pipe, generator=torch.Generator().manual_seed(1))
    save_softrepa(pipe, tmp_path / "tokens")
    fresh = pipeline(entry)
    load_softrepa(fresh, tmp_path / "tokens")
    with rows_of(denoiser_of(fresh)) as rows:
        drawn = entry.generate(fresh, "a red cat", **entry.guided)
    assert len(rows) == 2 * branches  # in two steps
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(rows, plain, strict=True))
    assert not torch.equal(drawn, base)
    assert_close(entry.generate(pipe, "a red cat", **entry.guided), drawn, rtol=0, atol=0)
    entry.generate(fresh, "a red cat", output_type="pil", **entry.guided)[0].save(tmp_path / "picture.png")
    assert picture_size(tmp_path / "picture.png") == entry.size[::-1]
    save_softrepa(fresh, tmp_path / "again")
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("tokens", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    for take_off in (disable_softrepa, unload_softrepa):
        take_off(fresh)
        assert_close(entry.generate(fresh, "a red cat", **entry.guided), base, rtol=0, atol=0)
