"""What is decided for a day does not change when everything after the day before is replaced, except where published.

The probe: prices, memberships, delistings and index from row t on become another market's (or vanish), and every
weight, label and return dated before t must be the same bit for bit.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from datamodules.synthetic_market import null_market, synthetic_market
from lightning_modules.networks import ConvAutoencoder, LSTMAutoencoder
from lightning_modules.portfolio.backtest import hold
from lightning_modules.portfolio.clusterers import (
    DTWKMeansClusters,
    KMeansClusters,
    KShapeClusters,
    RandomClusters,
    SectorClusters,
    SpectralClusters,
    WardClusters,
)
from lightning_modules.portfolio.market import Market
from lightning_modules.portfolio.representations import (
    CorrelationMDS,
    FinancialFeatures,
    PrincipalComponents,
    RandomVectors,
    RawReturns,
    VolatilityOnly,
)
from lightning_modules.portfolio.selection import MaxMean, Medoid, MinVolatility, RandomPick, TopSharpe
from lightning_modules.portfolio.strategy import AllocationStrategy
from lightning_modules.portfolio.walk import Frame, Rules, cluster_strategy, walk
from lightning_modules.portfolio.weighting import (
    EqualWeight,
    HierarchicalRiskParity,
    InverseVolatility,
    MeanVariance,
    MinimumVariance,
    NestedClusters,
    PublishedMeanVariance,
)
from lightning_modules.topology import TopologicalRepresentation
from lightning_modules.topology.vectorisers import (
    BettiCurve,
    Landscape,
    PersistenceEntropy,
    PersistenceImage,
    PersistenceStatistics,
    Silhouette,
)

N_TRAIN, N_DAYS = 120, 260


@cache
def market() -> Market:
    drawn = synthetic_market(36, N_DAYS, listed_late=0.1, delisted=0.2, part_time_members=0.1, seed=4)
    return Market.from_batch(drawn.fields())


@cache
def another() -> Market:
    """What replaces the future: other stocks of the same names, listed to the end."""
    return Market.from_batch(synthetic_market(36, N_DAYS, market_premium=-0.5, seed=5).fields())


def without_future(whole: Market, row: int, *, how: str) -> Market:
    """The same up to ``row``, then something else."""
    assert whole.index_prices is not None
    assert another().index_prices is not None
    rows = slice(row, None)
    prices, returns = whole.prices.copy(), whole.returns.copy()
    member, index = whole.member.copy(), whole.index_prices.copy()
    if how == "noise":
        prices[rows], member[rows] = another().prices[rows], another().member[rows]
        returns[rows] = another().returns[rows]
    else:
        prices[rows] = returns[rows] = np.nan
        member[rows] = False
    index[rows] = another().index_prices[rows]
    known = whole.before(row).delisting_returns
    prices[rows, ~np.isnan(known)] = returns[rows, ~np.isnan(known)] = np.nan  # who is gone does not come back
    return replace(whole, prices=prices, returns=returns, member=member, index_prices=index, delisting_returns=known)


def represented(network: torch.nn.Module):
    network.eval()

    @torch.no_grad()
    def represent(stocks: Market) -> np.ndarray:
        returns = torch.from_numpy(np.ascontiguousarray(stocks.filled_returns().T))
        if callable(getattr(network, "fit", None)):
            network.fit(returns)
        given = (returns, torch.from_numpy(stocks.index_returns)) if hasattr(network, "uses_index") else (returns,)
        return network(*given).double().numpy()

    return represent


def topological(vectoriser, **settings) -> TopologicalRepresentation:
    settings = {"dimension": 3, "delay": 2, "stride": 2, "cache_dir": None, "progress": False} | settings
    return TopologicalRepresentation(vectoriser=vectoriser, backend="gudhi", **settings)


def seeded(make):
    torch.manual_seed(3)
    return make()


SEARCHED = {"dimension": None, "delay": None, "max_dimension": 4, "max_delay": 5}
REPRESENTATIONS = {
    "image": lambda: topological(PersistenceImage(degrees=(1,))),
    "image, grid of each stock": lambda: topological(PersistenceImage(degrees=(1,), grid="per_stock"), scale="none"),
    "landscape": lambda: topological(Landscape(degrees=(1,)), scale="mad"),
    "betti": lambda: topological(BettiCurve(degrees=(0, 1)), scale="vol_garch"),
    "silhouette": lambda: topological(Silhouette(degrees=(1,)), embedding="mult", **SEARCHED),
    "entropy": lambda: topological(PersistenceEntropy(degrees=(0, 1)), **SEARCHED),
    "statistics": lambda: topological(PersistenceStatistics()),
    "raw": RawReturns,
    "pca": lambda: PrincipalComponents(n_components=5),
    "mds": lambda: CorrelationMDS(n_components=5),
    "features": FinancialFeatures,
    "volatility": VolatilityOnly,
    "random": RandomVectors,
    "conv": lambda: seeded(lambda: ConvAutoencoder(window_length=40, code_size=5, channels=(4, 1))),
    "lstm": lambda: seeded(lambda: LSTMAutoencoder(window_length=40, code_size=5, hidden_size=6)),
}
CLUSTERERS = {
    "ward": lambda: WardClusters(n_clusters=4),
    "k-means": lambda: KMeansClusters(n_clusters=4),
    "spectral": lambda: SpectralClusters(n_clusters=4),
    "dtw": lambda: DTWKMeansClusters(n_clusters=3),
    "k-shape": lambda: KShapeClusters(n_clusters=3),
    "sectors": SectorClusters,
    "random": lambda: RandomClusters(n_clusters=4),
}
SELECTIONS = {
    "sharpe": TopSharpe,
    "volatility": MinVolatility,
    "mean": MaxMean,
    "medoid": Medoid,
    "random": lambda: RandomPick(seed=1),
}
WEIGHTINGS = {
    "mean-variance": MeanVariance,
    "published": PublishedMeanVariance,
    "minimum variance": MinimumVariance,
    "inverse volatility": InverseVolatility,
    "equal": EqualWeight,
    "hrp": HierarchicalRiskParity,
    "nested": lambda: NestedClusters(inner=MinimumVariance(max_weight=0.6), outer=InverseVolatility()),
}


def walked(whole: Market, stop: int, rules: Rules, represent, clusterer):
    frame = Frame(whole, (0, N_TRAIN), (N_TRAIN, stop))
    arm = walk("probe", "model", frame, rules, cluster_strategy(frame, rules, represent, clusterer))
    return arm.plan, arm.track


def assert_same_before(row: int, rules: Rules, make_represent, make_clusterer) -> None:
    """Walk the true market and the one with another future; all that is dated before ``row`` must agree."""
    plan, track = walked(market(), N_DAYS, rules, make_represent(), make_clusterer())
    n_decided = int((plan.rows <= row).sum())  # the weights of a period are decided before its first row
    assert 1 < n_decided < len(plan.rows), "the probe must cut between rebalances"
    for how in ("noise", "vanished"):
        changed = without_future(market(), row, how=how)
        # A rebalance at the row itself reads the day before: it belongs to the past.
        other, _ = walked(changed, int(plan.rows[n_decided - 1]) + 1, rules, make_represent(), make_clusterer())
        assert np.array_equal(plan.targets[:n_decided], other.targets)
        for mine, theirs in zip(plan.decisions, other.decisions, strict=False):
            assert mine.flags == theirs.flags
            assert np.array_equal(mine.labels, theirs.labels)
        if row > other.rows[-1]:
            held = hold(replace(other, stop=row), changed, cost_bps=rules.cost_bps, drift=rules.drift)
            assert np.array_equal(track.returns[: row - N_TRAIN], held.returns)


def rules_of(mode: str = "causal_rolling", **settings) -> Rules:
    return Rules(mode=mode, weight_months=4, refit_months=2, min_observed=0.9, **settings)


PROBE = 210  # neither the first session of a month nor the row of a delisting


@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_representations(name):
    assert_same_before(
        PROBE, rules_of(), lambda: represented(REPRESENTATIONS[name]()), lambda: WardClusters(n_clusters=4)
    )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "k-shape" else []) for name in CLUSTERERS]
)
def test_clusterers(name):
    if name in ("dtw", "k-shape"):
        pytest.importorskip("tslearn", reason="this clusterer is of tslearn: seqlit[timeseries]")
    assert_same_before(PROBE, rules_of(), lambda: represented(PrincipalComponents(n_components=3)), CLUSTERERS[name])


@pytest.mark.parametrize("name", SELECTIONS)
def test_selections(name):
    rules = rules_of(selection=SELECTIONS[name]())
    assert_same_before(PROBE, rules, lambda: represented(VolatilityOnly()), lambda: WardClusters(n_clusters=4))


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weightings(name):
    rules = rules_of(weighting=WEIGHTINGS[name]())
    assert_same_before(PROBE, rules, lambda: represented(VolatilityOnly()), lambda: WardClusters(n_clusters=4))


@pytest.mark.parametrize("row", range(N_TRAIN + 30, N_DAYS - 20, 9))
def test_every_day_alike(row):
    """First sessions of months, days of listings and of delistings among them."""
    assert_same_before(
        row, rules_of(), lambda: represented(PrincipalComponents(n_components=3)), lambda: WardClusters(n_clusters=4)
    )


@pytest.mark.parametrize("mode", ["causal", "causal_rolling"])
def test_modes(mode):
    assert_same_before(
        PROBE, rules_of(mode), lambda: represented(VolatilityOnly()), lambda: KMeansClusters(n_clusters=4)
    )


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_allocations_without_clusters(name):
    def plan(whole, stop):
        frame = Frame(whole, (0, N_TRAIN), (N_TRAIN, stop))
        return walk("probe", "allocation", frame, rules_of(), AllocationStrategy(WEIGHTINGS[name](), N_TRAIN, 4)).plan

    mine = plan(market(), N_DAYS)
    n_decided = int((mine.rows <= PROBE).sum())
    theirs = plan(without_future(market(), PROBE, how="noise"), int(mine.rows[n_decided - 1]) + 1)
    assert np.array_equal(mine.targets[:n_decided], theirs.targets)


@pytest.mark.parametrize("mode", ["published", "causal", "causal_rolling"])
def test_stocks_of_the_first_month_know_the_last_where_published_and_nowhere_else(mode):
    """The same probe on all three modes: it must find the look-ahead, and nothing where nothing changed."""
    rules = Rules(mode=mode, weight_months=4, weighting=EqualWeight())
    whole = Market.from_batch(null_market(3, n_stocks=60, n_days=N_DAYS).fields())
    noise = Market.from_batch(null_market(4, n_stocks=60, n_days=N_DAYS).fields())

    def first_month(later: Market) -> np.ndarray:
        """Weights of the first month where the returns from the probe's row on are those of ``later``."""
        prices, returns = whole.prices.copy(), whole.returns.copy()
        prices[PROBE:] = prices[PROBE - 1] * np.cumprod(1 + later.returns[PROBE:], axis=0)
        returns[PROBE:] = later.returns[PROBE:]
        frame = Frame(replace(whole, prices=prices, returns=returns), (0, N_TRAIN), (N_TRAIN, N_DAYS))
        strategy = cluster_strategy(frame, rules, represented(VolatilityOnly()), RandomClusters(n_clusters=4))
        return walk("probe", "model", frame, rules, strategy).plan.targets[0]

    assert np.array_equal(first_month(whole), first_month(whole))
    assert np.array_equal(first_month(whole), first_month(noise)) == (mode != "published")
