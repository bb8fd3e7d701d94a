"""Recurrent classifiers of time series: an RNN read by attention, and an LSTM read at its last step.

B batch, T time, C channels, D hidden size. Source: specification of arXiv 2502.20948, section 7.

cuDNN has no backward pass for recurrent layers in evaluation mode: on a GPU a gradient with respect to the series
needs ``torch.backends.cudnn.flags(enabled=False)`` around the forward pass, which the attacks of this package see to.
"""

import torch
from torch import Tensor, nn

from lightning_modules.networks.series_network import (
    SeriesNetwork,
    TimeEncoderLayer,
    last_valid_step,
    require_at_least_one,
    require_probability,
)


class RNNAttention(SeriesNetwork):
    """Tanh RNN, encoder layers over its states, and a linear read-out of all steps.

        h_t = tanh(W x_t + U h_{t-1} + b);  z = EncoderLayers(h);  logits = Linear(dropout(flatten(gelu(z))))

    There is no encoding of position: order enters through the RNN. The read-out has a weight for each step, so only
    series of ``n_steps`` are taken; padded steps count as zeros in it.

    Args:
        n_channels: C.
        n_classes: Number of classes.
        n_steps: T.
        hidden_size: D; published 256 (Coffee, GunPoint, PowerCons) or 32.
        n_recurrent_layers: Depth of the RNN; published 1, sometimes 3.
        n_encoder_layers: Encoder layers; published 3 beside 256, 1 beside 32.
        n_heads: Heads of each; published 4 or 2.
        d_feedforward: Inner width of each; published 128 or 16.
        dropout: Of encoder layers and read-out.

    Raises:
        ValueError: If a size is out of range.

    Source: specification, section 7.
    """

    def __init__(
        self,
        *,
        n_channels: int,
        n_classes: int,
        n_steps: int,
        hidden_size: int = 32,
        n_recurrent_layers: int = 1,
        n_encoder_layers: int = 1,
        n_heads: int = 2,
        d_feedforward: int = 16,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(n_channels=n_channels, n_classes=n_classes, n_steps=n_steps)
        require_at_least_one(
            hidden_size=hidden_size, n_recurrent_layers=n_recurrent_layers, n_encoder_layers=n_encoder_layers
        )
        self.recurrent = nn.RNN(n_channels, hidden_size, n_recurrent_layers, batch_first=True)
        self.encoder = nn.ModuleList(
            TimeEncoderLayer(hidden_size, n_heads=n_heads, d_feedforward=d_feedforward, dropout=dropout)
            for _ in range(n_encoder_layers)
        )
        self.head = nn.Sequential(
            nn.GELU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(n_steps * hidden_size, self.n_logits)
        )

    def logits(self, series: Tensor, mask: Tensor | None) -> Tensor:
        """Logits of series whose padding is zero."""
        states, _ = self.recurrent(series)
        for layer in self.encoder:
            states, _ = layer(states, mask)
        if mask is not None:
            states = states.masked_fill(~mask.unsqueeze(-1), 0.0)
        return self.head(states)


class LSTM(SeriesNetwork):
    """LSTM over the series, linear read-out of the hidden state at the last valid step. Series of any length.

    The specification's size, one layer of 50, has 10,651 weights for one channel; its 36 thousand are reached by a
    hidden size of 93.

    Args:
        n_channels: C.
        n_classes: Number of classes.
        n_steps: T of the data; no weight depends on it.
        hidden_size: D; published 50.
        n_layers: Depth; published 1.
        dropout: Of the state that is read out.

    Raises:
        ValueError: If a size is out of range.

    Source: specification, section 7.
    """

    takes_shorter = True
    takes_longer = True

    def __init__(
        self,
        *,
        n_channels: int,
        n_classes: int,
        n_steps: int,
        hidden_size: int = 50,
        n_layers: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(n_channels=n_channels, n_classes=n_classes, n_steps=n_steps)
        require_at_least_one(hidden_size=hidden_size, n_layers=n_layers)
        require_probability(dropout)
        self.recurrent = nn.LSTM(n_channels, hidden_size, n_layers, batch_first=True)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(hidden_size, self.n_logits))

    def logits(self, series: Tensor, mask: Tensor | None) -> Tensor:
        """Logits of series whose padding is zero."""
        states, _ = self.recurrent(series)
        if mask is None:
            return self.head(states[:, -1])
        # The network looks backwards only, so the state at the last valid step has not seen the padding.
        rows = torch.arange(len(series), device=series.device)
        return self.head(states[rows, last_valid_step(mask)])
