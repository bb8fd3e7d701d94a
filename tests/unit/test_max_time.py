"""A fit that ran out of time is unfinished: it can be gone on with, and then does all that was asked for."""

import json

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_modules.callbacks import EpochLines, LastCheckpoint
from lightning_modules.run_folder import LAST, RunLogger

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*smaller than the logging",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:Checkpoint directory .* exists",
)


class TimeIsUp(Callback):
    """Ends the time of a timer amid an epoch."""

    def __init__(self, timer, epoch):
        self.timer, self.epoch = timer, epoch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == self.epoch:
            self.timer._duration = 0.0


class Counted(Callback):
    """Logs epochs done, for early stopping at a number of them."""

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("n", float(trainer.current_epoch + 1))


def fitted(folder, timer=(), resume=None):
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        limit_train_batches=4,
        limit_val_batches=1,
        logger=RunLogger(str(folder), "run", "version_0"),
        callbacks=[*timer, EpochLines(), LastCheckpoint()],
        enable_checkpointing=True,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(BoringModel(), ckpt_path=resume, weights_only=True if resume else None)
    return json.loads((folder / "run/version_0/fit.json").read_text())


def test_a_fit_out_of_time_goes_on(tmp_path, capsys):
    timer = Timer(duration={"hours": 1})
    facts = fitted(tmp_path, [TimeIsUp(timer, epoch=1), timer])
    assert (facts["finished"], facts["stopped_early"], facts["epochs"]) == (False, False, 2)
    assert "the time is up; `fit --ckpt_path last` goes on where trainer.max_time is longer" in capsys.readouterr().out
    last = tmp_path / "run/version_0/checkpoints" / LAST
    unchanged = fitted(tmp_path, [Timer(duration={"seconds": 0})], last)
    assert unchanged == facts, "without more time nothing happens"
    facts = fitted(tmp_path, resume=last)
    assert (facts["finished"], facts["stopped_early"], facts["epochs"]) == (True, False, 3)


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("check_on_train_epoch_end", [False, True])
def test_a_fit_that_stopped_early_as_its_time_was_up_has_finished(tmp_path, capsys, epoch, check_on_train_epoch_end):
    timer = Timer(duration={"hours": 1})
    stopping = EarlyStopping(
        "n", mode="max", stopping_threshold=epoch + 0.5, check_on_train_epoch_end=check_on_train_epoch_end
    )
    facts = fitted(tmp_path, [TimeIsUp(timer, epoch), timer, Counted(), stopping])
    assert (facts["finished"], facts["stopped_early"], facts["epochs"]) == (True, True, epoch + 1)
    assert "the time is up" not in capsys.readouterr().out
    last = torch.load(tmp_path / "run/version_0/checkpoints" / LAST, weights_only=True)
    assert last["callbacks"]["LastCheckpoint"] == {"stopped": True}


def test_an_early_stop_before_does_not_hide_that_time_is_up(tmp_path):
    """The run was gone on with after it, and did not stop early again."""
    stopping = EarlyStopping("n", mode="max", stopping_threshold=0.5, check_on_train_epoch_end=False)
    facts = fitted(tmp_path, [Counted(), stopping])
    assert (facts["stopped_early"], facts["epochs"]) == (True, 1)
    timer, last = Timer(duration={"hours": 1}), tmp_path / "run/version_0/checkpoints" / LAST
    more = EarlyStopping("n", mode="max", stopping_threshold=9.5, check_on_train_epoch_end=False)
    facts = fitted(tmp_path, [TimeIsUp(timer, 1), timer, Counted(), more], last)
    assert (facts["finished"], facts["stopped_early"], facts["epochs"]) == (False, False, 2)


def test_a_fit_that_was_done_in_time_has_finished(tmp_path):
    timer = Timer(duration={"hours": 1})
    facts = fitted(tmp_path, [TimeIsUp(timer, epoch=2), timer])
    assert (facts["finished"], facts["stopped_early"], facts["epochs"]) == (True, False, 3)
