"""SASRec trained with a sampled cross-entropy that never writes the logit matrix. Source: arXiv 2509.09682."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from kernels.cce_minus import cce_minus_loss
from lightning_modules.collectives import share
from lightning_modules.losses import CCEMinusLoss
from lightning_modules.many_devices import require_replicas
from lightning_modules.metrics import MAP, MRR, NDCG, Coverage, EpochMean, HitRate, Precision, Recall, Surprisal
from lightning_modules.networks import PublishedBlock, RepeatMixture, SequenceEncoder
from lightning_modules.networks.transformer import BlockFactory
from lightning_modules.ranking import Recommendations, top_k_items

PUBLISHED_CUTOFFS = (1, 5, 10, 20, 100)


def _adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-3, betas=(0.9, 0.98))


class SASRecCCE(LightningModule):
    """Next items of a user from the order of the last ones: a causal transformer with a tied head and CCE-.

    The batches are those of ``InteractionsDataModule``: ``item_ids (B, T) int64`` left-padded with V,
    ``basket_ids (B, T) int64``; in training ``targets (B, T) int64`` with -100 where there is none; in evaluation
    ``relevant (B, R) int64`` padded with -1 and the whole history of each user as ``history_items (M,)``,
    ``history_offsets (B + 1,)``. ``n_items``, ``max_length``, ``recommend_seen``, ``target`` and ``item_counts`` are
    facts of the data and linked by the CLI, never typed.

    Logged: ``train/loss``, mean over positions of the injected loss, or where ``repeat_mode`` acts of the mixture's
    ``-log p``, into which that loss enters; ``val/loss``, mean of the exact ``-log p(item)`` over the relevant items,
    from the last slot; ``val/<metric>@<k>``, ``test/<metric>@<k>``. Nothing is drawn in evaluation, so its values do
    not depend on batches or processes.

    On R devices (``replicated``, or Lightning's ``ddp``) a step is that of one process on the joined batch: the mean is
    over the positions of all. Each process draws negatives of its own.

    Args:
        n_items: Catalogue size V.
        max_length: Most recent items read, T.
        recommend_seen: Whether items of the user's own history may be recommended.
        target: ``"next_item"`` or ``"next_basket"``; with the first, no block may see its own
            basket: the answer is in it.
        item_counts: ``(V,)`` integer array, training interactions of each item; only popularity sampling needs it.
        d_model: Width D of states and item table.
        n_blocks: Depth.
        dropout: Dropout of the embedded input; the blocks have their own.
        block: Factory of one block, called with D.
        repeat_mode: Whether to mix in a pointer to the user's own history, for repeat purchases, see
            :class:`lightning_modules.networks.RepeatMixture`. Without effect where own history may not be recommended.
            A ``CCEMinusLoss`` must then estimate -log p: correction ``"logq"``, or ``n_negatives="all"``.
        loss: ``loss(hidden (..., D), table (V, D), targets (...), step=, rank=, reduction=)``; its mean is over the
            positions that have a target, 0 with zero gradients where none has.
        optimizer: Called with the parameters.
        scheduler: Called with the optimiser; stepped every epoch, a plateau scheduler on ``monitor``.
        monitor: The logged key a plateau scheduler watches.
        cutoffs: The k of the metrics, the largest is the length of the ranking.
        n_recommendations: Items a user in ``predict``.

    Raises:
        ValueError: If a size is out of range, a fact of the data was not linked, a block would see the answer, or the
            loss is no -log p that the repeat mode could mix.

    Source: the released code of arXiv 2509.09682 for the published block, initialisation and optimiser.
    """

    def __init__(
        self,
        *,
        n_items: int,
        max_length: int,
        recommend_seen: bool = False,
        target: str | None = None,
        item_counts: Any = None,  # an array; a sequence type would be checked element by element by the CLI
        d_model: int = 64,
        n_blocks: int = 2,
        dropout: float = 0.1,
        block: BlockFactory = PublishedBlock,
        repeat_mode: bool = False,
        loss: nn.Module | None = None,
        optimizer: OptimizerCallable = _adam,
        scheduler: LRSchedulerCallable | None = None,
        monitor: str = "val/ndcg@10",
        cutoffs: Sequence[int] = PUBLISHED_CUTOFFS,
        n_recommendations: int = 10,
    ) -> None:
        if n_items is None or max_length is None:
            raise ValueError(f"n_items and max_length must come from the data, got {n_items} and {max_length}")
        if not cutoffs or min(cutoffs) < 1:
            raise ValueError(f"cutoffs must be at least one k >= 1, got {list(cutoffs)}")
        if n_recommendations < 1:
            raise ValueError(f"n_recommendations must be at least 1, got {n_recommendations}")
        super().__init__()
        self.n_items = n_items
        self.recommend_seen = recommend_seen
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.monitor = monitor
        self.cutoffs = sorted(set(cutoffs))
        self.n_recommendations = n_recommendations
        self.encoder = SequenceEncoder(
            n_items=n_items,
            d_model=d_model,
            max_length=max_length,
            n_blocks=n_blocks,
            block=block,
            dropout=dropout,
        )
        if target == "next_item" and self.encoder.see_own_basket:
            raise ValueError(
                "see_own_basket must be false with target 'next_item': the next item may be of that basket"
            )
        self.repeat = (
            RepeatMixture(d_model, n_items=n_items, see_own_basket=self.encoder.see_own_basket)
            if repeat_mode and recommend_seen
            else None
        )
        self.loss = CCEMinusLoss() if loss is None else loss
        if isinstance(self.loss, CCEMinusLoss) and item_counts is not None:
            self.loss.fit_proposal(torch.as_tensor(item_counts))
        if self.repeat is not None and isinstance(self.loss, CCEMinusLoss) and not self.loss.is_log_likelihood:
            raise ValueError(
                f"repeat_mode needs a loss that is -log p: correction 'logq' or n_negatives 'all', got correction "
                f"{self.loss.correction!r} with n_negatives {self.loss.n_negatives}"
            )
        # Micro-batches so far, not optimiser steps: gradient accumulation must draw fresh negatives each time. A
        # buffer, so that a resumed run goes on with the draws the unbroken run would have made.
        self.micro_step: Tensor
        self.register_buffer("micro_step", torch.zeros((), dtype=torch.int64))
        self.train_loss, self.val_loss = EpochMean(), EpochMean()
        self.val_metrics = self._metrics("val/")
        self.test_metrics = self._metrics("test/")

    def _metrics(self, prefix: str) -> MetricCollection:
        metrics: dict[str, Metric | MetricCollection] = {}
        for k in self.cutoffs:
            for name, kind in {
                "ndcg": NDCG,
                "hit_rate": HitRate,
                "recall": Recall,
                "precision": Precision,
                "map": MAP,
                "mrr": MRR,
            }.items():
                metrics[f"{name}@{k}"] = kind(k)
            metrics[f"coverage@{k}"] = Coverage(k, self.n_items)
            metrics[f"surprisal@{k}"] = Surprisal(k, self.n_items)
        return MetricCollection(metrics, prefix=prefix, compute_groups=False)

    def forward(self, item_ids: Tensor, basket_ids: Tensor) -> Tensor:
        """States ``(B, T, D)`` of left-padded histories ``(B, T)``."""
        return self.encoder(item_ids, basket_ids)

    def setup(self, stage: str) -> None:
        """Refuse strategies that split the model."""
        require_replicas(self.trainer, plain_ddp=True)

    def _log_normaliser(self, states: Tensor) -> Tensor:
        """``(B,)``, ``log sum_j exp <h, table_j>`` of the last slot, over the whole catalogue."""
        any_item = torch.zeros(len(states), dtype=torch.int64, device=states.device)
        table = self.encoder.item_embeddings
        with torch.autocast(states.device.type, enabled=False):  # the kernels would round both operands
            last = states[:, -1].to(table.dtype)
            return cce_minus_loss(last, table, any_item, n_negatives="all", return_lse=True)[1]

    def _rank(
        self, states: Tensor, batch: dict[str, Tensor], k: int, log_normaliser: Tensor | None = None
    ) -> Recommendations:
        table = self.encoder.item_embeddings
        if self.repeat is not None:
            if log_normaliser is None:
                log_normaliser = self._log_normaliser(states)
            ranked = self.repeat.rank(states, batch["item_ids"], batch["basket_ids"], table, log_normaliser, k)
        else:
            seen = (None, None) if self.recommend_seen else (batch["history_items"], batch["history_offsets"])
            ranked = top_k_items(states[:, -1], table, k, seen_items=seen[0], seen_offsets=seen[1])
        return Recommendations(batch["user_index"], item_ids=ranked[1], scores=ranked[0])

    def on_train_epoch_start(self) -> None:
        """Begin the mean of the epoch; not called where a run goes on amid one."""
        self.train_loss.reset()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean loss over every slot that has a target, times the share this process has of them."""
        item_ids, basket_ids, targets = batch["item_ids"], batch["basket_ids"], batch["targets"]
        states = self(item_ids, basket_ids)
        loss = self.loss(
            states,
            self.encoder.item_embeddings,
            targets,
            step=self.micro_step,  # a tensor: nothing waits for the device
            rank=self.global_rank,
            reduction="mean" if self.repeat is None else "none",
        )
        if self.repeat is not None:
            loss = self.repeat.loss(loss, states, item_ids, basket_ids, targets)
        self.micro_step += 1
        n_targets = (targets >= 0).sum()
        self.train_loss.update(loss, n_targets)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(targets))
        return loss * share(n_targets, device=self.device)

    def _evaluate(
        self,
        states: Tensor,
        batch: dict[str, Tensor],
        metrics: MetricCollection,
        log_normaliser: Tensor | None = None,
    ) -> Recommendations:
        ranked = self._rank(states, batch, self.cutoffs[-1], log_normaliser)
        for metric in metrics.values():
            if isinstance(metric, Coverage | Surprisal):
                metric.update(ranked.item_ids, batch["history_items"], batch["history_offsets"])
            else:
                metric.update(ranked.item_ids, batch["relevant"])
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=len(states))
        return ranked

    def _relevant_loss(self, states: Tensor, batch: dict[str, Tensor], log_normaliser: Tensor) -> Tensor:
        """Mean of ``-log p(item)`` of the relevant items from the last slot."""
        relevant = batch["relevant"]
        users, places = (relevant >= 0).nonzero(as_tuple=True)
        last = states[users, -1].to(log_normaliser.dtype)
        loss = log_normaliser[users] - (last * self.encoder.item_embeddings[relevant[users, places]]).sum(-1)
        if self.repeat is None:
            return loss.mean()
        by_place = log_normaliser.new_zeros(relevant.shape)
        by_place[users, places] = loss
        return self.repeat.last_state_loss(by_place, states, batch["item_ids"], batch["basket_ids"], relevant)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Rank the catalogue, and take the exact loss of the last state against each relevant item."""
        states = self(batch["item_ids"], batch["basket_ids"])
        log_normaliser = self._log_normaliser(states)
        self._evaluate(states, batch, self.val_metrics, log_normaliser)
        n_relevant = (batch["relevant"] >= 0).sum()
        self.val_loss.update(self._relevant_loss(states, batch, log_normaliser), n_relevant)
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True, batch_size=len(states))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> Recommendations:  # type: ignore[override]
        """Rank the catalogue; the report callback reads what is returned."""
        return self._evaluate(self(batch["item_ids"], batch["basket_ids"]), batch, self.test_metrics)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Recommendations:
        """The ``n_recommendations`` best items of each user, from the whole history."""
        return self._rank(self(batch["item_ids"], batch["basket_ids"]), batch, self.n_recommendations)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another catalogue before its weights fail to fit.

        Raises:
            ValueError: If the number of items differs, or it is of another model.
        """
        table = checkpoint["state_dict"].get("encoder.item_table.weight")
        if table is None:
            raise ValueError("checkpoint was written by another model: it holds no encoder.item_table.weight")
        n_items = len(table) - 1
        if n_items != self.n_items:
            raise ValueError(
                f"checkpoint was trained on a catalogue of {n_items} items, the data here has {self.n_items}"
            )

    def configure_optimizers(self) -> Any:
        """The injected optimiser, and the scheduler if there is one."""
        optimizer = self.optimizer(self.parameters())
        if self.scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.scheduler(optimizer), "interval": "epoch", "monitor": self.monitor}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}
