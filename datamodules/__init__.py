"""Data modules: reading, splitting and batching of sequential data."""

from datamodules.event_sequences import EventSequencesDataModule
from datamodules.interactions import InteractionsDataModule
from datamodules.stock_prices import StockPricesDataModule
from datamodules.time_series import TimeSeriesDataModule

__all__ = ["EventSequencesDataModule", "InteractionsDataModule", "StockPricesDataModule", "TimeSeriesDataModule"]
