"""SASRecCCE of two and three processes against one: the numbers, the files, and the step of training."""

import json
import os
from pathlib import Path

import polars as pl
import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader

from datamodules import InteractionsDataModule
from datamodules.synthetic import markov_interactions
from kernels.cce_minus import cce_minus_loss, cce_minus_negatives
from lightning_modules import SASRecCCE
from lightning_modules.callbacks import RankingReport, RecommendationWriter
from lightning_modules.losses import CCEMinusLoss
from lightning_modules.networks import PublishedBlock

V, T = 30, 6
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": 1,
}


def trainer(world, strategy="replicated", **changes):
    return Trainer(devices=world, strategy="auto" if world == 1 else strategy, **QUIET | changes)


def model(lr, loss=None, **changes):
    torch.manual_seed(4)
    settings = {"n_items": V, "max_length": T, "d_model": 8, "n_blocks": 1, "dropout": 0.0, "cutoffs": [3, 7]}
    settings |= {"block": lambda width: PublishedBlock(width, dropout=0.0), "loss": loss or CCEMinusLoss("all")}
    return SASRecCCE(**settings | changes, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr))


def shop(folder, recommend_seen, world):
    return InteractionsDataModule(
        paths=str(folder / "chain.parquet"),
        user_column="user_id",
        item_column="item_id",
        time_column="timestamp",
        target="next_basket",
        recommend_seen=recommend_seen,
        min_item_count=1,
        validation_user_fraction=0.04,
        test_fraction=0.3,
        max_length=T,
        batch_size=5,
        eval_batch_size=4,
        cache_dir=str(folder / f"cache of {world}"),
    )


def whole_run(world, folder, recommend_seen):
    """An epoch with a learning rate of 0, so that its mean loss is that of the weights, then test and predict."""
    written = []
    replace = os.replace

    def counted(draft, path):
        if Path(draft).is_dir():
            written.append("folder of the cache")
        elif "cache" not in str(path):  # what is remembered of files' contents may be written by all
            written.append(Path(path).name)
        replace(draft, path)

    os.replace = counted
    try:
        out = folder / f"{world} {recommend_seen}"
        data, net = (
            shop(folder, recommend_seen, world),
            model(0.0, recommend_seen=recommend_seen, repeat_mode=recommend_seen),
        )
        callbacks = [RecommendationWriter(), *([RankingReport(cutoff=7, n_resamples=20)] if recommend_seen else [])]
        run = trainer(world, callbacks=callbacks, default_root_dir=str(out))
        run.fit(net, datamodule=data)
        fitted = {key: float(value) for key, value in run.callback_metrics.items()}
        tested = run.test(net, datamodule=data, verbose=False)[0]
        run.predict(net, datamodule=data, return_predictions=False)
    finally:
        os.replace = replace
    report = json.loads((out / "report" / "metrics.json").read_text()) if recommend_seen else {}
    report.pop("seconds", None)
    return {
        "fitted": fitted,
        "tested": tested,
        "report": report,
        "recommendations": pl.read_parquet(out / "recommendations.parquet").to_dict(as_series=False),
        "written": sorted(written),
    }


def runs(world, folder, settings):
    return {seen: whole_run(world, folder, seen) for seen in settings}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    frame = markov_interactions(60, V, mean_length=9, n_days=40, seed=3)
    frame.with_columns(pl.col("timestamp").dt.truncate("1d")).write_parquet(folder / "chain.parquet")
    return folder, runs(1, folder, (False, True))


def assert_same(found, wanted, where):
    """Equal but for numbers with a fraction: 1e-6 is ten roundings of float32, whose products depend on the batch."""
    assert type(found) is type(wanted), where
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key, value in wanted.items():
            assert_same(found[key], value, f"{where} {key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other, where)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=1e-6, abs=1e-6, nan_ok=True), where
    else:
        assert found == wanted, where


@pytest.mark.parametrize(("world", "settings"), [(2, (False, True)), (3, (True,))])
def test_numbers_and_files_are_those_of_one_process(in_processes, alone, world, settings):
    folder, wanted = alone
    split = wanted[True]["report"]["data"]["split"]
    # A shard of three is empty in validation; 9 test users are two batches and one of two; both trainings are padded.
    assert (split["validation_users"], split["test_users"], split["train_sequences"]) == (2, 9, 43)
    ranks = in_processes(world, __file__, "runs", world, folder, settings)
    for seen in settings:
        expected = wanted[seen]
        for number, found in enumerate(ranks):
            assert found[seen]["written"] == (expected["written"] if number == 0 else [])
            for what in ("fitted", "tested", "report", "recommendations"):
                assert_same(found[seen][what], expected[what], f"{what} of process {number}, recommend_seen {seen}")


class SameDraw(CCEMinusLoss):
    """The same ids in every process, shared by all positions, so that processes and one alone draw alike."""

    def forward(self, *arguments, **keywords):
        return super().forward(*arguments, **keywords | {"rank": 0})


STEPS = {
    "full": lambda: model(0.3),
    "sampled": lambda: model(0.3, SameDraw(4, sharing="batch")),
    "repeat": lambda: model(0.3, recommend_seen=True, repeat_mode=True),
}


def shards(world):
    """Three batches of each process: of unequal size, with rows without targets, and one process with none at all."""
    generator = torch.Generator().manual_seed(world)
    found = []
    for number in range(world):
        items = torch.randint(0, V, (3, 4 - number, T), generator=generator)
        targets = torch.randint(0, V, (3, 4 - number, T), generator=generator)
        items[:, 0, :2], targets[:, 0, :2] = V, -100
        targets[1, 1:] = -100
        if number == world - 1:
            targets[2] = -100
        baskets = torch.arange(T).expand_as(items).masked_fill(items == V, -1)
        found.append([dict(zip(KEYS, rows, strict=True)) for rows in zip(items, baskets, targets, strict=True)])
    return found


KEYS = ("item_ids", "basket_ids", "targets")


def flat(net):
    return torch.cat([parameter.detach().reshape(-1) for parameter in net.parameters()])


def fit(name, world, batches, strategy="replicated"):
    net = STEPS[name]().double()
    run = trainer(world, strategy, use_distributed_sampler=False, gradient_clip_val=0.5)
    run.fit(net, DataLoader(batches, batch_size=None))
    return flat(net), float(run.callback_metrics["train/loss"]), int(net.micro_step)


def steps(world):
    rank = int(os.environ["RANK"])
    own = shards(world)[rank]
    found = [(name, fit(name, world, own)) for name in STEPS]
    found.append(("repeat", fit("repeat", world, own, "ddp")))
    asked = []

    class Recording(CCEMinusLoss):
        def forward(self, *arguments, **keywords):
            asked.append((int(keywords["step"]), keywords["rank"]))
            return super().forward(*arguments, **keywords)

    recorded = model(0.1, Recording(4))
    trainer(world, use_distributed_sampler=False).fit(recorded, DataLoader(own, batch_size=None))
    return found, asked


@pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`")
def test_steps_of_processes_are_those_of_one_on_the_joined_batch(in_processes):
    world = 2
    parts = shards(world)
    joined = [{key: torch.cat([part[step][key] for part in parts]) for key in KEYS} for step in range(3)]
    ranks = in_processes(world, __file__, "steps", world)
    alone = {name: fit(name, 1, joined) for name in STEPS}
    for number, (found, _) in enumerate(ranks):
        for name, (weights, loss, micro_step) in found:
            wanted, wanted_loss, _ = alone[name]
            moved = (wanted - flat(STEPS[name]().double())).norm()
            assert moved > 0.1
            # The share of a process is a float32 number: 6e-8 of each step.
            assert (weights - wanted).norm() < 1e-6 * moved, f"{name}, process {number}"
            assert loss == pytest.approx(wanted_loss, rel=1e-6)  # logged in float32
            assert micro_step == 3
    for number, (_, asked) in enumerate(ranks):
        assert asked == [(step, number) for step in range(3)]


@pytest.mark.parametrize("sharing", ["position", "tile", "batch"])
def test_each_process_draws_negatives_of_its_own(sharing):
    """With the same positions in both, the ids differ, and the loss is that of the ids."""
    generator = torch.Generator().manual_seed(1)
    hidden, table = torch.randn(40, 8, generator=generator), torch.randn(500, 8, generator=generator)
    targets = torch.randint(0, 500, (40,), generator=generator)
    loss = CCEMinusLoss(16, sharing=sharing, tile_size=8, seed=3)
    drawn = []
    for rank in range(3):
        ids, row = cce_minus_negatives(
            targets, 500, n_negatives=16, seed=3, step=5, rank=rank, sharing=sharing, tile_size=8
        )
        drawn.append(ids)
        wanted = cce_minus_loss(hidden, table, targets, negatives=ids[row], sharing="position")
        torch.testing.assert_close(loss(hidden, table, targets, step=5, rank=rank), wanted)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        # Of ids drawn apart, 1 in 500 falls together.
        assert (drawn[one] == drawn[other]).float().mean() < 0.1
