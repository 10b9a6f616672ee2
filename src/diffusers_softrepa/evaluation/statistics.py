"""Means with standard errors, clustered by prompt, because images of one prompt are not independent.

Let x_i be the score of image i, N the number of images and G the number of prompts, with one cluster of images each:

    mean  = sum x / N
    error = sqrt(G / (G - 1)) sqrt(sum_g (sum_{i in g} (x_i - mean))^2) / N

Paired differences, the score in one setting minus the score in another of the same prompt and seed, are treated alike.
"""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Mean:
    """A mean with its standard error.

    Attributes:
        value: The mean; NaN if there are no numbers.
        error: The standard error; NaN with fewer than two prompts.
        count: How many numbers the mean is of.
    """

    value: float
    error: float
    count: int


def clustered_mean(values: Tensor) -> Mean:
    """Returns the mean of values (prompts, seeds); NaNs are left out."""
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
    """Returns the share of differences that are improvements; a difference of 0 counts half, and NaNs are left out."""
    there = differences[~differences.isnan()]
    if not len(there):
        return math.nan
    signed = there if higher_is_better else -there
    return ((signed > 0).double() + (signed == 0).double() / 2).mean().item()
