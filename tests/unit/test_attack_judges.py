import gzip
import sys

import numpy as np
import pytest
import torch
from torch import nn

from lightning_modules.attacks import Attack, Linf, PGDStep, SignStep, Vanilla, ZNormManifold
from lightning_modules.attacks.campaign import fresh_panel
from lightning_modules.attacks.judges import (
    NearestNeighbourJudge,
    NetworkJudge,
    OneClassJudge,
    StatisticsJudge,
    TwoStatisticsJudge,
    check_disjoint,
    series_statistics,
    valid_judge,
)
from lightning_modules.metrics.attack_functional import detector_auc

FITTED = {
    "mahalanobis": StatisticsJudge,
    "max_z": lambda: StatisticsJudge("max_z"),
    "neighbour": lambda: NearestNeighbourJudge(2),
    "one class": OneClassJudge,
}
PROVENANCE = {"seed": "1", "architecture": "ResCNN", "training_attacks": "ifgsm, pgd"}
# float64 sums of at most a few hundred terms in another order
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def make(name):
    if name == "one class":
        pytest.importorskip("sklearn")
    return FITTED[name]()


def walks(n_series, n_steps=40, n_channels=2, seed=0):
    """Smooth random series with masks of different length, and NaN where padded."""
    generator = torch.Generator().manual_seed(seed)
    series = torch.randn(n_series, n_steps, n_channels, generator=generator).cumsum(1) / 5
    mask = torch.arange(n_steps) < torch.randint(n_steps // 2, n_steps + 1, (n_series,), generator=generator)[:, None]
    return series.masked_fill(~mask[..., None], torch.nan), mask


def close(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(np.asarray(expected)), **CLOSE)


def slow_statistics(x, n_bands, n_fft):
    """One channel of one series without padding."""
    found = [x.mean(), x.std(ddof=1), np.abs(x).max(), np.abs(np.diff(x, 2)).mean()]
    steps = np.arange(len(x))
    power = []
    for k in range(1, n_fft // 2 + 1):
        wave = np.exp(-2j * np.pi * k * steps / n_fft)
        power.append(abs(((x - x.mean()) * wave).sum()) ** 2 / len(x))
    return found + [np.log(part.mean() + 1e-12) for part in np.array_split(power, n_bands)]


def test_statistics_equal_a_plain_computation():
    series, mask = walks(5)
    found = series_statistics(series, mask, n_bands=3)
    expected = [
        np.concatenate([slow_statistics(x[m].double().numpy()[:, c], 3, 64) for c in range(2)])
        for x, m in zip(series, mask, strict=True)
    ]
    close(found, expected)


def test_statistics_do_not_see_the_padding():
    series, mask = walks(4)
    longer = torch.cat([series, torch.full((4, 9, 2), torch.nan)], 1)
    padded = torch.cat([mask, torch.zeros(4, 9, dtype=torch.bool)], 1)
    close(series_statistics(longer, padded, n_fft=64), series_statistics(series, mask, n_fft=64))


@pytest.mark.parametrize("name", FITTED)
def test_scores_do_not_depend_on_the_batch_and_a_far_series_scores_high(name):
    judge = make(name)
    judge.fit(*walks(60))
    series, mask = walks(20, seed=1)
    scores = judge.score(series, mask)
    assert scores.dtype == torch.float64
    assert scores.shape == (20,)
    order = torch.randperm(20)
    close(judge.score(series[order], mask[order]), scores[order])
    close(torch.cat([judge.score(series[i : i + 1], mask[i : i + 1]) for i in range(20)]), scores)
    # a jump of 10 at every other step of series whose steps are about 0.2
    rough = series + 10 * (torch.arange(40) % 2)[None, :, None]
    assert float(judge.score(rough, mask).min()) > float(scores.max())


@pytest.mark.parametrize("name", FITTED)
def test_state_is_tensors_and_carries_the_judge(name):
    judge, other = make(name), make(name)
    with pytest.raises(ValueError, match="must be fitted before it scores"):
        judge.score(*walks(2))
    assert judge.state() == {}
    judge.fit(*walks(30))
    other.load_state(judge.state())
    assert all(isinstance(value, torch.Tensor) for value in judge.state().values())
    assert torch.equal(other.score(*walks(9, seed=2)), judge.score(*walks(9, seed=2)))
    judge.state()[judge.keys[0]].zero_()  # a copy
    assert torch.equal(other.score(*walks(9, seed=2)), judge.score(*walks(9, seed=2)))
    with pytest.raises(ValueError, match=r"state of .* must hold .* got \['other'\]"):
        other.load_state({"other": torch.zeros(1)})
    again = make(name)
    again.fit(*walks(30))
    assert torch.equal(again.score(*walks(9, seed=2)), judge.score(*walks(9, seed=2)))


def test_statistics_judge_equals_its_definition():
    train, test = walks(50), walks(7, seed=1)
    found = series_statistics(*train).numpy()
    # torch's median of an even number is the lower of the two in the middle
    centre = np.sort(found, 0)[24]
    spread = np.maximum(1.4826 * np.sort(np.abs(found - centre), 0)[24], 1e-6)
    z = (series_statistics(*test).numpy() - centre) / spread
    clipped = np.clip((found - centre) / spread, -5, 5)
    n_statistics = z.shape[1]
    moments = (clipped.T @ clipped + n_statistics * np.eye(n_statistics)) / (50 + n_statistics)
    judge = StatisticsJudge("max_z")
    judge.fit(*train)
    close(judge.score(*test), np.abs(z).max(1))
    judge = StatisticsJudge("mahalanobis")
    judge.fit(*train)
    close(judge.score(*test), np.sqrt(np.einsum("is,st,it->i", z, np.linalg.inv(moments), z)))


def test_constant_statistic_of_training_is_judged_on_the_scale_of_rounding():
    """On z-normalised sets mean and deviation hardly vary: what is below 1e-6 is no evidence, what is above is."""
    series = torch.randn(40, 30, 1, dtype=torch.float64)
    series = (series - series.mean(1, keepdim=True)) / series.std(1, keepdim=True)
    judge = StatisticsJudge("max_z")
    judge.fit(series)
    clean = judge.score(series[:5])
    close(judge.score(series[:5] + 1e-8).round(decimals=0), clean.round(decimals=0))
    assert float(judge.score(series[:5] + 1e-3).min()) > 900


@pytest.mark.parametrize("k", [1, 3])
def test_nearest_neighbours_equal_a_plain_search(k):
    (train, train_mask), (test, test_mask) = walks(12), walks(5, seed=1)
    judge = NearestNeighbourJudge(k)
    judge.fit(train, train_mask)

    def distances(x, m):
        both = [m & other for other in train_mask]
        pairs = zip(train, both, strict=True)
        return np.array([float((x.double() - y.double())[b].square().mean().sqrt()) for y, b in pairs])

    close(judge.score(test, test_mask), [np.sort(distances(*one))[k - 1] for one in zip(test, test_mask, strict=True)])
    left_out = [np.sort(np.delete(distances(train[i], train_mask[i]), i))[k - 1] for i in range(12)]
    close(judge.leave_one_out(), left_out)
    if k == 1:
        assert judge.score(train, train_mask).tolist() == [0.0] * 12
        assert float(judge.leave_one_out().min()) > 0


def test_series_without_a_common_step_are_infinitely_far():
    judge = NearestNeighbourJudge()
    early = torch.tensor([[True, False]] * 2)
    judge.fit(torch.zeros(2, 2, 1), early)
    assert judge.score(torch.zeros(1, 2, 1), ~early[:1]).isinf().all()


def test_one_class_scores_equal_scikit_learn_and_need_it_for_the_fit_only(monkeypatch):
    svm = pytest.importorskip("sklearn.svm")
    train, test = walks(50), walks(9, seed=1)
    judge = OneClassJudge(nu=0.1)
    judge.fit(*train)
    state = judge.state()

    def compressed(series):
        z = ((series_statistics(*series) - state["centre"]) / state["spread"]).numpy()
        return np.sign(z) * np.log1p(np.abs(z))

    machine = svm.OneClassSVM(nu=0.1, gamma=1 / 24, tol=1e-6).fit(compressed(train))
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    close(judge.score(*test), -machine.decision_function(compressed(test)))
    # far away the kernel fades and scores approach the offset, yet they stay apart
    far = judge.score(torch.randn(1, 40, 2) * torch.tensor([1e2, 1e3, 1e4])[:, None, None])
    assert float(far[0]) < float(far[1]) < float(far[2]) <= float(state["offset"])


def series_of_archive(folder, name, split):
    with gzip.open(folder / "ucr" / name / f"{name}_{split}.tsv.gz", "rt") as file:
        return torch.tensor(np.loadtxt(file)[:, 1:, None], dtype=torch.float32)


def z_normalised(series):
    return (series - series.mean(1, keepdim=True)) / series.std(1, keepdim=True)


@pytest.mark.parametrize("name", ["Coffee", "GunPoint"])
def test_two_statistics_of_the_archive(real_data, name):
    """T7: sign steps move mean or deviation of every series; on the z-normalised manifold only rounding is left."""
    clean = series_of_archive(real_data, name, "TEST")
    signs = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).sign()
    attacked = clean + 0.05 * signs
    hidden = z_normalised(attacked)
    judge, strict = TwoStatisticsJudge(), TwoStatisticsJudge(tie=0)
    assert judge.score(clean).tolist() == [0.0] * len(clean)
    assert float(detector_auc(judge.score(clean), judge.score(attacked))) == 1
    assert float(detector_auc(judge.score(clean), judge.score(hidden))) == 0.5
    # without ties it reads float32 arithmetic
    assert float(detector_auc(strict.score(clean), strict.score(hidden))) > 0.8


def test_two_statistics_read_the_deviation_that_series_were_divided_by():
    """Of a set normalised with n, an attack that shrinks a series to a sample deviation of 1 must not look cleanest."""
    raw = torch.randn(6, 24, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centred = raw - raw.mean(1, keepdim=True)
    for ddof in (0, 1):
        clean = centred / raw.std(1, correction=ddof, keepdim=True)
        other = centred / raw.std(1, correction=1 - ddof, keepdim=True)
        judge = TwoStatisticsJudge(ddof=ddof)
        assert judge.score(clean).tolist() == [0.0] * 6
        torch.testing.assert_close(judge.score(other), torch.full((6,), abs((24 / 23) ** (ddof - 0.5) - 1)).double())
    assert {judge.ddof for judge, _ in fresh_panel(0, fitted=False)} == {0}


def test_a_constant_channel_neither_blinds_nor_alarms_two_statistics():
    """Sets with a channel that never moves in a series are normalised all the same, and keep their judge."""
    generator = torch.Generator().manual_seed(0)
    clean = z_normalised(torch.randn(6, 24, 2, generator=generator, dtype=torch.float64))
    clean[..., 1] = 0
    clean[:3] = clean[:3].flip(2)
    judge = TwoStatisticsJudge()
    assert judge.score(clean).tolist() == [0.0] * 6
    shifted = torch.where(clean.std(1, keepdim=True) > 0, clean + 0.5, clean)
    close(judge.score(shifted), [0.5] * 6)
    signs = torch.randn(clean.shape, generator=generator).sign()
    assert float(detector_auc(judge.score(clean), judge.score(clean + 0.1 * signs))) == 1


class Wave(nn.Module):
    """A victim whose gradient differs from step to step of a series, as that of a network does."""

    def forward(self, series):
        steps = torch.arange(series.shape[1], dtype=series.dtype)
        return ((series[..., 0] * (0.7 * steps).sin()).tanh() * (0.3 * steps).cos()).sum(1, keepdim=True)


@pytest.mark.parametrize("ball", [False, True], ids=["no ball", "linf ball"])
@pytest.mark.parametrize("name", ["Coffee", "GunPoint"])
def test_an_attack_on_the_manifold_is_a_tie_to_two_statistics(real_data, name, ball):
    """T7: the constraint takes the detector to 0.5 where rounding ties; the strict form still reads that rounding."""
    clean = series_of_archive(real_data, name, "TEST")
    labels = (Wave()(clean)[:, 0] >= 0).long()
    kind = {"stepper": PGDStep(), "projection": Linf(0.2)} if ball else {"stepper": SignStep(0.02)}
    plain, hidden = (
        Attack(Vanilla(), n_steps=10, constraints=constraints, **kind)(Wave(), clean, labels).x_adv
        for constraints in ((), [ZNormManifold()])
    )
    assert bool(((hidden - clean).abs().amax((1, 2)) > 0.01).all()), "every series is moved"
    judge, strict = TwoStatisticsJudge(), TwoStatisticsJudge(tie=0)
    assert float(detector_auc(judge.score(clean), judge.score(plain))) == 1
    assert float(detector_auc(judge.score(clean), judge.score(hidden))) == 0.5
    # The constraint works in float64, so that only the last rounding to float32 is left to read: 0.61 to 0.66 here,
    # where statistics that are computed in float32 leave more than 0.8 (above).
    assert 0.5 < float(detector_auc(strict.score(clean), strict.score(hidden))) < 0.75


def test_two_statistics_judge_z_normed_series_whatever_else_does():
    roles = {judge.name: (role, getattr(judge, "tie", None)) for judge, role in fresh_panel(1, fitted=False)}
    assert roles == {"two statistics": ("held_out", 1e-6), "strict two statistics": ("beside", 0)}
    fitted = [judge.name for judge, role in fresh_panel(None) if role == "held_out"]
    assert fitted == ["statistics", "nearest neighbour", "one-class SVM"]
    assert [judge.name for judge, _ in fresh_panel(1)] == [*fitted, *roles]
    assert fresh_panel(None, fitted=False) == []


def test_fitted_judges_tell_the_split_they_learnt_from():
    for judge, _ in fresh_panel(None):
        assert judge.provenance == {"architecture": judge.name, "data_split": "train"}


@pytest.mark.parametrize("name", ["mahalanobis", "max_z", "one class"])
def test_statistics_see_sign_steps_on_the_manifold(real_data, name):
    judge = make(name)
    judge.fit(series_of_archive(real_data, "GunPoint", "TRAIN"))
    clean = series_of_archive(real_data, "GunPoint", "TEST")
    signs = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).sign()
    # the archive's series are smooth: roughness 0.0135, against about 0.1 of the signs; a few odd clean test series
    # leave 0.988 to the largest |z|
    assert float(detector_auc(judge.score(clean), judge.score(z_normalised(clean + 0.05 * signs)))) > 0.98
    assert valid_judge(float(detector_auc(judge.score(clean), judge.score(clean + 0.05 * signs))))


def test_two_statistics_take_the_largest_over_channels_and_valid_steps():
    series = torch.randn(3, 20, 2, dtype=torch.float64)
    series = z_normalised(series)
    series[0] += 0.25
    series[1, :, 1] *= 3
    close(TwoStatisticsJudge().score(series), [0.25, 2.0, 0.0])
    longer = torch.cat([series, torch.full((3, 5, 2), torch.nan, dtype=torch.float64)], 1)
    mask = torch.arange(25).expand(3, 25) < 20
    close(TwoStatisticsJudge().score(longer, mask), [0.25, 2.0, 0.0])


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.head = nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 1)

    def forward(self, series, mask=None):
        seen = series if mask is None else series.masked_fill(~mask[..., None], 0.0)
        return self.head(self.drop(self.norm(seen.mean(1))))


def test_network_judge_leaves_the_network_as_it_was():
    network = Discriminator()
    network.norm(torch.randn(64, 2) * 3 + 1)
    network.norm.eval()  # a frozen part of a network in training
    before = {name: value.clone() for name, value in network.state_dict().items()}
    series = torch.randn(10, 8, 2)
    judge = NetworkJudge(network, "held out", PROVENANCE, batch_size=3)
    scores = judge.score(series)
    assert [network.training, network.norm.training, network.drop.training] == [True, False, True]
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert scores.dtype == torch.float64
    assert not scores.requires_grad
    whole = NetworkJudge(network, "held out", PROVENANCE).score(series)
    # float32 logits of batches of 3 and of 10
    torch.testing.assert_close(scores, whole, rtol=0, atol=1e-6)
    with torch.no_grad():
        logits = network.eval()(series)[:, 0]
    torch.testing.assert_close(whole, logits.double().sigmoid(), rtol=0, atol=1e-15)
    network.train()
    with pytest.raises(RuntimeError):
        judge.score(torch.randn(2, 8, 5))
    assert network.training
    assert network.drop.training


def test_network_judge_passes_masks_to_those_that_take_them():
    series, mask = walks(4)
    with_mask = NetworkJudge(lambda x, mask: mask.sum(1, keepdim=True) - 30.0, "a", PROVENANCE)
    close(with_mask.score(series, mask), (mask.sum(1).double() - 30).sigmoid())
    without = NetworkJudge(lambda x: x.sum((1, 2))[:, None], "b", PROVENANCE)
    everything = torch.ones(4, 40, dtype=torch.bool)
    assert torch.equal(without.score(torch.ones(4, 40, 1), everything), without.score(torch.ones(4, 40, 1)))
    with pytest.raises(ValueError, match="the network of judge 'b' takes no mask, got series of different length"):
        without.score(series, mask)


def test_confident_logits_stay_apart_in_float64():
    judge = NetworkJudge(lambda x: x[:, 0], "confident", PROVENANCE)
    scores = judge.score(torch.tensor([17.0, 20.0, 30.0])[:, None, None])
    assert bool((scores.diff() > 0).all())
    assert bool((scores < 1).all())


def test_held_out_judges_share_nothing_with_the_attacked():
    def judge(name, seed, architecture, attacks):
        return NetworkJudge(
            lambda x: x[:, 0], name, {"seed": seed, "architecture": architecture, "training_attacks": attacks}
        )

    attacked = [judge("first", "1", "ResCNN", "ifgsm"), judge("second", "2", "ResCNN", "ifgsm")]
    check_disjoint(attacked, [judge("other", "3", "S4", "pgd"), StatisticsJudge(), TwoStatisticsJudge()])
    # All learn from the training split: to share it is no fault.
    of_train = [
        NetworkJudge(Discriminator(), name, PROVENANCE | {"data_split": "train"} | own)
        for name, own in (("seen", {}), ("unseen", {"seed": "5", "architecture": "S4", "training_attacks": "sgm"}))
    ]
    check_disjoint(of_train[:1], of_train[1:])
    refused = {
        "seed, got 2": judge("other", "2", "S4", "pgd"),
        "architecture, got ResCNN": judge("other", "3", "ResCNN", "pgd"),
        "training_attacks, got ifgsm": judge("other", "3", "S4", "sgm, ifgsm"),
    }
    for reason, held_out in refused.items():
        detector = "second" if "seed" in reason else "first"
        line = f"held-out judge 'other' and attacked detector '{detector}' must differ in {reason} in both"
        with pytest.raises(ValueError, match=line):
            check_disjoint(attacked, [held_out])
    check_disjoint(attacked, [judge("other", "3", "ResCNN", "ifgsm")], keys=("seed",))
    renamed = NetworkJudge(attacked[0].network, "renamed", PROVENANCE | {"architecture": "S4"})
    for same in (attacked[0], judge("first", "9", "S4", "pgd"), renamed):
        line = f"held-out judge '{same.name}' and attacked detector 'first' must be two, got the same one"
        with pytest.raises(ValueError, match=line):
            check_disjoint(attacked, [same])


def test_weak_judges_are_not_valid():
    """T6: a judge that does not see plain attacks says nothing by not seeing concealed ones."""
    assert valid_judge(0.8)
    assert not valid_judge(0.79)
    assert not valid_judge(float("nan"))
    silent = NetworkJudge(lambda x: torch.full((len(x), 1), -9.0), "silent", PROVENANCE)
    series = torch.randn(5, 4, 1)
    assert not valid_judge(float(detector_auc(silent.score(series), silent.score(series + 1))))


FIT = walks(9)
FITTED_NEIGHBOUR = NearestNeighbourJudge()
FITTED_NEIGHBOUR.fit(*FIT)
FITTED_STATISTICS = StatisticsJudge()
FITTED_STATISTICS.fit(*FIT)
HOLE = torch.ones(2, 3, 1)
HOLE[1, 1] = torch.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: NetworkJudge(len, "x", {"seed": "1"}),
            r"lacks \['architecture', 'training_attacks'\]",
        ),
        (lambda: NetworkJudge(len, "x", PROVENANCE, batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: NetworkJudge(lambda x: x, "x", PROVENANCE).score(torch.ones(2, 3, 1)), r"logits \(2, 1\), got shape"),
        (lambda: NetworkJudge(lambda x: x[:, 1], "x", PROVENANCE).score(HOLE), "1 of them not finite"),
        (lambda: StatisticsJudge("mean"), "rule must be one of mahalanobis, max_z, got 'mean'"),
        (lambda: StatisticsJudge(n_bands=0), "n_bands must be at least 1, got 0"),
        (lambda: StatisticsJudge().fit(torch.ones(1, 9, 1)), "at least 2 clean training series, got 1"),
        (lambda: FITTED_STATISTICS.score(torch.ones(2, 40, 1)), r"\(B, T, 2\) as in training, got shape \(2, 40, 1\)"),
        (lambda: FITTED_STATISTICS.score(torch.ones(2, 70, 2)), "n_fft = 64 for T = 70"),
        (lambda: series_statistics(HOLE), "must be finite, got NaN or infinity in series 1"),
        (lambda: series_statistics(HOLE, torch.zeros(2, 3).bool()), "series 0 of the batch has no valid step"),
        (lambda: series_statistics(HOLE, torch.ones(2, 4).bool()), r"mask must be \(2, 3\), got shape \(2, 4\)"),
        (lambda: series_statistics(torch.ones(3, 1)), r"series must be \(B, T, C\), got shape \(3, 1\)"),
        (lambda: NearestNeighbourJudge(0), "k must be at least 1, got 0"),
        (lambda: NearestNeighbourJudge(3).fit(torch.ones(3, 9, 1)), "more than k = 3 training series, got 3"),
        (lambda: NearestNeighbourJudge().leave_one_out(), "must be fitted before it scores"),
        (lambda: FITTED_NEIGHBOUR.score(torch.ones(2, 41, 2)), "padded to T = 40 as in training"),
        (lambda: FITTED_NEIGHBOUR.score(torch.ones(2, 40, 1)), r"series must be \(B, T, 2\), got shape \(2, 40, 1\)"),
        (lambda: OneClassJudge(nu=0.0), r"nu must lie in \(0, 1\], got 0.0"),
        (lambda: TwoStatisticsJudge(tie=-1.0), "tie must be at least 0, got -1.0"),
        (lambda: TwoStatisticsJudge(ddof=2), "ddof must be 0 or 1, got 2"),
    ],
)
def test_bad_input_ends_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
