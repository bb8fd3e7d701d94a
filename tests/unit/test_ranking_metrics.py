import math

import numpy as np
import pytest
import torch
from torchmetrics import MetricCollection

from lightning_modules.metrics import (
    MAP,
    MRR,
    NDCG,
    Coverage,
    HitRate,
    Precision,
    Recall,
    Surprisal,
    per_user_metrics,
    relevance_hits,
)

CLASSES = {"ndcg": NDCG, "hit_rate": HitRate, "mrr": MRR, "recall": Recall, "precision": Precision, "map": MAP}
CUTOFFS = (1, 5, 10, 20)
# the same float64 sums of at most a few hundred terms in another order
CLOSE = {"rtol": 0, "atol": 1e-13}


def slow_user(ranking, relevant, k):
    """All six metrics of one user, item by item."""
    ranking, relevant = ranking[:k].tolist(), {j for j in relevant if j >= 0}
    gain = found = precisions = 0.0
    first = None
    for place, item in enumerate(ranking, start=1):
        if item >= 0 and item in relevant:
            found += 1
            gain += 1 / math.log2(place + 1)
            precisions += found / place
            first = first or place
    best = min(k, len(relevant))
    return {
        "ndcg": gain / sum(1 / math.log2(place + 1) for place in range(1, best + 1)),
        "hit_rate": float(found > 0),
        "mrr": 1 / first if first else 0.0,
        "recall": found / len(relevant),
        "precision": found / k,
        "map": precisions / best,
    }


def random_batch(n_users, seed, n_items=40, k_max=20, n_relevant=25):
    """Rankings with fillers at the end; 0 to ``n_relevant`` relevant items with fillers anywhere; histories."""
    random = np.random.default_rng(seed)
    top = np.stack([random.permutation(n_items)[:k_max] for _ in range(n_users)]).reshape(n_users, k_max)
    top[np.arange(k_max) >= random.integers(0, 2 * k_max, n_users)[:, None]] = -1
    relevant = np.stack([random.permutation(n_items)[:n_relevant] for _ in range(n_users)])
    relevant = relevant.reshape(n_users, n_relevant)
    relevant[random.random(relevant.shape) < random.choice([0.2, 0.9, 1.0], (n_users, 1))] = -1
    histories = [random.integers(0, n_items // 2, random.integers(0, 30)) for _ in range(n_users)]
    return top, relevant, histories


def csr(histories):
    offsets = np.concatenate([[0], np.cumsum([len(history) for history in histories])])
    flat = np.concatenate([*histories, np.zeros(0, dtype=np.int64)])
    return torch.tensor(flat, dtype=torch.int64), torch.tensor(offsets, dtype=torch.int64)


@pytest.mark.parametrize("k", CUTOFFS)
@pytest.mark.parametrize("name", sorted(CLASSES))
def test_class_and_function_equal_the_slow_reference(name, k):
    metric, expected = CLASSES[name](k), []
    for seed, n_users in enumerate([30, 1, 50]):
        top, relevant, _ = random_batch(n_users, seed)
        metric.update(torch.tensor(top), torch.tensor(relevant))
        values = per_user_metrics(torch.tensor(top), torch.tensor(relevant), [k])[f"{name}@{k}"]
        assert values.dtype == torch.float64
        slow = [slow_user(t, r, k)[name] if (r >= 0).any() else np.nan for t, r in zip(top, relevant, strict=True)]
        np.testing.assert_allclose(values.numpy(), slow, **CLOSE)
        expected += slow
    assert np.isnan(expected).sum() > 5
    assert metric.compute().item() == pytest.approx(np.nanmean(expected), rel=0, abs=1e-13)


def test_known_values():
    top, relevant = torch.tensor([[7, 3, 9, 1]]), torch.tensor([[9, 3, 5, -1]])
    values = {name: value.item() for name, value in per_user_metrics(top, relevant, [4]).items()}
    ideal = 1 + 1 / math.log2(3) + 1 / 2
    assert values == pytest.approx(
        {
            "ndcg@4": (1 / math.log2(3) + 1 / 2) / ideal,
            "hit_rate@4": 1.0,
            "mrr@4": 1 / 2,
            "recall@4": 2 / 3,
            "precision@4": 2 / 4,
            "map@4": (1 / 2 + 2 / 3) / 3,
        }
    )
    # a single relevant item at rank 3: 1 / log2(4)
    assert per_user_metrics(top, torch.tensor([[9]]), [4])["ndcg@4"].item() == 0.5


def test_perfect_ranking_scores_one_even_beyond_the_cutoff():
    top = torch.arange(20)[None]
    for n_relevant in (1, 5, 20, 30):
        values = per_user_metrics(top, torch.arange(n_relevant)[None].flip(1), [5])
        # a quotient of the same float64 sum taken in two ways
        assert values["ndcg@5"].item() == pytest.approx(1.0, abs=1e-15)
        assert values["map@5"].item() == pytest.approx(1.0, abs=1e-15)


def test_fillers_never_match_each_other():
    hits, n_relevant = relevance_hits(torch.tensor([[-1, -1]]), torch.tensor([[-1, 4]]))
    assert not hits.any()
    assert n_relevant.tolist() == [1]
    hits, n_relevant = relevance_hits(torch.tensor([[0, 1]]), torch.zeros(1, 0, dtype=torch.int64))
    assert not hits.any()
    assert n_relevant.tolist() == [0]


@pytest.mark.parametrize("k", [1, 10])
def test_coverage_and_surprisal_equal_the_slow_reference(k):
    coverage, surprisal = Coverage(k, 40), Surprisal(k, 40)
    recommended, holders, n_users = [], {}, 0
    for seed, size in enumerate([20, 7, 1]):
        top, _, histories = random_batch(size, seed + 10)
        for metric in (coverage, surprisal):
            metric.update(torch.tensor(top), *csr(histories))
        for ranking, history in zip(top, histories, strict=True):
            recommended += [item for item in ranking[:k].tolist() if item >= 0]
            n_users += 1
            for item in set(history.tolist()):
                holders[item] = holders.get(item, 0) + 1
    assert coverage.compute().item() == len(set(recommended) & set(holders)) / len(holders)
    surprises = [math.log2(n_users / holders.get(item, 1)) / math.log2(n_users) for item in recommended]
    assert surprisal.compute().item() == pytest.approx(np.mean(surprises), rel=0, abs=1e-13)
    assert any(item not in holders for item in recommended)


def test_catalogue_metrics_known_values_and_single_user():
    top = torch.tensor([[0, 1, 5], [0, 2, -1]])
    histories = torch.tensor([0, 0, 1, 0, 3]), torch.tensor([0, 3, 5])
    coverage, surprisal = Coverage(3, 6), Surprisal(3, 6)
    coverage.update(top, *histories)
    surprisal.update(top, *histories)
    assert coverage.compute().item() == pytest.approx(2 / 3)  # 0 and 1 of 0, 1, 3
    assert surprisal.compute().item() == pytest.approx((0 + 1 + 1 + 0 + 1) / 5)
    alone = Surprisal(3, 6)
    alone.update(top[:1], torch.tensor([0, 1]), torch.tensor([0, 2]))
    assert alone.compute().item() == pytest.approx(1 / 3)  # held items 0, the other 1


def test_a_collection_does_not_merge_metrics_that_start_equal():
    """Compute groups compare states after the first batch, which here is 0 for every metric."""
    kwargs = {f"{name}_{k}": kind(k) for name, kind in CLASSES.items() for k in (2, 3)}
    together = MetricCollection({**kwargs, "coverage": Coverage(3, 9), "surprisal": Surprisal(3, 9)})
    batches = [
        (torch.tensor([[1, 2, 3]]), torch.tensor([[8, -1]])),
        (torch.tensor([[1, 2, 3], [3, 2, 1]]), torch.tensor([[2, 3], [1, -1]])),
    ]
    history = {"history_items": torch.tensor([4]), "history_offsets": torch.tensor([0, 1, 1])}
    for top, relevant in batches:
        history_of_batch = history | {"history_offsets": history["history_offsets"][: len(top) + 1]}
        together.update(top_ids=top, relevant=relevant, **history_of_batch)
    found = together.compute()
    for name, kind in CLASSES.items():
        for k in (2, 3):
            alone = kind(k)
            for batch in batches:
                alone.update(*batch)
            assert found[f"{name}_{k}"] == alone.compute()
    assert found["coverage"] == 0
    assert found["surprisal"] == 1


def test_nothing_to_average_is_nan_and_reset_forgets():
    metric, catalogue = NDCG(2), Coverage(2, 5)
    metric.update(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 1, dtype=torch.int64))
    empty = torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    catalogue.update(torch.zeros(0, 2, dtype=torch.int64), *empty)
    assert metric.compute().isnan()
    assert catalogue.compute().isnan()
    metric.update(torch.tensor([[0, 1]]), torch.tensor([[0]]))
    assert metric.compute() == 1
    metric.reset()
    metric.update(torch.tensor([[0, 1]]), torch.tensor([[4]]))
    assert metric.compute() == 0


def test_sums_are_kept_in_float64():
    metric = MRR(3)
    ranking, relevant = torch.tensor([[5, 6, 7]]).repeat(1000, 1), torch.full((1000, 1), 7)
    for _ in range(20):
        metric.update(ranking, relevant)
    # 20,000 thirds: float32 sums would be off by about 1e-5
    assert metric.compute().item() == pytest.approx(1 / 3, rel=0, abs=1e-13)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NDCG(0), "k must be at least 1, got 0"),
        (lambda: Coverage(1, 0), "n_items must be at least 1, got 0"),
        (
            lambda: NDCG(5).update(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)),
            r"k=5 needs rankings of at least 5 places, got hits of shape \(1, 4\)",
        ),
        (
            lambda: NDCG(1).update(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)),
            r"got \(2, 4\) and \(1, 1\)",
        ),
        (
            lambda: Coverage(1, 5).update(torch.tensor([[5]]), torch.tensor([1]), torch.tensor([0, 1])),
            "top_ids must be below 5, the number of items, got 5",
        ),
        (
            lambda: Coverage(1, 5).update(torch.tensor([[1]]), torch.tensor([9]), torch.tensor([0, 1])),
            r"history_items must lie in 0\.\.4, got 9\.\.9",
        ),
        (
            lambda: Surprisal(1, 5).update(torch.tensor([[1]]), torch.tensor([1]), torch.tensor([0, 2])),
            "history_offsets must end at 1, the number of history items, got 2",
        ),
        (
            lambda: Surprisal(1, 5).update(torch.tensor([[1]]), torch.tensor([1]), torch.tensor([0])),
            r"history_offsets must be \(2,\) for 1 rankings, got \(1,\)",
        ),
    ],
)
def test_bad_input_ends_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
