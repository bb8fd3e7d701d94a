"""A context bank that grows event by event, as events arrive in a running system.

E_C events so far, n context users, Q queries, d width, times in microseconds. Source: spec of arXiv 2502.10205,
sections 3.1 and 13.10.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_modules.context.as_of import gathered_context, sample_context_users, with_room
from lightning_modules.context.rules import Visibility
from lightning_modules.context.visible import Context, days


class StreamingBank:
    """Answers at every event what a bank built anew from the events so far would answer.

        bank = StreamingBank(context_users, d)
        bank.append(user, time, state)             # as events arrive
        aggregator(query, bank.context(times, users))

    Rows are kept in order of arrival, each with the user's row before; an event costs O(d), a query O(n) and one more
    step for every event that a user has had since the query's moment. Queries may lie in the past or in the future.
    Mean and linear kernel over all users cost O(d) and O(r d) a query, however many they are, by sums that grow with
    the bank, if the events of all users come in order of time:

        mean = PrefixMean.build(bank)              # once
        found, counts = mean.mean(times, users)    # whenever events have come

    Args:
        context_users: ``(n,) int64`` distinct rows of users; events of others are ignored.
        d: Width of states.
        visibility: The rules.
        min_prefix: A user's states after fewer events are left out.
        groups: ``(U,) int64`` groups of all users, needed to exclude them.
        words: ``(U,) int64`` random words of all users' ids, by which a random policy draws; None takes row numbers.
        dtype: Of the states.

    Raises:
        ValueError: If there are no context users, one occurs twice, or groups are missing.
    """

    def __init__(
        self,
        context_users: Tensor,
        d: int,
        *,
        visibility: Visibility | None = None,
        min_prefix: int = 1,
        groups: Tensor | None = None,
        words: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.visibility = visibility or Visibility()
        if self.visibility.exclude_group and groups is None:
            raise ValueError("exclude_group needs groups, got none")
        if min_prefix < 1:
            raise ValueError(f"min_prefix must be at least 1, got {min_prefix}")
        self.context_users = sample_context_users(context_users, None, 0)
        device = context_users.device
        self.groups = context_users.new_zeros(0) if groups is None else groups
        self.words = context_users.new_zeros(0) if words is None else words
        self.min_prefix = min_prefix
        self.n_events = 0
        self.n_seen = torch.zeros_like(self.context_users)
        self.last_rows = torch.full_like(self.context_users, -1)
        self.last_times = torch.full_like(self.context_users, torch.iinfo(torch.int64).min)
        self._states = torch.zeros(0, d, dtype=dtype, device=device)
        self._times = context_users.new_zeros(0)
        self._earlier = context_users.new_zeros(0)

    @property
    def states(self) -> Tensor:
        """``(E_C, d) float`` states in order of arrival."""
        return self._states[: self.n_events]

    @property
    def times(self) -> Tensor:
        """``(E_C,) int64`` times in order of arrival."""
        return self._times[: self.n_events]

    @property
    def earlier(self) -> Tensor:
        """``(E_C,) int64`` row of the state that each one replaced, -1 of a user's first."""
        return self._earlier[: self.n_events]

    def append(self, user: int, time: int, state: Tensor) -> None:
        """Take in one event and the state after it.

        Args:
            user: Row of the user.
            time: Microseconds, not before the user's last event; users among each other may arrive in any order.
            state: ``(d,) float``.

        Raises:
            ValueError: If the time is before the user's last event, or the state has another shape.
        """
        if state.shape != self._states.shape[1:]:
            raise ValueError(f"state must have shape {tuple(self._states.shape[1:])}, got {tuple(state.shape)}")
        rank = int(torch.searchsorted(self.context_users, user))
        if rank == len(self.context_users) or self.context_users[rank] != user:
            return
        if time < self.last_times[rank]:
            raise ValueError(
                f"events of user {user} must not go back in time, got {time} after {self.last_times[rank]}"
            )
        self.last_times[rank] = time
        self.n_seen[rank] += 1
        if self.n_seen[rank] < self.min_prefix:
            return
        if self.n_events == len(self._times):
            self._grow()
        row = self.n_events
        self._states[row] = state.detach()
        self._times[row] = time
        self._earlier[row] = self.last_rows[rank]
        self.last_rows[rank] = row
        self.n_events += 1

    def to(self, device: torch.device | str) -> "StreamingBank":
        """The bank itself, moved."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, without the room kept for events to come."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        tensors |= {name: tensors[name][: self.n_events] for name in ("_states", "_times", "_earlier")}
        plain = {"min_prefix": self.min_prefix, "n_events": self.n_events, "visibility": self.visibility.plain()}
        return {name: value.clone() for name, value in tensors.items()} | plain

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "StreamingBank":
        """The bank whose ``state_dict`` this is; appended to, it does not change the state."""
        bank = cls(state["context_users"], state["_states"].shape[1])
        for name, value in state.items():
            setattr(bank, name, value.clone() if isinstance(value, Tensor) else value)
        bank.visibility = Visibility(**state["visibility"])
        return bank

    def _grow(self) -> None:
        """Twice the room, so that an event costs O(d) on average."""
        room = max(64, 2 * len(self._times))
        self._states = with_room(self._states, room)
        self._times, self._earlier = with_room(self._times, room), with_room(self._earlier, room)

    def before(self, moments: Tensor) -> Tensor:
        """``(Q, n) int64`` last admissible row of each context user at each moment, -1 where there is none."""
        return self._back(self.last_rows.expand(len(moments), -1), moments.unsqueeze(1))

    def own_before(self, moments: Tensor, users: Tensor) -> Tensor:
        """``(Q,) int64`` last admissible row of the user ``(Q,)`` who asks, -1 where there is none."""
        rank = torch.searchsorted(self.context_users, users.contiguous()).clamp(max=len(self.context_users) - 1)
        return self._back(torch.where(self.context_users[rank] == users, self.last_rows[rank], -1), moments)

    def _back(self, rows: Tensor, moments: Tensor) -> Tensor:
        while True:
            times = self._times[rows.clamp(min=0)] if self.n_events else torch.zeros_like(rows)
            late = (rows >= 0) & ((times > moments) if self.visibility.inclusive else (times >= moments))
            if not late.any():
                return rows
            rows = torch.where(late, self._earlier[rows.clamp(min=0)], rows)

    def context(self, query_times: Tensor, query_users: Tensor) -> Context:
        """What queries see, as `ContextBank.context` in the gathered layout.

        Args:
            query_times: ``(Q,) int64``.
            query_users: ``(Q,) int64``.
        """
        rules = self.visibility
        rows = self.before(rules.moments(query_times))
        start = self._times[rows.clamp(min=0)] if self.n_events else torch.zeros_like(rows)
        owners = self.context_users.expand_as(rows)
        seen = rules.allowed(rows >= 0, start, owners, query_times, query_users, self.groups)
        best = rules.best(seen, start, owners, query_times, query_users, self.words)
        if best is not None:
            rows, start, owners, seen = (each.gather(1, best) for each in (rows, start, owners, seen))
        ages = torch.where(seen, days(query_times.unsqueeze(1) - start), 0)
        return gathered_context(self.states, rows, seen, ages, owners)
