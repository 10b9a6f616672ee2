"""The benchmarks run, compare what they say they compare, and count memory right; not how fast."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="module")
def training() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "training.py"
    spec = importlib.util.spec_from_file_location("benchmarks_training", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny(training: ModuleType):
    return training.Shape(layers=2, heads=1, latents=8, text_tokens=4, text_dim=16, pooled_dim=16)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_our_step_has_the_naive_gradients_and_a_chunk_of_its_memory(training, tiny, checkpointing: bool):
    subject = training.Subject(tiny, checkpointing=checkpointing)
    naive, ours, chunked, sampled = training.measure(subject, 8, repeats=1)
    assert naive.difference == 0 and max(ours.difference, chunked.difference) < 1e-4 < sampled.difference
    assert naive.peak > 3 * ours.peak > 9 * chunked.peak
    assert all(len(cost.seconds) == len(cost.ratios) == 1 for cost in (naive, ours, chunked, sampled))
    if not checkpointing:
        assert all(0.5 * cost.peak < cost.saved < cost.peak for cost in (naive, ours))


def test_our_memory_is_flat_in_the_batch_size(training, tiny):
    small, large = (training.measure(training.Subject(tiny), b, repeats=0) for b in (4, 8))
    assert large[0].peak == pytest.approx(4 * small[0].peak, rel=0.1)
    for before, after in zip(small[1:], large[1:], strict=True):
        assert after.peak < 1.1 * before.peak


def test_the_tables_have_a_row_for_each_step(training, tiny, monkeypatch, capsys):
    monkeypatch.setattr(training, "Shape", lambda **_: tiny)
    monkeypatch.setattr(training, "CHECKPOINTED_BATCH", 2)
    training.main(["--batches", "2", "4", "--repeats", "1"])
    rows = re.findall(r"^\| (\d) \| ([^|]*) \|", capsys.readouterr().out, re.MULTILINE)
    steps = ["naive", "ours", "ours, 3 pairs at a time", "ours, 3 negatives trained"]
    assert rows == [(b, step) for b in ("2", "4", "2") for step in steps]
    training.main(["--sd3-medium", "--batches", "2", "--device", "cpu"])
    assert (
        len(re.findall(r"^\| (naive|ours) \| (no|yes) \| 2 \| 0\.\d \|", capsys.readouterr().out, re.MULTILINE)) == 4
    )


def test_peak_memory_counts_each_storage_once_and_until_it_is_freed(training):
    given = torch.ones(100)
    with training.PeakMemory() as memory:
        given[:50].view(5, 10).t()
        assert memory.peak == 0
        kept = given + 1
        for _ in range(3):
            kept.view(10, 10) + 1
    assert memory.peak == 800


def test_saved_memory_counts_what_the_backward_pass_waits_for(training):
    weight = torch.ones(100, requires_grad=True)

    def step() -> Tensor:
        return (2 * weight).exp().square().sum()  # saves exp(2 w), twice

    memory = training.SavedMemory([weight])
    with memory:
        for _ in range(3):
            step().backward()
    assert memory.peak == 400
