# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"
# The parameters of a device function are tensors, pointers or numbers, as each call makes them.
"""Kernels of the fused score-and-top-k: no score leaves the program that computes it unless it beats the k-th best.

A program owns B users and one split of the catalogue. Tile by tile it computes B x C scores and compares them with each
user's floor, the k-th best score so far. What is above goes, as a key, to the user's candidates in global memory. When
these would overflow, seen items among them are dropped by binary search, the rest is sorted and merged into the user's
best list, and the floor rises. Ids ascend within a split, so a later score equal to the floor always loses, and
comparing scores is exact. A second kernel merges the splits of each user.

Letters: B users and C items of a tile, W width of a block of D, L = 2^LOG_L entries of a list, k places.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.top_k.triton_sorted_keys import (
    NO_KEY,
    are_numbers,
    encode_keys,
    key_ids,
    key_scores,
    merge_descending,
    sort_ascending,
)


@triton.jit
def _drop_seen(keys, user, seen, seen_offsets, n_items):
    """Keys with those of the user's seen items replaced; a NaN stays, to be reported whatever was seen.

    `seen` holds user * V + item in ascending order, so the user's part is a sorted list.
    """
    begin = tl.load(seen_offsets + user)
    end = tl.load(seen_offsets + user + 1)
    wanted = user * n_items + key_ids(keys)
    real = are_numbers(keys)
    step = tl.full((), 1, tl.int64)
    while step * 2 <= end - begin:
        step = step * 2
    place = tl.zeros_like(keys) + begin
    while step > 0:
        inside = real & (place + step <= end)
        below = tl.load(seen + place + step - 1, mask=inside, other=0) < wanted
        place = tl.where(inside & below, place + step, place)
        step = step // 2
    inside = real & (place < end)
    found = tl.load(seen + place, mask=inside, other=-1) == wanted
    return tl.where(inside & found, NO_KEY, keys)


@triton.jit
def _load_states(states, users, valid, d, stride_sb, stride_sd, D: tl.constexpr, DOT: tl.constexpr):
    mask = valid[:, None] & (d < D)[None, :]
    return tl.load(states + users[:, None] * stride_sb + d[None, :] * stride_sd, mask=mask, other=0.0).to(DOT)


@triton.jit
def _load_items(table, columns, inside, d, stride_tv, stride_td, D: tl.constexpr, DOT: tl.constexpr):
    mask = (d < D)[:, None] & inside[None, :]
    return tl.load(table + columns[None, :] * stride_tv + d[:, None] * stride_td, mask=mask, other=0.0).to(DOT)


@triton.jit(do_not_specialize=["first_user", "n_users", "n_items", "tiles_per_split", "k"])
def score_kernel(
    states, stride_sb, stride_sd, table, stride_tv, stride_td, seen, seen_offsets, lists, counts,
    first_user, n_users, n_items, tiles_per_split, k,
    D: tl.constexpr, HAS_SEEN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    B: tl.constexpr, C: tl.constexpr, W: tl.constexpr, L: tl.constexpr, LOG_L: tl.constexpr,
):  # fmt: skip
    """Fill the best list, the candidates and their number of B users in one split of the catalogue."""
    n_user_blocks = tl.cdiv(n_users, B)
    program = tl.program_id(0)
    first_row = program % n_user_blocks * B
    split = (program // n_user_blocks).to(tl.int64)
    lane = tl.arange(0, B)
    valid = first_row + lane < n_users
    users = (first_user + first_row + lane).to(tl.int64)
    items = tl.cast(n_items, tl.int64)
    first = split * tiles_per_split * C
    last = tl.minimum(first + tl.cast(tiles_per_split, tl.int64) * C, items)
    counts += split * n_users + first_row
    lists += (split * n_users + first_row) * (2 * L)
    slots = tl.arange(0, L)
    for row in range(B):
        if first_row + row < n_users:
            tl.store(lists + row * (2 * L) + slots, tl.full((L,), NO_KEY, tl.int64))

    d = tl.arange(0, W).to(tl.int64)  # a table held by columns has a stride of V
    columns = first + tl.arange(0, C)
    if D <= W:
        e = _load_states(states, users, valid, d, stride_sb, stride_sd, D, DOT)
        c = _load_items(table, columns, columns < last, d, stride_tv, stride_td, D, DOT)
    floor = tl.full((B,), -float("inf"), tl.float32)
    count = tl.zeros((B,), tl.int32)
    for _ in range(tl.cdiv(tl.maximum(last - first, 0), C).to(tl.int32)):
        scores = tl.zeros((B, C), tl.float32)
        inside = columns < last
        if D <= W:
            scores = tl.dot(e, c, scores, input_precision=PRECISION)
            # on its way while the scores at hand are looked through
            c = _load_items(table, columns + C, columns + C < last, d, stride_tv, stride_td, D, DOT)
        else:
            for start in range(0, D, W):
                e = _load_states(states, users, valid, start + d, stride_sb, stride_sd, D, DOT)
                c = _load_items(table, columns, inside, start + d, stride_tv, stride_td, D, DOT)
                scores = tl.dot(e, c, scores, input_precision=PRECISION)
        # not "greater", so that a NaN passes too and comes out first
        above = ~(scores <= floor[:, None]) & valid[:, None] & inside[None, :]
        # counted in fp32, or LLVM makes a bit set of the booleans and counts it through local memory
        new = tl.sum(above.to(tl.float32), 1)
        if tl.max(new, 0) > 0:
            slot = (lane * (2 * L) + (L - 1) + count)[:, None] + tl.cumsum(above.to(tl.int32), 1)
            tl.store(lists + slot, encode_keys(scores, columns[None, :]), mask=above)
            count += new.to(tl.int32)
            full = (count > L - C).to(tl.int32)  # the next tile might not fit
            if tl.max(full, 0) > 0:
                tl.debug_barrier()  # candidates were stored by other threads
                for row in range(B):
                    if tl.sum(tl.where(lane == row, full, 0), 0) > 0:
                        own = lists + row * (2 * L) + slots
                        filled = slots < tl.sum(tl.where(lane == row, count, 0), 0)
                        candidates = tl.load(own + L, mask=filled, other=NO_KEY)
                        if HAS_SEEN:
                            user = tl.cast(first_user + first_row + row, tl.int64)
                            candidates = _drop_seen(candidates, user, seen, seen_offsets, items)
                        best = merge_descending(tl.load(own), sort_ascending(candidates, LOG_L), LOG_L)
                        tl.store(own, best)
                        kth = key_scores(tl.sum(tl.where(slots == k - 1, best, 0), 0))
                        floor = tl.where(lane == row, kth, floor)
                        count = tl.where(lane == row, 0, count)
                tl.debug_barrier()  # the candidates just read are written anew
        columns += C
    tl.store(counts + lane, count, mask=valid)


@triton.jit(do_not_specialize=["first_user", "n_users", "n_items", "n_splits", "k"])
def merge_kernel(
    lists, counts, seen, seen_offsets, scores, ids,
    first_user, n_users, n_items, n_splits, k,
    HAS_SEEN: tl.constexpr, L: tl.constexpr, LOG_L: tl.constexpr,
):  # fmt: skip
    """Merge the best lists and the candidates left over of all splits of one user, and decode the first k."""
    row = tl.program_id(0)
    user = (first_user + row).to(tl.int64)
    slots = tl.arange(0, L)
    best = tl.full((L,), NO_KEY, tl.int64)
    for split in range(n_splits):
        place = tl.cast(split, tl.int64) * n_users + row
        own = lists + place * (2 * L)
        merged = tl.load(own + (L - 1) - slots)
        if tl.max(merged, 0) > tl.min(best, 0):
            best = merge_descending(best, merged, LOG_L)
        count = tl.load(counts + place)
        if count > 0:
            candidates = tl.load(own + L + slots, mask=slots < count, other=NO_KEY)
            if HAS_SEEN:
                candidates = _drop_seen(candidates, user, seen, seen_offsets, tl.cast(n_items, tl.int64))
            if tl.max(candidates, 0) > tl.min(best, 0):
                best = merge_descending(best, sort_ascending(candidates, LOG_L), LOG_L)
    out = user * k + slots
    tl.store(scores + out, key_scores(best), mask=slots < k)
    tl.store(ids + out, tl.where(best == NO_KEY, -1, key_ids(best)), mask=slots < k)
