"""Synthetic series: known rules, attainable accuracy in closed form, equal seeds."""

from math import comb, erf, exp, sqrt

import numpy as np
import pytest
from scipy.special import i0

from datamodules.synthetic_series import SyntheticSeries, freezer_like, ideal_rule, synthetic_series

N_TEST = 20_000
# Five standard errors of a share that is measured on so many series: chance fails once in two million.
TOLERANCE = 5 * 0.5 / sqrt(N_TEST)


def normal_cdf(x):
    return (1 + erf(x / sqrt(2))) / 2


def accuracy(**arguments):
    return synthetic_series(10, N_TEST, **arguments).ideal_accuracy()


@pytest.mark.parametrize(("n_classes", "n_channels"), [(2, 1), (4, 3)])
def test_mean_rule_reaches_the_closed_form(n_classes, n_channels):
    """Levels one apart, seen through the mean of T C values: an inner class errs on both sides."""
    noise, n_steps = 6.0, 30
    tail = normal_cdf(-0.5 * sqrt(n_steps * n_channels) / noise)
    expected = 1 - 2 * (n_classes - 1) / n_classes * tail
    found = accuracy(rule="mean", n_steps=n_steps, n_classes=n_classes, n_channels=n_channels, noise=noise)
    assert abs(found - expected) < TOLERANCE


def test_bump_rule_reaches_the_closed_form():
    """Two known signals in white noise: Phi(|m_0 - m_1| / (2 noise))."""
    noise, n_steps = 3.0, 60
    steps = np.arange(n_steps)
    first, second = (np.exp(-(((steps - place * n_steps / 3) / (n_steps / 12)) ** 2) / 2) for place in (1, 2))
    expected = normal_cdf(np.linalg.norm(first - second) / (2 * noise))
    assert 0.6 < expected < 0.9
    assert abs(accuracy(rule="bump", n_steps=n_steps, noise=noise) - expected) < TOLERANCE


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("z_normed", [False, True])
def test_frequency_rule_reaches_the_closed_form(n_classes, z_normed):
    """Error of K-ary orthogonal signals of unknown phase, with energy T/2 in noise of variance noise^2."""
    noise, n_steps = 2.5, 60
    ratio = n_steps / (4 * noise**2)
    expected = 1 - sum(
        (-1) ** (n + 1) * comb(n_classes - 1, n) / (n + 1) * exp(-n * ratio / (n + 1)) for n in range(1, n_classes)
    )
    found = accuracy(rule="frequency", n_steps=n_steps, n_classes=n_classes, noise=noise, z_normed=z_normed)
    assert 0.6 < expected < 0.9
    assert abs(found - expected) < TOLERANCE


@pytest.mark.parametrize("rule", ["frequency", "bump", "mean"])
def test_ideal_rule_is_the_likelihood_summed_over_phases(rule):
    """Against densities of every class written out here, the phase integrated on a grid."""
    drawn = synthetic_series(
        4, 60, rule=rule, n_classes=3, n_channels=2, n_steps=27, noise=2.0, variable_length=True, seed=4
    )
    phases = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    test = drawn.test
    found = ideal_rule(test.series, test.lengths, rule, n_classes=3, noise=2.0)
    for series, length, decided in zip(test.series, test.lengths, found, strict=True):
        steps, likelihoods = np.arange(length), []
        for k in range(3):
            likelihood = 1.0
            for channel in series[:length].T:
                if rule == "frequency":
                    signals = np.sin(2 * np.pi * 2 * (k + 1) * steps / length + phases[:, None])
                elif rule == "bump":
                    signals = np.exp(-(((steps - length * (k + 1) / 4) / (length / 18)) ** 2) / 2)[None]
                else:
                    signals = np.full((1, length), k - 1.0)
                likelihood *= np.exp(-((channel - signals) ** 2).sum(1) / (2 * 2.0**2)).mean()
            likelihoods.append(likelihood)
        assert decided == np.argmax(likelihoods)


def test_ideal_rule_does_not_overflow():
    """One strong channel and one weak one; I0 itself is infinite in float64 here."""
    drawn = synthetic_series(4, 50, n_channels=2, n_steps=400, noise=0.3)
    assert np.isinf(i0(200 / 0.3**2))
    assert drawn.ideal_accuracy() == 1


def test_equal_seeds_equal_sets_and_files(tmp_path):
    one, two, other = (synthetic_series(6, 4, n_steps=20, variable_length=True, seed=seed) for seed in (5, 5, 6))
    assert np.array_equal(one.test.series, two.test.series)
    assert not np.array_equal(one.test.series, other.test.series)
    contents = [
        (drawn.write(tmp_path / str(place), "Walk", ".ts.gz") / "Walk_TEST.ts.gz").read_bytes()
        for place, drawn in enumerate((one, two, other))
    ]
    assert contents[0] == contents[1] != contents[2]


def test_lengths_and_classes():
    drawn = synthetic_series(31, 400, n_steps=43, n_classes=5, n_channels=2, rule="mean", variable_length=True)
    assert np.bincount(drawn.train.labels).tolist() == [7, 6, 6, 6, 6]
    assert (drawn.test.lengths[0], drawn.test.lengths.min(), drawn.test.lengths.max()) == (43, 22, 43)
    after_end = np.arange(43) >= drawn.test.lengths[:, None]
    assert not drawn.test.series[after_end].any()
    assert drawn.test.series[~after_end].all()


def test_freezer_like_has_the_form_of_the_archive():
    drawn = freezer_like(3)
    assert isinstance(drawn, SyntheticSeries)
    assert (drawn.train.series.shape, drawn.test.series.shape) == ((150, 301, 1), (2850, 301, 1))
    # Of sums of 301 numbers of unit size in float64.
    assert np.abs(drawn.test.series.mean(1)).max() < 1e-12
    assert np.abs(drawn.test.series.std(1, ddof=1) - 1).max() < 1e-12
    assert drawn.ideal_accuracy() > 0.998


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "trend"}, "rule must be one of 'frequency', 'bump', 'mean', got 'trend'"),
        ({"n_classes": 1}, "n_classes must be at least 2, got 1"),
        ({"n_classes": 5}, "n_train must be at least 5, got 4"),
        ({"n_steps": 8}, "n_steps must be at least 9, got 8"),
        ({"n_steps": 17, "variable_length": True}, "n_steps must be at least 18, got 17"),
        ({"n_channels": 0}, "n_channels must be at least 1, got 0"),
        ({"noise": 0.0}, "noise must be a number above 0, got 0.0"),
        ({"noise": float("nan")}, "noise must be a number above 0, got nan"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"z_normed": True, "rule": "bump"}, "z_normed needs rule 'frequency' and one channel, got 'bump' and 1"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        synthetic_series(4, 6, **arguments)


@pytest.mark.parametrize(
    ("arguments", "ending", "message"),
    [
        ({}, ".csv", "ending must be one of .ts, .tsv, .txt, .arff, or that and .gz, got '.csv'"),
        ({"variable_length": True}, ".arff", "ending must be .ts for series of different length"),
        ({"n_channels": 2}, ".tsv.gz", "ending must be .ts or .arff for several channels, got '.tsv.gz'"),
    ],
)
def test_formats_that_cannot_hold_a_set(tmp_path, arguments, ending, message):
    with pytest.raises(ValueError, match=message):
        synthetic_series(4, 4, n_steps=20, **arguments).write(tmp_path, "Walk", ending)
