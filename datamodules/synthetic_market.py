"""Markets drawn from a model with known answers: factors, GARCH noise, planted groups, listings and delistings.

T days, A stocks. The simple return of stock a on day t is

    r_ta = beta_a f_t + gamma_a g_(t, sector of a) + v_a x_ta,

with a market factor f of mean ``market_premium``, a factor g of mean 0 for each sector, and own noise x of mean 0 and
variance 1 that is independent between stocks. Returns are cut below at -0.9, so that prices stay positive; at the
default volatilities that happens to about one return in ten million.

Source: spec section 11 for the model, 13.4 for the null market, 13.8 for the planted cycles.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from datamodules.planted_noise import PlantedGroup, draw_noise, garch_noise

Array = NDArray[np.float64]

SECTORS = (
    "Basic Materials",
    "Communication",
    "Consumer Cyclical",
    "Consumer Defensive",
    "Energy",
    "Financial",
    "Healthcare",
    "Industrials",
    "Real Estate",
    "Technology",
    "Utilities",
)
"""The 11 sectors, each with as many stocks as the others, give or take one."""

_DAYS_A_YEAR = 252
_LEAST_RETURN = -0.9


@dataclass(frozen=True, kw_only=True)
class SyntheticMarket:
    """A drawn market.

    Attributes:
        dates: ``(T,) datetime64[D]``, weekdays.
        tickers: A names such as ``S0042``.
        prices: ``(T, A) float64``, NaN where the stock is not listed.
        returns: ``(T, A) float64`` simple daily returns, NaN in the first row and where there is no price.
        index_prices: ``(T,) float64`` of the market factor, from 100.
        sectors: ``(A,) int64`` place in ``sector_names``.
        sector_names: The 11 sectors.
        member: ``(T, A) bool``, whether the stock belongs to the universe; never while it is not listed.
        delisting_returns: ``(A,) float64`` return of the day after the last price; NaN for stocks listed to the end.
        groups: ``(A,) int64`` number of the planted group, -1 for stocks outside groups.
    """

    dates: NDArray[np.datetime64]
    tickers: tuple[str, ...]
    prices: Array
    returns: Array
    index_prices: Array
    sectors: NDArray[np.int64]
    sector_names: tuple[str, ...]
    member: NDArray[np.bool_]
    delisting_returns: Array
    groups: NDArray[np.int64]

    def fields(self) -> dict[str, Any]:
        """The panel under the names of a batch of ``StockPricesDataModule``; dates are days since 1970-01-01."""
        names = ("tickers", "prices", "returns", "member", "index_prices", "sectors", "sector_names")
        return {"dates": self.dates.astype(np.int64), "delisting_returns": self.delisting_returns} | {
            name: getattr(self, name) for name in names
        }

    def write(self, folder: Path) -> dict[str, str]:
        """Write the market as files of ``StockPricesDataModule``.

        Args:
            folder: Made if needed.

        Returns:
            Argument of the data module -> file: ``paths``, ``index_paths``, ``sectors_path``, ``membership_path``,
            ``delistings_path``.
        """
        folder.mkdir(parents=True, exist_ok=True)
        files = {
            "paths": folder / "prices.parquet",
            "index_paths": folder / "index.csv",
            "sectors_path": folder / "sectors.csv",
            "membership_path": folder / "membership.csv",
            "delistings_path": folder / "delistings.csv",
        }
        dates = pl.Series("Date", self.dates)
        prices = pl.DataFrame(self.prices, schema=list(self.tickers), orient="row").fill_nan(None)
        prices.insert_column(0, dates).write_parquet(files["paths"])
        pl.DataFrame([dates, pl.Series("index", self.index_prices)]).write_csv(files["index_paths"])
        sectors = [self.sector_names[sector] for sector in self.sectors]
        pl.DataFrame({"ticker": self.tickers, "sector": sectors}).write_csv(files["sectors_path"])
        self._membership().write_csv(files["membership_path"])
        self._delistings().write_csv(files["delistings_path"])
        return {argument: str(file) for argument, file in files.items()}

    def _membership(self) -> pl.DataFrame:
        """A row for each spell; its end is missing if it lasts to the last day."""
        outside = np.zeros((1, len(self.tickers)), dtype=np.int64)
        steps = np.diff(np.concatenate([outside, self.member.astype(np.int64), outside]), axis=0).T
        stocks, starts = np.nonzero(steps == 1)
        ends = np.nonzero(steps == -1)[1] - 1  # in the same order: by stock, then by day
        last = np.datetime_as_string(self.dates)[ends].tolist()
        return pl.DataFrame(
            {
                "ticker": [self.tickers[stock] for stock in stocks],
                "start": np.datetime_as_string(self.dates)[starts].tolist(),
                "end": [None if row == len(self.dates) - 1 else day for row, day in zip(ends, last, strict=True)],
            },
            schema={"ticker": pl.String, "start": pl.String, "end": pl.String},
        )

    def _delistings(self) -> pl.DataFrame:
        stocks = np.flatnonzero(~np.isnan(self.delisting_returns))
        last = len(self.dates) - 1 - (~np.isnan(self.prices))[::-1].argmax(0)
        return pl.DataFrame(
            {
                "ticker": [self.tickers[stock] for stock in stocks],
                "date": np.datetime_as_string(self.dates)[last[stocks] + 1].tolist(),
                "return": self.delisting_returns[stocks],
            },
            schema={"ticker": pl.String, "date": pl.String, "return": pl.Float64},
        )


def synthetic_market(
    n_stocks: int = 500,
    n_days: int = 1260,
    *,
    market_premium: float = 0.06,
    market_volatility: float = 0.16,
    sector_volatility: float = 0.08,
    market_beta: tuple[float, float] = (0.5, 1.5),
    sector_beta: tuple[float, float] = (0.5, 1.5),
    own_volatility: tuple[float, float] = (0.15, 0.4),
    garch: tuple[float, float] = (0.08, 0.9),
    degrees_of_freedom: float = 5.0,
    groups: Sequence[PlantedGroup] = (),
    group_volatility: float = 0.25,
    listed_late: float = 0.0,
    delisted: float = 0.0,
    part_time_members: float = 0.0,
    first_day: str = "2015-01-01",
    seed: int = 0,
) -> SyntheticMarket:
    """Draw a market; equal arguments give equal markets.

    Args:
        n_stocks: A, at least 1.
        n_days: T, at least 3.
        market_premium: Annual mean of the market factor.
        market_volatility: Annual, of the market factor.
        sector_volatility: Annual, of each sector factor.
        market_beta: Range in which beta_a is uniform.
        sector_beta: Range in which gamma_a is uniform.
        own_volatility: Range in which v_a, annual, is uniform for stocks outside groups.
        garch: Weights of the last square and of the last variance, of the factors and of stocks outside groups.
        degrees_of_freedom: Of Student-t innovations, above 2.
        groups: Planted groups, in the first columns.
        group_volatility: v_a, annual, of all stocks in groups.
        listed_late: Share of stocks outside groups that are listed within the first half of the days only.
        delisted: Share of stocks outside groups that leave within the second half, with a last return that is
            uniform in [-0.6, 0.3].
        part_time_members: Share of stocks outside groups that are members for a random part of their days.
        first_day: ISO date; the first weekday from there on is the first row.
        seed: Of everything.

    Raises:
        ValueError: If an argument is outside its range.
    """
    _check_sizes(n_stocks, n_days, groups)
    _check_ranges(garch, degrees_of_freedom, listed_late, delisted, part_time_members)
    streams = iter(np.random.default_rng(seed).spawn(len(groups) + 4))
    for_factors, for_stocks, for_noise, for_lists = (next(streams) for _ in range(4))
    n_moves, n_planted = n_days - 1, sum(group.n_stocks for group in groups)
    daily = 1 / np.sqrt(_DAYS_A_YEAR)

    factors = garch_noise(for_factors, n_moves, 1 + len(SECTORS), garch, degrees_of_freedom)
    market = market_premium / _DAYS_A_YEAR + market_volatility * daily * factors[:, 0]
    sectors = for_stocks.permutation(np.arange(n_stocks) % len(SECTORS))
    betas = for_stocks.uniform(*market_beta, n_stocks)
    gammas = for_stocks.uniform(*sector_beta, n_stocks)
    volatilities = for_stocks.uniform(*own_volatility, n_stocks)
    volatilities[:n_planted] = group_volatility
    noise = [draw_noise(next(streams), n_moves, group, garch, degrees_of_freedom) for group in groups]
    noise.append(garch_noise(for_noise, n_moves, n_stocks - n_planted, garch, degrees_of_freedom))

    moves = volatilities * daily * np.concatenate(noise, axis=1)
    moves += betas * market[:, None]
    moves += gammas * (sector_volatility * daily * factors[:, 1:])[:, sectors]
    np.maximum(moves, _LEAST_RETURN, out=moves)
    np.maximum(market, _LEAST_RETURN, out=market)
    first_prices = for_stocks.uniform(20, 200, n_stocks)
    prices = first_prices * np.concatenate([np.ones((1, n_stocks)), np.cumprod(1 + moves, axis=0)])

    listed, member, delisting_returns = _lists(
        for_lists, n_days, n_stocks, n_planted, listed_late, delisted, part_time_members
    )
    prices[~listed] = np.nan
    returns = np.full_like(prices, np.nan)
    returns[1:] = prices[1:] / prices[:-1] - 1
    width = len(str(n_stocks - 1))
    planted = np.repeat(np.arange(len(groups)), [group.n_stocks for group in groups])
    return SyntheticMarket(
        dates=np.busday_offset(np.datetime64(first_day, "D"), np.arange(n_days), roll="forward"),
        tickers=tuple(f"S{stock:0{width}d}" for stock in range(n_stocks)),
        prices=prices,
        returns=returns,
        index_prices=100 * np.concatenate([[1.0], np.cumprod(1 + market)]),
        sectors=sectors,
        sector_names=SECTORS,
        member=member,
        delisting_returns=delisting_returns,
        groups=np.concatenate([planted, np.full(n_stocks - n_planted, -1)]).astype(np.int64),
    )


def null_market(seed: int, n_stocks: int = 450, n_days: int = 1260) -> SyntheticMarket:
    """One-factor stocks among which nobody can choose: the past of a stock says nothing about its future.

    All have beta 1, no sector factor, independent Student-t noise of 25 % a year and thus the same law: the expected
    return of each is the market premium. Any system that picks better stocks than chance has looked ahead.
    """
    return synthetic_market(
        n_stocks,
        n_days,
        market_beta=(1.0, 1.0),
        sector_beta=(0.0, 0.0),
        own_volatility=(0.25, 0.25),
        garch=(0.0, 0.0),  # with it volatility, and so the Sharpe ratio, would be predictable for a few weeks
        seed=seed,
    )


def planted_cycles(
    seed: int,
    *,
    pole_radius: float = 0.997,
    n_per_group: int = 60,
    n_days: int = 504,
    market_factor: float = 0.0,
) -> SyntheticMarket:
    """Two groups of equal stationary variance: 0 cycles of 10..30 days (AR(2)), 1 white Student-t noise.

    Args:
        seed: Of everything.
        pole_radius: Of the cycles, in (0, 1).
        n_per_group: Stocks of each group, at least 1.
        n_days: T, at least 3.
        market_factor: Beta of every stock to a market factor of 16 % a year; 0 is no factor.

    Raises:
        ValueError: If an argument is outside its range.
    """
    groups = [PlantedGroup("cycle", n_per_group, pole_radius), PlantedGroup("white", n_per_group)]
    return synthetic_market(
        2 * n_per_group,
        n_days,
        market_beta=(market_factor, market_factor),
        sector_beta=(0.0, 0.0),
        # Over 504 days the sample variance of such a cycle scatters far around its true value. Tails as fat as these
        # make that of the noise scatter too, so that realised volatility says little about the group.
        degrees_of_freedom=4.0,
        groups=groups,
        seed=seed,
    )


def _lists(
    generator: np.random.Generator,
    n_days: int,
    n_stocks: int,
    n_planted: int,
    listed_late: float,
    delisted: float,
    part_time_members: float,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], Array]:
    """``(T, A)`` whether listed and whether member, and ``(A,)`` delisting returns."""
    late, gone, part = generator.random((3, n_stocks)) < np.array([[listed_late], [delisted], [part_time_members]])
    outside = np.arange(n_stocks) >= n_planted
    half = n_days // 2
    first = np.where(late & outside, generator.integers(1, max(half, 2), n_stocks), 0)
    stop = np.where(gone & outside, generator.integers(half + 1, n_days, n_stocks), n_days)
    day = np.arange(n_days)[:, None]
    listed = (day >= first) & (day < stop)
    spells = np.sort(generator.random((2, n_stocks)), axis=0) * (stop - first - 1) + first
    joins, leaves = np.where(part & outside, spells, np.stack([first, stop]))
    member = listed & (day >= np.floor(joins)) & (day <= np.ceil(leaves))
    last_returns = generator.uniform(-0.6, 0.3, n_stocks)
    return listed, member, np.where(stop < n_days, last_returns, np.nan)


def _check_sizes(n_stocks: int, n_days: int, groups: Sequence[PlantedGroup]) -> None:
    if n_stocks < 1:
        raise ValueError(f"n_stocks must be at least 1, got {n_stocks}")
    if n_days < 3:
        raise ValueError(f"n_days must be at least 3, got {n_days}")
    n_planted = sum(group.n_stocks for group in groups)
    if n_planted > n_stocks:
        raise ValueError(f"n_stocks must be at least the {n_planted} of the planted groups, got {n_stocks}")


def _check_ranges(garch: tuple[float, float], degrees_of_freedom: float, *shares: float) -> None:
    if min(garch) < 0 or sum(garch) >= 1:
        raise ValueError(f"garch must be two numbers of at least 0 with a sum below 1, got {garch}")
    if degrees_of_freedom <= 2:
        raise ValueError(f"degrees_of_freedom must be above 2, where the variance is finite, got {degrees_of_freedom}")
    for name, share in zip(("listed_late", "delisted", "part_time_members"), shares, strict=True):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {share}")
