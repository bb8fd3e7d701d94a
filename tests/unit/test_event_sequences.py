"""The data module: batches of the contract, statistics of training, checkpoints, and refusals."""

import datetime
import json
import logging
import re

import numpy as np
import polars as pl
import pytest
import torch
from lightning import LightningModule, Trainer

from datamodules import EventSequencesDataModule
from datamodules.event_batches import ColesSlices, Crops, TailWindows
from datamodules.event_preparation import FOREVER
from datamodules.event_published import EveryNthEvent, FinalDays, Left
from datamodules.event_targets import (
    AfterDelay,
    AfterFirstEvent,
    AmountAbove,
    AtEvents,
    CalendarDates,
    EventWithin,
    LastEvent,
    LocalLabel,
    NextType,
    NoEventWithin,
    QueryRule,
    StaticLabel,
)
from datamodules.sources.events import DAY

N_USERS = 60


@pytest.fixture(scope="module")
def events() -> pl.DataFrame:
    """60 users over 200 days with 10 to 60 events; the kind ``late`` occurs from day 150 on."""
    rng = np.random.default_rng(7)
    users = np.repeat(np.arange(100, 100 + N_USERS), rng.integers(10, 60, N_USERS))
    n = len(users)
    hours = rng.integers(0, 200 * 24, n)
    kinds = rng.choice(["a", "b", "c", "d"], n, p=[0.1, 0.5, 0.3, 0.1])
    return pl.DataFrame(
        {
            "user": users,
            "time": [datetime.datetime(2020, 1, 1) + datetime.timedelta(hours=int(h)) for h in hours],
            "row": np.arange(n),
            "kind": np.where((hours > 150 * 24) & (rng.random(n) < 0.3), "late", kinds),
            "shop": rng.choice(["x", "y"], n),
            "amount": rng.lognormal(size=n).round(2) * np.where(rng.random(n) < 0.1, -1, 1),
            "local": rng.integers(0, 2, n).astype(str),
            "fold": np.array(["train", "validation", "test"])[(users % 5 == 1) * 1 + (users % 5 == 2) * 2],
            "group": users % 7,
        }
    ).sample(fraction=1, shuffle=True, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, events):
    path = tmp_path_factory.mktemp("events")
    events.write_parquet(path / "events.parquet")
    users = list(range(100, 100 + N_USERS - 5))
    labels = {"user": users, "age": ["young" if user % 3 else "old" for user in users]}
    pl.DataFrame(labels).write_csv(path / "users.csv")
    return path


@pytest.fixture
def module(folder, tmp_path):
    def make(**arguments) -> EventSequencesDataModule:
        settings = {
            "paths": str(folder / "events.parquet"),
            "user_column": "user",
            "time_column": "time",
            "order_column": "row",
            "categorical": ["kind", "shop"],
            "numeric": ["amount"],
            "targets": {"churn": NoEventWithin(CalendarDates(every_days=10), 5)},
            "sampler": ColesSlices(3, 5, 12),
            "batch_size": 16,
            "cache_dir": str(tmp_path / "cache"),
        }
        return EventSequencesDataModule(**(settings | arguments))

    return make


BY_TIME = {"split": "time", "validation_start": "2020-05-01", "test_start": "2020-06-01"}


def whole(loader):
    (batch,) = list(loader)
    return batch


def test_flat_events_are_the_sorted_file(module, events):
    batch = whole(module().test_dataloader())
    ordered = events.sort("user", "time", "row")
    assert batch["user_ids"] == list(range(100, 100 + N_USERS))
    assert batch["events"]["times"].tolist() == ordered["time"].dt.epoch("us").to_list()
    assert batch["events"]["offsets"].tolist() == np.cumsum([0, *np.bincount(ordered["user"])[100:]]).tolist()
    names = batch["category_names"]
    assert [names[i] if i > 1 else "?" for i in batch["events"]["categorical"][:, 0].tolist()] == [
        kind if kind in names else "?" for kind in ordered["kind"]
    ]
    types = {name: value.dtype for name, value in batch["events"].items()}
    assert types == dict.fromkeys(types, torch.int64) | {"numeric": torch.float32}
    assert batch["split"] == "users"
    assert batch["train_stop"] == FOREVER
    assert batch["feature_names"] == {"categorical": ["kind", "shop"], "numeric": ["amount"]}


def test_statistics_are_of_training_events(module, events):
    cut = pl.col("time") < datetime.datetime(2020, 5, 1)
    for transform in ("none", "signed_log"):
        data = module(**BY_TIME, numeric_transform=transform)
        batch = whole(data.test_dataloader())
        amounts = events.filter(cut)["amount"].to_numpy()
        everything = events.sort("user", "time", "row")["amount"].to_numpy()
        if transform == "signed_log":
            amounts, everything = (np.sign(a) * np.log1p(np.abs(a)) for a in (amounts, everything))
        expected = (everything - amounts.mean()) / amounts.std()
        # float32 of numbers below 50 in size
        np.testing.assert_allclose(batch["events"]["numeric"][:, 0].numpy(), expected, rtol=1e-6, atol=1e-6)
    counts = events.filter(cut)["kind"].value_counts().sort("count", descending=True)["kind"].to_list()
    assert batch["category_names"] == ["<padding>", "<unknown>", *counts]
    assert data.vocabulary_sizes == [len(counts) + 2, 4]
    assert data.n_numeric == 1
    late = events.sort("user", "time", "row")["kind"].to_numpy() == "late"
    assert set(batch["events"]["categorical"][torch.from_numpy(late), 0].tolist()) == {1}
    gaps = events.filter(cut).sort("user", "time").select(pl.col("time").dt.epoch("us").diff().over("user"))
    positive = gaps.to_series().drop_nulls().to_numpy()
    assert data.median_gap == pytest.approx(np.median(positive[positive > 0]) / DAY, rel=1e-12)


def test_max_categories_leaves_the_most_frequent(module):
    data = module(max_categories=2)
    assert data.vocabulary_sizes == [4, 4]
    assert whole(data.test_dataloader())["category_names"][2:] == ["b", "c"]


def test_unknown_categories_are_counted(module, caplog):
    with caplog.at_level(logging.INFO, logger="datamodules"):
        facts = module(**BY_TIME).report_facts()
    n_late = facts["counts"]["unknown categories after training"]["kind"]
    assert n_late > 0
    n_after = facts["counts"]["events"] - facts["counts"]["train events"]
    told = f"column 'kind': {n_late} of {n_after} events after training have a category that it does not know"
    assert told in caplog.text


def test_missing_numbers_are_the_mean_where_allowed(module, folder, tmp_path, events):
    path = tmp_path / "gaps.parquet"
    events.with_columns(amount=pl.when(pl.col("row") % 3 != 0).then("amount")).write_parquet(path)
    with pytest.raises(ValueError, match=r"column 'amount', row \d+: is missing"):
        module(paths=str(path)).setup("test")
    batch = whole(module(paths=str(path), missing_numbers="mean").test_dataloader())
    missing = events.sort("user", "time", "row")["row"].to_numpy() % 3 == 0
    assert (batch["events"]["numeric"][torch.from_numpy(missing)] == 0).all()
    assert (batch["events"]["numeric"][torch.from_numpy(~missing)] != 0).all()


def check_rows(data, batch):
    """Every valid step is the event of the flat table it claims to be, everything behind is 0."""
    events = whole(data.test_dataloader())["events"]
    mask = batch["mask"]
    lengths = mask.sum(1)
    assert (lengths >= 1).all()
    assert torch.equal(mask, torch.arange(mask.shape[1]) < lengths[:, None])
    assert lengths.max() == mask.shape[1]
    rows = (batch["starts"][:, None] + torch.arange(mask.shape[1]))[mask]
    for name in ("categorical", "numeric", "times"):
        assert torch.equal(batch[name][mask], events[name][rows])
        assert (batch[name][~mask] == 0).all()
    users = batch["users"].repeat_interleave(lengths)
    assert ((rows >= events["offsets"][users]) & (rows < events["offsets"][users + 1])).all()
    return lengths


def test_coles_slices(module):
    data = module()
    train = set(whole(data.test_dataloader())["context_users"].tolist())
    seen = []
    for batch in data.train_dataloader():
        lengths = check_rows(data, batch)
        assert lengths.min() >= 5
        assert lengths.max() <= 12
        by_user = batch["users"].reshape(-1, 3)
        assert (by_user == by_user[:, :1]).all()
        seen += by_user[:, 0].tolist()
    assert sorted(seen) == sorted(train)


def test_crops_differ_by_epoch_and_repeat_by_seed(module):
    def two_epochs(**arguments):
        torch.manual_seed(3)
        loader = module(sampler=Crops(4, 8), **arguments).train_dataloader()
        first = [batch["starts"] for batch in loader]
        loader.sampler.set_epoch(1)
        return torch.cat(first), torch.cat([batch["starts"] for batch in loader])

    first, second = two_epochs()
    again = two_epochs()
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first.sort().values, second.sort().values)
    assert not torch.equal(first, two_epochs(sampling_seed=9)[0])


def test_lengths_and_starts_are_uniform(module):
    data = module(sampler=ColesSlices(60, 3, 6))
    lengths, places = [], []
    batch_events = whole(data.test_dataloader())["events"]
    for batch in data.train_dataloader():
        lengths.append(batch["mask"].sum(1))
        room = batch_events["offsets"].diff()[batch["users"]] - lengths[-1]
        places.append((batch["starts"] - batch_events["offsets"][batch["users"]]).double() / room)
    counts = torch.cat(lengths).bincount(minlength=7)[3:].double()
    expected = counts.sum() / 4
    # five standard deviations of a binomial count
    assert ((counts - expected).abs() < 5 * (expected * 0.75) ** 0.5).all()
    # five standard errors of a mean of numbers in [0, 1], whose variance is at most 1/4
    assert abs(float(torch.cat(places).mean()) - 0.5) < 5 * (1 / 4 / float(counts.sum())) ** 0.5


def test_tail_windows_end_before_the_query(module):
    data = module(sampler=TailWindows("churn", 6), **BY_TIME)
    asked = whole(data.test_dataloader())["queries"]["churn"]
    train = asked["fold"] == 0
    expected = {
        (u, t): k for u, t, k in zip(*(asked[n][train].tolist() for n in ("users", "times", "labels")), strict=True)
    }
    seen = {}
    times, offsets = (whole(data.test_dataloader())["events"][name] for name in ("times", "offsets"))
    for batch in data.train_dataloader():
        lengths = check_rows(data, batch)
        assert lengths.max() <= 6
        last = batch["starts"] + lengths - 1
        assert (times[last] < batch["query_times"]).all()
        after = last + 1
        another = after >= offsets[batch["users"] + 1]
        assert (another | (times[after.clamp(max=len(times) - 1)] >= batch["query_times"])).all()
        pairs = zip(batch["users"].tolist(), batch["query_times"].tolist(), batch["labels"].tolist(), strict=True)
        seen |= {(u, t): k for u, t, k in pairs}
    assert seen == expected


@pytest.mark.parametrize("sampler", [ColesSlices(3, 5, 12), Crops(4, 8), TailWindows("churn", 6)])
def test_number_minus_one_is_a_row_without_events(module, sampler):
    sequences = module(sampler=sampler).train_dataloader().dataset
    plain, filled = sequences[[4, 2]], sequences[[-1, 4, 2, -1]]
    n_rows, n_steps = plain["mask"].shape
    n_windows = n_rows // 2
    assert filled.keys() == plain.keys()
    for name, value in plain.items():
        there = filled[name][n_windows:-n_windows]
        assert torch.equal(there[:, :n_steps] if value.ndim > 1 else there, value), name
    padding = torch.ones(len(filled["mask"]), dtype=torch.bool)
    padding[n_windows:-n_windows] = False
    for name in ("categorical", "numeric", "times", "mask"):
        assert not filled[name][padding].any(), name
        assert filled[name].dtype == plain[name].dtype
    assert (filled["users"][padding] == -1).all()
    if "labels" in filled:
        assert (filled["labels"][padding] == -100).all()
    alone = sequences[[-1]]
    assert not alone["mask"].any()
    assert torch.equal(alone["starts"], sequences[[0]]["starts"])


def test_folds_of_a_column(module):
    data = module(fold_column="fold")
    batch = whole(data.test_dataloader())
    users = np.arange(100, 100 + N_USERS)
    assert (batch["context_users"].numpy() + 100).tolist() == users[(users % 5 != 1) & (users % 5 != 2)].tolist()
    queries = batch["queries"]["churn"]
    fold = np.array([(u % 5 == 1) * 1 + (u % 5 == 2) * 2 for u in queries["users"].numpy() + 100])
    np.testing.assert_array_equal(queries["fold"].numpy(), fold)


def test_groups(module):
    batch = whole(module(group_column="group").test_dataloader())
    groups = np.arange(100, 100 + N_USERS) % 7
    np.testing.assert_array_equal(batch["events"]["groups"].numpy(), groups)


def test_static_and_local_labels(module, folder):
    data = module(
        users_path=str(folder / "users.csv"),
        label_columns=["age"],
        local_label_columns=["local"],
        targets={
            "age": StaticLabel(AfterDelay(30), "age"),
            "local": LocalLabel(CalendarDates(every_days=30), "local"),
        },
    )
    queries = whole(data.test_dataloader())["queries"]
    ids = queries["age"]["users"].numpy() + 100
    assert ids.max() < 100 + N_USERS - 5  # the last five users have no label
    assert queries["age"]["labels"].tolist() == [int(i % 3 != 0) for i in ids]
    assert queries["age"]["scope"] == "global"
    assert set(queries["local"]["labels"].tolist()) == {0, 1}


def test_the_cache_is_used_again(module):
    module().prepare_data()
    assert len(list(module()._cache_dir.glob("*/facts.json"))) == 1
    module().prepare_data()
    assert len(list(module()._cache_dir.glob("*/facts.json"))) == 1
    module(max_categories=1).prepare_data()
    assert len(list(module()._cache_dir.glob("*/facts.json"))) == 2


def test_a_batch_does_not_write_into_the_cache(module):
    data = module()
    batch = whole(data.test_dataloader())
    batch["events"]["numeric"].fill_(7)
    batch["events"]["times"].zero_()
    assert whole(module().test_dataloader())["events"]["times"].min() > 0


def test_report_facts_are_plain(module):
    data = module(targets={"churn": NoEventWithin(AfterFirstEvent(), 5), "kind": NextType(AtEvents(), "kind", top=3)})
    facts = json.loads(json.dumps(data.report_facts()))
    assert facts["targets"]["kind"]["n_classes"] == 3
    assert sum(facts["counts"]["users by fold"]) == N_USERS
    folds = facts["targets"]["churn"]["folds"]
    assert all(sum(fold["by class"]) == fold["queries"] for fold in folds.values())
    assert "no proof" in facts["note"]
    assert {row["feature"] for row in facts["label_checks"]["churn"]} == {"time of the query", "amount", "kind", "shop"}


def test_warnings_reach_the_logger_and_the_report(module, tmp_path, events, caplog):
    # Who does nothing in the three days after May 1 has had all amounts set to 0 by whoever wrote the file.
    after = pl.col("time").is_between(datetime.datetime(2020, 5, 1), datetime.datetime(2020, 5, 4), closed="left")
    path = tmp_path / "leak.parquet"
    events.with_columns(amount=pl.when(after.any().over("user")).then("amount").otherwise(0.0)).write_parquet(path)
    targets = {"gone": NoEventWithin(CalendarDates(dates=["2020-05-01"]), 3)}
    assert module(targets=targets).report_facts()["warnings"] == []
    with caplog.at_level(logging.WARNING, logger="datamodules"):
        warnings = module(paths=str(path), targets=targets).report_facts()["warnings"]
    assert any("target 'gone': zero of 'amount' tells the label, two-sided AUC 1.000" in line for line in warnings)
    assert all(line in caplog.text for line in warnings)


def test_queries_inside_a_day_of_a_log_of_dates_are_warned_of(module, tmp_path, events, caplog):
    path = tmp_path / "dates.parquet"
    events.with_columns(pl.col("time").dt.truncate("1d")).write_parquet(path)
    rules = {"whole": AfterDelay(2), "nine": CalendarDates(dates=["2020-05-01T09:00"]), "quarter": AfterDelay(0.25)}
    targets = {name: NoEventWithin(rule, 5) for name, rule in rules.items()}
    with caplog.at_level(logging.WARNING, logger="datamodules"):
        warnings = module(paths=str(path), targets=targets).report_facts()["warnings"]
    inside = [line for line in warnings if "lie between two stamps" in line]
    assert [line.split("'")[1] for line in inside] == ["nine", "quarter"]
    assert all("which are 1 day, 0:00:00 apart: what carries the earlier one is known" in line for line in inside)
    assert all(line in caplog.text for line in inside)
    finer = module(targets=targets).report_facts()["warnings"]
    assert not any("lie between two stamps" in line for line in finer), "of a finer clock they are stamps"


def test_a_vocabulary_that_knows_hardly_anything_is_warned_of(module, tmp_path, events, caplog):
    path = tmp_path / "renamed.parquet"
    late = pl.col("time") >= datetime.datetime(2020, 5, 1)
    events.with_columns(kind=pl.when(late).then(pl.lit("new ") + pl.col("kind")).otherwise("kind")).write_parquet(path)
    with caplog.at_level(logging.WARNING, logger="datamodules"):
        module(paths=str(path), **BY_TIME).setup("test")
    (line,) = [one.message for one in caplog.records if "category that it does not know" in one.message]
    assert line.startswith("column 'kind': ")


def test_outcome_dependent_rules_need_reference_mode(module):
    target = {"churn": NoEventWithin(LastEvent(), 5)}
    with pytest.raises(ValueError, match=r"target 'churn': the query time of LastEvent depends on the outcome"):
        module(targets=target)
    queries = whole(module(targets=target, reference_mode=True).test_dataloader())["queries"]["churn"]
    assert queries["outcome_dependent"] is True
    assert whole(module().test_dataloader())["queries"]["churn"]["outcome_dependent"] is False


class JustBeforeTheLast(QueryRule):
    """An hour before each user's last event; it does not say that it looks ahead."""

    def pairs(self, log):
        return np.arange(log.n_users), log.times[log.offsets[1:] - 1] - DAY // 24


def test_a_rule_that_looks_ahead_undeclared_is_refused_or_marked(module):
    target = {"gone": NoEventWithin(JustBeforeTheLast(), 5)}
    with pytest.raises(
        ValueError, match=r"target 'gone': JustBeforeTheLast asks at other moments before 2020-.* cut off"
    ):
        module(targets=target).setup("test")
    queries = whole(module(targets=target, reference_mode=True).test_dataloader())["queries"]["gone"]
    assert queries["outcome_dependent"] is True


class ByLabel(QueryRule):
    """After 10 or 40 days, by a label of the user; it does not say so."""

    def pairs(self, log):
        return np.arange(log.n_users), log.times[log.offsets[:-1]] + np.where(log.static["age"] == 1, 10, 40) * DAY


class ByPastLabel(QueryRule):
    """After the events that have one local label; it does not say so."""

    def pairs(self, log):
        rows = np.flatnonzero(log.codes["local"] == 1)
        return log.users[rows], log.times[rows] + 1


@pytest.mark.parametrize("rule", [ByLabel(), ByPastLabel()], ids=lambda rule: type(rule).__name__)
def test_a_rule_that_reads_a_label_is_refused_or_marked(module, folder, rule):
    arguments = {
        "users_path": str(folder / "users.csv"),
        "label_columns": ["age"],
        "local_label_columns": ["local"],
        "duplicates": "keep",
        "targets": {"x": StaticLabel(rule, "age")},
    }
    with pytest.raises(ValueError, match=r"target 'x': By.* when the labels age, local are exchanged"):
        module(**arguments).setup("test")
    queries = whole(module(reference_mode=True, **arguments).test_dataloader())["queries"]["x"]
    assert queries["outcome_dependent"] is True


def test_with_reference_mode_rules_ask_a_microsecond_after_the_event(module):
    targets = {"churn": NoEventWithin(AfterFirstEvent(), 5)}
    for reference_mode, after in ((False, DAY // 24), (True, 1)):  # events are stamped by whole hours
        batch = whole(module(targets=targets, reference_mode=reference_mode).test_dataloader())
        queries, offsets = batch["queries"]["churn"], batch["events"]["offsets"]
        assert (queries["times"] - batch["events"]["times"][offsets[queries["users"]]]).unique().tolist() == [after]


def test_labels_made_from_the_end_of_a_history_need_reference_mode(module, folder):
    windows = EveryNthEvent(5, 4)
    labels = {
        "users_path": str(folder / "users.csv"),
        "label_columns": ["age"],
        "local_label_columns": ["local"],
    }
    targets = {
        "left": Left(LastEvent(), 20),
        "final": FinalDays(windows, column="age", positive="old"),
        "published": LocalLabel(windows, "local", outcome_dependent=True),
    }
    for name, words in (("final", "FinalDays"), ("published", "LocalLabel"), ("left", "LastEvent")):
        with pytest.raises(ValueError, match=rf"target '{name}': .*{words}.*reference_mode") as error:
            module(targets={name: targets[name]}, **labels)
        assert "\n" not in str(error.value)
    facts = module(targets=targets, reference_mode=True, **labels).report_facts()["targets"]
    assert {name: one["outcome_dependent"] for name, one in facts.items()} == dict.fromkeys(targets, True)
    plain = {"local": LocalLabel(windows, "local")}
    assert module(targets=plain, **labels).report_facts()["targets"]["local"]["outcome_dependent"] is False
    with pytest.raises(ValueError, match=r"target 'x': 'sex' is not in label_columns \['age'\]"):
        module(targets={"x": FinalDays(windows, column="sex", positive="f")}, reference_mode=True, **labels)


class Recorder(LightningModule):
    """Remembers the first rows of the training batches, and the sizes of the others."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.starts, self.validated = [], []

    def training_step(self, batch, index):
        self.starts.append((self.current_epoch, batch["starts"].tolist()))
        return self.weight * batch["numeric"].sum()

    def validation_step(self, batch, index):
        self.validated.append(len(batch["events"]["times"]))

    def test_step(self, batch, index):
        self.validated.append(batch["user_ids"][0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder, epochs):
    # Three log lines a test are not what is tested, and the number of workers is 0 on purpose.
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_a_trainer_fits_resumes_and_tests(module, tmp_path):
    whole_run, first, second = Recorder(), Recorder(), Recorder()
    trainer(tmp_path, 3).fit(whole_run, module(sampling_seed=4))
    started = trainer(tmp_path, 1)
    started.fit(first, module(sampling_seed=4))
    started.save_checkpoint(tmp_path / "one.ckpt")
    trainer(tmp_path, 3).fit(second, module(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert first.starts + second.starts == whole_run.starts
    assert len({tuple(starts) for _, starts in whole_run.starts}) == len(whole_run.starts)
    assert len(whole_run.validated) == 3
    trainer(tmp_path, 1).test(first, module(), verbose=False)
    assert first.validated[-1] == 100
    with pytest.raises(ValueError, match="checkpoint was trained with seed 42, here it is 1"):
        trainer(tmp_path, 3).fit(second, module(seed=1), ckpt_path=tmp_path / "one.ckpt", weights_only=True)


class TestCheckpoint:
    def test_the_same_data_is_accepted(self, module):
        state = module(sampling_seed=5).state_dict()
        json.dumps(state)
        module().load_state_dict(state)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"seed": 1}, "checkpoint was trained with seed 1, here it is 42"),
            ({"max_categories": 2}, "checkpoint was trained with max_categories 2, here it is None"),
            (BY_TIME, "checkpoint was trained with split 'time', here it is 'users'"),
            ({"where": ["amount > 0"]}, "checkpoint was trained with where ['amount > 0'], here it is []"),
        ],
    )
    def test_another_split_is_refused(self, module, arguments, message):
        state = module(**arguments).state_dict()
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            module().load_state_dict(state)
        assert "\n" not in str(error.value)

    def test_other_training_events_are_refused_but_not_later_ones(self, module, tmp_path, events):
        state = module(**BY_TIME).state_dict()
        later = pl.col("time") >= datetime.datetime(2020, 5, 1)
        events.filter(~later | (pl.col("row") % 2 == 0)).write_parquet(tmp_path / "later.parquet")
        module(**BY_TIME, paths=str(tmp_path / "later.parquet")).load_state_dict(state)
        first = pl.col("row") == events.filter(~later)["row"][0]
        changed = events.with_columns(shop=pl.when(first).then(pl.lit("z")).otherwise("shop"))
        changed.write_parquet(tmp_path / "changed.parquet")
        with pytest.raises(ValueError, match="checkpoint was trained on other events: vocabularies differs"):
            module(**BY_TIME, paths=str(tmp_path / "changed.parquet")).load_state_dict(state)
        swapped = events.with_columns(time=pl.when(first).then(pl.col("time").dt.offset_by("-1us")).otherwise("time"))
        swapped.write_parquet(tmp_path / "swapped.parquet")
        with pytest.raises(ValueError, match="checkpoint was trained on other events: train_digest differs"):
            module(**BY_TIME, paths=str(tmp_path / "swapped.parquet")).load_state_dict(state)


BAD = {
    "categorical must name at least one": {"categorical": []},
    "batch_size must be at least 1, got 0": {"batch_size": 0},
    "min_events must be at least 1, got 0": {"min_events": 0},
    "split must be one of 'users', 'time', got 'random'": {"split": "random"},
    "0 < test_fraction": {"test_fraction": 0.6, "validation_fraction": 0.5},
    "validation_start must be a date": {"split": "time"},
    "validation_start must lie before test_start": BY_TIME | {"test_start": "2020-04-01"},
    "validation_start and test_start are for split 'time'": {"test_start": "2020-04-01"},
    "fold_column is for the user split": BY_TIME | {"fold_column": "fold"},
    "max_time must be a date": {"max_time": "tomorrow"},
    "column 'local' is a label and a feature": {"categorical": ["kind", "local"], "local_label_columns": ["local"]},
    "derived feature 'f' = 'local * 2' is computed from 'local', a label": {
        "numeric": ["f"],
        "derived": {"f": "local * 2"},
        "local_label_columns": ["local"],
    },
    "derived feature 'g' = 'f + 1' is computed from 'f', which is computed from a label": {
        "numeric": ["g"],
        "derived": {"f": "local * 2", "g": "f + 1"},
        "local_label_columns": ["local"],
    },
    "group_column 'local' is a label; a label must not": {"group_column": "local", "local_label_columns": ["local"]},
    "order_column 'local' is a label": {"order_column": "local", "local_label_columns": ["local"]},
    "fold_column 'age' is a label": {"fold_column": "age", "label_columns": ["age"], "users_path": "users.csv"},
    "group_column 'f' is computed from a label": {
        "group_column": "f",
        "derived": {"f": "local * 2"},
        "local_label_columns": ["local"],
    },
    "time_column 'f' is computed from a label": {
        "time_column": "f",
        "derived": {"f": "time + local * INTERVAL '1 day'"},
        "local_label_columns": ["local"],
    },
    "where \"local = '0' OR amount > 0\" reads 'local', a label; a label must not decide what is seen": {
        "where": ["amount > 0", "local = '0' OR amount > 0"],
        "local_label_columns": ["local"],
    },
    "where 'age IS NULL' reads 'age', a label; a label must not": {
        "where": ["age IS NULL"],
        "label_columns": ["age"],
        "users_path": "users.csv",
    },
    "where 'g > 1' reads 'g', which is computed from a label; a label must not": {
        "where": ["g > 1"],
        "derived": {"f": "local * 2", "g": "f + 1"},
        "local_label_columns": ["local"],
    },
    "derived 'f': 'local *' is no SQL expression": {"derived": {"f": "local *"}},
    "feature 'kind' is named twice": {"categorical": ["kind", "kind"]},
    "label_columns are read from users_path": {"label_columns": ["age"]},
    "target 'age': 'age' is not in label_columns []": {"targets": {"age": StaticLabel(AfterDelay(1), "age")}},
    "target 'l': 'x' is not in local_label_columns []": {"targets": {"l": LocalLabel(AfterDelay(1), "x")}},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_end_in_one_line(module, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        module(**BAD[message])
    assert "\n" not in str(error.value)


def test_rows_may_be_kept_by_columns_that_targets_read_and_that_are_no_labels(module):
    """What a target makes of an ordinary column is no column of labels, even where the condition names its values."""
    targets = {"b": EventWithin(CalendarDates(every_days=10), 5, "kind", ["b"])}
    data = module(
        targets=targets,
        where=["kind <> 'a'", "spent > 1"],
        derived={"spent": "amount * 2"},
        local_label_columns=["local"],
    )
    counts = data.report_facts()["counts"]
    assert 0 < counts["kept"] < counts["read"]


BAD_DATA = {
    "where: \"COLUMNS('local') = '0'\" must be computed row by row": {
        "where": ["COLUMNS('local') = '0'"],
        "local_label_columns": ["local"],
    },
    "validation_start 2019-01-01 must lie in the data, after 2020-01-01": BY_TIME | {"validation_start": "2019-01-01"},
    "test_start 2030-01-01 must lie in the data": BY_TIME | {"test_start": "2030-01-01"},
    "no train users": {"where": ["fold = 'test'"], "fold_column": "fold"},
    "target 'churn': no query is left": {"targets": {"churn": NoEventWithin(AfterFirstEvent(), 5000)}},
    "no column 'amuont' (numeric), nearest: amount": {"targets": {"a": AmountAbove(AfterFirstEvent(), 5, "amuont")}},
    "column 'kind' has no value 'A'": {"targets": {"k": EventWithin(AfterFirstEvent(), 5, "kind", ["A"])}},
}


@pytest.mark.parametrize("message", BAD_DATA)
def test_data_that_cannot_serve_ends_in_one_line(module, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        module(**BAD_DATA[message]).setup("test")
    assert "\n" not in str(error.value)


def test_training_needs_a_sampler_and_something_to_train_on(module):
    with pytest.raises(ValueError, match="sampler must be given to train"):
        module(sampler=None).train_dataloader()
    with pytest.raises(ValueError, match="Crops: nothing to train on"):
        module(sampler=Crops(500, 600)).train_dataloader()
    with pytest.raises(ValueError, match="sampler: no target 'spend', there are churn"):
        module(sampler=TailWindows("spend")).train_dataloader()
    for make, message in (
        (lambda: ColesSlices(1), "n_slices must be at least 2"),
        (lambda: Crops(5, 4), "1 <= min_length <= max_length must hold, got 5 and 4"),
        (lambda: TailWindows("churn", 0), "got 1 and 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_a_table_of_users_that_cannot_serve(module, tmp_path):
    arguments = {"users_path": str(tmp_path / "users.csv"), "label_columns": ["age"], "targets": {}}
    pl.DataFrame({"user": [100, 100], "age": ["a", "b"]}).write_csv(tmp_path / "users.csv")
    with pytest.raises(ValueError, match="column 'user', row 2: user '100' occurs twice"):
        module(**arguments).setup("test")
    pl.DataFrame({"user": [1, 2], "age": ["a", "b"]}).write_csv(tmp_path / "users.csv")
    with pytest.raises(ValueError, match="column 'user': none of 2 users occurs in the events"):
        module(**arguments).setup("test")
    pl.DataFrame({"user": [100], "ages": ["a"]}).write_csv(tmp_path / "users.csv")
    with pytest.raises(ValueError, match=re.escape("no column 'age' (label_columns), nearest: ages")):
        module(**arguments).setup("test")


def test_online_retail(tmp_path):
    data = EventSequencesDataModule(
        paths="bundled:online_retail",
        user_column="customer_id",
        time_column="invoice_date",
        categorical=["stock_code"],
        numeric=["amount"],
        derived={"amount": "quantity * unit_price"},
        where=["customer_id IS NOT NULL", "quantity > 0", "unit_price > 0"],
        numeric_transform="signed_log",
        max_categories=500,
        duplicates="keep",
        targets={"churn": NoEventWithin(CalendarDates(every_days=28, active_days=90), 60)},
        cache_dir=str(tmp_path),
    )
    facts = data.report_facts()
    assert facts["counts"]["events"] == 397_884
    assert facts["counts"]["users"] == 4_338
    assert facts["counts"]["duplicates"] > 5_000
    assert facts["vocabulary_sizes"] == [502]
    assert facts["warnings"] == []
    assert facts["targets"]["churn"]["folds"]["test"]["queries"] > 1000


def test_traffic_fines(real_data, tmp_path):
    data = EventSequencesDataModule(
        paths=str(real_data / "traffic-fines" / "events.parquet"),
        user_column="case_id",
        time_column="timestamp",
        order_column="log_order",
        categorical=["activity", "article", "vehicleclass"],
        numeric=["amount"],
        missing_numbers="mean",
        split="time",
        validation_start="2008-01-01",
        test_start="2010-06-01",
        targets={"collection": EventWithin(AfterFirstEvent(), 730, "activity", ["Send for Credit Collection"])},
        cache_dir=str(tmp_path),
    )
    batch = whole(data.test_dataloader())
    assert len(batch["events"]["times"]) == 561_470
    labels = pl.read_parquet(real_data / "traffic-fines" / "case_labels.parquet")
    collected = dict(zip(labels["case_id"], labels["credit_collection"], strict=True))
    queries = batch["queries"]["collection"]
    positive = queries["users"][queries["labels"] == 1].tolist()
    assert len(positive) > 20_000
    assert all(collected[batch["user_ids"][user]] for user in positive)
