"""Rules of what a query may see among the states that exist at its moment.

They know moments and users alone. The k states that matter most to a query are a matter of its own state, and so of
the aggregator's argument ``top_k``; a policy here could not tell them.

Q queries, n rows a query or n rows shared by all, times in microseconds. Source: spec of arXiv 2502.10205,
section 3.2.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_modules.context.visible import MICROSECONDS_PER_DAY

Ties = Literal["strict", "inclusive"]
Policy = Literal["recent", "random"]
Layout = Literal["auto", "shared", "gathered"]


def microseconds(name: str, n_days: float) -> int:
    """Whole microseconds of ``n_days``.

    Raises:
        ValueError: If it is negative or not finite.
    """
    if not (math.isfinite(n_days) and n_days >= 0):
        raise ValueError(f"{name} must be finite and at least 0, got {n_days}")
    return round(n_days * MICROSECONDS_PER_DAY)


@dataclass(frozen=True)
class Visibility:
    """What a query at time t of user u may see.

    Attributes:
        ties: ``"strict"``: events before the moment; ``"inclusive"``: also events at it.
        lag: Microseconds; states are looked up as of t - lag.
        max_age: Microseconds; states whose event is older than this at t are hidden. None hides none.
        exclude_self: States of u are hidden.
        exclude_group: States of users of u's group are hidden; group -1 is none.
        max_context: Most states a query sees; None for all.
        policy: Which ones: ``"recent"``, the most recently updated, the lower user first among equals; ``"random"``,
            by a hash of (u, t, other user, seed), so that neither the batch nor later events change the draw; users
            stand in it by words of their ids where there are any, since row numbers move with whoever is inserted.
        seed: Of the hash.

    Raises:
        ValueError: If a value is outside its range.
    """

    ties: Ties = "strict"
    lag: int = 0
    max_age: int | None = None
    exclude_self: bool = True
    exclude_group: bool = False
    max_context: int | None = None
    policy: Policy = "recent"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("ties", Ties), ("policy", Policy)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {get_args(allowed)}, got {getattr(self, name)!r}")
        if self.max_context is not None and self.max_context < 1:
            raise ValueError(f"max_context must be at least 1, got {self.max_context}")

    @property
    def inclusive(self) -> bool:
        """Whether events at the very moment count."""
        return self.ties == "inclusive"

    def plain(self) -> dict[str, Any]:
        """Numbers, strings and None, from which the rules can be made again."""
        return asdict(self)

    def moments(self, times: Tensor) -> Tensor:
        """``(Q,) int64`` moments as of which queries at ``times`` look."""
        return times - self.lag

    def allowed(
        self, exists: Tensor, start: Tensor, owners: Tensor, times: Tensor, users: Tensor, groups: Tensor
    ) -> Tensor:
        """Existing states without those that age, self and group hide.

        Args:
            exists: ``(Q, n) bool``.
            start: ``(Q, n)`` or ``(n,) int64``, t_e.
            owners: ``(Q, n)`` or ``(n,) int64``, the other users.
            times: ``(Q,) int64``, t.
            users: ``(Q,) int64``, u.
            groups: ``(U,) int64``, read only if groups are excluded.

        Returns:
            ``(Q, n) bool``.
        """
        seen = exists
        if self.max_age is not None:
            seen = seen & (times.unsqueeze(1) - start <= self.max_age)
        if self.exclude_self:
            seen = seen & (owners != users.unsqueeze(1))
        if self.exclude_group:
            # somebody unknown (-1) has no group
            own = torch.where(users >= 0, groups[users.clamp(min=0)], -1).unsqueeze(1)
            seen = seen & ((own < 0) | (groups[owners] != own))
        return seen

    @property
    def is_random(self) -> bool:
        """Whether what is seen is a random choice."""
        return self.max_context is not None and self.policy == "random"

    def best(
        self, seen: Tensor, start: Tensor, owners: Tensor, times: Tensor, users: Tensor, words: Tensor
    ) -> Tensor | None:
        """``(Q, max_context) int64`` columns to keep, seen ones first; None if all n fit.

        Arguments as above, and ``words (U,) int64``, empty for row numbers: read by the random policy alone.
        """
        if self.max_context is None or seen.shape[1] <= self.max_context:
            return None
        if self.policy == "recent":
            priority = start.expand_as(seen)
        else:
            own, others = users, owners
            if len(words):  # somebody unknown (-1) has no word
                own, others = torch.where(users >= 0, words[users.clamp(min=0)], -1), words[owners]
            of_query = _scrambled(_scrambled(times + _scrambled(torch.full_like(users, self.seed))) + own)
            priority = _scrambled(of_query.unsqueeze(1) + others)
        lowest = torch.iinfo(torch.int64).min
        # stable, so that equals come in the order of their users in either layout
        order = torch.where(seen, priority, lowest).argsort(dim=1, descending=True, stable=True)
        return order[:, : self.max_context]


def _scrambled(values: Tensor) -> Tensor:
    """A bijection of int64 whose bits look random: the finaliser of SplitMix64, whose products wrap."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        values = (values ^ ((values >> shift) & (2 ** (64 - shift) - 1))) * factor
    return values ^ ((values >> 31) & (2**33 - 1))
