"""Whatever stands in a file, reading it works or ends in one line: never another exception, never a panic."""

import gzip
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from datamodules.sources.cells import open_table
from datamodules.sources.columns import Columns
from datamodules.sources.events import EventColumns, read_events
from datamodules.sources.prices import Columns as PriceColumns
from datamodules.sources.prices import read_prices
from datamodules.sources.series import ENDINGS, read_series
from datamodules.sources.tabular import read_interactions
from datamodules.sources.universe import read_delistings, read_membership, read_sectors, read_tickers

FUZZ = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
# Cells that readers stumble over, and any text at all.
CELLS = st.one_of(
    st.sampled_from(
        [
            "",
            " ",
            "u1",
            "u2",
            "i1",
            "0",
            "-1",
            "1.5",
            "1e400",
            "nan",
            "inf",
            "true",
            "2024-01-01",
            "2024-02-30",
            '"',
            '""',
            "'",
            "1_000",
            "\u0661",
            "0x1f",
            "9" * 30,
            "2024-01-01T00:00:00+14:00",
            "\x00",
            "\ufeff",
            "null",
            "é",
            "#",
        ]
    ),
    st.text(max_size=6),
)
SEPARATORS = st.sampled_from([",", ";", "\t", " "])


@st.composite
def tables(draw, header: str) -> bytes:
    """A CSV that is right at first, then given strange cells, rows of other lengths, another encoding, cuts, bytes."""
    separator = draw(st.sampled_from([",", ",", ",", ";"]))
    columns = header.split(",")
    if draw(st.booleans()):
        columns = draw(st.lists(st.one_of(st.sampled_from(columns), CELLS), max_size=6))
    width = st.sampled_from([len(columns)] * 4 + [0, 1, len(columns) + 1])
    rows = draw(st.lists(width.flatmap(lambda n: st.lists(CELLS, min_size=n, max_size=n)), max_size=6))
    ending = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    text = ending.join(separator.join(row) for row in [columns, *rows]) + draw(st.sampled_from(["", ending]))
    content = text.encode(draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"])), "replace")
    content = content[: draw(st.integers(0, len(content)))] if draw(st.integers(0, 4)) == 0 else content
    place = draw(st.integers(0, len(content)))
    return content[:place] + draw(st.binary(max_size=2)) + content[place:]


@st.composite
def sets(draw) -> bytes:
    """Lines of headers and rows of any of the formats of the UCR and UEA archives."""
    lines = st.one_of(
        st.sampled_from(
            [
                "@data",
                "@classLabel true 1 2",
                "@classLabel",
                "@univariate true",
                "@dimensions 2",
                "@equalLength false",
                "@dimensions x",
                "@timeStamps true",
                "@attribute a numeric",
                "@attribute target {1,2}",
                "@relation x",
                "@attribute rel relational",
                "@end rel",
                "@",
                "# note",
                "% note",
                "1,2,3:1",
                "1,2:3,4:2",
                "1,?,3:1",
                "1\t0.5\t0.25",
                "2\t0.5\t0.75",
                "1,0.5,1",
                "'1,2\\n3,4',1",
                "'1,2',1",
                "(1,2),(3,4):1",
                ":::",
                "NaN:1",
            ]
        ),
        st.lists(CELLS, max_size=5).flatmap(lambda row: SEPARATORS.map(lambda mark: mark.join(row))),
        st.text(max_size=12),
    )
    text = "\n".join(draw(st.lists(lines, max_size=10)))
    content = text.encode(draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"])), "replace")
    return content if draw(st.integers(0, 5)) else draw(st.binary(max_size=40))


def works_or_one_line(read) -> None:
    message = "it works"
    try:
        read()
    except (ValueError, OSError) as error:
        message = str(error)
        if isinstance(error, UnicodeError):  # says neither where nor what is allowed
            raise TypeError(message) from error
    assert len(message.splitlines()) == 1, message


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


INTERACTIONS = [
    Columns("user", "item", "time", None, time_format, "s", where)
    for time_format, where in ((None, ()), ("%d/%m/%Y", ()), (None, ("price > 1",)))
]


@FUZZ
@given(content=tables("user,item,time,price"), which=st.sampled_from(range(len(INTERACTIONS))))
@example(content=b"user,item,time,price\nu,i,1e400,1\n", which=0)
@example(content=b"user,item,time,price\n\xff\xfe,i,1,1\n", which=0)
def test_interactions(place, content, which):
    path = place / "fuzz.csv"
    path.write_bytes(content)
    works_or_one_line(lambda: read_interactions([path], INTERACTIONS[which]))


def event_columns(**changes) -> EventColumns:
    plain = {"user": "user", "time": "time", "order": None, "texts": ("code",), "numbers": ("amount",)}
    plain |= {"required_numbers": (), "group": None, "fold": None, "derived": (), "where": (), "time_format": None}
    plain |= {"time_unit": None, "relative_times": True, "max_time": None, "duplicates": "keep"}
    return EventColumns(**(plain | changes))


EVENTS = [
    event_columns(),
    event_columns(time_unit="days", relative_times=False, duplicates="error"),
    event_columns(where=("amount > 1",), derived=(("twice", "amount * 2"),), numbers=("amount", "twice")),
]


@FUZZ
@given(content=tables("user,time,code,amount"), which=st.sampled_from(range(len(EVENTS))), packed=st.booleans())
def test_events(place, content, which, packed):
    path = place / ("fuzz.csv.gz" if packed else "fuzz.csv")
    path.write_bytes(gzip.compress(content, 1) if packed else content)
    works_or_one_line(lambda: read_events([path], EVENTS[which]))


@FUZZ
@given(content=tables("Date,ticker,close"), long=st.booleans(), packed=st.booleans())
def test_prices(place, content, long, packed):
    path = place / ("fuzz.csv.gz" if packed else "fuzz.csv")
    path.write_bytes(gzip.compress(content, 1) if packed else content)
    columns = PriceColumns("Date", "ticker", "close") if long else PriceColumns("Date", None, None)
    works_or_one_line(lambda: read_prices([path], columns))


READERS = {
    "ticker,sector": read_sectors,
    "ticker,start,end": read_membership,
    "ticker,date,return": read_delistings,
    "ticker": read_tickers,
}


@pytest.mark.parametrize("header", READERS)
@FUZZ
@given(content_of=st.data())
def test_tables_beside_prices(place, header, content_of):
    path = place / "fuzz.csv"
    path.write_bytes(content_of.draw(tables(header)))
    works_or_one_line(lambda: READERS[header](path))


@FUZZ
@given(content=sets(), ending=st.sampled_from(ENDINGS), packed=st.booleans())
def test_series(place, content, ending, packed):
    path = place / f"fuzz_TRAIN{ending}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(content, 1) if packed else content)
    works_or_one_line(lambda: read_series(path))


@FUZZ
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4), cut=st.booleans())
def test_damaged_parquet(place, flips, cut):
    whole = place / "whole.parquet"
    if not whole.exists():
        pl.DataFrame({"user": ["u1", "u2"] * 9, "item": ["i"] * 18, "time": range(18)}).write_parquet(whole)
    content = bytearray(whole.read_bytes())
    for position, value in flips:
        content[position % len(content)] = value
    path = place / "fuzz.parquet"
    path.write_bytes(bytes(content[: flips[0][0] % len(content)]) if cut else bytes(content))
    works_or_one_line(lambda: read_interactions([path], INTERACTIONS[0]))
    works_or_one_line(lambda: open_table(path))


def test_a_byte_order_mark_changes_nothing(place):
    """Spreadsheets write one before the name of the first column."""
    plain, marked = place / "plain.csv", place / "marked.csv"
    for text in (
        "user,item,time,price,code,amount\nu1,i1,1700000000,2,k,1.5\nu2,i2,1700000001,2,k,1.5\n",
        "Date,AAA\n2015-01-01,1\n2015-01-02,2\n",
    ):
        plain.write_text(text, encoding="utf-8")
        marked.write_text(text, encoding="utf-8-sig")
        if text.startswith("user"):
            assert [read_interactions([one], INTERACTIONS[0]).user_ids.to_list() for one in (plain, marked)] == [
                ["u1", "u2"]
            ] * 2
            seconds = event_columns(time_unit="s")
            assert [read_events([one], seconds).user_ids.to_list() for one in (plain, marked)] == [["u1", "u2"]] * 2
        else:
            assert open_table(plain).equals(open_table(marked))
