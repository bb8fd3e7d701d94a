"""Which block sizes a kernel is launched with: a table that ships, so that no first step is spent on tuning.

`launch_settings.json` holds one row per architecture, kernel, width of a block, dtype of products and bound on the
number of positions; the kernel's name says how negatives are shared. `scripts/tune_cce_minus.py` measures and rewrites
it.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("launch_settings.json")
MAX_BLOCK_WIDTH = 256
# CUDA cores multiply fp32 from registers, which a wider block would overflow.
MAX_FP32_PRODUCT_WIDTH = 64
# Larger numbers are not larger chips: after the majors of data centres, 12 is a consumer's again.
_LARGE_MAJORS = (9, 10, 11)


@dataclass(frozen=True)
class Settings:
    """Positions B and columns C of a block, and how a program is run."""

    b: int
    c: int
    num_warps: int
    num_stages: int


# The interpreter pays per operation, not per number: large blocks, yet small enough that tests meet several of them.
_INTERPRETER = {
    "position_forward": Settings(16, 16, 4, 1),
    "position_backward": Settings(16, 16, 4, 1),
    "tile_forward": Settings(32, 16, 4, 1),
    "tile_table": Settings(32, 16, 4, 1),
}


def block_width(width: int, limit: int = MAX_BLOCK_WIDTH) -> int:
    """Width of a block of D: the power of two that holds it, from 16, the least of a matrix product, up to a limit."""
    return min(limit, max(16, 1 << (width - 1).bit_length()))


def widest_block(kernel: str, dtype: str) -> int:
    """Limit of the width of a block of a kernel that multiplies this dtype."""
    return MAX_FP32_PRODUCT_WIDTH if kernel.startswith("tile") and dtype == "fp32" else MAX_BLOCK_WIDTH


def settings_width(kernel: str, width: int, dtype: str) -> int:
    """Width under which the table lists a D: that of its block, and 512 for all that take several blocks."""
    return block_width(width) if width <= widest_block(kernel, dtype) else 2 * MAX_BLOCK_WIDTH


def settings_for(kernel: str, arch: str, width: int, dtype: str, n_positions: int) -> Settings:
    """Look up the row for a launch.

    Args:
        kernel: "position_forward", "position_backward", "tile_forward" or "tile_table".
        arch: "sm_90", "gfx942", ... A chip without rows takes those of the nearest below it, by number, in its family:
            AMD; NVIDIA of majors 9 to 11, whose programs have 227 KiB of shared memory; NVIDIA of all other majors. So
            sm_100, sm_103 and sm_110 take the rows of sm_90, and sm_86, sm_89, sm_120 and sm_121, with 99 KiB, those of
            sm_80. "interpreter" has its own.
        width: D.
        dtype: "bf16", "fp16", "fp32" or, where fp32 operands may be rounded so, "tf32".
        n_positions: M, the positions given, kept or not.

    Returns:
        The settings of the smallest sizes in the table that are not below those asked for.
    """
    if arch == "interpreter":
        return _INTERPRETER[kernel]
    rows = _rows()[_known_architecture(arch), kernel, settings_width(kernel, width, dtype), dtype]
    return next(settings for bound, settings in rows if bound is None or n_positions <= bound)


def rows_of(arch: str) -> list[tuple[str, int, str, int | None]]:
    """Kernel, width, dtype and bound on the positions of every row of an architecture."""
    table = _rows().items()
    return [
        (kernel, width, dtype, bound) for (a, kernel, width, dtype), rows in table if a == arch for bound, _ in rows
    ]


@functools.cache
def _known_architecture(arch: str) -> str:
    known = {key[0] for key in _rows()}
    if arch in known:
        return arch
    alike = sorted((name for name in known if _family(name) == _family(arch)), key=_number)
    below = [name for name in alike if _number(name) <= _number(arch)]
    return below[-1] if below else alike[0]


def _family(arch: str) -> str:
    if arch.startswith("gfx"):
        return "amd"
    return "nvidia, 227 KiB" if _number(arch) // 10 in _LARGE_MAJORS else "nvidia"


def _number(arch: str) -> int:
    """Integers, because as strings "sm_100" comes before "sm_90"; AMD counts in base 16."""
    return int(arch.removeprefix("gfx"), 16) if arch.startswith("gfx") else int(arch.removeprefix("sm_"))


@functools.cache
def _rows() -> dict[tuple[str, str, int, str], list[tuple[int | None, Settings]]]:
    """Settings by (arch, kernel, width, dtype), each with its bound on the positions, ascending, None last."""
    table: dict[tuple[str, str, int, str], list[tuple[int | None, Settings]]] = {}
    for row in json.loads(TABLE.read_text(encoding="utf-8")):
        key = (row["arch"], row["kernel"], row["width"], row["dtype"])
        settings = Settings(row["b"], row["c"], row["num_warps"], row["num_stages"])
        table.setdefault(key, []).append((row["max_positions"], settings))
    for rows in table.values():
        rows.sort(key=lambda row: float("inf") if row[0] is None else row[0])
    return table
