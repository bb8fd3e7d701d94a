"""Layout of histories, training targets and questions as flat arrays with offsets (CSR form).

M interactions, U users, V items, Q questions of one stage. A history is a slice of flat arrays between two offsets, in
order of time. Items are numbered 0..V-1 by increasing original id; users likewise, those with training data before
validation users, these before the others.
"""

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from datamodules.array_cache import Prepared
from datamodules.splits import Split, Target

_ROWS_AT_A_TIME = 1 << 21


@dataclass(frozen=True)
class Histories:
    """Training histories in CSR form, arrays or read-only memory maps.

    Attributes:
        items: ``(M,) int32`` item ids 0..V-1, in order of time inside a user.
        baskets: ``(M,) int32`` number of the timestamp group inside the history, from 0.
        offsets: ``(U + 1,) int64`` limits of each history.
        users: ``(U,) int64`` row in the table of users.
    """

    items: NDArray[np.int32]
    baskets: NDArray[np.int32]
    offsets: NDArray[np.int64]
    users: NDArray[np.int64]


def build_histories(
    users: NDArray[np.int32],
    items: NDArray[np.int32],
    times: NDArray[np.int64],
    split: Split,
    *,
    user_ids: pl.Series,
    item_ids: pl.Series,
    target: Target,
    only_new_targets: bool,
    drop_seen: bool,
) -> Prepared:
    """Number the catalogue and the users, and lay out histories, training targets and questions.

    A training position is an interaction with a later item (``next_item``) or basket (``next_basket``) in the same
    history. Its target is the next item, or any one of the distinct items of the next basket. With
    ``only_new_targets`` items that occur earlier in the history are no targets.

    Args:
        users: ``(n,) int32`` row in ``user_ids``, not decreasing.
        items: ``(n,) int32`` row in ``item_ids``.
        times: ``(n,) int64``, not decreasing inside a user.
        split: Where each of them goes.
        user_ids: Original ids, increasing.
        item_ids: Original ids, increasing.
        target: ``next_item`` or ``next_basket``.
        only_new_targets: Whether repeats are no training targets.
        drop_seen: Whether items of the input history are taken out of the questions.

    Returns:
        Arrays ``train_*`` (training histories), ``all_*`` (histories of every user, known items only), and
        ``validation_*`` and ``test_*`` (users, where their input ends in ``all_*``, relevant items).

    Raises:
        ValueError: If training, validation (unless no user was sampled) or test is left without anything.
    """
    counts: dict[str, Any] = dict(split.counts)
    catalogue = np.flatnonzero(split.known_items)
    if len(catalogue) < 2:
        raise ValueError(f"nothing is left to rank: training holds {len(catalogue)} distinct items, at least 2 needed")
    item_table = item_ids.gather(catalogue)
    known = split.known_items[items]
    n_known_before = np.r_[0, np.cumsum(known)]
    user_table = _user_order(users, known, split, len(user_ids))
    new_item = _numbers(catalogue, len(item_ids))
    new_user = _numbers(user_table, len(user_ids))
    users, items = new_user[users], new_item[items]

    arrays, n_targets = _training(
        users[split.train], items[split.train], times[split.train], len(catalogue), target, only_new_targets
    )
    order = np.argsort(users[known], kind="stable")
    all_users = users[known][order]
    arrays["all_offsets"] = _offsets(np.bincount(all_users, minlength=len(user_table)))
    arrays["all_items"] = items[known][order]
    arrays["all_times"] = times[known][order]
    arrays["all_baskets"] = _basket_numbers(all_users, arrays["all_times"], arrays["all_offsets"])
    del order, all_users

    begins = np.flatnonzero(np.r_[True, users[1:] != users[:-1]])
    begins = begins[users[begins] >= 0]
    first_row = np.zeros(len(user_table), dtype=np.int64)
    first_row[users[begins]] = begins
    for stage, questions in (("validation", split.validation), ("test", split.test)):
        asked = new_user[questions.users].astype(np.int64)
        # Inside a user the rows keep their order: known rows before the stop, less those before the user.
        n_inputs = n_known_before[questions.stops] - n_known_before[first_row[asked]]
        stops = arrays["all_offsets"][asked] + n_inputs
        pairs = np.unique(users[questions.relevant].astype(np.int64) * len(catalogue) + items[questions.relevant])
        counts[f"{stage}_users_answerable"] = len(asked)
        counts[f"{stage}_relevant_before_history_removal"] = len(pairs)
        if drop_seen:
            pairs = pairs[~np.isin(pairs, _input_pairs(arrays, asked, stops, len(catalogue)))]
        owners, relevant = np.divmod(pairs, len(catalogue))
        n_relevant = np.bincount(owners, minlength=len(user_table))[asked]
        kept = np.flatnonzero(n_relevant)
        kept = kept[np.argsort(asked[kept], kind="stable")]  # the pairs lie in the order of user numbers
        arrays[f"{stage}_users"] = asked[kept]
        arrays[f"{stage}_stops"] = stops[kept]
        arrays[f"{stage}_relevant"] = relevant.astype(np.int32)
        arrays[f"{stage}_relevant_offsets"] = _offsets(n_relevant[kept])
        counts[f"{stage}_users"] = len(kept)
        counts[f"{stage}_relevant"] = len(pairs)
    counts |= {
        "train_users": len(arrays["train_users"]),
        "train_interactions": len(arrays["train_items"]),
        "train_targets": n_targets,
        "n_items": len(catalogue),
        "n_users": len(user_table),
    }
    _refuse_nothing(counts, needs_validation=counts.get("validation_users_sampled", 1) > 0)
    facts = {"split": counts, "catalogue_hash": catalogue_hash(item_table)}
    return Prepared(arrays, user_ids.gather(user_table), item_table, facts)


def _user_order(users: NDArray[np.int32], known: NDArray[np.bool_], split: Split, n_users: int) -> NDArray[np.int64]:
    """Old numbers of the users that have a known item: with training data, validation users, the others.

    Training users come first, so that their numbers do not depend on who appears later.
    """
    rank = np.full(n_users, 3, dtype=np.int8)
    rank[users[known]] = 2
    rank[split.validation.users] = np.minimum(rank[split.validation.users], 1)
    rank[users[split.train]] = 0
    order = np.argsort(rank, kind="stable")
    return order[: int((rank < 3).sum())]


def _numbers(table: NDArray[np.int64], n: int) -> NDArray[np.int32]:
    """``(n,)`` place of each old number in the table, -1 if it has none."""
    numbers = np.full(n, -1, dtype=np.int32)
    numbers[table] = np.arange(len(table), dtype=np.int32)
    return numbers


def _offsets(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    return np.r_[0, np.cumsum(lengths)].astype(np.int64)


def catalogue_hash(item_ids: pl.Series) -> str:
    """Sixteen hexadecimal digits that stand for the ids of the catalogue, in their order."""
    texts = item_ids.cast(pl.String)
    digest = hashlib.blake2b(str(item_ids.dtype.is_integer()).encode(), digest_size=8)
    digest.update(texts.str.len_bytes().cast(pl.Int64).to_numpy().tobytes())
    digest.update("".join(texts.to_list()).encode())
    return digest.hexdigest()


def _basket_numbers(
    users: NDArray[np.int32], times: NDArray[np.int64], offsets: NDArray[np.int64]
) -> NDArray[np.int32]:
    begins = np.ones(len(users), dtype=np.int64)
    begins[1:] = (users[1:] != users[:-1]) | (times[1:] != times[:-1])
    numbers = np.cumsum(begins) - 1
    lengths = np.diff(offsets)
    base = np.zeros(len(lengths), dtype=np.int64)
    base[lengths > 0] = numbers[offsets[:-1][lengths > 0]]
    return (numbers - np.repeat(base, lengths)).astype(np.int32)


def _training(
    users: NDArray[np.int32],
    items: NDArray[np.int32],
    times: NDArray[np.int64],
    n_items: int,
    target: Target,
    only_new: bool,
) -> tuple[dict[str, NDArray[Any]], int]:
    """Training histories, arrays from which targets are drawn, and the number of positions that have one.

    ``train_n_inputs (U,)`` positions of each user that have something after them. ``next_item`` with only new
    targets: ``train_is_new (M,)``. ``next_basket``: ``target_items``, ``target_offsets (number of baskets + 1,)`` the
    distinct (new) items of each basket, and ``basket_base (U,)`` the number of baskets of the users before.
    """
    lengths = np.bincount(users)
    offsets = _offsets(lengths)
    baskets = _basket_numbers(users, times, offsets)
    arrays: dict[str, NDArray[Any]] = {
        "train_items": items,
        "train_baskets": baskets,
        "train_offsets": offsets,
        "train_users": np.arange(len(lengths)),
    }
    if target == "next_item":
        has_target = np.ones(len(items), dtype=bool)
        has_target[offsets[:-1]] = False
        if only_new:
            arrays["train_is_new"] = _first_of_group(users, items, n_items, offsets)
            has_target &= arrays["train_is_new"]
        arrays["train_n_inputs"] = lengths - 1
        return arrays, int(has_target.sum())
    last_basket = baskets[offsets[1:] - 1].astype(np.int64)
    basket_base = np.cumsum(last_basket + 1) - last_basket - 1
    basket = np.repeat(basket_base, lengths) + baskets
    candidate = _first_of_group(users if only_new else basket, items, n_items, offsets)
    n_candidates = np.bincount(basket[candidate], minlength=int((last_basket + 1).sum()))
    n_events = np.bincount(basket)
    is_last = np.zeros(len(n_candidates), dtype=bool)
    is_last[basket_base + last_basket] = True
    arrays["train_n_inputs"] = lengths - n_events[is_last]
    arrays["basket_base"] = basket_base
    arrays["target_items"] = items[candidate]
    arrays["target_offsets"] = _offsets(n_candidates)
    return arrays, int(n_events[:-1][~is_last[:-1] & (n_candidates[1:] > 0)].sum())


def _first_of_group(
    groups: NDArray[np.integer], items: NDArray[np.int32], n_items: int, offsets: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """``(M,) bool`` first row of each pair (group, item), for groups that lie inside one user.

    Many users at a time, for the sake of memory: a table of hashes takes far more of it than the rows.
    """
    parts = np.searchsorted(offsets, np.arange(0, len(items), _ROWS_AT_A_TIME))
    limits = [*np.unique(offsets[parts]).tolist(), len(items)]
    first = np.zeros(len(items), dtype=bool)
    for begin, end in pairwise(limits):
        pairs = groups[begin:end].astype(np.int64) * n_items + items[begin:end]
        first[begin:end] = pl.Series(pairs).is_first_distinct().to_numpy()
    return first


def flat_ranges(starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[np.int64]:
    """``start_0, ..., stop_0 - 1, start_1, ...``: the positions of several slices, one after another."""
    lengths = stops - starts
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)


def _input_pairs(
    arrays: dict[str, NDArray[Any]], asked: NDArray[np.int64], stops: NDArray[np.int64], n_items: int
) -> NDArray[np.int64]:
    starts = arrays["all_offsets"][asked]
    return np.repeat(asked, stops - starts) * n_items + arrays["all_items"][flat_ranges(starts, stops)]


def _refuse_nothing(counts: dict[str, Any], *, needs_validation: bool) -> None:
    wanted = {"train_targets": "no training position has a target", "test_users": "no user is left to test"}
    if needs_validation:
        wanted["validation_users"] = "no user is left to validate, sample more of them"
    for key, reason in wanted.items():
        if counts[key] == 0:
            known = ", ".join(f"{name} {value}" for name, value in counts.items())
            raise ValueError(f"nothing is left after step 'split': {reason} ({known})")
