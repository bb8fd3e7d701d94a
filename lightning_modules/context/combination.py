"""How an own state and a context vector become one representation.

Q queries, d width of the own state, d_b of the context vector, D of the result. Source: spec of arXiv 2502.10205,
section 5; the paper's is ``Concat``.
"""

import math
from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_modules.networks.series_network import require_at_least_one


class CombinationFactory(Protocol):
    """Builds a combination from two widths; YAML gives it by ``class_path`` with every other argument."""

    def __call__(self, *, d: int, d_context: int) -> "Combination":
        """The combination of states of width ``d`` with context vectors of width ``d_context``."""
        ...


class Combination(nn.Module, ABC):
    """``forward(query (Q, d), context_vector (Q, d_b)) -> (Q, D)``.

    Args:
        d: Width of the own state.
        d_context: d_b.
        d_out: D.

    Attributes:
        d_out: D.

    Raises:
        ValueError: If a width is below 1.
    """

    def __init__(self, *, d: int, d_context: int, d_out: int) -> None:
        require_at_least_one(d=d, d_context=d_context)
        super().__init__()
        self.d = d
        self.d_context = d_context
        self.d_out = d_out

    def forward(self, query: Tensor, context_vector: Tensor) -> Tensor:
        """``(Q, D)``.

        Raises:
            ValueError: If a width is not what the combination was built for.
        """
        if query.shape[-1] != self.d or context_vector.shape != (*query.shape[:-1], self.d_context):
            raise ValueError(
                f"{type(self).__name__} joins (Q, {self.d}) with (Q, {self.d_context}), "
                f"got {tuple(query.shape)} and {tuple(context_vector.shape)}"
            )
        return self.join(query, context_vector)

    @abstractmethod
    def join(self, query: Tensor, context_vector: Tensor) -> Tensor:
        """``(Q, D)`` of checked inputs."""


class Concat(Combination):
    """``z = [q; b]``, D = d + d_b."""

    def __init__(self, *, d: int, d_context: int) -> None:
        super().__init__(d=d, d_context=d_context, d_out=d + d_context)

    def join(self, query: Tensor, context_vector: Tensor) -> Tensor:
        """``(Q, d + d_b)``."""
        return torch.cat([query, context_vector], -1)


class Gated(Combination):
    """``g = sigmoid(G [q; b] + c);  z = g q + (1 - g) W b`` component by component, D = d."""

    def __init__(self, *, d: int, d_context: int) -> None:
        super().__init__(d=d, d_context=d_context, d_out=d)
        self.gate = nn.Linear(d + d_context, d)
        self.map = nn.Linear(d_context, d, bias=False)

    def join(self, query: Tensor, context_vector: Tensor) -> Tensor:
        """``(Q, d)``."""
        gate = self.gate(torch.cat([query, context_vector], -1)).sigmoid()
        return gate * query + (1 - gate) * self.map(context_vector)


class Residual(Combination):
    """``z = q + W b``, D = d."""

    def __init__(self, *, d: int, d_context: int) -> None:
        super().__init__(d=d, d_context=d_context, d_out=d)
        self.map = nn.Linear(d_context, d, bias=False)

    def join(self, query: Tensor, context_vector: Tensor) -> Tensor:
        """``(Q, d)``."""
        return query + self.map(context_vector)


class Adding(Combination):
    """``z = alpha b + (1 - alpha) q``, D = d: the released recommender's sum of scores, as its item scores are linear.

    Args:
        d: Width of the own state.
        d_context: d_b, equal to ``d``.
        alpha: Share of the context, between 0 and 1.

    Raises:
        ValueError: If the widths differ or ``alpha`` is out of range.
    """

    def __init__(self, *, d: int, d_context: int, alpha: float = 0.5) -> None:
        if d_context != d:
            raise ValueError(f"Adding takes a context vector as wide as the state, {d}, got {d_context}")
        if not (math.isfinite(alpha) and 0 <= alpha <= 1):
            raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
        super().__init__(d=d, d_context=d_context, d_out=d)
        self.alpha = alpha

    def join(self, query: Tensor, context_vector: Tensor) -> Tensor:
        """``(Q, d)``."""
        return self.alpha * context_vector + (1 - self.alpha) * query
