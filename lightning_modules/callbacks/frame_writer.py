"""What ``predict`` gives, batch after batch, as one Parquet file of a row a series."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import polars as pl
from lightning import Callback, LightningModule, Trainer

from lightning_modules.callbacks.results_folder import results_folder
from lightning_modules.collectives import from_first, gather_objects
from lightning_modules.run_folder import write_parquet


class FrameWriter(Callback, ABC):
    """Writes the rows of all batches to a file in the run folder, whole or not at all, in the order of ``index``.

    Of several processes the first writes those of all.
    """

    file: ClassVar[str]
    """Its name."""
    what: ClassVar[str]
    """What the rows are, in the plural."""
    kind: ClassVar[type]
    """What a batch gives."""

    def __init__(self) -> None:
        self._frames: list[pl.DataFrame] = []

    @abstractmethod
    def frame(self, outputs: Any, batch: Any) -> pl.DataFrame:
        """Rows of a batch, with a column ``index``."""

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
        if not isinstance(outputs, self.kind):
            raise ValueError(f"{type(self).__name__} needs {self.kind.__name__}, got {type(outputs).__name__}")
        self._frames.append(self.frame(outputs, batch))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write."""
        folder = results_folder(trainer)  # a collective
        frames = [frame for kept in gather_objects(self._frames) for frame in kept]
        self._frames = []
        if frames and folder is not None:
            path = folder / self.file
            from_first(lambda: write_parquet(path, pl.concat(frames).sort("index", maintain_order=True), self.what))
