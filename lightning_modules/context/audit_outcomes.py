"""What a table of embeddings may know and what it must not: simple features of the past, and what comes next.

N rows of the table, E events, k width. Source: spec of arXiv 2502.10205, sections 13 and 15.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from lightning_modules.context.cross_fitting import Array
from lightning_modules.context.rules import Ties
from lightning_modules.context.visible import MICROSECONDS_PER_DAY

Integers = NDArray[np.int64]

LEAST_VARIED = 30
"""Rows that must differ from the most frequent value of an outcome."""
LEAST_USERS = 5
"""Users below which nothing is said: a regression has as many folds."""


@dataclass(frozen=True)
class EventTable:
    """Events sorted by user, then time, ties in the order of the file.

    Attributes:
        users: ``(E,) int64`` codes, those of the embeddings.
        times: ``(E,) int64`` microseconds.
        values: Column -> ``(E,) float64``: what an event is, numbers as they are, a type as 0 or 1.
    """

    users: Integers
    times: Integers
    values: dict[str, Array]


@dataclass(frozen=True)
class EmbeddingTable:
    """Embeddings in the order of the file.

    Attributes:
        users: ``(N,) int64`` codes.
        times: ``(N,) int64`` microseconds.
        vectors: ``(N, k) float64``, finite.
        names: Original ids by code.
    """

    users: Integers
    times: Integers
    vectors: Array
    names: Sequence[str]

    def take(self, rows: Integers | NDArray[np.bool_]) -> "EmbeddingTable":
        """Some rows."""
        return replace(self, users=self.users[rows], times=self.times[rows], vectors=self.vectors[rows])


class Past:
    """Where rows stand among the sorted events: composite keys of (user, rank of time).

    ``times (N,)`` are the moments before which everything is known to a row, by the ties. With strict ties an event
    stamped t may happen until the next tick of the log's clock (``clock_of``): a row inside a tick, such as one at 9:00
    on a log of dates, does not know what carries the stamp of its beginning. ``inside (N,)`` marks these.
    """

    def __init__(self, events: EventTable, table: EmbeddingTable, ties: Ties) -> None:
        self.events = events
        self.moments = np.unique(events.times)
        self.size = len(self.moments) + 1
        self.keys = events.users * self.size + np.searchsorted(self.moments, events.times)
        # Times are whole microseconds: what is known at t, ties included, lies before t + 1.
        self.users, self.times = table.users, table.times + (ties == "inclusive")
        self.ties, self.tick = ties, clock_of(self.moments)
        stamps = self.moments[np.maximum(np.searchsorted(self.moments, table.times, side="right") - 1, 0)]
        gap = table.times - stamps
        self.inside = (gap > 0) & (gap < self.tick) & (ties == "strict")
        self.times = np.where(self.inside, stamps, self.times)
        self.sorted_times = np.sort(events.times)

    def before(self, times: Integers) -> Integers:
        """Events of the row's user before ``times (N,)``, counted from the first event of the table."""
        return np.searchsorted(self.keys, self.users * self.size + np.searchsorted(self.moments, times))

    def before_of_all(self, times: Integers) -> Integers:
        """Events of anybody before ``times (N,)``."""
        return np.searchsorted(self.sorted_times, times)

    def own_at_t(self) -> NDArray[np.bool_]:
        """``(N,)``: rows whose user has an event at t, or at the tick that t lies in, that ties hide from them."""
        return (self.before(self.times + 1) > self.before(self.times)) & (self.ties == "strict")

    def following(self) -> tuple[Integers, NDArray[np.bool_]]:
        """``(N,)`` twice: the first own event that a row does not know, any event without one, and which have one."""
        now, end = self.before(self.times), np.searchsorted(self.keys, (self.users + 1) * self.size)
        return np.minimum(now, len(self.keys) - 1), now < end


def clock_of(moments: Integers) -> int:
    """Microseconds between two stamps of a log, increasing ``moments``: what divides all distances, at most a day.

    Dates of a zone with summer time, which are 23, 24 or 25 hours apart, are days too.
    """
    gaps = np.diff(moments)
    tick = int(np.gcd.reduce(gaps, initial=MICROSECONDS_PER_DAY))
    if tick < MICROSECONDS_PER_DAY and gaps.min() >= MICROSECONDS_PER_DAY * 23 // 24:
        ahead = (moments - moments[0]) % MICROSECONDS_PER_DAY
        off = np.unique(np.minimum(ahead, MICROSECONDS_PER_DAY - ahead))
        if len(off) == 2 and off[1] <= MICROSECONDS_PER_DAY // 24:
            return MICROSECONDS_PER_DAY
    return tick


def past_features(table: EmbeddingTable, events: EventTable, windows: Sequence[int], ties: Ties = "strict") -> Array:
    """What simple features of the past tell: ``(N, ...)``, from events before each row, with inclusive ties also at it.

    Logarithms of 1 + the number of own events and of all events in each window, and of 1 + days since the last own
    event and since the first; the own last values as ranks; time as a line, and hour, weekday and day of the year as
    angles.
    """
    past = Past(events, table, ties)
    now, times = past.before(past.times), past.times
    start = past.before(np.full(len(times), past.moments[0]))
    last = np.maximum(now - 1, 0)
    has_past = now > start
    days = times / MICROSECONDS_PER_DAY
    recency = np.where(has_past, (times - events.times[last]) / MICROSECONDS_PER_DAY, 0.0)
    # An empty table cannot be: a row after the last event stands at the end of it.
    first = np.minimum(start, len(events.times) - 1)
    span = np.where(has_past, (times - events.times[first]) / MICROSECONDS_PER_DAY, 0.0)
    columns = [has_past, np.log1p(recency), np.log1p(span), np.log1p(now - start), days]
    everybody = past.before_of_all(times)
    for window in windows:
        columns.append(np.log1p(now - past.before(times - window)))
        columns.append(np.log1p(everybody - past.before_of_all(times - window)))
    # Ranks: a single amount far from all others would bend every regression on it.
    columns.extend(np.where(has_past, _ranks(value[last], has_past), 0.0) for value in events.values.values())
    for period in (1.0, 7.0, 365.25):
        columns += [np.sin(2 * np.pi * days / period), np.cos(2 * np.pi * days / period)]
    return np.stack(columns, axis=1).astype(np.float64)


def future_outcomes(
    table: EmbeddingTable, events: EventTable, windows: Sequence[int], ties: Ties = "strict"
) -> dict[str, Array]:
    """What an embedding must not know of its user: own events from t on, with inclusive ties after t.

    Returns:
        Name -> ``(N,) float64``: own events in [t, t + window], unknown where the log ends before; days until the
        first of them and its values; of own events at exactly t the last values and the sums; all but counts as
        ranks. Unknown values are NaN, outcomes that differ from their most frequent value in less than 30 rows left
        out.
    """
    past = Past(events, table, ties)
    times, now = past.times, past.before(past.times)
    following, has_next = past.following()
    following_event = "the own event at or after t" if ties == "strict" else "the next own event"
    own = {}
    for window in windows:
        count = np.log1p(past.before(times + window + 1) - now)
        # Counts fall where the log ends, and that an embedding of the date may tell.
        told = np.where(times + window <= past.moments[-1], count, np.nan)
        own[f"own events within {window / MICROSECONDS_PER_DAY:.3g} days"] = told
    own[f"days to {following_event}"] = np.where(has_next, _ranks(events.times[following] - times, has_next), np.nan)
    for name, value in events.values.items():
        own[f"{name} of {following_event}"] = np.where(has_next, _ranks(value[following], has_next), np.nan)
    # Of several events at t, those of one day where times are dates, the first alone tells little.
    at_t, right = past.own_at_t(), past.before(times + 1)
    for name, value in events.values.items():
        sums = np.concatenate([[0.0], np.cumsum(value)])
        own[f"{name} of the last own event at t"] = np.where(at_t, _ranks(value[right - 1], at_t), np.nan)
        own[f"sum of {name} of own events at t"] = np.where(at_t, _ranks(sums[right] - sums[now], at_t), np.nan)
    return _varied(own)


def moment_outcomes(table: EmbeddingTable, events: EventTable) -> dict[str, Array]:
    """What an embedding must not know of others with strict ties: their events at exactly t.

    Returns:
        Name -> ``(N,) float64``: events of others at t and the sums of their values, as ranks; those that hardly vary
        are left out as in :func:`future_outcomes`.
    """
    past = Past(events, table, "strict")
    now, own_right = past.before(past.times), past.before(past.times + 1)
    order = np.argsort(events.times, kind="stable")
    left, right = (np.searchsorted(past.sorted_times, past.times, side) for side in ("left", "right"))
    n_others = (right - left) - (own_right - now)
    others = {"events of others at the moment": np.log1p(n_others)}
    for name, value in events.values.items():
        sums, own_sums = (np.concatenate([[0.0], np.cumsum(one)]) for one in (value[order], value))
        total = (sums[right] - sums[left]) - (own_sums[own_right] - own_sums[now])
        # Differences of sums leave a rounding error where there is nobody.
        total = np.where(n_others > 0, total, 0.0)
        others[f"{name} of others at the moment"] = _ranks(total, np.ones(len(now), dtype=bool))
    return _varied(others)


def _varied(outcomes: dict[str, Array]) -> dict[str, Array]:
    return {name: values for name, values in outcomes.items() if varied(values[np.isfinite(values)]) >= LEAST_VARIED}


def varied(values: Array) -> int:
    """How many values differ from the most frequent one."""
    return len(values) - int(np.unique(values, return_counts=True)[1].max(initial=0))


def _ranks(value: NDArray[np.float64] | Integers, known: NDArray[np.bool_]) -> Array:
    ranks = np.zeros(len(value))
    if known.any():
        ranks[known] = rankdata(value[known]) / known.sum()
    return ranks
