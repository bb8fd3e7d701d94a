"""Probes for test and validation series in training: statistics, splits, recognition of the archive's form."""

import numpy as np
import pytest

from datamodules import TimeSeriesDataModule
from datamodules.synthetic_series import synthetic_series

N_TRAIN, N_TEST = 24, 12


def written(folder, train, labels, test, test_labels):
    folder.mkdir()
    for part, series, classes in (("TRAIN", train, labels), ("TEST", test, test_labels)):
        rows = [
            "\t".join([str(label), *map(repr, values)]) for label, values in zip(classes, series.tolist(), strict=True)
        ]
        (folder / f"Walk_{part}.tsv").write_text("\n".join(rows))
    return str(folder)


@pytest.fixture
def drawn():
    """Raw series, and series that are normalised one by one."""
    return {
        form: synthetic_series(N_TRAIN, N_TEST, n_steps=30, z_normed=form == "z_normed", seed=7)
        for form in ("raw", "z_normed")
    }


def arguments_of(drawn):
    return drawn.train.series[..., 0], drawn.train.labels, drawn.test.series[..., 0], drawn.test.labels


@pytest.mark.parametrize("form", ["raw", "z_normed"])
@pytest.mark.parametrize("arguments", [{}, {"fold": 2, "n_folds": 3}])
def test_training_does_not_depend_on_test_or_validation_values(tmp_path, drawn, form, arguments):
    """Everything that is not trained on becomes large and raw; training batches, statistics, digest stay."""
    train, labels, test, test_labels = arguments_of(drawn[form])
    module = TimeSeriesDataModule(folder=written(tmp_path / "one", train, labels, test, test_labels), **arguments)
    changed = train.copy()
    changed[module.rows("validation")] = 1000 + 50 * changed[module.rows("validation")]
    other = TimeSeriesDataModule(
        folder=written(tmp_path / "two", changed, labels, 1000 - 50 * test, test_labels[::-1]), **arguments
    )
    assert other.rows("train").tolist() == module.rows("train").tolist()
    before, after = module.arrays("train"), other.arrays("train")
    assert all(before[key].equal(after[key]) for key in before)
    assert module.state_dict() == other.state_dict()
    assert module.is_z_normed is other.is_z_normed is (form == "z_normed")
    assert not module.arrays("validation")["series"].equal(other.arrays("validation")["series"])


def test_every_training_value_moves_the_statistics(tmp_path, drawn):
    """The probe above can fail: the statistics do read training series."""
    train, labels, test, test_labels = arguments_of(drawn["raw"])
    module = TimeSeriesDataModule(folder=written(tmp_path / "one", train, labels, test, test_labels))
    for place, row in enumerate(module.rows("train")[:3]):
        changed = train.copy()
        changed[row, 5] += 100
        other = TimeSeriesDataModule(folder=written(tmp_path / f"{place}", changed, labels, test, test_labels))
        assert float(other.mean) > float(module.mean)
        assert other.state_dict()["train_digest"] != module.state_dict()["train_digest"]


@pytest.mark.parametrize("arguments", [{}, {"fold": 0}, {"validation_fraction": 0.5}])
def test_no_series_is_in_two_splits(tmp_path, drawn, arguments):
    """Series are told apart by their values, not by the module's own numbers."""
    train, labels, test, test_labels = arguments_of(drawn["raw"])
    module = TimeSeriesDataModule(
        folder=written(tmp_path / "one", train, labels, test, test_labels), normalise="none", **arguments
    )
    seen = {
        split: {tuple(values) for values in module.arrays(split)["series"][..., 0].tolist()}
        for split in ("train", "validation", "test")
    }
    assert not seen["train"] & seen["validation"]
    assert not (seen["train"] | seen["validation"]) & seen["test"]
    assert len(seen["train"] | seen["validation"]) == N_TRAIN
    assert seen["test"] == {tuple(values) for values in test.astype(np.float32).tolist()}


def test_loaders_of_fitting_hold_no_test_series(tmp_path, drawn):
    train, labels, test, test_labels = arguments_of(drawn["raw"])
    module = TimeSeriesDataModule(
        folder=written(tmp_path / "one", train, labels, test, test_labels), normalise="none", batch_size=5
    )
    known = {tuple(values) for values in train.astype(np.float32).tolist()}
    for loader in (module.train_dataloader(), module.val_dataloader()):
        for batch in loader:
            assert {tuple(values) for values in batch["series"][..., 0].tolist()} <= known


def test_labels_follow_their_series_through_split_and_shuffle(tmp_path):
    """The first value of each series is its row in the file, and the class is a function of it."""
    rows = np.arange(40)
    series = rows[:, None] + np.zeros((40, 3))
    series[:, 1:] = np.random.default_rng(0).normal(size=(40, 2))
    labels = (rows * 7 % 10 < 4).astype(int)
    folder = written(tmp_path / "one", series, labels, series, labels)
    module = TimeSeriesDataModule(folder=folder, normalise="none", batch_size=7)
    loaders = {
        "train": module.train_dataloader(),
        "validation": module.val_dataloader(),
        "test": module.test_dataloader(),
    }
    for split, loader in loaders.items():
        for batch in loader:
            row = batch["series"][:, 0, 0].long().numpy()
            assert batch["labels"].tolist() == labels[row].tolist()
            assert module.rows(split)[batch["index"]].tolist() == row.tolist()
