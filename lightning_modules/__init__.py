"""The methods of seqlit, one LightningModule each."""

from lightning_modules.concealed_attacker import ConcealedAttacker
from lightning_modules.kernel_attention import KernelAttentionAggregator
from lightning_modules.sasrec_cce import SASRecCCE
from lightning_modules.tda_portfolio import TDAPortfolioClusterer
from lightning_modules.time_series_classifier import TimeSeriesClassifier

__all__ = [
    "ConcealedAttacker",
    "KernelAttentionAggregator",
    "SASRecCCE",
    "TDAPortfolioClusterer",
    "TimeSeriesClassifier",
]
