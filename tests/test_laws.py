"""Laws that soft tokens keep in every denoiser family. A new family joins by one line in `tiny.FAMILIES`."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import tiny
from diffusers_softrepa import (
    SoftREPAConfig,
    add_softrepa,
    disable_softrepa,
    enable_softrepa,
    load_softrepa,
    save_softrepa,
    set_softrepa,
    softrepa_parameters,
    unload_softrepa,
)
from diffusers_softrepa.families import family_of, text_blocks

every_family = pytest.mark.parametrize("family", tiny.FAMILIES, ids=lambda family: family.name)


def strong(denoiser: nn.Module, **fields: Any) -> SoftREPAConfig:
    """A config whose fresh tokens are as large as text, so that their effect is far above rounding."""
    return SoftREPAConfig.for_denoiser(denoiser, init_std=1.0, **fields)


@every_family
def test_tokens_change_the_prediction_and_keep_its_shape(family: tiny.Family):
    denoiser, inputs = family.denoiser(), family.inputs(2)
    before = family.call(denoiser, inputs, 500)
    add_softrepa(denoiser, strong(denoiser))
    after = family.call(denoiser, inputs, 500)
    assert after.shape == before.shape
    assert torch.isfinite(after).all()
    assert (after - before).abs().max() > 1e-4


@every_family
def test_a_disabled_adapter_gives_the_base_bit_for_bit(family: tiny.Family):
    denoiser, inputs = family.denoiser(), family.inputs(2)
    before = family.call(denoiser, inputs, 500)
    add_softrepa(denoiser, strong(denoiser))
    after = family.call(denoiser, inputs, 500)
    disable_softrepa(denoiser)
    assert torch.equal(family.call(denoiser, inputs, 500), before)
    enable_softrepa(denoiser)
    assert torch.equal(family.call(denoiser, inputs, 500), after)


@every_family
def test_unload_restores_the_denoiser_exactly(family: tiny.Family):
    denoiser, inputs = family.denoiser(), family.inputs(2)
    before = family.call(denoiser, inputs, 500)
    traces = _traces(denoiser)
    add_softrepa(denoiser, strong(denoiser))
    assert _traces(denoiser) != traces
    unload_softrepa(denoiser)
    assert _traces(denoiser) == traces
    assert torch.equal(family.call(denoiser, inputs, 500), before)


@every_family
def test_the_denoisers_modules_are_its_own_while_an_adapter_is_attached(family: tiny.Family):
    denoiser = family.denoiser()
    text, keys, parameters = repr(denoiser), list(denoiser.state_dict()), list(map(id, denoiser.parameters()))
    add_softrepa(denoiser)
    assert (repr(denoiser), list(denoiser.state_dict())) == (text, keys)
    assert list(map(id, denoiser.parameters())) == parameters


@every_family
@pytest.mark.parametrize("bins", [None, 10])
def test_every_token_and_no_base_parameter_receives_a_gradient(family: tiny.Family, bins: int | None):
    denoiser = family.denoiser().requires_grad_(False)
    add_softrepa(denoiser, strong(denoiser, num_timestep_bins=bins))
    family.call(denoiser, family.inputs(2), torch.tensor([150.0, 950.0])).square().mean().backward()
    parameters = softrepa_parameters(denoiser)
    assert (parameters["tokens"].grad.abs().amax(dim=-1) > 0).all()
    if bins is not None:
        reached = parameters["timestep_tokens"].grad.abs().amax(dim=-1) > 0
        assert reached.any(dim=1).nonzero().flatten().tolist() == [1, 9]
        assert reached[[1, 9]].all()
    assert all(parameter.grad is None for parameter in denoiser.parameters())


@every_family
def test_gradients_equal_finite_differences(family: tiny.Family):
    denoiser = family.denoiser().double().requires_grad_(False)
    inputs = tiny.mapped(family.inputs(2), Tensor.double)
    add_softrepa(denoiser, strong(denoiser, num_timestep_bins=10))
    probe = torch.randn_like(family.call(denoiser, inputs, 500))

    def loss() -> Tensor:
        return (family.call(denoiser, inputs, 500) * probe).sum()

    loss().backward()
    for parameter in softrepa_parameters(denoiser).values():
        direction = torch.randn_like(parameter)
        step = 1e-2
        with torch.no_grad():
            parameter.add_(direction, alpha=step)
            above = loss()
            parameter.sub_(direction, alpha=2 * step)
            below = loss()
            parameter.add_(direction, alpha=step)
        # Tokens are float32: the step is wide, and the central difference errs by its square.
        assert_close((above - below) / (2 * step), (parameter.grad * direction).sum().double(), rtol=2e-2, atol=1e-3)


@every_family
def test_the_bin_of_one_sample_ignores_the_rest_of_the_batch(family: tiny.Family):
    denoiser, inputs = family.denoiser(), family.inputs(3)
    add_softrepa(denoiser, strong(denoiser, num_timestep_bins=100))
    levels = torch.tensor([3.0, 1000.0, 412.0])
    together = family.call(denoiser, inputs, levels)
    for row in range(3):
        alone = family.call(denoiser, tiny.row(inputs, row), levels[row])
        assert_close(alone, together[row : row + 1], rtol=1e-4, atol=1e-5)


@every_family
def test_tokens_depend_on_the_timestep_only_through_its_bin(family: tiny.Family):
    denoiser, inputs = family.denoiser(), family.inputs(1)
    add_softrepa(denoiser, strong(denoiser, num_timestep_bins=10))
    seen = _tokens_seen(denoiser)
    for level in (410.0, 490.0, 500.0):
        family.call(denoiser, inputs, level)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


@every_family
def test_hidden_tokens_leave_the_native_prediction(family: tiny.Family, monkeypatch: pytest.MonkeyPatch):
    """Hiding exactly the K soft keys from attention must give the native output: rotary rows and masks of every
    original token are still its own."""
    denoiser, inputs = family.denoiser(), family.inputs(2)
    native = family.call(denoiser, inputs, 500)
    add_softrepa(denoiser, strong(denoiser))
    hidden = _hide_soft_keys(monkeypatch, denoiser)
    assert_close(family.call(denoiser, inputs, 500), native, rtol=1e-4, atol=1e-5)
    assert hidden, "no attention call saw soft keys"


@every_family
def test_tokens_equal_a_longer_text(family: tiny.Family):
    """The block that reads L + K text rows natively gives what the block with L rows and K soft tokens gives."""
    denoiser, inputs = family.denoiser(), family.inputs(2)
    calls: list[tuple[dict[str, Any], Any]] = []
    spec = family_of(denoiser)
    config = strong(denoiser)
    if config.stages is not None:
        config = strong(denoiser, stages=["down"])
    block = next(b for b in text_blocks(denoiser, spec) if b.group.stage in (None, "down"))
    native_forward = block.module.forward
    block.module.register_forward_hook(lambda m, args, kwargs, out: calls.append((kwargs, out)), with_kwargs=True)
    add_softrepa(denoiser, config)
    family.call(denoiser, inputs, 500)
    kwargs, with_tokens = calls[0]
    tokens = _first_layer(denoiser, 500)
    longer = dict(kwargs)
    text = kwargs[block.group.text]
    at = block.group.at
    longer[block.group.text] = torch.cat([text[:, :at], tokens.expand(2, -1, -1), text[:, at:]], dim=1)
    if "image_rotary_emb" in kwargs:  # text positions are all zero in FLUX.1
        longer["image_rotary_emb"] = tuple(torch.cat([r[: tokens.shape[1]], r]) for r in kwargs["image_rotary_emb"])
    native = native_forward(**longer)
    if block.group.returns is not None:
        native = list(native)
        native[block.group.returns] = native[block.group.returns][:, tokens.shape[1] :]
    for ours, theirs in zip(with_tokens, native, strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@every_family
def test_save_then_load_gives_the_same_prediction(family: tiny.Family, tmp_path: Any):
    denoiser, inputs = family.denoiser(), family.inputs(2)
    add_softrepa(denoiser, strong(denoiser))
    expected = family.call(denoiser, inputs, 321)
    save_softrepa(denoiser, tmp_path)
    unload_softrepa(denoiser)
    load_softrepa(denoiser, tmp_path)
    assert torch.equal(family.call(denoiser, inputs, 321), expected)
    assert not any(parameter.requires_grad for parameter in softrepa_parameters(denoiser).values())


@every_family
def test_weights_run_from_the_base_to_the_adapter_monotonically(family: tiny.Family):
    denoiser, inputs = family.denoiser(), family.inputs(2)
    base = family.call(denoiser, inputs, 500)
    name = add_softrepa(denoiser, strong(denoiser))
    full = family.call(denoiser, inputs, 500)
    distances = []
    for weight in torch.linspace(0, 1, 21).tolist():
        set_softrepa(denoiser, name, weight)
        distances.append((family.call(denoiser, inputs, 500) - base).norm())
    assert distances[0] == 0
    set_softrepa(denoiser, name, 1.0)
    assert torch.equal(family.call(denoiser, inputs, 500), full)
    steps = torch.stack(distances).diff()
    assert (steps > 0).all(), "the effect must grow with the weight"
    assert steps.max() < 3 * steps.mean(), "the effect must grow without jumps"


@every_family
def test_a_weight_near_zero_is_near_the_base(family: tiny.Family):
    denoiser, inputs = family.denoiser(), family.inputs(2)
    base = family.call(denoiser, inputs, 500)
    name = add_softrepa(denoiser, strong(denoiser))
    effect = (family.call(denoiser, inputs, 500) - base).norm()
    set_softrepa(denoiser, name, 1e-3)
    assert 0 < (family.call(denoiser, inputs, 500) - base).norm() < 5e-3 * effect


@every_family
def test_two_active_adapters_show_the_tokens_of_both(family: tiny.Family):
    """Adapters a and b at weight 1 equal one adapter whose tokens are those of a followed by those of b."""
    denoiser, inputs = family.denoiser(), family.inputs(2)
    config = strong(denoiser, num_timestep_bins=None)
    add_softrepa(denoiser, config, "a")
    add_softrepa(denoiser, config, "b")
    both = torch.cat([softrepa_parameters(denoiser, name)["tokens"].detach() for name in "ab"], dim=1)
    set_softrepa(denoiser, ["a", "b"])
    expected = family.call(denoiser, inputs, 500)
    double = strong(denoiser, num_timestep_bins=None, num_tokens=2 * config.num_tokens)
    load_softrepa(denoiser, {"tokens": both}, "ab", config=double)
    assert_close(family.call(denoiser, inputs, 500), expected, rtol=1e-4, atol=1e-5)


@every_family
def test_equal_weights_of_two_adapters_move_straight_to_both(family: tiny.Family):
    denoiser, inputs = family.denoiser(), family.inputs(2)
    for name in ("a", "b"):
        add_softrepa(denoiser, strong(denoiser), name)
    outputs = {}
    for weights in ((0, 0), (1, 1), (1, 0), (0, 1), (1e-4, 1e-4), (1, 1e-4), (1, 1 - 1e-4)):
        set_softrepa(denoiser, ["a", "b"], weights)
        outputs[weights] = family.call(denoiser, inputs, 500)
    set_softrepa(denoiser, "a")
    assert torch.equal(family.call(denoiser, inputs, 500), outputs[1, 0])
    for near, limit in (((1e-4, 1e-4), (0, 0)), ((1, 1e-4), (1, 0)), ((1, 1 - 1e-4), (1, 1))):
        assert_close(outputs[near], outputs[limit], rtol=0, atol=5e-3)


@every_family
def test_a_copy_of_the_denoiser_has_adapters_of_its_own(family: tiny.Family):
    denoiser, inputs = family.denoiser(), family.inputs(2)
    base = family.call(denoiser, inputs, 500)
    add_softrepa(denoiser, strong(denoiser))
    expected = family.call(denoiser, inputs, 500)
    twin = copy.deepcopy(denoiser)
    assert torch.equal(family.call(twin, inputs, 500), expected)
    unload_softrepa(denoiser)
    assert torch.equal(family.call(twin, inputs, 500), expected)
    assert torch.equal(family.call(denoiser, inputs, 500), base)


@every_family
def test_sampling_with_guidance_gives_both_branches_the_tokens(family: tiny.Family):
    pipe = family.pipeline()
    base = tiny.generate(pipe, guidance_scale=4.0)
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    pipe.add_softrepa(strong(denoiser))
    seen = _tokens_seen(denoiser)
    changed = tiny.generate(pipe, guidance_scale=4.0)
    assert not torch.equal(base, changed)
    assert all(torch.equal(tokens, tokens[:1].expand_as(tokens)) for tokens in seen)
    pipe.unload_softrepa()
    assert torch.equal(tiny.generate(pipe, guidance_scale=4.0), base)


def _traces(denoiser: nn.Module) -> list[Any]:
    """Everything by which an attached adapter could be noticed."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for m in denoiser.modules()]
    return [repr(denoiser), list(denoiser.state_dict()), [p.requires_grad for p in denoiser.parameters()], hooks]


def _first_text_block(denoiser: nn.Module) -> Any:
    """The first block that gets tokens by default."""
    spec = family_of(denoiser)
    chosen = SoftREPAConfig.for_denoiser(denoiser).stages
    return next(b for b in text_blocks(denoiser, spec) if chosen is None or b.group.stage in chosen)


def _tokens_seen(denoiser: nn.Module) -> list[Tensor]:
    """Returns a list that collects the tokens (batch, K, D) inside the first block at each of its calls."""
    block = _first_text_block(denoiser)
    seen: list[Tensor] = []
    inner = next(m for n, m in block.module.named_modules() if n.endswith(("norm1_context", "attn2.to_k")))

    def collect(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0][:, block.group.at : block.group.at + 4].detach().clone())

    inner.register_forward_pre_hook(collect)
    return seen


def _first_layer(denoiser: nn.Module, level: int) -> Tensor:
    """Tokens of layer 0 at a timestep, (1, K, D), by the formula."""
    parameters = softrepa_parameters(denoiser)
    tokens = parameters["tokens"][0][None]
    table = parameters.get("timestep_tokens")
    if table is None:
        return tokens
    return tokens + table[level * table.shape[0] // 1000, 0]


def _hide_soft_keys(monkeypatch: pytest.MonkeyPatch, denoiser: nn.Module) -> list[int]:
    """Patches attention so that wrapped blocks do not see the K soft keys; returns the key counts that were cut."""
    hidden: list[int] = []
    inside: list[tuple[int, int]] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def without_soft_keys(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if inside and key.shape[2] == inside[-1][1]:
            at = inside[-1][0]
            key, value = (torch.cat([part[:, :, :at], part[:, :, at + 4 :]], dim=2) for part in (key, value))
            hidden.append(key.shape[2])
        return attend(query, key, value, *args, **kwargs)

    def watch(block: Any) -> Callable[..., None]:
        def enter(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
            text = kwargs[block.group.text].shape[1] + 4
            joint = block.group.returns is not None
            image = kwargs["hidden_states"].shape[1] if joint and block.group.text != "hidden_states" else 0
            inside.append(
                (block.group.at + (image if joint and family_of(denoiser).name == "sd3" else 0), text + image)
            )

        return enter

    config = SoftREPAConfig.for_denoiser(denoiser)
    blocks = text_blocks(denoiser, family_of(denoiser))
    for index, block in enumerate(blocks):
        chosen = block.group.stage in config.stages if config.stages else index < config.num_layers
        if chosen:
            block.module.register_forward_pre_hook(watch(block), with_kwargs=True)
            block.module.register_forward_hook(lambda *_: inside.clear())
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", without_soft_keys)
    return hidden
