"""Labelled series with a known decision rule, whose best attainable accuracy can be computed.

N series, T steps, C channels, K classes, all classes equally likely. Channel c of a series of class k and length L is
``x_tc = m_k(t) + noise e_tc`` for t = 0..L-1, with e independent and standard normal. The signal m_k is

* ``mean``: the level ``k - (K - 1)/2`` at every step;
* ``bump``: ``exp(-((t - c_k)/w)^2 / 2)`` with centre ``c_k = L (k + 1)/(K + 1)`` and width ``w = L / (6 K)``;
* ``frequency``: ``sin(2 pi f_k t/L + p)``, ``f_k = 2 (k + 1)`` cycles, phase p uniform and of each series and channel
  its own.

Since the noise is white, the ideal (Bayes) rule for the first two is the class whose signal is nearest. For the third
it is non-coherent detection: whole cycles have energy L/2 at any phase, so the likelihood of class k is a product
over channels of ``I0(|X_c(f_k)| / noise^2)`` with X the Fourier sum of the series and I0 the modified Bessel function.

Source: J. G. Proakis, M. Salehi, Digital Communications, 5th edition, chapter 4 for both rules.
"""

import gzip
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import i0e

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Rule = Literal["frequency", "bump", "mean"]

_SEPARATORS = {".ts": ",", ".tsv": "\t", ".txt": "  ", ".arff": ","}


@dataclass(frozen=True)
class LabelledSplit:
    """Series of one split.

    Attributes:
        series: ``(N, T, C) float64``, 0 after the end of a series.
        lengths: ``(N,) int64``, 1..T.
        labels: ``(N,) int64`` 0..K-1, as many of each class as of the others, give or take one.
    """

    series: Array
    lengths: Ints
    labels: Ints


@dataclass(frozen=True, kw_only=True)
class SyntheticSeries:
    """A drawn set.

    Attributes:
        train: Training split.
        test: Test split.
        n_classes: K.
        rule: Name of the signal.
        noise: Standard deviation of the noise, before any normalisation.
        variable_length: Whether lengths differ.
    """

    train: LabelledSplit
    test: LabelledSplit
    n_classes: int
    rule: Rule
    noise: float
    variable_length: bool

    def decide(self, split: LabelledSplit) -> Ints:
        """``(N,)`` class 0..K-1 by the ideal rule."""
        return ideal_rule(split.series, split.lengths, self.rule, n_classes=self.n_classes, noise=self.noise)

    def ideal_accuracy(self) -> float:
        """Accuracy of the ideal rule on the test split, which no classifier exceeds in expectation."""
        return float((self.decide(self.test) == self.test.labels).mean())

    def write(self, folder: Path, name: str, ending: str) -> Path:
        """Write ``NAME_TRAIN`` and ``NAME_TEST`` as the archives do; classes are called 1..K, values are exact.

        Args:
            folder: Made if needed.
            name: NAME.
            ending: ``.ts``, ``.tsv``, ``.txt`` or ``.arff``, or one of these and ``.gz``.

        Returns:
            The folder.

        Raises:
            ValueError: If the ending is another, or the format cannot hold several channels or lengths.
        """
        kind = ending.removesuffix(".gz")
        if kind not in _SEPARATORS:
            raise ValueError(f"ending must be one of {', '.join(_SEPARATORS)}, or that and .gz, got {ending!r}")
        if self.variable_length and kind != ".ts":
            raise ValueError(f"ending must be .ts for series of different length, got {ending!r}")
        if self.train.series.shape[2] > 1 and kind in (".tsv", ".txt"):
            raise ValueError(f"ending must be .ts or .arff for several channels, got {ending!r}")
        folder.mkdir(parents=True, exist_ok=True)
        for part, split in (("TRAIN", self.train), ("TEST", self.test)):
            lines = self._header(kind, name)
            for series, length, label in zip(split.series, split.lengths, split.labels, strict=True):
                lines.append(_row(kind, series[:length], f"{label + 1}"))
            content = ("\n".join(lines) + "\n").encode()
            # Packed without the time of day, so that equal sets give equal files.
            content = gzip.compress(content, mtime=0) if ending.endswith(".gz") else content
            (folder / f"{name}_{part}{ending}").write_bytes(content)
        return folder

    def _header(self, kind: str, name: str) -> list[str]:
        _, n_steps, n_channels = self.train.series.shape
        classes = [str(label + 1) for label in range(self.n_classes)]
        if kind == ".ts":
            return [
                f"@problemName {name}",
                "@timeStamps false",
                "@missing false",
                *(["@univariate true"] if n_channels == 1 else ["@univariate false", f"@dimensions {n_channels}"]),
                f"@equalLength {str(not self.variable_length).lower()}",
                f"@classLabel true {' '.join(classes)}",
                "@data",
            ]
        if kind == ".arff":
            steps = [f"@attribute att{step} numeric" for step in range(n_steps)]
            if n_channels > 1:
                steps = [f"@attribute {name} relational", *steps, f"@end {name}"]
            return [f"@relation {name}", *steps, f"@attribute target {{{','.join(classes)}}}", "@data"]
        return []


def _row(kind: str, series: Array, label: str) -> str:
    channels = [_SEPARATORS[kind].join(map(repr, channel)) for channel in series.T.tolist()]
    if kind == ".ts":
        return ":".join([*channels, label])
    if kind == ".arff":
        # The channels of a series are one quoted cell, parted by a backslash and an n.
        return f"{channels[0]},{label}" if len(channels) == 1 else "'" + "\\n".join(channels) + f"',{label}"
    return f"{label}{_SEPARATORS[kind]}{channels[0]}"


def synthetic_series(
    n_train: int,
    n_test: int,
    *,
    n_steps: int = 100,
    n_channels: int = 1,
    n_classes: int = 2,
    rule: Rule = "frequency",
    noise: float = 1.0,
    variable_length: bool = False,
    z_normed: bool = False,
    seed: int = 0,
) -> SyntheticSeries:
    """Draw a set; equal arguments give equal sets.

    Args:
        n_train: Training series, at least K.
        n_test: Test series, at least K.
        n_steps: T, at least ``4 K + 1``, and twice that with ``variable_length``, so that every frequency is seen.
        n_channels: C, at least 1.
        n_classes: K, at least 2.
        rule: Which signal tells the classes apart.
        noise: Standard deviation of the noise, above 0.
        variable_length: Lengths are uniform in ceil(T/2)..T; the first series of each split has T. Otherwise all
            have T.
        z_normed: Whether every series gets mean 0 and sample std 1 at last, as in the archive. Only for ``frequency``
            with one channel, whose ideal rule does not see shift and scale of a series.
        seed: At least 0.

    Raises:
        ValueError: If an argument is outside its range.
    """
    if rule not in ("frequency", "bump", "mean"):
        raise ValueError(f"rule must be one of 'frequency', 'bump', 'mean', got {rule!r}")
    least = {
        "n_classes": (n_classes, 2),
        "n_train": (n_train, n_classes),
        "n_test": (n_test, n_classes),
        "n_steps": (n_steps, (4 * n_classes + 1) * (2 if variable_length else 1)),
        "n_channels": (n_channels, 1),
        "seed": (seed, 0),
    }
    for argument, (value, minimum) in least.items():
        if value < minimum:
            raise ValueError(f"{argument} must be at least {minimum}, got {value}")
    if not 0 < noise < np.inf:
        raise ValueError(f"noise must be a number above 0, got {noise}")
    if z_normed and (rule != "frequency" or n_channels > 1):
        raise ValueError(f"z_normed needs rule 'frequency' and one channel, got {rule!r} and {n_channels}")
    generator = np.random.default_rng(seed)
    splits = []
    for n_series in (n_train, n_test):
        labels = generator.permutation(np.arange(n_series) % n_classes)
        lengths = np.full(n_series, n_steps)
        if variable_length:
            lengths = generator.integers(-(-n_steps // 2), n_steps, size=n_series, endpoint=True)
            lengths[0] = n_steps
        phases = generator.uniform(0, 2 * np.pi, size=(n_series, n_channels))
        signals = _signals(lengths, n_steps, n_classes, rule)[np.arange(n_series), labels]
        series = np.repeat(signals[..., None], n_channels, axis=2)
        if rule == "frequency":
            series = np.sin(series + phases[:, None, :])
        series = series + noise * generator.standard_normal(series.shape)
        series[np.arange(n_steps) >= lengths[:, None]] = 0
        splits.append(LabelledSplit(series, lengths, labels))
    if z_normed:
        splits = [_archive_form(split) for split in splits]
    train, test = splits
    return SyntheticSeries(
        train=train, test=test, n_classes=n_classes, rule=rule, noise=noise, variable_length=variable_length
    )


def freezer_like(seed: int = 0) -> SyntheticSeries:
    """A set of the size and form of FreezerRegularTrain: 150 training and 2,850 test series of length 301, 2 classes.

    One channel, normalised one by one; the ideal rule is right for all but about one series in ten thousand.

    Args:
        seed: At least 0.
    """
    return synthetic_series(150, 2850, n_steps=301, noise=2.1, z_normed=True, seed=seed)


def ideal_rule(series: Array, lengths: Ints, rule: Rule, *, n_classes: int, noise: float) -> Ints:
    """Most likely class of each series, see the head of this file.

    Args:
        series: ``(N, T, C)``, 0 after the end of a series.
        lengths: ``(N,) int64``.
        rule: Which signal tells the classes apart.
        n_classes: K.
        noise: Standard deviation of the noise, above 0.

    Returns:
        ``(N,) int64``.
    """
    signals = _signals(lengths, series.shape[1], n_classes, rule)
    if rule == "frequency":
        sums = np.abs(np.einsum("ntc,nkt->nkc", series, np.exp(1j * signals)))
        # log I0, scaled so that it does not overflow.
        evidence = (np.log(i0e(sums / noise**2)) + sums / noise**2).sum(2)
    else:
        filled = np.arange(series.shape[1]) < lengths[:, None]
        # |x - m|^2 without the part that all classes share; each channel has the same m.
        energy = series.shape[2] * (np.square(signals) * filled[:, None]).sum(2)
        evidence = np.einsum("ntc,nkt->nk", series, signals) - energy / 2
    return evidence.argmax(1)


def _signals(lengths: Ints, n_steps: int, n_classes: int, rule: Rule) -> Array:
    """``(N, K, T)`` signal of each class for each length; for ``frequency`` its angle without the phase."""
    steps = np.arange(n_steps)
    length = lengths[:, None, None]
    order = np.arange(1, n_classes + 1)[:, None]
    match rule:
        case "mean":
            levels = order - (n_classes + 1) / 2
            return np.broadcast_to(levels, (len(lengths), n_classes, n_steps)).astype(np.float64)
        case "bump":
            centre, width = length * order / (n_classes + 1), length / (6 * n_classes)
            return np.exp(-np.square((steps - centre) / width) / 2)
        case "frequency":
            return 2 * np.pi * 2 * order * steps / length


def _archive_form(split: LabelledSplit) -> LabelledSplit:
    filled = (np.arange(split.series.shape[1]) < split.lengths[:, None])[..., None]
    lengths = split.lengths[:, None, None]
    centred = np.where(filled, split.series - split.series.sum(1, keepdims=True) / lengths, 0)
    return replace(split, series=centred / np.sqrt(np.square(centred).sum(1, keepdims=True) / (lengths - 1)))
