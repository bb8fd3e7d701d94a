"""The report of a test of context: its table against plain formulas, and sentences that follow the numbers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_modules.callbacks import ContextReport
from lightning_modules.callbacks.context_report import write_report
from lightning_modules.callbacks.context_text import not_run, report, table
from lightning_modules.context.controls import arm_names
from lightning_modules.context.findings import findings
from lightning_modules.context.study import ContextStudy, TargetStudy

DRAWS = 100  # enough for signs of planted gains, cheap
ARMS = arm_names(["kernel", "mean"], wide=True)
N = 300


def target(name="silent", *, helps=(), seed=0, arms=ARMS, outcome_dependent=False, n_classes=2):
    """Probabilities that know the label equally little in all arms, and much of it in those that help."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, n_classes, N)
    shared = random.standard_normal((N, n_classes))
    test = {}
    for arm in arms:
        logits = shared + 0.1 * random.standard_normal((N, n_classes))
        logits[np.arange(N), labels] += 3.0 if arm in helps else 0.7
        test[arm] = torch.softmax(torch.tensor(logits), 1)
    return TargetStudy(
        name=name,
        description="no event in 30 days",
        scope="local",
        n_classes=n_classes,
        outcome_dependent=outcome_dependent,
        labels=torch.tensor(labels),
        users=torch.arange(N) // 2,
        times=torch.arange(N),
        n_events=torch.arange(N) % 50 + 1,
        recency=torch.arange(N) % 31 + 0.5,
        validation_labels=torch.tensor(labels),
        validation=test,
        test=test,
        probe="LogisticProbe",
    )


def found_in(*targets, **more):
    return findings(ContextStudy(targets=targets, split="users", **more), n_resamples=DRAWS)


def rows(found, name="silent"):
    """Cells of the table by arm."""
    lines = [line.strip("| ").split(" | ") for line in table(found, name)[2:]]
    return {cells[0].removesuffix(" (outcome-dependent)").strip("*"): cells for cells in lines}


def text(found):
    return "\n".join(report(found))


def roc_auc(labels, scores):
    """Share of pairs in order, one by one."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    return np.mean([np.mean(one > negative) + 0.5 * np.mean(one == negative) for one in positive])


def test_the_table_holds_every_arm_and_its_numbers():
    one = target(helps=["kernel"])
    found = found_in(one)
    cells, labels = rows(found), one.labels.numpy()
    assert list(cells) == list(ARMS)
    aucs = {arm: roc_auc(labels, one.test[arm][:, 1].numpy()) for arm in ARMS}
    for arm, row in cells.items():
        chances = one.test[arm].numpy()
        assert row[1] == ("context" if arm.split("+")[0] in ("kernel", "mean") else "control")
        assert row[2].startswith(f"{aucs[arm]:.3f} [")
        assert row[4] == f"{-np.log(chances[np.arange(N), labels]).mean():.3f}"
        assert row[5] == f"{(chances.argmax(1) == labels).mean():.3f}"
        if row[1] == "context":
            assert row[6].startswith(f"{aucs[arm] - aucs['own']:+.4f} [")
            assert row[7].startswith(f"{aucs[arm] - aucs['own+time']:+.4f} [")
            source = arm.split("+")[0]
            strictest = max(("own", "own+time", f"shuffled:{source}", f"shuffled+time:{source}"), key=aucs.get)
            assert row[8].startswith(f"{aucs[arm] - aucs[strictest]:+.4f} [")
            assert row[8].endswith(f"({strictest})")
        else:
            assert all(cell.strip() == "" for cell in row[6:])


def test_an_arm_is_answered_by_its_corrected_interval():
    good, bad = found_in(target(helps=["kernel"])), found_in(target(helps=["own+time"]))
    assert rows(good)["kernel"][9:] == ["<0.001", "yes"]
    assert rows(good)["mean"][10] == "no"
    assert rows(bad)["kernel"][9:] == ["<0.001", "no, worse"]
    without = found_in(target(helps=["kernel"], arms=[arm for arm in ARMS if "shuffled" not in arm]))
    assert rows(without)["kernel"][10] == "not judged"


def test_verdicts_come_first_and_flip_with_the_numbers():
    good, bad = found_in(target(helps=["kernel"])), found_in(target(helps=["own+time"]))
    for found, words in ((good, "context helps: kernel adds +"), (bad, "context hurts: ")):
        lines = report(found)
        verdict = found["targets"]["silent"]["verdict"]
        assert words in verdict
        assert lines[2] == f"- **silent** (no event in 30 days; local): {verdict}"
        assert lines.index("## silent: no event in 30 days") > 2
    assert "**kernel**" in "\n".join(table(good, "silent"))
    assert "Chosen on validation: **kernel**." in text(good)


def test_outcome_dependence_is_said_in_every_row_of_its_target_alone():
    found = found_in(target("churned", outcome_dependent=True), target())
    published, honest = table(found, "churned")[2:], table(found, "silent")
    assert len(published) == len(ARMS)
    assert all("(outcome-dependent) |" in line for line in published)
    assert not any("outcome" in line for line in honest)
    assert report(found)[2].startswith("- **churned** (no event in 30 days; local, outcome-dependent): ")
    assert text(found).count("no number of this table is a forecast") == 1


def test_controls_that_were_not_run_are_named():
    full = found_in(target())
    assert not_run(full["targets"]["silent"]) == []
    assert "Controls that were not run: none." in text(full)
    few = found_in(target(arms=["own", "shuffled:mean", "shuffled+time:mean", "mean", "kernel"]))
    said = next(line for line in report(few) if line.startswith("Controls that were not run"))
    assert said == (
        "Controls that were not run: time features; Gaussian noise in place of context; one constant context vector; "
        "the parameter-matched encoder; context at shuffled moments of kernel (not asked for, or most queries share "
        "one moment)."
    )


def test_few_positives_are_called_underpowered():
    one = target()
    rare = torch.zeros(N, dtype=torch.int64)
    rare[:20] = 1
    assert "**Underpowered.**" in text(found_in(replace(one, labels=rare)))
    assert "**Underpowered.**" not in text(found_in(one))


def test_several_classes_and_an_undefined_measure():
    found = found_in(target("next", n_classes=5))
    assert "classes; LogisticProbe." in text(found)
    # of one class alone nothing is ranked
    alike = found_in(replace(target(), labels=torch.zeros(N, dtype=torch.int64)))
    assert rows(alike)["own"][2] == "not defined"
    assert "not judged" in report(alike)[2]


def test_bars_in_names_do_not_cut_cells():
    found = found_in(target(arms=arm_names(["a|b"])))
    assert all(line.count("|") - line.count("\\|") == 12 for line in table(found, "silent"))


def checks(worst):
    return {"feature": f"f{worst}", "what": "value", "auc": 0.5, "auc_by_age": [0.5, None], "worst": worst}


def test_what_the_data_module_found_is_told_and_no_proof_is_claimed():
    found = found_in(target())
    assert "No label checks were made." in text(found)
    assert "The absence of leaks cannot be proved." in text(found)
    facts = {
        "files": ["events.csv"],
        "label_checks": {"silent": [checks(0.6), checks(None), checks(0.97), checks(0.7), checks(0.55)]},
        "warnings": ["f0.97 tells the label"],
        "note": "A low AUC is no proof.",
    }
    told = text(found | {"data": facts})
    features = [line.split(" | ")[1] for line in told.split("\n") if line.startswith("| silent |")]
    assert features == ["f0.97", "f0.7", "f0.6"]
    assert "0.50 / - | 0.970 |" in told
    assert "**Warnings:**\n\n- f0.97 tells the label" in told
    assert "The absence of leaks cannot be proved. A low AUC is no proof." in told
    assert "No label checks" not in told
    quiet = text(found | {"data": facts | {"warnings": []}})
    assert "No single feature was warned of." in quiet
    assert "Not looked at" not in quiet
    unseen = {"label_checks": {"rare": [checks(None)], "often": [checks(0.6)]}, "warnings": []}
    assert "**Not looked at: rare.** Too few users of the rarer class" in text(found | {"data": unseen})
    nothing = text(found | {"data": {"label_checks": {"rare": [checks(None)]}, "warnings": []}})
    assert "No single feature was warned of." not in nothing


def test_the_context_is_told():
    found = found_in(target(), bank={"n_users": 7, "lag": None})
    assert "The aggregators have no weights to look at." in text(found)
    assert "Context: n users 7." in text(found)


class Facts(LightningDataModule):
    """One batch, and facts of the data."""

    def test_dataloader(self):
        return DataLoader(torch.zeros(1, 1))

    def report_facts(self):
        return {"files": ["events.csv"], "gap": float("nan")}


class Outcome(LightningModule):
    """Returns what it was given."""

    def __init__(self, outcome):
        super().__init__()
        self.outcome = outcome

    def test_step(self, batch, batch_idx):
        return self.outcome


def run_test(outcome, folder, **arguments):
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ContextReport(**arguments)],
    )
    trainer.test(Outcome(outcome), Facts(), verbose=False)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_callback_writes_a_report(tmp_path, capsys):
    study = ContextStudy(targets=(target(helps=["kernel"]),), split="time", seed=3)
    run_test(study, tmp_path, n_resamples=DRAWS, measure="log_loss")
    folder = tmp_path / "report"
    assert f"seqlit: report in {folder}" in capsys.readouterr().out
    written = json.loads((folder / "metrics.json").read_text())
    expected = findings(study, n_resamples=DRAWS, measure="log_loss")
    assert {key: written[key] for key in expected} == expected
    assert written["data"] == {"files": ["events.csv"], "gap": None}
    lines = (folder / "report.md").read_text()
    assert "Split by time" in lines
    assert "beyond own, nats of log-loss [95 %]" in lines
    assert "Fit unknown, test " in lines
    assert {path.name for path in folder.glob("*.png")} == {*("comparison.png", "comparison_log_loss.png", "gains.png")}
    assert not list(folder.glob(".*"))  # no draft is left


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_callback_refuses_other_outputs(tmp_path):
    with pytest.raises(ValueError, match="ContextReport needs ContextStudy from test_step, got dict"):
        run_test({"loss": torch.zeros(())}, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_resamples": 0}, "n_resamples must be at least 1, got 0"),
        ({"level": 1.0}, "level must be .*, got 1.0"),
        ({"measure": "auc"}, r"measure must be one of \('roc_auc', .*, got 'auc'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ContextReport(**arguments)


def test_a_study_without_context_is_reported(tmp_path):
    study = ContextStudy(targets=(target(arms=["own", "own+time"]),), split="users")
    found = findings(study, n_resamples=DRAWS)
    write_report(tmp_path, study, found)
    lines = (tmp_path / "report.md").read_text()
    assert "not judged: no arm has context." in lines
    assert lines.count(".png)") == 1
