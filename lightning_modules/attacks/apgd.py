"""Auto-PGD: sign steps that choose their own length.

B series, T steps, C channels, N iterations.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_modules.attacks.gradients import Direction, choose, move
from lightning_modules.attacks.projections import Projection, Strength
from lightning_modules.attacks.steppers import Advance, Stepper

if TYPE_CHECKING:
    from lightning_modules.attacks.run import Evaluation, Run


class APGD(Stepper):
    """Auto-PGD: sign steps with momentum 0.75 whose length starts at ``2 radius`` and halves where progress stalls.

    Checkpoints lie at ``0, 0.22 N, 0.41 N, ...`` (gaps shrink by 0.03 N down to 0.06 N). At one, a series halves its
    step and goes back to its best point if fewer than 75 % of the steps since the last checkpoint rose, or if neither
    step nor best value changed between them.

    Args:
        momentum: Share of the new move against the last one.
        threshold: The 75 %.
        direction: As in :class:`PGDStep`.

    Raises:
        ValueError: If a share lies outside 0..1 or ``direction`` is unknown; at the attack, without a projection or
            with a step of the call's own.

    Source: F. Croce and M. Hein, arXiv 2003.01690, algorithm 1.
    """

    uses_values = True
    step_from_radius = True
    ball = Projection

    def __init__(self, momentum: float = 0.75, threshold: float = 0.75, direction: Direction = "sign") -> None:
        super().__init__()
        self._move = move(direction)
        for name, value in (("momentum", momentum), ("threshold", threshold)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} of APGD must lie in 0..1, got {value}")
        self.momentum, self.threshold = momentum, threshold

    def length(self, step: Strength | None, radii: Tensor | None, n_steps: int) -> Strength:
        """``2 radius`` to begin with."""
        if step is not None:
            raise ValueError("APGD takes its step from the radius: give radius=, not step=")
        assert radii is not None
        return 2 * radii.flatten()

    @staticmethod
    def checkpoints(n_steps: int) -> list[int]:
        """Steps at which the length is reconsidered, increasing, all below ``n_steps``."""
        shares, gap = [0.0, 0.22], 0.22
        while shares[-1] < 1:
            gap = max(gap - 0.03, 0.06)
            shares.append(shares[-1] + gap)
        # rounded first: 0.41 * 100 is 41.00000000000001 in binary
        points = [-int(-round(share * n_steps, 9) // 1) for share in shares]
        return sorted({point for point in points if 0 < point < n_steps})

    def start(self, run: "Run") -> Advance:
        """Remembers the last move, the best point and how often the value rose."""
        checkpoints = self.checkpoints(run.n_steps)
        step = run.step
        last_x = run.ball.x0
        best_x, best_climb = last_x, torch.zeros_like(last_x)
        best = torch.full((len(last_x),), -torch.inf, dtype=last_x.dtype, device=last_x.device)
        value_before, checked_best = best, best
        rises = torch.zeros_like(best)
        halved = torch.ones_like(best, dtype=torch.bool)
        k = last_checkpoint = 0

        def advance(x: Tensor, evaluation: "Evaluation") -> tuple[Tensor, None]:
            nonlocal step, last_x, best_x, best_climb, best, value_before, checked_best, rises, halved, k
            nonlocal last_checkpoint
            climb, value = evaluation.climb, evaluation.value
            if k:  # the clean series rose from nowhere
                rises = rises + (value > value_before)
            value_before = value
            better = value > best
            best = torch.where(better, value, best)
            best_x, best_climb = choose(better, x, best_x), choose(better, climb, best_climb)
            here, before, share = x, last_x, self.momentum if k else 1.0
            if k in checkpoints:
                stalled = rises < self.threshold * (k - last_checkpoint)
                halve = stalled | (~halved & (checked_best == best))
                step = torch.where(halve[:, None, None], step / 2, step)
                here, climb = choose(halve, best_x, here), choose(halve, best_climb, climb)
                halved, checked_best, rises, last_checkpoint = halve, best, torch.zeros_like(rises), k
            ahead = run.confine(here + step * self._move(climb))
            last_x = here  # the best point takes the place of the iterate, for the next move too
            k += 1
            return run.confine(here + share * (ahead - here) + (1 - share) * (here - before)), None

        return advance
