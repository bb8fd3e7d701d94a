"""Which stocks there are: lists of tickers, sectors, membership of an index, and delistings."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from datamodules.sources.cells import days_of, numbers_of, open_table, require_columns, texts_of


class Spell(NamedTuple):
    """A ticker belongs to the universe from ``start`` to ``end``, both included; without ``end``, ever since."""

    ticker: str
    start: np.datetime64
    end: np.datetime64 | None


class Delisting(NamedTuple):
    """Simple return of the day on which a stock is taken off the list."""

    date: np.datetime64
    terminal_return: float


def read_tickers(path: Path) -> list[str]:
    """Tickers of a text file, one a line; what follows ``#`` is a comment.

    Raises:
        ValueError: If there is none, one occurs twice, or the file is not text.
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"tickers_path: no file {str(path)!r} (looked in {Path.cwd()})")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"tickers_path: {path} is not text in UTF-8, or damaged: {error.reason}") from error
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    rows = [(row, line) for row, line in enumerate(lines, start=1) if line]
    if not rows:
        raise ValueError(f"{path}: no ticker, give one a line")
    seen: dict[str, int] = {}
    for row, name in rows:
        if name in seen:
            raise ValueError(f"{path}: line {row}: {name!r} is already in line {seen[name]}")
        seen[name] = row
    return list(seen)


def read_sectors(path: Path) -> dict[str, str]:
    """Ticker -> sector from columns ``ticker`` and ``sector``; a missing sector is unknown.

    Raises:
        ValueError: If a column is missing, or a ticker is missing or occurs twice.
    """
    frame = open_table(path)
    require_columns(path, frame, {"ticker": "", "sector": ""})
    names = texts_of(path, frame, "ticker")
    _refuse_repeats(path, names)
    sectors = frame["sector"].cast(pl.String).to_list()
    return {name: sector for name, sector in zip(names, sectors, strict=True) if sector}


def read_membership(path: Path) -> list[Spell]:
    """Spells from columns ``ticker``, ``start`` and ``end``; a ticker may have several.

    Raises:
        ValueError: If a column is missing, a ticker or a start is missing, a date cannot be read, or a spell ends
            before it starts.
    """
    frame = open_table(path)
    require_columns(path, frame, {"ticker": "", "start": "", "end": ""})
    names = texts_of(path, frame, "ticker")
    starts, ends = days_of(path, frame, "start"), days_of(path, frame, "end", optional=True)
    backwards = np.flatnonzero(ends < starts)  # a missing end compares as false
    if len(backwards):
        row = int(backwards[0])
        raise ValueError(f"{path}: column 'end', row {row + 1}: {ends[row]} is before the start {starts[row]}")
    spells = zip(names, starts, ends, strict=True)
    return [Spell(name, start, None if np.isnat(end) else end) for name, start, end in spells]


def read_delistings(path: Path) -> dict[str, Delisting]:
    """Ticker -> delisting from columns ``ticker``, ``date`` and ``return``, a simple return of at least -1.

    Raises:
        ValueError: If a column is missing, a ticker is missing or occurs twice, a date or a return cannot be read or
            is missing, or a return is below -1 or infinite.
    """
    frame = open_table(path)
    require_columns(path, frame, {"ticker": "", "date": "", "return": ""})
    names = texts_of(path, frame, "ticker")
    _refuse_repeats(path, names)
    days = days_of(path, frame, "date")
    returns = numbers_of(path, frame, ["return"])[:, 0]
    wrong = np.flatnonzero(~(np.isfinite(returns) & (returns >= -1)))
    if len(wrong):
        value = frame["return"][int(wrong[0])]
        raise ValueError(f"{path}: column 'return', row {wrong[0] + 1}: {value!r} must be finite and at least -1")
    rows = zip(names, days, returns.tolist(), strict=True)
    return {name: Delisting(day, terminal) for name, day, terminal in rows}


def _refuse_repeats(path: Path, names: Sequence[str]) -> None:
    seen: dict[str, int] = {}
    for row, name in enumerate(names, start=1):
        if name in seen:
            raise ValueError(f"{path}: column 'ticker', row {row}: {name!r} is already in row {seen[name]}")
        seen[name] = row
