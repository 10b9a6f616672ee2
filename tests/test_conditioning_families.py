"""Conditioners of the younger families: they call a pipeline's parts as sampling does, with its own sign and clock."""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ChromaImg2ImgPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    Flux2KleinInpaintPipeline,
    Flux2KleinKVPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    SanaSprintPipeline,
    SCMScheduler,
    ZImageImg2ImgPipeline,
    ZImageOmniPipeline,
)
from diffusers.models.autoencoders.autoencoder_dc import EncoderOutput
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn
from torch.nn.functional import mse_loss, pixel_shuffle, pixel_unshuffle
from torch.testing import assert_close

from diffusers_softrepa import conditioning
from diffusers_softrepa.conditioning import Conditioner, concatenate, conditioner_of
from diffusers_softrepa.noising import Noising
from diffusers_softrepa.pairs import pair_errors
from zoo_pipelines import ZOO, Entry, sana_pipeline

pytestmark = [
    # Of diffusers' own: Chroma's positions, and DPM-Solver's tables under NumPy 2.
    pytest.mark.filterwarnings("ignore:.*FluxPosEmbed.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

CAPTIONS = ["a red cat", "two dogs, a tree and a cat"]
EXACT: dict[str, float] = {"rtol": 0.0, "atol": 0.0}
every_entry = pytest.mark.parametrize("entry", ZOO.values(), ids=ZOO)


def conditioner(entry: Entry, pipe: DiffusionPipeline | None = None) -> Conditioner:
    return conditioner_of(entry.make() if pipe is None else pipe, max_sequence_length=entry.length)


def parts(name: str, value: Any) -> dict[str, Any]:
    """Returns what an argument holds, by name; nothing for None or an empty dict, and masks as numbers."""
    if isinstance(value, dict):
        return {k: part for key, inner in value.items() for k, part in parts(f"{name}.{key}", inner).items()}
    if isinstance(value, list) and isinstance(value[0], Tensor):
        return {f"{name}.{number}": part for number, part in enumerate(value)}
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        return {name: value.long()}
    return {} if value is None else {name: value}


@contextmanager
def calls_of(denoiser: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Collects what every call of a denoiser is given, by name."""
    calls: list[dict[str, Any]] = []
    signature = inspect.signature(type(denoiser).forward)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        bound = signature.bind(module, *args, **kwargs)
        bound.apply_defaults()
        given = {name: value for name, value in bound.arguments.items() if name != "self"}
        calls.append(parts("call", given))

    handle = denoiser.register_forward_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def steps_of(scheduler: Any) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Collects latents, prediction and new latents of every step of a scheduler."""
    steps: list[tuple[Tensor, Tensor, Tensor]] = []
    step = scheduler.step

    def noted(prediction: Tensor, timestep: Any, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        done = step(prediction, timestep, latents, *args, **kwargs)
        steps.append((latents, prediction, done[0]))
        return done

    scheduler.step = noted
    try:
        yield steps
    finally:
        scheduler.step = step


def random_latents(entry: Entry) -> Tensor:
    return torch.randn(2, *entry.shape)


def timesteps(family: Conditioner) -> Tensor:
    return family.noising.round_timestep(torch.tensor([120.5, 770.25]))


@every_entry
def test_the_denoiser_is_called_once_and_with_what_sampling_gives_it(entry: Entry):
    pipe = entry.make()
    family = conditioner(entry, pipe)
    with steps_of(pipe.scheduler) as steps, calls_of(family.denoiser) as sampling:
        entry.generate(pipe, CAPTIONS, steps=3, **entry.unguided)
    noisy_latents, expected = (unpacked(entry, latents) for latents in steps[-1][:2])
    timestep = family.noising.round_timestep(pipe.scheduler.timesteps[-1].float()).expand(2)
    with calls_of(family.denoiser) as training, torch.no_grad():
        prediction = family.predict(noisy_latents, timestep, family.encode_captions(CAPTIONS))
    assert len(training) == 1
    assert_close(training[0], sampling[-1], **EXACT)
    assert_close(prediction, expected, **EXACT)


def unpacked(entry: Entry, latents: Tensor) -> Tensor:
    """Returns latents (n, C, h, w) of those that a pipeline steps."""
    channels, height, width = entry.shape
    if latents.ndim == 4:
        return latents
    square = latents.mT.unflatten(2, (height // 2, width // 2))  # (n, 4C, h / 2, w / 2)
    assert square.shape[1] == 4 * channels
    return pixel_shuffle(square, 2)


@every_entry
def test_a_captions_row_does_not_depend_on_the_other_captions(entry: Entry):
    family = conditioner(entry)
    captions = [*CAPTIONS, "", "a very long caption " * 5]
    together = family.encode_captions(captions)
    alone = concatenate([family.encode_captions([caption]) for caption in captions])
    assert_close(alone, together)
    assert not any(value.requires_grad for value in together.values())


# The loss, written out for each family.


def packed(latents: Tensor) -> Tensor:
    return pixel_unshuffle(latents, 2).flatten(2).mT  # (n, N, 4C)


def grid(latents: Tensor, axes: int) -> Tensor:
    """Returns the positions of packed latents, (N, axes): a zero, row and column, then zeros."""
    zero = torch.zeros(1)
    ranges = [torch.arange(side // 2).float() for side in latents.shape[2:]]
    return torch.cartesian_prod(zero, *ranges, *[zero] * (axes - 3))


def flux2_output(pipe: Any, latents: Tensor, level: Tensor) -> Tensor:
    text, _ = pipe.encode_prompt(list(CAPTIONS), max_sequence_length=40)
    guided = pipe.transformer.config.guidance_embeds
    text_ids = torch.zeros(40, 4)
    text_ids[:, 3] = torch.arange(40)
    return pipe.transformer(
        hidden_states=packed(latents),
        encoder_hidden_states=text,
        timestep=level / 1000,
        img_ids=grid(latents, 4),
        txt_ids=text_ids,
        guidance=torch.full((2,), 4.0) if guided else None,
    ).sample


def qwen_output(pipe: Any, latents: Tensor, level: Tensor) -> Tensor:
    text, mask = pipe.encode_prompt(list(CAPTIONS))
    return pipe.transformer(
        hidden_states=packed(latents),
        encoder_hidden_states=text,
        encoder_hidden_states_mask=mask,
        timestep=level / 1000,
        img_shapes=[(1, latents.shape[2] // 2, latents.shape[3] // 2)] * 2,
    ).sample


def zimage_output(pipe: Any, latents: Tensor, level: Tensor) -> Tensor:
    texts, _ = pipe.encode_prompt(list(CAPTIONS), do_classifier_free_guidance=False)
    images = [image[:, None] for image in latents]
    return torch.stack(pipe.transformer(images, 1 - level / 1000, texts).sample)[:, :, 0]


def chroma_output(pipe: Any, latents: Tensor, level: Tensor) -> Tensor:
    text, _, mask, *_ = pipe.encode_prompt(list(CAPTIONS), do_classifier_free_guidance=False, max_sequence_length=24)
    image = packed(latents)
    return pipe.transformer(
        hidden_states=image,
        encoder_hidden_states=text,
        timestep=level / 1000,
        img_ids=grid(latents, 3),
        txt_ids=torch.zeros(24, 3),
        attention_mask=torch.cat([mask, torch.ones(image.shape[:2])], 1),
    ).sample


def sana_output(pipe: Any, latents: Tensor, level: Tensor) -> Tensor:
    instruction = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
    text, mask, *_ = pipe.encode_prompt(CAPTIONS, False, max_sequence_length=40, complex_human_instruction=instruction)
    return pipe.transformer(latents, text, timestep=level, encoder_attention_mask=mask).sample


def pixart_output(pipe: Any, latents: Tensor, level: Tensor) -> Tensor:
    text, mask, *_ = pipe.encode_prompt(CAPTIONS, False, max_sequence_length=24)
    size = {"resolution": torch.tensor([[16.0, 24.0]] * 2), "aspect_ratio": torch.tensor([[16 / 24]] * 2)}
    noise_and_variance = pipe.transformer(
        latents, text, timestep=level, encoder_attention_mask=mask, added_cond_kwargs=size
    ).sample
    return noise_and_variance.chunk(2, dim=1)[0]


OUTPUTS = {
    "flux2": flux2_output,
    "flux2-klein": flux2_output,
    "qwen": qwen_output,
    "zimage": zimage_output,
    "chroma": chroma_output,
    "sana": sana_output,
    "pixart-alpha": pixart_output,
    "pixart-sigma": pixart_output,
}


@every_entry
def test_the_errors_of_matched_pairs_are_the_denoising_losses_of_the_family(entry: Entry):
    pipe = entry.make()
    family = conditioner(entry, pipe)
    clean, level = random_latents(entry), timesteps(family)
    noise = torch.randn_like(clean)
    with torch.no_grad():
        prediction = family.predict(
            family.noising.noisy_latents(clean, noise, level), level, family.encode_captions(CAPTIONS)
        )
    errors = pair_errors(prediction, family.noising.target(clean, noise, level))
    sigma = (level / 1000).view(2, 1, 1, 1)
    noisy, target = clean + sigma * (noise - clean), noise - clean
    if entry.name == "zimage":
        target = clean - noise
    elif entry.name.startswith("pixart"):
        signal = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000), 0)[level].view(2, 1, 1, 1)
        noisy, target = signal.sqrt() * clean + (1 - signal).sqrt() * noise, noise
    with torch.no_grad():
        output = OUTPUTS[entry.name](pipe, noisy, level)
    target = packed(target) if output.ndim == 3 else target
    expected = torch.stack([mse_loss(output[row], target[row]) for row in range(2)])
    assert_close(errors, expected, rtol=0.0, atol=1e-5)
    assert expected.min() > 0.1


# Images.


@every_entry
def test_encoding_images_undoes_the_pipelines_decoding(entry: Entry, monkeypatch: pytest.MonkeyPatch):
    pipe = entry.make()
    family, decode, decoded = conditioner(entry, pipe), pipe.vae.decode, []
    with steps_of(pipe.scheduler) as steps, monkeypatch.context() as patch:
        patch.setattr(pipe.vae, "decode", lambda z, *args, **kwargs: decoded.append(z) or decode(z, *args, **kwargs))
        images = entry.generate(pipe, CAPTIONS, output_type="pt", **entry.unguided)

    def encode(pixels: Tensor) -> Any:
        assert pixels.ndim == decoded[0].ndim
        if entry.name == "sana":
            return EncoderOutput(latent=decoded[0])
        moments = torch.cat([decoded[0], torch.zeros_like(decoded[0])], 1)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))

    monkeypatch.setattr(pipe.vae, "encode", encode)
    latents = family.encode_images(2 * images - 1)
    assert_close(latents, unpacked(entry, steps[-1][2]))
    assert latents.shape[1:] == entry.shape == family.latent_shape(*entry.size)


@every_entry
def test_images_are_encoded_to_a_sample_or_the_mode_of_the_posterior(entry: Entry):
    family, pixels = conditioner(entry), 2 * torch.rand(2, 3, *entry.size) - 1
    mode = family.encode_images(pixels)
    assert_close(mode, family.encode_images(pixels), **EXACT)
    assert mode.dtype == torch.float32 and mode.shape[1:] == entry.shape and not mode.requires_grad
    seeds: list[Any] = [[torch.Generator().manual_seed(seed + row) for row in range(2)] for seed in (0, 0, 9)]
    first, again, other = (family.encode_images(pixels, seed) for seed in seeds)
    assert_close(first, again, **EXACT)
    deterministic = entry.name == "sana"
    assert torch.equal(first, mode) == torch.equal(first, other) == deterministic


@every_entry
def test_latents_are_decoded_and_steps_are_scheduled_as_in_sampling(entry: Entry):
    pipe = entry.make()
    family = conditioner(entry, pipe)
    with steps_of(pipe.scheduler) as steps:
        images = entry.generate(pipe, CAPTIONS, steps=3, output_type="pt", **entry.unguided)
    shown = (family.decode_latents(unpacked(entry, steps[-1][2])) / 2 + 0.5).clamp(0, 1)
    assert_close(shown, images)
    sampled = pipe.scheduler.timesteps
    pipe.scheduler.set_timesteps(**family.schedule(3, *entry.size))
    assert_close(pipe.scheduler.timesteps, sampled)


def test_flux2_latents_are_those_of_its_own_image_encoder():
    pipe = ZOO["flux2"].make()
    pixels = 2 * torch.rand(2, 3, 16, 24) - 1
    with torch.no_grad():
        expected = pipe._encode_vae_image(pixels, generator=None)
    assert_close(pixel_unshuffle(conditioner_of(pipe).encode_images(pixels), 2), expected)


@every_entry
def test_images_must_have_sides_that_fit_the_denoiser(entry: Entry):
    family = conditioner(entry)
    assert family.image_multiple == entry.multiple
    height, width = entry.size
    with pytest.raises(ValueError, match=f"multiples of {entry.multiple} px .* but are {height} x {width + 1}"):
        family.latent_shape(height, width + 1)
    with pytest.raises(ValueError, match=f"multiples of {entry.multiple} px"):
        family.encode_images(torch.zeros(1, 3, height + 2, width))
    with pytest.raises(ValueError, match=r"needs latents \(n, 4, h, w\)"):
        family.predict(torch.zeros(2, 3, 8, 8), timesteps(family), family.encode_captions(CAPTIONS))


@every_entry
def test_latents_go_to_the_denoiser_and_back_in_place(entry: Entry):
    family = conditioner(entry)
    sign = -1 if entry.name == "zimage" else 1

    def echo(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> tuple[Any]:
        return (args[0] if args else kwargs["hidden_states"],)

    family.denoiser.register_forward_hook(echo, with_kwargs=True)
    latents = random_latents(entry).contiguous(memory_format=torch.channels_last)
    prediction = family.predict(latents, timesteps(family), family.encode_captions(CAPTIONS))
    assert_close(prediction, sign * latents, **EXACT)


# Text.


@every_entry
def test_text_is_as_long_as_asked(entry: Entry):
    pipe = entry.make()
    for length in (9, entry.length):
        conditions = conditioner_of(pipe, max_sequence_length=length).encode_captions(CAPTIONS)
        assert {value.shape[:2] for value in conditions.values()} == {(2, length)}


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("flux2", 512),
        ("flux2-klein", 512),
        ("qwen", 512),
        ("zimage", 512),
        ("sana", 300),
        ("chroma", 24),
        ("pixart-alpha", 24),
        ("pixart-sigma", 24),
    ],
)
def test_text_has_the_published_length_unless_told_otherwise_and_no_more_than_the_tokenizer_allows(
    name: str, length: int
):
    conditions = conditioner_of(ZOO[name].make()).encode_captions(CAPTIONS)
    assert {value.shape[:2] for value in conditions.values()} == {(2, length)}


def test_pixart_keeps_its_two_text_lengths():
    assert [conditioner_of(ZOO[f"pixart-{name}"].make()).max_sequence_length for name in ("alpha", "sigma")] == [
        120,
        300,
    ]


@pytest.mark.parametrize("name", ["qwen", "zimage"])
def test_a_caption_is_denoised_alike_beside_a_longer_one(name: str):
    family = conditioner(ZOO[name])
    latents, level = random_latents(ZOO[name]), timesteps(family)
    with torch.no_grad():
        together = family.predict(latents, level, family.encode_captions(CAPTIONS))
        alone = [
            family.predict(latents[row, None], level[row, None], family.encode_captions([CAPTIONS[row]]))
            for row in range(2)
        ]
    assert_close(torch.cat(alone), together)


def test_flux2_is_told_the_guidance_scale_that_was_set():
    family = conditioner_of(ZOO["flux2"].make(), guidance_scale=1.5, max_sequence_length=9)
    with calls_of(family.denoiser) as calls:
        family.predict(random_latents(ZOO["flux2"]), timesteps(family), family.encode_captions(CAPTIONS))
    assert calls[0]["call.guidance"].tolist() == [1.5, 1.5]


def test_sana_reads_timesteps_on_the_scale_of_its_config():
    entry = ZOO["sana"]
    family = conditioner(entry, sana_pipeline(timestep_scale=0.5))
    with calls_of(family.denoiser) as calls:
        family.predict(random_latents(entry), torch.tensor([10.0, 500.0]), family.encode_captions(CAPTIONS))
    assert calls[0]["call.timestep"].tolist() == [5.0, 250.0]


@every_entry
def test_a_guidance_scale_makes_sampling_ask_twice(entry: Entry):
    pipe = entry.make()
    family = conditioner(entry, pipe)
    asked = []
    for settings in (family.sampling(), family.sampling(1.0), family.sampling(3.0)):
        with calls_of(family.denoiser) as calls:
            entry.generate(pipe, "a red cat", **entry.extra | settings)
        rows = [
            call.get("call.encoder_hidden_states", call.get("call.timestep", call.get("call.t"))) for call in calls
        ]
        asked.append(sum(len(row) for row in rows))
    assert family.sampling(3.0).keys() >= family.sampling().keys()
    assert asked[2] == (2 if entry.name == "flux2" else 4)  # in two steps; FLUX.2 dev is told the scale instead
    assert asked[1] == (4 if entry.name == "zimage" else 2)  # whose scale counts from 0


# Precision and what may be missing.


@every_entry
def test_a_denoiser_of_lower_precision_predicts_in_float32(entry: Entry):
    pipe = entry.make()
    family = conditioner(entry, pipe)
    level = family.noising.round_timestep(torch.tensor([125.0, 125.0]))  # a number that bfloat16 has
    call = random_latents(entry), level, family.encode_captions(CAPTIONS)
    with torch.no_grad():
        expected = family.predict(*call)
        nn.Module.to(family.denoiser, torch.bfloat16)
        prediction = family.predict(*call)
    assert prediction.dtype == torch.float32
    assert (prediction - expected).norm() < 0.05 * expected.norm()


@every_entry
def test_what_is_cached_may_be_dropped(entry: Entry):
    pipe = entry.make()
    family = conditioner(entry, pipe)
    conditions, pixels = family.encode_captions(CAPTIONS), torch.zeros(2, 3, *entry.size)
    latents = family.encode_images(pixels)
    with torch.no_grad():
        expected = family.predict(latents, timesteps(family), conditions)
        pipe.vae = pipe.text_encoder = pipe.tokenizer = None
        assert_close(conditioner(entry, pipe).predict(latents, timesteps(family), conditions), expected, **EXACT)
    with pytest.raises(ValueError, match="encoding captions needs tokenizer, text_encoder"):
        family.encode_captions(CAPTIONS)
    with pytest.raises(ValueError, match="encoding images needs vae"):
        family.encode_images(pixels)


# What cannot be trained.


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        (
            "flux2-klein",
            Flux2KleinInpaintPipeline,
            r"a Flux2Pipeline or Flux2KleinPipeline, but got a Flux2KleinInpaint",
        ),
        ("flux2-klein", Flux2KleinKVPipeline, r"got a Flux2KleinKVPipeline; .* or Flux2KleinPipeline.from_pipe"),
        ("qwen", QwenImageImg2ImgPipeline, r"needs a QwenImagePipeline, but got a QwenImageImg2ImgPipeline"),
        ("qwen", QwenImageInpaintPipeline, r"QwenImagePipeline.from_pipe\(pipeline\) makes one"),
        ("zimage", ZImageImg2ImgPipeline, r"needs a ZImagePipeline, but got a ZImageImg2ImgPipeline"),
        ("zimage", ZImageOmniPipeline, r"needs a ZImagePipeline, but got a ZImageOmniPipeline"),
        ("chroma", ChromaImg2ImgPipeline, r"needs a ChromaPipeline, but got a ChromaImg2ImgPipeline"),
    ],
)
def test_a_pipeline_that_starts_from_more_than_noise_is_refused(name: str, other: Any, message: str):
    parts = {name: part for name, part in ZOO[name].make().components.items() if part is not None}
    extra = dict.fromkeys(set(inspect.signature(other).parameters) - parts.keys() - {"is_distilled"})
    with pytest.raises(ValueError, match=message):
        conditioner_of(other(**parts, **extra))


def test_a_distilled_sana_is_refused():
    parts = dict(sana_pipeline().components)
    with pytest.raises(ValueError, match="needs a SanaPipeline, but got a SanaSprintPipeline"):
        conditioner_of(SanaSprintPipeline(**parts | {"scheduler": SCMScheduler()}))
    parts["transformer"].register_to_config(guidance_embeds=True)
    with pytest.raises(ValueError, match="this one has guidance_embeds: it is distilled for few steps"):
        conditioner_of(type(sana_pipeline())(**parts))
    with pytest.raises(ValueError, match=r"a FlowMatch\* scheduler, .* SCMScheduler has prediction_type 'trigflow'"):
        conditioner_of(type(sana_pipeline())(**parts | {"scheduler": SCMScheduler()}))


@pytest.mark.parametrize("name", ["flux2", "qwen", "zimage", "chroma", "sana", "pixart-sigma"])
def test_a_denoiser_that_reads_more_channels_than_the_vae_makes_is_refused(name: str):
    pipe = ZOO[name].make()
    channels = 2 * pipe.transformer.config.in_channels
    pipe.transformer.register_to_config(in_channels=channels)
    with pytest.raises(ValueError, match="reads 8 latent channels and the VAE makes 4; train the text-to-image model"):
        conditioner_of(pipe)


# Schedulers.


def test_noising_is_read_from_the_scheduler_of_every_family():
    read = {name: Noising.from_scheduler(entry.make().scheduler).prediction for name, entry in ZOO.items()}
    assert read == {name: "epsilon" if name.startswith("pixart") else "flow" for name in ZOO}


def test_a_dpm_solver_noises_as_the_scheduler_that_trained_did():
    scheduler = ZOO["pixart-sigma"].make().scheduler
    scheduler.set_timesteps(5)
    clean, noise, level = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 400, 999])
    expected = DDPMScheduler().add_noise(clean, noise, level)
    assert_close(Noising.from_scheduler(scheduler).noisy_latents(clean, noise, level), expected)


def test_the_guide_lists_every_pipeline_that_can_be_trained():
    guide = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    table = guide[guide.index("| family | pipelines |") : guide.index("A fresh adapter has 4")]
    trainable = {name for known in conditioning._CONDITIONERS for name in known.pipelines}
    assert set(re.findall(r"`(\w+Pipeline)`", table)) == trainable
