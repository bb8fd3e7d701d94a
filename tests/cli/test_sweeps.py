"""Every sweep by the command line that a wandb agent builds, and what a run leaves on wandb; all offline."""

import csv
import json
import os
import queue
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import yaml

from datamodules.synthetic_events import regime
from datamodules.synthetic_market import synthetic_market
from datamodules.synthetic_series import synthetic_series
from lightning_modules.callbacks import EpochLines
from lightning_modules.callbacks.wandb_run import numbers as plain_numbers

wandb = pytest.importorskip("wandb", reason="wandb is an extra")
METHODS = ("sasrec_cce", "concealed_attack", "kernel_attention", "tda_portfolio")
# Those whose sweep ends runs early: where their runs lie, and what has them take long.
RUNS_OF = {"sasrec_cce": "runs/sasrec_cce", "kernel_attention": "runs/kernel_attention"}
LONG = {
    "sasrec_cce": ["--trainer.max_epochs=200"],
    "kernel_attention": ["--trainer.max_epochs=200", "--model.init_args.aggregator_epochs=199"],
}
_BLOCK, _HEADER = 32768, 7


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No network, no settings of an earlier test, and no thread more than the steps of microseconds need."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb_cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb_data"))
    wandb.teardown()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    wandb.teardown()


def records(folder: Path) -> list:
    """What an offline run wrote: a LevelDB log of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its service may still be writing
    (path,) = folder.glob("*.wandb")
    content, place, parts, found = path.read_bytes(), _HEADER, [], []
    while place + _HEADER <= len(content):
        if _BLOCK - place % _BLOCK < _HEADER:
            place += _BLOCK - place % _BLOCK
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts.append(content[place + _HEADER : place + _HEADER + length])
        place += _HEADER + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(b"".join(parts))
            found.append(record)
            parts = []
    return found


def history(found: list) -> dict[str, list]:
    """Everything that was logged, by key; a picture or table is a mapping, its fields written one by one."""
    values: dict[str, list] = {}
    for record in found:
        row: dict[str, object] = {}
        for item in record.history.item:
            key, *inner = [item.key] if item.key else list(item.nested_key)
            value = json.loads(item.value_json)
            row[key] = row.get(key, {}) | {inner[0]: value} if inner else value
        for key, value in row.items():
            values.setdefault(key, []).append(value)
    return values


def summary(found: list) -> dict[str, object]:
    updates = [item for record in found for item in record.summary.update]
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates}


def config_of(found: list) -> dict[str, object]:
    updates = [item for record in found for config in (record.run.config, record.config) for item in config.update]
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in updates}


def exits(found: list) -> list[int]:
    return [record.exit.exit_code for record in found if record.WhichOneof("record_type") == "exit"]


def artifacts(found: list) -> dict[str, set[str]]:
    """Files by type of artifact."""
    return {
        record.artifact.type: {entry.path for entry in record.artifact.manifest.contents}
        for record in found
        if record.WhichOneof("record_type") == "artifact"
    }


def shop(folder: Path) -> dict:
    """Baskets that move along a ring of items."""
    rng = np.random.default_rng(0)
    start = rng.integers(0, 40, 60)
    user, basket, slot = np.meshgrid(np.arange(60), np.arange(12), np.arange(3), indexing="ij")
    day = basket * 7 + rng.integers(0, 5, (60, 12, 1))
    pl.DataFrame(
        {
            "customer": [f"c{number}" for number in user.ravel()],
            "article": [f"a{number}" for number in ((start[user] + 3 * basket + slot) % 40).ravel()],
            "day": (np.datetime64("2024-01-01") + day.astype("timedelta64[D]")).ravel(),
        }
    ).write_csv(folder / "shop.csv")
    columns = {"user_column": "customer", "item_column": "article", "time_column": "day"}
    return {"paths": "shop.csv", **columns, "where": [], "max_length": 12, "validation_user_fraction": 0.2}


def made_small(method: str, settings: dict, folder: Path) -> None:
    """Cut the shipped config down to a toy: as many keys as there were, other sizes and data."""
    model, given = settings["model"]["init_args"], settings["data"]["init_args"]
    settings["trainer"] |= {"accelerator": "cpu"}
    match method:
        case "sasrec_cce":
            settings["trainer"]["max_epochs"] = 2
            given |= shop(folder)
        case "concealed_attack":
            synthetic_series(48, 20, n_steps=24, noise=0.4, seed=1).write(folder / "ucr", "Toy", ".tsv")
            settings["trainer"]["max_epochs"] = 2
            small = {"class_path": "lightning_modules.networks.ResCNN", "init_args": {"n_filters": 4}}
            model |= {"classifier": small, "classifier_epochs": 1, "n_folds": 0, "fitted_judges": False}
            for plan in model["discriminators"]:
                plan["init_args"] |= {"epochs_per_level": 1, "n_levels": 1}
            model["discriminators"][0]["init_args"]["network"] = small
            for plan in model["attacks"]:
                plan["init_args"]["attack"]["init_args"]["n_steps"] = 3
            given |= {"name": "Toy", "folder": "ucr"}
        case "kernel_attention":
            drawn = regime(0, n_users=40, n_days=60, events_per_day=1.0, labels_per_day=0.1)
            pl.DataFrame(
                {
                    "customer": np.array(drawn.user_ids)[drawn.event_users],
                    "when": pl.Series(drawn.times).cast(pl.Datetime("us")).dt.to_string("%Y-%m-%d %H:%M:%S%.6f"),
                    "code": np.array(drawn.type_names)[drawn.types],
                    "amount": drawn.amounts,
                }
            ).write_csv(folder / "events.csv")
            settings["trainer"]["max_epochs"] = 2
            model |= {"encoder_epochs": 1, "aggregator_epochs": 1}
            for gone in ("derived", "where", "duplicates"):
                del given[gone]
            target = given["targets"]["silent"]
            target["init_args"] |= {"days": 3}
            target["init_args"]["rule"]["init_args"]["every_days"] = 6
            given |= {"paths": "events.csv", "user_column": "customer", "time_column": "when", "categorical": ["code"]}
            given |= {"targets": {"silent": target}, "validation_fraction": 0.25, "test_fraction": 0.25}
            given |= {"batch_size": 8, "min_events": 1}
            given["sampler"]["init_args"] |= {"min_length": 2, "max_length": 12}
        case "tda_portfolio":
            files = synthetic_market(20, 540, delisted=0.15, seed=2).write(folder)
            given |= {name: str(file) for name, file in files.items()}
            given |= {"train_start": "2015-01-01", "test_start": "2016-01-01", "test_end": "2016-10-31"}
            model["n_random"] = 2


@pytest.fixture
def toys(project, tmp_path):
    """``toys(method)``: the config that the sweep names, small, at the path by which it names it."""

    def make(method: str) -> dict:
        sweep = yaml.safe_load((project / f"configs/sweeps/{method}.yaml").read_text(encoding="utf-8"))
        (name,) = [word for word in sweep["command"] if word.endswith(".yaml")]
        settings = yaml.safe_load((project / name).read_text(encoding="utf-8"))
        made_small(method, settings, tmp_path)
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return sweep

    return make


def drawn(parameters: dict, seed: int) -> dict[str, object]:
    """One value a key, as wandb's server would draw it."""
    rng = np.random.default_rng(seed)
    found: dict[str, object] = {}
    for key, one in parameters.items():
        low, high = one.get("min"), one.get("max")
        match one.get("distribution"):
            case None if "value" in one:
                found[key] = one["value"]
            case None:
                found[key] = one["values"][rng.integers(len(one["values"]))]
            case "int_uniform":
                found[key] = int(rng.integers(low, high + 1))
            case "q_uniform":
                found[key] = type(one["q"])(round(round(rng.uniform(low, high) / one["q"]) * one["q"], 10))
            case "log_uniform_values":
                found[key] = float(np.exp(rng.uniform(np.log(low), np.log(high))))
            case other:
                raise AssertionError(f"{key}: the shipped sweeps use no {other}")
    return found


@pytest.fixture
def agent(monkeypatch, tmp_path):
    """``agent(sweep, values) -> (arguments, environment)``: those of the process wandb's own agent would start."""
    from wandb import wandb_agent

    def start(sweep: dict, values: dict[str, object]) -> tuple[list[str], dict[str, str]]:
        started = {}

        class Process:
            def __init__(self, command=None, env=None, **rest):
                started.update(command=command, env=env)

        monkeypatch.chdir(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(wandb_agent, "AgentProcess", Process)
            patch.setenv("WANDB_SWEEP_ID", "sweep1")
            patch.setenv("WANDB_RUN_ID", "")  # so that the agent's own goes with the block
            patch.setenv("WANDB_SWEEP_PARAM_PATH", "")
            one = wandb_agent.Agent(api=None, queue=queue.Queue(), sweep_id="sweep1")
            one._sweep_command = list(sweep["command"])
            args = {key: {"value": value} for key, value in values.items()}
            one._command_run({"run_id": "run1", "program": sweep["program"], "args": args})
        return started["command"], {key: value for key, value in started["env"].items() if key.startswith("WANDB_")}

    return start


# wandb's agent forgets to close the file of parameters that it writes, and wandb the one that it reads
@pytest.mark.filterwarnings("ignore:unclosed file .*config-run1:ResourceWarning")
@pytest.mark.parametrize("method", METHODS)
def test_an_agents_command_fits_and_logs_the_metric(seqlit, toys, agent, monkeypatch, tmp_path, method):
    if method == "tda_portfolio":
        pytest.importorskip("gudhi", reason="diagrams need seqlit[tda]")
    sweep = toys(method)
    values = drawn(sweep["parameters"], seed=1)
    command, environment = agent(sweep, values)
    assert command[:2] == ["seqlit", "fit"]
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    status, _, err = seqlit(*command[1:])
    assert status == 0, err
    (run,) = tmp_path.glob("runs/*/version_0")
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    for key, value in values.items():
        found = resolved
        for word in key.split("."):
            assert word in found, f"{key} is no key of the resolved config"
            found = found[word]
        assert found == value, key
    name = sweep["metric"]["name"]
    with (run / "metrics.csv").open(newline="") as file:
        logged = [float(row[name]) for row in csv.DictReader(file) if row[name]]
    assert np.isfinite(logged).all()
    assert json.loads((run / "wandb.json").read_text())["id"] == "run1", "the agent's run"
    (offline_run,) = run.glob("wandb/offline-run-*-run1")
    found = records(offline_run)
    assert history(found)[name] == pytest.approx(logged, rel=1e-6)  # the CSV holds float32 as decimals
    known = config_of(found)
    assert known["model"]["class_path"] == resolved["model"]["class_path"]
    assert {key: known[key] for key in values} == values, "what the server compares runs by"
    assert artifacts(found) == {"model": {"best.ckpt", "config.yaml"}}
    assert exits(found) == [0]


def stop_after(monkeypatch, epoch: int) -> None:
    """SIGTERM to this process at the end of an epoch, as an agent sends it."""
    lines = EpochLines.on_train_epoch_end

    def stopped(self, trainer, module):
        lines(self, trainer, module)
        if trainer.current_epoch == epoch:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(EpochLines, "on_train_epoch_end", stopped)


def trained_epochs(run: Path) -> list[str]:
    with (run / "metrics.csv").open(newline="") as file:
        return [row["epoch"] for row in csv.DictReader(file) if row["train/loss"]]


def test_fit_stop_resume_and_test_are_one_run_of_wandb(seqlit, toys, project, monkeypatch, tmp_path):
    toys("sasrec_cce")
    both = ("--config", "configs/sasrec_cce/online_retail.yaml", "--config", project / "configs/trainer/wandb.yaml")
    small = ("--trainer.max_epochs", 3, "--model.init_args.d_model", 16)
    with monkeypatch.context() as patch:
        stop_after(patch, epoch=1)
        seqlit("fit", *both, *small)
    run = tmp_path / "runs" / "sasrec_cce" / "version_0"
    (first,) = run.glob("wandb/offline-run-*")
    found = records(first)
    assert exits(found) == [0], "a run that an agent ends is no failure"
    assert artifacts(found) == {}, "and uploads nothing"
    assert len(history(found)["train/loss"]) == 2
    assert json.loads((run / "fit.json").read_text())["finished"] is False
    assert trained_epochs(run) == ["0", "1"]
    identity = (run / "wandb.json").read_bytes()

    status, _, err = seqlit("fit", *both, *small, "--ckpt_path", "last")
    assert status == 0, err
    (second,) = set(run.glob("wandb/offline-run-*")) - {first}
    found = records(second)
    assert trained_epochs(run) == ["0", "1", "2"]
    assert history(found)["epoch"][-1] == 2
    assert config_of(found)["model"]["init_args"]["d_model"] == 16
    assert artifacts(found) == {"model": {"best.ckpt", "config.yaml"}}

    status, _, err = seqlit("test", *both, *small)
    assert status == 0, err
    (third,) = set(run.glob("wandb/offline-run-*")) - {first, second}
    found = records(third)
    assert (run / "wandb.json").read_bytes() == identity
    # two folders of one second have a number behind the id
    assert all(json.loads(identity)["id"] in one.name.split("-") for one in (first, second, third))
    logged = history(found)
    report = run / "report"
    pictures = {path.stem for path in report.glob("*.png")}
    assert {f"report/{name}" for name in pictures} | {"report/test_report"} <= set(logged)
    table = logged["report/test_report"][0]
    assert (table["_type"], table["nrows"]) == ("table-file", 5)
    numbers = json.loads((report / "metrics.json").read_text())
    assert summary(found)["test/model/ndcg@10"] == numbers["model"]["ndcg@10"]
    assert artifacts(found)["report"] == {path.name for path in report.iterdir()}

    status, _, err = seqlit("predict", *both, *small)
    assert status == 0, err
    assert (run / "recommendations.parquet").is_file()
    assert len(list(run.glob("wandb/offline-run-*"))) == 3, "predict sends nothing"


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_config_metrics_and_report_of_each_method_reach_its_run(seqlit, toys, project, tmp_path, method):
    if method == "tda_portfolio":
        pytest.importorskip("gudhi", reason="diagrams need seqlit[tda]")
    sweep = toys(method)
    (config,) = [word for word in sweep["command"] if word.endswith(".yaml")]
    values = [word for word in sweep["command"] if word.startswith("--") and "=" in word]  # classes that are varied
    values += [f"--{key}={value}" for key, value in drawn(sweep["parameters"], seed=1).items()]
    both = ("--config", config, "--config", project / "configs/trainer/wandb.yaml", *values)
    status, _, err = seqlit("fit", *both)
    assert status == 0, err
    (run,) = tmp_path.glob("runs/*/version_0")
    (first,) = run.glob("wandb/offline-run-*")
    found = records(first)
    name = sweep["metric"]["name"]
    with (run / "metrics.csv").open(newline="") as file:
        logged = [float(row[name]) for row in csv.DictReader(file) if row[name]]
    assert history(found)[name] == pytest.approx(logged, rel=1e-6)  # the CSV holds float32 as decimals
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    known = config_of(found)
    for part in ("model", "data"):
        assert known[part]["class_path"] == resolved[part]["class_path"]
        assert known[part]["init_args"].keys() == resolved[part]["init_args"].keys()

    status, _, err = seqlit("test", *both)
    assert status == 0, err
    (second,) = set(run.glob("wandb/offline-run-*")) - {first}
    found = records(second)
    sent = history(found)
    report = run / "report"
    pictures = {f"report/{path.stem}" for path in report.glob("*.png")}
    assert pictures
    assert pictures <= sent.keys()
    assert all(sent[picture][0]["_type"] == "image-file" for picture in pictures)
    tables = [one for key, (one, *_) in sent.items() if key.startswith("report/") and key not in pictures]
    assert tables
    assert all(one["_type"] == "table-file" and one["nrows"] > 0 for one in tables)
    numbers = dict(plain_numbers(json.loads((report / "metrics.json").read_text())))
    arrived = {key: value for key, value in summary(found).items() if key.startswith("test/")}
    known = {key: value for key, value in arrived.items() if key.removeprefix("test/") in numbers}
    assert known == {key: numbers[key.removeprefix("test/")] for key in known}
    assert len(known) == len(numbers)
    assert artifacts(found)["report"] == {path.relative_to(report).as_posix() for path in report.rglob("*.*")}
    assert exits(found) == [0]


def test_a_failure_is_marked_as_one(seqlit, toys, project, monkeypatch, tmp_path):
    toys("sasrec_cce")

    def burst(self, trainer, module):
        raise OSError("no space left")

    monkeypatch.setattr(EpochLines, "on_train_epoch_end", burst)
    config = ("--config", "configs/sasrec_cce/online_retail.yaml", "--config", project / "configs/trainer/wandb.yaml")
    status, _, err = seqlit("fit", *config)
    assert (status, "no space left" in err) == (2, True)
    (folder,) = tmp_path.glob("runs/sasrec_cce/version_0/wandb/offline-run-*")
    assert exits(records(folder)) == [1]


def test_a_run_logger_among_others_is_found(seqlit, toys, tmp_path):
    toys("sasrec_cce")
    config = tmp_path / "configs/sasrec_cce/online_retail.yaml"
    settings = yaml.safe_load(config.read_text())
    other = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "others"}}
    settings["trainer"] |= {"logger": [settings["trainer"]["logger"], other], "max_epochs": 1}
    config.write_text(yaml.safe_dump(settings))
    for command in ("fit", "test", "predict"):
        status, _, err = seqlit(command, "--config", config)
        assert status == 0, err
    run = tmp_path / "runs" / "sasrec_cce" / "version_0"
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "checkpoints", "report", "recommendations.parquet"}
    assert (tmp_path / "others/lightning_logs/version_0/metrics.csv").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("method", RUNS_OF)
def test_a_process_ended_by_its_agent(toys, agent, tmp_path, method):
    sweep = toys(method)
    assert "early_terminate" in sweep
    command, environment = agent(sweep, drawn(sweep["parameters"], seed=2))
    entry = [sys.executable, "-c", "from lightning_modules.cli import main; main()"]
    process = subprocess.Popen([*entry, *command[1:], *LONG[method]], env=os.environ | environment, cwd=tmp_path)
    metrics = tmp_path / RUNS_OF[method] / "version_0/metrics.csv"
    try:
        while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") > 3):
            time.sleep(0.2)
        process.terminate()  # as the agent's `_command_stop`, which kills 30 seconds later
        process.wait(120)  # a busy machine
    finally:
        process.kill()
    run = metrics.parent
    assert json.loads((run / "fit.json").read_text())["finished"] is False
    (folder,) = run.glob("wandb/offline-run-*-run1")
    found = records(folder)
    assert exits(found) == [0]
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 3
    assert all(len(row) == len(rows[0]) and None not in row.values() for row in rows)


@pytest.mark.slow
def test_a_search_in_processes(seqlit, toys, monkeypatch, tmp_path):
    pytest.importorskip("optuna", reason="the search needs seqlit[search]")
    toys("sasrec_cce")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shipped = Path(__file__).resolve().parents[2] / "configs/sweeps/sasrec_cce.yaml"
    status, out, err = seqlit("search", "--sweep", shipped, "--n_trials", 3, "--", "--trainer.max_epochs=2")
    assert status == 0, err
    home = tmp_path / "runs/search/sasrec_cce/search_0"
    found = json.loads((home / "search.json").read_text())
    assert [row["state"] for row in found["trials"]] == ["complete"] * 3
    (command,) = [line.split()[1:] for line in out.splitlines() if line.startswith("  seqlit test ")]
    status, _, err = seqlit(*command)
    assert status == 0, err
    assert (Path(found["best"]["run"]) / "report" / "metrics.json").is_file()
