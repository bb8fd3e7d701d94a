import logging

import lightning
import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

from datamodules import StockPricesDataModule
from datamodules.synthetic_market import synthetic_market

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


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (
            "bundled:us20_index",
            "lacks 17 of .*; index_paths is the bundled index 'bundled:us20_index': .*: null for none$",
        ),
        ("own.csv", "lacks 48 of [^;]*; at most 5 may be lacking, and not the first$"),
    ],
)
def test_an_index_of_other_days_is_named_where_the_config_brought_it(tmp_path, index, said):
    own = tmp_path / "own.csv"
    pl.DataFrame({"Date": ["2020-01-02", "2020-01-03"], "Own": [1.0, 2.0]}).write_csv(own)
    paths = str(own) if index == "own.csv" else index
    with pytest.raises(ValueError, match=said):
        module(tmp_path, walk(50, 2), test_start=30, window_length=5, index_paths=paths).setup("fit")


def test_rows_of_the_periods(tmp_path):
    days = calendar(50)
    panel = module(
        tmp_path,
        walk(50, 2),
        test_start=30,
        train_start=str(days[4]),
        test_end=str(days[39]),
        purge_days=3,
        window_length=5,
    ).panel
    assert (panel.train_start, panel.train_stop, panel.test_start, panel.test_stop) == (4, 27, 30, 40)
    assert len(panel.dates) == 50
    wide = module(tmp_path, walk(50, 2), test_start=30, train_start="2010-01-01", test_end="2030-01-01").panel
    assert (wide.train_start, wide.train_stop, wide.test_start, wide.test_stop) == (0, 30, 30, 50)
    assert wide.flags == (
        "train_start 2010-01-01 is before the first session 2020-01-01",
        "test_end 2030-01-01 is after the last session 2020-02-19",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gaps": "none"}, "gaps must be one of 'causal', 'published', got 'none'"),
        ({"purge_days": -1}, "purge_days must be at least 0, got -1"),
        ({"window_length": 0}, "window_length must be at least 1, got 0"),
        ({"validation_windows": 0}, "validation_windows must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_disagreement": 0.0}, r"max_disagreement must be above 0, got 0\.0"),
        ({"train_start": "yesterday"}, "train_start must be a date such as 2015-01-31, got 'yesterday'"),
        ({"train_start": ""}, "train_start must be a date such as 2015-01-31, got ''"),
        ({"train_start": "2020-01-31"}, "test_start 2020-01-31 must come after train_start 2020-01-31"),
        ({"test_end": "2020-01-30"}, "test_end 2020-01-30 must not come before test_start 2020-01-31"),
        ({"test_start": 50}, "test_start 2020-02-20 must come after .* first session 2020-01-01 .* last, 2020-02-19"),
        ({"test_start": 0}, "test_start 2020-01-01 must come after the first session 2020-01-01"),
        (
            {"train_start": "2020-01-20", "purge_days": 10},
            "1 sessions to train on between train_start 2020-01-20 and test_start 2020-01-31 less purge_days 10, at",
        ),
        ({"window_length": 10, "validation_windows": 2}, "validation_windows 2 leaves none of the 2 windows"),
        (
            {"membership_path": "ticker,start,end\nA,2020-02-01,\n"},
            "no stock of 2 is eligible on 2020-01-30: a member, with a return that day and on 95 %",
        ),
    ],
)
def test_bad_periods_end_in_one_line(tmp_path, change, message):
    if "membership_path" in change:
        (tmp_path / "m.csv").write_text(change["membership_path"])
        change = {"membership_path": str(tmp_path / "m.csv")}
    with pytest.raises(ValueError, match=message) as caught:
        module(tmp_path, walk(50, 2), **{"test_start": 30, "window_length": 5} | change).setup("fit")
    assert "\n" not in str(caught.value)


def test_no_session_in_the_test(tmp_path):
    days = ["2019-12-30", "2019-12-31", "2020-01-01", "2020-01-02", "2020-02-01"]
    pl.DataFrame({"Date": days, "A": [1, 2, 3, 4, 5]}).write_csv(tmp_path / "p.csv")
    gap = StockPricesDataModule(paths=str(tmp_path / "p.csv"), test_start="2020-01-10", test_end="2020-01-20")
    with pytest.raises(ValueError, match="no session to test on between test_start 2020-01-10 and test_end 2020-01-20"):
        gap.setup("fit")


def test_windows_are_anchored_at_the_end_and_split_by_time(tmp_path):
    prices = walk(60, 4)
    prices[38:45, 1] = NAN  # more days than are filled before the end of the train window
    prices[:8, 2] = NAN  # 8 of 39 returns are missing
    prices[30, 3] = NAN  # filled: one return is 0
    loaded = module(
        tmp_path,
        prices,
        test_start=47,
        purge_days=2,
        train_start="2020-01-06",
        window_length=9,
        validation_windows=2,
        batch_size=3,
    )
    loaded.setup("fit")
    panel = loaded.panel
    assert (panel.train_start, panel.train_stop) == (5, 45)
    train = list(loaded.train_dataloader())
    assert [len(batch["windows"]) for batch in train] == [3, 1]
    train = {key: torch.cat([batch[key] for batch in train]) for key in train[0]}
    (held_out,) = loaded.val_dataloader()
    # 39 returns hold four windows of 9, which end at 45, 36, 27 and 18
    assert sorted(zip(train["stops"].tolist(), train["stocks"].tolist(), strict=True)) == [
        (18, 0),
        (18, 3),
        (27, 0),
        (27, 3),
    ]
    assert held_out["stops"].tolist() == [36, 36, 45, 45]
    assert held_out["stocks"].tolist() == [0, 3, 0, 3]
    for batch in (train, held_out):
        assert batch["windows"].dtype == torch.float32
        assert batch["stocks"].dtype == batch["stops"].dtype == torch.int64
        for window, stock, stop in zip(batch["windows"], batch["stocks"], batch["stops"], strict=True):
            expected = np.nan_to_num(panel.returns[stop - 9 : stop, stock]).astype(np.float32)
            np.testing.assert_array_equal(window.numpy(), expected)
    days = [{d for stop in batch["stops"].tolist() for d in range(stop - 9, stop)} for batch in (train, held_out)]
    assert not days[0] & days[1]
    assert held_out["windows"][1][30 - 27] == 0


def test_one_window_is_shared_with_a_flag(tmp_path, caplog):
    loaded = module(tmp_path, walk(60, 3), test_start=40, window_length=20)
    with caplog.at_level(logging.WARNING):
        loaded.setup("fit")
    assert loaded.panel.flags == ("the train window holds one window of 20 days: train and validation share it",)
    assert loaded.panel.flags[0] in caplog.text
    (train,), (held_out,) = loaded.train_dataloader(), loaded.val_dataloader()
    assert sorted(train["stops"].tolist()) == held_out["stops"].tolist() == [40, 40, 40]


def test_panels_of_the_stages(tmp_path):
    loaded = module(tmp_path, walk(60, 3), test_start=40, test_end="2020-02-14", purge_days=4, window_length=10)
    loaded.setup("fit")
    (held_out,), (test,), (predict,) = loaded.val_dataloader(), loaded.test_dataloader(), loaded.predict_dataloader()
    assert set(held_out) == {*test, "windows", "stocks", "stops"}
    assert len(held_out["dates"]) == len(held_out["prices"]) == len(held_out["member"]) == 36
    assert [held_out[name] for name in ("train_start", "train_stop", "test_start", "test_stop")] == [0, 36, 36, 36]
    assert len(test["dates"]) == len(predict["dates"]) == 60
    assert [test[name] for name in ("train_start", "train_stop", "test_start", "test_stop")] == [0, 36, 40, 45]
    assert test["index_prices"] is None
    dtypes = {"dates": torch.int64, "prices": torch.float64, "returns": torch.float64, "member": torch.bool}
    dtypes |= {"sectors": torch.int64, "delisting_returns": torch.float64}
    assert {name: test[name].dtype for name in dtypes} == dtypes
    assert test["dates"][0] == 18262  # 2020-01-01
    assert test["tickers"] == ["A", "B", "C"]
    assert loaded.n_stocks == 3


class Recorder(lightning.LightningModule):
    """Keeps what the trainer hands over."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seen = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch)
        return (self.scale * batch["windows"]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append(batch)

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(batch)

    def predict_step(self, batch, batch_idx):
        self.seen["predict"].append(batch)
        return len(batch["dates"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder, **arguments):
    return lightning.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        **arguments,
    )


def write_market(folder):
    return synthetic_market(30, 400, listed_late=0.2, delisted=0.2, seed=0).write(folder)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_batches_pass_through_the_trainer_unchanged(tmp_path):
    files = write_market(tmp_path / "market")
    arguments = {**files, "test_start": "2015-12-01", "test_end": "2016-05-31", "window_length": 30}
    orders = []
    for _ in range(2):
        lightning.seed_everything(3, verbose=False)
        loaded, model = StockPricesDataModule(**arguments), Recorder()
        runner = trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
        runner.fit(model, loaded)
        runner.test(model, loaded, verbose=False)
        runner.predict(model, loaded)
        orders.append([batch["stops"].tolist() + batch["stocks"].tolist() for batch in model.seen["train"]])
    assert orders[0] == orders[1]
    half = len(orders[0]) // 2
    assert orders[0][:half] != orders[0][half:]  # drawn anew in the second epoch
    expected = loaded.panel.batch()
    for batch in (model.seen["test"][0], model.seen["predict"][0]):
        assert batch.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert batch[name].dtype == value.dtype
                assert torch.equal(batch[name].nan_to_num(-1), value.nan_to_num(-1))
            else:
                assert type(batch[name]) is type(value)
                assert batch[name] == value


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_checkpoints_of_other_prices_or_another_split_are_refused(tmp_path):
    files = write_market(tmp_path / "market")
    arguments = {**files, "test_start": "2015-12-01", "window_length": 30}
    runner, model = trainer(tmp_path, max_epochs=1), Recorder()
    runner.fit(model, StockPricesDataModule(**arguments))
    checkpoint = runner.checkpoint_callback.best_model_path

    def again(**change):
        runner.test(model, StockPricesDataModule(**arguments | change), ckpt_path=checkpoint, verbose=False)

    again()
    again(test_end="2016-02-01")  # what comes after the train window may differ
    for change, message in (
        ({"test_start": "2015-12-02"}, "last train day '2015-11-30', here it is '2015-12-01'"),
        ({"train_start": "2015-02-02"}, "first train day '2015-01-01', here it is '2015-02-02'"),
        ({"purge_days": 1}, "last train day '2015-11-30', here it is '2015-11-27'"),
        ({"window_length": 31}, "window_length 30, here it is 31"),
        ({"exclude": ["S00"]}, "trained on [0-9]+ tickers, here [0-9]+ have a price in the train window; 1 are not in"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            again(**change)
        assert "\n" not in str(caught.value)

    frame = pl.read_parquet(files["paths"])
    longer = pl.concat([frame, frame.tail(1).with_columns(pl.col("Date") + pl.duration(days=1))])
    longer.write_parquet(tmp_path / "longer.parquet")
    same = {"paths": str(tmp_path / "longer.parquet"), "index_paths": None}
    again(**same)  # new days at the end of the file
    frame.with_columns(pl.col("S03") * 0.98).write_parquet(tmp_path / "longer.parquet")
    again(**same)  # a dividend since: all adjusted prices of the past are lower, returns are as they were
    before = pl.col("Date") < pl.date(2015, 6, 1)
    mended = pl.when(before).then(pl.col("S03") * 2).otherwise(pl.col("S03"))
    frame.with_columns(mended.alias("S03")).write_parquet(tmp_path / "longer.parquet")
    with pytest.raises(ValueError, match="trained on other prices: S03 grew by a log return of"):
        again(**same)
