"""Maximum likelihood of a multivariate Hawkes intensity on ``ExpHawkes`` features: is the learned theta the true one?

Q queries, G groups; a state is the one-hot group of its user, so the sum of decayed states counts the excitation that
each group exerts at a query. Rates are events a day, ages and theta days. Source: spec of arXiv 2502.10205, sections 4
and 12.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.context.decayed import ExpHawkes
from lightning_modules.context.visible import Context
from lightning_modules.networks.series_network import require_at_least_one


class HawkesRate(nn.Module):
    """Intensity of the asked user from its own group and the decayed sum of the groups of others.

        lambda = <q, mu> + sum_g b_g <beta_g, q>,    b = sum_i X_i exp(-Delta_i / theta)

    mu and beta are exponentials of the parameters, so that a rate is positive; both begin at one event a day.

    Args:
        n_groups: G.

    Raises:
        ValueError: If ``n_groups`` is below 1.
    """

    def __init__(self, n_groups: int) -> None:
        require_at_least_one(n_groups=n_groups)
        super().__init__()
        self.log_base = nn.Parameter(torch.zeros(n_groups))
        self.log_excitation = nn.Parameter(torch.zeros(n_groups, n_groups))

    @property
    def base(self) -> Tensor:
        """``(G,)`` mu."""
        return self.log_base.exp()

    @property
    def excitation(self) -> Tensor:
        """``(G, G)`` beta: row the group that excites, column the group excited."""
        return self.log_excitation.exp()

    def forward(self, query: Tensor, excited: Tensor) -> Tensor:
        """``(Q,)`` rates from one-hot groups ``query (Q, G)`` and decayed sums ``excited (Q, G)``."""
        return query @ self.base + (excited @ self.excitation * query).sum(1)


def event_log_losses(rates: Tensor, labels: Tensor, pings_per_day: float) -> Tensor:
    """-ln of the probability that what was seen at a query is what it was: an event (1) or a ping (0).

        p(1) = lambda / (lambda + rho)

    Exact where pings are a Poisson process of rate rho independent of everything, without any window.

    Args:
        rates: ``(Q,) float`` lambda, events a day, positive.
        labels: ``(Q,) int64``, 1 or 0.
        pings_per_day: rho, positive.

    Returns:
        ``(Q,)`` nats.

    Raises:
        ValueError: If ``pings_per_day`` is not positive.
    """
    if not pings_per_day > 0:
        raise ValueError(f"pings_per_day must be positive, got {pings_per_day}")
    chosen = torch.where(labels == 1, rates, torch.full_like(rates, pings_per_day))
    return (rates + pings_per_day).log() - chosen.log()


@dataclass(frozen=True)
class HawkesFit:
    """A fitted intensity.

    Attributes:
        aggregator: With its theta.
        rate: With mu and beta.
        log_loss: Mean over the queries of the fit, nats.
    """

    aggregator: ExpHawkes
    rate: HawkesRate
    log_loss: float

    @property
    def theta(self) -> float:
        """Days."""
        return float(self.aggregator.decay.theta.detach())

    @torch.no_grad()
    def rates(self, query: Tensor, context: Context) -> Tensor:
        """``(Q,) float64`` events a day of other queries."""
        return self.rate(query.double(), self.aggregator(query.double(), context))


def fit_hawkes(
    query: Tensor,
    context: Context,
    labels: Tensor,
    *,
    pings_per_day: float,
    theta: float,
    learn_theta: bool = True,
    max_iterations: int = 60,
) -> HawkesFit:
    """Fit mu, beta and, if asked, theta together by L-BFGS in float64.

    Args:
        query: ``(Q, G) float`` one-hot group of each asked user, Q at least 1.
        context: Their context; states are one-hot groups.
        labels: ``(Q,) int64``, 1 for an event, 0 for a ping.
        pings_per_day: rho.
        theta: Days, where the search begins, or what it stays at.
        learn_theta: Whether it is learned.
        max_iterations: Of L-BFGS.

    Returns:
        The fit.

    Raises:
        ValueError: If there is no query, or labels are other than 0 and 1.
    """
    if not len(query) or labels.shape != query.shape[:1] or not torch.isin(labels, labels.new_tensor([0, 1])).all():
        raise ValueError(f"fit_hawkes needs queries with a label 0 or 1 each, got {len(query)} and {len(labels)}")
    aggregator = ExpHawkes(d=query.shape[1], theta=theta, learn_theta=learn_theta).double()
    # A query that sees nobody is excited by nobody: the stand-in for no context stays 0.
    aggregator.empty_context.requires_grad_(False)
    rate = HawkesRate(query.shape[1]).double()
    solver = torch.optim.LBFGS(
        [one for one in (*aggregator.parameters(), *rate.parameters()) if one.requires_grad],
        max_iter=max_iterations,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    query = query.double()

    def loss() -> Tensor:
        return event_log_losses(rate(query, aggregator(query, context)), labels, pings_per_day).mean()

    def closure() -> Tensor:
        solver.zero_grad()
        found = loss()
        torch.autograd.backward(found)
        return found

    step: Any = solver.step
    with torch.enable_grad():
        step(closure)
    with torch.no_grad():
        return HawkesFit(aggregator.eval(), rate.eval(), float(loss()))
