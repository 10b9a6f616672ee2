"""FlowEdit: the reference's numbers, the laws of an edit, and a pipeline that is left as it was."""

import copy
import inspect
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

import tiny
from diffusers_softrepa import editing, flow_edit, softrepa_disabled
from diffusers_softrepa.adapter import adapters_of
from diffusers_softrepa.conditioning import concatenate, conditioner_of
from diffusers_softrepa.editing.flow import edit_latents
from diffusers_softrepa.editing.guidance import Guided
from diffusers_softrepa.editing.images import read_images
from diffusers_softrepa.editing.levels import Level, Step, sampling_steps
from golden import Golden, golden
from test_conditioning import golden_pipeline

SOURCE, TARGET = "a red cat", "two dogs, a tree"
EXACT: dict[str, float] = {"rtol": 0.0, "atol": 0.0}
SHORT: dict[str, Any] = {"num_inference_steps": 4, "strength": 0.5, "generator": 0, "max_sequence_length": 24}
PIPELINES = {
    "sd3": tiny.sd3_pipeline,
    "flux": tiny.flux_pipeline,
    "flux-guided": lambda: tiny.flux_pipeline(guidance_embeds=True),
}
every_pipeline = pytest.mark.parametrize("pipe", PIPELINES, indirect=True)


@pytest.fixture
def pipe(request: pytest.FixtureRequest) -> DiffusionPipeline:
    made = PIPELINES[getattr(request, "param", "sd3")]()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def adapted(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The same with an adapter that is far from doing nothing."""
    pipe.add_softrepa()
    for parameter in pipe.softrepa_parameters().values():
        torch.nn.init.normal_(parameter)
    return pipe


def make_images(count: int = 1, height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(7))


def edit(pipe: DiffusionPipeline, image: Any = None, source: Any = SOURCE, target: Any = TARGET, **kw: Any) -> Any:
    return flow_edit(
        pipe, make_images() if image is None else image, source, target, **{"output_type": "latent"} | SHORT | kw
    )


def golden_edit(g: Golden, **settings: float) -> Tensor:
    t = g.tensors
    conditioner = conditioner_of(golden_pipeline(g))
    negative, source, target = (
        {"prompt_embeds": t[embeds], "pooled_prompt_embeds": t[pooled]}
        for embeds, pooled in (
            ("sample.negative_prompt_embeds", "sample.negative_pooled"),
            ("sample.prompt_embeds", "sample.pooled"),
            ("edit.target_prompt_embeds", "edit.target_pooled"),
        )
    )
    steps = sampling_steps(conditioner, 8, 128, 128)
    assert_close(torch.stack([step.timestep for step in steps]), t["edit.timesteps"], rtol=1e-6, atol=1e-4)
    with torch.no_grad():
        return edit_latents(
            t["edit.source_latents"],
            steps[-5:],
            source=Guided(conditioner, concatenate([negative, source]), settings["source"]),
            target=Guided(conditioner, concatenate([negative, target]), settings["target"]),
            noise=iter(t["edit.noise"][:, None]),
        )


def test_sd3_edits_match_the_reference_numbers():
    g = golden("sd3")
    g.load_adapter()
    edited = golden_edit(
        g, source=3.5, target=10.0
    )  # the reference writes 9 and adds the conditional branch once more
    assert (edited - g.tensors["edit.out"]).abs().max() < 1e-5 * g.tensors["edit.out"].abs().max()
    assert not torch.allclose(golden_edit(g, source=3.5, target=9.0), g.tensors["edit.out"], atol=1e-2)


def test_an_edit_integrates_the_difference_of_two_velocities():
    """Against the formula as the paper writes it, with the edited latents themselves as the state."""
    x0, noise = torch.randn(2, 4, 6, 6), torch.randn(6, 2, 4, 6, 6)
    sigmas = torch.tensor([0.8, 0.5, 0.1, 0.0])

    def source(x: Tensor, timestep: Tensor) -> Tensor:
        return torch.sin(3 * x) + timestep / 1000

    def target(x: Tensor, timestep: Tensor) -> Tensor:
        return torch.cos(x) * timestep / 500

    edited, draws = x0.clone(), iter(noise)
    for at, to in pairwise(sigmas):
        change = 0
        for _ in range(2):
            x_source = (1 - at) * x0 + at * next(draws)
            change = change + target(edited + x_source - x0, 1000 * at) / 2 - source(x_source, 1000 * at) / 2
        edited = edited + (to - at) * change
    steps = [Step(1000 * at, Level(1 - at, at), Level(1 - to, to)) for at, to in pairwise(sigmas)]
    ours = edit_latents(x0, steps, source=source, target=target, noise=iter(noise), num_averages=2)
    assert_close(ours, edited)


@every_pipeline
def test_an_edit_is_the_paper_s_loop_around_the_pipelines_own_schedule_and_denoiser(pipe: DiffusionPipeline):
    scales, count = (1.5, 4.0), 2
    ours = edit(pipe, source_guidance_scale=scales[0], target_guidance_scale=scales[1])
    guided = getattr(pipe.transformer.config, "guidance_embeds", False)
    tiny.generate(pipe, steps=4, height=16, width=24)  # sets the schedule
    sigmas = pipe.scheduler.sigmas[-count - 1 :]
    conditioners = [conditioner_of(pipe, guidance_scale=scale if guided else None) for scale in scales]
    texts = [conditioners[0].encode_captions([text]) for text in ("", SOURCE, TARGET)]

    def velocity(x: Tensor, sigma: Tensor, which: int) -> Tensor:
        model, t = conditioners[which], sigma[None] * 1000
        with torch.no_grad():
            positive = model.predict(x, t, texts[which + 1])
            negative = positive if guided else model.predict(x, t, texts[0])
        return positive if guided else negative + scales[which] * (positive - negative)

    x0 = conditioners[0].encode_images(2 * make_images() - 1)
    generator, edited = torch.Generator().manual_seed(0), x0.clone()
    for at, to in pairwise(sigmas):
        x_source = (1 - at) * x0 + at * torch.randn(x0.shape, generator=generator)
        edited += (to - at) * (velocity(edited + x_source - x0, at, 1) - velocity(x_source, at, 0))
    assert (ours - edited).abs().max() < 1e-4 * edited.abs().max()
    assert (edited - x0).abs().max() > 1e-2


@every_pipeline
def test_an_edit_from_a_prompt_to_itself_gives_the_image_back(pipe: DiffusionPipeline):
    pipe.add_softrepa()
    same: dict[str, Any] = {"source_guidance_scale": 5.0, "target_guidance_scale": 5.0, "num_averages": 2}
    edited = edit(pipe, target=SOURCE, **same)
    conditioner = conditioner_of(pipe)
    encoded = conditioner.encode_images(2 * make_images() - 1)
    assert_close(edited, encoded, **EXACT)
    shown = edit(pipe, target=SOURCE, **same, output_type="pt")
    assert_close(shown, (conditioner.decode_latents(encoded) / 2 + 0.5).clamp(0, 1))


@every_pipeline
def test_adapters_take_part_where_they_are_asked_to(adapted: DiffusionPipeline):
    both, target, none = (edit(adapted, adapter_scope=scope) for scope in ("both", "target", "none"))
    adapted.disable_softrepa()
    base = edit(adapted)
    adapted.enable_softrepa()
    assert_close(none, base, **EXACT)
    for one, other in ((both, base), (target, base), (both, target)):
        assert (one - other).abs().max() > 1e-3
    adapted.set_softrepa("softrepa", 0.0)
    assert_close(edit(adapted), base, **EXACT)


def test_adapters_that_are_off_stay_off(adapted: DiffusionPipeline):
    base = edit(adapted, adapter_scope="none")
    adapted.disable_softrepa()
    for scope in ("both", "target", "none"):
        assert_close(edit(adapted, adapter_scope=scope), base, **EXACT)
    assert not adapters_of(adapted.transformer).enabled


def test_without_adapters_every_scope_is_the_same(pipe: DiffusionPipeline):
    both, target, none = (edit(pipe, adapter_scope=scope) for scope in ("both", "target", "none"))
    assert_close(both, target, **EXACT)
    assert_close(both, none, **EXACT)
    assert adapters_of(pipe.transformer) is None


def test_adapters_are_on_again_after_an_error(adapted: DiffusionPipeline):
    with pytest.raises(KeyError), softrepa_disabled(adapted.transformer):
        assert adapted.get_softrepa_adapters() == {"softrepa": None}
        raise KeyError
    assert adapted.get_softrepa_adapters() == {"softrepa": 1.0}


@every_pipeline
def test_a_batch_is_edited_as_its_images_alone(adapted: DiffusionPipeline):
    images, targets = make_images(2), [TARGET, "a tree"]
    together = edit(adapted, images, [SOURCE, "no cat"], targets)
    alone = [
        edit(adapted, image, source, target)
        for image, source, target in zip(images, (SOURCE, "no cat"), targets, strict=True)
    ]
    assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_one_image_and_one_prompt_serve_all(pipe: DiffusionPipeline):
    several = edit(pipe, make_images(), SOURCE, [TARGET, "a tree"])
    assert_close(several, torch.cat([edit(pipe, target=text) for text in (TARGET, "a tree")]), rtol=1e-4, atol=1e-4)
    images = edit(pipe, make_images(2))
    assert_close(images, torch.cat([edit(pipe, image) for image in make_images(2)]), rtol=1e-4, atol=1e-4)


def test_a_seed_decides_the_edit(pipe: DiffusionPipeline):
    first, again, other = (edit(pipe, generator=seed) for seed in (3, 3, 4))
    assert_close(first, again, **EXACT)
    assert_close(edit(pipe, generator=torch.Generator().manual_seed(3)), first, **EXACT)
    assert_close(edit(pipe, generator=[torch.Generator().manual_seed(3)]), first, **EXACT)
    assert not torch.equal(first, other)
    assert not torch.equal(edit(pipe, generator=None), edit(pipe, generator=None))


def test_averaging_over_more_noise_moves_an_edit_towards_its_mean(pipe: DiffusionPipeline):
    seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]
    few, many = (edit(pipe, make_images().repeat(4, 1, 1, 1), generator=seeds, num_averages=count) for count in (1, 6))
    assert many.var(0).mean() < 0.5 * few.var(0).mean()


def test_a_negative_prompt_is_what_guidance_leads_away_from(pipe: DiffusionPipeline):
    assert_close(edit(pipe, negative_prompt=""), edit(pipe), **EXACT)
    assert not torch.allclose(edit(pipe, negative_prompt="a tree"), edit(pipe), atol=1e-3)
    unguided = {"source_guidance_scale": 1.0, "target_guidance_scale": 1.0}
    assert_close(edit(pipe, negative_prompt="a tree", **unguided), edit(pipe, **unguided), **EXACT)


def test_guidance_runs_both_branches_in_one_call(pipe: DiffusionPipeline):
    rows: list[int] = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    edit(pipe, make_images(2), source_guidance_scale=1.0)
    assert rows == [4, 2] * 2


def test_the_schedulers_shift_is_kept(pipe: DiffusionPipeline):
    shifted = edit(pipe)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=1.0)
    assert not torch.allclose(edit(pipe), shifted, atol=1e-3)


def state_of(pipe: DiffusionPipeline) -> dict[str, Any]:
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        "scheduler": {name: str(value) for name, value in vars(pipe.scheduler).items()},
        "progress": dict(pipe._progress_bar_config),
        "random": torch.get_rng_state().tolist(),
        **{f"{name}.repr": repr(part) for name, part in modules.items()},
        **{
            f"{name}.{path}": (part.training, [len(getattr(part, hook)) for hook in hooks], sorted(vars(part)))
            for name, module in modules.items()
            for path, part in module.named_modules()
        },
        **{
            f"{name}.{path}": (value.dtype, value.requires_grad, value.double().sum().item())
            for name, module in modules.items()
            for path, value in module.state_dict(keep_vars=True).items()
        },
    }


@every_pipeline
def test_the_pipeline_is_left_as_it_was(adapted: DiffusionPipeline):
    conditioner_of(adapted).encode_captions([SOURCE])  # text encoders get hooks of transformers at their first call
    adapted.maybe_free_model_hooks()  # as any call does in the end, with a trace of its own
    adapted.scheduler.set_timesteps(3)
    before, weights = copy.deepcopy(state_of(adapted)), adapted.get_softrepa_adapters()
    for scope in ("both", "target", "none"):
        edited = edit(adapted, adapter_scope=scope)
        assert not edited.requires_grad
    assert state_of(adapted) == before
    assert adapted.get_softrepa_adapters() == weights
    assert adapted.scheduler.num_inference_steps == 3


def test_lower_precision_edits_in_it_and_returns_float32(pipe: DiffusionPipeline):
    expected = edit(pipe)
    pipe.transformer.to(torch.bfloat16)
    edited = edit(pipe)
    assert edited.dtype == torch.float32 and pipe.transformer.dtype == torch.bfloat16
    assert 0 < (edited - expected).norm() < 0.2 * expected.norm()
    pipe.to(torch.bfloat16)
    shown = edit(pipe, output_type="pt")
    assert shown.shape == (1, 3, 16, 24) and shown.isfinite().all()


def test_images_come_as_they_are_asked_for(pipe: DiffusionPipeline):
    tensor, array, listed = (edit(pipe, make_images(2), output_type=kind) for kind in ("pt", "np", "pil"))
    assert tensor.shape == (2, 3, 16, 24) and array.shape == (2, 16, 24, 3)
    assert [image.size for image in listed] == [(24, 16)] * 2
    assert_close(torch.from_numpy(array).movedim(-1, 1), tensor)
    assert_close(
        tensor.mul(255).round(), torch.stack([torch.tensor(np.array(p)) for p in listed]).movedim(-1, 1).float()
    )


def test_images_are_taken_in_every_usual_form(pipe: DiffusionPipeline):
    conditioner = conditioner_of(pipe)
    exact = (make_images(2) * 255).round() / 255
    arrays = exact.movedim(1, -1).numpy()
    pil = [Image.fromarray((array * 255).round().astype(np.uint8)) for array in arrays]
    for given in (exact, list(exact), arrays, list(arrays), pil, tuple(pil), [exact[:1], exact[1]]):
        assert_close(read_images(conditioner, given, None, None), 2 * exact - 1)
    transparent = pil[0].convert("RGBA")
    assert_close(edit(pipe, transparent), edit(pipe, pil[0]), **EXACT)
    sideways = pil[0].rotate(90, expand=True)
    sideways.getexif()[0x0112] = 6  # to be turned clockwise
    assert_close(read_images(conditioner, sideways, None, None), 2 * exact[:1] - 1)


def test_images_are_brought_to_a_size_that_the_denoiser_takes(pipe: DiffusionPipeline):
    (image,) = edit(pipe, make_images(1, 18, 27), output_type="pil")
    assert image.size == (24, 16)
    (image,) = edit(pipe, make_images(1, 18, 27), output_type="pil", height=20, width=16)
    assert image.size == (16, 20)
    mixed = [make_images(1, 16, 16)[0], make_images(1, 20, 24)[0]]
    assert len(edit(pipe, mixed, height=16, width=16)) == 2


def test_the_progress_bar_is_the_pipelines_own(pipe: DiffusionPipeline, capsys: pytest.CaptureFixture[str]):
    pipe.set_progress_bar_config(disable=False, desc="editing a cat")
    edit(pipe)
    assert "editing a cat: 100%" in (shown := capsys.readouterr().err) and "2/2" in shown
    pipe.set_progress_bar_config(disable=True)
    edit(pipe)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strength": 0.0}, r"strength, the share of the steps that run, must be above 0, .* got 0.0 of 4 steps"),
        ({"strength": 1.5}, r"at most 1 .* got 1.5 of 4"),
        ({"strength": 0.2}, r"leave a step to run, but got 0.2 of 4"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a positive integer of at most 1,000,000 but got 0"),
        ({"num_inference_steps": 10**30}, "num_inference_steps must be a positive integer of at most 1,000,000 but"),
        ({"num_inference_steps": True}, "num_inference_steps must be a positive integer .* but got True"),
        ({"num_averages": 0}, "num_averages must be a positive integer of at most 1,000,000 but got 0"),
        ({"num_averages": 1.5}, "num_averages must be a positive integer of at most 1,000,000 but got 1.5"),
        ({"height": 0}, "height must be a positive integer .* but got 0"),
        ({"width": 1.5}, "width must be a positive integer .* but got 1.5"),
        ({"strength": None}, "strength, the share of the steps that run, .* but got None of 4 steps"),
        ({"strength": float("inf")}, "strength, the share of the steps that run, .* but got inf of 4 steps"),
        ({"strength": float("nan")}, "strength, the share of the steps that run, .* but got nan of 4 steps"),
        ({"source_guidance_scale": 0.0}, "guidance scales must be positive, .* no guidance, but one is 0.0"),
        ({"source_guidance_scale": None}, "guidance scales must be positive, .* no guidance, but one is None"),
        ({"source_guidance_scale": 10**400}, "guidance scales must be positive, .* but one is a whole number of 1329"),
        ({"generator": 2**64}, r"a seed must be below 2\*\*63 in size, but got 18446744073709551616"),
        ({"negative_prompt": "half a \ud83d"}, "negative_prompt must be text, but .* has a lone surrogate"),
        ({"image": torch.rand(1, 3, 16, 24).to_sparse()}, "images must be dense floating-point arrays"),
        ({"image": torch.rand(1, 3, 16, 24, device="meta")}, "images must be dense floating-point arrays"),
        ({"target_guidance_scale": float("nan")}, "guidance scales must be positive"),
        ({"adapter_scope": "source"}, r"adapter_scope must be one of \('both', 'target', 'none'\) but got 'source'"),
        ({"output_type": "jpg"}, r"output_type must be one of .* but got 'jpg'"),
        ({"generator": [torch.Generator()] * 3}, "a list of one for each image, but there are 3 for 1 images"),
        ({"source": [SOURCE, SOURCE], "target": [TARGET] * 3}, "1 images, 2 source prompts, 3 target prompts"),
        ({"image": torch.rand(2, 3, 16, 24), "target": [TARGET] * 3}, "2 images, 1 source prompts, 3 target"),
        ({"negative_prompt": [""] * 2, "target": [TARGET] * 3}, "3 target prompts, 2 negative prompts"),
        ({"target": []}, "target_prompt must contain at least one prompt, but the list is empty"),
        ({"image": []}, "there must be at least one image, but the list is empty"),
        (
            {"image": [torch.rand(3, 16, 16), torch.rand(3, 16, 24)]},
            r"one size, but have \[\(16, 16\), \(16, 24\)\]; give",
        ),
        (
            {"image": torch.rand(3, 16, 16) * 2 - 1},
            r"values of images must be in \[0, 1\]; convert those in \[-1, 1\] by \(pixels \+ 1\) / 2",
        ),
        (
            {"image": torch.zeros(3, 16, 16, dtype=torch.uint8)},
            r"floating-point arrays .* in \[0, 1\].* torch.uint8 of shape",
        ),
        ({"image": torch.rand(1, 16, 16)}, r"floating-point arrays .* in \[0, 1\].* of shape \(1, 16, 16\)"),
        ({"image": np.zeros((16, 16))}, r"floating-point arrays .* in \[0, 1\].* of shape \(16, 16\)"),
        ({"image": torch.rand(3, 16, 2)}, "multiples of 4 px .* but are 16 x 0"),
        ({"height": 15}, "multiples of 4 px .* but are 15 x 24"),
    ],
)
def test_what_cannot_be_edited_is_refused_before_anything_runs(
    pipe: DiffusionPipeline, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
):
    for module in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_3):
        monkeypatch.setattr(module, "forward", lambda *_, **__: pytest.fail("a model has been called"))
    monkeypatch.setattr(pipe.vae, "encode", pipe.vae.forward)
    with pytest.raises(ValueError, match=message):
        edit(pipe, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": 3}, "source_prompt must be a string or a list of strings, but is 3"),
        ({"generator": "x"}, "generator must be a seed, a torch.Generator or a list of them, but is 'x'"),
        ({"generator": [1]}, r"generator must be a seed, a torch.Generator or a list of them, but is \[1\]"),
        ({"target": [None]}, "target_prompt must be a string or a list of strings"),
        (
            {"image": "cat.png"},
            r"must be PIL images, arrays or tensors, all of one type, but are \['str'\]; .*load_image",
        ),
        (
            {"image": [Image.new("RGB", (16, 16)), torch.rand(3, 16, 16)]},
            r"all of one type, but are \['Image', 'Tensor'\]",
        ),
    ],
)
def test_what_is_of_a_wrong_type_is_refused(pipe: DiffusionPipeline, change: dict[str, Any], message: str):
    with pytest.raises(TypeError, match=message):
        edit(pipe, **change)


@pytest.mark.parametrize("make", [tiny.sd15_pipeline, tiny.sdxl_pipeline])
def test_a_denoiser_that_did_not_learn_flow_matching_is_refused(make: Any):
    with pytest.raises(ValueError, match=r"needs a denoiser trained by flow matching, .* epsilon; use invert and reg"):
        flow_edit(make(), make_images(), SOURCE, TARGET)


def test_a_distilled_denoiser_reads_no_negative_prompt():
    with pytest.raises(ValueError, match="FluxTransformer2DModel is guidance-distilled and takes no negative prompt"):
        edit(tiny.flux_pipeline(guidance_embeds=True), negative_prompt="a tree")


def test_a_scheduler_of_second_order_is_refused(pipe: DiffusionPipeline):
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    with pytest.raises(
        ValueError, match="levels that decrease with every step, but FlowMatchHeunDiscreteScheduler makes"
    ):
        edit(pipe)


def test_every_argument_is_documented():
    for function in (editing.flow_edit, editing.invert, editing.regenerate):
        documented = inspect.getdoc(function).split("Args:")[1].split("Returns:")[0]
        missing = [name for name in inspect.signature(function).parameters if f"\n    {name}: " not in documented]
        assert not missing, f"{function.__name__} does not describe {missing}"
