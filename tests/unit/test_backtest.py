from dataclasses import fields

import numpy as np
import pytest
import torch

from lightning_modules.portfolio.backtest import Decision, Plan, hold, make_plan, traded
from lightning_modules.portfolio.market import Market, daily_risk_free, month_starts, next_month_start, next_session

NAN = np.nan


def market_of(prices, *, delisting=None, index=None, start="2020-01-01"):
    prices = np.asarray(prices, dtype=np.float64)
    n_days, n_stocks = prices.shape
    returns = np.full_like(prices, NAN)
    returns[1:] = prices[1:] / prices[:-1] - 1
    return Market(
        dates=np.datetime64(start, "D") + np.arange(n_days),
        tickers=tuple("ABCDEFGH"[:n_stocks]),
        prices=prices,
        returns=returns,
        member=np.ones_like(prices, dtype=bool),
        index_prices=None if index is None else np.asarray(index, dtype=np.float64),
        sectors=np.full(n_stocks, -1),
        delisting_returns=np.full(n_stocks, NAN) if delisting is None else np.asarray(delisting, dtype=np.float64),
    )


def always(*weights):
    return lambda past, number: Decision(np.asarray(weights, dtype=np.float64))


# Prices of powers of two, so that every number below is exact.
TWO = market_of([[1, 4], [2, 4], [2, 2], [4, 2], [4, 4], [2, 8]])


def test_weights_drift_and_costs_are_paid_before_the_first_day():
    plan = make_plan("half", TWO, always(0.5, 0.5), np.array([1, 4]), 6)
    free, track = hold(plan, TWO), hold(plan, TWO, cost_bps=100)
    # wealth of the parts: 1 + 0.5, 1 + 0.25, 2 + 0.25; then from 1 again: 0.5 + 1, 0.25 + 2
    gross = np.array([1.5 / 1, 1.25 / 1.5, 2.25 / 1.25, 1.5 / 1, 2.25 / 1.5]) - 1
    np.testing.assert_allclose(free.returns, gross, rtol=1e-15)
    np.testing.assert_array_equal(free.returns, free.gross_returns)
    np.testing.assert_allclose(track.drifted, [[0, 0], [2 / 2.25, 0.25 / 2.25]], rtol=1e-15)
    second = abs(0.5 - 2 / 2.25) + abs(0.5 - 0.25 / 2.25)
    np.testing.assert_allclose(track.turnover, [1, second], rtol=1e-15)
    np.testing.assert_allclose(track.held, [0.25 / 2.25, 2 / 2.25], rtol=1e-15)
    net = gross.copy()
    net[0] = 0.99 * 1.5 - 1
    net[3] = (1 - 0.01 * second) * 1.5 - 1
    np.testing.assert_allclose(track.returns, net, rtol=1e-14)
    np.testing.assert_allclose(track.gross_returns, gross, rtol=1e-15)
    assert track.dates.tolist() == TWO.dates[1:6].tolist()
    assert track.rebalance_dates.tolist() == TWO.dates[[1, 4]].tolist()


def test_without_drift_the_target_is_restored_at_every_close():
    plan = make_plan("half", TWO, always(0.5, 0.5), np.array([1, 4]), 6)
    track = hold(plan, TWO, drift=False)
    moves = TWO.returns[1:6]
    np.testing.assert_allclose(track.returns, moves.mean(1), rtol=1e-15)
    # only the last day before the second rebalance moved them: (1 + 1, 1 + 0) / 2 over 1.5
    np.testing.assert_allclose(track.drifted[1], [2 / 3, 1 / 3], rtol=1e-15)
    assert track.turnover[1] == pytest.approx(1 / 3)


def test_split_into_periods_of_one_day_equals_no_drift():
    daily = make_plan("daily", TWO, always(0.25, 0.75), np.arange(1, 6), 6)
    monthly = make_plan("once", TWO, always(0.25, 0.75), np.array([1]), 6)
    np.testing.assert_allclose(hold(daily, TWO).returns, hold(monthly, TWO, drift=False).returns, rtol=1e-15)


def test_single_stock_earns_its_prices_through_gaps_and_delisting():
    prices = [[8.0, 1], [4, 1], [NAN, 1], [NAN, 1], [16, 1], [8, 1], [NAN, 1], [NAN, 1]]
    market = market_of(prices, delisting=[-0.5, NAN])
    np.testing.assert_array_equal(market.holder_returns[:, 0], [0, -0.5, 0, 0, 3, -0.5, -0.5, 0])
    track = hold(make_plan("one", market, always(1, 0), np.array([1]), 8), market)
    np.testing.assert_allclose(np.cumprod(1 + track.returns), [0.5, 0.5, 0.5, 2, 1, 0.5, 0.5], rtol=1e-15)


def test_what_delisted_stays_in_cash_until_the_next_rebalance():
    market = market_of([[1.0, 1], [1, 1], [NAN, 1], [NAN, 2], [NAN, 2]], delisting=[-1.0, NAN])
    first_half = [np.array([0.5, 0.5]), np.array([0.0, 1.0])]
    plan = make_plan("half", market, lambda past, number: Decision(first_half[number]), np.array([1, 4]), 5)
    track = hold(plan, market)
    # half is lost on the day after the last price; the other half doubles
    np.testing.assert_allclose(track.returns, [0, -0.5, 1, 0], rtol=1e-15)
    np.testing.assert_array_equal(track.drifted[1], [0, 1])
    assert track.turnover[1] == 0.0


def test_weight_on_a_stock_without_a_price_the_day_before_is_refused():
    market = market_of([[1.0, 1], [1, 1], [NAN, 1], [NAN, 2]])
    with pytest.raises(ValueError, match="half, 2020-01-04: weight on A, without a price the day before"):
        make_plan("half", market, always(0.5, 0.5), np.array([1, 3]), 4)


# A quarter of A, halted on rows 2 and 3, reopens at a quarter of its price.
HALTED = market_of([[4.0, 1], [4, 1], [NAN, 1], [NAN, 1], [1, 1], [1, 1]])


def test_a_halted_stock_is_held_until_it_has_a_price_again():
    wanted = [np.array([0.25, 0.75]), np.array([0.0, 1.0]), np.array([0.0, 1.0])]
    plan = make_plan("out", HALTED, lambda past, number: Decision(wanted[number]), np.array([1, 4, 5]), 6)
    track = hold(plan, HALTED, cost_bps=100)
    # nothing is sold at the old price before row 4, so its loss is there; before row 5 it is sold
    np.testing.assert_allclose(track.gross_returns, [0, 0, 0, -3 / 16, 0], rtol=1e-15)
    np.testing.assert_allclose(track.targets, [[0.25, 0.75], [0.25, 0.75], [0, 1]], rtol=1e-15)
    left = (1 / 16) / (13 / 16)
    np.testing.assert_allclose(track.turnover, [1, 0, 2 * left], rtol=1e-14)
    assert list(track.flags) == [str(HALTED.dates[4])]
    (flag,) = track.flags[str(HALTED.dates[4])]
    assert flag == "frozen: 1 stocks without a price the day before stay at 25.0% of wealth"


def test_what_can_be_traded_shares_what_a_halted_stock_leaves():
    prices = np.ones((4, 4))
    prices[1:3, 0] = NAN
    market = market_of(prices)
    weights, flags = traded(np.array([0, 0.2, 0.6, 0.2]), np.array([0.5, 0.5, 0, 0]), market.before(3))
    np.testing.assert_allclose(weights, [0.5, 0.1, 0.3, 0.1], rtol=1e-15)
    assert len(flags) == 1
    carried, _ = traded(np.array([0.8, 0.1, 0.1, 0]), np.array([0, 1.0, 0, 0]), market.before(3))
    np.testing.assert_allclose(carried, [0, 0.5, 0.5, 0], rtol=1e-15)  # nor can it be bought
    same = np.array([0, 0.5, 0.25, 0.25])
    assert traded(same, np.array([0, 1.0, 0, 0]), market.before(3)) == (same, ())
    only = np.array([1.0, 0, 0, 0])
    stay, flags = traded(only, same, market.before(3))
    assert (stay.tolist(), flags[0][:7]) == (same.tolist(), "frozen:")
    with pytest.raises(ValueError, match="none of the stocks wanted has a price on 2020-01-03"):
        traded(only, np.zeros(4), market.before(3))


def test_what_a_delisting_paid_out_is_not_frozen():
    market = market_of([[1.0, 1], [1, 1], [NAN, 1], [NAN, 1]], delisting=[-0.5, NAN])
    assert market.before(4).stuck.tolist() == [False, False]
    assert market.before(2).stuck.tolist() == [False, False]
    assert market_of(market.prices).before(3).stuck.tolist() == [True, False]


@pytest.mark.parametrize(
    ("last", "session", "month"),
    [
        ("2022-12-28", "2022-12-29", "2023-01-02"),
        ("2022-12-30", "2023-01-02", "2023-02-01"),
        ("2022-12-31", "2023-01-02", "2023-02-01"),  # a Saturday
        ("2023-08-31", "2023-09-01", "2023-10-02"),
    ],
)
def test_the_next_session_by_business_days(last, session, month):
    found = next_session(np.array([last], "datetime64[D]"))
    assert str(found) == session
    assert str(next_month_start(found)) == month


def test_costs_that_eat_everything_are_refused():
    plan = make_plan("half", TWO, always(0.5, 0.5), np.array([1]), 6)
    with pytest.raises(ValueError, match="half: the portfolio lost everything in the period from"):
        hold(plan, TWO, cost_bps=10_000)


def test_stock_that_was_never_quoted_earns_nothing():
    market = market_of([[1.0, NAN], [2, NAN], [4, NAN]], delisting=[NAN, -1.0])
    np.testing.assert_array_equal(market.holder_returns, [[0, 0], [1, 0], [1, 0]])
    assert market.last_price_row.tolist() == [2, -1]


def test_first_quotation_is_not_a_return():
    market = market_of([[NAN], [5.0], [10.0]])
    np.testing.assert_array_equal(market.holder_returns[:, 0], [0, 0, 1])


def test_decisions_see_the_days_before_alone():
    seen = []

    def decide(past, number):
        seen.append((len(past), number, past.dates[-1]))
        return Decision(np.array([1.0, 0.0]), flags=("tired",) if number == 1 else ())

    plan = make_plan("spy", TWO, decide, np.array([2, 4]), 6)
    assert seen == [(2, 0, TWO.dates[1]), (4, 1, TWO.dates[3])]
    assert hold(plan, TWO).flags == {str(TWO.dates[4]): ("tired",)}
    assert plan.targets.tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize("row", [3, 5, 8])
def test_the_past_is_bit_identical_whatever_comes_later(row):
    random = np.random.default_rng(0)
    prices = np.exp(np.cumsum(0.02 * random.standard_normal((12, 4)), axis=0))
    prices[4:, 0] = NAN  # its delisting is known from row 5 on
    prices[2:7, 1] = NAN
    market = market_of(prices, delisting=[-0.3, NAN, NAN, NAN], index=prices[:, 3])
    noise = prices.copy()
    noise[row:] = np.where(random.random((12 - row, 4)) < 0.5, NAN, 100 * random.random((12 - row, 4)))
    returns = np.full((12, 4), NAN)
    returns[1:] = noise[1:] / noise[:-1] - 1
    values = {field.name: getattr(market, field.name) for field in fields(market)}
    changed = Market(
        **values | {"prices": noise, "returns": returns, "index_prices": random.random(12), "member": noise > 50}
    )
    changed.member[:row] = True
    changed.index_prices[:row] = market.index_prices[:row]
    if row > 4:  # a delisting that is known stays one: the stock is not quoted again
        changed.prices[row:, 0] = NAN
        changed.returns[row:, 0] = NAN
    ours, theirs = market.before(row), changed.before(row)
    for name in ("dates", "prices", "returns", "member", "index_prices", "delisting_returns", "index_returns"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    np.testing.assert_array_equal(ours.holder_returns, theirs.holder_returns)
    np.testing.assert_array_equal(ours.eligible(0.5), theirs.eligible(0.5))


def test_delisting_is_known_the_day_after_the_last_price_and_not_before():
    market = market_of([[1.0], [1], [NAN], [NAN]], delisting=[-0.4])
    known = [float(market.before(row).delisting_returns[0]) for row in (1, 2, 3, 4)]
    assert np.isnan(known[:2]).all()
    assert known[2:] == [-0.4, -0.4]
    assert market.before(4).before(2).delisting_returns.tolist() == pytest.approx([NAN], nan_ok=True)
    assert market.before(3).holder_returns[-1, 0] == -0.4
    assert market.before(2).eligible(0.5).tolist() == [0]
    assert market.before(3).eligible(0.0).tolist() == []


def test_eligible_stocks_are_members_with_a_price_and_a_history():
    prices = np.ones((21, 5))
    prices[20, 1] = NAN  # suspended on the last day
    prices[:2, 2] = NAN  # listed late: 18 of 20 returns
    prices[0, 3] = NAN  # 19 of 20 returns, 95 %
    market = market_of(prices)
    market.member[20, 4] = False
    assert market.eligible(0.95).tolist() == [0, 3]
    assert market.eligible(0.9).tolist() == [0, 2, 3]
    market.member[:20] = False  # membership is asked for on the last day only
    assert market.eligible(0.95).tolist() == [0, 3]


def test_windows_and_columns_are_cut_consistently():
    market = market_of([[1.0, 2, 3], [2, 2, 3], [4, 2, 3]], delisting=[NAN, NAN, 0.1], index=[1, 2, 4])
    window = market.before(3, 2)
    assert window.dates.tolist() == market.dates[1:].tolist()
    assert window.index_returns.tolist() == [1.0]
    assert len(market.rows(-5, 99)) == 3
    part = market.stocks([2, 0])
    assert part.tickers == ("C", "A")
    np.testing.assert_array_equal(part.prices, market.prices[:, [2, 0]])
    np.testing.assert_array_equal(market.filled_returns(), np.nan_to_num(market.returns[1:]))
    assert market_of([[1.0], [2]]).index_returns is None


def test_batch_of_tensors_becomes_a_market():
    batch = {
        field.name: torch.from_numpy(value) if isinstance(value := getattr(TWO, field.name), np.ndarray) else value
        for field in fields(TWO)
        if field.name not in ("dates", "index_prices")
    }
    found = Market.from_batch(batch | {"dates": torch.from_numpy(TWO.dates.astype(np.int64)), "tickers": ["A", "B"]})
    for field in fields(TWO):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(TWO, field.name))


def test_months_start_at_their_first_session_and_no_day_is_lost():
    dates = np.arange(np.datetime64("2020-01-30"), np.datetime64("2020-05-06"))
    dates = dates[np.is_busday(dates)]
    starts = month_starts(dates, 0, len(dates))
    assert dates[starts].astype(str).tolist() == ["2020-01-30", "2020-02-03", "2020-03-02", "2020-04-01", "2020-05-01"]
    assert month_starts(dates, 5, len(dates)).tolist() == [5, *starts[2:].tolist()]


def test_daily_rate_compounds_to_the_annual_one():
    assert (1 + daily_risk_free(0.03)) ** 252 == pytest.approx(1.03, rel=1e-12)  # 252 powers of rounding


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_plan("x", TWO, always(1, 0), np.array([], dtype=int), 6), r"got \[\]"),
        (lambda: make_plan("x", TWO, always(1, 0), np.array([0, 2]), 6), r"from at least 1 .* got \[0, 2\]"),
        (lambda: make_plan("x", TWO, always(1, 0), np.array([2, 2]), 6), r"must increase .* got \[2, 2\]"),
        (lambda: make_plan("x", TWO, always(1, 0), np.array([2]), 7), "below 7"),
        (lambda: make_plan("x", TWO, always(1), np.array([2]), 6), r"x, 2020-01-03: .* got shape \(1,\)"),
        (lambda: make_plan("x", TWO, always(1.5, -0.5), np.array([2]), 6), r"least .*-0\.5"),
        (lambda: make_plan("x", TWO, always(0.5, 0.4), np.array([2]), 6), r"sum .*0\.9"),
        (lambda: make_plan("x", TWO, always(NAN, 1), np.array([2]), 6), "sum .*nan"),
        (lambda: hold(make_plan("x", TWO, always(1, 0), np.array([2]), 6), TWO, cost_bps=-1), "at least 0, got -1"),
    ],
)
def test_bad_input_ends_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("drift", [True, False])
@pytest.mark.parametrize("last_price_row", [1, 2, 3])
def test_losing_everything_ends_in_one_line(drift, last_price_row):
    prices = np.ones((5, 1))
    prices[last_price_row + 1 :] = NAN
    market = market_of(prices, delisting=[-1.0])
    plan = Plan("all in", np.array([1]), 5, np.ones((1, 1)), (Decision(np.ones(1)),))
    with pytest.raises(ValueError, match="all in: the portfolio lost everything"):
        hold(plan, market, drift=drift)
