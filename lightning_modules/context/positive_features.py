"""Linear attention: a kernel with non-negative features, whose sums over users can be kept up to date.

Q queries, n_rows distinct rows, d width, r features. Source: spec of arXiv 2502.10205, section 4.1.9; elu + 1 from
Katharopoulos et al., arXiv 2006.16236; positive random features from Choromanski et al., arXiv 2009.14794, lemma 1.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.context.aggregators import SoftmaxAggregator
from lightning_modules.context.masked_rows import Perceptron
from lightning_modules.context.visible import Context


def gaussian_directions(n_directions: int, d: int, seed: int) -> Tensor:
    """``(n_directions, d) float32`` standard normal vectors, orthogonal to each other within blocks of d.

    Each row is exactly N(0, I): a direction of a random orthogonal matrix times the length of another such vector.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(math.ceil(n_directions / d)):
        orthogonal, upper = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
        # The signs make the factorisation unique, and with it the distribution uniform (Mezzadri 2007).
        blocks.append((orthogonal * upper.diagonal().sign()).T)
    lengths = torch.randn(n_directions, d, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
    return (torch.cat(blocks)[:n_directions] * lengths).float()


class LinearKernel(SoftmaxAggregator):
    """Weights proportional to an inner product of non-negative features, ``b = M^T f(q) / (s . f(q))``.

        M = sum_i f(X_i) X_i^T  (r, d);   s = sum_i f(X_i)  (r,)

    Here, where the visible rows of a batch are given, the same number is computed from the weights
    ``f(X_i) . f(q)`` of each row, in the exponent so that no sum is 0; kept up to date by event (+ new - old), M and s
    answer a query in O(r d) for any number of users, which :meth:`positive_features` and :meth:`read` serve.

    ``kind="elu"``: ``f(x) = elu(W x + c) + 1`` with W ``(r, d)`` learned, one map for rows and query.
    ``kind="random"``: ``f(x) = exp(w_k . y - |y|^2 / 2) / sqrt(r)`` with ``y = x / d^(1/4)`` and fixed normal w_k,
    nothing learned; ``f(x) . f(z)`` has the mean ``exp(x . z / sqrt(d))``, which is the default attention.

    Args:
        d: Width of the states.
        median_gap: See :class:`~lightning_modules.context.aggregators.Aggregator`.
        published: Likewise; this one was not.
        rank: r.
        kind: ``"elu"`` or ``"random"``.
        top_k: As in :class:`~lightning_modules.context.aggregators.SoftmaxAggregator`; None where M and s are to
            agree.
        seed: Of the random features.

    Raises:
        ValueError: If an argument is out of range.
    """

    directions: Tensor

    def __init__(
        self,
        *,
        d: int,
        median_gap: float = 1.0,
        published: bool = False,
        rank: int = 100,
        kind: Literal["elu", "random"] = "elu",
        top_k: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(d=d, rank=rank, median_gap=median_gap, scale=1.0, top_k=top_k)
        self.kind = kind
        match kind:
            case "elu":
                self.map = Perceptron((d, rank))
            case "random":
                self.register_buffer("directions", gaussian_directions(rank, d, seed))
            case _:
                raise ValueError(f"kind must be 'elu' or 'random', got {kind!r}")

    @property
    def has_sums(self) -> bool:
        """Whether M and s over all users serve every query.

        Not with ``top_k``, as a sum cannot leave out the rows below a query's k-th; nor with random features, whose
        weights grow with the exponential of the norms: a query's own row, taken out of the sum again, may be all of it.
        """
        return self.kind == "elu" and self.top_k is None

    def log_features(self, states: Tensor) -> Tensor:
        """``ln f(x) (..., r)`` of states ``(..., d)``."""
        if self.kind == "elu":
            mapped = self.map(states)
            # elu(x) + 1 is x + 1 above 0 and exp(x) below, where the sum itself would round to 0 from -17 on.
            return torch.where(mapped > 0, mapped.clamp_min(0.0).log1p(), mapped)
        scaled = states / self.d**0.25
        exponents = F.linear(scaled, self.directions.to(scaled)) - scaled.square().sum(-1, keepdim=True) / 2
        return exponents - math.log(self.rank) / 2

    def positive_features(self, states: Tensor) -> Tensor:
        """``f(x) (..., r)``, non-negative, of states ``(..., d)``."""
        return self.log_features(states).exp()

    @staticmethod
    def read(query_features: Tensor, moments: Tensor, mass: Tensor) -> Tensor:
        """``b (Q, d)`` from sums over rows.

        Args:
            query_features: f(q) ``(Q, r)``.
            moments: M ``(r, d)`` or ``(Q, r, d)``.
            mass: s ``(r,)`` or ``(Q, r)``.

        Returns:
            ``(Q, d)``; 0 where the mass under the query is 0.
        """
        above = (query_features.unsqueeze(-2) @ moments).squeeze(-2)
        below = (query_features * mass).sum(-1, keepdim=True)
        return torch.where(below > 0, above / below.clamp_min(torch.finfo(below.dtype).tiny), 0.0)

    def features(self, query: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """``f(q)`` over its largest component; for the rows the same, and in a further column its logarithm."""
        of_query, of_rows = self.log_features(query), self.log_features(states)
        # A factor of the query cancels; that of a row is added again to its logit.
        largest = of_rows.detach().amax(1, keepdim=True)
        return (of_query - of_query.detach().amax(1, keepdim=True)).exp(), torch.cat(
            [(of_rows - largest).exp(), largest], 1
        )

    def logits(self, query: Tensor, keys: Tensor, context: Context) -> Tensor:
        """``ln(f(X_i) . f(q))`` up to a number of the query."""
        product = context.dot(query, keys[:, :-1])
        # Features that share no direction: the smallest positive number rather than -inf, which has no gradient.
        return product.clamp_min(torch.finfo(product.dtype).tiny).log() + context.gather(keys[:, -1:]).squeeze(-1)
