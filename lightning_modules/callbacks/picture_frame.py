"""What pictures of reports share: figures without a screen, colours, and a file that appears whole or not at all."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_modules.run_folder import drafted

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
"""Colour-blind safe (Okabe & Ito); the model is always the first."""


def new_axes(n_columns: int = 1, width: float = 7.0, height: float = 4.0, n_rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of ``n_rows`` times ``n_columns`` plots, row by row; width and height in inches."""
    # No pyplot: its global state keeps figures alive and picks a backend that may need a screen.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(n_rows, n_columns, place + 1) for place in range(n_rows * n_columns)]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with drafted(path) as draft:
        figure.savefig(draft, dpi=130)


def words(name: str) -> str:
    """A name as one reads it."""
    return name.replace("_", " ")
