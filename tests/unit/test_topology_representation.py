import copy
import logging

import numpy as np
import pytest
import torch

from lightning_modules.topology import TopologicalRepresentation, embed, persistence_diagrams, search_parameters

pytest.importorskip("gudhi", reason="the extra [tda]")
pytest.importorskip("sklearn", reason="the extra [tda]")
from lightning_modules.topology.vectorisers import Landscape, PersistenceImage, PersistenceStatistics

SMALL = {"max_dimension": 4, "max_delay": 12, "backend": "gudhi", "cache_dir": None, "progress": False}


def returns_of(n_stocks=6, n_days=160, seed=0):
    random = np.random.default_rng(seed)
    days = np.arange(n_days)
    noise = random.standard_t(4, (n_stocks, n_days))
    return torch.from_numpy(0.02 * (noise + np.sin(2 * np.pi * days / (7 + 3 * np.arange(n_stocks)[:, None]))))


def zscored(returns):
    values = returns.double().numpy()
    return (values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True)


def test_rows_are_vectors_of_diagrams_of_scaled_embeddings():
    returns = returns_of()
    found = TopologicalRepresentation(dimension=3, delay=4, **SMALL).fit(returns)(returns)
    clouds = [embed(series, 3, 4, 5) for series in zscored(returns)]
    expected = PersistenceImage((1,)).fit_transform(persistence_diagrams(clouds, (1,), backend="gudhi"))
    # torch and numpy do not divide alike in the last bit, which can move a distance by one bit of float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert found.shape == (6, 100)
    assert found.dtype == torch.float64


def test_one_embedding_has_the_truncated_means_of_the_searched():
    returns = returns_of()
    searched = [search_parameters(series, max_dimension=4, max_delay=12) for series in zscored(returns)]
    assert len(set(searched)) > 1
    one = TopologicalRepresentation(**SMALL).fit(returns)
    assert one.parameters_ == [tuple(sum(column) // len(searched) for column in zip(*searched, strict=True))]
    own = TopologicalRepresentation(embedding="mult", **SMALL).fit(returns)
    assert own.parameters_ == searched
    compat = TopologicalRepresentation(embedding="mult", giotto_compat=True, **SMALL).fit(returns)
    assert compat.parameters_ == [
        search_parameters(series, max_dimension=4, max_delay=12, stride=5, giotto_compat=True)
        for series in zscored(returns)
    ]


def test_a_given_number_replaces_the_searched_one():
    returns = returns_of()
    searched = TopologicalRepresentation(**SMALL).fit(returns).parameters_[0]
    assert TopologicalRepresentation(dimension=7, **SMALL).fit(returns).parameters_ == [(7, searched[1])]
    assert TopologicalRepresentation(delay=2, **SMALL).fit(returns).parameters_ == [(searched[0], 2)]


def test_each_stock_keeps_its_own_embedding_in_another_window():
    model = TopologicalRepresentation(embedding="mult", **SMALL).fit(returns_of())
    later = returns_of(seed=1)
    for series, parameters, diagram in zip(zscored(later), model.parameters_, model.diagrams(later), strict=True):
        (expected,) = persistence_diagrams([embed(series, *parameters, 5)], (1,), backend="gudhi")
        np.testing.assert_allclose(diagram[1], expected[1], rtol=0, atol=1e-5)
    fewer = returns_of(3, seed=1)
    again = TopologicalRepresentation(embedding="mult", **SMALL).fit(fewer)
    for ours, theirs in zip(model.diagrams(fewer), again.diagrams(fewer), strict=True):
        np.testing.assert_array_equal(ours[1], theirs[1])


def test_later_returns_do_not_move_the_grid():
    train, later = returns_of(), returns_of(seed=2)
    model = TopologicalRepresentation(vectoriser=Landscape(), **SMALL).fit(train)
    before = model(train)
    low = model.vectoriser.low_.copy()
    model(later * 1e3)
    np.testing.assert_array_equal(model.vectoriser.low_, low)
    assert torch.equal(model(train), before)
    assert torch.equal(model(later)[2:4], model(later[2:4]))


@pytest.mark.parametrize("embedding", ["one", "mult"])
def test_state_dict_round_trips_through_a_safe_file(tmp_path, embedding):
    def make():
        return TopologicalRepresentation(vectoriser=PersistenceStatistics((0, 1)), embedding=embedding, **SMALL)

    fitted = make().fit(returns_of())
    torch.save(fitted.state_dict(), tmp_path / "state.pt")
    other = make()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    later = returns_of(seed=3)
    assert torch.equal(other(later), fitted(later))
    assert other.parameters_ == fitted.parameters_
    unfitted = make()
    unfitted.load_state_dict(make().state_dict())
    with pytest.raises(ValueError, match="must be fitted before use"):
        unfitted(later)


def test_same_numbers_every_time_and_after_a_copy():
    returns = returns_of()
    one, other = (TopologicalRepresentation(**SMALL).fit(returns) for _ in range(2))
    assert torch.equal(one(returns), other(returns))
    copied = copy.deepcopy(one)
    copied.fit(returns_of(seed=4))
    assert torch.equal(one(returns), other(returns))


def test_diagrams_are_computed_once_for_a_window(monkeypatch):
    calls = []

    def counted(clouds, *arguments, **options):
        calls.append(len(clouds))
        return persistence_diagrams(clouds, *arguments, **options)

    monkeypatch.setattr("lightning_modules.topology.representation.persistence_diagrams", counted)
    returns = returns_of()
    model = TopologicalRepresentation(**SMALL).fit(returns)
    model(returns)
    model.diagrams(returns)
    assert calls == [6]
    model(returns[:3])
    assert calls == [6, 3]


def test_more_degrees_for_the_report_than_for_the_vector():
    returns = returns_of()
    model = TopologicalRepresentation(degrees=(0, 1, 2), **SMALL).fit(returns)
    assert sorted(model.diagrams(returns)[0]) == [0, 1, 2]
    plain = TopologicalRepresentation(**SMALL).fit(returns)
    assert sorted(plain.diagrams(returns)[0]) == [1]
    assert torch.equal(model(returns), plain(returns))


def test_constant_stocks_have_no_bars_and_do_not_count_in_the_search(caplog):
    returns = returns_of()
    with_flat = torch.cat([returns, torch.full((3, returns.shape[1]), 0.001, dtype=torch.float64)])
    plain = TopologicalRepresentation(**SMALL).fit(returns)
    with caplog.at_level(logging.WARNING):
        model = TopologicalRepresentation(**SMALL).fit(with_flat)
    assert "3 of 9 stocks have constant returns" in caplog.text
    assert model.parameters_ == plain.parameters_
    rows = model(with_flat)
    assert (rows[6:] == 0).all()
    assert torch.equal(rows[:6], plain(returns))
    alone = TopologicalRepresentation(**SMALL).fit(with_flat[6:])
    assert (alone(with_flat[6:]) == 0).all()


def test_dtype_follows_the_input_and_the_computation_does_not():
    returns = returns_of().float()
    model = TopologicalRepresentation(**SMALL).fit(returns)
    assert model(returns).dtype == torch.float32
    assert torch.equal(model(returns), model(returns.double()).float())


def test_built_from_a_configuration():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--representation", type=torch.nn.Module)
    parsed = parser.parse_object(
        {
            "representation": {
                "class_path": "lightning_modules.topology.TopologicalRepresentation",
                "init_args": {
                    "vectoriser": {
                        "class_path": "lightning_modules.topology.vectorisers.PersistenceImage",
                        "init_args": {"degrees": [1, 2], "sigma": 0.0005, "grid": "per_stock"},
                    },
                    "scale": "none",
                    "backend": "gudhi",
                    "degrees": [0, 1, 2],
                },
            }
        }
    )
    built = parser.instantiate(parsed).representation
    assert isinstance(built.vectoriser, PersistenceImage)
    assert built.vectoriser.sigma == 0.0005
    assert built.degrees == (0, 1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": "std"}, "scale must be one of none, zscore, mad, vol_garch, got 'std'"),
        ({"embedding": "own"}, "embedding must be one of one, mult, got 'own'"),
        ({"backend": "ripser"}, "backend must be one of giotto, gudhi, got 'ripser'"),
        ({"dimension": 0}, "dimension must be at least 1, got 0"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"degrees": (0,)}, r"degrees must hold those of the vectoriser, \(1,\), got \(0,\)"),
    ],
)
def test_arguments_that_are_not_allowed_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        TopologicalRepresentation(**arguments)


def test_windows_that_are_too_short_or_not_finite_are_named():
    with pytest.raises(ValueError, match="needs at least 362 days, got 160: lower max_dimension or max_delay"):
        TopologicalRepresentation(cache_dir=None, progress=False).fit(returns_of())
    returns = returns_of()
    returns[2, 3] = np.nan
    with pytest.raises(ValueError, match="must be finite, got nan for stock 2 on day 3"):
        TopologicalRepresentation(**SMALL).fit(returns)
