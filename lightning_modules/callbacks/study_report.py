"""What reports of studies share: what ``test_step`` returns is kept, and summed up when the test ends."""

import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from lightning import Callback, LightningModule, Trainer

from lightning_modules.callbacks.results_folder import folder_of_run, results_folder
from lightning_modules.collectives import from_first, gather_objects
from lightning_modules.portfolio.findings import plain
from lightning_modules.run_folder import read_fit_facts


class StudyReport(Callback, ABC):
    """Keeps the study of every test batch, and hands them on with the clock and the facts of the data.

    Of several processes each keeps its own; when the test ends the first gets them all, by process, and writes.

    Args:
        n_resamples: Bootstrap resamples.
        level: Coverage of the intervals.

    Raises:
        ValueError: If ``n_resamples`` is below 1 or ``level`` outside (0, 1).
    """

    study_type: ClassVar[type]
    """What ``test_step`` must return."""

    def __init__(self, *, n_resamples: int = 2000, level: float = 0.95) -> None:
        if n_resamples < 1:
            raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
        if not 0 < level < 1:
            raise ValueError(f"level must be between 0 and 1, got {level}")
        self.n_resamples = n_resamples
        self.level = level
        self._studies: list[Any] = []
        self._start = 0.0

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._studies, self._start = [], time.perf_counter()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the study of the batch.

        Raises:
            ValueError: If the module returns something else; of several processes, one with nothing may return None.
        """
        if outputs is None and trainer.world_size > 1:
            return
        if not isinstance(outputs, self.study_type):
            wanted = self.study_type.__name__
            raise ValueError(f"{type(self).__name__} needs {wanted} from test_step, got {type(outputs).__name__}")
        self._studies.append(outputs)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write everything into ``report/`` of the run folder, once."""
        folder = results_folder(trainer)  # a collective, as the next ones: in every process
        run = folder_of_run(trainer)
        studies = [study for kept in gather_objects(self._studies) for study in kept]
        self._studies = []
        if studies and folder is not None:
            from_first(lambda: self._write(run, folder / "report", studies, trainer))

    def _write(self, run: Path, folder: Path, studies: list[Any], trainer: Trainer) -> None:
        facts = getattr(getattr(trainer, "datamodule", None), "report_facts", dict)
        seconds = {"fit": read_fit_facts(run).get("seconds")}
        self.write(folder, studies, {"data": plain(facts()), "seconds": seconds})
        print(f"seqlit: report in {folder}", flush=True)

    @property
    def seconds(self) -> float:
        """Time since the test began."""
        return time.perf_counter() - self._start

    @abstractmethod
    def write(self, folder: Path, studies: list[Any], facts: dict[str, Any]) -> None:
        """Sum up the studies of all batches and processes, and write; called in the first process alone.

        Args:
            folder: ``report/`` in the folder of results.
            studies: What ``test_step`` returned, the first process' before the second's; at least one.
            facts: Of the data and of the fit, plain values.
        """
