"""How much of what comes next embeddings tell beyond the past, over all rows and over those that cannot have seen it.

N rows of the table, k width. Source: spec of arXiv 2502.10205, sections 13 and 15.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lightning_modules.context.audit_outcomes import EmbeddingTable, EventTable, Past
from lightning_modules.context.cross_fitting import Array, cross_fitted
from lightning_modules.context.rules import Ties
from lightning_modules.context.visible import MICROSECONDS_PER_DAY

N_SHIFTS = 199
"""Circular shifts that the null distribution is made of: the least p-value is 1 / 200."""


def explained(
    table: EmbeddingTable, past: Array, outcome: Array, random: np.random.Generator
) -> tuple[float, float, float]:
    """Share of an outcome's variance, left open by the past, that embeddings of other users' rows explain.

    Both the outcome and the embedding are first freed from what ``past (N, p)`` tells of them by regressions
    fitted on other users; the share is 1 - SSE / SST of a third one between the two residuals. Circular shifts of
    the outcome along rows sorted by user and time give the null distribution: they keep the dependence of rows of
    a user.

    Args:
        table: Embeddings.
        past: Features of the past.
        outcome: ``(N,)``; NaN where unknown.
        random: Of the shifts.

    Returns:
        Share (below 0 if nothing is told), z-score of it among the shifts, one-sided p-value.

    Source: D. Freedman and D. Lane, "A nonstochastic interpretation of reported significance levels", Journal of
    Business & Economic Statistics 1 (1983), with shifts in place of permutations.
    """
    rows = np.flatnonzero(np.isfinite(outcome))
    rows = rows[np.lexsort((table.times[rows], table.users[rows]))]
    users, known = table.users[rows], past[rows]
    joint = np.column_stack([outcome[rows], table.vectors[rows]])
    joint = joint - cross_fitted(known, joint, users)
    left, embedding = joint[:, 0], joint[:, 1:]
    n_rows = len(rows)
    shifts = random.choice(np.arange(1, n_rows), min(N_SHIFTS, n_rows - 1), replace=False)
    targets = np.column_stack([left, *(np.roll(left, int(shift)) for shift in shifts)])
    errors = ((targets - cross_fitted(embedding, targets, users)) ** 2).sum(0)
    # A past that tells the outcome entirely leaves nothing to explain.
    total = max(float(((left - left.mean()) ** 2).sum()), 1e-12 * n_rows)
    shares = 1 - errors / total
    null = shares[1:]
    z = (shares[0] - null.mean()) / max(float(null.std()), 1e-12)
    return float(shares[0]), float(z), float((1 + (null >= shares[0]).sum()) / (1 + len(null)))


def told_of_lost(
    table: EmbeddingTable,
    past: Array,
    outcome: Array,
    lost: NDArray[np.bool_],
    known: Array,
    random: np.random.Generator,
) -> float:
    """Share of an outcome's variance that the embedding tells on rows which cannot have seen it.

    These are few, and not any rows. So the embedding is replaced by what it forecasts, together with the past, in a
    regression on all rows of other users; a forecast of the past alone is taken off both this and the outcome. The
    share is that of :func:`explained` among the few, beyond the latter forecast and what is known from their choice.

    Args:
        table: Embeddings.
        past: ``(N, p)`` features of the past.
        outcome: ``(N,)``; NaN where unknown.
        lost: ``(N,)``, the n rows asked for, of at least 5 users.
        known: ``(n, c)``, see :func:`known_of_lost`.
        random: Of the shifts.
    """
    rows = np.isfinite(outcome)
    target, users, asked = outcome[rows, None], table.users[rows], lost[rows]
    plain = cross_fitted(past[rows], target, users)[asked]
    forecast = cross_fitted(np.hstack([past, table.vectors])[rows], target, users)[asked]
    # Taken off, not only regressed on: the penalty of a regression on few rows would leave some of it in both.
    few = replace(table.take(lost & rows), vectors=forecast - plain)
    left = outcome[lost & rows] - plain[:, 0]
    return explained(few, np.hstack([plain, known[rows[lost]]]), left, random)[0]


def known_of_lost(
    table: EmbeddingTable, events: EventTable, lost: NDArray[np.bool_], cut: int, windows: Sequence[int], ties: Ties
) -> Array:
    """What follows from nothing having come between a row and the cut, which truncated events leave to be seen.

    Returns:
        ``(n, 2 + windows)`` of the n rows ``lost (N,)``: days to the cut, the share of rows whose next own event comes
        sooner than that, and the share of each window that is left after the cut.
    """
    following, has_next = Past(events, table, ties).following()
    ahead = np.sort((events.times[following] - table.times)[has_next])
    until = cut - table.times[lost]
    left = [np.maximum(window - until, 0) / window for window in windows]
    return np.stack([until / MICROSECONDS_PER_DAY, np.searchsorted(ahead, until) / len(ahead), *left], axis=1)
