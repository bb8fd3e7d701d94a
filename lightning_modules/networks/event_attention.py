"""Encoders of event sequences that read a window at once: a causal transformer and a state-space network.

B sequences, L steps, d width, W longest sequence. Both begin every sequence with a learned vector in front of its first
event, as a recurrent network begins with a learned state: what they make of it alone is the state of a user without
events.
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.networks.event_encoders import EventEmbedding, EventEncoder
from lightning_modules.networks.series_network import require_at_least_one, require_probability
from lightning_modules.networks.state_space import S4Kernel
from lightning_modules.networks.transformer import PreNormBlock


class WindowedEncoder(EventEncoder):
    """Blocks over a learned start and the projected events, read after each event.

        h = Norm(blocks([start; W x_1; ...; W x_L]))

    Every step is multiplied with every other one, later ones by 0. As 0 times NaN is NaN, events from the first one
    that is not finite on are hidden from the blocks, and their states are NaN.

    Args:
        embedding: Of the events.
        d_model: d.
        max_length: W.
        dropout: Of the projected events.

    Raises:
        ValueError: If a size is out of range.
    """

    def __init__(self, embedding: EventEmbedding, *, d_model: int, max_length: int, dropout: float) -> None:
        require_probability(dropout)
        super().__init__(embedding, d_model=d_model, max_length=max_length)
        self.project = nn.Linear(embedding.d_out, d_model)
        self.start = nn.Parameter(torch.randn(d_model))
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.RMSNorm(d_model, eps=1e-6)

    @abstractmethod
    def blocks_over(self, x: Tensor) -> Tensor:
        """Causal map of ``(B, 1 + L, d)``, start first."""

    def unroll(self, vectors: Tensor, memory: Tensor | None) -> tuple[Tensor, None]:
        """States ``(B, L, d)`` of event vectors; nothing is remembered beyond the window."""
        lost = ~vectors.isfinite().all(-1, keepdim=True).cummin(1).values
        x = self.project(vectors.masked_fill(lost, 0.0))
        x = torch.cat([self.start.expand(len(x), 1, -1), self.dropout(x)], 1)
        return self.norm(self.blocks_over(x))[:, 1:].masked_fill(lost, torch.nan), None

    def initial_state(self) -> Tensor:
        """``(d,)``, what the blocks make of the learned start alone."""
        return self.norm(self.blocks_over(self.start.expand(1, 1, -1)))[0, 0]


class TransformerEncoder(WindowedEncoder):
    """Causal transformer with learned positions, counted from the start of the sequence.

    Args:
        vocabulary_sizes: Ids of each categorical feature, 0 (padding) and 1 (unknown) included.
        n_numeric: M.
        d_model: d.
        max_length: W, the longest sequence.
        n_blocks: Depth.
        n_heads: Attention heads; divides d.
        dropout: Of events, attention weights and both branches of a block.
        d_embedding: Width of the tables; this and the next two as in :class:`EventEmbedding`.
        noise: Standard deviation, in training.
        time_gaps: Whether the encoder sees the time since the previous event.

    Raises:
        ValueError: If a size is out of range or ``n_heads`` does not divide d.
    """

    def __init__(
        self,
        *,
        vocabulary_sizes: Sequence[int],
        n_numeric: int,
        d_model: int = 64,
        max_length: int = 128,
        n_blocks: int = 2,
        n_heads: int = 2,
        dropout: float = 0.1,
        d_embedding: int | Sequence[int] = 24,
        noise: float = 3e-4,
        time_gaps: bool = False,
    ) -> None:
        require_at_least_one(n_blocks=n_blocks)
        embedding = EventEmbedding(
            vocabulary_sizes, n_numeric, d_embedding=d_embedding, noise=noise, time_gaps=time_gaps
        )
        super().__init__(embedding, d_model=d_model, max_length=max_length, dropout=dropout)
        self.positions = nn.Parameter(0.02 * torch.randn(1 + max_length, d_model))
        self.blocks = nn.ModuleList(PreNormBlock(d_model, n_heads=n_heads, dropout=dropout) for _ in range(n_blocks))

    def blocks_over(self, x: Tensor) -> Tensor:
        """Blocks over ``(B, 1 + L, d)`` and their positions; padding lies behind, where no event looks."""
        valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        x = x + self.positions[: x.shape[1]]
        for block in self.blocks:
            x = block(x, valid, valid)  # no baskets: the third argument is not read
        return x


class CausalStateSpace(nn.Module):
    """A residual block of d state spaces, one a feature, and a gated linear map.

        u = RMSNorm(x);  y_l = sum_{s <= l} K_{l-s} u_s + skip u_l  (per feature);  x = x + GLU(W dropout(gelu(y)))

    The convolution is a product with a triangular matrix, not a Fourier transform: a transform would let later events
    reach earlier states by its rounding.

    Args:
        d_model: d.
        state_size: Size of each state space, even.
        n_steps: Longest sequence.
        dropout: Before W.

    Source: A. Gu, K. Goel, C. Re, arXiv 2111.00396, with the kernel of :class:`S4Kernel`.
    """

    def __init__(self, d_model: int, *, state_size: int, n_steps: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=1e-6)
        self.kernel = S4Kernel(d_model, state_size=state_size, n_steps=n_steps)
        self.skip = nn.Parameter(torch.ones(d_model))
        self.dropout = nn.Dropout(dropout)
        self.gate = nn.Linear(d_model, 2 * d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, L, d)`` to ``(B, L, d)``."""
        u = self.norm(x)
        steps = torch.arange(x.shape[1], device=x.device)
        lag = steps[:, None] - steps
        response = self.kernel()[:, lag.clamp(min=0)].masked_fill(lag < 0, 0.0)  # (d, L, L), row l holds K_{l-s}
        y = torch.einsum("dls,bsd->bld", response, u) + self.skip * u
        return x + F.glu(self.gate(self.dropout(F.gelu(y))))


class StateSpaceEncoder(WindowedEncoder):
    """Residual state-space blocks over at most W events.

    Args:
        vocabulary_sizes: Ids of each categorical feature, 0 (padding) and 1 (unknown) included.
        n_numeric: M.
        d_model: d.
        max_length: W, the longest sequence.
        n_blocks: Depth.
        state_size: Size of each state space, even.
        dropout: Of events and blocks.
        d_embedding: Width of the tables; this and the next two as in :class:`EventEmbedding`.
        noise: Standard deviation, in training.
        time_gaps: Whether the encoder sees the time since the previous event.

    Raises:
        ValueError: If a size is out of range or ``state_size`` is odd.
    """

    def __init__(
        self,
        *,
        vocabulary_sizes: Sequence[int],
        n_numeric: int,
        d_model: int = 64,
        max_length: int = 128,
        n_blocks: int = 2,
        state_size: int = 32,
        dropout: float = 0.1,
        d_embedding: int | Sequence[int] = 24,
        noise: float = 3e-4,
        time_gaps: bool = False,
    ) -> None:
        require_at_least_one(n_blocks=n_blocks)
        embedding = EventEmbedding(
            vocabulary_sizes, n_numeric, d_embedding=d_embedding, noise=noise, time_gaps=time_gaps
        )
        super().__init__(embedding, d_model=d_model, max_length=max_length, dropout=dropout)
        self.blocks = nn.Sequential(
            *(
                CausalStateSpace(d_model, state_size=state_size, n_steps=1 + max_length, dropout=dropout)
                for _ in range(n_blocks)
            )
        )

    def blocks_over(self, x: Tensor) -> Tensor:
        """Blocks over ``(B, 1 + L, d)``; padding lies behind, where no event looks."""
        return self.blocks(x)
