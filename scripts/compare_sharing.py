"""Compare the sharings of CCE- at equal K over seeds: NDCG@10 with spread, and quality against wall time.

    python scripts/compare_sharing.py configs/sasrec_cce/online_retail.yaml --seeds 42 43 44 45 46
    python scripts/compare_sharing.py CONFIG --max-epochs 4 --out results.jsonl -- --data.init_args.paths FILE
    python scripts/compare_sharing.py --report results.jsonl

What follows ``--`` changes the config, for every arm alike. Each finished run is a line of ``--out`` at once: the same
command run again goes on where it was cut short. Printed: a Markdown table; beside the results: a picture.
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_modules.cli import SeqlitCLI

SHARINGS = ("position", "tile", "batch")
# They rank for people and write files; here they would only cost time.
REPORTS = ("RankingReport", "RecommendationWriter")
# What makes two runs the same arm, and what all runs of one file have in common.
ARM, PROTOCOL = ("seed", "sharing", "n_negatives"), ("config", "settings", "threads")
# Colour-blind safe (Okabe & Ito).
STYLES = {"position": ("o", "#0072B2"), "tile": ("s", "#E69F00"), "batch": ("^", "#009E73")}
# Words of a clock, and the seconds it measured.
CLOCKS = {"wall": ("fit s", "fit_seconds"), "cpu": ("fit CPU s", "fit_cpu_seconds")}
Run = dict[str, Any]


class StudyCLI(SeqlitCLI):
    """Builds what ``seqlit fit`` builds from a config, but starts nothing and leaves no run folder."""

    def _parse_ckpt_path(self) -> None:
        """There is no checkpoint to start from."""

    def before_instantiate_classes(self) -> None:
        """Take out what has no part in training and choosing the best epoch."""
        trainer = self.config.trainer
        trainer.callbacks = [each for each in trainer.callbacks if each.class_path.rsplit(".", 1)[-1] not in REPORTS]
        trainer.logger = trainer.enable_progress_bar = trainer.enable_model_summary = False


def run(config: str, arm: Run, settings: list[str], folder: str) -> Run:
    """Fit one arm, test its best checkpoint; what was measured.

    Args:
        config: A YAML file of ``configs/``.
        arm: Values of ``ARM``.
        settings: Arguments that change the config.
        folder: Where checkpoints may go.
    """
    loss = "--model.init_args.loss.init_args"
    arguments = ["--config", config, *settings, "--trainer.default_root_dir", folder]
    # Last, so that no setting changes an arm. One seed for all: weights and dropout, and the draws of the loss.
    arguments += ["--seed_everything", str(arm["seed"]), f"{loss}.seed", str(arm["seed"])]
    arguments += [f"{loss}.sharing", arm["sharing"], f"{loss}.n_negatives", str(arm["n_negatives"])]
    cli = StudyCLI(
        run=False,
        args=arguments,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,
    )
    trainer = cli.trainer
    # The processor's clock beside the wall's: it does not count the time other programs took from this one.
    wall, processor = time.perf_counter(), time.process_time()
    trainer.fit(cli.model, cli.datamodule)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    epochs, best = trainer.current_epoch, trainer.checkpoint_callback
    (test,) = trainer.test(cli.model, cli.datamodule, ckpt_path=best.best_model_path, weights_only=True, verbose=False)
    return {
        "ndcg@10": test["test/ndcg@10"],
        "hit_rate@10": test["test/hit_rate@10"],
        "val_ndcg@10": float(best.best_model_score),
        "epochs": epochs,
        "fit_seconds": round(wall, 2),
        "fit_cpu_seconds": round(processor, 2),
    }


def load(path: Path) -> list[Run]:
    """The finished runs of a file.

    Raises:
        SystemExit: If they are of more than one protocol; their numbers may not stand in one table.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    runs = [json.loads(line) for line in lines]
    if any(each[key] != runs[0][key] for each in runs for key in PROTOCOL):
        sys.exit(f"{path} holds runs of more than one protocol")
    return runs


def study(options: argparse.Namespace, settings: list[str]) -> None:
    """Run every arm that is not in the file yet."""
    protocol = dict(zip(PROTOCOL, (Path(options.config).stem, settings, options.threads), strict=True))
    done = load(options.out)
    if done and any(done[0][key] != value for key, value in protocol.items()):
        there = {key: done[0][key] for key in PROTOCOL}
        sys.exit(f"{options.out} holds runs of another protocol, {there}: name another file with --out")
    finished = {tuple(each[key] for key in ARM) for each in done}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    # Seeds outermost: a study cut short still has as many seeds of each arm, give or take one.
    arms = [(seed, sharing, k) for seed in options.seeds for sharing in options.sharings for k in options.negatives]
    for number, values in enumerate(arms, start=1):
        if values in finished:
            continue
        arm = dict(zip(ARM, values, strict=True))
        with tempfile.TemporaryDirectory() as folder:
            result = arm | run(options.config, arm, settings, folder) | protocol
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        shown = "  ".join(f"{key} {result[key]}" for key in (*ARM, "epochs", "fit_seconds"))
        print(f"{number}/{len(arms)}  {shown}  ndcg@10 {result['ndcg@10']:.4f}", file=sys.stderr, flush=True)


def by_arm(runs: list[Run]) -> dict[tuple[str, int], dict[int, Run]]:
    """(sharing, K) to seed to run, in the order of the table: by K, so that rivals stand together."""
    keys = {(each["sharing"], each["n_negatives"]) for each in runs}
    ordered = sorted(keys, key=lambda key: (key[1], SHARINGS.index(key[0])))
    return {key: {r["seed"]: r for r in runs if (r["sharing"], r["n_negatives"]) == key} for key in ordered}


def spread(values: list[float], form: str) -> str:
    """Mean and standard deviation over seeds; the value alone for one seed."""
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def table(runs: list[Run], clock: str) -> str:
    """Markdown: one row for each sharing and K."""
    heading, seconds = CLOCKS[clock]
    words = [
        "K",
        "sharing",
        "seeds",
        "NDCG@10",
        "HitRate@10",
        "NDCG@10 minus `position`",
        heading,
        f"{heading.removeprefix('fit ')} an epoch",
    ]
    lines = [f"| {' | '.join(words)} |", "|---" * len(words) + "|"]
    arms = by_arm(runs)
    for (sharing, k), seeds in arms.items():
        # Paired: one seed has the same initial weights and order of batches in every arm.
        rival = {} if sharing == "position" else arms.get(("position", k), {})
        gaps = [each["ndcg@10"] - rival[seed]["ndcg@10"] for seed, each in seeds.items() if seed in rival]
        cells = [
            str(k),
            f"`{sharing}`",
            str(len(seeds)),
            *(spread([each[key] for each in seeds.values()], ".4f") for key in ("ndcg@10", "hit_rate@10")),
            spread(gaps, "+.4f") if gaps else "",
            f"{statistics.median(each[seconds] for each in seeds.values()):.0f}",
            f"{statistics.median(each[seconds] / each['epochs'] for each in seeds.values()):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(runs: list[Run], path: Path, clock: str) -> None:
    """Quality against time: a marker an arm at its median time and mean NDCG@10, bars of one deviation."""
    # No pyplot: its global state picks a backend that may need a screen.
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    arms = by_arm(runs)
    for sharing, (marker, colour) in STYLES.items():
        points = []
        for (name, k), seeds in arms.items():
            if name != sharing:
                continue
            values = [each["ndcg@10"] for each in seeds.values()]
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            seconds = [each[CLOCKS[clock][1]] for each in seeds.values()]
            points.append((statistics.median(seconds), statistics.mean(values), deviation))
            axes.annotate(str(k), points[-1][:2], (5, 5), textcoords="offset points", fontsize=8, color=colour)
        if points:
            x, y, bars = zip(*points, strict=True)
            axes.errorbar(x, y, yerr=bars, fmt=marker, color=colour, capsize=3, label=sharing)
    axes.set_xscale("log")
    # The arms of one data set lie within one decade, where a log axis would else label nothing.
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_formatter("{x:.0f}")
    axes.set(xlabel=f"fit, {clock} seconds (median, log)", ylabel="test NDCG@10 (mean ± sd)", title=runs[0]["config"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, which="both")
    axes.legend(title="sharing (labels: K)")
    figure.savefig(path, dpi=130)


def report(path: Path, clock: str) -> None:
    """Print the table of a file and draw its picture."""
    runs = load(path)
    if not runs:
        sys.exit(f"{path} holds no runs")
    print(f"{runs[0]['config']} {' '.join(runs[0]['settings'])}\n\n{table(runs, clock)}\n")
    picture(runs, path.with_suffix(".png"), clock)


def main() -> None:
    """Parse arguments, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44, 45, 46])
    parser.add_argument("--negatives", type=int, nargs="+", default=[64, 256, 1024], help="values of K")
    parser.add_argument("--sharings", nargs="+", choices=SHARINGS, default=list(SHARINGS))
    parser.add_argument("--max-epochs", type=int, help="instead of the config's, for every arm")
    parser.add_argument("--out", type=Path, help="default: runs/compare_sharing/<config>.jsonl")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", type=Path, nargs="+", help="only tabulate and draw these results")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of a machine that was shared with others")
    # Cut by hand: argparse takes no positional list behind an option with several values.
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options, settings = parser.parse_args(arguments[:cut]), arguments[cut + 1 :]
    if (options.config is None) == (options.report is None):
        parser.error("give a config to train, or --report and results")
    if options.config:
        options.out = options.out or Path("runs/compare_sharing") / f"{Path(options.config).stem}.jsonl"
        if options.max_epochs is not None:
            settings = [*settings, "--trainer.max_epochs", str(options.max_epochs)]
        # Lightning warns of arguments it is given where there are some of the command line, too.
        del sys.argv[1:]
        torch.set_num_threads(options.threads)
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", message=".*(does not have many workers|isinstance\\(treespec, LeafSpec\\)).*")
        study(options, settings)
    for path in options.report or [options.out]:
        report(path, options.clock)


if __name__ == "__main__":
    main()
