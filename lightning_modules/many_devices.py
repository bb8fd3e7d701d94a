"""One job on many devices: the strategy that all methods run under, and what is refused.

Every process holds the whole model. Gradients are averaged when an optimiser is about to step, before they are clipped,
whatever the loop: several optimisers, steps by hand, modules without parameters, processes with nothing in their batch.
"""

import importlib
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry
from torch import nn
from torch.optim import Optimizer

from lightning_modules.collectives import average_gradients, same_everywhere
from lightning_modules.metrics import EpochMean

REPLICATED = "replicated"
"""Name of the strategy in YAML."""


class ReplicatedStrategy(DDPStrategy):
    """Data parallel without a wrapper around the module.

    A step of R processes equals the step of one process on the joined batch where modules weigh their losses by
    :func:`lightning_modules.collectives.share`. Against ``ddp``, gradients are sent when the backward pass is done, not
    while it runs.

    Args:
        timeout: Seconds that a process waits for the others; long, since some work is done by the first for all.
        kwargs: As of ``DDPStrategy``; what only its wrapper reads has no effect.
    """

    def __init__(self, *, timeout: float = 7200.0, **kwargs: Any) -> None:
        super().__init__(timeout=timedelta(seconds=timeout), **kwargs)

    def setup(self, trainer: Trainer) -> None:
        """As of ``DDPStrategy``.

        Raises:
            ValueError: With ``sync_batchnorm``: torch's layer takes no mask, and waits for processes without rows.
        """
        if self._layer_sync:
            raise ValueError(
                "trainer.sync_batchnorm must be false: batch normalisation here takes the valid steps of each process' "
                "own batch, which torch's synchronised layer cannot, got true"
            )
        super().setup(trainer)

    def configure_ddp(self) -> None:
        """Start everywhere from the weights of the first process."""
        assert self.model is not None
        same_everywhere(self.model)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Average the gradients of the optimiser's parameters, then step."""

        def averaged() -> Any:
            result = closure()
            average_gradients(parameter for group in optimizer.param_groups for parameter in group["params"])
            return result

        return super().optimizer_step(optimizer, averaged, model, **kwargs)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state, means of a half-done epoch summed over processes; every process builds it."""
        assert self.lightning_module is not None
        state = self.lightning_module.state_dict()
        for name in self._means():
            for part in EpochMean.SUMS:
                state[f"{name}.{part}"] = self.reduce(state[f"{name}.{part}"].clone(), reduce_op="sum")
        return state

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take up a state; sums of a half-done epoch go on in the first process alone."""
        super().load_model_state_dict(checkpoint, strict=strict)
        if self.global_rank > 0:
            for metric in self._means().values():
                metric.reset()

    def _means(self) -> dict[str, EpochMean]:
        assert self.lightning_module is not None
        found = self.lightning_module.named_modules()
        return {name: metric for name, metric in found if isinstance(metric, EpochMean)}

    def on_validation_start(self) -> None:
        """Statistics that norms gather are those of each process' own batches: take the first's."""
        assert self.lightning_module is not None
        same_everywhere(self.lightning_module)

    def on_train_end(self) -> None:
        """As :meth:`on_validation_start`."""
        self.on_validation_start()


StrategyRegistry.register(
    REPLICATED, ReplicatedStrategy, description="every process holds the model, gradients are averaged at the step"
)


def check_strategy(asked: Any) -> None:
    """See that a command's strategy is one that methods run under, before anything is built or written.

    Args:
        asked: ``trainer.strategy`` of a config: a name, or a class path with its arguments.

    Raises:
        ValueError: Under a strategy that splits the model, needs packages or devices that are not supported, or starts
            processes otherwise than by the command itself.
    """
    if asked in ("auto", "ddp"):
        return
    if isinstance(asked, str):
        name, kind = asked, StrategyRegistry[asked]["strategy"] if asked in StrategyRegistry else None
    else:
        name = asked["class_path"]
        module, _, attribute = name.rpartition(".")
        kind = getattr(importlib.import_module(module), attribute)
    if not (isinstance(kind, type) and issubclass(kind, (ReplicatedStrategy, SingleDeviceStrategy))):
        raise ValueError(
            f"trainer.strategy must be 'auto', {REPLICATED!r} or 'ddp' (which means it), or of one device: every "
            f"process holds the whole model and is started by the command, torchrun or SLURM, got {name!r}"
        )


def require_replicas(trainer: Trainer, *, plain_ddp: bool = False) -> None:
    """See that every process holds the whole model.

    Args:
        trainer: Of the run.
        plain_ddp: Whether the module works under Lightning's own ``DDPStrategy`` too, for trainers made in Python: a
            command has ``ddp`` mean ``replicated``.

    Raises:
        ValueError: Under a strategy that splits the model, or another that the module does not know.
    """
    strategy = trainer.strategy
    known = (SingleDeviceStrategy, ReplicatedStrategy, *((DDPStrategy,) if plain_ddp else ()))
    if not isinstance(strategy, known) and trainer.world_size > 1:
        raise ValueError(
            f"trainer.strategy must be {REPLICATED!r} (every process holds the whole model; configs/trainer/ddp.yaml), "
            f"got {type(strategy).__name__}"
        )
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise ValueError(
            f"trainer.strategy must be 'auto' or {REPLICATED!r}: models that are split over devices are not supported, "
            f"got {type(strategy).__name__}"
        )


def wants_many(devices: Any, num_nodes: Any, accelerator: Any) -> bool:
    """Whether a trainer with these arguments starts more than one process."""
    if isinstance(num_nodes, int) and num_nodes > 1:
        return True
    if isinstance(devices, list):
        return len(devices) > 1
    if isinstance(devices, str) and "," in devices:
        return len([one for one in devices.split(",") if one.strip()]) > 1
    if devices in ("auto", -1, "-1"):
        return accelerator != "cpu" and torch.cuda.device_count() > 1
    try:
        return int(devices) > 1
    except (TypeError, ValueError):
        return False
