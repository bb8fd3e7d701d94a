"""What of the Triton path only hardware can show: races, rounding of tensor cores, memory, graphs, training."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from kernels.cce_minus import Proposal, cce_minus_loss

pytestmark = pytest.mark.gpu
SHARINGS = ("position", "tile", "batch")


def problem(n=20_000, n_items=5_000, width=64, dtype=torch.bfloat16, hot=0.3):
    torch.manual_seed(0)
    hidden = torch.randn(n, width, device="cuda").to(dtype).requires_grad_()
    table = (torch.randn(n_items, width, device="cuda") / width**0.5).to(dtype).requires_grad_()
    targets = torch.randint(n_items, (n,), device="cuda")
    targets[torch.rand(n, device="cuda") < hot] = 3
    targets[::11] = -100
    return hidden, table, targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 100, 256, 300])
@pytest.mark.parametrize("alias", [False, True])
@pytest.mark.parametrize("sharing", SHARINGS)
def test_large_problems_equal_float64(sharing, alias, width, dtype):
    hidden, table, targets = problem(n=3_000, width=width, dtype=dtype)
    proposal = Proposal.popularity(torch.arange(1, 5_001, device="cuda"), 0.75) if alias else None
    kwargs = {"n_negatives": 300, "seed": 1, "sharing": sharing, "log_q": proposal, "reduction": "sum"}
    ours = cce_minus_loss(hidden, table, targets, impl="triton", **kwargs)
    exact = [x.detach().double().requires_grad_() for x in (hidden, table)]
    truth = cce_minus_loss(*exact, targets, impl="torch", **kwargs)
    torch.testing.assert_close(ours.double(), truth, rtol=2e-6, atol=0)
    for x, a, b in zip(
        (hidden, table),
        torch.autograd.grad(ours, (hidden, table)),
        torch.autograd.grad(truth, exact),
        strict=True,
    ):
        scale = float(b.abs().max())
        torch.testing.assert_close(a.double(), b, rtol=torch.finfo(x.dtype).eps / 2 + 5e-5, atol=5e-5 * scale)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_tf32_only_where_torch_allows_it(sharing):
    hidden, table, targets = problem(n=2_000, dtype=torch.float32)
    exact = cce_minus_loss(hidden.double(), table.double(), targets, n_negatives=300, seed=1, sharing=sharing)
    errors = []
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            loss = cce_minus_loss(hidden, table, targets, n_negatives=300, seed=1, sharing=sharing, impl="triton")
            errors.append(abs(float(loss.double() - exact)) / float(exact))
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors[0] < 1e-6
    assert errors[1] < 1e-3


@pytest.mark.parametrize("sharing", [*SHARINGS, "all"])
def test_deterministic_is_equal_bit_for_bit_over_20_runs(sharing):
    hidden, table, targets = problem(n=6_000 if sharing == "all" else 20_000)
    kwargs = {"n_negatives": "all"} if sharing == "all" else {"n_negatives": 256, "seed": 1, "sharing": sharing}

    def gradients(deterministic):
        loss = cce_minus_loss(hidden, table, targets, impl="triton", deterministic=deterministic, **kwargs)
        return loss, *torch.autograd.grad(loss, (hidden, table))

    first = gradients(True)
    for _ in range(19):
        assert all(map(torch.equal, first, gradients(True)))
    torch.use_deterministic_algorithms(True)
    assert all(map(torch.equal, first, gradients(None)))
    torch.use_deterministic_algorithms(False)
    for a, b in zip(first, gradients(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("sharing", SHARINGS)
def test_memory_is_flat_in_the_number_of_negatives(sharing, deterministic):
    hidden, table, targets = problem(n=8_192, n_items=50_000)
    peaks = {}
    for k in (64, 512, 8192):
        for measured in (False, True):  # the first call compiles
            hidden.grad = table.grad = None
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            loss = cce_minus_loss(
                hidden, table, targets, n_negatives=k, seed=1, sharing=sharing, deterministic=deterministic
            )
            loss.backward()
            del loss
            torch.cuda.synchronize()
            if measured:
                peaks[k] = torch.cuda.max_memory_allocated() - before
    slack = 300 << 20 if deterministic else 0.01 * peaks[64]  # chunks of a fixed byte budget, filled or not
    assert abs(peaks[512] - peaks[64]) <= slack
    assert abs(peaks[8192] - peaks[64]) <= slack


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_cuda_graph_draws_fresh_ids_at_every_replay(sharing):
    hidden, table, targets = problem(n=2_000)
    step = torch.zeros((), dtype=torch.int64, device="cuda")

    def run():
        loss = cce_minus_loss(hidden, table, targets, n_negatives=100, seed=5, step=step, sharing=sharing)
        return loss, *torch.autograd.grad(loss, (hidden, table))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    values = []
    for number in (3, 4):
        step.fill_(number)
        graph.replay()
        for a, b in zip(captured, run(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)
        values.append(float(captured[0]))
    assert values[0] != values[1]


def test_the_compiled_graph_equals_eager():
    hidden, table, targets = problem(n=2_000)

    def layer(hidden):
        return cce_minus_loss(hidden.tanh(), table, targets, n_negatives=100, seed=5, sharing="tile")

    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(hidden), layer(hidden))


@pytest.mark.parametrize("sharing", SHARINGS)
def test_mixed_precision_training_moves_the_rows_of_negatives(sharing):
    torch.manual_seed(0)
    table = torch.nn.Parameter(torch.randn(2_000, 64, device="cuda") / 8)
    layer = torch.nn.Linear(64, 64, device="cuda")
    optimizer = torch.optim.Adam([table, *layer.parameters()], lr=1e-2)
    x = torch.randn(4_096, 64, device="cuda")
    targets = torch.randint(10, (4_096,), device="cuda")
    before = table.detach().clone()
    losses = []
    for step in range(30):
        with torch.autocast("cuda", torch.bfloat16):
            loss = cce_minus_loss(layer(x), table, targets, n_negatives=256, seed=1, step=step, sharing=sharing)
        optimizer.zero_grad()
        loss.backward()
        assert table.grad.dtype == torch.float32
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    moved = (table.detach() - before).abs().amax(1) > 0
    assert moved[10:].float().mean() > 0.95  # items that are never a target


def test_n_may_change_without_a_recompilation():
    from kernels.cce_minus.triton_position import position_forward_kernel
    from kernels.cce_minus.triton_tile import tile_forward_kernel, tile_table_kernel

    def variants():
        kernels = (position_forward_kernel, tile_forward_kernel, tile_table_kernel)
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    for sharing in SHARINGS:
        seen = []
        for n in (20_000, 20_001, 30_000, 31_072, 40_007):
            hidden, table, targets = problem(n=n)
            cce_minus_loss(hidden, table, targets, n_negatives=64, seed=1, sharing=sharing).backward()
            seen.append(variants())
        assert seen[0] == seen[-1]
