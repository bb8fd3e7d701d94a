"""Holm's step-down correction: many comparisons, one error rate for all of them together.

m comparisons. Source: S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of
Statistics 6 (1979).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Holm(NamedTuple):
    """What is left of m comparisons once they are judged together.

    Attributes:
        p_values: ``(m,) float64`` adjusted; below ``alpha`` exactly where the comparison is rejected.
        rejected: ``(m,) bool``.
        levels: ``(m,) float64`` error rate at which each comparison was judged, at most ``alpha``; an interval with
            coverage 1 - level leaves out the null value exactly where that comparison is rejected.
    """

    p_values: NDArray[np.float64]
    rejected: NDArray[np.bool_]
    levels: NDArray[np.float64]


def holm(p_values: ArrayLike, alpha: float = 0.05) -> Holm:
    """Keep the chance of even one false rejection at ``alpha``, whatever the dependence between comparisons.

        adjusted p of rank k = max over j <= k of min(1, (m - j + 1) p_(j))

    The level of rank k is alpha / (m - k + 1) up to the first comparison that is not rejected, and that one's level
    for all after it, because Holm's procedure stops there.

    Args:
        p_values: ``(m,)`` in 0..1, m at least 0.
        alpha: Strictly between 0 and 1.

    Returns:
        In the order given.

    Raises:
        ValueError: If a p value lies outside 0..1 or is not a number, or ``alpha`` is out of range.
    """
    values = np.asarray(p_values, dtype=np.float64)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie strictly between 0 and 1, got {alpha}")
    if values.ndim != 1:
        raise ValueError(f"p_values must be one row of numbers, got shape {values.shape}")
    wrong = np.flatnonzero(~((values >= 0) & (values <= 1)))
    if len(wrong):
        raise ValueError(f"p_values must lie in 0..1, got {values[wrong[0]]} at position {wrong[0]}")
    order = np.argsort(values, kind="stable")
    left = np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, left * values[order]))
    rejected = adjusted < alpha
    # Ranks behind the first one kept are judged as that one was.
    last = min(int(rejected.sum()), max(len(values) - 1, 0))
    levels = np.empty_like(values)
    levels[order] = alpha / np.maximum(left, left[last] if len(left) else 1)
    return Holm(adjusted, rejected, levels)
