import numpy as np
import pytest
from scipy.optimize import minimize

from lightning_modules.topology import scale_returns
from lightning_modules.topology.scaling import garch_volatility


def garch_series(seed, alpha, beta, n_days=2000):
    random = np.random.default_rng(seed)
    h, values = 1.0, []
    for _ in range(n_days):
        values.append(np.sqrt(h) * random.standard_normal())
        h = 1 - alpha - beta + alpha * values[-1] ** 2 + beta * h
    return 0.01 * np.array(values)


def test_values_are_those_of_the_table():
    returns = 0.02 * np.random.default_rng(0).standard_t(3, (4, 101)) + 0.001
    none, zscore, mad = (scale_returns(returns, scale).values for scale in ("none", "zscore", "mad"))
    np.testing.assert_array_equal(none, returns)
    for row, scaled, robust in zip(returns, zscore, mad, strict=True):
        # a few roundings of float64
        np.testing.assert_allclose(scaled, (row - row.mean()) / row.std(), rtol=0, atol=1e-13)
        deviation = sorted(abs(row - sorted(row)[50]))[50]
        np.testing.assert_allclose(robust, (row - sorted(row)[50]) / (1.4826 * deviation), rtol=0, atol=1e-13)


@pytest.mark.parametrize("scale", ["none", "zscore", "mad", "vol_garch"])
def test_flat_stocks_are_zero_and_flagged_and_change_no_other(scale):
    returns = 0.02 * np.random.default_rng(1).standard_normal((3, 60))
    with_flat = np.stack([returns[0], np.zeros(60), returns[1], np.full(60, 0.1), returns[2]])
    found = scale_returns(with_flat, scale)
    assert found.flat.tolist() == [False, True, False, True, False]
    assert (found.values[found.flat] == 0).all()
    np.testing.assert_array_equal(found.values[~found.flat], scale_returns(returns, scale).values)
    alone = scale_returns(np.full((2, 60), 0.1), scale)
    assert alone.flat.all()
    assert (alone.values == 0).all()


@pytest.mark.parametrize("scale", ["zscore", "mad", "vol_garch"])
def test_volatility_of_a_stock_does_not_matter(scale):
    returns = 0.02 * np.random.default_rng(2).standard_t(5, (3, 300))
    found = scale_returns(returns * np.array([[1.0], [8.0], [0.25]]), scale).values
    np.testing.assert_array_equal(found, scale_returns(returns, scale).values)  # powers of two round alike


def loss_of(squares, persistence, alpha):
    variance = squares.mean()
    h, total = variance, 0.0
    for square in squares:
        total += np.log(h) + square / h
        h = variance * (1 - persistence) + alpha * square + (persistence - alpha) * h
    return total


@pytest.mark.parametrize(("alpha", "beta"), [(0.08, 0.9), (0.15, 0.6), (0.0, 0.0)])
def test_garch_loss_is_within_a_grid_cell_of_the_optimum(alpha, beta):
    series = garch_series(3, alpha, beta)
    shocks = series - series.mean()
    volatility = garch_volatility(shocks[None])[0]
    ours = (np.log(volatility**2) + shocks**2 / volatility**2).sum()

    def objective(parameters):
        persistence, share = parameters
        return loss_of(shocks**2, persistence, share * persistence)

    starts = [(0.6, 0.2), (0.9, 0.1), (0.98, 0.05)]
    bounds = [(0.5, 0.995), (0.0, 0.6)]
    best = min(minimize(objective, start, bounds=bounds, method="L-BFGS-B").fun for start in starts)
    # Twice the log-likelihood ratio: 1 is far inside the 5.99 of a 95 % confidence region of two parameters.
    assert ours - best < 1.0


def test_garch_removes_bursts_of_volatility():
    series = garch_series(4, 0.12, 0.86, 3000)
    scaled = scale_returns(series[None], "vol_garch").values[0]

    def memory(values):
        squares = values**2 - np.mean(values**2)
        return (squares[1:] * squares[:-1]).mean() / squares.var()

    assert memory(series) > 0.15
    # standard error of an autocorrelation over 3,000 days: 0.018
    assert abs(memory(scaled)) < 0.06
    assert scaled.std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("returns", "scale", "message"),
    [
        (np.zeros((2, 5)), "std", "scale must be one of none, zscore, mad, vol_garch, got 'std'"),
        (np.zeros(5), "none", r"shape \(stocks, days\) with at least 2 days, got \(5,\)"),
        (np.zeros((2, 1)), "none", r"at least 2 days, got \(2, 1\)"),
        (np.array([[0.0, 1.0], [0.0, np.inf]]), "mad", "must be finite, got inf for stock 1 on day 1"),
    ],
)
def test_what_cannot_be_scaled_is_named(returns, scale, message):
    with pytest.raises(ValueError, match=message):
        scale_returns(returns, scale)
