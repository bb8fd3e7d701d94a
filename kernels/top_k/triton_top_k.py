"""Plans of the fused top-k: block sizes, splits of the catalogue, scratch, launches.

B users, V items, D width, k places, L entries of a list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Launch
from kernels.top_k.triton_kernels import merge_kernel, score_kernel

INTERPRETED = not isinstance(score_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET=1 was set when the kernels were imported."""

LIST_BYTES = 256 * 2**20
"""Scratch for the lists of one launch: with more users, fewer splits, and beyond that several launches."""

_MOST_SPLITS = 64  # one program merges all splits of a user, one after another
# The first L items of a split all pass: shorter splits would do nothing but leave the work to the merge.
_LISTS_PER_SPLIT = 2
_PROGRAMS_PER_MULTIPROCESSOR = 2
_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Settings:
    """Users b and items c of a tile, greatest width w of a block of D, and how a program is run."""

    b: int
    c: int
    w: int
    num_warps: int
    num_stages: int


# By vendor and operands, rows (most users, greatest D, settings), None for any; the first that fits is taken. A bound
# on D asks for a multiple of 16 too: others are loaded number by number, which takes more registers. States of one
# block of D stay in the program, and the next items are fetched ahead; wider ones are pipelined by Triton. No row
# spills on sm_90 with lists of 128 to 1024 (scripts/compile_kernels.py), so none depends on k. Not tuned on a GPU.
_Row = tuple[int | None, int | None, Settings]
_TABLE: dict[tuple[str, str], tuple[_Row, ...]] = {
    ("sm", "16 bits"): (
        (16, 128, Settings(16, 128, 128, 8, 2)),
        (16, None, Settings(16, 128, 64, 8, 3)),
        (None, 128, Settings(64, 64, 128, 8, 2)),
        (None, None, Settings(64, 64, 64, 8, 3)),
    ),
    ("sm", "tf32"): ((16, None, Settings(16, 128, 32, 8, 3)), (None, None, Settings(64, 64, 32, 8, 3))),
    ("sm", "ieee"): (
        (16, 64, Settings(16, 64, 32, 8, 3)),
        (16, None, Settings(16, 64, 32, 8, 2)),
        (None, 64, Settings(64, 64, 16, 8, 3)),
        (None, None, Settings(64, 64, 32, 8, 3)),
    ),
    ("gfx", "16 bits"): ((16, None, Settings(16, 64, 64, 4, 2)), (None, None, Settings(64, 64, 64, 4, 2))),
    ("gfx", "ieee"): ((16, None, Settings(16, 64, 32, 4, 2)), (None, None, Settings(64, 64, 32, 4, 2))),
}
# Small enough that tests meet several tiles; the interpreter pays per operation.
_INTERPRETER = Settings(16, 64, 32, 4, 1)


def architecture(tensor: Tensor) -> str:
    """Name of the chip a tensor lies on, "interpreter" where kernels are interpreted."""
    if INTERPRETED:
        return "interpreter"
    properties = torch.cuda.get_device_properties(tensor.device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def multiprocessors(tensor: Tensor) -> int:
    """Multiprocessors of the chip a tensor lies on; a few where kernels are interpreted, so that there are splits."""
    return 4 if INTERPRETED else int(torch.cuda.get_device_properties(tensor.device).multi_processor_count)


def list_length(k: int, items_of_a_tile: int) -> int:
    """L: a power of two that holds k places, and two tiles of candidates, so that one tile does not fill a list."""
    return max(2 * items_of_a_tile, triton.next_power_of_2(k))


def plan_top_k(
    states: Tensor,
    table: Tensor,
    seen: tuple[Tensor, Tensor] | None,
    scores: Tensor,
    ids: Tensor,
    *,
    arch: str,
    n_multiprocessors: int,
    allow_tf32: bool = False,
) -> Iterator[Launch]:
    """Launches that fill scores and ids, each to be run before the next one is asked for.

    Args:
        states: ``(B, D)`` float16, bfloat16 or float32.
        table: ``(V, D)`` likewise.
        seen: ``(M,) int64`` numbers ``user * V + item`` in ascending order, and ``(B + 1,) int64`` offsets into them.
        scores: ``(B, k) float32`` to be filled, contiguous.
        ids: ``(B, k) int64`` to be filled, contiguous.
        arch: "sm_90", "gfx942", ... or "interpreter".
        n_multiprocessors: How many programs run at a time.
        allow_tf32: Whether float32 operands may be rounded to TF32, where the chip multiplies it.

    Yields:
        For each block of users that the scratch holds: the scores' launch, then the merge's.
    """
    (n_users, width), n_items, k = states.shape, table.shape[0], scores.shape[1]
    dot, precision = _product(states.dtype, table.dtype, allow_tf32 and arch.startswith("sm"))
    s = _settings(arch, "16 bits" if dot.itemsize == 2 else precision, n_users, width)
    length = list_length(k, s.c)
    list_bytes = 2 * length * 8
    n_splits = n_multiprocessors * _PROGRAMS_PER_MULTIPROCESSOR // max(triton.cdiv(n_users, s.b), 1)
    n_splits = min(n_splits, n_items // (_LISTS_PER_SPLIT * length), LIST_BYTES // (list_bytes * max(n_users, 1)))
    n_splits = max(1, min(n_splits, _MOST_SPLITS))
    tiles_per_split = triton.cdiv(triton.cdiv(n_items, s.c), n_splits)
    height = min(n_users, LIST_BYTES // (list_bytes * n_splits))
    lists = torch.empty(n_splits * height, 2 * length, dtype=torch.int64, device=states.device)
    counts = torch.empty(n_splits * height, dtype=torch.int32, device=states.device)
    shared_constants = {"HAS_SEEN": seen is not None, "L": length, "LOG_L": length.bit_length() - 1}
    for first in range(0, n_users, max(height, 1)):
        shared: dict[str, Any] = {
            "lists": lists,
            "counts": counts,
            "seen": None if seen is None else seen[0],
            "seen_offsets": None if seen is None else seen[1],
            "first_user": first,
            "n_users": min(height, n_users - first),
            "n_items": n_items,
            "k": k,
        }
        n_blocks = triton.cdiv(shared["n_users"], s.b)
        arguments = shared | {
            "states": states,
            "stride_sb": states.stride(0),
            "stride_sd": states.stride(1),
            "table": table,
            "stride_tv": table.stride(0),
            "stride_td": table.stride(1),
            "tiles_per_split": tiles_per_split,
        }
        w = min(s.w, max(16, triton.next_power_of_2(width)))
        constants = {"D": width, "DOT": _DTYPES[dot], "PRECISION": precision, "B": s.b, "C": s.c, "W": w}
        yield Launch(
            score_kernel, n_blocks * n_splits, arguments, constants | shared_constants, s.num_warps, s.num_stages
        )
        arguments = shared | {"scores": scores, "ids": ids, "n_splits": n_splits}
        yield Launch(merge_kernel, shared["n_users"], arguments, shared_constants, num_warps=min(4, length // 128))


def _settings(arch: str, operands: str, n_users: int, width: int) -> Settings:
    if arch == "interpreter":
        return _INTERPRETER
    rows = _TABLE["gfx" if arch.startswith("gfx") else "sm", operands]
    return next(
        settings
        for most_users, greatest_width, settings in rows
        if (most_users is None or n_users <= most_users)
        and (greatest_width is None or (width <= greatest_width and width % 16 == 0))
    )


def _product(states: torch.dtype, table: torch.dtype, tf32: bool) -> tuple[torch.dtype, str]:
    """Dtype of the operands of the product, and how those of 32 bits are multiplied."""
    # the interpreter multiplies the bit patterns of bfloat16 as integers
    dot = states if states == table and not INTERPRETED else torch.float32
    return dot, "tf32" if dot == torch.float32 and tf32 else "ieee"


def compile_cases(arch: str) -> Iterator[tuple[str, Launch]]:
    """Names and launches of every row of settings, list length and kind of operands, for `scripts/compile_kernels.py`.

    Widths are those of one block and of several, and some that fill none. The merge depends on the list length alone.
    """
    kinds = [("bf16", torch.bfloat16), ("fp32", torch.float32)] + [("tf32", torch.float32)] * arch.startswith("sm")
    for name, dtype in kinds:
        for n_users in (16, 4096):
            for width in (64, 128, 256):
                for k in (128, 256, 512, 1024):
                    yield _case(arch, name, dtype, n_users, width, k)[0]
            for width in (50, 100, 257):
                yield _case(arch, name, dtype, n_users, width, 10)[0]
    for width in (64, 256):
        yield _case(arch, "fp16", torch.float16, 4096, width, 128)[0]
    for k in (128, 256, 512, 1024):
        yield _case(arch, "bf16", torch.bfloat16, 4096, 64, k)[1]
    yield from _case(arch, "bf16 nothing seen", torch.bfloat16, 4096, 64, 128, has_seen=False)


def _case(
    arch: str, name: str, dtype: torch.dtype, n_users: int, width: int, k: int, *, has_seen: bool = True
) -> list[tuple[str, Launch]]:
    """The two launches of one block of users, on tensors without memory."""

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    n_items = 1_000_000
    seen = (empty(100 * n_users, dtype=torch.int64), empty(n_users + 1, dtype=torch.int64)) if has_seen else None
    plan = plan_top_k(
        empty(n_users, width, dtype=dtype),
        empty(n_items, width, dtype=dtype),
        seen,
        empty(n_users, k, dtype=torch.float32),
        empty(n_users, k, dtype=torch.int64),
        arch=arch,
        n_multiprocessors=132,
        allow_tf32=name == "tf32",
    )
    return [
        (f"score, {name}, B{n_users} D{width} k{k}", next(plan)),
        (f"merge, {name}, k{k}", next(plan)),
    ]
