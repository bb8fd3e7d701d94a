"""Plain ``nn.Module`` networks, free of Lightning."""

from lightning_modules.networks.transformer import (
    HistoryCopy,
    PreNormBlock,
    PublishedBlock,
    SelfAttention,
    SequenceEncoder,
    causal_mask,
)

__all__ = ["HistoryCopy", "PreNormBlock", "PublishedBlock", "SelfAttention", "SequenceEncoder", "causal_mask"]
