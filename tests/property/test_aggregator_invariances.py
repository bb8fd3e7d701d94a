"""Invariances of every aggregator: order of rows and queries, invisible rows, duplicates, one row, both layouts.

Source: spec of arXiv 2502.10205, section 4.1.8, and tests 4, 6 and 7 of section 13.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_modules.context.aggregators import (
    Attention,
    KernelAttention,
    LearnableAttention,
    Max,
    Mean,
    SymmetricAttention,
)
from lightning_modules.context.decayed import (
    AttentionHawkes,
    ExpHawkes,
    ExpLearnableHawkes,
    LearnableAttentionHawkes,
    LearnableHawkes,
)
from lightning_modules.context.positive_features import LinearKernel
from lightning_modules.context.visible import Context

D = 4
ALL = {
    "mean": Mean(d=D),
    "max": Max(d=D),
    "attention": Attention(d=D, n_heads=2),
    "attention_top_k": Attention(d=D, top_k=2),
    "learnable": LearnableAttention(d=D, bias=True, log_count=5),
    "symmetric": SymmetricAttention(d=D, rank=3, bias=True),
    "kernel": KernelAttention(d=D, rank=4, hidden=(6,), scale="learnable"),
    "linear_elu": LinearKernel(d=D, rank=6),
    "linear_random": LinearKernel(d=D, rank=6, kind="random"),
    "exp": ExpHawkes(d=D, theta=2.0),
    "exp_mean": ExpHawkes(d=D, theta=2.0, normalise="mean"),
    "exp_learnable": ExpLearnableHawkes(d=D, theta=2.0, hidden=(5, 3)),
    "learnable_hawkes": LearnableHawkes(d=D, theta=2.0, hidden=(5, 3)),
    "attention_hawkes": AttentionHawkes(d=D, theta=2.0),
    "attention_hawkes_logit": AttentionHawkes(d=D, theta=2.0, mode="logit", top_k=3),
    "learnable_attention_hawkes": LearnableAttentionHawkes(d=D, theta=2.0, mode="post_renorm"),
}
# Those that neither count rows nor decay: b lies among the states, and is X_1 where there is one row.
AMONG_STATES = [name for name in ALL if "exp" not in name and name not in ("learnable_hawkes", "attention_hawkes")]
UNCHANGED_BY_DUPLICATES = [
    name
    for name in ALL
    if name not in ("exp", "exp_learnable", "learnable_hawkes")
    and getattr(ALL[name], "top_k", None) is None
    and getattr(ALL[name], "log_count", None) is None
]

torch.manual_seed(11)
for _module in ALL.values():
    _module.double()
    for _parameter in _module.parameters():
        nn.init.normal_(_parameter, 0.0, 0.5)

TOLERANCE = 1e-10
"""float64 sums of at most 20 numbers below 1e3 in another order."""

seeds = st.integers(0, 2**31)
sizes = st.tuples(st.integers(1, 5), st.integers(1, 10))
every = pytest.mark.parametrize("name", ALL)


def draw(seed, n_queries, n, density=0.6):
    """Queries and a shared context; some see nothing."""
    generator = torch.Generator().manual_seed(seed)
    visible = torch.rand(n_queries, n, generator=generator) < density
    ages = (5 * torch.rand(n_queries, n, generator=generator)).masked_fill(~visible, 0.0)
    states = torch.randn(n, D, generator=generator, dtype=torch.float64)
    query = torch.randn(n_queries, D, generator=generator, dtype=torch.float64)
    return query, Context(states, None, visible, ages, torch.arange(n)), generator


def gathered(context, generator, padding=0):
    """The same context with rows of its own for each query, in an order of their own, and more columns behind."""
    n_queries, n = context.visible.shape
    order = torch.stack([torch.randperm(n, generator=generator) for _ in range(n_queries)])
    more = torch.randint(n, (n_queries, padding), generator=generator)
    nothing = torch.zeros(n_queries, padding)
    return Context(
        context.states,
        torch.cat([order, more], 1),
        torch.cat([context.visible.gather(1, order), nothing.bool()], 1),
        torch.cat([context.ages.gather(1, order), nothing], 1),
        torch.cat([order, more], 1),
    )


def agree(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@every
@settings(max_examples=25, deadline=None)
@given(seed=seeds, size=sizes, padding=st.integers(0, 5))
def test_layout_order_of_rows_and_padding_do_not_matter(name, seed, size, padding):
    query, context, generator = draw(seed, *size)
    expected = ALL[name](query, context)
    agree(ALL[name](query, gathered(context, generator, padding)), expected)
    order = torch.randperm(size[1], generator=generator)
    shuffled = Context(
        context.states[order], None, context.visible[:, order], context.ages[:, order], context.users[order]
    )
    agree(ALL[name](query, shuffled), expected)


@every
@settings(max_examples=25, deadline=None)
@given(seed=seeds, size=sizes)
def test_a_query_does_not_depend_on_its_batch(name, seed, size):
    query, context, generator = draw(seed, *size)
    expected = ALL[name](query, context)
    order = torch.randperm(size[0], generator=generator)
    for rows in (order, order[:1]):
        part = Context(context.states, None, context.visible[rows], context.ages[rows], context.users)
        agree(ALL[name](query[rows], part), expected[rows])


@every
@settings(max_examples=25, deadline=None)
@given(seed=seeds, size=sizes, scale=st.sampled_from([1.0, 1e6, float("nan"), float("inf")]))
def test_what_is_invisible_changes_no_bit(name, seed, size, scale):
    query, context, generator = draw(seed, *size)
    expected, weights = ALL[name](query, context), ALL[name].weights(query, context)
    hidden = ~context.visible.any(0)
    states = context.states.clone()
    states[hidden] = scale * torch.randn(int(hidden.sum()), D, generator=generator, dtype=torch.float64)
    ages = context.ages.masked_fill(~context.visible, 3.0)
    moved = Context(states, None, context.visible, ages, context.users)
    assert torch.equal(ALL[name](query, moved), expected)
    if weights is None:
        return
    assert torch.equal(ALL[name].weights(query, moved), weights)
    assert not weights[~context.visible].any()


@every
@settings(max_examples=25, deadline=None)
@given(seed=seeds, size=sizes, extra=st.integers(1, 4))
def test_adding_invisible_rows_changes_nothing(name, seed, size, extra):
    query, context, generator = draw(seed, *size)
    more = 1e3 * torch.randn(extra, D, generator=generator, dtype=torch.float64)
    nothing = torch.zeros(size[0], extra)
    longer = Context(
        torch.cat([context.states, more]),
        None,
        torch.cat([context.visible, nothing.bool()], 1),
        torch.cat([context.ages, nothing], 1),
        torch.arange(size[1] + extra),
    )
    agree(ALL[name](query, longer), ALL[name](query, context))


@pytest.mark.parametrize("name", UNCHANGED_BY_DUPLICATES)
@settings(max_examples=25, deadline=None)
@given(seed=seeds, size=sizes)
def test_duplicating_all_rows_changes_nothing(name, seed, size):
    query, context, _ = draw(seed, *size)
    twice = Context(
        context.states.repeat(2, 1),
        None,
        context.visible.repeat(1, 2),
        context.ages.repeat(1, 2),
        context.users.repeat(2),
    )
    agree(ALL[name](query, twice), ALL[name](query, context))


@pytest.mark.parametrize("name", ["exp", "exp_learnable", "learnable_hawkes"])
def test_duplicating_all_rows_doubles_a_sum(name):
    query, context, _ = draw(5, 3, 6, density=1.1)
    twice = Context(
        context.states.repeat(2, 1), None, context.visible.repeat(1, 2), context.ages.repeat(1, 2), torch.arange(12)
    )
    agree(ALL[name](query, twice), 2 * ALL[name](query, context))


@pytest.mark.parametrize("name", AMONG_STATES)
@settings(max_examples=25, deadline=None)
@given(seed=seeds, n_queries=st.integers(1, 4))
def test_one_visible_row_is_the_context(name, seed, n_queries):
    query, context, generator = draw(seed, n_queries, 5)
    column = torch.randint(5, (n_queries,), generator=generator)
    one = torch.nn.functional.one_hot(column, 5).bool()
    single = Context(context.states, None, one, context.ages.masked_fill(~one, 0.0), context.users)
    agree(ALL[name](query, single), context.states[column])


@pytest.mark.parametrize("name", AMONG_STATES)
@settings(max_examples=25, deadline=None)
@given(seed=seeds, size=sizes)
def test_weights_are_a_distribution_and_the_context_lies_within_the_states(name, seed, size):
    query, context, _ = draw(seed, *size)
    found, weights = ALL[name](query, context), ALL[name].weights(query, context)
    some = context.visible.any(1)
    for idx in some.nonzero().flatten():
        states = context.states[context.visible[idx]]
        assert (found[idx] <= states.amax(0) + TOLERANCE).all()
        assert (found[idx] >= states.amin(0) - TOLERANCE).all()
    if weights is not None:
        assert (weights >= 0).all()
        agree(weights.sum(1), some.double())


@every
@settings(max_examples=25, deadline=None)
@given(seed=seeds, size=sizes)
def test_nothing_visible_is_the_learned_vector_and_gradients_are_finite(name, seed, size):
    query, context, _ = draw(seed, *size, density=0.2)
    query.requires_grad_()
    states = context.states.requires_grad_()
    module = ALL[name]
    module.zero_grad()
    found = module(query, context)
    nothing = ~context.visible.any(1)
    assert torch.equal(found[nothing], module.empty_context.expand(int(nothing.sum()), D))
    found.sum().backward()
    assert torch.equal(module.empty_context.grad, nothing.sum().double().expand(D))
    for tensor in (query, states, *module.parameters()):
        assert tensor.grad is None or tensor.grad.isfinite().all()


@settings(max_examples=25, deadline=None)
@given(seed=seeds, size=sizes, older=st.floats(0.01, 100.0))
def test_older_states_weigh_less(seed, size, older):
    query, context, _ = draw(seed, *size)
    aged = Context(context.states, None, context.visible, context.ages + older, context.users)
    for name in ("exp", "exp_mean", "attention_hawkes"):
        young, old = ALL[name].weights(query, context), ALL[name].weights(query, aged)
        assert (young <= 1).all()
        assert (old[context.visible] < young[context.visible]).all()
