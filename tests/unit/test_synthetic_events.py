import numpy as np
import polars as pl
import pytest
import torch
from scipy import stats

from datamodules.synthetic_event_set import FOREVER, MICROSECONDS_PER_DAY, START
from datamodules.synthetic_events import CRISIS, SOJOURN_DAYS, cohort, null, regime

KINDS = {"regime": regime, "null": null, "cohort": cohort}


def tensors(value):
    """Every tensor of a nested batch, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value.values() for tensor in tensors(part)] if isinstance(value, dict) else []


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_one_set(kind):
    first, again, other = (tensors(KINDS[kind](seed, n_users=40, n_days=8).batch()) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first[:3], other[:3], strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("new_regimes_at", [None, 0.7])
def test_batch_is_as_agreed(kind, new_regimes_at):
    drawn = KINDS[kind](0, n_users=50, n_days=20, new_regimes_at=new_regimes_at)
    batch = drawn.batch()
    events, offsets = batch["events"], batch["events"]["offsets"]
    n = len(drawn.times)
    assert events["categorical"].shape == events["numeric"].shape == (n, 1)
    assert events["categorical"].dtype == events["times"].dtype == offsets.dtype == torch.int64
    assert events["numeric"].dtype == torch.float32
    assert events["categorical"].min() >= 2
    assert events["categorical"].max() < drawn.facts()["vocabulary_sizes"][0]
    assert len(batch["category_names"]) == drawn.facts()["vocabulary_sizes"][0]
    assert offsets.tolist() == [0, *np.cumsum(np.bincount(drawn.event_users, minlength=50)).tolist()]
    assert all((np.diff(drawn.times[a:b]) >= 0).all() for a, b in zip(drawn.offsets, drawn.offsets[1:], strict=False))
    assert START <= events["times"].min() <= events["times"].max() < drawn.stop
    assert set(batch["queries"]) == {"next_type", "local", "global"}
    for query in batch["queries"].values():
        assert query["users"].dtype == query["times"].dtype == query["labels"].dtype == torch.int64
        assert query["fold"].dtype == torch.int8
        assert 0 <= query["labels"].min() <= query["labels"].max() < query["n_classes"]
        assert set(query["fold"].tolist()) == {0, 1, 2}
        assert not query["outcome_dependent"]
    assert batch["split"] == ("users" if new_regimes_at is None else "time")


def test_split_of_users_keeps_them_apart_and_normalises_on_train():
    drawn = regime(1, n_users=200, n_days=10)
    batch = drawn.batch()
    for query in drawn.queries.values():
        np.testing.assert_array_equal(query["fold"], drawn.user_folds[query["users"]])
    assert np.bincount(drawn.user_folds).tolist() == [100, 20, 80]
    assert batch["train_stop"] == FOREVER
    assert batch["context_users"].tolist() == np.flatnonzero(drawn.user_folds == 0).tolist()
    train = batch["events"]["numeric"][drawn.user_folds[drawn.event_users] == 0].double()
    # float32 rounding of about 3,000 values of order 1
    assert train.mean().item() == pytest.approx(0, abs=1e-6)
    assert train.std(unbiased=False).item() == pytest.approx(1, abs=1e-6)


def test_split_of_time_uses_nothing_later():
    drawn = regime(1, n_users=200, n_days=10, new_regimes_at=0.5)
    batch = drawn.batch()
    validation_stop = START + 5 * MICROSECONDS_PER_DAY
    assert drawn.train_stop == START + 4.5 * MICROSECONDS_PER_DAY
    assert len(batch["context_users"]) == 200
    for target in ("local", "next_type"):
        times, fold = drawn.queries[target]["times"], drawn.queries[target]["fold"]
        np.testing.assert_array_equal(fold == 0, times < drawn.train_stop)
        np.testing.assert_array_equal(fold == 2, times >= validation_stop)
    static = drawn.queries["global"]
    np.testing.assert_array_equal(static["fold"], drawn.user_folds)
    assert static["times"][static["fold"] == 0].max() <= drawn.train_stop
    assert static["times"][static["fold"] == 1].max() <= validation_stop
    train = batch["events"]["numeric"][batch["events"]["times"] < drawn.train_stop].double()
    # float32 rounding
    assert train.mean().item() == pytest.approx(0, abs=1e-6)
    same_user = np.diff(drawn.event_users) == 0
    early = drawn.times[1:] < drawn.train_stop
    gaps = np.diff(drawn.times)[same_user & early] / MICROSECONDS_PER_DAY
    assert drawn.facts()["median_gap"] == np.median(gaps)


@pytest.mark.parametrize("kind", KINDS)
def test_events_have_the_rates_and_types_of_the_model(kind):
    drawn = KINDS[kind](2, n_users=800, n_days=40)
    model = drawn.model
    lengths = np.diff(np.append(drawn.change_times, drawn.stop)) / MICROSECONDS_PER_DAY
    now = drawn.regimes_at(drawn.times)[np.arange(len(drawn.times)), model.chains[drawn.classes[drawn.event_users]]]
    scores, weights = [], []
    for z in range(len(model.class_prior)):
        path = drawn.regimes[:, model.chains[z]]
        users = (drawn.classes == z).sum()
        for r in range(len(model.initial)):
            here = (drawn.classes[drawn.event_users] == z) & (now == r)
            expected = users * model.rates[z, r] * lengths[path == r].sum()
            if expected == 0:
                assert not here.any()
                continue
            scores.append((here.sum() - expected) / np.sqrt(expected))
            if here.sum() > 500:
                counts = np.bincount(drawn.types[here], minlength=len(drawn.type_names))
                cells = model.type_probabilities[z, r] > 0
                assert counts[~cells].sum() == 0
                expected_counts = here.sum() * model.type_probabilities[z, r, cells]
                weights.append(stats.chisquare(counts[cells], expected_counts).pvalue)
    # Poisson counts: of at most 32 standard scores none is beyond 4.5 but once in 4,000 draws
    assert np.abs(scores).max() < 4.5
    # at most 32 tests; the draw is fixed
    assert min(weights) > 1e-4


def test_chain_stays_as_long_as_stated():
    stays = {state: [] for state in range(3)}
    for seed in range(40):
        drawn = regime(seed, n_users=10, n_days=200, events_per_day=0.01, labels_per_day=0.01)
        for state, length in zip(drawn.regimes[:-1, 0], np.diff(drawn.change_times), strict=True):
            stays[state].append(length / MICROSECONDS_PER_DAY)
        assert (np.diff(drawn.regimes[:, 0]) != 0).all()
    for state, expected in enumerate(SOJOURN_DAYS):
        # exponential stays: s.d. of the mean is expected / sqrt(n); cutting the last stay of 200 days biases by 3 %
        assert np.mean(stays[state]) == pytest.approx(expected, rel=4 / np.sqrt(len(stays[state])) + 0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_local_labels_follow_their_law(kind):
    drawn = KINDS[kind](5, n_users=400, n_days=40)
    query, model = drawn.queries["local"], drawn.model
    classes = drawn.classes[query["users"]]
    now = drawn.regimes_at(query["times"])[np.arange(len(classes)), model.chains[classes]]
    for logit in np.unique(model.local_logits):
        rows = model.local_logits[classes, now] == logit
        p = 1 / (1 + np.exp(-logit))
        if rows.any():
            # binomial, 4.5 s.d.
            assert query["labels"][rows].mean() == pytest.approx(p, abs=4.5 * np.sqrt(p * (1 - p) / rows.sum()))


def test_null_never_leaves_the_crisis():
    drawn = null(0, n_users=20, n_days=5)
    assert drawn.regimes.tolist() == [[CRISIS]]
    assert drawn.change_times.tolist() == [START]


@pytest.mark.parametrize("options", [{}, {"new_regimes_at": 0.6}])
def test_preset_has_enough_test_queries_of_sparse_users(options):
    for seed in range(5):
        drawn = regime(seed, **options)
        query = drawn.queries["local"]
        assert ((query["fold"] == 2) & drawn.sparse[query["users"]]).sum() >= 20_000


def test_own_history_is_strictly_before_the_query():
    drawn = regime(0, n_users=30, n_days=10)
    rng = np.random.default_rng(0)
    users = rng.integers(30, size=300)
    times = np.where(
        rng.random(300) < 0.5,
        drawn.times[rng.integers(len(drawn.times), size=300)],
        drawn.queries["local"]["times"][:300],
    )
    times[:2] = START, drawn.stop
    expected = [
        drawn.offsets[u] + (drawn.times[drawn.offsets[u] : drawn.offsets[u + 1]] < t).sum()
        for u, t in zip(users, times, strict=True)
    ]
    assert drawn.history_stops(users, times).tolist() == expected
    query = drawn.queries["next_type"]
    rows = drawn.history_stops(query["users"], query["times"])
    np.testing.assert_array_equal(drawn.types[rows], query["labels"])
    np.testing.assert_array_equal(drawn.times[rows], query["times"])


def test_cohort_mean_over_all_tells_nothing_and_over_the_own_group_does():
    """The state of a user is the one-hot type of the last event; a local query asks for the mean share of ``loud``."""
    drawn = cohort(0, n_users=1500, n_days=40)
    query = drawn.queries["local"]
    rows = np.flatnonzero(query["times"] > START + 5 * MICROSECONDS_PER_DAY)[::40]
    users, times, labels = (query[name][rows] for name in ("users", "times", "labels"))
    everyone, groups = np.arange(drawn.n_users), drawn.groups
    assert np.bincount(groups).min() > 0
    np.testing.assert_array_equal(drawn.regimes[:, ::2], 1 - drawn.regimes[:, 1::2])
    scores = np.empty((2, len(rows)))
    for place, (user, time) in enumerate(zip(users, times, strict=True)):
        stops = drawn.history_stops(everyone, np.full(drawn.n_users, time))
        seen = (stops > drawn.offsets[:-1]) & (everyone != user) & ~drawn.sparse
        last = drawn.types[stops - 1]
        for kind, chosen in enumerate((seen, seen & (groups == groups[user]))):
            scores[kind, place] = (last[chosen] == 9).sum() / (last[chosen] >= 8).sum()
    ranks = stats.rankdata(scores, axis=1)
    positive = labels == 1
    n = positive.sum()
    auc = (ranks[:, positive].sum(1) - n * (n + 1) / 2) / (n * (~positive).sum())
    # about 2,000 labels, s.d. of an AUC 0.013; a mean of 650 users fluctuates with the sizes of the pairs of groups
    assert abs(auc[0] - 0.5) < 0.06
    # the best possible, from the true regime, is 0.817: two Bernoulli laws of 0.18 and 0.82
    assert auc[1] > 0.75


def test_written_files_hold_the_set(tmp_path):
    drawn = regime(0, n_users=30, n_days=6)
    files = drawn.write(tmp_path / "new")
    events, users, queries = (pl.read_parquet(files[name]) for name in ("events", "users", "queries"))
    assert events.schema["time"] == pl.Datetime("us")
    assert events.columns == ["user", "time", "event_type", "amount"]
    np.testing.assert_array_equal(events["time"].cast(pl.Int64).to_numpy(), drawn.times)
    assert events["event_type"].to_list() == [drawn.type_names[k] for k in drawn.types]
    assert events["user"].to_list() == [drawn.user_ids[u] for u in drawn.event_users]
    np.testing.assert_array_equal(users["group"].to_numpy(), drawn.groups)
    assert users["fold"].to_list() == [("train", "validation", "test")[fold] for fold in drawn.user_folds]
    local = queries.filter(pl.col("target") == "local")
    np.testing.assert_array_equal(local["label"].to_numpy(), drawn.queries["local"]["labels"])
    np.testing.assert_array_equal(local["time"].cast(pl.Int64).to_numpy(), drawn.queries["local"]["times"])


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("n_users", 9),
        ("n_days", 0),
        ("n_days", float("nan")),
        ("events_per_day", -1),
        ("labels_per_day", 0),
        ("new_regimes_at", 1),
        ("n_groups", 3),
        ("n_groups", 0),
    ],
)
def test_arguments_out_of_range_are_named(argument, value):
    with pytest.raises(ValueError, match=rf"^{argument} must be .*got {value}$"):
        cohort(0, **{argument: value})
