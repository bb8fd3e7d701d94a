"""External context of event sequences: what others were doing at a moment, and what it adds. Free of Lightning."""

from lightning_modules.context.aggregators import (
    Aggregator,
    AggregatorFactory,
    Attention,
    KernelAttention,
    LearnableAttention,
    Max,
    Mean,
    SymmetricAttention,
)
from lightning_modules.context.bank import ContextBank
from lightning_modules.context.combination import Adding, Combination, CombinationFactory, Concat, Gated, Residual
from lightning_modules.context.decayed import (
    AttentionHawkes,
    ExpHawkes,
    ExpLearnableHawkes,
    LearnableAttentionHawkes,
    LearnableHawkes,
)
from lightning_modules.context.enriched import ContextRules, EnrichedEncoder
from lightning_modules.context.evaluation import Embeddings, Evaluation, evaluate
from lightning_modules.context.positive_features import LinearKernel
from lightning_modules.context.prefix_sums import PrefixMean, PrefixMoments
from lightning_modules.context.probes import BestProbe, LightGBMProbe, LinearProbe, LogisticProbe
from lightning_modules.context.refresh import Ema, EveryKSteps, Live, PerEpoch, Refresh, Static
from lightning_modules.context.streaming import StreamingBank
from lightning_modules.context.visible import Context

__all__ = [
    "Adding",
    "Aggregator",
    "AggregatorFactory",
    "Attention",
    "AttentionHawkes",
    "BestProbe",
    "Combination",
    "CombinationFactory",
    "Concat",
    "Context",
    "ContextBank",
    "ContextRules",
    "Ema",
    "Embeddings",
    "EnrichedEncoder",
    "Evaluation",
    "EveryKSteps",
    "ExpHawkes",
    "ExpLearnableHawkes",
    "Gated",
    "KernelAttention",
    "LearnableAttention",
    "LearnableAttentionHawkes",
    "LearnableHawkes",
    "LightGBMProbe",
    "LinearKernel",
    "LinearProbe",
    "Live",
    "LogisticProbe",
    "Max",
    "Mean",
    "PerEpoch",
    "PrefixMean",
    "PrefixMoments",
    "Refresh",
    "Residual",
    "Static",
    "StreamingBank",
    "SymmetricAttention",
    "evaluate",
]
