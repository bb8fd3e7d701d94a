"""Runs are found again by what decides a result, and metrics of a resumed run are appended."""

import os

import pytest
import yaml

from lightning_modules.run_folder import BEST, RunLogger, identity, newest_run, runs_newest_first, write_whole


def config(**changes):
    settings = {
        "seed_everything": 42,
        "trainer": {"max_epochs": 3},
        "model": {"class_path": "M", "init_args": {"d_model": 64, "loss": {"init_args": {"impl": "auto"}}}},
        "data": {"class_path": "D", "init_args": {"batch_size": 8, "paths": ["a.csv"]}},
    }
    for key, value in changes.items():
        part, name = key.split("__")
        settings[part]["init_args"][name] = value
    return settings


def add_run(root, number, settings, checkpoint=BEST):
    run = root / f"version_{number}"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    if checkpoint:
        (run / "checkpoints" / checkpoint).write_bytes(b"")
    return run


def test_identity_is_what_decides_a_result():
    base = identity(config())
    assert identity(config(data__eval_batch_size=99, data__num_workers=4)) == base
    assert identity(config(data__batch_size=99)) != base
    assert identity(config() | {"trainer": {"max_epochs": 9}}) == base
    assert identity(config(model__d_model=32)) != base
    assert identity(config(data__paths=["b.csv"])) != base
    assert identity(config() | {"seed_everything": 1}) != base


def test_newest_is_by_number_not_by_name(tmp_path):
    for number in (2, 10, 9):
        add_run(tmp_path, number, config())
    (tmp_path / "version_11").mkdir()  # a folder without a config is no run
    assert [run.name for run in runs_newest_first(tmp_path)] == ["version_10", "version_9", "version_2"]
    assert newest_run(tmp_path, config(), BEST).name == "version_10"


def test_runs_without_the_checkpoint_or_of_another_config_are_passed_over(tmp_path):
    right = add_run(tmp_path, 0, config())
    add_run(tmp_path, 1, config(model__d_model=32))
    add_run(tmp_path, 2, config(), checkpoint=None)
    assert newest_run(tmp_path, config(), BEST) == right
    with pytest.raises(FileNotFoundError, match=r"version_1, differs: model.init_args.d_model is 32 there, 16 here\)"):
        newest_run(tmp_path, config(model__d_model=16), BEST)
    with pytest.raises(FileNotFoundError, match="no run of this config with a"):
        newest_run(tmp_path / "nowhere", config(), BEST)


def test_write_whole_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "facts.json"
    write_whole(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["facts.json"]


def test_a_second_sitting_appends_to_the_metrics(tmp_path):
    for epoch, extra in ((0, {}), (1, {"val/loss": 2.0})):
        logger = RunLogger(str(tmp_path), "method", "version_0")
        logger.log_metrics({"train/loss": 1.5, "epoch": epoch}, step=epoch)
        if extra:
            logger.log_metrics(extra | {"epoch": epoch}, step=epoch)
        logger.save()
    lines = (tmp_path / "method" / "version_0" / "metrics.csv").read_text().splitlines()
    assert lines == ["epoch,step,train/loss,val/loss", "0,0,1.5,", "1,1,1.5,", "1,1,,2.0"]
