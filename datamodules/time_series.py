"""TimeSeriesDataModule: labelled series of the UCR and UEA archives, to batches for classification and attacks."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.epoch_sampler import IGNORED, EpochLoader, numbers_of, place_among
from datamodules.series_preparation import (
    common_classes,
    cut,
    pooled_moments,
    stratified_folds,
    stratified_holdout,
    z_norm_ddof,
    z_normed,
)
from datamodules.sources.series import find_set, read_series

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Batch = dict[str, Tensor]
Normalise = Literal["auto", "none", "global", "per_series"]
Split = Literal["train", "validation", "test"]

_T = TypeVar("_T")


class TimeSeriesDataModule(LightningDataModule):
    """Series with classes in the official split, whole arrays of them a batch.

    B batch, T steps of the longest series of both splits, C channels, K classes. Every batch, of training,
    validation, test and prediction (the test split), holds ``series (B, T, C) float32``, 0 after the end of a
    shorter series; ``mask (B, T) bool``, true at its steps; ``labels (B,) int64`` 0..K-1, classes in the order of
    their numbers if all are numbers, else of their names; ``index (B,) int64`` row within the split.

    Validation series are carved from the official training series, by class; the rest are the training series.
    Every statistic is of these alone. The order of a training epoch is a function of (seed, epoch); the other
    loaders go in order. Test series leave by :meth:`test_dataloader`, :meth:`predict_dataloader` and
    ``arrays("test")`` only, and by none of them while a trainer fits: what is trained or chosen cannot have seen them.

    Source: spec section 8. Departures: the published standardisation uses all official training series, here without
    those of validation; with several channels each has its own mean and std.

    Args:
        folder: Folder that holds ``NAME_TRAIN`` and ``NAME_TEST`` as ``.ts``, ``.tsv``, ``.txt`` or ``.arff``, plain
            or with ``.gz``; or a folder of such folders, with ``name``. None: ``name`` is a set inside the installed
            sktime, read without network.
        name: NAME; needed where ``folder`` does not tell.
        batch_size: Training series in a batch, at least 1.
        eval_batch_size: Series in the other batches, at least 1.
        validation_fraction: Of the official training series of each class, rounded, at least one of a class with two or
            more and never all; in [0, 1). 0: no validation. Has no effect with ``fold``.
        fold: Which of ``n_folds`` disjoint folds of the official training series, equal in size and classes but for
            one, is the validation split, from 0. None: ``validation_fraction``.
        n_folds: At least 2.
        normalise: ``global``: ``(x - mean) / std`` with one mean and std of all training values (of each channel).
            ``per_series``: each channel of a series gets mean 0 and sample std 1; a constant one becomes 0. ``none``:
            as in the file. ``auto``: ``none`` where the training series are normalised one by one already (see
            :func:`datamodules.series_preparation.z_norm_ddof`), else ``global``: the scale of raw series is
            information.
        num_workers: Worker processes; 0 is fast enough.
        seed: Of the validation split and the order of epochs.
        max_length: Steps after which series are cut, at least 1. None: never.

    Raises:
        ValueError: If an argument is outside its range; on first use, if the files cannot serve: see
            :func:`datamodules.sources.series.read_series`; or there is a single class, a class of the test split or
            of the header is missing from the training split, or channels or lengths differ between the splits.
        FileNotFoundError: On first use, if there is no such folder.
        ImportError: On first use, if sktime is needed and not installed.
    """

    def __init__(
        self,
        *,
        folder: str | None = None,
        name: str | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 1024,
        validation_fraction: float = 0.2,
        fold: int | None = None,
        n_folds: int = 5,
        normalise: Normalise = "auto",
        num_workers: int = 0,
        seed: int = 0,
        max_length: int | None = None,
    ) -> None:
        if folder is None and name is None:
            raise ValueError("folder or name must be given, got neither")
        if normalise not in ("auto", "none", "global", "per_series"):
            raise ValueError(f"normalise must be one of 'auto', 'none', 'global', 'per_series', got {normalise!r}")
        if not 0 <= validation_fraction < 1:
            raise ValueError(f"validation_fraction must be at least 0 and below 1, got {validation_fraction}")
        least = {
            "batch_size": (batch_size, 1),
            "eval_batch_size": (eval_batch_size, 1),
            "n_folds": (n_folds, 2),
            "num_workers": (num_workers, 0),
            "max_length": (1 if max_length is None else max_length, 1),
        }
        for argument, (value, minimum) in least.items():
            if value < minimum:
                raise ValueError(f"{argument} must be at least {minimum}, got {value}")
        if fold is not None and not 0 <= fold < n_folds:
            raise ValueError(f"fold must be in 0..{n_folds - 1}, got {fold}")
        super().__init__()
        self.seed = seed
        self._folder = folder
        self._name = name
        self._batch_size = batch_size
        self._eval_batch_size = eval_batch_size
        self._validation_fraction = validation_fraction
        self._fold = fold
        self._n_folds = n_folds
        self._normalise: Normalise = normalise
        self._num_workers = num_workers
        self._max_length = max_length
        self._prepared: _Prepared | None = None

    def setup(self, stage: str) -> None:
        """Read the files, once."""
        self._set()

    def train_dataloader(self) -> DataLoader:
        """Training series in an order drawn anew each epoch."""
        return self._loader("train", self._batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Validation series, or an empty list if there are none."""
        return self._loader("validation", self._eval_batch_size) if len(self._set().rows["validation"]) else []

    def test_dataloader(self) -> DataLoader:
        """Test series.

        Raises:
            ValueError: While a trainer fits.
        """
        self._check_released("test")
        return self._loader("test", self._eval_batch_size)

    def predict_dataloader(self) -> DataLoader:
        """Test series.

        Raises:
            ValueError: While a trainer fits.
        """
        return self.test_dataloader()

    def arrays(self, split: Split) -> Batch:
        """The whole split as one batch, a copy.

        Raises:
            ValueError: If there is no such split, or for the test split while a trainer fits.
        """
        self._check_released(split)
        return {key: tensor.clone() for key, tensor in _of(self._set().batches, split).items()}

    def _check_released(self, split: Split) -> None:
        if split != "test" or self.trainer is None:
            return
        state = self.trainer.state
        if state.fn == TrainerFn.FITTING and state.status == TrainerStatus.RUNNING:
            raise ValueError("test series were asked for while the trainer fits, they are handed out after it")

    def rows(self, split: Split) -> Ints:
        """``(N,)`` row in its file, from 0, of each series of a split, increasing.

        Raises:
            ValueError: If there is no such split.
        """
        return _of(self._set().rows, split).copy()

    @property
    def n_classes(self) -> int:
        """K."""
        return len(self._set().class_names)

    @property
    def n_channels(self) -> int:
        """C."""
        return len(self._set().mean)

    @property
    def n_steps(self) -> int:
        """T."""
        return self._set().batches["train"]["series"].shape[1]

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the files call classes 0..K-1."""
        return self._set().class_names

    @property
    def mean(self) -> Tensor:
        """``(C,) float64`` that was subtracted from every series; 0 without ``global``."""
        return torch.from_numpy(self._set().mean.copy())

    @property
    def std(self) -> Tensor:
        """``(C,) float64`` that every series was divided by; 1 without ``global`` and for a constant channel."""
        return torch.from_numpy(self._set().std.copy())

    @property
    def z_norm_ddof(self) -> int | None:
        """1 if that std is a sample's, 0 if it is a population's, None if ``is_z_normed`` is false."""
        return self._set().z_norm_ddof

    @property
    def is_z_normed(self) -> bool:
        """Whether each training series, as it is handed out, has mean 0 and std 1 in each channel."""
        return self.z_norm_ddof is not None

    def report_facts(self) -> dict[str, Any]:
        """Name, sizes, classes and normalisation; plain values for JSON."""
        prepared = self._set()
        return {
            "set": prepared.name,
            "split": self._split(),
            "series": {split: len(rows) for split, rows in prepared.rows.items()},
            "classes": {
                split: dict(
                    zip(prepared.class_names, batch["labels"].bincount(minlength=self.n_classes).tolist(), strict=True)
                )
                for split, batch in prepared.batches.items()
            },
            "n_channels": self.n_channels,
            "n_steps": self.n_steps,
            "is_z_normed": self.is_z_normed,
            "mean": prepared.mean.tolist(),
            "std": prepared.std.tolist(),
            "train_digest": prepared.train_digest,
        }

    def state_dict(self) -> dict[str, Any]:
        """What the model was trained on: the split, the statistics, a digest of the training series and labels."""
        prepared = self._set()
        return {
            "split": json.dumps(self._split(), sort_keys=True),
            "train_digest": prepared.train_digest,
            "mean": prepared.mean.tolist(),
            "std": prepared.std.tolist(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a checkpoint was trained on the training series that are here.

        Raises:
            ValueError: If it was split or normalised otherwise, or trained on other series: what is validated here
                may have been trained on there, and the network would see another scale.
        """
        there, here = json.loads(state_dict["split"]), self._split()
        for name, value in here.items():
            if there.get(name) != value:
                raise ValueError(f"checkpoint was trained with {name} {there.get(name)!r}, here it is {value!r}")
        digest = self._set().train_digest
        if state_dict["train_digest"] != digest:
            raise ValueError(
                f"checkpoint was trained on the series {state_dict['train_digest']}, the files here give {digest}: "
                "training series or classes differ"
            )

    def _split(self) -> dict[str, Any]:
        chosen: dict[str, Any] = {"normalise": self._normalise, "max_length": self._max_length, "seed": self.seed}
        if self._fold is None:
            return chosen | {"validation_fraction": self._validation_fraction, "fold": None}
        return chosen | {"fold": self._fold, "n_folds": self._n_folds}

    def _set(self) -> "_Prepared":
        if self._prepared is None:
            self._prepared = self._prepare()
            sizes = ", ".join(f"{len(rows)} {split}" for split, rows in self._prepared.rows.items())
            logger.info("%s: %s series, %d classes", self._prepared.name, sizes, self.n_classes)
        return self._prepared

    def _prepare(self) -> "_Prepared":
        files = find_set(self._folder, self._name)
        train, test = (read_series(file) for file in files)
        class_names, labels, test_labels = common_classes(train, test)
        if self._fold is None:
            held_out = stratified_holdout(labels, self._validation_fraction, self.seed)
        else:
            rarest = np.bincount(labels).argmin()
            if (labels == rarest).sum() < 2:
                raise ValueError(f"{train.path}: class {class_names[rarest]!r} has one series, folds need at least 2")
            held_out = stratified_folds(labels, self._n_folds, self.seed) == self._fold
        rows: dict[Split, Ints] = {
            "train": np.flatnonzero(~held_out),
            "validation": np.flatnonzero(held_out),
            "test": np.arange(len(test_labels)),
        }
        n_steps = max(train.values.shape[1], test.values.shape[1])
        n_steps = n_steps if self._max_length is None else min(n_steps, self._max_length)
        both = {split: cut(test if split == "test" else train, chosen, n_steps) for split, chosen in rows.items()}
        train_digest = _digest(class_names, *both["train"], labels[rows["train"]])
        n_channels = train.values.shape[2]
        mean, std = np.zeros(n_channels), np.ones(n_channels)
        if self._normalise == "per_series":
            both = {split: (z_normed(*pair), pair[1]) for split, pair in both.items()}
        elif self._normalise == "global" or (self._normalise == "auto" and z_norm_ddof(*both["train"]) is None):
            mean, std = pooled_moments(*both["train"])
            both = {
                split: (np.where(mask[..., None], (series - mean) / std, 0), mask)
                for split, (series, mask) in both.items()
            }
        for split, (series, _) in both.items():
            far = np.argwhere(~(np.abs(series) <= np.finfo(np.float32).max))
            if len(far):
                row, step, channel = far[0]
                where = f"{files[split == 'test']}: row {rows[split][row] + 1}, channel {channel + 1}, step {step + 1}"
                value = series[row, step, channel]
                raise ValueError(f"{where}: {value:g} when normalised by training (normalise), beyond float32")
        all_labels = {"train": labels, "validation": labels, "test": test_labels}
        return _Prepared(
            name=files[0].name.split("_TRAIN.")[0],
            class_names=class_names,
            rows=rows,
            batches={
                split: {
                    "series": torch.from_numpy(series.astype(np.float32)),
                    "mask": torch.from_numpy(mask),
                    "labels": torch.from_numpy(all_labels[split][rows[split]]),
                    "index": torch.arange(len(mask)),
                }
                for split, (series, mask) in both.items()
            },
            mean=mean,
            std=std,
            z_norm_ddof=z_norm_ddof(*both["train"]),
            train_digest=train_digest,
        )

    def _loader(self, split: Split, batch_size: int, *, shuffle: bool = False) -> DataLoader:
        series = _SeriesSplit(self._set().batches[split])
        return EpochLoader(
            series,
            rows=batch_size,
            shuffled=shuffle,
            seed=self.seed,
            **place_among(self.trainer),
            num_workers=self._num_workers,
        )


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    name: str
    class_names: tuple[str, ...]
    rows: dict[Split, Ints]
    batches: dict[Split, Batch]
    mean: Array
    std: Array
    z_norm_ddof: int | None
    train_digest: str


class _SeriesSplit(Dataset):
    """A split; number ``epoch * n + i``, as :class:`EpochSampler` yields it, is series i.

    -1 only fills the batch of a replica: a copy of series 0 with label -100 and index -1.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def __len__(self) -> int:
        return len(self._batch["labels"])

    def __getitem__(self, index: int | Sequence[int]) -> Batch:
        return self.__getitems__(numbers_of(index))

    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        chosen = torch.as_tensor(numbers, dtype=torch.int64)  # of no numbers too
        padding = chosen < 0
        batch = {key: tensor[chosen.clamp(min=0) % len(self)] for key, tensor in self._batch.items()}
        batch["labels"][padding], batch["index"][padding] = IGNORED, -1
        return batch


def _digest(class_names: tuple[str, ...], *arrays: NDArray[Any]) -> str:
    """Stands for classes and series as the file has them: a mean may differ in its last bit between machines."""
    digest = hashlib.blake2b(json.dumps(class_names).encode(), digest_size=8)
    for array in arrays:
        digest.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _of(table: dict[Split, _T], split: Split) -> _T:
    if split not in table:
        raise ValueError(f"split must be one of 'train', 'validation', 'test', got {split!r}")
    return table[split]
