"""States of context users and the exact look-up of those that are visible at a moment.

    strict     visible(e, t)  <=>  t_e <  t <= t_e^+
    inclusive  visible(e, t)  <=>  t_e <= t <  t_e^+

with t_e^+ the time of the user's next event in the bank: at most one event of a user is visible, the last admissible
one. E events of the table, E_C of them in the bank, n context users, Q queries, d width, times in microseconds.
Source: spec of arXiv 2502.10205, sections 3.1, 3.2, 4.2 and 10.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.context.as_of import gathered_context, last_before, ranges, sample_context_users
from lightning_modules.context.rules import Layout, Policy, Ties, Visibility, microseconds
from lightning_modules.context.visible import FOREVER, Context, Events, days

CELL_BYTES = 40
"""Bytes that move for a query and a row beside the state: mask, age, weight and their intermediate results."""


def own_states(
    states: Tensor, events: Events, users: Tensor, times: Tensor, ties: Ties = "strict"
) -> tuple[Tensor, Tensor, Tensor]:
    """State of each query's own user after the last event before the query.

    Args:
        states: ``(E, d) float``, state after each event of the table.
        events: The table.
        users: ``(Q,) int64``.
        times: ``(Q,) int64``.
        ties: ``"strict"``: events before the moment; ``"inclusive"``: also events at it.

    Returns:
        ``(Q, d)`` states, zeros where there is no history; ``(Q,) bool`` whether there is; ``(Q,) int64`` rows of
        those events, -1 where there are none.

    Raises:
        ValueError: If a user is not in the table.
    """
    offsets = events["offsets"]
    wrong = (users < 0) | (users >= len(offsets) - 1)
    if wrong.any():
        raise ValueError(f"query users must be in 0..{len(offsets) - 2}, got {int(users[wrong][0])}")
    first = offsets[users]
    rows = last_before(events["times"], first, offsets[users + 1], times, inclusive=ties == "inclusive")
    found = rows >= first
    own = states.new_zeros(len(users), states.shape[1])
    own[found] = states[rows[found]]
    return own, found, torch.where(found, rows, -1)


class ContextBank(nn.Module):
    """States of the context users after each of their events, searched by time.

    All that answers depend on is kept in buffers: it moves with ``.to`` and is part of the checkpoint; loading takes
    over the checkpoint's sizes and rules, whatever the module held before. There are no labels in it.

    Rows are sorted by user, then time. A look-up is one ``searchsorted`` over the keys user_rank * (T + 1) +
    time_rank, T distinct times, which cannot overflow where raw times would. What only look-ups of rows read (the last
    three attributes, 24 bytes an event) is made by the first of them: sums over all users do without.

    Attributes:
        states: ``(E_C, d) float``.
        times: ``(E_C,) int64``, t_e.
        users: ``(E_C,) int64``.
        event_rows: ``(E_C,) int64`` into the table of events.
        context_users: ``(n,) int64``, rising.
        offsets: ``(n + 1,) int64``: rows of the i-th context user.
        groups: ``(U,) int64`` groups of all users, empty unless groups are excluded.
        words: ``(U,) int64`` words of all users' ids, empty unless states are drawn by them.
        visibility: The rules.
        next_times: ``(E_C,) int64``, t_e^+: next row of the user, ``FOREVER`` for the last. Of several events of a
            user at one moment only the last is ever visible, since the others have t_e^+ = t_e.
        clock: ``(T,) int64``, rising.
        keys: ``(E_C,) int64``, rising.
    """

    states: Tensor
    times: Tensor
    users: Tensor
    event_rows: Tensor
    context_users: Tensor
    offsets: Tensor
    groups: Tensor
    words: Tensor
    _next_times: Tensor | None
    _clock: Tensor | None
    _keys: Tensor | None

    def __init__(self, visibility: Visibility | None = None) -> None:
        super().__init__()
        self.visibility = visibility or Visibility()
        empty = torch.zeros(0, dtype=torch.int64)
        self.register_buffer("states", torch.zeros(0, 0))
        for name in ("times", "users", "event_rows", "context_users", "groups", "words"):
            self.register_buffer(name, empty.clone())
        self.register_buffer("offsets", torch.zeros(1, dtype=torch.int64))
        for name in ("_next_times", "_clock", "_keys"):  # follow from the others
            self.register_buffer(name, None, persistent=False)

    @classmethod
    def build(
        cls,
        states: Tensor,
        events: Events,
        context_users: Tensor,
        *,
        min_prefix: int = 1,
        stop: int = FOREVER,
        ties: Ties = "strict",
        lag_days: float = 0.0,
        max_age_days: float | None = None,
        exclude_self: bool = True,
        exclude_group: bool = False,
        max_context: int | None = None,
        policy: Policy = "recent",
        drop_last_prefix: bool = False,
        seed: int = 0,
    ) -> "ContextBank":
        """Take the states of context users out of a table.

        Args:
            states: ``(E, d) float``, state after each event; kept without gradient.
            events: The table; ``times``, ``offsets`` and, to exclude groups or to draw, ``groups`` or ``words`` are
                read, nothing else.
            context_users: ``(n,) int64`` distinct rows of users, at least one.
            min_prefix: States after fewer events of the user are left out.
            stop: Events at or after it do not enter.
            ties: Whether events at the moment of the query are seen.
            lag_days: States are looked up as of t - lag.
            max_age_days: States older than this at t are hidden.
            exclude_self: A user does not see itself.
            exclude_group: A user does not see users of its group.
            max_context: Most states a query sees.
            policy: Which: the ``"recent"``-ly updated, or a ``"random"`` draw that depends on the query, the context
                user and the seed alone (of users, on their words; without any on row numbers, which move with
                whoever is inserted into the table).
            drop_last_prefix: Leaves out the state after a user's last event before ``stop``, as the released code
                does. Which event is the last is known later only: this does look ahead.
            seed: Of the random policy.

        Raises:
            ValueError: If shapes do not fit, times decrease within a user, or an argument is outside its range.
        """
        times, offsets = events["times"], events["offsets"]
        n_users = len(offsets) - 1
        if states.ndim != 2 or len(states) != len(times):
            raise ValueError(f"states must have a row for each of {len(times)} events, got shape {tuple(states.shape)}")
        earlier = torch.cat([times.diff() < 0, times.new_zeros(1).bool()])
        ends = offsets[1:][offsets[1:] > 0] - 1  # users before the first event have no row
        earlier[ends] = False  # the next event is another user's
        if earlier.any():
            row = int(earlier.nonzero()[0])
            raise ValueError(f"times must not decrease within a user, got an earlier time after event {row}")
        if min_prefix < 1:
            raise ValueError(f"min_prefix must be at least 1, got {min_prefix}")
        if exclude_group and "groups" not in events:
            raise ValueError("exclude_group needs events with groups, got none")
        ranked = sample_context_users(context_users.to(times.device), None, seed)
        if ranked[0] < 0 or ranked[-1] >= n_users:
            wrong = int(ranked[0] if ranked[0] < 0 else ranked[-1])
            raise ValueError(f"context users must be in 0..{n_users - 1}, got {wrong}")
        visibility = Visibility(
            ties=ties,
            lag=microseconds("lag_days", lag_days),
            max_age=None if max_age_days is None else microseconds("max_age_days", max_age_days),
            exclude_self=exclude_self,
            exclude_group=exclude_group,
            max_context=max_context,
            policy=policy,
            seed=seed,
        )
        first, stops = offsets[ranked], offsets[ranked + 1]
        last = last_before(times, first, stops, torch.full_like(first, stop)) - int(drop_last_prefix)
        first = first + min_prefix - 1
        counts = (last + 1 - first).clamp(min=0)
        bank = cls(visibility).to(states.device)
        bank.context_users = ranked
        bank.offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        bank.event_rows = ranges(first, counts)
        bank.users = ranked.repeat_interleave(counts)
        bank.times = times[bank.event_rows]
        bank.groups = events["groups"].clone() if exclude_group else bank.groups
        bank.words = events["words"].clone() if visibility.is_random and "words" in events else bank.words
        bank.refresh(states)
        return bank

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "ContextBank":
        """The bank whose ``state_dict`` this is."""
        bank = cls()
        bank.load_state_dict(state)
        return bank

    def refresh(self, states: Tensor) -> None:
        """Take over new states ``(E, d)`` of the same table of events."""
        self.states = states.detach().index_select(0, self.event_rows.to(states.device)).to(self.times.device)

    @property
    def next_times(self) -> Tensor:
        """t_e^+."""
        if self._next_times is None:
            last = self.users.new_zeros(int(len(self.users) > 0)).bool()
            follows = torch.cat([self.users[1:] == self.users[:-1], last])
            self._next_times = torch.where(follows, self.times.roll(-1), FOREVER)
        return self._next_times

    @property
    def clock(self) -> Tensor:
        """Distinct times."""
        return self._searched()[0]

    @property
    def keys(self) -> Tensor:
        """user_rank * (T + 1) + time_rank."""
        return self._searched()[1]

    def _searched(self) -> tuple[Tensor, Tensor]:
        if self._clock is None or self._keys is None:
            self._clock, ranks = torch.unique(self.times, return_inverse=True)
            owners = torch.arange(len(self.context_users), device=ranks.device).repeat_interleave(self.offsets.diff())
            self._keys = owners * (len(self._clock) + 1) + ranks
        return self._clock, self._keys

    def get_extra_state(self) -> dict[str, Any]:
        """The rules, as plain values, for the checkpoint."""
        return self.visibility.plain()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over the rules of a checkpoint."""
        self.visibility = Visibility(**state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Older checkpoints hold next_times, which follow from the rest, and no words.
        state_dict.pop(f"{prefix}next_times", None)
        state_dict.setdefault(f"{prefix}words", self.words.new_zeros(0))
        self._next_times = self._clock = self._keys = None
        for name, buffer in list(self.named_buffers(recurse=False)):
            stored = state_dict.get(prefix + name)
            if stored is not None:
                setattr(self, name, torch.empty_like(stored, device=buffer.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def rows_of(self, users: Tensor) -> Tensor:
        """``int64`` rows of the bank of context users ``users``, in their order."""
        ranks = torch.searchsorted(self.context_users, users)
        if (
            (ranks == len(self.context_users)) | (self.context_users[ranks.clamp(max=self.n_users - 1)] != users)
        ).any():
            raise ValueError("users must be context users, got one that is not")
        return ranges(self.offsets[ranks], self.offsets[ranks + 1] - self.offsets[ranks])

    @property
    def n_users(self) -> int:
        """n, the number of context users."""
        return len(self.context_users)

    def before(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        """Last admissible row of each context user at each moment.

        Args:
            moments: ``(Q,) int64``, lag already taken off.

        Returns:
            ``(Q, n) int64`` rows, -1 where the user has none, and ``(Q, n) bool`` whether it has one.
        """
        clock, keys = self._searched()
        ranks = torch.searchsorted(clock, moments.contiguous(), right=self.visibility.inclusive)
        # queries of one moment share the search
        ranks, place = torch.unique(ranks, return_inverse=True)
        owners = torch.arange(self.n_users, device=ranks.device) * (len(clock) + 1)
        rows = torch.searchsorted(keys, owners + ranks.unsqueeze(1)) - 1
        exists = rows >= self.offsets[:-1]
        return torch.where(exists, rows, -1)[place], exists[place]

    def context(
        self, query_times: Tensor, query_users: Tensor, layout: Layout = "auto", states: Tensor | None = None
    ) -> Context:
        """What queries see.

        Args:
            query_times: ``(Q,) int64``.
            query_users: ``(Q,) int64``, -1 for somebody who is not in the table.
            layout: ``"gathered"``: as many rows a query as context users; ``"shared"``: all queries share the rows
                whose interval meets the span of the batch, under a mask; ``"auto"``: whichever moves fewer bytes.
                A state that is not finite and that only some queries may see spoils those only where gathered.
            states: ``(E_C, d)`` instead of those kept, with gradient where they have one.

        Raises:
            ValueError: If shapes differ, the layout is unknown, or a user's group or word is not known.
        """
        if query_times.ndim != 1 or query_times.shape != query_users.shape:
            shapes = f"{tuple(query_times.shape)} and {tuple(query_users.shape)}"
            raise ValueError(f"query_times and query_users must both have shape (Q,), got {shapes}")
        if layout not in ("auto", "shared", "gathered"):
            raise ValueError(f"layout must be 'auto', 'shared' or 'gathered', got {layout!r}")
        for known in (self.groups, self.words):
            if len(known) and len(query_users) and int(query_users.max()) >= len(known):
                raise ValueError(f"query users must be below {len(known)}, got {int(query_users.max())}")
        times, users = query_times.to(self.times.device), query_users.to(self.times.device)
        table = self.states if states is None else states
        if not len(self.times) or not len(times):
            return self._nothing(times, table)
        if layout == "gathered":
            return self._gathered(times, users, table)
        moments = self.visibility.moments(times)
        ends, exist = self.before(torch.stack([moments.min(), moments.max()]))
        first = torch.where(exist[0], ends[0], self.offsets[:-1])
        counts = torch.where(exist[1], ends[1] + 1 - first, 0)
        n_shared = int(counts.sum())
        if layout == "auto":
            row_bytes = table.shape[1] * table.element_size()
            n_gathered = min(self.n_users, self.visibility.max_context or self.n_users)
            shared_bytes = n_shared * (row_bytes + CELL_BYTES * len(times))
            if n_gathered * len(times) * (row_bytes + CELL_BYTES) < shared_bytes:
                return self._gathered(times, users, table)
        return self._shared(times, users, table, ranges(first, counts)) if n_shared else self._nothing(times, table)

    def _nothing(self, times: Tensor, table: Tensor) -> Context:
        """One row that nobody sees, so that no reduction meets an empty axis."""
        seen = torch.zeros(len(times), 1, dtype=torch.bool, device=times.device)
        return Context(table.new_zeros(1, table.shape[1]), None, seen, seen.float(), times.new_full((1,), -1))

    def _shared(self, times: Tensor, users: Tensor, table: Tensor, rows: Tensor) -> Context:
        start, end = self.times[rows], self.next_times[rows]
        moments = self.visibility.moments(times).unsqueeze(1)
        if self.visibility.inclusive:
            seen = (start <= moments) & (moments < end)
        else:
            seen = (start < moments) & (moments <= end)
        owners = self.users[rows]
        seen = self.visibility.allowed(seen, start, owners, times, users, self.groups)
        best = self.visibility.best(seen, start, owners, times, users, self.words)
        if best is not None:
            seen = seen & torch.zeros_like(seen).scatter(1, best, True)
        ages = torch.where(seen, days(times.unsqueeze(1) - start), 0)
        return Context(table.index_select(0, rows), None, seen, ages, owners)

    def _gathered(self, times: Tensor, users: Tensor, table: Tensor) -> Context:
        rows, exists = self.before(self.visibility.moments(times))
        start = self.times[rows.clamp(min=0)]  # arbitrary where there is none
        owners = self.context_users.expand_as(rows)
        seen = self.visibility.allowed(exists, start, owners, times, users, self.groups)
        best = self.visibility.best(seen, start, owners, times, users, self.words)
        if best is not None:
            rows, start, owners, seen = (each.gather(1, best) for each in (rows, start, owners, seen))
        return gathered_context(table, rows, seen, torch.where(seen, days(times.unsqueeze(1) - start), 0), owners)
