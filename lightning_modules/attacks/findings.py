"""From a study to numbers: what each attack breaks, how well it hides from each judge, and what concealment adds.

n series, K classes, M attacked detectors, J judges, m calibration series, S resamples. Everything here is plain:
numbers, strings, lists, mappings, and None for what is not defined, so that it can be written as JSON as it is. Rates
of false alarms are keys as one writes them, "0.05" and "0.01".
A trained discriminator is a valid judge by what it was declared to see: its mean AUC over its vanilla training attacks
and their strengths, not over rounds, whose series were made to pass it. The vanilla attack of the test does not decide
of it, though its AUC stands beside: validation may choose so small a step that nobody could see it, or one so large
that anybody could. Judges that trained on no attack have only that one to go by.
Source: spec of arXiv 2502.20948, sections 6 (roles), 9 (metrics), 11 (T6, T12) and 12.3; the panel is ours.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from lightning_modules.attacks.class_losses import decisions
from lightning_modules.attacks.judges import valid_judge
from lightning_modules.attacks.selection import pareto_area, pareto_front
from lightning_modules.attacks.study import AttackStudy, ChosenAttack, JudgeRecord
from lightning_modules.attacks.study_bootstrap import FALSE_ALARMS, Decided, baseline_of, intervals
from lightning_modules.attacks.thresholds import Threshold, binomial_share, conformal_threshold, n_clean_required
from lightning_modules.metrics.attack_classifier_functional import (
    classifier_auc,
    classifier_average_precision,
    gradient_rate,
)
from lightning_modules.metrics.attack_functional import (
    ConcealabilityForm,
    accuracy,
    accuracy_on_correct,
    attack_success_rate,
    classifier_f1,
    concealability,
    detection_rate,
    detector_auc,
    dtw,
    effectiveness,
    fooling_rate,
    hidden_probability,
    perturbation_norms,
    pool_detectors,
    roughness,
    steps_to_flip,
    success_f,
)
from lightning_modules.portfolio.findings import plain

Findings = dict[str, Any]
"""What :func:`findings` returns."""

SATURATED = 17.0
"""Median |logit| above which cross-entropy is flat in float32 (T3)."""

DTW_BAND = 0.1
"""Half-width of the Sakoe-Chiba band as a share of the steps: what a series is moved in time stays near."""

_FORMS: tuple[ConcealabilityForm, ...] = get_args(ConcealabilityForm)


def key(false_alarm_rate: float) -> str:
    """A rate of false alarms as a key."""
    return f"{false_alarm_rate:g}"


def best_concealed(study: AttackStudy) -> ChosenAttack | None:
    """The concealed attack of largest F on validation, the first of equals; None without one.

    By validation, so that the attack in the headline is not the one that test series flatter; over what could be
    chosen, for with a poor victim no attack at all has an F too.
    """

    def validated(attack: ChosenAttack) -> float:
        return max(success_f(*attack.candidates).nan_to_num(-1.0).flatten().tolist(), default=-1.0)

    return max((attack for attack in study.attacks if attack.concealed), key=validated, default=None)


def pareto_points(study: AttackStudy) -> list[dict[str, Any]]:
    """The non-dominated candidates of each attack on validation, EFF ascending.

    Returns:
        Rows of ``attack``, ``family``, ``concealed``, ``effectiveness``, ``concealability``, ``success`` (F1 form),
        ``configuration`` (its number in the grid), ``step``, ``radius``, ``alpha``, ``restart`` (None for the attack's
        own value, or where configurations are not known) and ``iteration``, 1..N.
    """
    rows: list[dict[str, Any]] = []
    for attack in study.attacks:
        effect, hidden = attack.candidates
        for place in pareto_front(effect, hidden).tolist():
            number, column = np.unravel_index(place, effect.shape)
            point = attack.configurations[number] if attack.configurations else None
            at = (number, column)
            rows.append(
                {
                    "attack": attack.name,
                    "family": attack.family,
                    "concealed": attack.concealed,
                    "effectiveness": float(effect[at]),
                    "concealability": float(hidden[at]),
                    "success": float(success_f(effect[at], hidden[at])),
                    "configuration": int(number),
                    **{name: getattr(point, name, None) for name in ("step", "radius", "alpha", "restart")},
                    "iteration": int(column) + 1,
                }
            )
    return rows


def vanilla_attacks(study: AttackStudy) -> list[ChosenAttack]:
    """The attacks that a judge must see: baselines of concealed attacks; without any, all that are not concealed.

    An attack that moves no series is left out, for nobody could see it, and so is noise beside real baselines.
    """
    moving = [
        one
        for one in study.attacks
        if not one.concealed and bool(((one.x_adv != study.series).any(2) & study.mask).any())
    ]
    families = {one.family for one in study.attacks if one.concealed}
    return [one for one in moving if one.family in families] or moving


def vanilla_aucs(study: AttackStudy) -> dict[str, float]:
    """AUC of each judge on :func:`vanilla_attacks` together, the mean of its AUCs on each; NaN without one."""
    attacks = vanilla_attacks(study)
    return {
        judge.name: sum(float(detector_auc(judge.clean, attack.scores[judge.name])) for attack in attacks)
        / len(attacks)
        if attacks
        else float("nan")
        for judge in study.judges
    }


def trained_auc(judge: JudgeRecord) -> float | None:
    """Mean AUC of a trained discriminator over its vanilla training attacks and their strengths; None for others.

    On validation series. Attacks of rounds are left out: they were made to pass it.
    """
    own = [level.auc for level in judge.levels if not level.concealed]
    return sum(own) / len(own) if own else None


def _deciding_auc(judge: JudgeRecord, vanilla_auc: float) -> float:
    """The AUC that makes a judge valid or not."""
    trained = trained_auc(judge)
    return vanilla_auc if trained is None else trained


def _thresholds(judge: JudgeRecord) -> dict[str, Threshold]:
    return {key(rate): conformal_threshold(judge.calibration, rate) for rate in FALSE_ALARMS}


def _one_answer(judge: JudgeRecord, study: AttackStudy) -> str | None:
    """The answer of a network that gives the same at 0.5 for every series, clean or attacked (T6), else None."""
    if not judge.is_probability:
        return None
    called = torch.cat([judge.clean, *(attack.scores[judge.name] for attack in study.attacks)]) >= 0.5
    return "adversarial" if bool(called.all()) else None if bool(called.any()) else "clean"


def _alarms(judge: JudgeRecord, threshold: Threshold, level: float, n_thresholds: int) -> dict[str, Any]:
    """Realised false alarms, and the shares that calibration leaves to chance for all thresholds together."""
    if not threshold.resolvable:
        return {"false_alarms": None, "expected_false_alarms": None}
    n = len(judge.clean)
    fewest, most = threshold.expected_alarms(n, 1 - (1 - level) / n_thresholds)
    return {
        "false_alarms": threshold.realised(judge.clean, level),
        "expected_false_alarms": [fewest / n, most / n],
    }


def _judge(study: AttackStudy, judge: JudgeRecord, auc: float, level: float, n_thresholds: int) -> dict[str, Any]:
    return {
        "role": judge.role,
        "provenance": judge.provenance,
        "is_probability": judge.is_probability,
        "vanilla_auc": auc,
        "trained_auc": trained_auc(judge),
        "levels": [asdict(level) for level in judge.levels],
        "valid": valid_judge(_deciding_auc(judge, auc)),
        "one_answer": _one_answer(judge, study),
        "n_calibration": len(judge.calibration),
        "thresholds": {
            rate: {
                "value": threshold.value,
                "n_required": n_clean_required(threshold.alpha),
                **_alarms(judge, threshold, level, n_thresholds),
            }
            for rate, threshold in _thresholds(judge).items()
        },
    }


def _forms(effect: Tensor, clean: Tensor, adversarial: Tensor, is_probability: bool) -> dict[str, Any]:
    """AUC, CONC and F in every form; the F1 form needs a judge of which 0.5 is a threshold."""
    hidden = {
        form: concealability(clean, adversarial, form) if form != "f1" or is_probability else None for form in _FORMS
    }
    return {
        "auc": float(detector_auc(clean, adversarial)),
        "concealability": {form: None if value is None else float(value) for form, value in hidden.items()},
        "success": {form: None if value is None else float(success_f(effect, value)) for form, value in hidden.items()},
    }


def _attacked(study: AttackStudy, attack: ChosenAttack, effect: Tensor) -> dict[str, Any] | None:
    """Against all attacked detectors, by either rule of pooling; the two are one for a single detector."""
    judges = [judge for judge in study.judges if judge.role == "attacked"]
    if not judges:
        return None
    clean = torch.stack([judge.clean for judge in judges])
    adversarial = torch.stack([attack.scores[judge.name] for judge in judges])
    are_probabilities = all(judge.is_probability for judge in judges)
    return {
        rule: _forms(effect, *pool_detectors(clean, adversarial, rule), are_probabilities)
        for rule in ("published", "max")
    }


def _before_judge(decided: Decided, attack: ChosenAttack, judge: JudgeRecord, level: float) -> dict[str, Any]:
    scores, n_correct = attack.scores[judge.name], int(decided.correct.sum())
    flagged: dict[str, Any] = dict.fromkeys(map(key, FALSE_ALARMS))
    joint: dict[str, Any] = dict(flagged)
    for rate, threshold in _thresholds(judge).items():
        if threshold.resolvable:
            caught = threshold.flag(scores)
            flagged[rate] = binomial_share(int(caught.sum()), len(scores), level)
            if n_correct:
                joint[rate] = binomial_share(int((decided.fooled & ~caught).sum()), n_correct, level)
    return _forms(decided.effect, judge.clean, scores, judge.is_probability) | {
        "detection": {key(rate): float(detection_rate(judge.clean, scores, rate)) for rate in FALSE_ALARMS},
        "flagged": flagged,
        "joint_success": joint,
    }


def _spread(values: dict[str, float | None], largest_is_worst: bool = False) -> dict[str, Any] | None:
    """Mean over judges and the value of the judge that is worst for the attack; None if no judge has a value."""
    known = {name: value for name, value in values.items() if value is not None}
    if not known:
        return None
    worst = (max if largest_is_worst else min)(known, key=lambda name: known[name])
    return {"mean": sum(known.values()) / len(known), "worst": known[worst], "judge": worst}


def _panel(judged: dict[str, Any], panel: Sequence[JudgeRecord]) -> dict[str, Any]:
    rows = {judge.name: judged[judge.name] for judge in panel}
    rates = [key(rate) for rate in FALSE_ALARMS]
    joint = {rate: {name: row["joint_success"][rate] for name, row in rows.items()} for rate in rates}
    return {
        **{
            what: {form: _spread({name: row[what][form] for name, row in rows.items()}) for form in _FORMS}
            for what in ("concealability", "success")
        },
        "detection": {
            rate: _spread({name: row["detection"][rate] for name, row in rows.items()}, largest_is_worst=True)
            for rate in rates
        },
        "joint_success": {
            rate: _spread({name: None if share is None else share.share for name, share in shares.items()})
            for rate, shares in joint.items()
        },
    }


def _size(study: AttackStudy, attack: ChosenAttack) -> dict[str, Any]:
    norms = perturbation_norms(study.series, attack.x_adv, study.mask)
    radius = math.ceil(DTW_BAND * study.series.shape[1])
    bends, rough = roughness(study.series, study.mask), roughness(attack.x_adv, study.mask)
    return {
        "norms": {name: float(values.mean()) for name, values in norms._asdict().items()},
        "largest_linf": float(norms.linf.max()),
        "dtw": {"mean": float(dtw(study.series, attack.x_adv, study.mask, radius).mean()), "radius": radius},
        "roughness_ratio": float(rough.nanmean() / bends.nanmean()),
    }


def _effort(decided: Decided, attack: ChosenAttack) -> dict[str, Any]:
    """Flips up to the chosen iterate; gradients and time of the whole run, which went on to iterate N."""
    flips = steps_to_flip(decided.along[: attack.iteration + 1], decided.labels)[decided.correct]
    # Called rightly when clean: wrong at iterate 0 is the random start's doing, no clean error.
    flipped = flips[flips >= 0].double()
    return {
        "steps_to_flip": {
            "median": float(flipped.quantile(0.5)) if len(flipped) else None,
            "share_flipped": len(flipped) / len(flips) if len(flips) else None,
        },
        "bad_gradients": float(gradient_rate(attack.n_bad_gradients, attack.n_gradients)),
        "zero_gradients": float(gradient_rate(attack.n_zero_gradients, attack.n_gradients)),
        "seconds_per_series": attack.seconds / len(decided.labels),
    }


def _classifier(logits: Tensor, labels: Tensor, n_classes: int) -> dict[str, float]:
    """How well the victim decides and ranks series; ROC and PR one-vs-rest, macro, for more than two classes."""
    called = decisions(logits)
    return {
        "accuracy": float(accuracy(called, labels)),
        "f1": float(classifier_f1(called, labels, n_classes)),
        "roc_auc": float(classifier_auc(logits, labels)),
        "average_precision": float(classifier_average_precision(logits, labels)),
    }


def _attack(study: AttackStudy, attack: ChosenAttack, panel: Sequence[JudgeRecord], level: float) -> dict[str, Any]:
    decided = Decided(study, attack)
    baseline = baseline_of(study, attack)
    judged = {judge.name: _before_judge(decided, attack, judge, level) for judge in study.judges}
    probabilities = attack.detector_logits[attack.iteration].double().sigmoid()
    return {
        "family": attack.family,
        "concealed": attack.concealed,
        "transferred": attack.transferred,
        "baseline": None if baseline is None else baseline.name,
        "chosen": {name: getattr(attack, name) for name in ("step", "radius", "alpha", "iteration", "restart")},
        "n_steps": len(attack.logits) - 1,
        "n_configurations": len(attack.validation_effectiveness),
        "pareto_area": pareto_area(*attack.candidates),
        "effectiveness": float(decided.effect),
        **_classifier(attack.logits[attack.iteration], study.labels, decided.n_classes),
        "accuracy_on_correct": float(accuracy_on_correct(decided.clean, decided.adversarial, study.labels)),
        "fooling_rate": float(fooling_rate(decided.clean, decided.adversarial)),
        "success_on_correct": float(attack_success_rate(decided.clean, decided.adversarial, study.labels)),
        "one_class": len(decided.adversarial.unique()) == 1,
        "hidden_probability": float(hidden_probability(probabilities)) if len(probabilities) else None,
        "attacked": _attacked(study, attack, decided.effect),
        "panel": _panel(judged, panel),
        "judges": judged,
        **_size(study, attack),
        **_effort(decided, attack),
    }


def findings(study: AttackStudy, *, n_resamples: int = 2000, level: float = 0.95) -> Findings:
    """All numbers of a study on the CPU.

    Args:
        study: What a test found.
        n_resamples: S, draws of series with replacement, the same for all attacks.
        level: Coverage of the intervals.

    Returns:
        Plain values. ``judges``: by name role, provenance, AUC on vanilla attacks, for trained ones the AUC of each
        training attack and strength on validation and the mean of the vanilla ones, whether it is valid, and at each
        rate the conformal threshold (None if not resolvable) with the realised false alarms and the shares between
        which they lie by chance, beta-binomial, all thresholds together with probability ``level``. Shares are lists:
        share, low, high (Clopper-Pearson), hits, trials. ``attacks``: by name the chosen configuration, whether a
        surrogate gave its gradients, the area under the front of what could be chosen, EFF, accuracy, F1, ROC-AUC and
        average precision of the victim (one-vs-rest, macro, for K > 2), accuracy and success on initially correct
        series, fooling rate, norms and the DTW distance in a band (means over series), roughness ratio, steps to flip
        up to the chosen iterate (0: by a random start), shares of bad and zero gradients and seconds a series, of the
        run of ``n_steps``; ``judges`` with AUC, CONC and F in every form, detection off the ROC curve, share flagged
        and joint success at the conformal thresholds;
        ``attacked`` against the attacked detectors pooled; ``panel``, mean over the valid held-out judges and the worst
        of them for the attack; ``intervals`` and ``minus_vanilla``, intervals of EFF, CONC and F in the F1 form
        against the attacked detectors and of mean joint success against the panel at each rate, and of what concealment
        adds to each, ends None where the bootstrap cannot tell (:mod:`lightning_modules.attacks.study_bootstrap`).
        ``headline``: the best concealed attack by validation. ``victim``, ``panel``, sizes and the settings.

    Raises:
        ValueError: If there is no attack, two attacks or judges share a name, ``n_resamples`` is below 1 or ``level``
            not strictly between 0 and 1.
    """
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    for kind, names in (
        ("attack", [one.name for one in study.attacks]),
        ("judge", [one.name for one in study.judges]),
    ):
        if len(set(names)) < len(names) or (kind == "attack" and not names):
            raise ValueError(f"a study needs at least one attack, and names that differ; {kind}s are {names}")
    aucs = vanilla_aucs(study)
    panel = [
        judge
        for judge in study.judges
        if judge.role == "held_out" and valid_judge(_deciding_auc(judge, aucs[judge.name]))
    ]
    best = best_concealed(study)
    clean = decisions(study.clean_logits)
    n_classes = len(study.class_names)
    rows = intervals(study, panel, n_resamples, level)
    n_limits = sum(limit.resolvable for judge in study.judges for limit in _thresholds(judge).values())
    n, n_steps, n_channels = study.series.shape
    return plain(
        {
            "headline": None if best is None else best.name,
            "attacks": {one.name: _attack(study, one, panel, level) | rows[one.name] for one in study.attacks},
            "judges": {judge.name: _judge(study, judge, aucs[judge.name], level, n_limits) for judge in study.judges},
            "panel": [judge.name for judge in panel],
            "victim": {
                **_classifier(study.clean_logits, study.labels, n_classes),
                "effectiveness": float(effectiveness(clean, study.labels, n_classes)),
                "n_correct": int((clean == study.labels).sum()),
                "one_class": len(clean.unique()) == 1,
                "saturation": study.saturation,
                "saturated": study.saturation > SATURATED,
            },
            "n_series": n,
            "n_steps": n_steps,
            "n_channels": n_channels,
            "class_names": study.class_names,
            "n_resamples": n_resamples,
            "level": level,
            "seed": study.seed,
        }
    )
