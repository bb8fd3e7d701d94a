"""DeepFool, C&W-L2 and the ensemble with its flags."""

import pytest
import torch
from torch import nn

from lightning_modules.attacks import (
    Attack,
    CarliniWagnerL2,
    DeepFool,
    Linf,
    Noise,
    PGDStep,
    SignStep,
    SquareSearch,
    Vanilla,
    decisions,
    run_ensemble,
    standard_attacks,
)
from lightning_modules.attacks.ensemble import ZERO_GRADIENT_SHARE

B, T, C = 6, 10, 2


class Linear(nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, series, mask=None):
        return series.flatten(1) @ self.weight + self.bias


@pytest.fixture
def series():
    return torch.randn(B, T, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def linear(n_logits):
    generator = torch.Generator().manual_seed(1)
    return Linear(
        torch.randn(T * C, n_logits, generator=generator, dtype=torch.float64),
        torch.randn(n_logits, generator=generator, dtype=torch.float64),
    )


def distances(victim, x, y):
    """To the nearest face of a linear classifier, by its formula."""
    logits, weight = victim(x), victim.weight
    if logits.shape[1] == 1:
        return logits[:, 0].abs() / weight.norm()
    found = []
    for row, label in zip(logits, y.tolist(), strict=True):
        others = [j for j in range(len(row)) if j != label]
        found.append(min((row[label] - row[j]) / (weight[:, label] - weight[:, j]).norm() for j in others))
    return torch.stack(found)


@pytest.mark.parametrize("n_logits", [1, 4])
def test_deepfool_is_exact_for_linear_classifiers(series, n_logits):
    victim = linear(n_logits)
    y = decisions(victim(series))
    result = DeepFool(overshoot=0.02)(victim, series, y)
    assert result.fooled.all()
    # float64 rounding
    torch.testing.assert_close(result.l2, 1.02 * distances(victim, series, y), rtol=1e-9, atol=0)
    assert (decisions(victim(result.x_adv)) != y).all()


@pytest.mark.parametrize("scale", [1e-22, 1e-30])
def test_deepfool_steps_over_a_nearly_flat_gap_or_says_that_it_failed(series, scale):
    x = series.float()

    def victim(points):
        return scale * points.sum(dim=(1, 2)).unsqueeze(1) + 5e10 * scale

    result = DeepFool()(victim, x, torch.ones(len(x), dtype=torch.int64))
    assert result.fooled.all()
    # to the face and a fiftieth beyond: the squares of such slopes are 0 in float32
    expected = 1.02 * (x.sum(dim=(1, 2)).double() + 5e10) / (T * C) ** 0.5
    torch.testing.assert_close(result.l2.double(), expected, rtol=1e-4, atol=0)
    far = DeepFool()(lambda points: 1e-38 * points.sum(dim=(1, 2)).unsqueeze(1) + 5, x, torch.ones(len(x)).long())
    assert not far.fooled.any(), "the face lies beyond the numbers of float32"
    assert torch.equal(far.x_adv, x)
    assert not far.l2.any()


@pytest.mark.parametrize("n_logits", [1, 4])
def test_carlini_wagner_comes_near_the_nearest_face(series, n_logits):
    victim = linear(n_logits)
    y = decisions(victim(series))
    result = CarliniWagnerL2(n_steps=300, n_searches=5, learning_rate=0.01)(victim, series, y)
    assert result.fooled.all()
    exact = distances(victim, series, y)
    assert (result.l2 >= exact - 1e-12).all()
    # five values of c and steps of 0.01 in 20 dimensions, about 0.01 * sqrt(20)
    assert (result.l2 <= 1.1 * exact + 0.05).all()


def test_carlini_wagner_reaches_its_target(series):
    victim = linear(4)
    target = (decisions(victim(series)) + 1) % 4
    result = CarliniWagnerL2(n_steps=150, n_searches=3, targeted=True, learning_rate=0.05)(victim, series, target)
    assert torch.equal(decisions(victim(result.x_adv)), target)


@pytest.mark.parametrize("attack", [DeepFool(), CarliniWagnerL2(n_steps=150, n_searches=3, learning_rate=0.05)])
def test_padding_stays_and_failure_returns_the_clean_series(series, attack):
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[2, 4:] = False
    victim = linear(1)
    y = decisions(victim(series))
    with pytest.raises(ValueError, match="the classifier <lambda> takes no mask, and 1 of 6 series are padded"):
        attack(lambda batch: victim(batch), series, y, mask=mask)
    result = attack(victim, series, y, mask=mask)
    assert torch.equal(result.x_adv[~mask], series[~mask])
    assert result.fooled.all()
    constant = attack(lambda batch: torch.ones(len(batch), 1, dtype=batch.dtype), series, torch.ones_like(y))
    assert not constant.fooled.any()
    assert torch.equal(constant.x_adv, series)
    assert attack(victim, series, 1 - y).l2.eq(0).all()  # already misclassified


def test_minimum_norm_attacks_refuse_bad_arguments(series):
    with pytest.raises(ValueError, match="DeepFool needs n_steps >= 1 and overshoot >= 0, got 0"):
        DeepFool(0)
    with pytest.raises(ValueError, match="n_steps and n_searches must be at least 1, got 5 and 0"):
        CarliniWagnerL2(5, 0)
    with pytest.raises(ValueError, match=r"x must be floating of shape \(B, T, C\)"):
        DeepFool()(linear(1), series[0], torch.zeros(T, dtype=torch.int64))


@pytest.mark.parametrize("attack", [DeepFool(3), CarliniWagnerL2(3, 1), CarliniWagnerL2(3, 1, targeted=True)])
def test_minimum_norm_attacks_refuse_what_any_attack_refuses(series, attack):
    victim, y = linear(1), torch.zeros(B, dtype=torch.int64)
    nan = series.clone()
    nan[2, 3, 1] = torch.nan
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[2, 3] = False
    for network, x, labels, valid, message in (
        (lambda batch: victim(batch).sigmoid(), series, y, None, "the network returns probabilities"),
        (lambda batch: linear(4)(batch).softmax(dim=1), series, y, None, "the network returns probabilities"),
        (victim, series, y + 7, None, r"labels must lie in 0\.\.1 for this classifier, got 7\.\.7"),
        (victim, series, y.double(), None, r"y must be int64 of shape \(6,\), got \(6,\) torch\.float64"),
        (victim, series, y[:2], None, r"y must be int64 of shape \(6,\), got \(2,\)"),
        (victim, nan, y, None, r"x must be finite, got .* in series 2 at step 3"),
        (victim, series, y, mask & False, "mask must leave each series a valid step, got none for series 0"),
        (victim, series, y, mask.long(), r"mask must be bool of shape \(6, 10\), got \(6, 10\) torch\.int64"),
        (lambda batch: batch, series, y, None, r"a classifier must return logits of shape \(6, 1 or n_classes\), got"),
        (lambda batch: victim(batch) * torch.nan, series, y, None, "the classifier returns a logit that is not finite"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            attack(network, x, labels, mask=valid)
        assert "\n" not in str(caught.value)

    class Masked(nn.Module):
        def forward(self, batch, mask):
            return victim(batch.masked_fill(~mask[..., None], 0.0))

    found = attack(Masked(), nan, y, mask=mask)  # as any attack, it does not look at padding
    assert found.l2.isfinite().all()


def test_ensemble_is_the_worst_case_of_its_attacks(series):
    victim = linear(1)
    y = decisions(victim(series))
    radius = float(distances(victim, series, y).mean()) * victim.weight.norm() / victim.weight.abs().sum()
    result = run_ensemble(standard_attacks(radius, n_steps=20), victim, series, y, generator=0)
    within = victim(series)[:, 0].abs() < radius * victim.weight.abs().sum()
    assert torch.equal(result.fooled, within)  # exact for a linear victim
    assert torch.equal(decisions(victim(result.x_adv)) != y, result.fooled)
    assert torch.equal(torch.stack(list(result.fooled_by.values())).any(dim=0), result.fooled)
    assert result.accuracy == pytest.approx(1 - within.double().mean().item())
    assert result.flags == []


def test_series_misclassified_from_the_start_are_broken_wherever_an_attack_begins(series):
    """The random vertex at which a search begins may be classified right."""
    victim = linear(1)
    y = decisions(victim(series))
    wrong = torch.arange(B) < 3
    y[wrong] = 1 - y[wrong]
    square = Attack(Vanilla(), SquareSearch(), projection=Linf(3.0), n_steps=1, keep="best")
    # towards the class itself: every attack makes a wrong series right
    helping = Attack(
        Vanilla(class_loss=lambda logits, labels: (2 * labels - 1) * logits[..., 0]),
        PGDStep(),
        projection=Linf(3.0),
        n_steps=5,
    )
    result = run_ensemble({"helping": helping, "square": square}, victim, series, y, generator=1)
    kept_right = wrong & ~result.fooled_by["helping"] & ~result.fooled_by["square"]
    assert kept_right.any()
    assert result.fooled[wrong].all()
    assert result.accuracy <= 0.5
    assert torch.equal(result.x_adv[kept_right], series[kept_right])
    assert torch.equal(decisions(victim(result.x_adv)) != y, result.fooled)


def test_a_loss_that_is_flat_behind_the_boundary_is_no_sign():
    """DLR of three classes is 1 once the true one is the last, and its float32 gradient 0."""
    torch.manual_seed(0)
    series, weight = torch.randn(60, 10, 2), torch.randn(3, 20)

    def victim(batch):
        return batch.flatten(1) @ weight.T

    y = decisions(victim(series))
    dlr = Attack(Vanilla(class_loss="dlr"), PGDStep(), projection=Linf(0.5), n_steps=20)
    alone = dlr(victim, series, y)
    assert alone.n_zero_gradients.double().mean() / alone.n_gradients > 5 * ZERO_GRADIENT_SHARE
    found = run_ensemble({"dlr": dlr}, victim, series, y)
    assert 0 < found.accuracy < 0.1, "those that are left had gradients"
    assert not any(flag.startswith("zero gradients") for flag in found.flags)


def test_flags_name_what_is_wrong(series):
    victim = linear(1)
    y = decisions(victim(series))

    class Masked(nn.Module):
        def forward(self, batch):
            return victim(batch).detach() + 0 * batch.sum(dim=(1, 2))[:, None]

    attacks = {
        "pgd": Attack(Vanilla(), PGDStep(), projection=Linf(1.0), n_steps=10),
        "square": Attack(Vanilla(), SquareSearch(), projection=Linf(1.0), n_steps=60),
    }
    flags = " | ".join(run_ensemble(attacks, Masked(), series, y, generator=0).flags)
    assert "zero gradients: 100% of those of pgd on " in flags
    assert "gradient masking: random search turned" in flags
    assert "no progress: pgd fools no more" in flags

    def confident(batch):
        return 100 * victim(batch)

    flags = run_ensemble({"pgd": attacks["pgd"]}, confident, series, y).flags
    assert any(flag.startswith("saturated victim: median |logit| is") for flag in flags)
    slow = {"slow": Attack(Vanilla(), SignStep(0.02), n_steps=10)}
    centre = victim(series).abs().median() / victim.weight.abs().sum()
    flags = run_ensemble({"slow": slow["slow"]}, victim, series, y, step=float(centre) / 9.0).flags
    assert any(flag.startswith("not converged: slow gained") for flag in flags)


def test_ensemble_refuses_bad_arguments(series):
    y = torch.zeros(B, dtype=torch.int64)
    with pytest.raises(ValueError, match="attacks must hold at least one attack, got none"):
        run_ensemble({}, linear(1), series, y)
    with pytest.raises(ValueError, match="attack 'aimed' is targeted"):
        run_ensemble({"aimed": Attack(Vanilla(), Noise(0.1), targeted=True)}, linear(1), series, y)
