"""Causal transformer over item histories: the block SASRec was published with, and a modern one.

B batch, T time (slots), D width, V items. Histories are left-padded: the last slot is the most recent item.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BlockFactory = Callable[[int], nn.Module]
"""Builds one block for a width D; YAML gives it by ``class_path`` with every argument but the width."""


def causal_mask(valid: Tensor, basket_ids: Tensor | None = None) -> Tensor:
    """Which slot may look at which: the past, only real items, optionally the whole of its own basket.

    Slot t sees slot s when s is no padding and (s <= t, or s and t share a basket). A padded slot sees itself
    alone, so that no row of the softmax is empty.

    Args:
        valid: ``(B, T) bool``, true at real items.
        basket_ids: ``(B, T) int64`` timestamp group of each slot, -1 at padding; ``None`` for the plain causal rule.

    Returns:
        ``(B, 1, T, T) bool``, true where attention is allowed.
    """
    n_slots = valid.shape[1]
    allowed = torch.ones(n_slots, n_slots, dtype=torch.bool, device=valid.device).tril()[None]
    if basket_ids is not None:
        allowed = allowed | (basket_ids[:, :, None] == basket_ids[:, None, :])
    itself = torch.eye(n_slots, dtype=torch.bool, device=valid.device)[None]
    return ((allowed & valid[:, None, :]) | itself)[:, None]


class SelfAttention(nn.Module):
    """Multi-head scaled dot-product attention, ``softmax(q k^T / sqrt(D / n_heads)) v``, by the fused operator.

    Args:
        d_model: Width D.
        n_heads: Number of heads; divides D.
        dropout: Probability of dropping an attention weight in training.
        bias: Whether the four projections carry a bias.

    Raises:
        ValueError: If ``n_heads`` does not divide ``d_model``.
    """

    def __init__(self, d_model: int, n_heads: int, dropout: float, *, bias: bool = True) -> None:
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(f"n_heads must be a positive divisor of d_model, got n_heads={n_heads}, d_model={d_model}")
        super().__init__()
        self.n_heads = n_heads
        self.dropout = dropout
        self.query = nn.Linear(d_model, d_model, bias=bias)
        self.key = nn.Linear(d_model, d_model, bias=bias)
        self.value = nn.Linear(d_model, d_model, bias=bias)
        self.out = nn.Linear(d_model, d_model, bias=bias)

    def forward(self, queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        """Attend from ``queries`` to ``keys``, both ``(B, T, D)``; ``mask`` of :func:`causal_mask`, or plain causal."""
        heads = (self.n_heads, -1)
        q = self.query(queries).unflatten(-1, heads).transpose(1, 2)  # (B, n_heads, T, D / n_heads)
        k = self.key(keys).unflatten(-1, heads).transpose(1, 2)
        v = self.value(keys).unflatten(-1, heads).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)
        return self.out(attended.transpose(1, 2).flatten(-2))


class PublishedBlock(nn.Module):
    """The block of the released SASRec.

    q = LayerNorm(x);  x = q + MHA(q, x, x, causal);  x = LayerNorm(x);
    x = x + dropout(W2 dropout(relu(W1 x)));  x = 0 at padded slots.

    The residual starts from the normalised query, W1 and W2 are D x D, LayerNorm eps is 1e-8, and padded slots
    are attended to as zero vectors (no key-padding mask).

    Args:
        d_model: Width D.
        n_heads: Attention heads.
        dropout: Dropout of attention weights and of the feed-forward layers.
        padding_mask: Hide padded slots from attention (a departure from the release).
        see_own_basket: Let a slot see the later items of its own basket. Only meaningful with next-basket
            targets, where no target shares the basket of its input (a departure from the release). Implies
            ``padding_mask``.

    Source: the released code of arXiv 2509.09682.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 2,
        dropout: float = 0.1,
        padding_mask: bool = False,
        see_own_basket: bool = False,
    ) -> None:
        super().__init__()
        self.padding_mask = padding_mask or see_own_basket
        self.see_own_basket = see_own_basket
        self.norm_query = nn.LayerNorm(d_model, eps=1e-8)
        self.attention = SelfAttention(d_model, n_heads, dropout)
        self.norm_feed = nn.LayerNorm(d_model, eps=1e-8)
        self.feed = nn.Sequential(
            nn.Linear(d_model, d_model),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(d_model, d_model),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor, valid: Tensor, basket_ids: Tensor) -> Tensor:
        """Map ``x (B, T, D)`` to ``(B, T, D)``; ``valid (B, T) bool`` marks real items."""
        mask = causal_mask(valid, basket_ids if self.see_own_basket else None) if self.padding_mask else None
        query = self.norm_query(x)
        x = self.norm_feed(query + self.attention(query, x, mask))
        return (x + self.feed(x)).masked_fill(~valid[..., None], 0.0)


class PreNormBlock(nn.Module):
    """A pre-norm block: x = x + MHA(RMSNorm(x));  x = x + W2 dropout(gelu(W1 RMSNorm(x))), padding never attended.

    Args:
        d_model: Width D.
        n_heads: Attention heads.
        dropout: Dropout of attention weights, of the hidden layer and of both branches.
        expansion: Width of the hidden layer as a multiple of D.
        see_own_basket: Let a slot see the later items of its own basket (next-basket targets only).
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 2,
        dropout: float = 0.1,
        expansion: int = 4,
        see_own_basket: bool = False,
    ) -> None:
        super().__init__()
        self.see_own_basket = see_own_basket
        self.norm_attention = nn.RMSNorm(d_model, eps=1e-6)
        self.attention = SelfAttention(d_model, n_heads, dropout, bias=False)
        self.norm_feed = nn.RMSNorm(d_model, eps=1e-6)
        self.feed = nn.Sequential(
            nn.Linear(d_model, expansion * d_model, bias=False),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(expansion * d_model, d_model, bias=False),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, valid: Tensor, basket_ids: Tensor) -> Tensor:
        """Map ``x (B, T, D)`` to ``(B, T, D)``; ``valid (B, T) bool`` marks real items."""
        mask = causal_mask(valid, basket_ids if self.see_own_basket else None)
        normed = self.norm_attention(x)
        x = x + self.dropout(self.attention(normed, normed, mask))
        return x + self.dropout(self.feed(self.norm_feed(x)))


class SequenceEncoder(nn.Module):
    """Item histories to one state a slot, with the item table as tied output head.

    h = table[item] * sqrt(D) + position;  h = dropout(h), zero at padding;  h = blocks(h);  h = LayerNorm(h).
    The score of item j at slot t is <h_t, table[j]>: no bias, no temperature.

    Matrices start Xavier-normal, the item table too, so that first logits are near 0 and the first loss near log V.

    Args:
        n_items: Catalogue size V; the table has V + 1 rows, the last one for padding.
        d_model: Width D.
        max_length: Most recent items that are read, T.
        n_blocks: Depth.
        block: Factory of one block; called with D.
        dropout: Dropout of the embedded input.

    Raises:
        ValueError: If a size is out of range.

    Source: the released code of arXiv 2509.09682; after Kang & McAuley, SASRec, arXiv 1808.09781.
    """

    def __init__(
        self,
        *,
        n_items: int,
        d_model: int,
        max_length: int,
        n_blocks: int,
        block: BlockFactory,
        dropout: float,
    ) -> None:
        for name, received, least in (
            ("n_items", n_items, 2),
            ("d_model", d_model, 1),
            ("max_length", max_length, 1),
            ("n_blocks", n_blocks, 1),
        ):
            if received < least:
                raise ValueError(f"{name} must be at least {least}, got {received}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        super().__init__()
        self.n_items = n_items
        self.max_length = max_length
        self.item_table = nn.Embedding(n_items + 1, d_model)
        self.position_table = nn.Embedding(max_length, d_model)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(block(d_model) for _ in range(n_blocks))
        self.norm = nn.LayerNorm(d_model, eps=1e-8)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_normal_(parameter)

    @property
    def see_own_basket(self) -> bool:
        """Whether a slot sees the later items of its own basket, as its blocks, all of one factory, were told."""
        return any(getattr(block, "see_own_basket", False) for block in self.blocks)

    @property
    def item_embeddings(self) -> Tensor:
        """The ``(V, D)`` output head: the item table without its padding row, a view."""
        return self.item_table.weight[: self.n_items]

    def forward(self, item_ids: Tensor, basket_ids: Tensor) -> Tensor:
        """States ``(B, T, D)`` of histories ``item_ids (B, T) int64``, left-padded with V, T at most ``max_length``."""
        n_slots = item_ids.shape[1]
        if n_slots > self.max_length:
            raise ValueError(f"histories must have at most max_length={self.max_length} slots, got {n_slots}")
        valid = item_ids != self.n_items
        x = self.item_table(item_ids) * self.item_table.embedding_dim**0.5
        x = x + self.position_table.weight[self.max_length - n_slots :]  # the last slot keeps the last position
        x = self.dropout(x).masked_fill(~valid[..., None], 0.0)
        for block in self.blocks:
            x = block(x, valid, basket_ids)
        return self.norm(x)
