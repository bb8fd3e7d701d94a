import numpy as np
import pytest
import torch
from torch.nn.functional import elu

from lightning_modules.context.bank import ContextBank
from lightning_modules.context.prefix_sums import PrefixMean, PrefixMoments


def features(states):
    """Positive, twice as many as there are columns."""
    return torch.cat([elu(states) + 1, elu(-2 * states) + 1], dim=1)


def problem(dtype=torch.float64, n_users=12, d=5, seed=0, **rules):
    """A bank over the first users of a table full of ties, and queries of all users at all times."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 9, (n_users,), generator=generator)
    times = torch.cat([torch.randint(0, 20, (int(n),), generator=generator).sort().values for n in counts])
    events = {"times": times, "offsets": torch.cat([torch.zeros(1).long(), counts.cumsum(0)])}
    states = torch.randn(len(times), d, generator=generator, dtype=dtype)
    bank = ContextBank.build(states, events, torch.arange(n_users - 2), **rules)
    moments, users = torch.meshgrid(torch.arange(-1, 22), torch.arange(-1, n_users), indexing="ij")
    order = torch.randperm(moments.numel(), generator=generator)
    return bank, moments.flatten()[order], users.flatten()[order]


def visible_states(bank, time, user):
    """By a loop over all events in float64."""
    found = {}
    for owner, moment, state in zip(bank.users.tolist(), bank.times.tolist(), bank.states.numpy(), strict=True):
        as_of = time - bank.visibility.lag
        if (moment <= as_of if bank.visibility.inclusive else moment < as_of) and not (
            bank.visibility.exclude_self and owner == user
        ):
            found[owner] = state.astype(np.float64)
    return np.array(list(found.values())).reshape(len(found), bank.states.shape[1])


RULES = pytest.mark.parametrize(
    "rules", [{}, {"ties": "inclusive"}, {"exclude_self": False}, {"lag_days": 3 / 86_400e6, "min_prefix": 2}]
)


@RULES
@pytest.mark.parametrize("block", [1, 4, 32, 1000])
def test_mean_equals_the_mean_of_all_visible_states(rules, block):
    bank, times, users = problem(**rules)
    means, counts = PrefixMean.build(bank, block=block).mean(times, users)
    for time, user, mean, count in zip(times.tolist(), users.tolist(), means.numpy(), counts.tolist(), strict=True):
        seen = visible_states(bank, time, user)
        assert count == len(seen)
        # sums of about 50 changes of size 1 in float64
        np.testing.assert_allclose(mean, seen.mean(0) if count else np.zeros(5), rtol=0, atol=1e-12)


@RULES
@pytest.mark.parametrize("block", [1, 7, None])
def test_linear_kernel_equals_its_sum_over_all_visible_states(rules, block):
    bank, times, users = problem(**rules)
    query = features(torch.randn(len(times), 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    found, counts, untold = PrefixMoments.build(bank, features, block=block).lookup(query, times, users)
    assert not untold.any()
    for row, (time, user) in enumerate(zip(times.tolist(), users.tolist(), strict=True)):
        seen = visible_states(bank, time, user)
        assert counts[row] == len(seen)
        weights = features(torch.from_numpy(seen)).numpy() @ query[row].numpy()
        expected = weights @ seen / weights.sum() if len(seen) else np.zeros(5)
        # sums of about 50 products of size 10 in float64, divided by a sum of positive weights
        np.testing.assert_allclose(found[row], expected, rtol=0, atol=1e-11)


def test_float32_states_keep_float32_accuracy():
    bank, times, users = problem(torch.float32)
    exact = np.stack(
        [
            visible_states(bank, *each).mean(0) if len(visible_states(bank, *each)) else np.zeros(5)
            for each in zip(times.tolist(), users.tolist(), strict=True)
        ]
    )
    means, counts = PrefixMean.build(bank, block=8).mean(times, users)
    assert means.dtype == torch.float32
    # documented: 2 block^2 c 2^-24 / N, with states below c = 4, plus the rounding of the answer
    bound = 2 * 8**2 * 4 * 2.0**-24 / counts.clamp(min=1).numpy()[:, None] + 4 * 2.0**-24
    assert (np.abs(means.numpy() - exact) <= bound).all()
    query = features(torch.randn(len(times), 5, generator=torch.Generator().manual_seed(1)))
    single = PrefixMoments.build(bank, features, block=8).lookup(query, times, users)[0]
    double_bank = problem()[0]
    double_bank.refresh(torch.zeros(int(double_bank.event_rows.max()) + 1, 5, dtype=torch.float64))
    double_bank.states = bank.states.double()
    double = PrefixMoments.build(double_bank, features, block=8).lookup(query.double(), times, users)[0]
    # kept sums are rounded to 2^-24; taking one's own state off may leave few of the 10 users' weight
    torch.testing.assert_close(single.double(), double, rtol=0, atol=3e-5)


def test_gradients_reach_the_query_and_only_finite_ones_where_nobody_is_seen():
    bank, times, users = problem(n_users=4)
    moments = PrefixMoments.build(bank, features, block=3)
    query = torch.rand(6, 10, dtype=torch.float64, requires_grad=True)
    times, users = torch.tensor([-1, 3, 8, 8, 15, 21]), torch.tensor([0, 0, 1, -1, 2, 3])
    assert torch.autograd.gradcheck(lambda q: moments.lookup(q, times, users)[0], (query,))
    moments.lookup(query, times, users)[0].sum().backward()
    assert not query.grad[0].any()


def test_an_empty_bank_and_no_queries_give_nothing():
    events = {"times": torch.tensor([3]), "offsets": torch.tensor([0, 0, 1])}
    bank = ContextBank.build(torch.ones(1, 5, dtype=torch.float64), events, torch.tensor([0]))
    times, users = torch.tensor([1, 9]), torch.tensor([0, 1])
    none = times[:0]
    query = torch.ones(2, 10, dtype=torch.float64)
    for (found, counts), (nothing, _) in (
        (PrefixMean.build(bank).mean(times, users), PrefixMean.build(bank).mean(none, none)),
        (
            PrefixMoments.build(bank, features).lookup(query, times, users)[:2],
            PrefixMoments.build(bank, features).lookup(query[:0], none, none)[:2],
        ),
    ):
        assert not found.any()
        assert not counts.any()
        assert nothing.shape == (0, 5)


def test_what_a_sum_over_everybody_cannot_hide_is_refused():
    for rules, name in (({"max_age_days": 1.0}, "max_age_days"), ({"max_context": 3}, "max_context")):
        with pytest.raises(ValueError, match=f"cannot apply {name}"):
            PrefixMean.build(problem(**rules)[0])
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        PrefixMean.build(problem()[0], block=0)
    bank, times, users = problem()
    with pytest.raises(ValueError, match=r"shape \(Q,\)"):
        PrefixMean.build(bank).mean(times, users[:1])
    with pytest.raises(ValueError, match=r"query_features must have shape \(2, 10\), got \(2, 5\)"):
        PrefixMoments.build(bank, features).lookup(torch.zeros(2, 5), times[:2], users[:2])


def tiny(states):
    """Features of a size that the first column says, of the others' direction."""
    return states[:, :1].exp() * features(states[:, 1:])


def sized(sizes, dtype=torch.float32):
    """A bank of one user after the other, whose states follow each other at 0, 1, ...; every row of ``sizes`` a user.

    Returns it, its states, and queries of somebody else and of the first user after everything.
    """
    n_users, each = len(sizes), len(sizes[0])
    states = torch.randn(n_users * each, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)
    states[:, 0] = torch.tensor(sizes, dtype=dtype).flatten()
    times = torch.arange(each).repeat(n_users)
    events = {"times": times, "offsets": torch.arange(n_users + 1) * each}
    bank = ContextBank.build(states, events, torch.arange(n_users))
    return bank, torch.tensor([each + 1] * 2), torch.tensor([-1, 0])


@pytest.mark.parametrize("block", [1, 3, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("sizes", "lost"),
    [
        ([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], [False, False]),
        # exp(-800) is 0 in float64 too
        ([[0.0, -800.0], [0.0, -800.0], [0.0, -800.0]], [True, True]),
        # what is left of large features that are gone is rounding, not the exp(-70) that are there
        ([[9.0, -70.0], [9.0, -70.0], [9.0, -70.0]], [True, True]),
        # the first user's own state, taken off again, was nearly all
        ([[0.0, 40.0], [0.0, 0.0], [0.0, 0.0]], [False, True]),
    ],
)
def test_sums_that_rounding_swallowed_are_named_and_never_nan(sizes, lost, dtype, block):
    bank, times, users = sized(sizes, dtype)
    query = features(torch.ones(2, 3, dtype=dtype))
    found, counts, untold = PrefixMoments.build(bank, tiny, block=block).lookup(query, times, users)
    assert untold.tolist() == lost
    assert counts.tolist() == [3, 2]
    assert found.isfinite().all()
    assert not found[untold].any()
    weights = tiny(bank.states[1::2].double()) @ query[0].double()
    for row, told in enumerate(~untold):
        if told:
            expected = (weights[row:] @ bank.states[1::2].double()[row:]) / weights[row:].sum()
            # at most three products of order 1 in the states' dtype, under weights of one size or one above all
            torch.testing.assert_close(found[row].double(), expected, rtol=0, atol=2e-4)


def test_sums_of_a_bank_stay_those_of_its_states_when_it_is_refreshed():
    bank, times, users = problem()[:3]
    sums = PrefixMean.build(bank, block=4), PrefixMoments.build(bank, features, block=4)
    query = features(torch.randn(len(times), bank.states.shape[1])).to(bank.states)
    before = sums[0].mean(times, users), sums[1].lookup(query, times, users)
    bank.refresh(bank.states + 100)
    after = sums[0].mean(times, users), sums[1].lookup(query, times, users)
    for one, other in zip(before, after, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert float((PrefixMean.build(bank, block=4).mean(times, users)[0] - after[0][0]).abs().max()) > 50


@pytest.mark.parametrize("n_users", [1000, 20_000])
def test_bank_and_sums_hold_at_most_a_quarter_beyond_the_states_and_the_raw_events(n_users):
    """Three events a user, as in ``scripts/bench_context.py``; user and time of each event are the raw ones."""
    each, d = 3, 64
    times = torch.randint(0, 10**9, (n_users, each), generator=torch.Generator().manual_seed(0))
    events = {"times": times.sort(1).values.flatten(), "offsets": torch.arange(n_users + 1) * each}
    bank = ContextBank.build(torch.zeros(n_users * each, d), events, torch.arange(n_users))
    row_bytes = 4 * d * n_users * each
    sums = PrefixMean.build(bank), PrefixMoments.build(bank, lambda states: elu(states) + 1)
    asked = torch.tensor([10**8, 10**9]), torch.tensor([3, -1])
    sums[0].mean(*asked)
    sums[1].lookup(torch.ones(2, d), *asked)
    for one in sums:
        assert row_bytes < one.n_bytes <= 1.25 * row_bytes
    alone = sums[0].n_bytes
    bank.context(*asked, "gathered")
    assert sums[0].n_bytes == alone + 8 * (len(bank.keys) + len(bank.clock)), (
        "a look at rows is counted once it is made"
    )
    assert alone > sum(
        one.nbytes for one in (bank.states, bank.event_rows, bank.offsets, sums[0].sums, sums[0].line.order)
    )
