"""Calls of one denoiser at the same time, and calls that fail: none leaves anything for another."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import tiny
from diffusers_softrepa import SoftREPAConfig, add_softrepa, set_softrepa, softrepa_parameters
from diffusers_softrepa.adapter import adapters_of
from diffusers_softrepa.families import family_of, text_blocks

every_family = pytest.mark.parametrize("family", tiny.FAMILIES, ids=lambda family: family.name)

TIMESTEPS = [50.0, 450.0, 950.0]


def denoiser_with_tokens(family: tiny.Family, **fields: Any) -> nn.Module:
    denoiser = family.denoiser().requires_grad_(False)
    add_softrepa(denoiser, SoftREPAConfig.for_denoiser(denoiser, init_std=1.0, num_timestep_bins=10, **fields))
    return denoiser


def blocks_of(denoiser: nn.Module) -> list[nn.Module]:
    return [block.module for block in text_blocks(denoiser, family_of(denoiser))]


@contextmanager
def meeting_in_every_block(denoiser: nn.Module, parties: int) -> Iterator[None]:
    """Lets calls go on only side by side: each waits at every block for the others."""
    barrier = threading.Barrier(parties, timeout=20)

    def meet(*_: Any) -> None:
        barrier.wait()

    handles = [block.register_forward_pre_hook(meet) for block in blocks_of(denoiser)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Returns what the calls return, each made in a thread of its own; an exception counts as a result."""
    results: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@every_family
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_threads_get_the_tokens_of_their_own_timestep(family: tiny.Family, weight: float):
    denoiser, inputs = denoiser_with_tokens(family), family.inputs(2)
    set_softrepa(denoiser, "softrepa", weight)
    expected = [family.call(denoiser, inputs, timestep) for timestep in TIMESTEPS]
    assert not torch.equal(expected[0], expected[1])
    with meeting_in_every_block(denoiser, len(TIMESTEPS)):
        results = at_once(*(lambda t=t: family.call(denoiser, inputs, t) for t in TIMESTEPS))
    apart = [(got - wanted).abs().max().item() for got, wanted in zip(results, expected, strict=True)]
    assert all(torch.equal(got, wanted) for got, wanted in zip(results, expected, strict=True)), apart


@every_family
def test_threads_may_train_at_once(family: tiny.Family):
    denoiser, inputs = denoiser_with_tokens(family), family.inputs(2)
    parameters = list(softrepa_parameters(denoiser).values())

    def gradients(timestep: float) -> list[Tensor]:
        return list(torch.autograd.grad(family.call(denoiser, inputs, timestep).square().mean(), parameters))

    expected = [gradients(timestep) for timestep in TIMESTEPS]
    with meeting_in_every_block(denoiser, len(TIMESTEPS)):
        results = at_once(*(lambda t=t: gradients(t) for t in TIMESTEPS))
    assert_close(results, expected)


@every_family
def test_the_bank_is_chosen_for_a_thread(family: tiny.Family):
    denoiser, inputs = denoiser_with_tokens(family, num_banks=2), family.inputs(2)

    def call(bank: int | None) -> Tensor:
        if bank is not None:
            adapters_of(denoiser).use_bank(bank)
        return family.call(denoiser, inputs, 500)

    first = call(None)
    with meeting_in_every_block(denoiser, 2):
        results = at_once(lambda: call(1), lambda: call(None))
    assert torch.equal(results[1], first)
    assert not torch.equal(results[0], first)
    assert torch.equal(call(None), first)


@every_family
def test_a_thread_that_fails_leaves_the_others_their_tokens(family: tiny.Family):
    denoiser, inputs = denoiser_with_tokens(family), family.inputs(2)
    expected = family.call(denoiser, inputs, 450)
    last = blocks_of(denoiser)[-1]
    failing = threading.local()

    def fail(*_: Any) -> None:
        if getattr(failing, "on", False):
            raise RuntimeError("out of memory")

    def fails() -> Tensor:
        failing.on = True
        return family.call(denoiser, inputs, 950)

    with meeting_in_every_block(denoiser, 2):
        handle = last.register_forward_pre_hook(fail)
        error, result = at_once(fails, lambda: family.call(denoiser, inputs, 450))
        handle.remove()
    assert "out of memory" in str(error)
    assert torch.equal(result, expected)


@every_family
def test_an_exception_in_a_block_leaves_nothing_behind(family: tiny.Family):
    denoiser, inputs = denoiser_with_tokens(family), family.inputs(2)
    expected = family.call(denoiser, inputs, 450)
    blocks = blocks_of(denoiser)
    alone: dict[str, Any] = {}

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        alone.update(args=args, kwargs=kwargs, output=output)

    denoiser.disable_softrepa()
    handle = blocks[0].register_forward_hook(keep, with_kwargs=True)
    family.call(denoiser, inputs, 450)
    handle.remove()
    denoiser.enable_softrepa()

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = blocks[-1].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        family.call(denoiser, inputs, 950)
    handle.remove()
    # Outside a denoiser call a block is what it is without tokens.
    again = blocks[0](*alone["args"], **alone["kwargs"])
    assert_close(again, alone["output"], rtol=0, atol=0)
    assert torch.equal(family.call(denoiser, inputs, 450), expected)


@every_family
def test_a_call_that_the_denoiser_refuses_leaves_nothing_behind(family: tiny.Family):
    denoiser, inputs = denoiser_with_tokens(family), family.inputs(2)
    expected = family.call(denoiser, inputs, 450)
    wrong = inputs | {"encoder_hidden_states": torch.randn(2, 9, 7)}
    with pytest.raises(RuntimeError):
        family.call(denoiser, wrong, 450)
    assert torch.equal(family.call(denoiser, inputs, 450), expected)


@every_family
def test_a_call_keeps_the_adapters_it_began_with(family: tiny.Family):
    """A verb in another thread, or in a callback, takes effect from the next call on."""
    denoiser, inputs = denoiser_with_tokens(family), family.inputs(2)
    with_tokens = family.call(denoiser, inputs, 500)
    denoiser.disable_softrepa()
    base = family.call(denoiser, inputs, 500)
    add_softrepa(denoiser, SoftREPAConfig.for_denoiser(denoiser, num_tokens=7, num_timestep_bins=None), "other")
    denoiser.set_softrepa("softrepa")
    denoiser.enable_softrepa()
    changes = iter([lambda: set_softrepa(denoiser, ["other", "softrepa"], [0.3, 1.0])])
    first = blocks_of(denoiser)[0]
    handle = first.register_forward_pre_hook(lambda *_: next(changes, lambda: None)())
    assert torch.equal(family.call(denoiser, inputs, 500), with_tokens)
    handle.remove()
    both = family.call(denoiser, inputs, 500)
    assert not torch.equal(both, with_tokens)
    assert not torch.equal(both, base)
