"""Schedules, the bank of adversarial series, and the loss of discriminators."""

import pytest
import torch

from lightning_modules.attacks import (
    Attack,
    HarmonicReg,
    Linf,
    NeighReg,
    PGDStep,
    SignStep,
    SumReg,
    UniversalStep,
    Vanilla,
)
from lightning_modules.attacks.discriminators import (
    AdversarialBank,
    AttackPlan,
    DiscriminatorPlan,
    TrainingAttack,
    detection_loss,
)
from lightning_modules.networks import ResCNN

IFGSM = Attack(Vanilla(), SignStep(), n_steps=3)


CONCEALED = Attack(SumReg(), SignStep(0.1))


def plan_of(**settings):
    return DiscriminatorPlan(
        **{"name": "d", "network": ResCNN, "attack": IFGSM, "training_attacks": "ifgsm"} | settings
    )


def test_levels_weaken_by_gamma_and_rounds_follow():
    plan = plan_of(start=0.4, gamma=0.5, n_levels=3, epochs_per_level=4, n_rounds=2, round_attack=CONCEALED)
    strengths = [one.strength for level in plan.levels for one in level.attacks]
    assert strengths == [0.4, 0.2, 0.1, None, None], "rounds have their own strength"
    assert [level.concealed for level in plan.levels] == [False, False, False, True, True]
    assert plan.n_epochs == 20
    assert [plan.level_at(epoch) for epoch in (0, 3, 4, 11, 12, 19, 50)] == [0, 0, 1, 2, 3, 4, 4]


def test_provenance_names_what_it_is_made_of():
    network = ResCNN(n_channels=1, n_classes=2, n_steps=20, n_filters=2)
    assert plan_of(seed=7).provenance(network) == {
        "seed": "7",
        "architecture": "ResCNN",
        "training_attacks": "ifgsm, Vanilla SignStep",
        "data_split": "train",
    }
    rounds = plan_of(n_rounds=1, round_attack=CONCEALED)
    assert rounds.provenance(network)["training_attacks"] == "ifgsm, Vanilla SignStep, concealed"


def test_the_bank_makes_every_series_once_and_replays_earlier_levels():
    made = []

    def make(level, attack, rows):
        assert attack == 0
        made.append((level, rows.tolist()))
        return (100.0 * level + rows)[:, None, None].expand(-1, 4, 1).clone()

    bank = AdversarialBank(10, make)
    rows = torch.tensor([3, 7, 1])
    assert bank.get(0, rows)[:, 0, 0].tolist() == [3, 7, 1]
    assert bank.get(0, torch.tensor([7, 2]))[:, 0, 0].tolist() == [7, 2]
    assert made == [(0, [3, 7, 1]), (0, [2])]
    torch.manual_seed(0)
    shown = torch.stack([bank.sample(2, rows, replay=0.6)[:, 0, 0] for _ in range(300)])
    levels = (shown // 100).long()
    assert torch.equal(shown % 100, rows.float().expand_as(shown)), "each series stays itself"
    share = (levels == 2).float().mean().item()
    # 0.4 at the present level, and a third of the 0.6 that are drawn; 900 draws have a deviation of 0.016
    assert share == pytest.approx(0.6, abs=0.07)
    assert set(levels.unique().tolist()) == {0, 1, 2}
    assert (bank.sample(2, rows, replay=0.0)[:, 0, 0] // 100 == 2).all()


def test_a_mixture_weakens_each_attack_from_its_own_start():
    mixture = [
        TrainingAttack(name="pgd", attack=Attack(Vanilla(), PGDStep(), projection=Linf()), start=2.0),
        TrainingAttack(name="long ifgsm", attack=Attack(Vanilla(), SignStep(), n_steps=30), start=0.1),
    ]
    plan = plan_of(start=0.4, gamma=0.5, n_levels=2, mixture=mixture, n_rounds=1, round_attack=CONCEALED)
    shown = [[(one.name, one.strength) for one in level.attacks] for level in plan.levels]
    assert shown == [
        [("ifgsm", 0.4), ("pgd", 2.0), ("long ifgsm", 0.1)],
        [("ifgsm", 0.2), ("pgd", 1.0), ("long ifgsm", 0.05)],
        [("concealed", None)],
    ]
    assert plan.levels[1].attacks[2].attack.n_steps == 30
    network = ResCNN(n_channels=1, n_classes=2, n_steps=20, n_filters=2)
    listed = plan.provenance(network)["training_attacks"]
    assert listed == "ifgsm, Vanilla SignStep, pgd, Vanilla PGDStep Linf, long ifgsm, concealed"


def test_the_bank_draws_attacks_alike_beside_replay():
    bank = AdversarialBank(
        3, lambda level, attack, rows: (100.0 * level + 10 * attack + rows)[:, None, None].expand(-1, 4, 1).clone()
    )
    rows = torch.tensor([2, 0, 1])
    torch.manual_seed(0)
    shown = torch.stack([bank.sample(1, rows, 0.5, n_attacks=[2, 3])[:, 0, 0] for _ in range(400)])
    assert torch.equal(shown % 10, rows.float().expand_as(shown)), "each series stays itself"
    found = {
        int(cell): share / shown.numel() for cell, share in zip(*(shown // 10).unique(return_counts=True), strict=True)
    }
    # level 0 with 0.5 / 2, its two attacks alike; level 1 with the rest, its three alike
    expected = {0: 0.125, 1: 0.125, 10: 0.25, 11: 0.25, 12: 0.25}
    assert found == pytest.approx(expected, abs=0.05)  # 1,200 draws: deviations of at most 0.0125
    copy = AdversarialBank(3, lambda *_: pytest.fail("made once already"))
    copy.load_state(bank.state())
    for level, attack in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2)):
        assert torch.equal(copy.get(level, rows, attack), bank.get(level, rows, attack))


@pytest.mark.parametrize(("name", "start"), [("pgd", 0.0), ("", 1.0), ("pgd", float("nan"))])
def test_a_training_attack_needs_name_and_strength(name, start):
    with pytest.raises(ValueError, match="needs a name and start above 0"):
        TrainingAttack(name=name, attack=IFGSM, start=start)


def test_loss_weighs_clean_and_adversarial_alike():
    clean, adversarial = torch.tensor([[-2.0], [1.0]]), torch.tensor([[0.5]])
    expected = (
        torch.nn.functional.binary_cross_entropy_with_logits(clean, torch.zeros(2, 1))
        + torch.nn.functional.binary_cross_entropy_with_logits(adversarial, torch.ones(1, 1))
    ) / 2
    torch.testing.assert_close(detection_loss(clean, adversarial), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"role": "judge"}, "role of discriminator 'd' must be 'attacked' or 'held_out', got 'judge'"),
        ({"n_levels": 0}, "n_levels of discriminator 'd' must be at least 1, got 0"),
        ({"gamma": 1.5}, "gamma in"),
        ({"start": 0.0}, "start above 0"),
        ({"n_rounds": 1}, "n_rounds 1 of discriminator 'd' need a round_attack, got none"),
        (
            {"n_rounds": 1, "round_attack": Attack(SumReg(), SignStep())},
            "round_attack of discriminator 'd' needs a step: give one to SignStep",
        ),
        (
            {"n_rounds": 1, "round_attack": Attack(SumReg(), PGDStep(), projection=Linf())},
            "round_attack of discriminator 'd' needs a radius: give one to Linf",
        ),
        ({"attack": Attack(SumReg(), SignStep())}, "must be vanilla, got the objective SumReg"),
        ({"attack": Attack(NeighReg(), SignStep())}, "must be vanilla, got the objective NeighReg"),
        ({"attack": Attack(Vanilla(), SignStep(), targeted=True)}, "by itself, it is targeted"),
        ({"attack": Attack(Vanilla(), UniversalStep())}, "by itself, it couples the series of a batch"),
        ({"round_attack": Attack(SumReg(), SignStep(0.1))}, "is for rounds: give n_rounds of at least 1, got 0"),
        ({"n_rounds": 1, "round_attack": Attack(Vanilla(), SignStep(0.1))}, "must hide from detectors, got Vanilla"),
        ({"n_rounds": 1, "round_attack": Attack(SumReg(0.0), SignStep(0.1))}, "must hide from detectors, got SumReg"),
        (
            {"n_rounds": 1, "round_attack": Attack(SumReg(), SignStep(0.1), targeted=True)},
            "round_attack of discriminator 'd' must be untargeted and attack each series by itself, it is targeted",
        ),
        ({"attack": Attack(Vanilla(), SignStep(0.1), projection=Linf())}, "which the step must follow"),
        (
            {"mixture": [TrainingAttack(name="sum", attack=Attack(SumReg(), SignStep()), start=0.1)]},
            "attack 'sum' of discriminator 'd' must be vanilla",
        ),
    ],
)
def test_wrong_plans_end_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        plan_of(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": [0.1, 0.0]}, "steps of attack 'a' must be above 0"),
        ({"radii": [0.1]}, "radii of attack 'a' need a projection, it has none"),
        ({"alphas": [0.1]}, "alphas of attack 'a': Vanilla has no alpha"),
        ({}, "attack 'a' needs a step: give steps, or one to SignStep"),
        ({"steps": [0.1, 0.1]}, "steps must differ from each other"),
        (
            {"attack": Attack(Vanilla(), PGDStep(), projection=Linf(0.1)), "steps": [0.1]},
            "takes its step from the radius",
        ),
        ({"attack": Attack(Vanilla(), PGDStep(), projection=Linf())}, "attack 'a' needs a radius: give radii"),
        ({"attack": Attack(Vanilla(), SignStep(0.1), keep="best")}, "must be untargeted, keep its last iterate"),
        ({"attack": Attack(Vanilla(), SignStep(0.1), targeted=True)}, "must be untargeted"),
        ({"attack": Attack(HarmonicReg(coupling="batch"), SignStep(0.1))}, "not couple the series of a batch"),
    ],
)
def test_wrong_grids_end_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        AttackPlan(**{"name": "a", "family": "ifgsm", "attack": IFGSM} | settings)


def test_a_ball_takes_radii():
    plan = AttackPlan(name="a", family="pgd", attack=Attack(Vanilla(), PGDStep(), projection=Linf()), radii=[0.1])
    assert plan.radii == (0.1,)
