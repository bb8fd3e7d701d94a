"""CoLES, contrastive learning of event sequences by slices of the same user, and the recall it is watched by.

B slices, D width. Source: specification of arXiv 2502.10205, section 2.3; after Babaev et al., arXiv 2002.08232.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.collectives import n_processes
from lightning_modules.losses.joined_rows import JoinedRows
from lightning_modules.losses.next_event import EventObjective


class CoLES(EventObjective):
    """Contrastive loss with hard negatives.

        z = h / |h|,    D_ij = |z_i - z_j|,
        loss = sum_{i < j, same user} D_ij^2 + sum_i sum_{j in N_i} max(0, margin - D_ij)^2

    N_i are the ``n_negatives`` slices of other users nearest to slice i, all of them where there are fewer; they are
    chosen without gradient. In training slices of all processes make pairs, and every process computes the whole loss.

    Args:
        d: D.
        vocabulary_sizes: Of the data; not read.
        n_numeric: Of the data; not read.
        margin: Distance beyond which a negative costs nothing, in 0..2 as distances on the sphere are.
        n_negatives: Negatives a slice.
        reduction: ``"sum"``, as published, or ``"mean"`` over all pairs, positive and negative.

    Raises:
        ValueError: If margin or number of negatives is out of range, or the reduction unknown.

    Source: specification, section 2.3; a thesis writes both terms with a factor 1/2.
    """

    needs = "last"

    def __init__(
        self,
        *,
        d: int,
        vocabulary_sizes: Sequence[int],
        n_numeric: int,
        margin: float = 0.5,
        n_negatives: int = 5,
        reduction: Literal["sum", "mean"] = "sum",
    ) -> None:
        if not 0 < margin <= 2:
            raise ValueError(f"margin must be above 0 and at most 2, got {margin}")
        if n_negatives < 1:
            raise ValueError(f"n_negatives must be at least 1, got {n_negatives}")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
        super().__init__(d=d, vocabulary_sizes=vocabulary_sizes, n_numeric=n_numeric)
        self.margin = margin
        self.n_negatives = n_negatives
        self.reduction = reduction

    def forward(self, representation: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Loss of slices ``(B, D)``; ``batch["users"] (B,) int64`` says whose they are.

        A batch of one slice, or of one slice a user with ``margin`` met, has loss 0.
        """
        z, users = F.normalize(representation, dim=1), batch["users"]
        if self.training:
            everybody = JoinedRows(users)
            z, users = everybody.join(z), everybody.join(users)
        else:  # the join leaves padding rows out; here they would be slices of one user more
            counts = users >= 0
            z, users = z[counts], users[counts]
        same = users.unsqueeze(1) == users
        first, second = torch.triu(same, 1).nonzero(as_tuple=True)
        anchor, negative = self._hard_negatives(z.detach(), same)
        positive_cost = _squared_distances(z, first, second)
        squared = _squared_distances(z, anchor, negative)
        # The root of exactly 0 has no gradient; at the smallest number it has one, times the difference 0.
        distance = squared.clamp(min=torch.finfo(squared.dtype).tiny).sqrt()
        costs = torch.cat([positive_cost, (self.margin - distance).clamp(min=0).square()])
        loss = costs.sum() if self.reduction == "sum" else costs.sum() / max(1, len(costs))
        if not self.training or n_processes() == 1:
            return loss
        # A process has the gradients of its own slices: the mean over processes is R times too small.
        return loss.detach() + n_processes() * (loss - loss.detach())

    def _hard_negatives(self, z: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs of a slice and one of the slices of others nearest to it."""
        similarity = (z @ z.T).masked_fill(same, -torch.inf)  # on the sphere the nearest is the most similar
        nearest = similarity.topk(min(self.n_negatives, len(z)), dim=1)
        anchor, place = nearest.values.isfinite().nonzero(as_tuple=True)
        return anchor, nearest.indices[anchor, place]


def _squared_distances(z: Tensor, first: Tensor, second: Tensor) -> Tensor:
    # From differences: 2 - 2 cos would lose all digits of close pairs.
    return (z[first] - z[second]).square().sum(1)


def recall_at(embeddings: Tensor, users: Tensor, k: int = 4) -> float:
    """Share of a user's other slices among the ``k`` slices most similar to one of them, by cosine, averaged.

        recall = mean_i |{j among the k nearest of i, j != i : u_j = u_i}| / |{j != i : u_j = u_i}|

    Args:
        embeddings: ``(B, D) float``.
        users: ``(B,) int64``; slices of users with no other slice are searched, but not counted.
        k: Places.

    Returns:
        A number in 0..1; 1 is reached only where k is at least the number of other slices.

    Raises:
        ValueError: If k is below 1, or no user has two slices.

    Source: specification, section 2.3, with 5 slices a user and k = 4.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    itself = torch.eye(len(users), dtype=torch.bool, device=users.device)
    same = (users.unsqueeze(1) == users) & ~itself
    n_others = same.sum(1)
    counted = n_others > 0
    if not counted.any():
        raise ValueError(f"recall needs a user with at least two slices, got {len(users)} slices of as many users")
    z = F.normalize(embeddings.double(), dim=1)
    nearest = (z @ z.T).masked_fill(itself, -torch.inf).topk(min(k, len(users)), dim=1).indices
    hits = same.gather(1, nearest).sum(1).double()
    return float((hits[counted] / n_others[counted]).mean())
