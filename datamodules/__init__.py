"""Data modules: reading, splitting and batching of sequential data."""

from datamodules.interactions import InteractionsDataModule
from datamodules.stock_prices import StockPricesDataModule

__all__ = ["InteractionsDataModule", "StockPricesDataModule"]
