import math

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the extra [tda]")
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from lightning_modules.topology import bars as bars_module
from lightning_modules.topology.vectorisers import (
    BettiCurve,
    Landscape,
    PersistenceEntropy,
    PersistenceImage,
    PersistenceStatistics,
    Silhouette,
)

WHOLE = (0.0, 1.0)
ALL = [
    PersistenceImage((0, 1, 2)),
    PersistenceImage((1,), sigma=0.3, grid="per_stock"),
    PersistenceImage((1, 2), sigma=0.3, method="binned"),
    Landscape((0, 1, 2), n_bins=20, n_layers=3),
    BettiCurve((0, 1, 2), n_bins=20),
    Silhouette((0, 1, 2), n_bins=20, power=2),
    PersistenceEntropy(),
    PersistenceStatistics(),
    PersistenceStatistics(extended=True),
]


def random_diagrams(seed=0, counts=(7, 1, 12, 0, 3)):
    random = np.random.default_rng(seed)
    diagrams = []
    for count in counts:
        births = random.uniform(0.5, 2, (2, count))
        deaths = births + random.exponential(0.7, (2, count))
        loops, voids = (np.stack(pair, axis=1) for pair in zip(births, deaths, strict=True))
        diagrams.append(
            {0: np.stack([np.zeros(9), random.exponential(1, 9)], axis=1), 1: loops, 2: voids[: count // 2]}
        )
    return diagrams


def test_mass_of_an_image_is_the_number_of_bars():
    diagrams = [{0: np.array([[0.0, 1.2], [0.0, 2.0]]), 1: np.array([[1.0, 2.2], [1.5, 2.3], [1.4, 2.4]])}]
    wide = [{0: np.array([[0.0, 1e-9], [0.0, 4.0]]), 1: np.array([[0.0, 1e-9], [3.0, 6.0]])}]
    image = PersistenceImage((0, 1), n_bins=31, sigma=0.25, quantiles=WHOLE).fit(wide)
    row = image.transform(diagrams)[0]
    one_axis, plane = row[: 31**2], row[31**2 :]
    # All bars are at least 3 sigma inside the grid, 1.3e-3 of a Gaussian lies beyond on a side; a sum over nodes of
    # less than half a sigma integrates it to 1e-8.
    assert one_axis.sum() * 4 / (31**2 - 1) == pytest.approx(2, rel=2e-3)
    assert plane.sum() * (3 / 30) ** 2 == pytest.approx(3, rel=3e-3)


def test_image_is_the_formula_at_the_nodes():
    diagrams = random_diagrams()
    found = PersistenceImage((1,), n_bins=5, sigma=0.4, quantiles=WHOLE).fit_transform(diagrams)
    every = np.concatenate([diagram[1] for diagram in diagrams])
    lifetimes = every[:, 1] - every[:, 0]
    xs = np.linspace(every[:, 0].min(), every[:, 0].max(), 5)
    ys = np.linspace(lifetimes.min(), lifetimes.max(), 5)
    for row, diagram in zip(found, diagrams, strict=True):
        expected = [
            sum(math.exp(-((x - b) ** 2 + (y - d + b) ** 2) / (2 * 0.16)) / (2 * math.pi * 0.16) for b, d in diagram[1])
            for x in xs
            for y in ys
        ]
        np.testing.assert_allclose(row, expected, rtol=1e-10, atol=1e-14)  # rounding of exp of at most -70


def test_automatic_sigma_is_one_step_of_each_axis():
    bars = np.array([[1.0, 2.0], [1.0, 3.0], [5.0, 6.5]])  # births 1 .. 5, lifetimes 1 .. 2
    row = PersistenceImage((1,), n_bins=5, quantiles=WHOLE).fit_transform([{1: bars}])[0].reshape(5, 5)
    nodes = np.arange(5)
    expected = sum(
        np.outer(np.exp(-0.5 * (nodes - b) ** 2), np.exp(-0.5 * (nodes - y) ** 2)) for b, y in [(0, 0), (0, 4), (4, 2)]
    )
    # density per unit of axes of length 1: a step is 1 / 4
    np.testing.assert_allclose(row, expected * 16 / (2 * np.pi), rtol=1e-12)


@pytest.mark.parametrize("make", [PersistenceImage, Landscape, BettiCurve, Silhouette])
def test_grid_per_stock_is_a_fit_to_each_stock(make):
    diagrams = random_diagrams(1)
    own = make((1, 2), grid="per_stock").fit_transform(diagrams)
    for row, diagram in zip(own, diagrams, strict=True):
        alone = make((1, 2), quantiles=WHOLE).fit_transform([diagram])[0]
        np.testing.assert_allclose(row, alone, rtol=1e-9, atol=1e-12)  # nodes in another order of additions


def test_landscape_of_one_bar_is_a_triangle():
    nodes = np.linspace(1, 4, 13)
    found = Landscape((1,), n_bins=13, n_layers=2, quantiles=WHOLE).fit_transform([{1: np.array([[1.0, 4.0]])}])
    np.testing.assert_allclose(found[0, :13], np.minimum(nodes - 1, 4 - nodes), rtol=0, atol=1e-15)
    assert found[0].max() == 1.5
    assert (found[0, 13:] == 0).all()


@pytest.mark.parametrize("chunk", [2**22, 1])
def test_curves_equal_those_computed_bar_by_bar(monkeypatch, chunk):
    monkeypatch.setattr(bars_module, "_CHUNK_ENTRIES", chunk)
    diagrams = random_diagrams(2)
    every = np.concatenate([diagram[1] for diagram in diagrams])
    nodes = np.linspace(every[:, 0].min(), every[:, 1].max(), 17)
    arguments = {"n_bins": 17, "quantiles": WHOLE}
    layers = Landscape((1,), n_layers=3, **arguments).fit_transform(diagrams).reshape(-1, 3, 17)
    alive = BettiCurve((1,), **arguments).fit_transform(diagrams)
    weighted = Silhouette((1,), power=2, **arguments).fit_transform(diagrams)
    for stock, diagram in enumerate(diagrams):
        for place, t in enumerate(nodes):
            tents = [max(0.0, min(t - b, d - t)) for b, d in diagram[1]]
            np.testing.assert_allclose(layers[stock, :, place], [*sorted(tents)[::-1], 0, 0, 0][:3], atol=1e-14)
            assert alive[stock, place] == sum(b <= t < d for b, d in diagram[1])
            weights = [(d - b) ** 2 for b, d in diagram[1]]
            mean = sum(w * tent for w, tent in zip(weights, tents, strict=True)) / (sum(weights) or 1)
            assert weighted[stock, place] == pytest.approx(mean, abs=1e-13)  # a few roundings of numbers below 4


def test_silhouette_of_a_large_power_is_the_longest_bar():
    diagrams = [{1: np.array([[1.0, 1.0001], [1.0, 1.5], [1.2, 2.2]])}]
    nodes = np.linspace(1, 2.2, 100)
    found = Silhouette((1,), power=2000, quantiles=WHOLE).fit_transform(diagrams)[0]
    np.testing.assert_allclose(found, np.clip(np.minimum(nodes - 1.2, 2.2 - nodes), 0, None), atol=1e-12)


def test_betti_curve_integrates_to_the_total_lifetime():
    diagrams = random_diagrams(3)
    curve = BettiCurve((1,), n_bins=20_001, quantiles=WHOLE).fit(diagrams)
    step = (curve.high_[0, 0] - curve.low_[0, 0]) / 20_000
    total = [sum(d - b for b, d in diagram[1]) for diagram in diagrams]
    # each bar is counted at the nodes within it: off by at most a step
    np.testing.assert_allclose(curve.transform(diagrams).sum(1) * step, total, rtol=0, atol=12 * step)


def test_entropy_of_equal_bars_is_the_logarithm_of_their_number():
    diagrams = [{1: np.array([[1.0, 2.0]] * count)} for count in (1, 8, 3)] + [{1: np.empty((0, 2))}]
    found = PersistenceEntropy((1,)).fit_transform(diagrams)
    np.testing.assert_allclose(found[:, 0], [0, 3, np.log2(3), 0], atol=1e-15)
    assert not np.signbit(found).any()


def slow_heat_norm(bars, sigma):
    """By quadrature over the plane."""
    nodes = np.linspace(-6, 12, 600)
    x, y = np.meshgrid(nodes, nodes, indexing="ij")
    total = sum(
        np.exp(-((x - b) ** 2 + (y - d) ** 2) / (2 * sigma**2))
        - np.exp(-((x - d) ** 2 + (y - b) ** 2) / (2 * sigma**2))
        for b, d in bars
    ) / (2 * np.pi * sigma**2)
    return math.sqrt((total**2).sum()) * (nodes[1] - nodes[0])


def test_amplitudes_are_their_definitions():
    diagrams = random_diagrams(4)
    vectoriser = PersistenceStatistics((1,), n_bins=4001).fit(diagrams)
    table = dict(zip(vectoriser.get_feature_names_out(), vectoriser.transform(diagrams).T, strict=True))
    sigma = 0.1 * (vectoriser.high_[0, 0] - vectoriser.low_[0, 0])
    for stock, diagram in enumerate(diagrams):
        bars = diagram[1]
        lifetimes = [d - b for b, d in bars]
        assert table["h1_count"][stock] == len(bars)
        assert table["h1_bottleneck"][stock] == pytest.approx(max(lifetimes, default=0) / 2, abs=1e-15)
        halves = math.sqrt(sum((life / 2) ** 2 for life in lifetimes))
        assert table["h1_wasserstein"][stock] == pytest.approx(halves, rel=1e-12)
        overlaps = sum(max(0.0, min(d, e) - max(b, c)) for b, d in bars for c, e in bars)
        assert table["h1_betti"][stock] == pytest.approx(math.sqrt(overlaps), rel=1e-12)
        # the rule of rectangles over 600 nodes of a Gaussian several nodes wide
        assert table["h1_heat"][stock] == pytest.approx(slow_heat_norm(bars, sigma), rel=1e-6, abs=1e-12)
        nodes = np.linspace(min((b for b, _ in bars), default=0), max((d for _, d in bars), default=0), 9001)
        tents = [np.clip(np.minimum(nodes - b, d - nodes), 0, None) for b, d in bars] or [0 * nodes]
        norm = math.sqrt((np.max(tents, axis=0) ** 2).mean() * (nodes[-1] - nodes[0]))
        # two grids of 4,001 and 9,001 nodes: both are off by about one step of the axis
        assert table["h1_landscape"][stock] == pytest.approx(norm, rel=1e-3, abs=1e-12)
        mean = np.average(tents, axis=0, weights=lifetimes or [1])
        norm = math.sqrt((mean**2).mean() * (nodes[-1] - nodes[0]))
        assert table["h1_silhouette"][stock] == pytest.approx(norm, rel=1e-3, abs=1e-12)


def test_there_are_23_statistics_and_the_extended_ones_are_named():
    diagrams = random_diagrams(5)
    plain, extended = PersistenceStatistics().fit(diagrams), PersistenceStatistics(extended=True).fit(diagrams)
    assert plain.transform(diagrams).shape == (5, 23)
    names = extended.get_feature_names_out().tolist()
    assert len(set(names)) == len(names) == extended.transform(diagrams).shape[1]
    columns = dict(zip(names, extended.transform(diagrams).T, strict=True))
    for name, column in zip(plain.get_feature_names_out(), plain.transform(diagrams).T, strict=True):
        np.testing.assert_array_equal(columns[name], column)
    for stock, diagram in enumerate(diagrams):
        for degree, bars in diagram.items():
            if not len(bars):
                assert all(columns[name][stock] == 0 for name in names if name.startswith(f"h{degree}_"))
                continue
            lifetimes = bars[:, 1] - bars[:, 0]
            birth, death = bars[lifetimes.argmax()]
            expected = {
                "sum": lifetimes.sum(),
                "max": lifetimes.max(),
                "mean": lifetimes.mean(),
                "std": lifetimes.std(),
                "q25": np.quantile(lifetimes, 0.25),
                "q50": np.quantile(lifetimes, 0.5),
                "q75": np.quantile(lifetimes, 0.75),
                "longest_birth": birth,
                "longest_death": death,
            }
            roots = (bars[:, 0] + 1j * bars[:, 1]) * lifetimes / (np.sqrt(2) * np.linalg.norm(bars, axis=1))
            leading = np.concatenate([np.poly(roots)[1:4], np.zeros(3)])[:3]
            for k, coefficient in enumerate(leading):
                expected |= {f"polynomial_{2 * k}": coefficient.real, f"polynomial_{2 * k + 1}": coefficient.imag}
            place = list(extended.degrees).index(degree)
            extent = extended.high_[place, 0] - extended.low_[place, 0]
            for k, share in enumerate((0.01, 0.02, 0.05, 0.1, 0.2)):
                expected[f"stable_rank_{k}"] = (lifetimes >= share * extent).sum()
            for name, value in expected.items():
                # sums of at most 12 numbers; Newton's identities cancel to about 1e-13 of the largest term
                assert columns[f"h{degree}_{name}"][stock] == pytest.approx(value, rel=1e-10, abs=1e-10), name


def test_outliers_are_clipped_and_counted():
    random = np.random.default_rng(6)
    births = random.uniform(1, 2, 1000)
    bars = np.stack([births, births + random.uniform(0.1, 1, 1000)], axis=1)
    outlier = np.array([[40.0, 90.0]])
    diagrams = [{1: bars}, {1: np.concatenate([bars[:5], outlier])}]
    image = PersistenceImage((1,)).fit(diagrams)
    assert image.high_[0].max() < 2
    every = np.concatenate([bars, bars[:5], outlier])
    lifetimes = every[:, 1] - every[:, 0]
    outside = [(v < np.quantile(v, 0.005)) | (v > np.quantile(v, 0.995)) for v in (every[:, 0], lifetimes)]
    assert image.n_clipped_.tolist() == [(outside[0] | outside[1]).sum()]
    moved = [diagrams[0], {1: np.concatenate([bars[:5], [[image.high_[0, 0], image.high_[0].sum()]]])}]
    # the border itself is rounded once in birth + lifetime
    np.testing.assert_allclose(image.transform(diagrams), image.transform(moved), rtol=1e-9)
    stretched = PersistenceImage((1,), quantiles=WHOLE).fit(diagrams)
    assert stretched.n_clipped_.tolist() == [0]
    assert stretched.high_[0].tolist() == [40.0, 50.0]
    assert PersistenceImage((1,), grid="per_stock").fit(diagrams).n_clipped_.tolist() == [0]


@pytest.mark.parametrize("vectoriser", ALL, ids=repr)
def test_rows_do_not_depend_on_the_other_stocks_of_a_window(vectoriser):
    train, other = random_diagrams(7), random_diagrams(8, counts=(2, 0, 5))
    fitted = clone(vectoriser).fit(train)
    rows = fitted.transform(other)
    assert rows.dtype == np.float64
    assert np.isfinite(rows).all()
    for row, diagram in zip(rows, other, strict=True):
        np.testing.assert_array_equal(fitted.transform([diagram])[0], row)


@pytest.mark.parametrize("vectoriser", ALL, ids=repr)
def test_stocks_without_bars_are_zero_even_where_no_stock_has_any(vectoriser):
    nothing = [{degree: np.empty((0, 2)) for degree in (0, 1, 2)}] * 3
    rows = clone(vectoriser).fit_transform(nothing)
    assert rows.shape == (3, clone(vectoriser).fit_transform(random_diagrams()).shape[1])
    assert (rows == 0).all()


@pytest.mark.parametrize("vectoriser", ALL, ids=repr)
def test_state_round_trips_without_pickled_objects(vectoriser, tmp_path):
    fitted = clone(vectoriser).fit(random_diagrams(9))
    torch.save(fitted.state(), tmp_path / "state.pt")
    other = clone(vectoriser).load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    np.testing.assert_array_equal(other.transform(random_diagrams(10)), fitted.transform(random_diagrams(10)))
    np.testing.assert_array_equal(other.n_clipped_, fitted.n_clipped_)


def test_use_before_fit_is_refused():
    for call in (lambda: PersistenceImage().transform(random_diagrams()), lambda: Landscape().state()):
        with pytest.raises(NotFittedError):
            call()


@pytest.mark.parametrize(
    ("vectoriser", "message"),
    [
        (PersistenceImage(()), r"degrees must be different numbers from 0 on, at least one, got \(\)"),
        (BettiCurve((1, 1)), r"got \(1, 1\)"),
        (BettiCurve((3,)), r"diagram 0 must hold degree 3, it holds \[0, 1, 2\]"),
        (PersistenceImage(n_bins=1), "n_bins must be at least 2, got 1"),
        (PersistenceImage(sigma=0.0), "sigma must be auto or a positive number with method formula, got 0.0"),
        (PersistenceImage(sigma="one"), "got 'one'"),
        (PersistenceImage(method="binned"), "sigma must be a positive number with method binned, got 'auto'"),
        (PersistenceImage(method="blurred"), "method must be formula or binned, got 'blurred'"),
        (Landscape(grid="own"), "grid must be shared or per_stock, got 'own'"),
        (Landscape(n_layers=0), "n_layers must be at least 1, got 0"),
        (Silhouette(quantiles=(0.9, 0.1)), r"increase within 0..1, got \(0.9, 0.1\)"),
        (Silhouette(power=-1), "power must be at least 0, got -1"),
    ],
)
def test_arguments_that_are_not_allowed_are_named(vectoriser, message):
    with pytest.raises(ValueError, match=message):
        vectoriser.fit(random_diagrams())


def test_state_of_another_vectoriser_is_refused():
    with pytest.raises(ValueError, match=r"state must have \(1, 2\) degrees and axes, got \(1, 1\)"):
        PersistenceImage((1,)).load_state(Landscape((1,)).fit(random_diagrams()).state())
    with pytest.raises(ValueError, match="at least one diagram, got none"):
        PersistenceImage().fit([])
