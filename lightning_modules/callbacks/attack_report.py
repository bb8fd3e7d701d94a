"""The test report of concealed attacks: numbers, two tables, plain sentences and pictures."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from lightning_modules.attacks.findings import Findings, findings
from lightning_modules.attacks.study import AttackStudy
from lightning_modules.callbacks import attack_pictures
from lightning_modules.callbacks.attack_text import judges_table, sentences, table
from lightning_modules.portfolio.findings import plain
from lightning_modules.run_folder import read_fit_facts, write_whole


class AttackReport(Callback):
    """Writes ``report/`` after ``test``: ``metrics.json``, ``report.md`` and PNG pictures.

    Every batch of ``test_step`` is an :class:`~lightning_modules.attacks.study.AttackStudy` of its series; they are
    joined to one.

    Args:
        n_resamples: Bootstrap resamples.
        level: Coverage of the intervals.

    Raises:
        ValueError: If ``n_resamples`` is below 1 or ``level`` outside (0, 1).
    """

    def __init__(self, *, n_resamples: int = 2000, level: float = 0.95) -> None:
        if n_resamples < 1:
            raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
        if not 0 < level < 1:
            raise ValueError(f"level must be between 0 and 1, got {level}")
        self.n_resamples = n_resamples
        self.level = level
        self._parts: list[AttackStudy] = []
        self._start = 0.0

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        if trainer.world_size > 1:
            raise ValueError(f"AttackReport needs one process (--trainer.devices 1), got {trainer.world_size}")
        self._parts, self._start = [], time.perf_counter()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the study of the batch."""
        if not isinstance(outputs, AttackStudy):
            raise ValueError(f"AttackReport needs an AttackStudy from test_step, got {type(outputs).__name__}")
        self._parts.append(outputs)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write everything."""
        if not trainer.is_global_zero or not self._parts:
            return
        run = Path(trainer.log_dir or trainer.default_root_dir)
        study = AttackStudy.join(self._parts)
        found = findings(study, n_resamples=self.n_resamples, level=self.level)
        seconds = {"fit": read_fit_facts(run).get("seconds"), "test": time.perf_counter() - self._start}
        facts = getattr(getattr(trainer, "datamodule", None), "report_facts", dict)
        found |= {"seconds": seconds, "data": plain(facts())}
        write_report(run / "report", study, found)
        self._parts = []
        print(f"seqlit: report in {run / 'report'}", flush=True)


def write_report(folder: Path, study: AttackStudy, found: Findings) -> None:
    """Write numbers, pictures and, last, the text that links them."""
    write_whole(folder / "metrics.json", json.dumps(found, indent=2, allow_nan=False) + "\n")
    pictures = _pictures(study, found)
    for name, (_, draw) in pictures.items():
        draw(folder / f"{name}.png")
    links = [f"![{caption}]({name}.png)" for name, (caption, _) in pictures.items()]
    tables = [*table(found), "", *judges_table(found)]
    write_whole(folder / "report.md", "\n".join([*tables, "", *sentences(found), "", *links, ""]))


def _pictures(study: AttackStudy, found: Findings) -> dict[str, tuple[str, Callable[[Path], None]]]:
    """What each picture shows and how to draw it, those there is something to draw for."""
    chosen: dict[str, tuple[str, Callable[[Path], None]]] = {}
    if study.judges:
        chosen["panel"] = ("each judge and attack", partial(attack_pictures.panel, found=found))
        chosen["transfer"] = ("attacks before judges", partial(attack_pictures.transfer, found=found))
        chosen["detection"] = ("ROC curves of the judges", partial(attack_pictures.detection, study=study, found=found))
    return chosen | {
        "pareto": ("effectiveness against concealability", partial(attack_pictures.pareto, study=study)),
        "scores": ("along the iterations", partial(attack_pictures.scores, study=study)),
        "series": ("original and attacked series", partial(attack_pictures.series, study=study)),
        "spectrum": ("spectrum of the perturbation", partial(attack_pictures.spectrum, study=study)),
    }
