"""From the caller's arguments to the rows the loss is computed on: every check, then the kept positions in order.

Checks of shapes and names come first and read no tensor, so they work under compilation and capture; checks of values
follow where the loss is computed.

Letters: M positions as given, N kept positions, D width, V items, K negatives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from kernels.cce_minus.negatives import DrawnNegatives, EveryItem, GivenNegatives, Negatives
from kernels.cce_minus.philox import MASK, MAX_COLUMNS, PhiloxStream
from kernels.cce_minus.proposals import Proposal

Sharing = Literal["position", "tile", "batch"]
Correction = Literal["logq", "none", "improved_logq", "classic_logq"]
Reduction = Literal["mean", "sum", "none"]

SHARINGS, CORRECTIONS, REDUCTIONS = get_args(Sharing), get_args(Correction), get_args(Reduction)

_ID_DTYPES = (torch.int32, torch.int64)


@dataclass(frozen=True, eq=False, kw_only=True)
class RowChoices:
    """Which positions count and what they are compared with: arguments whose shapes and names are checked.

    Args:
        targets: int32 or int64, M of any shape: where a value is refused, its place is named.
        n_items: Catalogue size V.
        negatives: Given ids (n_rows, K), None where ids are drawn or every item is a negative.
        stream: (3,) int64 words of the generator, see `counter_words`; None where nothing is drawn.
        log_q: (V,) log-probabilities for the correction; None for uniform.
        threshold: (V,) int32 of the alias table drawn from; None for uniform draws.
        alias: (V,) int32, likewise.
        n_columns: Negatives of a row K; V where every item is one.
        sharing: "position", "tile" or "batch".
        tile_size: Positions per tile.
        correction: One of `Correction`; "none" where every item is a negative.
        ignore_index: Target of positions to leave out.
    """

    targets: Tensor
    n_items: int
    negatives: Tensor | None
    stream: Tensor | None
    log_q: Tensor | None
    threshold: Tensor | None
    alias: Tensor | None
    n_columns: int
    sharing: Sharing
    tile_size: int
    correction: Correction
    ignore_index: int

    @property
    def source(self) -> Literal["uniform", "alias", "given", "every item"]:
        """Where ids come from."""
        if self.negatives is not None:
            return "given"
        if self.stream is None:
            return "every item"
        return "uniform" if self.threshold is None else "alias"


@dataclass(frozen=True, eq=False, kw_only=True)
class LossInputs(RowChoices):
    """All that a path computes the loss from.

    Args:
        hidden: (M, D).
        table: (V, D).
        autocast: Dtype to which autocast wants operands of matrix products rounded; None where it is off.
    """

    hidden: Tensor
    table: Tensor
    autocast: torch.dtype | None

    @property
    def width(self) -> int:
        """D."""
        return self.hidden.shape[1]


@dataclass(frozen=True, eq=False)
class LossRows:
    """The N kept positions in the order in which consecutive groups of them share a row of negatives.

    Args:
        n_items: Catalogue size V.
        index: (N,) int64, place of each kept position among the M given ones; None when they are all, in order.
        targets: (N,) int64 in [0, V).
        group: Positions that share a row of negatives: 1, the tile size, or N. Position i reads row i // group.
        negatives: Source of ids.
        correction: One of `Correction`; "none" where every item is a negative.
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

    @property
    def keeps_collisions(self) -> bool:
        """Whether a negative that equals the target stays among the negatives."""
        return self.correction == "classic_logq"

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
) -> LossInputs:
    """Check all that can be checked without reading a tensor; for the meaning of each argument see `cce_minus_loss`.

    Raises:
        ValueError: In one line, when an argument is not what `cce_minus_loss` allows.
    """
    _check_choice("correction", correction, CORRECTIONS)
    _check_choice("reduction", reduction, REDUCTIONS)
    _check_choice("sharing", sharing, SHARINGS)
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
        choices = _choices(targets, n_items, n_items, "batch", tile_size, "none", ignore_index, None, None)
    elif negatives is None:
        choices = prepare_draws(
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
    else:
        _check_device("negatives", negatives, hidden.device)
        if negatives.dtype not in _ID_DTYPES:
            raise ValueError(f"negatives must be int32 or int64, got {negatives.dtype}")
        if negatives.dim() != (1 if sharing == "batch" else 2) or negatives.shape[-1] < 1:
            raise ValueError(
                f"negatives must have shape {'(K,)' if sharing == 'batch' else '(n_rows, K)'} with K at least 1 "
                f"for sharing={sharing!r}, got {tuple(negatives.shape)}"
            )
        matrix = negatives[None, :] if sharing == "batch" else negatives
        choices = _choices(
            targets, n_items, matrix.shape[1], sharing, tile_size, correction, ignore_index, matrix, log_q
        )
    return LossInputs(
        **{field.name: getattr(choices, field.name) for field in fields(choices)},
        hidden=hidden.reshape(-1, width),
        table=item_embeddings,
        autocast=autocast_dtype(hidden.device.type),
    )


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
) -> RowChoices:
    """Check the arguments of drawn negatives, as far as no tensor is read.

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
    choices = _choices(targets, n_items, n_negatives, sharing, tile_size, correction, ignore_index, None, log_q)
    if seed is None:
        seed = torch.randint(1 << 62, (), dtype=torch.int64)
    _check_counter_word("seed", seed, -(1 << 63), (1 << 63) - 1)
    _check_counter_word("step", step, -(1 << 63), (1 << 63) - 1)
    _check_counter_word("rank", rank, 0, MASK)
    if log_q is not None:
        choices = replace(choices, threshold=log_q.threshold, alias=log_q.alias)
    return replace(choices, stream=counter_words(seed, step, rank, targets.device))


def list_rows(choices: RowChoices, *, check: bool = True) -> LossRows:
    """Read the targets: check what they and given ids hold, and list the kept positions in the order of their groups.

    Args:
        choices: Arguments whose shapes and names are checked.
        check: Whether to check values too; a backward pass need not do so again.

    Raises:
        ValueError: In one line, when a value is not what `cce_minus_loss` allows.
    """
    index, kept = _kept_positions(choices.targets, choices.n_items, choices.ignore_index, check)
    n, device = kept.shape[0], kept.device
    group = {"position": 1, "tile": choices.tile_size, "batch": max(1, n)}[choices.sharing]
    source: Negatives
    if choices.negatives is not None:
        if check:
            check_given(choices, n)
        source = GivenNegatives(choices.negatives)
    elif choices.stream is None:
        source = EveryItem(choices.n_items, device)
    else:
        # on CPU, words as Python ints spare the generator many operations on single numbers
        words = choices.stream.unbind() if choices.stream.is_cuda else choices.stream.tolist()
        stream = PhiloxStream.of_words(*words)
        if choices.sharing == "tile":
            # Neighbours of one history are alike: shuffled, they do not meet in a tile and share its noise.
            order = stream.permutation(n, device)
            index = order if index is None else index[order]
            kept = kept[order]
        n_rows = 1 if choices.sharing == "batch" else -(-n // group)
        alias = (choices.threshold, choices.alias)
        source = DrawnNegatives(stream, n_rows, choices.n_columns, choices.n_items, alias, device)
    if check and choices.correction == "classic_logq" and choices.log_q is not None:
        _check_possible(kept, choices.log_q, "targets")
    return LossRows(choices.n_items, index, kept, group, source, choices.correction, choices.log_q)


def check_given(choices: RowChoices, n: int) -> None:
    """Check given ids, and a given correction, against the number of kept positions and the catalogue.

    Raises:
        ValueError: In one line, for a number of rows or an id or a probability that is not allowed.
    """
    ids, n_items = choices.negatives, choices.n_items
    assert ids is not None
    n_rows = {"position": n, "tile": -(-n // choices.tile_size), "batch": 1}[choices.sharing]
    if ids.shape[0] != n_rows:
        raise ValueError(
            f"negatives must have shape ({n_rows}, K) with K at least 1 for sharing={choices.sharing!r} and {n} kept "
            f"positions, got {tuple(ids.shape)}"
        )
    if ids.numel():
        low, high = (int(bound) for bound in torch.aminmax(ids))
        if low < 0 or high >= n_items:
            row, column = ((ids < 0) | (ids >= n_items)).nonzero()[0].tolist()
            raise ValueError(
                f"negatives must lie in [0, {n_items}), got {int(ids[row, column])} at row {row}, column {column}"
            )
    if choices.log_q is not None:
        log_total = float(torch.logsumexp(choices.log_q.to(torch.float64), 0))
        if not abs(math.expm1(min(log_total, 1.0))) <= 1e-4:  # negated, so that NaN is refused
            raise ValueError(
                f"log_q must be normalised to within 1e-4, got probabilities summing to exp({log_total:.6g})"
            )
        if choices.correction != "none":
            _check_possible(ids, choices.log_q, "negatives")


def check_targets(targets: Tensor, n_items: int, ignore_index: int) -> None:
    """Refuse targets outside the catalogue: in one line on CPU, by a device-side assertion on a GPU, without a sync.

    Raises:
        ValueError: On CPU, naming the first such target and its place.
    """
    keep = targets != ignore_index
    wrong = keep & ((targets < 0) | (targets >= n_items))
    if wrong.is_cuda:
        allowed = f"targets must lie in [0, {n_items}) or equal ignore_index {ignore_index}"
        torch._assert_async(~wrong.any(), allowed)
    elif bool(wrong.any()):
        place = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"targets must lie in [0, {n_items}) or equal ignore_index {ignore_index}, "
            f"got {int(targets[place])} at {place}"
        )


def counter_words(seed: int | Tensor, step: int | Tensor, rank: int | Tensor, device: torch.device) -> Tensor:
    """Key and counter words that name a stream: (seed, step low, step high XOR rank), (3,) int64 on the device.

    Python ints become tensors by filling, not by a copy from the host, which a CUDA graph could not record.
    """
    words = (seed, step & MASK, ((step >> 32) ^ rank) & MASK)
    return torch.stack(
        [
            word.to(device) if isinstance(word, Tensor) else torch.full((), word, dtype=torch.int64, device=device)
            for word in words
        ]
    )


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Dtype of autocast where it is on."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _choices(
    targets: Tensor,
    n_items: int,
    n_columns: int,
    sharing: Sharing,
    tile_size: int,
    correction: Correction,
    ignore_index: int,
    negatives: Tensor | None,
    log_q: Proposal | Tensor | None,
) -> RowChoices:
    """Check what given and drawn negatives have in common."""
    if not _is_int(n_items) or not 2 <= n_items < 1 << 31:
        raise ValueError(f"the number of items V must lie in [2, 2^31), got {n_items}")
    if targets.dtype not in _ID_DTYPES:
        raise ValueError(f"targets must be int32 or int64, got {targets.dtype}")
    _check_choice("sharing", sharing, SHARINGS)
    if not _is_int(tile_size) or tile_size < 1:
        raise ValueError(f"tile_size must be an int of at least 1, got {tile_size!r}")
    return RowChoices(
        targets=targets,
        n_items=n_items,
        negatives=negatives,
        stream=None,
        log_q=_checked_log_q(log_q, n_items, targets.device),
        threshold=None,
        alias=None,
        n_columns=n_columns,
        sharing=sharing,
        tile_size=tile_size,
        correction=correction,
        ignore_index=ignore_index,
    )


def _kept_positions(targets: Tensor, n_items: int, ignore_index: int, check: bool) -> tuple[Tensor | None, Tensor]:
    """Index of the positions that count (None for all of them) and their targets as (N,) int64."""
    if check:
        check_targets(targets, n_items, ignore_index)
    flat = targets.reshape(-1).to(torch.int64)
    keep = flat != ignore_index
    if bool(keep.all()):
        return None, flat
    index = keep.nonzero().view(-1)
    return index, flat[index]


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
    return values


def _check_possible(ids: Tensor, log_q: Tensor, name: str) -> None:
    """Refuse ids of zero probability: their importance weight would be infinite."""
    impossible = torch.isneginf(log_q)
    if not ids.numel() or not bool(impossible.any()):
        return
    for start in range(0, ids.shape[0], rows := max(1, (1 << 20) // max(1, ids[0].numel()))):
        hits = impossible[ids[start : start + rows].to(torch.int64)].nonzero()
        if hits.shape[0]:
            place = (start + int(hits[0, 0]), *hits[0, 1:].tolist())
            where = f"row {place[0]}, column {place[1]}" if len(place) == 2 else f"kept position {place[0]}"
            raise ValueError(
                f"{name} must have positive probability under log_q, got item {int(ids[place])} at {where}"
            )


def _check_counter_word(name: str, value: int | Tensor, low: int, high: int) -> None:
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.dtype != torch.int64:
            raise ValueError(f"{name} must be an int or a 0-d int64 tensor, got {_describe(value)}")
    elif not _is_int(value) or not low <= value <= high:
        raise ValueError(f"{name} must be an int in [{low}, {high}] or a 0-d int64 tensor, got {value!r}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_device(name: str, tensor: Tensor | None, device: torch.device) -> None:
    if tensor is not None and tensor.device != device:
        raise ValueError(f"{name} must lie on the device of hidden and targets, {device}, got {tensor.device}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
