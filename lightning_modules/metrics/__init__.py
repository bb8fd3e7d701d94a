"""Ranking metrics: pure functions, their ``torchmetrics`` classes, and bootstrap intervals over users."""

from lightning_modules.metrics.bootstrap import (
    Interval,
    mean_interval,
    mean_intervals,
    paired_bootstrap,
    paired_intervals,
)
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
    "Coverage",
    "HitRate",
    "Interval",
    "Precision",
    "Recall",
    "Surprisal",
    "mean_interval",
    "mean_intervals",
    "paired_bootstrap",
    "paired_intervals",
    "per_user_metrics",
    "relevance_hits",
]
