"""How time and memory of each method grow with the size of its input, on synthetic data.

    python scripts/bench_scale.py --only interactions --threads 2 --repeats 1
    python scripts/bench_scale.py --only catalogue
    python scripts/bench_scale.py --only context topology --plots pictures

* ``interactions``: rows prepared by ``InteractionsDataModule`` from Parquet to memory-mapped arrays; 25 rows a user, 50
  an item, Zipf of exponent 0.8; up to 50 million rows of a million items.
* ``catalogue``: a step of training, a batch of validation and of prediction of ``SASRecCCE`` as its catalogue grows.
* ``context``: index over all users, then answers of the exact mean and of the linear kernel, three events a user.
* ``topology``: persistence statistics of two years of returns, search of the embedding included, and clusterings of
  these rows. Ward compares all pairs: its time and memory are quadratic, of every implementation.

Each size runs in a process of its own, whose memory is read every few milliseconds from outside, children included:
``anonymous`` is what the process cannot give back, ``resident`` holds the pages of mapped files too, which the system
takes back when it needs them. Growth is the slope of log cost against log size, over all sizes and between the last
two; 1 is linear. Memory is fitted above what the imports take. With ``--max-gb`` or ``--max-slope`` the exit status is
1 where more anonymous memory was taken or a cost grew faster over all sizes (k-means and Ward aside). Synthetic rows
are a hash of their number: they are written a chunk at a time and are the same in every run.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from bench_growth import MB, Costs, growth, memory_of, plot, spread, watched

ROWS_A_FILE = 2_000_000
ROWS_A_USER, ROWS_AN_ITEM = 25, 50
LENGTH, WIDTH, BATCH = 50, 64, 32
STEPS = 6

Timings = dict[str, list[float]]


def write_interactions(n_rows: int, folder: Path) -> None:
    """Rows as Parquet files: each a function of its number alone, so that memory for one file is enough."""
    import polars as pl

    from datamodules.counter_hash import Purpose, chain

    n_users, n_items = n_rows // ROWS_A_USER, n_rows // ROWS_AN_ITEM
    folder.mkdir()
    for start in range(0, n_rows, ROWS_A_FILE):
        rows = np.arange(start, min(start + ROWS_A_FILE, n_rows))
        user, item, second = (chain(0, Purpose.SLOT, rows, k).astype(np.float64) / 2.0**64 for k in range(3))
        frame = pl.DataFrame(
            {
                # Powers of a uniform number: density ~ rank^(-1/3) of users and rank^(-4/5) of items.
                "user": np.minimum((n_users * user**1.5).astype(np.int64), n_users - 1) * 7 + 3,
                "item": np.minimum((n_items * item**5).astype(np.int64), n_items - 1),
                "time": (second * 365 * 86_400).astype(np.int64),
            }
        )
        frame = frame.with_columns(item=pl.format("item-{}", "item"), time=pl.from_epoch("time"))
        frame.write_parquet(folder / f"{start:012d}.parquet")


def prepare_interactions(n_rows: int, phase: str, folder: Path) -> Callable[[], Timings]:
    """Preparation for one target, with the defaults of the data module."""
    from datamodules import InteractionsDataModule

    module = InteractionsDataModule(
        paths=str(folder / "rows" / "*.parquet"),
        user_column="user",
        item_column="item",
        time_column="time",
        target=phase,  # type: ignore[arg-type]
        cache_dir=str(folder / "cache"),
    )

    def run() -> Timings:
        start = time.perf_counter()
        module.prepare_data()
        seconds = time.perf_counter() - start
        split = module.report_facts()["split"]
        print(f"{phase}: {json.dumps(split)}", file=sys.stderr)
        return {"s": [seconds]}

    return run


def use_catalogue(n_items: int, phase: str, folder: Path) -> Callable[[], Timings]:
    """Batches of one phase of SASRecCCE through the Trainer, after one that does not count."""
    import torch
    from lightning import Callback, LightningModule, Trainer

    from lightning_modules import SASRecCCE

    class Clock(Callback):
        """Time from the begin of each batch to its end, the step of the optimiser included."""

        def __init__(self) -> None:
            self.seconds: list[float] = []

        def begin(self, trainer: Trainer, module: LightningModule, *arguments: Any) -> None:
            self.start = time.perf_counter()

        def end(self, trainer: Trainer, module: LightningModule, *arguments: Any) -> None:
            self.seconds.append(time.perf_counter() - self.start)

        on_train_batch_start = on_validation_batch_start = on_predict_batch_start = begin  # type: ignore[assignment]
        on_train_batch_end = on_validation_batch_end = on_predict_batch_end = end  # type: ignore[assignment]

    torch.manual_seed(0)
    model = SASRecCCE(n_items=n_items, max_length=LENGTH, d_model=WIDTH, cutoffs=(10,))
    items = torch.randint(0, n_items, (BATCH, LENGTH))
    batch = {
        "item_ids": items,
        "basket_ids": torch.arange(LENGTH).expand(BATCH, LENGTH).contiguous(),
        "targets": items.roll(-1, 1),
        "relevant": items[:, :1],
        "history_items": items.flatten(),
        "history_baskets": torch.arange(LENGTH).repeat(BATCH),
        "history_offsets": torch.arange(BATCH + 1) * LENGTH,
        "user_index": torch.arange(BATCH),
    }
    clock = Clock()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
        default_root_dir=folder,
    )
    loader: Any = torch.utils.data.DataLoader([batch] * (STEPS + 1), batch_size=None)  # type: ignore[arg-type]

    def run() -> Timings:
        match phase:
            case "training":
                trainer.fit(model, train_dataloaders=loader)
            case "validation":
                trainer.validate(model, dataloaders=loader, verbose=False)
            case "prediction":
                trainer.predict(model, dataloaders=loader, return_predictions=False)
            case _:
                raise AssertionError(phase)
        return {"s a batch": clock.seconds[1:]}

    return run


def answer_from_context(n_users: int, phase: str, folder: Path) -> Callable[[], Timings]:
    """Build one index and answer queries at random times by random users."""
    import torch
    from bench_context import FLAT_EVENTS, FLAT_WIDTH, YEAR, asked, positive, problem

    from lightning_modules.context.bank import ContextBank
    from lightning_modules.context.prefix_sums import PrefixMean, PrefixMoments

    bank = ContextBank.build(*problem(n_users, FLAT_EVENTS, FLAT_WIDTH, "cpu"), torch.arange(n_users))
    n_queries = 256
    query = positive(torch.randn(n_queries, FLAT_WIDTH, generator=torch.Generator().manual_seed(2)))
    times, users = asked(n_queries, n_users, YEAR * 9 // 10, "cpu")

    @torch.no_grad()
    def run() -> Timings:
        marks = [time.perf_counter()]
        if phase == "exact mean":
            mean = PrefixMean.build(bank)
            answer: Callable[[], object] = lambda: mean.mean(times, users)  # noqa: E731
        else:
            moments = PrefixMoments.build(bank, positive)
            answer = lambda: moments.lookup(query, times, users)  # noqa: E731
        marks.append(time.perf_counter())
        for _ in range(STEPS + 1):
            answer()
            marks.append(time.perf_counter())
        built, _, *answered = np.diff(marks).tolist()
        return {"s to build": [built], "s a query": [seconds / n_queries for seconds in answered]}

    return run


def group_stocks(n_stocks: int, phase: str, folder: Path) -> Callable[[], Timings]:
    """Represent, or cluster what a representation would give."""
    import torch

    from datamodules.synthetic_market import synthetic_market
    from lightning_modules.portfolio.clusterers import KMeansClusters, Stocks, WardClusters, standardised
    from lightning_modules.topology import TopologicalRepresentation
    from lightning_modules.topology.vectorisers import PersistenceStatistics

    returns = synthetic_market(n_stocks, 505, seed=0).returns[1:].T.copy()

    def run() -> Timings:
        if phase == "representation":
            model = TopologicalRepresentation(
                vectoriser=PersistenceStatistics(), backend="gudhi", cache_dir=None, progress=False
            )
            start = time.perf_counter()
            model.fit(torch.from_numpy(returns))(torch.from_numpy(returns))
            return {"s": [time.perf_counter() - start]}
        rows = standardised(np.random.default_rng(0).normal(size=(n_stocks, 14)))
        clusterer = KMeansClusters() if phase == "k-means" else WardClusters()
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            clusterer(Stocks(rows, returns, np.zeros(n_stocks, dtype=np.int64)))
            seconds.append(time.perf_counter() - start)
        return {"s": seconds}

    return run


@dataclass(frozen=True)
class Part:
    """What is measured: sizes of which unit, in which phases, and the function that sets a phase up."""

    unit: str
    sizes: tuple[int, ...]
    phases: tuple[str, ...]
    set_up: Callable[[int, str, Path], Callable[[], Timings]]
    shapes: str


PARTS = {
    "interactions": Part(
        "interactions",
        (500_000, 5_000_000, 50_000_000),
        ("next_item", "next_basket"),
        prepare_interactions,
        "int64 users, string items, times in seconds; 25 rows a user, 50 an item",
    ),
    "catalogue": Part(
        "items",
        (10_000, 31_623, 100_000, 316_228, 1_000_000),
        ("training", "validation", "prediction"),
        use_catalogue,
        f"batch ({BATCH}, {LENGTH}), width {WIDTH}, 2 blocks, float32, Adam, 256 negatives",
    ),
    "context": Part(
        "users",
        (1_000, 10_000, 100_000, 1_000_000),
        ("exact mean", "linear kernel"),
        answer_from_context,
        "3 events a user, width 64, r 64, float32, 256 queries",
    ),
    "topology": Part(
        "stocks",
        (500, 1_000, 2_000, 5_000),
        ("representation", "k-means", "ward"),
        group_stocks,
        "504 days, float64, persistence statistics of degrees 0 and 1 by gudhi; 14 columns to cluster",
    ),
}


def measure_here(part: str, phase: str, size: int, folder: Path) -> None:
    """The process that is watched: print the anonymous bytes after the imports and the seconds."""
    import torch

    import datamodules  # noqa: F401  what imports take is no growth
    import lightning_modules  # noqa: F401

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # the Trainer's remarks on loops without validation and workers
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    imports = float(memory_of(os.getpid())[0])
    timings = PARTS[part].set_up(size, phase, folder)()
    print(json.dumps({"imports": imports, "timings": timings}))


def measure(name: str, args: argparse.Namespace) -> tuple[Costs, list[str]]:
    """All phases and sizes of a part: print a row each, then growth; costs by name, medians, and what is too much."""
    part = PARTS[name]
    sizes = sorted(args.sizes or part.sizes)
    phases = [phase for phase in part.phases if args.phases is None or phase in args.phases]
    costs: Costs = {}
    too_much: list[str] = []
    print(f"\n### {name}\n{part.shapes}; median / least / most of {args.repeats} processes\n")
    print(f"| {part.unit} | phase | time | peak anonymous, MB | of it above imports | bytes each | peak resident, MB |")
    print("|---" * 7 + "|")
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            folder = Path(scratch)
            if name == "interactions":
                write_interactions(size, folder / "rows")
            for phase in phases:
                runs = []
                for _ in range(args.repeats):
                    runs.append(watched(["--measure", name, phase, str(size), scratch], args.threads))
                    shutil.rmtree(folder / "cache", ignore_errors=True)
                above = [run["anonymous"] - run["imports"] for run in runs]
                largest = max(run["anonymous"] for run in runs) / 1e9
                if args.max_gb is not None and largest > args.max_gb:
                    too_much.append(f"{phase} of {size:,} {part.unit} took {largest:.2f} GB")
                timings = {key: [s for run in runs for s in run["timings"][key]] for key in runs[0]["timings"]}
                shown = "; ".join(f"{spread(seconds)} {key}" for key, seconds in timings.items())
                print(
                    f"| {size:,} | {phase} | {shown} | {spread([run['anonymous'] for run in runs], 1 / MB)} "
                    f"| {spread(above, 1 / MB)} | {statistics.median(above) / size:.0f} "
                    f"| {spread([run['resident'] for run in runs], 1 / MB)} |",
                    flush=True,
                )
                for key, values in (timings | {"bytes": above}).items():
                    found = costs.setdefault(f"{phase}, {key}", ([], []))
                    found[0].append(size)
                    found[1].append(statistics.median(values))
    if len(sizes) > 1:
        print("\n| cost | slope over all sizes | between the last two |\n|---|---|---|")
        for key, (at, values) in costs.items():
            over_all, last = growth(at, values)
            print(f"| {key} | {over_all:.2f} | {last:.2f} |")
            if args.max_slope is not None and over_all > args.max_slope and not key.startswith(("k-means", "ward")):
                too_much.append(f"{key} grows with slope {over_all:.2f}")
    return costs, too_much


def main() -> None:
    """Parse the command line, measure, print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--sizes", type=int, nargs="+", help="instead of the part's own")
    parser.add_argument("--phases", nargs="+", help="of the part; default all")
    parser.add_argument("--repeats", type=int, default=3, help="processes a size and phase")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-gb", type=float, help="10^9 bytes that no process may exceed")
    parser.add_argument("--max-slope", type=float, help="growth that no cost may exceed")
    parser.add_argument("--plots", type=Path, help="folder for growth_<part>.png")
    parser.add_argument("--scratch", type=Path, help="folder for synthetic rows and caches; default the system's")
    parser.add_argument("--measure", nargs=4, metavar=("PART", "PHASE", "SIZE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        part, phase, size, folder = args.measure
        measure_here(part, phase, int(size), Path(folder))
        return
    for name, least in (("repeats", args.repeats), ("threads", args.threads), ("sizes", min(args.sizes or [1]))):
        if least < 1:
            parser.error(f"--{name} must be at least 1, got {least}")
    phases = [phase for name in args.only for phase in PARTS[name].phases]
    for phase in args.phases or []:
        if phase not in phases:
            parser.error(f"--phases must be of {', '.join(phases)}, got {phase!r}")
    if not Path("/proc/self/status").is_file():
        parser.error("memory is read from /proc, which only Linux has")
    versions = ", ".join(f"{name} {version(name)}" for name in ("numpy", "polars", "torch"))
    print(
        f"device cpu ({platform.processor() or platform.machine()}, {os.cpu_count()} cores), {args.threads} threads; "
        f"{versions}; load {os.getloadavg()[0]:.1f}"
    )
    too_much = []
    for name in args.only:
        costs, more = measure(name, args)
        too_much += more
        if args.plots:
            plot(name, PARTS[name].unit, costs, args.plots)
    if too_much:
        sys.exit("too much: " + "; ".join(too_much))


if __name__ == "__main__":
    main()
