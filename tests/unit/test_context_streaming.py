import io

import pytest
import torch
from torch import nn

from lightning_modules.context import StreamingBank
from lightning_modules.context.bank import ContextBank
from lightning_modules.context.prefix_sums import PrefixMean, PrefixMoments
from lightning_modules.context.refresh import Ema, EveryKSteps, Live, PerEpoch, Static, drift
from lightning_modules.context.rules import Visibility

WORDS = torch.tensor([7, -3, 2**62, 11, -(2**61)])


def stream(n_users=5, n_events=24, d=3, seed=0):
    """Users, times (many of them equal) and states of events in order of time."""
    generator = torch.Generator().manual_seed(seed)
    times = torch.randint(0, 15, (n_events,), generator=generator).sort().values
    return torch.randint(0, n_users, (n_events,), generator=generator), times, torch.randn(n_events, d)


def rebuilt(users, times, states, n_users, **rules):
    """A bank from scratch of the events so far."""
    order = users.argsort(stable=True)
    counts = torch.bincount(users, minlength=n_users)
    events = {
        "times": times[order],
        "offsets": torch.cat([torch.zeros(1).long(), counts.cumsum(0)]),
        "groups": torch.arange(n_users) % 2,
        "words": WORDS,
    }
    return ContextBank.build(states[order], events, torch.tensor([0, 1, 3, 4]), **rules)


@pytest.mark.parametrize("ties", ["strict", "inclusive"])
@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"lag": 2, "max_age": 6},
        {"exclude_self": False, "exclude_group": True},
        {"max_context": 2},
        {"max_context": 2, "policy": "random", "seed": 3},
    ],
)
def test_a_stream_answers_as_a_bank_built_anew_at_every_event(ties, rules):
    users, times, states = stream()
    visibility = Visibility(ties=ties, **rules)
    users_of_context, groups = torch.tensor([0, 1, 3, 4]), torch.arange(5) % 2
    bank = StreamingBank(users_of_context, 3, visibility=visibility, min_prefix=2, groups=groups, words=WORDS)
    plain = {name: value for name, value in rules.items() if name not in ("lag", "max_age")}
    plain |= {f"{name}_days": rules[name] / 86_400e6 for name in ("lag", "max_age") if name in rules}
    asked, askers = (
        grid.flatten() for grid in torch.meshgrid(torch.arange(-1, 18, 2), torch.arange(-1, 5), indexing="ij")
    )
    for n in range(1, len(times) + 1):
        bank.append(int(users[n - 1]), int(times[n - 1]), states[n - 1])
        whole = rebuilt(users[:n], times[:n], states[:n], 5, ties=ties, min_prefix=2, **plain)
        found, expected = bank.context(asked, askers), whole.context(asked, askers, "gathered")
        if not len(whole.times):
            assert not found.visible.any()
            continue
        for name in ("visible", "ages", "users"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert torch.equal(found.states[found.rows], expected.states[expected.rows])


def positive(states):
    return nn.functional.elu(states @ torch.tensor([[1.0, -0.5], [0.3, 2.0], [-1.0, 0.7]]).to(states)) + 1


@pytest.mark.parametrize("rules", [{}, {"ties": "inclusive"}, {"lag": 2}, {"exclude_self": False}])
@pytest.mark.parametrize("block", [1, 3, 32])
def test_sums_that_grow_with_a_stream_are_those_built_anew_at_every_event(rules, block):
    users, times, states = stream(n_events=40, seed=1)
    plain = {name: value for name, value in rules.items() if name != "lag"}
    plain |= {"lag_days": rules["lag"] / 86_400e6} if "lag" in rules else {}
    bank = StreamingBank(torch.tensor([0, 1, 3, 4]), 3, visibility=Visibility(**rules), min_prefix=2)
    sums = PrefixMean.build(bank, block), PrefixMoments.build(bank, positive, block)
    asked, askers = (
        grid.flatten() for grid in torch.meshgrid(torch.arange(-1, 18), torch.arange(-1, 6), indexing="ij")
    )
    query = positive(torch.randn(len(asked), 3))
    shown = 0
    for n in range(1, len(times) + 1):
        bank.append(int(users[n - 1]), int(times[n - 1]), states[n - 1])
        whole = rebuilt(users[:n], times[:n], states[:n], 5, min_prefix=2, **plain)
        anew = PrefixMean.build(whole, block), PrefixMoments.build(whole, positive, block)
        if n % 5 and n < len(times):
            continue  # several events at a time
        for found, expected in (
            (sums[0].mean(asked, askers), anew[0].mean(asked, askers)),
            (sums[1].lookup(query, asked, askers), anew[1].lookup(query, asked, askers)),
        ):
            assert torch.equal(found[1], expected[1])
            # float32 sums of at most 40 states of size 3, in another order where times are equal
            torch.testing.assert_close(found[0], expected[0], rtol=0, atol=2e-5)
            shown += int((found[1] > 0).sum())
        assert not sums[1].lookup(query, asked, askers)[2].any()
    assert shown > 500
    assert sums[0].n_blocks == sums[1].n_blocks == bank.n_events // block
    assert sums[0].n_bytes > bank.states.nbytes


def test_sums_refuse_a_stream_that_goes_back_in_time_or_hides_somebody():
    bank = StreamingBank(torch.tensor([0, 1]), 2)
    bank.append(0, 5, torch.ones(2))
    mean = PrefixMean.build(bank)
    bank.append(1, 5, torch.ones(2))
    assert mean.mean(torch.tensor([6]), torch.tensor([2]))[1].tolist() == [2]
    bank.append(1, 7, torch.ones(2))
    bank.append(0, 6, torch.ones(2))
    with pytest.raises(ValueError, match="take events of all users in order of time, got 6 after 7"):
        mean.mean(torch.tensor([9]), torch.tensor([2]))
    with pytest.raises(ValueError, match="cannot apply max_age_days"):
        PrefixMean.build(StreamingBank(torch.tensor([0]), 2, visibility=Visibility(max_age=3)))


def test_a_stream_grows_and_refuses_to_go_back():
    bank = StreamingBank(torch.tensor([4]), 2)
    for time in range(200):
        bank.append(4, time, torch.full((2,), float(time)))
    bank.append(3, 0, torch.zeros(2))  # nobody's context
    assert bank.times.tolist() == list(range(200))
    assert bank.states[:, 0].tolist() == list(map(float, range(200)))
    with pytest.raises(ValueError, match="events of user 4 must not go back in time, got 3 after 199"):
        bank.append(4, 3, torch.zeros(2))
    with pytest.raises(ValueError, match=r"state must have shape \(2,\), got \(3,\)"):
        bank.append(4, 300, torch.zeros(3))
    with pytest.raises(ValueError, match="exclude_group needs groups"):
        StreamingBank(torch.tensor([0]), 2, visibility=Visibility(exclude_group=True))
    with pytest.raises(ValueError, match="min_prefix must be at least 1, got 0"):
        StreamingBank(torch.tensor([0]), 2, min_prefix=0)


def test_a_saved_stream_goes_on_where_it_was_and_moves_whole():
    users, times, states = stream()
    rules = Visibility(max_context=2, policy="random", exclude_group=True)
    bank = StreamingBank(
        torch.tensor([0, 1, 3, 4]), 3, visibility=rules, min_prefix=2, groups=torch.arange(5) % 2, words=WORDS
    )
    asked, askers = torch.arange(18), torch.arange(18) % 5
    for row in range(12):
        bank.append(int(users[row]), int(times[row]), states[row])
    file = io.BytesIO()
    kept = bank.state_dict()
    torch.save(kept, file)
    file.seek(0)
    loaded = StreamingBank.from_state(torch.load(file, weights_only=True))
    assert len(kept["_times"]) == bank.n_events < len(bank._times), "room for events to come is not kept"
    again = StreamingBank.from_state(kept)
    for row in range(12, 24):
        for one in (bank, loaded):
            one.append(int(users[row]), int(times[row]), states[row])
    before = again.context(asked, askers)
    assert again.n_events < bank.n_events, "what goes on does not change what was saved"
    one, other = bank.context(asked, askers), loaded.context(asked, askers)
    for name in ("states", "rows", "visible", "ages", "users"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert not torch.equal(before.visible, one.visible)
    assert {value.device.type for value in vars(bank.to("meta")).values() if torch.is_tensor(value)} == {"meta"}


def due_steps(policy, n_epochs=3, steps_an_epoch=4):
    found = []
    for step in range(n_epochs * steps_an_epoch):
        if policy.due(step, step // steps_an_epoch):
            found.append(step)
            policy.done(step, step // steps_an_epoch)
    return found


def test_policies_are_due_when_they_say():
    assert due_steps(Static()) == [0]
    assert due_steps(EveryKSteps(5)) == [0, 5, 10]
    assert due_steps(PerEpoch()) == [0, 4, 8]
    assert due_steps(Ema()) == [0, 4, 8]
    assert due_steps(Live(2)) == [0, 4, 8]


def test_policies_go_on_where_they_stopped():
    policy, later = EveryKSteps(5), EveryKSteps(5)
    policy.done(3, 0)
    assert policy.age_steps(7) == 4
    later.load_state_dict(policy.state_dict())
    assert next(step for step in range(3, 12) if later.due(step, 0)) == 8


def test_the_momentum_copy_follows_slowly():
    encoder = nn.BatchNorm1d(2)
    policy = Ema(momentum=0.9)
    assert policy.source(encoder) is not encoder
    with torch.no_grad():
        encoder.weight.fill_(2.0)
        encoder.running_mean.fill_(3.0)
    policy.follow(encoder)
    copy = policy.source(encoder)
    # 0.9 * 1 + 0.1 * 2 in float32
    torch.testing.assert_close(copy.weight, torch.full((2,), 1.1))
    assert copy.running_mean.tolist() == [3.0, 3.0]
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    assert encoder.weight.requires_grad
    assert Static().source(encoder) is encoder


def test_a_policy_says_whose_states_the_bank_of_a_test_holds():
    pretrained, tuned = nn.Linear(2, 2), nn.Linear(2, 2)
    assert Static().for_test(pretrained, tuned) is pretrained
    for policy in (EveryKSteps(3), PerEpoch(), Live(2)):
        assert policy.for_test(pretrained, tuned) is tuned
    slow = Ema()
    assert slow.for_test(pretrained, tuned) is pretrained, "nothing was trained"
    copy = slow.source(tuned)
    assert slow.for_test(pretrained, tuned) is copy is not tuned


def test_live_users_change_with_the_step_and_repeat_with_the_seed():
    users = torch.arange(30)
    drawn = [Live(4, seed=1).users(users, step).tolist() for step in range(10)]
    assert drawn == [Live(4, seed=1).users(users, step).tolist() for step in range(10)]
    assert len({tuple(each) for each in drawn}) == 10
    assert all(len(set(each)) == 4 for each in drawn)


def test_drift_is_the_mean_turn():
    stored = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    assert drift(stored, stored) == 0
    # a right angle, a half turn, nothing, nothing; cosines in float64
    assert drift(stored, torch.tensor([[0.0, 5.0], [-1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])) == pytest.approx(0.75)
    assert drift(stored[:0], stored[:0]) == 0
    with pytest.raises(ValueError, match="share a shape"):
        drift(stored, stored[:2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EveryKSteps(0), "k must be at least 1, got 0"),
        (lambda: Ema(1.5), r"momentum must be in 0..1, got 1.5"),
        (lambda: Live(0), "n_live must be at least 1, got 0"),
    ],
)
def test_wrong_policies_end_in_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()
