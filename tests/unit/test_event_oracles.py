from dataclasses import replace

import numpy as np
import pytest
from scipy.linalg import expm

from datamodules.event_oracles import KNOWLEDGE, log_losses, oracle_losses, oracle_probabilities, posteriors
from datamodules.synthetic_event_set import MICROSECONDS_PER_DAY, START
from datamodules.synthetic_events import CRISIS, cohort, null, regime


def history(drawn, user, time):
    """Days and types of the own events before a time, one by one."""
    rows = [row for row in range(drawn.offsets[user], drawn.offsets[user + 1]) if drawn.times[row] < time]
    return [(drawn.times[row] - START) / MICROSECONDS_PER_DAY for row in rows], [int(drawn.types[row]) for row in rows]


def slow_filter(drawn, user, time, prior):
    model = drawn.model
    days, types = history(drawn, user, time)
    end = (time - START) / MICROSECONDS_PER_DAY
    joint = []
    for z in range(len(model.class_prior)):
        matrix = model.generator - np.diag(model.rates[z])
        alpha, last = prior[z] * model.initial, 0.0
        for day, k in zip(days, types, strict=True):
            alpha = (alpha @ expm(matrix * (day - last))) * model.rates[z] * model.type_probabilities[z, :, k]
            last = day
        joint.append(alpha @ expm(matrix * (end - last)))
    return np.array(joint) / np.sum(joint)


def path_likelihood(model, z, states, changes, days, types, end):
    """Likelihood of events given one path: states hold from changes on, the first from 0."""
    bounds = [*changes, np.inf]
    log = 0.0
    for place, state in enumerate(states):
        log -= model.rates[z, state] * max(0.0, min(end, bounds[place + 1]) - min(end, bounds[place]))
        for day, k in zip(days, types, strict=True):
            if bounds[place] <= day < bounds[place + 1]:
                log += np.log(model.rates[z, state] * model.type_probabilities[z, state, k])
    return np.exp(log)


@pytest.mark.parametrize("draw", [regime, null, cohort])
def test_filter_equals_matrix_exponentials_one_by_one(draw):
    drawn = draw(0, n_users=12, n_days=8)
    query = drawn.queries["local"]
    users, times = query["users"][::7], query["times"][::7]
    model = drawn.model
    n_types = len(model.class_prior) // 2
    for knows in ("own", "type"):
        result = posteriors(drawn, users, times, knows)
        for got, user, time in zip(result, users, times, strict=True):
            right = np.arange(2 * n_types) % n_types == drawn.user_types[user]
            prior = model.class_prior * (right if knows == "type" else 1)
            # some 30 products of 3 x 3 matrices in float64
            np.testing.assert_allclose(got, slow_filter(drawn, user, time, prior), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("draw", [regime, null, cohort])
def test_known_regime_equals_a_loop_over_the_path(draw):
    drawn = draw(1, n_users=12, n_days=8)
    query, model = drawn.queries["local"], drawn.model
    users, times = query["users"][::7], query["times"][::7]
    changes = ((drawn.change_times - START) / MICROSECONDS_PER_DAY).tolist()
    for got, user, time in zip(posteriors(drawn, users, times, "regime"), users, times, strict=True):
        end = (time - START) / MICROSECONDS_PER_DAY
        expected = np.zeros_like(got)
        for z, prior in enumerate(model.class_prior):
            states = drawn.regimes[:, model.chains[z]]
            now = states[np.searchsorted(changes, end, side="right") - 1]
            expected[z, now] = prior * path_likelihood(model, z, states, changes, *history(drawn, user, time), end)
        # sums of some 30 logarithms in float64
        np.testing.assert_allclose(got, expected / expected.sum(), rtol=1e-9, atol=1e-12)


def test_filter_equals_an_average_over_simulated_paths():
    """Paths drawn from the chain, each weighted by the likelihood of the events: no matrix, no recursion."""
    drawn = regime(4, n_users=12, n_days=3, events_per_day=3)
    model = drawn.model
    user = int(np.argmax(np.where(drawn.sparse, 0, np.diff(drawn.offsets))))
    time = START + 3 * MICROSECONDS_PER_DAY
    days, types = history(drawn, user, time)
    assert len(days) >= 5
    rng = np.random.default_rng(0)
    n_paths, classes = 3000, range(4)
    weights = np.zeros((n_paths, len(classes), 3))
    for path in range(n_paths):
        states, changes = [int(rng.choice(3, p=model.initial))], [0.0]
        while (day := changes[-1] + rng.exponential(1 / -model.generator[states[-1], states[-1]])) < 3:
            jumps = np.maximum(model.generator[states[-1]], 0)
            states.append(int(rng.choice(3, p=jumps / jumps.sum())))
            changes.append(day)
        for z in classes:
            weights[path, z, states[-1]] = path_likelihood(model, z, states, changes, days, types, 3.0)
    expected = weights.mean(0) / weights.mean(0).sum()
    # delta method: the ratio of two means of n weights
    deviations = weights - expected * weights.sum((1, 2), keepdims=True)
    error = deviations.std(0) / np.sqrt(n_paths) / weights.sum((1, 2)).mean()
    got = posteriors(drawn, np.array([user]), np.array([time]))[0, list(classes)]
    got = got / got.sum()
    assert error.max() < 0.03
    # 12 cells, 4.5 s.d.; cells that no path reached to their own order
    assert (np.abs(got - expected) < 4.5 * error + 1e-4).all()


def test_without_events_silence_speaks_for_sparse_users():
    drawn = regime(0, n_users=10, n_days=20)
    silent = replace(
        drawn, times=drawn.times[:0], types=drawn.types[:0], amounts=drawn.amounts[:0], offsets=drawn.offsets * 0
    )
    for knows in KNOWLEDGE:
        law = posteriors(silent, np.zeros(2, np.int64), START + np.array([0, 3 * MICROSECONDS_PER_DAY]), knows)
        share = law[:, 4:].sum((1, 2))
        assert share[0] == pytest.approx(0.5)
        # the odds are about exp(3 days x 4 events x 0.95 x speed)
        assert share[1] > 0.99
    # at the start nothing but the stationary law is known
    np.testing.assert_allclose(
        posteriors(silent, np.zeros(1, np.int64), np.array([START]))[0].sum(0), [0.4, 4 / 15, 1 / 3]
    )


def test_own_history_oracle_is_calibrated_over_many_regimes():
    """All users of one set share one path, so that the set is what is independent."""
    bins = np.array([0.3, 0.45, 0.6])
    gaps, uses = [], []
    for seed in range(150):
        drawn = regime(seed, n_users=20, n_days=12, labels_per_day=0.4)
        p = oracle_probabilities(drawn, "local")[:, 1]
        place, residual = np.searchsorted(bins, p), drawn.queries["local"]["labels"] - p
        gaps.append(np.bincount(place, residual, minlength=4))
        uses.append(np.bincount(place, minlength=4))
    gaps = np.array(gaps)
    assert (np.sum(uses, axis=0) > 300).all()
    # four bins, 4 s.d. of a sum over 150 independent sets
    assert (np.abs(gaps.sum(0)) < 4 * np.sqrt((gaps**2).sum(0))).all()


@pytest.mark.parametrize("knows", ["regime", "regime and type"])
def test_oracle_with_the_regime_is_calibrated(knows):
    drawn = regime(0, n_users=3000, n_days=15, events_per_day=2, labels_per_day=0.3)
    query = drawn.queries["local"]
    _, one_each = np.unique(query["users"], return_index=True)  # queries of one user share his type
    p = oracle_probabilities(drawn, "local", knows)[one_each, 1]
    labels = query["labels"][one_each]
    place = np.searchsorted([0.2, 0.5, 0.8], p)
    for bin_ in np.unique(place):
        rows = place == bin_
        # binomial, 4 s.d.
        assert abs((labels - p)[rows].sum()) < 4 * np.sqrt((p * (1 - p))[rows].sum())


def test_more_knowledge_means_less_loss_and_the_gap_is_large_for_sparse_users():
    for seed in range(5):
        losses = oracle_losses(regime(seed, n_users=500, n_days=60))
        assert losses["own"]["sparse"] - losses["regime"]["sparse"] > 0.05
        assert losses["own"]["sparse"] - losses["regime"]["sparse"] > losses["own"]["dense"] - losses["regime"]["dense"]
        assert losses["regime"]["sparse"] > losses["regime and type"]["sparse"]
    next_type = oracle_losses(regime(0, n_users=500, n_days=60), "next_type")
    assert next_type["own"]["sparse"] - next_type["regime"]["sparse"] > 0.05
    assert next_type["regime"]["dense"] > next_type["regime and type"]["dense"]
    whole = oracle_losses(regime(0, n_users=500, n_days=60), "global")
    # the logarithm of a sum that rounding leaves beside 1
    assert whole["type"]["sparse"] == pytest.approx(0, abs=1e-12)
    assert 0 < whole["own"]["sparse"] < np.log(2)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"new_regimes_at": 0.6}])
def test_the_preset_leaves_a_gap_to_close(options):
    for seed in range(5):
        losses = oracle_losses(regime(seed, **options))
        assert losses["own"]["sparse"] - losses["regime"]["sparse"] > 0.05


def test_in_null_the_regime_adds_nothing():
    drawn = null(0, n_users=100, n_days=20)
    for target in drawn.queries:
        own, known = (oracle_probabilities(drawn, target, knows) for knows in ("own", "regime"))
        # the same law by filter and by path; sums of some 100 logarithms
        np.testing.assert_allclose(own, known, rtol=1e-8, atol=1e-12)


def test_in_cohort_regimes_of_groups_close_the_gap():
    losses = oracle_losses(cohort(0, n_users=500, n_days=60))
    for kind in ("sparse", "dense"):
        assert losses["own"][kind] - losses["regime"][kind] > 0.05


def test_dense_users_reveal_the_regime():
    """Of twenty dense users the law of the regime, each from his own events, is multiplied."""
    drawn = regime(0, n_users=200, n_days=40)
    dense = np.flatnonzero(~drawn.sparse)[:20]
    times = START + (np.arange(4, 40, 0.5) * MICROSECONDS_PER_DAY).astype(np.int64)
    laws = posteriors(drawn, np.repeat(dense, len(times)), np.tile(times, len(dense))).sum(1)
    laws = laws.reshape(len(dense), len(times), 3)
    guess = (np.log(laws).sum(0) - (len(dense) - 1) * np.log(drawn.model.initial)).argmax(1)
    # they are late for about an hour after each change, and one in eight grid times is within a day of one
    assert (guess == drawn.regimes_at(times)[:, 0]).mean() > 0.85
    assert CRISIS in drawn.regimes


def test_log_losses():
    losses = log_losses(np.array([[0.25, 0.75], [0.5, 0.5]]), np.array([1, 0]))
    np.testing.assert_allclose(losses, [np.log(4 / 3), np.log(2)])


def test_unknown_names_are_refused():
    drawn = regime(0, n_users=10, n_days=2)
    with pytest.raises(ValueError, match=r"^knows must be one of 'own', .*, got 'all'$"):
        posteriors(drawn, np.zeros(1, np.int64), np.array([START]), "all")
    with pytest.raises(ValueError, match=r"^target must be one of next_type, local, global, got 'age'$"):
        oracle_probabilities(drawn, "age")
