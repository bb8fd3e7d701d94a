"""S4: a linear state space started at HiPPO-LegS, its kernel computed exactly in frequency.

B batch, T time, C channels, D width, N state size, F = T // 2 + 1 frequencies. Source: A. Gu, K. Goel, C. Re,
"Efficiently Modeling Long Sequences with Structured State Spaces", arXiv 2111.00396; sizes from the specification of
arXiv 2502.20948, section 7.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.networks.series_network import (
    SeriesNetwork,
    last_valid_step,
    require_at_least_one,
    require_probability,
)


def hippo_legs(state_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """HiPPO-LegS in its normal-plus-low-rank form, diagonalised.

    A = V (diag(lambda) - p p*) V*,  A_nk = -sqrt((2n + 1)(2k + 1)) below the diagonal, -(n + 1) on it, 0 above; the
    input vector is V b with V b_n = sqrt(2n + 1). Eigenvalues come in conjugate pairs: one of each is returned.

    Args:
        state_size: N, even.

    Returns:
        lambda, p and b, each ``(N / 2,) complex128``; the real parts of lambda are -1/2.

    Source: arXiv 2111.00396, theorem 1 and appendix C.1.
    """
    n = torch.arange(state_size, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    low_rank = (n + 0.5).sqrt()
    # A + p p^T is -1/2 on the diagonal and skew-symmetric beside it: +-sqrt((2n + 1)(2k + 1)) / 2.
    half = 0.5 * torch.outer(root, root)
    skew = half.triu(1) - half.tril(-1)
    frequencies, vectors = torch.linalg.eigh(-1j * skew)
    kept = vectors[:, frequencies > 0].mH
    return (
        -0.5 + 1j * frequencies[frequencies > 0],
        kept @ low_rank.to(vectors.dtype),
        kept @ root.to(vectors.dtype),
    )


def dplr_kernel(
    eigenvalues: Tensor, low_rank: Tensor, inputs: Tensor, outputs: Tensor, steps: Tensor, n_steps: int
) -> Tensor:
    """Impulse response of diagonal-plus-low-rank systems, discretised bilinearly.

    With A = diag(lambda) - p p*, the discrete system A' = (I - A dt/2)^-1 (I + A dt/2), B' = (I - A dt/2)^-1 dt b and
    outputs c = C (I - A'^T), the kernel is K_t = C A'^t B', t < T. Its discrete Fourier transform at angle w is

        e^{i w/2} (k_cb - cos(w/2) k_cp k_pb / (1 + cos(w/2) k_pp)),
        k_xy = sum_n x_n y_n / ((2i / dt) sin(w/2) - lambda_n cos(w/2)),          x in {c, conj(p)}, y in {b, p}

    by the Woodbury identity. Half angles keep it finite at w = pi, where 2 (1 - z) / (dt (1 + z)) has a pole.

    Args:
        eigenvalues: lambda, ``(N / 2,) complex``, one of each conjugate pair, real parts below 0.
        low_rank: p, ``(N / 2,) complex``.
        inputs: b, ``(N / 2,) complex``.
        outputs: c, ``(D, N / 2) complex``, one row for each output.
        steps: dt, ``(D,) float``, one time step for each output.
        n_steps: T.

    Returns:
        ``(D, T) float``.

    Source: arXiv 2111.00396, algorithm 1, with C (I - A'^T) as the parameter, as there.
    """
    half_angle = torch.arange(n_steps // 2 + 1, device=steps.device, dtype=steps.dtype) * (math.pi / n_steps)
    sine, cosine = half_angle.sin()[:, None], half_angle.cos()[:, None]
    shift = 2j * sine / steps[:, None, None]  # (D, F, 1)
    conj_low_rank = low_rank.conj()
    numerators = torch.stack(
        [
            outputs * inputs,
            outputs * low_rank,
            (conj_low_rank * inputs).expand_as(outputs),
            (conj_low_rank * low_rank).expand_as(outputs),
        ],
        -1,
    )  # (D, N / 2, 4)
    sums = (shift - eigenvalues * cosine).reciprocal() @ numerators
    sums = sums + (shift - eigenvalues.conj() * cosine).reciprocal() @ numerators.conj()
    k_cb, k_cp, k_pb, k_pp = sums.unbind(-1)
    cosine = cosine.squeeze(-1)
    spectrum = torch.exp(1j * half_angle) * (k_cb - cosine * k_cp * k_pb / (1 + cosine * k_pp))
    return torch.fft.irfft(spectrum, n=n_steps)


class S4Kernel(nn.Module):
    """Trainable parameters of D state spaces that share lambda, p and b, and their kernels.

    Real parts of lambda are -exp(.) and time steps exp(.), so that any value of a parameter gives a stable system.

    Args:
        d_model: D.
        state_size: N, even.
        n_steps: T, the length of the kernel.
        dt_min: Smallest time step at the start; they are drawn log-uniformly.
        dt_max: Largest.

    Raises:
        ValueError: If a size is out of range, N is odd, or not 0 < ``dt_min`` <= ``dt_max``.
    """

    def __init__(
        self, d_model: int, *, state_size: int, n_steps: int, dt_min: float = 1e-3, dt_max: float = 0.1
    ) -> None:
        require_at_least_one(d_model=d_model, n_steps=n_steps)
        if state_size < 2 or state_size % 2:
            raise ValueError(f"state_size must be even and at least 2, got {state_size}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min must be above 0 and at most dt_max, got {dt_min} and {dt_max}")
        super().__init__()
        self.n_steps = n_steps
        dtype = torch.get_default_dtype()
        eigenvalues, low_rank, inputs = hippo_legs(state_size)
        self.log_decay = nn.Parameter((-eigenvalues.real).log().to(dtype))
        self.frequency = nn.Parameter(eigenvalues.imag.to(dtype))
        # Complex parameters as pairs of reals: optimisers and changes of dtype treat them as any other.
        self.low_rank = nn.Parameter(torch.view_as_real(low_rank).to(dtype))
        self.inputs = nn.Parameter(torch.view_as_real(inputs).to(dtype))
        self.outputs = nn.Parameter(torch.randn(d_model, state_size // 2, 2) * math.sqrt(0.5))
        self.log_dt = nn.Parameter(torch.empty(d_model).uniform_(math.log(dt_min), math.log(dt_max)))

    def forward(self) -> Tensor:
        """Kernels ``(D, T)``, the response at 0, 1, ... steps after an impulse."""
        return dplr_kernel(
            torch.complex(-self.log_decay.exp(), self.frequency),
            torch.view_as_complex(self.low_rank),
            torch.view_as_complex(self.inputs),
            torch.view_as_complex(self.outputs),
            self.log_dt.exp(),
            self.n_steps,
        )


def _perceptron(n_in: int, n_hidden: int, n_out: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, n_hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(n_hidden, n_out))


class S4(SeriesNetwork):
    """One S4 block between two perceptrons, read at the last valid step n.

        u_t = MLP(x_t);  y = sum_{s <= n} K_{n-s} u_s + d u_n  (per feature);  logits = MLP(GLU(W dropout(gelu(y))))

    The kernel K is that of a diagonal-plus-low-rank system in T steps, by :func:`dplr_kernel`. As the block is read
    at one step, its convolution is one product with the reversed kernel and not a transform of every feature.
    Series of at most ``n_steps`` are taken, and a padded series has the logits of the series without its padding.

    Args:
        n_channels: C.
        n_classes: Number of classes.
        n_steps: T.
        d_model: D, at least 2; published 128, in some experiments 64, 256 or 1024.
        state_size: N, even; published 64.
        dropout: Of both perceptrons and the block.

    Raises:
        ValueError: If a size is out of range.

    Source: specification, section 7.
    """

    takes_shorter = True

    def __init__(
        self,
        *,
        n_channels: int,
        n_classes: int,
        n_steps: int,
        d_model: int = 64,
        state_size: int = 64,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(n_channels=n_channels, n_classes=n_classes, n_steps=n_steps)
        if d_model < 2:
            raise ValueError(f"d_model must be at least 2, got {d_model}")
        require_probability(dropout)
        self.lift = _perceptron(n_channels, d_model // 2, d_model, dropout)
        self.kernel = S4Kernel(d_model, state_size=state_size, n_steps=n_steps)
        self.skip = nn.Parameter(torch.randn(d_model))
        self.dropout = nn.Dropout(dropout)
        self.gate = nn.Linear(d_model, 2 * d_model)
        self.head = _perceptron(d_model, d_model // 2, self.n_logits, dropout)

    def logits(self, series: Tensor, mask: Tensor | None) -> Tensor:
        """Logits of series whose padding is zero."""
        if mask is not None:
            series, mask = _end_together(series, mask)
        lifted = self.lift(series)  # (B, T, D)
        if mask is not None:
            lifted = lifted.masked_fill(~mask.unsqueeze(-1), 0.0)  # the lift of a zero is not zero
        reversed_kernel = self.kernel()[:, : series.shape[1]].flip(1)
        read = torch.einsum("btd,dt->bd", lifted, reversed_kernel) + self.skip * lifted[:, -1]
        gated = F.glu(self.gate(self.dropout(F.gelu(read))))
        return self.head(gated)


def _end_together(series: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the padding of ``(B, T, C)`` series before them, so that all have their last valid step at T - 1."""
    n_steps = series.shape[1]
    steps = torch.arange(n_steps, device=series.device)
    n_padded = n_steps - 1 - last_valid_step(mask).unsqueeze(1)
    source = steps - n_padded  # (B, T), below 0 in front of the series
    first = source.clamp(min=0)
    moved = series.gather(1, first.unsqueeze(-1).expand_as(series))
    return moved, mask.gather(1, first) & (source >= 0)
