"""Thresholds of detectors with a bound on false alarms, and exact binomial intervals.

n clean calibration series, which neither trained nor chose the detector. What attack was chosen, and by which series,
does not matter here: clean scores are a function of detector and series alone. Split-conformal:
with the threshold at the ceil((n + 1)(1 - alpha))-th smallest of their scores, a further clean series exceeds it with
probability at most alpha, whatever the distribution, as long as the n + 1 series are exchangeable. That is an average
over calibrations: given one, and scores without ties, the rate is itself drawn from a beta distribution.
Sources: V. Vovk, A. Gammerman, G. Shafer, "Algorithmic Learning in a Random World" (2005); C. Clopper, E. Pearson,
"The use of confidence or fiducial limits illustrated in the case of the binomial", Biometrika 26 (1934); V. Vovk,
"Conditional validity of inductive conformal predictors", Machine Learning 92 (2013).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from scipy.stats import beta, betabinom
from torch import Tensor


class Share(NamedTuple):
    """A share of n with its Clopper-Pearson interval; reads as a list in JSON."""

    share: float
    low: float
    high: float
    n_hits: int
    n: int


def binomial_share(n_hits: int, n: int, level: float = 0.95) -> Share:
    """Share ``n_hits / n`` with the exact (Clopper-Pearson) interval of a binomial probability.

    The ends are the quantiles ``Beta(k, n - k + 1)`` at (1 - level) / 2 and ``Beta(k + 1, n - k)`` at
    (1 + level) / 2, 0 for k = 0 and 1 for k = n. It covers at least ``level`` for any probability. Used for realised
    false alarms and for the share of cells in which one attack beats another.

    Args:
        n_hits: k, 0..n.
        n: Number of trials, at least 1.
        level: Coverage, strictly between 0 and 1.

    Returns:
        Share, low and high end, k and n.

    Raises:
        ValueError: If k is not in 0..n, n is below 1 or ``level`` is not inside 0..1.
    """
    if n < 1 or not 0 <= n_hits <= n:
        raise ValueError(f"a share needs 0 <= n_hits <= n and n at least 1, got {n_hits} of {n}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level}")
    low = float(beta.ppf((1 - level) / 2, n_hits, n - n_hits + 1)) if n_hits else 0.0
    high = float(beta.ppf((1 + level) / 2, n_hits + 1, n - n_hits)) if n_hits < n else 1.0
    return Share(n_hits / n, low, high, n_hits, n)


def mean_difference_interval(
    gains: Sequence[int], losses: Sequence[int], n: int, level: float = 0.95
) -> tuple[float, float]:
    """Exact interval of ``mean_j P(gain before judge j) - mean_j P(loss before judge j)``, from counts on n series.

    Each of the M = J + J' probabilities gets a Clopper-Pearson interval at ``1 - (1 - level) / M``; by the union bound
    all hold together with probability ``level``, however the judges depend on each other, and so does the mean of
    their ends. For one judge and no losses it is :func:`binomial_share`. Of paired series, gains are those that
    one attack alone wins, losses those that the other alone wins.

    Args:
        gains: J counts, 0..n, J at least 1.
        losses: J' counts, 0..n; empty where a mean stands alone.
        n: Series behind each count, at least 1.
        level: Coverage, strictly between 0 and 1.

    Returns:
        Low and high end.

    Raises:
        ValueError: As :func:`binomial_share`.

    Source: Bonferroni's inequality over Clopper-Pearson intervals.
    """
    each = 1 - (1 - level) / (len(gains) + len(losses))
    more, less = ([binomial_share(count, n, each) for count in counts] for counts in (gains, losses))
    low, high = (sum(getattr(share, end) for share in more) / len(more) for end in ("low", "high"))
    if less:
        low -= sum(share.high for share in less) / len(less)
        high -= sum(share.low for share in less) / len(less)
    return low, high


def _exact(alpha: float) -> Fraction:
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie strictly between 0 and 1, got {alpha}")
    # The decimal that was written: as binary fractions, 0.05 and 0.01 lie beside 1/20 and 1/100.
    return Fraction(repr(float(alpha)))


def n_clean_required(alpha: float) -> int:
    """Fewest clean series that can carry a false-alarm bound: ``ceil(1 / alpha) - 1``, 19 for 5 %, 99 for 1 %.

    Raises:
        ValueError: If ``alpha`` is not inside 0..1.
    """
    return math.ceil(1 / _exact(alpha)) - 1


def _rank(n: int, alpha: float) -> int:
    """``ceil((n + 1)(1 - alpha))``, the place of the threshold among n sorted scores, from 1."""
    return math.ceil((n + 1) * (1 - _exact(alpha)))


@dataclass(frozen=True)
class Threshold:
    """A calibrated threshold, or the statement that too few clean series were there to set one.

    Attributes:
        alpha: Bound on the rate of false alarms.
        n: Clean series it was set on.
        value: Scores above it are flagged; None if not resolvable.
    """

    alpha: float
    n: int
    value: float | None

    @property
    def resolvable(self) -> bool:
        """Whether n clean series are enough for a bound of alpha."""
        return self.value is not None

    def flag(self, scores: Tensor) -> Tensor:
        """``(...) bool`` of ``(...) float`` scores: strictly above the threshold, so that ties raise no alarm.

        Raises:
            ValueError: If the threshold is not resolvable or a score is NaN.
        """
        if self.value is None:
            raise ValueError(f"the threshold at {self.alpha:g} false alarms is {self}: at least {self._required()}")
        if bool(scores.isnan().any()):
            raise ValueError(f"scores must not be NaN, got {int(scores.isnan().sum())} of {scores.numel()}")
        return scores.double() > self.value

    def realised(self, clean_scores: Tensor, level: float = 0.95) -> Share:
        """Rate of false alarms on ``(n,) float`` scores of other clean series, with its Clopper-Pearson interval.

        Raises:
            ValueError: As :meth:`flag`, if there is no series, or if ``level`` is not inside 0..1.
        """
        return binomial_share(int(self.flag(clean_scores).sum()), clean_scores.numel(), level)

    def expected_alarms(self, n_series: int, level: float = 0.95) -> tuple[int, int]:
        """Fewest and most alarms on clean series that a calibrated threshold leaves to chance.

        With the threshold at the r-th smallest of m scores, the rate of false alarms is ``Beta(m + 1 - r, r)`` over
        calibrations, so that their number on ``n_series`` other series is beta-binomial. Below the first number lies
        probability at most ``(1 - level) / 2``, and as much above the second. Ties only make alarms fewer.

        Args:
            n_series: Clean series, at least 1, exchangeable with those of the calibration.
            level: Coverage, strictly between 0 and 1.

        Raises:
            ValueError: If the threshold is not resolvable.
        """
        if self.value is None:
            raise ValueError(f"the threshold at {self.alpha:g} false alarms is {self}: at least {self._required()}")
        rank = _rank(self.n, self.alpha)
        at_most = betabinom.pmf(np.arange(n_series + 1), n_series, self.n + 1 - rank, rank).cumsum()
        tail = (1 - level) / 2
        return int(np.searchsorted(at_most, tail, "right")), int(np.searchsorted(at_most, 1 - tail))

    def _required(self) -> str:
        return f"{n_clean_required(self.alpha)} clean series are needed"

    def __str__(self) -> str:
        return f"not resolvable (n = {self.n})" if self.value is None else f"{self.value:.6g} (n = {self.n})"


def conformal_threshold(clean_scores: Tensor, alpha: float) -> Threshold:
    """The ``ceil((n + 1)(1 - alpha))``-th smallest clean score; flagged is what lies strictly above it.

    Strictly above is the conservative side of ties: with equal scores fewer than alpha of clean series are flagged.

    Args:
        clean_scores: ``(n,) float``, of clean series that neither trained nor chose the detector.
        alpha: Bound on the rate of false alarms, strictly between 0 and 1.

    Returns:
        The threshold; not resolvable where n is below :func:`n_clean_required`.

    Raises:
        ValueError: If ``alpha`` is not inside 0..1, the scores are not one axis or one is NaN.
    """
    if clean_scores.ndim != 1 or bool(clean_scores.isnan().any()):
        raise ValueError(f"clean_scores must be (n,) without NaN, got shape {tuple(clean_scores.shape)}")
    n = len(clean_scores)
    rank = _rank(n, alpha)
    if rank > n:
        return Threshold(alpha, n, None)
    return Threshold(alpha, n, float(clean_scores.double().sort().values[rank - 1]))
