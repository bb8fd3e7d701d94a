"""Order of an epoch as a pure function of (seed, epoch), over any number of replicas."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, DistributedSampler

from datamodules.counter_hash import Purpose, as_integers, chain


class EpochSampler(DistributedSampler):
    """Which sequences a replica sees in which order.

    Shuffled (training): the order is a seeded permutation of 0..n-1, repeated from its start until the replicas
    have equally many; replica r takes places r, r + R, r + 2R, ... and yields ``index + epoch * n``. A data set takes
    the epoch out of the number again, so that worker processes need no message about it.
    Not shuffled (evaluation): 0..n-1 in order, nothing repeated; the replicas are disjoint and complete.

    It is a ``DistributedSampler`` because Lightning leaves those in place, and calls their ``set_epoch``.

    Args:
        dataset: Anything with a length n.
        shuffle: Whether this is for training.
        seed: Any integer.
        num_replicas: R, at least 1.
        rank: This replica, 0..R-1.

    Raises:
        ValueError: If ``num_replicas`` is below 1 or ``rank`` outside 0..R-1.
    """

    def __init__(self, dataset: Dataset, *, shuffle: bool, seed: int, num_replicas: int = 1, rank: int = 0) -> None:
        if num_replicas < 1:
            raise ValueError(f"num_replicas must be at least 1, got {num_replicas}")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank must be in 0..{num_replicas - 1}, got {rank}")
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed, drop_last=False)
        self._n: int = len(dataset)  # type: ignore[arg-type]

    def _order(self) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(self.rank, self._n, self.num_replicas)
        order = np.argsort(chain(self.seed, Purpose.EPOCH_ORDER, self.epoch, np.arange(self._n)), kind="stable")
        order = np.resize(order, -(-self._n // self.num_replicas) * self.num_replicas)
        return order[self.rank :: self.num_replicas] + self.epoch * self._n

    def __iter__(self) -> Iterator[Any]:
        return as_integers(self._order())

    def __len__(self) -> int:
        if self.shuffle:
            return -(-self._n // self.num_replicas)
        return len(range(self.rank, self._n, self.num_replicas))
