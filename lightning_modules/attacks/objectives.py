"""What an attack climbs: losses of the classifier and of the detectors, and the ways to join them.

B series, T steps, C channels, M detectors. ``L_c`` is the classifier's loss (negated for a target class), ``L_d`` the
loss the detectors suffer on the answer "adversarial"; both grow as the attack succeeds. A scalar objective has a value
``J`` for each series; a gradient objective has directions, and a value only where a stepper compares values.

Source: spec of the concealed attack, sections 3 and 4, after P. Sokerin et al., arXiv 2502.20948.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor

from lightning_modules.attacks.class_losses import CLASS_LOSSES, ClassLoss, softplus
from lightning_modules.attacks.frozen_networks import calibrate
from lightning_modules.attacks.gradients import gradient

DetectorLoss = Literal["published", "hidden", "margin"]
Aggregate = Literal["mean", "worst", "soft_worst"]


@dataclass
class Terms:
    """What an objective is computed from, at one point.

    Attributes:
        x: ``(B, T, C) float``, the point; carries the graph.
        class_loss: ``(B,) float``, ``L_c``, already negated in targeted mode.
        detector_loss: ``(B,) float``, ``L_d``; None where the objective does not look at detectors.
        alpha: ``(B,)`` float; None for objectives without.
        weights: ``(B,) float`` or None.
        mask: ``(B, T) bool`` or None.
        clean: Zeroes what is not finite and what is padded in a gradient ``(B, T, C)``, and counts.
    """

    x: Tensor
    class_loss: Tensor
    detector_loss: Tensor | None
    alpha: Tensor | None
    weights: Tensor | None
    mask: Tensor | None
    clean: Callable[[Tensor], Tensor]

    @property
    def hiding(self) -> Tensor:
        """``L_d`` of an objective that has it."""
        assert self.detector_loss is not None
        return self.detector_loss

    def weighted_by_alpha(self, term: Tensor) -> Tensor:
        """``alpha * term`` whose gradient is exactly 0 where ``alpha`` is, even where ``term`` is infinite."""
        assert self.alpha is not None
        return torch.where(self.alpha == 0, torch.zeros_like(term), self.alpha * term)


@dataclass(frozen=True, eq=False, kw_only=True)
class Objective:
    """Base of all objectives: which losses, at what scale.

    Args:
        class_loss: ``"margin"`` (does not fade with confidence), ``"cross_entropy"`` (the published form), ``"dlr"``,
            or a function ``(logits, labels) -> (B,)``.
        detector_loss: Of the detector's logit ``g``: ``"published"`` ``softplus(-g) = -log D``; ``"hidden"``
            ``-softplus(g) = log(1 - D)``, strong while detected; ``"margin"`` ``min(0, kappa - g)``.
        aggregate: Over detectors: ``"mean"``, ``"worst"`` (``min_j``), ``"soft_worst"``
            (``-log mean_j exp(-b L_j) / b``).
        kappa: Logit below which the margin form is content.
        softness: ``b`` of the soft worst case, above 0.
        victim_scale: The classifier's logits are divided by it first; see :func:`calibrate`.
        detector_scale: The same for the detectors, a number or one for each.

    Raises:
        ValueError: If a name is unknown, or a scale or ``softness`` is not a finite positive number.
    """

    class_loss: str | ClassLoss = "margin"
    detector_loss: DetectorLoss = "published"
    aggregate: Aggregate = "mean"
    kappa: float = 0.0
    softness: float = 1.0
    victim_scale: float = 1.0
    detector_scale: float | Sequence[float] = 1.0

    attacks_classifier: ClassVar[bool] = True
    hides: ClassVar[bool] = True
    has_value: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.class_loss, str) and self.class_loss not in CLASS_LOSSES:
            raise ValueError(f"class_loss must be one of {sorted(CLASS_LOSSES)} or a function, got {self.class_loss!r}")
        for name, allowed in (("detector_loss", DetectorLoss), ("aggregate", Aggregate)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {list(get_args(allowed))}, got {getattr(self, name)!r}")
        scales = [self.detector_scale] if isinstance(self.detector_scale, int | float) else self.detector_scale
        positive = {"softness": self.softness, "victim_scale": self.victim_scale}
        positive |= {f"detector_scale {position}": scale for position, scale in enumerate(scales)}
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be finite and above 0, got {value}")
        self._check_alpha(getattr(self, "alpha", 0.0))

    @property
    def couples_batch(self) -> bool:
        """Whether a series' step depends on the other series of its batch."""
        return False

    def _check_alpha(self, alpha: float) -> None:
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha of {type(self).__name__} must be finite and at least 0, got {alpha}")

    def check(self, *, n_detectors: int, hides: bool, targeted: bool) -> None:
        """Refuse what the objective cannot be computed from.

        Args:
            n_detectors: M.
            hides: Whether detectors are differentiated; False also where ``alpha`` is 0.
            targeted: Whether labels are the classes to reach.

        Raises:
            ValueError: If it hides and there is no detector, scales and detectors differ in number, or DLR is to reach
                a class: its denominator rewards other classes then.
        """
        if targeted and self.class_loss == "dlr":
            raise ValueError("class_loss 'dlr' is untargeted, got targeted=True: take 'margin' or 'cross_entropy'")
        if not hides:
            return
        if n_detectors == 0:
            raise ValueError(f"{type(self).__name__} hides from detectors: give at least one in detectors=")
        if not isinstance(self.detector_scale, int | float) and len(self.detector_scale) != n_detectors:
            raise ValueError(f"detector_scale has {len(self.detector_scale)} values for {n_detectors} detectors")

    def class_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """``L_c`` of logits ``(B, K')``: ``(B,)``."""
        loss = CLASS_LOSSES[self.class_loss] if isinstance(self.class_loss, str) else self.class_loss
        return loss(logits if self.victim_scale == 1 else logits / self.victim_scale, labels)

    def detector_losses(self, detector_logits: Tensor) -> Tensor:
        """``L_d`` of detector logits ``(M, B)``: ``(B,)``."""
        logits = detector_logits
        if self.detector_scale != 1:
            scale = torch.as_tensor(self.detector_scale, dtype=logits.dtype, device=logits.device)
            logits = logits / scale.reshape(-1, 1)
        match self.detector_loss:
            case "published":
                losses = softplus(-logits)
            case "hidden":
                losses = -softplus(logits)
            case _:
                losses = (self.kappa - logits).clamp(max=0)
        match self.aggregate:
            case "mean":
                return losses.mean(dim=0)
            case "worst":
                return losses.amin(dim=0)
            case _:
                shared = torch.logsumexp(-self.softness * losses, dim=0) - math.log(len(losses))
                return -shared / self.softness

    def values(self, terms: Terms) -> Tensor:
        """``J`` of each series, ``(B,)``.

        Raises:
            ValueError: If the objective is a rule for gradients and has no value.
        """
        raise ValueError(f"{type(self).__name__} joins gradients and has no value")

    def direction(self, terms: Terms) -> tuple[Tensor | None, Tensor]:
        """Values ``(B,)`` where there are any, and the direction to climb ``(B, T, C)``, cleaned."""
        values = self.values(terms)
        return values.detach(), terms.clean(gradient(values, terms.x, terms.weights))

    def calibrated(
        self, model: Callable[..., Tensor], detectors: Sequence[Callable[..., Tensor]], x: Tensor, **kwargs: Any
    ) -> Self:
        """The same objective on logits of scale 1: free of how confident the networks are.

        Args:
            model: Classifier.
            detectors: Detectors, in the order the attack gets them.
            x: ``(B, T, C) float`` clean series, of the validation split.
            kwargs: Further arguments of :func:`calibrate`.
        """
        scales = tuple(calibrate(detector, x, **kwargs) for detector in detectors)
        return replace(self, victim_scale=calibrate(model, x, **kwargs), detector_scale=scales or 1.0)


@dataclass(frozen=True, eq=False)
class Vanilla(Objective):
    """``J = L_c``: the classifier alone."""

    hides = False

    def values(self, terms: Terms) -> Tensor:
        """``L_c``."""
        return terms.class_loss


@dataclass(frozen=True, eq=False)
class SumReg(Objective):
    """``J = L_c + alpha L_d``; published with ``class_loss="cross_entropy"``.

    ``alpha`` weighs two losses of which each grows with its network's logits; :meth:`Objective.calibrated` removes
    that. ``alpha = 0`` equals :class:`Vanilla` bit for bit.

    Args:
        alpha: At least 0.
    """

    alpha: float = 0.1

    def values(self, terms: Terms) -> Tensor:
        """``L_c + alpha L_d``."""
        return terms.class_loss + terms.weighted_by_alpha(terms.hiding)


@dataclass(frozen=True, eq=False)
class HarmonicReg(Objective):
    """``J = 2 L_c L_d / (L_c + L_d + e)``, ``e = 1e-4``: the smaller loss weighs more, without ``alpha``.

    Args:
        coupling: ``"sample"`` joins the losses of each series; ``"batch"`` their (weighted) averages, as published,
            where a step depends on the other series. Then every series has the value ``J / B``.

    Raises:
        ValueError: If a loss can be negative (only ``"cross_entropy"`` or a function, ``"published"``), or at the
            attack in targeted mode, which negates ``L_c``.
    """

    class_loss: str | ClassLoss = "cross_entropy"
    coupling: Literal["sample", "batch"] = "sample"

    SMOOTHING: ClassVar[float] = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coupling not in ("sample", "batch"):
            raise ValueError(f"coupling must be 'sample' or 'batch', got {self.coupling!r}")
        if self.class_loss in ("margin", "dlr") or self.detector_loss != "published":
            raise ValueError(
                "HarmonicReg needs losses of at least 0: class_loss 'cross_entropy' and detector_loss 'published', "
                f"got {self.class_loss!r} and {self.detector_loss!r}"
            )

    @property
    def couples_batch(self) -> bool:
        """True for ``coupling="batch"``."""
        return self.coupling == "batch"

    def check(self, *, n_detectors: int, hides: bool, targeted: bool) -> None:
        """Refuse targeted mode too."""
        super().check(n_detectors=n_detectors, hides=hides, targeted=targeted)
        if targeted:
            raise ValueError("HarmonicReg needs losses of at least 0, and targeted=True negates the class loss")

    def values(self, terms: Terms) -> Tensor:
        """The harmonic mean of both losses."""
        both = torch.stack([terms.class_loss, terms.hiding])
        if self.coupling == "sample":
            return 2 * both.prod(dim=0) / (both.sum(dim=0) + self.SMOOTHING)
        weights = torch.ones_like(both[0]) if terms.weights is None else terms.weights
        means = (both * weights).sum(dim=1) / weights.sum()
        joint = 2 * means.prod() / (means.sum() + self.SMOOTHING)
        return joint.expand(both.shape[1]) / both.shape[1]

    def direction(self, terms: Terms) -> tuple[Tensor | None, Tensor]:
        """As for any objective; weights of a coupled batch are inside its averages already."""
        if self.coupling == "batch":
            values = self.values(terms)
            return values.detach(), terms.clean(gradient(values, terms.x, None))
        return super().direction(terms)


@dataclass(frozen=True, eq=False)
class SmoothMax(Objective):
    """``J = (e^{b L_c} L_c + e^{b L_d} L_d) / (e^{b L_c} + e^{b L_d})``.

    In targeted mode ``L_c`` of cross-entropy is never above 0, that of a margin below 0 until the target is reached,
    while ``L_d`` of the published form is never below 0 and the other forms come to 0 where detectors are evaded: the
    greater loss is the detectors'.

    Args:
        b: Any finite number: a large one follows the greater loss, 0 the mean, a negative one the smaller loss.

    Raises:
        ValueError: If ``b`` is not finite; at the attack in targeted mode, if ``b`` is above 0, or below it with
            ``class_loss="cross_entropy"`` and ``detector_loss="published"``, of which the smaller is always the first.
    """

    class_loss: str | ClassLoss = "cross_entropy"
    b: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.b):
            raise ValueError(f"b of SmoothMax must be finite, got {self.b}")

    def check(self, *, n_detectors: int, hides: bool, targeted: bool) -> None:
        """Refuse losses in targeted mode of which ``b`` follows one alone."""
        super().check(n_detectors=n_detectors, hides=hides, targeted=targeted)
        ordered = self.class_loss == "cross_entropy" and self.detector_loss == "published"
        if targeted and (self.b > 0 or (self.b < 0 and ordered)):
            raise ValueError(
                f"SmoothMax with targeted=True follows the {'detectors' if self.b > 0 else 'classifier'} alone, got b "
                f"{self.b}: take b 0, or b below 0 with class_loss 'margin' or detector_loss 'hidden' or 'margin'"
            )

    def values(self, terms: Terms) -> Tensor:
        """The mean under softmax weights, which shifts before it exponentiates."""
        both = torch.stack([terms.class_loss, terms.hiding])
        return (torch.softmax(self.b * both, dim=0) * both).sum(dim=0)


@dataclass(frozen=True, eq=False)
class NeighReg(Objective):
    """``J = L_c - alpha R_nb``: stay near the mean of both neighbours, ``R_nb`` from :func:`neighbour_roughness`.

    Args:
        alpha: At least 0.
    """

    alpha: float = 0.1

    hides = False

    def values(self, terms: Terms) -> Tensor:
        """``L_c - alpha R_nb``."""
        return terms.class_loss - terms.weighted_by_alpha(neighbour_roughness(terms.x, terms.mask))


@dataclass(frozen=True, eq=False)
class DiscOnly(Objective):
    """``J = L_d``: hide without attacking, a probe of the detectors."""

    attacks_classifier = False

    def values(self, terms: Terms) -> Tensor:
        """``L_d``."""
        return terms.hiding


def neighbour_roughness(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """``R_nb = sum_{t, c} (x_t - (x_{t-1} + x_{t+1}) / 2)^2`` over interior points, neighbours not differentiated.

    Args:
        x: ``(B, T, C) float``.
        mask: ``(B, T) bool``; a point counts where it and both neighbours are valid.

    Returns:
        ``(B,) float``, in squared units of the series; 0 for T below 3.
    """
    neighbours = ((x[:, :-2] + x[:, 2:]) / 2).detach()
    squares = (x[:, 1:-1] - neighbours).square()
    if mask is not None:
        squares = squares * (mask[:, :-2] & mask[:, 1:-1] & mask[:, 2:])[..., None]
    return squares.sum(dim=(1, 2))
