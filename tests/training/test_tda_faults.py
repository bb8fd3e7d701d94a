"""A fit of TDAPortfolioClusterer that is broken off anywhere and resumed ends as the unbroken one, bit for bit."""

import random
from functools import partial

import pytest
import torch
from lightning import Trainer, seed_everything
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
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:.*does not have many workers",
        "ignore:.*smaller than the logging",
        "ignore:Checkpoint directory .* exists and is not empty",  # a resumed run goes on in its own folder
    ),
]


class Denoising(ConvAutoencoder):
    """Draws at every step, and keeps running statistics of batches."""

    def loss(self, windows):
        return super().loss(windows + 0.002 * torch.randn_like(windows))


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


def stops(n, seed):
    every = [(batch, at_end) for batch in range(EPOCHS * BATCHES) for at_end in (False, True)]
    return random.Random(seed).sample(every, n)


@pytest.mark.parametrize(("network", "n_stops"), [("autoencoder", 16), ("topology", 4)])
def test_broken_off_anywhere_it_ends_as_the_unbroken_run(
    files, tmp_path, network, n_stops, break_at, broken, assert_same
):
    unbroken = outcome(files, network, tmp_path / "unbroken")
    assert unbroken["metrics"].count("\n") > EPOCHS
    for number, (batch, at_end) in enumerate(stops(n_stops, seed=4)):
        folder = tmp_path / str(number)
        with pytest.raises(broken):
            fit(files, network, folder, break_at(batch, at_end))
        assert_same(outcome(files, network, folder), unbroken, f"stopped at batch {batch}, {at_end=}: ")
