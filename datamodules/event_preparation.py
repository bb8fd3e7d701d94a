"""From files of events to prepared arrays: split, vocabularies, normalisers, and a log that targets are read from."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from datamodules.array_cache import CacheFolder, Prepared
from datamodules.counter_hash import Purpose, Words, chain, hash_ids
from datamodules.sources.cells import open_table, require_columns
from datamodules.sources.events import DAY, MISSING, EventColumns, EventTable, read_events

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
NumericTransform = Literal["none", "signed_log"]

FOREVER = 2**63 - 1
"""A time after every event."""

MOSTLY = 0.5
"""Share of unknown categories from which on something is likely wrong with how they are written."""
CLOCKS = tuple(DAY // parts for parts in (1, 24, 1440, 86_400, 86_400_000, DAY))
"""Ticks of the clocks that a log may have been written by, in microseconds: a day, hour, minute, s, ms, us."""

UNKNOWN = 1
"""Id of a category that training does not have; 0 is padding."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EventSettings:
    """Everything but the content of the files that the prepared arrays depend on: the key of the cache.

    Attributes:
        columns: Columns and conditions, those of targets included.
        categorical: Columns that are categorical features.
        numeric: Columns that are numeric features.
        numeric_transform: ``signed_log`` is f(a) = sign(a) ln(1 + |a|), before normalisation.
        max_categories: Most categories of a column, the most frequent of training; None is all.
        users_join_column: Column of user ids in the table of users.
        label_columns: Columns of static labels there.
        split: By ``users`` or by ``time``.
        validation_fraction: Of the users.
        test_fraction: Of the users.
        validation_start: T1, ISO 8601; time split only.
        test_start: T2, ISO 8601; time split only.
        seed: Of the folds of users.
    """

    columns: EventColumns
    categorical: tuple[str, ...]
    numeric: tuple[str, ...]
    numeric_transform: NumericTransform
    max_categories: int | None
    users_join_column: str
    label_columns: tuple[str, ...]
    split: Literal["users", "time"]
    validation_fraction: float
    test_fraction: float
    validation_start: str | None
    test_start: str | None
    seed: int


@dataclass(frozen=True)
class EventLog:
    """Raw events and labels, and who may see which of them. E events, U users, Q queries.

    Attributes:
        offsets: ``(U + 1,) int64``.
        times: ``(E,) int64`` microseconds.
        codes: Column -> ``(E,) int32`` place in ``names``.
        names: Column -> distinct texts, increasing.
        numbers: Column -> ``(E,) float64``, NaN where missing.
        static: Label column -> ``(U,) int64`` place in ``static_names``, -1 where missing.
        static_names: Label column -> distinct texts, increasing.
        user_folds: ``(U,) int8`` 0 train, 1 validation, 2 test.
        user_words: ``(U,) uint64`` hash of each original id, for draws that do not depend on who else is there.
        by_time: Whether time decides the fold of a query, and not the user.
        validation_start: T1 of the time split, else ``FOREVER``.
        test_start: T2 of the time split, else ``FOREVER``.
        n_before: Least own events before a query.
        observed_until: End of the observation, exclusive; None is the first microsecond after the last event.
        clock: ``tick``, where it is known; None is what the training events tell.
    """

    offsets: Ints
    times: Ints
    codes: dict[str, NDArray[np.int32]]
    names: dict[str, list[str]]
    numbers: dict[str, NDArray[np.float64]]
    static: dict[str, Ints]
    static_names: dict[str, list[str]]
    user_folds: NDArray[np.int8]
    user_words: Words
    by_time: bool
    validation_start: int
    test_start: int
    n_before: int
    observed_until: int | None = None
    clock: int | None = None

    @property
    def n_users(self) -> int:
        """U."""
        return len(self.offsets) - 1

    @cached_property
    def end(self) -> int:
        """End of the observation, exclusive: by default the first microsecond after the last event."""
        return int(self.times.max()) + 1 if self.observed_until is None else self.observed_until

    @cached_property
    def tick(self) -> int:
        """Microseconds between two time stamps of the log's clock: the largest of ``CLOCKS`` that divides them all.

        An event stamped t may have happened at any moment of [t, t + tick). Divided are differences of stamps, so that
        midnights of any zone are days: the hour of summer time was taken off when they were read. The stamps
        are those of training, as for every statistic: where later ones are finer, the tick is longer than it need be.
        """
        if self.clock is not None:
            return self.clock
        common = int(np.gcd.reduce(np.diff(self.times[self.train_rows])))
        return next(tick for tick in CLOCKS if common % tick == 0)

    def inside_ticks(self, times: Ints) -> Bools:
        """``(Q,)``: moments between two stamps, at which what carries the earlier one counts as known."""
        return (times - self.stamp) % self.tick != 0

    @cached_property
    def stamp(self) -> int:
        """A stamp of training, from which the ticks of the clock count."""
        return int(self.times[self.train_rows.argmax()])

    @cached_property
    def users(self) -> Ints:
        """``(E,)`` user of each event."""
        return np.repeat(np.arange(self.n_users), np.diff(self.offsets))

    @cached_property
    def train_rows(self) -> Bools:
        """``(E,)`` events that training may see."""
        return self.times < self.validation_start if self.by_time else (self.user_folds == 0)[self.users]

    @cached_property
    def _keys(self) -> tuple[Ints, Ints]:
        """Distinct times, and the increasing composite key (user, rank of the time) of each event."""
        distinct = np.unique(self.times)
        return distinct, self.users * (len(distinct) + 1) + np.searchsorted(distinct, self.times)

    def before(self, users: Ints, times: Ints) -> Ints:
        """``(Q,)`` flat row one past the user's last event with time < t."""
        distinct, keys = self._keys
        return np.searchsorted(keys, users * (len(distinct) + 1) + np.searchsorted(distinct, times, side="left"))

    def through(self, users: Ints, times: Ints) -> Ints:
        """``(Q,)`` flat row one past the user's last event with time <= t."""
        distinct, keys = self._keys
        return np.searchsorted(keys, users * (len(distinct) + 1) + np.searchsorted(distinct, times, side="right"))

    def happened(self, users: Ints, times: Ints) -> Ints:
        """``(Q,)`` flat row one past the user's last event that has happened by t.

        An event stamped t happens until the next tick of the clock: on a log of dates it comes after t, and a horizon
        begins with it; where nothing finer than a microsecond is known it is at t itself, neither before nor after.
        """
        return self.before(users, times) if self.tick > 1 else self.through(users, times)

    def folds(self, users: Ints, times: Ints, until: Ints, *, disjoint_users: bool) -> NDArray[np.int8]:
        """Fold of each query, -1 where it belongs to none.

        By users: the user's fold, if ``until`` lies before the end of the file. By time: the fold in whose period
        both t and ``until`` lie, [.., T1), [T1, T2), [T2, end); so a label never reaches into the next period.

        Args:
            users: ``(Q,)``.
            times: ``(Q,)`` microseconds.
            until: ``(Q,)`` last moment that the label looks at.
            disjoint_users: By time, whether a query also needs its user's fold to be this one (static labels).
        """
        if not self.by_time:
            return np.where(until < self.end, self.user_folds[users], -1).astype(np.int8)
        limits = np.array([self.validation_start, self.test_start])
        fold = np.searchsorted(limits, times, side="right")
        fits = (fold == np.searchsorted(limits, until, side="right")) & (until < self.end)
        if disjoint_users:
            fits &= fold == self.user_folds[users]
        return np.where(fits, fold, -1).astype(np.int8)

    def microseconds(self, days: float) -> int:
        """A horizon in the unit of the times."""
        return round(days * DAY)

    def part(self, users: Ints, stop: int) -> tuple["EventLog", Ints]:
        """The events before ``stop`` of some users, as a log of the same observation and clock; and who still has any.

        Args:
            users: ``(n,)``, increasing.
            stop: Microseconds.

        Returns:
            The log, whose user i is user ``kept[i]`` of this one; ``kept (m,)``.
        """
        wanted = np.zeros(self.n_users, dtype=bool)
        wanted[users] = True
        rows = wanted[self.users] & (self.times < stop)
        counts = np.bincount(self.users[rows], minlength=self.n_users)
        kept = np.flatnonzero(counts)
        return replace(
            self,
            offsets=np.concatenate([[0], np.cumsum(counts[kept])]).astype(np.int64),
            times=self.times[rows],
            codes={name: codes[rows] for name, codes in self.codes.items()},
            numbers={name: numbers[rows] for name, numbers in self.numbers.items()},
            static={name: labels[kept] for name, labels in self.static.items()},
            user_folds=self.user_folds[kept],
            user_words=self.user_words[kept],
            observed_until=self.end,
            clock=self.tick,  # fewer stamps might look like those of a coarser one
        ), kept


def prepare_events(files: Sequence[Path], users_path: Path | None, settings: EventSettings) -> Prepared:
    """Read, split, code and normalise; statistics are of training events alone.

    A category's id is 2 + its rank by falling frequency in training, ties by name; ``max_categories`` and training
    decide what is known. Numbers become (f(a) - mean) / sd, a missing one 0, a constant column 0.

    Returns:
        Arrays of the contract of the events (``categorical``, ``numeric``, ``times``, ``offsets``, maybe ``groups``),
        raw ``codes`` and ``numbers``, ``user_folds``, ``static``; facts with vocabularies, means, deviations,
        ``median_gap`` (days, of the positive gaps between a user's training events) and counts.

    Raises:
        ValueError: In one line, if the files cannot serve, training has no events, or a date of the time split lies
            outside the data.
    """
    table = read_events(files, settings.columns)
    user_words = hash_ids(table.user_ids)
    users = np.repeat(np.arange(len(table.user_ids)), np.diff(table.offsets))
    folds = table.folds if table.folds is not None else _draw_folds(user_words, settings)
    if settings.split == "time":
        train = _time_split(table, files, settings)
    else:
        train = (folds == 0)[users]
        if not train.any():
            raise ValueError(f"{files[0]}: no train users: {len(folds)} users, none in fold train")

    vocabularies, categorical, unknown = _categories(table, train, settings)
    numeric, means, deviations = _normalised(table, train, settings)
    gaps = np.diff(table.times)[(users[1:] == users[:-1]) & train[1:] & train[:-1]]
    positive = gaps[gaps > 0]
    static, static_names = _static_labels(users_path, table.user_ids, settings)
    digest = hashlib.blake2b(digest_size=16)
    # With static labels the folds of users decide what is trained on, under the time split too.
    asked = folds[users][train] if settings.label_columns else np.zeros(0)
    for array in (user_words[users][train], table.times[train], categorical[train], numeric[train], asked):
        digest.update(np.ascontiguousarray(array).tobytes())
    texts = [name for names in table.names for name in names]
    arrays: dict[str, NDArray[Any]] = {
        "categorical": categorical,
        "numeric": numeric,
        "times": table.times,
        "offsets": table.offsets,
        "codes": table.codes,
        "numbers": table.numbers,
        "user_folds": folds,
        "user_words": user_words,
        "static": static,
    }
    if table.groups is not None:
        arrays["groups"] = table.groups
    for name, count in unknown.items():
        if count:
            level = logging.WARNING if count > MOSTLY * (~train).sum() else logging.INFO
            told = "column %r: %d of %d events after training have a category that it does not know"
            logger.log(level, told, name, count, (~train).sum())
    return Prepared(
        arrays=arrays,
        user_ids=table.user_ids,
        item_ids=pl.Series("names", texts, dtype=pl.String),
        facts={
            "name_counts": [len(names) for names in table.names],
            "vocabularies": vocabularies,
            "means": means,
            "deviations": deviations,
            "median_gap": float(np.median(positive)) / DAY if len(positive) else 1.0,
            "static_names": static_names,
            "train_digest": digest.hexdigest(),
            "counts": table.counts
            | {
                "users": len(table.user_ids),
                "users by fold": np.bincount(folds, minlength=3).tolist(),
                "train events": int(train.sum()),
                "train users": len(np.unique(users[train])),
                "unknown categories after training": unknown,
                "first event": str(np.datetime64(int(table.times.min()), "us")),
                "last event": str(np.datetime64(int(table.times.max()), "us")),
            },
        },
    )


def open_log(folder: CacheFolder, settings: EventSettings, n_before: int, clock: int | None = None) -> EventLog:
    """The log of a prepared folder; ``n_before`` and ``clock`` as in :class:`EventLog`."""
    texts = folder.ids("item_ids").to_list()
    limits = np.concatenate([[0], np.cumsum(folder.facts["name_counts"])]).astype(int)
    columns = settings.columns
    codes, numbers, static = (folder.array(name) for name in ("codes", "numbers", "static"))
    return EventLog(
        offsets=folder.array("offsets"),
        times=folder.array("times"),
        codes={name: codes[:, place] for place, name in enumerate(columns.texts)},
        names={name: texts[limits[place] : limits[place + 1]] for place, name in enumerate(columns.texts)},
        numbers={name: numbers[:, place] for place, name in enumerate(columns.numbers)},
        static={name: static[:, place] for place, name in enumerate(settings.label_columns)},
        static_names=folder.facts["static_names"],
        user_folds=folder.array("user_folds"),
        user_words=folder.array("user_words"),
        by_time=settings.split == "time",
        validation_start=moment(settings.validation_start),
        test_start=moment(settings.test_start),
        n_before=n_before,
        clock=clock,
    )


def moment(text: str | None) -> int:
    """Microseconds of an ISO 8601 date or time in UTC; ``FOREVER`` without one."""
    return FOREVER if text is None else int(np.datetime64(text, "us").astype(np.int64))


def _draw_folds(user_words: Words, settings: EventSettings) -> NDArray[np.int8]:
    """Test users have the lowest words, validation users the next; at least one each unless the fraction is 0."""
    n_users = len(user_words)
    order = np.argsort(chain(settings.seed, Purpose.VALIDATION_USER, user_words), kind="stable")
    n_test, n_validation = (
        max(1, round(fraction * n_users)) if fraction else 0
        for fraction in (settings.test_fraction, settings.validation_fraction)
    )
    folds = np.zeros(n_users, dtype=np.int8)
    folds[order[:n_test]] = 2
    folds[order[n_test : n_test + n_validation]] = 1
    return folds


def _time_split(table: EventTable, files: Sequence[Path], settings: EventSettings) -> Bools:
    first, last = int(table.times.min()), int(table.times.max())
    for name in ("validation_start", "test_start"):
        said = getattr(settings, name)
        if not first < moment(said) <= last:
            raise ValueError(
                f"{files[0]}: {name} {said} must lie in the data, after {np.datetime64(first, 'us')} and not after "
                f"{np.datetime64(last, 'us')}"
            )
    return table.times < moment(settings.validation_start)


def _categories(
    table: EventTable, train: Bools, settings: EventSettings
) -> tuple[dict[str, list[str]], NDArray[np.int64], dict[str, int]]:
    categorical = np.empty((len(table.times), len(settings.categorical)), dtype=np.int64)
    vocabularies, unknown = {}, {}
    for feature, name in enumerate(settings.categorical):
        place = settings.columns.texts.index(name)
        codes, names = table.codes[:, place], table.names[place]
        counts = np.bincount(codes[train], minlength=len(names))
        known = np.argsort(-counts, kind="stable")[: int((counts > 0).sum())][: settings.max_categories]
        ids = np.full(len(names), UNKNOWN, dtype=np.int64)
        ids[known] = np.arange(len(known)) + 2
        categorical[:, feature] = ids[codes]
        vocabularies[name] = [names[code] for code in known]
        unknown[name] = int((counts[codes[~train]] == 0).sum())
    return vocabularies, categorical, unknown


def _normalised(
    table: EventTable, train: Bools, settings: EventSettings
) -> tuple[NDArray[np.float32], list[float], list[float]]:
    raw = table.numbers[:, [settings.columns.numbers.index(name) for name in settings.numeric]]
    if settings.numeric_transform == "signed_log":
        raw = np.sign(raw) * np.log1p(np.abs(raw))
    means, deviations = np.zeros(raw.shape[1]), np.ones(raw.shape[1])
    for place in range(raw.shape[1]):
        # Training rows alone are summed, so that not even rounding knows what else is in the file.
        seen = raw[train, place]
        seen = seen[~np.isnan(seen)]
        if len(seen):
            means[place], deviations[place] = seen.mean(), seen.std()
    deviations[deviations <= 1e-12 * np.maximum(1, np.abs(means))] = 1  # a constant column carries nothing
    normalised = np.nan_to_num((raw - means) / deviations).astype(np.float32)
    return normalised, means.tolist(), deviations.tolist()


def _static_labels(
    path: Path | None, user_ids: pl.Series, settings: EventSettings
) -> tuple[Ints, dict[str, list[str]]]:
    static = np.full((len(user_ids), len(settings.label_columns)), -1, dtype=np.int64)
    names: dict[str, list[str]] = {}
    if path is None:
        return static, names
    frame = open_table(path)
    join = settings.users_join_column
    require_columns(path, frame, {join: "users_join_column"} | dict.fromkeys(settings.label_columns, "label_columns"))
    ids = frame[join].cast(pl.String)
    if ids.has_nulls() or ids.is_duplicated().any():
        row = int((ids.is_null() | (ids.is_duplicated() & ~ids.is_first_distinct())).arg_max() or 0)
        what = "is missing" if ids[row] is None else f"user {ids[row]!r} occurs twice"
        raise ValueError(f"{path}: column {join!r}, row {row + 1}: {what}")
    known = pl.DataFrame({"id": user_ids.cast(pl.String)})
    matched = known.join(frame.with_columns(id=ids), on="id", how="left", maintain_order="left")
    if not known["id"].is_in(ids.implode()).any():
        raise ValueError(f"{path}: column {join!r}: none of {len(ids)} users occurs in the events")
    for place, name in enumerate(settings.label_columns):
        said = matched[name].cast(pl.String).replace({"": None, MISSING: None})
        names[name] = said.drop_nulls().unique().sort().to_list()
        codes = said.rank("dense").cast(pl.Int64) - 1
        static[:, place] = codes.fill_null(-1).to_numpy()
    return static, names
