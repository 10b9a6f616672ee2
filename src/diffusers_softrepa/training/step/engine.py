"""Exact gradients of an objective over b images and c captions, with one chunk of pairs in memory at a time.

Rows are independent of each other, and so are the pairs of a row, given the weights that the objective puts on its
errors (`objectives.PairRegression`). So

- where a chunk holds whole rows, their pairs run once, the objective computes the weights of the errors, and the
  backward pass uses these: the published algorithm with 1 / b of its memory and no recomputation;
- where a row is larger than a chunk, or only sampled negatives are trained, its pairs run once without gradients for
  their errors, and the pairs with a weight run again, in chunks, with gradients.

The peak memory is that of one chunk for any b.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import Parameter

from ...conditioning.conditions import Conditions, take
from ...objectives import Objective, PairRegression
from ...pairs import is_positive, pair_errors, subsample_negatives

AUTOMATIC_CHUNK = 16


@dataclass(frozen=True, eq=False)
class PairBatch:
    """Noised images, encoded captions, and the pairs of them that are run.

    Attributes:
        noisy_latents: Latents (b, ...), each noised once.
        target: Prediction targets (b, ...).
        timestep: Timesteps (b,) on the 0..1000 scale.
        conditions: The c encoded captions, tensors with c rows.
        positive: Column of each image's own caption, (b,) int64.
        candidates: The pairs that are run, (b, c) bool.
        row_weights: Weight of each image in the mean over images, (b,) float32; defaults to None, 1 each.
    """

    noisy_latents: Tensor
    target: Tensor
    timestep: Tensor
    conditions: Conditions
    positive: Tensor
    candidates: Tensor
    row_weights: Tensor | None = None


@dataclass(frozen=True, eq=False)
class PairStep:
    """Loss, errors and gradients of one batch.

    Attributes:
        loss: Scalar loss, the mean over the rows.
        errors: Errors (b, c), NaN for pairs that were not run.
        gradients: Gradients of the loss, one for each parameter.
    """

    loss: Tensor
    errors: Tensor
    gradients: list[Tensor]


class PairEngine:
    """Runs batches of pairs for one objective.

    Attributes:
        objective: The present objective.
        chunk_size: Pairs that run at once at present.
        loss_scale: The present factor of the backward pass.

    Args:
        predict: Function from noisy latents (n, ...), timesteps (n,) and conditions of n rows to predictions (n, ...).
        objective: The objective.
        parameters: The soft tokens in training.
        use_bank: Function that sets the token bank of the calls that follow: (n,) int64, or one for all.
        ema: Context that gives the tokens their EMA, for objectives that need its predictions.
        pair_chunk_size: Pairs that run at once; defaults to None, 16. It is halved each time memory runs out.
        num_backward_negatives: Sampled negatives that each row trains besides its matched pair, without bias; defaults
            to None, all of them.
        loss_scale: Factor of the backward pass for half precision, which gradients are divided by; defaults to 1.

    Raises:
        ValueError: A size is below 1.
    """

    def __init__(
        self,
        predict: Callable[[Tensor, Tensor, Conditions], Tensor],
        objective: Objective,
        parameters: Sequence[Parameter],
        *,
        use_bank: Callable[[Tensor | int], None] = lambda bank: None,
        ema: Callable[[], AbstractContextManager[None]] = nullcontext,
        pair_chunk_size: int | None = None,
        num_backward_negatives: int | None = None,
        loss_scale: float = 1.0,
    ) -> None:
        for name, size in (("pair_chunk_size", pair_chunk_size), ("num_backward_negatives", num_backward_negatives)):
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, or None, but is {size}")
        self._predict = predict
        self.objective = objective
        self._parameters = list(parameters)
        self._use_bank = use_bank
        self._ema = ema
        self._num_backward_negatives = num_backward_negatives
        self.chunk_size = pair_chunk_size or AUTOMATIC_CHUNK
        self.loss_scale = loss_scale

    def step(self, batch: PairBatch, *, generator: torch.Generator | None = None) -> PairStep:
        """Returns the loss, the errors and the gradients of a batch.

        Args:
            batch: The batch.
            generator: CPU generator of the sampled negatives.

        Raises:
            torch.OutOfMemoryError: Not even one pair fits.
        """
        wanted = batch.candidates if self.objective.min_negatives else is_positive(batch.positive, batch.candidates)
        batch_size = len(batch.positive)
        total = PairStep(
            loss=batch.target.new_zeros((), dtype=torch.float32),
            errors=torch.full(wanted.shape, torch.nan, device=batch.target.device),
            gradients=[torch.zeros_like(parameter) for parameter in self._parameters],
        )
        first = 0
        while first < batch_size:
            rows = self._next_rows(wanted, first)
            try:
                done = self._step_rows(_rows_of(batch, wanted, rows), generator)
            except torch.OutOfMemoryError:
                if self.chunk_size == 1:
                    raise
                done = None
            if done is None:  # the tensors of the failed call are freed here
                torch.cuda.empty_cache()
                self.chunk_size //= 2
                continue
            share = len(rows) / batch_size
            total.loss.add_(done.loss, alpha=share)
            total.errors[rows.start : rows.stop] = done.errors
            for gradient, part in zip(total.gradients, done.gradients, strict=True):
                gradient.add_(part, alpha=share)
            first = rows.stop
        return total

    @torch.no_grad()
    def errors(self, batch: PairBatch) -> Tensor:
        """Returns the errors of all candidates, (b, c), NaN elsewhere, without gradients."""
        found = [
            pair_errors(self._run(batch, pairs), batch.target[pairs[:, 0]])
            for pairs in batch.candidates.nonzero().split(self.chunk_size)
        ]
        return _scattered(torch.cat(found), batch)

    def _next_rows(self, wanted: Tensor, first: int) -> range:
        """Returns the rows to run together: as many as fit a chunk with their trained pairs, at least one."""
        trained = wanted.sum(1)
        if self._num_backward_negatives is not None:
            trained = trained.clamp(max=1 + self._num_backward_negatives)
        fitting = int((trained[first:].cumsum(0) <= self.chunk_size).sum())
        return range(first, first + max(1, fitting))

    def _step_rows(self, batch: PairBatch, generator: torch.Generator | None) -> PairStep:
        """Runs whole rows once if a chunk holds them and the objective needs no first pass, else twice."""
        pairs = batch.candidates.nonzero()
        if len(pairs) > self.chunk_size or self._samples(batch) or self.objective.needs_ema_predictions:
            return self._step_twice(batch, generator)
        found = pair_errors(self._run(batch, pairs), batch.target[pairs[:, 0]])
        errors = _scattered(found.detach(), batch)
        regression = self._regress(batch, errors)
        return PairStep(regression.loss, errors, self._gradients(found, regression.weights[batch.candidates]))

    def _samples(self, batch: PairBatch) -> bool:
        """Returns whether a row has more negatives than are trained."""
        most = self._num_backward_negatives
        return most is not None and bool((batch.candidates.sum(1) > 1 + most).any())

    def _step_twice(self, batch: PairBatch, generator: torch.Generator | None) -> PairStep:
        """Runs all pairs without gradients for their weights, then those with a weight again, with gradients."""
        errors, regression = self._first_pass(batch)
        weights = regression.weights
        if self._num_backward_negatives is not None:
            weights = subsample_negatives(weights, batch.positive, self._num_backward_negatives, generator=generator)
        loss = torch.zeros_like(regression.loss)
        gradients = [torch.zeros_like(parameter) for parameter in self._parameters]
        for pairs in weights.nonzero().split(self.chunk_size):
            index = tuple(pairs.T)
            target = batch.target[index[0]] if regression.targets is None else regression.targets[index]
            found = pair_errors(self._run(batch, pairs), target)
            loss += (weights[index] * found.detach()).sum()
            for gradient, part in zip(gradients, self._gradients(found, weights[index]), strict=True):
                gradient.add_(part)
        # Where targets are shifted by the EMA's predictions, the loss is that of the tokens in training.
        return PairStep(regression.loss if regression.targets is None else loss, errors, gradients)

    @torch.no_grad()
    def _first_pass(self, batch: PairBatch) -> tuple[Tensor, PairRegression]:
        """Returns the errors of all pairs (b, c) and their regression."""
        keeps = self.objective.needs_ema_predictions
        shape = (*batch.candidates.shape, *batch.target.shape[1:])
        predictions = batch.target.new_zeros(shape) if keeps else None
        found = []
        with self._ema() if keeps else nullcontext():
            for pairs in batch.candidates.nonzero().split(self.chunk_size):
                prediction = self._run(batch, pairs)
                found.append(pair_errors(prediction, batch.target[pairs[:, 0]]))
                if predictions is not None:
                    predictions[tuple(pairs.T)] = prediction.to(predictions.dtype)
        errors = _scattered(torch.cat(found), batch)
        target = batch.target if keeps else None
        return errors, self._regress(batch, errors, predictions, target)

    def _regress(self, batch: PairBatch, errors: Tensor, *predicted: Tensor | None) -> PairRegression:
        """Returns the regression of the objective, a mean over the rows, with their weights if they have some."""
        if batch.row_weights is None:
            return self.objective(errors, batch.positive, batch.candidates, *predicted)
        each = [
            self.objective(*(None if part is None else part[row : row + 1] for part in parts))  # type: ignore[arg-type]
            for parts in [(errors, batch.positive, batch.candidates, *predicted)]
            for row in range(len(errors))
        ]
        share = batch.row_weights / len(each)  # (b,)
        return PairRegression(
            (torch.stack([part.loss for part in each]) * share).sum(),
            torch.cat([part.weights for part in each]) * share.unsqueeze(1),
            None
            if each[0].targets is None
            else torch.cat([part.targets for part in each if part.targets is not None]),
        )

    def _run(self, batch: PairBatch, pairs: Tensor) -> Tensor:
        """Returns the predictions of pairs (n, 2) of row and column."""
        row, column = pairs.T
        if self.objective.num_banks > 1:
            self._use_bank((batch.positive[row] != column).long())
        conditions = take(batch.conditions, column)
        try:
            return self._predict(batch.noisy_latents[row], batch.timestep[row], conditions)
        finally:
            self._use_bank(0)

    def _gradients(self, errors: Tensor, weights: Tensor) -> list[Tensor]:
        """Returns the gradient of sum(weights * errors) for each parameter."""
        found = torch.autograd.grad(
            errors, self._parameters, (weights * self.loss_scale).to(errors.dtype), allow_unused=True
        )
        return [
            torch.zeros_like(parameter) if gradient is None else gradient / self.loss_scale
            for parameter, gradient in zip(self._parameters, found, strict=True)
        ]


def _rows_of(batch: PairBatch, wanted: Tensor, rows: range) -> PairBatch:
    """Returns some rows of a batch, with `wanted` for candidates, and all of its captions."""
    chosen = slice(rows.start, rows.stop)
    return replace(
        batch,
        noisy_latents=batch.noisy_latents[chosen],
        target=batch.target[chosen],
        timestep=batch.timestep[chosen],
        positive=batch.positive[chosen],
        candidates=wanted[chosen],
        row_weights=None if batch.row_weights is None else batch.row_weights[chosen],
    )


def _scattered(found: Tensor, batch: PairBatch) -> Tensor:
    """Returns the errors of the candidates, in the order of `nonzero`, as (b, c) with NaN elsewhere."""
    errors = found.new_full(batch.candidates.shape, torch.nan)
    errors[batch.candidates] = found
    return errors
