"""Thresholds of detectors with a bound on false alarms, and exact binomial intervals.

n clean calibration series, which trained neither the detector nor the choice of attack or detector. Split-conformal:
with the threshold at the ceil((n + 1)(1 - alpha))-th smallest of their scores, a further clean series exceeds it with
probability at most alpha, whatever the distribution, as long as the n + 1 series are exchangeable.
Sources: V. Vovk, A. Gammerman, G. Shafer, "Algorithmic Learning in a Random World" (2005); C. Clopper, E. Pearson,
"The use of confidence or fiducial limits illustrated in the case of the binomial", Biometrika 26 (1934).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
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
        clean_scores: ``(n,) float``, of clean series that trained neither the detector nor any selection.
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


class _Scores(Protocol):
    def score(self, series: Tensor, mask: Tensor | None = None) -> Tensor: ...


def cross_fitted_scores(
    fit: Callable[[NDArray[np.int64]], _Scores],
    series: Tensor,
    folds: NDArray[np.int64],
    mask: Tensor | None = None,
) -> Tensor:
    """A clean score for every series, each from a judge that was fitted without its fold.

    All of train and validation can so calibrate a threshold. The scores of different folds come from different
    judges, and the final judge from all series: the bound of :func:`conformal_threshold` then holds as well as these
    judges agree (at worst 2 alpha for cross-conformal p-values), so that the realised rate belongs in the report.

    Args:
        fit: Makes a new judge from the rows it is given, ``(k,) int64``, ascending.
        series: ``(n, T, C) float`` clean series.
        folds: ``(n,) int64`` fold of each series, at least two different ones.
        mask: ``(n, T) bool``, true where a step counts.

    Returns:
        ``(n,) float64``.

    Raises:
        ValueError: If ``folds`` does not hold one fold a series or holds one fold only.
    """
    if folds.shape != (len(series),) or len(np.unique(folds)) < 2:
        raise ValueError(
            f"folds must be ({len(series)},) with at least 2 folds, got shape {folds.shape} with "
            f"{len(np.unique(folds))}"
        )
    scores = torch.full((len(series),), torch.nan, dtype=torch.float64)
    for fold in np.unique(folds):
        judge = fit(np.flatnonzero(folds != fold))
        rows = torch.from_numpy(np.flatnonzero(folds == fold))
        held_out = judge.score(series[rows], None if mask is None else mask[rows])
        scores[rows] = held_out.detach().double().cpu()
    return scores


def stratified_folds(labels: NDArray[np.int64], n_folds: int, seed: int = 0) -> NDArray[np.int64]:
    """Fold 0..n_folds-1 of each series: sizes differ by at most one, in a class too.

    Args:
        labels: ``(n,) int64`` classes.
        n_folds: At least 2 and at most n.
        seed: Of the shuffle within each class.

    Returns:
        ``(n,) int64``.

    Raises:
        ValueError: If ``labels`` is not one axis or ``n_folds`` is not in 2..n.
    """
    if labels.ndim != 1 or not 2 <= n_folds <= len(labels):
        raise ValueError(f"n_folds must lie in 2..n for (n,) labels, got {n_folds} for shape {labels.shape}")
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    folds = np.empty(len(labels), dtype=np.int64)
    # Dealt out like cards, class after class, without starting again at fold 0.
    folds[by_class] = np.arange(len(labels)) % n_folds
    return folds
