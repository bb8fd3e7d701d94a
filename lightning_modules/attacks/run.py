"""One attack on one batch, as a stepper sees it: points are evaluated, and kept where they may go.

B series, T steps, C channels, K' logits, M detectors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_modules.attacks.constraints import Ball
from lightning_modules.attacks.frozen_networks import Network, takes_mask
from lightning_modules.attacks.gradients import choose
from lightning_modules.attacks.objectives import Terms
from lightning_modules.attacks.projections import Strength, per_series
from lightning_modules.attacks.series_noise import SeriesNoise
from lightning_modules.attacks.victims import Role, check_labels, check_outputs, check_shape

if TYPE_CHECKING:
    from lightning_modules.attacks.engine import Attack

ROUNDS = 50
"""Projections in turn, after which a perturbation is off its subspace by less than a thousandth of its norm."""

Networks = tuple[Network, Network, list[Network]]
"""Victim, network that gives the gradients, detectors."""


@dataclass
class Evaluation:
    """What is known of one point.

    Attributes:
        logits: ``(B, K') float`` of the victim.
        detector_logits: ``(M, B) float``.
        objective_value: ``(B,) float``; None for an objective that joins gradients, where nothing compares values.
        direction: ``(B, T, C) float`` to climb; None where it was not asked for.
    """

    logits: Tensor
    detector_logits: Tensor
    objective_value: Tensor | None
    direction: Tensor | None

    @property
    def value(self) -> Tensor:
        """The objective's value, for steppers that use it."""
        assert self.objective_value is not None
        return self.objective_value

    @property
    def climb(self) -> Tensor:
        """The direction, for steppers that use it."""
        assert self.direction is not None
        return self.direction


def check_series(x: Tensor, y: Tensor, mask: Tensor | None) -> None:
    """Refuse a batch that no attack can begin from.

    Args:
        x: ``(B, T, C) float`` clean series, finite at valid steps.
        y: ``(B,) int64`` classes.
        mask: ``(B, T) bool`` with a valid step in each series, or None.

    Raises:
        ValueError: If an argument has another shape, dtype or value.
    """
    for name, value in (("x", x), ("y", y), ("mask", mask)):
        if not isinstance(value, Tensor) and not (name == "mask" and value is None):
            raise ValueError(f"{name} must be a torch.Tensor, got {type(value).__module__}.{type(value).__name__}")
    if x.ndim != 3 or 0 in x.shape or not x.is_floating_point():
        raise ValueError(f"x must be floating of shape (B, T, C), each at least 1, got {tuple(x.shape)} {x.dtype}")
    if y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise ValueError(f"y must be int64 of shape ({len(x)},), got {tuple(y.shape)} {y.dtype}")
    if mask is not None:
        if mask.shape != x.shape[:2] or mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool of shape {(*x.shape[:2],)}, got {(*mask.shape,)} {mask.dtype}")
        if not bool(mask.any(dim=1).all()):
            row = int((~mask.any(dim=1)).nonzero()[0])
            raise ValueError(f"mask must leave each series a valid step, got none for series {row}")
    finite = x.isfinite().all(dim=2) if mask is None else x.isfinite().all(dim=2) | ~mask
    if not bool(finite.all()):
        row, time = (~finite).nonzero()[0].tolist()
        raise ValueError(f"x must be finite, got {x[row, time].tolist()} in series {row} at step {time}")


class Run:
    """One attack on one batch: what a stepper may ask.

    Attributes:
        ball: Projection with its radii about the clean series ``ball.x0``.
        mask: ``(B, T) bool`` or None.
        steps: ``(B, T) bool`` that may move: valid ones that no constraint holds fast; None for all.
        step: ``(B, 1, 1) float``.
        n_steps: N.
        starts_at_random: Whether a random point of the ball begins the attack.
        noise: Random numbers of each series.
    """

    def __init__(
        self,
        attack: "Attack",
        networks: Networks,
        x: Tensor,
        y: Tensor,
        mask: Tensor | None,
        noise: SeriesNoise,
        strengths: Mapping[str, Strength | None],
        weights: Tensor | None,
    ) -> None:
        self._attack = attack
        self._victim, self._source, self._detectors = networks
        self._labels, self._weights = y, weights
        self._source_logits: Tensor | None = None  # of the first point, the clean series or the start
        # asked once, not in every step: a signature is slow to read
        self._take_mask = {id(network): takes_mask(network) for network in (*networks[:2], *networks[2])}
        self.mask, self.n_steps, self.noise = mask, attack.n_steps, noise
        self.steps = mask
        for constraint in attack.constraints:
            held = constraint.held(x)
            if held is not None:
                moving = (~held).expand(x.shape[:2])
                self.steps = moving if self.steps is None else self.steps & moving
        self._movable = None if self.steps is None else self.steps[..., None]
        self._subspaces = [one for one in attack.constraints if one.is_subspace]
        self._beside = [one for one in attack.constraints if not one.is_subspace and one.held(x) is None]
        if weights is not None:
            weighted = (weights > 0)[:, None, None]
            self._movable = weighted if self._movable is None else self._movable & weighted
        self.starts_at_random = attack.random_start
        radii = None if attack.projection is None else attack.projection.radii(x, mask, strengths["radius"])
        self.ball = Ball(attack.projection, radii, x)
        self.step = per_series("step", attack.stepper.length(strengths["step"], radii, attack.n_steps), x)
        alpha = getattr(attack.objective, "alpha", None) if strengths["alpha"] is None else strengths["alpha"]
        self._alpha = None if alpha is None else per_series("alpha", alpha, x).flatten()
        self._hides = attack.hides(alpha)
        self.n_bad = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.n_zero = torch.zeros_like(self.n_bad)
        self.n_gradients = 0

    def keep_clean(self, x: Tensor) -> Tensor:
        """``x`` with the clean values at padded and held steps and in series of weight 0."""
        return x if self._movable is None else torch.where(self._movable, x, self.ball.x0)

    def confine(self, x: Tensor) -> Tensor:
        """Into the ball about the clean series, through the constraints, and into the ball once more.

        What must lie in a subspace goes there first, so that the ball is not spent on what is dropped, and is then
        shortened as a whole: a clamp would leave the subspace. Where bounds stand beside it, shortening would leave
        nothing of a series that touches one: :data:`ROUNDS` of projections on subspace, bounds and ball in turn come
        to a point of all, but for the last digits of the subspace, which has the first word.
        """
        x = self.keep_clean(x)
        if self._subspaces:
            x = self._drop(x)
            if not self._beside:
                return self.keep_clean(self.ball.shorten(x))
            for _ in range(ROUNDS):
                x = self._drop(self._inside(x))
            return self.keep_clean(self._inside(x))
        x = self.ball.project(x)
        for constraint in self._attack.constraints:
            x = constraint.apply(x, self.ball, self.steps)
        if self._attack.constraints:
            x = self.ball.project(self.keep_clean(x))
        return self.keep_clean(x)  # x0 + (x0 - x0) is x0 up to the sign of zero, and not where padding is infinite

    def _drop(self, x: Tensor) -> Tensor:
        for constraint in self._subspaces:
            x = constraint.apply(x, self.ball, self.steps)
        return x

    def _inside(self, x: Tensor) -> Tensor:
        """In the ball, and inside the bounds, which lie about the clean series: a clamp to them leaves no ball."""
        x = self.ball.project(x)
        for constraint in self._beside:
            x = constraint.apply(x, self.ball, self.steps)
        return x

    def random_start(self) -> Tensor:
        """A random point of the ball."""
        assert self.ball.projection is not None
        assert self.ball.radii is not None
        return self.ball.x0 + self.ball.projection.sample(self.ball.x0, self.ball.radii, self.noise, self.steps)

    def evaluate(self, x: Tensor, *, gradient: bool) -> Evaluation:
        """Logits, value and, where asked for, the direction to climb.

        Raises:
            ValueError: If a network returns another shape than logits have.
        """
        objective = self._attack.objective
        point = x.detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient and objective.attacks_classifier):
            role: Role = "classifier" if self._source is self._victim else "surrogate"
            source_logits = self._logits(self._source, point, role)
            if self._source_logits is None:
                check_labels(source_logits, self._labels, role)
                self._source_logits = source_logits.detach()
            class_loss = objective.class_losses(source_logits, self._labels)
        logits = source_logits
        if self._source is not self._victim:
            with torch.no_grad():
                logits = self._logits(self._victim, point, "classifier")
        with torch.set_grad_enabled(gradient and self._hides):
            scores = [self._logits(detector, point, "detector")[:, 0] for detector in self._detectors]
            detector_logits = torch.stack(scores) if scores else logits.new_zeros(0, len(x))
            hiding = objective.detector_losses(detector_logits) if self._hides else torch.zeros_like(class_loss)
        bad = torch.zeros_like(self.n_bad, dtype=torch.bool)

        def clean(found: Tensor) -> Tensor:
            nonlocal bad
            cleaned = torch.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0)
            bad = bad | (cleaned != found).flatten(1).any(dim=1)
            if self.mask is not None:
                cleaned = cleaned.masked_fill(~self.mask[..., None], 0.0)
            return cleaned + 0.0  # -0 becomes 0, so that a detector of weight 0 cannot be told from none

        terms = Terms(
            x=point,
            class_loss=-class_loss if self._attack.targeted else class_loss,
            detector_loss=hiding if objective.hides else None,
            alpha=self._alpha,
            weights=self._weights,
            mask=self.mask,
            clean=clean,
        )
        value, direction = None, None
        if gradient:
            with torch.enable_grad():
                value, direction = objective.direction(terms)
            self.n_gradients += 1
            self.n_bad += bad
            self.n_zero += ~direction.flatten(1).any(dim=1)
        if value is None and self._attack.has_values:
            with torch.no_grad():
                value = objective.values(terms)
        return Evaluation(logits.detach(), detector_logits.detach(), value, direction)

    def better(self, x: Tensor, known: Evaluation, candidate: Tensor) -> tuple[Tensor, Evaluation]:
        """For each series the candidate where its value is higher, with what is known of the outcome."""
        tried = self.evaluate(candidate, gradient=False)
        higher = tried.value > known.value
        kept = Evaluation(
            logits=torch.where(higher[:, None], tried.logits, known.logits),
            detector_logits=torch.where(higher, tried.detector_logits, known.detector_logits),
            objective_value=torch.where(higher, tried.value, known.value),
            direction=None,
        )
        return choose(higher, candidate, x), kept

    def _logits(self, network: Network, x: Tensor, role: Role) -> Tensor:
        masked = self.mask is not None and self._take_mask[id(network)]
        logits = network(x, mask=self.mask) if masked else network(x)
        check_shape(logits, len(x), role)
        return logits

    def check_clean(self, evaluation: Evaluation) -> None:
        """Refuse labels beyond the classes, logits that are not finite, and probabilities."""
        x, mask = self.ball.x0, self.mask
        check_outputs(self._victim, x, mask, evaluation.logits, "classifier", self._labels)
        if self._source is not self._victim:
            assert self._source_logits is not None
            check_outputs(self._source, x, mask, self._source_logits, "surrogate")
            given, wanted = (max(2, logits.shape[1]) for logits in (self._source_logits, evaluation.logits))
            if given != wanted:
                raise ValueError(f"the surrogate must tell the {wanted} classes of the classifier, got {given}")
        for detector, logits in zip(self._detectors, evaluation.detector_logits, strict=True):
            check_outputs(detector, x, mask, logits[:, None], "detector")
