import sys

import numpy as np
import polars as pl
import pytest
from scipy.optimize import minimize

from lightning_modules.portfolio import weighting
from lightning_modules.portfolio.mean_variance import (
    kkt_residual,
    largest_mean,
    minimise_variance,
    onto_capped_simplex,
)
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

ROUNDING = 1e-10  # float64 through an interior-point solver whose answer is made exact on the active set
RISK_RULES = [MinimumVariance(), MeanVariance(), InverseVolatility(), HierarchicalRiskParity()]


def series_with(covariance, n_days=64, seed=0):
    """Returns of mean 0 whose sample covariance is exactly the given one, up to rounding."""
    random = np.random.default_rng(seed)
    raw = random.standard_normal((n_days, len(covariance)))
    basis, _ = np.linalg.qr(raw - raw.mean(0))
    return basis * (n_days - 1) ** 0.5 @ np.linalg.cholesky(covariance).T


def market(n_stocks, n_days=252, seed=0, mean=0.0005):
    random = np.random.default_rng(seed)
    factor = 0.008 * random.standard_normal((n_days, 1))
    own = 0.012 * random.standard_normal((n_days, n_stocks)) * (0.5 + random.random(n_stocks))
    return mean * (1 + random.standard_normal(n_stocks)) + factor * (0.5 + random.random(n_stocks)) + own


def one_cluster(n_stocks):
    return np.zeros(n_stocks, dtype=np.int64)


def test_annual_moments_by_hand():
    mean, covariance = annual_moments(np.array([[0.5, 0.0], [-0.5, 0.5]]))
    # growth of two days 0.75 and 1.5; covariance of (0.5, -0.5) and (0, 0.5)
    np.testing.assert_allclose(mean, 252 * (np.array([0.75, 1.5]) ** 0.5 - 1), rtol=1e-14)
    np.testing.assert_allclose(covariance, 252 * np.array([[0.5, -0.25], [-0.25, 0.125]]), rtol=1e-14)


def test_minimum_variance_of_two_stocks_in_closed_form():
    first, second, between = 4e-4, 1e-4, 0.5e-4
    returns = series_with(np.array([[first, between], [between, second]]))
    expected = (second - between) / (first + second - 2 * between)
    found = MinimumVariance(max_weight=1)(returns, one_cluster(2))
    np.testing.assert_allclose(found.weights, [expected, 1 - expected], rtol=0, atol=ROUNDING)
    assert found.flags == ()
    # the optimum, 0.125 and 0.875, against a cap
    np.testing.assert_allclose(MinimumVariance(max_weight=0.6)(returns, one_cluster(2)).weights, [0.4, 0.6], atol=1e-12)


def test_mean_variance_of_two_stocks_on_its_target():
    returns = series_with(np.diag([4e-4, 1e-4])) + np.array([0.002, 0.0005])
    mean, _ = annual_moments(returns)
    target = mean @ [0.7, 0.3]  # minimum variance is (0.2, 0.8), of a smaller mean
    found = MeanVariance(max_weight=1, annual_target=target)(returns, one_cluster(2))
    np.testing.assert_allclose(found.weights, [0.7, 0.3], rtol=0, atol=ROUNDING)
    slack = MeanVariance(max_weight=1, annual_target=mean @ [0.1, 0.9])(returns, one_cluster(2))
    np.testing.assert_allclose(slack.weights, [0.2, 0.8], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [-1.0, 0.9])
def test_mean_variance_equals_another_solver(seed, share):
    returns = market(8, seed=seed)
    mean, covariance = annual_moments(returns)
    target = share * largest_mean(mean, 0.3)  # out of the way, and close to the most there is
    found = MeanVariance(annual_target=target)(returns, one_cluster(8))
    other = minimize(
        lambda w: w @ covariance @ w,
        np.full(8, 1 / 8),
        method="SLSQP",
        bounds=[(0, 0.3)] * 8,
        constraints=[
            {"type": "eq", "fun": lambda w: w.sum() - 1},
            {"type": "ineq", "fun": lambda w: mean @ w - target},
        ],
        options={"maxiter": 1000, "ftol": 1e-14},
    )
    assert other.status == 0
    assert found.flags == ()
    # SLSQP differentiates by differences of 1.5e-8, so knows weights to about 1e-5
    np.testing.assert_allclose(found.weights, other.x, rtol=0, atol=1e-4)
    assert found.weights @ covariance @ found.weights <= other.fun * (1 + 1e-9)
    assert mean @ found.weights >= target - ROUNDING


def test_target_out_of_reach_gives_minimum_variance_and_says_so():
    returns = market(10)
    reachable = largest_mean(annual_moments(returns)[0], 0.3)
    found = MeanVariance(annual_target=reachable + 0.01)(returns, one_cluster(10))
    (flag,) = found.flags
    assert flag.startswith("infeasible: a mean of at most")
    assert flag.endswith("minimum variance instead")
    np.testing.assert_array_equal(found.weights, MinimumVariance()(returns, one_cluster(10)).weights)
    assert MeanVariance(annual_target=reachable - 0.01)(returns, one_cluster(10)).flags == ()


def test_largest_mean_is_that_of_the_best_stocks_filled_up():
    mean = np.array([0.1, 0.4, -0.2, 0.3, 0.2])
    assert largest_mean(mean, 0.3) == pytest.approx(0.3 * (0.4 + 0.3 + 0.2) + 0.1 * 0.1, abs=1e-15)
    assert largest_mean(mean, 1.0) == 0.4
    assert largest_mean(mean, 0.2) == pytest.approx(mean.mean(), abs=1e-15)


def test_published_optimiser_falls_into_the_vertex_trap():
    returns = market(22, n_days=504, seed=5, mean=0.0)
    # mean returns of 10 to 31 % a year, all above the target of 0.01 % that is meant as a daily number
    returns = returns - returns.mean(0) + np.random.default_rng(1).permutation(np.linspace(0.10, 0.31, 22)) / 252
    mean, covariance = annual_moments(returns)
    assert mean.min() > 0.03**2
    found = PublishedMeanVariance()(returns, one_cluster(22))
    lowest = np.argsort(mean)[:4]
    np.testing.assert_allclose(found.weights[lowest], [0.3, 0.3, 0.3, 0.1], rtol=0, atol=1e-6)  # SLSQP's own accuracy
    assert found.flags == ()  # which is the fault
    assert abs(mean @ found.weights - PublishedMeanVariance().target) > 0.05
    honest = MeanVariance()(returns, one_cluster(22))
    assert honest.flags == ()
    assert kkt_residual(honest.weights, covariance, mean, 0.03, 0.3) < ROUNDING


def test_published_optimiser_meets_a_feasible_target_by_equality():
    returns = market(12, seed=2, mean=0.0)
    mean, covariance = annual_moments(returns)
    target = float(np.mean(mean))
    found = PublishedMeanVariance(target=target)(returns, one_cluster(12))
    # both are stopped by SLSQP's default ftol of 1e-6 on a variance of about 0.01
    assert mean @ found.weights == pytest.approx(target, abs=1e-5)
    honest, _ = minimise_variance(covariance, mean, -np.inf, 0.3)
    assert found.weights @ covariance @ found.weights >= honest @ covariance @ honest


def test_hierarchical_risk_parity_by_hand():
    covariance = np.zeros((4, 4))
    covariance[:2, :2] = [[1, 1], [1, 4]]  # correlation 1/2 within both pairs, 0 between them
    covariance[2:, 2:] = [[9, 6], [6, 16]]
    returns = 1e-2 * series_with(covariance)
    # Inverse-variance pairs: (0.8, 0.2) of variance 1.12 and (0.64, 0.36) of variance 8.5248.
    first = 8.5248 / (1.12 + 8.5248)
    expected = np.array([first * 0.8, first * 0.2, (1 - first) * 0.64, (1 - first) * 0.36])
    found = HierarchicalRiskParity()(returns, one_cluster(4))
    np.testing.assert_allclose(found.weights, expected, rtol=0, atol=1e-12)  # float64 through one QR and one Cholesky
    order = [2, 0, 3, 1]
    shuffled = HierarchicalRiskParity()(returns[:, order], one_cluster(4))
    np.testing.assert_allclose(shuffled.weights, expected[order], rtol=0, atol=1e-12)


def test_hierarchical_risk_parity_of_independent_stocks_is_inverse_variance():
    variance = np.array([1.0, 2.0, 5.0, 3.0])
    returns = 1e-2 * series_with(np.diag(variance))
    # without correlation every half weighs 1 / sum(1 / variance), however the list is cut
    np.testing.assert_allclose(
        HierarchicalRiskParity()(returns, one_cluster(4)).weights, (1 / variance) / (1 / variance).sum(), atol=1e-12
    )


def test_inverse_volatility_and_equal_weight_by_hand():
    returns = 1e-2 * series_with(np.diag([1.0, 4.0, 16.0]))
    np.testing.assert_allclose(
        InverseVolatility()(returns, one_cluster(3)).weights, np.array([4, 2, 1]) / 7, atol=1e-14
    )
    np.testing.assert_array_equal(EqualWeight()(returns, one_cluster(3)).weights, [1 / 3] * 3)


def test_nested_clusters_are_products_of_inner_and_outer_weights():
    returns = 1e-2 * series_with(np.diag([1.0, 4.0, 9.0]))
    nested = NestedClusters(inner=InverseVolatility(), outer=EqualWeight())
    np.testing.assert_allclose(nested(returns, np.array([4, 4, 2])).weights, [1 / 3, 1 / 6, 1 / 2], atol=1e-14)
    # variances 1, 4, 9: the pair weighs (2/3, 1/3) and has variance 8/9, against 9
    nested = NestedClusters(inner=InverseVolatility(), outer=MinimumVariance(max_weight=1))
    pair = 9 / (9 + 8 / 9)
    np.testing.assert_allclose(
        nested(returns, np.array([0, 0, -1])).weights, [pair * 2 / 3, pair / 3, 1 - pair], atol=ROUNDING
    )


@pytest.mark.parametrize("rule", [MinimumVariance(max_weight=1), HierarchicalRiskParity(), InverseVolatility()])
def test_nested_clusters_reduce_to_the_inner_or_the_outer_rule(rule):
    returns = market(7)
    alone = rule(returns, one_cluster(7)).weights
    one = NestedClusters(inner=rule, outer=EqualWeight())(returns, one_cluster(7))
    np.testing.assert_allclose(one.weights, alone, rtol=0, atol=1e-15)
    each = NestedClusters(inner=rule, outer=rule)(returns, np.full(7, -1))
    np.testing.assert_allclose(each.weights, alone, rtol=0, atol=1e-15)
    assert (NestedClusters(inner=rule, outer=rule)(returns, np.arange(7)).weights == each.weights).all()


def test_nested_clusters_name_the_cluster_of_a_flag():
    returns = market(4)
    found = NestedClusters(inner=MinimumVariance(), outer=EqualWeight())(returns, np.array([0, 0, 5, -1]))
    assert [flag.split(": ")[0] for flag in found.flags] == [f"inside cluster {name}" for name in (0, 5, 6)]
    np.testing.assert_allclose(found.weights, [1 / 6, 1 / 6, 1 / 3, 1 / 3], atol=1e-15)


@pytest.mark.parametrize("rule", RISK_RULES, ids=lambda rule: type(rule).__name__)
def test_stocks_that_do_not_trade_get_nothing(rule):
    returns = market(8)
    padded = np.insert(returns, [0, 5], [0.0, 0.1], axis=1)
    found = rule(padded, one_cluster(10))
    assert found.weights[[0, 6]].tolist() == [0, 0]
    # the same numbers, summed in the order of another layout in memory
    np.testing.assert_allclose(np.delete(found.weights, [0, 6]), rule(returns, one_cluster(8)).weights, atol=ROUNDING)
    assert found.flags == ("constant: 2 of 10 series get weight 0",)
    none = rule(np.full((5, 4), 0.1), one_cluster(4))
    assert none.weights.tolist() == [0.25] * 4
    assert none.flags == ("constant: all 4 series, equal weight instead",)


@pytest.mark.parametrize("n_stocks", [1, 2, 3])
@pytest.mark.parametrize("rule", [MinimumVariance(), MeanVariance(), PublishedMeanVariance()])
def test_cap_gives_way_to_few_stocks(rule, n_stocks):
    found = rule(market(n_stocks), one_cluster(n_stocks))
    assert any(flag.startswith(f"max_weight: raised from 0.3 to 1/{n_stocks}") for flag in found.flags)
    np.testing.assert_allclose(found.weights, np.full(n_stocks, 1 / n_stocks), atol=1e-15)


@pytest.mark.parametrize("rule", [*RISK_RULES, PublishedMeanVariance()], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("n_days", [2, 6])
def test_more_stocks_than_days_and_twins_are_no_obstacle(rule, n_days):
    returns = market(15, n_days=n_days)
    returns = np.concatenate([returns, returns[:, :3]], axis=1)
    found = rule(returns, one_cluster(18))
    assert found.weights.min() >= 0
    assert found.weights.sum() == pytest.approx(1, abs=1e-12)
    if type(rule) is MinimumVariance:
        mean, covariance = annual_moments(returns)
        # a covariance of rank n - 1: the solution is not unique, and not improved beyond the solver's own 1e-8
        assert kkt_residual(found.weights, covariance, mean, -np.inf, 0.3) < 1e-6


def test_weights_of_real_stocks_are_optimal(real_data):
    prices = pl.read_parquet(real_data / "sp500-2015-2020" / "adj_close.parquet", n_rows=505)
    table = prices.select(pl.exclude(pl.Datetime)).cast(pl.Float64).to_numpy()
    table = table[:, np.isfinite(table).all(0)]
    returns = table[1:] / table[:-1] - 1
    mean, covariance = annual_moments(returns)
    assert returns.shape[1] > 400  # of rank 503 at most
    reachable = largest_mean(mean, 0.3)
    for target in (0.03, 0.5 * reachable):
        found = MeanVariance(annual_target=target)(returns, one_cluster(len(mean)))
        assert found.flags == ()
        assert kkt_residual(found.weights, covariance, mean, target, 0.3) < 1e-9  # the active-set method stops at 1e-11


def test_status_of_the_solver_is_looked_at(monkeypatch):
    monkeypatch.setattr(weighting, "minimise_variance", lambda *_: (None, "MaxIterations"))
    found = MeanVariance()(market(5), one_cluster(5))
    assert found.weights.tolist() == [0.2] * 5
    assert found.flags == ("solver: MaxIterations, equal weight instead",)


def test_solver_is_asked_for_by_name_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "clarabel", None)
    with pytest.raises(ImportError, match=r"need the solver Clarabel: pip install 'seqlit\[tda\]'"):
        MinimumVariance()(market(5), one_cluster(5))


def test_unreachable_target_is_not_called_solved():
    covariance, mean = np.eye(4), np.full(4, 0.1)
    weights, status = minimise_variance(covariance, mean, 0.2, 0.5)
    assert weights is None
    assert "Infeasible" in status


def test_equal_means_at_the_target_leave_the_variance_to_choose():
    weights, status = minimise_variance(np.diag([1.0, 3.0, 4.0]), np.full(3, 0.1), 0.1, 1.0)
    assert status == "Solved"
    np.testing.assert_allclose(
        weights, np.array([12, 4, 3]) / 19, atol=1e-6
    )  # the interior-point method's own accuracy


def test_projection_keeps_bounds_and_makes_the_sum_one():
    np.testing.assert_allclose(onto_capped_simplex(np.array([0.5, 0.5, -0.1]), 0.5), [0.5, 0.5, 0], atol=0)
    # lacking 0.3 of (0.5, 0.2, 0), in proportion to room of 0, 0.3 and 0.5
    found = onto_capped_simplex(np.array([0.9, 0.2, 0.0]), 0.5)
    np.testing.assert_allclose(found, [0.5, 0.2 + 0.3 * 3 / 8, 0.3 * 5 / 8], atol=1e-15)
    np.testing.assert_allclose(onto_capped_simplex(np.array([1.0, 1.0]), 1.0), [0.5, 0.5], atol=0)
    for n_stocks in range(1, 60):  # no room at all, and sums that are 1 but for rounding
        full = np.full(n_stocks, 1 / n_stocks)
        np.testing.assert_allclose(onto_capped_simplex(full, 1 / n_stocks), full, rtol=0, atol=1e-15)


def test_kkt_residual_by_hand():
    identity, nothing = np.eye(2), np.zeros(2)
    assert kkt_residual(np.array([0.5, 0.5]), identity, nothing, -np.inf, 1.0) < 1e-12  # accuracy of HiGHS on 3 numbers
    # gradient (0.6, 0.4): no lambda is closer than 0.1 to both
    assert kkt_residual(np.array([0.6, 0.4]), identity, nothing, -np.inf, 1.0) == pytest.approx(0.1, abs=1e-9)
    # on the cap of 0.6 the first may have the larger gradient no more than the second: it must be smaller to be optimal
    assert kkt_residual(np.array([0.6, 0.4]), np.diag([0.5, 1.5]), nothing, -np.inf, 0.6) < 1e-9
    assert kkt_residual(np.array([0.6, 0.4]), np.diag([1.5, 0.5]), nothing, -np.inf, 0.6) == pytest.approx(0.35)
    # a mean constraint that binds explains the difference, one that is slack does not
    mean = np.array([1.0, 0.0])
    assert kkt_residual(np.array([0.6, 0.4]), identity, mean, 0.6, 1.0) < 1e-9
    assert kkt_residual(np.array([0.6, 0.4]), identity, mean, 0.5, 1.0) == pytest.approx(0.1, abs=1e-9)
    # not feasible: sum, sign, cap, target
    assert kkt_residual(np.array([0.5, 0.3]), identity, nothing, -np.inf, 1.0) >= 0.2 - 1e-12
    assert kkt_residual(np.array([1.25, -0.25]), identity, nothing, -np.inf, 2.0) >= 0.25
    assert kkt_residual(np.array([0.5, 0.5]), identity, nothing, -np.inf, 0.4) >= 0.1 - 1e-12
    assert kkt_residual(np.array([0.5, 0.5]), identity, mean, 0.9, 1.0) >= 0.4 - 1e-12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MinimumVariance(max_weight=0.0), "max_weight must be above 0 and at most 1, got 0"),
        (lambda: MeanVariance(max_weight=1.5), r"max_weight .* got 1\.5"),
        (lambda: PublishedMeanVariance(max_weight=-1), "max_weight .* got -1"),
        (lambda: PublishedMeanVariance(n_iterations=0), "n_iterations must be at least 1, got 0"),
        (lambda: EqualWeight()(np.zeros((1, 3)), np.zeros(3)), r"at least 2 days .* got \(1, 3\)"),
        (lambda: InverseVolatility()(np.zeros((5, 0)), np.zeros(0)), r"1 stock.* got \(5, 0\)"),
        (lambda: MeanVariance()(np.zeros((5, 3)), np.zeros(2)), r"got \(5, 3\) and \(2,\)"),
        (lambda: MeanVariance()(np.array([[0.0, 0.1], [np.nan, 0]]), np.zeros(2)), "got nan on day 1 of stock 0"),
        (lambda: EqualWeight()(np.array([[0.0, -1.5], [0, 0]]), np.zeros(2)), r"at least -1, got -1\.5 on day 0"),
    ],
)
def test_bad_input_ends_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
