"""A fitted run of each method: read in a fresh process, searched for what is no plain value, and spoilt by NaN."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = {
    "sasrec_cce": "recommendations.parquet",
    "concealed_attack": "adversarial_series.parquet",
    "kernel_attention": "embeddings.parquet",
    "tda_portfolio": "weights.parquet",
}


class Run:
    """The folder a run was made in, that of the run itself, and what ``predict`` wrote there at first."""

    def __init__(self, place: Path, table: str) -> None:
        self.place, self.config = place, place / "toy.yaml"
        (self.folder,) = place.glob("runs/*/version_0")
        self.checkpoint = self.folder / "checkpoints" / "best.ckpt"
        self.table = self.folder / table
        self.predictions = pl.read_parquet(self.table)


@pytest.fixture(scope="session")
def fitted(toys, tmp_path_factory):
    """``fitted(method)``: its toy, fitted and predicted once by the real command."""
    from lightning_modules.cli import main

    made: dict[str, Run] = {}

    def make(method: str) -> Run:
        if method not in made:
            place = tmp_path_factory.mktemp(method)
            (place / "toy.yaml").write_text(yaml.safe_dump(toys.config(method)), encoding="utf-8")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(place)
                for command in ("fit", "predict"):
                    patch.setattr(sys, "argv", ["seqlit", command, "--config", "toy.yaml"])
                    main()
            made[method] = Run(place, METHODS[method])
        return made[method]

    return make


# Predicts by the command, then builds the objects in Python, as a notebook would, and predicts once more.
ELSEWHERE = """
import sys, warnings
import torch
torch.set_num_threads(1)
real, asked = torch.load, []
def load(*arguments, **options):
    asked.append(options.get("weights_only"))
    return real(*arguments, **options)
torch.load = load

from lightning import Trainer
from lightning_modules.cli import CLI_OPTIONS, SeqlitCLI, main
checkpoint, table, copy = sys.argv[1:]
sys.argv = ["seqlit", "predict", "--config", "toy.yaml", "--ckpt_path", checkpoint]
main()

import os
os.rename(table, copy)
class Built(SeqlitCLI):
    def parse_arguments(self, parser, args):
        self.config = parser.parse_args(args)
    def _run_subcommand(self, subcommand):
        pass
cli = Built(args=sys.argv[1:], trainer_defaults={"callbacks": []}, **CLI_OPTIONS)
cli.trainer.predict(cli.model, cli.datamodule, ckpt_path=checkpoint, weights_only=True, return_predictions=False)
assert asked and all(asked), asked
"""


@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_process_predicts_the_same_bit_for_bit(fitted, method):
    run = fitted(method)
    run.table.unlink()
    copy = run.place / "by_command.parquet"
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", ELSEWHERE, str(run.checkpoint), str(run.table), str(copy)]
    done = subprocess.run(command, cwd=run.place, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert pl.read_parquet(copy).equals(run.predictions), "from the command"
    assert pl.read_parquet(run.table).equals(run.predictions), "from Python"


def left_in(run: Run) -> dict[Path, int]:
    """Files of the run folder and when they were written."""
    return {path.relative_to(run.folder): path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("method", "command"), [*((method, "predict") for method in METHODS), ("sasrec_cce", "test")])
def test_a_debugging_run_writes_no_results(fitted, seqlit, monkeypatch, method, command):
    run = fitted(method)
    monkeypatch.chdir(run.place)
    before = left_in(run)
    status, out, error = seqlit(command, "--config", "toy.yaml", "--trainer.fast_dev_run", "true")
    assert status == 0, error
    assert out.count("seqlit: a fast_dev_run writes no results") == 1
    assert left_in(run) == before


def test_results_of_a_part_of_the_data_stand_beside_those_of_all(fitted, seqlit, monkeypatch):
    run = fitted("sasrec_cce")
    monkeypatch.chdir(run.place)
    before = left_in(run)
    small = ("--config", "toy.yaml", "--data.init_args.eval_batch_size", 4)
    for command in ("test", "predict"):
        status, _, error = seqlit(command, *small, f"--trainer.limit_{command}_batches", 2)
        assert status == 0, error
    after = left_in(run)
    assert {path: after[path] for path in before} == before
    added = {str(path) for path in after.keys() - before.keys()}
    assert all(path.startswith("partial/") for path in added)
    assert added >= {"partial/report/metrics.json", "partial/report/training.png", "partial/recommendations.parquet"}
    ranked = pl.read_parquet(run.folder / "partial/recommendations.parquet")
    assert 0 < ranked["user_id"].n_unique() <= 8 < run.predictions["user_id"].n_unique()


def strangers(value: Any, place: str = "") -> Iterator[str]:
    """Where something is neither tensor, number, text, list nor dict of these."""
    if isinstance(value, dict):
        for key, one in value.items():
            if not isinstance(key, str | int):
                yield f"{place}: key {key!r}"
            yield from strangers(one, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for number, one in enumerate(value):
            yield from strangers(one, f"{place}[{number}]")
    elif not (value is None or isinstance(value, torch.Tensor | bool | int | float | str)):
        yield f"{place}: {type(value).__name__}"


def test_the_walk_finds_what_is_no_plain_value():
    assert list(strangers({"a": [1, {"b": torch.nn.ReLU()}]})) == [".a[1].b: ReLU"]


@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_and_caches_hold_plain_values_only(fitted, method):
    run = fitted(method)
    for path in run.folder.glob("checkpoints/*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        assert not list(strangers(checkpoint))
        assert not checkpoint.get("hyper_parameters"), "what is injected is rebuilt from the config beside"
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["model"]["class_path"]
    for path in run.place.rglob("*.np[yz]"):
        np.load(path, allow_pickle=False)
    assert not [path for path in run.place.rglob("*") if path.suffix in (".pkl", ".pickle", ".joblib")]


FORBIDDEN = ("joblib.load", "pd.read_pickle", "yaml.load", "yaml.unsafe_load", "eval", "exec")
# They run what is in the file: allowed where alone, behind the word of the user that the file is trusted.
PROGRAM_LOADERS = {"torch.export.load", "torch.jit.load"}
LOADING_MODULES = {"pickle", "cloudpickle", "dill", "shelve", "torch.export", "torch.jit", "torch.package"}
BEHIND_TRUST = {"lightning_modules/attacks/victims.py": PROGRAM_LOADERS}


def test_nothing_reads_pickles(project):
    """No pickle, no ``joblib.load`` (its parallel calls are fine), no torch or NumPy file that may hold objects.

    Programs are read in one place, which asks for trust (``tests/unit/test_attack_victims.py``).
    """
    programs = {}
    for path in [*project.glob("lightning_modules/**/*.py"), *project.glob("datamodules/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.relative_to(project)}, line {getattr(node, 'lineno', 0)}"
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            beginnings = {".".join(name.split(".")[:n_words]) for name in names for n_words in (1, 2)}
            assert not beginnings & LOADING_MODULES, where
            if isinstance(node, ast.ImportFrom) and node.module == "torch":  # so that all calls have their full names
                assert not {f"torch.{alias.name}" for alias in node.names} & LOADING_MODULES, where
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("allow_pickle", "False") == "False", where
                if called == "torch.load":
                    assert given.get("weights_only") == "True", where
                assert called not in FORBIDDEN, where
                if called in PROGRAM_LOADERS:
                    programs.setdefault(str(path.relative_to(project)), set()).add(called)
    assert programs == BEHIND_TRUST


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_of_another_method_is_refused(fitted, refused, toys, method):
    other = fitted("tda_portfolio" if method != "tda_portfolio" else "sasrec_cce")
    line = refused(toys.config(method), "--ckpt_path", other.checkpoint, command="predict")
    assert any(words in line for words in ("loading state_dict for", "checkpoint was", "holds no")), line


PLANT = """
import torch
from lightning import Callback


class PlantNaN(Callback):
    def __init__(self, at: int, part: str) -> None:
        self.at, self.part, self.batches = at, part, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.batches == self.at:
            with torch.no_grad():
                for weight in pl_module.get_submodule(self.part).parameters():
                    weight.fill_(float("nan"))
            torch.save(batch, "planted.pt")
        self.batches += 1
"""
# Method, what is spoilt, before which batch of the run: for those with two phases, in both.
SPOILT = [
    ("sasrec_cce", "", 1),
    ("concealed_attack", "classifier", 0),
    ("concealed_attack", "copies.0.0", 3),
    ("kernel_attention", "model.encoder", 1),
    ("kernel_attention", "model.branches.kernel", 2),
    ("tda_portfolio", "", 0),
]


@pytest.mark.parametrize(("method", "part", "at"), SPOILT)
def test_nan_stops_each_method_and_leaves_the_batch(seqlit, toys, tmp_path, monkeypatch, method, part, at):
    (tmp_path / "planting.py").write_text(PLANT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "planting", raising=False)
    settings = toys.config(method)
    planted = {"class_path": "planting.PlantNaN", "init_args": {"at": at, "part": part}}
    settings["trainer"]["callbacks"].append(planted)
    (tmp_path / "spoilt.yaml").write_text(yaml.safe_dump(settings))
    status, _, error = seqlit("fit", "--config", "spoilt.yaml")
    assert status == 2, error
    (line,) = error.splitlines()
    assert line.startswith("seqlit: error: the loss is not finite at epoch ")
    (run,) = tmp_path.glob("runs/*/version_0")
    assert "nonfinite_batch.pt" in line
    kept = torch.load(run / "nonfinite_batch.pt", weights_only=True)
    given = torch.load(tmp_path / "planted.pt", weights_only=True)
    assert kept["batch"].keys() == given.keys()
    for key, value in given.items():
        assert torch.equal(kept["batch"][key], value), key
    assert kept["parameters"]
    assert all(name.startswith(part) for name in kept["parameters"]), "the step was not made"
    assert kept["gradients"]
    assert not [path for path in run.rglob(".*") if path.is_file()], "a draft was left"
