"""Walk-forward splits: train on some months, test on the next ones, move on."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Day = str | np.datetime64


class Fold(NamedTuple):
    """Rows of a fold; a stop is the row after the last.

    Attributes:
        train_start: First row to train on.
        train_stop: ``purge_days`` rows before the test.
        test_start: First row of the test.
        test_stop: Row after the test.
    """

    train_start: int
    train_stop: int
    test_start: int
    test_stop: int


def walk_forward(
    dates: NDArray[np.datetime64],
    *,
    train_months: int,
    test_months: int,
    step_months: int | None = None,
    purge_days: int = 0,
    start: Day | None = None,
    stop: Day | None = None,
) -> list[Fold]:
    """Cut a calendar into folds at the first days of months.

    Fold k tests on the sessions of the ``test_months`` calendar months from month m_k = m_0 + train_months +
    k ``step_months`` on, and trains on those of the ``train_months`` before m_k, of which the last ``purge_days``
    sessions are left out: every row trained on, plus the purge, lies before every row tested on. A session on the
    first of a month belongs to that month. With ``step_months = test_months`` every session from the first test on
    is tested exactly once; a last test that the calendar cuts short is a fold like the others, as is a month of
    which only the end lies in the calendar. Months without sessions are passed over.

    Args:
        dates: ``(T,) datetime64[D]``, strictly increasing.
        train_months: At least 1.
        test_months: At least 1.
        step_months: Months between the starts of neighbouring tests, at least 1; None is ``test_months``.
        purge_days: Sessions left out between train and test, at least 0.
        start: Earlier sessions are not used; None is the first.
        stop: Later sessions are not used, this day itself is; None is the last.

    Returns:
        Folds in increasing order, at least one.

    Raises:
        ValueError: If an argument is outside its range, dates do not increase, no session lies between ``start`` and
            ``stop``, the months between them are no more than ``train_months``, or the purge leaves nothing to train
            on.

    Source: spec sections 2 and 13.7. The published frames compare with ``<`` and ``>`` and lose sessions on the 1st.
    """
    step = test_months if step_months is None else step_months
    for name, length in (("train_months", train_months), ("test_months", test_months), ("step_months", step)):
        if length < 1:
            raise ValueError(f"{name} must be at least 1, got {length}")
    if purge_days < 0:
        raise ValueError(f"purge_days must be at least 0, got {purge_days}")
    days = dates.astype("datetime64[D]")
    backwards = np.flatnonzero(np.diff(days) <= np.timedelta64(0, "D"))
    if len(backwards):
        row = int(backwards[0])
        raise ValueError(f"dates must increase, got {days[row + 1]} after {days[row]} in row {row + 1}")
    first = 0 if start is None else int(np.searchsorted(days, np.datetime64(start, "D")))
    end = len(days) if stop is None else int(np.searchsorted(days, np.datetime64(stop, "D"), side="right"))
    if first >= end:
        raise ValueError(f"no session lies between {start or 'the first day'} and {stop or 'the last day'}")

    months = days[first:end].astype("datetime64[M]").astype(np.int64)
    n_months = int(months[-1] - months[0]) + 1
    if n_months <= train_months:
        raise ValueError(
            f"train_months {train_months} leaves nothing to test: {days[first]} to {days[end - 1]} is {n_months} months"
        )
    tests = np.arange(months[0] + train_months, months[-1] + 1, step)
    limits = np.stack([tests - train_months, tests, tests + test_months])
    train_starts, test_starts, test_stops = first + np.searchsorted(months, limits)
    folds = []
    for train_start, test_start, test_stop in zip(train_starts, test_starts, test_stops, strict=True):
        if test_start == test_stop:
            continue
        if train_start >= test_start - purge_days:
            raise ValueError(
                f"purge_days {purge_days} leaves nothing of the {test_start - train_start} sessions to train on before "
                f"{days[test_start]}"
            )
        folds.append(Fold(int(train_start), int(test_start - purge_days), int(test_start), int(test_stop)))
    return folds


def periods_of(
    dates: NDArray[np.datetime64],
    *,
    train_start: np.datetime64 | None,
    test_start: np.datetime64,
    test_end: np.datetime64 | None,
    purge_days: int,
) -> tuple[Fold, list[str]]:
    """The one fold of given days: train from ``train_start``, test from ``test_start`` to ``test_end`` included.

    Args:
        dates: ``(T,) datetime64[D]``, strictly increasing.
        train_start: First day to train on; None is the first session.
        test_start: First day of the test.
        test_end: Last day of the test; None is the last session.
        purge_days: Sessions left out before the test, at least 0.

    Returns:
        The fold, and a line for each end that lies outside the sessions there are.

    Raises:
        ValueError: If the test does not start after the first session and by the last, holds no session, or fewer
            than two sessions are left to train on.
    """
    first, last = dates[0], dates[-1]
    if not first < test_start <= last:
        raise ValueError(f"test_start {test_start} must come after the first session {first} and by the last, {last}")
    flags = []
    if train_start is not None and train_start < first:
        flags.append(f"train_start {train_start} is before the first session {first}")
    if test_end is not None and test_end > last:
        flags.append(f"test_end {test_end} is after the last session {last}")
    begin = 0 if train_start is None else int(np.searchsorted(dates, train_start))
    test = int(np.searchsorted(dates, test_start))
    stop = len(dates) if test_end is None else int(np.searchsorted(dates, test_end, side="right"))
    if test >= stop:
        raise ValueError(f"no session to test on between test_start {test_start} and test_end {test_end}")
    n_train = test - purge_days - begin
    if n_train < 2:
        raise ValueError(
            f"{max(n_train, 0)} sessions to train on between train_start {train_start or first} and "
            f"test_start {test_start} less purge_days {purge_days}, at least 2 are needed"
        )
    return Fold(begin, test - purge_days, test, stop), flags
