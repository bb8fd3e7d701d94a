"""StockPricesDataModule: daily prices of many stocks to windows of returns and a panel for walk-forward tests."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from datamodules.epoch_sampler import EpochLoader, place_among, single_batch_loader
from datamodules.price_panel import Panel, aligned_index, delistings, membership, sector_places
from datamodules.price_rules import (
    Gaps,
    causal_returns,
    last_rows,
    published_selection,
    sessions,
    simple_returns,
    without_price_errors,
)
from datamodules.return_windows import ReturnWindows, cut_windows
from datamodules.sources.cells import TABLE_ENDINGS, Array, Days
from datamodules.sources.file_names import resolve_paths
from datamodules.sources.prices import Columns, PriceTable, read_index, read_prices
from datamodules.sources.universe import read_delistings, read_membership, read_sectors, read_tickers
from datamodules.walk_forward import Fold, periods_of

Batch = dict[str, Any]

_SAME_GROWTH = 1e-3
"""Largest difference of log returns over the train window that rounding of adjusted prices may make."""

logger = logging.getLogger(__name__)


class StockPricesDataModule(LightningDataModule):
    """Daily prices of stocks as windows to learn from and as one panel to test on.

    B batch, L ``window_length``, T days, A stocks.

    * Train batch: ``windows (B, L) float32`` simple returns, 0 where unknown; ``stocks (B,) int64`` column in the
      panel; ``stops (B,) int64`` row after the window's last day. Windows do not overlap, end at ``train_stop`` and go
      back from there (early days are lost), for stocks that are eligible by the train window alone: a member with a
      price on its last day and a return on at least 95 % of its days. The last ``validation_windows`` in time are
      held out, so no day is in both.
    * Validation: one batch, the held-out windows under the same names beside the panel as it was known at
      ``train_stop``. Test and prediction: one batch, the panel, which goes on after the test to the last day there
      is. Keys of a panel: see :class:`datamodules.price_panel.Panel`.

    Of several processes each trains on windows of its own, of which the last batch may hold none; batches of a panel
    are the same in all.

    The train window is every session from ``train_start`` to before ``test_start``, less the last ``purge_days``; the
    test is every session from ``test_start`` to ``test_end``, both included.

    Source: arXiv 2308.07944 as read in spec section 2. Departures: no day is deleted for all stocks, gaps are filled
    on prices without knowing their length, and windows are split by time, not at random; ``gaps="published"``
    restores the first two.

    Args:
        paths: Price files, globs, or ``bundled:us20``; CSV, gzipped CSV or Parquet. Several may split the table.
        date_column: Column of dates, in all files of prices and of the index.
        ticker_column: Column of tickers, for long files; None is wide files, where each other column is a ticker.
        price_column: Column of prices, for long files.
        index_paths: File of an index, or ``bundled:us20_index``.
        index_column: Column of the index; None if its file has no other beside the dates.
        index_is_price: Whether the index leaves out dividends, as the levels of ^GSPC do; reports then say so wherever
            it stands beside portfolios.
        sectors_path: Table ``ticker, sector``.
        tickers_path: Text file of the tickers to read, one a line; ``#`` begins a comment. None reads all.
        membership_path: Table ``ticker, start, end``: spells in the universe, both days included, no end while it
            lasts. None: always a member.
        delistings_path: Table ``ticker, date, return``: simple return of the first session after the last price.
        check_paths: Second source of the same prices and layout, such as ``close`` beside ``adj_close``; a move that
            is much smaller there is replaced and flagged, see :func:`datamodules.price_rules.without_price_errors`.
        max_disagreement: By how much returns of the two may differ, above 0.
        exclude: Tickers to leave out.
        train_start: First day of the train window; None is the first session.
        test_start: First day of the test.
        test_end: Last day of the test; None is the last session.
        purge_days: Sessions left out between train and test, at least 0.
        gaps: ``causal``: no day is deleted, see :func:`datamodules.price_rules.causal_returns`. ``published``: see
            :func:`datamodules.price_rules.published_selection`, applied to ``train_start`` .. ``test_end``; other
            days are cut off.
        max_fill_days: Sessions over which a price is carried, and days that the index may lack, at least 0.
        window_length: L, at least 1.
        validation_windows: Held-out windows of each stock, at least 1. If there is only one, train and validation
            share it, with a flag.
        batch_size: Windows in a train batch, at least 1.
        num_workers: Worker processes of the train loader.
        seed: Of the order of epochs.

    Raises:
        ValueError: If an argument is outside its range; on first use, if the files cannot serve (in one line with
            file, column and row) or do not hold the periods.
        FileNotFoundError: On first use, if there is no such file.
    """

    def __init__(
        self,
        *,
        paths: str | list[str],
        test_start: str,
        date_column: str = "Date",
        ticker_column: str | None = None,
        price_column: str | None = None,
        index_paths: str | list[str] | None = None,
        index_column: str | None = None,
        index_is_price: bool = False,
        sectors_path: str | None = None,
        tickers_path: str | None = None,
        membership_path: str | None = None,
        delistings_path: str | None = None,
        check_paths: str | list[str] | None = None,
        max_disagreement: float = 0.25,
        exclude: Sequence[str] = (),
        train_start: str | None = None,
        test_end: str | None = None,
        purge_days: int = 0,
        gaps: Gaps = "causal",
        max_fill_days: int = 5,
        window_length: int = 100,
        validation_windows: int = 1,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 42,
    ) -> None:
        if gaps not in ("causal", "published"):
            raise ValueError(f"gaps must be one of 'causal', 'published', got {gaps!r}")
        least = {
            "purge_days": (purge_days, 0),
            "max_fill_days": (max_fill_days, 0),
            "window_length": (window_length, 1),
            "validation_windows": (validation_windows, 1),
            "batch_size": (batch_size, 1),
            "num_workers": (num_workers, 0),
        }
        for name, (value, minimum) in least.items():
            if value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}")
        if not max_disagreement > 0:
            raise ValueError(f"max_disagreement must be above 0, got {max_disagreement}")
        first_day = None if train_start is None else _day("train_start", train_start)
        test_day = _day("test_start", test_start)
        last_day = None if test_end is None else _day("test_end", test_end)
        if first_day is not None and first_day >= test_day:
            raise ValueError(f"test_start {test_day} must come after train_start {first_day}")
        if last_day is not None and last_day < test_day:
            raise ValueError(f"test_end {last_day} must not come before test_start {test_day}")
        columns = Columns(date_column, ticker_column, price_column)
        super().__init__()
        self._paths, self._index_paths, self._check_paths = paths, index_paths, check_paths
        self._columns = columns
        self._train_start, self._test_start, self._test_end = first_day, test_day, last_day
        self._index_column, self._index_is_price = index_column, index_is_price
        self._sectors_path, self._tickers_path = sectors_path, tickers_path
        self._membership_path, self._delistings_path = membership_path, delistings_path
        self._max_disagreement = max_disagreement
        self._exclude = tuple(exclude)
        self._purge_days = purge_days
        self._gaps: Gaps = gaps
        self._max_fill_days = max_fill_days
        self._window_length = window_length
        self._validation_windows = validation_windows
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._seed = seed
        self._panel: Panel | None = None
        self._windows: tuple[ReturnWindows, ReturnWindows] | None = None

    def setup(self, stage: str) -> None:
        """Read the files and cut the windows, once."""
        self._both_windows()

    def train_dataloader(self) -> DataLoader:
        """Windows in an order that is a function of (seed, epoch) alone."""
        train, _ = self._both_windows()
        return EpochLoader(
            train,
            rows=self._batch_size,
            shuffled=True,
            seed=self._seed,
            **place_among(self.trainer),
            num_workers=self._num_workers,
        )

    def val_dataloader(self) -> DataLoader:
        """One batch: held-out windows, and the panel up to the end of the train window."""
        _, held_out = self._both_windows()
        return single_batch_loader(self.panel.before(self.panel.train_stop).batch() | held_out.everything())

    def test_dataloader(self) -> DataLoader:
        """One batch: the panel."""
        return single_batch_loader(self.panel.batch())

    def predict_dataloader(self) -> DataLoader:
        """One batch: the panel."""
        return single_batch_loader(self.panel.batch())

    @property
    def panel(self) -> Panel:
        """Every day and stock; the first access reads the files."""
        if self._panel is None:
            self._panel = self._read_panel()
            logger.info("panel: %d sessions, %d stocks", len(self._panel.dates), len(self._panel.tickers))
            for flag in self._panel.flags:
                logger.warning("%s", flag)
        return self._panel

    @property
    def n_stocks(self) -> int:
        """A."""
        return len(self.panel.tickers)

    def report_facts(self) -> dict[str, Any]:
        """Files, split and flags; plain values for JSON."""
        return {
            "prices": [path.name for path in resolve_paths(self._paths, endings=TABLE_ENDINGS)],
            "split": self._split(),
            "n_stocks": self.n_stocks,
            "flags": list(self.panel.flags),
        }

    def state_dict(self) -> dict[str, Any]:
        """What the model was trained on: the split, and what each stock grew by in the train window.

        Growth, not prices: an adjusted price of long ago changes with every later dividend, its returns do not.
        """
        tickers, growth = self._train_growth()
        return {"split": json.dumps(self._split(), sort_keys=True), "tickers": tickers, "train_growth": growth}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a checkpoint was trained on the train window that is here.

        Raises:
            ValueError: If it was split otherwise, or trained on other tickers or returns.
        """
        there, here = json.loads(state_dict["split"]), self._split()
        for name, value in here.items():
            if there.get(name) != value:
                raise ValueError(f"checkpoint was trained with {name} {there.get(name)!r}, here it is {value!r}")
        tickers, growth = self._train_growth()
        if state_dict["tickers"] != tickers:
            other = sorted(set(state_dict["tickers"]) ^ set(tickers))
            raise ValueError(
                f"checkpoint was trained on {len(state_dict['tickers'])} tickers, here {len(tickers)} have a price in "
                f"the train window; {len(other)} are not in both, such as {', '.join(other[:3])}"
            )
        off = np.abs(np.subtract(state_dict["train_growth"], growth))
        if off.max(initial=0) > _SAME_GROWTH:
            worst = int(off.argmax())
            raise ValueError(
                f"checkpoint was trained on other prices: {tickers[worst]} grew by a log return of "
                f"{state_dict['train_growth'][worst]:.4f} in the train window there, {growth[worst]:.4f} here"
            )

    def _split(self) -> dict[str, Any]:
        panel = self.panel
        return {
            "first train day": str(panel.dates[panel.train_start]),
            "last train day": str(panel.dates[panel.train_stop - 1]),
            "first test day": str(panel.dates[panel.test_start]),
            "gaps": self._gaps,
            "max_fill_days": self._max_fill_days,
            "window_length": self._window_length,
            "validation_windows": self._validation_windows,
        }

    def _train_growth(self) -> tuple[list[str], list[float]]:
        """Tickers with a price in the train window, and the log return of each from its first one to its last."""
        panel = self.panel
        prices = panel.prices[panel.train_start : panel.train_stop]
        observed = ~np.isnan(prices)
        columns = np.flatnonzero(observed.any(0))
        first = prices[observed.argmax(0)[columns], columns]
        last = prices[len(prices) - 1 - observed[::-1].argmax(0)[columns], columns]
        return [panel.tickers[column] for column in columns], np.log(last / first).tolist()

    def _read_panel(self) -> Panel:
        tickers = None if self._tickers_path is None else read_tickers(Path(self._tickers_path))
        paths = resolve_paths(self._paths, endings=TABLE_ENDINGS)
        name = paths[0].name if len(paths) == 1 else "paths"
        table, flags = sessions(read_prices(paths, self._columns, tickers=tickers, exclude=self._exclude), name)
        prices, more = self._mended(table, name)
        flags += more
        dates, names = table.dates, table.tickers
        periods, more = self._periods(dates)
        flags += more

        index: Array | None = None
        if self._index_paths is not None:
            # The return of the first day of the train window starts from the close before it.
            index, more = self._index_on(dates, max(periods.train_start - 1, 0), self._index_paths)
            flags += more
        member = np.ones(prices.shape, dtype=bool)
        if self._membership_path is not None:
            path = _table("membership_path", self._membership_path)
            member, more = membership(dates, names, read_membership(path), path.name)
            flags += more
        terminal = np.full(len(names), np.nan)
        if self._delistings_path is not None:
            path = _table("delistings_path", self._delistings_path)
            terminal, more = delistings(dates, names, prices, read_delistings(path), path.name)
            flags += more
        sectors = {} if self._sectors_path is None else read_sectors(_table("sectors_path", self._sectors_path))

        if self._gaps == "published":
            start, stop = periods.train_start, periods.test_stop
            rows, columns = published_selection(prices[start:stop])
            rows += start
            flags.append(
                f"gaps='published' looks ahead, over the test too: {len(columns)} of {len(names)} stocks and "
                f"{len(rows)} of {stop - start} days kept"
            )
            dates, names = dates[rows], tuple(names[column] for column in columns)
            prices, member = prices[np.ix_(rows, columns)], member[np.ix_(rows, columns)]
            index, terminal = None if index is None else index[rows], terminal[columns]
            # A stock that was delisted has a price on every day kept, and its last return is not among them.
            terminal = np.where(last_rows(prices) + 1 < len(dates), terminal, np.nan)
            periods, _ = self._periods(dates)
            returns = simple_returns(prices)
        else:
            returns = causal_returns(prices, self._max_fill_days)
        if (periods.train_stop - periods.train_start - 1) // self._window_length == 1:
            flags.append(
                f"the train window holds one window of {self._window_length} days: train and validation share it"
            )
        places, sector_names = sector_places(names, sectors)
        return Panel(
            dates=dates,
            tickers=names,
            prices=prices,
            returns=returns,
            member=member,
            index_prices=index,
            sectors=places,
            sector_names=sector_names,
            delisting_returns=terminal,
            **periods._asdict(),
            flags=tuple(flags),
            index_is_price=self._index_is_price,
        )

    def _index_on(self, dates: Days, used: int, paths: str | list[str]) -> tuple[Array, list[str]]:
        files = resolve_paths(paths, argument="index_paths", endings=TABLE_ENDINGS)
        try:
            known = read_index(files, self._columns.date, self._index_column)
            return aligned_index(dates, *known, self._max_fill_days, files[0].name, used)
        except ValueError as error:
            if "bundled:" not in str(paths):
                raise
            # Prices of one's own beside the index of a config that was written for bundled ones.
            raise ValueError(
                f"{error}; index_paths is the bundled index {paths!r}: give one of these prices, or index_paths: null "
                "for none"
            ) from error

    def _periods(self, dates: Days) -> tuple[Fold, list[str]]:
        return periods_of(
            dates,
            train_start=self._train_start,
            test_start=self._test_start,
            test_end=self._test_end,
            purge_days=self._purge_days,
        )

    def _mended(self, table: PriceTable, name: str) -> tuple[Array, list[str]]:
        if self._check_paths is None:
            return table.prices, []
        paths = resolve_paths(self._check_paths, argument="check_paths", endings=TABLE_ENDINGS)
        check = read_prices(paths, self._columns)
        names = (name, paths[0].name if len(paths) == 1 else "check_paths")
        return without_price_errors(table, check, self._max_disagreement, names)

    def _both_windows(self) -> tuple[ReturnWindows, ReturnWindows]:
        if self._windows is None:
            self._windows = cut_windows(self.panel, self._window_length, self._validation_windows)
        return self._windows


def _day(name: str, value: object) -> np.datetime64:
    try:
        day = np.datetime64(str(value), "D")
    except ValueError:
        day = np.datetime64("NaT", "D")
    if np.isnat(day):
        raise ValueError(f"{name} must be a date such as 2015-01-31, got {value!r}")
    return day


def _table(argument: str, path: str) -> Path:
    return resolve_paths(path, argument=argument, endings=TABLE_ENDINGS)[0]
