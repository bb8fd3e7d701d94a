"""Training of discriminators: which adversarial series they see when.

A discriminator begins against a strong, easily seen attack that weakens in stages; every ``epochs_per_level`` epochs
the strength is multiplied by ``gamma`` and the adversarial series are made anew. Two things go beyond the released
procedure: earlier levels can be replayed, so that late stages do not forget strong attacks; and rounds of a concealed
attack against the discriminators as they are can follow.
Source: spec of arXiv 2502.20948, section 6.

n training series, T steps, C channels, L levels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_modules.attacks.engine import Attack
from lightning_modules.attacks.grid import grid_points
from lightning_modules.attacks.steppers import PGDStep
from lightning_modules.attacks.study import Role
from lightning_modules.networks import NetworkFactory


@dataclass(frozen=True)
class Level:
    """One stage of training.

    Attributes:
        strength: Step of an attack without a ball, else its radius; None keeps the attack's own.
        concealed: Whether the series come from the concealed attack of a round, made against the discriminators.
    """

    strength: float | None
    concealed: bool


class DiscriminatorPlan:
    """How one discriminator is made.

    Args:
        name: Unique, in reports and logged keys.
        network: Factory of the network, called with the facts of the data and two classes.
        attack: The vanilla attack it is trained against, on the classifier.
        training_attacks: What ``attack`` is called in the provenance, such as ``"ifgsm"``; several by commas.
        role: ``"attacked"``: the attacks of the test may read it; ``"held_out"``: nobody reads it but the report.
        start: Strength of the first level: the step of an attack without a ball, else its radius.
        gamma: Factor from one level to the next, in (0, 1].
        n_levels: Vanilla levels, at least 1.
        epochs_per_level: Epochs of a level, at least 1.
        replay: Probability, in 0..1, that a series is shown at a level drawn from all so far instead of the present.
        n_rounds: Further levels, with series of ``round_attack`` against the attacked discriminators as they then are.
        round_attack: A concealed attack with strengths of its own; needed with ``n_rounds``.
        seed: Of its weights.

    Raises:
        ValueError: If a number is out of range, there are rounds without an attack, or the vanilla attack reads
            detectors, aims at classes or has a step that would not follow the radius of its ball.
    """

    def __init__(
        self,
        *,
        name: str,
        network: NetworkFactory,
        attack: Attack,
        training_attacks: str,
        role: Role = "attacked",
        start: float = 0.03,
        gamma: float = 0.8,
        n_levels: int = 3,
        epochs_per_level: int = 10,
        replay: float = 0.5,
        n_rounds: int = 0,
        round_attack: Attack | None = None,
        seed: int = 0,
    ) -> None:
        if role not in ("attacked", "held_out"):
            raise ValueError(f"role of discriminator {name!r} must be 'attacked' or 'held_out', got {role!r}")
        for argument, value, least in (
            ("n_levels", n_levels, 1),
            ("epochs_per_level", epochs_per_level, 1),
            ("n_rounds", n_rounds, 0),
        ):
            if value < least:
                raise ValueError(f"{argument} of discriminator {name!r} must be at least {least}, got {value}")
        if not (start > 0 and 0 < gamma <= 1 and 0 <= replay <= 1):
            raise ValueError(
                f"discriminator {name!r} needs start above 0, gamma in (0, 1] and replay in 0..1, got {start}, {gamma} "
                f"and {replay}"
            )
        if attack.hides() or attack.targeted:
            raise ValueError(f"attack of discriminator {name!r} must be vanilla and untargeted, give others to rounds")
        if attack.projection is not None and attack.stepper.ball is None:
            raise ValueError(
                f"attack of discriminator {name!r}: with a ball the schedule sets its radius, which the step must "
                f"follow: PGDStep or APGD, got {type(attack.stepper).__name__}"
            )
        if n_rounds and round_attack is None:
            raise ValueError(f"n_rounds {n_rounds} of discriminator {name!r} need a round_attack, got none")
        self.name, self.network, self.role = name, network, role
        self.attack, self.round_attack = attack, round_attack
        self.training_attacks = training_attacks
        self.epochs_per_level, self.replay, self.seed = epochs_per_level, replay, seed
        vanilla = [Level(start * gamma**level, concealed=False) for level in range(n_levels)]
        self.levels = (*vanilla, *[Level(None, concealed=True)] * n_rounds)

    @property
    def n_epochs(self) -> int:
        """Epochs of all levels."""
        return len(self.levels) * self.epochs_per_level

    def level_at(self, epoch: int) -> int:
        """Number of the level in epoch 0, 1, ...; the last one afterwards."""
        return min(epoch // self.epochs_per_level, len(self.levels) - 1)

    def provenance(self, network: nn.Module) -> dict[str, str]:
        """Seed, architecture and training attacks of a network that was made by this plan.

        Beside its given name an attack is listed by its parts, so that the same one under two names is the same.
        """
        parts = (self.attack.objective, self.attack.stepper, self.attack.projection)
        made_of = " ".join(type(part).__name__ for part in parts if part is not None)
        attacks = [self.training_attacks, made_of, *["concealed"] * any(level.concealed for level in self.levels)]
        architecture = type(network).__name__
        return {"seed": str(self.seed), "architecture": architecture, "training_attacks": ", ".join(attacks)}


class AdversarialBank:
    """Adversarial series by level, made when first asked for and kept.

    Args:
        n_series: n.
        make: ``(level, rows (B,)) -> (B, T, C)`` makes them.
    """

    def __init__(self, n_series: int, make: Callable[[int, Tensor], Tensor]) -> None:
        self._n_series = n_series
        self._make = make
        self._kept: dict[int, Tensor] = {}
        self._known: dict[int, Tensor] = {}

    def get(self, level: int, rows: Tensor) -> Tensor:
        """``(B, T, C)`` series of a level."""
        known = self._known.setdefault(level, torch.zeros(self._n_series, dtype=torch.bool))
        numbers = rows.cpu()
        missing = ~known[numbers]
        if missing.any():
            made = self._make(level, numbers[missing])
            if level not in self._kept:
                self._kept[level] = made.new_zeros(self._n_series, *made.shape[1:])
            self._kept[level][numbers[missing].to(made.device)] = made
            known[numbers[missing]] = True
        return self._kept[level][numbers.to(self._kept[level].device)]

    def sample(self, level: int, rows: Tensor, replay: float) -> Tensor:
        """``(B, T, C)``: each series at ``level``, or with probability ``replay`` at any level up to it alike."""
        levels = torch.full((len(rows),), level)
        if replay > 0 and level > 0:
            drawn = torch.randint(level + 1, (len(rows),))
            levels = torch.where(torch.rand(len(rows)) < replay, drawn, levels)
        series = self.get(level, rows).clone()
        for other in levels.unique().tolist():
            if other != level:
                chosen = (levels == other).to(series.device)
                series[chosen] = self.get(other, rows[chosen.to(rows.device)])
        return series


def detection_loss(clean_logits: Tensor, adversarial_logits: Tensor) -> Tensor:
    """Binary cross-entropy of a discriminator, clean 0 and adversarial 1, in equal parts.

        loss = (mean softplus(g(x)) + mean softplus(-g(x_adv))) / 2

    Args:
        clean_logits: ``(B, 1) float``.
        adversarial_logits: ``(B, 1) float``.
    """
    softplus = torch.nn.functional.softplus
    return (softplus(clean_logits).mean() + softplus(-adversarial_logits).mean()) / 2


class AttackPlan:
    """An attack of the test with the grid that validation chooses from.

    Args:
        name: Unique, in reports.
        family: Attacks of one family differ in their objective alone; its vanilla member is their baseline.
        attack: Objective, stepper, projection, constraints.
        steps: Steps to choose from; empty keeps the stepper's own.
        radii: Radii to choose from; empty keeps the projection's own.
        alphas: Weights to choose from; empty keeps the objective's own.
        calibrate: Whether the objective divides logits by their median absolute clean value on validation.

    Raises:
        ValueError: If an axis has no place in the attack, holds a value twice or one that is not above 0; a step or a
            radius is nowhere given; the attack aims at classes, keeps its best iterate or couples the series of a
            batch.
    """

    def __init__(
        self,
        *,
        name: str,
        family: str,
        attack: Attack,
        steps: Sequence[float] = (),
        radii: Sequence[float] = (),
        alphas: Sequence[float] = (),
        calibrate: bool = False,
    ) -> None:
        for axis, values in (("steps", steps), ("radii", radii), ("alphas", alphas)):
            if any(not value > 0 for value in values):
                raise ValueError(f"{axis} of attack {name!r} must be above 0, got {list(values)}")
        if radii and attack.projection is None:
            raise ValueError(f"radii of attack {name!r} need a projection, it has none")
        if alphas and not hasattr(attack.objective, "alpha"):
            raise ValueError(f"alphas of attack {name!r}: {type(attack.objective).__name__} has no alpha")
        if attack.targeted or attack.keep == "best" or attack.couples_batch:
            raise ValueError(
                f"attack {name!r} must be untargeted, keep its last iterate and not couple the series of a batch: the "
                "iterate is chosen by number, for all series alike"
            )
        own_step = isinstance(attack.stepper, PGDStep)
        if own_step and steps:
            raise ValueError(f"steps of attack {name!r}: PGDStep takes its step from the radius, give radii")
        if not own_step and attack.stepper.uses_gradient and not steps and attack.stepper.step is None:
            raise ValueError(f"attack {name!r} needs a step: give steps, or one to {type(attack.stepper).__name__}")
        if attack.projection is not None and not radii and attack.projection.radius is None:
            raise ValueError(
                f"attack {name!r} needs a radius: give radii, or one to {type(attack.projection).__name__}"
            )
        grid_points(steps=steps, radii=radii, alphas=alphas)  # refuses what occurs twice
        self.name, self.family, self.attack, self.calibrate = name, family, attack, calibrate
        self.steps, self.radii, self.alphas = tuple(steps), tuple(radii), tuple(alphas)
