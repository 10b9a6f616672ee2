"""Pairs of images and captions: their errors, which take part, which are sampled, how well they are told apart.

`errors[i, j]` is the mean squared denoising error of image i under caption j, (b, c) with c >= b: further columns are
written hard negatives, or captions gathered from other processes. `positive[i]` is the column of the caption matched
to image i; `candidates[i, j]` says whether the pair takes part (the matched one and the true negatives). Pairs that do
not take part are never read, so they need not be computed: any number, even NaN, may stand there. All of it in
float32, or float64 if given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def pair_errors(prediction: Tensor, target: Tensor, *, pair_dims: int = 1) -> Tensor:
    """Mean squared error of every pair.

    Args:
        prediction: (n, ...), or (b, c, ...) with `pair_dims=2`.
        target: As `prediction`, or with ones among its pair dimensions.
        pair_dims: How many leading dimensions count pairs; the mean is over all others.

    Returns:
        Errors, (n,) or (b, c) float32 (float64 if given float64).

    Raises:
        ValueError: If prediction and target are not shaped alike beyond the pair dimensions.
    """
    shape = prediction.shape[pair_dims:]
    if not shape or prediction.ndim != target.ndim or shape != target.shape[pair_dims:]:
        raise ValueError(
            f"prediction and target must agree after {pair_dims} pair dimension(s), but got "
            f"{tuple(prediction.shape)} and {tuple(target.shape)}; index or unsqueeze the target per pair"
        )
    return (precise(prediction) - precise(target)).square().flatten(pair_dims).mean(-1)


def candidate_mask(
    positive: Tensor, caption_ids: Tensor, image_ids: Tensor | None = None, written: Tensor | None = None
) -> Tensor:
    """Which pairs take part: the matched caption, and every caption that is not also true of the row's image.

    A caption is true of the row's image if its text equals one that belongs to that image, wherever in the batch
    that one stands. A written hard negative takes part only for the image that it was written for.

    Args:
        positive: Column of each row's matched caption, (b,) int64.
        caption_ids: Equal numbers for equal captions, (c,) int64.
        image_ids: The image that each caption belongs to or was written against, (c,) int64; None if all differ.
        written: True for hard negatives written for the image in `image_ids`, (c,) bool; None if there are none.

    Returns:
        The mask, (b, c) bool.

    Raises:
        ValueError: If hard negatives come without image ids.
    """
    if image_ids is None:
        if written is not None:
            raise ValueError("written hard negatives need image_ids: the image that each was written for")
        image_ids = torch.arange(len(caption_ids), device=caption_ids.device)
    if written is None:
        written = torch.zeros_like(caption_ids, dtype=torch.bool)
    same_image = image_ids[positive].unsqueeze(1) == image_ids  # (b, c)
    same_caption = caption_ids.unsqueeze(1) == caption_ids  # (c, c)
    true_caption = ((same_image & ~written).unsqueeze(2) & same_caption).any(1)  # (b, c)
    negatives = (same_image == written) & ~true_caption
    return negatives | is_positive(positive, negatives)


def subsample_negatives(
    weights: Tensor, positive: Tensor, num_negatives: int, *, generator: torch.Generator | None = None
) -> Tensor:
    """Keeps the positive and a few sampled negatives of each row, so that the expectation is the full weights.

    Negatives are drawn without replacement with probability p proportional to |weight| (at most 1) and their weights
    are divided by p (Horvitz and Thompson). So rows with no more than `num_negatives` weighted negatives stay whole,
    and no weight grows beyond the row's sum of |weight| over its negatives, divided by `num_negatives`.

    Args:
        weights: (b, c), as in `PairRegression`; zeros are never drawn.
        positive: (b,) int64.
        num_negatives: Negatives to keep per row, at least 1.
        generator: CPU generator; None for the global one.

    Returns:
        Weights, (b, c), at most 1 + num_negatives of each row not zero.

    Raises:
        ValueError: If `num_negatives` is below 1.

    Source:
        Systematic sampling with unequal probabilities (Madow 1949).
    """
    if num_negatives < 1:
        raise ValueError(
            f"num_negatives must be at least 1 but got {num_negatives}; use the Denoising objective for none"
        )
    on_cpu, matched = weights.detach().to("cpu", torch.float64), is_positive(positive, weights).cpu()
    inclusion = _inclusion_probabilities(on_cpu.abs().masked_fill(matched, 0), num_negatives)
    offsets = torch.rand(len(weights), 1, generator=generator, dtype=torch.float64, device="cpu")
    drawn = _systematic_sample(inclusion, offsets)
    scaled = torch.where(drawn, on_cpu / inclusion.where(drawn, 1), 0)
    return scaled.where(~matched, on_cpu).to(weights)


def _inclusion_probabilities(sizes: Tensor, count: int) -> Tensor:
    """Probabilities min(1, scale * size) of each row with sum `count`, or 1 for all that have a size."""
    certain = torch.zeros_like(sizes, dtype=torch.bool)
    for _ in range(count + 1):  # each round either makes one more certain or changes nothing
        rest = sizes.masked_fill(certain, 0)
        total = rest.sum(1, keepdim=True).clamp_min(torch.finfo(sizes.dtype).tiny)
        inclusion = torch.where(certain, 1, rest / total * (count - certain.sum(1, keepdim=True)))
        certain = inclusion >= 1
    return inclusion.clamp(max=1)


def _systematic_sample(inclusion: Tensor, offsets: Tensor) -> Tensor:
    """Lays each row's probabilities end to end and draws those that cover offset, offset + 1, ...; (b, c) bool."""
    ends = torch.ceil(inclusion.cumsum(1) - offsets)
    return ends.diff(dim=1, prepend=torch.zeros_like(offsets)) > 0


@dataclass(frozen=True, eq=False)
class PairDiagnostics:
    """How well the matched caption is told from its negatives; NaN for rows without one (so use `nanmean`).

    Attributes:
        top1: 1.0 where the matched caption has the lowest error, else 0.0, (b,).
        margin: Lowest error of the negatives minus the matched error, (b,); above 0 where `top1` is 1.
        information: log n - InfoNCE in nats, (b,) up to log n: its mean bounds the mutual information from below.
    """

    top1: Tensor
    margin: Tensor
    information: Tensor


def pair_diagnostics(
    errors: Tensor, positive: Tensor, candidates: Tensor, *, temperature: float = 0.07
) -> PairDiagnostics:
    """Top-1, margin and information of each row.

    Args:
        errors: (b, c).
        positive: (b,) int64.
        candidates: (b, c) bool; its rows count n candidates each.
        temperature: Of the linear logits -errors / temperature of the InfoNCE bound; positive.

    Returns:
        The three figures of each row, detached.

    Raises:
        ValueError: If a shape is wrong, or a matched caption is not among its candidates.

    Source:
        SoftREPA, arXiv 2503.08250; van den Oord et al., arXiv 1807.03748, section 2.3.
    """
    errors, count = read_errors(errors.detach(), positive, candidates), candidates.sum(1)
    negatives = errors.masked_fill(~candidates | is_positive(positive, candidates), math.inf)
    margin = negatives.amin(1) - errors.gather(1, positive.unsqueeze(1)).squeeze(1)
    scores = (-errors / temperature).masked_fill(~candidates, -math.inf)
    information = count.to(errors).log() - cross_entropy(scores, positive, reduction="none")
    figures = (margin > 0).to(margin), margin, information
    return PairDiagnostics(*(figure.masked_fill(count < 2, math.nan) for figure in figures))


def mean_by_noise_level(
    values: Tensor, timestep: Tensor, *, num_levels: int = 4, edges: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Means of a diagnostic per noise level, levels from low to high noise.

    Args:
        values: (n,); NaNs are left out.
        timestep: Of each value, (n,); sigmas do as well.
        num_levels: How many levels of equally many values each, unless `edges` are given.
        edges: Where one level ends and the next begins, (num_levels - 1,) ascending.

    Returns:
        The edges, (num_levels - 1,), and the means, (num_levels,), NaN for empty levels.
    """
    timestep = timestep.to(values)
    if edges is None:
        edges = timestep.quantile(torch.linspace(0, 1, num_levels + 1).to(values)[1:-1])
    level = torch.bucketize(timestep, edges.to(values), right=True)
    return edges, torch.stack([values[level == k].nanmean() for k in range(len(edges) + 1)])


def precise(tensor: Tensor) -> Tensor:
    """In float32, or float64 if it was."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def is_positive(positive: Tensor, like: Tensor) -> Tensor:
    """(b, c) bool, True at the matched captions."""
    return torch.zeros_like(like, dtype=torch.bool).scatter(1, positive.unsqueeze(1), True)


def read_errors(errors: Tensor, positive: Tensor, candidates: Tensor) -> Tensor:
    """Checked errors in full precision, 0 where the pair takes no part."""
    if errors.ndim != 2 or candidates.shape != errors.shape or positive.shape != errors.shape[:1]:
        raise ValueError(
            "errors (b, c), positive (b,) and candidates (b, c) must agree but have shapes "
            f"{tuple(errors.shape)}, {tuple(positive.shape)} and {tuple(candidates.shape)}"
        )
    if candidates.dtype != torch.bool or positive.dtype != torch.int64:
        raise ValueError(f"candidates must be bool and positive int64 but are {candidates.dtype} and {positive.dtype}")
    if not candidates.gather(1, positive.unsqueeze(1)).all():
        raise ValueError("every matched caption must be among its candidates; make them with candidate_mask(...)")
    return precise(errors).masked_fill(~candidates, 0)
