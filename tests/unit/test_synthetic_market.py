import numpy as np
import pytest
from scipy import stats

from datamodules import StockPricesDataModule
from datamodules.synthetic_market import SECTORS, PlantedGroup, null_market, planted_cycles, synthetic_market

KINDS = ("garch", "white", "cycle", "bursts", "jumps")
BARE = {"market_beta": (0.0, 0.0), "sector_beta": (0.0, 0.0), "first_day": "2000-01-03"}


def test_shapes_prices_and_returns_belong_together():
    market = synthetic_market(seed=1)
    assert market.prices.shape == market.returns.shape == market.member.shape == (1260, 500)
    assert (market.prices > 0).all()
    assert np.isnan(market.returns[0]).all()
    np.testing.assert_array_equal(market.returns[1:], market.prices[1:] / market.prices[:-1] - 1)
    assert np.is_busday(market.dates).all()
    assert (np.diff(market.dates) > np.timedelta64(0, "D")).all()
    assert np.bincount(market.sectors).tolist() == [46] * 5 + [45] * 6
    assert market.sector_names == SECTORS
    assert market.member.all()
    assert (market.groups == -1).all()


def test_one_seed_one_market():
    first, again, other = (
        synthetic_market(9, 50, seed=3),
        synthetic_market(9, 50, seed=3),
        synthetic_market(9, 50, seed=4),
    )
    np.testing.assert_array_equal(first.prices, again.prices)
    assert (first.prices != other.prices).any(axis=0).all()


def test_market_has_the_stated_mean_and_volatility():
    market = synthetic_market(1, 50_001, market_premium=0.06, market_volatility=0.16, seed=0)
    factor = market.index_prices[1:] / market.index_prices[:-1] - 1
    # the mean of 198 years of 16 % a year has s.d. 0.0114
    assert factor.mean() * 252 == pytest.approx(0.06, abs=4 * 0.0114)
    # squares of a GARCH of such persistence and tails are no better known than to some per cent
    assert factor.std() * np.sqrt(252) == pytest.approx(0.16, rel=0.1)


def test_factors_explain_what_they_should():
    """Regress each stock on the index: the slopes are the betas, uniform in the range asked for."""
    market = synthetic_market(400, 2000, market_beta=(0.5, 1.5), seed=0)
    factor = market.index_prices[1:] / market.index_prices[:-1] - 1
    returns = market.returns[1:]
    slopes = ((factor - factor.mean())[:, None] * returns).mean(0) / factor.var()
    # the slope of a stock has s.d. about 0.3 / 0.16 / sqrt(2000) = 0.04; the mean over stocks of U(0.5, 1.5) 0.014
    assert slopes.mean() == pytest.approx(1.0, abs=0.05)
    assert slopes.min() > 0.5 - 4 * 0.06
    assert slopes.max() < 1.5 + 4 * 0.06
    rest = returns - slopes * factor[:, None]
    correlation = np.corrcoef(rest.T)
    same = market.sectors[:, None] == market.sectors
    np.fill_diagonal(same, False)
    # sector variance 0.08^2 of 0.08^2 + about 0.29^2: 0.07; between sectors 0 but for the estimated slopes
    assert 0.04 < correlation[same].mean() < 0.12
    other = ~same & ~np.eye(400, dtype=bool)
    assert abs(correlation[other].mean()) < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_planted_noise_has_the_stated_variance(kind):
    market = synthetic_market(300, 1500, groups=[PlantedGroup(kind, 300, 0.9)], group_volatility=0.25, **BARE, seed=2)
    variances = market.returns[1:].var(0) * 252 / 0.25**2
    # mean of 300 independent series, four standard errors of what they show
    assert variances.mean() == pytest.approx(1.0, abs=4 * variances.std() / np.sqrt(300))
    first = market.returns[1] * np.sqrt(252) / 0.25  # stationary from the first day: no start-up phase
    squares = first**2
    assert squares.mean() == pytest.approx(1.0, abs=4 * squares.std() / np.sqrt(300))


def test_kinds_differ_where_they_should():
    groups = [PlantedGroup(kind, 50) for kind in KINDS]
    market = synthetic_market(250, 2000, groups=groups, **BARE, seed=5)
    returns = market.returns[1:]

    def correlation(values, lag):
        return np.array([np.corrcoef(x[:-lag], x[lag:])[0, 1] for x in values.T]).mean()

    by_kind = {kind: returns[:, market.groups == number] for number, kind in enumerate(KINDS)}
    # mean of 50 correlations of 2000 days has s.d. 0.003 for white noise; squares have fatter tails, hence 0.05
    assert correlation(by_kind["cycle"], 1) > 0.8
    for kind in ("garch", "white", "bursts", "jumps"):
        assert abs(correlation(by_kind[kind], 1)) < 0.02
    assert correlation(by_kind["garch"] ** 2, 1) > 0.05
    assert correlation(by_kind["bursts"] ** 2, 1) > 0.1
    assert abs(correlation(by_kind["white"] ** 2, 1)) < 0.05
    assert abs(correlation(by_kind["jumps"] ** 2, 1)) < 0.05
    assert np.median(stats.kurtosis(by_kind["jumps"])) > 20  # 3 (0.99 * 0.25 + 0.01 * 50.5^2) - 3 = 74 in the limit


def test_cycles_have_a_period_of_ten_to_thirty_days():
    market = planted_cycles(0, n_days=4001)
    spectrum = np.abs(np.fft.rfft(market.returns[1:], axis=0)) ** 2
    periods = 4000 / np.maximum(spectrum[1:].argmax(0) + 1, 1)
    cycles = periods[market.groups == 0]
    # a radius of 0.997 leaves the peak a width of 0.003 / pi in frequency: 3 % of 1/30, at a period of 30
    assert 10 / 1.05 < cycles.min() < cycles.max() < 30 * 1.05
    assert cycles.max() - cycles.min() > 10
    assert ((periods[market.groups == 1] < 9) | (periods[market.groups == 1] > 33)).mean() > 0.5


def test_planted_cycles_are_two_equal_groups_without_a_market():
    market = planted_cycles(7)
    assert market.prices.shape == (504, 120)
    assert np.bincount(market.groups).tolist() == [60, 60]
    correlation = np.corrcoef(market.returns[1:, market.groups == 1].T)[np.triu_indices(60, 1)]
    # 1770 correlations of 503 days with s.d. 0.045 each, nearly independent
    assert abs(correlation.mean()) < 0.005
    with_market = planted_cycles(7, market_factor=1.0)
    assert np.corrcoef(with_market.returns[1:].T)[np.triu_indices(120, 1)].mean() > 0.2


def test_null_market_has_no_skill():
    """Mean, volatility and Sharpe ratio of the first two years say nothing about the next three."""
    ranks = []
    for seed in range(10):
        market = null_market(seed)
        factor = market.index_prices[1:] / market.index_prices[:-1] - 1
        own = market.returns[1:] - factor[:, None]
        early, late = own[:503], own[503:]
        figures = (lambda r: r.mean(0), lambda r: r.mean(0) / r.std(0), lambda r: r.std(0))
        ranks += [stats.spearmanr(figure(early), figure(late)).statistic for figure in figures]
        # alpha is 0: the mean over 450 stocks of 1259 days of 25 % a year has s.d. 0.25 / sqrt(252 * 1259 * 450)
        assert abs(own.mean()) < 4 * 0.25 / np.sqrt(252 * 1259 * 450)
    # each rank correlation of 450 stocks has s.d. 0.047
    assert np.abs(ranks).max() < 4.5 * 0.047
    assert abs(np.mean(ranks)) < 4 * 0.047 / np.sqrt(30)


def test_lists():
    groups = [PlantedGroup("cycle", 20)]
    market = synthetic_market(200, 400, groups=groups, listed_late=0.3, delisted=0.3, part_time_members=0.3, seed=0)
    listed = ~np.isnan(market.prices)
    assert listed[:, :20].all()
    assert listed.any(0).all()
    assert (np.abs(np.diff(listed.astype(int), axis=0)).sum(0) <= 2).all()  # one spell each
    assert not (market.member & ~listed).any()
    late, gone = ~listed[0], ~listed[-1]
    # binomial(180, 0.3) has s.d. 6.1
    assert 30 < late.sum() < 78
    assert 30 < gone.sum() < 78
    np.testing.assert_array_equal(gone, ~np.isnan(market.delisting_returns))
    assert np.nanmin(market.delisting_returns) >= -0.6
    assert (market.member.sum(0) < listed.sum(0)).sum() > 30
    assert np.isnan(market.returns[~listed]).all()


def test_what_is_written_is_read_again(tmp_path):
    market = synthetic_market(40, 300, listed_late=0.3, delisted=0.3, part_time_members=0.5, seed=1)
    files = market.write(tmp_path / "market")
    split = {"test_start": str(market.dates[200]), "window_length": 50, "index_column": "index"}
    panel = StockPricesDataModule(**files, **split).panel
    fields = market.fields()
    batch = panel.batch()
    for name in ("dates", "prices", "member", "index_prices", "sectors", "delisting_returns"):
        np.testing.assert_array_equal(batch[name].numpy(), fields[name], err_msg=name)
    assert tuple(batch["tickers"]) == fields["tickers"]
    assert tuple(batch["sector_names"]) == fields["sector_names"]
    known = ~np.isnan(market.returns)
    np.testing.assert_array_equal(panel.returns[known], market.returns[known])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: synthetic_market(0), "n_stocks must be at least 1, got 0"),
        (lambda: synthetic_market(5, 2), "n_days must be at least 3, got 2"),
        (lambda: synthetic_market(5, groups=[PlantedGroup("white", 6)]), "at least the 6 of the planted groups, got 5"),
        (lambda: synthetic_market(garch=(0.5, 0.5)), r"garch .* sum below 1, got \(0.5, 0.5\)"),
        (lambda: synthetic_market(degrees_of_freedom=2), "degrees_of_freedom must be above 2.* got 2"),
        (lambda: synthetic_market(delisted=1.5), r"delisted must be in \[0, 1\], got 1.5"),
        (lambda: PlantedGroup("pink", 3), "noise must be one of garch, .*, got 'pink'"),
        (lambda: PlantedGroup("white", 0), "n_stocks of a planted group must be at least 1, got 0"),
        (lambda: planted_cycles(0, pole_radius=1.0), r"pole_radius must be in \(0, 1\), got 1.0"),
    ],
)
def test_bad_input_ends_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
