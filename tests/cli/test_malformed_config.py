"""Configs, arguments, checkpoints and output folders that cannot serve: one clear line, and nothing left behind."""

import errno
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

NO_LOGGER = ("--trainer.logger", "false", "--trainer.enable_checkpointing", "false")
SHOP, SERIES, EVENTS, PRICES = "sasrec_cce", "concealed_attack", "kernel_attention", "tda_topology"


class Case(NamedTuple):
    """Whose data, arguments of the command line, words of the line."""

    method: str
    arguments: dict[str, Any]
    words: tuple[str, ...]


def data(method: str, words: tuple[str, ...], **arguments: Any) -> Case:
    return Case(method, {f"--data.init_args.{name}": value for name, value in arguments.items()}, words)


def trainer(name: str, value: Any, *words: str) -> Case:
    return Case(SHOP, {f"--trainer.{name}": value}, words)


ARGUMENTS = {
    # Ranges
    "shop: batch of none": data(SHOP, ("batch_size must be at least 1, got 0",), batch_size=0),
    "shop: negative length": data(SHOP, ("max_length must be at least 1, got -5",), max_length=-5),
    "shop: share above one": data(SHOP, ("test_fraction", "1.5"), test_fraction=1.5),
    "shop: share that is no number": data(SHOP, ("test_fraction", "nan"), test_fraction=".nan"),
    "shop: negative workers": data(SHOP, ("num_workers", "-1"), num_workers=-1),
    "shop: infinite share": data(SHOP, ("validation_user_fraction", "inf"), validation_user_fraction=".inf"),
    "events: batch of none": data(EVENTS, ("batch_size must be at least 1, got 0",), batch_size=0),
    "events: shares above one": data(EVENTS, ("their sum below 1", "0.9"), validation_fraction=0.9),
    "events: share that is no number": data(EVENTS, ("test_fraction", "nan"), test_fraction=".nan"),
    "events: negative categories": data(EVENTS, ("max_categories must be at least 1, got -2",), max_categories=-2),
    "series: batch of none": data(SERIES, ("batch_size must be at least 1, got 0",), batch_size=0),
    "series: share of all": data(
        SERIES, ("validation_fraction must be at least 0 and below 1, got 1",), validation_fraction=1
    ),
    "series: a fold too many": data(SERIES, ("fold", "5"), fold=5),
    "series: no step left": data(SERIES, ("max_length", "0"), max_length=0),
    "prices: batch of none": data(PRICES, ("batch_size must be at least 1, got 0",), batch_size=0),
    "prices: negative purge": data(PRICES, ("purge_days must be at least 0, got -1",), purge_days=-1),
    "prices: disagreement that is no number": data(PRICES, ("max_disagreement", "nan"), max_disagreement=".nan"),
    "prices: a day that is none": data(PRICES, ("test_start", "2016-02-31"), test_start="2016-02-31"),
    "prices: purge of everything": data(PRICES, ("purge_days",), purge_days=9999),
    # Choices
    "shop: unknown split": data(SHOP, ("split", "random"), split="random"),
    "events: unknown transform": data(EVENTS, ("numeric_transform", "log2"), numeric_transform="log2"),
    "series: unknown normalisation": data(SERIES, ("normalise", "z"), normalise="z"),
    "prices: unknown gaps": data(PRICES, ("gaps", "drop"), gaps="drop"),
    # Conflicts
    "shop: split by a time that is not given": data(SHOP, ("time_column",), time_column="null"),
    "shop: no order at all": data(SHOP, ("time_column", "order_column"), time_column="null", split="leave_last_out"),
    "shop: an order that is text": data(
        SHOP,
        ("'day' (order_column) must hold integers or dates, got String",),
        split="leave_last_out",
        time_column="null",
        order_column="day",
    ),
    "events: days of the other split": data(EVENTS, ("validation_start", "'users'"), validation_start="2020-02-01"),
    "events: split by time without days": data(EVENTS, ("validation_start",), split="time"),
    "events: folds given twice": data(
        EVENTS,
        ("fold_column", "'time'"),
        split="time",
        validation_start="2020-02-01",
        test_start="2020-02-10",
        fold_column="code",
    ),
    "events: test before validation": data(
        EVENTS, ("before test_start",), split="time", validation_start="2020-03-01", test_start="2020-02-10"
    ),
    "events: labels without a table": data(EVENTS, ("users_path",), label_columns="[churned]"),
    "prices: test before train": data(PRICES, ("test_start 2014-01-01", "train_start"), test_start="2014-01-01"),
    "prices: ends before it starts": data(PRICES, ("test_end 2015-06-01", "test_start"), test_end="2015-06-01"),
    "prices: tickers without prices": data(PRICES, ("ticker_column", "price_column"), ticker_column="ticker"),
    # Types
    "shop: text for a size": data(SHOP, ("batch_size", "many"), batch_size="many"),
    "shop: a fraction of a row": data(SHOP, ("batch_size", "2.5"), batch_size=2.5),
    "shop: a list for a size": data(SHOP, ("batch_size", "[8]"), batch_size="[8]"),
    "events: text for a list": data(EVENTS, ("categorical",), categorical="{a: b}"),
    "events: a list for a mapping": data(EVENTS, ("targets",), targets="[a]"),
    "series: a flag for a number": data(SERIES, ("seed",), seed="yes"),
    "prices: a number for a path": data(PRICES, ("sectors_path",), sectors_path="[1]"),
    # Names
    "shop: unknown argument": data(SHOP, ("n_batches",), n_batches=3),
    "events: unknown argument": data(EVENTS, ("user_col",), user_col="customer"),
    "unknown data module": Case(SHOP, {"--data.class_path": "datamodules.Interactions"}, ("datamodules.Interactions",)),
    "data module that is none": Case(SHOP, {"--data.class_path": "torch.nn.Linear"}, ("torch.nn.Linear",)),
    "unknown package": Case(SHOP, {"--model": "nowhere.Model"}, ("nowhere.Model",)),
    "model that is none": Case(
        SHOP, {"--model": "datamodules.InteractionsDataModule"}, ('"model"', "subclass of LightningModule")
    ),
    "callback that is none": Case(SHOP, {"--trainer.callbacks": "torch.nn.ReLU"}, ("torch.nn.ReLU",)),
    "sampler that is none": data(EVENTS, ("torch.nn.ReLU",), sampler="torch.nn.ReLU"),
    "unknown option": Case(SHOP, {"--modle": "x"}, ("unrecognized arguments: --modle",)),
    # Trainer
    "unknown accelerator": trainer("accelerator", "tpuu", "accelerator", "tpuu"),
    "no devices": trainer("devices", 0, "devices"),
    "negative devices": trainer("devices", -3, "devices", "> 0"),
    "unknown strategy": trainer("strategy", "magic", "strategy", "magic"),
    "unknown precision": trainer("precision", "8-bit", "trainer.precision", "bf16-mixed"),
    "text for epochs": trainer("max_epochs", "many", "trainer.max_epochs", "int"),
    "negative epochs": trainer("max_epochs", -7, "max_epochs", "-7"),
    "negative batches": trainer("limit_train_batches", -1, "limit_train_batches", "-1"),
    "share of validation above one": trainer("val_check_interval", 1.7, "val_check_interval"),
    "unknown clipping": trainer("gradient_clip_algorithm", "cut", "gradient_clip_algorithm", "cut"),
    "nothing accumulated": trainer("accumulate_grad_batches", 0, "accumulate_grad_batches", "0"),
    "unknown profiler": trainer("profiler", "clock", "profiler", "'simple', 'advanced'"),
    "time in no form": trainer("max_time", "soon", "soon"),
    "unknown argument of the trainer": trainer("max_epocs", 3, "max_epocs"),
    "seed that is none": Case(SHOP, {"--seed_everything": "lucky"}, ("seed_everything", "int")),
    "negative seed": Case(SHOP, {"--seed_everything": -1}, ("-1 is not in bounds", "from 0 to")),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_that_cannot_serve(refused, toys, name):
    case = ARGUMENTS[name]
    given = [word for pair in case.arguments.items() for word in map(str, pair)]
    line = refused(toys.data_only(case.method), *given)
    for words in case.words:
        assert words in line


FILES = {
    "absent": (None, ("does not exist", "absent.yaml")),
    "empty": (b"", ("wrong.yaml must hold sections", "it holds nothing")),
    "comments alone": (b"# nothing yet\n", ("wrong.yaml must hold sections", "it holds nothing")),
    "a list": (b"- trainer\n- model\n", ("wrong.yaml must hold sections", "it holds a list")),
    "a word": (b"trainer\n", ("wrong.yaml must hold sections", "it holds a single value")),
    "tabs": (b"trainer:\n\tmax_epochs: 1\n", ("wrong.yaml, line 2", "'\\t'")),
    "indented wrongly": (b"trainer:\n  max_epochs: 1\n devices: 1\n", ("wrong.yaml, line 3: is not YAML",)),
    "a key twice": (
        b"trainer:\n  max_epochs: 1\n  devices: 1\n  max_epochs: 2\n",
        ("wrong.yaml, line 4: key 'max_epochs' is already in line 2",),
    ),
    "a section twice": (b"trainer: {}\nmodel: {}\ntrainer: {}\n", ("wrong.yaml, line 3", "'trainer'", "line 1")),
    "a quote left open": (b'trainer:\n  accelerator: "cpu\n', ("wrong.yaml, line 3: is not YAML",)),
    "latin-1": (
        "trainer: {max_epochs: 1}  # n\xe9\n".encode("latin-1"),
        ("wrong.yaml is not text in UTF-8", "byte 29"),
    ),
    "utf-16": ("trainer: {max_epochs: 1}\n".encode("utf-16"), ("wrong.yaml is not text in UTF-8",)),
    "binary": (b"\x00\x01\x02\x03", ("wrong.yaml is not YAML",)),
    "a Python object": (
        b"trainer: !!python/object/apply:os.system ['touch owned']\n",
        ("wrong.yaml: trainer must hold arguments", "it holds a list"),
    ),
    "an unknown section": (b"model: lightning.pytorch.demos.boring_classes.BoringModel\nmodels: {a: 1}\n", ("models",)),
    "a list for a section": (
        b"model: lightning.pytorch.demos.boring_classes.BoringModel\ntrainer: [1, 2]\n",
        ("wrong.yaml: trainer must hold arguments", "it holds a list"),
    ),
    "a number for a model": (b"model: 3\n", ('"model"', "a class path")),
    "no model": (b"data: {class_path: datamodules.TimeSeriesDataModule, init_args: {name: x}}\n", ("fit.model",)),
    "no data": (b"model: lightning.pytorch.demos.boring_classes.BoringModel\n", ("data: no data module given",)),
    "an unknown anchor": (b"trainer: *there\n", ("wrong.yaml, line 1", "'there'")),
}


@pytest.mark.parametrize("name", FILES)
def test_a_config_that_cannot_serve(refused, tmp_path, name):
    content, words = FILES[name]
    line = refused(content) if content is not None else refused(None, "--config", "absent.yaml")
    for word in words:
        assert word in line
    assert not (tmp_path / "owned").exists(), "a tag of YAML ran a command"


# What must be built whole: the model meets the data.
WHOLE = {
    "one stock": (PRICES, ["--data.init_args.tickers_path", "one.txt"], "n_clusters must be at most the number"),
    "more clusters than stocks": (
        PRICES,
        [
            "--model.init_args.clusterers",
            "[{class_path: lightning_modules.portfolio.clusterers.WardClusters, init_args: {n_clusters: 60}}]",
        ],
        "n_clusters must be at most the number of eligible stocks",
    ),
    "a learning rate that is no number": (SHOP, ["--model.init_args.optimizer.init_args.lr", ".nan"], "nan"),
    "a negative learning rate": (SHOP, ["--model.init_args.optimizer.init_args.lr", "-1"], "-1"),
    "dropout of more than all": (SHOP, ["--model.init_args.dropout", "1.5"], "1.5"),
    "no width": (SHOP, ["--model.init_args.d_model", "0"], "d_model"),
    "epochs that do not add up": (EVENTS, ["--trainer.max_epochs", "9"], "trainer.max_epochs must be 2"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_model_that_does_not_fit_its_data(refused, toys, tmp_path, name):
    method, arguments, words = WHOLE[name]
    if "one.txt" in arguments:
        (tmp_path / "one.txt").write_text(toys.a_ticker + "\n")
    settings = toys.config(method)
    settings["trainer"]["callbacks"] = []  # they would want a logger
    assert words in refused(settings, *arguments, *NO_LOGGER)


# Module that is absent, its extra, and arguments that need it.
EXTRAS = {
    "wandb": ("wandb", SHOP, ["--trainer.logger", "lightning.pytorch.loggers.WandbLogger"]),
    "sktime": ("timeseries", SERIES, ["--data.init_args.folder", "null", "--data.init_args.name", "GunPoint"]),
}


@pytest.mark.parametrize("module", EXTRAS)
def test_a_missing_extra_is_named(refused, toys, monkeypatch, module):
    extra, method, arguments = EXTRAS[module]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else find(name, *rest))
    if module == "wandb":
        from lightning.pytorch.loggers import wandb
        from lightning_utilities.core.imports import RequirementCache

        monkeypatch.setattr(wandb, "_WANDB_AVAILABLE", RequirementCache("wandb>=9999"))
    assert f"pip install 'seqlit[{extra}]'" in refused(toys.data_only(method), *arguments)


# Whose run, the file that cannot be written, the error of the system, and the command that writes it.
UNWRITABLE = {
    "cache of interactions": (SHOP, ".seqlit_cache/", errno.ENOSPC, "fit"),
    "cache of events": (EVENTS, ".seqlit_cache/", errno.EROFS, "fit"),
    "config": (SHOP, "config.yaml", errno.ENOSPC, "fit"),
    "read-only config": (PRICES, "config.yaml", errno.EROFS, "fit"),
    "best checkpoint": (SHOP, "best.ckpt", errno.ENOSPC, "fit"),
    "last checkpoint": (SHOP, "last.ckpt", errno.ENOSPC, "fit"),
    "report": (SHOP, "report.md", errno.ENOSPC, "test"),
    "predictions": (SHOP, "recommendations.parquet", errno.ENOSPC, "predict"),
}


@pytest.mark.parametrize("name", UNWRITABLE)
def test_a_folder_that_cannot_be_written_to(seqlit, toys, tmp_path, monkeypatch, name):
    """The rename that would make a draft the file fails, as it does on a full disk or one mounted read-only."""
    method, ending, number, command = UNWRITABLE[name]
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(toys.config(method)))
    if command != "fit":
        assert seqlit("fit", "--config", path)[0] == 0
    rename, refusals = os.replace, []

    def replace(source: Any, target: Any) -> None:
        if ending in str(target):
            refusals.append(Path(target))
            raise OSError(number, os.strerror(number), str(target))
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    status, _, error = seqlit(command, "--config", path)
    assert refusals, "the file was not written at all"
    assert status == 2, error
    (line,) = error.splitlines()
    assert line.startswith("seqlit: error: ")
    assert os.strerror(number) in line
    assert refusals[0].name in line
    left = [found for found in tmp_path.rglob(".*") if found.name != ".seqlit_cache"]
    assert not left, "drafts were left"
    assert not refusals[0].exists()


def test_a_disk_that_fills_while_a_checkpoint_is_written(seqlit, toys, tmp_path, monkeypatch):
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(toys.config(SHOP)))

    def half(checkpoint: Any, stream: Any, **options: Any) -> None:
        stream.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", half)
    status, _, error = seqlit("fit", "--config", path)
    assert status == 2
    (line,) = error.splitlines()
    assert "No space left" in line
    (run,) = tmp_path.glob("runs/*/version_0")
    assert not list((run / "checkpoints").iterdir())


CONSOLE = {
    "no config": ([], ("fit.model",)),
    "absent config": (["--config", "absent.yaml"], ("absent.yaml",)),
    "wrong argument": (
        ["--config", "toy.yaml", "--data.init_args.batch_size", "0"],
        ("batch_size must be at least 1",),
    ),
    "absent data": (
        ["--config", "toy.yaml", "--data.init_args.paths", "absent.csv"],
        ("no file matches 'absent.csv'",),
    ),
}


@pytest.mark.parametrize("name", CONSOLE)
def test_the_console_script(toys, tmp_path, name):
    arguments, words = CONSOLE[name]
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(toys.data_only(SHOP)))
    script = Path(sys.executable).with_name("seqlit")
    done = subprocess.run([script, "fit", *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("seqlit: error: ")
    for word in words:
        assert word in line
    assert [path.name for path in tmp_path.iterdir()] == ["toy.yaml"]
