"""Pictures of a test of context. Each function writes one PNG and nothing else."""

import math
import textwrap
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from lightning_modules.callbacks.context_text import Findings
from lightning_modules.callbacks.picture_frame import COLOURS, new_axes, save, words
from lightning_modules.context.findings import WORDS
from lightning_modules.context.study import AttentionDiagnostics, ContextStudy, EmbeddingSample, Measure

Array = NDArray[np.float64]

CONTEXT, CONTROL, REST = COLOURS[0], COLOURS[1], "#BBBBBB"
"""Colours of arms with context and of controls, and of what is not told apart."""

MOST_NAMED = 12
"""Users a heat map has room for, in each direction."""

MOST_CLASSES = 6
"""Classes told apart by colour or row; the rest is one."""

_SPANS = {
    **{"1 s": 1 / 86400, "1 min": 1 / 1440, "10 min": 1 / 144, "1 h": 1 / 24, "6 h": 1 / 4, "1 day": 1},
    **{"3 days": 3, "1 week": 7, "30 days": 30, "90 days": 90, "1 year": 365.25, "10 years": 3652.5},
}
"""Round spans in days, ticks of an axis of ages."""


def _grid(n: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """``n`` plots, at most three beside one another; inches are of one plot."""
    columns = min(3, n)
    rows = math.ceil(n / columns)
    figure, axes = new_axes(columns, width=width * columns, height=height * rows, n_rows=rows)
    for empty in axes[n:]:
        empty.remove()
    return figure, axes[:n]


def comparison(path: Path, found: Findings, measure: Measure = "roc_auc") -> None:
    """A measure of each arm with its interval, one plot a target, controls in another colour.

    The arm chosen on validation is large, the control it is judged by has a dotted line.
    """
    targets = found["targets"]
    arms = list(dict.fromkeys(arm for target in targets.values() for arm in target["arms"]))
    figure, axes = _grid(len(targets), width=4.6 if len(targets) > 1 else 6.5, height=0.21 * len(arms) + 1.6)
    columns = min(3, len(axes))
    for place, (each, (name, target)) in enumerate(zip(axes, targets.items(), strict=True)):
        for row, arm in enumerate(arms):
            interval = target["arms"][arm]["measures"][measure] if arm in target["arms"] else None
            if interval is None or None in interval:
                continue
            value, low, high = interval
            is_control, is_chosen = target["arms"][arm]["kind"] == "control", arm == target["chosen"]
            colour = CONTROL if is_control else CONTEXT
            each.plot([low, high], [row, row], color=colour, linewidth=2.4 if is_chosen else 1.4)
            each.plot(value, row, "s" if is_control else "o", color=colour, markersize=7 if is_chosen else 4.5)
        if target["chosen"]:
            control = target["arms"][target["chosen"]]["judged"]["control"]
            value = target["arms"][control]["measures"][measure][0]
            if value is not None:
                each.axvline(value, color="black", linewidth=0.9, linestyle=":")
        if not each.lines:
            each.text(0.5, 0.5, "not defined", ha="center", va="center", fontsize=8, transform=each.transAxes)
        each.set_title(_titled(name, target, 38), fontsize=9.5)
        each.set_yticks(range(len(arms)), arms if place % columns == 0 else [], fontsize=8)
        each.set_ylim(len(arms) - 0.5, -0.5)
        each.xaxis.set_major_locator(MaxNLocator(5))
        each.grid(axis="y", visible=False)
        each.set_xlabel(f"{_named(measure)} [{100 * found['level']:g} %]")
    keys = "blue dots: context of the moment of the query\norange squares: controls"
    keys += "\nlarge: chosen on validation; dotted: its strictest control"
    figure.suptitle(keys, fontsize=8)
    save(figure, path)


def _titled(name: str, target: dict[str, Any], width: int, more: str = "") -> str:
    marked = " (outcome-dependent)" if target["outcome_dependent"] else ""
    return textwrap.fill(f"{name}{marked}{more}", width)


def _named(measure: Measure) -> str:
    return "log-loss, nats" if measure == "log_loss" else WORDS[measure]


def _bounds(low: float | None, high: float | None, whole: bool, is_first: bool) -> str:
    """A part of the queries in words; parts hold their upper bound, the first also its lower one."""
    if low is None or high is None:
        return "no history"
    if whole:
        start, end = math.ceil(low) if is_first else math.floor(low) + 1, math.floor(high)
        return f"{start}" if start == end else f"{start} to {end}"
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def gains(path: Path, found: Findings) -> None:
    """Gain of the chosen arm over its strictest control against history length and against recency, with intervals."""
    shown = {name: target for name, target in found["targets"].items() if target["chosen"]}
    figure, axes = new_axes(2, width=10, height=2.9 * len(shown) + 0.3, n_rows=len(shown))
    for pair, (name, target) in zip(zip(axes[::2], axes[1::2], strict=True), shown.items(), strict=True):
        pair[1].sharey(pair[0])
        control = target["arms"][target["chosen"]]["judged"]["control"]
        for each, key, label in (
            (pair[0], "by_history", "own events before the query"),
            (pair[1], "by_recency", "days since the last own event"),
        ):
            parts = target[key]
            for row, part in enumerate(parts):
                if None not in part["gain"]:
                    value, low, high = part["gain"]
                    each.plot([row, row], [low, high], color=CONTEXT, linewidth=1.8)
                    each.plot(row, value, "o", color=CONTEXT, markersize=6)
                else:
                    each.annotate("not defined", (row, 0), (0, 4), textcoords="offset points", ha="center", fontsize=7)
            each.axhline(0, color="black", linewidth=0.8)
            each.set_xticks(
                range(len(parts)),
                [
                    f"{_bounds(part['low'], part['high'], key == 'by_history', row == 0)}\n"
                    f"{part['n_queries']} queries\n{part['n_users']} users"
                    for row, part in enumerate(parts)
                ],
                fontsize=7.5,
            )
            each.set_xlim(-0.6, len(parts) - 0.4)
            each.set_xlabel(label)
            each.grid(axis="x", visible=False)
        pair[0].set_ylabel(f"gain, {WORDS[found['measure']]}", fontsize=8.5)
        more = f": {target['chosen']} beyond {control}"
        pair[0].set_title(_titled(name, target, 60, more), fontsize=9, loc="left")
    save(figure, path)


def _seen(values: torch.Tensor) -> Array:
    known = values.double().numpy()
    return known[np.isfinite(known)]


def attention(path: Path, seen: AttentionDiagnostics) -> None:
    """Histograms over queries: entropy of the weights, and the effective number of users beside the visible ones."""
    figure, (left, right) = new_axes(2, width=10, height=3.8)
    entropy, effective = _seen(seen.entropy), _seen(seen.effective_number)
    visible = seen.n_visible[seen.n_visible > 0].double().numpy()
    # A floor of width keeps the bins of weights that are all alike from being a hair.
    top = max(float(entropy.max(initial=0)), float(np.log(visible.max(initial=1))), 0.1) * 1.02
    left.hist(entropy, bins=np.linspace(0, top, 41).tolist(), color=CONTEXT, alpha=0.8)
    if len(visible):
        even = float(np.median(np.log(visible)))
        left.axvline(
            even, color="black", linestyle=":", linewidth=1.2, label="even weights (median of ln visible users)"
        )
        left.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
    left.set_xlabel(f"entropy of the weights of {words(seen.aggregator)}, nats")
    left.set_ylabel(f"of {len(seen.n_visible)} queries")
    edges = np.geomspace(1, max(float(visible.max(initial=1)), float(effective.max(initial=1)), 2) * 1.05, 41).tolist()
    right.hist(np.clip(effective, edges[0], edges[-1]), bins=edges, color=CONTEXT, alpha=0.8, label="effective")
    right.hist(visible, bins=edges, histtype="step", color="black", linewidth=1.2, label="visible")
    right.set_xscale("log")
    right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    right.xaxis.set_minor_locator(NullLocator())
    right.set_xlabel("users (log axis); effective: 1 / sum of squared weights", fontsize=9)
    right.set_ylabel("queries")
    right.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    for each in (left, right):
        each.yaxis.set_major_locator(MaxNLocator(integer=True))
        each.grid(axis="x", visible=False)
    save(figure, path)


def _short(names: list[str], most: int = 14) -> list[str]:
    """Names of at most ``most`` letters; long ones lose what all begin with, so that they can be told apart."""
    is_long = len(set(names)) > 1 and max(map(len, names)) > most
    # Names of several lengths are compared up to the end of the shortest.
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    start = sum(1 for _ in alike) if is_long else 0
    cores = ["\u2026" * (start > 0) + name[start:] for name in names]
    return [core if len(core) <= most else f"{core[: most - 1]}\u2026" for core in cores]


def _frequent(labels: NDArray[np.int64], most: int) -> list[int]:
    """The most frequent values, in ascending order."""
    values, counts = np.unique(labels, return_counts=True)
    return sorted(values[np.argsort(-counts, kind="stable")[:most]].tolist())


def top_influencers(seen: AttentionDiagnostics, most: int) -> tuple[NDArray[np.int64], Array]:
    """At most ``most`` users of largest summed share, and what each query gives them ``(Q, n)``.

    Known are only the shares of the k most influential users of a query: a user that is none of them counts as 0.
    """
    sources, shares = seen.top_users.numpy(), seen.top_weights.double().numpy()
    known = sources >= 0
    totals = np.bincount(sources[known], weights=shares[known])
    chosen = np.argsort(-totals, kind="stable")[:most]
    chosen = chosen[totals[chosen] > 0]
    return chosen, np.stack([np.where(sources == user, shares, 0).sum(1) for user in chosen], 1)


def influence(path: Path, study: ContextStudy) -> None:
    """Mean share that the most influential users have in contexts: by label of the query, and by querying user."""
    seen, target = study.attention, study.targets[0]
    assert seen is not None  # the report draws it only then
    columns, given = top_influencers(seen, MOST_NAMED)
    labels, users = target.labels.numpy(), target.users.numpy()
    # Where everybody was asked once, those who see the named ones: others would be rows of zeros.
    everybody, place, counts = np.unique(users, return_inverse=True, return_counts=True)
    met = np.bincount(place, given.sum(1)) / counts
    asked = everybody[np.lexsort((everybody, -met, -counts))[:MOST_NAMED]]
    ids = [str(study.user_ids[user]) if user < len(study.user_ids) else f"row {user}" for user in [*asked, *columns]]
    names = _short(ids)
    groups = {
        f"by label of {target.name} ({target.description})": [
            (f"{label}  ({(labels == label).sum()} queries)", given[labels == label].mean(0))
            for label in _frequent(labels, MOST_CLASSES)
        ],
        "by user asked about (those of most queries, then of most weight)": [
            (f"{name}  ({(users == user).sum()})", given[users == user].mean(0))
            for name, user in zip(names, asked, strict=False)
        ],
    }
    n_rows = [len(group) for group in groups.values()]
    figure, axes = new_axes(width=9.5, height=0.28 * sum(n_rows) + 2.6, n_rows=2)
    grid = axes[0].get_gridspec()
    assert grid is not None  # both plots were made in one
    grid.set_height_ratios(n_rows)
    # One scale for both, so that a colour means the same share above and below.
    top = max(float(row.max()) for group in groups.values() for _, row in group)
    for each, (title, group) in zip(axes, groups.items(), strict=True):
        cells = np.stack([row for _, row in group])
        each.imshow(cells, aspect="auto", cmap="cividis", vmin=0, vmax=top)
        for row, column in np.ndindex(*cells.shape):
            share = cells[row, column]
            colour = "black" if share > 0.6 * top else "white"
            text = f"{100 * share:.2g}" if share < 0.0995 else f"{100 * share:.0f}"
            each.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
        each.set_yticks(range(len(group)), [text for text, _ in group], fontsize=8)
        each.set_title(textwrap.fill(title, 110), fontsize=9, loc="left")
        each.spines[:].set_visible(False)
        each.grid(visible=False)
    axes[0].set_xticks([])
    axes[1].set_xticks(
        range(len(columns)), names[len(asked) :], fontsize=8, rotation=45, ha="right", rotation_mode="anchor"
    )
    axes[1].set_xlabel(
        f"percent of the weights of {words(seen.aggregator)} on {len(columns)} users of most weight, together "
        f"{100 * given.sum(1).mean():.3g} % of all\n(a user counts where among the {seen.top_users.shape[1]} most "
        "influential of a query)",
        fontsize=8.5,
    )
    save(figure, path)


def ages(path: Path, seen: AttentionDiagnostics) -> None:
    """Histograms, log axis: how old the most influential states are, and the mean age under all weights by query."""
    shares = seen.top_weights.double().numpy().ravel()
    used = shares > 0
    second = _SPANS["1 s"]  # ties of the inclusive mode have age 0, for which a log axis has no place
    top = np.maximum(seen.top_ages.double().numpy().ravel()[used], second)
    mean = np.maximum(_seen(seen.mean_age), second)
    both = np.concatenate([top, mean])
    edges = np.geomspace(both.min() / 1.1, both.max() * 1.1, 41).tolist()
    figure, (axes,) = new_axes(width=8, height=3.8)
    label = f"the {seen.top_users.shape[1]} most influential states of each query, by their weight"
    axes.hist(top, bins=edges, weights=shares[used] / shares[used].sum(), color=CONTEXT, alpha=0.75, label=label)
    even = np.full(len(mean), 1 / max(1, len(mean)))
    label = "mean under all weights, by query"
    axes.hist(mean, bins=edges, weights=even, histtype="step", color="black", linewidth=1.3, label=label)
    axes.set_xscale("log")
    ticks = {text: days for text, days in _SPANS.items() if edges[0] <= days <= edges[-1]}
    if len(ticks) >= 2:
        axes.xaxis.set_major_locator(FixedLocator(list(ticks.values())))
        axes.set_xticklabels(list(ticks))
        axes.set_xlabel("age of a state: time since the event behind it (log axis)")
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
        axes.set_xlabel("age of a state in days: time since the event behind it (log axis)")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.set_ylabel("share of the weight, or of the queries")
    axes.set_title(f"aggregator: {words(seen.aggregator)}", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2)
    save(figure, path)


def principal_plane(rows: Array) -> tuple[Array, Array]:
    """``(n, k)`` to coordinates ``(n, 2)`` on the two axes of most variance, and the share of variance of both.

    Signs are such that the largest loading of an axis is positive; missing axes are 0.
    """
    centred = rows - rows.mean(0)
    left, sizes, loadings = np.linalg.svd(centred, full_matrices=False)
    kept = min(2, len(sizes))
    largest = np.abs(loadings[:kept]).argmax(1)
    signs = np.where(loadings[np.arange(kept), largest] < 0, -1.0, 1.0)
    plane, share = np.zeros((len(rows), 2)), np.zeros(2)
    plane[:, :kept] = left[:, :kept] * sizes[:kept] * signs
    total = (sizes**2).sum()
    share[:kept] = sizes[:kept] ** 2 / total if total > 0 else 0
    return plane, share


def embedding_map(path: Path, sample: EmbeddingSample) -> None:
    """First two principal components of own states and of own states beside context, coloured by label."""
    name, found = next(iter(sample.labels.items()), ("", torch.full((len(sample.users),), -1)))
    labels = found.numpy()
    classes = _frequent(labels[labels >= 0], MOST_CLASSES)
    own = sample.own.double().numpy()
    enriched = np.concatenate([own, sample.context.double().numpy()], 1)
    titles = ("own state", f"own state beside context of {words(sample.aggregator)}")
    figure, axes = new_axes(2, width=10, height=4.6)
    # Drawn in one random order: class after class, the last would hide the others.
    order = np.random.default_rng(0).permutation(len(labels))
    colours = np.array([COLOURS[classes.index(label)] if label in classes else REST for label in labels.tolist()])
    for each, rows, title in zip(axes, (own, enriched), titles, strict=True):
        plane, share = principal_plane(rows)
        each.scatter(
            plane[order, 0], plane[order, 1], c=colours[order], s=7 if len(order) > 500 else 18, alpha=0.6, linewidths=0
        )
        each.set_title(title, fontsize=10)
        each.set_xlabel(f"first component, {share[0]:.0%} of the variance")
        each.set_ylabel(f"second, {share[1]:.0%}")
    legend = [axes[0].scatter([], [], s=25, color=COLOURS[place]) for place in range(len(classes))]
    texts = [f"{label} ({(labels == label).sum()})" for label in classes]
    n_rest = int((~np.isin(labels, classes)).sum())
    if n_rest:
        legend.append(axes[0].scatter([], [], s=25, color=REST))
        texts.append(f"others or none ({n_rest})")
    figure.legend(
        legend,
        texts,
        loc="outside lower center",
        ncols=len(texts),
        frameon=False,
        fontsize=8,
        title=f"label of {name}" if name else None,
    )
    save(figure, path)
