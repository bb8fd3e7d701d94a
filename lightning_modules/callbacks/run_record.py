"""What a fit leaves behind: ``last.ckpt`` to go on from, a line an epoch, and ``fit.json`` about itself."""

import json
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_modules.callbacks.results_folder import folder_of_run
from lightning_modules.collectives import gather_objects
from lightning_modules.run_folder import LAST, is_less_than_asked, mark_running, read_fit_facts, write_whole

_NOTHING, _SAVE, _STOP = 0, 1, 2


class LastCheckpoint(Checkpoint):
    """``checkpoints/last.ckpt``, from which a run goes on as if it had never stopped, bit for bit.

    Written after every epoch: not at its end, as Lightning's own callback does, but when the epoch's metrics are logged
    and its schedulers have stepped, before anything of the next one. Amid an epoch it is written after a training
    batch, at the first that leaves nothing half done: no gradients that are still gathered
    (``accumulate_grad_batches``), no validation that is due, not the last of the epoch.

    A run that is sent SIGTERM, as by SLURM or an agent, or SIGINT (Ctrl-C) writes one there and ends, with the exit
    status Lightning has for them: 0 and 1. A second Ctrl-C does not wait for it. All processes stop at the same step
    if one is told to.

    A user's callbacks and modules must hold what they know between two steps in their own state, and log by epoch: a
    row that is logged within a step right after a checkpoint would be missing if the run is killed in between.

    Args:
        every_n_train_steps: Optimiser steps (``trainer.global_step``) between checkpoints amid an epoch; None for none.
        minutes: Between checkpoints amid an epoch, by the clock; None for none.

    Raises:
        ValueError: If a number is not positive.
    """

    def __init__(self, every_n_train_steps: int | None = None, minutes: float | None = 15.0) -> None:
        for name, value in (("every_n_train_steps", every_n_train_steps), ("minutes", minutes)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive or null, got {value!r}")
        self._every_n_train_steps = every_n_train_steps
        self._interval = None if minutes is None else timedelta(minutes=minutes).total_seconds()
        self._folder: Path | None = None
        self._signal = 0
        self._epoch_done = self._epoch_announced = False
        self._stopped = self._restored_stop = False
        self._saved_step, self._saved_at = 0, 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder; have the end of an epoch saved before any other callback starts the next.

        Raises:
            ValueError: If processes would go on from different checkpoints.
        """
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        asked = gather_objects(None if trainer.ckpt_path is None else str(trainer.ckpt_path))
        if len(set(asked)) > 1:
            raise ValueError(f"ckpt_path: processes found different checkpoints: {', '.join(map(str, asked))}")
        self._folder = folder_of_run(trainer) / "checkpoints"  # a collective
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_top_k == 1:
                # A run killed after its best epoch was written and before last.ckpt writes that epoch once more: over
                # the file, not beside it as best-v1.ckpt, which nobody would look for.
                callback._enable_version_counter = False
        trainer.callbacks = [_EpochBoundary(self), *callbacks]  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """Whether the run was told to stop, as early stopping does: Lightning does not keep that."""
        return {"stopped": self._stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the mark until training starts."""
        self._restored_stop = state_dict["stopped"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Give Lightning's own checkpoints back the score they last wrote by: they keep it, but do not take it up."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            state = checkpoint.get("callbacks", {}).get(callback.state_key)
            if isinstance(callback, ModelCheckpoint) and state is not None:
                callback.current_score = state.get("current_score")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for signals; Lightning puts the handlers back when the fit is over."""
        if self._folder is not None and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._told_to_stop)

    def _told_to_stop(self, number: int, frame: Any) -> None:
        self._signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up where the checkpoint was written."""
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        self._epoch_done = False
        restored_stop, self._restored_stop = self._restored_stop, False
        if trainer.ckpt_path is not None:
            # A run that early stopping ended is done; one that is gone on with for all that trains.
            finished = read_fit_facts(Path(trainer.ckpt_path).parent.parent).get("finished", False)
            trainer.should_stop = restored_stop and not finished
        loop = trainer.fit_loop
        if loop.epoch_progress.total.ready == loop.epoch_progress.total.completed:
            # With max_steps Lightning takes any checkpoint for one amid an epoch, and would end the next unseen.
            loop.epoch_loop.restarting = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The run is under way again: else Lightning leaves out the plateau scheduler at the end of this epoch."""
        trainer.fit_loop._restarting = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write amid an epoch, if it is time to and nothing is half done."""
        loop = trainer.fit_loop.epoch_loop
        if self._folder is None or loop._is_training_done or loop._should_accumulate():
            return
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        if loop._should_check_val_fx(fetcher):
            return
        wanted = self._decision(trainer)
        if wanted != _NOTHING:
            self._save(trainer)
        if wanted == _STOP:
            self._stop()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember to write: what belongs to the epoch is not complete yet."""
        self._epoch_done = self._folder is not None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write after the last epoch."""
        if self._epoch_done:
            self._save(trainer)

    def before_epoch(self, trainer: Trainer) -> None:
        """Write after an epoch, when the trainer has announced the next and nobody has begun with it."""
        if not self._epoch_done:
            return
        self._epoch_announced = True
        self._save(trainer)
        self._epoch_announced = False
        if self._decision(trainer) == _STOP:
            self._stop()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take back what the trainer has announced."""
        if self._epoch_done:
            checkpoint["epoch"] -= 1  # the epoch that was trained, as in checkpoints written at its end
        if self._epoch_announced:
            progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
            for count in (progress["total"], progress["current"]):
                count["ready"] -= 1

    def _decision(self, trainer: Trainer) -> int:
        """The same in every process: the clock is that of the first, a signal may reach any."""
        own = _NOTHING
        if self._every_n_train_steps is not None:
            steps = (trainer.global_step // self._every_n_train_steps, self._saved_step // self._every_n_train_steps)
            own = _SAVE if steps[0] > steps[1] else _NOTHING
        late = self._interval is not None and time.monotonic() - self._saved_at >= self._interval
        if late and trainer.is_global_zero:
            own = _SAVE
        if self._signal:
            own = _STOP
        if trainer.world_size == 1:
            return own
        device = trainer.strategy.root_device
        return int(trainer.strategy.reduce(torch.tensor(own, device=device), reduce_op="max"))

    def _save(self, trainer: Trainer) -> None:
        assert self._folder is not None
        # What was logged is on disk before the checkpoint that says it was.
        for logger in trainer.loggers:
            logger.save()
        self._stopped = bool(trainer.should_stop) and not _is_out_of_time(trainer)  # more time may be given
        trainer.save_checkpoint(self._folder / LAST, weights_only=False)
        self._epoch_done = False
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()

    def _stop(self) -> None:
        """End the run as Lightning ends one by the signal."""
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SIGTERMException


class _EpochBoundary(Callback):
    """Stands before all other callbacks, which Lightning grants to no checkpoint."""

    def __init__(self, last: LastCheckpoint) -> None:
        self._last = last

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last.before_epoch(trainer)


def _run_folder(trainer: Trainer) -> str | None:
    """The folder, on every rank (asking for it is a collective); None where a run leaves none."""
    return None if trainer.fast_dev_run or not trainer.loggers else trainer.log_dir  # type: ignore[attr-defined]


def _is_out_of_time(trainer: Trainer) -> bool:
    """Whether a Timer, such as that of ``trainer.max_time``, has ended the run or is about to, and nothing else has.

    ``EarlyStopping`` ends a run for good, also where its time was up in the same epoch.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        # Between two epochs the trainer counts the last one already. An older stop is of a run that was gone on with.
        if (
            isinstance(callback, EarlyStopping)
            and callback.stopping_reason != EarlyStoppingReason.NOT_STOPPED
            and callback.stopped_epoch >= trainer.current_epoch - 1
        ):
            return False
    left = [callback.time_remaining() for callback in callbacks if isinstance(callback, Timer)]
    return any(seconds is not None and seconds <= 0 for seconds in left)


class EpochLines(Callback):
    """Prints one line an epoch where there is no progress bar, and records the length of the fit.

    ``fit.json`` holds ``seconds`` (training and validation, over all sittings of a resumed run), ``epochs`` and
    ``steps`` done, ``max_epochs`` and ``max_steps`` asked for (-1 for no limit), ``finished``: whether the run came to
    an end by itself, which one that ran out of ``max_time`` did not, and ``stopped_early``: whether that was before it
    had done what was asked for.
    """

    def __init__(self) -> None:
        self._seconds_before = 0.0
        self._start = self._epoch_start = 0.0
        self._folder: str | None = None
        self._has_begun = False

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
        self._start = self._epoch_start = time.perf_counter()
        self._has_begun = False
        self._folder = _run_folder(trainer)
        if trainer.is_global_zero and self._folder:
            mark_running(Path(self._folder), running=True)
            print(f"seqlit: run folder {self._folder}", flush=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on the trainer knows how much was done, by an earlier sitting too."""
        self._has_begun = True

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
        self._write(trainer, finished=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write ``fit.json`` of a fit that was ended by an error or a signal."""
        if trainer.state.fn == "fit":
            self._write(trainer, finished=False)

    def _write(self, trainer: Trainer, *, finished: bool) -> None:
        # The folder from before: asking for it is a collective, and after an error the others may not answer.
        if self._folder is None or not trainer.is_global_zero:
            return
        done = {"epochs": trainer.current_epoch, "steps": trainer.global_step}
        asked = {"max_epochs": -1 if trainer.max_epochs is None else trainer.max_epochs, "max_steps": trainer.max_steps}
        is_less = is_less_than_asked(done, asked)
        if finished and is_less and _is_out_of_time(trainer):
            finished = False
            print("seqlit: the time is up; `fit --ckpt_path last` goes on where trainer.max_time is longer", flush=True)
        facts = {"seconds": self._elapsed(), **done, **asked, "finished": finished}
        facts["stopped_early"] = finished and is_less
        if finished or self._has_begun:  # a resumed run that is refused keeps what its last sitting wrote
            write_whole(Path(self._folder) / "fit.json", json.dumps(facts, indent=2) + "\n")
        mark_running(Path(self._folder), running=False)
