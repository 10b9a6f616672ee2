"""Laws of the objectives: published numbers, exact gradients, masks, order; then each one's own."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from diffusers_softrepa.objectives import (
    AGSM,
    Contrastive,
    Denoising,
    ErrorObjective,
    Objective,
    SoftRank,
    agsm_targets,
    plackett_luce_weights,
)
from diffusers_softrepa.pairs import pair_errors

GOLDEN = Path(__file__).parent / "golden"

# Three images, five captions; the matched ones stand out of order and two pairs take no part.
POSITIVE = torch.tensor([2, 0, 4])
CANDIDATES = torch.tensor([[1, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]).bool()

OBJECTIVES = {
    "contrastive": Contrastive(temperature=0.7),
    "contrastive with denoising": Contrastive(temperature=0.7, denoising_weight=10.0),
    "infonce": Contrastive(logits="linear", temperature=0.7),
    "soft rank": SoftRank(),
    "denoising": Denoising(),
    "agsm": AGSM(temperature=0.5),
}
EVERY_OBJECTIVE = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
LOSSES = {
    "exponential": Contrastive(temperature=0.7, denoising_weight=2.0).loss,
    "linear": Contrastive(logits="linear", temperature=0.7).loss,
    "soft rank": SoftRank().loss,
    "denoising": Denoising().loss,
}
EVERY_LOSS = pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES.keys())


@pytest.fixture
def predictions():
    return torch.randn(3, 5, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def target():
    return torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def regression_of(objective, predictions, target, positive=POSITIVE, candidates=CANDIDATES):
    errors = pair_errors(predictions, target.unsqueeze(1), pair_dims=2)
    return objective(errors, positive, candidates, predictions, target)


def agsm_loss_by_loops(trained, ema, target, temperature, plus, minus):
    """AGSM as the paper writes it, one pair after the other."""
    loss = 0.0
    for i in range(3):
        columns = [j for j in range(5) if CANDIDATES[i, j]]
        likelihoods = [math.exp(-(ema[i, j] - target[i]).square().mean() / temperature) for j in columns]
        baseline = sum(w * ema[i, j] for w, j in zip(likelihoods, columns, strict=True)) / sum(likelihoods)
        negatives = [j for j in columns if j != POSITIVE[i]]
        shifted = target[i] + plus * (ema[i, POSITIVE[i]] - baseline)
        loss = loss + (trained[i, POSITIVE[i]] - shifted).square().mean() / 3
        for j in negatives:
            shifted = target[i] - minus * (ema[i, j] - baseline)
            loss = loss + (trained[i, j] - shifted).square().mean() / len(negatives) / 3
    return loss


def direct_loss(objective, trained, ema, target):
    """The objective as one differentiable function of the predictions, without `PairRegression`."""
    errors = pair_errors(trained, target.unsqueeze(1), pair_dims=2)
    if isinstance(objective, AGSM):
        return agsm_loss_by_loops(trained, ema, target, *dataclasses.asdict(objective).values())
    return objective.loss(errors, POSITIVE, CANDIDATES)


@pytest.mark.parametrize("denoising_weight", [0, 10])
@pytest.mark.parametrize("model", ["sd15", "sdxl", "sd3"])
def test_contrastive_loss_matches_the_reference_numbers(model, denoising_weight):
    golden = load_file(GOLDEN / f"{model}.safetensors")
    errors, expected = golden["train.errors"], golden[f"train.dweight{denoising_weight}.loss"].squeeze()
    pairs = errors, torch.arange(len(errors)), torch.ones_like(errors, dtype=torch.bool)
    objective = Contrastive(denoising_weight=denoising_weight)
    assert_close(objective.loss(*pairs), expected, atol=1e-5, rtol=0)
    assert_close(objective(*pairs).loss, expected, atol=1e-5, rtol=0)


@EVERY_LOSS
def test_gradients_equal_finite_differences(loss_of, predictions, target):
    errors = pair_errors(predictions, target.unsqueeze(1), pair_dims=2).requires_grad_()
    torch.autograd.gradcheck(lambda e: loss_of(e, POSITIVE, CANDIDATES), errors)


@EVERY_OBJECTIVE
def test_the_regression_has_the_gradient_of_the_loss(objective, predictions, target):
    trained = (predictions + 0.1 * torch.randn_like(predictions)) if objective.needs_ema_predictions else predictions
    trained = trained.clone().requires_grad_()
    regression = regression_of(objective, predictions, target)
    targets = target.unsqueeze(1) if regression.targets is None else regression.targets
    surrogate = (regression.weights * pair_errors(trained, targets, pair_dims=2)).sum()
    (expected,) = torch.autograd.grad(direct_loss(objective, trained, predictions, target), trained)
    (gradient,) = torch.autograd.grad(surrogate, trained)
    assert_close(gradient, expected, atol=1e-12, rtol=1e-10)
    assert expected.abs().max() > 1e-3


@EVERY_OBJECTIVE
def test_the_loss_is_that_of_the_given_predictions(objective, predictions, target):
    expected = direct_loss(objective, predictions, predictions, target)
    assert_close(regression_of(objective, predictions, target).loss, expected)


@EVERY_OBJECTIVE
def test_the_regression_is_detached_and_works_without_gradients(objective, predictions, target):
    with torch.no_grad():
        regression = regression_of(objective, predictions.requires_grad_(), target)
    for tensor in (regression.loss, regression.weights, regression.targets):
        assert tensor is None or not tensor.requires_grad
    assert regression.loss.ndim == 0 and regression.weights.shape == CANDIDATES.shape


@EVERY_OBJECTIVE
def test_pairs_that_take_no_part_are_never_read_and_have_zero_weight(objective, predictions, target):
    spoiled = predictions.masked_fill(~CANDIDATES[..., None, None], math.nan)
    clean, regression = (regression_of(objective, p, target) for p in (predictions, spoiled))
    assert (regression.weights[~CANDIDATES] == 0).all()
    assert_close(regression.loss, clean.loss)
    assert_close(regression.weights, clean.weights)
    if clean.targets is not None:
        assert_close(regression.targets[CANDIDATES], clean.targets[CANDIDATES])
        assert regression.targets.isfinite().all()


@EVERY_OBJECTIVE
def test_loss_is_unchanged_by_permuting_pairs(objective, predictions, target):
    rows, columns = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 4, 0, 2])
    regression = regression_of(objective, predictions, target)
    permuted = regression_of(
        objective,
        predictions[rows][:, columns],
        target[rows],
        columns.argsort()[POSITIVE[rows]],
        CANDIDATES[rows][:, columns],
    )
    assert_close(permuted.loss, regression.loss)
    assert_close(permuted.weights, regression.weights[rows][:, columns])
    if regression.targets is not None:
        assert_close(permuted.targets, regression.targets[rows][:, columns])


@EVERY_OBJECTIVE
def test_rows_are_independent(objective, predictions, target):
    """Up to the mean over rows, so that processes with their own rows average to the whole batch."""
    regression = regression_of(objective, predictions, target)
    rows = [
        regression_of(objective, predictions[i : i + 1], target[i : i + 1], POSITIVE[i : i + 1], CANDIDATES[i : i + 1])
        for i in range(3)
    ]
    assert_close(sum(row.loss for row in rows) / 3, regression.loss)
    assert_close(torch.cat([row.weights for row in rows]) / 3, regression.weights)


@EVERY_OBJECTIVE
def test_half_precision_is_computed_in_float32(objective, predictions, target):
    regression = regression_of(objective, predictions.bfloat16(), target.bfloat16())
    assert regression.loss.dtype == regression.weights.dtype == torch.float32
    assert_close(regression.loss.double(), regression_of(objective, predictions, target).loss, atol=0.05, rtol=0.05)


@EVERY_OBJECTIVE
def test_objectives_state_the_negatives_they_need(objective, predictions, target):
    columns = 1 + objective.min_negatives
    regression = regression_of(
        objective, predictions[:1, :columns], target[:1], torch.tensor([0]), torch.ones(1, columns).bool()
    )
    assert regression.loss.isfinite()
    assert (objective.min_negatives == 0) == (regression_of(objective, predictions, target).weights != 0).sum().eq(3)


@pytest.mark.parametrize("objective", [Contrastive(), Denoising(), AGSM()], ids=["contrastive", "denoising", "agsm"])
def test_a_row_whose_negatives_are_all_duplicates_stays_finite(objective, predictions, target):
    only = torch.zeros_like(CANDIDATES).scatter(1, POSITIVE.unsqueeze(1), True)
    regression = regression_of(objective, predictions, target, candidates=only)
    assert regression.loss.isfinite() and regression.weights.isfinite().all()


@EVERY_OBJECTIVE
def test_a_matched_caption_must_be_a_candidate(objective, predictions, target):
    with pytest.raises(ValueError, match="every matched caption must be among its candidates"):
        regression_of(objective, predictions, target, candidates=torch.zeros_like(CANDIDATES))


def test_every_objective_is_final():
    assert Objective.__subclasses__() == [ErrorObjective, AGSM]
    assert ErrorObjective.__subclasses__() == [Contrastive, SoftRank, Denoising]
    assert not any(objective.__subclasses__() for objective in (AGSM, *ErrorObjective.__subclasses__()))


def test_only_agsm_needs_two_banks_and_ema_predictions():
    assert [o.num_banks for o in OBJECTIVES.values()] == [1, 1, 1, 1, 1, 2]
    assert [o.needs_ema_predictions for o in OBJECTIVES.values()] == [False] * 5 + [True]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Contrastive(logits="cosine"), r"logits must be one of \('exponential', 'linear'\) but got 'cosine'"),
        (lambda: Contrastive(temperature=0.0), "temperature must be positive but got 0.0"),
        (lambda: SoftRank(temperature=-1.0), "temperature must be positive but got -1.0"),
        (lambda: SoftRank(min_spread=0.0), "min_spread must be positive but got 0.0"),
        (lambda: AGSM(temperature=math.nan), "temperature must be positive but got nan"),
    ],
    ids=["logits", "temperature", "rank temperature", "spread", "agsm temperature"],
)
def test_settings_are_checked_when_they_are_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_linear_logits_are_infonce():
    errors = torch.rand(3, 5)
    probability = torch.softmax(-errors / 0.07, 1)[range(3), POSITIVE]
    loss = Contrastive(logits="linear").loss(errors, POSITIVE, torch.ones_like(CANDIDATES))
    assert_close(loss, -probability.log().mean())


def test_the_contrastive_objective_pulls_the_matched_caption_and_pushes_the_others(predictions, target):
    weights = regression_of(Contrastive(temperature=0.7), predictions, target).weights
    matched = torch.zeros_like(CANDIDATES).scatter(1, POSITIVE.unsqueeze(1), True)
    assert (weights[matched] > 0).all() and (weights[CANDIDATES & ~matched] < 0).all()


def test_a_soft_rank_lies_between_one_and_the_number_of_candidates():
    errors = torch.rand(200, 5, generator=torch.Generator().manual_seed(0)) ** 4
    candidates = torch.ones(200, 5).bool()
    candidates[:100, 3] = False
    for temperature in (0.01, 0.5, 100.0):
        ranks = SoftRank(temperature=temperature).ranks(errors, torch.zeros(200).long(), candidates)
        assert (ranks >= 1).all() and (ranks <= candidates.sum(1) + 1e-5).all()


def test_a_soft_rank_tends_to_the_true_rank():
    errors, positive = torch.rand(50, 6, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 6
    true = 1 + (errors < errors.gather(1, positive.unsqueeze(1))).sum(1)
    ranks = SoftRank(temperature=1e-4, min_spread=1e-9).ranks(errors, positive, torch.ones(50, 6).bool())
    assert_close(ranks, true.float(), atol=1e-3, rtol=0)


def test_a_soft_rank_falls_with_the_matched_error():
    errors = torch.tensor([0.30, 0.35, 0.50, 0.52]).repeat(60, 1)
    matched = torch.linspace(0.0, 1.0, 60).unsqueeze(1)
    table = torch.cat([matched, errors], 1)
    ranks = SoftRank().ranks(table, torch.zeros(60).long(), table >= 0)
    assert (ranks.diff() > 0).all()


def test_a_soft_rank_ignores_scale_and_offset_of_the_errors():
    errors = torch.rand(3, 5, dtype=torch.float64)
    ranks = (SoftRank(min_spread=1e-12).ranks(e, POSITIVE, CANDIDATES) for e in (errors, 3 + 7 * errors))
    assert_close(*ranks)


def test_a_soft_rank_of_equal_errors_is_the_middle_with_finite_gradients():
    regression = SoftRank()(torch.full((3, 5), 0.3), POSITIVE, torch.ones_like(CANDIDATES))
    assert_close(regression.loss, torch.tensor(2.0))
    assert regression.weights.isfinite().all()


def test_a_soft_rank_needs_two_negatives():
    with pytest.raises(ValueError, match=r"at least two negatives per row but got rows with 1; use larger batches"):
        SoftRank().loss(torch.rand(2, 2), torch.arange(2), torch.ones(2, 2).bool())


def test_plackett_luce_weights_are_probabilities_of_the_candidates():
    weights = plackett_luce_weights(torch.rand(3, 5), CANDIDATES, temperature=0.07)
    assert_close(weights.sum(1), torch.ones(3))
    assert (weights[~CANDIDATES] == 0).all() and (weights[CANDIDATES] > 0).all()


def test_agsm_shifts_vanish_when_all_candidates_agree(predictions, target):
    regression = regression_of(AGSM(), predictions[:, :1].expand_as(predictions), target)
    assert_close(regression.targets[CANDIDATES], target.unsqueeze(1).expand_as(predictions)[CANDIDATES])


def test_agsm_stops_guiding_the_matched_caption_once_it_is_certain(predictions, target):
    sure = predictions.clone()
    sure[range(3), POSITIVE] = target
    regression = regression_of(AGSM(temperature=1e-3), sure, target)
    assert_close(regression.targets[range(3), POSITIVE], target)


def test_agsm_shifts_grow_with_the_amplitude_of_their_row(predictions, target):
    weights = plackett_luce_weights(torch.rand(3, 5, dtype=torch.float64), CANDIDATES, temperature=0.07)
    guidance = {"positive_guidance": 1.0, "negative_guidance": 0.1}
    plain = agsm_targets(predictions, target, weights, POSITIVE, **guidance)
    scaled = agsm_targets(predictions, target, weights, POSITIVE, **guidance, amplitude=torch.tensor([0.0, 1.0, 2.0]))
    rows = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64).view(3, 1, 1, 1)
    assert_close(scaled - target.unsqueeze(1), rows * (plain - target.unsqueeze(1)))


def test_agsm_without_its_predictions_says_what_it_needs():
    with pytest.raises(ValueError, match=r"AGSM needs the EMA predictions \(b, c, ...\) and the target"):
        AGSM()(torch.rand(3, 5), POSITIVE, CANDIDATES)
