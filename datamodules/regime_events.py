"""Events of users whose rates, types and labels follow a hidden regime: the model, and draws from it.

U users, E events, Q queries, R regimes, Z classes of users, K types of events. A hidden regime s(t) is a
continuous-time Markov chain in its stationary law. A user of class z has

    events        Poisson with rate ``rates[z, s(t)]`` a day,
    type of one   k with probability ``type_probabilities[z, s(t), k]``,
    amount of one log-normal; its mean depends on the type alone, so it tells nothing that the type does not,
    local label   at a time drawn independently of everything: Bernoulli(sigma(``local_logits[z, s(t)]``)),
    global label  ``global_labels[z]``.

Own events tell z, and of s(t) only where they are many; events of others tell s(t).

Source: spec of arXiv 2502.10205, section 12.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from datamodules.synthetic_event_set import (
    FOREVER,
    MICROSECONDS_PER_DAY,
    START,
    SyntheticEvents,
    folds_of_times,
    folds_of_users,
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NEXT_TYPE_SHARE = 0.2
"""Share of the events whose type is asked for, drawn independently of everything."""


@dataclass(frozen=True, kw_only=True)
class RegimeModel:
    """Parameters of the generative model, see the module.

    Attributes:
        generator: ``(R, R) float64`` a day; rows sum to 0.
        initial: ``(R,) float64``, law of the regime at the start.
        class_prior: ``(Z,) float64``; classes of users are drawn independently from it.
        rates: ``(Z, R) float64`` events a day.
        type_probabilities: ``(Z, R, K) float64``.
        local_logits: ``(Z, R) float64``.
        global_labels: ``(Z,) int64``.
        chains: ``(Z,) int64``: column of the path that users of the class live in.
    """

    generator: Floats
    initial: Floats
    class_prior: Floats
    rates: Floats
    type_probabilities: Floats
    local_logits: Floats
    global_labels: Ints
    chains: Ints


@dataclass(frozen=True, kw_only=True)
class RegimeEvents(SyntheticEvents):
    """Events drawn from a :class:`RegimeModel`. Targets: ``next_type``, ``local``, ``global``.

    Attributes:
        model: What it was drawn from.
        change_times: ``(C,) int64`` microseconds: row c of ``regimes`` holds from here on; the first is ``START``.
        regimes: ``(C, n_chains) int64``.
        classes: ``(U,) int64``, below Z.
        sparse: ``(U,) bool``.
        user_types: ``(U,) int64``: w, or the cohort.
    """

    model: RegimeModel
    change_times: Ints
    regimes: Ints
    classes: Ints
    sparse: NDArray[np.bool_]
    user_types: Ints

    def regimes_at(self, times: Ints) -> Ints:
        """``(Q, n_chains) int64``: regime of each chain at ``times (Q,)``."""
        return self.regimes[np.searchsorted(self.change_times, times, side="right") - 1]


def draw_events(
    rng: np.random.Generator,
    model: RegimeModel,
    path: tuple[Ints, Ints],
    type_names: tuple[str, ...],
    groups: Ints,
    n_users: int,
    n_days: float,
    labels_per_day: float,
    new_regimes_at: float | None,
) -> RegimeEvents:
    """Draw users, events and queries given the regimes.

    Args:
        rng: Source of all draws.
        model: Its classes are dense user types, then sparse ones.
        path: ``change_times (C,) int64`` and ``regimes (C, n_chains) int64``, see :class:`RegimeEvents`.
        type_names: K names.
        groups: ``(W,) int64`` group of each user type.
        n_users: U.
        n_days: Length of the observation.
        labels_per_day: Rate of local queries of every user.
        new_regimes_at: Share of the days after which the test begins; None if folds are of users.

    Returns:
        The set.
    """
    change_times, regimes = path
    stop = START + round(n_days * MICROSECONDS_PER_DAY)
    n_types = len(groups)
    classes = rng.choice(len(model.class_prior), size=n_users, p=model.class_prior)
    user_types, sparse = classes % n_types, classes >= n_types

    # Given the path the rate is constant on each stretch, where a Poisson process is a count and uniform times.
    lengths = np.diff(np.append(change_times, stop))
    states = regimes[:, model.chains[classes]].T  # (U, C)
    counts = rng.poisson(model.rates[classes[:, None], states] * (lengths / MICROSECONDS_PER_DAY))
    places = np.repeat(np.arange(counts.size), counts.ravel())
    users, stretches = np.divmod(places, len(lengths))
    times = change_times[stretches] + (rng.random(len(places)) * lengths[stretches]).astype(np.int64)
    cumulated = model.type_probabilities[classes[users], states[users, stretches]].cumsum(1)
    types = (rng.random((len(places), 1)) * cumulated[:, -1:] >= cumulated).sum(1)
    order = np.lexsort((times, users))
    users, times, types = users[order], times[order], types[order]
    amounts = np.exp(3.0 + 0.1 * types + 0.5 * rng.standard_normal(len(types)))

    user_folds = folds_of_users(rng, n_users)
    if new_regimes_at is None:
        train_stop, validation_stop = FOREVER, FOREVER
    else:
        validation_stop = START + round(new_regimes_at * (stop - START))
        train_stop = START + round(0.9 * new_regimes_at * (stop - START))

    asked = np.repeat(np.arange(n_users), rng.poisson(labels_per_day * n_days, n_users))
    asked_times = START + (rng.random(len(asked)) * (stop - START)).astype(np.int64)
    order = np.lexsort((asked_times, asked))
    asked, asked_times = asked[order], asked_times[order]
    now = regimes[np.searchsorted(change_times, asked_times, side="right") - 1, model.chains[classes[asked]]]
    probabilities = 1 / (1 + np.exp(-model.local_logits[classes[asked], now]))
    local_labels = (rng.random(len(asked)) < probabilities).astype(np.int64)
    kept = np.flatnonzero(rng.random(len(times)) < NEXT_TYPE_SHARE)
    ends = (
        np.full(n_users, stop) if new_regimes_at is None else np.array([train_stop, validation_stop, stop])[user_folds]
    )

    def query(
        who: Ints, when: Ints, labels: Ints, n_classes: int, scope: Literal["global", "local", "next"], description: str
    ) -> dict[str, Any]:
        # A static label is known at all times: under a split by time too, it may serve one fold only.
        by_user = new_regimes_at is None or scope == "global"
        return {
            "users": who,
            "times": when,
            "labels": labels,
            "fold": user_folds[who] if by_user else folds_of_times(when, train_stop, validation_stop),
            "n_classes": n_classes,
            "scope": scope,
            "outcome_dependent": False,
            "description": description,
        }

    everyone = np.arange(n_users)
    n_labels = int(model.global_labels.max()) + 1
    return RegimeEvents(
        times=times,
        offsets=np.searchsorted(users, np.arange(n_users + 1)).astype(np.int64),
        types=types,
        type_names=type_names,
        amounts=amounts,
        queries={
            "next_type": query(
                users[kept], times[kept], types[kept], len(type_names), "next", "type of the next event"
            ),
            "local": query(asked, asked_times, local_labels, 2, "local", "label of the moment, at independent times"),
            "global": query(everyone, ends, model.global_labels[classes], n_labels, "global", "label of the user"),
        },
        split="users" if new_regimes_at is None else "time",
        user_folds=user_folds,
        train_stop=train_stop,
        stop=stop,
        groups=groups[user_types],
        model=model,
        change_times=change_times,
        regimes=regimes,
        classes=classes,
        sparse=sparse,
        user_types=user_types,
    )


def draw_path(rng: np.random.Generator, generator: Floats, initial: Floats, n_days: float) -> tuple[Ints, Ints]:
    """Draw a chain of law ``initial (R,)`` and rates ``generator (R, R)`` a day over ``n_days`` from ``START``.

    Returns:
        ``(C,) int64`` microseconds of its changes, first ``START``, and ``(C,) int64`` states from each on.
    """
    state = int(rng.choice(len(initial), p=initial))
    day, days, states = 0.0, [0.0], [state]
    while (leaving := -generator[state, state]) > 0 and (day := day + rng.exponential(1 / leaving)) < n_days:
        jumps = np.maximum(generator[state], 0)
        state = int(rng.choice(len(initial), p=jumps / jumps.sum()))
        days.append(day)
        states.append(state)
    return START + np.round(np.array(days) * MICROSECONDS_PER_DAY).astype(np.int64), np.array(states)
