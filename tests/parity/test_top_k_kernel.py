"""The fused top-k against the chunked path, and against float64 within the bound it states."""

import pytest
import torch

from kernels import top_k
from lightning_modules import ranking
from lightning_modules.ranking import top_k_items

pytest.importorskip("triton", reason="triton is not installed")
from kernels.top_k import triton_top_k

# The interpreter of triton 3.6 makes numbers of arrays of one element.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def small_integers(*shape, seed=0, dtype=torch.float32):
    """Products of such vectors are exact in every precision, and full of ties."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def csr(lists):
    offsets = torch.tensor([0, *map(len, lists)]).cumsum(0)
    items = torch.tensor([item for row in lists for item in row], dtype=torch.int64)
    return {"seen_items": items.to(DEVICE), "seen_offsets": offsets.to(DEVICE)}


def random_lists(n_users, n_items, seed=0):
    """Lists of very different lengths, in no order and with repeats; some are empty."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, n_items + 2, (n_users,), generator=generator) * torch.randint(
        0, 2, (n_users,), generator=generator
    )
    return [torch.randint(0, n_items, (n,), generator=generator).tolist() for n in lengths.tolist()]


def assert_same(states, table, k, **seen):
    found = top_k_items(states, table, k, **seen, impl="triton")
    expected = top_k_items(states, table, k, **seen, impl="torch")
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])
    assert [tensor.dtype for tensor in found] == [torch.float32, torch.int64]
    return found


def assert_within_bound(states, table, k, **seen):
    """Scores within the stated bound of float64, and ids those of float64 unless exact scores are as close as that."""
    scores, ids = top_k_items(states, table, k, **seen, impl="triton")
    e, c = states.double(), table.double()
    exact_scores, exact_ids = top_k_items(e, c, k, **seen)
    bound = (e.shape[1] + 2) * 2**-23 * (e.abs() @ c.abs().T)
    kept = (ids >= 0).cpu()
    assert torch.equal(kept, (exact_ids >= 0).cpu())
    exact, places = e @ c.T, ids.clamp(0)
    wide_scores = exact.gather(1, places)
    off = (scores.double() - wide_scores).abs()[kept]
    assert (off <= bound.gather(1, places)[kept]).all()
    # float32 keeps 2^-24 of the float64 scores that the chunked path returns
    slack = 2 * bound.amax(1, keepdim=True) + 2**-23 * exact_scores.abs().double()
    swapped = (ids != exact_ids) & (ids >= 0)
    assert ((wide_scores - exact_scores.double()).abs() <= slack)[swapped].all()
    assert (scores.diff() <= 0)[kept[:, 1:]].all()
    return swapped


@pytest.mark.parametrize(
    ("n_users", "n_items", "width", "k"),
    [(1, 1, 1, 1), (2, 3, 1, 33), (3, 40, 7, 5), (17, 70, 50, 1), (2, 700, 100, 33), (1, 300, 257, 128)],
)
def test_equals_the_chunked_path_where_products_are_exact(n_users, n_items, width, k):
    states, table = small_integers(n_users, width, seed=1), small_integers(n_items, width, seed=2)
    assert_same(states, table, k, **csr(random_lists(n_users, n_items, seed=k)))


def test_a_thousand_places_over_several_flushes():
    assert_same(small_integers(1, 7, seed=1), small_integers(3000, 7, seed=2), 1000, **csr([list(range(50, 2000, 7))]))
    assert_same(small_integers(1, 7, seed=1), small_integers(700, 7, seed=2), 1024)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [7, 100])
def test_scores_are_within_the_stated_bound(dtype, width):
    states, table = normal(2, width, dtype=dtype), normal(300, width, seed=1, dtype=dtype)
    swapped = assert_within_bound(states, table, 33, **csr(random_lists(2, 300)))
    if DEVICE == "cpu":
        assert not swapped.any()  # with these seeds no two exact scores are that close


def test_operands_of_two_dtypes_are_multiplied_in_float32():
    assert_within_bound(normal(2, 20, dtype=torch.bfloat16), normal(200, 20, seed=1), 10)


def test_equal_scores_come_in_id_order_whatever_the_split():
    _, ids = assert_same(torch.ones(2, 5, device=DEVICE), torch.ones(2000, 5, device=DEVICE), 40)
    assert ids.tolist() == [list(range(40))] * 2
    _, ids = assert_same(torch.zeros(1, 0, device=DEVICE), torch.zeros(70, 0, device=DEVICE), 3)
    assert ids.tolist() == [[0, 1, 2]]


def test_negative_zero_ties_with_zero():
    """Products that underflow are negative zeros under a fused multiply-add."""
    table = torch.tensor([-1e-30, 1e-30, 0.0, -1e-30], device=DEVICE)[:, None].expand(4, 16)
    scores, ids = assert_same(torch.full((1, 16), 1e-30, device=DEVICE), table, 3)
    assert ids.tolist() == [[0, 1, 2]]
    assert not torch.signbit(scores).any()


@pytest.mark.parametrize("sign", [1, -1])
def test_items_in_order_of_their_scores(sign):
    """Rising scores pass the floor every time, falling ones never do."""
    table = torch.arange(900.0, device=DEVICE)[:, None] * sign
    assert_same(torch.ones(1, 1, device=DEVICE), table, 5, **csr([list(range(880, 900))]))


def test_the_last_place_stays_open_after_a_flush():
    """Rising scores flush the lists; an item between the places k - 1 and k comes late."""
    table = torch.arange(-300.0, 0.0, device=DEVICE)[:, None]
    table[0], table[1], table[250] = 10, 9, 5
    _, ids = assert_same(torch.ones(1, 1, device=DEVICE), table, 3)
    assert ids.tolist() == [[0, 1, 250]]


def test_seen_lists_that_leave_few_or_none():
    lists = [list(range(300)), [], list(range(297)), [5] * 400, [299, 0, 299]]
    _, ids = assert_same(small_integers(5, 3, seed=1), small_integers(300, 3, seed=2), 6, **csr(lists))
    assert ids[0].tolist() == [-1] * 6
    assert ids[2, 3:].tolist() == [-1] * 3


def test_infinities():
    table = small_integers(200, 2, seed=1)
    table[::3, 0] = -torch.inf
    table[7, 0] = torch.inf
    _, ids = assert_same(torch.tensor([[1.0, 1.0], [2.0, -1.0]], device=DEVICE), table, 150)
    assert ids[:, 0].tolist() == [7, 7]
    assert (ids[:, -1] == -1).all()


def test_no_users_and_no_items():
    scores, ids = top_k_items(torch.ones(0, 3, device=DEVICE), torch.ones(5, 3, device=DEVICE), 2, impl="triton")
    assert scores.shape == ids.shape == (0, 2)
    scores, ids = top_k_items(torch.ones(2, 3, device=DEVICE), torch.ones(0, 3, device=DEVICE), 2, impl="triton")
    assert ids.tolist() == [[-1, -1]] * 2
    assert (scores == -torch.inf).all()


def test_strides_and_nothing_beside_a_slice_is_read():
    wide = torch.full((140, 40), torch.nan, device=DEVICE)
    table = wide[20:120, 3:33]
    table.copy_(small_integers(100, 30, seed=1))
    around = torch.full((6, 62), torch.nan, device=DEVICE)
    states = around[1:5, 1:61:2]
    states.copy_(small_integers(4, 30, seed=2))
    expected = top_k_items(states.contiguous(), table.contiguous(), 9, impl="torch")
    for e, c in ((states, table), (states.T.contiguous().T, table.T.contiguous().T), (states, table.flip(0).flip(0))):
        found = top_k_items(e, c, 9, impl="triton")
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    assert wide.isnan().sum() == wide.numel() - 3000


@pytest.mark.parametrize("how", ["positive", "negative", "everywhere"])
def test_nan_is_refused_with_its_place(how):
    states, table = torch.ones(2, 2, device=DEVICE), small_integers(300, 2, seed=1)
    table[60, 0] = -torch.nan if how == "negative" else torch.nan
    if how == "everywhere":
        states[0] = torch.nan
    assert_refused(states, table, f"NaN at row 0, column {0 if how == 'everywhere' else 60}")


def test_nan_is_refused_though_its_item_was_seen():
    states, table = torch.ones(3, 2, device=DEVICE), small_integers(300, 2, seed=1)
    states[1, 0], table[60, 0] = 0, torch.inf
    assert_refused(states, table, "NaN at row 1, column 60", **csr([[], [60], []]))


def assert_refused(states, table, message, **seen):
    for impl in ("triton", "torch"):
        with pytest.raises(ValueError, match=f"scores must not be NaN, got {message}$"):
            top_k_items(states, table, 4, **seen, impl=impl)


def test_users_beyond_the_scratch_take_several_launches(monkeypatch):
    # two lists of 128 for each of two users in one split
    monkeypatch.setattr(triton_top_k, "LIST_BYTES", 2 * 2 * 128 * 8)
    plan = triton_top_k.plan_top_k
    launches = []
    monkeypatch.setattr(
        triton_top_k, "plan_top_k", lambda *a, **b: (launches.append(one) or one for one in plan(*a, **b))
    )
    lists = [list(range(0, 200, step)) for step in (3, 2, 4)]
    assert_same(small_integers(3, 3, seed=1), small_integers(200, 3, seed=2), 4, **csr(lists))
    assert len(launches) == 4


def test_splits_do_not_depend_on_what_they_hold(monkeypatch):
    """One split and many give the same list."""
    states, table = normal(1, 6), normal(1600, 6, seed=1)
    many = top_k_items(states, table, 9, impl="triton")
    monkeypatch.setattr(triton_top_k, "_MOST_SPLITS", 1)
    one = top_k_items(states, table, 9, impl="triton")
    assert torch.equal(one[0], many[0])
    assert torch.equal(one[1], many[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 1025}, "k must be at most 1024 for the fused kernel, got 1025"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"chunk_size": 8}, "impl='triton' does not work in chunks, got chunk_size=8"),
        ({"impl": "cuda"}, "impl must be 'auto', 'torch' or 'triton', got 'cuda'"),
        (
            {"states": torch.ones(2, 3, dtype=torch.float64)},
            "must be float16, bfloat16 or float32 .* got torch.float64",
        ),
        ({"table": torch.ones(5, 2)}, r"states and table must be .* got \(2, 3\) and \(5, 2\)"),
        ({"table": torch.ones(1, 3).expand(2**32 + 1, 3)}, r"table must have at most 2\^32 rows, got 4294967297"),
        ({"states": torch.ones(2, 3, device="meta")}, "must lie on one device, got cpu, meta"),
        ({"seen_items": torch.tensor([5]), "seen_offsets": torch.tensor([0, 0, 1])}, r"must lie in 0\.\.4, got 5\.\.5"),
        ({"seen_items": torch.tensor([1]), "seen_offsets": torch.tensor([0, 2, 1])}, "must rise from 0 to 1"),
        ({"seen_items": torch.tensor([1])}, "must be given together"),
    ],
)
def test_bad_input_ends_in_one_line(change, message):
    arguments = {"states": torch.ones(2, 3), "table": torch.ones(5, 3), "k": 2, "impl": "triton"} | change
    with pytest.raises(ValueError, match=message) as caught:
        top_k_items(**arguments)
    assert "\n" not in str(caught.value)


def test_triton_never_falls_back(monkeypatch):
    monkeypatch.setattr(triton_top_k, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"CPU tensors only where TRITON_INTERPRET=1 was set .* got cpu"):
        top_k_items(torch.ones(1, 1), torch.ones(1, 1), 1, impl="triton")
    monkeypatch.setattr(top_k.function, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="needs the package triton, which is not installed"):
        top_k_items(torch.ones(1, 1), torch.ones(1, 1), 1, impl="triton")


def test_auto_takes_the_kernel_where_it_is_supported_and_no_chunks_are_asked_for(monkeypatch):
    states, table = torch.ones(1, 1), torch.ones(1, 1)
    assert not top_k.is_supported(states, table, 1)
    monkeypatch.setattr(ranking, "is_supported", lambda *_: True)
    monkeypatch.setattr(ranking, "fused_top_k", lambda *_, **__: "kernel")
    assert top_k_items(states, table, 1) == "kernel"
    assert top_k_items(states, table, 1, chunk_size=1)[1].tolist() == [[0]]
    assert top_k_items(states, table, 1, impl="torch")[1].tolist() == [[0]]


@pytest.mark.slow
@pytest.mark.parametrize("k", [5, 200, 1000])
@pytest.mark.parametrize("width", [1, 50, 257])
@pytest.mark.parametrize("n_users", [5, 70])
def test_larger_products(n_users, width, k):
    lists = random_lists(n_users, 2500, seed=k)
    assert_same(small_integers(n_users, width, seed=1), small_integers(2500, width, seed=2), k, **csr(lists))
    assert_within_bound(normal(n_users, width, seed=1), normal(2500, width, seed=2), k, **csr(lists))


@pytest.mark.gpu
@pytest.mark.parametrize("k", [10, 128, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n_users", "width"), [(5, 64), (500, 64), (500, 128), (500, 200)])
def test_a_large_catalogue_on_a_gpu(n_users, width, dtype, k):
    states, table = normal(n_users, width, dtype=dtype), normal(100_003, width, seed=1, dtype=dtype)
    lists = [torch.randint(0, 100_003, (n % 300,)).tolist() for n in range(n_users)]
    assert top_k.is_supported(states, table, k)
    assert_within_bound(states, table, k, **csr(lists))
    assert_same(
        small_integers(n_users, width, seed=1, dtype=dtype),
        small_integers(100_003, width, seed=2, dtype=dtype),
        k,
        **csr(lists),
    )
