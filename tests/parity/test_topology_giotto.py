"""Ours against giotto-tda, where both mean the same."""

import warnings

import numpy as np
import polars as pl
import pytest

from lightning_modules.topology import embed, persistence_diagrams, scale_returns, search_parameters

pytest.importorskip("gtda", reason="the extra [tda]")
pytest.importorskip("gudhi", reason="the extra [tda]")
from gtda.diagrams import Amplitude, ComplexPolynomial
from gtda.diagrams import BettiCurve as GiottoBettiCurve
from gtda.diagrams import PersistenceEntropy as GiottoEntropy
from gtda.diagrams import PersistenceImage as GiottoImage
from gtda.diagrams import PersistenceLandscape as GiottoLandscape
from gtda.diagrams import Silhouette as GiottoSilhouette
from gtda.time_series import SingleTakensEmbedding

from lightning_modules.topology.bars import Bars, amplitudes, polynomial_coefficients
from lightning_modules.topology.vectorisers import (
    BettiCurve,
    Landscape,
    PersistenceEntropy,
    PersistenceImage,
    PersistenceStatistics,
    Silhouette,
)

WHOLE = (0.0, 1.0)


def heavy_tailed(n_stocks, n_days=500):
    return 0.01 * np.random.default_rng(0).standard_t(4, (n_stocks, n_days))


def real_returns(folder):
    """The two training years of the 451 complete stocks, ``(A, T)``."""
    prices = pl.read_parquet(folder / "sp500-2015-2020" / "adj_close.parquet").filter(pl.col("Date").dt.year() < 2017)
    table = prices.drop("Date").to_numpy().astype(np.float64)
    table = table[:, ~np.isnan(table).any(0)]
    return (table[1:] / table[:-1] - 1).T


def clouds_of(returns, n_stocks=30):
    return [embed(series, 4, 8, 5) for series in scale_returns(returns[:n_stocks], "zscore").values]


@pytest.fixture(scope="module")
def diagrams():
    return persistence_diagrams(clouds_of(heavy_tailed(30)), backend="gudhi")


def padded(diagrams, degrees):
    """As giotto-tda lays diagrams out: (stocks, bars, 3), filled up with bars of length 0 at the least birth."""
    columns = []
    for degree in degrees:
        most = max(len(diagram[degree]) for diagram in diagrams)
        least = min(diagram[degree][:, 0].min(initial=np.inf) for diagram in diagrams)
        table = np.full((len(diagrams), most, 3), (least, least, degree))
        for stock, diagram in enumerate(diagrams):
            table[stock, : len(diagram[degree]), :2] = diagram[degree]
        columns.append(table)
    return np.concatenate(columns, axis=1)


def assert_search_is_the_same(returns, stride):
    for number, series in enumerate(returns):
        theirs = SingleTakensEmbedding("search", time_delay=30, dimension=10, stride=stride).fit(series)
        ours = search_parameters(series, stride=stride, giotto_compat=True)
        assert ours == (theirs.dimension_, theirs.time_delay_), number
        np.testing.assert_array_equal(embed(series, *ours, stride), theirs.transform(series))


@pytest.mark.parametrize("stride", [1, 5])
def test_search_and_embedding(stride):
    days = np.arange(500)
    cycles = np.sin(2 * np.pi * days / 21) + 0.3 * heavy_tailed(4) * 100
    assert_search_is_the_same(np.concatenate([heavy_tailed(12), cycles, np.zeros((1, 500))]), stride)


def test_search_and_embedding_of_real_returns(real_data):
    assert_search_is_the_same(real_returns(real_data)[::9], 5)


@pytest.mark.parametrize("scale", ["none", "zscore"])
def test_backends_agree_on_real_returns(real_data, scale):
    values = scale_returns(real_returns(real_data)[::20], scale).values
    clouds = [embed(series, 4, 8, 5) for series in values]
    ours, theirs = (persistence_diagrams(clouds, backend=backend) for backend in ("gudhi", "giotto"))
    for one, other in zip(ours, theirs, strict=True):
        for degree in (0, 1, 2):
            # to the last bit: both are given distances that float32 holds exactly
            np.testing.assert_array_equal(one[degree], other[degree])


def test_diagrams_are_those_of_giotto_on_the_points_themselves():
    from gtda.homology import VietorisRipsPersistence

    clouds = clouds_of(heavy_tailed(8), 8)
    theirs = VietorisRipsPersistence(homology_dimensions=(0, 1, 2)).fit_transform(np.stack(clouds))
    for diagram, rows in zip(persistence_diagrams(clouds, backend="gudhi"), theirs, strict=True):
        for degree in (0, 1, 2):
            bars = rows[(rows[:, 2] == degree) & (rows[:, 0] < rows[:, 1]), :2]
            bars = bars[np.lexsort((bars[:, 1], bars[:, 0]))]
            # its distances come from a rounded difference of squares, up to 40, and then float32
            np.testing.assert_allclose(diagram[degree], bars, rtol=0, atol=1e-6)


def test_landscape(diagrams):
    theirs = GiottoLandscape(n_layers=3, n_bins=100).fit_transform(padded(diagrams, (1, 2)))
    ours = Landscape((1, 2), n_layers=3, quantiles=WHOLE).fit_transform(diagrams)
    # rounding of midpoint and half length instead of the two ends, of numbers below 8
    np.testing.assert_allclose(ours, theirs.reshape(len(ours), -1), rtol=0, atol=1e-14)
    assert ours.max() > 0.05


def test_betti_curve(diagrams):
    theirs = GiottoBettiCurve(n_bins=100).fit_transform(padded(diagrams, (0, 1, 2)))
    ours = BettiCurve((0, 1, 2), quantiles=WHOLE).fit_transform(diagrams)
    # A node that falls on a birth is alive or not by the last bit of the node: the first node alone may.
    np.testing.assert_array_equal(ours, theirs.reshape(len(ours), -1))


@pytest.mark.parametrize("power", [1.0, 2.5])
def test_silhouette(diagrams, power):
    theirs = GiottoSilhouette(power=power, n_bins=100).fit_transform(padded(diagrams, (1, 2)))
    ours = Silhouette((1, 2), power=power, quantiles=WHOLE).fit_transform(diagrams)
    np.testing.assert_allclose(ours, theirs.reshape(len(ours), -1), rtol=0, atol=1e-13)


def test_entropy(diagrams):
    empty = {degree: np.empty((0, 2)) for degree in (0, 1, 2)}
    theirs = GiottoEntropy().fit_transform(padded([*diagrams, empty], (0, 1, 2)))
    ours = PersistenceEntropy().fit_transform([*diagrams, empty])
    np.testing.assert_allclose(ours[:-1], theirs[:-1], rtol=1e-12)
    assert theirs[-1].tolist() == [-1, -1, -1]
    assert ours[-1].tolist() == [0, 0, 0]


@pytest.mark.filterwarnings("ignore:`product` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("sigma", [0.02, 0.3, 5.0])
def test_binned_image(diagrams, sigma):
    # As many bars of each, for the filling would count as lifetimes of 0 when giotto-tda lays out its axes.
    alike = [{degree: diagram[degree][: 20 if degree == 1 else 2] for degree in (1, 2)} for diagram in diagrams]
    theirs = GiottoImage(sigma=sigma, n_bins=10).fit_transform(padded(alike, (1, 2)))
    unturned = np.rot90(theirs, k=-1, axes=(2, 3))
    ours = PersistenceImage((1, 2), sigma=sigma, method="binned", quantiles=WHOLE).fit_transform(alike)
    scale = unturned.max()
    # 10 sums of products in another order
    np.testing.assert_allclose(ours, unturned.reshape(len(ours), -1), rtol=1e-11, atol=1e-13 * scale)


@pytest.mark.filterwarnings("ignore:`product` is deprecated:DeprecationWarning")
def test_binned_image_is_not_the_formula(diagrams):
    binned, formula = (
        PersistenceImage((1,), sigma=0.05, method=method).fit_transform(diagrams) for method in ("binned", "formula")
    )
    assert np.abs(binned - formula).max() > 0.5 * formula.max()
    wide = [
        PersistenceImage((1,), n_bins=60, sigma=0.5, method=m).fit_transform(diagrams) for m in ("binned", "formula")
    ]
    # where sigma is many steps, a shift of at most one step, 0.07 sigma, is all that is left of the difference
    assert np.abs(wide[0] - wide[1]).max() < 0.15 * wide[1].max()


@pytest.mark.parametrize(
    ("name", "metric", "parameters", "tolerance"),
    [
        ("bottleneck", "bottleneck", {}, 1e-12),
        ("wasserstein", "wasserstein", {"p": 2}, 1e-12),
        ("landscape", "landscape", {"n_bins": 400}, 1e-12),
        ("silhouette", "silhouette", {"n_bins": 400}, 1e-12),
        # ours is the exact integral of a step function that theirs samples at 20,000 nodes
        ("betti", "betti", {"n_bins": 20_000}, 1e-3),
        # theirs moves bars to pixels of 1/40 of sigma, merges those on the same one, and stops at the border
        ("heat", "heat", {"n_bins": 400, "sigma": 0.2}, 5e-2),
    ],
)
def test_amplitudes(diagrams, name, metric, parameters, tolerance):
    for diagram in diagrams[:4]:
        ours = amplitudes(Bars.of([diagram], 1), parameters.get("n_bins", 100), 0.2)[name]
        framed = padded([diagram], (1,))
        if metric == "heat":  # a wider frame, so that little of the Gaussians is cut off
            frame = np.array([[[-0.2, -0.2, 1], [framed[..., 1].max() + 1] * 2 + [1]]])
            framed = np.concatenate([framed, frame], axis=1)
        theirs = Amplitude(metric=metric, metric_params=parameters).fit_transform(framed)[0]
        np.testing.assert_allclose(ours, theirs, rtol=tolerance)


def test_complex_polynomial(diagrams):
    theirs = ComplexPolynomial(polynomial_type="S", n_coefficients=3).fit_transform(padded(diagrams, (1,)))
    ours = polynomial_coefficients(Bars.of(diagrams, 1), 3)
    # It lists three real parts, then three imaginary ones. The third coefficient is a sum over triples of about 35
    # roots, which Newton's identities and the product reach in different orders.
    np.testing.assert_allclose(ours.reshape(-1, 3, 2).swapaxes(1, 2).reshape(-1, 6), theirs, rtol=1e-8)


def test_statistics_run_without_warnings(diagrams):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PersistenceStatistics(extended=True).fit_transform(diagrams).shape[0] == len(diagrams)
