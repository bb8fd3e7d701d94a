"""What the classifiers of time series share: their contract, masked normalisation, and one encoder layer over time.

B batch, T time, C channels, D width, K classes. Source: specification of arXiv 2502.20948, section 7; each network
there ended in a sigmoid, here all return logits.
"""

import math
from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NetworkFactory(Protocol):
    """Builds a network from the facts of a data set; YAML gives it by ``class_path`` with every other argument."""

    def __call__(self, *, n_channels: int, n_classes: int, n_steps: int) -> nn.Module:
        """The network, called as ``network(series, mask=None) -> logits``."""
        ...


def require_at_least_one(**sizes: int) -> None:
    """Refuse sizes below 1.

    Raises:
        ValueError: Naming the first size that is none.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def require_probability(dropout: float) -> None:
    """Refuse a rate of dropout outside 0..1, 1 excluded.

    Raises:
        ValueError: If it lies outside.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")


class SeriesNetwork(nn.Module, ABC):
    """Logits of a batch of series; classifier and discriminator alike.

    ``forward(series (B, T, C), mask (B, T) bool or None) -> (B, 1)`` for two classes, the logit of class 1, and
    ``(B, K)`` for K > 2. The mask is true on the first steps of a series, at least one, and false on the padding
    behind them: what stands there, NaN included, reaches neither the logits nor, in training, batch statistics.
    In evaluation mode the logits of a series do not depend on the rest of its batch.

    Subclasses write ``logits(series, mask)`` and get padded steps as zeros.

    Args:
        n_channels: C.
        n_classes: K, at least 2.
        n_steps: T of the data: the only length that is taken where ``takes_shorter`` is false, the longest where it
            is true; no limit where ``takes_longer`` is true too.

    Raises:
        ValueError: If a size is out of range.
    """

    takes_shorter = False
    takes_longer = False

    def __init__(self, *, n_channels: int, n_classes: int, n_steps: int) -> None:
        if n_classes < 2:
            raise ValueError(f"n_classes must be at least 2, got {n_classes}")
        require_at_least_one(n_channels=n_channels, n_steps=n_steps)
        super().__init__()
        self.n_channels = n_channels
        self.n_classes = n_classes
        self.n_steps = n_steps
        self.n_logits = 1 if n_classes == 2 else n_classes

    def forward(self, series: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits ``(B, 1)`` or ``(B, K)`` of ``(B, T, C)`` series.

        Raises:
            ValueError: If the shape of series or mask is not what the network was built for.
        """
        name = type(self).__name__
        if series.ndim != 3 or series.shape[2] != self.n_channels:
            raise ValueError(
                f"{name} takes series of shape (batch, time, {self.n_channels}), got {tuple(series.shape)}"
            )
        length = series.shape[1]
        if length == 0 or (length < self.n_steps and not self.takes_shorter):
            raise ValueError(f"{name} was built for series of {self.n_steps} steps, got {length}")
        if length > self.n_steps and not self.takes_longer:
            limit = "at most " if self.takes_shorter else ""
            raise ValueError(f"{name} was built for series of {limit}{self.n_steps} steps, got {length}")
        if mask is not None:
            if mask.shape != series.shape[:2] or mask.dtype != torch.bool:
                raise ValueError(
                    f"mask must be bool of shape {tuple(series.shape[:2])}, got {mask.dtype} of {tuple(mask.shape)}"
                )
            series = series.masked_fill(~mask.unsqueeze(-1), 0.0)
        return self.logits(series, mask)

    @abstractmethod
    def logits(self, series: Tensor, mask: Tensor | None) -> Tensor:
        """Logits of checked series whose padded steps are zero."""


def last_valid_step(mask: Tensor) -> Tensor:
    """Index ``(B,) int64`` of the last true step of each row of a mask ``(B, T)``."""
    steps = torch.arange(mask.shape[1], device=mask.device)
    return (mask * steps).amax(1)


class MaskedBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of ``(B, D, T)`` features over valid steps alone.

    In training, mean and variance of a feature are those of its valid steps; padded steps come out as 0. A single valid
    step has no variance and is mapped as in evaluation, where the map is affine and per step: padded steps are left for
    the caller to drop.
    """

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalised features ``(B, D, T)``; ``mask (B, T) bool``."""
        if mask is None or not self.training:
            return super().forward(features)
        by_step = features.transpose(1, 2)
        valid = by_step[mask]
        if not len(valid):  # of several processes one may have padding alone, which has no mean
            return torch.zeros_like(features)
        if len(valid) == 1:
            normalised = F.batch_norm(valid, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        else:
            normalised = super().forward(valid)
        return torch.zeros_like(by_step).masked_scatter(mask.unsqueeze(-1), normalised).transpose(1, 2)


class TimeEncoderLayer(nn.Module):
    """Transformer encoder layer with batch normalisation after each residual sum.

        x = BN(x + dropout(MHA(x)));  x = BN(x + dropout(W2 dropout(gelu(W1 x))))

    With residual attention the scores before the softmax are added to those of the layer below and handed on
    (RealFormer, arXiv 2012.11747): S = q k^T / sqrt(D / n_heads) + S_below.

    Args:
        d_model: Width D.
        n_heads: Number of heads; divides D.
        d_feedforward: Width between W1 and W2.
        dropout: Probability of dropping in training.
        residual_attention: Whether scores are handed on.

    Raises:
        ValueError: If a size is out of range or ``n_heads`` does not divide ``d_model``.
    """

    def __init__(
        self, d_model: int, *, n_heads: int, d_feedforward: int, dropout: float, residual_attention: bool = False
    ) -> None:
        require_at_least_one(d_model=d_model, n_heads=n_heads, d_feedforward=d_feedforward)
        require_probability(dropout)
        if d_model % n_heads:
            raise ValueError(f"n_heads must divide the width {d_model}, got {n_heads}")
        super().__init__()
        self.n_heads = n_heads
        self.residual_attention = residual_attention
        self.projections = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)
        self.feedforward = nn.Sequential(
            nn.Linear(d_model, d_feedforward), nn.GELU(), nn.Dropout(dropout), nn.Linear(d_feedforward, d_model)
        )
        self.dropout = nn.Dropout(dropout)
        self.attention_norm = MaskedBatchNorm(d_model)
        self.feedforward_norm = MaskedBatchNorm(d_model)

    def forward(
        self, states: Tensor, mask: Tensor | None, scores: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """One layer.

        Args:
            states: ``(B, T, D) float``.
            mask: ``(B, T) bool``, false at steps that nothing may attend to.
            scores: ``(B, n_heads, T, T) float`` of the layer below, before masking.

        Returns:
            The states ``(B, T, D)``, and the scores to hand on, ``None`` without residual attention.
        """
        heads = (3, self.n_heads, -1)
        q, k, v = (
            self.projections(states).unflatten(-1, heads).permute(2, 0, 3, 1, 4)
        )  # each (B, n_heads, T, D / n_heads)
        keys = None if mask is None else mask[:, None, None, :]
        if self.residual_attention:
            raw = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            scores = raw if scores is None else raw + scores
            masked = scores if keys is None else scores.masked_fill(~keys, -math.inf)
            attended = masked.softmax(-1) @ v
        else:
            scores = None
            attended = F.scaled_dot_product_attention(q, k, v, keys)
        attended = self.out(attended.transpose(1, 2).flatten(-2))
        states = self._normalised(self.attention_norm, states + self.dropout(attended), mask)
        states = self._normalised(self.feedforward_norm, states + self.dropout(self.feedforward(states)), mask)
        return states, scores

    @staticmethod
    def _normalised(norm: MaskedBatchNorm, states: Tensor, mask: Tensor | None) -> Tensor:
        return norm(states.transpose(1, 2), mask).transpose(1, 2)
