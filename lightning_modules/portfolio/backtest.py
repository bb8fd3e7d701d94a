"""Walk-forward backtest: decide with what was known before each rebalance, hold, pay for the trades.

Two steps. *Deciding* turns the past into target weights at every rebalance and never sees a later row. *Holding*
turns target weights into daily returns: it depends on costs and drift, not on how the weights were found, so that
other costs need no new decisions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_modules.portfolio.market import Array, Market


@dataclass(frozen=True)
class Decision:
    """What a strategy wants at a rebalance.

    Attributes:
        weights: ``(A,) float64`` over all stocks of the market, at least 0, sum 1.
        flags: What went other than asked for, such as ``"infeasible: minimum variance instead"``.
        labels: ``(A,) int64`` cluster of each stock, -1 for stocks in none; None without clusters.
    """

    weights: Array
    flags: tuple[str, ...] = ()
    labels: NDArray[np.int64] | None = None


Decide = Callable[[Market, int], Decision]
"""Called with the market strictly before the rebalance and the number of the rebalance, 0, 1, ..."""


@dataclass(frozen=True)
class Plan:
    """Decisions at every rebalance of one strategy.

    Attributes:
        name: Of the strategy.
        rows: ``(P,) int64`` first row of each period; the last period ends before ``stop``.
        stop: Row after the last day.
        targets: ``(P, A)`` target weights, before :func:`traded`.
        decisions: P of them.
    """

    name: str
    rows: NDArray[np.int64]
    stop: int
    targets: Array
    decisions: tuple[Decision, ...]


@dataclass(frozen=True)
class Track:
    """What a plan earned.

    Attributes:
        name: Of the strategy.
        dates: ``(n,) datetime64[D]`` days of the test, each once.
        returns: ``(n,)`` simple daily returns after costs.
        gross_returns: ``(n,)`` the same portfolio before costs.
        rebalance_dates: ``(P,) datetime64[D]``.
        targets: ``(P, A)`` weights after each rebalance: what was wanted, as far as it could be traded.
        drifted: ``(P, A)`` weights held just before each rebalance; zeros at the first.
        turnover: ``(P,)`` sum of |target - drifted|; the first, which builds the portfolio, is 1.
        cost_bps: Cost of trading one unit of wealth, in basis points.
        flags: ``{rebalance date: flags}`` where there are any.
        held: ``(A,)`` weights after the last day.
    """

    name: str
    dates: NDArray[np.datetime64]
    returns: Array
    gross_returns: Array
    rebalance_dates: NDArray[np.datetime64]
    targets: Array
    drifted: Array
    turnover: Array
    cost_bps: float
    flags: dict[str, tuple[str, ...]]
    held: Array


def make_plan(name: str, market: Market, decide: Decide, rows: NDArray[np.int64], stop: int) -> Plan:
    """Ask ``decide`` at every rebalance, giving it the days strictly before.

    Args:
        name: Of the strategy.
        market: All days; ``decide`` gets ``market.before(row)``.
        decide: The strategy.
        rows: ``(P,)`` increasing first rows of the periods, the first at least 1.
        stop: Row after the last day, more than the last of ``rows``.

    Raises:
        ValueError: If the rows are not as stated, or the strategy returns weights that are negative, not finite, do
            not sum to 1 within 1e-8, or are of a stock without a price on the day before.
    """
    if len(rows) == 0 or rows[0] < 1 or (np.diff(rows) <= 0).any() or not rows[-1] < stop <= len(market):
        raise ValueError(f"rebalance rows must increase from at least 1 to below {stop}, got {rows.tolist()}")
    decisions = []
    for number, row in enumerate(rows):
        past = market.before(int(row))
        decision = decide(past, number)
        weights = decision.weights
        whole = weights.shape == (market.n_stocks,) and np.isfinite(weights).all()
        if not whole or weights.min() < 0 or abs(weights.sum() - 1) > 1e-8:
            raise ValueError(
                f"{name}, {market.dates[row]}: weights must be {market.n_stocks} numbers of at least 0 that sum to 1, "
                f"got shape {weights.shape}, sum {weights.sum()!r}, least {weights.min(initial=0)!r}"
            )
        absent = np.flatnonzero((weights > 0) & ~past.tradable)
        if len(absent):
            raise ValueError(
                f"{name}, {market.dates[row]}: weight on {market.tickers[absent[0]]}, without a price the day before"
            )
        decisions.append(decision)
    return Plan(name, rows, stop, np.stack([decision.weights for decision in decisions]), tuple(decisions))


def traded(target: Array, held: Array, past: Market) -> tuple[Array, tuple[str, ...]]:
    """Weights after a rebalance: a stock without a price on the day before keeps its weight, the rest follows target.

    With F the stocks that are :attr:`~lightning_modules.portfolio.market.Market.stuck`, w_a = held_a for a in F and
    w_a = target_a (1 - sum_F held) / (1 - sum_F target) for the others. A price of days ago is one at which nobody can
    sell: whoever holds through a halt has the move of the day that ends it. What a delisting paid out is free.

    Args:
        target: ``(A,)`` weights wanted, sum 1.
        held: ``(A,)`` weights just before, sum 1; zeros at the first rebalance.
        past: The days before the rebalance.

    Returns:
        ``(A,)`` weights, and a flag if a weight held or wanted could not be traded. If nothing wanted can be bought,
        the weights held stay.

    Raises:
        ValueError: If nothing wanted can be bought and nothing is held.
    """
    stuck = past.stuck & ((held > 0) | (target > 0))
    if not stuck.any():
        return target, ()
    wanted = np.where(stuck, 0.0, target)
    if wanted.sum() == 0:
        if not held.any():
            raise ValueError(f"none of the stocks wanted has a price on {past.dates[-1]}")
        return held, ("frozen: none of the stocks wanted has a price the day before, nothing is traded",)
    weights = np.where(stuck, held, wanted / wanted.sum() * max(1 - held[stuck].sum(), 0.0))
    share = f"{held[stuck].sum():.1%}"
    return weights, (f"frozen: {stuck.sum()} stocks without a price the day before stay at {share} of wealth",)


def hold(plan: Plan, market: Market, *, cost_bps: float = 0.0, drift: bool = True) -> Track:
    """Daily returns of holding a plan.

    Within a period from row s on, wealth of a stock grows by its holder's return: with ``drift`` the share of stock a
    at day t is w_a prod(1 + r_a) / sum_b w_b prod(1 + r_b). Without it the target is restored at every close, free of
    charge, as in the published protocol: the return of a day is w'r. At each rebalance the weights become those of
    :func:`traded`, and ``cost_bps / 10,000 * sum |weights - drifted|`` of wealth is paid at the close before the
    period's first day, so it lowers that day's return: (1 - cost)(1 + r) - 1.

    Args:
        plan: Target weights.
        market: All days.
        cost_bps: Cost of a trade, in basis points of what is traded, at least 0.
        drift: Whether weights move with prices between rebalances.

    Raises:
        ValueError: If costs are negative, nothing that is wanted first has a price, or a portfolio loses everything,
            by prices or by costs.
    """
    if not (np.isfinite(cost_bps) and cost_bps >= 0):
        raise ValueError(f"cost_bps must be at least 0, got {cost_bps}")
    moves = market.holder_returns
    ends = np.append(plan.rows[1:], plan.stop)
    gross, net, drifted, turnover, targets = [], [], [], [], []
    flags: dict[str, tuple[str, ...]] = {}
    held = np.zeros(market.n_stocks)
    for row, end, wanted, decision in zip(plan.rows, ends, plan.targets, plan.decisions, strict=True):
        target, frozen = traded(wanted, held, market.before(int(row)))
        if decision.flags or frozen:
            flags[str(market.dates[row])] = decision.flags + frozen
        targets.append(target)
        drifted.append(held)
        turnover.append(float(np.abs(target - held).sum()))
        block = moves[row:end]
        if drift:
            wealth = target * np.cumprod(1 + block, axis=0)  # (days, A)
            growth = np.concatenate([[1.0], wealth.sum(1)])
        else:
            growth = np.concatenate([[1.0], np.cumprod(1 + block @ target)])
        paid = cost_bps / 1e4 * turnover[-1]
        if growth.min() <= 0 or paid >= 1:
            raise ValueError(f"{plan.name}: the portfolio lost everything in the period from {market.dates[row]}")
        earned = growth[1:] / growth[:-1] - 1 if drift else block @ target
        # Without drift: what the last day made of the target, before the next trade.
        held = wealth[-1] / growth[-1] if drift else target * (1 + block[-1]) / (1 + earned[-1])
        charged = earned.copy()
        charged[0] = (1 - paid) * (1 + earned[0]) - 1
        gross.append(earned)
        net.append(charged)
    return Track(
        name=plan.name,
        dates=market.dates[plan.rows[0] : plan.stop],
        returns=np.concatenate(net),
        gross_returns=np.concatenate(gross),
        rebalance_dates=market.dates[plan.rows],
        targets=np.stack(targets),
        drifted=np.stack(drifted),
        turnover=np.asarray(turnover),
        cost_bps=cost_bps,
        flags=flags,
        held=held,
    )
