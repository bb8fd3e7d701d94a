"""The resolved config in the run folder, which a fit that is refused does not leave behind."""

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from lightning_modules.run_folder import RunLogger, write_whole


class SaveRunConfig(SaveConfigCallback):
    """Writes the resolved config into the run folder when ``fit`` starts, once and whole.

    Much of what a fit may be refused for is only known later, up to the first training batch: to modules, to the
    strategy, to whoever looks at the loaders. An error before that batch takes away the config, and the run folder
    where this process made it. What was there before stays.
    """

    _path: Path | None = None
    _has_begun = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml``; a resumed run, its trainer perhaps set otherwise, adds ``config_sitting_<n>.yaml``."""
        if stage != "fit" or not trainer.loggers:
            return
        folder = trainer.log_dir  # a collective: on every rank
        if folder is None or not trainer.is_global_zero:
            return
        path, sitting = Path(folder) / self.config_filename, 1
        while path.exists():
            sitting += 1
            path = path.with_name(f"config_sitting_{sitting}.yaml")
        self._path = path
        write_whole(path, self.parser.dump(self.config, skip_unset=False))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """From here on there is a run to keep."""
        self._has_begun = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A fit without a batch to train on has ended well."""
        self._has_begun = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take away what a refused fit has left; one that was ended by a signal was not refused."""
        is_refusal = trainer.state.fn == "fit" and not self._has_begun and isinstance(exception, Exception)
        if not is_refusal or not trainer.is_global_zero:
            return
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.remove_folder()
