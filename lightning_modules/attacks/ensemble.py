"""Several attacks, the worst case of each series, and signs that the attacks themselves are not to be trusted.

B series, N iterations. In the manner of AutoAttack (F. Croce and M. Hein, arXiv 2003.01690), with the checks of
"Evaluating the adversarial robustness of adaptive test-time defenses" (F. Croce et al., arXiv 2202.13711) in short.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_modules.attacks.apgd import APGD
from lightning_modules.attacks.class_losses import decisions
from lightning_modules.attacks.engine import Attack, AttackResult
from lightning_modules.attacks.frozen_networks import Network, confidence, logits_of
from lightning_modules.attacks.gradients import choose
from lightning_modules.attacks.objectives import Vanilla
from lightning_modules.attacks.projections import Linf
from lightning_modules.attacks.searches import SquareSearch
from lightning_modules.attacks.steppers import PGDStep

SATURATED_LOGIT = 17.0
"""Above it the float32 sigmoid is exactly 1 and gradients of cross-entropy from probabilities vanish (trap T3)."""
ZERO_GRADIENT_SHARE = 0.05
"""Share of gradients that may be 0 before it is worth a word."""
LATE_GAIN = 0.02
"""Share of series that may still fall in the last fifth of the steps."""


@dataclass
class EnsembleResult:
    """Worst case over attacks.

    Attributes:
        x_adv: ``(B, T, C) float`` of the first attack that fooled the victim, else the clean series where it is
            misclassified, else of the first attack.
        fooled: ``(B,) bool`` by any attack, series misclassified from the start included.
        fooled_by: ``{attack: (B,) bool}`` by the point each attack returned.
        flags: One line for each sign of an evaluation that overstates robustness; empty when there is none.
    """

    x_adv: Tensor
    fooled: Tensor
    fooled_by: dict[str, Tensor]
    flags: list[str]

    @property
    def accuracy(self) -> float:
        """Share of series that were classified right and that no attack turned."""
        return 1 - self.fooled.double().mean().item()


def standard_attacks(radius: float, *, n_steps: int = 50, relative: bool = False) -> dict[str, Attack]:
    """APGD on the margin and on DLR, PGD from a random start, and a random search, in an linf ball.

    Args:
        radius: Of the ball, in units of the series, or a fraction where ``relative``.
        n_steps: N of the gradient attacks; the search gets ten times as many, each of them one forward pass.
        relative: See :class:`Linf`.

    Raises:
        ValueError: If ``radius`` or ``n_steps`` is out of range.
    """
    ball = Linf(radius, relative=relative)
    kept: dict[str, Any] = {"projection": ball, "keep": "best", "n_steps": n_steps}
    return {
        "apgd_margin": Attack(Vanilla(), APGD(), **kept),
        "apgd_dlr": Attack(Vanilla(class_loss="dlr"), APGD(), random_start=True, **kept),
        "pgd_margin": Attack(Vanilla(), PGDStep(), random_start=True, **kept),
        "square": Attack(Vanilla(), SquareSearch(), **kept | {"n_steps": 10 * n_steps}),
    }


def run_ensemble(
    attacks: Mapping[str, Attack],
    model: Network,
    x: Tensor,
    y: Tensor,
    *,
    generator: torch.Generator | int | None = None,
    **call: Any,
) -> EnsembleResult:
    """Run every attack on every series and join them.

    Args:
        attacks: Untargeted attacks by name; :func:`standard_attacks` gives a set.
        model: Victim.
        x: ``(B, T, C) float`` clean series.
        y: ``(B,) int64`` true classes.
        generator: As in :class:`Attack`, one draw for each random attack.
        call: Further arguments of the attacks: ``mask``, ``index``, ``detectors``, ``batch_size``.

    Raises:
        ValueError: If there is no attack or one is targeted, and as the attacks.
    """
    if not attacks:
        raise ValueError("attacks must hold at least one attack, got none")
    for name, attack in attacks.items():
        if attack.targeted:
            raise ValueError(f"the ensemble counts series that leave their class, and attack {name!r} is targeted")
    results = {name: attack(model, x, y, generator=generator, **call) for name, attack in attacks.items()}
    # by the clean series themselves: an attack may begin elsewhere
    clean = logits_of(model, x, call.get("mask"), batch_size=call.get("batch_size") or 1024)
    wrong, rows = decisions(clean) != y, torch.arange(len(y), device=y.device)
    joined = choose(wrong, x.detach(), next(iter(results.values())).x_adv)
    turned, fooled_by = torch.zeros_like(wrong), {}
    for name, result in results.items():
        fooled_by[name] = decisions(result.logits[result.chosen, rows]) != y
        joined = choose(fooled_by[name] & ~turned, result.x_adv, joined)
        turned = turned | fooled_by[name]
    return EnsembleResult(joined, wrong | turned, fooled_by, sanity_flags(attacks, results, y))


def sanity_flags(attacks: Mapping[str, Attack], results: Mapping[str, AttackResult], y: Tensor) -> list[str]:
    """Signs that the attacks overstate the victim's robustness.

    * the victim's median confidence is above 17: float32 probabilities are saturated;
    * more than 5 % of an attack's gradients on series that it did not turn are 0, or any is not finite;
    * a search without gradients fools series that no gradient attack did: gradients are masked;
    * an attack still gained more than 2 % of the series in its last fifth: too few steps;
    * an attack with steps fools no more than its first point, while another attack does: its steps are lost.

    Args:
        attacks: By name.
        results: Of the same names, on the same series.
        y: ``(B,) int64`` true classes.

    Returns:
        One line for each sign.
    """
    flags = []
    start = confidence(next(iter(results.values())).logits[0]).median().item()
    if start > SATURATED_LOGIT:
        flags.append(f"saturated victim: median |logit| is {start:.1f}, above {SATURATED_LOGIT:.0f}")
    by_gradient = torch.zeros_like(y, dtype=torch.bool)
    by_search = torch.zeros_like(by_gradient)
    reached = {name: (decisions(result.logits) != y).cummax(dim=0).values for name, result in results.items()}
    most = max(float(turned[-1].double().mean()) for turned in reached.values())
    for name, result in results.items():
        turned = reached[name]
        if result.n_gradients:
            by_gradient |= turned[-1]
            # Behind the boundary a loss may well be flat, as DLR is of three classes: nothing is overstated there.
            stuck = result.n_zero_gradients[~turned[-1]].double()
            share = stuck.mean().item() / result.n_gradients if len(stuck) else 0.0
            if share > ZERO_GRADIENT_SHARE:
                flags.append(f"zero gradients: {share:.0%} of those of {name} on {len(stuck)} series it did not turn")
            if bool((result.n_bad_gradients > 0).any()):
                flags.append(f"gradients not finite: in {int((result.n_bad_gradients > 0).sum())} series under {name}")
        else:
            by_search |= turned[-1]
        shares = turned.double().mean(dim=1)
        n_steps = attacks[name].n_steps
        gain = float(shares[-1] - shares[n_steps - n_steps // 5])
        if gain > LATE_GAIN:
            flags.append(f"not converged: {name} gained {gain:.1%} of the series in its last fifth of {n_steps} steps")
        if result.n_gradients and shares[-1] == shares[0] and most > float(shares[-1]) + LATE_GAIN:
            flags.append(f"no progress: {name} fools no more after {n_steps} steps than before the first")
    only_search = int((by_search & ~by_gradient).sum())
    if only_search and bool(by_gradient.numel()) and any(result.n_gradients for result in results.values()):
        flags.append(f"gradient masking: random search turned {only_search} series that no gradient attack did")
    return flags
