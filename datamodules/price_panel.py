"""A panel of stocks over days, and what belongs to its prices: index, membership, delistings, sectors.

T days, A stocks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.price_rules import MOST_MISSING, last_rows
from datamodules.sources.cells import Array, Days, some
from datamodules.sources.universe import Delisting, Spell


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Stocks over days, and where the periods lie.

    Attributes:
        dates: ``(T,) datetime64[D]``, strictly increasing.
        tickers: A names.
        prices: ``(T, A) float64`` as observed, NaN where there is none.
        returns: ``(T, A) float64`` simple daily returns, NaN where unknown and in the first row.
        member: ``(T, A) bool``, whether the stock belongs to the universe.
        index_prices: ``(T,) float64``, or None.
        sectors: ``(A,) int64`` place in ``sector_names``, -1 where unknown.
        sector_names: Names of sectors.
        delisting_returns: ``(A,) float64`` return of the day after the last price; NaN where there is none.
        train_start: First row of the train window.
        train_stop: Row after its last.
        test_start: First row of the test, ``purge_days`` rows after ``train_stop``.
        test_stop: Row after its last; the panel may go on.
        flags: What was changed or left aside, a line each.
        index_is_price: Whether the index is known to leave out dividends.
    """

    dates: Days
    tickers: tuple[str, ...]
    prices: Array
    returns: Array
    member: NDArray[np.bool_]
    index_prices: Array | None
    sectors: NDArray[np.int64]
    sector_names: tuple[str, ...]
    delisting_returns: Array
    train_start: int
    train_stop: int
    test_start: int
    test_stop: int
    flags: tuple[str, ...]
    index_is_price: bool = False

    def batch(self) -> dict[str, Any]:
        """The fields by name: arrays as tensors, ``dates`` as days since 1970-01-01, names as lists, rows as int."""
        arrays = ("prices", "returns", "member", "sectors", "delisting_returns")
        return {
            "dates": torch.from_numpy(self.dates.astype(np.int64)),
            "tickers": list(self.tickers),
            **{name: torch.from_numpy(getattr(self, name)) for name in arrays},
            "index_prices": None if self.index_prices is None else torch.from_numpy(self.index_prices),
            "sector_names": list(self.sector_names),
            "train_start": self.train_start,
            "train_stop": self.train_stop,
            "test_start": self.test_start,
            "test_stop": self.test_stop,
            "flags": list(self.flags),
            "index_is_price": self.index_is_price,
        }

    def before(self, row: int) -> "Panel":
        """What was known at the close before ``row``, 1..T.

        Rows from ``row`` on are gone and periods end there, delistings not yet paid are unknown, and flags are left
        out: they speak of all days.
        """
        return replace(
            self,
            dates=self.dates[:row],
            prices=self.prices[:row],
            returns=self.returns[:row],
            member=self.member[:row],
            index_prices=None if self.index_prices is None else self.index_prices[:row],
            delisting_returns=np.where(last_rows(self.prices) + 1 < row, self.delisting_returns, np.nan),
            train_start=min(self.train_start, row),
            train_stop=min(self.train_stop, row),
            test_start=min(self.test_start, row),
            test_stop=min(self.test_stop, row),
            flags=(),
        )

    def eligible_to_train(self) -> NDArray[np.int64]:
        """Columns that the train window itself shows to be usable.

        A member with a return on its last day, and on at least 95 % of its days from the second on.
        """
        last, window = self.train_stop - 1, self.returns[self.train_start + 1 : self.train_stop]
        observed = (~np.isnan(window)).mean(0) if len(window) else np.zeros(len(self.tickers))
        usable = self.member[last] & ~np.isnan(self.returns[last]) & (observed >= 1 - MOST_MISSING)
        return np.flatnonzero(usable)


def aligned_index(
    calendar: Days, dates: Days, values: Array, max_missing: int, name: str, start: int = 0
) -> tuple[Array, list[str]]:
    """The index on the days of the prices.

    Args:
        calendar: ``(T,)`` days of the prices.
        dates: ``(n,)`` days of the index, increasing.
        values: ``(n,)`` its values.
        max_missing: How many days of the calendar the index may lack; its last value is carried over them.
        name: Of the index file, for messages.
        start: First row that is used; before it the index may be unknown.

    Returns:
        ``(T,)`` values, NaN before the first, and flags.

    Raises:
        ValueError: If the index lacks more days from ``start`` on, or begins after it.
    """
    latest = np.searchsorted(dates, calendar, side="right") - 1
    missing = (latest < 0) | (dates[np.maximum(latest, 0)] != calendar)
    before = latest < 0
    missing[:start] = False
    if missing.sum() > max_missing or missing[start]:
        raise ValueError(
            f"{name}: the index lacks {missing.sum()} of {len(calendar) - start} price days "
            f"({_days(calendar[missing])}); at most {max_missing} may be lacking, and not the first"
        )
    flags = []
    if missing.any():
        flags.append(f"{name}: the index lacks {_days(calendar[missing])}: its last value is carried")
    n_extra = int((~np.isin(dates, calendar)).sum())
    if n_extra:
        flags.append(f"{name}: {n_extra} days of the index are none of the prices: left aside")
    return np.where(before, np.nan, values[np.maximum(latest, 0)]), flags


def membership(
    dates: Days, tickers: Sequence[str], spells: Sequence[Spell], name: str
) -> tuple[NDArray[np.bool_], list[str]]:
    """``(T, A)`` whether each stock belongs to the universe, and flags.

    Args:
        dates: ``(T,)``.
        tickers: A names.
        spells: A stock without any is never a member.
        name: Of the file, for the flags.
    """
    columns = {ticker: column for column, ticker in enumerate(tickers)}
    member = np.zeros((len(dates), len(tickers)), dtype=bool)
    for spell in spells:
        if spell.ticker in columns:
            stop = None if spell.end is None else np.searchsorted(dates, spell.end, side="right")
            member[np.searchsorted(dates, spell.start) : stop, columns[spell.ticker]] = True
    named = {spell.ticker for spell in spells}
    flags = _unmatched(name, named, tickers)
    never = [ticker for ticker in tickers if ticker not in named]
    if never:
        flags.append(f"{name}: {len(never)} tickers with prices are never a member: {some(never)}")
    return member, flags


def delistings(
    dates: Days, tickers: Sequence[str], prices: Array, known: Mapping[str, Delisting], name: str
) -> tuple[Array, list[str]]:
    """``(A,)`` returns of the day after the last price, and flags.

    Args:
        dates: ``(T,)``.
        tickers: A names.
        prices: ``(T, A)``.
        known: Delistings by ticker; one after the last day is not known yet, and flagged.
        name: Of the file, for messages.

    Raises:
        ValueError: If a date is not that of the first session after the last price.
    """
    returns = np.full(len(tickers), np.nan)
    after = last_rows(prices) + 1
    flags = _unmatched(name, set(known), tickers)
    for column, ticker in enumerate(tickers):
        if ticker not in known:
            continue
        date, row = known[ticker].date, after[column]
        if row == len(dates) and date > dates[-1]:
            flags.append(f"{name}: {ticker} leaves on {date}, after the last day: left aside")
        elif row == len(dates) or date != dates[row]:
            first = "there is none" if row == len(dates) else str(dates[row])
            raise ValueError(
                f"{name}: {ticker} leaves on {date}, which must be the first session after its last price of "
                f"{dates[row - 1]}: {first}"
            )
        else:
            returns[column] = known[ticker].terminal_return
    return returns, flags


def sector_places(tickers: Sequence[str], sectors: Mapping[str, str]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """``(A,)`` place of each stock's sector, -1 where unknown, and the names of those that occur, sorted."""
    names = tuple(sorted({sectors[ticker] for ticker in tickers if ticker in sectors}))
    places = [names.index(sectors[ticker]) if ticker in sectors else -1 for ticker in tickers]
    return np.array(places, dtype=np.int64), names


def _unmatched(name: str, named: set[str], tickers: Sequence[str]) -> list[str]:
    others = sorted(named - set(tickers))
    return [f"{name}: {len(others)} tickers are without prices here: {some(others)}"] if others else []


def _days(days: Days) -> str:
    return some([str(day) for day in days])
