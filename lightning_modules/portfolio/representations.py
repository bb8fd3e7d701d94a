"""Control representations of stocks: what topology has to beat before it means anything.

Each maps returns ``(A, T)`` of A stocks over T days to one row of ``(A, D)`` a stock. None has weights; each window
of returns is represented by itself. Any other network ``(A, T) -> (A, D)`` can stand in their place. One with an
attribute ``uses_index = True`` is given the index, ``(T,)``, as a second argument; one with a method ``fit(returns)``
is fitted on the train window first; one with a method ``loss(windows (B, L))`` is trained by the Trainer.
Source: spec of arXiv 2308.07944, section 4.
"""

import torch
from torch import Tensor, nn

from lightning_modules.portfolio.market import daily_risk_free


class RawReturns(nn.Module):
    """The returns themselves, D = T."""

    def forward(self, returns: Tensor) -> Tensor:
        """Return the input."""
        return returns


class PrincipalComponents(nn.Module):
    """Scores of the stocks on the leading principal components of the stocks x days matrix.

    With X the returns centred over stocks and X = U S V', the rows of U_k S_k. Signs are fixed: the entry of largest
    magnitude of each column is positive.

    Args:
        n_components: k, at least 1; min(k, A, T) are given.
    """

    def __init__(self, *, n_components: int = 100) -> None:
        if n_components < 1:
            raise ValueError(f"n_components must be at least 1, got {n_components}")
        super().__init__()
        self.n_components = n_components

    def forward(self, returns: Tensor) -> Tensor:
        """Scores ``(A, k)``."""
        u, s, _ = torch.linalg.svd(returns - returns.mean(0), full_matrices=False)
        return _with_fixed_signs((u * s)[:, : self.n_components])


class CorrelationMDS(nn.Module):
    """Classical multidimensional scaling of the distance d = sqrt(2 (1 - rho)) between stocks.

    Rows of V_k sqrt(L_k) of the double-centred -d^2 / 2 = V L V'. A constant series has correlation 0 with all others.

    Args:
        n_components: k, at least 1; min(k, A) are given.
    """

    def __init__(self, *, n_components: int = 100) -> None:
        if n_components < 1:
            raise ValueError(f"n_components must be at least 1, got {n_components}")
        super().__init__()
        self.n_components = n_components

    def forward(self, returns: Tensor) -> Tensor:
        """Coordinates ``(A, k)``."""
        centred = returns - returns.mean(1, keepdim=True)
        norms = centred.norm(dim=1, keepdim=True)
        unit = torch.where(norms > 0, centred / norms, 0)
        rho = (unit @ unit.T).fill_diagonal_(1)
        gram = rho - rho.mean(0) - rho.mean(1, keepdim=True) + rho.mean()  # -d^2 / 2 double-centred: the 1 falls out
        values, vectors = torch.linalg.eigh(gram)
        leading = (vectors * values.clamp_min(0).sqrt()).flip(1)[:, : self.n_components]
        return _with_fixed_signs(leading)


class VolatilityOnly(nn.Module):
    """The standard deviation of daily returns and nothing else, D = 1."""

    def forward(self, returns: Tensor) -> Tensor:
        """Standard deviations ``(A, 1)``."""
        return returns.std(1, keepdim=True)


class RandomVectors(nn.Module):
    """Gaussian vectors that know nothing of the stocks.

    Args:
        n_components: D, at least 1.
        seed: Of the draw; the same for every window, so that stock a keeps its vector.
    """

    def __init__(self, *, n_components: int = 100, seed: int = 0) -> None:
        if n_components < 1:
            raise ValueError(f"n_components must be at least 1, got {n_components}")
        super().__init__()
        self.n_components = n_components
        self.seed = seed

    def forward(self, returns: Tensor) -> Tensor:
        """Vectors ``(A, D)``."""
        generator = torch.Generator().manual_seed(self.seed)  # on the CPU: the same vectors on every device
        return torch.randn(len(returns), self.n_components, generator=generator, dtype=returns.dtype).to(returns.device)


class FinancialFeatures(nn.Module):
    """Fourteen figures of a stock, with the index m and the daily risk-free rate f.

    mean, standard deviation, median, share of positive days, maximum drawdown (of the value that starts at 1, at most
    0), longest recovery (days under water), beta = cov(r, m) / var(m), alpha = mean(r - f) - beta mean(m - f),
    Sharpe = (mean - f) / std, 5 % quantile of returns, mean of the returns not above it, f + beta mean(m - f),
    variance / mean, information ratio mean(r - m) / std(r - m). All daily; ratios with a denominator of 0 are 0. The
    authors' release subtracts an *annual* rate from daily means in Sharpe and the CAPM return.

    Args:
        risk_free: Annual; None is that of the model, and 0.03 without one.
    """

    uses_index = True

    def __init__(self, *, risk_free: float | None = None) -> None:
        super().__init__()
        self.risk_free = risk_free

    def forward(self, returns: Tensor, index_returns: Tensor | None) -> Tensor:
        """Features ``(A, 14)`` in the order above.

        Raises:
            ValueError: If there is no index.
        """
        if index_returns is None:
            raise ValueError("FinancialFeatures needs an index (data.init_args.index_paths), got none")
        rate = daily_risk_free(self.risk_free)
        mean, std, var = returns.mean(1), returns.std(1), returns.var(1)
        market = index_returns.mean()
        covariance = ((returns - mean[:, None]) * (index_returns - market)).sum(1) / (returns.shape[1] - 1)
        beta = _ratio(covariance, index_returns.var().expand_as(covariance))
        value = torch.cat([torch.ones_like(returns[:, :1]), (1 + returns).cumprod(1)], 1)
        under = value / value.cummax(1).values - 1
        quantile = torch.quantile(returns, 0.05, dim=1)
        tail = returns <= quantile[:, None]
        active = returns - index_returns
        columns = [
            mean,
            std,
            returns.quantile(0.5, dim=1),  # `median` of torch is the lower of the two middle values
            (returns > 0).to(returns.dtype).mean(1),
            under.min(1).values,
            _longest_run(under < 0).to(returns.dtype),
            beta,
            mean - rate - beta * (market - rate),
            _ratio(mean - rate, std),
            quantile,
            (returns * tail).sum(1) / tail.sum(1),
            rate + beta * (market - rate),
            _ratio(var, mean),
            _ratio(active.mean(1), active.std(1)),
        ]
        return torch.stack(columns, 1)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator == 0, 0, numerator / denominator)


def _longest_run(flags: Tensor) -> Tensor:
    """Longest run of true in each row of ``(A, T) bool``."""
    places = torch.arange(1, flags.shape[1] + 1, device=flags.device).expand(flags.shape)
    last_false = torch.where(flags, 0, places).cummax(1).values
    return (places - last_false).max(1).values


def _with_fixed_signs(scores: Tensor) -> Tensor:
    """Signs of singular vectors are arbitrary and differ between libraries."""
    largest = scores.gather(0, scores.abs().argmax(0, keepdim=True))
    return scores * torch.where(largest < 0, -1, 1)
