"""Plain ``nn.Module`` networks, free of Lightning."""

from lightning_modules.networks.repeat import RepeatMixture
from lightning_modules.networks.transformer import (
    PreNormBlock,
    PublishedBlock,
    SelfAttention,
    SequenceEncoder,
    causal_mask,
)

__all__ = ["PreNormBlock", "PublishedBlock", "RepeatMixture", "SelfAttention", "SequenceEncoder", "causal_mask"]
