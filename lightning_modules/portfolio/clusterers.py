"""From representations to clusters. Labels are 0, 1, ... by falling size, ties by the lowest stock.

A stocks, T days, D width. A clusterer is called with the columns of the embedding standardised over stocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lightning_modules.portfolio.market import Array

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Stocks:
    """What there is to cluster by.

    Attributes:
        embedding: ``(A, D) float64``, columns standardised.
        returns: ``(T, A) float64`` of the train window, finite.
        sectors: ``(A,) int64``, -1 where unknown.
        refit: Number of the rebalance at which they are clustered.
    """

    embedding: Array
    returns: Array
    sectors: Labels
    refit: int = 0


class Clusterer(Protocol):
    """Anything that gives each stock a label.

    Attributes:
        name: For tables.
        reads_embedding: Whether the representation matters to it.
    """

    name: str
    reads_embedding: bool

    def __call__(self, stocks: Stocks) -> Labels:
        """Labels ``(A,)`` from 0; -1 for a stock in no cluster, of which none is picked."""


def standardised(embedding: Array) -> Array:
    """Columns with mean 0 and standard deviation 1 over stocks; constant columns become 0.

    Raises:
        ValueError: If a value is not finite.
    """
    if embedding.ndim != 2 or not np.isfinite(embedding).all():
        bad = np.argwhere(~np.isfinite(embedding))[0].tolist() if embedding.ndim == 2 else embedding.shape
        raise ValueError(f"representation must be finite numbers of shape (stocks, D), not so at {bad}")
    centred = embedding - embedding.mean(0)
    spread = centred.std(0)
    constant = spread <= 1e-12 * np.abs(embedding).max(0, initial=0)
    return np.divide(centred, spread, out=np.zeros_like(centred), where=~constant)


def by_size(labels: NDArray[Any]) -> Labels:
    """Rename labels 0, 1, ... by falling size, ties by the first stock of the cluster."""
    _, first, inverse, counts = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -counts))
    return np.argsort(order)[inverse].astype(np.int64)


def _check(n_clusters: int, n_stocks: int) -> None:
    if n_clusters > n_stocks:
        raise ValueError(f"n_clusters must be at most the number of eligible stocks, {n_stocks}, got {n_clusters}")


class _Clusters:
    """A fixed number of clusters.

    Args:
        n_clusters: At least 2.
    """

    name = "clusters"
    reads_embedding = True

    def __init__(self, *, n_clusters: int = 11) -> None:
        if n_clusters < 2:
            raise ValueError(f"n_clusters must be at least 2, got {n_clusters}")
        self.n_clusters = n_clusters

    def __call__(self, stocks: Stocks) -> Labels:
        """Labels ``(A,)``.

        Raises:
            ValueError: If there are fewer stocks than clusters.
        """
        _check(self.n_clusters, len(stocks.embedding))
        return by_size(self._labels(stocks))

    def _labels(self, stocks: Stocks) -> NDArray[Any]:
        raise TypeError(f"{type(self).__name__} does not say how to cluster")


class KMeansClusters(_Clusters):
    """KMeans of scikit-learn on the embedding.

    Args:
        n_clusters: At least 2; published 11.
        seed: Of the starts; published 42.
        n_starts: Restarts, of which the best is kept.
    """

    name = "k-means"

    def __init__(self, *, n_clusters: int = 11, seed: int = 42, n_starts: int = 10) -> None:
        super().__init__(n_clusters=n_clusters)
        self.seed = seed
        self.n_starts = n_starts

    def _labels(self, stocks: Stocks) -> NDArray[Any]:
        from sklearn.cluster import KMeans

        return KMeans(self.n_clusters, n_init=self.n_starts, random_state=self.seed).fit_predict(stocks.embedding)


class WardClusters(_Clusters):
    """Agglomerative clustering with Ward's criterion, of scikit-learn, on the embedding."""

    name = "ward"

    def _labels(self, stocks: Stocks) -> NDArray[Any]:
        from sklearn.cluster import AgglomerativeClustering

        return AgglomerativeClustering(self.n_clusters, linkage="ward").fit_predict(stocks.embedding)


class SpectralClusters(_Clusters):
    """Spectral clustering of scikit-learn on the graph of nearest neighbours in the embedding.

    Args:
        n_clusters: At least 2.
        n_neighbors: Of the graph; at most A - 1 are taken.
        seed: Of the eigenvectors' start and of the labels.
    """

    name = "spectral"

    def __init__(self, *, n_clusters: int = 11, n_neighbors: int = 10, seed: int = 42) -> None:
        super().__init__(n_clusters=n_clusters)
        self.n_neighbors = n_neighbors
        self.seed = seed

    def _labels(self, stocks: Stocks) -> NDArray[Any]:
        from sklearn.cluster import SpectralClustering
        from sklearn.neighbors import kneighbors_graph

        embedding = stocks.embedding
        graph = kneighbors_graph(embedding, min(self.n_neighbors, len(embedding) - 1), include_self=False)
        affinity = (0.5 * (graph + graph.T)).toarray()
        # A graph in several parts has no unique eigenvectors: join the parts by edges that weigh next to nothing.
        affinity += 1e-6
        model = SpectralClustering(self.n_clusters, affinity="precomputed", random_state=self.seed)
        return model.fit_predict(affinity)


class _SeriesClusters(_Clusters):
    """Clusters of the z-scored return series themselves by tslearn; the embedding is not read.

    Not through sktime: its adapter (1.2) hands tslearn (instances, channels, days), which tslearn reads as series of
    one day, so that KShape finds nothing and DTW is Euclidean.
    """

    reads_embedding = False

    def __init__(self, *, n_clusters: int = 11, seed: int = 42) -> None:
        super().__init__(n_clusters=n_clusters)
        self.seed = seed

    def _model(self) -> Any:
        raise TypeError(f"{type(self).__name__} names no model")

    def _labels(self, stocks: Stocks) -> NDArray[Any]:
        return self._model().fit_predict(standardised(stocks.returns).T[:, :, None])  # (stocks, days, 1)


class KShapeClusters(_SeriesClusters):
    """KShape (Paparrizos & Gravano 2015) of tslearn, the best of three starts.

    Args:
        n_clusters: At least 2.
        seed: Of the starts.
    """

    name = "k-shape"

    def _model(self) -> Any:
        from tslearn.clustering import KShape

        return KShape(self.n_clusters, n_init=3, random_state=self.seed)


class DTWKMeansClusters(_SeriesClusters):
    """KMeans under dynamic time warping with barycentres, of tslearn; slow on many days.

    Args:
        n_clusters: At least 2.
        seed: Of the start.
    """

    name = "dtw k-means"

    def _model(self) -> Any:
        from tslearn.clustering import TimeSeriesKMeans

        return TimeSeriesKMeans(self.n_clusters, metric="dtw", max_iter=10, random_state=self.seed)


class RandomClusters(_Clusters):
    """Each stock in a cluster by lot, sizes about equal: what clusters that know nothing earn.

    Clusters of uneven sizes are to be compared with :class:`PermutedClusters`: picking two of a cluster of one and two
    of a cluster of half the market is another rule than picking two of each eleventh.

    Args:
        n_clusters: At least 2.
        seed: Of the draw.
    """

    name = "random clusters"
    reads_embedding = False

    def __init__(self, *, n_clusters: int = 11, seed: int = 0) -> None:
        super().__init__(n_clusters=n_clusters)
        self.seed = seed

    def _labels(self, stocks: Stocks) -> NDArray[Any]:
        # Every refit of a walk draws anew, and the same again when the walk is repeated.
        return np.random.default_rng([self.seed, stocks.refit]).integers(self.n_clusters, size=len(stocks.embedding))


class PermutedClusters:
    """The clusters of a walk, stocks exchanged by lot at each refit: sizes are kept, contents are not.

    Args:
        labels: By number of the rebalance, ``(A,)`` clusters that were held, -1 for stocks in none.
        seed: Of the draws.
    """

    name = "permuted clusters"
    reads_embedding = False

    def __init__(self, *, labels: Sequence[Labels], seed: int = 0) -> None:
        self.labels = labels
        self.seed = seed

    def __call__(self, stocks: Stocks) -> Labels:
        """Labels ``(A,)``.

        Raises:
            ValueError: If more stocks were in clusters at this rebalance than are eligible.
        """
        held, n_stocks = self.labels[stocks.refit], len(stocks.embedding)
        held = held[held >= 0]
        if len(held) > n_stocks:
            raise ValueError(f"labels must be of at most the {n_stocks} eligible stocks, got {len(held)}")
        padded = np.concatenate([held, np.full(n_stocks - len(held), -1)])
        return np.random.default_rng([self.seed, stocks.refit]).permutation(padded)


class SectorClusters:
    """The economic sectors as clusters; stocks of unknown sector are in none, -1.

    Sectors are usually listed later than the test: that a stock has one then tells that it was still there.
    """

    name = "sectors"
    reads_embedding = False

    def __call__(self, stocks: Stocks) -> Labels:
        """Labels ``(A,)``.

        Raises:
            ValueError: If no sector is known.
        """
        known = stocks.sectors >= 0
        if not known.any():
            raise ValueError("SectorClusters needs sectors (data.init_args.sectors_path), none is known")
        labels = np.full(len(known), -1)
        labels[known] = by_size(stocks.sectors[known])
        return labels
