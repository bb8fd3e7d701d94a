"""Bars of all stocks in flat arrays, and the scalars and curves computed from them at once.

A stocks, N bars of one degree over all stocks, M most bars of a stock; b birth, d death, l = d - b lifetime. A stock
without bars gets 0 everywhere. Amplitudes are distances from the empty diagram. Source: spec of arXiv 2308.07944,
section 3, and the papers named at each function.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

Array = NDArray[np.float64]

_CHUNK_ENTRIES = 2**22  # of the largest array held at a time


class Bars(NamedTuple):
    """Bars of one degree, stock after stock.

    Attributes:
        births: ``(N,) float64``.
        deaths: ``(N,) float64``.
        owner: ``(N,) int64`` stock of each bar.
        starts: ``(A + 1,) int64`` place of each stock's first bar, and N.
    """

    births: Array
    deaths: Array
    owner: NDArray[np.int64]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, diagrams: Sequence[dict[int, Array]], degree: int) -> Self:
        """Put the bars of ``degree`` one after another.

        Raises:
            ValueError: If a diagram does not hold that degree.
        """
        for stock, diagram in enumerate(diagrams):
            if degree not in diagram:
                raise ValueError(f"diagram {stock} must hold degree {degree}, it holds {sorted(diagram)}")
        counts = np.array([len(diagram[degree]) for diagram in diagrams], np.int64)
        bars = np.concatenate([np.empty((0, 2)), *(diagram[degree] for diagram in diagrams)])
        starts = np.concatenate([[0], counts.cumsum()])
        return cls(bars[:, 0], bars[:, 1], np.repeat(np.arange(len(counts)), counts), starts)

    @property
    def n_stocks(self) -> int:
        """A."""
        return len(self.starts) - 1

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of bars of each stock, ``(A,)``."""
        return np.diff(self.starts)

    @property
    def lifetimes(self) -> Array:
        """``(N,)``."""
        return self.deaths - self.births

    def total(self, values: NDArray[Any]) -> NDArray[Any]:
        """Sum over the bars of each stock: ``(N, ...)`` to ``(A, ...)``."""
        n_bars = len(self.births)
        ownership = csr_array((np.ones(n_bars), np.arange(n_bars), self.starts), shape=(self.n_stocks, n_bars))
        width = int(np.prod(values.shape[1:]))  # not -1: there may be no bar
        return (ownership @ values.reshape(n_bars, width)).reshape(self.n_stocks, *values.shape[1:])

    def least(self, values: Array) -> Array:
        """Least of ``values (N,)`` of each stock, ``(A,)``."""
        found = np.where(self.counts > 0, np.inf, 0.0)
        np.minimum.at(found, self.owner, values)
        return found

    def largest(self, values: Array) -> Array:
        """Largest of ``values (N,)`` of each stock, ``(A,)``."""
        return -self.least(-values)

    def padded(self, values: Array) -> Array:
        """One row a stock, ``(A, M)``, filled up with 0."""
        table = np.zeros((self.n_stocks, int(self.counts.max(initial=0))))
        table[self.owner, np.arange(len(values)) - self.starts[self.owner]] = values
        return table

    def ratio(self, numerator: Array, denominator: NDArray[Any]) -> Array:
        """Quotient of ``(A, ...)`` and ``(A,)``, 0 where the second is 0."""
        below = denominator.reshape(-1, *[1] * (numerator.ndim - 1))
        return np.divide(numerator, below, out=np.zeros_like(numerator), where=below != 0)


def betti_curves(bars: Bars, nodes: Array) -> Array:
    """Number of bars with b <= t < d at the nodes t, ``(A, n)`` or ``(1, n)``: ``(A, n)``."""
    at = np.broadcast_to(nodes, (bars.n_stocks, nodes.shape[1]))[bars.owner]
    return bars.total(((bars.births[:, None] <= at) & (at < bars.deaths[:, None])).astype(np.float64))


def tents(bars: Bars, nodes: Array) -> Array:
    """max(0, min(t - b, d - t)) of each bar at its stock's nodes t, ``(A, n)`` or ``(1, n)``: ``(N, n)``."""
    at = np.broadcast_to(nodes, (bars.n_stocks, nodes.shape[1]))[bars.owner]
    return np.maximum(np.minimum(at - bars.births[:, None], bars.deaths[:, None] - at), 0.0)


def landscapes(bars: Bars, nodes: Array, n_layers: int) -> Array:
    """Persistence landscape: the k-th largest tent at each node t, k = 1 .. K, ``(A, K, n)``.

    Source: P. Bubenik, JMLR 16 (2015).
    """
    most, n_nodes = int(bars.counts.max(initial=0)), nodes.shape[1]
    layers = np.zeros((bars.n_stocks, n_layers, n_nodes))
    heights = tents(bars, nodes)
    step = max(1, _CHUNK_ENTRIES // max(1, most * n_nodes))
    for first in range(0, bars.n_stocks, step):
        last = min(first + step, bars.n_stocks)
        rows = slice(bars.starts[first], bars.starts[last])
        owner = bars.owner[rows]
        table = np.zeros((last - first, max(most, n_layers), n_nodes))
        table[owner - first, np.arange(rows.start, rows.stop) - bars.starts[owner]] = heights[rows]
        table.partition(range(table.shape[1] - n_layers, table.shape[1]), axis=1)
        layers[first:last] = table[:, ::-1][:, :n_layers]
    return layers


def silhouettes(bars: Bars, nodes: Array, power: float) -> Array:
    """Mean of the tents weighted by l^power: ``(A, n)``. Source: F. Chazal et al., SoCG (2014)."""
    longest = bars.largest(bars.lifetimes)[bars.owner]
    weights = (bars.lifetimes / longest) ** power  # of the longest bar, so that no large power overflows
    return bars.ratio(bars.total(weights[:, None] * tents(bars, nodes)), bars.total(weights))


def entropies(bars: Bars) -> Array:
    """-sum p log2 p with p = l / sum l, in bits: ``(A,)``; 0 with one bar or none."""
    shares = bars.lifetimes / bars.total(bars.lifetimes)[bars.owner]
    return np.maximum(-bars.total(shares * np.log2(shares)), 0.0)  # not -0


def amplitudes(bars: Bars, n_nodes: int, heat_sigma: float) -> dict[str, Array]:
    """Six amplitudes of each stock, ``(A,)`` each.

    | name | definition |
    |---|---|
    | bottleneck | max l / 2 |
    | wasserstein | sqrt(sum (l / 2)^2) |
    | betti | L2 norm of the Betti curve, exactly |
    | landscape | L2 norm of the first landscape layer, as sqrt(h sum f(t)^2) over ``n_nodes`` nodes of step h |
    | silhouette | the same of the silhouette of power 1 |
    | heat | L2 norm, over the plane, of Gaussians on the bars minus Gaussians on their mirror images, exactly |

    Nodes run from the first birth to the last death of each stock: an integral does not depend on where it is sampled,
    so these need no common axis. The first two measure the distance of a bar from the diagonal in the maximum norm.

    Args:
        bars: Of one degree.
        n_nodes: At least 2.
        heat_sigma: Standard deviation of the Gaussians, positive.
    """
    low, high = bars.least(bars.births), bars.largest(bars.deaths)
    nodes = low[:, None] + (high - low)[:, None] * np.linspace(0, 1, n_nodes)
    root_step = np.sqrt((high - low) / (n_nodes - 1))
    return {
        "bottleneck": bars.largest(bars.lifetimes) / 2,
        "wasserstein": np.sqrt(bars.total((bars.lifetimes / 2) ** 2)),
        "betti": _betti_norms(bars),
        "landscape": root_step * np.linalg.norm(landscapes(bars, nodes, 1)[:, 0], axis=1),
        "silhouette": root_step * np.linalg.norm(silhouettes(bars, nodes, 1.0), axis=1),
        "heat": _heat_norms(bars, heat_sigma),
    }


def _betti_norms(bars: Bars) -> Array:
    """Root of the integral of the squared Betti curve, a step function."""
    times = np.concatenate([bars.births, bars.deaths])
    owner = np.concatenate([bars.owner, bars.owner])
    change = np.repeat([1.0, -1.0], len(bars.births))
    order = np.lexsort((times, owner))
    alive = change[order].cumsum()[:-1]  # 0 again after each stock's last death, so the gap to the next one adds none
    squares = alive**2 * np.diff(times[order])
    return np.sqrt(np.bincount(owner[order][:-1], squares, minlength=bars.n_stocks))


def _heat_norms(bars: Bars, sigma: float) -> Array:
    """Norm of sum_p G(x - p) - G(x - p'), p = (b, d), p' = (d, b), G a Gaussian of covariance sigma^2.

    Its square is 2 sum_pq (exp(-|p - q|^2 / 4 sigma^2) - exp(-|p - q'|^2 / 4 sigma^2)) / (4 pi sigma^2), since the
    product of two such Gaussians integrates to that of covariance 2 sigma^2. Twice the kernel of J. Reininghaus et
    al., CVPR (2015), which is over half the plane.
    """
    births, deaths = bars.padded(bars.births), bars.padded(bars.deaths)
    valid = bars.padded(np.ones(len(bars.births)))
    squares = np.zeros(bars.n_stocks)
    step = max(1, _CHUNK_ENTRIES // max(1, births.shape[1] ** 2))
    for first in range(0, bars.n_stocks, step):
        b, d, some = (table[first : first + step] for table in (births, deaths, valid))
        across = (b[:, :, None] - b[:, None, :]) ** 2 + (d[:, :, None] - d[:, None, :]) ** 2
        mirrored = (b[:, :, None] - d[:, None, :]) ** 2 + (d[:, :, None] - b[:, None, :]) ** 2
        kernel = np.exp(-across / (4 * sigma**2)) - np.exp(-mirrored / (4 * sigma**2))
        squares[first : first + step] = np.einsum("ai,aij,aj->a", some, kernel, some)
    return np.sqrt(squares / (2 * np.pi)) / sigma


def lifetime_statistics(bars: Bars) -> dict[str, Array]:
    """Sum, maximum, mean, standard deviation and quartiles of the lifetimes; birth and death of the longest bar."""
    lifetimes, counts = bars.lifetimes, bars.counts
    total, longest = bars.total(lifetimes), bars.largest(lifetimes)
    mean = bars.ratio(total, counts)
    variance = bars.ratio(bars.total((lifetimes - mean[bars.owner]) ** 2), counts)
    ordered = bars.padded(lifetimes[np.lexsort((lifetimes, bars.owner))])
    if not ordered.shape[1]:
        ordered = np.zeros((bars.n_stocks, 1))
    quartiles = {}
    for name, share in (("q25", 0.25), ("q50", 0.5), ("q75", 0.75)):
        place = np.maximum(counts - 1, 0) * share
        below = np.floor(place).astype(np.int64)
        rows = np.arange(bars.n_stocks)
        above = ordered[rows, np.minimum(below + 1, np.maximum(counts - 1, 0))]
        quartiles[name] = ordered[rows, below] + (place - below) * (above - ordered[rows, below])
    is_longest = lifetimes == longest[bars.owner]
    # of several equally long the first born
    birth = bars.least(np.where(is_longest, bars.births, np.inf))
    return {
        "sum": total,
        "max": longest,
        "mean": mean,
        "std": np.sqrt(variance),
        **quartiles,
        "longest_birth": birth,
        "longest_death": birth + longest,
    }


def stable_ranks(bars: Bars, thresholds: Array) -> Array:
    """Number of bars of lifetime at least each threshold ``(n,)``: ``(A, n)``.

    Source: W. Chacholski and M. Riihimaki, SIAM J. Applied Algebra and Geometry 4 (2020), standard contour.
    """
    return bars.total((bars.lifetimes[:, None] >= thresholds).astype(np.float64))


def polynomial_coefficients(bars: Bars, n_coefficients: int) -> Array:
    """Leading coefficients of prod(z - r) with r = (b + i d) l / (sqrt(2) |(b, d)|): ``(A, 2 n)``, real, imaginary.

    By Newton's identities from the power sums of the roots, so that degrees may differ between stocks.
    Source: B. Di Fabio and M. Ferri, ICIAP (2015), transformation S.
    """
    norms = np.hypot(bars.births, bars.deaths)
    roots = (bars.births + 1j * bars.deaths) * bars.lifetimes / (np.sqrt(2) * norms)
    power = bars.total(np.stack([roots**k for k in range(1, n_coefficients + 1)], axis=1))  # (A, n) complex
    symmetric = [np.ones(bars.n_stocks, np.complex128)]
    for k in range(1, n_coefficients + 1):
        terms = [(-1) ** (i - 1) * symmetric[k - i] * power[:, i - 1] for i in range(1, k + 1)]
        symmetric.append(sum(terms[1:], terms[0]) / k)
    leading = np.stack([(-1) ** k * symmetric[k] for k in range(1, n_coefficients + 1)], axis=1)
    return np.stack([leading.real, leading.imag], axis=2).reshape(bars.n_stocks, -1)
