"""A toy of every method: its shipped config, pointed at small files and cut down to a second."""

import copy
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from datamodules.synthetic_events import regime
from datamodules.synthetic_market import synthetic_market
from datamodules.synthetic_series import synthetic_series


def write_shop(path: Path) -> None:
    """Customers who walk along a ring of articles, four days apart."""
    user, visit = np.meshgrid(np.arange(20), np.arange(12), indexing="ij")
    frame = pl.DataFrame(
        {
            "customer": [f"c{number}" for number in user.ravel()],
            "article": [f"a{number}" for number in (7 * user + visit).ravel() % 12],
            "day": np.datetime64("2024-01-01") + (4 * visit + user % 4).ravel().astype("timedelta64[D]"),
            "price": 1.0 + visit.ravel(),
        }
    )
    frame.write_csv(path)


def write_events(path: Path) -> None:
    """Events of a synthetic regime with times as text."""
    drawn = regime(0, n_users=30, n_days=60, events_per_day=1.0, labels_per_day=0.1)
    pl.DataFrame(
        {
            "customer": np.array(drawn.user_ids)[drawn.event_users],
            "when": pl.Series(drawn.times).cast(pl.Datetime("us")).dt.to_string("%Y-%m-%d %H:%M:%S%.6f"),
            "code": np.array(drawn.type_names)[drawn.types],
            "amount": drawn.amounts,
        }
    ).write_csv(path)


class Toys:
    """Small files and configs on them; ``folder`` is made once a session and written to by nobody else."""

    def __init__(self, folder: Path, configs: Path) -> None:
        self.folder, self._configs = folder, configs
        write_shop(folder / "shop.csv")
        write_events(folder / "events.csv")
        synthetic_series(48, 20, n_steps=24, noise=0.4, seed=1).write(folder / "series", "Toy", ".tsv")
        self.market = {
            name: str(file)
            for name, file in synthetic_market(16, 420, delisted=0.2, seed=2).write(folder / "market").items()
        }
        self.a_ticker = pl.read_csv(self.market["sectors_path"])["ticker"][0]

    def config(self, method: str) -> dict:
        """A fresh copy of the settings of ``sasrec_cce``, ``concealed_attack``, ``kernel_attention``, ``tda_portfolio``
        (a network is trained) or ``tda_topology`` (nothing is)."""
        settings = getattr(self, f"_{method}")()
        settings["trainer"] |= {"accelerator": "cpu", "enable_progress_bar": False}
        return copy.deepcopy(settings)

    def data_only(self, method: str, **changes: object) -> dict:
        """The data of a toy, some arguments changed, under a model that wants nothing of it: quick to build."""
        settings = self.config(method)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        return {
            "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False} | quiet,
            "model": {"class_path": "lightning.pytorch.demos.boring_classes.BoringModel"},
            "data": settings["data"] | {"init_args": settings["data"]["init_args"] | changes},
        }

    def _shipped(self, name: str) -> dict:
        return yaml.safe_load((self._configs / f"{name}.yaml").read_text(encoding="utf-8"))

    def _sasrec_cce(self) -> dict:
        settings = self._shipped("sasrec_cce/online_retail")
        settings["trainer"] |= {"max_epochs": 1}
        settings["model"]["init_args"] |= {"d_model": 8, "n_recommendations": 3, "cutoffs": [1, 5, 10]}
        settings["model"]["init_args"]["loss"]["init_args"]["n_negatives"] = 4
        settings["data"]["init_args"] |= {
            "paths": str(self.folder / "shop.csv"),
            "user_column": "customer",
            "item_column": "article",
            "time_column": "day",
            "where": [],
            "max_length": 8,
            "batch_size": 8,
            "validation_user_fraction": 0.2,
        }
        return settings

    def _concealed_attack(self) -> dict:
        settings = self._shipped("concealed_attack/gunpoint")
        settings["trainer"] |= {"max_epochs": 3}
        model = settings["model"]["init_args"]
        small = {"class_path": "lightning_modules.networks.ResCNN", "init_args": {"n_filters": 4}}
        model |= {"classifier_epochs": 1, "n_folds": 2, "classifier": small}
        for plan in model["discriminators"]:
            plan["init_args"] |= {"epochs_per_level": 1, "n_levels": 2}
        model["discriminators"][0]["init_args"]["network"] = small
        for plan in model["attacks"]:
            plan["init_args"]["attack"]["init_args"]["n_steps"] = 3
        settings["data"]["init_args"] |= {"folder": str(self.folder / "series"), "name": "Toy"}
        return settings

    def _kernel_attention(self) -> dict:
        settings = self._shipped("kernel_attention/online_retail")
        settings["trainer"] |= {"max_epochs": 2}
        report = next(one for one in settings["trainer"]["callbacks"] if one["class_path"].endswith("ContextReport"))
        report["init_args"] = {"n_resamples": 20}
        arguments = settings["model"]["init_args"]
        arguments |= {"encoder_epochs": 1, "aggregator_epochs": 1}
        arguments["encoder"]["init_args"] |= {"d_model": 8, "d_embedding": 4}
        arguments["wide_encoder"]["init_args"] |= {"d_model": 16, "d_embedding": 4}
        probe = {"strengths": [0.1], "max_iterations": 5}
        arguments["evaluation"] |= {
            "probe": {"class_path": "lightning_modules.context.LogisticProbe", "init_args": probe}
        }
        kept = ("sampler", "numeric_transform", "split")
        given = {name: settings["data"]["init_args"][name] for name in kept}
        given["sampler"]["init_args"] |= {"min_length": 2, "max_length": 12}
        silent = settings["data"]["init_args"]["targets"]["silent"]
        silent["init_args"] |= {"days": 3}
        silent["init_args"]["rule"]["init_args"]["every_days"] = 6
        settings["data"]["init_args"] = given | {
            "paths": str(self.folder / "events.csv"),
            "user_column": "customer",
            "time_column": "when",
            "categorical": ["code"],
            "numeric": ["amount"],
            "targets": {"silent": silent},
            "validation_fraction": 0.25,
            "test_fraction": 0.25,
            "batch_size": 8,
        }
        return settings

    def _tda_portfolio(self) -> dict:
        settings = self._market("sp500_conv")
        network = {"window_length": 50, "code_size": 6, "channels": [4, 1]}
        settings["model"]["init_args"]["representation"]["init_args"] |= network
        settings["data"]["init_args"]["window_length"] = 50
        return settings

    def _tda_topology(self) -> dict:
        settings = self._market("sp500")
        simple = {"dimension": 3, "delay": 2, "giotto_compat": False}
        settings["model"]["init_args"]["representation"]["init_args"] |= simple
        return settings

    def _market(self, name: str) -> dict:
        settings = self._shipped(f"tda_portfolio/{name}")
        settings["trainer"] |= {"max_epochs": 1}
        for clusterer in settings["model"]["init_args"]["clusterers"]:
            clusterer["init_args"]["n_clusters"] = 3
        settings["model"]["init_args"]["n_random"] = 2
        for dropped in ("check_paths", "index_column", "tickers_path"):
            settings["data"]["init_args"].pop(dropped, None)
        settings["data"]["init_args"] |= self.market | {
            "train_start": "2015-01-01",
            "test_start": "2016-01-01",
            "test_end": "2016-06-30",
        }
        return settings


@pytest.fixture(scope="session")
def toys(tmp_path_factory) -> Toys:
    """Small files and configs of every method."""
    configs = Path(__file__).resolve().parents[2] / "configs"
    return Toys(tmp_path_factory.mktemp("toys"), configs)


def _left(folder: Path) -> set[str]:
    """Files and folders below, but for a cache that is whole: those begin with no dot."""
    found = set()
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        if parts[0] != ".seqlit_cache" or any(part.startswith(".") for part in parts[1:]):
            found.add("/".join(parts))
    return found


@pytest.fixture
def refused(seqlit, tmp_path):
    """``refused(config, *arguments, command="fit") -> the one line``; sees that nothing is left behind.

    ``config`` is a dict of settings, the text or bytes of a YAML file, or None for none.
    """

    def call(config: dict | str | bytes | None, *arguments: object, command: str = "fit") -> str:
        if config is not None:
            path = tmp_path / "wrong.yaml"
            content = yaml.safe_dump(config) if isinstance(config, dict) else config
            path.write_bytes(content.encode() if isinstance(content, str) else content)
            arguments = ("--config", path.name, *arguments)
        before = _left(tmp_path)
        status, _, error = seqlit(command, *arguments)
        lines = error.splitlines()
        assert status == 2, f"exit status {status}: {error[-500:]}"
        assert len(lines) == 1, error
        assert lines[0].startswith("seqlit: error: ")
        assert len(lines[0]) < 500, "a line nobody reads"
        assert "Namespace(" not in error
        assert _left(tmp_path) == before, "something was left behind"
        return lines[0]

    return call
