"""Which interactions train, which are asked for: pure functions on arrays.

n interactions, U users, V items. All functions take the interactions sorted by user, then time, then a seeded hash
that breaks ties, and know no more than these arrays.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Target = Literal["next_item", "next_basket"]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Questions:
    """What one stage of evaluation asks.

    Attributes:
        users: ``(Q,) int64`` users asked for, increasing.
        stops: ``(Q,) int64`` row at which the input of each ends: its rows before, known items only, are the input.
        relevant: ``(n,) bool`` rows whose items are to be found; at least one for each user.
    """

    users: Ints
    stops: Ints
    relevant: Bools


@dataclass(frozen=True)
class Split:
    """Where each interaction goes.

    Attributes:
        train: ``(n,) bool`` rows to train on.
        known_items: ``(V,) bool`` items that occur in training: the catalogue.
        validation: Questions asked of the histories of the training period.
        test: Questions asked of the future.
        counts: Size of each step, for the report.
    """

    train: Bools
    known_items: Bools
    validation: Questions
    test: Questions
    counts: dict[str, int | float]


def enough(codes: NDArray[np.int32], least: int) -> Bools:
    """``(n,) bool``: rows whose code (user or item) occurs at least ``least`` times. One pass, not iterated."""
    return (np.bincount(codes) >= least)[codes] if len(codes) else np.zeros(0, dtype=bool)


def cut_time(times: Ints, test_fraction: float) -> int:
    """First timestamp of the test period.

    It is the earliest timestamp from which at most ``test_fraction`` of the interactions follow, itself included, so
    that interactions of one timestamp stay together; where the last timestamp alone holds more, it is the last.

    Args:
        times: ``(n,) int64``, at least one.
        test_fraction: In (0, 1).
    """
    ordered = np.sort(times)
    first = len(ordered) - int(len(ordered) * test_fraction)
    if first == len(ordered):
        return int(ordered[-1])
    cut = int(ordered[first])
    if first > 0 and ordered[first - 1] == cut:
        later = np.searchsorted(ordered, cut, side="right")
        cut = int(ordered[min(int(later), len(ordered) - 1)])
    return cut


def global_time_split(
    users: NDArray[np.int32],
    items: NDArray[np.int32],
    times: Ints,
    *,
    test_fraction: float,
    validation_user_fraction: float,
    user_words: NDArray[np.uint64],
    target: Target,
) -> Split:
    """The past trains, the future tests, and some users of the past are kept aside for validation.

    1. The test period starts at :func:`cut_time`; its items unseen before are dropped.
    2. ``validation_user_fraction`` of the users of the training period, those with the lowest ``user_words``, leave
       training; items that no longer occur in training are dropped. A validation user is asked for the last
       interaction (``next_basket``: last timestamp group) that is left of the training period.
    3. A test user is active in the test period, is not a validation user and occurs in training. It is asked for the
       last interaction (group) of the test period, as far as the items occur in training.

    The input ends before the interaction asked for, with ``next_basket`` before its timestamp.

    Args:
        users: ``(n,) int32`` in 0..U-1, not decreasing.
        items: ``(n,) int32`` in 0..V-1.
        times: ``(n,) int64``, not decreasing inside a user.
        test_fraction: In (0, 1), of the interactions.
        validation_user_fraction: In [0, 1), of the users of the training period; rounded, at least 1 unless 0.
        user_words: ``(U,) uint64`` random word of each user.
        target: ``next_item`` or ``next_basket``.

    Returns:
        The split; nothing in it that concerns training depends on the content of the test period.

    Source: arXiv 2509.09682, preparation of the data; the cut keeps the interactions of one timestamp together.
    """
    cut = cut_time(times, test_fraction)
    early = times < cut
    seen_early = _occurring(items[early], items)
    kept = early | seen_early[items]

    n_users = len(user_words)
    candidates = np.unique(users[early]).astype(np.int64)
    n_validation = round(validation_user_fraction * len(candidates))
    if validation_user_fraction > 0:
        n_validation = max(1, n_validation)
    aside = np.zeros(n_users, dtype=bool)
    aside[candidates[np.argsort(user_words[candidates], kind="stable")[:n_validation]]] = True

    train = early & ~aside[users]
    known_items = _occurring(items[train], items)
    known = kept & known_items[items]
    validation = _ask_for_last(users, times, early & aside[users] & known, known, target)
    trained = np.zeros(n_users, dtype=bool)
    trained[users[train]] = True
    asked = kept & ~early & trained[users]
    test = _ask_for_last(users, times, asked, known, target)
    counts: dict[str, int | float] = {
        "cut_time": cut,
        "training_period_interactions": int(early.sum()),
        "training_period_users": len(candidates),
        "test_period_interactions": int(len(early) - early.sum()),
        "test_period_interactions_of_items_seen_before": int((kept & ~early).sum()),
        "validation_users_sampled": int(aside.sum()),
        "test_users_candidates": len(np.unique(users[asked])),
    }
    return Split(train, known_items, validation, test, counts)


def leave_last_out_split(users: NDArray[np.int32], items: NDArray[np.int32], times: Ints, *, target: Target) -> Split:
    """The last interaction of each user tests, the one before it validates, the others train.

    With ``next_basket`` the same of timestamp groups. Users with fewer than three stay in training whole. Items that
    do not occur in training are taken out of inputs and questions. The input of the test holds the validation part.
    Training data of one user may be later than test data of another: use it where there is no common time.

    Args:
        users: ``(n,) int32`` in 0..U-1, not decreasing.
        items: ``(n,) int32`` in 0..V-1.
        times: ``(n,) int64``, or any order, not decreasing inside a user.
        target: ``next_item`` or ``next_basket``.
    """
    first = _group_starts(users, times) if target == "next_basket" else np.arange(len(users))
    begins = first == np.arange(len(users))
    unit = np.cumsum(begins) - 1
    last_unit = np.zeros(int(users.max(initial=-1)) + 1, dtype=np.int64)
    last_unit[users] = unit  # rows are in order: the last one written stays
    from_end = last_unit[users] - unit
    n_units = np.bincount(users[begins], minlength=len(last_unit))
    split_up = (n_units >= 3)[users]
    train = ~split_up | (from_end >= 2)
    known_items = _occurring(items[train], items)
    known = known_items[items]
    validation = _ask_for_last(users, times, split_up & (from_end == 1), known, target)
    test = _ask_for_last(users, times, split_up & (from_end == 0), known, target)
    counts: dict[str, int | float] = {
        "users_split": int((n_units >= 3).sum()),
        "users_too_short_to_split": int(((n_units > 0) & (n_units < 3)).sum()),
    }
    return Split(train, known_items, validation, test, counts)


def _occurring(present: NDArray[np.int32], items: NDArray[np.int32]) -> Bools:
    return np.bincount(present, minlength=int(items.max(initial=-1)) + 1) > 0


def _group_starts(users: NDArray[np.int32], times: Ints) -> Ints:
    """``(n,)`` first row with the user and time of each row."""
    rows = np.arange(len(users))
    begins = np.ones(len(users), dtype=bool)
    begins[1:] = (users[1:] != users[:-1]) | (times[1:] != times[:-1])
    return np.maximum.accumulate(np.where(begins, rows, 0))


def _ask_for_last(users: NDArray[np.int32], times: Ints, asked: Bools, known: Bools, target: Target) -> Questions:
    """Ask for the last of the rows ``asked`` of each user (all at its timestamp for ``next_basket``).

    Users without a known item in question, or without a known item before it, are not asked.
    """
    rows = np.flatnonzero(asked)
    last = rows[np.flatnonzero(np.r_[users[rows][1:] != users[rows][:-1], True])] if len(rows) else rows
    stops = last
    relevant = np.zeros(len(users), dtype=bool)
    relevant[last] = True
    if target == "next_basket":
        first = _group_starts(users, times)
        stops = first[last]
        group_asked = np.zeros(len(users), dtype=bool)
        group_asked[stops] = True
        relevant = asked & group_asked[first]
    relevant &= known
    known_before = np.r_[0, np.cumsum(known)]
    begin = np.searchsorted(users, users[last])
    n_input = known_before[stops] - known_before[begin]
    has_question = np.zeros(int(users.max(initial=-1)) + 1, dtype=bool)
    has_question[users[relevant]] = True
    kept = (n_input > 0) & has_question[users[last]]
    answerable = np.zeros(len(has_question), dtype=bool)
    answerable[users[last[kept]]] = True
    return Questions(users[last[kept]].astype(np.int64), stops[kept].astype(np.int64), relevant & answerable[users])
