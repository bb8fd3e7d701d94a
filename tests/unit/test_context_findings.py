import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binom

from lightning_modules.context.across_seeds import merge_seeds
from lightning_modules.context.controls import arm_names, assemble
from lightning_modules.context.findings import findings, strict_controls
from lightning_modules.context.probes import LogisticProbe
from lightning_modules.context.study import AttentionDiagnostics, ContextStudy, TargetStudy
from lightning_modules.context.visible import Context

ARMS = arm_names(["kernel"], gaussian=False, constant=False)
FOLDS = 3


def target(
    labels, test, *, users=None, n_classes=2, name="churn", outcome_dependent=False, recency=None, scope="local"
):
    """A study of one target from probabilities of class 1, or of all classes, by arm; validation is the test here."""
    labels = torch.as_tensor(labels)
    n = len(labels)
    whole = {
        arm: torch.as_tensor(np.stack([1 - values, values], 1) if np.ndim(values) == 1 else values).double()
        for arm, values in test.items()
    }
    return TargetStudy(
        name=name,
        description="no event in the next 30 days",
        scope=scope,
        n_classes=n_classes,
        outcome_dependent=outcome_dependent,
        labels=labels,
        users=torch.arange(n) if users is None else torch.as_tensor(users),
        times=torch.arange(n),
        n_events=torch.arange(n) % 10,
        recency=torch.full((n,), torch.nan) if recency is None else torch.as_tensor(recency),
        validation_labels=labels,
        validation=whole,
        test=whole,
        probe="logistic",
    )


def probed(seed, *, clock=0.0, others=0.0, n_users=150, per_user=3):
    """A study by probes: labels depend on a clock and on what others do, the context shows the latter, or a clock."""
    random = np.random.default_rng(seed)
    n = n_users * per_user
    users = np.repeat(np.arange(FOLDS * n_users), per_user)
    own = random.standard_normal((FOLDS * n, 2))
    time = random.standard_normal((FOLDS * n, 1))
    seen = random.standard_normal((FOLDS * n, 1))
    context = np.concatenate([seen, random.standard_normal((FOLDS * n, 1))], 1) if clock == 0 else np.tile(time, 2)
    logits = own[:, 0] + clock * time[:, 0] + others * seen[:, 0]
    labels = (random.random(FOLDS * n) < 1 / (1 + np.exp(-logits))).astype(np.int64)
    contexts = {"kernel": context, "shuffled:kernel": context[random.permutation(FOLDS * n)]}
    features = assemble(
        ARMS, torch.tensor(own), torch.tensor(time), {name: torch.tensor(one) for name, one in contexts.items()}
    )
    y, probe = torch.tensor(labels).split(n), LogisticProbe(strengths=(0.01,))
    test = {}
    for arm, whole in features.items():
        parts = whole.split(n)
        test[arm] = probe.fit_predict(parts[0], y[0], parts[1], y[1], parts[2], n_classes=2, seed=0)[1].numpy()
    return ContextStudy(targets=(target(y[2], test, users=users[2 * n :]),), split="users", seed=seed)


def test_planted_context_is_found_and_passes_as_json():
    found = findings(probed(0, others=1.5), n_resamples=200)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    one = found["targets"]["churn"]
    assert one["helps"] is True
    assert one["arms"]["kernel"]["judged"]["control"] in strict_controls("kernel")
    assert one["verdict"].startswith("context helps: kernel")
    assert one["arms"]["kernel"]["gains"]["own"]["roc_auc"][0] > 0.05
    assert one["arms"]["kernel"]["gains"]["own"]["log_loss"][0] > 0.05
    assert one["arms"]["own"]["judged"] is None
    assert found["n_comparisons"] == 2


def test_a_clock_does_not_help_beyond_time_features():
    found = findings(probed(1, clock=1.5), n_resamples=200)["targets"]["churn"]
    kernel = found["arms"]["kernel"]
    # it does carry the label beyond own history alone, which is what a calendar explains
    assert kernel["gains"]["own"]["roc_auc"][1] > 0
    assert kernel["judged"]["control"] in ("own+time", "shuffled+time:kernel")
    assert found["helps"] is False
    assert "context does not help beyond" in found["verdict"]
    assert "over own history alone it is +0." in found["verdict"]


def test_without_information_context_helps_no_more_often_than_the_level_allows():
    n = 40
    false = sum(findings(probed(seed, n_users=60), n_resamples=150)["targets"]["churn"]["helps"] for seed in range(n))
    # two-sided 5 % for all arms together, one side of which is 2.5 %; the bound is passed once in 1000 such tests
    assert false <= binom.isf(1e-3, n, 0.025)


def test_noise_of_equal_probes_is_judged_at_the_level_it_says():
    random = np.random.default_rng(3)
    false = 0
    for seed in range(150):
        labels = random.integers(2, size=80)
        test = {arm: 1 / (1 + np.exp(-labels - random.standard_normal(80))) for arm in ("own", "kernel")}
        study = ContextStudy(targets=(target(labels, test),), split="users", seed=seed)
        judged = findings(study, n_resamples=60)["targets"]["churn"]["arms"]["kernel"]["judged"]
        false += judged["adjusted_p"] < 0.05
    # binomial(150, .05): mean 7.5, s.d. 2.7; a standard error of 60 resamples adds about one per cent
    assert 1 <= false <= 18


def strong_and_weak(n=400, seed=0):
    random = np.random.default_rng(seed)
    labels = random.integers(2, size=n)
    strength = {"own": 0.5, "own+time": 0.8, "shuffled:kernel": 0.4, "shuffled+time:kernel": 0.7}
    strength |= {"kernel": 0.6, "kernel+time": 2.5}
    test = {arm: 1 / (1 + np.exp(-s * (labels - 0.5) - random.standard_normal(n))) for arm, s in strength.items()}
    return labels, test


def test_the_control_is_the_best_of_four_and_gains_are_paired_differences():
    labels, test = strong_and_weak()
    study = ContextStudy(targets=(target(labels, test, users=np.arange(400) // 4),), split="users")
    one = findings(study, n_resamples=300)["targets"]["churn"]
    values = {arm: one["arms"][arm]["measures"]["roc_auc"][0] for arm in test}
    control = max(strict_controls("kernel"), key=values.get)
    judged = one["arms"]["kernel+time"]["judged"]
    assert judged["control"] == control
    assert judged["gain"] == pytest.approx(values["kernel+time"] - values[control], abs=1e-15)
    assert judged["helps"] is True
    assert one["arms"]["kernel"]["judged"]["helps"] is False
    losses = {arm: one["arms"][arm]["measures"]["log_loss"][0] for arm in test}
    # signed so that more is better
    expected = losses["own"] - losses["kernel+time"]
    assert one["arms"]["kernel+time"]["gains"]["own"]["log_loss"][0] == pytest.approx(expected, abs=1e-15)
    assert one["chosen"] == "kernel+time"
    assert one["n_users"] == 100
    other = findings(study, n_resamples=300, measure="log_loss")["targets"]["churn"]
    assert other["arms"]["kernel+time"]["judged"]["control"] == min(strict_controls("kernel"), key=losses.get)
    assert "nats of log-loss" in other["verdict"]


def test_validation_chooses_and_the_test_has_no_say():
    labels, test = strong_and_weak()
    seen = target(labels, test)
    swapped = seen.validation | {"kernel": seen.test["kernel+time"], "kernel+time": seen.test["kernel"]}
    one = findings(ContextStudy(targets=(replace(seen, validation=swapped),), split="users"), n_resamples=100)
    found = one["targets"]["churn"]
    assert found["chosen"] == "kernel"
    assert found["verdict"].startswith("context helps: kernel+time adds +0.")
    assert "; kernel, chosen on validation, does not" in found["verdict"]


def test_without_its_controls_nothing_is_said_to_help():
    labels, test = strong_and_weak()
    left = {arm: values for arm, values in test.items() if not arm.startswith("shuffled")}
    one = findings(ContextStudy(targets=(target(labels, left),), split="users"), n_resamples=50)["targets"]["churn"]
    assert one["helps"] is None
    assert one["arms"]["kernel+time"]["judged"]["helps"] is None
    assert one["verdict"].startswith("not judged: without shuffled:kernel, shuffled+time:kernel")


def test_one_control_that_is_not_beaten_is_enough_to_say_no():
    labels, test = strong_and_weak()
    left = {arm: test[arm] for arm in ("own", "own+time", "kernel")}
    one = findings(ContextStudy(targets=(target(labels, left),), split="users"), n_resamples=50)["targets"]["churn"]
    judged = one["arms"]["kernel"]["judged"]
    assert judged["missing"] == ["shuffled:kernel", "shuffled+time:kernel"]
    assert judged["helps"] is False
    assert one["helps"] is False
    assert not one["verdict"].startswith("not judged")


def test_holm_runs_over_all_targets():
    labels, test = strong_and_weak()
    noise, _ = strong_and_weak(seed=1)
    alone = findings(ContextStudy(targets=(target(labels, test),), split="users"), n_resamples=100)
    targets = (target(labels, test), *(target(noise, test, name=f"noise {number}") for number in range(3)))
    both = findings(ContextStudy(targets=targets, split="users"), n_resamples=100)
    assert both["n_comparisons"] == 8
    one, other = (found["targets"]["churn"]["arms"]["kernel+time"]["judged"] for found in (alone, both))
    assert one["p"] == other["p"]
    assert other["adjusted_p"] == pytest.approx(8 * other["p"])
    assert one["adjusted_p"] == pytest.approx(2 * one["p"])
    width = [judged["adjusted_interval"][2] - judged["adjusted_interval"][1] for judged in (one, other)]
    assert width[0] < width[1]


def test_few_positives_and_outcomes_are_marked():
    labels, test = strong_and_weak()
    labels[labels == 1] *= np.arange((labels == 1).sum()) < 12
    study = ContextStudy(targets=(target(labels, test, outcome_dependent=True),), split="users")
    one = findings(study, n_resamples=100)["targets"]["churn"]
    assert one["n_positives"] == one["n_rarest"] == 12
    assert one["underpowered"] is True
    error = one["arms"][one["chosen"]]["judged"]["standard_error"]
    assert one["smallest_detectable"] == pytest.approx(1.96 * error)
    assert f"Underpowered: 12 positives, differences below {1.96 * error:.4f} cannot be seen" in one["verdict"]
    assert "The time of a query depends on its label: no forecast." in one["verdict"]
    assert all(arm["outcome_dependent"] for arm in one["arms"].values())


def test_of_several_classes_the_rarest_decides_whether_labels_are_few():
    random = np.random.default_rng(1)
    labels = np.repeat(np.arange(3), [300, 200, 60])
    test = {arm: random.dirichlet(np.ones(3), len(labels)) for arm in ("own", "kernel")}

    def found(labels):
        study = ContextStudy(targets=(target(labels, test, n_classes=3),), split="users")
        return findings(study, n_resamples=20)["targets"]["churn"]

    enough = found(labels)
    assert (enough["n_rarest"], enough["underpowered"]) == (60, False)
    # as many outside the commonest class as before: what is missing is the rarest
    few = found(np.repeat(np.arange(3), [300, 211, 49]))
    assert few["n_positives"] == enough["n_positives"]
    assert (few["n_rarest"], few["underpowered"]) == (49, True)
    assert "Underpowered: 49 queries of the rarest class, differences below" in few["verdict"]
    assert (found(np.repeat([0, 1], [300, 260]))["n_rarest"]) == 0, "a class that no query has is the rarest"


def test_of_next_types_those_that_hardly_occur_do_not_make_labels_few():
    """Each class counts as often as it is asked for: of a hundred types some are always missing."""

    def found(labels, scope):
        random = np.random.default_rng(0)
        test = {arm: random.dirichlet(np.ones(9), len(labels)) for arm in ("own", "kernel")}
        study = ContextStudy(targets=(target(labels, test, n_classes=9, scope=scope),), split="users")
        return findings(study, n_resamples=20)["targets"]["churn"]

    many = np.repeat(np.arange(6), [400, 100, 60, 40, 3, 1])
    assert found(many, "local")["underpowered"] is True
    assert found(many, "next")["underpowered"] is False
    few = found(np.repeat(np.arange(3), [500, 30, 19]), "next")
    assert (few["n_rarest"], few["n_positives"], few["underpowered"]) == (0, 49, True)
    assert "Underpowered: 49 queries outside the commonest class, differences below" in few["verdict"]


def test_quartiles_partition_the_queries_and_leave_out_nothing():
    labels, test = strong_and_weak()
    recency = np.where(np.arange(400) < 40, np.nan, np.arange(400) // 2)
    study = ContextStudy(targets=(target(labels, test, recency=recency),), split="users")
    one = findings(study, n_resamples=50)["targets"]["churn"]
    assert [row["n_queries"] for row in one["by_recency"]] == [90, 90, 90, 90, 40]
    assert one["by_recency"][-1]["low"] is None
    assert one["by_recency"][0]["low"] == 20
    assert [row["n_queries"] for row in one["by_history"]] == [120, 80, 120, 80]
    assert all(row["gain"][1] <= row["gain"][0] <= row["gain"][2] for row in one["by_history"])
    same = ContextStudy(targets=(target(labels, test, recency=np.full(400, 3.0)),), split="users")
    rows = findings(same, n_resamples=50)["targets"]["churn"]["by_recency"]
    assert [(row["low"], row["high"], row["n_queries"]) for row in rows] == [(3, 3, 400)]


def test_several_classes_and_one_class():
    random = np.random.default_rng(0)
    labels = random.integers(4, size=200)
    test = {arm: random.dirichlet(np.ones(4), 200) for arm in ("own", "kernel")}
    one = findings(ContextStudy(targets=(target(labels, test, n_classes=4),), split="time"), n_resamples=50)
    assert one["targets"]["churn"]["n_positives"] == 200 - np.bincount(labels).max()
    test = {"own": np.full(9, 0.5), "kernel": np.full(9, 0.4)}
    one = findings(ContextStudy(targets=(target(np.zeros(9, np.int64), test),), split="time"), n_resamples=50)
    found = one["targets"]["churn"]["arms"]["kernel"]
    assert found["measures"]["roc_auc"] == [None, None, None]
    assert found["judged"]["adjusted_p"] == 1
    assert one["targets"]["churn"]["chosen"] == "kernel"
    assert one["targets"]["churn"]["verdict"] == "not judged: ROC-AUC of 0 positives among 9 queries."
    one = findings(ContextStudy(targets=(target(np.arange(9) % 2, {"own": test["own"]}),), split="time"), n_resamples=9)
    assert one["targets"]["churn"]["verdict"] == "not judged: no arm has context."


def test_attention_of_weights():
    weights = torch.tensor([[0.5, 0.25, 0.25, 9.0], [0.0, 2.0, 0.0, 0.0], [9.0, 9.0, 9.0, 9.0]])
    visible = torch.tensor([[True, True, True, False], [True, True, False, False], [False] * 4])
    ages = torch.tensor([[1.0, 2.0, 4.0, 0.0], [3.0, 5.0, 0.0, 0.0], [0.0] * 4])
    shared = Context(torch.zeros(4, 1), None, visible, ages, torch.tensor([10, 11, 12, 13]))
    found = AttentionDiagnostics.of("kernel", weights, shared, k=5)
    # of 1/2, 1/4, 1/4: 1.5 ln 2 nats, 1 / (1/4 + 1/16 + 1/16); float32
    torch.testing.assert_close(found.entropy, torch.tensor([1.5 * np.log(2), 0, np.nan]).float(), equal_nan=True)
    torch.testing.assert_close(found.effective_number, torch.tensor([8 / 3, 1, np.nan]), equal_nan=True)
    torch.testing.assert_close(found.mean_age, torch.tensor([2.0, 5, np.nan]), equal_nan=True)
    assert found.n_visible.tolist() == [3, 2, 0]
    assert found.top_users[:, 0].tolist() == [10, 11, -1]
    assert set(found.top_users[0].tolist()) == {10, 11, 12, -1}
    assert found.top_users[1].tolist() == [11, -1, -1, -1, -1]
    assert found.top_weights[0].tolist() == [0.5, 0.25, 0.25, 0, 0]
    assert found.top_ages[1].tolist() == [5, 0, 0, 0, 0]
    rows = torch.arange(4).repeat(3, 1)
    gathered = Context(torch.zeros(4, 1), rows, visible, ages, torch.tensor([[10, 11, 12, 13]] * 3))
    both = AttentionDiagnostics.join([found, AttentionDiagnostics.of("kernel", weights, gathered)])
    assert torch.equal(both.top_users[:3], both.top_users[3:])
    labels, test = strong_and_weak()
    study = ContextStudy(targets=(target(labels, test),), split="users", attention=both)
    seen = findings(study, n_resamples=10)["attention"]
    assert seen["share_without_context"] == pytest.approx(1 / 3)
    assert seen["mean_age"][1] == 3.5


def test_seeds_side_by_side():
    runs = [findings(probed(seed, others=1.5), n_resamples=50) for seed in (0, 1, 2)]
    merged = merge_seeds(runs)
    assert json.loads(json.dumps(merged, allow_nan=False)) == merged
    assert merged["seeds"] == [0, 1, 2]
    one = merged["targets"]["churn"]["arms"]
    areas = [run["targets"]["churn"]["arms"]["own"]["measures"]["roc_auc"][0] for run in runs]
    assert one["own"]["measures"]["roc_auc"]["mean"] == pytest.approx(np.mean(areas))
    assert one["own"]["measures"]["roc_auc"]["sd"] == pytest.approx(np.std(areas, ddof=1))
    assert "judged" not in one["own"]
    assert one["kernel"]["judged"]["signs"] == [1, 1, 1]
    assert one["kernel"]["judged"]["n_helps"] == 3
    assert merged["targets"]["churn"]["verdict"] == "context helps in 3 of 3 seeds"
    assert merge_seeds(runs[:1])["targets"]["churn"]["arms"]["own"]["measures"]["roc_auc"]["sd"] is None


def test_bad_input_ends_in_one_line():
    labels, test = strong_and_weak()
    study = ContextStudy(targets=(target(labels, test),), split="users")
    lacking = ContextStudy(targets=(target(labels, {"kernel": test["kernel"]}),), split="users")
    run = findings(study, n_resamples=10)
    other = run | {"measure": "log_loss"}
    for call, message in (
        (lambda: findings(study, measure="f1"), r"measure must be one of .*, got 'f1'"),
        (lambda: findings(study, level=1.0), r"level must lie strictly between 0 and 1, got 1\.0"),
        (lambda: findings(study, n_resamples=0), "n_resamples must be at least 1, got 0"),
        (lambda: findings(lacking), r"'churn' must have an arm 'own' and test queries, got \['kernel'\]"),
        (lambda: merge_seeds([]), "at least 1 seed, got 0"),
        (lambda: merge_seeds([run, other]), "findings of run 1 have other targets, arms or measure"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
