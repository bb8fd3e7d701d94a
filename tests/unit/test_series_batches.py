"""The whole of a split behind any loader, and rows that only pad."""

import pytest
import torch
from torch.utils.data import DataLoader, Subset, default_collate

from datamodules import TimeSeriesDataModule
from datamodules.synthetic_series import synthetic_series
from lightning_modules.attacks.series_batches import whole_split

N = 7


def row(number, index=None):
    index = number if index is None else index
    return {
        "series": torch.full((3, 1), float(number)),
        "mask": torch.ones(3, dtype=torch.bool),
        "labels": torch.tensor(number % 2),
        "index": torch.tensor(index),
    }


ROWS = [row(number) for number in range(N)]
BATCHES = [default_collate(ROWS[start : start + 3]) for start in range(0, N, 3)]


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(ROWS, batch_size=2, shuffle=True),
        DataLoader(Subset(ROWS, range(N)), batch_size=2),
        DataLoader(BATCHES, batch_size=None),
        DataLoader(ROWS[::-1], batch_size=3),
    ],
    ids=["rows", "subset", "batches", "reversed"],
)
def test_a_split_is_whole_and_by_index(loader):
    whole = whole_split(loader)
    expected = default_collate(ROWS)
    assert whole.keys() == expected.keys()
    assert all(torch.equal(whole[key], value) for key, value in expected.items())


@pytest.mark.parametrize("indices", [[0, 1, 1], [1, 2, 3], [0, 2, 5]])
def test_numbers_that_do_not_name_rows_are_refused(indices):
    loader = DataLoader([row(number, index) for number, index in enumerate(indices)], batch_size=2)
    with pytest.raises(ValueError, match=r"index of a batch must number the 3 series of the split 0\.\.2, each once"):
        whole_split(loader)


def test_ours_is_whole_and_pads_without_a_label(tmp_path):
    synthetic_series(12, 4, n_steps=9, rule="bump", noise=0.5, seed=3).write(tmp_path, "Toy", ".tsv")
    module = TimeSeriesDataModule(folder=str(tmp_path), name="Toy", batch_size=4, validation_fraction=0.25)
    loader, arrays = module.train_dataloader(), module.arrays("train")
    whole = whole_split(loader)
    assert all(torch.equal(whole[key], arrays[key]) for key in arrays)
    n_series = len(arrays["labels"])
    batch = loader.dataset[[-1, 2 + 5 * n_series, -1]]
    assert batch["labels"].tolist() == [-100, arrays["labels"][2], -100]
    assert batch["index"].tolist() == [-1, 2, -1]
    assert torch.equal(batch["series"], arrays["series"][[0, 2, 0]])
    assert torch.equal(module.arrays("train")["labels"], arrays["labels"]), "padding must not write into the split"
    assert loader.dataset[[]]["series"].shape == (0, 9, 1)
