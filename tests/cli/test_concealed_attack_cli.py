"""Attacks through the real command: the shipped config on a bundled set, other formats, and what is refused."""

import json

import numpy as np
import polars as pl
import pytest
import torch
import yaml

from datamodules.synthetic_series import synthetic_series

CONFIG = "configs/concealed_attack/gunpoint.yaml"
PICTURES = {"panel", "transfer", "detection", "pareto", "scores", "series", "spectrum"}


@pytest.fixture
def config(project, tmp_path):
    """``config(**data)``: the shipped config, its networks and epochs cut down to a toy."""

    def make(**data):
        settings = yaml.safe_load((project / CONFIG).read_text(encoding="utf-8"))
        model = settings["model"]["init_args"]
        settings["trainer"] |= {"max_epochs": 7, "accelerator": "cpu"}
        model |= {"classifier_epochs": 3, "n_folds": 2}
        small = {"class_path": "lightning_modules.networks.ResCNN", "init_args": {"n_filters": 4}}
        model["classifier"] = small
        for plan in model["discriminators"]:
            plan["init_args"] |= {"epochs_per_level": 2, "n_levels": 2}
        model["discriminators"][0]["init_args"]["network"] = small
        for plan in model["attacks"]:
            plan["init_args"]["attack"]["init_args"]["n_steps"] = 6
        settings["data"]["init_args"] |= data
        path = tmp_path / "toy.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return path

    return make


def one_line(error: str) -> str:
    (line,) = [line for line in error.splitlines() if line.strip()]
    assert line.startswith("seqlit: error: ")
    assert len(line) < 500
    return line


def test_fit_test_predict_on_the_bundled_set(seqlit, config, tmp_path):
    pytest.importorskip("sktime", reason="GunPoint is bundled with sktime: seqlit[timeseries]")
    path = config()
    for command in ("fit", "test", "predict"):
        status, out, err = seqlit(command, "--config", path)
        assert status == 0, err
    run = tmp_path / "runs" / "concealed_attack" / "version_0"
    assert {file.stem for file in (run / "report").glob("*.png")} == PICTURES
    report = json.loads((run / "report" / "metrics.json").read_text())
    assert "NaN" not in json.dumps(report)
    text = (run / "report" / "report.md").read_text()
    for name in ("ifgsm", "ifgsm sum", "ifgsm harmonic", "two statistics", "held-out RNNAttention"):
        assert name in text
    assert "not resolvable (n = 50)" in text, "99 clean series are needed for 1 %"
    assert "150 adversarial series in" in out
    frame = pl.read_parquet(run / "adversarial_series.parquet")
    assert frame["index"].to_list() == list(range(150))
    assert frame["series"].list.len().unique().to_list() == [150]
    assert frame["predicted_at"].list.len().unique().to_list() == [7]
    moved = np.abs(np.stack(frame["adversarial"].to_numpy()) - np.stack(frame["series"].to_numpy())).max()
    iteration = frame["iteration"][0]
    assert 0 < moved <= 0.05 * iteration * 1.0001, "a step of at most 0.05 an iteration, with rounding"
    chosen = frame["predicted_at"].list.get(iteration)
    assert chosen.to_list() == frame["predicted"].to_list()
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert set(checkpoint["found"]) == {"chosen", "judges", "calibration", "saturation", "levels"}


def test_variable_length_and_channels_from_a_folder(seqlit, config, tmp_path):
    drawn = synthetic_series(64, 30, n_steps=30, n_channels=2, noise=0.4, variable_length=True, seed=1)
    drawn.write(tmp_path / "ucr", "Toy", ".ts")
    path = config(name="Toy", folder=str(tmp_path / "ucr"), validation_fraction=0.25)
    for command in ("fit", "test"):
        status, _, err = seqlit(command, "--config", path)
        assert status == 0, err
    text = (tmp_path / "runs" / "concealed_attack" / "version_0" / "report" / "report.md").read_text()
    assert "30 series of Toy" in text
    assert "2 channels" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--trainer.max_epochs", "9"], "trainer.max_epochs must be 7: 3 of the classifier and 4 of the longest"),
        (["--model.init_args.n_folds", "1"], "n_folds must be 0 or at least 2, got 1"),
        (["--data.init_args.name", "FordA"], "FordA"),
        (["--model.init_args.predict_attack", "other"], "predict_attack must be one of"),
        (["--model.init_args.victim", "{program: none.pt2, trusted: true}"], "there is no file none.pt2"),
    ],
)
def test_wrong_settings_end_in_one_line(seqlit, config, tmp_path, overrides, message):
    pytest.importorskip("sktime", reason="GunPoint is bundled with sktime: seqlit[timeseries]")
    status, _, err = seqlit("fit", "--config", config(), *overrides)
    assert status == 2
    assert message in one_line(err)
    assert not list(tmp_path.glob("runs/**/*.ckpt"))


@pytest.mark.parametrize(
    ("surrogate", "message"),
    [
        ({"program": "none.pt2", "trusted": True}, ": there is no file none.pt2"),
        (
            {
                "class_path": "lightning_modules.networks.ResCNN",
                "init_args": {"n_channels": 1, "n_classes": 3, "n_steps": 150},
            },
            " tells 3 classes apart, the data has 2",
        ),
    ],
)
def test_a_surrogate_is_declared_with_its_attack(seqlit, config, surrogate, message):
    pytest.importorskip("sktime", reason="GunPoint is bundled with sktime: seqlit[timeseries]")
    path = config()
    settings = yaml.safe_load(path.read_text())
    attack = settings["model"]["init_args"]["attacks"][0]["init_args"]
    attack["surrogate"] = surrogate
    path.write_text(yaml.safe_dump(settings))
    status, _, err = seqlit("fit", "--config", path)
    assert status == 2
    assert f"the surrogate of attack '{attack['name']}'{message}" in one_line(err)


def test_a_held_out_judge_like_an_attacked_one_is_refused(seqlit, config):
    pytest.importorskip("sktime", reason="GunPoint is bundled with sktime: seqlit[timeseries]")
    path = config()
    settings = yaml.safe_load(path.read_text())
    settings["model"]["init_args"]["discriminators"][1]["init_args"]["seed"] = 100
    path.write_text(yaml.safe_dump(settings))
    status, _, err = seqlit("fit", "--config", path)
    assert status == 2
    assert "held-out judge 'held-out RNNAttention' and attacked detector 'attacked ResCNN' must differ in seed" in (
        one_line(err)
    )
