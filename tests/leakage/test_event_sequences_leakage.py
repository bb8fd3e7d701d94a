"""Whatever happens to events from T1 on, or to users of the test, nothing of training may change."""

import datetime

import numpy as np
import polars as pl
import pytest
import torch

from datamodules import EventSequencesDataModule
from datamodules.event_batches import ColesSlices, TailWindows
from datamodules.event_preparation import moment
from datamodules.event_targets import (
    AfterDelay,
    AmountAbove,
    AtEvents,
    CalendarDates,
    NextType,
    NoEventWithin,
    RandomTimes,
    StaticLabel,
)

T1, T2 = "2020-04-15", "2020-05-20"
LATER = pl.col("time") >= datetime.datetime.fromisoformat(T1)
FALSIFIERS = {
    "gone": lambda frame: frame.filter(~LATER | (pl.col("row") < 20)),
    "other values": lambda frame: frame.with_columns(
        amount=pl.when(LATER).then(1e6).otherwise("amount"), kind=pl.when(LATER).then(pl.lit("new")).otherwise("kind")
    ),
    "common kind": lambda frame: frame.with_columns(kind=pl.when(LATER).then(pl.lit("d")).otherwise("kind")),
    "twice": lambda frame: pl.concat([frame, frame.filter(LATER).with_columns(row=pl.col("row") + 10_000)]),
    "new users": lambda frame: frame.with_columns(user=pl.when(LATER).then(-pl.col("user")).otherwise("user")),
    "longer": lambda frame: pl.concat([frame, frame.filter(LATER).with_columns(pl.col("time").dt.offset_by("200d"))]),
}


@pytest.fixture(scope="module")
def events() -> pl.DataFrame:
    rng = np.random.default_rng(11)
    n = 1500
    hours = rng.integers(0, 180 * 24, n)
    return pl.DataFrame(
        {
            "user": rng.integers(1, 40, n),
            "time": [datetime.datetime(2020, 1, 1) + datetime.timedelta(hours=int(h)) for h in hours],
            "row": np.arange(n),
            "kind": rng.choice(["a", "b", "c", "d"], n, p=[0.5, 0.3, 0.15, 0.05]),
            "amount": rng.lognormal(size=n),
        }
    )


@pytest.fixture
def module(tmp_path):
    def make(frame, sampler, **arguments):
        path = tmp_path / "events.parquet"
        frame.write_parquet(path)
        settings = {
            "split": "time",
            "validation_start": T1,
            "test_start": T2,
            "targets": {
                "churn": NoEventWithin(CalendarDates(every_days=5), 4, max_queries_per_user=6),
                "random": NoEventWithin(RandomTimes(per_user=4), 4),
                "spend": AmountAbove(AfterDelay(20), 10, "amount", max_queries=25),
                "kind": NextType(AtEvents(), "kind", top=3),
            },
        }
        return EventSequencesDataModule(
            paths=str(path),
            user_column="user",
            time_column="time",
            order_column="row",
            categorical=["kind"],
            numeric=["amount"],
            sampler=sampler,
            batch_size=8,
            sampling_seed=3,
            cache_dir=str(tmp_path / "cache"),
            **(settings | arguments),
        )

    return make


def train_batches(data):
    """Every tensor of training but for rows of the flat table, which count users and events that come later."""
    ids = data.test_dataloader().dataset[0]["user_ids"]
    for batch in data.train_dataloader():
        shown = {name: value for name, value in batch.items() if name not in ("starts", "users")}
        yield shown, [ids[user] for user in batch["users"].tolist()]


def assert_same(left, right):
    assert len(left) == len(right) > 0
    for (batch, users), (other, other_users) in zip(left, right, strict=True):
        assert users == other_users
        assert batch.keys() == other.keys()
        for name in batch:
            assert torch.equal(batch[name], other[name]), name


SAMPLERS = {
    "slices": lambda: ColesSlices(2, 5, 9),
    "churn": lambda: TailWindows("churn", 6),
    "random": lambda: TailWindows("random", 6),
    "spend": lambda: TailWindows("spend", 6),
    "kind": lambda: TailWindows("kind", 6),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("falsifier", FALSIFIERS)
def test_training_does_not_know_the_future(module, events, sampler, falsifier):
    data = module(events, SAMPLERS[sampler]())
    expected, state, gap = list(train_batches(data)), data.state_dict(), data.median_gap
    sizes = data.vocabulary_sizes
    other = module(FALSIFIERS[falsifier](events), SAMPLERS[sampler]())
    assert_same(expected, list(train_batches(other)))
    assert other.state_dict() == state
    assert (other.median_gap, other.vocabulary_sizes) == (gap, sizes)


def test_a_change_of_the_past_is_seen(module, events):
    expected = list(train_batches(module(events, ColesSlices(2, 5, 9))))
    early = events.with_columns(
        amount=pl.when(pl.col("row") == events.filter(~LATER)["row"][0]).then(9.0).otherwise("amount")
    )
    found = list(train_batches(module(early, ColesSlices(2, 5, 9))))
    assert any(not torch.equal(a["numeric"], b["numeric"]) for (a, _), (b, _) in zip(expected, found, strict=True))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_training_tensor_reaches_t1(module, events, sampler):
    for batch, _ in train_batches(module(events, SAMPLERS[sampler]())):
        assert batch["times"].max() < moment(T1)
        if "query_times" in batch:
            assert batch["query_times"].max() < moment(T1)


def test_the_validation_batch_does_not_know_the_test(module, events):
    late = pl.col("time") >= datetime.datetime.fromisoformat(T2)
    changed = events.with_columns(amount=pl.when(late).then(-5.0).otherwise("amount"))
    data, other = module(events, None), module(changed, None)
    (batch,), (same) = list(data.val_dataloader()), next(iter(other.val_dataloader()))
    assert batch["events"]["times"].max() < moment(T2)
    for name in batch["events"]:
        assert torch.equal(batch["events"][name], same["events"][name]), name
    for target, queries in batch["queries"].items():
        assert set(queries["fold"].tolist()) <= {0, 1}
        assert queries["times"].max() < moment(T2)
        for name in ("users", "times", "labels", "fold"):
            assert torch.equal(queries[name], same["queries"][target][name])
    assert batch["train_stop"] == moment(T1)


def test_by_users_training_and_validation_do_not_know_test_users(module, events):
    by_user = {"split": "users", "validation_start": None, "test_start": None, "test_fraction": 0.3}
    data = module(events, ColesSlices(2, 5, 9), **by_user)
    whole = next(iter(data.test_dataloader()))
    ids = torch.tensor(whole["user_ids"])
    folds = dict(
        zip(whole["queries"]["churn"]["users"].tolist(), whole["queries"]["churn"]["fold"].tolist(), strict=True)
    )
    test_ids = [int(ids[user]) for user, fold in folds.items() if fold == 2]
    assert len(test_ids) >= 10
    theirs = pl.col("user").is_in(test_ids)
    changed = events.with_columns(
        amount=pl.when(theirs).then(1e6).otherwise("amount"), kind=pl.when(theirs).then(pl.lit("d")).otherwise("kind")
    )
    other = module(changed, ColesSlices(2, 5, 9), **by_user)
    assert_same(list(train_batches(data)), list(train_batches(other)))
    batch, same = next(iter(data.val_dataloader())), next(iter(other.val_dataloader()))
    for name in batch["events"]:
        assert torch.equal(batch["events"][name], same["events"][name]), name
    lengths = batch["events"]["offsets"].diff()
    assert (lengths[torch.isin(ids, torch.tensor(test_ids))] == 0).all()
    assert (lengths[batch["context_users"]] > 0).all()
    for queries in batch["queries"].values():
        assert set(queries["fold"].tolist()) == {0, 1}
        assert not np.isin(ids[queries["users"]].numpy(), test_ids).any()
    trained = {user for _, users in train_batches(data) for user in users}
    assert trained <= set(ids[batch["context_users"]].tolist())
    assert not trained & set(test_ids)


def test_a_static_label_is_used_in_one_fold_of_the_time_split(module, events, tmp_path):
    labels = pl.DataFrame({"user": range(1, 40), "label": ["x", "y", "z"] * 13})
    labels.write_csv(tmp_path / "users.csv")
    data = module(
        events,
        TailWindows("label", 6),
        users_path=str(tmp_path / "users.csv"),
        label_columns=["label"],
        validation_fraction=0.3,
        test_fraction=0.3,
        targets={"label": StaticLabel(CalendarDates(every_days=7), "label")},
    )
    queries = next(iter(data.test_dataloader()))["queries"]["label"]
    by_fold = [set(queries["users"][queries["fold"] == fold].tolist()) for fold in range(3)]
    assert all(by_fold)
    assert sum(map(len, by_fold)) == len(set.union(*by_fold))
    limits = torch.tensor([moment(T1), moment(T2)])
    assert torch.equal(queries["fold"].long(), torch.searchsorted(limits, queries["times"], right=True))


def test_labels_do_not_reach_events_that_their_fold_may_not_see(module, events):
    """The last query of a fold ends strictly before the next period; an event at T1 is in no train label."""
    data = module(events, None, targets={"churn": NoEventWithin(CalendarDates(every_days=0.25), 4)})
    queries = next(iter(data.test_dataloader()))["queries"]["churn"]
    ends = queries["times"] + 4 * 86_400_000_000
    for fold, limit in ((0, T1), (1, T2)):
        assert ends[queries["fold"] == fold].max() < moment(limit)
        # and not needlessly early: the next quarter of a day would reach the limit
        assert ends[queries["fold"] == fold].max() + 21_600_000_000 >= moment(limit)
