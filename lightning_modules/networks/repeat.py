"""A repeat mode: the next item is a new draw from the catalogue, or one of the user's own history again.

B batch, T slots, D width, V items, k places of the ranking.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.networks.transformer import causal_mask
from lightning_modules.ranking import top_k_candidates, top_k_items

_NO_PROBABILITY = 1e-30  # below what float32 softmax weights reach; keeps the log finite where nothing can be copied


class RepeatMixture(nn.Module):
    """Mixes the catalogue's softmax with a pointer into the history, so that repeats need not be learnt item by item.

        p(j) = (1 - lambda) softmax_j(<h, table_j>) + lambda sum over visible s with item_s = j of alpha_s,
        alpha = softmax_s(<Q h, K h_s> / sqrt(D) - delta log(1 + age_s)),   lambda = sigmoid(<w, h> + b),

    with age_s in baskets. Before training alpha is nearly uniform, so that the pointer is the user's frequency of each
    item. The negative log-likelihood of the first part is any per-position loss that estimates it; with CCE- and the
    correction ``"logq"`` the denominator stays sampled and no logit matrix is written. Ranking is exact: history items
    are few and scored one by one, in the dtype of the parameters, under autocast too.

    Args:
        d_model: Width D.
        n_items: Catalogue size V, the padding id.
        see_own_basket: Whether a slot sees the later items of its own basket; as the blocks do.

    Source: after RepeatNet (Ren et al., AAAI 2019), with attention over slots as the pointer.
    """

    def __init__(self, d_model: int, *, n_items: int, see_own_basket: bool) -> None:
        super().__init__()
        self.n_items = n_items
        self.see_own_basket = see_own_basket
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, d_model, bias=False)
        self.gate = nn.Linear(d_model, 1)
        self.decay = nn.Parameter(torch.tensor(0.1))
        for weight in (self.query.weight, self.key.weight, self.gate.weight):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.gate.bias)

    def pointer(self, states: Tensor, keys: Tensor, ages: Tensor, visible: Tensor) -> Tensor:
        """Weights ``alpha (B, Q, T)`` of Q query states ``(B, Q, D)`` over ``keys (B, T, D)``; ``ages`` in baskets."""
        logits = self.query(states) @ self.key(keys).transpose(1, 2) / states.shape[-1] ** 0.5
        logits = logits - self.decay * torch.log1p(ages.clamp(min=0).to(logits.dtype))
        return logits.masked_fill(~visible, -torch.inf).softmax(-1)

    def loss(
        self,
        catalogue_loss: Tensor,
        states: Tensor,
        item_ids: Tensor,
        basket_ids: Tensor,
        targets: Tensor,
    ) -> Tensor:
        """Mean of ``-log p(target)`` over the slots that have one; 0 where none has.

        Args:
            catalogue_loss: ``(B, T)`` negative log-probability of each target under the catalogue's softmax.
            states: ``(B, T, D)``.
            item_ids: ``(B, T) int64``, V at padding.
            basket_ids: ``(B, T) int64``, -1 at padding.
            targets: ``(B, T) int64``, negative where there is none.
        """
        visible = causal_mask(item_ids != self.n_items, basket_ids if self.see_own_basket else None)[:, 0]
        alpha = self.pointer(states, states, basket_ids[:, :, None] - basket_ids[:, None, :], visible)
        copied = (alpha * (item_ids[:, None, :] == targets[:, :, None])).sum(-1)
        return self._mix(catalogue_loss, copied, states, targets)

    def last_state_loss(
        self,
        catalogue_loss: Tensor,
        states: Tensor,
        item_ids: Tensor,
        basket_ids: Tensor,
        targets: Tensor,
    ) -> Tensor:
        """As :meth:`loss`, for several targets ``(B, R)`` of the last slot; ``catalogue_loss (B, R)``."""
        alpha = self._last_pointer(states, item_ids, basket_ids)
        copied = (alpha[:, None, :] * (item_ids[:, None, :] == targets[:, :, None])).sum(-1)
        return self._mix(catalogue_loss, copied, states[:, -1:].expand(-1, targets.shape[1], -1), targets)

    def _mix(self, catalogue_loss: Tensor, copied: Tensor, states: Tensor, targets: Tensor) -> Tensor:
        gate = self.gate(states)[..., 0].float()
        new = F.logsigmoid(-gate) - catalogue_loss
        again = F.logsigmoid(gate) + copied.float().clamp_min(_NO_PROBABILITY).log()
        kept = targets >= 0
        return -(torch.logaddexp(new, again) * kept).sum() / kept.sum().clamp_min(1)

    def _last_pointer(self, states: Tensor, item_ids: Tensor, basket_ids: Tensor) -> Tensor:
        valid = item_ids != self.n_items
        ages = (basket_ids[:, -1:] - basket_ids)[:, None, :]
        # An empty history has nothing visible: give its padding the weight, which is no item.
        visible = valid | ~valid.any(1, keepdim=True)
        return self.pointer(states[:, -1:], states, ages, visible[:, None, :])[:, 0]

    @torch.no_grad()
    def rank(
        self,
        states: Tensor,
        item_ids: Tensor,
        basket_ids: Tensor,
        table: Tensor,
        log_normaliser: Tensor,
        k: int,
    ) -> tuple[Tensor, Tensor]:
        """The k most probable next items under the mixture, over the whole catalogue.

        Args:
            states: ``(B, T, D)``.
            item_ids: ``(B, T) int64``.
            basket_ids: ``(B, T) int64``.
            table: ``(V, D)``.
            log_normaliser: ``(B,)``, ``log sum_j exp <h, table_j>`` of the last slot.
            k: Places.

        Returns:
            ``(log-probabilities (B, k) float32, ids (B, k) int64)`` in the order of
            :func:`lightning_modules.ranking.top_k_items`.
        """
        with torch.autocast(states.device.type, enabled=False):
            return self._rank(states.to(self.gate.weight.dtype), item_ids, basket_ids, table, log_normaliser, k)

    def _rank(
        self, states: Tensor, item_ids: Tensor, basket_ids: Tensor, table: Tensor, log_normaliser: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        valid = item_ids != self.n_items
        last = states[:, -1].float()
        gate = self.gate(states[:, -1]).float()  # (B, 1)
        shift = F.logsigmoid(-gate) - log_normaliser[:, None]
        alpha = self._last_pointer(states, item_ids, basket_ids).float()
        same = item_ids[:, :, None] == item_ids[:, None, :]
        copied = (same * alpha[:, None, :]).sum(-1)  # (B, T): weight of the item at each slot, wherever it stands
        again_later = same.triu(1).any(-1)  # an item bought twice is one candidate: its last slot
        own = table[item_ids.clamp_max(self.n_items - 1)].float()
        scores = torch.logaddexp(
            (own @ last[..., None])[..., 0] + shift, F.logsigmoid(gate) + copied.clamp_min(_NO_PROBABILITY).log()
        )
        scores = scores.masked_fill(again_later | ~valid, -torch.inf)
        offsets = F.pad(valid.sum(1).cumsum(0), (1, 0))
        new_scores, new_ids = top_k_items(last, table, k, seen_items=item_ids[valid], seen_offsets=offsets)
        return top_k_candidates(
            torch.cat([scores, new_scores + shift], dim=1), torch.cat([item_ids, new_ids.clamp_min(0)], dim=1), k
        )
