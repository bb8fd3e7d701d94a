"""Pictures of clusters of stocks and of what they were found in. Each function writes one PNG and nothing else.

E eligible stocks, K clusters, D width of the embedding.
"""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray
from scipy.cluster.hierarchy import dendrogram as arrange
from scipy.cluster.hierarchy import linkage

from lightning_modules.callbacks.picture_frame import COLOURS, new_axes, save
from lightning_modules.callbacks.portfolio_pictures import CLUSTER_COLOURS, RANDOM, styles
from lightning_modules.portfolio.market import Array
from lightning_modules.portfolio.study import Study

N_NAMED = 60
"""Most stocks whose tickers fit into a picture."""

_MARKERS = "osD^vP*X"


def _look(place: int) -> dict[str, Any]:
    # Twelve colours against eight markers: the pair comes again only after twenty-four groups.
    if place < 0:
        return {"color": RANDOM, "marker": "."}
    return {"color": CLUSTER_COLOURS[place % len(CLUSTER_COLOURS)], "marker": _MARKERS[place % len(_MARKERS)]}


def _members(tree: Array, n_stocks: int) -> list[list[int]]:
    """Stocks under each node of a linkage, the E leaves first."""
    members = [[stock] for stock in range(n_stocks)]
    for left, right in tree[:, :2].astype(int):
        members.append(members[left] + members[right])
    return members


def dendrogram(path: Path, study: Study) -> None:
    """Ward's tree of the embedding, its upper part above ``N_NAMED`` stocks, over a strip of the model's clusters."""
    n_stocks = len(study.labels)
    tree = linkage(study.embedding, "ward")
    n_leaves = min(n_stocks, N_NAMED)
    drawn = arrange(tree, p=n_leaves, truncate_mode="lastp", no_plot=True)
    members = _members(tree, n_stocks)
    leaves = [members[node] for node in drawn["leaves"]]
    figure, (axes,) = new_axes(width=max(7.0, 0.17 * n_leaves + 2.5), height=5.5)
    for across, up in zip(drawn["icoord"], drawn["dcoord"], strict=True):
        axes.plot(across, up, color="#444444", linewidth=0.9)
    top = tree[-1, 2] or 1.0  # the strip lies below the zero of the tree
    for place, leaf in enumerate(leaves):
        bottom, clusters = -0.10 * top, study.labels[leaf]
        for label in np.unique(clusters):
            share = (clusters == label).mean() * 0.08 * top
            axes.bar(5 + 10 * place, share, 9, bottom, color=_look(int(label))["color"])
            bottom += share
    names = [study.tickers[leaf[0]] if len(leaf) == 1 else f"({len(leaf)})" for leaf in leaves]
    axes.set_xticks(5 + 10 * np.arange(len(leaves)), names, rotation=90, fontsize=7)
    n_clusters = len(np.unique(study.labels))
    if 2 <= n_clusters < n_stocks:
        cut = (tree[-n_clusters, 2] + tree[-n_clusters + 1, 2]) / 2
        axes.axhline(cut, color=COLOURS[5], linewidth=1, linestyle="--", label=f"cut into {n_clusters}")
    axes.set_xlim(0, 10 * len(leaves))
    axes.set_ylim(-0.12 * top, 1.05 * top)
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= 1.05 * top])
    axes.set_ylabel("Ward distance of the standardised embedding")
    axes.set_xlabel("" if n_leaves == n_stocks else f"{n_leaves} uppermost branches, (stocks in each)")
    axes.grid(visible=False)
    axes.tick_params(axis="x", length=0)
    sizes = {int(label): int((study.labels == label).sum()) for label in np.unique(study.labels)}
    handles: list[Artist] = [
        Line2D([], [], linewidth=6, color=_look(label)["color"], label=f"{label} ({size})")
        for label, size in sizes.items()
    ]
    handles += axes.get_legend_handles_labels()[0]
    title = "strip: cluster of\nthe model (stocks)"
    axes.legend(handles=handles, title=title, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)


def _plane(embedding: Array) -> tuple[Array, Array]:
    """``(E, 2)`` scores of the first two principal components, and their shares of the variance."""
    centred = embedding - embedding.mean(0)
    left, scale, _ = np.linalg.svd(centred, full_matrices=False)
    scores, shares = np.zeros((len(embedding), 2)), np.zeros(2)
    n = min(2, len(scale))
    scores[:, :n] = left[:, :n] * scale[:n]
    shares[:n] = scale[:n] ** 2 / (np.sum(scale**2) or 1.0)
    return scores, shares


def _scatter(axes: Axes, points: Array, groups: NDArray[np.int64], names: dict[int, str]) -> None:
    for group in np.unique(groups):
        chosen = groups == group
        look = _look(int(group))
        label = f"{names[int(group)]} ({chosen.sum()})"
        axes.scatter(
            points[chosen, 0],
            points[chosen, 1],
            s=16 if len(points) > N_NAMED else 30,
            alpha=0.8,
            linewidth=0,
            label=label,
            **look,
        )


def clusters(path: Path, study: Study) -> None:
    """The embedding in the plane of its first two principal components, coloured by cluster and by sector."""
    points, shares = _plane(study.embedding)
    sectors = study.sectors
    figure, panels = new_axes(1 if sectors is None else 2, width=8 if sectors is None else 15, height=5.5)
    _scatter(panels[0], points, study.labels, {int(label): f"cluster {label}" for label in np.unique(study.labels)})
    panels[0].set_title("by cluster", fontsize=10)
    if sectors is not None:
        _scatter(panels[1], points, sectors, dict(enumerate(study.market.sector_names)) | {-1: "unknown"})
        panels[1].set_title("by sector", fontsize=10)
    for axes in panels:
        axes.set_xlabel(f"first principal component, {shares[0]:.0%} of the variance")
        axes.set_ylabel(f"second, {shares[1]:.0%}")
        if len(points) <= N_NAMED:
            for point, ticker in zip(points, study.tickers, strict=True):
                axes.annotate(ticker, point, xytext=(4, 3), textcoords="offset points", fontsize=6, color="#444444")
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)


def medoids(study: Study, n: int) -> list[int]:
    """Of each of the ``n`` largest clusters, the stock nearest to its centre in the embedding."""
    chosen = []
    for label in np.unique(study.labels)[:n]:
        stocks = np.flatnonzero(study.labels == label)
        offsets = study.embedding[stocks] - study.embedding[stocks].mean(0)
        chosen.append(int(stocks[np.argmin((offsets**2).sum(1))]))
    return chosen


def diagrams(path: Path, study: Study, n_chosen: int = 4, n_bars: int = 24) -> None:
    """Persistence diagrams, and barcodes of the longest bars, of the medoids of the largest clusters.

    Raises:
        ValueError: If the study holds no diagrams.
    """
    found = study.diagrams
    if found is None:
        raise ValueError("diagrams need persistence diagrams, the study holds none")
    stocks = medoids(study, n_chosen)
    figure, panels = new_axes(len(stocks), width=3.4 * len(stocks) + 1, height=6.8, n_rows=2)
    degrees = sorted({degree for stock in stocks for degree in found[stock]})
    deaths = [bars[:, 1].max() for stock in stocks for bars in found[stock].values() if len(bars)]
    limit = 1.05 * max(deaths, default=1.0)
    for column, stock in enumerate(stocks):
        above, below = panels[column], panels[column + len(stocks)]
        above.plot([0, limit], [0, limit], color="black", linewidth=0.8)
        height = 0
        for degree in degrees:
            bars = found[stock].get(degree, np.empty((0, 2)))
            colour = COLOURS[(0, 5, 2)[degree % 3]]
            above.scatter(bars[:, 0], bars[:, 1], s=14, color=colour, marker="os^"[degree % 3], alpha=0.75, linewidth=0)
            longest = bars[np.argsort(bars[:, 0] - bars[:, 1], kind="stable")[:n_bars]]
            longest = longest[np.argsort(longest[:, 0], kind="stable")]
            rows = height + np.arange(len(longest))
            below.hlines(rows, longest[:, 0], longest[:, 1], color=colour, linewidth=1.6)
            height += len(longest) + 3
        above.set_title(f"{study.tickers[stock]}, cluster {study.labels[stock]}", fontsize=10)
        above.set_xlim(-0.02 * limit, limit)
        above.set_ylim(-0.02 * limit, limit)
        above.set_aspect("equal")
        below.set_xlim(-0.02 * limit, limit)
        below.set_yticks([])
        above.set_xlabel("birth")
        below.set_xlabel("distance")
        below.grid(axis="y", visible=False)
    panels[0].set_ylabel("death")
    panels[len(stocks)].set_ylabel(f"the {n_bars} longest bars of a degree")
    handles = [
        Line2D([], [], linestyle="", marker="os^"[degree % 3], color=COLOURS[(0, 5, 2)[degree % 3]], label=f"H{degree}")
        for degree in degrees
    ]
    panels[len(stocks) - 1].legend(handles=handles, frameon=False, loc="lower right")
    save(figure, path)


def landscapes(path: Path, study: Study, n_bins: int = 100) -> None:
    """Mean first landscape of H1 in each of the twelve largest clusters, with quartiles, beside the mean of all.

    Raises:
        ValueError: If the study holds no diagrams, or one holds no degree 1.
    """
    from lightning_modules.topology.vectorisers import Landscape  # needs scikit-learn, an optional extra

    if study.diagrams is None:
        raise ValueError("landscapes need persistence diagrams, the study holds none")
    vectoriser = Landscape(degrees=(1,), n_bins=n_bins, n_layers=1)
    layers = vectoriser.fit_transform(study.diagrams)
    axis = np.linspace(vectoriser.low_[0, 0], vectoriser.high_[0, 0], n_bins)
    shown = np.unique(study.labels)[:12]
    n_rows = -(-len(shown) // 4)
    n_columns = -(-len(shown) // n_rows)
    figure, panels = new_axes(n_columns, width=3 * n_columns + 1, height=2.2 * n_rows + 0.8, n_rows=n_rows)
    everyone = layers.mean(0)
    top = 0.0
    for axes, label in zip(panels, shown, strict=False):
        ours = layers[study.labels == label]
        low, high = np.quantile(ours, [0.25, 0.75], axis=0)
        colour = _look(int(label))["color"]
        axes.fill_between(axis, low, high, color=colour, alpha=0.25, linewidth=0)
        axes.plot(axis, ours.mean(0), color=colour)
        axes.plot(axis, everyone, color="black", linewidth=0.9, linestyle=":")
        axes.set_title(f"cluster {label} ({len(ours)})", fontsize=9)
        top = max(top, float(high.max()), float(ours.mean(0).max()))
    for axes in panels[: len(shown)]:
        axes.set_ylim(0, 1.05 * top or 1.0)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    figure.supxlabel("filtration value", fontsize=10)
    figure.supylabel("first landscape of H1", fontsize=10)
    figure.suptitle("mean and quartiles of each cluster (stocks); dotted: mean of all stocks", fontsize=10)
    save(figure, path)


def volatility(path: Path, study: Study, found: dict[str, Any]) -> None:
    """Is it only volatility? Train volatility by cluster, what clusters explain of it, and what each arm earned."""
    arms, random = found["arms"], found["random"]
    names = [arm.name for arm in study.arms if arms[arm.name]["volatility_explained"] is not None]
    figure, (left, middle, right) = new_axes(3, width=15, height=max(4.2, 0.4 * len(names) + 2))
    labels = np.unique(study.labels)
    drawn = left.boxplot(
        [study.train_volatility[study.labels == label] for label in labels],
        positions=labels,
        widths=0.6,
        patch_artist=True,
        medianprops={"color": "black"},
        flierprops={"markersize": 3},
    )
    for box, label in zip(drawn["boxes"], labels, strict=True):
        box.set_facecolor(_look(int(label))["color"])
        box.set_alpha(0.7)
    left.set_xticks(labels, [str(label) for label in labels])
    left.yaxis.set_major_formatter(PercentFormatter(1))
    left.set_xlabel("cluster of the model, by falling size")
    left.set_ylabel("annual volatility in the train window")
    look = styles(study)
    for axes, key in ((middle, "volatility_explained"), (right, "sharpe")):
        for row, name in enumerate(names):
            value = arms[name][key] if axes is middle else arms[name]["at_cost"]["sharpe"]
            if value is not None:
                axes.plot(value, row, "o", color=look[name]["color"], markersize=7)
        rows = list(names)
        if random is not None and random[key]["mean"] is not None:
            low, median, high = (random[key]["quantiles"][level] for level in ("0.05", "0.5", "0.95"))
            axes.plot([low, high], [len(names)] * 2, color=RANDOM, linewidth=5, alpha=0.5, solid_capstyle="butt")
            axes.plot(median, len(names), "o", color=RANDOM, markersize=7)
            rows.append(f"{random['n']} random clusterings,\n5 to 95 %")
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.5, -0.5)
    middle.set_xlim(-0.02, 1.02)
    middle.xaxis.set_major_formatter(PercentFormatter(1))
    middle.set_xlabel("share of the variance of train volatility between clusters")
    right.set_yticks(right.get_yticks(), [])
    right.set_xlabel("annual Sharpe ratio in the test")
    save(figure, path)
