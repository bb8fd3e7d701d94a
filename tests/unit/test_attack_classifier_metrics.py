import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torchmetrics import MetricCollection

from lightning_modules.attacks.class_losses import decisions
from lightning_modules.metrics import (
    AccuracyOnCorrect,
    BadGradientRate,
    ClassifierAccuracy,
    ClassifierAUC,
    ClassifierAveragePrecision,
    ClassifierF1,
    Effectiveness,
    SecondsPerSeries,
    ZeroGradientRate,
)
from lightning_modules.metrics import attack_classifier_functional as ranking
from lightning_modules.metrics import attack_functional as functional

# float64 sums of at most a hundred terms of size 1 in another order
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def close(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), **CLOSE)


def slow_auc(odds, labels, k):
    own, other = odds[labels == k], odds[labels != k]
    if not len(own) or not len(other):
        return math.nan
    gaps = own[:, None] - other
    return ((gaps > 0) + 0.5 * (gaps == 0)).mean()


def slow_precision(odds, labels, k):
    """Sum of P (R - R before) over falling distinct thresholds."""
    own, other = odds[labels == k], odds[labels != k]
    if not len(own):
        return math.nan
    total, before = 0.0, 0.0
    for threshold in sorted(set(own) | set(other), reverse=True):
        hits, false = (own >= threshold).sum(), (other >= threshold).sum()
        total, before = total + hits / (hits + false) * (hits / len(own) - before), hits / len(own)
    return total


def slow_odds(logits):
    """Each class against the sum of the others, one row and one class at a time."""
    if logits.shape[1] == 1:
        return logits
    odds = np.empty_like(logits)
    for row, values in enumerate(logits):
        for k in range(len(values)):
            rest = np.delete(values, k)
            odds[row, k] = values[k] - rest.max() - math.log(sum(math.exp(v - rest.max()) for v in rest))
    return odds[:, 1:] if logits.shape[1] == 2 else odds


@st.composite
def classified(draw):
    """Coarse logits, so that ties abound; classes may be missing."""
    n_logits = draw(st.sampled_from([1, 2, 3, 5]))
    n = draw(st.integers(1, 12))
    logits = draw(arrays(np.float64, (n, n_logits), elements=st.sampled_from([-40.0, -1.0, 0.0, 0.5, 40.0])))
    labels = draw(arrays(np.int64, n, elements=st.integers(0, max(1, n_logits - 1))))
    return logits, labels


@settings(max_examples=25, deadline=None)
@given(classified())
def test_ranks_equal_a_plain_computation(case):
    logits, labels = case
    odds = slow_odds(logits).round(12)
    # torch's and math's logarithm of a sum differ in the last bits, which must not part ties
    found = ranking.class_log_odds(torch.tensor(logits)).numpy()
    np.testing.assert_allclose(found, odds, rtol=0, atol=1e-11)
    classes = range(odds.shape[1]) if odds.shape[1] > 1 else [1]
    for measure, plain in ((functional.detector_auc, slow_auc), (functional.average_precision, slow_precision)):
        each = [plain(odds[:, column], labels, k) for column, k in enumerate(classes)]
        known = [value for value in each if not math.isnan(value)]
        expected = np.mean(known) if known else math.nan
        value = ranking.one_against_rest(torch.tensor(odds), torch.tensor(labels), measure)
        np.testing.assert_allclose(float(value), expected, rtol=1e-12)


@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_ranks_equal_scikit_learn(n_classes):
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(n_classes)
    logits = torch.randn(60, n_classes if n_classes > 2 else 1, generator=generator, dtype=torch.float64)
    labels = torch.arange(60) % n_classes
    chances = logits.softmax(1) if n_classes > 2 else logits.sigmoid()[:, 0]
    auc = metrics.roc_auc_score(labels, chances, multi_class="ovr", average="macro")
    truth = torch.nn.functional.one_hot(labels) if n_classes > 2 else labels
    close(ranking.classifier_auc(logits, labels), auc)
    precision = metrics.average_precision_score(truth, chances, average="macro")
    close(ranking.classifier_average_precision(logits, labels), precision)


def test_two_logits_rank_as_their_difference():
    logits, labels = torch.randn(30, 2), torch.arange(30) % 2
    both = ranking.classifier_auc(logits, labels)
    assert both == ranking.classifier_auc(logits[:, 1:].double() - logits[:, :1].double(), labels)


def test_confident_logits_are_ranked_where_probabilities_tie():
    """Softmax is 1 for all of them in float64."""
    leads = torch.tensor([60.0, 50.0, 45.0, 40.0])
    logits = torch.stack([leads, torch.zeros(4), torch.zeros(4)], 1)
    assert logits.double().softmax(1)[:, 0].unique().tolist() == [1.0]
    labels = torch.tensor([0, 0, 1, 2])
    odds = ranking.class_log_odds(logits)[:, :1]
    assert float(functional.detector_auc(odds[labels != 0, 0], odds[labels == 0, 0])) == 1
    assert float(ranking.classifier_auc(logits[:, :1] - 50, torch.tensor([1, 1, 0, 0]))) == 1


def test_infinite_logits_have_a_rank_and_nan_has_none():
    logits = torch.tensor([[torch.inf, 0.0, 0.0], [0.0, -torch.inf, torch.inf], [0.0, 1.0, 0.0]])
    assert float(ranking.classifier_auc(logits, torch.tensor([0, 2, 1]))) == 1
    logits[1, 1] = torch.nan
    assert ranking.classifier_auc(logits, torch.tensor([0, 2, 1])).isnan()
    assert ranking.classifier_average_precision(logits, torch.tensor([0, 2, 1])).isnan()


def test_a_single_class_has_no_roc_and_nothing_has_no_rank():
    logits, ones = torch.randn(4, 1), torch.ones(4, dtype=torch.int64)
    assert ranking.classifier_auc(logits, ones).isnan()
    assert float(ranking.classifier_average_precision(logits, ones)) == 1
    assert ranking.classifier_auc(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)).isnan()
    assert ranking.gradient_rate(torch.zeros(3, dtype=torch.int64), 0).isnan()


def test_leading_axes_are_a_whole_sweep():
    logits, labels = torch.randn(2, 3, 20, 3), torch.arange(20) % 3
    for function in (ranking.classifier_auc, ranking.classifier_average_precision):
        whole = function(logits, labels)
        close(whole, [[float(function(run, labels)) for run in row] for row in logits])
    rates = ranking.gradient_rate(torch.tensor([[1, 2], [0, 4]]), 4)
    assert rates.tolist() == [3 / 8, 4 / 8]


def make_metrics(n_classes):
    return {
        "accuracy": ClassifierAccuracy(),
        "on correct": AccuracyOnCorrect(),
        "f1": ClassifierF1(n_classes),
        "auc": ClassifierAUC(n_classes),
        "precision": ClassifierAveragePrecision(n_classes),
        "bad": BadGradientRate(),
        "zero": ZeroGradientRate(),
        "seconds": SecondsPerSeries(),
    }


def arguments_of(logits, clean, labels, bad, zero):
    called = decisions(logits)
    return {
        "accuracy": (called, labels),
        "on correct": (clean, called, labels),
        "f1": (called, labels),
        "auc": (logits, labels),
        "precision": (logits, labels),
        "bad": (bad, 5),
        "zero": (zero, 5),
        "seconds": (0.25 * len(labels) ** 2, len(labels)),
    }


@pytest.mark.parametrize(("n_classes", "n_logits"), [(2, 1), (2, 2), (4, 4)])
def test_classes_equal_functions_over_uneven_batches(n_classes, n_logits):
    generator = torch.Generator().manual_seed(7)
    sizes = (7, 1, 0, 20)
    logits = torch.randn(28, n_logits, generator=generator)
    clean, labels = (torch.randint(0, n_classes, (28,), generator=generator) for _ in range(2))
    bad, zero = (torch.randint(0, 6, (28,), generator=generator) for _ in range(2))
    metrics = make_metrics(n_classes)
    for batch in zip(*(values.split(sizes) for values in (logits, clean, labels, bad, zero)), strict=True):
        for name, given_ in arguments_of(*batch).items():
            metrics[name].update(*given_)
    called = decisions(logits)
    expected = {
        "accuracy": functional.accuracy(called, labels),
        "on correct": functional.accuracy_on_correct(clean, called, labels),
        "f1": functional.classifier_f1(called, labels, n_classes),
        "auc": ranking.classifier_auc(logits, labels),
        "precision": ranking.classifier_average_precision(logits, labels),
        "bad": ranking.gradient_rate(bad, 5),
        "zero": ranking.gradient_rate(zero, 5),
        "seconds": 0.25 * sum(n * n for n in sizes) / 28,
    }
    assert set(expected) == set(metrics)
    for name, metric in metrics.items():
        close(metric.compute(), expected[name])
        metric.reset()
        assert metric.higher_is_better is False


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric .* was called before the ``update``")
def test_without_a_series_nothing_has_a_value():
    for name, metric in make_metrics(3).items():
        assert metric.compute().isnan(), name


def test_a_collection_does_not_mix_states():
    labels = torch.tensor([0, 1, 1, 0])
    collection = MetricCollection(
        {"eff": Effectiveness(), "f1": ClassifierF1(), "bad": BadGradientRate(), "zero": ZeroGradientRate()}
    )
    for bad, zero in ((0, 0), (1, 3)):  # equal at first
        collection["bad"].update(torch.full((4,), bad), 4)
        collection["zero"].update(torch.full((4,), zero), 4)
        for name in ("eff", "f1"):
            collection[name].update(labels, labels)
    found = {name: float(metric.compute()) for name, metric in collection.items()}
    assert found == {"eff": 0.0, "f1": 1.0, "bad": 1 / 8, "zero": 3 / 8}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ranking.classifier_auc(torch.zeros(3), torch.zeros(3).long()), r"must be \(\.\.\., n, K'\).*\(3,\)"),
        (lambda: ranking.classifier_auc(torch.zeros(3, 1), torch.zeros(2).long()), r"of the n = 3 .*, got shape \(2,"),
        (
            lambda: ranking.classifier_auc(torch.zeros(1, 1), torch.tensor([2])),
            r"labels must lie in 0\.\.1, got 2\.\.2",
        ),
        (lambda: ranking.gradient_rate(torch.tensor([3]), 2), r"counts must lie in 0\.\.2, .* got 3\.\.3"),
        (lambda: ClassifierAUC(1), "n_classes must be at least 2, got 1"),
        (
            lambda: ClassifierAUC(3).update(torch.zeros(2, 1), torch.zeros(2).long()),
            r"logits must be \(n, 3\) .*\(2, 1\)",
        ),
        (lambda: ClassifierAUC().update(torch.zeros(2, 3), torch.zeros(2).long()), r"must be \(n, 1 or 2\)"),
        (lambda: ClassifierAUC().update(torch.zeros(1, 1), torch.tensor([2])), r"labels must lie in 0\.\.1, got 2"),
        (lambda: BadGradientRate().update(torch.tensor([-1]), 2), r"counts must lie in 0\.\.2"),
        (
            lambda: ClassifierAccuracy().update(torch.zeros(2).long(), torch.zeros(3).long()),
            "labels must hold the same",
        ),
        (lambda: SecondsPerSeries().update(-1.0, 3), "must be at least 0, got -1.0 and 3"),
    ],
)
def test_bad_input_ends_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
