"""Every row of objectives times every algorithm, without a class of its own."""

import inspect

import pytest
import torch
from torch import nn

from lightning_modules.attacks import (
    APGD,
    L1,
    L2,
    AdamStep,
    Attack,
    DiscOnly,
    HarmonicReg,
    HyperCone,
    Linf,
    Momentum,
    NeighReg,
    Nesterov,
    Noise,
    NormSum,
    Objective,
    PGDStep,
    SignStep,
    SimBA,
    SmoothMax,
    SquareSearch,
    Stepper,
    SumReg,
    UniversalStep,
    Vanilla,
    ZNormManifold,
)

B, T, C = 4, 16, 2
RADIUS = 0.2
OBJECTIVES = {kind.__name__: kind for kind in (DiscOnly, HarmonicReg, HyperCone, NeighReg, NormSum, SmoothMax, SumReg)}
OBJECTIVES["Vanilla"] = Vanilla
STEPPERS = {
    "APGD": APGD,
    "AdamStep": lambda: AdamStep(0.05, nu=0.1, lam=0.1),
    "Momentum": lambda: Momentum(0.05),
    "Nesterov": lambda: Nesterov(0.05),
    "Noise": lambda: Noise(0.05),
    "PGDStep": PGDStep,
    "SignStep": lambda: SignStep(0.05),
    "SimBA": lambda: SimBA(0.15),
    "SquareSearch": SquareSearch,
    "UniversalStep": lambda: UniversalStep(0.05),
}
COMPARING = [name for name, make in STEPPERS.items() if make().uses_values]


def network(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Conv1d(T, 6, 1), nn.BatchNorm1d(6), nn.Tanh(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(6 * C, 1)
        return nn.Sequential(*layers)


@pytest.fixture
def series():
    return torch.randn(B, T, C, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 1, 0])


def kinds(base):
    """All concrete classes of the package below a base."""
    for kind in base.__subclasses__():
        if not inspect.isabstract(kind) and kind.__module__.startswith("lightning_modules."):
            yield kind.__name__
        yield from kinds(kind)


def test_the_product_is_whole():
    assert set(OBJECTIVES) == set(kinds(Objective))
    assert set(STEPPERS) == set(kinds(Stepper))


@pytest.mark.parametrize("stepper", STEPPERS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_runs_with_every_stepper(series, objective, stepper):
    x, y = series
    victim, detector = network(2), network(3)
    before = [{name: value.clone() for name, value in one.state_dict().items()} for one in (victim, detector)]
    attack = Attack(OBJECTIVES[objective](), STEPPERS[stepper](), projection=Linf(RADIUS), n_steps=3)
    result = attack(victim, x, y, detectors=[detector], generator=5, keep_iterates=True)
    assert result.x_adv.isfinite().all()
    assert (result.x_adv != x).any(dim=(1, 2)).any()
    # float32 rounding of x + delta, below 4
    assert (result.iterates - x).abs().max() <= RADIUS + 1e-6
    assert (result.n_bad_gradients == 0).all()
    if attack.has_values:
        assert result.values.shape == (4, B)
        assert result.values.isfinite().all()
    else:
        assert result.values is None
    for one, state in zip((victim, detector), before, strict=True):
        assert one.training
        assert all(parameter.requires_grad and parameter.grad is None for parameter in one.parameters())
        assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("stepper", [name for name in STEPPERS if STEPPERS[name]().ball is None])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_runs_without_a_ball(series, objective, stepper):
    attack = Attack(OBJECTIVES[objective](), STEPPERS[stepper](), n_steps=2)
    assert attack(network(2), *series, detectors=[network(3)], generator=5).x_adv.isfinite().all()


def test_rules_for_gradients_are_compared_by_the_sum_of_both_losses(series):
    """Against the formula: margin of one logit and ``softplus(-g)``."""
    x, y = series
    for objective, alpha in ((NormSum(0.7), 0.7), (HyperCone(), 1.0), (NormSum(0.0), 0.0)):
        attack = Attack(objective, SimBA(0.3), n_steps=4)
        result = attack(network(2).double(), x.double(), y, detectors=[network(3).double()], generator=0)
        class_loss = (1 - 2 * y) * result.logits[..., 0]
        expected = class_loss + alpha * (1 + (-result.detector_logits[:, 0]).exp()).log()
        # float64 rounding of sums of order 1
        torch.testing.assert_close(result.values, expected, rtol=0, atol=1e-12)
    targeted = Attack(NormSum(0.7), SimBA(0.3), n_steps=4, targeted=True)
    result = targeted(network(2).double(), x.double(), y, detectors=[network(3).double()], generator=0)
    expected = -(1 - 2 * y) * result.logits[..., 0] + 0.7 * (1 + (-result.detector_logits[:, 0]).exp()).log()
    torch.testing.assert_close(result.values, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("objective", [NormSum, HyperCone])
def test_searches_climb_what_they_compare_and_best_is_the_highest(series, objective):
    x, y = series
    for stepper in (SimBA(0.3), SquareSearch()):
        attack = Attack(objective(), stepper, projection=Linf(0.3), n_steps=12)
        values = attack(network(2), x, y, detectors=[network(3)], generator=0).values
        assert (values.diff(dim=0) >= 0).all()
        assert (values[-1] > values[0]).any()
    for stepper in (APGD(), Noise(0.3)):
        best = Attack(objective(), stepper, projection=Linf(0.3), n_steps=8, keep="best")
        result = best(network(2), x, y, detectors=[network(3)], generator=1, keep_iterates=True)
        assert torch.equal(result.chosen, result.values.argmax(dim=0))
        assert torch.equal(result.x_adv, result.iterates[result.chosen, torch.arange(B)])


@pytest.mark.parametrize("objective", [NormSum, HyperCone])
def test_keeping_the_best_changes_no_step_of_a_rule_for_gradients(series, objective):
    """Values are looked at, not climbed: the iterates are those of the run that has none."""
    x, y = series
    runs = {}
    for keep in ("last", "best"):
        attack = Attack(objective(), PGDStep("unit"), projection=L2(1.0), n_steps=4, keep=keep)
        runs[keep] = attack(network(2), x, y, detectors=[network(3)], keep_iterates=True)
    assert torch.equal(runs["last"].iterates, runs["best"].iterates)
    assert runs["last"].values is None
    assert runs["last"].n_gradients == runs["best"].n_gradients == 4


def starts_anywhere(stepper):
    """Whether it may begin at a random point of each series' own."""
    return not stepper.starts_itself and not isinstance(stepper, UniversalStep)


BALLS = [(name, ball) for name, make in STEPPERS.items() for ball in (Linf(0.3), None) if ball or make().ball is None]


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize(("stepper", "ball"), BALLS)
def test_a_series_of_weight_zero_stays_clean_to_the_last_bit(series, stepper, ball, random_start):
    x, y = series
    x[1, :2] = -0.0
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0])
    made = STEPPERS[stepper]()
    begins = random_start and bool(ball) and starts_anywhere(made)
    kept = {"projection": ball, "n_steps": 4, "random_start": begins}
    constraints = [ZNormManifold()] if random_start or ball is None else []
    attack = Attack(Vanilla(), made, constraints=constraints, **kept)
    result = attack(network(2), x, y, weights=weights, generator=3, keep_iterates=True)
    for iterate in (*result.iterates[:, 1], result.x_adv[1]):
        assert torch.equal(iterate, x[1])
        assert torch.equal(iterate.signbit(), x[1].signbit())
    assert torch.equal(result.logits[:, 1], result.logits[:1, 1].expand(5, 1))
    assert torch.equal(result.logits[0, 1], attack(network(2), x, y, generator=3, weights=0 * weights).logits[0, 1])
    assert (result.x_adv[[0, 2, 3]] != x[[0, 2, 3]]).any(dim=(1, 2)).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stepper", [*STEPPERS, "gaussian"])
def test_every_stepper_runs_in_half_precision(series, stepper, dtype):
    made = Noise(0.05, kind="gaussian") if stepper == "gaussian" else STEPPERS[stepper]()
    x, y = series[0].to(dtype), series[1]
    for ball in (L1(1.0), L2(1.0), Linf(0.3)):
        if isinstance(ball, made.ball or object):
            attack = Attack(Vanilla(), made, projection=ball, n_steps=3, random_start=starts_anywhere(made))
            assert attack(network(2).to(dtype), x, y, generator=0).x_adv.isfinite().all()


@pytest.mark.parametrize("stepper", COMPARING)
def test_a_weight_of_zero_compares_the_classifier_alone(series, stepper):
    x, y = series
    kept = {"projection": Linf(0.3), "n_steps": 5}
    vanilla = Attack(Vanilla(), STEPPERS[stepper](), **kept)(network(2), x, y, generator=3)
    joined = Attack(NormSum(0.0), STEPPERS[stepper](), **kept)(network(2), x, y, detectors=[network(3)], generator=3)
    # APGD follows the sign of the unit gradient here: a quotient rounds, but never to the other sign
    assert torch.equal(joined.x_adv, vanilla.x_adv)
    assert torch.equal(joined.values, vanilla.values)
