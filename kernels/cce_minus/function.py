"""The front door of CCE-, and the autograd function that joins the forward and backward of a path.

Letters: B batch, T time, D width, V items, K negatives, N kept positions, M positions as given.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels.cce_minus.arguments import Correction, LossRows, Reduction, Sharing, prepare_draws, prepare_loss
from kernels.cce_minus.negatives import GivenNegatives
from kernels.cce_minus.proposals import Proposal
from kernels.cce_minus.reference import cce_minus_reference
from kernels.cce_minus.torch_chunked import Forward, chunked_backward, chunked_forward

Implementation = Literal["auto", "reference", "torch", "triton"]


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
    gradient. 16- and 32-bit inputs are computed in float32, float64 in float64; autocast has no say inside.

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
            "improved_logq" reports sg(1 - exp(z+) / Zhat) (log(Zhat - exp(z+)) - z+), with the gradient of "logq".
        weight: Weight of each position, floating point of the shape of `targets`; the mean is sum(w loss) / sum(w).
            It is differentiable too.
        ignore_index: Target value of positions to leave out.
        reduction: "mean", "sum", or "none" for the shape of `targets` with 0 at ignored positions. The mean over
            nothing, or under weights that sum to 0, is 0 with zero gradients.
        return_lse: Return also log Zhat, unweighted and differentiable, in the shape of `targets` with 0 at ignored
            positions.
        impl: "torch" computes in chunks, "reference" materialises everything, "auto" chooses "torch".
        deterministic: Whether gradients must be equal bit for bit from run to run. On CPU they always are. None
            follows `torch.use_deterministic_algorithms`.

    Returns:
        The loss in float32 (float64 for float64 inputs), or the pair (loss, lse).

    Raises:
        ValueError: When a shape, dtype, device, range or name is not one of those above.

    Source: arXiv 2509.09682; "improved_logq" after arXiv 2507.09331. Departures from the authors' release: rejected
        draws leave the denominator and the count K, padded targets leave the mean, gradients are summed in 32 bits.
    """
    if impl not in get_args(Implementation):
        raise ValueError(f"impl must be one of {', '.join(map(repr, get_args(Implementation)))}, got {impl!r}")
    if impl == "triton":
        raise ValueError("impl='triton' is not available yet: use 'auto', 'torch' or 'reference'")
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
    rows = prepare_loss(hidden, item_embeddings, targets, **choices)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.autocast(hidden.device.type, enabled=False):
        flat = hidden.reshape(-1, hidden.shape[-1])
        loss, lse = _ChunkedLoss.apply(flat, item_embeddings, rows, deterministic)
        result = _reduce(loss, rows, weight, targets.shape, reduction)
        if return_lse:
            return result, rows.scatter(lse, targets.numel()).view(targets.shape)
        return result


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
    rows = prepare_draws(
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
    ids = rows.negatives.block(0, rows.negatives.n_rows, 0, n_negatives).to(torch.int64)
    row_of_position = torch.arange(rows.n, device=ids.device) // rows.group
    if rows.index is not None:
        row_of_position = row_of_position[torch.argsort(rows.index)]
    return ids, row_of_position


class _ChunkedLoss(torch.autograd.Function):
    """Losses and log-sum-exps (N,) of the kept positions, in the order of `rows`."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, table: Tensor, rows: LossRows, deterministic: bool
    ) -> tuple[Tensor, Tensor]:
        out = chunked_forward(hidden, table, rows)
        # Targets and given ids are read again through `rows`; saved, they are watched for changes in place.
        watched = [rows.targets]
        if isinstance(rows.negatives, GivenNegatives):
            watched.append(rows.negatives.ids)
        ctx.save_for_backward(hidden, table, out.lse, out.gap, out.log_scale, *watched)
        ctx.rows, ctx.deterministic = rows, deterministic  # type: ignore[attr-defined]
        return out.loss, out.lse

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, d_lse: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        # once_differentiable would return constants here, and a gradient penalty would lose its term in silence
        if torch.is_grad_enabled():
            raise RuntimeError("cce_minus_loss can be differentiated once: for create_graph=True use impl='reference'")
        hidden, table, lse, gap, log_scale, *_ = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            d_hidden, d_table = chunked_backward(
                d_loss,
                d_lse,
                hidden,
                table,
                ctx.rows,
                Forward(loss=gap, lse=lse, gap=gap, log_scale=log_scale),
                needs_hidden=ctx.needs_input_grad[0],
                needs_table=ctx.needs_input_grad[1],
                deterministic=ctx.deterministic,
            )
        return d_hidden, d_table, None, None


def _reduce(loss: Tensor, rows: LossRows, weight: Tensor | None, shape: torch.Size, reduction: Reduction) -> Tensor:
    """Weigh and reduce (N,) losses; the weights stay in autograd's hands."""
    kept_weight = None if weight is None else rows.select(weight.reshape(-1)).to(loss.dtype)
    if kept_weight is not None:
        loss = kept_weight * loss
    match reduction:
        case "none":
            return rows.scatter(loss, shape.numel()).view(shape)
        case "sum":
            return loss.sum()
        case "mean":
            total = loss.new_tensor(rows.n) if kept_weight is None else kept_weight.sum()
            # a mean over no weight is 0, connected to the graph, and never 0 / 0
            return torch.where(total == 0, loss.sum() * 0.0, loss.sum() / torch.where(total == 0, 1.0, total))
    raise AssertionError(reduction)
