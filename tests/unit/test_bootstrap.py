import json

import numpy as np
import pytest

from lightning_modules.metrics import (
    bootstrap,
    mean_interval,
    mean_intervals,
    paired_bootstrap,
    paired_intervals,
)


def slow_interval(values, n_resamples, seed, level):
    """One resample at a time by plain indexing."""
    generator = np.random.default_rng(seed)
    n_users = len(values)
    means = [values[generator.integers(n_users, size=n_users)].mean() for _ in range(n_resamples)]
    return [values.mean(), *np.percentile(means, [50 * (1 - level), 50 * (1 + level)])]


@pytest.mark.parametrize("n_users", [1, 2, 37])
def test_equals_resampling_one_by_one(n_users):
    random = np.random.default_rng(0)
    model, baseline = random.random(n_users), random.random(n_users)
    found = paired_bootstrap(model, baseline, n_resamples=211, seed=5, level=0.9)
    # float64 means of at most 37 numbers below 1 in another order
    np.testing.assert_allclose(found, slow_interval(model - baseline, 211, 5, 0.9), rtol=0, atol=1e-14)
    np.testing.assert_allclose(
        mean_interval(model, n_resamples=211, seed=5, level=0.9),
        slow_interval(model, 211, 5, 0.9),
        rtol=0,
        atol=1e-14,
    )


def test_draw_does_not_depend_on_chunks_nor_on_the_other_metrics(monkeypatch):
    random = np.random.default_rng(1)
    metrics = {name: random.random(50) for name in ("a", "b", "c")}
    whole = mean_intervals(metrics, n_resamples=100, seed=3)
    monkeypatch.setattr(bootstrap, "CHUNK_BYTES", 24 * 50 * 7)
    for name, interval in mean_intervals(metrics, n_resamples=100, seed=3).items():
        # the matrix product sums 50 numbers below 1 in an order that depends on its shape
        np.testing.assert_allclose(interval, whole[name], rtol=0, atol=1e-14)
        np.testing.assert_allclose(mean_interval(metrics[name], n_resamples=100, seed=3), interval, rtol=0, atol=1e-14)


def test_same_seed_repeats_and_leaves_the_global_generator_alone():
    values = np.random.default_rng(2).random(30)
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_one_user_and_equal_systems_have_no_width():
    assert paired_bootstrap([0.75], [0.25]) == (0.5, 0.5, 0.5)
    assert paired_bootstrap(np.linspace(0, 1, 9), np.linspace(0, 1, 9)) == (0.0, 0.0, 0.0)
    third = np.full(11, 1 / 3)
    assert mean_interval(third) == (1 / 3, 1 / 3, 1 / 3)


def test_pairing_narrows_the_interval_and_level_widens_it():
    random = np.random.default_rng(3)
    baseline = random.random(400)
    model = baseline + 0.01 + 0.01 * random.standard_normal(400)
    paired = paired_bootstrap(model, baseline)
    single = mean_interval(model)
    assert 0 < paired.low < paired.mean < paired.high
    assert paired.high - paired.low < (single.high - single.low) / 10
    wide = paired_bootstrap(model, baseline, level=0.99)
    assert wide.low < paired.low
    assert wide.high > paired.high
    # the interval of a mean of 400: +-1.96 s / 20, itself known to a few per cent from 2000 resamples
    expected = 2 * 1.96 * (model - baseline).std() / 20
    assert paired.high - paired.low == pytest.approx(expected, rel=0.15)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(4)
    covered = 0
    for trial in range(200):
        interval = mean_interval(random.exponential(size=100), n_resamples=300, seed=trial, level=0.8)
        covered += interval.low <= 1.0 <= interval.high
    # binomial(200, 0.8) has s.d. 5.7; the percentile interval of a skewed sample of 100 loses about 2 %
    assert 135 <= covered <= 180


def test_reads_as_a_list_in_json():
    found = paired_intervals({"ndcg@10": [1.0, 0.0]}, {"ndcg@10": [0.0, 0.0]}, n_resamples=10)
    decoded = json.loads(json.dumps(found))
    assert decoded["ndcg@10"] == list(found["ndcg@10"])
    assert decoded["ndcg@10"][0] == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([]), "one value for each of 0 users, at least 1"),
        (lambda: mean_interval([1.0, np.nan]), "values must be finite, got nan for user 1"),
        (lambda: mean_interval([[1.0]]), r"got shape \(1, 1\)"),
        (lambda: mean_interval([1.0], n_resamples=0), "n_resamples must be at least 1, got 0"),
        (lambda: mean_interval([1.0], level=1.0), r"level must lie strictly between 0 and 1, got 1\.0"),
        (lambda: mean_intervals({}), "at least one metric, got none"),
        (lambda: mean_intervals({"a": [1.0], "b": [1.0, 2.0]}), r"b must hold .* 1 users.* got shape \(2,\)"),
        (lambda: paired_bootstrap([1.0, 2.0], [1.0]), r"same users twice, got shapes \(2,\) and \(1,\)"),
        (lambda: paired_intervals({"a": [1.0]}, {"b": [1.0]}), r"same metrics, got \['a', 'b'\] in one only"),
    ],
)
def test_bad_input_ends_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
