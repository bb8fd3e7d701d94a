"""Rules that weigh the stocks picked: long only, fully invested, from their past returns.

T days, k stocks. Every rule gives weights of at least 0 that sum to 1, and says in flags whatever went other than
asked for. Estimates of a year: mu = 252 ((prod_t (1 + r_t))^(1/T) - 1) and Sigma = 252 Cov (divisor T - 1).
A constant series is a stock that did not trade, not one without risk: rules that estimate risk give it weight 0.
Source: spec of arXiv 2308.07944, section 5, step 4 and the table of modes.
"""

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import linkage
from scipy.optimize import minimize
from scipy.spatial.distance import squareform

from lightning_modules.portfolio.market import CONSTANT, RISK_FREE, TRADING_DAYS, Array, daily_risk_free
from lightning_modules.portfolio.mean_variance import largest_mean, minimise_variance, onto_capped_simplex


class Weights(NamedTuple):
    """Weights ``(k,) float64``, at least 0, sum 1; flags say what went other than asked for."""

    weights: Array
    flags: tuple[str, ...] = ()


class Weighting(Protocol):
    """Anything that weighs stocks."""

    def __call__(self, returns: Array, labels: NDArray[np.int64]) -> Weights:
        """Weights ``(k,)`` from returns ``(T, k)`` and clusters ``(k,)``."""


def annual_moments(returns: Array) -> tuple[Array, Array]:
    """Mean ``(k,)`` and covariance ``(k, k)`` of a year from daily returns ``(T, k)``, as the module says."""
    growth = np.prod(1 + returns, axis=0) ** (1 / len(returns))
    return TRADING_DAYS * (growth - 1), TRADING_DAYS * np.atleast_2d(np.cov(returns, rowvar=False))


def _check_returns(returns: Array, labels: NDArray[np.int64]) -> None:
    if returns.ndim != 2 or len(returns) < 2 or returns.shape[1] < 1 or labels.shape != returns.shape[1:]:
        raise ValueError(
            f"weights need returns (T, k) of at least 2 days and 1 stock, and labels (k,), got {returns.shape} and "
            f"{labels.shape}"
        )
    bad = ~(np.isfinite(returns) & (returns >= -1))
    if bad.any():
        day, stock = np.argwhere(bad)[0]
        raise ValueError(
            f"returns must be finite and at least -1, got {returns[day, stock]} on day {day} of stock {stock}"
        )


def _check_cap(max_weight: float) -> None:
    if not 0 < max_weight <= 1:
        raise ValueError(f"max_weight must be above 0 and at most 1, got {max_weight}")


def _raised_cap(max_weight: float, n_stocks: int) -> tuple[float, tuple[str, ...]]:
    """A cap under which the weights of so few stocks can sum to 1."""
    if max_weight * n_stocks >= 1:
        return max_weight, ()
    return 1 / n_stocks, (f"max_weight: raised from {max_weight:g} to 1/{n_stocks}, or the weights could not sum to 1",)


def _equal(n_stocks: int) -> Array:
    return np.full(n_stocks, 1 / n_stocks)


class _RiskRule(ABC):
    """A rule that estimates risk, and so leaves out stocks that did not trade."""

    def __call__(self, returns: Array, labels: NDArray[np.int64]) -> Weights:
        """Weigh stocks.

        Args:
            returns: ``(T, k) float64`` simple daily returns, finite, at least -1, T at least 2.
            labels: ``(k,) int64`` cluster of each stock, -1 for none.

        Returns:
            Weights ``(k,)`` and flags.

        Raises:
            ValueError: If shapes or returns are not as stated.
        """
        _check_returns(returns, labels)
        n_stocks = returns.shape[1]
        moving = np.ptp(returns, axis=0) > CONSTANT
        if moving.all():
            return self._weigh(returns)
        if not moving.any():
            return Weights(_equal(n_stocks), (f"constant: all {n_stocks} series, equal weight instead",))
        part = self._weigh(returns[:, moving])
        weights = np.zeros(n_stocks)
        weights[moving] = part.weights
        return Weights(weights, (f"constant: {(~moving).sum()} of {n_stocks} series get weight 0", *part.flags))

    @abstractmethod
    def _weigh(self, returns: Array) -> Weights:
        """Weights of stocks whose returns all vary."""


@dataclass(frozen=True, kw_only=True)
class EqualWeight:
    """1/k."""

    def __call__(self, returns: Array, labels: NDArray[np.int64]) -> Weights:
        """Weigh stocks; arguments and errors as for all rules."""
        _check_returns(returns, labels)
        return Weights(_equal(returns.shape[1]))


@dataclass(frozen=True, kw_only=True)
class InverseVolatility(_RiskRule):
    """Proportional to 1 / standard deviation."""

    def _weigh(self, returns: Array) -> Weights:
        inverse = 1 / returns.std(0, ddof=1)
        return Weights(inverse / inverse.sum())


@dataclass(frozen=True, kw_only=True)
class MinimumVariance(_RiskRule):
    """Least w'Sigma w with sum w = 1 and 0 <= w <= max_weight, solved by Clarabel.

    Another status of the solver than solved gives equal weight and a flag that names it.

    Attributes:
        max_weight: Cap of a weight, in (0, 1]; raised to 1/k, with a flag, where k of them would not reach 1.
    """

    max_weight: float = 0.3

    def __post_init__(self) -> None:
        _check_cap(self.max_weight)

    def _weigh(self, returns: Array) -> Weights:
        mean, covariance = annual_moments(returns)
        return self._solve(mean, covariance, -np.inf)

    def _solve(self, mean: Array, covariance: Array, target: float) -> Weights:
        cap, flags = _raised_cap(self.max_weight, len(mean))
        reachable = largest_mean(mean, cap)
        if reachable < target:
            reason = f"infeasible: a mean of at most {reachable:.4g} a year against a target of {target:.4g}"
            target, flags = -np.inf, (*flags, f"{reason}, minimum variance instead")
        weights, status = minimise_variance(covariance, mean, target, cap)
        if weights is None:
            return Weights(_equal(len(mean)), (*flags, f"solver: {status}, equal weight instead"))
        return Weights(weights, flags)


@dataclass(frozen=True, kw_only=True)
class MeanVariance(MinimumVariance):
    """Least w'Sigma w with mu'w >= annual_target, sum w = 1 and 0 <= w <= max_weight, solved by Clarabel.

    A target that no such weights reach gives those of minimum variance and a flag ``"infeasible: ..."``. Another
    status of the solver than solved gives equal weight and a flag that names it.

    Attributes:
        max_weight: Cap of a weight, in (0, 1]; raised to 1/k, with a flag, where k of them would not reach 1.
        annual_target: Least mean of a year; None is the risk-free rate of the model, and 0.03 without one.
    """

    annual_target: float | None = None

    def _weigh(self, returns: Array) -> Weights:
        mean, covariance = annual_moments(returns)
        return self._solve(mean, covariance, RISK_FREE if self.annual_target is None else self.annual_target)


@dataclass(frozen=True, kw_only=True)
class PublishedMeanVariance:
    """The published optimiser, faults included: least w'Sigma w with mu'w = target, sum w = 1, 0 <= w <= max_weight.

    The target is a *daily* rate while mu is of a year, and it is met by equality. Where every stock has a larger mean
    there are no such weights: SLSQP, started at equal weight, stops at its limit of iterations, its status is not
    looked at, and the weights sit on a vertex, such as (0.3, 0.3, 0.3, 0.1) on the four lowest means.
    Whatever the solver returns is clipped to the bounds and then moved within them until the sum is 1.

    Attributes:
        max_weight: Cap of a weight, in (0, 1]; raised to 1/k, with a flag, where k of them would not reach 1.
        target: Asked of mu'w; published 1.03^(1/252) - 1.
        n_iterations: Limit of SLSQP, at least 1; published 100.
    """

    max_weight: float = 0.3
    target: float = daily_risk_free(RISK_FREE)
    n_iterations: int = 100

    def __post_init__(self) -> None:
        _check_cap(self.max_weight)
        if self.n_iterations < 1:
            raise ValueError(f"n_iterations must be at least 1, got {self.n_iterations}")

    def __call__(self, returns: Array, labels: NDArray[np.int64]) -> Weights:
        """Weigh stocks; arguments and errors as for all rules."""
        _check_returns(returns, labels)
        mean, covariance = annual_moments(returns)
        cap, flags = _raised_cap(self.max_weight, len(mean))
        with warnings.catch_warnings():
            # SLSQP warns when a step leaves the bounds, which the infeasible problem makes it do.
            warnings.simplefilter("ignore", RuntimeWarning)
            found = minimize(
                lambda w: w @ covariance @ w,
                _equal(len(mean)),
                jac=lambda w: 2 * covariance @ w,
                method="SLSQP",
                bounds=[(0, cap)] * len(mean),
                constraints=[
                    {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones_like(w)},
                    {"type": "eq", "fun": lambda w: mean @ w - self.target, "jac": lambda w: mean},
                ],
                options={"maxiter": self.n_iterations},
            )
        if not np.isfinite(found.x).all():
            return Weights(_equal(len(mean)), (*flags, "solver: weights are not finite, equal weight instead"))
        return Weights(onto_capped_simplex(found.x, cap), flags)


@dataclass(frozen=True, kw_only=True)
class HierarchicalRiskParity(_RiskRule):
    """Hierarchical risk parity.

    1. Single linkage on the distance d = sqrt((1 - rho) / 2) of correlations rho.
    2. Stocks in the order of the leaves of that tree.
    3. From the whole list down: halve it; with v the variance of a half under inverse-variance weights, the first
       half gets 1 - v_1 / (v_1 + v_2) of the weight, the second the rest.

    The order of the leaves is free up to swaps at the branches, on which step 3 depends: the branch that holds the
    stock of least variance comes first, so that the weights do not depend on the order of columns.

    Source: M. Lopez de Prado, "Building diversified portfolios that outperform out of sample", Journal of Portfolio
    Management 42 (2016). Departures: linkage on d itself, not on the distances between its columns; order of branches.
    """

    def _weigh(self, returns: Array) -> Weights:
        covariance = np.atleast_2d(np.cov(returns, rowvar=False))
        variance = np.diag(covariance)
        n_stocks = len(variance)
        if n_stocks == 1:
            return Weights(np.ones(1))
        correlation = covariance / np.sqrt(np.outer(variance, variance))
        distance = np.sqrt(np.clip(1 - correlation, 0, 2) / 2)
        order = _leaves(linkage(squareform(distance, checks=False), "single"), variance)
        covariance = covariance[np.ix_(order, order)]
        weights = np.ones(n_stocks)
        lists = [(0, n_stocks)]
        while lists:
            start, stop = lists.pop()
            if stop - start < 2:
                continue
            middle = start + (stop - start) // 2
            halves = [(start, middle), (middle, stop)]
            first, second = (_inverse_variance_risk(covariance[a:b, a:b]) for a, b in halves)
            weights[start:middle] *= second / (first + second)
            weights[middle:stop] *= first / (first + second)
            lists += halves
        weights[order] = weights.copy()
        return Weights(weights / weights.sum())


def _leaves(links: Array, variance: Array) -> list[int]:
    """Leaves of a linkage from left to right, the branch with the least variance first."""
    members = [[leaf] for leaf in range(len(variance))]
    least = variance.tolist()
    for first, second in links[:, :2].astype(np.int64):
        left, right = (second, first) if least[second] < least[first] else (first, second)
        members.append(members[left] + members[right])
        least.append(least[left])
    return members[-1]


def _inverse_variance_risk(covariance: Array) -> float:
    inverse = 1 / np.diag(covariance)
    weights = inverse / inverse.sum()
    return float(weights @ covariance @ weights)


@dataclass(frozen=True, kw_only=True)
class NestedClusters:
    """Nested clustered optimisation: weights inside each cluster, then weights of the clusters' portfolios.

    w_i = W_c v_i for stock i of cluster c, with v the inner weights, and W the outer ones of the series sum_i v_i r_i.
    Each stock with label -1 is a cluster of its own. A cap of ``outer`` bounds clusters, one of ``inner`` the share of
    a stock in its cluster: a cap of 0.3 inside clusters of two would always give half and half.

    Source: M. Lopez de Prado, "A robust estimator of the efficient frontier" (2019), SSRN 3469961.

    Attributes:
        inner: Rule inside clusters, such as ``MinimumVariance(max_weight=1)``.
        outer: Rule between clusters.
    """

    inner: Weighting
    outer: Weighting

    def __call__(self, returns: Array, labels: NDArray[np.int64]) -> Weights:
        """Weigh stocks; arguments and errors as for all rules."""
        _check_returns(returns, labels)
        alone = labels < 0
        own = labels.max(initial=-1) + 1 + np.arange(alone.sum())
        cluster = labels.copy()
        cluster[alone] = own
        names, cluster = np.unique(cluster, return_inverse=True)
        inside = np.zeros((len(cluster), len(names)))
        flags: list[str] = []
        for column, name in enumerate(names):
            stocks = np.flatnonzero(cluster == column)
            found = self.inner(returns[:, stocks], labels[stocks])
            inside[stocks, column] = found.weights
            flags += [f"inside cluster {name}: {flag}" for flag in found.flags]
        between = self.outer(returns @ inside, np.arange(len(names)))
        flags += [f"between clusters: {flag}" for flag in between.flags]
        return Weights(inside @ between.weights, tuple(flags))
