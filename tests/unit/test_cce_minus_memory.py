"""No tensor of the size of the logits, let alone of the gathered rows, is ever allocated by the chunked path."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.cce_minus import Proposal, candidate_rows, cce_minus_loss, operators, torch_chunked

OPERATORS = {
    torch.ops.seqlit.cce_minus_forward.default: operators.cce_minus_forward._init_fn,
    torch.ops.seqlit.cce_minus_backward.default: operators.cce_minus_backward._init_fn,
}


class LargestTensor(TorchDispatchMode):
    """Records the most elements and bytes of any tensor that an operator returns, backward pass included."""

    def __init__(self, ignored_sizes=()):
        super().__init__()
        self.ignored_sizes = ignored_sizes
        self.elements, self.bytes, self.where = 0, 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in OPERATORS:
            with self:  # a custom operator hides what it calls
                return OPERATORS[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                size = tensor.untyped_storage().nbytes()
                if size in self.ignored_sizes:
                    continue
                if size > self.bytes:
                    self.bytes, self.where = size, func
                self.elements = max(self.elements, size // tensor.element_size())
        return out


def largest_tensor(hidden, table, targets, ignore_outputs=False, **kwargs):
    sizes = {hidden.untyped_storage().nbytes(), table.untyped_storage().nbytes()}
    with LargestTensor(sizes if ignore_outputs else ()) as largest:
        loss = cce_minus_loss(hidden, table, targets, **kwargs)
        loss.backward()
    return largest


@pytest.fixture
def small_blocks(monkeypatch):
    """A sixteenth of the memory, so that a problem of a second falls into many blocks."""
    monkeypatch.setattr(torch_chunked, "SPARSE_BLOCK_BYTES", torch_chunked.SPARSE_BLOCK_BYTES // 16)
    smaller = {device: size // 16 for device, size in torch_chunked.GATHERED_BLOCK_BYTES.items()}
    monkeypatch.setattr(torch_chunked, "GATHERED_BLOCK_BYTES", smaller)
    return {"sparse": torch_chunked.SPARSE_BLOCK_BYTES, "gathered": smaller["cpu"]}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharing", ["position", "tile", "batch"])
@pytest.mark.parametrize("alias", [False, True])
def test_nothing_grows_with_positions_times_negatives(sharing, dtype, alias):
    n, k, width, n_items = 2048, 256, 4, 3000
    hidden = torch.randn(n, width).to(dtype).requires_grad_()
    table = torch.randn(n_items, width).to(dtype).requires_grad_()
    targets = torch.randint(n_items, (n,))
    proposal = Proposal.log_uniform(n_items) if alias else None
    largest = largest_tensor(hidden, table, targets, n_negatives=k, seed=1, sharing=sharing, log_q=proposal)
    assert largest.elements <= n * k / 4, largest.where
    # the work is real: a block is larger than either input
    assert largest.elements > 2 * max(n, n_items) * width


def test_the_plain_reference_would_be_caught():
    hidden, table = torch.randn(64, 8, requires_grad=True), torch.randn(100, 8, requires_grad=True)
    largest = largest_tensor(hidden, table, torch.randint(100, (64,)), n_negatives=32, seed=1, impl="reference")
    assert largest.elements == 64 * 32 * 8


@pytest.mark.usefixtures("small_blocks")
def test_the_full_loss_holds_no_row_per_position_and_item():
    hidden, table = torch.randn(512, 4, requires_grad=True), torch.randn(9001, 4, requires_grad=True)
    largest = largest_tensor(hidden, table, torch.randint(9001, (512,)), n_negatives="all")
    assert largest.elements <= 512 * 9001 / 8, largest.where


@pytest.mark.parametrize("k", [100, 1000, 3000])
@pytest.mark.parametrize("sharing", ["position", "tile", "batch"])
def test_no_tensor_outgrows_the_budget_of_a_block(small_blocks, sharing, k):
    hidden, table = torch.randn(1024, 4, requires_grad=True), torch.randn(3000, 4, requires_grad=True)
    targets = torch.randint(3000, (1024,))
    largest = largest_tensor(hidden, table, targets, n_negatives=k, seed=1, sharing=sharing)
    assert largest.bytes <= small_blocks["sparse" if sharing == "position" else "gathered"], largest.where


@pytest.mark.parametrize("sharing", ["position", "tile", "batch"])
def test_wide_rows_and_few_negatives_fit_a_block_too(small_blocks, monkeypatch, sharing):
    monkeypatch.setattr(candidate_rows, "SEGMENT_BYTES", 1 << 16)
    # inputs and their gradients are left out by their size, which nothing else has: 32771 and 2003 rows of 512 bytes
    hidden, table = torch.randn(32771, 128, requires_grad=True), torch.randn(2003, 128, requires_grad=True)
    targets = torch.randint(2003, (32771,))
    largest = largest_tensor(hidden, table, targets, n_negatives=2, seed=1, sharing=sharing, ignore_outputs=True)
    assert largest.bytes <= small_blocks["sparse" if sharing == "position" else "gathered"], largest.where


class PeakBytes(TorchDispatchMode):
    """Records the most bytes that were alive at one time among all tensors that operators return."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.known = 0, 0, set()

    def _freed(self, key, size):
        self.alive -= size
        self.known.discard(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in OPERATORS:
            with self:  # a custom operator hides what it calls
                return OPERATORS[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.known:
                    self.known.add(key)
                    self.alive += size
                    weakref.finalize(storage, self._freed, key, size)
        self.peak = max(self.peak, self.alive)
        return out


def peak_bytes(n_negatives, n=512, **kwargs):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(n, 16, generator=generator, requires_grad=True)
    table = torch.randn(1000, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, 1000, (n,), generator=generator)
    gc.collect()
    with PeakBytes() as memory:
        cce_minus_loss(hidden, table, targets, n_negatives=n_negatives, seed=1, **kwargs).backward()
    return memory.peak


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("sharing", "n", "few", "many"),
    # Enough of both that a block is full.
    [("position", 8192, 256, 1024), ("tile", 512, 32768, 131072), ("batch", 512, 32768, 131072)],
)
def test_peak_memory_does_not_grow_with_the_number_of_negatives(sharing, n, few, many):
    """Four times the negatives, at most one per cent more: the draws, logits and gathered rows live in blocks.

    Less is possible: of single positions fewer fit a block, and what a block holds for each of them shrinks.
    """
    peaks = [peak_bytes(k, n, sharing=sharing, tile_size=64) for k in (few, many)]
    assert peaks[1] <= 1.01 * peaks[0]


def test_the_peak_of_the_reference_does_depend_on_it():
    """The measure sees what it should: twice the negatives, nearly twice the peak."""
    few, many = (peak_bytes(k, impl="reference") for k in (256, 512))
    assert many > 1.8 * few
