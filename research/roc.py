"""How well a score tells right images from wrong ones: the area under the ROC curve, and its standard error.

With x the score of a right image, y that of a wrong one, over all pairs of one with the other,

    AUC = P(x > y) + P(x = y) / 2

which is 1 for a score that knows and 1/2 for one that is blind. The error is that of DeLong et al. (Biometrics 44,
1988) with the images of a group, here of one prompt, taken together as in Obuchowski (Biometrics 53, 1997): they are
no independent evidence.
"""

import math

import numpy as np

from diffusers_softrepa.evaluation.statistics import Mean


def auc(scores: np.ndarray, right: np.ndarray, groups: np.ndarray) -> Mean:
    """Returns the area of all pairs.

    Args:
        scores: Of images, (n,).
        right: Which of them are right, (n,) bool.
        groups: What belongs together, (n,) integers.
    """
    wins = _wins(scores[right], scores[~right])  # (right, wrong)
    if not wins.size:
        return Mean(math.nan, math.nan, len(scores))
    area = float(wins.mean())
    first, second = _summed(wins.mean(1) - area, groups[right]), _summed(wins.mean(0) - area, groups[~right])
    both = first.keys() & second.keys()
    variance = _spread(first) / wins.shape[0] ** 2 + _spread(second) / wins.shape[1] ** 2
    count = len(first.keys() | second.keys())
    shared = sum(first[group] * second[group] for group in both) * count / max(1, count - 1)
    variance += 2 * shared / wins.size
    return Mean(area, math.sqrt(max(0.0, variance)) if math.isfinite(variance) else math.nan, len(scores))


def auc_within(scores: np.ndarray, right: np.ndarray, groups: np.ndarray) -> Mean:
    """Returns the area of those pairs only that are of one group: whether the better image of a prompt is found.

    Arguments are those of `auc`; `count` is the number of groups that have both right and wrong images.
    """
    sums, pairs = [], []
    for group in np.unique(groups):
        here = groups == group
        wins = _wins(scores[here & right], scores[here & ~right])
        if wins.size:
            sums.append(float(wins.sum()))
            pairs.append(wins.size)
    count, total = len(sums), sum(pairs)
    if not count:
        return Mean(math.nan, math.nan, 0)
    area = sum(sums) / total
    rest = sum((won - area * many) ** 2 for won, many in zip(sums, pairs, strict=True))
    return Mean(area, math.sqrt(count / (count - 1) * rest) / total if count > 1 else math.nan, count)


def _wins(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns who wins, 1, 1/2 or 0, (x, y)."""
    return (x[:, None] > y) + 0.5 * (x[:, None] == y)


def _summed(values: np.ndarray, groups: np.ndarray) -> dict[int, float]:
    return {int(group): float(values[groups == group].sum()) for group in np.unique(groups)}


def _spread(sums: dict[int, float]) -> float:
    count = len(sums)
    return math.inf if count < 2 else count / (count - 1) * sum(value**2 for value in sums.values())
