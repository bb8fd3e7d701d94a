"""Windows of daily returns to learn from, cut from the train window of a panel and split by time."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.epoch_sampler import numbers_of
from datamodules.price_panel import Panel

logger = logging.getLogger(__name__)


class ReturnWindows(Dataset):
    """Windows of L returns, for each of some last days and each of some stocks, ordered by day.

    Args:
        returns: ``(T, A) float64``, NaN where unknown.
        stocks: ``(S,)`` columns.
        stops: ``(W,)`` rows after the last days, each at least ``length``.
        length: L.
    """

    def __init__(
        self, returns: NDArray[np.float64], stocks: NDArray[np.int64], stops: NDArray[np.int64], length: int
    ) -> None:
        cut = np.stack([returns[stop - length : stop, stocks].T for stop in stops])  # (W, S, L)
        self._windows = torch.from_numpy(np.nan_to_num(cut, nan=0.0).astype(np.float32).reshape(-1, length))
        self._stocks = torch.from_numpy(np.tile(stocks, len(stops)))
        self._stops = torch.from_numpy(np.repeat(stops, len(stocks)))

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int | Sequence[int]) -> dict[str, Tensor]:
        return self.__getitems__(numbers_of(index))

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """A batch.

        Args:
            numbers: Numbers ``epoch * n + i`` of windows i in 0..n-1, as
                :class:`~datamodules.epoch_sampler.EpochSampler` yields them; -1, which fills a batch up where processes
                must have equally many, is left out.

        Returns:
            Of the B others, ``windows (B, L) float32``, 0 where unknown; ``stocks (B,)`` and ``stops (B,) int64``.
        """
        chosen = torch.tensor([number % len(self) for number in numbers if number >= 0], dtype=torch.int64)
        return {"windows": self._windows[chosen], "stocks": self._stocks[chosen], "stops": self._stops[chosen]}

    def everything(self) -> dict[str, Any]:
        """All windows in one batch."""
        return {"windows": self._windows, "stocks": self._stocks, "stops": self._stops}


def cut_windows(panel: Panel, length: int, validation_windows: int) -> tuple[ReturnWindows, ReturnWindows]:
    """Cut the train window, from its end backwards, into windows that do not overlap; hold out the last in time.

    Args:
        panel: Of it, only rows before ``train_stop`` are read.
        length: Returns in a window. That of the train window's first day is not used: it needs the day before.
        validation_windows: Held-out windows of each stock.

    Returns:
        Windows to train on and held out. If a stock has one window only, both are that one.

    Raises:
        ValueError: If none is left to train on, or no stock is eligible.
    """
    n_returns = panel.train_stop - panel.train_start - 1
    if length > n_returns:
        # Only networks that are trained read windows, and they refuse another length themselves.
        logger.warning(
            "window_length %d is longer than the %d returns of the train window: cut to it", length, n_returns
        )
        length = n_returns
    n_windows = n_returns // length
    stocks = panel.eligible_to_train()
    if len(stocks) == 0:
        raise ValueError(
            f"no stock of {len(panel.tickers)} is eligible on {panel.dates[panel.train_stop - 1]}: a member, with "
            "a return that day and on 95 % of the days of the train window"
        )
    stops = panel.train_stop - length * np.arange(n_windows)[::-1]
    logger.info("train window: %d of %d stocks, %d windows each", len(stocks), len(panel.tickers), n_windows)
    if n_windows == 1:
        both = ReturnWindows(panel.returns, stocks, stops, length)
        return both, both
    if n_windows <= validation_windows:
        raise ValueError(f"validation_windows {validation_windows} leaves none of the {n_windows} windows of a stock")
    train, held_out = np.split(stops, [-validation_windows])
    return ReturnWindows(panel.returns, stocks, train, length), ReturnWindows(panel.returns, stocks, held_out, length)
