"""From the caller's arguments to the rows the loss is computed on: every check, then the kept positions in order.

Letters: M positions as given, N kept positions, D width, V items, K negatives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from kernels.cce_minus.negatives import DrawnNegatives, EveryItem, GivenNegatives, Negatives
from kernels.cce_minus.philox import MASK, MAX_COLUMNS, PhiloxStream
from kernels.cce_minus.proposals import Proposal

Sharing = Literal["position", "tile", "batch"]
Correction = Literal["logq", "none", "improved_logq"]
Reduction = Literal["mean", "sum", "none"]

_ID_DTYPES = (torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class LossRows:
    """The N kept positions in the order in which consecutive groups of them share a row of negatives.

    Args:
        n_items: Catalogue size V.
        index: (N,) int64, place of each kept position among the M given ones; None when they are all, in order.
        targets: (N,) int64 in [0, V).
        group: Positions that share a row of negatives: 1, the tile size, or N. Position i reads row i // group.
        negatives: Source of ids.
        correction: "logq", "none" or "improved_logq"; "none" where every item is a negative.
        log_q: (V,) log-probabilities for the correction; None for uniform.
    """

    n_items: int
    index: Tensor | None
    targets: Tensor
    group: int
    negatives: Negatives
    correction: Correction
    log_q: Tensor | None

    @property
    def n(self) -> int:
        """Number of kept positions N."""
        return self.targets.shape[0]

    @property
    def is_exhaustive(self) -> bool:
        """Whether every item is a negative, which makes the loss the full cross-entropy."""
        return isinstance(self.negatives, EveryItem)

    def select(self, flat: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Entries of an (M, ...) tensor at the kept positions start..stop-1."""
        if self.index is None:
            return flat[start:stop]
        return flat.index_select(0, self.index[start:stop])

    def scatter(self, kept: Tensor, n_positions: int) -> Tensor:
        """Put (N,) values back among M positions, zero elsewhere."""
        if self.index is None:
            return kept
        return kept.new_zeros(n_positions).index_copy(0, self.index, kept)


def prepare_loss(
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    *,
    n_negatives: int | Literal["all"],
    negatives: Tensor | None,
    seed: int | Tensor | None,
    step: int | Tensor,
    rank: int | Tensor,
    sharing: Sharing,
    tile_size: int,
    log_q: Proposal | Tensor | None,
    correction: Correction,
    weight: Tensor | None,
    ignore_index: int,
    reduction: Reduction,
) -> LossRows:
    """Check the arguments of the loss and list its rows; for the meaning of each see `cce_minus_loss`.

    Raises:
        ValueError: In one line, when an argument is not what `cce_minus_loss` allows.
    """
    _check_choice("correction", correction, Correction)
    _check_choice("reduction", reduction, Reduction)
    if hidden.dim() < 1 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating point of shape (..., D), got {_describe(hidden)}")
    if item_embeddings.dim() != 2 or not item_embeddings.is_floating_point():
        raise ValueError(f"item_embeddings must be floating point of shape (V, D), got {_describe(item_embeddings)}")
    n_items, width = item_embeddings.shape
    if hidden.shape[-1] != width or width < 1:
        raise ValueError(f"hidden must have the width D of item_embeddings, {width}, got {hidden.shape[-1]}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets must have shape {tuple(hidden.shape[:-1])}, got {tuple(targets.shape)}")
    if weight is not None and (weight.shape != targets.shape or not weight.is_floating_point()):
        raise ValueError(f"weight must be floating point of shape {tuple(targets.shape)}, got {_describe(weight)}")
    for name, tensor in (("item_embeddings", item_embeddings), ("targets", targets), ("weight", weight)):
        _check_device(name, tensor, hidden.device)
    if n_negatives == "all":
        if negatives is not None:
            raise ValueError("n_negatives='all' takes every item, but negatives were given: pass one of the two")
        if log_q is not None:
            raise ValueError("n_negatives='all' takes every item, so there is no log_q to correct for: pass None")
        index, kept = _kept_positions(targets, n_items, ignore_index)
        source = EveryItem(n_items, kept.device)
        return LossRows(n_items, index, kept, max(1, kept.shape[0]), source, "none", None)
    if negatives is None:
        return prepare_draws(
            targets,
            n_items,
            n_negatives=n_negatives,
            seed=seed,
            step=step,
            rank=rank,
            sharing=sharing,
            tile_size=tile_size,
            log_q=log_q,
            correction=correction,
            ignore_index=ignore_index,
        )
    index, kept = _kept_positions(targets, n_items, ignore_index)
    group = _group_size(sharing, tile_size, kept.shape[0])
    ids = _checked_ids(negatives, sharing, kept.shape[0], group, n_items, kept.device)
    log_probabilities = _checked_log_q(log_q, n_items, kept.device)
    if log_probabilities is not None and correction != "none":
        _check_possible(ids, log_probabilities)
    return LossRows(n_items, index, kept, group, GivenNegatives(ids), correction, log_probabilities)


def prepare_draws(
    targets: Tensor,
    n_items: int,
    *,
    n_negatives: int,
    seed: int | Tensor | None,
    step: int | Tensor,
    rank: int | Tensor,
    sharing: Sharing,
    tile_size: int,
    log_q: Proposal | Tensor | None,
    correction: Correction,
    ignore_index: int,
) -> LossRows:
    """List the kept positions, permuted where tiles share negatives, and the source that draws their ids.

    Raises:
        ValueError: In one line, when an argument is not what `cce_minus_negatives` allows.
    """
    if not _is_int(n_negatives) or not 1 <= n_negatives < MAX_COLUMNS:
        allowed = "must be at least 1" if _is_int(n_negatives) and n_negatives < 1 else "must be an int below 2^31"
        raise ValueError(f"n_negatives {allowed}, got {n_negatives!r}")
    if log_q is not None and not isinstance(log_q, Proposal):
        raise ValueError(
            "log_q must be a Proposal where negatives are drawn (a tensor only corrects for given negatives), "
            f"got {type(log_q).__name__}"
        )
    index, kept = _kept_positions(targets, n_items, ignore_index)
    n, device = kept.shape[0], kept.device
    group = _group_size(sharing, tile_size, n)
    log_probabilities = _checked_log_q(log_q, n_items, device)
    if seed is None:
        seed = int(torch.randint(-(1 << 63), (1 << 63) - 1, (), dtype=torch.int64))
    _check_counter_word("seed", seed, -(1 << 63), (1 << 63) - 1)
    _check_counter_word("step", step, -(1 << 63), (1 << 63) - 1)
    _check_counter_word("rank", rank, 0, MASK)
    stream = PhiloxStream.of(seed, step, rank)
    if sharing == "tile":
        # Neighbours of one history are alike: shuffled, they do not meet in a tile and share its noise.
        order = stream.permutation(n, device)
        index = order if index is None else index[order]
        kept = kept[order]
    n_rows = 1 if sharing == "batch" else -(-n // group)
    source = DrawnNegatives(stream, n_rows, n_negatives, n_items, log_q, device)
    return LossRows(n_items, index, kept, group, source, correction, log_probabilities)


def _kept_positions(targets: Tensor, n_items: int, ignore_index: int) -> tuple[Tensor | None, Tensor]:
    """Index of the positions that count (None for all of them) and their targets as (N,) int64."""
    if not _is_int(n_items) or not 2 <= n_items < 1 << 31:
        raise ValueError(f"the number of items V must lie in [2, 2^31), got {n_items}")
    if targets.dtype not in _ID_DTYPES:
        raise ValueError(f"targets must be int32 or int64, got {targets.dtype}")
    flat = targets.reshape(-1).to(torch.int64)
    keep = flat != ignore_index
    wrong = keep & ((flat < 0) | (flat >= n_items))
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), targets.shape)) if targets.dim() else ()
        raise ValueError(
            f"targets must lie in [0, {n_items}) or equal ignore_index {ignore_index}, got {int(flat[at])} at {where}"
        )
    if bool(keep.all()):
        return None, flat
    index = keep.nonzero().view(-1)
    return index, flat[index]


def _group_size(sharing: Sharing, tile_size: int, n: int) -> int:
    """Positions per row of negatives."""
    _check_choice("sharing", sharing, Sharing)
    if not _is_int(tile_size) or tile_size < 1:
        raise ValueError(f"tile_size must be an int of at least 1, got {tile_size!r}")
    return {"position": 1, "tile": tile_size, "batch": max(1, n)}[sharing]


def _checked_ids(ids: Tensor, sharing: Sharing, n: int, group: int, n_items: int, device: torch.device) -> Tensor:
    """Given ids as a matrix with one row per group of positions."""
    _check_device("negatives", ids, device)
    if ids.dtype not in _ID_DTYPES:
        raise ValueError(f"negatives must be int32 or int64, got {ids.dtype}")
    n_rows = -(-n // group)
    expected = "(K,)" if sharing == "batch" else f"({n_rows}, K)"
    leading = () if sharing == "batch" else (n_rows,)
    if ids.dim() != len(leading) + 1 or ids.shape[:-1] != leading or ids.shape[-1] < 1:
        raise ValueError(
            f"negatives must have shape {expected} with K at least 1 for sharing={sharing!r} and {n} kept positions, "
            f"got {tuple(ids.shape)}"
        )
    matrix = ids[None, :] if sharing == "batch" else ids
    if matrix.numel():
        low, high = (int(bound) for bound in torch.aminmax(matrix))
        if low < 0 or high >= n_items:
            row, column = ((matrix < 0) | (matrix >= n_items)).nonzero()[0].tolist()
            raise ValueError(
                f"negatives must lie in [0, {n_items}), got {int(matrix[row, column])} at row {row}, column {column}"
            )
    return matrix


def _checked_log_q(log_q: Proposal | Tensor | None, n_items: int, device: torch.device) -> Tensor | None:
    """Log-probabilities of all items as (V,), None for uniform."""
    if log_q is None:
        return None
    if not isinstance(log_q, Proposal | Tensor):
        raise ValueError(f"log_q must be None, a Proposal or a tensor, got {type(log_q).__name__}")
    values = log_q.log_q if isinstance(log_q, Proposal) else log_q.detach()
    if values.shape != (n_items,) or not values.is_floating_point():
        raise ValueError(f"log_q must be floating point of shape ({n_items},), got {_describe(values)}")
    _check_device("log_q", values, device)
    if isinstance(log_q, Tensor):
        log_total = float(torch.logsumexp(values.to(torch.float64), 0))
        if not abs(math.expm1(min(log_total, 1.0))) <= 1e-4:  # negated, so that NaN is refused
            raise ValueError(
                f"log_q must be normalised to within 1e-4, got probabilities summing to exp({log_total:.6g})"
            )
    return values


def _check_possible(ids: Tensor, log_q: Tensor) -> None:
    """Refuse given ids of zero probability: their importance weight would be infinite."""
    impossible = torch.isneginf(log_q)
    if not bool(impossible.any()):
        return
    for start in range(0, ids.shape[0], rows := max(1, (1 << 20) // ids.shape[1])):
        hits = impossible[ids[start : start + rows].to(torch.int64)].nonzero()
        if hits.shape[0]:
            row, column = start + int(hits[0, 0]), int(hits[0, 1])
            raise ValueError(
                f"negatives must have positive probability under log_q, got item {int(ids[row, column])} "
                f"at row {row}, column {column}"
            )


def _check_counter_word(name: str, value: int | Tensor, low: int, high: int) -> None:
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.dtype != torch.int64:
            raise ValueError(f"{name} must be an int or a 0-d int64 tensor, got {_describe(value)}")
    elif not _is_int(value) or not low <= value <= high:
        raise ValueError(f"{name} must be an int in [{low}, {high}] or a 0-d int64 tensor, got {value!r}")


def _check_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, got {value!r}")


def _check_device(name: str, tensor: Tensor | None, device: torch.device) -> None:
    if tensor is not None and tensor.device != device:
        raise ValueError(f"{name} must lie on the device of hidden and targets, {device}, got {tensor.device}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
