"""Event sequences through the real command: the shipped configs made small, a checkpoint read elsewhere, and errors."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import torch
import yaml

from datamodules.synthetic_events import regime

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIGS = "configs/kernel_attention"
QUICK = {
    "class_path": "lightning_modules.context.LogisticProbe",
    "init_args": {"strengths": [0.1], "max_iterations": 10},
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A CSV as people have it: ids, times as text, a category, a number, rows in no order."""
    drawn = regime(0, n_users=40, n_days=60, events_per_day=1.0, labels_per_day=0.1)
    frame = pl.DataFrame(
        {
            "customer": np.array(drawn.user_ids)[drawn.event_users],
            "when": pl.Series(drawn.times).cast(pl.Datetime("us")).dt.to_string("%Y-%m-%d %H:%M:%S%.6f"),
            "code": np.array(drawn.type_names)[drawn.types],
            "amount": drawn.amounts,
        }
    )
    path = tmp_path_factory.mktemp("events") / "events.csv"
    frame.sample(fraction=1.0, shuffle=True, seed=0).write_csv(path)
    return path


@pytest.fixture
def config(project, tmp_path, table):
    """``config(**model)``: the shipped config on the small table, its encoder and epochs cut down to a toy."""

    def make(name="online_retail", data=None, **model):
        settings = yaml.safe_load((project / CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
        settings["trainer"] |= {"max_epochs": 3, "accelerator": "cpu"}
        report = next(one for one in settings["trainer"]["callbacks"] if one["class_path"].endswith("ContextReport"))
        report["init_args"] = {"n_resamples": 20}
        arguments = settings["model"]["init_args"]
        arguments |= {"encoder_epochs": 2, "aggregator_epochs": 1, **model}
        arguments["encoder"]["init_args"] |= {"d_model": 8, "d_embedding": 4}
        if arguments.get("wide_encoder"):
            arguments["wide_encoder"]["init_args"] |= {"d_model": 16, "d_embedding": 4}
        arguments["evaluation"] = {"probe": QUICK} | arguments.get("evaluation", {})
        given = settings["data"]["init_args"]
        for gone in ("derived", "where", "duplicates"):
            given.pop(gone, None)
        asked = {"silent": given["targets"]["silent"]} if "silent" in given["targets"] else given["targets"]
        if "silent" in asked:
            asked["silent"]["init_args"] |= {"days": 3}
            asked["silent"]["init_args"]["rule"]["init_args"]["every_days"] = 6
        given |= {
            "paths": str(table),
            "user_column": "customer",
            "time_column": "when",
            "categorical": ["code"],
            "numeric": ["amount"],
            "targets": asked,
            "validation_fraction": 0.25,
            "test_fraction": 0.25,
            "batch_size": 8,
            "min_events": 1,
        }
        given["sampler"]["init_args"] |= {"min_length": 2, "max_length": 12}
        given |= data or {}
        path = tmp_path / "toy.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return path

    return make


def one_line(error):
    (line,) = [line for line in error.splitlines() if line.strip()]
    assert line.startswith("seqlit: error: ")
    assert len(line) < 500
    return line


def test_fit_test_predict_audit_and_predict_in_a_fresh_process(seqlit, config, tmp_path):
    path = config()
    for command in ("fit", "test", "predict"):
        status, out, err = seqlit(command, "--config", path)
        assert status == 0, err
    run = tmp_path / "runs" / "kernel_attention" / "version_0"
    report = json.loads((run / "report" / "metrics.json").read_text())
    assert "NaN" not in json.dumps(report)
    assert {"own", "own+time", "wide", "gaussian", "constant"} < set(report["targets"]["silent"]["arms"])
    told = (run / "report" / "report.md").read_text()
    assert "Controls that were not run: none." in told
    header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss", "val/loss", "val/kernel/loss", "val/linear_kernel/loss"} <= set(header)
    frame = pl.read_parquet(run / "embeddings.parquet")
    assert len(frame) > 0
    assert f"{len(frame)} embeddings (" in out
    assert frame["own"].list.len().unique().to_list() == [8]
    assert frame["embedding"].list.len().unique().to_list() == [17], "with the flag of an empty context"
    assert frame["top_users"].list.len().max() > 0

    (run / "embeddings.parquet").unlink()
    command = [sys.executable, "-m", "lightning_modules.cli", "predict", "--config", str(path)]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    again = pl.read_parquet(run / "embeddings.parquet")
    assert again.select("user", "time", "top_users").equals(frame.select("user", "time", "top_users"))
    for name in ("own", "context", "embedding"):
        # float32 sums, whose order a process with another number of threads may change
        np.testing.assert_allclose(again[name].to_list(), frame[name].to_list(), rtol=0, atol=1e-6)

    status, out, err = seqlit("audit", "--config", path, "--n-cuts", "2")
    assert status == 0, out + err
    assert "clean" in out


BREAK_OFF = """
from pathlib import Path

from lightning import Callback


class BreakOff(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 3 and Path("breaks").exists():
            raise ValueError("broken off")
"""


def test_a_fit_goes_on_where_it_was_broken_off(seqlit, config, tmp_path, monkeypatch):
    """`--ckpt_path last` of an interrupted run with tuned encoders ends as the run that was not interrupted."""
    mean = {"mean": {"class_path": "lightning_modules.context.Mean"}}
    path = config(tune_encoder=True, aggregators=mean, aggregator_epochs=2, evaluation={})
    settings = yaml.safe_load(path.read_text())
    (tmp_path / "fit_that_breaks_off.py").write_text(BREAK_OFF)
    monkeypatch.syspath_prepend(tmp_path)
    # One config for all three, so that `last` finds the run: what breaks it off is a file.
    callbacks = [settings["trainer"]["callbacks"][0], {"class_path": "fit_that_breaks_off.BreakOff"}]
    settings["trainer"] |= {"max_epochs": 4, "callbacks": callbacks}
    path.write_text(yaml.safe_dump(settings))
    assert seqlit("fit", "--config", path)[0] == 0
    (tmp_path / "breaks").touch()
    status, _, err = seqlit("fit", "--config", path)
    assert status == 2
    assert "broken off" in one_line(err)
    (tmp_path / "breaks").unlink()
    status, _, err = seqlit("fit", "--config", path, "--ckpt_path", "last")
    assert status == 0, err
    runs = tmp_path / "runs" / "kernel_attention"
    whole, resumed = (
        torch.load(runs / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("version_0", "version_1")
    )
    assert resumed["epoch"] == whole["epoch"] == 3
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name


def test_the_published_preset(seqlit, config, tmp_path):
    """It runs as it is but for its size and precision; what it does is told by an audit and in the report."""
    pytest.importorskip("lightgbm", reason="boosted probes need the extra `events`")
    path = config("published")
    settings = yaml.safe_load(path.read_text())
    settings["trainer"]["precision"] = "32-true"
    asked = settings["data"]["init_args"]["targets"]
    asked["left"]["init_args"]["days"] = 2
    asked["final_month"]["init_args"] |= {"days": 10, "silent_days": 2}
    for name in ("final_month", "next_code"):
        asked[name]["init_args"]["rule"]["init_args"] = {"first": 3, "step": 2}
    asked["next_code"]["init_args"] |= {"column": "code", "top": 4}
    settings["model"]["init_args"]["evaluation"]["probes"]["left"]["init_args"]["n_trees"] = 5
    settings["data"]["init_args"] |= {"split": "time", "validation_start": "2020-02-01", "test_start": "2020-02-12"}
    path.write_text(yaml.safe_dump(settings))
    for command in ("fit", "test"):
        status, _, err = seqlit(command, "--config", path)
        assert status == 0, err
    run = tmp_path / "runs" / "kernel_attention_published" / "version_0"
    saved = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    rules = saved["contexts"]["banks"]["shared"]["_extra_state"]
    thetas = [one for name, one in saved["state_dict"].items() if name.endswith("decay.fixed_theta")]
    assert len(thetas) == 3
    assert torch.equal(torch.stack(thetas), torch.full((3,), 1 / 86_400)), "a second"
    assert "model.branches.symmetric_attention.aggregator.S.layers.0.bias" in saved["state_dict"]
    assert rules["ties"] == "inclusive"
    assert rules["exclude_self"] is False
    assert rules["max_context"] == 500
    targets = json.loads((run / "report" / "metrics.json").read_text())["targets"]
    assert {name: (one["scope"], one["probe"]) for name, one in targets.items()} == {
        "left": ("global", "LightGBMProbe"),
        "final_month": ("local", "LinearProbe"),
        "next_code": ("next", "LinearProbe"),
    }
    assert {name for name, one in targets.items() if one["outcome_dependent"]} == {"left", "final_month"}
    status, out, _ = seqlit("audit", "--config", path, "--n-cuts", "2")
    assert status == 1
    assert "leak" in out


def test_the_bundled_set_with_the_shipped_config_cut_down(seqlit, project):
    """Online Retail as it ships: a few customers, one epoch of each."""
    status, _, err = seqlit(
        "fit",
        "--config",
        project / CONFIGS / "online_retail.yaml",
        *("--trainer.max_epochs", 2, "--trainer.accelerator", "cpu"),
        *("--model.init_args.encoder_epochs", 1, "--model.init_args.aggregator_epochs", 1),
        *("--model.init_args.encoder.init_args.d_model", 8, "--model.init_args.context.n_users", 20),
        *("--model.init_args.wide_encoder.init_args.d_model", 16),
        *("--model.init_args.max_context_queries", 200, "--model.init_args.evaluation.max_validation_users", 20),
        *("--data.init_args.where+", "customer_id < 12500"),
    )
    assert status == 0, err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["--trainer.max_epochs", "9"],
            "trainer.max_epochs must be 3: 2 of the encoder and 1 of the aggregators, got 9",
        ),
        (
            ["--model.init_args.refresh", "lightning_modules.context.PerEpoch"],
            "refresh is for a tuned encoder (tune_encoder)",
        ),
        (
            ["--model.init_args.evaluation.explained", "other"],
            "evaluation.explained names 'other', there are attention, exp_hawkes",
        ),
        (["--model.init_args.context.n_users", "0"], "context.n_users must be at least 1, or null for no limit, got 0"),
        (["--model.init_args.context.exclude_group", "true"], "context.exclude_group needs events with groups"),
        (["--trainer.limit_val_batches", "0"], "banks are built from the events of validation"),
        (
            ["--model.init_args.encoder_weights", "no.ckpt", "--model.init_args.encoder_epochs", "0"],
            "wide_encoder is trained beside the encoder and needs encoder_epochs, got 0; null leaves it out",
        ),
        (
            [
                *("--model.init_args.encoder_weights", "no.ckpt", "--model.init_args.encoder_epochs", "0"),
                *("--model.init_args.wide_encoder", "null"),
            ],
            "no.ckpt",
        ),
        (["--data.init_args.validation_fraction", "0"], "target 'silent' needs queries in each fold"),
    ],
)
def test_wrong_settings_end_in_one_line(seqlit, config, tmp_path, overrides, message):
    status, _, err = seqlit("fit", "--config", config(), *overrides)
    assert status == 2
    assert message in one_line(err)
    assert not list(tmp_path.glob("runs/**/*.ckpt"))


def test_own_events_as_the_readme_has_them(seqlit, project, tmp_path):
    """Its YAML over the bundled config on a file of its columns, then a command with the config of that run."""
    told = (project / CONFIGS / "README.md").read_text(encoding="utf-8")
    own = re.search(r"## Your own events\n.*?```yaml\n(.*?)```", told, re.DOTALL)[1]
    (tmp_path / "mine.yaml").write_text(own, encoding="utf-8")
    random = np.random.default_rng(0)
    users = np.repeat([f"u{user}" for user in range(40)], 12)
    seconds = random.integers(90 * 86400, size=len(users))
    pl.DataFrame(
        {
            "user": users,
            "time": pl.Series(np.datetime64("2023-02-01T00:00:00", "us") + seconds * np.timedelta64(1, "s")),
            "category": random.choice(["food", "rent", "web"], len(users)),
            "amount": random.lognormal(3, 1, len(users)),
        }
    ).write_csv(tmp_path / "events.csv", datetime_format="%Y-%m-%d %H:%M:%S")
    labels = pl.DataFrame({"user": np.unique(users), "label": random.integers(2, size=40)})
    labels.write_csv(tmp_path / "users.csv")
    quick = ("--trainer.max_epochs", 2, "--model.init_args.encoder_epochs", 1, "--model.init_args.aggregator_epochs", 1)
    shipped = project / CONFIGS / "online_retail.yaml"
    status, _, err = seqlit("fit", "--config", shipped, "--config", "mine.yaml", *quick)
    assert status == 0, err
    config = tmp_path / "runs" / "kernel_attention" / "version_0" / "config.yaml"
    data = yaml.safe_load(config.read_text(encoding="utf-8"))["data"]["init_args"]
    assert (data["derived"], data["where"], set(data["targets"])) == ({}, [], {"risky", "gone"})
    status, out, err = seqlit("predict", "--config", config)
    assert status == 0, err
    assert re.search(r"embeddings \(\d+ of 40 users: test queries of target 'risky'\) in", out)
