"""Walks: calendars, refits, who is eligible, and what becomes of a picked stock that leaves."""

from dataclasses import replace

import numpy as np
import pytest

from datamodules.synthetic_market import synthetic_market
from lightning_modules.portfolio.clusterers import KMeansClusters, RandomClusters
from lightning_modules.portfolio.market import Market
from lightning_modules.portfolio.strategy import last_months, without_first_of_month
from lightning_modules.portfolio.walk import (
    Frame,
    Rules,
    cluster_strategy,
    control_arms,
    no_representation,
    permuted_arms,
    random_arms,
    volatility_only,
    walk,
)
from lightning_modules.portfolio.weighting import EqualWeight


@pytest.fixture(scope="module")
def market() -> Market:
    return Market.from_batch(synthetic_market(24, 420, delisted=0.2, seed=8).fields())


@pytest.fixture
def frame(market) -> Frame:
    return Frame(market, (0, 250), (250, 420))


def batch_of(market: Market, *ends: int) -> dict:
    fields = {name: getattr(market, name) for name in ("prices", "returns", "member", "sectors", "delisting_returns")}
    fields |= {"dates": market.dates.astype(np.int64), "tickers": list(market.tickers)}
    fields |= {"index_prices": market.index_prices, "sector_names": list(market.sector_names)}
    return fields | dict(zip(("train_start", "train_stop", "test_start", "test_stop"), ends, strict=True))


def days_of_month(dates) -> np.ndarray:
    return (dates - dates.astype("datetime64[M]")).astype(int) + 1


def test_every_day_of_the_test_once_and_the_first_of_a_month_with_them(frame):
    arm = walk("1/N", "allocation", frame, Rules(), lambda past, _: decision(past))
    assert np.array_equal(arm.track.dates, frame.market.dates[250:420])
    assert (days_of_month(arm.track.dates) == 1).any()
    starts = frame.market.dates[arm.plan.rows]
    months = frame.market.dates[250:420].astype("datetime64[M]")
    assert np.array_equal(starts.astype("datetime64[M]"), np.unique(months)), "one rebalance a month"
    for start in starts[1:]:
        before = frame.market.dates[frame.market.dates < start][-1]
        assert before.astype("datetime64[M]") < start.astype("datetime64[M]"), "at its first session"


def decision(past: Market):
    from lightning_modules.portfolio.backtest import Decision

    weights = np.zeros(past.n_stocks)
    weights[0] = 1
    return Decision(weights)


def test_the_published_calendar_loses_the_first_of_a_month_and_nothing_else(market):
    kept = without_first_of_month(market)
    lost = np.setdiff1d(market.dates, kept.dates)
    assert len(lost) > 5
    assert (days_of_month(lost) == 1).all()
    assert not (days_of_month(kept.dates[1:]) == 1).any()
    rows = np.isin(market.dates, kept.dates)
    # chained prices are products of hundreds of returns: a few units in the last place each
    np.testing.assert_allclose(kept.holder_returns[1:], market.holder_returns[rows][1:], atol=1e-12)
    np.testing.assert_allclose(kept.index_returns, market.index_returns[rows[1:]], atol=1e-12)
    assert np.array_equal(kept.returns, market.returns[rows], equal_nan=True)


@pytest.mark.parametrize("mode", ["published", "causal"])
def test_a_panel_that_ends_with_the_train_window_gives_the_same_window(market, mode):
    """Validation sees no later day, test sees all: the stocks must be represented alike."""
    whole = Frame.from_batch(batch_of(market, 10, 250, 255, 400), mode).train_window
    cut = Frame.from_batch(batch_of(market.rows(0, 250), 10, 250, 255, 400), mode).train_window
    assert np.array_equal(whole.dates, cut.dates)
    assert whole.dates[-1] == market.dates[249]
    assert np.array_equal(whole.filled_returns(), cut.filled_returns())


def test_the_last_months_hold_the_return_of_their_first_day(market):
    past = market.before(300)
    window = last_months(past, 3)
    months = past.dates.astype("datetime64[M]")
    assert np.array_equal(window.dates[1:], past.dates[months > months[-1] - 3])
    assert window.filled_returns().shape == (len(window) - 1, 24)


@pytest.mark.parametrize(("mode", "n_refits"), [("causal", 1), ("causal_rolling", 5)])
def test_refits_as_often_as_the_mode_says(frame, mode, n_refits):
    windows = []

    def represent(stocks):
        windows.append((stocks.dates[0], stocks.dates[-1]))
        return volatility_only(stocks)

    rules = Rules(mode=mode, refit_months=2, weighting=EqualWeight())
    plan = walk(
        "x", "model", frame, rules, cluster_strategy(frame, rules, represent, RandomClusters(n_clusters=3))
    ).plan
    assert len(plan.rows) == 9
    assert len(windows) == n_refits
    dates = frame.market.dates
    for number, (first, last) in enumerate(windows):
        row = plan.rows[2 * number]
        assert (first, last) == (dates[row - 250], dates[row - 1]), "as long as the train window, up to the day before"


def test_purged_days_are_not_in_the_window_of_the_first_refit(market):
    frame = Frame(market, (0, 240), (250, 420))
    seen = []

    def represent(stocks):
        seen.append(stocks.dates[-1])
        return volatility_only(stocks)

    rules = Rules(weighting=EqualWeight())
    walk("x", "model", frame, rules, cluster_strategy(frame, rules, represent, RandomClusters(n_clusters=3)))
    assert seen == [market.dates[239]]


def test_a_picked_stock_that_leaves_is_dropped_and_said(frame):
    gone = np.flatnonzero(~np.isnan(frame.market.delisting_returns) & (frame.market.last_price_row > 260))
    assert len(gone) > 0
    rules = Rules(weighting=EqualWeight())
    strategy = cluster_strategy(frame, rules, no_representation, RandomClusters(n_clusters=2))
    strategy.selection = lambda labels, returns, embedding: np.arange(len(labels))  # all of them
    plan = walk("x", "model", frame, rules, strategy).plan
    left = frame.market.last_price_row[gone].min()
    after = int(np.flatnonzero(plan.rows > left)[0])
    assert plan.decisions[after].flags[0].startswith("no price: ")
    assert plan.targets[after][gone[frame.market.last_price_row[gone] == left]].tolist() == [0.0]
    assert plan.targets.sum(1) == pytest.approx(1), "the others take its place"


def test_when_all_picked_stocks_have_left_it_says_so(frame):
    rules = Rules(weighting=EqualWeight())
    strategy = cluster_strategy(frame, rules, no_representation, RandomClusters(n_clusters=2))
    strategy.selection = lambda labels, returns, embedding: np.array([0])
    prices, returns = frame.market.prices.copy(), frame.market.returns.copy()
    prices[300:, 0] = returns[300:, 0] = np.nan
    emptied = replace(frame, market=replace(frame.market, prices=prices, returns=returns))
    with pytest.raises(ValueError, match="none of the 1 picked stocks has a price on"):
        walk("x", "model", emptied, rules, strategy)


def test_nobody_eligible_is_one_line(frame):
    absent = replace(frame, market=replace(frame.market, member=np.zeros_like(frame.market.member)))
    rules = Rules(weighting=EqualWeight())
    strategy = cluster_strategy(absent, rules, no_representation, RandomClusters(n_clusters=2))
    with pytest.raises(ValueError, match="no stock is eligible on"):
        walk("x", "model", absent, rules, strategy)


def test_controls_and_random_clusters(frame):
    rules = Rules(weighting=EqualWeight())
    names = [arm.name for arm in control_arms(frame, rules, [KMeansClusters(n_clusters=3)])]
    assert names == [
        "volatility only, k-means",
        "sectors",
        "1/N",
        "inverse volatility",
        "minimum variance",
        "HRP",
        "index",
    ]
    once, again = (random_arms(frame, rules, 3, range(3)) for _ in range(2))
    for one, other in zip(once, again, strict=True):
        assert np.array_equal(one.plan.targets, other.plan.targets)
    assert not np.array_equal(once[0].plan.targets, once[1].plan.targets)


def test_permuted_clusters_have_the_sizes_of_the_plan_at_every_refit(frame):
    rules = Rules(mode="causal_rolling", refit_months=2, weighting=EqualWeight())
    strategy = cluster_strategy(frame, rules, volatility_only, KMeansClusters(n_clusters=4))
    plan = walk("x", "model", frame, rules, strategy).plan
    once, again = (permuted_arms(frame, rules, plan, range(3)) for _ in range(2))
    assert len(once) == 3
    for one, other in zip(once, again, strict=True):
        assert np.array_equal(one.plan.targets, other.plan.targets)
        for mine, theirs in zip(plan.decisions, one.plan.decisions, strict=True):
            held = mine.labels >= 0
            assert np.array_equal(theirs.labels >= 0, held), "the same stocks"
            assert np.array_equal(np.bincount(mine.labels[held]), np.bincount(theirs.labels[held]))
            assert not np.array_equal(mine.labels, theirs.labels)


def test_stocks_without_a_sector_are_not_bought_as_a_sector(frame):
    sectors = frame.market.sectors.copy()
    unknown = frame.first_columns(Rules())[::2]
    sectors[unknown] = -1
    partly = replace(frame, market=replace(frame.market, sectors=sectors))
    (arm,) = (arm for arm in control_arms(partly, Rules(weighting=EqualWeight()), []) if arm.name == "sectors")
    assert (arm.plan.targets[:, unknown] == 0).all()
    sectors[frame.first_columns(Rules())] = -1
    sectors[np.setdiff1d(np.arange(24), frame.first_columns(Rules()))] = 0
    nobody = replace(frame, market=replace(frame.market, sectors=sectors))
    assert "sectors" not in [arm.name for arm in control_arms(nobody, Rules(weighting=EqualWeight()), [])]


def test_the_index_is_held_from_the_close_before_the_test(frame):
    track = frame.index_track()
    index = frame.market.index_prices
    assert np.prod(1 + track.returns) == pytest.approx(index[419] / index[249], rel=1e-12)
    without = Frame(replace(frame.market, index_prices=None), frame.train, frame.test)
    with pytest.raises(ValueError, match="no index"):
        without.index_track()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "hindsight"}, "mode must be one of published, causal, causal_rolling, got 'hindsight'"),
        ({"refit_months": 0}, "refit_months must be at least 1, got 0"),
        ({"cost_bps": float("nan")}, "cost_bps must be at least 0, got nan"),
        ({"min_observed": 0.0}, "min_observed must be above 0 and at most 1, got 0.0"),
    ],
)
def test_wrong_rules_end_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        Rules(**settings)
