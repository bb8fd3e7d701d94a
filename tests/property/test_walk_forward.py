import datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.walk_forward import walk_forward

WEEKDAYS = np.array([d for d in np.arange("2015-01-01", "2020-01-01", dtype="datetime64[D]") if np.is_busday(d)])


@st.composite
def calendars(draw):
    """Weekdays of some years, some of them holidays; gaps of up to months occur."""
    start = draw(st.dates(datetime.date(2000, 1, 1), datetime.date(2003, 1, 1)))
    days = np.busday_offset(np.datetime64(start), np.arange(draw(st.integers(100, 900))), roll="forward")
    open_days = np.random.default_rng(draw(st.integers(0, 99))).random(len(days)) < draw(
        st.sampled_from([0.3, 0.95, 1])
    )
    hole = draw(st.integers(0, len(days) - 1))
    open_days[hole : hole + draw(st.integers(0, 70))] = False
    open_days[[0, -1]] = True
    return days[open_days]


@settings(max_examples=60, deadline=None)
@given(
    calendars(),
    st.integers(1, 12),
    st.integers(1, 8),
    st.sampled_from([None, 1, 3]),
    st.integers(0, 30),
)
def test_training_plus_purge_lies_before_the_test(dates, train_months, test_months, step_months, purge_days):
    try:
        folds = walk_forward(
            dates, train_months=train_months, test_months=test_months, step_months=step_months, purge_days=purge_days
        )
    except ValueError as error:
        assert "leaves nothing" in str(error)  # noqa: PT017
        return
    months = dates.astype("datetime64[M]")
    tested = np.zeros(len(dates), dtype=int)
    for fold in folds:
        train, test = np.arange(fold.train_start, fold.train_stop), np.arange(fold.test_start, fold.test_stop)
        assert len(train)
        assert len(test)
        assert train.max() + purge_days < test.min()
        # both by the calendar: whole months, none shared, and no session of them forgotten
        whole = np.arange(fold.train_start, fold.test_start)
        spanned = np.unique(months[whole])
        assert set(np.flatnonzero(np.isin(months, spanned))) == set(whole)
        assert (months[test[-1]] - months[test[0]]).astype(int) < test_months
        assert (months[test[0]] - months[whole[0]]).astype(int) <= train_months + test_months
        tested[test] += 1
    if step_months is None:
        begin = np.datetime64(dates[0], "M") + train_months
        np.testing.assert_array_equal(tested, (months >= begin).astype(int))


def test_published_frame_keeps_sessions_on_the_first():
    """2 years, then 36 months of 2017-2019, by an own count of the calendar."""
    folds = walk_forward(WEEKDAYS, train_months=24, test_months=1)
    assert len(folds) == 36
    for number, fold in enumerate(folds):
        year, month = 2017 + number // 12, number % 12 + 1
        inside = [d for d in WEEKDAYS.tolist() if (d.year, d.month) == (year, month)]
        assert WEEKDAYS[fold.test_start : fold.test_stop].tolist() == inside
        before = [d for d in WEEKDAYS.tolist() if (year - 2, month) <= (d.year, d.month) < (year, month)]
        assert WEEKDAYS[fold.train_start : fold.train_stop].tolist() == before
    firsts = [d for d in WEEKDAYS.tolist() if d.year >= 2017 and d.day == 1]
    assert len(firsts) > 20
    tested = {d for f in folds for d in WEEKDAYS[f.test_start : f.test_stop].tolist()}
    assert tested.issuperset(firsts)


def test_start_stop_and_purge_by_hand():
    (fold,) = walk_forward(
        WEEKDAYS, train_months=2, test_months=2, purge_days=3, start="2016-02-01", stop=np.datetime64("2016-04-01")
    )
    day = WEEKDAYS.astype(str)
    assert day[fold.train_start] == "2016-02-01"
    # 2016-03-31 is a Thursday: of the sessions before April the 29th, 30th and 31st are purged
    assert day[fold.train_stop - 1] == "2016-03-28"
    assert day[fold.test_start] == day[fold.test_stop - 1] == "2016-04-01"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_months": 0}, "train_months must be at least 1, got 0"),
        ({"test_months": -1}, "test_months must be at least 1, got -1"),
        ({"step_months": 0}, "step_months must be at least 1, got 0"),
        ({"purge_days": -1}, "purge_days must be at least 0, got -1"),
        ({"train_months": 60}, "train_months 60 leaves nothing to test: 2015-01-01 to 2019-12-31 is 60 months"),
        ({"purge_days": 22}, "purge_days 22 leaves nothing of the 22 sessions to train on before 2015-02-02"),
        ({"start": "2021-01-01"}, "no session lies between 2021-01-01 and the last day"),
        ({"dates": WEEKDAYS[[0, 2, 1]]}, "dates must increase, got 2015-01-02 after 2015-01-05 in row 2"),
    ],
)
def test_bad_input_ends_in_one_line(change, message):
    arguments = {"dates": WEEKDAYS, "train_months": 1, "test_months": 1} | change
    with pytest.raises(ValueError, match=message) as caught:
        walk_forward(arguments.pop("dates"), **arguments)
    assert "\n" not in str(caught.value)
