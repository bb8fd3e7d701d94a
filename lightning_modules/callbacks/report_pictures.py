"""Pictures of a ranking report. Each function writes one PNG and nothing else."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lightning_modules.callbacks.picture_frame import COLOURS, new_axes, save, words


def _metric(key: str) -> str:
    word, k = key.split("@")
    return f"{word.upper() if word in ('ndcg', 'mrr', 'map') else word.replace('_', ' ')}@{k}"


def comparison(path: Path, result: dict[str, Any], key: str) -> None:
    """Every system with its interval, and the model's paired advantage over each baseline."""
    names = list(result["interval"])
    figure, (left, right) = new_axes(2, width=10, height=0.55 * len(names) + 1.6)
    for row, name in enumerate(names):
        _interval(left, row, *result["interval"][name][key])
    left.set_yticks(range(len(names)), [words(name) for name in names])
    left.set_xlim(left=0)
    left.set_xlabel(f"{_metric(key)} with interval")
    for row, name in enumerate(names[1:], start=1):
        _interval(right, row, *result["paired_difference"][name][key])
    right.axvline(0, color="black", linewidth=0.8)
    right.set_yticks(range(1, len(names)), [words(name) for name in names[1:]])
    right.set_xlabel(f"{_metric(key)}: model minus baseline, same users")
    for each in (left, right):
        each.set_ylim(len(names) - 0.5, -0.5)
        each.xaxis.set_major_locator(MaxNLocator(5))  # more numbers of five digits touch
        each.grid(axis="y", visible=False)
    figure.suptitle(f"Model and baselines, {result['n_users']} users")
    save(figure, path)


def _interval(axes: Axes, row: int, mean: float, low: float, high: float) -> None:
    # About its own middle: an interval of few resamples, or of a small level, need not hold the mean.
    axes.errorbar((low + high) / 2, row, xerr=(high - low) / 2, fmt="none", capsize=3, ecolor=COLOURS[row])
    axes.plot(mean, row, "o", color=COLOURS[row])


def by_history_length(path: Path, lengths: np.ndarray, values: dict[str, np.ndarray], key: str) -> None:
    """Mean metric in groups of users of equal size, from short to long histories, with standard errors."""
    n_groups = max(1, min(8, len(lengths) // 20))
    groups = np.array_split(np.argsort(lengths, kind="stable"), n_groups)
    figure, (axes,) = new_axes(width=8.5)
    middles = [float(np.median(lengths[group])) for group in groups]
    for row, (name, value) in enumerate(values.items()):
        means = [float(value[group].mean()) for group in groups]
        errors = [float(value[group].std() / np.sqrt(len(group))) for group in groups]
        axes.errorbar(
            middles, means, yerr=errors, marker="o", markersize=4, capsize=2, color=COLOURS[row], label=words(name)
        )
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(MaxNLocator(8) if high < 5 * low else LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"items in the user's history (median of {n_groups} groups of about {len(groups[0])} users)")
    axes.set_ylabel(f"{_metric(key)} ± standard error")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)


def popularity(path: Path, item_counts: np.ndarray, shown: dict[str, np.ndarray], cutoff: int) -> None:
    """How much of what each system shows comes from which tenth of the catalogue, beside what was bought."""
    by_popularity = np.argsort(-item_counts, kind="stable")
    tenths = np.array_split(by_popularity, min(10, len(by_popularity)))
    figure, (axes,) = new_axes(width=8)
    width = 0.85 / len(shown)
    for row, (name, counts) in enumerate(shown.items()):
        share = [counts[tenth].sum() / max(1, counts.sum()) for tenth in tenths]
        label = "bought next" if name == "bought" else f"{words(name)}, top {cutoff}"
        colour = "#444444" if name == "bought" else COLOURS[row]
        axes.bar(np.arange(len(tenths)) + row * width, share, width, color=colour, label=label)
    axes.set_xticks(np.arange(len(tenths)) + 0.425 - width / 2, [str(i + 1) for i in range(len(tenths))])
    axes.set_xlabel("tenth of the catalogue, from the most to the least popular item in training")
    axes.set_ylabel("share")
    axes.grid(axis="x", visible=False)
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def training(path: Path, metrics_file: Path, key: str) -> None:
    """Losses and the watched metric over epochs; nothing is drawn where the run left no metrics."""
    if not metrics_file.is_file():
        return
    with metrics_file.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))

    def series(name: str) -> tuple[list[int], list[float]]:
        points = [(int(row["epoch"]), float(row[name])) for row in rows if row.get(name)]
        return [epoch for epoch, _ in points], [value for _, value in points]

    figure, (left, right) = new_axes(2, width=10)
    for row, name in enumerate(("train/loss", "val/loss")):
        left.plot(*series(name), marker="o", markersize=3, color=COLOURS[row], label=name)
    left.set_ylabel("loss (nats)")
    left.legend(frameon=False)
    epochs, values = series(key)
    right.plot(epochs, values, marker="o", markersize=3, color=COLOURS[2])
    if values:
        best = int(np.argmax(values))
        right.axvline(epochs[best], color="black", linewidth=0.8, linestyle="--", label=f"best, epoch {epochs[best]}")
        right.legend(frameon=False)
    right.set_ylabel(key)
    for each in (left, right):
        each.set_xlabel("epoch")
        each.xaxis.set_major_locator(MaxNLocator(integer=True))
    save(figure, path)
