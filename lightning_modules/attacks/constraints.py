"""Sets a perturbed series must stay in, besides the ball.

B series, T steps, C channels. A constraint maps an iterate to one that meets it. The attack applies them in order
after the projection and projects once more, so that the ball has the last word; :class:`ZNormManifold` is written to
meet both. Padded steps never change: the attack sees to that by itself.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_modules.attacks.projections import Projection, centred


class Ball:
    """A projection with its radii about given clean series, as constraints see it.

    Args:
        projection: The norm, or None for the whole space.
        radii: ``(B, 1, 1) float``, None with no projection.
        x0: ``(B, T, C) float`` clean series.
    """

    def __init__(self, projection: Projection | None, radii: Tensor | None, x0: Tensor) -> None:
        self.projection, self.radii, self.x0 = projection, radii, x0

    def project(self, x: Tensor) -> Tensor:
        """Shorten the perturbation: the clean series plus its projection. Without a ball ``x``, to the last bit."""
        if self.projection is None or self.radii is None:
            return x
        return self.x0 + self.projection.project(x - self.x0, self.radii)

    def holds(self, x: Tensor) -> Tensor:
        """``(B, 1, 1) bool``: inside or on the ball."""
        if self.projection is None or self.radii is None:
            return torch.ones(len(x), 1, 1, dtype=torch.bool, device=x.device)
        return self.projection.norm(x - self.x0) <= self.radii


class Constraint(ABC):
    """A set of admissible series, and a map into it."""

    def check(self, x0: Tensor, mask: Tensor | None) -> None:  # noqa: B027 - most sets hold any clean series
        """Raise ``ValueError`` where the clean series ``(B, T, C)`` or their mask do not suit the set."""

    @abstractmethod
    def apply(self, x: Tensor, ball: Ball, mask: Tensor | None) -> Tensor:
        """Map the iterate ``(B, T, C)`` into the set, not in place; ``ball.x0`` is the clean series."""


class Bounds(Constraint):
    """``low <= x <= high``.

    Args:
        low: Least value, in units of the series.
        high: Greatest value, above ``low``.

    Raises:
        ValueError: If ``low`` is not below ``high``; at the attack, if a clean series lies outside, since then no
            small perturbation could be admissible.
    """

    def __init__(self, low: float, high: float) -> None:
        if not low < high:
            raise ValueError(f"low must be below high, got low {low} and high {high}")
        self.low, self.high = low, high

    def check(self, x0: Tensor, mask: Tensor | None) -> None:
        """Refuse clean series outside the bounds."""
        valid = x0 if mask is None else x0[mask]
        if bool(((valid < self.low) | (valid > self.high)).any()):
            low, high = valid.min().item(), valid.max().item()
            raise ValueError(f"clean series must lie in {self.low}..{self.high}, got values in {low:g}..{high:g}")

    def apply(self, x: Tensor, ball: Ball, mask: Tensor | None) -> Tensor:
        """Clamp the values."""
        return x.clamp(self.low, self.high)


class Frozen(Constraint):
    """Segments of time whose values do not change.

    Args:
        segments: ``(start, stop)`` pairs of time steps, ``0 <= start < stop``, ``stop`` exclusive.

    Raises:
        ValueError: If a segment is empty or starts before 0; at the attack, if it ends beyond the series.
    """

    def __init__(self, segments: Sequence[tuple[int, int]]) -> None:
        for start, stop in segments:
            if not 0 <= start < stop:
                raise ValueError(f"a frozen segment needs 0 <= start < stop, got ({start}, {stop})")
        self.segments = [(int(start), int(stop)) for start, stop in segments]

    def check(self, x0: Tensor, mask: Tensor | None) -> None:
        """Refuse segments beyond the end."""
        for start, stop in self.segments:
            if stop > x0.shape[1]:
                raise ValueError(f"frozen segment ({start}, {stop}) ends beyond the {x0.shape[1]} steps of the series")

    def apply(self, x: Tensor, ball: Ball, mask: Tensor | None) -> Tensor:
        """Put the clean values back."""
        x = x.clone()
        for start, stop in self.segments:
            x[:, start:stop] = ball.x0[:, start:stop]
        return x


class LowPass(Constraint):
    """Perturbation without frequencies above a cut-off: an orthogonal projection on the lowest Fourier terms.

    An l2 or l1 ball scales the perturbation and keeps it; the clamp of an linf ball comes after it and puts some high
    frequencies back.

    Args:
        cutoff: Highest frequency kept, in cycles a step, above 0 and below 0.5 (Nyquist).

    Raises:
        ValueError: If ``cutoff`` lies outside; at the attack, if series are padded, which would smear over their end.
    """

    def __init__(self, cutoff: float) -> None:
        if not 0 < cutoff < 0.5:
            raise ValueError(f"cutoff must lie strictly between 0 and 0.5 cycles a step, got {cutoff}")
        self.cutoff = cutoff

    def check(self, x0: Tensor, mask: Tensor | None) -> None:
        """Refuse padded series."""
        if mask is not None and not bool(mask.all()):
            raise ValueError("LowPass needs series of one length, got padded steps in the mask")

    def apply(self, x: Tensor, ball: Ball, mask: Tensor | None) -> Tensor:
        """Drop the high frequencies of ``x - x0``."""
        n_steps = x.shape[1]
        spectrum = torch.fft.rfft(x - ball.x0, dim=1)
        kept = torch.fft.rfftfreq(n_steps, device=x.device) <= self.cutoff
        return ball.x0 + torch.fft.irfft(spectrum * kept[:, None], n=n_steps, dim=1)


class ZNormManifold(Constraint):
    """Series that keep the mean and the standard deviation of the clean one, channel by channel (trap T7).

    A series of archives that z-normalise keeps mean 0 and deviation 1 up to the rounding of its dtype. Without a ball
    the iterate is re-normalised. With one, the point is moved along the great circle back towards the clean series
    until it is inside: both lie on one sphere of zero-mean series, and so does every point between them.

    A constant channel has a manifold of one point and does not change.

    Args:
        n_bisections: Halvings of the way along the circle; ``2^-n`` of the perturbation is given away at most.

    Raises:
        ValueError: If ``n_bisections`` is below 1.
    """

    def __init__(self, n_bisections: int = 12) -> None:
        if n_bisections < 1:
            raise ValueError(f"n_bisections must be at least 1, got {n_bisections}")
        self.n_bisections = n_bisections

    def apply(self, x: Tensor, ball: Ball, mask: Tensor | None) -> Tensor:
        """Re-normalise, then go back along the great circle while outside the ball."""
        # float64: the constraint is judged by how little the statistics move, below 1e-6
        clean = ball.x0.double()
        start = centred(clean, mask)
        moved = centred(x.double(), mask)
        level = clean - start
        size = torch.linalg.vector_norm(start, dim=1, keepdim=True)
        length = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
        fixed = (size == 0) | (length == 0)
        moved = torch.where(fixed, start, moved * (size / length.clamp(min=torch.finfo(torch.float64).tiny)))
        if ball.projection is None:
            return (level + moved).to(x.dtype)

        def along(share: Tensor) -> Tensor:
            chord = start + share * (moved - start)
            shrunk = torch.linalg.vector_norm(chord, dim=1, keepdim=True)
            point = chord * torch.where(shrunk > 0, size / shrunk.clamp(min=torch.finfo(torch.float64).tiny), 1.0)
            return (level + point).to(x.dtype)

        low = ball.holds(along(torch.ones_like(ball.x0[:, :1, :1], dtype=torch.float64))).double()
        for halving in range(1, self.n_bisections + 1):
            further = (low + 0.5**halving).clamp(max=1.0)
            low = torch.where(ball.holds(along(further)), further, low)
        return along(low)
