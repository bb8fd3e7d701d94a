"""From files to prepared arrays: filters, order, split, layout, each step counted."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from datamodules.array_cache import Prepared
from datamodules.counter_hash import Purpose, chain, extend, hash_ids
from datamodules.histories import build_histories, catalogue_hash
from datamodules.sources.columns import Columns
from datamodules.sources.tabular import Interactions, read_interactions
from datamodules.splits import Target, enough, global_time_split, leave_last_out_split, occurrences, user_blocks

_MOST_BLOCKS_OF_A_SORT = 32

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparationSettings:
    """Everything but the content of the files that the prepared arrays depend on: the key of the cache.

    Attributes:
        columns: Columns and conditions.
        min_item_count: Items with fewer interactions are dropped.
        min_user_count: Then users with fewer are dropped.
        split: Which rule of :mod:`datamodules.splits`.
        test_fraction: Of ``global_time``, else None.
        validation_user_fraction: Of ``global_time``, else None.
        target: What is asked for.
        drop_seen: Whether items of the input history are taken out of the questions.
        only_new_targets: Whether repeats are no training targets.
        seed: Of ties and validation users.
    """

    columns: Columns
    min_item_count: int
    min_user_count: int
    split: Literal["global_time", "leave_last_out"]
    test_fraction: float | None
    validation_user_fraction: float | None
    target: Target
    drop_seen: bool
    only_new_targets: bool
    seed: int


def prepare_histories(files: Sequence[Path], settings: PreparationSettings) -> Prepared:
    """Read, filter, order, split and lay out. At its peak it takes about 60 bytes a row kept.

    Args:
        files: CSV and Parquet files.
        settings: What to do with them.

    Returns:
        As :func:`build_histories`; ``facts`` hold ``steps`` and ``train_digest`` too.

    Raises:
        ValueError: In one line, if the files cannot serve, a step leaves nothing or one user alone.
    """
    table = read_interactions(files, settings.columns)
    steps, user_ids, item_ids = table.steps, table.user_ids, table.item_ids
    if len(user_ids) == 1:
        raise ValueError(f"at least 2 users are needed, got 1: user {user_ids[0]!r} in {files[0]}")
    kept = enough(table.items, settings.min_item_count)
    steps.append(_step(f"min_item_count {settings.min_item_count}", table, kept))
    # Users are counted among what the item filter has left.
    kept &= (occurrences(table.users, len(user_ids), kept) >= settings.min_user_count)[table.users]
    steps.append(_step(f"min_user_count {settings.min_user_count}", table, kept))
    if steps[-1]["users"] == 1:
        user = user_ids[int(table.users[kept][0])]
        raise ValueError(f"at least 2 users are needed, got 1 after step {steps[-1]['step']!r}: user {user!r}")

    user_words = hash_ids(user_ids)
    users, items, times = _in_order(table, kept, user_words, settings.seed)
    del table, kept  # 17 bytes a row that are needed no more
    if settings.split == "global_time":
        assert settings.test_fraction is not None
        assert settings.validation_user_fraction is not None
        split = global_time_split(
            users,
            items,
            times,
            test_fraction=settings.test_fraction,
            validation_user_fraction=settings.validation_user_fraction,
            user_words=chain(settings.seed, Purpose.VALIDATION_USER, user_words),
            target=settings.target,
        )
    else:
        split = leave_last_out_split(users, items, times, target=settings.target)
    prepared = build_histories(
        users,
        items,
        times,
        split,
        user_ids=user_ids,
        item_ids=item_ids,
        target=settings.target,
        only_new_targets=settings.only_new_targets,
        drop_seen=settings.drop_seen,
    )
    for name, count in prepared.facts["split"].items():
        logger.info("%s: %s", name, count)
    prepared.facts["steps"] = steps
    prepared.facts["train_digest"] = _train_digest(prepared)
    return prepared


def _train_digest(prepared: Prepared) -> str:
    """Sixteen hexadecimal digits for the training histories, in numbers of the catalogue, and ids of their users."""
    digest = hashlib.blake2b(digest_size=8)
    for name in ("train_offsets", "train_items", "train_baskets"):
        digest.update(prepared.arrays[name].data)
    digest.update(catalogue_hash(prepared.user_ids[: len(prepared.arrays["train_users"])]).encode())
    return digest.hexdigest()


def _in_order(
    table: Interactions, kept: NDArray[np.bool_], user_words: NDArray[np.uint64], seed: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
    """Users, items and times by user, time, order column, and a hash that knows nothing of the file.

    Users are sorted some at a time: their rows are picked from the table, sorted alone and written behind those of the
    users before.
    """
    counts = occurrences(table.users, len(user_words), kept)
    users = np.repeat(np.arange(len(counts), dtype=np.int32), counts)  # as the sort will have them
    items, times = np.empty(len(users), dtype=np.int32), np.empty(len(users), dtype=np.int64)
    item_words = hash_ids(table.item_ids)
    # Each block reads the whole table: with ever more blocks the time would grow with the square of the rows.
    for block in user_blocks(users, at_most=_MOST_BLOCKS_OF_A_SORT):
        first, last = users[block.start], users[block.stop - 1]
        rows = np.flatnonzero(kept & (table.users >= first) & (table.users <= last))
        owners, bought, when = table.users[rows], table.items[rows], table.times[rows]
        ties = chain(seed, Purpose.TIE, user_words[owners], item_words[bought], when)
        keys: dict[str, NDArray[Any]] = {"user": owners, "time": when}
        if table.order is not None:
            keys["order"] = table.order[rows]
        order = _arg_sort(keys | {"tie": ties, "item": bought})
        # Equal lines have one word and lie side by side: the n-th of them gets a word of its own, wherever it stood.
        first = np.zeros(len(rows), dtype=bool)
        for column in (*keys.values(), bought):
            first[1:] |= column[order][1:] != column[order][:-1]
        first[:1] = True
        if not first.all():
            places = np.arange(len(rows))
            nth = places - np.maximum.accumulate(np.where(first, places, 0))
            again = order[~first]
            ties[again] = extend(ties[again], nth[~first])
            order = _arg_sort(keys | {"tie": ties, "item": bought})
        items[block], times[block] = bought[order], when[order]
    return users, items, times


def _arg_sort(columns: dict[str, NDArray[Any]]) -> NDArray[np.integer]:
    frame = pl.DataFrame(columns)
    return frame.select(pl.arg_sort_by(*frame.columns)).to_series().to_numpy()


def _step(name: str, table: Interactions, kept: NDArray[np.bool_]) -> dict[str, str | int]:
    """Count what a step has left, and refuse nothing."""
    n_users = np.count_nonzero(occurrences(table.users, len(table.user_ids), kept))
    n_items = np.count_nonzero(occurrences(table.items, len(table.item_ids), kept))
    logger.info("%s: %d interactions, %d users, %d items", name, kept.sum(), n_users, n_items)
    if not kept.any():
        raise ValueError(f"nothing is left after step {name!r}: 0 of {len(kept)} interactions")
    return {"step": name, "interactions": int(kept.sum()), "users": n_users, "items": n_items}
