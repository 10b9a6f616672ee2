"""Objectives on image-caption pairs: errors -> logits -> loss, and what each asks of a chunked backward pass.

Errors, positives and candidates are those of `pairs`. Every objective is, to first order, a weighted regression: its
gradient with respect to the predictions is that of

    sum_ij weights[i, j] * mean((prediction_ij - target_ij)^2)

with constant weights and targets (`PairRegression`). By the chain rule weights = dloss/derrors for the objectives
that are functions of the errors; AGSM is such a regression already, with shifted targets. So a first pass without
gradients finds the weights, and a second one trains the pairs in chunks of any size: exact gradients, flat memory.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, final, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .pairs import is_positive, pair_errors, precise, read_errors

Logits = Literal["exponential", "linear"]


def contrastive_loss(
    errors: Tensor,
    positive: Tensor,
    candidates: Tensor,
    *,
    logits: Logits = "exponential",
    temperature: float = 0.07,
    logit_scale: float = 4.0,
    denoising_weight: float = 0.0,
) -> Tensor:
    """Cross-entropy of the matched caption among its candidates, plus a weighted denoising term.

    Args:
        errors: (b, c).
        positive: (b,) int64.
        candidates: (b, c) bool.
        logits: "exponential": logit_scale * exp(-errors / temperature). "linear": -errors / temperature (InfoNCE).
        temperature: T, in units of the errors; positive.
        logit_scale: S of the exponential logits.
        denoising_weight: W, weight of the mean error of the matched pairs (published: 0 for SD3, 10 for SD1.5, SDXL).

    Returns:
        Scalar loss.

    Raises:
        ValueError: If an option or a shape is wrong, or a matched caption is not among its candidates.

    Source:
        SoftREPA, arXiv 2503.08250.
    """
    _check_logits(logits, temperature)
    errors = read_errors(errors, positive, candidates)
    scores = -errors / temperature if logits == "linear" else logit_scale * torch.exp(-errors / temperature)
    loss = cross_entropy(scores.masked_fill(~candidates, -math.inf), positive)
    return loss + denoising_weight * denoising_loss(errors, positive) if denoising_weight else loss


def soft_rank(
    errors: Tensor, positive: Tensor, candidates: Tensor, *, temperature: float = 0.5, min_spread: float = 1e-4
) -> Tensor:
    """Differentiable rank of the matched caption's error among its candidates: 1 is best, n is worst.

    The errors are standardised over the n candidates to z; the rank is the mean of 1..n under
    softmax_k(-|sorted(z)_k - z_matched| / temperature), and tends to the true rank as the temperature falls.

    Args:
        errors: (b, c).
        positive: (b,) int64.
        candidates: (b, c) bool.
        temperature: In standard deviations of the row's errors; positive.
        min_spread: In units of the errors, positive: its square is added to their variance, so that errors that differ
            by much less count as ties.

    Returns:
        Ranks, (b,), in [1, n].

    Raises:
        ValueError: If an option or a shape is wrong, or a row has fewer than two negatives: standardised, two errors
            are always +-1, and their rank has no gradient.

    Source:
        SoftSort, arXiv 2006.16038, equation 3, normalised over the ranks of one item instead of the items of a rank.
    """
    _check_positive(temperature=temperature, min_spread=min_spread)
    errors, count = read_errors(errors, positive, candidates), candidates.sum(1, keepdim=True)
    if (count < 3).any():
        raise ValueError(
            "the soft rank needs at least two negatives per row but got rows with "
            f"{count.min().item() - 1}; use larger batches, distinct captions or written negatives"
        )
    centred = (errors - errors.sum(1, keepdim=True) / count).masked_fill(~candidates, 0)
    spread = (centred.square().sum(1, keepdim=True) / count + min_spread**2).sqrt()
    scores = centred / spread  # (b, c)
    ordered = scores.masked_fill(~candidates, math.inf).sort(dim=1).values  # those that take no part come last
    distance = (ordered - scores.gather(1, positive.unsqueeze(1))).abs()
    ranks = torch.arange(1, errors.shape[1] + 1, device=errors.device, dtype=errors.dtype)
    return (torch.softmax(-distance / temperature, dim=1) * ranks).sum(1)


def soft_rank_loss(
    errors: Tensor, positive: Tensor, candidates: Tensor, *, temperature: float = 0.5, min_spread: float = 1e-4
) -> Tensor:
    """Mean over the rows of `soft_rank` - 1: bounded, in [0, n - 1]; arguments and errors as there."""
    ranks = soft_rank(errors, positive, candidates, temperature=temperature, min_spread=min_spread)
    return (ranks - 1).mean()


def denoising_loss(errors: Tensor, positive: Tensor) -> Tensor:
    """Mean error of the matched pairs alone, scalar; `errors` (b, c), `positive` (b,) int64."""
    return precise(errors).gather(1, positive.unsqueeze(1)).mean()


@dataclass(frozen=True, eq=False)
class PairRegression:
    """The weighted regression with an objective's value and gradient.

    Attributes:
        loss: Value of the objective at the predictions it was given, scalar, detached.
        weights: (b, c), detached; exactly zero for pairs that need no training, negative for those pushed away.
        targets: Target of each pair, (b, c, ...), detached; None if each pair has its row's own target.
    """

    loss: Tensor
    weights: Tensor
    targets: Tensor | None = None


class Objective(ABC):
    """Turns the predictions of a first pass, made without gradients, into the regression of the second.

    Attributes:
        num_banks: Token banks it trains: 1, or 2 where matched pairs see bank 0 and all others bank 1.
        needs_ema_predictions: Whether the first pass predicts with the EMA of the tokens, and hands on the predictions
            and the target with their errors. Otherwise the tokens in training predict, and errors are enough.
        min_negatives: Negatives that every row needs; with 0 the matched pairs are enough.
    """

    num_banks: ClassVar[int] = 1
    needs_ema_predictions: ClassVar[bool] = False
    min_negatives: ClassVar[int] = 1

    @abstractmethod
    def __call__(
        self,
        errors: Tensor,
        positive: Tensor,
        candidates: Tensor,
        predictions: Tensor | None = None,
        target: Tensor | None = None,
    ) -> PairRegression:
        """The regression of one batch.

        Args:
            errors: Of the first pass, (b, c).
            positive: (b,) int64.
            candidates: (b, c) bool.
            predictions: Of the first pass, (b, c, ...); read only if `needs_ema_predictions`.
            target: Of each row, (b, ...); read only if `needs_ema_predictions`.

        Returns:
            Loss, weights and targets.

        Raises:
            ValueError: As the loss of the objective.
        """


@final
@dataclass(frozen=True)
class Contrastive(Objective):
    """SoftREPA's objective, `contrastive_loss`; its arguments are the fields."""

    logits: Logits = "exponential"
    temperature: float = 0.07
    logit_scale: float = 4.0
    denoising_weight: float = 0.0

    def __post_init__(self) -> None:
        _check_logits(self.logits, self.temperature)

    def __call__(
        self,
        errors: Tensor,
        positive: Tensor,
        candidates: Tensor,
        predictions: Tensor | None = None,
        target: Tensor | None = None,
    ) -> PairRegression:
        options = vars(self)
        return _differentiate(lambda e: contrastive_loss(e, positive, candidates, **options), errors)


@final
@dataclass(frozen=True)
class SoftRank(Objective):
    """The bounded ranking objective, `soft_rank_loss`; its arguments are the fields."""

    min_negatives: ClassVar[int] = 2
    temperature: float = 0.5
    min_spread: float = 1e-4

    def __post_init__(self) -> None:
        _check_positive(temperature=self.temperature, min_spread=self.min_spread)

    def __call__(
        self,
        errors: Tensor,
        positive: Tensor,
        candidates: Tensor,
        predictions: Tensor | None = None,
        target: Tensor | None = None,
    ) -> PairRegression:
        options = vars(self)
        return _differentiate(lambda e: soft_rank_loss(e, positive, candidates, **options), errors)


@final
@dataclass(frozen=True)
class Denoising(Objective):
    """The baseline without contrast, `denoising_loss`."""

    min_negatives: ClassVar[int] = 0

    def __call__(
        self,
        errors: Tensor,
        positive: Tensor,
        candidates: Tensor,
        predictions: Tensor | None = None,
        target: Tensor | None = None,
    ) -> PairRegression:
        return _differentiate(lambda e: denoising_loss(read_errors(e, positive, candidates), positive), errors)


def plackett_luce_weights(errors: Tensor, candidates: Tensor, *, temperature: float = 0.07) -> Tensor:
    """Probability that each candidate is the caption of the row's image: softmax over candidates of -errors / T.

    Args:
        errors: (b, c).
        candidates: (b, c) bool.
        temperature: T, in units of the errors; positive.

    Returns:
        (b, c), rows summing to 1, exactly 0 for pairs that take no part.

    Source:
        AGSM, arXiv 2605.30038, algorithm 1.
    """
    return (-precise(errors) / temperature).masked_fill(~candidates, -math.inf).softmax(1)


def agsm_targets(
    predictions: Tensor,
    target: Tensor,
    weights: Tensor,
    positive: Tensor,
    *,
    positive_guidance: float = 1.0,
    negative_guidance: float = 0.1,
    amplitude: Tensor | float = 1.0,
) -> Tensor:
    """Targets shifted along d_j = p_j - sum_k w_k p_k for the matched caption, against it for the others.

    Args:
        predictions: p, of the EMA tokens, (b, c, ...).
        target: Of each row, (b, ...).
        weights: w, Plackett-Luce weights, (b, c).
        positive: (b,) int64.
        positive_guidance: g+, of the matched pairs.
        negative_guidance: g-, of the others.
        amplitude: A(t) of each row, (b,), or one for all.

    Returns:
        target + g+ A d for the matched pairs, target - g- A d for the others, (b, c, ...) detached.

    Source:
        AGSM, arXiv 2605.30038, algorithm 1.
    """
    predictions, target = precise(predictions.detach()), precise(target.detach())
    matched = is_positive(positive, weights).to(predictions)
    guidance = matched * positive_guidance - (1 - matched) * negative_guidance
    guidance = guidance * torch.as_tensor(amplitude).to(predictions).reshape(-1, 1)  # (b, c)
    per_pair = weights.shape + (1,) * (target.ndim - 1)  # (b, c, 1, ..., 1)
    baseline = (weights.view(per_pair) * predictions).sum(1, keepdim=True)  # not a matmul: autocast would halve it
    return target.unsqueeze(1) + guidance.view(per_pair) * (predictions - baseline)


@final
@dataclass(frozen=True)
class AGSM(Objective):
    """Alignment-guided score matching: bounded shifts of the target instead of an unbounded push on the errors.

    loss = mean_i [ mean((pred_ii - target_ii)^2) + mean_j mean((pred_ij - target_ij)^2) ] with `agsm_targets`, i the
    matched caption on bank 0, j its negatives on bank 1. The EMA predictions come from the same banks.

    The `loss` of its regression is that of the EMA predictions; that of the tokens in training is the weighted sum of
    their own errors, which the second pass computes anyway.

    Attributes:
        temperature: T of the Plackett-Luce weights, in units of the errors, which average over latent elements. If
            `PairDiagnostics.information` at this temperature stays near 0, the weights are at chance: lower it.
        positive_guidance: g+.
        negative_guidance: g-; the published 0.1 is for SD3.

    Source:
        AGSM, arXiv 2605.30038.
    """

    num_banks: ClassVar[int] = 2
    needs_ema_predictions: ClassVar[bool] = True
    temperature: float = 0.07
    positive_guidance: float = 1.0
    negative_guidance: float = 0.1

    def __post_init__(self) -> None:
        _check_positive(temperature=self.temperature)

    def __call__(
        self,
        errors: Tensor,
        positive: Tensor,
        candidates: Tensor,
        predictions: Tensor | None = None,
        target: Tensor | None = None,
    ) -> PairRegression:
        if predictions is None or target is None:
            raise ValueError("AGSM needs the EMA predictions (b, c, ...) and the target (b, ...) beside their errors")
        alignment = plackett_luce_weights(
            read_errors(errors, positive, candidates).detach(), candidates, temperature=self.temperature
        )
        shape = candidates.shape + (1,) * (target.ndim - 1)
        predictions = torch.where(candidates.view(shape), predictions.detach(), target.unsqueeze(1))
        targets = agsm_targets(
            predictions,
            target,
            alignment,
            positive,
            positive_guidance=self.positive_guidance,
            negative_guidance=self.negative_guidance,
        )
        matched = is_positive(positive, candidates)
        negatives = (candidates & ~matched).to(alignment)
        weights = (matched + negatives / negatives.sum(1, keepdim=True).clamp(min=1)) / len(positive)
        return PairRegression((weights * pair_errors(predictions, targets, pair_dims=2)).sum(), weights, targets)


def _differentiate(loss_of: Callable[[Tensor], Tensor], errors: Tensor) -> PairRegression:
    """The regression of a loss that is a function of the errors: weights = dloss/derrors."""
    leaf = precise(errors.detach()).clone().requires_grad_()
    with torch.enable_grad():
        loss = loss_of(leaf)
    return PairRegression(loss.detach(), torch.autograd.grad(loss, leaf)[0])


def _check_logits(logits: str, temperature: float) -> None:
    if logits not in get_args(Logits):
        raise ValueError(f"logits must be one of {get_args(Logits)} but got {logits!r}")
    _check_positive(temperature=temperature)


def _check_positive(**settings: float) -> None:
    for name, value in settings.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive but got {value}")
