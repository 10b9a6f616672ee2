"""Training objectives on image-caption pairs, each written as a weighted regression that can be trained in chunks.

Errors, positives and candidates are defined in `pairs`. The gradient of each objective with respect to the predictions
equals that of the weighted regression (`PairRegression`)

    sum_ij weights[i, j] * mean((prediction_ij - target_ij)^2)

with constant weights and targets. For objectives that are functions of the errors (`ErrorObjective`), the chain rule
gives weights = dloss/derrors. AGSM is a weighted regression by definition, with shifted targets. A first pass without
gradients computes the weights; a second pass trains the pairs in chunks of any size, with exact gradients and the
memory of one chunk.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, final, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .pairs import is_positive, pair_errors, precise, read_errors

Logits = Literal["exponential", "linear"]


@dataclass(frozen=True, eq=False)
class PairRegression:
    """A weighted regression that has the value and the gradient of an objective.

    Attributes:
        loss: Scalar, detached. Value of the objective at the predictions of the first pass.
        weights: (b, c), detached. Weight of each pair's error: exactly zero for pairs that need no training, negative
            for pairs whose error should grow.
        targets: (b, c, ...), detached. Target of each pair. None if all pairs of a row have the row's own target.
    """

    loss: Tensor
    weights: Tensor
    targets: Tensor | None = None


class Objective(ABC):
    """A training objective on one batch of pairs, given the predictions of a first pass without gradients.

    Attributes:
        num_banks: Number of token banks that the objective trains: 1, or 2 if matched pairs use bank 0 and all other
            pairs use bank 1.
        needs_ema_predictions: Whether the first pass predicts with the exponential moving average of the tokens, and
            its predictions and their target are passed to the objective together with the errors. If False, the
            tokens in training predict, and the errors are enough.
        min_negatives: Smallest number of negatives per row. With 0 the matched pairs are enough.
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
        """Returns the weighted regression that has the value and the gradient of the objective.

        Args:
            errors: (b, c) floating. Errors of the first pass.
            positive: (b,) int64. Column of each row's matched caption.
            candidates: (b, c) bool. Which pairs take part.
            predictions: (b, c, ...) floating. Predictions of the first pass; read only if `needs_ema_predictions`.
            target: (b, ...) floating. Target of each row; read only if `needs_ema_predictions`.

        Raises:
            ValueError: The shapes do not agree, a matched caption is not among its candidates, or a row has fewer
                negatives than the objective needs.
        """


class ErrorObjective(Objective, ABC):
    """An objective whose loss is a differentiable function of the errors alone."""

    @abstractmethod
    def loss(self, errors: Tensor, positive: Tensor, candidates: Tensor) -> Tensor:
        """Returns the loss, scalar, differentiable with respect to the errors.

        Args:
            errors: (b, c) floating.
            positive: (b,) int64. Column of each row's matched caption.
            candidates: (b, c) bool. Which pairs take part.

        Raises:
            ValueError: The shapes do not agree, a matched caption is not among its candidates, or a row has fewer
                negatives than the objective needs.
        """

    def __call__(
        self,
        errors: Tensor,
        positive: Tensor,
        candidates: Tensor,
        predictions: Tensor | None = None,
        target: Tensor | None = None,
    ) -> PairRegression:
        leaf = precise(errors.detach()).clone().requires_grad_()
        with torch.enable_grad():
            loss = self.loss(leaf, positive, candidates)
        return PairRegression(loss.detach(), torch.autograd.grad(loss, leaf)[0])


@final
@dataclass(frozen=True)
class Contrastive(ErrorObjective):
    """SoftREPA's objective: cross-entropy of the matched caption among its candidates, plus a denoising term.

    Attributes:
        logits: `"exponential"` for the logits logit_scale * exp(-errors / temperature), or `"linear"` for
            -errors / temperature (InfoNCE).
        temperature: T, in units of the errors; positive.
        logit_scale: S of the exponential logits.
        denoising_weight: Weight of the mean error of the matched pairs. Published: 0 for SD3, 10 for SD 1.5 and SDXL.

    Raises:
        ValueError: `logits` is unknown, or `temperature` is not positive.

    Source:
        SoftREPA, arXiv 2503.08250.
    """

    logits: Logits = "exponential"
    temperature: float = 0.07
    logit_scale: float = 4.0
    denoising_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.logits not in get_args(Logits):
            raise ValueError(f"logits must be one of {get_args(Logits)} but got {self.logits!r}")
        _check_positive(temperature=self.temperature)

    def loss(self, errors: Tensor, positive: Tensor, candidates: Tensor) -> Tensor:
        errors = read_errors(errors, positive, candidates)
        scores = -errors / self.temperature
        if self.logits == "exponential":
            scores = self.logit_scale * scores.exp()
        loss = cross_entropy(scores.masked_fill(~candidates, -math.inf), positive)
        return loss + self.denoising_weight * _matched_error(errors, positive) if self.denoising_weight else loss


@final
@dataclass(frozen=True)
class SoftRank(ErrorObjective):
    """Mean differentiable rank of the matched caption, minus 1: bounded, in [0, n - 1] for n candidates.

    Attributes:
        temperature: In standard deviations of the errors of a row; positive. The rank tends to the true rank as the
            temperature goes to 0.
        min_spread: In units of the errors, positive. Its square is added to their variance, so errors that differ by
            much less count as ties.

    Raises:
        ValueError: `temperature` or `min_spread` is not positive.

    Source:
        SoftSort, arXiv 2006.16038, equation 3, normalised over the ranks of one item instead of the items of a rank.
    """

    min_negatives: ClassVar[int] = 2
    temperature: float = 0.5
    min_spread: float = 1e-4

    def __post_init__(self) -> None:
        _check_positive(temperature=self.temperature, min_spread=self.min_spread)

    def loss(self, errors: Tensor, positive: Tensor, candidates: Tensor) -> Tensor:
        return (self.ranks(errors, positive, candidates) - 1).mean()

    def ranks(self, errors: Tensor, positive: Tensor, candidates: Tensor) -> Tensor:
        """Returns the differentiable rank of each matched caption's error, (b,) in [1, n]; 1 is the lowest error.

        The errors are standardised over the n candidates of a row to z. The rank is the mean of 1..n under
        softmax_k(-|sorted(z)_k - z_matched| / temperature).

        Args:
            errors: (b, c) floating.
            positive: (b,) int64. Column of each row's matched caption.
            candidates: (b, c) bool. Which pairs take part.

        Raises:
            ValueError: A shape is wrong, or a row has fewer than two negatives: standardised, two errors are always
                +-1, and their rank has no gradient.
        """
        errors, count = read_errors(errors, positive, candidates), candidates.sum(1, keepdim=True)
        if (count < 3).any():
            raise ValueError(
                "the soft rank needs at least two negatives per row but got rows with "
                f"{count.min().item() - 1}; use larger batches, distinct captions or written negatives"
            )
        centred = (errors - errors.sum(1, keepdim=True) / count).masked_fill(~candidates, 0)
        spread = (centred.square().sum(1, keepdim=True) / count + self.min_spread**2).sqrt()
        scores = centred / spread  # (b, c)
        ordered = scores.masked_fill(~candidates, math.inf).sort(dim=1).values  # pairs that take no part come last
        distance = (ordered - scores.gather(1, positive.unsqueeze(1))).abs()
        ranks = torch.arange(1, errors.shape[1] + 1, device=errors.device, dtype=errors.dtype)
        return (torch.softmax(-distance / self.temperature, dim=1) * ranks).sum(1)


@final
@dataclass(frozen=True)
class Denoising(ErrorObjective):
    """Mean error of the matched pairs: the baseline without contrast."""

    min_negatives: ClassVar[int] = 0

    def loss(self, errors: Tensor, positive: Tensor, candidates: Tensor) -> Tensor:
        return _matched_error(read_errors(errors, positive, candidates), positive)


def plackett_luce_weights(errors: Tensor, candidates: Tensor, *, temperature: float) -> Tensor:
    """Returns the probability that each candidate is the caption of the row's image: a softmax of -errors / T.

    Args:
        errors: (b, c) floating.
        candidates: (b, c) bool. Which pairs take part.
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
    positive_guidance: float,
    negative_guidance: float,
    amplitude: Tensor | float = 1.0,
) -> Tensor:
    """Returns targets that are shifted along d_j = p_j - sum_k w_k p_k for the matched caption, else against it.

    Args:
        predictions: (b, c, ...) floating. Predictions p of the EMA tokens.
        target: (b, ...) floating. Target of each row.
        weights: (b, c) floating. Plackett-Luce weights w.
        positive: (b,) int64. Column of each row's matched caption.
        positive_guidance: Guidance g+ of the matched pairs.
        negative_guidance: Guidance g- of all other pairs.
        amplitude: A(t), (b,) or one number for all rows. Defaults to 1.

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
    """Alignment-guided score matching: negatives are trained towards a target that is shifted by a bounded amount.

    loss = mean_i [ mean((pred_ii - target_ii)^2) + mean_j mean((pred_ij - target_ij)^2) ] with the targets of
    `agsm_targets`. Column i is the matched caption, predicted with bank 0; the columns j are its negatives, predicted
    with bank 1. The EMA predictions use the same banks.

    The `loss` of the returned regression is that of the EMA predictions. The loss of the tokens in training is the
    weighted sum of their own errors, which the second pass computes.

    Attributes:
        temperature: T of the Plackett-Luce weights, in units of the errors; positive. If `PairDiagnostics.information`
            at this temperature stays near 0, the weights are at chance, and the temperature should be lower.
        positive_guidance: Guidance g+ of the matched pairs.
        negative_guidance: Guidance g- of the negatives. The published 0.1 is for SD3.

    Raises:
        ValueError: `temperature` is not positive.

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


def _matched_error(errors: Tensor, positive: Tensor) -> Tensor:
    return errors.gather(1, positive.unsqueeze(1)).mean()


def _check_positive(**settings: float) -> None:
    for name, value in settings.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive but got {value}")
