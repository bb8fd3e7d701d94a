"""From prices to returns: rules for gaps, and for errors of the source.

T days, A stocks. A value in row t of a result depends on rows up to t alone, except under the published rule for gaps,
which is here to reproduce tables.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from datamodules.sources.cells import Array
from datamodules.sources.prices import PriceTable

Gaps = Literal["causal", "published"]

_LONGEST_STEP = 2  # calendar days: of five sessions a week the median step is 1
MOST_MISSING = 0.05
"""Share of days that a stock may lack: under the published rule, and to be among the train windows."""


def last_rows(prices: Array) -> NDArray[np.int64]:
    """``(A,)`` row of the last price of each stock, -1 where there is none."""
    observed = ~np.isnan(prices)
    return np.where(observed.any(0), len(prices) - 1 - observed[::-1].argmax(0), -1)


def simple_returns(prices: Array) -> Array:
    """``(T, A)`` p_t / p_(t-1) - 1; NaN in the first row and where one of the two is missing."""
    returns = np.full_like(prices, np.nan)
    returns[1:] = prices[1:] / prices[:-1] - 1
    return returns


def causal_returns(prices: Array, max_fill_days: int) -> Array:
    """Returns of prices that are carried forward over gaps of at most ``max_fill_days`` rows; no day is deleted.

    While a price is carried the return is 0; the day that ends the gap has the whole move. How long a gap will be is
    not known while it lasts, so a longer one has returns of 0 on its first ``max_fill_days`` days, then none, and none
    on the day that ends it. Before its first price a stock has none.

    Args:
        prices: ``(T, A)``, NaN where there is none.
        max_fill_days: At least 0; 0 carries nothing.

    Returns:
        ``(T, A)``, NaN in the first row and where unknown.
    """
    row = np.arange(len(prices))[:, None]
    latest = np.maximum.accumulate(np.where(np.isnan(prices), -1, row), axis=0)
    carried = np.take_along_axis(prices, np.maximum(latest, 0), axis=0)
    carried[(latest < 0) | (row - latest > max_fill_days)] = np.nan
    return simple_returns(carried)


def published_selection(prices: Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The published rule: drop stocks that lack more than 5 % of the days, then days that any stock left lacks.

    It looks ahead: which days and stocks there are depends on all rows.

    Args:
        prices: ``(T, A)`` of the frame.

    Returns:
        Rows and columns that are kept.

    Raises:
        ValueError: If fewer than two days or no stock is kept.

    Source: spec section 2, row "missing".
    """
    missing = np.isnan(prices)
    columns = np.flatnonzero(missing.mean(0) <= MOST_MISSING)
    rows = np.flatnonzero(~missing[:, columns].any(1))
    if len(columns) == 0 or len(rows) < 2:
        raise ValueError(
            f"gaps='published' keeps {len(columns)} of {prices.shape[1]} stocks and {len(rows)} of {len(prices)} days"
        )
    return rows, columns


def sessions(table: PriceTable, name: str) -> tuple[PriceTable, list[str]]:
    """Leave out days without any price, such as the holidays of a calendar of business days.

    Args:
        table: Prices.
        name: Of them, for messages.

    Returns:
        The table, and a flag if days were left out.

    Raises:
        ValueError: If the days are not daily: everything is annualised by 252 sessions a year.
    """
    held = ~np.isnan(table.prices).all(1)
    flags = [] if held.all() else [f"{name}: {(~held).sum()} days without any price are left out"]
    dates = table.dates[held]
    step = float(np.median(np.diff(dates).astype(np.int64))) if len(dates) > 1 else 1.0
    if step > _LONGEST_STEP:
        raise ValueError(f"{name}: daily prices are needed, the median step between its {len(dates)} days is {step:g}")
    return PriceTable(dates, table.tickers, table.prices[held]), flags


def without_price_errors(
    table: PriceTable, check: PriceTable, max_disagreement: float, names: tuple[str, str]
) -> tuple[Array, list[str]]:
    """Replace moves that a second source does not know.

    Let r and c be the returns of the table and of the second one between the same two neighbouring days. Where
    |log (1 + r) / (1 + c)| exceeds log (1 + ``max_disagreement``) and c is the smaller move, |log (1 + c)| < |log (1 +
    r)|, the return becomes c: all prices of the stock from that day on are multiplied by (1 + c) / (1 + r), which
    leaves its other returns and its earlier prices as they are. Logarithms, so that a spike and its way back are
    judged alike. Where c is the larger move the table stays, with a flag: there the second source lacks a dividend or a
    spin-off that the table accounts for.

    Args:
        table: Prices to mend.
        check: Prices to compare with; days and stocks that only one of them has are not compared.
        max_disagreement: Above 0.
        names: Of the two, for the flags.

    Returns:
        ``(T, A)`` prices, and a flag for each disagreement.
    """
    columns = {ticker: column for column, ticker in enumerate(check.tickers)}
    common = np.array([(ours, columns[t]) for ours, t in enumerate(table.tickers) if t in columns], dtype=np.int64)
    if len(common) == 0:
        return table.prices, [f"{names[1]} has none of the tickers of {names[0]}: nothing was compared"]
    ours, theirs = common.T
    _, at, there = np.intersect1d(table.dates, check.dates, assume_unique=True, return_indices=True)
    compared = np.full((len(table.dates), len(ours)), np.nan)
    compared[at] = check.prices[np.ix_(there, theirs)]
    returns, checks = simple_returns(table.prices[:, ours]), simple_returns(compared)
    moves, known = np.log1p(returns), np.log1p(checks)
    disagree = np.abs(moves - known) > np.log1p(max_disagreement)
    wrong = disagree & (np.abs(known) < np.abs(moves))
    ratios = np.where(wrong, (1 + checks) / (1 + returns), 1.0)
    prices = table.prices.copy()
    prices[:, ours] *= np.cumprod(ratios, axis=0)
    flags = [
        f"{table.tickers[ours[column]]} {table.dates[row]}: {returns[row, column]:+.3g} in {names[0]}, "
        f"{checks[row, column]:+.3g} in {names[1]}: {'replaced' if wrong[row, column] else 'kept, the smaller move'}"
        for column, row in np.argwhere(disagree.T)
    ]
    unchecked = len(table.tickers) - len(ours)
    if unchecked:
        flags.append(f"{unchecked} of {len(table.tickers)} tickers are not in {names[1]}: not compared")
    return prices, flags
