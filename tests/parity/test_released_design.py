"""The rival in `scripts/released_design.py` against its own definition: on a GPU, or in Triton's interpreter."""

import importlib.util
import math
import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
pytestmark = [pytest.mark.gpu] if CUDA else []


@pytest.fixture(scope="module")
def released(project):
    """The script as a module: scripts are no package."""
    spec = importlib.util.spec_from_file_location("released_design", project / "scripts" / "released_design.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Triton looks a kernel's globals up by the name of its module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def problem(n, width, n_items, dtype=torch.float32):
    hidden = torch.randn(n, width).to(DEVICE, dtype).requires_grad_()
    table = (torch.randn(n_items, width) / width**0.5).to(DEVICE, dtype).requires_grad_()
    return hidden, table, torch.randint(n_items, (n,)).to(DEVICE)


# Widths beside a power of two and beyond one block of the indexed dot; few items, so that many draws are rejected.
@pytest.mark.parametrize(
    ("n", "k", "width", "n_items"), [(1, 1, 8, 2), (40, 9, 50, 6), (33, 5, 300, 1000), (7, 20, 7, 4)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_losses_and_gradients_are_those_of_the_definition(released, n, k, width, n_items, dtype):
    hidden, table, targets = problem(n, width, n_items, dtype)
    columns = released.draw_columns(targets, n_items, k, seed=3)
    weight = torch.linspace(0.5, 1.5, n, device=DEVICE)
    losses = released.released_losses(hidden, table, columns)
    exact = [x.detach().double().requires_grad_() for x in (hidden, table)]
    truth = released.defined_losses(*exact, columns)
    assert losses.dtype == torch.float32
    # products and sums in fp32 of up to 300 terms
    torch.testing.assert_close(losses.double(), truth, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad((losses * weight).sum(), (hidden, table))
    true = torch.autograd.grad((truth * weight).sum(), exact)
    for a, b in zip(ours, true, strict=True):
        assert a.dtype == dtype
        # up to 60 terms are added in fp16: each addition is off by half of 2^-10 of the partial sum
        torch.testing.assert_close(a.double(), b, rtol=0, atol=float(b.abs().max()) * 60 * 2**-11)


def test_a_rejected_draw_stays_as_a_constant_and_has_no_gradient(released):
    hidden, table, targets = problem(5, 6, 3)
    columns = torch.cat([targets[:, None], torch.full((5, 4), 3, device=DEVICE)], dim=1)
    losses = released.released_losses(hidden, table, columns)
    positive = (hidden.half().float() * table.half().float()[targets]).sum(-1)
    # four constants of (V - 1) / (K + 1) beside the exponential of the positive logit
    torch.testing.assert_close(losses, torch.log(positive.exp() + 4 * 2 / 5) - positive, rtol=1e-5, atol=1e-5)
    (d_table,) = torch.autograd.grad(losses.sum(), table)
    others = torch.ones(3, dtype=torch.bool, device=DEVICE).index_fill_(0, targets, False)
    assert not d_table[others].any()
    assert d_table.any()


def test_columns_are_the_target_then_draws_with_rejected_ones_marked(released):
    targets = torch.tensor([0, 1, 2], device=DEVICE)
    columns = released.draw_columns(targets, 3, 2000, seed=1)
    assert columns.dtype == torch.int64
    assert torch.equal(columns[:, 0], targets)
    assert not (columns[:, 1:] == targets[:, None]).any()
    # 2000 draws, one third of them rejected: four standard deviations of 21
    assert ((columns == 3).sum(1) - 2000 / 3).abs().max() < 4 * math.sqrt(2000 * 2 / 9)
    assert torch.equal(columns, released.draw_columns(targets, 3, 2000, seed=1))
    assert not torch.equal(columns, released.draw_columns(targets, 3, 2000, seed=2))
