"""What all vectorisers of persistence diagrams share: degrees, axes, and a state that a checkpoint can hold.

A stocks, N bars of one degree over all stocks, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from lightning_modules.topology.bars import Array, Bars

Diagrams = Sequence[dict[int, Array]]
Grid = Literal["shared", "per_stock"]

QUANTILES = (0.005, 0.995)
"""Of the training bars, where shared axes end: one outlier would stretch an axis until the rest share a few nodes."""


class DiagramVectoriser(TransformerMixin, BaseEstimator, ABC):
    """What the vectorisers share: degrees, axes laid out by ``fit``, and a state without pickled objects.

    Attributes:
        low_: ``(degrees, axes) float64`` first node of each axis.
        high_: ``(degrees, axes) float64`` last node.
        n_clipped_: ``(degrees,) int64`` training bars outside these axes, 0 where each stock has its own.
    """

    _n_axes = 1
    _limits: ClassVar[dict[str, float]] = {}  # least values of arguments, by name
    degrees: Sequence[int]
    grid: Grid = "shared"
    quantiles: tuple[float, float] = (0.0, 1.0)

    def _validate(self) -> None:
        """Arguments are checked by ``fit``, as in scikit-learn, whose clones set them one by one."""
        degrees = tuple(self.degrees)
        if not degrees or len(set(degrees)) < len(degrees) or min(degrees) < 0:
            raise ValueError(f"degrees must be different numbers from 0 on, at least one, got {degrees}")
        if self.grid not in ("shared", "per_stock"):
            raise ValueError(f"grid must be shared or per_stock, got {self.grid!r}")
        low, high = self.quantiles
        if not 0 <= low < high <= 1:
            raise ValueError(f"quantiles must be two numbers that increase within 0..1, got {(low, high)}")
        for name, least in self._limits.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def _axes(self, bars: Bars) -> list[tuple[Array, Array]]:
        """For each axis, the values its low end is a quantile of, and those of its high end; ``(N,)`` each."""
        return [(bars.births, bars.deaths)]

    def fit(self, X: Diagrams, y: Any = None) -> Self:
        """Lay out the axes over the training diagrams.

        Args:
            X: A diagrams, as :func:`lightning_modules.topology.diagrams.persistence_diagrams` gives them.
            y: Ignored.

        Raises:
            ValueError: If an argument is not allowed, there is no diagram, or one lacks a degree.
        """
        self._validate()
        if not len(X):
            raise ValueError(f"{type(self).__name__} needs at least one diagram, got none")
        self.low_ = np.zeros((len(self.degrees), self._n_axes))
        self.high_ = np.ones((len(self.degrees), self._n_axes))  # any axis will do for a degree without bars
        self.n_clipped_ = np.zeros(len(self.degrees), np.int64)
        for place, degree in enumerate(self.degrees):
            bars = Bars.of(X, degree)
            outside = np.zeros(len(bars.births), bool)
            for axis, (starts, ends) in enumerate(self._axes(bars) if len(bars.births) else ()):
                low, high = np.quantile(starts, self.quantiles[0]), np.quantile(ends, self.quantiles[1])
                self.low_[place, axis], self.high_[place, axis] = low, high
                outside |= (starts < low) | (ends > high)
            self.n_clipped_[place] = outside.sum() if self.grid == "shared" else 0
        return self

    def transform(self, X: Diagrams) -> Array:
        """Rows ``(A, D) float64``, degree after degree.

        Raises:
            ValueError: If a diagram lacks a degree.
            sklearn.exceptions.NotFittedError: Before ``fit``.
        """
        check_is_fitted(self)
        return np.hstack([self._rows(Bars.of(X, degree), place) for place, degree in enumerate(self.degrees)])

    @abstractmethod
    def _rows(self, bars: Bars, place: int) -> Array:
        """Rows of the degree at ``place``."""

    def _ends(self, bars: Bars, place: int, axis: int = 0) -> tuple[Array, Array]:
        """First and last node of each stock, ``(A,)``, or ``(1,)`` where all have the same."""
        if self.grid == "shared":
            return self.low_[place, axis, None], self.high_[place, axis, None]
        starts, ends = self._axes(bars)[axis]
        return bars.least(starts), bars.largest(ends)

    def state(self) -> dict[str, torch.Tensor]:
        """What ``fit`` found, as tensors: a checkpoint of them needs no pickle.

        Raises:
            sklearn.exceptions.NotFittedError: Before ``fit``.
        """
        check_is_fitted(self)
        return {name: torch.from_numpy(getattr(self, name).copy()) for name in ("low_", "high_", "n_clipped_")}

    def load_state(self, state: dict[str, torch.Tensor]) -> Self:
        """Take over what another of the same arguments has found.

        Raises:
            ValueError: If it was of other degrees or axes.
        """
        expected = (len(self.degrees), self._n_axes)
        if tuple(state["low_"].shape) != expected:
            raise ValueError(f"state must have {expected} degrees and axes, got {tuple(state['low_'].shape)}")
        for name in ("low_", "high_", "n_clipped_"):
            setattr(self, name, state[name].numpy().copy())
        return self
