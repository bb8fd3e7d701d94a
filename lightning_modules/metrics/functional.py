"""Quality of ranked lists for users with one or several relevant items, as pure functions.

B users, R relevant items (padded), V items, M history items in all, k places. Everything is accumulated in float64.

Source: with one relevant item the definitions are those of the evaluation of arXiv 2509.09682
(NDCG = 1 / log2(rank + 1)); for several they are the usual extensions stated in each function.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def relevance_hits(top_ids: Tensor, relevant: Tensor) -> tuple[Tensor, Tensor]:
    """Which places of a ranking hold a relevant item.

    Args:
        top_ids: ``(B, k_max) int64`` ranked ids, distinct in a row, -1 where there is no recommendation.
        relevant: ``(B, R) int64`` relevant ids, distinct in a row, -1 as filler.

    Returns:
        ``(hits (B, k_max) bool, n_relevant (B,) int64)``.

    Raises:
        ValueError: If the shapes are not ``(B, k_max)`` and ``(B, R)``.
    """
    if top_ids.ndim != 2 or relevant.ndim != 2 or len(top_ids) != len(relevant):
        raise ValueError(
            f"top_ids and relevant must be (B, k_max) and (B, R), "
            f"got {tuple(top_ids.shape)} and {tuple(relevant.shape)}"
        )
    n_relevant = (relevant >= 0).sum(dim=1)
    if relevant.shape[1] == 0:
        return torch.zeros_like(top_ids, dtype=torch.bool), n_relevant
    # A binary search per place: comparing all pairs would take (B, k_max, R) cells for baskets of any size.
    ascending = relevant.sort(dim=1).values
    nearest = torch.searchsorted(ascending, top_ids.contiguous()).clamp_(max=relevant.shape[1] - 1)
    return (ascending.gather(1, nearest) == top_ids) & (top_ids >= 0), n_relevant


def _first_k(hits: Tensor, k: int) -> Tensor:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if hits.ndim != 2 or hits.shape[1] < k:
        raise ValueError(f"k={k} needs rankings of at least {k} places, got hits of shape {tuple(hits.shape)}")
    return hits[:, :k].to(torch.float64)


def _undefined_without_relevant(values: Tensor, n_relevant: Tensor) -> Tensor:
    return values.masked_fill(n_relevant == 0, torch.nan)


def ndcg_at_k(hits: Tensor, n_relevant: Tensor, k: int) -> Tensor:
    """``sum_{i <= k} hit_i / log2(i + 1)`` over the same sum with the first min(k, R) places hit.

    Args:
        hits: ``(B, k_max) bool`` from :func:`relevance_hits`, ``k_max >= k``.
        n_relevant: ``(B,) int64`` number of relevant items of each user.
        k: Cut-off, at least 1.

    Returns:
        ``(B,) float64`` in 0..1; NaN for a user without relevant items.

    Raises:
        ValueError: If ``k`` is below 1 or exceeds the number of places.
    """
    gains = _first_k(hits, k)
    places = torch.arange(k, device=hits.device, dtype=torch.float64)
    discounts = 1 / torch.log2(places + 2)
    ideal = discounts.cumsum(0)[(n_relevant.clamp(1, k) - 1)]
    return _undefined_without_relevant((gains * discounts).sum(dim=1) / ideal, n_relevant)


def hit_rate_at_k(hits: Tensor, n_relevant: Tensor, k: int) -> Tensor:
    """1 if any of the first k places holds a relevant item, else 0; arguments and NaN as :func:`ndcg_at_k`."""
    return _undefined_without_relevant(_first_k(hits, k).amax(dim=1), n_relevant)


def mrr_at_k(hits: Tensor, n_relevant: Tensor, k: int) -> Tensor:
    """``1 / rank`` of the first hit within k places, else 0; arguments and NaN as :func:`ndcg_at_k`."""
    places = torch.arange(1, k + 1, device=hits.device, dtype=torch.float64)
    return _undefined_without_relevant((_first_k(hits, k) / places).amax(dim=1), n_relevant)


def recall_at_k(hits: Tensor, n_relevant: Tensor, k: int) -> Tensor:
    """Hits within k places over the number of relevant items; arguments and NaN as :func:`ndcg_at_k`."""
    found = _first_k(hits, k).sum(dim=1)
    return _undefined_without_relevant(found / n_relevant.clamp(min=1), n_relevant)


def precision_at_k(hits: Tensor, n_relevant: Tensor, k: int) -> Tensor:
    """Hits within k places over k, empty places included; arguments and NaN as :func:`ndcg_at_k`."""
    return _undefined_without_relevant(_first_k(hits, k).sum(dim=1) / k, n_relevant)


def average_precision_at_k(hits: Tensor, n_relevant: Tensor, k: int) -> Tensor:
    """``sum_{i <= k} precision@i * hit_i / min(k, R)``; arguments and NaN as :func:`ndcg_at_k`."""
    gains = _first_k(hits, k)
    places = torch.arange(1, k + 1, device=hits.device, dtype=torch.float64)
    total = (gains.cumsum(dim=1) / places * gains).sum(dim=1)
    return _undefined_without_relevant(total / n_relevant.clamp(1, k), n_relevant)


PER_USER: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "ndcg": ndcg_at_k,
    "hit_rate": hit_rate_at_k,
    "mrr": mrr_at_k,
    "recall": recall_at_k,
    "precision": precision_at_k,
    "map": average_precision_at_k,
}
"""The metrics that have a value for each user, by the names used in logs and reports."""


def per_user_metrics(top_ids: Tensor, relevant: Tensor, cutoffs: Sequence[int]) -> dict[str, Tensor]:
    """Every metric of :data:`PER_USER` at every cut-off, one value per user, as paired comparisons need them.

    Args:
        top_ids: ``(B, k_max) int64`` ranked ids, -1 as filler.
        relevant: ``(B, R) int64`` relevant ids, -1 as filler.
        cutoffs: The k, each at most ``k_max``.

    Returns:
        ``{"ndcg@10": (B,) float64, ...}``; NaN for users without relevant items, who are to be left out.

    Raises:
        ValueError: As :func:`relevance_hits` and :func:`ndcg_at_k`.
    """
    hits, n_relevant = relevance_hits(top_ids, relevant)
    return {f"{name}@{k}": value(hits, n_relevant, k) for k in cutoffs for name, value in PER_USER.items()}


def recommendation_counts(top_ids: Tensor, k: int, n_items: int) -> Tensor:
    """How often each item stands among the first k places.

    Args:
        top_ids: ``(B, k_max) int64`` ranked ids, -1 as filler, ``k_max >= k``.
        k: Cut-off, at least 1.
        n_items: V.

    Returns:
        ``(V,) int64``.

    Raises:
        ValueError: If ``k`` is below 1 or exceeds the number of places, or an id is V or more.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if top_ids.ndim != 2 or top_ids.shape[1] < k:
        raise ValueError(f"k={k} needs rankings of at least {k} places, got shape {tuple(top_ids.shape)}")
    places = top_ids[:, :k]
    recommended = places[places >= 0]
    if recommended.numel() and int(recommended.max()) >= n_items:
        raise ValueError(f"top_ids must be below {n_items}, the number of items, got {int(recommended.max())}")
    return torch.bincount(recommended, minlength=n_items)


def history_user_counts(history_items: Tensor, history_offsets: Tensor, n_items: int) -> Tensor:
    """Number of users whose history holds each item, repeats of a user counted once.

    Args:
        history_items: ``(M,) int64`` items of all histories one after another.
        history_offsets: ``(B + 1,) int64`` limits of each history.
        n_items: V.

    Returns:
        ``(V,) int64``.

    Raises:
        ValueError: If the offsets do not end at M or an id lies outside 0..V-1.
    """
    if int(history_offsets[-1]) != history_items.numel():
        raise ValueError(
            f"history_offsets must end at {history_items.numel()}, the number of history items, "
            f"got {int(history_offsets[-1])}"
        )
    if history_items.numel() and not 0 <= int(history_items.min()) <= int(history_items.max()) < n_items:
        raise ValueError(
            f"history_items must lie in 0..{n_items - 1}, got {int(history_items.min())}..{int(history_items.max())}"
        )
    lengths = history_offsets.diff()
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=history_items.device), lengths)
    pairs = torch.unique(rows * n_items + history_items)
    return torch.bincount(pairs % n_items, minlength=n_items)


def coverage(recommended: Tensor, history_users: Tensor) -> Tensor:
    """Distinct recommended items found in the histories over distinct items of the histories.

    Args:
        recommended: ``(V,) int64`` from :func:`recommendation_counts`, summed over users.
        history_users: ``(V,) int64`` from :func:`history_user_counts`, summed over users.

    Returns:
        Scalar float64 in 0..1; NaN when the histories are empty.
    """
    held = history_users > 0
    return ((recommended > 0) & held).sum().to(torch.float64) / held.sum()


def surprisal(recommended: Tensor, history_users: Tensor, n_users: Tensor | int) -> Tensor:
    """Mean over recommendations of ``log2(U / u_j) / log2(U)``, U users, u_j of them with item j in their history.

    An item nobody holds counts as the maximum 1, as an item held by one user does; with a single user the items
    of that user count 0, where the formula would read 0 / 0.

    Args:
        recommended: ``(V,) int64`` how often each item was recommended.
        history_users: ``(V,) int64`` u_j.
        n_users: U.

    Returns:
        Scalar float64 in 0..1; NaN when nothing was recommended.
    """
    users = torch.as_tensor(n_users, dtype=torch.float64, device=recommended.device)
    holders = history_users.to(torch.float64)
    surprise = torch.log2(users / holders.clamp(min=1)) / torch.log2(users.clamp(min=2))
    surprise = torch.where(holders == 0, torch.ones_like(surprise), surprise)
    weights = recommended.to(torch.float64)
    return (weights * surprise).sum() / weights.sum()
