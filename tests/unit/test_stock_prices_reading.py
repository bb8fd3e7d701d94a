import datetime
import gzip
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from datamodules import StockPricesDataModule
from datamodules.sources.file_names import resolve_paths
from datamodules.sources.prices import Columns, read_index, read_prices

WIDE = "Date,A,B\n2020-01-01,1,10\n2020-01-02,2,\n2020-01-03,3,30\n"
LONG = "day,name,close\n2020-01-01,A,1\n2020-01-01,B,10\n2020-01-02,A,2\n2020-01-03,A,3\n2020-01-03,B,30\n"
LONG_COLUMNS = {"date_column": "day", "ticker_column": "name", "price_column": "close"}
EXPECTED = np.array([[1, 10], [2, np.nan], [3, 30.0]])


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    elif name.endswith(".parquet"):
        pl.read_csv(text.encode(), try_parse_dates=True).write_parquet(path)
    else:
        path.write_text(text)
    return path


def assert_expected(table):
    assert table.tickers == ("A", "B")
    assert table.dates.astype(str).tolist() == ["2020-01-01", "2020-01-02", "2020-01-03"]
    np.testing.assert_array_equal(table.prices, EXPECTED)


@pytest.mark.parametrize("name", ["p.csv", "p.csv.gz", "p.parquet"])
def test_wide_and_long_files_of_every_format(tmp_path, name):
    assert_expected(read_prices([write(tmp_path, name, WIDE)], Columns("Date")))
    assert_expected(read_prices([write(tmp_path, name, LONG)], Columns("day", "name", "close")))


def test_long_rows_may_be_grouped_by_ticker(tmp_path):
    rows = LONG.splitlines()
    grouped = "\n".join([rows[0], *sorted(rows[1:], key=lambda row: row.split(",")[1])])
    assert_expected(read_prices([write(tmp_path, "p.csv", grouped)], Columns("day", "name", "close")))


@pytest.mark.parametrize(
    "form", ["%Y-%m-%d 00:00:00", "%Y-%m-%dT16:00:00Z", " %Y-%m-%d", "%Y-%m-%d 00:00:00+00:00"], ids=str
)
def test_text_of_times_and_missing_prices(tmp_path, form):
    days = [datetime.date(2020, 1, day).strftime(form) for day in (1, 2, 3)]
    text = f"Date,A,B\n{days[0]},1, 10\n{days[1]},2,NaN\n{days[2]},3,30.0\n"
    assert_expected(read_prices([write(tmp_path, "p.csv", text)], Columns("Date")))


@pytest.mark.parametrize("dtype", [pl.Datetime("ns"), pl.Datetime("us", "America/New_York"), pl.Date])
def test_parquet_types(tmp_path, dtype):
    days = pl.Series("Date", [datetime.date(2020, 1, day) for day in (1, 2, 3)])
    # the day counts in the zone of the column: midnight in New York stays on its day
    days = days.cast(pl.Datetime("us")).dt.replace_time_zone(dtype.time_zone) if dtype != pl.Date else days
    frame = pl.DataFrame(
        [days.cast(dtype), pl.Series("A", [1, 2, 3]), pl.Series("B", [10, float("nan"), 30], pl.Float32)]
    )
    frame.write_parquet(tmp_path / "p.parquet")
    assert_expected(read_prices([tmp_path / "p.parquet"], Columns("Date")))


def test_several_files_split_the_table(tmp_path):
    first = write(tmp_path, "1.csv", "Date,B,A\n2020-01-02,,2\n2020-01-03,30,3\n")
    second = write(tmp_path, "2.csv", "Date,A\n2020-01-01,1\n2020-01-02,\n")
    third = write(tmp_path, "3.parquet", "Date,B\n2020-01-01,10\n")
    table = read_prices([second, first, third], Columns("Date"))
    assert_expected(table)


def test_tickers_are_chosen_and_others_not_looked_at(tmp_path):
    path = write(tmp_path, "p.csv", "Date,A,junk,B\n2020-01-01,1,x,10\n2020-01-02,2,-5,\n2020-01-03,3,,30\n")
    assert_expected(read_prices([path], Columns("Date"), exclude=["junk"]))
    assert_expected(read_prices([path], Columns("Date"), tickers=["B", "A"]))
    text = LONG + "2020-01-03,junk,-1\nnever,junk,2\n"
    assert_expected(read_prices([write(tmp_path, "l.csv", text)], Columns("day", "name", "close"), tickers=["A", "B"]))


def test_index_leaves_out_days_without_a_value(tmp_path):
    path = write(tmp_path, "i.csv", "Date,value,other\n2020-01-01,5,1\n2020-01-02,,1\n2020-01-03,6,1\n")
    days, values = read_index([path], "Date", "value")
    assert days.astype(str).tolist() == ["2020-01-01", "2020-01-03"]
    assert values.tolist() == [5.0, 6.0]


ROW3 = "2020-01-03,3,30\n"
BAD_WIDE = [
    ("", "the file is empty"),
    ("Date,A,B\n", "the file holds no rows"),
    ("Date,A,B\n2020-01-01,1\n2020-01-02,1,2,3,4\n", "cannot be read as CSV, truncated or damaged: .*"),
    (WIDE.replace("Date", "date"), r"no column 'Date' \(date_column\), nearest: date"),
    ("Date\n2020-01-01\n", "no column of prices beside 'Date'"),
    (WIDE.replace("A,B", "A,A"), "column 'A' occurs twice"),
    (WIDE.replace(",30", ",abc"), "column 'B', row 3: 'abc' is not a number"),
    (WIDE.replace(",2,", ",-2,"), "column 'A', row 2: '-2' must be a positive price, or missing"),
    (WIDE.replace(",2,", ",0.0,"), "column 'A', row 2: '0.0' must be a positive price, or missing"),
    (WIDE.replace(",2,", ",inf,"), "column 'A', row 2: 'inf' must be a positive price, or missing"),
    (WIDE + ROW3, "column 'Date', row 4: 2020-01-03 is already in row 3"),
    (
        WIDE + ROW3.replace("03", "02"),
        "column 'Date', row 4: 2020-01-02 comes after 2020-01-03 in row 3, dates must increase",
    ),
    (WIDE.replace("2020-01-02", "02/01/2020"), "column 'Date', row 2: '02/01/2020' is not a date such as 2015-01-31"),
    (WIDE.replace("2020-01-02", "2020-01-32"), "column 'Date', row 2: '2020-01-32' is not a date such as 2015-01-31"),
    (WIDE.replace("2020-01-02", ""), "column 'Date', row 2: is missing"),
    (WIDE.replace(",30", ","), "a ticker needs at least two prices, got B 1; leave it out with `exclude`"),
]
BAD_LONG = [
    (LONG.replace("name", "Name"), r"no column 'name' \(ticker_column\), nearest: Name"),
    (LONG.replace(",2\n", ",two\n"), "column 'close', row 3: 'two' is not a number"),
    (LONG.replace(",2\n", ",-2\n"), "column 'close', row 3: '-2' must be a positive price, or missing"),
    (LONG.replace("01,B", "01,"), "column 'name', row 2: is missing"),
    (LONG.replace("2020-01-02", "soon"), "column 'day', row 3: 'soon' is not a date such as 2015-01-31"),
    (LONG + "2020-01-03,A,3\n", "column 'day', row 6: 2020-01-03 of 'A' is already in row 4"),
    (
        LONG + "2020-01-02,B,3\n",
        "column 'day', row 6: 2020-01-02 of 'B' comes after 2020-01-03 in row 5, dates must increase",
    ),
    (LONG + "2020-01-03,C,3\n", "a ticker needs at least two prices, got C 1; leave it out with `exclude`"),
]


@pytest.mark.parametrize(("text", "message"), BAD_WIDE)
def test_bad_wide_file_ends_in_one_line(tmp_path, text, message):
    path = write(tmp_path, "p.csv", text)
    with pytest.raises(ValueError, match=f"^{path}: {message}$") as caught:
        StockPricesDataModule(paths=str(path), test_start="2020-01-03").setup("fit")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "message"), BAD_LONG)
def test_bad_long_file_ends_in_one_line(tmp_path, text, message):
    path = write(tmp_path, "p.csv", text)
    with pytest.raises(ValueError, match=f"^{path}: {message}$") as caught:
        StockPricesDataModule(paths=str(path), test_start="2020-01-03", **LONG_COLUMNS).setup("fit")
    assert "\n" not in str(caught.value)


def test_bad_parquet_ends_in_one_line(tmp_path):
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(b"PAR1 and nothing")
    with pytest.raises(ValueError, match=f"^{damaged}: cannot be read as Parquet, truncated or damaged: .*$"):
        read_prices([damaged], Columns("Date"))
    path = write(tmp_path, "p.parquet", "Date,A,B\n2020-01-01,1,true\n2020-01-02,2,true\n")
    with pytest.raises(ValueError, match="column 'B' must hold numbers, got Boolean"):
        read_prices([path], Columns("Date"))
    with pytest.raises(ValueError, match="column 'A' must hold dates, got Int64"):
        read_prices([path], Columns("A"))
    table = pl.DataFrame({"Date": [datetime.date(2020, 1, 1)] * 1, "A": [float("-inf")]})
    table.write_parquet(path)
    with pytest.raises(ValueError, match="column 'A', row 1: -inf must be a positive price, or missing"):
        read_prices([path], Columns("Date"))


def test_files_that_overlap_are_refused(tmp_path):
    paths = [write(tmp_path, "1.csv", WIDE), write(tmp_path, "2.csv", "Date,B\n2020-01-02,1\n2020-01-03,1\n")]
    with pytest.raises(ValueError, match=r"2.csv: ticker 'B' has a price on 2020-01-03 here and in an earlier file"):
        read_prices(paths, Columns("Date"))


def test_absent_tickers_are_named_up_to_five(tmp_path):
    path = write(tmp_path, "p.csv", WIDE)
    with pytest.raises(ValueError, match=r"p.csv: 6 of 7 tickers asked for are absent: C, D, E, F, G and 1 more$"):
        read_prices([path], Columns("Date"), tickers=list("ACDEFGH"))
    with pytest.raises(ValueError, match=r"p.csv: 1 of 1 tickers to exclude are absent: Z$"):
        read_prices([path], Columns("Date"), exclude=["Z"])
    with pytest.raises(ValueError, match=r"p.csv: no ticker is left$"):
        read_prices([path], Columns("Date"), exclude=["A", "B"])


def test_ticker_and_price_columns_go_together():
    with pytest.raises(ValueError, match=r"ticker_column and price_column go together .* got 'name' and None"):
        StockPricesDataModule(paths="p.csv", ticker_column="name", test_start="2020-01-01")


@pytest.mark.parametrize(
    ("argument", "text", "message"),
    [
        ("tickers_path", "# none\n\n", "no ticker, give one a line"),
        ("tickers_path", "A\nB # two\nA\n", "line 3: 'A' is already in line 1"),
        ("sectors_path", "ticker,branch\nA,x\n", "no column 'sector', it has: ticker, branch"),
        ("sectors_path", "ticker,sector\nA,x\nA,y\n", "column 'ticker', row 2: 'A' is already in row 1"),
        ("membership_path", "ticker,start\nA,2020-01-01\n", "no column 'end', it has: ticker, start"),
        ("membership_path", "ticker,start,end\nA,,\n", "column 'start', row 1: is missing"),
        (
            "membership_path",
            "ticker,start,end\nA,2020-01-02,2020-01-01\n",
            "column 'end', row 1: 2020-01-01 is before the start 2020-01-02",
        ),
        (
            "delistings_path",
            "ticker,date,return\nA,2020-01-02,lost\n",
            "column 'return', row 1: 'lost' is not a number",
        ),
        (
            "delistings_path",
            "ticker,date,return\nA,2020-01-02,-1.5\n",
            "column 'return', row 1: '-1.5' must be finite and at least -1",
        ),
        ("delistings_path", "ticker,date,return\n,2020-01-02,0\n", "column 'ticker', row 1: is missing"),
        ("index_paths", "Date,x,y\n2020-01-01,1,1\n", "which column is the index\\? Set index_column to one of x, y"),
        ("index_paths", "Date,x\n2020-01-01,0\n", "column 'x', row 1: '0' must be a positive price, or missing"),
    ],
)
def test_bad_companion_file_ends_in_one_line(tmp_path, argument, text, message):
    path = write(tmp_path, "companion.csv", text)
    module = StockPricesDataModule(
        paths=str(write(tmp_path, "p.csv", WIDE)), test_start="2020-01-03", **{argument: str(path)}
    )
    with pytest.raises(ValueError, match=f"^{path}: {message}$") as caught:
        module.setup("fit")
    assert "\n" not in str(caught.value)


def test_file_names(tmp_path):
    text = str(write(tmp_path, "p.txt", WIDE))
    with pytest.raises(ValueError, match=r"^paths: .*p.txt must end in .csv, .csv.gz or .parquet$"):
        StockPricesDataModule(paths=text, test_start="2020-01-03").setup("fit")
    with pytest.raises(ValueError, match=r"^sectors_path: .*p.txt must end in"):
        StockPricesDataModule(paths="bundled:us20", test_start="2020-01-03", sectors_path=text).setup("fit")
    for argument in ("paths", "index_paths", "check_paths", "sectors_path", "tickers_path", "delistings_path"):
        arguments = {"paths": "bundled:us20", argument: "absent.csv"}
        with pytest.raises(FileNotFoundError, match=f"^{argument}: no file .*absent.csv"):
            StockPricesDataModule(test_start="2020-01-03", **arguments).setup("fit")
    # tables of interactions are not read from gzip
    with pytest.raises(ValueError, match=r"must end in .csv or .parquet"):
        resolve_paths("bundled:us20")
