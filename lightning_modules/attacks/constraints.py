"""Sets a perturbed series must stay in, besides the ball.

B series, T steps, C channels. A constraint maps an iterate to one that meets it. The attack applies them in order
after the projection and projects once more, so that the ball has the last word; :class:`ZNormManifold` is written to
meet both. Steps that :class:`Frozen` holds are no steps for the others, as padded ones, which never change. Where
:class:`LowPass` is among them its subspace comes first, and the ball shortens the perturbation as a whole; with bounds
beside it projections take turns. So all of them hold at once; what cannot is refused (:func:`refuse_together`).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

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

    def shorten(self, x: Tensor) -> Tensor:
        """As :meth:`project`, but the perturbation keeps its direction in an linf ball too."""
        if self.projection is None or self.radii is None:
            return x
        return self.x0 + self.projection.shorten(x - self.x0, self.radii)

    def holds(self, x: Tensor) -> Tensor:
        """``(B, 1, 1) bool``: inside or on the ball."""
        if self.projection is None or self.radii is None:
            return torch.ones(len(x), 1, 1, dtype=torch.bool, device=x.device)
        return self.projection.norm(x - self.x0) <= self.radii


class Constraint(ABC):
    """A set of admissible series, and a map into it.

    Attributes:
        is_subspace: Whether perturbations of the set are a subspace, with the orthogonal projection on it as the map.
    """

    is_subspace: ClassVar[bool] = False

    def held(self, x0: Tensor) -> Tensor | None:
        """``(T,) bool`` time steps that may not move, None for none."""
        return None

    def check(self, x0: Tensor, mask: Tensor | None) -> None:  # noqa: B027 - most sets hold any clean series
        """Raise ``ValueError`` where the clean series ``(B, T, C)`` or their mask do not suit the set."""

    @abstractmethod
    def apply(self, x: Tensor, ball: Ball, mask: Tensor | None) -> Tensor:
        """Map the iterate ``(B, T, C)`` into the set, not in place.

        Args:
            x: The iterate.
            ball: ``ball.x0`` is the clean series.
            mask: ``(B, T) bool`` steps that may move, None for all.
        """


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

    def held(self, x0: Tensor) -> Tensor:
        """The segments."""
        held = torch.zeros(x0.shape[1], dtype=torch.bool, device=x0.device)
        for start, stop in self.segments:
            held[start:stop] = True
        return held

    def apply(self, x: Tensor, ball: Ball, mask: Tensor | None) -> Tensor:
        """Put the clean values back."""
        return torch.where(self.held(x)[:, None], ball.x0, x)


class LowPass(Constraint):
    """Perturbation without frequencies above a cut-off: an orthogonal projection on the lowest Fourier terms.

    Balls shorten the perturbation and keep it so. Beside :class:`Bounds`, which hold to the last digit, a thousandth of
    it may lie above the cut-off. Beside :class:`Frozen` it is the projection on those sums of these terms that are 0 at
    the frozen steps; of the few terms of a low cut-off little may be left then, and where nothing is the attack is
    refused.

    Args:
        cutoff: Highest frequency kept, in cycles a step, above 0 and below 0.5 (Nyquist).

    Raises:
        ValueError: If ``cutoff`` lies outside; at the attack, if series are padded, which would smear over their end,
            or no sum of the terms is 0 at the frozen steps.
    """

    is_subspace = True

    def __init__(self, cutoff: float) -> None:
        if not 0 < cutoff < 0.5:
            raise ValueError(f"cutoff must lie strictly between 0 and 0.5 cycles a step, got {cutoff}")
        self.cutoff = cutoff
        self._asked: tuple[Tensor, Tensor | None] | None = None

    def check(self, x0: Tensor, mask: Tensor | None) -> None:
        """Refuse padded series."""
        if mask is not None and not bool(mask.all()):
            raise ValueError("LowPass needs series of one length, got padded steps in the mask")

    def apply(self, x: Tensor, ball: Ball, mask: Tensor | None) -> Tensor:
        """Drop the high frequencies of ``x - x0``."""
        delta = (x - ball.x0).to(torch.promote_types(x.dtype, torch.float32))  # no FFT in half precision on a CPU
        projector = None if mask is None else self._projector(mask)
        low = self._filtered(delta) if projector is None else torch.einsum("st,btc->bsc", projector.to(delta), delta)
        return ball.x0 + low.to(x.dtype)

    def _filtered(self, delta: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(delta, dim=1)
        kept = torch.fft.rfftfreq(delta.shape[1], device=delta.device) <= self.cutoff
        return torch.fft.irfft(spectrum * kept[:, None], n=delta.shape[1], dim=1)

    def _projector(self, mask: Tensor) -> Tensor | None:
        """``(T, T) float64`` on low frequencies that are 0 where steps may not move; None where all may.

        Kept for the mask it was asked for, which is one object in all steps of a run: nothing else is read in a loop.
        """
        if self._asked is None or self._asked[0] is not mask:
            self._asked = mask, None if bool(mask.all()) else self._beside(mask[0])
        return self._asked[1]

    def _beside(self, moving: Tensor) -> Tensor:
        every = torch.eye(len(moving), dtype=torch.float64, device=moving.device)[None]
        values, terms = torch.linalg.eigh(self._filtered(every)[0])  # 1 for the terms that are kept, else 0
        terms = terms[:, values > 0.5]
        _, sizes, rows = torch.linalg.svd(terms[~moving], full_matrices=True)
        # sums of terms that are 0 at the frozen steps, to a digit that putting clean values back there drops
        free = terms @ rows[int((sizes > 1e-7).sum()) :].T
        if free.shape[1] == 0:
            n_held = int((~moving).sum())
            raise ValueError(
                f"LowPass({self.cutoff}) keeps {terms.shape[1]} terms, and none of their sums is 0 at the {n_held} "
                "frozen steps: nothing could move"
            )
        return free @ free.T


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


_APART = ((ZNormManifold, Bounds), (ZNormManifold, LowPass))


def refuse_together(constraints: Sequence[Constraint]) -> None:
    """Raise where of two constraints each undoes what the other did, so that the last one alone would hold.

    Raises:
        ValueError: If there are such two.
    """
    for pair in _APART:
        if all(any(isinstance(one, kind) for one in constraints) for kind in pair):
            first, second = (kind.__name__ for kind in pair)
            raise ValueError(f"constraints {first} and {second} undo each other: give one of them")
