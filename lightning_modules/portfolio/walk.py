"""Walks of many strategies through one test period, under one set of rules, side by side.

Modes. ``published``: stocks are selected with the returns of the whole frame, test included, weights are restored at
every close free of charge, and sessions on the 1st of a month are lost. ``causal``: stocks are represented, clustered
and selected once, in the train window. ``causal_rolling``: all that anew every few months, in a window of equal
length. In the last two, whatever holds on a day was known at the close before it.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lightning_modules.portfolio.backtest import Decide, Plan, Track, hold, make_plan
from lightning_modules.portfolio.clusterers import Clusterer, PermutedClusters, RandomClusters, SectorClusters
from lightning_modules.portfolio.market import Array, Market, month_starts
from lightning_modules.portfolio.selection import TopSharpe
from lightning_modules.portfolio.strategy import (
    AllocationStrategy,
    ClusterStrategy,
    Represent,
    Selection,
    eligible_stocks,
    without_first_of_month,
)
from lightning_modules.portfolio.study import VOLATILITY_ONLY, Arm
from lightning_modules.portfolio.weighting import (
    EqualWeight,
    HierarchicalRiskParity,
    InverseVolatility,
    MeanVariance,
    MinimumVariance,
    Weighting,
)

Mode = Literal["published", "causal", "causal_rolling"]

logger = logging.getLogger(__name__)


def with_risk_free(rule: Any, risk_free: float) -> Any:
    """A copy of a selection or weight rule, ``risk_free`` and ``annual_target`` filled in where they are None.

    Rules inside the rule likewise. What is no dataclass is given back as it is.
    """
    if not is_dataclass(rule) or isinstance(rule, type):
        return rule
    values = {each.name: getattr(rule, each.name) for each in fields(rule) if each.init}
    filled = {
        name: risk_free
        if value is None and name in ("risk_free", "annual_target")
        else with_risk_free(value, risk_free)
        for name, value in values.items()
    }
    return replace(rule, **filled)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What all arms of a study share.

    Attributes:
        mode: See the module.
        selection: Picks stocks of each cluster.
        weighting: Weights of the picks.
        weight_months: Calendar months of returns that weights are estimated on, at least 1; published 24.
        refit_months: Months between refits in mode ``causal_rolling``, at least 1.
        min_observed: Share of days of the train window with a return that makes a stock eligible, in (0, 1].
        cost_bps: Cost of a trade in basis points of what is traded, at least 0.

    Raises:
        ValueError: If one is out of range.
    """

    mode: Mode = "causal"
    selection: Selection = field(default_factory=TopSharpe)
    weighting: Weighting = field(default_factory=MeanVariance)
    weight_months: int = 24
    refit_months: int = 12
    min_observed: float = 0.95
    cost_bps: float = 10.0

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {self.mode!r}")
        for name, least in (("weight_months", 1), ("refit_months", 1), ("cost_bps", 0)):
            value = getattr(self, name)
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 < self.min_observed <= 1:
            raise ValueError(f"min_observed must be above 0 and at most 1, got {self.min_observed}")

    @property
    def drift(self) -> bool:
        """Whether weights move with prices within a month."""
        return self.mode != "published"


@dataclass(frozen=True)
class Frame:
    """A market with its train window and test period.

    Attributes:
        market: All days that the mode may see.
        train: First row of the train window, and the row after its last.
        test: The same of the test period.
    """

    market: Market
    train: tuple[int, int]
    test: tuple[int, int]

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any], mode: Mode, *, to_the_end: bool = False) -> "Frame":
        """Of a panel of the data module, which may end with the train window.

        Args:
            batch: The panel, with the row numbers ``train_start``, ``train_stop``, ``test_start``, ``test_stop``.
            mode: ``"published"`` loses the sessions on the 1st of a month.
            to_the_end: Whether the test goes on to the last day there is.
        """
        market = Market.from_batch(batch)
        ends = [batch[name] for name in ("train_start", "train_stop", "test_start", "test_stop")]
        if to_the_end:
            ends[3] = len(market)
        if mode == "published":
            kept = without_first_of_month(market)
            # A day past the last has no date.
            ends = [len(kept) if e >= len(market) else int(np.searchsorted(kept.dates, market.dates[e])) for e in ends]
            market = kept
        return cls(market, (ends[0], ends[1]), (ends[2], ends[3]))

    @property
    def rebalances(self) -> NDArray[np.int64]:
        """Rows of the first sessions of the months of the test."""
        return month_starts(self.market.dates, *self.test)

    @property
    def train_window(self) -> Market:
        """The days of the train window."""
        return self.market.rows(*self.train)

    def first_stocks(self, rules: Rules) -> Market:
        """The train window of the stocks that are eligible at its end."""
        return self.train_window.stocks(self.first_columns(rules))

    def first_columns(self, rules: Rules) -> NDArray[np.int64]:
        """Columns of the stocks that are eligible at the end of the train window."""
        n_train_days = self.train[1] - self.train[0]
        known = self.market.rows(0, self.train[1])
        return eligible_stocks(known, n_train_days, rules.weight_months, rules.min_observed)

    def index_track(self) -> Track:
        """The index bought at the start of the test and held, free of charge.

        Raises:
            ValueError: If there is no index.
        """
        if self.market.index_returns is None:
            raise ValueError("this market has no index")
        start, stop = self.test
        returns = self.market.index_returns[start - 1 : stop - 1]
        rows = self.rebalances
        nothing = np.zeros((len(rows), self.market.n_stocks))
        dates = self.market.dates
        return Track(
            name="index (price only)" if self.market.index_is_price else "index",
            dates=dates[start:stop],
            returns=returns,
            gross_returns=returns,
            rebalance_dates=dates[rows],
            targets=nothing,
            drifted=nothing,
            turnover=np.zeros(len(rows)),
            cost_bps=0.0,
            flags={},
            held=nothing[0],
        )


def cluster_strategy(frame: Frame, rules: Rules, represent: Represent, clusterer: Clusterer) -> ClusterStrategy:
    """The strategy of a representation and a clusterer under the rules."""
    return ClusterStrategy(
        represent=represent,
        clusterer=clusterer,
        selection=rules.selection,
        weighting=rules.weighting,
        n_train_days=frame.train[1] - frame.train[0],
        weight_months=rules.weight_months,
        refit_every=rules.refit_months if rules.mode == "causal_rolling" else None,
        min_observed=rules.min_observed,
        hindsight=frame.market.rows(frame.train[0], frame.test[1]) if rules.mode == "published" else None,
        purge_days=frame.test[0] - frame.train[1],
    )


def walk(name: str, kind: str, frame: Frame, rules: Rules, decide: Decide) -> Arm:
    """Take one strategy through the test period."""
    plan: Plan = make_plan(name, frame.market, decide, frame.rebalances, frame.test[1])
    track = hold(plan, frame.market, cost_bps=rules.cost_bps, drift=rules.drift)
    if kind == "model":
        heads = Counter(flag.split(":")[0] for flags in track.flags.values() for flag in flags)
        for head, times in heads.items():
            logger.warning("%s: %s at %d of %d rebalances, see the report", name, head, times, len(plan.rows))
    return Arm(name, kind, track, plan)


def names_of(clusterers: Sequence[Clusterer]) -> dict[str, Clusterer]:
    """Names that differ: where two clusterers share one, it is followed by the number of clusters, or a number."""
    shared = Counter(clusterer.name for clusterer in clusterers)
    named: dict[str, Clusterer] = {}
    for number, clusterer in enumerate(clusterers, start=1):
        name = clusterer.name
        if shared[name] > 1:
            name = f"{name} {getattr(clusterer, 'n_clusters', number)}"
        named[name if name not in named else f"{name} ({number})"] = clusterer
    return named


def no_representation(stocks: Market) -> Array:
    """For clusterers that do not read the embedding."""
    return np.zeros((stocks.n_stocks, 1))


def volatility_only(stocks: Market) -> Array:
    """Standard deviation of daily returns, ``(E, 1)``."""
    return stocks.filled_returns().std(0, ddof=1)[:, None]


def _cluster_arm(name: str, frame: Frame, rules: Rules, represent: Represent, clusterer: Clusterer) -> Arm:
    """A control that has clusters of its own under the model's rules."""
    return walk(name, "clusters", frame, rules, cluster_strategy(frame, rules, represent, clusterer))


def control_arms(frame: Frame, rules: Rules, clusterers: Sequence[Clusterer]) -> list[Arm]:
    """What the model is compared with: clusters by volatility alone and by sectors, weights without clusters, index."""
    arms = []
    for name, clusterer in names_of([clusterer for clusterer in clusterers if clusterer.reads_embedding]).items():
        arms.append(_cluster_arm(f"{VOLATILITY_ONLY}, {name}", frame, rules, volatility_only, clusterer))
    if (frame.market.sectors[frame.first_columns(rules)] >= 0).any():
        arms.append(_cluster_arm("sectors", frame, rules, no_representation, SectorClusters()))
    n_train_days = frame.train[1] - frame.train[0]
    allocations: dict[str, Weighting] = {
        "1/N": EqualWeight(),
        "inverse volatility": InverseVolatility(),
        "minimum variance": MinimumVariance(),
        "HRP": HierarchicalRiskParity(),
    }
    for name, weighting in allocations.items():
        allocation = AllocationStrategy(weighting, n_train_days, rules.weight_months, rules.min_observed)
        arms.append(walk(name, "allocation", frame, rules, allocation))
    if frame.market.index_prices is not None:
        track = frame.index_track()
        arms.append(Arm(track.name, "index", track, None))
    return arms


def permuted_arms(frame: Frame, rules: Rules, plan: Plan, seeds: Iterable[int]) -> list[Arm]:
    """The clusters of a plan, stocks exchanged by lot at each refit, under the same rules; one arm a seed."""
    labels = [np.empty(0, np.int64) if each.labels is None else each.labels for each in plan.decisions]
    return [
        _cluster_arm(
            f"permuted clusters {seed}", frame, rules, no_representation, PermutedClusters(labels=labels, seed=seed)
        )
        for seed in seeds
    ]


def random_arms(frame: Frame, rules: Rules, n_clusters: int, seeds: Iterable[int]) -> list[Arm]:
    """Clusters of about equal sizes by lot under the same rules, one arm a seed."""
    return [
        _cluster_arm(
            f"random clusters {seed}", frame, rules, no_representation, RandomClusters(n_clusters=n_clusters, seed=seed)
        )
        for seed in seeds
    ]
