"""What encoders of event sequences are trained by: the contract, and prediction of the next event.

B sequences, L steps, F categorical features, M numeric features, D width of what is trained: the encoder's d, or more
once context is joined to it. Source: specification of arXiv 2502.10205, sections 2.4 and 6.1.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.collectives import share, sum_in_place
from lightning_modules.networks.event_encoders import UNKNOWN
from lightning_modules.networks.series_network import require_at_least_one

_NO_TARGET = -100


class EventObjective(nn.Module, ABC):
    """A loss of representations of event sequences, with whatever heads it trains beside the encoder.

    Of several processes each has a part of the batch in training, and the whole of it in evaluation. In training the
    mean over processes of what they return, and of its gradients, is that of one process with the joined batch: means
    are :meth:`weighted`, losses in which rows meet read ``joined_rows.JoinedRows``. A padding row, ``mask`` false
    everywhere and ``users`` -1, has no part in it.

    Args:
        d: D, width of the representation.
        vocabulary_sizes: Ids of each categorical feature, 0 (padding) and 1 (unknown) included.
        n_numeric: M.

    Attributes:
        needs: ``"steps"`` for representations ``(B, L, D)`` after each event, ``"last"`` for ``(B, D)`` of sequences.

    Raises:
        ValueError: If d is below 1.
    """

    needs: ClassVar[Literal["steps", "last"]]

    def __init__(self, *, d: int, vocabulary_sizes: Sequence[int], n_numeric: int) -> None:
        require_at_least_one(d=d)
        super().__init__()
        self.d = d
        self.vocabulary_sizes = list(vocabulary_sizes)
        self.n_numeric = n_numeric

    @abstractmethod
    def forward(self, representation: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Scalar loss of a batch; what stands at padding reaches neither loss nor gradients."""

    def weighted(self, mean: Tensor, n: int) -> Tensor:
        """A mean over ``n`` items, times the share of this process in those of all: every process calls it alike."""
        return mean * share(n, device=mean.device) if self.training else mean

    def query_times(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """When the context of each step is looked up, and which steps count: those that a valid step follows.

        Returns:
            Times ``(B, L) int64``, here those of the step's own event, and ``(B, L) bool``.
        """
        return batch["times"], has_next(batch["mask"])


class ObjectiveFactory(Protocol):
    """Builds an objective from width and data; YAML gives it by ``class_path`` with every other argument."""

    def __call__(self, *, d: int, vocabulary_sizes: Sequence[int], n_numeric: int) -> EventObjective:
        """The objective."""
        ...


def has_next(mask: Tensor) -> Tensor:
    """``(B, L) bool``, true at steps that a valid step of a mask ``(B, L)`` follows."""
    return torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)


class NextEvent(EventObjective):
    """Autoregressive pre-training: linear heads predict the features of event l + 1 from the representation at l.

        loss = w_c mean_f CE_f + w_m mean_m MSE_m,    CE_f and MSE_m means over the steps that have a next event

    Weights are divided by their sum; of a kind of feature that the data lack the weight is 0. In evaluation an unknown
    id (1) is no target where training had none: nobody learned to predict that class, and its loss would grow with
    every epoch, so that the epoch of least loss would be an early one. Amounts are predicted as
    they are in the batch: the signed logarithm of the publication is a transform of the data.

    Args:
        d: D.
        vocabulary_sizes: Ids of each categorical feature, 0 (padding) and 1 (unknown) included.
        n_numeric: M.
        weights: w_c and w_m. The released code has 5 : 1, a sentence of the thesis 1 : 5.
        max_classes: Classes of each feature, padding included, which is never a target; ids beyond count as the last
            one. Published 100; ``None`` keeps all.
        at: When the context of a step is looked up: ``"event"`` at its own event, as published, or ``"target"`` at the
            time of the event to be predicted. In both the user's own state is that after its own event.

    Attributes:
        met_unknown: ``(F,) bool`` buffer, whether a forward pass in training had an unknown id as a target.

    Raises:
        ValueError: If weights are negative or none is left for the data's features, or ``max_classes`` is below 2.

    Source: specification, section 2.4.
    """

    needs = "steps"

    def __init__(
        self,
        *,
        d: int,
        vocabulary_sizes: Sequence[int],
        n_numeric: int,
        weights: tuple[float, float] = (5.0, 1.0),
        max_classes: int | None = None,
        at: Literal["event", "target"] = "event",
    ) -> None:
        if max_classes is not None and max_classes < 2:
            raise ValueError(f"max_classes must be at least 2 (padding and one more), got {max_classes}")
        if at not in ("event", "target"):
            raise ValueError(f"at must be 'event' or 'target', got {at!r}")
        present = (weights[0] if len(vocabulary_sizes) else 0.0), (weights[1] if n_numeric else 0.0)
        if min(weights) < 0 or sum(present) <= 0:
            raise ValueError(
                f"weights must be at least 0, and above 0 for a kind of feature of the events, got {tuple(weights)} "
                f"for {len(vocabulary_sizes)} categorical and {n_numeric} numeric features"
            )
        super().__init__(d=d, vocabulary_sizes=vocabulary_sizes, n_numeric=n_numeric)
        self.weights = present[0] / sum(present), present[1] / sum(present)
        self.at = at
        self.class_heads = nn.ModuleList(nn.Linear(d, min(n_ids, max_classes or n_ids)) for n_ids in vocabulary_sizes)
        self.numeric_head = nn.Linear(d, n_numeric) if n_numeric else None
        self.met_unknown: Tensor
        self.register_buffer("met_unknown", torch.zeros(len(vocabulary_sizes), dtype=torch.bool))

    def query_times(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Times ``(B, L) int64`` at which context is looked up, by ``at``, and the steps ``(B, L) bool`` that count."""
        times, counts = super().query_times(batch)
        if self.at == "target":
            times = torch.cat([times[:, 1:], times[:, -1:]], 1)
        return times, counts

    def forward(self, representation: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Loss of representations ``(B, L, D)``; 0 where no step has a next one."""
        counts = has_next(batch["mask"])
        states = representation[counts]  # (N, D)
        ids = batch["categorical"][:, 1:][counts[:, :-1]]  # (N, F)
        if self.training:  # in any process: the best epoch is chosen by one of them
            met = (ids == UNKNOWN).any(0).to(torch.int64)
            self.met_unknown |= sum_in_place(met, met.device) > 0
        if not len(states):
            return self.weighted(states.sum(), 0)
        loss = states.new_zeros(())
        if self.weights[0]:
            for feature, head in enumerate(self.class_heads):
                logits = head(states)
                classes = ids[:, feature].clamp(max=logits.shape[1] - 1)
                if not self.training and not self.met_unknown[feature]:
                    # by id: with two classes every known id counts as that of the unknown one
                    classes = classes.masked_fill(ids[:, feature] == UNKNOWN, _NO_TARGET)
                if self.training or bool((classes != _NO_TARGET).any()):  # a mean over nothing is NaN
                    mean = F.cross_entropy(logits, classes, ignore_index=_NO_TARGET)
                    loss = loss + self.weights[0] * mean / len(self.class_heads)
        if self.weights[1] and self.numeric_head is not None:
            numeric = batch["numeric"][:, 1:][counts[:, :-1]]
            loss = loss + self.weights[1] * F.mse_loss(self.numeric_head(states), numeric.to(states.dtype))
        return self.weighted(loss, len(states))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        state_dict.setdefault(f"{prefix}met_unknown", torch.ones_like(self.met_unknown))
        super()._load_from_state_dict(state_dict, prefix, *arguments)
