"""Bootstrap over series of what an attack reaches, and of what concealment adds to the vanilla attack of its family.

n series, K classes, S resamples. Every measure is a function of means of counts over series, so that a resample costs
one product of matrices for all attacks together, and paired differences see the same series.

A bootstrap draws from what was seen alone: 0 joint successes of 150 give it [0, 0], though 0.03 is not excluded. So
the interval of mean joint success is the union of the percentile one and an exact one, the mean over judges of the ends
of simultaneous Clopper-Pearson intervals (:func:`~lightning_modules.attacks.thresholds.mean_difference_interval`): it
holds whatever the judges have in common, and unlike the ends of the extreme judges it stays an interval of the mean. A
difference of joint successes that is the same in every resample takes the exact interval of paired series in place of
the percentile one. EFF, CONC and F are ratios of dependent counts without such an interval: where every resample gives
the same, they and their differences get no ends.
Source: the measures, spec of arXiv 2502.20948, section 9; intervals as in :mod:`lightning_modules.metrics.bootstrap`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_modules.attacks.class_losses import decisions
from lightning_modules.attacks.study import AttackStudy, ChosenAttack, JudgeRecord
from lightning_modules.attacks.thresholds import conformal_threshold, mean_difference_interval
from lightning_modules.metrics.attack_functional import (
    effectiveness,
    f1_of_class_counts,
    f1_of_counts,
    fooled,
    pool_detectors,
    success_f,
)
from lightning_modules.metrics.bootstrap import Interval, bootstrap_means

FALSE_ALARMS = (0.05, 0.01)
"""Rates at which judges are read; the first is that of the headline."""


def joint_measure(false_alarm_rate: float) -> str:
    """Name of mean joint success at a rate of false alarms: without the rate at that of the headline."""
    return "joint_success" if false_alarm_rate == FALSE_ALARMS[0] else f"joint_success_{false_alarm_rate:g}"


MEASURES = ("effectiveness", "concealability", "success", *map(joint_measure, FALSE_ALARMS))
"""EFF, CONC and F in the F1 form against the attacked detectors, and mean joint success against the panel."""

SAME = 1e-9
"""Ends of a percentile interval this close are one value: float64 means of the same counts in another order."""


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


def _hidden(study: AttackStudy, attack: ChosenAttack, panel: Sequence[JudgeRecord], rate: float) -> Tensor:
    """``(n, J) bool``, fooled and not flagged at this rate, before each of the J judges that have a threshold."""
    limits = {judge.name: conformal_threshold(judge.calibration, rate) for judge in panel}
    caught = [limit.flag(attack.scores[name]) for name, limit in limits.items() if limit.resolvable]
    fooled_series = Decided(study, attack).fooled
    return (
        torch.stack([fooled_series & ~one for one in caught], 1)
        if caught
        else fooled_series.new_zeros(len(fooled_series), 0)
    )


def _columns(study: AttackStudy, attack: ChosenAttack, hidden: Sequence[Tensor]) -> NDArray[np.float64]:
    """``(n, 3 K + 3 + R)`` counts of one series each, of whose means every measure is a function (:func:`_measures`).

    ``hidden`` is :func:`_hidden` at each of R rates; its mean over no judge is NaN.
    """
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
    joint = torch.stack([one.double().mean(1) for one in hidden], 1)
    blocks = [called & true, called & ~true, ~called & true, alarms, joint, decided.correct[:, None]]
    return torch.cat([block.double() for block in blocks], 1).numpy()


def _measures(means: NDArray[np.float64], n_classes: int) -> NDArray[np.float64]:
    """``(..., 3 K + 3 + R)`` means of counts to ``(..., 3 + R)``, in the order of :data:`MEASURES`."""
    sizes = [n_classes] * 3 + [2, len(FALSE_ALARMS), 1]
    *counts, alarms, hidden, correct = torch.from_numpy(means).split(sizes, -1)
    effect = 1 - f1_of_class_counts(*counts)
    false, caught = alarms.unbind(-1)
    # A comparison with NaN is false: without a detector f1_of_counts would call F1 0.
    concealed = torch.where(caught.isnan(), torch.nan, 1 - f1_of_counts(caught, false, 1 - caught))
    rates = torch.stack([effect, concealed, success_f(effect, concealed)], -1)
    return torch.cat([rates, hidden / correct], -1).numpy()


def _exact(gains: Sequence[Tensor], losses: Sequence[Tensor], n_correct: int, level: float) -> NDArray[np.float64]:
    """``(2, 3 + R)`` exact ends of joint success from ``(n, J) bool`` at each rate, NaN where there are none.

    Series that are hidden were called rightly when clean, so that all counts are of those ``n_correct``.
    """
    ends = np.full((2, len(MEASURES)), np.nan)
    for place, (more, less) in enumerate(zip(gains, losses, strict=True), len(MEASURES) - len(FALSE_ALARMS)):
        if n_correct and more.shape[1]:
            ends[:, place] = mean_difference_interval(more.sum(0).tolist(), less.sum(0).tolist(), n_correct, level)
    return ends


def intervals(
    study: AttackStudy, panel: Sequence[JudgeRecord], n_resamples: int, level: float
) -> dict[str, dict[str, Any]]:
    """Intervals over series, as the module says; thresholds, judges and configurations are held fixed.

    Args:
        study: At least one attack.
        panel: Held-out judges whose mean joint success is meant; at each rate those without a threshold are left out.
        n_resamples: S, at least 1; one draw for all attacks, seeded by the study.
        level: Coverage, strictly between 0 and 1.

    Returns:
        By attack ``intervals``, of each of :data:`MEASURES`, and ``minus_vanilla``, of the differences to
        :func:`baseline_of`, None without one. NaN where a measure does not exist: CONC and F without an attacked
        detector of which 0.5 is a threshold, joint success without a judge that has a threshold. Ends alone are NaN
        where all resamples agree and there is no exact interval.
    """
    n_classes = len(study.class_names)
    n_correct = int((decisions(study.clean_logits) == study.labels).sum())
    hidden = {one.name: [_hidden(study, one, panel, rate) for rate in FALSE_ALARMS] for one in study.attacks}
    columns = {attack.name: _columns(study, attack, hidden[attack.name]) for attack in study.attacks}
    resampled = bootstrap_means(np.concatenate(list(columns.values()), 1), n_resamples, study.seed)
    found = {
        name: (_measures(counts.mean(0), n_classes), _measures(draws, n_classes))
        for (name, counts), draws in zip(columns.items(), np.split(resampled, len(columns), axis=1), strict=True)
    }

    def summed_up(
        value: NDArray[np.float64], draws: NDArray[np.float64], exact: NDArray[np.float64], union: bool
    ) -> dict[str, Interval]:
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
        resolved = high - low > SAME
        low, high = np.where(resolved, [low, high], np.nan)
        if union:
            low, high = np.fmin(low, exact[0]), np.fmax(high, exact[1])
        else:
            low, high = np.where(resolved, [low, high], exact)
        return {
            measure: Interval(float(value[place]), float(low[place]), float(high[place]))
            for place, measure in enumerate(MEASURES)
        }

    rows: dict[str, dict[str, Any]] = {}
    for attack in study.attacks:
        value, draws = found[attack.name]
        ours = hidden[attack.name]
        exact = _exact(ours, [one[:, :0] for one in ours], n_correct, level)
        rows[attack.name] = {"intervals": summed_up(value, draws, exact, union=True), "minus_vanilla": None}
        baseline = baseline_of(study, attack)
        if baseline is not None:
            other, others = found[baseline.name]
            theirs = hidden[baseline.name]
            pairs = list(zip(ours, theirs, strict=True))
            exact = _exact([a & ~b for a, b in pairs], [b & ~a for a, b in pairs], n_correct, level)
            rows[attack.name]["minus_vanilla"] = summed_up(value - other, draws - others, exact, union=False)
    return rows
