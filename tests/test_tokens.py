"""Config and tokens: checked once, and never symmetric."""

import re
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch.testing import assert_close

import tiny
from diffusers_softrepa import SoftREPAConfig
from diffusers_softrepa.tokens import SoftTokens, timestep_bin


def config(**fields: Any) -> SoftREPAConfig:
    return SoftREPAConfig(
        **{"family": "sd3", "token_dim": 8, "num_tokens": 4, "num_layers": 3, "num_timestep_bins": 100} | fields
    )


def test_timestep_bins_are_the_published_ones():
    levels = torch.tensor([0.0, 9.99, 10.0, 413.7, 998.0, 999.5, 1000.0, 1200.0, -1.0])
    expected = [min(max(int(t), 0), 999) // 10 for t in levels.tolist()]
    assert timestep_bin(levels, 100).tolist() == expected
    assert timestep_bin(torch.arange(1001), 100).tolist() == [min(t, 999) // 10 for t in range(1001)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_bin_edge_survives_the_rounding_of_a_half_precision_pipeline(dtype: torch.dtype):
    edges = torch.arange(0, 1000, 10)
    assert timestep_bin((edges / 1000).to(dtype), 100, scale=1000.0).tolist() == list(range(100))


def test_bins_divide_the_scale_evenly():
    for bins in (1, 7, 10, 100, 1000):
        counts = timestep_bin(torch.arange(1000), bins).bincount(minlength=bins)
        assert len(counts) == bins
        assert counts.max() - counts.min() <= 1


def test_the_tokens_of_a_timestep_are_token_plus_offset_of_its_bin():
    tokens = SoftTokens(config())
    out = tokens(torch.tensor([5.0, 777.0]))
    assert out.shape == (2, 3, 4, 8)
    for row, bin_ in enumerate((0, 77)):
        for layer in range(3):
            for k in range(4):
                expected = tokens.tokens[layer, k] + tokens.timestep_tokens[bin_, layer]
                assert_close(out[row, layer, k], expected)


def test_without_bins_the_tokens_are_the_same_at_every_timestep():
    tokens = SoftTokens(config(num_timestep_bins=None))
    assert tokens.timestep_tokens is None
    assert torch.equal(tokens(torch.tensor([5.0, 777.0])), tokens.tokens[None])


def test_each_row_may_read_another_bank():
    tokens = SoftTokens(config(num_banks=2))
    t = torch.tensor([5.0, 777.0])
    mixed = tokens(t, bank=torch.tensor([0, 1]))
    assert torch.equal(mixed[0], tokens(t)[0])
    assert torch.equal(mixed[1], tokens(t, bank=1)[1])
    assert not torch.equal(tokens(t)[1], tokens(t, bank=1)[1])


@pytest.mark.parametrize("rows", [1, 2, 4, 9])
def test_no_two_tokens_start_equal_even_from_text(rows: int):
    text = torch.randn(rows, 8)
    tokens = SoftTokens(config(init="text"), text_embeddings=text).tokens
    for layer in tokens:
        assert torch.pdist(layer).min() > 1e-3
    start = text[torch.arange(4) % rows]
    assert (tokens - start).std().item() == pytest.approx(0.02, rel=0.5)


def test_equal_generators_give_equal_tokens():
    first, second = (SoftTokens(config(), generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first.tokens, second.tokens)


@pytest.mark.parametrize(
    ("fields", "embeddings", "message"),
    [
        ({"init": "text"}, None, "needs text_embeddings of shape (S, D)"),
        ({"init": "text"}, torch.randn(2, 9), "must have shape (S, 8), but have (2, 9)"),
        ({"init": "text"}, torch.empty(0, 8), "must have shape (S, 8), but have (0, 8)"),
        ({"init": "text"}, torch.full((2, 8), torch.nan), "must be finite, but hold NaN or infinite values"),
        ({}, torch.randn(2, 8), 'only used with init="text"'),
    ],
)
def test_wrong_text_embeddings_are_refused(fields: dict[str, Any], embeddings: torch.Tensor | None, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        SoftTokens(config(**fields), text_embeddings=embeddings)


@pytest.mark.parametrize("embeddings", ["a cat", torch.randn(2, 8).numpy(), torch.ones(2, 8, dtype=torch.int64)])
def test_text_embeddings_that_are_no_tensor_of_numbers_are_refused(embeddings: Any):
    with pytest.raises(TypeError, match="text_embeddings must be a floating-point tensor, but are of type"):
        SoftTokens(config(init="text"), text_embeddings=embeddings)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"family": ""}, "needs a family"),
        ({"num_tokens": 0}, "num_tokens must be a whole number of at least 1 and at most 65536, but it is 0"),
        ({"num_layers": 1.5}, "num_layers must be a whole number"),
        ({"token_dim": True}, "token_dim must be a whole number"),
        ({"num_timestep_bins": -1}, "num_timestep_bins must be"),
        ({"init": "zeros"}, "init must be one of ('normal', 'text')"),
        ({"init_std": 0}, "init_std must be a positive number"),
        ({"init_std": float("nan")}, "init_std must be a positive number"),
        ({"stages": "down"}, "stages must be a list of names"),
        ({"stages": [["down"]]}, "stages must be a list of names"),
        ({"peft_type": "LORA"}, "needs peft_type 'SOFTREPA'"),
    ],
)
def test_a_wrong_field_is_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**fields)


def test_a_config_survives_the_trip_through_a_dict():
    for made in (config(), config(num_timestep_bins=None, num_banks=2), config(stages=["down"], num_layers=1)):
        assert SoftREPAConfig.from_dict(made.to_dict()) == made


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"cross_attention_dim": 768}, {"token_dim": 768, "stages": ["down"], "num_timestep_bins": 100}),
        (
            {
                "cross_attention_dim": 2048,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
            {"token_dim": 2048, "stages": ["down", "mid"], "num_timestep_bins": None},
        ),
    ],
)
def test_unet_defaults_are_the_published_ones(settings: dict[str, Any], expected: dict[str, Any]):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**settings)
    made = SoftREPAConfig.for_denoiser(unet)
    assert {name: getattr(made, name) for name in expected} == expected
    assert made.num_tokens == 4
    assert made.num_parameters == {768: 79_872, 2048: 8_192}[made.token_dim]


def test_transformer_defaults_are_the_published_ones_and_stay_under_a_million():
    with torch.device("meta"):
        sd3 = SD3Transformer2DModel(num_layers=24, num_attention_heads=24, caption_projection_dim=1536)
        large = SD3Transformer2DModel(num_layers=38, num_attention_heads=38, caption_projection_dim=2432)
        flux = FluxTransformer2DModel()
    made = SoftREPAConfig.for_denoiser(sd3)
    assert made.shapes == {"tokens": (5, 4, 1536), "timestep_tokens": (100, 5, 1536)}
    assert made.num_parameters == 798_720
    for denoiser in (large, flux):
        assert SoftREPAConfig.for_denoiser(denoiser).num_parameters < 1_000_000


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (tiny.sd3_transformer, {"num_layers": 5}, "has 4 blocks that read text; use num_layers <= 4"),
        (tiny.sd3_transformer, {"stages": ["down"]}, "has numbered layers, not stages"),
        (tiny.unet, {"stages": ["dwon"]}, "stages must name some of ('down', 'mid', 'up')"),
        (tiny.unet, {"num_layers": 2}, "share one layer of tokens, not 2"),
        (
            tiny.sd3_transformer,
            {"token_dim": 49},
            "have width 49 but the blocks of this SD3Transformer2DModel read 48",
        ),
        (tiny.sd3_transformer, {"family": "flux"}, "made for family 'flux'"),
        (lambda: tiny.vae(4), {}, "AutoencoderKL, and none is registered; supported are"),
    ],
)
def test_a_config_that_does_not_fit_the_denoiser_is_refused(make: Any, fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        SoftREPAConfig.for_denoiser(make(), **fields)
