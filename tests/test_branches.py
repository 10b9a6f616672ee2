"""Tokens that join only the positive branch of classifier-free guidance."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusionPAGPipeline
from torch import Tensor, nn

import tiny
import zoo_pipelines
from diffusers_softrepa import (
    ContrastiveFlowMatchingArguments,
    SoftREPAConfig,
    evaluate,
    flow_edit,
    invert,
    load_softrepa,
    regenerate,
    softrepa_disabled,
)
from diffusers_softrepa.adapter import adapters_of
from diffusers_softrepa.branches import select_rows
from diffusers_softrepa.pipeline import softrepa_left_as_found
from diffusers_softrepa.training.preparation import choose_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

GUIDED = {**zoo_pipelines.ELDERS, **{name: zoo_pipelines.ZOO[name] for name in zoo_pipelines.ZOO if name != "flux2"}}
every_pipeline = pytest.mark.parametrize("name", GUIDED)
PROMPTS = ["a red cat", "two dogs"]


def denoiser_of(pipe: Any) -> nn.Module:
    return pipe.components.get("unet") or pipe.transformer


def adapted(name: str, *, weight: Any = 1.0, branch: str = "positive") -> Any:
    torch.manual_seed(0)
    pipe = GUIDED[name].make()
    config = SoftREPAConfig.for_denoiser(denoiser_of(pipe), num_timestep_bins=10)
    generator = torch.Generator().manual_seed(7)
    load_softrepa(pipe, {k: torch.randn(v, generator=generator) for k, v in config.shapes.items()}, config=config)
    pipe.set_softrepa("softrepa", weight, guidance_branch=branch)
    return pipe


def draw(name: str, pipe: Any, prompts: Any = PROMPTS, **kwargs: Any) -> Tensor:
    several = not isinstance(prompts, str)
    settings = {**GUIDED[name].guided, "negative_prompt": ["no trees"] * 2 if several else "no trees", **kwargs}
    if name == "flux2-klein":  # its negative prompt is the empty one
        del settings["negative_prompt"]
    return GUIDED[name].generate(pipe, prompts, **settings)


def recorded(denoiser: nn.Module, run: Callable[[], Any]) -> list[tuple[tuple[Any, ...], dict[str, Any], Any]]:
    """Returns arguments and output of every call that `run` makes of a denoiser."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
    hook = denoiser.register_forward_hook(lambda _, args, kw, out: calls.append((args, kw, out)), with_kwargs=True)
    try:
        run()
    finally:
        hook.remove()
    return calls


def rows(output: Any) -> list[Tensor]:
    return list(output[0])


# What each pipeline does with the two branches: the halves of one batch, negative first unless said, or two calls.
POSITIVE_FIRST, TWO_CALLS = {"zimage"}, {"flux", "flux2-klein", "qwen", "chroma"}


@every_pipeline
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_negative_prediction_is_that_of_the_base_and_the_positive_one_that_of_the_adapter(
    name: str, weight: float
):
    pipe = adapted(name, weight=weight)
    denoiser = denoiser_of(pipe)
    calls = recorded(denoiser, lambda: draw(name, pipe))
    pipe.set_softrepa("softrepa", weight)
    for index, (args, kwargs, found) in enumerate(calls):
        with torch.no_grad():
            both = rows(denoiser(*args, **kwargs))
            with softrepa_disabled(pipe):
                base = rows(denoiser(*args, **kwargs))
        half = len(both) // 2
        if name in TWO_CALLS:
            expected = both if index % 2 == 0 else base
        elif name in POSITIVE_FIRST:
            expected = both[:half] + base[half:]
        else:
            expected = base[:half] + both[half:]
        assert all(map(torch.equal, rows(found), expected)), index
        assert not all(map(torch.equal, both, base))


@every_pipeline
def test_without_guidance_every_row_gets_the_tokens(name: str):
    pipe = adapted(name)
    settings = {**GUIDED[name].unguided, "negative_prompt": None}
    found = draw(name, pipe, **settings)
    pipe.set_softrepa("softrepa")
    assert torch.equal(found, draw(name, pipe, **settings))


def test_a_pipeline_without_a_negative_prompt_has_the_positive_branch_alone():
    torch.manual_seed(0)
    entry = zoo_pipelines.ZOO["flux2"]
    pipe = entry.make()
    pipe.add_softrepa(SoftREPAConfig.for_denoiser(pipe.transformer, init_std=1.0))
    both = entry.generate(pipe, "a red cat")
    pipe.set_softrepa("softrepa", guidance_branch="positive")
    assert torch.equal(entry.generate(pipe, "a red cat"), both)


@pytest.mark.parametrize("name", ["sd3", "sdxl", "qwen"])
def test_both_is_the_default_and_comes_back_exactly(name: str):
    pipe = adapted(name, branch="both")
    before, own = draw(name, pipe), dict(vars(denoiser_of(pipe)))
    pipe.set_softrepa("softrepa", guidance_branch="positive")
    positive = draw(name, pipe)
    assert not torch.equal(positive, before)
    pipe.disable_softrepa()
    base = draw(name, pipe)
    pipe.enable_softrepa()
    assert torch.equal(draw(name, pipe), positive), "enabling keeps the choice"
    with softrepa_left_as_found(pipe):
        pipe.set_softrepa("softrepa", 0.5)
    assert torch.equal(draw(name, pipe), positive)
    pipe.set_softrepa("softrepa")
    assert torch.equal(draw(name, pipe), before)
    assert set(vars(denoiser_of(pipe))) == set(own)
    pipe.set_softrepa("softrepa", guidance_branch="positive")
    pipe.unload_softrepa()
    assert torch.equal(draw(name, pipe), base)
    assert "cache_context" not in vars(denoiser_of(pipe))


@pytest.mark.parametrize("name", ["sd3", "qwen"])
def test_a_new_adapter_takes_part_in_both_branches(name: str):
    pipe = adapted(name)
    pipe.add_softrepa(adapter_name="other")
    assert adapters_of(denoiser_of(pipe)).state.guidance_branch == "both"


@pytest.mark.parametrize("wrong", ["negative", "", None, True, ["positive"], 1])
def test_another_branch_is_refused_before_anything_changes(wrong: Any):
    pipe = adapted("sd3")
    state = adapters_of(pipe.transformer).state
    with pytest.raises(ValueError, match='guidance_branch must be "both" or "positive", but is'):
        pipe.set_softrepa("softrepa", 0.5, guidance_branch=wrong)
    assert adapters_of(pipe.transformer).state is state


@pytest.mark.parametrize("family", tiny.FAMILIES, ids=lambda family: family.name)
def test_a_denoiser_alone_has_no_guidance(family: tiny.Family):
    denoiser = family.denoiser()
    denoiser.add_softrepa()
    denoiser.set_softrepa("softrepa", guidance_branch="positive")
    with pytest.raises(ValueError, match="no pipeline calls it, and a denoiser alone has no guidance"):
        family.call(denoiser, family.inputs(2), 500.0)
    denoiser.disable_softrepa()
    family.call(denoiser, family.inputs(2), 500.0)


def alone(rows: int) -> tuple[Any, Callable[[], Tensor], Tensor, Tensor]:
    """Returns a denoiser with tokens in the positive branch, a call of it, and its outputs without and with them."""
    family = tiny.FAMILIES[3]
    denoiser, inputs = family.denoiser(), family.inputs(rows)

    def call() -> Tensor:
        return family.call(denoiser, inputs, 500.0)

    base = call()
    denoiser.add_softrepa(SoftREPAConfig.for_denoiser(denoiser, init_std=1.0))
    with_tokens = call()
    denoiser.set_softrepa("softrepa", guidance_branch="positive")
    return denoiser, call, base, with_tokens


def test_a_context_names_the_branch_of_a_denoiser_alone():
    denoiser, call, base, with_tokens = alone(rows=2)
    for name, expected in {"cond": with_tokens, "uncond": base, "pred_cond": with_tokens, "pred_uncond": base}.items():
        with denoiser.cache_context(name):
            assert torch.equal(call(), expected)
    with denoiser.cache_context("cond_uncond"), pytest.raises(ValueError, match="no pipeline calls it"):
        call()
    with pytest.raises(RuntimeError, match="mine"), denoiser.cache_context("cond"):
        raise RuntimeError("mine")
    with pytest.raises(ValueError, match="no pipeline calls it"):
        call()


def test_the_pipeline_that_counts_is_the_one_that_runs():
    """Another pipeline around the same denoiser, with a guidance scale of its own from an earlier call."""
    pipe = adapted("sd3")
    guided = draw("sd3", pipe)
    other = StableDiffusion3Img2ImgPipeline(**pipe.components)
    draw("sd3", pipe, guidance_scale=1.0, negative_prompt=None)
    image = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))

    def redraw() -> Tensor:
        return other(
            PROMPTS, image=image, negative_prompt="no trees", num_inference_steps=2, max_sequence_length=24,
            generator=torch.Generator().manual_seed(0), output_type="latent",
        ).images  # fmt: skip

    found = redraw()
    pipe.set_softrepa("softrepa")
    assert not torch.equal(found, redraw())
    pipe.set_softrepa("softrepa", guidance_branch="positive")
    assert torch.equal(found, redraw())
    assert torch.equal(guided, draw("sd3", pipe))


@pytest.mark.parametrize("name", ["sd15", "sd3", "pixart-sigma"])
def test_two_equal_texts_cannot_be_told_apart_in_one_batch(name: str):
    pipe = adapted(name)
    with pytest.raises(ValueError, match="cannot be told from the negative one"):
        draw(name, pipe, "a cat", negative_prompt="a cat")
    draw(name, pipe, ["a cat", "a dog"], negative_prompt=["a cat"] * 2)


@pytest.mark.parametrize("name", ["flux", "qwen", "chroma"])
def test_two_equal_texts_in_two_calls_are_two_calls(name: str):
    pipe = adapted(name)
    found = draw(name, pipe, "a cat", negative_prompt="a cat")
    pipe.set_softrepa("softrepa")
    assert not torch.equal(found, draw(name, pipe, "a cat", negative_prompt="a cat"))


@pytest.mark.parametrize("name", ["flux", "qwen"])
def test_one_negative_prompt_for_many(name: str):
    """These two pass the row of one negative prompt beside the latents of all."""
    pipe = adapted(name)
    found = draw(name, pipe, ["no trees", "a cat", "two dogs"], negative_prompt="no trees")
    assert torch.isfinite(found).all()


def test_training_on_sets_both_branches():
    pipe = adapted("sd3")
    pipe.softrepa_parameters()["tokens"].requires_grad_()
    assert choose_adapter(pipe, ContrastiveFlowMatchingArguments(), None, None, num_banks=1) == "softrepa"
    assert adapters_of(pipe.transformer).state.guidance_branch == "both"


def test_editing_with_one_branch_is_refused_before_a_denoiser_call():
    pipe = adapted("sd3")
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the denoiser was called"))
    short = {"num_inference_steps": 2, "max_sequence_length": 24}
    image = torch.rand(1, 3, 16, 24)
    edits = {
        "flow_edit": lambda: flow_edit(pipe, image, "a cat", "a dog", **short),
        "invert": lambda: invert(pipe, image, "a cat", **short),
        "regenerate": lambda: regenerate(pipe, torch.rand(1, 16, 2, 3), "a cat", guidance_scale=2.0, **short),
    }
    for edit in edits.values():
        with pytest.raises(ValueError, match=r"\['softrepa'\] were set with guidance_branch='positive'; call set_"):
            edit()


def test_editing_without_the_adapter_takes_any_branch():
    pipe = adapted("sd3")
    short = {"num_inference_steps": 2, "max_sequence_length": 24, "output_type": "latent", "generator": 0}
    image = torch.rand(1, 3, 16, 24)
    found = flow_edit(pipe, image, "a cat", "a dog", adapter_scope="none", **short)
    pipe.unload_softrepa()
    assert torch.equal(found, flow_edit(pipe, image, "a cat", "a dog", **short))


def test_evaluating_sets_both_branches_and_puts_the_choice_back(tmp_path: Path):
    pipe = adapted("sd3")
    settings = {"height": 16, "width": 16, "num_inference_steps": 2, "max_sequence_length": 24, "guidance_scale": 3.0}

    def images(name: str) -> list[bytes]:
        evaluate(pipe, ["a cat"], [], [None, "softrepa"], output_dir=tmp_path / name, **settings)
        return [path.read_bytes() for path in sorted((tmp_path / name).rglob("images/*/*.png"))]

    positive = images("positive")
    assert adapters_of(pipe.transformer).state.guidance_branch == "positive"
    pipe.set_softrepa("softrepa")
    assert images("both") == positive


@pytest.mark.slow
def test_a_pipeline_whose_denoiser_is_compiled_draws_the_same():
    pipe = adapted("sd3")
    with torch.no_grad():
        expected = draw("sd3", pipe)
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        assert torch.equal(draw("sd3", pipe), expected)


def test_perturbed_attention_guidance_has_a_third_part():
    pipe = adapted("sd15")
    pag = StableDiffusionPAGPipeline(**pipe.components, pag_applied_layers=["mid"], requires_safety_checker=False)
    denoiser = pipe.unet
    calls = recorded(denoiser, lambda: tiny.generate(pag, negative_prompt="no", guidance_scale=3.0, pag_scale=3.0))
    assert calls
    assert all(len(rows(output)) == 3 for _, _, output in calls)


def test_two_threads_name_their_own_contexts():
    denoiser, call, base, with_tokens = alone(rows=1)
    barrier, found = threading.Barrier(2), {}

    def run(name: str) -> None:
        with torch.no_grad(), denoiser.cache_context(name):
            barrier.wait(10)
            found[name] = call()

    threads = [threading.Thread(target=run, args=(name,)) for name in ("cond", "uncond")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert torch.equal(found["cond"], with_tokens)
    assert torch.equal(found["uncond"], base)


def test_rows_that_a_block_sees_as_frames_are_selected_together():
    negative = torch.tensor([True, False])
    base, adapted = torch.zeros(6, 2), torch.ones(6, 2)
    found = select_rows(negative, (base, [base], None), (adapted, [adapted], None))
    assert found[0][:, 0].tolist() == found[1][0][:, 1].tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="needs blocks with a row for each of the 2 texts, but a block returned 3"):
        select_rows(negative, torch.zeros(3), torch.ones(3))
