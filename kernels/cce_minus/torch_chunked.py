"""Forward and backward of CCE- in chunks of positions and negatives, on any device PyTorch runs on.

For a position with target y, logits z, kept negatives k (those that differ from y) and r rejected ones,

    a_k    = -log q_k + log(1 - q_y) - log(K - r)        "logq" and "improved_logq"; 0 for "none"
    neg    = log sum_k exp(z_k + a_k)
    margin = neg - z+
    loss   = log(1 + exp(margin)),   lse = z+ + loss

The part of a_k that is one number for the row, `log_scale`, is added to `neg` once all columns have been seen,
because r is known only then. "classic_logq" rejects nothing, takes a_k = -log q_k - log K and adds a = -log q_y - log K
to z+ as well. With upstream gradients g of the loss and h of the lse,

    p_k = exp(z_k - log q_k - shift),   shift = lse - log_scale,   p+ = sigmoid(-margin),   p+ - 1 = -sigmoid(margin)
    d_e   = sum_k (g + h) p_k c_k + (g (p+ - 1) + h p+) c_y
    d_C_j = the same weights times e, summed over all places where item j occurs

A row whose draws were all rejected has neg = -inf, hence loss 0, lse = z+ and no gradient of the loss. In any other a
z+ of +inf or NaN makes the loss NaN, and of -inf +inf.

Nothing larger than a block is ever kept: ids are drawn, and logits computed, once more in the backward pass.

Source: arXiv 2509.09682 for the loss, with the correction log(V - 1) - log(K - r) where its release divides by K + 1
and keeps rejected draws; arXiv 2507.09331 for "improved_logq".

Letters: N positions, D width, V items, K negatives, M positions as given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.cce_minus.arguments import LossRows
from kernels.cce_minus.candidate_rows import (
    CandidateRows,
    ConsecutiveRows,
    GatheredRows,
    SparseRows,
    add_rows_,
    sparse_rows_work,
)

# Bytes of temporaries of one block: enough to hide the cost of calling operators, and, for the sparse gradient, to
# visit each item's row once; on a GPU, to fill the chip.
GATHERED_BLOCK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
SPARSE_BLOCK_BYTES = 64 << 20
SPARSE_BYTES_PER_PAIR = 56  # ids, logits, weights, and the sort's values, order and scratch
# Candidates of a block that many positions share: enough for a matrix product to be efficient.
SHARED_COLUMNS = 4096


class Forward(NamedTuple):
    """What the forward pass returns per kept position, all (N,) in the compute dtype.

    Args:
        loss: Reported value.
        lse: Log of the estimated denominator.
        margin: Log of the negatives' part of it, less the positive logit. Taken before large terms cancel.
        shift: What is subtracted from z_k - log q_k for the logarithm of a softmax weight.
    """

    loss: Tensor
    lse: Tensor
    margin: Tensor
    shift: Tensor


@dataclass(frozen=True, eq=False)
class _Block:
    """Positions start..stop-1, divided evenly among n_rows rows of negatives from first_row on."""

    start: int
    stop: int
    first_row: int
    n_rows: int


def compute_dtype(hidden: Tensor, table: Tensor) -> torch.dtype:
    """float64 if either input is, else float32: 16-bit inputs are multiplied and summed in 32 bits."""
    return torch.float64 if torch.float64 in (hidden.dtype, table.dtype) else torch.float32


def chunked_forward(hidden: Tensor, table: Tensor, rows: LossRows) -> Forward:
    """Loss and log-sum-exp of every kept position.

    Args:
        hidden: (M, D) positions as given, any floating dtype.
        table: (V, D) item table, any floating dtype.
        rows: Kept positions and their negatives.

    Returns:
        Four (N,) tensors.
    """
    dtype = compute_dtype(hidden, table)
    out = Forward(*(torch.empty(rows.n, dtype=dtype, device=hidden.device) for _ in Forward._fields))
    table = _usable_table(table, rows, dtype)
    row_blocks, columns = _plan(table, rows, dtype)
    for block in row_blocks:
        here = slice(block.start, block.stop)
        e = rows.select(hidden, block.start, block.stop).to(dtype)
        targets = rows.targets[here]
        positive = torch.linalg.vecdot(e, table.index_select(0, targets).to(dtype)) + _positive_shift(
            rows, targets, dtype
        )
        negative = torch.full_like(positive, -math.inf)
        n_kept = torch.zeros_like(targets)
        for first in range(0, rows.negatives.n_columns, columns):
            ids = _read_ids(rows, block, first, columns)
            candidates = _candidates(table, ids, rows, first, dtype)
            logits, rejected_rows = _masked_logits(candidates, e, ids, targets, rows)
            n_kept += logits.shape[1] - torch.bincount(rejected_rows, minlength=n_kept.shape[0])
            negative = torch.logaddexp(negative, torch.logsumexp(logits, -1))
        log_scale = _log_scale(rows, targets, n_kept, dtype)
        negative += log_scale
        margin = negative - positive
        gap = torch.logaddexp(margin, torch.zeros_like(margin))
        out.lse[here], out.shift[here] = positive + gap, positive + gap - log_scale
        # the log-sum-exp less the logit is inf - inf, which the margin of -inf would call a loss of 0
        lost = (n_kept > 0) & (positive == math.inf)
        margin, gap = (x.masked_fill(lost, math.nan) for x in (margin, gap))
        out.margin[here] = margin
        if rows.correction == "improved_logq":
            # 1 - exp(z+) / Zhat = sigmoid(margin); at neg = -inf this is 0 times infinity, and means 0
            out.loss[here] = torch.where(negative == -math.inf, 0.0, torch.sigmoid(margin) * margin)
        else:
            out.loss[here] = gap
    return out


def chunked_backward(
    d_loss: Tensor,
    d_lse: Tensor,
    hidden: Tensor,
    table: Tensor,
    rows: LossRows,
    saved: Forward,
    *,
    needs_hidden: bool,
    needs_table: bool,
    deterministic: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients with respect to the positions and the item table.

    Args:
        d_loss: (N,) upstream gradient of the loss.
        d_lse: (N,) upstream gradient of the log-sum-exp.
        hidden: (M, D) positions as given.
        table: (V, D) item table.
        rows: Kept positions and their negatives.
        saved: Result of the forward pass.
        needs_hidden: Whether the first gradient is wanted.
        needs_table: Whether the second gradient is wanted.
        deterministic: Add rows of the table's gradient in a fixed order on CUDA too. On CPU the order is always fixed.

    Returns:
        (M, D) and (V, D) gradients in the dtypes of their inputs, None where not wanted. The second is summed in the
        compute dtype and cast once.
    """
    dtype = compute_dtype(hidden, table)
    d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needs_hidden else None
    d_table = torch.zeros(table.shape, dtype=dtype, device=table.device) if needs_table else None
    d_negative = d_loss + d_lse
    d_positive = d_lse * torch.sigmoid(-saved.margin) - d_loss * torch.sigmoid(saved.margin)
    table_dtype, table = table.dtype, _usable_table(table, rows, dtype)
    row_blocks, columns = _plan(table, rows, dtype)
    for block in row_blocks:
        here = slice(block.start, block.stop)
        e = rows.select(hidden, block.start, block.stop).to(dtype)
        targets, to_positive = rows.targets[here], d_positive[here, None]
        d_e = to_positive * table.index_select(0, targets).to(dtype) if needs_hidden else None
        if d_table is not None:
            add_rows_(d_table, targets, to_positive * e, deterministic)
        for first in range(0, rows.negatives.n_columns, columns):
            ids = _read_ids(rows, block, first, columns)
            candidates = _candidates(table, ids, rows, first, dtype)
            logits, _ = _masked_logits(candidates, e, ids, targets, rows)
            weights = logits.sub_(saved.shift[here, None]).exp_().mul_(d_negative[here, None])
            if d_e is not None:
                d_e += candidates.weighted_sum(weights)
            if d_table is not None:
                candidates.add_outer_(d_table, weights, e, deterministic)
        if d_hidden is not None and d_e is not None:
            d_hidden[here if rows.index is None else rows.index[here]] = d_e.to(hidden.dtype)
    return d_hidden, None if d_table is None else d_table.to(table_dtype)


def _plan(table: Tensor, rows: LossRows, dtype: torch.dtype) -> tuple[Iterator[_Block], int]:
    """Blocks of positions, and how many columns to take at a time, within the byte budgets."""
    n_columns, width = rows.negatives.n_columns, table.shape[1]
    per_position = 4 * width * dtype.itemsize / n_columns  # the position, its target's row and their gradients
    if _reads_in_place(table, rows, dtype):
        pairs = int(SPARSE_BLOCK_BYTES / (SPARSE_BYTES_PER_PAIR + per_position))
    else:
        # per pair: logits, their exponentials, ids and mask; per candidate: its row and that row's gradient
        per_pair = dtype.itemsize * (4 + 2 * width / rows.group)
        pairs = int(GATHERED_BLOCK_BYTES.get(table.device.type, 256 << 20) / (per_pair + per_position))
    columns = min(n_columns, pairs if rows.group == 1 else SHARED_COLUMNS)
    if columns < n_columns:
        columns = max(4, columns // 4 * 4)  # blocks of drawn ids start at whole counters
    return _blocks(rows.n, rows.group, max(1, pairs // columns)), columns


def _blocks(n: int, group: int, height: int) -> Iterator[_Block]:
    """Cut n positions into blocks of about `height`, of whole groups or inside one group.

    The last group may be short, and then has a block of its own, so that every block divides evenly.
    """
    if group > height:
        for first in range(0, n, group):
            stop = min(first + group, n)
            yield from (_Block(i, min(i + height, stop), first // group, 1) for i in range(first, stop, height))
        return
    whole, height = n - n % group, height - height % group
    for start in range(0, whole, height):
        stop = min(start + height, whole)
        yield _Block(start, stop, start // group, (stop - start) // group)
    if whole < n:
        yield _Block(whole, n, whole // group, 1)


def _read_ids(rows: LossRows, block: _Block, first: int, columns: int) -> Tensor:
    """Ids of a block of rows from column `first` on, (n_rows, at most `columns`) int32."""
    n_columns = min(columns, rows.negatives.n_columns - first)
    return rows.negatives.block(block.first_row, block.n_rows, first, n_columns)


def _candidates(table: Tensor, ids: Tensor, rows: LossRows, first: int, dtype: torch.dtype) -> CandidateRows:
    """The cheapest form of the products with the table's rows at `ids`."""
    if rows.is_exhaustive:
        return ConsecutiveRows(table, first, ids.shape[1], dtype)
    if _reads_in_place(table, rows, dtype):
        return SparseRows(table, ids)
    return GatheredRows(table, ids, dtype)


def _usable_table(table: Tensor, rows: LossRows, dtype: torch.dtype) -> Tensor:
    """On CPU, a table of another dtype or layout is converted whole where that copies less than gathering would."""
    if _suits_sparse(table, rows) and rows.n * rows.negatives.n_columns > rows.n_items:
        return table.to(dtype).contiguous()
    return table


def _reads_in_place(table: Tensor, rows: LossRows, dtype: torch.dtype) -> bool:
    return _suits_sparse(table, rows) and table.dtype == dtype and table.is_contiguous()


def _suits_sparse(table: Tensor, rows: LossRows) -> bool:
    fits = rows.group == 1 and not rows.is_exhaustive and rows.negatives.n_columns <= rows.n_items
    return fits and table.device.type == "cpu" and sparse_rows_work()


def _masked_logits(
    candidates: CandidateRows, e: Tensor, ids: Tensor, targets: Tensor, rows: LossRows
) -> tuple[Tensor, Tensor]:
    """Logits minus log q, (n, c), with -inf where the negative is the target, and the row of each such place."""
    logits = candidates.logits(e)
    grouped = logits.view(ids.shape[0], -1, ids.shape[1])
    if rows.log_q is not None and rows.correction != "none":
        grouped.sub_(rows.log_q.index_select(0, ids.view(-1)).to(logits.dtype).view(-1, 1, ids.shape[1]))
    if rows.keeps_collisions:
        return logits, logits.new_empty(0, dtype=torch.int64)
    # Collisions are rare: to list them is cheaper than to fill and to sum by a mask of the size of the logits.
    rejected = ids[:, None, :] == targets.to(torch.int32).view(ids.shape[0], -1, 1)
    row, column = rejected.view_as(logits).nonzero(as_tuple=True)
    logits[row, column] = -math.inf
    return logits, row


def _log_scale(rows: LossRows, targets: Tensor, n_kept: Tensor, dtype: torch.dtype) -> Tensor:
    """The correction's part that is one number per row; 0 where no negative is left. (n,)."""
    if rows.correction == "none":
        return torch.zeros(n_kept.shape, dtype=dtype, device=n_kept.device)
    scale = -n_kept.to(dtype).log()
    if rows.keeps_collisions:
        return scale + (math.log(rows.n_items) if rows.log_q is None else 0.0)
    if rows.log_q is None:
        scale += math.log(rows.n_items - 1)  # -log q + log(1 - q) for q = 1 / V
    else:
        # by expm1: with exp(), of 1 - q for a q near 1 only the rounding of q would be left
        scale += torch.log(-torch.expm1(rows.log_q.index_select(0, targets).to(dtype)))
    return torch.where(n_kept > 0, scale, 0.0)


def _positive_shift(rows: LossRows, targets: Tensor, dtype: torch.dtype) -> Tensor | float:
    """What "classic_logq" adds to the positive logit, -log(K q_y); 0 for the others."""
    if not rows.keeps_collisions:
        return 0.0
    log_k = math.log(rows.negatives.n_columns)
    if rows.log_q is None:
        return math.log(rows.n_items) - log_k
    return -rows.log_q.index_select(0, targets).to(dtype) - log_k
