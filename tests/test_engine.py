"""The pairwise engine: the published numbers and exact gradients at every chunk size."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from diffusers_softrepa import softrepa_parameters
from diffusers_softrepa.noising import Noising
from diffusers_softrepa.objectives import AGSM, Contrastive, Denoising, Objective, SoftRank
from diffusers_softrepa.pairs import candidate_mask, pair_errors
from diffusers_softrepa.training.step.engine import PairBatch, PairEngine
from golden import NAMES, Golden, golden

CHUNKS = (1, 2, 3, 5, 16, None)
OBJECTIVES: tuple[Objective, ...] = (
    Contrastive(),
    Contrastive(logits="linear", temperature=0.3, denoising_weight=10.0),
    SoftRank(),
    Denoising(),
)


def golden_batch(g: Golden) -> tuple[Callable[..., Tensor], PairBatch]:
    """Returns the reference's training batch and the denoiser call on it."""
    t = {key.removeprefix("train."): value for key, value in g.tensors.items() if key.startswith("train.")}
    conditions = {"encoder_hidden_states": t["prompt_embeds"]}
    if g.name == "sd3":
        noising, conditions["pooled"] = Noising("flow"), t["pooled"]
    else:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        noising = Noising("epsilon", torch.cumprod(1 - betas, dim=0))
    if g.name == "sdxl":
        conditions["text_embeds"] = t["text_embeds"]
    rows = len(t["latents"])
    noise, timestep = t["noise"].expand_as(t["latents"]), t["timestep"].expand(rows)

    def predict(noisy_latents: Tensor, timestep: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        text = {"encoder_hidden_states": conditions["encoder_hidden_states"], "return_dict": False}
        if g.name == "sd3":
            text["pooled_projections"] = conditions["pooled"]
            return g.denoiser(hidden_states=noisy_latents, timestep=timestep, **text)[0]
        if g.name == "sdxl":
            time_ids = g.tensors["in.time_ids"][:1].expand(len(timestep), -1)
            text["added_cond_kwargs"] = {"text_embeds": conditions["text_embeds"], "time_ids": time_ids}
        return g.denoiser(noisy_latents, timestep, **text)[0]

    positive = torch.arange(rows)
    return predict, PairBatch(
        noisy_latents=noising.noisy_latents(t["latents"], noise, timestep),
        target=noising.target(t["latents"], noise, timestep),
        timestep=timestep,
        conditions=conditions,
        positive=positive,
        candidates=candidate_mask(positive, positive),
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_match_the_reference_numbers(name: str, chunk: int | None, checkpointing: bool):
    g = golden(name)
    g.load_adapter()
    if checkpointing:
        g.denoiser.train()
        g.denoiser.enable_gradient_checkpointing()
    predict, batch = golden_batch(g)
    parameters = softrepa_parameters(g.denoiser)
    for parameter in parameters.values():
        parameter.requires_grad_()
    for weight in (0, 10):
        engine = PairEngine(
            predict, Contrastive(denoising_weight=float(weight)), list(parameters.values()), pair_chunk_size=chunk
        )
        step = engine.step(batch)
        assert_close(step.errors, g.tensors["train.errors"], rtol=0, atol=1e-5)
        assert_close(step.loss.reshape(1), g.tensors[f"train.dweight{weight}.loss"], rtol=1e-5, atol=1e-5)
        for key, gradient in zip(parameters, step.gradients, strict=True):
            expected = g.tensors[f"train.dweight{weight}.grad.{key}"].reshape(gradient.shape)
            assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 6, None])
def test_three_adamw_steps_match_the_reference_numbers(chunk: int | None):
    g = golden("sd3")
    g.load_adapter()
    predict, batch = golden_batch(g)
    parameters = softrepa_parameters(g.denoiser)
    optimizer = torch.optim.AdamW([p.requires_grad_() for p in parameters.values()], lr=1e-3, weight_decay=1e-4)
    engine = PairEngine(predict, Contrastive(), list(parameters.values()), pair_chunk_size=chunk)
    losses = []
    for _ in range(3):
        step = engine.step(batch)
        losses.append(step.loss)
        for parameter, gradient in zip(parameters.values(), step.gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    assert_close(torch.stack(losses), g.tensors["train.adamw3.losses"], rtol=0, atol=1e-5)
    for key, parameter in parameters.items():
        assert_close(parameter.detach(), g.tensors[f"train.adamw3.{key}"].reshape(parameter.shape), rtol=0, atol=1e-5)


class Toy(nn.Module):
    """A denoiser of one line in float64 whose tokens have two banks."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(0.3 * torch.randn(2, 6, dtype=torch.float64))
        self.bank: Tensor | int = 0
        self.rows_alive = 0

    def use_bank(self, bank: Tensor | int) -> None:
        self.bank = bank

    def predict(self, noisy_latents: Tensor, timestep: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        self.rows_alive = max(self.rows_alive, len(timestep)) if torch.is_grad_enabled() else self.rows_alive
        text = torch.tanh(conditions["text"] + self.tokens[self.bank])
        return noisy_latents * text + text.square() * (timestep / 1000).unsqueeze(1)


def toy_batch(rows: int = 5, written: int = 2) -> PairBatch:
    columns = rows + written
    captions = torch.arange(columns)
    captions[3] = captions[1]  # rows 1 and 3 have the same caption
    images = torch.cat([torch.arange(rows), torch.zeros(written, dtype=torch.long)])
    hard = torch.arange(columns) >= rows
    positive = torch.arange(rows)
    double = torch.float64
    return PairBatch(
        noisy_latents=torch.randn(rows, 6, dtype=double),
        target=torch.randn(rows, 6, dtype=double),
        timestep=torch.linspace(0, 1000, rows, dtype=double),
        conditions={"text": torch.randn(columns, 6, dtype=double)},
        positive=positive,
        candidates=candidate_mask(positive, captions, images, hard),
    )


def naive(toy: Toy, batch: PairBatch) -> Tensor:
    """Returns the errors of all pairs in one graph, the published algorithm."""
    rows, columns = batch.candidates.shape
    row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    prediction = toy.predict(batch.noisy_latents[row], batch.timestep[row], {"text": batch.conditions["text"][column]})
    return pair_errors(prediction, batch.target[row]).reshape(rows, columns)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_gradients_equal_those_of_one_graph_at_every_chunk_size(objective: Objective, chunk: int | None):
    toy, batch = Toy(), toy_batch()
    if objective.min_negatives > 1:
        batch = toy_batch(rows=6)
    step = PairEngine(toy.predict, objective, [toy.tokens], pair_chunk_size=chunk).step(batch)
    errors = naive(toy, batch)
    regression = objective(errors, batch.positive, batch.candidates)
    (expected,) = torch.autograd.grad((regression.weights * errors).sum(), toy.tokens)
    assert_close(step.loss.double(), regression.loss, rtol=1e-6, atol=1e-6)
    assert_close(step.gradients[0], expected, rtol=1e-10, atol=1e-12)
    ran = ~step.errors.isnan()
    assert torch.equal(ran, batch.candidates if objective.min_negatives else torch.eye(len(ran), ran.shape[1]).bool())
    assert_close(step.errors[ran], errors[ran].float())


@pytest.mark.parametrize("chunk", CHUNKS)
def test_agsm_trains_both_banks_towards_targets_of_the_ema(chunk: int | None):
    toy, batch = Toy(), toy_batch()
    ema = toy.tokens.detach() + 0.1 * torch.randn_like(toy.tokens)
    objective = AGSM()

    @contextmanager
    def with_ema() -> Any:
        live = toy.tokens.data
        toy.tokens.data = ema
        yield
        toy.tokens.data = live

    engine = PairEngine(
        toy.predict, objective, [toy.tokens], use_bank=toy.use_bank, ema=with_ema, pair_chunk_size=chunk
    )
    step = engine.step(batch)
    predictions = []
    for tokens in (ema, toy.tokens):
        rows = []
        for i, at in enumerate(batch.positive.tolist()):
            bank = (torch.arange(batch.candidates.shape[1]) != at).long()
            text = torch.tanh(batch.conditions["text"] + tokens[bank])
            rows.append(batch.noisy_latents[i] * text + text.square() * batch.timestep[i] / 1000)
        predictions.append(torch.stack(rows))
    target = batch.target.unsqueeze(1).expand_as(predictions[0])
    regression = objective(
        pair_errors(predictions[0], target, pair_dims=2),
        batch.positive,
        batch.candidates,
        predictions[0],
        batch.target,
    )
    loss = (regression.weights * pair_errors(predictions[1], regression.targets, pair_dims=2)).sum()
    (expected,) = torch.autograd.grad(loss, toy.tokens)
    assert_close(step.loss.double(), loss.detach(), rtol=1e-6, atol=1e-6)
    assert_close(step.gradients[0], expected, rtol=1e-9, atol=1e-12)
    assert (step.gradients[0].abs().sum(dim=1) > 0).all(), "both banks must learn"


def test_sampled_negatives_give_the_full_gradient_on_average():
    toy, batch = Toy(), toy_batch(rows=6)
    full = PairEngine(toy.predict, Contrastive(), [toy.tokens]).step(batch).gradients[0]
    engine = PairEngine(toy.predict, Contrastive(), [toy.tokens], num_backward_negatives=2)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([engine.step(batch, generator=generator).gradients[0] for _ in range(400)])
    error = (draws.mean(0) - full)[0]
    assert (error.abs() < 4 * draws.std(0)[0] / 20 + 1e-12).all()
    assert not torch.equal(draws[0], draws[1])


@pytest.mark.parametrize(("negatives", "passes"), [(2, 2), (3, 1), (9, 1)])
def test_rows_without_more_negatives_than_are_sampled_run_once(negatives: int, passes: int):
    toy, batch = Toy(), toy_batch(rows=4, written=0)
    batch.candidates[:] = True
    calls = []

    def predict(noisy_latents: Tensor, timestep: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        calls.append(len(timestep))
        return toy.predict(noisy_latents, timestep, conditions)

    PairEngine(predict, Contrastive(), [toy.tokens], num_backward_negatives=negatives).step(batch)
    assert sum(calls) == (16 if passes == 1 else 16 + 12)


@pytest.mark.parametrize("negatives", [None, 3])
def test_no_more_than_a_chunk_of_pairs_is_alive_at_any_batch_size(negatives: int | None):
    for rows in (4, 8, 16, 32):
        toy = Toy()
        engine = PairEngine(toy.predict, Contrastive(), [toy.tokens], num_backward_negatives=negatives)
        engine.step(toy_batch(rows))
        assert toy.rows_alive <= 16


def test_the_chunk_is_halved_when_memory_runs_out_and_the_gradient_stays_exact():
    toy, batch = Toy(), toy_batch()
    expected = PairEngine(toy.predict, Contrastive(), [toy.tokens]).step(batch)

    def predict(noisy_latents: Tensor, timestep: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        if len(timestep) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return toy.predict(noisy_latents, timestep, conditions)

    engine = PairEngine(predict, Contrastive(), [toy.tokens])
    step = engine.step(batch)
    assert engine.chunk_size == 2
    assert_close(step.gradients, expected.gradients)
    assert_close(step.loss, expected.loss)


def test_one_pair_that_does_not_fit_is_an_error():
    def predict(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        PairEngine(predict, Contrastive(), [Toy().tokens]).step(toy_batch())


def test_a_nan_prediction_shows_in_the_loss():
    toy, batch = Toy(), toy_batch()
    batch.noisy_latents[2, 0] = torch.nan
    for chunk in (2, None):
        assert PairEngine(toy.predict, Contrastive(), [toy.tokens], pair_chunk_size=chunk).step(batch).loss.isnan()


def test_loss_scaling_leaves_the_gradients_as_they_are():
    toy, batch = Toy(), toy_batch()
    plain = PairEngine(toy.predict, Contrastive(), [toy.tokens]).step(batch)
    scaled = PairEngine(toy.predict, Contrastive(), [toy.tokens], loss_scale=2.0**14).step(batch)
    assert_close(scaled.gradients, plain.gradients)


@pytest.mark.parametrize("setting", ["pair_chunk_size", "num_backward_negatives"])
def test_a_size_below_one_is_refused(setting: str):
    with pytest.raises(ValueError, match=f"{setting} must be at least 1, or None, but is 0"):
        PairEngine(Toy().predict, Contrastive(), [], **{setting: 0})
