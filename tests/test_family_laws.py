"""Laws that soft tokens keep in every denoiser class. A class joins by a specimen in the zoo."""

from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from torch.testing import assert_close

import zoo
from diffusers_softrepa import (
    add_softrepa,
    disable_softrepa,
    enable_softrepa,
    family_of,
    set_softrepa,
    softrepa_parameters,
    supported_denoisers,
    unload_softrepa,
)
from diffusers_softrepa.compat import DIFFUSERS
from diffusers_softrepa.families import Block
from diffusers_softrepa.wrapping import bound, positions_of
from zoo import LENGTH, K, Specimen

pytestmark = [
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # Chroma's own import
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),  # Mochi's own positions, on a CPU
]

EVERYTHING = zoo.everything()


def each(specimens: list[Specimen]) -> Any:
    return pytest.mark.parametrize("specimen", specimens, ids=lambda specimen: specimen.name)


def test_every_supported_class_is_in_the_zoo():
    kinds = {specimen.kind for specimen in EVERYTHING}
    assert set(supported_denoisers()) == kinds
    assert len(kinds) >= 65


@each(EVERYTHING)
def test_tokens_change_the_prediction_and_go_without_a_trace(specimen: Specimen):
    denoiser, inputs = specimen.denoiser(), specimen.inputs(2, LENGTH)
    assert sum(parameter.numel() for parameter in denoiser.parameters()) < 5_000_000
    before, described = specimen.call(denoiser, inputs), repr(denoiser)
    attributes = [sorted(vars(module)) for module in denoiser.modules()]
    name = add_softrepa(denoiser, zoo.everywhere(denoiser))
    after = specimen.call(denoiser, inputs)
    assert after.shape == before.shape
    assert torch.isfinite(after).all()
    assert (after - before).abs().max() > 1e-4
    set_softrepa(denoiser, name, 0.0)
    assert torch.equal(specimen.call(denoiser, inputs), before)
    set_softrepa(denoiser, name, 0.5)
    between = specimen.call(denoiser, inputs)
    assert between.shape == before.shape
    assert not torch.equal(between, before) and not torch.equal(between, after)
    set_softrepa(denoiser, name, 1.0)
    assert torch.equal(specimen.call(denoiser, inputs), after)
    disable_softrepa(denoiser)
    assert torch.equal(specimen.call(denoiser, inputs), before)
    unload_softrepa(denoiser)
    assert torch.equal(specimen.call(denoiser, inputs), before)
    assert (repr(denoiser), [sorted(vars(module)) for module in denoiser.modules()]) == (described, attributes)


@each(EVERYTHING)
def test_every_token_of_every_block_receives_a_gradient(specimen: Specimen):
    denoiser, inputs = zoo.with_tokens(specimen), specimen.inputs(2, LENGTH)
    specimen.call(denoiser, inputs, torch.tensor([150.0, 950.0])).square().mean().backward()
    parameters = softrepa_parameters(denoiser)
    assert (parameters["tokens"].grad.abs().amax(dim=-1) > 0).all()
    reached = parameters["timestep_tokens"].grad.abs().amax(dim=-1) > 0  # (bins, layers)
    per_sample = family_of(denoiser).timestep_of(denoiser.config).per_sample
    assert reached.any(dim=1).nonzero().flatten().tolist() == ([1, 9] if per_sample else [9])
    assert all(parameter.grad is None for parameter in denoiser.parameters())


def _gradients(specimen: Specimen, denoiser: Any, inputs: zoo.Inputs) -> list[Tensor]:
    """Returns the gradients after two forwards at different timesteps and then one backward."""
    first, second = (specimen.call(denoiser, inputs, level) for level in (50.0, 950.0))
    loss = first.square().mean() + 2 * second.square().mean()
    return list(torch.autograd.grad(loss, list(softrepa_parameters(denoiser).values())))


@each([specimen for specimen in EVERYTHING if specimen.checkpoints])
def test_gradients_equal_those_without_checkpointing(specimen: Specimen):
    denoiser, inputs = zoo.with_tokens(specimen), specimen.inputs(2, LENGTH)
    runs: list[int] = []
    for module in denoiser.modules():
        module.register_forward_pre_hook(lambda *_: runs.append(1))
    expected, once = _gradients(specimen, denoiser, inputs), len(runs)
    denoiser.enable_gradient_checkpointing(specimen.checkpointing)
    got = _gradients(specimen, denoiser, inputs)
    assert len(runs) - once > once, "nothing ran again in the backward pass"
    for ours, wanted in zip(got, expected, strict=True):
        assert wanted.abs().max() > 0
        assert_close(ours, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@each([specimen for specimen in EVERYTHING if not specimen.checkpoints])
def test_classes_without_checkpointing_say_so_themselves(specimen: Specimen):
    with pytest.raises(ValueError, match="does not support gradient checkpointing"):
        specimen.denoiser().enable_gradient_checkpointing()


@each(EVERYTHING)
@pytest.mark.parametrize("masked", [False, True])
def test_hidden_tokens_leave_the_native_prediction(
    specimen: Specimen, masked: bool, monkeypatch: pytest.MonkeyPatch, record_property: Any
):
    """Tokens that are not a number, kept from attention as keys, must not be felt by anything else: masks, rotary
    rows and modulation of all other tokens are still their own, and what the block makes of the tokens is cut off."""
    if masked and specimen.mask is None:
        pytest.skip("takes no text mask")
    inputs = specimen.masked() if masked else specimen.inputs(2, LENGTH)
    denoiser = zoo.with_tokens(specimen, num_timestep_bins=None).requires_grad_(False)
    zoo.fill_tokens(denoiser, float("nan"))
    disable_softrepa(denoiser)
    native = specimen.call(denoiser, inputs)
    enable_softrepa(denoiser)
    hidden = zoo.hide_keys_that_are_not_numbers(monkeypatch)
    with torch.no_grad():
        got = specimen.call(denoiser, inputs)
    assert set(hidden) == {K}
    assert len(hidden) >= len(zoo.blocks_of(denoiser))
    record_property("max difference", float((got - native).abs().max()))
    assert_close(got, native, rtol=1e-5, atol=1e-5)


@each([specimen for specimen in EVERYTHING if specimen.mask is not None and specimen.leaky is None])
def test_what_a_masked_row_of_text_holds_does_not_matter(specimen: Specimen):
    denoiser, inputs = zoo.with_tokens(specimen), specimen.masked()
    other = {**inputs, specimen.text: inputs[specimen.text].clone()}
    other[specimen.text][:, zoo.VALID :] = zoo.noise("other text", *other[specimen.text][:, zoo.VALID :].shape)
    if specimen.kind == "QwenImageTransformer2DModel" and Version("0.37") > DIFFUSERS:
        disable_softrepa(denoiser)
        assert not torch.allclose(specimen.call(denoiser, other), specimen.call(denoiser, inputs), atol=1e-5)
        pytest.skip(f"{specimen.kind} of diffusers {DIFFUSERS} itself attends to masked text")
    expected = specimen.call(denoiser, inputs)
    assert_close(specimen.call(denoiser, other), expected, rtol=1e-5, atol=1e-5)
    longer = {**other, **specimen.mask(2, LENGTH, zoo.VALID + 1)}
    assert (specimen.call(denoiser, longer) - expected).abs().max() > 1e-5


@each([specimen for specimen in EVERYTHING if specimen.positioned is None])
def test_tokens_equal_a_text_that_is_longer_by_as_many_rows(specimen: Specimen):
    """The first block that reads L + K rows natively gives what it gives with L rows and K soft tokens."""
    seen: list[tuple[Any, ...]] = []
    front = specimen.front
    for length in (LENGTH + K, LENGTH):
        denoiser = specimen.denoiser()
        block = zoo.blocks_of(denoiser)[0]
        block.module.register_forward_hook(
            lambda module, args, kwargs, output, block=block: seen.append((_text_of(block, args, kwargs), output)),
            with_kwargs=True,
        )
        if length == LENGTH:
            fields = {} if block.group.stage else {"num_layers": 1}
            add_softrepa(denoiser, zoo.everywhere(denoiser, num_timestep_bins=None, **fields))
            zoo.fill_tokens(denoiser, seen[0][0][0, front : front + K])
        specimen.call(denoiser, specimen.inputs(2, length))
    (_, native), (short, ours) = seen[0], seen[len(seen) // 2]
    assert short.shape[1] == seen[0][0].shape[1] - K
    returns = block.group.returns
    if isinstance(native, Tensor):
        native, ours = (native,), (ours,)
    for index, (mine, wanted) in enumerate(zip(ours, native, strict=True)):
        if wanted is not None and (returns == "self" or index == returns):
            wanted = torch.cat([wanted[:, :front], wanted[:, front + K :]], dim=1)
        if isinstance(wanted, Tensor):
            assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


def _text_of(block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    value = bound(positions_of(block.module), args, kwargs)[block.group.texts[0]]
    return value[0] if isinstance(value, tuple) else value


def _with_one_row(inputs: zoo.Inputs, names: tuple[str, ...]) -> zoo.Inputs:
    return {name: value[:1] if name in names else value for name, value in inputs.items()}


def _of_one_row(specimen: Specimen) -> dict[str, tuple[str, ...]]:
    """Returns which arguments may have one row where the others have two."""
    inputs = specimen.inputs(2, LENGTH)
    per_row = [name for name, value in inputs.items() if isinstance(value, Tensor) and value.shape[:1] == (2,)]
    words = [name for name in per_row if name == specimen.text or "mask" in name]
    return {
        "text": tuple(name for name in words if name == specimen.text),
        "text and masks": tuple(words),
        "all but the text": tuple(name for name in per_row if name not in words),
        "all but timesteps": tuple(per_row),
    }


@each(EVERYTHING)
def test_what_a_denoiser_broadcasts_it_broadcasts_with_tokens_as_well(specimen: Specimen):
    """One row of text and several latents, or the other way round, give what the expanded call gives."""
    inputs = specimen.inputs(2, LENGTH)
    if not any(isinstance(value, Tensor) and value.shape[:1] == (2,) for value in inputs.values()):
        pytest.skip("its arguments are no batches")
    denoiser, adapted = specimen.denoiser(), zoo.with_tokens(specimen).requires_grad_(False)
    for level in (500.0, torch.tensor([150.0, 950.0])):
        for name, rows in _of_one_row(specimen).items():
            one = _with_one_row(inputs, rows)
            # Expanded by hand: what has one row is given twice.
            both = {key: torch.cat([value, value]) if key in rows else value for key, value in one.items()}
            try:
                native = specimen.call(denoiser, one, level)
            except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
                continue  # it takes no such call
            expanded = specimen.call(denoiser, both, level)
            as_expanded = native.shape == expanded.shape and torch.allclose(native, expanded, rtol=1e-4, atol=1e-5)
            for weight in (1.0, 0.5):
                set_softrepa(adapted, "softrepa", weight)
                found = specimen.call(adapted, one, level)
                assert found.shape == native.shape, name
                if as_expanded:
                    assert_close(found, specimen.call(adapted, both, level), rtol=1e-4, atol=1e-5, msg=name)
