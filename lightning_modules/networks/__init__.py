"""Plain ``nn.Module`` networks, free of Lightning."""

from lightning_modules.networks.event_attention import StateSpaceEncoder, TransformerEncoder
from lightning_modules.networks.event_encoders import (
    EncoderFactory,
    EventEmbedding,
    EventEncoder,
    RecurrentEncoder,
    encode_table,
)
from lightning_modules.networks.patch_tst import PatchTST
from lightning_modules.networks.recurrent import LSTM, RNNAttention
from lightning_modules.networks.repeat import RepeatMixture
from lightning_modules.networks.res_cnn import ResCNN
from lightning_modules.networks.return_autoencoders import ConvAutoencoder, LSTMAutoencoder, WindowAutoencoder
from lightning_modules.networks.series_network import NetworkFactory, SeriesNetwork
from lightning_modules.networks.state_space import S4
from lightning_modules.networks.transformer import (
    PreNormBlock,
    PublishedBlock,
    SelfAttention,
    SequenceEncoder,
    causal_mask,
)

__all__ = [
    "LSTM",
    "S4",
    "ConvAutoencoder",
    "EncoderFactory",
    "EventEmbedding",
    "EventEncoder",
    "LSTMAutoencoder",
    "NetworkFactory",
    "PatchTST",
    "PreNormBlock",
    "PublishedBlock",
    "RNNAttention",
    "RecurrentEncoder",
    "RepeatMixture",
    "ResCNN",
    "SelfAttention",
    "SequenceEncoder",
    "SeriesNetwork",
    "StateSpaceEncoder",
    "TransformerEncoder",
    "WindowAutoencoder",
    "causal_mask",
    "encode_table",
]
