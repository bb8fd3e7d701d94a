"""Memory of processes seen from outside, and how costs grow, for `bench_scale.py`."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

MB = 1e6
SECONDS_BETWEEN_SAMPLES = 0.005

Costs = dict[str, tuple[list[int], list[float]]]
"""Name of a cost -> sizes, and its median at each. Names of costs in bytes end in ", bytes"."""


def memory_of(pid: int) -> np.ndarray:
    """Anonymous and resident bytes of a process and its children, zero once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return np.zeros(2)
    lines = dict(line.split(":", 1) for line in status.splitlines())
    own = [int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS") if name in lines]
    return np.add(own or 0, sum((memory_of(int(child)) for child in children), np.zeros(2)))


def watched(arguments: list[str], threads: int) -> dict[str, Any]:
    """Run the script that was started, with other arguments, and watch its memory.

    Args:
        arguments: In place of the command line's.
        threads: Of PyTorch, BLAS and polars.

    Returns:
        The JSON object that it prints last, and ``anonymous`` and ``resident``, its peaks in bytes.
    """
    command = [sys.executable, sys.argv[0], *arguments]
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS")
    environment = os.environ | dict.fromkeys(names, str(threads))
    peak = np.zeros(2)
    with tempfile.TemporaryFile("w+") as out, subprocess.Popen(command, stdout=out, env=environment) as process:
        while process.poll() is None:
            peak = np.maximum(peak, memory_of(process.pid))
            time.sleep(SECONDS_BETWEEN_SAMPLES)
        out.seek(0)
        lines = out.read().splitlines()
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)}: the process ended with {process.returncode}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found | {"anonymous": peak[0], "resident": peak[1]}


def growth(sizes: list[int], costs: list[float]) -> tuple[float, float]:
    """Slope of log cost against log size, over all sizes and between the last two."""
    x, y = np.log(sizes), np.log(np.maximum(costs, 1e-12))
    return float(np.polyfit(x, y, 1)[0]), float((y[-1] - y[-2]) / (x[-1] - x[-2]))


def spread(values: list[float], scale: float = 1.0) -> str:
    """Median, least and most."""
    return " / ".join(f"{scale * value:.4g}" for value in (statistics.median(values), min(values), max(values)))


def plot(name: str, unit: str, costs: Costs, folder: Path) -> None:
    """Seconds and bytes on logarithmic axes, with lines of slope 1 to compare with."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, wants_bytes, label in zip(figure.subplots(1, 2), (False, True), ("seconds", "peak MB"), strict=True):
        for key, (sizes, values) in costs.items():
            if key.endswith(", bytes") == wants_bytes:
                scale = MB if wants_bytes else 1
                axis.loglog(sizes, np.array(values) / scale, marker="o", label=key.removesuffix(", bytes"))
                line = values[-1] / scale * np.array(sizes) / sizes[-1]
                axis.loglog(sizes, line, color="grey", linestyle=":", linewidth=0.8)
        every = sorted({size for sizes, _ in costs.values() for size in sizes})
        axis.set_xticks(every, [f"{size:,}" for size in every], fontsize=8)
        axis.minorticks_off()
        axis.set_xlabel(unit)
        axis.set_ylabel(f"{label} (above imports)" if wants_bytes else label)
        axis.legend(fontsize=7)
    figure.suptitle(f"growth of {name}; dotted: linear", fontsize=10)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"growth_{name}.png", dpi=110)
