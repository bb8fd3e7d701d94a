"""The common form of drawn event sequences: flat events, queries, and the batch and files that they make.

U users, E events, Q queries, K types of events. Source: spec of arXiv 2502.10205, sections 1, 3.1 and 7.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FOREVER = 2**63 - 1
"""Time after every event, in microseconds."""

MICROSECONDS_PER_DAY = 86_400_000_000

START = int(np.datetime64("2020-01-01", "us").astype(np.int64))
"""First moment of every drawn set, in microseconds since 1970-01-01 UTC."""

USER_FOLDS = (0.5, 0.1, 0.4)
"""Shares of train, validation and test users: many test users, because a difference of oracles is read on them."""


@dataclass(frozen=True, kw_only=True)
class SyntheticEvents:
    """A drawn event set in the form of a batch, with what a model is not shown beside it.

    Attributes:
        times: ``(E,) int64`` microseconds since 1970-01-01 UTC, not decreasing within a user.
        offsets: ``(U + 1,) int64``: the events of user u are ``offsets[u]:offsets[u + 1]``.
        types: ``(E,) int64`` from 0.
        type_names: K names.
        amounts: ``(E,) float64``, positive.
        queries: Target -> ``users (Q,) int64``, ``times (Q,) int64``, ``labels (Q,) int64``, ``fold (Q,) int8`` (0
            train, 1 validation, 2 test), ``n_classes``, ``scope``, ``outcome_dependent``, ``description``. The own
            history at a query is the events with time < t.
        split: ``users``: folds are of users. ``time``: folds are of time, static labels of disjoint users.
        user_folds: ``(U,) int8``.
        train_stop: Learned weights stop here, in microseconds; ``FOREVER`` if folds are of users.
        stop: End of the observation in microseconds; it began at ``START``.
        groups: ``(U,) int64``, hidden; the static label of :meth:`write`.
    """

    times: Ints
    offsets: Ints
    types: Ints
    type_names: tuple[str, ...]
    amounts: Floats
    queries: dict[str, dict[str, Any]]
    split: Literal["users", "time"]
    user_folds: NDArray[np.int8]
    train_stop: int
    stop: int
    groups: Ints

    @property
    def n_users(self) -> int:
        """U."""
        return len(self.offsets) - 1

    @property
    def event_users(self) -> Ints:
        """``(E,) int64``: whose each event is."""
        return np.repeat(np.arange(self.n_users), np.diff(self.offsets))

    @property
    def user_ids(self) -> list[str]:
        """U names such as ``u00042``."""
        return [f"u{user:05d}" for user in range(self.n_users)]

    def history_stops(self, users: Ints, times: Ints) -> Ints:
        """``(Q,) int64``: the row behind the last event of ``users (Q,)`` with time < ``times (Q,)``.

        The own history is ``offsets[users]:history_stops``, empty if both agree.
        """
        # One sorted key of (user, time) makes the Q searches one; every time lies in START .. stop, so keys of two
        # users never overlap.
        span = self.stop - START + 2
        keys = self.event_users * span + (self.times - START)
        asked = users * span + np.clip(times - START, 0, span - 1)
        return np.searchsorted(keys, asked, side="left").astype(np.int64)

    def facts(self) -> dict[str, Any]:
        """Facts a model is built from: ``vocabulary_sizes``, ``n_numeric``, ``median_gap`` in days over train."""
        users = self.event_users
        same = (users[1:] == users[:-1]) & self._in_train()[1:]
        gaps = np.diff(self.times)[same]
        gap = float(np.median(gaps)) / MICROSECONDS_PER_DAY if len(gaps) else 1.0
        return {"vocabulary_sizes": [len(self.type_names) + 2], "n_numeric": 1, "median_gap": gap}

    def batch(self) -> dict[str, Any]:
        """The one batch of a test: all events and queries as tensors.

        Types are vocabulary ids + 2 (0 padding, 1 unknown); the numeric feature is log amount, standardised over the
        train events. Hidden facts are left out.
        """
        in_train = self._in_train()
        logs = np.log(self.amounts)
        mean, deviation = (logs[in_train].mean(), logs[in_train].std()) if in_train.any() else (0.0, 1.0)
        numeric = ((logs - mean) / (deviation or 1.0)).astype(np.float32)
        context = np.flatnonzero(self.user_folds == 0) if self.split == "users" else np.arange(self.n_users)
        return {
            "events": {
                "categorical": torch.from_numpy(self.types[:, None] + 2),
                "numeric": torch.from_numpy(numeric[:, None]),
                "times": torch.from_numpy(self.times.copy()),
                "offsets": torch.from_numpy(self.offsets.copy()),
            },
            "user_ids": self.user_ids,
            "queries": {
                target: {
                    name: torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
                    for name, value in query.items()
                }
                for target, query in self.queries.items()
            },
            "context_users": torch.from_numpy(context),
            "train_stop": self.train_stop,
            "split": self.split,
            "feature_names": {"categorical": ["event_type"], "numeric": ["amount"]},
            "category_names": ["padding", "unknown", *self.type_names],
        }

    def write(self, folder: Path) -> dict[str, str]:
        """Write the set as Parquet files.

        Args:
            folder: Made if needed.

        Returns:
            Name -> file: ``events`` has columns user, time (datetime, us), event_type, amount; ``users`` has user,
            fold, group (static label); ``queries`` has target, user, time, label, fold.
        """
        folder.mkdir(parents=True, exist_ok=True)
        names = np.array(self.user_ids)
        folds = np.array(["train", "validation", "test"])
        moment = pl.Datetime("us")
        tables = {
            "events": pl.DataFrame(
                {
                    "user": names[self.event_users],
                    "time": pl.Series(self.times).cast(moment),
                    "event_type": np.array(self.type_names)[self.types],
                    "amount": self.amounts,
                }
            ),
            "users": pl.DataFrame({"user": names, "fold": folds[self.user_folds], "group": self.groups}),
            "queries": pl.concat(
                pl.DataFrame(
                    {
                        "target": [target] * len(query["users"]),
                        "user": names[query["users"]],
                        "time": pl.Series(query["times"]).cast(moment),
                        "label": query["labels"],
                        "fold": folds[query["fold"]],
                    }
                )
                for target, query in self.queries.items()
            ),
        }
        files = {name: folder / f"{name}.parquet" for name in tables}
        for name, table in tables.items():
            table.write_parquet(files[name])
        return {name: str(file) for name, file in files.items()}

    def _in_train(self) -> NDArray[np.bool_]:
        """``(E,) bool``: events that vocabularies and normalisers may see."""
        if self.split == "users":
            return (self.user_folds == 0)[self.event_users]
        return self.times < self.train_stop


def folds_of_users(rng: np.random.Generator, n_users: int) -> NDArray[np.int8]:
    """``(U,) int8`` folds at random with the shares ``USER_FOLDS``."""
    bounds = np.round(np.cumsum(USER_FOLDS) * n_users).astype(int)
    folds = np.searchsorted(bounds, np.arange(n_users), side="right").astype(np.int8)
    return rng.permutation(folds)


def folds_of_times(times: Ints, train_stop: int, validation_stop: int) -> NDArray[np.int8]:
    """``(Q,) int8``: 0 before ``train_stop``, 1 before ``validation_stop``, 2 from there on."""
    return np.searchsorted([train_stop, validation_stop], times, side="right").astype(np.int8)
