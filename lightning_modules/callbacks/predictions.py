"""Recommendations to Parquet, in the ids of the user's own files."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from lightning import Callback, LightningModule, Trainer

from lightning_modules.ranking import Recommendations
from lightning_modules.run_folder import drafted


class RecommendationWriter(Callback):
    """Writes what ``predict`` ranked: columns ``user_id``, ``rank`` (from 1), ``item_id``, ``score``.

    Users and items carry their original ids and types. Places for which no candidate was left are not written. The
    file appears whole or not at all.

    Args:
        filename: Name of the file in the run folder.
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
        if trainer.world_size > 1:
            raise ValueError(f"RecommendationWriter needs one process (--trainer.devices 1), got {trainer.world_size}")
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
        if not trainer.is_global_zero or not self._users:
            return
        items, scores = np.concatenate(self._items), np.concatenate(self._scores)
        users = np.concatenate(self._users).repeat(items.shape[1])
        ranks = np.tile(np.arange(1, items.shape[1] + 1, dtype=np.int32), len(items))
        kept = items.ravel() >= 0
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        frame = pl.DataFrame(
            {
                "user_id": data.decode_users(users[kept]),
                "rank": ranks[kept],
                "item_id": data.decode_items(items.ravel()[kept]),
                "score": scores.ravel()[kept],
            }
        )
        path = Path(trainer.log_dir or trainer.default_root_dir) / self.filename
        with drafted(path) as draft:
            frame.write_parquet(draft)
        print(f"seqlit: {len(frame)} recommendations in {path}", flush=True)
