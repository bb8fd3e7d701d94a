import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.ranking import top_k_candidates, top_k_items, top_k_scores


@st.composite
def cases(draw):
    """Scores from a handful of values, so that ties abound, with arbitrary seen lists, k and chunk size."""
    n_users, n_items = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    values = draw(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=4))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, len(values), (n_users, n_items), generator=generator)
    scores = torch.tensor(values, dtype=torch.float32)[picks]
    lengths = torch.randint(0, n_items + 3, (n_users,), generator=generator)
    seen_offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    seen_items = torch.randint(0, n_items, (int(lengths.sum()),), generator=generator)
    k, chunk_size = draw(st.integers(1, 50)), draw(st.none() | st.integers(1, 45))
    return scores, seen_items, seen_offsets, k, chunk_size


def stable_sort(scores, k, seen_items, seen_offsets):
    """Full stable sort of the negated scores: ids ascend among equals because columns do."""
    n_users = len(scores)
    left = torch.ones_like(scores, dtype=torch.bool)
    for row in range(n_users):
        left[row, seen_items[seen_offsets[row] : seen_offsets[row + 1]]] = False
    out_scores = torch.full((n_users, k), -torch.inf)
    out_ids = torch.full((n_users, k), -1)
    for row in range(n_users):
        order = torch.sort(-scores[row], stable=True).indices
        order = order[left[row, order]][:k]
        out_ids[row, : len(order)] = order
        out_scores[row, : len(order)] = scores[row, order]
    return out_scores, out_ids


@given(cases())
@settings(deadline=None, max_examples=150)
def test_dense_scores_equal_a_full_stable_sort(case):
    scores, seen_items, seen_offsets, k, chunk_size = case
    found = top_k_scores(scores, k, seen_items=seen_items, seen_offsets=seen_offsets, chunk_size=chunk_size)
    expected = stable_sort(scores, k, seen_items, seen_offsets)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])


@given(cases())
@settings(deadline=None, max_examples=100)
def test_table_and_candidates_equal_dense_scores(case):
    scores, seen_items, seen_offsets, k, chunk_size = case
    seen = {"seen_items": seen_items, "seen_offsets": seen_offsets}
    expected = top_k_scores(scores, k, **seen)
    # unit vectors as states: the product is the score itself, exactly
    by_table = top_k_items(torch.eye(len(scores)), scores.T, k, **seen, chunk_size=chunk_size)
    masked = scores.clone()
    rows = torch.repeat_interleave(torch.arange(len(scores)), seen_offsets.diff())
    masked[rows, seen_items] = -torch.inf
    shuffle = torch.randperm(scores.shape[1]).expand_as(scores)
    by_candidates = top_k_candidates(masked.gather(1, shuffle), shuffle, k)
    for found in (by_table, by_candidates):
        assert torch.equal(found[1], expected[1])
        assert torch.equal(found[0], expected[0])


@given(cases())
@settings(deadline=None, max_examples=100)
def test_places_are_unseen_distinct_and_filled_from_the_front(case):
    scores, seen_items, seen_offsets, k, chunk_size = case
    n_items = scores.shape[1]
    _, ids = top_k_scores(scores, k, seen_items=seen_items, seen_offsets=seen_offsets, chunk_size=chunk_size)
    for row, places in enumerate(ids.tolist()):
        seen = set(seen_items[seen_offsets[row] : seen_offsets[row + 1]].tolist())
        real = [item for item in places if item >= 0]
        assert len(real) == len(set(real)) == min(k, n_items - len(seen))
        assert not seen & set(real)
        assert places == real + [-1] * (k - len(real))
