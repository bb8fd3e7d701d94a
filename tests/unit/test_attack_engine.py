import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_modules.attacks import (
    APGD,
    L1,
    L2,
    AdamStep,
    Attack,
    Bounds,
    DiscOnly,
    Frozen,
    HarmonicReg,
    HyperCone,
    Linf,
    LowPass,
    Momentum,
    Nesterov,
    Noise,
    NormSum,
    PGDStep,
    SignStep,
    SimBA,
    SmoothMax,
    SquareSearch,
    SumReg,
    UniversalStep,
    Vanilla,
    Victim,
    ZNormManifold,
    decisions,
    frozen_networks,
    grid_points,
    run_grid,
)
from lightning_modules.attacks.frozen_networks import pass_rows
from lightning_modules.attacks.series_noise import SeriesNoise
from lightning_modules.networks import LSTM, S4, PatchTST, ResCNN, RNNAttention

B, T, C = 6, 24, 2


class Net(nn.Module):
    """Convolution, batch normalisation, dropout."""

    def __init__(self, n_logits=1, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv, self.norm, self.head = nn.Conv1d(C, 8, 3), nn.BatchNorm1d(8), nn.Linear(8, n_logits)
            self.norm.running_mean.normal_()
        self.dropout = nn.Dropout(0.5)

    def forward(self, series):
        hidden = torch.tanh(self.norm(self.conv(series.transpose(1, 2)))).mean(dim=-1)
        return self.head(self.dropout(hidden))


class Masked(Net):
    """Takes a mask, and reads 0 at padded steps."""

    def forward(self, series, mask=None):
        return super().forward(series if mask is None else series * mask[..., None])


class MaskedMean(nn.Module):
    """Tanh features, averaged over the valid steps alone."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.features, self.head = nn.Linear(C, 8), nn.Linear(8, 1)

    def forward(self, series, mask=None):
        hidden = torch.tanh(2 * self.features(series))
        kept = torch.ones_like(series[..., 0]) if mask is None else mask.to(series.dtype)
        return self.head((hidden * kept[..., None]).sum(1) / kept.sum(1, keepdim=True))


class Linear(nn.Module):
    """``scale * (w . x) + bias``, the simplest victim with a known gradient."""

    def __init__(self, weight, bias=0.0, scale=1.0):
        super().__init__()
        self.weight, self.bias, self.scale = nn.Parameter(weight), bias, scale

    def forward(self, series):
        return self.scale * ((series * self.weight).sum(dim=(1, 2)) + self.bias)[:, None]


@pytest.fixture
def series():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, T, C, generator=generator)
    return x, torch.tensor([0, 1, 1, 0, 1, 0])


def found_state(network):
    return {
        "flags": [module.training for module in network.modules()],
        "grads": [parameter.requires_grad for parameter in network.parameters()],
        "grad": [None if parameter.grad is None else parameter.grad.clone() for parameter in network.parameters()],
        "buffers": [buffer.clone() for buffer in network.buffers()],
        "parameters": [parameter.detach().clone() for parameter in network.parameters()],
    }


def same(left, right):
    for name, values in left.items():
        for one, other in zip(values, right[name], strict=True):
            if not (torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other):
                return False
    return True


class Faulty(Net):
    """Fails at its third call, after writing what an evaluation must not write."""

    def __init__(self):
        super().__init__(seed=3)
        self.register_buffer("n_calls", torch.zeros(()))

    def forward(self, series):
        self.n_calls += 1
        if self.n_calls >= 3:
            raise KeyError("third call")
        return super().forward(series)


def test_a_buffer_that_the_forward_fills_is_emptied_again(series):
    class Caching(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("cache", None)

        def forward(self, batch):
            self.cache = batch.detach().mean()
            return super().forward(batch)

    network = Caching()
    Attack(Vanilla(), SignStep(0.1), n_steps=2)(network, *series)
    assert network.cache is None


def mixed(network):
    """Some of everything that has to come back."""
    network.train()
    network.norm.eval()
    network.conv.weight.requires_grad_(False)
    network.head.weight.grad = torch.ones_like(network.head.weight)
    return network


def test_three_lines_without_lightning(series):
    x, y = series
    attack = Attack(SumReg(0.1), SignStep(0.05), projection=Linf(0.2), n_steps=5)
    result = attack(Net(), x, y, detectors=[Net(seed=1), Net(seed=2)])
    assert result.x_adv.shape == x.shape
    assert result.logits.shape == (6, B, 1)
    assert result.detector_logits.shape == (6, 2, B)
    assert result.values.shape == (6, B)
    assert result.n_gradients == 5
    assert not result.x_adv.requires_grad


def test_networks_are_left_as_found(series):
    x, y = series
    victim, detector = mixed(Net()), mixed(Net(seed=1))
    before = [found_state(victim), found_state(detector)]
    Attack(SumReg(0.1), SignStep(0.05), n_steps=3)(victim, x, y, detectors=[detector])
    assert same(before[0], found_state(victim))
    assert same(before[1], found_state(detector))


def test_networks_are_left_as_found_after_an_exception(series):
    x, y = series
    victim, detector = mixed(Net()), mixed(Faulty())
    before = [found_state(victim), found_state(detector)]
    with pytest.raises(KeyError, match="third call"):
        Attack(SumReg(0.1), SignStep(0.05), n_steps=5)(victim, x, y, detectors=[detector])
    assert same(before[0], found_state(victim))
    assert same(before[1], found_state(detector))  # also the counter it wrote to in evaluation mode


def test_train_mode_does_not_reach_the_attack(series):
    """T4: dropout and batch statistics of train mode would change every step."""
    x, y = series
    attack = Attack(Vanilla(), SignStep(0.05), n_steps=4)
    assert torch.equal(attack(Net().train(), x, y).x_adv, attack(Net().eval(), x, y).x_adv)


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode])
def test_works_where_the_caller_has_switched_autograd_off(series, outer):
    x, y = series
    attack, victim, detector = Attack(SumReg(0.5), SignStep(0.05), n_steps=3), Net(), Net(seed=1)
    expected = attack(victim, x, y, detectors=[detector]).x_adv
    with outer():
        inside = attack(victim, x.clone(), y.clone(), detectors=[detector]).x_adv
    assert torch.equal(inside, expected)


def test_clean_series_and_labels_are_not_modified(series):
    x, y = series

    def rude(batch):
        with torch.no_grad():
            logits = batch.sum(dim=(1, 2), keepdim=True)[..., 0]
        batch.detach().mul_(0.5)
        return logits

    before = x.clone()
    Attack(Vanilla(), SquareSearch(), projection=Linf(0.2), n_steps=3)(rude, x, y)
    assert torch.equal(x, before)


def test_alpha_zero_equals_vanilla_bit_for_bit(series):
    x, y = series
    x[0, :3] = -0.0  # adding a zero of the other sign would show

    def unbounded(batch):  # gradient infinite at once
        return (batch.sum(dim=(1, 2)) * 0).sqrt()[:, None] + batch.sum(dim=(1, 2))[:, None]

    for detectors in ([Net(seed=1)], [Net(seed=1), unbounded]):
        vanilla = Attack(Vanilla(), SignStep(0.05), n_steps=5)(Net(), x, y, detectors=detectors)
        for zero in (0.0, torch.zeros(B)) if len(detectors) == 1 else (0.0,):
            summed = Attack(SumReg(0.3), SignStep(0.05), n_steps=5)(Net(), x, y, detectors=detectors, alpha=zero)
            assert torch.equal(summed.x_adv, vanilla.x_adv)
            assert torch.equal(summed.x_adv.signbit(), vanilla.x_adv.signbit())
            assert torch.equal(summed.logits, vanilla.logits)
            assert torch.equal(summed.detector_logits, vanilla.detector_logits)


def test_identical_detectors_equal_one(series):
    x, y = series
    attack = Attack(SumReg(0.5), SignStep(0.05), n_steps=5)
    one = attack(Net(), x, y, detectors=[Net(seed=1)])
    two = attack(Net(), x, y, detectors=[Net(seed=1), Net(seed=1)])
    assert torch.equal(one.x_adv, two.x_adv)
    assert torch.equal(two.detector_logits[:, 0], two.detector_logits[:, 1])
    for aggregate in ("worst", "soft_worst"):
        attack = Attack(SumReg(0.5, aggregate=aggregate), SignStep(0.05), n_steps=5)
        # log(exp(L) + exp(L)) - log 2 rounds otherwise than L: the gradient's sign may turn where it is almost 0
        moved = attack(Net(), x, y, detectors=[Net(seed=1)] * 3).x_adv != one.x_adv
        assert moved.double().mean() < 0.01


ALGORITHMS = {
    "ifgsm": lambda: Attack(SumReg(0.3), SignStep(0.05), n_steps=4),
    "pgd": lambda: Attack(HarmonicReg(), PGDStep(), projection=Linf(0.2), n_steps=4, random_start=True),
    "l2": lambda: Attack(NormSum(), PGDStep("unit"), projection=L2(1.0), n_steps=4, random_start=True),
    "cone": lambda: Attack(HyperCone(), Momentum(0.05), n_steps=4),
    "nesterov": lambda: Attack(SumReg(0.3), Nesterov(0.05), n_steps=4),
    "apgd": lambda: Attack(SumReg(0.3), APGD(), projection=Linf(0.2), n_steps=12, keep="best"),
    "sgm": lambda: Attack(SumReg(0.3), AdamStep(nu=0.1, lam=0.1), n_steps=4),
    "simba": lambda: Attack(SumReg(0.3), SimBA(0.3, "one"), n_steps=4),
    "square": lambda: Attack(SumReg(0.3), SquareSearch(), projection=Linf(0.2), n_steps=4),
    "noise": lambda: Attack(Vanilla(), Noise(0.05, "gaussian"), n_steps=4),
    "znorm": lambda: Attack(SumReg(0.3), PGDStep(), projection=Linf(0.2), constraints=[ZNormManifold()], n_steps=4),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_order_and_batch_size_do_not_matter(series, name):
    """T2, T4: the series and its number decide, not its place."""
    x, y = series[0].double(), series[1]
    victim, detectors, attack = Net().double(), [Net(seed=1).double()], ALGORITHMS[name]()
    whole = attack(victim, x, y, detectors=detectors, generator=7)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    shuffled = attack(victim, x[order], y[order], detectors=detectors, index=order, generator=7)
    # float64 matrix products of other batch shapes differ by some 1e-16; no gradient is that small here
    close = {"rtol": 0, "atol": 1e-10}
    torch.testing.assert_close(shuffled.x_adv, whole.x_adv[order], **close)
    torch.testing.assert_close(shuffled.logits, whole.logits[:, order], **close)
    for size in (1, 4):
        parts = attack(victim, x, y, detectors=detectors, generator=7, batch_size=size)
        torch.testing.assert_close(parts.x_adv, whole.x_adv, **close)
        torch.testing.assert_close(parts.detector_logits, whole.detector_logits, **close)
        assert torch.equal(parts.chosen, whole.chosen)


class Watched(Net):
    """Notes how many series each pass has, and how many of them a backward."""

    def __init__(self, seed=0):
        super().__init__(seed=seed)
        self.forwards, self.backwards = [], []

    def forward(self, series):
        self.forwards.append(len(series))
        logits = super().forward(series)
        if logits.requires_grad:
            logits.register_hook(lambda slope: self.backwards.append(len(slope)))
        return logits


def test_a_cpu_gets_equal_parts_that_fit_its_caches(monkeypatch):
    assert pass_rows(torch.zeros(256, 301, 1)) == 128
    assert pass_rows(torch.zeros(257, 301, 1)) == 129
    assert pass_rows(torch.zeros(300, 301, 1), most=50) == 50
    assert pass_rows(torch.zeros(3, 100_000, 1)) == 1
    assert pass_rows(torch.zeros(0, 5, 1)) == 1
    assert pass_rows(torch.zeros(256, 301, 1, device="meta")) == 256
    monkeypatch.setattr(frozen_networks, "CPU_PASS_STEPS", 4 * T)
    x, y = torch.randn(6, T, C, generator=torch.Generator().manual_seed(4)), torch.tensor([0, 1, 1, 0, 1, 0])
    network = Watched()
    attack = Attack(Vanilla(), PGDStep(), projection=Linf(0.2), n_steps=2)
    whole = attack(network, x, y, batch_size=6)
    assert set(network.forwards) == {6}
    network.forwards.clear()
    parts = attack(network, x, y)
    assert network.forwards == [3] * 6, "two parts, of two steps and a last look each"
    torch.testing.assert_close(parts.x_adv, whole.x_adv)
    network.forwards.clear()
    Attack(Vanilla(), SquareSearch(), projection=Linf(0.2), n_steps=2)(network, x, y)
    assert set(network.forwards) == {3}, "no gradient, no coupling"


def seeded(network, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return network(n_channels=1, n_classes=2, n_steps=60, **settings).eval()


VICTIMS = {
    "linear": lambda: Linear(torch.randn(60, 1, generator=torch.Generator().manual_seed(3))),
    "lstm": lambda: seeded(LSTM, hidden_size=8),
    "s4": lambda: seeded(S4, d_model=8),
    "patch_tst": lambda: seeded(PatchTST, d_model=16, d_feedforward=16),
    "res_cnn": lambda: seeded(ResCNN, n_filters=4),
    "rnn_attention": lambda: seeded(RNNAttention, hidden_size=8),
}


@pytest.mark.parametrize("name", VICTIMS)
def test_sign_step_is_bitwise_the_same_alone_and_in_a_batch(name):
    """T4 on the CPU, in float32, for every network of the package."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(64, 60, 1, generator=generator)
    y = (torch.rand(64, generator=generator) > 0.5).long()
    victim, attack = VICTIMS[name](), Attack(Vanilla(), SignStep(0.03), projection=Linf(0.1), n_steps=4)
    whole = attack(victim, x, y, batch_size=64).x_adv
    assert (whole != x).any(dim=(1, 2)).all()
    alone = torch.cat([attack(victim, x[row : row + 1], y[row : row + 1]).x_adv for row in range(16)])
    assert torch.equal(whole[:16], alone)


def test_duplicate_in_the_batch_changes_no_step(series):
    """T13: norms run over a series, not over the batch."""
    x, y = series
    for objective in (NormSum(0.7), HyperCone()):
        attack = Attack(objective, PGDStep("unit"), projection=L2(2.0), n_steps=3)
        twice = attack(
            Net().double(), torch.cat([x, x]).double(), torch.cat([y, y]), detectors=[Net(seed=1).double()]
        ).x_adv
        once = attack(Net().double(), x.double(), y, detectors=[Net(seed=1).double()]).x_adv
        # float64 rounding of another batch shape
        torch.testing.assert_close(twice[:B], once, rtol=0, atol=1e-12)
        torch.testing.assert_close(twice[B:], once, rtol=0, atol=1e-12)


def test_saturated_networks_still_give_a_gradient(series):
    """T3: finite at logits of 40 and 200, not zero up to 80."""
    x, y = series
    weight = torch.ones(T, C) / (T * C)
    for level in (40.0, -40.0, 80.0, -80.0, 200.0, -200.0):
        for name in ("cross_entropy", "margin"):
            labels = torch.full_like(y, int(level > 0))
            attack = Attack(SumReg(0.1, class_loss=name), SignStep(0.01), n_steps=2)
            detector = Linear(weight, bias=-level)
            result = attack(Linear(weight, bias=level), x, labels, detectors=[detector])
            assert result.x_adv.isfinite().all()
            assert (result.n_bad_gradients == 0).all()
            if abs(level) <= 80 or name == "margin":
                assert (result.n_zero_gradients == 0).all()
                assert (result.x_adv != x).all()


@pytest.mark.parametrize("factor", [5.0, 20.0, 100.0])
def test_confident_victims_fall_to_the_margin_alike(series, factor):
    x, y = series

    class Scaled(Net):
        def forward(self, batch):
            return factor * super().forward(batch)

    attack = Attack(Vanilla(), PGDStep(), projection=Linf(0.5), n_steps=20)
    plain, confident = attack(Net(), x, y), attack(Scaled(), x, y)
    assert torch.equal(decisions(plain.logits), decisions(confident.logits))
    # the factor rounds the float32 gradient: signs may turn where it is almost 0
    assert (plain.x_adv != confident.x_adv).double().mean() < 0.01


def test_calibrated_sum_is_free_of_scale_and_the_published_form_is_not(series):
    x, y = series
    victim, detector = Net().eval(), Net(seed=1)

    def confident(batch):
        return 100 * victim(batch)

    attack = Attack(SumReg(1.0).calibrated(victim, [detector], x), SignStep(0.02), n_steps=10)
    scaled = Attack(SumReg(1.0).calibrated(confident, [detector], x), SignStep(0.02), n_steps=10)
    assert scaled.objective.victim_scale == pytest.approx(100 * attack.objective.victim_scale)
    one, other = attack(victim, x, y, detectors=[detector]), scaled(confident, x, y, detectors=[detector])
    # float32 rounding of the factor turns signs of gradients that are almost 0
    assert (one.x_adv != other.x_adv).double().mean() < 0.01
    published = Attack(SumReg(1.0, class_loss="cross_entropy"), SignStep(0.02), n_steps=10)
    one, other = (published(network, x, y, detectors=[detector]).x_adv for network in (victim, confident))
    assert (one != other).double().mean() > 0.05


def test_disc_only_lowers_the_detector_with_the_analytic_sign(series):
    """T9."""
    x, y = series
    weight = torch.randn(T, C, generator=torch.Generator().manual_seed(3))
    detector = Linear(weight)
    result = Attack(DiscOnly(), SignStep(0.02), n_steps=5)(Net(), x, y, detectors=[detector])
    # five float32 additions of 0.02 to numbers below 4
    torch.testing.assert_close(result.x_adv, x - 0.1 * weight.sign(), rtol=0, atol=2e-6)
    scores = torch.sigmoid(result.detector_logits[:, 0])
    assert (scores.diff(dim=0) < 0).all()


def test_detector_logits_stay_with_their_detector(series):
    """T10: constant detectors of logit 0 and 1; neither is taken for a probability."""
    x, y = series
    constants = [lambda batch: torch.zeros(len(batch), 1), lambda batch: torch.ones(len(batch), 1)]
    result = Attack(SumReg(0.1), SignStep(0.02), n_steps=2)(Net(), x, y, detectors=constants)
    assert (result.detector_logits[:, 0] == 0).all()
    assert (result.detector_logits[:, 1] == 1).all()


def test_fgsm_moves_every_value_by_the_step(series):
    x, y = series
    result = Attack(Vanilla(), SignStep(0.125), n_steps=1)(Net(), x, y)
    # float32 sums of T*C numbers near 0.125, themselves rounded by the addition to x
    torch.testing.assert_close(
        (result.x_adv - x).abs().sum(dim=(1, 2)), torch.full((B,), T * C * 0.125), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("projection", [Linf(0.2), L2(0.8), Linf(0.3, relative=True)])
@pytest.mark.parametrize("constraints", [(), (Bounds(-9.0, 9.0), Frozen([(3, 6)])), (ZNormManifold(),)])
def test_every_iterate_lies_in_the_ball_about_the_clean_series(series, projection, constraints):
    """T5."""
    x, y = series
    attack = Attack(SumReg(0.3), Momentum(0.15), projection=projection, constraints=constraints, n_steps=8)
    result = attack(Net(), x, y, detectors=[Net(seed=1)], keep_iterates=True)
    radius = projection.radii(x, None).flatten()
    for iterate in result.iterates:
        delta = (iterate - x).flatten(1)
        # float32 rounding of x + delta, below 1e-6 a position, root of 48 positions for l2
        assert (torch.linalg.vector_norm(delta, ord=projection.order, dim=1) <= radius + 1e-6).all()


def test_step_of_pgd_follows_the_radius(series):
    """T11."""
    x, y = series
    attack = Attack(Vanilla(), PGDStep(), projection=Linf(0.4), n_steps=10)
    for radius in (0.4, 0.1):
        result = attack(Net(), x, y, radius=radius, keep_iterates=True)
        first = (result.iterates[1] - x).abs()
        # float32 rounding of x + step
        torch.testing.assert_close(first, torch.full_like(first, 2.5 * radius / 10), rtol=0, atol=1e-6)


def test_padded_steps_and_frozen_segments_never_change(series):
    x, y = series
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 10:], mask[3, 5:] = False, False
    attack = Attack(
        SumReg(0.3), AdamStep(0.05, nu=0.1, lam=0.1), projection=L2(1.0), constraints=[Frozen([(1, 3)])], n_steps=4
    )
    result = attack(Masked(), x, y, detectors=[Masked(seed=1)], mask=mask, keep_iterates=True, generator=0)
    assert all(torch.equal(iterate[~mask], x[~mask]) for iterate in result.iterates)
    assert all(torch.equal(iterate[:, 1:3], x[:, 1:3]) for iterate in result.iterates)
    assert (result.x_adv[0, 3:10] != x[0, 3:10]).all()


@pytest.mark.parametrize("kind", [L1, L2, Linf])
@pytest.mark.parametrize("relative", [False, True])
def test_padding_that_is_not_finite_does_not_open_the_ball(series, kind, relative):
    x, y = series
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 10:], mask[3, 5:] = False, False
    attack = Attack(Vanilla(), PGDStep(), projection=kind(0.2, relative=relative), n_steps=3)
    finite = x.masked_fill(~mask[..., None], 0.0)
    expected = attack(Masked(), finite, y, mask=mask, keep_iterates=True)
    for filler in (torch.nan, torch.inf):
        padded = x.masked_fill(~mask[..., None], filler)
        found = attack(Masked(), padded, y, mask=mask, keep_iterates=True)
        assert torch.equal(found.x_adv[mask], expected.x_adv[mask])
        assert torch.equal(found.logits, expected.logits)
        for iterate in (found.x_adv, *found.iterates):
            assert torch.equal(iterate[~mask].nan_to_num(), padded[~mask].nan_to_num())


def test_mask_reaches_networks_that_take_one(series):
    x, y = series
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[:, 12:] = False
    seen = []

    def masked(batch, mask=None):
        seen.append(mask)
        return (batch * mask[..., None]).sum(dim=(1, 2))[:, None]

    Attack(Vanilla(), SignStep(0.1), n_steps=1)(masked, x, y, mask=mask)
    assert len(seen) == 2
    assert all(torch.equal(one, mask) for one in seen)


def test_padded_series_and_a_network_without_mask_end_in_one_line(series):
    x, y = series
    mask = torch.ones(B, T, dtype=torch.bool)
    attack = Attack(SumReg(0.1), SignStep(0.1), n_steps=1)
    whole = attack(Net(), x, y, detectors=[Net(seed=1)], mask=mask)
    assert torch.equal(whole.x_adv, attack(Net(), x, y, detectors=[Net(seed=1)]).x_adv), "an all-true mask says nothing"
    mask[4:, 20:] = False
    cases = [
        ("classifier Watched", Watched(), None, Masked(seed=1)),
        ("surrogate Watched", Masked(), Watched(), Masked(seed=1)),
        ("detector Watched", Masked(), None, Watched(seed=1)),
        ("classifier Victim", Victim(nn.Sequential(nn.Flatten(), nn.Linear(T * C, 1))), None, Masked(seed=1)),
        ("classifier <lambda>", lambda batch: batch.sum(dim=(1, 2))[:, None], None, Masked(seed=1)),
    ]
    for name, victim, surrogate, detector in cases:
        message = f"the {name} takes no mask, and 2 of 6 series are padded: give series of one length, or a network"
        with pytest.raises(ValueError, match=message) as caught:
            attack(victim, x, y, surrogate=surrogate, detectors=[detector], mask=mask, batch_size=2)
        assert "\n" not in str(caught.value)
        assert not any(network.forwards for network in (victim, surrogate, detector) if isinstance(network, Watched))
    for network in (Net(), Victim(Net())):
        with pytest.raises(ValueError, match=r"the network (Net|Victim) takes no mask, and 2 of 6 series are padded"):
            frozen_networks.logits_of(network, x, mask, batch_size=4)
        with pytest.raises(ValueError, match="takes no mask, and 2 of 6 series are padded"):
            frozen_networks.call(network, x, mask)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("kind", ["export", "script"])
def test_padded_series_and_a_program_without_mask_end_in_one_line(series, kind):
    x, y = series
    network = nn.Sequential(nn.Flatten(), nn.Linear(T * C, 1)).eval()
    if kind == "export":
        sizes = ({0: torch.export.Dim("batch", min=1)},)
        victim = Victim(torch.export.export(network, (x,), dynamic_shapes=sizes).module())
    else:
        victim = Victim(torch.jit.script(network))
    attack, mask = Attack(Vanilla(), SignStep(0.1), n_steps=1), torch.ones(B, T, dtype=torch.bool)
    assert attack(victim, x, y, mask=mask).x_adv.isfinite().all()
    mask[0, 9:] = False
    with pytest.raises(ValueError, match="the classifier Victim takes no mask, and 1 of 6 series are padded"):
        attack(victim, x, y, mask=mask)


@pytest.mark.parametrize("wrap", [lambda network: network, Victim])
@pytest.mark.parametrize("kind", [Net, Masked])
def test_the_mask_is_read_before_the_loop_and_not_in_it(series, monkeypatch, wrap, kind):
    """On a GPU every look at its values would wait for the device."""
    x, y = series
    n_looks, everything = [], torch.Tensor.all

    def watched(*arguments, **named):
        n_looks[-1] += 1
        return everything(*arguments, **named)

    monkeypatch.setattr(torch.Tensor, "all", watched)
    for n_steps in (2, 9):
        n_looks.append(0)
        Attack(Vanilla(), SignStep(0.1), n_steps=n_steps)(wrap(kind()), x, y, mask=torch.ones(B, T, dtype=torch.bool))
    assert n_looks[0] == n_looks[1] > 0


def test_low_pass_removes_high_frequencies(series):
    x, y = series
    attack = Attack(Vanilla(), SignStep(0.1), constraints=[LowPass(0.2)], projection=L2(1.0), n_steps=5)
    spectrum = torch.fft.rfft(attack(Net(), x, y).x_adv - x, dim=1).abs()
    high = torch.fft.rfftfreq(T) > 0.2
    assert spectrum[:, high].max() < 1e-5  # float32 rounding of x + delta, summed over 24 steps
    assert spectrum[:, ~high].amax() > 0.1


HELD = {
    "bounds, frozen": [Bounds(-9.0, 9.0), Frozen([(3, 6)])],
    "frozen, bounds": [Frozen([(3, 6)]), Bounds(-9.0, 9.0)],
    "low-pass": [LowPass(0.2)],
    "low-pass, tight bounds": [LowPass(0.2), Bounds(-3.0, 3.0)],
    "frozen, low-pass": [Frozen([(3, 6)]), LowPass(0.3)],
    "low-pass, frozen, tight bounds": [LowPass(0.3), Frozen([(3, 6)]), Bounds(-3.0, 3.0)],
    "frozen, z-norm": [Frozen([(3, 6)]), ZNormManifold()],
    "z-norm, frozen": [ZNormManifold(), Frozen([(3, 6)])],
}


@pytest.mark.parametrize("projection", [None, Linf(0.3), L2(1.0), L1(3.0)], ids=["none", "linf", "l2", "l1"])
@pytest.mark.parametrize("name", HELD)
def test_all_constraints_and_the_ball_hold_at_once(series, name, projection):
    x, y = series
    x = x.double().clamp(-2.9, 2.9)
    attack = Attack(Vanilla(), SignStep(0.2), constraints=HELD[name], projection=projection, n_steps=6)
    victim = Net().double()
    delta = attack(victim, x, y, keep_iterates=True).iterates - x
    assert delta[-1].abs().amax(dim=(1, 2)).min() > 1e-3, "it does attack"
    if projection is not None:
        size = torch.linalg.vector_norm(delta, ord=projection.order, dim=(2, 3))
        assert size.max() <= projection.radius * (1 + 1e-12)
    for constraint in HELD[name]:
        if isinstance(constraint, Frozen):
            assert not bool(delta[:, :, 3:6].any())
        elif isinstance(constraint, Bounds):
            values = x + delta
            assert constraint.low <= values.min()
            assert values.max() <= constraint.high
        elif isinstance(constraint, LowPass):
            spectrum = torch.fft.rfft(delta, dim=2)
            above = torch.linalg.vector_norm(spectrum[:, :, torch.fft.rfftfreq(T) > constraint.cutoff], dim=2)
            # frozen steps are put back by a digit of 1e-7, values outside the bounds by their last digits
            least = 2e-3 if "bounds" in name else 1e-6
            assert bool((above <= least * torch.linalg.vector_norm(spectrum, dim=2)).all())
        else:
            moved = x + delta
            torch.testing.assert_close(moved.mean(2), x.mean(1).expand_as(moved.mean(2)), rtol=0, atol=1e-9)
            torch.testing.assert_close(moved.std(2), x.std(1).expand_as(moved.std(2)), rtol=0, atol=1e-9)


def test_low_frequencies_move_series_that_touch_their_bounds():
    """Scaled to 0..1 every series touches both: shortening as a whole would leave nothing to move."""
    walk = torch.randn(8, 60, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(dim=1)
    low, high = walk.amin(dim=1, keepdim=True), walk.amax(dim=1, keepdim=True)
    x, labels = (walk - low) / (high - low), torch.zeros(8, dtype=torch.int64)

    def victim(series):
        return (series * torch.linspace(-1, 1, 60, dtype=series.dtype)[:, None]).sum(dim=(1, 2))[:, None] - 1

    kept = {"projection": Linf(0.1), "n_steps": 20}
    attack = Attack(Vanilla(), SignStep(0.01), constraints=[LowPass(0.1), Bounds(0.0, 1.0)], **kept)
    moved = attack(victim, x, labels).x_adv
    assert bool(((moved >= 0) & (moved <= 1)).all())
    assert (moved - x).abs().max() <= 0.1 + 1e-12
    assert (moved - x).abs().amax(dim=(1, 2)).min() > 0.03
    above = torch.fft.rfft(moved - x, dim=1)[:, torch.fft.rfftfreq(60) > 0.1]
    assert above.abs().max() < 2e-3 * torch.linalg.vector_norm(torch.fft.rfft(moved - x, dim=1))
    free = Attack(Vanilla(), SignStep(0.01), constraints=[Bounds(0.0, 1.0)], **kept)(victim, x, labels).x_adv
    won, most = ((victim(one) - victim(x)).mean() for one in (moved, free))
    assert 0.3 * most < won < most


def test_an_attack_that_nothing_lets_move_is_refused():
    x, labels = torch.randn(2, 40, 1), torch.zeros(2, dtype=torch.int64)
    attack = Attack(Vanilla(), SignStep(0.1), constraints=[LowPass(0.1), Frozen([(0, 10)])], n_steps=2)
    with pytest.raises(ValueError, match=r"LowPass\(0\.1\) keeps 9 terms, and none .* at the 10 frozen steps"):
        attack(lambda series: series.sum(dim=(1, 2))[:, None], x, labels)


@pytest.mark.parametrize("mask", [False, True])
def test_low_pass_reads_the_device_no_oftener_in_a_longer_run(series, monkeypatch, mask):
    x, y = series
    counts, truth = [], torch.Tensor.__bool__

    def counted(tensor):
        counts[-1] += 1
        return truth(tensor)

    monkeypatch.setattr(torch.Tensor, "__bool__", counted)
    for n_steps in (5, 50):
        counts.append(0)
        attack = Attack(Vanilla(), SignStep(0.1), constraints=[LowPass(0.2)], projection=L2(1.0), n_steps=n_steps)
        attack(Net(), x, y, mask=torch.ones(B, T, dtype=torch.bool) if mask else None)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("constraints", [[ZNormManifold(), Bounds(-9.0, 9.0)], [LowPass(0.2), ZNormManifold()]])
def test_constraints_that_undo_each_other_are_refused(constraints):
    with pytest.raises(ValueError, match=r"constraints ZNormManifold and .* undo each other: give one of them"):
        Attack(Vanilla(), SignStep(0.1), constraints=constraints)


@pytest.mark.parametrize("constraint", [Frozen([(4, T)]), LowPass(0.1)])
def test_the_ball_is_not_spent_on_what_a_constraint_drops(constraint):
    """One long step on a linear victim reaches what the set allows: its gradient in the set, at the radius."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, T, C, generator=generator, dtype=torch.float64)
    weight = torch.randn(T, C, generator=generator, dtype=torch.float64)

    def victim(series):
        return (series * weight).sum(dim=(1, 2)).unsqueeze(1)

    slope = weight.clone()
    if isinstance(constraint, Frozen):
        slope[4:] = 0
    else:
        kept = torch.fft.rfftfreq(T) <= 0.1
        slope = torch.fft.irfft(torch.fft.rfft(weight, dim=0) * kept[:, None], n=T, dim=0)
    attack = Attack(
        Vanilla(), PGDStep("unit", relative_step=5.0), projection=L2(1.0), constraints=[constraint], n_steps=1
    )
    y = torch.zeros(3, dtype=torch.int64)
    gain = victim(attack(victim, x, y).x_adv) - victim(x)
    torch.testing.assert_close(gain[:, 0], slope.norm().expand(3), rtol=1e-9, atol=0)


def test_low_pass_works_in_half_precision(series):
    x, y = series
    net = Net().to(torch.bfloat16)
    attack = Attack(Vanilla(), SignStep(0.1), constraints=[LowPass(0.2)], projection=L2(1.0), n_steps=2)
    assert attack(net, x.to(torch.bfloat16), y).x_adv.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["square", "l2", "l1", "simba"])
def test_what_is_drawn_does_not_depend_on_how_far_a_series_is_padded(series, kind):
    x, y = series
    make = {
        "square": lambda: Attack(Vanilla(), SquareSearch(), projection=Linf(0.3), n_steps=20),
        "simba": lambda: Attack(Vanilla(), SimBA(0.3), n_steps=20),
        "l2": lambda: Attack(Vanilla(), PGDStep(), projection=L2(1.0), n_steps=1, random_start=True),
        "l1": lambda: Attack(Vanilla(), PGDStep(), projection=L1(1.0), n_steps=1, random_start=True),
    }
    wide = torch.nn.functional.pad(x, (0, 0, 0, 5 * T))
    mask = (torch.arange(6 * T) < T).expand(B, -1)
    found = make[kind]()(MaskedMean(), wide, y, mask=mask, generator=3, keep_iterates=True).iterates
    assert torch.equal(found[:, :, T:], wide[:, T:].expand_as(found[:, :, T:]))
    expected = make[kind]()(MaskedMean(), x, y, generator=3, keep_iterates=True).iterates
    # float32 sums over T steps, and over as many zeros more
    torch.testing.assert_close(found[:, :, :T], expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(expected[-1], x)


def test_z_norm_manifold_keeps_mean_and_deviation(series):
    x, y = series
    x = (x - x.mean(dim=1, keepdim=True)) / x.std(dim=1, keepdim=True)
    for projection in (None, Linf(0.2), L2(1.0)):
        stepper = SignStep(0.05)
        result = Attack(Vanilla(), stepper, projection=projection, constraints=[ZNormManifold()], n_steps=10)(
            Net(), x, y, keep_iterates=True
        )
        for iterate in result.iterates:
            # below 1e-6, which trap T7 calls the rounding of the archive
            assert iterate.double().mean(dim=1).abs().max() < 1e-6
            assert (iterate.double().std(dim=1) - 1).abs().max() < 1e-6
        assert (result.x_adv - x).abs().max() > 0.1


def test_stop_returns_the_iterate_of_that_number(series):
    x, y = series
    attack = Attack(SumReg(0.3), SignStep(0.05), n_steps=6)
    whole = attack(Net(), x, y, detectors=[Net(seed=1)], keep_iterates=True)
    numbers = torch.tensor([0, 6, 3, 1, 2, 5])
    stopped = attack(Net(), x, y, detectors=[Net(seed=1)], stop=numbers)
    assert torch.equal(stopped.x_adv, whole.iterates[numbers, torch.arange(B)])
    assert torch.equal(stopped.chosen, numbers)
    assert torch.equal(stopped.logits, whole.logits)
    assert torch.equal(attack(Net(), x, y, detectors=[Net(seed=1)], stop=2).x_adv, whole.iterates[2])


def test_best_iterate_has_the_highest_value(series):
    x, y = series
    attack = Attack(Vanilla(), Noise(0.3), n_steps=8, keep="best")
    result = attack(Net(), x, y, generator=1, keep_iterates=True)
    assert torch.equal(result.chosen, result.values.argmax(dim=0))
    assert torch.equal(result.x_adv, result.iterates[result.chosen, torch.arange(B)])
    assert len(result.chosen.unique()) > 1


@pytest.mark.parametrize("stepper", [SignStep(0.05), Momentum(0.05), AdamStep(0.05), SimBA(0.2)])
def test_iterates_of_an_unprojected_run_are_the_ends_of_shorter_ones(series, stepper):
    x, y = series
    long = Attack(SumReg(0.3), stepper, n_steps=6)(Net(), x, y, detectors=[Net(seed=1)], generator=4)
    short = Attack(SumReg(0.3), stepper, n_steps=4)(Net(), x, y, detectors=[Net(seed=1)], generator=4)
    assert torch.equal(long.logits[:5], short.logits)
    assert torch.equal(long.detector_logits[:5], short.detector_logits)


@pytest.mark.parametrize("max_rows", [5, 1000])
def test_grid_equals_its_configurations_one_by_one(series, max_rows):
    x, y = series[0].double(), series[1]
    victim, detectors = Net().double(), [Net(seed=1).double()]
    attack = Attack(SumReg(), PGDStep(), projection=Linf(), n_steps=4, random_start=True)
    points = grid_points(radii=[0.1, 0.4], alphas=[0.0, 1.0], n_restarts=2)
    grid = run_grid(attack, victim, x, y, points, detectors=detectors, max_rows=max_rows, generator=3)
    assert grid.logits.shape == (8, 5, B, 1)
    for number, point in enumerate(points):
        index = torch.arange(B) + point.restart * 2**40
        alone = attack(
            victim, x, y, detectors=detectors, radius=point.radius, alpha=point.alpha, index=index, generator=3
        )
        # float64 rounding of other batch shapes
        torch.testing.assert_close(grid.logits[number], alone.logits, rtol=0, atol=1e-10)
        torch.testing.assert_close(grid.detector_logits[number], alone.detector_logits, rtol=0, atol=1e-10)
    assert not torch.equal(grid.logits[0, 0], grid.logits[1, 0])  # restarts differ


def test_a_grid_takes_no_gradient_of_detectors_for_configurations_without_weight(series):
    victim, detector = Watched(), Watched(seed=1)
    points = grid_points(steps=[0.1, 0.2], alphas=[0.0, 1.0])
    run_grid(Attack(SumReg(), SignStep(), n_steps=1), victim, *series, points, detectors=[detector])
    assert sum(victim.backwards) == 4 * B
    assert sum(detector.backwards) == 2 * B
    assert sum(detector.forwards) == 2 * 4 * B, "both iterates are scored by it all the same"


def test_bad_and_zero_gradients_are_counted(series):
    x, y = series

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, slope):
            slope = slope.clone()
            slope[0, 0], slope[1, 0], slope[2] = torch.nan, torch.inf, 0.0
            return slope

    weight = torch.ones(T, C)
    victim = Linear(weight)
    result = Attack(Vanilla(), SignStep(0.125), n_steps=3)(lambda batch: victim(Broken.apply(batch)), x, y)
    assert result.n_bad_gradients.tolist() == [3, 3, 0, 0, 0, 0]
    assert result.n_zero_gradients.tolist() == [0, 0, 3, 0, 0, 0]
    assert torch.equal(result.x_adv[0, 0], x[0, 0])
    assert torch.equal(result.x_adv[2], x[2])


def test_targeted_attack_reaches_the_class(series):
    x, _ = series
    victim, target = nn.Sequential(nn.Flatten(), nn.Linear(T * C, 4)), torch.tensor([0, 1, 2, 3, 0, 1])
    for name in ("margin", "cross_entropy"):
        attack = Attack(Vanilla(class_loss=name), SignStep(0.1), n_steps=60, targeted=True)
        assert torch.equal(decisions(attack(victim, x, target).logits[-1]), target)


def test_targeted_attacks_refuse_losses_that_do_not_lead_there(series):
    x, y = series
    for objective, message in (
        (Vanilla(class_loss="dlr"), "class_loss 'dlr' is untargeted"),
        (HarmonicReg(), "targeted=True negates the class loss"),
        (SmoothMax(), r"SmoothMax with targeted=True follows the detectors alone, got b 20\.0: take b 0"),
        (SmoothMax("margin", detector_loss="hidden", b=0.5), r"follows the detectors alone, got b 0\.5"),
        (SmoothMax(b=-20.0), r"follows the classifier alone, got b -20\.0"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            Attack(objective, SignStep(0.1), targeted=True)(Net(), x, y, detectors=[Net(seed=1)])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "objective",
    [
        SmoothMax(b=0.0),
        SmoothMax(detector_loss="hidden", b=-20.0),
        SmoothMax(detector_loss="margin", b=-20.0),
        SmoothMax("margin", b=-20.0),
    ],
)
def test_a_targeted_smooth_maximum_that_is_allowed_climbs_both_losses(objective):
    """On a detected series that is not yet in the target class."""
    x, target = torch.zeros(1, T, C), torch.tensor([1])
    weight = torch.zeros(T, C)
    weight[0, 0] = 1.0
    victim, detector = Linear(weight, bias=-0.5), Linear(weight.flip(0), bias=0.5)
    result = Attack(objective, SignStep(0.02), n_steps=100, targeted=True)(victim, x, target, detectors=[detector])
    assert result.logits[-1, 0, 0] > result.logits[0, 0, 0] + 0.1
    assert result.detector_logits[-1, 0, 0] < result.detector_logits[0, 0, 0] - 0.1


@pytest.mark.gpu
def test_recurrent_networks_are_attacked_in_evaluation_mode_on_cuda(series):
    """T4: the backward of cuDNN's recurrent layers refuses evaluation mode."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.LSTM(C, 8, batch_first=True), nn.Linear(8, 1)

        def forward(self, batch):
            return self.head(self.cell(batch)[0][:, -1])

    x, y, network = series[0].cuda(), series[1].cuda(), Recurrent().cuda().eval()
    enabled = torch.backends.cudnn.enabled
    result = Attack(Vanilla(), SignStep(0.1), n_steps=2)(network, x, y)
    assert result.x_adv.isfinite().all()
    assert torch.backends.cudnn.enabled == enabled


def test_surrogate_gives_the_gradients_and_the_victim_the_scores(series):
    x, y = series
    attack, victim, surrogate = Attack(Vanilla(), SignStep(0.05), n_steps=3), Net(), Net(seed=5)
    transferred = attack(victim, x, y, surrogate=surrogate)
    assert torch.equal(transferred.x_adv, attack(surrogate, x, y).x_adv)
    torch.testing.assert_close(
        transferred.logits[-1], victim.eval()(transferred.x_adv).detach(), rtol=0, atol=1e-6
    )  # float32, same pass


def test_weight_zero_leaves_a_series_alone(series):
    x, y = series
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, 1.0])
    weighted = Attack(SumReg(0.3), SignStep(0.05), n_steps=2)(Net(), x, y, detectors=[Net(seed=1)], weights=weights)
    plain = Attack(SumReg(0.3), SignStep(0.05), n_steps=2)(Net(), x, y, detectors=[Net(seed=1)])
    assert torch.equal(weighted.x_adv[1], x[1])
    assert torch.equal(weighted.x_adv[2:], plain.x_adv[2:])


def test_searches_never_go_down_and_universal_steps_are_shared(series):
    x, y = series
    for stepper, projection in ((SimBA(0.3), None), (SquareSearch(), Linf(0.3))):
        values = Attack(Vanilla(), stepper, projection=projection, n_steps=15)(Net(), x, y, generator=0).values
        assert (values.diff(dim=0) >= 0).all()
        assert (values[-1] > values[0]).all()
    result = Attack(Vanilla(), UniversalStep(0.1), projection=Linf(0.2), n_steps=4)(Net(), x, y)
    delta = result.x_adv - x
    torch.testing.assert_close(delta, delta[:1].expand_as(delta), rtol=0, atol=1e-6)  # float32 rounding of x + delta


def written_out_apgd(victim, x0, y, radius, n_steps):
    """Algorithm 1 of arXiv 2003.01690 for one series: its iterates, and how often the step was halved."""

    def value_and_sign(x):
        x = x.clone().requires_grad_()
        value = ((1 - 2 * y) * victim(x)[:, 0]).sum()
        (slope,) = torch.autograd.grad(value, x)
        return value.item(), slope.sign()

    def project(x):
        return x0 + (x - x0).clamp(-radius, radius)

    checkpoints, step, n_halved = APGD.checkpoints(n_steps), 2 * radius, 0
    before, here = x0, x0
    best, best_x, iterates, values = -float("inf"), x0, [], []
    last_checkpoint, best_then, step_then = 0, None, None
    for k in range(n_steps + 1):
        value, sign = value_and_sign(here)
        iterates.append(here)
        values.append(value)
        if value > best:
            best, best_x, best_sign = value, here, sign
        if k in checkpoints:
            window = range(last_checkpoint, k)
            few_rises = sum(values[i + 1] > values[i] for i in window) < 0.75 * len(window)
            if few_rises or (best_then == best and step_then == step):
                here, sign, n_halved = best_x, best_sign, n_halved + 1
                step_then, step = step, step / 2
            else:
                step_then = step
            last_checkpoint, best_then = k, best
        share = 0.75 if k else 1.0
        ahead = project(here + step * sign)
        before, here = here, project(here + share * (ahead - here) + (1 - share) * (here - before))
    return iterates, n_halved


@pytest.mark.parametrize("n_steps", [12, 30, 60])
def test_apgd_is_the_published_algorithm(series, n_steps):
    x, y = series[0].double(), series[1]
    victim, radius = Net(seed=2).double().eval(), 0.8
    attack = Attack(Vanilla(), APGD(), projection=Linf(radius), n_steps=n_steps, keep="best")
    found = attack(victim, x, y, keep_iterates=True)
    n_halved = 0
    for row in range(len(x)):
        expected, halved = written_out_apgd(victim, x[row : row + 1], y[row : row + 1], radius, n_steps)
        n_halved += halved
        torch.testing.assert_close(found.iterates[:, row], torch.cat(expected), rtol=0, atol=1e-12)
    assert n_halved >= 2 * len(x), "checkpoints must bite"


def test_apgd_beats_or_equals_pgd_on_a_curved_victim(series):
    x, y = series
    kept = {"projection": Linf(0.3), "n_steps": 30, "keep": "best"}
    apgd = Attack(Vanilla(), APGD(), **kept)(Net(), x, y).values.amax(dim=0)
    pgd = Attack(Vanilla(), PGDStep(), **kept)(Net(), x, y).values.amax(dim=0)
    assert apgd.mean() >= pgd.mean() - 1e-3  # both near the maximum of a smooth value of order 1
    # the checkpoints of a hundred steps as printed in the reference implementation's schedule
    assert APGD.checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_generator_is_drawn_once_and_only_where_needed(series):
    x, y = series
    state = torch.get_rng_state()
    Attack(Vanilla(), SignStep(0.05), n_steps=2)(Net(), x, y)
    assert torch.equal(state, torch.get_rng_state())
    noise = Attack(Vanilla(), Noise(0.05), n_steps=2)
    draws = [noise(Net(), x, y, generator=torch.Generator().manual_seed(seed)).x_adv for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_noise_of_half_precision_is_that_of_float32_rounded(dtype):
    index = torch.arange(40)
    half, single = SeriesNoise(index, 3, dtype), SeriesNoise(index, 3, torch.float32)
    for draw in ("uniform", "normal", "signs"):
        found, expected = getattr(half, draw)(100, 50), getattr(single, draw)(100, 50)
        assert found.dtype == dtype
        assert torch.equal(found, expected.to(dtype)), draw
    # 200,000 draws: rounded to eleven or to eight bits first, some of them would be the bound
    found = half.integers(37, 100, 50)
    assert torch.equal(found, single.integers(37, 100, 50))
    assert found.max() == 36


GOOD = {"objective": SumReg(0.1), "stepper": SignStep(0.1)}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SumReg(-0.1), r"alpha of SumReg must be finite and at least 0, got -0\.1"),
        (lambda: Vanilla(class_loss="hinge"), "class_loss must be one of .*'margin'.* got 'hinge'"),
        (lambda: SumReg(detector_loss="log"), "detector_loss must be one of .* got 'log'"),
        (lambda: SumReg(victim_scale=0.0), r"victim_scale must be finite and above 0, got 0\.0"),
        (lambda: HarmonicReg(class_loss="margin"), "HarmonicReg needs losses of at least 0"),
        (lambda: HyperCone(theta=2.0), r"theta of HyperCone must lie in 0\.\.pi/2 radians, got 2\.0"),
        (lambda: Linf(0.0), r"radius of Linf must be finite and above 0, got 0\.0"),
        (lambda: SignStep(math.nan), "step of SignStep must be finite and above 0, got nan"),
        (lambda: LowPass(0.7), r"cutoff must lie strictly between 0 and 0\.5 cycles a step, got 0\.7"),
        (lambda: Bounds(1.0, 0.0), r"low must be below high, got low 1\.0 and high 0\.0"),
        (lambda: Frozen([(3, 3)]), r"a frozen segment needs 0 <= start < stop, got \(3, 3\)"),
        (lambda: Attack(Vanilla(), PGDStep()), "PGDStep needs a projection, got None"),
        (
            lambda: Attack(Vanilla(), SquareSearch(), projection=L2(1.0)),
            "SquareSearch needs the projection Linf, got L2",
        ),
        (lambda: Attack(**GOOD, random_start=True), "random_start needs a projection to start inside of, got None"),
        (
            lambda: Attack(Vanilla(), SquareSearch(), projection=Linf(0.1), random_start=True),
            "SquareSearch begins at a random point of its own: leave random_start out",
        ),
        (
            lambda: Attack(Vanilla(), UniversalStep(), projection=Linf(0.1), random_start=True),
            "UniversalStep moves all series alike, from the clean ones: leave random_start out",
        ),
        (lambda: Attack(**GOOD, n_steps=0), "n_steps must be at least 1, got 0"),
    ],
)
def test_parts_that_do_not_fit_end_in_one_line(build, message):
    with pytest.raises(ValueError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(B, T)}, r"x must be floating of shape \(B, T, C\).* got \(6, 24\)"),
        ({"x": torch.full((B, T, C), torch.nan)}, r"x must be finite, got \[nan, nan\] in series 0 at step 0"),
        ({"y": torch.zeros(B)}, r"y must be int64 of shape \(6,\), got \(6,\) torch\.float32"),
        ({"y": np.zeros(B, dtype=np.int64)}, r"y must be a torch\.Tensor, got numpy\.ndarray"),
        ({"x": np.zeros((B, T, C), dtype=np.float32)}, r"x must be a torch\.Tensor, got numpy\.ndarray"),
        ({"mask": np.ones((B, T), dtype=bool)}, r"mask must be a torch\.Tensor, got numpy\.ndarray"),
        ({"y": torch.full((B,), 2)}, r"labels must lie in 0\.\.1 for this classifier, got 2\.\.2"),
        ({"model": Net(3), "y": torch.full((B,), 5)}, r"labels must lie in 0\.\.2 for this classifier, got 5\.\.5"),
        ({"model": Net(3), "y": torch.full((B,), -1)}, r"labels must lie in 0\.\.2 for this classifier, got -1\.\.-1"),
        (
            {"model": Net(3), "surrogate": Net(), "y": torch.full((B,), 2)},
            r"labels must lie in 0\.\.1 for this surrogate, got 2\.\.2",
        ),
        ({"model": Net(3), "surrogate": Net()}, "the surrogate must tell the 3 classes of the classifier, got 2"),
        (
            {"surrogate": lambda batch: torch.full((B, 1), torch.nan)},
            "the surrogate returns a logit that is not finite",
        ),
        ({"surrogate": lambda batch: torch.sigmoid(Net()(batch))}, "the network returns probabilities"),
        ({"detectors": []}, "SumReg hides from detectors: give at least one"),
        ({"detectors": Net()}, "put it into a list"),
        ({"alpha": -1.0}, r"alpha must be finite and at least 0, got -1\.0"),
        ({"alpha": torch.ones(2)}, r"alpha must be a number or one for each of 6 series, got \(2,\)"),
        ({"radius": 0.1}, "radius= needs an attack with a projection"),
        ({"stop": 9}, r"stop must be int64 in 0\.\.2"),
        (
            {"mask": torch.zeros(B, T, dtype=torch.bool)},
            "mask must leave each series a valid step, got none for series 0",
        ),
        (
            {"model": lambda batch: batch},
            r"a classifier must return logits of shape \(6, 1 or n_classes\), got \(6, 24, 2\)",
        ),
        ({"detectors": [Net(n_logits=2)]}, r"a detector must return logits of shape \(6, 1\), got \(6, 2\)"),
        ({"model": lambda batch: torch.full((B, 1), torch.nan)}, "the classifier returns a logit that is not finite"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_arguments_end_in_one_line(series, change, message):
    arguments = {"model": Net(), "x": series[0], "y": series[1], "detectors": [Net(seed=1)], **change}
    with pytest.raises(ValueError, match=message) as caught:
        Attack(SumReg(0.1), SignStep(0.1), n_steps=2)(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ball", [Linf, L2])
def test_strengths_that_are_nowhere_given_end_in_one_line(series, ball):
    message = f"{ball.__name__} has no radius: give one to the projection or to the call"
    for stepper in (PGDStep(), SignStep(0.1)):
        attack = Attack(Vanilla(), stepper, projection=ball(), n_steps=1)
        with pytest.raises(ValueError, match=message) as caught:
            attack(Net(), *series)
        assert "\n" not in str(caught.value)
        assert attack(Net(), *series, radius=0.1).x_adv.isfinite().all()
    with pytest.raises(ValueError, match="SignStep has no step: give one to the stepper or to the call"):
        Attack(Vanilla(), SignStep(), n_steps=1)(Net(), *series)


def test_classifiers_that_return_probabilities_are_refused(series):
    x, y = series
    for bad in (lambda batch: torch.sigmoid(Net()(batch)), lambda batch: torch.softmax(Net(3)(batch), dim=1)):
        with pytest.raises(ValueError, match="the network returns probabilities"):
            Attack(Vanilla(), SignStep(0.1), n_steps=1)(bad, x, y)
    with pytest.raises(ValueError, match="the network returns probabilities"):
        Attack(SumReg(0.1), SignStep(0.1), n_steps=1)(
            Net(), x, y, detectors=[lambda batch: torch.sigmoid(Net(seed=1)(batch))]
        )
