"""Philox4x32-10 in whole-array int64 arithmetic: the one source of randomness of CCE-.

A counter-based generator has no state: word `c % 4` of the block with counter

    (c // 4, row, step low, step high XOR rank)   and key   (seed low, seed high)

is the random word of column c of a row, on every device and in any order. The backward pass draws the ids of the
forward pass again instead of keeping them, and a resumed run draws those it would have drawn.

Two more domains share the key without meeting the first. The coin of the alias method adds 2^31 to the first
counter word (columns stay below 2^31, so `c // 4` never gets there); the permutation of the positions of a tile
reads row 2^32 - 1, which no draw uses.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; known answers of Random123.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Word = int | Tensor
"""A 32-bit word: a Python int or an int64 tensor with values in [0, 2^32)."""

MASK = 0xFFFFFFFF
COIN_DOMAIN = 1 << 31
PERMUTATION_ROW = MASK
MAX_COLUMNS = 1 << 31
MAX_ROWS = MASK

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
# Rounds run over blocks of this many counters, so that their dozen of int64 intermediates stay in cache.
_COUNTERS_PER_BLOCK = 1 << 15


def philox4x32(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32 over counters that broadcast against one another.

    One round is (c0, c1, c2, c3) <- (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)), after which the
    key advances by (W0, W1). Products of two 32-bit words fill all 64 bits of an int64: the sign is garbage, and
    is cut off where it could be seen. c1 and c3 keep garbage above bit 31 until the end, since they are only XORed
    into words that are masked afterwards. Words that depend on the row or on the column alone stay (R, 1) or
    (1, C) for as long as the rounds allow, which saves a quarter of the work.

    Args:
        counter: Four words, ints or broadcastable int64 tensors in [0, 2^32), at least one of them a tensor.
        key: Two words, ints or 0-d int64 tensors in [0, 2^32).

    Returns:
        Four int64 tensors in [0, 2^32) of the broadcast shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & MASK, p1, ((p0 >> 32) ^ c3 ^ k1) & MASK, p0
        k0, k1 = (k0 + _W0) & MASK, (k1 + _W1) & MASK
    words = (c0, c1 & MASK, c2, c3 & MASK)
    assert all(isinstance(word, Tensor) for word in words)
    return words  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class PhiloxStream:
    """The words of one (seed, step, rank): two of the key and the last two of the counter.

    Args:
        key: (seed low, seed high).
        step: (step low, step high XOR rank).
    """

    key: tuple[Word, Word]
    step: tuple[Word, Word]

    @classmethod
    def of(cls, seed: Word, step: Word, rank: Word) -> PhiloxStream:
        """Split int64 `seed` and `step` into words by their two's complement, negative values included.

        Tensors are copied on their device without a host read, so a step counter that moves on before the
        backward pass does not change the ids of this one.
        """
        return cls(key=(seed & MASK, (seed >> 32) & MASK), step=(step & MASK, ((step >> 32) ^ rank) & MASK))

    @classmethod
    def of_words(cls, seed: Word, step_low: Word, step_high: Word) -> PhiloxStream:
        """The stream of words that were split already: the seed as int64, the others in [0, 2^32)."""
        return cls(key=(seed & MASK, (seed >> 32) & MASK), step=(step_low, step_high))

    def words(
        self, first_row: int, n_rows: int, first_column: int, n_columns: int, *, coin: bool, device: torch.device
    ) -> Tensor:
        """Random words of a block of rows and columns.

        Args:
            first_row: Second counter word of the first row.
            n_rows: Number of rows R.
            first_column: A multiple of 4.
            n_columns: Number of columns C, rounded up to whole counters in the result.
            coin: Read the coin domain of the alias method instead of that of the draws.
            device: Where the words are computed.

        Returns:
            (R, ceil(C / 4), 4) int64 in [0, 2^32).
        """
        assert first_column % 4 == 0, "a block starts at a whole counter"
        start = first_column // 4 + (COIN_DOMAIN if coin else 0)
        columns = torch.arange(start, start + -(-n_columns // 4), dtype=torch.int64, device=device)[None, :]
        rows = torch.arange(first_row, first_row + n_rows, dtype=torch.int64, device=device)[:, None]
        return torch.stack(philox4x32((columns, rows, *self.step), self.key), dim=-1)

    def permutation(self, n: int, device: torch.device) -> Tensor:
        """Argsort of n words of the permutation domain, ties by index: a random order of 0..n-1, (n,) int64."""
        assert n < MAX_ROWS
        words = self.words(PERMUTATION_ROW, 1, 0, n, coin=False, device=device)
        return torch.argsort(words.view(-1)[:n], stable=True)


def row_blocks(n_rows: int, n_columns: int) -> range:
    """Starts of row blocks whose counters fit in cache; the step of the range is the block's height."""
    return range(0, n_rows, max(1, _COUNTERS_PER_BLOCK * 4 // max(1, n_columns)))


def scale_words(words: Tensor, n_items: int) -> Tensor:
    """High half of word * V: maps 32 random bits to [0, V) with a relative bias below V / 2^32."""
    return (words * n_items) >> 32
