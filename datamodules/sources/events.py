"""Events of users from CSV and Parquet: read by meaning, checked, coded and sorted.

Only named columns are read, and rows are filtered while they are read. Every refusal is one line with file, column
and row; rows are counted from 1, the header of a CSV file not included.
"""

import datetime
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from datamodules.sources.cells import require_columns
from datamodules.sources.columns import Columns, as_integer
from datamodules.sources.first_bytes import check_first_bytes, check_header
from datamodules.sources.row_wise import refuse_other_rows

NumberUnit = Literal["s", "ms", "us", "days"]
Duplicates = Literal["keep", "drop", "error"]

MISSING = "<missing>"
"""Name of the category of an empty cell."""

DAY = 86_400_000_000
"""Microseconds of a day."""

HOUR = DAY // 24

_FIRST_ABSOLUTE = 365 * DAY  # 1971: a number below is no point of time but a distance
_WHY_ABSOLUTE = (
    "times must be absolute (a date, or a number with time_unit since 1970), for a context is what others had done by "
    "the same moment"
)
_ROW = "row number"
_ROWS_TO_INFER_FROM = 10_000
_UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EventColumns:
    """What the columns mean.

    Attributes:
        user: Column of user ids, integers or strings.
        time: Column of absolute times: dates, times, ISO 8601 text, or numbers with ``time_unit``.
        order: Column of integers or dates that orders a user's events of one time; None is the order of the files.
        texts: Columns read as categories, an empty cell being the category ``<missing>``.
        numbers: Columns read as numbers, an empty cell being NaN.
        required_numbers: Those of ``numbers`` in which no cell may be empty.
        group: Column that is one value for each user, or None; an empty cell is no group.
        fold: Column of ``train``, ``validation``, ``test``, one for each user, or None.
        derived: (name, SQL expression) of columns that are computed from the others.
        where: SQL conditions on single rows, derived columns included; a row is kept if all are true.
        time_format: strptime form of times given as text; None is ISO 8601.
        time_unit: Unit of times given as numbers, since 1970-01-01 UTC; None if there are none.
        relative_times: Whether times before 1971 are allowed.
        max_time: Last day that may occur, ISO 8601; None is today.
        duplicates: What becomes of rows that agree in every column read.
    """

    user: str
    time: str
    order: str | None
    texts: tuple[str, ...]
    numbers: tuple[str, ...]
    required_numbers: tuple[str, ...]
    group: str | None
    fold: str | None
    derived: tuple[tuple[str, str], ...]
    where: tuple[str, ...]
    time_format: str | None
    time_unit: NumberUnit | None
    relative_times: bool
    max_time: str | None
    duplicates: Duplicates

    def roles(self) -> dict[str, str]:
        """Column -> argument that names it."""
        roles = dict.fromkeys(self.numbers, "numeric") | dict.fromkeys(self.texts, "categorical")
        single = {"user_column": self.user, "time_column": self.time, "order_column": self.order}
        single |= {"group_column": self.group, "fold_column": self.fold}
        return roles | {column: argument for argument, column in single.items() if column is not None}


@dataclass(frozen=True)
class EventTable:
    """Events sorted by user, time, order column, and place in the files. E events, U users.

    Attributes:
        user_ids: ``(U,)`` distinct original ids, increasing.
        offsets: ``(U + 1,) int64``: user u's events are offsets[u]:offsets[u + 1].
        times: ``(E,) int64`` microseconds since 1970-01-01 UTC.
        codes: ``(E, len(texts)) int32`` place in ``names``.
        names: For each column of ``codes`` its distinct texts, increasing.
        numbers: ``(E, len(numbers)) float64``, NaN where missing, else finite.
        groups: ``(U,) int64`` number of each user's group from 0, -1 for a user without one, or None.
        folds: ``(U,) int8`` 0 train, 1 validation, 2 test, or None.
        counts: Rows read, kept, duplicates.
    """

    user_ids: pl.Series
    offsets: NDArray[np.int64]
    times: NDArray[np.int64]
    codes: NDArray[np.int32]
    names: list[list[str]]
    numbers: NDArray[np.float64]
    groups: NDArray[np.int64] | None
    folds: NDArray[np.int8] | None
    counts: dict[str, int]


def read_events(paths: Sequence[Path], columns: EventColumns) -> EventTable:
    """Read, check, code and sort.

    Events need not be sorted in the files; how many are not is logged in one line a file. Ids of CSV files become
    integers if all are plain integers.

    Raises:
        ValueError: In one line, if a file cannot be read or is empty; a column is missing (the nearest are named) or
            of a wrong type; a condition or expression cannot be computed or reads other rows; in a row that is kept,
            a user or time is missing, a time cannot be read, is relative or lies in the future, or a number is no
            finite number; rows are repeated and ``duplicates`` is ``error``; a user has two groups or folds; or no
            row is kept.
    """
    frames, n_read = [], 0
    for number, path in enumerate(paths):
        frame, n_rows = _read(path, columns)
        _tell_unsorted(path, frame)
        frames.append(frame.with_columns(file=pl.lit(number, dtype=pl.Int32)))
        n_read += n_rows
    try:
        frame = pl.concat(frames, how="vertical_relaxed")
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{paths[-1]}: columns differ in type from {paths[0]}: {str(error).splitlines()[0]}") from None
    if frame.is_empty():
        raise ValueError(f"{paths[0]}: nothing is left of {n_read} rows after where {list(columns.where)}")
    n_kept = frame.height
    frame = _one_kind_of_integers(frame, paths, columns.user)
    frame, n_duplicates = _without_duplicates(frame, paths, columns)
    if all(path.suffix.lower() != ".parquet" for path in paths):
        frame = frame.with_columns(user=_plain_integers(frame["user"]))

    keys = ["user", "time"] + (["order"] if columns.order is not None else []) + ["file", _ROW]
    frame = frame.sort(keys)
    users = _dense(frame["user"])
    offsets = np.concatenate([[0], np.cumsum(np.bincount(users))]).astype(np.int64)
    codes = np.empty((frame.height, len(columns.texts)), dtype=np.int32)
    names = []
    for place in range(len(columns.texts)):
        column = frame[f"text {place}"].fill_null(MISSING)
        codes[:, place] = _dense(column)
        names.append(column.unique().sort().to_list())
    numbers = np.empty((frame.height, len(columns.numbers)))
    for place in range(len(columns.numbers)):
        numbers[:, place] = frame[f"number {place}"].fill_null(np.nan).to_numpy()
    groups = None
    if columns.group is not None:
        said = _of_user(frame, paths, "group", columns.group, offsets).replace({"": None, MISSING: None})
        groups = (said.rank("dense").cast(pl.Int64) - 1).fill_null(-1).to_numpy()
    times, n_moved = without_summer_time(frame["time"].to_numpy().copy())
    if n_moved:
        logger.warning(
            "%s: times are dates in a zone with summer time, %d of %d an hour off the first: they are moved by that "
            "hour, so that a day is a day",
            paths[0],
            n_moved,
            len(times),
        )
    return EventTable(
        user_ids=frame["user"].gather(offsets[:-1]).alias("user_id"),
        offsets=offsets,
        times=times,
        codes=codes,
        names=names,
        numbers=numbers,
        groups=groups,
        folds=None if columns.fold is None else _folds(frame, paths, columns.fold, offsets),
        counts={"read": n_read, "kept": n_kept, "duplicates": n_duplicates, "events": frame.height},
    )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        # An expression of the user that cannot be computed of some cell is no damage.
        damage = "" if isinstance(error, pl.exceptions.InvalidOperationError) else ", truncated or damaged"
        raise ValueError(f"{path}: cannot be read{damage}: {reason}") from error


def _read(path: Path, columns: EventColumns) -> tuple[pl.DataFrame, int]:
    """The rows kept of one file under our own names, and how many there were."""
    derived = {name: parse_expression(f"derived {name!r}", text) for name, text in columns.derived}
    conditions = {text: parse_expression("where", text) for text in columns.where}
    roles = {name: role for name, role in columns.roles().items() if name not in derived}
    for role, expression in [
        *((f"derived {n!r}", e) for n, e in derived.items()),
        *(("where", c) for c in conditions.values()),
    ]:
        roles |= {name: roles.get(name, role) for name in expression.meta.root_names() if name not in derived}
    rows, schema, said = _open(path, roles, columns)
    for name, text in columns.derived:
        refuse_other_rows(path, f"derived {name!r}", text, derived[name])
        schema[name] = _outcome(path, f"derived {name!r}", text, schema, derived[name]).dtype
    for text, condition in conditions.items():
        refuse_other_rows(path, "where", text, condition)
        if _outcome(path, "where", text, schema, condition).dtype != pl.Boolean:
            raise ValueError(f"where: {text!r} must be true or false for each row")

    with _reading(path):
        n_rows = int(rows.select(pl.len()).collect().item())
    if n_rows == 0:
        raise ValueError(f"{path}: the file holds no rows")
    rows = rows.with_row_index(_ROW, offset=1)
    for name, expression in derived.items():  # one after the other: a later one may use an earlier one
        rows = rows.with_columns(expression.alias(name))
    chosen = {"user": pl.col(columns.user), "time": _microseconds(path, columns, schema[columns.time])}
    if columns.order is not None:
        chosen["order"] = as_integer(path, columns.order, schema[columns.order], _for_times(columns))
    for ours, theirs in (("group", columns.group), ("fold", columns.fold)):
        if theirs is not None:
            # As the file says it: as a number two long ids would be one.
            chosen[ours] = said[theirs] if theirs in said else _name(theirs, schema[theirs])
    chosen |= {f"text {place}": _name(name, schema[name]) for place, name in enumerate(columns.texts)}
    for place, name in enumerate(columns.numbers):
        if not (schema[name].is_numeric() or schema[name] in (pl.String, pl.Boolean, pl.Null)):
            raise ValueError(f"{path}: column {name!r} (numeric) must hold numbers, got {schema[name]}")
        chosen[f"number {place}"] = pl.col(name).cast(pl.Float64, strict=False)
    kept = pl.all_horizontal(pl.lit(True), *conditions.values()).fill_null(False)
    with _reading(path):
        frame = rows.filter(kept).select(_ROW, **chosen).collect(engine="streaming")

    def refuse(theirs: str, row: int | None, reason: str, where_missing: str = "") -> None:
        if row is not None:
            cell = said.get(theirs, pl.col(theirs)).alias("said")
            with _reading(path):
                value = rows.filter(pl.col(_ROW) == row).select(cell).collect().item()
            told = f"is missing{where_missing}" if value is None else f"{str(value)!r} {reason}"
            raise ValueError(f"{path}: column {theirs!r}, row {row}: {told}")

    def refuse_kept(ours: str, theirs: str, wrong: pl.Expr, reason: str, where_missing: str = "") -> None:
        refuse(theirs, frame.filter(wrong)[_ROW].min(), reason, where_missing)  # type: ignore[arg-type]

    for name, source in said.items():
        # Over all rows: a condition on what cannot be read is no reason to leave the row out.
        refuse(name, _first(path, rows, source.is_not_null() & pl.col(name).is_null()), "is not a number")
    for name in columns.numbers:
        if schema[name] == pl.String:
            unread = pl.col(name).is_not_null() & pl.col(name).cast(pl.Float64, strict=False).is_null()
            refuse(name, _first(path, rows, kept & unread), "is not a number")
    refuse_kept("user", columns.user, pl.col("user").is_null(), "is missing")
    why = f"; {_WHY_ABSOLUTE}"
    refuse_kept("time", columns.time, pl.col("time").is_null(), f"cannot be read as a time{why}", where_missing=why)
    if not columns.relative_times:
        reason = f"lies before 1971 and looks relative; {_WHY_ABSOLUTE} (relative_times: true allows it)"
        refuse_kept("time", columns.time, pl.col("time") < _FIRST_ABSOLUTE, reason)
    last = columns.max_time or datetime.datetime.now(datetime.UTC).date().isoformat()
    end = int(np.datetime64(last, "D").astype(np.int64) + 1) * DAY
    refuse_kept("time", columns.time, pl.col("time") >= end, f"lies in the future, after {last} (max_time)")
    if columns.order is not None:
        refuse_kept("order", columns.order, pl.col("order").is_null(), "is not an integer")
    for place, name in enumerate(columns.numbers):
        number = pl.col(f"number {place}")
        refuse_kept(f"number {place}", name, ~number.is_finite(), "is not a finite number")
        if name in columns.required_numbers:
            refuse_kept(f"number {place}", name, number.is_null(), "is missing")
    return frame, n_rows


def _tell_unsorted(path: Path, frame: pl.DataFrame) -> None:
    late = pl.col("time") < pl.col("time").cum_max().over("user", order_by=_ROW)
    n_unsorted = int(frame.select(late.sum()).item())
    if n_unsorted:
        logger.info(
            "%s: %d of %d rows lie before an earlier row of their user in time: events are sorted",
            path,
            n_unsorted,
            frame.height,
        )


def _first(path: Path, rows: pl.LazyFrame, wrong: pl.Expr) -> int | None:
    """Number of the first row of which something is true."""
    with _reading(path):
        first: int | None = rows.filter(wrong).select(pl.col(_ROW).min()).collect(engine="streaming").item()
    return first


def _open(
    path: Path, roles: dict[str, str], columns: EventColumns
) -> tuple[pl.LazyFrame, dict[str, pl.DataType], dict[str, pl.Expr]]:
    """Rows with typed columns, their types, and for typed columns of CSV files what the file itself says."""
    is_csv = path.suffix.lower() != ".parquet"
    check_first_bytes(path)
    with _reading(path):
        if is_csv:
            found = pl.scan_csv(path, infer_schema_length=_ROWS_TO_INFER_FROM).collect_schema()
            check_header(path, list(found), list(roles))
            rows = pl.scan_csv(path, infer_schema=False)
        else:
            rows = pl.scan_parquet(path, hive_partitioning=False)
            found = rows.collect_schema()
    require_columns(path, pl.DataFrame(schema=found), roles)
    schema = {name: found[name] for name in roles}
    rows = rows.select(list(roles))
    if not is_csv:
        dtype = schema[columns.user]
        if dtype in (pl.Categorical, pl.Enum):
            schema[columns.user] = pl.String()
            rows = rows.with_columns(pl.col(columns.user).cast(pl.String))
        elif not (dtype.is_integer() or dtype == pl.String):
            raise ValueError(
                f"{path}: column {columns.user!r} (user_column) must hold integers or strings, got {dtype}"
            )
        return rows, schema, {}
    # A quoted empty cell is as empty as one that is not quoted.
    rows = rows.with_columns(pl.when(pl.col(name) != "").then(pl.col(name)).alias(name) for name in roles)
    said = {}
    as_text = {columns.user, *columns.texts} | ({columns.time} if columns.time_format is not None else set())
    for name, dtype in schema.items():
        if name in as_text or dtype not in (pl.Int64, pl.Float64):
            schema[name] = pl.String()
            if name in columns.texts and dtype in (pl.Int64, pl.Float64):
                # As of Parquet: what was written for want of a cell as 5411.0 is the 5411 of another file.
                rows = rows.with_columns(pl.col(name).str.replace(r"^(-?\d+)\.0+$", "${1}"))
            continue
        said[name] = pl.col(f"said {name}")
        if name not in (columns.time, columns.order):
            schema[name] = pl.Float64()  # the first rows may have been whole numbers by chance
    typed = [pl.col(name).cast(schema[name], strict=False) for name in said]
    copies = [pl.col(name).alias(f"said {name}") for name in said]
    return rows.with_columns(copies).with_columns(typed), schema, said


def parse_expression(argument: str, text: str) -> pl.Expr:
    """An SQL expression.

    Raises:
        ValueError: If it is none; names the argument.
    """
    try:
        return pl.sql_expr(text)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{argument}: {text!r} is no SQL expression: {str(error).splitlines()[0]}") from error


def _outcome(path: Path, argument: str, text: str, schema: dict[str, pl.DataType], expression: pl.Expr) -> pl.Series:
    """What an expression gives on no rows: its type, and nothing unless it is a constant."""
    try:
        outcome = pl.DataFrame(schema=schema).select(expression.alias("outcome"))["outcome"]
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: {argument}: {text!r} cannot be computed: {reason}") from error
    if len(outcome):
        raise ValueError(f"{argument}: {text!r} must be computed row by row, it gives one value for all rows")
    return outcome


def _name(column: str, dtype: pl.DataType) -> pl.Expr:
    """Cells as names. Whole numbers are named alike whether a file holds integers or, for want of a cell, floats."""
    value = pl.col(column)
    if not dtype.is_float():
        return value.cast(pl.String)
    value = value.fill_nan(None)
    whole = (value == value.round()) & (value.abs() <= 2**53)
    return pl.when(whole).then(value.cast(pl.Int64, strict=False).cast(pl.String)).otherwise(value.cast(pl.String))


def _for_times(columns: EventColumns) -> Columns:
    unit = columns.time_unit if columns.time_unit in ("s", "ms", "us") else "s"
    return Columns(
        user=columns.user,
        item="",
        time=columns.time,
        order=columns.order,
        time_format=columns.time_format,
        time_unit=unit,
        where=(),
    )


def _microseconds(path: Path, columns: EventColumns, dtype: pl.DataType) -> pl.Expr:
    if dtype.is_numeric():
        if columns.time_unit is None and columns.time_format is None:
            raise ValueError(
                f"{path}: column {columns.time!r} (time_column) holds {dtype} without time_unit; {_WHY_ABSOLUTE}"
            )
        if columns.time_unit == "days":
            return (pl.col(columns.time).cast(pl.Float64) * DAY).round().cast(pl.Int64, strict=False)
    return as_integer(path, columns.time, dtype, _for_times(columns))


def _without_duplicates(frame: pl.DataFrame, paths: Sequence[Path], columns: EventColumns) -> tuple[pl.DataFrame, int]:
    keys = [name for name in frame.columns if name not in (_ROW, "file")]
    first = frame.sort("file", _ROW).unique(keys, keep="first", maintain_order=True)
    n_duplicates = frame.height - first.height
    if n_duplicates and columns.duplicates == "error":
        again = frame.join(first, on=["file", _ROW], how="anti").sort("file", _ROW).row(0, named=True)
        raise ValueError(
            f"{paths[again['file']]}: row {again[_ROW]}: repeats an earlier row in every column read (user "
            f"{again['user']!r}), as do {n_duplicates - 1} more; duplicates: 'keep' or 'drop' says what they mean"
        )
    if n_duplicates:
        logger.info("%d repeated rows: %s", n_duplicates, columns.duplicates)
    return (first if columns.duplicates == "drop" else frame), n_duplicates


def _plain_integers(ids: pl.Series) -> pl.Series:
    numbers = ids.cast(pl.Int64, strict=False)
    return numbers if not numbers.has_nulls() and (numbers.cast(pl.String) == ids).all() else ids


def _one_kind_of_integers(frame: pl.DataFrame, paths: Sequence[Path], column: str) -> pl.DataFrame:
    """Ids of files with signed and unsigned integers meet in 128 bits, which nothing here reads."""
    if frame["user"].dtype != pl.Int128:
        return frame
    for kind in (pl.Int64, pl.UInt64):
        ids = frame["user"].cast(kind, strict=False)
        if not ids.has_nulls():
            return frame.with_columns(user=ids)
    raise ValueError(
        f"{paths[-1]}: column {column!r} (user_column): negative ids here or in {paths[0]}, and others beyond "
        f"{2**63 - 1}: no integer of 64 bits holds both"
    )


def without_summer_time(times: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Dates of a zone with summer time as dates of one offset from UTC, so that days are days.

    Midnights of such a zone are 23, 24 or 25 hours apart: in UTC they look like hours, and a query an hour after one
    would see all that carries its date. Taken for dates are stamps at least 23 hours apart that have just two times of
    the day, an hour or less from each other; those that have not the first stamp's are moved to it.

    Args:
        times: ``(E,)`` microseconds.

    Returns:
        Times ``(E,)``, and how many were moved.
    """
    stamps = np.unique(times)
    of_day = np.unique(stamps % DAY)
    if len(of_day) != 2 or np.diff(stamps).min() < 23 * HOUR:
        return times, 0
    ahead = (times - stamps[0]) % DAY  # 0 of the first stamp's offset, else the hour or, before midnight, a day less it
    shift = np.where(ahead > DAY // 2, ahead - DAY, ahead)
    if np.abs(shift).max() > HOUR:
        return times, 0
    return times - shift, int((shift != 0).sum())


def _dense(column: pl.Series) -> NDArray[np.int64]:
    """Place of each value among the distinct ones in increasing order."""
    return (column.rank("dense").cast(pl.Int64) - 1).to_numpy()


def _of_user(
    frame: pl.DataFrame, paths: Sequence[Path], ours: str, theirs: str, offsets: NDArray[np.int64]
) -> pl.Series:
    """The one value of each user."""
    column = frame[ours].fill_null(MISSING)
    first = column.gather(np.repeat(offsets[:-1], np.diff(offsets)))
    other = (column != first).arg_true()
    if len(other):
        row = frame.row(other[0], named=True)
        raise ValueError(
            f"{paths[row['file']]}: column {theirs!r}, row {row[_ROW]}: user {row['user']!r} is in "
            f"{column[other[0]]!r} and in {first[other[0]]!r}, each user must be in one"
        )
    return column.gather(offsets[:-1])


def _folds(frame: pl.DataFrame, paths: Sequence[Path], column: str, offsets: NDArray[np.int64]) -> NDArray[np.int8]:
    said = _of_user(frame, paths, "fold", column, offsets)
    known = ["train", "validation", "test"]
    wrong = said.filter(~said.is_in(known))
    if len(wrong):
        raise ValueError(f"{paths[0]}: column {column!r}: {wrong[0]!r} is none of {', '.join(known)}")
    return said.replace_strict(known, [0, 1, 2], return_dtype=pl.Int8).to_numpy()
