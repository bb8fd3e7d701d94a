"""A mean over an epoch that is the same for any number of processes, and survives a stop amid the epoch."""

from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric


class EpochMean(Metric):
    """Weighted mean of what steps report.

        mean = sum_b w_b x_b / sum_b w_b    over all batches b of all processes

    Both sums are float64 and persistent: a checkpoint written amid an epoch holds them. NaN where all weights are 0.
    """

    SUMS: ClassVar = ("total", "weight")
    full_state_update = False
    higher_is_better = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in self.SUMS:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum", persistent=True)

    def update(self, value: Tensor | float, weight: Tensor | float = 1.0) -> None:
        """Add a value that stands for ``weight`` rows; one of weight 0 is not read, and may be NaN.

        Args:
            value: Scalar.
            weight: At least 0.
        """
        value = torch.as_tensor(value, dtype=torch.float64, device=self.total.device).detach()
        weight = torch.as_tensor(weight, dtype=torch.float64, device=self.total.device).detach()
        self.total += torch.where(weight > 0, value * weight, torch.zeros_like(value))
        self.weight += weight

    def compute(self) -> Tensor:
        """The mean, float32 as loggers and schedulers have it."""
        return (self.total / self.weight).float()
