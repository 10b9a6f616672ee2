"""The younger families through the trainer and, with what it saved, through their own pipelines."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import tiny
from diffusers_softrepa import (
    add_softrepa,
    disable_softrepa,
    load_softrepa,
    save_softrepa,
    softrepa_parameters,
    unload_softrepa,
)
from diffusers_softrepa.training import ContrastiveFlowMatchingArguments, ContrastiveFlowMatchingTrainer
from diffusers_softrepa.training.batches import Draws
from diffusers_softrepa.training.engine import PairBatch
from diffusers_softrepa.training.journal import read_log
from training_runs import QUICK, rows
from zoo_pipelines import ZOO, Entry

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
    quick = QUICK | {"max_sequence_length": entry.length, "validation_steps": 99, "save_steps": 99} | settings
    args = ContrastiveFlowMatchingArguments(output_dir=str(output_dir), **quick)
    return ContrastiveFlowMatchingTrainer(pipeline(entry) if pipe is None else pipe, args, rows(3))


def batch_of(run: ContrastiveFlowMatchingTrainer) -> PairBatch:
    """Returns the first batch of a run, noised once."""
    return run._pairs(next(iter(run.loader)), Draws(seed=0, batch=0))


@every_entry
def test_twenty_steps_lower_the_loss_of_a_batch_and_a_fresh_pipeline_draws_with_the_tokens(
    entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = trainer(entry, tmp_path, max_steps=STEPS, learning_rate=0.03, temperature=0.002)
    batch = batch_of(run)
    monkeypatch.setattr(run, "_pairs", lambda *_: batch)
    assert run.train().finished
    losses = [entry["loss"] for entry in read_log(tmp_path / "log.jsonl") if "loss" in entry]
    assert len(losses) == STEPS
    assert losses[-1] < 0.98 * losses[0]
    fresh = pipeline(entry)
    plain = entry.generate(fresh, "a red cat", **entry.unguided)
    load_softrepa(fresh, tmp_path)
    drawn = entry.generate(fresh, "a red cat", **entry.unguided)
    assert not torch.equal(drawn, plain)
    assert_close(entry.generate(run.pipeline, "a red cat", **entry.unguided), drawn, rtol=0, atol=0)
