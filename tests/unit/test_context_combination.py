"""Combinations of an own state and a context vector against their formulas written out."""

import math

import pytest
import torch
from torch import nn

from lightning_modules.context.combination import Adding, Concat, Gated, Residual


def inputs(d=3, d_context=2):
    torch.manual_seed(0)
    return torch.randn(4, d).double(), torch.randn(4, d_context).double()


def product(matrix, x):
    return [math.fsum(a * b for a, b in zip(row, x, strict=True)) for row in matrix.tolist()]


def test_concat_puts_the_own_state_first():
    q, b = inputs()
    module = Concat(d=3, d_context=2)
    assert module.d_out == 5
    assert module(q, b).tolist() == [own + other for own, other in zip(q.tolist(), b.tolist(), strict=True)]
    assert not list(module.parameters())


def test_residual_and_gate_equal_loops():
    q, b = inputs()
    residual, gated = Residual(d=3, d_context=2).double(), Gated(d=3, d_context=2).double()
    assert residual.d_out == gated.d_out == 3
    for own, other, summed, mixed in zip(q.tolist(), b.tolist(), residual(q, b), gated(q, b), strict=True):
        moved = product(residual.map.weight, other)
        # float64 sums of a few numbers of order 1
        assert summed.tolist() == pytest.approx([x + y for x, y in zip(own, moved, strict=True)], abs=1e-14)
        levels = product(gated.gate.weight, own + other)
        gates = [1 / (1 + math.exp(-x - c)) for x, c in zip(levels, gated.gate.bias.tolist(), strict=True)]
        of_context = product(gated.map.weight, other)
        expected = [g * x + (1 - g) * y for g, x, y in zip(gates, own, of_context, strict=True)]
        assert mixed.tolist() == pytest.approx(expected, abs=1e-14)


def test_a_gate_can_let_either_side_through():
    q, b = inputs()
    module = Gated(d=3, d_context=2).double()
    nn.init.zeros_(module.gate.weight)
    nn.init.constant_(module.gate.bias, 50.0)
    assert torch.equal(module(q, b), q)  # sigmoid(50) is 1 in float64
    nn.init.constant_(module.gate.bias, -800.0)
    assert torch.equal(module(q, b), module.map(b))


@pytest.mark.parametrize("module", [Residual(d=3, d_context=2), Gated(d=3, d_context=2)])
def test_no_context_leaves_the_residual_alone_and_gradients_reach_both_inputs(module):
    q, b = (x.requires_grad_() for x in inputs())
    module = module.double()
    # gradcheck's own tolerances, float64
    assert torch.autograd.gradcheck(module, (q, b))
    if isinstance(module, Residual):
        assert torch.equal(module(q, torch.zeros_like(b)), q)


def test_adding_mixes_linearly_so_scores_do_too():
    q, b = inputs(3, 3)
    items = torch.randn(7, 3).double()
    module = Adding(d=3, d_context=3, alpha=0.3)
    # scores of the mixture are the mixture of scores; float64
    torch.testing.assert_close(module(q, b) @ items.T, 0.3 * (b @ items.T) + 0.7 * (q @ items.T), rtol=0, atol=1e-14)
    assert Adding(d=3, d_context=3).alpha == 0.5
    assert torch.equal(Adding(d=3, d_context=3, alpha=0.0)(q, b), q)
    assert torch.equal(Adding(d=3, d_context=3, alpha=1.0)(q, b), b)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Concat(d=0, d_context=2), "d must be at least 1, got 0"),
        (lambda: Gated(d=2, d_context=0), "d_context must be at least 1, got 0"),
        (lambda: Adding(d=3, d_context=2), "Adding takes a context vector as wide as the state, 3, got 2"),
        (lambda: Adding(d=3, d_context=3, alpha=1.5), r"alpha must lie between 0 and 1, got 1\.5"),
        (lambda: Adding(d=3, d_context=3, alpha=math.nan), "alpha must lie between 0 and 1, got nan"),
        (
            lambda: Concat(d=3, d_context=2)(torch.zeros(4, 3), torch.zeros(4, 3)),
            r"Concat joins \(Q, 3\) with \(Q, 2\), got \(4, 3\) and \(4, 3\)",
        ),
        (lambda: Residual(d=3, d_context=2)(torch.zeros(4, 3), torch.zeros(1, 2)), r"got \(4, 3\) and \(1, 2\)"),
    ],
)
def test_bad_input_ends_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
