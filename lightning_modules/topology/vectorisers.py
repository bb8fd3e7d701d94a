"""Vectors of persistence diagrams, as scikit-learn transformers: a list of diagrams in, one row a stock out.

A stocks, D width; b birth, d death, l = d - b lifetime of a bar. ``fit`` lays out axes over the training diagrams, so
that a column means the same radius for every stock (``grid="shared"``); with ``grid="per_stock"``, as published, every
stock has axes of its own. A diagram without bars gives a row of zeros. Source: spec of arXiv 2308.07944, section 3.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from lightning_modules.topology.bars import (
    Array,
    Bars,
    amplitudes,
    betti_curves,
    entropies,
    landscapes,
    lifetime_statistics,
    polynomial_coefficients,
    silhouettes,
    stable_ranks,
)
from lightning_modules.topology.diagram_vectoriser import QUANTILES, DiagramVectoriser, Grid


class PersistenceImage(DiagramVectoriser):
    """Persistence image: a Gaussian on every bar in birth-lifetime coordinates, without a weight by lifetime.

    I(x, y) = sum over bars of G(x - b) G(y - l), G a Gaussian density, at the nodes of a grid of n_bins births by
    n_bins lifetimes, birth first. In degree 0, where all births are 0, there are n_bins^2 lifetimes and no birth.

    With ``sigma="auto"`` each axis is mapped to 0..1 and the standard deviation of G is one grid step of it. A number
    is the standard deviation in the units of the diagrams, on both axes, as published (0.0005 there). Either way G is
    a density in the units of its axis. Bars outside shared axes are moved to their border.

    ``method="binned"`` is what giotto-tda means by a persistence image, not rotated: bars are moved to the node below
    and counted, and the counts are blurred, cut at 4 standard deviations and at the border. Its sigma is a number.

    Args:
        degrees: Homology degrees.
        n_bins: Nodes an axis, at least 2.
        sigma: ``auto`` or a positive number.
        grid: ``shared`` or ``per_stock``.
        quantiles: Of births and of lifetimes, where shared axes end.
        method: ``formula`` or ``binned``.

    Source: H. Adams et al., JMLR 18 (2017), with weight 1.
    """

    _n_axes = 2
    _limits: ClassVar[dict[str, float]] = {"n_bins": 2}

    def __init__(
        self,
        degrees: Sequence[int] = (1,),
        *,
        n_bins: int = 10,
        sigma: float | Literal["auto"] = "auto",
        grid: Grid = "shared",
        quantiles: tuple[float, float] = QUANTILES,
        method: Literal["formula", "binned"] = "formula",
    ) -> None:
        self.degrees = degrees
        self.n_bins = n_bins
        self.sigma = sigma
        self.grid = grid
        self.quantiles = quantiles
        self.method = method

    def _validate(self) -> None:
        super()._validate()
        if self.method not in ("formula", "binned"):
            raise ValueError(f"method must be formula or binned, got {self.method!r}")
        is_number = not isinstance(self.sigma, str) and 0 < self.sigma < np.inf
        if not is_number and (self.sigma != "auto" or self.method == "binned"):
            allowed = "a positive number" if self.method == "binned" else "auto or a positive number"
            raise ValueError(f"sigma must be {allowed} with method {self.method}, got {self.sigma!r}")

    def _axes(self, bars: Bars) -> list[tuple[Array, Array]]:
        return [(bars.births, bars.births), (bars.lifetimes, bars.lifetimes)]

    def _rows(self, bars: Bars, place: int) -> Array:
        factors = []
        n_nodes = (1, self.n_bins**2) if self.degrees[place] == 0 else (self.n_bins, self.n_bins)
        for axis, values in enumerate((bars.births, bars.lifetimes)):
            low, high = (np.broadcast_to(end, bars.n_stocks)[bars.owner] for end in self._ends(bars, place, axis))
            extent = np.where(high > low, high - low, 1.0)  # on an axis without extent all bars are on the first node
            unit = (np.clip(values, low, high) - low) / extent
            factors.append(self._factor(unit, extent, n_nodes[axis]))
        return bars.total(factors[0][:, :, None] * factors[1][:, None, :]).reshape(bars.n_stocks, -1)

    def _factor(self, unit: Array, extent: Array, n_nodes: int) -> Array:
        """What each bar, at ``unit`` of an axis of that extent, gives to each node: ``(N, nodes)``."""
        if n_nodes == 1:
            return np.ones((len(unit), 1))
        steps = n_nodes - 1
        if self.sigma == "auto":
            away = unit[:, None] * steps - np.arange(n_nodes)  # in steps, which are the standard deviations
            return np.exp(-0.5 * away**2) * (steps / np.sqrt(2 * np.pi))
        step = extent[:, None] / steps
        if self.method == "formula":
            away = (unit[:, None] * steps - np.arange(n_nodes)) * step / self.sigma
            return np.exp(-0.5 * away**2) / (np.sqrt(2 * np.pi) * self.sigma)
        away = np.abs((unit * steps).astype(np.int64)[:, None] - np.arange(n_nodes))
        in_steps = self.sigma / step
        radius = np.floor(4 * in_steps + 0.5)
        kernel = np.exp(-0.5 * (away / in_steps) ** 2) * (away <= radius)
        # The weights of the whole kernel sum to 1, what it has beyond the border included.
        reach = np.arange(1, int(radius.max(initial=0)) + 1)
        widths, place = np.unique(in_steps, return_inverse=True)
        sums = [1 + 2 * np.exp(-0.5 * (reach[: int(4 * width + 0.5)] / width) ** 2).sum() for width in widths]
        return kernel / (np.array(sums)[place.ravel(), None] * step)


class _Curve(DiagramVectoriser):
    """A function of the filtration radius, at equidistant nodes."""

    _limits: ClassVar[dict[str, float]] = {"n_bins": 2}
    n_bins: int

    def _rows(self, bars: Bars, place: int) -> Array:
        low, high = self._ends(bars, place)
        nodes = low[:, None] + (high - low)[:, None] * np.linspace(0, 1, self.n_bins)
        return self._curves(bars, nodes).reshape(bars.n_stocks, -1)

    @abstractmethod
    def _curves(self, bars: Bars, nodes: Array) -> Array:
        """Values at the nodes, ``(A, ...)``."""


class Landscape(_Curve):
    """Persistence landscape: the k-th largest of max(0, min(t - b, d - t)) at each node t, layer after layer.

    Args:
        degrees: Homology degrees.
        n_bins: Nodes, at least 2.
        n_layers: k = 1 .. n_layers, at least 1.
        grid: ``shared`` or ``per_stock``.
        quantiles: Of births and of deaths, where the shared axis begins and ends.

    Source: P. Bubenik, JMLR 16 (2015).
    """

    _limits: ClassVar[dict[str, float]] = {"n_bins": 2, "n_layers": 1}

    def __init__(
        self,
        degrees: Sequence[int] = (1,),
        *,
        n_bins: int = 100,
        n_layers: int = 1,
        grid: Grid = "shared",
        quantiles: tuple[float, float] = QUANTILES,
    ) -> None:
        self.degrees = degrees
        self.n_bins = n_bins
        self.n_layers = n_layers
        self.grid = grid
        self.quantiles = quantiles

    def _curves(self, bars: Bars, nodes: Array) -> Array:
        return landscapes(bars, nodes, self.n_layers)


class BettiCurve(_Curve):
    """Betti curve: the number of bars with b <= t < d at each node t.

    Args:
        degrees: Homology degrees.
        n_bins: Nodes, at least 2.
        grid: ``shared`` or ``per_stock``.
        quantiles: Of births and of deaths, where the shared axis begins and ends.
    """

    def __init__(
        self,
        degrees: Sequence[int] = (1,),
        *,
        n_bins: int = 100,
        grid: Grid = "shared",
        quantiles: tuple[float, float] = QUANTILES,
    ) -> None:
        self.degrees = degrees
        self.n_bins = n_bins
        self.grid = grid
        self.quantiles = quantiles

    def _curves(self, bars: Bars, nodes: Array) -> Array:
        return betti_curves(bars, nodes)


class Silhouette(_Curve):
    """Silhouette: the mean, weighted by l^power, of max(0, min(t - b, d - t)) at each node t.

    Args:
        degrees: Homology degrees.
        n_bins: Nodes, at least 2.
        power: At least 0; the larger, the more the long bars count.
        grid: ``shared`` or ``per_stock``.
        quantiles: Of births and of deaths, where the shared axis begins and ends.

    Source: F. Chazal et al., SoCG (2014).
    """

    _limits: ClassVar[dict[str, float]] = {"n_bins": 2, "power": 0}

    def __init__(
        self,
        degrees: Sequence[int] = (1,),
        *,
        n_bins: int = 100,
        power: float = 1.0,
        grid: Grid = "shared",
        quantiles: tuple[float, float] = QUANTILES,
    ) -> None:
        self.degrees = degrees
        self.n_bins = n_bins
        self.power = power
        self.grid = grid
        self.quantiles = quantiles

    def _curves(self, bars: Bars, nodes: Array) -> Array:
        return silhouettes(bars, nodes, self.power)


class PersistenceEntropy(DiagramVectoriser):
    """Entropy of the lifetimes: -sum p log2 p with p = l / sum l, in bits, one column a degree.

    0 with one bar or none (giotto-tda gives -1 with none); :class:`PersistenceStatistics` has the counts beside it.

    Args:
        degrees: Homology degrees.
    """

    _n_axes = 0

    def __init__(self, degrees: Sequence[int] = (0, 1, 2)) -> None:
        self.degrees = degrees

    def _axes(self, bars: Bars) -> list[tuple[Array, Array]]:
        return []

    def _rows(self, bars: Bars, place: int) -> Array:
        return entropies(bars)[:, None]


class PersistenceStatistics(DiagramVectoriser):
    """Scalars of the diagrams: 23 in degrees 0, 1, 2; the published 23 were not named, these are ours.

    In each degree the entropy, the number of bars (not in degree 0, where it is the number of points less one) and the
    amplitudes of :func:`lightning_modules.topology.bars.amplitudes`. The Gaussian of the heat amplitude is a tenth as
    wide as the training axis is long.

    The extended set adds in each degree: sum, maximum, mean, standard deviation and quartiles of the lifetimes, birth
    and death of the longest bar, the silhouette at 10 nodes, the number of bars of at least 5 shares of the training
    axis (stable ranks), and 3 complex coefficients of the polynomial of the bars.

    Args:
        degrees: Homology degrees.
        extended: Whether to add the extended set.
        n_bins: Nodes of the sampled amplitudes, at least 2.
    """

    _limits: ClassVar[dict[str, float]] = {"n_bins": 2}
    quantiles = QUANTILES

    def __init__(self, degrees: Sequence[int] = (0, 1, 2), *, extended: bool = False, n_bins: int = 100) -> None:
        self.degrees = degrees
        self.extended = extended
        self.n_bins = n_bins

    def _rows(self, bars: Bars, place: int) -> Array:
        return np.stack(list(self._columns(bars, place).values()), axis=1)

    def _columns(self, bars: Bars, place: int) -> dict[str, Array]:
        low, extent = self.low_[place, 0], self.high_[place, 0] - self.low_[place, 0]
        columns: dict[str, NDArray[Any]] = {"entropy": entropies(bars)}
        if self.degrees[place] > 0:
            columns["count"] = bars.counts.astype(np.float64)
        columns |= amplitudes(bars, self.n_bins, 0.1 * extent if extent > 0 else 1.0)
        if not self.extended:
            return columns
        columns |= lifetime_statistics(bars)
        for name, table in (
            ("silhouette", silhouettes(bars, low + extent * np.linspace(0, 1, 10)[None], 1.0)),
            ("stable_rank", stable_ranks(bars, extent * np.array([0.01, 0.02, 0.05, 0.1, 0.2]))),
            ("polynomial", polynomial_coefficients(bars, 3)),
        ):
            columns |= {f"{name}_{number}": column for number, column in enumerate(table.T)}
        return columns

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Names of the columns, such as ``h1_entropy``."""
        nothing = Bars.of([{degree: np.empty((0, 2)) for degree in self.degrees}], self.degrees[0])
        check_is_fitted(self)
        return np.array(
            [
                f"h{degree}_{name}"
                for place, degree in enumerate(self.degrees)
                for name in self._columns(nothing, place)
            ],
            object,
        )
