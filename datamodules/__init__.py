"""Data modules: reading, splitting and batching of sequential data."""

from datamodules.interactions import InteractionsDataModule

__all__ = ["InteractionsDataModule"]
