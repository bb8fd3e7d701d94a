"""Ranking metrics as ``torchmetrics.Metric``: sums over users as states, means at the end, exact under DDP.

B users, R relevant items (padded), V items, M history items. A user without relevant items has no value and is
left out of the mean; a mean over no user is NaN.

State names carry metric and cut-off, e.g. ``ndcg_at_10_sum``. ``MetricCollection`` merges metrics whose states
have equal names and equal values after the first batch, so that with plain names a first batch without a hit
would turn NDCG, MRR and MAP into one another.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_modules.metrics.functional import (
    PER_USER,
    coverage,
    history_user_counts,
    recommendation_counts,
    relevance_hits,
    surprisal,
)


def _check_at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


class _MeanOverUsers(Metric):
    """Mean over users of one function of :data:`PER_USER`; subclasses name it."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    name: str
    """Key into :data:`PER_USER`."""

    def __init__(self, k: int = 10) -> None:
        _check_at_least_one("k", k)
        super().__init__()
        self.k = k
        self._value: Callable[[Tensor, Tensor, int], Tensor] = PER_USER[self.name]
        self._sum, self._count = f"{self.name}_at_{k}_sum", f"{self.name}_at_{k}_n_users"
        self.add_state(self._sum, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state(self._count, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, top_ids: Tensor, relevant: Tensor) -> None:
        """Add the users of one batch.

        Args:
            top_ids: ``(B, k_max) int64`` ranked ids, distinct in a row, -1 as filler, ``k_max >= k``.
            relevant: ``(B, R) int64`` relevant ids, distinct in a row, -1 as filler.

        Raises:
            ValueError: If the shapes disagree or ``top_ids`` has fewer than k places.
        """
        hits, n_relevant = relevance_hits(top_ids, relevant)
        values = self._value(hits, n_relevant, self.k)
        defined = n_relevant > 0
        setattr(self, self._sum, getattr(self, self._sum) + values[defined].sum())
        setattr(self, self._count, getattr(self, self._count) + defined.sum())

    def compute(self) -> Tensor:
        """Mean over the users that have relevant items, scalar float64."""
        return getattr(self, self._sum) / getattr(self, self._count)


class NDCG(_MeanOverUsers):
    """Normalised discounted cumulative gain: DCG@k over ``sum_{i <= min(k, R)} 1 / log2(i + 1)``.

    Args:
        k: Cut-off, at least 1.
    """

    name = "ndcg"


class HitRate(_MeanOverUsers):
    """Share of users with any relevant item among the first k.

    Args:
        k: Cut-off, at least 1.
    """

    name = "hit_rate"


class MRR(_MeanOverUsers):
    """Mean of ``1 / rank`` of the first relevant item, 0 beyond place k.

    Args:
        k: Cut-off, at least 1.
    """

    name = "mrr"


class Recall(_MeanOverUsers):
    """Mean share of a user's relevant items found among the first k.

    Args:
        k: Cut-off, at least 1.
    """

    name = "recall"


class Precision(_MeanOverUsers):
    """Mean number of relevant items among the first k, over k.

    Args:
        k: Cut-off, at least 1.
    """

    name = "precision"


class MAP(_MeanOverUsers):
    """Mean of ``sum_{i <= k} precision@i * hit_i / min(k, R)``.

    Args:
        k: Cut-off, at least 1.
    """

    name = "map"


class _OverCatalogue(Metric):
    """Counts over the catalogue: how often an item was recommended, how many users hold it in their history.

    Args:
        k: Cut-off, at least 1.
        n_items: V, at least 1.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, k: int, n_items: int) -> None:
        _check_at_least_one("k", k)
        _check_at_least_one("n_items", n_items)
        super().__init__()
        self.k, self.n_items = k, n_items
        self._recommended = f"recommended_at_{k}"
        self.history_users: Tensor
        self.n_users: Tensor
        self.add_state(self._recommended, torch.zeros(n_items, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("history_users", torch.zeros(n_items, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("n_users", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, top_ids: Tensor, history_items: Tensor, history_offsets: Tensor) -> None:
        """Add the users of one batch; every user comes once in an epoch.

        Args:
            top_ids: ``(B, k_max) int64`` ranked ids, -1 as filler, ``k_max >= k``.
            history_items: ``(M,) int64`` items of the users' histories one after another, repeats allowed.
            history_offsets: ``(B + 1,) int64`` limits of each history.

        Raises:
            ValueError: If the shapes disagree, ``top_ids`` has fewer than k places or an id is not in 0..V-1.
        """
        if history_offsets.shape != (len(top_ids) + 1,):
            raise ValueError(
                f"history_offsets must be ({len(top_ids) + 1},) for {len(top_ids)} rankings, "
                f"got {tuple(history_offsets.shape)}"
            )
        found = recommendation_counts(top_ids, self.k, self.n_items)
        setattr(self, self._recommended, getattr(self, self._recommended) + found)
        self.history_users = self.history_users + history_user_counts(history_items, history_offsets, self.n_items)
        self.n_users = self.n_users + len(top_ids)


class Coverage(_OverCatalogue):
    """Distinct recommended items found in the users' histories over the distinct items of these histories.

    Args:
        k: Cut-off, at least 1.
        n_items: V, at least 1.
    """

    def compute(self) -> Tensor:
        """Scalar float64 in 0..1, NaN while the histories are empty."""
        return coverage(getattr(self, self._recommended), self.history_users)


class Surprisal(_OverCatalogue):
    """Mean over recommendations of ``log2(U / u_j) / log2(U)``, U users, u_j of them with item j in their history.

    Args:
        k: Cut-off, at least 1.
        n_items: V, at least 1.
    """

    def compute(self) -> Tensor:
        """Scalar float64 in 0..1, NaN while nothing was recommended."""
        return surprisal(getattr(self, self._recommended), self.history_users, self.n_users)
