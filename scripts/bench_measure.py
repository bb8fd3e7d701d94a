"""Time and peak memory of the variants of `bench_variants.py`, on a GPU or a CPU.

Letters: N positions.
"""

from __future__ import annotations

import gc
import json
import math
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_variants import Problem, Variant

_LEAST = 64  # positions below which a rival counts as not fitting at all
Milliseconds = tuple[float, float]


def call(variant: Variant, problem: Problem, step: int) -> Milliseconds:
    """Milliseconds of one forward and one backward pass; gradients exist only in between."""
    problem.clear()
    if problem.is_cuda:
        torch.cuda.synchronize()
    marks = [_mark(problem)]
    loss = variant.loss(problem, step)
    marks.append(_mark(problem))
    loss.backward()
    marks.append(_mark(problem))
    if problem.is_cuda:
        torch.cuda.synchronize()
    problem.clear()
    return _elapsed(*marks[:2]), _elapsed(*marks[1:])


def _mark(problem: Problem) -> Any:
    if not problem.is_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(first: Any, last: Any) -> float:
    return (last - first) * 1e3 if isinstance(first, float) else first.elapsed_time(last)


def attempt(variant: Variant, problem: Problem) -> float | None:
    """Seconds of a call after one that compiles; None where memory runs out."""
    try:
        call(variant, problem, 0)
        return sum(call(variant, problem, 1)) / 1e3
    except torch.OutOfMemoryError:
        problem.clear()
    # beyond the handler, whose traceback holds every tensor of the failed call
    free_memory(problem)
    return None


def free_memory(problem: Problem) -> None:
    """Give back what nobody holds."""
    gc.collect()
    if problem.is_cuda:
        torch.cuda.empty_cache()


def largest_n(variant: Variant, problem: Problem, seconds: float) -> int:
    """Positions on which a variant is run: all of them, but for a rival that does not fit or takes too long.

    Args:
        variant: Ours are always run on all.
        problem: The whole problem.
        seconds: Most that a call of a rival may take.

    Raises:
        RuntimeError: When not even a few positions fit.
    """
    n = problem.n_positions
    if variant.family == "ours":
        return n
    if not problem.is_cuda:
        n = min(n, max(_LEAST, available_bytes() // 2 // max(1, variant.bytes_per_position(problem))))
    if seconds < math.inf:
        few = max(1, n // 16)
        while (elapsed := attempt(variant, problem.first(few))) is None:
            few //= 4
            if not few:
                raise RuntimeError("does not fit into memory")
        n = min(n, max(few, int(seconds / elapsed * few)))
    if not problem.is_cuda:
        return n
    while n >= min(_LEAST, problem.n_positions):
        # whole blocks, so that kernels specialised to N run as they would on the whole problem
        n = n // 1024 * 1024 if 1024 <= n < problem.n_positions else n
        if attempt(variant, problem.first(n)) is not None:
            return n
        n = n * 3 // 4
    raise RuntimeError("does not fit into memory")


def available_bytes() -> int:
    """Memory that the machine can give without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024


def time_variants(
    variants: list[Variant], problem: Problem, sizes: dict[str, int], repeats: int
) -> tuple[dict[str, list[Milliseconds]], dict[str, str]]:
    """Milliseconds of each variant in each round, after one round that does not count, scaled to all positions.

    Args:
        variants: What to run in turn, round after round, so that whatever slows the machine slows all alike.
        problem: The whole problem.
        sizes: Positions of each variant; its times are multiplied by N / size.
        repeats: Rounds that count.

    Returns:
        Times by name; by name why a rival dropped out.
    """
    problems = {variant.name: problem.first(sizes[variant.name]) for variant in variants}
    times: dict[str, list[Milliseconds]] = {variant.name: [] for variant in variants}
    failed: dict[str, str] = {}
    for step in range(repeats + 1):
        for variant in variants:
            if variant.name in failed:
                continue
            scale = problem.n_positions / sizes[variant.name]
            try:
                forward, backward = call(variant, problems[variant.name], step)
            except torch.OutOfMemoryError:
                if variant.family == "ours":
                    raise
                failed[variant.name] = "out of memory beside the others"
                problems[variant.name].clear()
                continue
            if step:
                times[variant.name].append((forward * scale, backward * scale))
    return {name: found for name, found in times.items() if name not in failed}, failed


def peak_bytes(variant: Variant, problem: Problem) -> int:
    """Peak memory of one forward and backward pass on a GPU, above the inputs and with both gradients."""
    call(variant, problem, 0)  # libraries load, kernels are compiled and workspaces are taken here
    free_memory(problem)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(variant, problem, 1)
    return torch.cuda.max_memory_allocated() - before


def resident_peak_bytes(variant: Variant, problem: Problem, warm_up: Problem) -> int:
    """The same on a CPU, as the high-water mark of the resident set; called in a fresh process."""
    call(variant, warm_up, 0)  # libraries load and thread pools start here
    problem.clear()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_bytes("VmRSS")
    call(variant, problem, 1)
    return max(1, _status_bytes("VmHWM") - before)  # a tiny run may find its pages in place


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


def peak_in_subprocess(name: str, *changes: str) -> int:
    """Run this script again for the peak memory of one variant."""
    command = [sys.executable, *sys.argv, *changes, "--peak-of", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"peak memory of {name}: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def extrapolated_peak(peak: int, n: int, half_peak: int, half: int, whole: int) -> int:
    """Peak memory at N positions, on the line through two smaller sizes: a part of it does not depend on N."""
    return max(1, round(peak + (peak - half_peak) / (n - half) * (whole - n)))


def describe_device(device: str, threads: int) -> str:
    """Device, driver and versions, as a report begins with them."""
    if device == "cpu":
        return f"CPU, {threads} threads; PyTorch {torch.__version__}"
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return (
        f"{torch.cuda.get_device_name()}; driver {driver}; CUDA {torch.version.cuda}; PyTorch {torch.__version__}; "
        f"Triton {triton.__version__}; Python {platform.python_version()}"
    )
