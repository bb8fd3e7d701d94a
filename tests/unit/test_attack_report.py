"""The report of an attack test: numbers against plain formulas, and sentences that follow the numbers."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from scipy.stats import beta
from torch.utils.data import DataLoader

from lightning_modules.attacks.findings import best_concealed, findings, pareto_points, vanilla_attacks
from lightning_modules.attacks.grid import grid_points
from lightning_modules.attacks.study import SeenLevel
from lightning_modules.callbacks import AttackReport
from lightning_modules.callbacks.attack_text import classifier_table, judges_table, sentences, table

DRAWS = 200  # enough for stable signs, cheap
ATTACKED, PANEL = "ResCNN, seed 0", ["S4, seed 7", "statistics", "two statistics", "nearest neighbour", "one-class SVM"]


def text(found):
    return "\n".join(sentences(found))


def with_attack(study, name, /, **changes):
    return replace(study, attacks=tuple(replace(one, **changes) if one.name == name else one for one in study.attacks))


def with_judge(study, name, /, **changes):
    return replace(study, judges=tuple(replace(one, **changes) if one.name == name else one for one in study.judges))


def with_scores(study, judge, clean=None, **scores):
    """Scores of one judge replaced, of clean series or by attack (spaces as underscores)."""
    for name, values in scores.items():
        old = next(one.scores for one in study.attacks if one.name == name.replace("_", " "))
        study = with_attack(study, name.replace("_", " "), scores=old | {judge: values})
    return study if clean is None else with_judge(study, judge, clean=clean)


def decided(logits):
    """By hand: sign of one logit, largest of several."""
    logits = logits.numpy()
    return (logits[..., 0] >= 0).astype(int) if logits.shape[-1] == 1 else logits.argmax(-1)


def f1_score(truth, called, classes=(1,)):
    """Mean over classes of 2 TP / (2 TP + FP + FN), 0 where all are 0."""
    truth, called = np.asarray(truth), np.asarray(called)
    below = [((truth == one).sum() + (called == one).sum()) or 1 for one in classes]
    return np.mean([2 * ((truth == one) & (called == one)).sum() / n for one, n in zip(classes, below, strict=True)])


def auc_score(clean, adversarial):
    """Share of pairs in the right order, ties half."""
    gaps = np.asarray(adversarial)[:, None] - np.asarray(clean)
    return ((gaps > 0) + 0.5 * (gaps == 0)).mean()


def share_of(hits, n):
    """Clopper-Pearson from the quantiles of beta distributions."""
    low = beta.ppf(0.025, hits, n - hits + 1) if hits else 0.0
    high = beta.ppf(0.975, hits + 1, n - hits) if hits < n else 1.0
    return [hits / n, low, high, hits, n]


def limit_of(calibration, rate):
    """The conformal threshold by counting: the smallest score with at most rate (m + 1) - 1 scores above it."""
    scores = np.sort(calibration.numpy())
    return next(score for score in scores if (scores > score).sum() <= round(rate * (len(scores) + 1), 9) - 1)


@pytest.fixture(scope="module")
def found(attack_study):
    return findings(attack_study, n_resamples=DRAWS)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_each_attack_before_each_judge_by_hand(make_attack_study, n_classes):
    study = make_attack_study(n_classes=n_classes)
    found = findings(study, n_resamples=5)
    labels, clean = study.labels.numpy(), decided(study.clean_logits)
    for attack in study.attacks:
        row, called = found["attacks"][attack.name], decided(attack.logits[attack.iteration])
        f1 = f1_score(labels, called, (1,) if n_classes == 2 else range(n_classes))  # all classes occur
        assert row["effectiveness"] == pytest.approx(1 - f1, abs=1e-12)  # one rounding of sums
        assert row["accuracy"] == pytest.approx((called == labels).mean())
        assert row["f1"] == pytest.approx(f1, abs=1e-12)
        assert row["accuracy_on_correct"] == pytest.approx((called == labels)[clean == labels].mean())
        logits, ranked = attack.logits[attack.iteration].numpy(), range(n_classes) if n_classes > 2 else [1]
        odds = (
            logits
            if n_classes == 2
            else np.stack([logits[:, k] - np.log(np.exp(np.delete(logits, k, 1)).sum(1)) for k in range(n_classes)], 1)
        )
        aucs, precisions = [], []
        for column, k in enumerate(ranked):
            own, other = odds[labels == k, column], odds[labels != k, column]
            aucs.append(auc_score(other, own))
            precisions.append(
                np.mean([(own >= one).sum() / ((own >= one).sum() + (other >= one).sum()) for one in own])
            )
        assert row["roc_auc"] == pytest.approx(np.mean(aucs), abs=1e-12)
        assert row["average_precision"] == pytest.approx(np.mean(precisions), abs=1e-12)
        assert row["fooling_rate"] == pytest.approx((called != clean).mean())
        correct = clean == labels
        assert row["success_on_correct"] == pytest.approx((called != labels)[correct].mean())
        for judge in study.judges:
            before, scores = row["judges"][judge.name], attack.scores[judge.name].numpy()
            pooled, truth = np.concatenate([judge.clean, scores]), np.repeat([0, 1], len(labels))
            auc = auc_score(judge.clean, scores)
            hidden = {"auc": 1 - auc, "auc_two_sided": 2 * min(auc, 1 - auc)}
            if judge.is_probability:
                hidden["f1"] = 1 - f1_score(truth, pooled >= 0.5)
            assert before["auc"] == pytest.approx(auc, abs=1e-12)
            for form in ("f1", "auc", "auc_two_sided"):
                if form not in hidden:
                    assert before["concealability"][form] is None
                    assert before["success"][form] is None
                    continue
                conc = hidden[form]
                assert before["concealability"][form] == pytest.approx(conc, abs=1e-12)
                harmonic = 2 * (1 - f1) * conc / (1 - f1 + conc) if 1 - f1 + conc else 0.0
                assert before["success"][form] == pytest.approx(harmonic, abs=1e-12)
            for key, rate in (("0.05", 0.05), ("0.01", 0.01)):
                caught = scores > limit_of(judge.calibration, rate)
                joint = ((called != labels) & ~caught)[correct].sum()
                assert before["flagged"][key] == pytest.approx(share_of(caught.sum(), len(labels)))
                assert before["joint_success"][key] == pytest.approx(share_of(joint, correct.sum()))
                allowed = np.sort(judge.clean.numpy())[::-1][int(rate * len(labels))]
                assert before["detection"][key] == pytest.approx((scores > allowed).mean())


def test_judges_are_checked_on_vanilla_attacks_and_clean_series(attack_study, found):
    vanilla = [one for one in attack_study.attacks if one.name in ("ifgsm", "pgd")]
    for judge in attack_study.judges:
        row = found["judges"][judge.name]
        adversarial = np.concatenate([one.scores[judge.name] for one in vanilla])
        auc = auc_score(judge.clean, adversarial)
        assert row["vanilla_auc"] == pytest.approx(auc, abs=1e-12)
        assert row["valid"] == (auc >= 0.8)
        alarms = (judge.clean.numpy() > limit_of(judge.calibration, 0.05)).sum()
        assert row["thresholds"]["0.05"]["false_alarms"] == pytest.approx(share_of(alarms, len(judge.clean)))
    assert found["panel"] == PANEL
    assert "*LSTM, seed 9* is not a valid judge" in text(found)
    assert "| LSTM, seed 9 | held out | architecture: LSTM |" in "\n".join(judges_table(found))


def test_what_counts_as_vanilla(attack_study):
    assert [one.name for one in vanilla_attacks(attack_study)] == ["ifgsm", "pgd"]
    alone = replace(attack_study, attacks=tuple(one for one in attack_study.attacks if not one.concealed))
    assert [one.name for one in vanilla_attacks(alone)] == ["ifgsm", "pgd", "sgm"]  # noise moves nothing here
    still = with_attack(attack_study, "pgd", x_adv=attack_study.series)
    assert [one.name for one in vanilla_attacks(still)] == ["ifgsm"]


def test_panel_is_the_mean_and_the_worst_of_valid_held_out_judges(found):
    for attack in found["attacks"].values():
        for measure, read, worst in (
            ("success", lambda row: row["success"]["auc_two_sided"], min),
            ("detection", lambda row: row["detection"]["0.05"], max),
            ("joint_success", lambda row: row["joint_success"]["0.05"][0], min),
        ):
            values = {name: read(attack["judges"][name]) for name in PANEL}
            summed_up = attack["panel"][measure]["auc_two_sided" if measure == "success" else "0.05"]
            assert summed_up["mean"] == pytest.approx(np.mean(list(values.values())))
            assert summed_up["worst"] == worst(values.values()) == values[summed_up["judge"]]
        joint = attack["panel"]["joint_success"]["0.05"]["mean"]
        assert attack["intervals"]["joint_success"][0] == pytest.approx(joint)
        # only networks have an F1 form
        assert attack["panel"]["success"]["f1"]["mean"] == attack["judges"]["S4, seed 7"]["success"]["f1"]


def test_intervals_are_those_of_a_loop_over_resamples(make_attack_study):
    """The same draw, each resample scored from its series by scikit-learn."""
    study = make_attack_study(n=25)
    found = findings(study, n_resamples=60)
    drawn = np.random.default_rng(study.seed).integers(25, size=(60, 25))
    judge = study.judges[0]
    measured = {}
    for attack in study.attacks[:2]:
        called, scores = decided(attack.logits[attack.iteration]), attack.scores[judge.name].numpy()
        rows = []
        for some in drawn:
            effect = 1 - f1_score(study.labels[some], called[some])
            truth = np.repeat([0, 1], 25)
            flagged = np.concatenate([judge.clean.numpy()[some], scores[some]]) >= 0.5
            conc = 1 - f1_score(truth, flagged)
            rows.append([effect, conc, 2 * effect * conc / (effect + conc)])
        measured[attack.name] = np.array(rows)
        low, high = np.quantile(rows, [0.025, 0.975], axis=0)
        for place, measure in enumerate(("effectiveness", "concealability", "success")):
            interval = found["attacks"][attack.name]["intervals"][measure]
            assert interval[1:] == pytest.approx([low[place], high[place]], abs=1e-12)  # means in another order
    gap = np.quantile(measured["ifgsm sum"][:, 2] - measured["ifgsm"][:, 2], [0.025, 0.975])
    assert found["attacks"]["ifgsm sum"]["minus_vanilla"]["success"][1:] == pytest.approx(gap.tolist(), abs=1e-12)
    assert found["attacks"]["ifgsm"]["minus_vanilla"] is None
    assert found["attacks"]["sgm"]["baseline"] is None


def test_an_attack_equal_to_its_vanilla_one_gains_nothing(attack_study):
    vanilla = attack_study.attacks[0]
    same = with_attack(attack_study, "ifgsm sum", logits=vanilla.logits, scores=vanilla.scores)
    found = findings(same, n_resamples=DRAWS)
    for measure, interval in found["attacks"]["ifgsm sum"]["minus_vanilla"].items():
        assert interval[0] == 0.0
        if measure.startswith("joint_success"):
            assert interval[1] == -interval[2] < 0, "none of 38 pairs of series differs: that is not proof of none"
        else:
            assert interval[1:] == [None, None]
    assert "cannot resolve the difference, the same in all resamples: ifgsm sum (+0.000)" in text(found)
    assert "the interval holding zero: ifgsm sum (+0.000 [-" in text(found)


def warping_distance(one, other, radius):
    """The recursion of dynamic time warping, cell by cell."""
    cost = np.full((len(one) + 1, len(other) + 1), np.inf)
    cost[0, 0] = 0
    for i in range(len(one)):
        for j in range(max(0, i - radius), min(len(other), i + radius + 1)):
            least = min(cost[i, j], cost[i, j + 1], cost[i + 1, j])
            cost[i + 1, j + 1] = ((one[i] - other[j]) ** 2).sum() + least
    return np.sqrt(cost[-1, -1])


def test_size_and_effort_by_hand(make_attack_study):
    study = make_attack_study(n=10, n_channels=2, variable_length=True)
    attack = replace(study.attacks[1], n_bad_gradients=torch.full((10,), 2), n_zero_gradients=torch.full((10,), 5))
    row = findings(replace(study, attacks=(attack,)), n_resamples=5)["attacks"]["ifgsm sum"]
    sizes, bends, rough, warped = [], [], [], []
    for clean, moved, valid in zip(study.series.double(), attack.x_adv.double(), study.mask, strict=True):
        clean, moved = clean[valid].numpy(), moved[valid].numpy()
        delta = (moved - clean).ravel()
        l2 = np.linalg.norm(delta)
        sizes.append([np.abs(delta).sum(), l2, np.abs(delta).max(), l2 / np.linalg.norm(clean)])
        bends.append(np.abs(np.diff(clean, 2, axis=0)).mean())
        rough.append(np.abs(np.diff(moved, 2, axis=0)).mean())
        warped.append(warping_distance(clean, moved, radius=3))  # a tenth of 30 steps
    assert list(row["norms"].values()) == pytest.approx(np.mean(sizes, 0).tolist(), rel=1e-12)  # sums in another order
    assert row["roughness_ratio"] == pytest.approx(np.mean(rough) / np.mean(bends), rel=1e-12)
    assert row["dtw"] == {"mean": pytest.approx(np.mean(warped), rel=1e-12), "radius": 3}
    assert row["bad_gradients"] == pytest.approx(0.2)  # 2 of 10 gradients
    assert row["zero_gradients"] == pytest.approx(0.5)
    assert row["seconds_per_series"] == pytest.approx(0.01)


@pytest.mark.parametrize("iteration", [3, 10])
def test_flips_are_counted_up_to_the_chosen_iterate_and_from_a_random_start(attack_study, iteration):
    attack = attack_study.attacks[1]
    logits = attack.logits.clone()
    clean = decided(attack_study.clean_logits) == attack_study.labels.numpy()
    shaken = np.flatnonzero(clean)[:4]  # the start flips these, and brings one clean error back
    logits[0, shaken] *= -1
    logits[:, np.flatnonzero(~clean)[0]] *= -1
    study = with_attack(attack_study, "ifgsm sum", logits=logits, iteration=iteration)
    found = findings(study, n_resamples=5)
    wrong = (decided(logits) != attack_study.labels.numpy())[: iteration + 1, clean]
    flips = [int(np.argmax(course)) for course in wrong.T if course.any()]
    assert flips.count(0) == len(shaken)
    assert found["attacks"]["ifgsm sum"]["steps_to_flip"] == {
        "median": np.median(flips),
        "share_flipped": len(flips) / clean.sum(),
    }
    assert f"half of the flips by step {np.median(flips):g}" in text(found)
    assert f"- *ifgsm sum*: step 0.05, alpha 0.1, iteration {iteration} of 10, restart 0, the best of" in text(found)


def test_a_judge_beside_the_panel_is_shown_and_in_no_mean_of_it(attack_study, found):
    study = with_judge(attack_study, "two statistics", role="beside")
    beside = findings(study, n_resamples=DRAWS)
    assert beside["panel"] == [name for name in PANEL if name != "two statistics"]
    assert beside["judges"]["two statistics"] == found["judges"]["two statistics"] | {"role": "beside"}
    for name, attack in beside["attacks"].items():
        assert attack["judges"] == found["attacks"][name]["judges"], "each judge as before"
        rates = [attack["judges"][judge]["detection"]["0.05"] for judge in beside["panel"]]
        assert attack["panel"]["detection"]["0.05"]["mean"] == pytest.approx(np.mean(rates))
        assert attack["intervals"]["joint_success"][0] == pytest.approx(
            attack["panel"]["joint_success"]["0.05"]["mean"]
        )
    assert any("| two statistics | beside |" in line for line in judges_table(beside))


def test_several_attacked_detectors_are_pooled_by_both_rules(make_attack_study):
    study = make_attack_study(n_attacked=2)
    found = findings(study, n_resamples=20)
    attack, judges = study.attacks[1], study.judges[:2]
    clean = np.maximum(*(judge.clean.numpy() for judge in judges))
    scores = [attack.scores[judge.name].numpy() for judge in judges]
    truth = np.repeat([0, 1], len(clean))
    for rule, adversarial in (("published", np.minimum(*scores)), ("max", np.maximum(*scores))):
        f1 = f1_score(truth, np.concatenate([clean, adversarial]) >= 0.5)
        conc = found["attacks"][attack.name]["attacked"][rule]["concealability"]["f1"]
        assert conc == pytest.approx(1 - f1)
    interval = found["attacks"][attack.name]["intervals"]["concealability"]
    assert interval[0] == pytest.approx(found["attacks"][attack.name]["attacked"]["published"]["concealability"]["f1"])
    assert "favours the attacker" in text(found)


def test_the_headline_is_chosen_on_validation(attack_study, found):
    assert found["headline"] == "ifgsm sum"
    better = torch.ones_like(attack_study.attacks[4].validation_concealability)
    other = findings(with_attack(attack_study, "pgd sum", validation_concealability=better), n_resamples=5)
    assert other["headline"] == "pgd sum"
    best, worst = found["attacks"]["ifgsm sum"], found["attacks"]["ifgsm sum"]["panel"]["joint_success"]["0.05"]
    middle, low, high = best["intervals"]["joint_success"]
    first = text(found).split("\n")[0]
    assert f"against held-out judges: {middle:.2f} [{low:.2f}, {high:.2f}]** for *ifgsm sum*" in first
    assert f"{worst['worst']:.2f} against *{worst['judge']}*" in first
    assert "so concealment adds +" in first


def doing_nothing_looks_best(study, name):
    """On validation, the victim errs and nothing is seen at iterate 0, which is no attack."""
    effect, hidden = (
        getattr(next(one for one in study.attacks if one.name == name), f"validation_{of}").clone()
        for of in ("effectiveness", "concealability")
    )
    effect[:, 0], hidden[:, 0] = 0.99, 1.0
    return with_attack(study, name, validation_effectiveness=effect, validation_concealability=hidden)


def test_no_attack_is_no_candidate(attack_study, found):
    study = doing_nothing_looks_best(attack_study, "pgd sum")
    assert best_concealed(study).name == found["headline"] == "ifgsm sum"
    area = findings(study, n_resamples=5)["attacks"]["pgd sum"]["pareto_area"]
    attack = attack_study.attacks[4]
    points = list(
        zip(
            attack.validation_effectiveness[:, 1:].flatten().tolist(),
            attack.validation_concealability[:, 1:].flatten().tolist(),
            strict=True,
        )
    )
    corners = sorted({0.0, *(effect for effect, _ in points)})
    by_hand = sum(
        (right - left) * max(hidden for effect, hidden in points if effect >= right)
        for left, right in pairwise(corners)
    )
    assert area == pytest.approx(by_hand)
    assert all(row["iteration"] > 0 for row in pareto_points(study))


def test_points_of_the_fronts_are_what_no_candidate_beats(attack_study):
    grid = tuple(grid_points(steps=[0.05, 0.1], alphas=[0.1, 0.3]))
    random = torch.Generator().manual_seed(0)
    study = with_attack(attack_study, "ifgsm sum", configurations=grid)
    for attack in study.attacks:  # of ninths, so that candidates tie in one of the two and in both
        effect, hidden = (torch.randint(10, (4, 11), generator=random).double() / 9 for _ in range(2))
        study = with_attack(
            study, attack.name, validation_effectiveness=effect, validation_concealability=hidden * (1 - effect)
        )
    rows = pareto_points(study)
    assert {row["attack"] for row in rows} == {one.name for one in study.attacks}
    for attack in study.attacks:
        effect, hidden = (of.numpy() for of in attack.candidates)
        wanted = {
            (g, n + 1)
            for g, n in np.ndindex(effect.shape)
            if not (
                (effect >= effect[g, n]) & (hidden >= hidden[g, n]) & ((effect + hidden) > (effect + hidden)[g, n])
            ).any()
        }
        own = [row for row in rows if row["attack"] == attack.name]
        values = {(effect[g, n - 1], hidden[g, n - 1]) for g, n in wanted}
        assert {(row["effectiveness"], row["concealability"]) for row in own} == values
        assert len(own) == len(values), "one of equals"
        for row in own:
            at = (row["configuration"], row["iteration"] - 1)
            assert (row["configuration"], row["iteration"]) in wanted
            assert (row["effectiveness"], row["concealability"]) == (effect[at], hidden[at])
            harmonic = 2 * effect[at] * hidden[at] / ((effect[at] + hidden[at]) or 1)
            assert row["success"] == pytest.approx(harmonic)
            if attack.name == "ifgsm sum":
                assert (row["step"], row["alpha"]) == (grid[at[0]].step, grid[at[0]].alpha)
            else:
                assert (row["step"], row["alpha"], row["restart"]) == (None, None, None), "not known"


def test_a_concealed_attack_of_weight_zero_is_said_not_to_hide(attack_study, found):
    assert "the weight 0" not in text(found)
    weightless = text(findings(with_attack(attack_study, "ifgsm sum", alpha=0.0), n_resamples=5))
    assert "- *ifgsm sum*: validation gave concealment the weight 0, so it does not hide." in weightless


def levels_of(*aucs):
    """A judge's own levels, and a round that counts for nothing."""
    vanilla = [SeenLevel("ifgsm", 0.1 / (1 + number), False, auc) for number, auc in enumerate(aucs)]
    return (*vanilla, SeenLevel("concealed", None, True, 0.1))


def test_a_trained_judge_is_valid_by_its_own_levels(attack_study):
    """It may see vanilla attacks well and its own badly, and the other way round."""
    study = with_judge(attack_study, ATTACKED, levels=levels_of(0.9, 0.6))
    study = with_judge(study, "LSTM, seed 9", levels=levels_of(0.95, 0.75))
    found = findings(study, n_resamples=5)
    seeing, blind = found["judges"]["LSTM, seed 9"], found["judges"][ATTACKED]
    assert blind["vanilla_auc"] > 0.8 > seeing["vanilla_auc"]
    assert (blind["trained_auc"], blind["valid"]) == (pytest.approx(0.75), False)
    assert (seeing["trained_auc"], seeing["valid"]) == (pytest.approx(0.85), True)
    assert "LSTM, seed 9" in found["panel"]
    assert blind["levels"][1] == {"attack": "ifgsm", "strength": 0.05, "concealed": False, "auc": 0.6}
    why = "its mean AUC on the attacks it was trained against is 0.75 on validation"
    assert f"*{ATTACKED}* is not a valid judge: {why}, at least 0.80 is asked for" in text(found)
    rows = "\n".join(judges_table(found))
    assert f"| 0.75 (0.60 to 0.90) | not a valid judge: {why} |" in rows
    assert "| 0.85 (0.75 to 0.95) | yes |" in rows
    assert "| trained on none | yes |" in rows


def test_a_gain_before_a_blind_detector_or_without_a_success_is_qualified(attack_study, found):
    assert "- But" not in text(found)
    blind = text(findings(with_judge(attack_study, ATTACKED, levels=levels_of(0.5)), n_resamples=5))
    pays, rest = blind.split("Does it survive judges it never saw?")
    assert (
        f"- But *{ATTACKED}* is not a valid judge (its mean AUC on the attacks it was trained against is 0.50" in pays
    )
    assert "- But" not in rest
    still = with_attack(attack_study, "ifgsm sum", logits=attack_study.clean_logits.expand(11, -1, -1))
    lines = text(findings(still, n_resamples=5)).split("\n")
    assert [line for line in lines if line.startswith("- But")] == [
        "- But *ifgsm sum* fools none of the 38 series that were called rightly: its EFF is the victim's own errors, "
        "its F no success."
    ]


def test_verdicts_follow_the_numbers(attack_study, found):
    ahead, behind = "the 95 % interval of the difference above zero: ", "It takes away, the interval below zero: "
    pays, survives = text(found).split("Does it survive judges it never saw?")
    assert ahead + "ifgsm sum (" in pays
    assert ahead + "ifgsm sum (" in survives
    loud = torch.full((40,), 0.999, dtype=torch.float64)
    caught = findings(with_scores(attack_study, ATTACKED, ifgsm_sum=loud), n_resamples=DRAWS)
    assert behind + "ifgsm sum (-" in text(caught).split("Does it survive")[0]
    for judge in PANEL:
        attack_study = with_scores(attack_study, judge, ifgsm_sum=1e9 + loud)
    seen = findings(attack_study, n_resamples=DRAWS)
    assert behind + "ifgsm sum (-" in text(seen).split("Does it survive")[1]
    assert "- *ifgsm sum*: *S4, seed 7* sees 100%, the panel 100%; the attacked detector sees" in text(seen)


def test_too_few_calibration_series_are_said_to_be_too_few(make_attack_study):
    for n_calibration, few, enough in ((18, ("5 %", "1 %"), ()), (19, ("1 %",), ("5 %",)), (99, (), ("5 %", "1 %"))):
        found = findings(make_attack_study(n_calibration=n_calibration), n_resamples=5)
        said = text(found)
        for rate in few:
            assert f"At {rate} false alarms not resolvable (n = {n_calibration}): *{ATTACKED}*" in said
        for rate in enough:
            assert f"At {rate} false alarms not resolvable" not in said
        assert (
            f"**Joint success at 5 % false alarms against held-out judges: not resolvable (n = {n_calibration}).**"
            in said
        ) == ("5 %" in few)
        if "5 %" in few:
            assert found["attacks"]["ifgsm"]["judges"][ATTACKED]["joint_success"]["0.05"] is None
            assert f"| not resolvable (n = {n_calibration}) |" in table(found)[4]
        joint = table(found)[4].split(" | ")[5:7]
        assert ["not resolvable" in cell for cell in joint] == [rate in few for rate in ("5 %", "1 %")]


def test_detection_at_one_percent_is_shown_from_99_series_on(make_attack_study):
    for n, enough in ((98, False), (99, True)):
        found = findings(make_attack_study(n=n), n_resamples=5)
        row, cells = found["attacks"]["ifgsm sum"], table(found)[5].split(" | ")[7:9]
        panel = row["panel"]["detection"]["0.01"]
        shown = [f"{row['judges'][ATTACKED]['detection']['0.01']:.2f}", f"{panel['mean']:.2f} ({panel['worst']:.2f})"]
        assert [cell.split(" / ")[1] for cell in cells] == (shown if enough else [f"not resolvable (n = {n})"] * 2)


def test_degenerate_cases_are_flagged(attack_study):
    zeros = torch.zeros(40, dtype=torch.float64)
    everywhere = {one.name.replace(" ", "_"): zeros for one in attack_study.attacks}
    silent = findings(with_scores(attack_study, ATTACKED, zeros, **everywhere), n_resamples=5)
    assert silent["attacks"]["ifgsm"]["attacked"]["published"]["concealability"]["f1"] == 1.0
    assert silent["judges"][ATTACKED]["vanilla_auc"] == 0.5
    assert f"*{ATTACKED}* calls every series clean: CONC in the F1 form is 1" in text(silent)
    assert f"*{ATTACKED}* is not a valid judge: its AUC on vanilla attacks is 0.50" in text(silent)
    ones = dict.fromkeys(everywhere, zeros + 1)
    alarmed = findings(with_scores(attack_study, ATTACKED, zeros + 1, **ones), n_resamples=5)
    assert alarmed["attacks"]["ifgsm"]["attacked"]["published"]["concealability"]["f1"] == pytest.approx(1 / 3)
    assert "calls every series adversarial: CONC in the F1 form is 1/3" in text(alarmed)
    constant = replace(attack_study, clean_logits=-torch.ones(40, 1))
    assert "The victim gives all clean series one class" in text(findings(constant, n_resamples=5))
    collapsed = with_attack(attack_study, "ifgsm", logits=-torch.ones(11, 40, 1))
    found = findings(collapsed, n_resamples=5)
    assert found["attacks"]["ifgsm"]["effectiveness"] == 1.0
    assert found["attacks"]["ifgsm"]["roc_auc"] == 0.5, "all ties"
    assert "Under *ifgsm* the victim gives every series one class: EFF 1.00 at accuracy 0.50" in text(found)
    assert "*noise* moves no series" in text(found)


def test_a_detector_read_upside_down_is_no_evasion(attack_study):
    clean = attack_study.judges[0].clean
    found = findings(with_scores(attack_study, ATTACKED, ifgsm_sum=clean * 1e-3), n_resamples=5)
    forms = found["attacks"]["ifgsm sum"]["judges"][ATTACKED]["concealability"]
    assert forms["f1"] == 1.0
    assert forms["auc_two_sided"] < 0.1
    assert f"Read upside down, these judges detect: *{ATTACKED}* before *ifgsm sum*" in text(found)
    assert "contradict each other" in text(found)


def test_false_alarms_beyond_the_promise_are_told(attack_study):
    loud = with_judge(attack_study, "statistics", calibration=torch.full((120,), 1e-6))
    said = text(findings(loud, n_resamples=5))
    assert (
        "- *statistics* promised 5 %: 1.000 [0.912, 1.000], where calibration leaves 0.000 to 0.200 to chance; " in said
    )
    assert "; more, so joint success is too low." in said
    quiet = with_judge(attack_study, "statistics", clean=torch.zeros(1000), calibration=torch.ones(120))
    said = text(findings(quiet, n_resamples=5))
    assert "- *statistics* promised 5 %: 0.000 [0.000, 0.004], where calibration leaves 0.0" in said
    assert "; fewer, as a conformal bound allows: the threshold is conservative, and joint success at exactly" in said


def test_saturated_victims_are_flagged(make_attack_study, found):
    assert not found["victim"]["saturated"]
    assert "saturated" not in text(found)
    saturated = findings(make_attack_study(n=20, saturation=17.1), n_resamples=5)
    assert saturated["victim"]["saturated"]
    assert "**The victim is saturated** (median |logit| 17.1, above 17)" in text(saturated)


def test_tables_have_one_row_an_attack_and_one_a_judge(attack_study, found):
    lines = table(found)
    assert lines[0] == "# Test report: 40 series, 30 steps, 1 channel, 2 classes"
    assert len(lines) == 4 + len(attack_study.attacks)
    assert {line.count("|") for line in lines[2:]} == {13}
    row = found["attacks"]["ifgsm sum"]
    pooled, norms = row["attacked"]["published"], row["norms"]
    cell = f"{pooled['concealability']['f1']:.2f} / {pooled['success']['f1']:.2f}"
    assert f"| ifgsm sum | {row['effectiveness']:.2f} | {cell} |" in lines[5]
    assert lines[5].endswith(f"| {row['accuracy']:.2f} | {norms['linf']:.3g} | {norms['l2']:.3g} |")
    assert "at 5 % false alarms: mean [95 %] (worst judge) | joint success against the panel at 1 %" in lines[2]
    for rate, measure in (("0.05", "joint_success"), ("0.01", "joint_success_0.01")):
        middle, low, high = row["intervals"][measure]
        assert middle == pytest.approx(row["panel"]["joint_success"][rate]["mean"])
        assert (
            f"| {middle:.2f} [{low:.2f}, {high:.2f}] ({row['panel']['joint_success'][rate]['worst']:.2f}) |" in lines[5]
        )
    own, panel = row["judges"][ATTACKED]["detection"]["0.05"], row["panel"]["detection"]["0.05"]
    few = "not resolvable (n = 40)"  # a rate of 1 % off a ROC curve takes 99 clean series
    assert f"| {own:.2f} / {few} | {panel['mean']:.2f} ({panel['worst']:.2f}) / {few} |" in lines[5]
    lines = classifier_table(found)
    assert len(lines) == 3 + len(attack_study.attacks)
    assert {line.count("|") for line in lines} == {12}
    decided = " | ".join(f"{row[key]:.2f}" for key in ("accuracy", "accuracy_on_correct", "fooling_rate", "f1"))
    assert lines[4].startswith(f"| ifgsm sum | {decided} | {row['roc_auc']:.2f} | {row['average_precision']:.2f} |")
    shares = f"{row['bad_gradients']:.1%} | {row['zero_gradients']:.1%}"
    assert "| N, steps of the run | bad gradients of N | zero gradients of N | ms a series for N |" in lines[0]
    assert lines[4].endswith(f"| 10 | {shares} | 10 |"), "10 steps, of which 8 were chosen; 0.01 s a series"
    assert f"| clean series | {found['victim']['accuracy']:.2f} | " in lines[2]
    assert len(judges_table(found)) == 2 + len(attack_study.judges)
    assert {line.count("|") for line in judges_table(found)} == {9}
    piped = findings(with_attack(attack_study, "sgm", name="a|b"), n_resamples=5)
    assert "| a\\|b |" in "\n".join(table(piped))


@pytest.mark.parametrize(
    "bare",
    [
        pytest.param({"n_attacked": 0}, id="no attacked detector"),
        pytest.param({"n_classes": 4, "n": 12}, id="four classes"),
        pytest.param({"attacks": (("pgd", "pgd", False),)}, id="one vanilla attack"),
        pytest.param({"attacks": (("pgd sum", "pgd", True),)}, id="one concealed attack"),
        pytest.param({"judges": (("ResCNN", "attacked", True, 2.0),)}, id="no held-out judge"),
        pytest.param({"n_attacked": 0, "judges": (("ResCNN", "attacked", True, 2.0),)}, id="no judge"),
    ],
)
def test_works_without(make_attack_study, bare):
    found = findings(make_attack_study(**bare), n_resamples=5)
    assert json.loads(json.dumps(found, allow_nan=False)) == found  # raises on nan
    said = text(found)
    assert table(found)
    if bare.get("n_attacked") == 0:
        assert found["attacks"]["ifgsm"]["attacked"] is None
        assert "no detector" in table(found)[4]
        assert "Does concealment pay" not in said
    if "judges" in bare:
        assert "no held-out judge is valid" in said
        assert "no valid judge" in table(found)[4]
    if bare.get("attacks") == (("pgd", "pgd", False),):
        assert said.startswith("No concealed attack was run")
    if bare.get("attacks") == (("pgd sum", "pgd", True),):
        assert "no vanilla attack was run to judge it by" in said
        assert found["judges"][ATTACKED]["vanilla_auc"] is None


def test_same_study_same_findings(attack_study, found):
    assert findings(attack_study, n_resamples=DRAWS) == found
    other = findings(replace(attack_study, seed=attack_study.seed + 1), n_resamples=DRAWS)
    assert other["attacks"]["ifgsm"]["intervals"] != found["attacks"]["ifgsm"]["intervals"]


def test_bad_studies_and_arguments(attack_study):
    with pytest.raises(ValueError, match=r"at least one attack, and names that differ; attacks are \[\]"):
        findings(replace(attack_study, attacks=()))
    with pytest.raises(ValueError, match=r"names that differ; judges are \['ResCNN, seed 0', 'ResCNN, seed 0'\]"):
        findings(replace(attack_study, judges=attack_study.judges[:1] * 2))
    for arguments, message in (
        ({"n_resamples": 0}, "n_resamples must be at least 1, got 0"),
        ({"level": 1.0}, "level must be .*, got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            findings(attack_study, **arguments)
        with pytest.raises(ValueError, match=message):
            AttackReport(**arguments)


class Series(LightningDataModule):
    """Two batches, and facts of the set."""

    def test_dataloader(self):
        return DataLoader(torch.arange(2))

    def report_facts(self):
        return {"set": "GunPoint", "gaps": float("nan")}


class Outcomes(LightningModule):
    """Returns what it was given for each batch."""

    def __init__(self, *outcomes):
        super().__init__()
        self.outcomes = outcomes

    def test_step(self, batch, batch_idx):
        return self.outcomes[batch_idx]


def rows_of(study, rows):
    """Part of a study, as a batch of it."""
    return replace(
        study,
        **{name: getattr(study, name)[rows] for name in ("series", "mask", "labels", "index", "clean_logits")},
        judges=tuple(replace(judge, clean=judge.clean[rows]) for judge in study.judges),
        attacks=tuple(
            replace(
                attack,
                x_adv=attack.x_adv[rows],
                logits=attack.logits[:, rows],
                detector_logits=attack.detector_logits[:, :, rows],
                scores={name: values[rows] for name, values in attack.scores.items()},
                n_bad_gradients=attack.n_bad_gradients[rows],
                n_zero_gradients=attack.n_zero_gradients[rows],
                seconds=attack.seconds / 2,
            )
            for attack in study.attacks
        ),
    )


def run_test(folder, *outcomes):
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[AttackReport(n_resamples=20)],
    )
    trainer.test(Outcomes(*outcomes), Series(), verbose=False)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_of_a_victim_that_calls_nothing_rightly_no_verdict_is_given(attack_study):
    wrong = replace(attack_study, labels=1 - torch.as_tensor(decided(attack_study.clean_logits)))
    told = text(findings(wrong, n_resamples=20))
    assert "The victim calls no clean series rightly: nothing here says what an attack does" in told
    assert "Does concealment pay" not in told
    assert "Does concealment pay" in text(findings(attack_study, n_resamples=20))


def test_callback_joins_batches_and_writes_a_report(make_attack_study, tmp_path, capsys):
    study = make_attack_study(n=20, attacks=(("ifgsm", "ifgsm", False), ("ifgsm sum", "ifgsm", True)))
    run_test(tmp_path, rows_of(study, slice(0, 10)), rows_of(study, slice(10, 20)))
    folder = tmp_path / "report"
    assert f"seqlit: report in {folder}" in capsys.readouterr().out
    written = json.loads((folder / "metrics.json").read_text())
    assert written["attacks"] == findings(study, n_resamples=20)["attacks"]
    assert written["data"] == {"set": "GunPoint", "gaps": None}
    report = (folder / "report.md").read_text()
    assert report.startswith("# Test report: 20 series of GunPoint, 30 steps, 1 channel, 2 classes")
    assert "| judge | role |" in report
    assert "| victim on | accuracy |" in report
    assert "pareto.csv has EFF, CONC, F, strengths and iteration" in report
    points = pl.read_csv(folder / "pareto.csv")
    assert points.to_dicts() == pl.DataFrame(pareto_points(study), infer_schema_length=None).to_dicts()
    assert points.columns[:6] == ["attack", "family", "concealed", "effectiveness", "concealability", "success"]
    assert not list(folder.glob(".*"))  # no draft is left


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_callback_refuses_other_outputs(tmp_path):
    with pytest.raises(ValueError, match="AttackReport needs AttackStudy from test_step, got dict"):
        run_test(tmp_path, {"loss": torch.zeros(())})
