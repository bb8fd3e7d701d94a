"""InteractionsDataModule: numbers on the bundled data, batches, order of epochs, state, sessions."""

import json
import pickle
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from datamodules import InteractionsDataModule
from datamodules.histories import Histories
from datamodules.synthetic import markov_interactions

VALUES = ["customer_id IS NOT NULL", "quantity > 0", "unit_price > 0"]
GOODS = [*VALUES, "stock_code ~ '^[0-9]{5}'"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("interactions")


def retail(cache, **arguments):
    settings = {
        "paths": "bundled:online_retail",
        "user_column": "customer_id",
        "item_column": "stock_code",
        "time_column": "invoice_date",
        "where": GOODS,
        "target": "next_basket",
        "recommend_seen": True,
        "cache_dir": str(cache),
    }
    return InteractionsDataModule(**(settings | arguments))


@pytest.fixture(scope="module")
def transactions(project):
    frame = pl.read_parquet(project / "datamodules/bundled/online_retail/transactions.parquet")
    return frame.filter(pl.col("customer_id").is_not_null(), pl.col("quantity") > 0, pl.col("unit_price") > 0)


@pytest.fixture
def synthetic(cache):
    path = cache / "markov.parquet"
    if not path.exists():
        frame = markov_interactions(200, 40, n_days=40, seed=9).with_columns(pl.col("timestamp").dt.truncate("1d"))
        frame.write_parquet(path)

    def build(**arguments):
        settings = {
            "paths": str(path),
            "user_column": "user_id",
            "item_column": "item_id",
            "time_column": "timestamp",
            "target": "next_basket",
            "recommend_seen": True,
            "train_window": "strided",
            "max_length": 6,
            "batch_size": 16,
            "eval_batch_size": 10,
            "cache_dir": str(cache),
        }
        return InteractionsDataModule(**(settings | arguments))

    return build


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(one[key].equal(two[key]) for key in one)


# The bundled data


def test_published_counts_of_the_value_filters(cache):
    """397,884 rows, 4,338 customers, 3,665 items, as the documentation of the data says."""
    steps = retail(cache, where=VALUES).report_facts()["steps"]
    assert [(step["step"], step["interactions"]) for step in steps[:4]] == [
        ("read", 541_909),
        ("where customer_id IS NOT NULL", 406_829),
        ("where quantity > 0", 397_924),
        ("where unit_price > 0", 397_884),
    ]
    assert steps[4] == {"step": "distinct ids", "interactions": 397_884, "users": 4338, "items": 3665}


def test_counts_of_filters_and_split_equal_those_of_polars(cache, transactions):
    facts = retail(cache).report_facts()
    goods = transactions.filter(pl.col("stock_code").str.contains("^[0-9]{5}"))
    goods = goods.filter(pl.len().over("stock_code") >= 5)
    sizes = [(goods.height, goods["customer_id"].n_unique(), goods["stock_code"].n_unique())]
    goods = goods.filter(pl.len().over("customer_id") >= 3)
    sizes.append((goods.height, goods["customer_id"].n_unique(), goods["stock_code"].n_unique()))
    assert [(s["interactions"], s["users"], s["items"]) for s in facts["steps"][-2:]] == sizes

    counts = goods.group_by("invoice_date").len().sort("invoice_date", descending=True)
    cut = counts.filter(pl.col("len").cum_sum() <= 0.1 * goods.height)["invoice_date"].min()
    early, late = goods.filter(pl.col("invoice_date") < cut), goods.filter(pl.col("invoice_date") >= cut)
    split = facts["split"]
    assert split["training_period_interactions"] == early.height
    assert split["test_period_interactions"] == late.height
    assert (
        split["test_period_interactions_of_items_seen_before"]
        == late.filter(pl.col("stock_code").is_in(early["stock_code"].unique().to_list())).height
    )
    assert split["validation_users_sampled"] == round(0.05 * early["customer_id"].n_unique())
    assert split["train_users"] == early["customer_id"].n_unique() - split["validation_users_sampled"]

    module = retail(cache)
    train = early.filter(pl.col("customer_id").is_in(module.decode_users(module.train_histories().users).to_list()))
    assert split["train_interactions"] == train.height
    assert split["n_items"] == train["stock_code"].n_unique()
    known = train["stock_code"].unique().to_list()
    asked = late.filter(pl.col("customer_id").is_in(train["customer_id"].unique().to_list()))
    asked = asked.filter(pl.col("stock_code").is_in(early["stock_code"].unique().to_list()))
    asked = asked.filter(pl.col("invoice_date") == pl.col("invoice_date").max().over("customer_id"))
    asked = asked.filter(pl.col("stock_code").is_in(known)).unique(["customer_id", "stock_code"])
    assert split["test_relevant"] == asked.height
    assert split["test_users"] == asked["customer_id"].n_unique()
    assert module.item_counts.tolist() == train.group_by("stock_code").len().sort("stock_code")["len"].to_list()


def test_facts_are_plain_json_and_lie_in_the_cache(cache):
    module = retail(cache)
    facts = json.loads(json.dumps(module.report_facts()))
    stored = json.loads((module._folder().path / "facts.json").read_text())
    assert facts["steps"] == stored["steps"]
    assert facts["settings"]["columns"]["where"] == GOODS
    assert facts["split"]["train_positions"] <= facts["split"]["train_sequences"] * 50


def test_steps_are_logged(tmp_path, caplog):
    with caplog.at_level("INFO", logger="datamodules"):
        retail(tmp_path).prepare_data()
    for line in ("read: 541909 interactions", "where quantity > 0: 397924 interactions", "test_users: "):
        assert line in caplog.text


# Batches


@pytest.mark.parametrize("target", ["next_item", "next_basket"])
def test_training_batch_keeps_the_contract(synthetic, target):
    module = synthetic(target=target)
    n_sequences = 0
    for batch in module.train_dataloader():
        items, baskets, targets = batch["item_ids"], batch["basket_ids"], batch["targets"]
        n_sequences += len(items)
        assert all(tensor.dtype == torch.int64 and tensor.shape == (len(items), 6) for tensor in batch.values())
        padding = items == module.n_items
        assert (items[~padding] < module.n_items).all()
        assert (items >= 0).all()
        assert padding.equal(baskets == -1)
        assert (targets[padding] == -100).all()
        assert (padding.int().diff(dim=1) <= 0).all()  # on the left only
        assert (~padding[:, -1]).all()
        steps = baskets.diff(dim=1)[~padding[:, :-1]]
        assert ((steps == 0) | (steps == 1)).all()
        assert (targets[~padding] >= 0).all()
        assert (targets < module.n_items).all()
    assert n_sequences == module.report_facts()["split"]["train_sequences"]
    assert batch.keys() == {"item_ids", "basket_ids", "targets"}


@pytest.mark.parametrize("stage", ["val", "test", "predict"])
def test_evaluation_batch_keeps_the_contract(synthetic, stage):
    module = synthetic()
    users = []
    for batch in getattr(module, f"{stage}_dataloader")():
        expected = {"item_ids", "basket_ids", "history_items", "history_baskets", "history_offsets", "user_index"}
        assert batch.keys() == expected | ({"relevant"} if stage != "predict" else set())
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())
        offsets = batch["history_offsets"]
        assert offsets[0] == 0
        assert offsets[-1] == len(batch["history_items"]) == len(batch["history_baskets"])
        for row in range(len(batch["user_index"])):
            history = batch["history_items"][offsets[row] : offsets[row + 1]]
            baskets = batch["history_baskets"][offsets[row] : offsets[row + 1]]
            n = min(6, len(history))
            assert n > 0
            pad = torch.full((6 - n,), module.n_items)
            assert batch["item_ids"][row].equal(torch.cat([pad, history[-n:]]))
            assert batch["basket_ids"][row].equal(torch.cat([torch.full((6 - n,), -1), baskets[-n:]]))
            assert baskets[0] == 0
            assert ((baskets.diff() == 0) | (baskets.diff() == 1)).all()
        if stage != "predict":
            relevant = batch["relevant"]
            assert ((relevant >= 0).int().diff(dim=1) <= 0).all()
            assert (relevant >= -1).all()
            assert (relevant[:, 0] >= 0).all()
            assert (relevant >= 0).any(dim=0).all()  # no column of padding alone
        users += batch["user_index"].tolist()
    assert len(set(users)) == len(users)
    if stage == "predict":
        assert users == list(range(module.report_facts()["split"]["n_users"]))


def test_batches_own_their_memory(synthetic):
    """Read-only maps must not reach the model: tensors are written to in place, e.g. by masking."""
    for loader in (synthetic().train_dataloader(), synthetic().test_dataloader(), synthetic().predict_dataloader()):
        for tensor in next(iter(loader)).values():
            tensor += 1


def test_train_histories_are_read_only_maps_in_training_order(synthetic):
    module = synthetic()
    histories = module.train_histories()
    assert isinstance(histories, Histories)
    assert [getattr(histories, name).dtype for name in ("items", "baskets", "offsets", "users")] == [
        np.int32,
        np.int32,
        np.int64,
        np.int64,
    ]
    assert len(histories.offsets) == len(histories.users) + 1
    assert histories.offsets[-1] == len(histories.items) == len(histories.baskets)
    with pytest.raises(ValueError, match="read-only"):
        histories.items[0] = 0
    assert np.bincount(histories.items, minlength=module.n_items).tolist() == module.item_counts.tolist()


def test_no_validation_users_no_loader(synthetic):
    assert synthetic(validation_user_fraction=0.0).val_dataloader() == []


def test_defaults_of_training_targets_follow_the_history_setting(synthetic):
    def without_target(**arguments):
        return sum(
            int(((batch["targets"] == -100) & (batch["basket_ids"] >= 0)).sum())
            for batch in synthetic(**arguments).train_dataloader()
        )

    assert without_target(recommend_seen=True) == 0
    assert without_target(recommend_seen=False) > 0
    assert without_target(recommend_seen=False) == without_target(recommend_seen=False, train_targets="new")
    assert without_target(recommend_seen=False, train_targets="all") == 0
    assert without_target(recommend_seen=True, train_targets="new") > 0


# Order of epochs


def test_epoch_is_a_pure_function_of_seed_and_number(synthetic):
    def batches(epoch, **arguments):
        loader = synthetic(**arguments).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return list(loader)

    again = batches(3)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002  (the global generator must not matter)
    assert all(equal(*pair) for pair in zip(batches(3), again, strict=True))
    for other in (batches(4), batches(3, seed=43)):
        assert not all(equal(*pair) for pair in zip(other, again, strict=False))


def test_iterating_leaves_the_generators_of_the_model_alone(synthetic):
    state = torch.get_rng_state()
    list(synthetic().train_dataloader())
    list(synthetic().test_dataloader())
    assert torch.get_rng_state().equal(state)


def test_epochs_draw_other_targets_and_other_orders_of_baskets(synthetic):
    sequences = synthetic().train_dataloader().dataset
    n = len(sequences)
    one, two = sequences.__getitems__(range(n)), sequences.__getitems__(range(n, 2 * n))
    assert one["basket_ids"].equal(two["basket_ids"])
    assert (one["targets"] != two["targets"]).any()
    assert (one["item_ids"] != two["item_ids"]).any()
    assert one["item_ids"].sort(dim=1).values.equal(two["item_ids"].sort(dim=1).values)
    fixed = synthetic(shuffle_within_basket=False).train_dataloader().dataset
    assert fixed.__getitems__(range(n))["item_ids"].equal(fixed.__getitems__(range(n, 2 * n))["item_ids"])


def test_a_sequence_does_not_depend_on_its_batch(synthetic):
    sequences = synthetic().train_dataloader().dataset
    numbers = [5, 3, 700, 2]
    together = sequences.__getitems__(numbers)
    for row, number in enumerate(numbers):
        alone = sequences[number]
        assert all(alone[key][0].equal(together[key][row]) for key in alone)


@pytest.mark.parametrize("target", ["next_item", "next_basket"])
def test_rows_that_fill_a_batch_up_have_no_target(synthetic, target):
    sequences = synthetic(target=target).train_dataloader().dataset
    batch, first, fifth = sequences.__getitems__([5, -1, 5, -1]), sequences[0], sequences[5]
    for row in (1, 3):
        assert (batch["targets"][row] == -100).all()
        assert all(batch[key][row].equal(first[key][0]) for key in ("item_ids", "basket_ids"))
    assert (fifth["targets"] >= 0).any()
    assert all(batch[key][row].equal(fifth[key][0]) for row in (0, 2) for key in batch)


def test_targets_are_drawn_evenly_from_the_next_basket(tmp_path):
    """Three items in the second basket, 1,200 positions: each within 5 standard deviations of 400."""
    rows = [(user, item, time) for user in range(400) for time in range(4) for item in range(3 * time, 3 * time + 3)]
    rows += [(user, item, 9) for user in range(400) for item in range(3)]
    rows += [(user, item, 10) for user in range(400) for item in range(3)]
    path = tmp_path / "rows.parquet"
    pl.DataFrame(rows, schema=["u", "i", "t"], orient="row").write_parquet(path)
    module = InteractionsDataModule(
        paths=str(path),
        user_column="u",
        item_column="i",
        time_column="t",
        split="leave_last_out",
        target="next_basket",
        recommend_seen=True,
        cache_dir=str(tmp_path),
    )
    batches = list(module.train_dataloader())
    targets, baskets = (torch.cat([batch[key] for batch in batches]) for key in ("targets", "basket_ids"))
    for basket in range(3):
        counts = torch.bincount(targets[baskets == basket], minlength=12)
        assert counts.sum() == 1200
        assert counts[3 * basket + 3 : 3 * basket + 6].sum() == 1200
        assert (counts[3 * basket + 3 : 3 * basket + 6] - 400).abs().max() < 5 * (1200 * 2 / 9) ** 0.5


def test_replicas_are_those_of_the_trainer(synthetic):
    numbers = {"train": [], "test": []}
    for rank in (0, 1):
        module = synthetic()
        module.trainer = SimpleNamespace(world_size=2, global_rank=rank)
        numbers["train"].append([number for batch in module.train_dataloader().sampler for number in batch])
        numbers["test"].append([number for batch in module.test_dataloader().sampler for number in batch])
    for stage, (one, two) in numbers.items():
        n = len(getattr(synthetic(), f"{stage}_dataloader")().dataset)
        assert sorted(number for number in one + two if number >= 0) == list(range(n))
        assert (one + two).count(-1) == (n % 2 if stage == "train" else 0)


def test_workers_give_the_same_batches(synthetic):
    loaders = [synthetic(num_workers=workers).train_dataloader() for workers in (0, 2)]
    for epoch in (0, 1):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        assert all(equal(*pair) for pair in zip(*loaders, strict=True))
    evaluation = [synthetic(num_workers=workers).test_dataloader() for workers in (0, 2)]
    assert all(equal(*pair) for pair in zip(*evaluation, strict=True))


def test_sequences_pickle_by_path(synthetic):
    sequences = synthetic().train_dataloader().dataset
    expected = sequences.__getitems__([0, 1])
    again = pickle.loads(pickle.dumps(sequences))
    assert again._folder._open == {}
    assert equal(again.__getitems__([0, 1]), expected)


# With a trainer


class Recorder(LightningModule):
    """Keeps what it is fed; its one weight does nothing."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []
        self.predicted = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        return self.weight * 0.0

    def validation_step(self, batch, batch_idx):
        pass

    def test_step(self, batch, batch_idx):
        self.predicted.append(batch)

    def predict_step(self, batch, batch_idx):
        self.predicted.append(batch)
        return len(batch["user_index"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder, **arguments):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=folder, **quiet, **arguments)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.` is deprecated.*")
def test_trainer_moves_through_epochs_and_a_resumed_fit_sees_the_rest(synthetic, tmp_path):
    whole = Recorder()
    trainer(tmp_path, max_epochs=3, enable_checkpointing=False).fit(whole, datamodule=synthetic())
    n_batches = len(whole.seen) // 3
    first = Recorder()
    begun = trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
    begun.fit(first, datamodule=synthetic())
    begun.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["InteractionsDataModule"]
    assert state == {
        "preparation": synthetic().state_dict()["preparation"],
        "epoch": 1,
        "position": n_batches,
        "catalogue_hash": synthetic().catalogue_hash,
        "n_items": synthetic().n_items,
        "sampling_seed": 42,
    }
    rest = Recorder()
    trainer(tmp_path, max_epochs=3, enable_checkpointing=False).fit(
        rest, datamodule=synthetic(), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True
    )
    assert len(rest.seen) == n_batches
    assert all(equal(*pair) for pair in zip(first.seen + rest.seen, whole.seen, strict=True))
    assert not equal(whole.seen[0], whole.seen[n_batches])


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.` is deprecated.*")
def test_trainer_predicts_for_every_user_once(synthetic, tmp_path):
    model = Recorder()
    module = synthetic()
    trainer(tmp_path).predict(model, datamodule=module, return_predictions=False)
    users = torch.cat([batch["user_index"] for batch in model.predicted])
    assert users.tolist() == list(range(module.report_facts()["split"]["n_users"]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"min_item_count": 100}, "checkpoint was trained on catalogue"),
        ({"validation_user_fraction": 0.06}, "trained with validation_user_fraction 0.05, here it is 0.06"),
        ({"test_fraction": 0.2}, "trained with test_fraction 0.1, here it is 0.2"),
        ({"seed": 1}, "trained with seed 42, here it is 1"),
    ],
)
def test_checkpoint_of_another_catalogue_or_split(synthetic, change, said):
    state = synthetic().state_dict()
    other = synthetic(**change)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        other.load_state_dict(state)
    assert said in str(caught.value)
    if "catalogue" in said:
        for number in (synthetic().n_items, other.n_items):
            assert f"{number} items" in str(caught.value)
    synthetic(max_length=9).load_state_dict(state)


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ("global_time", "trained with cut_time '1970-01-01T01:30:00.000000', here it is '1970-01-01T01:21:00.000000'"),
        ("leave_last_out", "trained with train_digest '"),
    ],
)
def test_checkpoint_that_was_trained_on_what_is_asked_for_is_refused(tmp_path, split, said):
    """The file without its last rows has the same catalogue, and asks for rows that the whole file trains on."""
    generator = np.random.default_rng(0)
    n = 6000
    frame = pl.DataFrame({"u": generator.integers(0, 200, n), "i": generator.integers(0, 40, n), "t": np.arange(n)})

    def of(name, rows):
        rows.write_csv(path) if (path := tmp_path / name).suffix == ".csv" else rows.write_parquet(path)
        columns = {"user_column": "u", "item_column": "i", "time_column": "t", "cache_dir": str(tmp_path / "cache")}
        return InteractionsDataModule(paths=str(path), split=split, recommend_seen=True, **columns)

    state = of("whole.parquet", frame).state_dict()
    earlier = of("earlier.parquet", frame.head(n * 9 // 10))
    assert earlier.catalogue_hash == state["catalogue_hash"]
    with pytest.raises(ValueError, match=r"^[^\n]*its training data may be among what is asked for here$") as caught:
        earlier.load_state_dict(state)
    assert said in str(caught.value)
    earlier.trainer = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.PREDICTING))
    earlier.load_state_dict(state)  # nothing is asked
    of("copy.csv", frame.sample(fraction=1, shuffle=True, seed=1)).load_state_dict(state)
    # The same histories under other names, and one event more or less, are other training data.
    for other in (frame.with_columns(pl.col("u") + 1), frame.with_columns(i=pl.col("i").reverse())):
        with pytest.raises(ValueError, match="trained with train_digest"):
            of("other.parquet", other).load_state_dict(state)


def test_sampling_seed_moves_training_and_leaves_the_split(synthetic):
    one, two, by_default = synthetic(sampling_seed=1), synthetic(sampling_seed=2), synthetic()
    assert one._folder().path == two._folder().path == by_default._folder().path
    first = [next(iter(data.train_dataloader())) for data in (one, two, by_default, synthetic(sampling_seed=42))]
    assert not equal(first[0], first[1])
    assert equal(first[2], first[3])
    for data in (two, by_default):
        for batch, same in zip(one.test_dataloader(), data.test_dataloader(), strict=True):
            assert equal(batch, same)
    two.load_state_dict(one.state_dict())
    by_default.load_state_dict(one.state_dict())
    assert [data.state_dict()["sampling_seed"] for data in (two, by_default)] == [2, 1]
    for epoch in (0, 1):
        batches = []
        for data in (one, by_default):
            loader = data.train_dataloader()
            loader.sampler.set_epoch(epoch)
            batches.append(list(loader))
        assert all(equal(*pair) for pair in zip(*batches, strict=True))


# Sessions


def test_sessions_keep_their_own_order(tmp_path):
    generator = np.random.default_rng(0)
    rows = [
        (f"s{session}", place, int(item))
        for session in range(80)
        for place, item in enumerate(generator.integers(0, 12, size=int(generator.integers(3, 9))))
    ]
    frame = pl.DataFrame(rows, schema=["session", "position", "item"], orient="row").sample(
        fraction=1, shuffle=True, seed=1
    )
    path = tmp_path / "sessions.parquet"
    frame.write_parquet(path)
    module = InteractionsDataModule(
        paths=str(path),
        user_column="session",
        item_column="item",
        order_column="position",
        split="leave_last_out",
        recommend_seen=True,
        min_item_count=1,
        cache_dir=str(tmp_path),
    )
    ordered = frame.sort("session", "position").group_by("session", maintain_order=True).agg("item")
    sessions = dict(ordered.rows())
    assert module.n_items == 12
    n_asked = 0
    for stage, loader in ((2, module.val_dataloader()), (1, module.test_dataloader())):
        for batch in loader:
            for row, session in enumerate(module.decode_users(batch["user_index"])):
                items = sessions[session]
                history = batch["history_items"][batch["history_offsets"][row] : batch["history_offsets"][row + 1]]
                assert module.decode_items(history).to_list() == items[:-stage]
                assert module.decode_items(batch["relevant"][row]).to_list() == [items[-stage]]
                assert batch["basket_ids"][row].max() == len(items) - stage - 1
                n_asked += 1
    assert n_asked == 2 * 80


# Other real data


@pytest.mark.parametrize(
    ("name", "arguments", "read", "kept"),
    [
        (
            "amazon-sports/interactions.parquet",
            {"user_column": "user_id", "item_column": "item_id", "time_column": "timestamp"},
            296_337,
            (296_337, 35_598, 18_357),
        ),
        (
            "ciao/ratings.parquet",
            {"user_column": "user_id", "item_column": "item_id", "time_column": "timestamp", "min_item_count": 1},
            284_086,
            (284_086, 7375, 105_114),
        ),
        (
            "diginetica/train_sessions.parquet",
            {
                "user_column": "session",
                "item_column": "item",
                "order_column": "position",
                "split": "leave_last_out",
                "min_item_count": 1,
                "min_user_count": 1,
            },
            906_140,
            (906_140, 186_670, 43_097),
        ),
    ],
    ids=["amazon-sports", "ciao", "diginetica"],
)
def test_published_counts_of_other_data(real_data, tmp_path, name, arguments, read, kept):
    module = InteractionsDataModule(
        paths=str(real_data / name), recommend_seen=True, cache_dir=str(tmp_path), **arguments
    )
    steps = module.report_facts()["steps"]
    assert steps[0]["interactions"] == read
    assert (steps[-1]["interactions"], steps[-1]["users"], steps[-1]["items"]) == kept
    batch = next(iter(module.test_dataloader()))
    assert (batch["relevant"][:, 0] >= 0).all()
