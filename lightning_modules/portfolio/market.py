"""The market as a strategy sees it: prices of many stocks over days, cut so that nothing later can be read.

T days, A stocks. Rows are trading days in increasing order, columns are stocks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

TRADING_DAYS = 252
"""Trading days of a year, by which daily figures are annualised."""

RISK_FREE = 0.03
"""Annual, as published."""

CONSTANT = 1e-12
"""Range of daily returns up to which a series counts as constant: far below one tick of a price, above its rounding."""


def daily_risk_free(annual: float | None) -> float:
    """Daily rate that compounds to ``annual``, by default ``RISK_FREE``, over 252 days: (1 + annual)^(1/252) - 1."""
    return float((1 + (RISK_FREE if annual is None else annual)) ** (1 / TRADING_DAYS) - 1)


@dataclass(frozen=True, kw_only=True)
class Market:
    """A panel of stocks, up to and including the last row.

    Attributes:
        dates: ``(T,) datetime64[D]``, strictly increasing.
        tickers: A names.
        prices: ``(T, A) float64`` as observed, NaN where there is no price.
        returns: ``(T, A) float64`` simple daily returns under the gap rule of the data module; NaN where unknown, and
            in the first row.
        member: ``(T, A) bool``, whether the stock belongs to the universe on that day.
        index_prices: ``(T,) float64`` of the index on the same days, or None.
        sectors: ``(A,) int64`` place in ``sector_names``, -1 where unknown.
        sector_names: Names of sectors.
        delisting_returns: ``(A,) float64`` return of the day after the last price of a delisted stock; NaN where the
            stock is not delisted within these rows.
        index_is_price: Whether the index is known to leave out dividends.
    """

    dates: NDArray[np.datetime64]
    tickers: tuple[str, ...]
    prices: Array
    returns: Array
    member: NDArray[np.bool_]
    index_prices: Array | None = None
    sectors: NDArray[np.int64]
    sector_names: tuple[str, ...] = ()
    delisting_returns: Array
    index_is_price: bool = False

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any]) -> "Market":
        """Build from a batch of the data module: tensors become arrays, ``dates`` are days since 1970-01-01."""

        def array(value: Any) -> Any:
            return value.detach().cpu().numpy() if isinstance(value, Tensor) else value

        values = {field.name: array(batch.get(field.name)) for field in fields(cls)}
        return cls(
            **values
            | {
                "dates": values["dates"].astype("datetime64[D]"),
                "tickers": tuple(values["tickers"]),
                "sector_names": tuple(values["sector_names"] or ()),
                "index_is_price": bool(values["index_is_price"]),
            }
        )

    def __len__(self) -> int:
        """T."""
        return len(self.dates)

    @property
    def n_stocks(self) -> int:
        """A."""
        return len(self.tickers)

    def rows(self, start: int, stop: int) -> "Market":
        """Days ``start`` to ``stop`` (not included). A delisting after them is not known in them."""
        start, stop = max(start, 0), min(stop, len(self))
        return replace(
            self,
            dates=self.dates[start:stop],
            prices=self.prices[start:stop],
            returns=self.returns[start:stop],
            member=self.member[start:stop],
            index_prices=None if self.index_prices is None else self.index_prices[start:stop],
            # The terminal return is paid on the day after the last price: before that day nobody knows of it.
            delisting_returns=np.where(self.last_price_row + 1 < stop, self.delisting_returns, np.nan),
        )

    def before(self, row: int, n_days: int | None = None) -> "Market":
        """The days strictly before ``row``, all of them or the last ``n_days``."""
        return self.rows(0 if n_days is None else row - n_days, row)

    def stocks(self, columns: Sequence[int] | NDArray[Any]) -> "Market":
        """The stocks in ``columns``, in that order."""
        columns = np.asarray(columns)
        return replace(
            self,
            tickers=tuple(self.tickers[column] for column in columns),
            prices=self.prices[:, columns],
            returns=self.returns[:, columns],
            member=self.member[:, columns],
            sectors=self.sectors[columns],
            delisting_returns=self.delisting_returns[columns],
        )

    def eligible(self, min_observed: float = 0.95) -> NDArray[np.int64]:
        """Columns that could be bought on the day after the last row, judged by these rows alone.

        A member on the last day that can be traded, with a return on at least ``min_observed`` of the days from the
        second on.
        """
        observed = ~np.isnan(self.returns[1:])
        share = observed.mean(0) if len(observed) else np.zeros(self.n_stocks)
        return np.flatnonzero(self.member[-1] & self.tradable & (share >= min_observed))

    @cached_property
    def tradable(self) -> NDArray[np.bool_]:
        """``(A,)`` whether a stock has a price on the last day, or one of so few days before that it is carried on.

        How many days is the data module's rule: they have a return of 0. Delisted stocks have none from the day on
        which their delisting return is paid.
        """
        quoted = ~np.isnan(self.prices[-1]) | ~np.isnan(self.returns[-1])
        return quoted & np.isnan(self.delisting_returns)

    @cached_property
    def stuck(self) -> NDArray[np.bool_]:
        """``(A,)`` whether a stock has no price on the last day, so that nobody can trade it, and was not delisted."""
        return np.isnan(self.prices[-1]) & np.isnan(self.delisting_returns)

    def filled_returns(self) -> Array:
        """``(T - 1, A)`` returns from the second day on, 0 where unknown: no price, no known change."""
        return np.nan_to_num(self.returns[1:], nan=0.0)

    @cached_property
    def last_price_row(self) -> NDArray[np.int64]:
        """``(A,)`` row of the last price of each stock; -1 where there is none."""
        observed = ~np.isnan(self.prices)
        return np.where(observed.any(0), len(self) - 1 - observed[::-1].argmax(0), -1)

    @cached_property
    def index_returns(self) -> Array | None:
        """``(T - 1,)`` simple returns of the index from the second day on; None without an index."""
        if self.index_prices is None:
            return None
        returns: Array = np.divide(self.index_prices[1:], self.index_prices[:-1]) - 1.0
        return returns

    @cached_property
    def holder_returns(self) -> Array:
        """``(T, A)`` what one who holds the stock earns on each day; 0 in the first row.

        Against the last price seen, however old, so that a move over a gap is not lost; 0 on days without a price;
        the delisting return on the day after the last price of a delisted stock.
        """
        observed = ~np.isnan(self.prices)
        row = np.arange(len(self))[:, None]
        latest = np.maximum.accumulate(np.where(observed, row, -1), axis=0)
        carried = np.take_along_axis(self.prices, np.maximum(latest, 0), axis=0)  # NaN before the first price
        with np.errstate(invalid="ignore"):
            later = np.nan_to_num(carried[1:] / carried[:-1] - 1, nan=0.0)
        moves: Array = np.concatenate([np.zeros((1, self.n_stocks)), later])
        after_last = self.last_price_row + 1
        paid = np.flatnonzero(~np.isnan(self.delisting_returns) & (after_last < len(self)) & (after_last > 0))
        moves[after_last[paid], paid] = self.delisting_returns[paid]
        return moves


def next_session(dates: NDArray[np.datetime64], given: np.datetime64 | None = None) -> np.datetime64:
    """The session after the last of ``dates``: the one given, or the next day from Monday to Friday.

    Raises:
        ValueError: If the one given does not come after the last day.
    """
    if given is None:
        return np.busday_offset(dates[-1], 1, roll="backward")
    if given <= dates[-1]:
        raise ValueError(f"next_session must come after the last day of the prices, {dates[-1]}, got {given}")
    return given


def next_month_start(session: np.datetime64) -> np.datetime64:
    """The first day from Monday to Friday of the calendar month after that of ``session``."""
    return np.busday_offset((session.astype("datetime64[M]") + 1).astype("datetime64[D]"), 0, roll="forward")


def month_starts(dates: NDArray[np.datetime64], start: int, stop: int) -> NDArray[np.int64]:
    """Rows of the first session of each calendar month among rows ``start`` .. ``stop`` - 1.

    The first is ``start`` itself, whatever day it is, so that every row belongs to exactly one period.
    """
    months = dates[start:stop].astype("datetime64[M]").astype(np.int64)
    return np.flatnonzero(np.diff(months, prepend=months[:1] - 1)) + start
