"""Delay embedding of a series of returns as a cloud of points, and the search for its two parameters.

Point k of the embedding with dimension d, delay tau and stride s is (x_ks, x_ks+tau, ..., x_ks+(d-1)tau). The delay
makes the coordinates as independent as possible, the dimension is where points stop being neighbours by projection
alone. Source: F. Takens (1981); M. Kennel, R. Brown and H. Abarbanel, Phys. Rev. A 45 (1992); spec of arXiv
2308.07944, section 3.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

N_BINS = 100
"""Bins a side of the histogram behind the mutual information."""

RATIO_TOLERANCE = 10.0
"""A neighbour is false if one more coordinate separates the pair by more than this multiple of their distance."""

_BLOCK_ENTRIES = 2**15  # distances held at a time: a quarter of a mebibyte, which stays in a processor's cache


def embed(series: ArrayLike, dimension: int, delay: int, stride: int = 1) -> Array:
    """Points of the delay embedding, shifted so that the last coordinate of the last point is the last return.

    There are n = floor((T - (d - 1) tau - 1) / s) + 1 points. Where s does not divide evenly the earliest returns are
    left out: the latest ones matter most.

    Args:
        series: ``(T,) float``.
        dimension: d, at least 1.
        delay: tau, in days, at least 1.
        stride: s, in days between points, at least 1.

    Returns:
        ``(n, d) float64``.

    Raises:
        ValueError: If the series is not one row of finite numbers, a number is below 1, or there is not one point.
    """
    values = _checked(series)
    for name, number in (("dimension", dimension), ("delay", delay), ("stride", stride)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    last_start = len(values) - (dimension - 1) * delay - 1
    if last_start < 0:
        raise ValueError(
            f"an embedding of dimension {dimension} and delay {delay} needs at least {(dimension - 1) * delay + 1} "
            f"days, got {len(values)}"
        )
    starts = np.arange(last_start % stride, last_start + 1, stride)
    return values[starts[:, None] + delay * np.arange(dimension)]


def mutual_information(series: ArrayLike, max_delay: int) -> Array:
    """Mutual information, in nats, of x_t and x_t+tau for tau = 1 .. ``max_delay``.

    sum_ij p_ij log(p_ij / (p_i p_j)) over a histogram of 100 x 100 bins of equal width between the extremes of each
    of the two.

    Args:
        series: ``(T,) float``.
        max_delay: In days, from 1 to T - 1.

    Returns:
        ``(max_delay,) float64``, at least 0; all 0 for a constant series.

    Raises:
        ValueError: If the series is not one row of finite numbers, or ``max_delay`` is out of range.
    """
    values = _checked(series)
    if not 1 <= max_delay < len(values):
        raise ValueError(f"max_delay must be from 1 to {len(values) - 1} for {len(values)} days, got {max_delay}")
    counts = np.arange(len(values) + 1)
    count_log_count = counts * np.log(np.maximum(counts, 1))
    information = np.empty(max_delay)
    for delay in range(1, max_delay + 1):
        rows, columns = _bins(values[:-delay]), _bins(values[delay:])
        n = len(rows)
        joint = np.bincount(rows * N_BINS + columns, minlength=N_BINS**2)
        row_sums, column_sums = np.bincount(rows, minlength=N_BINS), np.bincount(columns, minlength=N_BINS)
        terms = [count_log_count[table].sum() for table in (joint, row_sums, column_sums)]
        information[delay - 1] = (terms[0] - terms[1] - terms[2] + count_log_count[n]) / n
    # Differences of logarithms near log T: what is left of an exact 0 must not decide the least delay.
    return np.where(information < 1e-12, 0.0, information)


def false_nearest_neighbours(series: ArrayLike, delay: int, max_dimension: int) -> NDArray[np.int64]:
    """Number of false nearest neighbours in dimensions 1 .. ``max_dimension``, at stride 1.

    In dimension d the points are those that have a next coordinate x_k+d tau. With j the nearest neighbour of k at
    distance R > 0, it is false if |x_k+d tau - x_j+d tau| > 10 R and R < 2 std(x): a pair further apart than that is
    no neighbour at all.

    Args:
        series: ``(T,) float``.
        delay: tau, in days, at least 1.
        max_dimension: At least 1; T must be at least ``max_dimension * delay + 2``.

    Returns:
        ``(max_dimension,) int64``.

    Raises:
        ValueError: If the series is not one row of finite numbers, or too short.
    """
    values = _checked(series)
    if delay < 1 or max_dimension < 1 or len(values) < max_dimension * delay + 2:
        raise ValueError(
            f"false neighbours up to dimension {max_dimension} at delay {delay}, both at least 1, need at least "
            f"{max_dimension * delay + 2} days, got {len(values)}"
        )
    limit = 2.0 * values.std()
    n_points = len(values) - delay
    rows = max(1, _BLOCK_ENTRIES // n_points)
    counts = np.zeros(max_dimension, np.int64)
    for start in range(0, n_points, rows):
        block = np.arange(start, min(start + rows, n_points))
        squares = (values[block, None] - values[:n_points]) ** 2  # (block, n)
        squares[np.arange(len(block)), block] = np.inf  # no point is its own neighbour
        for dimension in range(1, max_dimension + 1):
            shift = dimension * delay
            n_left = len(values) - shift  # points with a next coordinate: fewer in each dimension
            block = block[block < n_left]
            squares = squares[: len(block), :n_left]
            if not len(block):
                break
            neighbour = squares.argmin(1)
            radius = np.sqrt(squares[np.arange(len(block)), neighbour])
            step = np.abs(values[block + shift] - values[neighbour + shift])
            counts[dimension - 1] += np.count_nonzero(
                (step > RATIO_TOLERANCE * radius) & (radius > 0) & (radius < limit)
            )
            squares = squares + (values[block + shift, None] - values[shift:]) ** 2
    return counts


def giotto_false_neighbours(series: ArrayLike, delay: int, max_dimension: int, stride: int) -> NDArray[np.int64]:
    """The counts that giotto-tda 0.6.2 computes in place of :func:`false_nearest_neighbours`, for parity.

    Its rolled arrays pair things that do not belong together. With n points p_k in dimension d, nu(k) the number of
    the nearest neighbour of p_k at distance R_k and h = d tau, it counts the k from 0 to n - h - 1 with
    |x_k+h+T-n - x_nu(k+h)| > 10 R_k and 0 < R_k < 2 std(x): the step is that of another point than the distance, and
    nu, a number of points, is used as a number of days. That holds at stride 1 as well.

    Args:
        series: ``(T,) float``.
        delay: tau, in days.
        max_dimension: At least 1.
        stride: s, in days between points.

    Returns:
        ``(max_dimension,) int64``.
    """
    values = _checked(series)
    limit = 2.0 * values.std()
    counts = np.zeros(max_dimension, np.int64)
    for dimension in range(1, max_dimension + 1):
        points = embed(values, dimension, delay, stride)
        n_kept = len(points) - dimension * delay
        if n_kept <= 0:  # nothing left to compare, in all larger dimensions too
            break
        squares = np.zeros((len(points), len(points)))
        for coordinate in points.T:  # in the order of a k-d tree, so that sums round alike
            squares += (coordinate[:, None] - coordinate) ** 2
        np.fill_diagonal(squares, np.inf)
        neighbour = squares.argmin(1)
        radius = np.sqrt(squares.min(1))[:n_kept]
        step = np.abs(values[len(values) - n_kept :] - values[neighbour[dimension * delay :]])
        ratio = np.divide(step, radius, out=np.zeros(n_kept), where=radius > 0)
        counts[dimension - 1] = np.count_nonzero((ratio > RATIO_TOLERANCE) & (radius < limit))
    return counts


def search_parameters(
    series: ArrayLike,
    *,
    max_dimension: int = 10,
    max_delay: int = 30,
    stride: int = 1,
    giotto_compat: bool = False,
) -> tuple[int, int]:
    """Dimension and delay of the embedding of one series.

    tau is the delay with the least mutual information. With F(k) the number of false nearest neighbours in dimension
    k, d = argmin over k = 2 .. ``max_dimension`` of |F(k) - 2 F(k + 1) + F(k + 2)| / ((F(k + 1) + 1) k). Of equals
    the smallest is taken.

    Args:
        series: ``(T,) float``; a constant one gives (2, 1).
        max_dimension: At least 2.
        max_delay: In days, at least 1.
        stride: Days between the points whose neighbours are counted, for ``giotto_compat`` alone; the textbook's
            search uses every point.
        giotto_compat: Whether F is what giotto-tda counts, see :func:`giotto_false_neighbours`; then the result is that
            of its ``SingleTakensEmbedding(parameters_type="search")``.

    Returns:
        ``(d, tau)``.

    Raises:
        ValueError: If a number is out of range or the series is not finite, or shorter than the largest embedding
            tried: ``(max_dimension + 2) * max_delay + 2`` days.
    """
    values = _checked(series)
    for name, number, least in (
        ("max_dimension", max_dimension, 2),
        ("max_delay", max_delay, 1),
        ("stride", stride, 1),
    ):
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    if stride > 1 and not giotto_compat:
        raise ValueError(f"stride must be 1 in the textbook's search, got {stride}; giotto_compat=True takes others")
    n_needed = (max_dimension + 2) * max_delay + 2
    if len(values) < n_needed:
        raise ValueError(
            f"the search up to dimension {max_dimension} and delay {max_delay} needs at least {n_needed} days, got "
            f"{len(values)}: lower max_dimension or max_delay, or give dimension and delay"
        )
    delay = int(mutual_information(values, max_delay).argmin()) + 1
    if giotto_compat:
        counts = giotto_false_neighbours(values, delay, max_dimension + 2, stride)
    else:
        counts = false_nearest_neighbours(values, delay, max_dimension + 2)
    here, following, after = counts[1:-2], counts[2:-1], counts[3:]  # F(k), F(k + 1), F(k + 2) for k = 2, 3, ...
    curvature = np.abs(here - 2 * following + after) / (following + 1) / np.arange(2, max_dimension + 1)
    return int(curvature.argmin()) + 2, delay


def _bins(values: Array) -> NDArray[np.intp]:
    """Bin of each value, as ``numpy.histogram`` places it."""
    low, high = values.min(), values.max()
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, N_BINS + 1)
    return np.minimum(np.searchsorted(edges, values, side="right") - 1, N_BINS - 1)


def _checked(series: ArrayLike) -> Array:
    values = np.asarray(series, np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        place = f"shape {values.shape}" if values.ndim != 1 else f"day {int(np.flatnonzero(~np.isfinite(values))[0])}"
        raise ValueError(f"series must be one row of finite numbers, not so: {place}")
    return values
