"""The ranking report: which baselines it fits, and pictures of intervals of every kind."""

from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.image import imread

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
