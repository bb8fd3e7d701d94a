"""How well a classifier still ranks attacked series, and what share of the gradients of an attack was of no use.

n series, K classes, K' logits: 1 for two classes (of class 1), else K. "..." stands for any leading axes. Accuracy and
F1 are in :mod:`lightning_modules.metrics.attack_functional`; results are float64 as there.
Source: spec of arXiv 2502.20948, section 9 (ROC, PR, gradient-NaN/zero rate); one against the rest for K > 2 is ours.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_modules.metrics.attack_functional import average_precision, detector_auc


def class_log_odds(logits: Tensor) -> Tensor:
    """``log p_k - log (1 - p_k)`` of each class that is ranked: of class 1 alone for K = 2, of every class for K > 2.

        K' = 1: z        K' = 2: z_1 - z_0        K' > 2: z_k - log sum_{j != k} exp z_j

    It orders series as the probability does, without the ties of a confident one: softmax is 1 above a lead of 37.

    Args:
        logits: ``(..., n, K') float``.

    Returns:
        ``(..., n, 1)`` for K = 2, else ``(..., n, K)``, float64; NaN where a logit is.

    Raises:
        ValueError: If there are not two axes or there is no logit.
    """
    if logits.ndim < 2 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be (..., n, K'), K' at least 1, got shape {tuple(logits.shape)}")
    # Finite, so that no infinity is taken from another.
    z = logits.double().clamp(-1e300, 1e300)
    n_logits = z.shape[-1]
    if n_logits == 1:
        return z
    own = torch.eye(n_logits, dtype=torch.bool, device=z.device)
    odds = z - z[..., None, :].masked_fill(own, -torch.inf).logsumexp(-1)
    return odds[..., 1:] if n_logits == 2 else odds


def one_against_rest(log_odds: Tensor, labels: Tensor, measure: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Mean of ``measure(scores of the others, scores of the class)`` over the classes of which there are series.

    Args:
        log_odds: ``(..., n, 1)`` or ``(..., n, K) float``, as :func:`class_log_odds` gives them.
        labels: ``(n,) int64`` in 0..K-1.
        measure: Of ``(..., m)`` and ``(..., n - m)`` scores, NaN where it is not defined: such classes are left out.

    Returns:
        ``(...) float64``; NaN where no class has a value or a series no score.

    Raises:
        ValueError: If the numbers of series differ or a class number is not in 0..K-1.
    """
    if labels.ndim != 1 or len(labels) != log_odds.shape[-2]:
        raise ValueError(
            f"labels must be (n,) of the n = {log_odds.shape[-2]} series of the logits, got shape {tuple(labels.shape)}"
        )
    classes = range(log_odds.shape[-1]) if log_odds.shape[-1] > 1 else [1]
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= classes[-1]:
        raise ValueError(f"labels must lie in 0..{classes[-1]}, got {int(labels.min())}..{int(labels.max())}")
    if bool(log_odds.isnan().any()):
        return torch.full(log_odds.shape[:-2], torch.nan, dtype=torch.float64, device=log_odds.device)
    values = [
        measure(log_odds[..., labels != number, column], log_odds[..., labels == number, column])
        for column, number in enumerate(classes)
    ]
    return torch.stack(values, -1).nanmean(-1)


def classifier_auc(logits: Tensor, labels: Tensor) -> Tensor:
    """ROC: area under the ROC curve of the classifier; of class 1 for K = 2, one-vs-rest macro for K > 2.

    Args:
        logits: ``(..., n, K') float``.
        labels: ``(n,) int64``.

    Returns:
        ``(...) float64``: the mean over classes of which some series are and some are not; NaN without one, or if a
        logit is NaN.

    Raises:
        ValueError: As :func:`class_log_odds` and :func:`one_against_rest`.
    """
    return one_against_rest(class_log_odds(logits), labels, detector_auc)


def classifier_average_precision(logits: Tensor, labels: Tensor) -> Tensor:
    """PR: average precision (:func:`~lightning_modules.metrics.attack_functional.average_precision`) of the classifier.

    Of class 1 for K = 2, one-vs-rest macro for K > 2. Arguments, shapes and errors as :func:`classifier_auc`; a class
    without series is left out.
    """
    return one_against_rest(class_log_odds(logits), labels, average_precision)


def gradient_rate(n_found: Tensor, n_gradients: int) -> Tensor:
    """Share of the gradients of an attack that were bad (NaN or infinite somewhere), or zero.

        rate = sum n_found / (n n_gradients)

    Args:
        n_found: ``(..., n) int64`` such gradients of each series.
        n_gradients: Gradients taken for each series.

    Returns:
        ``(...) float64``; NaN where none was taken.

    Raises:
        ValueError: If a count lies outside 0..n_gradients.
    """
    if n_found.numel() and not 0 <= int(n_found.min()) <= int(n_found.max()) <= n_gradients:
        raise ValueError(
            f"counts must lie in 0..{n_gradients}, the gradients of a series, got {int(n_found.min())}.."
            f"{int(n_found.max())}"
        )
    return n_found.sum(-1).double() / (n_found.shape[-1] * n_gradients or torch.nan)
