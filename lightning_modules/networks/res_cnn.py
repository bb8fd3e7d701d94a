"""Residual convolutional classifier of time series.

B batch, T time, C channels, W filters of the first block. Source: X. Zou et al., "Integration of residual network and
convolutional neural network along with various activation functions and global pooling for time series
classification", Neurocomputing 367 (2019); sizes from the specification of arXiv 2502.20948, section 7.
"""

from torch import Tensor, nn

from lightning_modules.networks.series_network import MaskedBatchNorm, SeriesNetwork, require_at_least_one


class _ConvNorm(nn.Module):
    """Convolution without bias, which the shift of the normalisation behind it would repeat."""

    def __init__(self, n_in: int, n_out: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(n_in, n_out, width, padding="same", bias=False)
        self.norm = MaskedBatchNorm(n_out)

    def forward(self, features: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            # A filter at the last valid step must meet the zeros it would meet at the end of a shorter series.
            features = features.masked_fill(~mask.unsqueeze(1), 0.0)
        return self.norm(self.conv(features), mask)


class ResCNN(SeriesNetwork):
    """A residual block, three convolutions, each with an activation of its own, and the mean over time.

        r = relu(conv3(relu(conv5(relu(conv7(x))))) + conv1(x))                        W filters each
        z = ELU_0.3(conv3(PReLU(conv3(LeakyReLU_0.2(conv3(r))))))                      2W, 4W, 2W filters
        logits = Linear(mean over valid t of z_t)

    Every convolution is followed by batch normalisation and keeps the length. Series of any length are taken, and a
    padded series has the logits of the series without its padding.

    Args:
        n_channels: C.
        n_classes: Number of classes.
        n_steps: T of the data; no weight depends on it.
        n_filters: W; published 64 (256 thousand weights).

    Raises:
        ValueError: If a size is out of range.
    """

    takes_shorter = True
    takes_longer = True

    def __init__(self, *, n_channels: int, n_classes: int, n_steps: int, n_filters: int = 32) -> None:
        super().__init__(n_channels=n_channels, n_classes=n_classes, n_steps=n_steps)
        require_at_least_one(n_filters=n_filters)
        self.first = _ConvNorm(n_channels, n_filters, 7)
        self.second = _ConvNorm(n_filters, n_filters, 5)
        self.third = _ConvNorm(n_filters, n_filters, 3)
        self.shortcut = _ConvNorm(n_channels, n_filters, 1)
        self.relu = nn.ReLU()
        self.tail = nn.ModuleList(
            [
                _ConvNorm(n_filters, 2 * n_filters, 3),
                _ConvNorm(2 * n_filters, 4 * n_filters, 3),
                _ConvNorm(4 * n_filters, 2 * n_filters, 3),
            ]
        )
        self.activations = nn.ModuleList([nn.LeakyReLU(0.2), nn.PReLU(), nn.ELU(0.3)])
        self.head = nn.Linear(2 * n_filters, self.n_logits)

    def logits(self, series: Tensor, mask: Tensor | None) -> Tensor:
        """Logits of series whose padding is zero."""
        x = series.transpose(1, 2)
        features = self.relu(self.second(self.relu(self.first(x, mask)), mask))
        features = self.relu(self.third(features, mask) + self.shortcut(x, mask))
        for block, activation in zip(self.tail, self.activations, strict=True):
            features = activation(block(features, mask))
        if mask is None:
            return self.head(features.mean(-1))
        total = features.masked_fill(~mask.unsqueeze(1), 0.0).sum(-1)
        return self.head(total / mask.sum(1, keepdim=True))
