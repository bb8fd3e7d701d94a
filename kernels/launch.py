"""One kernel launch as data: what `run` starts on a device, and what a compiler without a device can build.

Code that plans launches allocates outputs, chooses the grid and the settings, and returns a `Launch`. Planned on
tensors of the meta device, the same launch carries dtypes and shapes for ahead-of-time compilation and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Launch:
    """A Triton kernel with everything it is started with.

    Args:
        kernel: Function decorated by `triton.jit`.
        grid: Number of programs along x, the only axis used: y and z stop at 65,535.
        arguments: Runtime arguments by name; None where the kernel does not read one.
        constants: `tl.constexpr` arguments by name.
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline.
    """

    kernel: Any
    grid: int
    arguments: dict[str, Tensor | int | float | None]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2

    def run(self) -> None:
        """Start the kernel on the current stream; nothing where the grid is empty."""
        if self.grid:
            options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
            self.kernel[(self.grid,)](**self.arguments, **self.constants, **options)
