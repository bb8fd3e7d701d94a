"""The test report of concealed attacks: numbers, three tables, plain sentences, pictures and the points of a front."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from lightning_modules.attacks.findings import Findings, findings, pareto_points
from lightning_modules.attacks.study import AttackStudy
from lightning_modules.callbacks import attack_pictures
from lightning_modules.callbacks.attack_text import classifier_table, judges_table, sentences, table
from lightning_modules.callbacks.study_report import StudyReport
from lightning_modules.run_folder import write_whole


class AttackReport(StudyReport):
    """Writes ``report/`` after ``test``: ``metrics.json``, ``pareto.csv``, ``report.md`` and PNG pictures.

    Every batch of ``test_step`` is an :class:`~lightning_modules.attacks.study.AttackStudy` of its series; they are
    joined to one. Arguments and errors are those of :class:`~lightning_modules.callbacks.study_report.StudyReport`.
    """

    study_type = AttackStudy

    def write(self, folder: Path, studies: list[AttackStudy], facts: dict[str, Any]) -> None:
        """Numbers, pictures and text."""
        study = AttackStudy.join(studies)
        found = findings(study, n_resamples=self.n_resamples, level=self.level) | facts
        found["seconds"]["test"] = self.seconds
        write_report(folder, study, found)


def write_report(folder: Path, study: AttackStudy, found: Findings) -> None:
    """Write numbers, the points of the Pareto fronts, pictures and, last, the text that links them.

    ``pareto.csv`` has the columns of :func:`~lightning_modules.attacks.findings.pareto_points`.
    """
    write_whole(folder / "metrics.json", json.dumps(found, indent=2, allow_nan=False) + "\n")
    write_whole(folder / "pareto.csv", pl.DataFrame(pareto_points(study), infer_schema_length=None).write_csv())
    pictures = _pictures(study, found)
    for name, (_, draw) in pictures.items():
        draw(folder / f"{name}.png")
    links = [f"![{caption}]({name}.png)" for name, (caption, _) in pictures.items()]
    tables = [*table(found), "", *classifier_table(found), "", *judges_table(found)]
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
