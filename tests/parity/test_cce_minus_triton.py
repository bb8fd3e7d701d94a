"""The Triton kernels of CCE- against float64 on the same ids: on a GPU, or in Triton's interpreter on a CPU.

The interpreter computes what the kernels say, program by program: indices, masks, ids, sums. It emulates neither the
rounding of tf32 operands, nor bf16 products (the kernels widen them there), nor races between programs, and it cuts
numbers off to bf16 where a GPU rounds them; all that is seen where this file runs on a GPU (`pytest -m gpu`).
"""

import itertools
import math

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from kernels.cce_minus import Proposal, cce_minus_loss, cce_minus_negatives, triton_launches, triton_path

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
pytestmark = [pytest.mark.gpu] if CUDA else []

TILE = 20
# Shapes that divide no block: the interpreter's blocks are 16 positions x 16 columns, or 32 x 16 where they are shared.
PRODUCT = {
    "sharing": ("position", "tile", "batch"),
    "source": ("uniform", "alias", "given int32", "given int64"),
    "correction": ("logq", "none", "improved_logq", "classic_logq"),
    "dtype": ("fp32", "bf16", "fp16", "mixed", "autocast"),
    "n": (1, 7, 129),
    "k": (1, 5, 33),
    "width": (1, 7, 50, 100, 257),
}
MORE = {
    "deterministic": (False, True),
    "reduction": ("mean", "sum", "none"),
    "padding": ("none", "some", "first half"),
    "layout": ("contiguous", "guarded", "transposed"),
    "wanted": ("both", "hidden", "table"),
    "weighted": (False, True),
    "targets": ("spread", "hot", "int32"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "autocast": torch.float32}


def covering(settings):
    """Few cases in which every pair of values of two settings occurs, chosen greedily; the same ones every time."""
    names = list(settings)
    missing = {(a, x, b, y) for a, b in itertools.combinations(names, 2) for x in settings[a] for y in settings[b]}
    while missing:
        a, x, b, y = min(missing, key=repr)
        case = {a: x, b: y}
        for name in names:
            if name not in case:
                case[name] = max(
                    settings[name], key=lambda value: sum(_pair(case, name, value, o, names) in missing for o in case)
                )
        missing -= {_pair(case, p, case[p], q, names) for p, q in itertools.permutations(names, 2)}
        yield case


def _pair(case, name, value, other, names):
    first, second = sorted((name, other), key=names.index)
    values = case | {name: value}
    return first, values[first], second, values[second]


def every_combination():
    """The full product of the settings that decide the mathematics, the others taken in turn."""
    for number, values in enumerate(itertools.product(*PRODUCT.values())):
        yield dict(zip(PRODUCT, values, strict=True)) | {
            name: choices[(number // 7 + offset) % len(choices)] for offset, (name, choices) in enumerate(MORE.items())
        }


def identify(case):
    return " ".join(str(value) for value in case.values())


def laid_out(x, layout):
    """The same numbers at another place in memory: NaN all around, or the two strides exchanged."""
    if layout == "guarded":
        base = torch.full((x.shape[0] + 2, x.shape[1] + 3), math.nan, dtype=x.dtype, device=x.device)
        base[1:-1, 2:-1] = x
        return base[1:-1, 2:-1]
    return x.T.contiguous().T if layout == "transposed" else x


def problem(case):
    generator = torch.Generator().manual_seed(case["n"] * 1000 + case["width"] * 10 + case["k"])
    n, width, n_items = case["n"], case["width"], 40
    hidden_dtype = torch.bfloat16 if case["dtype"] == "mixed" else DTYPES[case["dtype"]]
    table_dtype = torch.float32 if case["dtype"] == "mixed" else DTYPES[case["dtype"]]
    hidden = (torch.randn(n, width, generator=generator) / width**0.5).to(hidden_dtype)
    table = torch.randn(n_items, width, generator=generator).to(table_dtype)
    targets = torch.randint(n_items, (n,), generator=generator)
    if case["targets"] == "hot":
        targets[torch.rand(n, generator=generator) < 0.8] = 3
    if case["targets"] == "int32":
        targets = targets.to(torch.int32)
    if case["padding"] == "some":
        targets[torch.rand(n, generator=generator) < 0.3] = -100
    if case["padding"] == "first half":
        targets[: n // 2] = -100
    weight = torch.rand(n, generator=generator) + 0.5
    place = case["layout"]
    return (
        laid_out(hidden.to(DEVICE), place).requires_grad_(),
        laid_out(table.to(DEVICE), place).requires_grad_(),
        targets.to(DEVICE),
        weight.to(DEVICE) if case["weighted"] else None,
    )


def draw_options(case, targets):
    """Arguments that name the ids and, for given ones, ids of the right shape."""
    shared = {"sharing": case["sharing"], "tile_size": TILE, "correction": case["correction"]}
    proposal = Proposal.popularity(torch.arange(1, 41, device=DEVICE), 0.8)
    if case["source"] in ("uniform", "alias"):
        options = {"n_negatives": case["k"], "seed": -5, "step": 2**33 + 1, "rank": 3}
        return shared | options | {"log_q": proposal if case["source"] == "alias" else None}
    n = int((targets != -100).sum())
    shape = {"position": (n, case["k"]), "tile": (-(-n // TILE), case["k"]), "batch": (case["k"],)}[case["sharing"]]
    ids = torch.randint(40, shape, generator=torch.Generator().manual_seed(case["k"])).to(DEVICE)
    dtype = torch.int32 if "32" in case["source"] else torch.int64
    return shared | {"negatives": ids.to(dtype), "log_q": proposal if case["k"] == 33 else None}


def compute(hidden, table, targets, weight, case, options, impl):
    """Loss, lse and the gradients asked for, of a sum in which every loss and every lse has a weight of its own."""
    autocast = case["dtype"] == "autocast" and impl == "triton"
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        loss, lse = cce_minus_loss(
            hidden, table, targets, weight=weight, reduction=case["reduction"], return_lse=True, impl=impl,
            deterministic=case["deterministic"], **options,
        )  # fmt: skip
    wanted = {"both": (hidden, table), "hidden": (hidden,), "table": (table,)}[case["wanted"]]
    scale = torch.linspace(0.5, 1.5, targets.numel(), dtype=torch.float64, device=DEVICE)
    kept = int((targets != -100).sum())
    total = (loss * scale).sum() if case["reduction"] == "none" else loss * max(1, kept)
    total = total + (lse * scale.flip(0)).sum()
    if case["wanted"] == "hidden":
        table = table.detach()
    gradients = torch.autograd.grad(total, wanted, allow_unused=kept == 0, materialize_grads=kept == 0)
    names = ("hidden", "table") if case["wanted"] == "both" else (case["wanted"],)
    return (loss, lse), dict(zip(names, gradients, strict=True))


def to_bfloat16(x):
    """As the kernels round: to nearest, but in the interpreter by cutting bits off."""
    return x.to(torch.bfloat16) if CUDA else (x.view(torch.int32) & -0x10000).view(torch.float32).to(torch.bfloat16)


def check(case):
    hidden, table, targets, weight = problem(case)
    options = draw_options(case, targets)
    rounded = case["dtype"] == "autocast" and case["sharing"] != "position"
    exact = [(to_bfloat16(x.detach()) if rounded else x.detach()).double().requires_grad_() for x in (hidden, table)]
    ours, our_gradients = compute(hidden, table, targets, weight, case, options, "triton")
    double_weight = None if weight is None else weight.double()
    truth, true_gradients = compute(*exact, targets, double_weight, case, options, "reference")
    for a, b in zip(ours, truth, strict=True):
        assert a.dtype == torch.float32
        # sums of up to 257 products and 34 exponentials, each rounded by 6e-8
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5)
    for name, b in true_gradients.items():
        a = our_gradients[name]
        x = hidden if name == "hidden" else table
        assert a.dtype == x.dtype
        assert a.shape == x.shape
        # summed in 32 bits: of the 16-bit dtype only the last rounding is seen; weights are split to 2^-17
        atol = 3e-5 * max(1.0, float(b.abs().max()))
        eps = torch.finfo(x.dtype).eps / (2 if CUDA or x.dtype != torch.bfloat16 else 1)
        torch.testing.assert_close(a.double(), b, rtol=eps + 2e-5, atol=atol)


@pytest.mark.parametrize("case", list(covering(PRODUCT | MORE)), ids=identify)
def test_every_pair_of_settings(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("correction", PRODUCT["correction"])
@pytest.mark.parametrize("source", PRODUCT["source"])
@pytest.mark.parametrize("sharing", PRODUCT["sharing"])
def test_every_combination_of_settings(sharing, source, correction):
    fixed = {"sharing": sharing, "source": source, "correction": correction}
    for case in every_combination():
        if fixed.items() <= case.items():
            try:
                check(case)
            except AssertionError as error:
                raise AssertionError(identify(case)) from error


def test_the_covering_set_covers_every_pair():
    settings = PRODUCT | MORE
    cases = list(covering(settings))
    for a, b in itertools.combinations(settings, 2):
        seen = {(case[a], case[b]) for case in cases}
        assert seen == set(itertools.product(settings[a], settings[b])), (a, b)


@pytest.fixture
def plain_case():
    """One value of every setting, to change one at a time."""
    return {name: values[0] for name, values in (PRODUCT | MORE).items()} | {"n": 40, "k": 20, "width": 7}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("width", [7, 300])
def test_every_item_is_the_full_cross_entropy(width, deterministic):
    hidden = (torch.randn(70, width, device=DEVICE) / width**0.5).requires_grad_()
    table = torch.randn(45, width, device=DEVICE, requires_grad=True)
    targets = torch.randint(45, (70,), device=DEVICE)
    targets[::9] = -100
    ours = cce_minus_loss(hidden, table, targets, n_negatives="all", impl="triton", deterministic=deterministic)
    exact = [x.detach().double().requires_grad_() for x in (hidden, table)]
    truth = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, targets)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(ours, (hidden, table)), torch.autograd.grad(truth, exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sharing", PRODUCT["sharing"])
@pytest.mark.parametrize("correction", ["logq", "none", "improved_logq"])
def test_fully_rejected_rows_cost_nothing(sharing, correction):
    hidden = torch.randn(6, 5, device=DEVICE, requires_grad=True)
    table = torch.randn(4, 5, device=DEVICE, requires_grad=True)
    targets = torch.full((6,), 2, device=DEVICE)
    ids = torch.full({"position": (6, 3), "tile": (1, 3), "batch": (3,)}[sharing], 2, device=DEVICE)
    loss, lse = cce_minus_loss(
        hidden, table, targets, negatives=ids, sharing=sharing, tile_size=TILE, correction=correction,
        reduction="none", return_lse=True, impl="triton",
    )  # fmt: skip
    assert torch.equal(loss, torch.zeros_like(loss))
    torch.testing.assert_close(lse, (hidden * table[targets]).sum(-1))
    for gradient in torch.autograd.grad(loss.sum(), (hidden, table), retain_graph=True):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    positive = (hidden * table[targets]).sum()
    for a, b in zip(
        torch.autograd.grad(lse.sum(), (hidden, table)), torch.autograd.grad(positive, (hidden, table)), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("sharing", [*PRODUCT["sharing"], "all"])
@pytest.mark.parametrize("shape", [(0,), (9,)], ids=["no positions", "all ignored"])
def test_nothing_kept_is_zero(sharing, shape, deterministic):
    hidden = torch.randn(*shape, 5, device=DEVICE, requires_grad=True)
    table = torch.randn(6, 5, device=DEVICE, requires_grad=True)
    targets = torch.full(shape, -100, device=DEVICE)
    kwargs = {"n_negatives": "all"} if sharing == "all" else {"n_negatives": 4, "seed": 1, "sharing": sharing}
    loss = cce_minus_loss(hidden, table, targets, impl="triton", deterministic=deterministic, **kwargs)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, (hidden, table)):
        assert not gradient.any()


@pytest.mark.parametrize("sharing", [*PRODUCT["sharing"], "all"])
@pytest.mark.parametrize("correction", PRODUCT["correction"])
def test_huge_logits_stay_finite(sharing, correction):
    hidden = torch.tensor([[300.0], [-300.0], [300.0], [-300.0]], device=DEVICE, requires_grad=True)
    table = torch.tensor([[1.0], [-1.0], [0.5]], device=DEVICE, requires_grad=True)
    targets = torch.tensor([0, 0, 1, 1], device=DEVICE)
    kwargs = {"n_negatives": "all"} if sharing == "all" else {"n_negatives": 8, "seed": 1, "sharing": sharing}
    results = []
    for dtype, impl in ((torch.float32, "triton"), (torch.float64, "reference")):
        h, c = (x.detach().to(dtype).requires_grad_() for x in (hidden, table))
        loss, lse = cce_minus_loss(
            h, c, targets, reduction="none", correction=correction, return_lse=True, impl=impl, **kwargs
        )
        results.append((loss, lse, *torch.autograd.grad(loss.sum() + lse.sum(), (h, c))))
    assert results[1][0].max() > 500
    for a, b in zip(*results, strict=True):
        # logits, lse and their difference near 300 are each rounded by up to 1.5e-5, which weights show relatively
        torch.testing.assert_close(a.double(), b, rtol=6e-5, atol=6e-5)


@pytest.mark.parametrize("sharing", [*PRODUCT["sharing"], "all"])
@pytest.mark.parametrize("correction", PRODUCT["correction"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_logit_that_is_no_number_makes_a_loss_that_is_none(bad, correction, sharing):
    hidden, table = torch.randn(6, 5, device=DEVICE), torch.randn(8, 5, device=DEVICE)
    table[7, 0] = bad
    hidden[:, 0] = torch.tensor([1.0, -1.0] * 3)  # a logit of +inf, then of -inf, which costs nothing
    targets = torch.arange(6, device=DEVICE)
    kwargs = {"n_negatives": "all"} if sharing == "all" else {"n_negatives": 60, "seed": 1, "sharing": sharing}
    kwargs |= {"correction": correction, "reduction": "none"}
    truth = cce_minus_loss(hidden, table, targets, impl="reference", **kwargs)
    hidden.requires_grad_()
    ours = cce_minus_loss(hidden, table, targets, impl="triton", **kwargs)
    (gradient,) = torch.autograd.grad(ours.sum(), hidden)
    ours, wrong = ours.detach(), ~truth.isfinite()
    assert wrong.tolist() == ([True, False] * 3 if bad == math.inf else [True] * 6)
    assert torch.equal(~ours.isfinite(), wrong)
    # float32: sums of up to 60 exponentials, each rounded by 6e-8
    torch.testing.assert_close(ours[~wrong], truth[~wrong], rtol=1e-5, atol=2e-5)
    assert not gradient[wrong].isfinite().any()


@pytest.mark.parametrize("sharing", PRODUCT["sharing"])
@pytest.mark.parametrize("correction", PRODUCT["correction"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_targets_logit_that_is_no_number_makes_a_loss_that_is_none(bad, correction, sharing):
    hidden, table = torch.randn(6, 5, device=DEVICE), torch.randn(8, 5, device=DEVICE)
    table[7, 0] = bad
    hidden[:, 0] = torch.tensor([1.0, -1.0] * 3)
    targets = torch.tensor([7, 7, 7, 7, 7, -100], device=DEVICE)
    ids = torch.arange(7, device=DEVICE)
    if sharing != "batch":
        ids = ids.repeat({"position": 5, "tile": 3}[sharing], 1)
        ids[-1] = 7  # of the last position that counts: without a negative, where collisions are rejected
    kwargs = {"negatives": ids, "sharing": sharing, "tile_size": 2, "correction": correction, "reduction": "none"}
    truth = cce_minus_loss(hidden, table, targets, impl="reference", **kwargs)
    hidden.requires_grad_()
    ours = cce_minus_loss(hidden, table, targets, impl="triton", **kwargs)
    (gradient,) = torch.autograd.grad(ours.sum(), hidden)
    ours = ours.detach()
    assert truth[:4].isnan().tolist() == ([True, False] * 2 if bad == math.inf else [True] * 4)
    compared = slice(None) if bad == math.inf else slice(4)  # without a negative the reference hides a logit of NaN
    assert torch.equal(ours[compared].isnan(), truth[compared].isnan())
    assert torch.equal(ours[compared].isinf(), truth[compared].isinf())
    assert not gradient[:4].isfinite().any()
    assert float(ours[5]) == 0
    assert not gradient[5].any()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("sharing", PRODUCT["sharing"])
def test_a_given_correction_reaches_every_kernel_in_float32(plain_case, sharing, deterministic, monkeypatch):
    """The interpreter takes float64 too; for a GPU, loops whose sums change their dtype do not compile."""
    case = plain_case | {"sharing": sharing, "source": "given int64", "deterministic": deterministic}
    hidden, table, targets, weight = problem(case)
    log_q = torch.arange(1, 41, dtype=torch.float64, device=DEVICE).log().log_softmax(0)
    planned, run = [], triton_launches.Launch.run
    monkeypatch.setattr(triton_launches.Launch, "run", lambda launch: (planned.append(launch), run(launch)))
    options = draw_options(case, targets) | {"log_q": log_q}
    _, ours = compute(hidden, table, targets, weight, case, options, "triton")
    read = [launch.arguments["log_q"] for launch in planned if "log_q" in launch.arguments]
    assert [x.dtype for x in read] == [torch.float32] * 2  # the forward pass, and the backward one
    _, truth = compute(hidden, table, targets, weight, case, options, "reference")
    for name in ours:
        torch.testing.assert_close(ours[name], truth[name], rtol=2e-5, atol=3e-5)  # as in `check`


@pytest.mark.parametrize("sharing", PRODUCT["sharing"])
def test_items_never_drawn_do_not_matter_where_nothing_is_kept(sharing):
    hidden, table = torch.randn(9, 5, device=DEVICE, requires_grad=True), torch.randn(6, 5, device=DEVICE)
    ids = torch.zeros({"position": (0, 4), "tile": (0, 4), "batch": (4,)}[sharing], dtype=torch.int64, device=DEVICE)
    log_q = torch.tensor([1.0, 1, 1, 1, 0, 0], device=DEVICE).div(4).log()
    loss = cce_minus_loss(
        hidden, table, torch.full((9,), -100, device=DEVICE), negatives=ids, log_q=log_q, sharing=sharing, impl="triton"
    )  # fmt: skip
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, hidden)[0].any()


@pytest.mark.parametrize("sharing", PRODUCT["sharing"])
@pytest.mark.parametrize("mass", [0.9999, 0.99999])
def test_a_target_of_nearly_all_the_probability_keeps_its_digits(sharing, mass):
    q = torch.full((9,), (1 - mass) / 8, dtype=torch.float64, device=DEVICE)
    q[3] = mass
    proposal = Proposal.from_probabilities(q)
    hidden, table = torch.randn(40, 8, device=DEVICE) / 8**0.5, torch.randn(9, 8, device=DEVICE)
    ids = torch.arange(9, device=DEVICE)
    ids = ids if sharing == "batch" else ids.expand({"position": 40, "tile": 2}[sharing], 9)
    kwargs = {"negatives": ids, "sharing": sharing, "tile_size": TILE, "log_q": proposal, "reduction": "none"}
    targets = torch.full((40,), 3, device=DEVICE)
    ours = cce_minus_loss(hidden, table, targets, impl="triton", **kwargs)
    truth = cce_minus_loss(hidden.double(), table.double(), targets, impl="reference", **kwargs)
    # log q, log(1 - q) and logits, all within 14, are each rounded by up to 1e-6; 1 - exp(log q) would be off by 3e-4
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=5e-6)


@pytest.mark.parametrize("sharing", PRODUCT["sharing"])
@pytest.mark.parametrize("alias", [False, True])
def test_kernels_draw_the_ids_of_every_other_path(plain_case, sharing, alias):
    case = plain_case | {"sharing": sharing, "source": "alias" if alias else "uniform", "n": 61, "padding": "some"}
    hidden, table, targets, _ = problem(case)
    options = draw_options(case, targets)
    drawn = {name: options[name] for name in ("n_negatives", "seed", "step", "rank", "sharing", "tile_size", "log_q")}
    ids, row = cce_minus_negatives(targets, 40, **drawn)
    seeded = cce_minus_loss(hidden, table, targets, reduction="none", impl="triton", **options)
    given = cce_minus_loss(
        hidden, table, targets, negatives=ids[row], log_q=options["log_q"], reduction="none", impl="triton"
    )
    # one wrong id of the twenty would move its row's loss by far more
    torch.testing.assert_close(seeded, given, rtol=0, atol=2e-6)


@pytest.mark.parametrize("sharing", PRODUCT["sharing"])
def test_the_deterministic_backward_in_many_chunks(plain_case, sharing, monkeypatch):
    case = plain_case | {"sharing": sharing, "deterministic": True, "targets": "hot", "n": 70}
    whole = compute(*problem(case), case, draw_options(case, problem(case)[2]), "triton")[1]
    monkeypatch.setattr(triton_path, "DETERMINISTIC_BYTES", 3000)
    chunked = compute(*problem(case), case, draw_options(case, problem(case)[2]), "triton")[1]
    for name in whole:
        torch.testing.assert_close(whole[name], chunked[name], rtol=1e-5, atol=1e-6)
    check(case)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("sharing", PRODUCT["sharing"])
def test_no_scratch_memory_is_read_before_it_is_written(plain_case, sharing, deterministic, monkeypatch):
    case = plain_case | {"sharing": sharing, "deterministic": deterministic, "padding": "some", "n": 50}
    empty = torch.empty

    def filled(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(math.nan if out.is_floating_point() else 2**30) if out.device.type != "meta" else out

    monkeypatch.setattr(torch, "empty", filled)
    check(case)


@pytest.mark.parametrize("sharing", ["tile", "batch"])
def test_long_groups_are_cut_into_segments(plain_case, sharing, monkeypatch):
    case = plain_case | {"sharing": sharing, "n": 129}
    monkeypatch.setattr(triton_launches, "LARGEST_TILE", 8)
    monkeypatch.setattr(triton_launches, "PROGRAMS", 2)
    for deterministic in (False, True):
        check(case | {"deterministic": deterministic})
