"""Checks of the arguments of a top-k, shared by every path that ranks a catalogue.

B users, V items, D width, k places, M seen items in all.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_K = 1024
"""Most places of the fused kernel: two lists of this length per user and split are sorted inside one program."""

_MOST_ITEMS = 2**32
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_k(k: int) -> None:
    """Refuse a number of places below 1.

    Raises:
        ValueError: If ``k`` is below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")


def check_operands(states: Tensor, table: Tensor) -> None:
    """Refuse states and tables that cannot be multiplied, or more items than an order key can name.

    Raises:
        ValueError: If the shapes are not ``(B, D)`` and ``(V, D)`` with V up to 2^32.
    """
    if states.ndim != 2 or table.ndim != 2 or states.shape[1] != table.shape[1]:
        raise ValueError(
            f"states and table must be (B, D) and (V, D), got {tuple(states.shape)} and {tuple(table.shape)}"
        )
    if table.shape[0] > _MOST_ITEMS:
        raise ValueError(f"table must have at most 2^32 rows, got {table.shape[0]}")


def check_seen_items(items: Tensor | None, offsets: Tensor | None, n_rows: int, n_items: int) -> None:
    """Refuse lists of seen items that are no partition, or name items that do not exist.

    Five numbers are read from the device, in one transfer: the first and the last offset, whether any length is
    negative, the least and the greatest item.

    Args:
        items: ``(M,)`` integers, or ``None``.
        offsets: ``(B + 1,)`` integers, or ``None``.
        n_rows: B.
        n_items: V.

    Raises:
        ValueError: If only one is given, the shapes disagree, the offsets do not rise from 0 to M, or an item lies
            outside ``0..V - 1``.
    """
    if (items is None) != (offsets is None):
        raise ValueError("seen_items and seen_offsets must be given together, got only one of them")
    if items is None or offsets is None:
        return
    if offsets.shape != (n_rows + 1,) or items.ndim != 1:
        raise ValueError(
            f"seen_items must be (M,) and seen_offsets ({n_rows + 1},), "
            f"got {tuple(items.shape)} and {tuple(offsets.shape)}"
        )
    limits = (items.min(), items.max()) if items.numel() else (offsets[0], offsets[0])
    facts = torch.stack([offsets[0], offsets[-1], (offsets.diff() < 0).any().long(), *limits])
    first, last, falling, least, greatest = facts.tolist()
    if first != 0 or last != items.numel() or falling:
        raise ValueError(f"seen_offsets must rise from 0 to {items.numel()}, the number of seen items")
    if items.numel() and (least < 0 or greatest >= n_items):
        raise ValueError(f"seen_items must lie in 0..{n_items - 1}, got {least}..{greatest}")


def check_fused(states: Tensor, table: Tensor, k: int, seen: tuple[Tensor | None, Tensor | None]) -> None:
    """Refuse what the fused kernel does not do, though the chunked path may.

    Raises:
        ValueError: If ``k`` is above 1024, a dtype is not float16, bfloat16 or float32, or tensors lie on different
            devices.
    """
    if k > MAX_K:
        raise ValueError(f"k must be at most {MAX_K} for the fused kernel, got {k}")
    if states.dtype not in _DTYPES or table.dtype not in _DTYPES:
        raise ValueError(
            f"states and table must be float16, bfloat16 or float32 for the fused kernel, "
            f"got {states.dtype} and {table.dtype}"
        )
    devices = {str(tensor.device) for tensor in (states, table, *seen) if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"states, table and seen items must lie on one device, got {', '.join(sorted(devices))}")
