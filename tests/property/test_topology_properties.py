import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.topology import embed, persistence_diagrams, scale_returns, search_parameters

pytest.importorskip("gudhi", reason="the extra [tda]")
pytest.importorskip("sklearn", reason="the extra [tda]")
from lightning_modules.topology.vectorisers import BettiCurve, Landscape, PersistenceEntropy, PersistenceStatistics

seeds = st.integers(0, 10_000)
modest = settings(max_examples=25, deadline=None)


def cloud(seed, n_points=25, dimension=3):
    return np.random.default_rng(seed).standard_t(4, (n_points, dimension))


def diagram_of(points, degrees=(0, 1, 2)):
    return persistence_diagrams([points], degrees, backend="gudhi")[0]


@modest
@given(seed=seeds, backend=st.sampled_from(["gudhi", "giotto"]))
def test_order_of_points_does_not_matter(seed, backend):
    if backend == "giotto":
        pytest.importorskip("gtda", reason="the extra [tda]")
    points = cloud(seed)
    order = np.random.default_rng(seed + 1).permutation(len(points))
    one, other = persistence_diagrams([points, points[order]], backend=backend)
    for degree in (0, 1, 2):
        np.testing.assert_array_equal(one[degree], other[degree])


@modest
@given(seed=seeds, exponent=st.integers(-8, 8), factor=st.floats(0.01, 100))
def test_births_and_deaths_scale_with_the_series(seed, exponent, factor):
    points = cloud(seed)
    plain = diagram_of(points)
    twice = diagram_of(points * 2.0**exponent)
    for degree in (0, 1, 2):
        np.testing.assert_array_equal(twice[degree], plain[degree] * 2.0**exponent)  # powers of two round alike
    scaled = diagram_of(points * factor, (0,))[0]
    # distances are rounded to float32 once on each side
    np.testing.assert_allclose(scaled[:, 1], plain[0][:, 1] * factor, rtol=2e-7)


@modest
@given(seed=seeds, amount=st.floats(1e-6, 0.1))
def test_diagrams_are_stable(seed, amount):
    """Moving points by at most e moves distances by at most 2 e, and so any sorted list of deaths of degree 0."""
    points = cloud(seed)
    move = np.random.default_rng(seed + 1).standard_normal(points.shape)
    move *= amount / np.linalg.norm(move, axis=1, keepdims=True)
    before, after = (diagram_of(p, (0, 1)) for p in (points, points + move))
    # 1e-6: float32 of distances below 20
    assert np.abs(np.sort(before[0][:, 1]) - np.sort(after[0][:, 1])).max() <= 2 * amount + 1e-6
    longest = [np.diff(diagram[1]).max(initial=0) for diagram in (before, after)]
    assert abs(longest[0] - longest[1]) <= 4 * amount + 2e-6


@modest
@given(seed=seeds)
def test_every_loop_is_born_and_dies_among_the_distances(seed):
    points = cloud(seed)
    distances = np.unique(np.linalg.norm(points[:, None] - points, axis=2).astype(np.float32))
    diagram = diagram_of(points)
    for degree in (1, 2):
        # norm and pdist may round the last bit of float64 differently, and so the last one of float32
        nearest = np.abs(diagram[degree].reshape(-1, 1) - distances).min(1, initial=np.inf)
        assert (nearest <= 2e-6).all()


@modest
@given(seed=seeds, shift=st.floats(-0.01, 0.01), exponent=st.integers(-4, 4), compat=st.booleans())
def test_search_sees_neither_level_nor_volatility(seed, shift, exponent, compat):
    series = np.random.default_rng(seed).standard_t(4, 200)
    plain = search_parameters(series, max_dimension=4, max_delay=10, giotto_compat=compat)
    moved = search_parameters(series * 2.0**exponent, max_dimension=4, max_delay=10, giotto_compat=compat)
    assert plain == moved
    scaled = scale_returns((0.01 * series + shift)[None], "zscore").values[0]
    assert np.abs(scaled - scale_returns(series[None], "zscore").values[0]).max() < 1e-10  # rounding of the shift


@modest
@given(n_days=st.integers(30, 90), dimension=st.integers(1, 5), delay=st.integers(1, 6), stride=st.integers(1, 7))
def test_embedding_holds_the_latest_returns_at_the_stated_places(n_days, dimension, delay, stride):
    points = embed(np.arange(float(n_days)), dimension, delay, stride)
    assert points[-1, -1] == n_days - 1
    assert 0 <= points[0, 0] < stride
    np.testing.assert_array_equal(np.diff(points[:, 0]), stride)
    np.testing.assert_array_equal(points, points[:, :1] + delay * np.arange(dimension))


@modest
@given(seed=seeds, n_bars=st.integers(1, 30))
def test_vectors_of_two_diagrams_together(seed, n_bars):
    """Betti curves add, landscapes take the larger, entropy of two copies is one bit more."""
    random = np.random.default_rng(seed)
    births = random.uniform(0, 1, (2, n_bars))
    one, other = np.stack([births, births + random.exponential(1, (2, n_bars))], axis=2)
    both = [{1: one}, {1: other}, {1: np.concatenate([one, other])}, {1: np.concatenate([one, one])}]
    curves = BettiCurve((1,)).fit_transform(both)
    np.testing.assert_array_equal(curves[2], curves[0] + curves[1])
    layers = Landscape((1,)).fit_transform(both)
    np.testing.assert_array_equal(layers[2], np.maximum(layers[0], layers[1]))
    entropy = PersistenceEntropy((1,)).fit_transform(both)[:, 0]
    assert entropy[3] == pytest.approx(entropy[0] + 1, abs=1e-12)
    statistics = PersistenceStatistics((1,), extended=True).fit(both)
    names = statistics.get_feature_names_out().tolist()
    table = statistics.transform(both)
    for name in ("h1_count", "h1_sum", "h1_stable_rank_2"):
        column = table[:, names.index(name)]
        assert column[2] == pytest.approx(column[0] + column[1], rel=1e-12)
    squares = table[:, names.index("h1_wasserstein")] ** 2
    assert squares[2] == pytest.approx(squares[0] + squares[1], rel=1e-12)
