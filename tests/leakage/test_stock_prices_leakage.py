"""Whatever happens to prices from row t on, nothing before t may change: the file itself is falsified."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from datamodules import StockPricesDataModule
from datamodules.synthetic_market import synthetic_market

FALSIFIERS = {
    # all but one stock: days without any price are no sessions
    "missing": lambda values, generator: np.where(np.arange(values.shape[1]) == 0, values, np.nan),
    "noise": lambda values, generator: np.exp(generator.standard_normal(values.shape)),
    "scaled": lambda values, generator: values * 1000,
    "gaps": lambda values, generator: np.where(generator.random(values.shape) < 0.5, np.nan, values),
}


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    """500 days with gaps of 1..8 days, late listings and part-time members; and a second source with errors."""
    folder = tmp_path_factory.mktemp("market")
    drawn = synthetic_market(25, 500, listed_late=0.2, part_time_members=0.3, seed=4)
    files = drawn.write(folder)
    generator = np.random.default_rng(0)
    prices = drawn.prices.copy()
    for column in range(25):
        for start in generator.integers(1, 490, 6):
            prices[start : start + generator.integers(1, 9), column] = np.nan
    second = prices.copy()
    for column in range(0, 25, 3):
        second[generator.integers(20, 480) :, column] /= 2
        prices[generator.integers(20, 480) :, column] *= 3
    paths = {name: folder / f"{name}.parquet" for name in ("first", "second")}
    for path, values in zip(paths.values(), (prices, second), strict=True):
        frame = pl.DataFrame(values, schema=list(drawn.tickers), orient="row")
        frame.insert_column(0, pl.Series("Date", drawn.dates)).write_parquet(path)
    del files["delistings_path"]
    return drawn, files, paths


def loaded(market, paths, **arguments):
    drawn, files, _ = market
    settings = files | {"paths": str(paths["first"]), "check_paths": str(paths["second"]), "index_column": "index"}
    settings |= {"test_start": str(drawn.dates[300]), "window_length": 40}
    module = StockPricesDataModule(**settings | arguments)
    module.setup("fit")
    return module


def falsified(market, folder: Path, row: int, how: str):
    drawn, _, paths = market
    generator = np.random.default_rng(1)
    new_paths = {}
    for name, path in paths.items():
        frame = pl.read_parquet(path)
        values = frame.drop("Date").to_numpy().copy()
        values[row:] = FALSIFIERS[how](values[row:], generator)
        new_paths[name] = folder / f"{name}.parquet"
        frame = pl.DataFrame(values, schema=list(drawn.tickers), orient="row")
        frame.insert_column(0, pl.Series("Date", drawn.dates)).write_parquet(new_paths[name])
    return new_paths


def assert_equal_bits(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == other[name].dtype
            assert value.numpy().tobytes() == other[name].numpy().tobytes(), name
        else:
            assert value == other[name], name


def windows(module):
    torch.manual_seed(0)
    return list(module.train_dataloader())


@pytest.mark.parametrize("how", FALSIFIERS)
@pytest.mark.parametrize("purge_days", [0, 7])
def test_nothing_before_the_test_depends_on_it(market, tmp_path, how, purge_days):
    whole = loaded(market, market[2], purge_days=purge_days)
    probe = loaded(market, falsified(market, tmp_path, 300, how), purge_days=purge_days)
    assert whole.panel.test_start == 300
    for one, other in zip(windows(whole), windows(probe), strict=True):
        assert_equal_bits(one, other)
    (one,), (other,) = whole.val_dataloader(), probe.val_dataloader()
    assert len(one["dates"]) == 300 - purge_days
    assert_equal_bits(one, other)
    assert whole.state_dict() == probe.state_dict()


@pytest.mark.parametrize("how", FALSIFIERS)
@pytest.mark.parametrize("row", [320, 417, 499])
def test_the_panel_before_any_day_is_what_was_known_then(market, tmp_path, how, row):
    whole = loaded(market, market[2])
    probe = loaded(market, falsified(market, tmp_path, row, how))
    assert_equal_bits(whole.panel.before(row).batch(), probe.panel.before(row).batch())
    assert whole.panel.prices[row:].tobytes() != probe.panel.prices[row:].tobytes()


def test_the_mending_was_at_work(market):
    """Else the probes above would show nothing about it."""
    flags = loaded(market, market[2]).panel.flags
    assert sum(flag.endswith("replaced") for flag in flags) >= 5
    assert sum(flag.endswith("kept, the smaller move") for flag in flags) >= 3


def test_the_probe_finds_the_published_rule_out(tmp_path):
    """A stock that vanishes late in the frame vanishes from its start: the probe is able to fail."""
    prices = synthetic_market(5, 400, seed=0)
    paths = prices.write(tmp_path)["paths"]
    settings = {"paths": paths, "test_start": str(prices.dates[300]), "gaps": "published"}
    before = StockPricesDataModule(**settings).panel
    row = pl.int_range(pl.len())
    pl.read_parquet(paths).with_columns(pl.when(row < 350).then(pl.col("S2")).alias("S2")).write_parquet(paths)
    after = StockPricesDataModule(**settings).panel
    assert before.tickers == ("S0", "S1", "S2", "S3", "S4")
    assert after.before(300).tickers == ("S0", "S1", "S3", "S4")
