import numpy as np
import pytest

from lightning_modules.topology import embed, search_parameters
from lightning_modules.topology.takens import false_nearest_neighbours, mutual_information


def heavy_tailed(seed, n_days=400):
    return 0.01 * np.random.default_rng(seed).standard_t(4, n_days)


def test_points_end_at_the_last_day_and_are_a_stride_apart():
    series = np.arange(20.0)
    points = embed(series, dimension=3, delay=4, stride=5)
    # floor((20 - 8 - 1) / 5) + 1 = 3 points; the earliest day is left out
    np.testing.assert_array_equal(points, [[1, 5, 9], [6, 10, 14], [11, 15, 19]])


@pytest.mark.parametrize(("n_days", "dimension", "delay", "stride"), [(497, 4, 8, 5), (100, 1, 3, 7), (9, 3, 4, 2)])
def test_number_of_points_is_that_of_the_specification(n_days, dimension, delay, stride):
    points = embed(np.arange(float(n_days)), dimension, delay, stride)
    assert points.shape == ((n_days - (dimension - 1) * delay - 1) // stride + 1, dimension)
    assert points[-1, -1] == n_days - 1
    np.testing.assert_array_equal(np.diff(points, axis=1), delay)


@pytest.mark.parametrize("seed", range(3))
def test_mutual_information_equals_the_sum_over_a_histogram(seed):
    series = heavy_tailed(seed)
    expected = []
    for delay in (1, 2, 30):
        joint = np.histogram2d(series[:-delay], series[delay:], bins=100)[0]
        p = joint / joint.sum()
        independent = p.sum(1)[:, None] * p.sum(0)
        expected.append((p[p > 0] * np.log(p[p > 0] / independent[p > 0])).sum())
    found = mutual_information(series, 30)
    # both sum at most 400 terms below 6 in float64
    np.testing.assert_allclose(found[[0, 1, 29]], expected, rtol=1e-12)


def test_mutual_information_of_a_constant_is_exactly_zero():
    assert (mutual_information(np.full(400, 0.1), 30) == 0).all()


def slow_false_neighbours(series, delay, dimension):
    n_points = len(series) - dimension * delay
    vectors = [[series[k + i * delay] for i in range(dimension)] for k in range(n_points)]
    count = 0
    for k in range(n_points):
        distances = [np.linalg.norm(np.subtract(vectors[k], other)) for other in vectors]
        distances[k] = np.inf
        nearest = int(np.argmin(distances))
        step = abs(series[k + dimension * delay] - series[nearest + dimension * delay])
        count += step / distances[nearest] > 10 and distances[nearest] < 2 * np.std(series)
    return count


@pytest.mark.parametrize("block_entries", [2**15, 100])
def test_false_neighbours_equal_a_search_point_by_point(monkeypatch, block_entries):
    monkeypatch.setattr("lightning_modules.topology.takens._BLOCK_ENTRIES", block_entries)
    series = heavy_tailed(5, 90)
    found = false_nearest_neighbours(series, 3, 4)
    assert found.tolist() == [slow_false_neighbours(series, 3, dimension) for dimension in (1, 2, 3, 4)]
    assert found[0] > found[1] > 0


def test_a_plane_cycle_needs_two_dimensions_and_noise_needs_more():
    days = np.arange(500)
    cycle = np.sin(2 * np.pi * days / 23.7)
    assert search_parameters(cycle, max_dimension=6)[0] == 2
    assert np.mean([search_parameters(heavy_tailed(seed, 500), max_dimension=6)[0] for seed in range(8)]) > 3


def test_dimension_is_the_stated_argmin():
    series = heavy_tailed(9, 500)
    dimension, delay = search_parameters(series)
    counts = dict(enumerate(false_nearest_neighbours(series, delay, 12).tolist(), start=1))
    score = {k: abs(counts[k] - 2 * counts[k + 1] + counts[k + 2]) / ((counts[k + 1] + 1) * k) for k in range(2, 11)}
    assert dimension == min(score, key=lambda k: (score[k], k))
    assert delay == 1 + int(np.argmin(mutual_information(series, 30)))


@pytest.mark.parametrize("giotto_compat", [False, True])
def test_constant_series_gives_the_smallest_embedding(giotto_compat):
    assert search_parameters(np.full(400, 0.02), giotto_compat=giotto_compat) == (2, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: embed(np.zeros(8), 3, 4), "dimension 3 and delay 4 needs at least 9 days, got 8"),
        (lambda: embed(np.zeros(8), 0, 4), "dimension must be at least 1, got 0"),
        (lambda: embed([0.0, np.nan], 1, 1), "finite numbers, not so: day 1"),
        (lambda: embed(np.zeros((3, 3)), 1, 1), r"one row of finite numbers, not so: shape \(3, 3\)"),
        (lambda: mutual_information(np.zeros(8), 8), "max_delay must be from 1 to 7 for 8 days, got 8"),
        (lambda: false_nearest_neighbours(np.zeros(13), 3, 4), "need at least 14 days, got 13"),
        (lambda: search_parameters(np.zeros(361)), "dimension 10 and delay 30 needs at least 362 days, got 361"),
        (lambda: search_parameters(np.zeros(400), max_dimension=1), "max_dimension must be at least 2, got 1"),
        (lambda: search_parameters(np.zeros(400), stride=5), "stride must be 1 in the textbook's search, got 5"),
    ],
)
def test_what_cannot_be_embedded_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
