"""Files that cannot serve, for every data module through the real command: one clear line, and nothing left behind."""

import gzip
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pytest

PNG = (
    b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + struct.pack(">IIBBBBB", 4, 4, 8, 6, 0, 0, 0) + b"\x00" * 40
)
SHOP = "customer,article,day\n" + "".join(
    f"c{u},a{(u + v) % 5},2024-01-{1 + v:02d}\n" for u in range(8) for v in range(8)
)
EVENTS = "customer,when,code,amount\n" + "".join(
    f"u{u},2020-01-{1 + v:02d} 10:00:00,k{v % 3},{u + v}.5\n" for u in range(16) for v in range(20)
)
DAYS = [str(day) for day in np.datetime64("2015-01-01") + np.arange(300) if np.is_busday(day)]
PRICES = "Date,AAA,BBB,CCC,DDD\n" + "".join(
    f"{day},{100 + i},{90 + i % 7},{80 + i % 5},{70 + i % 3}\n" for i, day in enumerate(DAYS)
)
LONG = "Date,ticker,close\n" + "".join(
    f"{day},{name},{100 + i % 9}\n" for name in ("AAA", "BBB") for i, day in enumerate(DAYS)
)
SERIES = "".join(f"{1 + n % 2}\t" + "\t".join(f"{np.sin(n + t):.3f}" for t in range(12)) + "\n" for n in range(12))

FILES = {"shop": ("shop.csv", SHOP), "events": ("events.csv", EVENTS), "prices": ("prices.csv", PRICES)}
METHODS = {"shop": "sasrec_cce", "events": "kernel_attention", "prices": "tda_topology", "series": "concealed_attack"}
PRICE_FILES = ("index_paths", "sectors_path", "membership_path", "delistings_path")


class Case(NamedTuple):
    """Content of the file (None: none is written), its name, arguments of the data module, words of the line."""

    data: str
    content: Any
    words: tuple[str, ...]
    name: str = ""
    arguments: dict[str, Any] = {}  # noqa: RUF012 (nobody writes to it)


def as_parquet(**columns: Any) -> bytes:
    buffer = io.BytesIO()
    pl.DataFrame(columns).write_parquet(buffer)
    return buffer.getvalue()


def of_text(text: str, **types: Any) -> bytes:
    buffer = io.BytesIO()
    pl.read_csv(text.encode()).cast(types).write_parquet(buffer)
    return buffer.getvalue()


def changed(text: str, row: int, column: int, value: str, separator: str = ",") -> str:
    """``text`` with another value in a row, counted from 1 below the header, and a column from 0."""
    lines = text.splitlines()
    cells = lines[row].split(separator)
    cells[column] = value
    lines[row] = separator.join(cells)
    return "\n".join(lines) + "\n"


def rows(text: str, keep: Callable[[list[str]], bool]) -> str:
    header, *lines = text.splitlines()
    return "\n".join([header, *(line for line in lines if keep(line.split(",")))]) + "\n"


def with_header(text: str, header: str) -> str:
    return header + text[text.index("\n") :]


def series(row: int, column: int, value: str) -> str:
    return changed("\n" + SERIES, row, column, value, "\t").lstrip("\n")


FOLDER = "a folder of this name"
CASES = {
    # Files
    "shop: no file": Case("shop", None, ("no file matches", "shop.csv")),
    "events: no file": Case("events", None, ("no file matches", "events.csv")),
    "prices: no file": Case("prices", None, ("no file matches", "prices.csv")),
    "series: no file": Case("series", None, ("folder: Toy holds Toy_TEST.tsv, but no set with both",)),
    "shop: a folder": Case("shop", FOLDER, ("shop.csv is a folder",)),
    "events: a folder": Case("events", FOLDER, ("events.csv is a folder",)),
    "prices: a folder": Case("prices", FOLDER, ("prices.csv is a folder",)),
    "series: a folder": Case("series", FOLDER, ("Toy_TRAIN.tsv",)),
    "shop: empty": Case("shop", "", ("shop.csv", "the file is empty")),
    "events: empty": Case("events", "", ("events.csv", "the file is empty")),
    "prices: empty": Case("prices", "", ("prices.csv", "the file is empty")),
    "series: empty": Case("series", "", ("Toy_TRAIN.tsv", "holds no series")),
    "shop: header only": Case("shop", "customer,article,day\n", ("shop.csv", "the file holds no rows")),
    "events: header only": Case("events", "customer,when,code,amount\n", ("events.csv", "no rows")),
    "prices: header only": Case("prices", "Date,AAA,BBB\n", ("prices.csv", "the file holds no rows")),
    "series: header only": Case("series", "@classLabel true 1 2\n@data\n", ("no series",), "Toy_TRAIN.ts"),
    "shop: truncated Parquet": Case("shop", of_text(SHOP)[:-100], ("cannot be read as Parquet",), "shop.parquet"),
    "events: truncated Parquet": Case(
        "events", of_text(EVENTS)[:-100], ("events.parquet: cannot be read",), "events.parquet"
    ),
    "prices: truncated Parquet": Case(
        "prices", of_text(PRICES)[:-100], ("cannot be read as Parquet",), "prices.parquet"
    ),
    "shop: a gzipped CSV": Case("shop", gzip.compress(SHOP.encode()), ("shop.csv", "it is gzipped")),
    "prices: a spreadsheet named CSV": Case("prices", b"PK\x03\x04" * 9, ("prices.csv", "a spreadsheet")),
    "shop: damaged Parquet": Case(
        "shop", b"PAR1" + b"\x00" * 64 + b"PAR1", ("cannot be read as Parquet",), "shop.parquet"
    ),
    "events: damaged Parquet": Case(
        "events", of_text(EVENTS).replace(b"u1", b"\xff\xff"), ("events.parquet: cannot be read",), "events.parquet"
    ),
    "shop: a picture": Case("shop", PNG, ("shop.csv", "it is a picture")),
    "events: a picture": Case("events", PNG, ("events.csv", "it is a picture")),
    "prices: a picture": Case("prices", PNG, ("prices.csv", "it is a picture")),
    "series: a picture": Case("series", PNG, ("Toy_TRAIN.tsv", "cannot be read")),
    "shop: CSV named Parquet": Case("shop", SHOP, ("cannot be read as Parquet",), "shop.parquet"),
    "prices: CSV named Parquet": Case("prices", PRICES, ("cannot be read as Parquet",), "prices.parquet"),
    "shop: Parquet named CSV": Case("shop", of_text(SHOP), ("shop.csv", "it is Parquet, name it .parquet")),
    "events: Parquet named CSV": Case("events", of_text(EVENTS), ("events.csv", "it is Parquet, name it .parquet")),
    "shop: a spreadsheet": Case("shop", b"PK\x03\x04", ("shop.xlsx must end in .csv or .parquet",), "shop.xlsx"),
    "events: a spreadsheet": Case("events", b"PK\x03\x04", ("events.xlsx must end in",), "events.xlsx"),
    "prices: a spreadsheet": Case("prices", b"PK\x03\x04", ("prices.xlsx must end in",), "prices.xlsx"),
    "prices: gz that is none": Case("prices", PRICES, ("prices.csv.gz: cannot be read as gzip",), "prices.csv.gz"),
    "events: gz that is none": Case("events", EVENTS, ("events.csv.gz: cannot be read as gzip",), "events.csv.gz"),
    "series: gz that is none": Case("series", SERIES, ("cannot be read",), "Toy_TRAIN.tsv.gz"),
    "prices: truncated gz": Case(
        "prices", gzip.compress(PRICES.encode())[:200], ("prices.csv.gz: cannot be read", "truncated"), "prices.csv.gz"
    ),
    "events: truncated gz": Case(
        "events", gzip.compress(EVENTS.encode())[:200], ("events.csv.gz: cannot be read", "truncated"), "events.csv.gz"
    ),
    "series: truncated gz": Case("series", gzip.compress(SERIES.encode())[:90], ("truncated",), "Toy_TRAIN.tsv.gz"),
    "series: damaged gz": Case("series", b"\x1f\x8b" + zlib.compress(b"x"), ("damaged",), "Toy_TRAIN.tsv.gz"),
    # Columns
    "shop: column missing": Case("shop", with_header(SHOP, "customr,article,day"), ("no column 'customer'", "customr")),
    "events: column missing": Case(
        "events", with_header(EVENTS, "customer,when,kode,amount"), ("no column 'code'", "kode")
    ),
    "prices: date missing": Case("prices", with_header(PRICES, "day,AAA,BBB,CCC,DDD"), ("no column 'Date'", "day")),
    "prices: price column missing": Case(
        "prices", LONG, ("no column 'price'",), arguments={"ticker_column": "ticker", "price_column": "price"}
    ),
    "shop: column twice": Case("shop", with_header(SHOP, "customer,article,article"), ("'article' occurs twice",)),
    "shop: needed column twice": Case(
        "shop", "customer,customer,article,day\n" + "c1,c2,a1,2024-01-01\n" * 9, ("'customer' occurs twice",)
    ),
    "events: column twice": Case(
        "events", "customer,when,code,amount,amount\n" + "u,2020-01-01,k,1,2\n" * 9, ("'amount' occurs twice",)
    ),
    "prices: column twice": Case("prices", with_header(PRICES, "Date,AAA,BBB,AAA,DDD"), ("'AAA' occurs twice",)),
    "shop: columns swapped": Case("shop", with_header(SHOP, "customer,day,article"), ("column 'day', row 1", "'a0'")),
    "events: columns swapped": Case(
        "events", with_header(EVENTS, "when,customer,code,amount"), ("column 'when'", "'u0'")
    ),
    "prices: columns swapped": Case(
        "prices",
        with_header(LONG, "Date,close,ticker"),
        ("column 'close', row 1", "'AAA' is not a number"),
        arguments={"ticker_column": "ticker", "price_column": "close"},
    ),
    "shop: a row too long": Case("shop", SHOP + "c1,a1,2024-01-01,3,4\n", ("shop.csv", "more fields")),
    "events: a row too long": Case("events", EVENTS + "u1,2020-02-01,k1,3,4,5\n", ("events.csv", "more fields")),
    "prices: a row too long": Case("prices", PRICES + "2016-01-01,1,2,3,4,5\n", ("prices.csv", "more fields")),
    "series: a row too short": Case("series", SERIES + "1\t0.5\t0.5\n", ("row 13", "2 values, expected 12")),
    # Types
    "events: text among numbers": Case("events", changed(EVENTS, 7, 3, "much"), ("'amount', row 7", "'much'")),
    "prices: text among numbers": Case(
        "prices", changed(PRICES, 9, 2, "high"), ("'BBB', row 9", "'high' is not a number")
    ),
    "series: text among numbers": Case("series", series(3, 4, "up"), ("row 3, column 5", "'up' is not a number")),
    "shop: text among times": Case("shop", changed(SHOP, 5, 2, "tuesday"), ("'day', row 5", "'tuesday'")),
    "shop: numbers, then dates": Case(
        "shop",
        "customer,article,day\n" + "c1,a1,17000\n" * 20 + "c2,a2,2024-01-01\n",
        ("'day', row 1", "'17000'"),
    ),
    "shop: lists as ids": Case(
        "shop", as_parquet(customer=[[1]], article=["a"], day=[1]), ("'customer'", "List"), "shop.parquet"
    ),
    "shop: floats as ids": Case(
        "shop",
        as_parquet(customer=[1.5], article=["a"], day=[1]),
        ("integers or strings, got Float64",),
        "shop.parquet",
    ),
    "events: floats as ids": Case(
        "events",
        as_parquet(customer=[1.5], when=["2020-01-01"], code=["k"], amount=[1.0]),
        ("integers or strings, got Float64",),
        "events.parquet",
    ),
    "shop: flags as times": Case(
        "shop", as_parquet(customer=["c"], article=["a"], day=[True]), ("'day'", "got Boolean"), "shop.parquet"
    ),
    "events: flags as times": Case(
        "events",
        as_parquet(customer=["u"], when=[True], code=["k"], amount=[1.0]),
        ("'when'", "got Boolean"),
        "events.parquet",
    ),
    "events: lists as numbers": Case(
        "events",
        as_parquet(customer=["u"], when=["2020-01-01"], code=["k"], amount=[[1.0]]),
        ("'amount'", "List"),
        "events.parquet",
    ),
    "prices: flags as prices": Case(
        "prices",
        as_parquet(Date=["2015-01-01"], AAA=[True]),
        ("'AAA' must hold numbers, got Boolean",),
        "prices.parquet",
    ),
    "prices: flags as dates": Case(
        "prices", as_parquet(Date=[True], AAA=[1.0]), ("'Date' must hold dates, got Boolean",), "prices.parquet"
    ),
    "shop: an id missing": Case("shop", changed(SHOP, 4, 0, ""), ("'customer', row 4", "is missing")),
    "events: an id missing": Case("events", changed(EVENTS, 4, 0, ""), ("'customer', row 4", "is missing")),
    "series: a class missing": Case("series", series(2, 0, "?"), ("row 2: the class is missing",)),
    "series: a class of the test only": Case(
        "series", SERIES.replace("2\t", "3\t"), ("Toy_TEST.tsv: row 2: class '2' is missing from Toy_TRAIN.tsv",)
    ),
    # Encodings
    "shop: latin-1": Case("shop", changed(SHOP, 3, 0, "café").encode("latin-1"), ("shop.csv", "cannot be read as CSV")),
    "events: latin-1": Case("events", changed(EVENTS, 3, 0, "café").encode("latin-1"), ("events.csv", "utf-8")),
    "prices: latin-1": Case(
        "prices", with_header(PRICES, "Date,AAA,BBB,CCC,É").encode("latin-1"), ("prices.csv", "not UTF-8")
    ),
    "series: latin-1": Case("series", series(3, 0, "é").encode("latin-1"), ("Toy_TRAIN.tsv", "cannot be read")),
    "shop: utf-16": Case("shop", SHOP.encode("utf-16"), ("shop.csv", "it is UTF-16, save it as UTF-8")),
    "events: utf-16": Case("events", EVENTS.encode("utf-16"), ("events.csv", "it is UTF-16, save it as UTF-8")),
    "prices: utf-16": Case("prices", PRICES.encode("utf-16"), ("prices.csv", "it is UTF-16, save it as UTF-8")),
    "series: utf-16": Case("series", SERIES.encode("utf-16"), ("Toy_TRAIN.tsv", "cannot be read")),
    "shop: NUL bytes": Case("shop", changed(SHOP, 3, 2, "\0\0"), ("'day', row 3",)),
    "events: NUL bytes": Case("events", changed(EVENTS, 3, 3, "\0"), ("'amount', row 3",)),
    "prices: NUL bytes": Case("prices", changed(PRICES, 3, 1, "\0"), ("'AAA', row 3",)),
    "series: NUL bytes": Case("series", series(3, 4, "\0"), ("row 3, column 5", "is not a number")),
    # Dates
    "shop: no such day": Case("shop", changed(SHOP, 6, 2, "2024-02-31"), ("'day', row 6", "'2024-02-31'")),
    "events: no such day": Case("events", changed(EVENTS, 6, 1, "2020-02-31"), ("'when', row 6", "'2020-02-31'")),
    "prices: no such day": Case("prices", changed(PRICES, 6, 0, "2015-02-31"), ("'Date', row 6", "'2015-02-31'")),
    "shop: two formats": Case("shop", changed(SHOP, 6, 2, "31/12/2023"), ("'day', row 6", "'31/12/2023'")),
    "events: two formats": Case("events", changed(EVENTS, 6, 1, "31/12/2020"), ("'when', row 6", "'31/12/2020'")),
    "prices: two formats": Case("prices", changed(PRICES, 6, 0, "31.12.2015"), ("'Date', row 6", "'31.12.2015'")),
    "events: before 1970": Case("events", changed(EVENTS, 6, 1, "1965-01-01"), ("'when', row 6", "before 1971")),
    "events: in the future": Case("events", changed(EVENTS, 6, 1, "2999-01-01"), ("'when', row 6", "in the future")),
    "events: counted from a start": Case(
        "events",
        "customer,when,code,amount\n" + "u1,5,k,1\nu2,9,k,2\n" * 9,
        ("column 'when' (time_column)", "time_unit"),
    ),
    "shop: not as time_format": Case("shop", SHOP, ("'day', row 1", "%d/%m/%Y"), arguments={"time_format": "%d/%m/%Y"}),
    "prices: a day twice": Case(
        "prices", PRICES + PRICES.splitlines()[5] + "\n", ("'Date', row 215", "dates must increase")
    ),
    "prices: the test lies elsewhere": Case(
        "prices", PRICES, ("2031-01-01",), arguments={"test_start": "2031-01-01", "test_end": None}
    ),
    # Sizes
    "shop: one row": Case("shop", "customer,article,day\nc1,a1,2024-01-01\n", ("at least 2 users", "got 1")),
    "shop: one user": Case("shop", rows(SHOP, lambda row: row[0] == "c3"), ("at least 2 users", "'c3'")),
    "shop: users too short": Case(
        "shop", SHOP, ("nothing is left after step 'min_user_count 99'",), arguments={"min_user_count": 99}
    ),
    "events: one row": Case("events", "customer,when,code,amount\nu1,2020-01-01,k,1\n", ("no train users", "1 users")),
    "events: one user": Case("events", rows(EVENTS, lambda row: row[0] == "u3"), ("no train users", "1 users")),
    "prices: one day": Case("prices", "Date,AAA,BBB\n2015-01-01,1,2\n", ("at least two prices", "AAA 1")),
    "series: one step": Case("series", "1\t0.1\n2\t0.7\n", ("Toy_TEST.tsv: series of 12 values, Toy_TRAIN.tsv has 1",)),
    "series: lengths differ": Case("series", SERIES.replace("\t", "\t0.5\t", 12), ("row 2: 12 values, expected 24",)),
    # Numbers
    "events: infinite": Case("events", changed(EVENTS, 8, 3, "inf"), ("'amount', row 8", "not a finite number")),
    "events: NaN": Case("events", changed(EVENTS, 8, 3, "NaN"), ("'amount', row 8",)),
    "events: a number missing": Case("events", changed(EVENTS, 8, 3, ""), ("'amount', row 8", "is missing")),
    "prices: infinite": Case("prices", changed(PRICES, 8, 1, "inf"), ("'AAA'", "row 8")),
    "prices: negative": Case("prices", changed(PRICES, 8, 1, "-3"), ("'AAA'", "row 8", "-3")),
    "prices: zero": Case("prices", changed(PRICES, 8, 1, "0"), ("'AAA'", "row 8")),
    "series: infinite": Case("series", series(2, 3, "inf"), ("row 2, column 4", "'inf' is not a finite number")),
    "series: NaN": Case("series", series(2, 3, "NaN"), ("row 2, column 4",)),
    "series: beyond float32": Case("series", series(2, 3, "1e39"), ("row 2, column 4", "1e39")),
    # Tables beside the prices
    "sectors: a ticker twice": Case(
        "sectors_path", "ticker,sector\nAAA,x\nAAA,y\n", ("row 2", "'AAA' is already in row 1")
    ),
    "sectors: no such column": Case("sectors_path", "ticker,branch\nAAA,x\n", ("no column 'sector'",)),
    "membership: ends before it starts": Case(
        "membership_path", "ticker,start,end\nAAA,2015-02-01,2015-01-01\n", ("'end', row 1", "before the start")
    ),
    "delistings: less than everything lost": Case(
        "delistings_path", "ticker,date,return\nAAA,2015-02-01,-1.5\n", ("'return', row 1", "at least -1")
    ),
    "tickers: none": Case("tickers_path", "# nothing\n", ("no ticker",)),
    "tickers: binary": Case("tickers_path", PNG, ("tickers_path", "is not text in UTF-8")),
    "index: text among numbers": Case("index_paths", "Date,close\n2015-01-01,high\n", ("'close', row 1", "'high'")),
    # Bad names of columns and expressions
    "shop: condition that is none": Case("shop", SHOP, ("where: 'price >'",), arguments={"where": ["price >"]}),
    "shop: condition on no column": Case("shop", SHOP, ("no column 'price'",), arguments={"where": ["price > 1"]}),
    "events: condition that is none": Case("events", EVENTS, ("where: 'amount +'",), arguments={"where": ["amount +"]}),
    "events: expression that is none": Case(
        "events", EVENTS, ("derived 'amount': '1 +'",), arguments={"derived": {"amount": "1 +"}}
    ),
}


@pytest.fixture
def settings_of(toys, tmp_path):
    """``settings_of(case)``: write the file of a case and point the data module of its kind at it."""

    def make(case: Case) -> dict:
        aside = case.data not in METHODS  # a table beside prices that are fine
        kind = "prices" if aside else case.data
        if kind == "series":
            folder = tmp_path / "Toy"
            folder.mkdir()
            path = folder / (case.name or "Toy_TRAIN.tsv")
            (folder / path.name.replace("TRAIN", "TEST")).write_text(SERIES)
            arguments = {"folder": "Toy", "name": "Toy"}
        else:
            name, fine = FILES[kind]
            path = tmp_path / (f"{case.data}.csv" if aside else case.name or name)
            arguments = {"paths": path.name}
            if aside:
                (tmp_path / name).write_text(fine)
                arguments = {"paths": name, case.data: path.name}
        if kind == "prices":
            arguments = dict.fromkeys(PRICE_FILES) | arguments
            arguments |= {"train_start": "2015-01-01", "test_start": "2015-08-01", "test_end": "2015-09-30"}
            arguments |= {"window_length": 20}
        if case.content is FOLDER:
            path.mkdir()
        elif case.content is not None:
            content = case.content
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return toys.data_only(METHODS[kind], **(arguments | case.arguments))

    return make


@pytest.mark.parametrize("name", CASES)
def test_a_file_that_cannot_serve(refused, settings_of, name):
    case = CASES[name]
    line = refused(settings_of(case))
    for words in case.words:
        assert words in line
