"""ConcealedAttacker through the Trainer on series with a known rule: what trains, what is chosen, what is judged."""

from typing import ClassVar

import pytest
import torch
from lightning import Callback, Trainer, seed_everything

from datamodules import TimeSeriesDataModule
from datamodules.synthetic_series import synthetic_series
from lightning_modules import ConcealedAttacker
from lightning_modules.attacks import Attack, Linf, PGDStep, SignStep, SumReg, Vanilla
from lightning_modules.attacks.discriminators import AttackPlan, DiscriminatorPlan
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


def fitted(folder, *, callbacks=(), batch_size=32, **settings):
    seed_everything(1, verbose=False)
    data = TimeSeriesDataModule(folder=str(folder), name="Toy", batch_size=batch_size, validation_fraction=0.25)
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


def test_calibration_scores_come_from_copies_that_never_saw_the_series(run):
    module, data, _, _ = run
    train = data.arrays("train")
    calibration = module.found["calibration"]["a"]
    assert len(calibration) == len(train["labels"])
    rows = train["index"]
    for fold in range(module.n_folds):
        inside = module._folds(rows) == fold
        judge = module._network_judges(copy=fold + 1)[0]
        expected = judge.score(train["series"][inside], train["mask"][inside])
        torch.testing.assert_close(calibration[rows[inside]], expected.cpu())


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
    assert module.found["calibration"] == {}
    assert len(watched.calls) >= 4, "training batches and validation of both plans"
    for _, weights in watched.calls:
        assert len(weights) == 2
        for given, begun in zip(weights, Watch.found, strict=True):
            for name, value in given.items():
                if "num_batches" not in name:
                    assert torch.equal(value, begun[name]), f"{name} is not that of the round's beginning"


def test_a_last_batch_of_one_series_is_trained_on(folder):
    module, *_ = fitted(folder, batch_size=71, classifier_epochs=1)  # 72 training series: 71 and 1
    assert module.found is not None


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of which people still have files
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
    module, data, *_ = fitted(folder, victim={"program": file}, classifier_epochs=0)
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


def test_epochs_must_be_those_of_the_plans(folder):
    data = TimeSeriesDataModule(folder=str(folder), name="Toy")
    trainer = Trainer(accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"trainer\.max_epochs must be 14: 6 of the classifier and 8 of the longest"):
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
        ({"discriminators": _twin(name="a")}, "names of discriminators and of attacks must differ"),
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
