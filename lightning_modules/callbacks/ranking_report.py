"""The test report of a recommender: numbers, a table and pictures, always beside simple baselines."""

import json
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from lightning_modules.baselines import fit_baselines
from lightning_modules.callbacks import report_pictures
from lightning_modules.metrics import Coverage, Surprisal, mean_intervals, paired_intervals, per_user_metrics
from lightning_modules.ranking import Recommendations
from lightning_modules.run_folder import read_fit_facts, write_whole

MODEL = "model"


class RankingReport(Callback):
    """Writes ``report/`` after ``test``: ``metrics.json``, ``report.md`` and PNG pictures.

    On the very users the model was tested on, with the same candidates: most popular items, a Markov chain from the
    last basket, item co-visitation, and, where own history may be recommended, the user's own frequent items. Each
    is compared with the model by a paired bootstrap over users.

    Args:
        cutoff: The k of the headline table and of the intervals; one of the module's ``cutoffs``.
        n_resamples: Bootstrap resamples.
        level: Coverage of the intervals.

    Raises:
        ValueError: If ``n_resamples`` is below 1, ``level`` outside (0, 1), or the module does not rank to ``cutoff``.
    """

    def __init__(self, cutoff: int = 10, *, n_resamples: int = 2000, level: float = 0.95) -> None:
        if n_resamples < 1:
            raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
        if not 0 < level < 1:
            raise ValueError(f"level must be between 0 and 1, got {level}")
        self.cutoff = cutoff
        self.n_resamples = n_resamples
        self.level = level

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit the baselines on the training histories."""
        if trainer.world_size > 1:
            raise ValueError(f"RankingReport needs one process (--trainer.devices 1), got {trainer.world_size}")
        cutoffs: list[int] = pl_module.cutoffs  # type: ignore[assignment]
        if self.cutoff not in cutoffs:
            raise ValueError(f"cutoff must be one of the module's cutoffs {cutoffs}, got {self.cutoff}")
        self._start = time.perf_counter()
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        histories = data.train_histories()
        n_items = data.n_items
        self._baselines = fit_baselines(histories, n_items, repeats_allowed=data.recommend_seen)
        self._item_counts = np.bincount(histories.items, minlength=n_items)
        systems = [MODEL, *self._baselines]
        self._per_user: dict[str, dict[str, list[Tensor]]] = {name: defaultdict(list) for name in systems}
        self._spread: dict[str, dict[str, Metric]] = {
            name: {f"{word}@{k}": kind(k, n_items) for k in cutoffs for word, kind in _SPREAD.items()}
            for name in systems
        }
        self._shown = {name: np.zeros(n_items, dtype=np.int64) for name in [*systems, "bought"]}
        self._history_lengths: list[Tensor] = []
        self._has_relevant: list[Tensor] = []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Rank for the same users with every baseline."""
        if not isinstance(outputs, Recommendations):
            raise ValueError(f"RankingReport needs Recommendations from test_step, got {type(outputs).__name__}")
        batch = {key: value.cpu() for key, value in batch.items()}
        history = (batch["history_items"], batch["history_baskets"], batch["history_offsets"])
        deepest = outputs.item_ids.shape[1]
        ranked = {MODEL: outputs.item_ids.cpu()}
        for name, baseline in self._baselines.items():
            ranked[name] = baseline.recommend(
                *history,
                deepest,
                exclude_seen=not trainer.datamodule.recommend_seen,  # type: ignore[attr-defined]
            )
        for name, ids in ranked.items():
            for key, values in per_user_metrics(ids, batch["relevant"], pl_module.cutoffs).items():  # type: ignore[arg-type]
                self._per_user[name][key].append(values)
            for metric in self._spread[name].values():
                metric.update(ids, batch["history_items"], batch["history_offsets"])
            self._shown[name] += _count(ids[:, : self.cutoff], len(self._item_counts))
        self._shown["bought"] += _count(batch["relevant"], len(self._item_counts))
        self._history_lengths.append(batch["history_offsets"].diff())
        self._has_relevant.append((batch["relevant"] >= 0).any(1))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write everything."""
        if not trainer.is_global_zero or not self._history_lengths:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        run = Path(trainer.log_dir or trainer.default_root_dir)
        asked = torch.cat(self._has_relevant)
        per_user = {
            name: {key: torch.cat(parts)[asked].numpy() for key, parts in values.items()}
            for name, values in self._per_user.items()
        }
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))  # what seed_everything was called with
        bootstrap: dict[str, Any] = {"n_resamples": self.n_resamples, "seed": seed, "level": self.level}
        chosen = [f"{word}@{self.cutoff}" for word in _INTERVALS]
        headline = {name: {key: values[key] for key in chosen} for name, values in per_user.items()}
        result: dict[str, Any] = {
            "model": self._summary(MODEL, per_user),
            "baselines": {name: self._summary(name, per_user) for name in self._baselines},
            "paired_difference": {
                name: paired_intervals(headline[MODEL], headline[name], **bootstrap) for name in self._baselines
            },
            "interval": {name: mean_intervals(values, **bootstrap) for name, values in headline.items()},
            "n_users": int(asked.sum()),
            "seed": seed,
            "seconds": {"fit": read_fit_facts(run).get("seconds"), "test": time.perf_counter() - self._start},
            "data": data.report_facts(),
        }
        folder = run / "report"
        write_whole(folder / "metrics.json", json.dumps(result, indent=2) + "\n")
        write_whole(folder / "report.md", self._table(result))
        key = f"ndcg@{self.cutoff}"
        report_pictures.comparison(folder / "comparison.png", result, key)
        report_pictures.by_history_length(
            folder / "history_length.png",
            torch.cat(self._history_lengths)[asked].numpy(),
            {name: values[key] for name, values in per_user.items()},
            key,
        )
        report_pictures.popularity(folder / "popularity.png", self._item_counts, self._shown, self.cutoff)
        report_pictures.training(folder / "training.png", run / "metrics.csv", f"val/{key}")
        print(f"seqlit: report in {folder}", flush=True)

    def _summary(self, name: str, per_user: dict[str, dict[str, np.ndarray]]) -> dict[str, float]:
        means = {key: float(values.mean()) for key, values in per_user[name].items()}
        return means | {key: float(metric.compute()) for key, metric in self._spread[name].items()}

    def _table(self, result: dict[str, Any]) -> str:
        k, percent = self.cutoff, f"{100 * self.level:g} %"
        keys = [f"{word}@{k}" for word in ("ndcg", "hit_rate", "recall", "mrr", "coverage", "surprisal")]
        lines = [
            f"# Test report: {result['n_users']} users",
            "",
            f"| | {' | '.join(map(_title, keys))} | model minus this, {_title(keys[0])} [{percent} interval] |",
            "|---" * (len(keys) + 2) + "|",
        ]
        for name, values in [(MODEL, result["model"]), *result["baselines"].items()]:
            cells = [f"{values[key]:.4f}" for key in keys]
            gap = (
                ""
                if name == MODEL
                else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*result["paired_difference"][name][keys[0]])
            )
            lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} | {gap} |")
        seconds = result["seconds"]
        fit = "unknown" if seconds["fit"] is None else f"{seconds['fit']:.0f} s"
        lines += [
            "",
            f"Seed {result['seed']}; fit {fit}, test {seconds['test']:.0f} s. Intervals: paired bootstrap over users, "
            f"{self.n_resamples} resamples; they hold the trained weights fixed, other seeds move the model too.",
            "",
            "![model and baselines](comparison.png)",
            "![by length of history](history_length.png)",
            "![by popularity of items](popularity.png)",
            "![course of training](training.png)",
            "",
        ]
        return "\n".join(lines)


_INTERVALS = ("ndcg", "hit_rate", "recall", "mrr")
_SPREAD: dict[str, Any] = {"coverage": Coverage, "surprisal": Surprisal}
_TITLES = {"ndcg": "NDCG", "hit_rate": "HitRate", "recall": "Recall", "mrr": "MRR"}


def _title(key: str) -> str:
    word, k = key.split("@")
    return f"{_TITLES.get(word, word.capitalize())}@{k}"


def _count(ids: Tensor, n_items: int) -> np.ndarray:
    return torch.bincount(ids[ids >= 0], minlength=n_items).numpy()
