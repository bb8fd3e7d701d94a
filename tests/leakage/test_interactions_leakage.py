"""Probes for the future in the past: of time, of validation users, of baskets, of files."""

from itertools import pairwise

import numpy as np
import polars as pl
import pytest

from datamodules import InteractionsDataModule
from datamodules.histories import flat_ranges
from datamodules.synthetic import markov_interactions

TARGETS = ["next_item", "next_basket"]


@pytest.fixture(scope="module")
def interactions() -> pl.DataFrame:
    """Purchases with ties: times are cut to the day."""
    return markov_interactions(150, 40, n_days=30, seed=5).with_columns(pl.col("timestamp").dt.truncate("1d"))


def build(folder, frame, name="rows", **arguments):
    path = folder / f"{name}.parquet"
    frame.write_parquet(path)
    settings = {
        "paths": str(path),
        "user_column": "user_id",
        "item_column": "item_id",
        "time_column": "timestamp",
        "cache_dir": str(folder / "cache"),
        "min_item_count": 1,
        "min_user_count": 1,
        "max_length": 8,
        "test_fraction": 0.3,
        "validation_user_fraction": 0.2,
    }
    return InteractionsDataModule(**(settings | arguments))


def cut_of(module) -> int:
    return module.report_facts()["split"]["cut_time"]


def all_times(module):
    folder = module._folder()
    return folder.array("all_times"), folder.array("all_offsets")


@pytest.mark.parametrize("target", TARGETS)
def test_no_training_interaction_at_or_after_the_cut(tmp_path, interactions, target):
    module = build(tmp_path, interactions, target=target, recommend_seen=True)
    histories = module.train_histories()
    cut = cut_of(module)
    early = interactions.filter(pl.col("timestamp").dt.epoch("us") < cut)
    assert 0 < early.height < interactions.height
    bought = {(user, item): n for user, item, n in early.group_by("user_id", "item_id").len().rows()}
    owners = np.repeat(histories.users, np.diff(histories.offsets))
    trained = pl.DataFrame({"user": module.decode_users(owners), "item": module.decode_items(histories.items)})
    for user, item, n in trained.group_by("user", "item").len().rows():
        assert n <= bought.get((user, item), 0)


@pytest.mark.parametrize("target", TARGETS)
def test_validation_users_are_absent_from_training_and_test(tmp_path, interactions, target):
    module = build(tmp_path, interactions, target=target, recommend_seen=True)
    loaders = module.val_dataloader(), module.test_dataloader()
    validation, test = (
        set(module.decode_users(np.concatenate([b["user_index"] for b in loader])).to_list()) for loader in loaders
    )
    train = set(module.decode_users(module.train_histories().users).to_list())
    assert len(validation) > 10
    assert not validation & train
    assert not validation & test
    assert test <= train


@pytest.mark.parametrize("split", ["global_time", "leave_last_out"])
@pytest.mark.parametrize("stage", ["validation", "test"])
def test_basket_inputs_end_before_the_time_asked_for(tmp_path, interactions, stage, split):
    module = build(tmp_path, interactions, target="next_basket", recommend_seen=True, split=split)
    times, offsets = all_times(module)
    folder = module._folder()
    users, stops = folder.array(f"{stage}_users"), folder.array(f"{stage}_stops")
    relevant, limits = folder.array(f"{stage}_relevant"), folder.array(f"{stage}_relevant_offsets")
    items = folder.array("all_items")
    assert len(users) > 10
    for row, (user, stop) in enumerate(zip(users, stops, strict=True)):
        asked_time = times[stop]
        assert times[offsets[user] : stop].max() < asked_time
        basket = items[offsets[user] : offsets[user + 1]][times[offsets[user] : offsets[user + 1]] == asked_time]
        assert set(relevant[limits[row] : limits[row + 1]]) == set(basket)
        if split == "global_time":
            assert (asked_time >= cut_of(module)) == (stage == "test")


def test_item_inputs_end_before_the_item_asked_for(tmp_path, interactions):
    module = build(tmp_path, interactions, target="next_item", recommend_seen=True)
    times, offsets = all_times(module)
    folder = module._folder()
    users, stops = folder.array("test_users"), folder.array("test_stops")
    for user, stop, item in zip(users, stops, folder.array("test_relevant"), strict=True):
        assert folder.array("all_items")[stop] == item
        assert (times[offsets[user] : stop] <= times[stop]).all()
        assert stop == offsets[user + 1] - 1


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("train_targets", ["all", "new"])
def test_the_future_leaves_training_bit_identical(tmp_path, interactions, target, train_targets):
    """Another future: other users (new ones too), other items (new ones too), other times after the cut."""
    options = {"target": target, "train_targets": train_targets, "recommend_seen": True}
    module = build(tmp_path, interactions, **options)
    late = pl.col("timestamp").dt.epoch("us") >= cut_of(module)
    generator = np.random.default_rng(0)
    n = interactions.filter(late).height
    known = interactions["item_id"].unique().sort().to_list()
    other = interactions.filter(late).with_columns(
        user_id=pl.Series(generator.integers(-50, 200, size=n)),
        item_id=pl.Series(generator.choice([*known, "a-new-one", "zz"], size=n)),
        timestamp=pl.col("timestamp") + pl.duration(days=pl.Series(generator.integers(0, 9, size=n))),
    )
    changed = build(tmp_path, pl.concat([other, interactions.filter(~late)]), name="changed", **options)
    assert cut_of(changed) == cut_of(module)
    assert changed.catalogue_hash == module.catalogue_hash
    names = [name for name in module._folder().facts["arrays"] if name.startswith(("train", "target", "basket"))]
    assert len(names) >= 4
    for name in names:
        before, after = module._folder().array(name), changed._folder().array(name)
        assert before.dtype == after.dtype
        assert np.array_equal(before, after), name
    users = module.train_histories().users
    assert module.decode_users(users).to_list() == changed.decode_users(users).to_list()
    for one, two in zip(module.train_dataloader(), changed.train_dataloader(), strict=True):
        assert all(one[key].equal(two[key]) for key in one)
    asked = [np.concatenate([b["relevant"].ravel() for b in m.test_dataloader()]) for m in (module, changed)]
    assert asked[0].shape != asked[1].shape or (asked[0] != asked[1]).any()


def test_basket_targets_are_of_the_next_basket_never_of_the_own(tmp_path):
    """Items name their user and time, so that a target tells where it comes from."""
    generator = np.random.default_rng(1)
    rows = [
        (user, f"{user}-{time}-{number}", time)
        for user in range(40)
        for time in range(int(generator.integers(4, 9)))
        for number in range(int(generator.integers(1, 6)))
    ]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    # Everybody's last two baskets are the same known items, so that there is something to validate and test.
    first = frame.filter(pl.col("timestamp") == 0).with_columns(pl.col("timestamp") + 20)
    frame = pl.concat([frame, first, first.with_columns(pl.col("timestamp") + 1)])
    module = build(
        tmp_path, frame, target="next_basket", recommend_seen=True, split="leave_last_out", train_window="strided"
    )
    loader = module.train_dataloader()
    n_checked = 0
    for epoch in range(5):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            slots = batch["targets"] != -100
            assert slots.equal(batch["item_ids"] != module.n_items)
            inputs = module.decode_items(batch["item_ids"][slots]).str.split("-").to_list()
            targets = module.decode_items(batch["targets"][slots]).str.split("-").to_list()
            for (user, time, _), (other, later, _) in zip(inputs, targets, strict=True):
                assert user == other
                assert int(later) == int(time) + 1
                n_checked += 1
    assert n_checked > 1000


@pytest.mark.parametrize("target", TARGETS)
def test_new_targets_are_not_in_the_history_before_them(tmp_path, interactions, target):
    module = build(tmp_path, interactions, target=target, recommend_seen=False, train_window="strided")
    histories = module.train_histories()
    n_targets = n_without = 0
    for batch in module.train_dataloader():
        for items, baskets, targets in zip(*(batch[k] for k in ("item_ids", "basket_ids", "targets")), strict=True):
            for slot in (targets >= 0).nonzero().flatten().tolist():
                seen = items[: slot + 1] if target == "next_item" else items[baskets <= baskets[slot]]
                assert targets[slot] not in seen.tolist()
                n_targets += 1
            n_without += int(((targets == -100) & (items != module.n_items)).sum())
    assert n_targets == module.report_facts()["split"]["train_targets"]
    assert n_without > 0  # the data has repeats, else this would show nothing
    # Not only inside the window: a position counts if its target is new to the whole history.
    if target == "next_item":
        rows = np.repeat(np.arange(len(histories.users)), np.diff(histories.offsets))
        distinct = len(np.unique(rows * module.n_items + histories.items))
        assert n_targets == distinct - len(histories.users)


def test_history_is_removed_from_what_is_asked(tmp_path, interactions):
    removed = build(tmp_path, interactions, target="next_basket", recommend_seen=False)
    n_seen = 0
    for batch in removed.test_dataloader():
        for row in range(len(batch["user_index"])):
            history = batch["history_items"][batch["history_offsets"][row] : batch["history_offsets"][row + 1]]
            relevant = batch["relevant"][row]
            assert (relevant >= 0).any()
            assert not set(relevant.tolist()) & set(history.tolist())
    kept = build(tmp_path, interactions, target="next_basket", recommend_seen=False, keep_seen_targets=True)
    for batch in kept.test_dataloader():
        for row in range(len(batch["user_index"])):
            history = batch["history_items"][batch["history_offsets"][row] : batch["history_offsets"][row + 1]]
            n_seen += len(set(batch["relevant"][row].tolist()) & set(history.tolist()))
    assert n_seen > 0
    sizes = [module.report_facts()["split"] for module in (kept, removed)]
    assert sizes[0]["test_relevant"] - n_seen == sizes[1]["test_relevant"]


@pytest.mark.parametrize("target", TARGETS)
def test_order_of_ties_does_not_depend_on_the_file(tmp_path, interactions, target):
    sorted_file = build(tmp_path, interactions, target=target)
    shuffled = build(tmp_path, interactions.sample(fraction=1, shuffle=True, seed=1), name="shuffled", target=target)
    assert sorted_file._folder().path != shuffled._folder().path
    for name in sorted_file._folder().facts["arrays"]:
        assert np.array_equal(sorted_file._folder().array(name), shuffled._folder().array(name)), name


def test_order_of_ties_is_not_that_of_the_ids_and_follows_the_seed(tmp_path, interactions):
    orders = []
    for seed in (1, 2):
        module = build(tmp_path, interactions, seed=seed, split="leave_last_out", recommend_seen=True)
        folder = module._folder()
        times, offsets, items = folder.array("all_times"), folder.array("all_offsets"), folder.array("all_items")
        inner = np.ones(len(times), dtype=bool)
        inner[offsets[:-1]] = False
        ties = np.flatnonzero(inner & (times == np.roll(times, 1)))
        assert len(ties) > 100
        rising = (items[ties] > items[ties - 1]).mean()
        falling = (items[ties] < items[ties - 1]).mean()
        # Of about 1,000 ties with different items half rise: 0.1 is six standard deviations.
        assert abs(rising - falling) < 0.1 * 2
        orders.append(module.decode_items(items).to_list())
    assert orders[0] != orders[1]


@pytest.mark.parametrize("ordered", [False, True])
def test_equal_lines_are_placed_at_random_whatever_the_order_of_the_file(tmp_path, ordered):
    """Ten lines of one minute, one of them twice: side by side in 2 of 10 histories, were the order random."""
    generator = np.random.default_rng(0)
    rows = [(u, int(i), u) for u in range(400) for i in [*generator.choice(40, 9, replace=False), -1, -1]]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row").with_columns(place=pl.lit(7))
    options = {"split": "leave_last_out", "recommend_seen": True, "order_column": "place" if ordered else None}
    found = []
    for name, order in (("rows", frame), ("shuffled", frame.sample(fraction=1, shuffle=True, seed=1))):
        folder = build(tmp_path, order, name=name, **options)._folder()
        items, offsets = folder.array("all_items"), folder.array("all_offsets")
        found.append(items.tolist())
        doubled = [(np.diff(items[a:b]) == 0).any() for a, b in pairwise(offsets)]
        # Eleven places, two for the doubled line: 2/11. 400 histories: 0.08 is four standard deviations.
        assert abs(np.mean(doubled) - 2 / 11) < 0.08
    assert found[0] == found[1]


def test_order_column_breaks_ties_before_the_hash(tmp_path, interactions):
    frame = interactions.with_row_index("place").with_columns(pl.col("place").cast(pl.Int64))
    module = build(tmp_path, frame, order_column="place", split="leave_last_out", recommend_seen=True)
    folder = module._folder()
    expected = frame.filter(pl.col("item_id").is_in(module.decode_items(np.arange(module.n_items)).to_list()))
    expected = expected.sort("user_id", "timestamp", "place").group_by("user_id", maintain_order=True).agg("item_id")
    offsets = folder.array("all_offsets")
    found = {}
    for user, begin, end in zip(folder.ids("user_ids"), offsets, offsets[1:], strict=False):
        found[user] = module.decode_items(folder.array("all_items")[begin:end]).to_list()
    assert found == dict(expected.rows())


def test_windows_never_reach_into_another_user(tmp_path, interactions):
    module = build(tmp_path, interactions, recommend_seen=True, train_window="strided")
    sequences = module.train_dataloader().dataset
    histories = module.train_histories()
    owner = np.repeat(np.arange(len(histories.users)), np.diff(histories.offsets))
    positions = flat_ranges(sequences._starts, sequences._stops)
    owners = np.repeat(sequences._users, sequences._stops - sequences._starts)
    assert (owner[positions] == owners).all()
    assert (owner[positions + 1] == owners).all()
