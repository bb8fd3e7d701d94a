import sys

import numpy as np
import pytest
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial.distance import pdist, squareform

from lightning_modules.topology import diagrams as module
from lightning_modules.topology import persistence_diagrams

pytest.importorskip("gtda", reason="the extra [tda]")
pytest.importorskip("gudhi", reason="the extra [tda]")

BACKENDS = ["giotto", "gudhi"]


def clouds(seed=0, n_clouds=6, n_points=40):
    random = np.random.default_rng(seed)
    return [random.standard_t(4, (n_points + i, 2 + i % 3)) for i in range(n_clouds)]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for degree in ours:
            np.testing.assert_array_equal(ours[degree], theirs[degree])


@pytest.mark.parametrize("backend", BACKENDS)
def test_circle_has_one_long_loop_of_known_birth_and_death(backend):
    angle = 2 * np.pi * np.arange(100) / 100
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    (diagram,) = persistence_diagrams([circle], backend=backend)
    assert len(diagram[0]) == 99
    assert len(diagram[1]) == 1
    birth, death = diagram[1][0]
    # Born with the chord over one step. Dies with the first triangle around the centre: its longest side spans at least
    # a third of the 100 steps, so 34. Distances carry the 6e-8 of float32.
    assert birth == pytest.approx(2 * np.sin(np.pi / 100), rel=1e-7)
    assert death == pytest.approx(2 * np.sin(34 * np.pi / 100), rel=1e-7)
    assert len(diagram[2]) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_deaths_of_degree_0_are_the_edges_of_the_minimum_spanning_tree(backend):
    for cloud, diagram in zip(clouds(), persistence_diagrams(clouds(), (0,), backend=backend), strict=True):
        rounded = squareform(pdist(cloud).astype(np.float32).astype(float))
        edges = np.sort(minimum_spanning_tree(rounded).data)
        np.testing.assert_array_equal(diagram[0][:, 1], edges)
        assert (diagram[0][:, 0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_degenerate_clouds(backend):
    square = np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    found = persistence_diagrams([np.ones((5, 3)), np.ones((1, 2)), square, np.eye(3)], backend=backend)
    assert [[len(diagram[degree]) for degree in (0, 1, 2)] for diagram in found] == [
        [0, 0, 0],
        [0, 0, 0],
        [3, 1, 0],
        [2, 0, 0],
    ]
    np.testing.assert_array_equal(found[2][1], [[1.0, np.float32(np.sqrt(2))]])
    assert found[0][1].shape == (0, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_degrees_are_given_as_asked(backend):
    everything = persistence_diagrams(clouds(), (0, 1, 2), backend=backend)
    swapped = persistence_diagrams(clouds(), (2, 0), backend=backend)
    assert_same(swapped, [{2: diagram[2], 0: diagram[0]} for diagram in everything])
    for diagram in everything:
        for bars in diagram.values():
            assert (bars[:, 0] < bars[:, 1]).all()
            assert bars.tolist() == sorted(bars.tolist())


@pytest.mark.parametrize("backend", BACKENDS)
def test_workers_change_nothing(backend):
    many = clouds(1, 12, 20)
    assert_same(persistence_diagrams(many, backend=backend, n_workers=2), persistence_diagrams(many, backend=backend))


def test_cache_is_read_and_depends_on_everything(tmp_path, monkeypatch):
    first = persistence_diagrams(clouds(), cache_dir=str(tmp_path / "new" / "folder"))
    folder = tmp_path / "new" / "folder"
    assert len(list(folder.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(module, "_computed", lambda *_: pytest.fail("computed again"))
        assert_same(persistence_diagrams(clouds(), cache_dir=str(folder)), first)
    moved = clouds()
    moved[3][0, 0] = np.nextafter(moved[3][0, 0], 1)
    transposed = [moved[0].reshape(moved[0].shape[::-1]), *moved[1:]]
    for changed, degrees in (
        (clouds(), (0, 1)),
        (moved, (0, 1, 2)),
        (transposed, (0, 1, 2)),
        (clouds()[1:], (0, 1, 2)),
    ):
        persistence_diagrams(changed, degrees, cache_dir=str(folder))
    persistence_diagrams(clouds(), cache_dir=str(folder), backend="gudhi")
    assert len(list(folder.iterdir())) == 6


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_damaged_cache_is_computed_anew_and_mended(tmp_path, damage):
    expected = persistence_diagrams(clouds(), cache_dir=str(tmp_path))
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    if damage == "foreign":
        with file.open("wb") as stream:
            np.savez(stream, bars=np.zeros((3, 2)), counts=np.ones((3, 1), int))
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        file.write_bytes({"cut": whole[:middle], "flipped": flipped, "empty": b""}[damage])
    assert_same(persistence_diagrams(clouds(), cache_dir=str(tmp_path)), expected)
    assert file.read_bytes() == whole


def test_cache_is_never_half_written(tmp_path, monkeypatch):
    def interrupted(stream, **arrays):
        stream.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        persistence_diagrams(clouds(), cache_dir=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_progress_bar_is_shown_on_a_terminal_alone(capsys, monkeypatch):
    persistence_diagrams(clouds(), (0,), progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    persistence_diagrams(clouds(), (0,), progress=True)
    assert "persistence diagrams:   0%|          | 0/6" in capsys.readouterr().err
    persistence_diagrams(clouds(), (0,))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("backend", "package"), [("giotto", "gtda"), ("gudhi", "gudhi")])
def test_missing_package_is_named(monkeypatch, backend, package):
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)

    class Absent:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match=f"No module named '{package}'"):
        persistence_diagrams(clouds(), backend=backend)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: persistence_diagrams([]), "at least one cloud, got none"),
        (lambda: persistence_diagrams([np.ones((3, 2)), np.ones((0, 2))]), r"cloud 1 must have shape .* got \(0, 2\)"),
        (lambda: persistence_diagrams([np.array([[0, 1], [np.nan, 2]])]), r"finite, got \[nan, 2.0\] as point 1"),
        (
            lambda: persistence_diagrams(clouds(), (0, 4)),
            r"degrees must be different .* 0 to 3, at least one, got \(0, 4\)",
        ),
        (lambda: persistence_diagrams(clouds(), (1, 1)), r"got \(1, 1\)"),
        (lambda: persistence_diagrams(clouds(), ()), r"got \(\)"),
        (
            lambda: persistence_diagrams(clouds(), backend="ripser"),
            "backend must be one of giotto, gudhi, got 'ripser'",
        ),
        (lambda: persistence_diagrams(clouds(), n_workers=0), "n_workers must be at least 1, got 0"),
    ],
)
def test_what_is_not_allowed_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
