"""The ranking report: which baselines it fits, and pictures of intervals of every kind."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.image import imread
from matplotlib.transforms import Bbox

from lightning_modules.callbacks import RankingReport, report_pictures


@pytest.mark.parametrize("target", ["next_item", "next_basket"])
def test_baselines_read_what_the_model_reads(target):
    """Two items of one timestamp: 1 follows 0 only where histories are read item by item."""
    histories = SimpleNamespace(
        items=np.array([0, 1, 2, 2], np.int32), baskets=np.array([0, 0, 0, 0], np.int32), offsets=np.array([0, 2, 4])
    )
    data = SimpleNamespace(train_histories=lambda: histories, n_items=3, recommend_seen=True, target=target)
    report = RankingReport(cutoff=1)
    report.on_test_start(SimpleNamespace(datamodule=data), SimpleNamespace(cutoffs=[1]))
    markov = report._baselines["last_basket_markov"]
    assert markov.recommend([0], [0], [0, 1], 1, False).tolist() == [[1 if target == "next_item" else 2]]


@pytest.mark.parametrize("place", [0.2, 0.5, 0.9])
def test_intervals_that_miss_the_mean_are_drawn(tmp_path, place):
    """As those of few resamples, or of a small level, may."""
    found = {"ndcg@10": (place, 0.4, 0.6)}
    result = {"interval": {"model": found, "most_popular": found}, "paired_difference": {"most_popular": found}}
    report_pictures.comparison(tmp_path / "comparison.png", result | {"n_users": 50}, "ndcg@10")
    assert (imread(tmp_path / "comparison.png")[..., :3] < 0.99).any(-1).mean() > 0.01  # more than axes alone


@pytest.fixture
def drawn(monkeypatch):
    """The figures instead of their files, laid out as they would be written."""
    figures = []

    def keep(figure, path):
        figure.draw_without_rendering()
        figures.append(figure)

    monkeypatch.setattr(report_pictures, "save", keep)
    return figures


def visible_ticks(axes):
    low, high = axes.get_xlim()
    ticks = [*axes.xaxis.get_major_ticks(), *axes.xaxis.get_minor_ticks()]
    shown = [tick.label1 for tick in ticks if low <= tick.get_loc() <= high]
    return [label for label in shown if label.get_text()]


@pytest.mark.parametrize("longest", [13, 26, 400, 5000])
def test_lengths_of_histories_are_plain_numbers(drawn, longest):
    lengths = np.linspace(9, longest, 96).astype(int)
    report_pictures.by_history_length(None, lengths, {"model": np.linspace(0, 1, 96)}, "ndcg@10")
    ticks = [label.get_text() for label in visible_ticks(drawn[0].axes[0])]
    assert len(ticks) >= 2
    for tick in ticks:
        float(tick)  # of 1.2 x 10^1 it would raise


@pytest.mark.parametrize(("low", "high"), [(-0.061, 0.092), (-0.0061, 0.0092), (0.15, 0.27)])
def test_ticks_of_differences_do_not_touch(drawn, low, high):
    found = {"ndcg@10": (0.4, 0.3, 0.5)}
    names = ("model", "most_popular", "personal_frequency")
    gaps = {name: {"ndcg@10": (low, low, high)} for name in names[1:]}
    result = {"interval": dict.fromkeys(names, found), "paired_difference": gaps, "n_users": 50}
    report_pictures.comparison(None, result, "ndcg@10")
    boxes = [label.get_window_extent() for label in visible_ticks(drawn[0].axes[1])]
    assert len(boxes) >= 3
    # Half the height of a digit is the least gap that tells two numbers from one.
    apart = [Bbox.from_extents(box.x0, box.y0, box.x1 + box.height / 2, box.y1) for box in boxes]
    assert not any(one.overlaps(other) for one, other in pairwise(apart))
