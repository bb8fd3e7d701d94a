"""What `bench_cce_minus.py` compares: the problem, every way to compute a loss on it, and the check of each in float64.

Letters: N positions, D width, V items, K negatives.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.cce_minus import cce_minus_loss, cce_minus_negatives

TILE = 128
PLAIN = ("plain, table[ids]", "plain, F.embedding")
SHARINGS = {"position": "per position", "tile": f"per tile of {TILE}", "batch": "per batch"}
RELEASED = "released design"
_SEED = 1
# 300 positions meet three tiles; fewer where the truth holds every logit in float64.
_CHECKED, _CHECKED_FULL = 300, 64
Family = Literal["plain", "compiled", "released", "ours", "full"]


@dataclass(frozen=True, eq=False)
class Problem:
    """Inputs: hidden (N, D), table (V, D) and targets (N,)."""

    hidden: Tensor
    table: Tensor
    targets: Tensor
    n_negatives: int

    @classmethod
    def make(
        cls, positions: int, negatives: int, width: int, items: int, dtype: torch.dtype, device: str = "cpu"
    ) -> Problem:
        """Unit-scale logits from a fixed seed."""
        generator = torch.Generator(device).manual_seed(0)
        hidden = torch.randn(positions, width, generator=generator, device=device)
        table = torch.randn(items, width, generator=generator, device=device) / width**0.5
        targets = torch.randint(items, (positions,), generator=generator, device=device)
        return cls(hidden.to(dtype).requires_grad_(), table.to(dtype).requires_grad_(), targets, negatives)

    @property
    def n_positions(self) -> int:
        """Number of positions N."""
        return self.targets.shape[0]

    @property
    def is_cuda(self) -> bool:
        """Whether the inputs lie on a GPU."""
        return self.hidden.is_cuda

    def first(self, n: int) -> Problem:
        """The first n positions; the table is the same tensor."""
        if n >= self.n_positions:
            return self
        return replace(self, hidden=self.hidden.detach()[:n].requires_grad_(), targets=self.targets[:n])

    def double(self) -> Problem:
        """The same numbers in float64."""
        hidden, table = (x.detach().double().requires_grad_() for x in (self.hidden, self.table))
        return replace(self, hidden=hidden, table=table)

    def clear(self) -> None:
        """Forget the gradients."""
        self.hidden.grad = self.table.grad = None


@dataclass(frozen=True, eq=False)
class Variant:
    """One way to compute a loss.

    Args:
        name: As the table prints it.
        family: What it is; only "ours" is never run on fewer positions, and ends the benchmark where it is wrong.
        loss: The mean loss of a problem with the ids of a step.
        truth: The same, for a problem in float64, written plainly.
        sharing: Who shares negatives, "full" where every item is one, "" where there is no floor to compare with.
    """

    name: str
    family: Family
    loss: Callable[[Problem, int], Tensor]
    truth: Callable[[Problem, int], Tensor]
    sharing: str = ""

    def bytes_per_position(self, problem: Problem) -> int:
        """Rough memory of a position on a CPU, which kills a process in place of refusing memory."""
        size = problem.hidden.element_size()
        width, n_items = problem.table.shape[1], problem.table.shape[0]
        if self.family in ("plain", "compiled"):
            return 3 * size * problem.n_negatives * width
        return 12 * n_items if self.family == "full" else 0


def runs_triton(device: str) -> bool:
    """Whether Triton's kernels run on a device, if only in the interpreter."""
    installed = importlib.util.find_spec("triton") is not None
    return installed and (device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def our_variants(device: str, impl: Any, full: bool) -> list[Variant]:
    """Our modes; named after the path that computes them."""
    path = "triton" if impl == "triton" or (impl == "auto" and device == "cuda" and runs_triton(device)) else "chunked"

    def loss(problem: Problem, step: int, sharing: Any) -> Any:
        return cce_minus_loss(
            problem.hidden, problem.table, problem.targets, n_negatives=problem.n_negatives, seed=_SEED, step=step,
            sharing=sharing, tile_size=TILE, impl=impl,
        )  # fmt: skip

    def truth(problem: Problem, step: int, sharing: Any) -> Any:
        ids, row = cce_minus_negatives(
            problem.targets, problem.table.shape[0], n_negatives=problem.n_negatives, seed=_SEED, step=step,
            sharing=sharing, tile_size=TILE,
        )  # fmt: skip
        return _reference(problem, ids[row])

    def every_item(problem: Problem, step: int) -> Any:
        return cce_minus_loss(problem.hidden, problem.table, problem.targets, n_negatives="all", impl=impl)

    variants = [
        Variant(
            f"{path}, {text}",
            "ours",
            functools.partial(loss, sharing=name),
            functools.partial(truth, sharing=name),
            name,
        )
        for name, text in SHARINGS.items()
    ]
    if full:
        variants.append(Variant(f"{path}, full cross-entropy", "ours", every_item, _full_truth, "full"))
    return variants


def plain_variants() -> list[Variant]:
    """CE- as one writes it in PyTorch; the two gathers differ in their backward."""
    gathers: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (lambda t, i: t[i], lambda t, i: F.embedding(i, t))

    def loss(problem: Problem, step: int, gather: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return _plain_loss(problem.hidden, problem.table, problem.targets, _draw(problem, step), gather)

    return [
        Variant(name, "plain", functools.partial(loss, gather=gather), _drawn_truth)
        for name, gather in zip(PLAIN, gathers, strict=True)
    ]


def rivals(problem: Problem) -> tuple[list[Variant], dict[str, str]]:
    """What else there is for a problem, and by name why the others are not."""
    device = problem.hidden.device.type
    found, missing = [Variant("plain, compiled", "compiled", _compiled_loss, _drawn_truth)], {}
    blocks = -(-problem.n_positions // 32) * (problem.n_negatives + 1)
    if not runs_triton(device):
        missing[RELEASED] = "no device that Triton's kernels run on"
    elif device == "cpu" and blocks > 2000:
        missing[RELEASED] = f"{blocks} programs are too many for the interpreter"
    else:
        found.append(Variant(RELEASED, "released", _released_loss, _released_truth))
    functions = (
        ("full, linear_cross_entropy", _torch_full, hasattr(F, "linear_cross_entropy"), "torch has none"),
        ("full, linear_cross_entropy chunked", _torch_full_chunked, hasattr(torch.nn, "LinearCrossEntropyOptions"),
         "torch has none"),
        *((f"full, {package}", function, device == "cuda" and _installed(package), "not installed, or no CUDA device")
          for package, function in (("cut-cross-entropy", _cut_full), ("liger-kernel", _liger_full))),
    )  # fmt: skip
    for name, function, is_there, reason in functions:
        if is_there:
            found.append(Variant(name, "full", function, _full_truth, "full"))
        else:
            missing[name] = reason
    return found, missing


def parity(variant: Variant, problem: Problem, step: int = 7) -> str:
    """Compare loss and gradients with float64 on the same ids; what is off, "" if nothing is.

    Errors are relative to the largest entry. Ours sum in 32 bits and round once. Rivals may compute in 16 bits, drop
    small terms or lose them in sums: they are only to be the same function.
    """
    few = problem.first(_CHECKED_FULL if variant.sharing == "full" else _CHECKED)
    exact = few.double()
    ours, truth = (
        (loss.detach(), *torch.autograd.grad(loss * few.n_positions, (p.hidden, p.table)))
        for loss, p in ((variant.loss(few, step), few), (variant.truth(exact, step), exact))
    )
    rounding = torch.finfo(problem.hidden.dtype).eps if problem.hidden.element_size() == 2 else 0.0
    for what, a, b in zip(("loss", "d_hidden", "d_table"), ours, truth, strict=True):
        allowed = 5e-5 + (rounding if what != "loss" else 0.0) if variant.family == "ours" else 5e-2
        error = float((a.double() - b).abs().max() / b.abs().max())
        if not error <= allowed:
            return f"{what} is off by {error:.2e}, allowed {allowed:.2e}"
    return ""


def _installed(package: str) -> bool:
    module = {"cut-cross-entropy": "cut_cross_entropy", "liger-kernel": "liger_kernel"}[package]
    return importlib.util.find_spec(module) is not None


def _draw(problem: Problem, step: int) -> Tensor:
    """Ids (N, K) int64 of a step."""
    device = problem.targets.device
    generator = torch.Generator(device).manual_seed(step)
    shape = (problem.n_positions, problem.n_negatives)
    return torch.randint(problem.table.shape[0], shape, generator=generator, device=device)


def _plain_loss(
    hidden: Tensor, table: Tensor, targets: Tensor, ids: Tensor, gather: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Gather the rows of the negatives, multiply, mask, logsumexp."""
    positive = (hidden * gather(table, targets)).sum(-1).float()
    logits = torch.bmm(gather(table, ids), hidden[:, :, None]).squeeze(-1).float()
    return _finish(logits, positive, targets, ids, table.shape[0])


def _finish(logits: Tensor, positive: Tensor, targets: Tensor, ids: Tensor, n_items: int) -> Tensor:
    rejected = ids == targets[:, None]
    n_kept = ids.shape[1] - rejected.sum(-1, keepdim=True)
    logits = (logits + torch.log((n_items - 1) / n_kept)).masked_fill(rejected, float("-inf"))
    return (torch.logsumexp(torch.cat([positive[:, None], logits], dim=1), dim=1) - positive).mean()


def _fusible_loss(hidden: Tensor, table: Tensor, targets: Tensor, ids: Tensor) -> Tensor:
    """The same as products and sums, which a compiler can fuse with the gather where a batched product is a wall."""
    e = hidden.float()
    positive = (e * F.embedding(targets, table).float()).sum(-1)
    logits = (F.embedding(ids, table).float() * e[:, None]).sum(-1)
    return _finish(logits, positive, targets, ids, table.shape[0])


@functools.cache
def _compiler() -> Callable[..., Tensor]:
    # One compilation per shape; past the usual limit of eight it would run uncompiled and say nothing.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(_fusible_loss, dynamic=False, fullgraph=True)


def _compiled_loss(problem: Problem, step: int) -> Tensor:
    return _compiler()(problem.hidden, problem.table, problem.targets, _draw(problem, step))


def _drawn_truth(problem: Problem, step: int) -> Tensor:
    return _reference(problem, _draw(problem, step))


def _reference(problem: Problem, ids: Tensor) -> Any:
    return cce_minus_loss(problem.hidden, problem.table, problem.targets, negatives=ids, impl="reference")


def _released_loss(problem: Problem, step: int) -> Tensor:
    import released_design  # needs triton, which a CPU may lack

    columns = released_design.draw_columns(problem.targets, problem.table.shape[0], problem.n_negatives, step)
    return released_design.released_losses(problem.hidden, problem.table, columns).mean()


def _released_truth(problem: Problem, step: int) -> Tensor:
    import released_design

    columns = released_design.draw_columns(problem.targets, problem.table.shape[0], problem.n_negatives, step)
    return released_design.defined_losses(problem.hidden, problem.table, columns).mean()


def _full_truth(problem: Problem, step: int) -> Tensor:
    return F.cross_entropy(problem.hidden @ problem.table.T, problem.targets)


def _torch_full(problem: Problem, step: int) -> Tensor:
    return F.linear_cross_entropy(problem.hidden, problem.table, problem.targets)


def _torch_full_chunked(problem: Problem, step: int) -> Tensor:
    options: Any = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(problem.hidden, problem.table, problem.targets, options=options)


def _cut_full(problem: Problem, step: int) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(problem.hidden, problem.table, problem.targets)


def _liger_full(problem: Problem, step: int) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(problem.table, problem.hidden, problem.targets)
