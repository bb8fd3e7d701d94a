"""The three products between a block of positions and the rows of the item table they are compared with.

With e the positions, R the candidate rows and P weights shaped like the logits, forward and backward are made of

    logits          Z = e R^T          (n, c)
    weighted_sum    d_e = P R          (n, D)
    add_outer_      d_C[ids] += P^T e

Letters: n positions of the block in g groups of equal size, c candidates of a group, D width, V items.
"""

from __future__ import annotations

import functools
import warnings
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

# Rows of the table's gradient that `SparseRows` sums at a time: small enough to be added while still in cache.
SEGMENT_BYTES = 4 << 20


class CandidateRows(Protocol):
    """Rows of the item table that a block of positions is compared with."""

    def logits(self, e: Tensor) -> Tensor:
        """Dot products of (n, D) positions with their c candidates, (n, c)."""

    def weighted_sum(self, p: Tensor) -> Tensor:
        """Sum over candidates of weight times row: (n, c) weights to (n, D)."""

    def add_outer_(self, d_table: Tensor, p: Tensor, e: Tensor, deterministic: bool) -> None:
        """Add weight times position to the candidates' rows of the (V, D) gradient.

        On CUDA rows that repeat are added in a fixed order only if `deterministic`; on CPU the order is always fixed.
        """


class GatheredRows:
    """Rows copied from the table in the compute dtype; any device, any sharing.

    Args:
        table: (V, D) item table of any floating dtype and strides.
        ids: (g, c) int32.
        dtype: Compute dtype.
    """

    def __init__(self, table: Tensor, ids: Tensor, dtype: torch.dtype) -> None:
        self.ids = ids.reshape(-1)
        self.rows = table.index_select(0, self.ids).to(dtype).view(*ids.shape, table.shape[1])  # (g, c, D)

    def logits(self, e: Tensor) -> Tensor:
        """See `CandidateRows`."""
        return torch.bmm(self._grouped(e), self.rows.mT).view(e.shape[0], -1)

    def weighted_sum(self, p: Tensor) -> Tensor:
        """See `CandidateRows`."""
        return torch.bmm(self._grouped(p), self.rows).view(p.shape[0], -1)

    def add_outer_(self, d_table: Tensor, p: Tensor, e: Tensor, deterministic: bool) -> None:
        """See `CandidateRows`."""
        d_rows = torch.bmm(self._grouped(p).mT, self._grouped(e)).view(-1, e.shape[1])
        add_rows_(d_table, self.ids, d_rows, deterministic)

    def _grouped(self, x: Tensor) -> Tensor:
        return x.view(self.rows.shape[0], -1, x.shape[1])


class ConsecutiveRows:
    """A slice of the table shared by all positions: dense products, nothing to gather or to scatter.

    Args:
        table: (V, D) item table.
        first: First row.
        n_rows: Number of rows c.
        dtype: Compute dtype.
    """

    def __init__(self, table: Tensor, first: int, n_rows: int, dtype: torch.dtype) -> None:
        self.span = slice(first, first + n_rows)
        self.rows = table[self.span].to(dtype)

    def logits(self, e: Tensor) -> Tensor:
        """See `CandidateRows`."""
        return e @ self.rows.T

    def weighted_sum(self, p: Tensor) -> Tensor:
        """See `CandidateRows`."""
        return p @ self.rows

    def add_outer_(self, d_table: Tensor, p: Tensor, e: Tensor, deterministic: bool) -> None:
        """See `CandidateRows`."""
        d_table[self.span].addmm_(p.T, e)


class SparseRows:
    """Candidates of single positions on CPU, read in place: no row of the table is ever copied.

    The logits are a dense product sampled at the pattern of a CSR matrix; both gradients are embedding bags, over
    the table for the positions and, with the pairs sorted by item, over the positions for the table. That sort
    turns n * c scattered adds of D numbers into sequential writes, in an order that does not depend on threads.

    Args:
        table: (V, D) contiguous float32 or float64 on CPU.
        ids: (n, c) int32 with c at most V: PyTorch caps the entries of a sparse matrix at its size.
    """

    def __init__(self, table: Tensor, ids: Tensor) -> None:
        self.table, self.ids = table, ids

    def logits(self, e: Tensor) -> Tensor:
        """See `CandidateRows`."""
        n, c = self.ids.shape
        pattern = torch.sparse_csr_tensor(
            torch.arange(0, n * c + 1, c, dtype=torch.int32),
            self.ids.view(-1),
            e.new_zeros(n * c),
            (n, self.table.shape[0]),
            check_invariants=False,  # rows repeat and mix their columns, which this product does not mind
        )
        return torch.sparse.sampled_addmm(pattern, e, self.table.T, beta=0.0).values().view(n, c)

    def weighted_sum(self, p: Tensor) -> Tensor:
        """See `CandidateRows`."""
        return F.embedding_bag(self.ids, self.table, mode="sum", per_sample_weights=p)

    def add_outer_(self, d_table: Tensor, p: Tensor, e: Tensor, deterministic: bool) -> None:
        """See `CandidateRows`."""
        sorted_ids, order = torch.sort(self.ids.view(-1), stable=True)
        items, counts = torch.unique_consecutive(sorted_ids, return_counts=True)
        ends = torch.zeros(items.shape[0] + 1, dtype=torch.int64)
        torch.cumsum(counts, 0, out=ends[1:])
        positions = torch.div(order, self.ids.shape[1], rounding_mode="floor")
        weights = p.view(-1).index_select(0, order)
        height = max(1, SEGMENT_BYTES // (e.shape[1] * e.element_size()))
        for first in range(0, items.shape[0], height):
            bounds = ends[first : first + height + 1]
            start, stop = int(bounds[0]), int(bounds[-1])
            d_rows = F.embedding_bag(
                positions[start:stop],
                e,
                bounds - start,
                mode="sum",
                per_sample_weights=weights[start:stop],
                include_last_offset=True,
            )
            d_table.index_add_(0, items[first : first + height], d_rows)


def add_rows_(table: Tensor, ids: Tensor, rows: Tensor, deterministic: bool) -> None:
    """Add rows to a table at ids that may repeat: table[ids[i]] += rows[i].

    On CPU `index_add_` walks the ids in order. On CUDA it adds atomically, in an order that changes from run to
    run; accumulating `index_put_` sorts the ids first.
    """
    if deterministic and table.is_cuda:
        table.index_put_((ids.to(torch.int64),), rows, accumulate=True)
    else:
        table.index_add_(0, ids, rows)


@functools.cache
def sparse_rows_work() -> bool:
    """Whether this build of PyTorch computes sampled products of CSR matrices on CPU.

    The probe also spends the warning, issued once per process, that sparse CSR tensors are in beta.
    """
    table, ids = torch.tensor([[2.0], [3.0], [5.0]]), torch.tensor([[1, 0, 1]], dtype=torch.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return SparseRows(table, ids).logits(torch.ones(1, 1)).tolist() == [[3.0, 2.0, 3.0]]
        except (NotImplementedError, RuntimeError):
            return False
