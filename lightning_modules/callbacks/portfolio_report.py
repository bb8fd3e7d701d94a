"""The test report of portfolios of clusters: numbers, one table, plain sentences and pictures."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from lightning_modules.callbacks import cluster_pictures, portfolio_pictures
from lightning_modules.callbacks.portfolio_text import Findings, sentences, table
from lightning_modules.portfolio.findings import findings, plain
from lightning_modules.portfolio.study import Study
from lightning_modules.run_folder import read_fit_facts, write_whole


class PortfolioReport(Callback):
    """Writes ``report/`` after ``test``: ``metrics.json``, ``report.md`` and PNG pictures.

    Every arm of the study stands in one table with intervals of the stationary bootstrap; sentences say what the
    intervals allow to say and no more.

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
        self._study: Study | None = None
        self._start = 0.0

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        if trainer.world_size > 1:
            raise ValueError(f"PortfolioReport needs one process (--trainer.devices 1), got {trainer.world_size}")
        self._study, self._start = None, time.perf_counter()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the study."""
        if not isinstance(outputs, Study):
            raise ValueError(f"PortfolioReport needs a Study from test_step, got {type(outputs).__name__}")
        self._study = outputs

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write everything."""
        if not trainer.is_global_zero or self._study is None:
            return
        run = Path(trainer.log_dir or trainer.default_root_dir)
        found = findings(self._study, n_resamples=self.n_resamples, level=self.level)
        seconds = {"fit": read_fit_facts(run).get("seconds"), "test": time.perf_counter() - self._start}
        facts = getattr(getattr(trainer, "datamodule", None), "report_facts", dict)
        found |= {"seconds": seconds, "data": plain(facts())}
        write_report(run / "report", self._study, found)
        print(f"seqlit: report in {run / 'report'}", flush=True)


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
        chosen["random"] = ("Sharpe ratios of random clusterings", draw)
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
