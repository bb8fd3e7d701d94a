import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.functional import cross_entropy as torch_cross_entropy

from lightning_modules.attacks import cross_entropy, decisions, dlr, logit_margin


@pytest.fixture
def many():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(50, 4, generator=generator, dtype=torch.float64) * 5, torch.arange(50) % 4


def test_cross_entropy_equals_torch_and_two_logits_equal_one(many):
    logits, labels = many
    expected = torch_cross_entropy(logits, labels, reduction="none")
    # float64 rounding of another order of operations on numbers below 30
    torch.testing.assert_close(cross_entropy(logits, labels), expected, rtol=0, atol=1e-13)
    binary, answers = logits[:, :1], labels % 2
    expected = binary_cross_entropy_with_logits(binary[:, 0], answers.double(), reduction="none")
    torch.testing.assert_close(cross_entropy(binary, answers), expected, rtol=0, atol=1e-13)
    pair = torch.cat([torch.zeros_like(binary), binary], dim=1)
    for loss in (cross_entropy, logit_margin, dlr):
        torch.testing.assert_close(loss(pair, answers), loss(binary, answers), rtol=0, atol=1e-13)
    assert torch.equal(decisions(pair), decisions(binary))


def test_margin_and_dlr_by_loops(many):
    logits, labels = many
    for row, label, margin, ratio in zip(
        logits, labels, logit_margin(logits, labels), dlr(logits, labels), strict=True
    ):
        others = [value for j, value in enumerate(row.tolist()) if j != label]
        ordered = sorted(row.tolist(), reverse=True)
        difference = max(others) - row[label].item()
        assert margin.item() == difference
        # the reference adds 1e-12 to a gap of order 1
        assert ratio.item() == pytest.approx(difference / (ordered[0] - ordered[2]), rel=1e-10)


def test_dlr_is_free_of_shift_and_scale(many):
    logits, labels = many
    # float64 rounding of the shift by 7 against gaps of order 1
    torch.testing.assert_close(dlr(logits * 30 + 7, labels), dlr(logits, labels), rtol=1e-9, atol=0)
    assert dlr(torch.zeros(2, 3), torch.tensor([0, 1])).tolist() == [0.0, 0.0]


def test_confident_classes_keep_their_gradient():
    """T3: the fused form gives exactly 0 above a margin of about 17 in float32."""
    for logits, labels in (
        (torch.tensor([[80.0], [40.0]]), torch.tensor([1, 1])),
        (torch.tensor([[80.0, 0.0, -5.0], [0.0, 40.0, 1.0]]), torch.tensor([0, 1])),
    ):
        logits.requires_grad_()
        (slope,) = torch.autograd.grad(cross_entropy(logits, labels).sum(), logits)
        own = slope[:, 0] if slope.shape[1] == 1 else slope.gather(1, labels[:, None])[:, 0]
        assert (own < 0).all()
    extreme = torch.tensor([[200.0], [-200.0]], requires_grad=True)
    (slope,) = torch.autograd.grad(cross_entropy(extreme, torch.tensor([1, 1])).sum(), extreme)
    assert slope.isfinite().all()


def test_a_whole_trajectory_passes_at_once(many):
    logits, labels = many
    trajectory = torch.stack([logits, -logits])
    for loss in (cross_entropy, logit_margin, dlr):
        # float64 rounding of vector and scalar code paths
        torch.testing.assert_close(loss(trajectory, labels)[1], loss(-logits, labels), rtol=1e-14, atol=0)
    assert decisions(trajectory).shape == (2, 50)
    assert decisions(torch.tensor([[0.0], [-1e-9]])).tolist() == [1, 0]


def test_shapes_that_do_not_match_end_in_one_line(many):
    logits, labels = many
    with pytest.raises(ValueError, match=r"labels of shape \(49,\) do not match logits of shape \(50, 4\)"):
        cross_entropy(logits, labels[1:])
    with pytest.raises(ValueError, match="add the last axis"):
        decisions(torch.zeros(5, 0))
