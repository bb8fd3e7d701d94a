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

from lightning_modules.context.audit_findings import AuditFinding, Status, moment
from lightning_modules.context.cross_fitting import Array, cross_fitted
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
    """Where queries stand among the sorted events: composite keys of (user, rank of time)."""

    def __init__(self, events: EventTable, table: EmbeddingTable) -> None:
        self.events = events
        self.moments = np.unique(events.times)
        self.size = len(self.moments) + 1
        self.keys = events.users * self.size + np.searchsorted(self.moments, events.times)
        self.users, self.times = table.users, table.times
        self.sorted_times = np.sort(events.times)

    def before(self, times: Integers) -> Integers:
        """Events of the row's user before ``times (N,)``, counted from the first event of the table."""
        return np.searchsorted(self.keys, self.users * self.size + np.searchsorted(self.moments, times))

    def before_of_all(self, times: Integers) -> Integers:
        return np.searchsorted(self.sorted_times, times)


def audit_table(
    table: EmbeddingTable,
    events: EventTable,
    *,
    truncated: EmbeddingTable | None = None,
    cut: int | None = None,
    tolerance: float = 1e-5,
    implausible: float = 0.5,
    n_rows: int = 4000,
    seed: int = 0,
) -> list[AuditFinding]:
    """Audit a table of embeddings.

    Checks: ``truncated events`` (exact, needs ``truncated``), ``own future`` and ``same moment`` (statistical),
    ``before the first event`` and ``repeated rows``. The statistical ones are leaks where the share of the variance
    that the past leaves open and the embedding explains exceeds ``implausible``: then either the future is in it, or
    the process is nearly deterministic; below they are information. Truncated events decide: if that check is clean,
    with at least 30 rows whose next own event it took away, ``own future`` is no leak.

    Args:
        table: Embeddings from all events.
        events: All events.
        truncated: Embeddings by the same pipeline from events before ``cut`` alone.
        cut: Microseconds.
        tolerance: Greatest allowed difference, relative to max(1, |feature|), between the tables.
        implausible: Share above which a statistical finding is a leak, inside 0..1.
        n_rows: Most rows of the statistics, drawn by ``seed``.
        seed: Of all draws.

    Raises:
        ValueError: If ``truncated`` has no row in common with ``table`` until the cut, comes without a cut, has
            another width, or ``implausible`` is out of range.
    """
    if not 0 < implausible < 1:
        raise ValueError(f"implausible must lie strictly between 0 and 1, got {implausible}")
    findings = []
    exact = None
    if truncated is not None:
        if cut is None:
            raise ValueError("cut must be given with a table of truncated events, got None")
        exact = compare_truncated(table, truncated, cut, tolerance)
    findings.append(exact or _no_truncated_table())
    random = np.random.default_rng(seed)
    kept = table if len(table.users) <= n_rows else table.take(np.sort(random.choice(len(table.users), n_rows, False)))
    cleared = exact is not None and exact.status == "clean" and _bites(table, events, cut)
    findings += _associations(kept, events, implausible, cleared, random)
    findings += [_before_first(table, events), _repeated(table)]
    return findings


def _bites(table: EmbeddingTable, events: EventTable, cut: int | None) -> bool:
    """Whether enough rows lost their next own event by the cut, so that looking ahead would have shown."""
    assert cut is not None
    past = _Past(events, table)
    now, end = past.before(table.times), np.searchsorted(past.keys, (table.users + 1) * past.size)
    lost = (table.times <= cut) & (now == past.before(np.full(len(table.times), cut))) & (now < end)
    return int(lost.sum()) >= LEAST_VARIED


def _no_truncated_table() -> AuditFinding:
    words = (
        "no second table was given; the exact test: write the events before a date (--write-truncated OUT --cut DATE), "
        "run the same pipeline with the same weights on them, and give its table by --truncated with the same --cut"
    )
    return AuditFinding("truncated events", "not checked", words=words)


def compare_truncated(table: EmbeddingTable, truncated: EmbeddingTable, cut: int, tolerance: float) -> AuditFinding:
    """Compare embeddings of moments until ``cut``, made from all events and from events before ``cut`` alone.

    Rows are matched by (user, time), repeated ones in their order. A query at the cut itself knows events before it,
    so all rows with time <= cut must agree.

    Raises:
        ValueError: If widths differ or no row until the cut is in both tables.
    """
    name = "truncated events"
    if table.vectors.shape[1] != truncated.vectors.shape[1]:
        widths = table.vectors.shape[1], truncated.vectors.shape[1]
        raise ValueError(f"embeddings of truncated events must be as wide as the others, {widths[0]}, got {widths[1]}")
    codes = {one: code for code, one in enumerate(table.names)}
    rows = _places(table, np.arange(len(table.names)), cut)
    found = _places(truncated, np.array([codes.get(one, -1) for one in truncated.names], dtype=np.int64), cut)
    common = sorted(rows.keys() & found.keys())
    if not common:
        raise ValueError(
            f"no row until the cut {moment(cut)} is in both tables: {len(rows)} and {len(found)} are there"
        )
    here, there = np.array([rows[key] for key in common]), np.array([found[key] for key in common])
    old, new = table.vectors[here], truncated.vectors[there]
    gaps = np.abs(old - new)
    wrong = gaps > tolerance * np.maximum(1, np.abs(old))
    missing = len(rows) - len(common)
    apart = f"; {missing} rows until the cut have no counterpart" if missing else ""
    if not wrong.any():
        nearest = (cut - table.times[here].max()) / MICROSECONDS_PER_DAY
        words = (
            f"{len(common)} embeddings until {moment(cut)}, the latest {nearest:.3g} days before it, are the same "
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
        f"{changed.sum()} of {len(common)} embeddings until the cut depend on events after it, "
        f"{distances.min():.3g} to {distances.max():.3g} days before it: near the cut alone the pipeline looks ahead, "
        f"everywhere it fits statistics or weights on later events{apart}"
    )
    return AuditFinding(name, "leak", float(gaps[wrong].max()), example, words)


def _places(table: EmbeddingTable, codes: Integers, cut: int) -> dict[tuple[int, int, int], int]:
    """(user, time, count of earlier rows of both) -> row, for rows until the cut."""
    places: dict[tuple[int, int, int], int] = {}
    seen: dict[tuple[int, int], int] = {}
    for row in np.flatnonzero((table.times <= cut) & (codes[table.users] >= 0)).tolist():
        key = int(codes[table.users[row]]), int(table.times[row])
        places[(*key, seen.get(key, 0))] = row
        seen[key] = seen.get(key, 0) + 1
    return places


def past_features(table: EmbeddingTable, events: EventTable, windows: Sequence[int]) -> Array:
    """What simple features of the past tell: ``(N, ...)``, from events strictly before each row.

    Logarithms of 1 + the number of own events and of all events in each window, and of 1 + days since the last own
    event and since the first; the own last values as ranks; time as a line, and hour, weekday and day of the year as
    angles.
    """
    past = _Past(events, table)
    now, times = past.before(table.times), table.times
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
    table: EmbeddingTable, events: EventTable, windows: Sequence[int]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """What an embedding must not know: own future, and what others do at exactly its moment.

    Returns:
        Own future and same moment, each name -> ``(N,) float64``: own events in [t, t + window], days until the next
        own event and its values, as ranks; events of others at exactly t and the sums of their values, as ranks.
        Unknown values are NaN, outcomes that differ from their most frequent value in less than 30 rows left out.
    """
    past = _Past(events, table)
    times, now = table.times, past.before(table.times)
    end = np.searchsorted(past.keys, (table.users + 1) * past.size)
    has_next = now < end
    following = np.minimum(now, len(events.times) - 1)
    own = {}
    for window in windows:
        count = past.before(times + window + 1) - now
        own[f"own events within {window / MICROSECONDS_PER_DAY:.3g} days"] = np.log1p(count).astype(np.float64)
    own["days to the next own event"] = np.where(has_next, _ranks(events.times[following] - times, has_next), np.nan)
    for name, value in events.values.items():
        own[f"{name} of the next own event"] = np.where(has_next, _ranks(value[following], has_next), np.nan)
    order = np.argsort(events.times, kind="stable")
    left, right = (np.searchsorted(past.sorted_times, times, side) for side in ("left", "right"))
    own_right = past.before(times + 1)
    n_others = (right - left) - (own_right - now)
    others = {"events of others at the moment": np.log1p(n_others)}
    for name, value in events.values.items():
        sums, own_sums = (np.concatenate([[0.0], np.cumsum(one)]) for one in (value[order], value))
        total = (sums[right] - sums[left]) - (own_sums[own_right] - own_sums[now])
        # Differences of sums leave a rounding error where there is nobody.
        total = np.where(n_others > 0, total, 0.0)
        others[f"{name} of others at the moment"] = _ranks(total, np.ones(len(times), dtype=bool))
    return _varied(own), _varied(others)


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
    table: EmbeddingTable, events: EventTable, implausible: float, cleared: bool, random: np.random.Generator
) -> list[AuditFinding]:
    gaps = np.diff(events.times)[events.users[1:] == events.users[:-1]]
    gap = int(np.median(gaps[gaps > 0])) if (gaps > 0).any() else MICROSECONDS_PER_DAY
    windows = [max(gap // 4, 1), gap, 4 * gap]
    past = past_features(table, events, windows)
    found = []
    for name, outcomes in zip(("own future", "same moment"), future_outcomes(table, events, windows), strict=True):
        scores = {
            outcome: explained(table, past, values, random)
            for outcome, values in outcomes.items()
            if np.isfinite(values).sum() >= LEAST_ROWS and len(np.unique(table.users[np.isfinite(values)])) >= 5
        }
        if not scores:
            words = f"no outcome varies over at least {LEAST_ROWS} rows of 5 users"
            found.append(AuditFinding(name, "not checked", words=words))
            continue
        # The outcome that stands out most; its p-value times the number of outcomes (Bonferroni).
        outcome, (share, z, p_value) = max(scores.items(), key=lambda one: one[1][1])
        p_value = min(1.0, p_value * len(scores))
        largest = max(scores.items(), key=lambda one: one[1][0])
        numbers = f"{outcome}: {share:.3f} of the variance that the past leaves open, z = {z:.1f}, p = {p_value:.3f}"
        if largest[1][0] > implausible:
            numbers = (
                f"{largest[0]}: {largest[1][0]:.3f} of the variance that the past leaves open, z = {largest[1][1]:.1f}"
            )
            words = "the embedding tells what comes: the future is in it, or the process is nearly deterministic"
            status: Status = "information" if cleared and name == "own future" else "leak"
            if status == "information":
                words = (
                    "the embedding tells what comes, yet it is the same without later events: a process easy to tell"
                )
            found.append(AuditFinding(name, status, largest[1][0], numbers, words))
        elif z > CLEAR_Z:
            words = (
                "told better than by simple features of the past: a good embedding or a leak, truncated events decide"
            )
            found.append(AuditFinding(name, "information", share, numbers, words))
        else:
            words = f"not told beyond simple features of the past ({numbers}), which is no proof"
            found.append(AuditFinding(name, "clean", share, None, words))
    return found


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


def _before_first(table: EmbeddingTable, events: EventTable) -> AuditFinding:
    """Users without any past who are asked at the same moment know the same, unless something else is told apart."""
    name = "before the first event"
    past = _Past(events, table)
    nothing = past.before(table.times) == past.before(np.full(len(table.times), past.moments[0]))
    if not nothing.any():
        return AuditFinding(name, "not checked", words="no row stands at or before its user's first event")
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
