"""Steps along a gradient: from an iterate and the direction to climb to the next iterate.

B series, T steps, C channels. A stepper holds settings only; what it remembers during an attack lives in the closure
that :meth:`Stepper.start` returns, so one stepper serves any number of attacks. Search without gradients is in
``searches.py``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lightning_modules.attacks.gradients import Direction, move, unit, unit_l1
from lightning_modules.attacks.projections import Projection, Strength

if TYPE_CHECKING:
    from lightning_modules.attacks.run import Evaluation, Run

Advance = Callable[[Tensor, "Evaluation"], tuple[Tensor, "Evaluation | None"]]
"""``(iterate, its evaluation) -> (next iterate, its evaluation where already known)``."""


class Stepper(ABC):
    """How an attack moves.

    Attributes say what it needs: ``uses_gradient`` at the iterate, ``uses_values`` to compare points,
    ``uses_noise``, the kind of ``ball``, whether it ``couples_batch``, ``starts_itself`` at a random point, and
    ``step_from_radius``: its step follows the radius of the ball, and none can be given.

    Args:
        step: Length ``s`` of a step, in units of the series; above 0. None where every call gives its own.

    Raises:
        ValueError: If ``step`` is not a finite positive number.
    """

    uses_gradient: ClassVar[bool] = True
    uses_values: ClassVar[bool] = False
    uses_noise: bool = False
    step_from_radius: ClassVar[bool] = False
    starts_itself: ClassVar[bool] = False
    ball: ClassVar[type[Projection] | None] = None
    couples_batch: ClassVar[bool] = False

    def __init__(self, step: float | None = None) -> None:
        if step is not None and not 0 < step < float("inf"):
            raise ValueError(f"step of {type(self).__name__} must be finite and above 0, got {step}")
        self.step = step

    def length(self, step: Strength | None, radii: Tensor | None, n_steps: int) -> Strength:
        """Length of a step: the call's, or the stepper's own.

        Args:
            step: Given at the call, or None.
            radii: ``(B, 1, 1)`` of the ball, or None.
            n_steps: N.

        Raises:
            ValueError: If there is neither.
        """
        chosen = self.step if step is None else step
        if chosen is None:
            raise ValueError(f"{type(self).__name__} has no step: give one to the stepper or to the call")
        return chosen

    def initial(self, run: "Run") -> Tensor:
        """First iterate before constraints: the clean series, or a random point of the ball."""
        return run.random_start() if run.starts_at_random else run.ball.x0

    @abstractmethod
    def start(self, run: "Run") -> Advance:
        """Begin an attack; the returned function makes one step."""


class SignStep(Stepper):
    """FGSM (one step) and iFGSM: ``x + s sign(h)``, ``sign(0) = 0``.

    Args:
        step: ``s``, in units of the series.

    Source: spec of the concealed attack, section 5; I. Goodfellow et al., arXiv 1412.6572.
    """

    def start(self, run: "Run") -> Advance:
        """No memory."""

        def advance(x: Tensor, evaluation: "Evaluation") -> tuple[Tensor, None]:
            return run.confine(x + run.step * evaluation.climb.sign()), None

        return advance


class PGDStep(Stepper):
    """PGD: ``s = 2.5 radius / N`` along the sign or the unit direction, so the step follows the radius (trap T11).

    Args:
        direction: ``"sign"``, or ``"unit"``: the gradient over its Euclidean norm, the usual step of an l2 ball.
        relative_step: The factor 2.5.

    Raises:
        ValueError: If ``direction`` is unknown or ``relative_step`` not above 0; at the attack, without a projection
            or with a step of the call's own.

    Source: spec of the concealed attack, section 5; A. Madry et al., arXiv 1706.06083.
    """

    step_from_radius = True
    ball = Projection

    def __init__(self, direction: Direction = "sign", relative_step: float = 2.5) -> None:
        super().__init__()
        self._move = move(direction)
        if not 0 < relative_step < float("inf"):
            raise ValueError(f"relative_step must be finite and above 0, got {relative_step}")
        self.relative_step = relative_step

    def length(self, step: Strength | None, radii: Tensor | None, n_steps: int) -> Strength:
        """``relative_step * radius / N``."""
        if step is not None:
            raise ValueError("PGDStep takes its step from the radius: give radius=, not step=")
        assert radii is not None
        return self.relative_step * radii.flatten() / max(n_steps, 1)

    def start(self, run: "Run") -> Advance:
        """No memory."""

        def advance(x: Tensor, evaluation: "Evaluation") -> tuple[Tensor, None]:
            return run.confine(x + run.step * self._move(evaluation.climb)), None

        return advance


class Momentum(Stepper):
    """MI-FGSM: ``v <- decay v + h / |h|_1``, ``x + s sign(v)``.

    Args:
        step: ``s``, in units of the series.
        decay: ``mu``, inside 0..1.

    Raises:
        ValueError: If ``decay`` lies outside.

    Source: Y. Dong et al., arXiv 1710.06081, equations 6 and 7.
    """

    def __init__(self, step: float | None = None, decay: float = 1.0) -> None:
        super().__init__(step)
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must lie in 0..1, got {decay}")
        self.decay = decay

    def start(self, run: "Run") -> Advance:
        """Remembers the velocity."""
        velocity = torch.zeros_like(run.ball.x0)

        def advance(x: Tensor, evaluation: "Evaluation") -> tuple[Tensor, None]:
            nonlocal velocity
            velocity = self.decay * velocity + unit_l1(evaluation.climb)
            return run.confine(x + run.step * velocity.sign()), None

        return advance


class Nesterov(Momentum):
    """NI-FGSM: the gradient is taken at ``x + s decay v``, then as :class:`Momentum`.

    The iterate itself is scored by a forward pass of its own.

    Source: J. Lin et al., arXiv 1908.06281, equations 6 to 8.
    """

    uses_gradient = False  # not at the iterate

    def start(self, run: "Run") -> Advance:
        """Remembers the velocity."""
        velocity = torch.zeros_like(run.ball.x0)

        def advance(x: Tensor, evaluation: "Evaluation") -> tuple[Tensor, None]:
            nonlocal velocity
            ahead = run.evaluate(run.keep_clean(x + run.step * self.decay * velocity), gradient=True)
            velocity = self.decay * velocity + unit_l1(ahead.climb)
            return run.confine(x + run.step * velocity.sign()), None

        return advance


class AdamStep(Stepper):
    """SGM: Adam on a free perturbation ``r`` of ``-mu L + nu |r|_2 + lam sum_t |r_t - r_{t+1}|``, ``L`` the objective.

    One Adam state for the whole attack and one loss for each series; the ball, where there is one, clamps ``r`` inside
    the loop. ``r`` begins as a random sign pattern. Weights of series multiply L alone.

    Args:
        step: Adam's learning rate, in units of the series.
        mu: Weight of the objective, above 0.
        nu: Weight of the Euclidean norm, at least 0.
        lam: Weight of the total variation, at least 0.
        start_scale: Size of the first ``r``, at least 0.

    Raises:
        ValueError: If a weight is out of range.

    Source: spec of the concealed attack, section 5, after G. Pialla et al. (2022); Adam of arXiv 1412.6980 with its
    defaults.
    """

    BETAS: ClassVar[tuple[float, float]] = (0.9, 0.999)
    EPSILON: ClassVar[float] = 1e-8

    def __init__(
        self, step: float = 0.01, *, mu: float = 1.0, nu: float = 0.0, lam: float = 0.0, start_scale: float = 0.003
    ) -> None:
        super().__init__(step)
        for name, value in (("mu", mu), ("nu", nu), ("lam", lam), ("start_scale", start_scale)):
            if not 0 <= value < float("inf") or (name == "mu" and value == 0):
                raise ValueError(f"{name} of AdamStep must be finite and {'above' if name == 'mu' else 'at least'} 0")
        self.mu, self.nu, self.lam, self.start_scale = mu, nu, lam, start_scale
        self.uses_noise = start_scale > 0

    def initial(self, run: "Run") -> Tensor:
        """``x0`` plus the sign pattern, or a random point of the ball."""
        if run.starts_at_random or self.start_scale == 0:
            return super().initial(run)
        return run.ball.x0 + self.start_scale * run.noise.signs(*run.ball.x0.shape[1:])

    def start(self, run: "Run") -> Advance:
        """Remembers both moments."""
        # in half precision EPSILON and squares of small gradients would be 0
        wide = torch.promote_types(run.ball.x0.dtype, torch.float32)
        first = torch.zeros_like(run.ball.x0, dtype=wide)
        second = torch.zeros_like(first)
        k = 0

        def advance(x: Tensor, evaluation: "Evaluation") -> tuple[Tensor, None]:
            nonlocal first, second, k
            k += 1
            slope = -self.mu * evaluation.climb.to(wide)
            if self.nu > 0 or self.lam > 0:
                slope = slope + self._penalty_slope(x - run.ball.x0, run.mask)
            first = self.BETAS[0] * first + (1 - self.BETAS[0]) * slope
            second = self.BETAS[1] * second + (1 - self.BETAS[1]) * slope * slope
            mean, square = first / (1 - self.BETAS[0] ** k), second / (1 - self.BETAS[1] ** k)
            step = run.step * mean / (square.sqrt() + self.EPSILON)
            return run.confine(x - step.to(x.dtype)), None

        return advance

    def _penalty_slope(self, r: Tensor, mask: Tensor | None) -> Tensor:
        """Gradient of ``nu |r|_2 + lam TV(r)``; 0 at kinks."""
        slope = self.nu * unit(r)
        jumps = (r[:, 1:] - r[:, :-1]).sign()
        if mask is not None:
            jumps = jumps * (mask[:, 1:] & mask[:, :-1])[..., None]
        slope[:, 1:] += self.lam * jumps
        slope[:, :-1] -= self.lam * jumps
        return slope


class UniversalStep(Stepper):
    """One perturbation for all series of the batch: ``x + s sign(mean_b h)``; by intent it depends on the batch.

    It begins at the clean series: random starts are drawn for each series, and the perturbation would not be one.

    Args:
        step: ``s``, in units of the series.

    Source: spec of the concealed attack, section 5; S. Moosavi-Dezfooli et al., arXiv 1610.08401, for the idea.
    """

    couples_batch = True

    def start(self, run: "Run") -> Advance:
        """No memory."""

        def advance(x: Tensor, evaluation: "Evaluation") -> tuple[Tensor, None]:
            shared = evaluation.climb.mean(dim=0, keepdim=True).sign()
            return run.confine(x + run.step * shared), None

        return advance
