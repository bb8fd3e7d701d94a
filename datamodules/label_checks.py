"""Does a feature, or the time of a query, tell the label? AUC of each feature at the query, and by age of the event.

A feature that is filled in after the outcome tells it, and so does a query time that depends on it. A high AUC is a
suspicion, a low one no proof: a leak may need two features, or an order of events. A rule that asks at other moments
when later events are cut off, of all users or of one, or when users exchange their labels, is no suspicion: its times
are functions of them.

Source: kernel_attention.md, section 15.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from datamodules.event_preparation import FOREVER, EventLog, Ints
from datamodules.event_targets import INSTEAD, Pairs, QueryRule
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
_MOST_CUT_ALONE = 16
_N_EXCHANGES = 3
_MOST_CLASSES = 10
_N_AGES = 4
_LOOKS_AHEAD = "what comes after them and may tell the label"

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]


def asks_by_outcome(rule: QueryRule, log: EventLog, local_labels: Sequence[str] = ()) -> str | None:
    """Why the times of a rule are functions of labels or of what comes after them; None if that was not found.

    The rule is asked on the log of at most 2000 users spread over all, and on changes of it:

    * without the events from some moments on: its queries before such a moment must be the same;
    * with each user cut off at a moment of its own, once at one of its queries and once just before one of its events,
      drawn evenly: its queries up to there must be the same. At the moment itself it is known that something happens,
      which ``AtEvents`` asks about, but not what: the content of such an event is drawn from the log. A rule may look
      at the past of others, which these cuts change too, so what moves must also move where one user alone is cut;
    * with the labels of users, and of events, exchanged at random: all its queries must be the same. Where a label is
      missing it stays so.

    The end of the observation is no outcome and stays as it is. Queries without an own event before them are never kept
    and not looked at. What a rule does elsewhere is not seen.

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
    asked = _asked(rule, whole)
    for cut in np.unique(np.quantile(whole.times, CUTS, method="nearest")).tolist():
        known, still = whole.part(np.arange(len(kept)), cut)
        if not len(still):
            continue
        users, times = _asked(rule, known)
        moved = _moved(_until(asked, cut - 1), _until((still[users], times), cut - 1))
        if len(moved[0]):
            return _line(rule, f"before {_text(cut)} when the events from then on are cut off", moved, _LOOKS_AHEAD)
    for place, limits in _own_limits(whole, asked).items():
        moved = _moved_by_own_cuts(rule, whole, asked, limits)
        if len(moved[0]) and any(
            len(_moved_by_own_cuts(rule, whole, asked, np.where(np.arange(whole.n_users) == user, limits, FOREVER))[0])
            for user in np.unique(moved[0])[:_MOST_CUT_ALONE]
        ):
            return _line(rule, f"when users are cut off {place}", moved, _LOOKS_AHEAD)
    labels = [*whole.static, *local_labels]
    for seed in range(_N_EXCHANGES if labels else 0):
        exchanged = _with_labels_exchanged(whole, local_labels, np.random.default_rng(seed))
        moved = _moved(asked, _asked(rule, exchanged))
        if len(moved[0]):
            return _line(rule, f"when the labels {', '.join(labels)} are exchanged", moved, "the label")
    return None


def _line(rule: QueryRule, when: str, moved: Pairs, of_what: str) -> str:
    users, times = moved
    return (
        f"{type(rule).__name__} asks at other moments {when} ({len(users)} queries, the first at "
        f"{_text(int(times.min()))}): its times are functions of {of_what}; {INSTEAD}"
    )


def _asked(rule: QueryRule, log: EventLog) -> Pairs:
    """Its queries that know an own event; no other is ever kept."""
    users, times = rule.pairs(log)
    knows = times > log.times[log.offsets[users]]
    return users[knows], times[knows]


def _until(pairs: Pairs, limit: Ints | int) -> Pairs:
    """Queries up to a moment, or each up to its own."""
    users, times = pairs
    return users[times <= limit], times[times <= limit]


def _moved(left: Pairs, right: Pairs) -> Pairs:
    """Queries that are in one of two sets alone."""
    if all(np.array_equal(*both) for both in zip(left, right, strict=True)):
        return left[0][:0], left[1][:0]
    users, times = (np.concatenate(both) for both in zip(left, right, strict=True))
    distinct, rank = np.unique(times, return_inverse=True)
    keys = users * len(distinct) + rank
    users, rank = np.divmod(np.setxor1d(keys[: len(left[0])], keys[len(left[0]) :]), len(distinct))
    return users, distinct[rank]


def _own_limits(log: EventLog, asked: Pairs) -> dict[str, Ints]:
    """Where -> ``(U,)`` last moment at which each user is known; ``FOREVER`` for users of whom nothing can be cut."""
    rng, first = np.random.default_rng(0), log.times[log.offsets[:-1]]

    def one_each(users: Ints, times: Ints) -> Ints:
        order = rng.permutation(len(users))
        drawn, place = np.unique(users[order], return_index=True)
        limits = np.full(log.n_users, FOREVER)
        limits[drawn] = times[order][place]
        return limits

    later = log.times > first[log.users]
    return {
        "at one of their queries": one_each(*asked),
        "before one of their events": one_each(log.users[later], log.times[later] - 1),
    }


def _moved_by_own_cuts(rule: QueryRule, log: EventLog, asked: Pairs, limits: Ints) -> Pairs:
    """Queries of users that are cut, up to their limits, that are asked without what comes after them or with it alone.

    Args:
        rule: When users are asked.
        log: The events.
        asked: What the rule asks on it, of users who are known.
        limits: ``(U,)`` last moment at which a user is known, not before its first event; ``FOREVER`` is no cut.
    """
    limit = limits[log.users]
    rows = np.flatnonzero(log.times <= limit)
    counts = np.bincount(log.users[rows], minlength=log.n_users)
    # Drawn for every row, so that a user who is cut alone gets what it got among all.
    drawn = np.random.default_rng(1).integers(0, len(log.times), len(log.times))
    content = np.where(log.times == limit, drawn, np.arange(len(drawn)))[rows]
    known = replace(
        log,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        times=log.times[rows],
        codes={name: codes[content] for name, codes in log.codes.items()},
        numbers={name: numbers[content] for name, numbers in log.numbers.items()},
        observed_until=log.end,
        clock=log.tick,  # fewer stamps might look like those of a coarser one
    )
    limits = np.where(limits < FOREVER, limits, np.iinfo(np.int64).min)  # who is not cut is not compared
    return _moved(*(_until(pairs, limits[pairs[0]]) for pairs in (asked, _asked(rule, known))))


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
