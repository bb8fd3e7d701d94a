"""The test report of a recommender: numbers, a table and pictures, always beside simple baselines."""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_modules.baselines import fit_baselines
from lightning_modules.callbacks import report_pictures
from lightning_modules.callbacks.results_folder import folder_of_run, results_folder
from lightning_modules.collectives import from_first, gather_objects
from lightning_modules.metrics import mean_intervals, paired_intervals, per_user_metrics
from lightning_modules.metrics.functional import coverage, history_user_counts, recommendation_counts, surprisal
from lightning_modules.ranking import Recommendations
from lightning_modules.run_folder import read_fit_facts, write_whole

MODEL = "model"
ALL = "all systems"
HISTORY_LENGTH = "history_length"

Totals = dict[tuple[str, str], Tensor]
"""Sums over users of a system's metrics, or of what concerns :data:`ALL`: scalars, or ``(V,)`` counts of items."""


class RankingReport(Callback):
    """Writes ``report/`` after ``test``: ``metrics.json``, ``report.md`` and PNG pictures.

    On the very users the model was tested on, with the same candidates: most popular items, a Markov chain from the
    last basket (with the target ``next_item`` from the last item, whatever shares its timestamp), item co-visitation,
    and, where own history may be recommended, the user's own frequent items. Each is compared with the model by a
    paired bootstrap over users.

    In several processes each fits the baselines and ranks for its own users; the first writes what all have found. Of
    a user the values under the headline metrics travel, of the rest sums over users: O(users + items) in all.

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
        cutoffs: list[int] = pl_module.cutoffs  # type: ignore[assignment]
        if self.cutoff not in cutoffs:
            raise ValueError(f"cutoff must be one of the module's cutoffs {cutoffs}, got {self.cutoff}")
        self._start = time.perf_counter()
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        histories = data.train_histories()
        n_items = data.n_items
        self._baselines = fit_baselines(
            histories, n_items, repeats_allowed=data.recommend_seen, item_by_item=data.target == "next_item"
        )
        self._item_counts = np.bincount(histories.items, minlength=n_items)
        self._headline = [f"{word}@{self.cutoff}" for word in _INTERVALS]
        self._users: list[pl.DataFrame] = []
        self._totals: Totals = {}

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
        relevant, n_items = batch["relevant"], len(self._item_counts)
        asked = (relevant >= 0).any(1)
        together = {
            "users": torch.tensor(len(asked)),
            "asked": asked.sum(),
            "held": history_user_counts(batch["history_items"], batch["history_offsets"], n_items),
            "bought": torch.bincount(relevant[relevant >= 0], minlength=n_items),
        }
        for what, count in together.items():
            _add(self._totals, (ALL, what), count)
        columns = {"user_index": batch["user_index"], HISTORY_LENGTH: batch["history_offsets"].diff()}
        cutoffs: list[int] = pl_module.cutoffs  # type: ignore[assignment]
        for name, ids in ranked.items():
            for key, values in per_user_metrics(ids, relevant, cutoffs).items():
                _add(self._totals, (name, key), values[asked].sum())
                if key in self._headline:
                    columns[f"{name} {key}"] = values
            for k in cutoffs:
                _add(self._totals, (name, f"recommended@{k}"), recommendation_counts(ids, k, n_items))
        self._users.append(pl.DataFrame({name: column[asked].numpy() for name, column in columns.items()}))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write everything."""
        shards = gather_objects((self._users, self._totals))
        folder = results_folder(trainer)  # a collective, as the next: on every rank
        run = folder_of_run(trainer)
        frames = [frame for users, _ in shards for frame in users]
        totals: Totals = {}
        for _, found in shards:
            for key, value in found.items():
                _add(totals, key, value)
        if frames and folder is not None:
            users = pl.concat(frames).sort("user_index")
            from_first(lambda: self._write(run, folder / "report", trainer.datamodule, users, totals))  # type: ignore[attr-defined]

    def _write(self, run: Path, folder: Path, data: Any, users: pl.DataFrame, totals: Totals) -> None:
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))  # what seed_everything was called with
        bootstrap: dict[str, Any] = {"n_resamples": self.n_resamples, "seed": seed, "level": self.level}
        headline = {
            name: {key: users[f"{name} {key}"].to_numpy() for key in self._headline}
            for name in (MODEL, *self._baselines)
        }
        result: dict[str, Any] = {
            "model": _summary(MODEL, totals),
            "baselines": {name: _summary(name, totals) for name in self._baselines},
            "paired_difference": {
                name: paired_intervals(headline[MODEL], headline[name], **bootstrap) for name in self._baselines
            },
            "interval": {name: mean_intervals(values, **bootstrap) for name, values in headline.items()},
            "n_users": len(users),
            "seed": seed,
            "seconds": {"fit": read_fit_facts(run).get("seconds"), "test": time.perf_counter() - self._start},
            "data": data.report_facts(),
        }
        write_whole(folder / "metrics.json", json.dumps(result, indent=2) + "\n")
        write_whole(folder / "report.md", self._table(result))
        key = f"ndcg@{self.cutoff}"
        report_pictures.comparison(folder / "comparison.png", result, key)
        report_pictures.by_history_length(
            folder / "history_length.png",
            users[HISTORY_LENGTH].to_numpy(),
            {name: values[key] for name, values in headline.items()},
            key,
        )
        shown = {name: totals[name, f"recommended@{self.cutoff}"].numpy() for name in headline}
        shown["bought"] = totals[ALL, "bought"].numpy()
        report_pictures.popularity(folder / "popularity.png", self._item_counts, shown, self.cutoff)
        report_pictures.training(folder / "training.png", run / "metrics.csv", f"val/{key}")
        print(f"seqlit: report in {folder}", flush=True)

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
_TITLES = {"ndcg": "NDCG", "hit_rate": "HitRate", "recall": "Recall", "mrr": "MRR"}


def _title(key: str) -> str:
    word, k = key.split("@")
    return f"{_TITLES.get(word, word.capitalize())}@{k}"


def _add(totals: Totals, key: tuple[str, str], value: Tensor) -> None:
    if key in totals:
        totals[key] += value  # in place: at a million items the counts are large
    else:
        totals[key] = value


def _summary(name: str, totals: Totals) -> dict[str, float]:
    """Means over the users asked for, and how the recommendations spread over the catalogue."""
    found = {}
    for system, what in totals:
        if system != name:
            continue
        value = totals[system, what]
        if what.startswith("recommended@"):
            k = what.partition("@")[2]
            found[f"coverage@{k}"] = float(coverage(value, totals[ALL, "held"]))
            found[f"surprisal@{k}"] = float(surprisal(value, totals[ALL, "held"], totals[ALL, "users"]))
        else:
            found[what] = float(value / totals[ALL, "asked"])
    return found
