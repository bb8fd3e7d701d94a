"""Stocks clustered by the topology of their returns, and portfolios of them tested walk-forward.

Source: arXiv 2308.07944; where its protocol looks ahead, the causal one is the default and the published an option.
"""

import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from lightning_modules.collectives import from_first, kept_by_first, n_processes, rank, share
from lightning_modules.many_devices import require_replicas
from lightning_modules.metrics import EpochMean
from lightning_modules.portfolio.backtest import Plan, Track, traded
from lightning_modules.portfolio.clusterers import Clusterer, Labels, Stocks, standardised
from lightning_modules.portfolio.market import Array, Market, next_month_start, next_session
from lightning_modules.portfolio.metrics import clustering_scores
from lightning_modules.portfolio.selection import TopSharpe
from lightning_modules.portfolio.strategy import Selection
from lightning_modules.portfolio.study import Study, ever_held
from lightning_modules.portfolio.walk import (
    Frame,
    Mode,
    Rules,
    cluster_strategy,
    control_arms,
    names_of,
    permuted_arms,
    random_arms,
    walk,
    with_risk_free,
)
from lightning_modules.portfolio.weighting import MeanVariance, PublishedMeanVariance, Weighting

_SCORES = ("silhouette", "davies_bouldin", "calinski_harabasz")


class Advice:
    """What ``predict`` says. No dataclass: Lightning would take one apart to move its tensors, and there are none.

    Args:
        market: All days given.
        plan: Clusters and weights at every rebalance from the start of the test to the last day.
        track: What they earned; ``track.held`` are the weights after the last day, drifted since the last rebalance.
        labels: ``(A,)`` clusters of the last refit, that of the next session included; -1 for stocks in none.
        target: ``(A,)`` weights for the next session; those of ``track.held`` unless it is a rebalance.
        session: The next session.
        next_rebalance: The next session that is a rebalance, ``session`` itself or the first one of the month after
            it, as days from Monday to Friday count.
        flags: What went other than asked for in the decision for the next session.
    """

    def __init__(
        self,
        *,
        market: Market,
        plan: Plan,
        track: Track,
        labels: Labels,
        target: Array,
        session: np.datetime64,
        next_rebalance: np.datetime64,
        flags: tuple[str, ...] = (),
    ) -> None:
        self.market = market
        self.plan = plan
        self.track = track
        self.labels = labels
        self.held = track.held
        self.target = target
        self.session = session
        self.next_rebalance = next_rebalance
        self.flags = flags

    @property
    def is_rebalance(self) -> bool:
        """Whether the next session is one."""
        return bool(self.session == self.next_rebalance)


class TDAPortfolioClusterer(LightningModule):
    """Represent each stock by its returns, cluster, pick a few stocks a cluster, weigh, and hold.

    ``fit`` learns the representation and clusters the stocks of the train window, ``test`` walks forward through the
    test period beside control strategies, ``predict`` gives clusters, weights and the orders of the day. Batches are
    those of ``StockPricesDataModule``: in training ``windows (B, L) float32``; in validation the same and the panel up
    to the end of the train window; in test and prediction the whole panel with the row numbers of its periods.

    | mode | stocks are represented, clustered and selected | drift within a month |
    |---|---|---|
    | ``published`` | once; selected with the whole frame, test included: a look-ahead, kept to reproduce tables | no |
    | ``causal`` | once, in the train window | yes |
    | ``causal_rolling`` | every ``refit_months``, in the window of equal length before | yes |

    Weights are renewed every month. Mode ``published`` weighs as published, free of charge, unless told otherwise. In
    the last two modes, whatever holds on a day was known at the close before it. Trained networks stay as the fit left
    them; what is fitted without training (grids, delays) is fitted anew at a refit.

    Logged: ``train/loss`` and ``val/loss`` of a trained network; ``val/silhouette``, ``val/davies_bouldin``,
    ``val/calinski_harabasz`` of the first clusterer.

    Of several processes each trains on its windows, and the gradients are those of the mean over all windows. The loss
    must be a mean over its windows, and take none of them where there are more processes than windows left. Stocks are
    represented, clustered and walked by the first process; ``test_step`` and ``predict_step`` return None in others.

    Args:
        representation: Network from returns ``(A, T)`` to rows ``(A, D)``, see
            :mod:`lightning_modules.portfolio.representations` for what else it may do.
        clusterers: One or more; each is an arm of the report, the first is in charge of ``predict``.
        selection: Picks stocks of each cluster; by default the two of largest Sharpe ratio.
        weighting: Weights of the picks; by default mean-variance with at most 0.3 in a stock, in mode ``published``
            with the published target and solver.
        mode: See the table.
        weight_months: Calendar months of returns that weights are estimated on.
        refit_months: Months between refits in mode ``causal_rolling``.
        min_observed: Share of days of the window with a return that makes a stock eligible.
        risk_free: Annual; of every ratio reported, and of every rule and representation inside that names none:
            ``TopSharpe.risk_free``, ``MeanVariance.annual_target``, ``FinancialFeatures.risk_free``.
        cost_bps: Cost of a trade in basis points of what is traded; by default 10, in mode ``published`` 0.
        costs_bps: Costs for the picture of sensitivity.
        n_random: Random clusterings to compare with, by seed 0, 1, ..., and as many of the model's own sizes.
        n_trials: Configurations tried so far, for the deflated Sharpe ratio; by default the clusterers.
        next_session: Date of the session that ``predict`` decides for, such as 2023-01-03; by default the next day
            from Monday to Friday after the last price, which knows no holidays.
        optimizer: Called with the parameters of a network that is trained.
        scheduler: Called with the optimiser, stepped every epoch.
        monitor: The logged key that a plateau scheduler watches.

    Raises:
        ValueError: If there is no clusterer, a number is out of range, or ``next_session`` is no date.
    """

    def __init__(
        self,
        *,
        representation: nn.Module,
        clusterers: list[Clusterer],
        selection: Selection | None = None,
        weighting: Weighting | None = None,
        mode: Mode = "causal",
        weight_months: int = 24,
        refit_months: int = 12,
        min_observed: float = 0.95,
        risk_free: float = 0.03,
        cost_bps: float | None = None,
        costs_bps: Sequence[float] = (0.0, 5.0, 10.0, 20.0, 50.0),
        n_random: int = 100,
        n_trials: int | None = None,
        next_session: str | None = None,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
        monitor: str = "val/loss",
    ) -> None:
        if not clusterers:
            raise ValueError("clusterers must name at least one clusterer, got none")
        if n_random < 0 or (n_trials is not None and n_trials < 1):
            raise ValueError(f"n_random must be at least 0 and n_trials at least 1, got {n_random} and {n_trials}")
        if min(costs_bps, default=0.0) < 0:
            raise ValueError(f"costs_bps must be at least 0, got {list(costs_bps)}")
        super().__init__()
        self.representation = representation
        self.clusterers = list(clusterers)
        self.rules = Rules(
            mode=mode,
            selection=with_risk_free(selection or TopSharpe(), risk_free),
            weighting=with_risk_free(
                weighting or (PublishedMeanVariance() if mode == "published" else MeanVariance()), risk_free
            ),
            weight_months=weight_months,
            refit_months=refit_months,
            min_observed=min_observed,
            cost_bps=(0.0 if mode == "published" else 10.0) if cost_bps is None else cost_bps,
        )
        self.risk_free = risk_free
        for module in representation.modules():
            if getattr(module, "risk_free", risk_free) is None:
                module.risk_free = risk_free  # type: ignore[assignment]
        self.costs_bps = tuple(costs_bps)
        self.n_random = n_random
        self.n_trials = len(self.clusterers) if n_trials is None else n_trials
        self.next_session = None if next_session is None else _day(next_session)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.monitor = monitor
        self.is_trained = callable(getattr(representation, "loss", None))
        # Lightning saves no checkpoint before the first step of an optimiser, and DDP refuses modules without
        # parameters: where nothing is trained, a parameter without effect is.
        self.idle = None if self.is_trained else nn.Parameter(torch.zeros(()))
        self.train_loss = EpochMean()
        self.val_loss = EpochMean()
        self.val_scores = nn.ModuleDict({name: EpochMean() for name in _SCORES})
        # What the fit found: tickers and rows of the stocks of the train window, labels of the first clusterer.
        self.fitted: dict[str, Any] | None = None

    def forward(self, returns: Tensor, index_returns: Tensor | None = None) -> Tensor:
        """Rows ``(A, D)`` of stocks with returns ``(A, T)``; the index ``(T,)`` is read by few representations."""
        return _rows(self.representation, returns, index_returns)

    def _loss(self, windows: Tensor) -> Tensor:
        return self.representation.loss(windows)  # type: ignore[operator]

    def setup(self, stage: str) -> None:
        """See that every process holds the whole model, and that prices keep their digits.

        Raises:
            ValueError: Under a strategy that splits the model, with several processes under another than
                ``replicated``, or with a precision of 16 bits for all floats.
        """
        require_replicas(self.trainer)
        precision = self.trainer.precision
        if precision in ("16-true", "bf16-true"):  # Lightning casts batches too, and with them the panel of prices
            raise ValueError(
                f"trainer.precision must not be {precision}, which rounds prices to 16 bits: "
                f"{precision.removesuffix('true')}mixed keeps them"
            )

    def on_train_epoch_start(self) -> None:
        """Forget the losses of the last epoch."""
        self.train_loss.reset()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of a network that is trained; 0 for others."""
        if self.idle is not None:
            return 0 * self.idle
        windows = batch["windows"]
        # With no windows too: norms may need all processes.
        loss = self._loss(windows)
        self.train_loss.update(loss, len(windows))
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(windows))
        if len(windows) == 0:  # whose mean is not a number
            loss = torch.stack([0 * parameter.sum() for parameter in self.parameters()]).sum()
        return loss * share(len(windows), device=self.device)

    def on_validation_epoch_start(self) -> None:
        """Forget the validation before: a checkpoint carries it."""
        for mean in (self.val_loss, *self.val_scores.values()):
            mean.reset()  # type: ignore[operator]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Represent and cluster the stocks of the train window, and score the clusters."""
        if self.trainer.sanity_checking:
            return
        if self.is_trained:
            windows = batch["windows"][rank() :: n_processes()]
            self.val_loss.update(self._loss(windows) if len(windows) else 0.0, len(windows))
            self.log("val/loss", self.val_loss, prog_bar=True, batch_size=len(windows))
        self.fitted, scores = from_first(lambda: self._clustered(batch))
        for name, mean in self.val_scores.items():
            mean.update(scores[name], 1.0 if rank() == 0 else 0.0)  # type: ignore[operator]
        self.log_dict({f"val/{name}": mean for name, mean in self.val_scores.items()}, batch_size=1)  # type: ignore[misc]

    def _clustered(self, batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
        """What the fit keeps of the stocks of the train window, and the scores of their clusters."""
        stocks = Frame.from_batch(batch, self.rules.mode).first_stocks(self.rules)
        rows = self._represent(self.representation, stocks)
        embedding = standardised(rows)
        labels = self.clusterers[0](Stocks(embedding, stocks.filled_returns(), stocks.sectors))
        fitted = {
            "tickers": list(stocks.tickers),
            "first_day": str(stocks.dates[0]),
            "last_day": str(stocks.dates[-1]),
            "rows": torch.from_numpy(rows),
            "labels": torch.from_numpy(labels),
        }
        return fitted, clustering_scores(embedding, labels)

    @torch.no_grad()
    def _represent(self, network: nn.Module, stocks: Market) -> Array:
        """Rows ``(E, D) float64`` of a window; a network that is fitted without training is fitted on it."""
        # Networks compute in the dtype of their weights; what has none, in that of the panel.
        dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float64)
        returns = torch.from_numpy(np.ascontiguousarray(stocks.filled_returns().T)).to(self.device, dtype)
        index = None if stocks.index_returns is None else torch.from_numpy(stocks.index_returns).to(self.device, dtype)
        fit = getattr(network, "fit", None)
        if callable(fit) and not self.is_trained:
            fit(returns)
        was_training = network.training
        network.eval()
        try:
            rows = _rows(network, returns, index)
        finally:
            network.train(was_training)
        if rows.ndim != 2 or len(rows) != stocks.n_stocks:
            raise ValueError(
                f"representation must give one row for each of {stocks.n_stocks} stocks, got shape {tuple(rows.shape)}"
            )
        return rows.cpu().double().numpy()

    def _represent_by_fit(self, frame: Frame) -> Callable[[Market], Array]:
        """Rows of any window: those of the fit for its own window; others are computed once and remembered."""
        fitted = self.fitted
        if fitted is None:
            raise ValueError("nothing was clustered: run `seqlit fit`, with validation, before test or predict")
        stocks = frame.first_stocks(self.rules)
        here, there = (str(stocks.dates[-1]), list(stocks.tickers)), (fitted["last_day"], fitted["tickers"])
        if here != there:
            raise ValueError(
                f"the checkpoint clustered {len(there[1])} stocks up to {there[0]}, the panel here has {len(here[1])} "
                f"up to {here[0]}: fit again, or test with the data of the fit"
            )
        known = {(here[0], stocks.tickers): fitted["rows"].numpy()}
        network = deepcopy(self.representation)  # a refit leaves the fitted state alone

        def represent(stocks: Market) -> Array:
            key = (str(stocks.dates[-1]), stocks.tickers)
            if key not in known:
                known[key] = self._represent(network, stocks)
            return known[key]

        return represent

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> Study | None:  # type: ignore[override]
        """Walk every arm through the test period; the report callback reads what is returned."""
        return kept_by_first(lambda: self._study(batch))

    def _study(self, batch: dict[str, Any]) -> Study:
        frame, rules = Frame.from_batch(batch, self.rules.mode), self.rules
        represent = self._represent_by_fit(frame)
        named = names_of(self.clusterers)
        arms = [
            walk(f"model, {name}", "model", frame, rules, cluster_strategy(frame, rules, represent, clusterer))
            for name, clusterer in named.items()
        ]
        arms += control_arms(frame, rules, self.clusterers)
        columns = frame.first_columns(rules)
        stocks = frame.train_window.stocks(columns)
        embedding = standardised(represent(stocks))
        # As the walks clustered them at the first rebalance.
        grouped = [arm.plan.decisions[0].labels[columns] for arm in arms[: len(named)]]  # type: ignore[union-attr,index]
        n_clusters = int(grouped[0].max()) + 1
        seeds = range(self.n_random if n_clusters > 1 else 0)
        shown = partial(tqdm, disable=None, leave=False)  # on a terminal
        by_lot = random_arms(frame, rules, n_clusters, shown(seeds, desc="random clusters"))
        assert arms[0].plan is not None
        permuted = permuted_arms(frame, rules, arms[0].plan, shown(seeds, desc="permuted clusters"))
        diagrams = getattr(self.representation, "diagrams", None)
        returns = torch.from_numpy(np.ascontiguousarray(stocks.filled_returns().T))
        return Study(
            mode=rules.mode,
            market=frame.market,
            train=frame.train,
            test=frame.test,
            arms=tuple(arms),
            random_arms=tuple(by_lot),
            permuted_arms=tuple(permuted),
            columns=columns,
            embedding=embedding,
            labels=grouped[0],
            diagrams=diagrams(returns) if callable(diagrams) else None,
            scores={
                name: clustering_scores(embedding, labels, stocks.sectors if stocks.sector_names else None)
                for name, labels in zip(named, grouped, strict=True)
            },
            risk_free=self.risk_free,
            cost_bps=rules.cost_bps,
            costs_bps=self.costs_bps,
            drift=rules.drift,
            n_trials=self.n_trials,
            flags=(*batch["flags"], *_untold_ends(frame, ever_held([*arms, *by_lot, *permuted]))),
            seed=int(os.environ.get("PL_GLOBAL_SEED", 0)),  # what seed_everything was called with
        )

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Advice | None:
        """Walk on to the last day there is, then decide for the session after it as the strategy would.

        Where that session opens a new month it is a rebalance like those of the test, with a refit if one is due.
        On any other the strategy does not trade: the target is what is held, and nothing is fitted or weighed anew.

        Raises:
            ValueError: In mode ``published``, which needs the future, or if ``next_session`` is not after the last day.
        """
        if self.rules.mode == "published":
            raise ValueError("mode published selects stocks by returns of the test: it cannot advise, use causal")
        return kept_by_first(lambda: self._advice(batch))

    def _advice(self, batch: dict[str, Any]) -> Advice:
        frame = Frame.from_batch(batch, self.rules.mode, to_the_end=True)
        strategy = cluster_strategy(frame, self.rules, self._represent_by_fit(frame), self.clusterers[0])
        arm = walk("model", "model", frame, self.rules, strategy)
        assert arm.plan is not None
        session, held = next_session(frame.market.dates, self.next_session), arm.track.held
        due, target = session, held
        flags: tuple[str, ...] = ()
        if session.astype("datetime64[M]") == frame.market.dates[-1].astype("datetime64[M]"):
            due = next_month_start(session)
        else:
            decision = strategy(frame.market, len(arm.plan.rows))
            target, frozen = traded(decision.weights, held, frame.market)
            flags = decision.flags + frozen
        assert strategy.groups is not None
        return Advice(
            market=frame.market,
            plan=arm.plan,
            track=arm.track,
            labels=strategy.groups.labels_of_all(frame.market.n_stocks),
            target=target,
            session=session,
            next_rebalance=due,
            flags=flags,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the fit found: strings and tensors."""
        checkpoint["fitted"] = self.fitted

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up what a fit found."""
        self.fitted = checkpoint.get("fitted")

    def configure_optimizers(self) -> Any:
        """The injected optimiser, and the scheduler if there is one."""
        optimizer = self.optimizer(self.parameters())
        if self.scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.scheduler(optimizer), "interval": "epoch", "monitor": self.monitor}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def _day(value: object) -> np.datetime64:
    try:
        day = np.datetime64(str(value), "D")
    except ValueError:
        day = np.datetime64("NaT", "D")
    if np.isnat(day):
        raise ValueError(f"next_session must be a date such as 2023-01-03, got {value!r}")
    return day


def _rows(network: nn.Module, returns: Tensor, index_returns: Tensor | None) -> Tensor:
    rows: Tensor = network(returns, index_returns) if getattr(network, "uses_index", False) else network(returns)
    return rows


def _untold_ends(frame: Frame, columns: NDArray[np.int64]) -> tuple[str, ...]:
    """A flag for those of the stocks whose prices end inside the test with nothing said of a last return."""
    market = frame.market.rows(0, frame.test[1])
    ended = (market.last_price_row < len(market) - 1) & np.isnan(market.delisting_returns)
    names = [market.tickers[column] for column in columns if ended[column]]
    if not names:
        return ()
    some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return (
        f"{len(names)} stocks end within the test, their last return unknown and taken as 0: {some}. Who holds one "
        "keeps its last value to the end; data.init_args.delistings_path would pay it out",
    )
