"""A fit of two processes that is broken off amid an epoch ends, resumed, as the unbroken one: weights and means."""

import os
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import Dataset

from datamodules.epoch_sampler import EpochLoader, numbers_of
from lightning_modules.callbacks import LastCheckpoint, RandomState
from lightning_modules.collectives import gather_objects, n_processes, rank, share
from lightning_modules.metrics import EpochMean

N_ROWS, EPOCHS = 11, 3


class Rows(Dataset):
    """Row i holds sines of i; the number -1 is a row of weight 0."""

    def __len__(self):
        return N_ROWS

    def __getitem__(self, index):
        numbers = torch.tensor(numbers_of(index))
        return torch.sin((numbers % N_ROWS).unsqueeze(1) * torch.tensor([1.0, 2.0, 3.0])), (numbers >= 0).float()


class Regression(LightningModule):
    """Has dropout, so that the streams of every process matter, and Adam, so that gradients of every step do."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.5), nn.Linear(6, 1))
        self.train_loss = EpochMean()
        self.course = []

    def on_train_epoch_start(self):
        self.train_loss.reset()

    def training_step(self, batch, batch_idx):
        rows, weight = batch
        loss = (self.network(rows).squeeze(1) - rows.sum(1)).square() @ weight / weight.sum().clamp(min=1)
        self.train_loss.update(loss, weight.sum())
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, batch_size=len(rows))
        return loss * share(weight.sum())

    def on_train_epoch_end(self):
        self.course.append(float(self.train_loss.compute()))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


class BreakOff(Callback):
    """Ends the fit before a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise KeyError("broken off")


def fit(folder, break_at=None, resume=None):
    seed_everything(1, verbose=False)
    module = Regression()
    loader = EpochLoader(Rows(), rows=2, shuffled=True, seed=5, num_replicas=n_processes_asked(), rank=rank_asked())
    trainer = Trainer(
        accelerator="cpu",
        devices=n_processes_asked(),
        strategy="replicated",
        max_epochs=EPOCHS,
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RandomState(), BreakOff(break_at), LastCheckpoint(every_n_train_steps=1)],
    )
    try:
        trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
    except KeyError:
        return None
    return {"weights": gather_objects(module.network.state_dict()), "course": module.course}


def n_processes_asked():
    return int(os.environ["WORLD_SIZE"])


def rank_asked():
    return int(os.environ["RANK"])


def all_fits(folder):
    """The unbroken fit, then one that is broken off in every process before each of some steps and resumed."""
    unbroken = fit(Path(folder) / "unbroken")
    found = {}
    for step in (1, 2, 4, 7, 8):
        runs = Path(folder) / str(step)
        assert fit(runs, break_at=step) is None
        torch.manual_seed(99 + rank())
        found[step] = fit(runs, resume=str(runs / "checkpoints" / "last.ckpt"))
    assert n_processes() == 2
    return unbroken, found


def test_means_and_streams_of_every_process_are_taken_up(in_processes, tmp_path):
    for unbroken, found in in_processes(2, __file__, "all_fits", str(tmp_path)):
        first, second = unbroken["weights"]
        for name, weights in first.items():
            assert torch.equal(weights, second[name]), "processes are in step"
        assert len(unbroken["course"]) == EPOCHS
        for step, resumed in found.items():
            for name, weights in first.items():
                assert torch.equal(resumed["weights"][0][name], weights), (step, name)
            # sums of the two processes are joined at the stop: another order of float64 additions
            shown = torch.tensor(unbroken["course"][-len(resumed["course"]) :])
            torch.testing.assert_close(torch.tensor(resumed["course"]), shown, rtol=1e-6, atol=0)
