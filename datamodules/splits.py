"""Which interactions train, which are asked for: pure functions on arrays.

n interactions, U users, V items. All functions take the interactions sorted by user, then time, then a seeded hash
that breaks ties, and know no more than these arrays. Beyond arguments and results they take memory for one block of
users at a time: temporary integers of all rows would take more than the rows themselves.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Target = Literal["next_item", "next_basket"]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

ROWS_AT_A_TIME = 1 << 21
"""Rows of a block: large enough that whole-array work on it is all the time, small beside a large table."""


@dataclass(frozen=True)
class Questions:
    """What one stage of evaluation asks.

    Attributes:
        users: ``(Q,) int64`` users asked for, increasing.
        stops: ``(Q,) int64`` row at which the input of each ends: its rows before, known items only, are the input.
        n_inputs: ``(Q,) int64`` length of each input, at least 1.
        relevant: ``(n,) bool`` rows whose items are to be found; at least one for each user.
    """

    users: Ints
    stops: Ints
    n_inputs: Ints
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


def user_blocks(users: NDArray[np.integer], at_most: int | None = None) -> Iterator[slice]:
    """Cut rows into blocks of whole users, each of about :data:`ROWS_AT_A_TIME` rows or of one user.

    Args:
        users: ``(n,)``, not decreasing.
        at_most: Number of blocks; where there would be more of them they are larger.

    Yields:
        Slices that follow each other and cover all rows.
    """
    n_rows = ROWS_AT_A_TIME if at_most is None else max(ROWS_AT_A_TIME, -(-len(users) // at_most))
    start = 0
    while start < len(users):
        last = users[min(start + n_rows, len(users)) - 1]
        stop = start + int(np.searchsorted(users[start:], last, side="right"))
        yield slice(start, stop)
        start = stop


def occurrences(codes: NDArray[np.integer], n: int, among: Bools | None = None) -> Ints:
    """``(n,)`` how often each of 0..n-1 occurs, a part of the rows at a time: a count widens its rows to int64.

    Args:
        codes: ``(m,)`` in 0..n-1.
        n: Number of codes.
        among: ``(m,) bool`` rows to count; None is all.
    """
    counts = np.zeros(n, dtype=np.int64)
    for start in range(0, len(codes), ROWS_AT_A_TIME):
        part = slice(start, start + ROWS_AT_A_TIME)
        counts += np.bincount(codes[part] if among is None else codes[part][among[part]], minlength=n)
    return counts


def enough(codes: NDArray[np.int32], least: int) -> Bools:
    """``(n,) bool``: rows whose code (user or item) occurs at least ``least`` times. One pass, not iterated."""
    return (occurrences(codes, int(codes.max(initial=-1)) + 1) >= least)[codes]


def cut_time(times: Ints, test_fraction: float) -> int:
    """First timestamp of the test period.

    It is the earliest timestamp from which at most ``test_fraction`` of the interactions follow, itself included, so
    that interactions of one timestamp stay together; where the last timestamp alone holds more, it is the last.

    Args:
        times: ``(n,) int64``, at least one.
        test_fraction: In (0, 1).
    """
    first = len(times) - int(len(times) * test_fraction)
    if first == len(times):
        return int(times.max())
    cut = int(np.partition(times, first)[first])
    if np.count_nonzero(times < cut) < first:  # the timestamp begins before: the next one, if there is one
        cut = int(times[times > cut].min(initial=times.max()))
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
        The split. Given these rows, what concerns training depends on the test period by its number of rows alone,
        which sets the cut. Filters by count, which choose the rows before, have seen the test period.

    Source: arXiv 2509.09682, preparation of the data; the cut keeps the interactions of one timestamp together.
    """
    cut = cut_time(times, test_fraction)
    early = times < cut
    n_users, n_items = len(user_words), int(items.max(initial=-1)) + 1
    kept = early | (occurrences(items, n_items, early) > 0)[items]

    candidates = np.flatnonzero(occurrences(users, n_users, early))
    n_validation = round(validation_user_fraction * len(candidates))
    if validation_user_fraction > 0:
        n_validation = max(1, n_validation)
    aside = np.zeros(n_users, dtype=bool)
    aside[candidates[np.argsort(user_words[candidates], kind="stable")[:n_validation]]] = True

    train = early & ~aside[users]
    known_items = occurrences(items, n_items, train) > 0
    known = kept & known_items[items]
    validation = _ask_for_last(users, times, early & aside[users] & known, known, target)
    trained = occurrences(users, n_users, train) > 0
    asked = kept & ~early & trained[users]
    test = _ask_for_last(users, times, asked, known, target)
    counts: dict[str, int | float] = {
        "cut_time": cut,
        "training_period_interactions": int(early.sum()),
        "training_period_users": len(candidates),
        "test_period_interactions": int(len(early) - early.sum()),
        "test_period_interactions_of_items_seen_before": int((kept & ~early).sum()),
        "validation_users_sampled": int(aside.sum()),
        "test_users_candidates": int(np.count_nonzero(occurrences(users, n_users, asked))),
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
    train, before_last, last = (np.zeros(len(users), dtype=bool) for _ in range(3))
    counts: dict[str, int | float] = {"users_split": 0, "users_too_short_to_split": 0}
    for block in user_blocks(users):
        owners = users[block] - users[block.start]
        rows = np.arange(len(owners))
        first = _group_starts(owners, times[block]) if target == "next_basket" else rows
        begins = first == rows
        unit = np.cumsum(begins) - 1
        last_unit = np.zeros(int(owners[-1]) + 1, dtype=np.int64)
        last_unit[owners] = unit  # rows are in order: the last one written stays
        from_end = last_unit[owners] - unit
        n_units = np.bincount(owners[begins], minlength=len(last_unit))
        split_up = (n_units >= 3)[owners]
        train[block] = ~split_up | (from_end >= 2)
        before_last[block] = split_up & (from_end == 1)
        last[block] = split_up & (from_end == 0)
        counts["users_split"] += int((n_units >= 3).sum())
        counts["users_too_short_to_split"] += int(((n_units > 0) & (n_units < 3)).sum())
    known_items = occurrences(items, int(items.max(initial=-1)) + 1, train) > 0
    known = known_items[items]
    validation = _ask_for_last(users, times, before_last, known, target)
    test = _ask_for_last(users, times, last, known, target)
    return Split(train, known_items, validation, test, counts)


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
    found = [np.zeros((3, 0), dtype=np.int64)]
    relevant = np.zeros(len(users), dtype=bool)
    for block in user_blocks(users):
        owners = users[block] - users[block.start]
        of_block, relevant[block] = _last_of_block(owners, times[block], asked[block], known[block], target)
        of_block += np.array([[users[block.start]], [block.start], [0]])
        found.append(of_block)
    who, stops, n_inputs = np.concatenate(found, axis=1)
    return Questions(who, stops, n_inputs, relevant)


def _last_of_block(
    users: NDArray[np.int32], times: Ints, asked: Bools, known: Bools, target: Target
) -> tuple[Ints, Bools]:
    """``(3, Q)`` users, stops and lengths of input, and relevant rows, of a block whose users and rows count from 0."""
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
    has_question = np.zeros(int(users[-1]) + 1, dtype=bool)
    has_question[users[relevant]] = True
    kept = (n_input > 0) & has_question[users[last]]
    answerable = np.zeros(len(has_question), dtype=bool)
    answerable[users[last[kept]]] = True
    return np.stack([users[last[kept]], stops[kept], n_input[kept]]).astype(np.int64), relevant & answerable[users]
