from fractions import Fraction
from math import ceil, comb

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.attacks.thresholds import (
    Threshold,
    binomial_share,
    conformal_threshold,
    mean_difference_interval,
    n_clean_required,
)


def test_fewest_clean_series():
    assert [n_clean_required(alpha) for alpha in (0.05, 0.01, 0.1, 0.3, 0.5)] == [19, 99, 9, 3, 1]


@pytest.mark.parametrize("alpha", [0.05, 0.01, 0.1, 0.3])
def test_one_series_less_is_not_resolvable(alpha):
    enough = n_clean_required(alpha)
    found = conformal_threshold(torch.arange(float(enough)), alpha)
    assert found.resolvable
    assert found.value == enough - 1  # the largest score
    lacking = conformal_threshold(torch.arange(float(enough - 1)), alpha)
    assert not lacking.resolvable
    assert str(lacking) == f"not resolvable (n = {enough - 1})"
    with pytest.raises(ValueError, match=rf"not resolvable \(n = {enough - 1}\): at least {enough} clean series"):
        lacking.flag(torch.zeros(1))


@settings(max_examples=50, deadline=None)
@given(
    clean=st.lists(st.integers(0, 6), min_size=1, max_size=60),
    alpha=st.sampled_from(["0.05", "0.1", "0.2", "0.37"]),
    seed=st.integers(0, 100),
)
def test_threshold_is_the_order_statistic_and_bounds_leave_one_in(clean, alpha, seed):
    """Among n + 1 exchangeable series, the one left out is flagged for at most alpha of them, ties included."""
    rank = ceil((len(clean) + 1) * (1 - Fraction(alpha)))
    found = conformal_threshold(torch.tensor(clean, dtype=torch.float32), float(alpha))
    assert found.resolvable == (rank <= len(clean)) == (len(clean) >= n_clean_required(float(alpha)))
    if found.resolvable:
        assert found.value == sorted(clean)[rank - 1]
    together = np.append(clean, np.random.default_rng(seed).integers(0, 7)).astype(float)
    flagged = 0
    for left_out in range(len(together)):
        calibrated = conformal_threshold(torch.tensor(np.delete(together, left_out)), float(alpha))
        if calibrated.resolvable:
            flagged += int(calibrated.flag(torch.tensor(together[left_out])))
    assert flagged <= Fraction(alpha) * len(together)


def test_false_alarms_of_new_series_keep_the_bound():
    random = np.random.default_rng(0)
    rates = []
    for _ in range(400):
        found = conformal_threshold(torch.tensor(random.standard_t(3, 39)), 0.05)
        rates.append(found.realised(torch.tensor(random.standard_t(3, 200))).share)
    # exactly 2 / 40 on average: the 38th of 39; the mean of 400 rates, each of s.d. about 0.037, has s.d. 0.002
    assert np.mean(rates) == pytest.approx(0.05, abs=0.007)


def test_ties_raise_no_alarm():
    found = conformal_threshold(torch.ones(50), 0.05)
    assert found.flag(torch.tensor([1.0, 1.0 + 1e-6])).tolist() == [False, True]
    assert found.realised(torch.ones(30)).share == 0


def tail(n, k, p):
    """P(X >= k) of a binomial, term by term."""
    return sum(comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (1, 20), (7, 20), (19, 20), (54, 60), (1, 1)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_ends_of_the_exact_interval_have_the_stated_tails(k, n, level):
    found = binomial_share(k, n, level)
    assert found[0] == k / n
    assert found[3:] == (k, n)
    # quantiles of the beta distribution to about 1e-12, times slopes of at most n
    if k:
        assert tail(n, k, found.low) == pytest.approx((1 - level) / 2, abs=1e-9)
    else:
        assert found.low == 0
    if k < n:
        assert 1 - tail(n, k + 1, found.high) == pytest.approx((1 - level) / 2, abs=1e-9)
    else:
        assert found.high == 1


def test_realised_rate_counts_strictly_above():
    found = Threshold(0.05, 100, 0.5).realised(torch.tensor([0.5, 0.6, 0.1, 0.4]))
    assert found == binomial_share(1, 4)


@pytest.mark.parametrize(("n", "n_series", "alpha"), [(50, 150, 0.05), (120, 40, 0.01), (19, 30, 0.05)])
def test_expected_alarms_are_quantiles_of_a_beta_binomial(n, n_series, alpha):
    """P(k alarms) by ranks: all orders of the scores alike, the r-th smallest of n has k of the others above it."""
    rank = ceil((n + 1) * (1 - Fraction(str(alpha))))
    orders = comb(n + n_series, n)
    chances = [
        comb(rank - 1 + n_series - k, rank - 1) * comb(n - rank + k, n - rank) / orders for k in range(n_series + 1)
    ]
    assert sum(chances) == pytest.approx(1)
    fewest, most = Threshold(alpha, n, 0.0).expected_alarms(n_series, 0.9)
    assert sum(chances[:fewest]) <= 0.05 < sum(chances[: fewest + 1])
    assert sum(chances[most + 1 :]) <= 0.05 < sum(chances[most:])


def test_an_exact_mean_over_judges_covers_whatever_the_judges_share():
    """Judges that agree, and judges that never do; a Clopper-Pearson interval for one."""
    assert mean_difference_interval([7], [], 20, 0.9) == binomial_share(7, 20, 0.9)[1:3]
    low, high = mean_difference_interval([0, 0, 0], [], 150)
    assert (low, high) == (0, pytest.approx(1 - (0.025 / 3) ** (1 / 150)))  # 0 hits leave (1 - p)^n = tail
    end = binomial_share(0, 150, 0.975).high
    assert mean_difference_interval([0], [0], 150) == (-end, end)
    random = np.random.default_rng(0)
    for chances in ([0.01, 0.01], [0.02, 0.5, 0.97]):
        for shared in (True, False):
            hits = 0
            for _ in range(300):
                luck = random.random((40, 1)) if shared else random.random((40, len(chances)))
                low, high = mean_difference_interval((luck < chances).sum(0).tolist(), [], 40)
                hits += low <= np.mean(chances) <= high
            assert hits >= 285, "it covers at least 95 %"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conformal_threshold(torch.zeros(30), 0.0), "alpha must lie strictly between 0 and 1, got 0.0"),
        (lambda: conformal_threshold(torch.tensor([0.0, torch.nan]), 0.5), "without NaN"),
        (lambda: conformal_threshold(torch.zeros(2, 2), 0.5), r"must be \(n,\) .* got shape \(2, 2\)"),
        (lambda: Threshold(0.5, 3, 1.0).flag(torch.tensor([torch.nan])), "scores must not be NaN, got 1 of 1"),
        (lambda: binomial_share(3, 2), "got 3 of 2"),
        (lambda: binomial_share(0, 0), "got 0 of 0"),
        (lambda: binomial_share(1, 2, 1.0), "level must lie strictly between 0 and 1"),
        (lambda: Threshold(0.5, 3, 1.0).realised(torch.zeros(0)), "got 0 of 0"),
        (lambda: Threshold(0.05, 3, None).expected_alarms(9), "at least 19 clean series are needed"),
        (lambda: mean_difference_interval([3], [], 2), "got 3 of 2"),
    ],
)
def test_bad_input_ends_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
