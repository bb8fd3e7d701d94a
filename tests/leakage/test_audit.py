"""The audit against pipelines with one leak each, planted on purpose, and against one that has none."""

import dataclasses

import pytest
import torch

from lightning_modules.context import audit_edits as edits
from lightning_modules.context.aggregators import KernelAttention
from lightning_modules.context.audit import Audit
from lightning_modules.context.audit_findings import AuditFinding, exit_code, report
from lightning_modules.context.combination import Concat
from lightning_modules.context.cross_fitting import cross_fitted, cross_fitted_auc
from lightning_modules.context.enriched import ContextRules, EnrichedEncoder
from lightning_modules.context.visible import FOREVER
from lightning_modules.losses import CoLES
from lightning_modules.networks import RecurrentEncoder

N_USERS, DAY = 12, 86_400_000_000
LEAKS = {
    "inclusive ties": {"same moment"},
    "next event in the bank": {"future", "same moment"},
    "self in the bank": {"self"},
    "normaliser over everything": {"fitted statistics"},
    "vocabulary over everything": {"fitted statistics"},
    "label in the bank": {"labels"},
    "mean label": {"labels"},
    "batch statistics": {"batch"},
    "index -1 of the bank": {"before the first event"},
    "index -1 of the own history": {"future"},
    "time to the next own event": {"future"},
}


@pytest.fixture
def events():
    random = torch.Generator().manual_seed(3)
    lengths = torch.randint(5, 30, (N_USERS,), generator=random)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    n_events = int(offsets[-1])
    # Few distinct days: many events of several users share a microsecond.
    times = torch.randint(10, 60, (n_events,), generator=random) * DAY
    rows = torch.arange(N_USERS).repeat_interleave(lengths)
    times = times[(rows * 10**15 + times).argsort()]
    return {
        "categorical": torch.randint(1, 6, (n_events, 1), generator=random),
        "numeric": torch.randn(n_events, 2, generator=random),
        "times": times,
        "offsets": offsets,
    }


@pytest.fixture
def queries(events):
    random = torch.Generator().manual_seed(4)
    users = torch.randint(N_USERS, (60,), generator=random)
    times = torch.randint(13, 58, (60,), generator=random) * DAY
    return users, times, torch.randint(2, (60,), generator=random)


class Pipeline:
    """Own last state, and the mean of the last states of others, by a loop over queries and users."""

    def __init__(self, leak=None, labels=None):
        self.leak, self.labels = leak, labels

    def states(self, events):
        numeric, ids = events["numeric"].double(), events["categorical"].double()
        if self.leak == "normaliser over everything":
            numeric = (numeric - numeric.mean(0)) / numeric.std(0)
        if self.leak == "vocabulary over everything":
            counts = torch.bincount(events["categorical"].flatten(), minlength=50)
            ids = counts.argsort(descending=True, stable=True).argsort()[events["categorical"]].double()
        found = torch.cat([numeric, ids / 10], 1)
        if "event_labels" in events:
            found = torch.cat([found, events["event_labels"].double().unsqueeze(1)], 1)
        return found

    def rows(self, events, user, time, ties="left"):
        start, end = events["offsets"][user : user + 2].tolist()
        return start, start + int(torch.searchsorted(events["times"][start:end], time, right=ties == "right")), end

    def context(self, own, others, users, times, context_times):
        states, found = self.states(others), []
        first = int(others["times"].min())
        for user, time in zip(users.tolist(), context_times.tolist(), strict=True):
            seen = []
            for other in range(N_USERS):
                start, end, last = self.rows(others, other, time, "right" if self.leak == "inclusive ties" else "left")
                if self.leak == "next event in the bank" and end < last:
                    end += 1
                if self.leak == "index -1 of the bank" and time <= first:
                    end = last
                if end > start and (other != user or self.leak == "self in the bank"):
                    seen.append(states[end - 1])
            found.append(torch.stack(seen).mean(0) if seen else torch.zeros(states.shape[1], dtype=torch.float64))
        return torch.stack(found)

    def own(self, events, users, times):
        states, found = self.states(events), []
        for user, time in zip(users.tolist(), times.tolist(), strict=True):
            start, end, last = self.rows(events, user, time)
            state = states[end - 1] if end > start else torch.zeros(states.shape[1], dtype=torch.float64)
            if end == start and self.leak == "index -1 of the own history":
                state = states[end - 1]  # row -1 of the table, or the last of the user before
            if self.leak == "time to the next own event":
                gap = float(events["times"][end] - time) / DAY if end < last else 99.0
                state = torch.cat([state, torch.tensor([gap], dtype=torch.float64)])
            found.append(state)
        return torch.stack(found)

    def __call__(self, events, users, times):
        parts = [self.own(events, users, times), self.context(events, events, users, times, times)]
        if self.leak == "mean label":
            parts.append(self.labels.double().mean().expand(len(users), 1))
        found = torch.cat(parts, 1)
        return (found - found.mean(0)) / (1 + found.std(0, correction=0)) if self.leak == "batch statistics" else found


def leaks_of(findings):
    return {finding.name for finding in findings if finding.status == "leak"}


def test_a_clean_pipeline_is_clean(events, queries):
    users, times, labels = queries
    pipeline = Pipeline()
    findings = Audit(pipeline, context=pipeline.context).run(events, users, times, labels=labels)
    assert {finding.name: finding.status for finding in findings} == {
        "future": "clean",
        "fitted statistics": "clean",
        "before the first event": "clean",
        "same moment": "clean",
        "self": "clean",
        "labels": "clean",
        "batch": "clean",
        "shuffled clock": "information",
    }
    assert exit_code(findings) == 0
    assert "so the test bites" in next(finding.words for finding in findings if finding.name == "same moment")
    assert report(findings).splitlines()[-1] == "no leak found; that there is none cannot be proved"


@pytest.mark.parametrize(("leak", "names"), LEAKS.items())
def test_each_planted_leak_is_caught_under_its_name(events, queries, leak, names):
    users, times, labels = queries
    if leak == "label in the bank":
        events = events | {"event_labels": torch.arange(len(events["times"])) % 2}
    if leak == "index -1 of the own history":
        # Somebody who comes late: the query at its first event has no past.
        users, times = users.clone(), times.clone()
        users[:20], times[:20] = 7, events["times"][events["offsets"][7]]
    pipeline = Pipeline(leak, labels)
    findings = Audit(pipeline, context=pipeline.context).run(events, users, times, labels=labels)
    assert leaks_of(findings) == names, report(findings)
    assert exit_code(findings) == 1
    for finding in findings:
        if finding.status == "leak":
            assert finding.worst > 0
            assert "becomes" in finding.example
    assert report(findings).splitlines()[-1].startswith(f"{len(names)} leak")


def test_statistics_of_the_training_period_are_no_leak(events, queries):
    users, times, _ = queries
    stop = 40 * DAY

    def fitted_before(limit):
        def represent(table, who, when):
            seen = table["times"] < limit
            mean = table["numeric"][seen].double().mean(0)
            return Pipeline()(table | {"numeric": table["numeric"].double() - mean}, who, when)

        return represent

    def status(limit):
        found = Audit(fitted_before(limit), train_stop=stop).run(events, users, times)
        assert found[0].status == "clean"
        return found[1].status

    assert status(stop) == "information"
    ahead = Audit(fitted_before(50 * DAY), train_stop=stop).run(events, users, times)
    assert exit_code(ahead) == 1


def test_declared_inclusive_ties_may_see_the_moment(events, queries):
    users, times, labels = queries
    pipeline = Pipeline("inclusive ties")
    findings = Audit(pipeline, context=pipeline.context, ties="inclusive").run(events, users, times, labels=labels)
    assert leaks_of(findings) == set()
    found = {finding.name: finding for finding in findings}
    assert found["same moment"].status == "information"
    assert "declared as known: one planted there changes it" in found["same moment"].words
    assert found["right after"].status == "clean"
    assert (
        "planted at the moment of the query it does change the query, so the test bites" in found["right after"].words
    )
    ahead = Pipeline("next event in the bank")
    assert {"future", "right after"} <= leaks_of(Audit(ahead, ties="inclusive").run(events, users, times))
    pooled = Audit(Pipeline("normaliser over everything"), ties="inclusive").run(events, users, times)
    assert [one.name for one in pooled if one.words.startswith("statistics fitted ahead change with every edit")] == [
        "same moment",
        "right after",
        "self",
    ]


@pytest.mark.parametrize("hours", [0, 1, 3, 6])
def test_a_look_ahead_of_hours_is_caught_with_inclusive_ties(hours):
    """Few queries read anything of it, one in 25 with 1 hour: a cut alone shows it in some audits and not in others."""
    random = torch.Generator().manual_seed(0)
    n_events, hour = 60, DAY // 24
    times = (torch.rand(N_USERS, n_events, generator=random) * 60 * DAY).long().sort(1).values.flatten()
    events = {
        "categorical": torch.randint(2, 8, (len(times), 1), generator=random),
        "numeric": torch.randn(len(times), 1, generator=random),
        "times": times,
        "offsets": torch.arange(N_USERS + 1) * n_events,
    }

    def represent(table, who, when):
        """The last event until some hours after the query, once a user has five."""
        found = torch.zeros(len(who), 2)
        for row, (user, time) in enumerate(zip(who.tolist(), when.tolist(), strict=True)):
            start, end = table["offsets"][user : user + 2].tolist()
            last = start + int((table["times"][start:end] <= time + hours * hour).sum()) - 1
            if last >= start + 4:
                found[row] = torch.cat([table["categorical"][last], table["numeric"][last]])
        return found

    users = torch.randint(N_USERS, (100,), generator=random)
    asked = (torch.rand(100, generator=random) * 60 * DAY).long()
    for seed in range(4):
        findings = Audit(represent, ties="inclusive", n_cuts=5, seed=seed).run(events, users, asked)
        assert ("right after" in leaks_of(findings)) == (hours > 0), report(findings)
        assert exit_code(findings) == (hours > 0)


def test_the_day_of_a_query_may_be_read_to_its_end_on_a_log_of_dates(events, queries):
    """Nothing comes between its events, so that what a microsecond later would tell is no look ahead."""
    users, times, labels = queries

    def represent(table, who, when):
        return Pipeline("inclusive ties")(table | {"times": table["times"] // DAY}, who, when // DAY)

    findings = Audit(represent, ties="inclusive").run(events, users, times, labels=labels)
    assert leaks_of(findings) == set(), report(findings)


@pytest.mark.parametrize(
    ("times", "time", "expected"),
    [
        ([10 * DAY, 12 * DAY], 11 * DAY, 12 * DAY),
        ([10 * DAY, 17 * DAY], 11 * DAY + 1, 12 * DAY),  # a day at most
        ([10 * DAY + 7, 12 * DAY + 7], 10 * DAY + 7, 11 * DAY + 7),
        ([10 * DAY, 10 * DAY + 3_000_000, 10 * DAY + 5_000_000], 10 * DAY + 3_500_000, 10 * DAY + 4_000_000),
        ([10 * DAY, 10 * DAY + 1], 10 * DAY + 5, 10 * DAY + 6),
        ([10 * DAY], 9 * DAY - 1, 9 * DAY),
    ],
)
def test_the_next_tick_of_a_log(times, time, expected):
    assert edits.next_tick({"times": torch.tensor(times)}, time) == expected


def test_a_hidden_product_with_nan_is_told_from_a_leak(events, queries):
    users, times, _ = queries

    def represent(table, who, when):
        weights = (table["times"] < when.unsqueeze(1)).double()
        return weights @ table["numeric"].double()

    findings = Audit(represent, tolerance=1e-12, resize_tolerance=1e-12).run(events, users, times)
    assert findings[0].status == "information"
    assert findings[0].worst == float("inf")
    assert "NaN" in findings[0].words
    assert leaks_of(findings) == set()


def test_order_of_float_sums_needs_the_declared_tolerance(events, queries):
    users, times, _ = queries

    def represent(table, who, when):
        # The number of events and queries enters at the rounding level, as the shape of a matrix product does.
        rounding = 1e-9 * (len(table["times"]) % 7 + len(who) % 5)
        return Pipeline()(table, who, when) + rounding

    assert {"fitted statistics", "batch"} <= leaks_of(Audit(represent).run(events, users, times))
    assert leaks_of(Audit(represent, resize_tolerance=1e-7).run(events, users, times)) == set()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_tolerance_is_relative_to_the_spread_of_a_feature(events, queries, scale):
    users, times, _ = queries

    def depends_on_its_batch(share):
        def represent(table, who, when):
            return scale * (Pipeline()(table, who, when) + share * len(who))

        return Audit(represent, resize_tolerance=1e-4).run(events, users, times)

    # Half of 60 queries are 30 less; the features vary by a few tenths.
    assert "batch" in leaks_of(depends_on_its_batch(1e-4))
    assert leaks_of(depends_on_its_batch(1e-8)) == set()


def test_a_small_state_is_not_taken_for_a_statistic_of_a_large_feature(events, queries):
    """Means of the training period are no leak; the next own event beside them is one, however small its number."""
    users, times, _ = queries
    stop = 59 * DAY
    ahead, plain = Pipeline("time to the next own event"), Pipeline()

    def represent(table, who, when):
        mean = table["numeric"][table["times"] < stop].double().mean(0)
        gap = ahead.own(table, who, when)[:, -1:]
        return torch.cat([plain(table | {"numeric": table["numeric"].double() - mean}, who, when), 1e-7 * gap], 1)

    assert "future" in leaks_of(Audit(represent, train_stop=stop).run(events, users, times))


def test_an_own_state_taken_off_a_sum_again_is_told_from_a_leak(events, queries):
    users, times, _ = queries
    pipeline = Pipeline()

    def context(weight):
        def represent_context(own, others, who, when, context_times):
            plain = pipeline.context(own, others, who, when, context_times)
            return plain + weight * pipeline.own(others, who, context_times)

        return represent_context

    def found(weight, **settings):
        return Audit(pipeline, context=context(weight), **settings).run(events, users, times)[4]

    rounding = found(1e-9, resize_tolerance=1e-6)
    assert (rounding.name, rounding.status) == ("self", "information")
    assert "as small would look the same" in rounding.words
    assert 0 < rounding.worst < 1e-6
    assert found(1e-9).status == "leak", "bit for bit where no tolerance is declared"
    assert found(1e-4, resize_tolerance=1e-6).status == "leak"
    assert found(0.0, resize_tolerance=1e-6).status == "clean"


def test_what_was_done_before_the_audit_is_not_called_clean(events, queries):
    users, times, labels = queries
    plain = Audit(Pipeline(), prepared=True).run(events, users, times, labels=labels)
    unseen = {finding.name: finding for finding in plain if finding.name in ("fitted statistics", "labels")}
    assert [(one.status, one.worst) for one in unseen.values()] == [("not checked", None)] * 2
    assert all("To see: " in one.words for one in unseen.values())
    assert "not checked: fitted statistics, self, labels;" in report(plain)
    assert exit_code(plain) == 0
    for leak, name in (("normaliser over everything", "fitted statistics"), ("mean label", "labels")):
        found = Audit(Pipeline(leak, labels), prepared=True).run(events, users, times, labels=labels)
        assert name in leaks_of(found), "what a call itself does is still seen"


def test_what_counts_as_known_is_said(events, queries):
    users, times, labels = queries
    findings = Audit(Pipeline()).run(events, users, times, labels=labels)
    assert "what comes before a query counts as known, by however little" in findings[3].words


def test_a_clock_that_matters_is_told_from_one_that_does_not(events):
    random = torch.Generator().manual_seed(0)
    users = torch.arange(N_USERS).repeat(20)
    times = torch.randint(10, 60, (len(users),), generator=random) * DAY
    by_day, by_user = (times // DAY) % 2, users % 2

    def context(own, others, who, when, context_times):
        return torch.stack([(context_times // DAY) % 2, who % 2], 1).double()

    def represent(table, who, when):
        return context(table, table, who, when, when)

    def words(labels):
        return Audit(represent, context=context).run(events, users, times, labels=labels)[-1].words

    assert "those of the right moment with 1.000; the moment carries" in words(by_day)
    assert "as good within the error" in words(by_user)
    assert "neither is told from chance" in words(torch.randint(2, (len(users),), generator=random))


@pytest.mark.parametrize(
    ("rules", "names"),
    [({}, set()), ({"ties": "inclusive"}, {"same moment"}), ({"include_self": True}, {"self"})],
)
def test_our_own_context_leaks_only_where_it_is_told_to(events, queries, rules, names):
    users, times, labels = queries
    model = EnrichedEncoder(
        RecurrentEncoder(d_model=8, vocabulary_sizes=[6], n_numeric=2),
        {"kernel": KernelAttention},
        combination=Concat,
        objective=CoLES,
        median_gap=1.0,
        rules=ContextRules(**rules),
        vocabulary_sizes=[6],
        n_numeric=2,
    ).eval()

    @torch.no_grad()
    def context(own, others, who, when, context_times):
        query = model.own(model.encode(own), own, who, when).states
        bank = model.bank(model.encode(others), others, torch.arange(N_USERS))
        return model.contexts("kernel", query, bank, who, context_times)

    @torch.no_grad()
    def represent(table, who, when):
        own = model.own(model.encode(table), table, who, when).states
        return torch.cat([own, context(table, table, who, when, when)], 1)

    # Bit for bit where shapes stay; sums of 8 float32 products of size 1 where padding or batches change.
    audit = Audit(represent, context=context, n_cuts=3, n_users=2, resize_tolerance=1e-5)
    findings = audit.run(events, users, times, labels=labels)
    assert leaks_of(findings) == names, report(findings)


def test_labels_are_put_back(events, queries):
    users, times, labels = queries
    table, kept = torch.arange(9), (labels.clone(), torch.arange(9))
    Audit(Pipeline()).run(events, users, times, labels=labels, label_tables=[table])
    assert torch.equal(labels, kept[0])
    assert torch.equal(table, kept[1])


def test_findings_repeat_and_name_users(events, queries):
    users, times, labels = queries
    names = [f"customer {user}" for user in range(N_USERS)]
    runs = [
        Audit(Pipeline("inclusive ties")).run(events, users, times, labels=labels, user_names=names) for _ in range(2)
    ]
    assert [dataclasses.asdict(one) for one in runs[0]] == [dataclasses.asdict(one) for one in runs[1]]
    (finding,) = [one for one in runs[0] if one.status == "leak"]
    assert finding.example.startswith("user customer ")
    assert " at 1970-0" in finding.example
    assert runs[0][4].status == "not checked"
    assert "not separable" in runs[0][4].words


def test_a_pipeline_that_looks_at_nobody_new_is_told_so(events, queries):
    users, times, _ = queries
    findings = Audit(lambda table, who, when: who.double().unsqueeze(1)).run(events, users, times)
    assert exit_code(findings) == 0
    assert "the newest events do not matter here" in findings[3].words
    findings = Audit(lambda table, who, when: who.double().unsqueeze(1), ties="inclusive").run(events, users, times)
    assert [finding.status for finding in findings[3:5]] == ["information", "clean"]
    assert all("the newest events do not matter here" in finding.words for finding in findings[3:5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e, u, t: (e, u[:1], t[:1]), "at least 2 queries are needed, as many users as times, got 1 and 1"),
        (lambda e, u, t: (e, u + N_USERS, t), r"users of queries must lie in 0\.\.11, got 12\.\.23"),
        (lambda e, u, t: (e | {"offsets": e["offsets"] - 1}, u, t), "offsets must end at the number of events"),
    ],
)
def test_queries_that_do_not_fit(events, queries, change, message):
    with pytest.raises(ValueError, match=message):
        Audit(Pipeline()).run(*change(events, *queries[:2]))


def test_what_cannot_be_audited(events, queries):
    users, times, labels = queries
    with pytest.raises(ValueError, match="the same call gave different numbers"):
        Audit(lambda table, who, when: torch.rand(len(who), 2)).run(events, users, times)
    with pytest.raises(ValueError, match=r"represent must give \(60, k\) floats, got torch.int64 of \(60,\)"):
        Audit(lambda table, who, when: who).run(events, users, times)
    with pytest.raises(ValueError, match="labels must be as many as queries, 60, got 59"):
        Audit(Pipeline()).run(events, users, times, labels=labels[:-1])
    with pytest.raises(ValueError, match="n_cuts must be at least 1, got 0"):
        Audit(Pipeline(), n_cuts=0)
    with pytest.raises(ValueError, match="ties must be 'strict' or 'inclusive', got 'loose'"):
        Audit(Pipeline(), ties="loose")


def test_edits_change_what_they_should_and_nothing_else(events):
    random = torch.Generator().manual_seed(0)
    cut = 30 * DAY
    later = events["times"] >= cut
    rewritten = edits.rewrite(events, later, random)
    assert (rewritten["categorical"][later] != events["categorical"][later]).all()
    assert torch.equal(rewritten["categorical"][~later], events["categorical"][~later])
    assert torch.equal(rewritten["numeric"][~later], events["numeric"][~later])
    assert int(rewritten["categorical"].max()) <= int(events["categorical"].max())

    moved = edits.retime(events, later, cut, FOREVER, random)["times"]
    assert (moved[later] >= cut).all()
    assert torch.equal(moved[~later], events["times"][~later])
    rows = edits.users_of_rows(events)
    same_user = rows[1:] == rows[:-1]
    assert (moved.diff()[same_user] >= 0).all()

    mixed = edits.mix(events, later, FOREVER, random)
    assert torch.equal(mixed["numeric"][~later], events["numeric"][~later])
    assert torch.equal(mixed["numeric"].sort(0).values, events["numeric"].sort(0).values)
    assert not torch.equal(mixed["numeric"], events["numeric"])

    left = edits.keep(events, ~later)
    assert [int((rows[~later] == user).sum()) for user in range(N_USERS)] == left["offsets"].diff().tolist()
    assert int(edits.poison(events, later)["numeric"].isnan().any(1).sum()) == int(later.sum())


def test_planted_events_stand_behind_their_moment(events):
    emptied = edits.keep(events, edits.users_of_rows(events) % 3 != 0)
    time = 30 * DAY
    planted = edits.plant(emptied, time, 3, 7.0)
    for user in range(N_USERS):
        start, end = emptied["offsets"][user : user + 2].tolist()
        old = emptied["times"][start:end].tolist()
        place = sum(value <= time for value in old)
        start, end = planted["offsets"][user : user + 2].tolist()
        assert planted["times"][start:end].tolist() == [*old[:place], time, *old[place:]]
        assert planted["categorical"][start + place].tolist() == [3]
        assert planted["numeric"][start + place].tolist() == [7.0, 7.0]


def test_some_users_alone(events):
    grouped = events | {"groups": torch.arange(N_USERS) * 10}
    few = edits.only_users(grouped, torch.tensor([2, 5, 11]))
    assert few["groups"].tolist() == [20, 50, 110]
    for new, old in enumerate((2, 5, 11)):
        there = slice(*few["offsets"][new : new + 2].tolist())
        here = slice(*events["offsets"][old : old + 2].tolist())
        for name in ("categorical", "numeric", "times"):
            assert torch.equal(few[name][there], events[name][here])


def test_cross_fitting_never_reads_a_group_it_was_fitted_on():
    random = torch.Generator().manual_seed(0)
    groups = torch.arange(40).repeat_interleave(5)
    features = torch.randn(200, 3, generator=random, dtype=torch.float64)
    target = features @ torch.tensor([[1.0], [2.0], [0.0]], dtype=torch.float64)
    found = cross_fitted(features.numpy(), target.numpy(), groups.numpy())
    # A penalty of 3 against 160 fitting rows shrinks by about 2 %.
    assert abs(found - target.numpy()).max() < 0.3
    names = torch.nn.functional.one_hot(groups).double()
    memorised = cross_fitted(
        names.numpy(), torch.randn(40, 1, generator=random).double()[groups].numpy(), groups.numpy()
    )
    assert memorised.std(0) < 0.2, "a name seen in no other fold predicts nothing but the mean"
    with pytest.raises(ValueError, match=r"n_folds must lie in 2\.\.3"):
        cross_fitted(features[:3].numpy(), target[:3].numpy(), [0, 1, 2])


def test_cross_fitted_areas():
    random = torch.Generator().manual_seed(1)
    groups = torch.arange(30).repeat_interleave(4).numpy()
    labels = torch.arange(120) % 3
    told = torch.nn.functional.one_hot(labels).double() + 1e-3 * torch.randn(120, 3, generator=random).double()
    assert cross_fitted_auc(told.numpy(), labels.numpy(), groups) == 1.0
    areas = [
        cross_fitted_auc(torch.randn(120, 2, generator=random).double().numpy(), (labels == 0).long().numpy(), groups)
        for _ in range(40)
    ]
    # The standard error of one area is about 0.06 with 40 positives of 120, of the mean of 40 about 0.01.
    assert abs(sum(areas) / 40 - 0.5) < 0.04


def test_a_finding_holds_plain_values():
    finding = AuditFinding("future", "leak", 0.5, "user 1", "words")
    assert dataclasses.asdict(finding) == {
        "name": "future",
        "status": "leak",
        "worst": 0.5,
        "example": "user 1",
        "words": "words",
    }
