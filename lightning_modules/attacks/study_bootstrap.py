"""Bootstrap over series of what an attack reaches, and of what concealment adds to the vanilla attack of its family.

n series, K classes, S resamples. Every measure is a function of means of counts over series, so that a resample costs
one product of matrices for all attacks together, and paired differences see the same series.
Source: the measures, spec of arXiv 2502.20948, section 9; intervals as in :mod:`lightning_modules.metrics.bootstrap`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_modules.attacks.class_losses import decisions
from lightning_modules.attacks.study import AttackStudy, ChosenAttack, JudgeRecord
from lightning_modules.attacks.thresholds import conformal_threshold
from lightning_modules.metrics.attack_functional import (
    effectiveness,
    f1_of_class_counts,
    f1_of_counts,
    fooled,
    pool_detectors,
    success_f,
)
from lightning_modules.metrics.bootstrap import Interval, bootstrap_means

HEADLINE_RATE = 0.05
"""Rate of false alarms of the joint success that is resampled."""

MEASURES = ("effectiveness", "concealability", "success", "joint_success")
"""EFF, CONC and F in the F1 form against the attacked detectors, and mean joint success against the panel."""


def baseline_of(study: AttackStudy, attack: ChosenAttack) -> ChosenAttack | None:
    """The vanilla attack of the family, the first where there are several; None for a vanilla attack itself."""
    if not attack.concealed:
        return None
    return next((one for one in study.attacks if one.family == attack.family and not one.concealed), None)


class Decided:
    """Decisions of the victim on clean and adversarial series, and what they make of an attack.

    Attributes:
        labels: ``(n,) int64``.
        n_classes: K.
        clean: ``(n,) int64`` decisions on clean series.
        along: ``(N + 1, n) int64`` decisions along the run.
        adversarial: ``(n,) int64`` decisions at the chosen iterate.
        correct: ``(n,) bool``, called rightly when clean.
        fooled: ``(n,) bool``, correct and wrongly called at the chosen iterate.
        effect: ``() float64`` EFF.
    """

    def __init__(self, study: AttackStudy, attack: ChosenAttack) -> None:
        self.labels, self.n_classes = study.labels, len(study.class_names)
        self.clean = decisions(study.clean_logits)
        self.along = decisions(attack.logits)
        self.adversarial = self.along[attack.iteration]
        self.correct = self.clean == self.labels
        self.fooled = fooled(self.clean, self.adversarial, self.labels)
        self.effect = effectiveness(self.adversarial, self.labels, self.n_classes)


def _columns(study: AttackStudy, attack: ChosenAttack, panel: Sequence[JudgeRecord]) -> NDArray[np.float64]:
    """``(n, 3 K + 4)`` counts of one series each, of whose means every measure is a function (:func:`_measures`)."""
    decided = Decided(study, attack)
    numbers = torch.arange(decided.n_classes)
    called, true = decided.adversarial[:, None] == numbers, study.labels[:, None] == numbers
    attacked = [judge for judge in study.judges if judge.role == "attacked"]
    alarms = torch.full((len(study.labels), 2), torch.nan)
    if attacked and all(judge.is_probability for judge in attacked):
        clean, adversarial = pool_detectors(
            torch.stack([judge.clean for judge in attacked]),
            torch.stack([attack.scores[judge.name] for judge in attacked]),
        )
        alarms = torch.stack([clean >= 0.5, adversarial >= 0.5], 1)
    thresholds = {judge.name: conformal_threshold(judge.calibration, HEADLINE_RATE) for judge in panel}
    missed = [~limit.flag(attack.scores[name]) for name, limit in thresholds.items() if limit.resolvable]
    hidden = torch.full((len(study.labels), 1), torch.nan)
    if missed:
        hidden = (decided.fooled[:, None] & torch.stack(missed, 1)).double().mean(1, keepdim=True)
    blocks = [called & true, called & ~true, ~called & true, alarms, hidden, decided.correct[:, None]]
    return torch.cat([block.double() for block in blocks], 1).numpy()


def _measures(means: NDArray[np.float64], n_classes: int) -> NDArray[np.float64]:
    """``(..., 3 K + 4)`` means of counts to ``(..., 4)``: EFF, CONC and F in the F1 form, joint success at 5 %."""
    *counts, alarms, hidden, correct = torch.from_numpy(means).split([n_classes] * 3 + [2, 1, 1], -1)
    effect = 1 - f1_of_class_counts(*counts)
    false, caught = alarms.unbind(-1)
    # A comparison with NaN is false: without a detector f1_of_counts would call F1 0.
    concealed = torch.where(caught.isnan(), torch.nan, 1 - f1_of_counts(caught, false, 1 - caught))
    joint = (hidden / correct)[..., 0]
    return torch.stack([effect, concealed, success_f(effect, concealed), joint], -1).numpy()


def intervals(
    study: AttackStudy, panel: Sequence[JudgeRecord], n_resamples: int, level: float
) -> dict[str, dict[str, Any]]:
    """Percentile intervals over series; thresholds, judges and configurations are held fixed.

    Args:
        study: At least one attack.
        panel: Held-out judges whose mean joint success is meant; those without a threshold at 5 % are left out.
        n_resamples: S, at least 1; one draw for all attacks, seeded by the study.
        level: Coverage, strictly between 0 and 1.

    Returns:
        By attack ``intervals``, of each of :data:`MEASURES`, and ``minus_vanilla``, of the differences to
        :func:`baseline_of`, None without one. NaN where a measure does not exist: CONC and F without an attacked
        detector of which 0.5 is a threshold, joint success without a judge that has a threshold.
    """
    n_classes = len(study.class_names)
    columns = {attack.name: _columns(study, attack, panel) for attack in study.attacks}
    resampled = bootstrap_means(np.concatenate(list(columns.values()), 1), n_resamples, study.seed)
    found = {
        name: (_measures(counts.mean(0), n_classes), _measures(draws, n_classes))
        for (name, counts), draws in zip(columns.items(), np.split(resampled, len(columns), axis=1), strict=True)
    }

    def summed_up(value: NDArray[np.float64], draws: NDArray[np.float64]) -> dict[str, Interval]:
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return {
            measure: Interval(float(value[place]), float(low[place]), float(high[place]))
            for place, measure in enumerate(MEASURES)
        }

    rows: dict[str, dict[str, Any]] = {}
    for attack in study.attacks:
        value, draws = found[attack.name]
        rows[attack.name] = {"intervals": summed_up(value, draws), "minus_vanilla": None}
        baseline = baseline_of(study, attack)
        if baseline is not None:
            other, others = found[baseline.name]
            rows[attack.name]["minus_vanilla"] = summed_up(value - other, draws - others)
    return rows
