"""Exact top-k of a full catalogue: score descending, then item id ascending, without a ``(B, V)`` matrix.

B users, V items, D width, k places, M seen items in all, C columns of a chunk, W candidates of a row.

The order is total and the same on every path (item table, dense scores, explicit candidates), because the only
comparison is one of 64-bit integers: 32 bits of the float32 score in an order-preserving code above 32 bits of
the inverted id. ``torch.topk`` on the scores alone promises no order among equal scores.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from kernels.top_k import check_k, check_operands, check_seen_items, fused_top_k, is_supported

CHUNK_BYTES = 64 * 2**20
"""Memory allowed for one chunk of scores with its working copies, where the caller names no chunk size."""

# float32 score, int64 key, int64 index and the temporaries of the key: what one cell costs when every row is tied.
_CELL_BYTES = 24
_MIN_CHUNK = 256
_ID_SPAN = 2**32
# Below the key of every number, -inf included: at least k real keys stand beside it wherever it is used.
_NO_KEY = -(2**63)


@dataclass(frozen=True)
class Recommendations:
    """Ranked items of a batch of users.

    ``user_index (B,) int64`` are rows of the data's user table; ``item_ids (B, k) int64`` and ``scores (B, k) float32``
    hold -1 and -inf at places for which no candidate was left.
    """

    user_index: Tensor
    item_ids: Tensor
    scores: Tensor


def order_keys(scores: Tensor, ids: Tensor) -> Tensor:
    """Integers that sort as (score ascending, id descending), so that the greatest key is the first place.

    ``key = ordered(score) * 2^32 + (2^32 - 1 - id)``, where ``ordered`` flips the 31 low bits of negative floats:
    as two's complement integers they then sort as the numbers do. Negative zero counts as zero.

    Args:
        scores: ``(..., C) float32`` without NaN.
        ids: ``int64`` broadcastable to ``scores``, in ``0..2^32 - 1``.

    Returns:
        ``(..., C) int64`` keys, distinct for distinct ids.
    """
    # Under a precision such as 64-true or bf16-true another dtype is the default.
    bits = (scores.float() + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ordered.to(torch.int64).mul_(_ID_SPAN).add_(_ID_SPAN - 1 - ids)


def decode_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`order_keys`; a score of -inf is no candidate and gets id -1.

    Args:
        keys: ``int64`` keys of any shape.

    Returns:
        ``(scores float32, ids int64)`` of the shape of ``keys``.
    """
    ordered = (keys >> 32).to(torch.int32)
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    ids = _ID_SPAN - 1 - (keys & (_ID_SPAN - 1))
    return scores, ids.masked_fill(scores == -torch.inf, -1)


def _best_keys(scores: Tensor, ids: Tensor, k: int) -> Tensor:
    """Keys of the min(k, C) first places of each row, in no promised order; ``ids`` is ``(C,)`` or ``(B, C)``."""
    if scores.shape[1] <= k:
        return order_keys(scores, ids)
    # Selecting by float is exact unless the k-th and the next score are equal. In such rows the scores above the
    # boundary stay, and of those equal to it the lowest ids fill up.
    values, columns = scores.topk(k + 1, dim=1)
    keys = order_keys(values[:, :k], ids.expand_as(scores).gather(1, columns[:, :k]))
    tied = ((values[:, k - 1] == values[:, k]) & (values[:, k] > -torch.inf)).nonzero()[:, 0]
    if tied.numel():
        boundary = values[tied, k, None]
        tied_ids = ids if ids.ndim == 1 else ids[tied]
        equal = torch.where(scores[tied] == boundary, tied_ids, _ID_SPAN)
        lowest = equal.topk(k, dim=1, largest=False).values
        at_boundary = order_keys(boundary.expand(-1, k), lowest).masked_fill_(lowest == _ID_SPAN, _NO_KEY)
        above = keys[tied].masked_fill_(values[tied, :k] == boundary, _NO_KEY)
        keys[tied] = torch.cat([above, at_boundary], dim=1).topk(k, dim=1).values
    return keys


def _refuse_nan(scores: Tensor, first_column: int) -> None:
    if scores.isnan().any():
        row, column = scores.isnan().nonzero()[0].tolist()
        raise ValueError(f"scores must not be NaN, got NaN at row {row}, column {first_column + column}")


class _SeenItems:
    """Pairs (row, item) to leave out, sorted by item once, so that a chunk of items is one slice of them."""

    def __init__(self, items: Tensor | None, offsets: Tensor | None, n_rows: int, n_items: int) -> None:
        check_seen_items(items, offsets, n_rows, n_items)
        self.pairs: tuple[Tensor, Tensor] | None = None
        if items is None or offsets is None:
            return
        rows = torch.repeat_interleave(torch.arange(n_rows, device=items.device), offsets.diff())
        by_item = items.argsort()
        self.pairs = rows[by_item], items[by_item]

    def bounds(self, starts: list[int]) -> list[int]:
        """Position of the first pair whose item is at least each of ``starts``; fetched once for all chunks."""
        if self.pairs is None:
            return [0] * len(starts)
        _, items = self.pairs
        return torch.searchsorted(items, torch.tensor(starts, device=items.device)).tolist()

    def mask(self, scores: Tensor, first_item: int, low: int, high: int) -> None:
        """Write -inf at the pairs ``low..high`` of a chunk of scores that begins at ``first_item``."""
        if self.pairs is not None and high > low:
            rows, items = self.pairs
            scores[rows[low:high], items[low:high] - first_item] = -torch.inf


def _running_top_k(
    chunk_of: Callable[[int, int], Tensor],
    n_rows: int,
    n_items: int,
    k: int,
    seen: _SeenItems,
    chunk_size: int | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Walk over the items in chunks; ``chunk_of(start, stop)`` gives fresh ``(B, stop - start) float32`` scores."""
    check_k(k)
    if chunk_size is None:
        chunk_size = max(_MIN_CHUNK, CHUNK_BYTES // (_CELL_BYTES * max(n_rows, 1)))
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    nothing = torch.full((n_rows, k), -torch.inf, device=device)
    best = order_keys(nothing, torch.zeros_like(nothing, dtype=torch.int64))
    starts = [*range(0, n_items, chunk_size), n_items]
    bounds = seen.bounds(starts)
    for number, (start, stop) in enumerate(pairwise(starts)):
        scores = chunk_of(start, stop)
        _refuse_nan(scores, start)
        seen.mask(scores, start, bounds[number], bounds[number + 1])
        found = _best_keys(scores, torch.arange(start, stop, device=device), k)
        best = torch.cat([best, found], dim=1).topk(k, dim=1).values
    return decode_keys(best)


@torch.no_grad()
def top_k_items(
    states: Tensor,
    table: Tensor,
    k: int,
    *,
    seen_items: Tensor | None = None,
    seen_offsets: Tensor | None = None,
    chunk_size: int | None = None,
    impl: Literal["auto", "torch", "triton"] = "auto",
) -> tuple[Tensor, Tensor]:
    """The k items of highest ``states @ table.T`` for each user among those the user has not seen.

    Score descending, then id ascending, exactly. Memory is O(B (k + chunk_size) + M), whatever V is. Two
    implementations: chunks of scores in PyTorch on any device, and one kernel on a GPU,
    :func:`kernels.top_k.fused_top_k`. They order alike, but round their scores differently.

    Args:
        states: ``(B, D) float`` user states. 16- and 32-bit inputs are multiplied in float32 (also under
            autocast), float64 inputs in float64; the order is that of the float32 scores returned.
        table: ``(V, D) float`` item vectors without the padding row.
        k: Places per user, at least 1; may exceed V.
        seen_items: ``(M,) int64`` items to leave out, of all users one after another, repeats allowed; ``None`` to
            leave out nothing.
        seen_offsets: ``(B + 1,) int64`` where each user's part of ``seen_items`` begins and ends.
        chunk_size: Items scored at a time by the PyTorch path; ``None`` takes as many as :data:`CHUNK_BYTES` holds.
        impl: "torch", "triton", or "auto": "triton" for CUDA tensors where the kernel can run (triton installed, no
            float64, ``k`` up to 1024) and no ``chunk_size`` is asked for, else "torch".

    Returns:
        ``(scores (B, k) float32, ids (B, k) int64)``; places without a candidate hold -inf and -1. An item whose
        score is -inf is no candidate.

    Raises:
        ValueError: If shapes disagree, ``k`` or ``chunk_size`` is below 1, a seen id lies outside 0..V-1, the
            offsets are no partition of the seen items, a score is NaN, or ``impl="triton"`` cannot do it.

    Source: section "Evaluation" of arXiv 2509.09682's released pipeline ranks a dense ``(B, V)`` matrix; this
    gives the same list with a defined order among equal scores. The matrix product of a chunk may round
    differently for different chunk sizes, as any BLAS does; equal scores stay in id order in each case.
    """
    check_operands(states, table)
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl must be 'auto', 'torch' or 'triton', got {impl!r}")
    if impl == "triton" and chunk_size is not None:
        raise ValueError(f"impl='triton' does not work in chunks, got chunk_size={chunk_size}")
    if impl == "triton" or (impl == "auto" and chunk_size is None and is_supported(states, table, k)):
        return fused_top_k(states, table, k, seen_items=seen_items, seen_offsets=seen_offsets)
    wide = torch.float64 if torch.float64 in (states.dtype, table.dtype) else torch.float32
    states = states.to(wide)

    def chunk_of(start: int, stop: int) -> Tensor:
        return (states @ table[start:stop].to(wide).T).to(torch.float32)

    seen = _SeenItems(seen_items, seen_offsets, len(states), len(table))
    with torch.autocast(states.device.type, enabled=False):
        return _running_top_k(chunk_of, len(states), len(table), k, seen, chunk_size, states.device)


@torch.no_grad()
def top_k_scores(
    scores: Tensor,
    k: int,
    *,
    seen_items: Tensor | None = None,
    seen_offsets: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The order of :func:`top_k_items` for scores that exist already; the column number is the item id.

    Args:
        scores: ``(B, V)`` numbers; rounded to float32 before they are compared. Not modified.
        k: Places per user, at least 1; may exceed V.
        seen_items: ``(M,) int64`` items to leave out, or ``None``.
        seen_offsets: ``(B + 1,) int64`` limits of each user's seen items, or ``None``.
        chunk_size: Columns handled at a time; ``None`` takes as many as :data:`CHUNK_BYTES` holds.

    Returns:
        ``(scores (B, k) float32, ids (B, k) int64)`` with -inf and -1 where no candidate is left.

    Raises:
        ValueError: As :func:`top_k_items`.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores must be (B, V), got {tuple(scores.shape)}")

    def chunk_of(start: int, stop: int) -> Tensor:
        return scores[:, start:stop].to(torch.float32, copy=True)

    n_rows, n_items = scores.shape
    seen = _SeenItems(seen_items, seen_offsets, n_rows, n_items)
    return _running_top_k(chunk_of, n_rows, n_items, k, seen, chunk_size, scores.device)


@torch.no_grad()
def top_k_candidates(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The order of :func:`top_k_items` among candidates named row by row, as sparse scorers produce them.

    Args:
        scores: ``(B, W) float32``; -inf marks a slot that holds no candidate.
        ids: ``(B, W) int64`` in ``0..2^32 - 1``, distinct among the candidates of a row, in any order.
        k: Places per user, at least 1; may exceed W.

    Returns:
        ``(scores (B, k) float32, ids (B, k) int64)`` with -inf and -1 where no candidate is left.

    Raises:
        ValueError: If ``k`` is below 1, the shapes differ or a score is NaN.
    """
    check_k(k)
    if scores.ndim != 2 or scores.shape != ids.shape:
        raise ValueError(
            f"scores and ids must be of one shape (B, W), got {tuple(scores.shape)} and {tuple(ids.shape)}"
        )
    _refuse_nan(scores, 0)
    found = _best_keys(scores, ids, k)
    padding = scores.new_full((len(scores), max(0, k - scores.shape[1])), -torch.inf)
    found = torch.cat([found, order_keys(padding, torch.zeros_like(padding, dtype=torch.int64))], dim=1)
    return decode_keys(found.topk(k, dim=1).values)
