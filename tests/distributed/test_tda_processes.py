"""TDAPortfolioClusterer in two and three processes against one: training, scores, report, advice and files."""

import json
import os
from functools import partial
from pathlib import Path

import polars as pl
import pytest
import torch
from lightning import Trainer
from polars.testing import assert_frame_equal
from torch.utils.data import DataLoader, DistributedSampler

from datamodules import StockPricesDataModule
from datamodules.synthetic_market import synthetic_market
from lightning_modules import TDAPortfolioClusterer
from lightning_modules.callbacks import PortfolioReport, PortfolioWriter, portfolio_report
from lightning_modules.collectives import gather_objects
from lightning_modules.networks import LSTMAutoencoder
from lightning_modules.portfolio.clusterers import KMeansClusters, WardClusters
from lightning_modules.portfolio.representations import PrincipalComponents
from lightning_modules.portfolio.weighting import EqualWeight
from lightning_modules.topology import TopologicalRepresentation, diagrams
from lightning_modules.topology.vectorisers import BettiCurve

JOINED = 66  # windows in a step, over all processes
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*smaller than the logging")


class FirstHeldOut(StockPricesDataModule):
    """As the data module, with the first few of the held-out windows."""

    n_held_out: int | None = None  # all

    def val_dataloader(self):
        (batch,) = super().val_dataloader()
        batch |= {name: batch[name][: self.n_held_out] for name in ("windows", "stocks", "stops")}
        everybody = DistributedSampler([batch], num_replicas=1, rank=0, shuffle=False)
        return DataLoader([batch], batch_size=None, sampler=everybody)


def data_of(files, world):
    return FirstHeldOut(**files, test_start="2016-01-01", window_length=32, batch_size=JOINED // world)


def module_of(name):
    torch.manual_seed(5)
    network = {
        "lstm": lambda: LSTMAutoencoder(window_length=32, code_size=4, hidden_size=5).double(),
        "pca": lambda: PrincipalComponents(n_components=3),
    }[name]()
    return TDAPortfolioClusterer(
        representation=network,
        clusterers=[WardClusters(n_clusters=3), KMeansClusters(n_clusters=3)],
        weighting=EqualWeight(),
        n_random=2,
        optimizer=partial(torch.optim.SGD, lr=0.5),
    )


def trainer_of(world, root, **settings):
    return Trainer(
        accelerator="cpu",
        devices=world,
        strategy="replicated" if world > 1 else "auto",
        default_root_dir=root,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        **settings,
    )


def plain(metrics):
    return {name: float(value) for name, value in metrics.items()}


def run(world, files, folder):
    """Fit an epoch, then validate, test and predict from the given checkpoints; what this process holds of it."""
    found = {}
    every_picture = portfolio_report._pictures
    # One picture is as good as all of them, and takes a tenth of the time.
    portfolio_report._pictures = lambda *of: {"equity": every_picture(*of)["equity"]}
    data = data_of(files, world)
    for name in ("lstm", "pca"):
        root = Path(folder) / f"{name}_{world}" / os.environ.get("RANK", "0")
        module, data.n_held_out = module_of(name), None
        trainer = trainer_of(world, root, max_epochs=1)
        sizes = []
        step = module.training_step
        module.training_step = lambda batch, number, step=step, sizes=sizes: (
            sizes.append(len(batch["windows"])) or step(batch, number)
        )
        trainer.fit(module, data)
        found[name, "trained"] = {key: value for key, value in module.state_dict().items() if "mean" not in key}
        found[name, "sizes"] = sizes
        found[name, "fit"] = plain(trainer.callback_metrics)
        checkpoint = Path(folder) / f"{name}.ckpt"
        if world == 1:
            trainer.save_checkpoint(checkpoint)
        for data.n_held_out in (None, 1):  # uneven shards, and shards without a window
            trainer = trainer_of(world, root)
            module = module_of(name)
            trainer.validate(module, data, ckpt_path=checkpoint, verbose=False)
            found[name, data.n_held_out] = plain(trainer.callback_metrics)
            found[name, "fitted"] = module.fitted
        trainer = trainer_of(world, root, callbacks=[PortfolioReport(n_resamples=20), PortfolioWriter()])
        trainer.test(module_of(name), data, ckpt_path=checkpoint, verbose=False)
        trainer.predict(module_of(name), data, ckpt_path=checkpoint)
        gather_objects(None)  # the first process has written
        found[name, "files"] = sorted(str(file.relative_to(root)) for file in root.rglob("*") if file.is_file())
    return found


class Counting(BettiCurve):
    """Curves; says how often they were asked for."""

    n_fits = n_transforms = 0

    def fit(self, X, y=None):
        Counting.n_fits += 1
        return super().fit(X, y)

    def transform(self, X):
        Counting.n_transforms += 1
        return super().transform(X)


def topological(world, files, folder):
    """Fit and predict with diagrams; how often this process computed them and curves, and what it holds in the end."""
    compute, computed = diagrams._computed, []

    def counted(clouds, *rest, **options):
        computed.append(len(clouds))
        return compute(clouds, *rest, **options)

    diagrams._computed = counted
    Counting.n_fits = Counting.n_transforms = 0
    network = TopologicalRepresentation(
        dimension=2,
        delay=1,
        stride=10,
        vectoriser=Counting(n_bins=5),
        backend="gudhi",
        cache_dir=str(Path(folder) / f"of {world}"),
    )
    module = TDAPortfolioClusterer(
        representation=network, clusterers=[WardClusters(n_clusters=3)], weighting=EqualWeight(), n_random=0
    )
    data = data_of(files, world)
    trainer = trainer_of(world, folder, max_epochs=1)
    trainer.fit(module, data)
    scores = plain(trainer.callback_metrics)
    trainer.predict(module, data)
    diagrams._computed = compute
    return {
        "counts": [computed, Counting.n_fits, Counting.n_transforms],
        "scores": scores,
        "fitted": module.fitted,
    }


def test_diagrams_are_computed_in_one_process_alone(in_processes, files, tmp_path):
    pytest.importorskip("gudhi", reason="diagrams need seqlit[tda]")
    wanted = topological(1, files, str(tmp_path))
    assert wanted["counts"][0], "no diagram was counted"
    assert min(wanted["counts"][1:]) > 0, "no curve was counted"
    for number, found in enumerate(in_processes(2, __file__, "topological", 2, files, str(tmp_path))):
        assert found["counts"] == (wanted["counts"] if number == 0 else [[], 0, 0])
        assert found["scores"] == wanted["scores"]
        assert found["fitted"]["tickers"] == wanted["fitted"]["tickers"]
        for part in ("rows", "labels"):
            assert torch.equal(found["fitted"][part], wanted["fitted"][part])


def refused(world, files, folder):
    """Errors of what the first process computes for all, in every process; and another strategy."""
    said = []
    module = module_of("pca")
    module.clusterers = [WardClusters(n_clusters=900)]
    trainer = trainer_of(world, folder, max_epochs=1)
    for attempt in (
        lambda: trainer.fit(module, data_of(files, world)),
        lambda: trainer.test(module_of("pca"), data_of(files, world), verbose=False),
        lambda: Trainer(
            accelerator="cpu", devices=world, strategy="ddp", logger=False, enable_checkpointing=False, max_epochs=1
        ).fit(module_of("pca"), data_of(files, world)),
    ):
        try:
            attempt()
        except ValueError as error:
            said.append(str(error))
    return said


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    market = synthetic_market(20, 420, delisted=0.1, seed=3)  # 133 windows: the last step has one
    return {name: str(file) for name, file in market.write(tmp_path_factory.mktemp("market")).items()}


@pytest.fixture(scope="module")
def alone(files, tmp_path_factory):
    """The folder of everything, and what one process finds."""
    folder = tmp_path_factory.mktemp("processes")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = run(1, files, str(folder))
    torch.set_num_threads(threads)
    return folder, found


def numbers_of(root):
    numbers = json.loads((root / "report" / "metrics.json").read_text())
    numbers.pop("seconds")
    return numbers


@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_equal_one(in_processes, files, alone, world):
    folder, one = alone
    together = in_processes(world, __file__, "run", world, files, str(folder))
    sizes = torch.tensor([found["lstm", "sizes"] for found in together])
    assert sizes.sum(0).tolist() == one["lstm", "sizes"], "every window once"
    assert (sizes == 0).any(), "a batch without windows"
    assert (sizes[:, -1] != sizes[0, 0]).any(), "uneven batches"
    for number, found in enumerate(together):
        for name in ("lstm", "pca"):
            # share is a float32 factor, 6e-8 of each gradient, and running moments are float64 sums in another order
            torch.testing.assert_close(found[name, "trained"], one[name, "trained"], rtol=1e-6, atol=1e-8)
            assert found[name, "fit"] == pytest.approx(one[name, "fit"], rel=1e-6)
            for held_out in (None, 1):
                # sums of squares in another order, logged in float32
                assert found[name, held_out] == pytest.approx(one[name, held_out], rel=1e-6)
            fitted = found[name, "fitted"]
            assert fitted["tickers"] == one[name, "fitted"]["tickers"]
            assert torch.equal(fitted["labels"], one[name, "fitted"]["labels"])
            torch.testing.assert_close(fitted["rows"], one[name, "fitted"]["rows"], rtol=0, atol=0)
            if number > 0:
                assert found[name, "files"] == [], "the first process writes, the others do not"
            else:
                assert found[name, "files"] == one[name, "files"]
                here, there = folder / f"{name}_{world}" / "0", folder / f"{name}_1" / "0"
                assert numbers_of(here) == numbers_of(there)
                for table in ("weights.parquet", "orders.parquet"):
                    assert_frame_equal(pl.read_parquet(here / table), pl.read_parquet(there / table), check_exact=True)


def test_an_error_of_the_first_ends_all_and_other_strategies_are_refused(in_processes, files, tmp_path):
    for said in in_processes(2, __file__, "refused", 2, files, str(tmp_path)):
        clusters, unfitted, strategy = said
        assert "n_clusters must be at most the number of eligible stocks" in clusters
        assert "nothing was clustered: run `seqlit fit`" in unfitted
        assert "trainer.strategy must be 'replicated'" in strategy
