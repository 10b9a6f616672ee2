"""Means with standard errors, clustered by prompt: pictures of one prompt are no independent evidence.

With x the score of a picture, N pictures and G prompts of which g has the pictures in cluster g,

    mean  = sum x / N
    error = sqrt(G / (G - 1)) sqrt(sum_g (sum_{i in g} (x_i - mean))^2) / N

and the same for paired differences: the score in one setting less that in another, of one prompt and one seed.
"""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Mean:
    """A mean.

    Attributes:
        value: The mean, NaN of nothing.
        error: Its standard error, NaN with fewer than two prompts.
        count: How many numbers.
    """

    value: float
    error: float
    count: int


def clustered_mean(values: Tensor) -> Mean:
    """Returns the mean of values (prompts, seeds), NaNs left out."""
    there = ~values.isnan()
    count = int(there.sum())
    if not count:
        return Mean(math.nan, math.nan, 0)
    mean = values.nansum() / count
    clusters = (values - mean).nansum(1)[there.any(1)]  # (prompts,)
    size = len(clusters)
    error = math.nan
    if size > 1:
        error = math.sqrt(size / (size - 1) * clusters.square().sum().item()) / count
    return Mean(mean.item(), error, count)


def share_better(differences: Tensor, *, higher_is_better: bool) -> float:
    """Returns the share of pairs in which the second is better, equal ones counting half; NaNs left out."""
    there = differences[~differences.isnan()]
    if not len(there):
        return math.nan
    signed = there if higher_is_better else -there
    return ((signed > 0).double() + (signed == 0).double() / 2).mean().item()
