"""Bootstrap over users: percentile intervals of a mean and of a paired difference of means.

U users, M metrics, S resamples. Users are drawn with replacement, U at a time, from a generator of their own; a
resample is kept as the number of times each user was drawn, so that all metrics of a report share one draw and
cost one matrix product.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

CHUNK_BYTES = 64 * 2**20
"""Memory allowed for the resamples held at a time."""


class Interval(NamedTuple):
    """A mean with its percentile interval; reads ``[mean, low, high]`` as JSON."""

    mean: float
    low: float
    high: float


def bootstrap_means(values: NDArray[np.float64], n_resamples: int, seed: int) -> NDArray[np.float64]:
    """Means of ``n_resamples`` samples of U users drawn with replacement.

    Args:
        values: ``(U, M) float64``, U at least 1.
        n_resamples: S, at least 1.
        seed: Seed of the draw; the same users are drawn for every metric.

    Returns:
        ``(S, M) float64``. The draw does not depend on how it is cut into chunks.
    """
    n_users = len(values)
    generator = np.random.default_rng(seed)
    # int64 draws, their flat position and the float64 counts: 24 bytes for each user of a resample
    chunk = max(1, CHUNK_BYTES // (24 * n_users))
    means = []
    for start in range(0, n_resamples, chunk):
        n_rows = min(chunk, n_resamples - start)
        drawn = generator.integers(n_users, size=(n_rows, n_users))
        drawn += np.arange(n_rows)[:, None] * n_users
        times = np.bincount(drawn.ravel(), minlength=n_rows * n_users).reshape(n_rows, n_users)
        means.append(times.astype(np.float64) @ values / n_users)
    return np.concatenate(means)


def _columns(values: Mapping[str, ArrayLike]) -> NDArray[np.float64]:
    if not values:
        raise ValueError("values must hold at least one metric, got none")
    columns = {name: np.asarray(column, dtype=np.float64) for name, column in values.items()}
    n_users = len(next(iter(columns.values())).ravel())
    for name, column in columns.items():
        if column.ndim != 1 or len(column) != n_users or n_users == 0:
            raise ValueError(
                f"{name} must hold one value for each of {n_users} users, at least 1, got shape {column.shape}"
            )
        if not np.isfinite(column).all():
            user = int(np.flatnonzero(~np.isfinite(column))[0])
            raise ValueError(f"{name} must be finite, got {column[user]} for user {user}")
    return np.stack(list(columns.values()), axis=1)


def mean_intervals(
    values: Mapping[str, ArrayLike], *, n_resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> dict[str, Interval]:
    """Mean over users of each metric with its percentile bootstrap interval.

    Args:
        values: ``{metric: (U,) float}``, the same users in the same order under every name.
        n_resamples: Number of resamples, at least 1.
        seed: Seed of the draw of users.
        level: Coverage of the interval, inside 0..1; its ends are the quantiles (1 - level) / 2 and
            (1 + level) / 2 of the resampled means, interpolated linearly.

    Returns:
        ``{metric: (mean, low, high)}``. With one user the three are equal: the sample holds no spread.

    Raises:
        ValueError: If there is no user or no metric, lengths differ, a value is not finite, ``n_resamples`` is
            below 1 or ``level`` is not strictly between 0 and 1.

    Source: B. Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979); percentile
    interval.
    """
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level}")
    table = _columns(values)
    # Centred first, so that metrics equal for all users get an interval of width exactly zero.
    centre = table[0]
    resampled = centre + bootstrap_means(table - centre, n_resamples, seed)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2], axis=0)
    mean = centre + (table - centre).mean(axis=0)
    return {
        name: Interval(float(mean[column]), float(low[column]), float(high[column]))
        for column, name in enumerate(values)
    }


def mean_interval(values: ArrayLike, *, n_resamples: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """One metric of one system: :func:`mean_intervals` for a single ``(U,)`` array."""
    named = {"values": values}
    return mean_intervals(named, n_resamples=n_resamples, seed=seed, level=level)["values"]


def paired_intervals(
    model: Mapping[str, ArrayLike],
    baseline: Mapping[str, ArrayLike],
    *,
    n_resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Mean over users of ``model - baseline`` for each metric, with its percentile bootstrap interval.

    Pairing by user removes the spread between easy and hard users, which both systems share.

    Args:
        model: ``{metric: (U,) float}`` of the system in question.
        baseline: ``{metric: (U,) float}`` of the other, same metrics, same users in the same order.
        n_resamples: As in :func:`mean_intervals`.
        seed: As in :func:`mean_intervals`.
        level: As in :func:`mean_intervals`.

    Returns:
        ``{metric: (mean, low, high)}`` of the difference; positive where the model leads.

    Raises:
        ValueError: If the metrics or numbers of users differ, and as :func:`mean_intervals`.
    """
    if set(model) != set(baseline):
        raise ValueError(
            f"model and baseline must hold the same metrics, got {sorted(set(model) ^ set(baseline))} in one only"
        )
    differences = {}
    for name in model:
        ours, theirs = np.asarray(model[name], np.float64), np.asarray(baseline[name], np.float64)
        if ours.shape != theirs.shape:
            raise ValueError(f"{name} must hold the same users twice, got shapes {ours.shape} and {theirs.shape}")
        differences[name] = ours - theirs
    return mean_intervals(differences, n_resamples=n_resamples, seed=seed, level=level)


def paired_bootstrap(
    model: ArrayLike,
    baseline: ArrayLike,
    *,
    n_resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """One metric of two systems: :func:`paired_intervals` for two ``(U,)`` arrays."""
    ours, theirs = {"difference": model}, {"difference": baseline}
    return paired_intervals(ours, theirs, n_resamples=n_resamples, seed=seed, level=level)["difference"]
