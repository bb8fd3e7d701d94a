"""InteractionsDataModule: histories of users from CSV and Parquet to batches for next-item recommendation."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from lightning import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import DataLoader

from datamodules.array_cache import CacheFolder, content_digests, open_or_build
from datamodules.batches import EvaluationSequences, TrainingSequences
from datamodules.epoch_sampler import EpochLoader, place_among
from datamodules.histories import Histories
from datamodules.preparation import PreparationSettings, prepare_histories
from datamodules.sources.columns import Columns, TimeUnit
from datamodules.sources.file_names import resolve_paths
from datamodules.splits import Target, occurrences


class InteractionsDataModule(LightningDataModule):
    """Purchases, clicks or ratings of users as sequences of items.

    Files are read once, in a stream, into a cache of memory-mapped arrays; batches are cut from it. B batch, T
    ``max_length``, V items, R most relevant items of a user in the batch, M history items of the batch.

    * Train batch: ``item_ids (B, T)`` padded on the left with V, ``basket_ids (B, T)`` number of the timestamp group
      in the history, -1 at padding, ``targets (B, T)``, -100 where there is none. All int64.
    * Validation and test batch: ``item_ids``, ``basket_ids``; ``relevant (B, R)`` padded on the right with -1; the
      whole input history as ``history_items (M,)``, ``history_baskets (M,)``, ``history_offsets (B + 1,)``;
      ``user_index (B,)``. Predict: the same of every user's whole history, without ``relevant``.

    Order of steps: ``where``, ``min_item_count``, ``min_user_count`` (one pass each), split. Repeated interactions
    stay: a repeat is an event. Items that do not occur in training are in no input and no question.

    Ties: with ``next_basket`` the interactions of one timestamp are one basket; the input ends before the timestamp
    asked for, and all known distinct items of that timestamp are relevant. With ``next_item`` interactions of one
    timestamp are ordered by ``order_column``, if given, then by a hash of (seed, user, item, time), of equal lines the
    n-th by one of (seed, user, item, time, n), never by their place in the file; the last is asked for and all before
    it are input, those of the same timestamp included.

    The counts of ``min_item_count`` and ``min_user_count`` are of the whole file, test period and validation users
    included, as published: which items and users training knows, and through the number of rows left the time of the
    cut, depend on the future to that extent. On Online Retail 91 of 3,177 items have fewer than 5 training events. With
    both at 1 nothing of training depends on the future but for the time of the cut.

    Source: arXiv 2509.09682 for the filters, the split and the single window per user. Departures: the cut never
    splits a timestamp; ties in time are ordered by a hash; ``next_basket``, ``leave_last_out``, ``strided`` windows
    and the removal of unreachable relevant items are additions (``keep_seen_targets`` turns the last one off).

    Args:
        paths: CSV or Parquet files, globs, or ``bundled:online_retail``. Files may be mixed if columns agree.
        user_column: Column of user (or session) ids, integers or strings.
        item_column: Column of item ids, integers or strings.
        time_column: Column of times: dates, numbers, strings. Times without zone are taken as UTC.
        order_column: Column of integers or dates that orders a user's rows where there is no time, or rows of one
            time. One of ``time_column`` and ``order_column`` is needed; without times ``split`` must be
            ``leave_last_out``, and equal order values form a basket.
        time_format: strptime form of times given as strings; None is ISO 8601.
        time_unit: Unit of times given as numbers, since 1970-01-01.
        where: SQL conditions on the rows, e.g. ``rating > 3``, ``event = 'buy'``, ``stock_code ~ '^[0-9]{5}'``; a row
            is kept if all are true. Each is counted. Id columns of CSV files are text here.
        min_item_count: Items with fewer interactions are dropped; at least 1.
        min_user_count: Then users with fewer are dropped; at least 1.
        split: ``global_time`` or ``leave_last_out``, see :mod:`datamodules.splits`.
        test_fraction: Of the interactions, in (0, 1); ``global_time`` only.
        validation_user_fraction: Of the users of the training period, in [0, 1); 0 is no validation; ``global_time``
            only.
        target: Whether the next item is asked for, or the next basket, the items of the next timestamp.
        recommend_seen: Whether items of the user's own history may be recommended.
        keep_seen_targets: Without ``recommend_seen``, whether relevant items of the own history stay, as misses; else
            they are removed, and users left without any are not asked.
        train_targets: ``all``, or ``new``: items that occur earlier in the user's history are no training targets.
            None is ``all`` with ``recommend_seen`` and ``new`` without.
        train_window: ``last``: one window of ``max_length`` inputs per user. ``strided``: all of the history in such
            windows, counted from its end.
        shuffle_within_basket: With ``next_basket``, whether items of a basket change places from epoch to epoch.
        max_length: T, at least 1.
        batch_size: Training sequences in a batch and process, at least 1.
        eval_batch_size: Users in a batch of evaluation, at least 1.
        num_workers: Worker processes; 0 is fast enough, see ``scripts/bench_interactions.py``.
        seed: Of ties and validation users.
        sampling_seed: Of order of epochs, places inside baskets and drawn targets; None is ``seed``. It moves training
            and leaves the split.
        cache_dir: Folder of the cache, relative to the current one.

    Raises:
        ValueError: If an argument is outside its range; on first use, if the files cannot serve (in one line with
            file, column and row).
        FileNotFoundError: On first use, if no file matches.
    """

    def __init__(
        self,
        *,
        paths: str | list[str],
        user_column: str,
        item_column: str,
        time_column: str | None = None,
        order_column: str | None = None,
        time_format: str | None = None,
        time_unit: TimeUnit = "s",
        where: list[str] | None = None,
        min_item_count: int = 5,
        min_user_count: int = 3,
        split: Literal["global_time", "leave_last_out"] = "global_time",
        test_fraction: float = 0.1,
        validation_user_fraction: float = 0.05,
        target: Target = "next_item",
        recommend_seen: bool = False,
        keep_seen_targets: bool = False,
        train_targets: Literal["all", "new"] | None = None,
        train_window: Literal["last", "strided"] = "last",
        shuffle_within_basket: bool = True,
        max_length: int = 50,
        batch_size: int = 128,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 42,
        sampling_seed: int | None = None,
        cache_dir: str = ".seqlit_cache",
    ) -> None:
        _check_choice("time_unit", time_unit, ("s", "ms", "us", "ns"))
        _check_choice("split", split, ("global_time", "leave_last_out"))
        _check_choice("target", target, ("next_item", "next_basket"))
        _check_choice("train_targets", train_targets, ("all", "new", None))
        _check_choice("train_window", train_window, ("last", "strided"))
        sizes = {
            "min_item_count": min_item_count,
            "min_user_count": min_user_count,
            "max_length": max_length,
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {num_workers}")
        if not 0 < test_fraction < 1:
            raise ValueError(f"test_fraction must be between 0 and 1, got {test_fraction}")
        if not 0 <= validation_user_fraction < 1:
            raise ValueError(f"validation_user_fraction must be at least 0 and below 1, got {validation_user_fraction}")
        if time_column is None and order_column is None:
            raise ValueError("time_column or order_column must be given, got neither")
        if time_column is None and split == "global_time":
            raise ValueError("split 'global_time' needs time_column; use 'leave_last_out' with order_column alone")
        named = [name for name in (user_column, item_column, time_column, order_column) if name is not None]
        if len(set(named)) < len(named):
            raise ValueError(f"user_column, item_column, time_column and order_column must differ, got {named}")
        super().__init__()
        self.max_length = max_length
        self.recommend_seen = recommend_seen
        self.target: Target = target
        self.seed = seed
        self._sampling_seed = sampling_seed
        self._paths = paths
        self._settings = PreparationSettings(
            columns=Columns(
                user=user_column,
                item=item_column,
                time=time_column,
                order=order_column,
                time_format=time_format,
                time_unit=time_unit,
                where=tuple(where or ()),
            ),
            min_item_count=min_item_count,
            min_user_count=min_user_count,
            split=split,
            test_fraction=test_fraction if split == "global_time" else None,
            validation_user_fraction=validation_user_fraction if split == "global_time" else None,
            target=target,
            drop_seen=not recommend_seen and not keep_seen_targets,
            only_new_targets=(train_targets or ("all" if recommend_seen else "new")) == "new",
            seed=seed,
        )
        self._train_window = train_window
        self._shuffle_within_basket = shuffle_within_basket
        self._batch_size = batch_size
        self._eval_batch_size = eval_batch_size
        self._num_workers = num_workers
        self._cache_dir = Path(cache_dir).expanduser().absolute()
        self._cache: CacheFolder | None = None
        self._train_loader: EpochLoader | None = None
        self._train: TrainingSequences | None = None

    def prepare_data(self) -> None:
        """Write the cache, unless it is there."""
        self._folder()

    def setup(self, stage: str) -> None:
        """Open the cache."""
        self._folder()

    def train_dataloader(self) -> DataLoader:
        """Shuffled training sequences; the order is a function of (sampling seed, epoch) alone."""
        self._train_loader = self._loader(self._training_sequences(), self._batch_size, shuffled=True)
        return self._train_loader

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Validation users, or an empty list if there are none."""
        return self._evaluation_loader("validation") if self._folder().facts["split"]["validation_users"] else []

    def test_dataloader(self) -> DataLoader:
        """Test users."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Every user who has bought something of the catalogue."""
        return self._evaluation_loader("predict")

    @property
    def n_items(self) -> int:
        """V, the number of items that occur in training; the first access prepares the cache."""
        return int(self._folder().facts["split"]["n_items"])

    @property
    def item_counts(self) -> NDArray[np.int64]:
        """``(V,)`` training interactions of each item."""
        return occurrences(self._folder().array("train_items"), self.n_items)

    @property
    def catalogue_hash(self) -> str:
        """Stands for the original ids of the catalogue in their order."""
        return str(self._folder().facts["catalogue_hash"])

    def train_histories(self) -> Histories:
        """Training histories as read-only memory maps, validation users and the test period left out."""
        array = self._folder().array
        return Histories(array("train_items"), array("train_baskets"), array("train_offsets"), array("train_users"))

    def decode_users(self, users: ArrayLike) -> pl.Series:
        """Original ids, in their own type, of rows of the table of users (``user_index``)."""
        return self._folder().ids("user_ids").gather(np.asarray(users, dtype=np.int64).ravel()).rename("user_id")

    def decode_items(self, items: ArrayLike) -> pl.Series:
        """Original ids, in their own type, of items 0..V-1."""
        return self._folder().ids("item_ids").gather(np.asarray(items, dtype=np.int64).ravel()).rename("item_id")

    def report_facts(self) -> dict[str, Any]:
        """Counts of each step of preparation, sizes of the split, and settings; plain values for JSON."""
        facts = self._folder().facts
        sequences = self._training_sequences()
        return {
            "steps": facts["steps"],
            "split": facts["split"] | {"train_sequences": len(sequences), "train_positions": sequences.n_positions},
            "catalogue_hash": facts["catalogue_hash"],
            "settings": facts["settings"]
            | {
                "paths": self._paths,
                "recommend_seen": self.recommend_seen,
                "train_window": self._train_window,
                "shuffle_within_basket": self._shuffle_within_basket,
                "sampling_seed": self._order_seed,
                "max_length": self.max_length,
                "batch_size": self._batch_size,
                "eval_batch_size": self._eval_batch_size,
            },
        }

    def state_dict(self) -> dict[str, Any]:
        """Split, digest of the training data, epoch and finished batches of it, catalogue, seeds; plain values only."""
        place = {"epoch": 0, "batches": 0} if self._train_loader is None else self._train_loader.state_dict()
        return {
            "preparation": json.dumps(self._decisive(), sort_keys=True),
            "epoch": place["epoch"],
            "position": place["batches"],
            "catalogue_hash": self.catalogue_hash,
            "n_items": self.n_items,
            "sampling_seed": self._order_seed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the checkpoint belongs to this catalogue, split and training data; the trainer sets the epoch.

        Raises:
            ValueError: If the catalogue is another; or, but for ``predict``, if the data is split otherwise, by its
                settings, the time of the cut or the training histories that result: what is tested here may have been
                trained on there.
        """
        if state_dict["catalogue_hash"] != self.catalogue_hash:
            raise ValueError(
                f"checkpoint was trained on catalogue {state_dict['catalogue_hash']} with {state_dict['n_items']} "
                f"items, the data here has catalogue {self.catalogue_hash} with {self.n_items} items"
            )
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING:
            return
        there, here = json.loads(state_dict["preparation"]), self._decisive()
        for name, value in here.items():
            if there.get(name) != value:
                raise ValueError(
                    f"checkpoint was trained with {name} {there.get(name)!r}, here it is {value!r}: "
                    "its training data may be among what is asked for here"
                )
        if self._sampling_seed is None:
            self._sampling_seed = state_dict["sampling_seed"]
            self._train = None  # its targets are drawn by the seed

    def _decisive(self) -> dict[str, Any]:
        """Settings that decide which interactions are trained on and which are asked for, and what came of them."""
        settings, facts = asdict(self._settings), self._folder().facts
        for asked_otherwise in ("drop_seen", "only_new_targets"):
            del settings[asked_otherwise]
        cut = facts["split"].get("cut_time")
        settings["cut_time"] = None if cut is None else str(np.datetime64(cut, "us"))
        settings["train_digest"] = facts["train_digest"]
        plain: dict[str, Any] = json.loads(json.dumps(settings))  # as JSON has them
        return plain

    @property
    def _order_seed(self) -> int:
        return self.seed if self._sampling_seed is None else self._sampling_seed

    def _folder(self) -> CacheFolder:
        if self._cache is None:
            files = resolve_paths(self._paths)
            self._cache_dir.mkdir(parents=True, exist_ok=True)
            settings = {"content": content_digests(files, self._cache_dir), **asdict(self._settings)}
            self._cache = open_or_build(self._cache_dir, settings, lambda: prepare_histories(files, self._settings))
        return self._cache

    def _training_sequences(self) -> TrainingSequences:
        if self._train is None:
            self._train = TrainingSequences(
                self._folder(),
                target=self.target,
                max_length=self.max_length,
                strided=self._train_window == "strided",
                shuffle_within_basket=self._shuffle_within_basket,
                seed=self._order_seed,
            )
        return self._train

    def _evaluation_loader(self, stage: str) -> DataLoader:
        sequences = EvaluationSequences(self._folder(), stage=stage, max_length=self.max_length)
        return self._loader(sequences, self._eval_batch_size, shuffled=False)

    def _loader(self, sequences: TrainingSequences | EvaluationSequences, rows: int, *, shuffled: bool) -> EpochLoader:
        return EpochLoader(
            sequences,
            rows=rows,
            shuffled=shuffled,
            seed=self._order_seed,
            **place_among(self.trainer),
            num_workers=self._num_workers,
        )


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
