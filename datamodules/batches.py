"""Batches of histories in whole-array operations: no Python per sequence.

B batch, T time (``max_length``), N filled slots of a batch, V items. Inputs are padded on the left with V.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.array_cache import CacheFolder
from datamodules.counter_hash import Purpose, Words, below, chain, extend, mix
from datamodules.epoch_sampler import IGNORED, numbers_of
from datamodules.histories import flat_ranges
from datamodules.splits import Target

Batch = dict[str, Tensor]
Ints = NDArray[np.int64]


def training_windows(offsets: Ints, n_inputs: Ints, max_length: int, *, strided: bool) -> tuple[Ints, Ints, Ints]:
    """Slices of the flat training arrays that become sequences.

    Only positions that have something after them are used, the first ``n_inputs`` of each user. They are cut from the
    end into windows of ``max_length``, the first of a user being shorter; without ``strided`` the last window of each
    user alone is kept.

    Args:
        offsets: ``(U + 1,) int64`` limits of each history.
        n_inputs: ``(U,) int64``.
        max_length: T, at least 1.
        strided: Whether all windows are wanted.

    Returns:
        ``(W,) int64`` user, first and one past last position of each window, by user, then by position.
    """
    n_windows = -(-n_inputs // max_length)
    if not strided:
        n_windows = np.minimum(n_windows, 1)
    users = np.repeat(np.arange(len(n_inputs)), n_windows)
    from_end = np.repeat(np.cumsum(n_windows), n_windows) - 1 - np.arange(len(users))
    begins = offsets[:-1][users]
    stops = begins + n_inputs[users] - from_end * max_length
    return users, np.maximum(begins, stops - max_length), stops


def _slots(starts: Ints, stops: Ints, max_length: int) -> tuple[NDArray[np.bool_], Ints]:
    """``(B, T)`` which slots are filled, and ``(N,)`` the flat position of each, row by row."""
    filled = np.arange(max_length) >= max_length - (stops - starts)[:, None]
    return filled, flat_ranges(starts, stops)


def _padded(filled: NDArray[np.bool_], values: NDArray[np.integer], padding: int) -> Tensor:
    rows = np.full(filled.shape, padding, dtype=np.int64)
    rows[filled] = values
    return torch.from_numpy(rows)


class TrainingSequences(Dataset):
    """Training windows with the targets of an epoch.

    Sequence number ``epoch * n + i`` is window i as it looks in that epoch (the form :class:`EpochSampler` yields).

    ``next_item``: the target of a position is the item after it. ``next_basket``: one of the distinct items of the
    next basket, drawn by a hash of (seed, epoch, position); and, if asked for, the items of a basket change places
    inside the window from epoch to epoch, since their order is not known.

    Args:
        folder: Prepared histories.
        target: ``next_item`` or ``next_basket``, as they were prepared.
        max_length: T.
        strided: All windows of a history instead of the last one.
        shuffle_within_basket: See above; ``next_basket`` only.
        seed: Of targets and order.
    """

    def __init__(
        self,
        folder: CacheFolder,
        *,
        target: Target,
        max_length: int,
        strided: bool,
        shuffle_within_basket: bool,
        seed: int,
    ) -> None:
        self._folder = folder
        self._target = target
        self._max_length = max_length
        self._shuffles = shuffle_within_basket and target == "next_basket"
        self._seed = seed
        self._n_items: int = folder.facts["split"]["n_items"]
        windows = training_windows(
            folder.array("train_offsets"), folder.array("train_n_inputs"), max_length, strided=strided
        )
        kept = self._with_targets(*windows)
        self._users, self._starts, self._stops = (array[kept] for array in windows)

    def _with_targets(self, users: Ints, starts: Ints, stops: Ints) -> NDArray[np.bool_]:
        """Windows that hold a target; where repeats are no targets some have none."""
        if self._target == "next_item":
            if "train_is_new" not in self._folder.facts["arrays"]:
                return np.ones(len(users), dtype=bool)
            is_new = np.r_[self._folder.array("train_is_new"), False]  # the last window may end with the last row
            return np.logical_or.reduceat(is_new, np.stack([starts + 1, stops + 1], axis=1).ravel())[::2]
        baskets, base = self._folder.array("train_baskets"), self._folder.array("basket_base")[users]
        candidates = self._folder.array("target_offsets")
        return candidates[base + baskets[stops - 1] + 2] > candidates[base + baskets[starts] + 1]

    @property
    def n_positions(self) -> int:
        """Input positions of all windows."""
        return int((self._stops - self._starts).sum())

    def __len__(self) -> int:
        return len(self._users)

    def __getitem__(self, index: int | Sequence[int]) -> Batch:
        return self.__getitems__(numbers_of(index))

    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        """Assemble sequences.

        Args:
            numbers: B numbers, epoch * n + i; -1 fills a batch up where processes must have equally many.

        Returns:
            ``item_ids``, ``basket_ids``, ``targets``, each ``(B, T) int64``; padding V, -1 and -100. Row -1 is the
            first window, every target of it -100.
        """
        asked = np.asarray(numbers, dtype=np.int64)
        epochs, windows = np.divmod(np.maximum(asked, 0), len(self))
        starts, stops = self._starts[windows], self._stops[windows]
        filled, positions = _slots(starts, stops, self._max_length)
        lengths = stops - starts
        items: NDArray[np.integer] = self._folder.array("train_items")[positions]
        baskets = self._folder.array("train_baskets")[positions]
        if self._target == "next_item":
            targets = self._next_items(positions)
        else:
            basket = np.repeat(self._folder.array("basket_base")[self._users[windows]], lengths) + baskets
            words = extend(np.repeat(chain(self._seed, Purpose.SLOT, epochs), lengths), positions)
            targets = self._next_basket_items(basket, words)
            if self._shuffles:
                row_begins = np.zeros(len(positions), dtype=bool)
                row_begins[np.cumsum(lengths) - lengths] = True
                items = items[shuffled_in_runs(basket, row_begins, mix(words))]
        batch = {
            "item_ids": _padded(filled, items, self._n_items),
            "basket_ids": _padded(filled, baskets, -1),
            "targets": _padded(filled, targets, IGNORED),
        }
        batch["targets"][torch.from_numpy(asked < 0)] = IGNORED
        return batch

    def _next_items(self, positions: Ints) -> NDArray[np.integer]:
        following = self._folder.array("train_items")[positions + 1]
        if "train_is_new" not in self._folder.facts["arrays"]:
            return following
        return np.where(self._folder.array("train_is_new")[positions + 1], following, IGNORED)

    def _next_basket_items(self, basket: Ints, words: Words) -> NDArray[np.integer]:
        """``(N,)`` one of the targets of the basket after each slot's own."""
        limits = self._folder.array("target_offsets")
        first = limits[basket + 1]
        n_candidates = limits[basket + 2] - first
        drawn = first + below(words, n_candidates)
        candidates = self._folder.array("target_items")
        if n_candidates.all():
            return candidates[drawn]
        return np.where(n_candidates > 0, candidates[np.minimum(drawn, len(candidates) - 1)], IGNORED)


def shuffled_in_runs(groups: Ints, row_begins: NDArray[np.bool_], words: Words) -> Ints:
    """A permutation of 0..N-1 that moves entries inside runs of equal group only, in the order of their words.

    Args:
        groups: ``(N,)``, equal inside a run.
        row_begins: ``(N,) bool`` places where a run ends even though the group goes on.
        words: ``(N,) uint64`` random words.
    """
    begins = row_begins.copy()
    begins[1:] |= groups[1:] != groups[:-1]
    # Run, as much of the word as fits, and place in one integer: sorting values is faster than an argsort.
    n_bits = np.uint64(max(1, len(groups).bit_length()))
    run = np.cumsum(begins).astype(np.uint64) << (np.uint64(64) - n_bits)
    key = run | ((words >> n_bits >> n_bits) << n_bits) | np.arange(len(groups), dtype=np.uint64)
    key.sort(kind="stable")  # values are sorted but for the inside of runs, which this kind makes use of
    return (key & ((np.uint64(1) << n_bits) - np.uint64(1))).astype(np.int64)


class EvaluationSequences(Dataset):
    """Input histories of users, and what is to be found.

    Args:
        folder: Prepared histories.
        stage: ``validation``, ``test``, or ``predict``: the whole history of every user, nothing to be found.
        max_length: T.

    Raises:
        ValueError: If the stage is another.
    """

    def __init__(self, folder: CacheFolder, *, stage: str, max_length: int) -> None:
        if stage not in ("validation", "test", "predict"):
            raise ValueError(f"stage must be validation, test or predict, got {stage!r}")
        self._folder = folder
        self._max_length = max_length
        self._n_items: int = folder.facts["split"]["n_items"]
        self._stage = stage
        offsets = folder.array("all_offsets")
        if stage == "predict":
            self._users = np.flatnonzero(np.diff(offsets))
            self._stops = offsets[1:][self._users]
        else:
            self._users = folder.array(f"{stage}_users").copy()
            self._stops = folder.array(f"{stage}_stops").copy()

    def __len__(self) -> int:
        return len(self._users)

    def __getitem__(self, index: int | Sequence[int]) -> Batch:
        return self.__getitems__(numbers_of(index))

    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        """Assemble users.

        Args:
            numbers: B numbers in 0..n-1.

        Returns:
            ``item_ids``, ``basket_ids (B, T)`` the last T items of the input, ``history_items``, ``history_baskets
            (M,)`` and ``history_offsets (B + 1,)`` all of it, ``user_index (B,)`` row in the table of users, and
            but for ``predict`` ``relevant (B, R)``, distinct in a row, padded on the right with -1. All int64.
        """
        chosen = np.asarray(numbers, dtype=np.int64)
        users, stops = self._users[chosen], self._stops[chosen]
        begins = self._folder.array("all_offsets")[users]
        starts = np.maximum(begins, stops - self._max_length)
        filled, positions = _slots(starts, stops, self._max_length)
        whole = flat_ranges(begins, stops)
        items, baskets = self._folder.array("all_items"), self._folder.array("all_baskets")
        batch = {
            "item_ids": _padded(filled, items[positions], self._n_items),
            "basket_ids": _padded(filled, baskets[positions], -1),
            "history_items": torch.from_numpy(items[whole].astype(np.int64)),
            "history_baskets": torch.from_numpy(baskets[whole].astype(np.int64)),
            "history_offsets": torch.from_numpy(np.r_[0, np.cumsum(stops - begins)]),
            "user_index": torch.from_numpy(users.copy()),
        }
        if self._stage != "predict":
            limits = self._folder.array(f"{self._stage}_relevant_offsets")
            first, last = limits[chosen], limits[chosen + 1]
            taken = np.arange(int((last - first).max(initial=0))) < (last - first)[:, None]
            relevant = self._folder.array(f"{self._stage}_relevant")[flat_ranges(first, last)]
            batch["relevant"] = _padded(taken, relevant, -1)
        return batch
