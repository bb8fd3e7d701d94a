import sys

import numpy as np
import pytest
import torch

from lightning_modules.context.probes import BestProbe, LightGBMProbe, LinearProbe, LogisticProbe
from lightning_modules.metrics.probe_metrics import probe_scores

QUICK_TREES = LightGBMProbe(n_trees=40, patience=5, num_threads=1)
PROBES = [QUICK_TREES, LightGBMProbe(n_trees=20, patience=None, seed=42), LogisticProbe(), LinearProbe(batch_size=16)]


def softmax_sample(n, k, n_classes, seed=0, scale=1.0):
    """Features on their own scales, labels of a softmax of known coefficients."""
    generator = torch.Generator().manual_seed(seed)
    weights = scale * torch.randn(k, n_classes, generator=generator, dtype=torch.float64)
    features = torch.randn(3 * n, k, generator=generator, dtype=torch.float64)
    true = (features @ weights).softmax(1)
    labels = torch.multinomial(true, 1, generator=generator).squeeze(1)
    return features.float().split(n), labels.split(n), true.split(n), weights


def run(probe, features, labels, n_classes, seed=3):
    return probe.fit_predict(
        features[0], labels[0], features[1], labels[1], features[2], n_classes=n_classes, seed=seed
    )


def area(labels, probabilities):
    return probe_scores(labels.numpy(), probabilities.numpy())["roc_auc"][0]


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: f"{type(probe).__name__}-{getattr(probe, 'patience', '')}")
@pytest.mark.parametrize("n_classes", [2, 3])
def test_probabilities_repeat_and_rank(probe, n_classes):
    if isinstance(probe, LightGBMProbe):
        pytest.importorskip("lightgbm")
    features, labels, true, _ = softmax_sample(2000, 4, n_classes, scale=2.0)
    state = torch.get_rng_state()
    validation, test = run(probe, features, labels, n_classes)
    assert (torch.get_rng_state() == state).all()
    assert validation.shape == test.shape == (2000, n_classes)
    assert test.dtype == torch.float64
    torch.testing.assert_close(test.sum(1), torch.ones(2000, dtype=torch.float64), rtol=0, atol=1e-6)  # float32 inside
    # 1250 steps of Adam at 1e-3 and 20 trees at rate 0.02 are not at the end, but well on the way
    assert area(labels[2], test) > 0.8 * area(labels[2], true[2])
    again = run(probe, features, labels, n_classes)
    assert torch.equal(again[0], validation)
    assert torch.equal(again[1], test)


@pytest.mark.parametrize("probe", PROBES[1:])
def test_the_test_is_only_read(probe):
    if isinstance(probe, LightGBMProbe):
        pytest.importorskip("lightgbm")
    features, labels, _, _ = softmax_sample(300, 3, 2)
    whole = run(probe, features, labels, 2)
    part = run(probe, (features[0], features[1], features[2][:7] * 1.0), labels, 2)
    assert torch.equal(part[0], whole[0])
    # the rows of a product of matrices may be summed in another order in a smaller one
    torch.testing.assert_close(part[1], whole[1][:7], rtol=1e-6, atol=1e-7)


def test_early_stopping_reads_validation_and_nothing_of_the_test():
    pytest.importorskip("lightgbm")
    features, labels, _, _ = softmax_sample(600, 3, 2)
    found = run(QUICK_TREES, features, labels, 2)
    poisoned = (features[0], features[1], torch.full_like(features[2], 1e6))
    assert torch.equal(run(QUICK_TREES, poisoned, labels, 2)[0], found[0])
    # of no use on validation: fitting stops at the first tree, and probabilities hardly leave the base rate
    useless = (labels[0], labels[1][torch.randperm(600)], labels[2])
    stopped = run(QUICK_TREES, features, useless, 2)[0]
    assert stopped[:, 1].std() < found[0][:, 1].std() / 3


def test_logistic_recovers_known_coefficients_of_two_classes():
    features, labels, true, weights = softmax_sample(20_000, 3, 2)
    scaled = tuple(part * torch.tensor([1.0, 100.0, 0.01]) + 5 for part in features)
    _, test = run(LogisticProbe(), scaled, labels, 2)
    logit = (test[:, 1] / test[:, 0]).log()
    design = torch.cat([features[2].double(), torch.ones(20_000, 1, dtype=torch.float64)], 1)
    found = torch.linalg.lstsq(design, logit.unsqueeze(1)).solution.squeeze(1)
    expected = torch.cat([weights[:, 1] - weights[:, 0], torch.zeros(1, dtype=torch.float64)])
    # standard errors of 20,000 queries are about 0.02; four of them
    torch.testing.assert_close(found, expected, rtol=0, atol=0.08)
    assert (test - true[2]).abs().mean() < 0.01


@pytest.mark.parametrize("n_classes", [2, 4])
def test_logistic_equals_scikit_learn_at_one_penalty(n_classes):
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels, _, _ = softmax_sample(500, 3, n_classes)
    _, test = run(LogisticProbe(strengths=(0.02,), max_iterations=500, tolerance=1e-9), features, labels, n_classes)
    mean, sd = features[0].double().mean(0), features[0].double().std(0, correction=0)
    standard = [((part.double() - mean) / sd).numpy() for part in features]
    theirs = linear_model.LogisticRegression(C=1 / (0.02 * 500), tol=1e-6, solver="newton-cg")  # its L-BFGS warns
    theirs.fit(standard[0], labels[0].numpy())
    # both are solved to gradients below 1e-8 a query, curvature is at least 0.02
    np.testing.assert_allclose(test.numpy(), theirs.predict_proba(standard[2]), rtol=0, atol=1e-5)


def test_logistic_takes_the_penalty_that_validation_likes():
    features, labels, _, _ = softmax_sample(60, 40, 2, scale=0.2)
    losses = {}
    for strength in LogisticProbe().strengths:
        validation, test = run(LogisticProbe(strengths=(strength,), max_iterations=500), features, labels, 2)
        losses[strength] = (probe_scores(labels[1].numpy(), validation.numpy())["log_loss"][0], test)
    best = min(losses, key=lambda one: losses[one][0])
    assert best > 1e-4
    _, test = run(LogisticProbe(max_iterations=500), features, labels, 2)
    # begun at another point, ended at gradients below 1e-5 under curvature above 0.1
    torch.testing.assert_close(test, losses[best][1], rtol=0, atol=1e-3)


def test_logistic_stands_constant_and_missing_classes():
    features, labels, _, _ = softmax_sample(200, 2, 3)
    constant = tuple(torch.cat([part, torch.full((200, 1), 1e4)], 1) for part in features)
    known = (labels[0] % 2, labels[1] % 2)
    _, test = run(LogisticProbe(), constant, known, 4)
    _, without = run(LogisticProbe(), features, known, 4)
    assert test.isfinite().all()
    torch.testing.assert_close(test, without, rtol=0, atol=1e-6)  # the same problem, the column is zero
    assert test[:, 2:].max() < 0.05


def test_missing_lightgbm_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    features, labels, _, _ = softmax_sample(10, 2, 2)
    with pytest.raises(ImportError, match=r"pip install 'seqlit\[events\]'"):
        run(LightGBMProbe(), features, labels, 2)


def test_published_parameters_are_those_of_the_source(monkeypatch):
    lightgbm = pytest.importorskip("lightgbm")
    asked = {}

    def train(parameters, fitted, **keywords):
        asked.update(parameters | keywords)
        return real(parameters, fitted, num_boost_round=1)

    real = lightgbm.train
    monkeypatch.setattr(lightgbm, "train", train)
    features, labels, _, _ = softmax_sample(100, 2, 2)
    run(LightGBMProbe.published(), features, labels, 2)
    expected = {
        "num_boost_round": 500,
        "learning_rate": 0.02,
        "max_depth": 6,
        "bagging_fraction": 0.5,
        "bagging_freq": 1,
        "feature_fraction": 0.75,
        "lambda_l1": 1.0,
        "lambda_l2": 1.0,
        "min_data_in_leaf": 50,
        "seed": 42,
        "num_threads": torch.get_num_threads(),
    }
    assert {name: asked[name] for name in expected} == expected
    assert "callbacks" not in asked


@pytest.mark.parametrize(
    ("product", "best"), [(False, LogisticProbe()), (True, QUICK_TREES)], ids=["linear", "product"]
)
def test_the_best_probe_is_the_one_with_the_least_log_loss_on_validation(product, best):
    pytest.importorskip("lightgbm")
    features, labels, _, _ = softmax_sample(1000, 2, 2, scale=2.0)
    if product:
        labels = tuple((part.prod(1) > 0).long() for part in features)
    found = run(BestProbe((LogisticProbe(), QUICK_TREES)), features, labels, 2)
    for one, other in zip(found, run(best, features, labels, 2), strict=True):
        assert torch.equal(one, other)


def test_the_best_of_equal_probes_is_the_first_and_labels_of_the_test_play_no_part():
    class Said:
        def __init__(self, validation, test):
            self.validation, self.test = validation, test

        def fit_predict(self, *_, n_classes, seed):
            return torch.tensor([self.validation]), torch.tensor([self.test])

    probes = [Said([0.75, 0.25], [0.25, 0.75]), Said([0.75, 0.25], [0.5, 0.5]), Said([0.5, 0.5], [1.0, 0.0])]
    features, labels = (torch.zeros(1, 1),) * 3, (torch.zeros(1).long(),) * 3
    assert run(BestProbe(probes), features, labels, 2)[1].tolist() == [[0.25, 0.75]]
    assert run(BestProbe(probes[::-1]), features, labels, 2)[1].tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("probe", [LogisticProbe(), LinearProbe()])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, y: (f[0].fill_(torch.nan), y[0]), "features of train must be finite, got nan in row 0, column 0"),
        (lambda f, y: (f[2].resize_(10, 1), y[0]), r"features of test must be \(n, 2\) as of train, got \(10, 1\)"),
        (lambda f, y: (f[0], y[0].fill_(2)), r"labels of train must lie in 0\.\.1, got 2\.\.2"),
        (lambda f, y: (f[0], y[1].resize_(3)), "validation must have at least 1 query with a label each, got 10 and 3"),
    ],
)
def test_bad_input_ends_in_one_line(probe, change, message):
    features, labels, _, _ = softmax_sample(10, 2, 2)
    features, labels = [p.clone() for p in features], [p.clone() for p in labels]
    change(features, labels)
    with pytest.raises(ValueError, match=message) as caught:
        run(probe, features, labels, 2)
    assert "\n" not in str(caught.value)


def test_bad_settings_end_in_one_line():
    with pytest.raises(ValueError, match=r"strengths must be at least one number and none negative, got \(\)"):
        LogisticProbe(strengths=())
    with pytest.raises(ValueError, match="probes must be at least one, got none"):
        BestProbe(())
    features, labels, _, _ = softmax_sample(10, 2, 2)
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        run(LogisticProbe(), features, labels, 1)
