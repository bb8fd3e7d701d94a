"""From a study to numbers: every arm with intervals, and whether context helps beyond what a calendar tells.

Q test queries, S resamples of users. A gain is a difference signed so that more is better, for log-loss too. Everything
returned is plain. Source: spec of arXiv 2502.10205, section 11.8 and the statistics below it.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from lightning_modules.context.controls import Arm
from lightning_modules.context.study import ContextStudy, Measure, TargetStudy, better
from lightning_modules.metrics.bootstrap import Interval
from lightning_modules.metrics.multiple_testing import holm
from lightning_modules.metrics.probe_metrics import bootstrap_scores, probe_scores
from lightning_modules.portfolio.findings import plain

FEWEST_POSITIVES = 50
"""Test queries of the rarest class, of two or of several, below which a target is called underpowered."""

WORDS: dict[Measure, str] = {
    "roc_auc": "ROC-AUC",
    "pr_auc": "PR-AUC",
    "accuracy": "accuracy",
    "log_loss": "nats of log-loss",
}


def strict_controls(arm: str) -> tuple[str, ...]:
    """The arms of which a context arm must beat the best: own history with and without time and shuffled context."""
    aggregator = Arm.parse(arm).source
    return ("own", "own+time", f"shuffled:{aggregator}", f"shuffled+time:{aggregator}")


class _Arms:
    """Measures of the arms of a target: of all its test queries, and in resamples that all arms share."""

    def __init__(
        self, study: TargetStudy, arms: Sequence[str], rows: NDArray[np.bool_] | None, n_resamples: int, seed: int
    ) -> None:
        rows = np.ones(len(study.labels), dtype=bool) if rows is None else rows
        labels, self.users = study.labels.numpy()[rows], study.users.numpy()[rows]
        probabilities = {arm: study.test[arm].numpy()[rows] for arm in arms}
        self.values = {arm: probe_scores(labels, values) for arm, values in probabilities.items()}
        self.draws = bootstrap_scores(labels, self.users, probabilities, n_resamples=n_resamples, seed=seed)

    def value(self, arm: str, measure: Measure) -> float:
        return float(self.values[arm][measure][0])

    def interval(self, arm: str, measure: Measure, level: float) -> Interval:
        return _interval(self.value(arm, measure), self.draws[arm][measure], level)

    def gain(self, arm: str, other: str, measure: Measure) -> tuple[float, NDArray[np.float64]]:
        """Value and ``(S,)`` resamples of what ``arm`` is better by."""
        sign = better(measure)
        value = sign * (self.value(arm, measure) - self.value(other, measure))
        return value, sign * (self.draws[arm][measure] - self.draws[other][measure])


def _interval(value: float, draws: NDArray[np.float64], level: float) -> Interval:
    known = draws[np.isfinite(draws)]
    if not len(known):
        return Interval(value, np.nan, np.nan)
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def _error(draws: NDArray[np.float64]) -> float:
    known = draws[np.isfinite(draws)]
    return float(known.std(ddof=1)) if len(known) > 1 else np.nan


def _p_value(gain: float, error: float) -> float:
    """Two-sided, of a gain with a bootstrap standard error; 1 where there is no spread to judge it by."""
    return float(2 * norm.sf(abs(gain) / error)) if error > 0 and np.isfinite(gain) else 1.0


def findings(
    study: ContextStudy, *, n_resamples: int = 1000, level: float = 0.95, measure: Measure = "roc_auc"
) -> dict[str, Any]:
    """All numbers of a study.

    Intervals are percentile intervals over users, drawn with all their queries, the same for all arms. A context arm is
    judged by its gain over its strictest control: of own history, own history with time features and both of these
    with the arm's context at shuffled moments, the one that is best **on the test**, which makes the comparison harder.
    Holm's correction runs over all context arms of all targets; its intervals reach further into the tails than
    resamples do, so they are the gain +- the normal quantile times the bootstrap standard error.

    Args:
        study: What a test found.
        n_resamples: S.
        level: Coverage of intervals; 1 - level is the error rate of all judgements together.
        measure: What arms are judged by.

    Returns:
        Plain values. ``targets`` by name: ``arms`` by name with every measure (value, low, high), ``outcome_dependent``
        and for context arms ``gains`` over own, own + time and shuffled arms (by control and measure: value, low, high)
        and ``judged``: ``control``, ``gain``, ``standard_error``, ``p``, ``adjusted_p``, ``adjusted_interval``,
        ``helps`` (None where it beats what there is and a control is missing); ``chosen`` on validation; ``helps``;
        ``verdict``; ``n_positives``, queries outside the commonest class; ``n_rarest``, those of the rarest class, and
        ``underpowered``, whether they are too few, or, where the next type is asked, of whose many classes the rare
        ones hardly count, those outside the commonest; ``smallest_detectable``, 1.96 standard errors of the judged gain
        of the chosen arm; ``by_history`` and ``by_recency``, gains of the chosen arm in quartiles. ``attention``,
        ``bank`` and the settings.

    Raises:
        ValueError: If a target has no arm ``own`` or no test query, ``measure`` is unknown, ``n_resamples`` is below 1
            or ``level`` not strictly between 0 and 1.
    """
    if measure not in get_args(Measure):
        raise ValueError(f"measure must be one of {get_args(Measure)}, got {measure!r}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level}")
    for target in study.targets:
        if "own" not in target.test or len(target.labels) == 0:
            raise ValueError(f"target {target.name!r} must have an arm 'own' and test queries, got {list(target.test)}")
    targets = {one.name: _target(one, n_resamples, level, measure, study.seed) for one in study.targets}
    judged = [arm["judged"] for found in targets.values() for arm in found["arms"].values() if arm["judged"]]
    corrected = holm([one["p"] for one in judged], 1 - level)
    for one, p, rejected, error_rate in zip(judged, *corrected, strict=True):
        reach = norm.isf(error_rate / 2) * one["standard_error"]
        one["adjusted_p"] = p
        one["adjusted_interval"] = Interval(one["gain"], one["gain"] - reach, one["gain"] + reach)
        beats = bool(rejected and one["gain"] > 0)
        one["helps"] = None if beats and one["missing"] else beats  # one control that it does not beat is enough for no
    for found in targets.values():
        answers = [arm["judged"]["helps"] for arm in found["arms"].values() if arm["judged"]]
        found["helps"] = True if any(answers) else None if None in answers or not answers else False
        found["verdict"] = _verdict(found, measure)
    return plain(
        {
            "split": study.split,
            "measure": measure,
            "targets": targets,
            "n_comparisons": len(judged),
            "attention": _attention(study),
            "bank": study.bank,
            "n_resamples": n_resamples,
            "level": level,
            "seed": study.seed,
        }
    )


def _target(target: TargetStudy, n_resamples: int, level: float, measure: Measure, seed: int) -> dict[str, Any]:
    arms = _Arms(target, list(target.test), None, n_resamples, seed)
    rows: dict[str, dict[str, Any]] = {}
    for name in target.test:
        arm = Arm.parse(name)
        rows[name] = {
            "kind": "context" if arm.is_context else "control",
            "outcome_dependent": target.outcome_dependent,
            "measures": {one: arms.interval(name, one, level) for one in get_args(Measure)},
            "gains": None,
            "judged": None,
        }
        if not arm.is_context:
            continue
        present = [one for one in strict_controls(name) if one in target.test]
        rows[name]["gains"] = {
            other: {one: _interval(*arms.gain(name, other, one), level) for one in get_args(Measure)}
            for other in present
        }
        control = max(
            present, key=lambda other: np.nan_to_num(better(measure) * arms.value(other, measure), nan=-np.inf)
        )
        gain, draws = arms.gain(name, control, measure)
        error = _error(draws)
        rows[name]["judged"] = {
            "control": control,
            "missing": [one for one in strict_controls(name) if one not in target.test],
            "gain": gain,
            "standard_error": error,
            "p": _p_value(gain, error),
        }
    chosen = target.chosen(measure)
    counts = np.bincount(target.labels.numpy(), minlength=target.n_classes)
    n_positives, n_rarest = int(counts.sum() - counts.max()), int(counts.min())
    smallest: float | None = None
    quartiles: dict[str, list[dict[str, Any]]] = {"by_history": [], "by_recency": []}
    if chosen:
        judged = rows[chosen]["judged"]
        smallest = 1.96 * judged["standard_error"]
        settings = (n_resamples, level, measure, seed)
        for key, values in (("by_history", target.n_events.double()), ("by_recency", target.recency.double())):
            quartiles[key] = _quartiles(target, values.numpy(), chosen, judged["control"], *settings)
    return {
        "description": target.description,
        "scope": target.scope,
        "n_classes": target.n_classes,
        "outcome_dependent": target.outcome_dependent,
        "probe": target.probe,
        "n_queries": len(target.labels),
        "n_users": len(np.unique(arms.users)),
        "n_positives": n_positives,
        "n_rarest": n_rarest,
        "underpowered": (n_positives if target.scope == "next" else n_rarest) < FEWEST_POSITIVES,
        "smallest_detectable": smallest,
        "chosen": chosen,
        "arms": rows,
        **quartiles,
    }


def _quartiles(
    target: TargetStudy,
    values: NDArray[np.float64],
    arm: str,
    control: str,
    n_resamples: int,
    level: float,
    measure: Measure,
    seed: int,
) -> list[dict[str, Any]]:
    """Gain of an arm in quartiles of a property of queries, those without the property last; users drawn in each."""
    known = np.isfinite(values)
    edges = np.unique(np.quantile(values[known], [0, 0.25, 0.5, 0.75, 1])) if known.any() else np.full(1, np.nan)
    # Ties at a quartile stay together, so that there may be fewer than four.
    bins = np.searchsorted(edges[1:-1], values, side="left")
    bounds = list(pairwise(edges)) or [(edges[0], edges[0])]
    groups = [(low, high, known & (bins == place)) for place, (low, high) in enumerate(bounds)]
    groups.append((np.nan, np.nan, ~known))
    found = []
    for low, high, rows in groups:
        if not rows.any():
            continue
        arms = _Arms(target, [arm, control], rows, n_resamples, seed)
        found.append(
            {
                "low": low,
                "high": high,
                "n_queries": int(rows.sum()),
                "n_users": len(np.unique(arms.users)),
                "arm": arms.value(arm, measure),
                "control": arms.value(control, measure),
                "gain": _interval(*arms.gain(arm, control, measure), level),
            }
        )
    return found


def _beyond(control: str) -> str:
    arm = Arm.parse(control)
    if arm.is_shuffled:
        return f"the same context at shuffled moments{' with time features' if arm.has_time else ''}"
    return "a calendar (own history with time features)" if arm.has_time else "own history"


def _amount(interval: Sequence[float], measure: Measure) -> str:
    value, low, high = interval
    return f"{value:+.4f} [{low:+.4f}, {high:+.4f}] {WORDS[measure]}"


def _verdict(found: Mapping[str, Any], measure: Measure) -> str:
    """What the judgements of a target allow to say, in one or two sentences."""
    chosen, arms = found["chosen"], found["arms"]
    if chosen is None:
        return "not judged: no arm has context."
    helping = [name for name, arm in arms.items() if arm["judged"] and arm["judged"]["helps"]]
    shown = chosen if chosen in helping or not helping else helping[0]
    judged = arms[shown]["judged"]
    if not np.isfinite(judged["standard_error"]):
        return f"not judged: {WORDS[measure]} of {found['n_positives']} positives among {found['n_queries']} queries."
    amount, beyond = _amount(judged["adjusted_interval"], measure), _beyond(judged["control"])
    if judged["helps"] is None:
        text = f"not judged: without {', '.join(judged['missing'])} context cannot be told from its controls"
    elif helping:
        text = f"context helps: {shown} adds {amount} beyond {beyond}"
        text += "" if shown == chosen else f"; {chosen}, chosen on validation, does not"
    elif judged["adjusted_interval"].high < 0:
        text = f"context hurts: {shown} is {amount} from {beyond}"
    else:
        text = f"context does not help beyond {beyond}: {shown} differs by {amount}"
    over_own = arms[shown]["gains"]["own"][measure]
    if not helping and judged["control"] != "own" and over_own.low > 0:
        text += f"; over own history alone it is {_amount(over_own, measure)}"
    if found["underpowered"]:
        smallest = found["smallest_detectable"]
        what = "positives" if found["n_classes"] == 2 else "queries of the rarest class"
        few = f"{found['n_rarest']} {what}"
        if found["scope"] == "next":
            few = f"{found['n_positives']} queries outside the commonest class"
        text += f". Underpowered: {few}, differences below {smallest:.4f} cannot be seen"
    if found["outcome_dependent"]:
        text += ". The time of a query depends on its label: no forecast"
    return text + "."


def _attention(study: ContextStudy) -> dict[str, Any] | None:
    """Quartiles over queries of where the aggregator looked."""
    seen = study.attention
    if seen is None:
        return None
    rows: dict[str, Any] = {
        "aggregator": seen.aggregator,
        "share_without_context": (seen.n_visible == 0).double().mean().item(),
    }
    for name in ("entropy", "effective_number", "n_visible", "mean_age"):
        values = getattr(seen, name).double().numpy()
        values = values[np.isfinite(values)]
        rows[name] = np.quantile(values, [0.25, 0.5, 0.75]) if len(values) else None
    return rows
