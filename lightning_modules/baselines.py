"""Baselines without learning, which every test report shows beside the model on the same users.

U training users, P training baskets, V items, B users asked for, M history items in all, k places.

Each baseline gives some items of a user a positive score; score descending, then popularity descending, then item
id ascending is the order, and the places left when the scored items run out go to the most popular of the rest.
Popularity is the number of training events. Inside, items are numbered by popularity, so that the order of
``top_k_candidates``, score then number, is the order wanted.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from lightning_modules.ranking import top_k_candidates

CHUNK_BYTES = 256 * 2**20
"""Memory allowed for the users handled at a time, should each of them have a score for every item."""

_SCORE_BYTES = 64  # value, index, row, their padded copies, two flags and the copies made by the ranking
_HOP_BYTES = 12  # value and index in the product with training users or baskets

Ints = NDArray[np.int64]


class Histories(Protocol):
    """Training histories, one user after another, each in order of time; memory maps will do."""

    @property
    def items(self) -> NDArray[np.int32]:
        """``(M,)`` ids in 0..V-1."""

    @property
    def baskets(self) -> NDArray[np.int32]:
        """``(M,)`` number of the timestamp group inside the history, not decreasing."""

    @property
    def offsets(self) -> NDArray[np.int64]:
        """``(U + 1,)`` limits of each history."""


def _checked(items: ArrayLike, baskets: ArrayLike, offsets: ArrayLike, n_items: int) -> tuple[Ints, Ints, Ints]:
    flat, groups, limits = (np.asarray(array, dtype=np.int64) for array in (items, baskets, offsets))
    if flat.ndim != 1 or flat.shape != groups.shape:
        raise ValueError(f"items and baskets must both be (M,), got {flat.shape} and {groups.shape}")
    if limits.ndim != 1 or len(limits) < 1 or limits[0] != 0 or limits[-1] != len(flat):
        raise ValueError(f"offsets must run from 0 to {len(flat)}, the number of history items")
    if (np.diff(limits) < 0).any():
        raise ValueError("offsets must not decrease")
    if len(flat) and not 0 <= flat.min() <= flat.max() < n_items:
        raise ValueError(f"items must lie in 0..{n_items - 1}, got {flat.min()}..{flat.max()}")
    return flat, groups, limits


def _rows(offsets: Ints) -> Ints:
    """``(M,)`` row of each flat position."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def _incidence(rows: Ints, columns: Ints, shape: tuple[int, int]) -> sparse.csr_matrix:
    """``shape`` matrix with 1 at each distinct pair (row, column)."""
    matrix = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=shape)
    matrix.sum_duplicates()
    matrix.data[:] = 1.0
    return matrix


def _first_unlisted(rows: Ints, columns: Ints, n_rows: int, n_columns: int, k: int) -> Ints:
    """The k lowest column numbers of each row that are not among its listed ones; -1 beyond the last column.

    If e_0 < e_1 < ... are the listed columns of a row, the j-th unlisted is j + #{i : e_i - i <= j}.
    """
    listed = np.unique(rows * n_columns + columns)
    rows, columns = np.divmod(listed, n_columns)
    starts = np.searchsorted(rows, np.arange(n_rows + 1))
    shifted = columns - (np.arange(len(listed)) - starts[rows])
    # Wide enough for any j and any shifted column, so that the rows stay apart in one sorted array.
    span = n_columns + k
    wanted = np.arange(n_rows)[:, None] * span + np.arange(k)
    passed = np.searchsorted(rows * span + shifted, wanted.ravel(), side="right").reshape(n_rows, k)
    unlisted = np.arange(k) + passed - starts[:-1, None]
    return np.where(unlisted < n_columns, unlisted, -1)


class Baseline(ABC):
    """Scores from counts, ties and the rest by popularity.

    Args:
        histories: Training histories; all of them are read at construction.
        n_items: V, at least 1.
        item_by_item: Whether each event is a basket of its own, in the order given, as a model of next items reads
            them; timestamp groups then have no say.

    Raises:
        ValueError: If ``n_items`` is below 1, an id lies outside 0..V-1 or the offsets do not fit the items.
    """

    name: ClassVar[str]
    """Key of the baseline in reports."""
    needs_repeats: ClassVar[bool] = False
    """Whether the baseline is meaningful only where a user's own items may be recommended."""

    def __init__(self, histories: Histories, n_items: int, *, item_by_item: bool = False) -> None:
        if n_items < 1:
            raise ValueError(f"n_items must be at least 1, got {n_items}")
        items, baskets, offsets = _checked(histories.items, histories.baskets, histories.offsets, n_items)
        self.n_items, self.item_by_item = n_items, item_by_item
        counts = np.bincount(items, minlength=n_items)
        self._item_of_rank: Ints = np.argsort(-counts, kind="stable")
        self._rank_of_item = np.empty(n_items, dtype=np.int64)
        self._rank_of_item[self._item_of_rank] = np.arange(n_items)
        self._n_hops = 0  # training users or baskets by way of which the scores are summed
        self._fit(self._rank_of_item[items], self._steps(baskets, offsets), offsets)

    def _steps(self, baskets: Ints, offsets: Ints) -> Ints:
        """``(M,)`` number of the basket of each event inside its history."""
        return np.arange(len(baskets)) - offsets[:-1][_rows(offsets)] if self.item_by_item else baskets

    def _fit(self, ranks: Ints, baskets: Ints, offsets: Ints) -> None:
        """Read what is needed beyond popularity; items are given by popularity rank."""
        return

    @abstractmethod
    def _scores(self, ranks: Ints, baskets: Ints, offsets: Ints) -> sparse.csr_matrix:
        """``(B, V)`` matrix of positive scores, columns by popularity rank; what is not above 0 is not scored."""

    def recommend(
        self,
        history_items: ArrayLike,
        history_baskets: ArrayLike,
        history_offsets: ArrayLike,
        k: int,
        exclude_seen: bool,
    ) -> torch.Tensor:
        """The k best items of each user. A user's result does not depend on the others in the call.

        Args:
            history_items: ``(M,) int`` items of the input histories one after another, in order of time, as
                arrays or CPU tensors; an empty history gets the most popular items.
            history_baskets: ``(M,) int`` timestamp group of each item inside its history, not decreasing.
            history_offsets: ``(B + 1,) int`` limits of each history.
            k: Places per user, at least 1; may exceed V.
            exclude_seen: Whether the items of the user's own history are left out.

        Returns:
            ``(B, k) int64`` on the CPU, -1 where no candidate is left.

        Raises:
            ValueError: If ``k`` is below 1, an id lies outside 0..V-1, the offsets do not fit the items, or the
                user's own items are to be left out by a baseline that ranks nothing else.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if exclude_seen and self.needs_repeats:
            raise ValueError(f"exclude_seen must be False for {self.name}, got True: nothing would be left to rank")
        items, baskets, offsets = _checked(history_items, history_baskets, history_offsets, self.n_items)
        ranks, baskets = self._rank_of_item[items], self._steps(baskets, offsets)
        n_users = len(offsets) - 1
        chunk = max(1, CHUNK_BYTES // (_SCORE_BYTES * (self.n_items + k) + _HOP_BYTES * self._n_hops))
        top = np.empty((n_users, k), dtype=np.int64)
        for start in range(0, n_users, chunk):
            stop = min(start + chunk, n_users)
            part = slice(offsets[start], offsets[stop])
            limits = offsets[start : stop + 1] - offsets[start]
            top[start:stop] = self._top_ranks(ranks[part], baskets[part], limits, k, exclude_seen)
        return torch.from_numpy(np.where(top >= 0, self._item_of_rank[top], -1))

    def _top_ranks(self, ranks: Ints, baskets: Ints, offsets: Ints, k: int, exclude_seen: bool) -> Ints:
        """``(B, k)`` popularity ranks of the best items: the scored ones first, then the most popular others."""
        n_users, own = len(offsets) - 1, _rows(offsets)
        scores = self._scores(ranks, baskets, offsets)
        lengths = np.diff(scores.indptr)
        stored = np.arange(lengths.max(initial=0)) < lengths[:, None]
        values, columns = np.full(stored.shape, -np.inf, np.float32), np.zeros(stored.shape, np.int64)
        values[stored], columns[stored] = scores.data, scores.indices
        values[values <= 0] = -np.inf
        if exclude_seen:
            seen = np.zeros((n_users, self.n_items), dtype=bool)
            seen[own, ranks] = True
            values[np.take_along_axis(seen, columns, axis=1)] = -np.inf
        _, best = top_k_candidates(torch.from_numpy(values), torch.from_numpy(columns), k)
        top: Ints = best.numpy()

        n_scored = (top >= 0).sum(axis=1, keepdims=True)
        if n_scored.min(initial=k) < k:
            rows, places = np.nonzero(top >= 0)
            listed = top[rows, places]
            if exclude_seen:
                rows, listed = np.r_[rows, own], np.r_[listed, ranks]
            rest = _first_unlisted(rows, listed, n_users, self.n_items, k)
            place = np.arange(k) - n_scored
            top = np.where(place >= 0, np.take_along_axis(rest, place.clip(min=0), axis=1), top)
        return top


class MostPopular(Baseline):
    """The items with most training events, the same for every user but for the items left out."""

    name = "most_popular"

    def _scores(self, ranks: Ints, baskets: Ints, offsets: Ints) -> sparse.csr_matrix:
        return sparse.csr_matrix((len(offsets) - 1, self.n_items))


class LastBasketMarkov(Baseline):
    """First-order Markov chain between baskets, with ``item_by_item`` between single events.

    ``score(j) = sum_{i in last basket} n_ij / sum_l n_il``, where n_ij counts the pairs of consecutive training
    baskets of one user with item i in the first and j in the second. An item bought several times in a basket
    counts once there; i = j counts, as repeat purchases do happen. The V x V matrix is never formed: with one
    row for each pair of baskets, n = F^T S for the incidences F of first and S of second baskets.
    """

    name = "last_basket_markov"

    def _fit(self, ranks: Ints, baskets: Ints, offsets: Ints) -> None:
        users = _rows(offsets)
        new = np.ones(len(ranks), dtype=bool)
        new[1:] = (users[1:] != users[:-1]) | (baskets[1:] != baskets[:-1])
        user_of_basket = users[new]
        baskets_items = _incidence(new.cumsum() - 1, ranks, (len(user_of_basket), self.n_items))
        first = np.flatnonzero(user_of_basket[1:] == user_of_basket[:-1])
        before, after = baskets_items[first], baskets_items[first + 1]
        leaving = before.T @ np.diff(after.indptr)
        self._weight = np.divide(1.0, leaving, out=np.zeros(self.n_items), where=leaving > 0)
        self._pairs_of_item, self._after = before.T.tocsr(), after
        self._n_hops = len(first)

    def _scores(self, ranks: Ints, baskets: Ints, offsets: Ints) -> sparse.csr_matrix:
        last = baskets == np.repeat(baskets[offsets[1:] - 1], np.diff(offsets)) if len(baskets) else baskets > 0
        query = _incidence(_rows(offsets)[last], ranks[last], (len(offsets) - 1, self.n_items))
        query.data *= self._weight[query.indices]
        return (query @ self._pairs_of_item) @ self._after


class ItemCovisitation(Baseline):
    """Cosine between items over training users, summed over the distinct items of the input history.

    ``score(j) = sum_{i in history, i != j} c_ij / sqrt(c_i c_j)``, where c_ij counts the training users whose
    history holds i and j, and c_i those whose history holds i. The V x V matrix is never formed: with the
    user-item incidence X, c = X^T X, and the sum is taken by way of the users.

    Source: B. Sarwar et al., "Item-based collaborative filtering recommendation algorithms", WWW 2001, cosine
    similarity on binary histories, all neighbours kept.
    """

    name = "covisitation"

    def _fit(self, ranks: Ints, baskets: Ints, offsets: Ints) -> None:
        histories = _incidence(_rows(offsets), ranks, (len(offsets) - 1, self.n_items))
        n_holders = np.bincount(histories.indices, minlength=self.n_items)
        self._weight = 1 / np.sqrt(n_holders.clip(min=1))
        self._users_of_item = histories.T.tocsr()  # a copy: what follows does not touch it
        histories.data *= self._weight[histories.indices]
        self._histories = histories
        self._n_hops = len(offsets) - 1

    def _scores(self, ranks: Ints, baskets: Ints, offsets: Ints) -> sparse.csr_matrix:
        query = _incidence(_rows(offsets), ranks, (len(offsets) - 1, self.n_items))
        itself = np.zeros(query.shape, dtype=bool)
        itself[_rows(query.indptr), query.indices] = True
        query.data *= self._weight[query.indices]
        scores = (query @ self._users_of_item) @ self._histories
        scores.data[itself[_rows(scores.indptr), scores.indices]] -= 1.0
        # No cosine of items that share a user is below 1 / U: less than half of it is what rounding left of 1 - 1.
        scores.data[scores.data < 0.5 / max(1, self._n_hops)] = 0.0
        return scores


class PersonalFrequency(Baseline):
    """The items the user had most often; among equals the one of the later basket, then the more popular."""

    name = "personal_frequency"
    needs_repeats = True

    def _scores(self, ranks: Ints, baskets: Ints, offsets: Ints) -> sparse.csr_matrix:
        pairs, owner, counts = np.unique(_rows(offsets) * self.n_items + ranks, return_inverse=True, return_counts=True)
        latest = np.full(len(pairs), -1)
        np.maximum.at(latest, owner, baskets)
        rows, columns = np.divmod(pairs, self.n_items)
        order = np.lexsort((columns, -latest, -counts, rows))
        shape = (len(offsets) - 1, self.n_items)
        # Places counted from the last: float32 holds them exactly for histories up to 2^24 items.
        places = np.bincount(rows, minlength=shape[0]).cumsum()[rows] - np.arange(len(pairs), dtype=np.float64)
        return sparse.csr_matrix((places, (rows, columns[order])), shape=shape)


def fit_baselines(
    histories: Histories, n_items: int, *, repeats_allowed: bool, item_by_item: bool = False
) -> dict[str, Baseline]:
    """All baselines of a report by name, personal frequency among them where repeats are allowed.

    Args:
        histories: Training histories.
        n_items: V, at least 1.
        repeats_allowed: Whether items of the user's own history may be recommended.
        item_by_item: As in :class:`Baseline`.

    Returns:
        ``{"most_popular": ..., "last_basket_markov": ..., "covisitation": ..., "personal_frequency": ...}``.
    """
    kinds: list[type[Baseline]] = [MostPopular, LastBasketMarkov, ItemCovisitation]
    if repeats_allowed:
        kinds.append(PersonalFrequency)
    return {kind.name: kind(histories, n_items, item_by_item=item_by_item) for kind in kinds}
