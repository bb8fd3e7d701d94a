"""An attack campaign against one victim: choose by validation, run what was chosen, have it judged.

n series, T steps, C channels, K' logits, N iterations, G configurations. One rule chooses for every attack, baselines
included: the largest harmonic mean of effectiveness and concealability (F1 form), ties to the smaller step.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_modules.attacks.class_losses import decisions
from lightning_modules.attacks.discriminators import AttackPlan, DiscriminatorPlan
from lightning_modules.attacks.engine import Attack, AttackResult
from lightning_modules.attacks.frozen_networks import Network, logits_of, pass_rows
from lightning_modules.attacks.grid import RESTART_STRIDE, GridPoint, grid_points, run_grid
from lightning_modules.attacks.judges import (
    FittedJudge,
    Judge,
    NearestNeighbourJudge,
    NetworkJudge,
    OneClassJudge,
    StatisticsJudge,
    TwoStatisticsJudge,
)
from lightning_modules.attacks.objectives import Vanilla
from lightning_modules.attacks.selection import Candidates, select
from lightning_modules.attacks.study import AttackStudy, ChosenAttack, JudgeRecord, Role, SeenLevel
from lightning_modules.metrics.attack_functional import concealability, detector_auc, effectiveness, success_f

Series = Mapping[str, Tensor]
"""``series (n, T, C)``, ``mask (n, T)``, ``labels (n,)``, ``index (n,)``."""


def fresh_panel(z_norm_ddof: int | None, fitted: bool = True) -> list[tuple[Judge, Role]]:
    """Judges that are no networks, not yet fitted, with their roles.

    Args:
        z_norm_ddof: n - ``z_norm_ddof`` is in the std of series that are z-normed one by one, None where they are not.
            Where they are, two statistics always judge (T7), with ties, and in their strict form beside the panel, for
            that one reads float32 rounding too.
        fitted: Whether judges that are fitted to clean training series are among them.
    """
    judges: list[tuple[Judge, Role]] = []
    if fitted:
        judges += [
            (StatisticsJudge(), "held_out"),
            (NearestNeighbourJudge(), "held_out"),
            (OneClassJudge(), "held_out"),
        ]
    if z_norm_ddof is not None:
        judges += [
            (TwoStatisticsJudge(ddof=z_norm_ddof), "held_out"),
            (TwoStatisticsJudge("strict two statistics", tie=0, ddof=z_norm_ddof), "beside"),
        ]
    return judges


def fit_panel(judges: Sequence[Judge], series: Tensor, mask: Tensor) -> None:
    """Fit those that are fitted, on clean training series."""
    for judge in judges:
        if isinstance(judge, FittedJudge):
            judge.fit(series, mask)


def _scaled(attack: Attack, scales: Mapping[str, Any] | None) -> Attack:
    """The attack with logits divided by calibrated scales."""
    if scales is None:
        return attack
    scaled = copy(attack)
    scaled.objective = replace(attack.objective, **scales)
    return scaled


def _grid(plan: AttackPlan) -> list[GridPoint]:
    return grid_points(steps=plan.steps, radii=plan.radii, alphas=plan.alphas, n_restarts=plan.n_restarts)


def _conceals(plan: AttackPlan) -> bool:
    """Whether the plan is more than vanilla, also where validation chooses the weight 0 among others."""
    objective = plan.attack.objective
    return not isinstance(objective, Vanilla) and max(plan.alphas, default=getattr(objective, "alpha", 1)) > 0


def settings_of(value: Any) -> Any:
    """What an attack is made of as plain values: classes with their attributes, functions and networks by name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): settings_of(one) for key, one in value.items()}
    if isinstance(value, Sequence):
        return [settings_of(one) for one in value]
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)} {value.double().sum():.9g}"
    if isinstance(value, torch.nn.Module) or not hasattr(value, "__dict__"):
        return type(value).__qualname__
    if callable(value) and hasattr(value, "__qualname__"):
        return value.__qualname__
    own = {name: settings_of(one) for name, one in vars(value).items()}
    return {"class": type(value).__qualname__, **own}


def require_same_attacks(plans: Sequence[AttackPlan], choices: Mapping[str, Mapping[str, Any]]) -> None:
    """See that what was chosen was chosen of these attacks and grids; choices of older checkpoints do not say.

    Raises:
        ValueError: If an attack or its grid was another.
    """
    for plan in plans:
        chosen_of = choices.get(plan.name, {}).get("chosen_of")
        if chosen_of is None:
            continue
        differing = _differing(chosen_of, _chosen_of(plan))
        if differing:
            where, there, here = differing[0]
            raise ValueError(
                f"checkpoint chose attack {plan.name!r} with other settings: {where} is {there!r} there, {here!r} "
                "here; test and predict with the config of its run"
            )


def _chosen_of(plan: AttackPlan) -> dict[str, Any]:
    points = [[point.step, point.radius, point.alpha, point.restart] for point in _grid(plan)]
    return {"attack": settings_of(plan.attack), "calibrate": plan.calibrate, "grid": points}


def _differing(one: Any, other: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    """Where two trees of plain values differ, and both values."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = [*one, *(key for key in other if key not in one)]
        found = (_differing(one.get(key), other.get(key), f"{where}.{key}".lstrip(".")) for key in keys)
        return [each for parts in found for each in parts]
    return [] if one == other else [(where, one, other)]


def choose(
    plan: AttackPlan,
    classifier: Network,
    detectors: Sequence[NetworkJudge],
    clean: Series,
    *,
    n_classes: int,
    surrogate: Network | None = None,
    seed: int = 0,
    max_rows: int = 4096,
) -> dict[str, Any]:
    """Run the grid of an attack on validation series, and choose a configuration and an iteration.

    Args:
        plan: The attack and its grid.
        classifier: Victim.
        detectors: The attacked ones.
        clean: Validation series.
        n_classes: K.
        surrogate: Gives gradients and values in place of the victim, which only scores.
        seed: Of attacks that draw.
        max_rows: Series times configurations in memory at a time.

    Returns:
        Plain values: ``step``, ``radius``, ``alpha``, ``restart``, ``iteration``, ``success``, ``scales``, the tensors
        ``effectiveness`` and ``concealability``, ``(G, N + 1)``, and ``chosen_of``, attack and grid. Of equal
        configurations the smaller step is chosen, then the smaller radius, the smaller alpha, the fewer iterations, the
        lower restart.
    """
    networks = [judge.network for judge in detectors]
    scales = None
    if plan.calibrate:
        objective = plan.attack.objective.calibrated(
            classifier if surrogate is None else surrogate, networks, clean["series"], mask=clean["mask"]
        )
        scale = objective.detector_scale
        scales = {
            "victim_scale": objective.victim_scale,
            "detector_scale": scale if isinstance(scale, int | float) else list(scale),
        }
    points = _grid(plan)
    result = run_grid(
        _scaled(plan.attack, scales),
        classifier,
        clean["series"],
        clean["labels"],
        points,
        mask=clean["mask"],
        index=clean["index"],
        detectors=networks,
        surrogate=surrogate,
        generator=seed,
        max_rows=max_rows,
    )
    predicted = decisions(result.logits.flatten(0, 2)).unflatten(0, result.logits.shape[:3])
    effective = effectiveness(predicted, clean["labels"].expand_as(predicted), n_classes)
    seen = torch.stack([judge.score(clean["series"], clean["mask"]) for judge in detectors])
    # As published for several discriminators: the most alarmed on clean series, the least on adversarial ones.
    hidden = result.detector_logits.double().sigmoid().amin(2)
    concealed = concealability(seen.amax(0).expand_as(hidden), hidden)
    success = success_f(effective, concealed)
    size = [point.step if point.step is not None else point.radius or 0.0 for point in points]
    choice = select(  # iterate 0 is no attack
        Candidates(
            success[:, 1:].cpu().numpy(),
            np.array(size, dtype=np.float64),
            np.array([point.alpha or 0.0 for point in points]),
            np.arange(1, success.shape[1]),
            np.array([point.radius or 0.0 for point in points]),
        )
    )
    point, iteration = points[choice.configuration], choice.iteration + 1
    return {
        "step": point.step,
        "radius": point.radius,
        "alpha": point.alpha,
        "restart": point.restart,
        "iteration": iteration,
        "success": float(success[choice.configuration, iteration]),
        "effectiveness": effective.cpu(),
        "concealability": concealed.cpu(),
        "scales": scales,
        "chosen_of": _chosen_of(plan),
    }


def run_chosen(
    plan: AttackPlan,
    choice: Mapping[str, Any],
    classifier: Network,
    detectors: Sequence[Network],
    series: Series,
    *,
    surrogate: Network | None = None,
    seed: int = 0,
    max_rows: int = 4096,
    keep_iterates: bool = False,
) -> AttackResult:
    """Run an attack under the configuration that :func:`choose` gave, with the same seed and the noise of its restart.

    Choices without a ``restart`` are of restart 0: checkpoints held none before grids had restarts.
    """
    attack = _scaled(plan.attack, choice["scales"])
    strengths = {axis: choice[axis] for axis in ("step", "radius", "alpha") if choice[axis] is not None}
    index = series["index"] + choice.get("restart", 0) * RESTART_STRIDE
    return attack(
        classifier,
        series["series"],
        series["labels"],
        mask=series["mask"],
        index=index,
        detectors=detectors,
        surrogate=surrogate,
        generator=seed,
        stop=choice["iteration"],
        keep_iterates=keep_iterates,
        batch_size=None if attack.couples_batch else pass_rows(series["series"], max_rows),
        **strengths,
    )


def cross_fitted(
    panels: Callable[[int], Sequence[Judge]], series: Tensor, mask: Tensor, folds: Tensor
) -> dict[str, Tensor]:
    """Scores of clean training series by judges that were made without them.

    The scores of different folds come from different judges, and the final judge from all series: the bound of
    :func:`lightning_modules.attacks.thresholds.conformal_threshold` then holds as well as these judges agree (at worst
    2 alpha for cross-conformal p-values), so that the realised rate belongs in the report.

    Args:
        panels: ``panels(fold)`` gives judges that have not seen the series of that fold, under the names of the final
            ones.
        series: ``(n, T, C)``.
        mask: ``(n, T)``.
        folds: ``(n,) int64``.

    Returns:
        ``{judge: (n,) float64}``.
    """
    found: dict[str, Tensor] = {}
    for fold in folds.unique().tolist():
        inside = folds == fold
        for judge in panels(fold):
            scores = found.setdefault(judge.name, torch.zeros(len(folds), dtype=torch.float64))
            scores[inside.cpu()] = judge.score(series[inside], mask[inside]).cpu()
    return found


def seen_levels(
    plan: DiscriminatorPlan, judge: Judge, clean: Series, adversarial: Callable[[int, int], Tensor]
) -> list[SeenLevel]:
    """How well a trained discriminator sees each attack of its plan at each strength.

    Args:
        plan: Its plan.
        judge: The discriminator.
        clean: Validation series.
        adversarial: ``(level, number of the attack in it) -> (n, T, C)`` the same series attacked.
    """
    unmoved = judge.score(clean["series"], clean["mask"])
    found = []
    for level, stage in enumerate(plan.levels):
        for number, one in enumerate(stage.attacks):
            moved = judge.score(adversarial(level, number), clean["mask"])
            auc = float(detector_auc(unmoved, moved))
            found.append(SeenLevel(one.name, one.strength, stage.concealed, auc))
    return found


def judged(
    plans: Sequence[AttackPlan],
    choices: Mapping[str, Mapping[str, Any]],
    classifier: Network,
    detectors: Sequence[Network],
    judges: Sequence[tuple[Judge, Role]],
    calibration: Mapping[str, Tensor],
    series: Series,
    *,
    levels: Mapping[str, Sequence[SeenLevel]],
    class_names: tuple[str, ...],
    saturation: float,
    surrogates: Mapping[str, Network] | None = None,
    seed: int,
    max_rows: int = 4096,
) -> AttackStudy:
    """Run every chosen attack on series, and let every judge score what comes out.

    Args:
        plans: The attacks.
        choices: What :func:`choose` gave for each, by name.
        classifier: Victim.
        detectors: The attacked networks.
        judges: With their roles.
        calibration: Scores of clean series by name, each by a judge that was made without it.
        series: Test series.
        levels: What :func:`seen_levels` gave for each trained discriminator, by name.
        class_names: K names.
        saturation: Median |logit| of the victim on clean validation series.
        surrogates: By name of an attack, what gives its gradients and values in place of the victim.
        seed: Of the run.
        max_rows: Series in memory at a time.
    """
    clean, mask = series["series"], series["mask"]
    surrogates = surrogates or {}
    records = [
        JudgeRecord(
            name=judge.name,
            role=role,
            provenance=dict(judge.provenance),
            clean=judge.score(clean, mask).cpu(),
            calibration=calibration.get(judge.name, torch.zeros(0, dtype=torch.float64)),
            is_probability=isinstance(judge, NetworkJudge),
            levels=tuple(levels.get(judge.name, ())),
        )
        for judge, role in judges
    ]
    chosen = []
    for plan in plans:
        choice = choices[plan.name]
        started = time.perf_counter()
        result = run_chosen(
            plan,
            choice,
            classifier,
            detectors,
            series,
            surrogate=surrogates.get(plan.name),
            seed=seed,
            max_rows=max_rows,
        )
        if clean.is_cuda:
            torch.cuda.synchronize(clean.device)
        seconds = time.perf_counter() - started
        chosen.append(
            ChosenAttack(
                name=plan.name,
                family=plan.family,
                concealed=_conceals(plan),
                step=choice["step"],
                radius=choice["radius"],
                alpha=choice["alpha"],
                iteration=choice["iteration"],
                x_adv=_kept(result.x_adv),
                logits=_kept(result.logits),
                detector_logits=_kept(result.detector_logits),
                scores={judge.name: judge.score(result.x_adv, mask).cpu() for judge, _ in judges},
                n_bad_gradients=result.n_bad_gradients.cpu(),
                n_zero_gradients=result.n_zero_gradients.cpu(),
                n_gradients=result.n_gradients,
                validation_effectiveness=choice["effectiveness"],
                validation_concealability=choice["concealability"],
                seconds=seconds,
                restart=choice.get("restart", 0),
                configurations=tuple(_grid(plan)),
                transferred=plan.name in surrogates,
            )
        )
    return AttackStudy(
        series=_kept(clean),
        mask=mask.cpu(),
        labels=series["labels"].cpu(),
        index=series["index"].cpu(),
        class_names=class_names,
        clean_logits=_kept(logits_of(classifier, clean, mask)),
        judges=tuple(records),
        attacks=tuple(chosen),
        saturation=saturation,
        seed=seed,
    )


def _kept(values: Tensor) -> Tensor:
    """On the CPU; of half precision in float32, for NumPy and pictures know no bfloat16."""
    return values.cpu() if values.dtype.itemsize >= 4 else values.cpu().float()
