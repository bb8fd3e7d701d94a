"""The classifier on attacked series, and the effort of an attack, as ``torchmetrics.Metric``.

n series of a batch, K classes, K' logits. States, several processes and NaN without series are as in
:mod:`lightning_modules.metrics.attack_metrics`. Of what ranks series all scores are kept.
Source: spec of arXiv 2502.20948, section 9.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from lightning_modules.metrics import attack_classifier_functional as ranking
from lightning_modules.metrics.attack_functional import average_precision, detector_auc
from lightning_modules.metrics.attack_metrics import AttackMetric, CountedShare, Effectiveness, check_same


class ClassifierF1(Effectiveness):
    """F1 of the classifier on adversarial series, ``1 - EFF``: of class 1 for K = 2, macro for K > 2.

    Args:
        n_classes: K, at least 2.

    Raises:
        ValueError: If ``n_classes`` is below 2.
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """Scalar float64."""
        return 1 - self._effectiveness()


class ClassifierAccuracy(CountedShare):
    """ACC of the classifier on adversarial series; lower is the stronger attack."""

    name = "classifier_accuracy"
    higher_is_better = False

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Add ``(n,) int64`` decisions on adversarial series and their true classes.

        Raises:
            ValueError: If the shapes differ.
        """
        check_same(predicted, labels=labels)
        self._increase(self._hits, (predicted == labels).sum())
        self._increase(self._among, len(labels))


class AccuracyOnCorrect(CountedShare):
    """ACC_CORRECT: accuracy on adversarial series among those called rightly when clean."""

    name = "accuracy_on_correct"
    higher_is_better = False

    def update(self, clean_predicted: Tensor, adversarial_predicted: Tensor, labels: Tensor) -> None:
        """Add ``(n,) int64`` decisions on the same series, clean and attacked, and their true classes.

        Raises:
            ValueError: If the shapes differ.
        """
        check_same(clean_predicted, adversarial_predicted=adversarial_predicted, labels=labels)
        correct = clean_predicted == labels
        self._increase(self._hits, (correct & (adversarial_predicted == labels)).sum())
        self._increase(self._among, correct.sum())


class _OfRanks(AttackMetric):
    """Anything computed from how a classifier ranks all series."""

    higher_is_better = False
    measure: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, n_classes: int = 2) -> None:
        if n_classes < 2:
            raise ValueError(f"n_classes must be at least 2, got {n_classes}")
        super().__init__()
        self.n_classes = n_classes
        self.add_state(f"classifier_log_odds_{n_classes}", [], dist_reduce_fx="cat")
        self.add_state(f"classifier_labels_{n_classes}", [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add ``(n, K') float`` logits of adversarial series and ``(n,) int64`` true classes.

        Raises:
            ValueError: If shapes or classes do not suit.
        """
        wanted = (1, 2) if self.n_classes == 2 else (self.n_classes,)
        if logits.ndim != 2 or logits.shape[1] not in wanted or labels.shape != logits.shape[:1]:
            raise ValueError(
                f"logits must be (n, {' or '.join(map(str, wanted))}) and labels (n,), got shapes "
                f"{tuple(logits.shape)} and {tuple(labels.shape)}"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.n_classes:
            raise ValueError(f"labels must lie in 0..{self.n_classes - 1}, got {labels.min()}..{labels.max()}")
        # One axis of float64 each: what a process without a batch sends must have the axes and dtype of the others.
        kept = {"log_odds": ranking.class_log_odds(logits.detach()).flatten(), "labels": labels.double()}
        for name, values in kept.items():
            getattr(self, f"classifier_{name}_{self.n_classes}").append(values)

    def compute(self) -> Tensor:
        """Scalar float64; NaN where no class has both series of its own and others, or a logit is NaN."""
        nothing = torch.zeros(0, dtype=torch.float64, device=self.device)
        states = (getattr(self, f"classifier_{name}_{self.n_classes}") for name in ("log_odds", "labels"))
        odds, labels = (dim_zero_cat(values) if len(values) else nothing for values in states)
        n_ranked = 1 if self.n_classes == 2 else self.n_classes
        return ranking.one_against_rest(odds.reshape(-1, n_ranked), labels.long(), type(self).measure)


class ClassifierAUC(_OfRanks):
    """ROC of the classifier on adversarial series: of class 1 for K = 2, one-vs-rest macro for K > 2.

    Args:
        n_classes: K, at least 2.

    Raises:
        ValueError: If ``n_classes`` is below 2.
    """

    measure = staticmethod(detector_auc)


class ClassifierAveragePrecision(_OfRanks):
    """PR of the classifier on adversarial series: of class 1 for K = 2, one-vs-rest macro for K > 2.

    Args:
        n_classes: K, at least 2.

    Raises:
        ValueError: If ``n_classes`` is below 2.
    """

    measure = staticmethod(average_precision)


class _GradientRate(CountedShare):
    """Share of gradients; subclasses say of which."""

    higher_is_better = False

    def update(self, n_found: Tensor, n_gradients: int) -> None:
        """Add ``(n,) int64`` such gradients of each series, of ``n_gradients`` taken for each.

        Raises:
            ValueError: If a count lies outside 0..n_gradients.
        """
        ranking.gradient_rate(n_found, n_gradients)  # refuses what cannot be
        self._increase(self._hits, n_found.sum())
        self._increase(self._among, len(n_found) * n_gradients)


class BadGradientRate(_GradientRate):
    """Share of the gradients of an attack that held NaN or infinity and were set to zero there."""

    name = "bad_gradients"


class ZeroGradientRate(_GradientRate):
    """Share of the gradients of an attack that were zero everywhere: steps on which it stood still."""

    name = "zero_gradients"


class SecondsPerSeries(AttackMetric):
    """Wall time of an attack a series; of several processes, which work side by side, the time of all together."""

    higher_is_better = False

    def __init__(self) -> None:
        super().__init__()
        self.attack_seconds: Tensor
        self.attack_n_series: Tensor
        self._add("attack_seconds", dtype=torch.float64)
        self._add("attack_n_series")

    def update(self, seconds: float, n_series: int) -> None:
        """Add the time of a batch of ``n_series``.

        Raises:
            ValueError: If either is below 0.
        """
        if not seconds >= 0 or n_series < 0:
            raise ValueError(f"seconds and n_series must be at least 0, got {seconds} and {n_series}")
        self.attack_seconds = self.attack_seconds + seconds
        self._increase("attack_n_series", n_series)

    def compute(self) -> Tensor:
        """Scalar float64 in seconds."""
        return self.attack_seconds / self.attack_n_series
