"""Balls about the clean series that bound a perturbation.

B series, T steps, C channels. A norm runs over all time and channel positions of one series, never over the batch.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from lightning_modules.attacks.series_noise import SeriesNoise

Strength = float | Tensor
"""A number for all series or ``(B,)`` floats, one a series."""


def per_series(name: str, value: Strength, x: Tensor) -> Tensor:
    """A strength as ``(B, 1, 1)`` in the dtype of ``x``.

    Args:
        name: What it is, for the error.
        value: Number or ``(B,) float``.
        x: ``(B, T, C) float``.

    Raises:
        ValueError: If it has another shape, is negative or not finite.
    """
    strength = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    if strength.shape not in ((), (len(x),)):
        raise ValueError(f"{name} must be a number or one for each of {len(x)} series, got {tuple(strength.shape)}")
    if not bool((strength.isfinite() & (strength >= 0)).all()):
        worst = strength[~(strength.isfinite() & (strength >= 0))].reshape(-1)[0].item()
        raise ValueError(f"{name} must be finite and at least 0, got {worst}")
    return strength.expand(len(x)).reshape(-1, 1, 1)


def centred(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` less the mean of each channel over the valid steps, 0 at padded steps: ``(B, T, C)``."""
    if mask is None:
        return x - x.mean(dim=1, keepdim=True)
    valid = mask[..., None]
    mean = (x * valid).sum(dim=1, keepdim=True) / valid.sum(dim=1, keepdim=True).clamp(min=1)
    return (x - mean) * valid


class Projection(ABC):
    """Ball ``||delta||_p <= radius``, ``delta`` being the distance from the clean series, not from the last iterate.

    Args:
        radius: ``eta``, in units of the series, or as a fraction; above 0. None where every call of the attack
            gives its own.
        relative: Read ``radius`` as a fraction of the p-norm of the series about its own channel means.

    Raises:
        ValueError: If ``radius`` is not a finite positive number.
    """

    order: ClassVar[float]

    def __init__(self, radius: float | None = None, *, relative: bool = False) -> None:
        if radius is not None and not 0 < radius < float("inf"):
            raise ValueError(f"radius of {type(self).__name__} must be finite and above 0, got {radius}")
        self.radius = radius
        self.relative = relative

    def radii(self, x: Tensor, mask: Tensor | None, radius: Strength | None = None) -> Tensor:
        """Radius of each series in its own units, ``(B, 1, 1)``.

        Args:
            x: ``(B, T, C) float`` clean series.
            mask: ``(B, T) bool`` or None.
            radius: Takes the place of the ball's own; float or ``(B,)``.

        Raises:
            ValueError: If there is no radius, or it is negative or not finite.
        """
        chosen = self.radius if radius is None else radius
        if chosen is None:
            raise ValueError(f"{type(self).__name__} has no radius: give one to the projection or to the call")
        radii = per_series("radius", chosen, x)
        return radii * self.norm(centred(x, mask)) if self.relative else radii

    def norm(self, delta: Tensor) -> Tensor:
        """``||delta||_p`` of each series, ``(B, 1, 1)``."""
        return torch.linalg.vector_norm(delta, ord=self.order, dim=(1, 2), keepdim=True)

    def project(self, delta: Tensor, radii: Tensor) -> Tensor:
        """``delta * min(1, radius / ||delta||_p)``, ``(B, T, C)``."""
        return self.shorten(delta, radii)

    def shorten(self, delta: Tensor, radii: Tensor) -> Tensor:
        """``delta * min(1, radius / ||delta||_p)``, which stays in every subspace that ``delta`` lies in."""
        norm = self.norm(delta)
        # multiplied only where it is outside, so that a perturbation inside stays as it is to the last bit
        return torch.where(norm > radii, delta * (radii / norm), delta)

    def _scaled(self, direction: Tensor, radii: Tensor, noise: SeriesNoise, steps: Tensor | None) -> Tensor:
        """``radius * u^(1/n)`` times a direction, in the n dimensions of the positions that may move."""
        n: Tensor | int = direction[0].numel()
        if steps is not None:
            direction = direction * steps[..., None]
            n = (steps.sum(dim=1) * direction.shape[2]).clamp(min=1).reshape(-1, 1, 1)
        tiny = torch.finfo(direction.dtype).tiny  # nothing may move
        return direction / self.norm(direction).clamp(min=tiny) * radii * noise.uniform(1, 1) ** (1 / n)

    @abstractmethod
    def sample(self, x: Tensor, radii: Tensor, noise: SeriesNoise, steps: Tensor | None = None) -> Tensor:
        """A perturbation uniform in the ball, ``(B, T, C)``.

        Args:
            x: ``(B, T, C) float`` clean series.
            radii: ``(B, 1, 1)``.
            noise: Of each series.
            steps: ``(B, T) bool`` that may move, None for all: the ball is that of their positions alone, and the draw
                does not depend on how far a series is padded.
        """


class Linf(Projection):
    """``|delta| <= radius`` at every position: a clamp, which for this norm is also the nearest point."""

    order = float("inf")

    def project(self, delta: Tensor, radii: Tensor) -> Tensor:
        """``clamp(delta, -radius, radius)``, ``(B, T, C)``."""
        return delta.clamp(min=-radii, max=radii)

    def sample(self, x: Tensor, radii: Tensor, noise: SeriesNoise, steps: Tensor | None = None) -> Tensor:
        """Uniform in the cube; what may not move is put back by the attack."""
        return (2 * noise.uniform(*x.shape[1:]) - 1) * radii


class L2(Projection):
    """``sqrt(sum delta^2) <= radius``."""

    order = 2.0

    def sample(self, x: Tensor, radii: Tensor, noise: SeriesNoise, steps: Tensor | None = None) -> Tensor:
        """A direction uniform on the sphere times ``radius * u^(1/n)`` in n dimensions."""
        return self._scaled(noise.normal(*x.shape[1:]), radii, noise, steps)


class L1(Projection):
    """``sum |delta| <= radius``, by scaling (not the Euclidean projection, which would make most steps zero)."""

    order = 1.0

    def sample(self, x: Tensor, radii: Tensor, noise: SeriesNoise, steps: Tensor | None = None) -> Tensor:
        """Exponential magnitudes with random signs, scaled to the ball."""
        magnitude = -noise.uniform(*x.shape[1:]).log() * noise.signs(*x.shape[1:])
        return self._scaled(magnitude, radii, noise, steps)
