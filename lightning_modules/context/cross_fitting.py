"""Ridge regression fitted on some users and read on the others. N rows, k features, m targets."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

Array = NDArray[np.float64]


def cross_fitted(
    features: Array, targets: Array, groups: ArrayLike, *, n_folds: int = 5, seed: int = 0, with_mean: bool = True
) -> Array:
    """Predictions of every row by a regression that saw no row of its group.

    Features are standardised by the fitting rows, and targets centred; the penalty is the number of features k, the
    one that is best where features explain half of a target of unit variance:

        w = (X'X + k I)^-1 X'y

    Args:
        features: ``(N, k)``, finite.
        targets: ``(N, m)``, finite.
        groups: ``(N,)``, users; a group lies in one fold.
        n_folds: At least 2, at most the number of groups.
        seed: Of the draw of folds.
        with_mean: Whether the mean of the fitting rows is part of a prediction. It is lower where the rows left out
            have high targets, which would put a ranking over folds in the wrong order.

    Returns:
        ``(N, m) float64``.

    Raises:
        ValueError: If there are fewer groups than folds.
    """
    _, codes = np.unique(np.asarray(groups), return_inverse=True)
    n_groups = int(codes.max()) + 1
    if not 2 <= n_folds <= n_groups:
        raise ValueError(f"n_folds must lie in 2..{n_groups}, the number of groups, got {n_folds}")
    folds = np.random.default_rng(seed).permutation(n_groups)[codes] % n_folds
    predicted = np.empty(targets.shape)
    penalty = features.shape[1] * np.eye(features.shape[1])
    for fold in range(n_folds):
        out = folds == fold
        mean, deviation = features[~out].mean(0), features[~out].std(0)
        # A constant column says nothing; dividing by its rounding error would make it say much.
        deviation = np.where(deviation > 1e-12 * np.maximum(1, np.abs(mean)), deviation, np.inf)
        fitted, read = (features[~out] - mean) / deviation, (features[out] - mean) / deviation
        centre = targets[~out].mean(0)
        weights = np.linalg.solve(fitted.T @ fitted + penalty, fitted.T @ (targets[~out] - centre))
        predicted[out] = read @ weights + (centre if with_mean else 0.0)
    return predicted


def cross_fitted_auc(features: Array, labels: NDArray[np.int64], groups: ArrayLike, *, seed: int = 0) -> float:
    """ROC-AUC of ridge regressions on indicators of classes, each class against the rest, weighted by its rows.

    Args:
        features: ``(N, k)``, finite.
        labels: ``(N,)`` classes, at least two of them.
        groups: ``(N,)``, at least 5 users.
        seed: Of the draw of folds.
    """
    targets = (labels[:, None] == np.unique(labels)).astype(np.float64)
    ranks = rankdata(cross_fitted(features, targets, groups, seed=seed, with_mean=False), axis=0)
    positives = targets.sum(0)
    areas = ((ranks * targets).sum(0) - positives * (positives + 1) / 2) / (positives * (len(targets) - positives))
    return float(np.average(areas, weights=positives))
