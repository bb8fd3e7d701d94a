import math
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch

from lightning_modules import baselines
from lightning_modules.baselines import (
    ItemCovisitation,
    LastBasketMarkov,
    MostPopular,
    PersonalFrequency,
    fit_baselines,
)


@dataclass(frozen=True)
class Histories:
    items: np.ndarray
    baskets: np.ndarray
    offsets: np.ndarray
    users: np.ndarray


def histories_of(users):
    """``users`` is a list of users, each a list of baskets, each a list of items."""
    items = [j for user in users for basket in user for j in basket]
    baskets = [b for user in users for b, basket in enumerate(user) for _ in basket]
    lengths = [sum(len(basket) for basket in user) for user in users]
    return Histories(
        np.array(items, dtype=np.int32),
        np.array(baskets, dtype=np.int32),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.arange(len(users), dtype=np.int64),
    )


def ask(baseline, users, k, exclude_seen):
    query = histories_of(users)
    return baseline.recommend(query.items, query.baskets, query.offsets, k, exclude_seen)


def random_users(n_users, n_items, seed, longest=6):
    """Skewed items, repeats inside and across baskets, some empty histories."""
    random = np.random.default_rng(seed)
    return [
        [
            (n_items * random.random(random.integers(1, 5)) ** 2).astype(int).tolist()
            for _ in range(random.integers(0, longest))
        ]
        for _ in range(n_users)
    ]


def slow_scores(name, training, history):
    """Scores of one user as a dictionary, straight from the definitions."""
    scores = Counter()
    if name == "last_basket_markov" and history:
        moves = Counter()
        for user in training:
            for before, after in pairwise(user):
                moves.update((i, j) for i in set(before) for j in set(after))
        for i in set(history[-1]):
            leaving = sum(n for (first, _), n in moves.items() if first == i)
            for (first, j), n in moves.items():
                if first == i:
                    scores[j] += n / leaving
    elif name == "covisitation":
        sets = [{j for basket in user for j in basket} for user in training]
        for i in {j for basket in history for j in basket}:
            for j in set().union(*sets) - {i}:
                both = sum(i in held and j in held for held in sets)
                if both:
                    n_i, n_j = sum(i in held for held in sets), sum(j in held for held in sets)
                    scores[j] += both / math.sqrt(n_i * n_j)
    elif name == "personal_frequency":
        for b, basket in enumerate(history):
            for j in basket:
                # one more purchase outweighs any recency
                scores[j] = (math.floor(scores[j]) + 1) + b / 1000
    return scores


def slow_recommend(name, training, history, n_items, k, exclude_seen):
    popularity = Counter(j for user in training for basket in user for j in basket)
    scores = slow_scores(name, training, history)
    seen = {j for basket in history for j in basket} if exclude_seen else set()
    # nine digits: sums of the same fractions in another order are the same score
    places = sorted((-round(scores[j], 9), -popularity[j], j) for j in range(n_items) if j not in seen)
    return ([j for *_, j in places] + [-1] * k)[:k]


NAMES = ["most_popular", "last_basket_markov", "covisitation", "personal_frequency"]


# personal frequency has nothing to say without the user's own items
CASES = [(name, seen) for name in NAMES for seen in (True, False) if (name, seen) != ("personal_frequency", True)]


@pytest.mark.parametrize(("name", "exclude_seen"), CASES)
@pytest.mark.parametrize("k", [3, 30])
def test_equals_the_slow_reference(name, exclude_seen, k):
    n_items = 24  # the last few items never occur
    training = random_users(40, 20, seed=0)
    asked = random_users(60, 22, seed=1) + training[:20]
    baseline = fit_baselines(histories_of(training), n_items, repeats_allowed=True)[name]
    found = ask(baseline, asked, k, exclude_seen)
    assert found.dtype == torch.int64
    expected = [slow_recommend(name, training, user, n_items, k, exclude_seen) for user in asked]
    assert found.tolist() == expected


@pytest.mark.parametrize(("name", "exclude_seen"), CASES)
def test_item_by_item_every_event_is_a_basket(name, exclude_seen):
    training, asked = random_users(40, 20, seed=0), random_users(60, 22, seed=1)
    single = [[[[j] for basket in user for j in basket] for user in users] for users in (training, asked)]
    baseline = fit_baselines(histories_of(training), 24, repeats_allowed=True, item_by_item=True)[name]
    found = ask(baseline, asked, 10, exclude_seen)
    assert found.tolist() == [slow_recommend(name, single[0], user, 24, 10, exclude_seen) for user in single[1]]


@pytest.mark.parametrize("name", NAMES)
def test_chunks_do_not_matter(name, monkeypatch):
    training = random_users(30, 20, seed=2)
    baseline = fit_baselines(histories_of(training), 20, repeats_allowed=True)[name]
    whole = ask(baseline, training, 7, False)
    monkeypatch.setattr(baselines, "CHUNK_BYTES", 1)
    assert torch.equal(ask(baseline, training, 7, False), whole)


def test_most_popular_by_hand():
    baseline = MostPopular(histories_of([[[2, 2, 3]], [[3, 2]], [[0]]]), 5)  # events: 2 x3, 3 x2, 0 x1
    assert ask(baseline, [[], [[2]], [[0, 3, 2, 1, 4]]], 5, True).tolist() == [
        [2, 3, 0, 1, 4],
        [3, 0, 1, 4, -1],
        [-1] * 5,
    ]
    assert ask(baseline, [[[2]]], 2, False).tolist() == [[2, 3]]


def test_markov_by_hand():
    # from 0: to 1 twice, to 2 once; from 3: to 2 once; baskets of different users do not follow one another
    training = [[[0], [1], [4]], [[0], [1, 2]], [[3], [2]]]
    baseline = LastBasketMarkov(histories_of(training), 6)
    # {0}: 1 scores 2/3, 2 scores 1/3; {0, 3}: 2 scores 1/3 + 1 and passes 1
    assert ask(baseline, [[[3], [0]], [[0, 3]]], 2, False).tolist() == [[1, 2], [2, 1]]
    # 2 leads nowhere: popularity (0, 1 and 2 with two events each), then id
    assert ask(baseline, [[[2]]], 4, True).tolist() == [[0, 1, 3, 4]]


def test_covisitation_by_hand():
    # 1 is with 0 in both its histories, 2 in one of three: 2/sqrt(2*2) = 1 against 1/sqrt(2*3)
    training = [[[0], [1]], [[0, 1, 2]], [[2]], [[2, 3]]]
    baseline = ItemCovisitation(histories_of(training), 5)
    assert ask(baseline, [[[0, 0]]], 4, True).tolist() == [[1, 2, 3, 4]]
    # an item is no neighbour of itself: 0 then has no score and comes by popularity, after 1 and 2
    assert ask(baseline, [[[0]]], 3, False).tolist() == [[1, 2, 0]]


def test_an_item_met_only_by_itself_gets_no_score_from_rounding():
    """Weights of 1/sqrt(n) squared and summed n times are 1 only to rounding."""
    training = [[[1]]] * 49 + [[[0, 2]]] * 60
    baseline = ItemCovisitation(histories_of(training), 4)
    # 1 has no neighbour, so the popular 0 and 2 come before it, although rounding leaves it about 1e-16
    assert ask(baseline, [[[1]]], 3, False).tolist() == [[0, 2, 1]]


def test_personal_frequency_by_hand():
    baseline = PersonalFrequency(histories_of([[[4], [4], [0]]]), 6)
    history = [[1, 2, 5], [2, 3, 1], [5]]
    # 1, 2 and 5 twice each: 5 the latest, then 1 before 2 by id; 3 once; then popularity
    assert ask(baseline, [history, []], 6, False).tolist() == [[5, 1, 2, 3, 4, 0], [4, 0, 1, 2, 3, 5]]
    with pytest.raises(ValueError, match="exclude_seen must be False for personal_frequency"):
        ask(baseline, [history], 6, True)


def test_training_without_a_pair_of_baskets_and_no_users():
    for baseline in fit_baselines(histories_of([[[1]]]), 3, repeats_allowed=True).values():
        assert ask(baseline, [[[0]], []], 2, False).shape == (2, 2)
        assert ask(baseline, [], 2, False).shape == (0, 2)
        assert ask(baseline, [[]], 3, False).tolist() == [[1, 0, 2]]
    markov = LastBasketMarkov(histories_of([]), 3)
    assert ask(markov, [[[2]]], 3, True).tolist() == [[0, 1, -1]]


def test_tensors_are_taken_and_names_are_those_of_the_report():
    fitted = fit_baselines(histories_of([[[0], [1]]]), 2, repeats_allowed=False)
    assert list(fitted) == NAMES[:3]
    query = (torch.tensor([0]), torch.tensor([0]), torch.tensor([0, 1]))
    assert fitted["last_basket_markov"].recommend(*query, 1, True).tolist() == [[1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MostPopular(histories_of([[[0]]]), 0), "n_items must be at least 1, got 0"),
        (lambda: MostPopular(histories_of([[[3]]]), 3), r"items must lie in 0\.\.2, got 3\.\.3"),
        (
            lambda: ask(MostPopular(histories_of([[[0]]]), 3), [[[0]]], 0, True),
            "k must be at least 1, got 0",
        ),
        (
            lambda: MostPopular(histories_of([[[0]]]), 3).recommend([0], [0], [0, 2], 1, True),
            "offsets must run from 0 to 1, the number of history items",
        ),
        (
            lambda: MostPopular(histories_of([[[0]]]), 3).recommend([0, 1], [0], [0, 2], 1, True),
            r"items and baskets must both be \(M,\), got \(2,\) and \(1,\)",
        ),
        (
            lambda: MostPopular(histories_of([[[0]]]), 3).recommend([0], [0], [0, 2, 1], 1, True),
            "offsets must not decrease",
        ),
    ],
)
def test_bad_input_ends_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
