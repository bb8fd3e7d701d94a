"""The index against a plain search, on random tables full of ties."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.context.bank import ContextBank, own_states

moments = st.integers(-3, 12)
tables = st.lists(st.lists(moments, max_size=6).map(sorted), min_size=1, max_size=6)
queries = st.lists(st.tuples(st.integers(-4, 15), st.integers(-1, 5)), min_size=1, max_size=8)
modes = st.sampled_from(["strict", "inclusive"])
CHECKS = settings(max_examples=25, deadline=None)


def tensors(users):
    counts = torch.tensor([0, *map(len, users)])
    events = {
        "times": torch.tensor([time for times in users for time in times], dtype=torch.int64),
        "offsets": counts.cumsum(0),
    }
    n_events = int(counts.sum())
    # state = number of the row + 1, so that what is seen can be read off
    return torch.arange(1.0, n_events + 1).unsqueeze(1), events


def searched(users, time, asker, ties, **rules):
    """Rows (numbered from 1) that one query sees, by walking through every event of every user."""
    found, row = {}, 0
    as_of = time - rules.get("lag", 0)
    for user, times in enumerate(users):
        for place, moment in enumerate(times):
            row += 1
            past = moment < as_of if ties == "strict" else moment <= as_of
            if past and place + 1 >= rules.get("min_prefix", 1) and moment < rules.get("stop", 99):
                found[user] = (row, moment)
    if not rules.get("keep_self"):
        found.pop(asker, None)
    oldest = time - rules.get("max_age", 99)
    return {row for row, moment in found.values() if moment >= oldest}


def visible_rows(context, query):
    rows = torch.arange(context.visible.shape[1]) if context.rows is None else context.rows[query]
    return [int(state) for state in context.states[rows[context.visible[query]]].flatten()]


@CHECKS
@given(
    tables, queries, modes, st.integers(1, 3), st.integers(0, 4), st.integers(0, 6), st.integers(5, 15), st.booleans()
)
def test_both_layouts_equal_a_plain_search(users, asked, ties, min_prefix, lag, max_age, stop, keep_self):
    states, events = tensors(users)
    bank = ContextBank.build(
        states,
        events,
        torch.arange(len(users)),
        ties=ties,
        min_prefix=min_prefix,
        stop=stop,
        lag_days=lag / 86_400e6,
        max_age_days=max_age / 86_400e6,
        exclude_self=not keep_self,
    )
    times, askers = torch.tensor(asked).T
    rules = {"lag": lag, "min_prefix": min_prefix, "stop": stop, "max_age": max_age, "keep_self": keep_self}
    for layout in ("shared", "gathered"):
        context = bank.context(times, askers, layout)
        for query, (time, asker) in enumerate(asked):
            found = visible_rows(context, query)
            assert len(found) == len(set(found))
            assert set(found) == searched(users, time, asker, ties, **rules)


@CHECKS
@given(tables, queries, modes)
def test_the_interval_form_equals_a_plain_search(users, asked, ties):
    states, events = tensors(users)
    bank = ContextBank.build(states, events, torch.arange(len(users)), ties=ties, exclude_self=False)
    for time, _ in asked:
        if ties == "strict":
            seen = (bank.times < time) & (time <= bank.next_times)
        else:
            seen = (bank.times <= time) & (time < bank.next_times)
        assert set(bank.states[seen].flatten().tolist()) == searched(users, time, -1, ties, keep_self=True)
        assert len(bank.users[seen]) == len(bank.users[seen].unique())


@CHECKS
@given(tables, queries, modes)
def test_own_states_equal_a_plain_search(users, asked, ties):
    states, events = tensors(users)
    asked = [(time, asker % len(users)) for time, asker in asked]
    times, askers = torch.tensor(asked).T
    own, found, rows = own_states(states, events, askers, times, ties)
    for query, (time, asker) in enumerate(asked):
        mine = [times if user == asker else [] for user, times in enumerate(users)]
        before = sum(map(len, users[:asker]))
        expected = {before + row for row in searched(mine, time, -1, ties)}
        assert {int(rows[query]) + 1 for _ in range(int(found[query]))} == expected
        assert {int(own[query]) for _ in range(int(found[query]))} == expected


@CHECKS
@given(tables, queries, modes, st.randoms(use_true_random=False), st.sampled_from(["recent", "random"]))
def test_neither_the_order_of_queries_nor_the_company_they_keep_matters(users, asked, ties, random, policy):
    states, events = tensors(users)
    bank = ContextBank.build(states, events, torch.arange(len(users)), ties=ties, max_context=2, policy=policy)
    order = list(range(len(asked)))
    random.shuffle(order)
    times, askers = torch.tensor(asked).T
    for layout in ("shared", "gathered"):
        together = bank.context(times, askers, layout)
        shuffled = bank.context(times[order], askers[order], layout)
        for place, query in enumerate(order):
            alone = bank.context(times[query : query + 1], askers[query : query + 1], layout)
            expected = sorted(visible_rows(alone, 0))
            assert sorted(visible_rows(together, query)) == expected
            assert sorted(visible_rows(shuffled, place)) == expected
            ages = [sorted(each.ages[row][each.visible[row]].tolist()) for each, row in ((together, query), (alone, 0))]
            assert ages[0] == ages[1]
