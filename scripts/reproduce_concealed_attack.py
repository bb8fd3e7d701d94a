"""The table of configs/concealed_attack/README.md: data sets, networks, attacks, seeds; selection by cross-fitting.

    python scripts/reproduce_concealed_attack.py --folder data/ucr --out runs/attack_table
    python scripts/reproduce_concealed_attack.py --folder data/ucr --sets GunPoint --networks ResCNN --seeds 0
    python scripts/reproduce_concealed_attack.py --folder data/ucr --table configs/concealed_attack/table.csv

For each cell (set, network, seed) the official training series are cut into folds. On each fold a classifier and its
discriminators are trained without it, and every attack runs its grid on it; a configuration and iteration are chosen by
the mean of F over the folds, ties to the smaller step. The chosen attacks then run on the test series against the
models of every fold, and the figures are means over these. Every cell is a file in OUT, with all that the reports of
its folds hold, and is not done again (delete OUT after a change of code). TABLE keeps the figures of cells, a row for
each fold and attack: those in it are not done either, and new ones are added. Printed are the time of each cell, a row
for each pair of set and network, in how many of these concealment is ahead, with and without folds whose victim gives
one answer to every clean series, and a row for each attack. A mean over fewer folds than there are, because in others
no judge of the panel is valid, says over how many.
"""

import argparse
import csv
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer, seed_everything
from torch import nn
from tqdm import tqdm

from datamodules import TimeSeriesDataModule
from lightning_modules import ConcealedAttacker
from lightning_modules.attacks import (
    AdamStep,
    Attack,
    HarmonicReg,
    Linf,
    PGDStep,
    SignStep,
    SumReg,
    Vanilla,
)
from lightning_modules.attacks.discriminators import AttackPlan, DiscriminatorPlan
from lightning_modules.attacks.findings import findings
from lightning_modules.attacks.selection import Candidates, fold_average, select
from lightning_modules.attacks.thresholds import binomial_share, n_clean_required
from lightning_modules.metrics.attack_functional import success_f
from lightning_modules.networks import S4, PatchTST, ResCNN, RNNAttention
from lightning_modules.run_folder import write_whole

SETS = ("Coffee", "GunPoint", "GunPointMaleVersusFemale", "PowerCons", "Strawberry")
NOT_COUNTED = ("Coffee",)  # 28 test series
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "PatchTST": partial(PatchTST, dropout=0.1),
    "RNNAttention": RNNAttention,
    "ResCNN": partial(ResCNN, n_filters=8),
    "S4": partial(S4, d_model=32, state_size=32),
}
N_STEPS, N_FOLDS, N_LEVELS = 50, 2, 5
# 24 configurations in all, at most 6 an attack: 2 strengths and 3 weights for the sums, 2 or 3 strengths for others.
STEPS, RADII, ALPHAS = (0.005, 0.05), (0.1, 1.0), (0.01, 0.1, 1.0)
VANILLA_STEPS, VANILLA_RADII = (0.002, 0.01, 0.05), (0.05, 0.25, 1.0)
HARMONIC_STEPS, HARMONIC_RADII, SMOOTH_RADII = (0.005, 0.03), (0.25, 1.0), (0.05, 0.5)


Place = tuple[str, str, int]
"""Set, network and seed of a cell."""

Figures = dict[str, dict[str, float | None]]
"""Figures of one fold by attack."""

CELL_COLUMNS = ("set", "network", "seed", "seconds", "fold", "attack")
CHOSEN = ("step", "radius", "alpha", "iteration")
OF_MODELS = ("accuracy of the victim", "one answer", "AUC of the attacked detector", "valid")


def plans() -> list[AttackPlan]:
    """At most 12 configurations an attack; objectives in the published form."""
    sums = partial(SumReg, class_loss="cross_entropy")
    vanilla = partial(Vanilla, class_loss="cross_entropy")
    ball = {"projection": Linf(), "n_steps": N_STEPS}
    return [
        AttackPlan(
            name="ifgsm", family="ifgsm", attack=Attack(vanilla(), SignStep(), n_steps=N_STEPS), steps=VANILLA_STEPS
        ),
        AttackPlan(
            name="ifgsm sum",
            family="ifgsm",
            attack=Attack(sums(), SignStep(), n_steps=N_STEPS),
            steps=STEPS,
            alphas=ALPHAS,
        ),
        AttackPlan(
            name="ifgsm harmonic",
            family="ifgsm",
            attack=Attack(HarmonicReg(), SignStep(), n_steps=N_STEPS),
            steps=HARMONIC_STEPS,
        ),
        AttackPlan(name="pgd", family="pgd", attack=Attack(vanilla(), PGDStep(), **ball), radii=VANILLA_RADII),
        AttackPlan(name="pgd sum", family="pgd", attack=Attack(sums(), PGDStep(), **ball), radii=RADII, alphas=ALPHAS),
        AttackPlan(
            name="pgd harmonic", family="pgd", attack=Attack(HarmonicReg(), PGDStep(), **ball), radii=HARMONIC_RADII
        ),
        AttackPlan(
            name="sgm",
            family="sgm",
            attack=Attack(vanilla(), AdamStep(0.01, nu=0.1, lam=0.1), **ball),
            radii=SMOOTH_RADII,
        ),
    ]


def discriminators(network: str, n_epochs: int, seed: int) -> list[DiscriminatorPlan]:
    """The attacked one is of the victim's family; the held-out one of the next, other seed, other attack."""
    names = list(NETWORKS)
    other = names[(names.index(network) + 1) % len(names)]
    # Levels reach from strong attacks to weak ones, and late levels replay the early ones: a detector that only knows
    # weak attacks is fooled by strong ones, concealed or not.
    schedule = {"gamma": 0.5, "n_levels": N_LEVELS, "epochs_per_level": n_epochs // N_LEVELS, "replay": 0.5}
    return [
        DiscriminatorPlan(
            name="attacked",
            network=NETWORKS[network],
            attack=Attack(Vanilla(), SignStep(), n_steps=10),
            training_attacks="ifgsm",
            start=0.1,
            seed=100 + seed,
            **schedule,
        ),
        DiscriminatorPlan(
            name="held out",
            role="held_out",
            network=NETWORKS[other],
            attack=Attack(Vanilla(), PGDStep(), projection=Linf(), n_steps=10),
            training_attacks="pgd",
            start=1.0,
            seed=200 + seed,
            **schedule,
        ),
    ]


def epochs_of(n_series: int) -> tuple[int, int, int]:
    """Epochs of classifier and discriminators, and the batch size: about 200 and 300 steps whatever the set."""
    batch_size = 16 if n_series < 200 else 64
    per_epoch = max(1, n_series // batch_size)
    return max(10, 200 // per_epoch), N_LEVELS * max(4, 60 // per_epoch), batch_size


def fit(folder: Path, name: str, network: str, seed: int, fold: int) -> tuple[ConcealedAttacker, TimeSeriesDataModule]:
    """Train one fold, and run every grid on the series that were left out."""
    seed_everything(seed, verbose=False)
    data = TimeSeriesDataModule(folder=str(folder), name=name, fold=fold, n_folds=N_FOLDS, seed=seed)
    n_train = len(data.arrays("train")["labels"])
    for_classifier, for_discriminators, batch_size = epochs_of(n_train)
    data = TimeSeriesDataModule(
        folder=str(folder), name=name, fold=fold, n_folds=N_FOLDS, seed=seed, batch_size=batch_size
    )
    module = ConcealedAttacker(
        n_channels=data.n_channels,
        n_classes=data.n_classes,
        n_steps=data.n_steps,
        class_names=data.class_names,
        z_norm_ddof=data.z_norm_ddof,
        classifier=NETWORKS[network],
        classifier_epochs=for_classifier,
        discriminators=discriminators(network, for_discriminators, seed),
        attacks=plans(),
        n_folds=0,  # thresholds come from the series that were left out
        max_rows=1024,
    )
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=module.classifier_epochs + module.discriminator_epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, data)
    return module, data


def cell(folder: Path, out: Path, name: str, network: str, seed: int) -> dict[str, Any]:
    """All folds of a cell, the choice, and the test."""
    file = out / f"{name}, {network}, {seed}.json"
    if file.is_file():
        return with_figures(json.loads(file.read_text(encoding="utf-8")))
    started = time.perf_counter()
    fitted = [fit(folder, name, network, seed, fold) for fold in range(N_FOLDS)]
    sizes = [len(data.arrays("validation")["labels"]) for _, data in fitted]
    chosen: dict[str, dict[str, Any]] = {}
    for plan in fitted[0][0].attacks:
        per_fold = []
        for module, _ in fitted:
            assert module.found is not None
            choice = module.found["chosen"][plan.name]
            per_fold.append(success_f(choice["effectiveness"], choice["concealability"]).numpy()[:, 1:])
        success = fold_average(np.stack(per_fold), sizes)
        points = [(s, r, a) for s in plan.steps or [None] for r in plan.radii or [None] for a in plan.alphas or [None]]
        best = select(
            Candidates(
                success,
                np.array([r or 0.0 if s is None else s for s, r, _ in points]),
                np.array([a or 0.0 for _, _, a in points]),
                np.arange(1, N_STEPS + 1),
                np.array([r or 0.0 for _, r, _ in points]),
            )
        )
        step, radius, alpha = points[best.configuration]
        iteration = best.iteration + 1
        chosen[plan.name] = {"step": step, "radius": radius, "alpha": alpha, "iteration": iteration}
    whole = []
    for module, data in fitted:
        assert module.found is not None
        for plan_name, choice in chosen.items():
            module.found["chosen"][plan_name] |= choice
        with torch.no_grad():
            whole.append(findings(module.test_step(data.arrays("test"), 0), n_resamples=200))
    result = {"chosen": chosen, "seconds": time.perf_counter() - started, "findings": whole}
    write_whole(file, json.dumps(result, indent=1) + "\n")
    return with_figures(result)


def with_figures(kept: Mapping[str, Any]) -> dict[str, Any]:
    """A cell as the table has it: ``folds``, the figures of each, in place of their reports."""
    return {key: kept[key] for key in ("chosen", "seconds")} | {"folds": [summary(one) for one in kept["findings"]]}


def summary(found: dict[str, Any]) -> Figures:
    """The figures of the table, by attack."""
    victim, judge = found["victim"], found["judges"]["attacked"]
    of_models = (victim["accuracy"], float(victim["one_class"]), judge["trained_auc"], float(judge["valid"]))
    held_out = [name for name, one in found["judges"].items() if one["role"] == "held_out"]
    rows: Figures = {}
    for name, attack in found["attacks"].items():
        pooled, panel, judges = attack["attacked"]["published"], attack["panel"], attack["judges"]
        joint = [judges[one]["joint_success"]["0.05"] for one in held_out]
        at_1_percent = attack["judges"]["attacked"]["detection"]["0.01"]
        rows[name] = dict(zip(OF_MODELS, of_models, strict=True)) | {
            "EFF": attack["effectiveness"],
            "accuracy": attack["accuracy"],
            "accuracy on correct": attack["accuracy_on_correct"],
            "CONC": pooled["concealability"]["f1"],
            "F": pooled["success"]["f1"],
            "CONC two-sided": pooled["concealability"]["auc_two_sided"],
            "F two-sided": pooled["success"]["auc_two_sided"],
            "detected at 5 %": attack["judges"]["attacked"]["detection"]["0.05"],
            "detected at 1 %": at_1_percent if found["n_series"] >= n_clean_required(0.01) else None,
            "panel: judges": float(len(found["panel"])),
            "panel: CONC": _mean(panel["concealability"]["auc_two_sided"]),
            "panel: F": _mean(panel["success"]["auc_two_sided"]),
            "panel: detected at 5 %": _mean(panel["detection"]["0.05"]),
            "panel: joint at 5 %": _mean(panel["joint_success"]["0.05"]),
            "panel: joint at 1 %": _mean(panel["joint_success"]["0.01"]),
            "all judges: detected at 5 %": average([judges[one]["detection"]["0.05"] for one in held_out]),
            "all judges: joint at 5 %": average([None if share is None else share[0] for share in joint]),
            "Linf": attack["norms"]["linf"],
            "L2": attack["norms"]["l2"],
        }
    return rows


def read_table(file: Path) -> dict[Place, dict[str, Any]]:
    """Cells of a table, without the reports of their folds; none where there is no file."""
    cells: dict[Place, dict[str, Any]] = {}
    for row in csv.DictReader(StringIO(file.read_text(encoding="utf-8") if file.is_file() else "")):
        name, network, seed, seconds, fold, attack = (row.pop(key) for key in CELL_COLUMNS)
        values = {key: float(value) if value else None for key, value in row.items()}
        cell = cells.setdefault((name, network, int(seed)), {"folds": [], "chosen": {}, "seconds": float(seconds)})
        cell["chosen"][attack] = {key: values.pop(key) for key in CHOSEN}
        if int(fold) == len(cell["folds"]):
            cell["folds"].append({})
        cell["folds"][int(fold)][attack] = values
    return cells


def write_table(file: Path, cells: Mapping[Place, Mapping[str, Any]]) -> None:
    """A row for each cell, fold and attack, six digits a figure, nothing where a figure is not resolvable."""
    text = StringIO()
    lines = csv.writer(text, lineterminator="\n")
    for place in sorted(cells):
        cell = cells[place]
        for fold, attacks in enumerate(cell["folds"]):
            for attack, figures in attacks.items():
                if text.tell() == 0:
                    lines.writerow([*CELL_COLUMNS, *CHOSEN, *figures])
                values = [*(cell["chosen"][attack][key] for key in CHOSEN), *figures.values()]
                shown = ["" if value is None else f"{value:.6g}" for value in values]
                lines.writerow([*place, f"{cell['seconds']:.0f}", fold, attack, *shown])
    write_whole(file, text.getvalue())


def _mean(spread: dict[str, Any] | None) -> float | None:
    return None if spread is None else spread["mean"]


def average(values: Sequence[float | None]) -> float | None:
    """Mean of what is defined; None where nothing is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def of(runs: Sequence[Mapping[str, Any]], attack: str, key: str) -> list[float | None]:
    """A figure of an attack in every fold of some cells."""
    return [fold[attack][key] for run in runs for fold in run["folds"]]


def shown(values: Sequence[float | None]) -> str:
    """Mean, with the number of folds it is over where some have none."""
    mean, n_known = average(values), sum(value is not None for value in values)
    if mean is None:
        return "-"
    return f"{mean:.2f}" if n_known == len(values) else f"{mean:.2f} ({n_known} of {len(values)})"


def overview(cells: dict[tuple[str, str], list[dict[str, Any]]]) -> Iterator[str]:
    """A row for each pair of set and network: F of every attack against the attacked detector, some joint success."""
    names, some = [plan.name for plan in plans()], ("ifgsm", "ifgsm sum", "ifgsm harmonic")
    held_out = {"panel": "panel: joint at 5 %", "all judges": "all judges: joint at 5 %"}
    columns = [*names, *(f"{title}, joint: {' / '.join(some)}" for title in held_out)]
    yield f"| set | network | seeds | victim | detector | {' | '.join(columns)} |"
    yield "|---" * (5 + len(columns)) + "|"
    for (name, network), runs in cells.items():
        degenerate = sum(value == 1 for value in of(runs, "ifgsm", "one answer"))
        n_folds = sum(len(run["folds"]) for run in runs)
        victim = shown(of(runs, "ifgsm", "accuracy of the victim"))
        victim += f" (one answer in {degenerate} of {n_folds})" if degenerate else ""
        detector = shown(of(runs, "ifgsm", "AUC of the attacked detector"))
        detector += "" if all(value == 1 for value in of(runs, "ifgsm", "valid")) else " (not valid in all)"
        scores = " | ".join(shown(of(runs, attack, "F")) for attack in names)
        joint = " | ".join(" / ".join(shown(of(runs, attack, key)) for attack in some) for key in held_out.values())
        yield f"| {name} | {network} | {len(runs)} | {victim} | {detector} | {scores} | {joint} |"


def table(cells: dict[tuple[str, str], list[dict[str, Any]]]) -> Iterator[str]:
    """A row for each pair and attack: mean over folds and seeds, and the spread of F over seeds."""
    first = cells[next(iter(cells))][0]["folds"][0]["ifgsm"]
    keys = [key for key in first if key not in (*OF_MODELS, "F")]
    yield f"| set | network | attack | F (sd) | {' | '.join(keys)} |"
    yield "|---" * (4 + len(keys)) + "|"
    for (name, network), runs in cells.items():
        for attack in runs[0]["folds"][0]:
            values = " | ".join(shown(of(runs, attack, key)) for key in keys)
            scores = [np.mean(of([run], attack, "F")) for run in runs]
            spread = f" ({np.std(scores, ddof=1):.2f})" if len(scores) > 1 else ""
            yield f"| {name} | {network} | {attack} | {np.mean(scores):.2f}{spread} | {values} |"


def verdict(cells: dict[tuple[str, str], list[dict[str, Any]]]) -> Iterator[str]:
    """In how many cells concealment beats the vanilla attack of its family, with an exact interval."""
    for family in ("ifgsm", "pgd"):
        for kind in ("sum", "harmonic"):
            for able_alone in (False, True):
                gains = [
                    np.mean(gain)
                    for (name, _), runs in cells.items()
                    if name not in NOT_COUNTED and (gain := _gains(runs, family, f"{family} {kind}", able_alone))
                ]
                is_said = not able_alone or any(1 in of(runs, family, "one answer") for runs in cells.values())
                if gains and is_said:
                    only = ", without victims of one answer" if able_alone else ""
                    share = binomial_share(sum(gain > 0 for gain in gains), len(gains))
                    yield (
                        f"- {family} {kind}: ahead of {family} in {share.n_hits} of {share.n} cells "
                        f"({share.share:.2f} [{share.low:.2f}, {share.high:.2f}]), "
                        f"mean gain in F {np.mean(gains):+.2f}{only}."
                    )


def _gains(runs: list[dict[str, Any]], family: str, concealed: str, able_alone: bool) -> list[float]:
    """What concealment adds to F in each fold, or in those alone whose victim gives more than one answer."""
    return [
        fold[concealed]["F"] - fold[family]["F"]
        for run in runs
        for fold in run["folds"]
        if not able_alone or fold[family]["one answer"] == 0
    ]


def main() -> None:
    """Compute what is missing, and print the table of what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/attack_table"))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", type=Path, help="CSV of cells that need not be done; new ones are added")
    options = parser.parse_args()
    wanted = [(name, network, s) for s in options.seeds for name in options.sets for network in options.networks]
    done = read_table(options.table) if options.table else {}
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for place in tqdm(wanted, file=sys.stderr):
        if place not in done:
            done[place] = cell(options.folder, options.out, *place)
            if options.table:
                write_table(options.table, done)
        name, network, seed = place
        print(f"{name}, {network}, seed {seed}: {done[place]['seconds']:.0f} s", file=sys.stderr, flush=True)
        cells.setdefault((name, network), []).append(done[place])
    print("\n".join([*overview(cells), "", *verdict(cells), "", *table(cells)]))


if __name__ == "__main__":
    main()
