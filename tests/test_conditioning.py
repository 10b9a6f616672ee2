"""Conditioners: they call a pipeline's parts as the pipeline itself does, and reach the reference's errors."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.functional import mse_loss, pixel_shuffle, pixel_unshuffle
from torch.testing import assert_close

import tiny
from diffusers_softrepa import add_softrepa, conditioning, softrepa_parameters
from diffusers_softrepa.compat import DIFFUSERS
from diffusers_softrepa.conditioning import Conditioner, concatenate, conditioner_of, take
from diffusers_softrepa.pairs import pair_errors
from golden import NAMES, Golden, golden

CAPTIONS = ["a red cat", "two dogs, a tree"]
HEIGHT, WIDTH = 16, 24
EXACT: dict[str, float] = {"rtol": 0.0, "atol": 0.0}


def v_prediction_pipeline() -> StableDiffusionPipeline:
    """A pipeline as of SD2.1."""
    pipe = tiny.sd15_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    return pipe


def standardised_pipeline() -> StableDiffusionXLPipeline:
    """A pipeline as of Playground 2.5, whose VAE states means and deviations per channel."""
    pipe = tiny.sdxl_pipeline()
    pipe.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 0.5, 3.0])
    return pipe


PIPELINES = {family.name: family.pipeline for family in tiny.FAMILIES} | {
    "sd21": v_prediction_pipeline,
    "playground": standardised_pipeline,
    "flux-guided": lambda: tiny.flux_pipeline(guidance_embeds=True),
}
every_pipeline = pytest.mark.parametrize("pipe", PIPELINES, indirect=True)


@pytest.fixture
def pipe(request: pytest.FixtureRequest) -> DiffusionPipeline:
    return PIPELINES[request.param]()


@contextmanager
def calls_of(denoiser: nn.Module) -> Iterator[list[dict[str, Tensor]]]:
    """Collects the tensors of every call of a denoiser, by argument name."""
    calls: list[dict[str, Tensor]] = []
    signature = inspect.signature(type(denoiser).forward)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = signature.bind(module, *args, **kwargs).arguments
        given |= given.get("added_cond_kwargs") or {}
        calls.append({name: value for name, value in given.items() if isinstance(value, Tensor)})

    handle = denoiser.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def latents_of(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Returns latents (n, C, h, w) of those a pipeline holds."""
    if not isinstance(pipe, FluxPipeline):
        return latents
    square = latents.transpose(1, 2).unflatten(2, (HEIGHT // 4, WIDTH // 4))  # (n, 4C, h / 2, w / 2)
    return pixel_shuffle(square, 2)


def random_latents(conditioner: Conditioner, batch: int = 2) -> Tensor:
    return torch.randn(batch, *conditioner.latent_shape(HEIGHT, WIDTH))


def timesteps(conditioner: Conditioner) -> Tensor:
    return conditioner.noising.round_timestep(torch.tensor([120.5, 770.25]))


@every_pipeline
def test_the_denoiser_is_called_once_and_with_what_sampling_gives_it(pipe: DiffusionPipeline):
    conditioner = conditioner_of(pipe)
    scale = 3.5 if isinstance(pipe, FluxPipeline) else 1.0  # 1.0: no second branch
    with calls_of(conditioner.denoiser) as sampling:
        tiny.generate(pipe, CAPTIONS, steps=3, height=HEIGHT, width=WIDTH, guidance_scale=scale)
    sampled = sampling[-1]
    timestep = pipe.scheduler.timesteps[-1].expand(2)
    noisy_latents = latents_of(pipe, sampled["sample" if "sample" in sampled else "hidden_states"])
    with calls_of(conditioner.denoiser) as training:
        conditioner.predict(noisy_latents, timestep, conditioner.encode_captions(CAPTIONS))
    assert len(training) == 1
    sampled["timestep"] = sampled["timestep"].expand(2)
    assert_close(training[0], sampled, **EXACT)


def denoiser_inputs(pipe: DiffusionPipeline, latents: Tensor) -> dict[str, Any]:
    """Returns what each family's denoiser reads besides the timestep, written out."""
    if isinstance(pipe, StableDiffusionPipeline):
        return {"sample": latents, "encoder_hidden_states": pipe.encode_prompt(CAPTIONS, "cpu", 1, False)[0]}
    if isinstance(pipe, StableDiffusionXLPipeline):
        text, _, pooled, _ = pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
        time_ids = torch.tensor([[HEIGHT, WIDTH, 0, 0, HEIGHT, WIDTH]] * 2).float()
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return {"sample": latents, "encoder_hidden_states": text, "added_cond_kwargs": added}
    if isinstance(pipe, StableDiffusion3Pipeline):
        text, _, pooled, _ = pipe.encode_prompt(CAPTIONS, None, None, max_sequence_length=tiny.MAX_LENGTH)
        return {"hidden_states": latents, "encoder_hidden_states": text, "pooled_projections": pooled}
    text, pooled, _ = pipe.encode_prompt(CAPTIONS, None, max_sequence_length=tiny.MAX_LENGTH)
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(HEIGHT / 4), torch.arange(WIDTH / 4))
    inputs = {"hidden_states": pixel_unshuffle(latents, 2).flatten(2).mT, "img_ids": grid}
    inputs |= {"encoder_hidden_states": text, "pooled_projections": pooled, "txt_ids": torch.zeros(text.shape[1], 3)}
    return inputs | ({"guidance": torch.full((2,), 3.5)} if pipe.transformer.config.guidance_embeds else {})


def noisy_and_target(
    pipe: DiffusionPipeline, latents: Tensor, noise: Tensor, timestep: Tensor
) -> tuple[Tensor, Tensor]:
    if isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        sigma = (timestep / 1000).view(-1, 1, 1, 1)
        return latents + sigma * (noise - latents), noise - latents
    target = noise
    if pipe.scheduler.config.prediction_type == "v_prediction":
        target = pipe.scheduler.get_velocity(latents, noise, timestep)
    return pipe.scheduler.add_noise(latents, noise, timestep), target


@every_pipeline
def test_the_errors_of_matched_pairs_are_the_denoising_losses(pipe: DiffusionPipeline):
    conditioner = conditioner_of(pipe)
    add_softrepa(pipe)
    latents, timestep = random_latents(conditioner), timesteps(conditioner)
    noise = torch.randn_like(latents)
    noisy_latents, target = noisy_and_target(pipe, latents, noise, timestep)
    own_timestep = timestep / 1000 if isinstance(pipe, FluxPipeline) else timestep
    inputs = denoiser_inputs(pipe, noisy_latents)
    expected = latents_of(pipe, conditioner.denoiser(**inputs, timestep=own_timestep, return_dict=False)[0])
    prediction = conditioner.predict(
        conditioner.noising.noisy_latents(latents, noise, timestep), timestep, conditioner.encode_captions(CAPTIONS)
    )
    errors = pair_errors(prediction, conditioner.noising.target(latents, noise, timestep))
    for row in range(2):
        assert_close(errors[row], mse_loss(expected[row], target[row]))


def golden_pipeline(g: Golden) -> DiffusionPipeline:
    """A pipeline with nothing but the golden denoiser and its scheduler."""
    if g.name == "sd3":
        texts = {f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        return StableDiffusion3Pipeline(transformer=g.denoiser, scheduler=scheduler, vae=None, **texts)
    scheduler = tiny.sd15_pipeline().scheduler
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "unet": g.denoiser, "scheduler": scheduler}
    if g.name == "sdxl":
        return StableDiffusionXLPipeline(text_encoder_2=None, tokenizer_2=None, **parts)
    unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**parts, **unused)


@pytest.mark.parametrize("name", NAMES)
def test_all_pairs_have_the_errors_of_the_reference(name: str):
    g = golden(name)
    g.load_adapter()
    conditioner = conditioner_of(golden_pipeline(g))
    pooled = g.tensors.get("train.pooled", g.tensors.get("train.text_embeds"))
    conditions = {"prompt_embeds": g.tensors["train.prompt_embeds"]}
    conditions |= {} if pooled is None else {"pooled_prompt_embeds": pooled}
    latents, noise, timestep = (g.tensors[f"train.{key}"] for key in ("latents", "noise", "timestep"))
    batch = len(latents)
    image, caption = torch.cartesian_prod(torch.arange(batch), torch.arange(batch)).T
    with torch.no_grad():
        noisy_latents = conditioner.noising.noisy_latents(latents, noise, timestep)
        prediction = conditioner.predict(noisy_latents[image], timestep.expand(batch**2), take(conditions, caption))
    errors = pair_errors(prediction, conditioner.noising.target(latents, noise, timestep)[image])
    assert_close(errors.view(batch, batch), g.tensors["train.errors"], rtol=0.0, atol=1e-5)


@every_pipeline
def test_latents_go_to_the_denoiser_and_back_in_place(pipe: DiffusionPipeline):
    conditioner = conditioner_of(pipe)
    conditioner.denoiser.register_forward_hook(
        lambda module, args, kwargs, out: (args[0] if args else kwargs["hidden_states"],), with_kwargs=True
    )
    latents = random_latents(conditioner).contiguous(memory_format=torch.channels_last)
    conditions = conditioner.encode_captions(CAPTIONS)
    assert_close(conditioner.predict(latents, timesteps(conditioner), conditions), latents, **EXACT)


@every_pipeline
def test_encoding_images_undoes_the_pipelines_decoding(pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch):
    conditioner = conditioner_of(pipe)
    decoded, decode = [], pipe.vae.decode
    with monkeypatch.context() as patch:
        patch.setattr(pipe.vae, "decode", lambda z, *args, **kwargs: decoded.append(z) or decode(z, *args, **kwargs))
        size = {"height": HEIGHT, "width": WIDTH}
        drawn = latents_of(pipe, tiny.generate(pipe, **size))
        images = tiny.generate(pipe, **size, output_type="pt")
    posterior = DiagonalGaussianDistribution(torch.cat([decoded[0], torch.zeros_like(decoded[0])], 1))
    monkeypatch.setattr(pipe.vae, "encode", lambda x: AutoencoderKLOutput(latent_dist=posterior))
    latents = conditioner.encode_images(2 * images - 1)
    assert_close(latents, drawn)
    assert latents.shape[1:] == conditioner.latent_shape(HEIGHT, WIDTH)


@every_pipeline
def test_images_are_encoded_to_a_sample_or_the_mode_of_the_posterior(pipe: DiffusionPipeline):
    conditioner, pixels = conditioner_of(pipe), 2 * torch.rand(2, 3, HEIGHT, WIDTH) - 1
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    first, again, other = (conditioner.encode_images(pixels, seed) for seed in seeds)
    mode = conditioner.encode_images(pixels)
    assert_close(first, again, **EXACT)
    assert_close(mode, conditioner.encode_images(pixels), **EXACT)
    assert not torch.equal(first, other) and not torch.equal(first, mode)
    assert mode.dtype == torch.float32 and not mode.requires_grad and not mode.is_inference()


def test_a_float16_vae_that_overflows_encodes_in_float32():
    pipe = tiny.sdxl_pipeline()
    pixels = 2 * torch.rand(2, 3, HEIGHT, WIDTH) - 1
    pipe.vae.to(torch.float16).to(torch.float32)
    expected = conditioner_of(pipe).encode_images(pixels)
    pipe.vae.to(torch.float16)
    assert_close(conditioner_of(pipe).encode_images(pixels), expected, **EXACT)
    assert pipe.vae.dtype == torch.float16


@every_pipeline
def test_a_captions_row_does_not_depend_on_the_other_captions(pipe: DiffusionPipeline):
    conditioner = conditioner_of(pipe)
    captions = [*CAPTIONS, "", "a very long caption " * 5]
    together = conditioner.encode_captions(captions)
    alone = concatenate([conditioner.encode_captions([caption]) for caption in captions])
    assert_close(alone, together)
    assert not any(value.requires_grad for value in together.values())


def test_rows_are_taken_and_concatenated():
    conditions = {"prompt_embeds": torch.randn(3, 4, 5), "pooled_prompt_embeds": torch.randn(3, 6)}
    parts = [take(conditions, torch.tensor([0])), take(conditions, torch.tensor([1, 2]))]
    assert_close(concatenate(parts), conditions, **EXACT)
    assert_close(
        take(conditions, torch.tensor([2, 2]))["pooled_prompt_embeds"], conditions["pooled_prompt_embeds"][[2, 2]]
    )


@pytest.mark.parametrize(("make", "clip"), [(tiny.sd3_pipeline, tiny.MAX_LENGTH), (tiny.flux_pipeline, 0)])
def test_text_is_as_long_as_asked_and_no_longer_than_the_tokenizer_allows(make: Any, clip: int):
    for asked, length in ((7, 7), (None, tiny.MAX_LENGTH), (999, tiny.MAX_LENGTH)):
        conditions = conditioner_of(make(), max_sequence_length=asked).encode_captions(CAPTIONS)
        assert conditions["prompt_embeds"].shape[:2] == (2, clip + length)


def test_sd3_without_t5_reads_zeros_in_its_place():
    pipe = tiny.sd3_pipeline()
    pipe.text_encoder_3 = pipe.tokenizer_3 = None
    text = conditioner_of(pipe, max_sequence_length=7).encode_captions(CAPTIONS)["prompt_embeds"]
    rows = 7 if Version("0.35") <= DIFFUSERS else tiny.MAX_LENGTH  # an older pipeline counts CLIP's tokens
    assert text.shape[1] == tiny.MAX_LENGTH + rows
    assert not text[:, -rows:].any() and text[:, :-rows].any()


def test_flux_is_told_the_guidance_scale_that_was_set():
    conditioner = conditioner_of(tiny.flux_pipeline(guidance_embeds=True), guidance_scale=1.5)
    with calls_of(conditioner.denoiser) as calls:
        conditioner.predict(random_latents(conditioner), timesteps(conditioner), conditioner.encode_captions(CAPTIONS))
    assert calls[0]["guidance"].tolist() == [1.5, 1.5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_pipeline
def test_a_denoiser_of_lower_precision_predicts_in_float32_and_trains_its_tokens(
    pipe: DiffusionPipeline, dtype: torch.dtype
):
    conditioner = conditioner_of(pipe)
    add_softrepa(pipe)
    conditioner.denoiser.requires_grad_(False)
    call = random_latents(conditioner), timesteps(conditioner), conditioner.encode_captions(CAPTIONS)
    expected = conditioner.predict(*call)
    conditioner.denoiser.to(dtype)
    prediction = conditioner.predict(*call)
    assert prediction.dtype == torch.float32
    assert (prediction - expected).norm() < 0.05 * expected.norm()
    prediction.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in softrepa_parameters(pipe).values())


@every_pipeline
def test_what_is_cached_may_be_dropped(pipe: DiffusionPipeline):
    conditioner = conditioner_of(pipe)
    conditions, pixels = conditioner.encode_captions(CAPTIONS), torch.zeros(2, 3, HEIGHT, WIDTH)
    latents = conditioner.encode_images(pixels)
    expected = conditioner.predict(latents, timesteps(conditioner), conditions)
    for name in pipe.components:
        if name == "vae" or name.startswith(("text_encoder", "tokenizer")):
            setattr(pipe, name, None)
    assert_close(conditioner.predict(latents, timesteps(conditioner), conditions), expected, **EXACT)
    with pytest.raises(ValueError, match=r"encoding captions needs tokenizer, .*text_encoder.* has none; load"):
        conditioner.encode_captions(CAPTIONS)
    with pytest.raises(ValueError, match="encoding images needs vae"):
        conditioner.encode_images(pixels)
    assert_close(conditioner_of(pipe).predict(latents, timesteps(conditioner), conditions), expected, **EXACT)


@pytest.mark.parametrize(
    ("name", "multiple", "shape"),
    [("sd15", 2, (4, 8, 12)), ("sdxl", 2, (4, 8, 12)), ("sd3", 4, (4, 8, 12)), ("flux", 4, (4, 8, 12))],
)
def test_images_must_have_sides_that_fit_the_denoiser(name: str, multiple: int, shape: tuple[int, ...]):
    conditioner = conditioner_of(PIPELINES[name]())
    assert conditioner.image_multiple == multiple
    assert conditioner.latent_shape(HEIGHT, WIDTH) == shape
    for height, width in ((HEIGHT, WIDTH + 1), (HEIGHT + 1, WIDTH), (0, WIDTH)):
        with pytest.raises(ValueError, match=f"multiples of {multiple} px .* but are {height} x {width}"):
            conditioner.latent_shape(height, width)
    with pytest.raises(ValueError, match=f"multiples of {multiple} px"):
        conditioner.encode_images(torch.zeros(1, 3, HEIGHT, WIDTH + 1))


@pytest.mark.parametrize(
    "pixels", [torch.zeros(3, 16, 16), torch.zeros(1, 4, 16, 16), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)]
)
def test_pixels_must_be_floating_images(pixels: Tensor):
    with pytest.raises(ValueError, match=r"pixels must be floating numbers in \[-1, 1\] of shape \(n, 3, H, W\)"):
        conditioner_of(tiny.sd15_pipeline()).encode_images(pixels)


@pytest.mark.parametrize("captions", ["a red cat", [["a red cat"]], [3]])
def test_captions_must_be_strings(captions: Any):
    with pytest.raises(TypeError, match="captions must be a list of strings, but are"):
        conditioner_of(tiny.sd15_pipeline()).encode_captions(captions)


def test_no_captions_are_refused():
    with pytest.raises(ValueError, match="captions must be at least one"):
        conditioner_of(tiny.sd15_pipeline()).encode_captions([])


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 4, 7, 8), (2, 4, 8), (2, 16, 16)])
def test_latents_that_do_not_fit_the_denoiser_are_refused(shape: tuple[int, ...]):
    conditioner = conditioner_of(tiny.flux_pipeline())
    with pytest.raises(ValueError, match=r"needs latents \(n, 4, h, w\) with h and w multiples of 2, but they are"):
        conditioner.predict(torch.zeros(shape), timesteps(conditioner), conditioner.encode_captions(CAPTIONS))


def test_rows_that_do_not_belong_together_are_refused():
    conditioner = conditioner_of(tiny.sd3_pipeline())
    latents, conditions = random_latents(conditioner), conditioner.encode_captions(CAPTIONS)
    for timestep in (torch.tensor(5.0), torch.tensor([5.0]), torch.full((2, 1), 5.0)):
        with pytest.raises(ValueError, match=r"2 noisy latents need a timestep of shape \(2,\).*'timestep'"):
            conditioner.predict(latents, timestep, conditions)
    with pytest.raises(ValueError, match=r"as many rows of every condition, but got \{'prompt_embeds': \(1,"):
        conditioner.predict(latents, timesteps(conditioner), take(conditions, torch.tensor([0])))


def test_a_pipeline_that_does_not_start_from_noise_is_refused():
    pipe = FluxImg2ImgPipeline.from_pipe(tiny.flux_pipeline())
    message = r"family 'flux' needs a FluxPipeline, but got a FluxImg2ImgPipeline; FluxPipeline.from_pipe\(pipeline\)"
    with pytest.raises(ValueError, match=message):
        conditioner_of(pipe)
    assert conditioner_of(FluxPipeline.from_pipe(pipe)).pipeline.transformer is pipe.transformer


def test_a_family_without_a_conditioner_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(conditioning, "_CONDITIONERS", conditioning._CONDITIONERS[:3])
    with pytest.raises(
        ValueError, match="need a conditioner for family 'flux', and there is none, only for sd3, unet"
    ):
        conditioner_of(tiny.flux_pipeline())


def test_settings_that_a_pipeline_does_not_have_are_refused():
    with pytest.raises(ValueError, match="StableDiffusionPipeline has no setting guidance_scale, max_sequence"):
        conditioner_of(tiny.sd15_pipeline(), max_sequence_length=77, guidance_scale=3.5)
    with pytest.raises(ValueError, match=r"settings must be positive, but are \{'max_sequence_length': 0\}"):
        conditioner_of(tiny.sd3_pipeline(), max_sequence_length=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"in_channels": 9},
            "UNet2DConditionModel reads 9 latent channels and the VAE makes 4; train the text-to-image",
        ),
        ({"time_cond_proj_dim": 8}, "this one has a time_cond_proj_dim: it is distilled for few steps"),
    ],
)
def test_a_unet_that_is_not_a_plain_text_to_image_one_is_refused(change: dict[str, int], message: str):
    pipe = tiny.sd15_pipeline()
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config, **change)
    with pytest.raises(ValueError, match=message):
        conditioner_of(pipe)


def test_a_pipeline_without_a_scheduler_is_refused():
    pipe = tiny.sd15_pipeline()
    pipe.scheduler = None
    with pytest.raises(
        ValueError, match="calling the denoiser needs scheduler, but this StableDiffusionPipeline has none"
    ):
        conditioner_of(pipe)
