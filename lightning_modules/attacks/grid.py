"""A whole grid of attack strengths as one batch.

B series, G configurations, N iterations, K' logits, M detectors. Every series is repeated for each configuration and
its strengths are laid along the batch, so that the device sees large batches and no configuration waits for another.
Every iterate of an unprojected run is the end of a shorter one: one run scores them all.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_modules.attacks.engine import Attack, AttackResult
from lightning_modules.attacks.frozen_networks import Network

RESTART_STRIDE = 2**40
"""Distance between the noise numbers of two restarts of a series; far above any number of series."""

DEVICE_ROWS = 4096
"""Most series times configurations of a pass."""


@dataclass(frozen=True)
class GridPoint:
    """One configuration.

    Attributes:
        step: Step, in units of the series; None: the stepper's own.
        radius: Radius; None: the projection's own.
        alpha: Weight; None: the objective's own.
        restart: Number of the draw of noise; 0 is the noise of a run outside a grid.
    """

    step: float | None
    radius: float | None
    alpha: float | None
    restart: int = 0


@dataclass
class GridResult:
    """Scores of every iterate under every configuration.

    Attributes:
        points: The G configurations.
        logits: ``(G, N + 1, B, K') float``.
        detector_logits: ``(G, N + 1, M, B) float``.
        n_bad_gradients: ``(G, B) int64``.
        n_zero_gradients: ``(G, B) int64``.
        n_gradients: Gradients taken for each series under each configuration.
    """

    points: list[GridPoint]
    logits: Tensor
    detector_logits: Tensor
    n_bad_gradients: Tensor
    n_zero_gradients: Tensor
    n_gradients: int


def grid_points(
    *,
    steps: Sequence[float] = (),
    radii: Sequence[float] = (),
    alphas: Sequence[float] = (),
    n_restarts: int = 1,
) -> list[GridPoint]:
    """The product of all axes; an empty axis leaves the attack's own value.

    Args:
        steps: Steps, in units of the series.
        radii: Radii.
        alphas: Weights.
        n_restarts: Draws of noise, at least 1: the seeds of the grid.

    Raises:
        ValueError: If ``n_restarts`` is below 1 or a configuration occurs twice.
    """
    if n_restarts < 1:
        raise ValueError(f"n_restarts must be at least 1, got {n_restarts}")
    for name, axis in (("steps", steps), ("radii", radii), ("alphas", alphas)):
        if len(set(axis)) < len(axis):
            raise ValueError(f"{name} must differ from each other, got {list(axis)}")
    axes: list[Sequence[float | None]] = [axis or [None] for axis in (steps, radii, alphas)]
    product = itertools.product(*axes)
    return [GridPoint(step, radius, alpha, r) for step, radius, alpha in product for r in range(n_restarts)]


def run_grid(
    attack: Attack,
    model: Network,
    x: Tensor,
    y: Tensor,
    points: Sequence[GridPoint],
    *,
    mask: Tensor | None = None,
    index: Tensor | None = None,
    weights: Tensor | None = None,
    max_rows: int | None = None,
    generator: torch.Generator | int | None = None,
    **arguments: Any,
) -> GridResult:
    """Run an attack under every configuration at once.

    Args:
        attack: What is run; its own strengths stand where a configuration has None.
        model: Victim.
        x: ``(B, T, C) float`` clean series.
        y: ``(B,) int64`` labels.
        points: Configurations; each axis is given in all of them or in none.
        mask: ``(B, T) bool`` or None.
        index: ``(B,) int64`` number of each series.
        weights: ``(B,) float`` or None.
        max_rows: Series times configurations in memory at a time, at least 1; the result does not depend on it.
            Default 4096; on a CPU the attack cuts what it gets further.
        generator: As in :class:`Attack`; all configurations share the seed, so a series meets the same noise in each
            and restarts differ.
        arguments: Further arguments of the attack: ``detectors``, ``surrogate``.

    Raises:
        ValueError: If there is no configuration, an axis is given in some only, the attack couples the series of a
            batch, and as the attack.
    """
    if not points:
        raise ValueError("points must hold at least one configuration, got none")
    if attack.couples_batch:
        raise ValueError("a grid needs an attack whose series do not depend on their batch")
    if max_rows is None:
        max_rows = max(DEVICE_ROWS // len(x) * len(x), min(DEVICE_ROWS, len(x)))  # whole configurations where they fit
    if max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}")
    strengths: dict[str, Tensor] = {}
    for axis in ("step", "radius", "alpha"):
        values = [getattr(point, axis) for point in points]
        if any(value is None for value in values) != all(value is None for value in values):
            raise ValueError(f"{axis} must be given in every configuration or in none, got {values}")
        if values[0] is not None:
            strengths[axis] = torch.tensor(values, dtype=x.dtype, device=x.device)
    numbers = torch.arange(len(x), device=x.device) if index is None else index
    restarts = torch.tensor([point.restart for point in points], device=x.device)
    seed = attack.seed(generator)  # drawn once, as a single run would
    # configurations without a weight go by themselves: their detectors need no backward pass
    weighted = strengths["alpha"] != 0 if "alpha" in strengths else torch.ones(len(points), dtype=torch.bool)
    order = weighted.to(x.device).repeat_interleave(len(x)).argsort(stable=True)
    back, n_weightless = order.argsort(), len(x) * int((~weighted).sum())
    parts: list[AttackResult] = []
    for some in (*order[:n_weightless].split(max_rows), *order[n_weightless:].split(max_rows)):
        if not len(some):
            continue
        series, configuration = some % len(x), some // len(x)
        laid: dict[str, Any] = {name: values[configuration] for name, values in strengths.items()}
        if not bool(weighted[configuration[0]]):
            laid["alpha"] = 0.0
        parts.append(
            attack(
                model,
                x[series],
                y[series],
                mask=None if mask is None else mask[series],
                index=numbers[series] + restarts[configuration] * RESTART_STRIDE,
                weights=None if weights is None else weights[series],
                generator=seed,
                **laid,
                **arguments,
            )
        )
    joined = AttackResult.join(parts)
    shape = (len(points), len(x))
    return GridResult(
        points=list(points),
        logits=joined.logits[:, back].unflatten(1, shape).movedim(1, 0),
        detector_logits=joined.detector_logits[:, :, back].unflatten(2, shape).movedim(2, 0),
        n_bad_gradients=joined.n_bad_gradients[back].unflatten(0, shape),
        n_zero_gradients=joined.n_zero_gradients[back].unflatten(0, shape),
        n_gradients=joined.n_gradients,
    )
