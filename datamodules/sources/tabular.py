"""Interactions from CSV and Parquet: checked, filtered and encoded in streams, so that a file may exceed memory.

What is in memory at the end is the encoded table, 16 bytes a row, and the tables of distinct ids.
"""

import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from datamodules.sources.cells import some
from datamodules.sources.columns import Columns, as_integer
from datamodules.sources.first_bytes import check_first_bytes, check_header
from datamodules.sources.row_wise import refuse_other_rows

Step = dict[str, str | int]

_ROWS_TO_INFER_FROM = 10_000
_UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Interactions:
    """The encoded table, in no particular order.

    Attributes:
        users: ``(n,) int32`` row in ``user_ids``.
        items: ``(n,) int32`` row in ``item_ids``.
        times: ``(n,) int64`` microseconds since 1970-01-01 UTC; the order column where there is no time column.
        order: ``(n,) int64`` order column where there are times too, else None.
        user_ids: Distinct original ids, increasing.
        item_ids: Distinct original ids, increasing.
        steps: Count of each step.
    """

    users: NDArray[np.int32]
    items: NDArray[np.int32]
    times: NDArray[np.int64]
    order: NDArray[np.int64] | None
    user_ids: pl.Series
    item_ids: pl.Series
    steps: list[Step]


@dataclass(frozen=True)
class _File:
    """One file: its rows with typed columns under their own names, and text of CSV columns under ``raw:<name>``."""

    path: Path
    rows: pl.LazyFrame
    dtypes: dict[str, pl.DataType]
    is_csv: bool

    def said(self, column: str) -> pl.Expr:
        """What the file itself says in a column."""
        return pl.col(f"raw:{column}" if self.is_csv else column)


def read_interactions(paths: Sequence[Path], columns: Columns) -> Interactions:
    """Check, filter and encode files.

    Three streaming passes read only the columns that are needed: counts and checks, distinct ids, encoding. Repeated
    rows are kept: a repeat is an event of its own. Files may mix both formats if the columns agree in type.

    Ids of CSV files are read as text. If every id of a column is written as a plain integer (no leading zeros) they
    become integers, else they stay strings. Beside Parquet files with integer ids they must be so written. Other CSV
    columns get the type that their first 10,000 rows suggest; a later value of another type is an error. NaN in a
    column counts as missing: ``rating > 3`` is not true of it. Rows are counted from 1, the header of a CSV file not
    included.

    Raises:
        ValueError: In one line with file, column and row, if a file cannot be read or is empty, a column is missing
            or of a wrong type, a condition does not parse, is no condition or reads other rows, an id or a time is
            missing or unreadable in a row that is kept, an id changes as an integer, or no row is kept.
    """
    conditions = [_parse_condition(text) for text in columns.where]
    needed = sorted({*columns.named().values(), *(name for c in conditions for name in c.meta.root_names())})
    files = [_open(path, columns, needed) for path in paths]
    id_dtypes = {column: _common_id_dtype(files, column, role) for role, column in columns.ids().items()}
    for file in files:
        for text, condition in zip(columns.where, conditions, strict=True):
            _check_condition(file, text, condition)
    steps = _check_values(files, columns, conditions, id_dtypes)

    encoded = pl.concat([_select(file, columns, conditions, id_dtypes) for file in files])
    with _reading(paths):
        distinct = pl.collect_all([encoded.select(name).unique() for name in ("user", "item")], engine="streaming")
        tables = [_id_table(frame.to_series(), files) for frame in distinct]
        for name, table in zip(("user", "item"), tables, strict=True):
            codes = table.select(
                pl.col("key").alias(name), pl.int_range(pl.len(), dtype=pl.Int32).alias(f"{name}_code")
            )
            encoded = encoded.join(codes.lazy(), on=name, how="inner")
        kept = encoded.select("user_code", "item_code", *columns.orders()).collect(engine="streaming")
    user_ids, item_ids = (table["id"] for table in tables)
    steps.append({"step": "distinct ids", "interactions": kept.height, "users": len(user_ids), "items": len(item_ids)})
    # A column in parts is copied to be one array: each is let go before the next.
    arrays = {name: kept.drop_in_place(name).to_numpy() for name in kept.columns}
    return Interactions(
        users=arrays["user_code"],
        items=arrays["item_code"],
        times=arrays["time"],
        order=arrays.get("order"),
        user_ids=user_ids,
        item_ids=item_ids,
        steps=steps,
    )


@contextmanager
def _reading(paths: Sequence[Path]) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{paths[0]}: no such file") from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        names = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
        kind = "CSV" if paths[0].suffix.lower() == ".csv" else "Parquet"
        # A condition that cannot be computed of some cell is no damage.
        damage = "" if isinstance(error, pl.exceptions.InvalidOperationError) else ", truncated or damaged"
        raise ValueError(f"{names}: cannot be read as {kind}{damage}: {reason}") from error


def _parse_condition(text: str) -> pl.Expr:
    try:
        return pl.sql_expr(text)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"where: {text!r} is not an SQL condition: {str(error).splitlines()[0]}") from error


def _check_condition(file: _File, text: str, condition: pl.Expr) -> None:
    refuse_other_rows(file.path, "where", text, condition)
    # No rows in, no rows out: a constant gives one. An empty frame also finds wrong types.
    empty = pl.DataFrame(schema=file.dtypes)
    try:
        outcome = empty.select(condition.alias("outcome"))["outcome"]
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{file.path}: where: {text!r} cannot be computed: {str(error).splitlines()[0]}") from error
    if outcome.dtype != pl.Boolean or len(outcome):
        raise ValueError(f"where: {text!r} must be true or false for each row, it gives {outcome.dtype}")


def _open(path: Path, columns: Columns, needed: list[str]) -> _File:
    is_csv = path.suffix.lower() == ".csv"
    check_first_bytes(path)
    with _reading([path]):
        if is_csv:
            schema = pl.scan_csv(path, infer_schema_length=_ROWS_TO_INFER_FROM).collect_schema()
            check_header(path, list(schema), needed)
            rows = pl.scan_csv(path, infer_schema=False)
        else:
            rows = pl.scan_parquet(path, hive_partitioning=False)
            schema = rows.collect_schema()
    roles = {column: role for role, column in columns.named().items()}
    for name in needed:
        if name not in schema:
            near = difflib.get_close_matches(name.lower(), [n.lower() for n in schema], n=3, cutoff=0.5)
            hint = [n for n in schema if n.lower() in near] or list(schema)
            word = "nearest" if near else "it has"
            raise ValueError(f"{path}: no column {name!r} ({roles.get(name, 'where')}), {word}: {some(hint)}")
    dtypes: dict[str, pl.DataType] = {name: schema[name] for name in needed}
    if not is_csv:
        return _File(path, rows.select(_without_nan(pl.col(n), dtypes[n]) for n in needed), dtypes, is_csv)

    for name in needed:
        as_text = name in columns.ids().values() or (name == columns.time and columns.time_format is not None)
        if as_text or dtypes[name] not in (pl.Int64, pl.Float64, pl.Boolean):
            dtypes[name] = pl.String()
    typed = [_without_nan(_from_text(name, dtype), dtype) for name, dtype in dtypes.items()]
    return _File(path, rows.select(pl.col(needed).name.prefix("raw:")).with_columns(typed), dtypes, is_csv)


def _without_nan(values: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    # Polars orders NaN above every number: it would satisfy `rating > 3`.
    return values.fill_nan(None) if dtype.is_float() else values


def _from_text(name: str, dtype: pl.DataType) -> pl.Expr:
    text = pl.col(f"raw:{name}")
    if dtype == pl.Boolean:
        known = pl.when(text == "true").then(pl.lit(True)).when(text == "false").then(pl.lit(False))
        return known.otherwise(pl.lit(None, dtype=pl.Boolean)).alias(name)
    return text.cast(dtype, strict=False).alias(name)


def _common_id_dtype(files: list[_File], column: str, role: str) -> pl.DataType:
    """The type in which the ids of all files can be compared."""
    chosen: pl.DataType | None = None
    for file in (file for file in files if not file.is_csv):
        dtype = file.dtypes[column]
        if dtype in (pl.Categorical, pl.Enum):
            dtype = pl.String()
        if not (dtype.is_integer() or dtype == pl.String):
            raise ValueError(f"{file.path}: column {column!r} ({role}) must hold integers or strings, got {dtype}")
        if chosen is not None and dtype != chosen:
            if not (chosen.is_integer() and dtype.is_integer()):
                raise ValueError(
                    f"{file.path}: column {column!r} ({role}) holds {dtype}, in an earlier file it holds {chosen}"
                )
            dtype = pl.Int64()
        chosen = dtype
    return pl.String() if chosen is None else chosen


def _kept(conditions: list[pl.Expr]) -> pl.Expr:
    return pl.all_horizontal(pl.lit(True), *conditions).fill_null(False)


def _select(file: _File, columns: Columns, conditions: list[pl.Expr], ids: dict[str, pl.DataType]) -> pl.LazyFrame:
    """The rows kept of one file, under our names: user, item, time and maybe order."""
    return file.rows.filter(_kept(conditions)).select(
        pl.col(columns.user).cast(ids[columns.user]).alias("user"),
        pl.col(columns.item).cast(ids[columns.item]).alias("item"),
        *(
            as_integer(file.path, theirs, file.dtypes[theirs], columns).alias(ours)
            for ours, theirs in columns.orders().items()
        ),
    )


def _check_values(
    files: list[_File], columns: Columns, conditions: list[pl.Expr], ids: dict[str, pl.DataType]
) -> list[Step]:
    """Count the rows each condition leaves, and refuse rows that cannot be used."""
    totals = np.zeros(len(conditions) + 1, dtype=np.int64)
    checks = [_faults(file, columns, conditions, ids) for file in files]
    for file, faults in zip(files, checks, strict=True):
        counted = [_kept(conditions[:k]).sum().alias(f"left {k}") for k in range(1, len(conditions) + 1)]
        found = [fault.sum().alias(f"fault {k}") for k, (_, _, fault) in enumerate(faults)]
        with _reading([file.path]):
            result = file.rows.select(pl.len().alias("left 0"), *counted, *found).collect(engine="streaming")
        row = result.row(0, named=True)
        if row["left 0"] == 0:
            raise ValueError(f"{file.path}: the file holds no rows")
        totals += [row[f"left {k}"] for k in range(len(conditions) + 1)]
        for k, (column, reason, fault) in enumerate(faults):
            if row[f"fault {k}"]:
                _refuse(file, column, reason, fault)
    steps: list[Step] = []
    for name, total in zip(["read", *(f"where {text}" for text in columns.where)], totals.tolist(), strict=True):
        steps.append({"step": name, "interactions": total})
        logger.info("%s: %d interactions", name, total)
        if total == 0:
            raise ValueError(f"nothing is left after step {name!r}: 0 of {int(totals[0])} rows")
    return steps


def _faults(
    file: _File, columns: Columns, conditions: list[pl.Expr], ids: dict[str, pl.DataType]
) -> list[tuple[str, str, pl.Expr]]:
    """(column, what is wrong, which rows) for everything a row can have wrong."""
    kept = _kept(conditions)
    faults = []
    for column, dtype in file.dtypes.items():
        if file.is_csv and dtype != pl.String:
            wrong = file.said(column).is_not_null() & _from_text(column, dtype).is_null()  # NaN can be read
            faults.append((column, f"is not {_article(dtype)}", wrong))
    faults += [(column, "is missing", kept & file.said(column).is_null()) for column in columns.named().values()]
    for column, dtype in ids.items():
        wrong = pl.col(column).is_not_null() & pl.col(column).cast(dtype, strict=False).is_null()
        faults.append((column, f"is not {_article(dtype)}, as in the other files", kept & wrong))
        if file.is_csv and dtype.is_integer():
            # "007" and "7" would become one user.
            changed = pl.col(column) != pl.col(column).cast(dtype, strict=False).cast(pl.String)
            reason = "is not an integer without leading zeros or sign, as in the other files"
            faults.append((column, reason, kept & changed))
    for column in columns.orders().values():
        form = (
            f"as {columns.time_format!r}" if columns.time_format else f"as ISO 8601 or a number of {columns.time_unit}"
        )
        reason = f"cannot be read as a time ({form})" if column == columns.time else "is not an integer"
        wrong = file.said(column).is_not_null() & as_integer(file.path, column, file.dtypes[column], columns).is_null()
        faults.append((column, reason, kept & wrong))
    return faults


def _article(dtype: pl.DataType) -> str:
    return "an integer" if dtype.is_integer() else "a number" if dtype.is_float() else f"a {dtype}"


def _refuse(file: _File, column: str, reason: str, fault: pl.Expr) -> None:
    rows = file.rows.with_row_index("row number", offset=1).filter(fault)
    with _reading([file.path]):
        said = rows.select("row number", file.said(column).alias("said")).bottom_k(1, by="row number")
        first = said.collect(engine="streaming").row(0)
    value = "" if first[1] is None else f"{first[1]!r} "
    raise ValueError(f"{file.path}: column {column!r}, row {first[0]}: {value}{reason}")


def _id_table(distinct: pl.Series, files: list[_File]) -> pl.DataFrame:
    """Columns ``key`` (as in the stream) and ``id`` (as given back), increasing by id."""
    table = pl.DataFrame({"key": distinct, "id": distinct})
    if distinct.dtype == pl.String and all(file.is_csv for file in files):
        numbers = distinct.cast(pl.Int64, strict=False)
        if not numbers.has_nulls() and (numbers.cast(pl.String) == distinct).all():
            table = table.with_columns(id=numbers)
    return table.sort("id")
