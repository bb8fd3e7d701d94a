"""Prices of stocks and of an index from CSV and Parquet, checked cell by cell.

Two layouts. *Wide*: a column of dates and one column of prices for each ticker. *Long*: a row for each date and ticker.
Every refusal is one line with file, column and row; rows are counted from 1, the header of a CSV file not included.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from datamodules.sources.cells import (
    Array,
    Days,
    Rows,
    days_of,
    numbers_of,
    open_table,
    require_columns,
    some,
    texts_of,
)


@dataclass(frozen=True)
class PriceTable:
    """Prices of many stocks over days.

    Attributes:
        dates: ``(T,) datetime64[D]``, strictly increasing.
        tickers: A names, each once.
        prices: ``(T, A) float64``, positive and finite; NaN where there is none.
    """

    dates: Days
    tickers: tuple[str, ...]
    prices: Array


@dataclass(frozen=True)
class Columns:
    """What the columns mean.

    Attributes:
        date: Column of dates.
        ticker: Column of tickers of the long layout; None is the wide layout.
        price: Column of prices of the long layout.
    """

    date: str
    ticker: str | None = None
    price: str | None = None

    def __post_init__(self) -> None:
        if (self.ticker is None) != (self.price is None):
            raise ValueError(
                "ticker_column and price_column go together (long files), or neither is given (wide files), "
                f"got {self.ticker!r} and {self.price!r}"
            )


def read_prices(
    paths: Sequence[Path], columns: Columns, *, tickers: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> PriceTable:
    """Read one table from one or more files; several may split it by days, by tickers or both.

    An empty or missing cell, ``NA``, ``NaN`` and ``null`` are no price. Dates are dates, times (their day counts) or
    ISO 8601 text. Cells of tickers that are not asked for are not looked at.

    Args:
        paths: At least one file, ``.csv``, ``.csv.gz`` or ``.parquet``.
        columns: What the columns mean.
        tickers: Those to keep; None keeps all.
        exclude: Those to leave out.

    Returns:
        Tickers in the order in which the files have them.

    Raises:
        ValueError: In one line, if a file cannot be read or is empty; a column is missing or occurs twice; a price is
            no number, not positive or infinite; a date cannot be read, is missing, repeated (in the long layout for
            one ticker) or before the one above; two files give a price for one day and ticker; a ticker that is asked
            for or left out does not occur; a ticker has fewer than two prices; nothing is left.
    """
    wanted = None if tickers is None else set(tickers)
    read = _wide_block if columns.ticker is None else _long_block
    blocks = [read(path, columns, wanted, set(exclude)) for path in paths]
    _check_names(paths, {name for block in blocks for name in block.names}, tickers, exclude)
    names = tuple(dict.fromkeys(name for block in blocks for name in block.table.tickers))
    if not names:
        raise ValueError(f"{_named(paths)}: no ticker is left")
    place = {name: column for column, name in enumerate(names)}
    dates = np.unique(np.concatenate([block.table.dates for block in blocks]))
    prices = np.full((len(dates), len(names)), np.nan)
    for block, path in zip(blocks, paths, strict=True):
        where = np.ix_(
            np.searchsorted(dates, block.table.dates),
            np.array([place[name] for name in block.table.tickers], dtype=int),
        )
        twice = ~np.isnan(prices[where]) & ~np.isnan(block.table.prices)
        if twice.any():
            row, column = _first(twice)
            day, name = block.table.dates[row], block.table.tickers[column]
            raise ValueError(f"{path}: ticker {name!r} has a price on {day} here and in an earlier file")
        prices[where] = np.where(np.isnan(block.table.prices), prices[where], block.table.prices)
    counts = (~np.isnan(prices)).sum(0)
    if counts.min() < 2:
        few = [f"{names[column]} {counts[column]}" for column in np.flatnonzero(counts < 2)]
        raise ValueError(
            f"{_named(paths)}: a ticker needs at least two prices, got {some(few)}; leave it out with `exclude`"
        )
    return PriceTable(dates, names, prices)


def read_index(paths: Sequence[Path], date_column: str, value_column: str | None) -> tuple[Days, Array]:
    """Days on which an index has a value, and the values.

    Args:
        paths: Files with a column of dates and one of values.
        date_column: Of the dates.
        value_column: Of the values; None if there is no other column.

    Returns:
        ``(n,) datetime64[D]`` and ``(n,) float64``.

    Raises:
        ValueError: As :func:`read_prices`; or if it is not clear which column holds the values.
    """
    if value_column is None:
        others = [name for name in open_table(paths[0]).columns if name != date_column]
        if len(others) != 1:
            raise ValueError(f"{paths[0]}: which column is the index? Set index_column to one of {some(others)}")
        value_column = others[0]
    for path in paths:
        require_columns(path, open_table(path), {value_column: "index_column"})
    table = read_prices(paths, Columns(date_column), tickers=[value_column])
    known = ~np.isnan(table.prices[:, 0])
    return table.dates[known], table.prices[known, 0]


class _Block(NamedTuple):
    """What one file says: prices of the tickers kept, and the names of all its tickers."""

    table: PriceTable
    names: tuple[str, ...]


def _wide_block(path: Path, columns: Columns, wanted: set[str] | None, exclude: set[str]) -> _Block:
    frame = open_table(path)
    require_columns(path, frame, {columns.date: "date_column"})
    names = tuple(name for name in frame.columns if name != columns.date)
    if not names:
        raise ValueError(f"{path}: no column of prices beside {columns.date!r}")
    dates = days_of(path, frame, columns.date)
    backwards = np.flatnonzero(dates[1:] <= dates[:-1]) + 1
    if len(backwards):
        _refuse_order(path, columns.date, dates, int(backwards[0]), int(backwards[0]) - 1, "")
    kept = tuple(name for name in names if (wanted is None or name in wanted) and name not in exclude)
    return _Block(PriceTable(dates, kept, _prices(path, frame, kept)), names)


def _long_block(path: Path, columns: Columns, wanted: set[str] | None, exclude: set[str]) -> _Block:
    assert columns.ticker is not None
    assert columns.price is not None
    frame = open_table(path)
    roles = {columns.date: "date_column", columns.ticker: "ticker_column", columns.price: "price_column"}
    require_columns(path, frame, roles)
    tickers = pl.Series(texts_of(path, frame, columns.ticker))
    names = tuple(tickers.unique(maintain_order=True).to_list())
    kept = tuple(name for name in names if (wanted is None or name in wanted) and name not in exclude)
    # Row numbers of the file stay with the rows, for the messages.
    rows = tickers.is_in(list(kept)).arg_true().to_numpy()
    frame, tickers = frame[rows], tickers[rows]
    dates = days_of(path, frame, columns.date, rows)
    prices = _prices(path, frame, [columns.price], rows)[:, 0]
    place = {name: column for column, name in enumerate(kept)}
    stocks = tickers.replace_strict(place, return_dtype=pl.Int64).to_numpy() if len(rows) else np.zeros(0, dtype=int)
    order = np.argsort(stocks, kind="stable")  # rows of a ticker together, in the order of the file
    backwards = np.flatnonzero((np.diff(stocks[order]) == 0) & (np.diff(dates[order]) <= np.timedelta64(0, "D")))
    if len(backwards):
        above, below = order[backwards], order[backwards + 1]
        first = int(below.argmin())
        _refuse_order(
            path, columns.date, dates, below[first], above[first], f" of {tickers[int(below[first])]!r}", rows
        )
    days, day_of = np.unique(dates, return_inverse=True)
    table = np.full((len(days), len(kept)), np.nan)
    table[day_of, stocks] = prices
    return _Block(PriceTable(days, kept, table), names)


def _refuse_order(
    path: Path, column: str, dates: Days, row: int, above: int, whose: str, rows: Rows | None = None
) -> None:
    number, before = (row + 1, above + 1) if rows is None else (rows[row] + 1, rows[above] + 1)
    if dates[row] == dates[above]:
        raise ValueError(f"{path}: column {column!r}, row {number}: {dates[row]}{whose} is already in row {before}")
    raise ValueError(
        f"{path}: column {column!r}, row {number}: {dates[row]}{whose} comes after {dates[above]} in row {before}, "
        "dates must increase"
    )


def _prices(path: Path, frame: pl.DataFrame, names: Sequence[str], rows: Rows | None = None) -> Array:
    prices = numbers_of(path, frame, names, rows)
    wrong = (prices <= 0) | np.isinf(prices)
    if wrong.any():
        row, column = _first(wrong)
        number = row + 1 if rows is None else rows[row] + 1
        raise ValueError(
            f"{path}: column {names[column]!r}, row {number}: {frame[names[column]][row]!r} must be a positive price, "
            "or missing"
        )
    return prices


def _check_names(paths: Sequence[Path], there: set[str], tickers: Sequence[str] | None, exclude: Sequence[str]) -> None:
    for asked, what in ((tickers or (), "tickers asked for"), (exclude, "tickers to exclude")):
        absent = [name for name in asked if name not in there]
        if absent:
            raise ValueError(f"{_named(paths)}: {len(absent)} of {len(asked)} {what} are absent: {some(absent)}")


def _first(mask: NDArray[np.bool_]) -> tuple[int, int]:
    row, column = np.argwhere(mask)[0]
    return int(row), int(column)


def _named(paths: Sequence[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
