"""What tests of broken and resumed fits share: a way to break one off, and equality to the last bit."""

import numpy as np
import pytest
import torch
from lightning import Callback

from datamodules import EventSequencesDataModule
from datamodules.event_batches import ColesSlices
from datamodules.event_targets import CalendarDates, NoEventWithin


class Broken(Exception):
    """What ends a fit before its time."""


class BreakAt(Callback):
    """Raises at the start or the end of a training batch, counted over all epochs and sittings."""

    def __init__(self, batch, at_end):
        self.batch, self.at_end = batch, at_end

    def _look(self, trainer, at_end):
        if at_end == self.at_end and trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            raise Broken

    def on_train_batch_start(self, trainer, *_):
        self._look(trainer, at_end=False)

    def on_train_batch_end(self, trainer, *_):
        self._look(trainer, at_end=True)


@pytest.fixture(scope="session")
def broken():
    """The exception that :func:`break_at` ends a fit by."""
    return Broken


@pytest.fixture(scope="session")
def break_at():
    """``break_at(batch, at_end)``: a callback that breaks a fit off."""
    return BreakAt


def _assert_same(one, other, where="", *, nan_is_nan=False):
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key, value in one.items():
            _assert_same(value, other[key], f"{where}/{key}", nan_is_nan=nan_is_nan)
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, values in enumerate(zip(one, other, strict=True)):
            _assert_same(*values, f"{where}/{number}", nan_is_nan=nan_is_nan)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        both_nan = nan_is_nan and bool(one.isnan().all()) and bool(other.isnan().all())
        assert torch.equal(one, other) or both_nan, where
    elif isinstance(one, np.ndarray):
        np.testing.assert_array_equal(one, other, err_msg=where)
    else:
        assert one == other, where


@pytest.fixture(scope="session")
def assert_same():
    """``assert_same(one, other, where, nan_is_nan=False)``: equal to the last bit, through mappings and sequences.

    With ``nan_is_nan`` two tensors of nothing but NaN are equal.
    """
    return _assert_same


@pytest.fixture(scope="session")
def event_data():
    """``event_data(folder, batch_size, **changes)``: a data module of the synthetic events written to a folder."""

    def made(folder, batch_size, **changes):
        return EventSequencesDataModule(
            paths=str(folder / "events.parquet"),
            user_column="user",
            time_column="time",
            categorical=["event_type"],
            numeric=["amount"],
            validation_fraction=0.25,
            test_fraction=0.25,
            sampler=ColesSlices(2, 2, 12),
            targets={"silent": NoEventWithin(rule=CalendarDates(every_days=6), days=3)},
            batch_size=batch_size,
            cache_dir=str(folder / "cache"),
            **changes,
        )

    return made
