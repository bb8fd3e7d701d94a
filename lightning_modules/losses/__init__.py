"""Losses: modules that take states, the item table and targets."""

from lightning_modules.losses.cce_minus import CCEMinusLoss

__all__ = ["CCEMinusLoss"]
