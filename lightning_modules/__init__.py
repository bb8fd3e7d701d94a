"""The methods of seqlit, one LightningModule each."""

from lightning_modules.sasrec_cce import SASRecCCE

__all__ = ["SASRecCCE"]
