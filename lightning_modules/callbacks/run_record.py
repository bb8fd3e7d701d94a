"""What a fit says about itself: one line an epoch in a log file, and ``fit.json`` beside the checkpoints."""

import json
import time
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from lightning_modules.run_folder import write_whole


class LastCheckpoint(ModelCheckpoint):
    """``last.ckpt`` at the end of every epoch, whatever the monitored metric does.

    ``save_last`` of Lightning's own callback writes only in epochs in which it also writes a best one.
    """

    def __init__(self) -> None:
        super().__init__(filename="last", save_top_k=1, save_on_train_epoch_end=True, enable_version_counter=False)


def _run_folder(trainer: Trainer) -> str | None:
    """The folder, on every rank (asking for it is a collective); None where a run leaves none."""
    return None if trainer.fast_dev_run or not trainer.loggers else trainer.log_dir  # type: ignore[attr-defined]


class EpochLines(Callback):
    """Prints one line an epoch where there is no progress bar, and records the length of the fit.

    ``fit.json`` holds ``seconds`` (training and validation, over all sittings of a resumed run), ``epochs`` and
    ``finished``.
    """

    def __init__(self) -> None:
        self._seconds_before = 0.0
        self._start = self._epoch_start = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Seconds spent in fit so far."""
        return {"seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from the checkpoint."""
        self._seconds_before = float(state_dict["seconds"])

    def _elapsed(self) -> float:
        return self._seconds_before + (time.perf_counter() - self._start if self._start else 0.0)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock and say where the results will lie."""
        self._start = time.perf_counter()
        folder = _run_folder(trainer)
        if trainer.is_global_zero and folder:
            print(f"seqlit: run folder {folder}", flush=True)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the epoch."""
        self._epoch_start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's loss and what the checkpoints are chosen by."""
        if trainer.progress_bar_callback is not None or not trainer.is_global_zero:
            return
        watched = ["train/loss", "val/loss"]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            monitor = getattr(callback, "monitor", None)
            if isinstance(callback, Checkpoint) and monitor and monitor not in watched:
                watched.append(monitor)
        values = [f"{key} {trainer.callback_metrics[key]:.4f}" for key in watched if key in trainer.callback_metrics]
        seconds = time.perf_counter() - self._epoch_start
        print(f"epoch {trainer.current_epoch}  {'  '.join(values)}  {seconds:.1f} s", flush=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``fit.json``."""
        folder = _run_folder(trainer)
        if trainer.is_global_zero and folder:
            facts = {"seconds": self._elapsed(), "epochs": trainer.current_epoch, "finished": not trainer.interrupted}
            write_whole(Path(folder) / "fit.json", json.dumps(facts, indent=2) + "\n")
