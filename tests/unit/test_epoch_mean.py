"""The mean over an epoch: weights, nothing to average, and a checkpoint amid the epoch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.metrics import EpochMean

BATCHES = st.lists(st.tuples(st.floats(-100, 100, width=32), st.integers(0, 50)), min_size=1, max_size=12)


@given(BATCHES)
@settings(max_examples=25, deadline=None)
def test_it_is_the_weighted_mean_of_the_batches(batches):
    metric = EpochMean()
    for value, weight in batches:
        metric.update(torch.tensor(value), weight)
    weights = math.fsum(weight for _, weight in batches)
    if weights == 0:
        assert metric.compute().isnan()
    else:
        expected = math.fsum(value * weight for value, weight in batches) / weights
        # the result is rounded to float32: 2^-24 of values of at most 100
        assert abs(metric.compute().item() - expected) <= 100 * 2**-24


def test_what_has_no_weight_is_not_read():
    metric = EpochMean()
    metric.update(float("nan"), 0)
    metric.update(torch.tensor(3.0))
    metric.update(torch.tensor(float("inf")), torch.tensor(0))
    assert metric.compute() == 3


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric EpochMean was called before")
def test_a_checkpoint_keeps_half_an_epoch_and_no_graph():
    metric = EpochMean()
    metric.update(torch.tensor(2.0, requires_grad=True), 3)
    state = metric.state_dict()
    assert state == {"total": torch.tensor(6.0), "weight": torch.tensor(3.0)}
    assert not any(tensor.requires_grad for tensor in state.values())
    resumed = EpochMean()
    resumed.load_state_dict(state)
    for one in (metric, resumed):
        one.update(10.0, 1)
    assert metric.compute() == resumed.compute() == 4
    resumed.reset()
    assert resumed.compute().isnan()
