"""The reference implementation's denoiser outputs and sampling loops, through the public verbs."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor
from torch.testing import assert_close

import tiny
from diffusers_softrepa import disable_softrepa, enable_softrepa, load_softrepa
from golden import NAMES, Golden, golden

EXACT: dict[str, float] = {"rtol": 0.0, "atol": 1e-5}


@pytest.mark.parametrize("name", NAMES)
def test_denoiser_calls_match_the_reference_numbers(name: str):
    g = golden(name)
    g.load_adapter()
    compared = 0
    for key, timestep in g.tensors.items():
        if not (call := re.fullmatch(r"(out\.\w+)\.timestep", key)):
            continue
        assert_close(_call(g, timestep), g.tensors[f"{call[1]}.with"], **EXACT)
        compared += 1
        if f"{call[1]}.without" in g.tensors:
            disable_softrepa(g.denoiser)
            assert_close(_call(g, timestep), g.tensors[f"{call[1]}.without"], **EXACT)
            enable_softrepa(g.denoiser)
    assert compared == {"sd15": 4, "sdxl": 4, "sd3": 8}[name]


def test_sd3_without_timestep_bins_matches_the_reference_numbers():
    g = golden("sd3")
    load_softrepa(g.denoiser, {"tokens": g.adapter["tokens"]}, config=replace(g.config, num_timestep_bins=None))
    expected = g.tensors["out.no_timestep_tokens.with"]
    close = [
        (_call(g, timestep) - expected).abs().max() < 1e-5
        for key, timestep in g.tensors.items()
        if key.endswith(".timestep") and key.startswith("out.")
    ]
    assert sum(close) == 1, "the reference made this call at exactly one of the golden timesteps"


@pytest.mark.parametrize("name", NAMES)
def test_a_real_pipeline_samples_the_reference_latents(name: str):
    g = golden(name)
    pipe, settings = _pipeline(g)
    pipe.load_softrepa(g.adapter, config=g.config)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        latents=g.tensors["sample.latents"].clone(),
        prompt_embeds=g.tensors["sample.prompt_embeds"],
        negative_prompt_embeds=g.tensors["sample.negative_prompt_embeds"],
        num_inference_steps=len(g.tensors["sample.timesteps"]),
        height=32,
        width=32,
        output_type="latent",
        **settings,
    ).images
    assert_close(pipe.scheduler.timesteps, g.tensors["sample.timesteps"], rtol=0, atol=1e-3)
    expected = g.tensors["sample.out"]
    # In units of the largest latent: random models at guidance 7 reach 20, and float32 rounds relative to that.
    scale = expected.abs().max()
    assert_close(images / scale, expected / scale, **EXACT)


def _call(g: Golden, timestep: Tensor) -> Tensor:
    text = g.tensors["in.encoder_hidden_states"]
    inputs: dict[str, Any] = {"encoder_hidden_states": text, "timestep": timestep, "return_dict": False}
    if g.name == "sd3":
        inputs |= {key: g.tensors[f"in.{key}"] for key in ("hidden_states", "pooled_projections")}
    else:
        inputs["sample"] = g.tensors["in.sample"]
    if g.name == "sdxl":
        inputs["added_cond_kwargs"] = {key: g.tensors[f"in.{key}"] for key in ("text_embeds", "time_ids")}
    with torch.no_grad():
        return g.denoiser(**inputs)[0]


def _pipeline(g: Golden) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """Returns the class of pipeline that users run around the golden denoiser, and its call settings."""
    if g.name == "sd3":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        parts = dict.fromkeys(
            ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"]
        )
        pooled = {"pooled_prompt_embeds": "sample.pooled", "negative_pooled_prompt_embeds": "sample.negative_pooled"}
        pipe = StableDiffusion3Pipeline(
            transformer=g.denoiser, scheduler=scheduler, vae=tiny.vae(4, shift=True), **parts
        )
        return pipe, {"guidance_scale": 4.0} | {name: g.tensors[key] for name, key in pooled.items()}
    ddim = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        set_alpha_to_one=False,
        steps_offset=1,
        clip_sample=False,
    )
    if g.name == "sd15":
        pipe = StableDiffusionPipeline(
            unet=g.denoiser,
            scheduler=ddim,
            vae=tiny.vae(4),
            text_encoder=tiny.clip_text_encoder(),
            tokenizer=tiny.clip_tokenizer(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        return pipe, {"guidance_scale": 7.0}
    pipe = StableDiffusionXLPipeline(
        unet=g.denoiser,
        scheduler=ddim,
        vae=tiny.vae(4),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    return pipe, {
        "guidance_scale": 7.0,
        # The reference sampled the first caption of its training batch and stored the pooled embedding only there.
        "pooled_prompt_embeds": g.tensors["train.text_embeds"][:1],
        "negative_pooled_prompt_embeds": g.tensors["sample.negative_text_embeds"],
        "original_size": (128, 128),
        "target_size": (128, 128),
    }
