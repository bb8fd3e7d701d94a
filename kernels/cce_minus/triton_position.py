"""Kernels of per-position negatives: every position meets K rows of its own.

One program holds B positions on chip and walks over their columns in blocks. A block gathers B x C rows of the table,
once in the forward and once in the backward pass; ids are drawn where they are used. There is one multiplication per
number read, so tensor cores have nothing to offer and many rows in flight decide the speed.

    forward    z = e . c,  online log-sum-exp                                  gathers N K D
    backward   z again,  d_e in registers,  d_C by fp32 atomic row-adds        gathers N K D, adds N K D

Letters: B positions and C columns of a block, W width of a block of D, N kept positions, V items, K negatives.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cce_minus.triton_rows import (
    CLASSIC_LOGQ,
    add_to_sum,
    element_offsets,
    finish_rows,
    negative_ids,
    upstream,
)

_VARYING = ["first_position", "last_position"]


@triton.jit
def _logits(
    e, hidden_rows, stride_hd, table, stride_tv, stride_td, ids, read, valid,
    D: tl.constexpr, B: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Dot products of B positions with C rows each, (B, C) fp32, and the last block of rows read, (B, C, W)."""
    z = tl.zeros((B, C), tl.float32)
    c = tl.zeros((B, C, W), tl.float32)
    row_offsets = ids.to(tl.int64) * stride_tv
    for first in tl.static_range(0, D, W):
        d = first + tl.arange(0, W)
        inside = d < D
        if D > W:  # too wide to stay on chip
            e = tl.load(
                hidden_rows[:, None] + d[None, :].to(tl.int64) * stride_hd,
                mask=valid[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
        pointers = table + row_offsets[:, :, None] + d.to(tl.int64)[None, None, :] * stride_td
        c = tl.load(pointers, mask=read[:, :, None] & inside[None, None, :], other=0.0).to(tl.float32)
        z += tl.sum(e[:, None, :] * c, 2)
    return z, c


@triton.jit(do_not_specialize=_VARYING)
def position_forward_kernel(
    hidden, stride_hm, stride_hd, table, stride_tv, stride_td, targets, index, count,
    stream, threshold, alias, given, stride_gr, stride_gk, log_q,
    loss, lse, margin, shift,
    n_items, n_columns, first_position, last_position,
    D: tl.constexpr, SOURCE: tl.constexpr, CORRECTION: tl.constexpr, HAS_LOG_Q: tl.constexpr,
    B: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Loss, log-sum-exp, margin and shift of the kept positions, written at their places among the given ones."""
    start = first_position + tl.program_id(0).to(tl.int64) * B
    n = tl.minimum(tl.load(count), last_position)
    if start >= n:
        return
    row = start + tl.arange(0, B)
    valid = row < n
    place = tl.load(index + row, mask=valid, other=0)
    y = tl.load(targets + place, mask=valid, other=0).to(tl.int32)
    hidden_rows = hidden + place * stride_hm
    positive = tl.zeros((B,), tl.float32)
    e = tl.zeros((B, W), tl.float32)
    for first in tl.static_range(0, D, W):
        d = first + tl.arange(0, W)
        mask = valid[:, None] & (d < D)[None, :]
        e = tl.load(hidden_rows[:, None] + d[None, :].to(tl.int64) * stride_hd, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(table + element_offsets(y, d, stride_tv, stride_td), mask=mask, other=0.0).to(tl.float32)
        positive += tl.sum(e * c, 1)
    top = tl.full((B,), float("-inf"), tl.float32)
    total = tl.zeros((B,), tl.float32)
    n_kept = tl.zeros((B,), tl.int32)
    for column in range(0, n_columns, C):
        ids = negative_ids(
            stream, threshold, alias, given, stride_gr, stride_gk, row, column, n_columns, n_items, SOURCE, B, C
        )
        kept = valid[:, None] & (column + tl.arange(0, C) < n_columns)[None, :]
        z, _ = _logits(
            e, hidden_rows, stride_hd, table, stride_tv, stride_td, ids, kept, valid, D, B, C, W
        )  # fmt: skip
        if HAS_LOG_Q:
            z -= tl.load(log_q + ids, mask=kept, other=0.0)
        if CORRECTION != CLASSIC_LOGQ:
            kept = kept & (ids != y[:, None])
        n_kept += tl.sum(kept.to(tl.int32), 1)
        top, total, _, _ = add_to_sum(top, total, tl.where(kept, z, float("-inf")))
    row_loss, row_lse, row_margin, row_shift = finish_rows(
        positive, top, total, n_kept, y, log_q, n_items, n_columns, CORRECTION, HAS_LOG_Q
    )
    tl.store(loss + place, row_loss, mask=valid)
    tl.store(lse + place, row_lse, mask=valid)
    tl.store(margin + place, row_margin, mask=valid)
    tl.store(shift + place, row_shift, mask=valid)


@triton.jit(do_not_specialize=_VARYING)
def position_backward_kernel(
    hidden, stride_hm, stride_hd, table, stride_tv, stride_td, targets, index, count,
    stream, threshold, alias, given, stride_gr, stride_gk, log_q,
    d_loss, d_lse, margin, shift,
    d_hidden, d_table, pair_ids, pair_weights,
    n_items, n_columns, first_position, last_position,
    D: tl.constexpr, SOURCE: tl.constexpr, CORRECTION: tl.constexpr, HAS_LOG_Q: tl.constexpr,
    NEEDS_HIDDEN: tl.constexpr, TABLE: tl.constexpr,
    B: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Gradient of the positions, and of the table's rows at their negatives.

    TABLE is "add" for atomic row-adds into `d_table`, "list" to write the (id, weight) pairs of positions
    first_position..last_position - 1 for a summation in fixed order, "" where that gradient is not wanted. A program
    owns one block of D: a row wider than W is read once for each.
    """
    n_blocks: tl.constexpr = (D + W - 1) // W
    block = tl.program_id(0).to(tl.int64)
    start = first_position + block // n_blocks * B
    n = tl.minimum(tl.load(count), last_position)
    if start >= n:
        return
    own = (block % n_blocks).to(tl.int32) * W + tl.arange(0, W)
    row = start + tl.arange(0, B)
    valid = row < n
    place = tl.load(index + row, mask=valid, other=0)
    y = tl.load(targets + place, mask=valid, other=0).to(tl.int32)
    own_mask = valid[:, None] & (own < D)[None, :]
    hidden_rows = hidden + place * stride_hm
    e = tl.load(hidden_rows[:, None] + own[None, :].to(tl.int64) * stride_hd, mask=own_mask, other=0.0)
    e = e.to(tl.float32)
    to_negatives, to_positive = upstream(d_loss, d_lse, margin, place, valid)
    row_shift = tl.load(shift + place, mask=valid, other=0.0)
    c = tl.load(table + element_offsets(y, own, stride_tv, stride_td), mask=own_mask, other=0.0).to(tl.float32)
    d_e = to_positive[:, None] * c
    for column in range(0, n_columns, C):
        columns = column + tl.arange(0, C)
        ids = negative_ids(
            stream, threshold, alias, given, stride_gr, stride_gk, row, column, n_columns, n_items, SOURCE, B, C
        )
        read = valid[:, None] & (columns < n_columns)[None, :]
        z, rows = _logits(
            e, hidden_rows, stride_hd, table, stride_tv, stride_td, ids, read, valid, D, B, C, W
        )  # fmt: skip
        if HAS_LOG_Q:
            z -= tl.load(log_q + ids, mask=read, other=0.0)
        kept = read
        if CORRECTION != CLASSIC_LOGQ:
            kept = read & (ids != y[:, None])
        # the exponent of a dropped pair is not bounded by the row's log-sum-exp
        p = tl.where(kept, tl.exp(tl.where(kept, z - row_shift[:, None], 0.0)), 0.0)
        weights = p * to_negatives[:, None]
        own_offsets = own.to(tl.int64)[None, None, :]
        if D > W and NEEDS_HIDDEN:
            pointers = table + (ids.to(tl.int64) * stride_tv)[:, :, None] + own_offsets * stride_td
            rows = tl.load(pointers, mask=read[:, :, None] & (own < D)[None, None, :], other=0.0).to(tl.float32)
        if NEEDS_HIDDEN:
            d_e += tl.sum(weights[:, :, None] * rows, 1)
        if TABLE == "add":
            pointers = d_table + (ids.to(tl.int64) * D)[:, :, None] + own_offsets
            mask = kept[:, :, None] & (own < D)[None, None, :]
            tl.atomic_add(pointers, weights[:, :, None] * e[:, None, :], mask=mask, sem="relaxed")
        if TABLE == "list":  # noqa: SIM102 -- a constant, then a condition at run time
            if block % n_blocks == 0:
                pairs = element_offsets(row - first_position, columns, n_columns, 1)
                tl.store(pair_ids + pairs, tl.where(kept, ids, n_items), mask=read)
                tl.store(pair_weights + pairs, weights, mask=read)
    if NEEDS_HIDDEN:
        pointers = d_hidden + place[:, None] * D + own[None, :]
        tl.store(pointers, d_e.to(d_hidden.dtype.element_ty), mask=own_mask)
