"""What a test of portfolios found, before it is summed up: every strategy's walk and the clusters behind the model's.

T days, A stocks, E of them eligible at the first rebalance, D width of the embedding, n test days.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lightning_modules.portfolio.backtest import Plan, Track, hold
from lightning_modules.portfolio.market import TRADING_DAYS, Array, Market

KINDS = ("model", "clusters", "allocation", "index")
"""Kinds of arms."""

VOLATILITY_ONLY = "volatility only"
"""What names of arms begin with that cluster by train volatility alone."""


@dataclass(frozen=True)
class Arm:
    """One strategy of a study, a row of its table.

    Attributes:
        name: Unique in the study, such as ``"model, ward"``, ``"sectors"``, ``"1/N"``, ``"index"``.
        kind: ``"model"``, ``"clusters"`` (the same rules on control clusters), ``"allocation"`` (no clusters) or
            ``"index"``.
        track: At the configured cost.
        plan: None for the index, which is not traded.
    """

    name: str
    kind: str
    track: Track
    plan: Plan | None


def ever_held(arms: Iterable[Arm]) -> NDArray[np.int64]:
    """Columns of the stocks that some arm held after some rebalance, ascending; at least one arm."""
    return np.flatnonzero(np.any([(arm.track.targets > 0).any(0) for arm in arms], axis=0))


@dataclass(frozen=True)
class Study:
    """All arms over one test period, under one set of rules.

    Attributes:
        mode: ``"published"``, ``"causal"`` or ``"causal_rolling"``.
        market: All days and stocks.
        train: First row of the train window and the row after its last.
        test: First row of the test period and the row after its last.
        arms: The model's first, the first of them in charge; then controls.
        random_arms: Clusters by lot under the same rules, one arm a seed; may be empty.
        columns: ``(E,) int64`` stocks eligible at the first rebalance.
        embedding: ``(E, D) float64``, columns standardised.
        labels: ``(E,) int64`` of the first model's clusters, 0, 1, ... by falling size, -1 in none.
        diagrams: ``{degree: (bars, 2) births and deaths}`` of each eligible stock; None without topology.
        scores: Clustering scores ``{clusterer: {score: value}}``.
        risk_free: Annual.
        cost_bps: Configured cost of a trade, in basis points of what is traded.
        costs_bps: Costs to show the sensitivity at.
        drift: Whether weights move with prices between rebalances.
        n_trials: Configurations actually tried, for the deflated Sharpe ratio.
        flags: Of the prices read and of whatever else went other than asked for.
        seed: Of every resampling in the report.
        permuted_arms: The first model's clusters with their stocks exchanged by lot, one arm a seed; may be empty.
    """

    mode: str
    market: Market
    train: tuple[int, int]
    test: tuple[int, int]
    arms: tuple[Arm, ...]
    random_arms: tuple[Arm, ...]
    columns: NDArray[np.int64]
    embedding: Array
    labels: NDArray[np.int64]
    diagrams: list[dict[int, Array]] | None
    scores: dict[str, dict[str, float]]
    risk_free: float
    cost_bps: float
    costs_bps: tuple[float, ...]
    drift: bool
    n_trials: int
    flags: tuple[str, ...]
    seed: int
    permuted_arms: tuple[Arm, ...] = ()

    def __post_init__(self) -> None:
        """Check what every reader relies on.

        Raises:
            ValueError: If the first arm is not the model's, a kind is unknown, names repeat, or tracks differ in their
                days.
        """
        if not self.arms or self.arms[0].kind != "model":
            raise ValueError(f"the first arm of a study must be the model's, got {[arm.kind for arm in self.arms][:1]}")
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError(f"names of arms must differ, got {names}")
        for arm in self.all_arms:
            if arm.kind not in KINDS:
                raise ValueError(f"kind of arm {arm.name!r} must be one of {', '.join(KINDS)}, got {arm.kind!r}")
            if not np.array_equal(arm.track.dates, self.dates):
                raise ValueError(f"all arms must be tested on the same days, {arm.name!r} is not on those of the first")

    @property
    def model(self) -> Arm:
        """The arm in charge."""
        return self.arms[0]

    @property
    def all_arms(self) -> tuple[Arm, ...]:
        """Those of the table, and those of clusters by lot."""
        return (*self.arms, *self.random_arms, *self.permuted_arms)

    @property
    def dates(self) -> NDArray[np.datetime64]:
        """``(n,)`` days of the test."""
        return self.model.track.dates

    @property
    def tickers(self) -> tuple[str, ...]:
        """E names."""
        return tuple(self.market.tickers[column] for column in self.columns)

    @property
    def sectors(self) -> NDArray[np.int64] | None:
        """``(E,)`` place in ``market.sector_names``, -1 where unknown; None where no sector is known."""
        sectors = self.market.sectors[self.columns]
        return sectors if self.market.sector_names and (sectors >= 0).any() else None

    @property
    def index_returns(self) -> Array | None:
        """``(n,)`` of the index on the days of the test; None without an index."""
        index = [arm for arm in self.arms if arm.kind == "index"]
        return index[0].track.returns if index else None

    @cached_property
    def train_volatility(self) -> Array:
        """``(E,)`` annual volatility in the train window, std of daily returns times sqrt(252)."""
        returns = self.market.rows(*self.train).stocks(self.columns).filled_returns()
        volatility: Array = returns.std(0, ddof=1) * np.sqrt(TRADING_DAYS)
        return volatility

    def labels_of(self, arm: Arm) -> NDArray[np.int64] | None:
        """``(E,)`` clusters an arm held at the first rebalance; None without clusters."""
        labels = None if arm.plan is None else arm.plan.decisions[0].labels
        return None if labels is None else labels[self.columns]

    def track_at(self, arm: Arm, cost_bps: float) -> Track:
        """What an arm would have earned at another cost of a trade; the index is not traded."""
        if arm.plan is None or cost_bps == arm.track.cost_bps:
            return arm.track
        return hold(arm.plan, self.market, cost_bps=cost_bps, drift=self.drift)
