"""Offloading and casting see the denoiser they know, whatever comes first: they or the adapter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from diffusers.hooks import apply_group_offloading
from packaging.version import Version
from torch import nn
from torch.testing import assert_close

import tiny
from diffusers_softrepa import SoftREPAConfig, load_softrepa, softrepa_parameters, unload_softrepa
from diffusers_softrepa.compat import DIFFUSERS

CPU = torch.device("cpu")
every_family = pytest.mark.parametrize("family", tiny.FAMILIES, ids=lambda family: family.name)


def sequential(denoiser: nn.Module) -> None:
    """What enable_sequential_cpu_offload does to a component: weights live on meta and come for each module."""
    cpu_offload(denoiser, execution_device=CPU, offload_buffers=True)


def whole_model(denoiser: nn.Module) -> None:
    """What enable_model_cpu_offload does to a component."""
    cpu_offload_with_hook(denoiser, execution_device=CPU)


def group_by_block(denoiser: nn.Module) -> None:
    apply_group_offloading(denoiser, CPU, CPU, offload_type="block_level", num_blocks_per_group=1)


def group_by_leaf(denoiser: nn.Module) -> None:
    apply_group_offloading(denoiser, CPU, CPU, offload_type="leaf_level")


OFFLOADS: tuple[Callable[[nn.Module], None], ...] = (sequential, whole_model, group_by_block, group_by_leaf)


def adapter(denoiser: nn.Module) -> tuple[SoftREPAConfig, dict[str, torch.Tensor]]:
    config = SoftREPAConfig.for_denoiser(denoiser)
    generator = torch.Generator().manual_seed(1)
    return config, {name: torch.randn(shape, generator=generator) for name, shape in config.shapes.items()}


NEEDS_NEWER = pytest.mark.skipif(
    Version("0.42") > DIFFUSERS and not torch.accelerator.is_available(),
    reason="group offloading of an older diffusers needs an accelerator",
)


@NEEDS_NEWER
@every_family
@pytest.mark.parametrize("offload", OFFLOADS, ids=lambda offload: offload.__name__)
@pytest.mark.parametrize("offloaded_first", [True, False])
@torch.no_grad()
def test_an_offloaded_denoiser_gives_what_it_gives_on_the_device(
    family: tiny.Family, offload: Callable[[nn.Module], None], offloaded_first: bool
):
    denoiser, inputs = family.denoiser(), family.inputs(2)
    base = family.call(denoiser, inputs, 500)
    config, tensors = adapter(denoiser)
    load_softrepa(denoiser, tensors, config=config)
    expected = family.call(denoiser, inputs, 500)
    if offloaded_first:
        unload_softrepa(denoiser)
        offload(denoiser)
        load_softrepa(denoiser, tensors, config=config)
    else:
        offload(denoiser)
    assert_close(family.call(denoiser, inputs, 500), expected, rtol=0, atol=0)
    assert softrepa_parameters(denoiser)["tokens"].device == CPU
    unload_softrepa(denoiser)
    assert_close(family.call(denoiser, inputs, 500), base, rtol=0, atol=0)


@every_family
@torch.no_grad()
def test_tokens_stay_when_accelerates_hooks_are_taken_off(family: tiny.Family):
    denoiser, inputs = family.denoiser(), family.inputs(2)
    base = family.call(denoiser, inputs, 500)
    sequential(denoiser)
    config, tensors = adapter(family.denoiser())
    load_softrepa(denoiser, tensors, config=config)
    expected = family.call(denoiser, inputs, 500)
    remove_hook_from_module(denoiser, recurse=True)
    assert_close(family.call(denoiser, inputs, 500), expected, rtol=0, atol=0)
    unload_softrepa(denoiser)
    assert_close(family.call(denoiser, inputs, 500), base, rtol=0, atol=0)


@every_family
@pytest.mark.parametrize("cast_first", [True, False])
@torch.no_grad()
def test_fp8_storage_leaves_the_tokens_in_float32(family: tiny.Family, cast_first: bool):
    results: list[Any] = []
    for first in (cast_first, not cast_first):
        torch.manual_seed(0)
        denoiser, inputs = family.denoiser(), family.inputs(2)
        config, tensors = adapter(denoiser)
        cast = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
        if first:
            denoiser.enable_layerwise_casting(**cast)
        load_softrepa(denoiser, tensors, config=config)
        if not first:
            denoiser.enable_layerwise_casting(**cast)
        with_tokens = family.call(denoiser, inputs, 500)
        assert softrepa_parameters(denoiser)["tokens"].dtype == torch.float32
        assert torch.equal(softrepa_parameters(denoiser)["tokens"], tensors["tokens"])
        unload_softrepa(denoiser)
        assert not torch.equal(family.call(denoiser, inputs, 500), with_tokens)
        results.append(with_tokens)
    assert_close(results[0], results[1], rtol=0, atol=0)


@every_family
@torch.no_grad()
def test_a_half_precision_denoiser_keeps_its_tokens_in_float32(family: tiny.Family):
    denoiser, inputs = family.denoiser(), family.inputs(2)
    config, tensors = adapter(denoiser)
    load_softrepa(denoiser, tensors, config=config)
    expected = family.call(denoiser, inputs, 500)
    nn.Module.to(denoiser, torch.bfloat16)
    halved = {
        k: v.bfloat16() if isinstance(v, torch.Tensor) else tiny.mapped(v, torch.Tensor.bfloat16)
        for k, v in inputs.items()
    }
    found = family.call(denoiser, halved, 500)
    assert found.dtype == torch.bfloat16
    assert torch.equal(softrepa_parameters(denoiser)["tokens"], tensors["tokens"])
    assert (found.float() - expected).norm() < 0.05 * expected.norm()


@NEEDS_NEWER
@pytest.mark.parametrize("family", tiny.FAMILIES, ids=lambda family: family.name)
def test_a_pipeline_samples_the_same_offloaded(family: tiny.Family, monkeypatch: pytest.MonkeyPatch):
    pipe = family.pipeline()
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    config, tensors = adapter(denoiser)
    pipe.load_softrepa(tensors, config=config)
    expected = tiny.generate(pipe)
    pipe.unload_softrepa()
    pipe.enable_group_offload(onload_device=CPU, offload_type="leaf_level")
    pipe.load_softrepa(tensors, config=config)
    assert_close(tiny.generate(pipe), expected, rtol=0, atol=0)
