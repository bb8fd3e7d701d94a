"""Reading of event files: equal results from equal data, and one clear line for each kind of bad input."""

import datetime
import gzip
import logging
import re

import numpy as np
import polars as pl
import pytest

from datamodules.sources.events import DAY, MISSING, EventColumns, read_events, without_summer_time


def columns(**arguments) -> EventColumns:
    settings = {
        "user": "user",
        "time": "time",
        "order": None,
        "texts": ("kind",),
        "numbers": ("amount",),
        "required_numbers": ("amount",),
        "group": None,
        "fold": None,
        "derived": (),
        "where": (),
        "time_format": None,
        "time_unit": None,
        "relative_times": False,
        "max_time": None,
        "duplicates": "error",
    }
    return EventColumns(**(settings | arguments))


@pytest.fixture
def frame() -> pl.DataFrame:
    rng = np.random.default_rng(0)
    n = 300
    seconds = rng.choice(60, n) * 3600 + 1_400_000_000
    return pl.DataFrame(
        {
            "user": rng.integers(1, 12, n),
            "time": pl.Series(seconds * 10**6).cast(pl.Datetime("us")),
            "place": np.arange(n),
            "kind": rng.choice(["a", "b", "c c", "d"], n),
            "amount": rng.normal(size=n).round(3),
        }
    )


def same(left, right):
    assert left.user_ids.to_list() == right.user_ids.to_list()
    assert left.names == right.names
    for name in ("offsets", "times", "codes", "numbers"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


def test_parquet_csv_and_gzip_give_the_same(tmp_path, frame):
    frame.write_parquet(tmp_path / "e.parquet")
    frame.write_csv(tmp_path / "e.csv")
    (tmp_path / "e.csv.gz").write_bytes(gzip.compress((tmp_path / "e.csv").read_bytes()))
    first = read_events([tmp_path / "e.parquet"], columns())
    for name in ("e.csv", "e.csv.gz"):
        same(first, read_events([tmp_path / name], columns()))
    ordered = frame.sort("user", "time", "place")
    np.testing.assert_array_equal(first.times, ordered["time"].dt.epoch("us").to_numpy())
    np.testing.assert_array_equal(first.numbers[:, 0], ordered["amount"].to_numpy())
    assert [first.names[0][code] for code in first.codes[:, 0]] == ordered["kind"].to_list()
    assert np.repeat(first.user_ids, np.diff(first.offsets)).tolist() == ordered["user"].to_list()


def test_unsorted_rows_are_sorted_and_ties_follow_the_order_column(tmp_path, frame):
    frame.write_parquet(tmp_path / "e.parquet")
    frame.sample(fraction=1, shuffle=True, seed=3).write_parquet(tmp_path / "shuffled.parquet")
    by_place = columns(order="place")
    same(read_events([tmp_path / "e.parquet"], by_place), read_events([tmp_path / "shuffled.parquet"], by_place))
    frame.with_columns(place=-pl.col("place")).write_parquet(tmp_path / "back.parquet")
    back = read_events([tmp_path / "back.parquet"], by_place)
    expected = frame.sort("user", "time", "place", descending=[False, False, True])["amount"]
    assert back.numbers[:, 0].tolist() == expected.to_list()


def test_whole_numbers_are_named_alike_whatever_a_file_holds_them_as(tmp_path):
    """Whoever misses one cell of a column of integers writes floats."""
    day = pl.Series([1_600_000_000, 1_600_000_100]).cast(pl.Int64) * 10**6
    rows = {"user": [1, 2], "time": day.cast(pl.Datetime("us")), "amount": [1.0, 2.0]}
    pl.DataFrame(rows | {"kind": [5411, 5812]}).write_parquet(tmp_path / "whole.parquet")
    pl.DataFrame(rows | {"user": [3, 4], "kind": [5411.0, None]}).write_parquet(tmp_path / "missing.parquet")
    pl.DataFrame(rows | {"user": [5, 6], "kind": [5812.0, float("nan")]}).write_parquet(tmp_path / "nan.parquet")
    rows = rows | {"time": ["2020-01-01", "2020-01-02"]}
    pl.DataFrame(rows | {"user": [7, 8], "kind": ["5411.0", None]}).write_csv(tmp_path / "text.csv")
    pl.DataFrame(rows | {"user": [9, 10], "kind": ["5411.5", "5411.0"]}).write_csv(tmp_path / "half.csv")
    files = [tmp_path / name for name in ("whole.parquet", "missing.parquet", "nan.parquet")]
    found = read_events(files, columns())
    assert [found.names[0][code] for code in found.codes[:, 0]] == ["5411", "5812", "5411", MISSING, "5812", MISSING]
    found = read_events([tmp_path / "text.csv", tmp_path / "half.csv"], columns())
    assert [found.names[0][code] for code in found.codes[:, 0]] == ["5411", MISSING, "5411.5", "5411"]
    pl.DataFrame({"user": ["1.0"], "time": ["2020-01-01"], "kind": ["v1.0"], "amount": [1]}).write_csv(
        tmp_path / "version.csv"
    )
    assert read_events([tmp_path / "version.csv"], columns()).names[0] == ["v1.0"], "no number, and stays as it is"


def test_signed_and_unsigned_ids_meet(tmp_path):
    rows = {"time": pl.Series([1_600_000_000] * 2) * 10**6, "kind": ["a", "b"], "amount": [1.0, 2.0]}
    frame = pl.DataFrame(rows).with_columns(pl.col("time").cast(pl.Datetime("us")))
    frame.with_columns(user=pl.Series([1, 2], dtype=pl.UInt64)).write_parquet(tmp_path / "unsigned.parquet")
    frame.with_columns(user=pl.Series([3, 2**63 - 1], dtype=pl.Int64)).write_parquet(tmp_path / "signed.parquet")
    frame.with_columns(user=pl.Series([3, 2**63], dtype=pl.UInt64)).write_parquet(tmp_path / "large.parquet")
    frame.with_columns(user=pl.Series([-3, 4], dtype=pl.Int64)).write_parquet(tmp_path / "negative.parquet")

    def ids(*names):
        return read_events([tmp_path / f"{name}.parquet" for name in names], columns()).user_ids.to_list()

    assert ids("unsigned", "signed") == [1, 2, 3, 2**63 - 1]
    assert ids("unsigned", "large") == [1, 2, 3, 2**63]
    assert ids("unsigned", "negative") == [-3, 1, 2, 4]
    with pytest.raises(ValueError, match=r"negative.parquet: column 'user' \(user_column\): negative ids"):
        ids("large", "negative")


@pytest.mark.parametrize("zone", ["Europe/Berlin", "Europe/London", "America/New_York", "Pacific/Auckland", "UTC"])
def test_dates_of_a_zone_with_summer_time_are_days_apart(tmp_path, caplog, zone):
    days = pl.date_range(datetime.date(2021, 2, 1), datetime.date(2022, 1, 31), "1d", eager=True)
    frame = pl.DataFrame({"user": np.arange(len(days)) % 7, "time": days, "kind": "a", "amount": np.arange(len(days))})
    frame.with_columns(pl.col("time").cast(pl.Datetime("us")).dt.replace_time_zone(zone)).write_parquet(
        tmp_path / "zone.parquet"
    )
    with caplog.at_level(logging.WARNING, logger="datamodules"):
        found = read_events([tmp_path / "zone.parquet"], columns())
    assert np.unique(np.diff(np.unique(found.times))).tolist() == [DAY]
    assert ("dates in a zone with summer time" in caplog.text) == (zone != "UTC")
    # Before its first change of the clock, a file that ends there tells the same.
    frame.head(20).with_columns(pl.col("time").cast(pl.Datetime("us")).dt.replace_time_zone(zone)).write_parquet(
        tmp_path / "winter.parquet"
    )
    early = read_events([tmp_path / "winter.parquet"], columns())
    assert np.isin(early.times, found.times).all()


def test_hours_are_not_taken_for_summer_time():
    hour = DAY // 24
    for stamps in (
        [0, DAY, 2 * DAY + hour, 2 * DAY + 2 * hour],
        [0, DAY + 2 * hour, 2 * DAY],
        [0, hour],
        [0, 1, DAY],
        [5],
    ):
        times, n_moved = without_summer_time(np.array(stamps))
        assert (times.tolist(), n_moved) == (stamps, 0)
    times, n_moved = without_summer_time(np.array([0, 3 * DAY + hour, 3 * DAY + hour, 5 * DAY]))
    assert (times.tolist(), n_moved) == ([0, 3 * DAY, 3 * DAY, 5 * DAY], 2)


def test_how_many_rows_are_unsorted_is_said_in_one_line_a_file(tmp_path, caplog):
    times = [3, 1, 2, 5, 4, 9, 4, 9]
    users = [1, 1, 1, 1, 2, 1, 2, 2]  # rows 2 and 3 are late for user 1, ties and changes of the user are none
    rows = {"user": users, "time": [1_600_000_000 + time for time in times], "kind": ["a"] * 8, "amount": range(8)}
    frame = pl.DataFrame(rows)
    frame.write_csv(tmp_path / "unsorted.csv")
    frame.sort("time").write_parquet(tmp_path / "by time.parquet")
    frame.sort("user", "time").write_parquet(tmp_path / "by user.parquet")
    with caplog.at_level(logging.INFO, logger="datamodules"):
        for name in ("by time.parquet", "by user.parquet"):
            read_events([tmp_path / name], columns(time_unit="s"))
    assert caplog.messages == []
    with caplog.at_level(logging.INFO, logger="datamodules"):
        read_events([tmp_path / "unsorted.csv"], columns(time_unit="s"))
    path = tmp_path / "unsorted.csv"
    assert caplog.messages == [
        f"{path}: 2 of 8 rows lie before an earlier row of their user in time: events are sorted"
    ]


def test_several_files_are_one(tmp_path, frame):
    frame.write_parquet(tmp_path / "all.parquet")
    frame[:100].write_parquet(tmp_path / "a.parquet")
    frame[100:].write_parquet(tmp_path / "b.parquet")
    parts = read_events([tmp_path / "a.parquet", tmp_path / "b.parquet"], columns())
    same(read_events([tmp_path / "all.parquet"], columns()), parts)


@pytest.mark.parametrize(("unit", "per_day"), [("s", 86_400), ("ms", 86_400_000), ("us", DAY), ("days", 1)])
def test_numbers_with_a_unit_are_times(tmp_path, unit, per_day):
    days = [12_000, 15_000, 15_001]
    pl.DataFrame({"user": [1, 1, 2], "time": [d * per_day for d in days], "kind": "a", "amount": 1.0}).write_csv(
        tmp_path / "e.csv"
    )
    table = read_events([tmp_path / "e.csv"], columns(time_unit=unit))
    assert table.times.tolist() == [d * DAY for d in days]


def test_dates_zones_and_formats(tmp_path, frame):
    frame = frame[:3].with_columns(user=pl.Series([1, 2, 3]))
    zoned = frame.with_columns(time=pl.col("time").dt.replace_time_zone("UTC").dt.convert_time_zone("Asia/Tokyo"))
    frame.write_parquet(tmp_path / "e.parquet")
    zoned.write_parquet(tmp_path / "zoned.parquet")
    frame.with_columns(time=pl.col("time").dt.strftime("%d.%m.%Y %H:%M")).write_csv(tmp_path / "e.csv")
    plain = read_events([tmp_path / "e.parquet"], columns()).times
    np.testing.assert_array_equal(plain, read_events([tmp_path / "zoned.parquet"], columns()).times)
    said = read_events([tmp_path / "e.csv"], columns(time_format="%d.%m.%Y %H:%M")).times
    # the frame's times are whole hours but for a constant of 1,400,000,000 s, which the minutes cut
    np.testing.assert_array_equal(plain // 60_000_000, said // 60_000_000)
    frame.with_columns(pl.col("time").dt.date()).write_parquet(tmp_path / "days.parquet")
    days = read_events([tmp_path / "days.parquet"], columns()).times
    np.testing.assert_array_equal(days, plain // DAY * DAY)


def test_conditions_derived_columns_and_missing_cells(tmp_path):
    frame = pl.DataFrame(
        {
            "user": ["a", "a", "b", None],
            "time": ["2020-01-01", "2020-01-02 10:00", "2020-01-03T00:00:00", "2020-01-04"],
            "kind": ["x", None, "y", "z"],
            "quantity": [2, 3, 5, 7],
            "price": [1.5, None, 2.0, 3.0],
        }
    )
    frame.write_csv(tmp_path / "e.csv")
    asked = columns(
        derived=(("amount", "quantity * price"),),
        where=('"user" IS NOT NULL', "quantity < 6"),
        required_numbers=(),
    )
    table = read_events([tmp_path / "e.csv"], asked)
    np.testing.assert_array_equal(table.numbers[:, 0], [3.0, np.nan, 10.0])
    assert [table.names[0][code] for code in table.codes[:, 0]] == ["x", MISSING, "y"]
    assert table.counts == {"read": 4, "kept": 3, "duplicates": 0, "events": 3}
    with pytest.raises(ValueError, match=r"column 'amount', row 2: is missing"):
        read_events([tmp_path / "e.csv"], columns(derived=asked.derived, where=asked.where))


def test_a_derived_column_may_use_an_earlier_one(tmp_path):
    pl.DataFrame(GOOD).write_csv(tmp_path / "e.csv")
    table = read_events([tmp_path / "e.csv"], columns(numbers=("d",), derived=(("c", "amount * 2"), ("d", "c + 1"))))
    assert table.numbers[:, 0].tolist() == [3.0, 6.0]


def test_an_expression_need_not_be_defined_for_what_the_file_does_not_have(tmp_path):
    days = ["2020-02-29", "2021-03-31", "2020-12-30"]  # 2021-02-29 and 2020-02-31 are no dates
    parts = {name: [f"{day.split('-')[place]}x" for day in days] for place, name in enumerate("ymd")}
    pl.DataFrame({"user": [1, 2, 3], "time": days, "kind": ["x"] * 3, "amount": [1, 2, 3]} | parts).write_csv(
        tmp_path / "e.csv"
    )
    day = "LEFT(y, 4) || '-' || LEFT(m, 2) || '-' || LEFT(d, 2)"
    for text in (f"DATE({day})", f"STRPTIME({day}, '%Y-%m-%d')"):
        asked = columns(texts=("day",), derived=(("day", text),), where=("day > DATE '2020-03-01'",))
        table = read_events([tmp_path / "e.csv"], asked)
        assert [name[:10] for name in table.names[0]] == ["2020-12-30", "2021-03-31"]


def test_duplicates(tmp_path, frame):
    twice = pl.concat([frame, frame[[4, 7]]]).drop("place")
    twice.write_parquet(tmp_path / "e.parquet")
    with pytest.raises(ValueError, match=r"row 301: repeats .*as do 1 more; duplicates: 'keep' or 'drop'"):
        read_events([tmp_path / "e.parquet"], columns())
    assert len(read_events([tmp_path / "e.parquet"], columns(duplicates="keep")).times) == 302
    dropped = read_events([tmp_path / "e.parquet"], columns(duplicates="drop"))
    frame.write_parquet(tmp_path / "once.parquet")
    same(dropped, read_events([tmp_path / "once.parquet"], columns()))


GOOD = {"user": ["1", "2"], "time": ["2020-01-01", "2020-01-02"], "kind": ["a", "b"], "amount": ["1", "2.5"]}

BAD = {
    "wrong column": ({}, {"user": "usr"}, "no column 'usr' (user_column), nearest: user"),
    "wrong feature": ({}, {"texts": ("kid",)}, "no column 'kid' (categorical), nearest: kind"),
    "missing user": ({"user": ["1", ""]}, {}, "column 'user', row 2: is missing"),
    "missing time": ({"time": ["", "2020-01-02"]}, {}, "column 'time', row 1: is missing; times must be absolute"),
    "relative text": (
        {"time": ["2020-01-01", "12 days before"]},
        {},
        "row 2: '12 days before' cannot be read as a time",
    ),
    "relative number": ({"time": ["3", "-4"]}, {}, "holds Int64 without time_unit; times must be absolute"),
    "negative days": ({"time": ["18000", "-4"]}, {"time_unit": "days"}, "row 2: '-4' lies before 1971 and looks rel"),
    "future": ({"time": ["2020-01-01", "2999-01-02"]}, {}, "row 2: '2999-01-02' lies in the future, after 2"),
    "after max_time": ({}, {"max_time": "2020-01-01"}, "row 2: '2020-01-02' lies in the future, after 2020-01-01"),
    "text number": ({"amount": ["1", "much"]}, {}, "column 'amount', row 2: 'much' is not a number"),
    "missing number": ({"amount": ["1", ""]}, {}, "column 'amount', row 2: is missing"),
    "infinite": ({"amount": ["inf", "2"]}, {}, "column 'amount', row 1: 'inf' is not a finite number"),
    "not a number": ({"amount": ["NaN", "2"]}, {}, "column 'amount', row 1: 'NaN' is not a finite number"),
    "order": ({}, {"order": "kind"}, "column 'kind' (order_column) must hold integers or dates, got String"),
    "nothing left": ({}, {"where": ("amount > 9",)}, "nothing is left of 2 rows after where ['amount > 9']"),
    "no condition": ({}, {"where": ("amount + 1",)}, "where: 'amount + 1' must be true or false for each row"),
    "no SQL": ({}, {"where": ("amount >",)}, "where: 'amount >' is no SQL expression"),
    "constant": ({}, {"derived": (("d", "1"),), "numbers": ("d",)}, "it gives one value for all rows"),
    "aggregate": (
        {},
        {"derived": (("d", "MAX(amount)"),), "numbers": ("d",)},
        "derived 'd': 'MAX(amount)' must be computed row by row, it changes with other rows (Agg.Max)",
    ),
    "event of a group": (
        {},
        {
            "derived": (("d", "MAX(CASE WHEN kind = 'z' THEN 1 ELSE 0 END) OVER (PARTITION BY kind)"),),
            "numbers": ("d",),
        },
        "must be computed row by row, it changes with other rows (Over)",
    ),
    "rows of a group": (
        {},
        {"where": ("COUNT(*) OVER (PARTITION BY kind) > 5",)},
        "must be computed row by row, it changes with other rows (Over)",
    ),
    "cell that cannot be cast": (
        {"said": ["12", "abc"]},
        {"derived": (("d", "CAST(said AS INTEGER)"),), "numbers": ("d",)},
        "events.csv: cannot be read: conversion from `str` to `i32` failed",
    ),
    "condition on such a cell": (
        {"said": ["12", "abc"]},
        {"where": ("CAST(said AS INTEGER) > 3",)},
        "events.csv: cannot be read: conversion from `str` to `i32` failed",
    ),
    "window": (
        {},
        {"derived": (("d", "LEAD(amount) OVER (ORDER BY time)"),), "numbers": ("d",)},
        "must be computed row by row, it changes with other rows",
    ),
    "mean of all": (
        {},
        {"derived": (("d", "amount - AVG(amount)"),), "numbers": ("d",)},
        "must be computed row by row",
    ),
    "condition on all": ({}, {"where": ("amount >= AVG(amount)",)}, "'amount >= AVG(amount)' must be computed row by"),
    "two folds": (
        {"user": ["1", "1"], "fold": ["train", "test"]},
        {"fold": "fold"},
        "user 1 is in 'test' and in 'train'",
    ),
    "wrong fold": ({"fold": ["train", "dev"]}, {"fold": "fold"}, "column 'fold': 'dev' is none of train, validation"),
    "two groups": ({"user": ["1", "1"], "g": ["x", "y"]}, {"group": "g"}, "row 2: user 1 is in 'y' and in 'x'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_end_in_one_line_with_file_column_and_row(tmp_path, case):
    change, asked, message = BAD[case]
    path = tmp_path / "events.csv"
    pl.DataFrame(GOOD | change).write_csv(path)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_events([path], columns(**asked))
    assert "\n" not in str(error.value)
    if "SQL" not in message and "where:" not in message and "one value" not in message:
        assert str(path) in str(error.value)


def test_relative_times_may_be_allowed(tmp_path):
    pl.DataFrame(GOOD | {"time": ["3", "-4"]}).write_csv(tmp_path / "e.csv")
    table = read_events([tmp_path / "e.csv"], columns(time_unit="days", relative_times=True))
    assert table.times.tolist() == [3 * DAY, -4 * DAY]


def test_a_number_of_another_kind_late_in_the_file_is_found(tmp_path):
    n = 10_050
    amounts = ["1"] * n
    amounts[10_020], amounts[10_040] = "2.5", "oops"
    rows = {"user": range(n), "time": ["2020-01-01"] * n, "kind": ["a"] * n, "amount": amounts}
    pl.DataFrame(rows, strict=False).write_csv(tmp_path / "e.csv")
    with pytest.raises(ValueError, match=r"row 10041: 'oops' is not a number"):
        read_events([tmp_path / "e.csv"], columns(where=("amount > 0",)))


def test_empty_and_damaged_files(tmp_path):
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match="the file is empty"):
        read_events([tmp_path / "empty.csv"], columns())
    (tmp_path / "header.csv").write_text("user,time,kind,amount\n")
    with pytest.raises(ValueError, match="holds no rows"):
        read_events([tmp_path / "header.csv"], columns())
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing of the kind")
    with pytest.raises(ValueError, match=r"bad.parquet: cannot be read"):
        read_events([tmp_path / "bad.parquet"], columns())


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_users_without_a_group_are_in_none_and_long_numbers_stay_apart(tmp_path, suffix):
    # Two neighbours beyond 2^53 are one number in float64.
    ids, groups = [9_007_199_254_740_992, 9_007_199_254_740_993, 3, 4, 5], [2**53, 2**53 + 1, None, 2**53, None]
    frame = pl.DataFrame({"user": ids, "time": ["2020-01-01"] * 5, "kind": "a", "amount": 1.0, "g": groups})
    path = tmp_path / f"e.{suffix}"
    frame.write_csv(path) if suffix == "csv" else frame.write_parquet(path)
    table = read_events([path], columns(group="g", where=("g IS NULL OR g > 0",)))
    assert table.user_ids.to_list() == sorted(ids)
    assert dict(zip(table.user_ids, table.groups.tolist(), strict=True)) == dict(
        zip(ids, [0, 1, -1, 0, -1], strict=True)
    )


def test_ids_of_csv_files_stay_text_where_a_zero_leads(tmp_path):
    pl.DataFrame(GOOD).write_csv(tmp_path / "a.csv")
    pl.DataFrame(GOOD | {"user": ["01", "2"]}).write_csv(tmp_path / "b.csv")
    assert read_events([tmp_path / "a.csv"], columns()).user_ids.to_list() == [1, 2]
    assert read_events([tmp_path / "b.csv"], columns()).user_ids.to_list() == ["01", "2"]
