"""In a market where nobody can choose, the causal protocol earns nothing by choosing, and the published one does.

450 one-factor stocks without alpha, two years to cluster and three to hold, random clusters: acceptance check 4 of
the specification.
"""

import numpy as np
import pytest
from scipy import stats

from datamodules.synthetic_market import null_market
from lightning_modules.portfolio.clusterers import RandomClusters
from lightning_modules.portfolio.market import Market
from lightning_modules.portfolio.metrics import sharpe
from lightning_modules.portfolio.selection import RandomPick, TopSharpe
from lightning_modules.portfolio.walk import Frame, Rules, cluster_strategy, no_representation, walk
from lightning_modules.portfolio.weighting import EqualWeight, MeanVariance

N_MARKETS, N_TRAIN = 24, 504


def sharpes(weighting) -> dict[str, np.ndarray]:
    """Annual Sharpe ratios of the test by protocol, one a market; all share clusters and weight rule."""
    found: dict[str, list[float]] = {"causal": [], "published": [], "random": []}
    for seed in range(N_MARKETS):
        frame = Frame(Market.from_batch(null_market(seed).fields()), (0, N_TRAIN), (N_TRAIN, 1260))
        for name, mode, selection in (
            ("causal", "causal", TopSharpe()),
            ("published", "published", TopSharpe()),
            ("random", "causal", RandomPick(seed=seed)),
        ):
            rules = Rules(mode=mode, selection=selection, weighting=weighting, cost_bps=0)
            strategy = cluster_strategy(frame, rules, no_representation, RandomClusters(seed=seed))
            track = walk(name, "clusters", frame, rules, strategy).track
            found[name].append(sharpe(track.returns, risk_free=0.03))
    return {name: np.asarray(values) for name, values in found.items()}


@pytest.mark.parametrize("weighting", [EqualWeight(), MeanVariance()], ids=["equal", "mean-variance"])
def test_only_hindsight_earns_anything(weighting):
    by_protocol = sharpes(weighting)
    gain = by_protocol["causal"] - by_protocol["random"]
    low, high = stats.t.interval(0.95, N_MARKETS - 1, gain.mean(), stats.sem(gain))
    assert low < 0 < high, f"causal minus random picks: {gain.mean():.2f} [{low:.2f}, {high:.2f}]"
    hindsight = by_protocol["published"] - by_protocol["random"]
    assert hindsight.mean() > 0.8, f"published minus random picks: {hindsight.mean():.2f}"
