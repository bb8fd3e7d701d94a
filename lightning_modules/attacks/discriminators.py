"""Training of discriminators: which adversarial series they see when.

A discriminator begins against a strong, easily seen attack that weakens in stages; every ``epochs_per_level`` epochs
the strength is multiplied by ``gamma`` and the adversarial series are made anew. Three things go beyond the released
procedure: earlier levels can be replayed, so that late stages do not forget strong attacks; rounds of a concealed
attack against the discriminators as they are can follow; and the strengths of a level can be any list.
Source: spec of arXiv 2502.20948, section 6.

n training series, T steps, C channels, L levels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.attacks.engine import Attack
from lightning_modules.attacks.study import Role
from lightning_modules.networks import NetworkFactory


@dataclass(frozen=True)
class Level:
    """One stage of training.

    Attributes:
        strength: Step of an attack without a ball, else its radius.
        concealed: Whether the series come from the concealed attack of a round, made against the discriminators.
    """

    strength: float
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
        round_attack: A concealed attack; needed with ``n_rounds``.
        seed: Of its weights.

    Raises:
        ValueError: If a number is out of range, or there are rounds without an attack.
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
        if n_rounds and round_attack is None:
            raise ValueError(f"n_rounds {n_rounds} of discriminator {name!r} need a round_attack, got none")
        self.name, self.network, self.role = name, network, role
        self.attack, self.round_attack = attack, round_attack
        self.training_attacks = training_attacks
        self.epochs_per_level, self.replay, self.seed = epochs_per_level, replay, seed
        vanilla = [Level(start * gamma**level, concealed=False) for level in range(n_levels)]
        self.levels = (*vanilla, *[Level(vanilla[-1].strength, concealed=True)] * n_rounds)

    @property
    def n_epochs(self) -> int:
        """Epochs of all levels."""
        return len(self.levels) * self.epochs_per_level

    def level_at(self, epoch: int) -> int:
        """Number of the level in epoch 0, 1, ...; the last one afterwards."""
        return min(epoch // self.epochs_per_level, len(self.levels) - 1)

    @property
    def architecture(self) -> str:
        """Name of the network's class, for the provenance."""
        # The parser and functools.partial wrap the class, one as an argument and the other as the function.
        wrapped = (*getattr(self.network, "args", ()), getattr(self.network, "func", self.network))
        named = next((part for part in wrapped if isinstance(part, type)), self.network)
        return getattr(named, "__name__", type(named).__name__)

    @property
    def provenance(self) -> dict[str, str]:
        """Seed, architecture and training attacks."""
        attacks = self.training_attacks + (", concealed" if any(level.concealed for level in self.levels) else "")
        return {"seed": str(self.seed), "architecture": self.architecture, "training_attacks": attacks}


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
        ValueError: If an axis has no place in the attack or holds a value that is not above 0.
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
        self.name, self.family, self.attack, self.calibrate = name, family, attack, calibrate
        self.steps, self.radii, self.alphas = tuple(steps), tuple(radii), tuple(alphas)
