"""Thresholds of detectors with a bound on false alarms, and exact binomial intervals.

n clean calibration series, which neither trained nor chose the detector. What attack was chosen, and by which series,
does not matter here: clean scores are a function of detector and series alone. Split-conformal:
with the threshold at the ceil((n + 1)(1 - alpha))-th smallest of their scores, a further clean series exceeds it with
probability at most alpha, whatever the distribution, as long as the n + 1 series are exchangeable.
Sources: V. Vovk, A. Gammerman, G. Shafer, "Algorithmic Learning in a Random World" (2005); C. Clopper, E. Pearson,
"The use of confidence or fiducial limits illustrated in the case of the binomial", Biometrika 26 (1934).
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from scipy.stats import beta
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
    exact = _exact(alpha)
    if clean_scores.ndim != 1 or bool(clean_scores.isnan().any()):
        raise ValueError(f"clean_scores must be (n,) without NaN, got shape {tuple(clean_scores.shape)}")
    n = len(clean_scores)
    rank = math.ceil((n + 1) * (1 - exact))
    if rank > n:
        return Threshold(alpha, n, None)
    return Threshold(alpha, n, float(clean_scores.double().sort().values[rank - 1]))
