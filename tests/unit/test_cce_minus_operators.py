"""CCE- as a citizen of PyTorch: operator checks, compilation, transforms, host reads, the choice of a path."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kernels.cce_minus import Proposal, cce_minus_loss, function, operators

HAS_TRITON = function.HAS_TRITON
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"))]


def problem():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 5, 8, generator=generator).to(DEVICE).requires_grad_()
    table = torch.randn(20, 8, generator=generator).to(DEVICE).requires_grad_()
    targets = torch.randint(20, (3, 5), generator=generator)
    targets[0, :2] = -100
    return hidden, table, targets.to(DEVICE)


def choices(source):
    proposal = Proposal.popularity(torch.arange(1, 21, device=DEVICE), 0.7)
    return {
        "uniform": {"n_negatives": 5, "seed": 1},
        "alias": {"n_negatives": 5, "seed": 1, "log_q": proposal},
        "given": {"negatives": torch.arange(13 * 4, device=DEVICE).view(13, 4) % 20},
        "all": {"n_negatives": "all"},
    }[source]


def calls(monkeypatch, **kwargs):
    """Arguments with which the front door calls the forward operator."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(function, "cce_minus_forward", lambda *a: seen.append(a) or operators.cce_minus_forward(*a))
        cce_minus_loss(*problem(), **kwargs)
    return [x.detach().clone().requires_grad_(x.is_floating_point()) if _is_tensor(x) else x for x in seen[0]]


def _is_tensor(x):
    return isinstance(x, torch.Tensor)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("source", "sharing"), [("uniform", "position"), ("alias", "tile"), ("all", "batch")])
def test_opcheck(monkeypatch, impl, source, sharing):
    arguments = calls(monkeypatch, impl=impl, sharing=sharing, tile_size=4, **choices(source))
    torch.library.opcheck(operators.cce_minus_forward, tuple(arguments))
    loss, *saved = (x.detach() for x in operators.cce_minus_forward(*arguments))
    plain = [x.detach() if _is_tensor(x) else x for x in arguments]
    backward = (torch.ones_like(loss), torch.ones_like(loss), *saved, *plain[:15], plain[16], True, True)
    torch.library.opcheck(operators.cce_minus_backward, backward)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("source", "sharing"), [("uniform", "position"), ("uniform", "tile"), ("alias", "batch"), ("all", "position")]
)
def test_the_whole_graph_compiles(impl, source, sharing):
    hidden, table, targets = problem()
    kwargs = choices(source) | {"sharing": sharing, "tile_size": 4, "impl": impl, "return_lse": True}
    torch._dynamo.reset()

    def layer(hidden, step):
        loss, lse = cce_minus_loss(hidden.tanh(), table, targets, step=step, **kwargs)
        return loss + lse.square().mean()

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    values = []
    for number in (1, 2):
        step = torch.tensor(number, device=DEVICE)
        eager, graph = layer(hidden, step), compiled(hidden, step)
        assert torch.equal(eager, graph)
        for a, b in zip(*(torch.autograd.grad(x, (hidden, table)) for x in (eager, graph)), strict=True):
            torch.testing.assert_close(a, b)
        values.append(eager.item())
    assert (values[0] == values[1]) == (source == "all")  # the step is an input of the graph, not baked into it


@pytest.mark.filterwarnings("ignore:.*script_method.* is deprecated")  # torch's own, as inductor is imported
@pytest.mark.slow
def test_inductor_compiles_it_too():
    hidden, table, targets = problem()
    torch._dynamo.reset()

    def layer(hidden):
        return cce_minus_loss(hidden.tanh(), table, targets, n_negatives=5, seed=3)

    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(hidden), layer(hidden))


@pytest.mark.parametrize("impl", ["auto", *IMPLS, "reference"])
def test_functional_transforms_are_refused_alike(impl):
    hidden, table, targets = problem()

    def loss(hidden):
        return cce_minus_loss(hidden, table, targets, n_negatives=5, seed=1, impl=impl)

    for call in (lambda: torch.func.grad(loss)(hidden), lambda: torch.vmap(loss)(hidden.expand(2, 3, 5, 8))):
        with pytest.raises(RuntimeError) as error:
            call()
        words = "cce_minus_loss does not run under torch.func (grad, vmap, ...): use torch.autograd.grad"
        assert str(error.value) == words


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sharing", ["position", "tile"])
def test_checkpointing_and_accumulation(impl, sharing):
    hidden, table, targets = problem()

    def layer(hidden, table, step):
        kwargs = {"n_negatives": 5, "seed": 1, "step": step, "sharing": sharing, "reduction": "sum", "impl": impl}
        return cce_minus_loss(hidden.tanh(), table, targets, **kwargs)

    expected = [torch.zeros_like(hidden), torch.zeros_like(table)]
    for step in (0, 1):
        for total, part in zip(expected, torch.autograd.grad(layer(hidden, table, step), (hidden, table)), strict=True):
            total += part
        checkpoint(layer, hidden, table, step, use_reentrant=False).backward()
    torch.testing.assert_close(hidden.grad, expected[0])
    torch.testing.assert_close(table.grad, expected[1])
    steps = [torch.autograd.grad(layer(hidden, table, step), table)[0] for step in (0, 1)]
    assert not torch.equal(*steps)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_second_derivative_is_refused(impl):
    hidden, table, targets = problem()
    loss = cce_minus_loss(hidden, table, targets, n_negatives=4, seed=1, impl=impl)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss, hidden, create_graph=True)


class NoHostReads(TorchDispatchMode):
    """Fails where a tensor's value, or a size that depends on values, would have to travel to the host."""

    forbidden = ("_local_scalar_dense", "item", "nonzero", "unique", "masked_select", "is_nonzero", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(word in func.__name__ for word in self.forbidden), f"{func} reads the device"
        assert func.__name__ not in ("index.Tensor",) or all(x is None or x.dtype != torch.bool for x in args[1]), (
            "a boolean index reads the device"
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("source", "sharing"), [("uniform", "position"), ("alias", "tile"), ("uniform", "batch"), ("all", "position")]
)
def test_seeded_negatives_never_wait_for_the_device(monkeypatch, source, sharing, deterministic):
    from kernels.cce_minus import triton_path
    from kernels.launch import Launch

    arguments = calls(monkeypatch, impl="triton", sharing=sharing, tile_size=4, **choices(source))
    inputs = operators._inputs(*[x.detach() if _is_tensor(x) else x for x in arguments[:14]])
    inputs = operators.replace(inputs, targets=inputs.targets.reshape(-1))
    launched = []
    monkeypatch.setattr(
        Launch, "run", lambda self: launched.append(self.kernel)
    )  # the interpreter reads, a GPU does not
    with NoHostReads():
        loss, _, saved = triton_path.triton_forward(inputs, needs_direction=True)
        triton_path.triton_backward(
            loss, loss, inputs, saved, needs_hidden=True, needs_table=True, deterministic=deterministic
        )
    assert len(launched) >= 3
    with pytest.raises(AssertionError, match="reads the device"), NoHostReads():
        loss.sum().item()


def test_the_path_is_said_once_at_debug_level(caplog):
    operators._announce.cache_clear()
    with caplog.at_level(logging.DEBUG, "kernels.cce_minus"):
        for _ in range(3):
            cce_minus_loss(*problem(), n_negatives=3, seed=1)
    chosen = "triton" if DEVICE == "cuda" and HAS_TRITON else "torch"
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("kernels.cce_minus")]
    assert lines == [f"cce_minus_loss on {problem()[0].device}: impl='{chosen}'"]


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_without_the_interpreter_cpu_tensors_are_refused_and_auto_goes_on(project):
    code = (
        "import torch\nfrom kernels.cce_minus import cce_minus_loss\n"
        "x = torch.randn(4, 3), torch.randn(9, 3), torch.arange(4)\n"
        "print(cce_minus_loss(*x, n_negatives=3, seed=1).item() > 0)\n"
        "try:\n    cce_minus_loss(*x, n_negatives=3, seed=1, impl='triton')\n"
        "except ValueError as error:\n    print(error)\n"
        "import sys; print('kernels.cce_minus.triton_path' in sys.modules)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=project, env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines() == [
        "True",
        "impl='triton' takes CUDA tensors, and CPU tensors only where TRITON_INTERPRET=1 is set, got cpu",
        "False",  # a CPU never pays for the import
    ]


def test_gradients_of_one_input_skip_the_other(monkeypatch):
    hidden, table, targets = problem()
    wanted = []
    backward = operators.cce_minus_backward
    monkeypatch.setattr(operators, "cce_minus_backward", lambda *a: wanted.append(a[-2:]) or backward(*a))
    for h, c in ((hidden, table.detach()), (hidden.detach(), table), (hidden, table)):
        cce_minus_loss(h, c, targets, n_negatives=3, seed=1).backward()
    assert wanted == [(True, False), (False, True), (True, True)]
