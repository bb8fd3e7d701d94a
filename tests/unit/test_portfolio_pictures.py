"""Pictures of a portfolio report: all there, drawn, nothing cut off, with many arms and with few."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.image import imread

from lightning_modules.callbacks import cluster_pictures, portfolio_pictures
from lightning_modules.callbacks.portfolio_report import write_report
from lightning_modules.portfolio.findings import findings

ALWAYS = {
    "clusters",
    "comparison",
    "costs",
    "dendrogram",
    "drawdown",
    "equity",
    "rolling_sharpe",
    "volatility",
    "weights",
}


def written(study, folder):
    write_report(folder, study, findings(study, n_resamples=20))
    return {path.stem: imread(path)[..., :3] for path in folder.glob("*.png")}


def check(pictures):
    for name, pixels in pictures.items():
        ink = (pixels < 0.99).any(-1)
        assert ink.mean() > 0.01, name  # a frame with axes alone covers less
        # The layout keeps a margin: ink at the very edge is something cut off.
        edge = np.concatenate([ink[:2].ravel(), ink[-2:].ravel(), ink[:, :2].ravel(), ink[:, -2:].ravel()])
        assert not edge.any(), name


@pytest.fixture(scope="module")
def full(study, tmp_path_factory):
    pytest.importorskip("sklearn")  # of the landscapes
    folder = tmp_path_factory.mktemp("report")
    return folder, written(study, folder)


def test_every_picture_is_drawn_and_whole(full):
    folder, pictures = full
    assert set(pictures) == ALWAYS | {"random", "diagrams", "landscapes"}
    check(pictures)
    assert not list(folder.glob(".*"))  # no draft is left
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_every_picture_is_linked_and_every_link_is_a_picture(full):
    folder, pictures = full
    report = (folder / "report.md").read_text()
    assert {name for name in pictures if f"]({name}.png)" in report} == set(pictures)
    assert report.count(".png)") == len(pictures)


def test_same_study_same_pictures(study, full, tmp_path):
    for name in ("equity", "weights", "clusters"):
        draw = getattr(cluster_pictures if name == "clusters" else portfolio_pictures, name)
        draw(tmp_path / f"{name}.png", study)
        assert np.array_equal(imread(tmp_path / f"{name}.png")[..., :3], full[1][name])


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param({"n_stocks": 20, "n_days": 470, "n_clusters": 4, "n_random": 1}, id="small"),
        pytest.param({"n_stocks": 150, "n_clusters": 11, "n_random": 5, "more": 9}, id="15 arms"),
    ],
)
def test_few_and_many(make_study, kind, tmp_path):
    pictures = written(make_study(diagrams=False, **kind), tmp_path)
    assert set(pictures) == ALWAYS | {"random"}
    check(pictures)


def test_what_is_missing_is_neither_drawn_nor_linked(make_study, tmp_path):
    (tmp_path / "diagrams.png").write_bytes(b"of an earlier test")
    study = make_study(n_stocks=20, n_days=470, n_random=0, index=False, sectors=False, diagrams=False)
    write_report(tmp_path, study, findings(study, n_resamples=5))
    report = (tmp_path / "report.md").read_text()
    assert "diagrams" not in report
    assert "random.png" not in report
    assert {path.stem for path in tmp_path.glob("*.png")} == ALWAYS | {"diagrams"}


def test_degenerate_embeddings_are_drawn(study, tmp_path):
    column = study.embedding[:, :1]
    for name, embedding in {"one column": column, "constant": np.zeros_like(column)}.items():
        odd = replace(study, embedding=embedding)
        folder = tmp_path / name
        cluster_pictures.dendrogram(folder / "dendrogram.png", odd)
        cluster_pictures.clusters(folder / "clusters.png", odd)
        check({path.stem: imread(path)[..., :3] for path in folder.glob("*.png")})


def test_empty_diagrams_are_drawn(study, tmp_path):
    pytest.importorskip("sklearn")
    nothing = {degree: np.empty((0, 2)) for degree in (0, 1, 2)}
    empty = replace(study, diagrams=[nothing] * len(study.columns))
    cluster_pictures.diagrams(tmp_path / "diagrams.png", empty)
    cluster_pictures.landscapes(tmp_path / "landscapes.png", empty)
    check({path.stem: imread(path)[..., :3] for path in tmp_path.glob("*.png")})
    with pytest.raises(ValueError, match="need persistence diagrams, the study holds none"):
        cluster_pictures.diagrams(tmp_path / "diagrams.png", replace(study, diagrams=None))


def test_arms_look_different(make_study):
    study = make_study(n_stocks=20, n_days=470, n_random=0, more=9)
    look = portfolio_pictures.styles(study)
    assert len(study.arms) == 15
    assert len({(style["color"], str(style["linestyle"])) for style in look.values()}) == 15
    assert look["index"]["color"] == "#000000"
    assert look["model, ward"]["linewidth"] > look["1/N"]["linewidth"]


@pytest.mark.parametrize("first", [0, 3])
def test_weights_name_the_clusters_of_the_other_pictures(study, first, monkeypatch, tmp_path):
    """A refit numbers clusters anew by size: here those of all later ones are called otherwise."""
    plan = study.model.plan
    renamed = tuple(
        replace(decision, labels=(decision.labels + (row > 0)) % 5) for row, decision in enumerate(plan.decisions)
    )
    refitted = replace(study.model, plan=replace(plan, decisions=renamed))
    # The first stocks are listed only after the first rebalance.
    there = {"columns": study.columns[first:], "embedding": study.embedding[first:], "labels": study.labels[first:]}
    drawn = []
    monkeypatch.setattr(portfolio_pictures, "save", lambda figure, path: drawn.append(figure))
    later = replace(study, arms=(refitted, *study.arms[1:]), diagrams=None, **there)
    portfolio_pictures.weights(tmp_path / "weights.png", later)
    said = [text.get_text().split(":")[0] for text in drawn[0].axes[0].get_legend().get_texts()]
    bought = np.flatnonzero(study.model.track.targets.max(0) > 0)
    names = [f"cluster {study.labels[stock]}" if stock >= first else "no cluster" for stock in bought]
    assert sorted(said) == sorted(f"T{stock:03d}, {name}" for stock, name in zip(bought, names, strict=True))


def test_rolling_sharpe_is_that_of_each_window(study):
    returns = study.model.track.returns
    rate = 1.03 ** (1 / 252) - 1
    windows = np.lib.stride_tricks.sliding_window_view(returns, 60)
    expected = (windows.mean(1) - rate) / windows.std(1, ddof=1) * 252**0.5
    found = portfolio_pictures.rolling_ratio(returns, 60, study.risk_free)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)  # running sums of 250 days lose a few digits
    assert np.isnan(portfolio_pictures.rolling_ratio(np.full(80, 0.001), 60, 0.03)).all()


def test_medoids_are_the_stocks_nearest_to_the_centres(study):
    for label, stock in enumerate(cluster_pictures.medoids(study, 3)):
        members = np.flatnonzero(study.labels == label)
        centre = study.embedding[members].mean(0)
        distances = {int(member): np.linalg.norm(study.embedding[member] - centre) for member in members}
        assert stock == min(distances, key=distances.get)
