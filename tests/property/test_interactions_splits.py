"""The data module against a slow, obvious implementation in plain Python, on random small tables."""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from datamodules import InteractionsDataModule
from datamodules.batches import shuffled_in_runs, training_windows
from datamodules.counter_hash import Purpose, below, chain, hash_ids, mix
from datamodules.splits import cut_time

MASK = 2**64 - 1
SETTINGS = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])

tables = st.integers(1, 80).flatmap(
    lambda n: st.lists(st.tuples(st.integers(1, 6), st.integers(-3, 5), st.integers(0, 9)), min_size=n, max_size=n)
)


def slow_mix(word: int) -> int:
    word = (word + 0x9E3779B97F4A7C15) & MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def slow_chain(seed: int, purpose: int, *counters: int) -> int:
    state = slow_mix(slow_mix(seed & MASK) ^ purpose)
    for counter in counters:
        state = slow_mix(state ^ slow_mix(counter & MASK))
    return state


def slow_filter(rows, min_items, min_users):
    count = Counter(item for _, item, _ in rows)
    rows = [row for row in rows if count[row[1]] >= min_items]
    count = Counter(user for user, _, _ in rows)
    return [row for row in rows if count[row[0]] >= min_users]


def slow_histories(rows, seed):
    """User -> [(item, time)] in the documented order."""
    histories, n_before = {}, Counter()
    for user, item, time in rows:
        nth = n_before[user, item, time]
        n_before[user, item, time] += 1
        word = slow_chain(seed, 1, slow_mix(user & MASK), slow_mix(item & MASK), time * 10**6, *([nth] if nth else []))
        histories.setdefault(user, []).append((time, word, item))
    return {user: [(item, time) for time, _, item in sorted(found)] for user, found in histories.items()}


def slow_question(history, candidates, known, target):
    """(input items, relevant items) for the last of the candidates, a set of places in the history, or None."""
    if not candidates:
        return None
    last = max(candidates)
    if target == "next_item":
        before, asked = history[:last], [history[last]]
    else:
        time = history[last][1]
        before = [event for event in history if event[1] < time]
        asked = [history[place] for place in candidates if history[place][1] == time]
    inputs = [item for item, _ in before if item in known]
    relevant = {item for item, _ in asked if item in known}
    return (inputs, relevant) if inputs and relevant else None


def slow_split(rows, split, target, seed, test_fraction, validation_fraction):
    """(user -> training events, user -> validation question, user -> test question)."""
    histories = slow_histories(rows, seed)
    if split == "leave_last_out":
        places = {}
        for user, history in histories.items():
            unit, found = -1, []
            for place, (_, time) in enumerate(history):
                new = place == 0 or target == "next_item" or time != history[place - 1][1]
                unit += new
                found.append(unit)
            places[user] = [None if unit < 2 else unit - u for u in found]
        train = {
            user: [e for e, back in zip(history, places[user], strict=True) if back is None or back >= 2]
            for user, history in histories.items()
        }
        known = {item for history in train.values() for item, _ in history}
        asked = [
            {
                user: slow_question(history, {p for p, b in enumerate(places[user]) if b == back}, known, target)
                for user, history in histories.items()
            }
            for back in (1, 0)
        ]
        return train, asked[0], asked[1], known

    times = sorted({time for _, _, time in rows})
    late = [t for t in times if sum(time >= t for _, _, time in rows) <= len(rows) * test_fraction]
    cut = late[0] if late else times[-1]
    seen_early = {item for _, item, time in rows if time < cut}
    period_users = sorted({user for user, _, time in rows if time < cut})
    n_aside = max(1, round(validation_fraction * len(period_users))) if validation_fraction else 0
    aside = sorted(period_users, key=lambda user: slow_chain(seed, 2, slow_mix(user & MASK)))[:n_aside]
    train = {user: [e for e in history if e[1] < cut] for user, history in histories.items() if user not in aside}
    train = {user: history for user, history in train.items() if history}
    known = {item for history in train.values() for item, _ in history}
    validation, test = {}, {}
    for user, history in histories.items():
        if user in aside:
            places = {p for p, (item, time) in enumerate(history) if time < cut and item in known}
            validation[user] = slow_question(history, places, known, target)
        elif user in train:
            places = {p for p, (item, time) in enumerate(history) if time >= cut and item in seen_early}
            test[user] = slow_question(history, places, known, target)
    return train, validation, test, known


def without_seen(questions):
    left = {user: (inputs, relevant - set(inputs)) for user, (inputs, relevant) in questions.items()}
    return {user: question for user, question in left.items() if question[1]}


def asked_of(module, loader):
    """User -> (whole input, relevant items) in original ids, from the batches."""
    found = {}
    for batch in loader:
        users = module.decode_users(batch["user_index"]).to_list()
        for row, user in enumerate(users):
            begin, end = batch["history_offsets"][row : row + 2].tolist()
            inputs = module.decode_items(batch["history_items"][begin:end]).to_list()
            relevant = batch["relevant"][row]
            relevant = relevant[relevant >= 0].tolist()
            assert len(set(relevant)) == len(relevant)
            found[user] = (inputs, set(module.decode_items(relevant).to_list()))
    return found


def write(folder, rows):
    path = Path(folder) / "rows.parquet"
    schema = {"user": pl.Int64, "item": pl.Int64, "time": pl.Int64}
    pl.DataFrame(rows, schema=schema, orient="row").write_parquet(path)
    return {
        "paths": str(path),
        "user_column": "user",
        "item_column": "item",
        "time_column": "time",
        "cache_dir": folder,
        "batch_size": 5,
        "eval_batch_size": 4,
    }


@settings(SETTINGS, max_examples=150)
@given(
    rows=tables,
    split=st.sampled_from(["global_time", "leave_last_out"]),
    target=st.sampled_from(["next_item", "next_basket"]),
    seed=st.integers(-(2**40), 2**70),
    min_items=st.integers(1, 3),
    min_users=st.integers(1, 3),
    test_fraction=st.sampled_from([0.05, 0.2, 0.5, 0.9]),
    validation_fraction=st.sampled_from([0.0, 0.05, 0.4]),
    recommend_seen=st.booleans(),
    keep_seen=st.booleans(),
)
def test_splits_equal_the_slow_ones(
    rows, split, target, seed, min_items, min_users, test_fraction, validation_fraction, recommend_seen, keep_seen
):
    kept = slow_filter(rows, min_items, min_users)
    expected = None
    if len({user for user, _, _ in kept}) >= 2:
        train, *questions, known = slow_split(kept, split, target, seed, test_fraction, validation_fraction)
        questions = [{user: q for user, q in stage.items() if q is not None} for stage in questions]
        if not recommend_seen and not keep_seen:
            questions = [without_seen(stage) for stage in questions]
        wants_validation = split == "leave_last_out" or validation_fraction > 0
        events = [list(map(tuple, history)) for history in train.values()]
        has_target = False
        for history in events:
            for place in range(len(history)):
                for later in range(place + 1, len(history)):
                    gap = target == "next_item" or history[later][1] > history[place][1]
                    new = recommend_seen or history[later][0] not in [i for i, _ in history[:later]]
                    has_target |= gap and new
        if len(known) >= 2 and has_target and questions[1] and (questions[0] or not wants_validation):
            expected = train, *questions, known
    event("refused" if expected is None else "split")

    with tempfile.TemporaryDirectory() as folder:
        module = InteractionsDataModule(
            **write(folder, rows),
            split=split,
            target=target,
            seed=seed,
            min_item_count=min_items,
            min_user_count=min_users,
            test_fraction=test_fraction,
            validation_user_fraction=validation_fraction,
            recommend_seen=recommend_seen,
            keep_seen_targets=keep_seen,
        )
        if expected is None:
            with pytest.raises(ValueError, match=r"^[^\n]*$"):
                module.prepare_data()
            return
        train, validation, test, known = expected
        assert module.decode_items(np.arange(module.n_items)).to_list() == sorted(known)
        histories = module.train_histories()
        users = module.decode_users(histories.users).to_list()
        assert users == sorted(train)
        for user, begin, end in zip(users, histories.offsets, histories.offsets[1:], strict=False):
            assert module.decode_items(histories.items[begin:end]).to_list() == [item for item, _ in train[user]]
            times = [time for _, time in train[user]]
            assert histories.baskets[begin:end].tolist() == [sorted(set(times)).index(time) for time in times]
        assert asked_of(module, module.test_dataloader()) == test
        if validation:
            assert asked_of(module, module.val_dataloader()) == validation
        else:
            assert module.val_dataloader() == []


@SETTINGS
@given(
    rows=tables,
    target=st.sampled_from(["next_item", "next_basket"]),
    train_targets=st.sampled_from(["all", "new"]),
    window=st.sampled_from(["last", "strided"]),
    max_length=st.integers(1, 7),
    epoch=st.integers(0, 5),
    shuffle=st.booleans(),
)
def test_training_sequences_equal_the_slow_ones(rows, target, train_targets, window, max_length, epoch, shuffle):
    # Two more users, so that there is always something to train on, to validate and to test.
    rows = [*rows, *((7, item, time) for time, item in enumerate([1, 2, 3, 4, 1, 2])), (8, 1, 0)]
    with tempfile.TemporaryDirectory() as folder:
        module = InteractionsDataModule(
            **write(folder, rows),
            split="leave_last_out",
            min_item_count=1,
            min_user_count=1,
            target=target,
            recommend_seen=True,
            train_targets=train_targets,
            train_window=window,
            shuffle_within_basket=shuffle,
            max_length=max_length,
        )
        train, *_ = slow_split(rows, "leave_last_out", target, 42, 0.1, 0.05)
        expected = Counter()
        allowed = {}
        numbers = {item: n for n, item in enumerate(module.decode_items(np.arange(module.n_items)).to_list())}
        for history in train.values():
            events = [(numbers[item], time) for item, time in history]
            times = sorted({time for _, time in events})
            options = []
            for place, (_, time) in enumerate(events):
                if target == "next_item":
                    following = events[place + 1 : place + 2]
                    earlier = events[: place + 1]
                else:
                    following = [e for e in events if time != times[-1] and e[1] == times[times.index(time) + 1]]
                    earlier = [e for e in events if e[1] <= time]
                fresh = {i for i, _ in following} - ({i for i, _ in earlier} if train_targets == "new" else set())
                options.append((bool(following), fresh))
            n_inputs = sum(follows for follows, _ in options)
            for stop in range(n_inputs, 0, -max_length):
                start = max(0, stop - max_length)
                slots = range(start, stop)
                if any(options[p][1] for p in slots):
                    baskets = tuple(times.index(events[p][1]) for p in slots)
                    items = tuple(events[p][0] for p in slots)
                    if shuffle and target == "next_basket":
                        items = tuple(
                            i for b in sorted(set(baskets)) for i in sorted(np.array(items)[np.array(baskets) == b])
                        )
                    key = (items, baskets)
                    expected[key] += 1
                    allowed.setdefault(key, []).append([options[p][1] for p in slots])
                if window == "last":
                    break

        loader = module.train_dataloader()
        loader.sampler.set_epoch(epoch)
        found = Counter()
        for batch in loader:
            for items, baskets, targets in zip(
                *(batch[k].tolist() for k in ("item_ids", "basket_ids", "targets")), strict=True
            ):
                n = sum(b >= 0 for b in baskets)
                pad = max_length - n
                assert items[:pad] == [module.n_items] * pad
                assert baskets[:pad] == [-1] * pad
                assert targets[:pad] == [-100] * pad
                items, baskets, targets = items[pad:], tuple(baskets[pad:]), targets[pad:]
                if shuffle and target == "next_basket":
                    items = [i for b in sorted(set(baskets)) for i in sorted(np.array(items)[np.array(baskets) == b])]
                key = (tuple(items), baskets)
                found[key] += 1
                # Two users may have the same window with other futures: one of them must fit.
                assert any(
                    all((t in s) if s else t == -100 for t, s in zip(targets, sets, strict=True))
                    for sets in allowed[key]
                )
        assert found == expected


@SETTINGS
@given(times=st.lists(st.integers(0, 12), min_size=1, max_size=40), fraction=st.floats(0.01, 0.99))
def test_cut_keeps_timestamps_together_and_is_the_earliest(times, fraction):
    cut = cut_time(np.array(times), fraction)
    fitting = [t for t in sorted(set(times)) if sum(x >= t for x in times) <= int(len(times) * fraction)]
    assert cut == (fitting[0] if fitting else max(times))


@SETTINGS
@given(
    words=st.lists(st.integers(0, MASK), min_size=1, max_size=20),
    seed=st.integers(0, MASK),
    counter=st.integers(-(2**63), 2**63 - 1),
)
def test_hash_equals_python_integers(words, seed, counter):
    assert mix(np.array(words, dtype=np.uint64)).tolist() == [slow_mix(word) for word in words]
    array = np.array(words, dtype=np.uint64)
    expected = [slow_chain(seed, Purpose.SLOT, counter, word) for word in words]
    assert chain(seed, Purpose.SLOT, counter, array).tolist() == expected
    n = np.arange(1, len(words) + 1)
    assert below(array, n).tolist() == [(w >> 32) * k >> 32 for w, k in zip(words, n.tolist(), strict=True)]


@SETTINGS
@given(strings=st.lists(st.text(max_size=20), min_size=1, max_size=20, unique=True))
@example(strings=["", "\x01"])  # the length and an equal first word once cancelled
def test_hash_of_a_string_depends_on_it_alone(strings):
    words = hash_ids(pl.Series(strings, dtype=pl.String))
    assert len(set(words.tolist())) == len(strings)
    alone = [hash_ids(pl.Series([string], dtype=pl.String))[0] for string in strings]
    assert words.tolist() == alone


@SETTINGS
@given(groups=st.lists(st.integers(0, 4), min_size=1, max_size=50), seed=st.integers(0, 99))
def test_shuffling_moves_entries_inside_runs_only(groups, seed):
    groups = np.array(groups)
    begins = np.zeros(len(groups), dtype=bool)
    begins[0] = True
    begins[len(groups) // 2] = True
    order = shuffled_in_runs(groups, begins, chain(seed, Purpose.SLOT, np.arange(len(groups))))
    run = np.cumsum(begins | np.r_[True, groups[1:] != groups[:-1]])
    assert sorted(order) == list(range(len(groups)))
    assert (run[order] == run).all()


def test_shuffling_reaches_every_order_of_a_basket():
    """Six orders of three items, 6,000 draws: each within 5 standard deviations of 1,000."""
    n = 6000
    groups = np.repeat(np.arange(n), 3)
    order = shuffled_in_runs(groups, groups < 0, chain(3, Purpose.SLOT, np.arange(3 * n)))
    count = Counter(map(tuple, (order % 3).reshape(n, 3).tolist()))
    assert len(count) == 6
    assert max(abs(c - 1000) for c in count.values()) < 5 * (1000 * 5 / 6) ** 0.5


@SETTINGS
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=8),
    max_length=st.integers(1, 9),
)
def test_strided_windows_cover_every_input_once_and_last_ones_are_their_ends(lengths, max_length):
    n_inputs = np.array(lengths)
    offsets = np.r_[0, np.cumsum(n_inputs + 1)]
    users, starts, stops = training_windows(offsets, n_inputs, max_length, strided=True)
    covered = [p for s, e in zip(starts, stops, strict=True) for p in range(s, e)]
    assert covered == [p for u, n in enumerate(lengths) for p in range(offsets[u], offsets[u] + n)]
    assert ((stops - starts <= max_length) & (stops > starts)).all()
    last = training_windows(offsets, n_inputs, max_length, strided=False)
    expected = [(u, max(offsets[u], offsets[u] + n - max_length), offsets[u] + n) for u, n in enumerate(lengths) if n]
    assert list(zip(*(a.tolist() for a in last), strict=True)) == expected
    full = np.isin(stops, offsets[:-1] + n_inputs)
    assert (users[full] == last[0]).all()
