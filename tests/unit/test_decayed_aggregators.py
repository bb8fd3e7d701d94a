"""The Hawkes family: plain float64 loops, time units, limits of theta, modes of decay, gradients, chunks."""

import math

import pytest
import torch
from torch import nn

from lightning_modules.context import masked_rows
from lightning_modules.context.aggregators import Attention, Mean
from lightning_modules.context.decayed import (
    AttentionHawkes,
    ExpHawkes,
    ExpLearnableHawkes,
    LearnableAttentionHawkes,
    LearnableHawkes,
)
from lightning_modules.context.visible import Context

D = 4
THETA = 1.7
SECOND = 1 / 86400
FAMILY = {
    "exp": lambda **more: ExpHawkes(d=D, theta=THETA, **more),
    "exp_mean": lambda **more: ExpHawkes(d=D, theta=THETA, normalise="mean", **more),
    "exp_learnable": lambda **more: ExpLearnableHawkes(d=D, theta=THETA, hidden=(5, 3), **more),
    "exp_learnable_thesis": lambda **more: ExpLearnableHawkes(d=D, theta=THETA, hidden=(5,), **more),
    "learnable": lambda **more: LearnableHawkes(d=D, theta=THETA, hidden=(5, 3), normalise="mean", **more),
    "learnable_linear_age": lambda **more: LearnableHawkes(d=D, theta=THETA, hidden=(5, 3), age="linear", **more),
    "attention": lambda **more: AttentionHawkes(d=D, theta=THETA, **more),
    "attention_post_renorm": lambda **more: AttentionHawkes(d=D, theta=THETA, mode="post_renorm", **more),
    "attention_logit": lambda **more: AttentionHawkes(d=D, theta=THETA, mode="logit", scale=1, **more),
    "learnable_attention": lambda **more: LearnableAttentionHawkes(d=D, theta=THETA, bias=True, **more),
}


def build(name, **more):
    torch.manual_seed(2)
    module = FAMILY[name](**more).double()
    for key, parameter in module.named_parameters():
        if key != "decay.log_theta":
            nn.init.normal_(parameter, 0.1, 0.5)
    return module


def example(layout, n_queries=5, n=6, n_rows=9):
    """The third query sees nothing, the fourth one row; what stands at invisible rows is arbitrary."""
    generator = torch.Generator().manual_seed(7)
    rows = None
    if layout == "gathered":
        rows = torch.stack([torch.randperm(n_rows, generator=generator)[:n] for _ in range(n_queries)])
    columns = n_rows if rows is None else n
    visible = torch.rand(n_queries, columns, generator=generator) < 0.6
    visible[2:4] = False
    visible[3, 1] = True
    ages = 4 * torch.rand(n_queries, columns, generator=generator)
    states = torch.randn(n_rows, D, generator=generator, dtype=torch.float64)
    query = torch.randn(n_queries, D, generator=generator, dtype=torch.float64)
    users = torch.arange(n_rows) if rows is None else rows
    return query, Context(states, rows, visible, ages.masked_fill(~visible, 0.0), users)


def dot(x, y):
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


def affine(layer, x):
    bias = [0.0] * layer.out_features if layer.bias is None else layer.bias.tolist()
    return [dot(row, x) + shift for row, shift in zip(layer.weight.tolist(), bias, strict=True)]


def relu(x):
    return [max(0.0, value) for value in x]


def psi(module, x, q):
    """psi([x; q]) as one stack of linear layers on the joined vector."""
    first = [
        dot(of_row + of_query, x + q) + shift
        for of_row, of_query, shift in zip(
            module.row_map.layers[0].weight.tolist(),
            module.query_map.layers[0].weight.tolist(),
            module.row_map.layers[0].bias.tolist(),
            strict=True,
        )
    ]
    hidden = relu(first)
    for layer in module.inner.layers:
        hidden = relu(affine(layer, hidden))
    return affine(module.last.layers[0], hidden)


def kappa(module, delta):
    if not isinstance(module, LearnableHawkes):
        return math.exp(-delta / float(module.decay.theta))
    delta /= float(module.decay.theta)
    hidden = [math.log1p(delta) if module.age == "log" else delta]
    for position, layer in enumerate(module.kernel_of_time.layers):
        hidden = affine(layer, relu(hidden) if position else hidden)
    return hidden[0]


def softmax(logits):
    powers = [math.exp(value - max(logits)) for value in logits]
    return [power / math.fsum(powers) for power in powers]


def attention_weights(module, states, q, deltas):
    mapped = [dot(row, q) for row in module.A.tolist()] if isinstance(module, LearnableAttentionHawkes) else q
    logits = [module.scale * dot(x, mapped) for x in states]  # a bias would cancel
    decays = [kappa(module, delta) for delta in deltas]
    if module.mode == "logit":
        return softmax([value + math.log(decay) for value, decay in zip(logits, decays, strict=True)])
    weights = [a * decay for a, decay in zip(softmax(logits), decays, strict=True)]
    return [w / math.fsum(weights) for w in weights] if module.mode == "post_renorm" else weights


@pytest.mark.parametrize("layout", ["shared", "gathered"])
@pytest.mark.parametrize("name", FAMILY)
def test_equals_plain_loops(name, layout):
    module, (query, context) = build(name), example(layout)
    found, weights = module(query, context), module.weights(query, context)
    for idx, q in enumerate(query.tolist()):
        columns = context.visible[idx].nonzero().flatten().tolist()
        if not columns:
            assert torch.equal(found[idx], module.empty_context)
            assert torch.equal(weights[idx], torch.zeros_like(weights[idx]))
            continue
        rows = columns if context.rows is None else context.rows[idx, columns].tolist()
        states, deltas = context.states[rows].tolist(), context.ages[idx, columns].double().tolist()
        if isinstance(module, AttentionHawkes | LearnableAttentionHawkes):
            expected, values = attention_weights(module, states, q, deltas), states
        else:
            share = len(columns) if module.normalise == "mean" else 1
            expected = [kappa(module, delta) / share for delta in deltas]
            values = [psi(module, x, q) for x in states] if isinstance(module, ExpLearnableHawkes) else states
        summed = [math.fsum(w * x[k] for w, x in zip(expected, values, strict=True)) for k in range(D)]
        # float64 on numbers of order 1 to 10
        assert found[idx].tolist() == pytest.approx(summed, rel=0, abs=1e-12)
        assert weights[idx, columns].tolist() == pytest.approx(expected, rel=0, abs=1e-12)
        assert weights[idx].count_nonzero() <= len(columns)


@pytest.mark.parametrize("layout", ["shared", "gathered"])
@pytest.mark.parametrize("name", FAMILY)
def test_gradients_with_log_theta_are_those_of_finite_differences(name, layout):
    module = build(name, learn_theta=True)
    query, context = example(layout, n_queries=4, n=3, n_rows=4)
    names = [key for key, _ in module.named_parameters()]
    assert "decay.log_theta" in names
    values = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]

    def call(query, states, *parameters):
        moved = Context(states, context.rows, context.visible, context.ages, context.users)
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (query, moved))

    # gradcheck's own tolerances for central differences of step 1e-6 in float64
    assert torch.autograd.gradcheck(call, (query.requires_grad_(), context.states.clone().requires_grad_(), *values))


def test_gradient_of_log_theta_in_closed_form():
    """d/d ln(theta) of exp(-Delta / theta) is exp(-Delta / theta) Delta / theta."""
    query, context = example("shared")
    module = build("exp", learn_theta=True)
    module(query, context).sum().backward()
    ratio = context.ages.double() / THETA
    expected = ((-ratio).exp() * ratio * context.visible * context.states.sum(1)).sum()
    # float32 holds ln(theta) to 1e-7; it was cast to float64 afterwards
    torch.testing.assert_close(module.decay.log_theta.grad, expected, rtol=1e-6, atol=0)


def test_theta_is_the_median_gap_unless_given():
    assert ExpHawkes(d=D, median_gap=2.5).decay.theta.item() == 2.5
    assert ExpHawkes(d=D, median_gap=2.5, theta=0.5).decay.theta.item() == 0.5
    learned = AttentionHawkes(d=D, median_gap=2.5, learn_theta=True)
    assert learned.decay.theta.item() == pytest.approx(2.5, rel=1e-6)  # float32 exp of a float32 logarithm
    assert "decay.fixed_theta" in ExpHawkes(d=D).state_dict(), "a fixed unit belongs to the checkpoint too"


def test_psi_and_kappa_have_the_published_sizes():
    shapes = {name: tuple(parameter.shape) for name, parameter in LearnableHawkes(d=1024).named_parameters()}
    weights = {name: shape for name, shape in shapes.items() if "weight" in name}
    assert weights == {
        "row_map.layers.0.weight": (100, 1024),
        "query_map.layers.0.weight": (100, 1024),
        "inner.layers.0.weight": (100, 100),
        "last.layers.0.weight": (1024, 100),
        "kernel_of_time.layers.0.weight": (10, 1),
        "kernel_of_time.layers.1.weight": (10, 10),
        "kernel_of_time.layers.2.weight": (1, 10),
    }
    # one bias for each layer of psi and kappa, none twice
    assert sum("bias" in name for name in shapes) == 6


@pytest.mark.parametrize("name", ["exp", "exp_mean", "attention"])
def test_weights_fall_with_age_and_never_exceed_one(name):
    module = build(name)
    ages = torch.tensor([0.0, 1e-9, 0.5, 1.0, 10.0, 1e4, 3e7])
    n = len(ages)
    context = Context(torch.ones(1, D).double().expand(n, D), None, torch.ones(1, n).bool(), ages[None], ages.long())
    weights = module.weights(torch.ones(1, D).double(), context)[0]
    assert (weights.diff() <= 0).all()
    assert (weights[1:5].diff() < 0).all()
    assert weights[0] == (1.0 if name == "exp" else 1 / n)
    assert weights[-1] == 0


@pytest.mark.parametrize("name", FAMILY)
def test_a_change_of_unit_with_theta_scaled_changes_nothing(name):
    query, context = example("gathered")
    module, scaled = build(name), build(name)
    scaled.decay.fixed_theta.mul_(4096)  # a power of two: ratios of ages are exact
    longer = Context(context.states, context.rows, context.visible, context.ages * 4096, context.users)
    assert torch.equal(scaled(query, longer), module(query, context))


@pytest.mark.parametrize("layout", ["shared", "gathered"])
def test_an_endless_theta_gives_the_variants_without_decay(layout):
    query, context = example(layout)
    mean = ExpHawkes(d=D, theta=1e30, normalise="mean").double()
    # the decay is 1 to the last bit
    torch.testing.assert_close(mean(query, context), Mean(d=D).double()(query, context), rtol=0, atol=1e-15)
    for mode in ("post", "post_renorm", "logit"):
        attention = AttentionHawkes(d=D, theta=1e30, mode=mode).double()
        torch.testing.assert_close(
            attention(query, context), Attention(d=D).double()(query, context), rtol=0, atol=1e-15
        )


def test_as_released_only_states_of_the_same_second_count():
    """Spec 4.1.1: with theta of a second exp(-104) is 0 in float32, and the mean still divides by all rows."""
    states = torch.eye(D)
    ages = torch.tensor([[0.0, 104 * SECOND, 1.0, 40.0]])
    context = Context(states, None, torch.ones(1, D).bool(), ages, torch.arange(D))
    released = ExpHawkes(d=D, theta=SECOND, normalise="mean")
    assert released(states[:1], context)[0].tolist() == [0.25, 0.0, 0.0, 0.0]
    attention = AttentionHawkes(d=D, theta=SECOND, scale=1)
    weights = attention.weights(states[:1], context)[0]
    assert weights[0] == pytest.approx(math.e / (math.e + 3), rel=1e-6)  # float32
    assert weights[1:].tolist() == [0.0, 0.0, 0.0]
    # where all rows are old, weights normalised again remain weights
    old = Context(states, None, torch.ones(1, D).bool(), ages + 1, torch.arange(D))
    renormalised = AttentionHawkes(d=D, theta=SECOND, scale=1, mode="post_renorm").weights(states[:1], old)
    assert renormalised.sum() == pytest.approx(1.0, abs=1e-6)  # float32 softmax


def test_renormalised_and_logit_decay_differ_in_what_top_k_chooses_among():
    query, context = example("shared")
    whole = [AttentionHawkes(d=D, theta=THETA, mode=mode).double() for mode in ("post_renorm", "logit")]
    # one and the same exponent
    torch.testing.assert_close(whole[0](query, context), whole[1](query, context), rtol=0, atol=1e-15)
    states = torch.tensor([[1.0, 0, 0, 0], [0.9, 0, 0, 0]])
    context = Context(states, None, torch.ones(1, 2).bool(), torch.tensor([[5.0, 0.0]]), torch.arange(2))
    before, after = (AttentionHawkes(d=D, theta=1.0, mode=mode, top_k=1) for mode in ("post_renorm", "logit"))
    assert before.weights(states[:1], context).tolist() == [[1.0, 0.0]]
    assert after.weights(states[:1], context).tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("layout", ["shared", "gathered"])
@pytest.mark.parametrize("name", ["exp", "exp_learnable", "learnable", "attention"])
def test_chunks_of_queries_change_neither_values_nor_gradients(name, layout, monkeypatch):
    results = []
    for limit in (masked_rows.PAIR_BYTES, 1):
        monkeypatch.setattr(masked_rows, "PAIR_BYTES", limit)
        module, (query, context) = build(name, learn_theta=True), example(layout)
        query.requires_grad_()
        found = module(query, context)
        found.sin().sum().backward()
        results.append((found, *(parameter.grad for parameter in module.parameters())))
        if name != "exp":
            results[-1] += (query.grad,)
    for whole, chunked in zip(*results, strict=True):
        # sums over queries in another order
        torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", ["shared", "gathered"])
def test_influence_is_evaluated_at_visible_pairs_alone(layout, monkeypatch):
    query, context = example(layout)
    module = build("exp_learnable")
    seen = []
    inner = module.inner.forward
    monkeypatch.setattr(module.inner, "forward", lambda hidden: seen.append(hidden.shape) or inner(hidden))
    module(query, context)
    assert seen == [(int(context.visible.sum()), 5)]


@pytest.mark.parametrize("name", FAMILY)
def test_nothing_visible_and_half_precision_stay_finite(name):
    module = FAMILY[name](learn_theta=True)
    query = (1e4 * torch.ones(3, D)).bfloat16().requires_grad_()
    states = (1e4 * torch.ones(5, D)).bfloat16()
    visible = torch.ones(3, 5).bool()
    visible[1] = False
    context = Context(states, None, visible, torch.full((3, 5), 2.0).masked_fill(~visible, 0.0), torch.arange(5))
    with torch.autocast("cpu", torch.bfloat16):
        found = module(query, context)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert found[1].tolist() == [0.0] * D
    found.sum().backward()
    for tensor in (query, *module.parameters()):
        assert tensor.grad is None or tensor.grad.isfinite().all()
    nobody = Context(states[:0], None, visible[:, :0], torch.zeros(3, 0), torch.arange(0))
    assert torch.equal(module(query.float(), nobody), torch.zeros(3, D))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ExpHawkes(d=4, theta=0.0), r"theta must be a positive number of days, got 0\.0"),
        (lambda: AttentionHawkes(d=4, theta=math.nan), "theta must be a positive number of days, got nan"),
        (lambda: ExpHawkes(d=4, normalise="max"), "normalise must be 'sum' or 'mean', got 'max'"),
        (lambda: AttentionHawkes(d=4, mode="pre"), "mode must be 'post', 'post_renorm' or 'logit', got 'pre'"),
        (lambda: LearnableAttentionHawkes(d=4, mode="pre"), "mode must be 'post', .* got 'pre'"),
        (lambda: ExpLearnableHawkes(d=4, hidden=()), "psi must have at least one hidden layer, got none"),
        (lambda: LearnableHawkes(d=4, age="square"), "age must be 'log' or 'linear', got 'square'"),
    ],
)
def test_bad_input_ends_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
