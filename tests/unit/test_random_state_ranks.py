"""Processes of one fit draw different numbers, from every stream; the first draws as a single process does."""

import random

import numpy as np
import pytest
import torch
from lightning import seed_everything

from lightning_modules.callbacks import RandomState, random_state


def drawn():
    """A number of each stream; NumPy's is the global one, which third-party samplers draw from."""
    return {"python": random.random(), "numpy": np.random.rand(), "torch": float(torch.rand(()))}  # noqa: NPY002


@pytest.fixture
def draw(monkeypatch):
    """``draw(rank) -> a number of each stream`` after the start of a fit from seed 42 in that process."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002

    def draw(rank):
        seed_everything(42, verbose=False)
        monkeypatch.setattr(random_state, "rank", lambda: rank)
        RandomState().on_train_start(None, None)
        return drawn()

    yield draw
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002


def test_each_process_draws_other_numbers(draw):
    processes = [draw(rank) for rank in range(3)]
    for stream in ("python", "numpy", "torch"):
        assert len({found[stream] for found in processes}) == 3, stream
    assert draw(2) == processes[2]


def test_the_first_process_draws_as_if_the_callback_were_not_there(draw):
    first = draw(0)
    seed_everything(42, verbose=False)
    assert first == drawn()
