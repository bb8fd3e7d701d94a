"""What aggregators of context rows share: a perceptron in the dtype of its input, softmax under a mask, chunks.

Q queries, n rows a query. Source: spec of arXiv 2502.10205, sections 4.1 and 10 (memory).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_modules.context.visible import Context
from lightning_modules.networks.series_network import require_at_least_one

PAIR_BYTES = 256 * 2**20
"""Most bytes that numbers of (query, row) pairs may take at once; queries are taken in chunks that stay below, one by
one at the least. With gradients the chunks are computed again in the backward pass rather than kept."""


class Perceptron(nn.Module):
    """Linear layers with a ReLU between them and none after the last, ``sizes[0] -> ... -> sizes[-1]``.

    Computes in the dtype of its input, whatever that of its weights: logits are wanted in float32 even where the
    weights are half precision.

    Args:
        sizes: Widths, each at least 1; one alone is the identity.
        bias: Whether the layers carry a bias.

    Raises:
        ValueError: If a width is below 1.
    """

    def __init__(self, sizes: Sequence[int], *, bias: bool = True) -> None:
        require_at_least_one(**{f"width {position} of a perceptron": size for position, size in enumerate(sizes)})
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in pairwise(sizes))

    def forward(self, features: Tensor) -> Tensor:
        """Outputs ``(..., sizes[-1])`` of ``(..., sizes[0])``."""
        for position, layer in enumerate(self.layers):
            if position:
                features = features.relu()
            assert isinstance(layer, nn.Linear)
            bias = None if layer.bias is None else layer.bias.to(features)
            features = F.linear(features, layer.weight.to(features), bias)
        return features


def by_queries(
    function: Callable[[Tensor, Context], Tensor], query: Tensor, context: Context, bytes_per_query: int
) -> Tensor:
    """``function(query, context)`` in chunks of queries that keep within :data:`PAIR_BYTES`.

    Args:
        function: Of ``(q, d)`` queries and their context, row by row in the queries.
        query: ``(Q, d)``.
        context: Of the Q queries.
        bytes_per_query: What the function holds for one query.
    """
    size = max(1, PAIR_BYTES // max(1, bytes_per_query))
    if len(query) <= size:
        return function(query, context)
    chunks = []
    for start in range(0, len(query), size):
        of = slice(start, start + size)
        part = replace(
            context,
            rows=None if context.rows is None else context.rows[of],
            visible=context.visible[of],
            ages=context.ages[of],
            users=context.users if context.rows is None else context.users[of],
        )
        if torch.is_grad_enabled():
            chunks.append(checkpoint(function, query[of], part, use_reentrant=False, preserve_rng_state=False))
        else:
            chunks.append(function(query[of], part))
    return torch.cat(chunks)


def masked_softmax(logits: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the visible entries of each row of ``(Q, n) float``; zeros, with zero gradients, where none is."""
    masked = logits.masked_fill(~visible, -math.inf)
    # An empty row would be 0 / 0, whose gradient is NaN even where a later `where` drops the value.
    masked = masked.masked_fill(~visible.any(1, keepdim=True), 0.0)
    return masked.softmax(1).masked_fill(~visible, 0.0)


def bytes_of_weights(context: Context) -> int:
    """Bytes a query's weights take on the way from logits: about eight numbers of each row."""
    return 8 * context.visible.shape[1] * context.states.element_size()
