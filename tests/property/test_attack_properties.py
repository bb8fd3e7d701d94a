"""Laws of the attack suite over random series, radii and strengths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_modules.attacks import (
    APGD,
    L1,
    L2,
    AdamStep,
    Attack,
    Bounds,
    HarmonicReg,
    HyperCone,
    Linf,
    Momentum,
    NormSum,
    PGDStep,
    SignStep,
    SquareSearch,
    SumReg,
    Vanilla,
    ZNormManifold,
)
from lightning_modules.attacks.gradients import unit, unit_l1
from lightning_modules.attacks.series_noise import SeriesNoise

T, C = 9, 2
FEW = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 1)
radii = st.floats(1e-3, 3.0)


def batch(seed, n_series=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_series, T, C, generator=generator)
    y = torch.randint(0, 2, (n_series,), generator=generator)
    mask = torch.rand(n_series, T, generator=generator) < 0.8
    mask[:, 0] = True
    return x, y, mask


class Perceptron(nn.Sequential):
    """One hidden layer on all values, padded ones read as 0."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(T * C, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, series, mask=None):
        return super().forward(series if mask is None else series * mask[..., None])


def net(seed):
    generator = torch.Generator().manual_seed(seed)
    network = Perceptron()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return network


VICTIM, DETECTOR = net(1), net(2)


@pytest.mark.parametrize("ball", [Linf, L2, L1])
@given(seed=seeds, radius=radii, relative=st.booleans(), start=st.booleans())
@FEW
def test_attacks_stay_in_their_ball_and_off_the_padding(ball, seed, radius, relative, start):
    """T5, for every norm, absolute and relative, with and without a random start."""
    x, y, mask = batch(seed)
    projection = ball(radius, relative=relative)
    for stepper in (PGDStep(), Momentum(0.5), APGD(), AdamStep(0.1)):
        attack = Attack(SumReg(0.5), stepper, projection=projection, n_steps=4, random_start=start)
        result = attack(VICTIM, x, y, detectors=[DETECTOR], mask=mask, generator=seed, keep_iterates=True)
        delta = result.iterates - x
        assert (delta.transpose(0, 1)[~mask[:, None].expand(-1, 5, -1)] == 0).all()
        norms = torch.linalg.vector_norm(delta.flatten(2), ord=projection.order, dim=2)
        allowed = projection.radii(x, mask).flatten()
        # float32: x + delta rounds at 3e-7 for values below 4, added up over 18 positions by l1
        assert (norms <= allowed * (1 + 1e-6) + 6e-6).all()


@given(seed=seeds, radius=radii, scale=st.floats(0.01, 100.0))
@FEW
def test_projection_is_idempotent_never_lengthens_and_keeps_what_is_inside(seed, radius, scale):
    x, _, _ = batch(seed)
    for projection in (Linf(radius), L2(radius), L1(radius)):
        limits = projection.radii(x, None)
        once = projection.project(x * scale, limits)
        # a second pass may shorten by one rounding of the norm, 18 positions
        torch.testing.assert_close(projection.project(once, limits), once, rtol=1e-5, atol=0)
        assert (projection.norm(once) <= projection.norm(x * scale) * (1 + 1e-6)).all()
        inside = x * (0.5 * limits / projection.norm(x))
        assert torch.equal(projection.project(inside, limits), inside)


@given(seed=seeds, radius=st.floats(0.01, 1.0), low=st.floats(-6.0, -4.5), high=st.floats(4.5, 6.0))
@FEW
def test_bounds_and_ball_hold_together(seed, radius, low, high):
    x, y, _ = batch(seed)
    x = x.clamp(-4.5, 4.5)
    attack = Attack(Vanilla(), Momentum(0.9), projection=Linf(radius), constraints=[Bounds(low, high)], n_steps=5)
    found = attack(VICTIM, x, y).x_adv
    assert (found >= low - 1e-6).all()  # float32 rounding of the last projection
    assert (found <= high + 1e-6).all()
    assert (found - x).abs().max() <= radius + 1e-6


@given(seed=seeds, radius=st.floats(0.01, 1.0))
@FEW
def test_z_norm_manifold_keeps_the_statistics_of_any_series_inside_any_ball(seed, radius):
    x, y, mask = batch(seed)
    mask[:, :4] = True
    x = x * 3 + 5
    attack = Attack(Vanilla(), PGDStep(), projection=Linf(radius), constraints=[ZNormManifold()], n_steps=4)
    found = attack(VICTIM, x, y, mask=mask).x_adv
    for row in range(len(x)):
        before, after = x[row][mask[row]].double(), found[row][mask[row]].double()
        # float32 rounding of values near 10: 5e-7 a position
        torch.testing.assert_close(after.mean(dim=0), before.mean(dim=0), rtol=0, atol=2e-6)
        torch.testing.assert_close(after.std(dim=0), before.std(dim=0), rtol=0, atol=2e-6)
    assert (found - x).abs().max() <= radius + 2e-6
    assert (found != x).any()


@given(seed=seeds, alpha=st.floats(0.0, 10.0), other=st.floats(0.0, 10.0))
@FEW
def test_strengths_of_a_batch_are_those_of_its_series(seed, alpha, other):
    """A grid laid along the batch: every series keeps its own alpha, radius and step."""
    x, y, _ = batch(seed, n_series=2)
    x, victim, detector = x.double(), net(1).double(), net(2).double()
    alphas, steps = torch.tensor([alpha, other], dtype=torch.float64), torch.tensor([0.02, 0.1], dtype=torch.float64)
    attack = Attack(NormSum(), SignStep(), projection=Linf(), n_steps=4)
    both = attack(victim, x, y, detectors=[detector], alpha=alphas, step=steps, radius=2 * steps)
    for row in range(2):
        one = slice(row, row + 1)
        alone = attack(
            victim,
            x[one],
            y[one],
            detectors=[detector],
            alpha=float(alphas[row]),
            step=float(steps[row]),
            radius=2 * float(steps[row]),
        )
        torch.testing.assert_close(both.x_adv[one], alone.x_adv, rtol=0, atol=1e-12)  # float64, other batch shape


@given(seed=seeds)
@FEW
def test_alpha_zero_is_vanilla_for_any_series(seed):
    x, y, mask = batch(seed)
    vanilla = Attack(Vanilla(), SignStep(0.1), n_steps=5)(VICTIM, x, y, mask=mask)
    summed = Attack(SumReg(0.0), SignStep(0.1), n_steps=5)(VICTIM, x, y, detectors=[DETECTOR], mask=mask)
    tensor = Attack(SumReg(), SignStep(0.1), n_steps=5)(
        VICTIM, x, y, detectors=[DETECTOR], mask=mask, alpha=torch.zeros(4)
    )
    for other in (summed, tensor):
        assert torch.equal(other.x_adv, vanilla.x_adv)
        assert torch.equal(other.logits, vanilla.logits)


@given(seed=seeds)
@FEW
def test_harmonic_value_lies_between_zero_and_twice_the_smaller_loss(seed):
    x, y, _ = batch(seed)
    harmonic = Attack(HarmonicReg(), SignStep(0.1), n_steps=1)(VICTIM, x, y, detectors=[DETECTOR])
    logits, hiding = harmonic.logits[..., 0], harmonic.detector_logits[:, 0]
    class_loss = torch.nn.functional.softplus((1 - 2 * y) * logits)
    smaller = torch.minimum(class_loss, torch.nn.functional.softplus(-hiding))
    assert (harmonic.values >= 0).all()
    assert (harmonic.values <= 2 * smaller * (1 + 1e-6)).all()  # float32 rounding


@given(seed=seeds, exponent=st.integers(-38, 30))
@FEW
def test_unit_vectors_have_length_one_at_any_scale(seed, exponent):
    x, _, _ = batch(seed)
    x[0] = 0
    scaled = x * 10.0**exponent
    for found, order in ((unit(scaled), 2), (unit_l1(scaled), 1)):
        norms = torch.linalg.vector_norm(found.flatten(1), ord=order, dim=1)
        assert norms[0] == 0
        # near 1e-38 float32 keeps a few digits only, but the length is made from the same digits
        torch.testing.assert_close(norms[1:], torch.ones(3), rtol=1e-5, atol=0)


@given(seed=st.integers(0, 2**62 - 1), rows=st.permutations(range(6)))
@FEW
def test_noise_belongs_to_the_series(seed, rows):
    index = torch.tensor([3, 1, 4, 15, 9, 2**41])
    order = torch.tensor(rows)
    one, other = SeriesNoise(index, seed, torch.float32), SeriesNoise(index[order], seed, torch.float32)
    for _ in range(2):
        for drawn, again in (
            (one.normal(5, 2), other.normal(5, 2)),
            (one.signs(7), other.signs(7)),
            (one.integers(torch.arange(1, 7), 3), other.integers(torch.arange(1, 7)[order], 3)),
        ):
            assert torch.equal(drawn[order], again)
    assert not torch.equal(one.uniform(8)[0], one.uniform(8)[0])  # another draw, other numbers
    assert (one.integers(5, 1000) < 5).all()


def test_noise_has_the_moments_of_its_distribution():
    noise = SeriesNoise(torch.arange(200), 11, torch.float64)
    uniform, normal, signs = noise.uniform(1000), noise.normal(1000), noise.signs(1000)
    # five standard errors of means of 200,000 draws, and of squares for the second moments
    n = 200_000**0.5
    assert abs(uniform.mean() - 0.5) < 5 * 0.289 / n
    assert abs(uniform.var() - 1 / 12) < 5 * 0.075 / n
    assert abs(normal.mean()) < 5 / n
    assert abs(normal.var() - 1) < 5 * 1.42 / n
    assert abs(signs.mean()) < 5 / n
    assert (signs.abs() == 1).all()
    rows = torch.corrcoef(normal)
    rows.fill_diagonal_(0)
    assert rows.abs().max() < 6 / 1000**0.5  # 19,900 pairs of series, each independent


@given(seed=seeds, radius=radii)
@FEW
def test_search_and_cone_compose_with_every_ball_they_accept(seed, radius):
    x, y, _ = batch(seed)
    square = Attack(SumReg(0.3), SquareSearch(), projection=Linf(radius), n_steps=6)
    result = square(VICTIM, x, y, detectors=[DETECTOR], generator=seed)
    assert (result.values.diff(dim=0) >= 0).all()
    cone = Attack(HyperCone(theta=0.5), PGDStep("unit"), projection=L2(radius), n_steps=6)
    assert cone(VICTIM, x, y, detectors=[DETECTOR]).values is None
