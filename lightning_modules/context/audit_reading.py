"""Tables of embeddings and events from CSV and Parquet, as the audit of a table needs them.

Every refusal is one line with file and column, and the row where there is one; rows are counted from 1, the header of
a CSV file not included.
"""

import difflib
import re
from pathlib import Path

import numpy as np
import polars as pl

from lightning_modules.context.audit_outcomes import EmbeddingTable, EventTable, Integers

MICROSECONDS = {"us": 1, "ms": 1000, "s": 1_000_000, "days": 86_400_000_000}
MOST_VALUES = 8
"""Columns of events that are looked for in embeddings."""
MOST_TYPES = 3
"""Most frequent names of a text column that are looked for."""

LEAST_SHARE = 0.01
"""Share of the events below which a name is not looked for."""

_UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError)


def open_frame(path: Path) -> pl.DataFrame:
    """The table of a file; columns of CSV files are text.

    Raises:
        ValueError: If it is neither CSV nor Parquet, cannot be read or holds no rows.
    """
    kind = {".csv": "CSV", ".parquet": "Parquet"}.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: must end in .csv or .parquet")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        frame = pl.read_parquet(path) if kind == "Parquet" else pl.read_csv(path, infer_schema=False)
    except _UNREADABLE as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: cannot be read as {kind}: {reason}") from error
    if frame.is_empty():
        raise ValueError(f"{path}: the file holds no rows")
    return frame


def column_of(path: Path, frame: pl.DataFrame, column: str, role: str) -> pl.Series:
    """A column without missing cells.

    Raises:
        ValueError: If there is no such column, or a cell is missing.
    """
    if column not in frame.columns:
        near = difflib.get_close_matches(column, frame.columns, n=3) or frame.columns[:5]
        raise ValueError(f"{path}: no column {column!r} ({role}), nearest: {', '.join(near)}")
    found = frame[column]
    if found.dtype == pl.String:
        found = found.str.strip_chars().replace("", None)
    missing = found.is_null().arg_true()
    if len(missing):
        raise ValueError(f"{path}: column {column!r}, row {missing[0] + 1}: is missing")
    return found


def times_of(path: Path, frame: pl.DataFrame, column: str, unit: str | None) -> Integers:
    """``(n,) int64`` microseconds since 1970-01-01 UTC; times without a zone are taken for UTC.

    Args:
        path: For the message.
        frame: Its table.
        column: Dates, times, ISO 8601 text, or numbers of ``unit``.
        unit: ``"s"``, ``"ms"``, ``"us"`` or ``"days"`` since 1970-01-01; None if the column holds no numbers.
            Columns of dates and times have their own.

    Raises:
        ValueError: If a cell is no time, or numbers come without a unit.
    """
    said = column_of(path, frame, column, "time_column")
    if unit is not None and not (said.dtype == pl.Date or isinstance(said.dtype, pl.Datetime)):
        exact = said.cast(pl.Int64, strict=False) if said.dtype == pl.String else said
        numbers = exact if exact.null_count() == 0 else said.cast(pl.Float64, strict=False)
        if not numbers.dtype.is_numeric():
            raise ValueError(f"{path}: column {column!r} must hold numbers for time_unit {unit}, got {said.dtype}")
        wrong = (numbers.is_null() | ~numbers.cast(pl.Float64).is_finite()).arg_true()
        if len(wrong):
            raise ValueError(f"{path}: column {column!r}, row {wrong[0] + 1}: {said[wrong[0]]!r} is not a number")
        scaled = numbers.to_numpy() * MICROSECONDS[unit]
        return np.round(scaled).astype(np.int64) if scaled.dtype.kind == "f" else scaled.astype(np.int64)
    if said.dtype == pl.String:
        # A day alone is its midnight.
        whole = pl.Series(column, said).str.replace(r"^(\d{4}-\d{2}-\d{2})$", "${1}T00:00:00").str.replace(" ", "T")
        times = whole.str.to_datetime(time_unit="us", time_zone="UTC", strict=False)
    elif said.dtype == pl.Date or isinstance(said.dtype, pl.Datetime):
        times = said.cast(pl.Datetime("us"))
    else:
        raise ValueError(
            f"{path}: column {column!r} holds {said.dtype}: name their unit by time_unit, one of "
            f"{', '.join(MICROSECONDS)}"
        )
    wrong = times.is_null().arg_true()
    if len(wrong):
        raise ValueError(f"{path}: column {column!r}, row {wrong[0] + 1}: {said[wrong[0]]!r} is not a time")
    return times.dt.epoch("us").to_numpy().astype(np.int64)


def read_embeddings(
    path: Path, *, user_column: str, time_column: str, embedding_column: str, time_unit: str | None
) -> EmbeddingTable:
    """Embeddings from a list or array column, or from columns e0, e1, ...

    Raises:
        ValueError: If a column is missing, lists differ in length, or a number is missing or not finite.
    """
    frame = open_frame(path)
    users = column_of(path, frame, user_column, "user_column").cast(pl.String)
    times = times_of(path, frame, time_column, time_unit)
    if embedding_column in frame.columns:
        vectors = _lists(path, frame[embedding_column])
    else:
        names = sorted((name for name in frame.columns if re.fullmatch(r"e\d+", name)), key=lambda name: int(name[1:]))
        if not names:
            raise ValueError(
                f"{path}: no column {embedding_column!r} (embedding_column) of lists and no columns e0, e1, ..., it "
                f"has: {', '.join(frame.columns[:8])}"
            )
        vectors = np.stack([_numbers(path, frame[name]) for name in names], axis=1)
    wrong = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(wrong):
        raise ValueError(f"{path}: embedding, row {wrong[0] + 1}: a number is missing or not finite")
    distinct, codes = np.unique(users.to_numpy().astype(str), return_inverse=True)
    return EmbeddingTable(codes.astype(np.int64), times, vectors, distinct.tolist())


def _lists(path: Path, said: pl.Series) -> np.ndarray:
    if not isinstance(said.dtype, pl.List | pl.Array):
        raise ValueError(
            f"{path}: column {said.name!r} must hold lists of numbers, got {said.dtype}; CSV has no lists: write "
            "Parquet, or one number a column, e0, e1, ..., in its place"
        )
    lists = said.cast(pl.List(pl.Float64))
    lengths = lists.list.len()
    wrong = (lengths.is_null() | (lengths != lengths[0]) | (lengths == 0)).fill_null(True).arg_true()
    if len(wrong):
        row = wrong[0]
        raise ValueError(f"{path}: column {said.name!r}, row {row + 1}: {lengths[row]} numbers, {lengths[0]} in row 1")
    return lists.explode().fill_null(float("nan")).to_numpy().reshape(len(lists), -1)


def _numbers(path: Path, said: pl.Series) -> np.ndarray:
    value = said.cast(pl.Float64, strict=False)
    wrong = value.is_null().arg_true()
    if len(wrong):
        raise ValueError(f"{path}: column {said.name!r}, row {wrong[0] + 1}: {said[wrong[0]]!r} is not a number")
    return value.to_numpy()


def read_events(
    path: Path,
    table: EmbeddingTable,
    *,
    user_column: str,
    time_column: str,
    time_unit: str | None,
    columns: list[str] | None,
) -> tuple[EventTable, EmbeddingTable]:
    """Events, sorted by user and time, and the embeddings under one code of users.

    Columns of numbers are taken as they are, a missing one as 0; of columns of text the most frequent names that at
    least 1 % of the events have, each as 0 or 1.

    Args:
        path: CSV or Parquet.
        table: Embeddings.
        user_column: Of the events.
        time_column: Of the events.
        time_unit: See :func:`times_of`.
        columns: What an event is; None takes the first 8 that are left.

    Raises:
        ValueError: If a column is missing, or no user of the embeddings has an event.
    """
    frame = open_frame(path)
    users = column_of(path, frame, user_column, "user_column").cast(pl.String).to_numpy().astype(str)
    times = times_of(path, frame, time_column, time_unit)
    for name in columns or []:
        column_of(path, frame.select(pl.col(name).is_not_null()) if name in frame.columns else frame, name, "columns")
    rest = [name for name in frame.columns if name not in (user_column, time_column)]
    values: dict[str, np.ndarray] = {}
    for name in columns or rest[:MOST_VALUES]:
        values |= _values(frame[name])
    names = np.unique(np.concatenate([users, np.array(table.names)]))
    if not np.isin(table.names, users).any():
        raise ValueError(f"{path}: no user of the embeddings has an event, {table.names[0]!r} for one")
    codes = np.searchsorted(names, users).astype(np.int64)
    order = np.lexsort((times, codes))
    events = EventTable(codes[order], times[order], {name: value[order] for name, value in values.items()})
    moved = np.searchsorted(names, np.array(table.names)).astype(np.int64)[table.users]
    return events, EmbeddingTable(moved, table.times, table.vectors, names.tolist())


def _values(said: pl.Series) -> dict[str, np.ndarray]:
    number = said.cast(pl.Float64, strict=False) if said.dtype == pl.String or said.dtype.is_numeric() else None
    if number is not None and number.null_count() == said.null_count():
        return {said.name: np.nan_to_num(number.fill_null(0.0).to_numpy(), posinf=0.0, neginf=0.0)}
    if said.dtype not in (pl.String, pl.Categorical, pl.Enum, pl.Boolean):
        return {}
    text = said.cast(pl.String).fill_null("")
    counts = text.rename("name").value_counts().sort("count", "name", descending=[True, False])
    # A name that hardly ever comes again is a number of an invoice or the like.
    most = counts.filter(pl.col("count") >= LEAST_SHARE * len(said))["name"].head(MOST_TYPES).to_list()
    return {f"{said.name} = {name}": (text == name).to_numpy().astype(np.float64) for name in most}
