"""Sequences of validation that are the same in every epoch: evenly spaced slices, sliding windows, tails of queries.

U users, Q queries, E events, B sequences, L steps. Source: spec of arXiv 2502.10205, sections 2.3, 2.4 and 8.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_modules.context.as_of import last_before, sample_context_users
from lightning_modules.context.visible import Events, Queries
from lightning_modules.losses import EventObjective, Supervised


def later_events(events: Events, users: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Rows of the first event at or after ``start`` of each user, and how many follow: ``(U,) int64`` each."""
    offsets = events["offsets"]
    late = torch.cat([offsets.new_zeros(1), (events["times"] >= start).long().cumsum(0)])
    first, stop = offsets[users], offsets[users + 1]
    counts = late[stop] - late[first]
    return stop - counts, counts  # times do not decrease within a user


def gathered(events: Events, users: Tensor, starts: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """Padded batch of the events ``starts .. starts + lengths`` of users; keys as in training."""
    steps = torch.arange(int(lengths.max()), device=lengths.device)
    mask = steps < lengths.unsqueeze(1)
    rows = torch.where(mask, starts.unsqueeze(1) + steps, 0)
    batch = {
        name: torch.where(mask if name == "times" else mask.unsqueeze(2), events[name][rows], 0)
        for name in ("categorical", "numeric", "times")
    }
    return batch | {"mask": mask, "users": users, "starts": starts}


def even_slices(events: Events, users: Tensor, *, start: int, n_slices: int = 5, length: int = 82) -> dict[str, Tensor]:
    """Evenly spaced slices of each user with at least two events from ``start`` on.

    Args:
        events: Flat.
        users: ``(U,) int64``.
        start: Microseconds; earlier events are left out.
        n_slices: Slices a user.
        length: Events a slice; users with fewer give all they have, ``n_slices`` times.

    Returns:
        A batch of ``U' * n_slices`` sequences, those of a user beside each other.
    """
    first, counts = later_events(events, users, start)
    kept = counts >= 2
    users, first, counts = users[kept], first[kept], counts[kept]
    lengths = counts.clamp(max=length)
    shares = torch.linspace(0, 1, n_slices, dtype=torch.float64) if n_slices > 1 else torch.zeros(1).double()
    starts = first.unsqueeze(1) + ((counts - lengths).unsqueeze(1) * shares.to(counts.device)).round().long()
    repeated = users.repeat_interleave(n_slices), starts.flatten(), lengths.repeat_interleave(n_slices)
    return gathered(events, *repeated) if len(users) else {}


def sliding_windows(
    events: Events, users: Tensor, *, start: int, length: int = 32, step: int = 16
) -> dict[str, Tensor]:
    """Windows that end at a user's last event and step back by ``step``, at least two events each.

    Anchored at the tail, so that the newest events and short users take part (spec 8).

    Args:
        events: Flat.
        users: ``(U,) int64``.
        start: Microseconds; earlier events are left out.
        length: Most events a window.
        step: Events between the ends of windows.
    """
    first, counts = later_events(events, users, start)
    n_windows = torch.where(counts >= 2, 1 + (counts - length).clamp(min=0) // step, 0)
    owner = torch.arange(len(users), device=users.device).repeat_interleave(n_windows)
    place = torch.arange(len(owner), device=users.device) - (n_windows.cumsum(0) - n_windows)[owner]
    stops = (first + counts)[owner] - place * step
    starts = torch.maximum(stops - length, first[owner])
    return gathered(events, users[owner], starts, stops - starts) if len(owner) else {}


def tail_windows(events: Events, queries: Queries, *, length: int = 150) -> dict[str, Tensor]:
    """The last events strictly before queries, with ``query_times`` and ``labels``: as supervised training has them.

    Args:
        events: Flat.
        queries: Of a target; those without an event before them are left out.
        length: Most events a window.
    """
    first, stop = events["offsets"][queries["users"]], events["offsets"][queries["users"] + 1]
    stops = last_before(events["times"], first, stop, queries["times"]) + 1
    kept = stops > first
    if not kept.any():
        return {}
    starts = torch.maximum(stops - length, first)
    batch = gathered(events, queries["users"][kept], starts[kept], (stops - starts)[kept])
    return batch | {"query_times": queries["times"][kept], "labels": queries["labels"][kept]}


def validation_sequences(
    batch: Mapping[str, Any],
    objective: EventObjective,
    *,
    max_length: int | None = None,
    max_users: int = 512,
    supervised: str | None = None,
) -> dict[str, Tensor]:
    """What ``val/loss`` is computed of: slices, windows or tails of validation users, as the objective needs them.

    Under a split of users these are the users with events that are no context users; under a split of time all, and
    slices and windows hold no event of training. Users are drawn by a fixed seed, and windows lie in random order: who
    reads the first of them does not read those of a few users.

    Args:
        batch: The one batch of validation.
        objective: What is to be computed.
        max_length: Most events of a sequence, where an encoder takes no more.
        max_users: Most users.
        supervised: Target of a supervised objective; None for the only one.

    Raises:
        ValueError: If there is no such sequence, or it is not said which target is meant.
    """
    events, queries = batch["events"], batch["queries"]

    def at_most(length: int) -> int:
        return length if max_length is None else min(length, max_length)

    def sampled(users: Tensor) -> Tensor:
        return sample_context_users(users, max_users, 0) if len(users) else users

    if isinstance(objective, Supervised):
        if supervised is None and len(queries) != 1:
            named = ", ".join(queries) or "none"
            raise ValueError(f"evaluation.supervised must name the target of the sampler, there are {named}")
        target = queries[supervised or next(iter(queries))]
        users = sampled(target["users"][target["fold"] == 1].unique())
        chosen = (target["fold"] == 1) & torch.isin(target["users"], users)
        asked = {name: target[name][chosen] for name in ("users", "times", "labels")}
        found = tail_windows(events, asked, length=at_most(150))
    else:
        by_time = batch["split"] == "time"
        start = batch["train_stop"] if by_time else -(2**63)
        users = torch.arange(len(events["offsets"]) - 1, device=events["offsets"].device)
        users = users if by_time else users[~torch.isin(users, batch["context_users"])]
        users = sampled(users[later_events(events, users, start)[1] >= 2])
        if objective.needs == "last":
            found = even_slices(events, users, start=start, length=at_most(82))
        else:
            found = sliding_windows(events, users, start=start, length=at_most(32))
            order = torch.randperm(len(found.get("users", ())), generator=torch.Generator().manual_seed(0))
            found = {name: value[order.to(value.device)] for name, value in found.items()}
    if not found:
        raise ValueError("no validation user has two events to compute a loss of, give more (validation_fraction)")
    return found
