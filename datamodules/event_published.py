"""Targets of the published protocol: windows of events, and labels that are made from the end of a history.

They need ``reference_mode`` and are marked in every table, for nobody could have given such a label at its moment.
Q queries. Source: kernel_attention.md, sections 7 and 8.
"""

import numpy as np
from numpy.typing import NDArray

from datamodules.event_preparation import EventLog, Ints
from datamodules.event_targets import EventTarget, Pairs, QueryRule, Scope


class EveryNthEvent(QueryRule):
    """At the next tick of the log's clock after a user's ``first``-th event, and after each ``step``-th from there.

    The ends of the published windows, 32 events with a step of 16. Several at one time are one query, which knows all
    events of that time. With ``reference_mode`` it is one microsecond after the event: with inclusive ties the context
    then is the published one.

    Args:
        first: Events before the first query, at least 1.
        step: Events from one query to the next, at least 1.

    Raises:
        ValueError: If a number is below 1.
    """

    def __init__(self, first: int = 32, step: int = 16) -> None:
        for name, value in (("first", first), ("step", step)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.first, self.step = first, step

    def pairs(self, log: EventLog) -> Pairs:
        """The queries of a user in the order of time."""
        users = log.users
        place = np.arange(len(users)) - log.offsets[users] + 1
        ends = (place >= self.first) & ((place - self.first) % self.step == 0)
        users, times = users[ends], log.times[ends] + log.tick
        new = np.ones(len(users), dtype=bool)
        new[1:] = (users[1:] != users[:-1]) | (times[1:] != times[:-1])
        return users[new], times[new]


class Left(EventTarget):
    """1 for users without an event in the last ``days`` of the file: stands for a published label "client left".

    Args:
        rule: When it is asked.
        days: Above 0.
        max_queries_per_user, max_queries, seed: See :class:`~datamodules.event_targets.EventTarget`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    scope: Scope = "global"
    static = True
    outcome_dependent = True

    def __init__(
        self,
        rule: QueryRule,
        days: float,
        max_queries_per_user: int | None = None,
        max_queries: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(rule, max_queries_per_user, max_queries, seed)
        if not days > 0:
            raise ValueError(f"days must be above 0, got {days}")
        self.days = days

    @property
    def description(self) -> str:
        """One line for reports."""
        return f"no event in the last {self.days:g} days of the file"

    def labels(self, log: EventLog, users: Ints, times: Ints, train: NDArray[np.bool_]) -> tuple[Ints, int]:
        """1 if the user's last event lies ``days`` or more before the end of the file."""
        return (log.end - _final(log, users) >= log.microseconds(self.days)).astype(np.int64), 2


class FinalDays(EventTarget):
    """The published local label: 1 in the last month before the final event of a user who left, else 0.

    It is that of the user's last event before t: 1 if the user is positive and the event lies at most ``days`` before
    the user's last in the file. Positive are users with one value of a static label, or those without an event in the
    last ``silent_days`` of the file.

    Args:
        rule: When it is asked.
        days: Above 0.
        column: One of ``label_columns``; this or ``silent_days``.
        positive: Its value that is positive, such as that of churners.
        silent_days: As ``days`` of :class:`Left`.
        max_queries_per_user, max_queries, seed: See :class:`~datamodules.event_targets.EventTarget`.

    Raises:
        ValueError: If an argument is out of its range, or not exactly one of ``column`` with ``positive`` and
            ``silent_days`` is given; on first use, if the column does not have the value.
    """

    static = True
    outcome_dependent = True

    def __init__(
        self,
        rule: QueryRule,
        days: float = 30.0,
        column: str | None = None,
        positive: str | None = None,
        silent_days: float | None = None,
        max_queries_per_user: int | None = None,
        max_queries: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(rule, max_queries_per_user, max_queries, seed)
        if (column is None) == (silent_days is None) or (column is None) != (positive is None):
            raise ValueError(
                "either column and positive or silent_days must be given, got "
                f"{column!r}, {positive!r} and {silent_days!r}"
            )
        for name, value in (("days", days), ("silent_days", silent_days)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        self.days, self.column, self.positive, self.silent_days = days, column, positive, silent_days

    @property
    def description(self) -> str:
        """One line for reports."""
        who = f"{self.column} {self.positive}"
        if self.silent_days is not None:
            who = f"users without an event in the last {self.silent_days:g} days of the file"
        return f"last {self.days:g} days before the final event of {who}"

    def labels(self, log: EventLog, users: Ints, times: Ints, train: NDArray[np.bool_]) -> tuple[Ints, int]:
        """1 in the last days of a positive user; -1 without an event before t or where the static label is missing."""
        final = _final(log, users)
        row = log.before(users, times) - 1
        late = final - log.times[row] <= log.microseconds(self.days)
        known = row >= log.offsets[users]
        if self.silent_days is not None:
            positive = log.end - final >= log.microseconds(self.silent_days)
        else:
            assert self.column is not None
            names = log.static_names[self.column]
            if self.positive not in names:
                raise ValueError(
                    f"column {self.column!r} has no value {self.positive!r}, it has: {', '.join(names[:5])}"
                )
            classes = log.static[self.column][users]
            positive, known = classes == names.index(self.positive), known & (classes >= 0)
        return np.where(known, positive & late, -1), 2


def _final(log: EventLog, users: Ints) -> Ints:
    """``(Q,)`` time of each user's last event in the file."""
    final: Ints = log.times[log.offsets[users + 1] - 1]
    return final
