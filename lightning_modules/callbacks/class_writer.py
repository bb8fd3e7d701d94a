"""What a classifier of series predicts, to Parquet."""

from typing import Any

import polars as pl
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_modules.attacks.class_losses import decisions
from lightning_modules.callbacks.results_folder import results_folder
from lightning_modules.collectives import from_first, gather_objects
from lightning_modules.run_folder import write_parquet
from lightning_modules.time_series_classifier import ClassPredictions


def predictions_frame(found: ClassPredictions, labels: Tensor) -> pl.DataFrame:
    """One row a series.

    Columns ``index`` (row of the test file), ``label`` and ``predicted`` (places of the classes in their order),
    ``logits``, a list of float32: of class 1 of two, else of each class.
    """
    return pl.DataFrame(
        {
            "index": found.index.cpu().numpy(),
            "label": labels.cpu().numpy(),
            "predicted": decisions(found.logits).cpu().numpy(),
            "logits": pl.Series(found.logits.float().cpu().tolist(), dtype=pl.List(pl.Float32)),
        }
    )


class ClassPredictionWriter(Callback):
    """Writes what ``predict`` gives to ``class_predictions.parquet`` in the run folder, whole or not at all.

    Rows are in the order of ``index``; of several processes the first writes those of all.
    """

    def __init__(self) -> None:
        self._frames: list[pl.DataFrame] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier prediction."""
        self._frames = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch.

        Raises:
            ValueError: If the module predicts something else.
        """
        if not isinstance(outputs, ClassPredictions):
            raise ValueError(f"ClassPredictionWriter needs ClassPredictions, got {type(outputs).__name__}")
        self._frames.append(predictions_frame(outputs, batch["labels"]))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write."""
        folder = results_folder(trainer)  # a collective
        frames = [frame for kept in gather_objects(self._frames) for frame in kept]
        self._frames = []
        if frames and folder is not None:
            path = folder / "class_predictions.parquet"
            from_first(
                lambda: write_parquet(path, pl.concat(frames).sort("index", maintain_order=True), "class predictions")
            )
