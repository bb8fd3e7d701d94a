"""Tables with rows at the very times of own events: what strict ties hide, what inclusive ones do not."""

import numpy as np
import pytest

from lightning_modules.context.audit_findings import exit_code
from lightning_modules.context.audit_outcomes import (
    EmbeddingTable,
    EventTable,
    Past,
    clock_of,
    future_outcomes,
    past_features,
)
from lightning_modules.context.audit_table import audit_table
from lightning_modules.context.audit_truncated import compare_truncated

DAY = 86_400_000_000
N_USERS = 60
NAMES = [f"u{user:02d}" for user in range(N_USERS)]
CUT = 120 * DAY


def make_events(n_days=200, seed=0):
    """25 events a user on whole days, at times several on one; amounts remember nothing."""
    random = np.random.default_rng(seed)
    times = np.sort(random.integers(0, n_days, (N_USERS, 25)), axis=1).ravel() * DAY
    return EventTable(np.repeat(np.arange(N_USERS), 25), times, {"amount": random.normal(size=N_USERS * 25)})


def before(events, cut):
    kept = events.times < cut
    return EventTable(events.users[kept], events.times[kept], {"amount": events.values["amount"][kept]})


def at_events(events, column):
    """A row at each event, with ``column(events, number of the event)`` for its embedding."""
    vectors = np.array([[column(events, row)] for row in range(len(events.users))])
    return EmbeddingTable(events.users, events.times, vectors, NAMES)


def own_amount(events, row):
    return events.values["amount"][row]


def amount_of_the_day_before(events, row):
    """The last amount of an earlier day, which strict ties allow."""
    earlier = np.flatnonzero((events.users[:row] == events.users[row]) & (events.times[:row] < events.times[row]))
    return events.values["amount"][earlier[-1]] if len(earlier) else 0.0


def next_amount(events, row):
    """The first amount of a later day."""
    later = np.flatnonzero((events.users == events.users[row]) & (events.times > events.times[row]))
    return events.values["amount"][later[0]] if len(later) else 0.0


def with_snapshots(table, events, time):
    """The table, and for each user a row at ``time`` with the last amount before it."""
    last = [np.flatnonzero((events.users == user) & (events.times < time))[-1] for user in range(N_USERS)]
    return EmbeddingTable(
        np.concatenate([table.users, np.arange(N_USERS)]),
        np.concatenate([table.times, np.full(N_USERS, time)]),
        np.concatenate([table.vectors, events.values["amount"][last][:, None]]),
        NAMES,
    )


def statuses(findings):
    return {finding.name: finding.status for finding in findings}


def leaks(findings):
    return {finding.name for finding in findings if finding.status == "leak"}


@pytest.mark.parametrize("snapshot", [None, CUT - DAY // 2])
def test_an_own_event_at_t_is_never_cleared(snapshot):
    """Truncated events keep the event at t of each row; snapshots that lost their next event prove nothing of it."""
    events = make_events()
    tables = [at_events(some, own_amount) for some in (events, before(events, CUT))]
    if snapshot is not None:
        tables = [with_snapshots(table, events, snapshot) for table in tables]
    findings = audit_table(tables[0], events, truncated=tables[1], cut=CUT)
    assert statuses(findings)["truncated events"] == "clean"
    assert leaks(findings) == {"own event at t"}
    (finding,) = [finding for finding in findings if finding.status == "leak"]
    assert finding.worst > 0.8
    assert "--ties inclusive" in finding.words


def test_rows_at_events_clear_no_others():
    """Snapshots at the cut lose an own event there; the rows half a day before their event lose nothing by the cut."""
    events = make_events(n_days=119)
    users, times = np.append(events.users, np.arange(N_USERS)), np.append(events.times, np.full(N_USERS, CUT))
    amounts = np.random.default_rng(1).normal(size=len(users))
    order = np.lexsort((times, users))
    events = EventTable(users[order], times[order], {"amount": amounts[order]})
    known = before(events, CUT)
    told = at_events(known, own_amount)
    table = with_snapshots(EmbeddingTable(told.users, told.times - DAY // 2, told.vectors, NAMES), known, CUT)
    findings = audit_table(table, events, truncated=table, cut=CUT)
    assert statuses(findings)["truncated events"] == "clean"
    assert leaks(findings) == {"own future"}


def test_rows_at_events_that_know_the_days_before_are_clean():
    events = make_events()
    tables = [at_events(some, amount_of_the_day_before) for some in (events, before(events, CUT))]
    findings = audit_table(tables[0], events, truncated=tables[1], cut=CUT)
    assert exit_code(findings) == 0
    assert statuses(findings)["own event at t"] == "clean"
    assert statuses(findings)["own future"] == "not checked"  # no row stands elsewhere


def test_a_weak_trace_of_an_event_at_t_is_not_left_to_truncated_events():
    events = make_events()
    noise = np.random.default_rng(1).normal(size=len(events.users))
    table = at_events(events, lambda some, row: some.values["amount"][row] + 1.5 * noise[row])
    findings = {finding.name: finding for finding in audit_table(table, events)}
    assert findings["own event at t"].status == "information"
    assert "cannot decide" in findings["own event at t"].words


def test_states_after_each_event_are_known_with_inclusive_ties():
    events = make_events()
    table = at_events(events, own_amount)
    assert leaks(audit_table(table, events)) == {"own event at t"}
    # The event of a row at the cut is not among those before it, which is no fault of the pipeline.
    truncated = with_snapshots(at_events(before(events, CUT), own_amount), events, CUT)
    for second in ({}, {"truncated": truncated, "cut": CUT}):
        findings = audit_table(with_snapshots(table, events, CUT), events, ties="inclusive", **second)
        assert exit_code(findings) == 0
        assert statuses(findings)["own future"] == "clean"
        assert statuses(findings)["same moment"] == "information"
        assert "own event at t" not in statuses(findings)


def test_a_row_at_the_cut_is_compared_with_strict_ties_alone():
    row = EmbeddingTable(np.array([0, 0]), np.array([8, 9]), np.array([[1.0], [2.0]]), ["a"])
    other = EmbeddingTable(np.array([0, 0]), np.array([8, 9]), np.array([[1.0], [3.0]]), ["a"])
    assert compare_truncated(row, other, 9, 0.0).status == "leak"
    assert compare_truncated(row, other, 9, 0.0, "inclusive").status == "clean"
    assert compare_truncated(row, other, 10, 0.0, "inclusive").status == "leak"


def test_a_look_ahead_is_a_leak_with_inclusive_ties_too():
    events = make_events()
    tables = [at_events(some, next_amount) for some in (events, before(events, CUT))]
    assert leaks(audit_table(tables[0], events, ties="inclusive")) == {"own future"}
    findings = audit_table(tables[0], events, truncated=tables[1], cut=CUT, ties="inclusive")
    assert leaks(findings) == {"truncated events", "own future"}
    # Without the last rows of each user, whose next event is behind the cut, the comparison shows nothing.
    has_next = np.append(tables[1].users[1:] == tables[1].users[:-1], False) & (tables[1].vectors[:, 0] != 0)
    findings = audit_table(tables[0], events, truncated=tables[1].take(has_next), cut=CUT, ties="inclusive")
    assert leaks(findings) == {"own future"}


@pytest.mark.parametrize("whole", [np.sum, lambda amounts: amounts[-1]])
def test_a_day_of_several_own_events_is_found(whole):
    """Two events a day or so: the first of them tells little of their sum or of the last."""
    events = make_events(n_days=12)
    rows = np.flatnonzero(np.append(True, (np.diff(events.times) != 0) | (np.diff(events.users) != 0)))
    days = np.split(events.values["amount"], rows[1:])
    vectors = np.array([[whole(amounts)] for amounts in days])
    table = EmbeddingTable(events.users[rows], events.times[rows], vectors, NAMES)
    assert "own event at t" in leaks(audit_table(table, events))


@pytest.mark.parametrize(("hours", "clock"), [(0, "days"), (9, "days"), (9, "microseconds")])
def test_what_carries_a_date_may_happen_after_nine_of_it(hours, clock):
    """On a log of dates an embedding at 9:00 that tells the amounts of its date is no cleaner than one at 0:00."""
    events = make_events()
    if clock == "microseconds":
        events.times[-1] += 1  # so that a stamp is a moment
    table = at_events(events, own_amount)
    table = EmbeddingTable(table.users, table.times + hours * DAY // 24, table.vectors, NAMES)
    found = {finding.name: finding for finding in audit_table(table, events)}
    if clock == "microseconds":
        assert all(finding.status != "leak" for finding in found.values())
        return
    assert found["own event at t"].status == "leak"
    said = "events are stamped every 1 day, " in found["own event at t"].words
    assert said == (hours == 9)
    inclusive = audit_table(table, events, ties="inclusive")
    assert all(finding.status != "leak" for finding in inclusive)


def test_the_clock_of_a_log_is_what_divides_its_distances():
    hour = DAY // 24
    assert clock_of(np.array([3, 3 + 5 * DAY, 3 + 7 * DAY])) == DAY
    assert clock_of(np.array([3, 3 + 5 * hour, 3 + 7 * hour])) == hour
    assert clock_of(np.array([3, 4])) == 1
    assert clock_of(np.array([3])) == DAY
    # midnights of Berlin: an hour earlier in summer
    berlin = np.array([0, DAY, 2 * DAY - hour, 3 * DAY - hour, 4 * DAY])
    assert clock_of(berlin) == DAY
    assert clock_of(np.append(berlin, 5 * DAY + 2 * hour)) == hour
    assert clock_of(np.append(berlin, 4 * DAY + hour)) == hour, "two on a date are no dates"


def test_few_rows_of_each_kind_are_judged_together():
    events = make_events()
    random = np.random.default_rng(3)
    rows = np.sort(random.choice(len(events.users), 160, replace=False))
    table = at_events(events, own_amount)
    # A microsecond before its event a row knows as much as at it.
    table = EmbeddingTable(table.users, table.times - np.arange(len(table.times)) % 2, table.vectors, NAMES).take(rows)
    assert leaks(audit_table(table, events)) == {"own future"}


@pytest.mark.parametrize("ties", ["strict", "inclusive"])
@pytest.mark.parametrize("clock", ["days", "microseconds"])
def test_what_is_known_and_what_is_not_equal_loops(ties, clock):
    events = make_events()
    table = at_events(events, own_amount).take(np.arange(0, 1500, 7))
    table.times[::3] += DAY // 2
    if clock == "microseconds":
        events.times[-1] += 1
    past, own = past_features(table, events, [10 * DAY], ties), future_outcomes(table, events, [10 * DAY], ties)
    following = "the own event at or after t" if ties == "strict" else "the next own event"
    standing = Past(events, table, ties)
    assert standing.inside.any() == (clock == "days" and ties == "strict")
    for row, (user, time) in enumerate(zip(table.users, table.times, strict=True)):
        if clock == "days" and ties == "strict" and (events.times == time - time % DAY).any():
            time -= time % DAY  # what is stamped with the date may come at any hour of it
        mine, known = events.users == user, events.times < time if ties == "strict" else events.times <= time
        # logarithms of the same integers
        assert past[row, 3] == pytest.approx(np.log1p((mine & known).sum()), abs=1e-12)
        ahead = mine & ~known
        within = ahead & (events.times <= time + 10 * DAY)
        known_until = time + (ties == "inclusive") + 10 * DAY
        count = np.log1p(within.sum()) if known_until <= events.times.max() else np.nan
        assert own["own events within 10 days"][row] == pytest.approx(count, abs=1e-12, nan_ok=True)
        assert np.isnan(own[f"amount of {following}"][row]) == (not ahead.any())
