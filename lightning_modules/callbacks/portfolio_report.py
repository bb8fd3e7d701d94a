"""The test report of portfolios of clusters: numbers, one table, plain sentences and pictures."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning_modules.callbacks import cluster_pictures, portfolio_pictures
from lightning_modules.callbacks.portfolio_text import Findings, sentences, table
from lightning_modules.callbacks.study_report import StudyReport
from lightning_modules.portfolio.findings import findings
from lightning_modules.portfolio.study import Study
from lightning_modules.run_folder import write_whole


class PortfolioReport(StudyReport):
    """Writes ``report/`` after ``test``: ``metrics.json``, ``report.md`` and PNG pictures.

    Every arm of the study stands in one table with intervals of the stationary bootstrap; sentences say what the
    intervals allow to say and no more. Arguments and errors are those of
    :class:`~lightning_modules.callbacks.study_report.StudyReport`.
    """

    study_type = Study

    def write(self, folder: Path, studies: list[Study], facts: dict[str, Any]) -> None:
        """Numbers, pictures and text; the whole panel is one batch."""
        (study,) = studies
        found = findings(study, n_resamples=self.n_resamples, level=self.level) | facts
        found["seconds"]["test"] = self.seconds
        write_report(folder, study, found)


def write_report(folder: Path, study: Study, found: Findings) -> None:
    """Write numbers, pictures and, last, the text that links them."""
    write_whole(folder / "metrics.json", json.dumps(found, indent=2, allow_nan=False) + "\n")
    pictures = _pictures(study, found)
    for name, (_, draw) in pictures.items():
        draw(folder / f"{name}.png")
    links = [f"![{caption}]({name}.png)" for name, (caption, _) in pictures.items()]
    write_whole(folder / "report.md", "\n".join([*table(found), "", *sentences(found), "", *links, ""]))


def _pictures(study: Study, found: Findings) -> dict[str, tuple[str, Callable[[Path], None]]]:
    """What each picture shows and how to draw it, those there is something to draw for."""
    random = found["random"]
    chosen: dict[str, tuple[str, Callable[[Path], None]]] = {
        "comparison": ("Sharpe ratios and differences", partial(portfolio_pictures.comparison, found=found)),
        "equity": ("growth of 1", partial(portfolio_pictures.equity, study=study)),
        "drawdown": ("drawdown", partial(portfolio_pictures.drawdown, study=study)),
        "rolling_sharpe": ("rolling Sharpe ratio", partial(portfolio_pictures.rolling_sharpe, study=study)),
    }
    if random is not None:
        draw = partial(portfolio_pictures.random_clusters, study=study, found=found)
        chosen["random"] = ("Sharpe ratios of clusterings by lot", draw)
    if study.costs_bps:
        chosen["costs"] = ("Sharpe ratio against costs", partial(portfolio_pictures.costs, study=study, found=found))
    chosen |= {
        "volatility": ("is it only volatility?", partial(cluster_pictures.volatility, study=study, found=found)),
        "weights": ("weights over time", partial(portfolio_pictures.weights, study=study)),
        "dendrogram": ("tree of the embedding", partial(cluster_pictures.dendrogram, study=study)),
        "clusters": ("clusters in the plane", partial(cluster_pictures.clusters, study=study)),
    }
    if study.diagrams is not None:
        draw = partial(cluster_pictures.diagrams, study=study)
        chosen["diagrams"] = ("persistence diagrams and barcodes", draw)
        if all(1 in diagram for diagram in study.diagrams):
            chosen["landscapes"] = ("landscapes by cluster", partial(cluster_pictures.landscapes, study=study))
    return chosen
