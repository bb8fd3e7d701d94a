"""What the columns of a table of interactions mean, and times of every kind as integers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl

TimeUnit = Literal["s", "ms", "us", "ns"]

_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
# ISO 8601 with a blank for the T: whether the text ends in an offset from UTC, and its form
_ISO_FORMS = (
    (False, "%Y-%m-%d %H:%M:%S%.f"),
    (True, "%Y-%m-%d %H:%M:%S%.f%#z"),
    (False, "%Y-%m-%d %H:%M"),
    (False, "%Y-%m-%d"),
)


@dataclass(frozen=True)
class Columns:
    """What the columns mean.

    Attributes:
        user: Column of user ids, integers or strings.
        item: Column of item ids, integers or strings.
        time: Column of times, or None.
        order: Column of integers or times that orders the rows of one user, or of one user and time, or None.
        time_format: strptime form of times given as strings; None is ISO 8601.
        time_unit: Unit of times given as numbers, since 1970-01-01 UTC.
        where: SQL conditions on single rows; a row is kept if all are true (neither false nor null).
    """

    user: str
    item: str
    time: str | None
    order: str | None
    time_format: str | None
    time_unit: TimeUnit
    where: tuple[str, ...]

    def named(self) -> dict[str, str]:
        """Setting -> column, for those that are set."""
        named = {"user_column": self.user, "item_column": self.item, "time_column": self.time}
        return {key: column for key, column in (named | {"order_column": self.order}).items() if column is not None}

    def ids(self) -> dict[str, str]:
        """Setting -> column, for the ids."""
        return {"user_column": self.user, "item_column": self.item}

    def orders(self) -> dict[str, str]:
        """Our column -> theirs, for what orders the rows; the order column plays the time where there is none."""
        if self.time is None:
            assert self.order is not None
            return {"time": self.order}
        return {"time": self.time} | ({"order": self.order} if self.order is not None else {})


def as_integer(path: Path, column: str, dtype: pl.DataType, columns: Columns) -> pl.Expr:
    """Microseconds of a time, or the value of an order column; null where it cannot be read.

    Args:
        path: File, for the message.
        column: The time or the order column.
        dtype: Its type in this file.
        columns: What the columns mean.

    Raises:
        ValueError: If the type is none that can be read.
    """
    value = pl.col(column)
    is_time = column == columns.time
    if is_time and columns.time_format is not None:
        if not (dtype == pl.String or dtype.is_integer()):
            raise ValueError(f"{path}: column {column!r} holds {dtype}, time_format is for strings")
        parsed = value.cast(pl.String).str.strptime(pl.Datetime("us"), columns.time_format, strict=False)
        return parsed.dt.epoch("us")
    if isinstance(dtype, pl.Datetime | pl.Date):
        return value.dt.epoch("us")
    if dtype.is_integer() and is_time:
        number = value.cast(pl.Int64, strict=False)
        if columns.time_unit == "ns":
            return number // 1000
        scale = _PER_SECOND["us"] // _PER_SECOND[columns.time_unit]
        return pl.when(number.abs() <= (2**63 - 1) // scale).then(number * scale)
    if dtype.is_float() and is_time:
        micros = (value.cast(pl.Float64) * (_PER_SECOND["us"] / _PER_SECOND[columns.time_unit])).round()
        return micros.cast(pl.Int64, strict=False)
    if dtype.is_integer():
        return value.cast(pl.Int64, strict=False)
    if dtype == pl.String and is_time:
        text = value.str.replace("T", " ", literal=True)
        forms = [
            text.str.strptime(pl.Datetime("us", "UTC" if offset else None), form, strict=False).dt.epoch("us")
            for offset, form in _ISO_FORMS
        ]
        return pl.coalesce(forms)
    allowed = "dates, numbers or strings" if is_time else "integers or dates"
    role = "time_column" if is_time else "order_column"
    raise ValueError(f"{path}: column {column!r} ({role}) must hold {allowed}, got {dtype}")
