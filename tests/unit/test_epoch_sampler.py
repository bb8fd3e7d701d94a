"""Order of epochs: disjoint and complete over processes, equally many batches, and taken up anywhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import LightningModule, Trainer
from torch.utils.data import Dataset, SequentialSampler

from datamodules.epoch_sampler import EpochLoader, EpochSampler, numbers_of

SHAPES = {"n": st.integers(1, 40), "replicas": st.integers(1, 4), "batch_size": st.integers(1, 9)}


class Numbers(Dataset):
    """Rows that are their own numbers."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return torch.tensor(numbers_of(index), dtype=torch.int64)


def samplers(n, replicas, batch_size, *, shuffle, epoch=0):
    several = [
        EpochSampler(range(n), batch_size=batch_size, shuffle=shuffle, seed=1, num_replicas=replicas, rank=rank)
        for rank in range(replicas)
    ]
    for sampler in several:
        sampler.set_epoch(epoch)
    return several


@given(**SHAPES)
@settings(max_examples=25, deadline=None)
def test_evaluation_is_disjoint_complete_and_has_equally_many_batches(n, replicas, batch_size):
    parts = [list(sampler) for sampler in samplers(n, replicas, batch_size, shuffle=False)]
    lengths = {len(sampler) for sampler in samplers(n, replicas, batch_size, shuffle=False)}
    assert {len(part) for part in parts} == lengths
    assert len(lengths) == 1
    assert sorted(number for part in parts for batch in part for number in batch) == list(range(n))
    assert all(len(batch) <= batch_size for part in parts for batch in part)


@given(**SHAPES, epoch=st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_training_has_equally_many_rows_filled_up_with_minus_one(n, replicas, batch_size, epoch):
    parts = [list(sampler) for sampler in samplers(n, replicas, batch_size, shuffle=True, epoch=epoch)]
    rows = [[number for batch in part for number in batch] for part in parts]
    assert {len(row) for row in rows} == {-(-n // replicas)}
    assert len({tuple(map(len, part)) for part in parts}) == 1
    numbers = [number for row in rows for number in row]
    assert numbers.count(-1) == -n % replicas
    assert sorted(number - epoch * n for number in numbers if number >= 0) == list(range(n))
    # The same epoch in one process is the same order, dealt out in turn.
    (alone,) = samplers(n, 1, batch_size, shuffle=True, epoch=epoch)
    dealt = [row[place] for place in range(len(rows[0])) for row in rows]
    assert dealt[:n] == [number for batch in alone for number in batch]


@given(n=st.integers(1, 30), batch_size=st.integers(1, 7), epoch=st.integers(0, 3), done=st.integers(0, 40))
@settings(max_examples=25, deadline=None)
def test_an_epoch_is_taken_up_behind_what_was_done(n, batch_size, epoch, done):
    def loader():
        return EpochLoader(Numbers(n), rows=batch_size, shuffled=True, seed=3)

    first = loader()
    first.sampler.set_epoch(epoch)
    whole = [batch.tolist() for batch in first]
    done = min(done, len(whole))
    broken, resumed = loader(), loader()
    broken.sampler.set_epoch(epoch)
    batches = iter(broken)
    for _ in range(done):
        next(batches)
    resumed.load_state_dict(broken.state_dict())
    batches = iter(resumed)  # Lightning asks for it before it says which epoch it is
    resumed.sampler.set_epoch(epoch)
    assert len(resumed) == len(whole)
    # Before the first batch no epoch has begun, so that nothing is left out of any.
    assert [batch.tolist() for batch in batches] == whole[done:]
    resumed.sampler.set_epoch(epoch + 1)
    assert len(list(resumed)) == len(whole)


def test_a_place_in_one_epoch_is_none_in_another():
    loader = EpochLoader(Numbers(10), rows=3, shuffled=True, seed=3)
    loader.load_state_dict({"epoch": 4, "batches": 4})
    loader.sampler.set_epoch(5)
    assert sorted(torch.cat(list(loader)).tolist()) == list(range(50, 60))


def test_workers_that_fetched_ahead_count_only_what_was_handed_over():
    loader = EpochLoader(Numbers(12), rows=2, shuffled=True, seed=3, num_workers=1)
    batches = iter(loader)
    first = [next(batches).tolist() for _ in range(2)]
    assert loader.state_dict() == {"epoch": 0, "batches": 2}
    resumed = EpochLoader(Numbers(12), rows=2, shuffled=True, seed=3)
    resumed.load_state_dict(loader.state_dict())
    rest = [batch.tolist() for batch in resumed]
    assert sorted(number for batch in first + rest for number in batch) == list(range(12))


def test_iterating_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    list(EpochLoader(Numbers(5), rows=2, shuffled=True, seed=1))
    assert torch.get_rng_state().equal(before)


class Seen(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {"fit": [], "test": [], "predict": []}

    def training_step(self, batch, batch_idx):
        self.seen["fit"].append(batch.tolist())
        return self.weight * len(batch)

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(batch.tolist())

    def predict_step(self, batch, batch_idx):
        self.seen["predict"].append(batch.tolist())
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:You requested to overfit")
def test_lightning_keeps_batches_whole_in_every_stage():
    def trainer(**arguments):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        return Trainer(accelerator="cpu", enable_model_summary=False, max_epochs=2, **quiet | arguments)

    module = Seen()
    trainer(limit_train_batches=2).fit(module, EpochLoader(Numbers(7), rows=3, shuffled=True, seed=1))
    assert [len(batch) for batch in module.seen["fit"]] == [3, 3, 3, 3]
    assert [max(batch) >= 7 for batch in module.seen["fit"]] == [False, False, True, True]
    evaluation = EpochLoader(Numbers(7), rows=3, shuffled=False, seed=1)
    trainer().test(module, evaluation, verbose=False)
    trainer().predict(module, evaluation)
    assert module.seen["test"] == module.seen["predict"] == [[0, 1, 2], [3, 4, 5], [6]]
    module.seen["fit"] = []
    trainer(overfit_batches=1).fit(module, EpochLoader(Numbers(7), rows=3, shuffled=True, seed=1))
    assert module.seen["fit"] == [[0, 1, 2]] * 2


def test_rows_in_the_order_of_lightning_keep_their_processes():
    first = EpochLoader(Numbers(5), rows=2, shuffled=True, seed=1, num_replicas=2, rank=1)
    again = EpochLoader(
        Numbers(5), rows=2, shuffled=True, seed=1, num_replicas=2, rank=1, sampler=SequentialSampler(first.dataset)
    )
    assert [batch.tolist() for batch in again] == [[1, 3], []]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_replicas": 0}, "num_replicas must be at least 1, got 0"),
        ({"num_replicas": 2, "rank": 2}, r"rank must be in 0\.\.1, got 2"),
    ],
)
def test_what_cannot_be_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        EpochSampler(range(3), **{"batch_size": 2, "shuffle": True, "seed": 1} | arguments)
