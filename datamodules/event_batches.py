"""Batches of event sequences in whole-array operations, and the one batch of validation and test.

B sequences, L steps of the longest, F categorical and M numeric features, U users. Sequences start at the first
step, ``mask`` is true there, and are zero behind their end.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.array_cache import CacheFolder
from datamodules.counter_hash import Purpose, below, chain
from datamodules.epoch_sampler import IGNORED, numbers_of
from datamodules.event_preparation import EventLog, Ints

Queries = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class TrainingFacts:
    """What a sampler may know.

    Attributes:
        starts: ``(U,) int64`` flat row of each user's first training event.
        stops: ``(U,) int64`` one past the last; equal to ``starts`` for users that are not trained on.
        log: Raw events, to find rows by time.
        queries: Train queries by target, arrays of NumPy.
        seed: Of every draw.
    """

    starts: Ints
    stops: Ints
    log: EventLog
    queries: Queries
    seed: int


class SequenceSampler(ABC):
    """What training batches are: units (users or queries) to draw from, and the windows of some of them."""

    @abstractmethod
    def units(self, facts: TrainingFacts) -> Ints:
        """Users, or rows of queries, that have a window."""

    @abstractmethod
    def windows(self, facts: TrainingFacts, units: Ints, epoch: Ints) -> tuple[Ints, Ints, Ints, dict[str, Ints]]:
        """Users, first and one past last flat rows of the windows, and further tensors of the batch by name.

        Each unit has equally many windows, which follow each other.
        """


class ColesSlices(SequenceSampler):
    """``n_slices`` contiguous slices of each user: positive pairs for CoLES. Rows of a user follow each other.

    The length is uniform in [min_length, max_length], at most the user's events; the start is uniform. Users with
    fewer than ``min_length`` training events are left out.

    Source: kernel_attention.md, section 2.3.

    Args:
        n_slices: K, at least 2.
        min_length: At least 1.
        max_length: At least ``min_length``.

    Raises:
        ValueError: If a number is out of its range.
    """

    def __init__(self, n_slices: int = 5, min_length: int = 15, max_length: int = 150) -> None:
        if n_slices < 2:
            raise ValueError(f"n_slices must be at least 2 for positive pairs, got {n_slices}")
        _check_lengths(min_length, max_length)
        self.n_slices, self.min_length, self.max_length = n_slices, min_length, max_length

    def units(self, facts: TrainingFacts) -> Ints:
        """Users with enough training events."""
        return np.flatnonzero(facts.stops - facts.starts >= self.min_length)

    def windows(self, facts: TrainingFacts, units: Ints, epoch: Ints) -> tuple[Ints, Ints, Ints, dict[str, Ints]]:
        """``n_slices`` windows a user."""
        users, epochs = np.repeat(units, self.n_slices), np.repeat(epoch, self.n_slices)
        number = np.tile(np.arange(self.n_slices), len(units))
        starts, stops = _random_windows(facts, users, epochs, number, self.min_length, self.max_length)
        return users, starts, stops, {}


class Crops(SequenceSampler):
    """One contiguous crop of each user, length and start uniform; users with fewer events are left out.

    Source: kernel_attention.md, section 2.4.

    Args:
        min_length: At least 1.
        max_length: At least ``min_length``.

    Raises:
        ValueError: If a number is out of its range.
    """

    def __init__(self, min_length: int = 20, max_length: int = 40) -> None:
        _check_lengths(min_length, max_length)
        self.min_length, self.max_length = min_length, max_length

    def units(self, facts: TrainingFacts) -> Ints:
        """Users with enough training events."""
        return np.flatnonzero(facts.stops - facts.starts >= self.min_length)

    def windows(self, facts: TrainingFacts, units: Ints, epoch: Ints) -> tuple[Ints, Ints, Ints, dict[str, Ints]]:
        """One window a user."""
        starts, stops = _random_windows(facts, units, epoch, np.zeros_like(units), self.min_length, self.max_length)
        return units, starts, stops, {}


class TailWindows(SequenceSampler):
    """The last events before each train query of a target: supervised batches with ``query_times`` and ``labels``.

    Args:
        target: Name of the target.
        max_length: Most events of a window, at least 1.

    Raises:
        ValueError: If ``max_length`` is below 1; on first use, if there is no such target.
    """

    def __init__(self, target: str, max_length: int = 150) -> None:
        _check_lengths(1, max_length)
        self.target, self.max_length = target, max_length

    def units(self, facts: TrainingFacts) -> Ints:
        """All train queries."""
        if self.target not in facts.queries:
            raise ValueError(f"sampler: no target {self.target!r}, there are {', '.join(facts.queries) or 'none'}")
        return np.arange(len(facts.queries[self.target]["users"]))

    def windows(self, facts: TrainingFacts, units: Ints, epoch: Ints) -> tuple[Ints, Ints, Ints, dict[str, Ints]]:
        """One window a query; it is the same in every epoch."""
        queries = facts.queries[self.target]
        users, times = queries["users"][units], queries["times"][units]
        stops = facts.log.before(users, times)
        starts = np.maximum(facts.starts[users], stops - self.max_length)
        return users, starts, stops, {"query_times": times, "labels": queries["labels"][units]}


class EventTrainingSequences(Dataset):
    """Whole batches of training windows; an index is ``unit + epoch * n`` as :class:`EpochSampler` gives it.

    Index -1 fills a batch up where processes must have equally many: the windows of unit 0 without an event, ``mask``
    false everywhere, features and times 0, ``users`` -1 and ``labels`` -100.

    Args:
        folder: Prepared arrays.
        facts: What may be trained on.
        sampler: What the windows are.

    Raises:
        ValueError: If there is no unit.
    """

    def __init__(self, folder: CacheFolder, facts: TrainingFacts, sampler: SequenceSampler) -> None:
        self._folder, self._facts, self._sampler = folder, facts, sampler
        self._units = sampler.units(facts)
        if not len(self._units):
            longest = int((facts.stops - facts.starts).max())
            raise ValueError(
                f"{type(sampler).__name__}: nothing to train on, no user has enough events before the split (the "
                f"longest has {longest}) or there is no train query"
            )

    def __len__(self) -> int:
        return len(self._units)

    def __getitem__(self, index: int | Sequence[int]) -> dict[str, Tensor]:
        return self.__getitems__(numbers_of(index))

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        asked = np.asarray(indices, dtype=np.int64)
        epoch, place = np.divmod(np.maximum(asked, 0), len(self._units))
        users, starts, stops, further = self._sampler.windows(self._facts, self._units[place], epoch)
        batch = sequence_batch(self._folder, users, starts, stops)
        batch |= {name: torch.from_numpy(values) for name, values in further.items()}
        if (asked < 0).any():
            padding = torch.from_numpy(np.repeat(asked < 0, len(users) // len(asked)))
            nothing = {"categorical": 0, "numeric": 0, "times": 0, "mask": False, "users": -1, "labels": IGNORED}
            for name in nothing.keys() & batch.keys():
                batch[name][padding] = nothing[name]
        return batch


def sequence_batch(folder: CacheFolder, users: Ints, starts: Ints, stops: Ints) -> dict[str, Tensor]:
    """Pad slices of the flat arrays.

    Args:
        folder: Prepared arrays ``categorical``, ``numeric``, ``times``.
        users: ``(B,)``.
        starts: ``(B,)`` flat row of each first event.
        stops: ``(B,)`` one past each last one; at least one event each.

    Returns:
        ``categorical (B, L, F) int64``, ``numeric (B, L, M) float32``, ``times (B, L) int64``, ``mask (B, L) bool``,
        ``users (B,)``, ``starts (B,)`` int64.
    """
    steps = np.arange(int((stops - starts).max()))
    mask = steps < (stops - starts)[:, None]
    rows = np.where(mask, starts[:, None] + steps, starts[:, None])

    def padded(name: str) -> Tensor:
        values = folder.array(name)[rows]
        values[~mask] = 0
        return torch.from_numpy(values)

    return {
        "categorical": padded("categorical"),
        "numeric": padded("numeric"),
        "times": padded("times"),
        "mask": torch.from_numpy(mask),
        "users": torch.from_numpy(users.copy()),
        "starts": torch.from_numpy(starts.copy()),
    }


def flat_events(folder: CacheFolder, keep: NDArray[np.bool_] | None = None) -> dict[str, Tensor]:
    """The table of events as tensors, or some of its rows; users without a row keep an empty range.

    Args:
        folder: Prepared arrays.
        keep: ``(E,)`` rows that are wanted; None is all.
    """
    offsets = folder.array("offsets")
    if keep is not None:
        offsets = np.concatenate([[0], np.cumsum(keep)])[offsets]
    events = {}
    for name in ("categorical", "numeric", "times"):
        values = folder.array(name)
        events[name] = torch.from_numpy(values.copy() if keep is None else values[keep])
    events["offsets"] = torch.from_numpy(offsets.astype(np.int64))
    if "groups" in folder.facts["arrays"]:
        events["groups"] = torch.from_numpy(folder.array("groups").copy())
    return events


def query_tensors(queries: dict[str, Any], folds: Sequence[int]) -> dict[str, Any]:
    """Queries of some folds, arrays as tensors."""
    wanted = np.isin(queries["fold"], folds)
    return {
        name: torch.from_numpy(value[wanted]) if isinstance(value, np.ndarray) else value
        for name, value in queries.items()
    }


def _random_windows(
    facts: TrainingFacts, users: Ints, epochs: Ints, number: Ints, min_length: int, max_length: int
) -> tuple[Ints, Ints]:
    available = facts.stops[users] - facts.starts[users]
    longest = np.minimum(max_length, available)
    words = facts.log.user_words[users]
    length = min_length + below(chain(facts.seed, Purpose.SLOT, epochs, words, number, 0), longest - min_length + 1)
    shift = below(chain(facts.seed, Purpose.SLOT, epochs, words, number, 1), available - length + 1)
    starts = facts.starts[users] + shift
    return starts, starts + length


def _check_lengths(min_length: int, max_length: int) -> None:
    if not 1 <= min_length <= max_length:
        raise ValueError(f"1 <= min_length <= max_length must hold, got {min_length} and {max_length}")
