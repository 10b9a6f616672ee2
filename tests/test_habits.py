"""Laws of what trainers have: caches without encoders, empty prompts, min-SNR, resolutions, optimizers, offloading."""

import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import DDPMScheduler
from diffusers.hooks import apply_group_offloading
from diffusers.training_utils import compute_snr
from torch.testing import assert_close

from diffusers_softrepa.checkpoint import load_checkpoint
from diffusers_softrepa.noising import Noising
from diffusers_softrepa.objectives import AGSM, Contrastive, Denoising, SoftRank
from diffusers_softrepa.training import preparation
from diffusers_softrepa.training.arguments import ContrastiveFlowMatchingArguments
from diffusers_softrepa.training.data.dataset import open_examples
from diffusers_softrepa.training.data.image import Framing
from diffusers_softrepa.training.data.loader import PairLoader
from diffusers_softrepa.training.optimization import make_average, make_optimizer
from diffusers_softrepa.training.step.collate import min_snr_weights
from diffusers_softrepa.training.step.engine import PairBatch, PairEngine
from diffusers_softrepa.training.trainer import ContrastiveFlowMatchingTrainer
from training_runs import QUICK, pipeline, rows, trainer

SHORT = {"max_steps": 2, "save_steps": 2, "eval_steps": 2}


def tokens(folder: Path) -> torch.Tensor:
    return load_checkpoint(folder)[1]["tokens"]


def train(pipe: Any, folder: Path, **settings: Any) -> torch.Tensor:
    args = ContrastiveFlowMatchingArguments(output_dir=str(folder), **QUICK | SHORT | settings)
    ContrastiveFlowMatchingTrainer(pipe, args, rows(), rows(4, seed=1)).train()
    return tokens(folder)


def without_encoders() -> Any:
    pipe = pipeline()
    for name in [name for name in pipe.components if name.startswith(("text_encoder", "tokenizer"))]:
        setattr(pipe, name, None)
    return pipe


def test_a_run_without_text_encoders_works_from_the_cache(tmp_path: Path):
    settings = {"cache_text": True, "cache_dir": str(tmp_path / "cache"), "proportion_empty_prompts": 0.3}
    expected = train(pipeline(), tmp_path / "one", **settings)
    assert torch.equal(train(without_encoders(), tmp_path / "two", **settings), expected)
    with pytest.raises(ValueError, match=r"lacks 8 captions, such as .*load the pipeline with its text encoders once"):
        args = ContrastiveFlowMatchingArguments(output_dir=str(tmp_path / "three"), **QUICK | settings)
        ContrastiveFlowMatchingTrainer(without_encoders(), args, rows(16), None).train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "has no tokenizer, .*set cache_text and the cache_dir of a run"),
        ({"cache_text": True}, "must hold one cache of captions .* but has 0"),
        ({"cache_text": True, "validation_prompts": ["a cat"]}, "leave out validation_prompts"),
    ],
)
def test_a_run_without_text_encoders_and_cache_is_refused_at_once(settings: Any, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        train(without_encoders(), tmp_path, **settings)


def test_text_encoders_stay_off_the_device_but_while_captions_are_encoded(tmp_path: Path, monkeypatch: Any):
    placed: list[str] = []
    place = preparation._place

    def record(pipe: Any, names: Any, device: Any) -> None:
        placed.extend(names := list(names))
        place(pipe, names, device)

    monkeypatch.setattr(preparation, "_place", record)
    run = trainer(tmp_path / "one", cache_text=True, cache_dir=str(tmp_path / "cache"), **SHORT)
    with preparation.prepared(run.pipeline, run.args, run.accelerator.device):
        assert "transformer" in placed and not any(name.startswith("text_encoder") for name in placed)
        run.encoder.fill(run.loader, run.accelerator, eval_examples=run.eval_examples)
        assert sum(name.startswith("text_encoder") for name in placed) == 6  # there and back
        run.encoder.encode_captions(list(run.eval_examples.captions()))
        assert sum(name.startswith("text_encoder") for name in placed) == 6
    assert sum(name.startswith("text_encoder") for name in placed) == 9  # with the rest, to sample


def test_a_step_costs_no_more_the_longer_a_caption_is(tmp_path: Path):
    """Tokenizers go through the whole text at each step, so what they get is what a caption costs."""
    given: dict[int, int] = {}
    for length in (20_000, 40_000):
        long = [{**row, "text": (f"{number} " + length * "cat ")[:length]} for number, row in enumerate(rows())]
        run = trainer(tmp_path / str(length), long, eval_steps=9, save_steps=9, max_steps=1)
        encode, given[length] = run.conditioner.encode_captions, 0

        def record(captions: Any, length: int = length, encode: Any = encode) -> Any:
            given[length] += sum(map(len, captions))
            return encode(captions)

        run.conditioner.encode_captions = record
        run.train()
    assert given[20_000] == given[40_000] > 0


def test_a_caption_that_is_cut_has_the_conditions_of_the_whole(tmp_path: Path):
    run, long = trainer(tmp_path, max_sequence_length=512), "".join(f"{number} cats " for number in range(3000))
    cut = open_examples([{**rows(1)[0], "text": long}])[0].captions[0]
    assert len(cut) < len(long.strip()) and long.startswith(cut)
    assert_close(run.encoder.encode_captions([cut]), run.encoder.encode_captions([long]), rtol=0, atol=0)


def test_empty_prompts_take_their_share_in_training_and_none_in_evaluation(tmp_path: Path):
    loader = PairLoader(open_examples(rows(64)), Framing(16, multiple_of=16), batch_size=1, empty_prompts=0.25)
    epochs = [[example.caption for batch in loader for example in batch] for _ in range(4)]
    share = sum(epoch.count("") for epoch in epochs) / 256
    assert 0.15 < share < 0.35
    assert len({tuple(text == "" for text in epoch) for epoch in epochs}) == 4
    run = trainer(tmp_path, proportion_empty_prompts=0.99)
    assert all(example.caption for batch in run.get_eval_dataloader() for example in batch)
    assert not any(example.caption for example in next(iter(run.loader)))


def test_an_epoch_has_every_image_once_in_each_resolution():
    framing = Framing(32, aspect_buckets=True, multiple_of=16, further_resolutions=(64,))
    loader = PairLoader(open_examples(rows(12)), framing, batch_size=2, num_workers=0)
    found = [(example.image_id, example.size, example.caption) for batch in loader for example in batch]
    assert len(found) == 24 == 2 * len(loader) == 2 * len({identity for identity, _, _ in found})
    for identity in {identity for identity, _, _ in found}:
        areas = sorted(size[0] * size[1] for other, size, _ in found if other == identity)
        assert areas[0] <= 1280 < 3000 <= areas[1]
    assert all(len({example.size for example in batch}) == 1 for batch in loader)


def test_cached_latents_of_several_resolutions_train_like_those_of_one(tmp_path: Path):
    settings = {**SHORT, "num_eval": 12}
    run = trainer(
        tmp_path, data="buckets", further_resolutions=[32], aspect_buckets=True, cache_latents=True, **settings
    )
    assert run.train().finished


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_diffusers_scripts(prediction: str):
    scheduler = DDPMScheduler(prediction_type=prediction)
    timestep = torch.tensor([0, 10, 300, 999])
    snr = compute_snr(scheduler, timestep)
    expected = torch.stack([snr, 5 * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    expected = expected / (snr + 1 if prediction == "v_prediction" else snr)
    assert_close(min_snr_weights(Noising.from_scheduler(scheduler), timestep, 5.0), expected)


@pytest.mark.parametrize("objective", [Denoising(), Contrastive(logits="linear"), SoftRank(), AGSM()])
@pytest.mark.parametrize("chunk", [2, 16])
def test_row_weights_weigh_the_mean_over_images_exactly(objective: Any, chunk: int):
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(2, 3, generator=generator))

    def predict(noisy: torch.Tensor, _timestep: Any, conditions: Any) -> torch.Tensor:
        return noisy * conditions["text"] * weight[0] + weight[1]

    def step(row_weights: torch.Tensor | None, kept: slice = slice(None)) -> Any:
        b = 4
        batch = PairBatch(
            noisy_latents=noisy[kept],
            target=target[kept],
            timestep=torch.zeros(b)[kept],
            conditions={"text": text},
            positive=torch.arange(b)[kept],
            candidates=torch.ones(b, b, dtype=torch.bool)[kept],
            row_weights=row_weights,
        )
        return PairEngine(predict, objective, [weight], pair_chunk_size=chunk).step(batch)

    noisy, target, text = (torch.randn(4, 3, generator=generator) for _ in range(3))
    share = torch.tensor([0.5, 2.0, 0.0, 1.0])
    each = [step(None, slice(row, row + 1)) for row in range(4)]
    found = step(share)
    assert_close(found.loss, sum(s * one.loss for s, one in zip(share, each, strict=True)) / 4)
    expected = sum(s * one.gradients[0] for s, one in zip(share, each, strict=True)) / 4
    assert_close(found.gradients[0], expected)


def test_min_snr_is_for_models_that_predict_noise(tmp_path: Path):
    with pytest.raises(ValueError, match="snr_gamma weighs the timesteps of models that predict noise or v"):
        trainer(tmp_path, snr_gamma=5.0)
    assert trainer(tmp_path, family="sd15", snr_gamma=5.0, resolution=16, **SHORT).train().finished


@pytest.mark.parametrize(
    "offload",
    [
        lambda denoiser, folder: apply_group_offloading(
            denoiser, torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level"
        ),
        lambda denoiser, folder: apply_group_offloading(
            denoiser,
            torch.device("cpu"),
            torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            offload_to_disk_path=str(folder / "weights"),
        ),
        lambda denoiser, folder: cpu_offload(denoiser, execution_device=torch.device("cpu"), offload_buffers=True),
    ],
    ids=["group by leaf", "group by block, on the disk", "sequential"],
)
def test_an_offloaded_base_trains_the_same_tokens(offload: Any, tmp_path: Path):
    expected = train(pipeline(), tmp_path / "one")
    pipe = pipeline()
    try:
        offload(pipe.transformer, tmp_path)
        found = train(pipe, tmp_path / "two")
    except (AttributeError, RuntimeError) as error:
        told = "'NoneType' object has no attribute 'type'", "Cannot access accelerator device when none is available"
        if torch.accelerator.is_available() or not any(text in str(error) for text in told):
            raise
        pytest.skip(f"group offloading of this diffusers needs an accelerator: {error}")
    assert_close(found, expected)


def test_a_compiled_base_trains_the_same_tokens_and_is_not_compiled_afterwards(tmp_path: Path):
    expected = train(pipeline(), tmp_path / "one")
    pipe = pipeline()
    torch._dynamo.reset()
    compiled = train(pipe, tmp_path / "two", torch_compile=True, torch_compile_backend="eager")
    torch._dynamo.reset()
    assert_close(compiled, expected)
    assert all(part._compiled_call_impl is None for part in pipe.transformer.modules())


def test_text_encoders_in_half_precision_get_that_of_the_denoiser(tmp_path: Path):
    """As `from_pretrained` loads them without a dtype: transformers in the stored precision, diffusers in float32."""
    pipe = pipeline()
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        getattr(pipe, name).half()
    train(pipe, tmp_path, validation_prompts=["a cat"], num_validation_inference_steps=1)
    assert {part.dtype for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_3)} == {torch.float32}
    assert len(list((tmp_path / "validation").glob("*.png"))) == 2


def test_a_resolution_beyond_the_position_embeddings_names_the_setting(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"images of up to \d+ px a side, but resolution=4096 makes .* smaller resolution"
    ):
        trainer(tmp_path, resolution=4096)


class AveragingSGD(torch.optim.SGD):
    """A schedule-free optimizer in small: trains at one point, and has another in `eval`."""

    def eval(self) -> None:
        self.param_groups[0]["params"][0].data += 1

    def train(self) -> None:
        if self.state.get("began"):
            self.param_groups[0]["params"][0].data -= 1
        self.state["began"] = True


def test_optimizers_have_short_names_where_their_package_is_installed(monkeypatch: Any):
    parameter = torch.nn.Parameter(torch.zeros(3))
    for name, package in (
        ("prodigy", "prodigyopt"),
        ("schedule-free", "schedulefree"),
        ("adamw_8bit", "bitsandbytes"),
    ):
        for module in (package, f"{package}.optim"):
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=f"needs a package that is not installed .* pip install {package}"):
            make_optimizer(ContrastiveFlowMatchingArguments(optim=name), [parameter])
    monkeypatch.setitem(sys.modules, "prodigyopt", types.SimpleNamespace(Prodigy=torch.optim.Adam))
    assert type(make_optimizer(ContrastiveFlowMatchingArguments(optim="Prodigy"), [parameter])) is torch.optim.Adam


def test_the_average_of_a_schedule_free_optimizer_is_what_is_saved(monkeypatch: Any):
    monkeypatch.setitem(sys.modules, "schedulefree", types.SimpleNamespace(AdamWScheduleFree=AveragingSGD))
    parameter = torch.nn.Parameter(torch.zeros(3))
    args = ContrastiveFlowMatchingArguments(optim="schedule_free_adamw", optim_args="{}")
    average = make_average(args, make_optimizer(args, [parameter]), [parameter])
    assert average is not None
    with average.in_place():
        assert_close(parameter.data, torch.ones(3))
    assert_close(parameter.data, torch.zeros(3))
    average.make_final()
    assert_close(parameter.data, torch.ones(3))
    with pytest.raises(ValueError, match="averages the tokens itself; leave out ema_decay"):
        make_optimizer(ContrastiveFlowMatchingArguments(optim="schedule_free", ema_decay=0.9), [parameter])


# Packages that are not among the test requirements; each test says which one it misses.

OPTIMIZERS = {
    "prodigy": "prodigyopt",
    "schedule_free": "schedulefree",
    "schedule_free_sgd": "schedulefree",
    "adamw_8bit": "bitsandbytes",
    "lion_8bit": "bitsandbytes",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_an_optimizer_of_another_package_trains_and_resumes_bit_by_bit(optim: str, tmp_path: Path):
    pytest.importorskip(OPTIMIZERS[optim])
    settings = {
        **{"optim": optim, "optim_args": "{}", "lr_scheduler": "constant", "save_steps": 1},
        "learning_rate": 1.0 if optim == "prodigy" else 0.01,
    }
    whole = train(pipeline(), tmp_path / "whole", **settings)
    begun = train(pipeline(), tmp_path / "half", **settings | {"max_steps": 1, "eval_steps": 1})  # evaluates at step 1
    resumed = train(pipeline(), tmp_path / "half", **settings, resume_from_checkpoint="latest")
    assert torch.equal(resumed, whole) and not torch.equal(begun, whole)


def int8_weights(denoiser: torch.nn.Module) -> None:
    package = pytest.importorskip("torchao.quantization")
    package.quantize_(denoiser, package.Int8WeightOnlyConfig())


def quanto_int8(denoiser: torch.nn.Module) -> None:
    package = pytest.importorskip("optimum.quanto")
    package.quantize(denoiser, weights=package.qint8)
    package.freeze(denoiser)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantise", [int8_weights, quanto_int8])
@pytest.mark.parametrize("how", [{}, {"mixed_precision": "bf16"}, {"gradient_checkpointing": True}])
def test_a_quantised_base_trains_resumes_and_stays_as_it_was(quantise: Any, how: dict[str, Any], tmp_path: Path):
    settings = {"save_steps": 1, "eval_steps": 9, **how}
    pipe = pipeline()
    quantise(pipe.transformer)
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    args = ContrastiveFlowMatchingArguments(output_dir=str(tmp_path / "whole"), **QUICK | SHORT | settings)
    run = ContrastiveFlowMatchingTrainer(pipe, args, rows(), rows(4, seed=1))
    fresh = run.parameters[0].detach().clone()
    run.train()
    assert not torch.equal(run.parameters[0], fresh)
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses and all(math.isfinite(loss) for loss in losses)
    for name, value in pipe.transformer.state_dict().items():
        assert plain(value).equal(plain(before[name]).to(plain(value).dtype)), name
    for steps, further in ((1, {}), (2, {"resume_from_checkpoint": "latest"})):
        pipe = pipeline()
        quantise(pipe.transformer)
        resumed = train(pipe, tmp_path / "half", **settings | {"max_steps": steps} | further)
    assert torch.equal(resumed, tokens(tmp_path / "whole"))


def plain(value: torch.Tensor) -> torch.Tensor:
    return value.dequantize() if hasattr(value, "dequantize") and type(value) is not torch.Tensor else value


@pytest.mark.filterwarnings("ignore")
def test_a_base_with_quantised_activations_is_refused(tmp_path: Path):
    package = pytest.importorskip("torchao.quantization")
    pipe = pipeline()
    package.quantize_(pipe.transformer, package.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(ValueError, match=r"training needs gradients .* passes none; quantise the weights alone"):
        train(pipe, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_base_that_is_group_offloaded_trains_the_same_tokens(tmp_path: Path):
    found = []
    for name in ("plain", "offloaded"):
        pipe = pipeline()
        int8_weights(pipe.transformer)
        if name == "offloaded":
            cpu = torch.device("cpu")
            apply_group_offloading(pipe.transformer, cpu, cpu, offload_type="leaf_level")
        found.append(train(pipe, tmp_path / name))
    assert_close(*found)
