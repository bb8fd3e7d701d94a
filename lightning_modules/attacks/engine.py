"""The attack itself: one loop for every objective, stepper, projection and constraint.

B series, T steps, C channels, K classes, M detectors, N iterations. Plain PyTorch::

    attack = Attack(SumReg(alpha=0.1), SignStep(0.03), projection=Linf(0.3))
    result = attack(model, x, y, detectors=[detector])
    result.x_adv

Every iterate is scored by the pass that gives its gradient, so a run of N steps costs N forward and backward passes
and one forward pass more. Nothing is copied from the device inside the loop.

Source: spec of the concealed attack, section 5.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_modules.attacks.constraints import Constraint, refuse_together
from lightning_modules.attacks.frozen_networks import Network, frozen, pass_rows, taken_mask
from lightning_modules.attacks.gradients import choose
from lightning_modules.attacks.objectives import Objective
from lightning_modules.attacks.projections import Projection, Strength, per_series
from lightning_modules.attacks.run import Evaluation, Networks, Run, check_series
from lightning_modules.attacks.series_noise import SeriesNoise
from lightning_modules.attacks.steppers import Stepper, UniversalStep
from lightning_modules.attacks.victims import refuse_train_mode


@dataclass
class AttackResult:
    """An attack on B series, everything on the device of the series.

    Attributes:
        x_adv: ``(B, T, C) float``, the iterate numbered ``chosen`` of each series.
        chosen: ``(B,) int64`` in 0..N.
        logits: ``(N + 1, B, K') float`` of the victim at every iterate, number 0 being the start.
        detector_logits: ``(N + 1, M, B) float``.
        values: ``(N + 1, B) float`` of the objective; of one that joins gradients, the values that the stepper or
            ``keep="best"`` compared, None where nothing compares.
        n_bad_gradients: ``(B,) int64`` gradients with a value that is not finite (taken as 0).
        n_zero_gradients: ``(B,) int64`` gradients that are 0 everywhere.
        n_gradients: Gradients taken for each series.
        iterates: ``(N + 1, B, T, C) float`` where ``keep_iterates``, else None.
    """

    x_adv: Tensor
    chosen: Tensor
    logits: Tensor
    detector_logits: Tensor
    values: Tensor | None
    n_bad_gradients: Tensor
    n_zero_gradients: Tensor
    n_gradients: int
    iterates: Tensor | None = None

    SERIES_AXIS: ClassVar[dict[str, int]] = {"logits": 1, "detector_logits": 2, "values": 1, "iterates": 1}

    @classmethod
    def join(cls, parts: Sequence["AttackResult"]) -> "AttackResult":
        """One result of several batches of series, attacked alike."""
        joined: dict[str, Any] = {}
        for field in fields(cls):
            values = [getattr(part, field.name) for part in parts]
            tensors = isinstance(values[0], Tensor)
            joined[field.name] = torch.cat(values, dim=cls.SERIES_AXIS.get(field.name, 0)) if tensors else values[0]
        return cls(**joined)


class Attack:
    """Objective, stepper, projection and constraints, put together.

    Args:
        objective: What is climbed.
        stepper: How.
        projection: Ball about the clean series; None leaves the perturbation free.
        constraints: Applied in order after the projection, which then has the last word; all of them hold in the end,
            see :mod:`lightning_modules.attacks.constraints`.
        n_steps: N, at least 1.
        targeted: Labels are the classes to reach; the classifier's loss changes sign.
        random_start: Begin at a random point of the ball.
        keep: ``"last"`` returns iterate N (or ``stop``), ``"best"`` the iterate of the highest value, the earlier of
            equal ones.

    Raises:
        ValueError: If the parts do not fit: a stepper without the ball it needs, a random start without a ball,
            constraints that undo each other.
    """

    def __init__(
        self,
        objective: Objective,
        stepper: Stepper,
        *,
        projection: Projection | None = None,
        constraints: Sequence[Constraint] = (),
        n_steps: int = 50,
        targeted: bool = False,
        random_start: bool = False,
        keep: Literal["last", "best"] = "last",
    ) -> None:
        if n_steps < 1:
            raise ValueError(f"n_steps must be at least 1, got {n_steps}")
        if keep not in ("last", "best"):
            raise ValueError(f"keep must be 'last' or 'best', got {keep!r}")
        if stepper.ball is not None and not isinstance(projection, stepper.ball):
            kind = "a projection" if stepper.ball is Projection else f"the projection {stepper.ball.__name__}"
            name = type(stepper).__name__
            raise ValueError(f"{name} needs {kind}, got {projection and type(projection).__name__}")
        if random_start and projection is None:
            raise ValueError("random_start needs a projection to start inside of, got None")
        if random_start and stepper.starts_itself:
            raise ValueError(f"{type(stepper).__name__} begins at a random point of its own: leave random_start out")
        if random_start and isinstance(stepper, UniversalStep):
            raise ValueError("UniversalStep moves all series alike, from the clean ones: leave random_start out")
        refuse_together(constraints)
        self.objective, self.stepper, self.projection = objective, stepper, projection
        self.constraints = tuple(constraints)
        self.n_steps, self.targeted, self.random_start, self.keep = n_steps, targeted, random_start, keep

    @property
    def couples_batch(self) -> bool:
        """Whether the steps of a series depend on the other series of its batch."""
        return self.objective.couples_batch or self.stepper.couples_batch

    @property
    def has_values(self) -> bool:
        """Whether points are given values: the objective's own, or those that are compared."""
        return self.objective.has_value or self.stepper.uses_values or self.keep == "best"

    @property
    def is_random(self) -> bool:
        """Whether the attack draws noise, so that seeds and restarts differ."""
        return self.random_start or self.stepper.uses_noise

    def __call__(
        self,
        model: Network,
        x: Tensor,
        y: Tensor,
        *,
        detectors: Sequence[Network] = (),
        surrogate: Network | None = None,
        mask: Tensor | None = None,
        index: Tensor | None = None,
        weights: Tensor | None = None,
        generator: torch.Generator | int | None = None,
        stop: int | Tensor | None = None,
        step: Strength | None = None,
        alpha: Strength | None = None,
        radius: Strength | None = None,
        keep_iterates: bool = False,
        batch_size: int | None = None,
    ) -> AttackResult:
        """Attack a batch of series.

        Args:
            model: Victim, ``(series, mask) -> logits (B, 1) or (B, K)``, or ``(series)`` only; left as it was found.
            x: ``(B, T, C) float`` clean series; never changed.
            y: ``(B,) int64`` true classes, target classes in targeted mode.
            detectors: M networks with one logit, ``sigmoid = P(adversarial)``.
            surrogate: Gives the gradients in place of the victim, which only scores: black-box transfer.
            mask: ``(B, T) bool`` valid steps; padded ones never change.
            index: ``(B,) int64`` number of each series, to which its noise belongs; default 0..B-1.
            weights: ``(B,) float`` at least 0, weight of each series' objective; a series of weight 0 stays clean, to
                the last bit and in every iterate, whatever the stepper, the start and the constraints.
            generator: Gives the seed where the attack is random, by one draw; or the seed itself, in 0..2^62 - 1. None
                takes torch's default generator.
            stop: Number of the iterate to return, for all or ``(B,) int64`` for each series; the run goes on to N.
            step: Takes the place of the stepper's own, a number or ``(B,) float``; so do the next two.
            alpha: For the objective.
            radius: For the projection.
            keep_iterates: Return every iterate.
            batch_size: Series a pass; by default as many as are fastest: all on a GPU, about 40,000 time steps of them
                on a CPU. Where series are coupled all are needed.

        Returns:
            Iterates, logits at each and counts.

        Raises:
            ValueError: If an argument has a wrong shape or value, a network does not return logits, series are padded
                and a network takes no mask, or what the objective needs is missing.
        """
        if isinstance(detectors, nn.Module) and not isinstance(detectors, nn.ModuleList):
            raise ValueError("detectors must be a sequence of networks, got one network: put it into a list")
        detectors = list(detectors)
        self._check(x, y, mask, index, weights, alpha, radius, stop)
        self.objective.check(n_detectors=len(detectors), hides=self.hides(alpha), targeted=self.targeted)
        seed = self.seed(generator)
        size = batch_size if batch_size is not None else len(x) if self.couples_batch else pass_rows(x)
        if size < 1 or (self.couples_batch and size < len(x)):
            raise ValueError(f"batch_size must be at least 1, all {len(x)} where series are coupled, got {size}")
        # Padding may hold anything: a norm over a series with NaN in it is NaN, and such a ball would hold nobody.
        given, known = x, x.isfinite()
        x = x if bool(known.all()) else torch.where(known, x, 0.0)
        networks = (model, model if surrogate is None else surrogate, detectors)
        roles = ("classifier", "surrogate", *["detector"] * len(detectors))
        for network, role in zip((*networks[:2], *detectors), roles, strict=True):
            taken = taken_mask(network, mask, role)
            refuse_train_mode(network, x[:size], None if taken is None else taken[:size])
        everything = {
            "x": x,
            "y": y,
            "mask": mask,
            "index": torch.arange(len(x), device=x.device) if index is None else index.to(x.device),
            "weights": None if weights is None else weights.to(x.device),
            "stop": stop,
            "step": step,
            "alpha": alpha,
            "radius": radius,
        }
        parts = []
        with frozen([model, *networks[1:2], *detectors], x.device):
            for start in range(0, len(x), size):
                chunk = {name: _rows(value, start, size) for name, value in everything.items()}
                parts.append(self._attack(networks, seed, keep_iterates, **chunk))
        result = AttackResult.join(parts)
        if x is given:
            return result
        iterates = None if result.iterates is None else torch.where(known, result.iterates, given)
        return replace(result, x_adv=torch.where(known, result.x_adv, given), iterates=iterates)

    def _attack(
        self,
        networks: Networks,
        seed: int,
        keep_iterates: bool,
        *,
        x: Tensor,
        y: Tensor,
        mask: Tensor | None,
        index: Tensor,
        weights: Tensor | None,
        stop: int | Tensor | None,
        **strengths: Strength | None,
    ) -> AttackResult:
        for constraint in self.constraints:
            constraint.check(x, mask)
        run = Run(self, networks, x, y, mask, SeriesNoise(index, seed, x.dtype), strengths, weights)
        current = self.stepper.initial(run)
        if current is not x:
            current = run.confine(current)
        advance = self.stepper.start(run)
        chosen = torch.as_tensor(self.n_steps if stop is None else stop, device=x.device).expand(len(x))
        kept, best = current, None
        known: Evaluation | None = None
        history: list[Evaluation] = []
        iterates = []
        for k in range(self.n_steps + 1):
            last = k == self.n_steps
            if known is None:
                known = run.evaluate(current, gradient=self.stepper.uses_gradient and not last)
            if k == 0:
                run.check_clean(known)
            if self.keep == "best":
                higher = torch.ones_like(y, dtype=torch.bool) if best is None else known.value > best
                best = known.value if best is None else torch.where(higher, known.value, best)
                kept, chosen = choose(higher, current, kept), torch.where(higher, k, chosen)
            elif stop is not None:
                kept = choose(chosen == k, current, kept)
            if keep_iterates:
                iterates.append(current)
            history.append(Evaluation(known.logits, known.detector_logits, known.objective_value, None))
            if not last:
                current, known = advance(current, known)
        if self.keep == "last" and stop is None:
            kept = current
        values = [one.objective_value for one in history]
        return AttackResult(
            x_adv=kept,
            chosen=chosen.clone(),
            logits=torch.stack([one.logits for one in history]),
            detector_logits=torch.stack([one.detector_logits for one in history]),
            values=torch.stack([value for value in values if value is not None]) if self.has_values else None,
            n_bad_gradients=run.n_bad,
            n_zero_gradients=run.n_zero,
            n_gradients=run.n_gradients,
            iterates=torch.stack(iterates) if keep_iterates else None,
        )

    def hides(self, alpha: Strength | None = None) -> bool:
        """Whether detectors are differentiated: a weight of 0 leaves them scored only, as if not in the objective."""
        chosen = getattr(self.objective, "alpha", None) if alpha is None else alpha
        return self.objective.hides and not (isinstance(chosen, int | float) and chosen == 0)

    def seed(self, generator: torch.Generator | int | None) -> int:
        """Seed of an attack: one draw of the generator, and none where nothing is random."""
        if generator is not None and not isinstance(generator, torch.Generator):
            return int(generator)  # of numpy too
        if not self.is_random:
            return 0
        device = "cpu" if generator is None else generator.device
        return int(torch.randint(2**62, (1,), generator=generator, device=device))

    def _check(
        self,
        x: Tensor,
        y: Tensor,
        mask: Tensor | None,
        index: Tensor | None,
        weights: Tensor | None,
        alpha: Strength | None,
        radius: Strength | None,
        stop: int | Tensor | None,
    ) -> None:
        check_series(x, y, mask)
        if index is not None and (index.shape != y.shape or index.dtype != torch.int64):
            raise ValueError(f"index must be int64 of shape ({len(x)},), got {tuple(index.shape)} {index.dtype}")
        if weights is not None:
            if weights.shape != y.shape:
                raise ValueError(f"weights must be of shape ({len(x)},), got {tuple(weights.shape)}")
            per_series("weights", weights, x)
        if alpha is not None and not hasattr(self.objective, "alpha"):
            raise ValueError(f"{type(self.objective).__name__} has no alpha, got alpha=")
        if radius is not None and self.projection is None:
            raise ValueError("radius= needs an attack with a projection, got None")
        if stop is not None:
            if self.keep == "best":
                raise ValueError("stop= picks an iterate by number and keep='best' by value: give one of them")
            numbers = torch.as_tensor(stop)
            wrong = numbers.shape not in ((), y.shape) or numbers.dtype != torch.int64
            if wrong or bool(((numbers < 0) | (numbers > self.n_steps)).any()):
                raise ValueError(f"stop must be int64 in 0..{self.n_steps}, one or {len(x)} of them, got {stop}")


def _rows(value: Any, start: int, size: int) -> Any:
    """Rows of a batched argument as a copy, which autograd takes even where the original is of inference mode."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return value[start : start + size].detach().clone()
