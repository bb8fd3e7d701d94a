import math
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torchmetrics import MetricCollection
from torchmetrics.functional.classification import (
    binary_accuracy,
    binary_auroc,
    binary_average_precision,
    binary_f1_score,
    multiclass_f1_score,
)

from lightning_modules.metrics import (
    AttackSuccessRate,
    ClassifierAUC,
    Concealability,
    DetectionRate,
    DetectorAccuracy,
    DetectorAUC,
    DetectorF1,
    Effectiveness,
    FoolingRate,
    HiddenProbability,
    JointSuccess,
    MeanDTW,
    PerturbationNorm,
    RoughnessRatio,
    SecondsPerSeries,
    StepsToFlip,
    SuccessF,
    ZeroGradientRate,
)
from lightning_modules.metrics import attack_functional as functional
from lightning_modules.metrics.attack_classifier_functional import classifier_auc, gradient_rate

# float64 sums of at most a few thousand terms of size 1 in another order
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
# torchmetrics computes in float32: a few units of 6e-8
SINGLE = {"rtol": 0, "atol": 1e-6}


def close(found, expected, **tolerance):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), **(tolerance or CLOSE))


def scores(n_clean, n_adversarial, seed=0, levels=12):
    """Scores on a coarse grid, so that ties abound."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(0, levels, (n_clean,), generator=generator) / levels
    return clean, torch.randint(2, levels + 2, (n_adversarial,), generator=generator) / (levels + 2)


def test_hand_computable_row_of_the_specification():
    """RNNAttention on FreezerRegularTrain, clean: 63 of 2850 wrong gives ACC .9779 and EFF .0220."""
    labels = torch.tensor([1] * 1425 + [0] * 1425)
    predicted = labels.clone()
    predicted[:25] = 0
    predicted[-38:] = 1
    assert round(float(functional.accuracy(predicted, labels)), 4) == 0.9779
    assert round(float(functional.effectiveness(predicted, labels)), 4) == 0.0220
    # one step of 0.005 at each of 301 places
    moved = functional.perturbation_norms(torch.zeros(2, 301, 1), torch.full((2, 301, 1), 0.005))
    close(moved.l1, [1.505, 1.505], rtol=1e-7, atol=0)  # 0.005 in float32
    close(moved.l2, [0.005 * math.sqrt(301)] * 2, rtol=1e-7, atol=0)
    assert moved.l2_relative.isinf().all()
    still = functional.perturbation_norms(torch.zeros(1, 5, 1), torch.zeros(1, 5, 1))
    assert [float(norm) for norm in still] == [0.0] * 4


@pytest.mark.parametrize(
    ("eff", "conc", "published"),
    [(0.91, 0.98, 0.944), (0.80, 1.0, 0.886), (0.75, 0.04, 0.076), (1.0, 1.0, 1.0), (0.29, 1.0, 0.450)],
)
def test_success_of_released_cells(eff, conc, published):
    found = functional.success_f(torch.tensor(eff, dtype=torch.float64), torch.tensor(conc, dtype=torch.float64))
    # EFF and CONC are printed with two digits: half a unit each, and F moves by at most twice the one, here
    assert float(found) == pytest.approx(published, abs=0.011)


def test_success_is_zero_where_both_are_and_where_one_is():
    assert functional.success_f(torch.zeros(2), torch.tensor([0.0, 1.0])).tolist() == [0.0, 0.0]


def test_degenerate_dummies():
    """T6: what the metrics say of a detector, a classifier and an attack that do nothing."""
    labels = torch.tensor([0, 1] * 20)
    silent, loud = torch.zeros(40), torch.ones(40)
    assert float(functional.detector_f1(silent, silent)) == 0
    assert float(functional.concealability(silent, silent)) == 1
    assert float(functional.detector_accuracy(silent, silent)) == 0.5
    close(functional.detector_f1(loud, loud), 2 / 3)
    always_zero = torch.zeros(40, dtype=torch.int64)
    assert float(functional.effectiveness(always_zero, labels)) == 1
    assert float(functional.accuracy(always_zero, labels)) == 0.5
    # a method that never attacks, against a detector that sees nothing
    eff = functional.effectiveness(labels, labels)
    assert float(eff) == 0
    assert float(functional.success_f(eff, functional.concealability(silent, silent))) == 0
    assert float(functional.detector_auc(silent, silent)) == 0.5


def test_forms_of_concealability_contradict_each_other():
    """A detector read upside down still detects: the one-sided AUC form is 1, the two-sided 0."""
    clean, adversarial = torch.linspace(0.2, 0.4, 10), torch.linspace(0.0, 0.1, 10)
    assert [float(functional.concealability(clean, adversarial, form)) for form in ("f1", "auc", "auc_two_sided")] == [
        1.0,
        1.0,
        0.0,
    ]
    auc = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    assert functional.concealability_of_auc(auc, two_sided=True).tolist() == [0.0, 0.5, 1.0, 0.5, 0.0]


@pytest.mark.parametrize("seed", range(5))
def test_detector_metrics_equal_torchmetrics_and_sklearn(seed):
    roc_curve = pytest.importorskip("sklearn.metrics").roc_curve
    clean, adversarial = scores(57, 43, seed)
    pooled, truth = torch.cat([clean, adversarial]), torch.tensor([0] * 57 + [1] * 43)
    # torchmetrics decides by > 0.5, the tables by >=: scores at 0.5 go up
    called = (pooled >= 0.5).float()
    close(functional.detector_f1(clean, adversarial), binary_f1_score(called, truth), **SINGLE)
    close(functional.detector_accuracy(clean, adversarial), binary_accuracy(called, truth), **SINGLE)
    close(functional.detector_auc(clean, adversarial), binary_auroc(pooled, truth), **SINGLE)
    close(functional.average_precision(clean, adversarial), binary_average_precision(pooled, truth), **SINGLE)
    false_alarms, detections, _ = roc_curve(truth, pooled, drop_intermediate=False)
    for rate in (0.0, 0.01, 0.05, 0.29, 0.7):
        close(functional.detection_rate(clean, adversarial, rate), detections[false_alarms <= rate + 1e-12].max())


def test_detection_rate_allows_exactly_the_floor():
    clean, adversarial = torch.arange(100.0), torch.tensor([70.5, 71.5, 94.5, 98.5, 99.5])
    # 0.29 * 100 is below 29 in float64, yet 29 clean scores, 71..99, may be flagged
    found = [float(functional.detection_rate(clean, adversarial, rate)) for rate in (0.0, 0.01, 0.05, 0.29)]
    assert found == [0.2, 0.4, 0.6, 1.0]


@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_effectiveness_equals_torchmetrics_also_without_a_class(n_classes):
    generator = torch.Generator().manual_seed(n_classes)
    labels = torch.randint(0, max(2, n_classes - 1), (40,), generator=generator)
    predicted = torch.randint(0, max(2, n_classes - 1), (40,), generator=generator)
    if n_classes == 2:
        expected = binary_f1_score(predicted, labels)
    else:
        expected = multiclass_f1_score(predicted, labels, num_classes=n_classes, average="macro")
    close(functional.effectiveness(predicted, labels, n_classes), 1 - expected.double(), **SINGLE)


def test_leading_axes_are_a_whole_sweep():
    generator = torch.Generator().manual_seed(1)
    predicted = torch.randint(0, 3, (4, 5, 30), generator=generator)
    labels = torch.randint(0, 3, (30,), generator=generator)
    clean, adversarial = torch.rand(30, generator=generator), torch.rand(4, 5, 30, generator=generator)
    calls = {
        "effectiveness": lambda p, s: functional.effectiveness(p, labels, 3),
        "success rate": lambda p, s: functional.attack_success_rate(labels.flip(0), p, labels),
        "joint": lambda p, s: functional.joint_success(labels, p, labels, s > 0.5),
        "f1": lambda p, s: functional.detector_f1(clean, s),
        "auc": lambda p, s: functional.detector_auc(clean, s),
        "auc, clean with axes": lambda p, s: functional.detector_auc(clean.expand(s.shape), s),
        "detection": lambda p, s: functional.detection_rate(clean, s, 0.1),
        "two-sided": lambda p, s: functional.concealability(clean, s, "auc_two_sided"),
    }
    for name, call in calls.items():
        whole = call(predicted, adversarial)
        assert whole.shape == (4, 5), name
        each = [[call(predicted[i, j], adversarial[i, j]) for j in range(5)] for i in range(4)]
        close(whole, [[float(value) for value in row] for row in each])


def test_several_detectors_are_rows():
    """T10: constants 0 and 1 stay apart; the published pooling favours the attacker."""
    clean, adversarial = torch.tensor([[0.0] * 3, [1.0] * 3]), torch.tensor([[0.0] * 5, [1.0] * 5])
    assert float(functional.hidden_probability(adversarial)) == 1
    published = functional.pool_detectors(clean, adversarial)
    assert published[0].tolist() == [1.0] * 3
    assert published[1].tolist() == [0.0] * 5
    assert functional.pool_detectors(clean, adversarial, "max")[1].tolist() == [1.0] * 5
    assert float(functional.detector_f1(*published)) == 0


def test_decisions_before_and_after():
    labels = torch.tensor([0, 0, 1, 1, 1, 0])
    clean = torch.tensor([0, 0, 1, 1, 0, 1])
    adversarial = torch.tensor([1, 0, 0, 0, 1, 1])
    flagged = torch.tensor([False, False, True, False, False, False])
    assert functional.fooled(clean, adversarial, labels).tolist() == [True, False, True, True, False, False]
    close(functional.attack_success_rate(clean, adversarial, labels), 3 / 4)
    close(functional.accuracy_on_correct(clean, adversarial, labels), 1 / 4)
    close(functional.joint_success(clean, adversarial, labels, flagged), 2 / 4)
    close(functional.fooling_rate(clean, adversarial), 4 / 6)
    close(functional.accuracy(adversarial, clean), 2 / 6)
    targets = torch.tensor([2, 2, 0, 2, 2, 2])
    close(functional.attack_success_rate(clean, adversarial, labels, targets), 1 / 4)
    assert functional.attack_success_rate(1 - labels, adversarial, labels).isnan()


def test_a_series_that_a_random_start_flips_took_no_step_and_counts():
    predicted, labels = torch.tensor([[1, 0, 1], [1, 1, 1]]), torch.zeros(3, dtype=torch.int64)
    metric = StepsToFlip()
    metric.update(predicted, labels, torch.tensor([0, 0, 1]))
    assert metric.compute() == 0.5, "0 and 1 steps; the third was wrong when clean"
    metric.reset()
    metric.update(predicted, labels)
    assert metric.compute() == 1, "iterate 0 is the clean series"


def test_steps_to_flip():
    predicted = torch.tensor([[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0]])
    assert functional.steps_to_flip(predicted, torch.zeros(4, dtype=torch.int64)).tolist() == [2, 1, 0, -1]


def slow_dtw(x, y, radius):
    table = np.full((len(x) + 1, len(y) + 1), np.inf)
    table[0, 0] = 0
    for i in range(1, len(x) + 1):
        for j in range(1, len(y) + 1):
            if radius is None or abs(i - j) <= radius:
                step = min(table[i - 1, j], table[i, j - 1], table[i - 1, j - 1])
                table[i, j] = ((x[i - 1] - y[j - 1]) ** 2).sum() + step
    return math.sqrt(table[-1, -1])


@pytest.mark.parametrize("radius", [None, 0, 1, 4, 30])
@pytest.mark.parametrize("n_steps", [1, 2, 13])
def test_dtw_equals_the_plain_recursion(radius, n_steps):
    random = np.random.default_rng(n_steps)
    x, y = random.standard_normal((2, 6, n_steps, 2))
    expected = [slow_dtw(a, b, radius) for a, b in zip(x, y, strict=True)]
    close(functional.dtw(torch.tensor(x), torch.tensor(y), radius=radius), expected)


def test_masked_steps_do_not_count():
    random = np.random.default_rng(3)
    x, y = random.standard_normal((2, 5, 12, 2))
    mask = random.random((5, 12)) < 0.7
    mask[0], mask[1, :9], mask[1, 9:] = True, True, False
    mask[4] = False
    filled = [torch.tensor(np.where(mask[..., None], values, np.nan)) for values in (x, y)]
    close(
        functional.dtw(*filled, torch.tensor(mask))[:4],
        [slow_dtw(x[i][mask[i]], y[i][mask[i]], None) for i in range(4)],
    )
    assert functional.dtw(*filled, torch.tensor(mask))[4].isnan()
    norms = functional.perturbation_norms(*filled, torch.tensor(mask))
    delta = [(y[i] - x[i])[mask[i]] for i in range(4)]
    close(norms.l1[:4], [np.abs(d).sum() for d in delta])
    close(norms.linf[:4], [np.abs(d).max() for d in delta])
    close(norms.l2_relative[:4], [np.linalg.norm(d) / np.linalg.norm(x[i][mask[i]]) for i, d in enumerate(delta)])
    expected = []
    for i in range(4):
        triples = [t for t in range(1, 11) if mask[i, t - 1 : t + 2].all()]
        expected.append(np.mean([np.abs(x[i, t + 1] - 2 * x[i, t] + x[i, t - 1]) for t in triples]))
    close(functional.roughness(filled[0], torch.tensor(mask))[:4], expected)
    assert functional.roughness(filled[0], torch.tensor(mask))[4].isnan()


def test_roughness_of_a_line_a_zigzag_and_a_short_series():
    line, zigzag = torch.arange(10.0), torch.tensor([1.0, -1.0] * 5)
    assert functional.roughness(torch.stack([line, zigzag])[..., None]).tolist() == [0.0, 4.0]
    assert functional.roughness(torch.zeros(1, 2, 1)).isnan()


def test_nothing_has_no_value():
    nothing, some = torch.zeros(0), torch.rand(3)
    for call in (functional.detector_auc, functional.average_precision):
        assert call(some, nothing).isnan()
    assert functional.detection_rate(nothing, some, 0.05).isnan()
    assert functional.detector_f1(nothing, nothing).isnan()
    assert functional.detector_accuracy(nothing, nothing).isnan()
    none = torch.zeros(0, dtype=torch.int64)
    assert functional.effectiveness(none, none).isnan()
    assert functional.effectiveness(none, none, 3).isnan()


def make_metrics():
    return {
        "eff": Effectiveness(3),
        "f1": DetectorF1(),
        "accuracy": DetectorAccuracy(),
        "auc": DetectorAUC(),
        "detection": DetectionRate(0.05),
        "conc": Concealability("auc_two_sided"),
        "success": SuccessF("auc", 3),
        "hidden": HiddenProbability(2),
        "fooling": FoolingRate(),
        "attack success": AttackSuccessRate(),
        "joint": JointSuccess(),
        "l1": PerturbationNorm("l1"),
        "relative": PerturbationNorm("l2_relative"),
        "dtw": MeanDTW(2),
        "steps": StepsToFlip(),
        "roughness": RoughnessRatio(),
        "ranks": ClassifierAUC(3),
        "seconds": SecondsPerSeries(),
        "zero": ZeroGradientRate(),
    }


def make_batch(n_series, seed):
    generator = torch.Generator().manual_seed(seed)
    series = torch.randn(n_series, 9, 2, generator=generator)
    return {
        "series": series,
        "adversarial": series + 0.1 * torch.randn(n_series, 9, 2, generator=generator),
        "labels": torch.randint(0, 3, (n_series,), generator=generator),
        "predicted": torch.randint(0, 3, (4, n_series), generator=generator),
        "clean_scores": torch.rand(n_series, generator=generator),
        "adversarial_scores": torch.rand(2, n_series, generator=generator) + 0.1,
        "logits": torch.randn(n_series, 3, generator=generator),
        "zero": torch.randint(0, 5, (n_series,), generator=generator),
    }


def update_all(metrics, batch):
    clean, adversarial, labels = batch["predicted"][0], batch["predicted"][-1], batch["labels"]
    first = batch["adversarial_scores"][0]
    pair = (batch["series"], batch["adversarial"])
    arguments = {
        "eff": (adversarial, labels),
        "success": (adversarial, labels, batch["clean_scores"], first),
        "hidden": (batch["adversarial_scores"],),
        "fooling": (clean, adversarial),
        "attack success": (clean, adversarial, labels),
        "joint": (clean, adversarial, labels, first > 0.6),
        "steps": (batch["predicted"], labels),
        "ranks": (batch["logits"], labels),
        "seconds": (0.5 * len(labels), len(labels)),
        "zero": (batch["zero"], 4),
    }
    for name in ("f1", "accuracy", "auc", "detection", "conc"):
        arguments[name] = (batch["clean_scores"], first)
    for name in ("l1", "relative", "dtw", "roughness"):
        arguments[name] = pair
    for name, metric in metrics.items():
        metric.update(*arguments[name])


def expected_of(batch):
    """Every metric by the functions, on all series at once."""
    clean, adversarial, labels = batch["predicted"][0], batch["predicted"][-1], batch["labels"]
    pooled = (batch["clean_scores"], batch["adversarial_scores"][0])
    norms = functional.perturbation_norms(batch["series"], batch["adversarial"])
    steps = functional.steps_to_flip(batch["predicted"], labels)
    eff = functional.effectiveness(adversarial, labels, 3)
    rough = [functional.roughness(batch[name]).mean() for name in ("adversarial", "series")]
    return {
        "eff": eff,
        "f1": functional.detector_f1(*pooled),
        "accuracy": functional.detector_accuracy(*pooled),
        "auc": functional.detector_auc(*pooled),
        "detection": functional.detection_rate(*pooled, 0.05),
        "conc": functional.concealability(*pooled, "auc_two_sided"),
        "success": functional.success_f(eff, functional.concealability(*pooled, "auc")),
        "hidden": functional.hidden_probability(batch["adversarial_scores"]),
        "fooling": functional.fooling_rate(clean, adversarial),
        "attack success": 1 - functional.accuracy_on_correct(clean, adversarial, labels),
        "joint": functional.joint_success(clean, adversarial, labels, pooled[1] > 0.6),
        "l1": norms.l1.mean(),
        "relative": norms.l2_relative.mean(),
        "dtw": functional.dtw(batch["series"], batch["adversarial"], radius=2).mean(),
        "steps": steps[steps > 0].double().mean(),
        "roughness": rough[0] / rough[1],
        "ranks": classifier_auc(batch["logits"], labels),
        "seconds": 0.5,
        "zero": gradient_rate(batch["zero"], 4),
    }


def join(batches):
    last = {"predicted", "adversarial_scores"}
    return {name: torch.cat([b[name] for b in batches], -1 if name in last else 0) for name in batches[0]}


def test_classes_equal_functions_over_uneven_batches():
    batches = [make_batch(n, seed) for seed, n in enumerate((7, 1, 20))]
    metrics = make_metrics()
    for batch in batches:
        update_all(metrics, batch)
    expected = expected_of(join(batches))
    assert set(expected) == set(metrics)
    for name, metric in metrics.items():
        close(metric.compute(), expected[name])
        metric.reset()
    update_all(metrics, batches[2])
    for name, value in expected_of(batches[2]).items():
        close(metrics[name].compute(), value)


def test_batch_values_and_a_collection_do_not_mix_states():
    collection = MetricCollection({"at_0_5": DetectorF1(), "at_0_9": DetectorF1(0.9), "auc": DetectorAUC()})
    # no series above either threshold at first: the two F1 agree, and must still part later
    first = collection(torch.zeros(4), torch.zeros(4))
    assert float(first["at_0_5"]) == float(first["at_0_9"]) == 0
    collection(torch.zeros(4), torch.full((4,), 0.7))
    found = collection.compute()
    assert float(found["at_0_5"]) == pytest.approx(2 / 3)
    assert float(found["at_0_9"]) == 0
    success = SuccessF()
    labels = torch.tensor([0, 1])
    assert float(success(1 - labels, labels, torch.zeros(2), torch.zeros(2))) == 1
    assert float(success(labels, labels, torch.zeros(2), torch.zeros(2))) == 0
    # 2 of 4 right, one of each class: F1 = 1/2, EFF = 1/2, CONC = 1
    assert float(success.compute()) == pytest.approx(2 / 3)


SHARDS = {
    "uneven": [[(9, 0), (4, 1)], [(11, 2)]],
    "second without a batch": [[(9, 0), (8, 1)], []],
}
"""Batches, as (series, seed), that each of two processes sees."""

WORKER = textwrap.dedent(
    """
    import importlib.util, sys
    import torch
    from torch import distributed

    rank, folder, file = int(sys.argv[1]), *sys.argv[2:]
    spec = importlib.util.spec_from_file_location("attack_metrics_here", file)
    here = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(here)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for name, shards in here.SHARDS.items():
        metrics = here.make_metrics()
        for n_series, seed in shards[rank]:
            here.update_all(metrics, here.make_batch(n_series, seed))
        found[name] = {key: metric.compute() for key, metric in metrics.items()}
    torch.save(found, f"{folder}/found.{rank}")
    distributed.barrier()
    distributed.destroy_process_group()
    """
)


def test_two_processes_equal_one(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WORKER, str(rank), str(tmp_path), __file__],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    for case, shards in SHARDS.items():
        expected = expected_of(join([make_batch(n, seed) for shard in shards for n, seed in shard]))
        for rank in range(2):
            found = torch.load(tmp_path / f"found.{rank}")[case]
            assert set(found) == set(expected)
            for name, value in expected.items():
                close(found[name], value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: functional.accuracy(torch.zeros(3), torch.zeros(4)), r"same series .* got shapes \(3,\) and \(4,\)"),
        (
            lambda: functional.effectiveness(torch.tensor([2]), torch.tensor([0])),
            r"predicted must lie in 0\.\.1, got 2",
        ),
        (
            lambda: functional.effectiveness(torch.tensor([0]), torch.tensor([0]), 1),
            "n_classes must be at least 2, got 1",
        ),
        (lambda: functional.detector_auc(torch.tensor([0.0, math.nan]), torch.zeros(2)), "clean_scores .* got 1 of 2"),
        (lambda: functional.detection_rate(torch.zeros(2), torch.zeros(2), 1.0), r"must lie in \[0, 1\), got 1.0"),
        (lambda: functional.concealability(torch.zeros(2), torch.zeros(2), "f2"), "one of f1, auc, auc_two_sided, got"),
        (lambda: functional.pool_detectors(torch.zeros(2, 3), torch.zeros(3, 3)), "same M detectors"),
        (lambda: functional.pool_detectors(torch.zeros(2, 3), torch.zeros(2, 3), "min"), "rule must be one of"),
        (lambda: functional.hidden_probability(torch.zeros(3)), r"must be \(\.\.\., M, n\)"),
        (lambda: functional.dtw(torch.zeros(1, 3, 1), torch.zeros(1, 4, 1)), "dtw needs two"),
        (lambda: functional.dtw(torch.zeros(1, 3, 1), torch.zeros(1, 3, 1), radius=-1), "radius must be at least 0"),
        (lambda: functional.roughness(torch.zeros(3, 1)), r"series must be \(\.\.\., B, T, C\)"),
        (lambda: functional.roughness(torch.zeros(2, 3, 1), torch.ones(3, 2).bool()), r"mask must be .*\(2, 3\)"),
        (lambda: PerturbationNorm("l3"), "norm must be one of l1, l2, linf, l2_relative, got 'l3'"),
        (lambda: HiddenProbability(2).update(torch.zeros(3, 4)), "of 2 detectors, got"),
        (lambda: DetectorAUC().update(torch.zeros(2, 2), torch.zeros(2)), r"must be \(n,\) without NaN"),
        (lambda: functional.accuracy(torch.tensor(0), torch.tensor(0)), r"got shapes \(\) and \(\)"),
        (
            lambda: Effectiveness().update(torch.zeros(2, 3).long(), torch.zeros(3).long()),
            r"labels must hold .* got shapes \(3,\) and \(2, 3\)",
        ),
        (
            lambda: JointSuccess().update(*[torch.zeros(3, dtype=torch.int64)] * 3, torch.zeros(2).bool()),
            "flagged must",
        ),
    ],
)
def test_bad_input_ends_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
