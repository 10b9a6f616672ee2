"""Laws of pairs: errors, candidates, unbiased sampling, diagnostics."""

import math

import pytest
import torch
from torch.testing import assert_close

from diffusers_softrepa.pairs import (
    candidate_mask,
    mean_by_noise_level,
    pair_diagnostics,
    pair_errors,
    subsample_negatives,
)

FREE = torch.ones(3, 4, dtype=torch.bool)
ERRORS = torch.tensor([[0.1, 0.4, 0.3, 0.9], [0.5, 0.6, 0.7, 0.8], [0.6, 0.5, 0.2, 0.4]])
POSITIVE = torch.tensor([0, 1, 2])


def test_an_error_is_the_mean_square_over_all_that_is_not_a_pair():
    prediction, target = torch.randn(2, 3, 4, 5, 5), torch.randn(2, 1, 4, 5, 5)
    errors = pair_errors(prediction, target, pair_dims=2)
    assert errors.shape == (2, 3)
    assert_close(errors[1, 2], torch.nn.functional.mse_loss(prediction[1, 2], target[1, 0]))
    assert_close(pair_errors(prediction[:, 0], target[:, 0]), errors[:, 0])


@pytest.mark.parametrize(("given", "kept"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")])
def test_errors_are_at_least_float32(given, kept):
    prediction = torch.full((2, 8), 3.0, dtype=getattr(torch, given))
    assert pair_errors(prediction, prediction).dtype == getattr(torch, kept)


@pytest.mark.parametrize(
    ("prediction", "target", "pair_dims"), [((2, 4, 4), (4, 4), 1), ((2, 4, 4), (2, 1, 4), 1), ((2, 3), (2, 3), 2)]
)
def test_targets_that_would_broadcast_over_latents_are_refused(prediction, target, pair_dims):
    with pytest.raises(ValueError, match="prediction and target must agree after"):
        pair_errors(torch.ones(prediction), torch.ones(target), pair_dims=pair_dims)


def test_different_captions_of_different_images_are_all_candidates():
    assert candidate_mask(POSITIVE, torch.tensor([5, 6, 7, 8])).all()


def test_an_equal_caption_is_not_a_negative():
    mask = candidate_mask(POSITIVE, torch.tensor([5, 6, 5, 5]))
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]]


def test_another_caption_of_the_same_image_is_not_a_negative():
    mask = candidate_mask(POSITIVE, torch.arange(4), torch.tensor([7, 8, 7, 9]))
    assert mask.int().tolist() == [[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 1, 1]]


def test_a_caption_that_equals_another_caption_of_the_same_image_is_not_a_negative():
    mask = candidate_mask(POSITIVE, torch.tensor([5, 6, 9, 6]), torch.tensor([1, 1, 2, 3]))
    assert mask.int().tolist() == [[1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1]]


def test_a_written_negative_takes_part_only_for_its_image_and_only_if_it_is_wrong():
    image_ids, written = torch.tensor([7, 8, 9, 7, 8, 8]), torch.tensor([0, 0, 0, 1, 1, 1]).bool()
    mask = candidate_mask(POSITIVE, torch.tensor([0, 1, 2, 3, 4, 1]), image_ids, written)
    assert mask.int().tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0], [1, 1, 1, 0, 0, 0]]


def test_rows_of_one_process_have_the_mask_of_the_whole_batch():
    caption_ids, image_ids = torch.tensor([0, 1, 0, 3]), torch.tensor([7, 8, 9, 8])
    everything = candidate_mask(torch.arange(4), caption_ids, image_ids)
    assert torch.equal(candidate_mask(torch.tensor([2, 3]), caption_ids, image_ids), everything[2:])


def test_written_negatives_need_their_images():
    with pytest.raises(ValueError, match="written hard negatives need image_ids"):
        candidate_mask(POSITIVE, torch.arange(4), written=torch.tensor([0, 0, 0, 1]).bool())


@pytest.mark.parametrize(
    ("row", "num_negatives"),
    [
        ([5.0, -1.0, -2.0, 3.0, -4.0], 1),  # drawn with probabilities .1 .2 .3 .4
        ([5.0, -1.0, -2.0, 3.0, -4.0], 2),  # .2 .4 .6 .8
        ([0.1, -1.0, 1.0, 10.0, 0.0], 2),  # .5 .5 1 0
        ([0.0, 1.0, 1.0, 1.0, 1.0], 3),  # .75 each
    ],
)
def test_sampled_weights_have_the_full_weights_as_expectation(row, num_negatives, monkeypatch):
    """Exactly: the offsets run through the midpoints of 100 cells, and no cell holds a change of the sample."""
    weights, positive = torch.tensor(row, dtype=torch.float64).expand(100, 5), torch.zeros(100, dtype=torch.int64)
    offsets = ((torch.arange(100, dtype=torch.float64) + 0.5) / 100).unsqueeze(1)
    monkeypatch.setattr(torch, "rand", lambda *size, **options: offsets)
    sampled = subsample_negatives(weights, positive, num_negatives)
    assert_close(sampled.mean(0), weights[0], atol=1e-12, rtol=0)
    assert ((sampled[:, 1:] != 0).sum(1) == num_negatives).all()
    bound = max(weights[0, 1:].abs().max().item(), weights[0, 1:].abs().sum().item() / num_negatives)
    assert sampled[:, 1:].abs().max() <= bound + 1e-12


def test_few_negatives_all_stay_with_their_weights():
    weights = torch.tensor([[0.5, -0.2, 0.0, -0.3], [-0.1, 0.9, -0.7, -0.1]])
    assert_close(subsample_negatives(weights, torch.tensor([0, 1]), 3), weights)
    assert_close(subsample_negatives(weights, torch.tensor([0, 1]), 7), weights)


def test_a_row_without_negatives_keeps_its_positive():
    weights = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert torch.equal(subsample_negatives(weights, torch.tensor([0, 1]), 1), weights)


def test_sampling_repeats_with_the_seed():
    weights, positive = torch.randn(6, 9), torch.arange(6)
    first, again, other = (
        subsample_negatives(weights, positive, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.dtype == weights.dtype


def test_no_negatives_cannot_be_sampled():
    with pytest.raises(ValueError, match="num_negatives must be at least 1 but got 0"):
        subsample_negatives(ERRORS, POSITIVE, 0)


def test_diagnostics_of_a_small_table():
    figures = pair_diagnostics(ERRORS, POSITIVE, FREE, temperature=0.1)
    assert figures.top1.tolist() == [1.0, 0.0, 1.0]
    assert_close(figures.margin, torch.tensor([0.2, -0.1, 0.2]))
    probability = torch.softmax(-ERRORS / 0.1, 1)[range(3), POSITIVE]
    assert_close(figures.information, math.log(4) + probability.log())


def test_diagnostics_leave_out_what_is_no_candidate():
    candidates, errors = FREE.clone(), ERRORS.clone()
    candidates[1, 0], errors[1, 0] = False, math.nan
    figures, without = (
        pair_diagnostics(errors, POSITIVE, candidates),
        pair_diagnostics(ERRORS[1:2, 1:], torch.tensor([0]), FREE[:1, 1:]),
    )
    for name in ("top1", "margin", "information"):
        assert_close(getattr(figures, name)[1:2], getattr(without, name))
    assert figures.top1[1] == 1.0


def test_information_never_exceeds_the_logarithm_of_the_number_of_candidates():
    errors = torch.rand(50, 8)
    assert (
        pair_diagnostics(errors, torch.zeros(50).long(), errors >= 0, temperature=1e-3).information <= 2.0795
    ).all()
    equal = pair_diagnostics(torch.ones(2, 8), torch.zeros(2).long(), torch.ones(2, 8).bool())
    assert_close(equal.information, torch.zeros(2), atol=1e-6, rtol=0)
    assert equal.top1.tolist() == [0.0, 0.0]


def test_a_row_without_negatives_says_nothing():
    only = torch.eye(3, 4).bool()
    figures = pair_diagnostics(ERRORS, POSITIVE, only)
    assert all(torch.isnan(values).all() for values in vars(figures).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positive": torch.tensor([0, 1])}, r"but have shapes \(3, 4\), \(2,\) and \(3, 4\)"),
        ({"candidates": FREE[:, :3]}, r"must agree but have shapes"),
        ({"candidates": FREE.float()}, "candidates must be bool and positive int64 but are torch.float32"),
        ({"positive": POSITIVE.int()}, "but are torch.bool and torch.int32"),
        ({"candidates": ~torch.eye(3, 4).bool()}, r"every matched caption must be among its candidates"),
    ],
    ids=["positive", "candidates", "mask dtype", "index dtype", "masked positive"],
)
def test_tables_that_disagree_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        pair_diagnostics(**{"errors": ERRORS, "positive": POSITIVE, "candidates": FREE} | change)


def test_noise_levels_hold_equally_many_values_from_low_to_high():
    timestep = torch.tensor([900.0, 10.0, 500.0, 300.0])
    edges, means = mean_by_noise_level(torch.tensor([4.0, 1.0, 3.0, 2.0]), timestep, num_levels=2)
    assert_close(edges, torch.tensor([400.0]))
    assert_close(means, torch.tensor([1.5, 3.5]))


def test_noise_levels_with_given_edges_leave_out_nan_and_mark_empty_ones():
    values, timestep = torch.tensor([1.0, math.nan, 5.0]), torch.tensor([0, 100, 250])
    _, means = mean_by_noise_level(values, timestep, edges=torch.tensor([250.0, 500.0]))
    assert_close(means, torch.tensor([1.0, 5.0, math.nan]), equal_nan=True)
