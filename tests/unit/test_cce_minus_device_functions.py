"""What the Triton kernels are made of: ids bit for bit, addresses beyond 2^31, logarithms near 1."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from kernels.cce_minus import Proposal
from kernels.cce_minus.negatives import DrawnNegatives
from kernels.cce_minus.philox import MASK, PhiloxStream
from kernels.cce_minus.triton_rows import ALIAS, UNIFORM, element_offsets, log1mexp, log1p, negative_ids

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
pytestmark = [pytest.mark.gpu] if CUDA else []


@triton.jit
def ids_kernel(
    out, stream, threshold, alias, rows, first_column, n_columns, n_items,
    SOURCE: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    b = tl.arange(0, B)
    row = tl.load(rows + b)
    ids = negative_ids(stream, threshold, alias, None, 0, 0, row, first_column, n_columns, n_items, SOURCE, B, C)
    tl.store(out + b[:, None] * C + tl.arange(0, C)[None, :], ids)


@triton.jit
def offsets_kernel(out, rows, columns, row_stride, column_stride, B: tl.constexpr):
    b = tl.arange(0, B)
    offsets = element_offsets(tl.load(rows + b), tl.load(columns + b), row_stride, column_stride)
    tl.store(out + b[:, None] * B + b[None, :], offsets)


@triton.jit
def log1p_kernel(out, x, B: tl.constexpr):
    b = tl.arange(0, B)
    tl.store(out + b, log1p(tl.load(x + b)))


@triton.jit
def log1mexp_kernel(out, x, B: tl.constexpr):
    b = tl.arange(0, B)
    tl.store(out + b, log1mexp(tl.load(x + b)))


@pytest.mark.parametrize("n_items", [3, 1000, 2**24 + 3])
@pytest.mark.parametrize("alias", [False, True])
@pytest.mark.parametrize(("seed", "step", "rank"), [(0, 0, 0), (-7, 2**40 + 5, 3), (2**62 + 1, -1, MASK)])
def test_kernels_draw_ids_bit_for_bit(n_items, alias, seed, step, rank):
    rows = torch.tensor([0, 1, 77, 2**31 - 1])
    stream = PhiloxStream.of(seed, step, rank)
    proposal = Proposal.popularity(torch.arange(n_items) % 97 + 1, 0.75) if alias else None
    table = (None, None) if proposal is None else (proposal.threshold, proposal.alias)
    source = DrawnNegatives(stream, 2**31, 2**20, n_items, table, torch.device("cpu"))
    words = torch.tensor([seed, stream.step[0], stream.step[1]], device=DEVICE)
    on_device = [None if x is None else x.to(DEVICE) for x in table]
    for first_column in (0, 64, 2**20 - 64):
        out = torch.empty(4, 64, dtype=torch.int32, device=DEVICE)
        kind = (ALIAS if alias else UNIFORM).value
        ids_kernel[(1,)](
            out, words, *on_device, rows.to(DEVICE), first_column, 2**20, n_items, SOURCE=kind, B=4, C=64
        )  # fmt: skip
        expected = torch.cat([source.block(int(row), 1, first_column, 64) for row in rows])
        assert torch.equal(out.cpu(), expected)


def test_addresses_beyond_two_to_the_31():
    rows = torch.tensor([0, 1, 8_388_608, 2_000_000_000], dtype=torch.int32)
    columns = torch.tensor([0, 1, 255, 2**31 - 1], dtype=torch.int32)
    for row_stride, column_stride in [(256, 1), (1, 10_000_000), (2**31 - 1, 3)]:
        out = torch.empty(4, 4, dtype=torch.int64, device=DEVICE)
        offsets_kernel[(1,)](out, rows.to(DEVICE), columns.to(DEVICE), row_stride, column_stride, B=4)
        expected = [[int(r) * row_stride + int(c) * column_stride for c in columns] for r in rows]
        assert out.tolist() == expected
        assert max(map(max, expected)) > 2**31


def test_log1p_keeps_small_numbers():
    x = torch.tensor([0.0, 1e-30, 3e-9, 1e-7, 6e-8, 1e-4, 0.3, 1.0, -1e-9, -1e-4, -0.5, -0.999, -1.0, 7.0, 1e-3, 0.9])
    out = torch.empty(16, device=DEVICE)
    log1p_kernel[(1,)](out, x.to(DEVICE), B=16)
    expected = [math.log1p(v) if v > -1 else -math.inf for v in x.double().tolist()]
    torch.testing.assert_close(out.cpu().double(), torch.tensor(expected).double(), rtol=1e-6, atol=0)


def test_log1mexp_keeps_its_digits_at_both_ends():
    x = torch.tensor(
        [0.0, -1e-30, -3e-9, -6e-8, -1e-6, -1e-5, -1e-4, -0.01, -0.3, -0.69, -0.7, -2.0, -9.0, -20.0, -99.0, -math.inf]
    )
    out = torch.empty(16, device=DEVICE)
    log1mexp_kernel[(1,)](out, x.to(DEVICE), B=16)
    expected = [math.log(-math.expm1(v)) if v else -math.inf for v in x.double().tolist()]
    # float32: the rounding of exp(x), of two quotients and of a logarithm within 70
    torch.testing.assert_close(out.cpu().double(), torch.tensor(expected).double(), rtol=5e-7, atol=1e-7)
