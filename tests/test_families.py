"""Specs: masks stay aligned, and a third party can describe a class of its own."""

import dataclasses
import re

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.testing import assert_close

import diffusers_softrepa.families as families
import tiny
from diffusers_softrepa import (
    FamilySpec,
    SoftREPAConfig,
    add_softrepa,
    family_of,
    register_family,
    softrepa_parameters,
    supported_denoisers,
    unload_softrepa,
)
from diffusers_softrepa.families import BlockGroup, TimestepArgument


def test_a_masked_text_row_stays_masked_behind_the_soft_tokens():
    """Text whose last rows are masked must act as text that ends before them."""
    denoiser, family = tiny.unet(), tiny.FAMILIES[0]
    inputs = family.inputs(2)
    add_softrepa(denoiser, SoftREPAConfig.for_denoiser(denoiser, init_std=1.0))
    mask = torch.ones(2, 9)
    mask[:, 6:] = 0
    masked = family.call(denoiser, inputs | {"encoder_attention_mask": mask}, 500)
    shorter = family.call(denoiser, inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"][:, :6]}, 500)
    assert_close(masked, shorter, rtol=1e-4, atol=1e-5)


def test_the_supported_denoisers_are_named():
    assert {"FluxTransformer2DModel", "SD3Transformer2DModel", "UNet2DConditionModel"} <= set(supported_denoisers())


class _Reader(nn.Module):
    """A block that adds what it reads from text, keeping text second in what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(8, 4)

    def forward(self, image: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        return image + self.read(words).mean(dim=1, keepdim=True), words * 2


class ReadingDenoiser(ModelMixin, ConfigMixin):
    """Somebody else's denoiser: positional block arguments, its own names, timestep from 0 to 1."""

    @register_to_config
    def __init__(self, text_width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.readers = nn.ModuleList(_Reader() for _ in range(depth))

    def forward(self, image: Tensor, words: Tensor, level: float) -> Tensor:
        for reader in self.readers:
            image, words = reader(image, words)
        assert words.shape[1] == 5
        return image


READING = FamilySpec(
    name="reading",
    denoiser="ReadingDenoiser",
    groups=(BlockGroup("readers", text="words", returns=1),),
    width=lambda config: config["text_width"],
    defaults=lambda config: {"num_tokens": 2, "num_layers": config["depth"], "num_timestep_bins": 4},
    timestep=TimestepArgument("level", scale=1000.0),
)


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> ReadingDenoiser:
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    register_family(READING)
    return ReadingDenoiser()


def test_a_third_party_registers_its_own_class(reading: ReadingDenoiser):
    assert family_of(reading) is READING
    assert "ReadingDenoiser" in supported_denoisers()
    image, words = torch.randn(2, 6, 4), torch.randn(2, 5, 8)
    base = reading(image, words, 0.6)
    add_softrepa(reading, SoftREPAConfig.for_denoiser(reading, init_std=1.0))
    expected, text = image, words
    parameters = softrepa_parameters(reading)
    for layer, reader in enumerate(reading.readers):
        tokens = parameters["tokens"][layer] + parameters["timestep_tokens"][2, layer]  # (K, D); 600 is in bin 2 of 4
        longer = torch.cat([tokens.expand(2, -1, -1), text], dim=1)
        expected = expected + reader.read(longer).mean(dim=1, keepdim=True)
        text = text * 2
    assert_close(reading(image, words, 0.6), expected)
    unload_softrepa(reading)
    assert torch.equal(reading(image, words, 0.6), base)


def test_a_subclass_of_a_supported_denoiser_is_supported(reading: ReadingDenoiser):
    class Derived(ReadingDenoiser):
        pass

    assert family_of(Derived()) is READING


def test_a_second_spec_for_the_same_class_or_name_is_refused(reading: ReadingDenoiser):
    register_family(READING)
    for change in ({"name": "other"}, {"denoiser": "Other"}):
        with pytest.raises(ValueError, match=re.escape("collides with the registered 'reading' for ReadingDenoiser")):
            register_family(dataclasses.replace(READING, **change))


def test_an_unknown_denoiser_is_told_what_to_do():
    with pytest.raises(ValueError, match=r"AutoencoderKL, and none is registered; supported are .*register_family"):
        family_of(tiny.vae(4))


def test_a_unet_with_stages_of_different_width_is_refused():
    denoiser = tiny.unet()
    denoiser.register_to_config(cross_attention_dim=(32, 64))
    with pytest.raises(ValueError, match=r"one text width in all stages, but .* is \(32, 64\)"):
        SoftREPAConfig.for_denoiser(denoiser)
