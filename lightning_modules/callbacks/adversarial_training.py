"""Training against an attack: Madry's PGD training and TRADES, also with detectors in the attack's objective."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.attacks.class_losses import cross_entropy, decisions
from lightning_modules.attacks.engine import Attack
from lightning_modules.attacks.frozen_networks import logits_of
from lightning_modules.collectives import from_first
from lightning_modules.metrics import EpochMean


def class_divergence(clean_logits: Tensor, logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(p_clean || p) of class probabilities, one a series.

    Args:
        clean_logits: ``(B, 1)`` or ``(B, K) float``.
        logits: The same shape.

    Returns:
        ``(B,) float`` in nats, at least 0.

    Raises:
        ValueError: If the shapes differ.
    """
    if clean_logits.shape != logits.shape:
        raise ValueError(
            f"logits must have the shape of the clean ones, {tuple(clean_logits.shape)}, got {tuple(logits.shape)}"
        )
    if logits.shape[1] == 1:  # the logit of class 1 beside a logit of 0 for class 0
        clean_logits, logits = F.pad(clean_logits, (1, 0)), F.pad(logits, (1, 0))
    log_clean, log_p = clean_logits.log_softmax(1), logits.log_softmax(1)
    return (log_clean.exp() * (log_clean - log_p)).sum(1)


class _Divergence(nn.Module):
    """A victim whose one logit is 2 + KL(p_clean || p(x)).

    Its cross-entropy and its margin against the label 0 grow with the divergence, so that an attack on it, whatever
    its class loss, maximises the divergence of TRADES. The 2 keeps the logits out of 0..1, where attacks look for
    probabilities.
    """

    def __init__(self, network: nn.Module, clean_logits: Tensor) -> None:
        super().__init__()
        self.network = network
        self.clean_logits = clean_logits

    def forward(self, series: Tensor, mask: Tensor | None = None) -> Tensor:
        return 2 + class_divergence(self.clean_logits, self.network(series, mask)).unsqueeze(1)


class AdversarialTraining(Callback):
    """Trains :class:`lightning_modules.TimeSeriesClassifier` on attacked batches.

        pgd:     mean_b CE(f(x_b + delta_b), y_b),                           delta: the attack on (f, y)
        trades:  mean_b CE(f(x_b), y_b) + beta KL(p(x_b) || p(x_b + delta_b)),      delta: the attack on that KL

    The attack runs against the network in evaluation mode and leaves it as it was; the loss is then taken in training
    mode, so that attacked series enter the statistics of batch normalisation, as in the published code of both. With
    ``detectors`` the attack must hide from them too, if its objective has a part for detectors. What is random in it
    is a function of the series and of a seed that is drawn anew for each batch of training and once for a validation,
    from torch's default generator; of several processes the first draws for all.

    Logged: ``val/robust_accuracy``, the accuracy on attacked validation series, to select the checkpoint by.

    Args:
        attack: Untargeted. TRADES needs a random start: at the clean series the gradient of its divergence is zero.
        mode: ``"pgd"`` or ``"trades"``.
        beta: Weight of the divergence in TRADES, above 0.
        warmup_epochs: Epochs of plain training before.
        detectors: Networks whose one logit is that of "adversarial"; moved to the module's device.
        validate: Whether to attack the validation series too.

    Raises:
        ValueError: If an argument is out of range, the attack is targeted or, for TRADES, has no random start; at the
            start of a run, if the module takes no adversary or has one.

    Source: A. Madry et al., arXiv 1706.06083, equation 2.1; H. Zhang et al., arXiv 1901.08573, equation 5.
    """

    def __init__(
        self,
        attack: Attack,
        *,
        mode: Literal["pgd", "trades"] = "pgd",
        beta: float = 6.0,
        warmup_epochs: int = 0,
        detectors: Sequence[nn.Module] = (),
        validate: bool = True,
    ) -> None:
        if mode not in ("pgd", "trades"):
            raise ValueError(f"mode must be 'pgd' or 'trades', got {mode!r}")
        if not beta > 0:
            raise ValueError(f"beta must be above 0, got {beta}")
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must be at least 0, got {warmup_epochs}")
        if mode == "trades" and not attack.random_start:
            raise ValueError("attack must have random_start true with mode 'trades', got false")
        if attack.targeted:
            raise ValueError("attack must not be targeted: with the true label as target it would help the network")
        self.attack = attack
        self.mode = mode
        self.beta = beta
        self.warmup_epochs = warmup_epochs
        self.detectors = tuple(detectors)
        self.validate = validate
        self._robust_accuracy = EpochMean()
        self._seed: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that no adversary can be given to, or that has one."""
        if getattr(pl_module, "adversary", self) is not None:
            raise ValueError(
                f"AdversarialTraining needs a module with a free `adversary`, got {type(pl_module).__name__}"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the detectors to where the classifier is."""
        for detector in self.detectors:
            detector.to(pl_module.device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As :meth:`on_train_epoch_start`, which is not called where a fit resumes amid an epoch."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module its adversary once the warm-up is over."""
        warm = trainer.current_epoch >= self.warmup_epochs
        pl_module.adversary = self.loss if warm else None  # type: ignore[assignment]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Draw what is random in the attack on this batch."""
        if pl_module.adversary is not None:
            self._draw()

    def _draw(self) -> None:
        # One seed for all processes: what a series meets then does not depend on which of them it is in.
        self._seed = from_first(lambda: self.attack.seed(None))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the adversary away."""
        pl_module.adversary = self._seed = None  # type: ignore[assignment]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the adversary away: no teardown follows an exception."""
        pl_module.adversary = self._seed = None  # type: ignore[assignment]

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The robust loss of a batch, a scalar; ``network(series, mask) -> logits``."""
        series, mask, labels = batch["series"], batch["mask"], batch["labels"]
        if self.mode == "pgd":
            return cross_entropy(network(self.attacked(network, batch), mask), labels).mean()
        victim = _Divergence(network, logits_of(network, series, mask, batch_size=len(series)))
        # In one pass: the victim holds the clean logits of the whole batch.
        attacked = self.attacked(victim, batch | {"labels": torch.zeros_like(labels)}, batch_size=len(series))
        clean = network(series, mask)
        divergence = class_divergence(clean, network(attacked, mask))
        return (cross_entropy(clean, labels) + self.beta * divergence).mean()

    def attacked(self, victim: nn.Module, batch: dict[str, Tensor], batch_size: int | None = None) -> Tensor:
        """Series ``(B, T, C)`` after the attack, ``batch_size`` a pass, which leaves the victim as it found it."""
        return self.attack(
            victim,
            batch["series"],
            batch["labels"],
            detectors=self.detectors,
            mask=batch["mask"],
            index=batch["index"],
            generator=self._seed,
            batch_size=batch_size,
        ).x_adv

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last validation."""
        self._robust_accuracy.to(pl_module.device).reset()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Draw what is random in the attack, once: the batches depend on how many processes there are."""
        if self.validate and batch_idx == 0:
            self._draw()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: dict[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Accuracy on the attacked batch, in both modes under the attack on the class."""
        if not self.validate:
            return
        if len(batch["labels"]) == 0:  # of several processes one may have none left
            return
        # Validation runs in inference mode, whose tensors no gradient can pass: copies made outside of it can.
        with torch.inference_mode(False):
            attacked = self.attacked(pl_module, {key: value.clone() for key, value in batch.items()})
        right = decisions(pl_module(attacked, batch["mask"])) == batch["labels"]
        self._robust_accuracy.update(right.float().mean(), len(right))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the accuracy on all attacked validation series."""
        if not self.validate:
            return
        # The same in every process already; sync_dist only says so to Lightning.
        pl_module.log("val/robust_accuracy", self._robust_accuracy.compute(), sync_dist=True)
