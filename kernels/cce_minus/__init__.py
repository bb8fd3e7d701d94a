"""CCE-: sampled softmax cross-entropy over a large catalogue without the logit matrix."""

from kernels.cce_minus.function import cce_minus_loss, cce_minus_negatives
from kernels.cce_minus.proposals import Proposal
from kernels.cce_minus.reference import cce_minus_reference

__all__ = ["Proposal", "cce_minus_loss", "cce_minus_negatives", "cce_minus_reference"]
