"""A fit that is refused, for its strategy or for what is only known later, says one line and leaves nothing behind."""

import json
from pathlib import Path

import pytest
import torch
import yaml

METHODS = ["sasrec_cce", "concealed_attack", "kernel_attention", "tda_portfolio"]
LIGHTNING = "lightning.pytorch.strategies"
STRATEGIES = {
    "fsdp": ["fsdp"],
    "deepspeed": ["deepspeed_stage_2"],
    "model parallel": [f"{LIGHTNING}.ModelParallelStrategy"],
    "spawned": ["ddp_spawn", "--trainer.devices", "2"],
    "notebook": ["ddp_notebook", "--trainer.devices", "2"],
    "xla": ["xla"],
}


def everything_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if ".seqlit_cache" not in path.parts}


@pytest.fixture
def refused(seqlit, tmp_path):
    """``refused(config, *arguments) -> the one line`` of a fit with the shipped logger; nothing new may be left."""

    def call(config, *arguments):
        path = tmp_path / "toy.yaml"
        path.write_text(yaml.safe_dump(config))
        before = everything_below(tmp_path)
        status, _, error = seqlit("fit", "--config", path, *arguments)
        assert status == 2, error
        (line,) = error.splitlines()
        assert line.startswith("seqlit: error: ")
        assert everything_below(tmp_path) == before, "something was left behind"
        return line

    return call


# Each strategy once, each method once in the short suite: what takes the time is to parse a config.
SHORT = {*((METHODS[0], strategy) for strategy in STRATEGIES), *((method, "spawned") for method in METHODS)}


@pytest.mark.parametrize(
    ("method", "strategy"),
    [
        pytest.param(method, strategy, marks=[] if (method, strategy) in SHORT else pytest.mark.slow)
        for method in METHODS
        for strategy in STRATEGIES
    ],
)
def test_strategies_that_are_not_for_use_are_refused(refused, toys, method, strategy):
    name, *more = STRATEGIES[strategy]
    line = refused(toys.config(method), "--trainer.strategy", name, *more)
    assert "trainer.strategy must be 'auto', 'replicated' or 'ddp'" in line
    assert f"got '{name}'" in line


def test_a_strategy_with_arguments_is_refused_by_its_class(refused, toys):
    config = toys.config("sasrec_cce")
    config["trainer"]["strategy"] = {"class_path": f"{LIGHTNING}.DDPStrategy", "init_args": {"static_graph": True}}
    assert f"got '{LIGHTNING}.DDPStrategy'" in refused(config)


@pytest.mark.parametrize(
    "strategy",
    [
        "auto",
        "ddp",
        "replicated",
        {"class_path": "lightning_modules.many_devices.ReplicatedStrategy", "init_args": {"timeout": 60.0}},
        {"class_path": f"{LIGHTNING}.SingleDeviceStrategy", "init_args": {"device": "cpu"}},
    ],
    ids=str,
)
def test_strategies_for_use_pass(strategy):
    from lightning_modules.many_devices import check_strategy

    check_strategy(strategy)


# Whose fit, what is wrong, words of the line: found by the model, at the start of training, by the data, by a callback.
REFUSED = {
    "epochs of the encoder and the aggregators": (
        "kernel_attention",
        ["--trainer.max_epochs", "9"],
        "trainer.max_epochs must be 2",
    ),
    "epochs of a plan": ("concealed_attack", ["--trainer.max_epochs", "9"], "trainer.max_epochs must be 3"),
    "no validation to choose attacks by": (
        "concealed_attack",
        ["--trainer.limit_val_batches", "0"],
        "attacks are chosen on validation series",
    ),
    "a day that no market has": ("tda_portfolio", ["--data.init_args.test_start", "2090-01-01"], "test_start"),
    "items that are too rare": ("sasrec_cce", ["--data.init_args.min_item_count", "9999"], "nothing is left"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_fit_that_is_refused_leaves_no_run_folder(refused, toys, tmp_path, name):
    method, arguments, words = REFUSED[name]
    assert words in refused(toys.config(method), *arguments)
    assert not (tmp_path / "runs").exists()


def test_runs_beside_a_refused_one_stay(refused, toys, tmp_path):
    other = tmp_path / "runs" / "kernel_attention" / "version_0"
    other.mkdir(parents=True)
    (other / "config.yaml").write_text("{}")
    refused(toys.config("kernel_attention"), "--trainer.max_epochs", "9")
    assert [path.name for path in other.parent.iterdir()] == ["version_0"]


def test_a_resume_that_is_refused_leaves_the_run_as_it_was(seqlit, refused, toys, tmp_path):
    config = toys.config("kernel_attention")
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(config))
    assert seqlit("fit", "--config", "toy.yaml")[0] == 0
    (run,) = tmp_path.glob("runs/*/version_0")
    facts = (run / "fit.json").read_text()
    assert json.loads(facts)["epochs"] == 2
    weights = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    line = refused(config, "--trainer.max_epochs", "9", "--ckpt_path", "last")
    assert "trainer.max_epochs must be 2" in line
    assert (run / "fit.json").read_text() == facts
    left = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(left[name], value) for name, value in weights.items())


def test_a_fit_that_fails_once_it_trains_keeps_its_folder(seqlit, toys, tmp_path):
    """What was saved of the failure is wanted."""
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(toys.config("sasrec_cce")))
    status, _, error = seqlit("fit", "--config", "toy.yaml", "--model.init_args.optimizer.init_args.lr", "1e30")
    assert status == 2
    assert "not finite" in error
    (run,) = tmp_path.glob("runs/*/version_0")
    assert {"config.yaml", "nonfinite_batch.pt"} <= {path.name for path in run.iterdir()}
