"""From clusters to the few stocks that are bought: rules that pick within each cluster.

A stocks, T days, D width of the embedding. A rule scores every stock and keeps the best of each cluster; stocks of
equal score are taken by the lowest column. Label -1 means in no cluster: such a stock is never picked. A cluster
smaller than asked for gives what it has. A constant series is a stock that did not trade, not a calm one: it comes
last under every rule that divides by or looks for a small standard deviation.
Source: spec of arXiv 2308.07944, section 5, step 3.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_modules.portfolio.market import CONSTANT, Array, daily_risk_free


@dataclass(frozen=True, kw_only=True)
class _BestOfEachCluster(ABC):
    """Highest scores of each cluster.

    Attributes:
        n_per_cluster: Stocks kept of each cluster, at least 1; published 2.

    Raises:
        ValueError: If ``n_per_cluster`` is below 1.
    """

    n_per_cluster: int = 2

    def __post_init__(self) -> None:
        if self.n_per_cluster < 1:
            raise ValueError(f"n_per_cluster must be at least 1, got {self.n_per_cluster}")

    def __call__(self, labels: NDArray[np.int64], returns: Array, embedding: Array | None) -> NDArray[np.int64]:
        """Pick stocks.

        Args:
            labels: ``(A,) int64`` cluster of each stock, -1 for none.
            returns: ``(T, A) float64`` simple daily returns, finite, T at least 2.
            embedding: ``(A, D) float64`` what was clustered, or None where the rule does not read it.

        Returns:
            ``(k,) int64`` columns picked, ascending.

        Raises:
            ValueError: If shapes differ, a return is not finite, or the rule lacks what it reads.
        """
        if returns.ndim != 2 or len(returns) < 2 or labels.shape != returns.shape[1:]:
            raise ValueError(
                f"selection needs returns (T, A) of at least 2 days and labels (A,), got {returns.shape} and "
                f"{labels.shape}"
            )
        if not np.isfinite(returns).all():
            day, stock = np.argwhere(~np.isfinite(returns))[0]
            raise ValueError(f"returns must be finite, got {returns[day, stock]} on day {day} for stock {stock}")
        scores = self._scores(labels, returns, embedding)
        order = np.lexsort((-scores, labels))  # stable, so equal scores stay in the order of columns
        grouped = labels[order]
        rank = np.arange(len(order)) - np.searchsorted(grouped, grouped)
        return np.sort(order[(grouped >= 0) & (rank < self.n_per_cluster)])

    @abstractmethod
    def _scores(self, labels: NDArray[np.int64], returns: Array, embedding: Array | None) -> Array:
        """``(A,)``, larger is better."""


def _deviation(returns: Array) -> Array:
    """``(A,)`` standard deviation (n - 1); exactly 0 for a constant series, whose rounded one may be above 0."""
    return np.where(np.ptp(returns, axis=0) > CONSTANT, returns.std(0, ddof=1), 0.0)


@dataclass(frozen=True, kw_only=True)
class TopSharpe(_BestOfEachCluster):
    """The largest daily Sharpe ratios, (mean - r_f) / std; the published rule.

    Attributes:
        n_per_cluster: Stocks kept of each cluster, at least 1; published 2.
        risk_free: Annual risk-free rate, above -1; None is that of the model, and 0.03, as published, without one.
    """

    risk_free: float | None = None

    def _scores(self, labels: NDArray[np.int64], returns: Array, embedding: Array | None) -> Array:
        deviation = _deviation(returns)
        excess = returns.mean(0) - daily_risk_free(self.risk_free)
        return np.divide(excess, deviation, out=np.full_like(excess, -np.inf), where=deviation > 0)


@dataclass(frozen=True, kw_only=True)
class MinVolatility(_BestOfEachCluster):
    """The smallest standard deviations of daily returns; constant series last.

    Attributes:
        n_per_cluster: Stocks kept of each cluster, at least 1.
    """

    def _scores(self, labels: NDArray[np.int64], returns: Array, embedding: Array | None) -> Array:
        deviation = _deviation(returns)
        return np.where(deviation > 0, -deviation, -np.inf)


@dataclass(frozen=True, kw_only=True)
class MaxMean(_BestOfEachCluster):
    """The largest arithmetic means of daily returns.

    Attributes:
        n_per_cluster: Stocks kept of each cluster, at least 1.
    """

    def _scores(self, labels: NDArray[np.int64], returns: Array, embedding: Array | None) -> Array:
        return returns.mean(0)


@dataclass(frozen=True, kw_only=True)
class Medoid(_BestOfEachCluster):
    """The stocks closest, by Euclidean distance in the embedding, to the mean of their cluster.

    Distances that agree to nine digits of the largest of the cluster count as equal: both stocks of a cluster of two
    are equally far from its centre, and rounding must not choose between them.

    Attributes:
        n_per_cluster: Stocks kept of each cluster, at least 1.
    """

    def _scores(self, labels: NDArray[np.int64], returns: Array, embedding: Array | None) -> Array:
        if embedding is None or embedding.ndim != 2 or len(embedding) != len(labels):
            received = None if embedding is None else embedding.shape
            raise ValueError(f"Medoid needs the embedding ({len(labels)}, D) of the stocks, got {received}")
        _, cluster = np.unique(labels, return_inverse=True)
        centres = np.zeros((cluster.max(initial=-1) + 1, embedding.shape[1]))
        np.add.at(centres, cluster, embedding)
        centres /= np.bincount(cluster)[:, None]
        distance = np.linalg.norm(embedding - centres[cluster], axis=1)
        largest = np.zeros(len(centres))
        np.maximum.at(largest, cluster, distance)
        scaled = np.divide(distance, largest[cluster], out=np.zeros_like(distance), where=largest[cluster] > 0)
        return -np.round(scaled, 9)


@dataclass(frozen=True, kw_only=True)
class RandomPick(_BestOfEachCluster):
    """Stocks by lot: the control that shows what a selection rule is worth.

    Every stock draws a number from a generator seeded by ``(seed, A)``, and the largest of each cluster are picked.
    The draw depends on nothing else, neither on returns nor on earlier calls, so that a walk repeats.

    Attributes:
        n_per_cluster: Stocks kept of each cluster, at least 1.
        seed: Of the draw, at least 0.
    """

    seed: int = 0

    def _scores(self, labels: NDArray[np.int64], returns: Array, embedding: Array | None) -> Array:
        return np.random.default_rng([self.seed, len(labels)]).random(len(labels))
