"""Three questions about the robustness of small classifiers of UCR sets, each answered by a Markdown table.

    python scripts/robustness_of_victims.py confident --folder data/ucr
    python scripts/robustness_of_victims.py defence --folder data/ucr
    python scripts/robustness_of_victims.py manifold --folder data/ucr

``confident``: does accuracy under an attack change when the classifier's logits are multiplied by a number, which
leaves every decision as it is? ``defence``: what does adversarial training buy, against attacks on the class and
against one that hides from a detector? ``manifold``: what do detectors of plain statistics see of attacks that keep the
mean and the deviation of every series?

A classifier and its detector are trained anew for each set and seed, on the official training series less a stratified
part of them, which calibrates. Attacks run on all test series for a number of steps given beforehand, and the last
iterate counts: nothing is chosen. A detector sees, in each epoch, every training series clean and under PGD of one of
four radii. Figures are means over seeds with the standard deviation in brackets, none for one seed.
"""

import argparse
import itertools
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, Trainer, seed_everything
from torch import Tensor, nn

from datamodules import TimeSeriesDataModule
from lightning_modules.attacks import (
    Attack,
    AttackResult,
    HarmonicReg,
    Linf,
    Objective,
    PGDStep,
    SumReg,
    Vanilla,
    ZNormManifold,
    decisions,
    logits_of,
)
from lightning_modules.attacks.frozen_networks import confidence
from lightning_modules.attacks.judges import StatisticsJudge, TwoStatisticsJudge
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
FACTORS, ALPHA, FALSE_ALARMS = (1, 5, 20, 100), 1.0, 0.05
ARMS = ("none", "PGD", "TRADES", "detector-aware")
N_TRAINING_STEPS, RELATIVE_RADII, DETECTOR_RADII = 7, (0.4, 1.0, 2.0), (4.0, 2.0, 1.0, 0.5)


class Shuffled:
    """Batches for a Trainer: one whole set an epoch, the sets in turn, rows in a new order."""

    def __init__(self, sets: Sequence[Batch], batch_size: int, seed: int) -> None:
        self.sets, self.batch_size = itertools.cycle(sets), batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Batch]:
        rows = next(self.sets)
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


def batch_size_of(train: Batch) -> int:
    """Series of a batch in training."""
    return 16 if len(train["labels"]) < 200 else 64


def trained(
    network: NetworkFactory, sets: Sequence[Batch], n_updates: int, seed: int, callbacks: Sequence[Callback] = ()
) -> TimeSeriesClassifier:
    """A classifier of two classes after ``n_updates`` batches of Adam, one of ``sets`` an epoch."""
    seed_everything(seed, verbose=False)
    _, n_steps, n_channels = sets[0]["series"].shape
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
    trainer.fit(module, Shuffled(sets, batch_size_of(sets[0]), seed))
    return module.eval()


def ball(objective: Objective, radius: float, n_steps: int, **kwargs: Any) -> Attack:
    """PGD on any objective."""
    return Attack(objective, PGDStep(), projection=Linf(radius), n_steps=n_steps, **kwargs)


@dataclass
class Case:
    """A set and a seed: its splits, and how networks of it are trained and attacked."""

    options: argparse.Namespace
    data: TimeSeriesDataModule
    network: NetworkFactory
    seed: int

    def __post_init__(self) -> None:
        self.train, self.held, self.test = (self.data.arrays(split) for split in ("train", "validation", "test"))

    def victim(self, callbacks: Sequence[Callback] = ()) -> TimeSeriesClassifier:
        """A classifier."""
        return trained(self.network, [self.train], self.options.updates, self.seed, callbacks)

    def detector(self, victim: nn.Module) -> TimeSeriesClassifier:
        """A discriminator of clean series (0) and of series under vanilla attacks on the victim (1)."""
        series, labels = self.train["series"], self.train["labels"]
        sets = []
        for relative in DETECTOR_RADII:
            attack = ball(Vanilla(), relative * self.options.radius, 10)
            shown = torch.cat([series, attack(victim, series, labels, batch_size=64).x_adv])
            answers = torch.cat([torch.zeros_like(labels), torch.ones_like(labels)])
            mask = torch.ones(shown.shape[:2], dtype=torch.bool)
            sets.append({"series": shown, "labels": answers, "mask": mask, "index": torch.arange(len(shown))})
        return trained(self.network, sets, self.options.updates, 100 + self.seed)

    def attacked(self, attack: Attack, victim: nn.Module, detectors: Sequence[nn.Module] = ()) -> AttackResult:
        """The test series under an attack."""
        return attack(victim, self.test["series"], self.test["labels"], detectors=detectors, batch_size=64)

    def accuracy(self, logits: Tensor) -> float:
        """Share of test series that are called rightly."""
        return (decisions(logits) == self.test["labels"]).double().mean().item()


def cases(options: argparse.Namespace, name: str, network: str) -> Iterator[Case]:
    """All seeds of a set; 40 % of its training series calibrate, so that GunPoint has the 19 that 5 % need."""
    for seed in options.seeds:
        data = TimeSeriesDataModule(folder=str(options.folder), name=name, validation_fraction=0.4, seed=seed)
        yield Case(options, data, NETWORKS[network], seed)


def shown(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation over seeds."""
    deviation = f" ({np.std(values, ddof=1):.{digits}f})" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def row(*entries: str) -> None:
    """Print a row of a Markdown table at once: a run may be cut short."""
    print(f"| {' | '.join(entries)} |", flush=True)


def head(*names: str) -> None:
    """Print the first two rows of a Markdown table."""
    row(*names)
    row(*["---"] * len(names))


def confident(options: argparse.Namespace, name: str, network: str) -> None:
    """Accuracy under attack at every factor, and the largest move of a seed from factor 1."""
    objectives: dict[str, tuple[Objective, bool]] = {
        "PGD, margin": (Vanilla(), False),
        "PGD, cross-entropy": (Vanilla(class_loss="cross_entropy"), False),
        "sum, published": (SumReg(ALPHA, class_loss="cross_entropy"), False),
        "sum, calibrated": (SumReg(ALPHA), True),
        "harmonic, published": (HarmonicReg(class_loss="cross_entropy"), False),
        "harmonic, calibrated": (HarmonicReg(), True),
    }
    found: dict[str, list[list[float]]] = {kind: [] for kind in objectives}
    clean, confidences = [], []
    for case in cases(options, name, network):
        victim = case.victim()
        detector = case.detector(victim)
        logits = logits_of(victim, case.test["series"])
        clean.append(case.accuracy(logits))
        confidences.append(confidence(logits).median().item())
        victims = [Scaled(victim, factor) for factor in FACTORS]
        for scaled in victims:
            if not torch.equal(decisions(logits_of(scaled, case.test["series"])), decisions(logits)):
                raise SystemExit(f"{name}, {network}, seed {case.seed}: factor {scaled.factor} changed a decision")
        for kind, (objective, calibrates) in objectives.items():
            detectors = [detector] if objective.hides else []
            accuracies = []
            for scaled in victims:
                used = objective.calibrated(scaled, detectors, case.held["series"]) if calibrates else objective
                result = case.attacked(ball(used, options.radius, options.steps), scaled, detectors)
                accuracies.append(case.accuracy(result.logits[-1]))
            found[kind].append(accuracies)
    for kind, per_seed in found.items():
        values = np.array(per_seed)
        moves = np.abs(values - values[:, :1]).max()
        columns = [shown(column) for column in values.T]
        row(name, network, shown(clean), shown(confidences, 1), kind, *columns, f"{moves:.3f}")


def defence_of(case: Case, arm: str, detector: nn.Module | None) -> list[Callback]:
    """What trains a classifier against attacks; the first third of its updates stays plain.

    Under attack from the first update on, small sets end with one class for all series.
    """
    radius, n_updates = case.options.radius, case.options.updates
    kwargs: dict[str, Any] = {
        "warmup_epochs": n_updates * batch_size_of(case.train) // (3 * len(case.train["labels"])),
        "validate": False,
    }
    match arm:
        case "none":
            return []
        case "PGD":
            return [AdversarialTraining(ball(Vanilla(), radius, N_TRAINING_STEPS), **kwargs)]
        case "TRADES":
            attack = ball(Vanilla(), radius, N_TRAINING_STEPS, random_start=True)
            return [AdversarialTraining(attack, mode="trades", **kwargs)]
        case "detector-aware":
            assert detector is not None
            attack = ball(SumReg(ALPHA), radius, N_TRAINING_STEPS)
            return [AdversarialTraining(attack, detectors=[detector], **kwargs)]
    raise ValueError(f"training must be one of {ARMS}, got {arm!r}")


def defence(options: argparse.Namespace, name: str, network: str) -> None:
    """Accuracy and joint success of attacks on classifiers trained in four ways."""
    found: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    for case in cases(options, name, network):
        series, labels = case.test["series"], case.test["labels"]
        plain_detector: nn.Module | None = None
        for arm in ARMS:
            victim = case.victim(defence_of(case, arm, plain_detector))
            # Each defended classifier meets a detector of the attacks on itself, and an attacker who knows both.
            detector = case.detector(victim)
            plain_detector = plain_detector or detector
            clean = logits_of(victim, series)
            threshold = conformal_threshold(logits_of(detector, case.held["series"])[:, 0], FALSE_ALARMS)
            vanilla = [ball(Vanilla(), relative * options.radius, options.steps) for relative in RELATIVE_RADII]
            hiding = ball(
                SumReg(ALPHA).calibrated(victim, [detector], case.held["series"]), options.radius, options.steps
            )
            results = [case.attacked(attack, victim, [detector]) for attack in (*vanilla, hiding)]
            figures = [case.accuracy(clean), *(case.accuracy(result.logits[-1]) for result in results)]
            for result in (results[RELATIVE_RADII.index(1.0)], results[-1]):
                flagged = threshold.flag(result.detector_logits[-1, 0])
                joint = joint_success(decisions(clean), decisions(result.logits[-1]), labels, flagged)
                figures += [flagged.double().mean().item(), joint.item()]
            found[arm].append(figures)
    for arm, per_seed in found.items():
        row(name, network, arm, *[shown(column) for column in np.array(per_seed).T])


def plain_judges(train: Tensor) -> dict[str, StatisticsJudge | TwoStatisticsJudge]:
    """Detectors that no attack was made against."""
    statistics = StatisticsJudge()
    statistics.fit(train)
    return {
        "two statistics": TwoStatisticsJudge(),
        "rounding read": TwoStatisticsJudge(tie=0.0),
        "statistics": statistics,
    }


def manifold(options: argparse.Namespace, name: str, network: str) -> None:
    """What plain detectors see of attacks with and without the constraint, and what it costs the attack."""
    found: dict[tuple[str, str], list[list[float]]] = {}
    for case in cases(options, name, network):
        if not case.data.is_z_normed:
            raise SystemExit(f"manifold needs series that are z-normalised one by one, {name} is not")
        victim = case.victim()
        detector = case.detector(victim)
        judges = plain_judges(case.train["series"])
        objectives = {"PGD": Vanilla(), "PGD sum": SumReg(ALPHA).calibrated(victim, [detector], case.held["series"])}
        for (kind, objective), keeps in itertools.product(objectives.items(), ("no", "yes")):
            constraints = [ZNormManifold()] if keeps == "yes" else []
            attack = ball(objective, options.radius, options.steps, constraints=constraints)
            result = case.attacked(attack, victim, [detector])
            after = result.logits[-1]
            figures = [effectiveness(decisions(after), case.test["labels"]).item(), case.accuracy(after)]
            for judge in judges.values():
                threshold = conformal_threshold(judge.score(case.held["series"]), FALSE_ALARMS)
                clean, scores = judge.score(case.test["series"]), judge.score(result.x_adv)
                figures += [threshold.flag(scores).double().mean().item(), threshold.realised(clean).share]
                figures.append(detector_auc(clean, scores).item())
            found.setdefault((kind, keeps), []).append(figures)
    for key, per_seed in found.items():
        row(name, network, *key, *[shown(column) for column in np.array(per_seed).T])


@dataclass(frozen=True)
class Study:
    """A sub-command: what it does, what it is asked of by default, and the heading of its columns."""

    measure: Callable[[argparse.Namespace, str, str], None]
    sets: tuple[str, ...]
    networks: tuple[str, ...]
    columns: tuple[str, ...]


JUDGED = [
    f"{judge}: {what}"
    for judge in ("two statistics", "rounding read", "statistics")
    for what in ("detected", "false alarms", "AUC")
]
ATTACKED = [*[f"PGD, {relative:g} r" for relative in RELATIVE_RADII], "sum, 1 r"]
SEEN = ("PGD flagged", "PGD joint", "sum flagged", "sum joint")
STUDIES = {
    "confident": Study(
        confident,
        ("GunPoint", "GunPointMaleVersusFemale", "PowerCons", "Strawberry"),
        ("ResCNN", "PatchTST"),
        ("clean", "median abs logit", "attack", *[f"x {factor}" for factor in FACTORS], "largest move from x 1"),
    ),
    "defence": Study(defence, ("GunPoint", "PowerCons"), ("ResCNN",), ("training", "clean", *ATTACKED, *SEEN)),
    "manifold": Study(
        manifold, ("GunPoint", "Strawberry"), ("ResCNN",), ("attack", "on the manifold", "EFF", "accuracy", *JUDGED)
    ),
}


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_subparsers(dest="command", required=True)
    for command, study in STUDIES.items():
        sub = chosen.add_parser(command)
        sub.add_argument("--folder", type=Path, required=True, help="of UCR sets")
        sub.add_argument("--sets", nargs="+", default=list(study.sets))
        sub.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(study.networks))
        sub.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        sub.add_argument("--radius", type=float, default=0.05, help="r of the ball Linf, in units of the series")
        sub.add_argument("--steps", type=int, default=20, help="of an attack")
        sub.add_argument("--updates", type=int, default=300, help="batches of each training")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    started = time.perf_counter()
    study = STUDIES[options.command]
    print(
        f"{options.command}: PGD of {options.steps} steps, r = {options.radius}; {options.updates} updates; seeds "
        f"{options.seeds}; false alarms {FALSE_ALARMS:g}; torch {torch.__version__}\n"
    )
    head("set", "network", *study.columns)
    for name, network in itertools.product(options.sets, options.networks):
        study.measure(options, name, network)
    print(f"\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
