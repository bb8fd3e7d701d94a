"""The repeat mode against the mixture written out over the whole catalogue, item by item."""

import pytest
import torch

from lightning_modules.networks import RepeatMixture

V, D, B, T = 23, 8, 5, 11


@pytest.fixture(params=[False, True], ids=["causal", "own basket"])
def case(request):
    generator = torch.Generator().manual_seed(7)
    mixture = RepeatMixture(D, n_items=V, see_own_basket=request.param).double()
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.normal_(std=0.7, generator=generator)
    items = torch.randint(0, 9, (B, T), generator=generator)  # few items, so that there are repeats
    baskets = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 3, 4, 4]).expand(B, T).clone()
    lengths = torch.tensor([0, 1, 4, 11, 8])
    padding = torch.arange(T) < (T - lengths)[:, None]
    items[padding], baskets[padding] = V, -1
    states = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    table = torch.randn(V, D, generator=generator, dtype=torch.float64)
    return mixture, states, items, baskets, ~padding, table


def probabilities(mixture, states, items, baskets, valid, table, user, slot):
    """p(j) for every j, by the formula, with Python loops."""
    last = slot == T - 1
    seen = [
        s
        for s in range(T)
        if valid[user, s]
        and (s <= slot or last or (mixture.see_own_basket and baskets[user, s] == baskets[user, slot]))
    ]
    h = states[user, slot]
    p = torch.softmax(table @ h, 0)
    gate = torch.sigmoid(mixture.gate.weight[0] @ h + mixture.gate.bias[0])
    again = torch.zeros(V, dtype=torch.float64)
    if seen:
        ages = torch.tensor([max(0, baskets[user, slot] - baskets[user, s]) for s in seen], dtype=torch.float64)
        keys = states[user, seen] @ mixture.key.weight.T
        logits = keys @ (mixture.query.weight @ h) / D**0.5 - mixture.decay * torch.log1p(ages)
        for s, weight in zip(seen, torch.softmax(logits, 0), strict=True):
            again[items[user, s]] += weight
    return (1 - gate) * p + gate * again


def test_loss_is_the_mean_negative_log_probability(case):
    mixture, states, items, baskets, valid, table = case
    targets = torch.randint(0, 12, (B, T))
    targets[torch.rand(B, T) < 0.3] = -100
    targets[~valid] = -100
    catalogue = torch.logsumexp(states @ table.T, -1) - (states @ table.T).gather(
        -1, targets.clamp(min=0)[..., None]
    ).squeeze(-1)
    expected = [
        -probabilities(mixture, states, items, baskets, valid, table, b, t)[targets[b, t]].log()
        for b in range(B)
        for t in range(T)
        if targets[b, t] >= 0
    ]
    loss = mixture.loss(catalogue, states, items, baskets, targets)
    # Gate and pointer are taken to the logarithm in float32: 2^-24 relative, a few of them.
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


def test_last_state_loss_takes_several_targets(case):
    mixture, states, items, baskets, valid, table = case
    targets = torch.tensor([[1, 2, -100], [3, -100, -100], [0, 20, 5], [1, 8, -100], [7, 22, 2]])
    rows = torch.logsumexp(states[:, -1] @ table.T, -1)[:, None] - (states[:, -1] @ table.T).gather(
        1, targets.clamp(min=0)
    )
    expected = [
        -probabilities(mixture, states, items, baskets, valid, table, b, T - 1)[target].log()
        for b in range(B)
        for target in targets[b]
        if target >= 0
    ]
    loss = mixture.last_state_loss(rows, states, items, baskets, targets)
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


def test_ranking_is_that_of_the_probabilities(case):
    mixture, states, items, baskets, valid, table = case
    normaliser = torch.logsumexp(states[:, -1] @ table.T, -1).float()
    mixture, states, table = mixture.float(), states.float(), table.float()
    k = V + 3
    scores, ids = mixture.rank(states, items, baskets, table, normaliser, k)
    for user in range(B):
        expected = probabilities(
            mixture.double(), states.double(), items, baskets, valid, table.double(), user, T - 1
        ).log()
        mixture.float()
        assert sorted(ids[user, :V].tolist()) == list(range(V))
        assert ids[user, V:].tolist() == [-1] * 3
        # float32 throughout against float64
        torch.testing.assert_close(scores[user, :V].double(), expected[ids[user, :V]], rtol=1e-4, atol=1e-5)
        assert (scores[user, :V].diff() <= 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ranking_is_the_same_under_autocast(case, dtype):
    mixture, states, items, baskets, _, table = case
    mixture, states, table = mixture.float(), states.float(), table.float()
    given = states, items, baskets, table, torch.logsumexp(states[:, -1] @ table.T, -1), V
    expected = mixture.rank(*given)
    with torch.autocast("cpu", dtype=dtype):
        found = mixture.rank(*given)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    half = mixture.to(dtype).rank(states.to(dtype), items, baskets, table.to(dtype), given[4], V)  # bf16-true
    assert half[1].shape == expected[1].shape


def test_untrained_pointer_is_the_frequency_of_each_item():
    mixture = RepeatMixture(D, n_items=V, see_own_basket=True)
    with torch.no_grad():
        mixture.decay.zero_()
        mixture.query.weight.zero_()
    items = torch.tensor([[V, 3, 3, 5, 3]])
    baskets = torch.tensor([[-1, 0, 1, 1, 2]])
    states = torch.zeros(1, 5, D)
    targets = torch.full((1, 5), -100)
    impossible = torch.full((1, 5), 80.0)  # e^-80: what the catalogue adds is far below float32
    for item, share in ((3, 3 / 4), (5, 1 / 4)):
        targets[0, -1] = item
        loss = mixture.loss(impossible, states, items, baskets, targets)
        assert torch.exp(-loss).item() == pytest.approx(0.5 * share, rel=1e-5)  # the gate starts at one half


def test_gradients_are_finite_where_nothing_can_be_copied():
    mixture = RepeatMixture(D, n_items=V, see_own_basket=False)
    states = torch.randn(2, 3, D, requires_grad=True)
    items = torch.tensor([[V, V, V], [V, 1, 2]])
    baskets = torch.tensor([[-1, -1, -1], [-1, 0, 1]])
    targets = torch.tensor([[-100, -100, -100], [-100, 9, 9]])
    loss = mixture.loss(states.sum(-1) ** 2, states, items, baskets, targets)
    loss.backward()
    assert states.grad.isfinite().all()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in mixture.parameters())
    nothing = mixture.loss(states.sum(-1) ** 2, states, items, baskets, torch.full((2, 3), -100))
    assert nothing.item() == 0.0
    nothing.backward()
    assert states.grad.isfinite().all()
