"""CCE-, the sampled cross-entropy of ``kernels.cce_minus``, as a module that YAML can inject."""

from typing import Literal

from torch import Tensor, nn

from kernels.cce_minus import Proposal, cce_minus_loss
from kernels.cce_minus.arguments import Correction, Reduction, Sharing
from kernels.cce_minus.function import Implementation


class CCEMinusLoss(nn.Module):
    """Cross-entropy against K sampled negatives, ``log(exp(z+) + sum_k m_k exp(z_k + a_k)) - z+``.

    Args:
        n_negatives: Negatives a position, K >= 1, or ``"all"`` for the exact full cross-entropy.
        sharing: Which positions share one draw: ``"position"`` none (as published), ``"tile"`` groups of
            ``tile_size``, ``"batch"`` all.
        tile_size: Positions a tile, with ``sharing="tile"``.
        correction: Importance weight of a negative: ``"logq"`` (unbiased denominator), ``"none"``,
            ``"improved_logq"``, ``"classic_logq"``; see :func:`kernels.cce_minus.cce_minus_loss`.
        popularity_alpha: Negatives are drawn with probability proportional to count^alpha over the training
            interactions; 0 is uniform, as published. Above 0, :meth:`fit_proposal` comes before the first loss.
        seed: Seed of the draws. With the step and the rank it fixes every id, so a resumed run draws the same.
        impl: ``"auto"`` takes the Triton kernels on a GPU and chunks of PyTorch elsewhere; ``"reference"``,
            ``"torch"`` or ``"triton"`` insist on one.

    Raises:
        ValueError: If a size is below 1, or alpha is negative or given together with ``n_negatives="all"``.

    Source: arXiv 2509.09682; the correction for non-uniform draws is ours (the release keeps the uniform one).
    """

    def __init__(
        self,
        n_negatives: int | Literal["all"] = 256,
        *,
        sharing: Sharing = "position",
        tile_size: int = 128,
        correction: Correction = "logq",
        popularity_alpha: float = 0.0,
        seed: int = 0,
        impl: Implementation = "auto",
    ) -> None:
        if n_negatives != "all" and n_negatives < 1:
            raise ValueError(f"n_negatives must be at least 1 or 'all', got {n_negatives}")
        if tile_size < 1:
            raise ValueError(f"tile_size must be at least 1, got {tile_size}")
        if popularity_alpha < 0:
            raise ValueError(f"popularity_alpha must be at least 0, got {popularity_alpha}")
        if popularity_alpha and n_negatives == "all":
            raise ValueError("popularity_alpha has no meaning with n_negatives='all': nothing is drawn")
        super().__init__()
        self.n_negatives = n_negatives
        self.sharing = sharing
        self.tile_size = tile_size
        self.correction = correction
        self.popularity_alpha = popularity_alpha
        self.seed = seed
        self.impl = impl
        self.proposal: Proposal | None = None

    def fit_proposal(self, item_counts: Tensor) -> None:
        """Build the sampler from ``item_counts (V,)``, the training interactions of each item; nothing at alpha 0."""
        if self.popularity_alpha:
            self.proposal = Proposal.popularity(item_counts, self.popularity_alpha)

    @property
    def is_log_likelihood(self) -> bool:
        """Whether the loss of a position is ``-log p(target)``, but for the noise of a sampled denominator."""
        return self.n_negatives == "all" or self.correction == "logq"

    def forward(
        self,
        hidden: Tensor,
        item_embeddings: Tensor,
        targets: Tensor,
        *,
        step: int | Tensor = 0,
        rank: int = 0,
        weight: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """Loss over the kept positions: a 0-d float tensor, or the shape of ``targets`` for ``reduction="none"``.

        Args:
            hidden: States ``(..., D)``.
            item_embeddings: Output head ``(V, D)``.
            targets: Target ids ``(...) int64``, -100 where there is none.
            step: Micro-batches seen before this one; every step draws fresh ids.
            rank: Process rank; ranks draw different ids.
            weight: Weight of each position, of the shape of ``targets``.
            reduction: ``"mean"``, ``"sum"`` or ``"none"``.

        Raises:
            ValueError: If ``popularity_alpha`` is above 0 and there is no proposal, or as
                :func:`kernels.cce_minus.cce_minus_loss`.
        """
        if self.popularity_alpha and self.proposal is None:
            raise ValueError(
                f"popularity_alpha {self.popularity_alpha} needs a proposal, got none: call fit_proposal(item_counts), "
                "or give SASRecCCE item_counts"
            )
        if self.proposal is not None:
            self.proposal = self.proposal.to(hidden.device)
        loss = cce_minus_loss(
            hidden,
            item_embeddings,
            targets,
            n_negatives=self.n_negatives,
            seed=self.seed,
            step=step,
            rank=rank,
            sharing=self.sharing,
            tile_size=self.tile_size,
            log_q=self.proposal,
            correction=self.correction,
            weight=weight,
            reduction=reduction,
            impl=self.impl,
        )
        assert isinstance(loss, Tensor)  # a pair only with return_lse
        return loss

    def extra_repr(self) -> str:
        """What decides the loss, for the model summary."""
        return f"n_negatives={self.n_negatives}, sharing={self.sharing}, correction={self.correction}"
