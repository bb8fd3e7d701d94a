"""Patch transformer for the classification of time series.

B batch, T time, C channels, P patches, D width. Source: Y. Nie et al., "A Time Series is Worth 64 Words", arXiv
2211.14730; T. Kim et al., "Reversible Instance Normalization" (ICLR 2022); sizes from the specification of arXiv
2502.20948, section 7.
"""

import math

import torch
from torch import Tensor, nn

from lightning_modules.networks.series_network import SeriesNetwork, TimeEncoderLayer, require_at_least_one


class PatchTST(SeriesNetwork):
    """Encoder layers over patches of instance-normalised channels, linear read-out of all patches.

        u = (x - mean_t x) / sqrt(var_t x + 1e-5)                  per series and channel, over valid steps
        patches of length L every S steps;  z_p = W u_p + position_p;  z = EncoderLayers(z)
        logits = Linear(flatten(z))                                over channels, patches and D

    Mean and variance stay in the graph: a gradient with respect to x holds their part. Each channel goes through the
    same layers on its own and the read-out joins them. The first value is repeated to the left of the series, S
    times where S divides T - L as published, and up to S - 1 times more elsewhere: with S alone the last steps would
    stand in no patch, free for an attacker and unseen by a detector. Only series of ``n_steps`` are taken; a patch of
    padding alone is attended to by none and read as zeros.

    Args:
        n_channels: C.
        n_classes: Number of classes.
        n_steps: T.
        patch_length: L; published 16.
        stride: S, at most L; published 8.
        d_model: D; published 512.
        n_encoder_layers: Published 2.
        n_heads: Published 8.
        d_feedforward: Published 2048.
        dropout: Of the encoder layers and the embedded patches; published 0.3, in the attack's experiments 0.01 to 0.3.
        denormalise: Whether logits are multiplied by the series' deviation and shifted by its mean, as the released
            code does, an accident of reusing a forecasting network; one channel only.

    Raises:
        ValueError: If a size is out of range, or ``denormalise`` is asked for several channels.
    """

    def __init__(
        self,
        *,
        n_channels: int,
        n_classes: int,
        n_steps: int,
        patch_length: int = 16,
        stride: int = 8,
        d_model: int = 64,
        n_encoder_layers: int = 2,
        n_heads: int = 4,
        d_feedforward: int = 128,
        dropout: float = 0.3,
        denormalise: bool = False,
    ) -> None:
        super().__init__(n_channels=n_channels, n_classes=n_classes, n_steps=n_steps)
        require_at_least_one(patch_length=patch_length, stride=stride, n_encoder_layers=n_encoder_layers)
        if stride > patch_length:
            raise ValueError(f"stride must be at most patch_length, {patch_length}, got {stride}")
        if denormalise and n_channels > 1:
            raise ValueError(f"denormalise is defined for one channel, got n_channels {n_channels}")
        self.patch_length = patch_length
        self.stride = stride
        self.denormalise = denormalise
        n_patches = max(0, math.ceil((n_steps + stride - patch_length) / stride)) + 1
        self.n_repeats = patch_length + (n_patches - 1) * stride - n_steps
        self.embed = nn.Linear(patch_length, d_model)
        self.position = nn.Parameter(0.02 * torch.randn(n_patches, d_model))
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(
            TimeEncoderLayer(
                d_model, n_heads=n_heads, d_feedforward=d_feedforward, dropout=dropout, residual_attention=True
            )
            for _ in range(n_encoder_layers)
        )
        self.head = nn.Linear(n_channels * n_patches * d_model, self.n_logits)

    def _patches(self, steps: Tensor) -> Tensor:
        """``(B, P, L)`` or ``(B, C, P, L)`` from time in the last dimension, its first value repeated to the left."""
        repeats = steps[..., :1].expand(*steps.shape[:-1], self.n_repeats)
        return torch.cat([repeats, steps], -1).unfold(-1, self.patch_length, self.stride)

    def logits(self, series: Tensor, mask: Tensor | None) -> Tensor:
        """Logits of series whose padding is zero."""
        x = series.transpose(1, 2)  # (B, C, T)
        if mask is None:
            mean = x.mean(-1, keepdim=True)
            centred = x - mean
            variance = centred.square().mean(-1, keepdim=True)
        else:
            n_valid = mask.sum(1)[:, None, None]
            mean = x.sum(-1, keepdim=True) / n_valid
            centred = (x - mean).masked_fill(~mask[:, None], 0.0)
            variance = centred.square().sum(-1, keepdim=True) / n_valid
        deviation = (variance + 1e-5).sqrt()
        states = self.embed(self._patches(centred / deviation)) + self.position
        states = self.dropout(states).flatten(0, 1)  # (B * C, P, D)
        visible = None if mask is None else self._patches(mask).any(-1).repeat_interleave(self.n_channels, 0)
        scores = None
        for layer in self.encoder:
            states, scores = layer(states, visible, scores)
        if visible is not None:
            states = states.masked_fill(~visible.unsqueeze(-1), 0.0)
        logits = self.head(states.unflatten(0, (len(series), self.n_channels)).flatten(1))
        if self.denormalise:
            logits = logits * deviation[:, 0] + mean[:, 0]
        return logits
