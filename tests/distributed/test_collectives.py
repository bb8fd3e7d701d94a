"""Collectives of two and three processes against plain arithmetic in one."""

import pytest
import torch
from torch import nn

from lightning_modules.collectives import (
    average_gradients,
    from_first,
    gather_objects,
    gather_rows,
    n_processes,
    rank,
    same_everywhere,
    share,
    sum_in_place,
)

SIZES = {2: [3, 0], 3: [2, 0, 5]}


def model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def rows(world):
    generator = torch.Generator().manual_seed(world)
    parts = [torch.randn(size, 4, generator=generator, dtype=torch.float64) for size in SIZES[world]]
    return parts, [part.sum(1, keepdim=True).expand(-1, 2) for part in parts]


def contrastive(z):
    return torch.cdist(z, z).clamp(min=1e-3).log().mean()


def refused():
    raise ValueError("no such file")


def filled_by(world, number):
    """Rows of a table that process ``number`` of several has; 0 elsewhere."""
    table = torch.zeros(7, 3)
    table[number::world] = torch.randn(7, 3, generator=torch.Generator().manual_seed(5))[number::world]
    return table


def together(world):
    """In each process: weighted gradients, a loss of all rows, objects, what the first computes, errors, weights."""
    parts, targets = rows(world)
    own, wanted = parts[rank()], targets[rank()]
    net = model()
    mean = nn.functional.mse_loss(net(own), wanted) if len(own) else 0.0 * net(own).sum()
    unused = nn.Parameter(torch.zeros(2))
    (mean * share(len(own))).backward()
    average_gradients([*net.parameters(), unused])
    gradients = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    z, place = gather_rows(net(own))
    (contrastive(z) * n_processes()).backward()
    average_gradients(net.parameters())
    error = ""
    try:
        from_first(refused)
    except ValueError as found:
        error = str(found)
    drifted = nn.BatchNorm1d(3)
    drifted.running_mean += rank()
    same_everywhere(drifted)
    return {
        "gradients": gradients,
        "unused": unused.grad,
        "contrastive": [parameter.grad for parameter in net.parameters()],
        "place": (place.start, place.stop),
        "objects": gather_objects({"rank": rank()}),
        "first": from_first(lambda: rank() + 40),
        "error": error,
        "mean": drifted.running_mean,
        "no rows": share(0.0),
        "summed": sum_in_place(filled_by(world, rank()), "cpu"),
    }


@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_equal_one(in_processes, world):
    parts, targets = (torch.cat(found) for found in rows(world))
    net = model()
    nn.functional.mse_loss(net(parts), targets).backward()
    alone = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    contrastive(net(parts)).backward()
    for number, found in enumerate(in_processes(world, __file__, "together", world, joined=True)):
        # share is a float32 factor: 1e-7 of each term
        torch.testing.assert_close(found["gradients"], alone, rtol=1e-6, atol=1e-7)
        assert found["unused"] is None
        torch.testing.assert_close(
            found["contrastive"], [parameter.grad for parameter in net.parameters()], rtol=0, atol=1e-13
        )
        assert found["place"] == (sum(SIZES[world][:number]), sum(SIZES[world][: number + 1]))
        assert found["objects"] == [{"rank": one} for one in range(world)]
        assert found["first"] == 40
        assert found["error"] == "no such file"
        assert torch.equal(found["mean"], torch.zeros(3))
        assert float(found["no rows"]) == 0
        assert torch.equal(found["summed"], filled_by(1, 0))


def test_alone_nothing_changes():
    net = model()
    net(torch.ones(1, 4, dtype=torch.float64)).sum().backward()
    before = [parameter.grad.clone() for parameter in net.parameters()]
    average_gradients(net.parameters())
    assert all(torch.equal(one, parameter.grad) for one, parameter in zip(before, net.parameters(), strict=True))
    assert share(3) == 1.0
    own = torch.ones(2, 2)
    assert gather_rows(own)[0] is own
    assert torch.equal(sum_in_place(own, "cpu"), torch.ones(2, 2))
    assert gather_objects("x") == ["x"]
    with pytest.raises(ValueError, match="no such file"):
        from_first(refused)
