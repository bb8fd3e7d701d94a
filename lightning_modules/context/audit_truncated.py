"""The exact half of the audit of a table: the same pipeline, run again on the events before a cut alone.

Embeddings of moments until the cut must stay the same. That they do shows something only where the cut took away what
a pipeline that looks ahead would have seen: near the cut, for a user who had another event soon after.

N rows of the table, k width. Source: spec of arXiv 2502.10205, section 13.
"""

from dataclasses import dataclass

import numpy as np

from lightning_modules.context.audit_findings import AuditFinding, allowed_changes, moment
from lightning_modules.context.audit_outcomes import LEAST_VARIED, EmbeddingTable, EventTable, Integers, Past
from lightning_modules.context.rules import Ties
from lightning_modules.context.visible import MICROSECONDS_PER_DAY

LEAST_NEAR = 5
"""Rows that must lose an event as near before a look ahead that far counts as tested: one may hold nothing to see."""


def no_truncated_table() -> AuditFinding:
    """What the exact test would take."""
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

    Args:
        table: Embeddings from all events.
        truncated: Embeddings from events before the cut.
        cut: Microseconds.
        tolerance: Greatest allowed difference, relative to the spread of each feature over ``table``; see
            :func:`~lightning_modules.context.audit_findings.allowed_changes`.
        ties: See :func:`~lightning_modules.context.audit_table.audit_table`.

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
    wrong = gaps > allowed_changes(old, table.vectors, tolerance)
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


@dataclass(frozen=True)
class Removed:
    """What a cut took away that embeddings until it, unchanged as they are, had no use for.

    Attributes:
        cut: Microseconds.
        rows: ``(n,) int64``: compared rows of the table whose next own event the cut took away.
        reach: Days within which 5 of these rows (``LEAST_NEAR``) have that event, infinite with fewer rows: had the
            pipeline looked ahead as far, they would have changed.
        untested: Share of all rows that have their next own event sooner: those that a shorter look ahead tells.
        advice: Which cut would take more away, in words.
    """

    cut: int
    rows: Integers
    reach: float
    untested: float
    advice: str

    def weakness(self, implausible: float) -> str:
        """Why the comparison shows too little, if it does; ``implausible`` is the most that may be untested."""
        if len(self.rows) < LEAST_VARIED:
            few = f"the cut took the next own event of {len(self.rows)} rows away, {LEAST_VARIED} are needed"
            return f"{few}; {self.advice}"
        if self.untested > implausible:
            return (
                f"of the rows whose next own event was cut off all but {LEAST_NEAR - 1} stand {self.reach:.3g} days or "
                f"more before it, and {self.untested:.0%} of all rows less: nothing shorter than that was tested; "
                f"{self.advice}"
            )
        return ""


def removed_by(
    table: EmbeddingTable, truncated: EmbeddingTable, events: EventTable, cut: int, ties: Ties, near: float = 0.5
) -> Removed:
    """What the cut took away from the compared rows.

    With strict ties, rows that have an own event at exactly their time are left out: truncated events keep it.

    Args:
        table: Embeddings from all events.
        truncated: Embeddings from events before the cut.
        events: All events.
        cut: Microseconds.
        ties: See :func:`~lightning_modules.context.audit_table.audit_table`.
        near: Quantile of the time to the next own event until which one is near; another cut is advised where it takes
            a near one away from more rows.
    """
    past = Past(events, table, ties)
    following, has_next = past.following()
    asked, until = has_next & ~past.own_at_t(), events.times[following]
    ahead = until - past.times
    if not asked.any():
        return Removed(cut, np.zeros(0, dtype=np.int64), float("inf"), 1.0, "no row has an own event after it")
    lost = np.zeros(len(asked), dtype=bool)
    lost[_common(table, truncated, cut, ties)[0]] = True
    lost &= asked & (until >= cut)
    rows = np.flatnonzero(lost)
    reach = float(np.sort(ahead[rows])[LEAST_NEAR - 1]) if len(rows) >= LEAST_NEAR else float("inf")

    limit = np.quantile(ahead[asked], near)
    candidates = asked & (ahead <= limit)
    # A cut takes away the events that come at or after it, of rows known before it.
    starts, ends = np.sort(past.times[candidates]), np.sort(until[candidates])
    counts = np.searchsorted(starts, starts, "right") - np.searchsorted(ends, starts, "left")
    best = int(counts.argmax())
    within = f"an own event within {limit / MICROSECONDS_PER_DAY:.3g} days"
    if counts[best] > (lost & candidates).sum():
        advice = f'--cut "{moment(int(starts[best]))}" would take {within} away from {counts[best]} rows'
    else:
        advice = f"more rows are needed for a cut that takes {within} away"
    return Removed(cut, rows, reach / MICROSECONDS_PER_DAY, float((ahead[asked] < reach).mean()), advice)
