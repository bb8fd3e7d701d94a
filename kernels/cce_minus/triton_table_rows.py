"""Kernels that sum rows into the table's gradient after a sort by item: no contention, or a fixed order.

Positions are rounded to DOT as they were for the products of the forward pass.

Letters: D width, W width of a block of D, V items, S sorted entries.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cce_minus.triton_rows import element_offsets, upstream


@triton.jit(do_not_specialize=["n_entries"])
def add_positives_kernel(
    hidden, stride_hm, stride_hd, sorted_targets, order, index, d_loss, d_lse, margin, d_table, n_items, n_entries,
    D: tl.constexpr, DOT: tl.constexpr, RUN: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Add each position's gradient to its target's row, one atomic row-add per run of equal targets.

    A program walks over RUN positions sorted by target. A popular item meets N / RUN adds, not N. Entries that are not
    positions carry the target V and end the walk.
    """
    n_blocks: tl.constexpr = (D + W - 1) // W
    block = tl.program_id(0).to(tl.int64)
    d = (block % n_blocks).to(tl.int32) * W + tl.arange(0, W)
    start = block // n_blocks * RUN
    row = tl.zeros((W,), tl.float32)
    for at in range(start, tl.minimum(start + RUN, n_entries)):
        item = tl.load(sorted_targets + at)
        if item < n_items:
            place = tl.load(index + tl.load(order + at))
            _, weight = upstream(d_loss, d_lse, margin, place, place >= 0)
            e = tl.load(hidden + place * stride_hm + d.to(tl.int64) * stride_hd, mask=d < D, other=0.0)
            row += weight * e.to(DOT).to(tl.float32)
            ends = at + 1 == tl.minimum(start + RUN, n_entries)
            following = tl.load(sorted_targets + at + 1, mask=at + 1 < n_entries, other=-1)
            if ends or following != item:
                tl.atomic_add(d_table + item.to(tl.int64) * D + d, row, mask=d < D, sem="relaxed")
                row = tl.zeros((W,), tl.float32)


@triton.jit(do_not_specialize=["first_row"])
def sum_rows_kernel(
    source, stride_sm, stride_sd, order, bounds, weights, index, d_table, first_row, entries_per_row,
    D: tl.constexpr, DOT: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_INDEX: tl.constexpr,
    B: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Add to each item's row the weighted source rows of its entries, in the order of the sort: no atomics.

    Entries bounds[v]..bounds[v + 1] - 1 of `order` belong to item v. Entry o reads row o // entries_per_row of the
    source, counted from first_row and looked up in `index` where there is one. One program owns one row of the
    gradient.
    """
    n_blocks: tl.constexpr = (D + W - 1) // W
    block = tl.program_id(0).to(tl.int64)
    item = block // n_blocks
    d = (block % n_blocks).to(tl.int32) * W + tl.arange(0, W)
    start, stop = tl.load(bounds + item), tl.load(bounds + item + 1)
    if start >= stop:
        return
    total = tl.zeros((W,), tl.float32)
    for first in range(start, stop, B):
        at = first + tl.arange(0, B)
        valid = at < stop
        entry = tl.load(order + at, mask=valid, other=0)
        row = first_row + entry // entries_per_row
        if HAS_INDEX:
            row = tl.load(index + row, mask=valid, other=0)
        mask = valid[:, None] & (d < D)[None, :]
        values = tl.load(source + element_offsets(row, d, stride_sm, stride_sd), mask=mask, other=0.0)
        values = values.to(DOT).to(tl.float32)
        if HAS_WEIGHTS:
            values = values * tl.load(weights + entry, mask=valid, other=0.0)[:, None]
        total += tl.sum(values, 0)
    pointers = d_table + item * D + d
    tl.store(pointers, tl.load(pointers, mask=d < D, other=0.0) + total, mask=d < D)
