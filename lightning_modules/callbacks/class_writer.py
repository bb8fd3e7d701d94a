"""What a classifier of series predicts, to Parquet."""

from typing import Any

import polars as pl
from torch import Tensor

from lightning_modules.attacks.class_losses import decisions
from lightning_modules.callbacks.frame_writer import FrameWriter
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


class ClassPredictionWriter(FrameWriter):
    """Writes what ``predict`` gives to ``class_predictions.parquet`` in the run folder, see :class:`FrameWriter`."""

    file, what, kind = "class_predictions.parquet", "class predictions", ClassPredictions

    def frame(self, outputs: ClassPredictions, batch: Any) -> pl.DataFrame:
        """See :func:`predictions_frame`."""
        return predictions_frame(outputs, batch["labels"])
