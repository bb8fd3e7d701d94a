import numpy as np
import pytest
import torch

from lightning_modules.ranking import (
    decode_keys,
    order_keys,
    top_k_candidates,
    top_k_items,
    top_k_scores,
)


def slow_top_k(scores, k, seen):
    """Sort every row in plain Python by (-score, id)."""
    out_scores, out_ids = [], []
    for row, left_out in zip(scores.tolist(), seen, strict=True):
        places = sorted((-s, j) for j, s in enumerate(row) if j not in left_out and s != -np.inf)[:k]
        filler = k - len(places)
        out_scores.append([-s + 0.0 for s, _ in places] + [-np.inf] * filler)
        out_ids.append([j for _, j in places] + [-1] * filler)
    return torch.tensor(out_scores, dtype=torch.float32), torch.tensor(out_ids)


def csr(lists):
    flat = torch.tensor([j for row in lists for j in row], dtype=torch.int64)
    offsets = torch.tensor(np.concatenate([[0], np.cumsum([len(row) for row in lists])]), dtype=torch.int64)
    return {"seen_items": flat, "seen_offsets": offsets}


def small_integers(*shape, seed):
    """Products of such vectors are exact in float32 and full of ties."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 500, 1000, None])
@pytest.mark.parametrize("k", [1, 10, 100])
def test_items_equal_a_full_sort_at_any_chunk_size(chunk_size, k):
    states, table = small_integers(9, 3, seed=0), small_integers(500, 3, seed=1)
    seen = [[], [0], [3, 3, 499], list(range(500)), list(range(490)), [7], [], [250, 1, 250], [499]]
    scores, ids = top_k_items(states, table, k, **csr(seen), chunk_size=chunk_size)
    expected_scores, expected_ids = slow_top_k(states @ table.T, k, seen)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(scores, expected_scores)
    assert scores.dtype == torch.float32
    assert ids.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_ranks_alike(dtype):
    """As trainers have it that compute in it."""
    states, table = small_integers(6, 4, seed=2), small_integers(83, 4, seed=3)
    expected = top_k_items(states, table, 20)
    torch.set_default_dtype(dtype)
    found = top_k_items(states.to(dtype), table.to(dtype), 20)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_three_entry_points_agree():
    states, table = small_integers(6, 4, seed=2), small_integers(83, 4, seed=3)
    dense = states @ table.T
    expected = top_k_items(states, table, 20, chunk_size=11)
    shuffle = torch.stack([torch.randperm(83, generator=torch.Generator().manual_seed(row)) for row in range(6)])
    for found in (top_k_scores(dense, 20), top_k_candidates(dense.gather(1, shuffle), shuffle, 20)):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_negative_zero_ties_with_zero():
    scores, ids = top_k_scores(torch.tensor([[-0.0, 0.0, -0.0, 0.0]]), 3)
    assert ids.tolist() == [[0, 1, 2]]
    assert not torch.signbit(scores).any()


def test_more_places_than_items_and_no_users():
    scores, ids = top_k_items(torch.ones(2, 1), torch.tensor([[1.0], [2.0]]), 4)
    assert ids.tolist() == [[1, 0, -1, -1]] * 2
    assert scores.tolist() == [[2.0, 1.0, -np.inf, -np.inf]] * 2
    scores, ids = top_k_items(torch.ones(0, 1), torch.ones(5, 1), 3, **csr([]))
    assert scores.shape == ids.shape == (0, 3)


def test_minus_infinity_is_no_candidate_and_plus_infinity_comes_first():
    _, ids = top_k_scores(torch.tensor([[-np.inf, 1.0, np.inf, -3e38]]), 4)
    assert ids.tolist() == [[2, 1, 3, -1]]
    scores, ids = top_k_candidates(torch.tensor([[-np.inf, 1.0, -np.inf]]), torch.tensor([[0, 4, 2]]), 2)
    assert ids.tolist() == [[4, -1]]
    assert scores.tolist() == [[1.0, -np.inf]]


def test_input_scores_are_left_as_they_were():
    dense = small_integers(2, 5, seed=4)
    before = dense.clone()
    top_k_scores(dense, 2, **csr([[0, 1], [2]]))
    assert torch.equal(dense, before)


def test_keys_round_trip_over_the_float_range():
    tiny = float(np.finfo(np.float32).smallest_subnormal)
    scores = torch.tensor([-3.4e38, -1.5, -tiny, 0.0, tiny, 1.5, 3.4e38, np.inf])
    ids = torch.tensor([0, 1, 2**31, 5, 2**32 - 1, 7, 2**31 - 1, 3])
    keys = order_keys(scores, ids)
    assert (keys.diff() > 0).all()
    back = decode_keys(keys)
    assert torch.equal(back[0], scores)
    assert torch.equal(back[1], ids)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_scored_in_float32_also_under_autocast(dtype):
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(4, 32, generator=generator).to(dtype)
    table = torch.randn(200, 32, generator=generator).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, ids = top_k_items(states, table, 200)
    exact = states.double() @ table.double().T
    # float32 dot products of width 32 with |terms| < 16 are off by less than 32 * 16 * 2^-24 = 3.1e-5;
    # a bfloat16 product would be off by about 1e-2
    torch.testing.assert_close(scores.double(), exact.gather(1, ids), atol=4e-5, rtol=0)


def test_float64_is_multiplied_in_float64():
    # the sum is 0 in float32 and 1e-9 in float64
    states = torch.tensor([[1.0, 1e-9, -1.0]], dtype=torch.float64)
    scores, _ = top_k_items(states, torch.ones(1, 3, dtype=torch.float64), 1)
    # 1 + 1e-9 - 1 keeps 1e-9 to within 2^-53
    assert scores.item() == pytest.approx(1e-9, abs=2**-52)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"table": torch.ones(5, 2)}, r"states and table must be .* got \(2, 3\) and \(5, 2\)"),
        ({"states": torch.tensor([[0.0] * 3, [np.nan] * 3])}, "must not be NaN, got NaN at row 1, column 0"),
        (csr([[0], [5]]), r"seen_items must lie in 0\.\.4, got 0\.\.5"),
        (csr([[0], [-1]]), r"seen_items must lie in 0\.\.4, got -1\.\.0"),
        (csr([[0]]), r"seen_offsets \(3,\), got \(1,\) and \(2,\)"),
        ({"seen_items": torch.tensor([1])}, "must be given together"),
        (
            {"seen_items": torch.tensor([1]), "seen_offsets": torch.tensor([0, 2, 1])},
            "must rise from 0 to 1",
        ),
    ],
)
def test_bad_input_ends_in_one_line(change, message):
    arguments = {"states": torch.ones(2, 3), "table": torch.ones(5, 3), "k": 2} | change
    with pytest.raises(ValueError, match=message) as caught:
        top_k_items(**arguments)
    assert "\n" not in str(caught.value)


def test_nan_is_placed_by_its_catalogue_column():
    scores = torch.zeros(2, 9)
    scores[1, 7] = np.nan
    with pytest.raises(ValueError, match="row 1, column 7"):
        top_k_scores(scores, 2, chunk_size=4)
    with pytest.raises(ValueError, match="one shape"):
        top_k_candidates(torch.zeros(1, 2), torch.zeros(1, 3, dtype=torch.int64), 1)
