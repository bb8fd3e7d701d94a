"""The other shipped configs of attacks: they are what they say, and run through the real command."""

import polars as pl
import pytest
import torch
import yaml

from lightning_modules.networks import PatchTST

CONFIG = "configs/concealed_attack/patch_tst_published.yaml"


CLASSIFIER = "configs/concealed_attack/classifier.yaml"


def test_a_classifier_is_trained_predicts_and_becomes_a_victim(seqlit, project, tmp_path):
    pytest.importorskip("sktime", reason="GunPoint is bundled with sktime: seqlit[timeseries]")
    arguments = ["--config", project / CLASSIFIER, "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu"]
    arguments += ["--data.init_args.max_length", "48", "--model.init_args.network", "lightning_modules.networks.LSTM"]
    for command in ("fit", "test", "predict"):
        status, out, err = seqlit(command, *arguments)
        assert status == 0, err
    run = tmp_path / "runs" / "time_series_classifier" / "version_0"
    frame = pl.read_parquet(run / "class_predictions.parquet")
    assert "150 class predictions" in out
    assert frame["index"].to_list() == list(range(150))
    assert set(frame["label"]) == {0, 1}
    assert frame["predicted"].to_list() == [int(one[0] >= 0) for one in frame["logits"]]

    victim = {"class_path": "lightning_modules.networks.LSTM", "weights": str(run / "checkpoints" / "best.ckpt")}
    victim["init_args"] = {"n_channels": 1, "n_classes": 2, "n_steps": 48}
    settings = yaml.safe_load((project / "configs/concealed_attack/gunpoint.yaml").read_text(encoding="utf-8"))
    settings["model"]["init_args"] |= {"victim": victim, "n_folds": 0}
    for plan in settings["model"]["init_args"]["discriminators"]:
        plan["init_args"] |= {"epochs_per_level": 1, "n_levels": 1}
        plan["init_args"]["attack"]["init_args"]["n_steps"] = 2
    for plan in settings["model"]["init_args"]["attacks"]:
        plan["init_args"]["attack"]["init_args"]["n_steps"] = 2
    settings["trainer"] |= {"max_epochs": 1, "accelerator": "cpu"}
    settings["data"]["init_args"]["max_length"] = 48
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    status, out, err = seqlit("fit", "--config", path)
    assert status == 0, err
    assert "clean validation series rightly" in out


@pytest.fixture
def settings(project):
    return yaml.safe_load((project / CONFIG).read_text(encoding="utf-8"))


def test_both_networks_have_the_published_size(settings):
    model = settings["model"]["init_args"]
    attacked = model["discriminators"][0]["init_args"]
    assert model["classifier"] == attacked["network"]
    network = PatchTST(n_channels=1, n_classes=2, n_steps=150, **attacked["network"]["init_args"])
    n_parameters = sum(parameter.numel() for parameter in network.parameters())
    assert 6.25e6 < n_parameters < 6.35e6, "6.3 M in the specification, to its two figures"
    assert attacked["n_levels"] * attacked["epochs_per_level"] == 150


def test_a_fit_of_the_published_schedule_in_small(seqlit, settings, tmp_path):
    pytest.importorskip("sktime", reason="GunPoint is bundled with sktime: seqlit[timeseries]")
    model = settings["model"]["init_args"]
    settings["trainer"] |= {"max_epochs": 6, "accelerator": "cpu"}
    model |= {"classifier_epochs": 1, "n_folds": 0}
    model["classifier"]["init_args"] |= {"d_model": 16, "d_feedforward": 16}
    for plan in model["discriminators"]:
        plan["init_args"] |= {"epochs_per_level": 1}
        plan["init_args"]["attack"]["init_args"]["n_steps"] = 2
    model["discriminators"][0]["init_args"]["network"] = model["classifier"]
    for plan in model["attacks"]:
        plan["init_args"]["attack"]["init_args"]["n_steps"] = 2
        plan["init_args"]["steps"] = plan["init_args"]["steps"][:1]
    settings["data"]["init_args"]["max_length"] = 48
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    status, _, err = seqlit("fit", "--config", path)
    assert status == 0, err
    folder = tmp_path / "runs" / "concealed_attack_published" / "version_0" / "checkpoints"
    checkpoint = torch.load(folder / "best.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 5
    assert set(checkpoint["found"]["chosen"]) == {"ifgsm", "ifgsm sum", "ifgsm harmonic"}
