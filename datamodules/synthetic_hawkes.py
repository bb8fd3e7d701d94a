"""Events of users who excite each other, drawn so that a sum of decayed one-hot states is the true model.

U users in G groups, E events, Q queries. User u has events at the rate, a day,

    lambda_u(t) = mu[g_u] + sum over v != u of beta[g_v, g_u] exp(-(t - t_v) / theta),

where t_v is v's most recent event before t: a new event of v replaces the old one. With ``all_events`` the sum goes
over all events of v, the usual Hawkes process, of which a context of most recent states is only an approximation.

Source: spec of arXiv 2502.10205, sections 4 and 12.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.synthetic_event_set import (
    MICROSECONDS_PER_DAY,
    START,
    SyntheticEvents,
    folds_of_times,
    folds_of_users,
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

N_USERS = 30
THETA_DAYS = 0.02
BASE_EVENTS_PER_DAY = 1.0
"""With 30 users about two of them are excited at a time: fluctuations are large, so that theta is well determined."""

BRANCHING = 0.8
"""Events that one event excites on average, if all events count."""

_TO_OWN, _TO_NEXT = 0.2, 0.6
_TRAIN_SHARE, _VALIDATION_SHARE = 0.6, 0.1


@dataclass(frozen=True, kw_only=True)
class HawkesEvents(SyntheticEvents):
    """Events with group-to-group excitation; the type of an event is its user's group.

    Beside the events run pings: a Poisson process of rate rho for each user, independent of everything. The queries of
    target ``event`` are the events and pings together, in a split by time; the label tells which one it is, 1 for an
    event. Given the past and that there is one of either,

        p(label = 1) = lambda_u(t) / (lambda_u(t) + rho),    odds = lambda_u(t) / rho,

    without any window or approximation. Targets ``event_of_group_<h>`` are the queries of users of group h. There the
    odds are linear in the features x_g = sum over v != u in g of exp(-(t - t_v) / theta), which is ``exp_hawkes`` as a
    sum of one-hot states: intercept mu[h] / rho, weights beta[:, h] / rho. A wrong theta gives features of which no
    linear function is the odds, and that identifies theta. For all users together the weights depend on the group of
    the user asked.

    Attributes:
        theta_days: theta.
        base_rates: ``(G,) float64`` mu, events a day.
        excitation: ``(G, G) float64`` beta, events a day: row the group that excites, column the group excited.
        all_events: Whether all events of a user excite, not the most recent one alone.
        pings_per_day: rho.
    """

    theta_days: float
    base_rates: Floats
    excitation: Floats
    all_events: bool
    pings_per_day: float

    def ages(self, target: str = "event") -> Floats:
        """``(Q, U) float64`` days since each user's most recent event before the query.

        It is infinite for users without one and for the user asked.
        """
        query = self.queries[target]
        ages = np.full((len(query["users"]), self.n_users), np.inf)
        for user in range(self.n_users):
            times = self.times[self.offsets[user] : self.offsets[user + 1]]
            stops = np.searchsorted(times, query["times"], side="left")
            rows = np.flatnonzero((stops > 0) & (query["users"] != user))
            ages[rows, user] = (query["times"][rows] - times[stops[rows] - 1]) / MICROSECONDS_PER_DAY
        return ages

    def rate_features(self, theta_days: float, target: str = "event") -> Floats:
        """``(Q, G) float64``: sum of exp(-age / theta) over the other users of each group, most recent events only."""
        return np.exp(-self.ages(target) / theta_days) @ np.eye(len(self.base_rates))[self.groups]

    def rates(self, target: str = "event") -> Floats:
        """``(Q,) float64``: true lambda at each query, events a day."""
        query = self.queries[target]
        asked = self.groups[query["users"]]
        features = self._all_event_features(query) if self.all_events else self.rate_features(self.theta_days, target)
        return self.base_rates[asked] + (features * self.excitation.T[asked]).sum(1)

    def probabilities(self, target: str = "event") -> Floats:
        """``(Q, 2) float64``: true law of the labels."""
        rates = self.rates(target)
        return (
            np.stack([np.full(len(rates), self.pings_per_day), rates], axis=1) / (rates + self.pings_per_day)[:, None]
        )

    def _all_event_features(self, query: dict[str, Any]) -> Floats:
        """``(Q, G)``: sum of exp(-age / theta) over all events of the other users of each group."""
        per_group = np.zeros((len(query["users"]), len(self.base_rates)))
        owners = self.event_users
        for group in range(len(self.base_rates)):
            per_group[:, group] = self._decayed(np.sort(self.times[self.groups[owners] == group]), query["times"])
        for user in range(self.n_users):
            rows = np.flatnonzero(query["users"] == user)
            own = self._decayed(self.times[self.offsets[user] : self.offsets[user + 1]], query["times"][rows])
            per_group[rows, self.groups[user]] -= own
        return per_group

    def _decayed(self, times: Ints, asked: Ints) -> Floats:
        """``(Q,)``: sum of exp(-(t - t_i) / theta) over events before each t of ``asked (Q,)``; ``times`` ascend."""
        scale = self.theta_days * MICROSECONDS_PER_DAY
        # In logarithms, as exp(t / theta) overflows after some 700 theta.
        logs = (
            np.concatenate([[-np.inf], np.logaddexp.accumulate((times - START) / scale)]) if len(times) else [-np.inf]
        )
        return np.exp(np.asarray(logs)[np.searchsorted(times, asked, side="left")] - (asked - START) / scale)


def hawkes_cross(
    seed: int,
    *,
    n_events: int = 60_000,
    n_users: int = N_USERS,
    n_groups: int = 3,
    theta_days: float = THETA_DAYS,
    base_events_per_day: float = BASE_EVENTS_PER_DAY,
    branching: float = BRANCHING,
    all_events: bool = False,
) -> HawkesEvents:
    """Users who excite their own group weakly, the next group strongly, other groups a little.

    Users go to groups in turn. Of the ``branching`` events that one event would excite if all events counted, 0.2 are
    in its own group, 0.6 in the next (cyclically), the rest evenly in the others (with two groups, in the next; with
    one, all in its own): beta[g, h] = branching share[g, h] / (theta (n_h - [g = h])). The draw ends with the last of
    ``n_events``. Folds are of time, 60 % train, 10 % validation, 30 % test, and the context is all users, because all
    excite.

    Args:
        seed: One seed is one set.
        n_events: E, at least 1.
        n_users: U, at least 2 a group.
        n_groups: G, at least 1.
        theta_days: Decay time, above 0.
        base_events_per_day: mu of every group, above 0.
        branching: In [0, 1).
        all_events: Whether every event goes on exciting after the user's next one.

    Returns:
        The set.

    Raises:
        ValueError: If an argument is outside its range.
    """
    if n_events < 1:
        raise ValueError(f"n_events must be at least 1, got {n_events}")
    if n_groups < 1:
        raise ValueError(f"n_groups must be at least 1, got {n_groups}")
    if n_users < 2 * n_groups:
        raise ValueError(f"n_users must be at least 2 a group, {2 * n_groups}, got {n_users}")
    for name, value in (("theta_days", theta_days), ("base_events_per_day", base_events_per_day)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be above 0, got {value}")
    if not 0 <= branching < 1:
        raise ValueError(f"branching must be in [0, 1), got {branching}")
    rng = np.random.default_rng(seed)
    groups = np.arange(n_users) % n_groups
    sizes = np.bincount(groups)
    shares = _shares(n_groups)
    excitation = branching * shares / (theta_days * (sizes - np.eye(n_groups)))
    base_rates = np.full(n_groups, base_events_per_day)

    days, users = _simulate(rng, n_events, groups, base_rates, excitation, theta_days, all_events)
    times = START + np.round(days * MICROSECONDS_PER_DAY).astype(np.int64)
    stop = int(times[-1]) + 1
    train_stop = START + round(_TRAIN_SHARE * (stop - START))
    validation_stop = START + round((_TRAIN_SHARE + _VALIDATION_SHARE) * (stop - START))
    order = np.lexsort((times, users))
    users, times = users[order], times[order]

    # As many pings as events on average: the labels are balanced.
    n_days = (stop - START) / MICROSECONDS_PER_DAY
    pings_per_day = n_events / (n_users * n_days)
    pinged = np.repeat(np.arange(n_users), rng.poisson(pings_per_day * n_days, n_users))
    ping_times = START + (rng.random(len(pinged)) * (stop - START)).astype(np.int64)
    asked, asked_times = np.concatenate([users, pinged]), np.concatenate([times, ping_times])
    labels = np.repeat(np.array([1, 0]), [n_events, len(pinged)])
    order = np.argsort(asked_times, kind="stable")
    asked, asked_times, labels = asked[order], asked_times[order], labels[order]

    def query(rows: NDArray[np.bool_], description: str) -> dict[str, Any]:
        return {
            "users": asked[rows],
            "times": asked_times[rows],
            "labels": labels[rows],
            "fold": folds_of_times(asked_times[rows], train_stop, validation_stop),
            "n_classes": 2,
            "scope": "local",
            "outcome_dependent": False,
            "description": description,
        }

    queries = {"event": query(np.ones(len(asked), dtype=bool), "an event (1) or a ping (0)")}
    for group in range(n_groups):
        of_group = groups[asked] == group
        queries[f"event_of_group_{group}"] = query(of_group, f"an event (1) or a ping (0) of a user of group {group}")
    return HawkesEvents(
        times=times,
        offsets=np.searchsorted(users, np.arange(n_users + 1)).astype(np.int64),
        types=groups[users],
        type_names=tuple(f"group {group}" for group in range(n_groups)),
        amounts=np.exp(3.0 + 0.5 * rng.standard_normal(n_events)),
        queries=queries,
        split="time",
        user_folds=folds_of_users(rng, n_users),
        train_stop=train_stop,
        stop=stop,
        groups=groups,
        theta_days=theta_days,
        base_rates=base_rates,
        excitation=excitation,
        all_events=all_events,
        pings_per_day=pings_per_day,
    )


def _shares(n_groups: int) -> Floats:
    """``(G, G)``: where the excited events of a group are; rows sum to 1."""
    own, following = np.eye(n_groups), np.roll(np.eye(n_groups), 1, axis=1)
    if n_groups == 1:
        return own
    if n_groups == 2:
        return _TO_OWN * own + (1 - _TO_OWN) * following
    others = 1 - own - following
    return _TO_OWN * own + _TO_NEXT * following + (1 - _TO_OWN - _TO_NEXT) / (n_groups - 2) * others


def _simulate(
    rng: np.random.Generator,
    n_events: int,
    groups: Ints,
    base_rates: Floats,
    excitation: Floats,
    theta_days: float,
    all_events: bool,
) -> tuple[Floats, Ints]:
    """Days ``(E,)`` since the start, ascending, and users ``(E,)``.

    Exact, and without thinning: between events the rate of all users together is a constant plus one exponential,
    each of which can be inverted, and the earlier of both arrivals tells where the event comes from.
    """
    members = [np.flatnonzero(groups == group) for group in range(len(base_rates))]
    sizes = np.array([len(users) for users in members])
    base = base_rates * sizes
    # Rate of all users of group h that a unit of excitation in g makes; nobody excites himself.
    pair_rates = excitation * (sizes - np.eye(len(sizes)))
    total_base, group_rates = float(base.sum()), pair_rates.sum(1)
    base_cumulated, pair_cumulated = np.cumsum(base) / total_base, np.cumsum(pair_rates, axis=1)

    now = 0.0
    level = np.zeros(len(sizes))  # sum of exp(-age / theta) over the events of each group that excite
    own, updated = np.zeros(len(groups)), np.zeros(len(groups))  # each user's part of it, and when it was that
    days, users = np.empty(n_events), np.empty(n_events, dtype=np.int64)
    for event in range(n_events):
        wait = rng.exponential() / total_base
        excited = level * group_rates
        to_come = float(excited.sum()) * theta_days  # events that what happened so far will still excite
        share = rng.exponential() / to_come if to_come > 0 else np.inf
        wait_excited = -theta_days * np.log1p(-share) if share < 1 else np.inf
        from_base = wait <= wait_excited
        wait = min(wait, wait_excited)
        now += wait
        level *= np.exp(-wait / theta_days)
        if from_base:
            group = _pick(rng, base_cumulated)
            user = members[group][rng.integers(sizes[group])]
        else:
            source = _pick(rng, np.cumsum(excited))
            group = _pick(rng, pair_cumulated[source])
            user = members[group][rng.integers(sizes[group])]
            # Within a group all but the source may be excited: a user in proportion to what the others contribute.
            while group == source and rng.random() * level[group] < own[user] * np.exp(
                -(now - updated[user]) / theta_days
            ):
                user = members[group][rng.integers(sizes[group])]
        left = own[user] * np.exp(-(now - updated[user]) / theta_days)
        own[user], updated[user] = left + 1 if all_events else 1.0, now
        level[groups[user]] += own[user] - left
        days[event], users[event] = now, user
    return days, users


def _pick(rng: np.random.Generator, cumulated: Floats) -> int:
    """An index in proportion to weights whose cumulated sums are given."""
    return min(int(np.searchsorted(cumulated, rng.random() * cumulated[-1], side="right")), len(cumulated) - 1)
