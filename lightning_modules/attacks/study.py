"""What a test of attacks found, before it is summed up.

n series, T steps, C channels, K' logits, N iterations, G configurations, J judges, m calibration series.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_modules.attacks.grid import GridPoint

Role = Literal["attacked", "held_out", "beside"]
"""``"attacked"``: attacks may read it; ``"held_out"``: no gradient, no selection, a member of the panel if it is valid;
``"beside"``: as held out, shown in the report and in no mean of the panel."""


@dataclass(frozen=True)
class SeenLevel:
    """How well a trained discriminator sees what it was trained on, on validation series.

    Attributes:
        attack: Name of the training attack.
        strength: Step or radius of the level; None for the attack's own.
        concealed: Whether it is the attack of a round.
        auc: AUC of attacked against clean validation series.
    """

    attack: str
    strength: float | None
    concealed: bool
    auc: float


@dataclass(frozen=True)
class JudgeRecord:
    """A judge and what it says of clean series.

    Attributes:
        name: Unique in the study.
        role: See :data:`Role`.
        provenance: Seed, architecture, training attacks, data split, as far as they apply.
        clean: ``(n,) float64`` scores of the clean test series, larger is more adversarial.
        calibration: ``(m,) float64`` scores of clean series, each by a judge that was made without it.
        is_probability: Whether 0.5 is a threshold, as for networks; other judges are read by AUC and by thresholds.
        levels: Of a trained discriminator, each training attack at each of its strengths; empty for other judges.
    """

    name: str
    role: Role
    provenance: dict[str, str]
    clean: Tensor
    calibration: Tensor
    is_probability: bool
    levels: tuple[SeenLevel, ...] = ()


@dataclass(frozen=True)
class ChosenAttack:
    """One attack on all test series, under the configuration that validation chose.

    Attributes:
        name: Such as ``"ifgsm sum"``.
        family: Attacks of one family differ in their objective; the vanilla one is the baseline of the others.
        concealed: Whether the objective is more than the classifier's loss, also where validation chose the weight 0.
        step: Chosen step; None where the stepper has none of its own.
        radius: Chosen radius; None without a ball.
        alpha: Chosen weight; None where the objective has none.
        iteration: Chosen iterate, 0..N.
        x_adv: ``(n, T, C) float``.
        logits: ``(N + 1, n, K')`` of the victim along the run.
        detector_logits: ``(N + 1, M, n)`` of the attacked detectors along the run.
        scores: ``{judge: (n,) float64}`` of the adversarial series.
        n_bad_gradients: ``(n,) int64``.
        n_zero_gradients: ``(n,) int64``.
        n_gradients: Gradients taken for each series.
        validation_effectiveness: ``(G, N + 1) float64`` on validation.
        validation_concealability: ``(G, N + 1) float64``.
        seconds: Time of the attack on the test series.
        restart: Chosen draw of noise.
        configurations: The G configurations that validation chose from; empty where they are not known.
        transferred: Whether a surrogate gave gradients and values, and the victim only scored.
    """

    name: str
    family: str
    concealed: bool
    step: float | None
    radius: float | None
    alpha: float | None
    iteration: int
    x_adv: Tensor
    logits: Tensor
    detector_logits: Tensor
    scores: dict[str, Tensor]
    n_bad_gradients: Tensor
    n_zero_gradients: Tensor
    n_gradients: int
    validation_effectiveness: Tensor
    validation_concealability: Tensor
    seconds: float
    restart: int = 0
    configurations: tuple[GridPoint, ...] = ()
    transferred: bool = False

    @property
    def candidates(self) -> tuple[Tensor, Tensor]:
        """``(G, N) float64`` EFF and CONC on validation at iterates 1..N: iterate 0 is no attack, and never chosen."""
        return self.validation_effectiveness[:, 1:], self.validation_concealability[:, 1:]


@dataclass(frozen=True)
class AttackStudy:
    """All attacks on one victim, and all judges.

    Attributes:
        series: ``(n, T, C) float`` clean test series.
        mask: ``(n, T) bool``.
        labels: ``(n,) int64``.
        index: ``(n,) int64`` rows of the test split.
        class_names: K names.
        clean_logits: ``(n, K')``.
        judges: Attacked first.
        attacks: In the order of the config.
        saturation: Median |logit| of the victim on clean validation series; above 17, float32 cross-entropy is flat.
        seed: Of the run.
    """

    series: Tensor
    mask: Tensor
    labels: Tensor
    index: Tensor
    class_names: tuple[str, ...]
    clean_logits: Tensor
    judges: tuple[JudgeRecord, ...]
    attacks: tuple[ChosenAttack, ...]
    saturation: float
    seed: int = 0

    @classmethod
    def join(cls, parts: Sequence["AttackStudy"]) -> "AttackStudy":
        """One study of several batches of series, of one process or of many.

        Args:
            parts: At least one, of the same judges and attacks.

        Returns:
            All series by ``index``, whatever the parts are and their order; ``seconds`` are their sum.
        """
        first = parts[0]
        order = torch.cat([part.index for part in parts]).argsort(stable=True)

        def joined(tensors: Iterable[Tensor], dim: int = 0) -> Tensor:
            return torch.cat(list(tensors), dim).index_select(dim, order)

        judges = tuple(
            replace(judge, clean=joined(part.judges[number].clean for part in parts))
            for number, judge in enumerate(first.judges)
        )
        attacks = []
        for number, attack in enumerate(first.attacks):
            same = [part.attacks[number] for part in parts]
            attacks.append(
                replace(
                    attack,
                    x_adv=joined(one.x_adv for one in same),
                    logits=joined((one.logits for one in same), 1),
                    detector_logits=joined((one.detector_logits for one in same), 2),
                    scores={name: joined(one.scores[name] for one in same) for name in attack.scores},
                    n_bad_gradients=joined(one.n_bad_gradients for one in same),
                    n_zero_gradients=joined(one.n_zero_gradients for one in same),
                    seconds=sum(one.seconds for one in same),
                )
            )
        return replace(
            first,
            judges=judges,
            attacks=tuple(attacks),
            series=joined(part.series for part in parts),
            mask=joined(part.mask for part in parts),
            labels=joined(part.labels for part in parts),
            index=joined(part.index for part in parts),
            clean_logits=joined(part.clean_logits for part in parts),
        )


class AdversarialSeries:
    """What ``predict`` gives: an attack on a batch. No dataclass, so that Lightning hands it on as it is.

    Args:
        attack: Name.
        index: ``(B,) int64`` rows of the split.
        labels: ``(B,) int64``.
        mask: ``(B, T) bool``.
        series: ``(B, T, C) float`` clean.
        x_adv: ``(B, T, C) float``.
        logits: ``(N + 1, B, K') float`` of the victim along the run.
        detector_logits: ``(N + 1, M, B) float`` of the attacked detectors.
        detectors: Their M names.
        iteration: Number of the iterate that ``x_adv`` is.
        iterates: ``(N + 1, B, T, C) float``, points of the run from its start, which is the clean series unless
            the attack draws another; None where not kept.
    """

    def __init__(
        self,
        *,
        attack: str,
        index: Tensor,
        labels: Tensor,
        mask: Tensor,
        series: Tensor,
        x_adv: Tensor,
        logits: Tensor,
        detector_logits: Tensor,
        detectors: tuple[str, ...],
        iteration: int,
        iterates: Tensor | None = None,
    ) -> None:
        self.attack, self.index, self.labels, self.mask = attack, index, labels, mask
        self.series, self.x_adv, self.iteration = series, x_adv, iteration
        self.logits, self.detector_logits, self.detectors = logits, detector_logits, detectors
        self.iterates = iterates
