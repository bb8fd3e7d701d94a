"""The released design of CCE- as Triton kernels of our own: a rival for `bench_cce_minus.py`, never used in training.

Written from a description of the authors' release (arXiv 2509.09682), to be exact in what it computes and where its
time and memory go. A row of S = K + 1 columns holds the target, then the negatives:

    loss_i = log sum_s exp(z_is + a_s) - z_i0,    a_0 = 0,    a_s = log(V - 1) - log(K + 1) for s >= 1

What it does otherwise than `kernels.cce_minus`, kept because the published figures carry it:

* the correction divides by K + 1, and not by the number of negatives that were kept;
* a draw that equals its target gets the id V. Its row reads as zeros and its column stays in the sum as the constant
  (V - 1) / (K + 1), without a gradient;
* both inputs are cast to fp16 whatever they were, and both gradients are summed in fp16 by atomics: terms far below a
  partial sum are lost, and under a mean over many positions most terms underflow;
* ids are int64 in memory: drawn, compared and concatenated.

    forward    one program per 32 rows, 16 warps, a loop over single columns that loads the positions anew each time
    positive   a kernel of its own: 128 rows x 256 columns of D per program, added atomically over blocks of D
    backward   one program per 32 rows and column: gathers and multiplies again, one atomic row-add into each gradient

Letters: N positions, D width, V items, K negatives, S columns.
"""

# ruff: noqa: ANN001, ANN201 -- device functions: what an argument is, Triton decides at compile time

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Launch

ROWS, WARPS = 32, 16
_DOT_ROWS, _DOT_WIDTH = 128, 256


@triton.jit
def indexed_dot_kernel(
    hidden, table, columns, positive, n_positions, n_columns, D: tl.constexpr, B: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """Add the products of one block of D to the logits of the targets."""
    n_blocks: tl.constexpr = (D + W - 1) // W
    block = tl.program_id(0).to(tl.int64)
    row = block // n_blocks * B + tl.arange(0, B)
    d = (block % n_blocks).to(tl.int32) * W + tl.arange(0, W)
    mask = (row < n_positions)[:, None] & (d < D)[None, :]
    item = tl.load(columns + row * n_columns, mask=row < n_positions, other=0)
    e = tl.load(hidden + row[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    c = tl.load(table + item[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.atomic_add(positive + row, tl.sum(e * c, 1), mask=row < n_positions, sem="relaxed")


@triton.jit
def released_forward_kernel(
    hidden, table, columns, lse, n_positions, n_items, n_columns, correction,
    D: tl.constexpr, B: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of every row, one column at a time."""
    row = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    d = tl.arange(0, W)
    valid = row < n_positions
    inside = valid[:, None] & (d < D)[None, :]
    top = tl.full((B,), float("-inf"), tl.float32)
    total = tl.zeros((B,), tl.float32)
    for column in range(0, n_columns):
        e = tl.load(hidden + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        item = tl.load(columns + row * n_columns + column, mask=valid, other=0)
        mask = inside & (item < n_items)[:, None]
        c = tl.load(table + item[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        z = tl.sum(e * c, 1) + tl.where(column > 0, correction, 0.0)
        new_top = tl.maximum(top, z)
        total = total * tl.exp(top - new_top) + tl.exp(z - new_top)
        top = new_top
    tl.store(lse + row, top + tl.log(total), mask=valid)


@triton.jit
def released_backward_kernel(
    hidden, table, columns, lse, d_loss, d_hidden, d_table, n_positions, n_items, n_columns, correction,
    D: tl.constexpr, B: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Both gradients from one column of B rows, added in fp16."""
    n_blocks = (n_positions + B - 1) // B
    block = tl.program_id(0).to(tl.int64)
    column = block // n_blocks
    row = block % n_blocks * B + tl.arange(0, B)
    d = tl.arange(0, W)
    valid = row < n_positions
    inside = valid[:, None] & (d < D)[None, :]
    e = tl.load(hidden + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    item = tl.load(columns + row * n_columns + column, mask=valid, other=0)
    mask = inside & (item < n_items)[:, None]
    c = tl.load(table + item[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    z = tl.sum(e * c, 1) + tl.where(column > 0, correction, 0.0)
    p = tl.exp(z - tl.load(lse + row, mask=valid, other=0.0))
    weight = (p - tl.where(column > 0, 0.0, 1.0)) * tl.load(d_loss + row, mask=valid, other=0.0)
    tl.atomic_add(
        d_hidden + row[:, None] * D + d[None, :], (weight[:, None] * c).to(tl.float16), mask=inside, sem="relaxed"
    )
    tl.atomic_add(
        d_table + item[:, None] * D + d[None, :], (weight[:, None] * e).to(tl.float16), mask=mask, sem="relaxed"
    )


def plan_forward(hidden: Tensor, table: Tensor, columns: Tensor, lse: Tensor, positive: Tensor) -> list[Launch]:
    """Launches that fill `lse` and add to `positive`, both (N,) fp32."""
    n, width = hidden.shape
    rows, constants = _arguments(hidden, table, columns)
    dot = {"hidden": hidden, "table": table, "columns": columns, "positive": positive}
    dot |= {"n_positions": n, "n_columns": columns.shape[1]}
    blocks = triton.cdiv(n, _DOT_ROWS) * triton.cdiv(width, _DOT_WIDTH)
    return [
        Launch(released_forward_kernel, triton.cdiv(n, ROWS), rows | {"lse": lse}, constants, WARPS),
        Launch(indexed_dot_kernel, blocks, dot, {"D": width, "B": _DOT_ROWS, "W": _DOT_WIDTH}, WARPS),
    ]


def plan_backward(
    hidden: Tensor, table: Tensor, columns: Tensor, lse: Tensor, d_loss: Tensor, d_hidden: Tensor, d_table: Tensor
) -> Launch:
    """The launch that adds to both gradients; the release spreads its programs over two axes, here all lie on x."""
    rows, constants = _arguments(hidden, table, columns)
    rows |= {"lse": lse, "d_loss": d_loss, "d_hidden": d_hidden, "d_table": d_table}
    blocks = triton.cdiv(hidden.shape[0], ROWS) * columns.shape[1]
    return Launch(released_backward_kernel, blocks, rows, constants, WARPS)


def _arguments(hidden: Tensor, table: Tensor, columns: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    (n, width), n_items, n_columns = hidden.shape, table.shape[0], columns.shape[1]
    arguments: dict[str, Any] = {"hidden": hidden, "table": table, "columns": columns}
    arguments |= {"n_positions": n, "n_items": n_items, "n_columns": n_columns}
    arguments["correction"] = correction_of(n_items, n_columns)
    return arguments, {"D": width, "B": ROWS, "W": triton.next_power_of_2(width)}


class _ReleasedLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, columns: Tensor) -> Tensor:
        lse = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        positive = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
        for launch in plan_forward(hidden, table, columns, lse, positive):
            launch.run()
        ctx.save_for_backward(hidden, table, columns, lse)
        return lse - positive

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, table, columns, lse = ctx.saved_tensors
        d_hidden, d_table = torch.zeros_like(hidden), torch.zeros_like(table)
        plan_backward(hidden, table, columns, lse, d_loss.float().contiguous(), d_hidden, d_table).run()
        return d_hidden, d_table, None


def correction_of(n_items: int, n_columns: int) -> float:
    """What is added to the logit of every negative: log(V - 1) - log(K + 1)."""
    return math.log(n_items - 1) - math.log(n_columns)


def draw_columns(targets: Tensor, n_items: int, n_negatives: int, seed: int) -> Tensor:
    """Ids (N, K + 1) int64: the targets, then uniform draws, of which those equal to the target become V."""
    generator = torch.Generator(targets.device).manual_seed(seed)
    shape = (targets.shape[0], n_negatives)
    negatives = torch.randint(n_items, shape, generator=generator, device=targets.device)
    rejected = negatives == targets[:, None]
    negatives.masked_fill_(rejected, n_items)
    return torch.cat([targets[:, None], negatives], dim=1)


def released_losses(hidden: Tensor, table: Tensor, columns: Tensor) -> Tensor:
    """Losses (N,) fp32 by the kernels; gradients in fp16, cast back to the dtypes given.

    Args:
        hidden: (N, D) floating point.
        table: (V, D) floating point.
        columns: (N, K + 1) int64, from `draw_columns`.
    """
    return _ReleasedLosses.apply(hidden.half().contiguous(), table.half().contiguous(), columns)


def defined_losses(hidden: Tensor, table: Tensor, columns: Tensor) -> Tensor:
    """The same losses (N,) in plain PyTorch and the dtype given: the inputs are rounded to fp16, nothing else is."""
    hidden, table = (x + (x.detach().half().to(x.dtype) - x.detach()) for x in (hidden, table))
    rows = torch.cat([table, table.new_zeros(1, table.shape[1])])[columns]
    logits = torch.bmm(rows, hidden[:, :, None]).squeeze(-1)
    corrected = logits + correction_of(table.shape[0], columns.shape[1]) * (
        torch.arange(columns.shape[1], device=logits.device) > 0
    )
    return torch.logsumexp(corrected, dim=1) - logits[:, 0]
