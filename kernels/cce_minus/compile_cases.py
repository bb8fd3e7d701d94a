"""Every launch that ships, planned on tensors that hold no memory, for `scripts/compile_kernels.py`.

Each row of the table of settings is planned with uniform draws; sources of ids, corrections, layouts and the
deterministic variants are planned at one width.

Letters: M positions, D width, V items, K negatives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels.cce_minus import triton_launches
from kernels.cce_minus.arguments import LossInputs
from kernels.cce_minus.launch_settings import rows_of
from kernels.cce_minus.triton_launches import Pass
from kernels.launch import Launch

_V, _K, _TILE = 1_000_000, 1023, 128
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


def compile_cases(arch: str) -> Iterator[tuple[str, Launch]]:
    """Names and launches for an architecture of the table of settings."""
    seen = set()
    for kernel, width, dtype, bound in rows_of(arch):
        sharing = "position" if kernel.startswith("position") else "tile"
        m = 1 << 20 if bound is None else bound
        name = f"{sharing} D{width} {dtype} M{m}"
        if name not in seen:
            seen.add(name)
            yield from plan_all(name, problem(m, width, dtype, sharing), arch, dtype)
    for sharing in ("position", "tile", "batch"):
        for what, changes in _variants(sharing):
            dtype = changes.pop("dtype", "bf16")
            inputs = replace(problem(1 << 20, changes.pop("width", 64), dtype, sharing), **changes)
            yield from plan_all(f"{sharing} {what}", inputs, arch, dtype)


def _variants(sharing: str) -> Iterator[tuple[str, dict[str, Any]]]:
    alias = alias_table()
    rows = {"position": 1 << 20, "tile": (1 << 20) // _TILE, "batch": 1}[sharing]
    for correction in ("logq", "none", "improved_logq", "classic_logq"):
        yield f"alias {correction}", {**alias, "correction": correction}
    yield "uniform none", {"correction": "none"}
    yield "uniform classic_logq", {"correction": "classic_logq"}
    yield "one negative, classic_logq", {"correction": "classic_logq", "n_columns": 1}
    for dtype in (torch.int32, torch.int64):
        ids = _empty(rows, _K, dtype=dtype)
        yield f"given {dtype}".replace("torch.", ""), {"negatives": ids, "stream": None}
    yield "width 50", {"width": 50}
    yield "width 512", {"width": 512}
    yield "width 257 fp32", {"width": 257, "dtype": "fp32"}
    yield "strided table", {"table": _empty(64, _V, dtype=torch.bfloat16).T}
    yield "bf16 of autocast", {"dtype": "fp32", "autocast": torch.bfloat16}
    if sharing == "batch":
        yield "every item", {"stream": None, "n_columns": _V, "correction": "none"}


def problem(m: int, width: int, dtype: str, sharing: Any) -> LossInputs:
    """Uniform draws over a million items."""
    return LossInputs(
        hidden=_empty(m, width, dtype=_DTYPES[dtype]),
        table=_empty(_V, width, dtype=_DTYPES[dtype]),
        targets=_empty(m, dtype=torch.int64),
        n_items=_V,
        negatives=None,
        stream=_empty(3, dtype=torch.int64),
        log_q=None,
        threshold=None,
        alias=None,
        n_columns=_K,
        sharing=sharing,
        tile_size=_TILE,
        correction="logq",
        ignore_index=-100,
        autocast=None,
    )


def plan_all(name: str, inputs: LossInputs, arch: str, dtype: str) -> Iterator[tuple[str, Launch]]:
    """Launches of a forward and a backward pass, the latter by atomics and in fixed order."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield from list(_plan_all(name, inputs, arch))
    finally:
        torch.set_float32_matmul_precision(before)


def _plan_all(name: str, inputs: LossInputs, arch: str) -> Iterator[tuple[str, Launch]]:
    m, width = inputs.hidden.shape
    shared = inputs.sharing != "position"
    floats = [_empty(m, dtype=torch.float32) for _ in range(6)]
    longs = [_empty(m, dtype=torch.int64) for _ in range(2)]
    work = Pass(
        inputs=inputs,
        arch=arch,
        index=longs[0],
        count=_empty(1, dtype=torch.int64),
        margin=floats[0],
        shift=floats[1],
        direction=_empty(*((m, width) if shared else (0,)), dtype=torch.float32),
        d_loss=floats[2],
        d_lse=floats[3],
    )
    d_hidden, d_table = torch.empty_like(inputs.hidden), _empty(inputs.n_items, width, dtype=torch.float32)
    order, ids, weights = longs[1], _empty(m, dtype=torch.int32), floats[4]
    bounds = _empty(inputs.n_items + 1, dtype=torch.int64)
    plan = [("forward", triton_launches.plan_forward(work, floats[4], floats[5]))]
    plan += [("backward", launch) for launch in triton_launches.plan_backward(work, d_hidden, d_table)]
    plan.append(("positives", triton_launches.plan_positives(work, ids, order, d_table)))
    if shared:
        listed = triton_launches.plan_tile_table(work, None, (ids, d_table), 0, 8)
        summed = triton_launches.plan_sum_rows(d_table, order, bounds, d_table, dtype=torch.float32)
    else:
        listed = triton_launches.plan_position_backward(work, d_hidden, None, (ids, weights), 0, 64)
        summed = triton_launches.plan_sum_rows(
            inputs.hidden, order, bounds, d_table, dtype=work.dot, weights=weights, index=order, entries_per_row=_K
        )
    plan += [("deterministic backward", listed), ("deterministic sum", summed)]
    if inputs.sharing == "tile" and inputs.stream is not None:
        plan.append(("shuffle", triton_launches.plan_shuffle(inputs.stream, work.count, order)))
    for what, launch in plan:
        yield f"{name}: {what}, {launch.kernel.__name__.removesuffix('_kernel')}", launch


def alias_table() -> dict[str, Tensor]:
    """What a proposal adds to the inputs."""
    ids = _empty(_V, dtype=torch.int32)
    return {"log_q": _empty(_V, dtype=torch.float32), "threshold": ids, "alias": ids}


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")
