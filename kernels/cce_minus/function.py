"""The front door of CCE-: checks, the choice of a path, and the reduction of what the operator returns.

Letters: B batch, T time, D width, V items, K negatives, N kept positions, M positions as given.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kernels.cce_minus.arguments import (
    Correction,
    LossInputs,
    Reduction,
    Sharing,
    list_rows,
    prepare_draws,
    prepare_loss,
)
from kernels.cce_minus.operators import cce_minus_forward
from kernels.cce_minus.proposals import Proposal
from kernels.cce_minus.reference import cce_minus_reference

Implementation = Literal["auto", "reference", "torch", "triton"]
IMPLEMENTATIONS = get_args(Implementation)
HAS_TRITON = importlib.util.find_spec("triton") is not None


def cce_minus_loss(
    hidden: Tensor,
    item_embeddings: Tensor,
    targets: Tensor,
    *,
    n_negatives: int | Literal["all"] = 256,
    negatives: Tensor | None = None,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    rank: int | Tensor = 0,
    sharing: Sharing = "position",
    tile_size: int = 128,
    log_q: Proposal | Tensor | None = None,
    correction: Correction = "logq",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    return_lse: bool = False,
    impl: Implementation = "auto",
    deterministic: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sampled softmax cross-entropy with importance-corrected negatives, without the logit matrix.

    With scores z_j = <hidden, item_embeddings_j>, z+ the score of the target y, K negatives n_k drawn from q and r
    of them equal to y,

        Zhat = exp(z+) + sum over k with n_k != y of exp(z_k) (1 - q_y) / ((K - r) q_k),   loss = log Zhat - z+.

    Zhat is an unbiased estimate of the full denominator, so the loss has the scale of the full cross-entropy.
    Negatives that equal the target are rejected, not redrawn; a position left without negatives has loss 0 and no
    gradient. 16- and 32-bit inputs are computed in float32, float64 in float64. Autocast is heeded where it buys speed:
    on the Triton path operands of matrix products (shared negatives) are rounded to its dtype as they are read.

    Args:
        hidden: (..., D) floating point, usually (B, T, D).
        item_embeddings: (V, D) floating point, V at least 2, without a padding row (a slice of a larger table will do).
        targets: (...) int32 or int64 in [0, V), or `ignore_index`.
        n_negatives: K, at least 1, ids drawn with replacement for each row of negatives; it may exceed V. "all" is
            the exact full cross-entropy, whatever the correction. Unused when `negatives` are given.
        negatives: Ids to use instead of drawing, int32 or int64 in [0, V): (N, K) for "position", (n_tiles, K) for
            "tile", (K,) for "batch". Tile t holds the kept positions from t * tile_size on, in their given order.
        seed: Key of the generator, int64. None draws one from torch's default CPU generator.
        step: Number of the micro-batch, int64: with the same seed, another step draws other ids.
        rank: Number of the process, so that processes of one seed draw different ids.
        sharing: "position" draws K ids for every position, "tile" for every `tile_size` positions in a random order,
            "batch" for all of them.
        tile_size: Positions per tile.
        log_q: What negatives are drawn from: None is uniform, or a `Proposal`. With given negatives also a (V,) tensor
            of log-probabilities, normalised to 1e-4, for the correction alone.
        correction: "logq" as above; "none" leaves the sampled terms unweighted (a loss near log(K + 1) at the start);
            "improved_logq" reports sg(1 - exp(z+) / Zhat) (log(Zhat - exp(z+)) - z+), with the gradient of "logq";
            "classic_logq", as other toolkits have it, rejects nothing and subtracts log(K q) from the positive logit as
            well.
        weight: Weight of each position, floating point of the shape of `targets`; the mean is sum(w loss) / sum(w).
            It is differentiable too.
        ignore_index: Target value of positions to leave out.
        reduction: "mean", "sum", or "none" for the shape of `targets` with 0 at ignored positions. The mean over
            nothing, or under weights that sum to 0, is 0 with zero gradients.
        return_lse: Return also log Zhat, unweighted and differentiable, in the shape of `targets` with 0 at ignored
            positions.
        impl: "triton" computes in fused kernels, "torch" in chunks, "reference" materialises everything. "auto" chooses
            "triton" for CUDA tensors that are not float64, else "torch", and says so once at debug level. "triton"
            itself takes CPU tensors only where TRITON_INTERPRET=1 is set, and never falls back.
        deterministic: Whether gradients must be equal bit for bit from run to run. On CPU they always are. None
            follows `torch.use_deterministic_algorithms`. On CUDA it costs time and, on the Triton path, 256 MiB of
            scratch or, where that is more, K (4 D + 48) bytes with shared negatives and 48 K without: for "all", with
            K = V of 1 M and D of 256, 1.07 GB.

    Returns:
        The loss in float32 (float64 for float64 inputs), or the pair (loss, lse).

    Raises:
        ValueError: When a shape, dtype, device, range or name is not one of those above. With drawn negatives on CUDA
            nothing is read on the host, so a target outside [0, V) ends in a device-side assertion instead.
        RuntimeError: For a second derivative, and under the transforms of `torch.func`.

    Source: arXiv 2509.09682; "improved_logq" after arXiv 2507.09331. Departures from the authors' release: rejected
        draws leave the denominator and the count K, padded targets leave the mean, gradients are summed in 32 bits.
    """
    _refuse_functorch(hidden, item_embeddings, targets, weight)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {impl!r}")
    if deterministic is not None and not isinstance(deterministic, bool):
        raise ValueError(f"deterministic must be None, True or False, got {deterministic!r}")
    choices: dict[str, Any] = {
        "n_negatives": n_negatives,
        "negatives": negatives,
        "seed": seed,
        "step": step,
        "rank": rank,
        "sharing": sharing,
        "tile_size": tile_size,
        "log_q": log_q,
        "correction": correction,
        "weight": weight,
        "ignore_index": ignore_index,
        "reduction": reduction,
    }
    if impl == "reference":
        return cce_minus_reference(hidden, item_embeddings, targets, **choices, return_lse=return_lse)
    inputs = prepare_loss(hidden, item_embeddings, targets, **choices)
    impl = _choose(impl, inputs)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    loss, lse, _, _, _ = cce_minus_forward(
        inputs.hidden,
        inputs.table,
        inputs.targets,
        inputs.negatives,
        inputs.stream,
        inputs.log_q,
        inputs.threshold,
        inputs.alias,
        inputs.n_columns,
        inputs.sharing,
        inputs.tile_size,
        inputs.correction,
        inputs.ignore_index,
        inputs.autocast,
        impl,
        torch.is_grad_enabled() and inputs.hidden.requires_grad,
        deterministic,
    )
    result = _reduce(loss.view(targets.shape), targets != ignore_index, weight, reduction)
    return (result, lse.view(targets.shape)) if return_lse else result


def cce_minus_negatives(
    targets: Tensor,
    n_items: int,
    *,
    n_negatives: int = 256,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    rank: int | Tensor = 0,
    sharing: Sharing = "position",
    tile_size: int = 128,
    log_q: Proposal | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """The ids that `cce_minus_loss` draws under the same arguments, for inspection and tests.

    `cce_minus_loss(..., negatives=ids[row_of_position], sharing="position")` gives the same loss.

    Args:
        targets: (...) int32 or int64 in [0, V), or `ignore_index`; only the number and places of kept ones matter.
        n_items: Catalogue size V, at least 2.
        n_negatives: K, at least 1.
        seed: As in `cce_minus_loss`.
        step: As in `cce_minus_loss`.
        rank: As in `cce_minus_loss`.
        sharing: As in `cce_minus_loss`.
        tile_size: As in `cce_minus_loss`.
        log_q: None for uniform, or a `Proposal`.
        ignore_index: Target value of positions to leave out.

    Returns:
        `ids`, (n_rows, K) int64, with N, n_tiles or 1 rows by `sharing`; `row_of_position`, (N,) int64, the row that
        each kept position reads, in the order of `targets`.

    Raises:
        ValueError: As `cce_minus_loss`.
    """
    choices = prepare_draws(
        targets,
        n_items,
        n_negatives=n_negatives,
        seed=seed,
        step=step,
        rank=rank,
        sharing=sharing,
        tile_size=tile_size,
        log_q=log_q,
        correction="logq",
        ignore_index=ignore_index,
    )
    rows = list_rows(choices)
    ids = rows.negatives.block(0, rows.negatives.n_rows, 0, n_negatives).to(torch.int64)
    row_of_position = torch.arange(rows.n, device=ids.device) // rows.group
    if rows.index is not None:
        row_of_position = row_of_position[torch.argsort(rows.index)]
    return ids, row_of_position


def _choose(impl: Implementation, inputs: LossInputs) -> Literal["torch", "triton"]:
    """The path that "auto" stands for; refuses "triton" where it cannot run."""
    device, has_double = inputs.hidden.device, torch.float64 in (inputs.hidden.dtype, inputs.table.dtype)
    if impl == "torch":
        return "torch"
    if impl == "auto":
        return "triton" if device.type == "cuda" and HAS_TRITON and not has_double else "torch"
    if not HAS_TRITON:
        raise ValueError("impl='triton' needs the package triton, which is not installed: use 'auto' or 'torch'")
    if has_double:
        raise ValueError("impl='triton' computes in float32, got float64: use 'torch' or 'reference'")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"impl='triton' takes CUDA tensors, and CPU tensors only where TRITON_INTERPRET=1 is set, got {device.type}"
        )
    return "triton"


def _refuse_functorch(*tensors: Tensor | None) -> None:
    """One line in place of what the transforms of torch.func would say deep inside, or not say at all."""
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor is not None and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise RuntimeError(
                "cce_minus_loss does not run under torch.func (grad, vmap, ...): use torch.autograd.grad"
            )


def _reduce(loss: Tensor, keep: Tensor, weight: Tensor | None, reduction: Reduction) -> Tensor:
    """Weigh and reduce losses that are 0 where a position is not kept; the weights stay in autograd's hands."""
    if weight is not None:
        weight = torch.where(keep, weight, 0.0).to(loss.dtype)  # whatever stands at ignored positions, NaN included
        loss = weight * loss
    match reduction:
        case "none":
            return loss
        case "sum":
            return loss.sum()
        case "mean":
            total = keep.sum().to(loss.dtype) if weight is None else weight.sum()
            # a mean over no weight is 0, connected to the graph, and never 0 / 0
            return torch.where(total == 0, loss.sum() * 0.0, loss.sum() / torch.where(total == 0, 1.0, total))
    raise AssertionError(reduction)
