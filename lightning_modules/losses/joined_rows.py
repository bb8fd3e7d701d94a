"""The rows of the batches of all processes as one batch, for losses in which rows meet each other.

B_r rows of process r of R, B rows that count of all of them.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.collectives import gather_rows, n_processes, rank


class JoinedRows:
    """Where the rows of all processes stand in the batch that one process would have had.

    Row i of process r stands at place i R + r: so places of an epoch are dealt out to processes. Padding rows, whose
    user is -1, are left out. Every process makes one, and asks it the same, at the same moment.

    Args:
        users: ``(B_r,) int64`` of the rows of this process.

    Attributes:
        own: ``(B,) int64``: which row of this process each row of the joined batch is, -1 for those of others.
    """

    def __init__(self, users: Tensor) -> None:
        places = torch.arange(len(users), device=users.device) * n_processes() + rank()
        everybody, here = gather_rows(users)
        order = gather_rows(places)[0].argsort()
        self._order = order[everybody[order] >= 0]
        is_own = (self._order >= here.start) & (self._order < here.stop)
        self.own = torch.where(is_own, self._order - here.start, -1)

    def join(self, rows: Tensor) -> Tensor:
        """``(B, ...)`` rows of all processes, of own ``(B_r, ...)``; gradients reach the own ones alone."""
        return gather_rows(rows)[0][self._order]

    def join_steps(self, batch: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors ``(B_r, L_r, ...)`` of a batch as ``(B, L, ...)`` with L the greatest L_r, zeros behind an L_r."""
        lengths = gather_rows(batch["mask"].new_tensor([batch["mask"].shape[1]], dtype=torch.int64))[0]
        missing = int(lengths.max()) - batch["mask"].shape[1]
        return {
            name: self.join(
                F.pad(batch[name], (0, 0) * (batch[name].ndim - 2) + (0, missing)) if missing else batch[name]
            )
            for name in names
        }
