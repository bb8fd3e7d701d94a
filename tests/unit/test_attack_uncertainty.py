"""What an attack report says of chance: few or no successes, false alarms, small calibration sets."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import beta

from lightning_modules.attacks.findings import findings
from lightning_modules.attacks.study import SeenLevel
from lightning_modules.attacks.thresholds import Threshold
from lightning_modules.callbacks.attack_text import sentences, table

TWO = (("ifgsm", "ifgsm", False), ("ifgsm sum", "ifgsm", True))
ONE_JUDGE = (("ResCNN", "attacked", True, 2.5), ("statistics", "held_out", False, 3.0))
THREE_JUDGES = (*ONE_JUDGE, ("nearest neighbour", "held_out", False, 2.5), ("one-class SVM", "held_out", False, 2.5))
ALARMS = "False alarms on clean test series that the promised rate does not explain"


def text(found):
    return "\n".join(sentences(found))


def with_scores_of_held_out_judges(study, **scores):
    """Each held-out judge gives all series of an attack one score (spaces of its name as underscores)."""
    names = [judge.name for judge in study.judges if judge.role == "held_out"]
    attacks = []
    for one in study.attacks:
        score = scores.get(one.name.replace(" ", "_"))
        given = {} if score is None else dict.fromkeys(names, torch.full((len(study.labels),), score).double())
        attacks.append(replace(one, scores=one.scores | given))
    return replace(study, attacks=tuple(attacks))


def fooling_all_but(study, *rows):
    """Both attacks flip every series that is called rightly, but for these rows."""
    kept = torch.isin(torch.arange(len(study.labels)), torch.tensor(rows))[:, None]
    logits = torch.where(kept, study.clean_logits, -(2.0 * study.labels[:, None] - 1)).expand(11, -1, -1)
    return replace(study, attacks=tuple(replace(one, logits=logits) for one in study.attacks))


@pytest.mark.parametrize("judges", [ONE_JUDGE, THREE_JUDGES])
@pytest.mark.parametrize("flagged", [True, False])
def test_all_or_no_joint_success_is_not_certain(make_attack_study, judges, flagged):
    study = fooling_all_but(make_attack_study(n=150, attacks=TWO, judges=judges), -1)
    score = 1e9 if flagged else 0.0
    caught = with_scores_of_held_out_judges(study, ifgsm=score, ifgsm_sum=score)
    seeing = (SeenLevel("ifgsm", 0.1, False, 0.9),)  # valid, though no attack of this test is seen
    caught = replace(caught, judges=tuple(replace(one, levels=seeing) for one in caught.judges))
    found = findings(caught, n_resamples=200)
    n_correct, n_judges = found["victim"]["n_correct"], len(judges) - 1
    assert len(found["panel"]) == n_judges
    end = 1 - (0.025 / n_judges) ** (1 / n_correct)  # Clopper-Pearson of 0 hits, by Bonferroni for the judges
    wanted = [0.0, 0.0, end] if flagged else [1.0, 1 - end, 1.0]
    both = 1 - (0.0125 / n_judges) ** (1 / n_correct)  # gains and losses, 0 of each
    for rate in ("joint_success", "joint_success_0.01"):
        assert found["attacks"]["ifgsm sum"]["intervals"][rate] == pytest.approx(wanted)
        assert found["attacks"]["ifgsm sum"]["minus_vanilla"][rate] == pytest.approx([0.0, -both, both])
    told = f"{wanted[0]:.2f} [{wanted[1]:.2f}, {wanted[2]:.2f}]"
    said = text(found)
    assert f"against held-out judges: {told}** for *ifgsm sum*" in said
    assert f"so concealment adds +0.000 [-{both:.3f}, +{both:.3f}]." in said
    assert f"At 1 % false alarms, mean (worst judge): {told} ({wanted[0]:.2f})." in said
    assert f"| {told} ({wanted[0]:.2f}) | {told} ({wanted[0]:.2f}) |" in table(found)[5]
    assert "simultaneous Clopper-Pearson" in said


def test_joint_success_covers_the_bootstrap_too(make_attack_study):
    study = make_attack_study(n=60, attacks=TWO, judges=THREE_JUDGES)
    found = findings(study, n_resamples=200)
    attack = study.attacks[1]
    correct = (study.clean_logits[:, 0] >= 0).long() == study.labels
    wrong = (attack.logits[attack.iteration][:, 0] >= 0).long() != study.labels
    hidden, counts = [], []
    for judge in study.judges[1:]:
        limit = judge.calibration.sort().values[114]  # ceil(121 * 0.95) of 120
        hidden.append((correct & wrong & (attack.scores[judge.name] <= limit)).numpy())
        counts.append(hidden[-1].sum())
    drawn = np.random.default_rng(study.seed).integers(60, size=(200, 60))
    share = np.mean(hidden, 0)
    ends = np.quantile(share[drawn].sum(1) / correct.numpy()[drawn].sum(1), [0.025, 0.975])
    n, tail = int(correct.sum()), 0.025 / 3
    exact = [
        np.mean([beta.ppf(tail, k, n - k + 1) for k in counts]),
        np.mean([beta.ppf(1 - tail, k + 1, n - k) for k in counts]),
    ]
    assert 0 < min(counts) <= max(counts) < n, "both ends are quantiles of a beta distribution"
    wanted = [min(ends[0], exact[0]), max(ends[1], exact[1])]
    assert found["attacks"]["ifgsm sum"]["intervals"]["joint_success"][1:] == pytest.approx(wanted)


def test_a_measure_that_no_resample_moves_has_no_interval(make_attack_study):
    """Both attacks hide entirely from the attacked detector and fool all: EFF, CONC and F are 1 in each resample."""
    study = make_attack_study(n=40, attacks=TWO)
    attacked = study.judges[0].name
    unseen = tuple(
        replace(
            one,
            scores=one.scores | {attacked: torch.zeros(40, dtype=torch.float64)},
            logits=-(2.0 * study.labels[:, None] - 1).expand(11, -1, -1),
        )
        for one in study.attacks
    )
    found = findings(replace(study, attacks=unseen), n_resamples=200)
    row = found["attacks"]["ifgsm sum"]
    for measure in ("effectiveness", "concealability", "success"):
        assert row["intervals"][measure] == [1.0, None, None]
        assert row["minus_vanilla"][measure] == [0.0, None, None]
    said = text(found)
    assert "- The bootstrap cannot resolve the difference, the same in all resamples: ifgsm sum (+0.000)." in said
    assert "+0.000 [+0.000, +0.000]" not in said


@pytest.mark.parametrize(("n", "n_calibration"), [(150, 50), (60, 120)])
def test_calibrated_reports_seldom_complain_of_false_alarms(make_attack_study, n, n_calibration):
    """Clean scores and calibration from one distribution: at most 5 % of reports complain, but for chance."""
    study = make_attack_study(n=n, n_steps=4, n_calibration=n_calibration, attacks=TWO[:1], judges=THREE_JUDGES)
    random = torch.Generator().manual_seed(0)
    n_complaints = 0
    for _ in range(100):
        judges = tuple(
            replace(
                one,
                clean=torch.rand(n, generator=random, dtype=torch.float64),
                calibration=torch.rand(n_calibration, generator=random, dtype=torch.float64),
            )
            for one in study.judges
        )
        n_complaints += ALARMS in text(findings(replace(study, judges=judges), n_resamples=1))
    assert n_complaints <= 10  # 5 of 100 on average at the most, then above 10 with probability 0.01


@pytest.mark.parametrize(
    ("n", "scale", "words"),
    [
        pytest.param(150, 3.0, "more, so joint success is too low", id="too many"),
        pytest.param(600, 0.2, "fewer, as a conformal bound allows: the threshold is conservative", id="too few"),
    ],
)
def test_false_alarms_of_badly_calibrated_judges_are_told(make_attack_study, n, scale, words):
    study = make_attack_study(n=n, n_steps=4, n_calibration=120, attacks=TWO[:1], judges=ONE_JUDGE)
    normal = torch.randn(n + 120, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    off = replace(study.judges[1], clean=scale * normal[:n], calibration=normal[n:])
    found = findings(replace(study, judges=(study.judges[0], off)), n_resamples=5)
    said = text(found).split(ALARMS)[1]
    limit = found["judges"]["statistics"]["thresholds"]["0.05"]
    fewest, most = limit["expected_false_alarms"]
    assert f"where calibration leaves {fewest:.3f} to {most:.3f} to chance; {words}" in said
    assert (limit["false_alarms"][0] > most) == (scale > 1)
    # a twentieth of chance for the four thresholds of two judges at two rates together
    ends = Threshold(0.05, 120, 0.0).expected_alarms(n, 1 - 0.05 / 4)
    assert [fewest * n, most * n] == pytest.approx(ends)
