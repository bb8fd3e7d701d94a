"""Objectives against formulas written out here, and their gradients against finite differences in float64."""

import math

import pytest
import torch
from torch import nn

from lightning_modules.attacks import (
    Attack,
    DiscOnly,
    HarmonicReg,
    HyperCone,
    Linf,
    NeighReg,
    NormSum,
    SignStep,
    SmoothMax,
    SumReg,
    Vanilla,
    neighbour_roughness,
)

B, T, C = 4, 7, 2


def smooth_net(n_logits, seed):
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(T * C, 5), nn.Tanh(), nn.Linear(5, n_logits)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.6, generator=generator)
    return net


@pytest.fixture
def series():
    generator = torch.Generator().manual_seed(9)
    return torch.randn(B, T, C, generator=generator, dtype=torch.float64)


class Seen:
    """A stepper's view of one step: the direction and the value at the start."""


def first_step(objective, victim, detectors, x, y, **call):
    """Value and direction at ``x``, read from a stepper that records them and stays."""
    seen = Seen()

    class Recorder(SignStep):
        def start(self, run):
            def advance(point, evaluation):
                seen.value, seen.direction = evaluation.objective_value, evaluation.climb
                return point, None

            return advance

    Attack(objective, Recorder(1.0), n_steps=1)(victim, x, y, detectors=detectors, **call)
    return seen


SCALAR = {
    "vanilla_margin": Vanilla(),
    "vanilla_cross_entropy": Vanilla(class_loss="cross_entropy"),
    "vanilla_dlr": Vanilla(class_loss="dlr"),
    "sum": SumReg(0.7, class_loss="cross_entropy"),
    "sum_hidden": SumReg(0.7, detector_loss="hidden"),
    "sum_margin": SumReg(0.7, detector_loss="margin", kappa=-9.0),
    "sum_worst": SumReg(0.7, aggregate="worst"),
    "sum_soft": SumReg(0.7, aggregate="soft_worst", softness=2.0),
    "sum_calibrated": SumReg(0.7, victim_scale=3.0, detector_scale=(0.5, 2.0)),
    "harmonic": HarmonicReg(),
    "harmonic_batch": HarmonicReg(coupling="batch"),
    "smooth_max": SmoothMax(b=3.0),
    "smooth_min": SmoothMax(b=-3.0),
    "disc_only": DiscOnly(),
}


@pytest.mark.parametrize("n_logits", [1, 3])
@pytest.mark.parametrize("name", SCALAR)
def test_directions_are_the_gradients_of_the_values(series, name, n_logits):
    victim, detectors = smooth_net(n_logits, 1), [smooth_net(1, 2), smooth_net(1, 3)]
    y = torch.tensor([0, 1, 1, 0])
    objective = SCALAR[name]

    def total(x):
        return first_step(objective, victim, detectors, x, y).value.sum()

    found, h = first_step(objective, victim, detectors, series, y).direction, 1e-5
    expected = torch.zeros_like(series)
    for position in range(series.numel()):
        bump = torch.zeros(series.numel(), dtype=torch.float64)
        bump[position] = h
        bump = bump.reshape(series.shape)
        expected.view(-1)[position] = (total(series + bump) - total(series - bump)) / (2 * h)
    # central differences: h^2 times a third derivative of order 1 to 10, plus 1e-16 / h
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=5e-9)
    assert found.abs().max() > 1e-3


def test_neigh_reg_with_its_neighbours_held_fixed(series):
    victim, y, alpha = smooth_net(1, 1), torch.tensor([0, 1, 1, 0]), 0.8
    found = first_step(NeighReg(alpha), victim, [], series, y)
    fixed = (series[:, :-2] + series[:, 2:]) / 2

    def total(x):
        margin = ((1 - 2 * y) * victim(x)[:, 0]).sum()
        return margin - alpha * (x[:, 1:-1] - fixed).square().sum()

    x = series.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(x), x)
    torch.testing.assert_close(found.direction, expected, rtol=0, atol=1e-13)  # float64 rounding
    bump = torch.zeros_like(series)
    bump[2, 3, 1] = 1e-5
    with torch.no_grad():
        difference = (total(series + bump) - total(series - bump)) / 2e-5
    # central difference, as above
    assert found.direction[2, 3, 1].item() == pytest.approx(difference.item(), rel=1e-6)


def test_values_by_their_formulas(series):
    victim, detectors = smooth_net(1, 1), [smooth_net(1, 2), smooth_net(1, 3)]
    y = torch.tensor([0, 1, 1, 0])
    with torch.no_grad():
        z = victim(series)[:, 0]
        probabilities = torch.stack([torch.sigmoid(g(series)[:, 0]) for g in detectors])
    for b in range(B):
        p = torch.sigmoid(z[b]).item()
        loss = -math.log(p if y[b] == 1 else 1 - p)
        hiding = sum(-math.log(d) for d in probabilities[:, b].tolist()) / 2
        expected = {
            "vanilla_cross_entropy": loss,
            "sum": loss + 0.7 * hiding,
            "harmonic": 2 * loss * hiding / (loss + hiding + 1e-4),
            "smooth_max": (math.exp(3 * loss) * loss + math.exp(3 * hiding) * hiding)
            / (math.exp(3 * loss) + math.exp(3 * hiding)),
            "disc_only": hiding,
            "sum_hidden": (1 - 2 * y[b].item()) * z[b].item()
            + 0.7 * sum(math.log(1 - d) for d in probabilities[:, b].tolist()) / 2,
        }
        for name, value in expected.items():
            found = first_step(SCALAR[name], victim, detectors, series, y).value[b].item()
            assert found == pytest.approx(value, rel=1e-12), name  # float64 rounding


def test_harmonic_weights_and_batch_coupling(series):
    """Section 4: the gradient is ``2 L_d^2 g_c + 2 L_c^2 g_d`` over ``(L_c + L_d)^2`` as e goes to 0."""
    victim, detector = smooth_net(1, 1), smooth_net(1, 2)
    y = torch.tensor([0, 1, 1, 0])
    parts = {
        name: first_step(objective, victim, [detector], series, y)
        for name, objective in (
            ("class", Vanilla(class_loss="cross_entropy")),
            ("hide", DiscOnly()),
            ("sample", HarmonicReg()),
            ("batch", HarmonicReg(coupling="batch")),
        )
    }
    for name in ("sample", "batch"):
        lc, ld = parts["class"].value, parts["hide"].value
        if name == "batch":
            lc, ld = lc.mean().expand(B), ld.mean().expand(B)
        weight_c, weight_d = 2 * ld**2 / (lc + ld) ** 2, 2 * lc**2 / (lc + ld) ** 2
        share = 1.0 if name == "sample" else 1 / B
        expected = share * (
            weight_c[:, None, None] * parts["class"].direction + weight_d[:, None, None] * parts["hide"].direction
        )
        # e = 1e-4 beside losses above 0.01
        torch.testing.assert_close(parts[name].direction, expected, rtol=0.05, atol=1e-4)


def test_sum_with_sign_steps_does_not_depend_on_the_reduction(series):
    victim, detector = smooth_net(1, 1), smooth_net(1, 2)
    y = torch.tensor([0, 1, 1, 0])
    attack = Attack(SumReg(0.7), SignStep(0.05), projection=Linf(0.3), n_steps=8)
    together = attack(victim, series, y, detectors=[detector]).x_adv
    averaged = attack(victim, series, y, detectors=[detector], weights=torch.full((B,), 1 / B).double()).x_adv
    assert torch.equal(together, averaged)


# one sample, three positions: directions with angles known by hand
AXES = {
    "parallel": ([2.0, 0, 0], [5.0, 0, 0]),
    "orthogonal": ([2.0, 0, 0], [0, 5.0, 0]),
    "opposite": ([2.0, 0, 0], [-5.0, 0, 0]),
    "no detector gradient": ([2.0, 0, 0], [0, 0, 0]),
    "no class gradient": ([0, 0, 0], [0, 5.0, 0]),
    "oblique": ([2.0, 2.0, 0], [0, 0, 3.0]),
    "tiny": ([2e-40, 0, 0], [0, 5e-30, 0]),
}


def rows(pair):
    return [torch.tensor(vector, dtype=torch.float64)[None, :, None] for vector in AXES[pair]]


ROOT = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("pair", "alpha", "expected"),
    [
        ("parallel", 0.5, [1.5, 0, 0]),
        ("orthogonal", 0.5, [1, 0.5, 0]),
        ("opposite", 0.5, [0.5, 0, 0]),
        ("opposite", 1.0, [0, 0, 0]),
        ("no detector gradient", 0.5, [1, 0, 0]),
        ("no class gradient", 0.5, [0, 0.5, 0]),
        ("oblique", 2.0, [ROOT, ROOT, 2]),
        ("tiny", 1.0, [1, 1, 0]),
    ],
)
def test_norm_sum_closed_form(pair, alpha, expected):
    found = NormSum().combine(*rows(pair), torch.tensor([alpha], dtype=torch.float64))
    # float64 rounding
    torch.testing.assert_close(found[0, :, 0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("pair", "theta", "expected"),
    [
        ("parallel", 0.3, [2, 0, 0]),
        ("parallel", 0.0, [2, 0, 0]),
        # phi = pi/2: |g| cos(pi/2 - theta) (cos(theta) a^ + sin(theta) e^)
        ("orthogonal", math.pi / 6, [2 * 0.25, 2 * 0.5 * math.cos(math.pi / 6), 0]),
        ("orthogonal", math.pi / 2, [2, 0, 0]),
        ("orthogonal", 0.0, [0, 0, 0]),
        ("opposite", 0.3, [0, 0, 0]),
        ("no detector gradient", 0.3, [2, 0, 0]),
        ("no class gradient", 0.3, [0, 0, 0]),
        ("oblique", math.pi / 4, [1, 1, math.sqrt(2)]),
        ("tiny", math.pi / 4, [1e-40, 1e-40, 0]),
    ],
)
def test_hyper_cone_closed_form(pair, theta, expected):
    found = HyperCone(theta=theta).combine(*rows(pair), None)[0, :, 0]
    # float64 rounding, of cos(pi / 2) too, relative to the size of the class gradient
    size = 1e-40 if pair == "tiny" else 1.0
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15 * size)


def test_no_point_of_the_cone_is_nearer():
    """Section 4, by a search over the half-plane in which the nearest point must lie, and over random directions."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        g, a = torch.randn(2, 1, 6, 1, generator=generator, dtype=torch.float64)
        theta = float(torch.rand((), generator=generator)) * math.pi / 2
        found = HyperCone(theta=theta).combine(g[None, 0], a[None, 0], None)
        axis = a / a.norm()
        cosine = (found * axis).sum() / found.norm().clamp(min=1e-300)
        assert found.norm() == 0 or cosine >= math.cos(theta) - 1e-12  # inside, up to rounding
        rays = torch.randn(20000, 6, 1, generator=generator, dtype=torch.float64) + 2 * axis
        rays = rays / rays.norm(dim=1, keepdim=True)
        rays = rays[(rays * axis).sum(dim=(1, 2)) >= math.cos(theta)]
        if len(rays):
            nearest = (rays * g).sum(dim=(1, 2)).clamp(min=0)[:, None, None] * rays
            assert (nearest - g).norm(dim=(1, 2)).min() >= (found - g).norm() - 1e-12


def test_hyper_cone_with_theta_zero_survives_float32_saturation():
    g = torch.tensor([1e-35, 0.0, 0.0])[None, :, None]
    a = torch.tensor([1e-30, 1e-30, 0.0])[None, :, None]
    found = HyperCone(theta=0.0).combine(g, a, None)[0, :, 0]
    # float32 rounding of 1e-35 / 2
    torch.testing.assert_close(found, torch.tensor([5e-36, 5e-36, 0.0]), rtol=1e-5, atol=1e-40)


def test_neighbour_roughness_by_loops(series):
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 4:] = False
    found, masked = neighbour_roughness(series), neighbour_roughness(series, mask)
    for b in range(B):
        for valid, value in ((T, found[b]), (4 if b == 1 else T, masked[b])):
            expected = sum(
                (series[b, t, c] - (series[b, t - 1, c] + series[b, t + 1, c]) / 2) ** 2
                for t in range(1, valid - 1)
                for c in range(C)
            )
            assert value.item() == pytest.approx(float(expected), rel=1e-12)  # float64 rounding
    assert neighbour_roughness(series[:, :2]).tolist() == [0.0] * B


def test_published_and_hidden_forms_have_the_stated_gradients():
    """Section 3: ``-(1 - D) / M`` and ``-D / M`` with respect to each logit."""
    logits = torch.tensor([[-2.0, 0.5], [3.0, -1.0]], dtype=torch.float64, requires_grad=True)
    probability = torch.sigmoid(logits).detach()
    for form, expected in (("published", -(1 - probability) / 2), ("hidden", -probability / 2)):
        loss = DiscOnly(detector_loss=form).detector_losses(logits).sum()
        (slope,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(slope, expected, rtol=0, atol=1e-15)  # float64 rounding
    kinked = DiscOnly(detector_loss="margin", kappa=1.0).detector_losses(logits)
    assert kinked.tolist() == [-1.0, 0.0]
