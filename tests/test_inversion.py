"""Inversion and drawing again: equal to diffusers' own steps, and back to the image as steps or substitutions grow."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FluxPipeline,
    PNDMScheduler,
)
from torch import Tensor
from torch.testing import assert_close

import tiny
from diffusers_softrepa import invert, regenerate
from diffusers_softrepa.conditioning import conditioner_of
from diffusers_softrepa.editing.levels import Level, Step
from test_conditioning import v_prediction_pipeline

PROMPT, OTHER = "a red cat", "two dogs, a tree"
LATENTS: dict[str, Any] = {"output_type": "latent"}
PIPELINES = {
    "sd15": tiny.sd15_pipeline,
    "sd21": v_prediction_pipeline,
    "sdxl": tiny.sdxl_pipeline,
    "sd3": tiny.sd3_pipeline,
    "flux": tiny.flux_pipeline,
}
every_pipeline = pytest.mark.parametrize("pipe", PIPELINES, indirect=True)


@pytest.fixture
def pipe(request: pytest.FixtureRequest) -> DiffusionPipeline:
    made = PIPELINES[getattr(request, "param", "sd3")]()
    if hasattr(made, "unet"):  # random UNets are rough beyond all that a trained one is
        made.unet.conv_out.weight.data.mul_(0.03)
    made.set_progress_bar_config(disable=True)
    return made


def image(count: int = 1) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(7))


def encoded(pipe: DiffusionPipeline) -> Tensor:
    return conditioner_of(pipe).encode_images(2 * image() - 1)


def round_trip_error(pipe: DiffusionPipeline, steps: int, substitutions: int = 1) -> float:
    settings: dict[str, Any] = {"num_inference_steps": steps}
    noise = invert(pipe, image(), PROMPT, num_substitutions=substitutions, **settings)
    again = regenerate(pipe, noise, PROMPT, **settings, **LATENTS)
    return ((again - encoded(pipe)).norm() / encoded(pipe).norm()).item()


@every_pipeline
def test_the_round_trip_comes_closer_to_the_image_with_more_steps(pipe: DiffusionPipeline):
    coarse, fine = round_trip_error(pipe, 8), round_trip_error(pipe, 32)
    # Measured: a third to a half for epsilon, where the first of few steps are not small; a quarter for the others.
    assert fine < 0.25 and fine < (0.6 if pipe.scheduler.config.get("prediction_type") == "epsilon" else 0.35) * coarse


@every_pipeline
def test_the_round_trip_becomes_exact_with_more_substitutions(pipe: DiffusionPipeline):
    once, often = round_trip_error(pipe, 6), round_trip_error(pipe, 6, 10)
    assert often < 2e-3 and often < once / 50


def test_ddim_inversion_is_that_of_diffusers():
    pipe = PIPELINES["sd15"]()
    pipe.set_progress_bar_config(disable=True)
    text = pipe.encode_prompt([PROMPT], "cpu", 1, False)[0]
    scheduler = DDIMInverseScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(6)
    latents = encoded(pipe)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            epsilon = pipe.unet(latents, timestep, encoder_hidden_states=text, return_dict=False)[0]
            latents = scheduler.step(epsilon, timestep, latents, return_dict=False)[0]
    ours = invert(pipe, image(), PROMPT, num_inference_steps=6)
    assert_close(ours / latents.abs().max(), latents / latents.abs().max(), rtol=0.0, atol=1e-5)


def test_euler_inversion_climbs_the_flow(pipe: DiffusionPipeline):
    conditioner = conditioner_of(pipe)
    text = conditioner.encode_captions([PROMPT])
    pipe.scheduler.set_timesteps(5)
    sigmas, latents = pipe.scheduler.sigmas.flip(0), encoded(pipe)
    with torch.no_grad():
        for low, high in pairwise(sigmas):
            latents = latents + (high - low) * conditioner.predict(latents, 1000 * high[None], text)
    assert_close(invert(pipe, image(), PROMPT, num_inference_steps=5), latents)


def level(kind: str, noise: float) -> Level:
    noise_scale = torch.tensor(noise, dtype=torch.float64)
    return Level(1 - noise_scale if kind == "flow" else (1 - noise_scale**2).sqrt(), noise_scale)


@pytest.mark.parametrize("kind", ["flow", "epsilon", "v_prediction"])
def test_a_step_is_straight_in_its_own_coordinates(kind: Any):
    """x along the flow; x / s over n / s for epsilon; a turn by an angle for v."""
    x, p = torch.randn(2, 5, dtype=torch.float64)
    at, to = level(kind, 0.9), level(kind, 0.4)
    a, b = Step(torch.tensor(1.0), at, to).factors(kind)
    if kind == "flow":
        expected = x + (0.4 - 0.9) * p
    elif kind == "epsilon":
        expected = to.signal * (x / at.signal + (to.noise / to.signal - at.noise / at.signal) * p)
    else:
        turn = torch.atan2(at.noise, at.signal) - torch.atan2(to.noise, to.signal)
        expected = turn.cos() * x - turn.sin() * p
    assert_close(a * x + b * p, expected)


@pytest.mark.parametrize("kind", ["flow", "epsilon", "v_prediction"])
def test_a_step_with_the_true_prediction_stays_on_the_line_from_image_to_noise(kind: Any):
    clean, noise = torch.randn(2, 5, dtype=torch.float64)
    at, to = level(kind, 0.9), level(kind, 0.4)
    truth = {"flow": noise - clean, "epsilon": noise, "v_prediction": at.signal * noise - at.noise * clean}[kind]
    a, b = Step(torch.tensor(1.0), at, to).factors(kind)
    assert_close(a * (at.signal * clean + at.noise * noise) + b * truth, to.signal * clean + to.noise * noise)


@every_pipeline
def test_drawing_again_is_what_the_pipeline_draws_of_that_noise(pipe: DiffusionPipeline):
    shape = encoded(pipe).shape
    noise = torch.randn(2, *shape[1:], generator=torch.Generator().manual_seed(3))
    given, scale = noise, 4.0
    if isinstance(pipe, FluxPipeline):
        given, scale = pipe._pack_latents(noise, 2, *shape[1:]), 1.0  # schnell's pipeline does not guide
    latents = tiny.generate(pipe, [PROMPT, OTHER], steps=4, latents=given.clone(), guidance_scale=scale)
    if isinstance(pipe, FluxPipeline):
        latents = pipe._unpack_latents(latents, 16, 16, pipe.vae_scale_factor)
    ours = regenerate(pipe, noise, [PROMPT, OTHER], num_inference_steps=4, guidance_scale=scale, **LATENTS)
    assert_close(ours / latents.abs().max(), latents / latents.abs().max(), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("sampler", [PNDMScheduler, EulerDiscreteScheduler])
def test_unets_are_inverted_by_ddim_whatever_the_sampler(sampler: Any):
    pipe = PIPELINES["sd15"]()
    pipe.set_progress_bar_config(disable=True)
    expected = invert(pipe, image(), PROMPT, num_inference_steps=3)
    pipe.scheduler = sampler.from_config(pipe.scheduler.config)
    assert_close(invert(pipe, image(), PROMPT, num_inference_steps=3), expected)
    assert isinstance(pipe.scheduler, sampler)


@every_pipeline
def test_another_prompt_and_an_adapter_change_what_is_drawn(pipe: DiffusionPipeline):
    settings: dict[str, Any] = {"num_inference_steps": 3}
    noise = invert(pipe, image(), PROMPT, **settings)
    source, other = (regenerate(pipe, noise, text, **settings, **LATENTS) for text in (PROMPT, OTHER))
    pipe.add_softrepa()
    for parameter in pipe.softrepa_parameters().values():
        torch.nn.init.normal_(parameter)
    adapted = regenerate(pipe, noise, PROMPT, **settings, **LATENTS)
    inverted = invert(pipe, image(), PROMPT, **settings)
    pipe.disable_softrepa()
    assert_close(regenerate(pipe, noise, PROMPT, **settings, **LATENTS), source, rtol=0.0, atol=0.0)
    for one, two in ((other, source), (adapted, source), (inverted, noise)):
        assert (one - two).abs().max() > 1e-4
    assert not noise.requires_grad and noise.dtype == torch.float32


def test_a_batch_goes_there_and_back_as_its_images_alone(pipe: DiffusionPipeline):
    settings: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 2.0}
    noise = invert(pipe, image(2), [PROMPT, OTHER], **settings)
    alone = [invert(pipe, image, text, **settings) for image, text in zip(image(2), (PROMPT, OTHER), strict=True)]
    assert_close(noise, torch.cat(alone), rtol=1e-4, atol=1e-4)
    drawn = regenerate(pipe, noise[:1], [PROMPT, OTHER], **settings)
    assert len(drawn) == 2 and drawn[0].size == (16, 16)


def test_the_scheduler_is_left_as_it_was(pipe: DiffusionPipeline):
    pipe.scheduler.set_timesteps(7)
    before = {name: str(value) for name, value in vars(pipe.scheduler).items()}
    noise = invert(pipe, image(), PROMPT, num_inference_steps=2)
    regenerate(pipe, noise, PROMPT, num_inference_steps=2)
    assert {name: str(value) for name, value in vars(pipe.scheduler).items()} == before


def test_what_cannot_be_inverted_is_refused(pipe: DiffusionPipeline):
    with pytest.raises(ValueError, match=r"num_substitutions must be a positive integer .* but got 0"):
        invert(pipe, image(), PROMPT, num_substitutions=0)
    with pytest.raises(ValueError, match=r"num_inference_steps must be a positive integer .* but got 0"):
        invert(pipe, image(), PROMPT, num_inference_steps=0)
    with pytest.raises(ValueError, match="there are 2 images, 3 prompts, 1 negative prompts"):
        invert(pipe, image(2), [PROMPT] * 3)
    with pytest.raises(ValueError, match=r"needs latents \(n, 4, h, w\) .* but they are \(1, 3, 16, 16\)"):
        regenerate(pipe, image(), PROMPT)
    with pytest.raises(ValueError, match=r"latents must have the shape \(n, C, h, w\), .* but have \(1, 4, 64\)"):
        regenerate(pipe, torch.zeros(1, 4, 64), PROMPT)
    for wrong in (None, [1.0], torch.ones(1, 4, 8, 8, dtype=torch.int64)):
        with pytest.raises(TypeError, match="latents must be a floating-point tensor, as invert returns it, but are"):
            regenerate(pipe, wrong, PROMPT)
    with pytest.raises(ValueError, match="output_type must be one of"):
        regenerate(pipe, torch.zeros(1, 4, 8, 8), PROMPT, output_type="jpg")
    with pytest.raises(TypeError, match="prompt must be a string or a list of strings"):
        regenerate(pipe, torch.zeros(1, 4, 8, 8), 3)
