"""Training of discriminators: which adversarial series they see when.

A discriminator begins against a strong, easily seen attack that weakens in stages; every ``epochs_per_level`` epochs
the strength is multiplied by ``gamma`` and the adversarial series are made anew. Three things go beyond the released
procedure: a mixture of attacks can be shown at each level; earlier levels can be replayed, so that late stages do not
forget strong attacks; and rounds of a concealed attack against the discriminators as they are can follow.
Source: spec of arXiv 2502.20948, section 6.

n training series, T steps, C channels, L levels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.attacks.engine import Attack
from lightning_modules.attacks.grid import grid_points
from lightning_modules.attacks.judges import DATA_SPLIT
from lightning_modules.attacks.objectives import Vanilla
from lightning_modules.attacks.study import Role
from lightning_modules.collectives import gather_objects, n_processes, rank
from lightning_modules.networks import NetworkFactory


class TrainingAttack:
    """A further vanilla attack of a mixture.

    Args:
        name: In the provenance, such as ``"pgd"``.
        attack: A vanilla attack, on the classifier; its number of iterations is its own.
        start: Strength of the first level, above 0: the step of an attack without a ball, else its radius.

    Raises:
        ValueError: If ``start`` is not above 0 or the name is empty.
    """

    def __init__(self, *, name: str, attack: Attack, start: float) -> None:
        if not name or not start > 0:
            raise ValueError(f"a training attack needs a name and start above 0, got {name!r} and {start}")
        self.name, self.attack, self.start = name, attack, start


@dataclass(frozen=True)
class LevelAttack:
    """An attack as a level uses it.

    Attributes:
        name: As in the provenance.
        attack: The attack.
        strength: Step of an attack without a ball, else its radius; None keeps the attack's own.
    """

    name: str
    attack: Attack
    strength: float | None


@dataclass(frozen=True)
class Level:
    """One stage of training.

    Attributes:
        attacks: Those a series may be shown under, all alike.
        concealed: Whether the series come from the concealed attack of a round, made against the discriminators.
    """

    attacks: tuple[LevelAttack, ...]
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
        mixture: Further vanilla attacks, which weaken by the same ``gamma``. Each time a series is shown, one of all
            attacks of its level is drawn, all alike; attacks that differ in iterations alone are different ones.
        n_rounds: Further levels, with series of ``round_attack`` against the attacked discriminators as they then are.
        round_attack: A concealed attack with strengths of its own; needed with ``n_rounds``.
        seed: Of its weights.

    Raises:
        ValueError: If a number is out of range; there are rounds without an attack, an attack without rounds, or one
            that has no step or radius or hides from nobody; a vanilla attack reads detectors or other series, or has a
            step that would not follow the radius of its ball; any attack aims at classes or couples the series of a
            batch, so that what a series is shown as would depend on who was asked with it.
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
        mixture: Sequence[TrainingAttack] = (),
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
        vanilla = (TrainingAttack(name=training_attacks, attack=attack, start=start), *mixture)
        for one in vanilla:
            if not isinstance(one.attack.objective, Vanilla):
                raise ValueError(
                    f"attack {one.name!r} of discriminator {name!r} must be vanilla, got the objective "
                    f"{type(one.attack.objective).__name__}: give others to rounds"
                )
            _refuse_targeted_or_coupled(f"attack {one.name!r} of discriminator {name!r}", one.attack)
            if one.attack.projection is not None and one.attack.stepper.ball is None:
                raise ValueError(
                    f"attack {one.name!r} of discriminator {name!r}: with a ball the schedule sets its radius, which "
                    f"the step must follow: PGDStep or APGD, got {type(one.attack.stepper).__name__}"
                )
        if n_rounds and round_attack is None:
            raise ValueError(f"n_rounds {n_rounds} of discriminator {name!r} need a round_attack, got none")
        if round_attack is not None:
            of = f"round_attack of discriminator {name!r}"
            if not n_rounds:
                raise ValueError(f"{of} is for rounds: give n_rounds of at least 1, got 0")
            if not round_attack.hides():
                raise ValueError(f"{of} must hide from detectors, got {type(round_attack.objective).__name__}")
            _refuse_targeted_or_coupled(of, round_attack)
            for strength, part in _missing_strengths(round_attack).items():
                raise ValueError(f"{of} needs a {strength}: give one to {part}")
        self.name, self.network, self.role = name, network, role
        self.epochs_per_level, self.replay, self.seed = epochs_per_level, replay, seed
        levels = [
            Level(
                tuple(LevelAttack(one.name, one.attack, one.start * gamma**level) for one in vanilla), concealed=False
            )
            for level in range(n_levels)
        ]
        if round_attack is not None:
            levels += [Level((LevelAttack("concealed", round_attack, None),), concealed=True)] * n_rounds
        self.levels = tuple(levels)

    @property
    def n_epochs(self) -> int:
        """Epochs of all levels."""
        return len(self.levels) * self.epochs_per_level

    def level_at(self, epoch: int) -> int:
        """Number of the level in epoch 0, 1, ...; the last one afterwards."""
        return min(epoch // self.epochs_per_level, len(self.levels) - 1)

    def provenance(self, network: nn.Module) -> dict[str, str]:
        """Seed, architecture, training attacks and data split of a network that was made by this plan.

        Beside its given name an attack is listed by its parts, so that the same one under two names is the same.
        """
        attacks = []
        for one in self.levels[0].attacks:
            parts = (one.attack.objective, one.attack.stepper, one.attack.projection)
            attacks += [one.name, " ".join(type(part).__name__ for part in parts if part is not None)]
        attacks += ["concealed"] * any(level.concealed for level in self.levels)
        return {
            "seed": str(self.seed),
            "architecture": type(network).__name__,
            "training_attacks": ", ".join(dict.fromkeys(attacks)),
            "data_split": DATA_SPLIT,
        }


class AdversarialBank:
    """Adversarial series by level and attack, made when first asked for and kept.

    Of several processes each makes the series that it is asked for, and has those of the others after
    :meth:`exchange`.

    Args:
        n_series: n.
        make: ``(level, number of the attack in it, rows (B,)) -> (B, T, C)`` makes them.
    """

    def __init__(self, n_series: int, make: Callable[[int, int, Tensor], Tensor]) -> None:
        self._n_series = n_series
        self._make = make
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._known: dict[tuple[int, int], Tensor] = {}
        self._news: list[tuple[tuple[int, int], Tensor]] = []

    def get(self, level: int, rows: Tensor, attack: int = 0) -> Tensor:
        """``(B, T, C)`` series of an attack of a level, on the device of the rows."""
        key = (level, attack)
        numbers = rows.cpu()
        missing = torch.ones_like(numbers, dtype=torch.bool) if key not in self._known else ~self._known[key][numbers]
        if missing.any():
            self._keep(key, numbers[missing], self._make(level, attack, numbers[missing]))
            self._news.append((key, numbers[missing]))
        return self._kept[key][numbers.to(self._kept[key].device)].to(rows.device)

    def _keep(self, key: tuple[int, int], rows: Tensor, series: Tensor) -> None:
        if key not in self._kept:
            self._kept[key] = series.new_zeros(self._n_series, *series.shape[1:])
            self._known[key] = torch.zeros(self._n_series, dtype=torch.bool)
        self._kept[key][rows.to(self._kept[key].device)] = series.to(self._kept[key].device)
        self._known[key][rows] = True

    def exchange(self, device: torch.device | str = "cpu") -> None:
        """Give the other processes what was made here since the last exchange, and take what they made: a collective.

        Args:
            device: Where series of a level that is new here are kept.
        """
        news, self._news = self._news, []
        if n_processes() == 1:
            return
        sent = [(key, rows, self._kept[key][rows.to(self._kept[key].device)].cpu()) for key, rows in news]
        for number, made in enumerate(gather_objects(sent)):
            for key, rows, series in made if number != rank() else ():
                self._keep(key, rows, series.to(device))

    def sample(self, level: int, rows: Tensor, replay: float, n_attacks: Sequence[int] | None = None) -> Tensor:
        """``(B, T, C)``: each series at ``level``, or with probability ``replay`` at any level up to it alike.

        Args:
            level: The present one.
            rows: ``(B,) int64``.
            replay: In 0..1.
            n_attacks: Attacks of levels 0..level, of which each series is shown under one, all alike; default one each.
        """
        levels = torch.full((len(rows),), level)
        if replay > 0 and level > 0:
            drawn = torch.randint(level + 1, (len(rows),))
            levels = torch.where(torch.rand(len(rows)) < replay, drawn, levels)
        attacks = torch.zeros_like(levels)
        if n_attacks is not None and max(n_attacks) > 1:
            attacks = (torch.rand(len(rows)) * torch.tensor(n_attacks)[levels]).long()
        series = self.get(level, rows).clone()
        for other, attack in torch.stack([levels, attacks], 1).unique(dim=0).tolist():
            if (other, attack) != (level, 0):
                chosen = ((levels == other) & (attacks == attack)).to(series.device)
                series[chosen] = self.get(other, rows[chosen], attack)
        return series

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What was made, by ``"level/attack"``: ``series (n, T, C)`` and ``known (n,) bool``, for a checkpoint.

        Made again they could differ in their last bits, for a batch of other series rounds otherwise.
        """
        return {
            f"{level}/{attack}": {"series": series, "known": self._known[level, attack]}
            for (level, attack), series in self._kept.items()
        }

    def load_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take up what :meth:`state` gave."""
        for name, kept in state.items():
            level, attack = map(int, name.split("/"))
            self._kept[level, attack], self._known[level, attack] = kept["series"].clone(), kept["known"].clone()


def detection_loss(clean_logits: Tensor, adversarial_logits: Tensor) -> Tensor:
    """Binary cross-entropy of a discriminator, clean 0 and adversarial 1, in equal parts.

        loss = (mean softplus(g(x)) + mean softplus(-g(x_adv))) / 2

    Args:
        clean_logits: ``(B, 1) float``.
        adversarial_logits: ``(B, 1) float``.
    """
    softplus = torch.nn.functional.softplus
    return (softplus(clean_logits).mean() + softplus(-adversarial_logits).mean()) / 2


def _refuse_targeted_or_coupled(of: str, attack: Attack) -> None:
    if attack.targeted or attack.couples_batch:
        found = "is targeted" if attack.targeted else "couples the series of a batch"
        raise ValueError(f"{of} must be untargeted and attack each series by itself, it {found}")


def _missing_strengths(attack: Attack) -> dict[str, str]:
    """What an attack has no value of, ``"step"`` or ``"radius"``, and the part that takes it."""
    missing = {}
    if not attack.stepper.step_from_radius and attack.stepper.step is None:
        missing["step"] = type(attack.stepper).__name__
    if attack.projection is not None and attack.projection.radius is None:
        missing["radius"] = type(attack.projection).__name__
    return missing


class AttackPlan:
    """An attack of the test with the grid that validation chooses from.

    Args:
        name: Unique, in reports.
        family: Attacks of one family differ in their objective alone; its vanilla member is their baseline.
        attack: Objective, stepper, projection, constraints.
        steps: Steps to choose from; empty keeps the stepper's own.
        radii: Radii to choose from; empty keeps the projection's own.
        alphas: Weights to choose from, 0 leaving the detectors out; empty keeps the objective's own.
        calibrate: Whether the objective divides logits by their median absolute clean value on validation.
        n_restarts: Draws of noise for every configuration, the seeds of the grid; validation chooses among them too.
        surrogate: Arguments of :func:`lightning_modules.attacks.load_victim` for a classifier that gives gradients and
            values in place of the attacked one: black-box transfer. The attacked one only scores, on validation too.

    Raises:
        ValueError: If an axis has no place in the attack, holds a value twice, a step or radius that is not above 0 or
            an alpha below 0; a step or a radius is nowhere given; there is no restart, or several of an attack that
            draws no noise; the attack aims at classes, keeps its best iterate or couples the series of a batch; a
            surrogate is given to an objective without a classifier.
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
        n_restarts: int = 1,
        surrogate: dict[str, Any] | None = None,
    ) -> None:
        for axis, values in (("steps", steps), ("radii", radii)):
            if any(not 0 < value < math.inf for value in values):
                raise ValueError(f"{axis} of attack {name!r} must be above 0 and finite, got {list(values)}")
        if any(not 0 <= value < math.inf for value in alphas):
            raise ValueError(f"alphas of attack {name!r} must be at least 0 and finite, got {list(alphas)}")
        if n_restarts < 1 or (n_restarts > 1 and not attack.is_random):
            allowed = "at least 1" if attack.is_random else "1: it draws no noise, all restarts would be the same"
            raise ValueError(f"n_restarts of attack {name!r} must be {allowed}, got {n_restarts}")
        if radii and attack.projection is None:
            raise ValueError(f"radii of attack {name!r} need a projection, it has none")
        if alphas and not hasattr(attack.objective, "alpha"):
            raise ValueError(f"alphas of attack {name!r}: {type(attack.objective).__name__} has no alpha")
        if attack.targeted or attack.keep == "best" or attack.couples_batch:
            raise ValueError(
                f"attack {name!r} must be untargeted, keep its last iterate and not couple the series of a batch: the "
                "iterate is chosen by number, for all series alike"
            )
        if surrogate is not None and not attack.objective.attacks_classifier:
            kind = type(attack.objective).__name__
            raise ValueError(f"surrogate of attack {name!r}: {kind} reads no classifier that it could stand for")
        if attack.stepper.step_from_radius and steps:
            kind = type(attack.stepper).__name__
            raise ValueError(f"steps of attack {name!r}: {kind} takes its step from the radius, give radii")
        for strength, part in _missing_strengths(attack).items():
            axis, given = {"step": ("steps", steps), "radius": ("radii", radii)}[strength]
            if not given:
                raise ValueError(f"attack {name!r} needs a {strength}: give {axis}, or one to {part}")
        grid_points(steps=steps, radii=radii, alphas=alphas)  # refuses what occurs twice
        self.name, self.family, self.attack, self.calibrate = name, family, attack, calibrate
        self.steps, self.radii, self.alphas = tuple(steps), tuple(radii), tuple(alphas)
        self.n_restarts, self.surrogate = n_restarts, surrogate
