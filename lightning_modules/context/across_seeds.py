"""Findings of several seeds side by side: means, spread and signs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_modules.metrics.probe_metrics import MEASURES
from lightning_modules.portfolio.findings import plain


def merge_seeds(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several runs of one configuration under different seeds.

    Args:
        found: Of each run, from :func:`lightning_modules.context.findings.findings`; same targets, arms and measure.

    Returns:
        Plain values: ``seeds``; ``targets`` by name: ``arms`` by name with ``measures`` (``mean``, ``sd`` over seeds,
        None of one, ``values``) and for context arms ``gains`` over each control and ``judged``: ``mean``, ``sd``,
        ``values``, ``controls``, ``signs`` (-1, 0, 1 a seed) and ``n_helps``; ``chosen`` and ``helps`` by seed;
        ``verdict``.

    Raises:
        ValueError: If there is no run, or runs do not match.
    """
    if not found:
        raise ValueError("merge_seeds needs the findings of at least 1 seed, got 0")
    first = found[0]
    shape = {name: list(one["arms"]) for name, one in first["targets"].items()}
    for number, other in enumerate(found):
        theirs = {name: list(one["arms"]) for name, one in other["targets"].items()}
        if theirs != shape or other["measure"] != first["measure"]:
            raise ValueError(f"findings of run {number} have other targets, arms or measure than those of run 0")

    def spread(values: Sequence[float | None]) -> dict[str, Any]:
        numbers = np.array(values, dtype=np.float64)
        sd = numbers.std(ddof=1) if len(numbers) > 1 else None
        return {"mean": numbers.mean(), "sd": sd, "values": numbers}

    targets: dict[str, Any] = {}
    for name, arms in shape.items():
        runs = [one["targets"][name] for one in found]
        rows: dict[str, Any] = {}
        for arm in arms:
            same = [run["arms"][arm] for run in runs]
            rows[arm] = {"measures": {key: spread([one["measures"][key][0] for one in same]) for key in MEASURES}}
            if same[0]["judged"] is None:
                continue
            judged = [one["judged"] for one in same]
            rows[arm]["gains"] = {
                control: {key: spread([one["gains"][control][key][0] for one in same]) for key in MEASURES}
                for control in same[0]["gains"]
            }
            rows[arm]["judged"] = spread([one["gain"] for one in judged]) | {
                "controls": [one["control"] for one in judged],
                "signs": [None if one["gain"] is None else int(np.sign(one["gain"])) for one in judged],
                "n_helps": sum(bool(one["helps"]) for one in judged),
            }
        helps = [run["helps"] for run in runs]
        targets[name] = {
            "description": runs[0]["description"],
            "scope": runs[0].get("scope"),
            "outcome_dependent": runs[0]["outcome_dependent"],
            "underpowered": any(run["underpowered"] for run in runs),
            "arms": rows,
            "chosen": [run["chosen"] for run in runs],
            "helps": helps,
            "verdict": f"context helps in {sum(map(bool, helps))} of {len(helps)} seeds",
        }
    return plain({"seeds": [one["seed"] for one in found], "measure": first["measure"], "targets": targets})
