"""A classifier of time series: any network that returns logits, trained by cross-entropy or against an adversary."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
)

from lightning_modules.attacks.class_losses import cross_entropy, decisions
from lightning_modules.attacks.frozen_networks import takes_mask
from lightning_modules.attacks.series_batches import without_padding
from lightning_modules.collectives import share
from lightning_modules.many_devices import require_replicas
from lightning_modules.metrics import ClassifierAUC, EpochMean
from lightning_modules.networks import NetworkFactory, ResCNN

_FACTS = ("n_channels", "n_classes", "n_steps")


@dataclass  # not frozen: Lightning refuses to collect frozen ones from predict
class ClassPredictions:
    """Answers for a batch of series.

    ``index (B,) int64`` are rows of the split, ``logits (B, 1) float`` that of class 1 of two, or ``(B, K)``.
    """

    index: Tensor
    logits: Tensor


def _adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-3)


class TimeSeriesClassifier(LightningModule):
    """Classes of whole series, from a network given by a factory.

    The batches are those of ``TimeSeriesDataModule``: ``series (B, T, C) float32``, ``mask (B, T) bool``, ``labels
    (B,) int64`` in 0..K-1, ``index (B,) int64``. ``n_channels``, ``n_classes`` and ``n_steps`` are facts of the data
    and linked by the CLI, never typed. The module itself is called as its network is, and may so be attacked whole.

        loss = mean_b -log p(label_b | series_b),  p = sigmoid (one logit, of class 1) or softmax

    Of several processes each takes its part of a batch, and gradients are those of the joined batch. Batch
    normalisation (:class:`~lightning_modules.networks.ResCNN`) has the statistics of each part.

    Where ``adversary`` is set, training minimises ``adversary(module, batch)`` instead, see
    :class:`lightning_modules.callbacks.AdversarialTraining`.

    Logged: ``train/loss``, ``val/loss``, ``val/accuracy``, ``val/f1`` and the same with ``test/auroc`` for test. F1 is
    that of class 1, for K > 2 the mean over classes; AUROC for K > 2 is the mean over classes against the rest, of
    those that the split has; NaN where it has one class alone.

    Args:
        n_channels: C.
        n_classes: K, at least 2.
        n_steps: T of the data.
        network: Called with the three facts by name; returns a module ``network(series, mask) -> logits (B, 1)`` for
            two classes or ``(B, K)``. One without a parameter ``mask`` is called with the series alone, and padding
            is refused.
        optimizer: Called with the parameters.
        scheduler: Called with the optimiser; stepped every epoch, a plateau scheduler on ``monitor``.
        monitor: The logged key a plateau scheduler watches.

    Raises:
        ValueError: If a fact of the data was not linked, or there are fewer than two classes.
    """

    def __init__(
        self,
        *,
        n_channels: int,
        n_classes: int,
        n_steps: int,
        network: NetworkFactory = ResCNN,
        optimizer: OptimizerCallable = _adam,
        scheduler: LRSchedulerCallable | None = None,
        monitor: str = "val/loss",
    ) -> None:
        facts = dict(zip(_FACTS, (n_channels, n_classes, n_steps), strict=True))
        missing = [name for name, value in facts.items() if value is None]
        if missing:
            raise ValueError(f"{', '.join(missing)} must come from the data, got None")
        if n_classes < 2:
            raise ValueError(f"n_classes must be at least 2, got {n_classes}")
        super().__init__()
        self.facts = facts
        self.n_classes = n_classes
        self.n_logits = 1 if n_classes == 2 else n_classes
        self.network = network(n_channels=n_channels, n_classes=n_classes, n_steps=n_steps)
        self._takes_mask = takes_mask(self.network)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.monitor = monitor
        self.adversary: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None
        self.train_loss, self.val_loss, self.test_loss = EpochMean(), EpochMean(), EpochMean()
        self.val_metrics = self._metrics("val/")
        self.test_metrics = self._metrics("test/")
        self.test_auroc = ClassifierAUC(n_classes)

    def _metrics(self, prefix: str) -> MetricCollection:
        if self.n_classes == 2:
            return MetricCollection({"accuracy": BinaryAccuracy(), "f1": BinaryF1Score()}, prefix=prefix)
        accuracy = MulticlassAccuracy(self.n_classes, average="micro")
        f1 = MulticlassF1Score(self.n_classes, average="macro")
        return MetricCollection({"accuracy": accuracy, "f1": f1}, prefix=prefix)

    def forward(self, series: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits ``(B, 1)`` or ``(B, K)`` of series ``(B, T, C)``.

        Raises:
            ValueError: If the network takes no mask and there is padding, or returns another shape.
        """
        if self._takes_mask:
            logits = self.network(series, mask)
        elif mask is None or bool(mask.all()):
            logits = self.network(series)
        else:
            raise ValueError(f"{type(self.network).__name__} takes no mask, but series of this batch are padded")
        if logits.shape != (len(series), self.n_logits):
            raise ValueError(
                f"{type(self.network).__name__} must return logits of shape {(len(series), self.n_logits)}, "
                f"got {tuple(logits.shape)}"
            )
        return logits

    def setup(self, stage: str) -> None:
        """See that every process holds the whole network."""
        require_replicas(self.trainer, plain_ddp=True)

    def on_train_epoch_start(self) -> None:
        """Begin the epoch's mean."""
        self.train_loss.reset()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy, or what the adversary makes of the batch."""
        padded, batch = batch, without_padding(batch)
        labels = batch["labels"]
        if len(labels) == 0:
            # Others wait for this process, in norms of theirs too: a forward pass, and gradients of 0.
            loss = 0.0 * self(padded["series"], padded["mask"]).sum()
        elif self.adversary is None:
            loss = cross_entropy(self(batch["series"], batch["mask"]), labels).mean()
        else:
            loss = self.adversary(self, batch)
        self.train_loss.update(loss, len(labels))
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))
        return loss * share(len(labels), device=self.device)

    def _evaluate(self, batch: dict[str, Tensor], split: str, metrics: MetricCollection) -> ClassPredictions:
        labels, mean_loss = batch["labels"], self.val_loss if split == "val" else self.test_loss
        logits = self._logits(batch)
        if len(labels):
            metrics.update(decisions(logits), labels)
        mean_loss.update(cross_entropy(logits, labels).mean(), len(labels))
        self.log(f"{split}/loss", mean_loss, on_step=False, on_epoch=True, batch_size=len(labels))
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=len(labels))
        return ClassPredictions(batch["index"], logits)

    def _logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Of a batch that may be empty, where other processes have more."""
        if len(batch["labels"]) == 0:
            return batch["series"].new_zeros(0, self.n_logits)
        return self(batch["series"], batch["mask"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Loss, accuracy and F1 of a batch."""
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> ClassPredictions:  # type: ignore[override]
        """Loss, accuracy, F1 and AUROC of a batch; callbacks read what is returned."""
        predictions = self._evaluate(batch, "test", self.test_metrics)
        self.test_auroc.update(predictions.logits, batch["labels"])
        self.log("test/auroc", self.test_auroc, on_step=False, on_epoch=True, batch_size=len(batch["labels"]))
        return predictions

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> ClassPredictions:
        """Logits of a batch with the rows they belong to."""
        return ClassPredictions(batch["index"], self._logits(batch))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the facts of the data beside the weights."""
        checkpoint["series_facts"] = self.facts

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other data before its weights fail to fit.

        Raises:
            ValueError: If channels, classes or steps differ.
        """
        trained = checkpoint.get("series_facts", self.facts)
        for name, value in self.facts.items():
            if trained[name] != value:
                raise ValueError(f"checkpoint was trained with {name} {trained[name]}, the data here has {value}")

    def configure_optimizers(self) -> Any:
        """The injected optimiser, and the scheduler if there is one."""
        optimizer = self.optimizer(self.parameters())
        if self.scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.scheduler(optimizer), "interval": "epoch", "monitor": self.monitor}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}
