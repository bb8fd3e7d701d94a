"""Control representations against NumPy, SciPy and definitions written out for one stock."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist

from lightning_modules.portfolio.representations import (
    CorrelationMDS,
    FinancialFeatures,
    PrincipalComponents,
    RandomVectors,
    RawReturns,
    VolatilityOnly,
)

ROUNDING = 1e-10  # float64 through a decomposition of 30 x 60 numbers


@pytest.fixture
def returns():
    generator = np.random.default_rng(5)
    market = generator.standard_normal(60)
    return torch.from_numpy(0.01 * (generator.standard_normal((30, 60)) + market))


@pytest.fixture
def index():
    return torch.from_numpy(0.008 * np.random.default_rng(6).standard_normal(60))


def test_raw_returns_are_the_input(returns):
    assert torch.equal(RawReturns()(returns), returns)


def test_volatility_is_the_sample_deviation(returns):
    expected = returns.numpy().std(1, ddof=1)
    np.testing.assert_allclose(VolatilityOnly()(returns)[:, 0].numpy(), expected, rtol=1e-12)


def test_principal_components_keep_distances_between_stocks(returns):
    """All components are a rotation of the centred rows; fewer are the best approximation of that rank."""
    full = PrincipalComponents(n_components=100)(returns).numpy()
    np.testing.assert_allclose(pdist(full), pdist(returns.numpy()), atol=ROUNDING)
    variances = full.var(0)
    assert (np.diff(variances) <= ROUNDING).all()
    assert np.array_equal(PrincipalComponents(n_components=3)(returns).numpy(), full[:, :3])


def test_mds_of_all_components_gives_the_correlation_distance(returns):
    rows = CorrelationMDS(n_components=30)(returns).numpy()
    distance = np.sqrt(2 * (1 - np.corrcoef(returns.numpy())))
    np.testing.assert_allclose(pdist(rows), distance[np.triu_indices(30, 1)], atol=1e-7)  # roots of small numbers


def test_mds_takes_a_constant_series(returns):
    returns[3] = 0.01
    assert torch.isfinite(CorrelationMDS(n_components=5)(returns)).all()


@pytest.mark.parametrize("kind", [PrincipalComponents, CorrelationMDS])
def test_rows_move_with_stocks(kind, returns):
    order = torch.randperm(30)
    torch.testing.assert_close(kind(n_components=4)(returns[order]), kind(n_components=4)(returns)[order])


def test_random_vectors_know_nothing_of_returns_and_repeat(returns):
    one, other = RandomVectors(seed=1)(returns), RandomVectors(seed=1)(returns * 2)
    assert torch.equal(one, other)
    assert not torch.equal(one, RandomVectors(seed=2)(returns))


def test_financial_features_of_one_stock_written_out(returns, index):
    r, m = returns[4].numpy(), index.numpy()
    f = 1.03 ** (1 / 252) - 1
    beta = np.cov(r, m)[0, 1] / m.var(ddof=1)
    value = np.cumprod(np.concatenate([[1.0], 1 + r]))
    under = value / np.maximum.accumulate(value) - 1
    longest = run = 0
    for depth in under:
        run = run + 1 if depth < 0 else 0
        longest = max(longest, run)
    quantile = np.quantile(r, 0.05)
    expected = [
        r.mean(),
        r.std(ddof=1),
        np.median(r),
        (r > 0).mean(),
        under.min(),
        longest,
        beta,
        (r - f).mean() - beta * (m - f).mean(),
        (r.mean() - f) / r.std(ddof=1),
        quantile,
        r[r <= quantile].mean(),
        f + beta * (m.mean() - f),
        r.var(ddof=1) / r.mean(),
        (r - m).mean() / (r - m).std(ddof=1),
    ]
    found = FinancialFeatures(risk_free=0.03)(returns, index)[4].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_features_are_finite_where_ratios_are_not(index):
    assert torch.isfinite(FinancialFeatures()(torch.zeros(3, 60, dtype=torch.float64), index * 0)).all()


def test_features_without_an_index_are_refused(returns):
    with pytest.raises(ValueError, match="FinancialFeatures needs an index"):
        FinancialFeatures()(returns, None)


@pytest.mark.parametrize("kind", [PrincipalComponents, CorrelationMDS, RandomVectors])
def test_no_components_are_refused(kind):
    with pytest.raises(ValueError, match="n_components must be at least 1, got 0"):
        kind(n_components=0)
