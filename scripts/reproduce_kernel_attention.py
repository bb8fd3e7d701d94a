"""The tables of configs/kernel_attention/README.md: data sets, splits and seeds, with what context adds to a calendar.

    python scripts/reproduce_kernel_attention.py --folder data --out runs/context_table
    python scripts/reproduce_kernel_attention.py --sets online_retail --splits time --seeds 42 --out runs/try
    python scripts/reproduce_kernel_attention.py --sets online_retail --variant aggregators --seeds 42 43 44

A cell is one `seqlit fit` and one `seqlit test` of a config; its findings are a file in OUT, which is not computed
again (delete OUT after a change of code). Seeds move weights, batches and the draw of context users, not the split;
where labels are few, that too.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scipy.stats import t as student
from tqdm import tqdm

from lightning_modules.context.across_seeds import merge_seeds
from lightning_modules.context.findings import FEWEST_POSITIVES
from lightning_modules.run_folder import write_whole

SEQLIT = str(Path(sys.executable).with_name("seqlit"))
PATHS = {
    "online_retail": None,  # bundled, as the next
    "completejourney": None,
    "completejourney_demographics": None,
    "traffic_fines": "traffic-fines/events.parquet",
}
TIMES = {
    "online_retail": ("2011-07-15", "2011-09-15"),
    "completejourney": ("2017-08-01", "2017-10-01"),
    "traffic_fines": ("2007-01-01", "2009-01-01"),
}
RESPLIT = ("completejourney_demographics",)  # few labels: every seed is another split of the users as well
CONTEXT = "lightning_modules.context"
OTHERS = {
    "learnable_attention": "LearnableAttention",
    "symmetric_attention": "SymmetricAttention",
    "exp_learnable_hawkes": "ExpLearnableHawkes",
    "learnable_hawkes": "LearnableHawkes",
    "attention_hawkes": "AttentionHawkes",
    "learnable_attention_hawkes": "LearnableAttentionHawkes",
}
WIDE = {
    "class_path": "lightning_modules.networks.RecurrentEncoder",
    "init_args": {"d_model": 128, "d_embedding": 16},
}
VARIANTS: dict[str, list[str]] = {
    "core": [],
    # the aggregators that the core table leaves out, and a parameter-matched encoder
    "aggregators": [
        "--model.init_args.aggregators",
        json.dumps({name: {"class_path": f"{CONTEXT}.{kind}"} for name, kind in OTHERS.items()}),
        "--model.init_args.wide_encoder",
        json.dumps(WIDE),
        "--model.init_args.evaluation.explained",
        "attention_hawkes",
    ],
    # every branch trains its own encoder, one without context as long as the others
    "tuned": [
        "--model.init_args.tune_encoder",
        "true",
        "--model.init_args.aggregators",
        json.dumps({"mean": {"class_path": f"{CONTEXT}.Mean"}, "kernel": {"class_path": f"{CONTEXT}.KernelAttention"}}),
    ],
}


def fit_and_test(arguments: list[str], what: str) -> Path:
    """``seqlit fit`` and ``test`` of the same arguments, which may name classes beside this script; the run folder."""
    beside = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    found = None
    for command in ("fit", "test"):
        done = subprocess.run(
            [SEQLIT, command, *arguments], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": beside}
        )
        if done.returncode:
            sys.exit(f"seqlit {command} failed for {what}: {done.stderr.strip()}")
        found = found or re.search(r"run folder (.+)", done.stdout)
    if found is None:
        sys.exit("seqlit fit named no run folder")
    return Path(found[1])


def run(name: str, split: str, seed: int, variant: str, folder: Path) -> dict[str, Any]:
    """One fit and one test; the parsed ``report/metrics.json``."""
    arguments = [
        "--config",
        f"configs/kernel_attention/{name}.yaml",
        "--seed_everything",
        str(seed),
        *VARIANTS[variant],
    ]
    arguments += ["--model.init_args.context.seed", str(seed), "--data.init_args.split", split]
    if name in RESPLIT:
        arguments += ["--data.init_args.seed", str(seed)]
    if PATHS[name] is not None:
        arguments += ["--data.init_args.paths", str(folder / str(PATHS[name]))]
    if split == "time":
        starts = dict(zip(("validation_start", "test_start"), TIMES[name], strict=True))
        arguments += [part for key, day in starts.items() for part in (f"--data.init_args.{key}", day)]
    metrics = fit_and_test(arguments, f"{name}, {split}, seed {seed}") / "report" / "metrics.json"
    return dict(json.loads(metrics.read_text(encoding="utf-8")))


def cell(name: str, split: str, seed: int, variant: str, folder: Path, out: Path) -> dict[str, Any]:
    """The findings of a cell, computed unless they are there."""
    file = out / f"{name}, {split}, {variant}, {seed}.json"
    if not file.is_file():
        started = time.perf_counter()
        found = run(name, split, seed, variant, folder)
        found["seconds"]["both commands"] = time.perf_counter() - started
        write_whole(file, json.dumps(found) + "\n")
    return dict(json.loads(file.read_text(encoding="utf-8")))


def spread(values: list[float | None], digits: int = 3, sign: str = "") -> str:
    """Mean over seeds and half the width of its 95 % interval by Student's t."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    half = ""
    if len(known) > 1:
        quantile = float(student.ppf(0.975, len(known) - 1))
        half = f" ± {quantile * statistics.stdev(known) / len(known) ** 0.5:.{digits}f}"
    return f"{statistics.mean(known):{sign}.{digits}f}{half}"


def marked(name: str, target: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """Name of a target with what a reader must know of it: a time of the query that tells the label, few labels."""
    marks = ["depends on the outcome"] if target["outcome_dependent"] else []
    rarest = min(min(one["data"]["targets"][name]["folds"]["test"]["by class"]) for one in runs)
    if rarest < FEWEST_POSITIVES and target.get("scope") != "next":
        marks.append(f"underpowered: {rarest} test queries of the rarest class")
    return f"{name} ({', '.join(marks)})" if marks else name


def table(name: str, split: str, variant: str, runs: list[dict[str, Any]], every_arm: bool) -> Iterator[str]:
    """A row an arm, the targets side by side: over seeds, ROC-AUC, the gain over the strictest control, who helps."""
    targets = merge_seeds(runs)["targets"]
    titles = [marked(target, found, runs) for target, found in targets.items()]
    yield f"### {name}, split by {split}, {variant}, {len(runs)} seeds\n"
    yield f"| arm | {' | '.join(f'{title}: ROC-AUC | gain | helps' for title in titles)} |"
    yield "|---" * (1 + 3 * len(targets)) + "|"
    arms = next(iter(targets.values()))["arms"]
    kept = [arm for arm in arms if every_arm or not arm.startswith("shuffled:")]
    for arm in kept:
        cells = []
        for found in targets.values():
            row = found["arms"][arm]
            judged = row.get("judged")
            gain = "" if judged is None else spread(judged["values"], 4, "+")
            helps = "" if judged is None else f"{judged['n_helps']} of {len(runs)}"
            cells += [spread(row["measures"]["roc_auc"]["values"]), gain, helps]
        yield f"| {arm} | {' | '.join(cells)} |"
    yield ""
    for target in targets:
        chosen = [one["targets"][target]["arms"][one["targets"][target]["chosen"]]["judged"] for one in runs]
        names = ", ".join(one["targets"][target]["chosen"] for one in runs)
        gains = ", ".join(f"{one['gain']:+.4f}" for one in chosen)
        n_helps = sum(bool(one["helps"]) for one in chosen)
        yield f"- {target}: the arm chosen on validation ({names}) helps in {n_helps} of {len(runs)} seeds, by {gains}."
    seconds = [one["seconds"]["both commands"] for one in runs]
    yield f"\nSeconds of fit and test together: {min(seconds):.0f} to {max(seconds):.0f}.\n"


def main() -> None:
    """Compute what is missing, and print the tables of what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("runs/context_table"))
    parser.add_argument("--sets", nargs="+", choices=list(PATHS), default=list(TIMES))
    parser.add_argument("--splits", nargs="+", choices=["users", "time"], default=["users", "time"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44, 45, 46])
    parser.add_argument("--variant", choices=list(VARIANTS), default="core")
    parser.add_argument("--every_arm", action="store_true", help="also shuffled moments without time features")
    options = parser.parse_args()
    wanted = [(name, split, seed) for seed in options.seeds for name in options.sets for split in options.splits]
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name, split, seed in tqdm(wanted, file=sys.stderr):
        found = cell(name, split, seed, options.variant, options.folder, options.out)
        cells.setdefault((name, split), []).append(found)
    for (name, split), runs in cells.items():
        print("\n".join(table(name, split, options.variant, runs, options.every_arm)))


if __name__ == "__main__":
    main()
