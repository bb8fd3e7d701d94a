"""Autoencoders of windows of returns: a stock is the mean of the codes of its windows.

A stocks, T days, B windows, L days of a window, C code size. Source: spec of arXiv 2308.07944 after the authors'
code, whose losses compared (B, L, 1) with (B, 1, L) and so were no reconstruction; here shapes are equal by
construction.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from lightning_modules.collectives import n_processes

Activation = Literal["none", "gelu", "relu"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {"none": nn.Identity, "gelu": nn.GELU, "relu": nn.ReLU}


def trailing_windows(returns: Tensor, length: int) -> Tensor:
    """Cut ``(A, T)`` into ``(A, T // length, length)``: no overlap, the last window ends on the last day.

    Raises:
        ValueError: If there are fewer than ``length`` days.
    """
    n_windows = returns.shape[1] // length
    if n_windows == 0:
        raise ValueError(f"window_length must be at most the number of days, {returns.shape[1]}, got {length}")
    return returns[:, returns.shape[1] - n_windows * length :].unflatten(1, (n_windows, length))


class PooledNorm(nn.BatchNorm1d):
    """One mean and one variance of all values ``(B, 1, L)`` of a batch; in several processes, of all their batches.

    What it norms is read, not learned, so no gradient has to pass between processes as it does in
    ``torch.nn.SyncBatchNorm``, which needs GPUs. B may be 0 in some processes. Alone it is ``nn.BatchNorm1d``.
    """

    def __init__(self) -> None:
        super().__init__(1, affine=False)

    def forward(self, input: Tensor) -> Tensor:
        """Values in standard deviations from the mean; in training those of the batch."""
        if not self.training or n_processes() == 1:
            return super().forward(input)
        values = input.detach().double()
        moments = torch.stack([values.new_tensor(values.numel()), values.sum(), values.square().sum()])
        distributed.all_reduce(moments)
        n, mean = moments[0], moments[1:2] / moments[0]
        variance = moments[2:] / n - mean.square()
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_((variance * n / (n - 1)).to(self.running_var), self.momentum)
            self.num_batches_tracked += 1
        return F.batch_norm(input, mean.to(input), variance.to(input), eps=self.eps)


class WindowAutoencoder(nn.Module):
    """What autoencoders share: scaling, the loss, and from codes of windows to one row a stock.

    Returns enter divided by their pooled standard deviation, so that a loss of 1 is what a constant code attains:
    x = (r - m) / s with m, s over all values of a batch in training, and their running means afterwards. A batch that
    is spread over processes counts as one, here; not in batch normalisation within an encoder.

        loss = mean (decode(encode(x)) - x)^2           row of a stock = mean over its windows of encode(x)

    Args:
        window_length: L, at least 2.
        code_size: C, at least 1.

    Raises:
        ValueError: If a size is out of range.
    """

    def __init__(self, *, window_length: int, code_size: int) -> None:
        if window_length < 2 or code_size < 1:
            raise ValueError(
                f"window_length must be at least 2 and code_size at least 1, got {window_length} and {code_size}"
            )
        super().__init__()
        self.window_length = window_length
        self.code_size = code_size
        self.normaliser = PooledNorm()
        self.encoder: nn.Module
        self.decoder: nn.Module

    def scaled(self, windows: Tensor) -> Tensor:
        """Windows ``(B, L)`` of returns in pooled standard deviations."""
        # Batch normalisation wants the dtype of its parameters, and panels are float64.
        return self.normaliser(windows.to(next(self.parameters()).dtype).unsqueeze(1)).squeeze(1)

    def encode(self, scaled: Tensor) -> Tensor:
        """Codes ``(B, C)`` of scaled windows ``(B, L)``."""
        return self.encoder(scaled)

    def decode(self, codes: Tensor) -> Tensor:
        """Scaled windows ``(B, L)`` from codes ``(B, C)``."""
        return self.decoder(codes)

    def loss(self, windows: Tensor) -> Tensor:
        """Mean squared error of the reconstruction of windows ``(B, L)``, in units of the pooled variance."""
        scaled = self.scaled(windows)
        rebuilt = self.decode(self.encode(scaled))
        if rebuilt.shape != scaled.shape:
            raise ValueError(f"decoder must give windows of shape {tuple(scaled.shape)}, got {tuple(rebuilt.shape)}")
        return F.mse_loss(rebuilt, scaled)

    def forward(self, returns: Tensor) -> Tensor:
        """One row ``(A, C)`` a stock from returns ``(A, T)``."""
        windows = trailing_windows(returns, self.window_length)
        codes = self.encode(self.scaled(windows.flatten(0, 1)))
        return codes.unflatten(0, windows.shape[:2]).mean(1)


class ConvAutoencoder(WindowAutoencoder):
    """One-dimensional convolutions of width 3 without padding, then a linear bottleneck; the decoder mirrors it.

    Args:
        window_length: L.
        code_size: C.
        channels: Channels after each convolution; the published ones are 512, 256, 128, 64, 32, 1.
        activation: After each convolution but the last of the decoder; published is ``"none"``, which makes the
            network linear but for batch normalisation.

    Raises:
        ValueError: If a size is out of range, or the convolutions leave nothing of a window.
    """

    def __init__(
        self,
        *,
        window_length: int = 100,
        code_size: int = 100,
        channels: Sequence[int] = (32, 16, 8, 1),
        activation: Activation = "gelu",
    ) -> None:
        super().__init__(window_length=window_length, code_size=code_size)
        left = window_length - 2 * len(channels)
        if not channels or min(channels) < 1 or left < 1:
            raise ValueError(
                f"channels must be 1 to {(window_length - 1) // 2} numbers of at least 1, got {list(channels)}"
            )
        widths = [1, *channels]
        act = _ACTIVATIONS[activation]
        down: list[nn.Module] = [nn.Unflatten(1, (1, window_length))]
        for before, after in pairwise(widths):
            down += [nn.Conv1d(before, after, 3), nn.BatchNorm1d(after), act()]
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(channels[-1] * left, code_size))
        up: list[nn.Module] = [nn.Linear(code_size, channels[-1] * left), nn.Unflatten(1, (channels[-1], left))]
        for number, (before, after) in enumerate(pairwise(widths[::-1])):
            up.append(nn.ConvTranspose1d(before, after, 3))
            if number < len(channels) - 1:
                up += [nn.BatchNorm1d(after), act()]
        self.decoder = nn.Sequential(*up, nn.Flatten())


class _LastState(nn.Module):
    """Stacked LSTMs over a window, read at its end."""

    def __init__(self, hidden_size: int, code_size: int) -> None:
        super().__init__()
        self.first = nn.LSTM(1, hidden_size, batch_first=True)
        self.second = nn.LSTM(hidden_size, code_size, batch_first=True)

    def forward(self, scaled: Tensor) -> Tensor:
        states, _ = self.first(scaled.unsqueeze(-1))
        _, (last, _) = self.second(states)
        return last[0]


class _Unroll(nn.Module):
    """A code repeated over the days of a window, two LSTMs, and a linear read-out of every day."""

    def __init__(self, hidden_size: int, code_size: int, window_length: int) -> None:
        super().__init__()
        self.window_length = window_length
        self.layers = nn.LSTM(code_size, hidden_size, num_layers=2, batch_first=True)
        self.out = nn.Linear(hidden_size, 1)

    def forward(self, codes: Tensor) -> Tensor:
        states, _ = self.layers(codes.unsqueeze(1).expand(-1, self.window_length, -1))
        return self.out(states).squeeze(-1)


class LSTMAutoencoder(WindowAutoencoder):
    """LSTMs 1 -> H -> C read at the last day; the code repeated over the window, LSTMs C -> H -> H, linear.

    Args:
        window_length: L.
        code_size: C; published 100.
        hidden_size: H; published 200.

    Raises:
        ValueError: If a size is out of range.
    """

    def __init__(self, *, window_length: int = 100, code_size: int = 32, hidden_size: int = 48) -> None:
        super().__init__(window_length=window_length, code_size=code_size)
        if hidden_size < 1:
            raise ValueError(f"hidden_size must be at least 1, got {hidden_size}")
        self.encoder = _LastState(hidden_size, code_size)
        self.decoder = _Unroll(hidden_size, code_size, window_length)
