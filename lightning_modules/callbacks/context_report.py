"""The test report of context: numbers, verdicts, one table a target and pictures."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

from lightning_modules.callbacks import context_pictures
from lightning_modules.callbacks.context_text import Findings, report
from lightning_modules.callbacks.study_report import StudyReport
from lightning_modules.context.findings import findings
from lightning_modules.context.study import ContextStudy, Measure
from lightning_modules.run_folder import write_whole


class ContextReport(StudyReport):
    """Writes ``report/`` after ``test``: ``metrics.json``, ``report.md`` and PNG pictures.

    Every arm stands in one table a target, controls first; verdicts say what the corrected intervals allow to say.

    Args:
        n_resamples: Bootstrap resamples of users.
        level: Coverage of the intervals; 1 - level is the error rate of all judgements together.
        measure: What arms are judged by: ``"roc_auc"``, ``"pr_auc"``, ``"accuracy"`` or ``"log_loss"``.

    Raises:
        ValueError: If ``n_resamples`` is below 1, ``level`` outside (0, 1) or ``measure`` is unknown.
    """

    study_type = ContextStudy

    def __init__(self, *, n_resamples: int = 1000, level: float = 0.95, measure: Measure = "roc_auc") -> None:
        super().__init__(n_resamples=n_resamples, level=level)
        if measure not in get_args(Measure):
            raise ValueError(f"measure must be one of {get_args(Measure)}, got {measure!r}")
        self.measure: Measure = measure

    def write(self, folder: Path, studies: list[ContextStudy], facts: dict[str, Any]) -> None:
        """Numbers, pictures and text; the whole test is one batch."""
        (study,) = studies
        found = findings(study, n_resamples=self.n_resamples, level=self.level, measure=self.measure) | facts
        found["seconds"]["test"] = self.seconds
        write_report(folder, study, found)


def write_report(folder: Path, study: ContextStudy, found: Findings) -> None:
    """Write numbers, pictures and, last, the text that links them."""
    write_whole(folder / "metrics.json", json.dumps(found, indent=2, allow_nan=False) + "\n")
    pictures = _pictures(study, found)
    for name, (_, draw) in pictures.items():
        draw(folder / f"{name}.png")
    links = [f"![{caption}]({name}.png)" for name, (caption, _) in pictures.items()]
    write_whole(folder / "report.md", "\n".join([*report(found), "", "\n\n".join(links), ""]))


def _pictures(study: ContextStudy, found: Findings) -> dict[str, tuple[str, Callable[[Path], None]]]:
    """What each picture shows and how to draw it, those there is something to draw for."""
    measure: Measure = found["measure"]
    chosen: dict[str, tuple[str, Callable[[Path], None]]] = {
        "comparison": ("ROC-AUC of every arm", partial(context_pictures.comparison, found=found)),
    }
    if measure != "roc_auc":
        draw = partial(context_pictures.comparison, found=found, measure=measure)
        chosen[f"comparison_{measure}"] = ("the measure that arms are judged by", draw)
    if any(target["chosen"] for target in found["targets"].values()):
        caption = "gain against history length and recency"
        chosen["gains"] = (caption, partial(context_pictures.gains, found=found))
    seen = study.attention
    # An aggregator that gave no weight to anybody looked nowhere.
    if seen is not None and bool((seen.top_weights > 0).any()):
        chosen |= {
            "attention": ("entropy and effective number of users", partial(context_pictures.attention, seen=seen)),
            "influence": ("who influences whom", partial(context_pictures.influence, study=study)),
            "ages": ("age of the states that were used", partial(context_pictures.ages, seen=seen)),
        }
    if study.embeddings is not None:
        draw = partial(context_pictures.embedding_map, sample=study.embeddings)
        chosen["embeddings"] = ("map of the embeddings", draw)
    return chosen
