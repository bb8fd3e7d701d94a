"""A leak audit of a table of embeddings that another pipeline made: user, time, embedding, and the events it read.

What can be computed again can be compared exactly: the same pipeline, run on events before a cut alone, must give the
same embeddings for every moment until the cut. A single table allows statistics only: how much of a user's own near
future, or of the very same moment of others, an embedding tells beyond what simple features of the past tell. A good
embedding tells some of it too.

N rows of the table, E events, k width, m outcomes. Source: spec of arXiv 2502.10205, sections 13 and 15.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from lightning_modules.context.audit_findings import AuditFinding, moment
from lightning_modules.context.cross_fitting import Array, cross_fitted
from lightning_modules.context.rules import Ties
from lightning_modules.context.visible import MICROSECONDS_PER_DAY

Integers = NDArray[np.int64]

N_SHIFTS = 199
"""Circular shifts that the null distribution is made of: the least p-value is 1 / 200."""
CLEAR_Z = 3.5
"""z-score from which on an outcome counts as told; of ten outcomes one in some 400 audits exceeds it by chance."""
LEAST_ROWS = 100
"""Rows with a known outcome below which nothing is said."""
LEAST_VARIED = 30
"""Rows that must differ from the most frequent value of an outcome."""


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


class _Past:
    """Where queries stand among the sorted events: composite keys of (user, rank of time).

    ``times`` are the moments before which everything is known to a row, by the ties.
    """

    def __init__(self, events: EventTable, table: EmbeddingTable, ties: Ties) -> None:
        self.events = events
        self.moments = np.unique(events.times)
        self.size = len(self.moments) + 1
        self.keys = events.users * self.size + np.searchsorted(self.moments, events.times)
        # Times are whole microseconds: what is known at t, ties included, lies before t + 1.
        self.users, self.times = table.users, table.times + (ties == "inclusive")
        self.ties = ties
        self.sorted_times = np.sort(events.times)

    def before(self, times: Integers) -> Integers:
        """Events of the row's user before ``times (N,)``, counted from the first event of the table."""
        return np.searchsorted(self.keys, self.users * self.size + np.searchsorted(self.moments, times))

    def before_of_all(self, times: Integers) -> Integers:
        return np.searchsorted(self.sorted_times, times)

    def own_at_t(self) -> NDArray[np.bool_]:
        """``(N,)``: rows whose user has an event at exactly t that the ties hide from them."""
        return (self.before(self.times + 1) > self.before(self.times)) & (self.ties == "strict")


def audit_table(
    table: EmbeddingTable,
    events: EventTable,
    *,
    truncated: EmbeddingTable | None = None,
    cut: int | None = None,
    ties: Ties = "strict",
    tolerance: float = 1e-5,
    implausible: float = 0.5,
    n_rows: int = 4000,
    seed: int = 0,
) -> list[AuditFinding]:
    """Audit a table of embeddings.

    Checks: ``truncated events`` (exact, needs ``truncated``), ``own future``, ``own event at t`` and ``same moment``
    (statistical), ``before the first event`` and ``repeated rows``. The statistical ones are leaks where the share of
    the variance that the past leaves open and the embedding explains exceeds ``implausible``: then either the future
    is in it, or the process is nearly deterministic; below they are information.

    With strict ties an own event at exactly the time t of a row is its future. Truncated events keep it wherever t is
    before the cut, so rows that have one are a check of their own, ``own event at t``, which nothing clears. On the
    other rows truncated events decide: if that check is clean, with at least 30 of these rows whose next own event it
    took away, ``own future`` is no leak. With inclusive ties events at t are known, and there are no such rows.

    Args:
        table: Embeddings from all events.
        events: All events.
        truncated: Embeddings by the same pipeline from events before ``cut`` alone.
        cut: Microseconds.
        ties: ``"strict"``: a row at t knows events before t; ``"inclusive"``: also those at t, as states after each
            event do that are stamped with its time.
        tolerance: Greatest allowed difference, relative to max(1, |feature|), between the tables.
        implausible: Share above which a statistical finding is a leak, inside 0..1.
        n_rows: Most rows of each statistic, drawn by ``seed``.
        seed: Of all draws.

    Raises:
        ValueError: If ``truncated`` has no row in common with ``table`` until the cut, comes without a cut, has
            another width, or ``implausible`` or ``ties`` is out of range.
    """
    if ties not in ("strict", "inclusive"):
        raise ValueError(f"ties must be 'strict' or 'inclusive', got {ties!r}")
    if not 0 < implausible < 1:
        raise ValueError(f"implausible must lie strictly between 0 and 1, got {implausible}")
    exact, cleared = _no_truncated_table(), False
    if truncated is not None:
        if cut is None:
            raise ValueError("cut must be given with a table of truncated events, got None")
        exact = compare_truncated(table, truncated, cut, tolerance, ties)
        cleared = exact.status == "clean" and _bites(table, truncated, events, cut, ties)
    random = np.random.default_rng(seed)
    findings = [exact, *_associations(table, events, ties, implausible, cleared, n_rows, random)]
    return [*findings, _before_first(table, events, ties), _repeated(table)]


def _bites(table: EmbeddingTable, truncated: EmbeddingTable, events: EventTable, cut: int, ties: Ties) -> bool:
    """Whether enough compared rows lost their next own event by the cut, so that looking ahead would have shown."""
    past = _Past(events, table.take(_common(table, truncated, cut, ties)[0]), ties)
    now, end = past.before(past.times), np.searchsorted(past.keys, (past.users + 1) * past.size)
    lost = (now == past.before(np.full(len(now), cut))) & (now < end) & ~past.own_at_t()
    return int(lost.sum()) >= LEAST_VARIED


def _no_truncated_table() -> AuditFinding:
    words = (
        "no second table was given; the exact test: write the events before a date (--write-truncated OUT --cut DATE), "
        "run the same pipeline with the same weights on them, and give its table by --truncated with the same --cut"
    )
    return AuditFinding("truncated events", "not checked", words=words)


def compare_truncated(
    table: EmbeddingTable, truncated: EmbeddingTable, cut: int, tolerance: float, ties: Ties = "strict"
) -> AuditFinding:
    """Compare embeddings of moments until ``cut``, made from all events and from events before ``cut`` alone.

    Rows are matched by (user, time), repeated ones in their order. With strict ties a query at the cut itself knows
    events before it, so all rows with time <= cut must agree; with inclusive ties those with time < cut.

    Raises:
        ValueError: If widths differ or no row until the cut is in both tables.
    """
    name = "truncated events"
    if table.vectors.shape[1] != truncated.vectors.shape[1]:
        widths = table.vectors.shape[1], truncated.vectors.shape[1]
        raise ValueError(f"embeddings of truncated events must be as wide as the others, {widths[0]}, got {widths[1]}")
    here, there, counts = _common(table, truncated, cut, ties)
    if not len(here):
        raise ValueError(f"no row until the cut {moment(cut)} is in both tables: {counts[0]} and {counts[1]} are there")
    old, new = table.vectors[here], truncated.vectors[there]
    gaps = np.abs(old - new)
    wrong = gaps > tolerance * np.maximum(1, np.abs(old))
    missing = counts[0] - len(here)
    apart = f"; {missing} rows until the cut have no counterpart" if missing else ""
    if not wrong.any():
        nearest = (cut - table.times[here].max()) / MICROSECONDS_PER_DAY
        words = (
            f"{len(here)} embeddings until {moment(cut)}, the latest {nearest:.3g} days before it, are the same "
            f"without later events{apart}"
        )
        return AuditFinding(name, "clean", float(gaps.max()), None, words)
    changed = wrong.any(1)
    row, column = np.unravel_index(np.where(wrong, gaps, -1).argmax(), gaps.shape)
    distances = (cut - table.times[here][changed]) / MICROSECONDS_PER_DAY
    example = (
        f"user {table.names[table.users[here[row]]]} at {moment(int(table.times[here[row]]))}: feature {column} is "
        f"{old[row, column]:.6g} with all events, {new[row, column]:.6g} with those before the cut"
    )
    words = (
        f"{changed.sum()} of {len(here)} embeddings until the cut depend on events after it, "
        f"{distances.min():.3g} to {distances.max():.3g} days before it: near the cut alone the pipeline looks ahead, "
        f"everywhere it fits statistics or weights on later events{apart}"
    )
    return AuditFinding(name, "leak", float(gaps[wrong].max()), example, words)


def _common(
    table: EmbeddingTable, truncated: EmbeddingTable, cut: int, ties: Ties
) -> tuple[Integers, Integers, tuple[int, int]]:
    """The rows of either table that the cut leaves comparable and both have, and how many each has."""
    codes = {one: code for code, one in enumerate(table.names)}
    last = cut - (ties == "inclusive")
    rows = _places(table, np.arange(len(table.names)), last)
    found = _places(truncated, np.array([codes.get(one, -1) for one in truncated.names], dtype=np.int64), last)
    common = sorted(rows.keys() & found.keys())
    here, there = ([one[key] for key in common] for one in (rows, found))
    return np.array(here, dtype=np.int64), np.array(there, dtype=np.int64), (len(rows), len(found))


def _places(table: EmbeddingTable, codes: Integers, last: int) -> dict[tuple[int, int, int], int]:
    """(user, time, count of earlier rows of both) -> row, for rows until ``last``."""
    places: dict[tuple[int, int, int], int] = {}
    seen: dict[tuple[int, int], int] = {}
    for row in np.flatnonzero((table.times <= last) & (codes[table.users] >= 0)).tolist():
        key = int(codes[table.users[row]]), int(table.times[row])
        places[(*key, seen.get(key, 0))] = row
        seen[key] = seen.get(key, 0) + 1
    return places


def past_features(table: EmbeddingTable, events: EventTable, windows: Sequence[int], ties: Ties = "strict") -> Array:
    """What simple features of the past tell: ``(N, ...)``, from events before each row, with inclusive ties also at it.

    Logarithms of 1 + the number of own events and of all events in each window, and of 1 + days since the last own
    event and since the first; the own last values as ranks; time as a line, and hour, weekday and day of the year as
    angles.
    """
    past = _Past(events, table, ties)
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
        Name -> ``(N,) float64``: own events in [t, t + window], days until the first of them and its values; of own
        events at exactly t the last values and the sums; all but counts as ranks. Unknown values are NaN, outcomes
        that differ from their most frequent value in less than 30 rows left out.
    """
    past = _Past(events, table, ties)
    times, now = past.times, past.before(past.times)
    end = np.searchsorted(past.keys, (table.users + 1) * past.size)
    has_next = now < end
    following = np.minimum(now, len(events.times) - 1)
    following_event = "the own event at or after t" if ties == "strict" else "the next own event"
    own = {}
    for window in windows:
        count = past.before(times + window + 1) - now
        own[f"own events within {window / MICROSECONDS_PER_DAY:.3g} days"] = np.log1p(count).astype(np.float64)
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
    past = _Past(events, table, "strict")
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
    kept = {}
    for name, values in outcomes.items():
        known = values[np.isfinite(values)]
        if len(known) and len(known) - np.unique(known, return_counts=True)[1].max() >= LEAST_VARIED:
            kept[name] = values
    return kept


def _ranks(value: NDArray[np.float64] | Integers, known: NDArray[np.bool_]) -> Array:
    ranks = np.zeros(len(value))
    if known.any():
        ranks[known] = rankdata(value[known]) / known.sum()
    return ranks


def _associations(
    table: EmbeddingTable,
    events: EventTable,
    ties: Ties,
    implausible: float,
    cleared: bool,
    n_rows: int,
    random: np.random.Generator,
) -> list[AuditFinding]:
    gaps = np.diff(events.times)[events.users[1:] == events.users[:-1]]
    gap = int(np.median(gaps[gaps > 0])) if (gaps > 0).any() else MICROSECONDS_PER_DAY
    windows = [max(gap // 4, 1), gap, 4 * gap]
    at_t = _Past(events, table, ties).own_at_t()
    kinds = {"own future": ~at_t}
    if at_t.any():
        kinds["own event at t"] = at_t
    if not cleared and max(at_t.sum(), (~at_t).sum()) < LEAST_ROWS:
        # Either kind alone is too little to say anything of.
        kinds = {"own future": np.ones(len(at_t), dtype=bool)}
    found = []
    for name, kind in kinds.items():
        if not kind.any():
            found.append(AuditFinding(name, "not checked", words="every row has an own event at its time t"))
            continue
        some = _drawn(table.take(kind), n_rows, random)
        past, outcomes = past_features(some, events, windows, ties), future_outcomes(some, events, windows, ties)
        tied = bool((at_t & kind).any())
        found.append(_told(name, some, past, outcomes, implausible, cleared and not tied, tied, random))
    if ties == "inclusive":
        words = "events at the moment of a row are declared as known"
        return [*found, AuditFinding("same moment", "information", words=words)]
    some = _drawn(table, n_rows, random)
    past, outcomes = past_features(some, events, windows), moment_outcomes(some, events)
    return [*found, _told("same moment", some, past, outcomes, implausible, False, True, random)]


def _drawn(table: EmbeddingTable, n_rows: int, random: np.random.Generator) -> EmbeddingTable:
    size = len(table.users)
    return table if size <= n_rows else table.take(np.sort(random.choice(size, n_rows, False)))


def _told(
    name: str,
    table: EmbeddingTable,
    past: Array,
    outcomes: dict[str, Array],
    implausible: float,
    cleared: bool,
    tied: bool,
    random: np.random.Generator,
) -> AuditFinding:
    """How well embeddings tell outcomes; ``tied`` ones may come from an event at t, which truncated events keep."""
    scores = {
        outcome: explained(table, past, values, random)
        for outcome, values in outcomes.items()
        if np.isfinite(values).sum() >= LEAST_ROWS and len(np.unique(table.users[np.isfinite(values)])) >= 5
    }
    if not scores:
        words = f"of {len(table.users)} rows, no outcome varies over at least {LEAST_ROWS} of 5 users"
        return AuditFinding(name, "not checked", words=words)
    outcome, (share, z, _) = max(scores.items(), key=lambda one: one[1][0])
    if share > implausible:
        numbers = f"{outcome}: {share:.3f} of the variance that the past leaves open, z = {z:.1f}"
        if cleared:
            words = "the embedding tells what comes, yet it is the same without later events: a process easy to tell"
            return AuditFinding(name, "information", share, numbers, words)
        words = "the embedding tells what comes: the future is in it, or the process is nearly deterministic"
        if tied:
            words += "; truncated events do not clear it, they keep the events at t"
        if tied and name != "same moment":
            words += (
                ", which strict ties count as future: a table of states after each event, stamped with its time, "
                "is audited with --ties inclusive"
            )
        return AuditFinding(name, "leak", share, numbers, words)
    # The outcome that stands out most; its p-value times the number of outcomes (Bonferroni).
    outcome, (share, z, p_value) = max(scores.items(), key=lambda one: one[1][1])
    p_value = min(1.0, p_value * len(scores))
    numbers = f"{outcome}: {share:.3f} of the variance that the past leaves open, z = {z:.1f}, p = {p_value:.3f}"
    if z > CLEAR_Z:
        words = "told better than by simple features of the past: a good embedding or a leak, "
        words += "and truncated events keep those at t: they cannot decide" if tied else "truncated events decide"
        return AuditFinding(name, "information", share, numbers, words)
    words = f"not told beyond simple features of the past ({numbers}), which is no proof"
    return AuditFinding(name, "clean", share, None, words)


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


def _before_first(table: EmbeddingTable, events: EventTable, ties: Ties) -> AuditFinding:
    """Users without any past who are asked at the same moment know the same, unless something else is told apart."""
    name = "before the first event"
    past = _Past(events, table, ties)
    nothing = past.before(past.times) == past.before(np.full(len(table.times), past.moments[0]))
    if not nothing.any():
        return AuditFinding(name, "not checked", words="no row stands before its user has any known event")
    rows = np.flatnonzero(nothing)
    rows = rows[np.argsort(table.times[rows], kind="stable")]
    same = (table.times[rows][1:] == table.times[rows][:-1]) & (table.users[rows][1:] != table.users[rows][:-1])
    if not same.any():
        words = f"{len(rows)} rows stand before their user's first event, no two at the same moment to compare"
        return AuditFinding(name, "not checked", words=words)
    first, second = rows[:-1][same], rows[1:][same]
    gaps = np.abs(table.vectors[first] - table.vectors[second]).max(1)
    if (gaps == 0).all():
        words = f"{len(gaps)} pairs of users without a past are alike at the same moment"
        return AuditFinding(name, "clean", 0.0, None, words)
    pair = int(gaps.argmax())
    names = [table.names[table.users[row]] for row in (first[pair], second[pair])]
    example = f"users {names[0]} and {names[1]} at {moment(int(table.times[first[pair]]))} differ by {gaps[pair]:.6g}"
    words = "users without any event yet are told apart: by facts beyond the events, or by what they do later"
    return AuditFinding(name, "information", float(gaps.max()), example, words)


def _repeated(table: EmbeddingTable) -> AuditFinding:
    order = np.lexsort((table.times, table.users))
    same = (np.diff(table.users[order]) == 0) & (np.diff(table.times[order]) == 0)
    if not same.any():
        return AuditFinding("repeated rows", "clean", 0.0, None, "every (user, time) occurs once")
    gaps = np.abs(table.vectors[order[1:]][same] - table.vectors[order[:-1]][same]).max(1)
    words = f"{int(same.sum())} rows repeat the user and time of another"
    words += "" if (gaps == 0).all() else ", with other numbers: something beyond user and time is an input"
    return AuditFinding("repeated rows", "information", float(gaps.max()), None, words)
