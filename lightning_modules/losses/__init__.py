"""Losses: modules that take states and what they are to tell: targets, labels, the next event, whose slice it is."""

from lightning_modules.losses.cce_minus import CCEMinusLoss
from lightning_modules.losses.coles import CoLES, recall_at
from lightning_modules.losses.cpc import CPC
from lightning_modules.losses.next_event import EventObjective, NextEvent, ObjectiveFactory
from lightning_modules.losses.supervised import Supervised

__all__ = ["CPC", "CCEMinusLoss", "CoLES", "EventObjective", "NextEvent", "ObjectiveFactory", "Supervised", "recall_at"]
