"""How well probabilities rank and fit, with a bootstrap over users that all arms of a comparison share.

Q queries, U users, K classes, S resamples. Drawing users with replacement gives each query a weight, the number of
times its user was drawn; every measure here is a weighted one, read under many columns of weights from one sort.
Source: arXiv 2502.10205 (ROC-AUC, PR-AUC, accuracy; with several classes one against the rest, weighted by class
frequency); tied scores as in J. A. Hanley and B. J. McNeil, Radiology 143 (1982).
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]

MEASURES = ("roc_auc", "pr_auc", "accuracy", "log_loss")
"""All but the last are better when larger."""

RESAMPLES_AT_A_TIME = 24
"""Columns of weights held together: few, so that with 20,000 queries they stay in the cache between two passes."""

SMALLEST_PROBABILITY = 1e-15
"""Probabilities are clipped to this before a logarithm is taken, so that one sure mistake costs 34.5."""


class _Ranking:
    """The order of one column of scores, found once and then read under any weights.

    Args:
        positive: ``(Q,) bool``.
        scores: ``(Q,) float64``.
    """

    def __init__(self, positive: NDArray[np.bool_], scores: Array) -> None:
        self.positive = positive
        self.order = np.argsort(scores, kind="stable")
        ranked = scores[self.order]
        values = ranked[positive[self.order]]
        self.rows = self.order[positive[self.order]]
        # How many queries score less than each positive, and how many no more; the same among positives.
        self.below = np.searchsorted(ranked, values, side="left")
        self.up_to = np.searchsorted(ranked, values, side="right")
        self.positive_below = np.searchsorted(values, values, side="left")

    def areas(self, weights: Array) -> tuple[Array, Array]:
        """Weighted ROC-AUC and average precision ``(S,)`` under ``weights (Q, S)``; NaN where undefined."""
        # np.take copies whole rows, several times faster than indexing does.
        cumulated = _cumulated(weights.take(self.order, axis=0))
        own = weights.take(self.rows, axis=0)
        found = _cumulated(own)
        total, n_positive = cumulated[-1], found[-1]
        below = cumulated.take(self.below, axis=0)
        above = total - below
        true = n_positive - found.take(self.positive_below, axis=0)
        # A positive that was not drawn may stand where nothing was drawn: 0 / 0 must count nothing.
        precision = true / np.maximum(above, np.finfo(np.float64).tiny)
        below += cumulated.take(self.up_to, axis=0)
        # Ranks among all queries; positives among themselves take up exactly half of the square of their weight.
        won = (np.einsum("ps,ps->s", own, below) - n_positive**2) / 2
        with np.errstate(invalid="ignore", divide="ignore"):
            area = won / (n_positive * (total - n_positive))
            return area, np.einsum("ps,ps->s", own, precision) / n_positive


def _cumulated(weights: Array) -> Array:
    """``(Q + 1, S)`` sums of the first rows of ``weights (Q, S)``, of none to of all."""
    sums = np.zeros((len(weights) + 1, weights.shape[1]))
    # torch: NumPy's cumulative sum down the columns takes three times as long
    torch.cumsum(torch.from_numpy(weights), 0, out=torch.from_numpy(sums)[1:])
    return sums


class _Scorer:
    """One arm: its rankings and its values of each query, to be read under any weights."""

    def __init__(self, labels: NDArray[np.int64], probabilities: Array) -> None:
        labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
        if probabilities.ndim != 2 or probabilities.shape[1] < 2 or labels.shape != probabilities.shape[:1]:
            shapes = f"{probabilities.shape} and {labels.shape}"
            raise ValueError(
                f"probabilities must be (queries, classes) with a label for each query, got shapes {shapes}"
            )
        n_classes = probabilities.shape[1]
        if not np.isfinite(probabilities).all():
            row = int(np.flatnonzero(~np.isfinite(probabilities).all(1))[0])
            raise ValueError(f"probabilities must be finite, got {probabilities[row].tolist()} in row {row}")
        if len(labels) and (labels.min() < 0 or labels.max() >= n_classes):
            raise ValueError(f"labels must lie in 0..{n_classes - 1}, got {labels.min()}..{labels.max()}")
        classes = [1] if n_classes == 2 else np.unique(labels).tolist()
        self.rankings = [_Ranking(labels == number, probabilities[:, number]) for number in classes]
        likely = np.maximum(probabilities[np.arange(len(labels)), labels], SMALLEST_PROBABILITY)
        self.values = np.stack([probabilities.argmax(1) == labels, -np.log(likely)])

    def scores(self, weights: Array) -> dict[str, Array]:
        """Measures ``(S,)`` under ``weights (Q, S)``."""
        areas = np.stack([ranking.areas(weights) for ranking in self.rankings])  # (classes, 2, S)
        shares = np.stack([weights[ranking.positive].sum(0) for ranking in self.rankings])[:, None]
        # A class that is not in the resample, or alone in it, has no area and no weight.
        shares = np.where(np.isfinite(areas), shares, 0)
        with np.errstate(invalid="ignore"):
            ranked, precise = (shares * np.nan_to_num(areas)).sum(0) / shares.sum(0)
            accuracy, loss = self.values @ weights / weights.sum(0)
        return {"roc_auc": ranked, "pr_auc": precise, "accuracy": accuracy, "log_loss": loss}


def probe_scores(labels: NDArray[np.int64], probabilities: Array, weights: Array | None = None) -> dict[str, Array]:
    """Every measure under each column of weights.

    ROC-AUC is the weighted share of pairs (positive, negative) that are in the right order, a tie counting half;
    PR-AUC is average precision, sum over distinct thresholds of (recall gained) x precision. With K = 2 class 1 is
    positive; with more, each class against the rest, averaged with the weight of its queries. Log-loss is in nats.

    Args:
        labels: ``(Q,) int64`` in 0..K-1.
        probabilities: ``(Q, K) float``, K at least 2.
        weights: ``(Q, S) float``, not negative; None is one column of ones.

    Returns:
        By name of :data:`MEASURES` ``(S,) float64``; NaN where a column of weights leaves a measure undefined (one
        class only, or nothing).

    Raises:
        ValueError: If shapes, labels or probabilities are not as said.

    Example:
        >>> probe_scores(np.array([0, 1]), np.array([[0.8, 0.2], [0.3, 0.7]]))["roc_auc"]
        array([1.])
    """
    scorer = _Scorer(labels, probabilities)
    weights = np.ones((len(labels), 1)) if weights is None else np.asarray(weights, dtype=np.float64)
    if weights.ndim != 2 or len(weights) != len(labels):
        raise ValueError(f"weights must have a row for each of {len(labels)} queries, got shape {weights.shape}")
    return scorer.scores(weights)


def user_weights(users: NDArray[np.int64], n_resamples: int, seed: int) -> Iterator[Array]:
    """Weights of queries when their users are drawn with replacement, all queries of a user together.

    Args:
        users: ``(Q,) int64``, any numbers; those that occur are drawn, as many as there are.
        n_resamples: S, at least 1.
        seed: Of the draw, which does not depend on how it is cut.

    Yields:
        ``(Q, s) float64`` with s at most :data:`RESAMPLES_AT_A_TIME`, S columns together.
    """
    known, rows = np.unique(users, return_inverse=True)
    generator = np.random.default_rng(seed)
    for start in range(0, n_resamples, RESAMPLES_AT_A_TIME):
        n_columns = min(RESAMPLES_AT_A_TIME, n_resamples - start)
        drawn = generator.integers(len(known), size=(n_columns, len(known)))
        drawn += np.arange(n_columns)[:, None] * len(known)
        times = np.bincount(drawn.ravel(), minlength=n_columns * len(known)).reshape(n_columns, len(known))
        yield np.ascontiguousarray(times.T, dtype=np.float64).take(rows, axis=0)


def bootstrap_scores(
    labels: NDArray[np.int64],
    users: NDArray[np.int64],
    probabilities: Mapping[str, Array],
    *,
    n_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Array]]:
    """Measures of every arm in resamples of users, the same users for all arms.

    Differences between rows of the result are therefore paired. Intervals are quantiles over resamples.

    Args:
        labels: ``(Q,) int64``.
        users: ``(Q,) int64``, to whom queries belong.
        probabilities: By arm ``(Q, K) float``.
        n_resamples: S, at least 1.
        seed: Of the draw.

    Returns:
        By arm and measure ``(S,) float64``, as :func:`probe_scores` has them.

    Raises:
        ValueError: If there is no query, ``n_resamples`` is below 1, and as :func:`probe_scores`.
    """
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
    users = np.asarray(users)
    if users.shape != np.shape(labels) or len(users) == 0:
        raise ValueError(f"users must name one for each of {len(labels)} queries, at least 1, got {users.shape}")
    scorers = {arm: _Scorer(labels, values) for arm, values in probabilities.items()}
    parts: dict[str, list[dict[str, Array]]] = {arm: [] for arm in scorers}
    for weights in user_weights(users, n_resamples, seed):
        for arm, scorer in scorers.items():
            parts[arm].append(scorer.scores(weights))
    return {
        arm: {name: np.concatenate([part[name] for part in found]) for name in MEASURES} for arm, found in parts.items()
    }
