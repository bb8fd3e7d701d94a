"""Mean, maximum and attention over the states of others: plain float64 loops, masks, gradients, precision, chunks."""

import math

import pytest
import torch
from torch import nn

from lightning_modules.context import masked_rows
from lightning_modules.context.aggregators import (
    Attention,
    KernelAttention,
    LearnableAttention,
    Max,
    Mean,
    SymmetricAttention,
)
from lightning_modules.context.positive_features import LinearKernel, gaussian_directions
from lightning_modules.context.visible import Context

D = 6


def example(layout, n_queries=5, n=7, n_rows=11, seed=0, dtype=torch.float64):
    """Queries and a context in which the third query sees nothing and the fourth one row."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(n_rows, D, generator=generator, dtype=dtype)
    rows = None
    if layout == "gathered":
        rows = torch.stack([torch.randperm(n_rows, generator=generator)[:n] for _ in range(n_queries)])
    columns = n_rows if rows is None else n
    visible = torch.rand(n_queries, columns, generator=generator) < 0.6
    visible[2:4] = False
    visible[3, 1] = True
    ages = (3 * torch.rand(n_queries, columns, generator=generator)).masked_fill(~visible, 0.0)
    users = torch.arange(n_rows) if rows is None else rows
    return torch.randn(n_queries, D, generator=generator, dtype=dtype), Context(states, rows, visible, ages, users)


def seen(context, idx_query):
    """Columns a query sees, and the states there as plain lists."""
    columns = context.visible[idx_query].nonzero().flatten().tolist()
    rows = columns if context.rows is None else context.rows[idx_query, columns].tolist()
    return columns, context.states[rows].tolist()


def dot(x, y):
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


def through(perceptron, x):
    """A perceptron by loops, ReLU between its layers."""
    for position, layer in enumerate(perceptron.layers):
        if position:
            x = [max(0.0, value) for value in x]
        bias = [0.0] * layer.out_features if layer.bias is None else layer.bias.tolist()
        x = [dot(row, x) + shift for row, shift in zip(layer.weight.tolist(), bias, strict=True)]
    return x


def softmax(logits):
    largest = max(logits)
    powers = [math.exp(value - largest) for value in logits]
    return [power / math.fsum(powers) for power in powers]


def average(weights, states):
    return [math.fsum(w * x[k] for w, x in zip(weights, states, strict=True)) for k in range(len(states[0]))]


def elu_plus_one(x):
    return [value + 1 if value > 0 else math.exp(value) for value in x]


def random_features(module, x):
    y = [value / len(x) ** 0.25 for value in x]
    return [math.exp(dot(w, y) - dot(y, y) / 2) / math.sqrt(module.rank) for w in module.directions.double().tolist()]


def bilinear(module, x, q):
    mapped = [dot(row, q) for row in module.A.tolist()]
    shift = 0.0 if module.bias is None else dot(module.bias.tolist(), q)
    return dot(x, mapped) + shift


LOGITS = {
    "attention": (lambda: Attention(d=D), lambda m, x, q: dot(x, q) / math.sqrt(D)),
    "attention_as_released": (lambda: Attention(d=D, scale=1), lambda m, x, q: dot(x, q)),
    "learnable": (lambda: LearnableAttention(d=D, bias=True), lambda m, x, q: bilinear(m, x, q) / math.sqrt(D)),
    "learnable_no_bias": (lambda: LearnableAttention(d=D, scale=0.7), lambda m, x, q: 0.7 * bilinear(m, x, q)),
    "symmetric": (
        lambda: SymmetricAttention(d=D, rank=5, bias=True),
        lambda m, x, q: dot(through(m.S, x), through(m.S, q)) / math.sqrt(5),
    ),
    "kernel": (
        lambda: KernelAttention(d=D, rank=4, hidden=(9,)),
        lambda m, x, q: dot(through(m.phi, x), through(m.phi, q)) / math.sqrt(4),
    ),
    "kernel_learnable_scale": (
        lambda: KernelAttention(d=D, rank=4, hidden=(9,), scale="learnable"),
        lambda m, x, q: dot(through(m.phi, x), through(m.phi, q)) * math.exp(m.log_scale.item()),
    ),
    "linear_elu": (
        lambda: LinearKernel(d=D, rank=8),
        lambda m, x, q: math.log(dot(elu_plus_one(through(m.map, x)), elu_plus_one(through(m.map, q)))),
    ),
    "linear_random": (
        lambda: LinearKernel(d=D, rank=8, kind="random"),
        lambda m, x, q: math.log(dot(random_features(m, x), random_features(m, q))),
    ),
}
LEARNED = [name for name in LOGITS if name not in ("attention", "attention_as_released", "linear_random")]


def build(name):
    torch.manual_seed(3)
    module = LOGITS[name][0]().double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.1, 0.5)  # biases and the empty vector too
    return module


@pytest.mark.parametrize("layout", ["shared", "gathered"])
@pytest.mark.parametrize("name", LOGITS)
def test_softmax_family_equals_plain_loops(name, layout):
    module, (query, context) = build(name), example(layout)
    found, weights = module(query, context), module.weights(query, context)
    for idx, q in enumerate(query.tolist()):
        columns, states = seen(context, idx)
        expected, in_columns = module.empty_context.tolist(), [0.0] * context.visible.shape[1]
        if columns:
            attention = softmax([LOGITS[name][1](module, x, q) for x in states])
            expected = average(attention, states)
            for column, weight in zip(columns, attention, strict=True):
                in_columns[column] = weight
        # float64 on numbers of order 1; the logarithm of a sum of products loses a few digits more
        assert found[idx].tolist() == pytest.approx(expected, rel=0, abs=1e-12)
        assert weights[idx].tolist() == pytest.approx(in_columns, rel=0, abs=1e-12)


@pytest.mark.parametrize("layout", ["shared", "gathered"])
def test_mean_and_max_equal_plain_loops(layout):
    query, context = example(layout)
    mean, largest = Mean(d=D).double(), Max(d=D).double()
    nn.init.normal_(mean.empty_context)
    nn.init.normal_(largest.empty_context)
    found_mean, found_max = mean(query, context), largest(query, context)
    for idx in range(len(query)):
        columns, states = seen(context, idx)
        if not columns:
            assert torch.equal(found_mean[idx], mean.empty_context)
            assert torch.equal(found_max[idx], largest.empty_context)
            continue
        # float64 sums of at most 11 numbers of order 1
        assert found_mean[idx].tolist() == pytest.approx(average([1 / len(states)] * len(states), states), abs=1e-14)
        assert found_max[idx].tolist() == [max(x[k] for x in states) for k in range(D)]
        assert mean.weights(query, context)[idx].sum().item() == pytest.approx(1.0, abs=1e-14)
    assert largest.weights(query, context) is None


@pytest.mark.parametrize("layout", ["shared", "gathered"])
@pytest.mark.parametrize("name", LEARNED)
def test_gradients_of_parameters_query_and_states_are_those_of_finite_differences(name, layout):
    module, (query, context) = build(name), example(layout, n_queries=4, n=3, n_rows=4)
    names = [key for key, _ in module.named_parameters()]
    values = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]

    def call(query, states, *parameters):
        moved = Context(states, context.rows, context.visible, context.ages, context.users)
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (query, moved))

    inputs = (query.requires_grad_(), context.states.clone().requires_grad_(), *values)
    # central differences of step 1e-6 in float64: gradcheck's own tolerances
    assert torch.autograd.gradcheck(call, inputs)


def test_states_are_constants_unless_they_require_gradients():
    query, context = example("shared")
    KernelAttention(d=D).double()(query, context).sum().backward()
    assert context.states.grad is None


@pytest.mark.parametrize("layout", ["shared", "gathered"])
@pytest.mark.parametrize(
    "module",
    [Mean(d=D), Max(d=D), KernelAttention(d=D, n_heads=2, top_k=2), LinearKernel(d=D)],
    ids=lambda module: type(module).__name__,
)
@pytest.mark.parametrize("columns", [4, 0])
def test_nothing_visible_gives_the_empty_vector_and_finite_gradients(module, columns, layout):
    module.zero_grad()
    states = torch.randn(columns, D, requires_grad=True)
    shape = (3, columns)
    context = Context(
        states,
        None if layout == "shared" else torch.zeros(shape, dtype=torch.int64),
        torch.zeros(shape, dtype=torch.bool),
        torch.zeros(shape),
        torch.zeros(columns if layout == "shared" else shape, dtype=torch.int64),
    )
    query = torch.randn(3, D, requires_grad=True)
    found = module(query, context)
    assert torch.equal(found, torch.zeros(3, D))
    found.sum().backward()
    assert torch.equal(module.empty_context.grad, torch.full((D,), 3.0))
    for tensor in (query, states, *module.parameters()):
        assert tensor.grad is None or tensor.grad.isfinite().all()


@pytest.mark.parametrize("layout", ["shared", "gathered"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["kernel", "linear_elu", "mean", "max"])
def test_a_row_that_is_not_finite_spoils_those_who_see_it_and_no_others(name, poison, layout):
    query, context = example(layout)
    module = {"mean": Mean, "max": Max}[name](d=D).double() if name in ("mean", "max") else build(name)
    query.requires_grad_()
    clean = module(query, context)
    row = int(context.visible[0].nonzero()[0]) if context.rows is None else int(context.rows[0][context.visible[0]][0])
    of_query = torch.arange(len(context.states)).expand_as(context.visible) if context.rows is None else context.rows
    hit = ((of_query == row) & context.visible).any(1)
    assert hit[0]
    assert not hit.all()
    poisoned = context.states.clone()
    poisoned[row, 2] = poison
    found = module(query, Context(poisoned, context.rows, context.visible, context.ages, context.users))
    assert torch.equal(found[~hit], clean[~hit])
    assert found[hit].isnan().all()
    if found.requires_grad:
        found[~hit].sum().backward()
        if query.grad is not None:
            assert query.grad[~hit].isfinite().all()


def test_published_equalities():
    query, context = example("gathered")
    learnable = LearnableAttention(d=D, bias=True).double()
    nn.init.normal_(learnable.bias)
    nn.init.eye_(learnable.A)
    symmetric, kernel = SymmetricAttention(d=D, rank=5).double(), KernelAttention(d=D, rank=5, hidden=(), bias=False)
    kernel.double().phi.load_state_dict(symmetric.S.state_dict())
    # the same float64 products in another order; the bias cancels in the softmax
    torch.testing.assert_close(learnable(query, context), Attention(d=D).double()(query, context), rtol=0, atol=1e-14)
    torch.testing.assert_close(symmetric(query, context), kernel(query, context), rtol=0, atol=1e-14)
    biased = SymmetricAttention(d=D, rank=5, bias=True).double()
    biased.S.layers[0].weight = symmetric.S.layers[0].weight
    nn.init.normal_(biased.S.layers[0].bias)
    assert (biased(query, context) - symmetric(query, context)).abs().max() > 1e-2, "a bias in S must not cancel"


def test_kernel_attention_has_one_phi_of_the_published_size():
    shapes = {name: tuple(parameter.shape) for name, parameter in KernelAttention(d=1024).named_parameters()}
    assert shapes == {
        "empty_context": (1024,),
        "phi.layers.0.weight": (100, 1024),
        "phi.layers.0.bias": (100,),
        "phi.layers.1.weight": (100, 100),
        "phi.layers.1.bias": (100,),
    }
    query, context = example("shared")
    module = KernelAttention(d=D, bias=False).double()
    before, rows = module.features(query, context.states)
    with torch.no_grad():
        module.phi.layers[1].weight.mul_(2)
    after, rows_after = module.features(query, context.states)
    assert torch.equal(after, 2 * before)
    assert torch.equal(rows_after, 2 * rows)


@pytest.mark.parametrize("layout", ["shared", "gathered"])
def test_heads_are_attention_on_parts_of_the_width(layout):
    query, context = example(layout)
    module = Attention(d=D, n_heads=2).double()
    found, weights = module(query, context), module.weights(query, context)
    parts = []
    for of in (slice(0, 3), slice(3, 6)):
        half = Context(context.states[:, of], context.rows, context.visible, context.ages, context.users)
        single = Attention(d=3).double()
        parts.append(single.weights(query[:, of], half))
        # the same numbers: scale is 1 / sqrt(3) in both
        torch.testing.assert_close(found[:, of], single(query[:, of], half), rtol=0, atol=1e-14)
    torch.testing.assert_close(weights, (parts[0] + parts[1]) / 2, rtol=0, atol=1e-14)


@pytest.mark.parametrize("layout", ["shared", "gathered"])
def test_top_k_keeps_the_largest_and_all_that_tie(layout):
    query, context = example(layout)
    whole, chosen = Attention(d=D).double(), Attention(d=D, top_k=2).double()
    full, kept = whole.weights(query, context), chosen.weights(query, context)
    for idx in range(len(query)):
        best = full[idx].argsort(descending=True)[: min(2, int(context.visible[idx].sum()))]
        expected = torch.zeros_like(full[idx])
        expected[best] = full[idx][best] / full[idx][best].sum()
        # a ratio of float64 exponentials
        torch.testing.assert_close(kept[idx], expected, rtol=0, atol=1e-14)
    same = Context(torch.ones(4, D).double(), None, torch.ones(5, 4).bool(), torch.zeros(5, 4), torch.arange(4))
    torch.testing.assert_close(chosen.weights(query, same), torch.full((5, 4), 0.25).double(), rtol=0, atol=0)


def test_log_count_multiplies_logits_by_the_ratio_of_logarithms():
    query, context = example("shared")
    corrected, plain = Attention(d=D, scale=1, log_count=3).double(), Attention(d=D, scale=1).double()
    found = corrected.weights(query, context)
    for idx in range(len(query)):
        n_visible = int(context.visible[idx].sum())
        if n_visible:
            # the factor on the logits as a factor on the query
            stretched = query * math.log(n_visible) / math.log(3)
            torch.testing.assert_close(found[idx], plain.weights(stretched, context)[idx], rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_neither_overflow_nor_leave_float32(dtype):
    """Spec 13.15: un-scaled products of 1024 bounded components reach 1e5, above the largest float16."""
    generator = torch.Generator().manual_seed(0)
    states = (20 * torch.randn(30, 1024, generator=generator)).clamp(-12, 12).to(dtype)
    query = states[:4] + states[4:8] / 8
    context = Context(states, None, torch.ones(4, 30).bool(), torch.zeros(4, 30), torch.arange(30))
    assert (query.float() @ states.float().T).abs().max() > torch.finfo(torch.float16).max
    for module in (Attention(d=1024, scale=1), KernelAttention(d=1024, rank=16), LinearKernel(d=1024, rank=16)):
        wide = Context(states.float(), None, context.visible, context.ages, context.users)
        expected = module(query.float(), wide)
        with torch.autocast("cpu", torch.bfloat16):
            found, weights = module(query, context), module.weights(query, context)
        assert found.isfinite().all()
        assert found.dtype == weights.dtype == torch.float32
        # casts from half to float32 are exact, so the computation is the same
        assert torch.equal(found, expected)
    half = KernelAttention(d=1024, rank=16).to(dtype)
    assert half(query, context).dtype == dtype
    assert half.weights(query, context).dtype == torch.float32


@pytest.mark.parametrize("layout", ["shared", "gathered"])
@pytest.mark.parametrize("name", ["kernel", "linear_elu", "mean"])
def test_chunks_of_queries_change_neither_values_nor_gradients(name, layout, monkeypatch):
    results = []
    for limit in (masked_rows.PAIR_BYTES, 1):
        monkeypatch.setattr(masked_rows, "PAIR_BYTES", limit)
        module = Mean(d=D).double() if name == "mean" else build(name)
        query, context = example(layout)
        query.requires_grad_()
        context.states.requires_grad_()
        found = module(query, context)
        found.sin().sum().backward()
        gradients = [query.grad, context.states.grad, *(parameter.grad for parameter in module.parameters())]
        with torch.no_grad():
            results.append((found, module(query, context), module.weights(query, context), *gradients))
    for whole, chunked in zip(*results, strict=True):
        # sums over queries in another order
        torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-13)


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # torch 2.11 says so of every profile
def test_max_holds_no_gathered_rows():
    """A (Q, n, d) tensor of 200 x 500 x 64 float32 would be 25.6 MB; no intermediate may come near."""
    context = Context(torch.randn(500, 64), None, torch.rand(200, 500) < 0.9, torch.zeros(200, 500), torch.arange(500))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        Max(d=64)(torch.randn(200, 64), context)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    # numbers of rows and queries, int64: 200 x 450 pairs x 16 bytes
    assert 0 < largest < 3_000_000


def test_linear_kernel_equals_its_sums_over_rows():
    """Spec 4.1.9: M and s kept by event, + new - old, read in O(r d)."""
    query, context = example("shared")
    for kind in ("elu", "random"):
        module = LinearKernel(d=D, rank=8, kind=kind).double()
        found = module(query, context)
        features = module.positive_features(context.states)
        stale = torch.randn(D).double()
        for idx in (0, 1, 3, 4):
            seen_rows = context.visible[idx].nonzero().flatten()
            moments = module.positive_features(stale).outer(stale)
            mass = module.positive_features(stale)
            for row in seen_rows:
                moments = moments + features[row].outer(context.states[row])
                mass = mass + features[row]
            moments = moments - module.positive_features(stale).outer(stale)
            mass = mass - module.positive_features(stale)
            of_query = module.positive_features(query[idx : idx + 1])
            # float64; the stale row is added and taken away
            torch.testing.assert_close(module.read(of_query, moments, mass)[0], found[idx], rtol=0, atol=1e-12)
    assert torch.equal(module.read(of_query, moments * 0, mass * 0), torch.zeros(1, D).double())


def test_random_features_approach_plain_attention():
    query, context = example("shared")
    context = Context(context.states / 2, None, context.visible, context.ages, context.users)
    exact = Attention(d=D).double()(query / 2, context)
    errors = [
        (LinearKernel(d=D, rank=rank, kind="random").double()(query / 2, context) - exact).abs().max().item()
        for rank in (50, 20_000)
    ]
    # a Monte Carlo mean: 400 times the features, a twentieth of the error, itself known within a factor of 3
    assert 0 < errors[1] < errors[0] / 20 * 3


def test_random_directions_are_normal_and_orthogonal_within_a_block():
    directions = gaussian_directions(3000, 8, seed=1).double()
    first = torch.nn.functional.normalize(directions[:8], dim=1)
    # stored as float32
    torch.testing.assert_close(first @ first.T, torch.eye(8).double(), rtol=0, atol=1e-6)
    # means of 3000 standard normal products have a standard error of 0.018, of squares 0.026
    torch.testing.assert_close(directions.T @ directions / 3000, torch.eye(8).double(), rtol=0, atol=0.12)
    assert torch.equal(gaussian_directions(5, 8, seed=1), gaussian_directions(5, 8, seed=1))
    assert not torch.equal(gaussian_directions(5, 8, seed=1), gaussian_directions(5, 8, seed=2))


def test_linear_kernel_survives_features_that_round_to_zero():
    """exp(-|x|^2 / 2) of states of norm 200 is 0 even in float64, and elu(x) + 1 in float32 from x = -17 on."""
    states = 200 * torch.nn.functional.normalize(torch.randn(5, D), dim=1)
    context = Context(states, None, torch.ones(3, 5).bool(), torch.zeros(3, 5), torch.arange(5))
    query = states[:3].clone().requires_grad_()
    for kind in ("elu", "random"):
        module = LinearKernel(d=D, rank=8, kind=kind)
        found = module(query, context)
        (gradient,) = torch.autograd.grad(found.sum(), query)
        assert found.isfinite().all()
        assert gradient.isfinite().all()
        # weights are a softmax in float32
        torch.testing.assert_close(module.weights(query, context).sum(1), torch.ones(3), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Mean(d=0), "d must be at least 1, got 0"),
        (lambda: Mean(d=2, median_gap=0.0), r"median_gap must be a positive number of days, got 0\.0"),
        (lambda: Attention(d=6, n_heads=4), "n_heads must divide the width 6 and the rank 6, got 4"),
        (
            lambda: Attention(d=6, scale="cosine"),
            "scale must be a positive number, 'sqrt' or 'learnable', got 'cosine'",
        ),
        (lambda: Attention(d=6, scale=-1.0), r"scale must be .* got -1\.0"),
        (lambda: Attention(d=6, top_k=0), "top_k must be at least 1, got 0"),
        (lambda: Attention(d=6, log_count=1), "log_count must be at least 2 rows or null, got 1"),
        (lambda: KernelAttention(d=6, hidden=(0,)), "width 1 of a perceptron must be at least 1, got 0"),
        (lambda: LinearKernel(d=6, kind="relu"), "kind must be 'elu' or 'random', got 'relu'"),
        (
            lambda: Mean(d=5)(*example("shared")),
            r"Mean takes queries and states of width 5, got \(5, 6\) and \(11, 6\)",
        ),
        (
            lambda: Mean(d=6)(torch.zeros(4, 6), example("shared")[1]),
            "Mean takes a context of 4 queries, got one of 5",
        ),
    ],
)
def test_bad_input_ends_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
