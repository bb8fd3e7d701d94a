"""Blocks of users change memory and nothing else: arrays equal those of plain loops, however the rows are cut."""

import tracemalloc
from collections import Counter
from itertools import groupby, product

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from datamodules import preparation, splits
from datamodules.array_cache import Prepared
from datamodules.counter_hash import Purpose, chain, hash_ids
from datamodules.histories import build_histories
from datamodules.preparation import PreparationSettings, prepare_histories
from datamodules.sources.columns import Columns
from datamodules.sources.tabular import Interactions
from datamodules.splits import global_time_split, leave_last_out_split, occurrences, user_blocks

COLUMNS = Columns(user="u", item="i", time="t", order=None, time_format=None, time_unit="s", where=())
SAMPLED = {"test_fraction": 0.2, "validation_user_fraction": 0.3}


def choices(split, target, drop_seen, only_new, seed=3) -> PreparationSettings:
    sampled = SAMPLED if split == "global_time" else dict.fromkeys(SAMPLED)
    kinds = {"split": split, "target": target, "drop_seen": drop_seen, "only_new_targets": only_new, "seed": seed}
    return PreparationSettings(columns=COLUMNS, min_item_count=2, min_user_count=2, **sampled, **kinds)


def random_table(seed, n_rows, n_users, n_items, n_times, *, ordered=False) -> Interactions:
    draw = np.random.default_rng(seed).integers
    users, user_ids = np.unique(draw(0, n_users, n_rows), return_inverse=True)[::-1]
    items, item_ids = np.unique(draw(0, n_items, n_rows), return_inverse=True)[::-1]
    return Interactions(
        users=users.astype(np.int32),
        items=items.astype(np.int32),
        times=draw(0, n_times, n_rows),
        order=draw(0, 3, n_rows) if ordered else None,
        user_ids=pl.Series(user_ids * 5),
        item_ids=pl.Series([f"item {number:03}" for number in item_ids]),
        steps=[],
    )


def prepare(table: Interactions, how: PreparationSettings, rows_at_a_time: int) -> Prepared | str:
    """What preparation makes of a table in memory, or its complaint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "ROWS_AT_A_TIME", rows_at_a_time)
        patch.setattr(preparation, "read_interactions", lambda *_: Interactions(**(vars(table) | {"steps": []})))
        try:
            return prepare_histories(["memory"], how)
        except ValueError as error:
            return str(error)


def contents(prepared: Prepared):
    arrays = {name: (str(array.dtype), array.tolist()) for name, array in prepared.arrays.items()}
    return arrays, prepared.user_ids.to_list(), prepared.item_ids.to_list(), prepared.facts


# Plain loops over (user, item, time) in their final order


def sorted_rows(table: Interactions, how: PreparationSettings) -> list[tuple[int, int, int]]:
    order = np.zeros(len(table.users), dtype=np.int64) if table.order is None else table.order
    rows = list(zip(*(a.tolist() for a in (table.users, table.items, table.times, order)), strict=True))
    for place, least in ((1, how.min_item_count), (0, how.min_user_count)):
        counts = Counter(row[place] for row in rows)
        rows = [row for row in rows if counts[row[place]] >= least]
    user_words, item_words = hash_ids(table.user_ids), hash_ids(table.item_ids)

    def key(numbered):
        (user, item, time, order), nth = numbered
        counters = [user_words[user], item_words[item], time, *([nth] if nth else [])]
        return user, time, order, int(chain(how.seed, Purpose.TIE, *counters)), item

    n_before: Counter = Counter()
    numbered = []
    for row in rows:
        numbered.append((row, n_before[row]))
        n_before[row] += 1
    return [row[:3] for row, _ in sorted(numbered, key=key)]


def question(rows, asked, known, target):
    """(first row that is no input, relevant rows) of one user whose row numbers are given, or None."""
    last = max((place for place, _ in rows if place in asked), default=None)
    if last is None:
        return None
    when = dict(rows)
    group = [place for place, time in rows if time == when[last]] if target == "next_basket" else [last]
    relevant = [place for place in group if place in asked and place in known]
    inputs = [place for place, _ in rows if place < group[0] and place in known]
    return (group[0], relevant) if relevant and inputs else None


def reference(table: Interactions, how: PreparationSettings):
    rows = sorted_rows(table, how)
    of_user = {u: [(n, rows[n][2]) for n in ns] for u, ns in groupby(range(len(rows)), lambda n: rows[n][0])}
    everything = set(range(len(rows)))
    if how.split == "global_time":
        times = sorted(row[2] for row in rows)
        most = int(len(rows) * how.test_fraction)
        cut = min((t for t in times if sum(time >= t for time in times) <= most), default=times[-1])
        early = {n for n in everything if rows[n][2] < cut}
        candidates = sorted({rows[n][0] for n in early})
        words = chain(how.seed, Purpose.VALIDATION_USER, hash_ids(table.user_ids))
        n_aside = max(1, round(how.validation_user_fraction * len(candidates)))
        aside = set(sorted(candidates, key=lambda user: words[user])[:n_aside])
        train = {n for n in early if rows[n][0] not in aside}
        known = {n for n in everything if rows[n][1] in {rows[m][1] for m in train}}
        trained = {rows[n][0] for n in train}
        seen = {rows[n][1] for n in early}
        asked = {
            "validation": {n for n in early & known if rows[n][0] in aside},
            # An item that only validation users have bought before may be the last one: nothing is asked then.
            "test": {n for n in everything - early if rows[n][1] in seen and rows[n][0] in trained},
        }
    else:
        train, asked = set(), {"validation": set(), "test": set()}
        for pairs in of_user.values():
            groups = [[n for n, _ in g] for _, g in groupby(pairs, lambda pair: pair[1])]
            units = groups if how.target == "next_basket" else [[n] for n, _ in pairs]
            if len(units) >= 3:
                asked["validation"] |= set(units[-2])
                asked["test"] |= set(units[-1])
                units = units[:-2]
            train |= {n for unit in units for n in unit}
        known = {n for n in everything if rows[n][1] in {rows[m][1] for m in train}}
    questions = {
        stage: {
            user: found
            for user, pairs in of_user.items()
            if (found := question(pairs, asked[stage], known, how.target))
        }
        for stage in asked
    }
    catalogue = sorted({rows[n][1] for n in train})
    has_known = {rows[n][0] for n in known}

    def rank(user):
        return 0 if user in {rows[n][0] for n in train} else 1 if user in questions["validation"] else 2

    users = sorted((user for user in of_user if user in has_known), key=lambda user: (rank(user), user))
    return layout(rows, of_user, train, known, questions, catalogue, users, how)


def layout(rows, of_user, train, known, questions, catalogue, users, how):
    arrays = {f"{name}_{kind}": [] for name in ("train", "all") for kind in ("items", "baskets")}
    arrays |= {"all_times": [], "all_offsets": [0], "train_offsets": [0], "train_n_inputs": []}
    arrays |= {"train_users": [], "is_new": [], "target_items": [], "target_offsets": [0], "basket_base": []}
    history = {}
    for number, user in enumerate(users):
        places = {"train": train, "all": known}
        for name, chosen in places.items():
            mine = [n for n, _ in of_user[user] if n in chosen]
            if name == "train" and not mine:
                continue
            baskets = sorted({rows[n][2] for n in mine})
            arrays[f"{name}_items"] += [catalogue.index(rows[n][1]) for n in mine]
            arrays[f"{name}_baskets"] += [baskets.index(rows[n][2]) for n in mine]
            arrays[f"{name}_offsets"].append(len(arrays[f"{name}_items"]))
            if name == "all":
                history[user] = (arrays["all_offsets"][-2], mine)
                arrays["all_times"] += [rows[n][2] for n in mine]
                continue
            arrays["train_users"].append(number)
            arrays["basket_base"].append(len(arrays["target_offsets"]) - 1)
            before = set()
            for _, group in groupby(mine, lambda n: rows[n][2]):
                group = [catalogue.index(rows[n][1]) for n in group]
                targets = [i for place, i in enumerate(group) if i not in group[:place]]
                if how.only_new_targets:
                    targets = [i for i in targets if i not in before]
                arrays["is_new"] += [i not in before and i not in group[:place] for place, i in enumerate(group)]
                before |= set(group)
                arrays["target_items"] += targets
                arrays["target_offsets"].append(len(arrays["target_items"]))
            n_last = len(group) if how.target == "next_basket" else 1
            arrays["train_n_inputs"].append(len(mine) - n_last)
    for stage, asked in questions.items():
        names = [f"{stage}_{kind}" for kind in ("users", "stops", "relevant", "relevant_offsets")]
        arrays |= {name: [] for name in names[:3]} | {names[3]: [0]}
        for number, user in enumerate(users):
            if user not in asked:
                continue
            stop, relevant = asked[user]
            start, mine = history[user]
            inputs = [n for n in mine if n < stop]
            found = sorted({catalogue.index(rows[n][1]) for n in relevant})
            if how.drop_seen:
                found = [i for i in found if i not in {catalogue.index(rows[n][1]) for n in inputs}]
            if found:
                arrays[names[0]].append(number)
                arrays[names[1]].append(start + len(inputs))
                arrays[names[2]] += found
                arrays[names[3]].append(len(arrays[names[2]]))
    new = arrays.pop("is_new")
    if how.target == "next_item":
        for name in ("target_items", "target_offsets", "basket_base"):
            del arrays[name]
        arrays |= {"train_is_new": new} if how.only_new_targets else {}
    return arrays, users, catalogue


@pytest.mark.parametrize(
    ("split", "target"), list(product(("global_time", "leave_last_out"), ("next_item", "next_basket")))
)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_rows=st.integers(30, 120),
    n_times=st.integers(2, 40),
    ordered=st.booleans(),
    drop_seen=st.booleans(),
    only_new=st.booleans(),
)
def test_arrays_equal_plain_loops_in_any_blocks(split, target, seed, n_rows, n_times, ordered, drop_seen, only_new):
    table = random_table(seed, n_rows, n_users=12, n_items=15, n_times=n_times, ordered=ordered)
    how = choices(split, target, drop_seen, only_new)
    whole = prepare(table, how, n_rows)
    for rows_at_a_time in (-(-n_rows // 3), 1):
        cut = prepare(table, how, rows_at_a_time)
        assert (cut if isinstance(cut, str) else contents(cut)) == (
            whole if isinstance(whole, str) else contents(whole)
        )
    assume(not isinstance(whole, str))
    expected, users, catalogue = reference(table, how)
    assert {name: array.tolist() for name, array in whole.arrays.items()} == expected
    assert whole.user_ids.to_list() == table.user_ids.gather(users).to_list()
    assert whole.item_ids.to_list() == table.item_ids.gather(catalogue).to_list()
    sizes = {"train_items", "train_baskets", "all_items", "all_baskets", "target_items"}
    relevant = {"validation_relevant", "test_relevant"}
    for name, array in whole.arrays.items():
        wanted = np.int32 if name in sizes | relevant else np.bool_ if name == "train_is_new" else np.int64
        assert array.dtype == wanted, name


@given(lengths=st.lists(st.integers(1, 9), max_size=20), rows_at_a_time=st.integers(1, 30))
@settings(max_examples=25, deadline=None)
def test_blocks_are_whole_users_and_not_much_larger_than_asked(lengths, rows_at_a_time):
    users = np.repeat(3 * np.arange(len(lengths), dtype=np.int32), lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "ROWS_AT_A_TIME", rows_at_a_time)
        blocks = list(user_blocks(users))
        few = list(user_blocks(users, at_most=3))
        counts = occurrences(users, 60, users % 2 == 0)
    assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(len(users)))
    assert len(few) <= 3
    assert [row for block in few for row in range(block.start, block.stop)] == list(range(len(users)))
    for block in blocks:
        assert block.stop == len(users) or users[block.stop] != users[block.stop - 1]
        assert block.stop - block.start < rows_at_a_time + max(lengths)
    assert counts.tolist() == [int((users == u).sum()) if u % 2 == 0 else 0 for u in range(60)]


@pytest.mark.parametrize("target", ["next_item", "next_basket"])
@pytest.mark.parametrize("split", ["global_time", "leave_last_out"])
def test_memory_a_row_beside_rows_and_result_is_small(split, target, monkeypatch):
    """NumPy reports its arrays to tracemalloc: what is allocated in between is counted, not guessed."""
    n, n_users, n_items = 400_000, 8_000, 5_000
    monkeypatch.setattr(splits, "ROWS_AT_A_TIME", n // 40)
    random = np.random.default_rng(0)
    users = np.sort(random.integers(0, n_users, n)).astype(np.int32)
    items, times = random.integers(0, n_items, n).astype(np.int32), np.arange(n, dtype=np.int64) // 2
    user_ids, item_ids = pl.Series(np.arange(n_users)), pl.Series(np.arange(n_items))
    tracemalloc.start()
    try:
        if split == "global_time":
            words = hash_ids(user_ids)
            times = times % 1009 * 10  # every user lives in the whole period; order inside users is not looked at
            made = global_time_split(users, items, times, user_words=words, target=target, **SAMPLED)
        else:
            made = leave_last_out_split(users, items, times, target=target)
        kinds = {"target": target, "only_new_targets": True, "drop_seen": True}
        prepared = build_histories(users, items, times, made, user_ids=user_ids, item_ids=item_ids, **kinds)
        peak = tracemalloc.get_traced_memory()[1] / n
    finally:
        tracemalloc.stop()
    result = sum(array.nbytes for array in prepared.arrays.values()) / n
    # Three masks of the split, one of known items, and the block: forty times fewer rows with 200 to 400 bytes each,
    # together 9 to 14. One whole-array temporary of int64 more is found; all rows as one block take 60 to 67.
    assert peak < result + 18
