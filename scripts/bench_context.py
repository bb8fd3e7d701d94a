"""Look-up and aggregation a query against a search per user, and what a million users cost.

    python scripts/bench_context.py --threads 1
    python scripts/bench_context.py --device cuda --queries 4096
    python scripts/bench_context.py --users 200 --sizes 1000 10000 --repeats 5

First, 1,000 context users of width 256. The other is what one would write by hand from the description of the released
code: for each query a loop over users, a search in each one's sorted times, the rows stacked, then the aggregator's
formula. Ours is the whole call: look-up, masks, ages, aggregation. ``sorted`` batches hold queries that follow each
other in time, ``scattered`` ones are drawn over the whole year, ``forced gather`` shows the other layout on the sorted
ones. The other runs a part of the queries. Both run in turn, round after round, the first of a round alternating; the
ratio is the median over rounds of time a query. Results are compared first and nothing is reported if they differ. The
floor is the time that the states and, for each query and row, mask, age and weight take to move once at the copying
speed of this device.

Then the exact mean and the linear kernel by prefix sums at width 64 while users grow, and what they hold in bytes over
the bytes of the states: bank and sums, all but the user and the time of each event. Beside them, what it costs to
read as many states at random places of the table as the exact mean reads a query, and nothing else: it grows as the
table leaves the caches, for any method.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import elu

from lightning_modules.context.aggregators import Aggregator, Attention, KernelAttention, Mean
from lightning_modules.context.bank import ContextBank
from lightning_modules.context.prefix_sums import PrefixMean, PrefixMoments
from lightning_modules.context.visible import MICROSECONDS_PER_DAY

YEAR = 365 * MICROSECONDS_PER_DAY
WIDTH, FLAT_WIDTH, EVENTS_A_USER, FLAT_EVENTS = 256, 64, 100, 3
CELL = 9
"""Bytes of mask, age and weight of a query and a row."""


def problem(n_users: int, n_events: int, d: int, device: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Random states and times over a year, whole seconds."""
    generator = torch.Generator().manual_seed(0)
    seconds = torch.randint(0, YEAR // 1_000_000, (n_users, n_events), generator=generator)
    events = {
        "times": (seconds.sort(1).values * 1_000_000).flatten().to(device),
        "offsets": (torch.arange(n_users + 1) * n_events).to(device),
    }
    return torch.randn(n_users * n_events, d, generator=generator).div_(d**0.5).to(device), events


def asked(n_queries: int, n_users: int, span: int, device: str) -> tuple[Tensor, Tensor]:
    """Query times in order, over ``span`` microseconds in the middle of the year, and query users."""
    generator = torch.Generator().manual_seed(1)
    times = (YEAR - span) // 2 + torch.randint(0, span, (n_queries,), generator=generator).sort().values
    return times.to(device), torch.randint(0, n_users, (n_queries,), generator=generator).to(device)


def by_hand(
    states: Tensor, user_times: list[np.ndarray], time_: int, user: int, query: Tensor, aggregator: Aggregator
) -> Tensor:
    """One query: a search per user, the rows stacked, the formula."""
    rows, start = [], 0
    for other, times in enumerate(user_times):
        place = int(np.searchsorted(times, time_)) - 1
        if place >= 0 and other != user:
            rows.append(states[start + place])
        start += len(times)
    seen = torch.stack(rows)
    match aggregator:
        case Mean():
            return seen.mean(0)
        case KernelAttention():
            keys, own = aggregator.phi(seen), aggregator.phi(query)
            return torch.softmax(keys @ own / len(own) ** 0.5, 0) @ seen
        case Attention():
            return torch.softmax(seen @ query / len(query) ** 0.5, 0) @ seen
        case _:
            raise AssertionError(aggregator)


def seconds_of(call: Callable[[], object], device: str) -> float:
    """Wall time of a call, finished on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def copying_speed(device: str) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.ones(64 * 2**20, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * 4 * len(source) / min(seconds_of(lambda: target.copy_(source), device) for _ in range(5))


def spread(values: list[float], digits: int = 1) -> str:
    """Median and interquartile range."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f} ({high - low:.{digits}f})"


@torch.no_grad()
def measure_aggregators(args: argparse.Namespace) -> None:
    """First table."""
    states, events = problem(args.users, EVENTS_A_USER, WIDTH, args.device)
    bank = ContextBank.build(states, events, torch.arange(args.users))
    prefix = PrefixMean.build(bank)
    user_times = [times.cpu().numpy() for times in events["times"].split(EVENTS_A_USER)]
    speed = copying_speed(args.device)
    print(f"{args.users} users, {len(states)} events, width {WIDTH}, float32; copies run at {speed / 1e9:.1f} GB/s\n")
    print(
        "| aggregator | batch | ours, us a query | other, us a query | other over ours | MB moved | floor, us a query |"
    )
    print("|---|---|---|---|---|---|---|")
    query = torch.randn(args.queries, WIDTH, generator=torch.Generator().manual_seed(2)).to(args.device)
    torch.manual_seed(3)
    some = torch.arange(0, args.queries, max(1, args.queries // args.by_hand))
    batches = {
        "sorted": (asked(args.queries, args.users, MICROSECONDS_PER_DAY, args.device), "auto"),
        "scattered": (asked(args.queries, args.users, YEAR * 9 // 10, args.device), "auto"),
        "forced gather": (asked(args.queries, args.users, MICROSECONDS_PER_DAY, args.device), "gathered"),
    }
    for aggregator in (Mean(d=WIDTH), Attention(d=WIDTH), KernelAttention(d=WIDTH)):
        aggregator = aggregator.to(args.device)
        name = type(aggregator).__name__
        for batch, ((times, users), layout) in batches.items():

            def ours(
                aggregator: Aggregator = aggregator, times: Tensor = times, users: Tensor = users, layout: str = layout
            ) -> Tensor:
                return aggregator(query, bank.context(times, users, layout))

            def other(aggregator: Aggregator = aggregator, times: Tensor = times, users: Tensor = users) -> Tensor:
                return torch.stack(
                    [
                        by_hand(states, user_times, int(times[row]), int(users[row]), query[row], aggregator)
                        for row in some.tolist()
                    ]
                )

            context = bank.context(times, users, layout)
            cells = context.visible.numel()
            read = len(context.states) if context.rows is None else cells
            moved = read * WIDTH * 4 + cells * CELL
            report(f"{name}", batch, ours, other, moved, speed, some, args)
            if name == "Mean" and batch != "forced gather":

                def exact(times: Tensor = times, users: Tensor = users) -> Tensor:
                    return prefix.mean(times, users)[0]

                least = args.queries * WIDTH * (8 + 4 + 4)  # a kept sum, one's own state, the answer
                report("exact mean, prefix sums", batch, exact, other, least, speed, some, args)


def report(
    name: str,
    batch: str,
    ours: Callable[[], Tensor],
    other: Callable[[], Tensor],
    moved: int,
    speed: float,
    some: Tensor,
    args: argparse.Namespace,
) -> None:
    """Compare, measure in turn, print a row."""
    # float32 sums of n states of norm 1, softmax logits near 1
    if not torch.allclose(ours()[some.to(args.device)], other(), rtol=0, atol=1e-5):
        sys.exit(f"parity: {name} on {batch} differs from the search per user: nothing is reported")
    mine, theirs = [], []
    for step in range(args.repeats):
        order = [(ours, mine, args.queries), (other, theirs, len(some))]
        for call, found, n in order if step % 2 else reversed(order):
            found.append(seconds_of(call, args.device) / n * 1e6)
    ratios = [slow / fast for fast, slow in zip(mine, theirs, strict=True)]
    floor = moved / speed / args.queries * 1e6
    print(
        f"| {name} | {batch} | {spread(mine)} | {spread(theirs, 0)} | {spread(ratios, 0)} | {moved / 1e6:.1f} "
        f"| {floor:.1f} |",
        flush=True,
    )


def positive(states: Tensor) -> Tensor:
    """Features of the linear kernel, r = d."""
    return elu(states) + 1


@torch.no_grad()
def measure_growth(args: argparse.Namespace) -> None:
    """Second table."""
    print(f"\nwidth {FLAT_WIDTH}, r {FLAT_WIDTH}, {FLAT_EVENTS} events a user, all users in the context\n")
    print(
        "| users | exact mean, us a query | linear kernel, us a query | reading states alone, us a query "
        "| mean, bytes over states | kernel | build, s |"
    )
    print("|---" * 7 + "|")
    indices = {}
    for n_users in args.sizes:
        bank = ContextBank.build(*problem(n_users, FLAT_EVENTS, FLAT_WIDTH, args.device), torch.arange(n_users))
        start = time.perf_counter()
        mean = PrefixMean.build(bank)
        middle = time.perf_counter()
        moments = PrefixMoments.build(bank, positive)
        end = time.perf_counter()
        indices[n_users] = (mean, moments, f"{middle - start:.1f} + {end - middle:.1f}")
    query = positive(torch.randn(args.queries, FLAT_WIDTH, generator=torch.Generator().manual_seed(2)).to(args.device))
    times: dict[int, tuple[list[float], ...]] = {n_users: ([], [], []) for n_users in args.sizes}
    for step in range(args.repeats + 1):
        for n_users, (mean, moments, _) in indices.items():
            asked_for = asked(args.queries, n_users, YEAR * 9 // 10, args.device)
            one = seconds_of(lambda mean=mean, asked_for=asked_for: mean.mean(*asked_for), args.device)
            two = seconds_of(
                lambda moments=moments, asked_for=asked_for: moments.lookup(query, *asked_for), args.device
            )
            # Half a block is replayed on average; an event brings a state, and but for a user's first replaces one.
            n_read = args.queries * mean.block // 2 * (2 * FLAT_EVENTS - 1) // FLAT_EVENTS
            rows = torch.randint(len(mean.states), (n_read,), device=args.device)
            three = seconds_of(lambda mean=mean, rows=rows: mean.states.index_select(0, rows), args.device)
            if step:  # the first round warms up
                for found, seconds in zip(times[n_users], (one, two, three), strict=True):
                    found.append(seconds / args.queries * 1e6)
    for n_users, (mean, moments, built) in indices.items():
        states = mean.states.numel() * mean.states.element_size()
        print(
            f"| {n_users} | {' | '.join(map(spread, times[n_users]))} | {mean.n_bytes / states:.3f} "
            f"| {moments.n_bytes / states:.3f} | {built} |"
        )


def main() -> None:
    """Parse the command line, measure, and print two Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=512, help="queries a batch")
    parser.add_argument("--by-hand", type=int, default=8, help="queries that the search per user answers")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    for name, least in (("users", 2), ("queries", 1), ("by_hand", 1), ("repeats", 2), ("threads", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    torch.set_num_threads(args.threads)
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "CPU"
    print(
        f"{device}, {os.cpu_count()} cores, {args.threads} threads, torch {torch.__version__}; batches of "
        f"{args.queries} queries; load {os.getloadavg()[0]:.1f}; medians (IQR) of {args.repeats} interleaved rounds"
    )
    measure_aggregators(args)
    measure_growth(args)


if __name__ == "__main__":
    main()
