"""Objectives of event sequences against float64 loops, with gradients, padding and degenerate batches."""

import math

import numpy as np
import pytest
import torch

from lightning_modules.losses import CPC, CoLES, NextEvent, Supervised, recall_at

VOCABULARIES = [7, 4]
LENGTHS = [6, 1, 4, 6, 2]
D = 5
FACTS = {"d": D, "vocabulary_sizes": VOCABULARIES, "n_numeric": 2}
# float64 sums of at most some hundred numbers of order 1, in another order
EXACT = {"rtol": 0, "atol": 1e-12}
STEPWISE = {
    "event": lambda: NextEvent(**FACTS, weights=(5, 1)),
    "few classes": lambda: NextEvent(**FACTS, weights=(1, 3), max_classes=4),
    "cpc": lambda: CPC(**FACTS, n_steps_ahead=3, d_event=4),
}


def batch_of(lengths=LENGTHS, users=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths)
    return {
        "categorical": torch.stack([torch.randint(1, n, shape, generator=generator) for n in VOCABULARIES], -1),
        "numeric": torch.randn(*shape, 2, generator=generator, dtype=torch.float64),
        "times": torch.randint(1, 100, shape, generator=generator).cumsum(1),
        "mask": torch.arange(shape[1]) < torch.tensor(lengths)[:, None],
        "users": torch.arange(shape[0]) if users is None else torch.tensor(users),
    }


def poisoned(batch):
    padding = ~batch["mask"]
    return batch | {
        "categorical": batch["categorical"].masked_fill(padding.unsqueeze(-1), 10**6),
        "numeric": batch["numeric"].masked_fill(padding.unsqueeze(-1), torch.nan),
    }


def states_of(batch, width=D, seed=1):
    return torch.randn(*batch["mask"].shape, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_sum_exp(values):
    return math.log(sum(math.exp(value) for value in values))


def slow_coles(h, users, margin, n_negatives):
    """Costs of the positive pairs and of the chosen negative ones."""
    z = h / np.linalg.norm(h, axis=1, keepdims=True)
    positive, negative = [], []
    for i in range(len(z)):
        distances = [(np.linalg.norm(z[i] - z[j]), j) for j in range(len(z)) if users[j] != users[i]]
        negative += [max(0.0, margin - distance) ** 2 for distance, _ in sorted(distances)[:n_negatives]]
        positive += [np.linalg.norm(z[i] - z[j]) ** 2 for j in range(i + 1, len(z)) if users[j] == users[i]]
    return positive, negative


@pytest.mark.parametrize("users", [[0, 0, 0, 1, 1, 2, 2, 2, 2, 3], [4, 3, 4, 3, 4, 9, 9, 9, 9, 9]])
@pytest.mark.parametrize(("margin", "n_negatives"), [(0.5, 5), (1.5, 2), (1.5, 50)])
def test_coles_is_the_sum_over_pairs(users, margin, n_negatives):
    h = 2 + torch.randn(10, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # all within a cone
    batch = {"users": torch.tensor(users)}
    positive, negative = slow_coles(h.numpy(), users, margin, n_negatives)
    settings = {"margin": margin, "n_negatives": n_negatives}
    total = CoLES(**FACTS, **settings)(h, batch)
    torch.testing.assert_close(float(total), sum(positive) + sum(negative), **EXACT)
    costs = positive + negative
    mean = CoLES(**FACTS, **settings, reduction="mean")(h, batch)
    torch.testing.assert_close(float(mean), sum(costs) / len(costs), **EXACT)
    assert sum(negative) > 1e-3, "the margin must bite"


def test_coles_gradients_are_those_of_finite_differences():
    h = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    batch = {"users": torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])}
    # rounding 1e-16 over eps = 1e-6, and eps^2 times a third derivative below 1e3
    assert torch.autograd.gradcheck(lambda x: CoLES(**FACTS, margin=1.2)(x, batch), h, eps=1e-6, atol=1e-8, rtol=1e-5)


def test_coles_keeps_the_digits_of_close_pairs_and_survives_equal_slices():
    apart = 1e-5
    h = torch.tensor([[1.0, 0.0], [1.0, apart]])
    loss = CoLES(**FACTS)(h, {"users": torch.tensor([0, 0])})
    # float32 rounding of a number computed without cancellation; 2 - 2 cos would be 0
    torch.testing.assert_close(float(loss), apart**2, rtol=1e-5, atol=0)
    same = torch.ones(4, 3, requires_grad=True)
    loss = CoLES(**FACTS)(same, {"users": torch.tensor([0, 0, 1, 1])})
    loss.backward()
    torch.testing.assert_close(float(loss.detach()), 4 * 2 * 0.5**2, rtol=1e-6, atol=0)  # float32 rounding
    assert same.grad.isfinite().all()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_coles_without_pairs_is_zero(reduction):
    h = torch.randn(1, D, requires_grad=True)
    loss = CoLES(**FACTS, reduction=reduction)(h, {"users": torch.tensor([3])})
    loss.backward()
    assert float(loss.detach()) == 0
    assert not h.grad.any()


@pytest.mark.parametrize("k", [1, 3, 4, 20])
def test_recall_counts_the_nearest_slices(k):
    random = np.random.default_rng(0)
    users = random.integers(6, size=25)
    users[0] = 17  # has no other slice
    h = random.normal(size=(25, 3))
    shares = []
    for i in range(25):
        cosine = {j: h[i] @ h[j] / np.linalg.norm(h[i]) / np.linalg.norm(h[j]) for j in range(25) if j != i}
        nearest = sorted(cosine, key=cosine.get, reverse=True)[:k]
        others = [j for j in cosine if users[j] == users[i]]
        if others:
            shares.append(len(set(nearest) & set(others)) / len(others))
    found = recall_at(torch.from_numpy(h), torch.from_numpy(users), k)
    torch.testing.assert_close(found, float(np.mean(shares)), **EXACT)


def test_recall_of_perfect_embeddings_is_one():
    users = torch.arange(6).repeat_interleave(5)
    assert recall_at(torch.eye(6)[users] + 1e-3 * torch.rand(30, 6), users, 4) == 1
    # all but itself: every slice is among the nearest
    assert recall_at(torch.randn(30, 6), users, 29) == 1
    with pytest.raises(ValueError, match="recall needs a user with at least two slices, got 3"):
        recall_at(torch.eye(3), torch.arange(3))
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        recall_at(torch.eye(3), torch.zeros(3), 0)


@pytest.mark.parametrize(
    ("weights", "max_classes", "n_categorical", "n_numeric"),
    [((5, 1), None, 2, 2), ((1, 5), 4, 2, 1), ((5, 1), None, 0, 2), ((5, 1), 3, 1, 0), ((0, 1), None, 2, 2)],
)
def test_next_event_is_the_weighted_mean_over_steps(weights, max_classes, n_categorical, n_numeric):
    torch.manual_seed(0)
    vocabularies = VOCABULARIES[:n_categorical]
    objective = NextEvent(
        d=D, vocabulary_sizes=vocabularies, n_numeric=n_numeric, weights=weights, max_classes=max_classes
    ).double()
    batch = batch_of()
    batch |= {"categorical": batch["categorical"][..., :n_categorical], "numeric": batch["numeric"][..., :n_numeric]}
    states = states_of(batch)
    entropies, squares = [[] for _ in vocabularies], []
    for row, length in enumerate(LENGTHS):
        for step in range(length - 1):
            for feature, head in enumerate(objective.class_heads):
                logits = head(states[row, step]).tolist()
                target = min(int(batch["categorical"][row, step + 1, feature]), len(logits) - 1)
                entropies[feature].append(log_sum_exp(logits) - logits[target])
            if n_numeric:
                error = objective.numeric_head(states[row, step]) - batch["numeric"][row, step + 1]
                squares += error.square().tolist()
    w_c, w_m = weights[0] * bool(vocabularies), weights[1] * bool(n_numeric)
    expected = w_c * np.mean([np.mean(one) for one in entropies]) if w_c else 0.0
    expected += w_m * np.mean(squares) if w_m else 0.0
    torch.testing.assert_close(float(objective(states, batch).detach()), float(expected / (w_c + w_m)), **EXACT)
    assert [head.out_features for head in objective.class_heads] == [min(n, max_classes or n) for n in vocabularies]


def test_an_unknown_category_is_a_target_only_where_training_had_one():
    batch = batch_of()
    assert bool((batch["categorical"] == 1).any())
    known = batch | {"categorical": batch["categorical"].clamp(min=2)}
    h, objective = states_of(batch), NextEvent(**FACTS, weights=(1, 0)).double().requires_grad_(False)
    objective(h, known)  # training
    objective.eval()
    assert not bool(objective.met_unknown.any())
    targets = (batch["mask"][:, 1:] & batch["mask"][:, :-1]).unsqueeze(-1) & (batch["categorical"][:, 1:] != 1)
    expected = 0.0
    for feature, head in enumerate(objective.class_heads):
        kept = targets[..., feature]
        logits = head(h[:, :-1][kept])
        expected += torch.nn.functional.cross_entropy(logits, batch["categorical"][:, 1:, feature][kept]).item() / 2
    torch.testing.assert_close(float(objective(h, batch)), expected, **EXACT)
    nothing = batch | {"categorical": torch.ones_like(batch["categorical"])}
    assert float(objective(h, nothing)) == 0.0, "no target is left"
    objective.train()
    in_training = float(objective(h, batch))
    assert bool(objective.met_unknown.all())
    objective.eval()
    torch.testing.assert_close(float(objective(h, batch)), in_training, **EXACT)


def test_with_two_classes_known_categories_are_targets_in_evaluation():
    """Both they and the unknown one count as class 1; the unknown id alone is left out."""
    batch = batch_of()
    h, objective = states_of(batch), NextEvent(**FACTS, weights=(1, 0), max_classes=2).double().eval()
    assert not bool(objective.met_unknown.any())
    targets = (batch["mask"][:, 1:] & batch["mask"][:, :-1]).unsqueeze(-1) & (batch["categorical"][:, 1:] != 1)
    expected = 0.0
    for feature, head in enumerate(objective.class_heads):
        logits = head(h[:, :-1][targets[..., feature]])
        expected += torch.nn.functional.softplus(logits[:, 0] - logits[:, 1]).mean().item() / 2
    torch.testing.assert_close(float(objective(h, batch).detach()), expected, **EXACT)


def test_context_of_a_step_is_looked_up_at_its_event_or_at_the_next_one():
    batch = batch_of([3, 1, 2])
    times = batch["times"].tolist()
    at_event, counts = NextEvent(**FACTS).query_times(batch)
    at_target, same = NextEvent(**FACTS, at="target").query_times(batch)
    assert counts.tolist() == same.tolist() == [[True, True, False], [False] * 3, [True, False, False]]
    assert at_event.tolist() == times
    assert at_event.dtype == at_target.dtype == torch.int64
    assert at_target[counts].tolist() == [times[0][1], times[0][2], times[2][1]]
    assert CPC(**FACTS).query_times(batch)[1].tolist() == counts.tolist()


@pytest.mark.parametrize("users", [[0, 1, 2, 3, 4], [0, 1, 0, 3, 0]])
@pytest.mark.parametrize(("group_size", "groups"), [(5, [0, 0, 0, 0, 0]), (4, [0, 0, 0, 1, 1]), (2, [0, 0, 1, 1, 2])])
def test_cpc_is_cross_entropy_among_the_events_of_others_at_the_same_step(users, group_size, groups):
    torch.manual_seed(0)
    objective = CPC(**FACTS, n_steps_ahead=3, d_event=4, group_size=group_size).double()
    batch = batch_of(users=users)
    states = states_of(batch)
    events = objective.event(objective.embedding(batch)).detach().numpy()
    costs = []
    for ahead, predictor in enumerate(objective.predictors, start=1):
        weight = predictor.weight.detach().numpy()
        for row, length in enumerate(LENGTHS):
            for step in range(length - ahead):
                predicted = weight @ states[row, step].numpy() / 2  # sqrt(4)
                others = [
                    j
                    for j, n in enumerate(LENGTHS)
                    if n > step + ahead and users[j] != users[row] and groups[j] == groups[row]
                ]
                own = predicted @ events[row, step + ahead]
                scores = [own, *(predicted @ events[j, step + ahead] for j in others)]
                if others:
                    costs.append(log_sum_exp(scores) - own)
    torch.testing.assert_close(float(objective(states, batch).detach()), float(np.mean(costs)), **EXACT)


@pytest.mark.parametrize("name", STEPWISE)
def test_stepwise_gradients_are_those_of_finite_differences(name):
    torch.manual_seed(0)
    objective = STEPWISE[name]().double().eval()  # batch statistics in evaluation do not depend on the order of calls
    batch = batch_of([4, 1, 3])
    states = states_of(batch).requires_grad_()
    # rounding 1e-16 over eps = 1e-6, and eps^2 times a third derivative below 1e3
    assert torch.autograd.gradcheck(lambda x: objective(x, batch), states, eps=1e-6, atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize("name", STEPWISE)
def test_padding_reaches_neither_loss_nor_gradients(name):
    torch.manual_seed(0)
    objective = STEPWISE[name]().double()
    batch = batch_of()
    results = []
    for one, fill in ((batch, 0.0), (poisoned(batch), torch.nan)):
        objective.zero_grad()
        states = states_of(batch).masked_fill(~batch["mask"].unsqueeze(-1), fill).requires_grad_()
        loss = objective(states, one)
        loss.backward()
        results.append([loss.detach(), states.grad, *(p.grad for p in objective.parameters())])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
    assert not results[0][1][~batch["mask"]].any()


@pytest.mark.parametrize("name", STEPWISE)
@pytest.mark.parametrize("lengths", [[1, 1, 1], [1]])
def test_sequences_of_one_event_have_nothing_to_predict(name, lengths):
    objective = STEPWISE[name]().double().eval()
    states = states_of(batch_of(lengths)).requires_grad_()
    loss = objective(states, batch_of(lengths))
    loss.backward()
    assert float(loss.detach()) == 0
    assert not states.grad.any()


@pytest.mark.parametrize("name", [*STEPWISE, "coles", "coles_mean", "supervised"])
@pytest.mark.parametrize("n_rows", [4, 1])
def test_padding_rows_are_no_rows(name, n_rows):
    torch.manual_seed(0)
    other = {
        "coles": lambda: CoLES(**FACTS, margin=1.5),
        "coles_mean": lambda: CoLES(**FACTS, margin=1.5, reduction="mean"),
        "supervised": lambda: Supervised(**FACTS, n_classes=3),
    }
    objective = (STEPWISE | other)[name]().double()
    batch = batch_of(LENGTHS[:n_rows], users=[0, 1, 0, 2][:n_rows]) | {"labels": torch.arange(n_rows) % 3}
    filled = {key: torch.cat([value, value[:1], value[:1]]) for key, value in batch.items()}
    filled["mask"][n_rows:], filled["users"][n_rows:], filled["labels"][n_rows:] = False, -1, -100
    losses, gradients = [], []
    for one in (batch, filled):
        states = torch.cat([states_of(batch)] + [states_of(batch)[:1]] * 2)[: len(one["mask"])].requires_grad_()
        loss = objective(states if objective.needs == "steps" else states[:, 0], one)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(states.grad)
    torch.testing.assert_close(losses[1], losses[0], **EXACT)
    torch.testing.assert_close(gradients[1][:n_rows], gradients[0], **EXACT)
    assert not gradients[1][n_rows:].any()


def test_rows_without_any_label_cost_nothing():
    objective, h = Supervised(**FACTS), torch.randn(2, D, requires_grad=True)
    loss = objective(h, {"labels": torch.tensor([-100, -100])})
    loss.backward()
    assert float(loss.detach()) == 0
    assert not h.grad.any()


def test_supervised_is_cross_entropy_of_a_linear_head():
    torch.manual_seed(0)
    objective = Supervised(**FACTS, n_classes=3).double()
    h, labels = torch.randn(4, D, dtype=torch.float64), [2, 0, 1, 1]
    logits = (h @ objective.head.weight.T + objective.head.bias).tolist()
    expected = np.mean([log_sum_exp(row) - row[label] for row, label in zip(logits, labels, strict=True)])
    torch.testing.assert_close(float(objective(h, {"labels": torch.tensor(labels)}).detach()), float(expected), **EXACT)
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=rf"labels must be in 0\.\.2, got {wrong}"):
            objective(h[:2], {"labels": torch.tensor([0, wrong])})
    with pytest.raises(ValueError, match="batches with labels, got users, mask"):
        objective(h, {"users": torch.zeros(4), "mask": torch.ones(4, 1)})


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (CoLES, {"margin": 0.0}, "margin must be above 0 and at most 2, got 0.0"),
        (CoLES, {"n_negatives": 0}, "n_negatives must be at least 1, got 0"),
        (CoLES, {"reduction": "none"}, "reduction must be 'sum' or 'mean', got 'none'"),
        (NextEvent, {"weights": (0, 0)}, r"weights must be at least 0.*got \(0, 0\)"),
        (NextEvent, {"weights": (2, -1)}, r"weights must be at least 0.*got \(2, -1\)"),
        (NextEvent, {"weights": (0, 1), "n_numeric": 0}, "for 2 categorical and 0 numeric features"),
        (NextEvent, {"max_classes": 1}, "max_classes must be at least 2 .* got 1"),
        (NextEvent, {"at": "now"}, "at must be 'event' or 'target', got 'now'"),
        (CPC, {"n_steps_ahead": 0}, "n_steps_ahead must be at least 1, got 0"),
        (CPC, {"group_size": 1}, "group_size must be at least 2, got 1"),
        (CPC, {"d_event": 0}, "d_event must be at least 1, got 0"),
        (Supervised, {"n_classes": 1}, "n_classes must be at least 2, got 1"),
        (Supervised, {"d": 0}, "d must be at least 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**FACTS | arguments)
