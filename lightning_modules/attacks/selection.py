"""The one rule by which every attack picks its configuration and iteration, and the trade-off it picks from.

P configurations (step, alpha, radius, seed), iterations of one run of each. All numbers come from validation series:
the data module hands out no test series while a fit runs, and nothing is tested before attacks were chosen. The
published tables were not selected by one rule for all attacks, which doubles the gap between concealed and vanilla
attacks there.
Source: spec of arXiv 2502.20948, sections 9.3 and 11 (T1); the rule is ours.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

TIE = 1e-12
"""Values of F this close are equal: float64 averages of the same counts in another order."""


class Choice(NamedTuple):
    """Place of the selected candidate: row and column of :attr:`Candidates.success`."""

    configuration: int
    iteration: int


@dataclass(frozen=True)
class Candidates:
    """What an attack may be selected from.

    Attributes:
        success: ``(P, I) float`` success F on validation; NaN for a candidate that has none.
        step: ``(P,) float`` step length, or radius, of each configuration.
        radius: ``(P,) float`` radius beside a step of its own; None where there is no such axis.
        alpha: ``(P,) float`` weight of the detector loss; zeros for an attack without one.
        n_steps: ``(I,) int`` iterations behind each column.

    Raises:
        ValueError: If the shapes disagree, there is no candidate, or step, radius, alpha or n_steps hold NaN.
    """

    success: Array
    step: Array
    alpha: Array
    n_steps: NDArray[np.int64]
    radius: Array | None = None

    def __post_init__(self) -> None:
        if self.success.ndim != 2 or self.success.size == 0:
            raise ValueError(f"success must be (P, I) with at least one candidate, got shape {self.success.shape}")
        n_configurations, n_columns = self.success.shape
        rows = n_configurations
        for name, size in (("step", rows), ("radius", rows), ("alpha", rows), ("n_steps", n_columns)):
            values = getattr(self, name)
            if values is None and name == "radius":
                continue
            if values.shape != (size,) or np.isnan(values).any():
                raise ValueError(f"{name} must be ({size},) without NaN, got shape {values.shape}")


def select(candidates: Candidates) -> Choice:
    """The candidate of largest F; among equals the smallest step, then radius, then alpha, then the fewest steps.

    What is equal in all of these (two seeds) goes to the first configuration. F within :data:`TIE` of the largest
    is equal to it. NaN is never selected.

    Args:
        candidates: From validation series only.

    Returns:
        Row and column of the selected candidate.

    Raises:
        ValueError: If F is NaN for every candidate.
    """
    success = candidates.success
    if np.isnan(success).all():
        raise ValueError(f"success must hold a number for at least one candidate, got NaN for all {success.size}")
    rows, columns = np.nonzero(success >= np.nanmax(success) - TIE)
    # lexsort: the last key counts first
    radius = candidates.step if candidates.radius is None else candidates.radius
    order = np.lexsort((rows, candidates.n_steps[columns], candidates.alpha[rows], radius[rows], candidates.step[rows]))
    return Choice(int(rows[order[0]]), int(columns[order[0]]))


def fold_average(values: ArrayLike, n_series: ArrayLike) -> Array:
    """Mean over folds, each weighed by its number of validation series: cross-fitted validation.

    Args:
        values: ``(R, ...) float`` of R folds, e.g. F of ``(R, P, I)`` candidates.
        n_series: ``(R,) int`` validation series of each fold, at least 1.

    Returns:
        ``(...) float64``; NaN where any fold is NaN, so that no candidate wins by the folds it lacks.

    Raises:
        ValueError: If there is no fold, the lengths differ or a fold is empty.
    """
    table, sizes = np.asarray(values, dtype=np.float64), np.asarray(n_series, dtype=np.float64)
    if table.ndim == 0 or len(table) == 0 or sizes.shape != table.shape[:1] or (sizes < 1).any():
        raise ValueError(
            f"fold_average needs values (R, ...) and R numbers of series of at least 1, got shapes {table.shape} and "
            f"{sizes.shape}"
        )
    return np.tensordot(sizes / sizes.sum(), table, axes=1)


def _points(effectiveness: ArrayLike, concealability: ArrayLike) -> tuple[Array, Array]:
    effective = np.asarray(effectiveness, dtype=np.float64).ravel()
    concealed = np.asarray(concealability, dtype=np.float64).ravel()
    if effective.shape != concealed.shape:
        raise ValueError(
            f"effectiveness and concealability must hold the same candidates, got {effective.size} and {concealed.size}"
        )
    return effective, concealed


def pareto_front(effectiveness: ArrayLike, concealability: ArrayLike) -> NDArray[np.int64]:
    """Candidates that no other beats in one of the two without losing in the other.

    Args:
        effectiveness: ``(...) float`` EFF of each candidate; flattened.
        concealability: As ``effectiveness``, CONC. A candidate with NaN in either is left out.

    Returns:
        ``(F,) int64`` flat indices, EFF ascending and CONC descending; of equal candidates the first.

    Raises:
        ValueError: If the numbers of candidates differ.
    """
    effective, concealed = _points(effectiveness, concealability)
    valid = np.flatnonzero(~np.isnan(effective) & ~np.isnan(concealed))
    # best EFF first, among these best CONC first, among these the first candidate
    order = valid[np.lexsort((valid, -concealed[valid], -effective[valid]))]
    best_so_far = np.maximum.accumulate(np.concatenate([[-np.inf], concealed[order]]))[:-1]
    return order[concealed[order] > best_so_far][::-1]


def pareto_area(effectiveness: ArrayLike, concealability: ArrayLike) -> float:
    """Area dominated by the front with respect to (0, 0): the hypervolume of (EFF, CONC), in 0..1 for shares.

    ``sum_i (EFF_i - EFF_{i-1}) CONC_i`` over the front in ascending EFF, with ``EFF_0 = 0``. Negative values, which
    no share takes, add nothing.

    Args:
        effectiveness: As in :func:`pareto_front`.
        concealability: As in :func:`pareto_front`.

    Returns:
        The area; 0 without a candidate.

    Raises:
        ValueError: If the numbers of candidates differ.
    """
    effective, concealed = (np.maximum(values, 0.0) for values in _points(effectiveness, concealability))
    front = pareto_front(effective, concealed)
    return float(np.sum(np.diff(effective[front], prepend=0.0) * concealed[front]))
