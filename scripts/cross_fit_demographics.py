"""Demographics of 801 households by repeated cross-fitting: each is tested once a repeat, by models that never saw it.

    python scripts/cross_fit_demographics.py --repeats 1 --out runs/context_table
    python scripts/cross_fit_demographics.py --repeats 5

Households with an answer are dealt into K disjoint folds, those of a class evenly. A fold is one `seqlit fit` and one
`seqlit test`: it is the test, the next fold the validation, and all other households, those without an answer too, the
training. Predictions out of fold are pooled, a household's averaged over repeats, each of which is a new deal with new
weights; arms are judged on the pool by a bootstrap over households. No arm is chosen: the households that would choose
are those of the test. A fold is a file in OUT that is not computed again.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from reproduce_kernel_attention import fit_and_test
from tqdm import tqdm

from datamodules.sources.file_names import resolve_paths
from lightning_modules.callbacks.study_report import StudyReport
from lightning_modules.context.findings import FEWEST_POSITIVES, findings
from lightning_modules.context.study import ContextStudy, TargetStudy
from lightning_modules.run_folder import write_whole

CONFIG = "configs/kernel_attention/completejourney_demographics.yaml"
ANSWERS = ("age", "household_size")
OF_QUERIES = ("labels", "times", "n_events", "recency")
FIRST_SEED = 42


class KeptPredictions(StudyReport):
    """Writes ``report/predictions.json``: of every target what each arm said of each user of validation and test."""

    study_type = ContextStudy

    def write(self, folder: Path, studies: list[ContextStudy], facts: dict[str, Any]) -> None:
        """The one study of the test."""
        (study,) = studies
        kept = {
            target.name: {
                "users": [study.user_ids[row] for row in target.users.tolist()],
                "test": {arm: values.tolist() for arm, values in target.test.items()},
                **{name: getattr(target, name).tolist() for name in OF_QUERIES},
                **{name: getattr(target, name) for name in ("description", "n_classes", "probe")},
            }
            for target in study.targets
        }
        write_whole(folder / "predictions.json", json.dumps(kept) + "\n")


def dealt(answers: pl.DataFrame, n_folds: int, seed: int) -> NDArray[np.int64]:
    """``(N,)`` fold of each household: in random order within a combination of answers, dealt out in turn."""
    codes = [answers[column].rank("dense").to_numpy() for column in reversed(ANSWERS)]
    order = np.lexsort([np.random.default_rng(seed).permutation(len(answers)), *codes])
    folds = np.empty(len(answers), dtype=np.int64)
    folds[order] = np.arange(len(answers)) % n_folds
    return folds


def with_folds(out: Path, n_folds: int, repeat: int, fold: int) -> Path:
    """The grocery lines with a column ``fold``: ``test``, ``validation`` or ``train``."""
    (lines,), (answers,) = (
        resolve_paths(f"bundled:{name}") for name in ("completejourney", "completejourney_demographics")
    )
    known = pl.read_parquet(answers).select("household_id", *ANSWERS).drop_nulls().sort("household_id")
    steps = (dealt(known, n_folds, FIRST_SEED + repeat) - fold) % n_folds
    roles = np.where(steps == 0, "test", np.where(steps == 1, "validation", "train"))
    folds = pl.DataFrame({"household_id": known["household_id"], "fold": roles})
    table = pl.read_parquet(lines).join(folds, on="household_id", how="left", maintain_order="left")
    file = out / f"fold {fold} of {n_folds}, {repeat}.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    table.with_columns(pl.col("fold").fill_null("train")).write_parquet(file)
    return file


def cell(out: Path, n_folds: int, repeat: int, fold: int) -> dict[str, Any]:
    """What the models of a fold said of its households, computed unless it is there."""
    name = f"fold {fold} of {n_folds}, {repeat}"
    file = out / f"{name}.json"
    if not file.is_file():
        started, seed = time.perf_counter(), FIRST_SEED + repeat
        arguments = ["--config", CONFIG, "--seed_everything", str(seed), "--model.init_args.context.seed", str(seed)]
        arguments += ["--data.init_args.paths", str(with_folds(out, n_folds, repeat, fold))]
        arguments += ["--data.init_args.fold_column", "fold"]
        arguments += ["--trainer.callbacks+", f"{Path(__file__).stem}.{KeptPredictions.__name__}"]
        run = fit_and_test(arguments, name)
        kept = json.loads((run / "report" / "predictions.json").read_text(encoding="utf-8"))
        seconds = time.perf_counter() - started
        write_whole(file, json.dumps({"targets": kept, "seconds": seconds}) + "\n")
    return dict(json.loads(file.read_text(encoding="utf-8")))


def pooled(repeats: list[list[dict[str, Any]]]) -> ContextStudy:
    """One study of all households from the folds of every repeat; its validation is the test, and means nothing.

    Raises:
        ValueError: If a repeat does not test every household once.
    """
    targets = []
    for name in ANSWERS:
        tested = [[fold["targets"][name] for fold in folds] for folds in repeats]
        users = [np.concatenate([part["users"] for part in parts]) for parts in tested]
        orders = [np.argsort(ids) for ids in users]
        known = np.unique(users[0])
        for number, (ids, order) in enumerate(zip(users, orders, strict=True)):
            if not np.array_equal(ids[order], known):
                raise ValueError(
                    f"repeat {number}: {len(ids)} tests of {len(known)} households, each must be tested once"
                )
        first = tested[0][0]
        columns: dict[str, Any] = {
            key: torch.from_numpy(np.concatenate([np.array(part[key]) for part in tested[0]])[orders[0]])
            for key in OF_QUERIES
        }
        said = {
            arm: np.mean(
                [
                    np.concatenate([np.array(part["test"][arm]) for part in parts])[order]
                    for parts, order in zip(tested, orders, strict=True)
                ],
                axis=0,
            )
            for arm in first["test"]
        }
        probabilities = {arm: torch.from_numpy(values) for arm, values in said.items()}
        targets.append(
            TargetStudy(
                name=name,
                scope="global",
                outcome_dependent=False,
                users=torch.arange(len(known)),
                validation_labels=columns["labels"],
                validation=probabilities,
                test=probabilities,
                **{key: first[key] for key in ("description", "n_classes", "probe")},
                **columns,
            )
        )
    return ContextStudy(targets=tuple(targets), split="users", seed=FIRST_SEED)


def table(found: dict[str, Any]) -> Iterator[str]:
    """A row an arm: ROC-AUC, what it is over own history, its gain over the strictest control, and whether it helps.

    Everybody is asked at one moment, so that there are no arms at shuffled ones: one that beats own history with and
    without time features is not known to help ("-"). The difference from own history, with its uncorrected interval,
    says how much could be seen.
    """
    targets = found["targets"]
    yield f"| arm | {' | '.join(f'{name}: ROC-AUC | over own | gain | helps' for name in targets)} |"
    yield "|---" * (1 + 4 * len(targets)) + "|"
    arms = next(iter(targets.values()))["arms"]
    for arm in (arm for arm in arms if not arm.startswith("shuffled")):
        cells = []
        for target in targets.values():
            row = target["arms"][arm]
            cells.append(interval(row["measures"]["roc_auc"], ".3f"))
            if row["judged"] is None:
                cells += [""] * 3
                continue
            cells += [
                interval(row["gains"]["own"]["roc_auc"], "+.4f"),
                interval(row["judged"]["adjusted_interval"], "+.4f"),
            ]
            cells.append({True: "yes", False: "no", None: "-"}[row["judged"]["helps"]])
        yield f"| {arm} | {' | '.join(cells)} |"
    yield ""
    for name, target in targets.items():
        over_own = [arm["gains"]["own"]["roc_auc"] for arm in target["arms"].values() if arm["gains"]]
        half = statistics.median((high - low) / 2 for _, low, high in over_own)
        few = f", fewer than {FEWEST_POSITIVES}: underpowered" if target["underpowered"] else ""
        n_users, n_rarest = target["n_users"], target["n_rarest"]
        yield (
            f"- {name}: {n_users} households, {n_rarest} of the rarest class{few}; differences from own history below "
            f"{half:.4f}, half an interval of the median arm, cannot be seen."
        )


def interval(values: list[float], form: str) -> str:
    """Value with interval."""
    value, low, high = (format(one, form) for one in values)
    return f"{value} [{low}, {high}]"


def main() -> None:
    """Compute what is missing, and print the table of the pool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/context_table"))
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.folds < 3 or options.repeats < 1:
        parser.error(f"folds must be at least 3 and repeats at least 1, got {options.folds} and {options.repeats}")
    out = options.out / "cross-fitting"
    wanted = [(repeat, fold) for repeat in range(options.repeats) for fold in range(options.folds)]
    cells = {place: cell(out, options.folds, *place) for place in tqdm(wanted, file=sys.stderr)}
    repeats = [[cells[repeat, fold] for fold in range(options.folds)] for repeat in range(options.repeats)]
    print(f"### completejourney_demographics, {options.folds} folds, repeated {options.repeats} times\n")
    print("\n".join(table(findings(pooled(repeats)))))
    seconds = [one["seconds"] for one in cells.values()]
    print(f"\nSeconds a fold: {min(seconds):.0f} to {max(seconds):.0f}.")


if __name__ == "__main__":
    main()
