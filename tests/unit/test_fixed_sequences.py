"""Slices and windows of validation against plain loops."""

import pytest
import torch

from lightning_modules.context.fixed_sequences import even_slices, sliding_windows


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
