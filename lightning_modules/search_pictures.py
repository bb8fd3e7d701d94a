"""Pictures of a search: how the objective went, and which values went with a good one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from lightning_modules.callbacks.picture_frame import COLOURS, new_axes, save
from lightning_modules.sweep import Parameter, Sweep

_MARKERS = {"complete": ("o", COLOURS[0]), "ended early": ("x", COLOURS[5])}


def short_names(keys: Sequence[str]) -> list[str]:
    """The shortest ends of dotted keys that differ, without the ``init_args`` of YAML."""
    parts = [[word for word in key.split(".") if word != "init_args"] for key in keys]
    names = []
    for own in parts:
        length = next((n for n in range(1, len(own)) if sum(other[-n:] == own[-n:] for other in parts) == 1), len(own))
        names.append(".".join(own[-length:]))
    return names


def objective_by_trial(path: Path, rows: Sequence[dict[str, Any]], metric: str, *, maximises: bool) -> None:
    """Write the objective of each trial and the best so far.

    Args:
        path: PNG to write.
        rows: Trials with ``trial``, ``state`` and ``value`` (None where it failed).
        metric: Label of the objective.
        maximises: Whether more is better.
    """
    figure, (axes,) = new_axes(width=8)
    for state, (marker, colour) in _MARKERS.items():
        drawn = [row for row in rows if row["state"] == state and row["value"] is not None]
        axes.plot([row["trial"] for row in drawn], [row["value"] for row in drawn], marker, color=colour, label=state)
    complete = [row for row in rows if row["state"] == "complete"]
    best = (np.maximum if maximises else np.minimum).accumulate([row["value"] for row in complete])
    axes.step([row["trial"] for row in complete], best, where="post", color="black", linewidth=1, label="best so far")
    failed = sum(row["state"] == "failed" for row in rows)
    axes.set_title(f"{len(rows)} trials, {failed} failed", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("trial")
    axes.set_ylabel(f"{metric}, best epoch")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)


def parallel_coordinates(path: Path, rows: Sequence[dict[str, Any]], sweep: Sweep) -> None:
    """Write one line a trial through its values, coloured by the objective; good trials lie on top.

    Args:
        path: PNG to write.
        rows: Trials with ``value`` and ``values`` by key; those without a value are left out.
        sweep: Tells what the values were drawn from.
    """
    varied = [one for one in sweep.parameters if one.distribution != "constant"]
    drawn = sorted((row for row in rows if row["value"] is not None), key=lambda row: row["value"])
    if not sweep.maximises:
        drawn.reverse()
    objective = np.array([row["value"] for row in drawn])
    colours = ScalarMappable(Normalize(objective.min(), objective.max()), colormaps["viridis"])
    figure, (axes,) = new_axes(width=max(6.0, 1.7 * len(varied) + 2), height=4.5)
    places = np.arange(len(varied))
    for rank, row in enumerate(drawn):
        heights = [_height(one, row["values"][one.key]) for one in varied]
        is_best = rank == len(drawn) - 1
        colour = colours.to_rgba(row["value"])
        axes.plot(places, heights, color=colour, linewidth=3 if is_best else 1.2, marker="o", markersize=3)
    for place, one in zip(places, varied, strict=True):
        axes.axvline(place, color="black", linewidth=0.8)
        for height, label in _ticks(one):
            axes.annotate(label, (place, height), (4, 0), textcoords="offset points", fontsize=7, va="center")
    axes.set_xticks(places, [name.replace(".", ".\n") for name in short_names([one.key for one in varied])], fontsize=8)
    axes.set_yticks([])
    axes.set_xlim(-0.3, len(varied) - 0.3)
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    figure.colorbar(colours, ax=axes, label=f"{sweep.metric}, best epoch (thick: the best trial)")
    save(figure, path)


def _height(one: Parameter, value: Any) -> float:
    """Where a value lies between 0 and 1."""
    if one.values:
        return one.values.index(value) / max(1, len(one.values) - 1)
    low, high, here = one.low, one.high, float(value)
    if one.is_logarithmic:
        # A multiple of a step may round down to 0.
        low, high, here = np.log(low), np.log(high), np.log(max(here, low))
    return float((here - low) / (high - low))


def _ticks(one: Parameter) -> list[tuple[float, str]]:
    if one.values:
        return [(_height(one, value), str(value)) for value in one.values]
    middle = np.sqrt(one.low * one.high) if one.is_logarithmic else (one.low + one.high) / 2
    return [(_height(one, value), f"{value:.3g}") for value in (one.low, middle, one.high)]
