"""Where topology stops seeing a cycle: agreement with planted groups against how long the cycle keeps its phase.

    python scripts/limits_of_topology.py

Markets of 60 cyclic AR(2) stocks and 60 of white Student-t noise, equal variance, 504 days, with and without a market
factor of beta 1. The pole radius R says how long a cycle lasts: its amplitude fades by half in log(2) / (1 - R) days.
Each market is clustered with Ward into 2 and into 11 clusters by
    topology         the statistics of degrees 0 and 1, z-scored returns, searched dimension and delay, stride 5
    autocorrelation  lags 1 to 30: the rival that knows what a cycle is
    tails            kurtosis: the noise has fat tails and the cycle has none, which any method may pick up
    volatility       standard deviation
and the adjusted Rand index against the two groups is printed and drawn, medians over seeds with quartiles. Of 11
clusters none may mix the groups and the index is still not 1, for splitting a group counts as disagreement: one group
whole and the other in ten equal parts give 0.54, the grey line.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import kurtosis
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score
from sklearn.preprocessing import StandardScaler

from datamodules.synthetic_market import planted_cycles
from lightning_modules.topology import TopologicalRepresentation, scale_returns
from lightning_modules.topology.vectorisers import PersistenceStatistics

Array = NDArray[np.float64]
RADII = (0.90, 0.93, 0.95, 0.97, 0.98, 0.985, 0.99, 0.993, 0.995, 0.997, 0.998, 0.999)
FACTORS = (0.0, 1.0)
CLUSTERS = (2, 11)
N_LAGS = 30


def topology(returns: Array) -> Array:
    """Statistics of the diagrams of degrees 0 and 1."""
    model = TopologicalRepresentation(
        vectoriser=PersistenceStatistics((0, 1)), backend="gudhi", cache_dir=None, progress=False
    )
    window = torch.from_numpy(returns)
    return model.fit(window)(window).numpy()


def autocorrelation(returns: Array) -> Array:
    """Mean of z_t z_t+k for k = 1 .. 30."""
    z = scale_returns(returns, "zscore").values
    return np.stack([(z[:, :-lag] * z[:, lag:]).mean(1) for lag in range(1, N_LAGS + 1)], axis=1)


METHODS: dict[str, Callable[[Array], Array]] = {
    "topology": topology,
    "autocorrelation": autocorrelation,
    "tails": lambda returns: kurtosis(returns, axis=1)[:, None],
    "volatility": lambda returns: returns.std(1, keepdims=True),
}


def agreement(radii: tuple[float, ...], n_seeds: int) -> dict[tuple[float, int, str], Array]:
    """Adjusted Rand indices ``(radii, seeds)`` by factor, number of clusters and method."""
    found = {
        (factor, n_clusters, name): np.empty((len(radii), n_seeds))
        for factor in FACTORS
        for n_clusters in CLUSTERS
        for name in METHODS
    }
    for factor in FACTORS:
        for row, radius in enumerate(radii):
            for seed in range(n_seeds):
                market = planted_cycles(seed, pole_radius=radius, market_factor=factor)
                returns = market.returns[1:].T.copy()
                for name, represent in METHODS.items():
                    rows = StandardScaler().fit_transform(represent(returns))
                    for n_clusters in CLUSTERS:
                        labels = AgglomerativeClustering(n_clusters).fit_predict(rows)
                        score = adjusted_rand_score(market.groups, labels)
                        found[factor, n_clusters, name][row, seed] = score
    return found


def draw(found: dict[tuple[float, int, str], Array], radii: tuple[float, ...], file: Path) -> None:
    """Four panels: without and with a market factor, into 2 and into 11 clusters."""
    # On an axis of R itself everything above 0.99, where cycles last longer than a month, would be one point.
    days = np.log(2) / (1 - np.array(radii))
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True, sharey=True, layout="constrained")
    for axis, (factor, n_clusters) in zip(axes.T.flat, [(f, k) for f in FACTORS for k in CLUSTERS], strict=True):
        for name, colour, line in zip(METHODS, ("C0", "C1", "C2", "0.4"), ("-", "--", "-.", ":"), strict=True):
            low, middle, high = np.quantile(found[factor, n_clusters, name], [0.25, 0.5, 0.75], axis=1)
            axis.plot(days, middle, line, color=colour, label=name, marker="o", markersize=3)
            axis.fill_between(days, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_title(f"{'no market factor' if factor == 0 else 'market factor of beta 1'}, {n_clusters} clusters")
        axis.axhline(0.8 if n_clusters == 2 else 0.54, color="0.8", linewidth=0.8, zorder=0)
        axis.set_ylim(-0.1, 1.05)
        axis.set_xscale("log")
        ticks = [radius for radius in radii if radius in (0.9, 0.95, 0.98, 0.99, 0.995, 0.997, 0.999)]
        axis.set_xticks([np.log(2) / (1 - radius) for radius in ticks], [f"{radius:g}" for radius in ticks])
        axis.minorticks_off()
    for axis in axes[1]:
        axis.set_xlabel("pole radius (spaced by the half-life of the cycle)")
    for axis in axes[:, 0]:
        axis.set_ylabel("adjusted Rand index")
    axes[0, 0].legend(loc="upper left", frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    """Parse the command line, measure, print a Markdown table, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="markets of each kind, seeds 0, 1, ...")
    parser.add_argument("--radii", type=float, nargs="+", default=list(RADII))
    parser.add_argument("--out", type=Path, default=Path("configs/tda_portfolio/limits.png"))
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {args.seeds}")
    torch.set_num_threads(1)
    radii = tuple(sorted(args.radii))
    start = time.perf_counter()
    found = agreement(radii, args.seeds)
    print(f"Median adjusted Rand index (quartiles) over {args.seeds} markets, Ward; beta is that of the factor\n")
    print(f"| beta | clusters | pole radius | {' | '.join(METHODS)} |")
    print("|---|---|---|" + "---|" * len(METHODS))
    for factor in FACTORS:
        for n_clusters in CLUSTERS:
            for row, radius in enumerate(radii):
                cells = []
                for name in METHODS:
                    low, middle, high = np.quantile(found[factor, n_clusters, name][row], [0.25, 0.5, 0.75])
                    cells.append(f"{middle:.2f} ({low:.2f}, {high:.2f})")
                print(f"| {factor:g} | {n_clusters} | {radius:g} | {' | '.join(cells)} |")
    draw(found, radii, args.out)
    print(f"\n{args.out} drawn; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
