"""What the scripts behind the tables of context say of cells: verdicts, intervals, marks, and folds of households."""

import importlib

import numpy as np
import polars as pl
import pytest
from scipy.stats import ttest_1samp

from lightning_modules.context.findings import findings


@pytest.fixture
def script(project, monkeypatch):
    monkeypatch.syspath_prepend(str(project / "scripts"))
    return importlib.import_module


def synthetic(losses, chosen, **more):
    return {"arms": losses, "chosen": chosen, **more}


LOSSES = {"own": 0.70, "own+time": 0.75, "shuffled:mean": 0.72, "shuffled+time:mean": 0.74, "shuffled:kernel": 0.1}


def test_the_verdict_is_that_of_the_chosen_arm(script):
    tables = script("synthetic_context")
    worse, better = ({**LOSSES, "mean+time": value} for value in (0.73, 0.60))
    control, difference = tables.over_strictest(synthetic(worse, "mean+time"))
    # own + time alone would have made a loss of 0.03 look like a gain of 0.02; another arm's control has no say
    assert control == "own"
    assert difference == pytest.approx(0.03)
    assert tables.helps(synthetic(worse, "mean+time", judged={"helps": False})) == "no"
    assert tables.helps(synthetic(better, "mean+time", judged={"helps": True})) == "yes"


def test_an_interval_over_seeds_is_students(script):
    tables = script("reproduce_kernel_attention")
    values = [0.70, 0.71, 0.74, 0.69, 0.72]
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    assert tables.spread(values, 5) == f"{np.mean(values):.5f} ± {(high - low) / 2:.5f}"
    assert tables.spread([0.5, None]) == "0.500"
    assert tables.spread([None]) == "-"


def test_titles_warn_of_outcomes_and_of_few_labels(script):
    tables = script("reproduce_kernel_attention")

    def runs(*counts):
        return [{"data": {"targets": {"age": {"folds": {"test": {"by class": one}}}}}} for one in counts]

    plain, told = {"outcome_dependent": False}, {"outcome_dependent": True}
    assert tables.marked("age", plain, runs([90, 50], [90, 60])) == "age"
    assert tables.marked("age", told, runs([90, 50])) == "age (depends on the outcome)"
    assert tables.marked("age", told, runs([90, 50, 80], [90, 80, 11])) == (
        "age (depends on the outcome, underpowered: 11 test queries of the rarest class)"
    )


def test_households_are_dealt_evenly_and_anew_in_every_repeat(script):
    cross = script("cross_fit_demographics")
    random = np.random.default_rng(0)
    answers = pl.DataFrame(
        {"age": random.choice(["a", "b", "c"], 203), "household_size": random.choice(["1", "2"], 203)}
    )
    folds = [cross.dealt(answers, 5, seed) for seed in (0, 1)]
    assert (folds[0] != folds[1]).mean() > 0.5
    for one in folds:
        sizes = np.bincount(one, minlength=5)
        assert sizes.max() - sizes.min() <= 1
        for age in "abc":
            inside = np.bincount(one[(answers["age"] == age).to_numpy()], minlength=5)
            assert inside.max() - inside.min() <= 1


def test_a_household_is_tested_in_one_fold_and_validates_in_the_one_before(script, tmp_path):
    cross = script("cross_fit_demographics")
    tables = [pl.read_parquet(cross.with_folds(tmp_path, 5, 0, fold)) for fold in range(5)]
    roles = pl.concat([table.group_by("household_id").agg(pl.col("fold").unique()) for table in tables])
    assert roles["fold"].list.len().max() == 1, "every line of a household is in one fold"
    counts = (
        roles.explode("fold").group_by("household_id", "fold").len().pivot("fold", index="household_id", values="len")
    )
    answered = counts.filter(pl.col("test").is_not_null())
    assert len(answered) == 801
    assert answered.select("test", "validation", "train").unique().row(0) == (1, 1, 3)
    assert len(answered.select("test", "validation", "train").unique()) == 1
    assert counts.filter(pl.col("test").is_null())["train"].unique().to_list() == [5]


def fold_cell(users, labels, arms):
    kept = {"users": users, "labels": labels, "times": [0] * len(users), "n_events": [3] * len(users)}
    kept |= {
        "recency": [1.5] * len(users),
        "test": arms,
        "description": "age",
        "n_classes": 2,
        "probe": "LogisticProbe",
    }
    return {"targets": {"age": kept, "household_size": kept}, "seconds": 1.0}


def test_predictions_out_of_fold_are_put_together_by_household(script):
    cross = script("cross_fit_demographics")

    def said(*values):
        return {arm: [[1 - value, value] for value in values] for arm in ("own", "mean")}

    first = [fold_cell(["c", "a"], [1, 0], said(0.9, 0.1)), fold_cell(["b"], [1], said(0.6))]
    second = [fold_cell(["b", "c"], [1, 1], said(0.8, 0.5)), fold_cell(["a"], [0], said(0.3))]
    study = cross.pooled([first, second])
    one = study.targets[0]
    assert one.labels.tolist() == [0, 1, 1]
    # means over the two repeats for a, b and c
    np.testing.assert_allclose(one.test["mean"][:, 1], [0.2, 0.7, 0.7], rtol=1e-12)  # float64 sums of two
    found = findings(study, n_resamples=10)
    assert found["targets"]["age"]["n_users"] == 3
    shown = list(cross.table(found))
    assert shown[2].startswith("| own | 1.000 [")
    assert "- age: 3 households, 1 of the rarest class, fewer than 50: underpowered" in shown[-2]
    judged = [arm["judged"] for target in found["targets"].values() for arm in target["arms"].values() if arm["judged"]]
    for answer, cell in ((None, "-"), (True, "yes"), (False, "no")):
        for one in judged:
            one["helps"] = answer
        (row,) = [line for line in cross.table(found) if line.startswith("| mean |")]
        assert [part.strip() for part in row.split("|")][5] == cell
    with pytest.raises(ValueError, match="repeat 1: 2 tests of 3 households, each must be tested once"):
        cross.pooled([first, second[:1]])
