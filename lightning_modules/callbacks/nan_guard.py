"""A loss or gradient that is no finite number ends the fit, and the batch that it came from is kept."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_modules.callbacks.results_folder import folder_of_run
from lightning_modules.collectives import gather_objects, n_processes
from lightning_modules.run_folder import drafted

_NAMES_SHOWN = 3


@dataclass
class _Seen:
    """A training batch and what came of it: no number is read from a device before it must be."""

    batch: Any
    batch_idx: int
    epoch: int
    step: int
    loss_is_bad: Tensor  # () bool, of this process
    gradient_is_bad: Tensor  # () bool


class NaNGuard(Callback):
    """Stops a fit at the first loss or gradient that is NaN or infinite.

    Every loss that is propagated back is seen, also where the module optimises by hand: Lightning announces all of them
    (``on_before_backward``), and every step of an optimiser (``on_before_optimizer_step``).

    On a CPU the verdict falls before the optimiser steps: the weights are still those that gave the loss. On a GPU
    reading the verdict at once would make the host wait for every step, so it is read when the next batch is done; the
    batch is held until then, and the names are those of weights and gradients one step later. No checkpoint is written
    before the verdict on its last step. With several processes all end at the same step.

    The run folder then holds ``nonfinite_batch.pt``, with several processes ``nonfinite_batch_rank<r>.pt`` of each
    whose own loss it was, or of all where only the averaged gradient shows it. It is a dict of ``batch`` (as the module
    got it, on the CPU), ``batch_idx``, ``epoch``, ``step`` (optimiser steps before), ``rank``, and ``parameters`` and
    ``gradients`` (names of those that are not finite); ``torch.load(..., weights_only=True)`` reads it.

    Where gradients are gathered over batches, they are judged when the optimiser steps, and its last batch is kept.
    With 16-bit loss scaling infinite gradients are the scaler's daily business: there only losses are judged.
    """

    def __init__(self) -> None:
        self._folder = Path()
        self._judges_gradients = True
        self._now: _Seen | None = None
        self._unread: tuple[_Seen, Tensor] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the folder on every rank, since asking for it is a collective."""
        self._folder = folder_of_run(trainer)
        self._judges_gradients = getattr(trainer.precision_plugin, "scaler", None) is None
        self._now = self._unread = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Hold the batch."""
        fine = torch.zeros((), dtype=torch.bool, device=pl_module.device)
        self._now = _Seen(batch, batch_idx, trainer.current_epoch, trainer.global_step, fine, fine)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Judge a loss."""
        if self._now is not None:
            self._now.loss_is_bad = self._now.loss_is_bad | ~torch.isfinite(loss.detach()).all()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Judge the gradients; on a CPU, end here.

        Raises:
            ValueError: If a loss or gradient of the batch is not finite in any process.
        """
        if self._now is None:
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self._judges_gradients and gradients:
            largest = nn.utils.get_total_norm(gradients, norm_type=float("inf"))
            self._now.gradient_is_bad = self._now.gradient_is_bad | ~torch.isfinite(largest)
        if pl_module.device.type == "cpu":
            self._end_if(self._verdict(self._now), self._now, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the verdict on the batch, or on a GPU on the one before.

        Raises:
            ValueError: As :meth:`on_before_optimizer_step`.
        """
        if self._now is None:
            return
        seen, self._now = self._now, None
        verdict = self._verdict(seen)
        if verdict.device.type == "cpu":
            self._end_if(verdict, seen, pl_module)
            return
        self._read(pl_module)
        self._unread = seen, verdict.to("cpu", non_blocking=True)

    def _verdict(self, seen: _Seen) -> Tensor:
        """``() bool``, the same in every process."""
        bad = seen.loss_is_bad | seen.gradient_is_bad
        if n_processes() == 1:
            return bad
        anywhere = bad.to(torch.float32)
        torch.distributed.all_reduce(anywhere)
        return anywhere > 0

    def _read(self, pl_module: LightningModule) -> None:
        if self._unread is not None:
            (seen, verdict), self._unread = self._unread, None
            torch.cuda.current_stream(pl_module.device).synchronize()
            self._end_if(verdict, seen, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """See that no weights of a bad step are kept.

        Raises:
            ValueError: As :meth:`on_before_optimizer_step`.
        """
        self._read(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read what is unread before the metrics of bad weights are computed.

        Raises:
            ValueError: As :meth:`on_before_optimizer_step`.
        """
        self._read(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read what is unread.

        Raises:
            ValueError: As :meth:`on_before_optimizer_step`.
        """
        self._read(pl_module)

    def _end_if(self, verdict: Tensor, seen: _Seen, pl_module: LightningModule) -> None:
        if not bool(verdict):
            return
        rank, own = pl_module.global_rank, bool(seen.loss_is_bad)
        whose = gather_objects(own)  # all are here: the verdict is the same everywhere
        gradients = [
            name for name, weight in pl_module.named_parameters() if weight.grad is not None and _is_bad(weight.grad)
        ]
        kept = ""
        if own or not any(whose):
            path = self._folder / ("nonfinite_batch.pt" if len(whose) == 1 else f"nonfinite_batch_rank{rank}.pt")
            found = {
                "batch": _plain(seen.batch),
                "batch_idx": seen.batch_idx,
                "epoch": seen.epoch,
                "step": seen.step,
                "rank": rank,
                "parameters": [name for name, weight in pl_module.named_parameters() if _is_bad(weight)],
                "gradients": gradients,
            }
            with drafted(path) as draft:
                torch.save(found, draft)
            kept = f"; the batch is kept in {path}"
        processes = [str(number) for number, bad in enumerate(whose) if bad]
        what = "the loss" if processes else "a gradient"
        where = f" in process {', '.join(processes)}" if len(whose) > 1 and processes else ""
        more = f" and {len(gradients) - _NAMES_SHOWN} more" if len(gradients) > _NAMES_SHOWN else ""
        names = f"; gradients: {', '.join(gradients[:_NAMES_SHOWN])}{more}" if gradients else ""
        raise ValueError(
            f"{what} is not finite{where} at epoch {seen.epoch}, batch {seen.batch_idx}, step {seen.step}{names}{kept}"
        )


def _is_bad(tensor: Tensor) -> bool:
    return not bool(torch.isfinite(tensor.detach()).all())


def _plain(value: Any) -> Any:
    """Tensors on the CPU and plain values; of anything else its text."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)
