"""A fit that is stopped at any step and resumed from ``last.ckpt`` equals an unbroken one, bit for bit."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer, seed_everything

from datamodules import TimeSeriesDataModule
from datamodules.synthetic_series import synthetic_series
from lightning_modules import ConcealedAttacker
from lightning_modules.attacks import Attack, Linf, Momentum, PGDStep, SignStep, SumReg, Vanilla
from lightning_modules.attacks.discriminators import AttackPlan, DiscriminatorPlan, TrainingAttack
from lightning_modules.callbacks import AdversarialTraining, LastCheckpoint, RandomState
from lightning_modules.networks import LSTM, ResCNN
from lightning_modules.run_folder import RunLogger, drop_rows_after
from lightning_modules.time_series_classifier import TimeSeriesClassifier

FACTS = {"n_channels": 1, "n_classes": 2, "n_steps": 12}
PGD = Attack(Vanilla(), PGDStep(), projection=Linf(0.3), n_steps=2, random_start=True)
IFGSM = Attack(Vanilla(), SignStep(), n_steps=2)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*smaller than the logging",
    "ignore:.*in eval mode at the start",
    "ignore:The dirpath has changed",
    "ignore:Checkpoint directory .* exists and is not empty",  # it is the one of the fit that was stopped
)


def dropping_lstm(**facts):
    return LSTM(**facts, hidden_size=3, dropout=0.5)


def res_cnn(**facts):
    return ResCNN(**facts, n_filters=2)


def by_epochs(optimizer):
    """Rates that are a function of the epochs of the schedule, which a resumed fit must know."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch))


def attacker():
    """A classifier for 2 epochs, a mixture with replay for 2, a round of 2; attacks that draw, dropout, norms."""
    schedule = {"start": 0.3, "gamma": 0.5, "replay": 0.5}
    return ConcealedAttacker(
        **FACTS,
        classifier=dropping_lstm,
        classifier_epochs=2,
        discriminators=[
            DiscriminatorPlan(
                name="a",
                network=res_cnn,
                attack=IFGSM,
                training_attacks="ifgsm",
                mixture=[TrainingAttack(name="pgd", attack=PGD, start=0.6)],
                n_levels=1,
                epochs_per_level=2,
                n_rounds=1,
                round_attack=Attack(SumReg(), SignStep(0.1), n_steps=2),
                seed=1,
                **schedule,
            ),
            DiscriminatorPlan(
                name="h",
                role="held_out",
                network=dropping_lstm,
                attack=Attack(Vanilla(), Momentum(), n_steps=2),
                training_attacks="momentum",
                n_levels=3,
                epochs_per_level=1,
                seed=2,
                **schedule,
            ),
        ],
        attacks=[AttackPlan(name="s", family="s", attack=Attack(SumReg(), SignStep(), n_steps=2), steps=[0.1, 0.3])],
        fitted_judges=False,
        classifier_scheduler=by_epochs,
        discriminator_scheduler=by_epochs,
    )


def classifier():
    """Plain epochs, then against an attack that draws; dropout, momentum and a schedule."""
    return TimeSeriesClassifier(
        **FACTS,
        network=dropping_lstm,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.02),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    )


class DrawsNumbers(Callback):
    """Moves the streams that nothing else here draws from, at every step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        random.random()
        np.random.random()  # noqa: NPY002  the stream that is kept


def adversaries(method):
    return [AdversarialTraining(PGD, warmup_epochs=2)] if method is classifier else []


def run(method, series, folder, *, stop=None, resume=False, every=2, seed=1):
    """Fit, perhaps to its end: its trainer and module."""
    seed_everything(seed, verbose=False)
    module = method()
    data = TimeSeriesDataModule(
        folder=str(series), name="Toy", batch_size=6, eval_batch_size=5, validation_fraction=0.25
    )
    last = LastCheckpoint(every_n_train_steps=every)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=6,
        logger=RunLogger(str(folder), "run", version=0),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[RandomState(), DrawsNumbers(), *adversaries(method), last, *([stop] if stop else [])],
    )
    path = folder / "run" / "version_0" / "checkpoints" / "last.ckpt"
    if resume:
        drop_rows_after(path.parent.parent, torch.load(path, weights_only=True))  # as the command does
    trainer.fit(module, data, ckpt_path=path if resume else None, weights_only=True)
    return trainer, module, data


def outcome(trainer, module, data):
    """All that a fit leaves: weights and sums, optimisers, schedules, what was found and logged, what test finds."""
    # the attacker logs its accuracy in the classifier's epochs alone, which a resumed trainer may not have run
    last = Path(trainer.logger.log_dir) / "checkpoints" / "last.ckpt"
    logged = {key: float(value) for key, value in sorted(trainer.callback_metrics.items())}
    logged.pop("val/accuracy", None)
    found = {
        "weights": {key: value.clone() for key, value in module.state_dict().items()},
        "optimisers": [optimizer.state_dict()["state"] for optimizer in trainer.optimizers],
        "rates": [[group["lr"] for group in optimizer.param_groups] for optimizer in trainer.optimizers],
        "found": getattr(module, "found", None),
        "logged": logged,
        "lines": (Path(trainer.logger.log_dir) / "metrics.csv").read_text(),
        "random": torch.load(last, weights_only=True)["callbacks"]["RandomState"],
    }
    batch = data.arrays("test")
    module.eval()
    if isinstance(module, TimeSeriesClassifier):
        return found | {"test": trainer.test(module, data, verbose=False)}
    study = module.test_step(batch, 0)
    (attack,) = study.attacks
    return found | {"test": [attack.x_adv, attack.logits, attack.detector_logits, attack.scores]}


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    folder = tmp_path_factory.mktemp("series")
    synthetic_series(28, 6, n_steps=12, rule="bump", noise=0.5, seed=3).write(folder, "Toy", ".tsv")
    return folder


@pytest.mark.parametrize("method", [attacker, classifier], ids=["attacker", "classifier"])
def test_a_fit_stopped_at_random_steps_equals_an_unbroken_one(series, tmp_path, method, break_at, broken, assert_same):
    """21 training series are 4 batches an epoch: 24 steps, of which 20 stop a fit, in 5 fits of 4 stops each."""
    wanted = outcome(*run(method, series, tmp_path / "unbroken", every=None))
    draw = random.Random(7)
    steps = draw.sample(range(3, 25), 20)
    for chain in range(5):
        folder = tmp_path / str(chain)
        every = draw.choice([1, 2])
        for number, step in enumerate(sorted(steps[chain::5])):
            with pytest.raises(broken):
                run(
                    method,
                    series,
                    folder,
                    stop=break_at(step - 1, at_end=draw.random() < 0.5),
                    resume=number > 0,
                    every=every,
                    seed=1 if number == 0 else 100 + step,  # a resumed fit must not live on what it is started with
                )
        resumed = run(method, series, folder, resume=True, every=every, seed=5)
        assert_same(outcome(*resumed), wanted, f"chain {chain}")
