"""Scaling each stock's returns before embedding, so that diagrams show shape and not volatility.

On raw returns every birth and death is proportional to the volatility of the stock. A stocks, T days.
Source: spec of arXiv 2308.07944, section 3; GARCH(1,1) after T. Bollerslev, J. Econometrics 31 (1986), with the
variance targeting of C. Francq, L. Horvath and J.-M. Zakoian, J. Financial Econometrics 9 (2011).
"""

from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Scale = Literal["none", "zscore", "mad", "vol_garch"]

_GARCH_SIDE = 9  # points a side of both grids; the second spans one cell of the first on each side


class ScaledReturns(NamedTuple):
    """Scaled series, and which stocks had no scale.

    Attributes:
        values: ``(A, T) float64``.
        flat: ``(A,) bool``, stocks whose scale is 0; their ``values`` are 0.
    """

    values: Array
    flat: NDArray[np.bool_]


def scale_returns(returns: ArrayLike, scale: Scale) -> ScaledReturns:
    """Scale each stock by itself.

    | scale | value |
    |---|---|
    | none | r |
    | zscore | (r - mean) / std |
    | mad | (r - median) / (1.4826 median abs(r - median)), the standard deviation of a Gaussian |
    | vol_garch | (r - mean) / sigma_t, with sigma_t of :func:`garch_volatility` |

    A stock whose mean or median deviation is 0 to rounding is flat: all its values become 0, under ``none`` as well.

    Args:
        returns: ``(A, T) float``, finite.
        scale: See the table.

    Raises:
        ValueError: If the scale is unknown, or the returns are not finite rows of at least 2 days.
    """
    if scale not in get_args(Scale):
        raise ValueError(f"scale must be one of {', '.join(get_args(Scale))}, got {scale!r}")
    values = np.asarray(returns, np.float64)
    if values.ndim != 2 or values.shape[1] < 2:
        raise ValueError(f"returns must have shape (stocks, days) with at least 2 days, got {values.shape}")
    if not np.isfinite(values).all():
        stock, day = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(f"returns must be finite, got {values[stock, day]} for stock {stock} on day {day}")
    if scale == "mad":
        centred = values - np.median(values, axis=1, keepdims=True)
        spread = 1.4826 * np.median(np.abs(centred), axis=1, keepdims=True)
    else:
        centred = values - values.mean(1, keepdims=True)
        spread = centred.std(1, keepdims=True)
    rounding = 1e-12 * np.abs(values).max(1, initial=0.0, keepdims=True)
    flat = spread <= rounding
    if scale == "none":
        return ScaledReturns(np.where(flat, 0.0, values), flat[:, 0])
    if scale == "vol_garch" and not flat.all():
        moving = ~flat[:, 0]
        spread = np.repeat(spread, values.shape[1], axis=1)
        spread[moving] = garch_volatility(centred[moving])
    return ScaledReturns(np.divide(centred, spread, out=np.zeros_like(centred), where=~flat), flat[:, 0])


def garch_volatility(shocks: Array) -> Array:
    """Conditional volatility of a GARCH(1,1) fitted to each stock by Gaussian quasi-likelihood.

    With v the mean square of a stock's shocks e, h_t = v (1 - p) + alpha e_t-1^2 + (p - alpha) h_t-1 and h_0 = v:
    variance targeting leaves the persistence p and alpha, chosen by the least sum of log h_t + e_t^2 / h_t on a grid
    of p in 0.5 .. 0.995 and alpha in 0 .. 0.3, refined once around the best point. All stocks are fitted at once.

    Args:
        shocks: ``(A, T) float64``, centred, no row all 0.

    Returns:
        sqrt(h), ``(A, T) float64``.
    """
    squares = shocks**2
    variance = squares.mean(1)
    # Fine where it matters: near 1 a small step of p is a large one of the memory 1 / (1 - p).
    odds = np.linspace(0.0, np.log(0.5 / 0.005), _GARCH_SIDE)  # p = 1 - exp(-odds) / 2
    alpha = np.linspace(0.0, 0.3, _GARCH_SIDE)
    first = _least_loss(squares, variance, np.broadcast_to(odds, (len(squares), _GARCH_SIDE)), alpha[None, :])
    steps = np.linspace(-1.0, 1.0, _GARCH_SIDE)
    near_odds = np.clip(first[0][:, None] + steps * odds[1], 0.0, odds[-1])
    near_alpha = np.clip(first[1][:, None] + steps * alpha[1], 0.0, alpha[-1])
    best_odds, best_alpha = _least_loss(squares, variance, near_odds, near_alpha)
    return np.sqrt(_conditional_variance(squares, variance, 1 - np.exp(-best_odds) / 2, best_alpha))


def _least_loss(squares: Array, variance: Array, odds: Array, alpha: Array) -> tuple[Array, Array]:
    """Best point ``(A,), (A,)`` of each stock's grid, given by its two axes ``(A, side)`` or ``(1, side)``."""
    shape = (len(squares), odds.shape[1], alpha.shape[1])
    persistence = np.broadcast_to((1 - np.exp(-odds) / 2)[:, :, None], shape)
    weight = np.minimum(np.broadcast_to(alpha[:, None, :], shape), persistence)
    v = variance[:, None, None]
    h = np.broadcast_to(v, shape).copy()
    loss = np.zeros(shape)
    for day in range(squares.shape[1]):
        square = squares[:, day, None, None]
        loss += np.log(h) + square / h
        h = v * (1 - persistence) + weight * square + (persistence - weight) * h
    best = loss.reshape(len(squares), -1).argmin(1)
    rows, columns = np.unravel_index(best, shape[1:])
    stocks = np.arange(len(squares))
    return np.broadcast_to(odds, shape[:2])[stocks, rows], weight[stocks, rows, columns]


def _conditional_variance(squares: Array, variance: Array, persistence: Array, alpha: Array) -> Array:
    h = np.empty_like(squares)
    h[:, 0] = variance
    for day in range(1, squares.shape[1]):
        h[:, day] = variance * (1 - persistence) + alpha * squares[:, day - 1] + (persistence - alpha) * h[:, day - 1]
    return h
