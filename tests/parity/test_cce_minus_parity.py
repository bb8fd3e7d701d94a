"""Every path of CCE- against its formula written position by position in float64."""

import inspect
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from kernels.cce_minus import (
    Proposal,
    candidate_rows,
    cce_minus_loss,
    cce_minus_negatives,
    cce_minus_reference,
    torch_chunked,
)

SHARINGS = ("position", "tile", "batch")
CORRECTIONS = ("logq", "none", "improved_logq", "classic_logq")
REJECTING = CORRECTIONS[:3]
REDUCTIONS = ("mean", "sum", "none")
TILE = 4
# float64 sums of a few dozen terms near 1, in another order
EXACT = {"rtol": 1e-11, "atol": 1e-12}
# float32: 6e-8 per operation, sums of up to a few hundred terms, magnitudes near 1
SINGLE = {"rtol": 2e-5, "atol": 2e-6}


def oracle(hidden, table, targets, ids, *, q, correction, weight=None, reduction="mean", ignore_index=-100):
    """The definition, one position and one negative at a time; `ids` holds one row per kept position."""
    losses, lses, kept = [], [], 0
    for place, y in enumerate(targets.flatten().tolist()):
        if y == ignore_index:
            losses.append(hidden.new_zeros(()))
            lses.append(hidden.new_zeros(()))
            continue
        e = hidden.reshape(-1, hidden.shape[-1])[place]
        classic = correction == "classic_logq"
        negatives = [n for n in ids[kept].tolist() if classic or n != y]
        kept += 1
        positive = e @ table[y] - (torch.log(len(negatives) * q[y]) if classic else 0.0)
        rest = 1.0 if classic else 1 - q[y]
        terms = [
            torch.exp(e @ table[n]) * (1.0 if correction == "none" else rest / (len(negatives) * q[n]))
            for n in negatives
        ]
        z_hat = torch.exp(positive) + sum(terms)
        lses.append(torch.log(z_hat))
        if not negatives:
            losses.append(0.0 * positive)
        elif correction == "improved_logq":
            losses.append((1 - torch.exp(positive) / z_hat).detach() * (torch.log(sum(terms)) - positive))
        else:
            losses.append(torch.log(z_hat) - positive)
    loss = torch.stack(losses).view(targets.shape)
    mask = (targets != ignore_index).to(loss.dtype)
    w = mask if weight is None else mask * weight
    loss = w * loss
    if reduction == "sum":
        loss = loss.sum()
    elif reduction == "mean":
        loss = loss.sum() / w.sum()
    return loss, torch.stack(lses).view(targets.shape)


def problem(n_items=7, width=5, shape=(3, 5), dtype=torch.float64, padding=True):
    generator = torch.Generator().manual_seed(n_items * 100 + width)
    hidden = torch.randn(*shape, width, generator=generator, dtype=torch.float64).to(dtype)
    table = torch.randn(n_items, width, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(n_items, shape, generator=generator)
    if padding:
        targets[0, :3] = -100
        targets[-1, -1] = -100
    weight = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    return hidden.requires_grad_(), table.requires_grad_(), targets, weight.requires_grad_()


def per_position(ids, sharing, n, tile=TILE):
    """One row of ids per kept position, for ids given in the shape of a sharing."""
    match sharing:
        case "position":
            return ids
        case "tile":
            return ids[torch.arange(n) // tile]
        case "batch":
            return ids.expand(n, -1)


def ids_shape(sharing, n, k, tile=TILE):
    return {"position": (n, k), "tile": (-(-n // tile), k), "batch": (k,)}[sharing]


def assert_same_with_gradients(ours, truth, inputs, **tolerance):
    """Compare loss and lse, and all gradients of a random combination of both."""
    generator = torch.Generator().manual_seed(0)
    gradients = []
    for loss, lse in (ours, truth):
        generator.manual_seed(0)
        mix = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (loss, lse)]
        total = (loss * mix[0]).sum() + (lse * mix[1]).sum()
        gradients.append(torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True))
    for a, b in itertools.chain(zip(ours, truth, strict=True), zip(*gradients, strict=True)):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.fixture(params=["reference", "torch", "torch in tiny blocks", "torch gathered in tiny blocks"])
def impl(request, monkeypatch):
    """Paths, the chunked one also cut so finely that rows, tiles and columns fall into many blocks.

    The last one gathers rows where the CPU reads them in place, as a GPU does.
    """
    if "gathered" in request.param:
        monkeypatch.setattr(torch_chunked, "sparse_rows_work", lambda: False)
    if "tiny" in request.param:
        monkeypatch.setattr(torch_chunked, "SPARSE_BLOCK_BYTES", 11 * torch_chunked.SPARSE_BYTES_PER_PAIR)
        monkeypatch.setattr(torch_chunked, "GATHERED_BLOCK_BYTES", {"cpu": 1500})
        monkeypatch.setattr(torch_chunked, "SHARED_COLUMNS", 4)
        monkeypatch.setattr(candidate_rows, "SEGMENT_BYTES", 100)
    return request.param.split()[0]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("skewed", [False, True], ids=["uniform", "skewed"])
def test_given_negatives(impl, sharing, correction, reduction, skewed):
    hidden, table, targets, weight = problem()
    n, n_items = int((targets != -100).sum()), table.shape[0]
    ids = torch.randint(n_items, ids_shape(sharing, n, 6))  # collisions and duplicates: 6 draws of 7 items
    q = torch.rand(n_items, dtype=torch.float64) + 0.1 if skewed else torch.ones(n_items, dtype=torch.float64)
    q /= q.sum()
    ours = cce_minus_loss(
        hidden,
        table,
        targets,
        negatives=ids,
        sharing=sharing,
        tile_size=TILE,
        log_q=q.log() if skewed else None,
        correction=correction,
        weight=weight,
        reduction=reduction,
        return_lse=True,
        impl=impl,
    )
    rows = per_position(ids, sharing, n)
    truth = oracle(hidden, table, targets, rows, q=q, correction=correction, weight=weight, reduction=reduction)
    assert_same_with_gradients(ours, truth, (hidden, table, weight), **EXACT)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("alias", [False, True], ids=["uniform", "popularity"])
def test_seeded_negatives(impl, sharing, correction, alias):
    hidden, table, targets, weight = problem(n_items=9, width=7)
    unseen = int(
        correction == "classic_logq"
    )  # which corrects the positive too, and refuses a target of zero probability
    proposal = Proposal.popularity(torch.tensor([9, 1, 5, 2, unseen, 7, 1, 3, 3]), 0.75) if alias else None
    draw = {"n_negatives": 10, "seed": 3, "step": 2, "rank": 1, "sharing": sharing, "tile_size": TILE}
    ours = cce_minus_loss(
        hidden,
        table,
        targets,
        log_q=proposal,
        correction=correction,
        weight=weight,
        reduction="none",
        return_lse=True,
        impl=impl,
        **draw,
    )
    ids, row_of_position = cce_minus_negatives(targets, 9, log_q=proposal, **draw)
    q = torch.full((9,), 1 / 9, dtype=torch.float64) if proposal is None else proposal.log_q.double().exp()
    truth = oracle(
        hidden, table, targets, ids[row_of_position], q=q, correction=correction, weight=weight, reduction="none"
    )
    assert_same_with_gradients(ours, truth, (hidden, table, weight), **EXACT)


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize(
    ("n_items", "width", "k", "shape"),
    [
        (2, 1, 1, (1,)),
        (2, 7, 5, (7,)),
        (3, 50, 33, (13,)),
        (3, 7, 4, (129,)),
        (300, 257, 5, (2, 3, 2)),
        (1009, 100, 64, ()),
    ],
    ids=str,
)
def test_odd_shapes(impl, sharing, n_items, width, k, shape):
    hidden, table, targets, _ = problem(n_items, width, shape, padding=False)
    with torch.no_grad():
        hidden /= width**0.5
    draw = {"n_negatives": k, "seed": 1, "sharing": sharing, "tile_size": 5}
    ours = cce_minus_loss(hidden, table, targets, reduction="none", return_lse=True, impl=impl, **draw)
    ids, row_of_position = cce_minus_negatives(targets, n_items, **draw)
    q = torch.full((n_items,), 1 / n_items, dtype=torch.float64)
    truth = oracle(hidden, table, targets, ids[row_of_position], q=q, correction="logq", reduction="none")
    assert_same_with_gradients(ours, truth, (hidden, table), **EXACT)


@pytest.mark.parametrize("correction", REJECTING)
@pytest.mark.parametrize("sharing", SHARINGS)
def test_fully_rejected_rows_cost_nothing(impl, sharing, correction):
    hidden, table, _, _ = problem(n_items=4, shape=(6,), padding=False)
    targets = torch.tensor([2, 2, 2, 2, 1, 1])
    ids = torch.full(ids_shape(sharing, 6, 3), 2)
    if sharing == "tile":
        ids[1] = 1  # so every row of both tiles is rejected
    loss, lse = cce_minus_loss(
        hidden,
        table,
        targets,
        negatives=ids,
        sharing=sharing,
        tile_size=TILE,
        correction=correction,
        reduction="none",
        return_lse=True,
        impl=impl,
    )
    dead = (per_position(ids, sharing, 6) == targets[:, None]).all(-1)
    assert dead.sum() >= 4
    assert torch.equal(loss[dead], torch.zeros_like(loss[dead]))
    positive = (hidden * table[targets]).sum(-1)
    torch.testing.assert_close(lse[dead], positive[dead], **EXACT)
    inputs = (hidden, table)
    for gradient in torch.autograd.grad(loss[dead].sum(), inputs, retain_graph=True):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    ours = torch.autograd.grad(lse[dead].sum(), inputs)
    truth = torch.autograd.grad(positive[dead].sum(), inputs)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_logit_that_is_no_number_makes_a_loss_that_is_none(impl, correction, bad):
    hidden, table, _, _ = problem(n_items=8, shape=(6,), padding=False)
    with torch.no_grad():
        table[7, 0] = bad
        hidden[:, 0] = torch.tensor([1.0, -1.0] * 3)  # a logit of +inf, then of -inf, which costs nothing
    targets, ids = torch.arange(6), torch.arange(8).expand(6, 8)
    loss = cce_minus_loss(
        hidden, table, targets, negatives=ids, correction=correction, reduction="none", impl=impl
    ).detach()
    truth, _ = oracle(hidden, table, targets, ids, q=torch.full((8,), 1 / 8), correction=correction, reduction="none")
    wrong = ~truth.detach().isfinite()
    assert wrong.tolist() == ([True, False] * 3 if bad == math.inf else [True] * 6)
    assert torch.equal(~loss.isfinite(), wrong)
    torch.testing.assert_close(loss[~wrong], truth[~wrong].detach(), **EXACT)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_targets_logit_that_is_no_number_makes_a_loss_that_is_none(impl, correction, bad):
    hidden, table, _, _ = problem(n_items=8, shape=(6,), padding=False)
    with torch.no_grad():
        table[7, 0] = bad
        hidden[:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 1.0])
    # the last two: without a negative, where collisions are rejected, and ignored
    targets, ids = torch.tensor([7, 7, 7, 7, 7, -100]), torch.arange(7).repeat(5, 1)
    ids[4] = 7
    loss = cce_minus_loss(hidden, table, targets, negatives=ids, correction=correction, reduction="none", impl=impl)
    (gradient,) = torch.autograd.grad(loss.sum(), hidden)
    loss = loss.detach()
    assert loss[:4].isnan().tolist() == ([True, False] * 2 if bad == math.inf else [True] * 4)
    assert not loss[:4].isfinite().any()
    if bad == math.inf and correction in REJECTING:
        assert float(loss[4]) == 0
    assert float(loss[5]) == 0
    assert not gradient[5].any()
    if impl != "reference":  # autograd takes logaddexp at inf for a constant
        assert not gradient[:4].isfinite().any()


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_items_never_drawn_do_not_matter_where_nothing_is_kept(impl, correction, given):
    hidden, table, targets, _ = problem(n_items=5)
    proposal = Proposal.from_probabilities(torch.tensor([1.0, 1, 1, 1, 0]))
    draw = {"negatives": torch.zeros(0, 4, dtype=torch.int64)} if given else {"n_negatives": 4, "seed": 1}
    nothing = torch.full_like(targets, -100)
    loss = cce_minus_loss(hidden, table, nothing, log_q=proposal, correction=correction, impl=impl, **draw)
    assert float(loss.detach()) == 0
    for gradient in torch.autograd.grad(loss, (hidden, table)):
        assert not gradient.any()


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("mass", [0.9999, 0.99999])
def test_a_target_of_nearly_all_the_probability_keeps_its_digits(impl, sharing, mass):
    hidden, table, _, _ = problem(n_items=9, width=8, shape=(40,), padding=False)
    q = torch.full((9,), (1 - mass) / 8, dtype=torch.float64)
    q[3] = mass
    ids = torch.arange(9).expand(ids_shape(sharing, 40, 9))
    kwargs = {"negatives": ids, "sharing": sharing, "tile_size": TILE, "reduction": "none"}
    kwargs |= {"log_q": Proposal.from_probabilities(q)}
    targets = torch.full((40,), 3)
    ours = cce_minus_loss(hidden.float(), table.float(), targets, impl=impl, **kwargs)
    truth = cce_minus_loss(hidden.float().double(), table.float().double(), targets, impl="reference", **kwargs)
    # log q, log(1 - q) and logits, all within 20, are each rounded by up to 1e-6; 1 - exp(log q) would be off by 3e-4
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=5e-6)


@pytest.mark.parametrize("correction", ["none", "logq"])
def test_targets_as_negatives_are_the_in_batch_softmax(impl, correction):
    """The example of the README: cross-entropy of (N, N) logits without accidental hits, and its logQ correction."""
    hidden, table, targets, _ = problem(n_items=9)
    counts = torch.bincount(targets[targets >= 0], minlength=9) + 1.0
    log_q = (counts / counts.sum()).log().double()
    ours = cce_minus_loss(
        hidden, table, targets, negatives=targets[targets >= 0], sharing="batch", log_q=log_q, correction=correction,
        impl=impl,
    )  # fmt: skip
    y = targets[targets >= 0]
    logits, diagonal = hidden[targets >= 0] @ table[y].T, torch.eye(len(y), dtype=torch.bool)
    hits = y == y[:, None]
    assert (hits.sum(1) > 1).any()
    if correction == "logq":
        correct = -log_q[y] + (1 - log_q[y].exp()).log()[:, None] - (~hits).sum(1).double().log()[:, None]
        logits = logits + torch.where(diagonal, 0.0, correct)
    plain = F.cross_entropy(logits.masked_fill(hits & ~diagonal, -math.inf), torch.arange(len(y)))
    torch.testing.assert_close(ours, plain, **EXACT)
    for a, b in zip(*(torch.autograd.grad(loss, (hidden, table)) for loss in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("empty", ["all ignored", "no positions", "zero weights", "weights summing to zero"])
def test_nothing_kept_is_zero_and_connected(impl, sharing, reduction, empty):
    hidden, table, targets, weight = problem()
    if empty == "all ignored":
        targets = torch.full_like(targets, -100)
    elif empty == "no positions":
        hidden, targets, weight = (x.detach()[:0].requires_grad_(x.requires_grad) for x in (hidden, targets, weight))
    elif empty == "zero weights":
        weight = torch.zeros_like(weight, requires_grad=True)
    else:
        weight = torch.where(torch.arange(15).view(3, 5) % 2 == 0, 1.0, -1.0).double().requires_grad_()
        targets = torch.zeros_like(targets)
        targets[0, 0] = -100
    kept = bool((targets != -100).any())
    loss, lse = cce_minus_loss(
        hidden,
        table,
        targets,
        n_negatives=3,
        seed=0,
        sharing=sharing,
        weight=weight,
        reduction=reduction,
        return_lse=True,
        impl=impl,
    )
    assert lse.shape == targets.shape
    assert loss.shape == (targets.shape if reduction == "none" else ())
    gradients = torch.autograd.grad(loss.sum(), (hidden, table))
    if reduction == "mean" or not kept or empty == "zero weights":
        assert torch.equal(loss, torch.zeros_like(loss))
        for gradient in gradients:
            assert torch.equal(gradient, torch.zeros_like(gradient))
    else:
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_item_is_the_full_cross_entropy(impl, dtype, padding):
    hidden, table, targets, weight = problem(n_items=61, width=8, dtype=dtype, padding=padding)
    logits = hidden @ table.T
    full = F.cross_entropy(logits.view(-1, 61), targets.view(-1), reduction="none").view(targets.shape)
    kept = targets != -100
    truth = ((weight * full).sum() / weight[kept].sum(), torch.where(kept, logits.logsumexp(-1), 0.0))
    for correction in CORRECTIONS:
        ours = cce_minus_loss(
            hidden,
            table,
            targets,
            n_negatives="all",
            weight=weight,
            correction=correction,
            return_lse=True,
            impl=impl,
        )
        tolerance = EXACT if dtype == torch.float64 else SINGLE
        gradients = [
            torch.autograd.grad(loss + 0.1 * lse.sum(), (hidden, table, weight), retain_graph=True)
            for loss, lse in (ours, truth)
        ]
        for a, b in itertools.chain(zip(ours, truth, strict=True), zip(*gradients, strict=True)):
            torch.testing.assert_close(a, b, **tolerance)


def test_the_full_complement_is_the_full_cross_entropy(impl):
    hidden, table, targets, _ = problem(n_items=12, width=6, padding=False)
    others = torch.stack([torch.tensor([j for j in range(12) if j != y]) for y in targets.view(-1).tolist()])
    order = torch.rand(others.shape).argsort(-1)
    ours = cce_minus_loss(hidden, table, targets, negatives=others.gather(1, order), impl=impl)
    truth = F.cross_entropy((hidden @ table.T).view(-1, 12), targets.view(-1))
    gradients = [torch.autograd.grad(loss, (hidden, table)) for loss in (ours, truth)]
    torch.testing.assert_close(ours, truth, **EXACT)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("k", [1, 7, 300])
def test_constant_logits_give_the_logarithm_of_the_catalogue(impl, sharing, k):
    table = torch.randn(1, 3, dtype=torch.float64).expand(211, 3)
    hidden, targets = torch.randn(21, 3, dtype=torch.float64), torch.randint(211, (21,))
    draw = {"n_negatives": k, "seed": 4, "sharing": sharing, "tile_size": 16}
    ids, row = cce_minus_negatives(targets, 211, **draw)
    alive = (ids[row] != targets[:, None]).any(-1)
    loss = cce_minus_loss(hidden, table, targets, reduction="none", impl=impl, **draw)
    torch.testing.assert_close(loss, alive.double() * math.log(211.0), **EXACT)
    n_kept = (ids[row] != targets[:, None]).sum(-1)
    loss = cce_minus_loss(hidden, table, targets, reduction="none", correction="none", impl=impl, **draw)
    torch.testing.assert_close(loss, torch.log1p(n_kept.double()), **EXACT)


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_the_gradient_of_the_table_sums_to_zero(sharing, correction):
    hidden, table, targets, _ = problem(n_items=40, width=16, shape=(8, 9), dtype=torch.float32)
    loss = cce_minus_loss(
        hidden, table, targets, n_negatives=30, seed=0, sharing=sharing, correction=correction, reduction="sum"
    )
    (gradient,) = torch.autograd.grad(loss, table)
    # float32 rounding of each of the 40 rows' entries, themselves sums of dozens of terms near 1
    torch.testing.assert_close(gradient.sum(0), torch.zeros(16), rtol=0, atol=2e-4)
    assert gradient.abs().max() > 0.1


@pytest.mark.parametrize("sharing", [*SHARINGS, "all"])
def test_gradcheck(impl, sharing):
    hidden, table, targets, weight = problem(n_items=5, width=3, shape=(2, 4))
    kwargs = {"n_negatives": "all"} if sharing == "all" else {"n_negatives": 6, "seed": 2, "sharing": sharing}

    def both(hidden, table, weight):
        return cce_minus_loss(hidden, table, targets, weight=weight, tile_size=3, return_lse=True, impl=impl, **kwargs)

    assert torch.autograd.gradcheck(both, (hidden, table, weight))


@pytest.mark.parametrize("sharing", SHARINGS)
def test_improved_logq_has_the_gradient_of_logq_and_another_value(impl, sharing):
    hidden, table, targets, _ = problem(n_items=30, width=6)
    results = []
    for correction in ("logq", "improved_logq"):
        loss = cce_minus_loss(
            hidden, table, targets, n_negatives=8, seed=1, sharing=sharing, correction=correction, impl=impl
        )
        results.append((loss, *torch.autograd.grad(loss, (hidden, table))))
    (a, *gradients_a), (b, *gradients_b) = results
    assert abs(a - b) > 1e-3
    for x, y in zip(gradients_a, gradients_b, strict=True):
        torch.testing.assert_close(x, y, **EXACT)


@pytest.mark.parametrize("skewed", [False, True], ids=["uniform", "popularity"])
def test_the_denominator_is_unbiased(skewed):
    n, n_items, k = 40_000, 20, 5
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(n_items, 4, generator=generator, dtype=torch.float64)
    hidden = torch.randn(1, 4, generator=generator, dtype=torch.float64)
    proposal = Proposal.popularity(torch.arange(1, n_items + 1), 0.75) if skewed else None
    _, lse = cce_minus_loss(
        hidden.expand(n, 4),
        table,
        torch.full((n,), 3),
        n_negatives=k,
        seed=5,
        log_q=proposal,
        return_lse=True,
    )
    ids, _ = cce_minus_negatives(torch.full((n,), 3), n_items, n_negatives=k, seed=5, log_q=proposal)
    z_hat = lse.exp()[(ids != 3).any(-1)]  # given at least one negative, which all but some 1e-5 of the rows have
    exact = (hidden @ table.T).exp().sum()
    standard_error = z_hat.std() / len(z_hat) ** 0.5
    assert standard_error < 0.01 * exact
    assert abs(z_hat.mean() - exact) < 4 * standard_error
    # Jensen: the mean loss lies below the full one, by more than chance
    assert lse.mean() < exact.log() - 4 * lse.std() / n**0.5


@pytest.mark.parametrize("sharing", [*SHARINGS, "all"])
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_huge_logits_stay_finite(impl, sharing, correction):
    hidden = torch.tensor([[300.0], [-300.0], [300.0], [-300.0]], requires_grad=True)
    table = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    targets = torch.tensor([0, 0, 1, 1])
    kwargs = {"n_negatives": "all"} if sharing == "all" else {"n_negatives": 8, "seed": 1, "sharing": sharing}
    results = []
    for dtype, path in ((torch.float32, impl), (torch.float64, "reference")):
        h, c = (x.detach().to(dtype).requires_grad_() for x in (hidden, table))
        loss, lse = cce_minus_loss(
            h, c, targets, reduction="none", correction=correction, return_lse=True, impl=path, **kwargs
        )
        results.append((loss, lse, *torch.autograd.grad(loss.sum() + lse.sum(), (h, c))))
    assert results[1][0].max() > 500
    for a, b in zip(*results, strict=True):
        # logits, lse and their difference near 300 are each rounded by up to 1.5e-5, which weights show relatively
        torch.testing.assert_close(a.double(), b, rtol=6e-5, atol=6e-5)


@pytest.mark.parametrize("sharing", [*SHARINGS, "all"])
@pytest.mark.parametrize(
    ("hidden_dtype", "table_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float64, torch.float32),
    ],
)
def test_dtypes(sharing, hidden_dtype, table_dtype):
    hidden, table, targets, _ = problem(n_items=200, width=50, shape=(4, 60))
    hidden = (hidden.detach() / 4).to(hidden_dtype).requires_grad_()
    table = table.detach().to(table_dtype).requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (hidden, table)]
    kwargs = {"n_negatives": "all"} if sharing == "all" else {"n_negatives": 70, "seed": 2, "sharing": sharing}
    # a scaled-up loss: what is rounded at the end must not be lost to the 16-bit range of 1/N
    ours = cce_minus_loss(hidden, table, targets, return_lse=True, **kwargs)
    truth = cce_minus_loss(*exact, targets, return_lse=True, impl="reference", **kwargs)
    double = torch.float64 in (hidden_dtype, table_dtype)
    assert {x.dtype for x in ours} == {torch.float64 if double else torch.float32}
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, **(EXACT if double else SINGLE))
    gradients = torch.autograd.grad(1000 * ours[0], (hidden, table))
    for gradient, x, b in zip(gradients, (hidden, table), torch.autograd.grad(1000 * truth[0], exact), strict=True):
        assert gradient.dtype == x.dtype
        # the sums are in 32 bits, so all that 16-bit gradients lose is the last rounding, eps / 2 of the entry itself
        torch.testing.assert_close(gradient.double(), b, rtol=torch.finfo(x.dtype).eps / 2 + 2e-5, atol=2e-5)


@pytest.mark.parametrize("sharing", [*SHARINGS, "all"])
def test_autocast_has_no_say(sharing):
    hidden, table, targets, _ = problem(n_items=50, width=16, dtype=torch.float32)
    kwargs = {"n_negatives": "all"} if sharing == "all" else {"n_negatives": 9, "seed": 2, "sharing": sharing}
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = cce_minus_loss(hidden, table, targets, **kwargs)
            results.append((loss, *torch.autograd.grad(loss, (hidden, table))))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize(
    "layout", ["rows of a larger table", "columns of a wider table", "transposed", "strided hidden"]
)
def test_views_of_any_layout(impl, sharing, layout):
    hidden, table, targets, _ = problem(n_items=9, width=4, shape=(6, 5))
    base = {
        "rows of a larger table": lambda: F.pad(table.detach(), (0, 0, 0, 1), value=torch.nan),
        "columns of a wider table": lambda: F.pad(table.detach(), (2, 1), value=torch.nan),
        "transposed": lambda: table.detach().T.contiguous(),
        "strided hidden": lambda: hidden.detach().transpose(0, 1).contiguous(),
    }[layout]().requires_grad_()
    view = {
        "rows of a larger table": lambda: base[:9],
        "columns of a wider table": lambda: base[:, 2:6],
        "transposed": lambda: base.T,
        "strided hidden": lambda: base.transpose(0, 1),
    }[layout]()
    kwargs = {"n_negatives": 7, "seed": 0, "sharing": sharing, "tile_size": 8, "return_lse": True, "impl": impl}
    if layout == "strided hidden":
        ours, inputs = cce_minus_loss(view, table, targets, **kwargs), (view, table)
    else:
        ours, inputs = cce_minus_loss(hidden, view, targets, **kwargs), (hidden, view)
    truth = cce_minus_loss(hidden, table, targets, **kwargs)
    a = torch.autograd.grad(ours[0] + ours[1].sum(), inputs, retain_graph=True)
    b = torch.autograd.grad(truth[0] + truth[1].sum(), (hidden, table))
    for x, y in zip((*ours, *a), (*truth, *b), strict=True):
        torch.testing.assert_close(x, y, **EXACT)
    (whole,) = torch.autograd.grad(ours[0], base)
    assert bool(torch.isfinite(whole).all())


@pytest.mark.parametrize("sharing", [*SHARINGS, "all"])
@pytest.mark.parametrize("wanted", ["hidden", "table", "neither"])
def test_gradients_of_one_input_only(impl, sharing, wanted):
    hidden, table, targets, _ = problem()
    kwargs = {"n_negatives": "all"} if sharing == "all" else {"n_negatives": 4, "seed": 2, "sharing": sharing}
    both = cce_minus_loss(hidden, table, targets, impl=impl, **kwargs)
    expected = dict(zip(("hidden", "table"), torch.autograd.grad(both, (hidden, table)), strict=True))
    inputs = {"hidden": hidden.detach(), "table": table.detach()}
    if wanted == "neither":
        assert not cce_minus_loss(*inputs.values(), targets, impl=impl, **kwargs).requires_grad
        return
    inputs[wanted].requires_grad_()
    loss = cce_minus_loss(*inputs.values(), targets, impl=impl, **kwargs)
    (gradient,) = torch.autograd.grad(loss, inputs[wanted])
    assert torch.equal(gradient, expected[wanted])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integer_widths_of_ids(impl, dtype):
    hidden, table, targets, _ = problem()
    ids = torch.randint(7, (11, 5))
    expected = cce_minus_loss(hidden, table, targets, negatives=ids, impl=impl)
    ours = cce_minus_loss(hidden, table, targets.to(dtype), negatives=ids.to(dtype), impl=impl)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("ignore_index", [-1, 0])
def test_another_ignore_index(impl, ignore_index):
    hidden, table, targets, _ = problem()
    targets = targets.clamp(min=1)
    ids = torch.randint(7, (15, 5))
    kept = torch.rand(3, 5) < 0.5
    expected = cce_minus_loss(hidden[kept], table, targets[kept], negatives=ids[kept.view(-1)], impl=impl)
    ours = cce_minus_loss(
        hidden,
        table,
        torch.where(kept, targets, ignore_index),
        negatives=ids[kept.view(-1)],
        ignore_index=ignore_index,
        impl=impl,
    )
    torch.testing.assert_close(ours, expected, **EXACT)


@pytest.mark.parametrize("sharing", [*SHARINGS, "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_gradients_are_equal_bit_for_bit(sharing, dtype):
    hidden, table, targets, _ = problem(n_items=300, width=32, shape=(20, 30), dtype=dtype)
    kwargs = {"n_negatives": "all"} if sharing == "all" else {"n_negatives": 64, "seed": 2, "sharing": sharing}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = []
        for deterministic in (None, False, True, None):
            loss = cce_minus_loss(hidden, table, targets, deterministic=deterministic, **kwargs)
            runs.append((loss.detach(), *torch.autograd.grad(loss, (hidden, table))))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("sharing", [*SHARINGS, "all"])
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_no_scratch_memory_is_read_before_it_is_written(sharing, correction):
    hidden, table, targets, weight = problem(n_items=9, shape=(4, 5))
    kwargs = {"n_negatives": "all"} if sharing == "all" else {"n_negatives": 6, "seed": 2, "sharing": sharing}
    kwargs |= {"correction": correction, "weight": weight, "reduction": "none", "return_lse": True, "tile_size": TILE}
    truth = cce_minus_loss(hidden, table, targets, impl="reference", **kwargs)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN and with the largest integer
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert bool(torch.empty(3).isnan().all())
    ours = cce_minus_loss(hidden, table, targets, **kwargs)
    assert_same_with_gradients(ours, truth, (hidden, table, weight), **EXACT)


def test_a_step_counter_may_move_on_before_the_backward():
    hidden, table, targets, _ = problem()
    step = torch.tensor(5)
    loss = cce_minus_loss(hidden, table, targets, n_negatives=4, seed=torch.tensor(3), step=step)
    step += 1
    ours = torch.autograd.grad(loss, (hidden, table))
    expected = cce_minus_loss(hidden, table, targets, n_negatives=4, seed=3, step=5)
    for a, b in zip(ours, torch.autograd.grad(expected, (hidden, table)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("changed", ["targets", "negatives", "hidden", "table"])
def test_inputs_changed_in_place_are_noticed(changed):
    hidden, table, targets, _ = problem(padding=False)
    negatives = torch.randint(7, (15, 3))
    loss = cce_minus_loss(hidden, table, targets, negatives=negatives)
    with torch.no_grad():
        {"targets": targets, "negatives": negatives, "hidden": hidden, "table": table}[changed].mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_derivative_is_refused():
    hidden, table, targets, _ = problem()
    loss = cce_minus_loss(hidden, table, targets, n_negatives=4, seed=1)
    with pytest.raises(RuntimeError, match=r"can be differentiated once.*impl='reference'"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    loss = cce_minus_loss(hidden, table, targets, n_negatives=4, seed=1, impl="reference")
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), hidden)
    assert second.abs().max() > 0


def test_checkpointing_draws_the_same_ids_again():
    hidden, table, targets, _ = problem(n_items=50)

    def layer(hidden, table):
        return cce_minus_loss(hidden.tanh(), table, targets, n_negatives=4, seed=1, step=2)

    plain = torch.autograd.grad(layer(hidden, table), (hidden, table))
    loss = torch.utils.checkpoint.checkpoint(layer, hidden, table, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(loss, (hidden, table)), plain, strict=True):
        assert torch.equal(a, b)


def test_a_tensor_and_a_proposal_correct_alike(impl):
    hidden, table, targets, _ = problem()
    proposal = Proposal.popularity(torch.arange(1, 8))
    ids = torch.randint(7, (11, 5))
    a, b = (
        cce_minus_loss(hidden, table, targets, negatives=ids, log_q=log_q, impl=impl)
        for log_q in (proposal, proposal.log_q)
    )
    assert torch.equal(a, b)


def test_a_uniform_proposal_changes_nothing(impl):
    hidden, table, targets, _ = problem(n_items=1000)
    kwargs = {"n_negatives": 20, "seed": 1, "impl": impl}
    plain = cce_minus_loss(hidden, table, targets, **kwargs)
    proposed = cce_minus_loss(hidden, table, targets, log_q=Proposal.uniform(1000), **kwargs)
    torch.testing.assert_close(plain, proposed, rtol=0, atol=1e-6)  # log V is kept in float32


def test_the_reference_has_the_signature_of_the_front_door():
    front, reference = (inspect.signature(f).parameters for f in (cce_minus_loss, cce_minus_reference))
    assert [p for name, p in front.items() if name not in ("impl", "deterministic")] == list(reference.values())


def test_the_sparse_products_work_in_this_build():
    """Without them the CPU falls back to gathering, which is right but several times slower."""
    assert torch_chunked.sparse_rows_work()
