"""Order of an epoch as a pure function of (seed, epoch), over any number of processes, and taken up anywhere in it.

A loader whose epoch was interrupted goes on behind the batches that were done: it speaks Lightning's protocol of
stateful loaders (``state_dict``, ``load_state_dict``), and a checkpoint holds its place as two integers. They count
batches that were handed over, so that what worker processes had fetched ahead is neither lost nor repeated.

A data set must draw by the number it is asked for (:mod:`datamodules.counter_hash`), never from a global stream: those
of worker processes are in no checkpoint and begin anew when a run is resumed, and without workers the stream is the
model's.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from datamodules.counter_hash import Purpose, chain

FILLING = -1
"""Number of a row that stands for none."""

IGNORED = -100
"""Target or label that counts for nothing, as that of a row that stands for none."""


class EpochSampler(DistributedSampler):
    """Which batches a process sees in which order; a batch is a list of numbers.

    Shuffled (training): the order is a seeded permutation of 0..n-1; process r takes places r, r + R, r + 2R, ... and
    yields ``index + epoch * n``. A data set takes the epoch out of the number again, so that workers need no message
    about it. All processes get ceil(n / R) rows: a place beyond n is the number -1, which data sets turn into a row
    without weight.
    Not shuffled (evaluation): 0..n-1 in order, nothing repeated; the processes are disjoint and complete. All get
    equally many batches, the last of some being empty: a process without a batch would miss the others' collectives.

    It is a ``DistributedSampler`` because Lightning leaves those in place, and calls their ``set_epoch``.

    Args:
        dataset: Anything with a length n.
        batch_size: Rows of a batch, but for the last, at least 1.
        shuffle: Whether this is for training.
        seed: Any integer.
        num_replicas: R, at least 1.
        rank: This process, 0..R-1.

    Attributes:
        first_batch: How many batches of the next epoch to leave out.

    Raises:
        ValueError: If ``batch_size`` or ``num_replicas`` is below 1, or ``rank`` outside 0..R-1.
    """

    def __init__(
        self, dataset: Dataset, *, batch_size: int, shuffle: bool, seed: int, num_replicas: int = 1, rank: int = 0
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if num_replicas < 1:
            raise ValueError(f"num_replicas must be at least 1, got {num_replicas}")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank must be in 0..{num_replicas - 1}, got {rank}")
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed, drop_last=False)
        self.batch_size = batch_size
        self.first_batch = 0
        self._n: int = len(dataset)  # type: ignore[arg-type]

    def _order(self) -> NDArray[np.int64]:
        """Numbers of the rows of this process in the epoch."""
        if not self.shuffle:
            return np.arange(self.rank, self._n, self.num_replicas)
        order = np.argsort(chain(self.seed, Purpose.EPOCH_ORDER, self.epoch, np.arange(self._n)), kind="stable")
        own = order[self.rank :: self.num_replicas] + self.epoch * self._n
        return np.concatenate([own, np.full(self._n_rows - len(own), FILLING)])

    @property
    def _n_rows(self) -> int:
        """Rows of the process that has most."""
        return -(-self._n // self.num_replicas)

    def __iter__(self) -> Iterator[Any]:
        order = self._order()
        for batch in range(self.first_batch, len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()

    def __len__(self) -> int:
        return -(-self._n_rows // self.batch_size)


class EpochLoader(DataLoader):
    """Whole batches of a data set in the order of an :class:`EpochSampler`.

    ``loader.sampler`` is the sampler. The order is looked up when the first batch is asked for and not when ``iter``
    is called: Lightning calls that before it says which epoch a resumed run is in.

    Args:
        dataset: Its ``__getitem__(numbers)`` assembles the batch of a list of numbers.
        rows: Of a batch, at least 1.
        shuffled: Whether this is for training.
        seed: Of the order.
        num_replicas: Processes.
        rank: This process.
        options: Of ``torch.utils.data.DataLoader``; ``num_workers`` keep running from epoch to epoch.

    Raises:
        ValueError: As :class:`EpochSampler`.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        rows: int,
        shuffled: bool,
        seed: int,
        num_replicas: int = 1,
        rank: int = 0,
        **options: Any,
    ) -> None:
        sampler = options.get("sampler")
        if not isinstance(sampler, EpochSampler):
            # Lightning's overfit_batches puts a sampler of single rows, in order, in the place of one that shuffles.
            shuffled = shuffled and sampler is None
            sampler = EpochSampler(
                dataset, batch_size=rows, shuffle=shuffled, seed=seed, num_replicas=num_replicas, rank=rank
            )
        self.rows, self.shuffled, self.seed = rows, shuffled, seed
        self.num_replicas, self.rank = num_replicas, rank
        self._place = {"epoch": 0, "batches": 0}
        self._resumed: dict[str, int] | None = None
        own: dict[str, Any] = {
            "batch_size": None,
            "sampler": sampler,
            "collate_fn": _as_it_is,
            "persistent_workers": options.get("num_workers", 0) > 0,
            "pin_memory": torch.cuda.is_available(),
            # Its own generator: a loader draws a seed for its workers, which must not move the model's stream.
            "generator": torch.Generator(),
        }
        super().__init__(dataset, **options | own)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        resumed, self._resumed = self._resumed, None
        sampler: Any = self.sampler
        sampler.first_batch = resumed["batches"] if resumed and resumed["epoch"] == sampler.epoch else 0
        self._place = {"epoch": sampler.epoch, "batches": sampler.first_batch}
        for batch in super().__iter__():
            self._place["batches"] += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch of the last batch, and how many of that epoch were handed over."""
        return dict(self._place)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Leave out what was done of that epoch; any other epoch is whole."""
        self._resumed = dict(state_dict)


def single_batch_loader(batch: Any) -> DataLoader:
    """A loader of this one batch, which goes to every process: Lightning leaves a distributed sampler as it is."""
    everybody: DistributedSampler = DistributedSampler([batch], num_replicas=1, rank=0, shuffle=False)  # type: ignore[arg-type]
    return DataLoader(
        [batch],  # type: ignore[arg-type]
        batch_size=None,
        sampler=everybody,
        collate_fn=_as_it_is,
        # Its own generator: a loader draws a seed when it starts, which must not move the model's stream.
        generator=torch.Generator(),
    )


def place_among(trainer: Trainer | None) -> dict[str, int]:
    """``num_replicas`` and ``rank`` of this process; without a trainer it is the only one."""
    return {
        "num_replicas": 1 if trainer is None else trainer.world_size,
        "rank": 0 if trainer is None else trainer.global_rank,
    }


def numbers_of(index: int | Sequence[int]) -> Sequence[int]:
    """What ``dataset[index]`` is asked for: one number, or those of a batch."""
    return [index] if isinstance(index, int) else index


def _as_it_is(batch: Any) -> Any:
    """Batches come whole; there is nothing to collate."""
    return batch
