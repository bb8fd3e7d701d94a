"""From a model to a study: every arm's features, where a query stands, and what is exported."""

import logging
from functools import partial

import pytest
import torch

from datamodules.synthetic_events import regime
from lightning_modules.context import (
    Adding,
    Concat,
    ContextRules,
    EnrichedEncoder,
    Evaluation,
    ExpHawkes,
    Gated,
    KernelAttention,
    LearnableHawkes,
    LinearProbe,
    Max,
    Mean,
    Residual,
    evaluate,
)
from lightning_modules.context.controls import (
    arm_names,
    calendar_basis,
    clock_rates,
    gaussian_like,
    shuffled_times,
    time_knots,
)
from lightning_modules.context.evaluation import Encoded, exported, own_dates
from lightning_modules.context.findings import findings
from lightning_modules.losses import NextEvent
from lightning_modules.networks import EventEncoder, RecurrentEncoder
from lightning_modules.networks.event_encoders import EventEmbedding

DAY = 86_400_000_000
FACTS = {"vocabulary_sizes": [14], "n_numeric": 1}


class Recorded:
    """A probe that keeps what it was fitted on and answers with the share of class 1."""

    def __init__(self):
        self.calls = []

    def fit_predict(self, train, train_labels, validation, validation_labels, test, *, n_classes, seed):
        self.calls.append((train, train_labels, validation, validation_labels, test))
        shares = torch.bincount(train_labels, minlength=n_classes).double() / len(train_labels)
        return shares.expand(len(validation), -1), shares.expand(len(test), -1)


@pytest.fixture(scope="module")
def batch():
    drawn = regime(0, n_users=30, n_days=30, events_per_day=1.0, labels_per_day=0.3).batch()
    return drawn | {"queries": {name: drawn["queries"][name] for name in ("local", "next_type")}}


def enriched(aggregators, tune=False, combination=Concat, **rules):
    torch.manual_seed(0)
    return EnrichedEncoder(
        RecurrentEncoder(d_model=6, d_embedding=3, **FACTS),
        aggregators,
        combination=combination,
        objective=NextEvent,
        median_gap=1.0,
        rules=ContextRules(**rules),
        tune=tune,
        **FACTS,
    ).eval()


def study_of(model, batch, wide=None, **settings):
    probe = Recorded()
    arms = settings.pop("arms", None)
    found = evaluate(model, batch, Evaluation(probe=probe, **settings), wide=wide, seed=3)
    names = list(found.targets[0].test)
    assert arms is None or names == list(arms)
    return found, dict(zip(names, probe.calls, strict=False))


def test_the_features_of_every_arm_are_what_its_name_says(batch):
    model = enriched({"mean": Mean, "kernel": KernelAttention})
    wide = RecurrentEncoder(d_model=12, d_embedding=3, **FACTS).eval()
    study, calls = study_of(model, batch, wide, arms=arm_names(["mean", "kernel"], wide=True))
    queries = batch["queries"]["local"]
    users, times, fold = queries["users"], queries["times"], queries["fold"]
    encoded = Encoded(model, batch["events"], batch["context_users"])
    own = encoded.own("kernel", users, times)
    calendar, n_events, recency = own_dates(batch["events"], own, users, times, int(times[fold == 0].min()))
    rates = clock_rates(times, users, queries["labels"], fold == 0, 2, seed=3)
    calendar = torch.cat([calendar, calendar_basis(times, time_knots(times[fold == 0])), rates], 1)
    kernel = encoded.context("kernel", own.states, users, times)
    elsewhen = encoded.context("mean", own.states, users, shuffled_times(times, fold, 3))
    with torch.no_grad():
        expected = {
            "own": own.states,
            "own+time": torch.cat([own.states, calendar], 1),
            "kernel": torch.cat([own.states, kernel], 1),
            "kernel+time": torch.cat([own.states, calendar, kernel], 1),
            "shuffled:mean": torch.cat([own.states, elsewhen], 1),
            "shuffled+time:mean": torch.cat([own.states, calendar, elsewhen], 1),
        }
    for arm, features in expected.items():
        train, train_labels, validation, validation_labels, test = calls[arm]
        for part, number in ((train, 0), (validation, 1), (test, 2)):
            assert torch.equal(part, features[fold == number]), arm
        assert torch.equal(train_labels, queries["labels"][fold == 0])
        assert torch.equal(validation_labels, queries["labels"][fold == 1])
    assert calls["wide"][0].shape[1] == 12
    assert calls["constant"][0][:, 6:].unique(dim=0).shape[0] == 1
    noise = calls["gaussian"][0][:, 6:]
    assert noise.unique(dim=0).shape[0] == len(noise)
    target = study.targets[0]
    assert torch.equal(target.labels, queries["labels"][fold == 2])
    assert torch.equal(target.n_events, n_events[fold == 2])
    torch.testing.assert_close(target.recency, recency[fold == 2], equal_nan=True, rtol=0, atol=0)
    assert [one.name for one in study.targets] == ["local", "next_type"]
    assert (target.probe, study.seed, study.split) == ("Recorded", 3, "users")
    assert study.bank["n_users"] == len(batch["context_users"])


@pytest.mark.parametrize("tune", [False, True])
@pytest.mark.parametrize("combination", [Gated, Residual, Adding])
def test_probes_read_what_is_exported(batch, combination, tune):
    few = {"n_users": 3, "max_age_days": 0.3}  # of whom some queries see nobody
    model = enriched({"mean": Mean, "kernel": KernelAttention}, tune=tune, combination=combination, **few)
    with torch.no_grad():
        for number, name in enumerate(model.branches):
            model.encoder_of(name).start.fill_(0.3 * number)
    _, calls = study_of(model, batch)
    queries = batch["queries"]["local"]
    users, times, fold = queries["users"], queries["times"], queries["fold"]
    encoded = Encoded(model, batch["events"], batch["context_users"])
    own = {name: encoded.own(name, users, times).states for name in ("own", "mean", "kernel")}
    context = {name: encoded.context(name, own[name], users, times) for name in ("mean", "kernel")}
    elsewhen = encoded.context("kernel", own["kernel"], users, shuffled_times(times, fold, 3))
    flagged = torch.cat([of[:, model.encoder.d_model :] for of in (context["mean"], context["kernel"], elsewhen)], 1)
    assert flagged.shape[1] == 3
    assert all(0 < int(column.sum()) < int((fold == 0).sum()) for column in flagged[fold == 0].T)
    trained = context["mean"][fold == 0, :-1]
    with torch.no_grad():
        of = {name: partial(model.combined, name) for name in context}
        plain = {name: model.branch(name).combination for name in context}
        for name, vectors in context.items():
            expected = torch.cat([plain[name](own[name], vectors[:, :-1]), vectors[:, -1:]], 1)
            assert torch.equal(of[name](own[name], vectors), expected), name
        expected = {
            "own": own["own"],
            "mean": of["mean"](own["mean"], context["mean"]),
            "kernel": of["kernel"](own["kernel"], context["kernel"]),
            "kernel+time": of["kernel"](own["kernel"], context["kernel"]),
            "shuffled:kernel": of["kernel"](own["kernel"], elsewhen),
            "shuffled+time:kernel": of["kernel"](own["kernel"], elsewhen),
            "gaussian": of["mean"](own["mean"], gaussian_like(trained, len(users), 3)),
            "constant": of["mean"](own["mean"], trained.mean(0).expand(len(users), -1)),
        }
    n_time = calls["own+time"][0].shape[1] - 6
    for arm, features in expected.items():
        n = 6 + (arm not in ("own", "gaussian", "constant"))  # with the flag of an empty context
        assert torch.equal(calls[arm][0][:, :n], features[fold == 0]), arm
        assert torch.equal(calls[arm][4][:, :n], features[fold == 2]), arm
        assert calls[arm][0].shape[1] == n + n_time * ("+time" in arm), arm
        if "+time" in arm:
            assert torch.equal(calls[arm][0][:, n:], calls["own+time"][0][:, 6:])
    exports = exported(model, batch, Evaluation(explained="kernel"))
    # float32 products of 12 numbers below 1, in an order that depends on how many queries are asked together
    torch.testing.assert_close(exports.embedding, calls["kernel"][4], rtol=0, atol=1e-6)


def test_test_queries_that_see_nobody_are_warned_of_where_a_probe_hardly_met_any(batch, caplog):
    """By a flag that is 1 on the test alone a probe may say anything."""
    local = batch["queries"]["local"]
    before = int(batch["events"]["times"].min()) - 1
    times = torch.where(local["fold"] == 2, before, local["times"].clamp(min=before + 10 * 86_400_000_000))
    late = batch | {"queries": {"local": local | {"times": times}}}
    model = enriched({"mean": Mean})
    for asked, warns in ((late, True), (batch, False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="lightning_modules"):
            study, _ = study_of(model, asked, gaussian=False, constant=False)
        assert ("target 'local': 100.0 % of the test queries see nobody" in caplog.text) == warns
        shares = study.bank["share_without_context"]["local"]
        assert list(shares) == ["train", "validation", "test"]
        assert shares["test"] == float(warns)
    unflagged, _ = study_of(enriched({"mean": Mean}, empty_flag=False), batch, gaussian=False, constant=False)
    assert "share_without_context" not in unflagged.bank


def test_arms_that_are_not_wanted_are_left_out(batch):
    model = enriched({"mean": Mean, "kernel": KernelAttention})
    study, _ = study_of(model, batch, shuffled=["kernel"], gaussian=False, constant=False)
    names = ["own", "own+time", "shuffled:kernel", "shuffled+time:kernel", "mean", "mean+time", "kernel", "kernel+time"]
    assert list(study.targets[0].test) == names


@pytest.mark.parametrize("fold", [0, 2])
def test_of_queries_at_one_moment_nothing_is_shuffled(batch, fold):
    """The shuffled context would be the context itself: a control that nothing could beat."""
    model, local = enriched({"mean": Mean}), batch["queries"]["local"]
    times = torch.where(local["fold"] == fold, local["times"].max(), local["times"])
    queries = batch["queries"] | {"local": local | {"times": times}}
    study, _ = study_of(model, batch | {"queries": queries}, gaussian=False, constant=False)
    assert list(study.targets[0].test) == ["own", "own+time", "mean", "mean+time"]
    assert "shuffled:mean" in study.targets[1].test, "of other queries it is"


def test_a_target_may_have_its_own_probe(batch):
    model, special = enriched({"mean": Mean}), Recorded()
    evaluation = Evaluation(probe=LinearProbe(n_epochs=1), probes={"next_type": special})
    study = evaluate(model, batch, evaluation)
    assert [one.probe for one in study.targets] == ["LinearProbe", "Recorded"]
    assert len(special.calls) == len(study.targets[1].test)


def test_tuned_branches_are_read_by_their_own_encoders(batch):
    model = enriched({"mean": Mean, "kernel": KernelAttention}, tune=True)
    with torch.no_grad():
        for number, name in enumerate(model.branches):
            model.encoder_of(name).start.fill_(0.3 * number)
    _, calls = study_of(model, batch)
    queries = batch["queries"]["local"]
    train = queries["fold"] == 0
    users, times = queries["users"], queries["times"]
    for arm, name in (("own", "own"), ("mean", "mean"), ("kernel", "kernel"), ("shuffled:kernel", "kernel")):
        states = model.encode(batch["events"], name)
        own = model.own(states, batch["events"], users, times, name).states
        assert torch.equal(calls[arm][0][:, :6], own[train]), arm
    assert not torch.equal(calls["own"][0], calls["mean"][0][:, :6])


def test_dates_of_the_own_history(batch):
    model, events = enriched({"mean": Mean}), batch["events"]
    user = int(events["offsets"].diff().argmax())
    first = int(events["offsets"][user])
    times = torch.stack([events["times"][first], events["times"][first + 2], events["times"][first + 2] + 1])
    users = torch.full((3,), user)
    own = model.own(model.encode(events), events, users, times)
    features, n_events, recency = own_dates(events, own, users, times, int(times[0]))
    assert n_events.tolist() == [0, 2, 3], "strictly before"
    assert recency[0].isnan()
    gap = float(events["times"][first + 2] - events["times"][first + 1]) / DAY
    assert recency[1:].tolist() == pytest.approx([gap, 1 / DAY])
    assert features.shape == (3, 10)
    assert features.isfinite().all()


def test_where_an_aggregator_looks_is_told_in_the_order_of_the_queries(batch):
    model = enriched({"max": Max, "mean": Mean, "decayed": partial(ExpHawkes, theta=3.0)}, n_users=8)
    study, _ = study_of(model, batch)
    assert study.attention.aggregator == "mean", "the first that has weights"
    queries = batch["queries"]["local"]
    tested = queries["fold"] == 2
    users, times = queries["users"][tested], queries["times"][tested]
    bank = model.bank(model.encode(batch["events"]), batch["events"], batch["context_users"])
    visible = bank.context(times, users, "gathered").visible.sum(1)
    assert torch.equal(study.attention.n_visible, visible)
    seen = visible > 0
    # a mean weighs all alike; float32 weights
    torch.testing.assert_close(study.attention.effective_number[seen], visible[seen].float(), rtol=1e-5, atol=0)
    explained, _ = study_of(model, batch, explained="decayed", n_influencers=2)
    assert explained.attention.aggregator == explained.embeddings.aggregator == "decayed"
    assert explained.attention.top_users.shape == (len(users), 2)
    none, _ = study_of(model, batch, explained="max")
    assert none.attention is None
    assert none.embeddings.aggregator == "max"
    only, _ = study_of(enriched({"max": Max}), batch)
    assert only.attention is None


def test_a_kernel_of_time_that_is_negative_still_has_shares(batch):
    model = enriched({"learned": partial(LearnableHawkes, hidden=(4,))})
    with torch.no_grad():
        for layer in model.branch("learned").aggregator.kernel_of_time.layers:
            layer.weight.neg_()
            layer.bias.fill_(-0.1)
    study, _ = study_of(model, batch)
    shares = study.attention.top_weights
    assert bool((shares >= 0).all())


@pytest.mark.parametrize("name", ["kernel", "max"])
def test_what_is_exported(batch, name):
    model = enriched({"kernel": KernelAttention, "max": Max})
    found = exported(model, batch, Evaluation(explained=name, n_influencers=3))
    queries = batch["queries"]["local"]
    tested = queries["fold"] == 2
    assert found.target == "local"
    assert found.n_users == len(batch["user_ids"]) > len(set(found.user_ids))
    assert torch.equal(found.times, queries["times"][tested])
    assert found.user_ids == [batch["user_ids"][user] for user in queries["users"][tested].tolist()]
    assert torch.equal(found.embedding, torch.cat([found.own, found.context], 1))
    context = {batch["user_ids"][user] for user in batch["context_users"].tolist()}
    assert len(found.top_users) == len(found.times)
    if name == "max":
        assert found.top_weights is None
        assert not any(found.top_users)
        return
    assert any(found.top_users)
    for user, seen, shares in zip(found.user_ids, found.top_users, found.top_weights.tolist(), strict=True):
        assert set(seen) <= context - {user}
        assert shares == sorted(shares, reverse=True)
        assert sum(share > 0 for share in shares) == len(seen) <= 3


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"explained": "other"}, {}, r"evaluation\.explained names 'other', there are mean"),
        ({"shuffled": ["other"]}, {}, r"evaluation\.shuffled names 'other', there are mean"),
        ({"probes": {"other": Recorded()}}, {}, r"evaluation\.probes names 'other', there are local, next_type"),
        ({}, {"queries": {}}, "a test asks targets, the data has none"),
    ],
)
def test_what_is_named_must_be_there(batch, settings, change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(enriched({"mean": Mean}), batch | change, Evaluation(**settings))


@pytest.mark.parametrize("fold", [0, 1, 2])
def test_a_target_without_queries_in_a_fold_is_refused(batch, fold):
    asked = batch["queries"]["local"]
    kept = {key: value[asked["fold"] != fold] if torch.is_tensor(value) else value for key, value in asked.items()}
    name = ("train", "validation", "test")[fold]
    with pytest.raises(ValueError, match=f"target 'local' needs queries in each fold, got .*'{name}': 0"):
        evaluate(enriched({"mean": Mean}), batch | {"queries": {"local": kept}}, Evaluation())


def test_exports_without_targets_or_aggregators_are_refused(batch):
    model = enriched({"mean": Mean})
    with pytest.raises(ValueError, match="the data has no targets"):
        exported(model, batch | {"queries": {}}, Evaluation())
    with pytest.raises(ValueError, match=r"evaluation\.explained names 'kernel', there are mean"):
        exported(model, batch, Evaluation(explained="kernel"))


class LastType(EventEncoder):
    """One-hot type of the last event."""

    def __init__(self, *, vocabulary_sizes, n_numeric):
        super().__init__(EventEmbedding(vocabulary_sizes, n_numeric, d_embedding=2), d_model=vocabulary_sizes[0])

    def advance(self, batch, memory):
        return torch.nn.functional.one_hot(batch["categorical"][..., 0], self.d_model).float(), memory

    def unroll(self, vectors, memory):
        raise NotImplementedError

    def initial_state(self):
        return torch.zeros(self.d_model)


@pytest.mark.parametrize("split", ["users", "time"])
def test_a_clock_that_swings_between_the_knots_is_no_help_of_others(split):
    """Labels and everybody's events are a function of the date, of which there are many more than knots."""
    generator = torch.Generator().manual_seed(0)
    n_users, n_days = 150, 600
    state = torch.randint(2, (n_days // 8,), generator=generator).repeat_interleave(8)
    speaks, asked = (torch.rand(n_users, n_days, generator=generator) < 0.08 for _ in range(2))
    (_, days), (users, asked_days) = (one.nonzero(as_tuple=True) for one in (speaks, asked))
    events = {
        "categorical": 2 + state[days][:, None],
        "numeric": torch.zeros(len(days), 1),
        "times": (days + 1) * DAY,
        "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), speaks.sum(1).cumsum(0)]),
    }
    fold = torch.tensor([0] * 90 + [1] * 20 + [2] * 40)[users].to(torch.int8)
    if split == "time":
        fold = (asked_days // (n_days // 3)).clamp(max=2).to(torch.int8)
    query = {
        "users": users,
        "times": (asked_days + 1) * DAY + DAY // 2,
        "labels": state[asked_days],
        "fold": fold,
        "n_classes": 2,
        "scope": "local",
        "outcome_dependent": False,
        "description": "a clock",
    }
    batch = {
        "events": events,
        "user_ids": list(range(n_users)),
        "queries": {"clock": query},
        "context_users": torch.arange(90),
        "train_stop": 2**63 - 1,
        "split": split,
    }
    model = EnrichedEncoder(
        LastType(vocabulary_sizes=[4], n_numeric=1),
        {"mean": Mean},
        combination=Concat,
        objective=NextEvent,
        median_gap=1.0,
        rules=ContextRules(n_users=None),
        vocabulary_sizes=[4],
        n_numeric=1,
    ).eval()
    study = evaluate(model, batch, Evaluation(gaussian=False, constant=False), seed=0)
    found = findings(study, n_resamples=100)["targets"]["clock"]
    told = {arm: row["measures"]["roc_auc"][0] for arm, row in found["arms"].items()}
    assert told["mean"] > told["own"] + 0.1, "the mean of others tells the date"
    if split == "users":
        assert told["own+time"] > 0.99
        assert not found["helps"]
    else:  # nothing of these dates is known but by others
        assert told["own+time"] < told["mean+time"] - 0.05
        assert found["helps"]
