"""Counter-based hashing: random words as a pure function of integers, in whole arrays.

Every random choice of the data modules (ties in time, validation users, order of an epoch, drawn targets) is a hash
of (seed, purpose, counters). So it needs no state, does not depend on batch size, worker or replica, and is repeated
from a checkpoint by knowing the epoch alone.

Source: the finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA
2014), used here as a mixing function over chained words.
"""

from collections.abc import Iterator
from enum import IntEnum

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

Words = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_MASK = 2**64 - 1
_ROWS_AT_A_TIME = 1 << 20


class Purpose(IntEnum):
    """Keeps the streams of one seed apart."""

    TIE = 1
    VALIDATION_USER = 2
    EPOCH_ORDER = 3
    SLOT = 4
    CONTEXT_USER = 5


def mix(words: ArrayLike) -> Words:
    """SplitMix64 of each word: a bijection of 0..2^64-1 that spreads every input bit over all output bits.

    Args:
        words: ``(...) uint64``, or int64 taken modulo 2^64.

    Returns:
        ``(...) uint64``.
    """
    mixed = np.atleast_1d(np.asarray(words).astype(np.uint64))  # arrays wrap silently, NumPy scalars warn
    mixed += _GOLDEN
    mixed ^= mixed >> np.uint64(30)
    mixed *= _FIRST
    mixed ^= mixed >> np.uint64(27)
    mixed *= _SECOND
    mixed ^= mixed >> np.uint64(31)
    return mixed.reshape(np.shape(words))


def chain(seed: int, purpose: Purpose, *counters: ArrayLike) -> Words:
    """Random words for (seed, purpose, counters): ``h = mix(h XOR mix(counter))``, counter after counter.

    Args:
        seed: Any integer, taken modulo 2^64.
        purpose: Which stream of the seed.
        counters: Integers or integer arrays that broadcast together.

    Returns:
        ``uint64`` words of the broadcast shape.
    """
    state = mix(mix(np.uint64(seed & _MASK)) ^ np.uint64(purpose))
    for counter in counters:
        state = extend(state, counter)
    return state


def extend(words: Words, counter: ArrayLike) -> Words:
    """Words of one counter more: ``extend(chain(s, p, a), b)`` is ``chain(s, p, a, b)``."""
    return mix(words ^ mix(counter))


def below(words: Words, n: NDArray[np.int64]) -> NDArray[np.int64]:
    """Map words to 0..n-1 by the high half of (upper 32 bits) x n; ``n`` of 0 gives 0, ``n`` is at most 2^32 - 1."""
    return ((words >> np.uint64(32)) * n.astype(np.uint64) >> np.uint64(32)).astype(np.int64)


def hash_ids(ids: pl.Series) -> Words:
    """One word for each original id, which depends on the id alone and not on its place in the table.

    Args:
        ids: ``(n,)`` integers or strings without nulls.

    Returns:
        ``(n,) uint64``. Integers are mixed as they are, strings by eight bytes of UTF-8 at a time.
    """
    if ids.dtype.is_integer():
        return mix(ids.to_numpy())
    parts = [_hash_strings(ids[start : start + _ROWS_AT_A_TIME]) for start in range(0, len(ids), _ROWS_AT_A_TIME)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64)


def _hash_strings(strings: pl.Series) -> Words:
    encoded = strings.cast(pl.Binary)
    n_bytes = encoded.bin.size().to_numpy()
    n_words = -(-max(1, int(n_bytes.max())) // 8)
    padded = np.array(encoded.to_list(), dtype=f"S{8 * n_words}")
    words = padded.view("<u8").reshape(len(padded), n_words)
    state = mix(n_bytes)
    for column in range(n_words):
        # Words beyond the end of a string leave its hash alone, so that it does not depend on the longest one. The
        # step is no plain XOR of two mixes: those of the length and of an equal first word would cancel.
        state = np.where(8 * column < n_bytes, mix(mix(state) ^ words[:, column]), state)
    return state


def as_integers(array: NDArray[np.int64]) -> Iterator[int]:
    """Python integers of an array, a part at a time: a list of them all would take 36 bytes each."""
    for start in range(0, len(array), _ROWS_AT_A_TIME):
        yield from array[start : start + _ROWS_AT_A_TIME].tolist()
