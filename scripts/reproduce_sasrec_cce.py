"""Train and test one config over several seeds and print the table of the README: mean and spread, who leads.

    python scripts/reproduce_sasrec_cce.py configs/sasrec_cce/online_retail.yaml --seeds 42 43 44
    python scripts/reproduce_sasrec_cce.py CONFIG --seeds 42 -- --data.init_args.recommend_seen false

What follows ``--`` goes to every ``seqlit`` command. Seeds move initial weights, dropout, negatives, the order of
epochs, places inside baskets and drawn targets, not the split: ``data.seed`` stays.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

SEQLIT = str(Path(sys.executable).with_name("seqlit"))
KEYS = ("ndcg@10", "hit_rate@10", "recall@10", "coverage@10")


def run(config: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """One fit and one test; the parsed ``report/metrics.json``."""
    common = ["--config", config]
    for option in ("seed_everything", "model.init_args.loss.init_args.seed", "data.init_args.sampling_seed"):
        common += [f"--{option}", str(seed)]
    folder = None
    for command in ("fit", "test"):
        lines = []
        process = subprocess.Popen([SEQLIT, command, *common, *overrides], stdout=subprocess.PIPE, text=True)
        for line in process.stdout or ():
            lines.append(line)
            if command == "fit":
                print(f"  seed {seed}: {line}", end="", file=sys.stderr, flush=True)
        if process.wait():
            sys.exit(f"seqlit {command} failed for seed {seed}")
        if command == "fit":
            folder = re.search(r"run folder (.+)", "".join(lines))
    if folder is None:
        sys.exit("seqlit fit named no run folder")
    # below partial/ where a limit of the trainer left out batches of the test
    return json.loads(next(Path(folder[1]).rglob("report/metrics.json")).read_text(encoding="utf-8"))


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds; the value alone for one seed."""
    if len(values) == 1 or max(values) == min(values):
        return f"{values[0]:.4f}"
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def table(reports: list[dict[str, Any]]) -> str:
    """Markdown rows: the model over seeds, then each baseline with the paired difference of every seed."""
    words = ["NDCG@10", "HitRate@10", "Recall@10", "Coverage@10"]
    lines = [f"| | {' | '.join(words)} | model minus this, NDCG@10 [95 %], by seed |", "|---" * 6 + "|"]
    lines.append(f"| SASRecCCE | {' | '.join(spread([r['model'][k] for r in reports]) for k in KEYS)} | |")
    for name in reports[0]["baselines"]:
        cells = " | ".join(spread([report["baselines"][name][key] for report in reports]) for key in KEYS)
        gaps = [report["paired_difference"][name]["ndcg@10"] for report in reports]
        shown = ", ".join(f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]" for mean, low, high in gaps)
        lines.append(f"| {name.replace('_', ' ')} | {cells} | {shown} |")
    fit = [report["seconds"]["fit"] for report in reports]
    lines.append(f"\n{reports[0]['n_users']} test users; fit {min(fit):.0f}-{max(fit):.0f} s.")
    return "\n".join(lines)


def main() -> None:
    """Parse arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    # Cut by hand: argparse takes no positional list behind an option with several values.
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options, overrides = parser.parse_args(arguments[:cut]), arguments[cut + 1 :]
    print(table([run(options.config, seed, overrides) for seed in options.seeds]))


if __name__ == "__main__":
    main()
