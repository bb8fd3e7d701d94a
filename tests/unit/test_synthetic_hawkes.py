import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize

from datamodules.synthetic_event_set import MICROSECONDS_PER_DAY, START
from datamodules.synthetic_hawkes import THETA_DAYS, hawkes_cross

VARIANTS = pytest.mark.parametrize("all_events", [False, True], ids=["most recent", "all events"])


def slow_features(drawn, user, time, theta, all_events):
    features = np.zeros(len(drawn.base_rates))
    for other in range(drawn.n_users):
        days = [
            (time - t) / MICROSECONDS_PER_DAY
            for t in drawn.times[drawn.offsets[other] : drawn.offsets[other + 1]]
            if t < time
        ]
        if other != user and days:
            features[drawn.groups[other]] += sum(np.exp(-day / theta) for day in (days if all_events else days[-1:]))
    return features


@VARIANTS
def test_features_and_rates_equal_plain_loops(all_events):
    drawn = hawkes_cross(0, n_events=300, n_users=7, all_events=all_events)
    query = drawn.queries["event"]
    features, rates = drawn.rate_features(0.03), drawn.rates()
    for row in range(0, len(query["users"]), 5):
        user, time = query["users"][row], query["times"][row]
        # float64; logarithms of up to t / theta = 1,000 cost three digits
        np.testing.assert_allclose(features[row], slow_features(drawn, user, time, 0.03, False), rtol=1e-10, atol=1e-14)
        group = drawn.groups[user]
        true = slow_features(drawn, user, time, drawn.theta_days, all_events)
        rate = drawn.base_rates[group] + true @ drawn.excitation[:, group]
        assert rates[row] == pytest.approx(rate, rel=1e-9)


@VARIANTS
def test_rescaled_waiting_times_are_exponential(all_events):
    """The integral of the rate of all users between events is exponential of mean 1, if the draw is exact."""
    drawn = hawkes_cross(1, n_events=4000, n_users=9, all_events=all_events)
    owners, theta = drawn.event_users, drawn.theta_days
    order = np.argsort(drawn.times, kind="stable")
    onto = np.array(
        [sum(drawn.excitation[drawn.groups[v], drawn.groups[u]] for u in range(9) if u != v) for v in range(9)]
    )
    levels, last, integrals = np.zeros(9), 0.0, []
    for row in order:
        day = (drawn.times[row] - START) / MICROSECONDS_PER_DAY
        decay = np.exp(-(day - last) / theta)
        integrals.append(drawn.base_rates[drawn.groups].sum() * (day - last) + theta * (1 - decay) * (levels @ onto))
        levels, last = levels * decay, day
        levels[owners[row]] = levels[owners[row]] + 1 if all_events else 1.0
    # the draw is fixed; a wrong kernel gives p-values below 1e-20
    assert stats.kstest(integrals, "expon").pvalue > 0.01
    # independent: a correlation of 4,000 pairs has s.d. 0.016
    assert abs(np.corrcoef(integrals[:-1], integrals[1:])[0, 1]) < 4 * 0.016


@VARIANTS
def test_events_fall_on_users_in_proportion_to_their_rates(all_events):
    drawn = hawkes_cross(2, n_events=4000, n_users=9, all_events=all_events)
    query = drawn.queries["event"]
    p = drawn.probabilities()[:, 1]
    place = np.searchsorted(np.quantile(p, [0.25, 0.5, 0.75, 0.95]), p)
    for part in range(5):
        for group in range(3):
            rows = (place == part) & (drawn.groups[query["users"]] == group)
            # sums of conditionally centred labels, 15 of them at 4.5 s.d.
            assert abs((query["labels"] - p)[rows].sum()) < 4.5 * np.sqrt((p * (1 - p))[rows].sum())


def fitted(drawn, target, theta, learned):
    """Most likely theta and its mean log-likelihood on the test fold: odds linear in the features, by BFGS."""
    query = drawn.queries[target]
    ages, onehot = drawn.ages(target), np.eye(len(drawn.base_rates))[drawn.groups]
    train, test = query["fold"] == 0, query["fold"] == 2

    def loss(parameters, rows):
        decay = np.exp(parameters[0]) if learned else theta
        odds = np.exp(parameters[1]) + np.exp(-ages[rows] / decay) @ onehot @ np.exp(parameters[2:])
        return np.mean(np.log1p(odds) - query["labels"][rows] * np.log(odds))

    start = np.concatenate([[np.log(theta)], np.zeros(1 + onehot.shape[1])])
    found = minimize(loss, start, args=(train,), method="L-BFGS-B").x
    return (np.exp(found[0]) if learned else theta), loss(found, test)


def test_linear_odds_recover_theta_started_off_by_three():
    theta, _ = fitted(hawkes_cross(0, n_events=20_000), "event_of_group_0", 3 * THETA_DAYS, learned=True)
    # over four seeds its s.d. was 0.06
    assert theta == pytest.approx(THETA_DAYS, rel=0.2)


def test_true_theta_beats_a_tenth_and_ten_times_of_it():
    drawn = hawkes_cross(0, n_events=6_000)
    losses = [fitted(drawn, "event_of_group_0", scale * THETA_DAYS, learned=False)[1] for scale in (0.1, 1, 10)]
    # with 60,000 events the losses are 0.674, 0.647 and 0.671
    assert losses[1] < min(losses[0], losses[2])


def test_excitation_goes_to_the_next_group():
    drawn = hawkes_cross(0, n_events=100, n_users=12, branching=0.6)
    sizes = np.array([4, 4, 4])
    offspring = drawn.excitation * drawn.theta_days * (sizes - np.eye(3))
    np.testing.assert_allclose(offspring.sum(1), 0.6)
    assert offspring.argmax(1).tolist() == [1, 2, 0]


def test_set_is_as_agreed():
    drawn = hawkes_cross(3, n_events=2000)
    again = hawkes_cross(3, n_events=2000)
    np.testing.assert_array_equal(drawn.times, again.times)
    assert (drawn.times != hawkes_cross(4, n_events=2000).times).any()
    batch = drawn.batch()
    assert len(batch["context_users"]) == drawn.n_users
    assert batch["split"] == "time"
    np.testing.assert_array_equal(drawn.types, drawn.groups[drawn.event_users])
    for query in drawn.queries.values():
        np.testing.assert_array_equal(query["fold"] == 0, query["times"] < drawn.train_stop)
        assert set(query["fold"]) == {0, 1, 2}
    everyone = drawn.queries["event"]
    # 2,000 events against a Poisson number of pings of that mean, s.d. 45
    assert abs((everyone["labels"] == 0).sum() - 2000) < 4.5 * 45
    assert sum(len(drawn.queries[f"event_of_group_{group}"]["users"]) for group in range(3)) == len(everyone["users"])


def test_preset_is_large_enough_and_ends_before_the_present():
    drawn = hawkes_cross(0)
    assert len(drawn.times) >= 50_000
    assert drawn.stop < np.datetime64("2024-01-01", "us").astype(np.int64)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("n_events", 0),
        ("n_groups", 0),
        ("n_users", 5),
        ("theta_days", 0),
        ("base_events_per_day", float("inf")),
        ("branching", 1),
    ],
)
def test_arguments_out_of_range_are_named(argument, value):
    with pytest.raises(ValueError, match=rf"^{argument} must be .*got {value}$"):
        hawkes_cross(0, **{argument: value})
