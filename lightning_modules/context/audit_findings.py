"""What a leak audit finds, and how it says so. Q queries, k features, U users."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_modules.context.visible import MICROSECONDS_PER_DAY, Events

Status = Literal["clean", "leak", "information", "not checked"]

ROUNDING = 32 * 2.0**-23
"""What float32 sums in another order may differ by, relative to the size of a feature: 32 units in the last place.
Contexts of states of a transformer of width 64 differed by 13."""
USUAL = (0.16, 0.84)
"""Quantiles that the spread of a feature is taken between: one deviation to either side of a normal one."""


@dataclass(frozen=True)
class AuditFinding:
    """What one check found.

    Attributes:
        name: The check.
        status: ``leak`` fails an audit, the others do not.
        worst: Greatest change of a feature, infinite where a number became NaN; None where none was measured.
        example: A query that changed, in words.
        words: What it means.
    """

    name: str
    status: Status
    worst: float | None = None
    example: str | None = None
    words: str = ""


@dataclass(frozen=True)
class Change:
    """The greatest change of a feature among queries, and one of them in words; false if nothing changed."""

    worst: float = 0.0
    example: str | None = None

    def __bool__(self) -> bool:
        return self.example is not None

    def __or__(self, other: "Change") -> "Change":
        return other if other and other.worst > self.worst else self


NOTHING = Change()


@dataclass(frozen=True)
class Case:
    """Queries on events: users, times and labels ``(Q,)``, names of users ``(U,)``.

    ``reference (n, k)`` are the features whose spread a tolerance is relative to, None before there are any.
    """

    events: Events
    users: Tensor
    times: Tensor
    labels: Tensor | None
    names: Sequence[Any] | None
    reference: Tensor | None = None

    def take(self, rows: Tensor) -> "Case":
        """Some queries, on the same events."""
        labels = None if self.labels is None else self.labels[rows]
        return replace(self, users=self.users[rows], times=self.times[rows], labels=labels)


def allowed_changes(
    before: NDArray[np.float64], reference: NDArray[np.float64], tolerance: float
) -> NDArray[np.float64]:
    """How much each number may change: a share of the spread of its feature, and at least what float32 sums round.

        allowed_ij = max(tolerance s_j, 32 eps max(|x_ij|, m_j)),    eps = 2^-23

    s_j is half the distance of the quantiles 0.16 and 0.84 of a feature, its deviation where it is normal, and m_j the
    quantile 0.84 of its size: a few wild rows do not hide what happens to the others. Nothing is allowed with a
    tolerance of 0.

    Args:
        before: ``(n, k)`` features x.
        reference: ``(N, k)`` features that s and m are taken of, finite entries alone.
        tolerance: At least 0.

    Returns:
        ``(n, k)``.
    """
    if not tolerance:
        return np.zeros(before.shape)
    known = np.where(np.isfinite(reference), reference, np.nan)
    known[:, np.isnan(known).all(0)] = 0.0
    low, high = np.nanquantile(known, USUAL, axis=0)
    size = np.maximum(
        np.where(np.isfinite(before), np.abs(before), 0.0), np.nanquantile(np.abs(known), USUAL[1], axis=0)
    )
    return np.maximum(tolerance * (high - low) / 2, ROUNDING * size)


def changed(before: Tensor, after: Tensor, tolerance: float, case: Case, slack: Tensor | None = None) -> Change:
    """Compare features ``(Q, k)`` of the same queries; a NaN equals a NaN alone.

    Args:
        before: Features.
        after: Features once something was edited.
        tolerance: Allowed, as :func:`allowed_changes` of the features of reference, else of those before.
        case: The queries, for the example.
        slack: ``(k,)`` allowed of each feature in any case.
    """
    if before.shape != after.shape:
        return Change(float("inf"), f"features of shape {tuple(before.shape)} became {tuple(after.shape)}")
    before, after = before.double(), after.double()
    known = before if case.reference is None or case.reference.shape[1] != before.shape[1] else case.reference.double()
    allowed = torch.from_numpy(allowed_changes(before.numpy(), known.numpy(), tolerance))
    gap = gaps(before, after)
    wrong = gap > (allowed if slack is None else torch.maximum(allowed, slack))
    if not wrong.any():
        return Change()
    place = int(gap.masked_fill(~wrong, -1).argmax())
    row, column = divmod(place, before.shape[1])
    user = int(case.users[row])
    name = user if case.names is None else case.names[user]
    example = (
        f"user {name} at {moment(int(case.times[row]))}: feature {column} is {float(before[row, column]):.6g}, becomes "
        f"{float(after[row, column]):.6g}; {int(wrong.any(1).sum())} of {len(before)} queries change"
    )
    return Change(float(gap[row, column]), example)


def gaps(before: Tensor, after: Tensor) -> Tensor:
    """``(Q, k)`` absolute differences of features, infinite where one of them alone is NaN."""
    same = (before == after) | (before.isnan() & after.isnan())
    return (before - after).abs().nan_to_num(nan=float("inf")).masked_fill(same, 0.0)


def moment(microseconds: int) -> str:
    """A time in words, ISO 8601 where a calendar reaches that far."""
    days = microseconds // MICROSECONDS_PER_DAY
    if not -700_000 < days < 2_900_000:
        return f"{microseconds} us"
    return (datetime(1970, 1, 1) + timedelta(microseconds=microseconds)).isoformat(sep=" ")


def report(findings: Sequence[AuditFinding]) -> str:
    """The findings in plain words, leaks first in the verdict."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<11}  {finding.name:<{width}}  {finding.words}")
        if finding.example is not None:
            lines.append(" " * (width + 15) + finding.example)
    leaks = [finding.name for finding in findings if finding.status == "leak"]
    unchecked = [finding.name for finding in findings if finding.status == "not checked"]
    verdict = f"{len(leaks)} leak{'' if len(leaks) == 1 else 's'}: {', '.join(leaks)}" if leaks else "no leak found"
    if unchecked:
        verdict += f"; not checked: {', '.join(unchecked)}"
    if not leaks:
        verdict += "; that there is none cannot be proved"
    return "\n".join([*lines, verdict])


def exit_code(findings: Sequence[AuditFinding]) -> int:
    """1 with a leak, else 0."""
    return int(any(finding.status == "leak" for finding in findings))
