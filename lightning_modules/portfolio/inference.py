"""How sure a Sharpe ratio is: intervals by the stationary bootstrap, and deflation for the number of trials.

n days, M tracks, S resamples. Sharpe ratios are annual, (mean(r) - r_f) / std(r) sqrt(252), except where a function
says daily.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm

from lightning_modules.metrics.bootstrap import CHUNK_BYTES, Interval
from lightning_modules.portfolio.market import TRADING_DAYS, Array, daily_risk_free
from lightning_modules.portfolio.metrics import daily_series, sharpe

FEWEST_DAYS = 20
"""Days below which no interval is given: resamples of so few are hardly more than the days themselves over again."""

MOST_UNDEFINED = 0.05
"""Share of resamples without a ratio above which no interval is given: the others are not like those left out."""

ANNUAL = TRADING_DAYS**0.5
"""Of a daily Sharpe ratio makes an annual one."""


def stationary_bootstrap(
    n_days: int, n_resamples: int, *, mean_block: float = 10.0, seed: int = 0
) -> Iterator[NDArray[np.int64]]:
    """Days drawn by the stationary bootstrap, in chunks of resamples that fit in memory.

    The first day of a resample is uniform; each further one is, with probability p = 1 / mean_block, uniform anew, else
    the day after the one before, the first following the last. Blocks have geometric lengths of mean 1 / p.

    Args:
        n_days: n, at least 1.
        n_resamples: S, at least 1.
        mean_block: Mean length of a block in days, at least 1; 1 is the bootstrap of independent days.
        seed: Of the draw, which does not depend on the size of chunks.

    Yields:
        ``(at most S, n) int64`` days from 0 to n - 1; S rows in all.

    Raises:
        ValueError: If an argument is out of range.

    Source: D. Politis, J. Romano, "The stationary bootstrap", JASA 89 (1994).
    """
    if n_days < 1 or n_resamples < 1:
        raise ValueError(f"n_days and n_resamples must be at least 1, got {n_days} and {n_resamples}")
    if not (np.isfinite(mean_block) and mean_block >= 1):
        raise ValueError(f"mean_block must be at least 1 day, got {mean_block}")
    # One generator for ends of blocks, one for their starts: the cut into chunks must not interleave them.
    ends, starts = (np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(2))
    offset = np.arange(n_days)
    chunk = max(1, CHUNK_BYTES // (40 * n_days))  # five arrays of 8 bytes a day
    for begun in range(0, n_resamples, chunk):
        shape = (min(chunk, n_resamples - begun), n_days)
        anew = ends.random(shape) < 1 / mean_block
        anew[:, 0] = True
        block_start = np.maximum.accumulate(np.where(anew, offset, 0), axis=1)
        drawn = np.take_along_axis(starts.integers(n_days, size=shape), block_start, axis=1)
        yield (drawn + offset - block_start) % n_days


def _resampled_sharpes(tracks: Array, rate: float, n_resamples: int, mean_block: float, seed: int) -> Array:
    """Annual Sharpe ratios ``(S, M)`` of resamples of tracks ``(n, M)``, all on the same days; nan without spread."""
    n_days = len(tracks)
    centre = tracks.mean(0)
    # About the mean, so that the variance does not lose digits as a difference of large moments.
    centred = tracks - centre
    moments = np.concatenate([centred, centred**2], axis=1)
    found = []
    for days in stationary_bootstrap(n_days, n_resamples, mean_block=mean_block, seed=seed):
        flat = days + np.arange(len(days))[:, None] * n_days
        times = np.bincount(flat.ravel(), minlength=flat.size).reshape(flat.shape)
        first, second = np.split(times.astype(np.float64) @ moments / n_days, 2, axis=1)
        variance = (second - first**2) * n_days / max(n_days - 1, 1)
        # A resample of one day over and over has none but rounding.
        spread = variance > 1e-12 * second
        deviation = np.sqrt(np.where(spread, variance, np.nan))
        found.append((first + centre - rate) / deviation * ANNUAL)
    return np.concatenate(found)


def _tracks(tracks: Mapping[str, ArrayLike], n_resamples: int, level: float) -> Array:
    if not tracks:
        raise ValueError("tracks must hold at least one series, got none")
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level}")
    series = {name: daily_series(returns, name) for name, returns in tracks.items()}
    lengths = {len(returns) for returns in series.values()}
    if len(lengths) > 1:
        raise ValueError(f"tracks must cover the same days, got lengths {sorted(lengths)}")
    return np.stack(list(series.values()), axis=1)


def _interval(estimate: float, resampled: Array, level: float, n_days: int) -> Interval:
    """Percentile interval; resamples without spread have no Sharpe ratio and are left out."""
    defined = resampled[~np.isnan(resampled)]
    if np.isnan(estimate) or n_days < FEWEST_DAYS or len(defined) < (1 - MOST_UNDEFINED) * len(resampled):
        return Interval(estimate, float("nan"), float("nan"))
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high))


def sharpe_intervals(
    tracks: Mapping[str, ArrayLike],
    *,
    risk_free: float = 0.03,
    n_resamples: int = 2000,
    mean_block: float = 10.0,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Annual Sharpe ratio of each track with its percentile interval of the stationary bootstrap.

    All tracks share one draw of days, so that a track's interval does not depend on the others.

    Args:
        tracks: ``{name: (n,) simple daily returns}`` on the same days.
        risk_free: Annual.
        n_resamples: S, at least 1.
        mean_block: Mean length of a block in days.
        seed: Of the draw.
        level: Coverage, strictly between 0 and 1.

    Returns:
        ``{name: (Sharpe ratio, low, high)}``, all nan where a track has no spread; low and high are nan with fewer than
        20 days or where more than 5 % of resamples have no spread.

    Raises:
        ValueError: If there is no track, lengths differ, a return is not finite or below -1, or another argument is out
            of range.

    Source: percentile interval of the bootstrap of D. Politis and J. Romano (1994).
    """
    table = _tracks(tracks, n_resamples, level)
    resampled = _resampled_sharpes(table, daily_risk_free(risk_free), n_resamples, mean_block, seed)
    return {
        name: _interval(sharpe(table[:, column], risk_free=risk_free), resampled[:, column], level, len(table))
        for column, name in enumerate(tracks)
    }


def sharpe_difference_intervals(
    tracks: Mapping[str, ArrayLike],
    baseline: ArrayLike,
    *,
    risk_free: float = 0.03,
    n_resamples: int = 2000,
    mean_block: float = 10.0,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Annual Sharpe ratio of each track minus that of the baseline, both resampled on the same days.

    Args:
        tracks: ``{name: (n,) simple daily returns}``.
        baseline: ``(n,)`` on the same days.
        risk_free: Annual.
        n_resamples: As in :func:`sharpe_intervals`.
        mean_block: As in :func:`sharpe_intervals`.
        seed: As in :func:`sharpe_intervals`.
        level: As in :func:`sharpe_intervals`.

    Returns:
        ``{name: (difference, low, high)}``, positive where the track leads; nan as in :func:`sharpe_intervals`.

    Raises:
        ValueError: As :func:`sharpe_intervals`.
    """
    table = _tracks(tracks, n_resamples, level)
    reference = daily_series(baseline, "baseline")
    if len(reference) != len(table):
        raise ValueError(f"baseline must cover the {len(table)} days of the tracks, got {len(reference)}")
    rate = daily_risk_free(risk_free)
    resampled = _resampled_sharpes(np.column_stack([table, reference]), rate, n_resamples, mean_block, seed)
    differences = resampled[:, :-1] - resampled[:, -1:]
    theirs = sharpe(reference, risk_free=risk_free)
    return {
        name: _interval(
            sharpe(table[:, column], risk_free=risk_free) - theirs, differences[:, column], level, len(table)
        )
        for column, name in enumerate(tracks)
    }


def sharpe_interval(
    returns: ArrayLike,
    *,
    risk_free: float = 0.03,
    n_resamples: int = 2000,
    mean_block: float = 10.0,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """One track: :func:`sharpe_intervals` of a single ``(n,)`` array."""
    return sharpe_intervals(
        {"returns": returns},
        risk_free=risk_free,
        n_resamples=n_resamples,
        mean_block=mean_block,
        seed=seed,
        level=level,
    )["returns"]


def sharpe_difference_interval(
    returns: ArrayLike,
    baseline: ArrayLike,
    *,
    risk_free: float = 0.03,
    n_resamples: int = 2000,
    mean_block: float = 10.0,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Two tracks: :func:`sharpe_difference_intervals` of two ``(n,)`` arrays."""
    return sharpe_difference_intervals(
        {"returns": returns},
        baseline,
        risk_free=risk_free,
        n_resamples=n_resamples,
        mean_block=mean_block,
        seed=seed,
        level=level,
    )["returns"]


def probabilistic_sharpe(
    daily_sharpe: float, benchmark: float, n_days: int, *, skewness: float = 0.0, kurtosis: float = 3.0
) -> float:
    """Probability that the true Sharpe ratio exceeds a benchmark, from the moments of the returns.

    PSR = Phi((SR - SR*) sqrt(n - 1) / sqrt(1 - g3 SR + (g4 - 1) / 4 SR^2)), with *daily* ratios.

    Args:
        daily_sharpe: SR, estimated on n days.
        benchmark: SR*.
        n_days: n, at least 2.
        skewness: g3 of daily returns; 0 for a normal law.
        kurtosis: g4 of daily returns, not in excess; 3 for a normal law.

    Returns:
        From 0 to 1; nan where the variance under the root is not positive or SR is nan.

    Raises:
        ValueError: If ``n_days`` is below 2.

    Source: D. Bailey, M. Lopez de Prado, "The Sharpe ratio efficient frontier", Journal of Risk 15 (2012).
    """
    if n_days < 2:
        raise ValueError(f"n_days must be at least 2, got {n_days}")
    variance = 1 - skewness * daily_sharpe + (kurtosis - 1) / 4 * daily_sharpe**2
    if not variance > 0:
        return float("nan")
    return float(norm.cdf((daily_sharpe - benchmark) * np.sqrt((n_days - 1) / variance)))


def expected_maximum_sharpe(n_trials: int, variance: float) -> float:
    """Expected largest of N independent estimates of Sharpe ratios whose true value is 0.

    sqrt(V) ((1 - c) Phi^-1(1 - 1/N) + c Phi^-1(1 - 1/(N e))), with c the constant of Euler and Mascheroni; 0 for N = 1.

    Args:
        n_trials: N, at least 1.
        variance: V of the estimates over trials, at least 0; the result has the unit of sqrt(V).

    Raises:
        ValueError: If an argument is out of range.

    Source: D. Bailey, M. Lopez de Prado, "The deflated Sharpe ratio", Journal of Portfolio Management 40 (2014).
    """
    if n_trials < 1:
        raise ValueError(f"n_trials must be at least 1, got {n_trials}")
    if not (np.isfinite(variance) and variance >= 0):
        raise ValueError(f"variance of the trials must be finite and at least 0, got {variance}")
    if n_trials == 1:
        return 0.0
    quantiles = norm.ppf([1 - 1 / n_trials, 1 - 1 / (n_trials * np.e)])
    return float(np.sqrt(variance) * np.dot([1 - np.euler_gamma, np.euler_gamma], quantiles))


def deflated_sharpe(
    returns: ArrayLike,
    *,
    n_trials: int,
    trial_sharpe_variance: float | None = None,
    trial_sharpes: ArrayLike | None = None,
    risk_free: float = 0.03,
) -> float:
    """Probability that the true Sharpe ratio exceeds what the best of N worthless trials would show.

    :func:`probabilistic_sharpe` of the returns, with their skewness and kurtosis, against
    :func:`expected_maximum_sharpe`.

    Args:
        returns: ``(n,)`` simple daily returns of the trial that was chosen.
        n_trials: N, independent trials that were run.
        trial_sharpe_variance: Variance of the *annual* Sharpe ratios over trials.
        trial_sharpes: The annual Sharpe ratios themselves instead, at least 2, of which the variance (n - 1) is taken.
        risk_free: Annual.

    Returns:
        From 0 to 1; nan where the returns have no spread.

    Raises:
        ValueError: If not exactly one of variance and ratios is given, or an argument is out of range.

    Source: D. Bailey, M. Lopez de Prado, "The deflated Sharpe ratio", Journal of Portfolio Management 40 (2014).
    """
    if (trial_sharpe_variance is None) == (trial_sharpes is None):
        raise ValueError("deflated_sharpe needs one of trial_sharpe_variance and trial_sharpes, got both or none")
    if trial_sharpes is not None:
        trials = np.asarray(trial_sharpes, dtype=np.float64)
        if trials.ndim != 1 or len(trials) < 2:
            raise ValueError(f"trial_sharpes must be at least 2 numbers, got shape {trials.shape}")
        trial_sharpe_variance = float(trials.var(ddof=1))
    assert trial_sharpe_variance is not None  # one of the two was given
    benchmark = expected_maximum_sharpe(n_trials, trial_sharpe_variance / TRADING_DAYS)
    series = daily_series(returns)
    estimate = sharpe(series, risk_free=risk_free) / ANNUAL
    if np.isnan(estimate):
        return float("nan")
    z_scores = (series - series.mean()) / series.std()
    skewness, kurtosis = float(np.mean(z_scores**3)), float(np.mean(z_scores**4))
    return probabilistic_sharpe(estimate, benchmark, len(series), skewness=skewness, kurtosis=kurtosis)
