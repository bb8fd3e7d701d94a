"""Series x steps a second of our attacks against a bare loop of the same passes, and of a grid as one batch.

    python scripts/bench_attacks.py --threads 1
    python scripts/bench_attacks.py --series 2850 --series-large 256 --threads 1 --clock cpu
    python scripts/bench_attacks.py --series 2850 --series-large 2850 --device cuda

Synthetic series of length 301, as long as the Freezer sets, against every network with a detector of the same
architecture: SumReg with sign steps and PGD on the logit margin. The bare loop is what one would write by hand: frozen
parameters, one forward and backward pass a step, the logits of every iterate kept, and no checks. Both run in turn,
pair after pair, the first of a pair alternating; the ratio is the median over pairs. Series and logits of both are
compared first, with all series in one pass as the loop has them, bit for bit on a CPU, and nothing is reported if they
differ; nor if an iterate of the unprojected run is not, with its logits, the end of a run of so many steps. Timed is
the default, which cuts a batch on a CPU into parts; ``--whole`` times all series in one pass. Where torchattacks,
foolbox or ART is installed, its PGD joins in, on the same networks, ball and steps with cross-entropy; nothing is
reported if it ends with another accuracy.

Then a grid of 3 steps and 4 weights as one batch against its 12 configurations one by one, on as many series as the
smallest data sets have.

On a machine that others use too, ``--clock cpu`` counts the time of this process on its core instead of the time that
passes. LSTM, ResCNN and RNNAttention, whose pass costs two to four times that of the others, run on ``--series-large``.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from lightning_modules import networks
from lightning_modules.attacks import Attack, Linf, PGDStep, SignStep, SumReg, Vanilla, decisions, grid_points, run_grid

LENGTH, RADIUS, STEP, ALPHA = 301, 0.3, 0.02, 0.1
NAMES = ("LSTM", "S4", "PatchTST", "ResCNN", "RNNAttention")
LARGE = ("LSTM", "ResCNN", "RNNAttention")
GRID_STEPS, GRID_ALPHAS, GRID_SERIES = (0.005, 0.01, 0.03), (0.0, 0.01, 0.1, 1.0), 28


def build(name: str, seed: int, device: str) -> nn.Module:
    """An untrained network in evaluation mode with frozen parameters: the arithmetic is that of a trained one."""
    torch.manual_seed(seed)
    network = getattr(networks, name)(n_channels=1, n_classes=2, n_steps=LENGTH).to(device).eval()
    return network.requires_grad_(False)


def bare_sum(victim: nn.Module, detector: nn.Module, x: Tensor, y: Tensor, n_steps: int) -> tuple[Tensor, Tensor]:
    """SumReg with sign steps, by hand."""
    current, kept = x.clone(), []
    for _ in range(n_steps):
        current.requires_grad_(True)
        logits, score = victim(current), detector(current)
        total = ((1 - 2 * y) * logits[:, 0] + ALPHA * softplus(-score[:, 0])).sum()
        (slope,) = torch.autograd.grad(total, current)
        kept.append(logits.detach())
        current = current.detach() + STEP * slope.sign()
    with torch.no_grad():
        kept.append(victim(current))
        detector(current)
    return current, torch.stack(kept)


def bare_pgd(victim: nn.Module, detector: nn.Module, x: Tensor, y: Tensor, n_steps: int) -> tuple[Tensor, Tensor]:
    """PGD on the margin, by hand; the detector is not in it."""
    current, kept, step = x.clone(), [], 2.5 * RADIUS / n_steps
    for _ in range(n_steps):
        current.requires_grad_(True)
        logits = victim(current)
        (slope,) = torch.autograd.grad(((1 - 2 * y) * logits[:, 0]).sum(), current)
        kept.append(logits.detach())
        current = x + (current.detach() + step * slope.sign() - x).clamp(-RADIUS, RADIUS)
    with torch.no_grad():
        kept.append(victim(current))
    return current, torch.stack(kept)


def two_logits(victim: nn.Module) -> nn.Module:
    """The same decisions as ``(0, z)``, which the libraries' cross-entropy needs."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.victim = victim

        def forward(self, series: Tensor) -> Tensor:
            logit = self.victim(series)
            return torch.cat([torch.zeros_like(logit), logit], dim=1)

    return Pair().eval()


def library_attacks(victim: nn.Module, x: Tensor, y: Tensor, n_steps: int) -> dict[str, Callable[[], Tensor]]:
    """PGD of each library that is installed; bounds are wide enough never to clip."""
    found: dict[str, Callable[[], Tensor]] = {}
    pair, step = two_logits(victim), 2.5 * RADIUS / n_steps
    low, high = x.min().item() - RADIUS, x.max().item() + RADIUS
    if importlib.util.find_spec("torchattacks"):
        import torchattacks

        class Unscaled(nn.Module):
            """torchattacks takes values in 0..1 only."""

            def __init__(self) -> None:
                super().__init__()
                self.pair = pair

            def forward(self, series: Tensor) -> Tensor:
                return self.pair(series * (high - low) + low)

        size = high - low
        pgd = torchattacks.PGD(Unscaled().eval(), RADIUS / size, step / size, n_steps, random_start=False)
        found["torchattacks"] = lambda: pgd((x - low) / size, y) * size + low
    if importlib.util.find_spec("foolbox"):
        import foolbox

        model = foolbox.PyTorchModel(pair, bounds=(low, high), device=x.device)
        linf = foolbox.attacks.LinfPGD(abs_stepsize=step, steps=n_steps, random_start=False)
        found["foolbox"] = lambda: linf.run(model, x, y, epsilon=RADIUS)
    if importlib.util.find_spec("art"):
        from art.attacks.evasion import ProjectedGradientDescentPyTorch
        from art.estimators.classification import PyTorchClassifier

        classifier = PyTorchClassifier(
            pair, nn.CrossEntropyLoss(), (LENGTH, 1), 2, clip_values=(low, high), device_type=x.device.type
        )
        art = ProjectedGradientDescentPyTorch(
            classifier, eps=RADIUS, eps_step=step, max_iter=n_steps, batch_size=len(x), verbose=False
        )
        series, labels = x.cpu().numpy(), y.cpu().numpy()
        found["ART"] = lambda: torch.from_numpy(art.generate(series, labels)).to(x)
    return found


def seconds_of(call: Callable[[], object], args: argparse.Namespace) -> float:
    """Time of a call by the clock asked for, finished on the device."""
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    if args.device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    call()
    if args.device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def in_turn(calls: Mapping[str, Callable[[], object]], args: argparse.Namespace) -> dict[str, list[float]]:
    """Times of all calls, round after round; every other round goes backwards."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(args.pairs):
        for name in reversed(calls) if number % 2 else calls:
            times[name].append(seconds_of(calls[name], args))
    return times


def ratios(one: list[float], other: list[float]) -> list[float]:
    """Time of the first over that of the second, pair by pair."""
    return [mine / theirs for mine, theirs in zip(one, other, strict=True)]


def spread(values: list[float], digits: int) -> str:
    """Median and interquartile range."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f} ({high - low:.{digits}f})"


def check(name: str, ours: tuple[Tensor, Tensor], bare: tuple[Tensor, Tensor], device: str) -> None:
    """Stop where both do not compute the same; a GPU may add in another order and turn signs near 0."""
    equal = all(torch.equal(one, other) for one, other in zip(ours, bare, strict=True))
    if device == "cuda" and not equal:
        equal = bool((ours[0] != bare[0]).double().mean() < 0.01)
    if not equal:
        sys.exit(f"parity: {name} differs from the bare loop: nothing is reported")


def check_prefixes(name: str, attack: Attack, networks: tuple[nn.Module, nn.Module], x: Tensor, y: Tensor) -> None:
    """Stop where an iterate k < N of one unprojected run is not, with its scores, the end of a run of k steps."""
    victim, detector = networks
    whole = attack(victim, x, y, detectors=[detector], keep_iterates=True)
    assert whole.iterates is not None
    for k in range(1, attack.n_steps):
        short = Attack(attack.objective, attack.stepper, n_steps=k)(victim, x, y, detectors=[detector])
        same = torch.equal(short.x_adv, whole.iterates[k]) and torch.equal(short.logits[k], whole.logits[k])
        if not same or not torch.equal(short.detector_logits[k], whole.detector_logits[k]):
            sys.exit(f"parity: iterate {k} of {name} is not the end of a run of {k} steps: nothing is reported")


def measure(name: str, x: Tensor, y: Tensor, args: argparse.Namespace) -> None:
    """Rows of one network."""
    victim, detector = build(name, 0, args.device), build(name, 1, args.device)
    variants = {
        "SumReg": (Attack(SumReg(ALPHA), SignStep(STEP), n_steps=args.steps), [detector], bare_sum),
        "PGD": (Attack(Vanilla(), PGDStep(), projection=Linf(RADIUS), n_steps=args.steps), [], bare_pgd),
    }
    for kind, (attack, detectors, bare) in variants.items():

        def by_us(
            size: int | None = len(x) if args.whole else None,
            attack: Attack = attack,
            detectors: list[nn.Module] = detectors,
        ) -> tuple[Tensor, Tensor]:
            result = attack(victim, x, y, detectors=detectors, batch_size=size)
            return result.x_adv, result.logits

        def by_hand(bare: Callable[..., tuple[Tensor, Tensor]] = bare) -> tuple[Tensor, Tensor]:
            return bare(victim, detector, x, y, args.steps)

        check(f"{kind} on {name}", by_us(len(x)), by_hand(), args.device)
        calls: dict[str, Callable[[], object]] = {"ours": by_us, "a bare loop": by_hand}
        shown = ""
        if kind == "SumReg" and args.device == "cpu":
            check_prefixes(f"{kind} on {name}", attack, (victim, detector), x[:2], y[:2])
        if kind == "PGD":
            accuracy = (decisions(by_us()[1][-1]) == y).double().mean().item()
            shown = f", accuracy {accuracy:.3f}"
            for library, call in library_attacks(victim, x, y, args.steps).items():
                theirs = (decisions(victim(call())) == y).double().mean().item()
                # Cross-entropy rounds gradients near 0 to other signs than the margin: one series in a thousand.
                if abs(theirs - accuracy) > max(1e-3, 1 / len(x)):
                    sys.exit(f"parity: accuracy under PGD of {library} on {name} {theirs}, ours {accuracy}")
                calls[library] = call
        times = in_turn(calls, args)
        work = len(x) * args.steps
        ours = times.pop("ours")
        for other, seconds in times.items():
            print(
                f"| {name}, {len(x)} | {kind}{shown} | {other} | {spread([work / s for s in ours], 0)} "
                f"| {spread([work / s for s in seconds], 0)} | {spread(ratios(ours, seconds), 3)} |",
                flush=True,
            )


def measure_grid(name: str, x: Tensor, y: Tensor, args: argparse.Namespace) -> None:
    """One batch against one by one."""
    victim, detector = build(name, 0, args.device), build(name, 1, args.device)
    attack = Attack(SumReg(), SignStep(), n_steps=args.steps)
    points = grid_points(steps=GRID_STEPS, alphas=GRID_ALPHAS)

    def at_once() -> object:
        return run_grid(attack, victim, x, y, points, detectors=[detector])

    def one_by_one() -> object:
        return [attack(victim, x, y, detectors=[detector], step=one.step, alpha=one.alpha) for one in points]

    at_once()
    together, apart = in_turn({"at once": at_once, "one by one": one_by_one}, args).values()
    print(f"| {name} | {spread(together, 2)} | {spread(apart, 2)} | {spread(ratios(together, apart), 2)} |", flush=True)


def main() -> None:
    """Parse the command line, check, measure, and print two Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--series", type=int, default=256, help="rates scale: 2850 is the size of the Freezer test set")
    parser.add_argument("--series-large", type=int, default=256, help=f"of {' and '.join(LARGE)}, at most --series")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    parser.add_argument("--whole", action="store_true", help="all series in one pass, as the bare loop has them")
    parser.add_argument("--no-grid", action="store_true", help="leave the second table out")
    args = parser.parse_args()
    if args.clock == "cpu" and args.device == "cuda":
        parser.error("--clock cpu does not see the work of a GPU: take --clock wall")
    for name, least in (("series", 1), ("series_large", 1), ("steps", 1), ("pairs", 2), ("threads", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(args.series, LENGTH, 1, generator=generator).cumsum(dim=1)
    x = ((x - x.mean(dim=1, keepdim=True)) / x.std(dim=1, keepdim=True)).to(args.device)
    y = torch.randint(0, 2, (args.series,), generator=generator).to(args.device)
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "CPU"
    print(
        f"{device}, {os.cpu_count()} cores, {args.threads} threads, torch {torch.__version__}; series {tuple(x.shape)} "
        f"{x.dtype}, {args.steps} steps; {args.clock} time, load {os.getloadavg()[0]:.1f}; "
        f"medians (IQR) of {args.pairs} interleaved rounds\n"
    )
    print(
        "| network, series | attack | other | ours, series x steps / s | other, series x steps / s | time over other |"
    )
    print("|---|---|---|---|---|---|")
    for name in args.networks:
        n_series = min(args.series_large, args.series) if name in LARGE else args.series
        measure(name, x[:n_series], y[:n_series], args)
    if args.no_grid:
        return
    few = min(GRID_SERIES, args.series)
    n_points = len(GRID_STEPS) * len(GRID_ALPHAS)
    print(f"\nSumReg, {n_points} configurations on {few} series, every iterate scored\n")
    print("| network | one batch, s | one by one, s | ratio |")
    print("|---|---|---|---|")
    for name in args.networks:
        measure_grid(name, x[:few], y[:few], args)


if __name__ == "__main__":
    main()
