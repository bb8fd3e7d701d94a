"""Trainer files join the config of any method, and real processes run it: on a CPU, by gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
import yaml
from polars.testing import assert_frame_equal

PROJECT = Path(__file__).resolve().parents[2]
TRAINERS = sorted((PROJECT / "configs" / "trainer").glob("*.yaml"))
METHODS = ["concealed_attack/gunpoint", "kernel_attention/online_retail", "sasrec_cce/online_retail"]
METHODS += ["tda_portfolio/us20", "tda_portfolio/sp500_lstm"]
DDP = ("--config", PROJECT / "configs" / "trainer" / "ddp.yaml", "--trainer.accelerator", "cpu")
SMALL = ("--model.init_args.n_random", "2", "--data.init_args.test_end", "2007-06-30")
SMALL += ("--model.init_args.representation.init_args.backend", "gudhi")


def leaves(tree, prefix=""):
    """Dotted key to value; lists count as values."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {name: leaf for key, value in tree.items() for name, leaf in leaves(value, f"{prefix}.{key}").items()}


@pytest.fixture
def resolved(seqlit):
    """``resolved(arguments) -> leaves``: what `seqlit fit` would run with, by its own parser."""

    def resolve(*arguments):
        status, out, err = seqlit("fit", *arguments, "--print_config")
        assert status == 0, err
        return leaves(yaml.safe_load(out))

    return resolve


@pytest.mark.parametrize("method", METHODS)
def test_a_trainer_file_sets_what_it_says_and_nothing_else(resolved, method):
    shipped = ("--config", PROJECT / "configs" / f"{method}.yaml")
    alone = resolved(*shipped)
    for file in TRAINERS:
        said = leaves(yaml.safe_load(file.read_text(encoding="utf-8")))
        joined = resolved(*shipped, "--config", file)
        assert joined.keys() == alone.keys(), file.name
        changed = {key for key in alone if joined[key] != alone[key]}
        assert changed <= {key.removesuffix("+") for key in said}, file.name
        assert all(joined[key] == value for key, value in said.items() if not key.endswith("+")), file.name
        for key in (key.removesuffix("+") for key in said if key.endswith("+")):
            assert joined[key][: len(alone[key])] == alone[key], f"{file.name} adds to {key}"


def test_all_trainer_files_are_there():
    assert {file.stem for file in TRAINERS} >= {"cpu", "gpu", "ddp", "ddp_2nodes"}


def run(folder, *command):
    """A command of a shell in ``folder``; its output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MPLBACKEND": "Agg"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    ended = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def numbers_of(run_folder):
    numbers = json.loads((run_folder / "report" / "metrics.json").read_text())
    numbers.pop("seconds")
    return numbers


def test_fit_test_and_predict_in_two_processes_equal_one(seqlit, tmp_path):
    """The console script starts the second process itself; twice 8 windows a step are the 16 of one."""
    config = ("--config", PROJECT / "configs" / "tda_portfolio" / "us20.yaml", *SMALL)
    together = tmp_path / "together"
    together.mkdir()
    for command in ("fit", "test", "predict"):
        run(together, "seqlit", command, *config, *DDP, "--trainer.devices", "2", "--data.init_args.batch_size", "8")
        status, _, err = seqlit(command, *config)
        assert status == 0, err
    (two,) = together.glob("runs/*/*")
    (one,) = tmp_path.glob("runs/*/*")
    names = [{str(file.relative_to(root)) for file in root.rglob("*")} for root in (one, two)]
    assert names[0] == names[1]
    assert (two / "metrics.csv").read_text() == (one / "metrics.csv").read_text()
    assert numbers_of(two) == numbers_of(one)
    for table in ("weights.parquet", "orders.parquet"):
        assert_frame_equal(pl.read_parquet(two / table), pl.read_parquet(one / table), check_exact=True)


@pytest.mark.slow
def test_torchrun_starts_it_too(tmp_path):
    config = ("--config", PROJECT / "configs" / "tda_portfolio" / "us20.yaml", *SMALL)
    for command in ("fit", "test"):
        run(tmp_path, "bash", PROJECT / "scripts" / "torchrun.sh", "2", command, *config, *DDP)
    (found,) = tmp_path.glob("runs/*/*")
    assert numbers_of(found)["data"]["n_stocks"] == 20


def few_epochs(config):
    """The shipped config with an epoch for each thing that is trained, since a trainer is held to the plan."""
    plan = config["model"]["init_args"]
    if "discriminators" in plan:
        plan["classifier_epochs"] = 1
        for one in plan["discriminators"]:
            one["init_args"]["epochs_per_level"] = 1
        config["trainer"]["max_epochs"] = 1 + max(one["init_args"]["n_levels"] for one in plan["discriminators"])
    elif "encoder_epochs" in plan:
        plan["encoder_epochs"] = plan["aggregator_epochs"] = 1
        config["trainer"]["max_epochs"] = 2
    else:
        config["trainer"]["max_epochs"] = 1
    return config


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS[:3])
def test_other_methods_fit_and_test_in_two_processes(tmp_path, method):
    shipped = (PROJECT / "configs" / f"{method}.yaml").read_text(encoding="utf-8")
    config = tmp_path / "few.yaml"
    config.write_text(yaml.safe_dump(few_epochs(yaml.safe_load(shipped))), encoding="utf-8")
    few = [f"--trainer.limit_{part}_batches={n}" for part, n in (("train", 2), ("val", 1), ("test", 1))]
    for command in ("fit", "test"):
        run(tmp_path, "seqlit", command, "--config", config, *DDP, "--trainer.devices", "2", *few)
    (found,) = tmp_path.glob("runs/*/*")
    (report,) = found.rglob("metrics.json")  # below partial/ where there is more than one batch
    assert report.parent.name == "report"


def test_job_files_are_whole_scripts():
    for script in ("torchrun.sh", "slurm.sbatch"):
        subprocess.run(["bash", "-n", PROJECT / "scripts" / script], check=True, timeout=30)
    wrong = subprocess.run(
        ["bash", PROJECT / "scripts" / "torchrun.sh", "fit"], capture_output=True, text=True, timeout=30, check=False
    )
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("torchrun.sh: first the number of processes of this machine")


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_fit_and_test_on_two_gpus(tmp_path, method):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    shipped = PROJECT / "configs" / f"{method}.yaml"
    for command in ("fit", "test"):
        run(tmp_path, "seqlit", command, "--config", shipped, *DDP[:2], "--trainer.devices", "2")
    (found,) = tmp_path.glob("runs/*/*")
    assert (found / "report" / "metrics.json").is_file()


def test_synchronised_norms_are_refused(tmp_path):
    config = ("--config", PROJECT / "configs" / "tda_portfolio" / "us20.yaml", *SMALL, *DDP, "--trainer.devices", "2")
    command = ["seqlit", "fit", *config, "--trainer.sync_batchnorm", "true"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    ended = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 2, ended.stderr
    assert "seqlit: error: trainer.sync_batchnorm must be false" in ended.stderr
