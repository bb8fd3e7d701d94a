"""Portfolios through the real command: every shipped config, bundled and synthetic prices, and what is refused."""

import json

import numpy as np
import polars as pl
import pytest
import torch
import yaml

from datamodules.synthetic_market import synthetic_market

CONFIGS = "configs/tda_portfolio"
SHIPPED = ("sp500", "sp500_published", "sp500_conv", "sp500_lstm", "sp500_conv_published", "sp500_lstm_published")
QUICK = ("--model.init_args.n_random", 3)
PICTURES = {
    "equity",
    "drawdown",
    "rolling_sharpe",
    "weights",
    "dendrogram",
    "clusters",
    "volatility",
    "costs",
    "random",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A market of 40 stocks over 25 months, some of them delisted in the test, as files of the data module."""
    folder = tmp_path_factory.mktemp("market")
    return {name: str(file) for name, file in synthetic_market(40, 540, delisted=0.15, seed=2).write(folder).items()}


@pytest.fixture
def config(project, tmp_path, files):
    """``config(name)``: a shipped config pointed at the synthetic market, its network cut down to a toy."""

    def make(name: str, **model):
        settings = yaml.safe_load((project / CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
        arguments = settings["model"]["init_args"]
        for clusterer in arguments["clusterers"]:
            clusterer["init_args"]["n_clusters"] = 4
        network = arguments["representation"]["init_args"]
        if "code_size" in network:
            settings["trainer"]["max_epochs"] = 2
            network |= {"window_length": 50, "code_size": 6}
            network |= {"hidden_size": 8} if "hidden_size" in network else {"channels": [4, 1]}
            settings["data"]["init_args"]["window_length"] = 50
        else:
            network |= {"dimension": 3, "delay": 2, "giotto_compat": False}
        dropped = ("check_paths", "index_column", "tickers_path")
        prices = {key: value for key, value in settings["data"]["init_args"].items() if key not in dropped}
        settings["data"]["init_args"] = (
            prices
            | files
            | {
                "train_start": "2015-01-01",
                "test_start": "2016-01-01",
                "test_end": "2016-10-31",
            }
        )
        settings["model"]["init_args"] |= {"n_random": 3} | model
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return path

    return make


def run_of(tmp_path):
    (run,) = tmp_path.glob("runs/*/version_0")
    return run


def one_line(error: str) -> str:
    (line,) = [line for line in error.splitlines() if line.strip()]
    assert line.startswith("seqlit: error: ")
    assert len(line) < 500
    return line


def test_bundled_stocks_from_one_yaml(seqlit, project, tmp_path):
    shipped = project / CONFIGS / "us20.yaml"
    quick = (*QUICK, "--data.init_args.test_end", "2007-06-30")
    status, out, err = seqlit("fit", "--config", shipped, *quick)
    assert status == 0, err
    run = run_of(tmp_path)
    assert {file.name for file in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    status, out, err = seqlit("test", "--config", shipped, *quick)
    assert status == 0, err
    report = json.loads((run / "report" / "metrics.json").read_text())
    text = (run / "report" / "report.md").read_text()
    assert "20 stocks" in text
    assert "cannot be told apart" in text, "eighteen months of twenty stocks show nothing, and the report says so"
    assert PICTURES | {"diagrams", "landscapes", "comparison"} == {f.stem for f in (run / "report").glob("*.png")}
    assert "NaN" not in json.dumps(report)

    status, out, err = seqlit("predict", "--config", shipped, *quick)
    assert status == 0, err
    assert "as of 2022-12-28 hold, no orders for 2022-12-29" in out, "the panel goes on after the test, as does advice"
    assert "the next rebalance is at the first session of 2023-01" in out
    orders = pl.read_parquet(run / "orders.parquet")
    assert orders["target"].sum() == pytest.approx(1, abs=1e-8)
    assert orders["held"].sum() == pytest.approx(1, abs=1e-8)
    np.testing.assert_allclose(orders["order"], orders["target"] - orders["held"], atol=1e-15)
    assert set(orders["side"]) == {"hold"}, "the strategy that was tested trades at the first session of a month"
    assert orders.filter(pl.col("target") > 1e-6)["cluster"].null_count() == 0
    status, out, err = seqlit("predict", "--config", shipped, *quick, "--model.init_args.next_session", "2023-01-03")
    assert status == 0, err
    assert "orders as of 2022-12-28 for 2023-01-03" in out
    assert {"buy", "sell"} <= set(pl.read_parquet(run / "orders.parquet")["side"])
    weights = pl.read_parquet(run / "weights.parquet")
    by_date = weights.group_by("date", maintain_order=True).agg(pl.col("weight").sum())
    assert len(by_date) == 204, "17 years of months"
    np.testing.assert_allclose(by_date["weight"], 1, atol=1e-8)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_fit_and_test(seqlit, config, tmp_path, name):
    path = config(name)
    for command in ("fit", "test"):
        status, _, err = seqlit(command, "--config", path)
        assert status == 0, err
    text = (run_of(tmp_path) / "report" / "report.md").read_text()
    assert "sectors" in text
    assert ("Nobody could have had these numbers" in text) == (name == "sp500_published")
    checkpoint = torch.load(run_of(tmp_path) / "checkpoints" / "best.ckpt", weights_only=True)
    assert set(checkpoint["fitted"]) == {"tickers", "first_day", "last_day", "rows", "labels"}
    status, _, err = seqlit("predict", "--config", path)
    if name == "sp500_published":
        assert status == 2
        assert "mode published selects stocks by returns of the test: it cannot advise" in one_line(err)
    else:
        assert status == 0, err


def test_the_same_seed_gives_the_same_report(seqlit, config, tmp_path):
    found = []
    for _ in range(2):
        for command in ("fit", "test"):
            status, _, err = seqlit(command, "--config", config("sp500_conv"))
            assert status == 0, err
        (newest,) = tmp_path.glob("runs/*/version_*/report/metrics.json")
        report = json.loads(newest.read_text())
        report.pop("seconds")
        found.append(report)
        for folder in tmp_path.glob("runs/*/version_*"):
            folder.rename(tmp_path / f"kept_{len(found)}")
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--model.init_args.n_random", "-1"], "n_random must be at least 0"),
        (["--model.init_args.cost_bps", "-3"], "cost_bps must be at least 0, got -3"),
        (["--model.init_args.mode", "hindsight"], "mode"),
        (["--model.init_args.min_observed", "1.5"], "min_observed must be above 0 and at most 1, got 1.5"),
        (["--data.init_args.test_start", "2035-01-01"], "test_start"),
        (["--data.init_args.paths", "nowhere.parquet"], "no file matches 'nowhere.parquet'"),
        (["--model.init_args.weight_months", "0"], "weight_months must be at least 1, got 0"),
        (["--data.init_args.sectors_path", "none.csv"], "none.csv"),
    ],
)
def test_wrong_settings_end_in_one_line(seqlit, config, tmp_path, overrides, message):
    status, _, err = seqlit("fit", "--config", config("sp500"), *overrides)
    assert status == 2
    assert message in one_line(err)
    assert not list(tmp_path.glob("runs/**/*.ckpt"))


def test_more_clusters_than_stocks(seqlit, config):
    many = [{"class_path": "lightning_modules.portfolio.clusterers.WardClusters", "init_args": {"n_clusters": 60}}]
    status, _, err = seqlit("fit", "--config", config("sp500", clusterers=many))
    assert status == 2
    assert "n_clusters must be at most the number of eligible stocks" in one_line(err)


def test_a_checkpoint_of_other_prices_is_refused(seqlit, config, tmp_path):
    path = config("sp500")
    assert seqlit("fit", "--config", path)[0] == 0
    checkpoint = run_of(tmp_path) / "checkpoints" / "best.ckpt"
    status, _, err = seqlit(
        "test", "--config", path, "--ckpt_path", checkpoint, "--data.init_args.train_start", "2015-03-01"
    )
    assert status == 2
    one_line(err)
