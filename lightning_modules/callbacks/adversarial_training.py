"""Training against an attack: Madry's PGD training and TRADES, also with detectors in the attack's objective."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.attacks.class_losses import cross_entropy, decisions


@contextmanager
def evaluation_mode(*networks: nn.Module) -> Iterator[None]:
    """Put networks in evaluation mode and leave every module's flag as it was found, after an exception too."""
    modules = [module for network in networks for module in network.modules()]
    flags = [module.training for module in modules]
    try:
        for network in networks:
            network.eval()
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag  # and not train(flag), which would reach the children


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
            f"logits must have the shape of the clean ones, {tuple(clean_logits.shape)}, got {logits.shape}"
        )
    if logits.shape[1] == 1:  # the logit of class 1 beside a logit of 0 for class 0
        clean_logits, logits = F.pad(clean_logits, (1, 0)), F.pad(logits, (1, 0))
    log_clean, log_p = clean_logits.log_softmax(1), logits.log_softmax(1)
    return (log_clean.exp() * (log_clean - log_p)).sum(1)


class _Divergence(nn.Module):
    """A victim whose one logit is KL(p_clean || p(x)).

    Its cross-entropy and its margin against the label 0 grow with the divergence, so that an attack on it, whatever
    its class loss, maximises the divergence of TRADES.
    """

    def __init__(self, network: nn.Module, clean_logits: Tensor) -> None:
        super().__init__()
        self.network = network
        self.clean_logits = clean_logits

    def forward(self, series: Tensor, mask: Tensor | None = None) -> Tensor:
        return class_divergence(self.clean_logits, self.network(series, mask)).unsqueeze(1)


class AdversarialTraining(Callback):
    """Trains :class:`lightning_modules.TimeSeriesClassifier` on attacked batches.

        pgd:     mean_b CE(f(x_b + delta_b), y_b),                           delta: the attack on (f, y)
        trades:  mean_b CE(f(x_b), y_b) + beta KL(p(x_b) || p(x_b + delta_b)),      delta: the attack on that KL

    The attack runs against the network in evaluation mode; the loss is then taken in training mode, so dropout and
    batch statistics are those of training, and every flag is as before. Attacked series reach the running statistics
    of batch normalisation, as in the published code of both. With ``detectors`` the attack must also hide from them,
    if its objective has a part for detectors.

    Logged: ``val/robust_accuracy``, the accuracy on attacked validation series, to select the checkpoint by.

    Args:
        attack: ``attack(model, x, y, detectors=, mask=)`` with a result that has ``x_adv``, such as
            :class:`lightning_modules.attacks.Attack`. TRADES needs a random start: at the clean series the gradient of
            its divergence is zero.
        mode: ``"pgd"`` or ``"trades"``.
        beta: Weight of the divergence in TRADES, above 0.
        warmup_epochs: Epochs of plain training before.
        detectors: Networks whose one logit is that of "adversarial"; frozen and moved to the device.
        validate: Whether to attack the validation series too.

    Raises:
        ValueError: If an argument is out of range, the attack is targeted or, for TRADES, has no
            random start, or the module takes no adversary.

    Source: A. Madry et al., arXiv 1706.06083, equation 2.1; H. Zhang et al., arXiv 1901.08573, equation 5.
    """

    def __init__(
        self,
        attack: Callable[..., Any],
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
        if mode == "trades" and not getattr(attack, "random_start", True):
            raise ValueError("attack must have random_start true with mode 'trades', got false")
        if getattr(attack, "targeted", False):
            raise ValueError("attack must not be targeted: with the true label as target it would help the network")
        self.attack = attack
        self.mode = mode
        self.beta = beta
        self.warmup_epochs = warmup_epochs
        self.detectors = tuple(detectors)
        self.validate = validate

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that no adversary can be given to, or that has one."""
        if getattr(pl_module, "adversary", self) is not None:
            raise ValueError(
                f"AdversarialTraining needs a module with a free `adversary`, got {type(pl_module).__name__}"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the detectors to where the classifier is."""
        for detector in self.detectors:
            detector.to(pl_module.device).eval().requires_grad_(False)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module its adversary once the warm-up is over."""
        warm = trainer.current_epoch >= self.warmup_epochs
        pl_module.adversary = self.loss if warm else None  # type: ignore[assignment]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the adversary away."""
        pl_module.adversary = None  # type: ignore[assignment]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the adversary away: no teardown follows an exception."""
        pl_module.adversary = None  # type: ignore[assignment]

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The robust loss of a batch, a scalar; ``network(series, mask) -> logits``."""
        series, mask, labels = batch["series"], batch["mask"], batch["labels"]
        if self.mode == "pgd":
            return cross_entropy(network(self.attacked(network, series, mask, labels), mask), labels).mean()
        with evaluation_mode(network), torch.no_grad():
            fixed = network(series, mask)
        attacked = self.attacked(_Divergence(network, fixed), series, mask, torch.zeros_like(labels))
        clean = network(series, mask)
        divergence = class_divergence(clean, network(attacked, mask))
        return (cross_entropy(clean, labels) + self.beta * divergence).mean()

    def attacked(self, victim: nn.Module, series: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Series ``(B, T, C)`` after the attack, cut from its graph; the victim's flags stay as they are."""
        with evaluation_mode(victim):
            return self.attack(victim, series, labels, detectors=self.detectors, mask=mask).x_adv.detach()

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
        # Validation runs in inference mode, whose tensors no gradient can pass: copies made outside of it can.
        with torch.inference_mode(False), torch.enable_grad():
            series, mask, labels = (batch[key].clone() for key in ("series", "mask", "labels"))
            attacked = self.attacked(pl_module, series, mask, labels)
        right = decisions(pl_module(attacked, mask)) == labels
        pl_module.log("val/robust_accuracy", right.float().mean(), batch_size=len(labels), sync_dist=True)
