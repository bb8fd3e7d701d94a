"""Topology finds cycles that volatility does not show, where the specification says that it can (section 13.8)."""

import numpy as np
import pytest
import torch

from datamodules.synthetic_market import planted_cycles
from lightning_modules.topology import TopologicalRepresentation

pytest.importorskip("gudhi", reason="the extra [tda]")
pytest.importorskip("sklearn", reason="the extra [tda]")
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.metrics import adjusted_rand_score
from sklearn.preprocessing import StandardScaler

from lightning_modules.topology.vectorisers import PersistenceStatistics

# The pair of statistics of degrees 0 and 1 with Ward was chosen on the markets of seeds 1000 .. 1004 (median ARI 1.00,
# least 0.90), among images, landscapes, Betti curves, entropies and statistics with KMeans or Ward.
SEEDS = range(10)


def test_statistics_separate_cycles_from_noise_and_volatility_does_not():
    topology, volatility_ward, volatility_kmeans = [], [], []
    for seed in SEEDS:
        market = planted_cycles(seed)
        returns = torch.from_numpy(market.returns[1:].T.copy())
        model = TopologicalRepresentation(
            vectoriser=PersistenceStatistics((0, 1)), backend="gudhi", cache_dir=None, progress=False
        )
        rows = StandardScaler().fit_transform(model.fit(returns)(returns).numpy())
        topology.append(adjusted_rand_score(market.groups, AgglomerativeClustering(2).fit_predict(rows)))
        volatility = StandardScaler().fit_transform(returns.std(1, keepdim=True).numpy())
        for scores, clusterer in (
            (volatility_ward, AgglomerativeClustering(2)),
            (volatility_kmeans, KMeans(2, n_init=10, random_state=42)),
        ):
            scores.append(adjusted_rand_score(market.groups, clusterer.fit_predict(volatility)))
    assert np.median(topology) > 0.8
    assert np.median(volatility_ward) < 0.1
    assert np.median(volatility_kmeans) < 0.1
