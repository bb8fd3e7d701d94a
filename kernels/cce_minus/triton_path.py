"""Forward and backward of CCE- by Triton kernels: lists the kept positions on the device and starts the launches.

Nothing is read on the host, so the path runs inside CUDA graphs: the number of kept positions stays on the device,
grids are sized for all positions given, and programs beyond the last kept one return at once.

Letters: M positions as given, N kept positions, D width, V items, K negatives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.cce_minus.arguments import LossInputs
from kernels.cce_minus.triton_launches import (
    Pass,
    architecture,
    plan_backward,
    plan_forward,
    plan_position_backward,
    plan_positives,
    plan_shuffle,
    plan_sum_rows,
    plan_tile_hidden,
    plan_tile_table,
    segments,
)

DETERMINISTIC_BYTES = 256 << 20
"""Scratch of a deterministic backward pass: pairs or rows of one chunk, with the buffers of their sort.

A chunk is at least one position, or one segment of positions that share negatives, which may need more.
"""

_BYTES_PER_PAIR = 48  # id, weight, sorted id, order, and as much again inside the sort


@dataclass(frozen=True, eq=False)
class Saved:
    """What the backward pass needs of the forward pass; see `Pass`."""

    margin: Tensor
    shift: Tensor
    direction: Tensor


def triton_forward(inputs: LossInputs, *, needs_direction: bool) -> tuple[Tensor, Tensor, Saved]:
    """Loss and log-sum-exp at every place given, 0 at those not kept.

    Args:
        inputs: Checked arguments with M flat targets.
        needs_direction: Whether the gradient of the positions will be asked for; read where negatives are shared.

    Returns:
        loss and lse, (M,) fp32, and what the backward pass needs.
    """
    hidden, m = inputs.hidden, inputs.targets.shape[0]
    loss, lse, margin, shift = (hidden.new_zeros(m, dtype=torch.float32) for _ in range(4))
    keeps_direction = needs_direction and inputs.sharing != "position"
    saved = Saved(margin, shift, hidden.new_zeros(hidden.shape if keeps_direction else (0,), dtype=torch.float32))
    if m:
        plan_forward(_begin(inputs, saved), loss, lse).run()
    return loss, lse, saved


def triton_backward(
    d_loss: Tensor,
    d_lse: Tensor,
    inputs: LossInputs,
    saved: Saved,
    *,
    needs_hidden: bool,
    needs_table: bool,
    deterministic: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the positions (M, D) and of the table (V, D), in the dtypes of their inputs.

    Args:
        d_loss: (M,) upstream gradient of the loss.
        d_lse: (M,) upstream gradient of the log-sum-exp.
        inputs: As in the forward pass.
        saved: Result of the forward pass.
        needs_hidden: Whether the first gradient is wanted.
        needs_table: Whether the second gradient is wanted; it is summed in fp32 and cast once.
        deterministic: Sum rows of the table's gradient in a fixed order, chunk by chunk of the positions.
    """
    hidden, table = inputs.hidden, inputs.table
    d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needs_hidden else None
    d_table = table.new_zeros(table.shape, dtype=torch.float32) if needs_table else None
    if inputs.targets.shape[0] and (needs_hidden or needs_table):
        work = _begin(inputs, saved, d_loss.contiguous(), d_lse.contiguous())
        if deterministic and d_table is not None:
            _deterministic_backward(work, d_hidden, d_table)
        else:
            for launch in plan_backward(work, d_hidden, d_table):
                launch.run()
            if d_table is not None:
                plan_positives(work, *_sort_targets(work), d_table).run()
    return d_hidden, None if d_table is None else d_table.to(table.dtype)


def list_kept(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """List the kept positions by a prefix sum on the device; dropped ones follow, so that every place is named once.

    Returns:
        `index` (M,) and `count` (1,), both int64, see `Pass`.
    """
    targets = inputs.targets
    places = torch.arange(targets.shape[0], device=targets.device)
    keep = targets != inputs.ignore_index
    rank = torch.cumsum(keep, 0)
    count = rank[-1:]
    slot = torch.where(keep, rank - 1, count + places - rank)
    index = torch.empty_like(places).scatter_(0, slot, places)
    if inputs.sharing == "tile" and inputs.stream is not None:
        # Neighbours of one history are alike: shuffled, they do not meet in a tile and share its noise.
        keys = torch.empty_like(places)
        plan_shuffle(inputs.stream, count, keys).run()
        index = index[torch.argsort(keys, stable=True)]
    return index, count


def _begin(inputs: LossInputs, saved: Saved, d_loss: Tensor | None = None, d_lse: Tensor | None = None) -> Pass:
    index, count = list_kept(inputs)
    # a given correction may be float64, and to subtract it would turn the kernels' fp32 sums into float64
    log_q = None if inputs.log_q is None else inputs.log_q.to(torch.float32)
    return Pass(
        inputs=replace(inputs, log_q=log_q),
        arch=architecture(inputs.hidden),
        index=index,
        count=count,
        margin=saved.margin,
        shift=saved.shift,
        direction=saved.direction,
        d_loss=d_loss,
        d_lse=d_lse,
    )


def _deterministic_backward(work: Pass, d_hidden: Tensor | None, d_table: Tensor) -> None:
    """Backward pass without atomics: rows of the table's gradient are listed, sorted by item and summed in order.

    Chunks are cut by the number of positions given, which the host knows, so as to keep their scratch within
    `DETERMINISTIC_BYTES`. The least chunk is one position, of 48 K bytes, or one segment that shares negatives, of
    K (4 D + 48), 1.07 GB for all of 1 M items at D 256: the bound is the larger of the two numbers, whatever N is.
    """
    inputs, device = work.inputs, d_table.device
    n_columns, n_items = inputs.n_columns, inputs.n_items
    limits = torch.arange(n_items + 1, dtype=torch.int32, device=device)
    if inputs.sharing == "position":
        height = max(1, DETERMINISTIC_BYTES // (_BYTES_PER_PAIR * n_columns))
        for first in range(0, work.m, height):
            last = min(first + height, work.m)
            # places past the last kept position keep the id V, which no row of the gradient asks for
            ids = torch.full((last - first, n_columns), n_items, dtype=torch.int32, device=device)
            weights = torch.zeros(ids.shape, dtype=torch.float32, device=device)
            plan_position_backward(work, d_hidden, None, (ids, weights), first, last).run()
            order, bounds = _sort_by_item(ids, limits)
            plan_sum_rows(
                inputs.hidden,
                order,
                bounds,
                d_table,
                dtype=work.dot,
                weights=weights,
                index=work.index,
                first_row=first,
                entries_per_row=n_columns,
            ).run()
    else:
        if d_hidden is not None:
            plan_tile_hidden(work, d_hidden).run()
        _, n_segments = segments(work)
        height = max(1, DETERMINISTIC_BYTES // (n_columns * (4 * inputs.width + _BYTES_PER_PAIR)))
        for first in range(0, n_segments, height):
            here = min(height, n_segments - first)
            ids = torch.full((here, n_columns), n_items, dtype=torch.int32, device=device)
            rows = torch.empty(here * n_columns, inputs.width, dtype=torch.float32, device=device)
            plan_tile_table(work, None, (ids, rows), first, here).run()
            order, bounds = _sort_by_item(ids, limits)
            plan_sum_rows(rows, order, bounds, d_table, dtype=rows.dtype).run()
    assert work.d_loss is not None
    assert work.d_lse is not None
    sorted_targets, order = _sort_targets(work)
    bounds = torch.searchsorted(sorted_targets, limits)
    weights = work.d_lse * torch.sigmoid(-work.margin) - work.d_loss * torch.sigmoid(work.margin)
    # weights lie at the places given, entries of the order in that of the kept positions
    weights, index = weights[work.index], work.index
    plan_sum_rows(inputs.hidden, order, bounds, d_table, dtype=work.dot, weights=weights, index=index).run()


def _sort_by_item(ids: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Entries in the order of a stable sort by item, and the bounds (V + 1,) of each item's entries."""
    sorted_ids, order = torch.sort(ids.view(-1), stable=True)
    return order, torch.searchsorted(sorted_ids, limits)


def _sort_targets(work: Pass) -> tuple[Tensor, Tensor]:
    """Targets of the kept positions in ascending order, V behind them, and the positions in that order."""
    position = torch.arange(work.m, device=work.index.device)
    targets = torch.where(position < work.count, work.inputs.targets[work.index], work.inputs.n_items)
    return torch.sort(targets.to(torch.int32), stable=True)
