"""Slices, windows and tails of validation, row by row."""

import pytest
import torch

from lightning_modules.context.fixed_sequences import (
    even_slices,
    sliding_windows,
    tail_windows,
    validation_sequences,
)
from lightning_modules.losses import CoLES, NextEvent, Supervised


def events_of(lengths):
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    n = int(offsets[-1])
    times = torch.cat([torch.arange(length) * 10 + user for user, length in enumerate(lengths)])
    return {
        "categorical": torch.arange(n).unsqueeze(1) + 2,
        "numeric": torch.arange(n).unsqueeze(1).float(),
        "times": times.long(),
        "offsets": offsets,
    }


def valid_rows(batch):
    return [row[mask].tolist() for row, mask in zip(batch["numeric"][..., 0], batch["mask"], strict=True)]


def test_even_slices_are_spread_over_the_history():
    events = events_of([11, 1, 3])
    batch = even_slices(events, torch.tensor([0, 1, 2]), start=-1, n_slices=3, length=5)
    assert valid_rows(batch) == [
        *([0, 1, 2, 3, 4], [3, 4, 5, 6, 7], [6, 7, 8, 9, 10]),  # user 1 has one event
        *([12, 13, 14],) * 3,
    ]
    assert batch["users"].tolist() == [0, 0, 0, 2, 2, 2]
    assert batch["starts"].tolist() == [0, 3, 6, 12, 12, 12]


def test_windows_are_anchored_at_the_tail():
    events = events_of([10, 2, 1])
    batch = sliding_windows(events, torch.arange(3), start=-1, length=4, step=3)
    assert valid_rows(batch) == [[6, 7, 8, 9], [3, 4, 5, 6], [0, 1, 2, 3], [10, 11]]


@pytest.mark.parametrize("cut", [even_slices, sliding_windows])
def test_events_before_the_start_are_left_out(cut):
    events = events_of([10, 4])
    batch = cut(events, torch.arange(2), start=50)
    assert int(batch["times"][batch["mask"]].min()) == 50
    assert set(batch["users"].tolist()) == {0}


@pytest.mark.parametrize("cut", [even_slices, sliding_windows])
def test_nobody_left_gives_nothing(cut):
    assert cut(events_of([3, 3]), torch.arange(2), start=1000) == {}


def test_padding_is_zero():
    batch = even_slices(events_of([5, 2]), torch.arange(2), start=-1, n_slices=1, length=5)
    padded = ~batch["mask"]
    assert padded.any()
    assert not batch["categorical"][padded].any()
    assert not batch["times"][padded].any()


def asked(users, times, labels=None):
    labels = torch.arange(len(users)) if labels is None else labels
    return {"users": torch.tensor(users), "times": torch.tensor(times), "labels": labels}


def test_tails_end_strictly_before_their_query():
    events = events_of([5, 3])  # user 0 at 0, 10, .., 40; user 1 at 1, 11, 21
    batch = tail_windows(events, asked([0, 0, 1, 1, 0], [30, 31, 21, 1, 1000]), length=3)
    assert valid_rows(batch) == [[0, 1, 2], [1, 2, 3], [5, 6], [2, 3, 4]], "the fourth has no history"
    assert batch["query_times"].tolist() == [30, 31, 21, 1000]
    assert batch["labels"].tolist() == [0, 1, 2, 4]
    assert batch["users"].tolist() == [0, 0, 1, 0]
    assert batch["starts"].tolist() == [0, 1, 5, 2]
    assert tail_windows(events, asked([1], [1])) == {}


FACTS = {"d": 4, "vocabulary_sizes": [30], "n_numeric": 1}


def validation(lengths, *, split="users", context=(0, 1), train_stop=2**63 - 1, queries=None):
    return {
        "events": events_of(lengths),
        "queries": queries or {},
        "context_users": torch.tensor(context),
        "train_stop": train_stop,
        "split": split,
    }


def test_validation_is_of_users_outside_of_the_context():
    batch = validation([6, 5, 7, 0, 1, 9])
    for objective in (CoLES(**FACTS), NextEvent(**FACTS)):
        assert set(validation_sequences(batch, objective)["users"].tolist()) == {2, 5}
    assert len(validation_sequences(batch, CoLES(**FACTS))["users"]) == 10, "five slices a user"
    one = validation_sequences(batch, CoLES(**FACTS), max_users=1)["users"].unique()
    assert len(one) == 1
    assert torch.equal(one, validation_sequences(batch, CoLES(**FACTS), max_users=1)["users"].unique())


def test_validation_by_time_begins_after_training():
    batch = validation([6, 5, 3], split="time", context=(0, 1, 2), train_stop=30)
    for objective in (CoLES(**FACTS), NextEvent(**FACTS)):
        found = validation_sequences(batch, objective)
        assert int(found["times"][found["mask"]].min()) >= 30
        assert set(found["users"].tolist()) == {0, 1}, "the third user has no event left"


def test_windows_of_validation_lie_in_an_order_of_their_own():
    batch = validation([0, 0, *[40] * 8])
    found = validation_sequences(batch, NextEvent(**FACTS), max_length=4)
    assert found["mask"].shape[1] == 4
    assert len(set(found["users"][:8].tolist())) > 3, "the first are not those of one user"
    again = validation_sequences(batch, NextEvent(**FACTS), max_length=4)
    assert all(torch.equal(value, again[name]) for name, value in found.items())


def test_supervised_validation_is_that_of_a_target():
    fold = torch.tensor([0, 1, 1, 2], dtype=torch.int8)
    queries = {"a": asked([0, 1, 2, 2], [30, 30, 32, 40]) | {"fold": fold}}
    batch = validation([6, 5, 7], queries=queries)
    found = validation_sequences(batch, Supervised(**FACTS), max_length=2)
    assert valid_rows(found) == [[7, 8], [12, 13]]  # of user 2 those before 32, at which it has an event
    assert found["labels"].tolist() == [1, 2]
    several = batch | {"queries": queries | {"b": asked([0], [50]) | {"fold": fold[1:2]}}}
    with pytest.raises(ValueError, match=r"evaluation\.supervised must name the target of the sampler, there are a, b"):
        validation_sequences(several, Supervised(**FACTS))
    assert validation_sequences(several, Supervised(**FACTS), supervised="b")["labels"].tolist() == [0]


@pytest.mark.parametrize("objective", [CoLES, NextEvent, Supervised])
def test_nobody_to_validate_on(objective):
    queries = {"a": asked([1], [0]) | {"fold": torch.ones(1, dtype=torch.int8)}}
    with pytest.raises(ValueError, match="no validation user has two events"):
        validation_sequences(validation([6, 5, 1], queries=queries), objective(**FACTS))
