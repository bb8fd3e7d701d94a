"""Interactions with a planted Markov structure, whose best attainable ranking quality is known.

V items, U users. The chain is of first order: with probability ``1 - noise`` the next item is one of the
``n_successors`` of the present one, the m-th (m = 1, 2, ...) with weight ``decay^(m-1)``; else it is any of the V
items alike. Successors lie on a ring of the items in random order: the m-th of item i is m places further. So every
item is the m-th successor of exactly one other, the uniform distribution is stationary, and each row of the
transition matrix holds the same V probabilities.
"""

import numpy as np
import polars as pl
from numpy.typing import NDArray

from datamodules.counter_hash import mix


def markov_interactions(
    n_users: int,
    n_items: int,
    *,
    mean_length: int = 20,
    n_successors: int = 4,
    decay: float = 0.5,
    noise: float = 0.1,
    n_days: int = 100,
    seed: int = 0,
) -> pl.DataFrame:
    """Draw histories from the chain, at random times of a common period.

    Args:
        n_users: U, at least 1.
        n_items: V, more than ``n_successors``.
        mean_length: Lengths are uniform in 3..2 x ``mean_length`` - 3; at least 3.
        n_successors: Likely successors of each item, at least 1.
        decay: Ratio of the probabilities of one successor and the one before it, in (0, 1].
        noise: Probability of a step to any item alike, in [0, 1].
        n_days: Length of the period from 2024-01-01; each user is active over a random part of it.
        seed: Of everything.

    Returns:
        ``user_id`` (int64, from 1), ``item_id`` (strings such as ``item-0042``), ``timestamp`` (microseconds), sorted
        by time. A user never has two interactions at one time.

    Raises:
        ValueError: If an argument is outside its range.
    """
    _check(n_items, n_successors, decay, noise)
    if n_users < 1:
        raise ValueError(f"n_users must be at least 1, got {n_users}")
    if mean_length < 3:
        raise ValueError(f"mean_length must be at least 3, got {mean_length}")
    if n_days < 1:
        raise ValueError(f"n_days must be at least 1, got {n_days}")
    generator = np.random.default_rng(seed)
    ring = _ring(n_items, seed)
    lengths = generator.integers(3, 2 * mean_length - 3, size=n_users, endpoint=True)
    longest = int(lengths.max())
    chances = decay ** np.arange(n_successors)
    steps = generator.choice(np.arange(1, n_successors + 1), p=chances / chances.sum(), size=(n_users, longest))
    # A uniform place is a uniform step: the whole walk is a running sum of steps on the ring.
    anywhere = generator.random((n_users, longest)) < noise
    anywhere[:, 0] = True
    steps = np.where(anywhere, generator.integers(0, n_items, size=steps.shape), steps)
    items = ring[np.cumsum(steps, axis=1) % n_items]

    period = n_days * 86_400_000_000
    limits = np.sort(generator.random((n_users, 2)), axis=1)
    within = np.sort(generator.random((n_users, longest)), axis=1)
    filled = np.arange(longest) < lengths[:, None]
    times = ((limits[:, :1] + np.diff(limits, axis=1) * within) * (period - longest)).astype(np.int64)
    times += np.arange(longest)  # rounding may have made two equal
    users = np.repeat(np.arange(1, n_users + 1), lengths)
    names = np.char.add("item-", np.char.zfill(np.arange(n_items).astype(str), len(str(n_items - 1))))
    start = pl.lit(1_704_067_200_000_000)
    return (
        pl.DataFrame({"user_id": users, "item": items[filled], "timestamp": times[filled]})
        .select(
            "user_id",
            pl.lit(pl.Series(names)).gather(pl.col("item")).alias("item_id"),
            (pl.col("timestamp") + start).cast(pl.Datetime("us")),
        )
        .sort("timestamp", "user_id")
    )


def markov_transitions(
    n_items: int, *, n_successors: int = 4, decay: float = 0.5, noise: float = 0.1, seed: int = 0
) -> NDArray[np.float64]:
    """``(V, V)`` probability of each next item, rows and columns in the order of the item ids.

    Arguments and errors as :func:`markov_interactions`.
    """
    _check(n_items, n_successors, decay, noise)
    ring = _ring(n_items, seed)
    chances = decay ** np.arange(n_successors)
    transitions = np.full((n_items, n_items), noise / n_items)
    for step, chance in enumerate(chances / chances.sum(), start=1):
        transitions[ring, np.roll(ring, -step)] += (1 - noise) * chance
    return transitions


def best_ndcg(k: int, n_items: int, *, n_successors: int = 4, decay: float = 0.5, noise: float = 0.1) -> float:
    """NDCG@k that no system can exceed in expectation, where the user's own items may be recommended.

    ``sum_{r <= min(k, V)} p_(r) / log2(r + 1)`` with p_(1) >= p_(2) >= ... the probabilities of the next item, the
    same for every present item. It is what the one gets who knows the chain: given the present item, the rest of
    the history says nothing about the next.

    Args:
        k: Cutoff, at least 1.
        n_items: V.
        n_successors: As for the data.
        decay: As for the data.
        noise: As for the data.

    Raises:
        ValueError: If an argument is outside its range.
    """
    _check(n_items, n_successors, decay, noise)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    chances = decay ** np.arange(n_successors)
    probabilities = np.full(n_items, noise / n_items)
    probabilities[:n_successors] += (1 - noise) * chances / chances.sum()
    best = probabilities[:k]
    return float((best / np.log2(np.arange(2, len(best) + 2))).sum())


def _ring(n_items: int, seed: int) -> NDArray[np.int64]:
    """Items in the order of the ring."""
    return np.argsort(mix(mix(np.int64(seed)) ^ mix(np.arange(n_items))), kind="stable")


def _check(n_items: int, n_successors: int, decay: float, noise: float) -> None:
    if n_successors < 1:
        raise ValueError(f"n_successors must be at least 1, got {n_successors}")
    if n_items <= n_successors:
        raise ValueError(f"n_items must exceed n_successors {n_successors}, got {n_items}")
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be in (0, 1], got {decay}")
    if not 0 <= noise <= 1:
        raise ValueError(f"noise must be in [0, 1], got {noise}")
