"""Tables from CSV and Parquet whose cells are read by meaning: dates, numbers and names, each checked.

Every refusal is one line with file, column and row; rows are counted from 1, the header of a CSV file not included.
"""

import difflib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from datamodules.sources.first_bytes import check_first_bytes, check_header

Array = NDArray[np.float64]
Days = NDArray[np.datetime64]
Rows = NDArray[np.integer]

TABLE_ENDINGS = (".csv", ".csv.gz", ".parquet")
"""Ends of the names of files that can be read as tables."""

_MISSING_TEXTS = ("", "NA", "NaN", "nan", "null")
_UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError)


def open_table(path: Path) -> pl.DataFrame:
    """The table of a file; columns of CSV files are text.

    Raises:
        ValueError: If the file cannot be read, is empty, or has a column twice.
    """
    is_parquet = path.name.lower().endswith(".parquet")
    check_first_bytes(path)
    try:
        frame = pl.read_parquet(path, hive_partitioning=False) if is_parquet else pl.read_csv(path, infer_schema=False)
    except _UNREADABLE as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        kind = "Parquet" if is_parquet else "CSV"
        raise ValueError(f"{path}: cannot be read as {kind}, truncated or damaged: {reason}") from error
    if frame.is_empty():
        raise ValueError(f"{path}: the file holds no rows")
    if not is_parquet:
        check_header(path, frame.columns, frame.columns)
    return frame


def require_columns(path: Path, frame: pl.DataFrame, roles: dict[str, str]) -> None:
    """Refuse a table without certain columns.

    Args:
        path: File, for the message.
        frame: Its table.
        roles: Column -> argument that names it, "" for a column of fixed name.

    Raises:
        ValueError: If one is missing; names the nearest there are.
    """
    for name, role in roles.items():
        if name not in frame.columns:
            near = difflib.get_close_matches(name.lower(), [n.lower() for n in frame.columns], n=3, cutoff=0.5)
            hint = [n for n in frame.columns if n.lower() in near] or frame.columns
            asked = f" ({role})" if role else ""
            raise ValueError(f"{path}: no column {name!r}{asked}, {'nearest' if near else 'it has'}: {some(hint)}")


def texts_of(path: Path, frame: pl.DataFrame, column: str) -> list[str]:
    """Names in a column, without blanks around them.

    Raises:
        ValueError: If one is missing.
    """
    texts = frame[column].cast(pl.String).str.strip_chars()
    missing = (texts.is_null() | (texts == "")).arg_true()
    if len(missing):
        raise ValueError(f"{path}: column {column!r}, row {missing[0] + 1}: is missing")
    return texts.to_list()


def days_of(
    path: Path,
    frame: pl.DataFrame,
    column: str,
    rows: Rows | None = None,
    *,
    optional: bool = False,
) -> Days:
    """Days of a column: dates, times, of which the day counts, or ISO 8601 text.

    Args:
        path: File, for the message.
        frame: Its table, or some rows of it.
        column: The column.
        rows: Place in the file of each row of ``frame``, from 0; None if it has them all.
        optional: Whether one may be missing.

    Returns:
        ``(n,) datetime64[D]``; NaT where missing.

    Raises:
        ValueError: If one cannot be read, or is missing but must not be.
    """
    said = frame[column]
    if said.dtype == pl.String:
        said = said.str.strip_chars().replace("", None)
        # A time may follow the day, after a blank or a T.
        days = said.str.slice(0, 10).str.to_date("%Y-%m-%d", strict=False)
        days = days.set(~said.str.contains(r"^\d{4}-\d{2}-\d{2}($|[ T]\d{2}:)").fill_null(False), None)
    elif isinstance(said.dtype, pl.Datetime):
        days = said.dt.date()
    elif said.dtype == pl.Date or said.dtype == pl.Null:
        days = said.cast(pl.Date)
    else:
        raise ValueError(f"{path}: column {column!r} must hold dates, got {said.dtype}")
    wrong = (days.is_null() & (said.is_not_null() if optional else True)).arg_true()
    if len(wrong):
        row = wrong[0]
        number = row + 1 if rows is None else rows[row] + 1
        what = "is missing" if said[row] is None else f"{said[row]!r} is not a date such as 2015-01-31"
        raise ValueError(f"{path}: column {column!r}, row {number}: {what}")
    found: Days = days.to_numpy().astype("datetime64[D]")
    return found


def numbers_of(path: Path, frame: pl.DataFrame, names: Sequence[str], rows: Rows | None = None) -> Array:
    """Numbers of several columns; an empty cell and the texts ``NA``, ``NaN``, ``nan``, ``null`` are missing.

    Args:
        path: File, for the message.
        frame: Its table, or some rows of it.
        names: The columns.
        rows: Place in the file of each row of ``frame``, from 0; None if it has them all.

    Returns:
        ``(n, len(names)) float64``; NaN where missing.

    Raises:
        ValueError: If one is not a number.
    """
    numbers = np.empty((len(frame), len(names)))
    for column, name in enumerate(names):
        said = frame[name]
        if said.dtype == pl.String:
            said = said.str.strip_chars()
            missing = said.is_null() | said.is_in(_MISSING_TEXTS)
            value = said.cast(pl.Float64, strict=False)
            wrong = (value.is_null() & ~missing).arg_true()
            if len(wrong):
                number = wrong[0] + 1 if rows is None else rows[wrong[0]] + 1
                raise ValueError(f"{path}: column {name!r}, row {number}: {said[wrong[0]]!r} is not a number")
        elif said.dtype.is_numeric() or said.dtype == pl.Null:
            value = said.cast(pl.Float64)
        else:
            raise ValueError(f"{path}: column {name!r} must hold numbers, got {said.dtype}")
        numbers[:, column] = value.fill_null(math.nan).to_numpy()
    return numbers


def some(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are; one that is no line of text is quoted."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name if name.isprintable() else repr(name) for name in names[:most]) + more
