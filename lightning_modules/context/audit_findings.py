"""What a leak audit finds, and how it says so. Q queries, k features, U users."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from torch import Tensor

from lightning_modules.context.visible import MICROSECONDS_PER_DAY, Events

Status = Literal["clean", "leak", "information", "not checked"]


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
    """Queries on events: users, times and labels ``(Q,)``, names of users ``(U,)``."""

    events: Events
    users: Tensor
    times: Tensor
    labels: Tensor | None
    names: Sequence[Any] | None

    def take(self, rows: Tensor) -> "Case":
        """Some queries, on the same events."""
        labels = None if self.labels is None else self.labels[rows]
        return Case(self.events, self.users[rows], self.times[rows], labels, self.names)


def changed(before: Tensor, after: Tensor, tolerance: float, case: Case) -> Change:
    """Compare features ``(Q, k)`` of the same queries; a NaN equals a NaN alone.

    Args:
        before: Features.
        after: Features once something was edited.
        tolerance: Allowed, relative to max(1, |feature|).
        case: The queries, for the example.
    """
    if before.shape != after.shape:
        return Change(float("inf"), f"features of shape {tuple(before.shape)} became {tuple(after.shape)}")
    before, after = before.double(), after.double()
    same = (before == after) | (before.isnan() & after.isnan())
    gap = (before - after).abs().nan_to_num(nan=float("inf")).masked_fill(same, 0.0)
    allowed = tolerance * before.abs().clamp(min=1).nan_to_num(nan=1.0)
    wrong = gap > allowed
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
