"""What a user takes from the states of others: mean, maximum, and the attention family.

Q queries, n rows a query, n_rows distinct rows, d width, r features of a row, H heads. The decayed (Hawkes) family is
in ``decayed.py``, linear attention in ``positive_features.py``. Source: spec of arXiv 2502.10205, sections 4 and 4.1.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.context.masked_rows import Perceptron, by_queries, bytes_of_weights, masked_softmax
from lightning_modules.context.visible import Context
from lightning_modules.networks.series_network import require_at_least_one


class AggregatorFactory(Protocol):
    """Builds an aggregator from the facts of the events; YAML gives it by ``class_path`` with every other argument."""

    def __call__(self, *, d: int, median_gap: float, published: bool = False) -> "Aggregator":
        """The aggregator of states of width ``d``; ``median_gap`` in days is the time unit of a decay.

        With ``published`` arguments that were not given are those of the released code; it is passed in
        ``reference_mode`` alone.
        """
        ...


class Aggregator(nn.Module, ABC):
    """Context vectors ``b (Q, d_out)`` of queries from the rows that are visible to them.

    ``forward(query (Q, d), context)``: what is invisible has no influence, NaN included; a row that is not finite
    spoils the queries that see it and no others. A query without any visible row gets ``empty_context (d,)``, a
    parameter that begins at 0 and moves only where there is something else to train: mean, maximum, dot product and
    fixed decay beside a frozen encoder and a plain concatenation are not trained, and keep it at 0. Computed in
    float32 (float64 where parameters or queries are) under autocast too, returned in the dtype of the parameters.

    Args:
        d: Width of the states.
        median_gap: Days, the time unit of a decay; aggregators that have none take it from their factory and leave it.
        published: Whether arguments that are None are those of the released code; left where there are none.

    Raises:
        ValueError: If ``d`` is below 1 or ``median_gap`` is no positive number.
    """

    def __init__(self, *, d: int, median_gap: float = 1.0, published: bool = False) -> None:
        require_at_least_one(d=d)
        if not 0 < median_gap < math.inf:
            raise ValueError(f"median_gap must be a positive number of days, got {median_gap}")
        super().__init__()
        self.d = d
        self.empty_context = nn.Parameter(torch.zeros(d))

    @property
    def d_out(self) -> int:
        """Width of the context vector."""
        return self.d

    def forward(self, query: Tensor, context: Context) -> Tensor:
        """Context vectors ``(Q, d_out)``.

        Raises:
            ValueError: If widths or numbers of queries differ.
        """
        with torch.autocast(query.device.type, enabled=False):
            query, context, spoiled = self._prepared(query, context)
            seen = context.visible.any(1, keepdim=True)
            if not context.visible.shape[1]:
                return self.or_empty(query.new_zeros(len(query), self.d), seen).to(self.empty_context.dtype)
            found = self.or_empty(self.aggregate(query, context), seen)
            return found.masked_fill(spoiled, math.nan).to(self.empty_context.dtype)

    def or_empty(self, found: Tensor, seen: Tensor) -> Tensor:
        """``(Q, d_out)``: what was found where anything is seen ``(Q, 1)``, else ``empty_context``."""
        return torch.where(seen, found, self.empty_context.to(found))

    def weights(self, query: Tensor, context: Context) -> Tensor | None:
        """Weight ``(Q, n)`` of each row in a query's context vector, 0 where invisible; None where rows have none.

        Those of mean and softmax sum to 1 over the rows of a query that sees any. Those of the Hawkes family do not:
        they are the factors of the states, or of the learned influence, in its sum. With several heads the mean
        over heads.
        """
        with torch.autocast(query.device.type, enabled=False):
            query, context, _ = self._prepared(query, context)
            return self.row_weights(query, context)

    @abstractmethod
    def aggregate(self, query: Tensor, context: Context) -> Tensor:
        """``(Q, d_out)`` from finite states; anything finite where nothing is visible."""

    def row_weights(self, query: Tensor, context: Context) -> Tensor | None:
        """:meth:`weights` from finite states."""
        return None

    def _prepared(self, query: Tensor, context: Context) -> tuple[Tensor, Context, Tensor]:
        """Query and context in the dtype of the computation, and which queries ``(Q, 1)`` see a row not finite."""
        name = type(self).__name__
        if query.ndim != 2 or query.shape[1] != self.d or context.states.shape[1:] != query.shape[1:]:
            raise ValueError(
                f"{name} takes queries and states of width {self.d}, "
                f"got {tuple(query.shape)} and {tuple(context.states.shape)}"
            )
        if len(context.visible) != len(query):
            raise ValueError(f"{name} takes a context of {len(query)} queries, got one of {len(context.visible)}")
        dtype = torch.promote_types(torch.promote_types(query.dtype, self.empty_context.dtype), torch.float32)
        states = context.states.to(dtype)
        spoiled = context.visible.new_zeros(len(query), 1)
        # The sum of finite rows may overflow, no sum of others is finite: most tables are cleared in one pass.
        if not states.detach().sum().isfinite():
            broken = ~states.isfinite().all(1, keepdim=True)
            # A product with weight 0 would carry NaN from rows that other queries of the batch see.
            states = states.masked_fill(broken, 0.0)
            spoiled = (context.gather(broken).squeeze(-1) & context.visible).any(1, keepdim=True)
        return query.to(dtype), replace(context, states=states, ages=context.ages.to(dtype)), spoiled


class Mean(Aggregator):
    """Mean of the visible states, ``b = sum_i X_i / n_t``; of the query only who is left out depends on it."""

    def row_weights(self, query: Tensor, context: Context) -> Tensor:
        """``1 / n_t``."""
        visible = context.visible.to(context.states.dtype)
        return visible / visible.sum(1, keepdim=True).clamp_min(1.0)

    def aggregate(self, query: Tensor, context: Context) -> Tensor:
        """``(Q, d)``."""

        def mean(query: Tensor, context: Context) -> Tensor:
            return context.combine(self.row_weights(query, context), context.states)

        return by_queries(mean, query, context, bytes_of_weights(context))


class Max(Aggregator):
    """Largest value of each component among the visible states, ``b_k = max_i X_ik``."""

    def aggregate(self, query: Tensor, context: Context) -> Tensor:
        """``(Q, d)`` without gathered rows: bags of row numbers are reduced where they stand."""
        if not context.visible.any():
            return query.new_zeros(len(query), self.d)
        queries, columns = context.visible.nonzero(as_tuple=True)
        rows = columns if context.rows is None else context.rows[queries, columns]
        counts = context.visible.sum(1)
        return F.embedding_bag(rows, context.states, counts.cumsum(0) - counts, mode="max")


class SoftmaxAggregator(Aggregator):
    """Softmax attention over the visible rows; the values are the raw states.

        l_i = scale <k(X_i), f(q)>;  a = softmax(l);  b = sum_i a_i X_i

    With H heads the r features and the d components are cut into H parts, and head h weighs the h-th part.

    Args:
        d: Width of the states.
        rank: r, width of the features.
        median_gap: See :class:`Aggregator`.
        published: See :class:`Aggregator`.
        n_heads: H, divides ``rank`` and ``d``.
        scale: Of the logits: a positive number, ``"sqrt"`` for sqrt(H / r), ``"learnable"`` to begin there. None is
            ``"sqrt"``, published 1.
        top_k: Rows with a logit below the k-th largest are left out; rows that tie with it stay. None keeps all.
        log_count: Correction for a context that is a sample: logits are multiplied by ln(n_t) / ln(log_count), which
            keeps attention as concentrated among n_t rows as among ``log_count``. None for no correction.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        *,
        d: int,
        rank: int,
        median_gap: float = 1.0,
        published: bool = False,
        n_heads: int = 1,
        scale: float | Literal["sqrt", "learnable"] | None = None,
        top_k: int | None = None,
        log_count: int | None = None,
    ) -> None:
        super().__init__(d=d, median_gap=median_gap)
        require_at_least_one(rank=rank, n_heads=n_heads, top_k=1 if top_k is None else top_k)
        if rank % n_heads or d % n_heads:
            raise ValueError(f"n_heads must divide the width {d} and the rank {rank}, got {n_heads}")
        if log_count is not None and log_count < 2:
            raise ValueError(f"log_count must be at least 2 rows or null, got {log_count}")
        self.n_heads = n_heads
        self.top_k = top_k
        self.log_count = log_count
        self.scale: float | None = None
        if scale is None:
            scale = 1.0 if published else "sqrt"
        match scale:
            case "learnable":
                self.log_scale = nn.Parameter(torch.tensor(math.log(n_heads / rank) / 2))
            case "sqrt":
                self.scale = math.sqrt(n_heads / rank)
            case float() | int() if 0 < scale < math.inf:
                self.scale = float(scale)
            case _:
                raise ValueError(f"scale must be a positive number, 'sqrt' or 'learnable', got {scale!r}")
        self.rank = rank

    @abstractmethod
    def features(self, query: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``(Q, r)`` of the queries and ``(n_rows, r)`` of the distinct states."""

    def logits(self, query: Tensor, keys: Tensor, context: Context) -> Tensor:
        """Logits ``(Q, n)`` of one head's features ``(Q, r / H)`` and ``(n_rows, r / H)``."""
        scale = self.log_scale.to(query).exp() if self.scale is None else self.scale
        return context.dot(query * scale, keys)

    def attend(self, logits: Tensor, context: Context) -> Tensor:
        """Weights ``(Q, n)`` of the rows from their logits."""
        return masked_softmax(logits, self.kept(logits, context.visible))

    def kept(self, logits: Tensor, visible: Tensor) -> Tensor:
        """Which visible rows ``(Q, n) bool`` are among the top k; a comparison, so that their order cannot matter."""
        if self.top_k is None or self.top_k >= logits.shape[1]:
            return visible
        ranked = logits.detach().masked_fill(~visible, -math.inf)
        return visible & (ranked >= ranked.topk(self.top_k, dim=1).values[:, -1:])

    def heads(self, query: Tensor, keys: Tensor, context: Context) -> list[Tensor]:
        """Weights ``(Q, n)`` of each head from features of all heads."""
        weights = []
        for query_part, key_part in zip(query.chunk(self.n_heads, 1), keys.chunk(self.n_heads, 1), strict=True):
            logits = self.logits(query_part, key_part, context)
            if self.log_count is not None:
                n_visible = context.visible.sum(1, keepdim=True).clamp_min(1).to(logits)
                logits = logits * (n_visible.log() / math.log(self.log_count))
            weights.append(self.attend(logits, context))
        return weights

    def aggregate(self, query: Tensor, context: Context) -> Tensor:
        """``(Q, d)``; features are taken of distinct rows, once."""
        mapped, keys = self.features(query, context.states)

        def attended(mapped: Tensor, context: Context) -> Tensor:
            parts = zip(self.heads(mapped, keys, context), context.states.chunk(self.n_heads, 1), strict=True)
            return torch.cat([context.combine(weights, part) for weights, part in parts], 1)

        return by_queries(attended, mapped, context, bytes_of_weights(context))

    def row_weights(self, query: Tensor, context: Context) -> Tensor:
        """``(Q, n)``, the mean over heads."""
        mapped, keys = self.features(query, context.states)

        def averaged(mapped: Tensor, context: Context) -> Tensor:
            return torch.stack(self.heads(mapped, keys, context)).mean(0)

        return by_queries(averaged, mapped, context, bytes_of_weights(context))


class Attention(SoftmaxAggregator):
    """Dot-product attention, ``a = softmax(scale X q)``, without parameters.

    Arguments are those of :class:`SoftmaxAggregator`, with r = d.
    """

    def __init__(
        self,
        *,
        d: int,
        median_gap: float = 1.0,
        published: bool = False,
        n_heads: int = 1,
        scale: float | Literal["sqrt", "learnable"] | None = None,
        top_k: int | None = None,
        log_count: int | None = None,
    ) -> None:
        super().__init__(
            d=d,
            rank=d,
            median_gap=median_gap,
            published=published,
            n_heads=n_heads,
            scale=scale,
            top_k=top_k,
            log_count=log_count,
        )

    def features(self, query: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """The states themselves."""
        return query, states


class LearnableAttention(SoftmaxAggregator):
    """Attention under a learned bilinear form, ``a = softmax(scale X A q)`` with A ``(d, d)``.

    A bias is added to X A and so changes all logits of a query alike: it cancels. Other arguments are those of
    :class:`SoftmaxAggregator`, with r = d.

    Args:
        bias: Whether the map of the states carries a bias ``(d,)``. None is no, published yes.
    """

    def __init__(
        self,
        *,
        d: int,
        median_gap: float = 1.0,
        published: bool = False,
        bias: bool | None = None,
        n_heads: int = 1,
        scale: float | Literal["sqrt", "learnable"] | None = None,
        top_k: int | None = None,
        log_count: int | None = None,
    ) -> None:
        super().__init__(
            d=d,
            rank=d,
            median_gap=median_gap,
            published=published,
            n_heads=n_heads,
            scale=scale,
            top_k=top_k,
            log_count=log_count,
        )
        self.A = nn.Parameter(torch.empty(d, d))
        self.bias = nn.Parameter(torch.zeros(d)) if (published if bias is None else bias) else None
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # as nn.Linear

    def features(self, query: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """``A q`` and X; with a bias ``q`` and ``X A + bias``, which takes a product for each state."""
        A = self.A.to(query)
        if self.bias is None:
            return F.linear(query, A), states
        return query, F.linear(states, A.T, self.bias.to(query))


class SymmetricAttention(SoftmaxAggregator):
    """Attention under a learned semi-definite form, ``a = softmax(scale (X S^T)(S q))`` with S ``(r, d)``.

    A bias does not cancel here: it adds a term of the row alone. Other arguments are those of
    :class:`SoftmaxAggregator`.

    Args:
        rank: r.
        bias: Whether S carries a bias ``(r,)``. None is no, published yes.
    """

    def __init__(
        self,
        *,
        d: int,
        median_gap: float = 1.0,
        published: bool = False,
        rank: int = 100,
        bias: bool | None = None,
        n_heads: int = 1,
        scale: float | Literal["sqrt", "learnable"] | None = None,
        top_k: int | None = None,
        log_count: int | None = None,
    ) -> None:
        super().__init__(
            d=d,
            rank=rank,
            median_gap=median_gap,
            published=published,
            n_heads=n_heads,
            scale=scale,
            top_k=top_k,
            log_count=log_count,
        )
        self.S = Perceptron((d, rank), bias=published if bias is None else bias)

    def features(self, query: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """``S q`` and ``X S^T``."""
        return self.S(query), self.S(states)


class KernelAttention(SoftmaxAggregator):
    """Nadaraya-Watson estimate under a learned positive definite kernel, ``a_i ~ exp(scale <phi(X_i), phi(q)>)``.

    phi: d -> hidden -> r, a ReLU between layers and none after the last; the same parameters for rows and query.
    Other arguments are those of :class:`SoftmaxAggregator`.

    Args:
        rank: r.
        hidden: Widths of the hidden layers; none makes phi linear.
        bias: Whether the layers of phi carry a bias.
    """

    def __init__(
        self,
        *,
        d: int,
        median_gap: float = 1.0,
        published: bool = False,
        rank: int = 100,
        hidden: Sequence[int] = (100,),
        bias: bool = True,
        n_heads: int = 1,
        scale: float | Literal["sqrt", "learnable"] | None = None,
        top_k: int | None = None,
        log_count: int | None = None,
    ) -> None:
        super().__init__(
            d=d,
            rank=rank,
            median_gap=median_gap,
            published=published,
            n_heads=n_heads,
            scale=scale,
            top_k=top_k,
            log_count=log_count,
        )
        self.phi = Perceptron((d, *hidden, rank), bias=bias)

    def features(self, query: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """``phi(q)`` and ``phi(X)``."""
        return self.phi(query), self.phi(states)
