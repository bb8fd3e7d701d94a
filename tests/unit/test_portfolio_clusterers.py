"""Clusterers: they find what is plain to see, number clusters by size, and refuse what cannot be clustered."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import adjusted_rand_score

from lightning_modules.portfolio.clusterers import (
    DTWKMeansClusters,
    KMeansClusters,
    KShapeClusters,
    PermutedClusters,
    RandomClusters,
    SectorClusters,
    SpectralClusters,
    Stocks,
    WardClusters,
    by_size,
    standardised,
)


@pytest.fixture
def three_groups():
    """Groups of 30, 20 and 10 stocks, far apart in the embedding; series of three shapes."""
    generator = np.random.default_rng(3)
    groups = np.repeat([2, 0, 1], [10, 30, 20])
    centres = 20 * np.eye(3)[groups]
    embedding = centres + generator.standard_normal((60, 3))
    days = np.arange(48)
    shapes = np.stack([np.sin(2 * np.pi * days / 8), np.sign(days - 24.0), days / 24 - 1])
    returns = shapes[groups].T * 0.01 + 0.0005 * generator.standard_normal((48, 60))
    return Stocks(standardised(embedding), returns, groups), groups


@pytest.mark.parametrize(
    "kind",
    [
        KMeansClusters,
        WardClusters,
        SpectralClusters,
        pytest.param(KShapeClusters, marks=pytest.mark.slow),  # numba compiles for a quarter of a minute
        DTWKMeansClusters,
    ],
)
def test_finds_what_is_plain_to_see(kind, three_groups):
    if kind in (KShapeClusters, DTWKMeansClusters):
        pytest.importorskip("tslearn", reason="this clusterer is of tslearn: seqlit[timeseries]")
    stocks, groups = three_groups
    labels = kind(n_clusters=3)(stocks)
    assert adjusted_rand_score(groups, labels) == 1
    assert np.bincount(labels).tolist() == sorted(np.bincount(labels), reverse=True)
    assert np.array_equal(labels, kind(n_clusters=3)(stocks)), "the same seed gives the same clusters"


def test_sectors_are_clusters_of_their_own():
    stocks = Stocks(np.zeros((6, 1)), np.zeros((9, 6)), np.array([4, -1, 2, 2, 2, -1]))
    assert SectorClusters()(stocks).tolist() == [1, -1, 0, 0, 0, -1], "no sector, no cluster"


def test_permuted_clusters_keep_sizes_and_those_in_none():
    labels = np.array([-1, 0, 0, 0, 1, 1, 2, -1, 0])  # of nine stocks, eight eligible, one of them in no cluster
    stocks = Stocks(np.zeros((8, 1)), np.zeros((9, 8)), np.full(8, -1), 1)
    drawn = [PermutedClusters(labels=[labels[:3], labels], seed=seed)(stocks) for seed in (0, 0, 1)]
    assert sorted(drawn[0]) == [-1, 0, 0, 0, 0, 1, 1, 2]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    with pytest.raises(ValueError, match="at most the 8 eligible stocks, got 9"):
        PermutedClusters(labels=[labels, np.zeros(9, int)])(stocks)


def test_random_clusters_are_a_function_of_seed_and_refit():
    def draw(seed, refit):
        return RandomClusters(n_clusters=4, seed=seed)(
            Stocks(np.zeros((90, 1)), np.zeros((3, 90)), np.zeros(90), refit)
        )

    assert np.array_equal(draw(1, 0), draw(1, 0))
    assert not np.array_equal(draw(1, 0), draw(1, 12))
    assert not np.array_equal(draw(1, 0), draw(2, 0))


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.int64, st.integers(1, 30), elements=st.integers(-3, 9)))
def test_renaming_keeps_the_partition_and_orders_by_size(labels):
    renamed = by_size(labels)
    assert adjusted_rand_score(labels, renamed) == 1
    counts = np.bincount(renamed)
    assert (np.diff(counts) <= 0).all()
    first = [int(np.flatnonzero(renamed == label)[0]) for label in range(len(counts))]
    ties = [first[i] < first[i + 1] for i in range(len(first) - 1) if counts[i] == counts[i + 1]]
    assert all(ties)


def test_standardised_columns_and_constant_ones():
    embedding = np.column_stack([[1.0, 2, 3, 6], np.full(4, 0.1 + 0.2), [1e-9, 2e-9, 3e-9, 4e-9]])
    result = standardised(embedding)
    np.testing.assert_allclose(result.mean(0), 0, atol=1e-12)  # rounding of four numbers
    np.testing.assert_allclose(result.std(0), [1, 0, 1], atol=1e-12)


def test_an_embedding_with_holes_is_refused_where_it_is():
    embedding = np.zeros((4, 3))
    embedding[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"finite numbers of shape \(stocks, D\), not so at \[2, 1\]"):
        standardised(embedding)


@pytest.mark.parametrize("kind", [KMeansClusters, WardClusters, SpectralClusters, RandomClusters])
def test_fewer_stocks_than_clusters_are_refused(kind):
    stocks = Stocks(np.zeros((4, 2)), np.zeros((9, 4)), np.zeros(4))
    with pytest.raises(ValueError, match="n_clusters must be at most the number of eligible stocks, 4, got 5"):
        kind(n_clusters=5)(stocks)
    with pytest.raises(ValueError, match="n_clusters must be at least 2, got 1"):
        kind(n_clusters=1)
