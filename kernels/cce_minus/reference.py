"""CCE- written down once, plainly: every tensor is materialised and autograd does the backward pass.

This is the specification the other paths are tested against. It takes float64 and any device, and needs
N * K * D numbers of memory. Letters: N kept positions, D width, V items, K negatives.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from kernels.cce_minus.arguments import Correction, LossRows, Reduction, Sharing, list_rows, prepare_loss
from kernels.cce_minus.proposals import Proposal


def cce_minus_reference(
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
) -> Tensor | tuple[Tensor, Tensor]:
    """Sampled softmax cross-entropy with importance-corrected negatives.

    loss = log(exp(z+) + sum over k with n_k != y of exp(z_k + a_k)) - z+, with
    a_k = -log((K - r) q_k / (1 - q_y)), r being the number of negatives that equal y. "classic_logq" keeps those
    negatives, and takes a = -log(K q) for negatives and the positive alike.

    Arguments, results and errors are those of `cce_minus_loss`, less the choice of an implementation.

    Source: arXiv 2509.09682, with r taken out of the count of draws where its release leaves it in.
    """
    inputs = prepare_loss(
        hidden,
        item_embeddings,
        targets,
        n_negatives=n_negatives,
        negatives=negatives,
        seed=seed,
        step=step,
        rank=rank,
        sharing=sharing,
        tile_size=tile_size,
        log_q=log_q,
        correction=correction,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    rows = list_rows(inputs)
    with torch.autocast(hidden.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, item_embeddings.dtype), torch.float32)
        table = item_embeddings.to(dtype)
        e = rows.select(inputs.hidden).to(dtype)
        loss, lse = _rows_loss(e, table, rows)
        w = torch.ones_like(loss) if weight is None else rows.select(weight.reshape(-1)).to(dtype)
        if reduction == "none":
            result = rows.scatter(w * loss, targets.numel()).view(targets.shape)
        elif reduction == "sum":
            result = (w * loss).sum()
        else:
            result = (w * loss).sum() / w.sum() if bool(w.sum() != 0) else (w * loss).sum() * 0.0
        if return_lse:
            return result, rows.scatter(lse, targets.numel()).view(targets.shape)
        return result


def _rows_loss(e: Tensor, table: Tensor, rows: LossRows) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of each kept position, both (N,)."""
    n_columns = rows.negatives.n_columns
    row_of_position = torch.arange(rows.n, device=e.device) // rows.group
    ids = rows.negatives.block(0, rows.negatives.n_rows, 0, n_columns)[row_of_position].to(torch.int64)  # (N, K)
    positive = (e * table[rows.targets]).sum(-1)
    logits = (e[:, None, :] * table[ids]).sum(-1)
    kept = torch.ones_like(ids, dtype=torch.bool) if rows.keeps_collisions else ids != rows.targets[:, None]
    n_kept = kept.sum(-1)

    if rows.correction != "none":
        log_q = rows.log_q
        if log_q is None:
            log_q = torch.full((rows.n_items,), -math.log(rows.n_items), dtype=torch.float64)
        log_q = log_q.to(e)  # dtype and device
        log_k = n_kept.to(e).log()
        if rows.keeps_collisions:
            logits = logits - log_q[ids] - log_k[:, None]
            positive = positive - log_q[rows.targets] - log_k
        else:
            log_rest = torch.log(-torch.expm1(log_q))[rows.targets]  # log(1 - q_y)
            logits = logits - log_q[ids] + (log_rest - log_k)[:, None]

    # Rows without negatives are computed from zeros and then dropped: where() alone would let NaN gradients pass.
    alive = n_kept > 0
    logits = logits.masked_fill(~kept, -math.inf).masked_fill(~alive[:, None], 0.0)
    negative = torch.logsumexp(logits, -1)
    lse = torch.where(alive, torch.logaddexp(positive, negative), positive)
    if rows.correction == "improved_logq":
        loss = (1 - torch.exp(positive - lse)).detach() * (negative - positive)
    else:
        loss = lse - positive
    return torch.where(alive, loss, 0.0), lse
