"""Every bad argument ends in one line that says what was received and what is allowed."""

import pytest
import torch

from kernels.cce_minus import Proposal, cce_minus_loss, cce_minus_negatives

V, D = 6, 4


def call(**changes):
    arguments = {
        "hidden": torch.zeros(2, 3, D),
        "item_embeddings": torch.zeros(V, D),
        "targets": torch.tensor([[0, 1, -100], [2, 3, 4]]),
        "n_negatives": 3,
        "seed": 1,
    } | changes
    return cce_minus_loss(**arguments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_negatives": 0}, "n_negatives must be at least 1, got 0"),
        ({"n_negatives": -2}, "n_negatives must be at least 1, got -2"),
        ({"n_negatives": 2.5}, "n_negatives must be an int below 2^31, got 2.5"),
        ({"n_negatives": True}, "got True"),
        ({"n_negatives": "some"}, "got 'some'"),
        ({"n_negatives": 2**31}, "below 2^31"),
        ({"n_negatives": "all", "negatives": torch.zeros(5, 2, dtype=torch.int64)}, "pass one of the two"),
        ({"n_negatives": "all", "log_q": Proposal.uniform(V)}, "no log_q to correct for"),
        ({"hidden": torch.zeros(2, 3, D, dtype=torch.int64)}, "hidden must be floating point"),
        ({"hidden": torch.tensor(0.0)}, "hidden must be floating point of shape (..., D), got float32 of shape ()"),
        ({"hidden": torch.zeros(2, 3, D + 1)}, "hidden must have the width D of item_embeddings, 4, got 5"),
        ({"item_embeddings": torch.zeros(V)}, "item_embeddings must be floating point of shape (V, D)"),
        ({"item_embeddings": torch.zeros(1, D)}, "must lie in [2, 2^31), got 1"),
        ({"item_embeddings": torch.zeros(V, D, device="meta")}, "item_embeddings must lie on the device"),
        ({"targets": torch.zeros(2, 2, dtype=torch.int64)}, "targets must have shape (2, 3), got (2, 2)"),
        ({"targets": torch.zeros(2, 3)}, "targets must be int32 or int64, got torch.float32"),
        ({"targets": torch.tensor([[0, 1, 2], [3, V, 0]])}, "equal ignore_index -100, got 6 at (1, 1)"),
        ({"targets": torch.tensor([[0, 1, 2], [3, 0, -1]])}, "got -1 at (1, 2)"),
        ({"weight": torch.zeros(3)}, "weight must be floating point of shape (2, 3), got float32 of shape (3,)"),
        ({"weight": torch.zeros(2, 3, dtype=torch.int64)}, "got int64"),
        ({"sharing": "sequence"}, "sharing must be one of 'position', 'tile', 'batch', got 'sequence'"),
        ({"tile_size": 0}, "tile_size must be an int of at least 1, got 0"),
        (
            {"correction": "logQ"},
            "correction must be one of 'logq', 'none', 'improved_logq', 'classic_logq', got 'logQ'",
        ),
        ({"reduction": "avg"}, "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
        ({"seed": 1.5}, "seed must be an int"),
        ({"seed": 2**63}, "got 9223372036854775808"),
        ({"seed": torch.tensor([1])}, "0-d int64 tensor, got int64 of shape (1,)"),
        ({"step": torch.tensor(1.0)}, "step must be an int or a 0-d int64 tensor, got float32 of shape ()"),
        ({"rank": -1}, "rank must be an int in [0, 4294967295]"),
        ({"negatives": torch.zeros(5, 2)}, "negatives must be int32 or int64, got torch.float32"),
        ({"negatives": torch.zeros(6, 2, dtype=torch.int64)}, "shape (5, K) with K at least 1"),
        ({"negatives": torch.zeros(5, 0, dtype=torch.int64)}, "got (5, 0)"),
        ({"negatives": torch.zeros(5, dtype=torch.int64)}, "got (5,)"),
        (
            {"negatives": torch.zeros(5, 2, dtype=torch.int64), "sharing": "tile", "tile_size": 2},
            "shape (3, K) with K at least 1 for sharing='tile' and 5 kept positions, got (5, 2)",
        ),
        ({"negatives": torch.zeros(1, 2, dtype=torch.int64), "sharing": "batch"}, "shape (K,)"),
        (
            {"negatives": torch.tensor([[0, 1], [1, 2], [2, V], [0, 0], [0, 0]])},
            "negatives must lie in [0, 6), got 6 at row 2, column 1",
        ),
        ({"negatives": torch.full((5, 2), -1)}, "got -1 at row 0, column 0"),
        ({"log_q": torch.zeros(V)}, "log_q must be a Proposal where negatives are drawn"),
        ({"log_q": Proposal.uniform(V + 1)}, "log_q must be floating point of shape (6,), got float32 of shape (7,)"),
        (
            {"log_q": Proposal.uniform(V).to("meta")},
            "log_q must lie on the device of hidden and targets, cpu, got meta",
        ),
    ],
)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_bad_arguments_end_in_one_line(changes, words, impl):
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- the words are compared below, literally
        call(impl=impl, **changes)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"impl": "cuda"}, "impl must be one of 'auto', 'reference', 'torch', 'triton', got 'cuda'"),
        (
            {"impl": "triton"},
            "impl='triton' takes CUDA tensors, and CPU tensors only where TRITON_INTERPRET=1 is set, got cpu",
        ),
        (
            {"impl": "triton", "hidden": torch.zeros(2, 3, D, dtype=torch.float64)},
            "impl='triton' computes in float32, got float64: use 'torch' or 'reference'",
        ),
        ({"deterministic": 1}, "deterministic must be None, True or False, got 1"),
    ],
)
def test_a_path_that_cannot_run_ends_in_one_line(changes, words, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- the words are compared below, literally
        call(**changes)
    assert str(error.value) == words


@pytest.mark.parametrize(
    ("log_q", "words"),
    [
        (torch.full((V,), -1.0), "log_q must be normalised to within 1e-4, got probabilities summing to exp(0.791759)"),
        (torch.full((V,), float("nan")), "log_q must be normalised"),
        (torch.full((V,), float("inf")), "log_q must be normalised"),
        (torch.full((V,), -float("inf")), "log_q must be normalised"),
        (torch.zeros(V, dtype=torch.int64), "log_q must be floating point"),
        ([0.0] * V, "log_q must be None, a Proposal or a tensor, got list"),
        (torch.tensor([0.5, 0.5, 0, 0, 0, 0]).log(), "got item 2 at row 4, column 1"),
        (Proposal.from_probabilities(torch.tensor([0.5, 0.5, 0, 0, 0, 0])), "got item 2 at row 4, column 1"),
    ],
    ids=["unnormalised", "nan", "inf", "zero", "ints", "list", "impossible", "impossible proposal"],
)
def test_a_bad_correction_of_given_negatives_ends_in_one_line(log_q, words):
    negatives = torch.tensor([[0, 1], [1, 0], [0, 0], [0, 0], [0, 2]])
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- the words are compared below, literally
        call(negatives=negatives, log_q=log_q)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_impossible_negatives_need_no_probability_without_a_correction():
    log_q = torch.tensor([0.5, 0.5, 0, 0, 0, 0]).log()
    assert call(negatives=torch.full((5, 2), 5), log_q=log_q, correction="none") > 0


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_target_of_zero_probability_cannot_be_corrected(impl):
    proposal = Proposal.from_probabilities(torch.tensor([1.0, 1, 1, 0, 1, 1]))
    words = "targets must have positive probability under log_q, got item 3 at kept position 3"
    with pytest.raises(ValueError, match=words):
        call(log_q=proposal, correction="classic_logq", impl=impl)
    assert bool(call(log_q=proposal, impl=impl).isfinite())


def test_the_normalisation_of_a_correction_is_checked_to_1e_4():
    with pytest.raises(ValueError, match="normalised to within 1e-4"):
        call(negatives=torch.full((5, 2), 5), log_q=torch.full((V,), 1 / V * (1 - 3e-4)).log())
    assert call(negatives=torch.full((5, 2), 5), log_q=torch.full((V,), 1 / V * (1 + 1e-5)).log()) > 0


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Proposal.uniform(1), "vector of 2 to 2^31 - 1 numbers, got shape (1,)"),
        (lambda: Proposal.from_probabilities(torch.ones(2, 2)), "got shape (2, 2)"),
        (lambda: Proposal.from_probabilities(torch.tensor([1.0, -1.0])), "got -1.0 for item 1"),
        (lambda: Proposal.from_probabilities(torch.tensor([float("nan"), 1.0])), "got nan for item 0"),
        (lambda: Proposal.from_probabilities(torch.tensor([1.0, float("inf")])), "got inf for item 1"),
        (lambda: Proposal.popularity(torch.zeros(3, dtype=torch.int64)), "positive sum"),
        (lambda: Proposal.mixture([], []), "one weight per proposal, got 0 and 0"),
        (lambda: Proposal.mixture([Proposal.uniform(3)], [1.0, 2.0]), "got 1 and 2"),
        (lambda: Proposal.mixture([Proposal.uniform(3)], [-1.0]), "non-negative, got -1.0"),
        (lambda: Proposal.mixture([Proposal.uniform(3), Proposal.uniform(4)], [1, 1]), "n_items of [3, 4]"),
    ],
)
def test_bad_proposals_end_in_one_line(build, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- the words are compared below, literally
        build()
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_items": 1}, "must lie in [2, 2^31), got 1"),
        ({"n_items": 2.0}, "got 2.0"),
        ({"n_negatives": 0}, "n_negatives must be at least 1, got 0"),
        ({"n_negatives": "all"}, "got 'all'"),
        ({"sharing": "row"}, "got 'row'"),
        ({"log_q": torch.zeros(5)}, "log_q must be a Proposal"),
        ({"targets": torch.tensor([7])}, "targets must lie in [0, 5)"),
    ],
)
def test_bad_draws_end_in_one_line(changes, words):
    arguments = {"targets": torch.tensor([0, 1]), "n_items": 5, "seed": 1} | changes
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- the words are compared below, literally
        cce_minus_negatives(**arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
