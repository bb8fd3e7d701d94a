"""The generator, the ids drawn from it, and the alias table, against answers computed elsewhere."""

import itertools
import math

import pytest
import torch
from scipy import stats

from kernels.cce_minus import Proposal, cce_minus_loss, cce_minus_negatives
from kernels.cce_minus.negatives import DrawnNegatives
from kernels.cce_minus.philox import PhiloxStream, philox4x32, scale_words

MASK = 0xFFFFFFFF


def scalar_philox(counter, key):
    """Philox4x32-10 on Python integers, written from the paper's round function."""
    c, k = list(counter), list(key)
    for _ in range(10):
        product_0, product_1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (product_1 >> 32) ^ c[1] ^ k[0],
            product_1 % 2**32,
            (product_0 >> 32) ^ c[3] ^ k[1],
            product_0 % 2**32,
        ]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def scalar_word(seed, step, rank, row, column, offset=0):
    seed, step = seed % 2**64, step % 2**64
    counter = (column // 4 + offset, row, step % 2**32, (step >> 32) ^ rank)
    return scalar_philox(counter, (seed % 2**32, seed >> 32))[column % 4]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers_of_random123(counter, key, answer):
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(word) for word in words) == answer
    assert tuple(scalar_philox(counter, key)) == answer


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x1234_5678_9ABC])
@pytest.mark.parametrize(("step", "rank"), [(0, 0), (3, 0), (2**32 + 5, 0), (-7, 2), (0, MASK)])
def test_ids_follow_the_counter_layout(seed, step, rank):
    targets, n_items, k = torch.tensor([4, -100, 0, 2]), 1009, 6
    ids, row_of_position = cce_minus_negatives(
        targets, n_items, n_negatives=k, seed=seed, step=step, rank=rank, sharing="position"
    )
    # the row is the rank among the kept positions: the ignored one has none
    expected = [[scalar_word(seed, step, rank, row, c) * n_items >> 32 for c in range(k)] for row in range(3)]
    assert ids.tolist() == expected
    assert ids.dtype == torch.int64
    assert row_of_position.tolist() == [0, 1, 2]


def test_tiles_and_batches_use_their_number_as_row():
    targets, n_items, k, seed, step = torch.arange(11), 50, 5, 9, 4
    ids, row_of_position = cce_minus_negatives(
        targets, n_items, n_negatives=k, seed=seed, step=step, sharing="tile", tile_size=4
    )
    assert ids.tolist() == [[scalar_word(seed, step, 0, t, c) * n_items >> 32 for c in range(k)] for t in range(3)]
    keys = [scalar_philox((i // 4, MASK, step, 0), (seed, 0))[i % 4] for i in range(11)]
    order = sorted(range(11), key=lambda i: (keys[i], i))
    assert [row_of_position[i].item() for i in order] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]

    ids, row_of_position = cce_minus_negatives(targets, n_items, n_negatives=k, seed=seed, step=step, sharing="batch")
    assert ids.tolist() == [[scalar_word(seed, step, 0, 0, c) * n_items >> 32 for c in range(k)]]
    assert row_of_position.tolist() == [0] * 11


def test_alias_draws_use_the_coin_domain():
    proposal = Proposal.from_probabilities(torch.tensor([0.0, 5.0, 1.0, 0.25, 2.0]))
    ids, _ = cce_minus_negatives(torch.zeros(7, dtype=torch.int64), 5, n_negatives=6, seed=3, log_q=proposal)
    threshold = [t % 2**32 for t in proposal.threshold.tolist()]
    for row, column in itertools.product(range(7), range(6)):
        slot = scalar_word(3, 0, 0, row, column) * 5 >> 32
        coin = scalar_word(3, 0, 0, row, column, offset=2**31)
        assert ids[row, column] == (slot if coin < threshold[slot] else proposal.alias[slot])


@pytest.mark.parametrize("proposal", [None, Proposal.log_uniform(97)], ids=["uniform", "alias"])
def test_any_block_draws_its_part_of_the_whole(proposal):
    alias_table = (None, None) if proposal is None else (proposal.threshold, proposal.alias)
    source = DrawnNegatives(PhiloxStream.of(5, 1, 0), 300, 1030, 97, alias_table, torch.device("cpu"))
    whole = source.block(0, 300, 0, 1030)
    for row, n_rows, column, n_columns in [(0, 1, 0, 1), (7, 200, 8, 3), (299, 1, 1028, 2), (150, 150, 512, 518)]:
        block = source.block(row, n_rows, column, n_columns)
        assert torch.equal(block, whole[row : row + n_rows, column : column + n_columns])


def test_integers_and_tensors_name_the_same_words():
    targets = torch.arange(9)
    numbers = {"seed": -12345678901, "step": 2**40 + 3, "rank": 7}
    tensors = {name: torch.tensor(value) for name, value in numbers.items()}
    for sharing in ("position", "tile", "batch"):
        a, rows_a = cce_minus_negatives(targets, 30, n_negatives=5, sharing=sharing, tile_size=4, **numbers)
        b, rows_b = cce_minus_negatives(targets, 30, n_negatives=5, sharing=sharing, tile_size=4, **tensors)
        assert torch.equal(a, b)
        assert torch.equal(rows_a, rows_b)


def test_without_a_seed_the_default_generator_decides():
    targets = torch.arange(9)
    torch.manual_seed(4)
    first, second = (cce_minus_negatives(targets, 1000, n_negatives=5)[0] for _ in range(2))
    torch.manual_seed(4)
    again = cce_minus_negatives(targets, 1000, n_negatives=5)[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_given_and_exhaustive_negatives_draw_no_seed():
    state = torch.get_rng_state()
    hidden, table, targets = torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 1])
    cce_minus_loss(hidden, table, targets, n_negatives="all")
    cce_minus_loss(hidden, table, targets, negatives=torch.tensor([1, 2]), sharing="batch")
    cce_minus_loss(hidden, table, targets, n_negatives=2, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("n_items", "n_buckets"), [(3, 3), (1000, 1000), (2**24 + 3, 997)])
def test_draws_are_uniform(n_items, n_buckets):
    ids, _ = cce_minus_negatives(torch.zeros(2000, dtype=torch.int64), n_items, n_negatives=500, seed=11)
    assert 0 <= ids.min() <= ids.max() < n_items
    bounds = torch.arange(n_buckets + 1) * n_items // n_buckets
    bucket = torch.bucketize(ids.view(-1), bounds, right=True) - 1
    observed = torch.bincount(bucket, minlength=n_buckets).double()
    expected = bounds.diff().double() / n_items * ids.numel()
    # a fixed seed: the probability only says how unlucky the choice of seed would have to be
    assert stats.chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("n_items", [2, 3, 1000])
@pytest.mark.parametrize("alias", [False, True])
def test_first_and_last_id_are_reached(n_items, alias):
    proposal = Proposal.uniform(n_items) if alias else None
    ids, _ = cce_minus_negatives(torch.zeros(100, dtype=torch.int64), n_items, n_negatives=500, seed=2, log_q=proposal)
    assert ids.min() == 0
    assert ids.max() == n_items - 1


@pytest.mark.parametrize("n_items", [3, 1000, 2**24 + 3, 2**31 - 1])
def test_the_first_and_the_last_word_name_the_first_and_the_last_id(n_items):
    assert scale_words(torch.tensor([0, MASK]), n_items).tolist() == [0, n_items - 1]


def test_rows_steps_ranks_and_seeds_are_uncorrelated():
    n_items, k = 10_000, 4096
    targets = torch.zeros(8, dtype=torch.int64)
    settings = [
        {"seed": 1, "step": 0, "rank": 0},
        {"seed": 1, "step": 1, "rank": 0},
        {"seed": 1, "step": 2**32, "rank": 0},
        {"seed": 1, "step": 0, "rank": 2},
        {"seed": 2, "step": 0, "rank": 0},
        {"seed": 1 + 2**32, "step": 0, "rank": 0},
    ]
    draws = torch.cat([cce_minus_negatives(targets, n_items, n_negatives=k, **s)[0] for s in settings]).double()
    correlation = torch.corrcoef(draws).fill_diagonal_(0.0)
    # 1128 pairs of rows, each correlation normal with standard deviation 1/64: five of them are not exceeded
    assert correlation.abs().max() < 5 / math.sqrt(k)
    # neighbouring columns of a row share a counter
    assert torch.corrcoef(torch.stack([draws[:, :-1].flatten(), draws[:, 1:].flatten()]))[0, 1].abs() < 0.02


def implied_probabilities(proposal):
    """What the alias table draws, as exact integers in units of 1 / (V * 2^32)."""
    mass = [0] * proposal.n_items
    for slot, (threshold, alias) in enumerate(zip(proposal.threshold.tolist(), proposal.alias.tolist(), strict=True)):
        mass[slot] += threshold % 2**32
        mass[alias] += 2**32 - threshold % 2**32
    return torch.tensor(mass, dtype=torch.float64) / (2**32 * proposal.n_items)


@pytest.mark.parametrize(
    "weights",
    [
        torch.tensor([1.0, 0.0]),
        torch.tensor([1.0, 1.0, 1.0]),
        torch.tensor([0.0, 0.0, 3.0, 0.0]),
        torch.tensor([0.5, 1.5, 0.5, 1.5]),
        torch.arange(1, 1001) ** -1.5,
        torch.rand(777, generator=torch.Generator().manual_seed(0)) ** 6,
        torch.cat([torch.ones(64), torch.full((1,), 64.0), torch.full((63,), 1e-3)]),
    ],
    ids=["one item", "equal", "one of four", "ties", "zipf", "random", "mixed"],
)
def test_the_alias_table_implies_its_probabilities(weights):
    proposal = Proposal.from_probabilities(weights)
    implied = implied_probabilities(proposal)
    torch.testing.assert_close(implied, proposal.log_q.double().exp(), rtol=2e-6, atol=0)  # log q <= 14 in fp32
    q = weights.double() / weights.double().sum()
    # rounding to 1 / (V 2^32) moves each item by half a unit, the largest by up to V of them
    torch.testing.assert_close(implied, q, rtol=0, atol=2.0**-32)
    assert bool(((implied == 0) == (q == 0)).all())


def test_the_coin_is_compared_strictly():
    proposal = Proposal.from_probabilities(torch.tensor([0.0, 3.0, 1.0, 0.0]))
    every_slot = (torch.arange(4) << 30) + 12345
    for coin in (0, 1, MASK - 1, MASK):
        ids = proposal.draw(every_slot, torch.full((4,), coin))
        threshold = proposal.threshold.to(torch.int64) & MASK
        assert torch.equal(ids, torch.where(coin < threshold, torch.arange(4), proposal.alias).to(torch.int32))
        assert not torch.isin(ids, torch.tensor([0, 3])).any()  # not even by a coin of 0


def test_alias_draws_follow_a_skewed_proposal():
    proposal = Proposal.popularity(torch.arange(50) % 7, alpha=0.75)
    ids, _ = cce_minus_negatives(torch.zeros(1000, dtype=torch.int64), 50, n_negatives=500, seed=8, log_q=proposal)
    observed = torch.bincount(ids.view(-1), minlength=50).double()
    q = proposal.log_q.double().exp()
    assert observed[q == 0].sum() == 0
    drawn = q > 0
    expected = q[drawn] / q[drawn].sum() * ids.numel()
    assert stats.chisquare(observed[drawn].numpy(), expected.numpy()).pvalue > 1e-3


def test_a_uniform_proposal_draws_what_no_proposal_draws():
    targets = torch.arange(40)
    plain = cce_minus_negatives(targets, 1000, n_negatives=33, seed=1)
    proposed = cce_minus_negatives(targets, 1000, n_negatives=33, seed=1, log_q=Proposal.uniform(1000))
    assert torch.equal(plain[0], proposed[0])


def test_constructors_give_the_distributions_they_name():
    n = 20
    ranks = torch.arange(n, dtype=torch.float64)
    uniform, log_uniform = Proposal.uniform(n), Proposal.log_uniform(n)
    tolerance = {"rtol": 1e-6, "atol": 0}  # log-probabilities are kept in float32
    torch.testing.assert_close(uniform.log_q.double().exp(), torch.full((n,), 1 / n).double(), **tolerance)
    expected = torch.log((ranks + 2) / (ranks + 1)) / math.log(n + 1)
    torch.testing.assert_close(log_uniform.log_q.double().exp(), expected, **tolerance)
    counts = torch.randint(1, 100, (n,), generator=torch.Generator().manual_seed(0))
    popularity = Proposal.popularity(counts, 0.5)
    torch.testing.assert_close(
        popularity.log_q.double().exp(), counts**0.5 / (counts**0.5).sum(), check_dtype=False, **tolerance
    )
    mixture = Proposal.mixture([uniform, popularity], [1, 3])
    expected = 0.25 / n + 0.75 * popularity.log_q.double().exp()
    torch.testing.assert_close(mixture.log_q.double().exp(), expected, **tolerance)
    torch.testing.assert_close(Proposal.popularity(counts, 0.0).log_q, uniform.log_q)


@pytest.mark.parametrize("n", [0, 1, 2, 5, 128, 1000])
def test_the_permutation_is_one(n):
    stream = PhiloxStream.of(3, 4, 5)
    order = stream.permutation(n, torch.device("cpu"))
    assert torch.equal(order.sort().values, torch.arange(n))
    if n >= 128:
        assert not torch.equal(order, PhiloxStream.of(3, 5, 5).permutation(n, torch.device("cpu")))
        # rank correlation with the identity has standard deviation 1 / sqrt(n)
        positions = torch.stack([order.double(), torch.arange(n).double()])
        assert torch.corrcoef(positions)[0, 1].abs() < 4 / math.sqrt(n)


def test_a_proposal_moves_only_when_it_must():
    proposal = Proposal.uniform(5)
    assert proposal.to("cpu") is proposal
    assert proposal.to("meta").device.type == "meta"
    assert repr(proposal) == "Proposal(n_items=5, device='cpu')"
