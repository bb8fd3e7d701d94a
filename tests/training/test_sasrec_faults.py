"""A run that is broken off anywhere and resumed ends as the unbroken run does, bit for bit: SASRec.

On a CPU with one thread; every stop is resumed in a new module, data module and trainer from what lies on disk.
"""

import os
import random
from functools import partial

import numpy as np
import polars as pl
import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint

from datamodules import InteractionsDataModule
from datamodules.synthetic import markov_interactions
from lightning_modules import SASRecCCE
from lightning_modules.callbacks import LastCheckpoint, RandomState
from lightning_modules.checkpoint_io import AtomicCheckpointIO
from lightning_modules.losses import CCEMinusLoss
from lightning_modules.networks import PublishedBlock
from lightning_modules.run_folder import RunLogger, drop_rows_after

# The command ignores it too: a resumed run goes on in its own folder.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
N_EPOCHS, N_BATCHES = 3, 6


@pytest.fixture(autouse=True)
def no_power_cuts(monkeypatch):
    """Waiting for the disk is most of what a checkpoint takes, and nothing here outlives the machine."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


class DrawsEverywhere(Callback):
    """Moves every global stream at every step, as a user's augmentation would, and at the start of an epoch."""

    def on_train_epoch_start(self, trainer, pl_module):
        torch.rand(1)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.drawn = getattr(pl_module, "drawn", 0) + random.random() + np.random.random()  # noqa: NPY002


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    frame = markov_interactions(64, 20, n_days=20, seed=9).with_columns(pl.col("timestamp").dt.truncate("1d"))
    frame.write_parquet(folder / "markov.parquet")
    return folder / "markov.parquet"


def data_of(shop, **arguments):
    settings = {"user_column": "user_id", "item_column": "item_id", "time_column": "timestamp", "max_length": 6}
    settings |= {"target": "next_basket", "recommend_seen": True, "train_window": "last", "batch_size": 8}
    return InteractionsDataModule(paths=str(shop), cache_dir=str(shop.parent), **settings | arguments)


def module_of(data, *, plateau=False):
    torch.manual_seed(5)
    return SASRecCCE(
        n_items=data.n_items,
        max_length=6,
        recommend_seen=True,
        target="next_basket",
        d_model=8,
        n_blocks=1,
        block=partial(PublishedBlock, dropout=0.2),
        loss=CCEMinusLoss(4),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.02),
        # patience 0: every epoch that is not better halves the learning rate
        scheduler=(lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, mode="max", factor=0.5, patience=0))
        if plateau
        else None,
        monitor="val/ndcg@5",
        cutoffs=[5],
    )


class Runs:
    """One run folder and the sittings in it."""

    def __init__(self, shop, folder, *, every=3, plateau=False, callbacks=lambda: [], workers=0, **trainer):
        self.shop, self.folder, self.every, self.plateau, self.workers = shop, folder, every, plateau, workers
        self.callbacks = callbacks
        self.trainer = {"max_epochs": N_EPOCHS, "num_sanity_val_steps": 0, "log_every_n_steps": 1} | trainer

    @property
    def run(self):
        return self.folder / "sasrec" / "version_0"

    def fit(self, *callbacks):
        data = data_of(self.shop, num_workers=self.workers)
        module = module_of(data, plateau=self.plateau)
        last = self.run / "checkpoints" / "last.ckpt"
        path = str(last) if last.exists() else None
        if path is not None:
            drop_rows_after(self.run, torch.load(path, weights_only=True))
        else:
            (self.run / "metrics.csv").unlink(missing_ok=True)
        random.seed(1 if path is None else 77)
        np.random.seed(2 if path is None else 77)  # noqa: NPY002
        torch.manual_seed(3 if path is None else 77)
        trainer = Trainer(
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=RunLogger(str(self.folder), "sasrec", "version_0"),
            plugins=[AtomicCheckpointIO()],
            callbacks=[
                RandomState(),
                DrawsEverywhere(),
                *self.callbacks(),
                LastCheckpoint(every_n_train_steps=self.every, minutes=None),
                *callbacks,
            ],
            **self.trainer,
        )
        trainer.fit(module, data, ckpt_path=path, weights_only=True)
        return trainer, module, data

    def finished(self):
        trainer, module, data = self.fit()
        state = torch.load(self.run / "checkpoints" / "last.ckpt", weights_only=True)
        tested = trainer.test(module, data, verbose=False)
        return state, (self.run / "metrics.csv").read_text(), tested


def without_paths(state):
    """A checkpoint but for where the callbacks of Lightning keep their files."""
    callbacks = {key: value for key, value in state["callbacks"].items() if "ModelCheckpoint" not in key}
    return state | {"callbacks": callbacks}


@pytest.fixture
def check(assert_same, break_at, broken):
    """``check(runs_of, stops)``: every run that is broken off and resumed ends as the unbroken one."""
    return partial(_check, assert_same, break_at, broken)


def _check(assert_same, break_at, broken, runs_of, stops):
    unbroken = runs_of("unbroken").finished()
    assert unbroken[0]["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"] == N_EPOCHS * N_BATCHES
    for batch, at_end in stops:
        runs = runs_of(f"broken_{batch}_{at_end}")
        with pytest.raises(broken):
            runs.fit(break_at(batch, at_end))
        resumed = runs.finished()
        for name, one, two in zip(("checkpoint", "metrics", "test"), unbroken, resumed, strict=True):
            if name == "checkpoint":
                one, two = without_paths(one), without_paths(two)
            assert_same(
                one, two, nan_is_nan=True, where=f"stopped at batch {batch}, {'end' if at_end else 'start'}: {name}"
            )


def test_twenty_stops_at_random_steps(check, shop, tmp_path):
    """Dropout, a plateau scheduler, a monitor that logs at the start of an epoch, a checkpoint every three steps."""
    draw = random.Random(7)
    stops = draw.sample([(batch, end) for batch in range(N_EPOCHS * N_BATCHES) for end in (False, True)], 20)

    def callbacks():
        return [LearningRateMonitor("epoch"), ModelCheckpoint(monitor="val/ndcg@5", mode="max", filename="best")]

    check(lambda name: Runs(shop, tmp_path / name, plateau=True, callbacks=callbacks), stops)


@pytest.mark.parametrize(
    ("trainer", "stops"),
    [
        ({"accumulate_grad_batches": 3}, [(4, True), (7, True), (13, False)]),
        ({"val_check_interval": 3}, [(2, True), (4, False), (5, True), (14, False)]),
        ({"val_check_interval": 2, "accumulate_grad_batches": 2}, [(5, True), (11, False)]),
        ({"max_steps": N_EPOCHS * N_BATCHES, "max_epochs": -1}, [(3, True), (5, True), (6, False), (16, True)]),
        ({"reload_dataloaders_every_n_epochs": 1}, [(10, True), (16, False)]),
    ],
    ids=["accumulated", "validation amid an epoch", "both", "counted in steps", "reloaded"],
)
def test_stops_under_other_trainers(check, shop, tmp_path, trainer, stops):
    check(lambda name: Runs(shop, tmp_path / name, plateau=True, every=1, **trainer), stops)


def test_workers_that_fetch_ahead_lose_nothing(check, shop, tmp_path):
    check(lambda name: Runs(shop, tmp_path / name, every=2, workers=1), [(3, True), (12, False)])


def test_early_stopping_is_remembered_by_a_run_killed_after_its_last_checkpoint(shop, tmp_path, broken):
    """The stop itself is in no state of Lightning's; without it the run would go on for another epoch."""

    class KilledInTheEnd(Callback):
        def on_fit_end(self, trainer, pl_module):
            raise broken

    def callbacks():
        return [EarlyStopping(monitor="val/loss", mode="max", patience=1, stopping_threshold=-1.0)]

    runs = Runs(shop, tmp_path, callbacks=callbacks)
    with pytest.raises(broken):
        runs.fit(KilledInTheEnd())
    trainer, *_ = runs.fit()
    assert trainer.current_epoch == 1
