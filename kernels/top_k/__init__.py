"""Top-k of a full catalogue by a fused kernel; `lightning_modules.ranking` has the chunked path, of the same order."""

from kernels.top_k.arguments import MAX_K, check_k, check_operands, check_seen_items
from kernels.top_k.function import fused_top_k, is_supported

__all__ = ["MAX_K", "check_k", "check_operands", "check_seen_items", "fused_top_k", "is_supported"]
