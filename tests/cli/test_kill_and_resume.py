"""The real command, killed at some moment and resumed by ``--ckpt_path last``, leaves what an unbroken run leaves.

One process imports the command and forks a child for each call, which saves starting Python and Lightning every time;
a child sends itself the signal at the moment asked for.
"""

import json
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import torch
import yaml

from datamodules.synthetic import markov_interactions
from datamodules.synthetic_events import regime
from datamodules.synthetic_market import synthetic_market

FORKING = """
import json, os, signal, sys, traceback
import lightning_modules.cli as cli
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning_modules.run_folder import RunLogger

def at(count, call, happens):
    left = [count]
    def counted(*arguments, **named):
        left[0] -= 1
        if left[0] == 0:
            happens(*arguments)
        return call(*arguments, **named)
    return counted

def prepare(moment, count):
    def die(*_):
        os.kill(os.getpid(), getattr(signal, moment, signal.SIGKILL))
    def cut(draft, path):
        os.truncate(draft, os.path.getsize(draft) // 2)
        die()
    if moment == "checkpoint":  # half of it written
        replace = os.replace
        counted = at(count, replace, cut)
        os.replace = lambda draft, path: (counted if str(path).endswith("last.ckpt") else replace)(draft, path)
    elif moment == "best":  # it is written, what would say so in last.ckpt is not
        def kept(draft, path):
            replace(draft, path)
            die()
        replace = os.replace
        counted = at(count, replace, kept)
        os.replace = lambda draft, path: (counted if str(path).endswith("best.ckpt") else replace)(draft, path)
    elif moment == "row":  # a checkpoint is written, what is logged next is not
        RunLogger.log_metrics = at(count, RunLogger.log_metrics, die)
    else:
        _TrainingEpochLoop.advance = at(count, _TrainingEpochLoop.advance, die)

for job in json.load(sys.stdin):
    child = os.fork()
    if child == 0:
        status = 3
        try:
            os.makedirs(job["folder"], exist_ok=True)
            os.chdir(job["folder"])
            output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if job["moment"]:
                prepare(*job["moment"])
            sys.argv = ["seqlit", *job["arguments"]]
            cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
KILLED = -9


def call(jobs):
    """Run (folder, arguments, moment) one after the other; their exit statuses, of a signal its number, negative."""
    given = [{"folder": str(folder), "arguments": arguments, "moment": moment} for folder, arguments, moment in jobs]
    python = [sys.executable, "-c", FORKING]
    done = subprocess.run(python, input=json.dumps(given), capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


def assert_same(one, two, where):
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True, msg=where)  # dtypes and infinities too
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key, value in one.items():
            if "seconds" not in str(key):  # of the clock
                assert_same(value, two[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for place, pair in enumerate(zip(one, two, strict=True)):
            assert_same(*pair, f"{where}[{place}]")
    else:
        assert one == two or one != one, where  # NaN is NaN


def left_by(folder):
    (run,) = (folder / "runs").glob("*/version_*")
    last, best = (torch.load(run / "checkpoints" / name, weights_only=True) for name in ("last.ckpt", "best.ckpt"))
    for name, state in last["callbacks"].items():
        if name.startswith("ModelCheckpoint"):  # where it keeps its files differs from folder to folder
            state["best_k_models"] = list(state["best_k_models"].values())
            assert (state["best_model_score"] is None) == (state["monitor"] is None)
            for place in ("dirpath", "best_model_path", "kth_best_model_path", "last_model_path"):
                state.pop(place, None)
    facts = json.loads((run / "fit.json").read_text())
    assert facts["finished"]
    assert not [path for path in run.rglob(".*") if path.suffix == ".ckpt"], "a draft was left behind"
    return {
        "last": last,
        "best": best["state_dict"],
        "metrics": (run / "metrics.csv").read_text(),
        "facts": facts,
        "report": json.loads((run / "report" / "metrics.json").read_text()),
    }


def check(config, folder, moments):
    """Kill at each moment, resume, test every resumed run and the unbroken one, and compare."""
    fit, resume, test = ["fit", "--config", str(config)], ["--ckpt_path", "last"], ["test", "--config", str(config)]
    jobs = [(folder / "unbroken", fit, None), (folder / "unbroken", test, None)]
    expected = [0, 0]
    for moment, count, status in moments:
        place = folder / f"{moment}_{count}"
        jobs += [(place, fit, (moment, count)), (place, [*fit, *resume], None), (place, test, None)]
        expected += [status, 0, 0]
    statuses = call(jobs)
    outputs = "\n".join(path.read_text()[-2000:] for path in folder.glob("*/output.txt"))
    assert statuses == expected, outputs
    unbroken = left_by(folder / "unbroken")
    assert unbroken["report"]
    for moment, count, _ in moments:
        assert_same(unbroken, left_by(folder / f"{moment}_{count}"), f"{moment} {count}")


def shortened(path, folder, settings):
    settings["trainer"] |= {"accelerator": "cpu"}
    last = {"class_path": "lightning_modules.callbacks.LastCheckpoint", "init_args": {"every_n_train_steps": 2}}
    settings["trainer"]["callbacks"] = [*settings["trainer"].get("callbacks", []), last]
    config = folder / path.name
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return config


@pytest.fixture
def one_thread(monkeypatch):
    """For the processes of the tests."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MPLBACKEND", "Agg")


@pytest.fixture
def shop(project, tmp_path, one_thread):
    path = project / "configs" / "sasrec_cce" / "online_retail.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    frame = markov_interactions(64, 20, n_days=20, seed=9).with_columns(pl.col("timestamp").dt.truncate("1d"))
    frame.write_parquet(tmp_path / "shop.parquet")
    settings["trainer"]["max_epochs"] = 3
    settings["model"]["init_args"] |= {"d_model": 8, "n_recommendations": 5, "cutoffs": [1, 5, 10]}
    settings["model"]["init_args"]["loss"]["init_args"]["n_negatives"] = 4
    settings["data"]["init_args"] |= {
        "paths": str(tmp_path / "shop.parquet"),
        "user_column": "user_id",
        "item_column": "item_id",
        "time_column": "timestamp",
        "where": [],
        "max_length": 6,
        "batch_size": 8,
        "train_window": "last",
        "cache_dir": str(tmp_path / "cache"),
        "validation_user_fraction": 0.2,
    }
    return shortened(path, tmp_path, settings)


def test_sasrec(shop, tmp_path):
    """Killed amid an epoch, amid and between checkpoints, before a row; told to stop by an agent, and by Ctrl-C."""
    moments = [("step", 11, KILLED), ("checkpoint", 5, KILLED), ("best", 1, KILLED), ("row", 3, KILLED)]
    check(shop, tmp_path, [*moments, ("SIGTERM", 5, 0), ("SIGINT", 8, 1)])
    text = (tmp_path / "SIGTERM_5" / "output.txt").read_text()
    assert "Traceback" not in text


MOMENTS = [("step", 5, KILLED), ("checkpoint", 2, KILLED), ("best", 1, KILLED), ("row", 2, KILLED)]


@pytest.mark.slow
def test_concealed_attacker(project, tmp_path, one_thread):
    pytest.importorskip("sktime", reason="GunPoint is bundled with sktime: seqlit[timeseries]")
    path = project / "configs" / "concealed_attack" / "gunpoint.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    model = settings["model"]["init_args"]
    settings["trainer"]["max_epochs"] = 7
    small = {"class_path": "lightning_modules.networks.ResCNN", "init_args": {"n_filters": 4}}
    model |= {"classifier_epochs": 3, "n_folds": 2, "classifier": small}
    for plan in model["discriminators"]:
        plan["init_args"] |= {"epochs_per_level": 2, "n_levels": 2}
    model["discriminators"][0]["init_args"]["network"] = small
    for plan in model["attacks"]:
        plan["init_args"]["attack"]["init_args"]["n_steps"] = 6
    check(shortened(path, tmp_path, settings), tmp_path, [("step", 8, KILLED), *MOMENTS])


@pytest.mark.slow
def test_kernel_attention(project, tmp_path, one_thread):
    drawn = regime(0, n_users=40, n_days=60, events_per_day=1.0, labels_per_day=0.1)
    pl.DataFrame(
        {
            "customer": np.array(drawn.user_ids)[drawn.event_users],
            "when": pl.Series(drawn.times).cast(pl.Datetime("us")),
            "code": np.array(drawn.type_names)[drawn.types],
            "amount": drawn.amounts,
        }
    ).write_parquet(tmp_path / "events.parquet")
    path = project / "configs" / "kernel_attention" / "online_retail.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    settings["trainer"]["max_epochs"] = 3
    report = next(one for one in settings["trainer"]["callbacks"] if one["class_path"].endswith("ContextReport"))
    report["init_args"] = {"n_resamples": 20}
    model, data = settings["model"]["init_args"], settings["data"]["init_args"]
    model |= {"encoder_epochs": 2, "aggregator_epochs": 1}
    model["encoder"]["init_args"] |= {"d_model": 8, "d_embedding": 4}
    model["wide_encoder"]["init_args"] |= {"d_model": 16, "d_embedding": 4}
    quick = {"strengths": [0.1], "max_iterations": 10}
    probe = {"class_path": "lightning_modules.context.LogisticProbe", "init_args": quick}
    model["evaluation"] = {"probe": probe} | model.get("evaluation", {})
    for gone in ("derived", "where", "duplicates"):
        data.pop(gone, None)
    target = data["targets"]["silent"]
    target["init_args"]["days"] = 3
    target["init_args"]["rule"]["init_args"]["every_days"] = 6
    data |= {
        "paths": str(tmp_path / "events.parquet"),
        "user_column": "customer",
        "time_column": "when",
        "categorical": ["code"],
        "numeric": ["amount"],
        "targets": {"silent": target},
        "validation_fraction": 0.25,
        "test_fraction": 0.25,
        "batch_size": 8,
        "min_events": 1,
        "cache_dir": str(tmp_path / "cache"),
    }
    data["sampler"]["init_args"] |= {"min_length": 2, "max_length": 12}
    check(shortened(path, tmp_path, settings), tmp_path, MOMENTS)


@pytest.mark.slow
def test_tda_portfolio(project, tmp_path, one_thread):
    files = synthetic_market(40, 540, delisted=0.15, seed=2).write(tmp_path)
    path = project / "configs" / "tda_portfolio" / "sp500_conv.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    settings["trainer"]["max_epochs"] = 2
    model, data = settings["model"]["init_args"], settings["data"]["init_args"]
    model["n_random"] = 3
    for clusterer in model["clusterers"]:
        clusterer["init_args"]["n_clusters"] = 4
    model["representation"]["init_args"] |= {"window_length": 50, "code_size": 6, "channels": [4, 1]}
    for gone in ("check_paths", "index_column", "tickers_path"):
        data.pop(gone, None)
    days = {"train_start": "2015-01-01", "test_start": "2016-01-01", "test_end": "2016-10-31"}
    data |= {name: str(file) for name, file in files.items()} | days | {"window_length": 50}
    check(shortened(path, tmp_path, settings), tmp_path, MOMENTS)
