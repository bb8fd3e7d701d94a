# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"
# The parameters of a device function are tensors, pointers or numbers, as each call makes them.
"""Device functions of 64-bit order keys: coding, bitonic sorting and merging of lists held by one program.

A key is 32 bits of the float32 score in an order-preserving code above 32 bits of the inverted id, so that one integer
comparison orders by score descending, then id ascending:

    key = ordered(score) * 2^32 + (2^32 - 1 - id),   ordered(x) = bits(x) with the 31 low bits flipped where x < 0

Lists have L = 2^LOG_L entries and are sorted as a hypercube of LOG_L axes of length 2: a compare-exchange at distance
2^p exchanges along one axis.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_KEY = tl.constexpr(-(2**63))
"""Below every key: a place that holds no candidate."""

_LOW_BITS = tl.constexpr(0x7FFFFFFF)
_ID_BITS = tl.constexpr(0xFFFFFFFF)
_NAN_BITS = tl.constexpr(0x7FC00000)
_INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def encode_keys(scores, ids):
    """Keys of fp32 scores and int64 ids in 0..2^32 - 1; every NaN gets one code, above that of infinity."""
    bits = scores.to(tl.int32, bitcast=True)
    bits = tl.where(scores == 0.0, 0, bits)  # negative zero counts as zero
    bits = tl.where(scores != scores, _NAN_BITS, bits)
    ordered = bits ^ ((bits >> 31) & _LOW_BITS)
    return (ordered.to(tl.int64) << 32) | (ids ^ _ID_BITS)


@triton.jit
def key_scores(keys):
    """Fp32 scores of keys, -inf where there is no candidate."""
    ordered = (keys >> 32).to(tl.int32)
    scores = (ordered ^ ((ordered >> 31) & _LOW_BITS)).to(tl.float32, bitcast=True)
    return tl.where(keys == NO_KEY, -float("inf"), scores)


@triton.jit
def key_ids(keys):
    """Ids of keys; of no use where there is no candidate."""
    return (keys & _ID_BITS) ^ _ID_BITS


@triton.jit
def are_numbers(keys):
    """Whether keys stand for candidates whose score is a number."""
    return (keys != NO_KEY) & ((keys >> 32) <= _INFINITY_BITS)


@triton.jit
def sort_ascending(keys, LOG_L: tl.constexpr):
    """Bitonic sort of a list; `tl.sort` is the same network, but the interpreter takes seconds for its XOR."""
    cube = tl.reshape(keys, [2] * LOG_L)
    pair = tl.arange(0, 2)
    for stage in tl.static_range(1, LOG_L + 1):
        for step in tl.static_range(stage):
            upper = tl.reshape(pair, [1] * (LOG_L - stage + step) + [2] + [1] * (stage - 1 - step))
            if stage < LOG_L:
                # bit `stage` of the place says which way a run is sorted
                upper ^= tl.reshape(pair, [1] * (LOG_L - stage - 1) + [2] + [1] * stage)
            partner = tl.sum(cube, LOG_L - stage + step, keep_dims=True) - cube
            cube = tl.where((cube > partner) != (upper != 0), partner, cube)
    return tl.reshape(cube, keys.shape)


@triton.jit
def merge_descending(best, ascending, LOG_L: tl.constexpr):
    """The L greatest of a descending and an ascending list, descending: their maxima are a bitonic sequence."""
    cube = tl.reshape(tl.maximum(best, ascending), [2] * LOG_L)
    pair = tl.arange(0, 2)
    for step in tl.static_range(LOG_L):
        lower = 1 - tl.reshape(pair, [1] * step + [2] + [1] * (LOG_L - 1 - step))
        partner = tl.sum(cube, step, keep_dims=True) - cube
        cube = tl.where((cube > partner) != (lower != 0), partner, cube)
    return tl.reshape(cube, best.shape)
