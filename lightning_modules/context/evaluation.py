"""From a fitted encoder with aggregators to a study: features of every arm at every query, probed, and exported.

Q queries, E events, d width of own states, k of a context vector and D of what a combination gives, each with the flag
of an empty context where there is one. Source: spec of arXiv 2502.10205, sections 8 and 11.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_modules.context.aggregators import Max
from lightning_modules.context.bank import ContextBank
from lightning_modules.context.controls import (
    arm_names,
    assemble,
    calendar_basis,
    clock_rates,
    constant_context,
    gaussian_like,
    shuffled_times,
    time_features,
    time_knots,
)
from lightning_modules.context.enriched import QUERIES_AT_A_TIME, EnrichedEncoder, Own
from lightning_modules.context.probes import LogisticProbe, Probe
from lightning_modules.context.study import (
    AttentionDiagnostics,
    ContextStudy,
    EmbeddingSample,
    TargetStudy,
)
from lightning_modules.context.visible import MICROSECONDS_PER_DAY, Events, Queries
from lightning_modules.networks import EventEncoder, encode_table

FOLDS = ("train", "validation", "test")

SELDOM = 0.01
"""Share of test queries without context above which a probe that hardly met any in training is warned of."""

LEAST_MOVED = 0.1
"""Share of the train and of the test queries that must meet another moment than their own for a shuffled arm to be one:
where all are asked at one date its context is that of the arm that it is to control, which nothing could beat."""

SAMPLE_OF_EMBEDDINGS = 2000
"""Queries in the map of the report."""


logger = logging.getLogger(__name__)

BankEncoder = Callable[[str], EventEncoder]
"""By the name of a branch what encodes its context."""


@dataclass(frozen=True)
class Evaluation:
    """What a test probes.

    Attributes:
        probe: Of targets that ``probes`` does not name; by default logistic regression.
        probes: By target.
        shuffled: Aggregators whose context is also read at shuffled moments; None for all. Of a target whose queries
            mostly share one moment it is none.
        gaussian: Whether noise with the mean and covariance of the first aggregator's context at train queries is an
            arm.
        constant: Whether the mean of these contexts, one vector for all queries, is an arm.
        explained: Aggregator that the report looks into; by default the first that has weights.
        supervised: Target whose validation queries give ``val/loss`` of a supervised objective: that of the sampler
            of training windows. None takes the only one.
        max_validation_users: Users, drawn by a fixed seed, whose sequences give ``val/loss``.
        n_influencers: Most influential users kept for each query.

    Raises:
        ValueError: If a number is below 1.
    """

    probe: Probe | None = None
    probes: dict[str, Probe] | None = None
    shuffled: list[str] | None = None
    gaussian: bool = True
    constant: bool = True
    explained: str | None = None
    supervised: str | None = None
    max_validation_users: int = 512
    n_influencers: int = 5

    def __post_init__(self) -> None:
        for name in ("max_validation_users", "n_influencers"):
            if getattr(self, name) < 1:
                raise ValueError(f"evaluation.{name} must be at least 1, got {getattr(self, name)}")

    def check_aggregators(self, aggregators: Sequence[str]) -> None:
        """See that every aggregator it names is there.

        Raises:
            ValueError: If not.
        """
        named = {"explained": [self.explained] if self.explained else [], "shuffled": self.shuffled or []}
        for argument, names in named.items():
            _check_known(argument, names, aggregators)

    def check_targets(self, queries: Mapping[str, Queries], folds: Sequence[int]) -> None:
        """See that every target it names is there, and that each target has queries in the folds.

        Args:
            queries: By target.
            folds: Those that are at hand: 0 train, 1 validation, 2 test.

        Raises:
            ValueError: If not.
        """
        _check_known("probes", list(self.probes or {}), list(queries))
        _check_known("supervised", [self.supervised] if self.supervised else [], list(queries))
        for name, asked in queries.items():
            counts = {FOLDS[fold]: int((asked["fold"] == fold).sum()) for fold in folds}
            if 0 in counts.values():
                raise ValueError(f"target {name!r} needs queries in each fold, got {counts}")


def _check_known(argument: str, names: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"evaluation.{argument} names {unknown[0]!r}, there are {', '.join(known) or 'none'}")


class Embeddings:
    """Embeddings of queries, and whose states made them.

    Attributes:
        target: Whose test queries they are.
        n_users: Users of the log, asked or not.
        user_ids: ``Q`` original ids.
        times: ``(Q,) int64`` microseconds since 1970 UTC.
        own: ``(Q, d)`` own states.
        context: ``(Q, k)`` context vectors.
        embedding: ``(Q, D)`` both combined.
        aggregator: Name.
        top_users: ``Q`` lists of original ids, most influential first.
        top_weights: ``(Q, n_influencers)`` their shares, 0 where there are fewer; None without weights.
    """

    def __init__(
        self,
        *,
        target: str,
        n_users: int,
        user_ids: list[Any],
        times: Tensor,
        own: Tensor,
        context: Tensor,
        embedding: Tensor,
        aggregator: str,
        top_users: list[list[Any]],
        top_weights: Tensor | None,
    ) -> None:
        self.target, self.aggregator, self.n_users = target, aggregator, n_users
        self.user_ids, self.times = user_ids, times
        self.own, self.context, self.embedding = own, context, embedding
        self.top_users, self.top_weights = top_users, top_weights


class Encoded:
    """The states of one batch of events: own ones at any query, and the contexts every aggregator sees.

    With a frozen encoder all aggregators read one table and one bank; a tuned branch has its own.

    Args:
        model: Fitted.
        events: Flat.
        context_users: ``(n,) int64`` users that others may see.
        bank_encoder: What encodes the context of a branch; by default the branch's own encoder.
    """

    def __init__(
        self, model: EnrichedEncoder, events: Events, context_users: Tensor, bank_encoder: BankEncoder | None = None
    ) -> None:
        self.model, self.events = model, events
        self._context_users = context_users
        self._bank_encoder = bank_encoder or model.encoder_of
        self._tables: dict[EventEncoder, Tensor] = {}
        self._banks: dict[EventEncoder, ContextBank] = {}

    def _table(self, encoder: EventEncoder) -> Tensor:
        if encoder not in self._tables:
            self._tables[encoder] = encode_table(encoder, self.events)
        return self._tables[encoder]

    def table(self, name: str) -> Tensor:
        """``(E, d)`` states of the encoder that a branch reads."""
        return self._table(self.model.encoder_of(name))

    def bank(self, name: str) -> ContextBank:
        """The context of a branch."""
        encoder, window = self._bank_encoder(name), self.model.rules.window
        if encoder not in self._banks:
            states = self._table(encoder) if window is None else encode_table(encoder, self.events, window=window)
            self._banks[encoder] = self.model.bank(states, self.events, self._context_users)
        return self._banks[encoder]

    def own(self, name: str, users: Tensor, times: Tensor) -> Own:
        """Own states at queries."""
        return self.model.own(self.table(name), self.events, users, times, name)

    def context(self, name: str, own: Tensor, users: Tensor, times: Tensor) -> Tensor:
        """``(Q, k)`` context vectors at queries."""
        return self.model.contexts(name, own, self.bank(name), users, times)


def own_dates(events: Events, own: Own, users: Tensor, times: Tensor, origin: int) -> tuple[Tensor, Tensor, Tensor]:
    """Time features ``(Q, 10)``, numbers of own events ``(Q,)`` and recency ``(Q,)`` in days, NaN without history."""
    known = own.rows >= 0
    last = events["times"][own.rows.clamp(min=0)]
    starts = events["offsets"][users]
    first = events["times"][torch.where(known, starts, 0)]
    n_events = torch.where(known, own.rows - starts + 1, 0)
    recency = torch.where(known, (times - last).double() / MICROSECONDS_PER_DAY, torch.nan)
    return time_features(times, last, first, n_events, origin=origin), n_events, recency.float()


@torch.no_grad()
def evaluate(
    model: EnrichedEncoder,
    batch: Mapping[str, Any],
    evaluation: Evaluation,
    *,
    wide: EventEncoder | None = None,
    bank_encoder: BankEncoder | None = None,
    seed: int = 0,
) -> ContextStudy:
    """Probe every target on every arm: own states, and z = combination(q, b) of the context that an arm is named after.

    Probes are fitted on train queries, choose on validation and are read on test; the context of a query, also of a
    train query, holds states strictly before it of others alone, whatever the fold.

    Args:
        model: Fitted.
        batch: The one batch of a test.
        evaluation: Probes and arms.
        wide: Parameter-matched encoder.
        bank_encoder: As of :class:`Encoded`.
        seed: Of probes, permutations and noise.

    Raises:
        ValueError: If there is no target or one has no queries in a fold, or ``evaluation`` names what is not there.
    """
    evaluation.check_aggregators(model.aggregators)
    if not batch["queries"]:
        raise ValueError("a test asks targets, the data has none (data.init_args.targets)")
    evaluation.check_targets(batch["queries"], (0, 1, 2))
    events: Events = batch["events"]
    encoded = Encoded(model, events, batch["context_users"], bank_encoder)
    wide_table = None if wide is None else encode_table(wide, events)
    targets, alone = [], {}
    for name, queries in tqdm(batch["queries"].items(), desc="targets", disable=None, leave=False):
        split = batch["split"]
        features, n_events, recency, empty = _features(encoded, queries, evaluation, wide, wide_table, split, seed)
        if empty is not None:
            alone[name] = _share_alone(name, empty, queries["fold"])
        targets.append(_probed(name, queries, features, n_events, recency, evaluation, seed))
    explained = evaluation.explained or _with_weights(model)
    first = next(iter(batch["queries"].values()))
    tested = {key: first[key][first["fold"] == 2] for key in ("users", "times", "labels")}
    own = encoded.own(explained or model.aggregators[0], tested["users"], tested["times"]).states
    bank = encoded.bank(model.aggregators[0])
    return ContextStudy(
        targets=tuple(targets),
        split=batch["split"],
        user_ids=tuple(batch["user_ids"]),
        attention=None if explained is None else _attention(encoded, explained, own, tested, evaluation.n_influencers),
        embeddings=_sample(encoded, explained or model.aggregators[0], own, tested, next(iter(batch["queries"])), seed),
        bank={
            "n_users": bank.n_users,
            "n_states": len(bank.times),
            **bank.visibility.plain(),
            **({"share_without_context": alone} if alone else {}),
        },
        seed=seed,
    )


def _share_alone(name: str, empty: Tensor, fold: Tensor) -> dict[str, float]:
    """Share of the queries of each fold that see nobody; warns where those of the test are new to a probe."""
    found = {of: float(empty[fold == number].double().mean()) for number, of in enumerate(FOLDS)}
    if found["test"] > SELDOM and found["train"] < found["test"] / 10:
        logger.warning(
            "target %r: %.1f %% of the test queries see nobody, of the train queries %.2f %%: no probe has learned "
            "what that means, and arms with context may lose by it",
            name,
            100 * found["test"],
            100 * found["train"],
        )
    return found


def _features(
    encoded: Encoded,
    queries: Queries,
    evaluation: Evaluation,
    wide: EventEncoder | None,
    wide_table: Tensor | None,
    split: str,
    seed: int,
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor | None]:
    """Features by arm, numbers of own events, recency, and where the rules flag them, which queries see nobody."""
    model, events = encoded.model, encoded.events
    users, times, fold = queries["users"], queries["times"], queries["fold"]
    shuffled = shuffled_times(times, fold, seed)
    names = model.aggregators
    also_shuffled = names if evaluation.shuffled is None else evaluation.shuffled
    if min(float((shuffled != times)[fold == one].double().mean()) for one in (0, 2)) < LEAST_MOVED:
        also_shuffled = []
    own = {name: encoded.own(name, users, times) for name in ["own", *(names if model.tune else [])]}
    calendar, n_events, recency = own_dates(events, own["own"], users, times, int(times[fold == 0].min()))
    knots = time_knots(times[fold == 0])
    calendar = torch.cat([calendar, calendar_basis(times, knots)], 1)
    if split == "users" and len(knots) < len(times[fold == 0].unique()):
        rates = clock_rates(times, users, queries["labels"], fold == 0, queries["n_classes"], seed=seed)
        calendar = torch.cat([calendar, rates], 1)
    contexts: dict[str, Tensor] = {}
    for name in tqdm(names, desc="contexts", disable=None, leave=False):
        states = own.get(name, own["own"]).states
        contexts[name] = encoded.context(name, states, users, times)
        if name in also_shuffled:
            contexts[f"shuffled:{name}"] = encoded.context(name, states, users, shuffled)
    # The vectors alone: a flag of empty contexts is no noise to be drawn.
    vectors, flag = contexts[names[0]].tensor_split([model.d_context(names[0])], 1)
    trained = vectors[fold == 0]
    contexts["gaussian"] = gaussian_like(trained, len(users), seed)
    contexts["constant"] = constant_context(trained.mean(0), len(users))
    if wide is not None and wide_table is not None:
        contexts["wide"] = model.own(wide_table, events, users, times, start=wide.initial_state()).states
    arms = [
        arm
        for arm in arm_names(names, gaussian=evaluation.gaussian, constant=evaluation.constant, wide=wide is not None)
        if not arm.startswith("shuffled") or arm.partition(":")[2] in also_shuffled
    ]
    queried = {name: found.states for name, found in own.items()}
    combinations = {name: partial(model.combined, name) for name in model.mixing}
    if names[0] in combinations:
        for control in ("gaussian", "constant"):
            combinations[control] = combinations[names[0]]
            queried[control] = queried.get(names[0], queried["own"])
    features = assemble(arms, queried, calendar, contexts, combinations)
    return features, n_events, recency, flag[:, 0] == 1 if flag.shape[1] else None


def _probed(
    name: str,
    queries: Queries,
    features: Mapping[str, Tensor],
    n_events: Tensor,
    recency: Tensor,
    evaluation: Evaluation,
    seed: int,
) -> TargetStudy:
    probe = (evaluation.probes or {}).get(name) or evaluation.probe or LogisticProbe()
    train, validation, test = (queries["fold"] == fold for fold in range(3))
    labels, n_classes = queries["labels"], queries["n_classes"]
    read: dict[str, tuple[Tensor, Tensor]] = {}
    # A trainer tests in inference mode, whose tensors no gradient may meet: probes get copies outside of it.
    with torch.inference_mode(False):
        for arm, rows in tqdm(features.items(), desc="probes", disable=None, leave=False):
            read[arm] = probe.fit_predict(
                rows.clone()[train],
                labels.clone()[train],
                rows.clone()[validation],
                labels.clone()[validation],
                rows.clone()[test],
                n_classes=n_classes,
                seed=seed,
            )
    return TargetStudy(
        name=name,
        description=queries["description"],
        scope=queries["scope"],
        n_classes=n_classes,
        outcome_dependent=queries["outcome_dependent"],
        labels=labels[test].cpu(),
        users=queries["users"][test].cpu(),
        times=queries["times"][test].cpu(),
        n_events=n_events[test].cpu(),
        recency=recency[test].cpu(),
        validation_labels=labels[validation].cpu(),
        validation={arm: found[0].cpu() for arm, found in read.items()},
        test={arm: found[1].cpu() for arm, found in read.items()},
        probe=type(probe).__name__,
    )


def _with_weights(model: EnrichedEncoder) -> str | None:
    return next((name for name in model.aggregators if not isinstance(model.branch(name).aggregator, Max)), None)


def _attention(
    encoded: Encoded, name: str, own: Tensor, queries: Mapping[str, Tensor], k: int
) -> AttentionDiagnostics | None:
    """Where an aggregator looks at queries, in the order of the queries."""
    aggregator = encoded.model.branch(name).aggregator
    assert aggregator is not None
    order = queries["times"].argsort(stable=True)
    parts = []
    for rows in order.split(QUERIES_AT_A_TIME):
        context = encoded.bank(name).context(queries["times"][rows], queries["users"][rows])
        weights = aggregator.weights(own[rows].to(context.states), context)
        if weights is None:
            return None
        parts.append(AttentionDiagnostics.of(name, weights.clamp_min(0), context, k))
    joined, place = AttentionDiagnostics.join(parts), order.argsort().cpu()
    tensors = [one.name for one in fields(joined) if one.name != "aggregator"]
    return replace(joined, **{one: getattr(joined, one)[place] for one in tensors})


def _sample(
    encoded: Encoded, name: str, own: Tensor, queries: Mapping[str, Tensor], target: str, seed: int
) -> EmbeddingSample:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(own), generator=generator)[:SAMPLE_OF_EMBEDDINGS].to(own.device)
    users, times = queries["users"][rows], queries["times"][rows]
    return EmbeddingSample(
        aggregator=name,
        users=users.cpu(),
        times=times.cpu(),
        own=own[rows].cpu(),
        context=encoded.context(name, own[rows], users, times).cpu(),
        labels={target: queries["labels"][rows].cpu()},
    )


@torch.no_grad()
def exported(
    model: EnrichedEncoder,
    batch: Mapping[str, Any],
    evaluation: Evaluation,
    *,
    bank_encoder: BankEncoder | None = None,
) -> Embeddings:
    """Embeddings at the test queries of the first target.

    Args:
        model: Fitted.
        batch: The one batch of a prediction.
        evaluation: Says which aggregator.
        bank_encoder: As of :class:`Encoded`.

    Raises:
        ValueError: If there are no targets, or ``evaluation`` names an aggregator that is not there.
    """
    evaluation.check_aggregators(model.aggregators)
    if not batch["queries"]:
        raise ValueError("embeddings are those of test queries, the data has no targets (data.init_args.targets)")
    name = evaluation.explained or _with_weights(model) or model.aggregators[0]
    target, queries = next(iter(batch["queries"].items()))
    tested = {key: queries[key][queries["fold"] == 2] for key in ("users", "times")}
    encoded = Encoded(model, batch["events"], batch["context_users"], bank_encoder)
    own = encoded.own(name, tested["users"], tested["times"]).states
    context = encoded.context(name, own, tested["users"], tested["times"])
    attention = _attention(encoded, name, own, tested, evaluation.n_influencers)
    ids = batch["user_ids"]
    influencers = [] if attention is None else attention.top_users.tolist()
    return Embeddings(
        target=target,
        n_users=len(ids),
        user_ids=[ids[user] for user in tested["users"].tolist()],
        times=tested["times"].cpu(),
        own=own.cpu(),
        context=context.cpu(),
        embedding=model.combined(name, own, context).cpu(),
        aggregator=name,
        top_users=[[ids[user] for user in row if user >= 0] for row in influencers] or [[] for _ in range(len(own))],
        top_weights=None if attention is None else attention.top_weights,
    )
