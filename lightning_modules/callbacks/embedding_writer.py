"""Embeddings of queries to Parquet, with the users that influenced them."""

from pathlib import Path
from typing import Any

import polars as pl
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_modules.callbacks.results_folder import results_folder
from lightning_modules.collectives import from_first
from lightning_modules.context.evaluation import Embeddings
from lightning_modules.run_folder import write_parquet


def embeddings_frame(found: Embeddings) -> pl.DataFrame:
    """One row a query, in the order of the queries.

    Columns ``user`` (original id), ``time`` (datetime in microseconds, UTC without a zone), ``own`` (d), ``context``
    (k) and ``embedding`` (D) as lists of float32, the last two ending with the flag of an empty context where the rules
    have one; ``top_users``, a list of original ids, most influential first, and ``top_weights``, as many shares of all
    weights of the query. Both lists are empty for a query that saw nobody, the weights also for an aggregator without
    any.

    Raises:
        ValueError: If a number of an embedding is not finite.
    """
    # The type of all ids: those of influential users may need more bits than those that are asked.
    kind = pl.Series([*found.user_ids, *(user for row in found.top_users for user in row)]).dtype
    users = pl.Series("user", found.user_ids, dtype=kind)
    if found.top_weights is None:
        weights: list[list[float]] = [[] for _ in found.top_users]
    else:
        shares = found.top_weights.tolist()
        weights = [row[: len(seen)] for row, seen in zip(shares, found.top_users, strict=True)]
    return pl.DataFrame(
        [
            users,
            pl.Series("time", found.times.numpy()).cast(pl.Datetime("us")),
            *(_lists(name, getattr(found, name), users) for name in ("own", "context", "embedding")),
            # Of the users' own type, so that a file in which nobody saw anybody has the same columns.
            pl.Series("top_users", found.top_users, dtype=pl.List(users.dtype)),
            pl.Series("top_weights", weights, dtype=pl.List(pl.Float32)),
        ]
    )


def _lists(name: str, vectors: Tensor, users: pl.Series) -> pl.Series:
    wrong = (~vectors.isfinite()).any(1).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(f"{name} of user {users[wrong[0]]!r}, query {wrong[0]}, must be finite, got nan or inf")
    return pl.Series(name, vectors.float().numpy()).arr.to_list()


class EmbeddingWriter(Callback):
    """Writes what ``predict`` gives to ``embeddings.parquet`` in the run folder, whole or not at all.

    With :class:`~lightning_modules.KernelAttentionAggregator` these are the test queries of the first target alone.
    Columns are those of :func:`embeddings_frame`. Of several processes the first has all embeddings and writes.
    """

    def __init__(self) -> None:
        self._found: list[Embeddings] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier prediction."""
        self._found = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch.

        Raises:
            ValueError: If the module predicts something else.
        """
        if outputs is None and not trainer.is_global_zero:
            return
        if not isinstance(outputs, Embeddings):
            raise ValueError(f"EmbeddingWriter needs Embeddings from predict_step, got {type(outputs).__name__}")
        self._found.append(outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write, once.

        Raises:
            ValueError: If a number of an embedding is not finite; in every process.
        """
        folder = results_folder(trainer)  # a collective
        if folder is not None:
            from_first(lambda: self._write(folder / "embeddings.parquet"))

    def _write(self, path: Path) -> None:
        if not self._found:
            return
        frame = pl.concat([embeddings_frame(found) for found in self._found])
        first = self._found[0]
        asked = f"{frame['user'].n_unique()} of {first.n_users} users: test queries of target {first.target!r}"
        write_parquet(path, frame, f"embeddings ({asked})")
