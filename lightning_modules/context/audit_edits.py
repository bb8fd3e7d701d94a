"""Edits of flat events for a leak audit: what lies in the future is changed, removed, poisoned or mixed.

E events, U users, F categorical and M numeric features. Every edit gives a new table and leaves the old one as it is;
what lies before the edited rows stays bit by bit. Source: spec of arXiv 2502.10205, section 13.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from lightning_modules.context.visible import MICROSECONDS_PER_DAY, Events

PER_USER = ("offsets", "groups", "draws", "words")
MICROSECONDS_PER_HOUR = 3_600_000_000


def users_of_rows(events: Events) -> Tensor:
    """``(E,) int64``: the user of every event."""
    lengths = events["offsets"].diff()
    return torch.arange(len(lengths)).repeat_interleave(lengths)


def per_event(events: Events) -> list[str]:
    """Names of the tensors with one row for each event."""
    n_events = len(events["times"])
    return [name for name, value in events.items() if name not in PER_USER and len(value) == n_events]


def keep(events: Events, kept: Tensor) -> Events:
    """The events of a mask ``(E,) bool``; users who lose all of theirs stay with an empty range."""
    before = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.long().cumsum(0)])
    edited = dict(events) | {name: events[name][kept] for name in per_event(events)}
    return edited | {"offsets": before[events["offsets"]]}


def retime(events: Events, rows: Tensor, start: int, stop: int, generator: torch.Generator) -> Events:
    """Move the times of events ``rows (E,) bool``, all at or after ``start`` microseconds, further into the future.

    The order within a user stays, the order between users changes: t becomes start + 2 (t - start) + shift of the
    user, of up to an hour. What was before ``stop`` stays before it.
    """
    shifts = torch.randint(MICROSECONDS_PER_HOUR, (len(events["offsets"]) - 1,), generator=generator)
    moved = start + 2 * (events["times"] - start) + shifts[users_of_rows(events)]
    moved = torch.where(events["times"] < stop, moved.clamp(max=stop - 1), moved)
    return dict(events) | {"times": torch.where(rows, moved, events["times"])}


def rewrite(events: Events, rows: Tensor, generator: torch.Generator) -> Events:
    """Give events ``rows (E,) bool`` other categories, each from 1 to its greatest id, and other numbers."""
    edited = dict(events)
    ids, numeric = events["categorical"], events["numeric"]
    if len(ids) and ids.shape[1]:
        highest = ids.amax(0).clamp(min=1)
        # A step of 1 .. highest - 1 around the circle of ids never comes back to the same one.
        steps = 1 + torch.floor(torch.rand(ids.shape, generator=generator) * (highest - 1).clamp(min=1)).long()
        other = 1 + (ids.clamp(min=1) - 1 + steps) % highest
        edited["categorical"] = torch.where(rows.unsqueeze(1), other, ids)
    other = 10 - 2 * numeric + torch.randn(numeric.shape, generator=generator).to(numeric)
    edited["numeric"] = torch.where(rows.unsqueeze(1), other, numeric)
    return edited


def poison(events: Events, rows: Tensor) -> Events:
    """Put NaN in place of every number of events ``rows (E,) bool``."""
    return dict(events) | {"numeric": events["numeric"].masked_fill(rows.unsqueeze(1), float("nan"))}


def mix(events: Events, rows: Tensor, stop: int, generator: torch.Generator) -> Events:
    """Exchange the contents of events ``rows (E,) bool`` among themselves, times left where they are.

    Those before ``stop`` microseconds are exchanged among each other, and so are the later ones. Counts, means and
    deviations of both parts stay, up to the order of float sums: what still changes a representation is a state, not
    a statistic.
    """
    edited = dict(events)
    for part in (rows & (events["times"] < stop), rows & (events["times"] >= stop)):
        places = part.nonzero().squeeze(1)
        order = places[torch.randperm(len(places), generator=generator)]
        for name in ("categorical", "numeric"):
            edited[name] = edited[name].index_copy(0, places, events[name][order])
    return edited


def plant(events: Events, time: int, category: int, number: float) -> Events:
    """Give every user one more event at ``time``, behind those it has at that microsecond.

    Args:
        events: Flat.
        time: Microseconds.
        category: Id in every categorical feature, at most the greatest of that feature.
        number: Value of every numeric feature.
    """
    n_events, n_users = len(events["times"]), len(events["offsets"]) - 1
    rows = users_of_rows(events)
    earlier = torch.bincount(rows[events["times"] <= time], minlength=n_users)
    # Row i keeps the key 2 i + 1; an event planted before row p gets 2 p, and the sort is stable by user.
    keys = torch.cat([2 * torch.arange(n_events) + 1, 2 * (events["offsets"][:-1] + earlier)])
    order = keys.argsort(stable=True)
    added = {
        "times": torch.full((n_users,), time),
        "numeric": events["numeric"].new_full((n_users, events["numeric"].shape[1]), number),
        "categorical": highest_ids(events).clamp(max=category).expand(n_users, -1),
    }
    edited = dict(events)
    for name in per_event(events):
        more = added.get(name, events[name].new_zeros(n_users, *events[name].shape[1:]))
        edited[name] = torch.cat([events[name], more])[order]
    return edited | {"offsets": events["offsets"] + torch.arange(n_users + 1)}


def next_tick(events: Events, time: int) -> int:
    """The first moment after ``time`` at which the log could hold an event, in microseconds.

    Its clock ticks as often as all distances of its events allow, at least once a day: on a log of dates what comes
    next comes the day after, and a pipeline may well take an earlier moment for the same day.
    """
    first = int(events["times"].min())
    tick = int(np.gcd.reduce((events["times"] - first).numpy(), initial=MICROSECONDS_PER_DAY))
    return first + ((time - first) // tick + 1) * tick


def highest_ids(events: Events) -> Tensor:
    """``(F,) int64``: the greatest id of every categorical feature, at least 1."""
    ids = events["categorical"]
    return ids.amax(0).clamp(min=1) if len(ids) else ids.new_ones(ids.shape[1])


def only_users(events: Events, users: Tensor) -> Events:
    """Events of some users alone, ``users (n,) int64`` increasing; they are numbered anew from 0."""
    wanted = torch.zeros(len(events["offsets"]) - 1, dtype=torch.bool)
    wanted[users] = True
    kept = keep(events, wanted[users_of_rows(events)])
    starts = kept["offsets"]
    few = kept | {"offsets": torch.cat([starts[users], starts[-1:]])}
    return few | {name: events[name][users] for name in PER_USER[1:] if name in events}


@contextmanager
def other_labels(tables: Sequence[Tensor], kind: str, generator: torch.Generator) -> Iterator[None]:
    """Labels exchanged among rows (``kind`` ``"exchanged"``) or all alike (``"constant"``), in place, and put back."""
    kept = [table.clone() for table in tables]
    try:
        for table in tables:
            other = table[torch.randperm(len(table), generator=generator)]
            table.copy_(other if kind == "exchanged" else table.flatten()[0].expand_as(table))
        yield
    finally:
        for table, value in zip(tables, kept, strict=True):
            table.copy_(value)
