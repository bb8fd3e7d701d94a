"""Proposal distributions: what negatives are drawn from, and the log-probabilities that correct for it.

Letters: V items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cce_minus.philox import MASK, scale_words

_UNIT = 1 << 32
"""Mass of one slot of the alias table; probabilities are integers in units of 1 / (V * 2^32)."""


@dataclass(frozen=True, eq=False, repr=False)
class Proposal:
    """A distribution q over the items, with the alias table that draws from it in constant time.

    Build it once with `uniform`, `popularity`, `log_uniform`, `mixture` or `from_probabilities`, and move it with
    `to`. It is not an `nn.Module` on purpose: casting a model to 16 bits must not round log-probabilities.

    A draw takes two 32-bit words. The high half of word * V names a slot s; the answer is s where the second word
    is below `threshold[s]` and `alias[s]` elsewhere. All comparisons are between integers, so every path and device
    draws the same ids. The table realises the stored probabilities exactly: they are rounded to
    multiples of 1 / (V * 2^32) first (positive ones to at least one), and `log_q` is the logarithm of the rounded ones.

    Args:
        log_q: (V,) float32, -inf where the probability is zero.
        threshold: (V,) int32, the bit pattern of an unsigned 32-bit word.
        alias: (V,) int32 item ids.

    Source: alias method of Walker (1977) and Vose (1991), table filled in the sweeping order of
    Hübschle-Schneider and Sanders, "Parallel weighted random sampling", by prefix sums instead of a loop.
    """

    log_q: Tensor
    threshold: Tensor
    alias: Tensor

    @classmethod
    def from_probabilities(cls, probabilities: Tensor) -> Proposal:
        """Proposal with q_j proportional to the given non-negative numbers.

        Args:
            probabilities: (V,) non-negative and finite, of any real dtype; it need not sum to one.

        Raises:
            ValueError: When it is not a vector of at least two finite non-negative numbers with a positive sum.
        """
        if probabilities.dim() != 1 or not 2 <= probabilities.numel() < 1 << 31:
            raise ValueError(
                f"probabilities must be a vector of 2 to 2^31 - 1 numbers, got shape {tuple(probabilities.shape)}"
            )
        q = probabilities.to(torch.float64)
        invalid = ~(torch.isfinite(q) & (q >= 0))
        if bool(invalid.any()):
            at = int(invalid.nonzero()[0])
            raise ValueError(f"probabilities must be finite and non-negative, got {q[at].item()} for item {at}")
        q = q / q.max().clamp_min(torch.finfo(torch.float64).tiny)  # the sum of huge numbers must not overflow
        total = q.sum()
        if not bool(total > 0):
            raise ValueError("probabilities must have a positive sum, got all zeros")
        mass = _integer_mass(q / total)
        threshold, alias = _alias_table(mass)
        log_q = (mass.to(torch.float64) / (mass.numel() * _UNIT)).log().to(torch.float32)
        return cls(log_q, threshold, alias)

    @classmethod
    def uniform(cls, n_items: int, *, device: torch.device | str | None = None) -> Proposal:
        """Every item alike: q_j = 1 / V. Draws the ids and gives the loss of `log_q=None`."""
        return cls.from_probabilities(torch.ones(n_items, device=device))

    @classmethod
    def popularity(cls, counts: Tensor, alpha: float = 1.0) -> Proposal:
        """Powers of the interaction counts: q_j proportional to counts_j^alpha.

        Args:
            counts: (V,) non-negative interaction counts. An item without interactions is never drawn if alpha > 0.
            alpha: Exponent: 1 is popularity itself, 0 is uniform, 0.75 the choice of word2vec.

        Raises:
            ValueError: When the counts are no valid weights.
        """
        return cls.from_probabilities(counts.to(torch.float64) ** alpha)

    @classmethod
    def log_uniform(cls, n_items: int, *, device: torch.device | str | None = None) -> Proposal:
        """Zipf-like by rank: q_j = log((j + 2) / (j + 1)) / log(V + 1), item 0 being the most popular."""
        ranks = torch.arange(n_items, dtype=torch.float64, device=device)
        return cls.from_probabilities(torch.log1p(1 / (ranks + 1)))

    @classmethod
    def mixture(cls, proposals: Sequence[Proposal], weights: Sequence[float]) -> Proposal:
        """Weighted mean of proposals over the same items: q_j = sum_m w_m q_mj / sum_m w_m.

        Args:
            proposals: At least one proposal.
            weights: One non-negative number per proposal.

        Raises:
            ValueError: When the numbers of proposals and weights, or the numbers of items, differ.
        """
        if not proposals or len(proposals) != len(weights):
            raise ValueError(f"mixture needs one weight per proposal, got {len(proposals)} and {len(weights)}")
        sizes = sorted({proposal.n_items for proposal in proposals})
        if len(sizes) > 1:
            raise ValueError(f"mixture needs proposals over the same items, got n_items of {sizes}")
        if min(weights) < 0:
            raise ValueError(f"mixture weights must be non-negative, got {min(weights)}")
        parts = [w * p.log_q.to(torch.float64).exp() for p, w in zip(proposals, weights, strict=True)]
        return cls.from_probabilities(torch.stack(parts).sum(0))

    @property
    def n_items(self) -> int:
        """Number of items V."""
        return self.log_q.numel()

    @property
    def device(self) -> torch.device:
        """Where the tables lie."""
        return self.log_q.device

    def to(self, device: torch.device | str) -> Proposal:
        """The same proposal on another device; itself when it is there already."""
        if self.device == torch.device(device):
            return self
        return Proposal(self.log_q.to(device), self.threshold.to(device), self.alias.to(device))

    def draw(self, slot_words: Tensor, coin_words: Tensor) -> Tensor:
        """Map two random words per draw to an item id.

        Args:
            slot_words: int64 in [0, 2^32), any shape.
            coin_words: int64 in [0, 2^32), the same shape.

        Returns:
            int32 ids in [0, V), the same shape.
        """
        return draw_from_alias_table(scale_words(slot_words, self.n_items), coin_words, self.threshold, self.alias)

    def __repr__(self) -> str:
        return f"Proposal(n_items={self.n_items}, device='{self.device}')"


def draw_from_alias_table(slots: Tensor, coin_words: Tensor, threshold: Tensor, alias: Tensor) -> Tensor:
    """The slot itself where the coin is below its threshold, its alias elsewhere; int32 of the shape of `slots`."""
    keep = coin_words < (threshold[slots].to(torch.int64) & MASK)
    return torch.where(keep, slots.to(torch.int32), alias[slots])


def _integer_mass(q: Tensor) -> Tensor:
    """Round probabilities to integers that sum to V * 2^32 exactly; the largest absorbs the rounding."""
    total = q.numel() * _UNIT
    mass = torch.round(q * total).to(torch.int64)
    mass = torch.where(q > 0, mass.clamp_min(1), mass)
    mass[q.argmax()] += total - mass.sum()
    assert int(mass.min()) >= 0
    return mass


def _alias_table(mass: Tensor) -> tuple[Tensor, Tensor]:
    """Alias table of integer masses, two binary searches in place of the sequential sweep.

    Light items (mass below 2^32) lack a deficit, heavy ones carry an excess. In the sweep the first heavy item
    fills light slots in order until it has become light itself; then the second heavy one fills it up and goes on. With
    L the prefix sums of deficits and H those of excesses, both ascending:

        a light item with deficits L before it takes its alias from the first heavy item with H > L;
        a heavy item j is closed by the first light one with L >= H_j: its threshold is 2^32 - (L - H_j),
        its alias the next heavy item.

    Args:
        mass: (V,) int64, non-negative, with sum V * 2^32.

    Returns:
        Thresholds as (V,) int32 bit patterns and aliases as (V,) int32.
    """
    is_light = mass < _UNIT
    light, heavy = is_light.nonzero().view(-1), (~is_light).nonzero().view(-1)
    deficit = _UNIT - mass[light]
    filled = torch.zeros(light.numel() + 1, dtype=torch.int64, device=mass.device)
    torch.cumsum(deficit, 0, out=filled[1:])
    excess = torch.cumsum(mass[heavy] - _UNIT, 0)
    assert int(filled[-1]) == int(excess[-1])

    threshold, alias = mass.clone(), torch.arange(mass.numel(), device=mass.device)
    alias[light] = heavy[torch.searchsorted(excess, filled[:-1], right=True)]
    threshold[heavy] = _UNIT - (filled[torch.searchsorted(filled, excess)] - excess)
    alias[heavy[:-1]] = heavy[1:]
    # A full slot is its own alias, so that its threshold of 2^32, which 32 bits cannot hold, is never needed.
    alias = torch.where(threshold == _UNIT, torch.arange(mass.numel(), device=mass.device), alias)
    threshold = torch.where(threshold >= 1 << 31, threshold - _UNIT, threshold)
    return threshold.to(torch.int32), alias.to(torch.int32)
