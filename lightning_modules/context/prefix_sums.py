"""Aggregates over all context users from running sums of changes of state, at a cost free of the number of users.

An event e of user v replaces v's state: the sum over users changes by h_e - h_prev(e), the count by 1 if e is v's
first. With all events in order of time, S(t) = sum of the changes with t_e < t, and

    mean            b = (S(t) - own) / (N(t) - [own exists])
    linear kernel   b = M^T f(q) / (s . f(q)),   M = sum_i f(X_i) X_i^T,   s = sum_i f(X_i)

Sums are kept every ``block`` events and the events since are replayed, so that little is stored beside the states. A
replay reads events before the query only: what comes later cannot change a bit of the answer. E_C events of the bank,
n users, Q queries, d width, r features. Source: spec of arXiv 2502.10205, sections 4.1.9 and 10.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from lightning_modules.context.as_of import ranges, with_room
from lightning_modules.context.bank import ContextBank
from lightning_modules.context.streaming import StreamingBank
from lightning_modules.context.timelines import Timeline

CHUNK_BYTES = 32 * 2**20
"""Memory for the float64 changes held at a time while sums are built."""

LEAST_OF_SUM, LEAST_OF_HISTORY = 1024, 8
"""Roundings of the sum before the query's own state is taken off, and of all that ever went in and out of it, that a
weight must be above for an average under it to have three digits. A state's features are computed when it comes and
again when it goes, in other company, where the last digit may be another; over a history such differences cancel."""


class PrefixSums:
    """Sums over the states of all users after every ``block`` events, in order of time.

    A streaming bank may get events after the sums were built: a look-up first adds the sums of blocks that were
    filled since, so that it answers what sums built anew would.

    Args:
        bank: Its states and times are shared, not copied.
        block: Events between two kept sums.

    Raises:
        ValueError: If ``block`` is below 1, the bank hides states by age, group or number, which a sum over all users
            cannot, or the events of a streaming bank came in another order than that of time.
    """

    def __init__(self, bank: ContextBank | StreamingBank, block: int) -> None:
        if block < 1:
            raise ValueError(f"block must be at least 1, got {block}")
        self.line = Timeline.of(bank)
        self.visibility = self.line.visibility
        self.block = block
        self.n_blocks = 0
        self._now: tuple[Tensor, ...] = ()

    @property
    def states(self) -> Tensor:
        """``(E_C, d)`` states that are summed, by row of the bank."""
        return self.line.states

    @property
    def n_bytes(self) -> int:
        """Bytes held beyond the raw events, which are the user and the time of each: the bank, its states, and sums."""
        own = (value for value in vars(self).values() if isinstance(value, Tensor))
        memory = [value.untyped_storage() for value in (*own, *self._now, *self.line.tensors())]
        held = {one.data_ptr(): one.nbytes() for one in memory}  # what both read is held once
        return sum(held.values()) - self.line.times.nbytes

    def _new_blocks(self) -> range:
        """Blocks that are full and have no sum yet."""
        self.line.refresh()
        return range(self.n_blocks, len(self.states) // self.block)


def _checked(times: Tensor, users: Tensor) -> None:
    if times.ndim != 1 or times.shape != users.shape:
        shapes = f"{tuple(times.shape)} and {tuple(users.shape)}"
        raise ValueError(f"query_times and query_users must both have shape (Q,), got {shapes}")


class PrefixMean(PrefixSums):
    """Exact mean of the states of all visible users, O(log E_C + block d) a query for any number of users.

    Kept sums are float64. The at most ``2 (block - 1)`` states replayed are added in the states' own dtype: with
    float32 states and |h| <= c an error of at most about ``2 block^2 c 2^-24 / N``, with float64 rounding alone.

    Args:
        bank: The context.
        block: Events between two kept sums; a sum takes ``2 / block`` of a float32 state for each event.
    """

    def __init__(self, bank: ContextBank | StreamingBank, block: int = 32) -> None:
        super().__init__(bank, block)
        self.sums = torch.zeros(1, bank.states.shape[1], dtype=torch.float64, device=bank.states.device)
        self._extend()

    @classmethod
    def build(cls, bank: ContextBank | StreamingBank, block: int = 32) -> "PrefixMean":
        """The sums of a bank."""
        return cls(bank, block)

    def _extend(self) -> None:
        new, states = self._new_blocks(), self.states
        self.sums = with_room(self.sums, new.stop + 1)
        step = max(1, CHUNK_BYTES // (8 * max(1, states.shape[1]) * self.block))
        for start in new[::step]:
            stop = min(start + step, new.stop)
            rows = self.line.rows(slice(start * self.block, stop * self.block)).view(-1, self.block)
            earlier = self.line.earlier(rows)
            replaced = torch.where((earlier >= 0).unsqueeze(2), states[earlier.clamp(min=0)], 0)
            changes = states[rows].double() - replaced.double()
            self.sums[start + 1 : stop + 1] = self.sums[start] + changes.sum(1).cumsum(0)
        self.n_blocks = new.stop

    def mean(self, query_times: Tensor, query_users: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over all users that a query sees.

        Args:
            query_times: ``(Q,) int64``.
            query_users: ``(Q,) int64``; users outside of the context have nothing to take off.

        Returns:
            ``(Q, d)`` means in the states' dtype, zeros where nobody is visible, and ``(Q,) int64`` numbers of users.

        Raises:
            ValueError: If shapes differ.
        """
        _checked(query_times, query_users)
        self._extend()
        moments = self.visibility.moments(query_times)
        n_events, n_users = self.line.positions(moments)
        n_events, place = torch.unique(n_events, return_inverse=True)
        own, found = self.line.hidden(moments, query_users)
        counts = n_users - found.long()
        sums = self._sums(n_events)[place]
        sums[found] -= self.states[own[found]].double()
        means = torch.where((counts > 0).unsqueeze(1), sums / counts.clamp(min=1).unsqueeze(1), 0)
        return means.to(self.states.dtype), counts

    def _sums(self, n_events: Tensor) -> Tensor:
        """``(P, d) float64`` sums over users after the first ``n_events`` events."""
        done = n_events // self.block
        n_replayed = n_events - done * self.block
        rows = self.line.rows(ranges(done * self.block, n_replayed))
        if not len(rows):
            return self.sums[done]
        # each event brings its state and, where there was one, takes the state before: + + - + - ...
        earlier, states = self.line.earlier(rows), self.states
        replaces = earlier >= 0
        width = 1 + replaces.long()
        begins = torch.cat([width.new_zeros(1), width.cumsum(0)])
        pairs = rows.repeat_interleave(width)
        old = torch.ones_like(pairs, dtype=torch.bool)
        old[begins[:-1]] = False
        pairs[old] = earlier[replaces]
        signs = torch.where(old, -1.0, 1.0).to(states)
        starts = begins[n_replayed.cumsum(0) - n_replayed]
        replayed = embedding_bag(pairs, states, starts, mode="sum", per_sample_weights=signs)
        return self.sums[done] + replayed.double()


class PrefixMoments(PrefixSums):
    """Linear-kernel average over all visible users, O(log E_C + block (r + d) + r d) a query for any number of users.

    The features are read at build: after they change the sums are built anew. Gradients reach the query's features,
    not those of the states. Sums are accumulated in float64 and kept in the states' dtype.

    Where features are so small that all of them round to 0, or so much smaller than those of the query's own state or
    of states that were replaced that their sum is what rounding left, a sum cannot tell: such queries are named.

    Args:
        bank: The context.
        features: f, ``(m, d) -> (m, r)``, not negative.
        block: Events between two kept sums; None for 8 r, with which the sums take 1/8 of a state for each event.
    """

    def __init__(
        self,
        bank: ContextBank | StreamingBank,
        features: Callable[[Tensor], Tensor],
        block: int | None = None,
    ) -> None:
        states = bank.states
        d = states.shape[1]
        with torch.no_grad():
            r = features(states.new_zeros(1, d)).shape[1]
        super().__init__(bank, 8 * r if block is None else block)
        self.features = features
        self.first_moments = states.new_zeros(1, r)
        self.second_moments = states.new_zeros(1, r, d)
        self.passed = states.new_zeros(1, r)  # features that went in or out
        self._now = tuple(torch.zeros_like(one[0], dtype=torch.float64) for one in self._kept())
        self._extend()

    @classmethod
    def build(
        cls,
        bank: ContextBank | StreamingBank,
        features: Callable[[Tensor], Tensor],
        block: int | None = None,
    ) -> "PrefixMoments":
        """The sums of a bank."""
        return cls(bank, features, block)

    def _kept(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.first_moments, self.second_moments, self.passed

    def _extend(self) -> None:
        new = self._new_blocks()
        kept = tuple(with_room(one, new.stop + 1) for one in self._kept())
        self.first_moments, self.second_moments, self.passed = kept
        for done in new:
            states, weighted = self._changes(done * self.block, (done + 1) * self.block)
            changes = weighted.sum(0), weighted.T @ states, weighted.abs().sum(0)
            for rows, now, change in zip(kept, self._now, changes, strict=True):
                now += change
                rows[done + 1] = now
        self.n_blocks = new.stop
        if not self.line.grows:
            self._now = ()  # no block follows

    def _changes(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """``(m, d)`` states that events start..stop bring and replace, ``(m, r)`` their features, + or -; float64."""
        rows = self.line.rows(slice(start, stop))
        states = self.states.index_select(0, torch.cat([rows, self.line.replaced(rows)]))
        with torch.no_grad():
            weighted = self.features(states).double()
        weighted[len(rows) :] *= -1
        return states.double(), weighted

    def lookup(self, query_features: Tensor, query_times: Tensor, query_users: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Average of all states that a query sees, weighted by f(X_i) . f(q).

        Args:
            query_features: ``(Q, r) float``, f(q).
            query_times: ``(Q,) int64``.
            query_users: ``(Q,) int64``.

        Returns:
            ``(Q, d)`` averages in the states' dtype, zeros where nobody is visible and where the sums cannot tell;
            ``(Q,) int64`` numbers of users; and ``(Q,) bool`` whether they cannot tell, so that rows must be read.

        Raises:
            ValueError: If shapes differ.
        """
        _checked(query_times, query_users)
        if query_features.shape != (len(query_times), self.first_moments.shape[1]):
            allowed = (len(query_times), self.first_moments.shape[1])
            raise ValueError(f"query_features must have shape {allowed}, got {tuple(query_features.shape)}")
        self._extend()
        bank_states = self.states
        moments = self.visibility.moments(query_times)
        n_events, n_users = self.line.positions(moments)
        own, found = self.line.hidden(moments, query_users)
        counts = n_users - found.long()
        query = query_features.double()
        above, below, passed = self._totals(query, n_events)
        rounded = torch.maximum(LEAST_OF_SUM * below, LEAST_OF_HISTORY * passed)
        own_states = bank_states.new_zeros(len(own), bank_states.shape[1])
        own_states[found] = bank_states[own[found]]
        with torch.no_grad():
            own_features = self.features(own_states).double()
        own_weight = torch.where(found, (own_features * query).sum(1), 0)
        above, below = above - own_weight.unsqueeze(1) * own_states.double(), below - own_weight
        told = below > torch.finfo(self.first_moments.dtype).eps * rounded  # false where anything is NaN
        averages = above / torch.where(told, below, 1).unsqueeze(1)
        seen = counts > 0
        return torch.where((seen & told).unsqueeze(1), averages, 0).to(bank_states.dtype), counts, seen & ~told

    def _totals(self, query: Tensor, n_events: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(Q, d)`` sums of f(X_i) . f(q) X_i, and ``(Q,)`` of f(X_i) . f(q) and of what came and went, float64.

        Queries with the same events behind them are replayed together, and only those: a state that one of them may
        not see never meets it.
        """
        by_events = n_events.argsort(stable=True)
        above, below = [query.new_zeros(0, self.states.shape[1])], [query.new_zeros(0)]
        replayed = [query.new_zeros(0)]
        for queries in by_events.split(torch.unique(n_events, return_counts=True)[1].tolist()):
            stop = int(n_events[queries[0]])
            done = stop // self.block
            part = query[queries]
            b, weight = part @ self.second_moments[done].double(), part @ self.first_moments[done].double()
            states, weighted = self._changes(done * self.block, stop)
            weights = part @ weighted.T
            b, weight = b + weights @ states, weight + weights.sum(1)
            above.append(b)
            below.append(weight)
            replayed.append(torch.linalg.vector_norm(weights.detach(), ord=1, dim=1))
        place = by_events.argsort()
        passed = (query.detach() * self.passed[n_events // self.block]).sum(1) + torch.cat(replayed)[place]
        return torch.cat(above)[place], torch.cat(below)[place], passed
