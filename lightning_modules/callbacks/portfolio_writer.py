"""Clusters, weights and the orders of the day to Parquet."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from lightning import Callback, LightningModule, Trainer

from lightning_modules.callbacks.results_folder import results_folder
from lightning_modules.collectives import from_first
from lightning_modules.run_folder import drafted, write_parquet
from lightning_modules.tda_portfolio import Advice


def weights_frame(advice: Advice) -> pl.DataFrame:
    """Every rebalance: ``date``, ``ticker``, ``cluster`` (null for none), ``weight`` after it, ``held`` before."""
    plan, track = advice.plan, advice.track
    n_periods, n_stocks = track.targets.shape
    labels = np.stack([decision.labels for decision in plan.decisions if decision.labels is not None])
    return (
        pl.DataFrame(
            {
                "date": np.repeat(track.rebalance_dates, n_stocks),
                "ticker": list(advice.market.tickers) * n_periods,
                "cluster": labels.ravel(),
                "weight": track.targets.ravel(),
                "held": track.drifted.ravel(),
            }
        )
        .with_columns(pl.when(pl.col("cluster") >= 0).then(pl.col("cluster")))
        .filter(pl.col("cluster").is_not_null() | (pl.col("weight") > 0) | (pl.col("held") > 0))
    )


def orders_frame(advice: Advice) -> pl.DataFrame:
    """The session after the last day: ``as_of``, ``ticker``, ``cluster``, ``held``, ``target``, ``order``, ``side``.

    Weights are shares of wealth at the close of ``as_of``; ``order`` is target minus held, ``side`` buy, sell or hold;
    ``session`` is the day the orders are for and ``next_rebalance`` the first day with any, which may be later.
    """
    order = advice.target - advice.held
    # Weights are known to some 1e-8 of the solver: less than a millionth of wealth is no order.
    side = np.where(order > 1e-6, "buy", np.where(order < -1e-6, "sell", "hold"))
    return (
        pl.DataFrame(
            {
                "as_of": np.repeat(advice.market.dates[-1:], advice.market.n_stocks),
                "ticker": list(advice.market.tickers),
                "cluster": advice.labels,
                "held": advice.held,
                "target": advice.target,
                "order": order,
                "side": side,
                "session": np.repeat(advice.session, advice.market.n_stocks),
                "next_rebalance": np.repeat(advice.next_rebalance, advice.market.n_stocks),
            }
        )
        .with_columns(pl.when(pl.col("cluster") >= 0).then(pl.col("cluster")))
        # A stock picked earlier may have left the universe, and so the clusters, and still be bought.
        .filter(pl.col("cluster").is_not_null() | (pl.col("held") > 0) | (pl.col("target") > 0))
        .sort("order", descending=True, maintain_order=True)
    )


class PortfolioWriter(Callback):
    """Writes what ``predict`` advises: ``weights.parquet``, ``orders.parquet`` and the same as ``orders.csv``.

    Unless the next session is a rebalance of the strategy, everything is held, and the line printed says until when.

    Every file appears whole or not at all.
    """

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write, and print the orders: in the first process, which alone has them.

        Raises:
            ValueError: If the module predicts something else.
        """
        folder = results_folder(trainer)  # a collective, as the next: in every process
        if folder is not None:
            from_first(lambda: self._write(outputs, folder))

    @staticmethod
    def _write(outputs: Any, folder: Path) -> None:
        if not isinstance(outputs, Advice):
            raise ValueError(f"PortfolioWriter needs Advice from predict_step, got {type(outputs).__name__}")
        orders = orders_frame(outputs)
        write_parquet(folder / "weights.parquet", weights_frame(outputs))
        write_parquet(folder / "orders.parquet", orders)
        with drafted(folder / "orders.csv") as draft:
            orders.write_csv(draft)
        traded = orders.filter(pl.col("side") != "hold")
        as_of, file = outputs.market.dates[-1], folder / "orders.csv"
        if outputs.is_rebalance:
            print(f"seqlit: orders as of {as_of} for {outputs.session}, shares of wealth ({file}):", flush=True)
        else:
            print(
                f"seqlit: as of {as_of} hold, no orders for {outputs.session}: the next rebalance is at the first "
                f"session of {outputs.next_rebalance.astype('datetime64[M]')}, {outputs.next_rebalance} if no holiday "
                f"({file})",
                flush=True,
            )
        for row in traded.iter_rows(named=True):
            print(
                f"  {row['side']:<4} {row['ticker']:<8} {row['order']:+.4f}   {row['held']:.4f} -> {row['target']:.4f}"
            )
        for flag in outputs.flags:
            print(f"seqlit: {flag}", flush=True)
