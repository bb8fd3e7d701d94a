"""Reading of CSV and Parquet: equal results from equal data, and one clear line for each kind of bad input."""

import datetime
import re

import numpy as np
import polars as pl
import pytest

from datamodules import InteractionsDataModule
from datamodules.sources.columns import Columns
from datamodules.sources.file_names import resolve_paths
from datamodules.sources.tabular import read_interactions
from datamodules.synthetic import markov_interactions

N_BYTES_OF_A_FOOTER = 200


@pytest.fixture(scope="module")
def interactions() -> pl.DataFrame:
    frame = markov_interactions(60, 20, n_days=20, seed=2)
    return frame.with_columns(
        item=pl.col("item_id").str.slice(5).cast(pl.Int64) * 7,
        rating=(pl.col("user_id") * 7 + pl.col("timestamp").dt.second()) % 5 + 1,
        noise=pl.lit("unused"),
    )


def module(tmp_path, paths, **arguments):
    settings = {
        "paths": paths if isinstance(paths, list) else str(paths),
        "user_column": "user_id",
        "item_column": "item_id",
        "time_column": "timestamp",
        "cache_dir": str(tmp_path / "cache"),
        "min_item_count": 1,
        "min_user_count": 1,
        "recommend_seen": True,
    }
    return InteractionsDataModule(**(settings | arguments))


def columns(**arguments) -> Columns:
    settings = {
        "user": "u",
        "item": "i",
        "time": "t",
        "order": None,
        "time_format": None,
        "time_unit": "s",
        "where": (),
    }
    return Columns(**(settings | arguments))


def arrays(data: InteractionsDataModule):
    folder = data._folder()
    return {name: folder.array(name).tolist() for name in folder.facts["arrays"]} | {
        name: folder.ids(name).to_list() for name in ("user_ids", "item_ids")
    }


# Equal data, equal results


@pytest.mark.parametrize("item", ["item_id", "item"])
def test_csv_parquet_several_files_and_both_give_the_same(tmp_path, interactions, item):
    interactions.write_parquet(tmp_path / "whole.parquet")
    interactions.write_csv(tmp_path / "whole.csv")
    thirds = np.array_split(np.arange(interactions.height), 3)
    for number, rows in enumerate(thirds):
        interactions[rows].write_parquet(tmp_path / f"part{number}.parquet")
        interactions[rows].write_csv(tmp_path / f"part{number}.csv")
    options = {"where": ["rating > 2", "noise = 'unused'"], "item_column": item}
    expected = arrays(module(tmp_path, tmp_path / "whole.parquet", **options))
    assert len(expected["item_ids"]) > 10
    assert arrays(module(tmp_path, tmp_path / "whole.csv", **options)) == expected
    assert arrays(module(tmp_path, tmp_path / "part*.parquet", **options)) == expected
    assert arrays(module(tmp_path, tmp_path / "part*.csv", **options)) == expected
    mixed = [str(tmp_path / name) for name in ("part2.csv", "part0.parquet", "part1.parquet")]
    assert arrays(module(tmp_path, mixed, **options)) == expected


def test_files_of_integers_of_different_width_fit_together(tmp_path):
    for name, dtype in (("a", pl.Int32), ("b", pl.Int64)):
        frame = pl.DataFrame({"u": [1, 2], "i": [3, 4], "t": [5, 6]}, schema_overrides={"u": dtype})
        frame.write_parquet(tmp_path / f"{name}.parquet")
    table = read_interactions(resolve_paths(str(tmp_path / "*.parquet")), columns())
    assert len(table.users) == 4
    assert table.user_ids.to_list() == [1, 2]


@pytest.mark.parametrize(
    ("ids", "dtype"),
    [
        ([3, 1, 2**40], pl.Int64),
        ([3, 1, 2**31 - 1], pl.Int32),
        ([3, 1, 2**64 - 1], pl.UInt64),
        (["b", "a", "ß∂ long identifier of more than eight bytes"], pl.String),
        (["b", "a", "c"], pl.Categorical),
    ],
)
def test_ids_come_back_as_they_were(tmp_path, ids, dtype):
    rows = [(user, item, time) for user in range(3) for time, item in enumerate([0, 1, 2, 0, 1])]
    frame = pl.DataFrame(
        {
            "user_id": pl.Series([ids[u] for u, _, _ in rows], dtype=dtype),
            "item_id": pl.Series([ids[i] for _, i, _ in rows], dtype=dtype),
            "timestamp": [t for _, _, t in rows],
        }
    )
    frame.write_parquet(tmp_path / "rows.parquet")
    data = module(tmp_path, tmp_path / "rows.parquet", split="leave_last_out")
    expected = pl.String if dtype == pl.Categorical else dtype
    for decoded in (data.decode_users([2, 0, 1, 1]), data.decode_items(np.array([2, 0, 1, 1]))):
        assert decoded.dtype == expected
        ordered = sorted(ids)
        assert decoded.to_list() == [ordered[2], ordered[0], ordered[1], ordered[1]]


def test_csv_ids_become_integers_only_if_nothing_is_lost(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("u,i,t\n10,007,1\n9,8,2\n")
    table = read_interactions([path], columns())
    assert table.user_ids.to_list() == [9, 10]
    assert table.item_ids.to_list() == ["007", "8"]
    assert table.users[np.argsort(table.times)].tolist() == [1, 0]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("values", "options", "micros"),
    [
        ([1, -2], {}, [1_000_000, -2_000_000]),
        ([1, 2], {"time_unit": "ms"}, [1000, 2000]),
        ([1, 2], {"time_unit": "us"}, [1, 2]),
        ([1999, 2001], {"time_unit": "ns"}, [1, 2]),
        ([0.25, 1.5], {}, [250_000, 1_500_000]),
        (["1970-01-01T00:00:01", "1970-01-01 00:00:00.5"], {}, [1_000_000, 500_000]),
        (["1970-01-02", "1970-01-01 00:01"], {}, [86_400_000_000, 60_000_000]),
        (["1970-01-01T00:00:00Z", "1970-01-01T02:00:00+02:00"], {}, [0, 0]),
        (["02.01.1970", "01.01.1970"], {"time_format": "%d.%m.%Y"}, [86_400_000_000, 0]),
        ([19700102, 19700101], {"time_format": "%Y%m%d"}, [86_400_000_000, 0]),
        ([datetime.date(1970, 1, 2), datetime.date(1969, 12, 31)], {}, [86_400_000_000, -86_400_000_000]),
        ([datetime.datetime(1970, 1, 1, 0, 0, 1), datetime.datetime(1970, 1, 1)], {}, [1_000_000, 0]),
    ],
    ids=str,
)
def test_times_of_every_kind_become_microseconds(tmp_path, suffix, values, options, micros):
    frame = pl.DataFrame({"u": ["a", "b"], "i": ["x", "y"], "t": values})
    path = tmp_path / f"rows.{suffix}"
    frame.write_csv(path) if suffix == "csv" else frame.write_parquet(path)
    table = read_interactions([path], columns(**options))
    assert dict(zip(table.users.tolist(), table.times.tolist(), strict=True)) == dict(enumerate(micros))


def test_zones_are_turned_into_utc(tmp_path):
    times = pl.Series([datetime.datetime(1970, 1, 1, 12)]).dt.replace_time_zone("Asia/Tokyo")
    pl.DataFrame({"u": [1], "i": [1], "t": times}).write_parquet(tmp_path / "rows.parquet")
    assert read_interactions([tmp_path / "rows.parquet"], columns()).times.tolist() == [3 * 3600 * 10**6]


def test_conditions_are_counted_one_after_another_and_null_is_not_true(tmp_path):
    frame = pl.DataFrame(
        {"u": [1, 2, 3, 4], "i": [1] * 4, "t": [1] * 4, "r": [5, 4, None, 1], "e": ["a", "b", "a", "a"]}
    )
    frame.write_parquet(tmp_path / "rows.parquet")
    table = read_interactions([tmp_path / "rows.parquet"], columns(where=("r > 3", "e ~ '^a'")))
    assert table.user_ids.to_list() == [1]
    assert [(step["step"], step["interactions"]) for step in table.steps] == [
        ("read", 4),
        ("where r > 3", 2),
        ("where e ~ '^a'", 1),
        ("distinct ids", 1),
    ]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("condition", "users"), [("r > 3", [1, 4]), ("NOT r > 3", [3]), ("r >= 1 OR e = 'b'", [1, 2, 3, 4])]
)
def test_nan_satisfies_no_condition(tmp_path, suffix, condition, users):
    frame = pl.DataFrame({"u": [1, 2, 3, 4], "i": [1] * 4, "t": [1] * 4, "r": [5.0, float("nan"), 1.5, 4.0]})
    frame = frame.with_columns(e=pl.Series(["a", "b", "a", "a"]))
    path = tmp_path / f"rows.{suffix}"
    frame.write_csv(path) if suffix == "csv" else frame.write_parquet(path)
    assert read_interactions([path], columns(where=(condition,))).user_ids.to_list() == users


def test_faults_in_rows_that_are_not_kept_do_not_matter(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("u,i,t,ok\n1,1,1,true\n,1,1,false\n2,,1,false\n3,1,,false\n4,1,7,true\n")
    assert read_interactions([path], columns(where=("ok",))).user_ids.to_list() == [1, 4]


def test_repeated_rows_are_kept(tmp_path):
    pl.DataFrame({"u": [1, 1, 1], "i": [2, 2, 2], "t": [3, 3, 3]}).write_parquet(tmp_path / "rows.parquet")
    assert len(read_interactions([tmp_path / "rows.parquet"], columns()).users) == 3


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_only_needed_columns_are_read_in_streams(tmp_path, interactions, suffix, monkeypatch):
    path = tmp_path / f"rows.{suffix}"
    interactions.write_csv(path) if suffix == "csv" else interactions.write_parquet(path)
    collected = []
    collect = pl.LazyFrame.collect
    collect_all = pl.collect_all

    def one(plan, *args, **options):
        if "SCAN [" in plan.explain():
            collected.append((plan, options.get("engine")))
        return collect(plan, *args, **options)

    def several(plans, **options):
        collected.extend((plan, options.get("engine")) for plan in plans)
        return collect_all(plans, **options)

    monkeypatch.setattr(pl.LazyFrame, "collect", one)
    monkeypatch.setattr(pl, "collect_all", several)
    names = columns(user="user_id", item="item_id", time="timestamp", where=("rating > 2",))
    read_interactions([path], names)
    assert len(collected) >= 4
    for plan, engine in collected:
        assert engine == "streaming"
        (read, available) = re.search(r"PROJECT (\d+)/(\d+) COLUMNS", plan.explain()).groups()
        assert int(available) == len(interactions.columns)
        assert int(read) <= 4


# Bad input


def refused(tmp_path, paths, kind=ValueError, **arguments) -> str:
    """The one line of an error, after which no file but the memory of content digests is left."""
    with pytest.raises(kind) as caught:
        module(tmp_path, paths, **arguments).prepare_data()
    line = str(caught.value)
    assert "\n" not in line
    left = {path.name for path in (tmp_path / "cache").glob("*")} if (tmp_path / "cache").exists() else set()
    assert left <= {"content.json"}
    return line


@pytest.fixture
def file(tmp_path, interactions):
    """Write a table with changes: ``file(".csv", timestamp=expression) -> path``."""

    def write(suffix=".parquet", frame=interactions, **changes):
        path = tmp_path / f"rows{suffix}"
        changed = frame.with_columns(**changes)
        changed.write_csv(path) if suffix == ".csv" else changed.write_parquet(path)
        return path

    return write


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("setting", ["user_column", "item_column", "time_column", "order_column"])
def test_missing_column_names_the_nearest(tmp_path, file, suffix, setting):
    path = file(suffix)
    wrong = {"user_column": "usr_id", "item_column": "Item_Id", "time_column": "times_tamp", "order_column": "nois"}
    nearest = {"user_column": "user_id", "item_column": "item_id", "time_column": "timestamp", "order_column": "noise"}
    line = refused(tmp_path, path, **{setting: wrong[setting]})
    for word in (str(path), repr(wrong[setting]), setting, nearest[setting]):
        assert word in line


def test_missing_column_without_a_near_one_names_all(tmp_path, file):
    line = refused(tmp_path, file(), user_column="zzzzzz")
    assert "user_id, item_id, timestamp" in line


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("column", ["user_id", "item_id", "timestamp"])
def test_missing_value_names_file_column_and_row(tmp_path, file, suffix, column):
    gone = pl.when(pl.int_range(pl.len()).is_in([7, 11])).then(None).otherwise(pl.col(column))
    line = refused(tmp_path, file(suffix, **{column: gone}))
    assert line == f"{tmp_path}/rows{suffix}: column {column!r}, row 8: is missing"


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_unreadable_time_names_file_column_row_and_value(tmp_path, file, suffix):
    text = pl.col("timestamp").dt.to_string("iso")
    wrong = pl.when(pl.int_range(pl.len()).is_in([4, 9])).then(pl.lit("2024-13-01")).otherwise(text)
    line = refused(tmp_path, file(suffix, timestamp=wrong))
    assert f"{tmp_path}/rows{suffix}: column 'timestamp', row 5: '2024-13-01' cannot be read as a time" in line


def test_unreadable_number_deep_in_a_csv_names_the_row(tmp_path):
    """Beyond the rows from which the type is inferred."""
    path = tmp_path / "rows.csv"
    n = 12_000
    lines = [f"{k % 50},{k % 7},{k},{k % 5}" for k in range(n)]
    lines[11_000] = "1,1,soon,1"
    path.write_text("\n".join(["user_id,item_id,timestamp,rating", *lines]))
    assert f"{path}: column 'timestamp', row 11001: 'soon' is not an integer" in refused(tmp_path, path)
    lines[11_000] = "1,1,1,good"
    path.write_text("\n".join(["user_id,item_id,timestamp,rating", *lines]))
    line = refused(tmp_path, path, where=["rating > 3"])
    assert f"{path}: column 'rating', row 11001: 'good' is not an integer" in line


def test_row_is_counted_in_its_own_file(tmp_path):
    frame = pl.DataFrame({"user_id": [1, 2, 3], "item_id": [1, 2, 3], "timestamp": [1, 2, 3]})
    frame.write_parquet(tmp_path / "a.parquet")
    frame.with_columns(item_id=pl.Series([1, None, 3])).write_parquet(tmp_path / "b.parquet")
    line = refused(tmp_path, tmp_path / "*.parquet")
    assert line == f"{tmp_path}/b.parquet: column 'item_id', row 2: is missing"


def test_time_beyond_the_range_of_microseconds(tmp_path, file):
    line = refused(tmp_path, file(timestamp=pl.lit(2**61)), time_unit="s")
    assert "row 1: 2305843009213693952 cannot be read as a time (as ISO 8601 or a number of s)" in line


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_empty_file(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    path.touch()
    assert refused(tmp_path, path) == f"{path}: the file is empty"


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_file_without_rows(tmp_path, file, suffix, interactions):
    path = file(suffix, interactions.clear())
    assert refused(tmp_path, path) == f"{path}: the file holds no rows"


def test_truncated_parquet(tmp_path, file):
    path = file()
    path.write_bytes(path.read_bytes()[:-N_BYTES_OF_A_FOOTER])
    assert refused(tmp_path, path).startswith(f"{path}: cannot be read as Parquet, truncated or damaged: ")


def test_ragged_csv(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("user_id,item_id,timestamp\n1,2,3\n1,2,3,4\n")
    assert refused(tmp_path, path).startswith(f"{path}: cannot be read as CSV, truncated or damaged: ")


@pytest.mark.parametrize("name", ["missing.parquet", "*.csv", "sub/**/*.parquet"])
def test_no_matching_file(tmp_path, name):
    line = refused(tmp_path, tmp_path / name, FileNotFoundError)
    assert str(tmp_path / name) in line


def test_folder_other_suffix_and_unknown_bundle(tmp_path):
    assert f"{tmp_path} is a folder" in refused(tmp_path, tmp_path)
    (tmp_path / "rows.txt").write_text("a")
    assert "must end in .csv or .parquet" in refused(tmp_path, tmp_path / "rows.txt")
    assert "bundled:online_retail" in refused(tmp_path, "bundled:offline_retail")
    assert "at least one file" in refused(tmp_path, [])


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("rating >", "is not an SQL condition"),
        ("SELECT 1", "is not an SQL condition"),
        ("rating", "must be true or false for each row"),
        ("1 > 2", "must be true or false for each row"),
        ("sum(rating) > 3", "must be computed row by row, it changes with other rows (Agg.Sum)"),
        ("rating > avg(rating)", "must be computed row by row, it changes with other rows (Agg.Mean)"),
        ("count(*) OVER (PARTITION BY user_id) > 5", "must be computed row by row, it changes with other rows (Over)"),
        ("rating > 'a'", "cannot be computed"),
        ("ratng > 3", "nearest: rating"),
    ],
)
def test_wrong_condition(tmp_path, file, condition, said):
    line = refused(tmp_path, file(), where=["user_id > 0", condition])
    assert said in line
    assert condition.split()[0] in line


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_condition_that_cannot_be_computed_of_a_cell(tmp_path, file, suffix):
    text = pl.when(pl.int_range(pl.len()) == 5).then(pl.lit("abc")).otherwise(pl.lit("12"))
    path = file(suffix, noise=text)
    line = refused(tmp_path, path, where=["CAST(noise || '' AS INTEGER) > 3"])
    kind = {".csv": "CSV", ".parquet": "Parquet"}[suffix]
    assert line.startswith(f"{path}: cannot be read as {kind}: conversion from `str` to `i32` failed")


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({"where": ["rating > 2", "rating > 9"]}, "step 'where rating > 9'"),
        ({"min_item_count": 100_000}, "step 'min_item_count 100000'"),
        ({"min_user_count": 1000}, "step 'min_user_count 1000'"),
    ],
)
def test_nothing_left_says_at_which_step(tmp_path, file, options, step):
    assert f"nothing is left after {step}" in refused(tmp_path, file(), **options)


def test_single_user(tmp_path, file):
    line = refused(tmp_path, file(), where=["user_id = 3"])
    assert "at least 2 users are needed, got 1" in line
    assert "user 3" in line


def test_single_item(tmp_path, file):
    line = refused(tmp_path, file(), where=["item_id = 'item-03'"])
    assert "1 distinct items, at least 2 needed" in line


def test_single_timestamp(tmp_path, file):
    line = refused(tmp_path, file(timestamp=pl.lit(5)))
    assert "nothing is left" in line


@pytest.mark.parametrize("dtype", [pl.Float64, pl.Boolean])
def test_ids_of_a_wrong_type(tmp_path, file, dtype):
    line = refused(tmp_path, file(item_id=pl.col("item").cast(dtype)))
    assert f"rows.parquet: column 'item_id' (item_column) must hold integers or strings, got {dtype}" in line


def test_times_of_a_wrong_type(tmp_path, file):
    assert "(time_column) must hold dates, numbers or strings, got Boolean" in refused(
        tmp_path, file(timestamp=pl.lit(True))
    )
    assert "time_format is for strings" in refused(tmp_path, file(), time_format="%Y")
    assert "(order_column) must hold integers or dates, got String" in refused(tmp_path, file(), order_column="noise")


def test_ids_of_different_types_in_two_files(tmp_path):
    frame = pl.DataFrame({"user_id": [1, 2], "item_id": [1, 2], "timestamp": [1, 2]})
    frame.write_parquet(tmp_path / "a.parquet")
    frame.with_columns(pl.col("item_id").cast(pl.String)).write_parquet(tmp_path / "b.parquet")
    line = refused(tmp_path, tmp_path / "*.parquet")
    assert line == (
        f"{tmp_path}/b.parquet: column 'item_id' (item_column) holds String, in an earlier file it holds Int64"
    )
    frame.with_columns(item_id=pl.Series(["1", "x"])).write_csv(tmp_path / "b.csv")
    line = refused(tmp_path, [str(tmp_path / "a.parquet"), str(tmp_path / "b.csv")])
    assert line == f"{tmp_path}/b.csv: column 'item_id', row 2: 'x' is not an integer, as in the other files"


@pytest.mark.parametrize("said", ["007", "+7", "-0"])
def test_text_that_changes_as_an_integer_is_refused_beside_integer_ids(tmp_path, said):
    frame = pl.DataFrame({"user_id": [7, 2], "item_id": [1, 2], "timestamp": [1, 2]})
    frame.write_parquet(tmp_path / "a.parquet")
    frame.with_columns(user_id=pl.Series(["7", said])).write_csv(tmp_path / "b.csv")
    assert refused(tmp_path, [str(tmp_path / "a.parquet"), str(tmp_path / "b.csv")]) == (
        f"{tmp_path}/b.csv: column 'user_id', row 2: {said!r} is not an integer without leading zeros or sign, as in "
        "the other files"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eval_batch_size": -1}, "eval_batch_size must be at least 1, got -1"),
        ({"min_item_count": 0}, "min_item_count must be at least 1, got 0"),
        ({"min_user_count": 0}, "min_user_count must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"test_fraction": 1.0}, "test_fraction must be between 0 and 1, got 1.0"),
        ({"validation_user_fraction": -0.1}, "validation_user_fraction must be at least 0 and below 1, got -0.1"),
        ({"split": "random"}, "split must be one of 'global_time', 'leave_last_out', got 'random'"),
        ({"target": "item"}, "target must be one of 'next_item', 'next_basket', got 'item'"),
        ({"train_targets": "old"}, "train_targets must be one of 'all', 'new', None, got 'old'"),
        ({"train_window": "first"}, "train_window must be one of 'last', 'strided', got 'first'"),
        ({"time_unit": "min"}, "time_unit must be one of 's', 'ms', 'us', 'ns', got 'min'"),
        ({"time_column": None}, "time_column or order_column must be given, got neither"),
        ({"time_column": None, "order_column": "o"}, "split 'global_time' needs time_column"),
        ({"item_column": "user_id"}, "must differ"),
    ],
    ids=str,
)
def test_arguments_outside_their_range(tmp_path, options, said):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        module(tmp_path, "rows.parquet", **options)
    assert said in str(caught.value)
