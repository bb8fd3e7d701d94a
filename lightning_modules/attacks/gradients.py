"""Gradients with respect to series, and what is done to them series by series.

B series, T steps, C channels. A norm runs over all time and channel positions of one series (trap T13).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Direction = Literal["sign", "unit"]


def gradient(values: Tensor, x: Tensor, weights: Tensor | None) -> Tensor:
    """``grad_x sum_b w_b values_b``, zero where the values do not depend on ``x``: ``(B, T, C)``."""
    total = values.sum() if weights is None else (weights * values).sum()
    if not total.requires_grad:
        return torch.zeros_like(x)
    (found,) = torch.autograd.grad(total, x, allow_unused=True)
    return torch.zeros_like(x) if found is None else found


def unit(vectors: Tensor) -> Tensor:
    """Each series' vector over all ``T * C`` positions with Euclidean norm 1; 0 stays 0. ``(B, T, C)``.

    Scaled by its largest entry first: squares of gradients of a confident network underflow in float32.
    """
    largest = vectors.abs().amax(dim=(1, 2), keepdim=True)
    scaled = vectors / torch.where(largest > 0, largest, torch.ones_like(largest))
    norm = torch.linalg.vector_norm(scaled, dim=(1, 2), keepdim=True)
    return scaled / torch.where(norm > 0, norm, torch.ones_like(norm))


def unit_l1(direction: Tensor) -> Tensor:
    """Over the l1 norm of each series, 0 staying 0; scaled first, as in :func:`unit`."""
    largest = direction.abs().amax(dim=(1, 2), keepdim=True)
    scaled = direction / torch.where(largest > 0, largest, torch.ones_like(largest))
    norm = scaled.abs().sum(dim=(1, 2), keepdim=True)
    return scaled / torch.where(norm > 0, norm, torch.ones_like(norm))


def move(direction: Direction) -> Callable[[Tensor], Tensor]:
    """From a direction to climb to a step of length 1 along it.

    Raises:
        ValueError: If ``direction`` is neither ``"sign"`` nor ``"unit"``.
    """
    moves: dict[str, Callable[[Tensor], Tensor]] = {"sign": torch.sign, "unit": unit}
    if direction not in moves:
        raise ValueError(f"direction must be 'sign' or 'unit', got {direction!r}")
    return moves[direction]


def choose(chosen: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """``yes`` or ``no``, both ``(B, T, C)``, by ``chosen`` ``(B,) bool``."""
    return torch.where(chosen[:, None, None], yes, no)
