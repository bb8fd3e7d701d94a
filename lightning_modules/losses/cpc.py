"""Contrastive predictive coding of event sequences.

B sequences, L steps, D width, K steps ahead. Source: A. van den Oord, Y. Li, O. Vinyals, arXiv 1807.03748.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_modules.losses.joined_rows import JoinedRows
from lightning_modules.losses.next_event import EventObjective, has_next
from lightning_modules.networks.event_encoders import EventEmbedding
from lightning_modules.networks.series_network import require_at_least_one


class CPC(EventObjective):
    """InfoNCE: tell the event k steps ahead from the events of other users at the same step of theirs.

        s_k(b, l, b') = (W_k h_{b,l}) . e(x_{b',l+k}) / sqrt(d_event)
        loss = mean_{k, b, l} ( log sum_{b'} exp s_k(b, l, b') - s_k(b, l, b) )

    b' runs over b and over the sequences of other users that are valid at step l + k, within a group of the batch; e is
    an embedding of the event with a linear map, trained with the W_k. Steps that have no other user's event to be told
    from do not count. Candidates are those of one step: where in a sequence an event stands tells nothing then. In
    training they come from the batches of all processes, whose rows are put in the order of one batch, row by row; each
    process predicts from its own states.

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
        everybody, own = self._everybody(batch)
        events, mask, users = self.event(self.embedding(everybody)), everybody["mask"], everybody["users"]
        states = representation.masked_fill(~has_next(batch["mask"]).unsqueeze(-1), 0.0)
        n_steps = states.shape[1]
        costs = [states.flatten()[:0]]  # without a pair, the loss still has a gradient: 0
        n_groups = max(1, -(-len(own) // self.group_size))
        for group in torch.arange(len(own), device=own.device).tensor_split(n_groups):
            here = (own[group] >= 0).nonzero().squeeze(1)
            rows = own[group][here]
            for ahead, predictor in enumerate(self.predictors[: n_steps - 1], start=1):
                predicted = predictor(states[rows, :-ahead])
                candidates = group, slice(ahead, n_steps)
                costs.append(_costs(predicted, here, events[candidates], mask[candidates], users[group]))
        found = torch.cat(costs)
        return self.weighted(found.sum() / max(1, len(found)), len(found))

    def _everybody(self, batch: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Tensor]:
        """The events to be told apart, and which own row each row of theirs is, -1 for none."""
        if not self.training:
            return batch, torch.arange(len(batch["mask"]), device=batch["mask"].device)
        joined = JoinedRows(batch["users"])
        events = joined.join_steps(batch, ("categorical", "numeric", "mask"))
        return events | {"users": joined.join(batch["users"])}, joined.own


def _costs(predicted: Tensor, here: Tensor, events: Tensor, valid: Tensor, users: Tensor) -> Tensor:
    """``(N,)`` cross-entropies of predictions that are valid and have a rival.

    Args:
        predicted: ``(A, L', d_event)``.
        here: ``(A,) int64`` rows of the candidates that are predicted.
        events: ``(C, L', d_event)`` candidates.
        valid: ``(C, L') bool``.
        users: ``(C,) int64``.
    """
    scores = torch.einsum("ald,cld->lac", predicted, events) / math.sqrt(events.shape[-1])
    itself = here.unsqueeze(1) == torch.arange(len(users), device=users.device)
    rivals = valid.T.unsqueeze(1) & (users[here].unsqueeze(1) != users)  # (L', A, C)
    counts = valid[here].T & rivals.any(2)
    scores = scores.masked_fill(~(rivals | itself), -torch.inf)
    wanted = here.expand(len(scores), -1).unsqueeze(2)
    return (scores.logsumexp(2) - scores.gather(2, wanted).squeeze(2))[counts]
