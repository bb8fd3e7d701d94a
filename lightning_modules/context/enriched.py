"""Own states of event sequences enriched with the states of others: encoder, context, aggregators in one module.

B sequences, L steps, Q queries, E events, d width of the encoder, D width after combination. Source: spec of
arXiv 2502.10205, sections 3, 5 and 6.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple
from zlib import crc32

import torch
from torch import Tensor, nn

from lightning_modules.context.aggregators import Aggregator, AggregatorFactory, Mean
from lightning_modules.context.as_of import drawn_context_users
from lightning_modules.context.bank import ContextBank, own_states
from lightning_modules.context.combination import Combination, CombinationFactory, Concat
from lightning_modules.context.controls import arm_names
from lightning_modules.context.positive_features import LinearKernel
from lightning_modules.context.prefix_sums import PrefixMean, PrefixMoments
from lightning_modules.context.visible import FOREVER, Context, Events
from lightning_modules.losses import EventObjective, ObjectiveFactory
from lightning_modules.networks import EventEncoder, encode_table

QUERIES_AT_A_TIME = 1024
"""Queries whose context is looked up together, outside of training."""


@dataclass(frozen=True)
class ContextRules:
    """What counts as context at a moment (spec 3.2).

    A rule that is None is settled by the model: as ours, or in ``reference_mode`` as the released code has it.

    Attributes:
        n_users: Users in the context, drawn once by ``seed``; None takes all. Split by time they are drawn of those who
            were there when training ended, and users who come later join at the same rate.
        ties: ``"strict"``, ours: events at the very moment of the query are not seen; ``"inclusive"``, published: they
            are.
        include_self: Whether a user is context of itself; ours no, published yes.
        exclude_group: Whether users of the query's own group are left out.
        min_prefix: Least events of a user before it counts; ours 1, published 15.
        lag_days: States must be at least this old.
        max_age_days: States older than this are not seen; None sees all.
        max_rows: Most states a query sees, chosen by ``policy``; None sees all.
        policy: ``"recent"`` or ``"random"``.
        drop_last_prefix: Leaves out the state after a user's last event; ours no, published yes.
        window: States of others are encoded from their last ``window`` events only, own states from all in any case;
            ours None for all, published 100.
        before_first: Vector where nothing is visible: ``"learned"``, ours, begins at 0, where it stays if its branch
            has nothing else to train (see ``Aggregator``); ``"random"``, published, is drawn and fixed.
        empty_flag: Whether context vectors have one more, last column, 1 where nothing is visible and else 0: ours yes,
            published no. Probes and exports get it, beside what a combination gives; a combination and the objective
            aggregators are trained by do not.
        seed: Of the draws.

    Raises:
        ValueError: If a value is outside its range.
    """

    n_users: int | None = 1000
    ties: Literal["strict", "inclusive"] | None = None
    include_self: bool | None = None
    exclude_group: bool = False
    min_prefix: int | None = None
    lag_days: float = 0.0
    max_age_days: float | None = None
    max_rows: int | None = None
    policy: Literal["recent", "random"] = "recent"
    drop_last_prefix: bool | None = None
    window: int | None = None
    before_first: Literal["learned", "random"] | None = None
    empty_flag: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        # Here, not where a bank is built: that is after the hours in which the encoder is trained.
        for name, number in (("n_users", self.n_users), ("max_rows", self.max_rows), ("window", self.window)):
            if number is not None and number < 1:
                raise ValueError(f"context.{name} must be at least 1, or null for no limit, got {number}")
        if self.min_prefix is not None and self.min_prefix < 1:
            raise ValueError(f"context.min_prefix must be at least 1, got {self.min_prefix}")
        for name, days in (("lag_days", self.lag_days), ("max_age_days", self.max_age_days)):
            if days is not None and not 0 <= days < math.inf:
                raise ValueError(f"context.{name} must be finite and at least 0, got {days}")
        for name, allowed in (
            ("ties", ("strict", "inclusive")),
            ("policy", ("recent", "random")),
            ("before_first", ("learned", "random")),
        ):
            given = getattr(self, name)
            if given not in allowed and not (given is None and name in SETTLED):
                raise ValueError(f"context.{name} must be one of {allowed}, got {given!r}")

    def settled(self, *, published: bool) -> "ContextRules":
        """With ours, or what is published, in place of every rule that was not given."""
        column = 1 if published else 0
        return replace(self, **{name: both[column] for name, both in SETTLED.items() if getattr(self, name) is None})


SETTLED: dict[str, tuple[Any, Any]] = {
    "ties": ("strict", "inclusive"),
    "include_self": (False, True),
    "min_prefix": (1, 15),
    "drop_last_prefix": (False, True),
    "window": (None, 100),
    "before_first": ("learned", "random"),
    "empty_flag": (True, False),
}
"""Rules that the released code has otherwise: ours and its own."""


class Own(NamedTuple):
    """The user's own history at queries.

    Attributes:
        states: ``(Q, d)``, the network's initial state where there is no history.
        rows: ``(Q,) int64`` row of the last event before the query, -1 where there is none.
    """

    states: Tensor
    rows: Tensor


class Asked(NamedTuple):
    """The moments of a batch of sequences at which context is looked up.

    Attributes:
        batch: Sequences.
        steps: ``(B, L) bool``, Q true ones; None for the last step of each sequence.
        times: ``(Q,) int64``.
        users: ``(Q,) int64``.
    """

    batch: Mapping[str, Tensor]
    steps: Tensor | None
    times: Tensor
    users: Tensor

    @classmethod
    def by(cls, objective: EventObjective, batch: Mapping[str, Tensor], max_steps: int) -> "Asked":
        """The moments an objective needs; of one that reads every step, in the first sequences of ``max_steps``."""
        if objective.needs == "last":
            return cls(batch, None, moments(batch), batch["users"])
        batch = first_sequences(batch, max_steps)
        times, steps = objective.query_times(batch)
        return cls(batch, steps, times[steps], batch["users"].unsqueeze(1).expand_as(times)[steps])

    def states(self, encoder: EventEncoder) -> Tensor:
        """``(Q, d)`` own states at them."""
        return encoder.encode_last(self.batch) if self.steps is None else encoder.encode_steps(self.batch)[self.steps]


class Branch(nn.Module):
    """An aggregator with the combination and the objective it is trained by, and its own encoder where that is tuned.

    Args:
        aggregator: None for the baseline without context, which is tuned as long as the others.
        d: Width of the encoder.
        combination: Factory.
        objective: Factory.
        facts: ``vocabulary_sizes`` and ``n_numeric`` of the data.
        encoder: The branch's own copy; None shares the frozen one.
    """

    def __init__(
        self,
        aggregator: Aggregator | None,
        *,
        d: int,
        combination: CombinationFactory,
        objective: ObjectiveFactory,
        facts: Mapping[str, Any],
        encoder: EventEncoder | None,
    ) -> None:
        super().__init__()
        self.aggregator = aggregator
        self.combination = None if aggregator is None else combination(d=d, d_context=aggregator.d_out)
        self.objective = objective(d=d if self.combination is None else self.combination.d_out, **facts)
        self.encoder = encoder

    @property
    def learns(self) -> bool:
        """Whether there is anything to train but heads that nobody reads later, and ``empty_context``.

        Mean, maximum, attention and exponential decay have nothing beside a frozen encoder and ``Concat``.
        """
        if self.encoder is not None:
            return True
        parts = [part for part in (self.aggregator, self.combination) if part is not None]
        return any(name != "empty_context" for part in parts for name, _ in part.named_parameters())

    def enrich(self, query: Tensor, context: Context | None) -> Tensor:
        """``(Q, D)`` own states ``(Q, d)`` combined with what is aggregated of a context."""
        if self.aggregator is None or self.combination is None:
            return query
        assert context is not None
        return self.combination(query, self.aggregator(query, context))

    def loss(self, query: Tensor, context: Context | None, asked: Asked) -> Tensor:
        """The objective of a batch.

        Args:
            query: ``(Q, d)`` own states.
            context: What each of them sees; None for the branch without context.
            asked: Whose and when they are.
        """
        z = self.enrich(query, context)
        if asked.steps is None:
            return self.objective(z, asked.batch)
        spread = z.new_zeros(*asked.steps.shape, z.shape[-1]).masked_scatter(asked.steps.unsqueeze(-1), z)
        return self.objective(spread, asked.batch)


class EnrichedEncoder(nn.Module):
    """An encoder of event sequences and any number of aggregators over the states of others.

        q = h_u(t);  X_t = {h_v(t) : v in C, v != u};  b = aggregator(q, X_t);  z = combination(q, b)

    Args:
        encoder: Pre-trained or not.
        aggregators: By name.
        combination: Factory of what joins own state and context.
        objective: Factory of the objective aggregators are trained by.
        vocabulary_sizes: Of the categorical features.
        n_numeric: Number of numeric features.
        median_gap: Days, the aggregators' default time unit.
        rules: What counts as context.
        tune: Whether each branch trains its own copy of the encoder; a branch ``own`` without context is added, so
            that the baseline gets as many epochs.
        published: Whether rules and arguments of aggregators that were not given are those of the released code.

    A branch begins at weights drawn by the seed of torch and its own name: whatever else is compared does not move it.
    With a frozen encoder it also ends at the same weights; a tuned one draws noise from the stream all branches share.

    Raises:
        ValueError: If there is no aggregator, one has the name of another arm, or the encoder takes less than
            ``rules.window`` events.
    """

    def __init__(
        self,
        encoder: EventEncoder,
        aggregators: Mapping[str, AggregatorFactory],
        *,
        combination: CombinationFactory,
        objective: ObjectiveFactory,
        vocabulary_sizes: list[int],
        n_numeric: int,
        median_gap: float,
        rules: ContextRules | None = None,
        tune: bool = False,
        published: bool = False,
    ) -> None:
        wrong = next((name for name in aggregators if "." in name), None)
        if not aggregators or wrong is not None:
            raise ValueError(f"aggregators must be at least one, by names without '.', got {list(aggregators)}")
        taken = next((name for name in aggregators if hasattr(nn.ModuleDict, name) or name == "training"), None)
        if taken is not None:
            raise ValueError(f"an aggregator cannot be named {taken!r}, as modules of torch have an attribute of it")
        arm_names(list(aggregators))  # which refuses those of controls
        rules = (rules or ContextRules()).settled(published=published)
        if encoder.max_length is not None and (rules.window or 0) > encoder.max_length:
            most = f"the encoder's max_length {encoder.max_length}"
            raise ValueError(f"context.window must be at most {most}, got {rules.window}")
        super().__init__()
        self.encoder = encoder
        self.rules = rules
        self.tune = tune
        facts = {"vocabulary_sizes": vocabulary_sizes, "n_numeric": n_numeric}
        known: dict[str, Any] = {
            "d": encoder.d_model,
            "median_gap": median_gap,
            **({"published": True} if published else {}),
        }
        names = (["own"] if tune else []) + list(aggregators)
        self.branches = nn.ModuleDict()
        for name in names:
            factory = aggregators.get(name)
            with drawn_by_name(name):
                aggregator = None if factory is None else factory(**known)
                if aggregator is not None and rules.before_first == "random":
                    nn.init.uniform_(aggregator.empty_context).requires_grad_(False)
                self.branches[name] = Branch(
                    aggregator,
                    d=encoder.d_model,
                    combination=combination,
                    objective=objective,
                    facts=facts,
                    encoder=deepcopy(encoder) if tune else None,
                )

    def branch(self, name: str) -> Branch:
        """The branch of a name."""
        found = self.branches[name]
        assert isinstance(found, Branch)
        return found

    def d_context(self, name: str) -> int:
        """Width of the context vectors of a branch, without the flag."""
        return self._combination(name).d_context

    def _combination(self, name: str) -> Combination:
        combination = self.branch(name).combination
        assert combination is not None
        return combination

    @property
    def aggregators(self) -> list[str]:
        """Names of the branches with context."""
        return [name for name in self.branches if self.branch(name).aggregator is not None]

    @property
    def mixing(self) -> list[str]:
        """Names of the branches whose combination does more than put own state and context side by side."""
        return [name for name in self.aggregators if type(self.branch(name).combination) is not Concat]

    def encoder_of(self, name: str) -> EventEncoder:
        """The encoder a branch reads: its own, else the shared one, which is also that of any other name."""
        own = self.branch(name).encoder if name in self.branches else None
        return self.encoder if own is None else own

    def start_tuning(self) -> None:
        """Every branch begins at the pre-trained weights."""
        for name in self.branches:
            encoder = self.branch(name).encoder
            if encoder is not None:
                encoder.load_state_dict(self.encoder.state_dict())

    def encode(self, events: Events, name: str = "own") -> Tensor:
        """``(E, d) float32`` states after every event, without gradient, on the device of the events.

        They have read the user's whole history: with ``rules.window`` those of a bank are encoded otherwise.
        """
        return encode_table(self.encoder_of(name), events)

    def bank(self, states: Tensor, events: Events, context_users: Tensor, stop: int = FOREVER) -> ContextBank:
        """The context of events before ``stop`` of the users that the rules draw from ``context_users``.

        It lies on the device of the model: a table of all states may stay where there is more room.
        """
        rules = self.rules
        settled: dict[str, Any] = {name: getattr(rules, name) for name in ("ties", "min_prefix", "drop_last_prefix")}
        bank = ContextBank.build(
            states,
            events,
            drawn_context_users(context_users, rules.n_users, rules.seed, events.get("draws")),
            stop=stop,
            lag_days=rules.lag_days,
            max_age_days=rules.max_age_days,
            exclude_self=not rules.include_self,
            exclude_group=rules.exclude_group,
            max_context=rules.max_rows,
            policy=rules.policy,
            seed=rules.seed,
            **settled,
        )
        return bank.to(next(self.parameters()).device)

    def own(
        self,
        states: Tensor,
        events: Events,
        users: Tensor,
        times: Tensor,
        name: str = "own",
        start: Tensor | None = None,
    ) -> Own:
        """Own states of queries: strictly before their moment, whatever the ties of the context.

        Without history it is ``start (d,)``, by default the initial state of the encoder of ``name``.
        """
        found, known, rows = own_states(states, events, users, times)
        start = (self.encoder_of(name).initial_state() if start is None else start).detach().to(found)
        return Own(torch.where(known.unsqueeze(1), found, start), torch.where(known, rows, -1))

    @torch.no_grad()
    def contexts(self, name: str, own: Tensor, bank: ContextBank, users: Tensor, times: Tensor) -> Tensor:
        """``(Q, k)`` context vectors of queries in any order, k = d_out, plus 1 with ``rules.empty_flag``.

        Queries are taken in order of time, so that those of a batch share what is visible. Mean and linear kernel
        (``kind="elu"``) over all users come from sums over time, whose cost does not grow with the number of users, but
        for queries whose sums cannot tell.
        """
        aggregator = self.branch(name).aggregator
        assert aggregator is not None
        unbounded = (self.rules.n_users, self.rules.max_age_days, self.rules.max_rows) == (None, None, None)
        sums = type(aggregator) is Mean or (type(aggregator) is LinearKernel and aggregator.has_sums)
        if unbounded and not self.rules.exclude_group and sums:
            with torch.autocast(bank.states.device.type, enabled=False):  # as an aggregator computes
                return self._summed(aggregator, own, bank, users, times)
        return self._read(aggregator, own, bank, users, times)

    def _read(self, aggregator: Aggregator, own: Tensor, bank: ContextBank, users: Tensor, times: Tensor) -> Tensor:
        found, seen = own.new_zeros(len(own), aggregator.d_out), own.new_zeros(len(own), dtype=torch.bool)
        for rows in times.argsort(stable=True).split(QUERIES_AT_A_TIME):
            context = bank.context(times[rows], users[rows])
            found[rows] = aggregator(own[rows].to(context.states), context).to(found)
            seen[rows] = context.visible.any(1).to(own.device)
        return self._flagged(found, seen)

    def _summed(self, aggregator: Aggregator, own: Tensor, bank: ContextBank, users: Tensor, times: Tensor) -> Tensor:
        query, times, users = own.to(bank.states), times.to(bank.times), users.to(bank.users)
        if not isinstance(aggregator, LinearKernel):
            found, counts = PrefixMean.build(bank).mean(times, users)
            return self._flagged(aggregator.or_empty(found.to(query), (counts > 0).unsqueeze(1)), counts > 0).to(own)
        of_query = aggregator.log_features(query)
        of_query = (of_query - of_query.amax(1, keepdim=True)).exp()  # a factor of the query cancels
        sums = PrefixMoments.build(bank, aggregator.positive_features)
        found, counts, untold = sums.lookup(of_query, times, users)
        found = self._flagged(aggregator.or_empty(found.to(query), (counts > 0).unsqueeze(1)), counts > 0)
        if untold.any():  # the rows are read in logarithms
            found[untold] = self._read(aggregator, query[untold], bank, users[untold], times[untold])
        return found.to(own)

    def _flagged(self, found: Tensor, seen: Tensor) -> Tensor:
        return torch.cat([found, (~seen).unsqueeze(1).to(found)], 1) if self.rules.empty_flag else found

    def combined(self, name: str, own: Tensor, context: Tensor) -> Tensor:
        """``(Q, D)``, z = combination(q, b) of own states ``(Q, d)`` and context vectors ``(Q, k)`` of a branch.

        A flag of empty contexts behind the vectors stands behind z, for the combination was trained without it.
        Computed without autocast, like the contexts; returned like the own states.
        """
        combination = self._combination(name)
        like = next(combination.parameters(), own)
        with torch.autocast(like.device.type, enabled=False):
            vectors, flag = context.to(like).split([combination.d_context, context.shape[1] - combination.d_context], 1)
            return torch.cat([combination(own.to(like), vectors), flag], 1).to(own)


@contextmanager
def drawn_by_name(name: str) -> Iterator[None]:
    """Random numbers of the seed of torch and of a name, and the stream as it was before afterwards."""
    seed = torch.initial_seed()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((seed + crc32(name.encode())) % 2**63)
        yield


def moments(batch: Mapping[str, Tensor]) -> Tensor:
    """``(B,) int64`` moments of sequences: of their query where there is one, else of their last event."""
    if "query_times" in batch:
        return batch["query_times"]
    last = (batch["mask"].sum(1) - 1).clamp(min=0)  # a padding row has no event, and any moment will do
    return batch["times"].gather(1, last.unsqueeze(1)).squeeze(1)


def first_sequences(batch: Mapping[str, Tensor], max_steps: int) -> dict[str, Tensor]:
    """The first sequences of a batch with at most ``max_steps`` valid steps together, at least one sequence."""
    n_rows = max(1, int((batch["mask"].sum(1).cumsum(0) <= max_steps).sum()))
    return {name: value[:n_rows] for name, value in batch.items()}
