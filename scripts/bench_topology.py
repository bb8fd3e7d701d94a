"""Time of persistence diagrams and vectors of all stocks: two workers against one, gudhi against giotto-tda.

    python scripts/bench_topology.py path/to/sp500-2015-2020
    python scripts/bench_topology.py --quick

The training returns of 2015-2016 of the complete stocks, z-scored, embedded with dimension 4, delay 8 and stride 5, in
degrees 0 to 2. Without a folder (or SEQLIT_DATA) a synthetic market of the same size stands in for the prices. Variants
run in turn, round after round, so that a busy neighbour slows all of them alike; medians and interquartile ranges are
over rounds, ratios are medians of the ratios within a round. Two workers need two idle cores: the load beforehand is
printed. Their processes are started before the first round that counts, in a call whose time is printed. The diagrams
of all variants are compared first, and nothing is reported if one differs.

Then 36 windows of 504 days, a month apart, with the faster backend and two workers, as in a rolling backtest: all of
them, or with ``--quick`` three, scaled.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

# One thread a worker: otherwise the ratio of two workers to one measures the BLAS.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import gtda
import gudhi
import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from datamodules.synthetic_market import synthetic_market
from lightning_modules.topology import TopologicalRepresentation, embed, persistence_diagrams, scale_returns
from lightning_modules.topology.diagrams import Backend, Diagram
from lightning_modules.topology.vectorisers import Landscape, PersistenceImage, PersistenceStatistics

N_WINDOWS, WINDOW_DAYS, MONTH_DAYS = 36, 504, 21


def daily_returns(folder: str | None) -> tuple[NDArray[np.float64], str]:
    """Returns ``(A, T)`` of stocks with every price, and where they are from."""
    if not folder:
        return synthetic_market(451, 1259, seed=0).returns[1:].T, "synthetic market"
    prices = pl.read_parquet(Path(folder) / "adj_close.parquet").drop("Date").to_numpy().astype(np.float64)
    prices = prices[:, ~np.isnan(prices).any(axis=0)]
    return (prices[1:] / prices[:-1] - 1).T, str(Path(folder).name)


def timed(call: Callable[[], list[Diagram]]) -> tuple[float, list[Diagram]]:
    """Seconds and result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def same(one: list[Diagram], other: list[Diagram]) -> bool:
    """Whether all bars are the same."""
    return all(
        np.array_equal(ours[degree], theirs[degree]) for ours, theirs in zip(one, other, strict=True) for degree in ours
    )


def spread(values: list[float]) -> str:
    """Median and interquartile range."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({high - low:.2f})"


def main() -> None:
    """Parse the command line, check, measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = os.environ.get("SEQLIT_DATA")
    parser.add_argument("folder", nargs="?", default=shared and str(Path(shared) / "sp500-2015-2020"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="three rolling windows, scaled to 36")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error(f"--repeats must be at least 2, got {args.repeats}")
    if args.folder and not (Path(args.folder) / "adj_close.parquet").is_file():
        parser.error(f"folder must hold adj_close.parquet, got {args.folder}")
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    returns, source = daily_returns(args.folder)
    values = scale_returns(returns[:, :497], "zscore").values  # 2015-2016
    clouds = [embed(series, 4, 8, 5) for series in values]
    variants: dict[tuple[Backend, int], Callable[[], list[Diagram]]] = {
        (backend, n_workers): lambda backend=backend, n_workers=n_workers: persistence_diagrams(
            clouds, (0, 1, 2), backend=backend, n_workers=n_workers
        )
        for backend in ("giotto", "gudhi")
        for n_workers in (1, 2)
    }
    first = {variant: timed(call) for variant, call in variants.items()}
    diagrams = first["gudhi", 1][1]
    for (backend, n_workers), (_, found) in first.items():
        if not same(found, diagrams):
            sys.exit(f"parity: {backend} with {n_workers} workers gives other bars: nothing is reported")
    times: dict[tuple[Backend, int], list[float]] = {variant: [] for variant in variants}
    for _ in range(args.repeats):
        for variant, call in variants.items():
            times[variant].append(timed(call)[0])
    bars = [sum(len(diagram[degree]) for diagram in diagrams) for degree in (0, 1, 2)]
    print(
        f"CPU, {os.cpu_count()} cores, one thread a worker; giotto-tda {gtda.__version__}, gudhi {gudhi.__version__}, "
        f"NumPy {np.__version__}; {source}: {len(clouds)} stocks, clouds {clouds[0].shape} float64, degrees 0-2, "
        f"{bars} bars; load {load:.1f}; medians (IQR) of {args.repeats} interleaved rounds\n"
    )
    print("| backend | workers | s | two workers over one | giotto over gudhi |")
    print("|---|---|---|---|---|")
    for (backend, n_workers), seconds in times.items():
        faster = [a / b for a, b in zip(times[backend, 1], times[backend, 2], strict=True)]
        lighter = [a / b for a, b in zip(times["giotto", n_workers], times["gudhi", n_workers], strict=True)]
        print(
            f"| {backend} | {n_workers} | {spread(seconds)} | {spread(faster) if n_workers == 2 else '-'} "
            f"| {spread(lighter) if backend == 'gudhi' else '-'} |"
        )
    print(f"\nThe first call with two giotto workers, which starts their processes: {first['giotto', 2][0]:.2f} s\n")

    print("| vectors of these diagrams | D | ms |")
    print("|---|---|---|")
    for vectoriser in (
        PersistenceImage((0, 1, 2)),
        Landscape((0, 1, 2)),
        PersistenceStatistics(),
        PersistenceStatistics(extended=True),
    ):
        took = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            rows = vectoriser.fit_transform(diagrams)
            took.append((time.perf_counter() - start) * 1e3)
        print(f"| {vectoriser!r} | {rows.shape[1]} | {spread(took)} |")

    n_windows = 3 if args.quick else N_WINDOWS
    seconds = []
    for window in range(n_windows):
        stop = WINDOW_DAYS + window * MONTH_DAYS
        model = TopologicalRepresentation(
            vectoriser=PersistenceStatistics(), backend="gudhi", n_workers=2, cache_dir=None, progress=False
        )
        start = time.perf_counter()
        model.fit(torch.from_numpy(returns[:, stop - WINDOW_DAYS : stop].copy()))
        seconds.append(time.perf_counter() - start)
    total = sum(seconds) * N_WINDOWS / n_windows
    how = "measured" if n_windows == N_WINDOWS else f"scaled from {n_windows}"
    print(
        f"\n{N_WINDOWS} windows of {WINDOW_DAYS} days, search of dimension and delay included, gudhi with two workers: "
        f"{total:.0f} s ({how}), {spread(seconds)} s a window"
    )


if __name__ == "__main__":
    main()
