import hashlib

import numpy as np
import polars as pl
import pytest

from datamodules import StockPricesDataModule
from datamodules.price_rules import causal_returns, published_selection, sessions, without_price_errors
from datamodules.sources.file_names import BUNDLED
from datamodules.sources.prices import PriceTable

NAN = np.nan


def calendar(n_days, start="2020-01-01"):
    return np.datetime64(start) + np.arange(n_days)


def module(folder, prices, *, test_start, tickers=None, name="prices.parquet", **arguments):
    """A data module of daily prices from 2020-01-01 on, ``(T, A)``."""
    prices = np.asarray(prices, dtype=float)
    tickers = tickers or [chr(ord("A") + column) for column in range(prices.shape[1])]
    frame = pl.DataFrame(prices, schema=tickers, orient="row").insert_column(
        0, pl.Series("Date", calendar(len(prices)))
    )
    frame.write_parquet(folder / name)
    test_start = str(calendar(len(prices) + 1)[test_start])
    return StockPricesDataModule(paths=str(folder / name), test_start=test_start, **arguments)


def walk(n_days, n_stocks, seed=0):
    return 50 * np.exp(np.cumsum(0.02 * np.random.default_rng(seed).standard_normal((n_days, n_stocks)), axis=0))


def test_causal_gaps_by_hand():
    """At most two days are filled: a short gap, a longer one, a late start, and an end."""
    prices = np.array(
        [
            [10, 10, NAN, 10],
            [NAN, 11, NAN, 20],
            [NAN, NAN, 10, NAN],
            [15, NAN, 20, NAN],
            [30, NAN, NAN, NAN],
            [30, 22, 10, NAN],
            [33, 11, 5, NAN],
        ]
    )
    expected = np.array(
        [
            [NAN, NAN, NAN, NAN],
            [0, 0.1, NAN, 1],
            [0, 0, NAN, 0],
            [0.5, 0, 1, 0],
            [1, NAN, 0, NAN],
            [0, NAN, -0.5, NAN],
            [0.1, -0.5, -0.5, NAN],
        ]
    )
    # quotients of small integers, one rounding each
    np.testing.assert_allclose(causal_returns(prices, 2), expected, rtol=1e-15, atol=1e-16)
    unfilled = causal_returns(prices, 0)
    assert np.isnan(unfilled[1:4, 0]).all()
    assert unfilled[4, 0] == 1


def slow_causal_returns(prices, max_fill_days):
    filled = prices.copy()
    for column in range(prices.shape[1]):
        age = 0
        for row in range(1, len(prices)):
            age = age + 1 if np.isnan(prices[row, column]) else 0
            if 0 < age <= max_fill_days:
                filled[row, column] = filled[row - 1, column]
    returns = np.full_like(filled, NAN)
    for row in range(1, len(prices)):
        returns[row] = filled[row] / filled[row - 1] - 1
    return returns


@pytest.mark.parametrize("max_fill_days", [0, 1, 5, 100])
def test_causal_gaps_equal_a_loop_over_days(max_fill_days):
    generator = np.random.default_rng(max_fill_days)
    prices = np.where(generator.random((80, 30)) < 0.4, NAN, walk(80, 30))
    np.testing.assert_array_equal(causal_returns(prices, max_fill_days), slow_causal_returns(prices, max_fill_days))


def test_published_gaps_by_hand(tmp_path):
    """40 days: D lacks 3 (7.5 %), so it goes; B and C lack one each, so their days go for all."""
    prices = walk(60, 4)
    prices[[12, 13, 14], 3] = NAN
    prices[20, 1] = prices[30, 2] = NAN
    prices[[3, 55], 0] = NAN  # outside the frame: nobody looks
    days = calendar(60)
    panel = module(
        tmp_path,
        prices,
        test_start=35,
        gaps="published",
        train_start=str(days[10]),
        test_end=str(days[49]),
        window_length=5,
    ).panel
    kept = [row for row in range(10, 50) if row not in (20, 30)]
    assert panel.tickers == ("A", "B", "C")
    assert panel.dates.tolist() == days[kept].tolist()
    np.testing.assert_array_equal(panel.prices, prices[np.ix_(kept, [0, 1, 2])])
    np.testing.assert_array_equal(panel.returns[1:], panel.prices[1:] / panel.prices[:-1] - 1)
    assert (panel.train_start, panel.train_stop, panel.test_start, panel.test_stop) == (0, 23, 23, 38)
    assert panel.flags == ("gaps='published' looks ahead, over the test too: 3 of 4 stocks and 38 of 40 days kept",)


def test_published_gaps_keep_a_stock_at_exactly_five_per_cent():
    prices = np.ones((40, 2))
    prices[:2, 1] = NAN
    rows, columns = published_selection(prices)
    assert columns.tolist() == [0, 1]
    assert rows.tolist() == list(range(2, 40))
    with pytest.raises(ValueError, match="gaps='published' keeps 0 of 1 stocks and 20 of 20 days"):
        published_selection(np.where(np.arange(20)[:, None] < 10, NAN, 1.0))


def test_a_jump_that_the_second_source_lacks_is_replaced():
    days = calendar(6)
    prices = np.array([[10, 5, 8], [11, 5, 8], [22, 5, 8], [22, 6, NAN], [11, 6, 8], [22, 6, 8.0]])
    check = np.array([[20, 10], [22, 10], [23, 4], [23, 5], [11.5, 5], [23, 5.0]])
    table = PriceTable(days, ("A", "B", "C"), prices)
    mended, flags = without_price_errors(table, PriceTable(days, ("B", "A"), check[:, ::-1]), 0.25, ("p", "c"))
    returns = mended[1:, 0] / mended[:-1, 0] - 1
    # products of a few roundings
    np.testing.assert_allclose(returns, [0.1, 23 / 22 - 1, 0, -0.5, 1], rtol=1e-14)
    np.testing.assert_array_equal(mended[:2], prices[:2])
    np.testing.assert_array_equal(mended[:, 1:], prices[:, 1:])
    assert flags == [
        "A 2020-01-03: +1 in p, +0.0455 in c: replaced",
        "B 2020-01-03: +0 in p, -0.6 in c: kept, the smaller move",
        "1 of 3 tickers are not in c: not compared",
    ]


def test_days_and_tickers_of_one_source_only_are_not_compared():
    days = calendar(4)
    table = PriceTable(days, ("A",), np.array([[1], [2], [4], [8.0]]))
    check = PriceTable(days[[0, 2]], ("A",), np.array([[1], [1.0]]))
    mended, flags = without_price_errors(table, check, 0.25, ("p", "c"))
    np.testing.assert_array_equal(mended, table.prices)
    assert flags == []
    check = PriceTable(days, ("Z",), np.ones((4, 1)))
    _, flags = without_price_errors(table, check, 0.25, ("p", "c"))
    assert flags == ["c has none of the tickers of p: nothing was compared"]


def test_real_error_is_masked_and_a_spin_off_is_not(real_data):
    folder = real_data / "sp500-2015-2020"
    common = {
        "paths": str(folder / "adj_close.parquet"),
        "test_start": "2017-01-01",
        "test_end": "2019-12-31",
        "index_paths": str(folder / "gspc_index_2012_2022.csv.gz"),
        "index_column": "close",
        "sectors_path": str(folder / "sectors.csv"),
    }
    plain = StockPricesDataModule(**common).panel
    mended = StockPricesDataModule(**common, check_paths=str(folder / "close.parquet")).panel
    column, row = plain.tickers.index("DHR"), int(np.flatnonzero(plain.dates == np.datetime64("2016-07-05"))[0])
    assert plain.returns[row, column] == pytest.approx(0.517, abs=5e-4)  # the README's +0.52
    assert mended.returns[row, column] == pytest.approx(0.036, abs=5e-4)  # and its +0.036
    assert "DHR 2016-07-05: +0.517 in adj_close.parquet, +0.0364 in close.parquet: replaced" in mended.flags
    # CSC split off CSRA: the adjusted price knows, the plain one does not
    assert any(flag.startswith("DXC 2015-11-30") and flag.endswith("kept, the smaller move") for flag in mended.flags)
    others = np.delete(np.arange(len(plain.tickers)), column)
    np.testing.assert_array_equal(plain.prices[:, others], mended.prices[:, others])
    np.testing.assert_array_equal(plain.prices[:row, column], mended.prices[:row, column])
    assert (len(plain.dates), len(plain.tickers), len(plain.sector_names)) == (1259, 482, 11)
    assert (plain.sectors >= 0).sum() == 403
    assert (plain.dates[plain.test_start].astype(str), plain.dates[plain.test_stop - 1].astype(str)) == (
        "2017-01-03",
        "2019-12-31",
    )


def test_bundled_files_are_those_of_the_readme(project):
    readme = (project / "datamodules/bundled/us20/README.md").read_text()
    for name in ("us20", "us20_index"):
        path = project / "datamodules/bundled" / BUNDLED[name]
        assert f"| {path.name} | {hashlib.sha256(path.read_bytes()).hexdigest()} |" in readme


def test_bundled_stocks():
    panel = StockPricesDataModule(
        paths="bundled:us20",
        index_paths="bundled:us20_index",
        train_start="2004-01-01",
        test_start="2006-01-01",
        test_end="2021-12-31",
    ).panel
    assert panel.prices.shape == (8313, 20)
    assert panel.tickers[0] == "AAPL"
    assert panel.prices[0, 0] == 0.264
    assert panel.index_prices[-1] == 3783.22
    assert panel.flags == ()
    rows = [panel.train_start, panel.train_stop, panel.test_start, panel.test_stop - 1]
    assert panel.dates[rows].astype(str).tolist() == ["2004-01-02", "2006-01-03", "2006-01-03", "2021-12-31"]
    assert not np.isnan(panel.returns[1:]).any()


def test_index_is_put_on_the_days_of_the_prices(tmp_path):
    days = calendar(14, "2019-12-30")[[0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 13]]
    pl.DataFrame({"Date": days, "x": np.arange(1.0, 13.0)}).write_csv(tmp_path / "i.csv")
    arguments = {"test_start": 8, "window_length": 2, "index_paths": str(tmp_path / "i.csv")}
    panel = module(tmp_path, walk(11, 1), **arguments, max_fill_days=2).panel
    assert panel.index_prices.tolist() == [3, 4, 4, 5, 6, 7, 8, 9, 10, 11, 11]
    assert panel.flags == (
        "i.csv: the index lacks 2020-01-03, 2020-01-11: its last value is carried",
        "i.csv: 3 days of the index are none of the prices: left aside",
    )
    message = r"i.csv: the index lacks 2 of 11 price days \(2020-01-03, 2020-01-11\); at most 1 may be lacking"
    with pytest.raises(ValueError, match=message):
        module(tmp_path, walk(11, 1), **arguments, max_fill_days=1).setup("fit")
    pl.DataFrame({"Date": days[3:], "x": np.arange(9.0) + 1}).write_csv(tmp_path / "i.csv")
    with pytest.raises(ValueError, match=r"lacks 3 of 11 price days \(2020-01-01, .* and not the first"):
        module(tmp_path, walk(11, 1), **arguments, max_fill_days=5).setup("fit")


def test_membership_and_sectors(tmp_path):
    (tmp_path / "m.csv").write_text(
        "ticker,start,end\nA,2019-01-01,2020-01-03\nA,2020-01-06,2020-01-06\nB,2020-01-04,\nZ,2020-01-01,\n"
    )
    (tmp_path / "s.csv").write_text("ticker,sector\nC,Utilities\nA,Energy\nZ,Other\nB,\n")
    panel = module(
        tmp_path,
        walk(8, 3),
        test_start=6,
        membership_path=str(tmp_path / "m.csv"),
        sectors_path=str(tmp_path / "s.csv"),
        window_length=2,
    ).panel
    assert panel.member.T.astype(int).tolist() == [[1, 1, 1, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1], [0] * 8]
    assert panel.sectors.tolist() == [0, -1, 1]
    assert panel.sector_names == ("Energy", "Utilities")
    assert panel.flags == (
        "m.csv: 1 tickers are without prices here: Z",
        "m.csv: 1 tickers with prices are never a member: C",
    )


def test_delistings(tmp_path):
    prices = walk(10, 3)
    prices[6:, 0] = NAN
    file = tmp_path / "d.csv"
    arguments = {"test_start": 8, "delistings_path": str(file), "window_length": 2}
    file.write_text("ticker,date,return\nA,2020-01-07,-0.3\nB,2020-02-01,0.1\n")
    loaded = module(tmp_path, prices, **arguments)
    np.testing.assert_array_equal(loaded.panel.delisting_returns, [-0.3, NAN, NAN])
    assert loaded.panel.flags == ("d.csv: B leaves on 2020-02-01, after the last day: left aside",)
    before = loaded.panel.before(6)  # the last price is in row 5: the return of row 6 is not known yet
    assert np.isnan(before.delisting_returns).all()
    assert loaded.panel.before(7).delisting_returns[0] == -0.3
    for text, message in (
        ("A,2020-01-08,0", "d.csv: A leaves on 2020-01-08, .* after its last price of 2020-01-06: 2020-01-07"),
        ("C,2020-01-10,0", "d.csv: C leaves on 2020-01-10, .* after its last price of 2020-01-10: there is none"),
    ):
        file.write_text(f"ticker,date,return\n{text}\n")
        with pytest.raises(ValueError, match=message):
            module(tmp_path, prices, **arguments).setup("fit")


@pytest.mark.parametrize("spike", [-0.4, -0.22, -0.19, 0.2, 0.26, 0.3, 0.4, 3.0])
def test_a_spike_and_its_way_back_are_mended_together_or_not_at_all(spike):
    """Simple returns of the two differ: +30 % comes back by -23 %. Judged apart, half a spike would become a loss."""
    days = np.arange(np.datetime64("2020-01-01"), np.datetime64("2020-01-07"))
    prices = np.full((6, 1), 100.0)
    prices[3] *= 1 + spike
    one = PriceTable(days, ("A",), prices)
    mended, flags = without_price_errors(one, PriceTable(days, ("A",), np.full((6, 1), 100.0)), 0.25, ("a", "b"))
    large = abs(np.log1p(spike)) > np.log1p(0.25)
    assert len(flags) == (2 if large else 0)
    np.testing.assert_allclose(mended, 100.0 if large else prices, rtol=1e-12)


def test_days_without_any_price_are_left_out_and_weekly_prices_refused(tmp_path):
    prices = walk(40, 3)
    prices[[7, 20]] = NAN
    loaded = module(tmp_path, prices, test_start=30, window_length=5)
    assert len(loaded.panel.dates) == 38
    assert loaded.panel.flags[0].endswith("2 days without any price are left out")
    weeks = np.datetime64("2020-01-03") + 7 * np.arange(40)
    table = PriceTable(weeks, ("A", "B", "C"), walk(40, 3))
    with pytest.raises(ValueError, match="w: daily prices are needed, the median step between its 40 days is 7"):
        sessions(table, "w")
