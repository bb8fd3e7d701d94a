"""Events of a bank in order of time, as running sums read them: of a bank that is whole, and of one that grows.

E_C events of the bank, n users, Q queries. Source: spec of arXiv 2502.10205, section 10.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_modules.context.as_of import last_before, with_room
from lightning_modules.context.bank import ContextBank
from lightning_modules.context.rules import Visibility
from lightning_modules.context.streaming import StreamingBank


class Timeline(ABC):
    """The k-th event in order of time is a row of the bank, and replaces its user's row before.

    Args:
        visibility: Rules of the bank.

    Raises:
        ValueError: If the bank hides states by age, group or number, which a sum over all users cannot.
    """

    grows = False
    """Whether the bank may get more events."""

    def __init__(self, visibility: Visibility) -> None:
        for name, hides in (
            ("max_age_days", visibility.max_age is not None),
            ("max_context", visibility.max_context is not None),
            ("exclude_group", visibility.exclude_group),
        ):
            if hides:
                raise ValueError(f"prefix sums hold all context users and cannot apply {name}, got a bank with it")
        self.visibility = visibility

    @staticmethod
    def of(bank: ContextBank | StreamingBank) -> "Timeline":
        """The timeline of a bank of either kind."""
        return _Growing(bank) if isinstance(bank, StreamingBank) else _Whole(bank)

    @property
    @abstractmethod
    def states(self) -> Tensor:
        """``(E_C, d)`` states by row, shared with the bank."""

    @property
    @abstractmethod
    def times(self) -> Tensor:
        """``(E_C,) int64`` times by row, shared with the bank."""

    @abstractmethod
    def rows(self, places: Tensor | slice) -> Tensor:
        """``int64`` rows of the events at these places in order of time."""

    @abstractmethod
    def earlier(self, rows: Tensor) -> Tensor:
        """``int64`` rows of the states that those of ``rows`` replaced, -1 of a user's first."""

    def replaced(self, rows: Tensor) -> Tensor:
        """``int64`` rows of the states that those of ``rows`` replaced; fewer, since first events replace nothing."""
        earlier = self.earlier(rows)
        return earlier[earlier >= 0]

    @abstractmethod
    def positions(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        """``(Q,)`` numbers of events and of users before each moment."""

    @abstractmethod
    def hidden(self, moments: Tensor, users: Tensor) -> tuple[Tensor, Tensor]:
        """The query user's own state in the sums, where it has to be taken off.

        Returns:
            ``(Q,) int64`` rows, arbitrary where there is none, and ``(Q,) bool`` whether there is one.
        """

    def tensors(self) -> list[Tensor]:
        """All that is held but the user of each event."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]

    @abstractmethod
    def refresh(self) -> None:
        """See to events that the bank has got since."""


class _Whole(Timeline):
    def __init__(self, bank: ContextBank) -> None:
        super().__init__(bank.visibility)
        self.bank = bank
        # Those of now: after a refresh of the bank sums of others would be beside them.
        self._states = bank.states
        self.users, self.offsets = bank.context_users, bank.offsets
        small = torch.int32 if len(bank.times) < 2**31 else torch.int64
        order = bank.times.argsort(stable=True)
        self.order, self.sorted_times = order.to(small), bank.times[order]
        starts = bank.offsets[:-1][bank.offsets.diff() > 0]
        self.is_first = torch.zeros(len(bank.times), dtype=torch.bool, device=starts.device)
        self.is_first[starts] = True
        self.first_times = bank.times[starts].sort().values

    @property
    def states(self) -> Tensor:
        return self._states

    @property
    def times(self) -> Tensor:
        return self.bank.times

    def rows(self, places: Tensor | slice) -> Tensor:
        return self.order[places].long()

    def earlier(self, rows: Tensor) -> Tensor:
        return torch.where(self.is_first[rows], -1, rows - 1)

    def replaced(self, rows: Tensor) -> Tensor:
        return rows[~self.is_first[rows]] - 1  # the same in fewer operations, once for every query

    def positions(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        return _before(self.sorted_times, self.first_times, moments, self.visibility)

    def hidden(self, moments: Tensor, users: Tensor) -> tuple[Tensor, Tensor]:
        if not self.visibility.exclude_self or not len(self.times):
            return torch.zeros_like(users), torch.zeros_like(users, dtype=torch.bool)
        rank = torch.searchsorted(self.users, users.contiguous()).clamp(max=len(self.users) - 1)
        known = self.users[rank] == users
        first = self.offsets[rank]
        stop = torch.where(known, self.offsets[rank + 1], first)
        rows = last_before(self.times, first, stop, moments, inclusive=self.visibility.inclusive)
        return rows.clamp(min=0), rows >= first

    def refresh(self) -> None:
        pass  # there are none

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *(value for value in self.bank.buffers() if value is not self.bank.users)]


class _Growing(Timeline):
    """Its rows stand in order of arrival, which must be the order of time; first times are found as events come."""

    grows = True

    def __init__(self, bank: StreamingBank) -> None:
        super().__init__(bank.visibility)
        self.bank = bank
        self.n_seen = self.n_users = 0
        self.first_times = bank.times.new_zeros(0)
        self.refresh()

    @property
    def states(self) -> Tensor:
        return self.bank.states

    @property
    def times(self) -> Tensor:
        return self.bank.times

    def rows(self, places: Tensor | slice) -> Tensor:
        if isinstance(places, Tensor):
            return places
        return torch.arange(places.start, places.stop, device=self.times.device)

    def earlier(self, rows: Tensor) -> Tensor:
        return self.bank.earlier[rows]

    def positions(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        return _before(self.times, self.first_times[: self.n_users], moments, self.visibility)

    def hidden(self, moments: Tensor, users: Tensor) -> tuple[Tensor, Tensor]:
        if not self.visibility.exclude_self:
            return torch.zeros_like(users), torch.zeros_like(users, dtype=torch.bool)
        rows = self.bank.own_before(moments, users)
        return rows.clamp(min=0), rows >= 0

    def refresh(self) -> None:
        times = self.times[max(0, self.n_seen - 1) :]
        late = torch.nonzero(times.diff() < 0).flatten()[:1].tolist()
        if late:
            received = f"{int(times[late[0] + 1])} after {int(times[late[0]])}"
            raise ValueError(f"running sums take events of all users in order of time, got {received}")
        firsts = self.times[self.n_seen :][self.bank.earlier[self.n_seen :] < 0]
        self.first_times = with_room(self.first_times, self.n_users + len(firsts))
        self.first_times[self.n_users : self.n_users + len(firsts)] = firsts
        self.n_users += len(firsts)
        self.n_seen = self.bank.n_events

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *(value for value in vars(self.bank).values() if isinstance(value, Tensor))]


def _before(times: Tensor, firsts: Tensor, moments: Tensor, rules: Visibility) -> tuple[Tensor, Tensor]:
    moments = moments.contiguous()
    n_events = torch.searchsorted(times, moments, right=rules.inclusive)
    return n_events, torch.searchsorted(firsts, moments, right=rules.inclusive)
