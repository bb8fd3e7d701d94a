"""Event sequences with known answers: a regime shared by all users, none, and one a cohort.

W user types, R regimes, G groups. The model that all three are drawn from: :mod:`datamodules.regime_events`. What can
be known of a label at best: :mod:`datamodules.event_oracles`. Source: spec of arXiv 2502.10205, section 12.
"""

import numpy as np
from numpy.typing import NDArray

from datamodules.regime_events import RegimeEvents, RegimeModel, draw_events, draw_path

Floats = NDArray[np.float64]

N_USERS = 750
N_DAYS = 120.0
"""Long, with few users, rather than short with many: a test of 48 days sees the regimes change about ten times."""

USER_TYPES = 4
"""W: the group of user type w is w // 2, and it is vulnerable if w is odd."""

REGIMES = ("calm", "boom", "crisis")
CRISIS = 2

SOJOURN_DAYS = (6.0, 4.0, 5.0)
"""Mean stay in each regime. A user of four events a day shows a change long before the next one."""

DENSE_EVENTS_PER_DAY = 4.0
SPARSE_DIVISOR = 20.0
"""Half of the users have this many times fewer events: about one in five days, too few to tell the regime."""

LABELS_PER_DAY = 1.5
"""Rate of local queries: about 27,000 test queries of the preset are of sparse users."""

_REGIME_SPEED = (1.0, 1.3, 0.7)
_TYPE_SPEED = (0.85, 1.15, 1.15, 0.85)
_TELLS_REGIME = 0.7
_TELLS_TYPE = 0.7
_BASE_LOGIT = -2.0
_CRISIS_EFFECT = 4.0
_COHORT_BASE_LOGIT = -1.5
_COHORT_EFFECT = 3.0
_COHORT_SOJOURN_DAYS = 5.0


def regime(
    seed: int,
    *,
    n_users: int = N_USERS,
    n_days: float = N_DAYS,
    events_per_day: float = DENSE_EVENTS_PER_DAY,
    labels_per_day: float = LABELS_PER_DAY,
    new_regimes_at: float | None = None,
) -> RegimeEvents:
    """One regime of calm, boom and crisis for all users.

    The chain leaves regime r at rate 1 / ``SOJOURN_DAYS[r]`` for either other. A class is (w, sparse), all equally
    likely. The type of an event is a pair (a, b) of a regime and a user type: a is s(t) with probability 0.7, b is w
    with probability 0.7, else any other; both are independent. The rate is ``events_per_day`` times 1, 1.3, 0.7 by
    regime and 0.85 or 1.15 by user type, a twentieth of it for sparse users. The local label is 1 with probability
    sigma(-2 + 4 [s(t) = crisis] [w vulnerable]); the global label, asked for at the end, is the group w // 2.
    ``next_type`` asks for a fifth of the events, just before each.

    The path is the same for all users. Under a split of users, labels of train users therefore tell a model with a
    calendar much of s(t), and own history + time beats the oracle of the own history; under a split of time it cannot.

    Args:
        seed: One seed is one set.
        n_users: U, at least 10.
        n_days: Length of the observation, above 0.
        events_per_day: Of a dense user, above 0.
        labels_per_day: Rate of local queries of every user, above 0.
        new_regimes_at: If given, folds are of time: the test begins after this share of the days, in (0, 1),
            validation after nine tenths of that. Stays of the chain in the test are then new to the calendar: what a
            model learned about dates fails, what it learned about others holds. None: folds are of users.

    Returns:
        The set; ``groups`` are the w // 2.

    Raises:
        ValueError: If an argument is outside its range.
    """
    return _shared_regime(seed, n_users, n_days, events_per_day, labels_per_day, new_regimes_at, constant=False)


def null(
    seed: int,
    *,
    n_users: int = N_USERS,
    n_days: float = N_DAYS,
    events_per_day: float = DENSE_EVENTS_PER_DAY,
    labels_per_day: float = LABELS_PER_DAY,
    new_regimes_at: float | None = None,
) -> RegimeEvents:
    """:func:`regime` with s(t) = crisis forever: labels depend on the user alone, so others tell nothing."""
    return _shared_regime(seed, n_users, n_days, events_per_day, labels_per_day, new_regimes_at, constant=True)


def cohort(
    seed: int,
    *,
    n_users: int = N_USERS,
    n_days: float = N_DAYS,
    n_groups: int = 8,
    events_per_day: float = DENSE_EVENTS_PER_DAY,
    labels_per_day: float = LABELS_PER_DAY,
    new_regimes_at: float | None = None,
) -> RegimeEvents:
    """A regime of its own, 0 or 1, for each of G groups; the local label depends on the user's group's.

    Groups come in pairs of one chain with opposite regimes, s_(2j + 1) = 1 - s_2j, and chains of pairs are
    independent; the mean stay is 5 days. An event tells one of two things, with probability one half each: the group
    (type g with probability 0.7, else any other group) or the regime (type G + s_g(t) with probability 0.7, else the
    other). The local label is 1 with probability sigma(-1.5 + 3 s_g(t)); the global label, asked for at the end, is
    the parity of the group.

    As half of the groups are in regime 1 at all times, the law of the last type of a user drawn from all does not
    depend on the time: a mean over all users of anything that adds up over events tells nothing, one over the own
    group tells s_g(t). The group of a user is drawn, so numbers of users in a pair differ a little.

    Args:
        seed: One seed is one set.
        n_users: U, at least 10.
        n_days: Length of the observation, above 0.
        n_groups: G, even and at least 2.
        events_per_day: Of a dense user, above 0; of a sparse one, which half are, a twentieth.
        labels_per_day: Rate of local queries of every user, above 0.
        new_regimes_at: See :func:`regime`.

    Returns:
        The set; ``groups`` and ``user_types`` are the g.

    Raises:
        ValueError: If an argument is outside its range.
    """
    _check(n_users, n_days, events_per_day, labels_per_day, new_regimes_at)
    if n_groups < 2 or n_groups % 2:
        raise ValueError(f"n_groups must be even and at least 2, got {n_groups}")
    rng = np.random.default_rng(seed)
    generator = _uniform_jumps((_COHORT_SOJOURN_DAYS, _COHORT_SOJOURN_DAYS))
    half = np.full(2, 0.5)
    telling = np.concatenate(
        [
            np.broadcast_to(_right_or_other(n_groups, _TELLS_TYPE)[:, None], (n_groups, 2, n_groups)),
            np.broadcast_to(_right_or_other(2, _TELLS_REGIME), (n_groups, 2, 2)),
        ],
        axis=2,
    )
    model = RegimeModel(
        generator=generator,
        initial=half,
        class_prior=np.full(2 * n_groups, 0.5 / n_groups),
        rates=_with_sparse(np.full((n_groups, 2), events_per_day)),
        type_probabilities=np.tile(telling / 2, (2, 1, 1)),
        local_logits=np.tile(_COHORT_BASE_LOGIT + _COHORT_EFFECT * np.arange(2.0), (2 * n_groups, 1)),
        global_labels=np.tile(np.arange(n_groups) % 2, 2),
        chains=np.tile(np.arange(n_groups), 2),
    )
    paths = [draw_path(rng, generator, half, n_days) for _ in range(n_groups // 2)]
    change_times = np.unique(np.concatenate([changes for changes, _ in paths]))
    pairs = np.stack(
        [states[np.searchsorted(changes, change_times, side="right") - 1] for changes, states in paths], axis=1
    )
    regimes = np.stack([pairs, 1 - pairs], axis=2).reshape(len(change_times), n_groups)
    names = (*(f"group {group}" for group in range(n_groups)), "quiet", "loud")
    return draw_events(
        rng, model, (change_times, regimes), names, np.arange(n_groups), n_users, n_days, labels_per_day, new_regimes_at
    )


def _shared_regime(
    seed: int,
    n_users: int,
    n_days: float,
    events_per_day: float,
    labels_per_day: float,
    new_regimes_at: float | None,
    *,
    constant: bool,
) -> RegimeEvents:
    _check(n_users, n_days, events_per_day, labels_per_day, new_regimes_at)
    rng = np.random.default_rng(seed)
    n_regimes = len(REGIMES)
    if constant:
        generator, initial = np.zeros((n_regimes, n_regimes)), np.eye(n_regimes)[CRISIS]
    else:
        # Jumps are uniform, so the chain is reversible and its stationary law is proportional to the stays.
        generator, initial = _uniform_jumps(SOJOURN_DAYS), np.array(SOJOURN_DAYS) / sum(SOJOURN_DAYS)
    pairs = np.einsum(
        "ra,wb->wrab", _right_or_other(n_regimes, _TELLS_REGIME), _right_or_other(USER_TYPES, _TELLS_TYPE)
    )
    vulnerable = np.arange(USER_TYPES) % 2
    logits = _BASE_LOGIT + _CRISIS_EFFECT * np.outer(vulnerable, np.arange(n_regimes) == CRISIS)
    model = RegimeModel(
        generator=generator,
        initial=initial,
        class_prior=np.full(2 * USER_TYPES, 0.5 / USER_TYPES),
        rates=_with_sparse(events_per_day * np.outer(_TYPE_SPEED, _REGIME_SPEED)),
        type_probabilities=np.tile(pairs.reshape(USER_TYPES, n_regimes, -1), (2, 1, 1)),
        local_logits=np.tile(logits, (2, 1)),
        global_labels=np.tile(np.arange(USER_TYPES) // 2, 2),
        chains=np.zeros(2 * USER_TYPES, dtype=np.int64),
    )
    changes, states = draw_path(rng, generator, initial, n_days)
    names = tuple(f"{first} {second}" for first in REGIMES for second in range(USER_TYPES))
    groups = np.arange(USER_TYPES) // 2
    return draw_events(
        rng, model, (changes, states[:, None]), names, groups, n_users, n_days, labels_per_day, new_regimes_at
    )


def _uniform_jumps(sojourn_days: tuple[float, ...]) -> Floats:
    """``(R, R)`` generator of a chain that leaves r at rate 1 / ``sojourn_days[r]`` for any other."""
    n = len(sojourn_days)
    leaving = 1 / np.array(sojourn_days)
    return leaving[:, None] * ((1 - np.eye(n)) / (n - 1) - np.eye(n))


def _right_or_other(n: int, right: float) -> Floats:
    """``(n, n)`` law of a sign of one of n things: itself with probability ``right``, any other equally likely."""
    return np.where(np.eye(n, dtype=bool), right, (1 - right) / (n - 1))


def _with_sparse(rates: Floats) -> Floats:
    """``(2 W, R)``: dense classes, then sparse ones."""
    return np.concatenate([rates, rates / SPARSE_DIVISOR])


def _check(
    n_users: int, n_days: float, events_per_day: float, labels_per_day: float, new_regimes_at: float | None
) -> None:
    if n_users < 10:
        raise ValueError(f"n_users must be at least 10, one for each fold, got {n_users}")
    for name, value in (("n_days", n_days), ("events_per_day", events_per_day), ("labels_per_day", labels_per_day)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be above 0, got {value}")
    if new_regimes_at is not None and not 0 < new_regimes_at < 1:
        raise ValueError(f"new_regimes_at must be in (0, 1), got {new_regimes_at}")
