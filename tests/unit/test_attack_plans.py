"""Plans of attacks: what a plan refuses when it is made, restarts as an axis of the grid, and padded series."""

import inspect

import pytest
import torch
from lightning import Trainer
from torch import nn

from datamodules import TimeSeriesDataModule
from datamodules.synthetic_series import synthetic_series
from lightning_modules import ConcealedAttacker
from lightning_modules.attacks import (
    APGD,
    AdamStep,
    Attack,
    DiscOnly,
    Linf,
    Momentum,
    NeighReg,
    Nesterov,
    Noise,
    NormSum,
    PGDStep,
    SignStep,
    SimBA,
    SquareSearch,
    Stepper,
    SumReg,
    UniversalStep,
    Vanilla,
    grid_points,
    run_grid,
)
from lightning_modules.attacks.campaign import choose, judged, run_chosen
from lightning_modules.attacks.discriminators import AttackPlan, DiscriminatorPlan
from lightning_modules.attacks.grid import RESTART_STRIDE
from lightning_modules.attacks.judges import NetworkJudge
from lightning_modules.networks import ResCNN

B, T, C = 12, 20, 1
BY_STEP = {
    "AdamStep": AdamStep,
    "Momentum": Momentum,
    "Nesterov": Nesterov,
    "Noise": Noise,
    "SignStep": SignStep,
    "SimBA": SimBA,
}
BY_RADIUS = {"APGD": APGD, "PGDStep": PGDStep, "SquareSearch": SquareSearch}


class Linear(nn.Module):
    """``w . x``, the sum of each series alone: its bits do not depend on the batch."""

    def __init__(self, seed, bias=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(T, C, generator=torch.Generator().manual_seed(seed)))
        self.bias = bias

    def forward(self, series, mask=None):
        return (series * self.weight).sum(dim=(1, 2))[:, None] + self.bias


@pytest.fixture
def clean():
    generator = torch.Generator().manual_seed(0)
    series = torch.randn(B, T, C, generator=generator)
    labels = torch.tensor([0, 1] * (B // 2))
    index = torch.arange(100, 100 + B)
    return {"series": series, "labels": labels, "mask": torch.ones(B, T, dtype=torch.bool), "index": index}


def judge_of(network):
    known = {"seed": "2", "architecture": "Linear", "training_attacks": "none", "data_split": "none"}
    return NetworkJudge(network, "d", known)


def plan_of(attack, **settings):
    return AttackPlan(name="a", family="f", attack=attack, **settings)


def steppers(base=Stepper):
    for kind in base.__subclasses__():
        if not inspect.isabstract(kind) and kind.__module__.startswith("lightning_modules."):
            yield kind.__name__
        yield from steppers(kind)


def test_every_stepper_has_its_place_in_a_plan():
    assert {*BY_STEP, *BY_RADIUS, "UniversalStep"} == set(steppers())
    with pytest.raises(ValueError, match="not couple the series of a batch"):
        plan_of(Attack(Vanilla(), UniversalStep(0.1)))


def without_step(kind):
    """AdamStep alone has a default, the published learning rate."""
    return kind(step=None)


@pytest.mark.parametrize("name", BY_STEP)
def test_a_stepper_with_a_step_of_its_own_needs_one(clean, name):
    for ball in ({}, {"projection": Linf(0.3)}):
        attack = Attack(SumReg(), without_step(BY_STEP[name]), n_steps=2, **ball)
        with pytest.raises(ValueError, match=f"attack 'a' needs a step: give steps, or one to {name}") as caught:
            plan_of(attack)
        assert "\n" not in str(caught.value)
        ran(plan_of(attack, steps=[0.1, 0.2]), clean)
        ran(plan_of(Attack(SumReg(), BY_STEP[name](0.1), n_steps=2, **ball)), clean)


@pytest.mark.parametrize("name", BY_RADIUS)
def test_a_stepper_whose_step_follows_the_radius_takes_none(clean, name):
    attack = Attack(NormSum(), BY_RADIUS[name](), projection=Linf(), n_steps=2)
    message = f"steps of attack 'a': {name} takes its step from the radius, give radii"
    with pytest.raises(ValueError, match=message) as caught:
        plan_of(attack, steps=[0.1], radii=[0.2])
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="attack 'a' needs a radius: give radii, or one to Linf"):
        plan_of(attack)
    ran(plan_of(attack, radii=[0.1, 0.2], alphas=[0.0, 1.0]), clean)


def ran(plan, clean):
    """Choose and run: a plan that was taken does not fail at the end of a fit."""
    detector = Linear(2, bias=-0.5)
    choice = choose(plan, Linear(1), [judge_of(detector)], clean, n_classes=2, seed=3)
    result = run_chosen(plan, choice, Linear(1), [detector], clean, seed=3)
    assert result.x_adv.isfinite().all()
    return choice, result


@pytest.mark.parametrize(
    ("objective", "alphas", "concealed"),
    [
        (Vanilla(), [], False),
        (SumReg(), [0.0, 1.0], True),  # also where 0 is chosen: else it would be the baseline of its family
        (SumReg(alpha=0.0), [0.0, 1.0], True),
        (SumReg(), [0.0], False),
        (SumReg(alpha=0.0), [], False),
        (NormSum(), [], True),
        (NeighReg(alpha=0.1), [], True),  # it hides without a detector
    ],
)
def test_concealed_is_what_is_more_than_the_classifiers_loss(clean, objective, alphas, concealed):
    plan = plan_of(Attack(objective, SignStep(0.1), n_steps=2), alphas=alphas)
    choice, _ = ran(plan, clean)
    judge = judge_of(Linear(2, bias=-0.5))
    facts = {"levels": {}, "class_names": ("0", "1"), "saturation": 1.0, "seed": 3}
    zero = {"a": choice | ({"alpha": 0.0} if alphas else {})}
    study = judged([plan], zero, Linear(1), [judge.network], [(judge, "attacked")], {}, clean, **facts)
    assert study.attacks[0].concealed is concealed
    assert [point.alpha for point in study.attacks[0].configurations] == (alphas or [None])


def test_a_surrogate_needs_an_objective_that_reads_a_classifier():
    with pytest.raises(ValueError, match="surrogate of attack 'a': DiscOnly reads no classifier"):
        plan_of(Attack(DiscOnly(), SignStep(0.1)), surrogate={"class_path": "torch.nn.Identity"})


def test_a_weight_of_zero_may_be_chosen_from_and_equals_vanilla(clean):
    attack = Attack(SumReg(), SignStep(0.1), n_steps=3)
    choice, result = ran(plan_of(attack, alphas=[0.0]), clean)
    assert choice["alpha"] == 0.0
    assert torch.equal(result.x_adv, ran(plan_of(Attack(Vanilla(), SignStep(0.1), n_steps=3)), clean)[1].x_adv)


@pytest.mark.parametrize(
    ("attack", "settings", "message"),
    [
        (
            Attack(SumReg(), SignStep(0.1)),
            {"alphas": [0.1, -0.5]},
            r"alphas of attack 'a' must be at least 0 and finite",
        ),
        (Attack(SumReg(), SignStep(0.1)), {"alphas": [float("nan")]}, "alphas of attack 'a' must be at least 0"),
        (Attack(SumReg(), SignStep(0.1)), {"alphas": [float("inf")]}, "alphas of attack 'a' must be at least 0"),
        (Attack(SumReg(), SignStep()), {"steps": [float("inf")]}, "steps of attack 'a' must be above 0 and finite"),
        (Attack(Vanilla(), PGDStep(), projection=Linf()), {"radii": [0.0]}, "radii of attack 'a' must be above 0"),
        (Attack(Vanilla(), Noise(0.1)), {"n_restarts": 0}, "n_restarts of attack 'a' must be at least 1, got 0"),
        (
            Attack(Vanilla(), AdamStep(0.1, start_scale=0.0)),
            {"n_restarts": 2},
            "n_restarts of attack 'a' must be 1: it draws no noise",
        ),
        (
            Attack(Vanilla(), SignStep(0.1)),
            {"n_restarts": 2},
            "n_restarts of attack 'a' must be 1: it draws no noise, all restarts would be the same, got 2",
        ),
    ],
)
def test_axes_that_cannot_be_run_end_in_one_line(attack, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        plan_of(attack, **settings)
    assert "\n" not in str(caught.value)


RANDOM = {
    "noise": lambda: plan_of(Attack(Vanilla(), Noise(), n_steps=3), steps=[0.2, 0.4], n_restarts=3),
    "start": lambda: plan_of(
        Attack(SumReg(), PGDStep(), projection=Linf(), n_steps=2, random_start=True),
        radii=[0.1, 0.3],
        alphas=[0.0, 1.0],
        n_restarts=2,
    ),
    "simba": lambda: plan_of(Attack(NormSum(), SimBA(0.5), n_steps=4), n_restarts=4),
}


@pytest.mark.parametrize("name", RANDOM)
def test_the_chosen_restart_reproduces_the_grid_bit_for_bit(clean, name):
    plan, victim, detector = RANDOM[name](), Linear(1), Linear(2, bias=-0.5)
    choice, _ = ran(plan, clean)
    points = grid_points(steps=plan.steps, radii=plan.radii, alphas=plan.alphas, n_restarts=plan.n_restarts)
    assert len(choice["effectiveness"]) == len(points)
    arguments = {"detectors": [detector], "index": clean["index"], "generator": 3}
    grid = run_grid(plan.attack, victim, clean["series"], clean["labels"], points, **arguments)
    for number, point in enumerate(points):
        strengths = {axis: getattr(point, axis) for axis in ("step", "radius", "alpha", "restart")}
        again = run_chosen(plan, choice | strengths, victim, [detector], clean, seed=3)
        assert torch.equal(again.logits, grid.logits[number])
        assert torch.equal(again.detector_logits, grid.detector_logits[number])
    assert not torch.equal(grid.logits[0], grid.logits[1]), "restarts meet other noise"


def test_validation_chooses_among_restarts_and_the_lower_of_equal_ones(clean):
    plan, victim, detector = RANDOM["simba"](), Linear(1), Linear(2, bias=-0.5)
    choice, result = ran(plan, clean)
    success = []
    for restart in range(plan.n_restarts):
        single = plan_of(plan.attack)
        moved = clean | {"index": clean["index"] + restart * RESTART_STRIDE}
        success.append(choose(single, victim, [judge_of(detector)], moved, n_classes=2, seed=3)["success"])
    assert len(set(success)) > 1
    assert choice["restart"] == success.index(max(success))
    assert choice["success"] == max(success)
    still = plan_of(Attack(Vanilla(), Noise(1e-6), n_steps=1), n_restarts=3)
    assert ran(still, clean)[0]["restart"] == 0, "noise too small to change a decision: all restarts are equal"
    del choice["restart"]
    first = run_chosen(plan, choice | {"restart": 0}, victim, [detector], clean, seed=3)
    older = run_chosen(plan, choice, victim, [detector], clean, seed=3)
    assert torch.equal(older.x_adv, first.x_adv), "a choice of an earlier checkpoint is of restart 0"
    assert result.x_adv.shape == first.x_adv.shape


class Maskless(nn.Module):
    """Reads every step, and notes that it was asked."""

    def __init__(self, n_steps):
        super().__init__()
        self.head, self.n_calls = nn.Linear(n_steps, 1), 0

    def forward(self, series):
        self.n_calls += 1
        return self.head(series[..., 0])


def maskless(n_channels, n_classes, n_steps):
    return Maskless(n_steps)


def masked(n_channels, n_classes, n_steps):
    return ResCNN(n_channels=n_channels, n_classes=n_classes, n_steps=n_steps, n_filters=2)


def attacker(classifier, discriminator):
    ifgsm = Attack(Vanilla(), SignStep(), n_steps=1)
    plan = {"attack": ifgsm, "training_attacks": "ifgsm", "start": 0.1, "n_levels": 1, "epochs_per_level": 1}
    return ConcealedAttacker(
        n_channels=1,
        n_classes=2,
        n_steps=30,
        classifier=classifier,
        classifier_epochs=1,
        discriminators=[DiscriminatorPlan(name="d", network=discriminator, seed=1, **plan)],
        attacks=[AttackPlan(name="a", family="f", attack=ifgsm, steps=[0.1])],
        n_folds=0,
        fitted_judges=False,
    )


def fit(module, folder, name):
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, TimeSeriesDataModule(folder=str(folder), name=name, batch_size=64, validation_fraction=0.25))


@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*smaller than the logging", "ignore:.*in eval mode at the start"
)
@pytest.mark.parametrize(
    ("classifier", "discriminator", "role"),
    [(masked, maskless, "discriminator 'd'"), (maskless, masked, "classifier")],
)
def test_a_fit_on_padded_series_refuses_networks_without_mask_before_its_first_step(
    tmp_path, classifier, discriminator, role
):
    for name, varied in (("Even", False), ("Padded", True)):
        synthetic_series(32, 16, n_steps=30, variable_length=varied, seed=3).write(tmp_path, name, ".ts")
    module = attacker(classifier, discriminator)
    with pytest.raises(ValueError, match=f"the {role} Maskless takes no mask, and [0-9]+ of 24 series are padded"):
        fit(module, tmp_path, "Padded")
    assert [one.n_calls for one in module.modules() if isinstance(one, Maskless)] == [0]
    module = attacker(classifier, discriminator)
    fit(module, tmp_path, "Even")
    assert set(module.found["chosen"]) == {"a"}, "series of one length need no mask"
    assert module.found["chosen"]["a"]["restart"] == 0
