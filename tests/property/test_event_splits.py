"""Splits and queries of events on random data with many ties, against loops over plain lists."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.event_preparation import FOREVER, EventLog
from datamodules.event_targets import CalendarDates, EventWithin, NextType, NoEventWithin, RandomTimes, StaticLabel
from datamodules.sources.events import DAY

START = 18_000 * DAY
NAMES = ["a", "b", "c"]
SETTINGS = settings(max_examples=25, deadline=None)

# Few distinct days, so that events and queries meet at the same time.
SEQUENCES = st.lists(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), min_size=1, max_size=8).map(sorted),
    min_size=3,
    max_size=12,
)
LIMITS = st.tuples(st.integers(3, 6), st.integers(7, 10))
HORIZONS = st.integers(1, 4)


def log_of(sequences, limits) -> EventLog:
    rows = [row for sequence in sequences for row in sequence]
    n_users = len(sequences)
    return EventLog(
        offsets=np.cumsum([0, *(len(s) for s in sequences)]),
        times=START + np.array([day for day, _ in rows]) * DAY,
        codes={"kind": np.array([kind for _, kind in rows], dtype=np.int32)},
        names={"kind": NAMES},
        numbers={},
        static={"label": np.arange(n_users) % 2},
        static_names={"label": ["n", "y"]},
        user_folds=(np.arange(n_users) % 3).astype(np.int8),
        user_words=np.arange(n_users, dtype=np.uint64),
        by_time=limits is not None,
        validation_start=FOREVER if limits is None else START + limits[0] * DAY,
        test_start=FOREVER if limits is None else START + limits[1] * DAY,
        n_before=1,
    )


def fold_by_loop(sequences, limits, user, day, until, *, static=False):
    if until > max(d for s in sequences for d, _ in s):
        return -1
    if limits is None:
        return user % 3
    fold, later = (sum(d >= limit for limit in limits) for d in (day, until))
    return fold if fold == later and not (static and user % 3 != fold) else -1


def asked(queries):
    days = (queries["times"] - START) // DAY
    rows = zip(queries["users"], days, queries["fold"], queries["labels"], strict=True)
    return {(int(u), int(t)): (int(f), int(k)) for u, t, f, k in rows}


EVERY_DAY = CalendarDates(every_days=1, first=str(np.datetime64(START, "us")))


@SETTINGS
@given(SEQUENCES, st.one_of(st.none(), LIMITS), HORIZONS, st.sampled_from([1, DAY]))
def test_queries_and_labels_equal_loops(sequences, limits, horizon, clock):
    log = replace(log_of(sequences, limits), clock=clock)
    silent, decided = {}, {}

    def happens(d, day):  # a date comes after its midnight: [day, day + horizon), else (day, day + horizon]
        return day <= d < day + horizon if clock == DAY else day < d <= day + horizon

    for user, sequence in enumerate(sequences):
        for day in range(max(d for s in sequences for d, _ in s) + 1):
            fold = fold_by_loop(sequences, limits, user, day, day + horizon)
            if fold < 0 or not any(d < day for d, _ in sequence):
                continue
            silent[user, day] = (fold, int(not any(happens(d, day) for d, _ in sequence)))
            if not any((d < day or (d == day and clock == 1)) and kind == 1 for d, kind in sequence):
                hit = any(happens(d, day) and kind == 1 for d, kind in sequence)
                decided[user, day] = (fold, int(hit))
    assert asked(NoEventWithin(EVERY_DAY, horizon).queries(log)) == silent
    if any(kind == 1 for s in sequences for _, kind in s):
        assert asked(EventWithin(EVERY_DAY, horizon, "kind", ["b"]).queries(log)) == decided


@SETTINGS
@given(SEQUENCES, LIMITS)
def test_next_type_equals_a_loop(sequences, limits):
    log = log_of(sequences, limits)
    counts = [sum(k == kind and d < limits[0] for s in sequences for d, k in s) for kind in range(3)]
    ranked = [kind for kind in sorted(range(3), key=lambda kind: -counts[kind]) if counts[kind]][:2]
    expected = {}
    for user, sequence in enumerate(sequences):
        for day in range(max(d for s in sequences for d, _ in s) + 1):
            later = [(d, kind) for d, kind in sequence if d >= day]
            if not any(d < day for d, _ in sequence) or not later or later[0][1] not in ranked:
                continue
            fold = fold_by_loop(sequences, limits, user, day, later[0][0])
            if fold >= 0:
                expected[user, day] = (fold, ranked.index(later[0][1]))
    assert asked(NextType(EVERY_DAY, "kind", top=2).queries(log)) == expected


@SETTINGS
@given(SEQUENCES, LIMITS)
def test_a_static_label_is_used_in_one_fold(sequences, limits):
    queries = StaticLabel(EVERY_DAY, "label").queries(log_of(sequences, limits))
    assert (queries["fold"] == queries["users"] % 3).all()
    by_day = np.array([sum(START + limit * DAY <= t for limit in limits) for t in queries["times"]])
    assert (queries["fold"] == by_day).all()


@SETTINGS
@given(SEQUENCES, st.one_of(st.none(), LIMITS), st.integers(0, 1000))
def test_queries_know_an_event_and_are_sorted(sequences, limits, seed):
    log = log_of(sequences, limits)
    queries = NoEventWithin(RandomTimes(per_user=3, seed=seed), 1).queries(log)
    rows = list(zip(queries["times"].tolist(), queries["users"].tolist(), strict=True))
    assert rows == sorted(rows)
    first = log.times[log.offsets[queries["users"]]]
    assert (queries["times"] > first).all()


@SETTINGS
@given(SEQUENCES, st.lists(st.tuples(st.integers(0, 11), st.integers(-1, 13)), min_size=1, max_size=30))
def test_rows_before_and_through_equal_counts(sequences, asked_for):
    log = log_of(sequences, None)
    pairs = [(user % len(sequences), day) for user, day in asked_for]
    users, times = np.array([u for u, _ in pairs]), START + np.array([d for _, d in pairs]) * DAY
    counted = [(sum(d < day for d, _ in sequences[u]), sum(d <= day for d, _ in sequences[u])) for u, day in pairs]
    found = zip(log.before(users, times), log.through(users, times), log.offsets[users], strict=True)
    assert [(int(b - start), int(t - start)) for b, t, start in found] == counted
