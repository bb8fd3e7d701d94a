"""The two operators of CCE-, forward and backward, as `torch.library` knows them.

To a compiler each is one opaque call with a known result, whatever path computes it; autograd is registered on the
forward operator. Results lie at the M positions given, 0 where none is kept, so no shape depends on the data.

Letters: M positions as given, D width, V items.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from typing import Any, Optional

import torch
from torch import Tensor

from kernels.cce_minus.arguments import LossInputs, check_given, check_targets, list_rows
from kernels.cce_minus.torch_chunked import Forward, chunked_backward, chunked_forward, compute_dtype

_log = logging.getLogger(__name__)


# Optional[...] and the repeated list of arguments: torch.library derives the operators' schemas from these signatures.
@torch.library.custom_op("seqlit::cce_minus_forward", mutates_args=())
def cce_minus_forward(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    negatives: Optional[Tensor],  # noqa: UP045
    stream: Optional[Tensor],  # noqa: UP045
    log_q: Optional[Tensor],  # noqa: UP045
    threshold: Optional[Tensor],  # noqa: UP045
    alias: Optional[Tensor],  # noqa: UP045
    n_columns: int,
    sharing: str,
    tile_size: int,
    correction: str,
    ignore_index: int,
    autocast: Optional[torch.dtype],  # noqa: UP045
    impl: str,
    needs_direction: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, lse, margin and shift (M,), and the direction (M, D) that the Triton path keeps where negatives are shared.

    Args:
        hidden: (M, D).
        table: (V, D).
        targets: M of any shape.
        negatives: As in `LossInputs`, like all that follow up to `autocast`.
        impl: "torch" or "triton".
        needs_direction: Whether the gradient of `hidden` will be asked for.
        deterministic: Handed to the backward operator.
    """
    inputs = _inputs(
        hidden, table, targets, negatives, stream, log_q, threshold, alias,
        n_columns, sharing, tile_size, correction, ignore_index, autocast,
    )  # fmt: skip
    _announce(impl, str(hidden.device))
    # Triton starts kernels on the current device, which need not be that of the tensors
    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        if impl == "triton":
            from kernels.cce_minus.triton_path import triton_forward

            check_targets(targets, inputs.n_items, ignore_index)
            if negatives is not None:
                check_given(inputs, int((targets != ignore_index).sum()))
            loss, lse, saved = triton_forward(
                replace(inputs, targets=targets.reshape(-1)), needs_direction=needs_direction
            )
            return loss, lse, saved.margin, saved.shift, saved.direction
        rows, m = list_rows(inputs), targets.numel()
        out = chunked_forward(hidden, table, rows)
        loss, lse, margin, shift = (rows.scatter(values, m) for values in out)
        return loss, lse, margin, shift, hidden.new_empty(0, dtype=torch.float32)


@cce_minus_forward.register_fake
def _(
    hidden: Tensor, table: Tensor, targets: Tensor, negatives: Tensor | None, stream: Tensor | None,
    log_q: Tensor | None, threshold: Tensor | None, alias: Tensor | None, n_columns: int, sharing: str,
    tile_size: int, correction: str, ignore_index: int, autocast: torch.dtype | None, impl: str,
    needs_direction: bool, deterministic: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows = [hidden.new_empty(targets.numel(), dtype=compute_dtype(hidden, table)) for _ in range(4)]
    keeps_direction = impl == "triton" and needs_direction and sharing != "position"
    return *rows, hidden.new_empty(hidden.shape if keeps_direction else (0,), dtype=torch.float32)


@torch.library.custom_op("seqlit::cce_minus_backward", mutates_args=())
def cce_minus_backward(
    d_loss: Tensor,
    d_lse: Tensor,
    lse: Tensor,
    margin: Tensor,
    shift: Tensor,
    direction: Tensor,
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    negatives: Optional[Tensor],  # noqa: UP045
    stream: Optional[Tensor],  # noqa: UP045
    log_q: Optional[Tensor],  # noqa: UP045
    threshold: Optional[Tensor],  # noqa: UP045
    alias: Optional[Tensor],  # noqa: UP045
    n_columns: int,
    sharing: str,
    tile_size: int,
    correction: str,
    ignore_index: int,
    autocast: Optional[torch.dtype],  # noqa: UP045
    impl: str,
    deterministic: bool,
    needs_hidden: bool,
    needs_table: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `hidden` and `table` in their dtypes, each empty where it is not wanted.

    Args:
        d_loss: (M,) upstream gradient of the loss.
        d_lse: (M,) upstream gradient of the log-sum-exp.
        lse: Result of the forward operator, like all that follow up to `direction`.
        hidden: As in the forward operator, like all that follow up to `deterministic`.
        needs_hidden: Whether the first gradient is wanted.
        needs_table: Whether the second gradient is wanted.
    """
    inputs = _inputs(
        hidden, table, targets, negatives, stream, log_q, threshold, alias,
        n_columns, sharing, tile_size, correction, ignore_index, autocast,
    )  # fmt: skip
    wanted = {"needs_hidden": needs_hidden, "needs_table": needs_table, "deterministic": deterministic}
    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        if impl == "triton":
            from kernels.cce_minus.triton_path import Saved, triton_backward

            saved = Saved(margin, shift, direction)
            inputs = replace(inputs, targets=targets.reshape(-1))
            d_hidden, d_table = triton_backward(d_loss, d_lse, inputs, saved, **wanted)
        else:
            rows = list_rows(inputs, check=False)
            d_loss, d_lse, *kept = (rows.select(values) for values in (d_loss, d_lse, lse, margin, shift))
            d_hidden, d_table = chunked_backward(d_loss, d_lse, hidden, table, rows, Forward(d_loss, *kept), **wanted)
    return (
        hidden.new_empty(0) if d_hidden is None else d_hidden,
        table.new_empty(0) if d_table is None else d_table,
    )


@cce_minus_backward.register_fake
def _(
    d_loss: Tensor, d_lse: Tensor, lse: Tensor, margin: Tensor, shift: Tensor, direction: Tensor,
    hidden: Tensor, table: Tensor, targets: Tensor, negatives: Tensor | None, stream: Tensor | None,
    log_q: Tensor | None, threshold: Tensor | None, alias: Tensor | None, n_columns: int, sharing: str,
    tile_size: int, correction: str, ignore_index: int, autocast: torch.dtype | None, impl: str,
    deterministic: bool, needs_hidden: bool, needs_table: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return hidden.new_empty(hidden.shape if needs_hidden else (0,)), table.new_empty(
        table.shape if needs_table else (0,)
    )


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, n_columns, sharing, tile_size, correction, ignore_index, autocast, impl, _, deterministic = inputs
    _, lse, margin, shift, direction = output
    ctx.save_for_backward(lse, margin, shift, direction, *tensors)
    ctx.choices = (n_columns, sharing, tile_size, correction, ignore_index, autocast, impl, deterministic)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_loss: Tensor | None, d_lse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    # a second derivative would come out without the terms of this one, and a gradient penalty would lose them silently
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("cce_minus_loss can be differentiated once: for create_graph=True use impl='reference'")
    saved = ctx.saved_tensors  # read once: activation checkpointing recomputes on a first reading and refuses a second
    lse = saved[0]
    needs_hidden, needs_table = ctx.needs_input_grad[:2]
    d_hidden, d_table = cce_minus_backward(
        torch.zeros_like(lse) if d_loss is None else d_loss,
        torch.zeros_like(lse) if d_lse is None else d_lse,
        *saved,
        *ctx.choices,
        needs_hidden,
        needs_table,
    )
    return d_hidden if needs_hidden else None, d_table if needs_table else None, *([None] * 15)


cce_minus_forward.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _inputs(
    hidden: Tensor, table: Tensor, targets: Tensor, negatives: Tensor | None, stream: Tensor | None,
    log_q: Tensor | None, threshold: Tensor | None, alias: Tensor | None, n_columns: int, sharing: Any,
    tile_size: int, correction: Any, ignore_index: int, autocast: torch.dtype | None,
) -> LossInputs:  # fmt: skip
    return LossInputs(
        hidden=hidden,
        table=table,
        targets=targets,
        n_items=table.shape[0],
        negatives=negatives,
        stream=stream,
        log_q=log_q,
        threshold=threshold,
        alias=alias,
        n_columns=n_columns,
        sharing=sharing,
        tile_size=tile_size,
        correction=correction,
        ignore_index=ignore_index,
        autocast=autocast,
    )


@functools.cache
def _announce(impl: str, device: str) -> None:
    """Say once per process which path computes the loss on a device."""
    _log.debug("cce_minus_loss on %s: impl=%r", device, impl)
