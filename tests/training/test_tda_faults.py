"""A fit of TDAPortfolioClusterer that is broken off anywhere and resumed ends as the unbroken one, bit for bit."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import StockPricesDataModule
from datamodules.synthetic_market import synthetic_market
from lightning_modules import TDAPortfolioClusterer
from lightning_modules.callbacks import LastCheckpoint, RandomState
from lightning_modules.checkpoint_io import AtomicCheckpointIO
from lightning_modules.networks import ConvAutoencoder
from lightning_modules.portfolio.clusterers import WardClusters
from lightning_modules.portfolio.weighting import EqualWeight
from lightning_modules.run_folder import RunLogger, drop_rows_after
from lightning_modules.topology import TopologicalRepresentation

EPOCHS, BATCHES = 3, 6
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*smaller than the logging",
    "ignore:Checkpoint directory .* exists and is not empty",  # a resumed run goes on in its own folder
)


class Denoising(ConvAutoencoder):
    """Draws at every step, and keeps running statistics of batches."""

    def loss(self, windows):
        return super().loss(windows + 0.002 * torch.randn_like(windows))


class Broken(Exception):
    pass


class BreakAt(Callback):
    """Dies at the start or the end of a training batch, counted over all epochs."""

    def __init__(self, batch, at_end):
        self.batch, self.at_end = batch, at_end

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.at_end and trainer.fit_loop.total_batch_idx == self.batch:
            raise Broken

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.at_end and trainer.fit_loop.total_batch_idx == self.batch:
            raise Broken


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums of several threads need not repeat bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    market = synthetic_market(10, 420, seed=3)
    files = {name: str(file) for name, file in market.write(tmp_path_factory.mktemp("market")).items()}
    files.pop("delistings_path")  # nothing is
    return files


NETWORKS = {
    "autoencoder": partial(Denoising, window_length=40, code_size=3, channels=(4, 1)),
    "topology": partial(TopologicalRepresentation, dimension=2, delay=1, stride=10, cache_dir=None),
}


def fit(files, network, folder, *callbacks):
    """Of a new run, or on from its last checkpoint: in a new module, data module and trainer."""
    run = folder / "tda" / "version_0"
    last = run / "checkpoints" / "last.ckpt"
    resumed = last.exists()
    if resumed:
        drop_rows_after(run, torch.load(last, weights_only=True))
    else:
        (run / "metrics.csv").unlink(missing_ok=True)
    seed_everything(77 if resumed else 1, verbose=False)  # what a resumed process draws before is forgotten
    data = StockPricesDataModule(**files, test_start="2016-01-01", window_length=40, batch_size=9)
    torch.manual_seed(77 if resumed else 5)
    module = TDAPortfolioClusterer(
        representation=NETWORKS[network](),
        clusterers=[WardClusters(n_clusters=3)],
        weighting=EqualWeight(),
        n_random=0,
        optimizer=partial(torch.optim.Adam, lr=0.01),
        # 0: every epoch that is not better halves the learning rate
        scheduler=partial(torch.optim.lr_scheduler.ReduceLROnPlateau, mode="max", factor=0.5, patience=0),
        monitor="val/silhouette",
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=RunLogger(str(folder), "tda", "version_0"),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        plugins=[AtomicCheckpointIO()],
        callbacks=[
            RandomState(),
            ModelCheckpoint(monitor="val/silhouette", mode="max", filename="best", save_on_train_epoch_end=True),
            LastCheckpoint(every_n_train_steps=2, minutes=None),
            *callbacks,
        ],
    )
    trainer.fit(module, data, ckpt_path=str(last) if resumed else None, weights_only=True)
    assert trainer.num_training_batches == BATCHES
    return module, data


def outcome(files, network, folder):
    """Of a run to its end: the last checkpoint, what was logged, and the test."""
    module, data = fit(files, network, folder)
    run = folder / "tda" / "version_0"
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    (batch,) = data.test_dataloader()
    study = module.test_step(batch, 0)
    return {
        "weights": checkpoint["state_dict"],
        "fitted": checkpoint["fitted"],
        "optimizers": checkpoint["optimizer_states"],
        "schedulers": checkpoint["lr_schedulers"],
        "random": checkpoint["callbacks"]["RandomState"],
        "metrics": (run / "metrics.csv").read_text(),
        "labels": study.labels,
        "embedding": study.embedding,
        "returns": study.model.track.returns,
    }


def assert_same(one, two, where=""):
    assert type(one) is type(two), where
    if isinstance(one, dict):
        assert list(one) == list(two), where
        for key in one:
            assert_same(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for number, (left, right) in enumerate(zip(one, two, strict=True)):
            assert_same(left, right, f"{where}[{number}]")
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True, msg=where)
    elif isinstance(one, np.ndarray):
        np.testing.assert_array_equal(one, two, err_msg=where)
    else:
        assert one == two, where


def stops(n, seed):
    every = [(batch, at_end) for batch in range(EPOCHS * BATCHES) for at_end in (False, True)]
    return random.Random(seed).sample(every, n)


@pytest.mark.parametrize(("network", "n_stops"), [("autoencoder", 16), ("topology", 4)])
def test_broken_off_anywhere_it_ends_as_the_unbroken_run(files, tmp_path, network, n_stops):
    unbroken = outcome(files, network, tmp_path / "unbroken")
    assert unbroken["metrics"].count("\n") > EPOCHS
    for number, (batch, at_end) in enumerate(stops(n_stops, seed=4)):
        folder = tmp_path / str(number)
        with pytest.raises(Broken):
            fit(files, network, folder, BreakAt(batch, at_end))
        assert_same(outcome(files, network, folder), unbroken, f"stopped at batch {batch}, {at_end=}: ")
