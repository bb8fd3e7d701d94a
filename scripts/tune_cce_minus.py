"""Choose the launch settings of the CCE- kernels and rewrite kernels/cce_minus/launch_settings.json.

    python scripts/tune_cce_minus.py                      measure on the GPU at hand, rewrite its rows
    python scripts/tune_cce_minus.py --build-only sm_90   no GPU: the first candidate that builds and spills nothing

Candidates are tried from the one that should be fastest to the one that surely fits; each is compiled for uniform and
for alias draws, with atomic and with ordered gradients. On a GPU all candidates that build without spills are timed in
turn, round after round, and the lowest median wins.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import compile_kernels  # before torch and triton: it decides how triton is imported
import torch

from kernels.cce_minus import compile_cases, launch_settings, triton_launches
from kernels.cce_minus.launch_settings import TABLE, Settings

WIDTHS = (16, 32, 64, 128, 256, 512)
SMALL = 16_384  # positions below which more and smaller blocks keep the chip busy
Candidate = tuple[int, int, int, int]  # B, C, warps, stages


def candidates(kernel: str, arch: str, width: int, dtype: str) -> list[Candidate]:
    """Settings to try, the most promising first: large blocks, then ever smaller ones."""
    if kernel.startswith("position"):
        found = []
        block = launch_settings.block_width(width)
        for numbers in (8192, 4096, 2048, 1024):  # of the gathered block, spread over 128 threads
            c = min(64, numbers // block)  # more would mostly be masked away where K is small
            found.append((numbers // (c * block), c, 4, 2))
        return found
    # One warpgroup of four warps multiplies 64 rows at a time; other ratios make Triton move the sum between layouts.
    b_first = kernel == "tile_forward"
    stages = 3 if width <= 64 else 2
    if arch.startswith("gfx"):
        stages = 1
    large = [(128, 64, 8), (128, 32, 8), (128, 16, 8), (64, 64, 4), (64, 32, 4), (64, 16, 4), (32, 32, 4), (32, 16, 4)]
    small = [(64, 32, 4), (64, 16, 4), (32, 32, 8), (32, 32, 4), (32, 16, 4), (16, 32, 4), (16, 16, 4)]
    shapes = {"bf16": [*large, (16, 16, 4)], "tf32": [*large[1:], (16, 16, 4)], "fp16": small, "fp32": small}[dtype]
    if dtype == "fp32":
        shapes = [(64, 64, 8), (64, 32, 8), *small[2:]]
    if width > launch_settings.MAX_BLOCK_WIDTH:  # another row in flight, and another block of it
        shapes = [shape for shape in shapes if shape[1] <= 16 or shape[0] <= 32]
    found = []
    for rows, others, warps in shapes:
        b, c = (rows, others) if b_first else (others, rows)
        found += [(b, c, warps, s) for s in sorted({stages, 1}, reverse=True)]
    return found


def dtypes(kernel: str, arch: str) -> tuple[str, ...]:
    """Names of operands that a kernel has rows for; per position everything is multiplied in fp32."""
    tf32 = kernel.startswith("tile") and arch.startswith("sm_")
    return ("bf16", "fp16", "fp32", "tf32") if tf32 else ("bf16", "fp16", "fp32")


def builds(job: tuple[str, str, int, str, Candidate]) -> bool:
    """Whether a candidate compiles for every source of ids and every form of the gradient without spilling."""
    kernel, arch, width, dtype, candidate = job
    for name, launch in _launches(kernel, arch, width, dtype, candidate):
        found = compile_kernels.measure(name, arch, launch)
        if list(found.violations()) or found.stack or found.spills:
            return False
    return True


def _launches(kernel: str, arch: str, width: int, dtype: str, candidate: Candidate) -> Iterator[tuple[str, Any]]:
    settings = Settings(*candidate)
    triton_launches.settings_for = lambda *_: settings  # type: ignore[assignment]
    inputs = compile_cases.problem(1 << 20, width, dtype, "position" if kernel.startswith("position") else "tile")
    for what, problem in (("uniform", inputs), ("alias", replace(inputs, **compile_cases.alias_table()))):
        for name, launch in compile_cases.plan_all(what, problem, arch, dtype):
            if launch.kernel.__name__ == f"{kernel}_kernel":
                yield name, launch


def first_that_builds(job: tuple[str, str, int, str, int | None]) -> dict[str, Any]:
    """A row of the table; the last candidate where none is without spills."""
    kernel, arch, width, dtype, bound = job
    tried = [c for c in candidates(kernel, arch, width, dtype) if bound is None or c[0] <= 64]
    chosen = next((c for c in tried if builds((kernel, arch, width, dtype, c))), tried[-1])
    return row(kernel, arch, width, dtype, bound, chosen)


def row(kernel: str, arch: str, width: int, dtype: str, bound: int | None, chosen: Candidate) -> dict[str, Any]:
    """One row of the table."""
    b, c, warps, stages = chosen
    keys = {"arch": arch, "kernel": kernel, "width": width, "dtype": dtype, "max_positions": bound}
    return keys | {"b": b, "c": c, "num_warps": warps, "num_stages": stages}


def jobs(arch: str) -> list[tuple[str, str, int, str, int | None]]:
    """What an architecture needs a row for."""
    kernels = ("position_forward", "position_backward", "tile_forward", "tile_table")
    return [
        (kernel, arch, width, dtype, bound)
        for kernel in kernels
        for width in WIDTHS
        for dtype in dtypes(kernel, arch)
        if width == WIDTHS[-1] or width <= launch_settings.widest_block(kernel, dtype)
        for bound in ((SMALL, None) if kernel == "tile_forward" else (None,))
    ]


def measured(job: tuple[str, str, int, str, int | None], rounds: int = 15) -> dict[str, Any]:
    """The fastest candidate on the GPU at hand."""
    kernel, arch, width, dtype, bound = job
    from kernels.cce_minus import cce_minus_loss

    m, n_items = bound or 131_072, 1_000_000
    kind = compile_cases.problem(1, width, dtype, "tile").hidden.dtype
    hidden = torch.randn(m, width, device="cuda", dtype=kind, requires_grad=True)
    table = (torch.randn(n_items, width, device="cuda") / width**0.5).to(kind).requires_grad_()
    targets = torch.randint(n_items, (m,), device="cuda")
    sharing: Any = "position" if kernel.startswith("position") else "tile"
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    usual = launch_settings.settings_for
    times: dict[Candidate, list[float]] = {
        c: [] for c in candidates(kernel, arch, width, dtype) if builds((kernel, arch, width, dtype, c))
    }
    for step in range(rounds + 2):
        for candidate, found in times.items():
            override = {kernel: Settings(*candidate)}
            triton_launches.settings_for = lambda name, *rest, o=override: o.get(name) or usual(name, *rest)
            hidden.grad = table.grad = None
            start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            start.record()
            loss = cce_minus_loss(
                hidden, table, targets, n_negatives=512, seed=1, step=step, sharing=sharing, impl="triton"
            )
            middle.record()
            loss.backward()
            end.record()
            torch.cuda.synchronize()
            if step >= 2:
                found.append(start.elapsed_time(middle) if "forward" in kernel else middle.elapsed_time(end))
    best = min(times, key=lambda c: statistics.median(times[c]))
    return row(kernel, arch, width, dtype, bound, best)


def main() -> None:
    """Parse the command line, choose, and rewrite the table's rows of the architectures asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build-only", nargs="+", choices=tuple(compile_kernels.ARCHITECTURES), metavar="ARCH")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--dtypes", nargs="+", default=("bf16", "fp16", "fp32", "tf32"))
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    if not args.build_only and not torch.cuda.is_available():
        parser.error("no GPU is at hand to measure on; --build-only ARCH chooses without one")
    archs = args.build_only or [triton_launches.architecture(torch.empty(0, device="cuda"))]
    work = [job for arch in archs for job in jobs(arch)]
    work = [job for job in work if args.only in job[0] and job[2] in args.widths and job[3] in args.dtypes]
    table = {_key(r): r for r in json.loads(TABLE.read_text(encoding="utf-8"))} if TABLE.exists() else {}
    if args.build_only:
        with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
            results: Any = pool.imap(first_that_builds, work)
            _collect(results, len(work), table)
    else:
        _collect(map(measured, work), len(work), table)


def _key(r: dict[str, Any]) -> tuple[Any, ...]:
    return r["arch"], r["kernel"], r["width"], r["dtype"], r["max_positions"] or sys.maxsize


def _collect(results: Iterator[dict[str, Any]], n: int, table: dict[tuple[Any, ...], dict[str, Any]]) -> None:
    """Write the table after every result, so that an interrupted run keeps what it has."""
    for number, found in enumerate(results, 1):
        print(f"{number:>4}/{n} {json.dumps(found)}", file=sys.stderr, flush=True)
        table[_key(found)] = found
        lines = ",\n".join("  " + json.dumps(table[key]) for key in sorted(table))
        TABLE.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
