"""Nothing that happens at or after a query, nothing of the query's own user and no label reaches a context."""

import pytest
import torch
from torch.nn.functional import elu

from lightning_modules.context.bank import ContextBank, own_states
from lightning_modules.context.prefix_sums import PrefixMean, PrefixMoments

N_USERS, N_CONTEXT, D = 14, 11, 6


def features(states):
    return elu(states) + 1


@pytest.fixture(scope="module")
def table():
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 15, (N_USERS,), generator=generator)
    times = torch.cat([torch.randint(0, 30, (int(n),), generator=generator).sort().values for n in counts])
    events = {
        "times": times,
        "offsets": torch.cat([torch.zeros(1).long(), counts.cumsum(0)]),
        "groups": torch.arange(N_USERS) // 3,
    }
    return torch.randn(len(times), D, generator=generator), events


def without(states, events, kept):
    """The table with some events deleted."""
    before = torch.cat([torch.zeros(1).long(), kept.long().cumsum(0)])
    return states[kept], events | {"times": events["times"][kept], "offsets": before[events["offsets"]]}


def answers(states, events, time, users, rules, layout):
    """Everything that can be asked of others at a time."""
    bank = ContextBank.build(states, events, torch.arange(N_CONTEXT), **rules)
    times = torch.full((len(users),), time)
    context = bank.context(times, users, layout)
    weights = context.visible.float() / context.visible.sum(1, keepdim=True).clamp(min=1)
    found = [context.combine(weights, context.states), context.visible.sum(1), context.ages.sort(1).values.amax(1)]
    found.append(context.dot(torch.ones(len(users), D), context.states).where(context.visible, 0).sum(1))
    if not {"max_context", "max_age_days", "exclude_group"} & set(rules):
        found += PrefixMean.build(bank, block=8).mean(times, users)
        query = torch.linspace(0, 1, D).expand(len(users), D)
        found += PrefixMoments.build(bank, features, block=8).lookup(query, times, users)
    return found


RULES = pytest.mark.parametrize(
    "rules",
    [
        {},
        {"ties": "inclusive"},
        {"lag_days": 2 / 86_400e6},
        {"exclude_self": False, "min_prefix": 3},
        {"max_context": 4},
        {"max_context": 4, "policy": "random"},
        {"exclude_group": True, "max_age_days": 9 / 86_400e6},
    ],
)


@RULES
@pytest.mark.parametrize("layout", ["shared", "gathered"])
def test_later_events_do_not_change_a_bit(table, rules, layout):
    states, events = table
    users = torch.arange(N_USERS)
    changed = False
    for time in (0, 7, 15, 40):
        as_of = time - round(rules.get("lag_days", 0) * 86_400e6)
        later = events["times"] > as_of if rules.get("ties") == "inclusive" else events["times"] >= as_of
        reference = answers(states, events, time, users, rules, layout)
        perturbed = torch.where(later.unsqueeze(1), states * -3 + 1, states)
        poisoned = torch.where(later.unsqueeze(1), torch.nan, states)
        moved = events | {"times": torch.where(later, events["times"] + 5, events["times"])}
        for other in (
            answers(perturbed, events, time, users, rules, layout),
            answers(poisoned, events, time, users, rules, layout),
            answers(states, moved, time, users, rules, layout),
            answers(*without(states, events, ~later), time, users, rules, layout),
        ):
            for one, two in zip(reference, other, strict=True):
                assert torch.equal(one, two)
        earlier = torch.where(later.unsqueeze(1), states, states + 1)
        changed |= not torch.equal(reference[0], answers(earlier, events, time, users, rules, layout)[0])
    assert changed  # the past does reach it, so that the comparison can fail


def test_inclusive_ties_see_the_very_moment_and_strict_ones_do_not(table):
    """The poison bites: a rule that looks at the moment itself is caught by it."""
    states, events = table
    users = torch.arange(N_USERS)
    poisoned = torch.where((events["times"] >= 15).unsqueeze(1), torch.nan, states)
    assert answers(poisoned, events, 15, users, {"ties": "inclusive"}, "gathered")[0].isnan().any()
    assert not answers(poisoned, events, 15, users, {}, "gathered")[0].isnan().any()


def test_gathered_rows_keep_a_later_neighbour_in_the_batch_from_spoiling_earlier_queries(table):
    states, events = table
    poisoned = torch.where((events["times"] >= 15).unsqueeze(1), torch.nan, states)
    times, users = torch.tensor([15, 29]), torch.tensor([N_USERS - 1, N_USERS - 1])
    for table_, spoiled in ((states, [False, False]), (poisoned, [False, True])):
        context = ContextBank.build(table_, events, torch.arange(N_CONTEXT)).context(times, users, "gathered")
        assert context.combine(context.visible.float(), context.states).isnan().any(1).tolist() == spoiled


@pytest.mark.parametrize("layout", ["shared", "gathered"])
@pytest.mark.parametrize("rules", [{}, {"max_context": 3}, {"max_context": 3, "policy": "random"}])
def test_ones_own_events_do_not_reach_ones_own_context(table, rules, layout):
    states, events = table
    for user in (0, 4, N_CONTEXT - 1):
        own = torch.zeros(len(states), dtype=torch.bool)
        own[int(events["offsets"][user]) : int(events["offsets"][user + 1])] = True
        asked = torch.tensor([user])
        reference = answers(states, events, 20, asked, rules, layout)
        # a shared row meets a weight of 0, and 0 * inf is no number
        poison = torch.inf if layout == "gathered" else 1e6
        poisoned = answers(torch.where(own.unsqueeze(1), poison, states), events, 20, asked, rules, layout)
        deleted = answers(*without(states, events, ~own), 20, asked, rules, layout)
        # prefix sums, which come after these four, add the own state and take it off again: to rounding only
        for one, two, three in zip(reference[:4], poisoned, deleted, strict=False):
            assert torch.equal(one, two)
            # float32 means of at most 11 numbers near 1, and sums of 66 of them
            torch.testing.assert_close(one, three, rtol=0, atol=3e-5)
        for one, three in zip(reference[4:], deleted[4:], strict=True):
            torch.testing.assert_close(one, three, rtol=0, atol=3e-5)


def test_alone_in_the_context_one_sees_nobody(table):
    states, events = table
    bank = ContextBank.build(states, events, torch.tensor([3]))
    assert not bank.context(torch.tensor([99]), torch.tensor([3])).visible.any()
    assert PrefixMean.build(bank).mean(torch.tensor([99]), torch.tensor([3]))[1].tolist() == [0]


def test_own_states_come_from_before_the_query_alone(table):
    states, events = table
    poisoned = torch.where((events["times"] >= 15).unsqueeze(1), torch.nan, states)
    users, times = torch.arange(N_USERS), torch.full((N_USERS,), 15)
    for one, two in zip(
        own_states(states, events, users, times), own_states(poisoned, events, users, times), strict=True
    ):
        assert torch.equal(one, two)


def test_a_bank_holds_states_times_and_identities_and_no_label(table):
    states, events = table
    with_labels = events | {"labels": torch.full((N_USERS,), 7), "categorical": torch.zeros(len(states), 1).long()}
    bank = ContextBank.build(states, with_labels, torch.arange(N_CONTEXT))
    assert set(bank.state_dict()) == {
        "states",
        "times",
        "users",
        "event_rows",
        "context_users",
        "offsets",
        "groups",
        "words",
        "_extra_state",
    }
    bare = ContextBank.build(states, events, torch.arange(N_CONTEXT))
    for name, value in bare.state_dict().items():
        assert (
            torch.equal(value, bank.state_dict()[name]) if torch.is_tensor(value) else value == bare.get_extra_state()
        )


def test_events_at_or_after_the_stop_never_enter(table):
    states, events = table
    bank = ContextBank.build(states, events, torch.arange(N_CONTEXT), stop=12)
    assert int(bank.times.max()) < 12
    poisoned = torch.where((events["times"] >= 12).unsqueeze(1), torch.nan, states)
    assert torch.equal(bank.states, ContextBank.build(poisoned, events, torch.arange(N_CONTEXT), stop=12).states)
