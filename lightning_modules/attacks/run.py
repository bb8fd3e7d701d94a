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
from lightning_modules.attacks.victims import refuse_probabilities

if TYPE_CHECKING:
    from lightning_modules.attacks.engine import Attack

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


class Run:
    """One attack on one batch: what a stepper may ask.

    Attributes:
        ball: Projection with its radii about the clean series ``ball.x0``.
        mask: ``(B, T) bool`` or None.
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
        # asked once, not in every step: a signature is slow to read
        self._take_mask = {id(network): takes_mask(network) for network in (*networks[:2], *networks[2])}
        self.mask, self.n_steps, self.noise = mask, attack.n_steps, noise
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

    def keep_padding(self, x: Tensor) -> Tensor:
        """``x`` with the clean values at padded steps."""
        return x if self.mask is None else torch.where(self.mask[..., None], x, self.ball.x0)

    def confine(self, x: Tensor) -> Tensor:
        """Into the ball about the clean series, through the constraints, and into the ball once more."""
        x = self.ball.project(self.keep_padding(x))
        if not self._attack.constraints:
            return x
        for constraint in self._attack.constraints:
            x = constraint.apply(x, self.ball, self.mask)
        return self.ball.project(self.keep_padding(x))

    def random_start(self) -> Tensor:
        """A random point of the ball."""
        assert self.ball.projection is not None
        assert self.ball.radii is not None
        return self.ball.x0 + self.ball.projection.sample(self.ball.x0, self.ball.radii, self.noise)

    def evaluate(self, x: Tensor, *, gradient: bool) -> Evaluation:
        """Logits, value and, where asked for, the direction to climb.

        Raises:
            ValueError: If a network returns another shape than logits have.
        """
        objective = self._attack.objective
        point = x.detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient and objective.attacks_classifier):
            source_logits = self._logits(self._source, point, "classifier")
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

    def _logits(self, network: Network, x: Tensor, role: str) -> Tensor:
        masked = self.mask is not None and self._take_mask[id(network)]
        logits = network(x, mask=self.mask) if masked else network(x)
        width = "1" if role == "detector" else "1 or n_classes"
        fits = isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == len(x)
        if not fits or logits.shape[1] < 1 or (role == "detector" and logits.shape[1] != 1):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"a {role} must return logits of shape ({len(x)}, {width}), got {got}")
        return logits

    def check_clean(self, evaluation: Evaluation) -> None:
        """Refuse labels beyond the classes, logits that are not finite, and probabilities."""
        n_classes = max(2, evaluation.logits.shape[1])
        low, high = int(self._labels.min()), int(self._labels.max())
        if low < 0 or high >= n_classes:
            raise ValueError(f"labels must lie in 0..{n_classes - 1} for this classifier, got {low}..{high}")
        for role, logits in (("classifier", evaluation.logits), ("detector", evaluation.detector_logits)):
            if not bool(logits.isfinite().all()):
                raise ValueError(f"the {role} returns a logit that is not finite before the attack has begun")
        refuse_probabilities(self._victim, self.ball.x0, self.mask, logits=evaluation.logits)
        if self._source is not self._victim:
            refuse_probabilities(self._source, self.ball.x0, self.mask)
        for detector, logits in zip(self._detectors, evaluation.detector_logits, strict=True):
            refuse_probabilities(detector, self.ball.x0, self.mask, logits=logits[:, None])
