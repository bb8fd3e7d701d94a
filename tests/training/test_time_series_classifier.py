"""The classifier learns, repeats itself, reports what NumPy counts, and is harder to fool after robust training."""

import math

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_modules.attacks.engine import Attack
from lightning_modules.attacks.objectives import Vanilla
from lightning_modules.attacks.projections import Linf
from lightning_modules.attacks.steppers import PGDStep
from lightning_modules.callbacks import AdversarialTraining
from lightning_modules.networks import LSTM, S4, PatchTST, ResCNN, RNNAttention
from lightning_modules.time_series_classifier import TimeSeriesClassifier

T = 24
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
# Some tests train on one batch alone, and none needs workers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def waves(n_series, n_classes, seed, *, noise=0.5):
    """Class k has a wave of k + 1 periods of random phase; every second series ends early."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(n_classes, (n_series,), generator=generator)
    phase = 2 * torch.pi * torch.rand(n_series, 1, generator=generator)
    steps = torch.arange(T) / T * 2 * torch.pi
    series = (steps * (labels[:, None] + 1) + phase).sin() + noise * torch.randn(n_series, T, generator=generator)
    mask = torch.arange(T) < torch.where(torch.arange(n_series) % 2 == 0, T, T - 4)[:, None]
    series = series.masked_fill(~mask, torch.nan)  # padding must never be read
    return {"series": series[..., None], "mask": mask, "labels": labels, "index": torch.arange(n_series)}


def batches(whole, size):
    n_series = len(whole["labels"])
    cut = [{key: value[at : at + size] for key, value in whole.items()} for at in range(0, n_series, size)]
    return DataLoader(cut, batch_size=None)


def classifier(network=None, n_classes=2, lr=1e-2, **facts):
    torch.manual_seed(7)
    return TimeSeriesClassifier(
        **{"n_channels": 1, "n_steps": T} | facts,
        n_classes=n_classes,
        network=network or (lambda **sizes: ResCNN(**sizes, n_filters=8)),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=lr),
    )


@pytest.mark.parametrize(
    "network",
    [
        lambda **facts: RNNAttention(**facts, dropout=0.0),
        lambda **facts: LSTM(**facts),
        lambda **facts: ResCNN(**facts, n_filters=8),
        lambda **facts: S4(**facts, dropout=0.0),
        lambda **facts: PatchTST(**facts, dropout=0.0),
    ],
    ids=["rnn_attention", "lstm", "res_cnn", "s4", "patch_tst"],
)
@pytest.mark.parametrize("n_classes", [2, 3])
def test_one_batch_is_learnt_by_heart(network, n_classes):
    """From log(K) nats at the start to 0.1: every one of 16 noisy series is told from the others."""
    model = classifier(network, n_classes)
    batch = waves(16, n_classes, seed=1)
    trainer = Trainer(max_epochs=150, **QUIET)
    trainer.fit(model, DataLoader([batch], batch_size=None))
    model.eval()
    with torch.no_grad():
        logits = model(batch["series"], batch["mask"])
    logits = torch.cat([torch.zeros_like(logits), logits], 1) if n_classes == 2 else logits
    assert nn.functional.cross_entropy(logits, batch["labels"]) < 0.1


def test_a_seed_repeats_bit_for_bit():
    def weights():
        model = classifier(lambda **facts: S4(**facts, d_model=8, state_size=8))  # with dropout
        Trainer(max_epochs=2, **QUIET).fit(model, batches(waves(24, 2, seed=2), 8))
        return list(model.parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(), weights(), strict=True))


class Collected(Callback):
    """Keeps what the test steps return."""

    def __init__(self):
        self.outputs = []

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.outputs.append(outputs)


def auroc(scores, positive):
    """Share of pairs in order, ties counted half."""
    gaps = scores[positive][:, None] - scores[~positive][None, :]
    return (gaps > 0).mean() + 0.5 * (gaps == 0).mean()


@pytest.mark.parametrize(("n_classes", "kept", "expected"), [(3, [0, 1], 1.0), (2, [1], math.nan)])
def test_auroc_is_of_the_classes_that_are_there(n_classes, kept, expected):
    model = classifier(n_classes=n_classes)
    whole = waves(50, n_classes, seed=3)
    rows = torch.isin(whole["labels"], torch.tensor(kept))
    some = {name: value[rows] for name, value in whole.items()}

    class Right(torch.nn.Module):
        def forward(self, series, mask=None):
            right = torch.nn.functional.one_hot(some["labels"], n_classes).float()
            return right if n_classes > 2 else right[:, 1:]

    model.network = Right()
    (found,) = Trainer(**QUIET).test(model, batches(some, int(rows.sum())), verbose=False)
    assert found["test/auroc"] == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_logged_metrics_are_what_numpy_counts(n_classes):
    model = classifier(n_classes=n_classes)
    whole = waves(50, n_classes, seed=3, noise=1.5)
    # Logits near 100, where a float32 sigmoid is 1 for all: the order must survive.
    model.network.head.weight.data *= 100
    collected = Collected()
    trainer = Trainer(callbacks=[collected], **QUIET)
    (found,) = trainer.test(model, batches(whole, 16), verbose=False)
    logits = torch.cat([each.logits for each in collected.outputs]).numpy().astype(np.float64)
    assert torch.equal(torch.cat([each.index for each in collected.outputs]), whole["index"])
    labels = whole["labels"].numpy()
    decided = (logits[:, 0] >= 0).astype(int) if n_classes == 2 else logits.argmax(1)

    def f1(k):
        hits = ((decided == k) & (labels == k)).sum()
        return 2 * hits / max(1, (decided == k).sum() + (labels == k).sum())

    if n_classes == 2:
        expected_f1, expected_auroc = f1(1), auroc(logits[:, 0], labels == 1)
        loss = np.logaddexp(0, (1 - 2 * labels) * logits[:, 0])
    else:
        shifted = np.exp(logits - logits.max(1, keepdims=True))
        shares = shifted / shifted.sum(1, keepdims=True)
        expected_f1 = np.mean([f1(k) for k in range(3)])
        expected_auroc = np.mean([auroc(shares[:, k], labels == k) for k in range(3)])
        loss = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1) - logits[range(50), labels]
    assert found.keys() == {"test/loss", "test/accuracy", "test/f1", "test/auroc"}
    # float32 rounding of the logged values
    assert found["test/accuracy"] == pytest.approx((decided == labels).mean(), rel=1e-6)
    assert found["test/f1"] == pytest.approx(expected_f1, rel=1e-6)
    assert found["test/auroc"] == pytest.approx(expected_auroc, rel=1e-5)
    assert found["test/loss"] == pytest.approx(loss.mean(), rel=1e-5)


def test_fit_learns_and_predict_names_its_rows(tmp_path):
    model = classifier()
    trainer = Trainer(max_epochs=8, **QUIET | {"logger": CSVLogger(tmp_path)}, log_every_n_steps=1)
    trainer.fit(model, batches(waves(96, 2, seed=4), 16), batches(waves(40, 2, seed=5), 16))
    assert trainer.callback_metrics["val/accuracy"] > 0.9
    header = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss", "val/loss", "val/accuracy", "val/f1"} <= set(header)
    fresh = waves(20, 2, seed=6)
    predicted = trainer.predict(model, batches(fresh, 8))
    assert torch.equal(torch.cat([each.index for each in predicted]), fresh["index"])
    model.eval()
    logits = model(fresh["series"], fresh["mask"])
    # float32: batches of 8 and of 20 may sum in another order
    torch.testing.assert_close(torch.cat([each.logits for each in predicted]), logits, rtol=1e-4, atol=1e-5)


def bumps(n_series, seed):
    """Channel 0: a bump of height 1.5 that tells the class nine times in ten. Channel 1: a level of 0.2 that always
    does, under noise of deviation 0.3, and that a perturbation of 0.4 turns around."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (n_series,), generator=generator)
    signs = (2.0 * labels - 1)[:, None]
    honest = torch.where(torch.rand(n_series, 1, generator=generator) < 0.9, 1.0, -1.0)
    bump = 1.5 * (-((torch.arange(T) - T / 2) ** 2) / 18).exp() * signs * honest
    series = torch.stack([bump, 0.2 * signs.expand(-1, T)], -1) + 0.3 * torch.randn(n_series, T, 2, generator=generator)
    mask = torch.ones(n_series, T, dtype=torch.bool)
    return {"series": series, "mask": mask, "labels": labels, "index": torch.arange(n_series)}


def attack(n_steps=5, **changes):
    return Attack(Vanilla(), PGDStep(), projection=Linf(0.4), n_steps=n_steps, **changes)


def test_robust_training_withstands_the_attack_that_breaks_plain_training():
    """The level alone is a perfect rule and turns around under 0.4; the bump is right nine times in ten and stays."""
    test = bumps(200, seed=11)
    found, logged = {}, {}
    for name, callbacks in {
        "plain": [],
        "pgd": [AdversarialTraining(attack(), warmup_epochs=1)],
        "trades": [AdversarialTraining(attack(random_start=True), mode="trades")],
    }.items():
        model = classifier(n_channels=2)
        trainer = Trainer(max_epochs=12, callbacks=callbacks, **QUIET)
        trainer.fit(model, batches(bumps(256, seed=10), 32), batches(bumps(64, seed=12), 32))
        model.eval()
        fooled = attack(n_steps=20)(model, test["series"], test["labels"], mask=test["mask"]).logits[-1, :, 0]
        with torch.no_grad():
            clean = model(test["series"], test["mask"])[:, 0]
        found[name] = [((z >= 0) == test["labels"]).float().mean().item() for z in (clean, fooled)]
        logged[name] = trainer.callback_metrics.get("val/robust_accuracy")
        assert model.adversary is None
    assert found["plain"][0] > 0.9
    assert found["plain"][1] < 0.4, f"the attack must break plain training for the rest to mean something: {found}"
    for name in ("pgd", "trades"):
        assert found[name][1] > found["plain"][1] + 0.3, found
        # 64 and 200 series: three binomial deviations of their difference, sqrt(0.2 / 64 + 0.2 / 200), are 0.2
        assert logged[name].item() == pytest.approx(found[name][1], abs=0.2)
    assert logged["plain"] is None


def test_command_line_builds_network_optimiser_and_callback():
    import lightning_modules.cli  # noqa: F401 - its parser takes dataclasses with subclasses, such as objectives

    parser = ArgumentParser()
    parser.add_subclass_arguments(TimeSeriesClassifier, "model")
    parser.add_subclass_arguments(Callback, "callback")
    attacks = "lightning_modules.attacks"
    config = parser.parse_object(
        {
            "model": {
                "class_path": "lightning_modules.time_series_classifier.TimeSeriesClassifier",
                "init_args": {
                    "n_channels": 2,
                    "n_classes": 3,
                    "n_steps": 30,
                    "network": {"class_path": "lightning_modules.networks.S4", "init_args": {"d_model": 12}},
                    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.005}},
                    "scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 30}},
                },
            },
            "callback": {
                "class_path": "lightning_modules.callbacks.AdversarialTraining",
                "init_args": {
                    "mode": "trades",
                    "attack": {
                        "class_path": f"{attacks}.engine.Attack",
                        "init_args": {
                            "objective": {"class_path": f"{attacks}.objectives.Vanilla"},
                            "stepper": {"class_path": f"{attacks}.steppers.PGDStep"},
                            "projection": {"class_path": f"{attacks}.projections.Linf", "init_args": {"radius": 0.1}},
                            "n_steps": 3,
                            "random_start": True,
                        },
                    },
                },
            },
        }
    )
    built = parser.instantiate(config)
    assert isinstance(built.model.network, S4)
    assert (built.model.network.n_channels, built.model.network.n_logits, built.model.network.n_steps) == (2, 3, 30)
    assert built.model.network.skip.shape == (12,)
    settings = built.model.configure_optimizers()
    assert type(settings["optimizer"]) is torch.optim.AdamW
    assert settings["optimizer"].defaults["lr"] == 0.005
    assert settings["lr_scheduler"]["scheduler"].step_size == 30
    assert built.callback.attack.n_steps == 3


class Pooled(nn.Module):
    """Somebody's network, which knows of no mask."""

    def __init__(self, *, n_channels, n_classes, n_steps, n_logits=1):
        super().__init__()
        self.head = nn.Linear(n_channels, n_logits)

    def forward(self, series):
        return self.head(series.mean(1))


def test_a_network_without_a_mask_refuses_padding():
    model = classifier(Pooled)
    series, mask = torch.randn(4, T, 1), torch.ones(4, T, dtype=torch.bool)
    assert torch.equal(model(series, mask), model(series))
    mask[2, -1] = False
    with pytest.raises(ValueError, match="Pooled takes no mask, but series of this batch are padded"):
        model(series, mask)


def test_logits_of_another_shape_are_refused():
    model = classifier(lambda **facts: Pooled(**facts, n_logits=2))
    with pytest.raises(ValueError, match=r"Pooled must return logits of shape \(4, 1\), got \(4, 2\)"):
        model(torch.randn(4, T, 1))


def test_facts_must_come_from_the_data():
    with pytest.raises(ValueError, match="n_channels, n_steps must come from the data, got None"):
        TimeSeriesClassifier(n_channels=None, n_classes=2, n_steps=None)
    with pytest.raises(ValueError, match="n_classes must be at least 2, got 1"):
        TimeSeriesClassifier(n_channels=1, n_classes=1, n_steps=9)


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    model, trainer = classifier(), Trainer(max_epochs=1, **QUIET)
    trainer.fit(model, batches(waves(8, 2, seed=1), 8))
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    (found,) = Trainer(**QUIET).test(classifier(), batches(waves(8, 2, seed=1), 8), ckpt_path=path, verbose=False)
    assert "test/f1" in found
    with pytest.raises(ValueError, match="checkpoint was trained with n_classes 2, the data here has 3"):
        Trainer(**QUIET).test(classifier(n_classes=3), batches(waves(8, 3, seed=1), 8), ckpt_path=path)
