"""Pictures of what portfolios earned. Each function writes one PNG and nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter
from numpy.typing import NDArray

from lightning_modules.callbacks.picture_frame import COLOURS, new_axes, save, words
from lightning_modules.portfolio.market import TRADING_DAYS, Array, daily_risk_free
from lightning_modules.portfolio.metrics import drawdowns
from lightning_modules.portfolio.study import KINDS, Arm, Study

RANDOM = "#999999"
"""Colour of random clusters in every picture."""

CLUSTER_COLOURS = (
    *("#332288", "#DDCC77", "#117733", "#CC6677", "#88CCEE", "#882255"),
    *("#44AA99", "#999933", "#AA4499", "#E69F00", "#0072B2", "#661100"),
)
"""Colour-blind safe (Tol's muted set and three more), neighbours far apart in lightness; used again after twelve."""

_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)))


def styles(study: Study) -> dict[str, dict[str, Any]]:
    """Line colour and dashes of each arm, the same in every picture: models blue, the index black."""
    controls = [arm.name for arm in study.arms if arm.kind in ("clusters", "allocation")]
    models = [arm.name for arm in study.arms if arm.kind == "model"]
    others = COLOURS[1:-1]
    chosen = {name: (COLOURS[0], _DASHES[place % 3]) for place, name in enumerate(models)}
    chosen |= {
        name: (others[place % len(others)], _DASHES[place // len(others) % 3]) for place, name in enumerate(controls)
    }
    thin = 1.0 if len(study.dates) <= 1000 else 0.6  # daily lines of many years would hide one another
    return {
        arm.name: {
            "color": chosen.get(arm.name, ("#000000", "-"))[0],
            "linestyle": chosen.get(arm.name, ("#000000", "-"))[1],
            "linewidth": thin * (2.2 if arm is study.model else 1.3),
            "zorder": 5 if arm is study.model else 3,
        }
        for arm in study.arms
    }


def _chosen(study: Study) -> list[Arm]:
    # All of fifteen lines that cross for three years would be read by nobody: two models and a control of each sort.
    of = {kind: [arm for arm in study.arms if arm.kind == kind] for kind in KINDS}
    some = [*of["model"][:2], *of["clusters"][:1], *of["clusters"][-1:], *of["allocation"][:1], *of["index"][:1]]
    return list({arm.name: arm for arm in some}.values())


def _legend(axes: Axes, **more: Any) -> None:
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), **more)


def _over_time(axes: Axes) -> None:
    locator = AutoDateLocator()
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    axes.margins(x=0.01)


def _random_returns(study: Study) -> Array | None:
    return np.stack([arm.track.returns for arm in study.random_arms], axis=1) if study.random_arms else None


def _band(axes: Axes, study: Study, days: NDArray[np.datetime64], values: Array | None) -> None:
    if values is not None:
        low, middle, high = np.quantile(values, [0.05, 0.5, 0.95], axis=1)
        label = f"{len(study.random_arms)} random clusterings,\n5 to 95 % and median"
        axes.fill_between(days, low, high, color=RANDOM, alpha=0.25, linewidth=0, label=label)
        axes.plot(days, middle, color=RANDOM, linewidth=1)


def _title(study: Study) -> str:
    first, last = study.dates[0], study.dates[-1]
    return f"mode {words(study.mode)}, {first} to {last}, costs {study.cost_bps:g} bps"


def equity(path: Path, study: Study) -> None:
    """Growth of 1 on a log axis: models, a control of each sort, the index, and the band of random clusters."""
    figure, (axes,) = new_axes(width=10, height=5)
    random = _random_returns(study)
    _band(axes, study, study.dates, None if random is None else np.cumprod(1 + random, axis=0))
    look = styles(study)
    for arm in _chosen(study):
        wealth = np.cumprod(1 + arm.track.returns)
        axes.plot(study.dates, wealth, label=f"{arm.name}: {wealth[-1]:.2f}", **look[arm.name])
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(MaxNLocator(8) if high < 5 * low else LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("growth of 1 (log axis)")
    axes.set_title(_title(study), fontsize=10)
    _over_time(axes)
    _legend(axes)
    save(figure, path)


def drawdown(path: Path, study: Study) -> None:
    """How far wealth lies below its highest value so far, the start included."""
    figure, (axes,) = new_axes(width=10, height=4)
    below = [drawdowns(arm.track.returns) for arm in study.random_arms]
    _band(axes, study, study.dates, np.stack(below, axis=1) if below else None)
    look = styles(study)
    for arm in _chosen(study):
        depth = drawdowns(arm.track.returns)
        axes.plot(study.dates, depth, label=f"{arm.name}, worst {depth.min():.1%}", **look[arm.name])
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylim(top=0)
    axes.set_ylabel("below the highest value so far")
    axes.set_title(_title(study), fontsize=10)
    _over_time(axes)
    _legend(axes)
    save(figure, path)


def rolling_ratio(returns: Array, window: int, risk_free: float) -> Array:
    """Annual Sharpe ratio of every ``window`` days: ``(n, ...)`` to ``(n - window + 1, ...)``, nan without spread."""
    # Running sums: a view of all windows of all random arms would take a gigabyte.
    centre = returns.mean(0)
    start = np.zeros((1, *returns.shape[1:]))
    sums = np.concatenate([start, np.cumsum(returns - centre, axis=0)])
    squares = np.concatenate([start, np.cumsum((returns - centre) ** 2, axis=0)])
    mean = (sums[window:] - sums[:-window]) / window
    variance = (squares[window:] - squares[:-window] - window * mean**2) / (window - 1)
    ratio: Array = np.full_like(mean, np.nan)
    excess = mean + centre - daily_risk_free(risk_free)
    np.divide(excess * np.sqrt(TRADING_DAYS), np.sqrt(np.maximum(variance, 0)), out=ratio, where=variance > 1e-16)
    return ratio


def rolling_sharpe(path: Path, study: Study) -> None:
    """Annual Sharpe ratio of the last 252 days, of half the test where that is shorter."""
    window = max(2, min(TRADING_DAYS, len(study.dates) // 2))
    days = study.dates[window - 1 :]
    figure, (axes,) = new_axes(width=10, height=4)
    random = _random_returns(study)
    _band(axes, study, days, None if random is None else rolling_ratio(random, window, study.risk_free))
    look = styles(study)
    for arm in _chosen(study):
        axes.plot(days, rolling_ratio(arm.track.returns, window, study.risk_free), label=arm.name, **look[arm.name])
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel(f"Sharpe ratio of the last {window} days")
    axes.set_title(_title(study), fontsize=10)
    _over_time(axes)
    _legend(axes)
    save(figure, path)


def _shades(colour: str, n: int) -> list[tuple[float, ...]]:
    # From the colour of the cluster towards white, one step a stock.
    base = np.array(to_rgb(colour))
    return [tuple(base + (1 - base) * 0.55 * place / max(1, n - 1)) for place in range(n)]


def weights(path: Path, study: Study, n_named: int = 24) -> None:
    """Weights of the model in charge bought at each rebalance, stocks of a cluster in shades of one colour.

    Clusters are those of the first rebalance, as in all other pictures: each refit numbers its own anew by size.
    """
    plan, bought = study.model.plan, study.model.track.targets
    assert plan is not None  # only the index has none
    held = np.flatnonzero(bought.max(0) > 0)
    targets = bought[:, held]
    size = targets.mean(0)
    clusters = np.full(len(study.market.tickers), -1)
    clusters[study.columns] = study.labels
    cluster = clusters[held]
    order = np.lexsort((-size, cluster))
    named = set(np.argsort(-size, kind="stable")[:n_named].tolist())
    days = np.append(study.market.dates[plan.rows], study.dates[-1])
    figure, (axes,) = new_axes(width=10, height=5.5)
    colours: dict[int, Any] = {}
    for group in np.unique(cluster):
        members = [place for place in order if cluster[place] == group]
        colour = RANDOM if group < 0 else CLUSTER_COLOURS[group % len(CLUSTER_COLOURS)]
        colours |= dict(zip(members, _shades(colour, len(members)), strict=True))
    heights = np.concatenate([targets[:, order], targets[-1:, order]]).T
    axes.stackplot(
        days, heights, colors=[colours[place] for place in order], step="post", edgecolor="white", linewidth=0.25
    )
    entries = [
        Patch(
            color=colours[place],
            label=f"{study.market.tickers[held[place]]}, "
            f"{'no cluster' if cluster[place] < 0 else f'cluster {cluster[place]}'}: {size[place]:.1%}",
        )
        for place in order[::-1]
        if place in named
    ]
    shown = f"all {len(held)}" if len(held) <= n_named else f"the {n_named} largest of {len(held)}"
    axes.legend(
        handles=entries,
        frameon=False,
        fontsize=8,
        loc="upper left",
        bbox_to_anchor=(1, 1),
        title=f"mean weight, {shown}\n(cluster at the first rebalance)",
    )
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel("weight after each rebalance")
    axes.set_title(f"{study.model.name}, {_title(study)}", fontsize=10)
    axes.grid(visible=False)
    _over_time(axes)
    axes.margins(x=0)
    save(figure, path)


def costs(path: Path, study: Study, found: dict[str, Any]) -> None:
    """Sharpe ratio against the cost of a trade, every arm."""
    sharpes = {
        arm.name: [
            np.nan if value is None else value for value in found["arms"][arm.name]["sharpe_by_cost_bps"].values()
        ]
        for arm in study.arms
    }
    figure, (axes,) = new_axes(width=9, height=5)
    look = styles(study)
    for name in sorted(sharpes, key=lambda name: -np.nan_to_num(sharpes[name][-1])):
        axes.plot(study.costs_bps, sharpes[name], marker="o", markersize=3, label=name, **look[name])
    axes.axvline(study.cost_bps, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("cost of a trade, basis points of what is traded (dotted: configured)")
    axes.set_ylabel("annual Sharpe ratio")
    _legend(axes, title="from best to worst at the right end")
    save(figure, path)


def random_clusters(path: Path, study: Study, found: dict[str, Any]) -> None:
    """Histograms of the Sharpe ratios of random and of permuted clusters, the arms marked."""
    drawn = {
        name: [value for value in found[name]["sharpe"]["values"] if value is not None]
        for name in ("random", "permuted")
        if found[name] is not None
    }
    random = drawn["random"]
    bins = np.histogram_bin_edges(np.concatenate(list(drawn.values())), min(30, max(5, len(random) // 4))).tolist()
    figure, (axes,) = new_axes(width=9, height=4.2)
    axes.hist(random, bins=bins, color=RANDOM, alpha=0.6, edgecolor="white", label="random, sizes about equal")
    if "permuted" in drawn:
        label = "permuted, sizes of the model's"
        axes.hist(drawn["permuted"], bins=bins, histtype="step", color="#000000", linewidth=1.5, label=label)
    look = styles(study)
    for arm in _chosen(study):
        value = found["arms"][arm.name]["at_cost"]["sharpe"]
        if value is not None:
            axes.axvline(value, label=f"{arm.name}: {value:.2f}", **look[arm.name])
    axes.set_xlabel("annual Sharpe ratio")
    axes.set_ylabel(f"of {len(random)} clusterings by lot")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(_title(study), fontsize=10)
    axes.grid(axis="x", visible=False)
    _legend(axes)
    save(figure, path)


def comparison(path: Path, found: dict[str, Any]) -> None:
    """Sharpe ratio of each arm with its interval, and the advantage of the model over it on the same days."""
    arms, percent = found["arms"], f"{100 * found['level']:g} %"
    figure, (left, right) = new_axes(2, width=10.5, height=0.3 * len(arms) + 1.5)
    for row, arm in enumerate(arms.values()):
        gap = arm["model_minus_this"]
        for axes, interval in ((left, arm["sharpe"]), (right, None if gap is None else gap["sharpe"])):
            if interval is None or None in interval:
                continue
            value, low, high = interval
            apart = axes is right and (low > 0 or high < 0)
            colour = COLOURS[0] if gap is None else COLOURS[5] if apart else "#444444"
            axes.plot([low, high], [row, row], color=colour, linewidth=1.6)
            axes.plot(value, row, "o", color=colour, markersize=5)
    left.set_yticks(range(len(arms)), list(arms))
    right.set_yticks(range(len(arms)), [])
    left.set_xlabel(f"annual Sharpe ratio [{percent}]")
    right.set_xlabel(f"{found['model']} minus this, same days [{percent}]")
    for axes in (left, right):
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.grid(axis="y", visible=False)
    save(figure, path)
