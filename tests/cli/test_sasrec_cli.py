"""The real command on small files: fit, test, predict, resume, overrides, and every kind of wrong input in one line."""

import csv
import importlib.util
import json
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import yaml

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs" / "sasrec_cce").glob("*.yaml"))
SHIPPED = next(path for path in CONFIGS if path.stem == "online_retail")


def write_shop(path: Path, *, n_users=60, n_items=40, seed=0, first_item=0) -> Path:
    """Baskets of three items that move along a ring of items, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    n_baskets = 12
    start = rng.integers(0, n_items, n_users)
    user, basket, slot = np.meshgrid(np.arange(n_users), np.arange(n_baskets), np.arange(3), indexing="ij")
    item = (start[user] + 3 * basket + slot) % n_items + first_item
    day = basket * 7 + rng.integers(0, 5, (n_users, n_baskets, 1))
    frame = pl.DataFrame(
        {
            "customer": [f"c{number}" for number in user.ravel()],
            "article": [f"a{number}" for number in item.ravel()],
            "day": (np.datetime64("2024-01-01") + day.astype("timedelta64[D]")).ravel(),
        }
    )
    frame.write_csv(path)
    return path


@pytest.fixture
def shop(tmp_path):
    return write_shop(tmp_path / "shop.csv")


@pytest.fixture
def config(tmp_path, shop):
    """The shipped config, cut down to a toy and pointed at the small shop."""
    settings = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    settings["trainer"] |= {"max_epochs": 2, "accelerator": "cpu", "deterministic": True}
    settings["model"]["init_args"] |= {"d_model": 16, "n_recommendations": 5, "cutoffs": [1, 5, 10]}
    settings["model"]["init_args"]["loss"]["init_args"]["n_negatives"] = 8
    settings["data"]["init_args"] |= {
        "paths": "shop.csv",
        "user_column": "customer",
        "item_column": "article",
        "time_column": "day",
        "where": [],
        "max_length": 12,
        "batch_size": 16,
        "validation_user_fraction": 0.2,
    }
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def one_line(error: str) -> str:
    lines = [line for line in error.splitlines() if line.strip()]
    assert len(lines) == 1, error
    assert lines[0].startswith("seqlit: error: ")
    assert len(lines[0]) < 500, "a line nobody reads"
    assert "Namespace(" not in lines[0]
    return lines[0]


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def all_below(folder: Path) -> set[str]:
    """Files and folders, but for the cache, which is whole or not there."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {name for name in names if not name.startswith(".seqlit_cache")}


def test_fit_test_predict(seqlit, config, tmp_path, shop):
    status, out, err = seqlit("fit", "--config", config)
    assert status == 0, err
    run = tmp_path / "runs" / "sasrec_cce" / "version_0"
    assert f"run folder {Path('runs/sasrec_cce/version_0')}" in out
    assert files_below(run) == {
        "config.yaml",
        "metrics.csv",
        "fit.json",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
    }
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["model"]["init_args"]["d_model"] == 16
    with (run / "metrics.csv").open(newline="") as file:
        logged = list(csv.DictReader(file))
    assert [row["epoch"] for row in logged if row["train/loss"]] == ["0", "1"]
    metrics_before = (run / "metrics.csv").read_bytes()

    status, out, err = seqlit("test", "--config", config)
    assert status == 0, err
    assert (run / "metrics.csv").read_bytes() == metrics_before
    pictures = {"comparison.png", "history_length.png", "popularity.png", "training.png"}
    assert files_below(run / "report") == {"metrics.json", "report.md", *pictures}
    for picture in pictures:
        assert (run / "report" / picture).read_bytes().startswith(b"\x89PNG")
    report = json.loads((run / "report" / "metrics.json").read_text())
    baselines = {"most_popular", "last_basket_markov", "covisitation", "personal_frequency"}
    assert set(report["baselines"]) == baselines == set(report["paired_difference"])
    assert {"ndcg@10", "hit_rate@1", "coverage@10", "surprisal@10"} <= set(report["model"])
    for name in baselines:
        mean, low, high = report["paired_difference"][name]["ndcg@10"]
        assert low <= mean <= high
        # The interval is that of the difference of the very numbers in the table.
        assert mean == pytest.approx(report["model"]["ndcg@10"] - report["baselines"][name]["ndcg@10"], abs=1e-6)
    assert report["n_users"] > 10
    assert report["seed"] == 42
    assert report["seconds"]["fit"] > 0 < report["seconds"]["test"]

    status, out, err = seqlit("predict", "--config", config)
    assert status == 0, err
    ranked = pl.read_parquet(run / "recommendations.parquet")
    assert ranked.columns == ["user_id", "rank", "item_id", "score"]
    assert set(ranked["user_id"]) == {f"c{number}" for number in range(60)}
    assert set(ranked["item_id"]) <= set(pl.read_csv(shop)["article"])
    by_user = ranked.group_by("user_id").agg(pl.col("rank"), pl.col("item_id").n_unique(), pl.col("score").diff().max())
    assert by_user["rank"].to_list() == [[1, 2, 3, 4, 5]] * 60
    assert (by_user["item_id"] == 5).all()
    assert by_user["score"].max() <= 0
    assert not list(run.rglob(".*")), "a draft was left behind"


def test_history_removed_never_recommends_what_the_user_bought(seqlit, config, tmp_path, shop):
    off = ("--data.init_args.recommend_seen", "false")
    assert seqlit("fit", "--config", config, *off)[0] == 0
    assert seqlit("predict", "--config", config, *off)[0] == 0
    ranked = pl.read_parquet(tmp_path / "runs/sasrec_cce/version_0/recommendations.parquet")
    bought = pl.read_csv(shop).select(user_id="customer", item_id="article")
    assert ranked.height > 0
    assert ranked.join(bought, on=["user_id", "item_id"]).height == 0


def test_validate_logs_and_override_takes_effect(seqlit, config, tmp_path):
    override = ("--model.init_args.d_model", "8", "--model.init_args.loss.init_args.sharing", "tile")
    assert seqlit("fit", "--config", config, *override)[0] == 0
    status, out, err = seqlit("validate", "--config", config, *override)
    assert status == 0, err
    assert "val/ndcg@10" in out
    resolved = yaml.safe_load((tmp_path / "runs/sasrec_cce/version_0/config.yaml").read_text())["model"]["init_args"]
    assert resolved["d_model"] == 8
    assert resolved["loss"]["init_args"]["sharing"] == "tile"
    # Without the override it is another config, and the message says in what.
    status, _, err = seqlit("test", "--config", config)
    assert status == 2
    assert "model.init_args.d_model is 8 there, 16 here" in one_line(err)


def test_newest_run_of_the_config_is_taken(seqlit, config, tmp_path):
    assert seqlit("fit", "--config", config)[0] == 0
    assert seqlit("fit", "--config", config, "--trainer.max_epochs", "1")[0] == 0
    assert seqlit("fit", "--config", config, "--seed_everything", "7")[0] == 0
    assert seqlit("test", "--config", config, "--data.init_args.eval_batch_size", "7")[0] == 0
    tested = [run.name for run in (tmp_path / "runs" / "sasrec_cce").iterdir() if (run / "report").exists()]
    assert tested == ["version_1"]


def test_resume_from_an_epochs_end_is_bit_for_bit(seqlit, config, tmp_path):
    """Dropout on: two sittings of two epochs give the weights, the optimiser and the metrics of one of four."""
    config.write_text(config.read_text().replace("name: sasrec_cce", "name: whole"))
    assert seqlit("fit", "--config", config, "--trainer.max_epochs", "4")[0] == 0
    config.write_text(config.read_text().replace("name: whole", "name: parts"))
    assert seqlit("fit", "--config", config, "--trainer.max_epochs", "2")[0] == 0
    torch.rand(7)  # another process would not be where this one is
    status, _, err = seqlit("fit", "--config", config, "--trainer.max_epochs", "4", "--ckpt_path", "last")
    assert status == 0, err
    runs = tmp_path / "runs"
    assert [path.name for path in (runs / "parts").iterdir()] == ["version_0"]
    whole, parts = (
        torch.load(runs / name / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("whole", "parts")
    )
    assert whole["global_step"] == parts["global_step"] > 0
    assert int(whole["state_dict"]["micro_step"]) == whole["global_step"]
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][key]), key
    for index, state in whole["optimizer_states"][0]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, parts["optimizer_states"][0]["state"][index][key]), (index, key)

    def rows(name):
        with (runs / name / "version_0" / "metrics.csv").open(newline="") as file:
            return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]

    assert rows("whole") == rows("parts")


def test_checkpoints_hold_plain_values_only(seqlit, config, tmp_path):
    assert seqlit("fit", "--config", config, "--trainer.max_epochs", "1")[0] == 0
    checkpoint = torch.load(tmp_path / "runs/sasrec_cce/version_0/checkpoints/best.ckpt", weights_only=True)
    assert "hyper_parameters" not in checkpoint
    assert any("RandomState" in key for key in checkpoint["callbacks"])


def test_last_is_the_last_epoch_even_when_it_is_not_the_best(seqlit, config, tmp_path):
    """At a learning rate of 0 no epoch beats the first."""
    assert seqlit("fit", "--config", config, "--model.init_args.optimizer.init_args.lr", "0.0")[0] == 0
    folder = tmp_path / "runs/sasrec_cce/version_0/checkpoints"
    epochs = {name: torch.load(folder / name, weights_only=True)["epoch"] for name in ("best.ckpt", "last.ckpt")}
    assert epochs == {"best.ckpt": 0, "last.ckpt": 1}


def test_resume_after_a_bad_last_epoch_repeats_no_epoch(seqlit, config, tmp_path):
    still = ("--config", config, "--model.init_args.optimizer.init_args.lr", "0.0")
    assert seqlit("fit", *still)[0] == 0
    run = tmp_path / "runs/sasrec_cce/version_0"
    with (run / "metrics.csv").open("a") as file:  # logged, but killed before its checkpoint was written
        header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
        file.write(",".join("2" if name in ("epoch", "train/loss") else "" for name in header) + "\n")
    assert seqlit("fit", *still, "--trainer.max_epochs", "4", "--ckpt_path", "last")[0] == 0
    with (run / "metrics.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file) if row["train/loss"]] == ["0", "1", "2", "3"]
    assert yaml.safe_load((run / "config_sitting_2.yaml").read_text())["trainer"]["max_epochs"] == 4
    assert json.loads((run / "fit.json").read_text())["epochs"] == 4


def test_steps_of_the_preparation_are_printed(seqlit, config):
    _, out, _ = seqlit("fit", "--config", config)
    assert "data: min_item_count 5: 2160 interactions, 60 users, 40 items" in out


def test_checkpoint_of_another_split_is_refused(seqlit, config, tmp_path):
    assert seqlit("fit", "--config", config, "--trainer.max_epochs", "1")[0] == 0
    checkpoint = tmp_path / "runs/sasrec_cce/version_0/checkpoints/best.ckpt"
    other = ("--config", config, "--ckpt_path", checkpoint, "--data.init_args.test_fraction", "0.4")
    status, _, err = seqlit("test", *other)
    assert status == 2
    assert "trained with test_fraction 0.1, here it is 0.4" in one_line(err)
    assert seqlit("predict", *other)[0] == 0  # nothing is asked, so nothing can leak


def test_checkpoint_is_refused_on_a_file_that_asks_for_its_training_rows(seqlit, config, tmp_path):
    assert seqlit("fit", "--config", config, "--trainer.max_epochs", "1")[0] == 0
    rows = pl.read_csv(tmp_path / "shop.csv").sort("day")
    rows.head(rows.height * 9 // 10).write_csv(tmp_path / "shop.csv")
    status, _, err = seqlit("test", "--config", config)
    assert status == 2
    assert "trained with cut_time '2024-" in one_line(err)
    assert seqlit("predict", "--config", config)[0] == 0


def test_seeds_of_the_reproduction_move_the_order_of_training_and_not_the_split(project, monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("reproduce", project / "scripts/reproduce_sasrec_cce.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    (tmp_path / "report").mkdir()
    (tmp_path / "report/metrics.json").write_text("{}")
    commands = []

    class Process:
        def __init__(self, command, **_):
            commands.append(command)
            self.stdout = [f"seqlit: run folder {tmp_path}\n"]

        def wait(self):
            return 0

    monkeypatch.setattr(script.subprocess, "Popen", Process)
    script.run("some.yaml", 43, [])
    for command in commands:
        assert command[command.index("--data.init_args.sampling_seed") + 1] == "43"
        assert "--data.init_args.seed" not in command
    assert len(commands) == 2


def test_cutoff_that_is_not_ranked(seqlit, config):
    only = ("--config", config, "--model.init_args.cutoffs", "[1,10]")
    assert seqlit("fit", *only, "--trainer.max_epochs", "1")[0] == 0
    settings = yaml.safe_load(config.read_text())
    settings["trainer"]["callbacks"][2]["init_args"] = {"cutoff": 7}
    config.write_text(yaml.safe_dump(settings))
    status, _, err = seqlit("test", *only)
    assert status == 2
    assert "cutoff must be one of the module's cutoffs [1, 10], got 7" in one_line(err)


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_no_validation_users_but_something_to_stop_by(seqlit, config):
    status, _, err = seqlit("fit", "--config", config, "--data.init_args.validation_user_fraction", "0")
    assert status == 2
    assert "val/ndcg@10" in one_line(err)


def test_a_single_user(seqlit, config, tmp_path):
    lines = (tmp_path / "shop.csv").read_text().splitlines()
    (tmp_path / "shop.csv").write_text("\n".join(line for line in lines if line.split(",")[0] in ("customer", "c7")))
    status, _, err = seqlit("fit", "--config", config)
    assert status == 2
    assert "at least 2 users are needed, got 1: user 'c7'" in one_line(err)


@pytest.mark.parametrize("kind", ["zip", "tensors", "truncated", "pickle"])
def test_files_that_are_no_checkpoints(seqlit, config, tmp_path, kind):
    path = tmp_path / "some.ckpt"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "text")
    elif kind == "tensors":
        torch.save({"weight": torch.zeros(3)}, path)
    elif kind == "truncated":
        torch.save({"state_dict": {"weight": torch.zeros(5000)}}, path)
        path.write_bytes(path.read_bytes()[:9000])
    else:
        torch.save({"state_dict": Path("x")}, path)  # not among what weights_only allows
    before = all_below(tmp_path)
    status, _, err = seqlit("test", "--config", config, "--ckpt_path", path)
    assert status == 2
    assert "some.ckpt is" in one_line(err)
    assert all_below(tmp_path) == before


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_parses_and_trains_on_small_data(seqlit, path, shop, tmp_path):
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    data = settings["data"]["init_args"]
    if not str(data["paths"]).startswith("bundled:"):
        # The set itself may not be redistributed: the same columns, filled with the small shop.
        names = {data["user_column"]: "customer", data["item_column"]: "article"}
        frame = pl.read_csv(shop, try_parse_dates=True).select(
            pl.col("customer").alias(data["user_column"]),
            pl.col("article").alias(data["item_column"]),
            *([pl.col("day").alias(data["time_column"])] if data.get("time_column") else []),
            *([pl.int_range(pl.len()).alias(data["order_column"])] if data.get("order_column") else []),
            rating=pl.lit(5),
        )
        assert set(names) <= set(frame.columns)
        frame.write_parquet(tmp_path / "small.parquet")
        settings["data"]["init_args"]["paths"] = "small.parquet"
    settings["trainer"] |= {
        "max_epochs": 1,
        "limit_train_batches": 2,
        "limit_val_batches": 1,
        "limit_test_batches": 1,
        "accelerator": "cpu",
    }
    settings["model"]["init_args"]["loss"]["init_args"]["n_negatives"] = 8
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    status, _, err = seqlit("fit", "--config", "small.yaml")
    assert status == 0, err
    status, _, err = seqlit("test", "--config", "small.yaml")
    assert status == 0, err


WRONG = {
    "test before any fit": (["test"], "no run of this config"),
    "resume before any fit": (["fit", "--ckpt_path", "last"], "no unfinished run of this config"),
    "absent checkpoint": (["test", "--ckpt_path", "nowhere.ckpt"], "no such checkpoint: nowhere.ckpt"),
    "checkpoint that is none": (["test", "--ckpt_path", "shop.csv"], "shop.csv is not a checkpoint"),
    "unknown model class": (["fit", "--model.class_path", "lightning_modules.SASRecBCE"], "SASRecBCE"),
    "unknown loss class": (["fit", "--model.init_args.loss.class_path", "nowhere.Loss"], "nowhere.Loss"),
    "unknown argument": (["fit", "--model.init_args.d_modell", "8"], "d_modell"),
    "text for a number": (["fit", "--model.init_args.d_model", "wide"], "d_model"),
    "no negatives": (["fit", "--model.init_args.loss.init_args.n_negatives", "0"], "n_negatives must be at least 1"),
    "width that heads do not divide": (
        ["fit", "--model.init_args.d_model", "15"],
        "n_heads must be a positive divisor",
    ),
    "no length": (["fit", "--data.init_args.max_length", "0"], "max_length must be at least 1, got 0"),
    "absent file": (["fit", "--data.init_args.paths", "absent.csv"], "absent.csv"),
    "misnamed column": (["fit", "--data.init_args.user_column", "custommer"], "custommer"),
    "unknown split": (["fit", "--data.init_args.split", "random"], "split"),
    "answer in sight": (["fit", "--data.init_args.target", "next_item"], "see_own_basket must be false"),
    "nothing left": (["fit", "--data.init_args.min_item_count", "9999"], "nothing is left after step"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_ends_in_one_line(seqlit, config, case, tmp_path):
    arguments, words = WRONG[case]
    before = all_below(tmp_path)
    status, _, err = seqlit(arguments[0], "--config", config, *arguments[1:])
    assert status == (3 if "last" in arguments else 2)
    assert words in one_line(err)
    assert not all_below(tmp_path) - before, "a refused run left something"


def test_no_config_file(seqlit):
    status, _, err = seqlit("fit", "--config", "nowhere.yaml")
    assert status == 2
    assert "nowhere.yaml" in one_line(err)


def test_checkpoint_of_another_catalogue(seqlit, config, tmp_path):
    assert seqlit("fit", "--config", config, "--trainer.max_epochs", "1")[0] == 0
    checkpoint = tmp_path / "runs/sasrec_cce/version_0/checkpoints/best.ckpt"
    # As many items under other names: the shapes fit, the meaning does not. Then more items.
    for other in ({"first_item": 100}, {"n_items": 50}):
        write_shop(tmp_path / "shop.csv", **other)
        status, _, err = seqlit("test", "--config", config, "--ckpt_path", checkpoint)
        assert status == 2
        assert "checkpoint was trained on" in one_line(err)
        assert "catalogue" in err
    assert not (tmp_path / "runs/sasrec_cce/version_0/report").exists()


def test_missing_extra_is_named(seqlit, config, monkeypatch):
    from lightning_utilities.core.imports import RequirementCache

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find_spec(name, *a))
    import lightning.pytorch.loggers.wandb as module

    monkeypatch.setattr(module, "_WANDB_AVAILABLE", RequirementCache("wandb>=9999"))
    status, _, err = seqlit("fit", "--config", config, "--trainer.logger", "lightning.pytorch.loggers.WandbLogger")
    assert status == 2
    assert "pip install 'seqlit[wandb]'" in one_line(err)
