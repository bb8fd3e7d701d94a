"""What is visible of others at a moment: rows of states, a mask, and ages.

Q queries, n rows a query, n_rows distinct rows, d width. Source: spec of arXiv 2502.10205, sections 3.1 and 4.2.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

FOREVER = 2**63 - 1
"""Time after every event, in microseconds."""

MICROSECONDS_PER_DAY = 86_400_000_000

GATHERED_BYTES = 2**20
"""Memory for gathered rows at a time; small, so that a chunk is read again from the cache it was written to."""

Events = dict[str, Tensor]
"""Flat events: ``categorical (E, F) int64``, ``numeric (E, M) float32``, ``times (E,) int64`` microseconds, not
decreasing within a user, ``offsets (U + 1,) int64``, and where users are grouped ``groups (U,) int64``, -1 for none;
split by time ``draws (U,) float64``, -1 for users who were there when training ended, a number in [0, 1) for others, or
the same bits as ``int64``, which no precision of a trainer rounds; ``words (U,) int64``, random ones of the users' own
ids, or none where row numbers may stand for them."""

Queries = dict[str, Any]
"""Queries of a target: ``users (Q,)``, ``times (Q,)``, ``labels (Q,) int64``, ``fold (Q,) int8`` (0 train, 1
validation, 2 test), and plain facts ``n_classes``, ``scope``, ``outcome_dependent``, ``description``."""


def days(microseconds: Tensor) -> Tensor:
    """``float32`` days of differences of times; the division is done in float64."""
    return (microseconds.double() / MICROSECONDS_PER_DAY).float()


def _chunks(rows: Tensor, table: Tensor) -> list[slice]:
    n_queries, n = rows.shape
    size = max(1, GATHERED_BYTES // max(1, n * table.shape[1] * table.element_size()))
    return [slice(start, start + size) for start in range(0, n_queries, size)]


def _dot(query: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    found = query.new_empty(rows.shape)
    for part in _chunks(rows, table):
        # index_select copies whole rows; indexing with a matrix of rows takes several times as long
        keys = table.index_select(0, rows[part].flatten()).view(*rows[part].shape, -1)
        found[part] = torch.matmul(keys, query[part].unsqueeze(2)).squeeze(2)
    return found


def _combine(weights: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    return embedding_bag(rows, table, mode="sum", per_sample_weights=weights.contiguous())


def _spread(weights: Tensor, vectors: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """Gradient of a table whose rows ``rows (Q, n)`` met ``vectors (Q, k)`` under ``weights (Q, n)``."""
    gradient = torch.zeros_like(table)
    for part in _chunks(rows, table):
        met = weights[part].unsqueeze(2) * vectors[part].unsqueeze(1)
        gradient.index_add_(0, rows[part].flatten(), met.flatten(0, 1))
    return gradient


class _GatheredDot(torch.autograd.Function):
    """Inner products with gathered rows; the rows are gathered again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, table: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(query, table, rows)
        with torch.autocast(query.device.type, enabled=False):
            return _dot(query, table, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        query, table, rows = ctx.saved_tensors
        for_query = _combine(gradient, table, rows) if ctx.needs_input_grad[0] else None
        return for_query, _spread(gradient, query, table, rows) if ctx.needs_input_grad[1] else None, None


class _GatheredSum(torch.autograd.Function):
    """Weighted sums of gathered rows, kept no longer than they are read."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, table: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(weights, table, rows)
        return _combine(weights, table, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weights, table, rows = ctx.saved_tensors
        for_weights = _dot(gradient.contiguous(), table, rows) if ctx.needs_input_grad[0] else None
        return for_weights, _spread(weights, gradient, table, rows) if ctx.needs_input_grad[1] else None, None


@dataclass(frozen=True)
class Context:
    """States of others that queries may look at.

    Two layouts share one interface: with ``rows`` each query has rows of its own; without, all queries share all rows
    of ``states`` and the mask alone differs (the interval mask of a time-sorted batch).

    Attributes:
        states: ``(n_rows, d) float``, distinct rows; those that nobody sees are zeros where rows are gathered.
        rows: ``(Q, n) int64`` into ``states``, a row of zeros where invisible; None if n = n_rows rows are shared.
        visible: ``(Q, n) bool``.
        ages: ``(Q, n) float32`` days since the event behind the state, 0 where invisible.
        users: ``(Q, n) int64``, or ``(n,)`` where rows are shared.
    """

    states: Tensor
    rows: Tensor | None
    visible: Tensor
    ages: Tensor
    users: Tensor

    def dot(self, query: Tensor, keys: Tensor) -> Tensor:
        """``(Q, n)`` inner products of ``query (Q, r)`` with the keys ``(n_rows, r)`` of each query's rows.

        Gathered keys are never held all at once, neither now nor for the backward pass.
        """
        if self.rows is None:
            return query @ keys.T
        dtype = torch.promote_types(query.dtype, keys.dtype)
        return _GatheredDot.apply(query.to(dtype), keys.to(dtype), self.rows)

    def combine(self, weights: Tensor, values: Tensor) -> Tensor:
        """``(Q, k)`` sums of values ``(n_rows, k)`` under weights ``(Q, n)``, which are 0 where nothing is visible."""
        if self.rows is None:
            return weights @ values
        dtype = torch.promote_types(weights.dtype, values.dtype)
        return _GatheredSum.apply(weights.to(dtype), values.to(dtype), self.rows)

    def gather(self, values: Tensor) -> Tensor:
        """``(Q, n, k)`` values of each query's rows, ``(1, n, k)`` where rows are shared."""
        return values.unsqueeze(0) if self.rows is None else values[self.rows]
