"""The quadratic programme behind mean-variance weights, and how to check a solution of it.

Minimise w'Sigma w over w in R^k with sum w = 1, mu'w >= target, 0 <= w <= max_weight. Solved by the interior-point
method of Clarabel; its answer, good to about 1e-6, is then made exact by an active-set method that starts from its
multipliers.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import linprog

from lightning_modules.portfolio.market import Array

ACTIVE = 1e-9
"""Distance from a bound up to which a weight counts as on it."""

ROUNDING = 1e-11
"""Violation that counts as none, of weights and, in units of a typical variance, of multipliers."""

EXCHANGES = 50
"""Most turns from the active set of the interior-point method to the exact one."""


def _largest_mean_weights(mean: Array, max_weight: float) -> Array:
    """Fill up the stocks of largest mean to the cap, one after the other."""
    weights = np.empty_like(mean)
    weights[np.argsort(-mean, kind="stable")] = np.clip(1 - max_weight * np.arange(len(mean)), 0, max_weight)
    return weights


def largest_mean(mean: Array, max_weight: float) -> float:
    """Largest mu'w over sum w = 1, 0 <= w <= max_weight, with max_weight at least 1/k."""
    return float(mean @ _largest_mean_weights(mean, max_weight))


def onto_capped_simplex(weights: Array, max_weight: float) -> Array:
    """Clip to [0, max_weight], then spread what the sum lacks in proportion to the room left, so that it is 1.

    Args:
        weights: ``(k,)`` finite.
        max_weight: Cap, at least 1/k.

    Returns:
        ``(k,)`` within the bounds, of sum 1 within 1e-12.
    """
    clipped = np.clip(weights, 0, max_weight)
    lacking = 1 - clipped.sum()
    room = max_weight - clipped if lacking > 0 else clipped
    if room.sum() > 0:  # else only rounding is lacking
        clipped = clipped + lacking * room / room.sum()
    return np.clip(clipped, 0, max_weight)


def minimise_variance(covariance: Array, mean: Array, target: float, max_weight: float) -> tuple[Array | None, str]:
    """Solve the programme.

    Args:
        covariance: ``(k, k) float64``, positive semidefinite, with a positive trace; may be singular.
        mean: ``(k,) float64``.
        target: Least mu'w, -inf for none; it must be reachable, see :func:`largest_mean`.
        max_weight: Cap, at least 1/k.

    Returns:
        Weights ``(k,)`` in [0, max_weight] of sum 1 within 1e-12, or None where Clarabel stopped with another status
        than solved; and that status.

    Raises:
        ImportError: If Clarabel is not installed.
    """
    n_stocks = len(mean)
    if max_weight * n_stocks <= 1 + 1e-12:  # equal weight is all there is, and an interior there is not
        return np.full(n_stocks, 1 / n_stocks), "Solved"
    reserve = largest_mean(mean, max_weight) - target
    if 0 <= reserve <= ACTIVE * np.abs(mean).max() and len(np.unique(mean)) == n_stocks:
        # Only these weights reach the target. Multipliers have no bound there, so that a solver would not settle.
        return onto_capped_simplex(_largest_mean_weights(mean, max_weight), max_weight), "Solved"
    try:
        import clarabel
    except ImportError as error:
        raise ImportError("mean-variance weights need the solver Clarabel: pip install 'seqlit[tda]'") from error

    # In units of a typical variance the tolerances of the solver mean the same for daily and annual covariances.
    scaled = covariance / (np.trace(covariance) / n_stocks)
    identity = np.eye(n_stocks)
    rows = [np.ones((1, n_stocks)), -identity, identity]
    limits = [np.ones(1), np.zeros(n_stocks), np.full(n_stocks, max_weight)]
    if target > -np.inf:
        rows.append(-mean[None])
        limits.append(np.array([-target]))
    constraints, limit = np.concatenate(rows), np.concatenate(limits)
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.max_threads = 1
    solution = clarabel.DefaultSolver(
        sparse.csc_matrix(np.triu(scaled)),
        np.zeros(n_stocks),
        sparse.csc_matrix(constraints),
        limit,
        [clarabel.ZeroConeT(1), clarabel.NonnegativeConeT(len(limit) - 1)],
        settings,
    ).solve()
    status = str(solution.status)
    if status != "Solved":
        return None, status
    weights = np.asarray(solution.x)
    # Strict complementarity: of multiplier and slack of a constraint the larger one is not zero.
    active = np.asarray(solution.z)[1:] > np.asarray(solution.s)[1:]
    exact = _by_active_set(scaled, weights, mean, target, max_weight, active)
    return onto_capped_simplex(weights if exact is None else exact, max_weight), status


def _by_active_set(
    covariance: Array, weights: Array, mean: Array, target: float, max_weight: float, active: NDArray[np.bool_]
) -> Array | None:
    """Solution to rounding, by exchanges on a guess of which constraints are active: floors, caps, mean.

    Each turn minimises with the active constraints as equations. Free weights beyond a bound are then held there, or,
    if there are none, the constraint with the worst multiplier is let go. A good guess needs none or a few turns.

    Returns:
        Weights ``(k,)``, or None where ``EXCHANGES`` turns did not suffice. That is seen where the target is within a
        millionth of the largest mean: there is hardly room then for the interior-point answer to be wrong in.
    """
    n_stocks = len(weights)
    on_floor, on_cap = active[:n_stocks].copy(), active[n_stocks : 2 * n_stocks].copy()
    on_target = bool(active[2 * n_stocks :].any())
    unit = np.abs(mean).max() or 1.0
    for _ in range(EXCHANGES):
        held = np.where(on_floor, 0.0, np.where(on_cap, max_weight, weights))
        free = ~(on_floor | on_cap)
        rows = np.stack([np.ones(n_stocks), -mean / unit])[: 1 + on_target]
        values = np.array([1.0, -target / unit])[: 1 + on_target]
        # Step p of the free weights F: [Sigma_FF, R_F'; R_F, 0] [p; y] = [-(Sigma w)_F; values - R w].
        part, n_free = rows[:, free], int(free.sum())
        system = np.block([[covariance[np.ix_(free, free)], part.T], [part, np.zeros((len(rows), len(rows)))]])
        right = np.concatenate([-(covariance[free] @ held), values - rows @ held])
        # Least squares, as the system is singular with a singular covariance or fewer free weights than rows.
        found = np.linalg.lstsq(system, right, rcond=None)[0]
        held[free] += found[:n_free]
        below, above = held < -ROUNDING, held > max_weight + ROUNDING
        short = not on_target and mean @ held < target - ROUNDING * unit
        if below.any() or above.any() or short:
            on_floor, on_cap, on_target = on_floor | below, on_cap | above, on_target or short
            continue
        multipliers = covariance @ held + found[n_free:] @ rows  # of floors; those of caps have the other sign
        wrong = np.where(on_floor, -multipliers, np.where(on_cap, multipliers, 0.0))
        worst = int(wrong.argmax())
        if on_target and found[-1] < -max(ROUNDING, wrong[worst]):
            on_target = False
        elif wrong[worst] > ROUNDING:
            on_floor[worst] = on_cap[worst] = False
        else:
            met = np.abs(rows @ held - values).max() <= ROUNDING
            return held if met else None
    return None


def kkt_residual(weights: Array, covariance: Array, mean: Array, target: float, max_weight: float) -> float:
    """How far weights are from optimal: the largest violation of the conditions of Karush, Kuhn and Tucker.

    With g = Sigma w / (trace(Sigma) / k) there must be lambda and z >= 0, z = 0 unless mu'w = target, such that
    g_i - lambda - z mu_i is 0 for weights between the bounds, at least 0 for weights at 0, and at most 0 for weights
    at max_weight. The violation is the least over (lambda, z), by a linear programme. The convex programme is solved
    exactly if and only if the residual is 0.

    Args:
        weights: ``(k,) float64``.
        covariance: ``(k, k) float64``.
        mean: ``(k,) float64``.
        target: Least mu'w, -inf for none.
        max_weight: Cap.

    Returns:
        The largest of that violation, |sum w - 1|, and how far a weight is outside its bounds or mu'w, in units of
        the largest |mu|, below target.
    """
    gradient = covariance @ weights / (np.trace(covariance) / len(weights))
    unit = np.abs(mean).max() or 1.0
    shortfall = (target - mean @ weights) / unit
    feasibility = max(abs(weights.sum() - 1), -weights.min(), weights.max() - max_weight, shortfall, 0.0)
    design = np.column_stack([np.ones_like(gradient), mean / unit, np.ones_like(gradient)])
    above = weights > ACTIVE  # g <= lambda + z mu + eps
    below = weights < max_weight - ACTIVE  # g >= lambda + z mu - eps
    found = linprog(
        [0, 0, 1],
        A_ub=np.concatenate([-design[above], (design * [1, 1, -1])[below]]),
        b_ub=np.concatenate([-gradient[above], gradient[below]]),
        bounds=[(None, None), (0, None if abs(shortfall) <= ACTIVE else 0), (0, None)],
    )
    assert found.status == 0, found.message  # lambda = 0 with a large eps is feasible, and eps is at least 0
    return float(max(feasibility, found.fun))
