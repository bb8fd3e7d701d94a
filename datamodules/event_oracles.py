"""Bayes oracles of the drawn event sets: what can be known of a label at best, from which knowledge.

Q queries, U users, E events, Z classes of users, R regimes. A user's class z and the regime s(t) are hidden; with
the parameters known, the own history up to t determines their joint law by the filter of a Markov-modulated Poisson
process. For a class z let M_z = generator - diag(rates[z]). Then the unnormalised row vector alpha_z of regimes obeys

    between events     alpha_z(t + dt) = alpha_z(t) expm(M_z dt),          (that nothing happened counts)
    at an event of k   alpha_z(s) <- alpha_z(s) rates[z, s] type_probabilities[z, s, k],
    at the start       alpha_z(s) = class_prior[z] initial[s].

Where the path of the regime is known, its likelihood needs no filter:

    log p(history | z, path) = sum_i log(rates[z, s(t_i)] type_probabilities[z, s(t_i), k_i]) - int_0^t rates[z, s].

Source: spec of arXiv 2502.10205, section 12; the filter: W. Fischer, K. Meier-Hellstern, The Markov-modulated Poisson
process (MMPP) cookbook, Performance Evaluation 18 (1993).
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from datamodules.regime_events import RegimeEvents
from datamodules.synthetic_event_set import MICROSECONDS_PER_DAY, START

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

Knows = Literal["own", "regime", "type", "regime and type"]
"""Beside the own history: nothing, the regimes of all chains up to the query, the user type w, or both."""

KNOWLEDGE: tuple[Knows, ...] = ("own", "regime", "type", "regime and type")


def posteriors(drawn: RegimeEvents, users: Ints, times: Ints, knows: Knows = "own") -> Floats:
    """Law of class and regime at a query, given the own events with time < t and what else is known.

    Args:
        drawn: The set.
        users: ``(Q,) int64``.
        times: ``(Q,) int64`` microseconds, from ``START`` on.
        knows: What is known beside the own history. Whether the user is sparse never is.

    Returns:
        ``(Q, Z, R) float64``; each sums to 1.

    Raises:
        ValueError: If there is no such knowledge.
    """
    if knows not in KNOWLEDGE:
        raise ValueError(f"knows must be one of {', '.join(map(repr, KNOWLEDGE))}, got {knows!r}")
    model = drawn.model
    prior = np.broadcast_to(model.class_prior, (drawn.n_users, len(model.class_prior)))
    if knows in ("type", "regime and type"):
        n_types = len(model.class_prior) // 2  # classes are dense types, then sparse ones
        prior = prior * (np.arange(len(model.class_prior)) % n_types == drawn.user_types[:, None])
    joint = (
        _given_regimes(drawn, prior, users, times)
        if knows in ("regime", "regime and type")
        else _filtered(drawn, prior, users, times)
    )
    return joint / joint.sum((1, 2), keepdims=True)


def oracle_probabilities(drawn: RegimeEvents, target: str, knows: Knows = "own") -> Floats:
    """Law of the labels of a target's queries.

    Args:
        drawn: The set.
        target: ``next_type``, ``local`` or ``global``. At a query of ``next_type`` it is known that an event happens.
        knows: See :func:`posteriors`.

    Returns:
        ``(Q, n_classes) float64``.

    Raises:
        ValueError: If there is no such target or knowledge.
    """
    if target not in drawn.queries:
        raise ValueError(f"target must be one of {', '.join(drawn.queries)}, got {target!r}")
    query, model = drawn.queries[target], drawn.model
    joint = posteriors(drawn, query["users"], query["times"], knows)
    if target == "next_type":
        probabilities = np.einsum("qzr,zr,zrk->qk", joint, model.rates, model.type_probabilities, optimize=True)
        return probabilities / probabilities.sum(1, keepdims=True)
    if target == "local":
        positive = np.einsum("qzr,zr->q", joint, 1 / (1 + np.exp(-model.local_logits)))
        return np.stack([1 - positive, positive], axis=1)
    return joint.sum(2) @ np.eye(query["n_classes"])[model.global_labels]


def log_losses(probabilities: Floats, labels: Ints) -> Floats:
    """``(Q,) float64``: -log of the probability of each label, in nats; ``probabilities (Q, n_classes)``."""
    return -np.log(probabilities[np.arange(len(labels)), labels])


def oracle_losses(drawn: RegimeEvents, target: str = "local", fold: int = 2) -> dict[str, dict[str, float]]:
    """Mean log-losses of every oracle on the queries of a fold.

    Args:
        drawn: The set.
        target: Its target.
        fold: 0 train, 1 validation, 2 test.

    Returns:
        Knowledge -> ``sparse``, ``dense`` -> nats; NaN where there is no query.
    """
    query = drawn.queries[target]
    sparse = drawn.sparse[query["users"]]
    table: dict[str, dict[str, float]] = {}
    for knows in KNOWLEDGE:
        losses = log_losses(oracle_probabilities(drawn, target, knows), query["labels"])
        table[knows] = {}
        for name, kind in (("sparse", sparse), ("dense", ~sparse)):
            rows = kind & (query["fold"] == fold)
            table[knows][name] = float(losses[rows].mean()) if rows.any() else float("nan")
    return table


def _filtered(drawn: RegimeEvents, prior: Floats, users: Ints, times: Ints) -> Floats:
    """``(Q, Z, R)`` proportional to the joint law given the own events; ``prior (U, Z)``."""
    model = drawn.model
    generators = model.generator - np.eye(len(model.initial)) * model.rates[:, None, :]
    values, vectors = np.linalg.eig(generators)  # (Z, R), (Z, R, R)
    inverses = np.linalg.inv(vectors)

    def moved(alpha: Floats, elapsed: Ints) -> Floats:
        """``alpha (Z, n, R)`` after ``elapsed (n,)`` microseconds without an event."""
        decays = np.exp(values[:, None] * (elapsed / MICROSECONDS_PER_DAY)[:, None])
        # Rounding may leave -1e-17 where the probability is 0.
        return np.maximum((((alpha @ vectors) * decays) @ inverses).real, 0)

    def normalised(alpha: Floats) -> Floats:
        return alpha / alpha.sum((0, 2), keepdims=True)

    # All users step from event to event together; the longest come first, so that those still going are a prefix.
    counts = np.diff(drawn.offsets)
    order = np.argsort(-counts, kind="stable")
    start = (prior[:, :, None] * model.initial).transpose(1, 0, 2)  # (Z, U, R)
    jumps = model.rates[:, :, None] * model.type_probabilities  # (Z, R, K)
    after = np.empty((len(model.class_prior), len(drawn.times), len(model.initial)))
    alpha, last = start[:, order], np.full(drawn.n_users, START)
    for step in range(counts.max(initial=0)):
        going = int(np.searchsorted(-counts[order], -step, side="left"))
        rows = drawn.offsets[order[:going]] + step
        alpha = moved(alpha[:, :going], drawn.times[rows] - last[:going])
        alpha = normalised(alpha * jumps[:, :, drawn.types[rows]].transpose(0, 2, 1))
        after[:, rows], last = alpha, drawn.times[rows]

    stops = drawn.history_stops(users, times)
    some = stops > drawn.offsets[users]
    before = start[:, users]
    before[:, some] = after[:, stops[some] - 1]
    since = np.full(len(users), START)
    since[some] = drawn.times[stops[some] - 1]
    return normalised(moved(before, times - since)).transpose(1, 0, 2)


def _given_regimes(drawn: RegimeEvents, prior: Floats, users: Ints, times: Ints) -> Floats:
    """``(Q, Z, R)`` proportional to the joint law given the own events and all regimes; ``prior (U, Z)``."""
    model = drawn.model
    every = np.arange(len(model.class_prior))
    path = drawn.regimes[:, model.chains]  # (C, Z)
    rates = model.rates[every, path]
    days = (drawn.change_times - START) / MICROSECONDS_PER_DAY
    zero = np.zeros((1, len(every)))
    expected = np.concatenate([zero, np.cumsum(rates[:-1] * np.diff(days)[:, None], axis=0)])  # at each change
    stretches = np.searchsorted(drawn.change_times, times, side="right") - 1
    spent = ((times - START) / MICROSECONDS_PER_DAY - days[stretches])[:, None]
    expected_now = expected[stretches] + rates[stretches] * spent

    states = drawn.regimes_at(drawn.times)[:, model.chains]  # (E, Z)
    jumps = np.log(model.rates[:, :, None] * model.type_probabilities)[every, states, drawn.types[:, None]]
    summed = np.concatenate([zero, np.cumsum(jumps, axis=0)])
    with np.errstate(divide="ignore"):
        logs = np.log(prior[users])
    logs += summed[drawn.history_stops(users, times)] - summed[drawn.offsets[users]] - expected_now
    weights = np.exp(logs - logs.max(1, keepdims=True))
    return weights[:, :, None] * (drawn.regimes_at(times)[:, model.chains, None] == np.arange(len(model.initial)))
