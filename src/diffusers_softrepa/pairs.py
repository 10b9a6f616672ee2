"""Image-caption pairs: their errors, which of them take part, sampled negatives, and retrieval diagnostics.

`errors[i, j]` is the mean squared denoising error of image i under caption j, (b, c) with c >= b. Columns after the
first b are written hard negatives, or captions gathered from other processes. `positive[i]` is the column of the
caption matched to image i. `candidates[i, j]` is True if the pair takes part: the matched pair and the true negatives.
Errors of other pairs are never read, so they need not be computed and may be NaN. All values are computed in float32,
or in float64 if the input is float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def pair_errors(prediction: Tensor, target: Tensor, *, pair_dims: int = 1) -> Tensor:
    """Returns the mean squared error of every pair.

    Args:
        prediction: (n, ...) floating, or (b, c, ...) with `pair_dims=2`.
        target: Floating, of the shape of `prediction`; pair dimensions may be 1.
        pair_dims: Number of leading dimensions that count pairs; the mean is over all others. Defaults to 1.

    Returns:
        Errors, (n,) or (b, c), float32 (float64 if the input is float64).

    Raises:
        ValueError: The shapes of prediction and target differ after the pair dimensions.
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
    """Returns which pairs take part: the matched caption, and every caption that is not true of the row's image.

    A caption is true of an image if its text equals that of any caption of the image in the batch. A written hard
    negative takes part only in the row of the image for which it was written.

    Args:
        positive: (b,) int64. Column of each row's matched caption.
        caption_ids: (c,) int64. Equal numbers for equal captions.
        image_ids: (c,) int64. The image to which each caption belongs, or for which a hard negative was written.
            Defaults to None: all images differ.
        written: (c,) bool. True for written hard negatives. Defaults to None: there are none.

    Returns:
        The mask, (b, c) bool.

    Raises:
        ValueError: `written` is given without `image_ids`.
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
    """Returns weights of which only the positive and a few sampled negatives per row are not zero.

    The expectation of the result is `weights`. Negatives are drawn without replacement with probability p proportional
    to |weight|, at most 1, and their weights are divided by p (Horvitz and Thompson). Rows with no more than
    `num_negatives` weighted negatives are returned unchanged. No |weight| exceeds the sum of |weight| over the
    negatives of its row, divided by `num_negatives`.

    Args:
        weights: (b, c) floating, as in `PairRegression`. Pairs of weight zero are never drawn.
        positive: (b,) int64. Column of each row's matched caption.
        num_negatives: Number of negatives to keep per row, at least 1.
        generator: CPU generator. Defaults to torch's global generator.

    Returns:
        Weights, (b, c); at most 1 + num_negatives per row are not zero.

    Raises:
        ValueError: `num_negatives` is below 1.

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
    """Returns the probabilities min(1, scale * size) of each row, whose sum is `count`, or 1 for all sizes above 0."""
    certain = torch.zeros_like(sizes, dtype=torch.bool)
    for _ in range(count + 1):  # each round either makes one more certain or changes nothing
        rest = sizes.masked_fill(certain, 0)
        total = rest.sum(1, keepdim=True).clamp_min(torch.finfo(sizes.dtype).tiny)
        inclusion = torch.where(certain, 1, rest / total * (count - certain.sum(1, keepdim=True)))
        certain = inclusion >= 1
    return inclusion.clamp(max=1)


def _systematic_sample(inclusion: Tensor, offsets: Tensor) -> Tensor:
    """Returns a systematic sample of each row, (b, c) bool.

    The probabilities of a row are laid end to end; those that cover offset, offset + 1, ... are drawn.
    """
    ends = torch.ceil(inclusion.cumsum(1) - offsets)
    return ends.diff(dim=1, prepend=torch.zeros_like(offsets)) > 0


@dataclass(frozen=True, eq=False)
class PairDiagnostics:
    """Retrieval diagnostics of each row. Rows without negatives are NaN, so average with `nanmean`.

    Attributes:
        top1: (b,). 1.0 if the matched caption has the lowest error, else 0.0.
        margin: (b,). Lowest error of the negatives minus the matched error; above 0 if `top1` is 1.
        information: (b,), at most log n, in nats. log n - InfoNCE, whose mean is a lower bound on the mutual
            information of images and captions.
    """

    top1: Tensor
    margin: Tensor
    information: Tensor


def pair_diagnostics(
    errors: Tensor, positive: Tensor, candidates: Tensor, *, temperature: float = 0.07
) -> PairDiagnostics:
    """Returns how well the error distinguishes the matched caption of each row from its negatives.

    Args:
        errors: (b, c) floating.
        positive: (b,) int64. Column of each row's matched caption.
        candidates: (b, c) bool. Which pairs take part; n is their number in a row.
        temperature: Temperature of the logits -errors / temperature of the InfoNCE bound, positive. Defaults to 0.07.

    Returns:
        The diagnostics of each row, detached.

    Raises:
        ValueError: A shape is wrong, or a matched caption is not among its candidates.

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
    """Returns the mean of a diagnostic in each range of noise levels, from low to high noise.

    Args:
        values: (n,) floating. NaNs are left out.
        timestep: (n,). Timestep of each value; noise levels (sigma) work as well.
        num_levels: Number of ranges, with equally many values each. Defaults to 4; not used if `edges` are given.
        edges: (num_levels - 1,) ascending. Timesteps between one range and the next. Defaults to quantiles of
            `timestep`.

    Returns:
        The edges, (num_levels - 1,), and the means, (num_levels,), NaN for empty ranges.
    """
    timestep = timestep.to(values)
    if edges is None:
        edges = timestep.quantile(torch.linspace(0, 1, num_levels + 1).to(values)[1:-1])
    level = torch.bucketize(timestep, edges.to(values), right=True)
    return edges, torch.stack([values[level == k].nanmean() for k in range(len(edges) + 1)])


def precise(tensor: Tensor) -> Tensor:
    """Returns a tensor in float32, or unchanged if it is float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def is_positive(positive: Tensor, like: Tensor) -> Tensor:
    """Returns a mask of the shape of `like`, (b, c) bool, that is True at the matched captions."""
    return torch.zeros_like(like, dtype=torch.bool).scatter(1, positive.unsqueeze(1), True)


def read_errors(errors: Tensor, positive: Tensor, candidates: Tensor) -> Tensor:
    """Returns checked errors, (b, c) float32 or float64, with 0 for pairs that take no part.

    Raises:
        ValueError: The shapes or dtypes do not agree, or a matched caption is not among its candidates.
    """
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
