"""Pictures of an attack report: all there, drawn, nothing cut off, with many attacks and judges and with few."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from lightning_modules.attacks.findings import findings
from lightning_modules.attacks.grid import GridPoint
from lightning_modules.callbacks import attack_pictures
from lightning_modules.callbacks.attack_report import write_report

ALWAYS = {"pareto", "scores", "series", "spectrum"}
WITH_JUDGES = {"detection", "panel", "transfer"}


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
def full(attack_study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return folder, written(attack_study, folder)


def test_every_picture_is_drawn_whole_and_linked(full):
    folder, pictures = full
    assert set(pictures) == ALWAYS | WITH_JUDGES
    check(pictures)
    assert not list(folder.glob(".*"))  # no draft is left
    report = (folder / "report.md").read_text()
    assert {name for name in pictures if f"]({name}.png)" in report} == set(pictures)
    assert report.count(".png)") == len(pictures)


def test_same_study_same_pictures(attack_study, full, tmp_path):
    for name in ("series", "pareto"):
        getattr(attack_pictures, name)(tmp_path / f"{name}.png", attack_study)
        assert np.array_equal(imread(tmp_path / f"{name}.png")[..., :3], full[1][name])


def test_the_star_is_the_configuration_that_was_chosen(attack_study):
    """Of equal F the smaller step is chosen, which need not be the first configuration."""
    attack = attack_study.attacks[0]
    n = len(attack.validation_effectiveness)
    steps = [0.05 / (number + 1) for number in range(n)]
    points = tuple(GridPoint(step=step, radius=None, alpha=None) for step in steps)
    equal = attack.validation_effectiveness[:1].expand(n, -1), attack.validation_concealability[:1].expand(n, -1)
    one = replace(
        attack,
        step=steps[-1],
        radius=None,
        alpha=None,
        validation_effectiveness=equal[0],
        validation_concealability=equal[1],
    )
    assert n > 1
    known = replace(one, configurations=points)
    assert attack_pictures._chosen_on_validation(known) == (n - 1, attack.iteration)
    assert attack_pictures._chosen_on_validation(replace(one, configurations=())) == (0, attack.iteration)


def test_no_attack_is_no_point_of_the_pareto_picture(attack_study, full, tmp_path):
    """Iterate 0, be it the best in both, changes nothing: not the points, not the front, not its area."""
    ideal = []
    for one in attack_study.attacks:
        effect, hidden = one.validation_effectiveness.clone(), one.validation_concealability.clone()
        effect[:, 0], hidden[:, 0] = 0.95, 1.0
        ideal.append(replace(one, validation_effectiveness=effect, validation_concealability=hidden))
    attack_pictures.pareto(tmp_path / "pareto.png", replace(attack_study, attacks=tuple(ideal)))
    assert np.array_equal(imread(tmp_path / "pareto.png")[..., :3], full[1]["pareto"])


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param({"n": 28, "n_calibration": 12, "attacks": 3, "judges": 3}, id="few, nothing resolvable"),
        pytest.param({"n": 28, "attacks": 1, "judges": 1}, id="one of each"),
        pytest.param(
            {"n": 60, "n_channels": 3, "n_classes": 4, "variable_length": True, "n_attacked": 2}, id="many, 3 channels"
        ),
        pytest.param({"n": 2850, "n_steps": 301}, id="2850 series", marks=pytest.mark.slow),
    ],
)
def test_few_and_many(make_attack_study, attack_study, kind, tmp_path):
    attacks = [(one.name, one.family, one.concealed) for one in attack_study.attacks]
    shifts = (2.5, 2.0, 3.0, 8.0, 1.5, 2.5, 0.1)
    judges = [(one.name, one.role, one.is_probability, by) for one, by in zip(attack_study.judges, shifts, strict=True)]
    cut = {"attacks": attacks[: kind.get("attacks", 8)], "judges": judges[: kind.get("judges", 7)]}
    pictures = written(make_attack_study(**(kind | cut)), tmp_path)
    assert set(pictures) == ALWAYS | WITH_JUDGES
    check(pictures)


def test_what_is_missing_is_neither_drawn_nor_linked(make_attack_study, tmp_path):
    study = make_attack_study(n=20, n_attacked=0, judges=(("ResCNN", "attacked", True, 2.0),))
    pictures = written(study, tmp_path)
    assert set(pictures) == ALWAYS
    check(pictures)
    assert not any(f"{name}.png" in (tmp_path / "report.md").read_text() for name in WITH_JUDGES)


def test_degenerate_studies_are_drawn(attack_study, tmp_path):
    still = [
        replace(
            one,
            x_adv=attack_study.series,
            iteration=0,
            logits=one.logits[:1],
            detector_logits=one.detector_logits[:1],
            scores={judge.name: judge.clean for judge in attack_study.judges},
            validation_effectiveness=torch.zeros(1, 1, dtype=torch.float64),
            validation_concealability=torch.full((1, 1), torch.nan, dtype=torch.float64),
        )
        for one in attack_study.attacks[:2]
    ]
    pictures = written(replace(attack_study, attacks=tuple(still)), tmp_path)
    assert set(pictures) == ALWAYS | WITH_JUDGES
    check(pictures)


def test_attacks_look_different():
    names = {f"attack {number}": number % 3 > 0 for number in range(12)}
    look = attack_pictures.styles(names)
    assert len({(style["color"], str(style["linestyle"])) for style in look.values()}) == 12
    assert look["attack 0"]["linestyle"] != "-" == look["attack 1"]["linestyle"]


def test_examples_are_fooled_and_ranked_by_the_size_of_the_perturbation(attack_study):
    best = attack_study.attacks[1]
    size = torch.linspace(0.1, 4, 40)[torch.randperm(40, generator=torch.Generator().manual_seed(1))]
    moved = attack_study.series + size[:, None, None]
    study = replace(attack_study, attacks=(attack_study.attacks[0], replace(best, x_adv=moved)))
    rows = attack_pictures.example_rows(study)
    called = (best.logits[best.iteration][:, 0] >= 0).long()
    clean = (study.clean_logits[:, 0] >= 0).long()
    fooled = [row for row in range(40) if clean[row] == study.labels[row] != called[row]]
    ordered = sorted(fooled, key=lambda row: size[row])
    assert rows == [ordered[round(part * (len(ordered) - 1))] for part in (0.1, 0.5, 0.9)]
    unfooled = replace(
        study, attacks=tuple(replace(one, logits=one.logits[:1].expand(11, -1, -1)) for one in study.attacks)
    )
    assert len(attack_pictures.example_rows(unfooled)) == 3


def test_roc_curve_counts_at_every_threshold():
    clean = torch.tensor([0.0, 1.0, 1.0, 2.0])
    adversarial = torch.tensor([1.0, 3.0])
    false, true = attack_pictures.roc_curve(clean, adversarial)
    by_hand = {(float((clean > t).double().mean()), float((adversarial > t).double().mean())) for t in (-1, 0, 1, 2, 3)}
    assert set(zip(false.tolist(), true.tolist(), strict=True)) == by_hand
    assert (np.diff(false) >= 0).all()
    assert (np.diff(true) >= 0).all()
