"""Kernels of shared negatives: a group of positions meets the same K rows, so the work is matrix products.

    forward          Z = E C^T (T x K),  online log-sum-exp,  direction = softmax(Z) C    one pass, as flash attention
    d_hidden         (g + h) direction + (g (p+ - 1) + h p+) c_y                           element by element
    d_table          Z again,  (weights)^T E (K x D),  one row-add per (segment, negative)

The direction, sum_k p_k c_k, is all that the gradient of the positions needs from the negatives; it is kept in fp32
from the forward pass, which saves a third pass over the pairs. A segment is a tile, or a part of a batch.

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
    product,
    upstream,
    weighted_product,
)


@triton.jit
def _load_rows(base, rows, first, stride_row, stride_column, valid, D: tl.constexpr, W: tl.constexpr):
    """Columns first..first + W - 1 of given rows, zero outside."""
    d = first + tl.arange(0, W)
    mask = valid[:, None] & (d < D)[None, :]
    return tl.load(base + element_offsets(rows, d, stride_row, stride_column), mask=mask, other=0.0)


@triton.jit(do_not_specialize=["group", "blocks_per_group"])
def tile_forward_kernel(
    hidden, stride_hm, stride_hd, table, stride_tv, stride_td, targets, index, count,
    stream, threshold, alias, given, stride_gr, stride_gk, log_q,
    loss, lse, margin, shift, direction,
    n_items, n_columns, group, blocks_per_group,
    D: tl.constexpr, SOURCE: tl.constexpr, CORRECTION: tl.constexpr, HAS_LOG_Q: tl.constexpr,
    NEEDS_DIRECTION: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, WEIGHTS: tl.constexpr,
    INTERPRETED: tl.constexpr, B: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Loss, log-sum-exp, margin and shift at the places of the kept positions, and their directions in group order.

    A program owns B positions of one group and one block of D of their direction.
    """
    n_blocks: tl.constexpr = (D + W - 1) // W if NEEDS_DIRECTION else 1
    block = tl.program_id(0).to(tl.int64)
    own = (block % n_blocks).to(tl.int32) * W
    block = block // n_blocks
    tile = block // blocks_per_group
    start = tile * group + block % blocks_per_group * B
    n = tl.minimum(tl.load(count), (tile + 1) * group)
    if start >= n:
        return
    position = start + tl.arange(0, B)
    valid = position < n
    place = tl.load(index + position, mask=valid, other=0)
    y = tl.load(targets + place, mask=valid, other=0).to(tl.int32)
    positive = tl.zeros((B,), tl.float32)
    for part in range(0, D, 16):  # in slices: two whole blocks in fp32 would not fit into registers
        e_part = _load_rows(hidden, place, part, stride_hm, stride_hd, valid, D, 16).to(DOT).to(tl.float32)
        c_part = _load_rows(table, y, part, stride_tv, stride_td, valid, D, 16).to(DOT).to(tl.float32)
        positive += tl.sum(e_part * c_part, 1)
    e = _load_rows(hidden, place, 0, stride_hm, stride_hd, valid, D, W).to(DOT)
    top = tl.full((B,), float("-inf"), tl.float32)
    total = tl.zeros((B,), tl.float32)
    n_kept = tl.zeros((B,), tl.int32)
    u = tl.zeros((B, W), tl.float32)
    row = tl.zeros((1,), tl.int64) + tile
    for column in range(0, n_columns, C):
        ids = negative_ids(
            stream, threshold, alias, given, stride_gr, stride_gk, row, column, n_columns, n_items, SOURCE, 1, C
        )
        ids = tl.reshape(ids, (C,))
        inside = column + tl.arange(0, C) < n_columns
        z = tl.zeros((B, C), tl.float32)
        if D > W:  # too wide to stay on chip
            for first in range(0, D, W):
                e_part = _load_rows(hidden, place, first, stride_hm, stride_hd, valid, D, W).to(DOT)
                c_part = _load_rows(table, ids, first, stride_tv, stride_td, inside, D, W).to(DOT)
                z = product(e_part, tl.trans(c_part), z, PRECISION, INTERPRETED)
        c = _load_rows(table, ids, own, stride_tv, stride_td, inside, D, W).to(DOT)
        if D <= W:
            z = product(e, tl.trans(c), z, PRECISION, INTERPRETED)
        if HAS_LOG_Q:
            z -= tl.load(log_q + ids)[None, :]
        kept = valid[:, None] & inside[None, :]
        if CORRECTION != CLASSIC_LOGQ:
            kept = kept & (ids[None, :] != y[:, None])
        n_kept += tl.sum(kept.to(tl.int32), 1)
        top, total, shrink, weights = add_to_sum(top, total, tl.where(kept, z, float("-inf")))
        if NEEDS_DIRECTION:
            u = weighted_product(weights, c, u * shrink[:, None], WEIGHTS, INTERPRETED)
    row_loss, row_lse, row_margin, row_shift = finish_rows(
        positive, top, total, n_kept, y, log_q, n_items, n_columns, CORRECTION, HAS_LOG_Q
    )
    if own == 0:
        tl.store(loss + place, row_loss, mask=valid)
        tl.store(lse + place, row_lse, mask=valid)
        tl.store(margin + place, row_margin, mask=valid)
        tl.store(shift + place, row_shift, mask=valid)
    if NEEDS_DIRECTION:
        # total counts exp(z - top): with p = exp(z - shift) what is missing is exp(top - shift)
        some = total != 0.0  # NaN stays NaN, as in `finish_rows`
        scale = tl.where(some, tl.exp(tl.where(some, top - row_shift, 0.0)), 0.0)
        d = own + tl.arange(0, W)
        mask = valid[:, None] & (d < D)[None, :]
        tl.store(direction + element_offsets(position, d, D, 1), u * scale[:, None], mask=mask)


@triton.jit(do_not_specialize=["n_positions"])
def tile_hidden_kernel(
    table, stride_tv, stride_td, targets, index, count, d_loss, d_lse, margin, direction, d_hidden, n_positions,
    D: tl.constexpr, DOT: tl.constexpr, B: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Gradient of the positions from their direction and their target's row."""
    n_blocks: tl.constexpr = (D + W - 1) // W
    block = tl.program_id(0).to(tl.int64)
    own = (block % n_blocks).to(tl.int32) * W
    position = block // n_blocks * B + tl.arange(0, B)
    valid = position < tl.minimum(tl.load(count), n_positions)
    place = tl.load(index + position, mask=valid, other=0)
    y = tl.load(targets + place, mask=valid, other=0)
    to_negatives, to_positive = upstream(d_loss, d_lse, margin, place, valid)
    c_y = _load_rows(table, y, own, stride_tv, stride_td, valid, D, W).to(DOT).to(tl.float32)
    u = _load_rows(direction, position, own, D, 1, valid, D, W)
    d = own + tl.arange(0, W)
    d_e = to_negatives[:, None] * u + to_positive[:, None] * c_y
    mask = valid[:, None] & (d < D)[None, :]
    tl.store(d_hidden + element_offsets(place, d, D, 1), d_e.to(d_hidden.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["group", "segment", "segments_per_group", "first_segment"])
def tile_table_kernel(
    hidden, stride_hm, stride_hd, table, stride_tv, stride_td, targets, index, count,
    stream, threshold, alias, given, stride_gr, stride_gk, log_q,
    d_loss, d_lse, margin, shift,
    d_table, row_ids, row_gradients,
    n_items, n_columns, group, segment, segments_per_group, first_segment,
    D: tl.constexpr, SOURCE: tl.constexpr, CORRECTION: tl.constexpr, HAS_LOG_Q: tl.constexpr,
    TABLE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, WEIGHTS: tl.constexpr,
    INTERPRETED: tl.constexpr, B: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Gradient of C rows of the table from one segment of positions, W columns of it.

    TABLE is "add" for one atomic row-add per (segment, negative), "list" to write ids and rows of segments from
    first_segment on for a summation in fixed order.
    """
    n_blocks: tl.constexpr = (D + W - 1) // W
    column_blocks = (n_columns + C - 1) // C
    block = tl.program_id(0).to(tl.int64)
    own = (block % n_blocks).to(tl.int32) * W
    block = block // n_blocks
    column = (block % column_blocks).to(tl.int32) * C
    local_segment = block // column_blocks
    at = first_segment + local_segment
    tile = at // segments_per_group
    start = tile * group + at % segments_per_group * segment
    stop = tl.minimum(tl.minimum(tl.load(count), (tile + 1) * group), start + segment)
    if start >= stop:
        return
    columns = column + tl.arange(0, C)
    inside = columns < n_columns
    row = tl.zeros((1,), tl.int64) + tile
    ids = negative_ids(
        stream, threshold, alias, given, stride_gr, stride_gk, row, column, n_columns, n_items, SOURCE, 1, C
    )
    ids = tl.reshape(ids, (C,))
    minus_log_q = tl.zeros((C,), tl.float32)
    if HAS_LOG_Q:
        minus_log_q -= tl.load(log_q + ids)
    c = _load_rows(table, ids, 0, stride_tv, stride_td, inside, D, W).to(DOT)
    d_c = tl.zeros((C, W), tl.float32)
    for first_position in range(start, stop, B):
        position = first_position + tl.arange(0, B)
        valid = position < stop
        place = tl.load(index + position, mask=valid, other=0)
        y = tl.load(targets + place, mask=valid, other=0).to(tl.int32)
        to_negatives, _ = upstream(d_loss, d_lse, margin, place, valid)
        row_shift = tl.load(shift + place, mask=valid, other=0.0)
        z = tl.zeros((C, B), tl.float32)
        if D > W:  # too wide to stay on chip
            for first in range(0, D, W):
                e_part = _load_rows(hidden, place, first, stride_hm, stride_hd, valid, D, W).to(DOT)
                c_part = _load_rows(table, ids, first, stride_tv, stride_td, inside, D, W).to(DOT)
                z = product(c_part, tl.trans(e_part), z, PRECISION, INTERPRETED)
        e = _load_rows(hidden, place, own, stride_hm, stride_hd, valid, D, W).to(DOT)
        if D <= W:
            z = product(c, tl.trans(e), z, PRECISION, INTERPRETED)
        kept = inside[:, None] & valid[None, :]
        if CORRECTION != CLASSIC_LOGQ:
            kept = kept & (ids[:, None] != y[None, :])
        exponent = tl.where(kept, z + minus_log_q[:, None] - row_shift[None, :], 0.0)
        weights = tl.where(kept, tl.exp(exponent), 0.0) * to_negatives[None, :]
        d_c = weighted_product(weights, e, d_c, WEIGHTS, INTERPRETED)
    # Drawn again: kept over the loop, the rows' addresses would take the registers of a quarter of d_c.
    ids = negative_ids(
        stream, threshold, alias, given, stride_gr, stride_gk, row, column, n_columns, n_items, SOURCE, 1, C
    )
    ids = tl.reshape(ids, (C,))
    d = own + tl.arange(0, W)
    mask = inside[:, None] & (d < D)[None, :]
    if TABLE == "add":
        tl.atomic_add(d_table + element_offsets(ids, d, D, 1), d_c, mask=mask, sem="relaxed")
    else:
        rows = local_segment * n_columns + columns
        tl.store(row_gradients + element_offsets(rows, d, D, 1), d_c, mask=mask)
        if own == 0:
            tl.store(row_ids + rows, ids, mask=inside)
