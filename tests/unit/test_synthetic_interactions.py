"""The planted chain: its matrix, its data, and what the best ranking reaches."""

import numpy as np
import polars as pl
import pytest

from datamodules.synthetic import best_ndcg, markov_interactions, markov_transitions

CHAIN = {"n_successors": 3, "decay": 0.4, "noise": 0.2}
V = 12


def indices(frame: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """(present, next) item numbers of all steps."""
    ordered = frame.sort("user_id", "timestamp")
    items = ordered["item_id"].str.slice(5).cast(pl.Int64).to_numpy()
    users = ordered["user_id"].to_numpy()
    inside = users[1:] == users[:-1]
    return items[:-1][inside], items[1:][inside]


def test_matrix_is_a_chain_with_uniform_stationary_distribution():
    matrix = markov_transitions(V, **CHAIN, seed=5)
    # sums of 12 doubles near 1
    np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=1e-14)
    np.testing.assert_allclose(matrix.sum(axis=0), 1, rtol=1e-14)
    rows = np.sort(matrix, axis=1)
    np.testing.assert_allclose(rows, rows[:1].repeat(V, axis=0), rtol=1e-14)
    weights = np.array([1, 0.4, 0.16]) / 1.56
    np.testing.assert_allclose(rows[0, :-4:-1], 0.8 * weights + 0.2 / V, rtol=1e-14)
    np.testing.assert_allclose(np.diag(matrix), 0.2 / V, rtol=1e-14)


def test_data_follow_the_matrix():
    frame = markov_interactions(3000, V, **CHAIN, seed=5)
    present, following = indices(frame)
    counts = np.zeros((V, V))
    np.add.at(counts, (present, following), 1)
    matrix = markov_transitions(V, **CHAIN, seed=5)
    expected = counts.sum(axis=1, keepdims=True) * matrix
    # 144 cells: beyond 5 standard deviations with probability below 1e-4
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()
    starts = frame.sort("user_id", "timestamp").group_by("user_id").first()["item_id"].value_counts()["count"]
    assert len(starts) == V
    assert starts.max() < 250 + 5 * 250**0.5


@pytest.mark.parametrize("k", [1, 2, 3, 5, 12, 40])
def test_best_ndcg_is_that_of_ranking_by_the_matrix(k):
    matrix = markov_transitions(V, **CHAIN, seed=5)
    discount = np.where(np.arange(V) < k, 1 / np.log2(np.arange(V) + 2), 0)
    order = np.argsort(-matrix, axis=1, kind="stable")
    exact = (np.take_along_axis(matrix, order, axis=1) * discount).sum(axis=1)
    # sums of 12 doubles
    np.testing.assert_allclose(best_ndcg(k, V, **CHAIN), exact, rtol=1e-13)

    present, following = indices(markov_interactions(3000, V, **CHAIN, seed=5))
    ranks = np.argsort(order, axis=1)[present, following]
    gains = discount[ranks]
    # mean of about 50,000 gains: 5 standard errors
    assert abs(gains.mean() - best_ndcg(k, V, **CHAIN)) < 5 * max(gains.std(), 1e-9) / len(gains) ** 0.5 + 1e-12


def test_no_other_ranking_is_better():
    matrix = markov_transitions(V, **CHAIN, seed=5)
    generator = np.random.default_rng(0)
    discount = np.where(np.arange(V) < 3, 1 / np.log2(np.arange(V) + 2), 0)
    for _ in range(100):
        order = np.argsort(-matrix * generator.random(matrix.shape), axis=1)
        found = (np.take_along_axis(matrix, order, axis=1) * discount).sum(axis=1).mean()
        assert found < best_ndcg(3, V, **CHAIN)


def test_frame_is_sorted_seeded_and_free_of_ties(tmp_path):
    frame = markov_interactions(50, 200, mean_length=5, seed=1, n_days=3)
    assert frame.schema == {"user_id": pl.Int64, "item_id": pl.String, "timestamp": pl.Datetime("us")}
    assert frame["timestamp"].is_sorted()
    assert not frame.select("user_id", "timestamp").is_duplicated().any()
    lengths = frame.group_by("user_id").len()["len"]
    assert len(lengths) == 50
    assert (lengths.min(), lengths.max()) == (3, 7)
    assert frame["timestamp"].min() >= pl.Series(["2024-01-01"]).str.to_datetime()[0]
    assert frame["timestamp"].max() < pl.Series(["2024-01-04"]).str.to_datetime()[0]
    assert set(frame["item_id"]) <= {f"item-{k:03d}" for k in range(200)}
    assert frame.equals(markov_interactions(50, 200, mean_length=5, seed=1, n_days=3))
    assert not frame.equals(markov_interactions(50, 200, mean_length=5, seed=2, n_days=3))
    frame.write_parquet(tmp_path / "rows.parquet")
    assert pl.read_parquet(tmp_path / "rows.parquet").equals(frame)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: markov_interactions(0, 9), "n_users must be at least 1, got 0"),
        (lambda: markov_interactions(1, 9, mean_length=2), "mean_length must be at least 3, got 2"),
        (lambda: markov_interactions(1, 9, n_days=0), "n_days must be at least 1, got 0"),
        (lambda: markov_interactions(1, 4), "n_items must exceed n_successors 4, got 4"),
        (lambda: markov_transitions(9, n_successors=0), "n_successors must be at least 1, got 0"),
        (lambda: markov_transitions(9, decay=0.0), r"decay must be in \(0, 1\], got 0.0"),
        (lambda: best_ndcg(10, 9, noise=1.5), r"noise must be in \[0, 1\], got 1.5"),
        (lambda: best_ndcg(0, 9), "k must be at least 1, got 0"),
    ],
)
def test_arguments_outside_their_range(call, said):
    with pytest.raises(ValueError, match=said):
        call()
