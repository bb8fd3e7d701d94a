"""Time and peak memory of CCE- against CE- written plainly in PyTorch, on one device.

    python scripts/bench_cce_minus.py
    python scripts/bench_cce_minus.py --device cuda --positions 32768 --negatives 1511 --width 256 --items 15000

Variants run forward and backward in turn, round after round, each call with a new step (fresh ids), so that a busy
neighbour slows all of them alike; medians and interquartile ranges are over rounds. Peak memory is that of the resident
set (CPU) or of the allocator (CUDA) during one forward and backward, above the inputs and including both
gradients, in a process of its own per variant. Before anything is timed every variant is compared with float64 on the
same ids, and nothing is reported if one is off.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Idle workers must not spin on the cores that the next variant, or a neighbour, needs.
os.environ["OMP_WAIT_POLICY"] = "passive"

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.cce_minus import cce_minus_loss, cce_minus_negatives

PLAIN = ("plain, table[ids]", "plain, F.embedding")
CHUNKED = {"chunked, per position": "position", "chunked, per tile of 128": "tile", "chunked, per batch": "batch"}
FULL = "chunked, full cross-entropy"


@dataclass(frozen=True)
class Problem:
    """Inputs: hidden (N, D), table (V, D) and targets (N,)."""

    hidden: Tensor
    table: Tensor
    targets: Tensor
    n_negatives: int

    @classmethod
    def make(cls, args: argparse.Namespace) -> Problem:
        """Unit-scale logits from a fixed seed, in the dtype and on the device asked for."""
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, args.dtype)
        hidden = torch.randn(args.positions, args.width, generator=generator)
        table = torch.randn(args.items, args.width, generator=generator) / args.width**0.5
        targets = torch.randint(args.items, (args.positions,), generator=generator)
        return cls(
            hidden.to(args.device, dtype).requires_grad_(),
            table.to(args.device, dtype).requires_grad_(),
            targets.to(args.device),
            args.negatives,
        )


def plain_loss(problem: Problem, ids: Tensor, gather: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """CE- as one writes it in PyTorch: gather the rows of the negatives, multiply, mask, logsumexp."""
    n_items = problem.table.shape[0]
    positive = (problem.hidden * gather(problem.table, problem.targets)).sum(-1).float()
    logits = torch.bmm(gather(problem.table, ids), problem.hidden[:, :, None]).squeeze(-1).float()
    rejected = ids == problem.targets[:, None]
    n_kept = ids.shape[1] - rejected.sum(-1, keepdim=True)
    logits = (logits + torch.log((n_items - 1) / n_kept)).masked_fill(rejected, float("-inf"))
    return (torch.logsumexp(torch.cat([positive[:, None], logits], dim=1), dim=1) - positive).mean()


def index_rows(table: Tensor, ids: Tensor) -> Tensor:
    """Gather by indexing."""
    return table[ids]


def embed_rows(table: Tensor, ids: Tensor) -> Tensor:
    """Gather by the embedding function, whose backward differs."""
    return F.embedding(ids, table)


def variant_loss(name: str, problem: Problem, step: int) -> Tensor:
    """Loss of one variant with the ids of one step."""
    if name in PLAIN:
        shape = (problem.targets.shape[0], problem.n_negatives)
        generator = torch.Generator(problem.targets.device).manual_seed(step)
        ids = torch.randint(problem.table.shape[0], shape, generator=generator, device=problem.targets.device)
        return plain_loss(problem, ids, index_rows if name == PLAIN[0] else embed_rows)
    if name == FULL:
        return cce_minus_loss(problem.hidden, problem.table, problem.targets, n_negatives="all")
    sharing = CHUNKED[name]
    k = problem.n_negatives
    return cce_minus_loss(
        problem.hidden, problem.table, problem.targets, n_negatives=k, seed=1, step=step, sharing=sharing
    )


def check_parity(args: argparse.Namespace) -> None:
    """Compare every variant with float64 on the same ids, on a few hundred positions of the full catalogue.

    The error allowed is that of plain PyTorch in the same dtype, twice over, plus 1e-5.
    """
    few = argparse.Namespace(**{**vars(args), "positions": min(args.positions, 300)})
    for name, sharing in CHUNKED.items():
        problem = Problem.make(few)
        ids, row = cce_minus_negatives(
            problem.targets, args.items, n_negatives=args.negatives, seed=1, step=7, sharing=sharing
        )
        ids = ids[row]
        exact = Problem(
            problem.hidden.detach().double().requires_grad_(),
            problem.table.detach().double().requires_grad_(),
            problem.targets,
            args.negatives,
        )
        truth = _gradients(
            cce_minus_loss(exact.hidden, exact.table, exact.targets, negatives=ids, impl="reference"), exact
        )
        plain = _gradients(plain_loss(problem, ids, index_rows), problem)
        ours = _gradients(variant_loss(name, problem, step=7), problem)
        for what, t, p, o in zip(("loss", "d_hidden", "d_table"), truth, plain, ours, strict=True):
            allowed = 2 * _error(p, t) + 1e-5
            if not _error(o, t) <= allowed:
                sys.exit(
                    f"parity: {name}: {what} is off by {_error(o, t):.2e}, allowed {allowed:.2e}: nothing is reported"
                )


def _gradients(loss: Tensor, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    return loss.detach(), *torch.autograd.grad(loss, (problem.hidden, problem.table))


def _error(value: Tensor, truth: Tensor) -> float:
    """Largest error relative to the largest entry."""
    return float((value.double() - truth).abs().max() / truth.abs().max())


def time_variants(names: list[str], problem: Problem, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds of forward and backward of each variant in each round, after one round that does not count."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for step in range(repeats + 1):
        for name in names:
            problem.hidden.grad = problem.table.grad = None
            start = _now(problem)
            loss = variant_loss(name, problem, step)
            middle = _now(problem)
            loss.backward()
            if step:
                times[name].append(((middle - start) * 1e3, (_now(problem) - middle) * 1e3))
    return times


def _now(problem: Problem) -> float:
    if problem.hidden.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(name: str, args: argparse.Namespace) -> int:
    """Peak memory of one forward and backward above the inputs; called in a fresh process."""
    tiny = argparse.Namespace(**{**vars(args), "positions": 8, "items": 64, "negatives": 4})
    variant_loss(name, Problem.make(tiny), 0).backward()  # libraries load and thread pools start here
    problem = Problem.make(args)
    if args.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        variant_loss(name, problem, 1).backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of the resident set
    before = _status_bytes("VmRSS")
    variant_loss(name, problem, 1).backward()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


def peak_in_subprocess(name: str) -> int:
    """Run this script again for the peak memory of one variant."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name]
    return int(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["peak_bytes"])


def _quartile_range(values: list[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4)
    return high - low


def main() -> None:
    """Parse the command line, check, measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("-N", "--positions", type=int, default=6400)
    parser.add_argument("-K", "--negatives", type=int, default=256)
    parser.add_argument("-D", "--width", type=int, default=64)
    parser.add_argument("-V", "--items", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--full", action="store_true", help="time the exact full cross-entropy too")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.repeats < 2:
        parser.error(f"--repeats must be at least 2, got {args.repeats}")
    if args.peak_of:
        print(json.dumps({"peak_bytes": peak_bytes(args.peak_of, args)}))
        return

    check_parity(args)
    names = [*PLAIN, *CHUNKED, *([FULL] if args.full else [])]
    times = time_variants(names, Problem.make(args), args.repeats)
    totals = {name: [sum(pair) for pair in times[name]] for name in names}
    peaks = {name: peak_in_subprocess(name) for name in names}
    fastest = min(PLAIN, key=lambda name: statistics.median(totals[name]))

    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    print(
        f"{device}; PyTorch {torch.__version__}; {args.dtype}; N {args.positions:,}, K {args.negatives:,}, "
        f"D {args.width}, V {args.items:,}; medians of {args.repeats} interleaved rounds\n"
    )
    print("| variant | forward ms | backward ms | both ms (IQR) | faster than plain | peak MiB | of plain's peak |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        forward, backward = (statistics.median(part) for part in zip(*times[name], strict=True))
        # the ratio of each round, so that load which comes and goes cancels
        ratio = statistics.median(a / b for a, b in zip(totals[fastest], totals[name], strict=True))
        both, spread = statistics.median(totals[name]), _quartile_range(totals[name])
        print(
            f"| {name} | {forward:.1f} | {backward:.1f} | {both:.1f} ({spread:.1f}) | {ratio:.2f}x "
            f"| {peaks[name] / 2**20:.0f} | {peaks[name] / peaks[fastest]:.2f} |"
        )


if __name__ == "__main__":
    main()
