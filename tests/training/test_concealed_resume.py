"""A fit of ConcealedAttacker that is broken off after an epoch and resumed equals an unbroken one, bit for bit."""

import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import TimeSeriesDataModule
from datamodules.synthetic_series import synthetic_series
from lightning_modules import ConcealedAttacker
from lightning_modules.attacks import AdamStep, Attack, Linf, Momentum, PGDStep, SignStep, SumReg, Vanilla
from lightning_modules.attacks.discriminators import AttackPlan, DiscriminatorPlan, TrainingAttack
from lightning_modules.callbacks import RandomState
from lightning_modules.networks import LSTM, ResCNN

CLASSIFIER_EPOCHS, EPOCHS_PER_LEVEL, LEVELS = 2, 2, 4
LAST = CLASSIFIER_EPOCHS + EPOCHS_PER_LEVEL * LEVELS - 1
BALL = {"projection": Linf(), "n_steps": 3}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*smaller than the logging",
    "ignore:.*in eval mode at the start",
    "ignore:The dirpath has changed",  # the resumed fit writes elsewhere than the unbroken one
    "ignore:Checkpoint directory .* exists and is not empty",  # it is the one that was broken off
)


def network(n_channels, n_classes, n_steps):
    return ResCNN(n_channels=n_channels, n_classes=n_classes, n_steps=n_steps, n_filters=2)


def dropping_lstm(n_channels, n_classes, n_steps):
    return LSTM(n_channels=n_channels, n_classes=n_classes, n_steps=n_steps, hidden_size=4, dropout=0.5)


def by_epochs(optimizer):
    """Rates that are a function of the epochs of the schedule, which a resumed fit must know."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch))


def attacker():
    """Replay, mixtures, rounds against two attacked discriminators, attacks that draw, dropout."""
    schedule = {"gamma": 0.5, "n_levels": 2, "epochs_per_level": EPOCHS_PER_LEVEL, "replay": 0.5}
    ifgsm, pgd = Attack(Vanilla(), SignStep(), n_steps=3), Attack(Vanilla(), PGDStep(), random_start=True, **BALL)
    rounds = {"n_rounds": 2, "round_attack": Attack(SumReg(), SignStep(0.1), n_steps=3)}
    return ConcealedAttacker(
        n_channels=1,
        n_classes=2,
        n_steps=24,
        classifier=dropping_lstm,
        classifier_epochs=CLASSIFIER_EPOCHS,
        discriminators=[
            DiscriminatorPlan(
                name="a",
                network=dropping_lstm,
                attack=ifgsm,
                training_attacks="ifgsm",
                start=0.3,
                mixture=[TrainingAttack(name="pgd", attack=pgd, start=0.6)],
                seed=1,
                **schedule,
                **rounds,
            ),
            DiscriminatorPlan(
                name="b",
                network=dropping_lstm,
                attack=ifgsm,
                training_attacks="ifgsm",
                start=0.3,
                seed=3,
                **schedule,
                **rounds,
            ),
            DiscriminatorPlan(
                name="h",
                role="held_out",
                network=network,
                attack=Attack(Vanilla(), Momentum(), n_steps=3),
                training_attacks="momentum",
                start=0.6,
                seed=2,
                **schedule,
            ),
        ],
        attacks=[
            AttackPlan(name="sum", family="ifgsm", attack=Attack(SumReg(), SignStep(), n_steps=3), steps=[0.1, 0.3]),
            AttackPlan(name="sgm", family="sgm", attack=Attack(SumReg(), AdamStep(0.1), **BALL), radii=[0.5]),
        ],
        n_folds=2,
        fitted_judges=False,
        classifier_scheduler=by_epochs,
        discriminator_scheduler=by_epochs,
    )


class BrokenOff(Exception):
    """What ends a fit before its time."""


class BreakOff(Callback):
    """Ends the fit as an epoch begins."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise BrokenOff


def fit(series, runs, *, resume=None, break_at=None):
    seed_everything(1, verbose=False)
    module = attacker()
    data = TimeSeriesDataModule(
        folder=str(series), name="Toy", batch_size=16, eval_batch_size=7, validation_fraction=0.25
    )
    if resume is not None:
        torch.manual_seed(12345)  # random numbers must come from the checkpoint
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=LAST + 1,
        logger=False,
        default_root_dir=runs,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[
            RandomState(),
            ModelCheckpoint(
                dirpath=runs, filename="{epoch}", save_top_k=-1, save_last=True, enable_version_counter=False
            ),
            BreakOff(break_at),
        ],
    )
    trainer.fit(module, data, ckpt_path=resume)
    return module


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    folder = tmp_path_factory.mktemp("series")
    synthetic_series(40, 4, n_steps=24, rule="bump", noise=0.5, seed=3).write(folder, "Toy", ".tsv")
    return folder


@pytest.fixture(scope="module")
def unbroken(series, tmp_path_factory):
    runs = tmp_path_factory.mktemp("unbroken")
    return fit(series, runs), runs


# Within the classifier, as it is done, amid a mixture with replay, before and within rounds; below, all in one chain.
@pytest.mark.parametrize(
    "epoch", [epoch if epoch in (0, 1, 4, 5, 6) else pytest.param(epoch, marks=pytest.mark.slow) for epoch in range(10)]
)
def test_resumed_after_any_epoch(series, unbroken, tmp_path, epoch, assert_same):
    whole, runs = unbroken
    resumed = fit(series, tmp_path, resume=str(runs / f"epoch={epoch}.ckpt"))
    # sums of the last epoch: in its checkpoint, logged and gone in the unbroken fit, and never read again
    over = {"train_loss.total", "train_loss.weight"} if epoch == LAST else set()
    states = [{key: value for key, value in one.state_dict().items() if key not in over} for one in (resumed, whole)]
    assert len(states[0]) == len(whole.state_dict()) - len(over)
    assert_same(*states)
    assert_same(resumed.found, whole.found)


def test_broken_off_after_every_epoch(series, unbroken, tmp_path, assert_same):
    whole, _ = unbroken
    for epoch in range(1, LAST + 1):
        with pytest.raises(BrokenOff):
            fit(series, tmp_path, resume=str(tmp_path / "last.ckpt") if epoch > 1 else None, break_at=epoch)
    resumed = fit(series, tmp_path, resume=str(tmp_path / "last.ckpt"))
    assert_same(resumed.state_dict(), whole.state_dict())
    assert_same(resumed.found, whole.found)


def test_checkpoints_are_plain_and_a_finished_one_is_small(unbroken):
    _, runs = unbroken
    # the last epoch but one: two vanilla levels and two rounds have been begun
    unfinished = torch.load(runs / f"epoch={LAST - 1}.ckpt", weights_only=True)
    assert unfinished["found"] is None
    kept = unfinished["unfinished"]["banks"]
    assert set(kept["train/0"]) == {"0/0", "0/1", "1/0", "1/1", "2/0", "3/0"}, "the mixture, then the rounds"
    assert set(kept["validation/2"]) == {"0/0", "1/0"}
    assert set(unfinished["unfinished"]["snapshots"]) == {"0/2", "0/3", "1/2", "1/3"}
    finished = torch.load(runs / f"epoch={LAST}.ckpt", weights_only=True)
    assert finished["unfinished"] is None
    assert set(finished["found"]["chosen"]) == {"sum", "sgm"}


def test_what_a_checkpoint_holds_is_taken_up_and_a_new_fit_forgets_it(unbroken, assert_same):
    _, runs = unbroken
    checkpoint = torch.load(runs / f"epoch={LAST - 1}.ckpt", weights_only=True)
    module = attacker()
    module.on_load_checkpoint(checkpoint)
    taken: dict = {}
    module.on_save_checkpoint(taken)
    for part in ("best_classifier", "snapshots", "banks"):
        assert_same(taken["unfinished"][part], checkpoint["unfinished"][part])
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.setup("fit")
    module.on_save_checkpoint(taken)
    assert taken["unfinished"]["banks"] == taken["unfinished"]["snapshots"] == {}
    assert taken["unfinished"]["best_classifier"] is None
