"""ConcealedAttacker and TimeSeriesClassifier of two and three processes against one: numbers, files, training."""

import json
import os
from pathlib import Path

import polars as pl
import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from torch import nn

from datamodules import TimeSeriesDataModule
from datamodules.synthetic_series import synthetic_series
from lightning_modules import ConcealedAttacker
from lightning_modules.attacks import Attack, Linf, PGDStep, SignStep, SumReg, Vanilla
from lightning_modules.attacks.discriminators import AttackPlan, DiscriminatorPlan
from lightning_modules.callbacks import AdversarialSeriesWriter, AdversarialTraining, AttackReport
from lightning_modules.networks import LSTM, ResCNN
from lightning_modules.time_series_classifier import TimeSeriesClassifier

FACTS = {"n_channels": 1, "n_classes": 2, "n_steps": 16}
PGD = Attack(Vanilla(), PGDStep(), projection=Linf(0.2), n_steps=3, random_start=True)
IFGSM = Attack(Vanilla(), SignStep(), n_steps=3)


def lstm(**facts):
    return LSTM(**facts, hidden_size=4, dropout=0.0)


class Perceptron(nn.Module):
    def __init__(self, n_channels, n_classes, n_steps):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(n_channels * n_steps, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, series):
        return self.layers(series)


def res_cnn(**facts):
    return ResCNN(**facts, n_filters=2)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.3)


def attacker(network, **changes):
    """Every kind of level: vanilla, a mixture with a random attack, a round; copies that leave folds out."""
    plan = {"network": network, "attack": IFGSM, "training_attacks": "ifgsm", "start": 0.4, "gamma": 0.5}
    plan |= {"n_levels": 2, "epochs_per_level": 1, "replay": 0.0}
    held_out = {"network": Perceptron, "attack": PGD, "training_attacks": "pgd"}
    attacks = [
        AttackPlan(name="sum", family="ifgsm", attack=Attack(SumReg(), SignStep(), n_steps=3), steps=[0.1, 0.3]),
        AttackPlan(name="pgd", family="pgd", attack=PGD, radii=[0.2, 0.5]),
    ]
    settings = {
        "classifier": network,
        "classifier_epochs": 2,
        "discriminators": [
            DiscriminatorPlan(
                name="a", seed=1, n_rounds=1, round_attack=Attack(SumReg(), SignStep(0.1), n_steps=2), **plan
            ),
            DiscriminatorPlan(name="h", role="held_out", seed=2, **plan | held_out),
        ],
        "attacks": attacks,
        "fitted_judges": False,
        "classifier_optimizer": sgd,
        "discriminator_optimizer": sgd,
    }
    return ConcealedAttacker(**FACTS | settings | changes)


def classifier(network):
    torch.manual_seed(5)
    return TimeSeriesClassifier(**FACTS, network=network, optimizer=sgd)


class Seeded(Callback):
    """Lightning seeds anew where processes join; the first is to draw what one alone draws."""

    def on_train_start(self, trainer, pl_module):
        torch.manual_seed(3 + trainer.global_rank)

    def on_validation_start(self, trainer, pl_module):
        self.on_train_start(trainer, pl_module)


def series(folder, **changes):
    return TimeSeriesDataModule(folder=str(folder), name="Toy", **{"validation_fraction": 0.1} | changes)


def trainer(world, **changes):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(
        accelerator="cpu",
        devices=world,
        strategy="auto" if world == 1 else "replicated",
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **quiet | changes,
    )


def evaluated(world, folder):
    """Of the same checkpoints: what is logged, reported, predicted and written."""
    written = []
    replace = os.replace

    def counted(draft, path):
        written.append(Path(path).name)
        replace(draft, path)

    found = {}
    os.replace = counted
    try:
        data = series(folder, eval_batch_size=4)
        out = folder / f"of {world}"
        callbacks = [AttackReport(n_resamples=20), AdversarialSeriesWriter()]
        run, net, path = trainer(world, callbacks=callbacks, default_root_dir=out), attacker(res_cnn), folder / "a.ckpt"
        found["attacker"] = run.validate(net, data, ckpt_path=path, verbose=False)
        run.test(net, data, ckpt_path=path, verbose=False)
        predicted = run.predict(net, data, ckpt_path=path)
        run, net, path = (
            trainer(world, callbacks=[Seeded(), AdversarialTraining(PGD)]),
            classifier(res_cnn),
            folder / "c.ckpt",
        )
        found["classifier"] = [
            run.validate(net, data, ckpt_path=path, verbose=False),
            run.test(net, data, ckpt_path=path, verbose=False),
        ]
        answers = run.predict(net, data, ckpt_path=path)
    finally:
        os.replace = replace
    report = json.loads((out / "report" / "metrics.json").read_text())
    return found | {
        "report": without_seconds(report),
        "adversarial": pl.read_parquet(out / "adversarial_series.parquet").to_dict(as_series=False),
        "rows": [torch.cat([one.index for one in each]) for each in (predicted, answers)],
        "logits": torch.cat([one.logits for one in answers]),
        "written": sorted(written),
    }


def without_seconds(tree):
    if isinstance(tree, dict):
        return {key: without_seconds(value) for key, value in tree.items() if not key.startswith("seconds")}
    return [without_seconds(value) for value in tree] if isinstance(tree, list) else tree


def trained(world, folder):
    """Fits whose global batches are the same for 1 and 2 processes, in float64 and without dropout."""
    data = series(folder, batch_size=12 // world, eval_batch_size=4)
    seed_everything(9, verbose=False)
    net = attacker(lstm)
    run = trainer(world, max_epochs=5, precision="64-true")
    run.fit(net, data)
    robust = classifier(lstm)
    against = trainer(world, max_epochs=2, precision="64-true", callbacks=[Seeded(), AdversarialTraining(PGD)])
    against.fit(robust, data)
    return {
        "attacker": net.state_dict(),
        "found": net.found,
        "banks": {key: bank.state() for key, bank in net._banks.items()},
        "logged": {key: float(value) for key, value in run.callback_metrics.items()},
        "classifier": robust.state_dict(),
        "classifier logged": {key: float(value) for key, value in against.callback_metrics.items()},
    }


def trained_on_thirteen(world, folder):
    """In global batches of 12: all processes but one have nothing in the second of an epoch."""
    seed_everything(9, verbose=False)
    net, rows = attacker(lstm, classifier_epochs=1), []
    watch = Callback()
    watch.on_train_batch_start = lambda *arguments: rows.append(int((arguments[2]["labels"] >= 0).sum()))
    run = trainer(world, max_epochs=4, precision="64-true", callbacks=[watch])
    run.fit(net, series(folder, batch_size=12 // world, eval_batch_size=4))
    return net.state_dict(), rows, {key: float(value) for key, value in run.callback_metrics.items()}


def both(world, folder):
    return {"evaluated": evaluated(world, folder), "trained": trained(world, folder) if world < 3 else None}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("series")
    # 23 series are trained on, which no two processes share alike, 2 validated, 9 tested: shards are uneven or empty
    synthetic_series(25, 9, n_steps=16, rule="bump", noise=0.5, seed=3).write(folder, "Toy", ".tsv")
    seed_everything(9, verbose=False)
    for net, epochs, name in ((attacker(res_cnn), 5, "a"), (classifier(res_cnn), 1, "c")):
        run = trainer(1, max_epochs=epochs)
        run.fit(net, series(folder))
        run.save_checkpoint(folder / f"{name}.ckpt")
    return folder, both(1, folder)


def assert_close(found, wanted, tolerance, where=""):
    """Equal but for numbers with a fraction."""
    assert type(found) is type(wanted), where
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key, value in wanted.items():
            assert_close(found[key], value, tolerance, f"{where} {key}")
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted), where
        for number, pair in enumerate(zip(found, wanted, strict=True)):
            assert_close(*pair, tolerance, f"{where} {number}")
    elif isinstance(wanted, torch.Tensor) and wanted.is_floating_point():
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance, msg=lambda text: f"{where}: {text}")
    elif isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted), where
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=tolerance, abs=tolerance), where
    else:
        assert found == wanted, where


@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_equal_one(in_processes, alone, world):
    folder, wanted = alone
    ranks = in_processes(world, __file__, "both", world, folder)
    for number, found in enumerate(ranks):
        one, here = wanted["evaluated"], found["evaluated"]
        assert here["written"] == (one["written"] if number == 0 else [])
        for what in ("attacker", "classifier", "report", "adversarial"):
            # ten roundings of float32: a batch of other series rounds otherwise
            assert_close(here[what], one[what], 1e-6, f"{what} of process {number}")
        for rows in here["rows"]:
            assert rows.tolist() == list(range(number, 9, world)), "disjoint and complete"
        torch.testing.assert_close(here["logits"], one["logits"][number::world], rtol=1e-6, atol=1e-6)
        if world == 2:
            # float64, but for the float32 factor that weighs each process' loss: 1e-7 a step, twenty steps
            assert_close(found["trained"], wanted["trained"], 1e-5, f"training of process {number}")


def test_processes_without_a_series_in_a_batch_train_as_one(in_processes, tmp_path):
    synthetic_series(15, 9, n_steps=16, rule="bump", noise=0.5, seed=3).write(tmp_path, "Toy", ".tsv")
    weights, rows, logged = trained_on_thirteen(1, tmp_path)
    assert rows == [12, 1] * 4
    for number, found in enumerate(in_processes(3, __file__, "trained_on_thirteen", 3, tmp_path)):
        assert found[1] == [4, 1 if number == 0 else 0] * 4, "the others have rows that stand for none"
        # float64, but for the float32 factor that weighs each process' loss: 6e-8 a step, eight steps
        assert_close(found[0], weights, 1e-6, f"weights of process {number}")
        assert_close(found[2], logged, 1e-6, f"logged by process {number}")
