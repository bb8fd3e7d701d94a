"""What becomes of labelled series before they are batched: number of a class, held out or not, scale.

N series, T steps, C channels, K classes.
"""

from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from datamodules.counter_hash import Purpose, chain
from datamodules.sources.series import LabelledSeries

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

# Of the archive's own form. Measured there: below 1e-8; files with six decimals keep it up to about 1e-6.
_LARGEST_MEAN = 1e-4
_LARGEST_STD_ERROR = 1e-3


def common_classes(train: LabelledSeries, test: LabelledSeries) -> tuple[tuple[str, ...], Ints, Ints]:
    """Class names in order, and ``(N,)`` labels 0..K-1 of both splits, once these have shown to belong together.

    Names are ordered as numbers if all are numbers, else as text.

    Raises:
        ValueError: In one line with the file, if a class of the test split or of the header is missing from the
            training split, there is only one, or channels or lengths of the splits differ.
    """
    names = set(train.labels)
    for row, label in enumerate(test.labels, start=1):
        if label not in names:
            raise ValueError(f"{test.path}: row {row}: class {label!r} is missing from {train.path.name}")
    for label in train.declared:
        if label not in names:
            raise ValueError(f"{train.path}: class {label!r} is in the header, but no series has it")
    if len(names) == 1:
        raise ValueError(f"{train.path}: all series have class {train.labels[0]!r}, at least two classes are needed")
    if train.values.shape[2] != test.values.shape[2]:
        raise ValueError(f"{test.path}: {test.values.shape[2]} channels, {train.path.name} has {train.values.shape[2]}")
    if train.values.shape[1] != test.values.shape[1] and not (train.may_vary or test.may_vary):
        raise ValueError(
            f"{test.path}: series of {test.values.shape[1]} values, {train.path.name} has {train.values.shape[1]}"
        )
    ordered = sorted(names)
    with suppress(ValueError):
        ordered.sort(key=float)
    place = {name: number for number, name in enumerate(ordered)}
    labels, test_labels = (
        np.array([place[label] for label in split.labels], dtype=np.int64) for split in (train, test)
    )
    return tuple(ordered), labels, test_labels


def cut(split: LabelledSeries, rows: Ints, n_steps: int) -> tuple[Array, Mask]:
    """``(N, T, C)`` series of these rows, cut or padded with 0 to T steps, and ``(N, T)`` their mask.

    Args:
        split: The file's series.
        rows: ``(N,) int64`` rows of it, from 0.
        n_steps: T.
    """
    values = split.values[rows, :n_steps]
    values = np.pad(values, ((0, 0), (0, n_steps - values.shape[1]), (0, 0)))
    return values, np.arange(n_steps) < split.lengths[rows, None]


def stratified_holdout(labels: Ints, fraction: float, seed: int) -> Mask:
    """``(N,)`` which series are held out: of n of a class ``round(fraction n)``, at least 1 and at most n - 1.

    Which ones is decided by a hash of (seed, row); a class with one series keeps it, and nobody is held out if
    ``fraction`` is 0.

    Args:
        labels: ``(N,) int64`` 0..K-1.
        fraction: In [0, 1).
        seed: Any integer.
    """
    if fraction == 0:
        return np.zeros(len(labels), dtype=bool)
    order, rank, counts = _shuffled_by_class(labels, seed)
    wanted = np.minimum(np.maximum(np.floor(fraction * counts + 0.5), 1), counts - 1)
    held_out = np.empty(len(labels), dtype=bool)
    held_out[order] = rank < wanted[labels[order]]
    return held_out


def stratified_folds(labels: Ints, n_folds: int, seed: int) -> Ints:
    """``(N,)`` fold of each series, 0..n_folds-1: dealt out class by class in the order of a hash of (seed, row).

    Sizes of folds, and of each class within them, differ by at most one. A class of at least two series is never
    wholly in one fold.

    Args:
        labels: ``(N,) int64`` 0..K-1.
        n_folds: 2..N.
        seed: Any integer.

    Raises:
        ValueError: If ``n_folds`` is not in 2..N.
    """
    if not 2 <= n_folds <= len(labels):
        raise ValueError(f"n_folds must be in 2..{len(labels)}, the number of training series, got {n_folds}")
    order, _, _ = _shuffled_by_class(labels, seed)
    folds = np.empty(len(labels), dtype=np.int64)
    folds[order] = np.arange(len(labels)) % n_folds
    return folds


def _shuffled_by_class(labels: Ints, seed: int) -> tuple[Ints, Ints, Ints]:
    """``(N,)`` series by class and then by hash, ``(N,)`` their places within the class, ``(K,)`` sizes of classes."""
    # A series is here what a user is in InteractionsDataModule: the unit that training does not see.
    order = np.lexsort((chain(seed, Purpose.VALIDATION_USER, np.arange(len(labels))), labels))
    counts = np.bincount(labels)
    return order, np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts), counts


def z_norm_ddof(series: Array, mask: Mask) -> int | None:
    """Whether series are normalised one by one: ``|mean| < 1e-4`` and ``|std - 1| < 1e-3`` in each channel of each.

    A constant channel, whose std no division can make 1, must have that mean and says nothing of the std.

    Args:
        series: ``(N, T, C)``, 0 where the mask is false.
        mask: ``(N, T)``.

    Returns:
        1 if the std is that of a sample (the form of the archive), 0 if it is that of a population, None if the
        series are not normalised or all constant. If both hold, as for long series, the closer one.
    """
    mean, squares, lengths = _moments(series, mask)
    if not (np.abs(mean) < _LARGEST_MEAN).all():
        return None
    varies = ~_is_constant(series, mask)
    if not varies.any():
        return None
    # A series of one step has no sample std.
    errors = {ddof: np.abs(np.sqrt(squares / np.maximum(lengths - ddof, 1)) - 1)[varies].max() for ddof in (1, 0)}
    closer = min(errors, key=lambda ddof: errors[ddof])
    return closer if errors[closer] < _LARGEST_STD_ERROR else None


def z_normed(series: Array, mask: Mask) -> Array:
    """``(N, T, C)``, each channel of each series with mean 0 and sample std 1; a constant one is 0.

    Args:
        series: ``(N, T, C)``, 0 where the mask is false.
        mask: ``(N, T)``.
    """
    mean, squares, lengths = _moments(series, mask)
    filled = mask[..., None]
    constant = _is_constant(series, mask)
    std = np.where(constant, 1, np.sqrt(squares / np.maximum(lengths - 1, 1)))
    return np.where(filled & ~constant, (series - mean) / std, 0)


def _is_constant(series: Array, mask: Mask) -> Mask:
    """``(N, 1, C)``: its values tell exactly, their mean and std are rounding."""
    return ((series == series[:, :1]) | ~mask[..., None]).all(axis=1, keepdims=True)


def pooled_moments(series: Array, mask: Mask) -> tuple[Array, Array]:
    """``(C,)`` mean and population std over all steps of all series; the std of a constant channel is 1.

    Args:
        series: ``(N, T, C)``.
        mask: ``(N, T)``.
    """
    values = series[mask]
    return values.mean(0), np.where(np.ptp(values, axis=0) == 0, 1.0, values.std(0))


def _moments(series: Array, mask: Mask) -> tuple[Array, Array, Array]:
    """Of each series ``(N, 1, C)`` means, ``(N, 1, C)`` sums of squared deviations and ``(N, 1, 1)`` lengths."""
    filled = mask[..., None]
    lengths = filled.sum(1, keepdims=True).astype(np.float64)
    mean = series.sum(1, keepdims=True) / lengths
    return mean, np.square(np.where(filled, series - mean, 0)).sum(1, keepdims=True), lengths
