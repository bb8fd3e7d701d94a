"""Objectives that join gradients in place of losses: NormSum and HyperCone.

B series, T steps, C channels. Source: spec of the concealed attack, section 4.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.attacks.gradients import gradient, unit
from lightning_modules.attacks.objectives import Objective, Terms


@dataclass(frozen=True, eq=False)
class GradientObjective(Objective, ABC):
    """Base of the rules that join the gradients of both losses.

    The direction is the gradient of no function, so the objective has no value of its own. Steppers that compare values
    (``keep="best"`` too) compare ``L_c + alpha L_d``, without ``alpha`` ``L_c + L_d``. The specification names no value
    for these rules; this one is our choice, being the sum that both terms of the rule climb.
    """

    has_value = False

    @abstractmethod
    def combine(self, class_gradient: Tensor, detector_gradient: Tensor, alpha: Tensor | None) -> Tensor:
        """Direction ``(B, T, C)`` from both gradients."""

    def values(self, terms: Terms) -> Tensor:
        """``L_c + alpha L_d``, ``(B,)``: what steppers compare."""
        return terms.class_loss + (terms.hiding if terms.alpha is None else terms.weighted_by_alpha(terms.hiding))

    def direction(self, terms: Terms) -> tuple[Tensor | None, Tensor]:
        """The rule on the two gradients; the networks share no graph, so this is one backward through each."""
        towards_error = terms.clean(gradient(terms.class_loss, terms.x, None))
        towards_hiding = terms.clean(gradient(terms.hiding, terms.x, None))
        joined = self.combine(towards_error, towards_hiding, terms.alpha)
        return None, joined if terms.weights is None else joined * terms.weights[:, None, None]


@dataclass(frozen=True, eq=False)
class NormSum(GradientObjective):
    """Direction ``u(grad L_c) + alpha u(grad L_d)``, ``u`` of unit norm for each series.

    Args:
        alpha: At least 0.
    """

    alpha: float = 1.0

    def combine(self, class_gradient: Tensor, detector_gradient: Tensor, alpha: Tensor | None) -> Tensor:
        """Add the unit vectors."""
        assert alpha is not None
        return unit(class_gradient) + alpha[:, None, None] * unit(detector_gradient)


@dataclass(frozen=True, eq=False)
class HyperCone(GradientObjective):
    """The classifier's gradient projected on the cone about the detectors' gradient.

    With ``g = grad L_c``, ``a = grad L_d``, ``phi`` their angle, ``a^`` and ``e^`` unit vectors along ``a`` and along
    the part of ``g`` orthogonal to it: ``g`` if ``phi <= theta`` or ``a = 0``, 0 if ``phi >= theta + pi/2``, else
    ``|g| cos(phi - theta) (cos(theta) a^ + sin(theta) e^)``, the nearest point of the cone.

    Args:
        theta: Half-angle in radians, inside 0..pi/2.

    Raises:
        ValueError: If ``theta`` lies outside.
    """

    theta: float = math.pi / 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.theta <= math.pi / 2:
            raise ValueError(f"theta of HyperCone must lie in 0..pi/2 radians, got {self.theta}")

    def combine(self, class_gradient: Tensor, detector_gradient: Tensor, alpha: Tensor | None) -> Tensor:
        """Project; the length is that of ``g``'s projection, in units of ``|g|``'s largest entry."""
        axis = unit(detector_gradient)
        largest = class_gradient.abs().amax(dim=(1, 2), keepdim=True)
        scaled = class_gradient / torch.where(largest > 0, largest, torch.ones_like(largest))
        along = (scaled * axis).sum(dim=(1, 2), keepdim=True)
        across = scaled - along * axis
        width = torch.linalg.vector_norm(across, dim=(1, 2), keepdim=True)
        angle = torch.atan2(width, along)
        # |g| cos(phi - theta) without the angle: nothing is divided by cos(phi), which is 0 for orthogonal gradients
        length = along * math.cos(self.theta) + width * math.sin(self.theta)
        projected = length * (math.cos(self.theta) * axis + math.sin(self.theta) * unit(across))
        projected = torch.where(angle >= self.theta + math.pi / 2, torch.zeros_like(projected), projected)
        inside = (angle <= self.theta) | (axis == 0).all(dim=2, keepdim=True).all(dim=1, keepdim=True)
        return torch.where(inside, class_gradient, projected * largest)
