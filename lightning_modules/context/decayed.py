"""Aggregators whose weights fade with the age of a state: the Hawkes family.

Q queries, n rows a query, d width; ages Delta = t - tau >= 0 and the time unit theta in days. A multivariate Hawkes
intensity sums, over other sequences, influence times a kernel of time; here the states take the place of events:
``b = sum_i beta(X_i, q) kappa(Delta_i)``. Source: spec of arXiv 2502.10205, sections 4 and 4.1.

The released code counts in seconds with theta = 1: ``theta=1 / 86400``, which ``published`` takes where none is given.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.context.aggregators import Aggregator, Attention, LearnableAttention, SoftmaxAggregator
from lightning_modules.context.masked_rows import Perceptron, by_queries, bytes_of_weights, masked_softmax
from lightning_modules.context.visible import Context

SECOND = 1 / 86_400
"""In days: the released time unit."""


class Decay(nn.Module):
    """Logarithm of the exponential decay, ``-Delta / theta``, never above 0.

    Args:
        theta: Time unit in days, positive.
        learn_theta: Whether ln(theta) is a parameter.

    Raises:
        ValueError: If ``theta`` is no positive number.
    """

    def __init__(self, theta: float, *, learn_theta: bool) -> None:
        if not 0 < theta < math.inf:
            raise ValueError(f"theta must be a positive number of days, got {theta}")
        super().__init__()
        self.learn_theta = learn_theta
        if learn_theta:
            self.log_theta = nn.Parameter(torch.tensor(math.log(theta)))
        else:
            self.register_buffer("fixed_theta", torch.tensor(theta))

    @property
    def theta(self) -> Tensor:
        """Time unit in days, a scalar."""
        return self.log_theta.exp() if self.learn_theta else self.get_buffer("fixed_theta")

    def forward(self, ages: Tensor) -> Tensor:
        """``-Delta / theta`` of ages in days, any shape."""
        return -ages / self.theta.to(ages)


def time_unit(theta: float | None, median_gap: float, published: bool) -> float:
    """Theta in days: as given, else ``median_gap``, published a second."""
    if theta is not None:
        return theta
    return SECOND if published else median_gap


class Hawkes(Aggregator):
    """``b = sum_i v_i kappa(Delta_i)`` with weights kappa of the age alone, and v the states or their influence.

    Args:
        d: Width of the states.
        median_gap: Days, theta where none is given.
        published: See :class:`~lightning_modules.context.aggregators.Aggregator`.
        theta: Time unit in days. None is ``median_gap``, published a second.
        learn_theta: Whether ln(theta) is learned.
        normalise: ``"sum"``, as in the thesis, grows with the number of rows; ``"mean"`` divides by it. None is
            ``"sum"``, published, as in the released code, ``"mean"``.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        *,
        d: int,
        median_gap: float = 1.0,
        published: bool = False,
        theta: float | None = None,
        learn_theta: bool = False,
        normalise: Literal["sum", "mean"] | None = None,
    ) -> None:
        super().__init__(d=d, median_gap=median_gap)
        if normalise not in ("sum", "mean", None):
            raise ValueError(f"normalise must be 'sum' or 'mean', got {normalise!r}")
        self.decay = Decay(time_unit(theta, median_gap, published), learn_theta=learn_theta)
        self.normalise = normalise or ("mean" if published else "sum")

    def kappa(self, context: Context) -> Tensor:
        """Kernel of time at the age of each row ``(Q, n)``; what stands at invisible rows is not used."""
        return self.decay(context.ages).exp()

    def row_weights(self, query: Tensor, context: Context) -> Tensor:
        """Kernel of time of each visible row, over n_t for a mean."""
        weights = self.kappa(context).masked_fill(~context.visible, 0.0)
        if self.normalise == "mean":
            weights = weights / context.visible.sum(1, keepdim=True).clamp_min(1)
        return weights

    def aggregate(self, query: Tensor, context: Context) -> Tensor:
        """``(Q, d)``."""

        def decayed(query: Tensor, context: Context) -> Tensor:
            return context.combine(self.row_weights(query, context), context.states)

        return by_queries(decayed, query, context, bytes_of_weights(context))


class ExpHawkes(Hawkes):
    """Sum or mean of states under an exponential decay, ``b = sum_i X_i exp(-Delta_i / theta)``.

    Arguments are those of :class:`Hawkes`.
    """


class ExpLearnableHawkes(Hawkes):
    """Learned influence of row and query under an exponential decay, ``b = sum_i psi([X_i; q]) exp(-Delta_i / theta)``.

    psi: 2d -> hidden -> d, a ReLU between layers. Its first layer is the sum of a map of X_i, taken once a distinct
    row, and one of q; its last is applied to the weighted sum over rows, as it is linear: nothing of width d is held
    for a (query, row) pair. The thesis has ``hidden=[100]``.

    Args:
        d: Width of the states.
        median_gap: Days, theta where none is given.
        published: As in :class:`Hawkes`.
        theta: As in :class:`Hawkes`.
        learn_theta: As in :class:`Hawkes`.
        normalise: As in :class:`Hawkes`.
        hidden: Widths of the hidden layers of psi, at least one.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        *,
        d: int,
        median_gap: float = 1.0,
        published: bool = False,
        theta: float | None = None,
        learn_theta: bool = False,
        normalise: Literal["sum", "mean"] | None = None,
        hidden: Sequence[int] = (100, 100),
    ) -> None:
        super().__init__(
            d=d,
            median_gap=median_gap,
            published=published,
            theta=theta,
            learn_theta=learn_theta,
            normalise=normalise,
        )
        if not hidden:
            raise ValueError("psi must have at least one hidden layer, got none")
        self.row_map = Perceptron((d, hidden[0]))
        self.query_map = Perceptron((d, hidden[0]), bias=False)  # one bias serves the sum of both
        # One layer of the sum's width, as if initialised on [X_i; q] whole.
        for part in (*self.row_map.parameters(), *self.query_map.parameters()):
            nn.init.uniform_(part, -1 / math.sqrt(2 * d), 1 / math.sqrt(2 * d))
        self.inner = Perceptron(hidden)
        self.last = Perceptron((hidden[-1], d))

    def aggregate(self, query: Tensor, context: Context) -> Tensor:
        """``(Q, d)``; psi is evaluated at visible pairs alone."""
        of_rows = self.row_map(context.states)
        (last,) = self.last.layers
        assert isinstance(last, nn.Linear)

        def influence(of_query: Tensor, context: Context) -> Tensor:
            weights = self.row_weights(of_query, context)
            queries, columns = context.visible.nonzero(as_tuple=True)
            rows = columns if context.rows is None else context.rows[queries, columns]
            hidden = self.inner((of_rows[rows] + of_query[queries]).relu()).relu()  # (pairs, hidden[-1])
            weighted = hidden * weights[queries, columns].unsqueeze(1)
            summed = weighted.new_zeros(len(of_query), weighted.shape[1]).index_add(0, queries, weighted)
            bias = weights.sum(1, keepdim=True) * last.bias.to(weights)
            return F.linear(summed, last.weight.to(summed)) + bias

        n_most = int(context.visible.sum(1).max()) if len(query) else 0
        # Inputs, activations and their products of every layer, for each pair.
        width = 4 * sum(layer.out_features for layer in (self.row_map.layers[0], *self.inner.layers))
        return by_queries(influence, self.query_map(query), context, n_most * width * query.element_size())


class LearnableHawkes(ExpLearnableHawkes):
    """Learned influence and learned kernel of time, ``b = sum_i psi([X_i; q]) kappa(Delta_i)``.

    kappa: 1 -> 10 -> 10 -> 1, a ReLU between layers, of any sign. It diverged as published, where its input is the
    age itself; ``age="log"`` feeds ln(1 + Delta / theta) instead.

    Args:
        d: Width of the states.
        median_gap: Days, theta where none is given.
        published: As in :class:`Hawkes`.
        theta: As in :class:`Hawkes`.
        learn_theta: As in :class:`Hawkes`.
        normalise: As in :class:`Hawkes`.
        hidden: As in :class:`ExpLearnableHawkes`.
        kappa_hidden: Widths of the hidden layers of kappa.
        age: ``"log"``, or ``"linear"`` for Delta / theta. None is ``"log"``, published ``"linear"``.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        *,
        d: int,
        median_gap: float = 1.0,
        published: bool = False,
        theta: float | None = None,
        learn_theta: bool = False,
        normalise: Literal["sum", "mean"] | None = None,
        hidden: Sequence[int] = (100, 100),
        kappa_hidden: Sequence[int] = (10, 10),
        age: Literal["log", "linear"] | None = None,
    ) -> None:
        super().__init__(
            d=d,
            median_gap=median_gap,
            published=published,
            theta=theta,
            learn_theta=learn_theta,
            normalise=normalise,
            hidden=hidden,
        )
        if age not in ("log", "linear", None):
            raise ValueError(f"age must be 'log' or 'linear', got {age!r}")
        self.age = age or ("linear" if published else "log")
        self.kernel_of_time = Perceptron((1, *kappa_hidden, 1))

    def kappa(self, context: Context) -> Tensor:
        """``(Q, n)``; evaluated at visible rows alone, of which a shared layout may have few."""
        ages = -self.decay(context.ages[context.visible])
        found = self.kernel_of_time((ages.log1p() if self.age == "log" else ages).unsqueeze(1)).squeeze(1)
        return torch.zeros_like(context.ages).masked_scatter(context.visible, found)


def require_decay_mode(mode: str) -> None:
    """Refuse an unknown mode of decay.

    Raises:
        ValueError: If it is none of the three.
    """
    if mode not in ("post", "post_renorm", "logit"):
        raise ValueError(f"mode must be 'post', 'post_renorm' or 'logit', got {mode!r}")


def decayed_attention(
    aggregator: SoftmaxAggregator, logits: Tensor, log_decay: Tensor, context: Context, mode: str
) -> Tensor:
    """Weights ``(Q, n)`` of attention that fades with age.

        post         a_i = softmax(l)_i exp(-Delta_i / theta)       not normalised again, as published
        post_renorm  post, divided by its sum over rows
        logit        a = softmax(l - Delta / theta)

    The last two are one and the same but for ``top_k``, which chooses before the decay in ``post_renorm`` and after
    it in ``logit``; both are computed in the exponent, where old rows cannot all round to 0.

    Args:
        aggregator: Whose choice of rows is used.
        logits: ``(Q, n)``.
        log_decay: ``(Q, n)``, -Delta / theta.
        context: Visible rows.
        mode: One of the three.
    """
    if mode == "logit":
        return masked_softmax(logits + log_decay, aggregator.kept(logits + log_decay, context.visible))
    kept = aggregator.kept(logits, context.visible)
    if mode == "post_renorm":
        return masked_softmax(logits + log_decay, kept)
    return masked_softmax(logits, kept) * log_decay.exp()


class AttentionHawkes(Attention):
    """Attention times an exponential decay, ``b = sum_i a_i exp(-Delta_i / theta) X_i``, ``a = softmax(scale X q)``.

    Arguments are those of :class:`Attention` and the following.

    Args:
        theta: Time unit in days. None is ``median_gap``, published a second.
        learn_theta: Whether ln(theta) is learned.
        mode: As in :func:`decayed_attention`.
    """

    def __init__(
        self,
        *,
        d: int,
        median_gap: float = 1.0,
        published: bool = False,
        theta: float | None = None,
        learn_theta: bool = False,
        mode: Literal["post", "post_renorm", "logit"] = "post",
        n_heads: int = 1,
        scale: float | Literal["sqrt", "learnable"] | None = None,
        top_k: int | None = None,
        log_count: int | None = None,
    ) -> None:
        require_decay_mode(mode)
        super().__init__(
            d=d,
            median_gap=median_gap,
            published=published,
            n_heads=n_heads,
            scale=scale,
            top_k=top_k,
            log_count=log_count,
        )
        self.decay = Decay(time_unit(theta, median_gap, published), learn_theta=learn_theta)
        self.mode = mode

    def attend(self, logits: Tensor, context: Context) -> Tensor:
        """Weights ``(Q, n)`` of the rows from logits and ages."""
        return decayed_attention(self, logits, self.decay(context.ages), context, self.mode)


class LearnableAttentionHawkes(LearnableAttention):
    """Learned attention times an exponential decay, as :class:`AttentionHawkes` with ``a = softmax(scale X A q)``.

    Arguments are those of :class:`LearnableAttention` and of :class:`AttentionHawkes`.
    """

    def __init__(
        self,
        *,
        d: int,
        median_gap: float = 1.0,
        published: bool = False,
        theta: float | None = None,
        learn_theta: bool = False,
        mode: Literal["post", "post_renorm", "logit"] = "post",
        bias: bool | None = None,
        n_heads: int = 1,
        scale: float | Literal["sqrt", "learnable"] | None = None,
        top_k: int | None = None,
        log_count: int | None = None,
    ) -> None:
        require_decay_mode(mode)
        super().__init__(
            d=d,
            median_gap=median_gap,
            published=published,
            bias=bias,
            n_heads=n_heads,
            scale=scale,
            top_k=top_k,
            log_count=log_count,
        )
        self.decay = Decay(time_unit(theta, median_gap, published), learn_theta=learn_theta)
        self.mode = mode

    def attend(self, logits: Tensor, context: Context) -> Tensor:
        """Weights ``(Q, n)`` of the rows from logits and ages."""
        return decayed_attention(self, logits, self.decay(context.ages), context, self.mode)
