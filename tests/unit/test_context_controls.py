from datetime import UTC, datetime

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.context.controls import (
    TIME_FEATURES,
    Arm,
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

DAY = 86_400_000_000


def slow_time_features(time, last, first, n_events, origin):
    """By the calendar of the standard library."""
    moment = datetime.fromtimestamp(time // 10**6, UTC).replace(microsecond=time % 10**6)
    seconds = moment.hour * 3600 + moment.minute * 60 + moment.second + moment.microsecond / 1e6
    year = datetime(moment.year, 1, 1, tzinfo=UTC), datetime(moment.year + 1, 1, 1, tzinfo=UTC)
    turns = [
        seconds / 86_400,
        (moment.weekday() + seconds / 86_400) / 7,
        (moment - year[0]).total_seconds() / (year[1] - year[0]).total_seconds(),
    ]
    waves = [wave(2 * np.pi * turn) for turn in turns for wave in (np.sin, np.cos)]
    recency, span = ((time - last) / DAY, (last - first) / DAY) if n_events else (0.0, 0.0)
    return [(time - origin) / DAY, *waves, np.log1p(recency), np.log1p(n_events), np.log1p(span)]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**51), st.integers(0, 400 * DAY), st.integers(0, 9)), min_size=1, max_size=5))
def test_time_features_equal_the_standard_calendar(rows):
    times = torch.tensor([row[0] for row in rows])
    last, n_events = times - torch.tensor([row[1] for row in rows]), torch.tensor([row[2] for row in rows])
    first = last - DAY * n_events
    origin = int(times.min())
    found = time_features(times, last, first, n_events, origin=origin)
    assert found.dtype == torch.float32
    assert found.shape == (len(rows), len(TIME_FEATURES))
    expected = [
        slow_time_features(*(int(one) for one in row), origin) for row in zip(times, last, first, n_events, strict=True)
    ]
    # float32 of numbers up to 26,000 days
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=2e-6)


def test_time_features_without_history_ignore_its_times():
    times = torch.tensor([5 * DAY])
    wild = torch.tensor([2**62])
    found = time_features(times, wild, -wild, torch.tensor([0]), origin=0)
    assert found.isfinite().all()
    assert found[0, -3:].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"own events must not lie after the query, got .* in row 0"):
        time_features(times, wild, times, torch.tensor([1]), origin=0)


def test_shuffled_times_stay_in_their_fold_and_move():
    times = torch.arange(300)
    fold = torch.arange(300) % 3
    found = shuffled_times(times, fold.to(torch.int8), seed=1)
    for number in range(3):
        assert torch.equal(found[fold == number].sort().values, times[fold == number])
    # a permutation of 100 has 1 fixed point on average
    assert (found == times).sum() < 20
    assert torch.equal(found, shuffled_times(times, fold.to(torch.int8), seed=1))
    assert not torch.equal(found, shuffled_times(times, fold.to(torch.int8), seed=2))


def test_gaussian_has_the_moments_of_context_even_when_singular():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4000, 2, generator=generator) @ torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]]) + 7
    context = torch.cat([base, base[:, :1], torch.ones(4000, 1)], 1)
    found = gaussian_like(context, 50_000, seed=3)
    assert found.dtype == context.dtype
    # s.e. of a mean sqrt(10 / 50,000) = .014, of a covariance about 10 sqrt(2 / 50,000) = .06; four of each
    torch.testing.assert_close(found.mean(0), context.mean(0), rtol=0, atol=0.06)
    torch.testing.assert_close(found.T.cov(), context.T.cov(), rtol=0, atol=0.25)
    # a column that repeats another still does, but for the square root of float64's rounding
    torch.testing.assert_close(found[:, 3], found[:, 0], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="at least 1 context vector of train, got 0"):
        gaussian_like(context[:0], 1, seed=0)


def test_constant_is_one_vector():
    assert constant_context(torch.tensor([1.0, 2.0]), 3).tolist() == [[1, 2]] * 3


def test_names_and_what_they_mean():
    names = arm_names(["mean", "kernel"], wide=True)
    assert names == (
        *("own", "own+time", "wide", "gaussian", "constant"),
        *("shuffled:mean", "shuffled+time:mean", "shuffled:kernel", "shuffled+time:kernel"),
        *("mean", "mean+time", "kernel", "kernel+time"),
    )
    context = [name for name in names if Arm.parse(name).is_context]
    assert context == ["mean", "mean+time", "kernel", "kernel+time"]
    assert Arm.parse("shuffled+time:kernel") == ("shuffled+time:kernel", "kernel", True, True)
    assert arm_names(["mean"], time=False, shuffled=False, gaussian=False, constant=False) == ("own", "mean")


def test_assembles_own_then_time_then_context():
    own, time = torch.full((2, 3), 1.0), torch.full((2, 10), 2.0)
    contexts = {
        "kernel": torch.full((2, 4), 3.0),
        "shuffled:kernel": torch.full((2, 4), 4.0),
        "gaussian": torch.full((2, 4), 5.0, dtype=torch.float64),
        "wide": torch.full((2, 6), 6.0),
    }
    arms = ("own", "own+time", "wide", "gaussian", "shuffled:kernel", "shuffled+time:kernel", "kernel", "kernel+time")
    found = assemble(arms, own, time, contexts)
    q, t = [1.0] * 3, [2.0] * 10
    assert {name: features[1].tolist() for name, features in found.items()} == {
        "own": q,
        "own+time": q + t,
        "wide": [6.0] * 6,
        "gaussian": [*q, *[5.0] * 4],
        "shuffled:kernel": [*q, *[4.0] * 4],
        "shuffled+time:kernel": [*q, *t, *[4.0] * 4],
        "kernel": [*q, *[3.0] * 4],
        "kernel+time": [*q, *t, *[3.0] * 4],
    }
    assert all(features.dtype == torch.float32 for features in found.values())


def test_a_combination_stands_in_place_of_state_and_context_before_time():
    own, time = torch.full((2, 3), 1.0), torch.full((2, 2), 2.0)
    contexts = {"gaussian": torch.full((2, 3), 10.0), "wide": torch.full((2, 6), 6.0)}
    contexts |= {"kernel": torch.full((2, 3), 20.0), "shuffled:kernel": torch.full((2, 3), 30.0), "mean": own + 6}
    arms = ("own+time", "wide", "gaussian", "kernel", "kernel+time", "shuffled+time:kernel", "mean+time")
    found = assemble(arms, own, time, contexts, dict.fromkeys(("kernel", "gaussian"), torch.add))
    assert {name: features[0].tolist() for name, features in found.items()} == {
        "own+time": [*[1.0] * 3, *[2.0] * 2],
        "wide": [6.0] * 6,
        "gaussian": [11.0] * 3,
        "kernel": [21.0] * 3,
        "kernel+time": [*[21.0] * 3, *[2.0] * 2],
        "shuffled+time:kernel": [*[31.0] * 3, *[2.0] * 2],
        "mean+time": [*[1.0] * 3, *[2.0] * 2, *[7.0] * 3],
    }


def test_each_arm_may_have_states_of_its_own():
    states = {"own": torch.zeros(1, 1), "kernel": torch.ones(1, 1)}
    contexts = {name: torch.zeros(1, 0) for name in ("kernel", "shuffled:kernel", "mean")}
    found = assemble(("own", "kernel", "shuffled:kernel", "mean"), states, torch.zeros(1, 10), contexts)
    assert {name: features.item() for name, features in found.items()} == {
        "own": 0,
        "kernel": 1,
        "shuffled:kernel": 1,
        "mean": 0,
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: arm_names(["a+b"]), r"no '\+' or ':' and be none of .*, got 'a\+b'"),
        (lambda: arm_names(["own"]), "got 'own'"),
        (lambda: Arm.parse("kernel+clock"), r"an arm is \[shuffled.*got 'kernel\+clock'"),
        (lambda: Arm.parse("shuffled:"), "got 'shuffled:'"),
        (lambda: Arm.parse("other:kernel"), "got 'other:kernel'"),
        (lambda: assemble(["mean"], torch.zeros(1, 1), torch.zeros(1, 10), {}), r"'mean' needs the vectors of 'mean'"),
        (
            lambda: assemble(["own+time"], torch.zeros(1, 1), torch.zeros(2, 10), {}),
            r"'own\+time' is made of different numbers of queries: \[1, 2\]",
        ),
    ],
)
def test_bad_input_ends_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_calendar_basis_is_linear_between_knots_and_constant_beyond():
    knots = torch.tensor([10, 20, 40])
    found = calendar_basis(torch.tensor([0, 10, 15, 20, 35, 40, 99]), knots)
    expected = [[1, 0, 0], [1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.25, 0.75], [0, 0, 1], [0, 0, 1]]
    assert found.tolist() == expected


def test_one_knot_is_a_constant():
    assert calendar_basis(torch.tensor([1, 5, 9]), torch.tensor([5])).tolist() == [[1], [1], [1]]


def test_knots_are_the_dates_or_quantiles():
    dates = torch.tensor([30, 10, 20, 10])
    assert time_knots(dates, 3).tolist() == [10, 20, 30]
    many = torch.randperm(1001)
    assert time_knots(many, 5).tolist() == [0, 250, 500, 750, 1000]
    with pytest.raises(ValueError, match="at least 1 time"):
        time_knots(dates[:0])


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    n_classes=st.integers(2, 4),
    n_moments=st.sampled_from([1, 5, 200]),
    n_train=st.integers(1, 60),
)
def test_rates_of_the_clock_equal_a_loop_over_ranks(seed, n_classes, n_moments, n_train):
    generator = torch.Generator().manual_seed(seed)
    times, users = (torch.randint(0, high, (80,), generator=generator) for high in (n_moments, 9))
    labels = torch.randint(0, n_classes, (80,), generator=generator)
    train = torch.randperm(80, generator=generator) < n_train
    people = users[train].unique().tolist()
    lots = torch.randperm(len(people), generator=torch.Generator().manual_seed(5)) % 3
    fold_of = dict(zip(people, lots.tolist(), strict=True))
    expected = []
    for row in range(80):
        kept = [
            (int(times[other]), int(labels[other]))
            for other in range(80)
            if train[other] and not (train[row] and fold_of[int(users[other])] == fold_of[int(users[row])])
        ]
        kept.sort(key=lambda pair: pair[0])
        prior = [(sum(label == c for _, label in kept) + 1) / (len(kept) + n_classes) for c in range(n_classes)]
        values = []
        for n in (2, 7):
            first, last = (sum(moment < times[row] + late for moment, _ in kept) for late in (0, 1))
            size = max(last - first, min(n, len(kept)))
            start = min(max(first - (size - (last - first)) // 2, 0), len(kept) - size)
            told = [label for _, label in kept[start : start + size]]
            shares = [(told.count(c) + prior[c]) / (len(told) + 1) for c in range(n_classes)]
            logs = np.log(shares)
            values += [logs[1] - logs[0]] if n_classes == 2 else list(logs)
        expected.append(values)
    found = clock_rates(times, users, labels, train, n_classes, nearest=(2, 7), n_folds=3, seed=5)
    np.testing.assert_allclose(found, np.array(expected), rtol=1e-5, atol=1e-6)


def test_no_label_of_a_user_or_of_the_test_is_in_its_own_rates():
    generator = torch.Generator().manual_seed(0)
    times, users = torch.randint(0, 70, (300,), generator=generator), torch.randint(0, 40, (300,), generator=generator)
    labels, train = torch.randint(0, 2, (300,), generator=generator), users < 25
    before = clock_rates(times, users, labels, train, 2)
    flipped = torch.where(users == 3, 1 - labels, labels)
    after = clock_rates(times, users, flipped, train, 2)
    assert torch.equal(after[users == 3], before[users == 3])
    assert (after - before)[users != 3].abs().max() > 0.2
    assert torch.equal(before, clock_rates(times, users, torch.where(train, labels, 1 - labels), train, 2))


def test_a_linear_probe_can_learn_any_function_of_the_dates():
    dates = torch.arange(12).repeat(30) * 1000
    values = torch.sin(dates.double() ** 2)
    basis = calendar_basis(dates, time_knots(dates)).double()
    fitted = basis @ torch.linalg.lstsq(basis, values.unsqueeze(1)).solution
    assert torch.allclose(fitted.flatten(), values)
