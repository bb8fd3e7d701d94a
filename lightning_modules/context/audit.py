"""A leak audit of anything that turns events into representations at moments: what must not matter is changed.

The pipeline is a black box, ``represent(events, users, times) -> (Q, k)``. Events that a query may not know are
deleted, rewritten and poisoned, labels exchanged, queries regrouped; whatever answers otherwise than before has a leak,
and which of the changes it answers to says where. An audit finds leaks, it cannot prove that there is none.

Q queries, E events, U users, k features. Source: spec of arXiv 2502.10205, sections 3.2, 13 and 15.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lightning_modules.context import audit_edits as edits
from lightning_modules.context.audit_findings import NOTHING, AuditFinding, Case, Change, changed, gaps
from lightning_modules.context.cross_fitting import cross_fitted_auc
from lightning_modules.context.visible import FOREVER, Events

UNSEEN = {
    "fitted statistics": (
        "a call fits none, but events came coded and normalised by what was fitted before. To see: split by time, "
        "write the events before a moment soon after training ends (--write_truncated) and test this checkpoint on "
        "them (data.init_args.paths, test_start before that moment); split by users, where training has no end, give "
        "the events of test users other values and test on that file. A data module that keeps its state in the "
        "checkpoint refuses where anything fitted differs"
    ),
    "labels": (
        "labels were exchanged after features were made, and a call reads none. To see: predict with this checkpoint "
        "from files whose label columns hold others; the embeddings must be the same"
    ),
}
"""What is said instead of ``clean`` of checks that cannot see what was done before the audit."""

STATISTIC_SHARE = 1e-3
"""Mixing the future among itself keeps its means; a change this many times smaller than that of rewriting it is the
order of float sums."""


class Represent(Protocol):
    """Features of queries.

    All that depends on an argument must be computed in the call: what was computed before it, an audit cannot see.
    """

    def __call__(self, events: Events, users: Tensor, times: Tensor) -> Tensor:
        """``(Q, k) float`` features of users ``(Q,) int64`` at times ``(Q,) int64`` microseconds."""


class RepresentContext(Protocol):
    """The context part of the features alone, own history and others taken from tables of their own."""

    def __call__(self, own: Events, others: Events, users: Tensor, times: Tensor, context_times: Tensor) -> Tensor:
        """``(Q, k) float``: own states from ``own`` at ``times``, states of others at ``context_times``."""


@dataclass(frozen=True)
class _Evidence:
    """Changes by the future, by what they come through: states, statistics, NaN alone, the moment itself."""

    state: Change = NOTHING
    statistics: Change = NOTHING
    nan: Change = NOTHING
    moment: Change = NOTHING
    unclear: Change = NOTHING

    def __or__(self, other: "_Evidence") -> "_Evidence":
        return _Evidence(*(getattr(self, f.name) | getattr(other, f.name) for f in fields(self)))

    @property
    def any(self) -> bool:
        return any(bool(getattr(self, f.name)) for f in fields(self))


@dataclass(frozen=True)
class Audit:
    """Checks a pipeline and says what it found.

    Checks, by the names findings carry: ``future`` (events after a query, own or of others, change it), ``fitted
    statistics`` (they do so through means, deviations or vocabularies fitted on them), ``before the first event``
    (a query without any past reads some event, such as index -1), ``same moment`` (events at the very microsecond
    of the query change it; with inclusive ties they may, and events at the next tick of the log are ``right after``),
    ``self`` (own events change the context), ``labels``, ``batch`` (other queries of the call change a query) and
    ``shuffled clock`` (never a leak: how well labels are told at a wrong moment). Events strictly before a query count
    as known, by however little: whether they could be known in time is not asked.

    Args:
        represent: The pipeline; called about 5 times for each cut and 15 times more.
        context: Its context part by itself; None leaves ``self`` unchecked.
        ties: ``"strict"``: a query at t knows events before t; ``"inclusive"``: also those at t.
        train_stop: Microseconds until which events may be used to fit statistics, for all queries before it.
        n_queries: Most queries, drawn by ``seed``.
        n_cuts: Moments, drawn among those of the queries, from which on events are changed.
        n_users: Users whose own events are changed, one at a time.
        tolerance: Greatest allowed change where numbers of events and queries stay, relative to the spread of each
            feature over the queries, and at least what float32 rounds; 0 means bit for bit.
        resize_tolerance: The same where these numbers change, and with them the order of float sums; also of ``self``,
            since a sum over all users from which the own state is taken off again keeps a rounding of it.
        prepared: Whether events come coded, normalised and labelled by what was fitted before. ``fitted statistics``
            and ``labels`` are then never ``clean``: a leak of the call is found, one of the preparation cannot be.
        seed: Of all draws.

    Raises:
        ValueError: If a number is out of range.
    """

    represent: Represent
    context: RepresentContext | None = None
    ties: Literal["strict", "inclusive"] = "strict"
    train_stop: int = FOREVER
    n_queries: int = 256
    n_cuts: int = 6
    n_users: int = 6
    tolerance: float = 0.0
    resize_tolerance: float = 0.0
    prepared: bool = False
    seed: int = 0
    _random: torch.Generator = field(default_factory=torch.Generator, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.ties not in ("strict", "inclusive"):
            raise ValueError(f"ties must be 'strict' or 'inclusive', got {self.ties!r}")
        for name, least in (("n_queries", 2), ("n_cuts", 1), ("n_users", 1), ("tolerance", 0), ("resize_tolerance", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def run(
        self,
        events: Events,
        users: Tensor,
        times: Tensor,
        *,
        labels: Tensor | None = None,
        label_tables: Sequence[Tensor] = (),
        user_names: Sequence[Any] | None = None,
    ) -> list[AuditFinding]:
        """Run every check.

        Args:
            events: Flat; tensors beyond those of ``Events`` are taken for labels.
            users: ``(Q,) int64``.
            times: ``(Q,) int64`` microseconds.
            labels: ``(Q,) int64`` classes of the queries, for the shuffled clock; exchanged in place and put back.
            label_tables: Further tensors of labels that the pipeline could reach, exchanged likewise.
            user_names: ``(U,)`` original ids, for examples.

        Raises:
            ValueError: If shapes do not fit, there are not two queries, or the pipeline answers the same call twice
                in different ways.
        """
        self._random.manual_seed(self.seed)
        _check(events, users, times, labels)
        case = Case(events, users, times, labels, user_names)
        if len(users) > self.n_queries:
            case = case.take(torch.randperm(len(users), generator=self._random)[: self.n_queries].sort().values)
        first = self._features(case)
        case = replace(case, reference=first)
        twice = changed(first, self._features(case), 0.0, case)
        if twice:
            raise ValueError(
                f"the pipeline cannot be audited: the same call gave different numbers ({twice.example}); put it in "
                "evaluation mode and seed it"
            )
        future, statistics, moment = self._after(case)
        pooled = statistics.status == "leak"
        hidden = "statistics fitted ahead change with every edit: audit again without that leak"
        early, own = "before the first event", "self"
        if pooled or future.status == "leak":
            words = "a query that reads later events reads them before the first one too: audit again without that leak"
            first_finding = AuditFinding(early, "not checked", words=words)
        else:
            first_finding = self._before_the_first_event(case)
        tables = [table for table in (labels, *label_tables) if table is not None]
        return [
            future,
            self._claimed(statistics),
            first_finding,
            *self._planted_events(case, moment, hidden if pooled else None),
            AuditFinding(own, "not checked", words=hidden) if pooled else self._self(case),
            self._claimed(self._labels(case, first, tables)),
            self._batch(case, first),
            self._shuffled_clock(case, first),
        ]

    def _claimed(self, finding: AuditFinding) -> AuditFinding:
        """The finding, or that it cannot be claimed."""
        if not self.prepared or finding.status != "clean":
            return finding
        return AuditFinding(finding.name, "not checked", words=UNSEEN[finding.name])

    def _features(self, case: Case, events: Events | None = None) -> Tensor:
        found = self.represent(case.events if events is None else events, case.users, case.times)
        if found.ndim != 2 or len(found) != len(case.users) or not found.is_floating_point():
            raise ValueError(
                f"represent must give ({len(case.users)}, k) floats, got {found.dtype} of {tuple(found.shape)}"
            )
        # A pipeline may hand out a buffer that it fills anew.
        return found.detach().clone().cpu()

    def _edited(self, case: Case, cut: int) -> _Evidence:
        """What changes queries at or before ``cut`` when events after it are edited."""
        times = case.events["times"]
        after = times > cut
        if self.ties == "inclusive":
            return self._evidence(case, after, cut)
        found = self._evidence(case, times >= cut, cut)
        seen = found.state | found.unclear
        if seen and (times == cut).any() and not self._evidence(case, after, cut).any:
            return _Evidence(moment=seen)
        return found

    def _evidence(self, case: Case, later: Tensor, cut: int) -> _Evidence:
        events, stop = case.events, self.train_stop
        base = self._features(case)
        moved = edits.retime(events, later, cut, stop, self._random)
        edited = [self._features(case, edits.rewrite(moved, later, self._random))]
        change = changed(base, edited[0], self.tolerance, case)
        if not later.all():  # a pipeline need not know what to do with no event at all
            edited.append(self._features(case, edits.keep(events, ~later)))
            change |= changed(base, edited[1], self.resize_tolerance, case)
        if not change:
            poisoned = self._features(case, edits.poison(events, later))
            return _Evidence(nan=changed(base, poisoned, self.tolerance, case))
        if int(later.sum()) < 2:  # one event cannot be mixed with itself: other cuts tell what it is
            return _Evidence(unclear=change)
        slack = _order_of_sums(base, edited)
        for table in (edits.mix(events, later, stop, self._random), moved):
            if changed(base, self._features(case, table), self.tolerance, case, slack):
                return _Evidence(state=change)
        return _Evidence(statistics=change)

    def _after(self, case: Case) -> tuple[AuditFinding, AuditFinding, Change]:
        moments = case.times.unique()
        cuts = moments[torch.randperm(len(moments), generator=self._random)[: self.n_cuts]].tolist()
        if self.train_stop < FOREVER and (case.times <= self.train_stop).any():
            cuts.append(self.train_stop)
        all_cuts, late, early = _Evidence(), Change(), Change()
        for cut in cuts:
            found = self._edited(case.take((case.times <= cut).nonzero().squeeze(1)), cut)
            all_cuts |= found
            if cut < self.train_stop < FOREVER:
                early |= found.statistics
            else:
                late |= found.statistics
        state, nan = all_cuts.state, all_cuts.nan
        if all_cuts.unclear and not (state or late or early):
            state = all_cuts.unclear
        seen = f"at {len(cuts)} moments, with {len(case.times)} queries"
        fitted = "fitted statistics"
        if state:
            words = "events after a query change its representation, and not through means alone: it looks ahead"
            future = AuditFinding("future", "leak", state.worst, state.example, words)
        elif nan:
            words = (
                "no value of the future matters, but a NaN there spoils earlier queries: something hidden is "
                "multiplied by 0 instead of left out"
            )
            future = AuditFinding("future", "information", nan.worst, nan.example, words)
        else:
            words = f"later events were rewritten, removed and poisoned {seen}: no state changed"
            future = AuditFinding("future", "clean", 0.0, None, words)
        if late:
            words = "means, deviations or vocabularies are fitted on events after the query"
            statistics = AuditFinding(fitted, "leak", late.worst, late.example, words)
        elif early:
            words = "statistics are fitted on training events after a training query, as usual; none on later events"
            statistics = AuditFinding(fitted, "information", early.worst, early.example, words)
        elif state:
            words = "a representation that looks ahead hides what is fitted ahead: audit again without that leak"
            statistics = AuditFinding(fitted, "not checked", words=words)
        else:
            statistics = AuditFinding(fitted, "clean", 0.0, None, f"no later event enters one {seen}")
        return future, statistics, all_cuts.moment

    def _before_the_first_event(self, case: Case) -> AuditFinding:
        events, first = case.events, int(case.events["times"].min())
        someone = case.users.unique()[: self.n_users]
        queries = [(someone, first)]
        for user in someone.tolist():
            start, end = events["offsets"][user : user + 2].tolist()
            if start < end:
                queries.append((torch.tensor([user]), int(events["times"][start])))
        found = Change()
        for users, time in queries:
            alone = replace(case, users=users, times=torch.full_like(users, time), labels=None)
            evidence = self._edited(alone, time)
            found |= evidence.state | evidence.statistics | evidence.unclear
        if found:
            words = "a query without a past reads an event all the same: an index before the first row, such as -1"
            return AuditFinding("before the first event", "leak", found.worst, found.example, words)
        words = f"{len(someone)} users at their first event, and at the first of all: they read none"
        return AuditFinding("before the first event", "clean", 0.0, None, words)

    def _planted_events(self, case: Case, found: Change, hidden: str | None) -> list[AuditFinding]:
        """``same moment``, and with inclusive ties ``right after``; ``hidden`` is why neither can be checked."""
        strict = self.ties == "strict"
        names = ["same moment"] if strict else ["same moment", "right after"]
        if hidden is not None:
            return [AuditFinding(name, "not checked", words=hidden) for name in names]
        moments, bites = case.times.unique(), False
        for cut in moments[torch.randperm(len(moments), generator=self._random)[: self.n_cuts]].tolist():
            at = case.take((case.times == cut).nonzero().squeeze(1))
            # The first moment that must not matter, and the last that may.
            ahead, known = (cut, cut - 1) if strict else (edits.next_tick(case.events, cut), cut)
            found |= changed(*self._planted(at, ahead), self.tolerance, at)
            bites |= bool(changed(*self._planted(at, known), self.tolerance, at))
        if strict:
            where, allowed = "at the moment of the query", "one microsecond earlier"
            leak = "an event at the very microsecond of the query changes it: where it tells the label, so does the "
            leak += "representation"
        else:
            where, allowed = "right after the query, at the next tick of the log", "at the moment of the query"
            leak = f"an event {where}, changes it: the pipeline looks ahead"
        if found:
            finding = AuditFinding(names[-1], "leak", found.worst, found.example, leak)
        else:
            words = f"an event that tells the label was planted for every user {where}: nothing changed; "
            words += (
                f"planted {allowed} it does change the query, so the test bites"
                if bites
                else f"planted {allowed} nothing changed either: the newest events do not matter here"
            )
            words += "; what comes before a query counts as known, by however little" if strict else ""
            finding = AuditFinding(names[-1], "clean", 0.0, None, words)
        if strict:
            return [finding]
        words = "events at the moment of the query are declared as known: one planted there changes "
        words += "it" if bites else "nothing, the newest events do not matter here"
        return [AuditFinding(names[0], "information", words=words), finding]

    def _planted(self, case: Case, time: int) -> tuple[Tensor, Tensor]:
        """Features with an event that spells the label at ``time``, and with one that spells another."""
        label = 0 if case.labels is None else int(case.labels[0])
        highest = int(edits.highest_ids(case.events).max()) if case.events["categorical"].shape[1] else 1
        # Numbers differ only where categories cannot. Both tables have one shape, so that bits can be compared.
        numbers = (0.0, 0.0) if highest > 1 else (-3.0, 3.0)
        first, second = (
            self._features(case, edits.plant(case.events, time, 1 + (label + other) % highest, numbers[other]))
            for other in (0, 1)
        )
        return first, second

    def _self(self, case: Case) -> AuditFinding:
        if self.context is None:
            words = "own history and context are not separable here, so own events cannot be changed in one of them"
            return AuditFinding("self", "not checked", words=words)
        found, rounding, rows = Change(), Change(), edits.users_of_rows(case.events)
        slack = max(self.tolerance, self.resize_tolerance)
        whole = self.context(case.events, case.events, case.users, case.times, case.times)
        case = replace(case, reference=whole.detach().clone().cpu())
        someone = case.users.unique()
        someone = someone[torch.randperm(len(someone), generator=self._random)[: self.n_users]]
        for user in someone.tolist():
            own = case.take((case.users == user).nonzero().squeeze(1))
            edited = edits.rewrite(case.events, rows == user, self._random)
            before, after = (
                self.context(case.events, table, own.users, own.times, own.times).detach().clone().cpu()
                for table in (case.events, edited)
            )
            found |= changed(before, after, slack, own)
            rounding |= changed(before, after, self.tolerance, own)
        if found:
            words = "a user's own events change its context: the user is in its own bank"
            return AuditFinding("self", "leak", found.worst, found.example, words)
        if rounding:
            words = (
                f"own events move the context by no more than resize_tolerance {slack:g}: a sum that the own state is "
                "taken off again rounds like that, and a weight of oneself as small would look the same"
            )
            return AuditFinding("self", "information", rounding.worst, rounding.example, words)
        return AuditFinding(
            "self", "clean", 0.0, None, f"own events of {len(someone)} users do not enter their context"
        )

    def _labels(self, case: Case, first: Tensor, tables: list[Tensor]) -> AuditFinding:
        known = {"categorical", "numeric", "times", *edits.PER_USER}
        tables = tables + [value for name, value in case.events.items() if name not in known]
        tables = [table for table in tables if table.numel() and (table != table.flatten()[0]).any()]
        if not tables:
            return AuditFinding("labels", "not checked", words="no labels were given")
        found = Change()
        for kind in ("exchanged", "constant"):
            with edits.other_labels(tables, kind, self._random):
                found |= changed(first, self._features(case), self.tolerance, case)
        if found:
            words = "other labels give other representations: labels are inputs of the pipeline"
            return AuditFinding("labels", "leak", found.worst, found.example, words)
        return AuditFinding("labels", "clean", 0.0, None, "labels were exchanged and made equal: nothing changed")

    def _batch(self, case: Case, first: Tensor) -> AuditFinding:
        n_queries = len(case.users)
        order = torch.randperm(n_queries, generator=self._random)
        found = changed(first[order], self._features(case.take(order)), self.resize_tolerance, case.take(order))
        half = n_queries // 2
        for rows in (torch.arange(half), torch.arange(half, n_queries), torch.arange(1)):
            part = case.take(rows)
            found |= changed(first[rows], self._features(part), self.resize_tolerance, part)
        if found:
            words = "a query's representation depends on which others are asked with it, later ones among them"
            return AuditFinding("batch", "leak", found.worst, found.example, words)
        return AuditFinding("batch", "clean", 0.0, None, "in another order, in halves and alone: the same")

    def _shuffled_clock(self, case: Case, first: Tensor) -> AuditFinding:
        name = "shuffled clock"
        if case.labels is None or len(case.labels.unique()) < 2:
            return AuditFinding(name, "not checked", words="no labels of two classes were given")
        if len(case.users.unique()) < 5:
            return AuditFinding(name, "not checked", words="queries of at least 5 users are needed")
        if self.context is None:
            # An earlier moment only: a later one would let the own history tell the label.
            sooner = case.times.sort().values
            rank = torch.searchsorted(sooner, case.times, right=True)
            drawn = (torch.rand(len(rank), generator=self._random, dtype=torch.float64) * rank).long()
            real, wrong = first, self.represent(case.events, case.users, sooner[drawn]).detach().cpu()
            what = "representations at random earlier moments, where own history is shorter too"
        else:
            times = case.times[torch.randperm(len(case.times), generator=self._random)]
            real, wrong = (
                self.context(case.events, case.events, case.users, case.times, moments).detach().cpu()
                for moments in (case.times, times)
            )
            what = "contexts of random moments"
        there, elsewhere = (
            cross_fitted_auc(features.double().numpy(), case.labels.numpy(), case.users.numpy(), seed=self.seed)
            for features in (real, wrong)
        )
        # Twice the standard error of an area of one half, for balanced classes.
        error = 2 * (3 * len(case.labels)) ** -0.5
        if there < 0.5 + error:
            verdict = "neither is told from chance"
        elif elsewhere < there - error:
            verdict = "the moment carries some of it"
        else:
            verdict = "as good within the error: what helps is not shown to be the moment"
        words = (
            f"{what} tell labels with ROC-AUC {elsewhere:.3f}, those of the right moment with {there:.3f}; {verdict}"
        )
        return AuditFinding(name, "information", words=words)


def _order_of_sums(before: Tensor, edited: Sequence[Tensor]) -> Tensor:
    """``(k,)``: changes that the order of float sums explains, by what edits change of features ``(Q, k)``.

    ``STATISTIC_SHARE`` of the greatest change, both relative to the greatest number of a feature.
    """
    before = before.double()
    most = before.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs().amax(0)
    share = 0.0
    for after in edited:
        change = gaps(before, after.double()).amax(0) if before.shape == after.shape else most
        # A change beyond the feature itself, or to NaN, counts as large as the feature.
        share = max(share, float((change / most.clamp(min=1e-300)).clamp(max=1).max()))
    return STATISTIC_SHARE * share * most


def _check(events: Events, users: Tensor, times: Tensor, labels: Tensor | None) -> None:
    n_users, n_events = len(events["offsets"]) - 1, len(events["times"])
    if n_events == 0 or int(events["offsets"][-1]) != n_events:
        raise ValueError(
            f"offsets must end at the number of events, at least 1, got {events['offsets'][-1]}, {n_events}"
        )
    if len(users) < 2 or len(users) != len(times):
        raise ValueError(f"at least 2 queries are needed, as many users as times, got {len(users)} and {len(times)}")
    if int(users.min()) < 0 or int(users.max()) >= n_users:
        raise ValueError(f"users of queries must lie in 0..{n_users - 1}, got {users.min()}..{users.max()}")
    if labels is not None and len(labels) != len(users):
        raise ValueError(f"labels must be as many as queries, {len(users)}, got {len(labels)}")
