import numpy as np
import pytest

from lightning_modules.portfolio import inference, ledoit_wolf
from lightning_modules.portfolio.inference import (
    deflated_sharpe,
    expected_maximum_sharpe,
    probabilistic_sharpe,
    sharpe_difference_interval,
    sharpe_difference_intervals,
    sharpe_interval,
    sharpe_intervals,
    stationary_bootstrap,
)
from lightning_modules.portfolio.ledoit_wolf import ledoit_wolf_test
from lightning_modules.portfolio.metrics import sharpe

RATE = 1.03 ** (1 / 252) - 1


def normal(n_days, n_tracks, seed=0):
    return 0.0004 + 0.01 * np.random.default_rng(seed).standard_normal((n_days, n_tracks))


def autoregressive(n_days, slope, random, mean=0.0005):
    noise = 0.01 * random.standard_normal(n_days + 50)
    series = np.zeros(n_days + 50)
    for day in range(1, len(series)):
        series[day] = slope * series[day - 1] + noise[day]
    return mean + series[50:]


def drawn_days(*arguments, **options):
    return np.concatenate(list(stationary_bootstrap(*arguments, **options)))


def test_lengths_of_blocks_are_geometric():
    days = drawn_days(1000, 400, mean_block=5.0, seed=1)
    goes_on = (np.diff(days, axis=1) % 1000) == 1
    # a new block starts on the day after by chance too
    expected = 0.8 + 0.2 / 1000
    # 399,600 steps: s.d. 0.0006, five of them
    assert goes_on.mean() == pytest.approx(expected, abs=0.0032)
    ends = np.flatnonzero(~goes_on.ravel())
    lengths = np.diff(ends)
    # P(length > k) = 0.8^k: about 80,000 blocks, s.d. of a share at most 0.0018
    for k in (1, 2, 5, 10):
        assert (lengths > k).mean() == pytest.approx(expected**k, abs=0.01)


def test_days_are_uniform_and_wrap_around():
    days = drawn_days(20, 5000, mean_block=10.0, seed=2)
    assert days.shape == (5000, 20)
    assert days.dtype == np.int64
    # 100,000 days in runs of about 10: s.d. of a share of 1/20 about 0.05 sqrt(0.95 / 0.05 * 19 / 100,000) = 0.003
    assert np.abs(np.bincount(days.ravel()) / days.size - 0.05).max() < 0.015
    assert ((days[:, :-1] == 19) & (days[:, 1:] == 0)).any()


def test_blocks_of_one_day_are_independent_and_endless_blocks_are_rotations():
    days = drawn_days(50, 4000, mean_block=1.0)
    # 196,000 pairs, probability 1/50: s.d. 0.0003
    assert ((np.diff(days, axis=1) % 50) == 1).mean() == pytest.approx(0.02, abs=0.0016)
    rotations = drawn_days(50, 20, mean_block=1e12)
    assert ((np.diff(rotations, axis=1) % 50) == 1).all()


def test_draw_does_not_depend_on_chunks(monkeypatch):
    whole = drawn_days(30, 25, seed=4)
    tracks = dict(zip("abc", normal(30, 3).T, strict=True))
    intervals = sharpe_intervals(tracks, n_resamples=25)
    monkeypatch.setattr(inference, "CHUNK_BYTES", 40 * 30 * 7)
    assert [len(chunk) for chunk in stationary_bootstrap(30, 25, seed=4)] == [7, 7, 7, 4]
    np.testing.assert_array_equal(drawn_days(30, 25, seed=4), whole)
    for name, interval in sharpe_intervals(tracks, n_resamples=25).items():
        # the matrix product sums 30 numbers in an order that depends on its shape
        np.testing.assert_allclose(interval, intervals[name], rtol=1e-10)
        np.testing.assert_allclose(sharpe_interval(tracks[name], n_resamples=25), interval, rtol=1e-10)


def test_intervals_equal_resampling_one_by_one():
    ours, theirs = normal(90, 2, seed=3).T
    days = drawn_days(90, 200, mean_block=7.0, seed=9)
    first = [(ours[row].mean() - RATE) / ours[row].std(ddof=1) * 252**0.5 for row in days]
    second = [(theirs[row].mean() - RATE) / theirs[row].std(ddof=1) * 252**0.5 for row in days]
    settings = {"n_resamples": 200, "mean_block": 7.0, "seed": 9, "level": 0.9}
    # float64, moments about the mean against differences of each resample from its own
    np.testing.assert_allclose(
        sharpe_interval(ours, **settings), [sharpe(ours), *np.percentile(first, [5, 95])], rtol=1e-9
    )
    np.testing.assert_allclose(
        sharpe_difference_interval(ours, theirs, **settings),
        [sharpe(ours) - sharpe(theirs), *np.percentile(np.subtract(first, second), [5, 95])],
        rtol=1e-9,
    )
    both = sharpe_difference_intervals({"theirs": theirs, "ours": ours}, theirs, **settings)
    assert both["theirs"] == (0, 0, 0)
    np.testing.assert_allclose(both["ours"], sharpe_difference_interval(ours, theirs, **settings), rtol=1e-9)


def test_pairing_narrows_and_level_widens():
    ours = normal(500, 1)[:, 0]
    theirs = ours + 0.0005 * np.random.default_rng(5).standard_normal(500)
    alone, paired = sharpe_interval(ours), sharpe_difference_interval(ours, theirs)
    assert paired.high - paired.low < (alone.high - alone.low) / 5
    wide = sharpe_interval(ours, level=0.99)
    assert wide.low < alone.low < alone.mean < alone.high < wide.high


def test_same_seed_repeats_and_leaves_the_global_generator_alone():
    series = normal(60, 1)[:, 0]
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    assert sharpe_interval(series, seed=1) == sharpe_interval(series, seed=1)
    assert sharpe_interval(series, seed=1) != sharpe_interval(series, seed=2)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_interval_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(6)
    covered = {"independent": 0, "autoregressive": 0, "ignoring blocks": 0}
    for trial in range(300):
        settings = {"n_resamples": 200, "seed": trial, "level": 0.9, "risk_free": 0.0}
        series = 0.0005 + 0.01 * random.standard_normal(400)
        found = sharpe_interval(series, **settings)
        covered["independent"] += found.low <= 0.05 * 252**0.5 <= found.high
        series = autoregressive(400, 0.5, random)
        truth = 0.0005 / (0.01 / 0.75**0.5) * 252**0.5
        found = sharpe_interval(series, **settings)
        covered["autoregressive"] += found.low <= truth <= found.high
        found = sharpe_interval(series, mean_block=1.0, **settings)
        covered["ignoring blocks"] += found.low <= truth <= found.high
    # binomial(300, 0.9) has s.d. 5.2; blocks of 10 days of an AR(1) of 0.5 miss a part of its variance
    assert 250 <= covered["independent"] <= 288
    assert 235 <= covered["autoregressive"] <= 285
    # independent draws see 1/3 of the variance of the mean, so cover 1.64 / sqrt(3) s.d. or 66 %
    assert covered["ignoring blocks"] < 225


def test_series_without_spread_have_no_interval():
    tracks = {"flat": np.full(20, 0.1), "moving": normal(20, 1)[:, 0]}
    found = sharpe_intervals(tracks, n_resamples=50)
    assert np.isnan(found["flat"]).all()
    assert np.isfinite(found["moving"]).all()
    assert np.isnan(sharpe_difference_intervals(tracks, tracks["flat"], n_resamples=50)["moving"]).all()
    assert np.isnan(sharpe_interval([0.01])).all()


def test_too_few_days_have_a_ratio_and_no_interval():
    """Of two days half of the resamples hold one of them twice; the others all have the same ratio."""
    for n_days in (2, 19, 20):
        series = normal(n_days, 1)[:, 0]
        value, low, high = sharpe_interval(series, n_resamples=50)
        assert np.isfinite(value)
        assert np.isfinite([low, high]).all() == (n_days == 20)
        assert np.isfinite(sharpe_difference_interval(series, -series, n_resamples=50)[1]) == (n_days == 20)


def test_a_series_that_moved_once_has_no_interval():
    """A third of its resamples leave that day out; an interval of the others would be one of moving series."""
    once = np.where(np.arange(100) == 50, 0.01, 0.0)
    value, low, high = sharpe_interval(once, n_resamples=200)
    assert np.isfinite(value)
    assert np.isnan([low, high]).all()


def test_deflated_sharpe_of_the_example_of_the_paper():
    # Bailey and Lopez de Prado (2014): annual 2.5 over 1250 days of 250 a year, 100 trials of variance 1/2
    benchmark = expected_maximum_sharpe(100, 0.5 / 250)
    assert benchmark == pytest.approx(0.1132, abs=5e-5)  # printed to four digits
    found = probabilistic_sharpe(2.5 / 250**0.5, benchmark, 1250, skewness=-3, kurtosis=10)
    assert found == pytest.approx(0.9004, abs=5e-5)
    # with normal returns it would be 0.95 or better after 88 trials, says the paper
    benchmark = expected_maximum_sharpe(88, 0.5 / 250)
    assert probabilistic_sharpe(2.5 / 250**0.5, benchmark, 1250) > 0.95


def test_expected_maximum_is_about_that_of_a_simulation():
    drawn = np.random.default_rng(7).standard_normal((20000, 50)).max(1)
    # the approximation is within 2 % for 50 trials; the mean of 20,000 maxima has s.d. 0.003
    assert expected_maximum_sharpe(50, 4.0) == pytest.approx(2 * drawn.mean(), rel=0.025)
    assert expected_maximum_sharpe(1, 4.0) == 0
    assert expected_maximum_sharpe(10, 0.0) == 0


def test_deflated_sharpe_of_returns():
    returns = normal(756, 1, seed=8)[:, 0] + 0.001
    ratios = [0.2, 1.1, 0.7, 0.4]
    z = (returns - returns.mean()) / returns.std()
    daily = sharpe(returns) / 252**0.5
    benchmark = expected_maximum_sharpe(40, np.var(ratios, ddof=1) / 252)
    expected = probabilistic_sharpe(daily, benchmark, 756, skewness=(z**3).mean(), kurtosis=(z**4).mean())
    found = deflated_sharpe(returns, n_trials=40, trial_sharpes=ratios)
    assert found == pytest.approx(expected, rel=1e-12)
    assert 0 < found < 1
    assert deflated_sharpe(returns, n_trials=40, trial_sharpe_variance=float(np.var(ratios, ddof=1))) == found
    assert deflated_sharpe(returns, n_trials=400, trial_sharpes=ratios) < found
    assert np.isnan(deflated_sharpe(np.full(9, 0.1), n_trials=4, trial_sharpe_variance=1.0))


def test_probability_of_a_ratio_equal_to_its_benchmark_is_half():
    assert probabilistic_sharpe(0.05, 0.05, 500, skewness=-1, kurtosis=8) == 0.5
    assert probabilistic_sharpe(0.1, 0.05, 500) > 0.5
    assert np.isnan(probabilistic_sharpe(1.0, 0.0, 500, skewness=2.0, kurtosis=1.0))


def test_ledoit_wolf_keeps_its_size():
    random = np.random.default_rng(10)
    rejected = np.zeros(2)
    for _ in range(600):
        series = 0.01 * random.standard_t(6, (300, 2))
        found = ledoit_wolf_test(*series.T, n_resamples=99, block=5)
        rejected += [found.p_value < 0.05, found.bootstrap_p_value <= 0.05]
    # binomial(600, 0.05) has s.d. 5.3; HAC errors of 300 days reject a little too often
    assert 12 <= rejected[0] <= 50
    assert 10 <= rejected[1] <= 50


def test_ledoit_wolf_keeps_its_size_under_dependence_and_has_power():
    random = np.random.default_rng(11)
    rejected = found_out = 0
    for _ in range(300):
        ours, theirs = (autoregressive(400, 0.4, random) for _ in range(2))
        rejected += ledoit_wolf_test(ours, theirs).p_value < 0.05
        found_out += ledoit_wolf_test(ours + 0.004, theirs).p_value < 0.05
    # binomial(300, 0.05) has s.d. 3.8; errors that ignore the dependence, 1 / sqrt(2.3) as large, would reject 60
    assert 4 <= rejected <= 36
    # Sharpe ratios 0.37 a day apart against an error of sqrt(2 * 2.3 / 400) = 0.11
    assert found_out > 240


def test_ledoit_wolf_error_is_that_of_independent_normal_series():
    ours, theirs = normal(20000, 2, seed=12).T
    found = ledoit_wolf_test(ours, theirs)
    # Jobson and Korkie, Memmel: variance of the difference of independent ratios close to 0 is 2 / n;
    # the kernel adds noise of some per cent
    assert found.standard_error == pytest.approx((2 / 20000) ** 0.5 * 252**0.5, rel=0.05)
    assert found.difference == pytest.approx(sharpe(ours) - sharpe(theirs), rel=1e-3)  # divisors n and n - 1


def test_ledoit_wolf_is_symmetric_and_knows_equals():
    ours, theirs = normal(250, 2, seed=13).T
    there = ledoit_wolf_test(ours, theirs, n_resamples=200)
    back = ledoit_wolf_test(theirs, ours, n_resamples=200)
    assert there.difference == -back.difference
    # sums in another order
    np.testing.assert_allclose(there[1:], back[1:], rtol=1e-10)
    assert ledoit_wolf_test(ours, ours, n_resamples=10) == (0, 0, 1, 1)
    assert ledoit_wolf_test(2 * ours, ours, risk_free=0).p_value == 1
    assert np.isnan(ledoit_wolf_test(ours, theirs).bootstrap_p_value)
    assert np.isnan(ledoit_wolf_test(np.full(250, 0.1), theirs)).all()


def test_gradient_of_the_difference_equals_finite_differences():
    moments = np.array([0.0005, 0.0008, 0.0101**2, 0.0087**2])
    _, gradient = ledoit_wolf._difference_and_gradient(moments)
    for place in range(4):
        step = np.zeros(4)
        step[place] = 1e-6 * moments[place]
        ahead, behind = (ledoit_wolf._difference_and_gradient(moments + sign * step)[0] for sign in (1, -1))
        # central differences: error of order step^2 and rounding 1e-16 / 1e-6
        assert gradient[place] == pytest.approx((ahead - behind) / (2 * step[place]), rel=1e-6)


def test_long_run_variance_of_an_autoregression():
    random = np.random.default_rng(14)
    series = autoregressive(20000, 0.6, random, mean=0.0)
    found = ledoit_wolf._long_run_variance(series - series.mean())
    # sigma^2 / (1 - 0.6)^2; the slope is known to 0.006, so the result to about 4 %
    assert found == pytest.approx(1e-4 / 0.4**2, rel=0.1)


def test_block_resamples_equal_resampling_one_by_one():
    excess = normal(43, 2, seed=15)
    rows = np.concatenate([excess, excess**2], axis=1)
    differences, errors = ledoit_wolf._block_resamples(rows, 30, 5, seed=3)
    starts = np.random.default_rng(3).integers(43, size=(30, 8))
    for resample in range(30):
        blocks = [(start + np.arange(5)) % 43 for start in starts[resample]]
        drawn = rows[np.concatenate(blocks)]
        difference, gradient = ledoit_wolf._difference_and_gradient(drawn.mean(0))
        sums = [((rows[block] - drawn.mean(0)) @ gradient).sum() / 5**0.5 for block in blocks]
        # float64 through cumulative sums of 47 rows
        assert differences[resample] == pytest.approx(difference, rel=1e-9)
        assert errors[resample] == pytest.approx((np.mean(np.square(sums)) / 40) ** 0.5, rel=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sharpe_intervals({}), "at least one series, got none"),
        (lambda: sharpe_intervals({"a": [0.1, 0.2], "b": [0.1]}), r"same days, got lengths \[1, 2\]"),
        (lambda: sharpe_intervals({"a": [0.1, np.nan]}), "a must be finite and at least -1, got nan on day 1"),
        (lambda: sharpe_interval([0.1, 0.2], n_resamples=0), "n_resamples must be at least 1, got 0"),
        (lambda: sharpe_interval([0.1, 0.2], level=0.0), r"level .* got 0\.0"),
        (lambda: sharpe_interval([0.1, 0.2], mean_block=0.5), r"mean_block must be at least 1 day, got 0\.5"),
        (lambda: sharpe_difference_interval([0.1, 0.2], [0.1]), "baseline must cover the 2 days of the tracks, got 1"),
        (lambda: list(stationary_bootstrap(0, 5)), "at least 1, got 0 and 5"),
        (lambda: probabilistic_sharpe(0.1, 0.0, 1), "n_days must be at least 2, got 1"),
        (lambda: expected_maximum_sharpe(0, 1.0), "n_trials must be at least 1, got 0"),
        (lambda: expected_maximum_sharpe(5, -1.0), r"at least 0, got -1\.0"),
        (lambda: deflated_sharpe([0.1, 0.2], n_trials=3), "needs one of .* got both or none"),
        (lambda: deflated_sharpe([0.1, 0.2], n_trials=3, trial_sharpes=[1.0]), r"at least 2 numbers, got shape \(1,\)"),
        (lambda: ledoit_wolf_test([0.1] * 5, [0.1] * 4), "same days, at least 4, got 5 and 4"),
        (lambda: ledoit_wolf_test([0.1] * 3, [0.1] * 3), "at least 4, got 3 and 3"),
        (lambda: ledoit_wolf_test([0.1] * 8, [0.1] * 8, n_resamples=9, block=5), "block from 1 to 4, got 9 and 5"),
    ],
)
def test_bad_input_ends_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
