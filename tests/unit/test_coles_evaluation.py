"""In evaluation, where nothing is joined over processes, CoLES leaves padding rows out as it does in training."""

import pytest
import torch

from lightning_modules.losses import CoLES


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("users", [[0, 0, 1, 1], [0, 1]])
def test_padding_rows_are_no_slices_of_a_user(users, reduction):
    objective = CoLES(d=3, vocabulary_sizes=[4], n_numeric=0, margin=1.5, reduction=reduction)
    slices, padding = torch.randn(len(users), 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    batch = {"users": torch.tensor([-1, *users, -1])}
    h = torch.cat([padding[:1], slices, padding[1:]]).requires_grad_()
    in_training = objective(h, batch).detach()
    objective.eval()
    loss = objective(h, batch)
    loss.backward()
    # float64 sums of a dozen numbers of order 1
    torch.testing.assert_close(loss.detach(), objective(slices, {"users": torch.tensor(users)}), rtol=0, atol=1e-12)
    torch.testing.assert_close(loss.detach(), in_training, rtol=0, atol=1e-12)
    assert not h.grad[[0, -1]].any()
    assert h.grad[1:-1].any(), "the slices themselves must cost something"
