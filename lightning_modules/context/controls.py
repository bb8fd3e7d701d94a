"""Arms of a study and the controls that tell information about others from a calendar.

Q queries, d width of the own state, k width of a context vector. An arm is a feature matrix with a name:

========================== ============================= =======================================================
name                       features                      what it stands for
========================== ============================= =======================================================
``own``                    q                             no context
``own+time``               q, time                       what a clock and the own history's dates tell
``<aggregator>``           q, b                          context
``<aggregator>+time``      q, time, b                    context beside a calendar
``shuffled:<aggregator>``  q, b at another's moment      what any context of the same make does to a probe
``shuffled+time:<...>``    q, time, b at another's ...   the same beside a calendar
``gaussian``               q, noise                      k more columns with the moments of the first aggregator's b
``constant``               q, one vector                 mean b of the first aggregator over train queries
``wide``                   q of a wider encoder          as many columns without context
========================== ============================= =======================================================

"time" is :func:`time_features`, :func:`calendar_basis` at :func:`time_knots`, and, split by users and asked at more
moments than there are knots, :func:`clock_rates`. "q, b" stands for z = combination(q, b), which is [q; b] with
``Concat``, time features between them. With any other combination time features follow z; noise and the constant are
combined as the first aggregator does, with its q.

Source: spec of arXiv 2502.10205, section 11.8.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_modules.context.visible import MICROSECONDS_PER_DAY

TIME_FEATURES = (
    "days",
    "hour_sin",
    "hour_cos",
    "weekday_sin",
    "weekday_cos",
    "day_of_year_sin",
    "day_of_year_cos",
    "log_recency",
    "log_count",
    "log_span",
)
"""Columns of :func:`time_features`."""

WITHOUT_CONTEXT = ("own", "own+time", "wide", "gaussian", "constant")
"""Arms that no aggregator may be named after."""


def time_features(
    times: Tensor, own_last_times: Tensor, own_first_times: Tensor, n_events: Tensor, *, origin: int
) -> Tensor:
    """What a calendar and the dates of the own history say at a query.

    Days since ``origin``; sine and cosine of the hour of the day, of the time of the week (from Monday) and of the
    year, UTC, each a full turn; ln(1 + days since the last own event), ln(1 + own events), ln(1 + days between the
    first and the last own event).

    Args:
        times: ``(Q,) int64`` microseconds since 1970 UTC.
        own_last_times: ``(Q,) int64`` time of the last own event before the query; ignored without history.
        own_first_times: ``(Q,) int64`` of the first.
        n_events: ``(Q,) int64`` own events before the query, 0 without history; recency and span are then 0.
        origin: Microseconds, the first time of train.

    Returns:
        ``(Q, 10) float32``, columns as :data:`TIME_FEATURES`.

    Raises:
        ValueError: If an own event lies after its query.
    """
    known = n_events > 0
    late = torch.nonzero(known & (own_last_times > times)).flatten()
    if len(late):
        row = int(late[0])
        raise ValueError(
            f"own events must not lie after the query, got {own_last_times[row]} > {times[row]} in row {row}"
        )

    def days(microseconds: Tensor) -> Tensor:
        return microseconds.double() / MICROSECONDS_PER_DAY

    moments = times.cpu().numpy().astype("datetime64[us]")
    year = moments.astype("datetime64[Y]")
    start, end = (one.astype("datetime64[us]").astype(np.int64) for one in (year, year + 1))
    turns = torch.stack(
        [
            days(times.cpu() % MICROSECONDS_PER_DAY),
            # 1 January 1970 was a Thursday
            (days(times.cpu()) + 3) % 7 / 7,
            torch.from_numpy((moments.astype(np.int64) - start) / (end - start)),
        ],
        1,
    ).to(times.device)
    angles = 2 * torch.pi * turns
    waves = torch.stack([angles.sin(), angles.cos()], 2).flatten(1)
    recency = torch.where(known, days(times - own_last_times), 0.0)
    span = torch.where(known, days(own_last_times - own_first_times), 0.0)
    logs = torch.stack([recency, n_events.double(), span], 1).log1p()
    return torch.cat([days(times - origin).unsqueeze(1), waves, logs], 1).float()


def time_knots(times: Tensor, n_knots: int = 48) -> Tensor:
    """Moments between which a linear probe may bend as it likes: quantiles of train query times, each once.

    Where queries are asked at no more distinct moments than ``n_knots``, such as calendar dates, every one is a knot: a
    probe can then learn any function of the calendar, all that the mean of others could tell without being about them.
    Where they are asked at more, :func:`clock_rates` tell what swings between the knots.

    Args:
        times: ``(Q_train,) int64`` microseconds, at least 1.
        n_knots: Most knots, at least 1.

    Returns:
        ``(m,) int64``, rising, at most ``n_knots``.

    Raises:
        ValueError: If there is no time, or ``n_knots`` is below 1.
    """
    if len(times) == 0 or n_knots < 1:
        raise ValueError(f"time_knots needs at least 1 time and 1 knot, got {len(times)} and {n_knots}")
    distinct = times.unique()
    if len(distinct) <= n_knots:
        return distinct
    places = torch.linspace(0, len(times) - 1, n_knots, dtype=torch.float64, device=times.device).round().long()
    return times.sort().values[places].unique()


def calendar_basis(times: Tensor, knots: Tensor) -> Tensor:
    """Piecewise linear functions of time: 1 at one knot, 0 at the others, straight between; constant beyond the ends.

    Args:
        times: ``(Q,) int64`` microseconds.
        knots: ``(m,) int64``, rising.

    Returns:
        ``(Q, m) float32``, rows sum to 1.
    """
    inside = times.clamp(int(knots[0]), int(knots[-1]))
    above = torch.searchsorted(knots, inside).clamp(min=min(1, len(knots) - 1))
    below = (above - 1).clamp(min=0)
    gap = (knots[above] - knots[below]).clamp(min=1).double()
    share = ((inside - knots[below]).double() / gap).unsqueeze(1)
    basis = torch.zeros(len(times), len(knots), dtype=torch.float64, device=times.device)
    basis.scatter_add_(1, below.unsqueeze(1), 1 - share)
    basis.scatter_add_(1, above.unsqueeze(1), share)
    return basis.float()


def clock_rates(
    times: Tensor,
    users: Tensor,
    labels: Tensor,
    train: Tensor,
    n_classes: int,
    *,
    nearest: Sequence[int] = (4, 32, 256),
    n_folds: int = 5,
    seed: int = 0,
) -> Tensor:
    """How the labels of train queries at about the same moment came out: any function of a clock, learned from labels.

        share_c = (labels c among the rows + m_c) / (rows + 1),   m_c = (labels c + 1) / (labels + K) of all rows

    The rows are all train queries of the very moment, and as many before and behind it as make ``nearest`` together.
    For a train query only users of other folds than its own have rows, so that no label tells itself, for others all.
    Of use where queries of train surround those of the test; behind the end of train nothing is near.

    Args:
        times: ``(Q,) int64``.
        users: ``(Q,) int64``.
        labels: ``(Q,) int64`` in 0..n_classes-1; those outside of train are not read.
        train: ``(Q,) bool``.
        n_classes: K.
        nearest: Rows of each resolution, rising.
        n_folds: Folds of users, at least 2.
        seed: Of the folds.

    Returns:
        ``(Q, R) float32``, of each resolution the log-odds of class 1 of two, else the K logarithms of the shares.

    Raises:
        ValueError: If there is no train query or fewer than two folds.
    """
    if n_folds < 2 or not bool(train.any()):
        raise ValueError(f"clock_rates needs train queries and at least 2 folds, got {int(train.sum())} and {n_folds}")
    people, known = users[train].unique(return_inverse=True)
    lots = torch.randperm(len(people), generator=torch.Generator().manual_seed(seed)).to(users.device) % n_folds
    asked, answers = times[train], labels[train]
    fold = torch.full_like(users, -1)
    fold[train] = lots[known]
    found = torch.zeros(len(times), len(nearest), n_classes, dtype=torch.float64, device=times.device)
    for number in fold.unique().tolist():
        rows, read = fold == number, fold[train] != number
        order = asked[read].argsort(stable=True)
        moments = asked[read][order]
        counts = torch.nn.functional.one_hot(answers[read][order], n_classes).double().cumsum(0)
        counts = torch.cat([counts.new_zeros(1, n_classes), counts])
        prior = (counts[-1] + 1) / (len(moments) + n_classes)
        first = torch.searchsorted(moments, times[rows])
        last = torch.searchsorted(moments, times[rows], right=True)
        for place, n in enumerate(nearest):
            size = (last - first).clamp(min=min(n, len(moments)))
            start = (first - (size - (last - first)) // 2).clamp(min=0)
            start = torch.minimum(start, len(moments) - size)
            inside = size.unsqueeze(1)
            found[rows, place] = (counts[start + size] - counts[start] + prior) / (inside + 1)
    logs = found.log()
    return (logs[..., 1] - logs[..., 0] if n_classes == 2 else logs.flatten(1)).float()


def shuffled_times(times: Tensor, fold: Tensor, seed: int) -> Tensor:
    """Query times permuted among the queries of each fold: the context of a random moment of the same fold.

    Args:
        times: ``(Q,) int64``.
        fold: ``(Q,) int8``; no time crosses from one fold to another, so that training stays before its end.
        seed: Of the permutation.

    Returns:
        ``(Q,) int64``.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = times.clone()
    for number in fold.unique().tolist():
        rows = torch.nonzero(fold == number).flatten()
        shuffled[rows] = times[rows[torch.randperm(len(rows), generator=generator).to(rows.device)]]
    return shuffled


def gaussian_like(b_train: Tensor, n: int, seed: int) -> Tensor:
    """Gaussian noise with the mean and covariance of context vectors.

    Args:
        b_train: ``(Q_train, k) float`` context vectors of train queries, at least 1.
        n: Rows to draw.
        seed: Of the draw.

    Returns:
        ``(n, k)`` in the dtype of ``b_train``.

    Raises:
        ValueError: If there is no train query.
    """
    if len(b_train) == 0:
        raise ValueError("gaussian_like needs at least 1 context vector of train, got 0")
    values = b_train.double()
    mean = values.mean(0)
    centred = values - mean
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(values))
    # A root by eigenvalues exists for singular covariances too, of fewer vectors than columns.
    root = axes * variances.clamp_min(0).sqrt()
    noise = torch.randn(n, values.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (mean + noise.to(root.device) @ root.T).to(b_train)


def constant_context(vector: Tensor, n: int) -> Tensor:
    """One context vector ``(k,)``, such as the mean of those of train queries, for ``n`` queries."""
    return vector.expand(n, -1)


class Arm(NamedTuple):
    """An arm, read from its name.

    Attributes:
        name: As in the table of this module.
        source: Whose states and context it is made of: ``own``, ``wide``, ``gaussian``, ``constant`` or an aggregator.
        has_time: Whether time features are in it.
        is_shuffled: Whether the context is that of another moment.
    """

    name: str
    source: str
    has_time: bool
    is_shuffled: bool

    @property
    def is_context(self) -> bool:
        """Whether it is the context of its own moment, what is to be judged."""
        return self.source not in WITHOUT_CONTEXT and not self.is_shuffled

    @classmethod
    def parse(cls, name: str) -> "Arm":
        """From a name.

        Raises:
            ValueError: If the name is none of the table.
        """
        head, colon, aggregator = name.partition(":")
        source, plus, time = (head if colon else name).partition("+")
        valid = (not plus or time == "time") and bool(source)
        if colon:
            valid = valid and source == "shuffled" and bool(aggregator) and aggregator not in WITHOUT_CONTEXT
        if not valid:
            raise ValueError(f"an arm is [shuffled[+time]:]<aggregator>[+time], own, wide, ..., got {name!r}")
        return cls(name, aggregator if colon else source, bool(plus), bool(colon))


def arm_names(
    aggregators: Sequence[str],
    *,
    time: bool = True,
    shuffled: bool = True,
    gaussian: bool = True,
    constant: bool = True,
    wide: bool = False,
) -> tuple[str, ...]:
    """Names of the arms of a study, controls first.

    Args:
        aggregators: Names without ``+`` and ``:``.
        time: Adds time features beside each.
        shuffled: Adds each aggregator at shuffled moments.
        gaussian: Adds noise.
        constant: Adds one vector.
        wide: Adds the parameter-matched encoder.

    Raises:
        ValueError: If an aggregator's name would be read as another arm.
    """
    for name in aggregators:
        if not name or {"+", ":"} & set(name) or name in WITHOUT_CONTEXT:
            raise ValueError(
                f"an aggregator's name must have no '+' or ':' and be none of {WITHOUT_CONTEXT}, got {name!r}"
            )
    names = ["own", *(["own+time"] if time else [])]
    names += [name for name, asked in (("wide", wide), ("gaussian", gaussian), ("constant", constant)) if asked]
    for name in aggregators:
        names += [f"shuffled:{name}", *([f"shuffled+time:{name}"] if time else [])] if shuffled else []
    for name in aggregators:
        names += [name, *([f"{name}+time"] if time else [])]
    return tuple(names)


def assemble(
    arms: Sequence[str],
    own: Tensor | Mapping[str, Tensor],
    time: Tensor,
    contexts: Mapping[str, Tensor],
    combinations: Mapping[str, Callable[[Tensor, Tensor], Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Feature matrices of arms: own state, then time features, then context; or both combined, then time features.

    Args:
        arms: Names.
        own: ``(Q, d)`` own states; by name where arms have encoders of their own, ``own`` for those that are not named.
        time: ``(Q, 10 + m)`` of :func:`time_features` and :func:`calendar_basis`.
        contexts: By aggregator, ``shuffled:<aggregator>``, ``gaussian`` and ``constant``: ``(Q, k)`` context vectors;
            by ``wide`` the states ``(Q, 2 d)`` of the wider encoder.
        combinations: By aggregator, ``gaussian`` and ``constant``: ``(q, b) -> (Q, D)``; those of a source that is not
            named stay side by side.

    Returns:
        By arm ``(Q, k) float32``.

    Raises:
        ValueError: If the vectors of an arm are missing or have another number of rows.
    """
    states = {"own": own} if isinstance(own, Tensor) else own
    features = {}
    for arm in map(Arm.parse, arms):
        needed = f"shuffled:{arm.source}" if arm.is_shuffled else arm.source
        if needed != "own" and needed not in contexts:
            raise ValueError(f"arm {arm.name!r} needs the vectors of {needed!r}, got {sorted(contexts)}")
        query = contexts["wide"] if arm.source == "wide" else states.get(arm.source, states["own"])
        calendar = [time] if arm.has_time else []
        context = [contexts[needed]] if needed not in ("own", "wide") else []
        parts = [query, *calendar, *context]
        if len({len(part) for part in parts}) > 1:
            raise ValueError(
                f"arm {arm.name!r} is made of different numbers of queries: {[len(part) for part in parts]}"
            )
        if context and arm.source in (combinations or {}):
            parts = [(combinations or {})[arm.source](query, *context), *calendar]
        features[arm.name] = torch.cat([part.float() for part in parts], 1)
    return features
