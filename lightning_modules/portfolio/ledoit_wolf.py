"""Ledoit and Wolf's test that two Sharpe ratios are equal.

n days, S resamples. Sharpe ratios, (mean(r) - r_f) / std(r), are daily inside and annual, times sqrt(252), in results.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm

from lightning_modules.portfolio.inference import ANNUAL
from lightning_modules.portfolio.market import Array, daily_risk_free
from lightning_modules.portfolio.metrics import daily_series

FEWEST_DAYS = 4
"""Days below which the variance of a Sharpe ratio cannot be estimated."""


class SharpeTest(NamedTuple):
    """Outcome of :func:`ledoit_wolf_test`."""

    difference: float
    """Annual Sharpe ratio of the first series minus that of the second."""
    standard_error: float
    """Of the difference, annual."""
    p_value: float
    """Two-sided, from the normal law."""
    bootstrap_p_value: float
    """Two-sided, from the studentised bootstrap; nan where none was asked for."""


def _difference_and_gradient(moments: Array) -> tuple[Array, Array]:
    """Daily Sharpe difference ``(...)`` and its gradient ``(..., 4)`` at moments (E a, E b, E a^2, E b^2) ``(..., 4)``.

    f = m_a / sqrt(q_a - m_a^2) - m_b / sqrt(q_b - m_b^2); df/dm = +-q / (q - m^2)^1.5, df/dq = -+m / 2 (q - m^2)^1.5.
    """
    mean, square = moments[..., :2], moments[..., 2:]
    variance = square - mean**2
    # A resample of one day over and over has no Sharpe ratio.
    deviation = np.sqrt(np.where(variance > 1e-12 * square, variance, np.nan))
    sign = np.array([1.0, -1.0])
    gradient = np.concatenate([sign * square / deviation**3, -sign * mean / (2 * deviation**3)], axis=-1)
    return (sign * mean / deviation).sum(-1), gradient


def _long_run_variance(influence: Array) -> float:
    """Long-run variance of a series of mean 0: quadratic-spectral kernel after prewhitening by an AR(1).

    The bandwidth is that of Andrews for the prewhitened series, 1.3221 (alpha n)^(1/5), alpha = 4 q^2 / (1 - q)^4 with
    q its first autocorrelation.

    Source: D. Andrews, Econometrica 59 (1991); D. Andrews, J. Monahan, Econometrica 60 (1992).
    """

    def autoregression(series: Array) -> float:
        # Away from 1, beyond which neither recolouring nor the bandwidth means anything (Andrews and Monahan).
        return float(np.clip(series[1:] @ series[:-1] / (series[:-1] @ series[:-1]), -0.97, 0.97))

    n_days = len(influence)
    slope = autoregression(influence)
    white = influence[1:] - slope * influence[:-1]
    rest = autoregression(white) if (white[:-1] != 0).any() else 0.0
    covariances = np.correlate(white, white, "full")[len(white) - 1 :] / n_days
    bandwidth = 1.3221 * (4 * rest**2 / (1 - rest) ** 4 * n_days) ** 0.2
    angle = 1.2 * np.pi * np.arange(1, len(white)) / max(bandwidth, 1e-8)
    kernel = 3 / angle**2 * (np.sin(angle) / angle - np.cos(angle))
    return float((covariances[0] + 2 * kernel @ covariances[1:]) / (1 - slope) ** 2)


def ledoit_wolf_test(
    returns: ArrayLike,
    baseline: ArrayLike,
    *,
    risk_free: float = 0.03,
    n_resamples: int | None = None,
    block: int = 10,
    seed: int = 0,
) -> SharpeTest:
    """Test that two Sharpe ratios are equal, robust to heavy tails and to dependence over time.

    By the delta method on v = (E a, E b, E a^2, E b^2) of excess returns, the standard error of the difference f(v) is
    sqrt(L / n), L the long-run variance of the series f'(v) (a_t, b_t, a_t^2, b_t^2). With ``n_resamples`` also by the
    circular block bootstrap: p = (1 + #{|d* - d| / s* >= |d| / s}) / (S + 1), with s* from the sums of blocks.

    Args:
        returns: ``(n,)`` simple daily returns, n at least ``FEWEST_DAYS``.
        baseline: ``(n,)`` on the same days.
        risk_free: Annual.
        n_resamples: S of the bootstrap, None for none.
        block: Length of its blocks in days, from 1 to n / 2.
        seed: Of its draw.

    Returns:
        Difference, standard error and p values, all nan where a series has no spread. Series whose ratios cannot
        differ, as they are equal or one is the other with leverage, have p = 1.

    Raises:
        ValueError: If lengths differ, a return is not finite or below -1, or an argument is out of range.

    Source: O. Ledoit, M. Wolf, "Robust performance hypothesis testing with the Sharpe ratio", Journal of Empirical
    Finance 15 (2008). Departure: kernel, bandwidth and prewhitening are applied to the scalar series above, so that
    they do not depend on the units of the four moments. Variances divide by n here, as in the paper.
    """
    ours, theirs = daily_series(returns), daily_series(baseline, "baseline")
    n_days = len(ours)
    if n_days != len(theirs) or n_days < FEWEST_DAYS:
        raise ValueError(
            f"both series must cover the same days, at least {FEWEST_DAYS}, got {n_days} and {len(theirs)}"
        )
    if n_resamples is not None and (n_resamples < 1 or not 1 <= block <= n_days // 2):
        raise ValueError(
            f"n_resamples must be at least 1 and block from 1 to {n_days // 2}, got {n_resamples} and {block}"
        )
    nan = float("nan")
    if np.ptp(ours) == 0 or np.ptp(theirs) == 0:
        return SharpeTest(nan, nan, nan, nan)
    excess = np.column_stack([ours, theirs]) - daily_risk_free(risk_free)
    rows = np.concatenate([excess, excess**2], axis=1)  # (n, 4)
    difference, gradient = _difference_and_gradient(rows.mean(0))
    influence = (rows - rows.mean(0)) @ gradient
    if np.abs(influence).max() < 1e-9:  # zero to rounding, against about 1 otherwise
        return SharpeTest(0.0, 0.0, 1.0, nan if n_resamples is None else 1.0)
    error = float(np.sqrt(_long_run_variance(influence) / n_days))
    statistic = float(abs(difference)) / error
    p_bootstrap = nan
    if n_resamples is not None:
        resampled, errors = _block_resamples(rows, n_resamples, block, seed)
        extreme = np.abs(resampled - difference) >= statistic * errors  # a nan, without spread, is not extreme
        p_bootstrap = float((1 + extreme.sum()) / (n_resamples + 1))
    return SharpeTest(float(difference * ANNUAL), error * ANNUAL, float(2 * norm.sf(statistic)), p_bootstrap)


def _block_resamples(rows: Array, n_resamples: int, block: int, seed: int) -> tuple[Array, Array]:
    """Daily Sharpe differences ``(S,)`` of circular block resamples of rows ``(n, 4)``, and their standard errors.

    A resample of l = floor(n / block) blocks has standard error sqrt(mean_j z_j^2 / (l block)), with z_j the sum of
    the influence series over block j, over sqrt(block).
    """
    n_days = len(rows)
    n_blocks = n_days // block
    cumulated = np.concatenate([np.zeros((1, 4)), np.cumsum(np.concatenate([rows, rows[: block - 1]]), axis=0)])
    block_means = (cumulated[block:] - cumulated[:-block]) / block  # (n, 4), of the block that starts on each day
    drawn = block_means[np.random.default_rng(seed).integers(n_days, size=(n_resamples, n_blocks))]
    moments = drawn.mean(1)
    differences, gradient = _difference_and_gradient(moments)
    scores = np.einsum("slm,sm->sl", drawn - moments[:, None], gradient) * block**0.5
    return differences, np.sqrt(np.mean(scores**2, axis=1) / (n_blocks * block))
