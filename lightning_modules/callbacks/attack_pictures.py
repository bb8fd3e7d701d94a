"""Pictures of attacks and of the judges they meet. Each function writes one PNG and nothing else."""

import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray
from torch import Tensor

from lightning_modules.attacks.class_losses import decisions
from lightning_modules.attacks.findings import Findings, best_concealed, key
from lightning_modules.attacks.grid import GridPoint
from lightning_modules.attacks.selection import pareto_area, pareto_front
from lightning_modules.attacks.study import AttackStudy, ChosenAttack
from lightning_modules.attacks.study_bootstrap import FALSE_ALARMS, baseline_of
from lightning_modules.callbacks.picture_frame import COLOURS, new_axes, save
from lightning_modules.metrics.attack_functional import fooled, success_f

Array = NDArray[np.float64]

GREY = "#777777"
"""Of what is given, not compared: clean series, judges that are not valid."""

_HUES = (*COLOURS[:6], "#332288", "#999933", "#882255")
_DASHES: tuple[tuple[Any, ...], ...] = (("-", (0, (3, 1, 1, 1))), ((0, (4, 1.5)), (0, (1, 1.2))))
_RATE = key(FALSE_ALARMS[0])
_PERCENT = f"{100 * FALSE_ALARMS[0]:g} %"


def styles(names: dict[str, bool]) -> dict[str, dict[str, Any]]:
    """Line of each attack, ``{name: concealed}``, the same in every picture: concealed solid, vanilla dashed."""
    return {
        name: {
            "color": _HUES[place % len(_HUES)],
            "linestyle": _DASHES[0 if concealed else 1][place // len(_HUES) % 2],
            "linewidth": 1.8 if concealed else 1.4,
        }
        for place, (name, concealed) in enumerate(names.items())
    }


def _looks(study: AttackStudy) -> dict[str, dict[str, Any]]:
    return styles({attack.name: attack.concealed for attack in study.attacks})


def _short(name: str, width: int = 22) -> str:
    return textwrap.fill(name, width)


def _tiles(n: int, n_columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """``n`` plots of a size in inches, at most ``n_columns`` in a row; places left over are empty."""
    n_columns = min(n, n_columns)
    n_rows = math.ceil(n / n_columns)
    figure, axes = new_axes(n_columns, width=max(5.0, width * n_columns), height=height * n_rows, n_rows=n_rows)
    for empty in axes[n:]:
        empty.remove()
    return figure, axes[:n]


def _shown(study: AttackStudy) -> list[ChosenAttack]:
    """The best concealed attack on validation and its vanilla one; without a concealed attack the first."""
    best = best_concealed(study)
    if best is None:
        return [study.attacks[0]]
    baseline = baseline_of(study, best)
    return [best] if baseline is None else [baseline, best]


def example_rows(study: AttackStudy, n_examples: int = 3) -> list[int]:
    """Series to show, picked by rule: among those the last shown attack fools, small, middle and large L2.

    Where it fools fewer than ``n_examples``, all series are ranked.
    """
    attack = _shown(study)[-1]
    hit = fooled(decisions(study.clean_logits), decisions(attack.logits[attack.iteration]), study.labels)
    moved = ((attack.x_adv - study.series) * study.mask[..., None]).double().flatten(1).norm(dim=1)
    rows = hit.nonzero()[:, 0] if int(hit.sum()) >= n_examples else torch.arange(len(hit))
    ordered = rows[moved[rows].argsort(stable=True)]
    places = torch.linspace(0.1, 0.9, n_examples).mul(len(ordered) - 1).round().long()
    return [int(row) for row in ordered[places].unique_consecutive()]


def series(path: Path, study: AttackStudy) -> None:
    """A few series, original under adversarial, and the perturbation below; channel 0."""
    shown, rows, look = _shown(study), example_rows(study), _looks(study)
    figure, axes = new_axes(len(rows), width=4 * len(rows), height=3.4 * len(shown) + 0.6, n_rows=2 * len(shown))
    calls = decisions(study.clean_logits)
    largest = max(
        float((attack.x_adv - study.series)[row, study.mask[row], 0].abs().max()) for attack in shown for row in rows
    )
    limit = 1.1 * largest or 1.0  # one scale for all, so that attacks compare
    for number, attack in enumerate(shown):
        called = decisions(attack.logits[attack.iteration])
        deltas = attack.x_adv - study.series
        for column, row in enumerate(rows):
            valid = study.mask[row]
            steps = np.arange(study.series.shape[1])[valid.numpy()]
            above, below = (axes[(2 * number + part) * len(rows) + column] for part in (0, 1))
            colour = look[attack.name]["color"]
            above.plot(steps, study.series[row, valid, 0], color=GREY, linewidth=1.8)
            above.plot(steps, attack.x_adv[row, valid, 0], color=colour, linewidth=1)
            below.fill_between(steps, deltas[row, valid, 0].numpy(), color=colour, linewidth=0, alpha=0.8)
            below.set_ylim(-limit, limit)
            classes = [study.class_names[int(of[row])] for of in (study.labels, calls, called)]
            title = f"series {int(study.index[row])}, {classes[0]}: called {classes[1]}, then {classes[2]}"
            above.set_title(_short(title, 54), fontsize=8)
            above.tick_params(labelbottom=False)
            if column == 0:
                above.set_ylabel(_short(attack.name), fontsize=9, fontweight="bold")
                below.set_ylabel("perturbation", fontsize=9)
            if number == len(shown) - 1:
                below.set_xlabel("step")
    n_channels = study.series.shape[2]
    channel = f"channel 0 of {n_channels}, " if n_channels > 1 else ""
    figure.suptitle(
        f"{channel}grey: original, coloured: adversarial; small, middle and large L2 of {shown[-1].name}", fontsize=10
    )
    save(figure, path)


def scores(path: Path, study: AttackStudy) -> None:
    """Along the run: how adversarial the attacked detectors find the series, and the share that is fooled."""
    n_detectors, look = study.attacks[0].detector_logits.shape[1], _looks(study)
    lengths = {len(attack.logits) - 1 for attack in study.attacks}
    figure, axes = new_axes(1 + (n_detectors > 0), width=6 + 4 * (n_detectors > 0), height=4)
    correct = decisions(study.clean_logits) == study.labels
    for attack in study.attacks:
        wrong = decisions(attack.logits) != study.labels
        run = np.arange(len(wrong)) / (1 if len(lengths) == 1 else max(1, len(wrong) - 1))
        lines = [wrong[:, correct].double().mean(1).numpy()]
        if n_detectors:
            lines.insert(0, attack.detector_logits.double().sigmoid().mean(2).amax(1).numpy())
        for each, values in zip(axes, lines, strict=True):
            each.plot(run, values, label=attack.name, **look[attack.name])
            each.plot(
                run[attack.iteration], values[attack.iteration], "o", color=look[attack.name]["color"], markersize=6
            )
    highest = "\n(highest of the attacked detectors)" if n_detectors > 1 else ""
    titles = [f"mean probability of being adversarial{highest}"] * (n_detectors > 0)
    for each, title in zip(axes, [*titles, "share fooled of those called rightly when clean"], strict=True):
        each.set_title(title, fontsize=10)
        each.set_ylim(-0.03, 1.03)
        each.set_xlabel("iteration" if len(lengths) == 1 else "share of the iterations of the attack")
    _legend(axes[-1], "dot: iterate chosen\non validation")
    save(figure, path)


def _legend(axes: Axes, title: str | None = None) -> None:
    axes.legend(frameon=False, fontsize=8, title_fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), title=title)


def pareto(path: Path, study: AttackStudy) -> None:
    """On validation, one plot a family: all that could be chosen, the front, its area and what was chosen."""
    families = list(dict.fromkeys(attack.family for attack in study.attacks))
    figure, axes = _tiles(len(families), 4, 3.7, 4.4)
    look = _looks(study)
    grid = np.linspace(0.001, 1, 200)
    for each, family in zip(axes, families, strict=True):
        for level in (0.2, 0.4, 0.6, 0.8):
            with np.errstate(divide="ignore"):
                line = np.where(2 * grid > level, level * grid / (2 * grid - level), np.nan)
            each.plot(grid, np.where(line <= 1, line, np.nan), color="#CCCCCC", linewidth=0.8, zorder=1)
            each.annotate(f"F {level:g}", (level, level), fontsize=7, color=GREY, ha="center", va="center")
        for attack in (one for one in study.attacks if one.family == family):
            effect, hidden = (of.double().numpy() for of in attack.candidates)
            style = look[attack.name]
            each.scatter(effect, hidden, s=8, color=style["color"], alpha=0.35, linewidths=0, zorder=2)
            x, y = _stairs(effect, hidden)
            each.step(x, y, where="pre", label=f"{attack.name}, area {pareto_area(effect, hidden):.2f}", **style)
            place = _chosen_on_validation(attack)
            each.plot(
                attack.validation_effectiveness[place],
                attack.validation_concealability[place],
                "*",
                color=style["color"],
                markersize=13,
                markeredgecolor="black",
                zorder=5,
            )
        each.set_title(family, fontsize=10)
        each.set_xlabel("effectiveness EFF")
        each.set_xlim(-0.03, 1.03)
        each.set_ylim(-0.03, 1.03)
        each.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    axes[0].set_ylabel("concealability CONC")
    figure.suptitle("validation: all configurations, iterations 1 to N; star: chosen, largest F", fontsize=10)
    save(figure, path)


def _stairs(effect: Array, hidden: Array) -> tuple[Array, Array]:
    """Corners of the area that the front dominates, from EFF 0 to the largest, and down to CONC 0."""
    front = pareto_front(effect, hidden)
    x, y = effect.ravel()[front], hidden.ravel()[front]
    return np.concatenate([[0.0], x, x[-1:]]), np.concatenate([y[:1], y, [0.0]])


def _chosen_on_validation(attack: ChosenAttack) -> tuple[int, int]:
    """Configuration and iteration that were chosen: where configurations are not known, the largest F there."""
    chosen = GridPoint(step=attack.step, radius=attack.radius, alpha=attack.alpha, restart=attack.restart)
    if chosen in attack.configurations:
        return attack.configurations.index(chosen), attack.iteration
    column = success_f(
        attack.validation_effectiveness[:, attack.iteration], attack.validation_concealability[:, attack.iteration]
    )
    return int(column.nan_to_num(-1.0).argmax()), attack.iteration


def _judge_names(found: Findings) -> list[str]:
    return [
        _short(name if judge["valid"] else f"{name} (not valid)", 16)
        + ("\nattacked" if judge["role"] == "attacked" else "")
        for name, judge in found["judges"].items()
    ]


def transfer(path: Path, found: Findings) -> None:
    """Attacks by judges: AUC, and the share detected at 5 % false alarms of the ROC curve."""
    attacks, judges = found["attacks"], found["judges"]
    figure, axes = new_axes(2, width=max(9.0, 4.5 + 1.5 * len(judges)), height=2.2 + 0.42 * len(attacks))
    for each, title, colours, read in (
        (axes[0], "AUC (0.5: hidden, 0: detected upside down)", "PuOr_r", lambda row: row["auc"]),
        (axes[1], f"share detected at {_PERCENT} false alarms", "Purples", lambda row: row["detection"][_RATE]),
    ):
        values = np.array([[read(attack["judges"][name]) for name in judges] for attack in attacks.values()])
        each.imshow(values, cmap=colours, vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            dark = abs(value - 0.5) > 0.35 if each is axes[0] else value > 0.6
            each.text(
                column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if dark else "black"
            )
        each.set_xticks(
            range(len(judges)), _judge_names(found), fontsize=8, rotation=40, ha="right", rotation_mode="anchor"
        )
        for label, judge in zip(each.get_xticklabels(), judges.values(), strict=True):
            label.set_color("black" if judge["valid"] else GREY)
        n_attacked = sum(judge["role"] == "attacked" for judge in judges.values())
        each.axvline(n_attacked - 0.5, color="black", linewidth=2)
        each.grid(visible=False)
        each.set_title(title, fontsize=10)
        names = [_short(name, 28) for name in attacks] if each is axes[0] else [""] * len(attacks)
        each.set_yticks(range(len(attacks)), names, fontsize=9)
    save(figure, path)


def panel(path: Path, found: Findings) -> None:
    """Each judge and attack: joint success at 5 % with its interval, or where not resolvable the share detected."""
    attacks, judges = found["attacks"], found["judges"]
    look = styles({name: attack["concealed"] for name, attack in attacks.items()})
    resolvable = any(judge["thresholds"][_RATE]["false_alarms"] is not None for judge in judges.values())
    tiles: list[tuple[str, str, list[Any]]] = []
    for name, judge in judges.items():
        role = judge["role"].replace("_", " ")
        title = f"{_short(name, 26)}\n{role}{'' if judge['valid'] else ', not valid'}"
        before = [attack["judges"][name] for attack in attacks.values()]
        values = [one["joint_success"][_RATE] if resolvable else [one["detection"][_RATE]] for one in before]
        tiles.append((title, "black" if judge["valid"] else GREY, values))
    if resolvable and found["panel"]:
        together = [attack["intervals"]["joint_success"] for attack in attacks.values()]
        tiles.insert(0, (f"panel\nmean of {len(found['panel'])} valid held-out judges", COLOURS[0], together))
    figure, axes = _tiles(len(tiles), 4, 2.9, 0.9 + 0.3 * len(attacks))
    for place, (each, (title, title_colour, values)) in enumerate(zip(axes, tiles, strict=True)):
        for row, (value, (name, attack)) in enumerate(zip(values, attacks.items(), strict=True)):
            if value is None or value[0] is None:
                continue
            colour = look[name]["color"]
            if resolvable:
                each.plot(value[1:3], [row, row], color=colour, linewidth=1.6)
            each.plot(value[0], row, "o" if attack["concealed"] else "D", color=colour, markersize=5, clip_on=False)
        names = list(attacks) if place % 4 == 0 else [""] * len(attacks)
        each.set_yticks(range(len(attacks)), [_short(name, 28) for name in names], fontsize=8)
        each.set_ylim(len(attacks) - 0.5, -0.5)
        each.set_xlim(-0.02, 1.02)
        each.set_xticks([0, 0.25, 0.5, 0.75, 1])
        each.tick_params(axis="x", labelsize=8)
        each.xaxis.set_major_formatter(PercentFormatter(1))
        each.grid(axis="y", visible=False)
        each.set_title(title, fontsize=9, color=title_colour)
    what = f"joint success (fooled and not flagged) at {_PERCENT} false alarms, with interval"
    if not resolvable:
        what = f"share detected at {_PERCENT} false alarms of the ROC curve (no threshold is resolvable)"
    figure.suptitle(f"{what}; round: concealed", fontsize=10, wrap=True)
    save(figure, path)


def roc_curve(clean: Tensor, adversarial: Tensor) -> tuple[Array, Array]:
    """False and true positive rates at every distinct threshold, from (0, 0) to (1, 1)."""
    limits = torch.cat([clean, adversarial]).unique()
    rates = [
        1 - torch.searchsorted(scores.double().sort().values, limits.double()).double() / len(scores)
        for scores in (clean, adversarial)
    ]
    false, true = (np.concatenate([[0.0], rate.flip(0).numpy()]) for rate in rates)
    return false, true


def detection(path: Path, study: AttackStudy, found: Findings) -> None:
    """ROC curves, one plot an attack and one line a judge."""
    lines: dict[str, dict[str, Any]] = {
        name: {
            "color": _HUES[place % len(_HUES)],
            "linestyle": ":" if not judge["valid"] else "--" if judge["role"] == "attacked" else "-",
            "linewidth": 1.5,
        }
        for place, (name, judge) in enumerate(found["judges"].items())
    }
    figure, axes = _tiles(len(study.attacks), 4, 2.9, 3.0)
    for each, attack in zip(axes, study.attacks, strict=True):
        for judge in study.judges:
            false, true = roc_curve(judge.clean, attack.scores[judge.name])
            # In steps: what lies between two thresholds is not reached by any.
            each.plot(false, true, drawstyle="steps-post", **lines[judge.name])
        each.plot([0, 1], [0, 1], color="#BBBBBB", linewidth=0.8, zorder=1)
        each.axvline(FALSE_ALARMS[0], color="#BBBBBB", linewidth=0.8, zorder=1)
        each.set_title(_short(attack.name, 30), fontsize=9)
        each.set_xlim(-0.02, 1.02)
        each.set_ylim(-0.02, 1.02)
    entries = [Line2D([], [], label=name, **line) for name, line in lines.items()]
    figure.legend(handles=entries, frameon=False, fontsize=8, loc="outside lower center", ncols=min(4, len(entries)))
    figure.suptitle(
        f"share detected against false alarms on clean test series (line at {_PERCENT}); dashed: attacked detector, "
        "dotted: not a valid judge",
        fontsize=10,
        wrap=True,
    )
    save(figure, path)


def spectrum(path: Path, study: AttackStudy) -> None:
    """Mean power of each frequency of the perturbation, the clean series beside it, over series and channels."""
    figure, (axes,) = new_axes(width=8, height=4)
    mask = study.mask[..., None]
    clean = torch.where(mask, study.series, 0.0).double()
    centred = torch.where(mask, clean - clean.sum(1, keepdim=True) / mask.sum(1, keepdim=True), 0.0)
    frequencies = np.fft.rfftfreq(clean.shape[1])
    axes.plot(frequencies[1:], _power(centred)[1:], color=GREY, linewidth=2.2, label="clean series")
    look = _looks(study)
    for attack in study.attacks:
        moved = torch.where(mask, attack.x_adv - study.series, 0.0).double()
        if bool(moved.any()):
            axes.plot(frequencies, _power(moved), label=attack.name, **look[attack.name])
    axes.set_yscale("log")
    axes.set_xlabel("cycles a step")
    axes.set_ylabel("mean power")
    _legend(axes)
    save(figure, path)


def _power(values: Tensor) -> Array:
    """``(n, T, C)`` to ``(T // 2 + 1,)`` mean squared amplitude, a step."""
    found: Array = (torch.fft.rfft(values, dim=1).abs().square().mean((0, 2)) / values.shape[1]).numpy()
    return found
