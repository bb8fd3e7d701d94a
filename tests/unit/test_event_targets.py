"""Queries and labels against loops, what happens at exactly t, rules that look ahead, and planted leaks."""

import logging
from dataclasses import replace

import numpy as np
import pytest

from datamodules.event_preparation import FOREVER, EventLog
from datamodules.event_published import EveryNthEvent, FinalDays, Left
from datamodules.event_targets import (
    AfterDelay,
    AfterFirstEvent,
    AmountAbove,
    AtEvents,
    CalendarDates,
    EventWithin,
    LastEvent,
    LocalLabel,
    NextType,
    NoEventWithin,
    QueryRule,
    RandomTimes,
    StaticLabel,
)
from datamodules.label_checks import (
    _asked,
    _moved,
    _moved_by_own_cuts,
    _own_limits,
    asks_by_outcome,
    check_labels,
    two_sided_auc,
    warnings_of,
)
from datamodules.sources.events import DAY, MISSING

START = 18_000 * DAY
HOUR = DAY // 24
SECOND = 10**6


def log_of(sequences, *, limits=None, **arguments) -> EventLog:
    """A log of one list of (day, kind, amount) a user; kinds a, b, c."""
    rows = [row for sequence in sequences for row in sequence]
    names = ["a", "b", "c", MISSING]
    settings = {
        "offsets": np.cumsum([0, *(len(s) for s in sequences)]),
        "times": START + np.array([round(day * DAY) for day, _, _ in rows]),
        "codes": {"kind": np.array([names.index(kind) for _, kind, _ in rows], dtype=np.int32)},
        "names": {"kind": names},
        "numbers": {"amount": np.array([amount for _, _, amount in rows], dtype=float)},
        "static": {},
        "static_names": {},
        "user_folds": np.zeros(len(sequences), dtype=np.int8),
        "user_words": np.arange(len(sequences), dtype=np.uint64) * np.uint64(7919),
        "by_time": limits is not None,
        "validation_start": FOREVER if limits is None else START + limits[0] * DAY,
        "test_start": FOREVER if limits is None else START + limits[1] * DAY,
        "n_before": 1,
    }
    return EventLog(**(settings | arguments))


def asked(queries):
    """(user, day) -> label."""
    days = (queries["times"] - START) / DAY
    return {(int(u), float(t)): int(k) for u, t, k in zip(queries["users"], days, queries["labels"], strict=True)}


def dates(*days):
    return [str(np.datetime64(int(START + day * DAY), "us")) for day in days]


LONG = [(0, "a", 0.0), (100, "a", 0.0)]
"""A user who keeps the file open long enough for every horizon."""


def test_events_at_exactly_t_are_in_neither_the_history_nor_the_label():
    sequences = [[(1, "a", 1), (5, "b", 1)], [(1, "a", 1), (5, "b", 1), (7, "c", 1)], [(5, "b", 1)], LONG]
    log = log_of(sequences, clock=1)
    found = asked(NoEventWithin(CalendarDates(dates=dates(5)), days=2).queries(log))
    # user 2 has no event before day 5; the event at t + 2 days itself counts
    assert found == {(0, 5.0): 1, (1, 5.0): 0, (3, 5.0): 1}
    assert asked(NoEventWithin(CalendarDates(dates=dates(5)), days=1.999).queries(log))[(1, 5.0)] == 1


def test_on_a_log_of_dates_the_day_that_begins_at_t_is_the_first_of_the_horizon():
    sequences = [
        [(1, "a", 1.0), (5, "b", 3.0)],  # on the day of the query
        [(1, "a", 1.0), (7, "b", 3.0)],  # the third day: beyond two
        [(1, "a", 1.0), (6, "c", 5.0)],
        LONG,
    ]
    log, rule = log_of(sequences), CalendarDates(dates=dates(5))
    assert log.tick == DAY
    assert asked(NoEventWithin(rule, days=2).queries(log)) == {(0, 5.0): 0, (1, 5.0): 1, (2, 5.0): 0, (3, 5.0): 1}
    found = asked(EventWithin(rule, 2, "kind", ["b"]).queries(log))
    assert found == {(0, 5.0): 1, (1, 5.0): 0, (2, 5.0): 0, (3, 5.0): 0}, "asked although it is decided that day"
    found = asked(AmountAbove(rule, 2, "amount", quantile=0.5).queries(log))  # sums 3, 0, 5, 0
    assert found == {(0, 5.0): 1, (1, 5.0): 0, (2, 5.0): 1, (3, 5.0): 0}
    # inside of the day its stamp lies before t: known, and not in the horizon
    noon = CalendarDates(dates=dates(5.5))
    assert asked(NoEventWithin(noon, days=0.4).queries(log))[(0, 5.5)] == 1
    assert log.before(np.array([0]), np.array([START + 5.5 * DAY], dtype=np.int64)).tolist() == [2]


@pytest.mark.parametrize("unit", [DAY, SECOND, 1000])
def test_on_any_clock_coarser_than_a_microsecond_a_horizon_begins_with_t(unit):
    sequences = [
        [(1, "a", 1.0), (5, "b", 3.0)],  # at t
        [(1, "a", 1.0), (7, "b", 3.0)],  # at t + 2 days
        [(1, "a", 1.0), (4, "b", 3.0)],  # before t
        LONG,
    ]
    rule = CalendarDates(dates=dates(5))
    log, finest = log_of(sequences, clock=unit), log_of(sequences, clock=1)
    assert asked(NoEventWithin(rule, days=2).queries(log)) == {(0, 5.0): 0, (1, 5.0): 1, (2, 5.0): 1, (3, 5.0): 1}
    assert asked(NoEventWithin(rule, days=2).queries(finest)) == {(0, 5.0): 1, (1, 5.0): 0, (2, 5.0): 1, (3, 5.0): 1}
    assert asked(EventWithin(rule, 2, "kind", ["b"]).queries(log)) == {(0, 5.0): 1, (1, 5.0): 0, (3, 5.0): 0}
    assert asked(EventWithin(rule, 2, "kind", ["b"]).queries(finest)) == {(1, 5.0): 1, (3, 5.0): 0}
    assert asked(AmountAbove(rule, 2, "amount").queries(log)) == {(0, 5.0): 1, (1, 5.0): 0, (2, 5.0): 0, (3, 5.0): 0}
    assert asked(AmountAbove(rule, 2, "amount").queries(finest))[(1, 5.0)] == 1


def test_users_decided_at_or_before_t_are_not_asked():
    sequences = [
        [(1, "a", 1), (3, "b", 1), (8, "b", 1)],  # decided before
        [(1, "a", 1), (5, "b", 1), (8, "b", 1)],  # decided at t
        [(1, "a", 1), (8, "b", 1)],
        [(1, "a", 1), (8, "c", 1)],
        LONG,
    ]
    found = asked(EventWithin(CalendarDates(dates=dates(5)), 5, "kind", ["b"]).queries(log_of(sequences, clock=1)))
    assert found == {(2, 5.0): 1, (3, 5.0): 0, (4, 5.0): 0}


def test_an_unknown_value_names_the_nearest():
    with pytest.raises(ValueError, match="column 'kind' has no value 'A'"):
        EventWithin(AfterFirstEvent(), 5, "kind", ["A"]).queries(log_of([LONG]))


def test_rules_ask_when_they_say():
    log = log_of([[(1, "a", 1), (1, "b", 1), (4.5, "a", 1)], [(2, "a", 1), (30, "a", 1)], LONG], clock=1)
    users, times = AfterFirstEvent().pairs(log)
    assert (times - START).tolist() == [DAY + 1, 2 * DAY + 1, 1]
    assert log.before(users, times).tolist() == [2, 4, 6]
    assert ((AfterDelay(10).pairs(log)[1] - START) / DAY).tolist() == [11, 12, 10]
    assert (AtEvents().pairs(log)[1] - START)[:3].tolist() == [DAY, 4.5 * DAY, 2 * DAY]
    assert (LastEvent().pairs(log)[1] - START).tolist() == [4.5 * DAY + 1, 30 * DAY + 1, 100 * DAY + 1]
    users, times = CalendarDates(every_days=10, first=dates(2)[0]).pairs(log)
    assert sorted(set(((times - START) / DAY).tolist())) == [2, 12, 22, 32, 42, 52, 62, 72, 82, 92]
    assert users[times == START + 2 * DAY].tolist() == [0, 2]  # user 1 starts at exactly day 2
    users, times = CalendarDates(dates=dates(12), active_days=8).pairs(log)
    assert users.tolist() == [0]
    users, times = RandomTimes(per_user=3, seed=5).pairs(log)
    assert np.bincount(users).tolist() == [3, 3, 3]
    assert (times > log.times[log.offsets[users]]).all()
    assert (times < log.end).all()
    assert len(np.unique(times)) == 9


@pytest.mark.parametrize(
    ("moments", "tick"),
    [
        ([0, DAY, 9 * DAY], DAY),
        ([9 * HOUR, DAY + 9 * HOUR], DAY),  # midnights of Tokyo
        ([0, DAY, 9 * DAY + HOUR], HOUR),
        ([0, 90 * 60 * SECOND], 60 * SECOND),
        ([7 * SECOND, 8 * SECOND], SECOND),
        ([0, SECOND // 2], 1000),
        ([0, 1], 1),
        ([DAY + 1], DAY),
    ],
)
def test_the_tick_is_the_largest_unit_that_divides_all_stamps(moments, tick):
    log = log_of([[(0, "a", 1)] * len(moments)], times=START + np.array(moments))
    assert log.tick == tick


@pytest.mark.parametrize("rule", [AfterFirstEvent(), EveryNthEvent(1, 1), LastEvent(), RandomTimes(3)])
@pytest.mark.parametrize("unit", [DAY, 60 * SECOND, 1])
def test_rules_that_follow_an_event_ask_when_all_of_its_stamp_has_happened(rule, unit):
    """Events are stamped by the beginning of their day or minute: a strict query must not see one that is to come."""
    rng = np.random.default_rng(5)
    truly = np.sort(rng.integers(0, 40 * unit, (30, 8)), axis=1)  # within the tick, which the log does not tell
    log = log_of([[(0, "a", 1)] * 8 for _ in range(30)], times=START + (truly // unit * unit).ravel())
    assert log.tick == unit
    users, times = rule.pairs(log)
    visible = log.times < times[:, None]
    assert visible.any(1).all()
    assert not (visible & (START + truly.ravel() >= times[:, None])).any()
    if not isinstance(rule, RandomTimes):
        own = log.before(users, times) - 1
        assert (times - log.times[own] == unit).all()


def test_a_part_of_a_log_keeps_its_clock_and_rules_on_it_pass():
    sequences = [[(0.0, "a", 1), (3.0, "a", 1), (60 + user / 1440, "a", 1)] for user in range(40)]
    log = log_of(sequences)
    assert log.tick == 60 * SECOND
    part, _ = log.part(np.arange(40), START + 50 * DAY)
    assert part.tick == 60 * SECOND  # its own stamps are days
    assert asks_by_outcome(AfterFirstEvent(), log) is None


def test_the_tick_does_not_know_what_comes_after_training():
    log = log_of([[(1, "a", 1), (9, "a", 1), (40, "a", 1), (70.3, "a", 1)], LONG], limits=(25, 60))
    assert log.tick == DAY
    assert log_of([[(1, "a", 1), (9.3, "a", 1), (40, "a", 1)], LONG], limits=(25, 60)).tick < DAY


def test_random_times_cover_the_time_evenly():
    log = log_of([LONG] * 400)
    times = (RandomTimes(per_user=5).pairs(log)[1] - START) / (100 * DAY)
    # five standard errors of a mean of 2000 uniform numbers
    assert abs(times.mean() - 0.5) < 5 * (1 / 12 / 2000) ** 0.5
    assert times.std() == pytest.approx((1 / 12) ** 0.5, rel=0.05)


def test_amounts_above_the_train_quantile_against_a_loop():
    rng = np.random.default_rng(1)
    sequences = [
        [(float(day), "a", float(rng.integers(-3, 9))) for day in np.sort(rng.uniform(0, 60, 20))] for _ in range(30)
    ]
    sequences[0][3] = (sequences[0][3][0], "a", float("nan"))
    folds = np.arange(30) % 3
    log = log_of(sequences, user_folds=folds.astype(np.int8))
    queries = AmountAbove(CalendarDates(every_days=7), 10, "amount", quantile=0.7).queries(log)
    sums = []
    for user, time in zip(queries["users"], queries["times"], strict=True):
        window = [a for day, _, a in sequences[user] if time < START + round(day * DAY) <= time + 10 * DAY]
        sums.append(sum(a for a in window if a == a))
    threshold = np.quantile([s for s, f in zip(sums, queries["fold"], strict=True) if f == 0], 0.7)
    assert queries["labels"].tolist() == [int(s > threshold) for s in sums]
    assert 0.2 < queries["labels"].mean() < 0.4


def test_next_type_is_the_rank_in_training_and_stays_in_its_fold():
    sequences = [[(day, kind, 1) for day, kind in zip(range(1, 7), "abbcab", strict=True)], LONG]
    log = log_of(sequences, limits=(3.5, 5.5))
    # training: a a b b ... ties by name: user 0 has a b b, LONG has a
    queries = NextType(AtEvents(), "kind", top=2).queries(log)
    assert asked(queries) == {(0, 2.0): 1, (0, 3.0): 1, (0, 5.0): 0, (0, 6.0): 1, (1, 100.0): 0}
    assert queries["fold"].tolist() == [0, 0, 1, 2, 2]
    # The next event after day 3 lies in another fold than the query.
    assert asked(NextType(CalendarDates(dates=dates(3.2)), "kind", top=2).queries(log)) == {}


def test_labels_of_the_file():
    log = log_of([LONG, LONG, LONG], static={"age": np.array([1, -1, 0])}, static_names={"age": ["old", "young"]})
    queries = StaticLabel(AfterFirstEvent(), "age").queries(log)
    assert (queries["users"].tolist(), queries["labels"].tolist(), queries["n_classes"]) == ([0, 2], [1, 0], 2)
    log = log_of([[(1, "b", 1), (2, "c", 1), (3, MISSING, 1), (9, "a", 1)]])
    queries = LocalLabel(CalendarDates(dates=dates(1.5, 2, 2.5, 3.5)), "kind").queries(log)
    # the event at exactly day 2 is not yet known at day 2
    assert asked(queries) == {(0, 1.5): 1, (0, 2.0): 1, (0, 2.5): 2}
    assert queries["n_classes"] == 3


@pytest.mark.parametrize("limits", [None, (6, 12)])
def test_by_time_a_local_label_is_asked_in_the_period_of_its_event(limits):
    log = log_of([[(2, "a", 1), (8, "b", 1), (13, "c", 1)], [(3, "b", 1)], LONG], limits=limits)
    queries = LocalLabel(CalendarDates(dates=dates(4, 7, 9, 12.5, 14)), "kind").queries(log)
    everything = {(0, 4.0): 0, (0, 7.0): 0, (0, 9.0): 1, (0, 12.5): 1, (0, 14.0): 2, (1, 4.0): 1, (1, 7.0): 1}
    everything |= {(1, 9.0): 1, (1, 12.5): 1, (1, 14.0): 1} | {(2, day): 0 for day in (4.0, 7.0, 9.0, 12.5, 14.0)}
    kept = [(0, 4.0), (0, 9.0), (0, 14.0), (1, 4.0), (2, 4.0)]
    assert asked(queries) == (everything if limits is None else {pair: everything[pair] for pair in kept})


def test_limits_draw_the_same_queries_again():
    log = log_of([[(day, "a", 1) for day in range(0, 60, 3)] for _ in range(20)], limits=(30, 45))
    everything = asked(NoEventWithin(CalendarDates(every_days=2), 2).queries(log))
    target = NoEventWithin(CalendarDates(every_days=2), 2, max_queries_per_user=3, max_queries=25, seed=1)
    queries = target.queries(log)
    assert asked(queries).items() <= everything.items()
    for fold in range(3):
        users = queries["users"][queries["fold"] == fold]
        assert len(users) == 25
        assert np.bincount(users).max() <= 3
    assert asked(target.queries(log)) == asked(queries)
    other = NoEventWithin(CalendarDates(every_days=2), 2, max_queries_per_user=3, max_queries=25, seed=2)
    assert asked(other.queries(log)) != asked(queries)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AfterDelay(0), "days must be above 0, got 0"),
        (lambda: CalendarDates(), "one of every_days and dates must be given"),
        (lambda: CalendarDates(dates=["soon"]), "dates: 'soon' must be a date or time"),
        (lambda: CalendarDates(dates=["2020-01-01"], first="2020-01-01"), "first goes with every_days"),
        (lambda: RandomTimes(per_user=0), "per_user must be at least 1"),
        (lambda: NoEventWithin(AtEvents(), 3), "for NextType, not NoEventWithin"),
        (lambda: NoEventWithin(AfterFirstEvent(), -1), "days must be above 0, got -1"),
        (lambda: NoEventWithin(AfterFirstEvent(), 1, max_queries=0), "max_queries must be at least 1"),
        (lambda: AmountAbove(AfterFirstEvent(), 1, "amount", quantile=1), "quantile must be between 0 and 1"),
        (lambda: NextType(AtEvents(), "kind", top=1), "top must be at least 2"),
        (lambda: LocalLabel(AfterFirstEvent(), "kind", days=-1), "days must be at least 0"),
        (lambda: EveryNthEvent(step=0), "step must be at least 1, got 0"),
        (lambda: Left(LastEvent(), 0), "days must be above 0, got 0"),
        (lambda: FinalDays(LastEvent()), "either column and positive or silent_days must be given"),
        (lambda: FinalDays(LastEvent(), column="age"), "either column and positive or silent_days"),
        (lambda: FinalDays(LastEvent(), silent_days=-1), "silent_days must be above 0, got -1"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_two_sided_auc_against_all_pairs():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 6, 120).astype(float), rng.random(120) < 0.4
    ahead = scores[positive][:, None] - scores[~positive]
    auc = ((ahead > 0) + 0.5 * (ahead == 0)).mean()
    # both are sums of fewer than 10^4 halves, exact but for one division
    users = np.arange(120)
    assert two_sided_auc(scores, positive, users) == pytest.approx(max(auc, 1 - auc), abs=1e-12)
    assert np.isnan(two_sided_auc(scores, users < 5, users))
    # 48 queries of the class, but of three users
    assert np.isnan(two_sided_auc(scores, positive, np.where(positive, users % 3, users)))


def churners(rng, n=400, *, overwritten=False):
    """Half of the users stop after their third event; overwritten: their amounts are set to 0 afterwards."""
    sequences = []
    for user in range(n):
        days = np.cumsum(rng.uniform(1, 9, 12))
        amounts = rng.lognormal(size=12)
        stops = rng.random() < 0.5
        if stops:
            days, amounts = days[:3], amounts[:3]
            if overwritten and user % 20:
                amounts = np.zeros(3)
        sequences.append([(float(d), "ab"[int(rng.integers(2))], float(a)) for d, a in zip(days, amounts, strict=True)])
    return [*sequences, LONG]


def checks(log, target):
    rows = check_labels(log, target.queries(log), ["kind"], ["amount"])
    return rows, warnings_of("churn", rows)


def test_clean_data_is_not_warned_of():
    rows, lines = checks(log_of(churners(np.random.default_rng(2))), NoEventWithin(AfterDelay(12), 30))
    assert lines == []
    assert [(row["feature"], row["what"]) for row in rows] == [
        ("time of the query", "delay"),
        ("time of the query", "date"),
        ("time of the query", "recency"),
        ("amount", "value"),
        ("amount", "missing"),
        ("amount", "zero"),
        ("amount", "first value"),
        ("amount", "last known value"),
        ("amount", "ever missing"),
        ("amount", "ever zero"),
        ("kind", "value"),
        ("kind", "first value"),
        ("kind", "missing"),
        ("kind", "ever missing"),
    ]
    assert all(0.5 <= row["auc"] < 0.7 for row in rows)


def test_a_feature_that_is_overwritten_after_the_outcome_is_warned_of():
    log = log_of(churners(np.random.default_rng(2), overwritten=True))
    _, lines = checks(log, NoEventWithin(AfterDelay(12), 30))
    assert any("'churn': value of 'amount' tells the label" in line for line in lines)
    assert any("'churn': zero of 'amount' tells the label" in line for line in lines)
    assert not any("'kind'" in line or "time of the query" in line for line in lines)


@pytest.mark.parametrize("leak", ["zero", "missing", "value", "kind"])
def test_a_leak_in_an_earlier_event_is_warned_of(leak):
    """As in logs of processes: the first event says how the case will end, the last one before the query does not."""
    rng = np.random.default_rng(5)
    label = rng.random(300) < 0.3
    told = {"zero": 0.0, "missing": np.nan, "value": 50.0}
    sequences = []
    for one in label:
        amounts = rng.normal(10, 1, 3)
        kinds = ["a", "b", "b"]
        if one and leak in told:
            amounts[0 if leak == "value" else 1] = told[leak]
        if one and leak == "kind":
            kinds[0] = "c"
        amounts[2] = np.nan if leak == "value" else amounts[2]
        sequences.append([(float(d), kind, float(a)) for d, kind, a in zip((0, 1, 2), kinds, amounts, strict=True)])
    log = log_of(sequences)
    queries = {"users": np.arange(300), "times": np.full(300, START + 10 * DAY), "labels": label.astype(np.int64)}
    rows = check_labels(log, queries | {"n_classes": 2}, ["kind"], ["amount"])
    telling = {(row["feature"], row["what"]) for row in rows if row["worst"] is not None and row["worst"] > 0.99}
    assert (
        telling
        == {
            "zero": {("amount", "ever zero")},
            "missing": {("amount", "ever missing")},
            "value": {("amount", "first value")},
            "kind": {("kind", "first value")},
        }[leak]
    )
    assert len(warnings_of("x", rows)) == len(telling)


def test_the_last_known_value_skips_what_is_missing():
    rng = np.random.default_rng(6)
    label = rng.random(200) < 0.5
    sequences = [[(0, "a", 1.0), (1, "a", 5.0 + one), (2, "a", np.nan)] for one in label]
    queries = {"users": np.arange(200), "times": np.full(200, START + 10 * DAY), "labels": label.astype(np.int64)}
    rows = check_labels(log_of(sequences), queries | {"n_classes": 2}, [], ["amount"])
    found = {row["what"]: row["auc"] for row in rows if row["feature"] == "amount"}
    assert found["last known value"] == 1.0
    assert {what for what, auc in found.items() if auc != 0.5} == {"last known value"}
    nothing = log_of([[(0, "a", np.nan), (1, "a", np.nan)] for _ in label])
    rows = check_labels(nothing, queries | {"n_classes": 2}, [], ["amount"])
    assert all(row["auc"] == 0.5 for row in rows if row["feature"] == "amount")


def test_a_query_time_that_depends_on_the_outcome_is_warned_of():
    log = log_of(churners(np.random.default_rng(2)))
    queries = NoEventWithin(LastEvent(), 30).queries(log)
    assert queries["outcome_dependent"]
    # Every last event is followed by none: the label there is whether the user stopped early.
    early = (queries["times"] - log.times[log.offsets[queries["users"]]] < 30 * DAY).astype(int)
    rows = check_labels(log, queries | {"labels": early}, ["kind"], ["amount"])
    lines = warnings_of("stopped", rows)
    # All users begin within nine days, so that the date tells nearly what the delay does.
    assert len(lines) == 2
    assert "'stopped': delay of 'time of the query' tells the label, two-sided AUC 1.000" in lines[0]
    assert "'stopped': date of 'time of the query' tells the label" in lines[1]


def test_a_query_that_comes_right_after_the_last_event_is_told_by_its_recency():
    rng = np.random.default_rng(3)
    log = log_of([[(day, "a", 1.0) for day in np.sort(rng.uniform(0, 100, 10))] for _ in range(200)])
    label = rng.random(200) < 0.5
    # A day after the first event, or anything between two events: delay and date alone do not tell it.
    middle, first = log.times.reshape(200, 10)[:, 4:6], log.times[log.offsets[:-1]]
    times = np.where(label, middle[:, 0] + 1, middle.mean(1).astype(np.int64))
    queries = {"users": np.arange(200), "times": times, "labels": label.astype(np.int64), "n_classes": 2}
    rows = {row["what"]: row for row in check_labels(log, queries, [], []) if row["feature"] == "time of the query"}
    assert rows["recency"]["auc"] == 1.0
    ages = times - log.times[log.before(queries["users"], times) - 1]
    for what, scores in (("delay", times - first), ("date", times), ("recency", ages)):
        assert rows[what]["auc"] == two_sided_auc(scores.astype(float), label, queries["users"]), what
    assert max(rows["delay"]["auc"], rows["date"]["auc"]) < 0.9
    assert [line.split()[2] for line in warnings_of("x", list(rows.values()))] == ["recency"]


class JustBeforeTheLast(QueryRule):
    """Half a day before each user's last event; it does not say that it looks ahead."""

    def pairs(self, log):
        return np.arange(log.n_users), log.times[log.offsets[1:] - 1] - DAY // 2


class OfThoseWhoComeBack(QueryRule):
    """After the first event, but only users who have another are asked."""

    def pairs(self, log):
        users = np.flatnonzero(np.diff(log.offsets) > 1)
        return users, log.times[log.offsets[users]] + 1


class ByStaticLabel(QueryRule):
    """Earlier for users with one label; it does not say so."""

    def pairs(self, log):
        return np.arange(log.n_users), log.times[log.offsets[:-1]] + np.where(log.static["churn"] == 1, 10, 40) * DAY


class ByPastLabel(QueryRule):
    """After the first event, but only users whose first event has one label."""

    def pairs(self, log):
        users = np.flatnonzero(log.codes["kind"][log.offsets[:-1]] == 1)
        return users, log.times[log.offsets[users]] + 1


class OfThoseWithALabel(QueryRule):
    """After the first event, users who have a label."""

    def pairs(self, log):
        users = np.flatnonzero(log.static["churn"] >= 0)
        return users, log.times[log.offsets[users]] + 1


class BeforeTheDecision(QueryRule):
    """Some time before each event of a kind, or at it."""

    def __init__(self, before):
        self.before = before

    def pairs(self, log):
        deciding = log.codes["kind"] == 1
        return log.users[deciding], log.times[deciding] - self.before


class OfThoseWhoStayAway(QueryRule):
    """After the first event, but only users who have no other are asked."""

    def pairs(self, log):
        users = np.flatnonzero(np.diff(log.offsets) == 1)
        return users, log.times[log.offsets[users]] + log.tick


class AfterAKind(QueryRule):
    """A tick after each event of a kind, which is known by then."""

    def pairs(self, log):
        known = log.codes["kind"] == 1
        return log.users[known], log.times[known] + log.tick


class AfterBusyDays(QueryRule):
    """Everybody there, after each day on which many events happened, those of others above all."""

    def pairs(self, log):
        days, counts = np.unique(log.times // DAY, return_counts=True)
        moments = (days[counts >= 4] + 1) * DAY
        there = log.times[log.offsets[:-1]] < moments[:, None]
        return np.nonzero(there)[1], np.broadcast_to(moments[:, None], there.shape)[there]


class BeforeTheEnd(QueryRule):
    """Everybody, some days before the end of the observation, who has not come yet too."""

    def __init__(self, days):
        self.days = days

    def pairs(self, log):
        return np.arange(log.n_users), np.full(log.n_users, log.end - self.days * DAY)


CAUSAL = [
    AfterFirstEvent(),
    AfterDelay(12),
    CalendarDates(every_days=7),
    CalendarDates(every_days=7, active_days=3),
    CalendarDates(dates=dates(5, 40, 90)),
    RandomTimes(per_user=3, seed=5),
    AtEvents(),
    EveryNthEvent(first=2, step=3),
    EveryNthEvent(first=1, step=1),
    AfterBusyDays(),
    BeforeTheEnd(10),
]


@pytest.mark.parametrize("limits", [None, (25, 60)])
@pytest.mark.parametrize("unit", [SECOND, DAY])
@pytest.mark.parametrize("facts", [{}, {"clock": 1}, {"observed_until": START + 150 * DAY}], ids=str)
@pytest.mark.parametrize("rule", [*CAUSAL, AfterAKind()], ids=lambda rule: type(rule).__name__)
def test_rules_that_do_not_look_ahead_pass(rule, limits, unit, facts):
    log = log_of(churners(np.random.default_rng(2)), limits=limits, **facts)
    log = replace(log, times=log.times // unit * unit)
    assert asks_by_outcome(rule, log) is None
    assert len(rule.pairs(log)[0]) > 0


def staggered(seed):
    """300 users of up to five events in 90 days, somewhere in 3000 days; one in four stays away after the first."""
    rng = np.random.default_rng(seed)
    sequences = []
    for _ in range(300):
        days = rng.uniform(0, 3000) + np.sort(rng.uniform(0, 90, 1 if rng.random() < 0.25 else 5))
        kinds = rng.choice(["a", "c"], len(days))
        if len(days) > 1:
            kinds[rng.integers(2, 5)] = "b"
        sequences.append([(round(day * 24) / 24, kind, 1.0) for day, kind in zip(days, kinds, strict=True)])
    return log_of(sequences)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("rule", "place"),
    [
        (BeforeTheDecision(HOUR), "at one of their queries"),
        (BeforeTheDecision(0), "at one of their queries"),
        (OfThoseWhoStayAway(), "before one of their events"),
    ],
    ids=["before", "at", "stays away"],
)
def test_rules_that_look_ahead_by_little_are_found_out_by_cuts_of_single_users(rule, place, seed, monkeypatch):
    monkeypatch.setattr("datamodules.label_checks.CUTS", (0.0,))  # cuts of all users at once find them by luck alone
    line = asks_by_outcome(rule, staggered(seed))
    assert f"asks at other moments when users are cut off {place} (" in line
    assert "\n" not in line


def test_a_rule_that_looks_at_the_past_of_others_moves_only_where_they_are_cut():
    log = log_of(churners(np.random.default_rng(2)))
    asked = _asked(AfterBusyDays(), log)
    limits = _own_limits(log, asked)["at one of their queries"]
    assert len(_moved_by_own_cuts(AfterBusyDays(), log, asked, limits)[0])
    for user in range(0, log.n_users, 50):
        alone = np.where(np.arange(log.n_users) == user, limits, FOREVER)
        assert not len(_moved_by_own_cuts(AfterBusyDays(), log, asked, alone)[0])


def test_queries_of_users_who_have_not_come_yet_are_not_compared():
    """They are never kept, and that somebody comes later is what they are about."""
    rule, log = BeforeTheEnd(1500), staggered(0)
    users, times = rule.pairs(log)
    assert 0.2 < (log.times[log.offsets[users]] < times).mean() < 0.8
    assert asks_by_outcome(rule, log) is None


def test_moved_queries_are_those_of_one_side():
    left = (np.array([0, 0, 2, 2]), np.array([5, 9, 5, 7]))
    right = (np.array([2, 0, 1]), np.array([5, 9, 5]))
    users, times = _moved(left, right)
    assert sorted(zip(users.tolist(), times.tolist(), strict=True)) == [(0, 5), (1, 5), (2, 7)]
    assert [len(part) for part in _moved(left, left)] == [0, 0]
    empty = (left[0][:0], left[1][:0])
    assert sorted(zip(*(part.tolist() for part in _moved(empty, right)), strict=True)) == [(0, 9), (1, 5), (2, 5)]


@pytest.mark.parametrize("rule", [JustBeforeTheLast(), OfThoseWhoComeBack()], ids=lambda rule: type(rule).__name__)
def test_rules_that_look_ahead_are_found_out_though_they_do_not_say_so(rule):
    assert not rule.depends_on_outcome
    line = asks_by_outcome(rule, log_of(churners(np.random.default_rng(2))))
    assert line.startswith(f"{type(rule).__name__} asks at other moments before 2019-")
    assert "cut off" in line
    assert "\n" not in line


def labelled():
    """Static labels without any relation to the events, some missing."""
    rng = np.random.default_rng(2)
    static = {"churn": np.random.default_rng(8).integers(-1, 2, 401)}
    return log_of(churners(rng), static=static, static_names={"churn": ["no", "yes"]})


@pytest.mark.parametrize("rule", [ByStaticLabel(), ByPastLabel()], ids=lambda rule: type(rule).__name__)
def test_rules_that_read_a_label_are_found_out(rule):
    line = asks_by_outcome(rule, labelled(), ["kind"])
    assert line.startswith(f"{type(rule).__name__} asks at other moments when the labels churn, kind are exchanged (")
    assert "\n" not in line


def test_what_is_no_label_is_not_exchanged():
    log = labelled()
    assert asks_by_outcome(ByPastLabel(), log) is None  # the kind of a past event is known
    for rule in (OfThoseWithALabel(), *CAUSAL):
        assert asks_by_outcome(rule, log, ["kind"]) is None


def test_a_declared_rule_is_not_looked_at():
    assert asks_by_outcome(LastEvent(), log_of(churners(np.random.default_rng(2)))) is None


def test_a_part_of_a_log_is_that_of_its_events():
    log = log_of([[(1, "a", 1), (5, "b", 2)], [(3, "c", 3)], [(7, "a", 4)], LONG], limits=(4, 9))
    part, kept = log.part(np.array([0, 2, 3]), START + 5 * DAY)
    assert kept.tolist() == [0, 3]
    assert part.offsets.tolist() == [0, 1, 2]
    assert ((part.times - START) / DAY).tolist() == [1, 0]
    assert part.numbers["amount"].tolist() == [1, 0]
    assert part.user_words.tolist() == log.user_words[kept].tolist()
    assert part.end == log.end
    assert part.before(np.array([0, 1]), np.array([START, START + DAY])).tolist() == [0, 2]


def test_windows_end_after_every_nth_event():
    log = log_of([[(day, "a", 1) for day in (1, 2, 2, 2, 3, 4, 5)], [(9, "b", 1)], LONG], clock=1)
    users, times = EveryNthEvent(first=2, step=2).pairs(log)
    # the second and the fourth event are of one time, the sixth is of day 4
    assert users.tolist() == [0, 0, 2]
    assert (times - START).tolist() == [2 * DAY + 1, 4 * DAY + 1, 100 * DAY + 1]


def published_loop(log, positive, days):
    """(user, time of the event) -> the label of spec section 7."""
    found = {}
    for user in range(log.n_users):
        times = log.times[log.offsets[user] : log.offsets[user + 1]].tolist()
        for time in times:
            found[user, time] = int(positive[user] and times[-1] - time <= days * DAY)
    return found


def test_the_published_local_label_against_a_loop():
    rng = np.random.default_rng(6)
    sequences = [
        [(day, "a", 1.0) for day in np.sort(rng.uniform(0, rng.integers(20, 100), 12)).tolist()] for _ in range(40)
    ]
    churn = rng.integers(-1, 2, 41)
    log = log_of([*sequences, LONG], static={"churn": churn}, static_names={"churn": ["no", "yes"]})
    # START + 100 days is the last event: silent for 25 days are those who stopped before day 75
    last = (log.times[log.offsets[1:] - 1] - START) / DAY
    for target, positive in (
        (FinalDays(EveryNthEvent(1, 1), column="churn", positive="yes"), churn == 1),
        (FinalDays(EveryNthEvent(1, 1), days=10, silent_days=25), last <= 75),
    ):
        queries = target.queries(log)
        expected = published_loop(log, positive, target.days)
        found = zip(queries["users"], queries["times"] - 1, queries["labels"], strict=True)
        asked_of = {(int(user), int(time)): int(label) for user, time, label in found}
        known = {key: value for key, value in expected.items() if target.column is None or churn[key[0]] >= 0}
        # LONG ends with the file itself, where no fold reaches
        assert asked_of == {key: value for key, value in known.items() if key[1] + 1 < log.end}
        assert set(queries["labels"].tolist()) == {0, 1}
        assert queries["outcome_dependent"]
    left = Left(LastEvent(), 25).queries(log)
    assert left["labels"].tolist() == [int(last[user] <= 75) for user in left["users"]]
    assert (left["scope"], left["outcome_dependent"]) == ("global", True)
    with pytest.raises(ValueError, match="column 'churn' has no value 'maybe', it has: no, yes"):
        FinalDays(AfterFirstEvent(), column="churn", positive="maybe").queries(log)


def test_a_leak_among_old_events_alone_is_found_by_age():
    rng = np.random.default_rng(4)
    sequences = []
    for _ in range(600):
        old = rng.random() < 0.25
        label = rng.random() < 0.5
        amount = float(label) if old else float(rng.random())
        sequences.append([(5.0 if old else 9.0, "a", amount), *([(12.0, "a", 1.0)] if not label else [])])
    log = log_of([*sequences, LONG])
    rows, lines = checks(log, NoEventWithin(CalendarDates(dates=dates(10)), 5))
    value = next(row for row in rows if row["feature"] == "amount" and row["what"] == "value")
    assert value["auc"] < 0.9 < value["worst"] == max(auc for auc in value["auc_by_age"] if auc is not None)
    assert any("value of 'amount'" in line for line in lines)


def test_warnings_name_target_feature_and_auc(caplog):
    row = {"feature": "amount", "what": "zero", "auc": 0.5, "auc_by_age": [None] * 4, "worst": 0.96}
    (line,) = warnings_of("churn", [row, row | {"worst": 0.9}, row | {"worst": None}])
    logging.getLogger("datamodules").warning(line)
    assert "target 'churn': zero of 'amount'" in caplog.text
    assert "0.960" in caplog.text
