"""From a study to numbers: every strategy with intervals, and the model beside what knows nothing.

E eligible stocks, n test days. Everything here is plain: numbers, strings, lists, mappings, and None for what is not
defined, so that it can be written as JSON as it is.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_modules.metrics.bootstrap import Interval
from lightning_modules.portfolio.inference import deflated_sharpe, sharpe_difference_intervals, sharpe_intervals
from lightning_modules.portfolio.ledoit_wolf import ledoit_wolf_test
from lightning_modules.portfolio.market import Array
from lightning_modules.portfolio.metrics import (
    cost_drag,
    effective_number,
    sharpe,
    summary,
    turnover_per_year,
    variance_explained,
)
from lightning_modules.portfolio.study import Arm, Study, ever_held

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Of random clusterings."""


def plain(value: Any) -> Any:
    """Tuples and arrays as lists, NumPy's numbers as Python's, what is not finite as None: JSON has no nan."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(each) for each in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    return value


def median_arm(arms: Sequence[Arm], risk_free: float) -> Arm:
    """The arm whose Sharpe ratio is the median (the lower of two), of at least one.

    One of them, not their average: a mixture of many portfolios would be spread over more stocks than the model is.
    """
    order = np.argsort([sharpe(arm.track.returns, risk_free=risk_free) for arm in arms], kind="stable")
    return arms[int(order[(len(order) - 1) // 2])]


def _figures(study: Study, arm: Arm) -> dict[str, Any]:
    track = arm.track
    index = None if arm.kind == "index" else study.index_returns
    gross, net = (
        summary(returns, risk_free=study.risk_free, index_returns=index)
        for returns in (track.gross_returns, track.returns)
    )
    return {
        "kind": arm.kind,
        "at_cost": net,
        "at_0_bps": gross,
        "n_rebalances": len(track.turnover),
        "turnover_per_year": turnover_per_year(track.turnover, len(track.returns)),
        "cost_drag": cost_drag(track.gross_returns, track.returns),
        "effective_number": effective_number(track.targets).mean(),
        "flags": dict(Counter(flag for flags in track.flags.values() for flag in flags)),
    }


def _explained(study: Study, arm: Arm) -> float | None:
    labels = study.labels_of(arm)
    return None if labels is None else variance_explained(labels, study.train_volatility)


def _by_lot(study: Study, arms: Sequence[Arm]) -> dict[str, Any] | None:
    if not arms:
        return None
    ratios = np.array([sharpe(arm.track.returns, risk_free=study.risk_free) for arm in arms])
    ours = sharpe(study.model.track.returns, risk_free=study.risk_free)
    explained = np.array([_explained(study, arm) for arm in arms], dtype=np.float64)
    reached = int((ratios >= ours).sum())

    def spread(values: Array) -> dict[str, Any]:
        quantiles = dict(zip(map(str, QUANTILES), np.quantile(values, QUANTILES), strict=True))
        sd = values.std(ddof=1) if len(values) > 1 else None
        return {"mean": values.mean(), "sd": sd, "quantiles": quantiles, "values": values}

    return {
        "n": len(arms),
        "sharpe": spread(ratios),
        "volatility_explained": spread(explained),
        "n_at_least_model": reached,
        # The draw that is judged counts as one of them, so that the test keeps its level (Phipson and Smyth 2010).
        "p_value": (1 + reached) / (1 + len(arms)) if np.isfinite([ours, *ratios]).all() else None,
    }


def findings(study: Study, *, n_resamples: int = 2000, level: float = 0.95) -> dict[str, Any]:
    """All numbers of a study.

    Args:
        study: What a test found.
        n_resamples: Draws of the stationary bootstrap of days, mean block 10.
        level: Coverage of the intervals.

    Returns:
        Plain values. ``arms``: by name ``kind``; ``at_cost`` and ``at_0_bps`` with every metric of
        :func:`~lightning_modules.portfolio.metrics.summary`; ``sharpe`` (value, low, high); ``model_minus_this``
        (``sharpe`` value, low, high and ``ledoit_wolf_p``; None for the model); ``turnover_per_year``, ``cost_drag``,
        ``effective_number`` (mean over rebalances); ``volatility_explained``, the share of the variance over stocks of
        train volatility between its clusters; ``sharpe_by_cost_bps``; ``flags`` with how often. Last of the arms:
        the median random and the median permuted clustering. ``random`` (sizes about equal) and ``permuted`` (sizes of
        the model's): mean, sd and quantiles of Sharpe ratios of clusterings by lot, how many reach the model's and the
        p value of that rank. ``deflated_sharpe``: ``probability`` for ``n_trials``, the variance over trials being that
        of all arms with clusters, those by lot included. ``clustering``, ``panel``, ``flags`` and the settings.
        ``ledoit_wolf_p`` and ``probability`` are None where the interval is: with fewer than 20 days, or no spread.

    Raises:
        ValueError: If ``n_resamples`` is below 1 or ``level`` not strictly between 0 and 1.
    """
    draw: dict[str, Any] = {
        "risk_free": study.risk_free,
        "n_resamples": n_resamples,
        "seed": study.seed,
        "level": level,
    }
    arms = {arm.name: arm for arm in study.arms}
    for name, lot in (("random", study.random_arms), ("permuted", study.permuted_arms)):
        if lot:
            arms[f"{name} clusters, median of {len(lot)}"] = median_arm(lot, study.risk_free)
    tracks = {name: arm.track.returns for name, arm in arms.items()}
    ours = study.model.track.returns
    intervals = sharpe_intervals(tracks, **draw)
    gaps = sharpe_difference_intervals(tracks, ours, **draw)
    table = {}
    for name, arm in arms.items():
        gap = gaps[name]
        against = {
            "sharpe": Interval(-gap.mean, -gap.high, -gap.low),
            "ledoit_wolf_p": ledoit_wolf_test(ours, tracks[name], risk_free=study.risk_free).p_value
            if np.isfinite(gap.low)
            else None,
        }
        table[name] = _figures(study, arm) | {
            "sharpe": intervals[name],
            "model_minus_this": None if arm is study.model else against,
            "volatility_explained": _explained(study, arm),
            "sharpe_by_cost_bps": {
                f"{cost:g}": sharpe(study.track_at(arm, cost).returns, risk_free=study.risk_free)
                for cost in study.costs_bps
            },
        }
    trials = [
        sharpe(arm.track.returns, risk_free=study.risk_free)
        for arm in study.all_arms
        if arm.kind in ("model", "clusters")
    ]
    probability = (
        deflated_sharpe(ours, n_trials=study.n_trials, trial_sharpes=trials, risk_free=study.risk_free)
        if len(trials) > 1 and np.isfinite([*trials, intervals[study.model.name].low]).all()
        else None
    )
    sizes = np.bincount(study.labels[study.labels >= 0])
    market, held = study.market.rows(0, study.test[1]), ever_held(study.all_arms)
    days = {name: market.dates[start:stop] for name, (start, stop) in (("train", study.train), ("test", study.test))}
    return plain(
        {
            "mode": study.mode,
            "model": study.model.name,
            "arms": table,
            "random": _by_lot(study, study.random_arms),
            "permuted": _by_lot(study, study.permuted_arms),
            "deflated_sharpe": {"n_trials": study.n_trials, "probability": probability},
            "clustering": study.scores,
            "panel": {name: [str(rows[0]), str(rows[-1])] for name, rows in days.items()}
            | {f"n_{name}_days": len(rows) for name, rows in days.items()}
            | {
                "n_stocks": market.n_stocks,
                "n_eligible": len(study.columns),
                "n_held": len(held),
                # What a universe of survivors lacks.
                "n_left_in_test": int((market.last_price_row[held] < len(market) - 1).sum()),
                "n_without_sector": None if study.sectors is None else int((study.sectors < 0).sum()),
                "n_clusters": len(sizes),
                "cluster_sizes": sizes,
            },
            "index_is_price": study.market.index_is_price,
            "risk_free": study.risk_free,
            "cost_bps": study.cost_bps,
            "drift": study.drift,
            "n_resamples": n_resamples,
            "level": level,
            "seed": study.seed,
            "flags": study.flags,
        }
    )
