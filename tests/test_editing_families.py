"""Editing in every family that has a conditioner: its pipeline's own schedule, decoding and guidance."""

from typing import Any

import pytest
import torch
from diffusers import (
    ChromaPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    QwenImagePipeline,
)
from torch import Tensor
from torch.testing import assert_close

import tiny
from diffusers_softrepa import flow_edit, invert, regenerate
from diffusers_softrepa.conditioning import conditioner_of
from diffusers_softrepa.editing.levels import sampling_steps
from zoo_pipelines import ZOO, Entry

pytestmark = [
    # Of diffusers' own: Chroma's positions, and DPM-Solver's tables under NumPy 2.
    pytest.mark.filterwarnings("ignore:.*FluxPosEmbed.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]
FLOW = {name: entry for name, entry in ZOO.items() if not name.startswith("pixart")}
every_family = pytest.mark.parametrize("entry", ZOO.values(), ids=ZOO)
every_flow_family = pytest.mark.parametrize("entry", FLOW.values(), ids=FLOW)


def quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@every_flow_family
def test_the_noise_levels_are_those_of_the_pipelines_own_sampling(entry: Entry):
    pipe = entry.make()
    steps = sampling_steps(conditioner_of(pipe), 4, *entry.size)
    entry.generate(pipe, "a red cat", steps=4, **entry.unguided)
    sigmas = torch.stack([step.at.noise for step in steps] + [steps[-1].to.noise])
    assert_close(sigmas, torch.as_tensor(pipe.scheduler.sigmas, dtype=torch.float32), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [tiny.sd3_pipeline, tiny.flux_pipeline])
@pytest.mark.parametrize("shifting", [False, True])
def test_sd3_and_flux_shift_with_the_image_as_their_pipelines_do(make: Any, shifting: bool):
    pipe = make()
    pipe.scheduler.register_to_config(use_dynamic_shifting=shifting)
    steps = sampling_steps(conditioner_of(pipe), 4, 16, 32)
    tiny.generate(pipe, steps=4, height=16, width=32)
    assert_close(torch.stack([step.at.noise for step in steps]), pipe.scheduler.sigmas[:-1], rtol=1e-6, atol=1e-6)


@every_flow_family
def test_an_edit_runs_end_to_end_and_from_a_prompt_to_itself_is_none(entry: Entry):
    pipe = quiet(entry.make())
    pipe.add_softrepa()
    image = torch.rand(2, 3, *entry.size)
    settings: dict[str, Any] = {"num_inference_steps": 4, "strength": 0.5, "generator": 0, "output_type": "latent"}
    settings |= {"max_sequence_length": entry.length}
    latents = conditioner_of(pipe).encode_images(2 * image - 1)
    guidance: dict[str, Any] = {"source_guidance_scale": 2.0, "target_guidance_scale": 2.0}
    same = flow_edit(pipe, image, "a red cat", "a red cat", **guidance, **settings)
    assert_close(same, latents, rtol=0.0, atol=0.0)
    edited = flow_edit(pipe, image, "a red cat", ["two dogs", "a tree"], **settings)
    assert edited.isfinite().all() and (edited - latents).abs().max() > 1e-4
    alone = flow_edit(pipe, image[1], "a red cat", "a tree", **settings)
    assert_close(edited[1:] / edited.abs().max(), alone / edited.abs().max(), rtol=0.0, atol=1e-4)
    (image,) = flow_edit(pipe, image[0], "a red cat", "a tree", **settings | {"output_type": "pil"})
    assert image.size == entry.size[::-1]


def latents_as_the_pipeline_holds_them(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    if isinstance(pipe, Flux2Pipeline | Flux2KleinPipeline):
        return pipe._patchify_latents(latents)
    if isinstance(pipe, QwenImagePipeline | ChromaPipeline):
        return pipe._pack_latents(latents, *latents.shape)
    return latents


@pytest.mark.parametrize("guided", [False, True])
@every_family
def test_drawing_again_gives_the_image_that_the_pipeline_draws_of_that_noise(entry: Entry, guided: bool):
    """From noise to pixels: levels, steps, guidance, negative prompt and decoding are those of sampling."""
    if guided and entry.name == "qwen":
        pytest.skip("this pipeline changes the length of guided predictions")
    pipe, scale = quiet(entry.make()), 3.0 if guided else 1.0
    if not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        first_order = FlowMatchEulerDiscreteScheduler if entry.name in FLOW else DDIMScheduler
        pipe.scheduler = first_order.from_config(pipe.scheduler.config, clip_sample=False)
    noise = torch.randn(1, *conditioner_of(pipe).latent_shape(*entry.size))
    settings = dict(entry.guided if guided else entry.unguided)
    if entry.name == "zimage":
        settings["guidance_scale"] = scale - 1  # this pipeline counts from the prompt's prediction
    if entry.name == "flux2":
        settings["guidance_scale"] = scale  # told to the denoiser
    latents = latents_as_the_pipeline_holds_them(pipe, noise)
    expected = entry.generate(pipe, "a red cat", steps=3, latents=latents, output_type="pt", **settings)
    ours = regenerate(
        pipe,
        noise,
        "a red cat",
        num_inference_steps=3,
        guidance_scale=scale,
        max_sequence_length=entry.length,
        output_type="pt",
    )
    assert_close(ours, expected, rtol=0.0, atol=1e-4)
    assert ours.std() > 1e-3


@pytest.mark.parametrize("name", ["sana", "pixart-sigma"])
def test_the_younger_cross_attention_families_are_inverted(name: str):
    entry = ZOO[name]
    pipe = quiet(entry.make())
    settings: dict[str, Any] = {"num_inference_steps": 3, "max_sequence_length": entry.length}
    noise = invert(pipe, torch.rand(1, 3, *entry.size), "a red cat", **settings)
    (image,) = regenerate(pipe, noise, "two dogs", **settings)
    assert image.size == entry.size[::-1]
