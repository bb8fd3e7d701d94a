"""Metrics of concealed attacks as ``torchmetrics.Metric``, equal in one process and in several.

n series of a batch, K classes, M detectors. What is a mean or a count is held as float64 or int64 sums; what depends
on the order of all scores (AUC, detection rates) keeps the scores. Each class computes what the function of the same
name in :mod:`lightning_modules.metrics.attack_functional` says on all series at once; without any series it is NaN.
How the classifier ranks and what an attack costs is in :mod:`lightning_modules.metrics.attack_classifier_metrics`.

State names carry the metric and its options: ``MetricCollection`` merges metrics whose states have equal names and
equal values after the first batch.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_modules.metrics import attack_functional as functional
from lightning_modules.metrics.attack_functional import ConcealabilityForm

NormName = Literal["l1", "l2", "linf", "l2_relative"]
COUNTS = ("true_positives", "false_positives", "false_negatives")
"""Order of :func:`lightning_modules.metrics.attack_functional.class_counts`."""


def check_same(predicted: Tensor, **others: Tensor) -> None:
    """Refuse what does not hold the same series as the decisions.

    Raises:
        ValueError: If ``predicted`` is not ``(n,)`` or another tensor has a different shape.
    """
    for name, values in others.items():
        if predicted.ndim != 1 or values.shape != predicted.shape:
            raise ValueError(
                f"{name} must hold the same (n,) series as the decisions, got shapes {tuple(values.shape)} and "
                f"{tuple(predicted.shape)}"
            )


class AttackMetric(Metric):
    """The states that the metrics below are made of: exact counts, float64 sums, kept scores."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        # A process without a batch sends an empty state of the metric's own dtype: it must be that of the others.
        self.set_dtype(torch.float64)

    def _add(self, name: str, *shape: int, dtype: torch.dtype = torch.int64) -> None:
        self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def _increase(self, name: str, by: Tensor | int) -> None:
        setattr(self, name, getattr(self, name) + by)

    def _add_class_counts(self, n_classes: int) -> None:
        if n_classes < 2:
            raise ValueError(f"n_classes must be at least 2, got {n_classes}")
        self.n_classes = n_classes
        for kind in COUNTS:
            self._add(f"classifier_{kind}", n_classes)

    def _count_classes(self, predicted: Tensor, labels: Tensor) -> None:
        check_same(predicted, labels=labels)
        counts = functional.class_counts(predicted, labels, self.n_classes)
        for kind, count in zip(COUNTS, counts, strict=True):
            self._increase(f"classifier_{kind}", count)

    def _effectiveness(self) -> Tensor:
        return 1 - functional.f1_of_class_counts(*(getattr(self, f"classifier_{kind}") for kind in COUNTS))

    def _add_scores(self) -> None:
        self.add_state("clean_scores", [], dist_reduce_fx="cat")
        self.add_state("adversarial_scores", [], dist_reduce_fx="cat")

    def _keep_scores(self, clean_scores: Tensor, adversarial_scores: Tensor) -> None:
        given = {"clean_scores": clean_scores, "adversarial_scores": adversarial_scores}
        for name, scores in given.items():
            if scores.ndim != 1 or bool(scores.isnan().any()):
                n_nan = int(scores.isnan().sum())
                raise ValueError(f"{name} must be (n,) without NaN, got shape {tuple(scores.shape)} with {n_nan} NaN")
        for name, scores in given.items():
            getattr(self, name).append(scores.detach().double())

    def _scores(self) -> tuple[Tensor, Tensor]:
        # gathered from several processes a state is one tensor, before that a list of batches
        nothing = torch.zeros(0, dtype=torch.float64, device=self.device)
        kept = (getattr(self, name) for name in ("clean_scores", "adversarial_scores"))
        clean, adversarial = (dim_zero_cat(scores) if len(scores) else nothing for scores in kept)
        return clean, adversarial


class Effectiveness(AttackMetric):
    """EFF ``= 1 - F1`` of the classifier on adversarial series; macro-F1 for K > 2.

    Args:
        n_classes: K, at least 2.

    Raises:
        ValueError: If ``n_classes`` is below 2.
    """

    def __init__(self, n_classes: int = 2) -> None:
        super().__init__()
        self._add_class_counts(n_classes)

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Add ``(n,) int64`` decisions on adversarial series and their true classes.

        Raises:
            ValueError: If the lengths differ or a class is not in 0..K-1.
        """
        self._count_classes(predicted, labels)

    def compute(self) -> Tensor:
        """Scalar float64."""
        return self._effectiveness()


class _OfScores(AttackMetric):
    """Anything computed from all clean and all adversarial scores of one detector."""

    def __init__(self) -> None:
        super().__init__()
        self._add_scores()

    def update(self, clean_scores: Tensor, adversarial_scores: Tensor) -> None:
        """Add scores of one detector: ``(n,) float`` of clean and ``(m,) float`` of adversarial series.

        Raises:
            ValueError: If a score is NaN or the scores are not one axis.
        """
        self._keep_scores(clean_scores, adversarial_scores)


class _AtThreshold(_OfScores):
    """Decisions ``score >= threshold``."""

    higher_is_better = False

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        self.threshold = threshold


class DetectorF1(_AtThreshold):
    """F1_DISC of one detector on the pooled set, decision ``score >= threshold``; lower is better hidden.

    Args:
        threshold: Smallest score called adversarial; 0.5 for probabilities.
    """

    def compute(self) -> Tensor:
        """Scalar float64."""
        return functional.detector_f1(*self._scores(), self.threshold)


class DetectorAccuracy(_AtThreshold):
    """ACC_DISC of one detector on the pooled set, decision ``score >= threshold``; lower is better hidden.

    Args:
        threshold: As in :class:`DetectorF1`.
    """

    def compute(self) -> Tensor:
        """Scalar float64."""
        return functional.detector_accuracy(*self._scores(), self.threshold)


class DetectorAUC(_OfScores):
    """ROC_AUC_DISC of one detector on the pooled set; lower is better hidden, down to 0.5."""

    higher_is_better = False

    def compute(self) -> Tensor:
        """Scalar float64."""
        return functional.detector_auc(*self._scores())


class DetectionRate(_OfScores):
    """Largest true-positive rate at no more than a rate of false alarms.

    Args:
        false_alarm_rate: In [0, 1), e.g. 0.01 or 0.05.

    Raises:
        ValueError: If the rate is not in [0, 1).
    """

    higher_is_better = False

    def __init__(self, false_alarm_rate: float = 0.05) -> None:
        if not 0 <= false_alarm_rate < 1:
            raise ValueError(f"false_alarm_rate must lie in [0, 1), got {false_alarm_rate}")
        super().__init__()
        self.false_alarm_rate = false_alarm_rate

    def compute(self) -> Tensor:
        """Scalar float64."""
        return functional.detection_rate(*self._scores(), self.false_alarm_rate)


class Concealability(_OfScores):
    """CONC in the F1 form, the AUC form or the two-sided AUC form.

    Args:
        form: "f1", "auc" or "auc_two_sided".
        threshold: Of the F1 form.

    Raises:
        ValueError: If the form is unknown.
    """

    def __init__(self, form: ConcealabilityForm = "f1", threshold: float = 0.5) -> None:
        functional.check_form(form)
        super().__init__()
        self.form: ConcealabilityForm = form
        self.threshold = threshold

    def compute(self) -> Tensor:
        """Scalar float64."""
        return functional.concealability(*self._scores(), self.form, self.threshold)


class SuccessF(AttackMetric):
    """Success ``F = 2 EFF CONC / (EFF + CONC)``.

    Args:
        form: Of concealability, as in :class:`Concealability`.
        n_classes: K, at least 2.
        threshold: Of the F1 form.

    Raises:
        ValueError: If the form is unknown or ``n_classes`` is below 2.
    """

    def __init__(self, form: ConcealabilityForm = "f1", n_classes: int = 2, threshold: float = 0.5) -> None:
        functional.check_form(form)
        super().__init__()
        self.form: ConcealabilityForm = form
        self.threshold = threshold
        self._add_class_counts(n_classes)
        self._add_scores()

    def update(self, predicted: Tensor, labels: Tensor, clean_scores: Tensor, adversarial_scores: Tensor) -> None:
        """Add a batch.

        Args:
            predicted: ``(n,) int64`` decisions on adversarial series.
            labels: ``(n,) int64`` true classes.
            clean_scores: ``(n,) float`` of one detector.
            adversarial_scores: ``(m,) float`` of the same detector.

        Raises:
            ValueError: If lengths differ, a class is not in 0..K-1 or a score is NaN.
        """
        self._count_classes(predicted, labels)
        self._keep_scores(clean_scores, adversarial_scores)

    def compute(self) -> Tensor:
        """Scalar float64."""
        concealed = functional.concealability(*self._scores(), self.form, self.threshold)
        return functional.success_f(self._effectiveness(), concealed)


class HiddenProbability(AttackMetric):
    """PROB_HID ``= max_j mean_i D_j(x_adv,i)`` over M detectors.

    Args:
        n_detectors: M, at least 1.

    Raises:
        ValueError: If ``n_detectors`` is below 1.
    """

    higher_is_better = False

    def __init__(self, n_detectors: int = 1) -> None:
        if n_detectors < 1:
            raise ValueError(f"n_detectors must be at least 1, got {n_detectors}")
        super().__init__()
        self.hidden_sum: Tensor
        self.hidden_n_series: Tensor
        self._add("hidden_sum", n_detectors, dtype=torch.float64)
        self._add("hidden_n_series")

    def update(self, adversarial_probabilities: Tensor) -> None:
        """Add ``(M, n) float`` probabilities, one row a detector.

        Raises:
            ValueError: If there are not M rows.
        """
        n_detectors = self.hidden_sum.numel()
        if adversarial_probabilities.ndim != 2 or len(adversarial_probabilities) != n_detectors:
            raise ValueError(
                f"probabilities must be (M, n) of {n_detectors} detectors, got {tuple(adversarial_probabilities.shape)}"
            )
        self._increase("hidden_sum", adversarial_probabilities.double().sum(1))
        self._increase("hidden_n_series", adversarial_probabilities.shape[1])

    def compute(self) -> Tensor:
        """Scalar float64."""
        return (self.hidden_sum / self.hidden_n_series).amax()


class CountedShare(AttackMetric):
    """Hits among the series that count; subclasses name the states."""

    name: str

    def __init__(self) -> None:
        super().__init__()
        self._hits, self._among = f"{self.name}_hits", f"{self.name}_among"
        self._add(self._hits)
        self._add(self._among)

    def compute(self) -> Tensor:
        """Scalar float64; NaN where no series counts."""
        return getattr(self, self._hits).double() / getattr(self, self._among)


class FoolingRate(CountedShare):
    """``1 - ACC_ORIG_ADV``: share of series whose decision the attack changes, right or wrong."""

    name = "fooling_rate"

    def update(self, clean_predicted: Tensor, adversarial_predicted: Tensor) -> None:
        """Add ``(n,) int64`` decisions on the same series, clean and attacked.

        Raises:
            ValueError: If the shapes differ.
        """
        check_same(clean_predicted, adversarial_predicted=adversarial_predicted)
        self._increase(self._hits, (clean_predicted != adversarial_predicted).sum())
        self._increase(self._among, len(clean_predicted))


class AttackSuccessRate(CountedShare):
    """Share of series called wrongly when attacked among those called rightly when clean; ``1 - ACC_CORRECT``."""

    name = "attack_success"

    def update(
        self, clean_predicted: Tensor, adversarial_predicted: Tensor, labels: Tensor, targets: Tensor | None = None
    ) -> None:
        """Add a batch.

        Args:
            clean_predicted: ``(n,) int64`` decisions on clean series.
            adversarial_predicted: ``(n,) int64`` decisions on attacked series.
            labels: ``(n,) int64`` true classes.
            targets: ``(n,) int64`` wanted classes of a targeted attack.

        Raises:
            ValueError: If the shapes differ.
        """
        check_same(clean_predicted, adversarial_predicted=adversarial_predicted, labels=labels)
        broken = functional.fooled(clean_predicted, adversarial_predicted, labels, targets)
        self._increase(self._hits, broken.sum())
        self._increase(self._among, (clean_predicted == labels).sum())


class JointSuccess(CountedShare):
    """Share of (fooled AND not flagged) among the series called rightly when clean."""

    name = "joint_success"

    def update(
        self,
        clean_predicted: Tensor,
        adversarial_predicted: Tensor,
        labels: Tensor,
        flagged: Tensor,
        targets: Tensor | None = None,
    ) -> None:
        """Add a batch; ``flagged`` is ``(n,) bool``, the rest as in :meth:`AttackSuccessRate.update`.

        Raises:
            ValueError: If the shapes differ.
        """
        check_same(clean_predicted, adversarial_predicted=adversarial_predicted, labels=labels, flagged=flagged)
        broken = functional.fooled(clean_predicted, adversarial_predicted, labels, targets)
        self._increase(self._hits, (broken & ~flagged).sum())
        self._increase(self._among, (clean_predicted == labels).sum())


class _MeanOverSeries(AttackMetric):
    """Mean of one number a series, left out where it is NaN; subclasses name the states."""

    higher_is_better = False

    def __init__(self, name: str) -> None:
        super().__init__()
        self._sum, self._count = f"{name}_sum", f"{name}_n_series"
        self._add(self._sum, dtype=torch.float64)
        self._add(self._count)

    def _add_values(self, values: Tensor) -> None:
        self._increase(self._sum, values.nansum())
        self._increase(self._count, (~values.isnan()).sum())

    def compute(self) -> Tensor:
        """Scalar float64."""
        return getattr(self, self._sum) / getattr(self, self._count)


class PerturbationNorm(_MeanOverSeries):
    """Mean over series of a norm of the perturbation.

    Args:
        norm: "l1", "l2", "linf" or "l2_relative".

    Raises:
        ValueError: If the norm is unknown.
    """

    def __init__(self, norm: NormName = "l2") -> None:
        if norm not in get_args(NormName):
            raise ValueError(f"norm must be one of {', '.join(get_args(NormName))}, got {norm!r}")
        super().__init__(norm)
        self.norm = norm

    def update(self, series: Tensor, adversarial: Tensor, mask: Tensor | None = None) -> None:
        """Add ``(B, T, C) float`` series and their attacked versions, with ``(B, T) bool`` mask.

        Raises:
            ValueError: If the shapes disagree.
        """
        self._add_values(getattr(functional.perturbation_norms(series, adversarial, mask), self.norm))


class MeanDTW(_MeanOverSeries):
    """Mean over series of the dynamic time warping distance between a series and its attacked version.

    Args:
        radius: Half-width of the band in steps; None for no band.

    Raises:
        ValueError: If ``radius`` is below 0.
    """

    def __init__(self, radius: int | None = None) -> None:
        if radius is not None and radius < 0:
            raise ValueError(f"radius must be at least 0, got {radius}")
        super().__init__(f"dtw_{radius}")
        self.radius = radius

    def update(self, series: Tensor, adversarial: Tensor, mask: Tensor | None = None) -> None:
        """Add ``(B, T, C) float`` series and their attacked versions, with ``(B, T) bool`` mask.

        Raises:
            ValueError: If the shapes disagree.
        """
        self._add_values(functional.dtw(series, adversarial, mask, self.radius))


class StepsToFlip(_MeanOverSeries):
    """Mean number of steps to the first wrong decision, over the series called rightly when clean that flip at all.

    :class:`AttackSuccessRate` of the same iterates says how many those are.
    """

    def __init__(self) -> None:
        super().__init__("steps_to_flip")

    def update(self, predicted: Tensor, labels: Tensor, clean: Tensor | None = None) -> None:
        """Add ``(N + 1, n) int64`` decisions at iterates 0..N and ``(n,) int64`` true classes.

        ``clean`` are the decisions ``(n,) int64`` on the clean series, where a random start is iterate 0; by default
        those at iterate 0.

        Raises:
            ValueError: If the numbers of series differ.
        """
        steps = functional.steps_to_flip(predicted, labels)
        right = (predicted[0] if clean is None else clean) == labels
        self._add_values(torch.where(right & (steps >= 0), steps.double(), torch.nan))


class RoughnessRatio(AttackMetric):
    """ROUGHNESS_NORM: mean roughness of attacked series over mean roughness of the clean ones."""

    higher_is_better = False

    def __init__(self) -> None:
        super().__init__()
        self.roughness_adversarial: Tensor
        self.roughness_clean: Tensor
        self._add("roughness_adversarial", dtype=torch.float64)
        self._add("roughness_clean", dtype=torch.float64)

    def update(self, series: Tensor, adversarial: Tensor, mask: Tensor | None = None) -> None:
        """Add ``(B, T, C) float`` series and their attacked versions, with ``(B, T) bool`` mask.

        Raises:
            ValueError: If the shapes disagree.
        """
        self._increase("roughness_adversarial", functional.roughness(adversarial, mask).nansum())
        self._increase("roughness_clean", functional.roughness(series, mask).nansum())

    def compute(self) -> Tensor:
        """Scalar float64; infinite where only the attacked series are rough, NaN where neither are."""
        return self.roughness_adversarial / self.roughness_clean
