"""Three questions about the robustness of small classifiers of UCR sets, each answered by a Markdown table.

    python scripts/robustness_of_victims.py confident --folder data/ucr
    python scripts/robustness_of_victims.py defence --folder data/ucr
    python scripts/robustness_of_victims.py manifold --folder data/ucr

``confident``: does accuracy under an attack change when the classifier's logits are multiplied by a number, which
leaves every decision as it is? ``defence``: what does adversarial training buy, against attacks on the class and
against one that hides from a detector? ``manifold``: what do detectors of plain statistics see of attacks that keep the
mean and the deviation of every series?

A classifier and its detector are trained anew for each set and seed, on the official training series less a stratified
part of them, which calibrates; attacks run on all test series, for a number of steps given beforehand, so that nothing
is chosen. A detector sees, in each epoch, every training series clean and under a vanilla attack of one of four strengths.
Figures are means over seeds with the standard deviation in brackets, none for one seed.
"""

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import Callback, Trainer, seed_everything
from torch import Tensor, nn

from datamodules import TimeSeriesDataModule
from lightning_modules.attacks import (
    Attack,
    HarmonicReg,
    Linf,
    Objective,
    PGDStep,
    SignStep,
    SumReg,
    Vanilla,
    ZNormManifold,
    decisions,
    logits_of,
)
from lightning_modules.attacks.frozen_networks import confidence
from lightning_modules.attacks.judges import Judge, StatisticsJudge, TwoStatisticsJudge
from lightning_modules.attacks.thresholds import conformal_threshold
from lightning_modules.callbacks import AdversarialTraining
from lightning_modules.metrics.attack_functional import detector_auc, effectiveness, joint_success
from lightning_modules.networks import S4, NetworkFactory, PatchTST, ResCNN
from lightning_modules.time_series_classifier import TimeSeriesClassifier

Batch = dict[str, Tensor]

NETWORKS: dict[str, NetworkFactory] = {
    "ResCNN": partial(ResCNN, n_filters=8),
    "PatchTST": partial(PatchTST, dropout=0.1),
    "S4": partial(S4, d_model=32, state_size=32),
}
FACTORS = (1, 5, 20, 100)
N_TRAINING_STEPS, ALPHA = 7, 1.0
RADII = (0.02, 0.05, 0.1)
LEVELS = (0.1, 0.05, 0.025, 0.0125)


class Batches:
    """Batches of one epoch in an order of its own, for a Trainer: the rows of ``epoch(number)``, shuffled."""

    def __init__(self, epoch: Callable[[int], Batch], batch_size: int, seed: int) -> None:
        self.epoch, self.batch_size, self.number = epoch, batch_size, 0
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Batch]:
        rows = self.epoch(self.number)
        self.number += 1
        order = torch.randperm(len(rows["labels"]), generator=self.generator)
        for some in order.split(self.batch_size):
            if len(some) > 1:  # batch normalisation needs two
                yield {name: values[some] for name, values in rows.items()}


class Scaled(nn.Module):
    """A network whose logits are multiplied: other confidence, the same decisions."""

    def __init__(self, network: nn.Module, factor: float) -> None:
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, series: Tensor) -> Tensor:
        """``factor * logits``."""
        return self.factor * self.network(series)


def batch_size_of(batch: Batch) -> int:
    """Series of a batch in training."""
    return 16 if len(batch["labels"]) < 200 else 64


def trained(
    network: NetworkFactory,
    epoch: Callable[[int], Batch],
    n_updates: int,
    seed: int,
    callbacks: Sequence[Callback] = (),
) -> TimeSeriesClassifier:
    """A classifier after ``n_updates`` batches of Adam, in evaluation mode; a detector is one of two such classes."""
    seed_everything(seed, verbose=False)
    first = epoch(0)
    _, n_steps, n_channels = first["series"].shape
    module = TimeSeriesClassifier(n_channels=n_channels, n_classes=2, n_steps=n_steps, network=network)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=n_updates,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, Batches(epoch, batch_size_of(first), seed))
    return module.eval()


def detector_of(
    victim: nn.Module, network: NetworkFactory, train: Batch, n_updates: int, seed: int
) -> TimeSeriesClassifier:
    """A discriminator of clean series (0) and of series under a vanilla attack on the victim (1)."""
    series, n = train["series"], len(train["labels"])
    attack = Attack(Vanilla(), SignStep(), n_steps=10)
    levels = [attack(victim, series, train["labels"], step=level, batch_size=64).x_adv for level in LEVELS]
    labels = torch.cat([torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=torch.int64)])
    mask = torch.ones(2 * n, series.shape[1], dtype=torch.bool)

    def epoch(number: int) -> Batch:
        shown = torch.cat([series, levels[number % len(levels)]])
        return {"series": shown, "labels": labels, "mask": mask, "index": torch.arange(2 * n)}

    return trained(network, epoch, n_updates, 100 + seed)


def ball(objective: Objective, radius: float, *, n_steps: int, on_manifold: bool = False) -> Attack:
    """PGD on any objective."""
    constraints = [ZNormManifold()] if on_manifold else []
    return Attack(objective, PGDStep(), projection=Linf(radius), n_steps=n_steps, constraints=constraints)


def loaded(folder: Path, name: str, seed: int) -> TimeSeriesDataModule:
    """A set; 40 % of the training series calibrate, so that GunPoint has the 19 that 5 % false alarms need."""
    return TimeSeriesDataModule(folder=str(folder), name=name, validation_fraction=0.4, seed=seed)


def accuracy_of(logits: Tensor, labels: Tensor) -> float:
    """Share of right decisions."""
    return (decisions(logits) == labels).double().mean().item()


def shown(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation over seeds."""
    deviation = f" ({np.std(values, ddof=1):.{digits}f})" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def line(*entries: str) -> None:
    """Print a row of a Markdown table at once: a run may be cut short."""
    print(f"| {' | '.join(entries)} |", flush=True)


def head(*names: str) -> None:
    """Print the first two rows of a Markdown table."""
    line(*names)
    line(*["---"] * len(names))


def confident(options: argparse.Namespace) -> None:
    """Accuracy under attack at every factor, and the largest move from factor 1."""
    published = {"class_loss": "cross_entropy"}
    objectives: dict[str, tuple[Objective, bool]] = {
        "PGD, margin": (Vanilla(), False),
        "PGD, cross-entropy": (Vanilla(**published), False),
        "SumReg, published": (SumReg(ALPHA, **published), False),
        "SumReg, calibrated": (SumReg(ALPHA), True),
        "Harmonic, published": (HarmonicReg(**published), False),
        "Harmonic, calibrated": (HarmonicReg(), True),
    }
    print(f"PGD of {options.steps} steps in the ball Linf {options.radius}; accuracy under attack\n")
    head("set", "victim", "attack", *[f"x {factor}" for factor in FACTORS], "largest move of a seed from x 1")
    for name in options.sets:
        for network in options.networks:
            found: dict[str, list[list[float]]] = {kind: [] for kind in objectives}
            clean, confidences = [], []
            for seed in options.seeds:
                data = loaded(options.folder, name, seed)
                train, held, test = (data.arrays(split) for split in ("train", "validation", "test"))
                victim = trained(NETWORKS[network], lambda _, batch=train: batch, options.updates, seed)
                detector = detector_of(victim, NETWORKS[network], train, options.updates, seed)
                logits = logits_of(victim, test["series"])
                clean.append(accuracy_of(logits, test["labels"]))
                confidences.append(confidence(logits).median().item())
                for kind, (objective, calibrates) in objectives.items():
                    accuracies = []
                    for factor in FACTORS:
                        scaled = Scaled(victim, factor)
                        if not torch.equal(decisions(logits_of(scaled, test["series"])), decisions(logits)):
                            raise SystemExit(
                                f"{name}, {network}, seed {seed}: factor {factor} changed a clean decision"
                            )
                        used = objective.calibrated(scaled, [detector], held["series"]) if calibrates else objective
                        attack = ball(used, options.radius, n_steps=options.steps)
                        detectors = [detector] if objective.hides else []
                        result = attack(scaled, test["series"], test["labels"], detectors=detectors, batch_size=64)
                        accuracies.append(accuracy_of(result.logits[-1], test["labels"]))
                    found[kind].append(accuracies)
            for kind, per_seed in found.items():
                values = np.array(per_seed)
                line(
                    name,
                    f"{network}: {shown(clean)} clean, median abs logit {shown(confidences, 1)}",
                    kind,
                    *[shown(column) for column in values.T],
                    f"{np.abs(values - values[:, :1]).max():.3f}",
                )


def defence(options: argparse.Namespace) -> None:
    """Accuracy and joint success of attacks on classifiers trained in four ways."""
    arms: tuple[Literal["none", "pgd", "trades", "detector-aware"], ...] = ("none", "pgd", "trades", "detector-aware")
    print(
        f"{options.networks[0]}, trained with {N_TRAINING_STEPS} steps in the ball Linf {options.radius}; PGD on the "
        f"margin and the calibrated sum, both of {options.steps} steps, the sum in the ball of training\n"
    )
    figures_of = ["clean", *[f"PGD {radius}" for radius in RADII], "sum", "sum flagged at 5 %", "joint success at 5 %"]
    head("set", "training", *figures_of)
    for name in options.sets:
        found: dict[str, list[list[float]]] = {arm: [] for arm in arms}
        for seed in options.seeds:
            data = loaded(options.folder, name, seed)
            train, held, test = (data.arrays(split) for split in ("train", "validation", "test"))
            network = NETWORKS[options.networks[0]]
            n_epochs = options.updates * batch_size_of(train) // len(train["labels"])
            plain_detector: nn.Module | None = None
            for arm in arms:
                # A third of the updates is plain: from nothing, small sets stay at one class under attack.
                kwargs: dict[str, Any] = {"warmup_epochs": n_epochs // 3, "validate": False}
                radius = options.radius
                match arm:
                    case "none":
                        callbacks = []
                    case "pgd":
                        attack = ball(Vanilla(), radius, n_steps=N_TRAINING_STEPS)
                        callbacks = [AdversarialTraining(attack, **kwargs)]
                    case "trades":
                        attack = Attack(
                            Vanilla(),
                            PGDStep(),
                            projection=Linf(radius),
                            n_steps=N_TRAINING_STEPS,
                            random_start=True,
                        )
                        callbacks = [AdversarialTraining(attack, mode="trades", **kwargs)]
                    case "detector-aware":
                        assert plain_detector is not None
                        attack = ball(SumReg(ALPHA), radius, n_steps=N_TRAINING_STEPS)
                        callbacks = [AdversarialTraining(attack, detectors=[plain_detector], **kwargs)]
                victim = trained(network, lambda _, batch=train: batch, options.updates, seed, callbacks)
                # Each defended classifier meets a detector of the attacks on itself, and an attacker who knows both.
                detector = detector_of(victim, network, train, options.updates, seed)
                plain_detector = plain_detector or detector
                series, labels = test["series"], test["labels"]
                clean = logits_of(victim, series)
                under = [
                    ball(Vanilla(), size, n_steps=options.steps)(victim, series, labels, batch_size=64)
                    for size in RADII
                ]
                figures = [accuracy_of(logits, labels) for logits in (clean, *[one.logits[-1] for one in under])]
                objective = SumReg(ALPHA).calibrated(victim, [detector], held["series"])
                result = ball(objective, radius, n_steps=options.steps)(
                    victim, series, labels, detectors=[detector], batch_size=64
                )
                threshold = conformal_threshold(logits_of(detector, held["series"])[:, 0], 0.05)
                after = result.logits[-1]
                flagged = threshold.flag(result.detector_logits[-1, 0])
                figures += [accuracy_of(after, labels), flagged.double().mean().item()]
                figures.append(joint_success(decisions(clean), decisions(after), labels, flagged).item())
                found[arm].append(figures)
        for arm, per_seed in found.items():
            line(name, arm, *[shown(column) for column in np.array(per_seed).T])


def plain_judges() -> list[Judge]:
    """Detectors that no attack was made against; those of several statistics are not fitted yet."""
    return [
        TwoStatisticsJudge(),
        TwoStatisticsJudge("the same, float32 rounding read", tie=0.0),
        StatisticsJudge(),
        StatisticsJudge("max_z", name="statistics, largest z"),
    ]


def manifold(options: argparse.Namespace) -> None:
    """What plain detectors see of attacks with and without the constraint, and what it costs the attack."""
    print(f"{options.networks[0]}, {options.steps} steps in the ball Linf {options.radius}; false alarms set to 5 %\n")
    names = [judge.name for judge in plain_judges()]
    columns = ["detected", "AUC", "false alarms"]
    head(
        "set",
        "attack",
        "on the manifold",
        "EFF",
        "accuracy",
        *[f"{name}: {what}" for name in names for what in columns],
    )
    for name in options.sets:
        found: dict[tuple[str, str], list[list[float]]] = {}
        for seed in options.seeds:
            data = loaded(options.folder, name, seed)
            if not data.is_z_normed:
                raise SystemExit(f"manifold needs series that are z-normalised one by one, {name} is not")
            train, held, test = (data.arrays(split) for split in ("train", "validation", "test"))
            network = NETWORKS[options.networks[0]]
            victim = trained(network, lambda _, batch=train: batch, options.updates, seed)
            detector = detector_of(victim, network, train, options.updates, seed)
            judges = plain_judges()
            for judge in judges:
                if isinstance(judge, StatisticsJudge):
                    judge.fit(train["series"])
            objectives = {
                "PGD": Vanilla(),
                "PGD sum": SumReg(ALPHA).calibrated(victim, [detector], held["series"]),
            }
            series, labels = test["series"], test["labels"]
            for kind, objective in objectives.items():
                for constrained in (False, True):
                    attack = ball(objective, options.radius, n_steps=options.steps, on_manifold=constrained)
                    result = attack(victim, series, labels, detectors=[detector], batch_size=64)
                    figures = [effectiveness(decisions(result.logits[-1]), labels).item()]
                    figures.append(accuracy_of(result.logits[-1], labels))
                    for judge in judges:
                        threshold = conformal_threshold(judge.score(held["series"]), 0.05)
                        clean, scores = judge.score(series), judge.score(result.x_adv)
                        figures.append(threshold.flag(scores).double().mean().item())
                        figures.append(detector_auc(clean, scores).item())
                        figures.append(threshold.realised(clean).share)
                    found.setdefault((kind, "yes" if constrained else "no"), []).append(figures)
        for key, per_seed in found.items():
            line(name, *key, *[shown(column) for column in np.array(per_seed).T])


def main() -> None:
    """Parse the command line, measure, print."""
    commands: dict[str, tuple[Callable[[argparse.Namespace], None], list[str], list[str], list[int], float]] = {
        "confident": (
            confident,
            ["GunPoint", "GunPointMaleVersusFemale", "PowerCons", "Strawberry"],
            ["ResCNN", "S4"],
            [0, 1],
            0.05,
        ),
        "defence": (defence, ["GunPoint", "PowerCons"], ["ResCNN"], [0, 1, 2], 0.05),
        "manifold": (manifold, ["GunPoint", "Strawberry"], ["ResCNN"], [0, 1, 2], 0.05),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_subparsers(dest="command", required=True)
    for command, (_, sets, networks, seeds, radius) in commands.items():
        sub = chosen.add_parser(command)
        sub.add_argument("--folder", type=Path, required=True, help="of UCR sets")
        sub.add_argument("--sets", nargs="+", default=sets)
        sub.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=networks)
        sub.add_argument("--seeds", type=int, nargs="+", default=seeds)
        sub.add_argument("--radius", type=float, default=radius, help="Linf, in units of the series")
        sub.add_argument("--steps", type=int, default=20, help="of an attack")
        sub.add_argument("--updates", type=int, default=300, help="batches of each training")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    started = time.perf_counter()
    commands[options.command][0](options)
    print(
        f"\n{options.command}: seeds {options.seeds}, {time.perf_counter() - started:.0f} s, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
