"""Contrastive predictive coding of event sequences.

B sequences, L steps, D width, K steps ahead. Source: A. van den Oord, Y. Li, O. Vinyals, arXiv 1807.03748.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_modules.losses.next_event import EventObjective, has_next
from lightning_modules.networks.event_encoders import EventEmbedding
from lightning_modules.networks.series_network import require_at_least_one


class CPC(EventObjective):
    """InfoNCE: tell the event k steps ahead from the events of other users at the same step of theirs.

        s_k(b, l, b') = (W_k h_{b,l}) . e(x_{b',l+k}) / sqrt(d_event)
        loss = mean_{k, b, l} ( log sum_{b'} exp s_k(b, l, b') - s_k(b, l, b) )

    b' runs over b and over the sequences of other users that are valid at step l + k, within a group of the batch; e is
    an embedding of the event with a linear map, trained with the W_k. Steps that have no other user's event to be told
    from do not count. Candidates are those of one step: where in a sequence an event stands tells nothing then.

    Args:
        d: D.
        vocabulary_sizes: Ids of each categorical feature, 0 (padding) and 1 (unknown) included.
        n_numeric: M.
        n_steps_ahead: K.
        d_event: Width of e.
        group_size: Most sequences of a group; a batch is split into groups in its order, as even as can be. The cost is
            K L B group_size d_event.

    Raises:
        ValueError: If a size is out of range.

    Source: arXiv 1807.03748, equations 3 and 4; candidates as above are ours.
    """

    needs = "steps"

    def __init__(
        self,
        *,
        d: int,
        vocabulary_sizes: Sequence[int],
        n_numeric: int,
        n_steps_ahead: int = 3,
        d_event: int = 32,
        group_size: int = 128,
    ) -> None:
        require_at_least_one(n_steps_ahead=n_steps_ahead, d_event=d_event)
        if group_size < 2:
            raise ValueError(f"group_size must be at least 2, got {group_size}")
        super().__init__(d=d, vocabulary_sizes=vocabulary_sizes, n_numeric=n_numeric)
        self.embedding = EventEmbedding(vocabulary_sizes, n_numeric, noise=0.0)
        self.event = nn.Linear(self.embedding.d_out, d_event)
        self.predictors = nn.ModuleList(nn.Linear(d, d_event, bias=False) for _ in range(n_steps_ahead))
        self.group_size = group_size

    def forward(self, representation: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Loss of representations ``(B, L, D)``; 0 where nothing can be told apart."""
        mask, users = batch["mask"], batch["users"]
        events = self.event(self.embedding(batch))
        states = representation.masked_fill(~has_next(mask).unsqueeze(-1), 0.0)
        costs = [states.flatten()[:0]]  # without a pair, the loss still has a gradient: 0
        n_groups = -(-len(mask) // self.group_size)
        for group in torch.arange(len(mask), device=mask.device).tensor_split(n_groups):
            for ahead, predictor in enumerate(self.predictors[: mask.shape[1] - 1], start=1):
                predicted = predictor(states[group, :-ahead])
                costs.append(_costs(predicted, events[group, ahead:], mask[group, ahead:], users[group]))
        found = torch.cat(costs)
        return found.sum() / max(1, len(found))


def _costs(predicted: Tensor, events: Tensor, valid: Tensor, users: Tensor) -> Tensor:
    """``(N,)`` cross-entropies of predictions and events ``(B, L', d_event)`` that are valid and have a rival."""
    scores = torch.einsum("bld,cld->lbc", predicted, events) / math.sqrt(events.shape[-1])
    itself = torch.eye(len(users), dtype=torch.bool, device=users.device)
    rivals = valid.T.unsqueeze(1) & (users.unsqueeze(1) != users)  # (L', B, B)
    counts = valid.T & rivals.any(2)
    scores = scores.masked_fill(~(rivals | itself), -torch.inf)
    return (scores.logsumexp(2) - scores.diagonal(dim1=1, dim2=2))[counts]
