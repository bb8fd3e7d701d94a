"""Attacks on time-series classifiers, in plain PyTorch.

Objectives, steppers, projections and constraints compose freely::

    from lightning_modules.attacks import Attack, Linf, SignStep, SumReg

    attack = Attack(SumReg(alpha=0.1), SignStep(0.03), projection=Linf(0.3))
    x_adv = attack(model, x, y, detectors=[detector]).x_adv
"""

from lightning_modules.attacks.apgd import APGD
from lightning_modules.attacks.class_losses import cross_entropy, decisions, dlr, logit_margin
from lightning_modules.attacks.constraints import Bounds, Constraint, Frozen, LowPass, ZNormManifold
from lightning_modules.attacks.engine import Attack, AttackResult
from lightning_modules.attacks.ensemble import EnsembleResult, run_ensemble, sanity_flags, standard_attacks
from lightning_modules.attacks.frozen_networks import calibrate, frozen, logits_of
from lightning_modules.attacks.gradient_objectives import HyperCone, NormSum
from lightning_modules.attacks.grid import GridPoint, GridResult, grid_points, run_grid
from lightning_modules.attacks.minimum_norm import CarliniWagnerL2, DeepFool, MinimumNormResult
from lightning_modules.attacks.objectives import (
    DiscOnly,
    HarmonicReg,
    NeighReg,
    Objective,
    SmoothMax,
    SumReg,
    Vanilla,
    neighbour_roughness,
)
from lightning_modules.attacks.projections import L1, L2, Linf, Projection
from lightning_modules.attacks.searches import Noise, SimBA, SquareSearch
from lightning_modules.attacks.steppers import (
    AdamStep,
    Momentum,
    Nesterov,
    PGDStep,
    SignStep,
    Stepper,
    UniversalStep,
)
from lightning_modules.attacks.victims import Victim, check_logits, load_victim, refuse_probabilities

__all__ = [
    "APGD",
    "L1",
    "L2",
    "AdamStep",
    "Attack",
    "AttackResult",
    "Bounds",
    "CarliniWagnerL2",
    "Constraint",
    "DeepFool",
    "DiscOnly",
    "EnsembleResult",
    "Frozen",
    "GridPoint",
    "GridResult",
    "HarmonicReg",
    "HyperCone",
    "Linf",
    "LowPass",
    "MinimumNormResult",
    "Momentum",
    "NeighReg",
    "Nesterov",
    "Noise",
    "NormSum",
    "Objective",
    "PGDStep",
    "Projection",
    "SignStep",
    "SimBA",
    "SmoothMax",
    "SquareSearch",
    "Stepper",
    "SumReg",
    "UniversalStep",
    "Vanilla",
    "Victim",
    "ZNormManifold",
    "calibrate",
    "check_logits",
    "cross_entropy",
    "decisions",
    "dlr",
    "frozen",
    "grid_points",
    "load_victim",
    "logit_margin",
    "logits_of",
    "neighbour_roughness",
    "refuse_probabilities",
    "run_ensemble",
    "run_grid",
    "sanity_flags",
    "standard_attacks",
]
