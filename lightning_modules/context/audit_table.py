"""A leak audit of a table of embeddings that another pipeline made: user, time, embedding, and the events it read.

What can be computed again can be compared exactly: the same pipeline, run on events before a cut alone, must give the
same embeddings for every moment until the cut. A single table allows statistics only: how much of a user's own near
future, or of the very same moment of others, an embedding tells beyond what simple features of the past tell. A good
embedding tells some of it too.

N rows of the table, k width. Source: spec of arXiv 2502.10205, sections 13 and 15.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from lightning_modules.context.audit_association import explained, known_of_lost, told_of_lost
from lightning_modules.context.audit_findings import AuditFinding, moment
from lightning_modules.context.audit_outcomes import (
    LEAST_USERS,
    LEAST_VARIED,
    EmbeddingTable,
    EventTable,
    Past,
    future_outcomes,
    moment_outcomes,
    past_features,
    varied,
)
from lightning_modules.context.audit_truncated import Removed, compare_truncated, no_truncated_table, removed_by
from lightning_modules.context.cross_fitting import Array
from lightning_modules.context.rules import Ties
from lightning_modules.context.visible import MICROSECONDS_PER_DAY

CLEAR_Z = 3.5
"""z-score from which on an outcome counts as told; of ten outcomes one in some 400 audits exceeds it by chance."""
LEAST_ROWS = 100
"""Rows with a known outcome below which nothing is said."""


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

    With strict ties an own event at exactly the time t of a row is its future, and so is one of the tick of the log's
    clock that t lies in: at 9:00 what is stamped with the date may be to come. Truncated events keep it wherever t is
    before the cut, so rows that have one are a check of their own, ``own event at t``, which nothing clears. With
    inclusive ties events at t are known, and there are no such rows.

    On the other rows truncated events can clear ``own future``. That embeddings stay the same is not enough: the cut
    may lie farther from them than the pipeline looks ahead, or where it stops doing so, as at the end of a month. The
    rows that count are those whose next own event the cut took away: what they tell of it they cannot have seen.
    Needed are

    - 30 of them (``LEAST_VARIED``);
    - 5 that lie near: a look ahead too short to change them tells at most a share ``implausible`` of all rows;
    - that whatever outcome is told, is told on them too, to more than ``implausible``, and elsewhere by no more than
      that beyond it.

    Args:
        table: Embeddings from all events.
        events: All events.
        truncated: Embeddings by the same pipeline from events before ``cut`` alone.
        cut: Microseconds.
        ties: ``"strict"``: a row at t knows events before t; ``"inclusive"``: also those at t, as states after each
            event do that are stamped with its time.
        tolerance: Greatest allowed difference between the tables, relative to the spread of each feature, and at least
            what float32 rounds; 0 means bit for bit.
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
    exact, removed = no_truncated_table(), None
    if truncated is not None:
        if cut is None:
            raise ValueError("cut must be given with a table of truncated events, got None")
        exact = compare_truncated(table, truncated, cut, tolerance, ties)
        if exact.status == "clean":
            removed = removed_by(table, truncated, events, cut, ties, implausible)
            if weakness := removed.weakness(implausible):
                exact = replace(exact, words=f"{exact.words}; that shows little: {weakness}")
    random = np.random.default_rng(seed)
    findings = [exact, *_associations(table, events, ties, implausible, removed, n_rows, random)]
    return [*findings, _before_first(table, events, ties), _repeated(table)]


def _associations(
    table: EmbeddingTable,
    events: EventTable,
    ties: Ties,
    implausible: float,
    removed: Removed | None,
    n_rows: int,
    random: np.random.Generator,
) -> list[AuditFinding]:
    gaps = np.diff(events.times)[events.users[1:] == events.users[:-1]]
    gap = int(np.median(gaps[gaps > 0])) if (gaps > 0).any() else MICROSECONDS_PER_DAY
    windows = [max(gap // 4, 1), gap, 4 * gap]
    standing = Past(events, table, ties)
    at_t, ticks = standing.own_at_t(), _ticks(standing)
    kinds = {"own future": ~at_t}
    if at_t.any():
        kinds["own event at t"] = at_t
    if max(at_t.sum(), (~at_t).sum()) < LEAST_ROWS:
        # Either kind alone is too little to say anything of.
        kinds = {"own future": np.ones(len(at_t), dtype=bool)}
    found = []
    for name, kind in kinds.items():
        if not kind.any():
            found.append(AuditFinding(name, "not checked", words="every row has an own event at its time t"))
            continue
        some = _drawn(table.take(kind), n_rows, random)
        past, outcomes = past_features(some, events, windows, ties), future_outcomes(some, events, windows, ties)
        tied, uncleared = bool((at_t & kind).any()), None
        if removed is not None and not tied:
            near = _with_removed(table, np.flatnonzero(kind), removed, n_rows, random)
            uncleared = partial(_uncleared, *near, events, windows, ties, implausible, removed, random)
        found.append(_told(name, some, past, outcomes, implausible, uncleared, ticks if tied else None, random))
    if ties == "inclusive":
        words = "events at the moment of a row are declared as known"
        return [*found, AuditFinding("same moment", "information", words=words)]
    some = _drawn(table, n_rows, random)
    past, outcomes = past_features(some, events, windows), moment_outcomes(some, events)
    return [*found, _told("same moment", some, past, outcomes, implausible, None, ticks, random)]


def _ticks(standing: Past) -> str:
    """What is said of rows inside a tick of the log's clock; nothing where there are none."""
    n_inside = int(standing.inside.sum())
    if not n_inside:
        return ""
    tick = {1: "1 microsecond", 1000: "1 millisecond", 10**6: "1 second", 60 * 10**6: "1 minute"}
    tick |= {3600 * 10**6: "1 hour", MICROSECONDS_PER_DAY: "1 day"}
    long = tick.get(standing.tick, f"{standing.tick / 1e6:g} seconds")
    return (
        f"; events are stamped every {long}, {n_inside} rows lie between two stamps, and what carries the earlier one "
        "may happen after them"
    )


def _drawn(table: EmbeddingTable, n_rows: int, random: np.random.Generator) -> EmbeddingTable:
    size = len(table.users)
    return table if size <= n_rows else table.take(np.sort(random.choice(size, n_rows, False)))


def _with_removed(
    table: EmbeddingTable, rows: NDArray[np.int64], removed: Removed, n_rows: int, random: np.random.Generator
) -> tuple[EmbeddingTable, NDArray[np.bool_]]:
    """At most ``n_rows`` of some rows, and which of them lost their next own event: all, or a quarter of the whole."""
    near = removed.rows
    if len(near) > n_rows // 4:
        near = random.choice(near, n_rows // 4, False)
    rest = np.setdiff1d(rows, removed.rows)
    if len(rest) > n_rows - len(near):
        rest = random.choice(rest, n_rows - len(near), False)
    chosen = np.sort(np.concatenate([near, rest]))
    return table.take(chosen), np.isin(chosen, near)


def _told(
    name: str,
    table: EmbeddingTable,
    past: Array,
    outcomes: dict[str, Array],
    implausible: float,
    uncleared: Callable[[dict[str, float]], dict[str, str]] | None,
    ticks: str | None,
    random: np.random.Generator,
) -> AuditFinding:
    """How well embeddings tell outcomes.

    With ``ticks``, which are words, they may come from an event at t, which truncated events keep.
    """
    tied = ticks is not None
    scores = {
        outcome: explained(table, past, values, random)
        for outcome, values in outcomes.items()
        if np.isfinite(values).sum() >= LEAST_ROWS and len(np.unique(table.users[np.isfinite(values)])) >= LEAST_USERS
    }
    if not scores:
        words = f"of {len(table.users)} rows, no outcome varies over at least {LEAST_ROWS} of {LEAST_USERS} users"
        return AuditFinding(name, "not checked", words=words)
    told = {outcome: share for outcome, (share, _, _) in scores.items() if share > implausible}
    if told:
        why = dict.fromkeys(told, "") if uncleared is None else uncleared(told)
        outcome = max(why or told, key=lambda one: told[one])
        share, z, _ = scores[outcome]
        numbers = f"{outcome}: {share:.3f} of the variance that the past leaves open, z = {z:.1f}"
        if not why:
            words = (
                "the embedding tells what comes, yet it is the same without later events, and tells it where the cut "
                "took it away: a process easy to tell, unless the cut ends a period that the pipeline sums over"
            )
            return AuditFinding(name, "information", share, numbers, words)
        words = "the embedding tells what comes: the future is in it, or the process is nearly deterministic"
        if why[outcome]:
            words += f"; truncated events do not clear it: {why[outcome]}"
        if tied:
            words += f"{ticks}; truncated events do not clear it, they keep the events at t"
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


def _uncleared(
    table: EmbeddingTable,
    lost: NDArray[np.bool_],
    events: EventTable,
    windows: Sequence[int],
    ties: Ties,
    implausible: float,
    removed: Removed,
    random: np.random.Generator,
    told: dict[str, float],
) -> dict[str, str]:
    """Which outcomes, ``told`` to some share, a clean comparison does not clear, and why.

    ``lost (N,)`` are the rows of the table whose next own event the cut took away.
    """
    weakness = removed.weakness(implausible)
    if weakness:
        return dict.fromkeys(told, weakness)
    past, outcomes = past_features(table, events, windows, ties), future_outcomes(table, events, windows, ties)
    chosen = known_of_lost(table, events, lost, removed.cut, windows, ties)
    where = f"the {lost.sum()} rows whose next own event the cut took away"
    uncleared = {}
    for outcome, share in told.items():
        values = outcomes.get(outcome, np.full(len(lost), np.nan))
        rows = lost & np.isfinite(values)
        if varied(values[rows]) < LEAST_VARIED or len(np.unique(table.users[rows])) < LEAST_USERS:
            uncleared[outcome] = f"it hardly varies on {where}; {removed.advice}"
            continue
        there = told_of_lost(table, past, values, lost, chosen, random)
        # What is told only where the future could be seen must be plausible too.
        if there <= max(implausible, share - implausible):
            uncleared[outcome] = (
                f"on {where} it is told to {max(there, 0):.3f}: the embedding looks less far than these stand before "
                f"the cut, or to the end of a day, week or month; {removed.advice}"
            )
    return uncleared


def _before_first(table: EmbeddingTable, events: EventTable, ties: Ties) -> AuditFinding:
    """Users without any past who are asked at the same moment know the same, unless something else is told apart."""
    name = "before the first event"
    past = Past(events, table, ties)
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
