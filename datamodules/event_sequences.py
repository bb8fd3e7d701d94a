"""EventSequencesDataModule: histories of users from CSV and Parquet to batches that can be asked at any time."""

import datetime
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from datamodules.array_cache import CacheFolder, content_digests, open_or_build
from datamodules.counter_hash import Purpose, chain
from datamodules.epoch_sampler import EpochLoader, place_among, single_batch_loader
from datamodules.event_batches import (
    EventTrainingSequences,
    Queries,
    SequenceSampler,
    TrainingFacts,
    flat_events,
    query_tensors,
)
from datamodules.event_preparation import (
    CLOCKS,
    FOREVER,
    EventLog,
    EventSettings,
    Ints,
    NumericTransform,
    moment,
    open_log,
    prepare_events,
)
from datamodules.event_published import FinalDays
from datamodules.event_targets import INSTEAD, EventTarget, LocalLabel, StaticLabel
from datamodules.label_checks import asks_by_outcome, check_labels, warnings_of
from datamodules.sources.cells import TABLE_ENDINGS
from datamodules.sources.events import Duplicates, EventColumns, NumberUnit, parse_expression
from datamodules.sources.file_names import resolve_paths

NO_PROOF = (
    "A low AUC is no proof that nothing leaks: a label may be told by several features together, by the order of "
    "events, or by which rows are in the file at all."
)
"""Sentence that goes with every report of label checks."""

_FORMAT = 3  # part of the cache's key: raised when the arrays of events change in meaning

logger = logging.getLogger(__name__)


class EventSequencesDataModule(LightningDataModule):
    """Events of users with absolute times: batches for training, and one batch of events and queries for the rest.

    Files are read once, in a stream, into a cache of memory-mapped arrays. E events, U users, F categorical and M
    numeric features, B sequences, L steps, Q queries. Times are int64 microseconds since 1970-01-01 UTC.

    * Train batch, see :class:`~datamodules.event_batches.EventTrainingSequences`: ``categorical (B, L, F)``, ``numeric
      (B, L, M)``, ``times (B, L)``, ``mask (B, L)``, ``users (B,)``, ``starts (B,)``; ``query_times (B,)`` and
      ``labels (B,)`` with ``TailWindows``.
    * Validation, test and predict: one batch. ``events`` (``categorical (E, F) int64``, ids 0 padding, 1 unknown,
      2.. by falling frequency in training; ``numeric (E, M) float32``; ``times (E,)``; ``offsets (U + 1,)``; maybe
      ``groups (U,)``, -1 for none), ``user_ids``, ``queries`` by target (``users``, ``times``, ``labels (Q,) int64``,
      ``fold (Q,) int8``, ``n_classes``, ``scope``, ``outcome_dependent``, ``description``), ``context_users (n,)``,
      ``train_stop``, ``split``, ``feature_names``, ``category_names`` of the first categorical feature.

    Splits. ``users``: a seeded hash of the id, or ``fold_column``, puts each user in one fold; the validation batch
    has no events of test users. ``time``: training sees events before T1 = ``validation_start``, the validation batch
    those before T2 = ``test_start``; labels do not reach over T1 or T2. With a static label, which time does not
    change, a user is asked in one fold only. Vocabularies, means, deviations, thresholds and the median gap are of
    training events.

    Events need not be sorted; those of one user and time keep the order of ``order_column``, else of the files.

    Source: kernel_attention.md, sections 2, 7, 8, 13, 15.

    Args:
        paths: CSV or Parquet files, globs, or ``bundled:online_retail``.
        user_column: Column of user ids, integers or strings.
        time_column: Column of absolute times: dates, times, ISO 8601 text, or numbers with ``time_unit``.
        categorical: Columns of categorical features, at least one; an empty cell is a category.
        numeric: Columns of numeric features.
        order_column: Column of integers or dates that orders a user's events of one time.
        time_format: strptime form of times given as text.
        time_unit: Unit of times given as numbers since 1970.
        relative_times: Whether times before 1971 are allowed.
        max_time: Last day that may occur; None is today.
        where: SQL conditions on the rows, computed row by row and not of labels; a row is kept if all are true.
        derived: Name -> SQL expression of a column computed row by row, such as ``quantity * unit_price``.
        numeric_transform: ``signed_log`` is sign(a) ln(1 + |a|), before normalisation.
        missing_numbers: Whether an empty numeric cell is an error, or is given the mean of training.
        max_categories: Most categories of a column; rarer ones are unknown.
        duplicates: What becomes of rows that agree in every column read.
        users_path: Table of users with static labels.
        users_join_column: Column of user ids there; None is ``user_column``.
        label_columns: Columns of static labels there.
        local_label_columns: Columns of labels of single events.
        group_column: Column with one value a user, an empty cell being no group; a context may leave out a user's own
            group.
        fold_column: Column of ``train``, ``validation``, ``test``, one for each user; user split.
        split: By ``users`` or by ``time``.
        validation_fraction: Of the users, in [0, 1).
        test_fraction: Of the users, in (0, 1).
        validation_start: T1 of the time split, ISO 8601.
        test_start: T2, after T1.
        min_events: Least own events before a query; counted in the past alone, so that it tells nothing of the label.
        sampler: What training batches are; None is no training.
        targets: Name -> what is asked.
        reference_mode: Whether rules whose time depends on the outcome, and labels that do, are allowed; they are
            marked. Rules that follow an event ask one microsecond after it, as published, and not at the next tick of
            the log's clock.
        batch_size: Users, or queries of ``TailWindows``, in a training batch and process.
        num_workers: Worker processes of training.
        seed: Of the folds.
        sampling_seed: Of order and windows of training; None is the seed of PyTorch's generator, so that
            ``seed_everything`` moves them and the split stays.
        cache_dir: Folder of the cache.

    Raises:
        ValueError: If an argument is out of its range, a label is also a feature or decides groups, folds, order, times
            or which rows are kept, a rule or label says that it depends on the outcome without ``reference_mode``; on
            first use, if the files cannot serve, or a rule asks at other moments where later events are cut off or
            labels are exchanged.
        FileNotFoundError: On first use, if no file matches.
    """

    def __init__(
        self,
        *,
        paths: str | list[str],
        user_column: str,
        time_column: str,
        categorical: list[str],
        numeric: list[str] | None = None,
        order_column: str | None = None,
        time_format: str | None = None,
        time_unit: NumberUnit | None = None,
        relative_times: bool = False,
        max_time: str | None = None,
        where: list[str] | None = None,
        derived: dict[str, str] | None = None,
        numeric_transform: NumericTransform = "none",
        missing_numbers: Literal["error", "mean"] = "error",
        max_categories: int | None = None,
        duplicates: Duplicates = "error",
        users_path: str | None = None,
        users_join_column: str | None = None,
        label_columns: list[str] | None = None,
        local_label_columns: list[str] | None = None,
        group_column: str | None = None,
        fold_column: str | None = None,
        split: Literal["users", "time"] = "users",
        validation_fraction: float = 0.1,
        test_fraction: float = 0.1,
        validation_start: str | None = None,
        test_start: str | None = None,
        min_events: int = 1,
        sampler: SequenceSampler | None = None,
        targets: dict[str, EventTarget] | None = None,
        reference_mode: bool = False,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 42,
        sampling_seed: int | None = None,
        cache_dir: str = ".seqlit_cache",
    ) -> None:
        _check_choice("numeric_transform", numeric_transform, ("none", "signed_log"))
        _check_choice("missing_numbers", missing_numbers, ("error", "mean"))
        _check_choice("duplicates", duplicates, ("keep", "drop", "error"))
        _check_choice("time_unit", time_unit, ("s", "ms", "us", "days", None))
        _check_choice("split", split, ("users", "time"))
        if not categorical:
            raise ValueError("categorical must name at least one column, got none")
        for name, size in (("min_events", min_events), ("batch_size", batch_size), ("max_categories", max_categories)):
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {num_workers}")
        if not (0 < test_fraction < 1 and 0 <= validation_fraction < 1 - test_fraction):
            raise ValueError(
                f"0 < test_fraction, 0 <= validation_fraction and their sum below 1 must hold, got test_fraction "
                f"{test_fraction} and validation_fraction {validation_fraction}"
            )
        limits = {"validation_start": validation_start, "test_start": test_start}
        if split == "time":
            starts = {name: _date(name, limit) for name, limit in limits.items()}
            if starts["validation_start"] >= starts["test_start"]:
                raise ValueError(f"validation_start must lie before test_start, got {limits}")
            if fold_column is not None:
                raise ValueError(f"fold_column is for the user split, got {fold_column!r} with split 'time'")
        elif any(limit is not None for limit in limits.values()):
            raise ValueError(f"validation_start and test_start are for split 'time', got {limits} with 'users'")
        if max_time is not None:
            _date("max_time", max_time)
        targets, numeric = targets or {}, numeric or []
        labels, local_labels = label_columns or [], local_label_columns or []
        roles = {"user_column": user_column, "time_column": time_column, "group_column": group_column}
        roles |= {"order_column": order_column, "fold_column": fold_column}
        _check_labels([*categorical, *numeric], roles, [*labels, *local_labels], derived or {}, where or [])
        _check_targets(targets, labels, local_labels, reference_mode)
        if labels and users_path is None:
            raise ValueError(f"label_columns are read from users_path, got {labels} without it")
        super().__init__()
        self._paths, self._users_path = paths, users_path
        texts = [*categorical, *local_labels, *(name for target in targets.values() for name in target.texts)]
        numbers = [*numeric, *(name for target in targets.values() for name in target.numbers)]
        self._settings = EventSettings(
            columns=EventColumns(
                user=user_column,
                time=time_column,
                order=order_column,
                texts=tuple(dict.fromkeys(texts)),
                numbers=tuple(dict.fromkeys(numbers)),
                required_numbers=tuple(numeric) if missing_numbers == "error" else (),
                group=group_column,
                fold=fold_column,
                derived=tuple((derived or {}).items()),
                where=tuple(where or ()),
                time_format=time_format,
                time_unit=time_unit,
                relative_times=relative_times,
                max_time=max_time,
                duplicates=duplicates,
            ),
            categorical=tuple(categorical),
            numeric=tuple(numeric),
            numeric_transform=numeric_transform,
            max_categories=max_categories,
            users_join_column=users_join_column or user_column,
            label_columns=tuple(labels),
            split=split,
            validation_fraction=validation_fraction,
            test_fraction=test_fraction,
            validation_start=validation_start,
            test_start=test_start,
            seed=seed,
        )
        self._min_events = min_events
        self._sampler = sampler
        self._targets = targets
        self._local_labels = tuple(local_labels)
        self._reference_mode = reference_mode
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._sampling_seed = sampling_seed
        self._cache_dir = Path(cache_dir).expanduser().absolute()
        self._cache: CacheFolder | None = None
        self._log: EventLog | None = None
        self._queries: Queries | None = None
        self._checks: dict[str, list[dict[str, Any]]] = {}
        self._warnings: list[str] = []

    def prepare_data(self) -> None:
        """Write the cache, unless it is there."""
        self._folder()

    def setup(self, stage: str) -> None:
        """Open the cache, label the queries, check the labels and warn."""
        self._asked()

    def train_dataloader(self) -> DataLoader:
        """Training windows; order and windows are a function of (sampling seed, epoch) alone."""
        if self._sampler is None:
            raise ValueError("sampler must be given to train, such as datamodules.event_batches.ColesSlices")
        if self._sampling_seed is None:
            self._sampling_seed = torch.initial_seed() % 2**31
        sequences = EventTrainingSequences(self._folder(), self._training_facts(self._sampling_seed), self._sampler)
        return EpochLoader(
            sequences,
            rows=self._batch_size,
            shuffled=True,
            seed=self._sampling_seed,
            **place_among(self.trainer),
            num_workers=self._num_workers,
        )

    def val_dataloader(self) -> DataLoader:
        """One batch: what may be known before the test, and queries of folds 0 and 1."""
        log = self._events_log()
        keep = log.times < log.test_start if log.by_time else (log.user_folds != 2)[log.users]
        return single_batch_loader(self._batch(keep, (0, 1)))

    def test_dataloader(self) -> DataLoader:
        """One batch: everything."""
        return single_batch_loader(self._batch(None, (0, 1, 2)))

    def predict_dataloader(self) -> DataLoader:
        """One batch: everything."""
        return self.test_dataloader()

    @property
    def vocabulary_sizes(self) -> list[int]:
        """Number of ids of each categorical feature, padding and unknown included; linked into the model."""
        return [len(self._vocabularies[name]) + 2 for name in self._settings.categorical]

    @property
    def n_numeric(self) -> int:
        """M; linked into the model."""
        return len(self._settings.numeric)

    @property
    def median_gap(self) -> float:
        """Median time in days between successive events of a user in training, ties in time left out."""
        return float(self._folder().facts["median_gap"])

    def report_facts(self) -> dict[str, Any]:
        """Counts, queries by fold and class, label checks and warnings; plain values for JSON."""
        asked = self._asked()
        facts = self._folder().facts
        return {
            "files": [path.name for path in resolve_paths(self._paths, endings=TABLE_ENDINGS)],
            "split": self._split(),
            "counts": facts["counts"],
            "vocabulary_sizes": self.vocabulary_sizes,
            "median_gap_days": self.median_gap,
            "targets": {name: _summary(queries) for name, queries in asked.items()},
            "label_checks": self._checks,
            "warnings": list(self._warnings),
            "note": NO_PROOF,
        }

    def state_dict(self) -> dict[str, Any]:
        """Split, vocabularies, normalisers and a digest of the training events; plain values only."""
        facts = self._folder().facts
        return {
            "split": json.dumps(self._split(), sort_keys=True),
            "vocabularies": [self._vocabularies[name] for name in self._settings.categorical],
            "means": facts["means"],
            "deviations": facts["deviations"],
            "train_digest": facts["train_digest"],
            "sampling_seed": self._sampling_seed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a checkpoint was trained on the events that are training here; later events may be others.

        Raises:
            ValueError: If it was split otherwise, or trained on other events, categories or normalisers.
        """
        there, here = json.loads(state_dict["split"]), self._split()
        for name, value in here.items():
            if there.get(name) != value:
                raise ValueError(
                    f"checkpoint was trained with {name} {there.get(name)!r}, here it is {value!r}: its training "
                    "events may be among what is asked here"
                )
        ours = self.state_dict()
        for name in ("vocabularies", "means", "deviations", "train_digest"):
            if state_dict[name] != ours[name]:
                raise ValueError(
                    f"checkpoint was trained on other events: {name} differs, with train digest "
                    f"{state_dict['train_digest']} there and {ours['train_digest']} here"
                )
        if self._sampling_seed is None:
            self._sampling_seed = state_dict["sampling_seed"]

    @property
    def _vocabularies(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = self._folder().facts["vocabularies"]
        return found

    def _split(self) -> dict[str, Any]:
        """Settings that decide what is trained on, as JSON has them."""
        settings = asdict(self._settings)
        # What only says how much is asked, or up to when a file may reach, does not move training.
        for later in ("test_start", "label_columns", "users_join_column"):
            del settings[later]
        for later in ("max_time", "texts", "numbers", "required_numbers"):
            del settings["columns"][later]
        plain: dict[str, Any] = json.loads(json.dumps(settings.pop("columns") | settings))
        return plain

    def _folder(self) -> CacheFolder:
        if self._cache is None:
            files = resolve_paths(self._paths, endings=TABLE_ENDINGS)
            users = None
            if self._users_path is not None:
                users = resolve_paths(self._users_path, argument="users_path", endings=TABLE_ENDINGS)[0]
            self._cache_dir.mkdir(parents=True, exist_ok=True)
            settings = {
                "kind": "events",
                "format": _FORMAT,
                "content": content_digests(files, self._cache_dir),
                "users": content_digests([users], self._cache_dir) if users is not None else None,
                # The order of the files orders ties; sorted digests do not tell it.
                "files": [path.name for path in files],
                **asdict(self._settings),
            }
            self._cache = open_or_build(self._cache_dir, settings, lambda: prepare_events(files, users, self._settings))
        return self._cache

    def _events_log(self) -> EventLog:
        if self._log is None:
            clock = CLOCKS[-1] if self._reference_mode else None
            self._log = open_log(self._folder(), self._settings, self._min_events, clock)
        return self._log

    def _asked(self) -> Queries:
        if self._queries is None:
            log, settings = self._events_log(), self._settings
            found = {name: target.queries(log) for name, target in self._targets.items()}
            for name, queries in found.items():
                by_outcome = asks_by_outcome(self._targets[name].rule, log, self._local_labels)
                if by_outcome is not None and not self._reference_mode:
                    raise ValueError(f"target {name!r}: {by_outcome}")
                queries["outcome_dependent"] |= by_outcome is not None
                if not len(queries["users"]):
                    raise ValueError(
                        f"target {name!r}: no query is left; each needs {self._min_events} own events before it, its "
                        "horizon inside one fold, and a label"
                    )
                rows = check_labels(log, queries, settings.categorical, settings.numeric)
                self._checks[name] = rows
                lines = [*_inside_ticks(name, log, queries["times"]), *warnings_of(name, rows)]
                self._warnings += lines
                for line in lines:
                    logger.warning("%s", line)
            self._queries = found
        return self._queries

    def _training_facts(self, seed: int) -> TrainingFacts:
        log = self._events_log()
        starts, stops = log.offsets[:-1], log.offsets[1:]
        if log.by_time:
            stops = log.before(np.arange(log.n_users), np.full(log.n_users, log.validation_start))
        else:
            stops = np.where(log.user_folds == 0, stops, starts)
        asked = {
            name: {key: value[queries["fold"] == 0] for key, value in queries.items() if isinstance(value, np.ndarray)}
            for name, queries in self._asked().items()
        }
        return TrainingFacts(starts=starts, stops=stops, log=log, queries=asked, seed=seed)

    def _batch(self, keep: Any, folds: tuple[int, ...]) -> dict[str, Any]:
        log, settings, folder = self._events_log(), self._settings, self._folder()
        context = np.arange(log.n_users) if log.by_time else np.flatnonzero(log.user_folds == 0)
        first = settings.categorical[0]
        events = flat_events(folder, keep)
        # By the users' own ids: what is drawn must not depend on who comes later. As integers, which no precision of a
        # trainer rounds.
        events["words"] = torch.from_numpy(log.user_words.astype(np.int64))
        if log.by_time:
            draws = chain(0, Purpose.CONTEXT_USER, log.user_words).astype(np.float64) / 2.0**64
            there = log.before(np.arange(log.n_users), np.full(log.n_users, log.validation_start)) > log.offsets[:-1]
            events["draws"] = torch.from_numpy(np.where(there, -1.0, draws)).view(torch.int64)
        return {
            "events": events,
            "user_ids": folder.ids("user_ids").to_list(),
            "queries": {name: query_tensors(queries, folds) for name, queries in self._asked().items()},
            "context_users": torch.from_numpy(context),
            "train_stop": log.validation_start if log.by_time else FOREVER,
            "split": settings.split,
            "feature_names": {"categorical": list(settings.categorical), "numeric": list(settings.numeric)},
            "category_names": ["<padding>", "<unknown>", *self._vocabularies[first]],
        }


def _summary(queries: dict[str, Any]) -> dict[str, Any]:
    classes = range(queries["n_classes"])
    by_fold = {}
    for number, name in enumerate(("train", "validation", "test")):
        labels = queries["labels"][queries["fold"] == number]
        by_fold[name] = {"queries": len(labels), "by class": np.bincount(labels, minlength=len(classes)).tolist()}
    kept = ("n_classes", "scope", "outcome_dependent", "description")
    return {name: queries[name] for name in kept} | {"folds": by_fold}


def _check_labels(
    features: list[str], roles: dict[str, str | None], labels: list[str], derived: dict[str, str], where: list[str]
) -> None:
    both = [name for name in labels if name in features]
    if both:
        raise ValueError(f"column {both[0]!r} is a label and a feature; a label must not be seen")
    told = dict.fromkeys(labels, "a label")
    for name, text in derived.items():
        used = [root for root in parse_expression(f"derived {name!r}", text).meta.root_names() if root in told]
        if used and name in features:
            raise ValueError(f"derived feature {name!r} = {text!r} is computed from {used[0]!r}, {told[used[0]]}")
        if used:
            told[name] = "which is computed from a label"
    for role, column in roles.items():
        if column in told:
            what = told[column].removeprefix("which is ")
            raise ValueError(f"{role} {column!r} is {what}; a label must not decide what is seen")
    for text in where:
        used = [root for root in parse_expression("where", text).meta.root_names() if root in told]
        if used:
            raise ValueError(f"where {text!r} reads {used[0]!r}, {told[used[0]]}; a label must not decide what is seen")
    twice = sorted({name for name in features if features.count(name) > 1})
    if twice:
        raise ValueError(f"feature {twice[0]!r} is named twice in categorical and numeric")


def _check_targets(
    targets: dict[str, EventTarget], labels: list[str], local_labels: list[str], reference_mode: bool
) -> None:
    for name, target in targets.items():
        if target.rule.depends_on_outcome and not reference_mode:
            raise ValueError(
                f"target {name!r}: the query time of {type(target.rule).__name__} depends on the outcome and tells the "
                f"label; {INSTEAD}"
            )
        if target.outcome_dependent and not reference_mode:
            raise ValueError(
                f"target {name!r}: {type(target).__name__} ({target.description}) is made from the end of a user's "
                "history, which nobody knows at t; ask NoEventWithin, EventWithin or AmountAbove, or reproduce with "
                "reference_mode"
            )
        for kind, columns, argument in (
            (StaticLabel, labels, "label_columns"),
            (FinalDays, labels, "label_columns"),
            (LocalLabel, local_labels, "local_label_columns"),
        ):
            if isinstance(target, kind) and target.column is not None and target.column not in columns:
                raise ValueError(f"target {name!r}: {target.column!r} is not in {argument} {columns}")


def _date(name: str, value: object) -> int:
    try:
        return moment(str(value))
    except ValueError:
        raise ValueError(f"{name} must be a date such as 2011-06-01, got {value!r}") from None


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _inside_ticks(name: str, log: EventLog, times: Ints) -> list[str]:
    inside = log.inside_ticks(times)
    if not inside.any():
        return []
    stamp = datetime.datetime(1970, 1, 1) + datetime.timedelta(microseconds=log.stamp)
    return [
        f"target {name!r}: {inside.sum()} of {len(times)} queries lie between two stamps of the log's clock, such as "
        f"{stamp}, which are {datetime.timedelta(microseconds=log.tick)} apart: what carries the earlier one is known "
        "to them, though it may happen after them"
    ]
