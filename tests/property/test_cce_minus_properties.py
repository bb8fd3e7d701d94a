"""What must hold of CCE- for any sizes, masks and ids."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cce_minus import Proposal, cce_minus_loss, cce_minus_negatives

EXACT = {"rtol": 1e-10, "atol": 1e-11}  # float64, logits of a few units, sums in another order
MODEST = settings(deadline=None, max_examples=25)


@st.composite
def problems(draw):
    """Random sizes, a padded batch, one row of given negatives per kept position, and a proposal."""
    n_items, width = draw(st.integers(2, 12)), draw(st.integers(1, 6))
    n, k = draw(st.integers(1, 12)), draw(st.integers(1, 15))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    hidden = torch.randn(n, width, generator=generator, dtype=torch.float64)
    table = torch.randn(n_items, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(n_items, (n,), generator=generator)
    targets[torch.rand(n, generator=generator) < 0.3] = -100
    ids = torch.randint(n_items, (int((targets != -100).sum()), k), generator=generator)
    q = torch.rand(n_items, generator=generator, dtype=torch.float64) + 0.05
    kwargs = {
        "log_q": draw(st.sampled_from([None, (q / q.sum()).log()])),
        "correction": draw(st.sampled_from(["logq", "none", "improved_logq"])),
    }
    return hidden.requires_grad_(), table.requires_grad_(), targets, ids, kwargs


def value_and_gradients(hidden, table, targets, ids, **kwargs):
    loss, lse = cce_minus_loss(hidden, table, targets, negatives=ids, reduction="none", return_lse=True, **kwargs)
    mix = torch.linspace(0.5, 2, loss.numel(), dtype=torch.float64)
    return loss, lse, *torch.autograd.grad((mix * loss).sum() + (mix * lse).sum(), (hidden, table))


def assert_equal(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **EXACT)


@MODEST
@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_negatives_does_not_matter(problem, random):
    hidden, table, targets, ids, kwargs = problem
    order = random.sample(range(ids.shape[1]), ids.shape[1])
    assert_equal(
        value_and_gradients(hidden, table, targets, ids, **kwargs),
        value_and_gradients(hidden, table, targets, ids[:, order], **kwargs),
    )


@MODEST
@given(problems())
def test_repeating_every_negative_changes_nothing_under_a_correction(problem):
    hidden, table, targets, ids, kwargs = problem
    doubled = value_and_gradients(hidden, table, targets, ids.repeat(1, 2), **kwargs)
    once = value_and_gradients(hidden, table, targets, ids, **kwargs)
    if kwargs["correction"] == "none":
        assert bool((doubled[0] >= once[0]).all())
    else:
        assert_equal(doubled, once)


@MODEST
@given(problems(), st.floats(-20, 20))
def test_shifting_all_logits_moves_the_lse_alone(problem, shift):
    hidden, table, targets, ids, kwargs = problem
    direction = torch.full((table.shape[1],), shift, dtype=torch.float64)
    loss, lse, *_ = value_and_gradients(hidden, table, targets, ids, **kwargs)
    moved = (table.detach() + direction).requires_grad_()
    shifted_loss, shifted_lse, *_ = value_and_gradients(hidden, moved, targets, ids, **kwargs)
    kept = targets != -100
    # logits of up to some hundred leave 1e-14 of themselves in a difference
    torch.testing.assert_close(shifted_loss, loss, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(shifted_lse[kept], (lse + hidden @ direction)[kept], rtol=1e-9, atol=1e-10)


@MODEST
@given(problems(), st.randoms(use_true_random=False))
def test_positions_are_independent(problem, random):
    hidden, table, targets, ids, kwargs = problem
    order = torch.tensor(random.sample(range(len(targets)), len(targets)))
    kept = targets != -100
    row = torch.cumsum(kept, 0) - 1
    loss, lse, *_ = value_and_gradients(hidden, table, targets, ids, **kwargs)
    permuted_ids = ids[row[order][kept[order]]]
    permuted = value_and_gradients(hidden[order], table, targets[order], permuted_ids, **kwargs)
    assert_equal(permuted[:2], (loss[order], lse[order]))


@MODEST
@given(problems())
def test_losses_are_bounded_by_their_denominator(problem):
    hidden, table, targets, ids, kwargs = problem
    loss, lse, *_ = value_and_gradients(hidden, table, targets, ids, **kwargs)
    kept = targets != -100
    assert torch.equal(loss[~kept], torch.zeros_like(loss[~kept]))
    assert torch.equal(lse[~kept], torch.zeros_like(lse[~kept]))
    positive = (hidden[kept] * table[targets[kept]]).sum(-1)
    assert bool((lse[kept] >= positive - 1e-12).all())
    if kwargs["correction"] != "improved_logq":
        assert bool((loss >= 0).all())
        torch.testing.assert_close(loss[kept], lse[kept] - positive, **EXACT)


@MODEST
@given(problems())
def test_softmax_weights_sum_to_one(problem):
    hidden, table, targets, ids, kwargs = problem
    loss, lse = cce_minus_loss(hidden, table, targets, negatives=ids, reduction="none", return_lse=True, **kwargs)
    (of_loss,) = torch.autograd.grad(loss.sum(), table, retain_graph=True)
    (of_lse,) = torch.autograd.grad(lse.sum(), table)
    torch.testing.assert_close(of_loss.sum(0), torch.zeros_like(of_loss[0]), **EXACT)
    torch.testing.assert_close(of_lse.sum(0), hidden[targets != -100].sum(0), **EXACT)


@MODEST
@given(problems())
def test_improved_logq_shares_its_gradient_with_logq(problem):
    hidden, table, targets, ids, kwargs = problem
    for impl in ("reference", "torch"):
        runs = [
            value_and_gradients(hidden, table, targets, ids, impl=impl, **(kwargs | {"correction": correction}))
            for correction in ("logq", "improved_logq")
        ]
        assert_equal(runs[0][1:], runs[1][1:])


@MODEST
@given(problems(), st.floats(0.1, 10))
def test_the_weighted_mean_ignores_scale_and_weightless_positions(problem, scale):
    hidden, table, targets, ids, kwargs = problem
    weight = torch.linspace(0.5, 2, len(targets), dtype=torch.float64)
    mean = cce_minus_loss(hidden, table, targets, negatives=ids, weight=weight, **kwargs)
    scaled = cce_minus_loss(hidden, table, targets, negatives=ids, weight=scale * weight, **kwargs)
    torch.testing.assert_close(scaled, mean, **EXACT)
    first = torch.arange(len(targets)) < len(targets) // 2
    kept_first = int((first & (targets != -100)).sum())
    weightless = cce_minus_loss(hidden, table, targets, negatives=ids, weight=weight * first, **kwargs)
    ignored = cce_minus_loss(
        hidden, table, torch.where(first, targets, -100), negatives=ids[:kept_first], weight=weight, **kwargs
    )
    torch.testing.assert_close(weightless, ignored, **EXACT)


@MODEST
@given(
    problems(),
    st.sampled_from(["position", "tile", "batch"]),
    st.integers(1, 15),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**40),
    st.integers(0, 2**32 - 1),
)
def test_seeded_ids_can_be_given_as_ids_of_positions(problem, sharing, tile_size, seed, step, rank):
    hidden, table, targets, ids, kwargs = problem
    n_items = table.shape[0]
    proposal = None if kwargs["log_q"] is None else Proposal.from_probabilities(kwargs["log_q"].exp())
    draw = {
        "n_negatives": ids.shape[1],
        "seed": seed,
        "step": step,
        "rank": rank,
        "sharing": sharing,
        "tile_size": tile_size,
        "log_q": proposal,
    }
    drawn, row_of_position = cce_minus_negatives(targets, n_items, **draw)
    n = int((targets != -100).sum())
    n_rows = {"position": n, "tile": -(-n // tile_size), "batch": 1}[sharing]
    assert drawn.shape == (n_rows, ids.shape[1])
    assert row_of_position.shape == (n,)
    if sharing == "tile":
        sizes = torch.bincount(row_of_position, minlength=n_rows).tolist()
        assert all(size == tile_size for size in sizes[:-1])
    results = []
    for impl in ("torch", "reference"):
        seeded = cce_minus_loss(
            hidden, table, targets, reduction="none", correction=kwargs["correction"], impl=impl, **draw
        )
        given = cce_minus_loss(
            hidden,
            table,
            targets,
            negatives=drawn[row_of_position],
            reduction="none",
            correction=kwargs["correction"],
            log_q=proposal,
            impl=impl,
        )
        results += [seeded, given]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], **EXACT)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@MODEST
@given(problem=problems())
def test_the_full_loss_bounds_the_full_complement(impl, problem):
    hidden, table, targets, _, _ = problem
    n_items = table.shape[0]
    others = [[j for j in range(n_items) if j != y] for y in targets[targets != -100].tolist()]
    ids = torch.tensor(others, dtype=torch.int64).view(-1, n_items - 1)
    full = cce_minus_loss(hidden, table, targets, n_negatives="all", reduction="none", impl=impl)
    for correction in ("logq", "none"):
        complement = cce_minus_loss(
            hidden, table, targets, negatives=ids, correction=correction, reduction="none", impl=impl
        )
        torch.testing.assert_close(complement, full, **EXACT)
