"""Time and peak memory of CCE- against CE- written plainly in PyTorch, on one device.

    python scripts/bench_cce_minus.py
    python scripts/bench_cce_minus.py --device cuda --workload ml20m         # zvuk, megamarket: other rivals too
    python scripts/bench_cce_minus.py --device cuda --workload ml20m -K 1023     # what the tile-shared goal is of
    python scripts/bench_cce_minus.py --device cuda --workload ml20m --memory-flat
    python scripts/bench_cce_minus.py --workload ml20m --scale 0.01          # a dry run of the same code on a CPU

Variants run forward and backward in turn, round after round, each call with a new step (fresh ids), so that a busy
neighbour slows all of them alike; medians and interquartile ranges are over rounds. Peak memory is that of the resident
set (CPU, in a process of its own per variant) or of the allocator (CUDA) during one forward and backward, above the
inputs and including both gradients. Before anything is timed every variant is compared with float64 on the same ids:
nothing is reported if one of ours is off, and no rival that is.

A workload adds rivals (compiled CE-, the released design, full cross-entropies where installed) and the floor: the time
that the bytes and operations of our kernels take at rates measured on the device. A rival that does not fit, or takes
longer than --rival-seconds, runs on fewer positions and is marked "extrapolated": its time is scaled with N, its memory
lies on the line through two sizes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from dataclasses import dataclass, replace

# Idle workers must not spin on the cores that the next variant, or a neighbour, needs.
os.environ["OMP_WAIT_POLICY"] = "passive"
# Variants of very different sizes take turns: pages that grow in place leave no holes that the next one does not fit.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import bench_measure as measure
import torch
from bench_variants import (
    PLAIN,
    RELEASED,
    TILE,
    Problem,
    Variant,
    our_variants,
    parity,
    plain_variants,
    rivals,
    runs_triton,
)

# Positions, negatives, width and items: MovieLens-20M at 64 x 512, and the two largest catalogues of the paper.
WORKLOADS = {
    "ml20m": (64 * 512, 1511, 256, 15_000),
    "zvuk": (128 * 1024, 2047, 256, 900_000),
    "megamarket": (920_000, 1023, 256, 1_660_000),
}
USUAL = (6400, 256, 64, 100_000)
FLAT_NEGATIVES = (64, 256, 1024, 4096, 8192)
FLAT_WITHIN = 0.01


def parse_arguments() -> argparse.Namespace:
    """The command line, with sizes and dtype filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="bfloat16 for a workload on CUDA")
    parser.add_argument("--workload", choices=tuple(WORKLOADS), help="sizes by name, with rivals and the floor")
    parser.add_argument("--scale", type=float, default=1.0, help="of a workload's positions, negatives and items")
    parser.add_argument("-N", "--positions", type=int)
    parser.add_argument("-K", "--negatives", type=int)
    parser.add_argument("-D", "--width", type=int)
    parser.add_argument("-V", "--items", type=int)
    parser.add_argument("--impl", choices=("auto", "torch", "triton"), default="auto", help="path of our modes")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--full", action="store_true", help="time the exact full cross-entropy too")
    parser.add_argument("--skip", nargs="+", default=[], metavar="TEXT", help="variants whose name contains this")
    parser.add_argument("--rival-seconds", type=float, help="most that a call of a rival may take; 2 on CUDA")
    parser.add_argument("--memory-flat", action="store_true", help="peak memory of our modes over K, and nothing else")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error(f"--repeats must be at least 2, got {args.repeats}")
    if not args.scale > 0:
        parser.error(f"--scale must be positive, got {args.scale}")
    sizes = WORKLOADS.get(args.workload, USUAL)
    scales = (args.scale, args.scale, None, args.scale) if args.workload else (None,) * 4
    for name, size, scale in zip(("positions", "negatives", "width", "items"), sizes, scales, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, size if scale is None else max(4, round(size * scale)))
    on_cuda = args.device == "cuda"
    args.dtype = args.dtype or ("bfloat16" if on_cuda and args.workload else "float32")
    if args.rival_seconds is None:
        args.rival_seconds = 2.0 if on_cuda else math.inf
    if on_cuda and not torch.cuda.is_available():
        sys.exit("not measured: no CUDA device is at hand")
    return args


def make_problem(args: argparse.Namespace) -> Problem:
    """Inputs of the size, dtype and device asked for."""
    dtype = getattr(torch, args.dtype)
    return Problem.make(args.positions, args.negatives, args.width, args.items, dtype, args.device)


def say(text: str) -> None:
    """A line of progress, apart from the report."""
    print(text, file=sys.stderr, flush=True)


def list_variants(args: argparse.Namespace, problem: Problem) -> tuple[list[Variant], dict[str, str]]:
    """What to run, and by name why the rest is not."""
    variants = [*plain_variants(), *our_variants(args.device, args.impl, args.full)]
    missing: dict[str, str] = {}
    if args.workload:
        others, missing = rivals(problem)
        variants += others
    return [v for v in variants if not any(text in v.name for text in args.skip)], missing


def first_line(error: Exception) -> str:
    """An error in one line, for the report."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def check_and_fit(
    variants: list[Variant], problem: Problem, seconds: float
) -> tuple[list[Variant], dict[str, int], dict[str, str]]:
    """Variants that compute what they should, the positions each is run on, and by name why the rest is left out."""
    kept, sizes, missing = [], {}, {}
    for variant in variants:
        say(f"checking {variant.name}")
        try:
            wrong = parity(variant, problem)
            if not wrong:
                sizes[variant.name] = measure.largest_n(variant, problem, seconds)
                kept.append(variant)
                continue
        except Exception as error:  # whatever another package may raise: it is not what is measured here
            if variant.family == "ours":
                raise
            wrong = first_line(error)
        if variant.family == "ours":
            sys.exit(f"parity: {variant.name}: {wrong}: nothing is reported")
        missing[variant.name] = wrong
        measure.free_memory(problem)
    return kept, sizes, missing


def peak_of(variant: Variant, problem: Problem, n: int) -> int:
    """Peak memory of a variant on its first n positions, or on the line to all of them."""

    def at(size: int) -> int:
        if problem.is_cuda:
            return measure.peak_bytes(variant, problem.first(size))
        return measure.peak_in_subprocess(variant.name, "--positions", str(size))

    peak = at(n)
    if n < problem.n_positions:
        peak = measure.extrapolated_peak(peak, n, at(n // 2), n // 2, problem.n_positions)
    return peak


def quartile_range(values: list[float]) -> float:
    """Width of the middle half."""
    low, _, high = statistics.quantiles(values, n=4)
    return high - low


@dataclass(frozen=True)
class Results:
    """What was measured, by name of a variant.

    Args:
        sizes: Positions it was run on.
        times: Milliseconds forward and backward of every round, scaled to all positions.
        peaks: Bytes.
        floors: Least milliseconds of both passes, where there is a floor.
        missing: Why it was not measured.
        rates: What the floors were computed from, in words.
    """

    sizes: dict[str, int]
    times: dict[str, list[measure.Milliseconds]]
    peaks: dict[str, int]
    floors: dict[str, float]
    missing: dict[str, str]
    rates: str

    def both(self, name: str) -> list[float]:
        """Milliseconds of both passes of every round, none where it was not measured."""
        return [sum(pair) for pair in self.times.get(name, [])]

    def faster(self, name: str, than: str) -> float | None:
        """How many times faster: the median of the ratio of each round, so that load which comes and goes cancels."""
        pairs = list(zip(self.both(than), self.both(name), strict=False))
        return statistics.median(a / b for a, b in pairs) if pairs else None

    def share_of_floor(self, name: str) -> float | None:
        """Least time over the time measured."""
        measured = name in self.floors and name in self.times
        return self.floors[name] / statistics.median(self.both(name)) if measured else None

    def fastest_plain(self) -> str:
        """The faster of the two plain forms, "" where neither was measured."""
        plain = [name for name in PLAIN if name in self.times]
        return min(plain, key=lambda name: statistics.median(self.both(name)), default="")


def measure_all(args: argparse.Namespace, problem: Problem) -> tuple[list[Variant], Results]:
    """Check, then floors, times and peaks of memory."""
    variants, missing = list_variants(args, problem)
    variants, sizes, dropped = check_and_fit(variants, problem, args.rival_seconds)
    floors, rates = measure_floors(args, problem, variants) if args.workload else ({}, "")
    say("timing")
    times, failed = measure.time_variants(variants, problem, sizes, args.repeats)
    peaks = {}
    for variant in variants:
        if variant.name in times:
            say(f"peak memory of {variant.name}")
            try:
                peaks[variant.name] = peak_of(variant, problem, sizes[variant.name])
            except RuntimeError as error:  # out of memory on CUDA is one of them
                if variant.family == "ours":
                    raise
                missing[f"peak memory of {variant.name}"] = first_line(error)
    return variants, Results(sizes, times, peaks, floors, missing | dropped | failed, rates)


def measure_floors(args: argparse.Namespace, problem: Problem, variants: list[Variant]) -> tuple[dict[str, float], str]:
    """Least milliseconds by name, and the rates behind them; nothing where Triton is not installed."""
    try:
        import bench_floor
    except ModuleNotFoundError as error:
        return {}, f"floors not measured: {error}"
    say("floor")
    rates = bench_floor.measure_rates(problem.table, runs_triton(args.device))
    measure.free_memory(problem)
    sizes = (args.positions, args.negatives, args.items, args.width, problem.table.element_size(), TILE)
    floors = {v.name: bench_floor.floor_milliseconds(v.sharing, *sizes, rates) for v in variants if v.sharing}
    return floors, f"rates at this V and D: {rates}"


def report(args: argparse.Namespace) -> None:
    """Measure, and print Markdown tables."""
    problem = make_problem(args)
    variants, results = measure_all(args, problem)
    plain, peaks = results.fastest_plain(), results.peaks
    print(
        f"{measure.describe_device(args.device, args.threads)}; {args.dtype}; N {args.positions:,}, "
        f"K {args.negatives:,}, D {args.width}, V {args.items:,}; medians of {args.repeats} interleaved rounds\n"
    )
    if results.rates:
        print(results.rates + "\n")
    columns = ["variant", "forward ms", "backward ms", "both ms (IQR)", "faster than plain", "peak MiB"]
    columns += ["of plain's peak", *(["floor ms", "of floor"] if results.floors else [])]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name, pairs in results.times.items():
        forward, backward = (statistics.median(part) for part in zip(*pairs, strict=True))
        both, ratio = results.both(name), results.faster(name, plain)
        n = results.sizes[name]
        cells = [name if n == args.positions else f"{name}, extrapolated from N {n:,}"]
        cells += [f"{forward:.1f}", f"{backward:.1f}", f"{statistics.median(both):.1f} ({quartile_range(both):.1f})"]
        cells += ["-" if ratio is None else f"{ratio:.2f}x", f"{peaks[name] / 2**20:.0f}" if name in peaks else "-"]
        cells += [f"{peaks[name] / peaks[plain]:.2f}" if name in peaks and plain in peaks else "-"]
        share = results.share_of_floor(name)
        if results.floors:
            cells += ["-", "-"] if share is None else [f"{results.floors[name]:.2f}", f"{share:.1%}"]
        print(f"| {' | '.join(cells)} |")
    for name, reason in results.missing.items():
        print(f"\nnot measured: {name}: {reason}")
    if args.workload:
        print_goals(args, results, {v.sharing: v.name for v in variants if v.family == "ours"}, plain)


def print_goals(args: argparse.Namespace, results: Results, ours: dict[str, str], plain: str) -> None:
    """What was aimed at on an H100 in bfloat16, against plain CE- at the ML-20M-like size, and what came out."""
    position, tile = ours.get("position", ""), ours.get("tile", "")
    both = plain in results.peaks and position in results.peaks
    goals = [
        ("per position: times faster than plain", 5.0, results.faster(position, plain)),
        (f"per position: times faster than the {RELEASED}", 3.0, results.faster(position, RELEASED)),
        ("per position: share of its floor", 0.6, results.share_of_floor(position)),
        (
            "per position: times less memory than plain",
            50.0,
            results.peaks[plain] / results.peaks[position] if both else None,
        ),
        ("per tile, K 1023: times faster than plain", 100.0, results.faster(tile, plain)),
        ("per tile: share of its floor", 0.5, results.share_of_floor(tile)),
    ]
    judged = args.device == "cuda" and args.dtype == "bfloat16"
    print("\n| goal (of an H100, bfloat16) | wanted | measured | |\n|---|---|---|---|")
    for name, wanted, found in goals:
        if found is None:
            measured, verdict = "not measured", "-"
        else:
            measured, verdict = f"{found:.2f}", "met" if found >= wanted else "missed"
            if "K 1023" in name and args.negatives != 1023:
                verdict = f"not judged at K {args.negatives:,}"
            if not judged:
                verdict = "not judged here"
        print(f"| {name} | {wanted:g} | {measured} | {verdict} |")


def report_flat_memory(args: argparse.Namespace) -> None:
    """Print peak memory over K at fixed N; end with status 1 where it moves on CUDA."""
    problem = make_problem(args)
    print(
        f"{measure.describe_device(args.device, args.threads)}; {args.dtype}; N {args.positions:,}, D {args.width}, "
        f"V {args.items:,}; peak MiB above the inputs, both gradients included\n"
    )
    print("| variant |" + "".join(f" K {k:,} |" for k in FLAT_NEGATIVES) + " spread |")
    print("|---|" + "---|" * (len(FLAT_NEGATIVES) + 1))
    flat = True
    for variant in our_variants(args.device, args.impl, full=False):
        peaks = []
        for k in FLAT_NEGATIVES:
            say(f"{variant.name}, K {k}")
            if args.device == "cuda":
                peaks.append(measure.peak_bytes(variant, replace(problem, n_negatives=k)))
            else:
                peaks.append(measure.peak_in_subprocess(variant.name, "--negatives", str(k)))
        spread = max(peaks) / min(peaks) - 1
        flat = flat and spread <= FLAT_WITHIN
        print(f"| {variant.name} |" + "".join(f" {peak / 2**20:.1f} |" for peak in peaks) + f" {spread:.2%} |")
    if args.device == "cpu":
        print("\nnot judged: on a CPU the blocks of a small problem grow up to a fixed budget")
    elif not flat:
        sys.exit(f"peak memory moves by more than {FLAT_WITHIN:.0%} with K")


def print_resident_peak(args: argparse.Namespace) -> None:
    """What `peak_in_subprocess` reads: the peak memory of one variant in this process."""
    problem = make_problem(args)
    (variant,) = (v for v in list_variants(args, problem)[0] if v.name == args.peak_of)
    tiny = Problem.make(8, 4, args.width, 64, problem.hidden.dtype)
    # a compiler works anew on every shape
    warm_up = problem if variant.family == "compiled" else tiny
    print(json.dumps({"peak_bytes": measure.resident_peak_bytes(variant, problem, warm_up)}))


def main() -> None:
    """Run what the command line asks for."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print_resident_peak(args)
    elif args.memory_flat:
        report_flat_memory(args)
    else:
        report(args)


if __name__ == "__main__":
    main()
