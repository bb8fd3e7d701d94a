"""Attacks that look for the nearest series of another class: DeepFool and C&W-L2.

B series, T steps, C channels, K classes. Lengths are Euclidean, over all time and channel positions of a series.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.attacks.class_losses import decisions, logit_margin
from lightning_modules.attacks.frozen_networks import Network, call, frozen, taken_mask
from lightning_modules.attacks.gradients import gradient
from lightning_modules.attacks.run import check_series
from lightning_modules.attacks.victims import check_outputs, check_shape, refuse_train_mode


@dataclass
class MinimumNormResult:
    """Nearest adversarial series found.

    Attributes:
        x_adv: ``(B, T, C) float``; the clean series where none was found.
        fooled: ``(B,) bool``; a series that is misclassified already needs no perturbation.
        l2: ``(B,) float`` Euclidean length of the perturbation, in units of the series.
    """

    x_adv: Tensor
    fooled: Tensor
    l2: Tensor


@contextmanager
def _victim(
    model: Network, x: Tensor, y: Tensor, mask: Tensor | None
) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
    check_series(x, y, mask)
    with frozen([model], x.device):
        taken = taken_mask(model, mask, "classifier")
        clean, valid = x.detach().clone(), None if taken is None else taken.clone()
        with torch.no_grad():
            logits = call(model, clean.clone(), valid)
        check_shape(logits, len(x), "classifier")
        refuse_train_mode(model, clean, valid)
        check_outputs(model, clean, valid, logits, "classifier", y)
        yield clean, lambda point: call(model, point, valid)


def _result(found: Tensor, clean: Tensor, fooled: Tensor, mask: Tensor | None) -> MinimumNormResult:
    delta = found - clean if mask is None else (found - clean).masked_fill(~mask[..., None], 0.0)
    return MinimumNormResult(found, fooled, torch.linalg.vector_norm(delta, dim=(1, 2)))


class DeepFool:
    """Steps to the nearest face of the linearised decision region, then a little over it.

    At each step ``l = argmin_j |z_j - z_y| / |w_j|`` with ``w_j = grad (z_j - z_y)`` over the classes ``j != y`` and
    ``r += (|z_l - z_y| / |w_l|^2) w_l``; the point is ``x + (1 + overshoot) r``. A series stops once it has left the
    region of ``y``. Untargeted.

    Args:
        n_steps: Most steps, at least 1.
        overshoot: At least 0.

    Raises:
        ValueError: If an argument is out of range.

    Source: S. Moosavi-Dezfooli et al., arXiv 1511.04599, algorithm 2.
    """

    def __init__(self, n_steps: int = 50, overshoot: float = 0.02) -> None:
        if n_steps < 1 or not 0 <= overshoot < float("inf"):
            raise ValueError(f"DeepFool needs n_steps >= 1 and overshoot >= 0, got {n_steps} and {overshoot}")
        self.n_steps, self.overshoot = n_steps, overshoot

    def __call__(self, model: Network, x: Tensor, y: Tensor, *, mask: Tensor | None = None) -> MinimumNormResult:
        """Attack a batch.

        Args:
            model: Victim; left as it was found.
            x: ``(B, T, C) float``.
            y: ``(B,) int64`` classes to leave.
            mask: ``(B, T) bool`` or None; padded steps never change.

        Raises:
            ValueError: If ``x``, ``y`` or ``mask`` has a wrong shape, dtype or value, series are padded and the victim
                takes no mask, or its outputs on the clean series are not finite logits.
        """
        with _victim(model, x, y, mask) as (clean, logits_at):
            labels = y.clone()
            current, moved = clean, torch.zeros_like(clean)
            for _ in range(self.n_steps):
                point = current.detach().requires_grad_()
                logits = logits_at(point)
                outside = (decisions(logits) != labels)[:, None, None]
                step = self._to_nearest_face(logits, labels, point, mask)
                moved = torch.where(outside, moved, moved + step)
                current = torch.where(outside, current, clean + (1 + self.overshoot) * moved)
            with torch.no_grad():
                reached = logits_at(current)
                fooled = (decisions(reached) != labels) & reached.isfinite().all(dim=1)
                fooled &= moved.isfinite().all(dim=(1, 2))  # what is not finite is no series, whatever it is called
            return _result(torch.where(fooled[:, None, None], current, clean), clean, fooled, mask)

    @staticmethod
    def _to_nearest_face(logits: Tensor, labels: Tensor, point: Tensor, mask: Tensor | None) -> Tensor:
        if logits.shape[1] == 1:
            gaps = ((1 - 2 * labels) * logits[:, 0])[None]
        else:
            gaps = (logits - logits.gather(1, labels[:, None])).T
        nearest = torch.full_like(gaps[0], torch.inf)
        step = torch.zeros_like(point)
        for j, gap in enumerate(gaps):
            normal = torch.zeros_like(point)
            if gap.requires_grad:
                (normal,) = torch.autograd.grad(gap.sum(), point, retain_graph=j + 1 < len(gaps))
            normal = normal if mask is None else normal.masked_fill(~mask[..., None], 0.0)
            # scaled by the largest entry: squares of a nearly flat gap would vanish, and its step be infinite
            largest = normal.abs().amax(dim=(1, 2), keepdim=True)
            unit = normal / torch.where(largest > 0, largest, 1.0)
            size = torch.linalg.vector_norm(unit, dim=(1, 2), keepdim=True)
            unit = unit / torch.where(size > 0, size, 1.0)
            # gap < 0 inside the region; the label's own gap has no normal and never comes nearest
            slope = (largest * size).flatten()
            distance = torch.where(slope > 0, gap.detach().abs() / slope, torch.inf)
            closer = distance < nearest
            nearest = torch.where(closer, distance, nearest)
            step = torch.where(closer[:, None, None], distance[:, None, None] * unit, step)
        return step


class CarliniWagnerL2:
    """C&W-L2: Adam on ``|delta|^2 + c max(0, kappa - margin)``, with a binary search on ``c`` for each series.

    ``margin = max_{j != y} z_j - z_y`` untargeted, ``z_t - max_{j != t} z_j`` towards a target ``t``. Series have no
    natural box, so the change of variables of the original falls away.

    Args:
        n_steps: Adam steps for each ``c``.
        n_searches: Values of ``c`` tried.
        learning_rate: Of Adam, in units of the series.
        first_c: Where the search begins; it multiplies by 10 until a series is fooled.
        kappa: Margin to reach, in units of the logits.
        targeted: Labels are the classes to reach.

    Raises:
        ValueError: If an argument is out of range.

    Source: N. Carlini and D. Wagner, arXiv 1608.04644, section VI-A.
    """

    def __init__(
        self,
        n_steps: int = 200,
        n_searches: int = 6,
        *,
        learning_rate: float = 0.01,
        first_c: float = 1.0,
        kappa: float = 0.0,
        targeted: bool = False,
    ) -> None:
        if n_steps < 1 or n_searches < 1:
            raise ValueError(f"n_steps and n_searches must be at least 1, got {n_steps} and {n_searches}")
        if not (learning_rate > 0 and first_c > 0 and kappa >= 0):
            raise ValueError(
                "learning_rate and first_c must be above 0 and kappa at least 0, "
                f"got {learning_rate}, {first_c} and {kappa}"
            )
        self.n_steps, self.n_searches = n_steps, n_searches
        self.learning_rate, self.first_c, self.kappa, self.targeted = learning_rate, first_c, kappa, targeted

    def __call__(self, model: Network, x: Tensor, y: Tensor, *, mask: Tensor | None = None) -> MinimumNormResult:
        """Attack a batch; arguments, result and errors as :meth:`DeepFool.__call__`, ``y`` the targets if targeted."""
        with _victim(model, x, y, mask) as (clean, logits_at):
            labels = y.clone()
            c = torch.full_like(clean[:, 0, 0], self.first_c)
            low, high = torch.zeros_like(c), torch.full_like(c, torch.inf)
            best, shortest = clean, torch.full_like(c, torch.inf)
            for _ in range(self.n_searches):
                found, length = self._descend(logits_at, clean, labels, c, mask)
                shorter = length < shortest
                best = torch.where(shorter[:, None, None], found, best)
                shortest = torch.where(shorter, length, shortest)
                reached = length.isfinite()
                low, high = torch.where(reached, low, c), torch.where(reached, c, high)
                c = torch.where(high.isfinite(), (low + high) / 2, c * 10)
            return _result(best, clean, shortest.isfinite(), mask)

    def _descend(
        self, logits_at: Callable[[Tensor], Tensor], clean: Tensor, labels: Tensor, c: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Shortest point met with the margin reached, and its length, infinite where none was."""
        delta = torch.zeros_like(clean).requires_grad_()
        adam = torch.optim.Adam([delta], lr=self.learning_rate)
        best, shortest = clean, torch.full_like(c, torch.inf)
        for _ in range(self.n_steps):
            point = clean + delta
            margin = logit_margin(logits_at(point), labels)
            margin = -margin if self.targeted else margin
            square = delta.square().sum(dim=(1, 2))
            with torch.no_grad():
                # beyond the face, not on it: on it the first of equal logits would be decided
                shorter = (margin > self.kappa) & (square < shortest.square())
                best = torch.where(shorter[:, None, None], point, best)
                shortest = torch.where(shorter, square.sqrt(), shortest)
            slope = gradient(square + c * (self.kappa - margin).clamp(min=0), delta, None)
            delta.grad = slope if mask is None else slope.masked_fill(~mask[..., None], 0.0)
            adam.step()
        return best, shortest
