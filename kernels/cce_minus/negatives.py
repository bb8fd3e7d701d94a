"""Where the negatives of a block come from: drawn, given, or simply every item.

A source is a matrix of ids of shape (n_rows, n_columns) that is read block by block. Rows are shared by groups of
positions: one row per position, per tile, or one for the whole batch. Letters: V items, K negatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.cce_minus.philox import PhiloxStream, row_blocks, scale_words
from kernels.cce_minus.proposals import draw_from_alias_table


class Negatives(Protocol):
    """A matrix of negative ids that can be read in blocks."""

    @property
    def n_rows(self) -> int:
        """Number of rows."""

    @property
    def n_columns(self) -> int:
        """Number of negatives K of a row."""

    def block(self, first_row: int, n_rows: int, first_column: int, n_columns: int) -> Tensor:
        """Ids of a block as contiguous (n_rows, n_columns) int32; `first_column` is a multiple of 4."""


@dataclass(frozen=True, eq=False)
class DrawnNegatives:
    """Ids drawn with replacement from a counter-based generator; reading a block twice draws the same ids.

    Args:
        stream: Words of (seed, step, rank).
        n_rows: Number of rows.
        n_columns: Number of negatives K; it may exceed V.
        n_items: Catalogue size V.
        alias_table: Thresholds and aliases (V,) of a `Proposal`; two None for uniform draws.
        device: Where ids are computed.
    """

    stream: PhiloxStream
    n_rows: int
    n_columns: int
    n_items: int
    alias_table: tuple[Tensor | None, Tensor | None]
    device: torch.device

    def block(self, first_row: int, n_rows: int, first_column: int, n_columns: int) -> Tensor:
        """Draw the ids of a block: the high half of word * V, through the alias table if there is a proposal."""
        ids = torch.empty(n_rows, n_columns, dtype=torch.int32, device=self.device)
        starts = row_blocks(n_rows, n_columns)
        for start in starts:
            height = min(starts.step, n_rows - start)
            where = (first_row + start, height, first_column, n_columns)
            words = self.stream.words(*where, coin=False, device=self.device)
            drawn = scale_words(words, self.n_items)
            threshold, alias = self.alias_table
            if threshold is not None and alias is not None:
                coins = self.stream.words(*where, coin=True, device=self.device)
                drawn = draw_from_alias_table(drawn, coins, threshold, alias)
            ids[start : start + height] = drawn.view(height, -1)[:, :n_columns]
        return ids


@dataclass(frozen=True, eq=False)
class GivenNegatives:
    """Ids the caller chose.

    Args:
        ids: (n_rows, K) int32 or int64 in [0, V).
    """

    ids: Tensor

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.ids.shape[0]

    @property
    def n_columns(self) -> int:
        """Number of negatives K of a row."""
        return self.ids.shape[1]

    def block(self, first_row: int, n_rows: int, first_column: int, n_columns: int) -> Tensor:
        """Copy a block of the given ids."""
        rows, columns = slice(first_row, first_row + n_rows), slice(first_column, first_column + n_columns)
        return self.ids[rows, columns].to(torch.int32).contiguous()


@dataclass(frozen=True, eq=False)
class EveryItem:
    """The whole catalogue as one row of negatives: the sampled loss becomes the full one.

    Args:
        n_columns: Catalogue size V.
        device: Where ids are computed.
    """

    n_columns: int
    device: torch.device

    @property
    def n_rows(self) -> int:
        """One row, shared by all positions."""
        return 1

    def block(self, first_row: int, n_rows: int, first_column: int, n_columns: int) -> Tensor:
        """Consecutive ids."""
        last = first_column + n_columns
        return torch.arange(first_column, last, dtype=torch.int32, device=self.device)[None, :]
