import numpy as np
import pytest
from scipy.stats import norm

from lightning_modules.metrics.multiple_testing import holm


def test_equals_an_example_by_hand():
    found = holm([0.01, 0.04, 0.03, 0.005], alpha=0.05)
    # sorted .005 .01 .03 .04 times 4 3 2 1: .02 .03 .06 .04, and never less than the one before: .06 for the last
    np.testing.assert_allclose(found.p_values, [0.03, 0.06, 0.06, 0.02], rtol=1e-15, atol=0)
    assert found.rejected.tolist() == [True, False, False, True]
    # the third rank is judged at .05 / 2 and kept, so the fourth is judged there too
    np.testing.assert_allclose(found.levels, [0.05 / 3, 0.025, 0.025, 0.0125], rtol=1e-15, atol=0)


@pytest.mark.parametrize("shift", [1.5, 3.0])
def test_interval_at_its_level_excludes_zero_exactly_where_rejected(shift):
    random = np.random.default_rng(0)
    outcomes = set()
    for _ in range(50):
        z = random.standard_normal(6) + shift
        found = holm(2 * norm.sf(np.abs(z)))
        excludes = np.abs(z) > norm.isf(found.levels / 2)
        assert (excludes == found.rejected).all()
        outcomes |= set(found.rejected.tolist())
    assert outcomes == {False, True}


def test_false_rejections_of_any_of_ten_stay_below_the_level():
    random = np.random.default_rng(1)
    false = sum(holm(random.random(10)).rejected.any() for _ in range(2000))
    # binomial(2000, .05) has mean 100 and s.d. 9.7; uncorrected, 803 would be expected
    assert 60 <= false <= 140


def test_nothing_and_ones():
    assert holm([]).p_values.shape == (0,)
    assert holm([1.0, 1.0]).p_values.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: holm([0.1, np.nan]), r"p_values must lie in 0\.\.1, got nan at position 1"),
        (lambda: holm([1.5]), r"got 1\.5 at position 0"),
        (lambda: holm([[0.1]]), r"one row of numbers, got shape \(1, 1\)"),
        (lambda: holm([0.1], alpha=1.0), r"alpha must lie strictly between 0 and 1, got 1\.0"),
    ],
)
def test_bad_input_ends_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
