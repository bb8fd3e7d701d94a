"""Does a feature, or the time of a query, tell the label? AUC of each feature at the query, and by age of the event.

A feature that is filled in after the outcome tells it, and so does a query time that depends on it. A high AUC is a
suspicion, a low one no proof: a leak may need two features, or an order of events. A rule that asks at other moments
when later events are cut off, or when users exchange their labels, is no suspicion: its times are functions of them.

Source: kernel_attention.md, section 15.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from datamodules.event_preparation import FOREVER, EventLog, Ints
from datamodules.event_targets import INSTEAD, QueryRule
from datamodules.sources.events import MISSING

SUSPICIOUS = 0.9
"""Two-sided AUC from which a feature is warned of."""

LEAST = 20
"""Users of the rarer class from which an AUC is looked at; by chance it then strays from 0.5 by about 0.07.

Users and not queries: what is asked of one user again and again is one observation.
"""

CUTS = (0.25, 0.5, 0.75)
"""Quantiles of the event times at which the log is cut off to see whether a rule looks ahead."""

_MOST_USERS_CUT = 2000
_N_EXCHANGES = 3
_MOST_CLASSES = 10
_N_AGES = 4

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]


def asks_by_outcome(rule: QueryRule, log: EventLog, local_labels: Sequence[str] = ()) -> str | None:
    """Why the times of a rule are functions of labels or of what comes after them; None if that was not found.

    The rule is asked on the log, and on the log without the events from some moments on, of at most 2000 users spread
    over all: its queries before such a moment must be the same. The end of the observation is no outcome and stays as
    it is. What a rule does between these moments is not seen. Then it is asked on logs whose users, and whose events,
    have exchanged their labels at random: all its queries must be the same. Where a label is missing it stays so.

    Args:
        rule: When users are asked; one that declares itself to depend on the outcome is not looked at.
        log: The events.
        local_labels: Columns of ``log.codes`` that are labels; all of ``log.static`` are.

    Returns:
        One line.
    """
    if rule.depends_on_outcome:
        return None
    chosen = np.unique(np.linspace(0, log.n_users - 1, min(log.n_users, _MOST_USERS_CUT)).astype(np.int64))
    whole, kept = log.part(chosen, FOREVER)
    asked_users, asked_times = rule.pairs(whole)
    asked = _set_of(asked_users, asked_times)
    for cut in np.unique(np.quantile(whole.times, CUTS, method="nearest")).tolist():
        known, still = whole.part(np.arange(len(kept)), cut)
        if not len(still):
            continue
        users, times = rule.pairs(known)
        before = times < cut
        moved = _set_of(still[users[before]], times[before]) ^ {pair for pair in asked if pair[1] < cut}
        if moved:
            at = min(time for _, time in moved)
            return (
                f"{type(rule).__name__} asks at other moments before {_text(cut)} when the events from then on are cut "
                f"off ({len(moved)} queries, the first at {_text(at)}): its times are functions of what comes after "
                f"them and may tell the label; {INSTEAD}"
            )
    labels = [*whole.static, *local_labels]
    for seed in range(_N_EXCHANGES if labels else 0):
        moved = asked ^ _set_of(*rule.pairs(_with_labels_exchanged(whole, local_labels, np.random.default_rng(seed))))
        if moved:
            at = min(time for _, time in moved)
            return (
                f"{type(rule).__name__} asks at other moments when the labels {', '.join(labels)} are exchanged "
                f"({len(moved)} queries, the first at {_text(at)}): its times are functions of the label; {INSTEAD}"
            )
    return None


def _set_of(users: Ints, times: Ints) -> set[tuple[int, int]]:
    return set(zip(users.tolist(), times.tolist(), strict=True))


def _with_labels_exchanged(log: EventLog, local_labels: Sequence[str], rng: np.random.Generator) -> EventLog:
    def exchanged(codes: NDArray[Any], missing: int) -> NDArray[Any]:
        known, codes = codes != missing, codes.copy()
        codes[known] = rng.permutation(codes[known])
        return codes

    local = {
        name: exchanged(log.codes[name], log.names[name].index(MISSING) if MISSING in log.names[name] else -1)
        for name in local_labels
    }
    static = {name: exchanged(labels, -1) for name, labels in log.static.items()}
    return replace(log, static=static, codes=log.codes | local)


def _text(moment: int) -> str:
    return str(np.datetime64(moment, "us").astype("datetime64[s]"))


def two_sided_auc(scores: Array, positive: Bools, users: Ints) -> float:
    """max(AUC, 1 - AUC) with midranks for ties; NaN where a class has fewer than ``LEAST`` users.

    Args:
        scores: ``(Q,)``.
        positive: ``(Q,)``.
        users: ``(Q,)``.
    """
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if (
        min(n_positive, n_negative) < LEAST
        or min(len(np.unique(users[side])) for side in (positive, ~positive)) < LEAST
    ):
        return float("nan")
    ranks = rankdata(scores)
    auc = (ranks[positive].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)
    return float(max(auc, 1 - auc))


def check_labels(
    log: EventLog, queries: dict[str, Any], categorical: Sequence[str], numeric: Sequence[str]
) -> list[dict[str, Any]]:
    """One row for each feature, and three for the time of the query: since the first event, its date, since the last.

    Scores are the last value before t of each numeric feature, whether it is missing, whether it is 0; the value of the
    user's first event and the last one that is not missing; whether any value before t is missing, or 0. For a
    categorical feature they are the rate of the class at its last and at its first value among every second user,
    smoothed by the overall rate, judged on the other users, and whether the last or any value is missing. With several
    classes each of the most frequent ones is set against the rest, and the worst counts. Ages are quartiles of t minus
    the time of the event that a value comes from, the last one where it comes from many. What an event neither first
    nor last says, unless it is 0 or missing, is not looked at.

    Args:
        log: The events.
        queries: Queries of one target, arrays of NumPy.
        categorical: Categorical features.
        numeric: Numeric features.

    Returns:
        Rows with ``feature``, ``what`` (value, missing, zero, first value, last known value, ever missing, ever zero;
        delay, date, recency), ``auc``, ``auc_by_age`` (four, youngest first; None where there are too few users), and
        ``worst``, the largest of them.
    """
    users, times, labels = queries["users"], queries["times"], queries["labels"]
    if not len(users):
        return []
    first, row = log.offsets[users], log.before(users, times) - 1
    age = times - log.times[row]
    quartile, of_first = _quartiles(age), _quartiles(times - log.times[first])
    delay = (times - log.times[first]).astype(np.float64)
    classes, counts = np.unique(labels, return_counts=True)
    frequent = classes[np.argsort(-counts, kind="stable")][:_MOST_CLASSES]
    chosen = [1] if queries["n_classes"] == 2 else frequent.tolist()

    of_the_query = {"delay": delay, "date": times.astype(np.float64), "recency": age.astype(np.float64)}
    rows = [
        _row("time of the query", what, [score], labels, users, chosen, quartile)
        for what, score in of_the_query.items()
    ]
    for name in numeric:
        column = log.numbers[name]
        missing, zero = np.isnan(column), column == 0
        filled = np.where(missing, -np.inf, column)
        known = np.maximum(_last_where(~missing)[row], first)  # the first event, missing too, where nothing is known
        scores = {
            "value": (filled[row], quartile),
            "missing": (missing[row], quartile),
            "zero": (zero[row], quartile),
            "first value": (filled[first], of_first),
            "last known value": (filled[known], _quartiles(times - log.times[known])),
            "ever missing": (_any_of(missing, first, row), quartile),
            "ever zero": (_any_of(zero, first, row), quartile),
        }
        rows += [
            _row(name, what, [score.astype(np.float64)], labels, users, chosen, bins)
            for what, (score, bins) in scores.items()
        ]
    fitted = users % 2 == 0
    for name in categorical:
        for what, at, bins in (("value", row, quartile), ("first value", first, of_first)):
            code = log.codes[name][at]
            rates = [_rates(code, labels == label, fitted, len(log.names[name])) for label in chosen]
            judged = [rate[code[~fitted]] for rate in rates]
            rows.append(_row(name, what, judged, labels[~fitted], users[~fitted], chosen, bins[~fitted]))
        if MISSING in log.names[name]:
            missing = log.codes[name] == log.names[name].index(MISSING)
            for what, found in (("missing", missing[row]), ("ever missing", _any_of(missing, first, row))):
                rows.append(_row(name, what, [found.astype(np.float64)], labels, users, chosen, quartile))
    return rows


def warnings_of(target: str, rows: list[dict[str, Any]]) -> list[str]:
    """One line for each suspicious row."""
    return [
        f"target {target!r}: {row['what']} of {row['feature']!r} tells the label, two-sided AUC {row['worst']:.3f}: is "
        "it filled in after the outcome, or the query chosen by it?"
        for row in rows
        if row["worst"] is not None and row["worst"] > SUSPICIOUS
    ]


def _quartiles(age: Ints) -> Ints:
    """Bin 0..3 of each age: quartiles of ranks would tear ties apart, equal ages are one bin."""
    return np.searchsorted(np.quantile(age, [0.25, 0.5, 0.75]), age, side="left")


def _last_where(known: Bools) -> Ints:
    """``(E,)`` the last row up to each one where ``known``, -1 where there is none."""
    return np.maximum.accumulate(np.where(known, np.arange(len(known)), -1))


def _any_of(marked: Bools, first: Ints, last: Ints) -> Bools:
    """``(Q,)`` whether any of the rows ``first..last`` is marked."""
    total = np.concatenate([[0], np.cumsum(marked)])
    return np.asarray(total[last + 1] > total[first])


def _rates(code: NDArray[np.int32], positive: Bools, fitted: Bools, n_names: int) -> Array:
    """Rate of a class at each category among the fitted queries, drawn to the overall rate by one query."""
    n = np.bincount(code[fitted], minlength=n_names)
    hits = np.bincount(code[fitted], weights=positive[fitted], minlength=n_names)
    overall = positive[fitted].mean() if fitted.any() else 0.0
    return np.asarray((hits + overall) / (n + 1), dtype=np.float64)


def _row(
    feature: str, what: str, scores: list[Array], labels: Ints, users: Ints, chosen: list[int], quartile: Ints
) -> dict[str, Any]:
    if len(scores) == 1:
        scores = scores * len(chosen)

    def worst(among: Bools) -> float | None:
        found = [two_sided_auc(s[among], labels[among] == k, users[among]) for s, k in zip(scores, chosen, strict=True)]
        known = [auc for auc in found if not np.isnan(auc)]
        return max(known) if known else None

    overall = worst(np.ones(len(labels), dtype=bool))
    by_age = [worst(quartile == number) for number in range(_N_AGES)]
    known = [auc for auc in (overall, *by_age) if auc is not None]
    return {
        "feature": feature,
        "what": what,
        "auc": overall,
        "auc_by_age": by_age,
        "worst": max(known) if known else None,
    }
