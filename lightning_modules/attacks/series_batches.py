"""Batches of series: without rows that only pad, and all of a split as one.

A batch holds ``series (B, T, C)``, ``mask (B, T) bool``, ``labels (B,) int64`` and ``index (B,) int64``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_modules.collectives import n_processes

KEYS = ("series", "mask", "labels", "index")


def without_padding(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of a batch that are series of the split; ``labels`` of the others are below 0.

    Processes have equally many rows in training, and pad what does not divide. A single one has no such rows.
    """
    if n_processes() == 1:
        return batch
    real = batch["labels"] >= 0
    return {key: value[real] for key, value in batch.items()}


def whole_split(loader: DataLoader[Any]) -> dict[str, Tensor]:
    """Every series of the split behind a loader, whichever batches it gives to this process.

    Args:
        loader: Of a data set that has a length; its items are series, or batches if the loader makes none.

    Returns:
        A batch whose row i is the series of ``index`` i.

    Raises:
        ValueError: If ``index`` does not number the series from 0, each once.
    """
    numbers = list(range(len(loader.dataset)))  # type: ignore[arg-type]
    collate: Any = loader.collate_fn
    parts: list[Mapping[str, Tensor]]
    if hasattr(loader.dataset, "__getitems__"):
        parts = [collate(loader.dataset.__getitems__(numbers))]
    elif loader.batch_size is not None:
        parts = [collate([loader.dataset[number] for number in numbers])]
    else:
        parts = [collate(loader.dataset[number]) for number in numbers]
    whole = {key: torch.cat([part[key] for part in parts]) for key in KEYS}
    index = whole["index"]
    order = index.argsort()
    if not torch.equal(index[order], torch.arange(len(index))):
        raise ValueError(
            f"index of a batch must number the {len(index)} series of the split 0..{len(index) - 1}, each once, got "
            f"{index.unique().numel()} numbers in {int(index.min())}..{int(index.max())}"
        )
    return {key: value[order] for key, value in whole.items()}
