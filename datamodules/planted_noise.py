"""Noise of variance 1 in five shapes, by which groups of stocks are planted in a synthetic market."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Noise = Literal["garch", "white", "cycle", "bursts", "jumps"]


@dataclass(frozen=True)
class PlantedGroup:
    """Stocks whose own noise has a shape that its variance does not show: all kinds have variance 1 by construction.

    * ``garch``: GARCH(1, 1) with Student-t innovations, as the stocks outside groups.
    * ``white``: independent Student-t.
    * ``cycle``: AR(2) with poles ``pole_radius * exp(+-2 pi i / period)``, Gaussian, the period of each stock uniform
      in 10..30 days, started from its stationary law.
    * ``bursts``: Student-t whose variance is 10 times as large in bursts, 20 days long on average, a tenth of the time.
    * ``jumps``: Gaussian, half of the variance from jumps that come every 100 days on average.

    Attributes:
        noise: Which of these.
        n_stocks: How many stocks, at least 1.
        pole_radius: Of ``cycle``, in (0, 1); the nearer to 1, the longer a cycle keeps its phase.
    """

    noise: Noise
    n_stocks: int
    pole_radius: float = 0.997

    def __post_init__(self) -> None:
        if self.noise not in get_args(Noise):
            raise ValueError(f"noise must be one of {', '.join(get_args(Noise))}, got {self.noise!r}")
        if self.n_stocks < 1:
            raise ValueError(f"n_stocks of a planted group must be at least 1, got {self.n_stocks}")
        if not 0 < self.pole_radius < 1:
            raise ValueError(f"pole_radius must be in (0, 1), got {self.pole_radius}")


def _student(generator: np.random.Generator, shape: tuple[int, int], degrees_of_freedom: float) -> Array:
    """Student-t of variance 1."""
    scale = np.sqrt((degrees_of_freedom - 2) / degrees_of_freedom)
    return scale * generator.standard_t(degrees_of_freedom, shape)


def garch_noise(
    generator: np.random.Generator, n_days: int, n_series: int, garch: tuple[float, float], degrees_of_freedom: float
) -> Array:
    """GARCH(1, 1): x_t = sqrt(h_t) e_t, h_t = 1 - a - b + a x_(t-1)^2 + b h_(t-1), h_0 = 1, so that E x_t^2 = 1."""
    of_square, of_variance = garch
    noise = _student(generator, (n_days, n_series), degrees_of_freedom)
    if of_square == 0:  # h stays 1
        return noise
    variance = np.ones(n_series)
    for row in noise:  # in place: each day's variance needs the noise of the day before
        row *= np.sqrt(variance)
        variance = (1 - of_square - of_variance) + of_square * row**2 + of_variance * variance
    return noise


def _cycles(generator: np.random.Generator, n_days: int, n_series: int, radius: float) -> Array:
    """AR(2) x_t = 2 R cos(w) x_(t-1) - R^2 x_(t-2) + s e_t, w = 2 pi / period, with s such that the variance is 1."""
    angle = 2 * np.pi / generator.uniform(10, 30, n_series)
    first, second = 2 * radius * np.cos(angle), -(radius**2)
    correlation = first / (1 - second)  # of neighbouring days
    scale = np.sqrt((1 + second) * ((1 - second) ** 2 - first**2) / (1 - second))
    values = generator.standard_normal((n_days, n_series))
    values[1] = correlation * values[0] + np.sqrt(1 - correlation**2) * values[1]  # stationary from the first day
    for day in range(2, n_days):
        values[day] = first * values[day - 1] + second * values[day - 2] + scale * values[day]
    return values


def _bursts(generator: np.random.Generator, n_days: int, n_series: int, degrees_of_freedom: float) -> Array:
    """Two states of variance, 10 to 1; bursts begin with chance 1/180 and end with 1/20, so they fill 1/10 of days."""
    variances = np.array([1.0, 10.0]) / (0.9 * 1 + 0.1 * 10)
    chances = generator.random((n_days, n_series))
    in_burst = np.empty((n_days, n_series), dtype=np.int64)
    in_burst[0] = chances[0] < 0.1
    for day in range(1, n_days):
        in_burst[day] = np.where(in_burst[day - 1] == 1, chances[day] >= 1 / 20, chances[day] < 1 / 180)
    return np.sqrt(variances[in_burst]) * _student(generator, (n_days, n_series), degrees_of_freedom)


def _jumps(generator: np.random.Generator, n_days: int, n_series: int) -> Array:
    variances = 0.5 + np.where(generator.random((n_days, n_series)) < 0.01, 0.5 / 0.01, 0.0)
    return np.sqrt(variances) * generator.standard_normal((n_days, n_series))


def draw_noise(
    generator: np.random.Generator,
    n_days: int,
    group: PlantedGroup,
    garch: tuple[float, float],
    degrees_of_freedom: float,
) -> Array:
    """``(n_days, group.n_stocks)`` noise of a group, each column of stationary variance 1.

    Args:
        generator: Source of randomness.
        n_days: At least 2.
        group: Which kind, and how many stocks.
        garch: Weights of the last square and of the last variance, for ``garch``.
        degrees_of_freedom: Of the Student-t kinds, above 2.
    """
    match group.noise:
        case "garch":
            return garch_noise(generator, n_days, group.n_stocks, garch, degrees_of_freedom)
        case "white":
            return _student(generator, (n_days, group.n_stocks), degrees_of_freedom)
        case "cycle":
            return _cycles(generator, n_days, group.n_stocks, group.pole_radius)
        case "bursts":
            return _bursts(generator, n_days, group.n_stocks, degrees_of_freedom)
        case "jumps":
            return _jumps(generator, n_days, group.n_stocks)
