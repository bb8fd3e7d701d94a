"""Targets of event sequences: when something is asked, and what happens after.

A query (u, t) knows the user's own events with time < t. What a horizon of h days asks about depends on the log's clock
(``EventLog.tick``, ``EventLog.happened``):

* coarser than a microsecond, be it a millisecond, a second or a day: [t, t + h). An event stamped t may have happened
  at any moment until the next tick, on a log of dates at any hour of the day, so it comes after t and the horizon
  begins with it; one stamped t + h comes after the horizon.
* a microsecond, as it always is with ``reference_mode``: (t, t + h]. An event stamped t happens at t itself and is in
  neither: at t it is not yet known, and a label that counted it would be about the present.

Rules that follow an event therefore ask at the next tick, when whatever carries the same stamp has happened. Moments
that the user sets, by a delay or date, are taken as they are: one inside a tick sees all of it. With
``reference_mode`` rules ask one microsecond after the event: the release asks at the event and includes ties, and
included at the next tick would be what happens then.

A query rule must not be a function of the label. "Just before the deciding event" is one: it tells that something is
decided next. Such rules, and labels that look at the end of a history, exist for reproduction alone
(``reference_mode``, :mod:`datamodules.event_published`) and mark what was asked by them.

Source: kernel_attention.md, sections 7, 8, 15.
"""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from datamodules.counter_hash import Purpose, Words, chain, extend
from datamodules.event_preparation import EventLog, Ints, moment
from datamodules.sources.events import MISSING

Scope = Literal["global", "local", "next"]
Pairs = tuple[Ints, Ints]

INSTEAD = "ask AfterFirstEvent, AfterDelay, CalendarDates or RandomTimes, or reproduce with reference_mode"
"""What errors say to somebody whose rule depends on the outcome."""


class QueryRule(ABC):
    """When users are asked. ``pairs`` gives (users, times), each ``(Q,) int64``, in microseconds."""

    depends_on_outcome: bool = False
    """Whether the time of a query is declared to be a function of what comes after it; one that is and does not say so
    is found out by :func:`datamodules.label_checks.asks_by_outcome`."""

    @abstractmethod
    def pairs(self, log: EventLog) -> Pairs:
        """Users and times, before the fold, the horizon and the own history are looked at."""


class AfterFirstEvent(QueryRule):
    """At the next tick of the log's clock after each user's first event: a day later on a log of dates.

    All events of that stamp, those of others too, have then happened and are known; with ``reference_mode`` it is one
    microsecond after the event.
    """

    def pairs(self, log: EventLog) -> Pairs:
        """One query a user."""
        return np.arange(log.n_users), log.times[log.offsets[:-1]] + log.tick


class AfterDelay(QueryRule):
    """A fixed time after each user's first event.

    Args:
        days: The delay; above 0.

    Raises:
        ValueError: If the delay is not positive.
    """

    def __init__(self, days: float) -> None:
        self.days = _positive("days", days)

    def pairs(self, log: EventLog) -> Pairs:
        """One query a user."""
        return np.arange(log.n_users), log.times[log.offsets[:-1]] + log.microseconds(self.days)


class CalendarDates(QueryRule):
    """All users with an earlier event, at the same moments.

    Args:
        every_days: Distance of the moments; this or ``dates``.
        dates: The moments, ISO 8601.
        first: First moment of ``every_days``; None is the first midnight after the first event.
        active_days: A user is asked only within so many days of an own event before t; None is always. It looks at
            the past alone.

    Raises:
        ValueError: If not exactly one of ``every_days`` and ``dates`` is given, or a number is not positive.
    """

    def __init__(
        self,
        every_days: float | None = None,
        dates: list[str] | None = None,
        first: str | None = None,
        active_days: float | None = None,
    ) -> None:
        if (every_days is None) == (dates is None):
            raise ValueError(f"one of every_days and dates must be given, got {every_days!r} and {dates!r}")
        if dates is not None and first is not None:
            raise ValueError("first goes with every_days, got dates")
        self.every_days = None if every_days is None else _positive("every_days", every_days)
        self.dates = None if dates is None else [_moment("dates", date) for date in dates]
        self.first = None if first is None else _moment("first", first)
        self.active_days = None if active_days is None else _positive("active_days", active_days)

    def pairs(self, log: EventLog) -> Pairs:
        """Moment after moment, the users who have an event before it."""
        if self.dates is not None:
            moments = np.unique(self.dates)
        else:
            assert self.every_days is not None
            day = log.microseconds(1)
            first = (int(log.times.min()) // day + 1) * day if self.first is None else self.first
            moments = np.arange(first, log.end, log.microseconds(self.every_days))
        everybody = np.arange(log.n_users)
        users, times = [], []
        for at in moments.tolist():  # a moment at a time: users x moments may not fit into memory
            rows = log.before(everybody, np.full(log.n_users, at))
            asked = rows > log.offsets[:-1]
            if self.active_days is not None:
                asked &= at - log.times[np.maximum(rows - 1, 0)] <= log.microseconds(self.active_days)
            users.append(np.flatnonzero(asked))
            times.append(np.full(len(users[-1]), at))
        return np.concatenate([np.zeros(0, np.int64), *users]), np.concatenate([np.zeros(0, np.int64), *times])


class RandomTimes(QueryRule):
    """Moments drawn evenly between a user's first event and the end of the file.

    They lie whole ticks of the log's clock after that event, with ``reference_mode`` whole microseconds. By time they
    are drawn in each period for itself, so that those of training do not move with what comes later.

    Args:
        per_user: Moments of each user and period, at least 1.
        seed: Of the draw.

    Raises:
        ValueError: If ``per_user`` is below 1.
    """

    def __init__(self, per_user: int = 1, seed: int = 0) -> None:
        if per_user < 1:
            raise ValueError(f"per_user must be at least 1, got {per_user}")
        self.per_user, self.seed = per_user, seed

    def pairs(self, log: EventLog) -> Pairs:
        """``per_user`` queries a user and period."""
        users = np.repeat(np.arange(log.n_users), self.per_user)
        number = np.tile(np.arange(self.per_user), log.n_users)
        first = log.times[log.offsets[users]]
        limits = [int(first.min()), *((log.validation_start, log.test_start) if log.by_time else ()), log.end]
        found_users, found_times = [], []
        for period, (start, stop) in enumerate(pairwise(limits)):
            # In ticks after the first event, both rounded up.
            least, stopped = np.maximum(1, -((first - start) // log.tick)), -((first - stop) // log.tick)
            words = chain(self.seed, Purpose.SLOT, log.user_words[users], number, period)
            drawn = least + (words.astype(np.float64) / 2**64 * (stopped - least)).astype(np.int64)
            moments = first + drawn * log.tick
            asked = least < stopped
            found_users.append(users[asked])
            found_times.append(moments[asked])
        return np.concatenate(found_users), np.concatenate(found_times)


class AtEvents(QueryRule):
    """At the time of each event, the event itself unknown: its time is given, its type is asked (``NextType`` only).

    Events of a user at one time are one query.
    """

    def pairs(self, log: EventLog) -> Pairs:
        """One query for each distinct (user, time)."""
        users = log.users
        first = np.ones(len(users), dtype=bool)
        first[1:] = (users[1:] != users[:-1]) | (log.times[1:] != log.times[:-1])
        return users[first], log.times[first]


class LastEvent(QueryRule):
    """One tick after each user's last event, with ``reference_mode``, which it needs, a microsecond.

    It knows that nothing follows.
    """

    depends_on_outcome = True

    def pairs(self, log: EventLog) -> Pairs:
        """One query a user."""
        return np.arange(log.n_users), log.times[log.offsets[1:] - 1] + log.tick


class EventTarget(ABC):
    """What is asked; classes are 0..n_classes - 1.

    Args:
        rule: When it is asked.
        max_queries_per_user: Most queries of a user in a fold, drawn by ``seed``; None is all.
        max_queries: Then the most queries of a fold, drawn by ``seed``; None is all.
        seed: Of both draws.

    Raises:
        ValueError: If a limit is below 1, or the rule does not go with the target.
    """

    scope: Scope = "local"
    static = False
    """Whether the label is one of the user, so that the time split needs disjoint users."""
    outcome_dependent = False
    """Whether the label is one that nobody could have given by the end of its horizon, whatever the rule."""
    texts: tuple[str, ...] = ()
    """Columns that must be read as categories."""
    numbers: tuple[str, ...] = ()
    """Columns that must be read as numbers."""

    def __init__(
        self,
        rule: QueryRule,
        max_queries_per_user: int | None = None,
        max_queries: int | None = None,
        seed: int = 0,
    ) -> None:
        for name, limit in (("max_queries_per_user", max_queries_per_user), ("max_queries", max_queries)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1, got {limit}")
        if isinstance(rule, AtEvents) and not isinstance(self, NextType):
            raise ValueError(
                f"AtEvents asks for the type of the event at t, so for NextType, not {type(self).__name__}"
            )
        self.rule, self.seed = rule, seed
        self.max_queries_per_user, self.max_queries = max_queries_per_user, max_queries

    @property
    @abstractmethod
    def description(self) -> str:
        """One line for reports."""

    def horizon(self, log: EventLog) -> int:
        """Microseconds after t that the label looks at."""
        return 0

    @abstractmethod
    def labels(self, log: EventLog, users: Ints, times: Ints, train: NDArray[np.bool_]) -> tuple[Ints, int]:
        """Labels ``(Q,)``, -1 where there is none, and the number of classes.

        Args:
            log: The events.
            users: ``(Q,)``.
            times: ``(Q,)``.
            train: ``(Q,)`` queries of fold 0, the only ones a threshold may be fitted to.
        """

    def queries(self, log: EventLog) -> dict[str, Any]:
        """Users, times, labels, folds by the contract of queries, sorted by time, then user; arrays of NumPy.

        A query is kept if its user has ``log.n_before`` events before t, t and the horizon lie in one fold, and it
        has a label.
        """
        users, times = self.rule.pairs(log)
        fold = log.folds(users, times, times + self.horizon(log), disjoint_users=self.static)
        kept = (fold >= 0) & (log.before(users, times) - log.offsets[users] >= log.n_before)
        users, times, fold = users[kept], times[kept], fold[kept]
        labels, n_classes = self.labels(log, users, times, fold == 0)
        kept = labels >= 0
        kept[kept] = self._drawn(log.user_words[users[kept]], times[kept], fold[kept])
        users, times, labels, fold = users[kept], times[kept], labels[kept], fold[kept]
        order = np.lexsort((users, times))
        return {
            "users": users[order],
            "times": times[order],
            "labels": labels[order],
            "fold": fold[order],
            "n_classes": n_classes,
            "scope": self.scope,
            "outcome_dependent": self.rule.depends_on_outcome or self.outcome_dependent,
            "description": self.description,
        }

    def _drawn(self, user_words: Words, times: Ints, fold: NDArray[np.int8]) -> NDArray[np.bool_]:
        words = chain(self.seed, Purpose.SLOT, user_words, times)
        kept = np.ones(len(words), dtype=bool)
        if self.max_queries_per_user is not None:
            # Of a user and fold: a draw among all of a user's would let later queries push out those of training.
            kept = _place_in_group(extend(user_words, fold.astype(np.int64)), words) < self.max_queries_per_user
        if self.max_queries is not None:
            kept[kept] = _place_in_group(fold[kept], words[kept]) < self.max_queries
        return kept


class HorizonTarget(EventTarget):
    """About [t, t + days) on a log whose clock is coarser than a microsecond, else about (t, t + days].

    Args:
        rule: When it is asked.
        days: Horizon, above 0.
        max_queries_per_user, max_queries, seed: See :class:`EventTarget`.
    """

    def __init__(
        self,
        rule: QueryRule,
        days: float,
        max_queries_per_user: int | None = None,
        max_queries: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(rule, max_queries_per_user, max_queries, seed)
        self.days = _positive("days", days)

    def horizon(self, log: EventLog) -> int:
        """``days``."""
        return log.microseconds(self.days)


class NoEventWithin(HorizonTarget):
    """1 if the user has no event within the horizon, see :class:`HorizonTarget`."""

    @property
    def description(self) -> str:
        """One line for reports."""
        return f"no event within {self.days:g} days"

    def labels(self, log: EventLog, users: Ints, times: Ints, train: NDArray[np.bool_]) -> tuple[Ints, int]:
        """1 without an event within the horizon."""
        return (log.happened(users, times + self.horizon(log)) == log.happened(users, times)).astype(np.int64), 2


class EventWithin(HorizonTarget):
    """1 if an event of certain values happens within the horizon; users of whom one has happened are not asked.

    For the horizon see :class:`HorizonTarget`: an event stamped t is its first where the log's clock is coarser than a
    microsecond, else it has happened by t and decides the user.

    Args:
        rule: When it is asked.
        days: Horizon, above 0.
        column: A categorical column.
        values: Its values that count.
        max_queries_per_user, max_queries, seed: See :class:`EventTarget`.
    """

    def __init__(
        self,
        rule: QueryRule,
        days: float,
        column: str,
        values: list[str],
        max_queries_per_user: int | None = None,
        max_queries: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(rule, days, max_queries_per_user, max_queries, seed)
        self.column, self.values = column, list(values)
        self.texts = (column,)

    @property
    def description(self) -> str:
        """One line for reports."""
        return f"{self.column} {' or '.join(self.values)} within {self.days:g} days"

    def labels(self, log: EventLog, users: Ints, times: Ints, train: NDArray[np.bool_]) -> tuple[Ints, int]:
        """1 with such an event within the horizon, -1 where one has happened by t."""
        names = log.names[self.column]
        for value in self.values:
            if value not in names:
                near = difflib.get_close_matches(value, names, n=3)
                raise ValueError(f"column {self.column!r} has no value {value!r}, {_nearest(near, names)}")
        wanted = np.isin(log.codes[self.column], [names.index(value) for value in self.values])
        total = np.concatenate([[0], np.cumsum(wanted)])
        now = total[log.happened(users, times)]
        later = total[log.happened(users, times + self.horizon(log))] > now
        return np.where(now > total[log.offsets[users]], -1, later), 2


class AmountAbove(HorizonTarget):
    """1 if the sum of a raw numeric column over the horizon exceeds a quantile of the train queries' sums.

    For the horizon see :class:`HorizonTarget`.

    Args:
        rule: When it is asked.
        days: Horizon, above 0.
        column: A numeric column; a missing number counts as 0.
        quantile: In (0, 1).
        max_queries_per_user, max_queries, seed: See :class:`EventTarget`.
    """

    def __init__(
        self,
        rule: QueryRule,
        days: float,
        column: str,
        quantile: float = 0.5,
        max_queries_per_user: int | None = None,
        max_queries: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(rule, days, max_queries_per_user, max_queries, seed)
        if not 0 < quantile < 1:
            raise ValueError(f"quantile must be between 0 and 1, got {quantile}")
        self.column, self.quantile = column, quantile
        self.numbers = (column,)

    @property
    def description(self) -> str:
        """One line for reports."""
        return f"{self.column} of {self.days:g} days above the {self.quantile:g} quantile of train"

    def labels(self, log: EventLog, users: Ints, times: Ints, train: NDArray[np.bool_]) -> tuple[Ints, int]:
        """1 above the threshold; without train queries there is none, and no labels."""
        starts, stops = log.happened(users, times), log.happened(users, times + self.horizon(log))
        amounts = np.nan_to_num(log.numbers[self.column])
        # Sums of each window by itself: a difference of running sums would leave rounding of the whole file in it.
        edges = np.stack([starts, stops], axis=1).ravel()
        sums = np.add.reduceat(np.append(amounts, 0.0), edges)[::2] if len(edges) else np.zeros(0)
        sums = np.where(stops > starts, sums, 0.0)
        if not train.any():
            return np.full(len(users), -1), 2
        return (sums > np.quantile(sums[train], self.quantile)).astype(np.int64), 2


class NextType(EventTarget):
    """Rank of the type of the first event at or after t, among the ``top`` most frequent of training events.

    With ``AtEvents`` that is the event at t, whose time is given; of several at one time the first in their order.
    Queries whose next event is of another type or lies in another fold are dropped.

    Args:
        rule: When it is asked.
        column: A categorical column.
        top: Number of types, at least 2.
        max_queries_per_user, max_queries, seed: See :class:`EventTarget`.
    """

    scope: Scope = "next"

    def __init__(
        self,
        rule: QueryRule,
        column: str,
        top: int = 100,
        max_queries_per_user: int | None = None,
        max_queries: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(rule, max_queries_per_user, max_queries, seed)
        if top < 2:
            raise ValueError(f"top must be at least 2, got {top}")
        self.column, self.top = column, top
        self.texts = (column,)

    @property
    def description(self) -> str:
        """One line for reports."""
        return f"next {self.column} of the {self.top} most frequent"

    def labels(self, log: EventLog, users: Ints, times: Ints, train: NDArray[np.bool_]) -> tuple[Ints, int]:
        """Rank 0..top - 1 by falling frequency in training, ties by name."""
        codes = log.codes[self.column]
        counts = np.bincount(codes[log.train_rows], minlength=len(log.names[self.column]))
        chosen = np.argsort(-counts, kind="stable")[: min(self.top, int((counts > 0).sum()))]
        rank = np.full(len(counts), -1, dtype=np.int64)
        rank[chosen] = np.arange(len(chosen))
        row = log.before(users, times)
        there = row < log.offsets[users + 1]
        at = np.minimum(row, len(codes) - 1)
        same = log.folds(users, times, times, disjoint_users=False) == log.folds(
            users, times, np.where(there, log.times[at], times), disjoint_users=False
        )
        return np.where(there & same, rank[codes[at]], -1), len(chosen)


class StaticLabel(EventTarget):
    """A label of the user from the table of users; classes are its distinct values in their order.

    Args:
        rule: When it is asked.
        column: One of ``label_columns``.
        max_queries_per_user, max_queries, seed: See :class:`EventTarget`.
    """

    scope: Scope = "global"
    static = True

    def __init__(
        self,
        rule: QueryRule,
        column: str,
        max_queries_per_user: int | None = None,
        max_queries: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(rule, max_queries_per_user, max_queries, seed)
        self.column = column

    @property
    def description(self) -> str:
        """One line for reports."""
        return f"{self.column} of the user"

    def labels(self, log: EventLog, users: Ints, times: Ints, train: NDArray[np.bool_]) -> tuple[Ints, int]:
        """The user's class, -1 where it is missing."""
        return log.static[self.column][users], len(log.static_names[self.column])


class LocalLabel(EventTarget):
    """The label that the file gives to the user's last event before t.

    By time, queries whose labelled event lies in an earlier period than t are dropped: its label is one of that period.

    Args:
        rule: When it is asked.
        column: One of ``local_label_columns``.
        days: How far after its event the file's label looks; the query is kept out of folds by it. 0 is not at all.
        outcome_dependent: Whether the file made the label from the end of the user's history, as published local
            targets are: allowed under ``reference_mode`` alone, and marked.
        max_queries_per_user, max_queries, seed: See :class:`EventTarget`.
    """

    def __init__(
        self,
        rule: QueryRule,
        column: str,
        days: float = 0.0,
        outcome_dependent: bool = False,
        max_queries_per_user: int | None = None,
        max_queries: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(rule, max_queries_per_user, max_queries, seed)
        if not days >= 0:
            raise ValueError(f"days must be at least 0, got {days}")
        self.column, self.days, self.outcome_dependent = column, days, outcome_dependent

    @property
    def description(self) -> str:
        """One line for reports."""
        return f"{self.column} of the last event"

    def horizon(self, log: EventLog) -> int:
        """``days``."""
        return log.microseconds(self.days)

    def labels(self, log: EventLog, users: Ints, times: Ints, train: NDArray[np.bool_]) -> tuple[Ints, int]:
        """Place of the label among its distinct values, -1 where it is missing."""
        names = [name for name in log.names[self.column] if name != MISSING]
        place = np.array([names.index(name) if name != MISSING else -1 for name in log.names[self.column]])
        row = log.before(users, times) - 1
        same = log.folds(users, log.times[row], times, disjoint_users=False) >= 0
        return np.where((row >= log.offsets[users]) & same, place[log.codes[self.column][row]], -1), len(names)


def _place_in_group(groups: NDArray[np.integer], words: Words) -> Ints:
    """Place of each element in the order of its group's words, from 0."""
    order = np.lexsort((words, groups))
    in_order = groups[order]
    first = np.flatnonzero(np.concatenate([[True], in_order[1:] != in_order[:-1]])[: len(order)])
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order)) - np.repeat(first, np.diff(np.append(first, len(order))))
    return place


def _nearest(near: Sequence[str], names: Sequence[str]) -> str:
    return f"nearest: {', '.join(near)}" if near else f"it has: {', '.join(names[:5])}"


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{name} must be above 0, got {value}")
    return value


def _moment(name: str, text: str) -> int:
    try:
        return moment(str(text))
    except ValueError:
        raise ValueError(f"{name}: {text!r} must be a date or time such as 2011-06-01") from None
