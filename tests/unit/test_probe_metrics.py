import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.metrics.probe_metrics import (
    MEASURES,
    bootstrap_scores,
    probe_scores,
    user_weights,
)


def slow_auc(positive, scores, weights):
    """Every pair of a positive and a negative."""
    won = total = 0.0
    for i in np.flatnonzero(positive):
        for j in np.flatnonzero(~positive):
            total += weights[i] * weights[j]
            won += weights[i] * weights[j] * ((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
    return won / total if total else np.nan


def slow_precision(positive, scores, weights):
    """Recall gained times precision at every distinct threshold, from the highest."""
    found = last = 0.0
    n_positive = weights[positive].sum()
    if n_positive == 0:
        return np.nan
    for threshold in sorted(set(scores), reverse=True):
        taken = scores >= threshold
        if weights[taken].sum() == 0:
            continue
        recall = weights[taken & positive].sum() / n_positive
        found += (recall - last) * weights[taken & positive].sum() / weights[taken].sum()
        last = recall
    return found


def slow_scores(labels, probabilities, weights):
    n_classes = probabilities.shape[1]
    areas, precisions, shares = [], [], []
    for number in [1] if n_classes == 2 else range(n_classes):
        positive = labels == number
        areas.append(slow_auc(positive, probabilities[:, number], weights))
        precisions.append(slow_precision(positive, probabilities[:, number], weights))
        shares.append(weights[positive].sum())

    def average(values):
        rows = [(value, share) for value, share in zip(values, shares, strict=True) if not np.isnan(value) and share]
        return sum(v * s for v, s in rows) / sum(s for _, s in rows) if rows else np.nan

    loss = sum(-w * np.log(max(p[y], 1e-15)) for y, p, w in zip(labels, probabilities, weights, strict=True))
    right = sum(w * (p.argmax() == y) for y, p, w in zip(labels, probabilities, weights, strict=True))
    return [average(areas), average(precisions), right / weights.sum(), loss / weights.sum()]


def rounded(random, n, n_classes):
    """Probabilities with many ties that sum to one."""
    counts = random.integers(0, 3, (n, n_classes)) + 0.5
    return counts / counts.sum(1, keepdims=True)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 25), n_classes=st.integers(2, 4))
def test_equals_loops_over_pairs_with_ties_and_weights(seed, n, n_classes):
    random = np.random.default_rng(seed)
    labels, probabilities = random.integers(n_classes, size=n), rounded(random, n, n_classes)
    weights = random.integers(0, 3, (n, 3)).astype(float)
    weights[0] = 1
    found = probe_scores(labels, probabilities, weights)
    for column in range(3):
        expected = slow_scores(labels, probabilities, weights[:, column])
        # float64 sums of at most 25 * 25 terms below 10
        np.testing.assert_allclose([found[name][column] for name in MEASURES], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_classes", [2, 5])
def test_equals_scikit_learn(n_classes):
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(n_classes)
    labels, probabilities = random.integers(n_classes, size=300), rounded(random, 300, n_classes)
    weights = random.integers(1, 4, 300)
    found = probe_scores(labels, probabilities, weights[:, None].astype(float))
    positive = np.eye(n_classes)[labels]
    if n_classes == 2:
        area = metrics.roc_auc_score(labels, probabilities[:, 1], sample_weight=weights)
        precise = metrics.average_precision_score(labels, probabilities[:, 1], sample_weight=weights)
    else:
        keywords = {"average": "weighted", "sample_weight": weights}
        area = metrics.roc_auc_score(positive, probabilities, **keywords)
        precise = metrics.average_precision_score(positive, probabilities, **keywords)
    loss = metrics.log_loss(labels, probabilities, sample_weight=weights)
    # scikit-learn adds trapezoids and steps in another order
    np.testing.assert_allclose(
        [found["roc_auc"][0], found["pr_auc"][0], found["log_loss"][0]], [area, precise, loss], rtol=1e-12, atol=0
    )


def test_a_resample_equals_repeating_the_queries_of_the_users_drawn():
    random = np.random.default_rng(0)
    users = random.integers(0, 8, 40) * 10
    labels, probabilities = random.integers(3, size=40), rounded(random, 40, 3)
    draws = bootstrap_scores(labels, users, {"a": probabilities}, n_resamples=50, seed=7)["a"]
    weights = np.concatenate(list(user_weights(users, 50, 7)), 1)
    assert weights.shape == (40, 50)
    for column in range(50):
        counts = weights[:, column].astype(int)
        by_user = {user: set(counts[users == user].tolist()) for user in set(users.tolist())}
        assert all(len(found) == 1 for found in by_user.values())
        assert sum(next(iter(found)) for found in by_user.values()) == len(by_user)
        rows = np.repeat(np.arange(40), counts)
        repeated = probe_scores(labels[rows], probabilities[rows])
        for name in MEASURES:
            # the same sums in another order
            np.testing.assert_allclose(draws[name][column], repeated[name][0], rtol=1e-12, atol=0)


def test_arms_share_the_draw_and_the_seed_repeats():
    random = np.random.default_rng(1)
    labels, users = random.integers(2, size=60), np.repeat(np.arange(20), 3)
    probabilities = rounded(random, 60, 2)
    both = bootstrap_scores(labels, users, {"a": probabilities, "b": probabilities}, n_resamples=30, seed=1)
    alone = bootstrap_scores(labels, users, {"b": probabilities}, n_resamples=30, seed=1)
    other = bootstrap_scores(labels, users, {"b": probabilities}, n_resamples=30, seed=2)
    for name in MEASURES:
        assert (both["a"][name] == both["b"][name]).all()
        assert (both["b"][name] == alone["b"][name]).all()
        assert (both["b"][name] != other["b"][name]).any()


def test_bootstrap_error_of_auc_agrees_with_hanley_and_mcneil():
    random = np.random.default_rng(2)
    labels = np.repeat([0, 1], 300)
    scores = random.standard_normal(600) + labels
    probabilities = np.stack([1 - (p := 1 / (1 + np.exp(-scores))), p], 1)
    draws = bootstrap_scores(labels, np.arange(600), {"a": probabilities}, n_resamples=1000)["a"]["roc_auc"]
    area = probe_scores(labels, probabilities)["roc_auc"][0]
    first, second = area / (2 - area), 2 * area**2 / (1 + area)
    error = np.sqrt((area * (1 - area) + 299 * (first - area**2) + 299 * (second - area**2)) / 300**2)
    # the formula supposes exponential scores (5 %), an s.d. of 1000 draws is known to 2 %
    assert draws.std() == pytest.approx(error, rel=0.12)


def test_one_class_has_no_area_and_a_sure_mistake_is_finite():
    found = probe_scores(np.array([0, 0]), np.array([[1.0, 0.0], [0.0, 1.0]]))
    assert np.isnan(found["roc_auc"][0])
    assert np.isnan(found["pr_auc"][0])
    assert found["log_loss"][0] == pytest.approx(-np.log(1e-15) / 2)
    assert found["accuracy"][0] == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: probe_scores(np.zeros(2, int), np.ones((3, 2))), r"shapes \(3, 2\) and \(2,\)"),
        (lambda: probe_scores(np.zeros(2, int), np.ones((2, 1))), r"\(queries, classes\)"),
        (lambda: probe_scores(np.array([0, 2]), np.ones((2, 2))), r"labels must lie in 0\.\.1, got 0\.\.2"),
        (lambda: probe_scores(np.array([0]), np.array([[np.nan, 1]])), r"finite, got \[nan, 1\.0\] in row 0"),
        (lambda: probe_scores(np.array([0]), np.ones((1, 2)), np.ones(1)), r"each of 1 queries, got shape \(1,\)"),
        (lambda: bootstrap_scores(np.array([0]), np.array([0]), {}, n_resamples=0), "at least 1, got 0"),
        (lambda: bootstrap_scores(np.array([0]), np.array([0, 1]), {}), r"each of 1 queries, at least 1, got \(2,\)"),
    ],
)
def test_bad_input_ends_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
