"""Pictures of a test of context: all there, drawn, nothing cut off, with little to show and with much."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from lightning_modules.callbacks import context_pictures
from lightning_modules.callbacks.context_report import write_report
from lightning_modules.context.controls import arm_names
from lightning_modules.context.findings import findings
from lightning_modules.context.study import AttentionDiagnostics, ContextStudy, EmbeddingSample, TargetStudy
from lightning_modules.context.visible import Context

ALWAYS = {"comparison", "gains"}
OF_WEIGHTS = {"attention", "influence", "ages"}


def target(name, arms, *, n=160, n_classes=2, seed=0, outcome_dependent=False):
    """Some queries without history; probabilities know a little of the label."""
    random = np.random.default_rng(seed)
    labels = torch.tensor(random.integers(0, n_classes, n))
    test = {}
    for arm in arms:
        logits = torch.tensor(random.standard_normal((n, n_classes)))
        logits[torch.arange(n), labels] += 0.7
        test[arm] = logits.softmax(1)
    history = torch.tensor(random.geometric(0.05, n) - 1)
    recency = torch.tensor(random.lognormal(2, 1.5, n)).where(history > 0, torch.nan).float()
    return TargetStudy(
        name=name,
        description="what comes in 30 days",
        scope="local",
        n_classes=n_classes,
        outcome_dependent=outcome_dependent,
        labels=labels,
        users=torch.tensor(random.integers(0, 40, n)),
        times=torch.arange(n),
        n_events=history,
        recency=recency,
        validation_labels=labels,
        validation=test,
        test=test,
        probe="LogisticProbe",
    )


def looked(n, *, n_users=60, sharp=3.0, age=10.0, seed=0):
    """Weights of ``n`` queries on users of whom some are invisible."""
    random = np.random.default_rng(seed)
    visible = torch.tensor(random.random((n, n_users)) < 0.8)
    weights = torch.tensor(sharp * random.standard_normal((n, n_users))).softmax(1)
    ages = torch.tensor(age * random.lognormal(0, 1, (n, n_users))).where(visible, 0).float()
    context = Context(torch.zeros(n_users, 1), None, visible, ages, torch.arange(n_users))
    return AttentionDiagnostics.of("kernel", weights, context)


def studied(*targets, attention=None, ids=None, labels=True):
    random = np.random.default_rng(1)
    n = len(targets[0].labels)
    own, context = (torch.tensor(random.standard_normal((n, width))) for width in (6, 4))
    known = {targets[0].name: targets[0].labels.clone()} if labels else {}
    for one in known.values():
        one[::7] = -1  # queries of another target
    sample = EmbeddingSample("kernel", targets[0].users, targets[0].times, own, context, known)
    ids = tuple(range(10_000, 10_060)) if ids is None else ids
    return ContextStudy(targets=targets, split="users", user_ids=ids, attention=attention, embeddings=sample)


def written(study, folder, **arguments):
    write_report(folder, study, findings(study, n_resamples=20, **arguments))
    return {path.stem: imread(path)[..., :3] for path in folder.glob("*.png")}


def check(pictures):
    for name, pixels in pictures.items():
        ink = (pixels < 0.99).any(-1)
        assert ink.mean() > 0.01, name  # a frame with axes alone covers less
        # The layout keeps a margin: ink at the very edge is something cut off.
        edge = np.concatenate([ink[:2].ravel(), ink[-2:].ravel(), ink[:, :2].ravel(), ink[:, -2:].ravel()])
        assert not edge.any(), name


@pytest.fixture(scope="module")
def usual():
    arms = arm_names(["kernel", "mean"], wide=True)
    return studied(target("silent", arms), target("spends", arms, seed=1), attention=looked(160))


@pytest.fixture(scope="module")
def full(usual, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return folder, written(usual, folder)


def test_every_picture_is_drawn_whole_and_linked(full):
    folder, pictures = full
    assert set(pictures) == ALWAYS | OF_WEIGHTS | {"embeddings"}
    check(pictures)
    report = (folder / "report.md").read_text()
    assert {name for name in pictures if f"]({name}.png)" in report} == set(pictures)
    assert report.count(".png)") == len(pictures)
    assert not list(folder.glob(".*"))  # no draft is left


def test_same_study_same_pictures(usual, full, tmp_path):
    context_pictures.influence(tmp_path / "influence.png", usual)
    context_pictures.embedding_map(tmp_path / "embeddings.png", usual.embeddings)
    for path in tmp_path.glob("*.png"):
        assert np.array_equal(imread(path)[..., :3], full[1][path.stem])


@pytest.mark.slow
def test_much_is_drawn_whole(tmp_path):
    arms = arm_names([f"quite_a_long_name_of_an_aggregator_{number}" for number in range(4)], wide=True)
    targets = [
        target("next", arms, n_classes=9),
        *(
            target(f"label of the user {number}", arms, outcome_dependent=number == 2, seed=number)
            for number in range(3)
        ),
    ]
    ids = tuple(f"customer-{number:08d}-of-the-northern-region" for number in range(60))
    pictures = written(studied(*targets, attention=looked(160, sharp=0.0), ids=ids), tmp_path)
    assert set(pictures) == ALWAYS | OF_WEIGHTS | {"embeddings"}
    check(pictures)


def test_little_is_drawn_whole(tmp_path):
    arms = arm_names(["kernel"], gaussian=False, constant=False)
    attention = looked(30, n_users=1)
    one = target("silent", arms, n=30)
    # All asked after one event, at the same time after it, and of one class: no gain is defined.
    one = replace(
        one,
        labels=torch.zeros(30, dtype=torch.int64),
        n_events=torch.ones(30, dtype=torch.int64),
        recency=torch.full((30,), 2.0),
    )
    pictures = written(studied(one, attention=attention, ids=(), labels=False), tmp_path)
    assert set(pictures) == ALWAYS | OF_WEIGHTS | {"embeddings"}
    check(pictures)


def test_what_is_missing_is_neither_drawn_nor_linked(usual, tmp_path):
    blind = replace(looked(160), top_weights=torch.zeros(160, 5), top_users=torch.full((160, 5), -1))
    (tmp_path / "ages.png").write_bytes(b"of an earlier test")
    for attention in (None, blind):
        study = replace(usual, targets=usual.targets[:1], attention=attention, embeddings=None)
        write_report(tmp_path, study, findings(study, n_resamples=5))
        assert {path.stem for path in tmp_path.glob("*.png")} == ALWAYS | {"ages"}
        assert "ages.png" not in (tmp_path / "report.md").read_text()


def test_the_measure_of_judgement_is_drawn_beside_roc_auc(usual, tmp_path):
    study = replace(usual, targets=usual.targets[:1], attention=None, embeddings=None)
    pictures = written(study, tmp_path, measure="log_loss")
    assert set(pictures) == ALWAYS | {"comparison_log_loss"}
    check(pictures)
    assert not np.array_equal(pictures["comparison"], pictures["comparison_log_loss"])


@pytest.mark.parametrize("days", [0.0, 1e-7, 0.3, 5000.0])
def test_ages_of_any_size_are_drawn(days, tmp_path):
    context_pictures.ages(tmp_path / "ages.png", looked(50, age=days))
    check({"ages": imread(tmp_path / "ages.png")[..., :3]})


def test_top_influencers_are_those_of_largest_sum():
    seen = looked(80)
    totals, given = {}, {}
    for query in range(80):
        for user, share in zip(seen.top_users[query].tolist(), seen.top_weights[query].tolist(), strict=True):
            totals[user] = totals.get(user, 0.0) + share
            given[query, user] = share
    expected = sorted(totals, key=lambda user: -totals[user])[:7]
    users, shares = context_pictures.top_influencers(seen, 7)
    assert users.tolist() == expected
    for query in range(80):
        assert shares[query].tolist() == [given.get((query, user), 0.0) for user in expected]


def test_nobody_is_no_influencer():
    seen = looked(80, n_users=3)
    assert (seen.top_users == -1).any()
    users, shares = context_pictures.top_influencers(seen, 7)
    assert sorted(users.tolist()) == [0, 1, 2]
    # all of the weight is theirs, wherever anybody was visible; shares are float32
    np.testing.assert_allclose(shares.sum(1)[(seen.n_visible > 0).numpy()], 1, atol=1e-6)


def test_principal_plane_is_that_of_the_covariance():
    rows = np.random.default_rng(0).standard_normal((50, 5)) @ np.diag([5.0, 3, 1, 1, 1])
    plane, share = context_pictures.principal_plane(rows)
    values, axes = np.linalg.eigh(np.cov(rows.T))
    axes = axes[:, ::-1][:, :2]
    axes *= np.sign(axes[np.abs(axes).argmax(0), [0, 1]])
    # 1e-10: eigenvectors by two routines, eigenvalues well apart
    np.testing.assert_allclose(plane, (rows - rows.mean(0)) @ axes, atol=1e-10)
    np.testing.assert_allclose(share, values[::-1][:2] / values.sum(), rtol=1e-10)


@pytest.mark.parametrize("shape", [(4, 1), (1, 3), (5, 3)])
def test_a_plane_without_spread_is_a_point(shape):
    plane, share = context_pictures.principal_plane(np.ones(shape))
    assert plane.shape == (shape[0], 2)
    assert not plane.any()
    assert not share.any()
