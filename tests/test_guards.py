"""Calls that cannot be right with tokens are refused with a sentence, before anything is touched."""

import re
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, TextKVCacheConfig
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from diffusers.models.transformers.transformer_qwenimage21 import (
    QwenImage21AttnProcessor,
    QwenImage21FlexAttnProcessor,
    QwenImage21KVCache,
)
from torch.testing import assert_close

import zoo
from diffusers_softrepa import add_softrepa, disable_softrepa, enable_softrepa
from zoo import LENGTH, Specimen

SPECIMENS = {specimen.name: specimen for specimen in zoo.everything()}

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # Chroma's own import


def refused(specimen: Specimen, denoiser: Any, inputs: zoo.Inputs, sentence: str) -> None:
    """Checks that a call is refused, and that it is not without tokens."""
    with pytest.raises(ValueError, match=re.escape(sentence)):
        specimen.call(denoiser, inputs)
    disable_softrepa(denoiser)
    specimen.call(denoiser, inputs)
    enable_softrepa(denoiser)


def test_a_block_mask_is_refused():
    specimen = SPECIMENS["qwen-image-2.1"]
    denoiser, inputs = zoo.with_tokens(specimen), specimen.inputs(2, LENGTH)
    expected = specimen.call(denoiser, inputs)
    for block in denoiser.transformer_blocks:
        block.attn.set_processor(QwenImage21FlexAttnProcessor())
    with pytest.raises(
        ValueError, match=r"a BlockMask, which cannot; call set_attn_processor\(QwenImage21AttnProcessor"
    ):
        specimen.call(denoiser, inputs)
    for block in denoiser.transformer_blocks:
        block.attn.set_processor(QwenImage21AttnProcessor())
    assert torch.equal(specimen.call(denoiser, inputs), expected)


def test_a_text_cache_with_tokens_of_the_timestep_is_refused():
    specimen = SPECIMENS["qwen-image-2.1"]
    denoiser, inputs = zoo.with_tokens(specimen), specimen.inputs(2, LENGTH)
    cache = QwenImage21KVCache(len(denoiser.transformer_blocks))
    refused(specimen, denoiser, {**inputs, "kv_cache": cache, "kv_cache_mode": "extract"}, "use_kv_cache=False")


@pytest.mark.parametrize("masked", [False, True])
def test_a_text_cache_with_constant_tokens_changes_nothing(masked: bool):
    specimen = SPECIMENS["qwen-image-2.1"]
    denoiser = zoo.with_tokens(specimen, num_timestep_bins=None)
    inputs = specimen.masked() if masked else specimen.inputs(2, LENGTH)
    cache = QwenImage21KVCache(len(denoiser.transformer_blocks))
    with torch.no_grad():
        for level, mode in ((900.0, "extract"), (400.0, "cached")):
            expected = specimen.call(denoiser, inputs, level)
            got = specimen.call(denoiser, {**inputs, "kv_cache": cache, "kv_cache_mode": mode}, level)
            assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_nucleus_text_cache_is_refused():
    specimen = SPECIMENS["nucleus-image"]
    denoiser, inputs = zoo.with_tokens(specimen), specimen.inputs(2, LENGTH)
    expected = specimen.call(denoiser, inputs)
    denoiser.enable_cache(TextKVCacheConfig())
    with pytest.raises(ValueError, match=r"its text cache keeps the keys of the first one, .* call disable_cache\(\)"):
        specimen.call(denoiser, inputs)
    denoiser.disable_cache()
    assert torch.equal(specimen.call(denoiser, inputs), expected)


def test_glm_image_cache_is_written_without_tokens_and_never_with_text():
    specimen = SPECIMENS["glm-image"]
    inputs = specimen.inputs(1, LENGTH) | {"batch": 1}
    empty = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"][:, :0]}
    stored = []
    for denoiser in (specimen.denoiser(), zoo.with_tokens(specimen)):
        cache = GlmImageKVCache(len(denoiser.transformer_blocks))
        cache.set_mode("write")
        specimen.call(denoiser, {**empty, "kv_caches": cache}, 1.0)
        stored.append(cache[0].k_caches[0])
    assert torch.equal(*stored)
    with pytest.raises(ValueError, match=r"must be written without text, but it is written with 7 rows of text"):
        specimen.call(denoiser, {**inputs, "kv_caches": cache}, 1.0)
    cache.set_mode("read")
    assert torch.isfinite(specimen.call(denoiser, {**inputs, "kv_caches": cache})).all()


def test_chroma_with_a_mask_under_checkpointing_is_refused_while_diffusers_drops_the_mask():
    specimen = SPECIMENS["chroma"]
    denoiser = zoo.with_tokens(specimen)
    disable_softrepa(denoiser)
    text = specimen.masked()["encoder_hidden_states"].requires_grad_(True)
    inputs = {**specimen.masked(), "encoder_hidden_states": text}
    base = specimen.call(denoiser, inputs)
    denoiser.enable_gradient_checkpointing()
    assert (specimen.call(denoiser, inputs) - base).abs().max() > 1e-4, "diffusers hands the mask on: drop the guard"
    enable_softrepa(denoiser)
    with pytest.raises(ValueError, match=r"must get the attention mask, .* call disable_gradient_checkpointing\(\)"):
        specimen.call(denoiser, inputs)
    with torch.no_grad():
        specimen.call(denoiser, inputs)
    specimen.call(denoiser, specimen.inputs(2, LENGTH))


@pytest.mark.parametrize("name", ["hunyuan-image", "wan-animate-2"])
def test_classes_whose_own_checkpointing_fails_are_refused(name: str):
    specimen = SPECIMENS[name]
    denoiser, inputs = zoo.with_tokens(specimen), specimen.inputs(2, LENGTH)
    denoiser.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match=r"give it one that does: enable_gradient_checkpointing\(lambda block"):
        specimen.call(denoiser, inputs)
    disable_softrepa(denoiser)
    with pytest.raises(TypeError, match="unexpected keyword argument"):  # when this passes, drop the guard
        specimen.call(denoiser, inputs)


class _Parallel:
    context_parallel_config = object()


@pytest.mark.parametrize("name", ["flux2", "z-image", "wan", "qwen-image"])
def test_context_parallelism_is_refused(name: str):
    specimen = SPECIMENS[name]
    denoiser, inputs = zoo.with_tokens(specimen), specimen.inputs(2, LENGTH)
    denoiser._parallel_config = _Parallel()
    with pytest.raises(ValueError, match="context parallelism divides it among processes"):
        specimen.call(denoiser, inputs)


def _flux2_with_reference(denoiser: Any, inputs: zoo.Inputs, specimen: Specimen, **more: Any) -> Any:
    """Calls FLUX.2 with 4 tokens of a reference image in front of the image."""
    reference = zoo.noise("reference", 2, 4, 8)
    ids = zoo.grid(2, 2, 4) + 10.0
    return specimen.call(
        denoiser,
        {
            **inputs,
            "hidden_states": torch.cat([reference, inputs["hidden_states"]], dim=1),
            "img_ids": torch.cat([ids, inputs["img_ids"]]),
            "num_ref_tokens": 4,
            **more,
        },
    )


def test_flux2_with_its_cache_of_reference_images_keeps_hidden_tokens_hidden(monkeypatch: pytest.MonkeyPatch):
    """It slices keys behind the text: it must know that there are K rows more."""
    specimen = SPECIMENS["flux2"]
    inputs = specimen.inputs(2, LENGTH)
    denoiser = zoo.with_tokens(specimen, num_timestep_bins=None).requires_grad_(False)
    for block in denoiser.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in denoiser.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    zoo.fill_tokens(denoiser, float("nan"))
    disable_softrepa(denoiser)
    native = _run_with_cache(denoiser, inputs, specimen)
    enable_softrepa(denoiser)
    hidden = zoo.hide_keys_that_are_not_numbers(monkeypatch)
    assert_close(_run_with_cache(denoiser, inputs, specimen), native, rtol=1e-5, atol=1e-5)
    assert set(hidden) == {zoo.K}


def _run_with_cache(denoiser: Any, inputs: zoo.Inputs, specimen: Specimen) -> Any:
    """Returns the prediction of a second step, whose reference image comes from the cache of the first."""
    caches: list[Any] = []
    with torch.no_grad():
        handle = denoiser.register_forward_hook(lambda module, args, output: caches.append(output.kv_cache))
        _flux2_with_reference(denoiser, inputs, specimen, kv_cache_mode="extract")
        handle.remove()
        return specimen.call(denoiser, {**inputs, "kv_cache_mode": "cached", "kv_cache": caches[0]})


@pytest.mark.parametrize("cache_first", [True, False])
@pytest.mark.parametrize("name", ["qwen-image", "wan", "hunyuan-video", "cogvideox"])
def test_a_first_block_cache_needs_no_guard(name: str, cache_first: bool):
    """It compares what the first block returns: tokens are cut off beneath it, whatever came first."""
    specimen = SPECIMENS[name]
    expected = specimen.call(zoo.with_tokens(specimen, num_layers=1), specimen.inputs(2, LENGTH))
    denoiser = specimen.denoiser()
    for step in (0, 1) if cache_first else (1, 0):
        if step == 0:
            denoiser.enable_cache(FirstBlockCacheConfig(threshold=-1.0))
        else:
            config = zoo.everywhere(denoiser, num_layers=1)
            add_softrepa(denoiser, config, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), denoiser.cache_context("only"):
        assert_close(specimen.call(denoiser, specimen.inputs(2, LENGTH)), expected)
