"""The launches of the Triton path: grids, block sizes, arguments and dtypes of every kernel.

Functions here read shapes, strides and dtypes, and no values, so they plan on tensors of the meta device too.

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
from kernels.cce_minus.launch_settings import Settings, block_width, settings_for, widest_block
from kernels.cce_minus.triton_position import position_backward_kernel, position_forward_kernel
from kernels.cce_minus.triton_rows import shuffle_keys_kernel
from kernels.cce_minus.triton_table_rows import add_positives_kernel, sum_rows_kernel
from kernels.cce_minus.triton_tile import tile_forward_kernel, tile_hidden_kernel, tile_table_kernel
from kernels.launch import Launch

INTERPRETED = not isinstance(position_forward_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET=1 was set when the kernels were imported."""

# Positions that one program of the table's gradient may walk over, before a group is cut into segments.
LARGEST_TILE = 2048
# Programs that fill the largest chips several times.
PROGRAMS = 1024
# Sorted positions that one program adds to their targets' rows.
_RUN = 64

_SOURCES = {"uniform": 0, "alias": 1, "given": 2, "every item": 3}
_CORRECTIONS = {"logq": 0, "none": 1, "improved_logq": 2, "classic_logq": 3}
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_TRITON_DTYPES = {
    torch.float32: triton.language.float32,
    torch.bfloat16: triton.language.bfloat16,
    torch.float16: triton.language.float16,
}


@dataclass(frozen=True, eq=False, kw_only=True)
class Pass:
    """What all launches of one forward or backward pass read.

    Args:
        inputs: Checked arguments with M flat targets.
        arch: Name of the chip, see `settings_for`.
        index: (M,) int64, a permutation of the places whose first N entries are the kept ones, shuffled for tiles.
        count: (1,) int64, N.
        margin: (M,) fp32, log of the negatives' part of the denominator less the positive logit, at the places given.
        shift: (M,) fp32, with p_k = exp(z_k - log q_k - shift), likewise.
        direction: (M, D) fp32, sum_k p_k c_k in the order of `index`, where negatives are shared and it is needed.
        d_loss: (M,) fp32 upstream gradient of the loss; None in the forward pass.
        d_lse: (M,) fp32 upstream gradient of the log-sum-exp; None in the forward pass.
    """

    inputs: LossInputs
    arch: str
    index: Tensor
    count: Tensor
    margin: Tensor
    shift: Tensor
    direction: Tensor
    d_loss: Tensor | None = None
    d_lse: Tensor | None = None

    @property
    def m(self) -> int:
        """M."""
        return self.inputs.targets.shape[0]

    @property
    def group(self) -> int:
        """Positions that share a row of negatives."""
        return self.inputs.tile_size if self.inputs.sharing == "tile" else self.m

    @property
    def dot(self) -> torch.dtype:
        """Dtype in which a position meets a row of the table: per position, nothing is rounded.

        For matrix products it is autocast's if that is on, the inputs' if they agree, else fp32.
        """
        hidden, table = self.inputs.hidden.dtype, self.inputs.table.dtype
        if self.inputs.sharing == "position":
            return hidden
        return self.inputs.autocast or (hidden if hidden == table else torch.float32)

    @property
    def product(self) -> str:
        """Name of that dtype in the table of settings."""
        if self.inputs.sharing == "position":
            return _NAMES[self.inputs.table.dtype]
        allows_tf32 = str(torch.backends.cuda.matmul.fp32_precision) == "tf32" and self.arch.startswith("sm_")
        return "tf32" if self.dot == torch.float32 and allows_tf32 else _NAMES[self.dot]

    @property
    def block_width(self) -> int:
        """Width of a block of D."""
        kernel = "position" if self.inputs.sharing == "position" else "tile"
        return block_width(self.inputs.width, widest_block(kernel, self.product))

    def settings(self, kernel: str) -> Settings:
        """Block sizes of a kernel in this pass."""
        return settings_for(kernel, self.arch, self.inputs.width, self.product, self.m)


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


def plan_forward(work: Pass, loss: Tensor, lse: Tensor) -> Launch:
    """Loss and log-sum-exp, and what the backward pass needs of them."""
    outputs = {"loss": loss, "lse": lse, "margin": work.margin, "shift": work.shift}
    w = work.block_width
    if work.inputs.sharing == "position":
        s = work.settings("position_forward")
        arguments = _rows(work) | outputs | {"first_position": 0, "last_position": work.m}
        constants = _row_constants(work) | {"B": s.b, "C": s.c, "W": w}
        grid = triton.cdiv(work.m, s.b)
        return Launch(position_forward_kernel, grid, arguments, constants, s.num_warps, s.num_stages)
    s = work.settings("tile_forward")
    b = min(s.b, block_width(work.group))
    blocks_per_group = triton.cdiv(work.group, b)
    needs_direction = work.direction.numel() > 0
    arguments = _rows(work) | outputs
    arguments |= {"direction": work.direction, "group": work.group, "blocks_per_group": blocks_per_group}
    constants = _row_constants(work) | _dot_constants(work)
    constants |= {"NEEDS_DIRECTION": needs_direction, "B": b, "C": s.c, "W": w}
    n_blocks = triton.cdiv(work.inputs.width, w) if needs_direction else 1
    grid = triton.cdiv(work.m, work.group) * blocks_per_group * n_blocks
    return Launch(tile_forward_kernel, grid, arguments, constants, s.num_warps, s.num_stages)


def plan_backward(work: Pass, d_hidden: Tensor | None, d_table: Tensor | None) -> Iterator[Launch]:
    """Gradients, with atomic row-adds, of all but the positives' rows of the table."""
    if work.inputs.sharing == "position":
        yield plan_position_backward(work, d_hidden, d_table, None, 0, work.m)
        return
    if d_hidden is not None:
        yield plan_tile_hidden(work, d_hidden)
    if d_table is not None:
        yield plan_tile_table(work, d_table, None, 0, segments(work)[1])


def plan_position_backward(
    work: Pass,
    d_hidden: Tensor | None,
    d_table: Tensor | None,
    pairs: tuple[Tensor, Tensor] | None,
    first: int,
    last: int,
) -> Launch:
    """Gradients of positions first..last - 1, and of the table by row-adds or as listed (id, weight) pairs."""
    s = work.settings("position_backward")
    w = work.block_width
    arguments = _rows(work) | _upstream(work)
    arguments |= {
        "shift": work.shift,
        "d_hidden": d_hidden,
        "d_table": d_table,
        "pair_ids": None if pairs is None else pairs[0],
        "pair_weights": None if pairs is None else pairs[1],
        "first_position": first,
        "last_position": last,
    }
    table = "add" if d_table is not None else "list" if pairs is not None else ""
    constants = _row_constants(work)
    constants |= {"NEEDS_HIDDEN": d_hidden is not None, "TABLE": table, "B": s.b, "C": s.c, "W": w}
    grid = triton.cdiv(last - first, s.b) * triton.cdiv(work.inputs.width, w)
    return Launch(position_backward_kernel, grid, arguments, constants, s.num_warps, s.num_stages)


def plan_tile_hidden(work: Pass, d_hidden: Tensor) -> Launch:
    """Gradient of the positions from their directions."""
    table, width, b = work.inputs.table, work.inputs.width, 16
    w = work.block_width
    arguments = _upstream(work) | {
        "table": table,
        "stride_tv": table.stride(0),
        "stride_td": table.stride(1),
        "targets": work.inputs.targets,
        "index": work.index,
        "count": work.count,
        "direction": work.direction,
        "d_hidden": d_hidden,
        "n_positions": work.m,
    }
    constants = {"D": width, "DOT": _TRITON_DTYPES[work.dot], "B": b, "W": w}
    return Launch(tile_hidden_kernel, triton.cdiv(work.m, b) * triton.cdiv(width, w), arguments, constants)


def plan_tile_table(
    work: Pass, d_table: Tensor | None, rows: tuple[Tensor, Tensor] | None, first_segment: int, n_segments: int
) -> Launch:
    """Gradient of the table from shared negatives: added to `d_table`, or listed as (ids, gradient) rows."""
    s = work.settings("tile_table")
    segment, _ = segments(work)
    w = work.block_width
    arguments = _rows(work) | _upstream(work)
    arguments |= {
        "shift": work.shift,
        "d_table": d_table,
        "row_ids": None if rows is None else rows[0],
        "row_gradients": None if rows is None else rows[1],
        "group": work.group,
        "segment": segment,
        "segments_per_group": triton.cdiv(work.group, segment),
        "first_segment": first_segment,
    }
    constants = _row_constants(work) | _dot_constants(work)
    constants |= {"TABLE": "list" if d_table is None else "add", "B": min(s.b, block_width(segment)), "C": s.c, "W": w}
    grid = n_segments * triton.cdiv(work.inputs.n_columns, s.c) * triton.cdiv(work.inputs.width, w)
    return Launch(tile_table_kernel, grid, arguments, constants, s.num_warps, s.num_stages)


def plan_positives(work: Pass, sorted_targets: Tensor, order: Tensor, d_table: Tensor) -> Launch:
    """Positions added to their targets' rows, one atomic row-add per run of equal targets."""
    width, w = work.inputs.width, work.block_width
    arguments = _hidden(work) | _upstream(work)
    arguments |= {
        "sorted_targets": sorted_targets,
        "order": order,
        "index": work.index,
        "d_table": d_table,
        "n_items": work.inputs.n_items,
        "n_entries": work.m,
    }
    constants = {"D": width, "DOT": _TRITON_DTYPES[work.dot], "RUN": _RUN, "W": w}
    grid = triton.cdiv(work.m, _RUN) * triton.cdiv(width, w)
    return Launch(add_positives_kernel, grid, arguments, constants, num_warps=1)


def plan_sum_rows(
    source: Tensor,
    order: Tensor,
    bounds: Tensor,
    d_table: Tensor,
    *,
    dtype: torch.dtype,
    weights: Tensor | None = None,
    index: Tensor | None = None,
    first_row: int = 0,
    entries_per_row: int = 1,
) -> Launch:
    """Rows of `source`, rounded to `dtype`, summed into their items' rows in the order of a sort: `sum_rows_kernel`."""
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
    constants = {"D": width, "DOT": _TRITON_DTYPES[dtype], "B": 8, "W": w}
    constants |= {"HAS_WEIGHTS": weights is not None, "HAS_INDEX": index is not None}
    return Launch(sum_rows_kernel, n_items * triton.cdiv(width, w), arguments, constants, num_warps=2)


def segments(work: Pass) -> tuple[int, int]:
    """Positions of a segment, and the number of segments.

    A tile is one segment, so that each of its negatives costs one row-add. A batch is cut, or a few programs would
    have to walk over all of it.
    """
    segment, n_groups = work.group, triton.cdiv(work.m, work.group)
    if work.inputs.sharing == "batch" or work.group > LARGEST_TILE:
        programs = triton.cdiv(work.inputs.n_columns, work.settings("tile_table").c) * n_groups
        segment = min(work.group, triton.cdiv(triton.cdiv(work.group * programs, PROGRAMS), 128) * 128)
    return segment, n_groups * triton.cdiv(work.group, segment)


def _hidden(work: Pass) -> dict[str, Any]:
    hidden = work.inputs.hidden
    return {"hidden": hidden, "stride_hm": hidden.stride(0), "stride_hd": hidden.stride(1)}


def _upstream(work: Pass) -> dict[str, Any]:
    return {"d_loss": work.d_loss, "d_lse": work.d_lse, "margin": work.margin}


def _rows(work: Pass) -> dict[str, Any]:
    """Arguments that every kernel over positions and negatives reads."""
    inputs = work.inputs
    table, given = inputs.table, inputs.negatives
    return _hidden(work) | {
        "table": table,
        "stride_tv": table.stride(0),
        "stride_td": table.stride(1),
        "targets": inputs.targets,
        "index": work.index,
        "count": work.count,
        "stream": inputs.stream,
        "threshold": inputs.threshold,
        "alias": inputs.alias,
        "given": given,
        "stride_gr": 0 if given is None else given.stride(0),
        "stride_gk": 0 if given is None else given.stride(1),
        "log_q": None if inputs.correction == "none" else inputs.log_q,
        "n_items": inputs.n_items,
        "n_columns": inputs.n_columns,
    }


def _row_constants(work: Pass) -> dict[str, Any]:
    inputs = work.inputs
    return {
        "D": inputs.width,
        "SOURCE": _SOURCES[inputs.source],
        "CORRECTION": _CORRECTIONS[inputs.correction],
        "HAS_LOG_Q": inputs.log_q is not None and inputs.correction != "none",
    }


def _dot_constants(work: Pass) -> dict[str, Any]:
    """How operands are multiplied; products of 16-bit numbers are exact in fp32, whatever the precision."""
    precision, weights = {
        "bf16": ("ieee", "split_bf16"),
        "fp16": ("ieee", "tf32x3" if work.arch.startswith("sm_") else "ieee"),  # fp16 is no sum of two bf16
        "tf32": ("tf32", "tf32"),
        "fp32": ("ieee", "ieee"),
    }[work.product]
    dot = _TRITON_DTYPES[work.dot]
    return {"DOT": dot, "PRECISION": precision, "WEIGHTS": weights, "INTERPRETED": INTERPRETED}
