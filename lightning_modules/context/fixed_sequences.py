"""Sequences of validation that are the same in every epoch: evenly spaced slices, sliding windows.

U users, E events, B sequences, L steps. Source: spec of arXiv 2502.10205, sections 2.3 and 2.4.
"""

import torch
from torch import Tensor

from lightning_modules.context.visible import Events


def later_events(events: Events, users: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Rows of the first event at or after ``start`` of each user, and how many follow: ``(U,) int64`` each."""
    offsets = events["offsets"]
    late = torch.cat([offsets.new_zeros(1), (events["times"] >= start).long().cumsum(0)])
    first, stop = offsets[users], offsets[users + 1]
    counts = late[stop] - late[first]
    return stop - counts, counts  # times do not decrease within a user


def gathered(events: Events, users: Tensor, starts: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """Padded batch of the events ``starts .. starts + lengths`` of users; keys as in training."""
    steps = torch.arange(int(lengths.max()))
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
    starts = first.unsqueeze(1) + ((counts - lengths).unsqueeze(1) * shares).round().long()
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
    owner = torch.arange(len(users)).repeat_interleave(n_windows)
    place = torch.arange(len(owner)) - (n_windows.cumsum(0) - n_windows)[owner]
    stops = (first + counts)[owner] - place * step
    starts = torch.maximum(stops - length, first[owner])
    return gathered(events, users[owner], starts, stops - starts) if len(owner) else {}
