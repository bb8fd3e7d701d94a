"""Layout of histories, training targets and questions as flat arrays with offsets (CSR form).

M interactions, U users, V items, Q questions of one stage. A history is a slice of flat arrays between two offsets, in
order of time. Items are numbered 0..V-1 by increasing original id; users likewise, those with training data before
validation users, these before the others. Arrays are laid out a block of whole users at a time, so that beside the rows
and the result there is memory for one block only.
"""

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from datamodules import splits
from datamodules.array_cache import Prepared
from datamodules.splits import Split, Target, occurrences, user_blocks

_IDS_AT_A_TIME = 1 << 16


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
    n_known = occurrences(users, len(user_ids), known)
    user_table = _user_order(users, n_known > 0, split)
    new_item = _numbers(catalogue, len(item_ids))
    new_user = _numbers(user_table, len(user_ids))

    arrays, n_targets = _training(users, items, times, split.train, new_user, new_item, target, only_new_targets)
    arrays |= _everything(users, items, times, known, new_user, new_item, _offsets(n_known[user_table]))
    for stage, questions in (("validation", split.validation), ("test", split.test)):
        asked = new_user[questions.users].astype(np.int64)
        order = np.argsort(asked, kind="stable")  # the pairs lie in the order of user numbers
        # Inside a user the rows keep their order: the input is the first known ones.
        asked, stops = asked[order], (arrays["all_offsets"][asked] + questions.n_inputs)[order]
        rows = np.flatnonzero(questions.relevant)
        pairs = np.unique(new_user[users[rows]].astype(np.int64) * len(catalogue) + new_item[items[rows]])
        counts[f"{stage}_users_answerable"] = len(asked)
        counts[f"{stage}_relevant_before_history_removal"] = len(pairs)
        if drop_seen:
            pairs = pairs[~_seen(pairs, arrays, asked, stops, len(catalogue))]
        owners, relevant = np.divmod(pairs, len(catalogue))
        n_relevant = np.bincount(owners, minlength=len(user_table))[asked]
        kept = np.flatnonzero(n_relevant)
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


def _user_order(users: NDArray[np.int32], has_known: NDArray[np.bool_], split: Split) -> NDArray[np.int64]:
    """Old numbers of the users that have a known item: with training data, validation users, the others.

    Training users come first, so that their numbers do not depend on who appears later.
    """
    rank = np.where(has_known, 2, 3).astype(np.int8)
    rank[split.validation.users] = np.minimum(rank[split.validation.users], 1)
    rank[occurrences(users, len(rank), split.train) > 0] = 0
    order = np.argsort(rank, kind="stable")
    return order[: int((rank < 3).sum())]


def _numbers(table: NDArray[np.int64], n: int) -> NDArray[np.int32]:
    """``(n,)`` place of each old number in the table, -1 if it has none."""
    numbers = np.full(n, -1, dtype=np.int32)
    numbers[table] = np.arange(len(table), dtype=np.int32)
    return numbers


def _offsets(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def catalogue_hash(item_ids: pl.Series) -> str:
    """Sixteen hexadecimal digits that stand for the ids of the catalogue, in their order."""
    texts = item_ids.cast(pl.String)
    digest = hashlib.blake2b(str(item_ids.dtype.is_integer()).encode(), digest_size=8)
    digest.update(texts.str.len_bytes().cast(pl.Int64).to_numpy().tobytes())
    for start in range(0, len(texts), _IDS_AT_A_TIME):  # a list of Python strings takes far more than the text
        digest.update("".join(texts[start : start + _IDS_AT_A_TIME].to_list()).encode())
    return digest.hexdigest()


def _basket_numbers(users: NDArray[np.int32], times: NDArray[np.int64]) -> NDArray[np.int32]:
    """``(n,)`` number of the timestamp group inside its user, for rows in which users are runs."""
    begins_user = np.ones(len(users), dtype=bool)
    begins_user[1:] = users[1:] != users[:-1]
    begins = begins_user.copy()
    begins[1:] |= times[1:] != times[:-1]
    numbers = np.cumsum(begins) - 1
    return (numbers - np.maximum.accumulate(np.where(begins_user, numbers, 0))).astype(np.int32)


def _everything(
    users: NDArray[np.int32],
    items: NDArray[np.int32],
    times: NDArray[np.int64],
    known: NDArray[np.bool_],
    new_user: NDArray[np.int32],
    new_item: NDArray[np.int32],
    offsets: NDArray[np.int64],
) -> dict[str, NDArray[Any]]:
    """Histories of all users, known items only, each written where its new number has its place."""
    n = int(offsets[-1])
    arrays: dict[str, NDArray[Any]] = {
        "all_offsets": offsets,
        "all_items": np.empty(n, dtype=np.int32),
        "all_times": np.empty(n, dtype=np.int64),
        "all_baskets": np.empty(n, dtype=np.int32),
    }
    for block in user_blocks(users):
        rows = block.start + np.flatnonzero(known[block])
        owners = new_user[users[rows]]
        begins = np.flatnonzero(np.r_[True, owners[1:] != owners[:-1]][: len(owners)])
        lengths = np.diff(np.r_[begins, len(owners)])
        places = flat_ranges(offsets[owners[begins]], offsets[owners[begins]] + lengths)
        arrays["all_items"][places] = new_item[items[rows]]
        arrays["all_times"][places] = times[rows]
        arrays["all_baskets"][places] = _basket_numbers(owners, times[rows])
    return arrays


def _training(
    users: NDArray[np.int32],
    items: NDArray[np.int32],
    times: NDArray[np.int64],
    train: NDArray[np.bool_],
    new_user: NDArray[np.int32],
    new_item: NDArray[np.int32],
    target: Target,
    only_new: bool,
) -> tuple[dict[str, NDArray[Any]], int]:
    """Training histories, arrays from which targets are drawn, and the number of positions that have one.

    ``train_n_inputs (U,)`` positions of each user that have something after them. ``next_item`` with only new
    targets: ``train_is_new (M,)``. ``next_basket``: ``target_items``, ``target_offsets (number of baskets + 1,)`` the
    distinct (new) items of each basket, and ``basket_base (U,)`` the number of baskets of the users before.
    """
    parts: dict[str, list[NDArray[Any]]] = defaultdict(list)
    n_targets = 0
    for block in user_blocks(users):
        rows = block.start + np.flatnonzero(train[block])
        if not len(rows):
            continue
        # Training users are numbered first and in their order, so those of a block have consecutive numbers.
        owners = new_user[users[rows]]
        arrays, n = _training_block(
            owners - owners[0], new_item[items[rows]], times[rows], len(new_item), target, only_new
        )
        n_targets += n
        for name, array in arrays.items():
            parts[name].append(array)
    # Each list is let go as soon as it is joined, so that the parts are never there twice all together.
    joined = {name: np.concatenate(parts.pop(name)) for name in list(parts)}
    for lengths, offsets in (("train_lengths", "train_offsets"), ("target_counts", "target_offsets")):
        if lengths in joined:
            joined[offsets] = _offsets(joined.pop(lengths))
    if "n_baskets" in joined:
        joined["basket_base"] = _offsets(joined.pop("n_baskets"))[:-1]
    joined["train_users"] = np.arange(len(joined["train_offsets"]) - 1)
    return joined, n_targets


def _training_block(
    users: NDArray[np.int32],
    items: NDArray[np.int32],
    times: NDArray[np.int64],
    n_items: int,
    target: Target,
    only_new: bool,
) -> tuple[dict[str, NDArray[Any]], int]:
    """What :func:`_training` joins, of one block whose users count from 0: lengths where offsets will be."""
    lengths = np.bincount(users)
    offsets = _offsets(lengths)
    baskets = _basket_numbers(users, times)
    arrays: dict[str, NDArray[Any]] = {"train_items": items, "train_baskets": baskets, "train_lengths": lengths}
    if target == "next_item":
        has_target = np.ones(len(items), dtype=bool)
        has_target[offsets[:-1]] = False
        if only_new:
            arrays["train_is_new"] = _first_of_group(users, items, n_items)
            has_target &= arrays["train_is_new"]
        arrays["train_n_inputs"] = lengths - 1
        return arrays, int(has_target.sum())
    last_basket = baskets[offsets[1:] - 1].astype(np.int64)
    basket_base = np.cumsum(last_basket + 1) - last_basket - 1
    basket = np.repeat(basket_base, lengths) + baskets
    candidate = _first_of_group(users if only_new else basket, items, n_items)
    n_candidates = np.bincount(basket[candidate], minlength=int((last_basket + 1).sum()))
    n_events = np.bincount(basket)
    is_last = np.zeros(len(n_candidates), dtype=bool)
    is_last[basket_base + last_basket] = True
    arrays["train_n_inputs"] = lengths - n_events[is_last]
    arrays["n_baskets"] = last_basket + 1
    arrays["target_items"] = items[candidate]
    arrays["target_counts"] = n_candidates.astype(np.int32)
    return arrays, int(n_events[:-1][~is_last[:-1] & (n_candidates[1:] > 0)].sum())


def _first_of_group(groups: NDArray[np.integer], items: NDArray[np.int32], n_items: int) -> NDArray[np.bool_]:
    """``(M,) bool`` first row of each pair (group, item)."""
    return pl.Series(groups.astype(np.int64) * n_items + items).is_first_distinct().to_numpy()


def flat_ranges(starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[np.int64]:
    """``start_0, ..., stop_0 - 1, start_1, ...``: the positions of several slices, one after another."""
    lengths = stops - starts
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)


def _seen(
    pairs: NDArray[np.int64],
    arrays: dict[str, NDArray[Any]],
    asked: NDArray[np.int64],
    stops: NDArray[np.int64],
    n_items: int,
) -> NDArray[np.bool_]:
    """Which pairs (user, item), increasing, lie in the input of their user, for users ``asked`` that increase."""
    starts = arrays["all_offsets"][asked]
    seen = np.zeros(len(pairs), dtype=bool)
    ends = np.cumsum(stops - starts)
    cuts = np.searchsorted(ends, np.arange(0, ends.max(initial=0), splits.ROWS_AT_A_TIME))
    for begin, end in pairwise(np.unique([0, *cuts.tolist(), len(asked)]).tolist()):
        first, last = np.searchsorted(pairs, [asked[begin] * n_items, (asked[end - 1] + 1) * n_items])
        inputs = arrays["all_items"][flat_ranges(starts[begin:end], stops[begin:end])]
        of_users = np.repeat(asked[begin:end], stops[begin:end] - starts[begin:end])
        seen[first:last] = np.isin(pairs[first:last], of_users * n_items + inputs)
    return seen


def _refuse_nothing(counts: dict[str, Any], *, needs_validation: bool) -> None:
    wanted = {"train_targets": "no training position has a target", "test_users": "no user is left to test"}
    if needs_validation:
        wanted["validation_users"] = "no user is left to validate, sample more of them"
    for key, reason in wanted.items():
        if counts[key] == 0:
            known = ", ".join(f"{name} {value}" for name, value in counts.items())
            raise ValueError(f"nothing is left after step 'split': {reason} ({known})")
