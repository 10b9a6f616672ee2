"""The caching hooks of diffusers around blocks with tokens, enabled before or after the adapter."""

from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from diffusers.hooks import MagCacheConfig
from torch.testing import assert_close

import tiny
from diffusers_softrepa import SoftREPAConfig

STEPS = 4
NEVER_SKIPS = {
    "first block": lambda pipe: FirstBlockCacheConfig(threshold=-1.0),
    "pyramid": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=1, current_timestep_callback=lambda: 500
    ),
    "taylor": lambda pipe: TaylorSeerCacheConfig(cache_interval=1, disable_cache_before_step=STEPS + 1),
    "mag": lambda pipe: MagCacheConfig(threshold=-1.0, num_inference_steps=STEPS, mag_ratios=torch.ones(STEPS)),
}
SKIPS = {
    "first block": lambda pipe: FirstBlockCacheConfig(threshold=10.0),
    "pyramid": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "taylor": lambda pipe: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    "mag": lambda pipe: MagCacheConfig(
        threshold=10.0, num_inference_steps=STEPS, retention_ratio=0.1, mag_ratios=torch.ones(STEPS)
    ),
}


def flux(*, cache: Any = None, cache_first: bool = False) -> Any:
    """Returns a FLUX pipeline with an adapter and, perhaps, a cache."""
    torch.manual_seed(0)
    pipe = tiny.flux_pipeline()
    config = SoftREPAConfig.for_denoiser(pipe.transformer, num_layers=3)
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in config.shapes.items()}
    if cache is not None and cache_first:
        pipe.transformer.enable_cache(cache(pipe))
    pipe.load_softrepa(tensors, config=config)
    if cache is not None and not cache_first:
        pipe.transformer.enable_cache(cache(pipe))
    return pipe


@pytest.mark.parametrize("cache_first", [True, False])
@pytest.mark.parametrize("name", NEVER_SKIPS)
def test_a_cache_that_never_skips_changes_nothing(name: str, cache_first: bool):
    expected = tiny.generate(flux(), steps=STEPS)
    pipe = flux(cache=NEVER_SKIPS[name], cache_first=cache_first)
    assert_close(tiny.generate(pipe, steps=STEPS), expected, rtol=1e-4, atol=1e-5)
    pipe.transformer.disable_cache()
    assert_close(tiny.generate(pipe, steps=STEPS), expected, rtol=0, atol=0)


@pytest.mark.parametrize("cache_first", [True, False])
@pytest.mark.parametrize("name", SKIPS)
def test_a_cache_that_skips_skips_with_tokens_as_well(name: str, cache_first: bool):
    expected = tiny.generate(flux(), steps=STEPS)
    pipe = flux(cache=SKIPS[name], cache_first=cache_first)
    cached = tiny.generate(pipe, steps=STEPS)
    assert torch.isfinite(cached).all()
    assert not torch.equal(cached, expected), "nothing was skipped"
    pipe.unload_softrepa()
    pipe.transformer.disable_cache()
    base = tiny.generate(pipe, steps=STEPS)
    torch.manual_seed(0)
    assert_close(base, tiny.generate(tiny.flux_pipeline(), steps=STEPS), rtol=0, atol=0)
