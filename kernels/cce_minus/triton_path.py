"""Forward and backward of CCE- by Triton kernels: lists the kept positions on the device, plans launches, starts them.

Nothing is read on the host, so the path runs inside CUDA graphs: the number of kept positions stays on the device,
grids are sized for all positions given, and programs beyond the last kept one return at once.

Letters: M positions as given, N kept positions, D width, V items, K negatives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.cce_minus.arguments import LossInputs
from kernels.cce_minus.launch_settings import block_width, settings_for
from kernels.cce_minus.triton_position import position_backward_kernel, position_forward_kernel
from kernels.cce_minus.triton_rows import shuffle_keys_kernel
from kernels.cce_minus.triton_table_rows import add_positives_kernel, sum_rows_kernel
from kernels.cce_minus.triton_tile import tile_forward_kernel, tile_hidden_kernel, tile_table_kernel
from kernels.launch import Launch

INTERPRETED = not isinstance(position_forward_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET=1 was set when the kernels were imported."""

DETERMINISTIC_BYTES = 256 << 20
"""Scratch of a deterministic backward pass: pairs or rows of one chunk, with the buffers of their sort."""

_BYTES_PER_PAIR = 48  # id, weight, sorted id, order, and as much again inside the sort
_SOURCES = {"uniform": 0, "alias": 1, "given": 2, "every item": 3}
_CORRECTIONS = {"logq": 0, "none": 1, "improved_logq": 2, "classic_logq": 3}
# Positions that one program of the table's gradient walks over, where a group is larger than any tile.
_LARGEST_TILE = 2048
_PROGRAMS = 1024  # enough to fill the largest chips several times
_TEXT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True, eq=False)
class KeptRows:
    """Where the kept positions are.

    Args:
        index: (M,) int64, a permutation of the places whose first N entries are the kept ones, shuffled for tiles.
        count: (1,) int64, N.
    """

    index: Tensor
    count: Tensor


@dataclass(frozen=True, eq=False)
class Saved:
    """What the backward pass needs of the forward pass.

    Args:
        margin: (M,) fp32 at the places given.
        shift: (M,) fp32 likewise.
        direction: (M, D) fp32 in the order of the kept positions where negatives are shared, else empty.
    """

    margin: Tensor
    shift: Tensor
    direction: Tensor


def triton_forward(inputs: LossInputs, *, needs_direction: bool) -> tuple[Tensor, Tensor, Saved]:
    """Loss and log-sum-exp at every place given, 0 at those not kept.

    Args:
        inputs: Checked arguments.
        needs_direction: Whether the gradient of the positions will be asked for; read where negatives are shared.

    Returns:
        loss and lse, (M,) fp32, and what the backward pass needs.
    """
    m = inputs.targets.shape[0]
    loss, lse, margin, shift = (inputs.hidden.new_zeros(m, dtype=torch.float32) for _ in range(4))
    direction = inputs.hidden.new_zeros(
        (m, inputs.width) if needs_direction and inputs.sharing != "position" else (0,), dtype=torch.float32
    )
    saved = Saved(margin, shift, direction)
    if m:
        kept = list_kept(inputs)
        for launch in plan_forward(inputs, kept, loss, lse, saved, architecture(inputs.hidden)):
            launch.run()
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
        kept = list_kept(inputs)
        upstream = (d_loss.contiguous(), d_lse.contiguous())
        arch = architecture(hidden)
        if deterministic and d_table is not None:
            _deterministic_backward(upstream, inputs, kept, saved, d_hidden, d_table, arch)
        else:
            for launch in plan_backward(upstream, inputs, kept, saved, d_hidden, d_table, arch):
                launch.run()
            if d_table is not None:
                sorted_targets, order = _sort_targets(inputs, kept)
                plan_positives(upstream, inputs, kept, saved, sorted_targets, order, d_table).run()
    return d_hidden, None if d_table is None else d_table.to(table.dtype)


def list_kept(inputs: LossInputs) -> KeptRows:
    """List the kept positions by a prefix sum on the device; dropped ones follow, so that every place is named once."""
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
    return KeptRows(index, count)


def architecture(tensor: Tensor) -> str:
    """Name of the chip a tensor lies on, as the table of settings knows it."""
    if INTERPRETED:
        return "interpreter"
    properties = torch.cuda.get_device_properties(tensor.device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def plan_shuffle(stream: Tensor, count: Tensor, keys: Tensor) -> Launch:
    """Sort keys of the shuffled order, (M,) int64."""
    m = keys.shape[0]
    arguments: dict[str, Any] = {"stream": stream, "count": count, "keys": keys, "n_positions": m}
    return Launch(shuffle_keys_kernel, triton.cdiv(m, 1024), arguments, {"C": 1024})


def plan_forward(
    inputs: LossInputs, kept: KeptRows, loss: Tensor, lse: Tensor, saved: Saved, arch: str
) -> Iterator[Launch]:
    """Launches of the forward pass."""
    m, width = inputs.hidden.shape
    outputs = {"loss": loss, "lse": lse, "margin": saved.margin, "shift": saved.shift}
    arguments, constants = _row_arguments(inputs, kept), _row_constants(inputs)
    w = block_width(width)
    if inputs.sharing == "position":
        s = settings_for("position_forward", arch, width, _TEXT[inputs.table.dtype], m)
        arguments |= outputs | {"first_position": 0, "last_position": m}
        constants |= {"B": s.b, "C": s.c, "W": w}
        yield Launch(
            position_forward_kernel, triton.cdiv(m, s.b), arguments, constants, s.num_warps, s.num_stages
        )  # fmt: skip
        return
    needs_direction = saved.direction.numel() > 0
    dot = dot_dtype(inputs)
    s = settings_for("tile_forward", arch, width, product_name(dot, arch), m)
    group = _group(inputs)
    b = min(s.b, block_width(group))
    blocks_per_group = triton.cdiv(group, b)
    n_blocks = triton.cdiv(width, w) if needs_direction else 1
    arguments |= outputs | {"direction": saved.direction, "group": group, "blocks_per_group": blocks_per_group}
    constants |= _dot_constants(dot, arch) | {"NEEDS_DIRECTION": needs_direction, "B": b, "C": s.c, "W": w}
    grid = triton.cdiv(m, group) * blocks_per_group * n_blocks
    yield Launch(tile_forward_kernel, grid, arguments, constants, s.num_warps, s.num_stages)


def plan_backward(
    upstream: tuple[Tensor, Tensor],
    inputs: LossInputs,
    kept: KeptRows,
    saved: Saved,
    d_hidden: Tensor | None,
    d_table: Tensor | None,
    arch: str,
) -> Iterator[Launch]:
    """Launches of the backward pass but for the positives' rows of the table, with atomic row-adds."""
    if inputs.sharing == "position":
        yield plan_position_backward(
            upstream, inputs, kept, saved, d_hidden, d_table, None, (0, inputs.targets.shape[0]), arch
        )
        return
    if d_hidden is not None:
        yield _plan_tile_hidden(upstream, inputs, kept, saved, d_hidden)
    if d_table is not None:
        yield plan_tile_table(upstream, inputs, kept, saved, d_table, None, 0, _segments(inputs, arch)[1], arch)


def plan_positives(
    upstream: tuple[Tensor, Tensor],
    inputs: LossInputs,
    kept: KeptRows,
    saved: Saved,
    sorted_targets: Tensor,
    order: Tensor,
    d_table: Tensor,
) -> Launch:
    """Positions added to their targets' rows, one atomic row-add per run of equal targets."""
    m, width = inputs.hidden.shape
    w, run = block_width(width), 64
    arguments: dict[str, Any] = {
        **_hidden_arguments(inputs.hidden),
        "sorted_targets": sorted_targets,
        "order": order,
        "index": kept.index,
        "d_loss": upstream[0],
        "d_lse": upstream[1],
        "margin": saved.margin,
        "d_table": d_table,
        "n_items": inputs.n_items,
        "n_entries": m,
    }
    grid = triton.cdiv(m, run) * triton.cdiv(width, w)
    constants = {"D": width, "DOT": _triton_dtype(_position_dtype(inputs)), "RUN": run, "W": w}
    return Launch(add_positives_kernel, grid, arguments, constants, num_warps=1)


def plan_tile_table(
    upstream: tuple[Tensor, Tensor],
    inputs: LossInputs,
    kept: KeptRows,
    saved: Saved,
    d_table: Tensor | None,
    rows: tuple[Tensor, Tensor] | None,
    first_segment: int,
    n_segments: int,
    arch: str,
) -> Launch:
    """Gradient of the table from shared negatives: added to `d_table`, or listed as (ids, gradient) rows."""
    m, width = inputs.hidden.shape
    dot = dot_dtype(inputs)
    s = settings_for("tile_table", arch, width, product_name(dot, arch), m)
    segment, _ = _segments(inputs, arch)
    group, w = _group(inputs), block_width(width)
    arguments = _row_arguments(inputs, kept) | {
        "d_loss": upstream[0],
        "d_lse": upstream[1],
        "margin": saved.margin,
        "shift": saved.shift,
        "d_table": d_table,
        "row_ids": None if rows is None else rows[0],
        "row_gradients": None if rows is None else rows[1],
        "group": group,
        "segment": segment,
        "segments_per_group": triton.cdiv(group, segment),
        "first_segment": first_segment,
    }
    table = "list" if d_table is None else "add"
    b = min(s.b, block_width(segment))
    constants = _row_constants(inputs) | _dot_constants(dot, arch) | {"TABLE": table, "B": b, "C": s.c, "W": w}
    grid = n_segments * triton.cdiv(inputs.n_columns, s.c) * triton.cdiv(width, w)
    return Launch(tile_table_kernel, grid, arguments, constants, s.num_warps, s.num_stages)


def plan_sum_rows(
    source: Tensor,
    order: Tensor,
    bounds: Tensor,
    weights: Tensor | None,
    index: Tensor | None,
    d_table: Tensor,
    first_row: int,
    entries_per_row: int,
    dtype: torch.dtype,
) -> Launch:
    """Rows of `source`, rounded to `dtype`, summed into their items' rows of `d_table` in the order of a sort."""
    n_items, width = d_table.shape
    w = min(128, block_width(width))
    arguments: dict[str, Any] = {
        "source": source,
        "stride_sm": source.stride(0),
        "stride_sd": source.stride(1),
        "order": order,
        "bounds": bounds,
        "weights": weights,
        "index": index,
        "d_table": d_table,
        "first_row": first_row,
        "entries_per_row": entries_per_row,
    }
    constants = {
        "D": width,
        "DOT": _triton_dtype(dtype),
        "HAS_WEIGHTS": weights is not None,
        "HAS_INDEX": index is not None,
        "B": 8,
        "W": w,
    }
    return Launch(sum_rows_kernel, n_items * triton.cdiv(width, w), arguments, constants, num_warps=2)


def _deterministic_backward(
    upstream: tuple[Tensor, Tensor],
    inputs: LossInputs,
    kept: KeptRows,
    saved: Saved,
    d_hidden: Tensor | None,
    d_table: Tensor,
    arch: str,
) -> None:
    """Backward pass without atomics: rows of the table's gradient are listed, sorted by item and summed in order.

    Chunks are cut by the number of positions given, which the host knows; their scratch stays within a byte budget
    whatever N and K are.
    """
    m, n_columns = inputs.targets.shape[0], inputs.n_columns
    limits = torch.arange(inputs.n_items + 1, dtype=torch.int32, device=d_table.device)
    if inputs.sharing == "position":
        height = max(1, DETERMINISTIC_BYTES // (_BYTES_PER_PAIR * n_columns))
        for first in range(0, m, height):
            last = min(first + height, m)
            # places past the last kept position keep the id V, which no row of the gradient asks for
            ids = torch.full((last - first, n_columns), inputs.n_items, dtype=torch.int32, device=d_table.device)
            weights = torch.zeros(ids.shape, dtype=torch.float32, device=d_table.device)
            plan_position_backward(
                upstream, inputs, kept, saved, d_hidden, None, (ids, weights), (first, last), arch
            ).run()
            bounds, order = _sort_by_item(ids, limits)
            plan_sum_rows(
                inputs.hidden, order, bounds, weights, kept.index, d_table, first, n_columns, inputs.hidden.dtype
            ).run()
    else:
        if d_hidden is not None:
            _plan_tile_hidden(upstream, inputs, kept, saved, d_hidden).run()
        _, n_segments = _segments(inputs, arch)
        height = max(1, DETERMINISTIC_BYTES // (n_columns * (4 * inputs.width + _BYTES_PER_PAIR)))
        for first in range(0, n_segments, height):
            here = min(height, n_segments - first)
            ids = torch.full((here, n_columns), inputs.n_items, dtype=torch.int32, device=d_table.device)
            rows = torch.empty(here * n_columns, inputs.width, dtype=torch.float32, device=d_table.device)
            plan_tile_table(upstream, inputs, kept, saved, None, (ids, rows), first, here, arch).run()
            bounds, order = _sort_by_item(ids, limits)
            plan_sum_rows(rows, order, bounds, None, None, d_table, 0, 1, rows.dtype).run()
    sorted_targets, order = _sort_targets(inputs, kept)
    bounds = torch.searchsorted(sorted_targets, limits)
    weights = upstream[1] * torch.sigmoid(-saved.margin) - upstream[0] * torch.sigmoid(saved.margin)
    plan_sum_rows(
        inputs.hidden, order, bounds, weights[kept.index], kept.index, d_table, 0, 1, _position_dtype(inputs)
    ).run()


def _sort_by_item(ids: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds (V + 1,) of each item's entries and the entries in the order of a stable sort."""
    sorted_ids, order = torch.sort(ids.view(-1), stable=True)
    return torch.searchsorted(sorted_ids, limits), order


def _sort_targets(inputs: LossInputs, kept: KeptRows) -> tuple[Tensor, Tensor]:
    """Targets of the kept positions in ascending order, V behind them, and the positions in that order."""
    position = torch.arange(inputs.targets.shape[0], device=inputs.targets.device)
    targets = torch.where(position < kept.count, inputs.targets[kept.index], inputs.n_items)
    return torch.sort(targets.to(torch.int32), stable=True)


def plan_position_backward(
    upstream: tuple[Tensor, Tensor],
    inputs: LossInputs,
    kept: KeptRows,
    saved: Saved,
    d_hidden: Tensor | None,
    d_table: Tensor | None,
    pairs: tuple[Tensor, Tensor] | None,
    positions: tuple[int, int],
    arch: str,
) -> Launch:
    """Gradients of per-position negatives: of the positions, and of the table by adds or as listed pairs."""
    m, width = inputs.hidden.shape
    s = settings_for("position_backward", arch, width, _TEXT[inputs.table.dtype], m)
    arguments = _row_arguments(inputs, kept) | {
        "d_loss": upstream[0],
        "d_lse": upstream[1],
        "margin": saved.margin,
        "shift": saved.shift,
        "d_hidden": d_hidden,
        "d_table": d_table,
        "pair_ids": None if pairs is None else pairs[0],
        "pair_weights": None if pairs is None else pairs[1],
        "first_position": positions[0],
        "last_position": positions[1],
    }
    table = "add" if d_table is not None else "list" if pairs is not None else ""
    w = block_width(width)
    constants = _row_constants(inputs) | {
        "NEEDS_HIDDEN": d_hidden is not None,
        "TABLE": table,
        "B": s.b,
        "C": s.c,
        "W": w,
    }
    grid = triton.cdiv(positions[1] - positions[0], s.b) * triton.cdiv(width, w)
    return Launch(position_backward_kernel, grid, arguments, constants, s.num_warps, s.num_stages)


def _plan_tile_hidden(
    upstream: tuple[Tensor, Tensor], inputs: LossInputs, kept: KeptRows, saved: Saved, d_hidden: Tensor
) -> Launch:
    m, width = inputs.hidden.shape
    table, w, b = inputs.table, block_width(width), 16
    arguments: dict[str, Any] = {
        "table": table,
        "stride_tv": table.stride(0),
        "stride_td": table.stride(1),
        "targets": inputs.targets,
        "index": kept.index,
        "count": kept.count,
        "d_loss": upstream[0],
        "d_lse": upstream[1],
        "margin": saved.margin,
        "direction": saved.direction,
        "d_hidden": d_hidden,
        "n_positions": m,
    }
    constants = {"D": width, "DOT": _triton_dtype(dot_dtype(inputs)), "B": b, "W": w}
    return Launch(tile_hidden_kernel, triton.cdiv(m, b) * triton.cdiv(width, w), arguments, constants)


def _row_arguments(inputs: LossInputs, kept: KeptRows) -> dict[str, Any]:
    """Arguments that every kernel over positions and negatives reads."""
    table, given = inputs.table, inputs.negatives
    return {
        **_hidden_arguments(inputs.hidden),
        "table": table,
        "stride_tv": table.stride(0),
        "stride_td": table.stride(1),
        "targets": inputs.targets,
        "index": kept.index,
        "count": kept.count,
        "stream": inputs.stream,
        "threshold": inputs.threshold,
        "alias": inputs.alias,
        "given": given,
        "stride_gr": 0 if given is None else given.stride(0),
        "stride_gk": 0 if given is None else given.stride(1),
        "log_q": _correcting_log_q(inputs),
        "n_items": inputs.n_items,
        "n_columns": inputs.n_columns,
    }


def _hidden_arguments(hidden: Tensor) -> dict[str, Any]:
    return {"hidden": hidden, "stride_hm": hidden.stride(0), "stride_hd": hidden.stride(1)}


def _row_constants(inputs: LossInputs) -> dict[str, Any]:
    return {
        "D": inputs.width,
        "SOURCE": _SOURCES[inputs.source],
        "CORRECTION": _CORRECTIONS[inputs.correction],
        "HAS_LOG_Q": _correcting_log_q(inputs) is not None,
    }


def _correcting_log_q(inputs: LossInputs) -> Tensor | None:
    return None if inputs.correction == "none" else inputs.log_q


def _group(inputs: LossInputs) -> int:
    """Positions that share a row of negatives."""
    return inputs.tile_size if inputs.sharing == "tile" else inputs.targets.shape[0]


def _segments(inputs: LossInputs, arch: str) -> tuple[int, int]:
    """Positions of a segment, and the number of segments.

    A tile is one segment, so that each of its negatives costs one row-add. A batch is cut, or a few programs would
    have to walk over all of it.
    """
    m, group = inputs.targets.shape[0], _group(inputs)
    segment = group
    if inputs.sharing == "batch" or group > _LARGEST_TILE:
        c = settings_for("tile_table", arch, inputs.width, product_name(dot_dtype(inputs), arch), m).c
        column_blocks = triton.cdiv(inputs.n_columns, c) * triton.cdiv(m, group)
        segment = min(group, triton.cdiv(triton.cdiv(group * column_blocks, _PROGRAMS), 128) * 128)
    return segment, triton.cdiv(m, group) * triton.cdiv(group, segment)


def dot_dtype(inputs: LossInputs) -> torch.dtype:
    """Dtype of the operands of matrix products: autocast's if it is on, the inputs' if they agree, else fp32."""
    if inputs.autocast is not None:
        return inputs.autocast
    return inputs.hidden.dtype if inputs.hidden.dtype == inputs.table.dtype else torch.float32


def _position_dtype(inputs: LossInputs) -> torch.dtype:
    """Dtype in which a position met its target's row: per position nothing is rounded."""
    return inputs.hidden.dtype if inputs.sharing == "position" else dot_dtype(inputs)


def product_name(dot: torch.dtype, arch: str) -> str:
    """Name of the operands' dtype in the table of settings."""
    if dot == torch.float32 and _tf32_allowed() and arch.startswith("sm_"):
        return "tf32"
    return _TEXT[dot]


def _dot_constants(dot: torch.dtype, arch: str) -> dict[str, Any]:
    """How operands are multiplied; products of 16-bit numbers are exact in fp32, whatever the precision."""
    match product_name(dot, arch):
        case "bf16":
            precision, weights = "ieee", "split_bf16"
        case "fp16":
            # fp16 is no sum of two bf16; three tf32 products are as good as fp32 ones and stay on tensor cores
            precision, weights = "ieee", "tf32x3" if arch.startswith("sm_") else "ieee"
        case name:
            precision = weights = "tf32" if name == "tf32" else "ieee"
    return {"DOT": _triton_dtype(dot), "PRECISION": precision, "WEIGHTS": weights, "INTERPRETED": INTERPRETED}


def _tf32_allowed() -> bool:
    """Whether torch may round the operands of fp32 matrix products to tf32."""
    return str(torch.backends.cuda.matmul.fp32_precision) == "tf32"


def _triton_dtype(dtype: torch.dtype) -> Any:
    return getattr(triton.language, {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[_TEXT[dtype]])
