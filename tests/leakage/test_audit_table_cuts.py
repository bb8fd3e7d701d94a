"""What a run on truncated events shows of a table, and where its cut lies so that it shows nothing."""

import re
from datetime import datetime

import numpy as np
import pytest

from lightning_modules.context.audit_association import told_of_lost
from lightning_modules.context.audit_findings import allowed_changes, exit_code
from lightning_modules.context.audit_outcomes import EmbeddingTable, EventTable
from lightning_modules.context.audit_table import audit_table
from lightning_modules.context.audit_truncated import compare_truncated, removed_by

DAY = 86_400_000_000
N_USERS, N_DAYS = 150, 120
NAMES = [f"u{user:03d}" for user in range(N_USERS)]
WEEKLY = np.arange(7, N_DAYS - 3, 7)
EVENTS_A_DAY = 0.4


def make_events(*, forecastable, seed=0):
    """Events at random times; values that remember nothing, or follow each from the one before."""
    random = np.random.default_rng(seed)
    users = np.repeat(np.arange(N_USERS), random.poisson(EVENTS_A_DAY * N_DAYS, N_USERS) + 1)
    times = (random.random(len(users)) * N_DAYS * DAY).astype(np.int64)
    times = times[np.lexsort((times, users))]
    values = random.normal(size=len(users))
    if forecastable:
        for row in range(len(users)):
            if row == 0 or users[row] != users[row - 1]:
                values[row] = users[row] / N_USERS
            else:
                values[row] = step(values[row - 1], users[row])
    return EventTable(users, times, {"value": values})


def step(value, user):
    return (1.7 * value + user / N_USERS + 0.3) % 1


def before(events, cut):
    kept = events.times < cut
    return EventTable(events.users[kept], events.times[kept], {"value": events.values["value"][kept]})


def asked_at(days):
    return np.repeat(np.arange(N_USERS), len(days)), np.tile(np.asarray(days) * DAY, N_USERS).astype(np.int64)


def embed(events, users, times, *, until=None, ties="strict"):
    """Number of own events, the last value, what follows from it, and the next value if it comes before ``until``."""
    vectors = np.zeros((len(users), 4))
    for row, (user, time) in enumerate(zip(users, times, strict=True)):
        start, end = np.searchsorted(events.users, [user, user + 1])
        now = start + np.searchsorted(events.times[start:end], time, "right" if ties == "inclusive" else "left")
        vectors[row, 0] = now - start
        if now > start:
            last = events.values["value"][now - 1]
            vectors[row, 1:3] = last, step(last, user)
        if until is not None and now < end and events.times[now] < until(time):
            vectors[row, 3] = events.values["value"][now]
    return EmbeddingTable(users, times, vectors, NAMES)


def days_ahead(days):
    return lambda time: time + int(days * DAY)


def end_of_the_week(time):
    return (time // (7 * DAY) + 1) * 7 * DAY


def audited(events, users, times, cut, *, ties="strict", until=None, **settings):
    """Findings by name of the table alone, and of the table beside a run on the events before a cut."""
    whole = embed(events, users, times, until=until, ties=ties)
    known = times <= cut
    part = embed(before(events, cut), users[known], times[known], until=until, ties=ties)
    alone = audit_table(whole, events, ties=ties, **settings)
    both = audit_table(whole, events, truncated=part, cut=cut, ties=ties, **settings)
    return [{finding.name: finding for finding in findings} for findings in (alone, both)]


def advised(words):
    said = datetime.fromisoformat(re.search(r'--cut "([^"]+)"', words).group(1))
    gap = said - datetime(1970, 1, 1)
    return (gap.days * 86_400 + gap.seconds) * 1_000_000 + gap.microseconds


@pytest.mark.parametrize("ties", ["strict", "inclusive"])
def test_a_cut_beyond_the_reach_of_a_pipeline_clears_nothing(ties):
    """Rows at midnight once a week look 3 days ahead; the cut lies 3 days after one of them."""
    events, (users, times) = make_events(forecastable=False), asked_at(WEEKLY)
    cut = int(WEEKLY[8] + 3) * DAY
    alone, both = audited(events, users, times, cut, ties=ties, until=days_ahead(3))
    assert alone["own future"].status == "leak"
    assert both["truncated events"].status == "clean"
    assert both["own future"].status == "leak"
    assert exit_code(list(both.values())) == 1
    # Both say so: the exact finding is all that speaks where less is told than a leak takes.
    for name in ("truncated events", "own future"):
        assert re.search(r"stand 3\.\d+ days or more before it", both[name].words), both[name].words
    # The cut that is advised shows it.
    _, again = audited(events, users, times, advised(both["own future"].words), ties=ties, until=days_ahead(3))
    assert again["truncated events"].status == "leak"


@pytest.mark.parametrize("ties", ["strict", "inclusive"])
def test_a_forecast_is_cleared_by_a_cut_near_its_rows_alone(ties):
    events, (users, times) = make_events(forecastable=True), asked_at(WEEKLY)
    alone, far = audited(events, users, times, int(WEEKLY[8] + 3) * DAY, ties=ties)
    assert alone["own future"].status == "leak"
    assert (far["truncated events"].status, far["own future"].status) == ("clean", "leak")
    cut = advised(far["own future"].words)
    # A row is compared at the cut with strict ties, right before it with inclusive ones.
    assert cut - (ties == "inclusive") in times
    _, near = audited(events, users, times, cut, ties=ties)
    assert (near["truncated events"].status, near["own future"].status) == ("clean", "information")
    assert exit_code(list(near.values())) == 0
    assert "little" not in near["truncated events"].words


def test_a_forecast_does_not_cover_up_a_short_look_ahead():
    """What is told 3 days before the cut is told without it; that the pipeline also looks 2 days ahead stays open."""
    events, (users, times) = make_events(forecastable=True), asked_at(WEEKLY)
    _, both = audited(events, users, times, int(WEEKLY[8] + 3) * DAY, until=days_ahead(2))
    assert (both["truncated events"].status, both["own future"].status) == ("clean", "leak")
    _, near = audited(events, users, times, int(WEEKLY[8]) * DAY, until=days_ahead(2))
    assert near["truncated events"].status == "leak"


@pytest.mark.parametrize("ties", ["strict", "inclusive"])
def test_a_cut_where_a_pipeline_stops_looking_ahead_clears_nothing(ties):
    """A sum over the week in which a row stands, and a cut at the end of a week: nothing can change."""
    events, (users, times) = make_events(forecastable=False), asked_at(np.arange(8, N_DAYS - 7) + 0.5)
    alone, both = audited(events, users, times, 70 * DAY, ties=ties, until=end_of_the_week)
    assert alone["own future"].status == "leak"
    assert (both["truncated events"].status, both["own future"].status) == ("clean", "leak")
    assert "to the end of a day, week or month" in both["own future"].words
    _, within = audited(events, users, times, 73 * DAY, ties=ties, until=end_of_the_week)
    assert within["truncated events"].status == "leak"


def test_too_few_rows_near_the_cut_clear_nothing():
    events, (users, times) = make_events(forecastable=True), asked_at(WEEKLY)
    # At the cut itself few are asked, and few had no event in the week before it.
    kept = (users < 15) | (times != WEEKLY[8] * DAY)
    _, both = audited(events, users[kept], times[kept], int(WEEKLY[8]) * DAY)
    assert both["own future"].status == "leak"
    lost = re.search(r"the next own event of (\d+) rows away, 30 are needed", both["own future"].words)
    assert 15 <= int(lost.group(1)) < 30


@pytest.mark.parametrize(("until", "status"), [(None, "information"), (end_of_the_week, "leak")])
def test_what_is_told_of_lost_events_is_compared_with_what_is_told_of_all(until, status):
    """A blurred value has a forecast that tells a third of it. Beside the value itself it clears neither."""
    plain = make_events(forecastable=True)
    blurred = plain.values["value"] + np.random.default_rng(3).normal(scale=0.4, size=len(plain.users))
    events = EventTable(plain.users, plain.times, {"value": blurred})
    users, times = asked_at(np.arange(7, N_DAYS - 7, 2) + 0.9)
    cut = 70 * DAY
    known = times <= cut
    tables = []
    for cut_at, rows in ((N_DAYS * DAY, times > 0), (cut, known)):
        forecast = embed(before(plain, cut_at), users[rows], times[rows]).vectors[:, 2]
        value = embed(before(events, cut_at), users[rows], times[rows], until=until).vectors[:, 3]
        tables.append(EmbeddingTable(users[rows], times[rows], np.column_stack([forecast, value]), NAMES))
    findings = audit_table(tables[0], events, truncated=tables[1], cut=cut, implausible=0.15)
    found = {finding.name: finding for finding in findings}
    assert (found["truncated events"].status, found["own future"].status) == ("clean", status)


@pytest.mark.parametrize(("explained_by", "noise"), [(None, 0.3), ("past", 0.05), ("choice", 0.3)])
def test_what_the_past_or_their_choice_tells_of_lost_rows_is_not_counted(explained_by, noise):
    random = np.random.default_rng(0)
    users, cause = np.repeat(np.arange(40), 10), random.normal(size=(400, 1))
    outcome = cause[:, 0] + noise * random.normal(size=400)
    vectors = np.column_stack([cause, random.normal(size=(400, 3))])
    table = EmbeddingTable(users, np.tile(np.arange(10), 40), vectors, NAMES)
    lost, nothing = np.arange(400) % 10 == 0, random.normal(size=(400, 1))
    past = cause if explained_by == "past" else nothing
    known = cause[lost] if explained_by == "choice" else nothing[lost]
    share = told_of_lost(table, past, outcome, lost, known, random)
    # 1 / (1 + 0.3^2) of the variance is told, or nothing, give or take what 40 rows allow.
    assert share > 0.8 if explained_by is None else share < 0.3


@pytest.mark.parametrize("ties", ["strict", "inclusive"])
def test_what_a_cut_takes_away_equals_loops(ties):
    random = np.random.default_rng(2)
    # Whole days: own events at the very times of rows, and of the cut.
    events_of = np.sort(random.integers(0, 60, (N_USERS, 20)), axis=1)
    events = EventTable(np.repeat(np.arange(N_USERS), 20), events_of.ravel() * DAY, {"value": np.ones(20 * N_USERS)})
    users, times = random.integers(0, N_USERS, 900), random.integers(0, 62, 900) * DAY
    table, cut = EmbeddingTable(users, times, np.zeros((900, 1)), NAMES), 30 * DAY
    ahead = np.full(900, np.inf)
    for row, (user, time) in enumerate(zip(users, times, strict=True)):
        own = events_of[user] * DAY
        if ties == "strict" and time in own:
            continue
        later = own[own > time] if ties == "inclusive" else own[own >= time]
        # With inclusive ties a row knows all before one microsecond after its time.
        ahead[row] = later[0] - time - (ties == "inclusive") if len(later) else np.inf
    asked, known = np.isfinite(ahead), times + (ties == "inclusive")

    def lost(at):
        return np.flatnonzero(asked & (known <= at) & (known + ahead >= at))

    found = removed_by(table, table, events, cut, ties)
    np.testing.assert_array_equal(found.rows, lost(cut))
    assert found.reach == np.sort(ahead[lost(cut)])[4] / DAY
    assert found.untested == np.mean(ahead[asked] < found.reach * DAY)
    best = advised(found.advice)
    near = np.median(ahead[asked])
    counts = {at: (ahead[lost(at)] <= near).sum() for at in np.unique(known[asked])}
    assert counts[best] == max(counts.values())
    assert f"away from {counts[best]} rows" in found.advice


def test_where_the_log_ends_is_not_taken_for_the_future():
    """An event every other day: counts vary with nothing but the end of the log, which a date tells."""
    days = np.random.default_rng(0).random((N_USERS, 1)) * 2 + np.arange(0, N_DAYS, 2)
    times = (days.ravel() * DAY).astype(np.int64)
    users = np.repeat(np.arange(N_USERS), days.shape[1])
    events = EventTable(users, times, {"value": np.random.default_rng(1).normal(size=len(times))})
    asked, moments = asked_at(np.arange(N_DAYS - 20, N_DAYS))
    to_the_end = np.maximum(moments / DAY - (N_DAYS - 8), 0)
    table = EmbeddingTable(asked, moments, np.column_stack([to_the_end, to_the_end**2]), NAMES)
    (finding,) = [finding for finding in audit_table(table, events) if finding.name == "own future"]
    assert finding.status == "clean"
    assert finding.worst < 0.1


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1.0, 1e6])
def test_a_tolerance_is_relative_to_the_spread_of_a_feature(scale):
    random = np.random.default_rng(0)
    users, times = np.repeat(np.arange(20), 20), np.tile(np.arange(20), 20) * DAY
    vectors = scale * random.normal(size=(400, 4))
    table = EmbeddingTable(users, times, vectors, NAMES)

    def status(gap, column=2):
        other = vectors.copy()
        other[150, column] += gap
        part = EmbeddingTable(users, times, other, NAMES)
        return compare_truncated(table, part, 15 * DAY, 1e-4).status

    # One row changes by a share of the spread of its column, 1 give or take a tenth.
    assert status(3e-4 * scale) == "leak"
    assert status(3e-5 * scale) == "clean"
    assert compare_truncated(table, EmbeddingTable(users, times, -vectors, NAMES), 15 * DAY, 1e-5).status == "leak"
    vectors[:, 2] *= 1e-3
    assert status(3e-4 * scale) == "leak"
    assert status(3e-4 * scale * 1e-3) == "leak", "a small feature among large ones counts as much"


def test_a_few_wild_rows_hide_no_change_of_the_others():
    random = np.random.default_rng(0)
    users, times = np.repeat(np.arange(20), 20), np.tile(np.arange(20), 20) * DAY
    vectors = random.normal(size=(400, 2))
    vectors[::10] *= 1e9
    other = vectors.copy()
    other[1, 1] += 1e-3
    tables = [EmbeddingTable(users, times, one, NAMES) for one in (vectors, other)]
    assert compare_truncated(*tables, 15 * DAY, 1e-5).status == "leak"
    # What a wild number rounds is its own.
    other[1], other[10] = vectors[1], vectors[10] * (1 + 1e-6)
    assert compare_truncated(*tables, 15 * DAY, 1e-5).status == "clean"


def test_missing_numbers_are_no_part_of_a_spread():
    before = np.array([[1.0, np.nan, np.inf], [3.0, np.nan, 5.0], [np.nan, np.nan, 5.0]])
    allowed = allowed_changes(before, before, 0.1)
    unit = 32 * 2.0**-23
    np.testing.assert_allclose(allowed[:, 0], 0.1 * 0.68, rtol=1e-12)
    np.testing.assert_array_equal(allowed[:, 1], 0)
    np.testing.assert_allclose(allowed[:, 2], 5 * unit, rtol=1e-12)
    assert not allowed_changes(before, before, 0.0).any()


def test_a_tolerance_lets_float32_sums_round():
    """A feature that hardly varies around 5: its spread is less than what sums in another order differ by."""
    random = np.random.default_rng(0)
    users, times = np.repeat(np.arange(20), 20), np.tile(np.arange(20), 20) * DAY
    vectors = 5 + 1e-6 * random.normal(size=(400, 1))

    def status(gap, tolerance):
        part = EmbeddingTable(users, times, vectors + gap, NAMES)
        return compare_truncated(EmbeddingTable(users, times, vectors, NAMES), part, 15 * DAY, tolerance).status

    unit = 5 * 2.0**-23
    assert status(30 * unit, 1e-5) == "clean"
    assert status(34 * unit, 1e-5) == "leak"
    assert status(1e-12, 0.0) == "leak", "bit for bit"
