"""The tables of configs/tda_portfolio/README.md: every representation, both protocols, controls, with intervals.

    python scripts/reproduce_tda_portfolio.py --folder data/sp500-2015-2020 --out runs/tda_table

The folder holds ``close.parquet``, ``adj_close.parquet``, ``gspc_index_2012_2022.csv.gz`` and ``sectors.csv``. The
published protocol reads ``close`` under the published gap rule; the causal one ``adj_close``, checked against
``close``. Clusters by Ward have no seed, those by k-means 20, trained networks 3; "ward, permuted" are the clusters of
Ward with their stocks exchanged by lot, 20 draws each. What is done lies in OUT, a file a representation, and is not
done again (delete OUT after changing code or prices); ``--only`` and ``--protocols`` run those named.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer, seed_everything
from torch import nn
from tqdm import tqdm

from datamodules import StockPricesDataModule
from lightning_modules import TDAPortfolioClusterer
from lightning_modules.networks import ConvAutoencoder, LSTMAutoencoder
from lightning_modules.portfolio.backtest import Track, hold
from lightning_modules.portfolio.clusterers import Clusterer, KMeansClusters, WardClusters
from lightning_modules.portfolio.inference import sharpe_interval
from lightning_modules.portfolio.market import Array
from lightning_modules.portfolio.metrics import summary, turnover_per_year
from lightning_modules.portfolio.representations import (
    CorrelationMDS,
    FinancialFeatures,
    PrincipalComponents,
    RandomVectors,
    RawReturns,
    VolatilityOnly,
)
from lightning_modules.portfolio.study import Arm
from lightning_modules.portfolio.walk import (
    Frame,
    Rules,
    cluster_strategy,
    control_arms,
    permuted_arms,
    random_arms,
    walk,
)
from lightning_modules.portfolio.weighting import EqualWeight, MeanVariance, MinimumVariance, PublishedMeanVariance
from lightning_modules.run_folder import write_whole
from lightning_modules.topology import TopologicalRepresentation
from lightning_modules.topology.vectorisers import Landscape, PersistenceImage, PersistenceStatistics

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "tda_portfolio"
BROKEN = ["SNI", "CSRA", "SCG", "COL", "ANDV", "AET", "ESRX", "FOX", "FOXA", "PX", "CA", "BHF"]
SURVIVORSHIP = ("PI_1, z-scored", "14 features", "volatility only")  # enough to see what the filter is worth
RISK_FREE, COST = 0.03, 10.0
KMEANS_SEEDS, NETWORK_SEEDS, N_RANDOM, PERMUTED_SEEDS = range(42, 62), range(3), 100, range(20)


def topology(vectoriser: Any, scale: Any = "zscore", **settings: Any) -> nn.Module:
    """One delay and dimension for all stocks, stride 5, diagrams by gudhi."""
    return TopologicalRepresentation(vectoriser=vectoriser, scale=scale, backend="gudhi", progress=False, **settings)


def giotto_image(degree: int, grid: Any = "shared") -> PersistenceImage:
    """The image as giotto-tda computes it and the authors used it, on axes from the first bar to the last."""
    return PersistenceImage(degrees=(degree,), sigma=0.0005, grid=grid, quantiles=(0.0, 1.0), method="binned")


# name -> network of a window of returns
REPRESENTATIONS: dict[str, Callable[[], nn.Module]] = {
    "PI_1, z-scored": lambda: topology(PersistenceImage(degrees=(1,))),
    "PI_1": lambda: topology(PersistenceImage(degrees=(1,)), "none"),
    "PI_1, as published": lambda: topology(giotto_image(1, "per_stock"), "none", giotto_compat=True),
    "PI_2": lambda: topology(PersistenceImage(degrees=(2,)), "none"),
    "PL_1": lambda: topology(Landscape(degrees=(1,)), "none"),
    "PL_2": lambda: topology(Landscape(degrees=(2,)), "none"),
    "23 statistics, z-scored": lambda: topology(PersistenceStatistics()),
    "23 statistics": lambda: topology(PersistenceStatistics(), "none"),
    "conv autoencoder": lambda: ConvAutoencoder(code_size=32),
    "LSTM autoencoder": lambda: LSTMAutoencoder(),
    "raw returns": RawReturns,
    "PCA": PrincipalComponents,
    "14 features": lambda: FinancialFeatures(risk_free=RISK_FREE),
    "correlation MDS": CorrelationMDS,
    "volatility only": VolatilityOnly,
    "random vectors": RandomVectors,
}
# Section 11 of the specification: its representations, all with (d, tau) = (4, 7), and for F2015 its volatility and
# Sharpe ratio of the published protocol, of causal minimum variance and of causal equal weights.
_FIXED: dict[str, Any] = {"dimension": 4, "delay": 7}
ANCHOR_REPRESENTATIONS: dict[str, Callable[[], nn.Module]] = {
    "PI_1 of own axes": lambda: topology(giotto_image(1, "per_stock"), "none", **_FIXED),
    "PI_1 of shared axes": lambda: topology(giotto_image(1), "none", **_FIXED),
    "PI_2 of shared axes": lambda: topology(giotto_image(2), "none", **_FIXED),
    "PL_1 of shared axes": lambda: topology(Landscape(degrees=(1,), quantiles=(0.0, 1.0)), "none", **_FIXED),
    "PI_1 of z-scored returns": lambda: topology(giotto_image(1), **_FIXED),
    "volatility only": VolatilityOnly,
}
ANCHORS = {
    "PI_1 of own axes, ward": ((0.136, 1.94), (0.099, 1.14), (0.125, 1.50)),
    "PI_1 of shared axes, ward": ((0.191, 0.81), (0.185, 1.01), (0.216, 1.32)),
    "PI_2 of shared axes, ward": ((0.175, 1.24), (0.152, 1.25), (0.209, 1.53)),
    "PL_1 of shared axes, ward": ((0.211, 1.61), (0.137, 1.25), (0.207, 1.46)),
    "PI_1 of z-scored returns, ward": ((0.134, 0.70), (0.119, 0.64), (0.160, 0.82)),
    "volatility only, k-means": ((0.246, 2.57), (0.104, 1.35), (0.181, 1.55)),
    "sectors": ((0.156, 2.25), (0.099, 1.09), (0.145, 1.29)),
    "random clusters": ((0.158, 2.72), (0.103, 1.29), (0.155, 1.43)),
}
ANCHOR_PROTOCOLS = ("anchor, published", "anchor, minimum variance", "anchor, equal")


def prices_of(protocol: str, folder: Path) -> StockPricesDataModule:
    """The prices a protocol reads."""
    common: dict[str, Any] = {
        "index_paths": str(folder / "gspc_index_2012_2022.csv.gz"),
        "index_column": "close",
        "index_is_price": True,
        "sectors_path": str(folder / "sectors.csv"),
        "train_start": "2015-01-12",
        "test_start": "2017-01-01",
        "test_end": "2019-12-31",
        "batch_size": 64,
    }
    complete = str(CONFIGS / "sp500_complete.txt")
    close, adjusted = str(folder / "close.parquet"), str(folder / "adj_close.parquet")
    if protocol == "published" or protocol in ANCHOR_PROTOCOLS:
        module = StockPricesDataModule(paths=close, gaps="published", tickers_path=complete, **common)
    elif protocol == "causal, 470 tickers":
        module = StockPricesDataModule(paths=adjusted, check_paths=close, exclude=BROKEN, **common)
    else:
        module = StockPricesDataModule(paths=adjusted, check_paths=close, tickers_path=complete, **common)
    module.prepare_data()
    module.setup("fit")
    return module


RULES = {
    "published": Rules(mode="published", weighting=PublishedMeanVariance(), cost_bps=0.0),
    "causal": Rules(weighting=MeanVariance(annual_target=RISK_FREE), cost_bps=COST),
    "causal, 470 tickers": Rules(weighting=MeanVariance(annual_target=RISK_FREE), cost_bps=COST),
    "anchor, published": Rules(mode="published", weighting=PublishedMeanVariance(), cost_bps=0.0),
    "anchor, minimum variance": Rules(weighting=MinimumVariance(), cost_bps=0.0),
    "anchor, equal": Rules(weighting=EqualWeight(), cost_bps=0.0),
}


def rows_of(make: Callable[[], nn.Module], data: StockPricesDataModule, rules: Rules, seed: int) -> tuple[Array, bool]:
    """Rows of the stocks of the train window, and whether a network was trained for them."""
    seed_everything(seed, verbose=False)
    module = TDAPortfolioClusterer(
        representation=make(),
        clusterers=[WardClusters()],
        mode=rules.mode,
        optimizer=partial(torch.optim.Adam, lr=3e-3),
        scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=10, gamma=0.3),
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=30 if module.is_trained else 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    assert module.fitted is not None
    return module.fitted["rows"].numpy(), module.is_trained


def figures(arm: Arm, frame: Frame, drift: bool) -> dict[str, Any]:
    """What the tables show of an arm: free of charge, and at 10 basis points."""

    def track(cost: float) -> Track:
        return arm.track if arm.plan is None else hold(arm.plan, frame.market, cost_bps=cost, drift=drift)

    free, charged = track(0.0), track(COST)
    found, charges = (summary(each.returns, risk_free=RISK_FREE) for each in (free, charged))
    interval = sharpe_interval(free.returns, risk_free=RISK_FREE)
    flagged = sum(any("infeasible" in flag for flag in flags) for flags in free.flags.values())
    return {
        "annual_return": found["annual_return"],
        "volatility": found["volatility"],
        "sharpe": found["sharpe"],
        "interval": list(interval)[1:],
        "max_drawdown": found["max_drawdown"],
        "turnover": turnover_per_year(free.turnover, len(free.dates)),
        "charged": {key: charges[key] for key in ("annual_return", "volatility", "sharpe", "max_drawdown")},
        "infeasible": flagged / len(free.rebalance_dates),
    }


def model_arms(name: str, protocol: str, data: StockPricesDataModule) -> dict[str, Any]:
    """A representation under a protocol: Ward and k-means, over seeds of network and k-means."""
    makers = ANCHOR_REPRESENTATIONS if protocol in ANCHOR_PROTOCOLS else REPRESENTATIONS
    rules = RULES[protocol]
    frame = Frame.from_batch(data.panel.batch(), rules.mode)
    found: dict[str, list[dict[str, Any]]] = {"ward": [], "ward, permuted": [], "k-means": []}
    started = time.perf_counter()
    for seed in NETWORK_SEEDS:
        rows, trained = rows_of(makers[name], data, rules, seed)
        clusterers: list[Clusterer] = [WardClusters()]
        clusterers += [KMeansClusters(seed=s) for s in KMEANS_SEEDS]
        for clusterer in clusterers:
            strategy = cluster_strategy(frame, rules, lambda stocks, rows=rows: rows, clusterer)
            arm = walk(f"{name}, {clusterer.name}", "model", frame, rules, strategy)
            found[clusterer.name].append(figures(arm, frame, rules.drift))
            if clusterer.name == "ward" and protocol not in ANCHOR_PROTOCOLS:
                assert arm.plan is not None
                by_lot = permuted_arms(frame, rules, arm.plan, PERMUTED_SEEDS)
                found["ward, permuted"] += [figures(each, frame, rules.drift) for each in by_lot]
        if not trained:
            break
    return {"arms": {f"{name}, {k}": v for k, v in found.items() if v}, "seconds": time.perf_counter() - started}


def other_arms(protocol: str, data: StockPricesDataModule) -> dict[str, Any]:
    """Sectors, random clusters, weights without clusters, the index."""
    rules = RULES[protocol]
    frame = Frame.from_batch(data.panel.batch(), rules.mode)
    found = {arm.name: [figures(arm, frame, rules.drift)] for arm in control_arms(frame, rules, [])}
    found["random clusters"] = [figures(a, frame, rules.drift) for a in random_arms(frame, rules, 11, range(N_RANDOM))]
    window = frame.train_window
    facts = {"stocks": len(window.eligible(rules.min_observed)), "test days": int(frame.test[1] - frame.test[0])}
    return {"arms": found, "facts": facts, "flags": data.panel.batch()["flags"]}


def spread(values: list[float], form: str) -> str:
    """Mean and standard deviation over seeds; the value alone for one."""
    if len(values) == 1 or max(values) - min(values) < 1e-9:
        return form.format(values[0])
    return f"{form.format(float(np.mean(values)))} ± {form.format(float(np.std(values, ddof=1)))}"


def table(arms: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Markdown rows of one protocol, in the order of the arms."""
    heads = ["clusters or weights", "return", "volatility", "Sharpe [95 %]", "max drawdown", "turnover a year"]
    heads += ["return at 10 bps", "Sharpe at 10 bps"]
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for name, runs in arms.items():
        low, high = sorted(runs, key=lambda run: run["sharpe"])[len(runs) // 2]["interval"]  # of the median seed
        cells = [
            spread([run["annual_return"] for run in runs], "{:.3f}"),
            spread([run["volatility"] for run in runs], "{:.3f}"),
            f"{spread([run['sharpe'] for run in runs], '{:.2f}')} [{low:.2f}, {high:.2f}]",
            spread([run["max_drawdown"] for run in runs], "{:.2f}"),
            spread([run["turnover"] for run in runs], "{:.1f}"),
            spread([run["charged"]["annual_return"] for run in runs], "{:.3f}"),
            spread([run["charged"]["sharpe"] for run in runs], "{:.2f}"),
        ]
        yield f"| {name} | {' | '.join(cells)} |"
    moved = {
        key: max(abs(run[key] - run["charged"][key]) for runs in arms.values() for run in runs)
        for key in ("volatility", "max_drawdown")
    }
    yield ""
    moves = f"volatility by at most {moved['volatility']:.4f}, drawdown by {moved['max_drawdown']:.4f}"
    yield f"Costs of 10 bps move {moves}."


def anchors(found: dict[str, dict[str, list[dict[str, Any]]]]) -> Iterator[str]:
    """Section 11 of the specification beside ours."""
    yield "| clusters | published: theirs, ours | minimum variance: theirs, ours | equal: theirs, ours |"
    yield "|---" * 4 + "|"
    for name, theirs in ANCHORS.items():
        cells = []
        for protocol, (volatility, sharpe) in zip(ANCHOR_PROTOCOLS, theirs, strict=True):
            runs = found[protocol][name]
            ours = [float(np.mean([run[key] for run in runs])) for key in ("volatility", "sharpe")]
            mark = "" if abs(ours[0] - volatility) <= 0.03 and abs(ours[1] - sharpe) <= 0.4 else " **outside**"
            cells.append(f"{volatility:.3f} / {sharpe:.2f}, {ours[0]:.3f} / {ours[1]:.2f}{mark}")
        yield f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Compute what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/tda_table"))
    parser.add_argument("--only", nargs="+", choices=list(REPRESENTATIONS), default=list(REPRESENTATIONS))
    parser.add_argument("--protocols", nargs="+", choices=list(RULES), default=list(RULES))
    options = parser.parse_args()
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for protocol in options.protocols:
        data: StockPricesDataModule | None = None
        wanted = list(ANCHOR_REPRESENTATIONS) if protocol in ANCHOR_PROTOCOLS else options.only
        if protocol == "causal, 470 tickers":
            wanted = [name for name in wanted if name in SURVIVORSHIP]
        for name in tqdm([*wanted, "others"], desc=protocol, file=sys.stderr):
            file = options.out / f"{protocol}, {name}.json"
            if not file.is_file():
                data = data or prices_of(protocol, options.folder)
                result = other_arms(protocol, data) if name == "others" else model_arms(name, protocol, data)
                write_whole(file, json.dumps(result, indent=1) + "\n")
            result = json.loads(file.read_text(encoding="utf-8"))
            found.setdefault(protocol, {}).update(result["arms"])
        if protocol not in ANCHOR_PROTOCOLS:
            facts = json.loads((options.out / f"{protocol}, others.json").read_text(encoding="utf-8"))["facts"]
            print(f"\n### {protocol}: {facts['stocks']} stocks, {facts['test days']} test days\n")
            print("\n".join(table(found[protocol])))
    if set(ANCHOR_PROTOCOLS) <= set(found):
        print("\n### Section 11 of the specification, F2015\n")
        print("\n".join(anchors(found)))


if __name__ == "__main__":
    main()
