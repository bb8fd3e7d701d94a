"""Metrics as pure functions and as ``torchmetrics`` classes: of rankings, and of concealed attacks.

Rankings have bootstrap intervals over users; the functions of attacks are in ``attack_functional`` and
``attack_classifier_functional``.
"""

from lightning_modules.metrics.attack_classifier_metrics import (
    AccuracyOnCorrect,
    BadGradientRate,
    ClassifierAccuracy,
    ClassifierAUC,
    ClassifierAveragePrecision,
    ClassifierF1,
    SecondsPerSeries,
    ZeroGradientRate,
)
from lightning_modules.metrics.attack_metrics import (
    AttackSuccessRate,
    Concealability,
    DetectionRate,
    DetectorAccuracy,
    DetectorAUC,
    DetectorF1,
    Effectiveness,
    FoolingRate,
    HiddenProbability,
    JointSuccess,
    MeanDTW,
    PerturbationNorm,
    RoughnessRatio,
    StepsToFlip,
    SuccessF,
)
from lightning_modules.metrics.bootstrap import (
    Interval,
    mean_interval,
    mean_intervals,
    paired_bootstrap,
    paired_intervals,
)
from lightning_modules.metrics.epoch_mean import EpochMean
from lightning_modules.metrics.functional import per_user_metrics, relevance_hits
from lightning_modules.metrics.ranking_metrics import (
    MAP,
    MRR,
    NDCG,
    Coverage,
    HitRate,
    Precision,
    Recall,
    Surprisal,
)

__all__ = [
    "MAP",
    "MRR",
    "NDCG",
    "AccuracyOnCorrect",
    "AttackSuccessRate",
    "BadGradientRate",
    "ClassifierAUC",
    "ClassifierAccuracy",
    "ClassifierAveragePrecision",
    "ClassifierF1",
    "Concealability",
    "Coverage",
    "DetectionRate",
    "DetectorAUC",
    "DetectorAccuracy",
    "DetectorF1",
    "Effectiveness",
    "EpochMean",
    "FoolingRate",
    "HiddenProbability",
    "HitRate",
    "Interval",
    "JointSuccess",
    "MeanDTW",
    "PerturbationNorm",
    "Precision",
    "Recall",
    "RoughnessRatio",
    "SecondsPerSeries",
    "StepsToFlip",
    "SuccessF",
    "Surprisal",
    "ZeroGradientRate",
    "mean_interval",
    "mean_intervals",
    "paired_bootstrap",
    "paired_intervals",
    "per_user_metrics",
    "relevance_hits",
]
