"""Time and peak memory of ranking a full catalogue: fused kernel, chunks, and plain dense scores with `torch.topk`.

    python scripts/bench_top_k.py
    python scripts/bench_top_k.py --device cuda --users 1024 --items 1000000 --width 64 --dtype bfloat16 -k 10 100 1000

Variants run in turn, round after round, so that a busy neighbour slows all of them alike; medians and interquartile
ranges are over rounds. The fused kernel runs on CUDA alone; the dense variant masks seen items by a scatter, and takes
whatever order `torch.topk` gives equal scores. Before anything is timed the ids of all variants are compared with those
of float64 on a few users, and nothing is reported if one is off by more than rounding allows. Peak memory is the
allocator's above the inputs, so on CUDA alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_modules.ranking import top_k_items

Ranking = tuple[Tensor, Tensor]
Variant = Callable[[Tensor, Tensor, int, Tensor, Tensor], Ranking]


def fused(states: Tensor, table: Tensor, k: int, items: Tensor, offsets: Tensor) -> Ranking:
    """One kernel for scores, seen items and the running top-k."""
    return top_k_items(states, table, k, seen_items=items, seen_offsets=offsets, impl="triton")


def chunked(states: Tensor, table: Tensor, k: int, items: Tensor, offsets: Tensor) -> Ranking:
    """Chunks of scores in PyTorch."""
    return top_k_items(states, table, k, seen_items=items, seen_offsets=offsets, impl="torch")


def dense(states: Tensor, table: Tensor, k: int, items: Tensor, offsets: Tensor) -> Ranking:
    """The matrix of all scores, as one writes it in PyTorch."""
    scores = (states @ table.T).float()
    rows = torch.repeat_interleave(torch.arange(len(states), device=items.device), offsets.diff())
    scores[rows, items] = -torch.inf
    values, ids = scores.topk(k, dim=1)
    return values, ids


def problem(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States (B, D), table (V, D) and lists of seen items, from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, args.dtype)
    states = torch.randn(args.users, args.width, generator=generator).to(args.device, dtype)
    table = torch.randn(args.items, args.width, generator=generator).to(args.device, dtype)
    items = torch.randint(args.items, (args.users * args.seen,), generator=generator).to(args.device)
    offsets = torch.arange(args.users + 1, device=args.device) * args.seen
    return states, table, items, offsets


def check(variants: dict[str, Variant], args: argparse.Namespace) -> None:
    """Compare the score of every place with float64 on a few users.

    A score may be off by the rounding of its dtype's product: dense scores of 16-bit inputs are rounded to 16 bits.
    """
    few = argparse.Namespace(**{**vars(args), "users": min(args.users, 8)})
    states, table, items, offsets = problem(few)
    k = min(max(args.k), args.items - args.seen)
    exact = top_k_items(states.double(), table.double(), k, seen_items=items, seen_offsets=offsets)[0].double()
    norms = states.double().norm(dim=1) * table.double().norm(dim=1).max()
    for name, variant in variants.items():
        unit = torch.finfo(states.dtype if name == "dense" else torch.float32).eps
        if args.allow_tf32:
            unit = max(unit, 2**-9)
        found = variant(states, table, k, items, offsets)[1]
        picked = torch.einsum("bd,bkd->bk", states.double(), table[found].double())
        off = (picked - exact).abs().nan_to_num(0.0).amax(1)
        if not bool((off <= 2 * (args.width + 2) * unit * norms).all()):
            sys.exit(f"parity: {name}: scores are off by {float(off.max()):.2e}: nothing is reported")


def now(device: str) -> float:
    """Seconds, after everything asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_mebibytes(variant: Variant, k: int, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> str:
    """Memory above the inputs, or a dash where nothing counts it."""
    if not inputs[0].is_cuda:
        return "-"
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    states, table, items, offsets = inputs
    variant(states, table, k, items, offsets)
    torch.cuda.synchronize()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f}"


def main() -> None:
    """Parse the command line, check, measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("-B", "--users", type=int, default=256)
    parser.add_argument("-V", "--items", type=int, default=100_000)
    parser.add_argument("-D", "--width", type=int, default=64)
    parser.add_argument("-k", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--seen", type=int, default=50, help="seen items of a user")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--allow-tf32", action="store_true", help="let float32 operands be rounded to TF32")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error(f"--repeats must be at least 2, got {args.repeats}")
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high" if args.allow_tf32 else "highest")
    variants: dict[str, Variant] = {"fused": fused} if args.device == "cuda" else {}
    variants |= {"chunked": chunked, "dense": dense}
    with torch.no_grad():
        check(variants, args)
        states, table, items, offsets = problem(args)
        device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
        print(
            f"{device}; PyTorch {torch.__version__}; {args.dtype}{' in TF32' * args.allow_tf32}; B {args.users:,}, "
            f"V {args.items:,}, D {args.width}, {args.seen} seen; medians of {args.repeats} interleaved rounds\n"
        )
        print("| k | variant | ms (IQR) | times dense | peak MiB |")
        print("|---|---|---|---|---|")
        for k in args.k:
            times: dict[str, list[float]] = {name: [] for name in variants}
            for repeat in range(args.repeats + 1):  # the first does not count: kernels are compiled in it
                for name, variant in variants.items():
                    start = now(args.device)
                    variant(states, table, k, items, offsets)
                    elapsed = now(args.device) - start
                    if repeat:
                        times[name].append(elapsed * 1e3)
            for name, variant in variants.items():
                low, middle, high = statistics.quantiles(times[name], n=4)
                # the ratio of each round, so that load which comes and goes cancels
                ratio = statistics.median(a / b for a, b in zip(times[name], times["dense"], strict=True))
                peak = peak_mebibytes(variant, k, (states, table, items, offsets))
                print(f"| {k} | {name} | {middle:.2f} ({high - low:.2f}) | {ratio:.2f} | {peak} |")


if __name__ == "__main__":
    main()
