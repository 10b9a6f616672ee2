"""Tokens are float32 and trainable, and noise is drawn on the CPU, whatever defaults and modes the process has set."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import tiny
from diffusers_softrepa import (
    SoftREPAConfig,
    add_softrepa,
    load_softrepa,
    set_softrepa,
    softrepa_parameters,
    unload_softrepa,
)
from diffusers_softrepa.noising import sample_timesteps
from diffusers_softrepa.training.step.collate import Draws, draw_noise
from training_runs import assert_same_run, trainer

SD3 = tiny.FAMILIES[2]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "another device": lambda: torch.device("meta"),
}
under_every_setting = pytest.mark.parametrize("setting", SETTINGS)


def adapted(setting: str | None, *, load: bool, weight: float = 1.0) -> Any:
    """Returns a denoiser whose adapter was made or loaded, and weighted, under a setting of the process."""
    torch.manual_seed(0)
    denoiser = SD3.denoiser().requires_grad_(False)
    config = SoftREPAConfig.for_denoiser(denoiser, init_std=1.0)
    tensors = {name: torch.randn(shape) for name, shape in config.shapes.items()}
    doubled = {name: 2 * value for name, value in tensors.items()}
    with SETTINGS[setting]() if setting else torch.enable_grad():
        if load:
            load_softrepa(denoiser, tensors, config=config, is_trainable=True)
            load_softrepa(denoiser, doubled, config=config, hotswap=True)
        else:
            add_softrepa(denoiser, config, generator=torch.Generator().manual_seed(1))
        set_softrepa(denoiser, "softrepa", weight)
    return denoiser


@under_every_setting
@pytest.mark.parametrize("load", [True, False])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_tokens_are_what_they_are_without_the_setting(setting: str, load: bool, weight: float):
    found, wanted = adapted(setting, load=load, weight=weight), adapted(None, load=load, weight=weight)
    for name, parameter in softrepa_parameters(found).items():
        assert (parameter.dtype, parameter.device.type, parameter.is_inference()) == (torch.float32, "cpu", False)
        assert parameter.requires_grad
        assert torch.equal(parameter, softrepa_parameters(wanted)[name])
    inputs = SD3.inputs(2)
    outputs = [SD3.call(denoiser, inputs, 430.0) for denoiser in (found, wanted)]
    assert_close(*outputs, rtol=0, atol=0)
    outputs[0].square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in softrepa_parameters(found).values())


@pytest.mark.parametrize("setting", ["bfloat16", "float64", "another device"])
@pytest.mark.parametrize("share", [True, False])
def test_noise_and_timesteps_are_those_of_the_seed_whatever_the_defaults(setting: str, share: bool):
    def drawn() -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        timesteps = [
            sample_timesteps(4, density=density, generator=generator) for density in ("uniform", "logit_normal")
        ]
        return [draw_noise(Draws(7, 0), (2, 4, 3, 3), share=share), *timesteps]

    wanted = drawn()
    with SETTINGS[setting]():
        found = drawn()
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("add_bins", [False, True])
def test_numbers_that_float16_cannot_hold_are_refused_on_a_model_in_float16(add_bins: bool):
    """Without this the tokens are infinite where they are inserted, and the image is NaN."""
    denoiser = tiny.sd3_transformer()
    config = SoftREPAConfig.for_denoiser(denoiser, num_timestep_bins=2 if add_bins else None)
    tensors = {name: torch.full(shape, 40_000.0) for name, shape in config.shapes.items()}
    tensors["tokens"] *= 1 if add_bins else 2
    for dtype in (torch.float32, torch.bfloat16):
        load_softrepa(denoiser.to(dtype), tensors, config=config)
        unload_softrepa(denoiser)
    denoiser.to(torch.float16)
    with pytest.raises(ValueError, match=r"numbers up to 8e\+04, but SD3Transformer2DModel runs in float16"):
        load_softrepa(denoiser, tensors, config=config)
    assert not hasattr(denoiser, "_softrepa")
    load_softrepa(denoiser, {name: 0.5 * tensor for name, tensor in tensors.items()}, config=config)


@pytest.mark.parametrize("setting", ["inference mode", "no gradients"])
def test_training_under_a_setting_is_training_without_it(setting: str, tmp_path: Path):
    given = {"max_steps": 3, "save_steps": 3, "ema_decay": 0.9}
    trainer(tmp_path / "usual", **given).train()
    run = trainer(tmp_path / "under", **given)
    with SETTINGS[setting]():
        run.train()
    assert_same_run(tmp_path / "usual", tmp_path / "under", step=3)


def test_a_model_that_was_loaded_in_inference_mode_is_not_trained_on(tmp_path: Path):
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match=r"was loaded inside torch\.inference_mode\(\), which"),
    ):
        trainer(tmp_path)
