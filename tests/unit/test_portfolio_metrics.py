import numpy as np
import pytest
import torch
from scipy.stats import norm
from torchmetrics.functional.clustering import (
    adjusted_rand_score,
    calinski_harabasz_score,
    davies_bouldin_score,
    homogeneity_score,
)

from lightning_modules.portfolio import metrics
from lightning_modules.portfolio.metrics import Alpha, capm_alpha, clustering_scores, summary

# Values 1.25, 0.625, 1.25, 0.9375: powers of two, so that a return to the peak is one exactly.
RETURNS = np.array([0.25, -0.5, 1.0, -0.25])
INDEX = np.array([0.25, -0.25, 0.5, 0.0])
STD = (1.3125 / 3) ** 0.5  # mean 0.125, squared deviations 1/64, 25/64, 49/64, 9/64
YEAR = 252**0.5
RATE = 1.03 ** (1 / 252) - 1
CLOSE = {"rel": 1e-13}  # float64 through some tens of operations


def test_rounding_of_constant_prices_is_no_spread():
    """Returns of prices that do not move, as a portfolio of shares computes them: 0 but for the last bits of 1."""
    rounded = np.array([0.0, 2.220446049250313e-16, -1.1102230246251565e-16] * 20)
    for metric in (metrics.sharpe, metrics.calmar, lambda r: metrics.sortino(r, risk_free=0)):
        assert np.isnan(metric(rounded))
    assert metrics.volatility(rounded) == 0
    assert np.isnan(metrics.beta(np.resize(RETURNS, 60), rounded))
    assert np.isnan(capm_alpha(np.resize(RETURNS, 60), rounded).alpha)
    assert metrics.sharpe(1e-6 * RETURNS, risk_free=0) == pytest.approx(0.125 / STD * YEAR), "a small spread is one"


def test_risk_free_rate_is_that_of_the_paper():
    assert pytest.approx(1.17304e-4, abs=5e-10) == RATE  # printed to six digits


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (metrics.annual_return(RETURNS), 0.9375**63 - 1),
        (metrics.published_return(RETURNS), 1.125**252 - 1),
        (metrics.volatility(RETURNS), STD * YEAR),
        (metrics.published_risk(RETURNS), (1 + STD) ** YEAR - 1),
        (metrics.sharpe(RETURNS), (0.125 - RATE) / STD * YEAR),
        (metrics.sharpe(RETURNS, risk_free=0), 0.125 / STD * YEAR),
        (metrics.published_sharpe(RETURNS), (0.125 - RATE) / STD),
        (metrics.beta(RETURNS, INDEX), 0.625 / 0.3125),
        (metrics.published_beta(RETURNS, INDEX), 0.625 / 1.3125),
        (metrics.published_alpha(RETURNS, INDEX), (0.125 - RATE) * (1 - 0.625 / 1.3125)),
        (metrics.value_at_risk(RETURNS), 0.5 - 0.15 * 0.25),  # 15 % of the way from the lowest to the next
        (metrics.value_at_risk(RETURNS, level=0.75), 0.25 + 0.25 * 0.25),
        (metrics.value_at_risk(RETURNS, parametric=True), 1.6448536269514722 * STD - 0.125),
        (metrics.published_value_at_risk(RETURNS), -1.65 * STD),
        (metrics.conditional_value_at_risk(RETURNS), 0.5),
        (metrics.conditional_value_at_risk(RETURNS, level=0.5), 0.375),
        (metrics.max_drawdown(RETURNS), -0.5),
        (metrics.published_drawdown(RETURNS), -50.0),
        (metrics.time_under_water(RETURNS), 1),
        (metrics.published_recovery(RETURNS), 1),
        (metrics.sortino(RETURNS, risk_free=0), 0.125 / ((0.5**2 + 0.25**2) / 4) ** 0.5 * YEAR),
        (metrics.sortino(RETURNS), (0.125 - RATE) / (((0.5 + RATE) ** 2 + (0.25 + RATE) ** 2) / 4) ** 0.5 * YEAR),
        (metrics.calmar(RETURNS), (0.9375**63 - 1) / 0.5),
        (metrics.hit_rate(RETURNS), 0.5),
        (metrics.turnover_per_year([1.0, 0.5, 0.25], 126), 1.5),
        (metrics.cost_drag(RETURNS, [0.25, -0.5, 1.0, -0.5]), 0.9375**63 - 0.625**63),
        (metrics.effective_number([0.3, 0.3, 0.3, 0.1]), 1 / 0.28),
    ],
)
def test_every_row_by_hand(found, expected):
    assert found == pytest.approx(expected, **CLOSE)


def test_a_loss_on_the_first_day_is_seen_but_by_the_published_formula():
    falling = [-0.5, 0.5, 1.0, 0.0]  # values 0.5, 0.75, 1.5, 1.5
    assert metrics.drawdowns(falling).tolist() == [-0.5, -0.25, 0, 0]
    assert metrics.max_drawdown(falling) == -0.5
    assert metrics.time_under_water(falling) == 2
    assert metrics.published_drawdown(falling) == 0
    assert metrics.published_recovery(falling) == 0


def test_longest_time_under_water_is_the_longest_run_not_the_deepest():
    # values 0.5, 1, 0.75, 0.75, 0.9375, 1.875, 0.9375
    assert metrics.time_under_water([-0.5, 1.0, -0.25, 0.0, 0.25, 1.0, -0.5]) == 3
    assert metrics.time_under_water([0.5, 0.0, 0.25]) == 0
    assert metrics.time_under_water([-0.5, 0.0, 0.25]) == 3


def test_alpha_by_hand():
    # Residuals -1/8, 1/8, 1/8, -1/8, shares in a of 0.2, 0.4, 0.1, 0.3; floor(4 (4/100)^(2/9)) = 1 lag of weight 1/2.
    variance = 0.0046875 - 0.00109375
    assert capm_alpha(RETURNS, INDEX, risk_free=0) == pytest.approx(
        Alpha(-0.125 * 252, 2.0, -0.125 / variance**0.5, 1), **CLOSE
    )
    assert capm_alpha(RETURNS, INDEX, risk_free=0, n_lags=0).t_value == pytest.approx(-0.125 / 0.0046875**0.5, **CLOSE)


def test_alpha_equals_the_sandwich_written_out():
    random = np.random.default_rng(0)
    index = 0.01 * random.standard_normal(300)
    returns = 0.0004 + 1.3 * index + 0.005 * random.standard_normal(300)
    returns[1:] += 0.3 * returns[:-1]
    design = np.column_stack([np.ones(300), index - RATE])
    coefficients = np.linalg.solve(design.T @ design, design.T @ (returns - RATE))
    scores = design * (returns - RATE - design @ coefficients)[:, None]
    middle = np.zeros((2, 2))
    for i in range(300):
        for j in range(max(0, i - 5), min(300, i + 6)):
            middle += (1 - abs(i - j) / 6) * np.outer(scores[i], scores[j])
    bread = np.linalg.inv(design.T @ design)
    t_value = coefficients[0] / (bread @ middle @ bread)[0, 0] ** 0.5
    found = capm_alpha(returns, index)
    assert found.n_lags == 5  # 4 * 3^(2/9) = 5.1
    # float64 through normal equations of condition about 1e4
    assert found == pytest.approx((252 * coefficients[0], coefficients[1], t_value, 5), rel=1e-9)


def test_summary_holds_every_correct_metric():
    alone = summary(RETURNS)
    assert alone["sharpe"] == metrics.sharpe(RETURNS)
    assert alone["days_under_water"] == 1
    assert alone["n_days"] == 4
    both = summary(RETURNS, risk_free=0.01, index_returns=INDEX)
    assert set(both) - set(alone) == {"beta", "alpha", "alpha_t_value"}
    fit = capm_alpha(RETURNS, INDEX, risk_free=0.01)
    assert (both["alpha"], both["beta"], both["alpha_t_value"]) == fit[:3]
    assert both["sharpe"] == metrics.sharpe(RETURNS, risk_free=0.01)
    assert all(type(value) is float for value in both.values())


def test_what_is_not_defined_is_nan():
    flat, day = np.full(7, 0.1), [0.01]
    undefined = {
        "volatility",
        "sharpe",
        "sortino",
        "calmar",
        "parametric_value_at_risk",
        "alpha",
        "alpha_t_value",
        "beta",
    }
    one = summary(day, index_returns=day)
    assert {name for name, value in one.items() if np.isnan(value)} == undefined
    constant = summary(flat, index_returns=flat)
    assert {name for name, value in constant.items() if np.isnan(value)} == undefined - {
        "volatility",
        "parametric_value_at_risk",
    }
    assert constant["volatility"] == 0
    assert np.isnan(metrics.published_sharpe(flat))
    assert np.isnan(metrics.published_beta(flat, RETURNS[[0, 1, 2, 3, 0, 1, 2]]))
    assert np.isnan(metrics.effective_number([0.0, 0.0]))
    exact = capm_alpha(2 * INDEX, INDEX, risk_free=0)
    assert exact.beta == pytest.approx(2)
    assert np.isnan(exact.t_value)


def test_losing_everything_is_a_number():
    lost = summary([0.1, -1.0, 0.0], index_returns=[0.1, -0.1, 0.0])
    assert lost["annual_return"] == lost["max_drawdown"] == -1
    assert all(np.isfinite(value) for value in lost.values())


def test_effective_number_of_many_portfolios():
    found = metrics.effective_number([[0.5, 0.5, 0], [1, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(found, [2, 1, np.nan])


@pytest.fixture
def clusters():
    pytest.importorskip("sklearn")
    random = np.random.default_rng(1)
    labels = random.integers(4, size=60)
    return random.standard_normal((60, 5)) + labels[:, None], labels, random.integers(3, size=60)


def test_clustering_scores_equal_torchmetrics(clusters):
    embedding, labels, sectors = clusters
    found = clustering_scores(embedding, labels, sectors)
    rows, names, others = torch.from_numpy(embedding), torch.from_numpy(labels), torch.from_numpy(sectors)
    # torchmetrics computes in float32
    assert found["davies_bouldin"] == pytest.approx(float(davies_bouldin_score(rows, names)), rel=1e-5)
    assert found["calinski_harabasz"] == pytest.approx(float(calinski_harabasz_score(rows, names)), rel=1e-5)
    with torch.sparse.check_sparse_tensor_invariants(False):  # or torch warns that nobody has said yes or no
        assert found["homogeneity"] == pytest.approx(float(homogeneity_score(names, others)), rel=1e-4)
        rand = float(adjusted_rand_score(names, others))
    assert metrics.adjusted_rand(labels, sectors) == pytest.approx(rand, abs=1e-6)


def test_silhouette_equals_its_definition(clusters):
    embedding, labels, _ = clusters
    distance = np.linalg.norm(embedding[:, None] - embedding, axis=2)
    widths = []
    for stock in range(60):
        to = {c: distance[stock, (labels == c) & (np.arange(60) != stock)].mean() for c in range(4)}
        own, nearest = to.pop(labels[stock]), min(to.values())
        widths.append((nearest - own) / max(own, nearest))
    assert clustering_scores(embedding, labels)["silhouette"] == pytest.approx(np.mean(widths), rel=1e-12)


def test_scores_of_clusters_that_say_nothing_are_nan(clusters):
    embedding, labels, sectors = clusters
    for names in (np.zeros(60, dtype=np.int64), np.arange(60), np.full(60, -1)):
        scores = clustering_scores(embedding, names)
        assert list(scores) == ["silhouette", "davies_bouldin", "calinski_harabasz"]
        assert all(np.isnan(score) for score in scores.values())
    points = np.repeat(embedding[:4], 15, axis=0)
    assert all(np.isnan(score) for score in clustering_scores(points, np.repeat(np.arange(4), 15)).values())
    assert np.isnan(clustering_scores(embedding, labels, np.full(60, -1))["homogeneity"])
    assert clustering_scores(embedding, sectors, sectors)["homogeneity"] == 1.0


def test_stocks_without_cluster_or_sector_do_not_count(clusters):
    embedding, labels, sectors = clusters
    padded = np.concatenate([embedding, np.full((3, 5), 9.0)])
    assert clustering_scores(padded, np.append(labels, [-1, -1, -1]), np.append(sectors, [0, 1, -1])) == (
        clustering_scores(embedding, labels, sectors)
    )


def test_variance_explained_by_hand():
    # means 1.5 and 4 around 2.5: between 3 * 1 + 2 * 2.25, in all 2.25 + 0.25 + 0.25 + 2.25 + 2.25 around 2.5
    labels, values = np.array([0, 0, 0, 7, 7, -1]), np.array([1.0, 1.5, 2.0, 3.0, 5.0, 99.0])
    assert metrics.variance_explained(labels, values) == pytest.approx(7.5 / (2.25 + 1 + 0.25 + 0.25 + 6.25), **CLOSE)
    assert metrics.variance_explained(np.arange(6), values) == pytest.approx(1, **CLOSE)
    assert metrics.variance_explained(np.zeros(6, dtype=np.int64), values) == pytest.approx(0, abs=1e-15)
    assert np.isnan(metrics.variance_explained(labels, np.full(6, 0.1)))
    assert np.isnan(metrics.variance_explained(np.full(6, -1), values))


def test_adjusted_rand_does_not_read_names():
    pytest.importorskip("sklearn")
    labels = np.array([0, 0, 1, 1, 2])
    assert metrics.adjusted_rand(labels, np.array([5, 5, 0, 0, -1])) == 1


def test_parametric_and_historical_value_at_risk_agree_on_a_normal_sample():
    sample = 0.01 * norm.ppf((np.arange(4000) + 0.5) / 4000)
    # quantiles of the law itself: only the mesh of 4000 points and the n - 1 divisor differ
    assert metrics.value_at_risk(sample) == pytest.approx(metrics.value_at_risk(sample, parametric=True), rel=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.sharpe([]), r"at least 1 day, got shape \(0,\)"),
        (lambda: metrics.sharpe([[0.1]]), r"got shape \(1, 1\)"),
        (lambda: metrics.max_drawdown([0.1, np.nan]), "got nan on day 1"),
        (lambda: metrics.annual_return([0.1, -1.5]), r"at least -1, got -1\.5 on day 1"),
        (lambda: metrics.beta([0.1, 0.2], [0.1]), "same days, got 2 and 1"),
        (lambda: metrics.value_at_risk([0.1], level=1.0), r"level .* got 1\.0"),
        (lambda: metrics.conditional_value_at_risk([0.1], level=0.0), r"level .* got 0\.0"),
        (lambda: capm_alpha([0.1, 0.2], [0.1, 0.2], n_lags=2), "n_lags must be from 0 to 1, got 2"),
        (lambda: metrics.turnover_per_year([1.0], 0), "n_days must be at least 1, got 0"),
        (lambda: clustering_scores(np.zeros((3, 2)), np.zeros(2)), r"got \(3, 2\), \(2,\)"),
        (lambda: clustering_scores(np.full((2, 2), np.inf), np.zeros(2)), "finite embedding"),
        (lambda: clustering_scores(np.zeros((2, 2)), np.zeros(2), np.zeros(3)), r"each of 2 stocks, got shape \(3,\)"),
        (lambda: metrics.adjusted_rand(np.zeros(2), np.zeros(3)), r"got \(2,\) and \(3,\)"),
        (lambda: metrics.variance_explained(np.zeros(2), [1.0]), r"each of 2 stocks, got shape \(1,\)"),
    ],
)
def test_bad_input_ends_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
