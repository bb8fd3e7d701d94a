"""Strategies: from the past alone to target weights. They are what :func:`make_plan` calls at every rebalance.

A stocks of the market, E of them eligible on the day of a refit, k picked.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lightning_modules.portfolio.backtest import Decision
from lightning_modules.portfolio.clusterers import Clusterer, Labels, Stocks, standardised
from lightning_modules.portfolio.market import Array, Market
from lightning_modules.portfolio.weighting import Weighting

Represent = Callable[[Market], Array]
"""From a window of eligible stocks to one row ``(E, D)`` a stock."""


class Selection(Protocol):
    """Picks a few stocks of each cluster."""

    def __call__(self, labels: Labels, returns: Array, embedding: Array | None) -> NDArray[np.int64]:
        """Columns picked, ascending, from labels ``(E,)``, returns ``(T, E)`` and the embedding ``(E, D)``."""


def last_months(market: Market, n_months: int) -> Market:
    """The rows of the last ``n_months`` calendar months, that of the last row included."""
    months = market.dates.astype("datetime64[M]")
    first = int(np.searchsorted(months, months[-1] - (n_months - 1)))
    # One row more: the return of the first day of the first month starts from the close before it.
    return market.rows(first - 1, len(market))


def without_first_of_month(market: Market) -> Market:
    """The market without the sessions on the 1st of a month, as the published comparison of dates loses them.

    Returns of the days that stay are unchanged: prices, of stocks and index, are chained anew from them.
    """
    first = (market.dates - market.dates.astype("datetime64[M]")).astype(np.int64) == 0
    first[0] = False
    returns = market.returns[~first]
    moves = np.nan_to_num(market.holder_returns, nan=0.0)[~first]
    observed = ~np.isnan(market.prices)
    start = np.where(observed[0], market.prices[0], np.where(observed.any(0), 1.0, np.nan))
    prices = np.where(observed[~first], start * np.cumprod(1 + moves, axis=0), np.nan)
    index = market.index_prices
    if index is not None:
        index_moves = np.concatenate([[0.0], index[1:] / index[:-1] - 1])
        index = index[0] * np.cumprod(1 + index_moves[~first])
    paid = market.last_price_row + 1
    lost = (paid < len(market)) & first[np.minimum(paid, len(market) - 1)]
    return replace(
        market,
        dates=market.dates[~first],
        prices=prices,
        returns=returns,
        member=market.member[~first],
        index_prices=index,
        delisting_returns=np.where(lost, np.nan, market.delisting_returns),
    )


def eligible_stocks(past: Market, n_train_days: int, weight_months: int, min_observed: float) -> NDArray[np.int64]:
    """Columns with enough returns both in the train window and in the months that weights are estimated on."""
    trained_on, weighed_on = past.before(len(past), n_train_days), last_months(past, weight_months)
    return np.intersect1d(trained_on.eligible(min_observed), weighed_on.eligible(min_observed))


@dataclass(frozen=True)
class Groups:
    """Outcome of a refit.

    Attributes:
        columns: ``(E,)`` eligible stocks.
        embedding: ``(E, D)`` standardised.
        labels: ``(E,)``.
        picks: ``(k,)`` columns of the market.
    """

    columns: NDArray[np.int64]
    embedding: Array
    labels: Labels
    picks: NDArray[np.int64]

    def labels_of_all(self, n_stocks: int) -> Labels:
        """``(A,)``, -1 for stocks that were not eligible or are in no cluster."""
        labels = np.full(n_stocks, -1)
        labels[self.columns] = self.labels
        return labels


@dataclass
class ClusterStrategy:
    """Represent, cluster, pick a few of each cluster, weigh; published once a frame, or anew every few rebalances.

    Attributes:
        represent: Rows of a window of eligible stocks.
        clusterer: Labels of the rows.
        selection: Picks of each cluster.
        weighting: Weights of the picks, from the last ``weight_months`` months.
        n_train_days: Sessions of the window that is represented and selected by.
        weight_months: Calendar months of returns that weights are estimated on; published 24.
        refit_every: Rebalances between refits; None to refit at the first alone.
        min_observed: Share of days with a return that makes a stock eligible.
        hindsight: Days that stocks are selected with instead of the window: the look-ahead of the published protocol.
            None (causal) selects by the window.
        purge_days: Sessions left out between the window and the day of each refit.
    """

    represent: Represent
    clusterer: Clusterer
    selection: Selection
    weighting: Weighting
    n_train_days: int
    weight_months: int = 24
    refit_every: int | None = None
    min_observed: float = 0.95
    hindsight: Market | None = None
    purge_days: int = 0
    groups: Groups | None = field(default=None, init=False)

    def refit(self, past: Market, number: int) -> Groups:
        """Represent and cluster the stocks eligible after the last row of ``past``, and pick.

        Raises:
            ValueError: If no stock is eligible, or there are fewer than clusters.
        """
        known = past.before(len(past) - self.purge_days)
        window = known.before(len(known), self.n_train_days)
        columns = eligible_stocks(known, self.n_train_days, self.weight_months, self.min_observed)
        if len(columns) == 0:
            raise ValueError(
                f"no stock is eligible on {known.dates[-1]}: none is a member with a price that day and returns on "
                f"{self.min_observed:.0%} of the {len(window)} days before and of the last {self.weight_months} months"
            )
        stocks = window.stocks(columns)
        embedding = standardised(self.represent(stocks))
        returns = stocks.filled_returns()
        labels = self.clusterer(Stocks(embedding, returns, stocks.sectors, number))
        seen = returns if self.hindsight is None else self.hindsight.stocks(columns).filled_returns()
        picks = columns[self.selection(labels, seen, embedding)]
        self.groups = Groups(columns, embedding, labels, picks)
        return self.groups

    def __call__(self, past: Market, number: int) -> Decision:
        """Target weights after the last row of ``past``; refits when it is due."""
        due = number == 0 or (self.refit_every is not None and number % self.refit_every == 0)
        groups = self.refit(past, number) if due or self.groups is None else self.groups
        return self.weigh(past, groups)

    def weigh(self, past: Market, groups: Groups) -> Decision:
        """Target weights of the stocks picked at the last refit, after the last row of ``past``.

        Raises:
            ValueError: If none of them can be traded on that day.
        """
        # A stock picked earlier may have left the market since.
        picks = groups.picks[past.tradable[groups.picks]]
        if len(picks) == 0:
            raise ValueError(f"none of the {len(groups.picks)} picked stocks has a price on {past.dates[-1]}")
        missing = len(groups.picks) - len(picks)
        flags = (f"no price: {missing} of {len(groups.picks)} picked stocks",) if missing else ()
        labels = groups.labels_of_all(past.n_stocks)
        weights = self.weighting(last_months(past.stocks(picks), self.weight_months).filled_returns(), labels[picks])
        target = np.zeros(past.n_stocks)
        target[picks] = weights.weights
        return Decision(target, flags + weights.flags, labels)


@dataclass
class AllocationStrategy:
    """A weight rule over all eligible stocks, without clusters.

    Attributes:
        weighting: The rule.
        n_train_days: Sessions that eligibility is judged by.
        weight_months: Calendar months of returns that weights are estimated on.
        min_observed: Share of days with a return that makes a stock eligible.
    """

    weighting: Weighting
    n_train_days: int
    weight_months: int = 24
    min_observed: float = 0.95

    def __call__(self, past: Market, number: int) -> Decision:
        """Target weights after the last row of ``past``.

        Raises:
            ValueError: If no stock is eligible.
        """
        columns = eligible_stocks(past, self.n_train_days, self.weight_months, self.min_observed)
        if len(columns) == 0:
            raise ValueError(f"no stock is eligible on {past.dates[-1]}")
        returns = last_months(past.stocks(columns), self.weight_months).filled_returns()
        weights = self.weighting(returns, np.zeros(len(columns), dtype=np.int64))
        target = np.zeros(past.n_stocks)
        target[columns] = weights.weights
        return Decision(target, weights.flags)
