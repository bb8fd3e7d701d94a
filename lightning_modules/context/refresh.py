"""When the states of a bank are encoded anew while the encoder learns, and how far they drifted meanwhile.

The one who trains asks ``due(step, epoch)`` before each step, encodes with ``source(encoder)`` and reports
``done(step, epoch)``; after each step it calls ``follow(encoder)``. Source: spec of arXiv 2502.10205, section 6.3.
"""

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from lightning_modules.context.as_of import sample_context_users


class Refresh:
    """The bank is filled before the first step and never again. Base of the policies."""

    def __init__(self) -> None:
        self.last_step = -1
        self.last_epoch = -1

    def due(self, step: int, epoch: int) -> bool:
        """Whether the bank must be encoded anew before this step.

        Args:
            step: Steps taken so far.
            epoch: Epochs finished so far.
        """
        return self.last_step < 0 or self._stale(step, epoch)

    def _stale(self, step: int, epoch: int) -> bool:
        return False

    def done(self, step: int, epoch: int) -> None:
        """The bank was encoded before this step."""
        self.last_step, self.last_epoch = step, epoch

    def age_steps(self, step: int) -> int:
        """Steps since the bank was encoded, to be logged as ``bank_age_steps``."""
        return step - max(self.last_step, 0)

    def source(self, encoder: nn.Module) -> nn.Module:
        """The module whose states the bank holds."""
        return encoder

    def for_test(self, pretrained: nn.Module, tuned: nn.Module) -> nn.Module:
        """The module whose states a bank of the fitted model holds: as the aggregator knew them in training.

        Args:
            pretrained: What tuning began with.
            tuned: What the branch ended with.
        """
        return tuned

    def follow(self, encoder: nn.Module) -> None:
        """Called after each step of the encoder."""

    def state_dict(self) -> dict[str, int]:
        """Plain numbers for the checkpoint."""
        return {"last_step": self.last_step, "last_epoch": self.last_epoch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where a checkpoint stopped."""
        self.last_step, self.last_epoch = state["last_step"], state["last_epoch"]


class Static(Refresh):
    """Never anew, in a test neither: its bank is encoded by the pre-trained encoder too."""

    def for_test(self, pretrained: nn.Module, tuned: nn.Module) -> nn.Module:
        """What tuning began with."""
        return pretrained


class EveryKSteps(Refresh):
    """Anew every ``k`` steps.

    Args:
        k: At least 1.

    Raises:
        ValueError: If ``k`` is below 1.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.k = k

    def _stale(self, step: int, epoch: int) -> bool:
        return step - self.last_step >= self.k


class PerEpoch(Refresh):
    """Anew before the first step of each epoch."""

    def _stale(self, step: int, epoch: int) -> bool:
        return epoch != self.last_epoch


class Ema(PerEpoch):
    """Anew each epoch, from a copy of the encoder that follows it slowly: theta' <- m theta' + (1 - m) theta.

    The copy is ``momentum_encoder``, to be kept in the checkpoint by whoever trains: it encodes the bank of a test too.
    Buffers, such as statistics of batch normalisation, are copied.

    Args:
        momentum: m, in 0..1.

    Raises:
        ValueError: If m is outside of 0..1.
    """

    def __init__(self, momentum: float = 0.999) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in 0..1, got {momentum}")
        self.momentum = momentum
        self.momentum_encoder: nn.Module | None = None

    def source(self, encoder: nn.Module) -> nn.Module:
        """The copy, made of the encoder as it is when first asked for."""
        if self.momentum_encoder is None:
            self.momentum_encoder = deepcopy(encoder).requires_grad_(False)
        return self.momentum_encoder

    def for_test(self, pretrained: nn.Module, tuned: nn.Module) -> nn.Module:
        """The copy; before it began to follow, what it would begin with."""
        return pretrained if self.momentum_encoder is None else self.momentum_encoder

    @torch.no_grad()
    def follow(self, encoder: nn.Module) -> None:
        """Move the copy towards the encoder."""
        copy = self.source(encoder)
        for slow, fast in zip(copy.parameters(), encoder.parameters(), strict=True):
            slow.lerp_(fast.to(slow), 1 - self.momentum)
        for held, current in zip(copy.buffers(), encoder.buffers(), strict=True):
            held.copy_(current)


class Live(PerEpoch):
    """Anew each epoch; besides, in each step the states of ``n_live`` users of the bank are encoded with gradient.

    Args:
        n_live: At least 1.
        seed: Of the draw.

    Raises:
        ValueError: If ``n_live`` is below 1.
    """

    def __init__(self, n_live: int, seed: int = 0) -> None:
        super().__init__()
        if n_live < 1:
            raise ValueError(f"n_live must be at least 1, got {n_live}")
        self.n_live = n_live
        self.seed = seed

    def users(self, context_users: Tensor, step: int) -> Tensor:
        """``(min(n_live, n),) int64`` context users to encode in this step; a draw of the seed and the step alone.

        Args:
            context_users: ``(n,) int64``, those with states: among others the draw would depend on who comes later.
            step: Steps taken so far.
        """
        return sample_context_users(context_users, self.n_live, self.seed + step)


def drift(stored: Tensor, fresh: Tensor) -> float:
    """Mean of 1 - cos(stored, fresh) over rows, 0..2.

    Args:
        stored: ``(m, d) float`` states of a bank.
        fresh: ``(m, d) float`` states of the encoder as it is now.

    Returns:
        0 where both are equal, also where they are zero; 0 for no rows.

    Raises:
        ValueError: If shapes differ.
    """
    if stored.ndim != 2 or stored.shape != fresh.shape:
        raise ValueError(f"states must share a shape (m, d), got {tuple(stored.shape)} and {tuple(fresh.shape)}")
    if not len(stored):
        return 0.0
    turned = 1 - cosine_similarity(stored.double(), fresh.double(), dim=1)
    return float(torch.where((stored == fresh).all(1), 0, turned.clamp(min=0)).mean())
