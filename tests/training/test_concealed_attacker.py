"""ConcealedAttacker through the Trainer on series with a known rule: what trains, what is chosen, what is judged."""

import importlib.util
from typing import ClassVar

import numpy as np
import polars as pl
import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from scipy.stats import betabinom

from datamodules import TimeSeriesDataModule
from datamodules.synthetic_series import synthetic_series
from lightning_modules import ConcealedAttacker
from lightning_modules.attacks import AdamStep, Attack, Linf, Momentum, PGDStep, SignStep, SumReg, Vanilla
from lightning_modules.attacks.discriminators import AttackPlan, DiscriminatorPlan, TrainingAttack
from lightning_modules.attacks.findings import findings, trained_auc
from lightning_modules.attacks.thresholds import conformal_threshold
from lightning_modules.callbacks.adversarial_writer import series_frame
from lightning_modules.networks import LSTM, ResCNN

IFGSM = Attack(Vanilla(), SignStep(), n_steps=5)
PGD = Attack(Vanilla(), PGDStep(), projection=Linf(), n_steps=5)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*smaller than the logging", "ignore:.*in eval mode at the start"
)


def network(n_channels, n_classes, n_steps):
    return ResCNN(n_channels=n_channels, n_classes=n_classes, n_steps=n_steps, n_filters=4)


def small_lstm(n_channels, n_classes, n_steps):
    return LSTM(n_channels=n_channels, n_classes=n_classes, n_steps=n_steps, hidden_size=6)


def attacker(**settings):
    plan = {"start": 0.3, "n_levels": 2, "gamma": 0.5, "epochs_per_level": 4}
    discriminators = [
        DiscriminatorPlan(name="a", network=network, attack=IFGSM, training_attacks="ifgsm", seed=1, **plan),
        DiscriminatorPlan(
            name="h", role="held_out", network=small_lstm, attack=PGD, training_attacks="pgd", seed=2, **plan
        ),
    ]
    attacks = [
        AttackPlan(name="ifgsm", family="ifgsm", attack=Attack(Vanilla(), SignStep(), n_steps=8), steps=[0.02, 0.1]),
        AttackPlan(
            name="sum",
            family="ifgsm",
            attack=Attack(SumReg(class_loss="cross_entropy"), SignStep(), n_steps=8),
            steps=[0.02, 0.1],
            alphas=[0.1, 10.0],
        ),
    ]
    return ConcealedAttacker(
        **{
            "n_channels": 1,
            "n_classes": 2,
            "n_steps": 40,
            "classifier": network,
            "classifier_epochs": 6,
            "discriminators": discriminators,
            "attacks": attacks,
        }
        | settings
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("series")
    synthetic_series(96, 60, n_steps=40, rule="bump", noise=0.5, seed=3).write(folder, "Toy", ".tsv")
    return folder


def fitted(folder, *, callbacks=(), batch_size=32, eval_batch_size=1024, validation_fraction=0.25, **settings):
    seed_everything(1, verbose=False)
    data = TimeSeriesDataModule(
        folder=str(folder),
        name="Toy",
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        validation_fraction=validation_fraction,
    )
    module = attacker(**settings)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=module.classifier_epochs + module.discriminator_epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
    )
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer.fit(module, data)
    return module, data, trainer, before


@pytest.fixture(scope="module")
def run(folder):
    return fitted(folder)


def test_classifier_and_every_discriminator_move(run):
    module, _, _, before = run
    for prefix in ("classifier", "copies.0.0", "copies.0.1", "copies.0.2", "copies.1.0", "copies.1.1", "copies.1.2"):
        changed = [
            not torch.equal(value, before[name])
            for name, value in module.state_dict().items()
            if name.startswith(prefix) and value.is_floating_point()
        ]
        assert any(changed), f"{prefix} did not move"


def test_a_choice_for_every_attack_from_its_grid(run):
    module, _, _, _ = run
    chosen = module.found["chosen"]
    assert set(chosen) == {"ifgsm", "sum"}
    assert chosen["ifgsm"]["effectiveness"].shape == (2, 9)
    assert chosen["sum"]["effectiveness"].shape == (4, 9)
    assert chosen["sum"]["step"] in (0.02, 0.1)
    assert chosen["sum"]["alpha"] in (0.1, 10.0)
    for choice in chosen.values():
        assert 1 <= choice["iteration"] <= 8, "iterate 0 is no attack"
        best = (2 * choice["effectiveness"] * choice["concealability"]).div(
            (choice["effectiveness"] + choice["concealability"]).clamp_min(1e-12)
        )
        assert choice["success"] == pytest.approx(best[:, 1:].max().item(), abs=1e-9)  # the rule


def test_calibration_scores_come_from_detectors_that_never_saw_the_series(run):
    module, data, _, _ = run
    train, validation = data.arrays("train"), data.arrays("validation")
    n_train, rows = len(train["labels"]), train["index"]
    assert set(module.found["calibration"]) == {judge.name for judge, _ in module.judges()}
    for number, name in enumerate(("a", "h")):
        calibration = module.found["calibration"][name]
        assert len(calibration) == n_train + len(validation["labels"])
        for fold in range(module.n_folds):
            inside = module._folds(rows) == fold
            judge = module._network_judges(copy=fold + 1)[number]
            expected = judge.score(train["series"][inside], train["mask"][inside])
            torch.testing.assert_close(calibration[rows[inside]], expected.cpu())
        own = module._network_judges()[number].score(validation["series"], validation["mask"])
        torch.testing.assert_close(calibration[n_train:], own.cpu())


@pytest.mark.parametrize("n_folds", [0, 2])
def test_clean_series_raise_no_more_false_alarms_than_promised(folder, n_folds):
    """3,000 fresh series of the law that the set was drawn from, against every judge of a fit.

    Alarms of n calibration scores and their r-th smallest as threshold are beta-binomial whatever the law of the
    scores, exactly where all are of the judge itself; with copies the promise is twice the rate at most.
    """
    facts = {"n_channels": 1, "n_classes": 2, "n_steps": 40}
    victim = {"class_path": "lightning_modules.networks.ResCNN", "init_args": facts | {"n_filters": 2}}
    module, data, *_ = fitted(folder, victim=victim, classifier_epochs=0, n_folds=n_folds, validation_fraction=0.5)
    fresh = synthetic_series(2, 3000, n_steps=40, rule="bump", noise=0.5, seed=77).test.series
    series = torch.from_numpy((fresh - data.mean.numpy()) / data.std.numpy()).float()
    for judge, _ in module.judges():
        calibration = module.found["calibration"][judge.name]
        assert len(calibration) == (96 if n_folds else 48)
        threshold = conformal_threshold(calibration, 0.1)
        alarms, n = int(threshold.flag(judge.score(series)).sum()), len(calibration)
        above = n - int(np.ceil((n + 1) * 0.9)) + 1  # of n + 1 places, those above the threshold
        if n_folds == 0:
            law = betabinom(3000, above, n + 1 - above)
            # 0.1 % in either tail for each of five judges; the seeds are fixed, so it passes or fails for good
            assert law.ppf(0.001) <= alarms <= law.ppf(0.999), judge.name
        else:
            assert alarms <= betabinom(3000, 2 * above, n + 1 - 2 * above).ppf(0.999), judge.name


def test_a_discriminator_is_valid_by_what_it_was_trained_against(run):
    module, data, _, _ = run
    validation = data.arrays("validation")
    found = module.found["levels"]
    assert [(level["attack"], level["strength"]) for level in found["a"]] == [("ifgsm", 0.3), ("ifgsm", 0.15)]
    assert [(level["attack"], level["strength"]) for level in found["h"]] == [("pgd", 0.3), ("pgd", 0.15)]
    judge = module._network_judges()[0]
    clean = judge.score(validation["series"])
    for level in found["a"]:
        moved = IFGSM(module.classifier, validation["series"], validation["labels"], step=level["strength"]).x_adv
        gaps = judge.score(moved)[:, None] - clean
        # float32 batches of the attack may turn a few of the 24 x 24 pairs
        assert level["auc"] == pytest.approx(((gaps > 0) + 0.5 * (gaps == 0)).double().mean().item(), abs=0.01)
    study = module.test_step(data.arrays("test"), 0)
    rows = findings(study, n_resamples=5)["judges"]
    for record in study.judges:
        row = rows[record.name]
        own = [level["auc"] for level in found.get(record.name, [])]
        assert row["levels"] == found.get(record.name, [])
        assert row["trained_auc"] == (pytest.approx(sum(own) / len(own)) if own else None)
        assert trained_auc(record) == row["trained_auc"]
        assert row["valid"] == ((row["trained_auc"] if own else row["vanilla_auc"]) >= 0.8)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Three classes, two channels, lengths from half to all of the steps."""
    folder = tmp_path_factory.mktemp("uneven")
    drawn = synthetic_series(
        60, 30, n_steps=32, n_channels=2, n_classes=3, rule="bump", noise=0.4, variable_length=True, seed=5
    )
    return drawn.write(folder, "Toy", ".ts")


@pytest.fixture(scope="module")
def varied(uneven):
    """Two attacked discriminators, a mixture, PGD and SGM plans, calibrated logits, four validation batches."""
    plan = {"start": 0.4, "n_levels": 2, "gamma": 0.5, "epochs_per_level": 2}
    pgd, ball = Attack(Vanilla(), PGDStep(), projection=Linf(), n_steps=3), {"projection": Linf(), "n_steps": 6}
    discriminators = [
        DiscriminatorPlan(
            name="a",
            network=network,
            attack=IFGSM,
            training_attacks="ifgsm",
            mixture=[TrainingAttack(name="pgd", attack=pgd, start=1.0)],
            seed=1,
            **plan,
        ),
        DiscriminatorPlan(name="b", network=network, attack=IFGSM, training_attacks="ifgsm", seed=3, **plan),
        DiscriminatorPlan(
            name="h",
            role="held_out",
            network=small_lstm,
            attack=Attack(Vanilla(), Momentum(), n_steps=3),
            training_attacks="momentum",
            seed=2,
            **plan,
        ),
    ]
    attacks = [
        AttackPlan(name="pgd", family="pgd", attack=Attack(Vanilla(), PGDStep(), **ball), radii=[0.1, 0.5]),
        AttackPlan(
            name="pgd sum",
            family="pgd",
            attack=Attack(SumReg(), PGDStep(), **ball),
            radii=[0.1, 0.5],
            alphas=[0.1, 1.0],
            calibrate=True,
        ),
        AttackPlan(
            name="sgm", family="sgm", attack=Attack(Vanilla(), AdamStep(0.1, nu=0.1, lam=0.1), **ball), radii=[0.5]
        ),
    ]
    return fitted(
        uneven,
        batch_size=16,
        eval_batch_size=4,
        n_channels=2,
        n_classes=3,
        n_steps=32,
        classifier_epochs=3,
        discriminators=discriminators,
        attacks=attacks,
    )


def test_every_validation_series_is_in_the_choice_whatever_the_batches(varied):
    module, data, trainer, _ = varied
    assert trainer.num_val_batches == [4]
    validation, train = data.arrays("validation"), data.arrays("train")
    n_series = len(validation["labels"]) + len(train["labels"])
    assert {len(scores) for scores in module.found["calibration"].values()} == {n_series}
    assert {name: tuple(choice["effectiveness"].shape) for name, choice in module.found["chosen"].items()} == {
        "pgd": (2, 7),
        "pgd sum": (4, 7),
        "sgm": (1, 7),
    }
    for name, choice in module.found["chosen"].items():
        assert choice["radius"] in (0.1, 0.5)
        assert choice["step"] is None
        assert (choice["alpha"] in (0.1, 1.0)) == (name == "pgd sum")
    # the iterate 0 of every run is the clean series: EFF is 1 - macro F1 of the victim on all validation series
    called = module(validation["series"], validation["mask"]).argmax(1)
    labels = validation["labels"]
    f1 = [
        2 * ((called == k) & (labels == k)).sum() / ((called == k).sum() + (labels == k).sum()).clamp_min(1)
        for k in range(3)
    ]
    # float32 mean of three
    assert module.found["chosen"]["pgd"]["effectiveness"][0, 0] == pytest.approx(1 - float(sum(f1)) / 3, abs=1e-6)


def test_calibrated_attacks_divide_by_the_median_confidence_of_validation(varied):
    module, data, *_ = varied
    validation = data.arrays("validation")
    chosen = module.found["chosen"]
    assert chosen["pgd"]["scales"] is None
    scales = chosen["pgd sum"]["scales"]
    with torch.no_grad():
        best = module(validation["series"], validation["mask"]).double().sort(1).values
        # float32 logits of other batches
        assert scales["victim_scale"] == pytest.approx(float((best[:, -1] - best[:, -2]).quantile(0.5)), rel=1e-4)
        for scale, detector in zip(scales["detector_scale"], module.attacked_networks(), strict=True):
            logits = detector.eval()(validation["series"], validation["mask"])[:, 0]
            assert scale == pytest.approx(float(logits.double().abs().quantile(0.5)), rel=1e-4)


def test_masked_series_of_three_classes_are_attacked_where_they_are_valid(varied):
    module, data, *_ = varied
    batch = data.arrays("test")
    study = module.test_step(batch, 0)
    assert [judge.role for judge in study.judges[:3]] == ["attacked", "attacked", "held_out"]
    for attack in study.attacks:
        moved = attack.x_adv - batch["series"]
        assert bool((moved[~batch["mask"]] == 0).all()), "padding stays"
        # the ball, and a rounding of values of at most 8
        assert 0 < float(moved.abs().max()) <= module.found["chosen"][attack.name]["radius"] + 1e-6
        assert attack.logits.shape == (7, len(batch["labels"]), 3)
        assert attack.detector_logits.shape == (7, 2, len(batch["labels"]))
    found = findings(study, n_resamples=5)
    assert set(found["attacks"]["pgd sum"]["attacked"]) == {"published", "max"}
    parts = [
        module.test_step({key: value[rows] for key, value in batch.items()}, 0) for rows in (slice(7), slice(7, None))
    ]
    joined = type(study).join(parts)
    for whole, pieces in zip(study.attacks, joined.attacks, strict=True):
        # a sign may turn where a gradient is about zero: most series are the same
        same = (whole.x_adv - pieces.x_adv).abs().amax((1, 2)) < 1e-4
        assert same.double().mean() > 0.8


def test_a_mixture_shows_each_of_its_attacks_at_its_own_strength(varied):
    module, data, *_ = varied
    series = data.arrays("train")["series"]
    kept = module._banks["train/0"].state()
    assert set(kept) == {"0/0", "0/1", "1/0", "1/1"}
    for level, radius in ((0, 1.0), (1, 0.5)):
        known = kept[f"{level}/1"]["known"]
        moved = (kept[f"{level}/1"]["series"] - series)[known].abs().amax((1, 2))
        assert len(moved) > 0
        # three steps of 2.5 / 3 of the radius reach the ball's face somewhere; a rounding of values of at most 8
        torch.testing.assert_close(moved, torch.full_like(moved, radius), rtol=0, atol=2e-6)
    assert module.plans[0].provenance(network(2, 2, 32))["training_attacks"] == (
        "ifgsm, Vanilla SignStep, pgd, Vanilla PGDStep Linf"
    )
    levels = [(level["attack"], level["strength"]) for level in module.found["levels"]["a"]]
    assert levels == [("ifgsm", 0.4), ("pgd", 1.0), ("ifgsm", 0.2), ("pgd", 0.5)]


def test_study_scores_are_those_of_the_chosen_iterate(run):
    module, data, _, _ = run
    batch = data.arrays("test")
    study = module.test_step(batch, 0)
    assert [judge.role for judge in study.judges] == ["attacked"] + ["held_out"] * (len(study.judges) - 1)
    for attack in study.attacks:
        logits = module(attack.x_adv, batch["mask"]).detach()
        torch.testing.assert_close(attack.logits[attack.iteration], logits, rtol=1e-4, atol=1e-5)  # float32 batches
        judge = module.judges()[0][0]
        torch.testing.assert_close(attack.scores["a"], judge.score(attack.x_adv, batch["mask"]))
        assert not torch.equal(attack.x_adv, batch["series"])
    joined = type(study).join([study, study])
    assert len(joined.labels) == 2 * len(study.labels)
    assert joined.attacks[0].logits.shape[1] == 2 * len(study.labels)


def test_networks_are_left_as_they_were(run):
    module, data, _, _ = run
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.test_step(data.arrays("test"), 0)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_checkpoint_holds_plain_values_and_predicts_the_same(run, tmp_path):
    module, data, _, _ = run
    state = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(state)
    torch.save(state, tmp_path / "c.ckpt")
    read = torch.load(tmp_path / "c.ckpt", weights_only=True)
    other = attacker()
    other.load_state_dict(read["state_dict"])
    other.on_load_checkpoint(read)
    batch = data.arrays("test")
    one, two = module.predict_step(batch, 0), other.predict_step(batch, 0)
    assert torch.equal(one.x_adv, two.x_adv)


class Watched(Attack):
    """Remembers which series it was asked for and the detectors it was given."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.calls = []

    def __call__(self, model, x, y, *, detectors=(), **settings):
        weights = [{name: value.clone() for name, value in one.state_dict().items()} for one in detectors]
        self.calls.append((x.clone(), weights))
        return super().__call__(model, x, y, detectors=detectors, **settings)


class Seen(torch.nn.Module):
    """A discriminator that remembers the first value of every series it is trained on."""

    def __init__(self, n_channels, n_classes, n_steps):
        super().__init__()
        self.out = torch.nn.Linear(n_steps, 1)
        self.values = set()

    def forward(self, series):
        if self.training:
            self.values |= set(series[: len(series) // 2, 0, 0].tolist())  # clean series come first
        return self.out(series[..., 0])


def test_each_copy_is_trained_on_the_other_folds_alone(folder):
    plan = DiscriminatorPlan(
        name="a", network=Seen, attack=IFGSM, training_attacks="ifgsm", start=0.3, n_levels=1, epochs_per_level=2
    )
    module, data, *_ = fitted(folder, discriminators=[plan], classifier_epochs=1, n_folds=3, fitted_judges=False)
    train = data.arrays("train")
    first_values = train["series"][:, 0, 0]
    assert len(set(first_values.tolist())) == len(first_values), "values must tell series apart"
    folds = module._folds(train["index"])
    assert sorted(folds.bincount().tolist()) == [24, 24, 24]
    whole, *copies = module._copies(0)
    assert whole.values == set(first_values.tolist())
    for fold, copy in enumerate(copies):
        assert copy.values == set(first_values[folds != fold].tolist())


def test_the_classifier_is_frozen_and_discriminators_learn_to_detect(folder):
    class Watch(Callback):
        before: ClassVar[dict] = {}

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == pl_module.classifier_epochs:
                self.before.update({k: v.clone() for k, v in pl_module.classifier.state_dict().items()})

    plain = DiscriminatorPlan(
        name="a", network=network, attack=IFGSM, training_attacks="ifgsm", start=0.3, n_levels=1, epochs_per_level=30
    )
    settings = {"discriminators": [plain], "n_folds": 0, "fitted_judges": False, "callbacks": [Watch()]}
    module, _, trainer, _ = fitted(folder, batch_size=16, **settings)
    for name, value in module.classifier.state_dict().items():
        assert torch.equal(value, Watch.before[name]), f"{name} moved after the classifier's epochs"
    # a step of 0.3 five times over, on noise of deviation 0.5: plain to see
    assert trainer.callback_metrics["val/a/auc"].item() > 0.8


def test_validation_series_are_attacked_for_validation_alone(folder):
    watched = Watched(Vanilla(), SignStep(), n_steps=2)
    plan = DiscriminatorPlan(
        name="a", network=network, attack=watched, training_attacks="ifgsm", start=0.3, n_levels=1, epochs_per_level=1
    )
    _, data, *_ = fitted(folder, discriminators=[plan], classifier_epochs=1, n_folds=0, fitted_judges=False)
    asked = torch.cat([x for x, _ in watched.calls])[:, 0, 0].tolist()
    train, validation = (data.arrays(split)["series"][:, 0, 0].tolist() for split in ("train", "validation"))
    assert sorted(asked) == sorted(train + validation), "every series once, of either split"


def test_rounds_attack_the_discriminators_as_they_are_when_a_round_begins(folder):
    watched = Watched(SumReg(), SignStep(0.05), n_steps=2)
    plans = [
        DiscriminatorPlan(
            name=name,
            network=network,
            attack=IFGSM,
            training_attacks="ifgsm",
            start=0.3,
            n_levels=1,
            epochs_per_level=2,
            n_rounds=1,
            round_attack=watched,
            seed=seed,
        )
        for name, seed in (("a", 1), ("b", 2))
    ]

    class Watch(Callback):
        found: ClassVar[list] = []

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == pl_module.classifier_epochs + 2:
                self.found += [
                    {k: v.clone() for k, v in one.state_dict().items()} for one in pl_module.attacked_networks()
                ]

    module, *_ = fitted(
        folder, discriminators=plans, classifier_epochs=2, n_folds=0, fitted_judges=False, callbacks=[Watch()]
    )
    assert {name: len(scores) for name, scores in module.found["calibration"].items()} == {"a": 24, "b": 24}
    levels = [(level["attack"], level["strength"], level["concealed"]) for level in module.found["levels"]["a"]]
    assert levels == [("ifgsm", 0.3, False), ("concealed", None, True)]
    assert len(watched.calls) >= 4, "training batches and validation of both plans"
    for _, weights in watched.calls:
        assert len(weights) == 2
        for given, begun in zip(weights, Watch.found, strict=True):
            for name, value in given.items():
                if "num_batches" not in name:
                    assert torch.equal(value, begun[name]), f"{name} is not that of the round's beginning"


class Rates(Callback):
    """Learning rates of all optimisers as each epoch begins."""

    def __init__(self):
        self.kept = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.kept.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers])


def test_schedules_step_after_each_epoch_of_their_network_and_do_not_begin_anew_at_a_level(folder):
    """Classifier for 2 epochs; a and its copies for 2 levels of 1 epoch, h and its for 2 levels of 2."""
    plan = {"start": 0.3, "n_levels": 2}
    plans = [
        DiscriminatorPlan(
            name="a", network=network, attack=IFGSM, training_attacks="ifgsm", epochs_per_level=1, seed=1, **plan
        ),
        DiscriminatorPlan(
            name="h",
            role="held_out",
            network=small_lstm,
            attack=PGD,
            training_attacks="pgd",
            epochs_per_level=2,
            seed=2,
            **plan,
        ),
    ]
    rates, halved = Rates(), lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    _, _, trainer, _ = fitted(
        folder,
        discriminators=plans,
        classifier_epochs=2,
        fitted_judges=False,
        callbacks=[rates],
        classifier_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1),
        discriminator_scheduler=halved,
    )
    assert trainer.num_training_batches == 3, "several steps an epoch, one of the schedule"
    rates.kept.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers])
    classifier = [0, 1, 2, 2, 2, 2, 2]  # epochs done
    short, long = [0, 0, 0, 1, 2, 2, 2], [0, 0, 0, 1, 2, 3, 4]
    for found, first, *others in zip(rates.kept, classifier, *[short] * 3, *[long] * 3, strict=True):
        # products of the same factors
        assert found == pytest.approx([1e-3 * 0.1**first, *(1e-3 * 0.5**n for n in others)], rel=1e-12)
    assert len(trainer.lr_scheduler_configs) == 7


def test_a_victim_has_no_schedule(folder):
    rates = Rates()
    victim = {
        "class_path": "lightning_modules.networks.ResCNN",
        "init_args": {"n_channels": 1, "n_classes": 2, "n_steps": 40, "n_filters": 2},
    }
    plan = DiscriminatorPlan(
        name="a", network=network, attack=IFGSM, training_attacks="ifgsm", start=0.3, n_levels=2, epochs_per_level=1
    )
    schedule = {
        name: lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        for name in ("classifier_scheduler", "discriminator_scheduler")
    }
    _, _, trainer, _ = fitted(
        folder, victim=victim, classifier_epochs=0, discriminators=[plan], n_folds=0, callbacks=[rates], **schedule
    )
    assert rates.kept == [[1e-3], [5e-4]]
    assert len(trainer.lr_scheduler_configs) == 1


@pytest.mark.parametrize("which", ["classifier_scheduler", "discriminator_scheduler"])
def test_a_schedule_that_waits_for_a_metric_is_refused(folder, which):
    with pytest.raises(ValueError, match=f"{which} must step by epochs, got ReduceLROnPlateau"):
        fitted(folder, **{which: torch.optim.lr_scheduler.ReduceLROnPlateau})


def test_predict_hands_on_the_course_of_each_detector_and_the_iterates_if_asked(varied, tmp_path):
    module, data, *_ = varied
    batch, settings = data.arrays("test"), (module.predict_attack, module.keep_iterates)
    module.predict_attack = "pgd sum"  # which begins at the clean series
    lean = module.predict_step(batch, 0)
    assert lean.iterates is None
    module.keep_iterates = True
    try:
        found, nothing = (
            module.predict_step({key: value[:n] for key, value in batch.items()}, 0) for n in (len(batch["labels"]), 0)
        )
    finally:
        module.predict_attack, module.keep_iterates = settings
    assert torch.equal(found.x_adv, lean.x_adv)
    assert found.iterates.shape == (7, *batch["series"].shape)
    assert torch.equal(found.iterates[0], batch["series"])
    assert torch.equal(found.iterates[found.iteration], found.x_adv)
    assert found.detectors == ("a", "b")
    frame = series_frame(found)
    assert frame.schema == series_frame(nothing).schema
    lengths = batch["mask"].sum(1).tolist()
    for number, name in enumerate(found.detectors):
        logits = found.detector_logits[:, number].double()
        course = np.stack(frame[f"detector_probability_at {name}"].to_list())
        np.testing.assert_allclose(course, logits.sigmoid().T.numpy(), rtol=1e-14)  # strides may turn the last bit
    each = np.stack([frame[f"detector_probability_at {name}"].to_list() for name in found.detectors])
    np.testing.assert_array_equal(np.stack(frame["detector_probability_at"].to_list()), each.max(0))
    for row, (iterates, length) in enumerate(zip(frame["iterates"].to_list(), lengths, strict=True)):
        assert len(iterates) == 7
        np.testing.assert_array_equal(iterates, found.iterates[:, row, :length].flatten(1).numpy())
        assert iterates[found.iteration] == frame["adversarial"][row].to_list()
        assert iterates[0] == frame["series"][row].to_list()
    assert "iterates" not in series_frame(lean).columns
    frame.write_parquet(tmp_path / "a.parquet")
    assert pl.read_parquet(tmp_path / "a.parquet").equals(frame)


def test_a_last_batch_of_one_series_is_trained_on(folder):
    module, *_ = fitted(folder, batch_size=71, classifier_epochs=1)  # 72 training series: 71 and 1
    assert module.found is not None


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # of which people still have files
@pytest.mark.parametrize("ending", [".ts", ".pt2"])
def test_a_program_is_attacked_as_it_is(folder, tmp_path, ending):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(40, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).eval()
    example = (torch.randn(3, 40, 1),)
    file = str(tmp_path / f"victim{ending}")
    if ending == ".ts":
        torch.jit.freeze(torch.jit.trace(net, example)).save(file)
    else:
        batch = torch.export.Dim("batch", min=2)
        torch.export.save(torch.export.export(net, example, dynamic_shapes=({0: batch},)), file)
    module, data, *_ = fitted(folder, victim={"program": file, "trusted": True}, classifier_epochs=0)
    series = data.arrays("test")["series"]
    torch.testing.assert_close(module(series), net(series), rtol=1e-4, atol=1e-5)  # float32, fused otherwise
    assert module.found is not None


def test_a_checkpoint_of_other_plans_is_refused(run):
    module, *_ = run
    state = {}
    module.on_save_checkpoint(state)
    other = attacker(attacks=[AttackPlan(name="new", family="ifgsm", attack=IFGSM, steps=[0.1])])
    with pytest.raises(ValueError, match=r"checkpoint holds .*'sum'.* the config here names .*'new'"):
        other.on_load_checkpoint(state)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"steps": [0.02]}, r"grid is \[\[0\.02, None, 0\.1, 0\].* there, \[\[0\.02, None, 0\.1, 0\], .* here"),
        ({"class_loss": "margin"}, "attack.objective.class_loss is 'cross_entropy' there, 'margin' here"),
        ({"n_steps": 7}, "attack.n_steps is 8 there, 7 here"),
    ],
)
def test_a_choice_of_another_attack_is_refused(run, change, told):
    """It would be run, and its report would name the settings of the config at hand."""
    module, *_ = run
    state = {}
    module.on_save_checkpoint(state)
    settings = {"steps": [0.02, 0.1], "class_loss": "cross_entropy", "n_steps": 8} | change
    attack = Attack(SumReg(class_loss=settings["class_loss"]), SignStep(), n_steps=settings["n_steps"])
    plan = AttackPlan(name="sum", family="ifgsm", attack=attack, steps=settings["steps"], alphas=[0.1, 10.0])
    other = attacker(attacks=[*attacker().attacks[:1], plan])
    with pytest.raises(ValueError, match=f"checkpoint chose attack 'sum' with other settings: {told}"):
        other.on_load_checkpoint(state)


def test_without_scikit_learn_a_fit_ends_before_it_begins(folder, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else found(name))
    data = TimeSeriesDataModule(folder=str(folder), name="Toy")
    trainer = Trainer(accelerator="cpu", max_epochs=14, logger=False, enable_checkpointing=False)
    with pytest.raises(ImportError, match=r"needs scikit-learn: pip install 'seqlit\[timeseries\]'"):
        trainer.fit(attacker(), data)


def test_validate_says_that_it_shows_the_classifier_alone(run, capsys):
    module, data, _, _ = run
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    (found,) = trainer.validate(module, data, verbose=False)
    assert found.keys() == {"val/accuracy", "val/loss"}
    assert "shows the classifier alone" in capsys.readouterr().out


def test_a_quick_run_of_one_batch_passes(folder):
    data = TimeSeriesDataModule(folder=str(folder), name="Toy")
    Trainer(accelerator="cpu", fast_dev_run=True, logger=False, enable_progress_bar=False).fit(attacker(), data)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_judges_read_what_they_were_calibrated_on_in_any_precision(folder, precision):
    """Of series that calibrated them they say the same again, and what they say can be drawn."""
    seed_everything(1, verbose=False)
    data = TimeSeriesDataModule(folder=str(folder), name="Toy", validation_fraction=0.25)
    module = attacker(n_folds=0)
    kept = []

    class Keep(Callback):
        def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            kept.append(outputs)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "callbacks": [Keep()]}
    trainer = Trainer(accelerator="cpu", max_epochs=14, precision=precision, **quiet)
    trainer.fit(module, data)
    validation = data.arrays("validation")
    trainer.test(module, torch.utils.data.DataLoader([validation], batch_size=None), verbose=False)
    (study,) = kept
    assert study.series.dtype == study.attacks[0].x_adv.dtype == study.clean_logits.dtype == torch.float32
    for judge in study.judges:
        if len(judge.calibration):
            assert torch.equal(judge.clean.sort().values, judge.calibration.sort().values), judge.name


def test_epochs_must_be_those_of_the_plans(folder):
    data = TimeSeriesDataModule(folder=str(folder), name="Toy")
    trainer = Trainer(accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"trainer\.max_epochs must be 14: 6 of the classifier and 8 of the longest"):
        trainer.fit(attacker(), data)


def test_attacks_are_not_chosen_amid_an_epoch(folder):
    data = TimeSeriesDataModule(folder=str(folder), name="Toy")
    trainer = Trainer(
        accelerator="cpu", max_epochs=14, val_check_interval=0.5, logger=False, enable_checkpointing=False
    )
    with pytest.raises(ValueError, match=r"val_check_interval must be 1\.0, attacks are chosen after .*, got 0\.5"):
        trainer.fit(attacker(), data)


def test_before_a_fit_nothing_can_be_tested(folder):
    data = TimeSeriesDataModule(folder=str(folder), name="Toy")
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="no attack was chosen: run `seqlit fit`"):
        trainer.test(attacker(), data, verbose=False)


def _twin(**change):
    plan = {"network": network, "attack": IFGSM, "training_attacks": "ifgsm", "seed": 1, "n_levels": 1}
    held = {"name": "h", "role": "held_out", "network": small_lstm, "training_attacks": "pgd", "seed": 2}
    return [DiscriminatorPlan(name="a", **plan), DiscriminatorPlan(**plan | held | change)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_classes": None}, "n_classes must come from the data, got None"),
        ({"attacks": []}, "at least one discriminator with role 'attacked' and one attack are needed"),
        ({"discriminators": _twin(seed=1)}, "must differ in seed, got 1 in both"),
        ({"discriminators": _twin(network=network)}, "must differ in architecture"),
        ({"discriminators": _twin(training_attacks="ifgsm")}, "must differ in training_attacks, got .*ifgsm.* in both"),
        (
            {"discriminators": _twin(mixture=[TrainingAttack(name="other", attack=IFGSM, start=0.1)], attack=PGD)},
            "must differ in training_attacks, got Vanilla SignStep in both",
        ),
        ({"discriminators": _twin(name="a")}, "names of discriminators and of attacks must differ"),
        (
            {"discriminators": _twin(name="statistics")},
            "a discriminator cannot be named 'statistics', as another judge",
        ),
        ({"n_folds": 1}, "n_folds must be 0 or at least 2, got 1"),
        ({"predict_attack": "other"}, "predict_attack must be one of"),
        ({"classifier_epochs": 0}, "classifier_epochs must be at least 1 without a victim, got 0"),
    ],
)
def test_wrong_settings_end_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        attacker(**settings)


def test_the_best_classifier_is_attacked(folder):
    """Not that of the last epoch, which on few series is often a bad one."""

    class Losses(Callback):
        def __init__(self):
            self.kept = []

        def on_validation_end(self, trainer, pl_module):
            if trainer.current_epoch < pl_module.classifier_epochs:
                state = {name: value.clone() for name, value in pl_module.classifier.state_dict().items()}
                self.kept.append((trainer.callback_metrics["val/loss"].item(), state))

    losses = Losses()
    module, *_ = fitted(folder, callbacks=[losses], n_folds=0, fitted_judges=False)
    assert len(losses.kept) == 6
    best = min(losses.kept, key=lambda pair: pair[0])[1]
    for name, value in module.classifier.state_dict().items():
        assert torch.equal(value, best[name]), name


class FirstHalf(torch.nn.Module):
    """A classifier whose gradient is zero in the second half of a series, and the same everywhere in the first."""

    def __init__(self, n_classes=2):
        super().__init__()
        self.n_logits = 1 if n_classes == 2 else n_classes

    def forward(self, series):
        return 100 * series[:, :20].mean(1).expand(-1, self.n_logits)  # linear: its scale moves no sign


def transfer(**surrogate):
    sum_reg = Attack(SumReg(), SignStep(0.1), n_steps=2)
    plan = {"family": "ifgsm", "attack": Attack(Vanilla(), SignStep(0.1), n_steps=2), "n_restarts": 1}
    loaded = {"class_path": f"{__name__}.FirstHalf", "init_args": surrogate}
    return [
        AttackPlan(name="ifgsm", **plan),
        AttackPlan(name="transfer", **plan | {"surrogate": loaded}),
        AttackPlan(name="hidden", **plan | {"attack": sum_reg, "calibrate": True, "surrogate": loaded}),
    ]


class Flat(torch.nn.Module):
    """A linear classifier."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(40, 1, bias=False)

    def forward(self, series):
        return self.head(series.flatten(1))


@pytest.mark.parametrize("knows", [True, False])
def test_a_fit_says_how_its_victim_decides_on_clean_series(folder, tmp_path, capsys, knows):
    data = TimeSeriesDataModule(folder=str(folder), name="Toy", validation_fraction=0.25)
    data.setup("fit")
    clean = data.arrays("validation")
    # as many series as steps at most: a linear classifier can be right on all of them, and wrong on all
    signs = (2 * clean["labels"] - 1).float() * (1 if knows else -1)
    weight = torch.linalg.lstsq(clean["series"].flatten(1), signs[:, None], driver="gelsd").solution
    torch.save({"head.weight": weight.T}, tmp_path / "weights.pt")
    victim = {"class_path": f"{__name__}.Flat", "weights": str(tmp_path / "weights.pt")}
    plan = DiscriminatorPlan(
        name="a", network=network, attack=IFGSM, training_attacks="ifgsm", n_levels=1, epochs_per_level=1
    )
    fitted(folder, victim=victim, classifier_epochs=0, discriminators=[plan], n_folds=0, fitted_judges=False)
    said = capsys.readouterr().out
    assert f"the victim calls {24 if knows else 0} of 24 clean validation series rightly" in said
    assert ("Warning" in said) is not knows
    assert ("in the order of the classes (0, 1)" in said) is not knows


def test_a_surrogate_gives_the_gradients_and_the_classifier_the_scores(folder, tmp_path):
    module, data, *_ = fitted(folder, attacks=transfer(), n_folds=0, fitted_judges=False)
    # calibrated on the classifier whose margin is climbed: median |logit| of the surrogate, not of the victim
    clean = data.arrays("validation")["series"]
    median = (100 * clean[:, :20, 0].mean(1)).abs().double().quantile(0.5)
    assert module.found["chosen"]["hidden"]["scales"]["victim_scale"] == pytest.approx(float(median), rel=1e-4)
    series = next(iter(data.test_dataloader()))
    study = module.test_step(series, 0)
    own, moved, _ = study.attacks
    assert not own.transferred
    assert moved.transferred
    still = moved.x_adv[:, 20:] == study.series[:, 20:]
    assert bool(still.all())
    assert not bool((own.x_adv[:, 20:] == study.series[:, 20:]).all())
    size = 0.1 * moved.iteration
    torch.testing.assert_close((moved.x_adv - study.series)[:, :20].abs(), torch.full((60, 20, 1), size))
    called = module(moved.x_adv)
    torch.testing.assert_close(moved.logits[moved.iteration], called.detach(), rtol=1e-4, atol=1e-5)
    predicted = module.predict_step(series, 0)  # of the last attack, whose detector reads all of a series
    assert torch.equal(predicted.x_adv, study.attacks[2].x_adv)
    told = findings(study, n_resamples=20)["attacks"]
    assert [attack["transferred"] for attack in told.values()] == [False, True, True]


@pytest.mark.parametrize(
    ("surrogate", "message"),
    [
        ({"n_classes": 3}, "the surrogate of attack 'transfer' tells 3 classes apart, the data has 2"),
        ({"wrong": 1}, "the surrogate of attack 'transfer': .*does not take init_args"),
    ],
)
def test_a_surrogate_must_suit_the_data(surrogate, message):
    with pytest.raises(ValueError, match=message):
        attacker(attacks=transfer(**surrogate))


class Unmasked(torch.nn.Module):
    """A victim that takes no mask."""

    def __init__(self):
        super().__init__()
        self.out = torch.nn.Linear(1, 1)

    def forward(self, series):
        return self.out(series.mean(1))


@pytest.mark.parametrize("is_victim", [False, True])
def test_padded_series_are_refused_by_a_classifier_without_masks(is_victim, tmp_path):
    if is_victim:
        settings = {"victim": {"class_path": f"{__name__}.Unmasked"}, "classifier_epochs": 0}
    else:
        settings = {"classifier": lambda **facts: Unmasked()}
    module = attacker(**settings)
    series, mask = torch.randn(2, 40, 1), torch.arange(40) < torch.tensor([[40], [30]])
    assert module(series, torch.ones_like(mask)).shape == (2, 1)
    with pytest.raises(ValueError, match="takes no mask, and 1 of 2 series are padded"):
        module(series, mask)
