"""Front door of the fused top-k: checks, one launch per block of users, the refusal of NaN.

B users, V items, D width, k places, M seen items in all.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from kernels.top_k.arguments import MAX_K, check_fused, check_k, check_operands, check_seen_items

HAS_TRITON = importlib.util.find_spec("triton") is not None

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_OLDEST_CAPABILITY = (8, 0)


def is_supported(states: Tensor, table: Tensor, k: int) -> bool:
    """Whether the fused kernel runs on these tensors on a GPU: dtypes, k, the chip, and triton being there."""
    return (
        HAS_TRITON
        and states.is_cuda
        and table.is_cuda
        and k <= MAX_K
        and {states.dtype, table.dtype} <= set(_DTYPES)
        and (torch.version.hip is not None or torch.cuda.get_device_capability(states.device) >= _OLDEST_CAPABILITY)
    )


@torch.no_grad()
def fused_top_k(
    states: Tensor,
    table: Tensor,
    k: int,
    *,
    seen_items: Tensor | None = None,
    seen_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k items of highest ``states @ table.T`` for each user among those the user has not seen.

    Score descending, then id ascending, exactly, where the scores are those that this kernel computes: products of
    16-bit operands and their sums in float32, products of float32 operands in float32, or in TF32 where
    ``torch.backends.cuda.matmul`` allows it. A score is off by at most ``(D + 2) 2^-23 sum_d |e_d c_d|``, and by
    ``2^-9 sum_d |e_d c_d|`` more in TF32. So two correct paths may differ in ids whose exact scores are closer than the
    sum of their bounds, and in no others.

    Nothing of size B x V is ever made: memory is ``O(B k + M)`` and at most 256 MiB of lists. Read on the host are
    what :func:`check_seen_items` reads, and in the end one flag, whether any score was NaN.

    Args:
        states: ``(B, D)`` float16, bfloat16 or float32, any strides.
        table: ``(V, D)`` likewise; operands of two dtypes are multiplied in float32.
        k: Places per user, 1 to 1024; may exceed V.
        seen_items: ``(M,) int64`` items to leave out, of all users one after another, repeats allowed; ``None`` to
            leave out nothing.
        seen_offsets: ``(B + 1,) int64`` where each user's part of ``seen_items`` begins and ends.

    Returns:
        ``(scores (B, k) float32, ids (B, k) int64)``; places without a candidate hold -inf and -1. An item whose
        score is -inf is no candidate.

    Raises:
        ValueError: If shapes, dtypes or devices disagree with the above, ``k`` lies outside 1..1024, a seen id lies
            outside 0..V-1, the offsets are no partition of the seen items, a score is NaN (seen or not), triton is
            missing, or the tensors are on a CPU without ``TRITON_INTERPRET=1``.
    """
    check_operands(states, table)
    check_k(k)
    check_fused(states, table, k, (seen_items, seen_offsets))
    check_seen_items(seen_items, seen_offsets, len(states), len(table))
    if not HAS_TRITON:
        raise ValueError("the fused kernel needs the package triton, which is not installed")
    from kernels.top_k import triton_top_k

    if not (states.is_cuda or triton_top_k.INTERPRETED):
        raise ValueError(
            f"the fused kernel takes CUDA tensors, and CPU tensors only where TRITON_INTERPRET=1 was set before it was "
            f"imported, got {states.device.type}"
        )
    scores = torch.empty(len(states), k, dtype=torch.float32, device=states.device)
    ids = torch.empty(len(states), k, dtype=torch.int64, device=states.device)
    # Triton starts kernels on the current device, which need not be that of the tensors
    with torch.cuda.device_of(states):
        seen = None
        if seen_items is not None and seen_offsets is not None:
            seen = _by_user(seen_items, seen_offsets, len(table)), seen_offsets.to(torch.int64).contiguous()
        for launch in triton_top_k.plan_top_k(
            states,
            table,
            seen,
            scores,
            ids,
            arch=triton_top_k.architecture(states),
            n_multiprocessors=triton_top_k.multiprocessors(states),
            allow_tf32=torch.backends.cuda.matmul.fp32_precision == "tf32",
        ):
            launch.run()
    # a NaN sorts above every number, with the first of its columns in front
    if scores[:, 0].isnan().any():
        row = int(scores[:, 0].isnan().nonzero()[0])
        raise ValueError(f"scores must not be NaN, got NaN at row {row}, column {int(ids[row, 0])}")
    return scores, ids


def _by_user(items: Tensor, offsets: Tensor, n_items: int) -> Tensor:
    """Numbers ``user * V + item`` of the seen items in ascending order, so that each user's part is sorted."""
    users = torch.repeat_interleave(
        torch.arange(len(offsets) - 1, device=items.device), offsets.diff(), output_size=items.numel()
    )
    return (users * n_items + items).sort().values
