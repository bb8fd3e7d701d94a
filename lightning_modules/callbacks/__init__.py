"""Lightning callbacks: what runs write, print and remember."""

from lightning_modules.callbacks.adversarial_training import AdversarialTraining
from lightning_modules.callbacks.adversarial_writer import AdversarialSeriesWriter
from lightning_modules.callbacks.attack_report import AttackReport
from lightning_modules.callbacks.class_writer import ClassPredictionWriter
from lightning_modules.callbacks.context_report import ContextReport
from lightning_modules.callbacks.embedding_writer import EmbeddingWriter
from lightning_modules.callbacks.nan_guard import NaNGuard
from lightning_modules.callbacks.portfolio_report import PortfolioReport
from lightning_modules.callbacks.portfolio_writer import PortfolioWriter
from lightning_modules.callbacks.predictions import RecommendationWriter
from lightning_modules.callbacks.random_state import RandomState
from lightning_modules.callbacks.ranking_report import RankingReport
from lightning_modules.callbacks.run_record import EpochLines, LastCheckpoint
from lightning_modules.callbacks.wandb_run import WandbRun

__all__ = [
    "AdversarialSeriesWriter",
    "AdversarialTraining",
    "AttackReport",
    "ClassPredictionWriter",
    "ContextReport",
    "EmbeddingWriter",
    "EpochLines",
    "LastCheckpoint",
    "NaNGuard",
    "PortfolioReport",
    "PortfolioWriter",
    "RandomState",
    "RankingReport",
    "RecommendationWriter",
    "WandbRun",
]
