"""Gradient checkpointing: a block that runs again in the backward pass has the tokens of its own forward."""

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import tiny
from diffusers_softrepa import SoftREPAConfig, add_softrepa, set_softrepa, softrepa_parameters, unload_softrepa

every_family = pytest.mark.parametrize("family", tiny.FAMILIES, ids=lambda family: family.name)
transformers = pytest.mark.parametrize("family", tiny.FAMILIES[2:], ids=lambda family: family.name)


def reentrant(block: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(block, *args, use_reentrant=True)


def without_keywords(block: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(functools.partial(block), *args, use_reentrant=False, preserve_rng_state=False)


def none_at_all(block: Callable[..., Any], *args: Any) -> Any:
    return block(*args)


def denoiser_with_tokens(family: tiny.Family, *names: str) -> nn.Module:
    """A float64 denoiser, frozen, with strong tokens to train; equal for equal arguments."""
    torch.manual_seed(0)
    denoiser = family.denoiser().double().requires_grad_(False)
    for name in names or ("softrepa",):
        add_softrepa(denoiser, SoftREPAConfig.for_denoiser(denoiser, init_std=1.0, num_timestep_bins=10), name)
    return denoiser


def inputs_of(family: tiny.Family, batch: int = 2) -> dict[str, Any]:
    torch.manual_seed(1)
    return tiny.mapped(family.inputs(batch), Tensor.double)


def gradients(
    family: tiny.Family, denoiser: nn.Module, *timesteps: float | Tensor, inputs: dict[str, Any] | None = None
) -> list[Tensor]:
    """Returns the gradients of all adapters after a forward at each timestep and then one backward."""
    inputs = inputs or inputs_of(family)
    parameters = [p for name in denoiser.get_softrepa_adapters() for p in softrepa_parameters(denoiser, name).values()]
    outputs = [family.call(denoiser, inputs, timestep) for timestep in timesteps]
    # Unequal factors, so that no error in one call cancels one in another.
    loss = sum((index + 1) * output.square().mean() for index, output in enumerate(outputs))
    return list(torch.autograd.grad(loss, parameters))


CALLS = {
    "one": [500.0],
    "two before one backward": [50.0, 950.0],
    "each sample its own": [torch.tensor([50.0, 950.0])],
    "two of each": [torch.tensor([50.0, 950.0]), torch.tensor([450.0, 50.0])],
}


@every_family
@pytest.mark.parametrize("calls", CALLS)
@pytest.mark.parametrize("function", [None, without_keywords, none_at_all], ids=["default", "custom", "identity"])
def test_gradients_equal_those_without_checkpointing(
    family: tiny.Family, calls: str, function: Callable[..., Any] | None
):
    expected = gradients(family, denoiser_with_tokens(family), *CALLS[calls])
    denoiser = denoiser_with_tokens(family)
    denoiser.enable_gradient_checkpointing(function)
    for got, wanted in zip(gradients(family, denoiser, *CALLS[calls]), expected, strict=True):
        assert wanted.abs().max() > 0
        assert_close(got, wanted, rtol=1e-12, atol=1e-15)


@every_family
def test_gradients_of_weighted_adapters_equal_those_without_checkpointing(family: tiny.Family):
    names, expected = ("a", "b", "c"), []
    for checkpointed in (False, True):
        denoiser = denoiser_with_tokens(family, *names)
        set_softrepa(denoiser, names, [0.3, 1.0, 0.7])
        if checkpointed:
            denoiser.enable_gradient_checkpointing()
        got = gradients(family, denoiser, *CALLS["two of each"])
        assert_close(got, expected or got, rtol=1e-12, atol=1e-15)
        expected = got


@transformers
def test_reentrant_checkpointing_reaches_the_tokens(family: tiny.Family):
    """It needs an input that requires a gradient. The tokens, put in before, are one."""
    expected, parameters = [], []
    for function in (none_at_all, reentrant):
        denoiser = denoiser_with_tokens(family)
        denoiser.enable_gradient_checkpointing(function)
        parameters = list(softrepa_parameters(denoiser).values())
        outputs = [family.call(denoiser, inputs_of(family), timestep) for timestep in CALLS["two of each"]]
        (outputs[0].square().mean() + 2 * outputs[1].square().mean()).backward()
        got = [parameter.grad for parameter in parameters]
        assert_close(got, expected or got, rtol=1e-12, atol=1e-15)
        expected = got


@transformers
def test_blocks_are_run_again_in_the_backward_pass(family: tiny.Family):
    """Or all the rest would hold for nothing."""
    denoiser = denoiser_with_tokens(family)
    runs = []
    for block in denoiser.transformer_blocks:
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    gradients(family, denoiser, 500.0)
    once = len(runs)
    denoiser.enable_gradient_checkpointing()
    gradients(family, denoiser, 500.0)
    assert len(runs) == once + 2 * once


@every_family
@pytest.mark.parametrize("enabled_first", [True, False])
def test_checkpointing_may_be_enabled_before_or_after_adding(family: tiny.Family, enabled_first: bool):
    expected = gradients(family, denoiser_with_tokens(family), *CALLS["two of each"])
    torch.manual_seed(0)
    denoiser = family.denoiser().double().requires_grad_(False)
    if enabled_first:
        denoiser.enable_gradient_checkpointing()
    add_softrepa(denoiser, SoftREPAConfig.for_denoiser(denoiser, init_std=1.0, num_timestep_bins=10))
    if not enabled_first:
        denoiser.enable_gradient_checkpointing()
    assert_close(gradients(family, denoiser, *CALLS["two of each"]), expected, rtol=1e-12, atol=1e-15)


def functions_of(denoiser: nn.Module) -> list[Any]:
    return [getattr(module, "_gradient_checkpointing_func", None) for module in denoiser.modules()]


@every_family
def test_the_checkpointing_functions_are_as_they_were_after_each_call(family: tiny.Family):
    denoiser = denoiser_with_tokens(family)
    denoiser.enable_gradient_checkpointing(without_keywords)
    before = functions_of(denoiser)
    gradients(family, denoiser, 500.0)
    assert functions_of(denoiser) == before
    denoiser.disable_gradient_checkpointing()
    after_disabling = functions_of(denoiser)
    gradients(family, denoiser, 500.0)
    assert functions_of(denoiser) == after_disabling
    unload_softrepa(denoiser)
    assert functions_of(denoiser) == after_disabling


@every_family
def test_the_checkpointing_functions_are_as_they_were_after_a_call_that_fails(family: tiny.Family):
    denoiser = denoiser_with_tokens(family)
    expected = gradients(family, denoiser, 500.0)
    denoiser.enable_gradient_checkpointing(without_keywords)
    before = functions_of(denoiser)
    blocks = denoiser.transformer_blocks if hasattr(denoiser, "transformer_blocks") else denoiser.up_blocks

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = blocks[-1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        gradients(family, denoiser, 500.0)
    handle.remove()
    assert functions_of(denoiser) == before
    assert_close(gradients(family, denoiser, 500.0), expected, rtol=1e-12, atol=1e-15)


@every_family
def test_a_disabled_adapter_leaves_checkpointing_alone(family: tiny.Family):
    denoiser = denoiser_with_tokens(family)
    denoiser.disable_softrepa()
    denoiser.enable_gradient_checkpointing()
    inputs = inputs_of(family)
    text = inputs["encoder_hidden_states"].requires_grad_(True)
    with_checkpoints = torch.autograd.grad(family.call(denoiser, inputs, 500).square().mean(), text)
    denoiser.disable_gradient_checkpointing()
    assert_close(with_checkpoints, torch.autograd.grad(family.call(denoiser, inputs, 500).square().mean(), text))


@transformers
def test_two_threads_may_train_one_denoiser(family: tiny.Family):
    """Each waits inside its forward for the other, so that their calls overlap whatever the machine does."""
    denoiser = denoiser_with_tokens(family)
    denoiser.enable_gradient_checkpointing()
    function = denoiser._gradient_checkpointing_func
    timesteps, inputs = [50.0, 950.0], inputs_of(family)
    expected = [gradients(family, denoiser, timestep, inputs=inputs) for timestep in timesteps]
    barrier = threading.Barrier(2, timeout=60)
    in_forward = {"on": True}

    def meet(*_: Any) -> None:
        if in_forward["on"]:
            barrier.wait()

    parameters = list(softrepa_parameters(denoiser).values())
    results: dict[int, list[Tensor]] = {}

    def train(index: int) -> None:
        loss = family.call(denoiser, inputs, timesteps[index]).square().mean()
        barrier.wait()
        in_forward["on"] = False
        barrier.wait()
        results[index] = list(torch.autograd.grad(loss, parameters))

    handles = [block.register_forward_pre_hook(meet) for block in denoiser.transformer_blocks]
    threads = [threading.Thread(target=train, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.remove()
    assert_close([results[0], results[1]], expected, rtol=1e-12, atol=1e-15)
    assert denoiser._gradient_checkpointing_func is function


@transformers
def test_blocks_wrapped_by_torchs_own_checkpointing_before_loading(family: tiny.Family):
    """As FSDP's activation checkpointing does."""
    expected = gradients(family, denoiser_with_tokens(family), *CALLS["two of each"])
    torch.manual_seed(0)
    denoiser = family.denoiser().double().requires_grad_(False)
    for index, block in enumerate(denoiser.transformer_blocks):
        denoiser.transformer_blocks[index] = checkpoint_wrapper(block)
    add_softrepa(denoiser, SoftREPAConfig.for_denoiser(denoiser, init_std=1.0, num_timestep_bins=10))
    assert_close(gradients(family, denoiser, *CALLS["two of each"]), expected, rtol=1e-12, atol=1e-15)


@transformers
def test_blocks_wrapped_by_torchs_own_checkpointing_after_loading(family: tiny.Family):
    denoiser = denoiser_with_tokens(family)
    for index, block in enumerate(denoiser.transformer_blocks):
        denoiser.transformer_blocks[index] = checkpoint_wrapper(block)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        gradients(family, denoiser, *CALLS["two of each"])
