"""What every CCE- kernel does with a row: draw its ids, finish its loss, weigh its logits. Device functions only.

Letters: B positions of a block, C columns of a block, D width, V items, K negatives.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Sources of ids
UNIFORM = tl.constexpr(0)
ALIAS = tl.constexpr(1)
GIVEN = tl.constexpr(2)
EVERY_ITEM = tl.constexpr(3)
# Corrections
LOGQ = tl.constexpr(0)
NONE = tl.constexpr(1)
IMPROVED_LOGQ = tl.constexpr(2)
CLASSIC_LOGQ = tl.constexpr(3)
# How fp32 softmax weights meet table rows in a matrix product
SPLIT_BF16 = tl.constexpr("split_bf16")


@triton.jit
def element_offsets(rows, columns, row_stride, column_stride):
    """Offsets in elements of `rows x columns`, in 64 bits: a table of 10 M x 256 has more than 2^31 of them."""
    return rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride


@triton.jit
def random_words(stream, rows, first_column, COIN: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """Philox words of B rows and C columns from `first_column` on, (B, C) uint32; see `philox.py` for the counters.

    The counter words are 32 bits wide: with 64-bit ones Triton would run another generator. Each counter gives the
    words of four columns, which are laid side by side.
    """
    # volatile, or the compiler would take a second drawing for the first and keep the ids in between
    seed = tl.load(stream, volatile=True)
    step_low, step_high = tl.load(stream + 1, volatile=True), tl.load(stream + 2, volatile=True)
    block = (first_column // 4 + tl.arange(0, C // 4)).to(tl.uint32)
    if COIN:
        block += tl.full((), 0x80000000, tl.uint32)
    zeros = tl.zeros((B, C // 4), tl.uint32)
    c0, c1 = block[None, :] + zeros, rows.to(tl.uint32)[:, None] + zeros
    c2, c3 = zeros + step_low.to(tl.uint32), zeros + step_high.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (B, C))


@triton.jit
def negative_ids(
    stream, threshold, alias, given, stride_gr, stride_gk, rows, first_column, n_columns, n_items,
    SOURCE: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Ids of B rows and C columns from `first_column` on, (B, C) int32 in [0, V), columns past the last included."""
    columns = first_column + tl.arange(0, C)
    inside = columns < n_columns
    if SOURCE == EVERY_ITEM:
        ids = tl.where(inside, columns, 0)[None, :] + tl.zeros((B, C), tl.int32)
    elif SOURCE == GIVEN:
        offsets = element_offsets(rows, columns, stride_gr, stride_gk)
        ids = tl.load(given + offsets, mask=inside[None, :], other=0).to(tl.int32)
    else:
        words = random_words(stream, rows, first_column, False, B, C)
        ids = tl.umulhi(words, tl.zeros((B, C), tl.uint32) + n_items.to(tl.uint32)).to(tl.int32)
        if SOURCE == ALIAS:
            coins = random_words(stream, rows, first_column, True, B, C)
            keep = coins < tl.load(threshold + ids).to(tl.uint32, bitcast=True)
            ids = tl.where(keep, ids, tl.load(alias + ids))
    return ids


@triton.jit
def log1p(x):
    """log(1 + x) without losing small x: the rounding error of 1 + x is divided out again."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def log1mexp(x):
    """log(1 - exp(x)) of x <= 0 without losing x near 0, where exp(x) rounds to a neighbour of 1.

    There 1 - exp(x) = (1 - u) x / log u with u = exp(x) as rounded: whatever its error is, log u has it too.
    """
    u = tl.exp(x)
    near = u > 0.5
    log_u = tl.log(tl.where(near & (u != 1.0), u, 0.5))
    rest = tl.where(u == 1.0, -x, (1.0 - u) * (x / log_u))
    return tl.where(near, tl.log(tl.where(near, rest, 1.0)), log1p(-u))


@triton.jit
def add_to_sum(top, total, z):
    """Online log-sum-exp: take a block of logits (B, C) into the running maximum and sum (B,)."""
    new_top = tl.maximum(top, tl.max(z, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # -inf minus -inf is NaN
    shrink = tl.exp(top - base)
    weights = tl.exp(z - base[:, None])
    return new_top, total * shrink + tl.sum(weights, 1), shrink, weights


@triton.jit
def finish_rows(
    positive, top, total, n_kept, y, log_q, n_items, n_columns, CORRECTION: tl.constexpr, HAS_LOG_Q: tl.constexpr
):
    """From the positive logit and the sum over negatives to what is reported and saved, all (B,) fp32.

    A positive logit of +inf leaves loss and margin no number, unless the row has no negatives.

    Returns:
        loss, lse, margin = neg - z+ (its sigmoid is 1 - p+), shift with p_k = exp(z_k - log q_k - shift).
    """
    kept = n_kept.to(tl.float32)
    if CORRECTION == NONE:
        log_scale = tl.zeros_like(positive)
    elif CORRECTION == CLASSIC_LOGQ:
        log_scale = tl.zeros_like(positive) - tl.log(tl.full((), n_columns, tl.float32))  # 1 comes as a constexpr
        if HAS_LOG_Q:
            positive += log_scale - tl.load(log_q + y)
        else:
            log_scale += tl.log(n_items.to(tl.float32))
            positive += log_scale
    else:
        if HAS_LOG_Q:
            log_rest = log1mexp(tl.load(log_q + y))
        else:
            log_rest = tl.zeros_like(positive) + tl.log((n_items - 1).to(tl.float32))
        log_scale = tl.where(n_kept > 0, log_rest - tl.log(tl.maximum(kept, 1.0)), 0.0)
    some = total != 0.0  # not > 0: a logit of NaN or inf makes the sum NaN, which is no row without negatives
    negative = tl.where(some, top + tl.log(tl.where(some, total, 1.0)) + log_scale, float("-inf"))
    margin = negative - positive
    gap = tl.maximum(margin, 0.0) + log1p(tl.exp(-tl.abs(margin)))
    lse = positive + gap
    # the log-sum-exp less the logit is inf - inf, which the margin of -inf would call a loss of 0
    lost = (n_kept > 0) & (positive == float("inf"))
    margin = tl.where(lost, float("nan"), margin)
    loss = tl.where(lost, float("nan"), gap)
    if CORRECTION == IMPROVED_LOGQ:
        loss = tl.where(some, tl.sigmoid(margin) * tl.where(some, margin, 0.0), 0.0)
    return loss, lse, margin, lse - log_scale


@triton.jit
def upstream(d_loss, d_lse, margin, place, valid):
    """Gradients of the negatives' terms (g + h) and of the positive logit g (p+ - 1) + h p+, both (B,)."""
    g = tl.load(d_loss + place, mask=valid, other=0.0)
    h = tl.load(d_lse + place, mask=valid, other=0.0)
    x = tl.load(margin + place, mask=valid, other=0.0)
    return g + h, h * tl.sigmoid(-x) - g * tl.sigmoid(x)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """Sum acc + a b, operands of one dtype. The interpreter would multiply the bits of bf16 as integers."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def weighted_product(weights, rows, acc, WEIGHTS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Sum acc + weights rows with fp32 weights that are never rounded to 16 bits.

    On tensor cores a weight is the sum of two bf16 numbers, which keeps 16 bits of mantissa and all of fp32's range:
    g ~ 1 / N times p ~ 1 / K underflows fp16. Other dtypes multiply in fp32 at the precision WEIGHTS names.
    """
    if WEIGHTS == SPLIT_BF16:
        high = weights.to(tl.bfloat16)
        low = (weights - high.to(tl.float32)).to(tl.bfloat16)
        acc = product(high, rows, acc, "ieee", INTERPRETED)
        acc = product(low, rows, acc, "ieee", INTERPRETED)
    else:
        acc = product(weights, rows.to(tl.float32), acc, WEIGHTS, INTERPRETED)
    return acc


@triton.jit(do_not_specialize=["n_positions"])
def shuffle_keys_kernel(stream, count, keys, n_positions, C: tl.constexpr):
    """Sort keys of the random order of tiled positions: words of row 2^32 - 1, and 2^32 behind the last kept one."""
    first = tl.program_id(0).to(tl.int64) * C
    rows = tl.zeros((1,), tl.int64) + 0xFFFFFFFF
    words = tl.reshape(random_words(stream, rows, first, False, 1, C), (C,)).to(tl.int64)
    position = first + tl.arange(0, C)
    words = tl.where(position < tl.load(count), words, 0x100000000)
    tl.store(keys + position, words, mask=position < n_positions)
