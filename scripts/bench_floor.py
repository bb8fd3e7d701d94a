"""The least time a loss could take: bytes and operations over rates measured on the device at hand.

    read        random rows of a (V, D) table, ids drawn on the fly, summed in registers
    add         random rows added atomically to a (V, D) fp32 buffer
    multiply    matrix products of the operands' dtype, the faster of (8192, D) x (D, 8192) and a square one

Rows are read and added at the benchmark's V and D, so that a table that fits into a cache is judged by that cache. The
floor counts what our kernels cannot avoid (both passes, dtype of s bytes, G rows of negatives):

    per position        reads 2 N K D s,  adds 4 N K D
    shared, G groups    reads 2 G K D s,  adds 4 G K D,  4 N K D operations forward and 4 N K D backward
    full cross-entropy  2 N V D operations forward, 4 N V D backward

Reads and adds share the memory and follow each other; operations of a pass hide behind them or the reverse. Operations
per position are left out: they are no matrix products, and cost less than the bytes.

Letters: N positions, D width, V items, K negatives.
"""

# ruff: noqa: ANN001, ANN201 -- device functions: what an argument is, Triton decides at compile time
from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.launch import Launch

# Rows in flight per program and warps; which is fastest depends on the chip and the width.
_SHAPES = ((4, 4), (8, 4), (16, 4), (32, 4), (32, 8), (64, 8))
_STEPS = 32
_GPU_BYTES, _CPU_BYTES, _TINY_BYTES = 4 << 30, 64 << 20, 1 << 16


@triton.jit
def _random_rows(seed, first, n_items, R: tl.constexpr):  # noqa: ANN202
    words = tl.randint(seed, first + tl.arange(0, R)).to(tl.uint32, bitcast=True)
    return tl.umulhi(words, tl.zeros((R,), tl.uint32) + n_items.to(tl.uint32)).to(tl.int64)


@triton.jit(do_not_specialize=["n_items", "seed"])
def read_rows_kernel(
    table, sums, n_items, seed, STEPS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """Read STEPS x R random rows and leave their sum, so that no read can be left out."""
    program = tl.program_id(0)
    d = tl.arange(0, W)
    total = tl.zeros((R, W), tl.float32)
    for step in range(STEPS):
        rows = _random_rows(seed, (program * STEPS + step) * R, n_items, R)
        total += tl.load(table + rows[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0).to(tl.float32)
    tl.store(sums + program.to(tl.int64) * W + d, tl.sum(total, 0))


@triton.jit(do_not_specialize=["n_items", "seed"])
def add_rows_kernel(
    buffer, n_items, seed, STEPS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """Add ones to STEPS x R random rows."""
    program = tl.program_id(0)
    d = tl.arange(0, W)
    ones = tl.full((R, W), 1.0, tl.float32)
    for step in range(STEPS):
        rows = _random_rows(seed, (program * STEPS + step) * R, n_items, R)
        tl.atomic_add(buffer + rows[:, None] * D + d[None, :], ones, mask=(d < D)[None, :], sem="relaxed")


@dataclass(frozen=True)
class Rates:
    """Bytes per second of random rows read and added, operations per second of matrix products."""

    read: float
    add: float
    multiply: float

    def __str__(self) -> str:
        return (
            f"random rows read {self.read / 1e9:,.1f} GB/s, added {self.add / 1e9:,.1f} GB/s; "
            f"products {self.multiply / 1e12:,.2f} TFLOP/s"
        )


def plan_reads(table: Tensor, n_rows: int, shape: tuple[int, int], seed: int) -> tuple[Launch, int]:
    """A launch that reads about `n_rows` random rows, and how many it reads."""
    programs, constants = _programs(table, n_rows, shape[0])
    sums = torch.empty(programs, constants["W"], dtype=torch.float32, device=table.device)
    arguments: dict[str, Any] = {"table": table, "sums": sums, "n_items": table.shape[0], "seed": seed}
    return Launch(read_rows_kernel, programs, arguments, constants, shape[1]), programs * _STEPS * shape[0]


def plan_adds(buffer: Tensor, n_rows: int, shape: tuple[int, int], seed: int) -> tuple[Launch, int]:
    """A launch that adds to about `n_rows` random rows, and how many it adds to."""
    programs, constants = _programs(buffer, n_rows, shape[0])
    arguments: dict[str, Any] = {"buffer": buffer, "n_items": buffer.shape[0], "seed": seed}
    return Launch(add_rows_kernel, programs, arguments, constants, shape[1]), programs * _STEPS * shape[0]


def _programs(table: Tensor, n_rows: int, rows: int) -> tuple[int, dict[str, int]]:
    width = table.shape[1]
    constants = {"STEPS": _STEPS, "D": width, "R": rows, "W": triton.next_power_of_2(width)}
    return max(1, n_rows // (_STEPS * rows)), constants


def measure_rates(table: Tensor, runs_triton: bool) -> Rates:
    """Rates at the V, D and dtype of a table; by PyTorch's own operators where no kernel can run.

    Args:
        table: (V, D), read only.
        runs_triton: Whether Triton's kernels run on the table's device.
    """
    table = table.detach()
    buffer = torch.zeros(table.shape, dtype=torch.float32, device=table.device)
    budget = _GPU_BYTES if table.is_cuda else _TINY_BYTES if runs_triton else _CPU_BYTES
    if not runs_triton:
        return Rates(_torch_read_rate(table, budget), _torch_add_rate(buffer, budget), _multiply_rate(table))
    read = max(_kernel_rate(plan_reads, table, budget, shape) for shape in _shapes(table))
    add = max(_kernel_rate(plan_adds, buffer, budget, shape) for shape in _shapes(table))
    return Rates(read, add, _multiply_rate(table))


def _shapes(table: Tensor) -> list[tuple[int, int]]:
    """Blocks that fit into registers; the interpreter gets two of them."""
    fitting = [shape for shape in _SHAPES if shape[0] * table.shape[1] <= 128 * 32 * shape[1]]
    return fitting if table.is_cuda else fitting[:2]


def _kernel_rate(plan: Callable[..., tuple[Launch, int]], rows: Tensor, budget: int, shape: tuple[int, int]) -> float:
    """Bytes per second of one shape of blocks."""
    row_bytes = rows.shape[1] * rows.element_size()

    def prepare(seed: int) -> tuple[Callable[[], object], int]:
        launch, n = plan(rows, budget // row_bytes, shape, seed)
        return launch.run, n * row_bytes

    return _rate(prepare, rows)


def _torch_read_rate(table: Tensor, budget: int) -> float:
    row_bytes = table.shape[1] * table.element_size()
    n = budget // row_bytes
    offsets = torch.arange(0, n, 256)

    def prepare(seed: int) -> tuple[Callable[[], object], int]:
        ids = torch.randint(table.shape[0], (n,), generator=torch.Generator().manual_seed(seed))
        return lambda: F.embedding_bag(ids, table, offsets, mode="sum"), n * row_bytes

    return _rate(prepare, table)


def _torch_add_rate(buffer: Tensor, budget: int) -> float:
    row_bytes = buffer.shape[1] * buffer.element_size()
    n = budget // row_bytes
    rows = torch.ones(n, buffer.shape[1])

    def prepare(seed: int) -> tuple[Callable[[], object], int]:
        ids = torch.randint(buffer.shape[0], (n,), generator=torch.Generator().manual_seed(seed))
        return lambda: buffer.index_add_(0, ids, rows), n * row_bytes

    return _rate(prepare, buffer)


def _multiply_rate(table: Tensor) -> float:
    """Operations per second, the faster of two shapes: a product over D may be held up by writing its result."""
    width, side = table.shape[1], 8192 if table.is_cuda else 512

    def rate(inner: int) -> float:
        a, b = (torch.randn(side, inner, device=table.device).to(table.dtype) for _ in range(2))
        return _rate(lambda _: (lambda: a @ b.T, 2 * side * side * inner), table)

    return max(rate(width), rate(side))


def _rate(prepare: Callable[[int], tuple[Callable[[], object], int]], near: Tensor) -> float:
    """Units per second: median of a few calls, each prepared anew, after one that does not count."""
    seconds = []
    for seed in range(6):
        run, amount = prepare(seed)
        seconds.append(_seconds(run, near) / amount)
    return 1 / statistics.median(seconds[1:])


def _seconds(run: Callable[[], object], near: Tensor) -> float:
    if not near.is_cuda:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()  # keeps the device busy while the host launches the one that is timed
    first.record()
    run()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def floor_milliseconds(
    sharing: str, n: int, k: int, n_items: int, width: int, item_size: int, tile_size: int, rates: Rates
) -> float:
    """Least time of a forward and a backward pass.

    Args:
        sharing: "position", "tile", "batch", or "full" for the cross-entropy over every item.
        n: Positions.
        k: Negatives of a position.
        n_items: V.
        width: D.
        item_size: Bytes of a number of the table.
        tile_size: Positions per tile.
        rates: From `measure_rates`.
    """
    if sharing == "full":
        return 6.0 * n * n_items * width / rates.multiply * 1e3
    rows = {"position": n, "tile": math.ceil(n / tile_size), "batch": 1}[sharing] * k * width
    products = 0.0 if sharing == "position" else 4.0 * n * k * width / rates.multiply
    read, add = rows * item_size / rates.read, rows * 4 / rates.add
    return (max(read, products) + max(read + add, products)) * 1e3
