import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.portfolio import metrics
from lightning_modules.portfolio.inference import sharpe_difference_interval, sharpe_interval, stationary_bootstrap
from lightning_modules.portfolio.ledoit_wolf import ledoit_wolf_test
from lightning_modules.portfolio.mean_variance import kkt_residual, largest_mean, onto_capped_simplex
from lightning_modules.portfolio.selection import MaxMean, Medoid, MinVolatility, RandomPick, TopSharpe
from lightning_modules.portfolio.weighting import (
    EqualWeight,
    HierarchicalRiskParity,
    InverseVolatility,
    MeanVariance,
    MinimumVariance,
    NestedClusters,
    PublishedMeanVariance,
    annual_moments,
)

pytest.importorskip("clarabel")

WEIGHTINGS = [
    EqualWeight(),
    InverseVolatility(),
    MinimumVariance(),
    MeanVariance(annual_target=0.1),
    PublishedMeanVariance(),
    HierarchicalRiskParity(),
    NestedClusters(inner=MinimumVariance(max_weight=1), outer=InverseVolatility()),
]
SELECTIONS = [TopSharpe(), MinVolatility(), MaxMean(), Medoid(), RandomPick()]
MANY = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def panel(seed, n_stocks, n_days=120):
    """Correlated stocks of different risk and mean, some of them twins but for noise."""
    random = np.random.default_rng(seed)
    factors = random.standard_normal((n_days, 2)) @ random.standard_normal((2, n_stocks))
    own = random.standard_normal((n_days, n_stocks)) * np.exp(random.standard_normal(n_stocks))
    returns = 0.004 * (factors + own) + 0.001 * random.standard_normal(n_stocks)
    return np.clip(returns, -0.5, 0.5), random


# From below the least mean to beyond the largest, and that itself; within 1e-6 of it, multipliers grow without bound.
shares = st.one_of(st.floats(-1, 0.9999), st.just(1.0), st.floats(1.01, 1.1))


@MANY
@given(seed=seeds, n_stocks=st.integers(2, 25), share=shares, cap=st.floats(0.05, 1))
def test_mean_variance_is_optimal_or_says_why_not(seed, n_stocks, share, cap):
    returns, _ = panel(seed, n_stocks)
    mean, covariance = annual_moments(returns)
    bound = max(cap, 1 / n_stocks)
    least, most = -largest_mean(-mean, bound), largest_mean(mean, bound)
    target = least + share * (most - least)
    found = MeanVariance(max_weight=cap, annual_target=target)(returns, np.zeros(n_stocks, dtype=np.int64))
    assert found.weights.min() >= 0
    assert found.weights.max() <= bound
    assert found.weights.sum() == pytest.approx(1, abs=1e-12)
    assert any(flag.startswith("max_weight") for flag in found.flags) == (cap * n_stocks < 1)
    assert any(flag.startswith("infeasible") for flag in found.flags) == (most < target)
    assert not any(flag.startswith("solver") for flag in found.flags)
    goal = target if most >= target else -np.inf
    # 1e-11 is what the active-set method stops at; close to a corner it is divided by the small multiplier of the mean
    assert kkt_residual(found.weights, covariance, mean, goal, bound) < 1e-8


@MANY
@given(seed=seeds, n_stocks=st.integers(1, 25), n_days=st.integers(2, 60))
@pytest.mark.parametrize("rule", WEIGHTINGS, ids=lambda rule: type(rule).__name__)
def test_weights_are_weights_and_repeat(rule, seed, n_stocks, n_days):
    returns, random = panel(seed, n_stocks, n_days)
    returns[:, random.random(n_stocks) < 0.1] = 0
    labels = random.integers(-1, 4, size=n_stocks)
    found = rule(returns, labels)
    assert found.weights.shape == (n_stocks,)
    assert found.weights.min() >= 0
    assert found.weights.sum() == pytest.approx(1, abs=1e-12)  # 25 roundings
    again = rule(returns.copy(), labels.copy())
    np.testing.assert_array_equal(again.weights, found.weights)
    assert again.flags == found.flags


@MANY
@given(seed=seeds, n_stocks=st.integers(2, 20))
@pytest.mark.parametrize("rule", WEIGHTINGS, ids=lambda rule: type(rule).__name__)
def test_weights_do_not_depend_on_the_order_of_stocks(rule, seed, n_stocks):
    returns, random = panel(seed, n_stocks)
    labels = random.integers(-1, 4, size=n_stocks)
    order = random.permutation(n_stocks)
    direct, shuffled = rule(returns, labels), rule(returns[:, order], labels[order])
    # SLSQP stops at an ftol of 1e-6, on a path of its own; the others are exact but for the conditioning of Sigma
    tolerance = 0.05 if isinstance(rule, PublishedMeanVariance) else 1e-7
    np.testing.assert_allclose(shuffled.weights, direct.weights[order], rtol=0, atol=tolerance)


@MANY
@given(seed=seeds, n_stocks=st.integers(2, 20), scale=st.floats(0.01, 0.9))
@pytest.mark.parametrize("rule", [InverseVolatility(), MinimumVariance(), HierarchicalRiskParity()])
def test_risk_rules_do_not_depend_on_the_unit_of_returns(rule, seed, n_stocks, scale):
    returns, _ = panel(seed, n_stocks)
    labels = np.zeros(n_stocks, dtype=np.int64)
    # as above
    np.testing.assert_allclose(rule(scale * returns, labels).weights, rule(returns, labels).weights, rtol=0, atol=1e-7)


@MANY
@given(
    weights=st.lists(st.floats(-10, 10), min_size=1, max_size=30),
    slack=st.floats(0, 1),
)
def test_projection_stays_within_its_bounds(weights, slack):
    cap = 1 / len(weights) + slack * (1 - 1 / len(weights))
    found = onto_capped_simplex(np.array(weights), cap)
    assert found.min() >= 0
    assert found.max() <= cap
    assert found.sum() == pytest.approx(1, abs=1e-12)


@MANY
@given(seed=seeds, n_stocks=st.integers(0, 30))
@pytest.mark.parametrize("rule", SELECTIONS, ids=lambda rule: type(rule).__name__)
def test_every_cluster_gives_two_or_what_it_has(rule, seed, n_stocks):
    returns, random = panel(seed, n_stocks)
    labels = random.integers(-1, 6, size=n_stocks)
    embedding = random.standard_normal((n_stocks, 3))
    picks = rule(labels, returns, embedding)
    assert (np.diff(picks) > 0).all()
    assert (labels[picks] >= 0).all()
    for cluster in range(6):
        assert (labels[picks] == cluster).sum() == min(2, (labels == cluster).sum())
    renamed = np.where(labels < 0, -1, np.array([3, 5, 0, 4, 1, 2, -1])[labels])
    np.testing.assert_array_equal(rule(renamed, returns, embedding), picks)


@MANY
@given(seed=seeds, n_stocks=st.integers(1, 20))
@pytest.mark.parametrize("rule", [TopSharpe(), MinVolatility(), MaxMean()], ids=lambda rule: type(rule).__name__)
def test_picks_do_not_depend_on_the_order_of_stocks(rule, seed, n_stocks):
    returns, random = panel(seed, n_stocks)
    labels = random.integers(0, 4, size=n_stocks)
    order = random.permutation(n_stocks)
    shuffled = rule(labels[order], returns[:, order], None)
    assert sorted(order[shuffled]) == rule(labels, returns, None).tolist()


daily = st.lists(st.floats(-0.9, 2), min_size=1, max_size=40)


@MANY
@given(returns=daily)
def test_metrics_are_finite_or_nan_and_within_their_range(returns):
    found = metrics.summary(returns, index_returns=returns[::-1])
    assert not any(np.isinf(value) for value in found.values())
    assert -1 <= found["max_drawdown"] <= 0
    assert 0 <= found["hit_rate"] <= 1
    assert 0 <= found["days_under_water"] <= len(returns)
    assert (
        found["conditional_value_at_risk"] >= found["value_at_risk"] - 1e-15
    )  # a mean of numbers at most the quantile
    assert metrics.published_drawdown(returns) >= 100 * found["max_drawdown"] - 1e-9  # percent of rounding
    assert metrics.published_recovery(returns) <= found["days_under_water"]
    if not np.isnan(found["volatility"]):
        assert metrics.published_risk(returns) >= found["volatility"] - 1e-12  # Bernoulli's inequality


@MANY
@given(returns=daily, split=st.integers(0, 40))
def test_drawdowns_do_not_see_later_days(returns, split):
    until = max(1, min(split, len(returns)))
    np.testing.assert_array_equal(metrics.drawdowns(returns[:until]), metrics.drawdowns(returns)[:until])


@MANY
@given(seed=seeds, n_stocks=st.integers(2, 40))
def test_share_of_variance_adds_up(seed, n_stocks):
    random = np.random.default_rng(seed)
    values, labels = random.random(n_stocks), random.integers(4, size=n_stocks)
    within = sum(((values[labels == c] - values[labels == c].mean()) ** 2).sum() for c in np.unique(labels))
    total = ((values - values.mean()) ** 2).sum()
    assert metrics.variance_explained(labels, values) == pytest.approx(1 - within / total, abs=1e-12)  # 40 roundings
    assert metrics.variance_explained(labels, 3 - 2 * values) == pytest.approx(1 - within / total, abs=1e-10)


@MANY
@given(n_days=st.integers(1, 30), n_resamples=st.integers(1, 9), mean_block=st.floats(1, 100), seed=seeds)
def test_drawn_days_are_days(n_days, n_resamples, mean_block, seed):
    days = np.concatenate(list(stationary_bootstrap(n_days, n_resamples, mean_block=mean_block, seed=seed)))
    assert days.shape == (n_resamples, n_days)
    assert days.min() >= 0
    assert days.max() < n_days


@MANY
@given(seed=seeds)
def test_differences_of_ratios_are_antisymmetric(seed):
    returns, _ = panel(seed, 2)
    ours, theirs = returns.T
    there = sharpe_difference_interval(ours, theirs, n_resamples=100)
    back = sharpe_difference_interval(theirs, ours, n_resamples=100)
    # sums in another order
    np.testing.assert_allclose(there, [-back.mean, -back.high, -back.low], rtol=1e-9, atol=1e-9)
    assert there.mean == pytest.approx(sharpe_interval(ours).mean - sharpe_interval(theirs).mean, abs=1e-12)
    found = ledoit_wolf_test(ours, theirs)
    assert 0 <= found.p_value <= 1
    assert found.p_value == pytest.approx(ledoit_wolf_test(theirs, ours).p_value, rel=1e-9)
