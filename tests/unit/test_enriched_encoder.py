"""EnrichedEncoder by hand: which states are asked, what is aggregated of them, and where shortcuts give the same."""

from functools import partial

import pytest
import torch
from torch import nn

from datamodules.synthetic_events import regime
from lightning_modules.context import (
    Adding,
    Attention,
    AttentionHawkes,
    Concat,
    Context,
    ContextRules,
    EnrichedEncoder,
    ExpHawkes,
    ExpLearnableHawkes,
    KernelAttention,
    LearnableAttention,
    LearnableAttentionHawkes,
    LearnableHawkes,
    LinearKernel,
    Max,
    Mean,
    SymmetricAttention,
)
from lightning_modules.context import enriched as module
from lightning_modules.context.bank import ContextBank
from lightning_modules.context.enriched import Asked, first_sequences, moments
from lightning_modules.context.evaluation import Encoded
from lightning_modules.losses import CoLES, NextEvent
from lightning_modules.networks import EventEncoder, RecurrentEncoder
from lightning_modules.networks.event_encoders import EventEmbedding

DAY = 86_400_000_000
FACTS = {"vocabulary_sizes": [14], "n_numeric": 1}
SECOND = 1 / 86_400


class LastEvent(EventEncoder):
    """State after an event: its category and its number, and nothing of what was before; the start is -1."""

    def __init__(self):
        super().__init__(EventEmbedding([14], 1, d_embedding=2), d_model=2)

    def advance(self, batch, memory):
        read = torch.cat([batch["categorical"].float(), batch["numeric"]], -1)
        return read.masked_fill(~batch["mask"].unsqueeze(-1), 0.0), memory

    def unroll(self, vectors, memory):
        raise NotImplementedError

    def initial_state(self):
        return torch.full((2,), -1.0)


@pytest.fixture(scope="module")
def events():
    return regime(0, n_users=20, n_days=30, events_per_day=1.0, labels_per_day=0.1).batch()["events"]


def enriched(aggregators, encoder=None, **settings):
    return EnrichedEncoder(
        encoder or LastEvent(),
        aggregators,
        **{"combination": Concat, "objective": NextEvent, "median_gap": 1.5, **FACTS} | settings,
    ).eval()


def queries(events, n=60, seed=0):
    """Queries of anybody in no order, some at the very time of an event, some before the first."""
    random = torch.Generator().manual_seed(seed)
    times = events["times"]
    between = torch.randint(int(times.min()) - DAY, int(times.max()) + DAY, (n,), generator=random)
    at_events = times[torch.randint(len(times), (n,), generator=random)]
    users = torch.randint(len(events["offsets"]) - 1, (2 * n,), generator=random)
    return users, torch.cat([between, at_events])


def visible_rows(events, user, time, context_users, rules):
    """By a loop: the last admissible event of each context user."""
    found = []
    for other in context_users.tolist():
        if other == user and not rules.include_self:
            continue
        rows = range(int(events["offsets"][other]), int(events["offsets"][other + 1]))
        known = [
            row
            for row in rows
            if events["times"][row] < time or (rules.ties == "inclusive" and events["times"][row] == time)
        ]
        if known:
            found.append(known[-1])
    return found


@pytest.mark.parametrize(
    "rules",
    [ContextRules(n_users=None), ContextRules(n_users=7, seed=3), ContextRules(ties="inclusive", include_self=True)],
)
def test_contexts_are_those_of_a_loop(events, rules):
    everybody = torch.arange(len(events["offsets"]) - 1)
    model = enriched(
        {"mean": Mean, "max": Max, "decayed": partial(ExpHawkes, theta=2.0, normalise="mean")}, rules=rules
    )
    states = model.encode(events)
    bank = model.bank(states, events, everybody)
    users, times = queries(events)
    own = model.own(states, events, users, times)
    values = {name: model.contexts(name, own.states, bank, users, times) for name in model.aggregators}
    for row, (user, time) in enumerate(zip(users.tolist(), times.tolist(), strict=True)):
        strictly = visible_rows(events, None, time, torch.tensor([user]), ContextRules())
        expected = states[strictly[0]] if strictly else model.encoder.initial_state()
        assert torch.equal(own.states[row], expected)
        assert int(own.rows[row]) == (strictly[0] if strictly else -1)
        seen = visible_rows(events, user, time, bank.context_users, rules)
        assert {float(vectors[row, 2]) for vectors in values.values()} == {float(not seen)}, "the flag"
        if not seen:
            assert all(not bool(found[row, :2].any()) for found in values.values())
            continue
        of, ages = states[seen].double(), (time - events["times"][seen]).double() / DAY
        # float32 means of at most 20 numbers of size 14
        torch.testing.assert_close(values["mean"][row, :2].double(), of.mean(0), rtol=0, atol=2e-5)
        assert torch.equal(values["max"][row, :2].double(), of.amax(0))
        expected = ((-ages / 2).exp().unsqueeze(1) * of).mean(0)
        torch.testing.assert_close(values["decayed"][row, :2].double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("n_users", [None, 7])
def test_a_flag_tells_where_nobody_is_visible(events, n_users):
    """A last column, in what is looked up and in sums over time; what is trained does not read it."""
    everybody = torch.arange(len(events["offsets"]) - 1)
    users, times = queries(events)
    found = {}
    for flag in (False, True):
        torch.manual_seed(0)
        factories = {"mean": Mean, "max": Max, "linear": partial(LinearKernel, rank=5)}
        model = enriched(factories, rules=ContextRules(n_users=n_users, empty_flag=flag))
        states = model.encode(events)
        bank = model.bank(states, events, everybody)
        own = model.own(states, events, users, times).states
        found[flag] = {name: model.contexts(name, own, bank, users, times) for name in factories}
        assert model.branch("max").combination.d_out == model.combined("max", own, found[flag]["max"]).shape[1] - flag
    for name, vectors in found[True].items():
        assert torch.equal(vectors[:, :-1], found[False][name]), name
        seen = [
            visible_rows(events, *asked, bank.context_users, ContextRules())
            for asked in zip(users.tolist(), times.tolist(), strict=True)
        ]
        assert vectors[:, -1].tolist() == [float(not rows) for rows in seen], name
        assert 0 < vectors[:, -1].sum() < len(users)


@pytest.mark.parametrize("name", ["items", "type", "train", "training", "forward"])
def test_names_that_modules_of_torch_have_are_refused(name):
    with pytest.raises(ValueError, match=f"an aggregator cannot be named '{name}', as modules of torch"):
        enriched({name: Mean})


def test_sums_over_time_give_what_the_look_up_gives(events, monkeypatch):
    """Mean and linear kernel over all users have a shortcut; a limit that hides nothing takes the long way."""
    everybody = torch.arange(len(events["offsets"]) - 1)
    users, times = queries(events)
    found = {}
    for name, rules in (("sums", ContextRules(n_users=None)), ("look-up", ContextRules(n_users=10_000))):
        torch.manual_seed(0)
        model = enriched(
            {"mean": Mean, "linear": partial(LinearKernel, rank=5)}, RecurrentEncoder(d_model=8, **FACTS), rules=rules
        )
        with torch.no_grad():
            model.branch("mean").aggregator.empty_context.fill_(7.0)
        summed = []
        monkeypatch.setattr(
            module.PrefixMean, "build", classmethod(lambda cls, bank, done=summed: done.append(cls) or cls(bank))
        )
        states = model.encode(events)
        bank = model.bank(states, events, everybody)
        own = model.own(states, events, users, times).states
        found[name] = [model.contexts(one, own, bank, users, times) for one in ("mean", "linear")]
        assert len(summed) == (name == "sums")
    for one, other in zip(*found.values(), strict=True):
        # float64 sums against float32 ones of 20 states below 1
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)
    first = times < events["times"].min()
    assert first.any()
    assert bool((found["sums"][0][first, :-1] == 7).all()), "nobody was there before the first event"


def test_a_sum_is_no_shortcut_for_the_rows_that_matter_most(events):
    everybody = torch.arange(len(events["offsets"]) - 1)
    users, times = queries(events)
    found = []
    for top_k, n_users in ((2, None), (2, 10_000), (None, None)):
        torch.manual_seed(0)
        model = enriched(
            {"linear": partial(LinearKernel, rank=5, top_k=top_k)},
            RecurrentEncoder(d_model=8, **FACTS),
            rules=ContextRules(n_users=n_users),
        )
        states = model.encode(events)
        own = model.own(states, events, users, times).states
        found.append(model.contexts("linear", own, model.bank(states, events, everybody), users, times))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=1e-3)


@pytest.mark.parametrize("kind", ["elu", "random"])
def test_long_states_weigh_the_same_in_fit_and_in_test(events, kind):
    """Random features of long states span more than a sum in float32 can hold, the query's own row above all."""
    everybody = torch.arange(len(events["offsets"]) - 1)
    users, times = queries(events)
    model = enriched({"linear": partial(LinearKernel, rank=64, kind=kind)}, rules=ContextRules(n_users=None))
    states = 8 * model.encode(events)
    bank = model.bank(states, events, everybody)
    own = model.own(states, events, users, times).states
    found = model.contexts("linear", own, bank, users, times)
    trained_on = model.branch("linear").aggregator(own, bank.context(times, users))
    assert states.norm(dim=1).max() > 16
    torch.testing.assert_close(found[:, :-1], trained_on, rtol=1e-4, atol=1e-4 * states.abs().max().item())


@pytest.mark.parametrize("bias", [-60.0, -200.0, -1e4])
def test_a_linear_kernel_whose_features_round_to_nothing_is_read_in_logarithms(events, bias):
    """0 / 0 by sums over time, where training saw a weighted mean."""
    everybody = torch.arange(len(events["offsets"]) - 1)
    users, times = queries(events)
    model = enriched({"linear": partial(LinearKernel, rank=4)}, rules=ContextRules(n_users=None, empty_flag=True))
    aggregator = model.branch("linear").aggregator
    with torch.no_grad():
        aggregator.map.layers[0].bias.fill_(bias)
        aggregator.map.layers[0].weight.mul_(0.1)
        aggregator.empty_context.fill_(7.0)
    states = model.encode(events)
    bank, own = model.bank(states, events, everybody), model.own(states, events, users, times).states
    found = model.contexts("linear", own, bank, users, times)
    assert found.isfinite().all()
    # float64 sums against float32 ones, of at most 20 states of size 14
    torch.testing.assert_close(found[:, :-1], aggregator(own, bank.context(times, users)), rtol=1e-4, atol=1e-4)
    nobody = found[:, -1] == 1
    assert 0 < int(nobody.sum()) < len(users)
    assert bool((found[nobody, :-1] == 7).all())


def test_sums_over_time_are_in_full_precision_under_autocast(events):
    everybody = torch.arange(len(events["offsets"]) - 1)
    users, times = queries(events)
    model = enriched(
        {"mean": Mean, "linear": partial(LinearKernel, rank=5)},
        RecurrentEncoder(d_model=8, **FACTS),
        rules=ContextRules(n_users=None),
    )
    states = model.encode(events)
    bank, own = model.bank(states, events, everybody), model.own(states, events, users, times).states
    for name in model.aggregators:
        plain = model.contexts(name, own, bank, users, times)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model.contexts(name, own, bank, users, times), plain), name


def test_before_anybody_did_anything_the_declared_vector_is_returned(events):
    model = enriched({"kernel": KernelAttention, "max": Max}, RecurrentEncoder(d_model=8, **FACTS))
    random = enriched({"kernel": KernelAttention}, rules=ContextRules(before_first="random", empty_flag=False))
    users, early = torch.tensor([0, 3]), torch.full((2,), int(events["times"].min()))
    everybody = torch.arange(len(events["offsets"]) - 1)
    for one in (model, random):
        states = one.encode(events)
        own = one.own(states, events, users, early)
        assert own.rows.tolist() == [-1, -1]
        assert torch.equal(own.states, one.encoder.initial_state().detach().expand(2, -1))
        for name in one.aggregators:
            vector = one.branch(name).aggregator.empty_context
            found = one.contexts(name, own.states, one.bank(states, events, everybody), users, early)
            declared = vector.detach() if one is random else torch.cat([vector.detach(), torch.ones(1)])
            assert torch.equal(found, declared.expand(2, -1))
    vector = random.branch("kernel").aggregator.empty_context
    assert not vector.requires_grad
    assert 0 <= float(vector.detach().min()) < float(vector.detach().max()) <= 1, "uniform, as released"
    branch = model.branch("kernel")
    bank = model.bank(model.encode(events), events, everybody)
    branch.enrich(torch.zeros(2, 8), bank.context(early, users)).sum().backward()
    gradients = [parameter.grad for parameter in branch.aggregator.parameters() if parameter.grad is not None]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert torch.equal(branch.aggregator.empty_context.grad, torch.full((8,), 2.0))


def sequences(lengths):
    steps = torch.arange(max(lengths))
    mask = steps < torch.tensor(lengths).unsqueeze(1)
    times = torch.where(mask, 100 * torch.arange(len(lengths)).unsqueeze(1) + steps, 0)
    return {
        "categorical": torch.where(mask, 2 + steps % 5, 0).unsqueeze(-1),
        "numeric": mask.unsqueeze(-1).float(),
        "times": times,
        "mask": mask,
        "users": torch.arange(len(lengths)),
        "starts": torch.zeros(len(lengths), dtype=torch.int64),
    }


def test_what_is_asked_of_a_batch():
    batch = sequences([3, 1, 5, 2])
    steps = Asked.by(NextEvent(d=2, **FACTS), batch, 1000)
    assert steps.times.tolist() == [0, 1, 200, 201, 202, 203, 300], "steps that another follows"
    assert steps.users.tolist() == [0, 0, 2, 2, 2, 2, 3]
    assert steps.states(LastEvent())[:, 0].tolist() == [2, 3, 2, 3, 4, 5, 2]
    targets = Asked.by(NextEvent(d=2, **FACTS, at="target"), batch, 1000)
    assert targets.times.tolist() == [1, 2, 201, 202, 203, 204, 301]
    assert torch.equal(targets.users, steps.users)
    last = Asked.by(CoLES(d=2, **FACTS), batch, 2)
    assert last.times.tolist() == [2, 100, 204, 301], "the last valid step, not the last column"
    assert last.states(LastEvent())[:, 0].tolist() == [4, 2, 6, 3]
    asked = Asked.by(CoLES(d=2, **FACTS), batch | {"query_times": torch.tensor([9, 8, 7, 6])}, 2)
    assert asked.times.tolist() == [9, 8, 7, 6], "a query has its own moment"


@pytest.mark.parametrize(("most", "kept"), [(1, 1), (3, 1), (4, 2), (9, 3), (100, 4)])
def test_a_batch_is_cut_to_whole_sequences(most, kept):
    batch = sequences([3, 1, 5, 2])
    assert first_sequences(batch, most)["users"].tolist() == list(range(kept))
    assert Asked.by(NextEvent(d=2, **FACTS), batch, most).batch["users"].tolist() == list(range(kept))
    assert moments(batch).tolist() == [2, 100, 204, 301]


def test_the_loss_is_the_objective_of_own_state_and_context(events):
    """Against the objective of vectors put together step by step."""
    model = enriched({"mean": Mean}, RecurrentEncoder(d_model=8, **FACTS))
    branch = model.branch("mean")
    rows = [int(events["offsets"][user]) for user in (2, 5)]
    batch = sequences([4, 3])
    for name in ("categorical", "numeric", "times"):
        for place, (row, length) in enumerate(zip(rows, (4, 3), strict=True)):
            batch[name][place, :length] = events[name][row : row + length]
    batch["users"] = torch.tensor([2, 5])
    asked = Asked.by(branch.objective, batch, 100)
    bank = model.bank(model.encode(events), events, torch.arange(len(events["offsets"]) - 1))
    query = asked.states(model.encoder)
    found = branch.loss(query, bank.context(asked.times, asked.users), asked)

    z = torch.zeros(2, 4, 16)
    steps = model.encoder.encode_steps(batch)
    for place, length in enumerate((4, 3)):
        for step in range(length - 1):
            context = bank.context(batch["times"][place, step : step + 1], batch["users"][place : place + 1])
            seen = context.states[context.visible[0] if context.rows is None else context.rows[0][context.visible[0]]]
            z[place, step] = torch.cat([steps[place, step], seen.mean(0)])
    # float32 means in another order
    torch.testing.assert_close(found, branch.objective(z, batch), rtol=1e-5, atol=1e-6)


def test_who_learns():
    names = {"mean": Mean, "kernel": KernelAttention}
    frozen = enriched(names)
    assert [frozen.branch(name).learns for name in frozen.branches] == [False, True]
    assert frozen.aggregators == ["mean", "kernel"]
    tuned = enriched(names, tune=True)
    assert list(tuned.branches) == ["own", "mean", "kernel"]
    assert tuned.aggregators == ["mean", "kernel"]
    assert all(tuned.branch(name).learns for name in tuned.branches)
    assert tuned.encoder_of("mean") is not tuned.encoder
    assert tuned.encoder_of("shared") is tuned.encoder
    assert frozen.encoder_of("mean") is frozen.encoder


def test_tuned_branches_begin_at_the_pretrained_weights():
    model = enriched({"mean": Mean}, RecurrentEncoder(d_model=8, **FACTS), tune=True)
    nn.init.constant_(model.encoder.start, 3.0)
    assert not torch.equal(model.encoder_of("mean").start, model.encoder.start)
    model.start_tuning()
    assert torch.equal(model.encoder_of("mean").start, model.encoder.start)
    assert torch.equal(model.encoder_of("own").start, model.encoder.start)


def test_weights_of_a_branch_do_not_depend_on_the_others():
    def kernel(*names, seed=1):
        torch.manual_seed(seed)
        torch.rand(len(names))  # whatever was drawn before
        model = enriched(dict.fromkeys(names, KernelAttention))
        return model.branch("kernel").aggregator.phi.layers[0].weight

    assert torch.equal(kernel("kernel"), kernel("a", "b", "kernel"))
    assert not torch.equal(kernel("kernel"), kernel("kernel", seed=2))
    torch.manual_seed(1)
    both = enriched({"kernel": KernelAttention, "twin": KernelAttention})
    first, second = (both.branch(name).aggregator.phi.layers[0].weight for name in ("kernel", "twin"))
    assert not torch.equal(first, second)


OURS = {
    "ties": "strict",
    "include_self": False,
    "min_prefix": 1,
    "drop_last_prefix": False,
    "window": None,
    "before_first": "learned",
    "empty_flag": True,
}
PUBLISHED = {
    "ties": "inclusive",
    "include_self": True,
    "min_prefix": 15,
    "drop_last_prefix": True,
    "window": 100,
    "before_first": "random",
    "empty_flag": False,
}


def test_the_published_rules_are_flags_alone():
    few = {"n_users": 300, "max_rows": 500}
    for published, values in ((True, PUBLISHED), (False, OURS)):
        assert ContextRules(**few).settled(published=published) == ContextRules(**few, **values)
        assert enriched({"mean": Mean}, published=published).rules == ContextRules(**values)


def test_a_rule_that_is_given_stands_even_where_it_is_ours():
    given = ContextRules(**OURS | {"window": 7})
    assert given.settled(published=True) == given


RELEASED = {
    "attention": (Attention, {"scale": 1.0}),
    "learnable_attention": (LearnableAttention, {"scale": 1.0, "bias": True}),
    "symmetric_attention": (partial(SymmetricAttention, rank=5), {"scale": 1.0, "bias": True}),
    "kernel": (partial(KernelAttention, rank=5), {"scale": 1.0}),
    "exp_hawkes": (ExpHawkes, {"theta": SECOND, "normalise": "mean"}),
    "exp_learnable_hawkes": (ExpLearnableHawkes, {"theta": SECOND, "normalise": "mean"}),
    "learnable_hawkes": (LearnableHawkes, {"theta": SECOND, "normalise": "mean", "age": "linear"}),
    "attention_hawkes": (AttentionHawkes, {"scale": 1.0, "theta": SECOND}),
    "learnable_attention_hawkes": (LearnableAttentionHawkes, {"scale": 1.0, "theta": SECOND, "bias": True}),
}
GIVEN = {"scale": 0.5, "theta": 3.0, "normalise": "sum", "bias": False, "age": "log"}


def told(aggregator):
    """Plain settings of an aggregator, and the sizes of its weights."""
    plain = {name: value for name, value in vars(aggregator).items() if isinstance(value, float | int | str)}
    theta = {"theta": float(aggregator.decay.theta)} if hasattr(aggregator, "decay") else {}
    return plain | theta, {name: value.shape for name, value in aggregator.named_parameters()}


def test_published_aggregators_take_what_is_not_given_from_the_released_code(events):
    """By the flag alone as by hand, weights included; what is given stands; without the flag nothing moves."""
    factories = {name: factory for name, (factory, _) in RELEASED.items()} | {"mean": Mean, "linear": LinearKernel}
    by_hand = {name: partial(factory, **released) for name, (factory, released) in RELEASED.items()}
    torch.manual_seed(0)
    found, expected = (enriched(one, published=True) for one in (factories, by_hand | {"mean": Mean}))
    for name, (factory, released) in RELEASED.items():
        one, other = (model.branch(name).aggregator for model in (found, expected))
        assert told(one) == told(other), name
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items()), name
        given = {argument: GIVEN[argument] for argument in released}
        kept = enriched({name: partial(factory, **given)}, published=True).branch(name).aggregator
        assert told(kept) == told(enriched({name: partial(factory, **given)}).branch(name).aggregator), name
        assert told(kept) != told(one), name
    kernel, decayed = (enriched(factories).branch(name).aggregator for name in ("kernel", "exp_hawkes"))
    assert (kernel.scale, float(decayed.decay.theta), decayed.normalise) == (5**-0.5, 1.5, "sum")


def test_a_window_cuts_the_states_of_others_and_never_the_own_history(events):
    """The state of a sum over all events: of others the last three, of oneself all."""

    class Sum(LastEvent):
        def advance(self, batch, memory):
            read = torch.cat([batch["categorical"].float(), batch["numeric"]], -1).cumsum(1)
            return read.masked_fill(~batch["mask"].unsqueeze(-1), 0.0), memory

    model = enriched({"mean": Mean}, Sum(), rules=ContextRules(window=3))
    user = int(events["offsets"].diff().argmax())
    rows = slice(int(events["offsets"][user]), int(events["offsets"][user + 1]))
    whole = torch.cat([events["categorical"][rows].float(), events["numeric"][rows]], 1)
    asked = torch.tensor([user]), events["times"][rows][-1:] + 1
    encoded = Encoded(model, events, torch.arange(len(events["offsets"]) - 1))
    # float32 sums of some forty numbers of size 14 in another order
    torch.testing.assert_close(encoded.own("mean", *asked).states[0], whole.sum(0), rtol=1e-5, atol=1e-5)
    bank = encoded.bank("mean")
    torch.testing.assert_close(bank.states[bank.users == user][-1], whole[-3:].sum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(model.encode(events)[rows][-1:], encoded.own("mean", *asked).states)


def test_a_bank_follows_every_rule(events):
    rules = ContextRules(
        n_users=9,
        ties="inclusive",
        min_prefix=2,
        lag_days=0.5,
        max_age_days=6.0,
        max_rows=3,
        policy="random",
        drop_last_prefix=True,
        seed=4,
    )
    model = enriched({"mean": Mean}, rules=rules)
    states, users = model.encode(events), torch.arange(len(events["offsets"]) - 1)
    stop = int(events["times"].median())
    words = torch.arange(len(users)).flip(0) * 7
    bank = model.bank(states, events | {"words": words}, users, stop)
    assert torch.equal(bank.words, words)
    assert bank.visibility.plain() == {
        "ties": "inclusive",
        "lag": DAY // 2,
        "max_age": 6 * DAY,
        "exclude_self": True,
        "exclude_group": False,
        "max_context": 3,
        "policy": "random",
        "seed": 4,
    }
    assert bank.n_users == 9
    assert int(bank.times.max()) < stop
    assert isinstance(bank, ContextBank)
    for user in bank.context_users.tolist():
        first, last = int(events["offsets"][user]), int(events["offsets"][user + 1])
        before = [row for row in range(first, last) if events["times"][row] < stop]
        assert bank.event_rows[bank.users == user].tolist() == before[1:-1]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "at least one"),
        (["own"], "none of"),
        (["wide"], "none of"),
        (["a+time"], "no '\\+' or ':'"),
        (["a.b"], "without '.'"),
    ],
)
def test_names_that_stand_for_something_else(names, message):
    with pytest.raises(ValueError, match=message):
        enriched(dict.fromkeys(names, Mean))


def test_finite_states_whose_sum_overflows_are_not_taken_for_broken_ones():
    seen = torch.tensor([[True, True, False], [False, False, True]])
    states = torch.tensor([[3e38, -1.0], [3e38, 2.0], [0.5, 0.5]])
    context = Context(states, None, seen, torch.zeros(2, 3), torch.arange(3))
    assert Max(d=2)(torch.zeros(2, 2), context).tolist() == [[*states[0, :1].tolist(), 2.0], [0.5, 0.5]]
    spoiled = Context(
        states.index_fill(0, torch.tensor([1]), torch.inf), None, seen, torch.zeros(2, 3), torch.arange(3)
    )
    assert Max(d=2)(torch.zeros(2, 2), spoiled).isnan().all(1).tolist() == [True, False]


def test_a_combination_that_needs_equal_widths(events):
    model = enriched({"mean": Mean}, combination=partial(Adding, alpha=0.25))
    context = model.bank(model.encode(events), events, torch.arange(5)).context(
        events["times"][-1:] + 1, torch.tensor([19]), "gathered"
    )
    query = torch.ones(1, 2)
    seen = context.states[context.rows[0][context.visible[0]]]
    # float32 mean of at most five
    torch.testing.assert_close(model.branch("mean").enrich(query, context), 0.75 * query + 0.25 * seen.mean(0))
