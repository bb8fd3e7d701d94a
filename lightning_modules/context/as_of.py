"""Arithmetic of as-of look-ups: the last row before a moment, ranges of rows, the distinct rows of a batch.

E rows of a table, Q queries, n rows a query, d width. Source: spec of arXiv 2502.10205, sections 3 and 10.
"""

import torch
from torch import Tensor

from lightning_modules.context.visible import Context

GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it modulo 1 are far from each other."""


def sample_context_users(users: Tensor, n: int | None, seed: int) -> Tensor:
    """``n`` distinct users of ``users (U',) int64`` in rising order, all of them if ``n`` is None or not below U'.

    Args:
        users: Rows of users, each once.
        n: At least 1.
        seed: Of a generator of its own: the same users and seed give the same draw.

    Raises:
        ValueError: If there are no users, one occurs twice, or ``n`` is below 1.
    """
    distinct = torch.unique(users)
    if not len(users) or len(distinct) != len(users):
        raise ValueError(f"context users must be distinct and at least one, got {len(users)}, {len(distinct)} distinct")
    if n is None or n >= len(users):
        return distinct
    if n < 1:
        raise ValueError(f"n_context_users must be at least 1, got {n}")
    # on the CPU, so that the draw is the same on every device
    drawn = torch.randperm(len(users), generator=torch.Generator().manual_seed(seed))[:n]
    return distinct[drawn.sort().values.to(distinct.device)]


def drawn_context_users(users: Tensor, n: int | None, seed: int, draws: Tensor | None) -> Tensor:
    """As :func:`sample_context_users`, but whom it draws does not depend on users who come later.

    ``n`` are drawn of those who were there when training ended; who comes later joins at the same rate, each by a
    number of its own. A draw of ``n`` among all users would move with everybody who joins after a query.

    Args:
        users: Rows of users, each once.
        n: At least 1, or None for all.
        seed: Of both draws.
        draws: ``(U,) float64``, or their bits as ``int64``, for all users: -1 for those who were there, a number in
            [0, 1) for the others; None is nobody later.
    """
    if draws is None or n is None:
        return sample_context_users(users, n, seed)
    later = (draws.view(torch.float64) if draws.dtype == torch.int64 else draws).to(users.device)[users]
    known = users[later < 0]
    if not len(known):
        return sample_context_users(users, n, seed)
    chosen = sample_context_users(known, n, seed)
    turned = (later + seed * GOLDEN) % 1  # another seed lets others in
    joining = users[(later >= 0) & (turned < len(chosen) / len(known))]
    return torch.cat([chosen, joining]).sort().values


def last_before(times: Tensor, first: Tensor, stop: Tensor, moments: Tensor, *, inclusive: bool = False) -> Tensor:
    """``(Q,) int64`` last row of ``first <= row < stop`` with ``times[row] < moment``, ``first - 1`` where none is.

    A bisection of all ranges at once, with no index to build: O(Q log of the longest range).

    Args:
        times: ``(E,) int64``, not decreasing within a range.
        first: ``(Q,) int64``.
        stop: ``(Q,) int64``.
        moments: ``(Q,) int64``.
        inclusive: ``times[row] <= moment`` instead.
    """
    low, high = first.clone(), stop.clone()
    longest = int((stop - first).max()) if len(first) else 0
    for _ in range(longest.bit_length()):
        middle = (low + high) // 2
        open_ = low < high
        found = times[torch.where(open_, middle, 0)]
        before = open_ & ((found <= moments) if inclusive else (found < moments))
        low = torch.where(before, middle + 1, low)
        high = torch.where(open_ & ~before, middle, high)
    return low - 1


def ranges(first: Tensor, counts: Tensor) -> Tensor:
    """``first[0], first[0] + 1, ...``: ``counts[i]`` integers from ``first[i]`` on, one range after the other."""
    behind = counts.cumsum(0) - counts
    return torch.arange(int(counts.sum()), device=first.device) + (first - behind).repeat_interleave(counts)


def gathered_context(table: Tensor, rows: Tensor, seen: Tensor, ages: Tensor, owners: Tensor) -> Context:
    """A context of the rows of a table that queries see, each row once, and a row of zeros for what they do not.

    A row that is not seen is never read: what lies in the future cannot reach a query, not even as 0 * NaN.
    """
    used = torch.zeros(len(table), dtype=torch.bool, device=rows.device)
    used[rows[seen]] = True
    distinct = used.nonzero().squeeze(1)
    local = (used.cumsum(0) - 1)[rows.clamp(min=0)] if len(table) else rows
    # one gather, of some row twice whose second copy becomes the zeros: appending them would copy everything again
    if len(distinct):
        states = table.index_select(0, torch.cat([distinct, distinct[:1]]))
        states[-1] = 0
    else:
        states = table.new_zeros(1, table.shape[1])
    return Context(states, torch.where(seen, local, len(distinct)), seen, ages, owners)


def with_room(tensor: Tensor, n: int) -> Tensor:
    """The rows of a tensor in one of at least ``n`` rows, at least twice as many where there were too few; else itself.

    So that a row that is added costs O(row) on average.
    """
    if n <= len(tensor):
        return tensor
    grown = tensor.new_zeros(max(n, 2 * len(tensor)), *tensor.shape[1:])
    grown[: len(tensor)] = tensor
    return grown
