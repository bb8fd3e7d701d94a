"""The methods of seqlit, one LightningModule each."""

from lightning_modules.sasrec_cce import SASRecCCE
from lightning_modules.tda_portfolio import TDAPortfolioClusterer

__all__ = ["SASRecCCE", "TDAPortfolioClusterer"]
