"""Losses of a classifier, one value a series, and its decisions, all from logits.

B series, K classes. A binary classifier emits one logit ``z`` (positive class 1), any other K. Every function takes
leading axes, so that a whole trajectory ``(N + 1, B, K')`` passes at once. Losses grow as the classifier errs: an
attack maximises them.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

ClassLoss = Callable[[Tensor, Tensor], Tensor]
"""``(logits (..., K'), labels (...)) -> (...)``."""

TINY_GAP = 1e-12
"""Keeps DLR finite where all logits are equal (as in the reference of Croce and Hein)."""


def softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))``; torch's own returns ``x`` from 20 on, which float64 can tell apart, this one from 40 on."""
    return torch.nn.functional.softplus(x, threshold=40.0)


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(
            f"logits must have shape (..., 1) or (..., n_classes), got {tuple(logits.shape)}: add the last axis"
        )
    if logits.shape[:-1][-labels.ndim :] != labels.shape and labels.ndim > 0:
        raise ValueError(f"labels of shape {tuple(labels.shape)} do not match logits of shape {tuple(logits.shape)}")


def decisions(logits: Tensor) -> Tensor:
    """Class decided for each series: ``z >= 0`` (probability at least 0.5) for one logit, else the largest logit.

    Args:
        logits: ``(..., 1)`` or ``(..., K) float``.

    Returns:
        ``(...) int64``; the first of equal logits wins.

    Raises:
        ValueError: If the last axis is missing or empty.
    """
    _check(logits, logits.new_zeros(()))
    if logits.shape[-1] == 1:
        return (logits[..., 0] >= 0).long()
    return logits.argmax(dim=-1)


def _others_above_label(logits: Tensor, labels: Tensor) -> Tensor:
    """``z_j - z_y`` for every class j, ``-inf`` at j = y: ``(..., K)``."""
    labels = labels.expand(logits.shape[:-1])
    own = logits.gather(-1, labels[..., None])
    return (logits - own).masked_fill(one_hot(labels, logits.shape[-1]).bool(), -torch.inf)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy ``-log p_y`` as ``softplus(log sum_{j != y} exp(z_j - z_y))``; one logit: ``softplus((1 - 2y) z)``.

    The usual gradient ``p - onehot`` is exactly 0 in float32 for a confident true class (margin above about 17);
    this form keeps it until ``exp`` underflows near a margin of 100.

    Args:
        logits: ``(..., 1)`` or ``(..., K) float``.
        labels: ``(...) int64`` in 0..K-1, or without the leading axes.

    Returns:
        ``(...) float``, in nats, at least 0.

    Raises:
        ValueError: If the shapes do not match.

    Source: spec of the concealed attack, section 3 and trap T3.
    """
    _check(logits, labels)
    if logits.shape[-1] == 1:
        return softplus((1 - 2 * labels) * logits[..., 0])
    return softplus(_others_above_label(logits, labels).logsumexp(dim=-1))


def logit_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Margin ``max_{j != y} z_j - z_y``; one logit: ``(1 - 2y) z``. Positive where the classifier errs.

    Its gradient does not shrink with the classifier's confidence, whatever the scale of the logits.

    Args:
        logits: ``(..., 1)`` or ``(..., K) float``.
        labels: ``(...) int64`` in 0..K-1, or without the leading axes.

    Returns:
        ``(...) float``, in units of the logits.

    Raises:
        ValueError: If the shapes do not match.

    Source: N. Carlini and D. Wagner, arXiv 1608.04644, ``f_6`` without its clamp.
    """
    _check(logits, labels)
    if logits.shape[-1] == 1:
        return (1 - 2 * labels) * logits[..., 0]
    return _others_above_label(logits, labels).amax(dim=-1)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio ``(max_{j != y} z_j - z_y) / (z_(1) - z_(3))``, ``z_(i)`` the i-th largest logit.

    It does not change when all logits are shifted or multiplied by a positive number. Two classes have no third
    logit: there the loss is the margin, of which sign steps and unit steps are free of scale as well.

    Args:
        logits: ``(..., 1)`` or ``(..., K) float``.
        labels: ``(...) int64`` in 0..K-1, or without the leading axes.

    Returns:
        ``(...) float``, without unit for K > 2.

    Raises:
        ValueError: If the shapes do not match.

    Source: F. Croce and M. Hein, arXiv 2003.01690, equation 6; the case of two classes is ours.
    """
    margin = logit_margin(logits, labels)
    if logits.shape[-1] <= 2:
        return margin
    largest = logits.topk(3, dim=-1).values
    return margin / (largest[..., 0] - largest[..., 2] + TINY_GAP)


CLASS_LOSSES: dict[str, ClassLoss] = {"cross_entropy": cross_entropy, "margin": logit_margin, "dlr": dlr}
"""Class losses by the name an objective takes."""
