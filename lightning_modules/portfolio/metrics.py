"""Metrics of daily returns, as published and correct, and of clusters.

r are n simple daily returns, m those of an index on the same days, V_t = prod_{s <= t} (1 + r_s) the value of one unit
invested the day before the first. Standard deviations and covariances divide by n - 1, a year has 252 days. What is
not defined, such as a Sharpe ratio without spread or a deviation of one day, is nan, never infinite.
Source: spec of arXiv 2308.07944, section 6; functions named ``published_`` are what its authors' code computes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm

from lightning_modules.portfolio.market import CONSTANT, TRADING_DAYS, Array, daily_risk_free


def daily_series(returns: ArrayLike, name: str = "returns") -> Array:
    """Check and convert simple daily returns.

    Returns:
        ``(n,) float64``.

    Raises:
        ValueError: If it is not one row of at least one day, or a return is not finite or below -1. All functions of
            this module that take returns raise the same.
    """
    series = np.asarray(returns, dtype=np.float64)
    if series.ndim != 1 or len(series) == 0:
        raise ValueError(f"{name} must be (n,) with at least 1 day, got shape {series.shape}")
    bad = ~(np.isfinite(series) & (series >= -1))
    if bad.any():
        day = int(np.flatnonzero(bad)[0])
        raise ValueError(f"{name} must be finite and at least -1, got {series[day]} on day {day}")
    return series


def _paired(returns: ArrayLike, index_returns: ArrayLike) -> tuple[Array, Array]:
    ours, index = daily_series(returns), daily_series(index_returns, "index_returns")
    if len(ours) != len(index):
        raise ValueError(f"returns and index_returns must cover the same days, got {len(ours)} and {len(index)}")
    return ours, index


def _deviation(series: Array) -> float:
    """Standard deviation; exactly 0 for a constant series, whose rounded one may be above 0; nan for one day.

    Returns are quotients less 1, rounded in units of the quotient: that is what a spread is compared with.
    """
    if len(series) < 2:
        return float("nan")
    constant = np.ptp(series) <= CONSTANT * (1 + np.abs(series).max())
    return 0.0 if constant else float(series.std(ddof=1))


def _ratio(numerator: float, denominator: float) -> float:
    """The quotient, nan where the denominator is 0 to rounding or nan."""
    return float(numerator / denominator) if abs(denominator) > CONSTANT else float("nan")


def annual_return(returns: ArrayLike) -> float:
    """Geometric return of a year, (prod (1 + r))^(252 / n) - 1."""
    series = daily_series(returns)
    return float(np.prod(1 + series) ** (TRADING_DAYS / len(series)) - 1)


def volatility(returns: ArrayLike) -> float:
    """Standard deviation of a year, std(r) sqrt(252)."""
    return _deviation(daily_series(returns)) * TRADING_DAYS**0.5


def sharpe(returns: ArrayLike, *, risk_free: float = 0.03) -> float:
    """Annual Sharpe ratio, (mean(r) - r_f) / std(r) sqrt(252), with r_f the daily rate of ``risk_free`` a year."""
    series = daily_series(returns)
    return _ratio((series.mean() - daily_risk_free(risk_free)) * TRADING_DAYS**0.5, _deviation(series))


def sortino(returns: ArrayLike, *, risk_free: float = 0.03) -> float:
    """Annual Sortino ratio, mean(r - r_f) sqrt(252) / sqrt(mean(min(r - r_f, 0)^2)); nan without a day below r_f."""
    excess = daily_series(returns) - daily_risk_free(risk_free)
    downside = float(np.sqrt(np.mean(np.minimum(excess, 0) ** 2)))
    return _ratio(float(excess.mean()) * TRADING_DAYS**0.5, downside)


def drawdowns(returns: ArrayLike) -> Array:
    """``(n,)`` V_t / max_{s <= t} V_s - 1 at each close, at most 0; the start value V_0 = 1 is the first peak."""
    value = np.cumprod(np.concatenate([[1.0], 1 + daily_series(returns)]))
    return (value / np.maximum.accumulate(value) - 1)[1:]


def max_drawdown(returns: ArrayLike) -> float:
    """The deepest of :func:`drawdowns`, a number from -1 to 0."""
    return float(drawdowns(returns).min())


def calmar(returns: ArrayLike) -> float:
    """Annual return over the depth of the largest drawdown; nan without a drawdown."""
    return _ratio(annual_return(returns), -max_drawdown(returns))


def _longest_run(below: NDArray[np.bool_]) -> int:
    ends = np.flatnonzero(np.diff(np.concatenate([[False], below, [False]])))
    return int(np.diff(ends)[::2].max(initial=0))


def time_under_water(returns: ArrayLike) -> int:
    """Longest run of days on which the value closed below an earlier one, in days; 0 if it never did."""
    return _longest_run(drawdowns(returns) < 0)


def value_at_risk(returns: ArrayLike, *, level: float = 0.95, parametric: bool = False) -> float:
    """Value at risk of a day as a positive loss.

    Historical: minus the (1 - level) quantile of r, linear between days. Parametric: -(mean(r) + z std(r)) with z the
    (1 - level) quantile of the standard normal law.

    Raises:
        ValueError: If ``level`` is not strictly between 0 and 1.
    """
    series = daily_series(returns)
    _check_level(level)
    if parametric:
        return float(-(series.mean() + norm.ppf(1 - level) * _deviation(series)))
    return float(-np.quantile(series, 1 - level))


def conditional_value_at_risk(returns: ArrayLike, *, level: float = 0.95) -> float:
    """Mean loss, as a positive number, of the days whose return is at most the (1 - level) quantile.

    Raises:
        ValueError: If ``level`` is not strictly between 0 and 1.
    """
    series = daily_series(returns)
    _check_level(level)
    return float(-series[series <= np.quantile(series, 1 - level)].mean())


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level}")


def hit_rate(returns: ArrayLike) -> float:
    """Share of days with a return above 0."""
    return float((daily_series(returns) > 0).mean())


def beta(returns: ArrayLike, index_returns: ArrayLike) -> float:
    """cov(r, m) / var(m); nan where the index has no spread."""
    ours, index = _paired(returns, index_returns)
    if _deviation(index) == 0 or len(ours) < 2:
        return float("nan")
    covariance = np.cov(ours, index)
    return float(covariance[0, 1] / covariance[1, 1])


class Alpha(NamedTuple):
    """Outcome of :func:`capm_alpha`."""

    alpha: float
    """Of a year, 252 a."""
    beta: float
    t_value: float
    """a over its Newey-West standard error."""
    n_lags: int


def capm_alpha(
    returns: ArrayLike, index_returns: ArrayLike, *, risk_free: float = 0.03, n_lags: int | None = None
) -> Alpha:
    """Alpha of the regression r - r_f = a + b (m - r_f) + e by least squares, with a Newey-West t value.

    With X = [1, m - r_f] and Bartlett weights, Cov(a, b) = (X'X)^-1 S (X'X)^-1 and
    S = sum_{|j| <= L} (1 - |j| / (L + 1)) sum_t e_t e_{t-j} x_t x_{t-j}'; no small-sample factor.

    Args:
        returns: ``(n,)`` of the portfolio.
        index_returns: ``(n,)`` of the index on the same days.
        risk_free: Annual.
        n_lags: L, from 0 to n - 1; by default floor(4 (n / 100)^(2/9)).

    Returns:
        The annual alpha, beta, t value and lags. All nan with fewer than 3 days or an index without spread; the t value
        is nan where the fit is exact to rounding.

    Raises:
        ValueError: If the days differ or ``n_lags`` is out of range.

    Source: W. Newey, K. West, Econometrica 55 (1987); the rule for lags, Review of Economic Studies 61 (1994).
    """
    ours, index = _paired(returns, index_returns)
    n_days = len(ours)
    lags = min(int(4 * (n_days / 100) ** (2 / 9)), n_days - 1) if n_lags is None else n_lags
    if not 0 <= lags < n_days:
        raise ValueError(f"n_lags must be from 0 to {n_days - 1}, got {n_lags}")
    if n_days < 3 or _deviation(index) == 0:
        return Alpha(float("nan"), float("nan"), float("nan"), lags)
    rate = daily_risk_free(risk_free)
    design = np.column_stack([np.ones(n_days), index - rate])
    (a, b), *_ = np.linalg.lstsq(design, ours - rate, rcond=None)
    residual = ours - rate - design @ (a, b)
    # Weight each row by its share in a, so that the sandwich is one long-run variance of a scalar series.
    influence = (np.linalg.pinv(design)[0]) * residual
    variance = influence @ influence
    for lag in range(1, lags + 1):
        variance += 2 * (1 - lag / (lags + 1)) * (influence[lag:] @ influence[:-lag])
    exact = np.abs(residual).max() <= 1e-14 * max(1.0, np.abs(ours).max())
    t_value = float("nan") if exact or variance <= 0 else float(a / np.sqrt(variance))
    return Alpha(float(TRADING_DAYS * a), float(b), t_value, lags)


def turnover_per_year(turnover: ArrayLike, n_days: int) -> float:
    """Trades of a year, 252 / n sum_p turnover_p, without the first, which builds the portfolio.

    Args:
        turnover: ``(P,)`` sum of |target - drifted| at each rebalance: bought and sold both count.
        n_days: n, at least 1.

    Raises:
        ValueError: If ``n_days`` is below 1.
    """
    if n_days < 1:
        raise ValueError(f"n_days must be at least 1, got {n_days}")
    return float(np.asarray(turnover, dtype=np.float64)[1:].sum() * TRADING_DAYS / n_days)


def cost_drag(gross_returns: ArrayLike, returns: ArrayLike) -> float:
    """What costs take of the annual return: that of the gross returns minus that of the net ones."""
    return annual_return(gross_returns) - annual_return(returns)


def effective_number(weights: ArrayLike) -> Any:
    """Effective number of stocks, 1 / sum w^2, of weights ``(..., A)``; shape ``(...)``, nan where all are 0."""
    squares = np.square(np.asarray(weights, dtype=np.float64)).sum(-1)
    number = np.divide(1.0, squares, out=np.full_like(squares, np.nan), where=squares > 0)
    return number if number.ndim else float(number)


def summary(returns: ArrayLike, *, risk_free: float = 0.03, index_returns: ArrayLike | None = None) -> dict[str, float]:
    """Every correct metric of daily returns by name; with ``index_returns`` also beta, alpha and its t value.

    Args:
        returns: ``(n,)``.
        risk_free: Annual.
        index_returns: ``(n,)`` of the index on the same days.
    """
    found = {
        "annual_return": annual_return(returns),
        "volatility": volatility(returns),
        "sharpe": sharpe(returns, risk_free=risk_free),
        "sortino": sortino(returns, risk_free=risk_free),
        "calmar": calmar(returns),
        "max_drawdown": max_drawdown(returns),
        "days_under_water": float(time_under_water(returns)),
        "value_at_risk": value_at_risk(returns),
        "parametric_value_at_risk": value_at_risk(returns, parametric=True),
        "conditional_value_at_risk": conditional_value_at_risk(returns),
        "hit_rate": hit_rate(returns),
        "n_days": float(len(daily_series(returns))),
    }
    if index_returns is not None:
        fit = capm_alpha(returns, index_returns, risk_free=risk_free)
        found |= {"beta": fit.beta, "alpha": fit.alpha, "alpha_t_value": fit.t_value}
    return found


def published_return(returns: ArrayLike) -> float:
    """(1 + mean(r))^252 - 1."""
    return float((1 + daily_series(returns).mean()) ** TRADING_DAYS - 1)


def published_risk(returns: ArrayLike) -> float:
    """(1 + std(r))^sqrt(252) - 1, above the volatility."""
    return (1 + _deviation(daily_series(returns))) ** TRADING_DAYS**0.5 - 1


def published_sharpe(returns: ArrayLike, *, risk_free: float = 0.03) -> float:
    """Daily Sharpe ratio, (mean(r) - r_f) / std(r): the annual one over sqrt(252)."""
    return sharpe(returns, risk_free=risk_free) / TRADING_DAYS**0.5


def published_beta(returns: ArrayLike, index_returns: ArrayLike) -> float:
    """cov(r, m) / var(r): the variance of the wrong series; nan where r has no spread."""
    ours, index = _paired(returns, index_returns)
    return beta(index, ours)


def published_alpha(returns: ArrayLike, index_returns: ArrayLike, *, risk_free: float = 0.03) -> float:
    """Daily alpha with the published beta, mean(r) - r_f - beta (mean(m) - r_f)."""
    ours, index = _paired(returns, index_returns)
    rate = daily_risk_free(risk_free)
    return float(ours.mean() - rate - published_beta(ours, index) * (index.mean() - rate))


def published_value_at_risk(returns: ArrayLike) -> float:
    """-1.65 std(r), a negative number that ignores the mean."""
    return -1.65 * _deviation(daily_series(returns))


def published_drawdown(returns: ArrayLike) -> float:
    """The deepest drawdown in percent; the first close is the first peak, so a loss on the first day is not seen."""
    # With a first return of 0 the start value is the first close.
    return 100 * max_drawdown(np.concatenate([[0.0], daily_series(returns)[1:]]))


def published_recovery(returns: ArrayLike) -> int:
    """Longest run of days below the close before the run, in days, from the first close on."""
    return time_under_water(np.concatenate([[0.0], daily_series(returns)[1:]]))


def clustering_scores(
    embedding: Array, labels: NDArray[np.int64], sectors: NDArray[np.int64] | None = None
) -> dict[str, float]:
    """How compact clusters are, and how far they agree with sectors; scikit-learn's definitions.

    Args:
        embedding: ``(A, D) float64``, standardised over stocks.
        labels: ``(A,) int64``; stocks with -1 are left out.
        sectors: ``(A,) int64``, -1 where unknown; such stocks are left out of ``homogeneity``.

    Returns:
        ``silhouette`` (-1 to 1), ``davies_bouldin`` (0 is best) and ``calinski_harabasz`` (large is good; the
        published HC): nan with fewer than 2 clusters, with as many as stocks, or where no cluster has spread. With
        ``sectors``, ``homogeneity`` (0 to 1): 1 - H(sector | cluster) / H(sector).

    Raises:
        ValueError: If shapes differ or the embedding is not finite.
    """
    if embedding.ndim != 2 or labels.shape != embedding.shape[:1] or not np.isfinite(embedding).all():
        raise ValueError(
            f"scores need a finite embedding (A, D) and labels (A,), got {embedding.shape}, {labels.shape}"
        )
    if sectors is not None and sectors.shape != labels.shape:
        raise ValueError(f"sectors must be one for each of {len(labels)} stocks, got shape {sectors.shape}")
    from sklearn import metrics as sklearn_metrics

    kept = labels >= 0
    values, groups = embedding[kept], labels[kept]
    names, first = np.unique(groups, return_index=True)
    spread = bool((values != values[first][np.searchsorted(names, groups)]).any())
    scorers: dict[str, Callable[[Array, NDArray[np.int64]], float]] = {
        "silhouette": sklearn_metrics.silhouette_score,
        "davies_bouldin": sklearn_metrics.davies_bouldin_score,
        "calinski_harabasz": sklearn_metrics.calinski_harabasz_score,
    }
    defined = spread and 2 <= len(names) < len(groups)
    scores = {name: float(score(values, groups)) if defined else float("nan") for name, score in scorers.items()}
    if sectors is not None:
        known = kept & (sectors >= 0)
        defined = bool(known.any())
        homogeneity = sklearn_metrics.homogeneity_score(sectors[known], labels[known]) if defined else float("nan")
        scores["homogeneity"] = float(homogeneity)
    return scores


def adjusted_rand(labels: NDArray[np.int64], others: NDArray[np.int64]) -> float:
    """Adjusted Rand index of two clusterings of the same stocks ``(A,)``: 1 if equal up to names, 0 by chance.

    Raises:
        ValueError: If shapes differ.
    """
    if labels.ndim != 1 or labels.shape != others.shape:
        raise ValueError(f"two clusterings must be of the same stocks (A,), got {labels.shape} and {others.shape}")
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(labels, others))


def variance_explained(labels: NDArray[np.int64], values: ArrayLike) -> float:
    """Share of the variance of a value over stocks that lies between clusters (eta squared).

    sum_c n_c (mean_c - mean)^2 / sum_i (v_i - mean)^2, of the stocks whose label is not -1.

    Args:
        labels: ``(A,) int64``.
        values: ``(A,)``, such as the train volatility of each stock.

    Returns:
        From 0 to 1; nan where the values do not vary.

    Raises:
        ValueError: If shapes differ or a value is not finite.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 1 or table.shape != labels.shape or not np.isfinite(table).all():
        raise ValueError(f"values must be finite, one for each of {len(labels)} stocks, got shape {table.shape}")
    kept = labels >= 0
    if not kept.any() or np.ptp(table[kept]) == 0:
        return float("nan")
    centred = table[kept] - table[kept].mean()
    _, cluster = np.unique(labels[kept], return_inverse=True)
    sums, counts = np.bincount(cluster, centred), np.bincount(cluster)
    return float((sums**2 / counts).sum() / (centred @ centred))
