"""What a test of context found, before it is summed up.

Q test queries of a target, Q_v validation queries, K classes, k most influential users.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_modules.context.controls import Arm
from lightning_modules.context.visible import Context
from lightning_modules.metrics.probe_metrics import probe_scores

Measure = Literal["roc_auc", "pr_auc", "accuracy", "log_loss"]


def better(measure: Measure) -> int:
    """1 where larger is better, -1 for log-loss."""
    return -1 if measure == "log_loss" else 1


@dataclass(frozen=True)
class TargetStudy:
    """All arms on one target.

    Attributes:
        name: Unique in the study.
        description: What is predicted, in a sentence.
        scope: ``"global"``: of the user; ``"local"``: of the moment; ``"next"``: the next event.
        n_classes: K.
        outcome_dependent: Whether the time of a query depends on its label, as published protocols have it.
        labels: ``(Q,) int64``.
        users: ``(Q,) int64``.
        times: ``(Q,) int64`` microseconds since 1970 UTC.
        n_events: ``(Q,) int64`` own events before the query.
        recency: ``(Q,) float`` days since the last own event, NaN without history.
        validation_labels: ``(Q_v,) int64``.
        validation: By arm ``(Q_v, K) float64`` probabilities.
        test: By arm ``(Q, K) float64`` probabilities; names as in :mod:`lightning_modules.context.controls`.
        probe: Name of the probe.
    """

    name: str
    description: str
    scope: Literal["global", "local", "next"]
    n_classes: int
    outcome_dependent: bool
    labels: Tensor
    users: Tensor
    times: Tensor
    n_events: Tensor
    recency: Tensor
    validation_labels: Tensor
    validation: dict[str, Tensor]
    test: dict[str, Tensor]
    probe: str

    def chosen(self, measure: Measure = "roc_auc") -> str | None:
        """The context arm that is best on validation, the first of equals; None without a context arm.

        The test has no say in it. Where the measure is undefined on validation, log-loss chooses.
        """
        arms = [name for name in self.test if Arm.parse(name).is_context]
        scores = {arm: probe_scores(self.validation_labels.numpy(), self.validation[arm].numpy()) for arm in arms}
        if not all(np.isfinite(found[measure][0]) for found in scores.values()):
            measure = "log_loss"
        return max(arms, key=lambda arm: better(measure) * scores[arm][measure][0], default=None)


@dataclass(frozen=True)
class AttentionDiagnostics:
    """Where an aggregator looked at each query.

    Attributes:
        aggregator: Name.
        entropy: ``(Q,) float`` nats of the weights, scaled to sum 1; NaN where nothing was visible or weighted.
        effective_number: ``(Q,) float`` 1 / sum a^2, of users.
        n_visible: ``(Q,) int64``.
        mean_age: ``(Q,) float`` days, of the states under the weights.
        top_users: ``(Q, k) int64`` rows of the most influential users, most first, -1 where there are fewer.
        top_weights: ``(Q, k) float`` their shares, 0 where there are fewer.
        top_ages: ``(Q, k) float`` days, of their states.
    """

    aggregator: str
    entropy: Tensor
    effective_number: Tensor
    n_visible: Tensor
    mean_age: Tensor
    top_users: Tensor
    top_weights: Tensor
    top_ages: Tensor

    @classmethod
    def of(cls, aggregator: str, weights: Tensor, context: Context, k: int = 5) -> "AttentionDiagnostics":
        """From the weights ``(Q, n)``, none negative, of a batch of queries.

        Args:
            aggregator: Name.
            weights: Need not sum to one: those with decay do not.
            context: What the weights are of.
            k: Most influential users kept.
        """
        weights = torch.where(context.visible, weights, 0.0).double()
        total = weights.sum(1)
        shares = weights / total.clamp_min(torch.finfo(torch.float64).tiny).unsqueeze(1)
        users = context.users.expand(shares.shape)
        top, places = shares.topk(min(k, shares.shape[1]), 1)

        def or_nan(values: Tensor) -> Tensor:
            return torch.where(total > 0, values, torch.nan).float().cpu()

        def filled(values: Tensor, fill: int) -> Tensor:
            kept = torch.where(top > 0, values, fill)
            return torch.nn.functional.pad(kept, (0, k - kept.shape[1]), value=fill).cpu()

        return cls(
            aggregator=aggregator,
            entropy=or_nan(torch.special.entr(shares).sum(1)),
            effective_number=or_nan(1 / shares.square().sum(1)),
            n_visible=context.visible.sum(1).cpu(),
            mean_age=or_nan((shares * context.ages).sum(1)),
            top_users=filled(users.gather(1, places), -1),
            top_weights=filled(top, 0).float(),
            top_ages=filled(context.ages.gather(1, places), 0),
        )

    @classmethod
    def join(cls, parts: Sequence["AttentionDiagnostics"]) -> "AttentionDiagnostics":
        """Several batches of queries, in order."""
        tensors = [one.name for one in fields(cls) if one.name != "aggregator"]
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in tensors}
        return cls(aggregator=parts[0].aggregator, **joined)


@dataclass(frozen=True)
class EmbeddingSample:
    """Some queries for a map of the embedding.

    Attributes:
        aggregator: Whose context.
        users: ``(m,) int64``.
        times: ``(m,) int64`` microseconds.
        own: ``(m, d) float``.
        context: ``(m, k) float``.
        labels: By target ``(m,) int64``, -1 where the query is none of the target's.
    """

    aggregator: str
    users: Tensor
    times: Tensor
    own: Tensor
    context: Tensor
    labels: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ContextStudy:
    """Every target, and how the context looked.

    Attributes:
        targets: Of all arms.
        split: ``"users"`` or ``"time"``.
        user_ids: Original ids by row.
        attention: Of one aggregator on the test queries of the first target; None where it has no weights.
        embeddings: Of one aggregator.
        bank: Plain facts of the context: users, states, rules of what is visible.
        seed: Of the run.
    """

    targets: tuple[TargetStudy, ...]
    split: Literal["users", "time"]
    user_ids: tuple[Any, ...] = ()
    attention: AttentionDiagnostics | None = None
    embeddings: EmbeddingSample | None = None
    bank: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
