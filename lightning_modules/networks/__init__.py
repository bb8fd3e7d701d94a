"""Plain ``nn.Module`` networks, free of Lightning."""

from lightning_modules.networks.repeat import RepeatMixture
from lightning_modules.networks.return_autoencoders import ConvAutoencoder, LSTMAutoencoder, WindowAutoencoder
from lightning_modules.networks.transformer import (
    PreNormBlock,
    PublishedBlock,
    SelfAttention,
    SequenceEncoder,
    causal_mask,
)

__all__ = [
    "ConvAutoencoder",
    "LSTMAutoencoder",
    "PreNormBlock",
    "PublishedBlock",
    "RepeatMixture",
    "SelfAttention",
    "SequenceEncoder",
    "WindowAutoencoder",
    "causal_mask",
]
