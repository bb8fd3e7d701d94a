"""Batches that worker processes assemble: the same after a stop, and no data set draws from a global stream."""

import random
from functools import partial

import numpy as np
import polars as pl
import pytest
import torch
from lightning import LightningModule, Trainer

from datamodules import InteractionsDataModule, StockPricesDataModule, TimeSeriesDataModule
from datamodules.synthetic import markov_interactions
from datamodules.synthetic_events import regime
from datamodules.synthetic_market import synthetic_market
from datamodules.synthetic_series import synthetic_series
from lightning_modules.callbacks import LastCheckpoint, RandomState

EPOCHS = 2
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:.*does not have many workers",
        "ignore:.*smaller than the logging",
        "ignore:.*no `val_dataloader`",
        "ignore:.*no `validation_step`",
        "ignore:You defined a `validation_step`",
    ),
]


class Watching(LightningModule):
    """Keeps every batch by its step, and is moved by it."""

    def __init__(self, batches):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        self.batches = batches

    def training_step(self, batch, number):
        self.batches[self.global_step] = batch
        return self.weight * sum(part.double().nan_to_num().mean() for part in batch.values())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.fixture(scope="module")
def made(tmp_path_factory, event_data):
    """``made[kind](num_workers)``: a data module of small files."""
    folder = tmp_path_factory.mktemp("files")
    regime(0, n_users=30, n_days=40, events_per_day=1.0, labels_per_day=0.2).write(folder)
    synthetic_series(28, 6, n_steps=12, rule="bump", noise=0.5, seed=3).write(folder, "Toy", ".tsv")
    prices = {name: str(file) for name, file in synthetic_market(10, 420, seed=3).write(folder / "market").items()}
    prices.pop("delistings_path")  # nothing is
    frame = markov_interactions(40, 20, n_days=20, seed=9).with_columns(pl.col("timestamp").dt.truncate("1d"))
    frame.write_parquet(folder / "shop.parquet")
    columns = {"user_column": "user_id", "item_column": "item_id", "time_column": "timestamp"}
    shop = partial(InteractionsDataModule, paths=str(folder / "shop.parquet"), cache_dir=str(folder / "shop"))
    return {
        "interactions": partial(shop, **columns, max_length=6, recommend_seen=True, target="next_basket"),
        "events": partial(event_data, folder, 3, sampling_seed=4),
        "series": partial(TimeSeriesDataModule, folder=str(folder), name="Toy", batch_size=6, validation_fraction=0.25),
        "prices": partial(
            StockPricesDataModule, **prices, test_start="2016-01-01", window_length=40, batch_size=9, seed=2
        ),
    }


def seed_all(seed):
    for begin in (random.seed, np.random.seed, torch.manual_seed):
        begin(seed)


def next_of_all():
    return random.random(), np.random.random(), float(torch.rand(()))  # noqa: NPY002  what users draw from


def fit(data, folder, batches, *callbacks, resume=None):
    seed_all(1 if resume is None else 77)
    module = Watching(batches)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[RandomState(), LastCheckpoint(every_n_train_steps=1, minutes=None), *callbacks],
    )
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return module.weight.detach()


@pytest.mark.parametrize("kind", ["events", "series", "prices"])
def test_a_fit_with_workers_goes_on_with_the_batches_of_an_unbroken_one(
    made, tmp_path, kind, break_at, broken, assert_same
):
    """Stopped in the second epoch, whose first batches a worker had fetched ahead."""
    wanted, found = {}, {}
    weight = fit(made[kind](num_workers=1), tmp_path / "unbroken", wanted)
    stop = len(wanted) // EPOCHS + 1
    assert len(wanted) > stop + 1, "nothing is left to go on with"
    folder = tmp_path / "broken"
    with pytest.raises(broken):
        fit(made[kind](num_workers=1), folder, found, break_at(stop, at_end=True))
    last = str(folder / "checkpoints" / "last.ckpt")
    resumed = fit(made[kind](num_workers=1), folder, found, resume=last)
    assert_same(found, wanted, kind)
    assert_same(resumed, weight, kind)
    alone = {}
    fit(made[kind](num_workers=0), tmp_path / "alone", alone)
    assert_same(alone, wanted, f"{kind}: without workers")


@pytest.mark.parametrize("kind", ["interactions", "events", "series", "prices"])
def test_no_data_set_draws_from_a_global_stream(made, kind, assert_same):
    data = made[kind](num_workers=0)
    data.prepare_data()
    data.setup("fit")
    dataset = data.train_dataloader().dataset
    drawn = []
    for seed in (1, 2):
        seed_all(seed)
        expected = next_of_all()
        seed_all(seed)
        # a later epoch too, and a row that stands for none
        drawn.append([dataset[[0, 1, 2]], dataset[[len(dataset), len(dataset) + 2]], dataset[[1, -1]]])
        assert next_of_all() == expected, "a global stream was moved"
    assert_same(drawn[0], drawn[1], kind)
