import io

import pytest
import torch

from lightning_modules.context.as_of import drawn_context_users, last_before
from lightning_modules.context.bank import ContextBank, own_states, sample_context_users
from lightning_modules.context.rules import Visibility
from lightning_modules.context.visible import FOREVER, MICROSECONDS_PER_DAY, Context

DAY = MICROSECONDS_PER_DAY


def table(*users, d=3, seed=0, groups=None):
    """A table from each user's times; states are random."""
    times = [torch.tensor(each, dtype=torch.int64) for each in users]
    events = {"times": torch.cat(times), "offsets": torch.tensor([0, *(len(each) for each in times)]).cumsum(0)}
    if groups is not None:
        events["groups"] = torch.tensor(groups)
    return torch.randn(len(events["times"]), d, generator=torch.Generator().manual_seed(seed)), events


def seen_states(context, query=0):
    """States that a query sees, as sorted rows, whatever the layout."""
    rows = range(context.visible.shape[1]) if context.rows is None else context.rows[query].tolist()
    return sorted(
        context.states[row].tolist()
        for row, visible in zip(rows, context.visible[query].tolist(), strict=True)
        if visible
    )


def seen_rows(states, context, query=0):
    """Rows of the table whose states a query sees."""
    place = {tuple(state): row for row, state in enumerate(states.tolist())}
    return sorted(place[tuple(state)] for state in seen_states(context, query))


def ask(bank, time, user, layout):
    return bank.context(torch.tensor([time]), torch.tensor([user]), layout)


LAYOUTS = pytest.mark.parametrize("layout", ["shared", "gathered", "auto"])


@LAYOUTS
def test_ties_decide_whether_the_very_moment_is_seen(layout):
    states, events = table([10, 20], [20], [20, 20, 30])
    strict = ContextBank.build(states, events, torch.arange(3))
    inclusive = ContextBank.build(states, events, torch.arange(3), ties="inclusive")
    assert seen_rows(states, ask(strict, 20, -1, layout)) == [0]
    assert seen_rows(states, ask(strict, 21, -1, layout)) == [1, 2, 4]
    assert seen_rows(states, ask(inclusive, 20, -1, layout)) == [1, 2, 4]


@LAYOUTS
def test_before_the_first_event_nothing_is_seen_and_nothing_wraps(layout):
    states, events = table([10, 20], [15])
    for ties in ("strict", "inclusive"):
        bank = ContextBank.build(states, events, torch.arange(2), ties=ties)
        for time in (-5, 0, 9):
            context = ask(bank, time, -1, layout)
            assert not context.visible.any()
            assert not context.ages.any()
            # whatever is read by mistake is a row of zeros, not the newest state
            assert not context.combine(torch.ones(1, context.visible.shape[1]), context.states).any()
    # one user begins: the other must not answer with its, or the last, row
    assert seen_rows(states, ask(ContextBank.build(states, events, torch.arange(2)), 12, -1, layout)) == [0]


@LAYOUTS
def test_lag_and_age_are_measured_at_the_query(layout):
    states, events = table([0, 5 * DAY], [3 * DAY])
    lagged = ContextBank.build(states, events, torch.arange(2), lag_days=2)
    assert seen_rows(states, ask(lagged, 5 * DAY, -1, layout)) == [0]  # 3 days as of 3 days is a tie
    assert seen_rows(states, ask(lagged, 5 * DAY + 1, -1, layout)) == [0, 2]
    context = ask(lagged, 8 * DAY, -1, layout)
    assert context.ages[context.visible].tolist() == [3.0, 5.0]
    fresh = ContextBank.build(states, events, torch.arange(2), max_age_days=2)
    assert seen_rows(states, ask(fresh, 5 * DAY, -1, layout)) == [2]
    assert seen_rows(states, ask(fresh, 5 * DAY + 1, -1, layout)) == [1]


@LAYOUTS
def test_self_and_group_are_left_out(layout):
    states, events = table([1], [1], [1], [1], groups=[7, 7, -1, -1])
    users = torch.arange(4)
    alone = ContextBank.build(states, events, users, exclude_group=True)
    assert seen_rows(states, ask(alone, 5, 0, layout)) == [2, 3]
    assert seen_rows(states, ask(alone, 5, 2, layout)) == [0, 1, 3]  # -1 is no group
    assert seen_rows(states, ask(alone, 5, -1, layout)) == [0, 1, 2, 3]
    assert seen_rows(states, ask(ContextBank.build(states, events, users), 5, 1, layout)) == [0, 2, 3]
    with_self = ContextBank.build(states, events, users, exclude_self=False)
    assert seen_rows(states, ask(with_self, 5, 1, layout)) == [0, 1, 2, 3]
    assert not ask(ContextBank.build(states, events, torch.tensor([2])), 5, 2, layout).visible.any()


@LAYOUTS
def test_the_cap_keeps_the_recent_or_a_fixed_random_choice(layout):
    states, events = table([4], [2], [4], [3])
    recent = ContextBank.build(states, events, torch.arange(4), max_context=2)
    assert seen_rows(states, ask(recent, 9, -1, layout)) == [0, 2]
    assert seen_rows(states, ask(recent, 4, -1, layout)) == [1, 3]
    assert seen_rows(states, ask(recent, 3, -1, layout)) == [1]
    random = ContextBank.build(states, events, torch.arange(4), max_context=2, policy="random", seed=3)
    draws = {tuple(seen_rows(states, ask(random, time, -1, layout))) for time in range(5, 60)}
    assert {len(draw) for draw in draws} == {2}
    assert len(draws) == 6  # every pair of four: 55 draws miss one with probability 6 (5/6)^55 < 3e-4, seed fixed
    assert seen_rows(states, ask(random, 17, -1, layout)) == seen_rows(states, ask(random, 17, -1, "gathered"))


@LAYOUTS
def test_a_random_choice_by_words_of_ids_is_the_same_whoever_else_is_in_the_table(layout):
    """Later users sort in before, between and behind the others: rows move, what a query sees does not."""
    generator = torch.Generator().manual_seed(0)
    n_users, place = 40, torch.tensor([0, 0, 3, 17, 17, 40])
    words = torch.randint(-(2**62), 2**62, (n_users + len(place),), generator=generator)
    kept = torch.ones(n_users + len(place), dtype=torch.bool)
    kept[place + torch.arange(len(place))] = False
    times = torch.where(kept, 0, 10**6)
    states = torch.arange(len(kept)).float().unsqueeze(1)

    def seen(there, time, asker):
        events = {"times": times[there], "offsets": torch.arange(int(there.sum()) + 1), "words": words[there]}
        bank = ContextBank.build(
            states[there], events, torch.arange(int(there.sum())), max_context=5, policy="random", seed=2
        )
        row = int(there[:asker].sum()) if asker >= 0 else -1
        return seen_states(ask(bank, time, row, layout))

    askers = [-1, *kept.nonzero().squeeze(1).tolist()]
    whole, cut = ([seen(there, 7, asker) for asker in askers] for there in (torch.ones_like(kept), kept))
    assert whole == cut
    assert len({tuple(map(tuple, draw)) for draw in cut}) > 30, "a draw a query"


def test_words_are_kept_where_they_are_read_and_go_with_a_checkpoint():
    states, events = table([1], [1], [1])
    events["words"] = torch.tensor([5, -9, 3])
    assert not len(ContextBank.build(states, events, torch.arange(3), policy="random").words), "nothing is drawn"
    assert not len(ContextBank.build(states, events, torch.arange(3), max_context=1).words)
    bank = ContextBank.build(states, events, torch.arange(3), max_context=1, policy="random")
    assert torch.equal(ContextBank.from_state(bank.state_dict()).words, events["words"])
    with pytest.raises(ValueError, match="query users must be below 3, got 3"):
        ask(bank, 5, 3, "auto")


def test_a_checkpoint_from_before_there_were_words_is_read():
    """It kept what follows from the rest, too."""
    states, events = table([1, 2], [2])
    bank = ContextBank.build(states, events, torch.arange(2))
    state = bank.state_dict()
    del state["words"]
    old = ContextBank.from_state(state | {"next_times": bank.next_times})
    assert torch.equal(old.next_times, bank.next_times)
    assert seen_states(ask(old, 3, -1, "shared")) == seen_states(ask(bank, 3, -1, "shared"))


def test_prefixes_stop_and_the_published_off_by_one():
    states, events = table([1, 2, 3, 4], [2])
    users = torch.arange(2)
    assert ContextBank.build(states, events, users, min_prefix=3).event_rows.tolist() == [2, 3]
    assert ContextBank.build(states, events, users, stop=3).event_rows.tolist() == [0, 1, 4]
    assert ContextBank.build(states, events, users, drop_last_prefix=True).event_rows.tolist() == [0, 1, 2]
    bank = ContextBank.build(states, events, users, stop=3, drop_last_prefix=True)
    assert bank.event_rows.tolist() == [0]
    assert bank.next_times.tolist() == [FOREVER]


@LAYOUTS
def test_a_bank_without_any_event_sees_nothing(layout):
    states, events = table([], [5])
    context = ask(ContextBank.build(states, events, torch.tensor([0])), 9, 1, layout)
    assert context.visible.shape == (1, 1)
    assert not context.visible.any()


def test_no_queries():
    states, events = table([1], [5])
    none = torch.zeros(0, dtype=torch.int64)
    for layout in ("shared", "gathered", "auto"):
        assert ContextBank.build(states, events, torch.arange(2)).context(none, none, layout).visible.shape[0] == 0


def test_auto_takes_the_layout_that_moves_fewer_bytes():
    states, events = table(*[list(range(0, 4000, 40)) for _ in range(20)], d=16)
    bank = ContextBank.build(states, events, torch.arange(20))
    users = torch.full((8,), -1)
    assert bank.context(torch.arange(1000, 1008), users).rows is None
    assert bank.context(torch.arange(0, 4000, 500), users).rows is not None


def test_the_checkpoint_restores_sizes_rules_and_answers():
    states, events = table([10, 20, 20], [15, 30], [12], groups=[0, 0, 1])
    bank = ContextBank.build(
        states, events, torch.tensor([2, 0, 1]), ties="inclusive", lag_days=1e-10, exclude_group=True, max_context=2
    )
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    loaded = ContextBank.from_state(torch.load(file, weights_only=True))
    assert loaded.visibility == bank.visibility
    assert {name for name, _ in bank.named_parameters()} == set()
    times, users = torch.arange(5, 40), torch.arange(35) % 3
    for layout in ("shared", "gathered"):
        one, other = bank.context(times, users, layout), loaded.context(times, users, layout)
        for name in ("states", "visible", "ages", "users"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
    module = torch.nn.Module()
    module.bank = ContextBank.build(*table([1]), torch.tensor([0]))
    module.load_state_dict({f"bank.{name}": value for name, value in bank.state_dict().items()})
    assert torch.equal(module.bank.keys, bank.keys)


def test_refresh_takes_new_states_of_the_same_events_without_gradient():
    states, events = table([1, 2], [1], [3])
    bank = ContextBank.build(states, events, torch.tensor([0, 2]))
    fresh = torch.randn_like(states).requires_grad_()
    bank.refresh(fresh)
    assert torch.equal(bank.states, fresh.detach()[[0, 1, 3]])
    assert not bank.states.requires_grad


def test_live_states_receive_gradients_where_they_are_seen():
    states, events = table([1, 2], [1], [3])
    bank = ContextBank.build(states, events, torch.arange(3))
    rows = bank.rows_of(torch.tensor([2, 0]))
    assert rows.tolist() == [3, 0, 1]
    for layout in ("shared", "gathered"):
        fresh = torch.ones(3, 3, requires_grad=True)
        live = bank.states.index_copy(0, rows, fresh)
        context = bank.context(torch.tensor([3]), torch.tensor([1]), layout, states=live)
        context.combine(context.visible.float(), context.states).sum().backward()
        assert fresh.grad[:, 0].tolist() == [0.0, 0.0, 1.0]


def test_own_states_are_those_before_the_query():
    states, events = table([10, 20, 20], [], [5])
    users, times = torch.tensor([0, 0, 0, 0, 1, 2, 2]), torch.tensor([10, 11, 20, 21, 50, 5, 99])
    own, found, rows = own_states(states, events, users, times)
    assert rows.tolist() == [-1, 0, 0, 2, -1, -1, 3]
    assert found.tolist() == [False, True, True, True, False, False, True]
    assert torch.equal(own[found], states[rows[found]])
    assert not own[~found].any()
    assert own_states(states, events, users, times, "inclusive")[2].tolist() == [0, 0, 2, 2, -1, 3, 3]
    nothing = own_states(states[:0], {"times": times[:0], "offsets": torch.zeros(3).long()}, users[:2] * 0, times[:2])
    assert nothing[2].tolist() == [-1, -1]


def test_bisection_ends_on_ranges_of_every_length():
    times = torch.arange(40)
    stop = torch.arange(41)
    assert torch.equal(last_before(times, torch.zeros(41).long(), stop, torch.full((41,), 99)), stop - 1)
    assert (last_before(times, torch.zeros(41).long(), stop, torch.full((41,), -1)) == -1).all()


def test_samples_repeat_and_are_distinct():
    users = torch.arange(50) * 3
    drawn = sample_context_users(users, 10, seed=1)
    assert torch.equal(drawn, sample_context_users(users, 10, seed=1))
    assert not torch.equal(drawn, sample_context_users(users, 10, seed=2))
    assert torch.equal(drawn, drawn.unique())
    assert torch.isin(drawn, users).all()
    for all_of_them in (None, 50, 1000):
        assert torch.equal(sample_context_users(users.flip(0), all_of_them, seed=0), users)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gathered_products_and_their_gradients(dtype, monkeypatch):
    monkeypatch.setattr("lightning_modules.context.visible.GATHERED_BYTES", 64)  # several chunks
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 5, (7, 4), generator=generator)
    table_, query, weights = (
        torch.randn(*size, generator=generator, dtype=dtype).requires_grad_() for size in ((5, 3), (7, 3), (7, 4))
    )
    context = Context(table_, rows, rows >= 0, rows.float(), rows)
    for found, expected in (
        (context.dot(query, table_), torch.einsum("qr,qnr->qn", query, table_[rows])),
        (context.combine(weights, table_), torch.einsum("qn,qnk->qk", weights, table_[rows])),
    ):
        # sums of at most 4 products of numbers near 1, in another order
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda q, k: context.dot(q, k), (query, table_))
        assert torch.autograd.gradcheck(lambda w, v: context.combine(w, v), (weights, table_))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_prefix": 0}, "min_prefix must be at least 1, got 0"),
        ({"ties": "loose"}, "ties must be one of .*, got 'loose'"),
        ({"policy": "best"}, "policy must be one of .*, got 'best'"),
        ({"lag_days": -1.0}, "lag_days must be finite and at least 0, got -1.0"),
        ({"max_age_days": float("nan")}, "max_age_days must be finite and at least 0, got nan"),
        ({"max_context": 0}, "max_context must be at least 1, got 0"),
        ({"exclude_group": True}, "exclude_group needs events with groups"),
        ({"context_users": torch.zeros(0, dtype=torch.int64)}, "distinct and at least one, got 0"),
        ({"context_users": torch.tensor([0, 0])}, "must be distinct and at least one, got 2, 1 distinct"),
        ({"context_users": torch.tensor([0, 2])}, r"context users must be in 0..1, got 2"),
        ({"states": torch.zeros(2, 3)}, r"a row for each of 3 events, got shape \(2, 3\)"),
    ],
)
def test_wrong_arguments_end_in_one_line(arguments, message):
    states, events = table([1, 2], [1])
    with pytest.raises(ValueError, match=message) as error:
        ContextBank.build(**({"states": states, "events": events, "context_users": torch.arange(2)} | arguments))
    assert "\n" not in str(error.value)


def test_wrong_queries_end_in_one_line():
    states, events = table([1, 2], [1], groups=[0, 1])
    bank = ContextBank.build(states, events, torch.arange(2), exclude_group=True)
    with pytest.raises(ValueError, match="layout must be"):
        ask(bank, 1, 0, "wide")
    with pytest.raises(ValueError, match=r"shape \(Q,\), got \(2,\) and \(1,\)"):
        bank.context(torch.arange(2), torch.arange(1))
    with pytest.raises(ValueError, match="must be below 2, got 5"):
        ask(bank, 1, 5, "auto")
    with pytest.raises(ValueError, match="got one that is not"):
        bank.rows_of(torch.tensor([9]))
    with pytest.raises(ValueError, match=r"in 0..1, got -1"):
        own_states(states, events, torch.tensor([-1]), torch.tensor([3]))
    with pytest.raises(ValueError, match="earlier time after event 0"):
        ContextBank.build(*table([2, 1]), torch.tensor([0]), stop=2)
    with pytest.raises(ValueError, match="n_context_users must be at least 1, got 0"):
        sample_context_users(torch.arange(3), 0, 0)


@pytest.mark.parametrize("users", [([], [5, 3]), ([5, 3], []), ([], [], [1, 2], [], [5, 3], [])])
def test_times_are_checked_whoever_has_no_events(users):
    states, events = table(*users)
    with pytest.raises(ValueError, match=f"earlier time after event {len(events['times']) - 2}"):
        ContextBank.build(states, events, torch.tensor([0]))


def test_the_next_user_may_begin_earlier_whoever_has_no_events():
    states, events = table([], [4, 5], [], [2], [], [1], [])
    assert ContextBank.build(states, events, torch.arange(7)).times.tolist() == [4, 5, 2, 1]


def test_rules_are_plain_values():
    assert Visibility(**Visibility(lag=3, max_context=2).plain()) == Visibility(lag=3, max_context=2)


def test_those_who_come_later_are_drawn_at_the_same_rate_and_move_nobody():
    draws = torch.cat(
        [torch.full((1000,), -1.0), torch.rand(1000, generator=torch.Generator().manual_seed(0))]
    ).double()
    everybody = torch.arange(2000)
    found = drawn_context_users(everybody, 250, 7, draws)
    assert torch.equal(found[found < 1000], sample_context_users(torch.arange(1000), 250, 7))
    later = found[found >= 1000]
    # binomial(1000, 1/4), s.d. 14: 4 of them
    assert abs(len(later) - 250) < 56
    fewer = drawn_context_users(torch.arange(1500), 250, 7, draws)
    assert torch.equal(fewer, found[found < 1500])
    assert torch.equal(drawn_context_users(everybody, 250, 7, draws.view(torch.int64)), found), "bit for bit"
    other = drawn_context_users(everybody, 250, 8, draws)
    assert not torch.equal(other[other >= 1000], later), "another seed lets others in"
    assert torch.equal(drawn_context_users(everybody, None, 7, draws), everybody)
    assert torch.equal(drawn_context_users(everybody, 1000, 7, draws), everybody), "all who were there: all who come"
    assert torch.equal(drawn_context_users(everybody, 250, 7, None), sample_context_users(everybody, 250, 7))
    newcomers = torch.arange(1000, 1100)
    assert len(drawn_context_users(newcomers, 10, 7, draws)) == 10
