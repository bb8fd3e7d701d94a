"""Recommendations to Parquet, in the ids of the user's own files."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from lightning import Callback, LightningModule, Trainer

from lightning_modules.callbacks.results_folder import results_folder
from lightning_modules.collectives import from_first, gather_objects
from lightning_modules.ranking import Recommendations
from lightning_modules.run_folder import write_parquet


class RecommendationWriter(Callback):
    """Writes what ``predict`` ranked: columns ``user_id``, ``rank`` (from 1), ``item_id``, ``score``.

    Users and items carry their original ids and types. Places for which no candidate was left are not written. Rows
    are in the order of the table of users, and of rank, whatever the number of processes; the first process writes what
    all have ranked, 12 bytes a recommendation while it does. The file appears whole or not at all.

    Args:
        filename: Name of the file in the run folder.

    Raises:
        ValueError: If ``filename`` does not end in ``.parquet``, or ``predict_step`` returns something else.
    """

    def __init__(self, filename: str = "recommendations.parquet") -> None:
        if not filename.endswith(".parquet"):
            raise ValueError(f"filename must end in .parquet, got {filename!r}")
        self.filename = filename
        self._users: list[np.ndarray] = []
        self._items: list[np.ndarray] = []
        self._scores: list[np.ndarray] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier prediction."""
        self._users, self._items, self._scores = [], [], []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch, 12 bytes a recommendation."""
        if not isinstance(outputs, Recommendations):
            raise ValueError(
                f"RecommendationWriter needs Recommendations from predict_step, got {type(outputs).__name__}"
            )
        self._users.append(outputs.user_index.cpu().numpy())
        self._items.append(outputs.item_ids.to("cpu").numpy().astype(np.int32))
        self._scores.append(outputs.scores.to("cpu").numpy())

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decode and write."""
        shards = gather_objects((self._users, self._items, self._scores))
        folder = results_folder(trainer)  # a collective: on every rank
        users, items, scores = ([array for shard in shards for array in shard[column]] for column in range(3))
        if users and folder is not None:
            path = folder / self.filename
            from_first(lambda: _write(path, trainer.datamodule, users, items, scores))  # type: ignore[attr-defined]


def _write(path: Path, data: Any, users: list[np.ndarray], items: list[np.ndarray], scores: list[np.ndarray]) -> None:
    """Write batches of ``(B,)`` users with ``(B, k)`` items and scores as one file."""
    user_index = np.concatenate(users)
    order = np.argsort(user_index, kind="stable")
    ranked, n_places = np.concatenate(items)[order].ravel(), items[0].shape[1]
    kept = ranked >= 0
    frame = pl.DataFrame(
        {
            "user_id": data.decode_users(user_index[order].repeat(n_places)[kept]),
            "rank": np.tile(np.arange(1, n_places + 1, dtype=np.int32), len(order))[kept],
            "item_id": data.decode_items(ranked[kept]),
            "score": np.concatenate(scores)[order].ravel()[kept],
        }
    )
    write_parquet(path, frame, "recommendations")
